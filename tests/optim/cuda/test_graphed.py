"""The fast step against the plain one: on the CPU through Triton's interpreter, and on a GPU where there is one."""

import copy

import pytest
import torch
from graphed_cases import RANKS, Shapes, build, hand_over, pairs_of, random_gradients, worst_drift, worst_error

from lightning_rlora.errors import UserError
from lightning_rlora.optim import RiemannianSGD, Riemannion, fixed_rank

pytest.importorskip("triton", reason="the fast step is written in Triton")

from lightning_rlora.optim.cuda.graphed import GraphedStep
from lightning_rlora.optim.groups import PairInGroup

GPU = torch.cuda.is_available()
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]
SMALL = [Shapes(2.0, 4, [(40, 33), (30, 50)]), Shapes(0.5, 3, [(24, 20)]), Shapes(1.0, 4, [(40, 33)])]
OPTIMIZERS = [
    pytest.param(Riemannion, {"weight_decay": 0.1}, id="riemannion"),
    pytest.param(Riemannion, {"max_tangent_norm": 1.0}, id="riemannion clipped"),
    pytest.param(RiemannianSGD, {"weight_decay": 0.1}, id="sgd"),
    pytest.param(RiemannianSGD, {"max_tangent_norm": 0.5, "simulate_adam": True}, id="sgd like Adam, clipped"),
]


def graphed(optimizer) -> GraphedStep:
    """The fast step of an optimizer that has made a step, on whatever device."""
    pairs = [
        PairInGroup(a, b, group)
        for group in optimizer.param_groups
        for a, b in zip(group["params"][::2], group["params"][1::2], strict=True)
    ]
    step = GraphedStep(pairs, optimizer.param_groups, optimizer.state, optimizer.max_tangent_norm)
    assert step.ready()
    return step


