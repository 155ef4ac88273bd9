"""The benchmarks run at small shapes on a CPU, write their JSON, and measure what they say."""

import json
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lightning_rlora.adapters import find_pairs

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))

import bench
import contestant
import growth
import llama
import many_gpus
import memory
import step_time
import train_step
import unet

pytestmark = pytest.mark.skipif(bench.ON_GPU, reason="these shapes and counts are those of a CPU")

SMALL = ["--layers", "1", "--shrink", "64"]
SHAPES = [(64, 48), (32, 48), (64, 48)]


def report(main, folder, *options):
    """A benchmark's JSON, written by its own command line."""
    out = folder / "new" / "results.json"
    main([*options, "--out", str(out)])
    return json.loads(out.read_text())


def test_step_time_compares_every_optimizer(tmp_path, capsys):
    results = report(step_time.main, tmp_path, *SMALL, "--ranks", "2", "4", "--repeats", "3")
    assert set(results["header"]) >= {"device", "torch", "triton", "transformers", "peft", "date", "command"}
    assert set(results["ranks"]) == {"2", "4"} and set(results["ranks"]["2"]) == {"AdamW", "Riemannion"}
    assert set(results["variants"]) == {"AdamW", "Riemannion", *contestant.VARIANTS}
    for measured in results["variants"].values():
        low, high = measured["latency_ms_range"]
        assert 0 < low <= measured["latency_ms"] <= high and measured["latency_ms_repeats"] == 3
    printed = capsys.readouterr().out
    assert printed.startswith(f"# {results['header']['device']}\n") and results["header"]["command"] in printed
    floor = results["floor_ms"]["4"] / 1e3 * results["bandwidth"]
    numbers = 4 * sum(m + n for m, n in llama.projection_shapes(llama.llama_3_8b(1, 64)))
    assert floor == pytest.approx(8 * 4 * numbers)


def test_step_time_has_the_quickstarts_adapters(tmp_path):
    config, adapter = llama.quickstart()
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(**adapter))
    pairs = find_pairs(model)
    assert sorted(llama.projection_shapes(config)) == sorted(pair.shape[:2] for pair in pairs)
    results = report(step_time.main, tmp_path, "--model", "quickstart", "--repeats", "1")
    assert set(results["ranks"]) == {str(pairs[0].shape[2])}


def test_growth_is_measured_and_drawn(tmp_path):
    results = report(step_time.main, tmp_path, *SMALL, "--growth", "--ranks", "2", "4", "--repeats", "1")
    values = [[point["value"] for point in axis] for axis in results["growth"].values()]
    assert values == [[2, 4], growth.WIDTHS, growth.COUNTS]
    image = tmp_path / "growth.png"
    step_time.main(["--plot", str(tmp_path / "new" / "results.json"), str(image)])
    assert image.read_bytes().startswith(b"\x89PNG")


def test_a_plot_needs_growth(tmp_path):
    (tmp_path / "other.json").write_text('{"header": {}}')
    with pytest.raises(SystemExit, match="holds no growth"):
        step_time.main(["--plot", str(tmp_path / "other.json"), str(tmp_path / "no.png")])


def test_profile_counts_within_the_steps(tmp_path):
    results = report(step_time.main, tmp_path, *SMALL, "--profile", "--ranks", "2")["profile"]
    # AdamW's foreach reads each parameter's step count, and `item` is counted with what it calls
    assert results["AdamW"]["scalars read (item, _local_scalar_dense)"] >= 2 * 14
    assert any(name.startswith("aten::") for name, _, _ in results["Riemannion"]["CPU"])


def test_train_step_and_memory_agree_on_the_state(tmp_path):
    tokens = ["--batch", "2", "--length", "8"]
    steps = report(train_step.main, tmp_path, *SMALL, *tokens, "--rank", "4", "--blocks", "2", "--steps", "1")
    sizes = report(memory.main, tmp_path, *SMALL, *tokens, "--ranks", "4")["results"]["4"]
    assert set(sizes) == {"AdamW", "Riemannion", "RiemannianSGD"}
    numbers = 4 * sum(m + n for m, n in llama.projection_shapes(llama.llama_3_8b(1, 64)))
    assert sizes["AdamW"]["state"] == 4 * (2 * numbers + 14)  # two moments of each number, a count of each tensor
    for name, held in steps["memory"].items():
        assert held["state"] == sizes[name]["state"]
    (found,) = steps["results"].values()
    assert len(found["ratios"]) == 2 and all(ms > 0 for ms in found["step_ms"].values())


