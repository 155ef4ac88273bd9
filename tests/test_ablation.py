"""The ablation's own step against the package's optimizer and torch's AdamW, and its command line."""

import dataclasses
import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "ablation"))

import ablation
import ingredients
import many_adapters
from ingredients import BASELINE, INGREDIENTS, MomentumRamp
from many_adapters import Run
from whitened_step import AdamW, WhitenedStep, relative

from lightning_rlora.adapters import base_size, find_pairs, matrix
from lightning_rlora.errors import UserError
from lightning_rlora.optim import PolynomialWithWarmup, WhitenedRiemannion

RANK, STEPS = 3, 5


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).double().eval().requires_grad_(False)


def random_batches(seed, count=STEPS):
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randint(40, (4, 10), generator=generator) for _ in range(count)]
    positions = torch.arange(10).expand(4, 10)
    return [{"input_ids": ids, "labels": ids.clone(), "position_ids": positions} for ids in draws]


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def batches():
    return {seed: random_batches(seed) for seed in (1, 2)}


def products(adapters, run=0):
    return [(b[run] @ a[run].mT).detach() for b, a in (adapter.factors for adapter in adapters)]


def error(found, expected):
    return max(float((x - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True))


def after_training(model, batches, method, rate=0.2, seed=1):
    adapters, finite = many_adapters.train(model, method, [Run(rate, seed)], RANK, batches)
    assert finite.all()
    return products(adapters)


def trained_by_peft(model, batches, method, make, seed=1, momentum=None):
    """The products after a plain loop over PEFT's model, from the same start."""
    start = many_adapters.started(model, method, [Run(0.0, seed)], RANK, batches)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    peft_model = get_peft_model(llama(), config).double().eval()
    pairs = find_pairs(peft_model)
    with torch.no_grad():
        for pair, adapter in zip(pairs, start, strict=True):
            assert adapter.linear.weight.shape == pair.shape[:2]
            pair.b.copy_(adapter.factors[0][0])
            pair.a.copy_(adapter.factors[1][0].mT)
    optimizer = make(peft_model)
    numbers = {"warmup": method.warmup, "power": method.decay_power, "momentum": momentum, "total_steps": STEPS}
    schedule = PolynomialWithWarmup(optimizer, **numbers)
    for batch in batches[seed]:
        optimizer.zero_grad()
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        logits = peft_model(**inputs, use_cache=False).logits[:, :-1]  # transformers' own loss is in float32
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
        optimizer.step()
        schedule.step()
    return [(matrix(pair.b) @ matrix(pair.a)).detach() for pair in pairs]


def test_the_baseline_is_the_packages_optimizer(model, batches):
    options = {"momentum": 0.7, "weight_decay": 0.1, "curvature_decay": 0.9}
    method = WhitenedStep(floor=1e-2, warmup=0.4, **options)
    expected = trained_by_peft(
        model,
        batches,
        method,
        lambda peft_model: WhitenedRiemannion.for_model(
            peft_model, lr=0.2, relative=True, curvature_floor=1e-2, **options
        ),
    )
    assert error(after_training(model, batches, method), expected) < 1e-11  # measured 8e-14


def test_a_rising_momentum_and_a_power_are_the_packages_schedule(model, batches):
    method = MomentumRamp(momentum=0.5, last=0.9, decay_power=0.75, warmup=0.4)
    make = partial(WhitenedRiemannion.for_model, lr=0.2)
    expected = trained_by_peft(model, batches, method, make, momentum=(0.5, 0.9))
    assert error(after_training(model, batches, method), expected) < 1e-11  # measured 3e-14


def test_the_baselines_defaults_are_the_packages():
    group = WhitenedRiemannion([{"params": [torch.ones(1, 2), torch.ones(2, 1)]}]).param_groups[0]
    step = BASELINE.method
    assert (step.momentum, step.curvature_decay, step.floor, step.weight_decay) == tuple(
        group[name] for name in ("momentum", "curvature_decay", "curvature_floor", "weight_decay")
    )


def test_adamw_is_torchs(model, batches):
    method = AdamW(betas=(0.9, 0.95), warmup=0.4)
    expected = trained_by_peft(
        model,
        batches,
        method,
        lambda peft_model: torch.optim.AdamW(
            [x for x in peft_model.parameters() if x.requires_grad], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0
        ),
    )
    assert error(after_training(model, batches, method, rate=0.01), expected) < 1e-12  # measured 2e-16


@pytest.mark.parametrize("method", [WhitenedStep(), AdamW(), ingredients.LocallyOptimalStart()])
def test_runs_at_once_are_as_runs_alone(model, batches, method):
    runs = [Run(0.05, 1), Run(0.1, 2), Run(0.1, 1)]
    adapters, _ = many_adapters.train(model, method, runs, RANK, batches)
    together = many_adapters.validation_losses(model, adapters, batches[2])
    for place, run in enumerate(runs):
        alone, _ = many_adapters.train(model, method, [run], RANK, batches)
        assert error(products(adapters, place), products(alone)) < 1e-12  # measured 1e-15
        loss = many_adapters.validation_losses(model, alone, batches[2])[0]
        assert float((together[place] - loss).abs()) < 1e-12  # measured 0
    assert len(set(together.tolist())) == 3


def test_a_run_that_diverges_leaves_the_others_alone(model, batches):
    alone = after_training(model, batches, AdamW(), rate=0.01)
    adapters, finite = many_adapters.train(model, AdamW(), [Run(0.01, 1), Run(1e200, 1)], RANK, batches)
    assert finite.tolist() == [True, False]
    assert error(products(adapters), alone) == 0


def test_every_ingredient_trains_and_none_is_another(model, batches):
    ends = {}
    for ingredient in (x for x in INGREDIENTS if x.budgets == 1):
        # gradients of these few steps are about equally long and oppose nothing: tested by themselves, below
        if not isinstance(ingredient.method, ingredients.Clipped | ingredients.Cautious):
            ends[ingredient.name] = torch.cat([x.flatten() for x in after_training(model, batches, ingredient.method)])
    names = list(ends)
    assert len(names) == len({x.name for x in INGREDIENTS}) - 8
    for place, name in enumerate(names):
        for other in names[:place]:
            assert error([ends[name]], [ends[other]]) > 1e-6, f"{name} is {other}"


NEUTRAL = {
    "the power 0 of singular values": ingredients.PartlyOrthogonal(power=0.0),
    "no share of the slow momentum": ingredients.SlowMomentum(slow_share=0.0),
    "a ramp from the momentum to itself": ingredients.MomentumRamp(last=0.8),
    "a limit that nothing reaches": ingredients.Clipped(limit=1e9),
    "whole matrices without their exponent": ingredients.WholeMatrices(exponent=0.0),
}


@pytest.mark.parametrize("method", NEUTRAL.values(), ids=NEUTRAL.keys())
def test_a_neutral_setting_is_the_baseline(model, batches, method):
    baseline = WhitenedStep(exponent=method.exponent)
    assert (
        error(after_training(model, batches, method), after_training(model, batches, baseline)) < 1e-11
    )  # measured 2e-14


def test_nesterov_without_momentum_is_the_baseline(model, batches):
    one, other = (after_training(model, batches, kind(momentum=0.0)) for kind in (ingredients.Nesterov, WhitenedStep))
    assert error(one, other) == 0


def test_whole_matrices_that_are_diagonal_whiten_like_their_diagonals():
    tall = torch.diag(torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)).unsqueeze(0)
    kinds = WhitenedStep(), ingredients.WholeMatrices()
    frames = [kind.frames({"curvatures": [kind.square(tall)], "steps": 1})[0] for kind in kinds]
    x = torch.randn(1, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(frames[0].into(x), frames[1].into(x), rtol=1e-12)
    assert torch.allclose(frames[1].out_of(frames[1].into(x)), x, rtol=1e-12)


def test_the_orthographic_retraction_has_the_rank_before_it_is_cut():
    core = torch.randn(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    core[:, 3:, 3:] = 0
    bent = ingredients.Orthographic().bent(core.clone(), torch.zeros(2, 1, 1, dtype=torch.float64))
    assert torch.linalg.matrix_rank(bent, rtol=1e-9).tolist() == [3, 3]
    assert torch.equal(bent[:, :3], core[:, :3]) and torch.equal(bent[:, :, :3], core[:, :, :3])


def test_cautious_steps_go_down_in_every_direction():
    generator = torch.Generator().manual_seed(0)
    core, gradient = (torch.randn(1, 6, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    u, _, vt = torch.linalg.svd(core)
    before = (u.mT @ gradient @ vt.mT).diagonal(dim1=1, dim2=2)
    after = (u.mT @ ingredients.Cautious().orthogonal(core, gradient) @ vt.mT).diagonal(dim1=1, dim2=2)
    assert (before < 0).any() and (before > 0).any()
    assert torch.equal(after > 1e-9, before > 0) and (after > -1e-9).all()
    assert torch.allclose(
        after[after > 1e-9].sum(), torch.tensor(6.0, dtype=torch.float64).clamp_max(2 * (before > 0).sum())
    )


def test_a_gradient_beyond_the_limit_is_clipped_to_it():
    gradient = torch.ones(1, 4, 1, dtype=torch.float64)
    state = {"norm": torch.full((1, 1, 1), 1.0, dtype=torch.float64)}
    clipped = ingredients.Clipped(limit=1.5).clipped(gradient, state)
    assert clipped.norm().item() == pytest.approx(1.5 * (0.9 * 1.0 + 0.1 * 2.0))


def test_units_are_the_packages_or_have_their_geometric_mean(model):
    layers = many_adapters.described(many_adapters.linear_layers(model))
    pairs = find_pairs(get_peft_model(llama(), LoraConfig(r=RANK, target_modules="all-linear")))
    units = WhitenedStep().units(layers, RANK)
    assert units == pytest.approx([base_size(pair) / math.sqrt(2 * RANK) for pair in pairs])
    for unit in (ingredients.absolute, ingredients.size_only, ingredients.shape_only):
        others = dataclasses.replace(BASELINE.method, unit=unit).units(layers, RANK)
        assert math.prod(others) == pytest.approx(math.prod(units))
        assert others[3] / others[0] == pytest.approx(unit(layers[3]) / unit(layers[0]))
    assert relative(layers[0]) == pytest.approx(base_size(pairs[0]))


def test_a_locally_optimal_start_leaves_the_function_as_it_is(model, batches):
    method = ingredients.LocallyOptimalStart(alpha=-0.25)
    adapters = many_adapters.started(model, method, [Run(0.1, 1)], RANK, batches)
    plain = many_adapters.losses(model, batches[2][:1])
    with many_adapters.adapted(model, adapters):
        assert torch.allclose(many_adapters.losses(model, batches[2][:1]), plain, rtol=1e-12)
    weight = adapters[0].linear.weight
    loose = llama()
    loose.get_submodule("model.layers.0.self_attn.q_proj").weight.requires_grad_(True)
    sum(loose(**batch).loss for batch in batches[1][:4]).backward()
    gradient = loose.get_submodule("model.layers.0.self_attn.q_proj").weight.grad
    x = products(adapters)[0]
    assert weight.shape == gradient.shape
    assert torch.linalg.svdvals(x)[:RANK].tolist() == pytest.approx([0.25] * RANK)
    u, _, vt = torch.linalg.svd(gradient)
    aligned = u.mT @ x @ vt.mT
    assert aligned[:RANK, RANK : 2 * RANK].abs().sum().item() == pytest.approx(0.25 * RANK)


SMALL = ["--rank", "2", "--steps", "2", "--rows", "2", "--max-length", "24", "--validation-batches", "1"]
SMALL += ["--rates", "0.1", "0.2", "--adamw-rates", "0.01", "--seeds", "0", "1"]


@pytest.fixture
def sources(tmp_path):
    """Questions and answers, of which a batch takes two rows."""
    for name, numbers in {"train": range(30), "validation": range(30, 36)}.items():
        records = [{"question": f"What is {i} and {i}?", "answer": str(2 * i)} for i in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    files = [f"--{name}={tmp_path / name}.jsonl" for name in ("train", "validation")]
    return [*files, "--prompt", r"Question: {question}\nAnswer:", "--answer", " {answer}"]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_a_stopped_ablation_goes_on(tmp_path, sources, monkeypatch, capsys):
    names = ["Nesterov", "AdamW, betas (0.9, 0.95), twice the steps"]
    output = tmp_path / "out"
    command = [*sources, *SMALL, "--output", str(output), "--only", *names]
    real = ablation.trained

    def stopped(model, ingredient, data, args):
        if ingredient.name != "baseline":
            raise KeyboardInterrupt
        return real(model, ingredient, data, args)

    monkeypatch.setattr(ablation, "trained", stopped)
    with pytest.raises(KeyboardInterrupt):
        ablation.main(command)
    first = rows_of(output)
    assert [(row["ingredient"], row["rate"], row["seed"]) for row in first] == [
        ("baseline", rate, seed) for rate in (0.1, 0.2) for seed in (0, 1)
    ]
    monkeypatch.setattr(ablation, "trained", real)
    ablation.main(command)
    rows = rows_of(output)
    assert rows[:4] == first
    assert json.loads((output / "settings.json").read_text())["prompt"] == "Question: {question}\nAnswer:"
    assert [row["ingredient"] for row in rows[4:]] == [names[0]] * 4 + [names[1]] * 2
    assert [row["steps"] for row in rows] == [2] * 8 + [4] * 2
    monkeypatch.setattr(ablation, "load_base", None)  # nothing is left to train
    ablation.main(command)
    assert rows_of(output) == rows and "| Nesterov |" in capsys.readouterr().out
    with pytest.raises(UserError, match="other settings"):
        ablation.main([*command, "--steps", "3"])


def test_the_command_line_refuses(tmp_path, sources, capsys):
    for wrong, message in (
        (["--train", "x.jsonl"], "give --validation"),
        (["--only", "magic"], "no ingredient is called 'magic'"),
    ):
        with pytest.raises(SystemExit):
            ablation.main([*wrong, "--output", str(tmp_path)])
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="lower --rows"):
        ablation.main([*sources, *SMALL, "--rows", "500", "--output", str(tmp_path / "out")])


def test_the_table_takes_the_best_rate_without_a_diverged_run():
    def rows(name, losses):
        return [
            {"ingredient": name, "rate": rate, "seed": seed, "loss": loss}
            for rate, found in losses.items()
            for seed, loss in enumerate(found)
        ]

    made = rows("baseline", {0.1: [2.0, 2.2], 0.2: [1.0, 1.2], 0.4: [0.5, None]})
    made += rows("Nesterov", {0.1: [1.4, 1.5], 0.2: [1.6, 1.7]}) + rows("cautious", {0.1: [None, 1.0]})
    lines = ablation.table(made).splitlines()
    assert lines[5].endswith("| 0.2 | 1.1000 ± 0.1414 |  | 1 of 6 |")
    assert lines[6].endswith("| 0.1* | 1.4500 ± 0.0707 | +0.3500 ± 0.0707 | 0 of 4 |")
    assert lines[7].endswith("| | | | 1 of 2 |")
    assert len(lines) == 8
