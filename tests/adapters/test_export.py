"""Exported adapters are loaded by PEFT alone, on the pristine base, and give the trained model's outputs."""

import copy
import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapted_models import IDS, gpt2, llama, one_layer, randomise, unet
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import lightning_rlora.adapters.export as export_module
from lightning_rlora.adapters import (
    export_adapter,
    find_adapted,
    find_pairs,
    get_offset,
    matrix,
    merge_adapter,
    track_offsets,
)
from lightning_rlora.errors import UserError

LOADER = """
import pathlib, sys, torch, warnings
from peft import PeftModel
warnings.simplefilter("ignore")
outputs = {}
for case in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    base, inputs = torch.load(case / "base.pt", weights_only=False)
    with torch.no_grad():
        outputs[case.name] = PeftModel.from_pretrained(base, case / "adapter").eval()(*inputs)[0]
assert "lightning_rlora" not in sys.modules
torch.save(outputs, sys.argv[2])
"""


def shift(model):
    """Shift each base by the present adapter, as LOI does."""
    pairs = find_pairs(model)
    track_offsets(pairs)
    for pair in pairs:
        get_offset(pair).subtract(pair.scaling * matrix(pair.b), matrix(pair.a))


def trained(base, config, *, offset):
    """A copy of a base with a trained adapter, on a shifted base or on the pristine one."""
    model = randomise(get_peft_model(copy.deepcopy(base), config)).eval()
    if offset:
        shift(model)
    return randomise(model, seed=2, std=0.05)


def lora(*targets, **fields):
    return LoraConfig(**({"r": 2, "lora_alpha": 3, "target_modules": list(targets)} | fields))


PATTERNS = {
    "rank_pattern": {"q_proj": 4, r"layers.1.mlp.up_proj": 1},
    "alpha_pattern": {"down_proj": 7, "layers.0.self_attn.q_proj": 5},
}
LLAMA_CASES = {
    "plain": lora("q_proj", "down_proj"),
    "all-linear": LoraConfig(r=2, target_modules="all-linear"),
    "patterns": lora("q_proj", "up_proj", "down_proj", **PATTERNS),
    "patterns-rslora": lora("q_proj", "up_proj", "down_proj", use_rslora=True, **PATTERNS),
    "dora": lora("q_proj", "v_proj", use_dora=True),
    "modules_to_save": lora("q_proj", modules_to_save=["lm_head"]),
    "embedding-and-head": lora("embed_tokens", "lm_head"),
    "gaussian": lora("q_proj", init_lora_weights="gaussian"),
}
GPT2_CASES = {
    "conv1d": lora("c_attn", "c_proj", fan_in_fan_out=True),
    "conv1d-embedding-dora": lora("c_attn", "wte", fan_in_fan_out=True, use_dora=True),
    "lora_bias": lora("c_attn", "c_fc", fan_in_fan_out=True, lora_bias=True),
}


def build_cases():
    """Name -> (pristine base, adapted model, inputs)."""
    cases = {}
    for base, configs in ((llama(), LLAMA_CASES), (gpt2(), GPT2_CASES)):
        for name, config in configs.items():
            for offset in (False, True):
                config = copy.deepcopy(config)
                cases[f"{name}{'-offset' * offset}"] = base, trained(base, config, offset=offset), (IDS,)
    for init in ("pissa", "olora"):
        cases[init] = llama(), trained(llama(), lora("q_proj", init_lora_weights=init), offset=False), (IDS,)

    base = unet()
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(7), torch.randn(1, 3, 8)
    for offset in (False, True):
        model = copy.deepcopy(base)
        model.add_adapter(lora("to_q", "conv1", "conv_shortcut", "proj_out", "conv_in", rank_pattern={"conv1": 4}))
        randomise(model)
        if offset:
            shift(model)
        cases[f"unet{'-offset' * offset}"] = base, randomise(model, seed=2, std=0.05), inputs

    model = get_peft_model(llama(), lora("q_proj", "v_proj", rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 5}))
    for name, parameter in model.named_parameters():
        if "v_proj.lora_A" in name:
            parameter.requires_grad_(False)  # these factors are no pair, and their base is not shifted
    randomise(model.eval())
    shift(model)
    cases["left-out-offset"] = llama(), randomise(model, seed=2), (IDS,)

    model = trained(llama(), lora("q_proj"), offset=False)
    model.add_adapter("second", lora("q_proj", "v_proj", r=3))
    model.set_adapter("second")
    shift(randomise(model, seed=4))
    cases["second-adapter-offset"] = llama(), randomise(model.eval(), seed=2), (IDS,)
    return cases