@pytest.mark.parametrize(
    ("kind", "size", "layers"),
    [
        ("sd15", 859_520_964, 128),
        ("sd2", 865_910_724, 128),
        pytest.param("sdxl", 2_567_463_684, 560, marks=pytest.mark.slow),
    ],
)
def test_train_step_of_a_unet(kind, size, layers, tmp_path):
    with torch.device("meta"):  # of the published models
        assert sum(p.numel() for p in UNet2DConditionModel(**unet.stable_diffusion(kind)).parameters()) == size
    options = ["--model", kind, "--shrink", "16", "--batch", "1", "--rank", "2", "--blocks", "1", "--steps", "1"]
    found = report(train_step.main, tmp_path, *options)
    pairs = find_pairs(unet.adapted_unet(unet.stable_diffusion(kind, 16), 2))
    assert len(pairs) == layers
    numbers = 2 * sum(sum(pair.shape[:2]) for pair in pairs)
    assert found["memory"]["AdamW"]["state"] == 4 * (2 * numbers + 2 * layers)


@pytest.mark.parametrize("name", train_step.COMPARED)
def test_sides_train_adapters_of_their_own_as_if_alone(name):
    config = llama.llama_3_8b(1, 64)
    tokens = llama.Tokens(torch.randint(config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0)))

    def trained(names):
        model = llama.adapted_llama(config, 2)
        sides = {}
        for each in names:
            torch.manual_seed(1)  # of the new adapter
            sides[each] = train_step.Side(model, each, memory.OPTIMIZERS[each], tokens)
        for _ in range(2):
            for side in sides.values():
                side.block(2)
        return [p.detach() for key, p in model.named_parameters() if f".{name}." in key]

    together, alone = trained(train_step.COMPARED), trained([name])
    assert together and all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_contestants_start_on_the_manifold_and_change_their_gradients():
    one = contestant.Contestant(contestant.RIEMANNION["Riemannion"], SHAPES, 4)
    for a, b in zip(one.params[::2], one.params[1::2], strict=True):
        s = torch.linalg.svdvals(contestant.SCALING * (b @ a).detach())[:4]
        # sums of squares of random entries: measured 0.6 to 1.6 of the mean
        assert float(s.min()) > 0.4 * contestant.SIZE and float(s.max()) < 2.5 * contestant.SIZE
    assert contestant.floor_bytes(SHAPES, 4) == 8 * sum(p.nbytes for p in one.params)
    seen = []
    for _ in range(3):
        one.step()
        seen.append([p.grad for p in one.params])
    for first, second, third in zip(*seen, strict=True):
        assert first is third and first.data_ptr() != second.data_ptr() and not torch.equal(first, second)


def test_interleaved_takes_turns_and_stops_in_time():
    order = count()
    times = bench.interleaved({"a": lambda: next(order), "b": lambda: next(order)}, 3)
    assert times == {"a": [0, 2, 4], "b": [1, 3, 5]}
    assert bench.interleaved({"a": lambda: 1.0}, 5, seconds=0.0) == {"a": [1.0] * bench.FEW}


def test_growth_is_judged_above_a_millisecond():
    before, point = {"t": 2.0, "floor_bytes": 10}, {"t": 6.0, "floor_bytes": 20}
    assert growth.beyond_linear(before, point, "t") == 1.5
    assert growth.beyond_linear(before | {"t": 0.9}, point, "t") is None


def test_benchmarks_need_no_more_than_torch_transformers_and_peft():
    missing = "import sys; sys.modules |= dict.fromkeys(['datasets', 'jsonargparse', 'matplotlib'])"
    folder = Path(bench.__file__).parent
    code = f"{missing}; sys.path.insert(0, {str(folder)!r}); import step_time, train_step; step_time.main(['--help'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and "--growth" in result.stdout, result.stderr


def test_several_gpus_are_compared_by_what_did_not_fail(tmp_path, capsys, monkeypatch):
    process = {"step_ms": 100.0, "optimizer_ms": 1.0, "sent": {"allreduce": 2**20}, "peak": 2**30, "trained": 7}
    asked = []

    def measure(strategy, devices, optimizer, base, more):
        asked.append(more)
        if strategy == "fsdp2":
            raise subprocess.CalledProcessError(1, "torchrun")
        return [process | {"step_ms": 80.0 * devices**0.5}] * devices

    monkeypatch.setattr(many_gpus, "measure", measure)
    monkeypatch.setattr(many_gpus, "write_model", lambda *_: None)
    with pytest.raises(SystemExit, match="Riemannion, fsdp2"):
        many_gpus.main(["--devices", "4", "--no-gradient-checkpointing", "--out", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["runs"].keys() == {f"Riemannion, {name}" for name in ("one", "ddp", "fsdp1")}
    assert written["failed"] == ["Riemannion, fsdp2"]
    assert "| Riemannion, ddp | 4 | 160 | 0.5 | 1 | 0.625 | 1024 | allreduce 1 |" in capsys.readouterr().out
    assert all("--gradient-checkpointing" not in more for more in asked)
