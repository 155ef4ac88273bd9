import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from toy_runs import KillAt, Killed, ToyData, ToyModule, fit, fit_until_killed

from lightning_rlora.adapters import find_pairs, get_offset, matrix, track_offsets
from lightning_rlora.callbacks.run_folder import cut_back
from lightning_rlora.callbacks.spectrum_monitor import SpectrumMonitor, draw_spectra, measure_pairs, short_labels
from lightning_rlora.errors import UserError

PLAN: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 2}  # 7 batches, 4 steps an epoch


def adapted() -> nn.Module:
    """Linear layers of two shapes and a convolution, with adapters far from balanced, in float64."""
    generator = torch.Generator().manual_seed(0)
    layers = nn.ModuleDict(
        {"a": nn.Linear(9, 7), "b": nn.Linear(9, 7), "c": nn.Linear(7, 12), "d": nn.Conv2d(2, 6, 3)}
    ).double()
    model = inject_adapter_in_model(LoraConfig(r=3, lora_alpha=5, target_modules=["a", "b", "c", "d"]), layers)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = torch.logspace(0, -4, 3)
            shape = (-1,) + (1,) * (parameter.ndim - 1) if "lora_A" in name else (1, -1) + (1,) * (parameter.ndim - 2)
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = noise * scale.double().reshape(shape)
    return model