@pytest.mark.skipif(GPU, reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize(("make", "options"), OPTIMIZERS)
def test_interpreted_step_is_the_plain_step(make, options):
    """Ranks, shapes and scalings mixed; measured 4e-7 for the products, 3e-6 for the state."""
    generator = torch.Generator().manual_seed(1)
    optimizer, plain = (build(make, SMALL, torch.float32, lr=0.01, **options) for _ in range(2))
    hand_over([optimizer, plain], random_gradients(plain, generator))
    optimizer.step(), plain.step()
    fast = graphed(optimizer)
    for _ in range(2):
        gradients = random_gradients(plain, generator)
        hand_over([optimizer], gradients)
        hand_over([plain], gradients)
        fast.step()
        plain.step()
    assert worst_error(optimizer, plain) < 3e-6
    for pair, plain_pair in zip(pairs_of(optimizer), pairs_of(plain), strict=True):
        for factor, plain_factor in zip(pair[:2], plain_pair[:2], strict=True):
            for name, value in plain.state[plain_factor].items():
                assert torch.allclose(optimizer.state[factor][name], value, rtol=1e-4, atol=1e-5), name
    assert fast.found(all_steps=True) == (False, False)


@pytest.mark.skipif(GPU, reason="the interpreter is for machines without a GPU")
def test_interpreted_step_leaves_out_what_it_must():
    """Pairs without gradients stay; one gradient that is not finite stops all; a change of the factors is noticed."""
    generator = torch.Generator().manual_seed(1)
    optimizer = build(Riemannion, SMALL, torch.float32, lr=0.01)
    hand_over([optimizer], random_gradients(optimizer, generator))
    optimizer.step()
    fast = graphed(optimizer)

    def snapshot():
        return [factor.detach().clone() for pair in pairs_of(optimizer) for factor in pair[:2]]

    hand_over([optimizer], random_gradients(optimizer, generator))
    a, b, _ = pairs_of(optimizer)[1]
    a.grad = b.grad = None
    before = snapshot()
    fast.step()
    kept = [torch.equal(x, y) for x, y in zip(before, snapshot(), strict=True)]
    assert kept == [False, False, True, True, False, False, False, False]

    hand_over([optimizer], random_gradients(optimizer, generator))
    pairs_of(optimizer)[2][1].grad[0, 0] = float("nan")
    before = snapshot()
    fast.step()
    assert all(torch.equal(x, y) for x, y in zip(before, snapshot(), strict=True))
    assert fast.found(all_steps=True) == (True, False) and fast.found_nonfinite == 1

    hand_over([optimizer], random_gradients(optimizer, generator))
    assert fast.unchanged()
    pairs_of(optimizer)[0][0].data.neg_()  # behind autograd's back
    assert fast.unchanged()
    before = snapshot()
    fast.step()
    kept = [torch.equal(x, y) for x, y in zip(before, snapshot(), strict=True)]
    assert kept == [True, True, False, False, False, False, False, False]
    assert fast.found(all_steps=True).changed
    with torch.no_grad():
        pairs_of(optimizer)[0][0].neg_()
    assert not fast.unchanged()


class TestTheOptimizerWithIt:
    """`Riemannion.step` itself on the fast way, interpreted: what it must notice, and what it must tell."""

    pytestmark = pytest.mark.skipif(GPU, reason="the interpreter is for machines without a GPU")

    @pytest.fixture(autouse=True)
    def on_any_device(self, monkeypatch):
        monkeypatch.setattr(fixed_rank, "can_be_graphed", lambda factors: factors[0].dtype == torch.float32)

    def run(self, change=lambda step, optimizer: None, steps=5, seed=1):
        """The fast optimizer, and one in float64 by the plain step; both changed alike before steps."""
        generator = torch.Generator().manual_seed(seed)
        fast, exact = (build(Riemannion, SMALL[:1], dtype, lr=0.01) for dtype in (torch.float32, torch.float64))
        ways = []
        for step in range(steps):
            for optimizer in (fast, exact):
                change(step, optimizer)
            hand_over([fast, exact], random_gradients(exact, generator))
            fast.step(), exact.step()
            ways.append(fast._graphed is not None)
        return fast, exact, ways

    def test_follows_float64(self):
        fast, exact, ways = self.run()
        assert all(ways) and worst_error(fast, exact) < 3e-6  # measured 3e-7

    @torch.no_grad()
    def change_factors(self, step, optimizer):
        if step == 2:
            a, b, _ = pairs_of(optimizer)[1]
            a.mul_(2), b.mul_(0.5)

    def change_momenta(self, step, optimizer):
        if step == 2:
            for state in optimizer.state.values():
                state["momentum"] = torch.zeros_like(state["momentum"])

    def change_norm(self, step, optimizer):
        if step == 2:
            optimizer.max_tangent_norm = 0.5

    def change_units(self, step, optimizer):
        if step == 2:
            for group in optimizer.param_groups:
                group.update(relative=True, units=[3.0] * (len(group["params"]) // 2))

    @pytest.mark.parametrize("change", ["factors", "momenta", "norm", "units"])
    def test_takes_up_what_was_changed(self, change):
        fast, exact, ways = self.run(getattr(self, f"change_{change}"), steps=4)
        assert ways == [True, True, False, True]
        assert worst_error(fast, exact) < 3e-6

    def test_numbers_that_a_schedule_sets_count_at_once(self):
        def change(step, optimizer):
            for group in optimizer.param_groups:
                group.update(lr=0.01 / (1 + step), momentum=0.5 + 0.1 * step)

        fast, exact, ways = self.run(change, steps=4)
        assert all(ways)
        assert worst_error(fast, exact) < 3e-6

    def test_a_scaling_behind_autograds_back_is_noticed(self):
        def change(step, optimizer):
            if step == 2:
                pairs_of(optimizer)[1][1].data.mul_(1.01)

        fast, _, ways = self.run(change, steps=6)
        assert ways == [True, True, True, True, False, True]  # told two steps late; the pair was left out until then
        assert worst_drift(fast) < 1e-5

    @pytest.mark.parametrize("late", ["in two steps", "when a change ends the graph"])
    def test_a_gradient_that_is_not_finite_is_told_in_any_case(self, late):
        generator = torch.Generator().manual_seed(1)
        optimizer = build(Riemannion, SMALL[:1], torch.float32, lr=0.01)
        for step in range(4):
            hand_over([optimizer], random_gradients(optimizer, generator))
            if step == 1:
                pairs_of(optimizer)[0][0].grad[0, 0] = float("inf")
            if step == 3 or (step == 2 and late != "in two steps"):
                if step == 2:
                    optimizer.max_tangent_norm = 1.0
                with pytest.raises(UserError, match="not finite"):
                    optimizer.step()
                break
            optimizer.step()
        assert all(torch.isfinite(factor).all() for pair in pairs_of(optimizer) for factor in pair[:2])

    def test_gradients_in_any_layout(self):
        generator = torch.Generator().manual_seed(1)
        one, other = (build(Riemannion, SMALL[:1], torch.float32, lr=0.01) for _ in range(2))
        for _ in range(3):
            hand_over([one, other], random_gradients(one, generator))
            for a, b, _ in pairs_of(other):
                a.grad, b.grad = (g.t().contiguous().t() for g in (a.grad, b.grad))
            one.step(), other.step()
            assert other._graphed is not None
        assert worst_error(one, other) == 0


class TestOnTheGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize(("make", "options"), OPTIMIZERS)
    @pytest.mark.parametrize("spread", [0.1, 1e-8])
    def test_follows_float64(self, make, options, spread):
        """All ranks in one optimizer, against the plain step in float64 on the CPU, and twice with the same bits."""
        generator = torch.Generator().manual_seed(1)
        options = {"lr": 0.01} | options
        fast, again = (build(make, RANKS, torch.float32, "cuda", spread, **options) for _ in range(2))
        exact = build(make, RANKS, torch.float64, "cpu", spread, **options)
        for _ in range(40):
            gradients = random_gradients(exact, generator)
            hand_over([fast, again, exact], gradients)
            for optimizer in (fast, again, exact):
                optimizer.step()
        assert fast._graphed is not None
        assert worst_error(fast, exact) < 1e-4
        assert worst_drift(fast) < 1e-5
        for (a, b, _), (a_0, b_0, _) in zip(pairs_of(fast), pairs_of(again), strict=True):
            assert torch.equal(a, a_0) and torch.equal(b, b_0)

    @pytest.mark.slow
    @pytest.mark.parametrize("spread", [0.1, 1e-8])
    def test_a_thousand_steps(self, spread):
        """All ranks, with a gradient of zero or of rank one now and then."""
        generator = torch.Generator().manual_seed(1)
        fast = build(Riemannion, RANKS, torch.float32, "cuda", spread, lr=0.01, weight_decay=0.1)
        exact = build(Riemannion, RANKS, torch.float64, "cpu", spread, lr=0.01, weight_decay=0.1)
        for step in range(1000):
            gradients = random_gradients(exact, generator)
            if step % 7 == 3:
                gradients = [0 * g for g in gradients]
            elif step % 7 == 5:
                gradients = [g[:, :1] @ g[:1, :] for g in gradients]
            hand_over([fast, exact], gradients)
            fast.step(), exact.step()
        assert fast._graphed is not None
        assert worst_error(fast, exact) < 1e-4
        assert worst_drift(fast) < 1e-5

    @pytest.mark.parametrize(("kind", "steps"), [("zero", 10), ("rank one", 3), ("inside U", 10)])
    def test_degenerate_gradients(self, kind, steps):
        """The same gradient again and again.

        After more steps with one of rank one the momentum has singular values next to the rank tolerance, which is
        another in float64: the plain step in float32 leaves the float64 one at the same step then (measured).
        """
        generator = torch.Generator().manual_seed(1)
        fast = build(Riemannion, RANKS, torch.float32, "cuda", lr=0.01)
        exact = build(Riemannion, RANKS, torch.float64, "cpu", lr=0.01)
        drift = random_gradients(exact, generator)
        for _ in range(steps):
            gradients = []
            for (_, b, _), g in zip(pairs_of(exact), drift, strict=True):
                u = torch.linalg.qr(b.detach()).Q
                made = {"zero": 0 * g, "rank one": g[:, :1] @ g[:1, :], "inside U": u @ (u.mT @ g)}
                gradients.append(made[kind])
            hand_over([fast, exact], gradients)
            fast.step(), exact.step()
        assert fast._graphed is not None
        assert worst_error(fast, exact) < 1e-4

    def test_a_gradient_that_is_not_finite_is_told_two_steps_late(self):
        generator = torch.Generator().manual_seed(1)
        optimizer = build(Riemannion, SMALL, torch.float32, "cuda", lr=0.01)
        other = torch.nn.Parameter(torch.ones(3, device="cuda"))
        optimizer.add_param_group({"params": [other], "algorithm": "adamw"})
        for _ in range(4):
            hand_over([optimizer], random_gradients(optimizer, generator))
            other.grad = torch.ones_like(other)
            optimizer.step()
        hand_over([optimizer], random_gradients(optimizer, generator))
        pairs_of(optimizer)[2][1].grad[0, 0] = float("inf")
        before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        optimizer.step()
        after = [p.detach() for group in optimizer.param_groups for p in group["params"]]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        hand_over([optimizer], random_gradients(optimizer, generator))
        optimizer.step()
        with pytest.raises(UserError, match="not finite"):
            optimizer.step()
        optimizer.step()  # and goes on

    def test_no_synchronisation_and_a_graph(self):
        generator = torch.Generator().manual_seed(1)
        optimizer = build(Riemannion, RANKS, torch.float32, "cuda", lr=0.01, max_tangent_norm=1.0)
        for _ in range(4):
            hand_over([optimizer], random_gradients(optimizer, generator))
            optimizer.step()
        allocated = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_allocated() == allocated
        assert optimizer._graphed._graph is not None

    def test_changes_from_outside_between_steps(self):
        """A re-factoring carries the momentum along; a loaded state and a copy go on as the original does."""
        generator = torch.Generator().manual_seed(1)
        optimizer, untouched = (build(Riemannion, SMALL, torch.float32, "cuda", lr=0.01) for _ in range(2))

        def run(optimizers, steps):
            for _ in range(steps):
                gradients = random_gradients(optimizers[0], generator)
                for one in optimizers:
                    hand_over([one], gradients)
                    one.step()

        run([optimizer, untouched], 5)
        mixings = {}
        for a, b, _ in pairs_of(optimizer):
            mix = torch.randn(len(a), len(a), device="cuda", dtype=torch.float64)
            mixings[a] = mix
            with torch.no_grad():
                b.copy_(b.double() @ mix), a.copy_(torch.linalg.solve(mix, a.double()))
        run([optimizer, untouched], 5)
        assert worst_error(optimizer, untouched) < 1e-4
        twin = copy.deepcopy(optimizer)
        loaded = build(Riemannion, SMALL, torch.float32, "cuda", lr=0.01)
        for (a, b, _), (a_0, b_0, _) in zip(pairs_of(loaded), pairs_of(optimizer), strict=True):
            with torch.no_grad():
                a.copy_(a_0), b.copy_(b_0)
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run([optimizer, twin, loaded], 5)
        for other in (twin, loaded):
            assert worst_error(other, optimizer) < 1e-6