CASES = [
    *(f"{name}{offset}" for name in [*LLAMA_CASES, *GPT2_CASES, "unet"] for offset in ("", "-offset")),
    *("pissa", "olora", "left-out-offset", "second-adapter-offset"),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Case -> (pristine base's, trained model's and reloaded adapter's output, adapter folder), from one process."""
    folder = tmp_path_factory.mktemp("cases")
    results = {}
    for name, (base, model, inputs) in build_cases().items():
        (folder / name).mkdir()
        torch.save((base, inputs), folder / name / "base.pt")
        with torch.no_grad():
            results[name] = base(*inputs)[0], model(*inputs)[0], folder / name / "adapter"
        assert export_adapter(model, folder / name / "adapter") == 0
    output = tmp_path_factory.mktemp("outputs") / "outputs.pt"
    run = subprocess.run(
        [sys.executable, "-c", LOADER, str(folder), str(output)],
        cwd=output.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    loaded = torch.load(output)
    return {name: (before, want, loaded[name], path) for name, (before, want, path) in results.items()}


@pytest.mark.parametrize("name", CASES)
def test_peft_alone_gives_the_trained_models_outputs_on_the_pristine_base(exported, name):
    before, want, got, folder = exported[name]
    size = want.abs().max()
    assert float((want - before).abs().max() / size) > 0.01  # the adapter does something
    assert float((got - want).abs().max() / size) < 1e-5  # measured at most 8e-7
    others = {"kohya_lora.safetensors", "pytorch_lora_weights.safetensors"} if name.startswith("unet") else set()
    names = {path.name for path in folder.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"} | others
    assert not any("manifold_offset" in key for key in load_file(folder / "adapter_model.safetensors"))


def test_every_case_was_exported(exported):
    assert sorted(exported) == sorted(CASES)


def test_an_offset_doubles_the_rank_and_no_more(exported):
    ranks = {}
    for name in ("patterns", "patterns-offset"):
        state = load_file(exported[name][3] / "adapter_model.safetensors")
        ranks[name] = {key: len(value) for key, value in state.items() if "lora_A" in key}
    assert set(ranks["patterns"].values()) == {1, 2, 4}
    assert ranks["patterns-offset"] == {key: 2 * rank for key, rank in ranks["patterns"].items()}


def test_a_uniform_adapter_needs_no_patterns(exported):
    config = json.loads((exported["plain-offset"][3] / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    config = json.loads((exported["plain"][3] / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (2, 3, True)


def test_only_a_start_that_makes_the_base_runs_again_at_loading(exported):
    starts = {
        name: json.loads((exported[name][3] / "adapter_config.json").read_text())["init_lora_weights"]
        for name in ("gaussian", "gaussian-offset", "pissa")
    }
    assert starts == {"gaussian": True, "gaussian-offset": True, "pissa": "pissa"}


def test_truncation_is_the_best_of_its_rank_and_its_error_is_the_dense_one(tmp_path):
    base = llama()
    model = trained(base, lora("q_proj", "up_proj", "down_proj", **PATTERNS), offset=True)
    error = export_adapter(model, tmp_path / "adapter", truncated=True)
    pristine, loaded = dict(base.named_modules()), PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    layers = dict(loaded.named_modules())
    dense_errors = []
    for pair in find_pairs(model):
        weight = pristine[pair.name.removeprefix("base_model.model.")].weight.double()
        product = pair.scaling * pair.b.double() @ pair.a.double()
        change = (pair.layer.base_layer.weight.double() + product - weight).detach()
        u, s, vt = torch.linalg.svd(change, full_matrices=False)
        r = pair.shape[2]
        dense_errors.append(float(s[r:].norm() / s.norm()))
        best = u[:, :r] * s[:r] @ vt[:r]
        got = layers[pair.name].get_delta_weight("default").double()
        assert layers[pair.name].r["default"] == r
        assert float((got - best).norm() / best.norm()) < 1e-5
    assert error == pytest.approx(max(dense_errors), rel=1e-4)
    assert 0.1 < error < 1


def test_truncation_without_an_offset_is_exact(tmp_path):
    model = trained(llama(), lora("q_proj"), offset=False)
    assert export_adapter(model, tmp_path / "adapter", truncated=True) == 0
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(state["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"], find_pairs(model)[0].a)


def test_exporting_changes_nothing_in_the_model(tmp_path):
    model = trained(llama(), lora("q_proj", **PATTERNS), offset=True)
    config, state = model.peft_config["default"].to_dict(), copy.deepcopy(model.state_dict())
    export_adapter(model, tmp_path / "adapter")
    assert model.peft_config["default"].to_dict() == config
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


def test_tied_modules_to_save_are_written_once_each(tmp_path):
    config = lora("q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = trained(llama(tie=True), config, offset=False)
    export_adapter(model, tmp_path / "adapter")
    again = PeftModel.from_pretrained(llama(tie=True), tmp_path / "adapter").eval()
    assert torch.allclose(again(IDS).logits, model(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_offset_over_a_changed_base_is_refused(tmp_path, init):
    model = trained(llama(), lora("q_proj", init_lora_weights=init), offset=True)
    with pytest.raises(UserError, match="changed the base"):
        export_adapter(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_loading_cannot_repeat_is_refused(tmp_path):
    model = trained(llama(), lora("q_proj", init_lora_weights="pissa_niter_4"), offset=False)
    with pytest.raises(UserError, match="changed the base"):
        export_adapter(model, tmp_path / "adapter")


def test_several_trainable_adapters_are_refused(tmp_path):
    model = trained(llama(), lora("q_proj"), offset=False)
    model.add_adapter("second", lora("q_proj"))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(UserError, match=r"several adapters train \(default, second\)"):
        export_adapter(model, tmp_path / "adapter")


def test_models_without_a_pair_or_a_config_are_refused(tmp_path):
    with pytest.raises(UserError, match="it has no peft_config"):
        export_adapter(llama(), tmp_path / "adapter")
    frozen = trained(llama(), lora("q_proj"), offset=False).requires_grad_(False)
    with pytest.raises(UserError, match="no trainable LoRA pair"):
        export_adapter(frozen, tmp_path / "adapter")
    outer = torch.nn.Sequential(trained(llama(), lora("q_proj"), offset=False))
    with pytest.raises(UserError, match="it has no peft_config"):
        export_adapter(outer, tmp_path / "adapter")
    export_adapter(find_adapted(outer), tmp_path / "adapter")


def test_an_older_adapter_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "runs" / "adapter"
    trained(llama(), lora("q_proj", "v_proj"), offset=False).save_pretrained(folder)
    assert (folder / "README.md").exists()  # PEFT's model card
    model = trained(llama(), lora("q_proj"), offset=True)
    export_adapter(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    assert folder.stat().st_mode & 0o777 == 0o777 & ~_umask()
    again = PeftModel.from_pretrained(llama(), folder).eval()
    assert torch.allclose(again(IDS).logits, model(IDS).logits, atol=1e-5)


def test_what_a_killed_export_left_is_cleaned_up(tmp_path):
    """What it had moved away stays until there is a whole adapter again; another adapter's folder is not touched."""
    for name in (".adapter.partial-abc", ".adapter.partial-xyz", ".adapter2.partial-abc", ".adapter-mine"):
        (tmp_path / name / "old").mkdir(parents=True)
    with pytest.raises(UserError):
        export_adapter(llama(), tmp_path / "adapter")
    assert len(list(tmp_path.iterdir())) == 4
    export_adapter(trained(llama(), lora("q_proj"), offset=False), tmp_path / "adapter")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", ".adapter2.partial-abc", ".adapter-mine"}


def _umask():
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_empty_folders_links_and_relative_paths_are_fine(tmp_path, monkeypatch):
    model = trained(llama(), lora("q_proj"), offset=False)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export_adapter(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "adapter_config.json").exists()
    monkeypatch.chdir(tmp_path)
    export_adapter(model, Path("new/adapter"))
    assert (tmp_path / "new" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_folder_with_other_things_is_left_alone(tmp_path, with_adapter):
    model = trained(llama(), lora("q_proj"), offset=False)
    folder = tmp_path / "run"
    if with_adapter:
        export_adapter(model, folder)
    folder.mkdir(exist_ok=True)
    (folder / "notes.txt").write_text("mine")
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match="holds something that is not an adapter"):
        export_adapter(model, folder)
    assert sorted(folder.iterdir()) == before
    with pytest.raises(UserError, match="holds something that is not an adapter"):
        export_adapter(model, folder / "notes.txt")
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("failing", ["weights", "rename"])
def test_a_full_disk_leaves_the_old_adapter_whole_and_nothing_half_written(tmp_path, monkeypatch, existing, failing):
    folder = tmp_path / "adapter"
    model = trained(llama(), lora("q_proj"), offset=False)
    if existing:
        export_adapter(model, folder)
        old = (folder / "adapter_model.safetensors").read_bytes()
    randomise(model, seed=8)

    def no_space(tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    def no_rename(path, target):
        if Path(target) == folder and path.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    rename = Path.replace
    if failing == "weights":
        monkeypatch.setattr(export_module, "save_file", no_space)
    else:
        monkeypatch.setattr(Path, "replace", no_rename)
    with pytest.raises(OSError, match=r"No space|Input/output"):
        export_adapter(model, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"] * existing
    if existing:
        assert (folder / "adapter_model.safetensors").read_bytes() == old
        assert (folder / "adapter_config.json").exists()


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("name", ["patterns-rslora", "dora", "modules_to_save", "embedding-and-head"])
def test_merging_gives_an_ordinary_model(tmp_path, name, offset, copied):
    model = trained(llama(), copy.deepcopy(LLAMA_CASES[name]), offset=offset)
    if copied:
        model = copy.deepcopy(model)
    want = model(IDS).logits.detach()
    merged = merge_adapter(model).eval()
    assert type(merged) is type(llama())
    assert merged.state_dict().keys() == llama().state_dict().keys()
    assert not any(type(module).__module__.startswith(("peft", "lightning_rlora")) for module in merged.modules())
    assert not hasattr(merged, "peft_config")
    got = merged(IDS).logits
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5
    merged.load_state_dict(merged.state_dict())
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS).logits, got)


def test_only_a_peft_model_can_be_merged():
    with pytest.raises(UserError, match="only a PeftModel"):
        merge_adapter(one_layer("Linear").model)


def test_merging_into_a_weight_that_two_layers_share_is_refused():
    model = trained(llama(tie=True), lora("embed_tokens"), offset=False)
    with pytest.raises(UserError, match="export the adapter instead"):
        merge_adapter(model)
