"""The learning-rate schedules against their formulas."""

import itertools
import math
from functools import partial

import pytest
import torch

from lightning_rlora.errors import UserError
from lightning_rlora.optim import CosineWithWarmup, LinearWithWarmup, PolynomialWithWarmup


def optimizer(lr=2.0):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    return torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 10 * lr}], lr=lr)


def rates(scheduler, steps):
    """The rate of each optimizer step, and the one after the last."""
    found = []
    for _ in range(steps):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return [*found, scheduler.optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize("total, warmup", [(10, 0.0), (10, 0.2), (20, 0.5), (7, 0.33), (1, 0.0)])
def test_values(total, warmup):
    rise = warmup * total
    for kind, decay in (
        (LinearWithWarmup, lambda x: 1 - x),
        (CosineWithWarmup, lambda x: math.cos(math.pi * x / 2) ** 2),
        (PolynomialWithWarmup, lambda x: (1 - x) ** 0.75),
        (partial(PolynomialWithWarmup, power=2.0), lambda x: (1 - x) ** 2),
    ):
        expected = [
            (step + 1) / (rise + 1) if step < rise else decay(min(1, (step - rise) / max(1, total - rise)))
            for step in range(total + 1)
        ]
        found = rates(kind(optimizer(), warmup=warmup, total_steps=total), total)
        assert found == pytest.approx([2 * x for x in expected], abs=1e-12)
        assert found[-1] == pytest.approx(0, abs=1e-12)
        assert max(found) <= 2
        assert all(x > 0 for x in found[:-1])  # no step is wasted


def test_rises_evenly_to_the_peak_then_falls():
    found = rates(LinearWithWarmup(optimizer(), warmup=0.3, total_steps=10), 10)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert [round(a - b, 12) for a, b in itertools.pairwise(found[3:])] == [round(2 / 7, 12)] * 7


def test_every_group_keeps_its_share():
    scheduler = CosineWithWarmup(optimizer(), total_steps=10)
    for _ in range(7):
        scheduler.optimizer.step()
        scheduler.step()
        low, high = (group["lr"] for group in scheduler.optimizer.param_groups)
        assert high == pytest.approx(10 * low)


def test_total_steps_filled_in_later_is_the_same_schedule():
    now, later = (CosineWithWarmup(optimizer(), warmup=0.2, total_steps=total) for total in (10, None))
    assert later.optimizer.param_groups[0]["lr"] == 0
    later.set_total_steps(10)
    assert later.get_last_lr() == now.get_last_lr()
    assert rates(later, 10) == rates(now, 10)


@pytest.mark.parametrize("kind", [LinearWithWarmup, CosineWithWarmup, PolynomialWithWarmup])
@pytest.mark.parametrize("done", [0, 1, 6])
def test_resume(kind, done, tmp_path):
    whole = rates(kind(optimizer(), warmup=0.2, total_steps=10), 10)
    first = kind(optimizer(), warmup=0.2, total_steps=10)
    rates(first, done)
    path = tmp_path / "state.pt"
    torch.save([first.optimizer.state_dict(), first.state_dict()], path)
    second = kind(optimizer(), warmup=0.2, total_steps=None)
    second.set_total_steps(10)
    states = torch.load(path, weights_only=True)
    second.optimizer.load_state_dict(states[0])
    second.load_state_dict(states[1])
    assert rates(second, 10 - done) == whole[done:]


@pytest.mark.parametrize("warmup", [-0.1, 1.0, 5])
def test_warmup_is_a_share(warmup):
    with pytest.raises(UserError, match="share of the run"):
        LinearWithWarmup(optimizer(), warmup=warmup, total_steps=10)


def momenta(scheduler, steps):
    """The momenta of every group for each of some steps."""
    found = []
    for _ in range(steps):
        found.append([group["momentum"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("later", [False, True])
def test_momentum_rises_evenly_with_the_steps_of_the_run(later):
    scheduler = PolynomialWithWarmup(optimizer(), momentum=(0.7, 0.9), total_steps=None if later else 10)
    if later:
        scheduler.set_total_steps(10)
    found = momenta(scheduler, 13)
    expected = [0.7 + 0.02 * min(step, 10) for step in range(13)]
    assert found == [pytest.approx([value] * 2) for value in expected]


def test_momentum_is_left_alone_where_none_is_named():
    made = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1, momentum=0.5)
    assert momenta(PolynomialWithWarmup(made, total_steps=4), 4) == [[0.5]] * 4


def test_resumed_momentum(tmp_path):
    whole = momenta(PolynomialWithWarmup(optimizer(), momentum=(0.5, 0.9), total_steps=8), 8)
    first = PolynomialWithWarmup(optimizer(), momentum=(0.5, 0.9), total_steps=8)
    momenta(first, 3)
    torch.save([first.optimizer.state_dict(), first.state_dict()], tmp_path / "state.pt")
    second = PolynomialWithWarmup(optimizer(), momentum=(0.5, 0.9), total_steps=8)
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    second.optimizer.load_state_dict(states[0])
    second.load_state_dict(states[1])
    assert momenta(second, 5) == whole[3:]


@pytest.mark.parametrize(
    "made, arguments, message",
    [
        (optimizer, {"power": 0.0}, "a power above 0"),
        (optimizer, {"power": math.inf}, "a power above 0"),
        (optimizer, {"momentum": (0.5, 1.0)}, "from 0 to below 1"),
        (optimizer, {"momentum": (-0.1, 0.9)}, "from 0 to below 1"),
        (optimizer, {"momentum": (0.5,)}, "the first and the last"),
        (optimizer, {"momentum": (0.5, 0.7, 0.9)}, "the first and the last"),
        (optimizer, {"momentum": 0.9}, "the first and the last"),
        (lambda: torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]), {"momentum": (0.5, 0.9)}, "AdamW has none"),
    ],
)
def test_refusals_of_a_power_and_a_momentum(made, arguments, message):
    with pytest.raises(UserError, match=message):
        PolynomialWithWarmup(made(), **arguments)