def give_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Autograd's factor gradients for a known dense gradient G of each product; returns G."""
    dense = {}
    for i, pair in enumerate(find_pairs(model)):
        m, n, _ = pair.shape
        dense[pair.name] = torch.randn(m, n, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        product = pair.scaling * matrix(pair.b) @ matrix(pair.a)
        (product * dense[pair.name]).sum().backward()
    return dense


def test_values_are_those_of_the_dense_matrices():
    model = adapted()
    pairs = find_pairs(model)
    track_offsets(pairs)
    offset = get_offset(pairs[1])
    left, right = torch.randn(7, 3).double(), torch.randn(3, 9).double()
    offset.subtract(left, right)
    dense = give_gradients(model)
    measured = measure_pairs(pairs)
    assert list(measured) == ["a", "b", "c", "d"]
    for pair in pairs:
        x = pair.scaling * matrix(pair.b) @ matrix(pair.a)
        g = dense[pair.name]
        s = torch.linalg.svdvals(x.detach())[:3]
        # of the factors: the dense product's third singular vectors are only good to 1e-9
        p, q = (w @ torch.linalg.pinv(w) for w in (matrix(pair.b).detach(), matrix(pair.a).detach().mT))
        tangent = (p @ g + g @ q - p @ g @ q).norm().item()
        update = (x - left @ right).norm().item() if pair is pairs[1] else x.norm().item()
        shares = s / s.sum()
        found = measured[pair.name]
        # measured: 4e-8 (s spreads over 2e-9, so the dense SVD is no better), 3e-16, 6e-15, 4e-16
        assert found.singular_values == pytest.approx(s.tolist(), rel=1e-6)
        assert found.update_norm == pytest.approx(update, rel=1e-12)
        assert found.tangent_norm == pytest.approx(tangent, rel=1e-12)
        assert found.effective_rank == pytest.approx(torch.exp(-(shares * shares.log()).sum()).item(), rel=1e-12)


def test_an_update_that_just_began_is_small_and_exact():
    model = adapted()
    pairs = find_pairs(model)
    track_offsets(pairs)
    offset = get_offset(pairs[0])
    offset.subtract(pairs[0].scaling * pairs[0].b.detach(), pairs[0].a.detach())
    assert measure_pairs(pairs)["a"].update_norm < 1e-13  # measured 3e-15: X = X0, of norm 11
    with torch.no_grad():
        pairs[0].b[0, 0] += 1e-9
    expected = pairs[0].scaling * 1e-9 * pairs[0].a[0].norm().item()
    assert measure_pairs(pairs)["a"].update_norm == pytest.approx(expected, rel=1e-5)  # measured 9e-7


def test_values_do_not_depend_on_the_factorisation():
    model = adapted()
    give_gradients(model)
    before = measure_pairs(find_pairs(model))
    mixing = torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        for pair in find_pairs(model)[:3]:
            pair.b.copy_(pair.b @ mixing)
            pair.a.copy_(mixing.inverse() @ pair.a)
    model.zero_grad()
    give_gradients(model)
    after = measure_pairs(find_pairs(model))
    for name in "abc":  # measured 7e-13 and 9e-13
        assert after[name].tangent_norm == pytest.approx(before[name].tangent_norm, rel=1e-10)
        assert after[name].singular_values == pytest.approx(before[name].singular_values, rel=1e-10)


def test_without_a_gradient_or_with_a_zero_factor_the_tangent_norm_is_unknown():
    model = adapted()
    pairs = find_pairs(model)
    give_gradients(model)
    pairs[0].a.grad = None
    pairs[1].b.data.zero_()
    pairs[2].b.data[:, 1] = pairs[2].b.data[:, 0]
    measured = measure_pairs(pairs)
    assert [math.isnan(measured[name].tangent_norm) for name in "abcd"] == [True, True, True, False]
    assert measured["b"].singular_values == [0, 0, 0]
    assert measured["b"].update_norm == 0
    assert math.isnan(measured["b"].effective_rank)
    assert measured["c"].singular_values[2] < 1e-15
    assert 1 <= measured["c"].effective_rank < 3


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "spectrum.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_a_table_a_plot_and_logged_values(tmp_path):
    logger = CSVLogger(tmp_path / "logs")
    fit(tmp_path, callbacks=[SpectrumMonitor(3)], logger=logger, **PLAN)
    table = rows(tmp_path)
    assert [(row["step"], row["layer"]) for row in table] == [
        (step, layer) for step in ("0", "3", "6", "8") for layer in ("model.0", "model.2")
    ]
    assert list(table[0])[2:] == ["effective_rank", "update_norm", "tangent_norm", "s_1", "s_2"]
    assert (tmp_path / "spectrum.png").stat().st_size > 10_000
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = {row["step"]: row for row in csv.DictReader(file) if row["spectrum/model.2/s_max"]}
    for row in table[1::2]:
        for name, column in {"effective_rank": "effective_rank", "s_max": "s_1", "s_min": "s_2"}.items():
            assert logged[row["step"]][f"spectrum/model.2/{name}"] == row[column]
        assert logged[row["step"]]["spectrum/model.2/update_norm"] == row["update_norm"]
    # the gradient of the last step belongs to another point than the last one
    assert [row["tangent_norm"] == "nan" for row in table] == [False] * 6 + [True] * 2


def test_the_first_row_is_the_start_and_its_accumulated_gradient(tmp_path):
    fit(tmp_path, callbacks=[SpectrumMonitor()], max_steps=1, accumulate_grad_batches=2)
    module = ToyModule()
    batches = ToyData().train_dataloader().batches
    for batch in batches[:2]:
        ((module.model(batch) - batch.flip(1)).square().mean() / 2).backward()
    expected = measure_pairs(find_pairs(module))
    for row in rows(tmp_path)[:2]:
        # measured 2e-7: float32 gradients
        assert float(row["tangent_norm"]) == pytest.approx(expected[row["layer"]].tangent_norm, rel=1e-5)
        assert float(row["s_2"]) == pytest.approx(expected[row["layer"]].singular_values[1], rel=1e-5)


@pytest.mark.parametrize("hook, step", [("on_train_batch_end", 3), ("on_train_batch_end", 4), ("on_train_end", 8)])
def test_a_killed_run_leaves_the_table_of_an_uninterrupted_one(tmp_path, hook, step):
    fit(tmp_path / "whole", callbacks=[SpectrumMonitor(3)], **PLAN)
    monitor = SpectrumMonitor(3)
    monitor.on_exception = lambda *_: None
    killed = tmp_path / "killed"
    fit_until_killed(killed, KillAt(hook, step), callbacks=[monitor], save_every=2, **PLAN)
    with (killed / "spectrum.csv").open("a") as file:
        file.write("9,model.0,1.0")
    fit(killed, ckpt_path="last", callbacks=[SpectrumMonitor(3)], save_every=2, **PLAN)
    assert (killed / "spectrum.csv").read_bytes() == (tmp_path / "whole" / "spectrum.csv").read_bytes()


def test_an_exception_leaves_a_plot(tmp_path):
    with pytest.raises(Killed):
        fit(tmp_path, callbacks=[SpectrumMonitor(2), KillAt("on_train_batch_end", 3)], **PLAN)
    assert {row["step"] for row in rows(tmp_path)} == {"0", "2"}
    assert (tmp_path / "spectrum.png").exists()


def test_fast_dev_run_and_a_new_run_in_the_folder(tmp_path):
    fit(tmp_path / "trial", callbacks=[SpectrumMonitor()], fast_dev_run=True)
    assert not (tmp_path / "trial" / "spectrum.csv").exists()
    fit(tmp_path, callbacks=[SpectrumMonitor()], max_steps=2)
    first = (tmp_path / "spectrum.csv").read_bytes()
    fit(tmp_path, callbacks=[SpectrumMonitor()], max_steps=3)
    assert (tmp_path / "previous" / "1" / "spectrum.csv").read_bytes() == first
    assert [row["step"] for row in rows(tmp_path)] == ["0", "0", "3", "3"]


def test_needs_a_positive_interval_and_records_nothing_without_adapters(tmp_path):
    with pytest.raises(UserError, match="must be positive"):
        SpectrumMonitor(0)
    trainer = type("T", (), {"global_step": 0, "is_global_zero": True, "default_root_dir": tmp_path, "loggers": []})
    monitor = SpectrumMonitor()
    monitor.on_train_start(trainer, nn.Linear(2, 2))
    monitor.on_train_end(trainer, nn.Linear(2, 2))
    assert not list(tmp_path.iterdir())


def test_without_an_interval_nothing_is_measured(tmp_path):
    fit(tmp_path, callbacks=[SpectrumMonitor(None)], max_steps=2)
    assert not list(tmp_path.glob("spectrum*"))


def test_plots_with_zeros_and_other_ranks_can_be_drawn(tmp_path):
    path = tmp_path / "spectrum.csv"
    path.write_text(
        "step,layer,effective_rank,update_norm,tangent_norm,s_1,s_2,s_3\n"
        "0,x.1.q,nan,0.0,nan,0.0,0.0,\n0,x.2.q,2.0,1.0,1.0,1.0,0.5,0.1\n"
    )
    draw_spectra(path)
    assert (tmp_path / "spectrum.png").read_bytes().startswith(b"\x89PNG")


def test_short_labels():
    llama = [f"model.base_model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qk"]
    assert short_labels(llama) == [
        "0.self_attn.q_proj",
        "0.self_attn.k_proj",
        "1.self_attn.q_proj",
        "1.self_attn.k_proj",
    ]
    unet = ["unet.down_blocks.0.attentions.1.attn1.to_out.0", "unet.mid_block.attentions.0.attn1.to_q"]
    assert short_labels(unet) == ["down_blocks.0.1.attn1.to_out.0", "mid_block.0.attn1.to_q"]
    assert short_labels(["only.one"]) == ["one"]
    ambiguous = ["m.a.x.0.q", "m.a.y.0.q", "m.b.0.q"]
    assert short_labels(ambiguous) == ["a.x.0.q", "a.y.0.q", "b.0.q"]


def test_cut_back_keeps_whole_lines_before_a_step(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("step,x\n0,a\n5,b\n7,c\n1")
    cut_back(path, "step,x\n", 7)
    assert path.read_text() == "step,x\n0,a\n5,b\n"
    cut_back(path, "step,x,y\n", 7)
    assert path.read_text() == "step,x,y\n"
    assert list(tmp_path.iterdir()) == [path]
