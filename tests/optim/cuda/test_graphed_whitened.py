"""The fast step of whitened pairs: on the CPU through Triton's interpreter, and on a GPU where there is one."""

import copy
import io

import pytest
import torch
from graphed_cases import RANKS, Shapes, build, hand_over, pairs_of, random_gradients, worst_error

from lightning_rlora.errors import UserError
from lightning_rlora.geometry import gram
from lightning_rlora.optim import WhitenedRiemannion, fixed_rank
from lightning_rlora.optim.reference import whitened_reference_step
from lightning_rlora.optim.two_pass import svd_triplets

pytest.importorskip("triton", reason="the fast step is written in Triton")

from lightning_rlora.optim.cuda import bucket, products, small_matrices, whitened_bucket

GPU = torch.cuda.is_available()
SMALL = [Shapes(2.0, 3, [(40, 33), (30, 50)])]
SEVERAL = [*SMALL, Shapes(0.5, 8, [(24, 20)]), Shapes(1.0, 16, [(40, 33)]), Shapes(1.5, 40, [(50, 61)])]
OPTIONS = {"lr": 0.01, "weight_decay": 0.1}


def whitened(groups, **options):
    """In the unit of the iteration on full matrices."""
    return WhitenedRiemannion(groups, relative=False, **options)


def uneven_gradients(optimizer, generator):
    """With rows and columns of sizes from 0.01 to 1, the same at every step."""
    found = []
    for seed, g in enumerate(random_gradients(optimizer, generator)):
        sizes = torch.Generator().manual_seed(seed)
        rows, columns = (10 ** (-2 * torch.rand(k, generator=sizes, dtype=g.dtype)) for k in g.shape)
        found.append(rows.unsqueeze(1) * g * columns)
    return found


def step_together(optimizers, generator, steps, kind=lambda g: g):
    for _ in range(steps):
        gradients = [kind(g) for g in uneven_gradients(optimizers[0], generator)]
        hand_over(optimizers, gradients)
        for optimizer in optimizers:
            optimizer.step()


def plain(make, *args, **options):
    """An optimizer that never takes the fast step."""
    optimizer = build(make, *args, **options)
    optimizer._new_graphed = lambda: None
    return optimizer


def errors_of_state(optimizer, reference):
    """The largest relative difference of each kind of state."""
    worst = {}
    for pair, other in zip(pairs_of(optimizer), pairs_of(reference), strict=True):
        for factor, twin in zip(pair[:2], other[:2], strict=True):
            assert optimizer.state[factor].keys() == reference.state[twin].keys()
            for name, value in reference.state[twin].items():
                error = float((optimizer.state[factor][name].cpu() - value.cpu()).norm() / value.norm().cpu())
                worst[name] = max(worst.get(name, 0.0), error)
    return worst


def tensors(optimizer):
    """Factors and state."""
    return [
        tensor.detach().clone()
        for pair in pairs_of(optimizer)
        for factor in pair[:2]
        for tensor in (factor, *optimizer.state[factor].values())
    ]


def assert_same_bits(optimizer, other):
    assert all(torch.equal(x, y) for x, y in zip(tensors(optimizer), tensors(other), strict=True))


def uneven_groups(groups, **options):
    """Riemannion, and two kinds of means, in one optimizer."""
    changes = [{}, {"algorithm": "riemannion"}, {"curvature_decay": 0.5, "curvature_floor": 0.1}]
    return whitened([group | change for group, change in zip(groups, changes, strict=True)], **options)


def rank_one(g):
    return g[:, :1] @ g[:1, :]


def one_row(g):
    return torch.zeros_like(g).index_copy_(0, torch.tensor([1]), g[1:2])


@pytest.mark.skipif(GPU, reason="the interpreter is for machines without a GPU")
class TestInterpreted:
    """`WhitenedRiemannion.step` on the fast way."""

    @pytest.fixture(autouse=True)
    def fast_on_any_device(self, monkeypatch):
        """And small matrices by torch: their kernels have tests of their own, and the interpreter is slow.

        Torch's SVD raises where a number is not finite; the kernels do not.
        """

        def cholesky(n, floor=None):
            if floor is None:
                found = gram.cholesky_root(n)
            else:
                found = gram.range_root(n.nan_to_num(), floor.nan_to_num())
            return tuple(matrix.contiguous() for matrix in found)

        monkeypatch.setattr(fixed_rank, "can_be_graphed", lambda factors: factors[0].dtype == torch.float32)
        for module in (bucket, whitened_bucket):
            monkeypatch.setattr(module, "cholesky", cholesky)
        for module in (small_matrices, products):
            monkeypatch.setattr(
                module, "polar_factor", lambda k, tolerance: gram.polar_factor(k.nan_to_num(), tolerance)
            )
            monkeypatch.setattr(module, "leading_triplets", lambda k, r: svd_triplets(k.nan_to_num(), r))

    @pytest.mark.parametrize(
        ("make", "cases", "options"),
        [
            pytest.param(whitened, SEVERAL, {"weight_decay": 0.1}, id="ranks"),
            pytest.param(whitened, SEVERAL[:2], {"max_tangent_norm": 0.1}, id="clipped"),
            pytest.param(uneven_groups, [*SMALL, SMALL[0], SMALL[0]], {}, id="mixed"),
        ],
    )
    def test_is_the_plain_step(self, make, cases, options):
        """Measured 1e-6 for the products, 5e-6 for the state, 1e-7 for the curvatures."""
        fast = build(make, cases, torch.float32, lr=0.01, **options)
        exact = build(make, cases, torch.float64, lr=0.01, **options)
        step_together([fast, exact], torch.Generator().manual_seed(1), 3)
        assert fast._graphed is not None
        errors = errors_of_state(fast, exact)
        print(f"\n{worst_error(fast, exact):.1e}", {name: f"{error:.1e}" for name, error in errors.items()})
        assert worst_error(fast, exact) < 1e-5
        assert errors["momentum"] < 5e-5 and errors["anchor"] < 5e-5 and errors["curvature"] < 1e-6

    def test_follows_the_iteration_on_full_matrices_with_the_same_bits_twice(self):
        fast, again = (build(whitened, SMALL, torch.float32, **OPTIONS) for _ in range(2))
        a, b, c = pairs_of(fast)[0]
        x = (c * b.double() @ a.double()).detach()
        m, curvatures = torch.zeros_like(x), (x.new_zeros(len(x)), x.new_zeros(x.shape[1]))
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            gradients = uneven_gradients(fast, generator)
            hand_over([fast, again], gradients)
            fast.step(), again.step()
            x, m, curvatures = whitened_reference_step(x, m, curvatures, gradients[0], 3, momentum=0.8, **OPTIONS)
        error = float((c * b.double() @ a.double() - x).norm() / x.norm())
        print(f"\n{error:.1e}")
        assert error < 1e-5  # measured 7e-7
        assert torch.allclose(fast.state[b]["curvature"].double(), curvatures[0], rtol=1e-5)
        assert_same_bits(fast, again)

    @pytest.mark.parametrize("kind", [torch.zeros_like, rank_one, one_row])
    def test_gradients_of_low_rank(self, kind):
        """At once, and after others."""
        fast, exact = (build(whitened, SMALL, dtype, **OPTIONS) for dtype in (torch.float32, torch.float64))
        generator = torch.Generator().manual_seed(1)
        step_together([fast, exact], generator, 1, kind)
        step_together([fast, exact], generator, 1)
        step_together([fast, exact], generator, 1, kind)
        assert fast._graphed is not None
        assert worst_error(fast, exact) < 1e-5  # measured 9e-7

    def test_a_gradient_that_is_not_finite_changes_nothing(self):
        optimizer = build(whitened, SMALL, torch.float32, **OPTIONS)
        generator = torch.Generator().manual_seed(1)
        step_together([optimizer], generator, 2)
        hand_over([optimizer], uneven_gradients(optimizer, generator))
        pairs_of(optimizer)[1][1].grad[0, 0] = float("nan")
        before = tensors(optimizer)
        optimizer.step()
        assert all(torch.equal(x, y) for x, y in zip(before, tensors(optimizer), strict=True))
        hand_over([optimizer], uneven_gradients(optimizer, generator))
        with pytest.raises(UserError, match="not finite"):
            optimizer.step(), optimizer.step()

    def test_pairs_without_gradients_stay(self):
        optimizer = build(whitened, SMALL, torch.float32, **OPTIONS)
        generator = torch.Generator().manual_seed(1)
        step_together([optimizer], generator, 1)
        hand_over([optimizer], uneven_gradients(optimizer, generator))
        a, b, _ = pairs_of(optimizer)[1]
        a.grad = b.grad = None
        before = tensors(optimizer)
        optimizer.step()
        kept = [torch.equal(x, y) for x, y in zip(before, tensors(optimizer), strict=True)]
        assert kept == [False] * 8 + [True] * 8

    def test_a_checkpoint_moves_to_the_plain_step_and_back(self):
        uninterrupted = plain(whitened, SMALL, torch.float32, **OPTIONS)
        generator = torch.Generator().manual_seed(1)
        running = plain(whitened, SMALL, torch.float32, **OPTIONS)
        step_together([uninterrupted, running], generator, 2)
        for make in (build, plain):
            file = io.BytesIO()
            torch.save(running.state_dict(), file)
            file.seek(0)
            resumed = make(whitened, SMALL, torch.float32, **OPTIONS)
            for pair, other in zip(pairs_of(resumed), pairs_of(running), strict=True):
                for factor, value in zip(pair[:2], other[:2], strict=True):
                    factor.data.copy_(value.data)
            resumed.load_state_dict(torch.load(file, weights_only=True))
            running = resumed
            step_together([uninterrupted, running], generator, 2)
            assert (running._graphed is not None) == (make is build)
        errors = errors_of_state(running, uninterrupted)
        assert worst_error(running, uninterrupted) < 1e-5  # measured 1e-6
        assert errors["momentum"] < 5e-5 and errors["curvature"] < 1e-6

    def refactored(self, optimizer):
        generator = torch.Generator().manual_seed(2)
        a, b, _ = pairs_of(optimizer)[1]
        mix = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            b.copy_(b.double() @ mix), a.copy_(torch.linalg.solve(mix, a.double()))

    def other_momenta(self, optimizer):
        for state in optimizer.state.values():
            state["momentum"] = torch.zeros_like(state["momentum"])

    def other_curvatures(self, optimizer):
        for state in optimizer.state.values():
            state["curvature"] = torch.ones_like(state["curvature"])

    @pytest.mark.parametrize("change", ["refactored", "other_momenta", "other_curvatures"])
    def test_takes_up_what_was_changed(self, change):
        fast, exact = (build(whitened, SMALL, dtype, **OPTIONS) for dtype in (torch.float32, torch.float64))
        generator = torch.Generator().manual_seed(1)
        ways = []
        for step in range(4):
            if step == 2:
                getattr(self, change)(fast), getattr(self, change)(exact)
            step_together([fast, exact], generator, 1)
            ways.append(fast._graphed is not None)
        assert ways == [True, True, False, True]
        assert worst_error(fast, exact) < 1e-5  # measured 1e-6

    def test_other_factors_behind_autograds_back_are_noticed(self):
        """Also such as keep their span, which a sketch of bases would not tell."""
        optimizer = build(whitened, SMALL, torch.float32, **OPTIONS)
        generator = torch.Generator().manual_seed(1)
        step_together([optimizer], generator, 1)
        a, b, _ = pairs_of(optimizer)[0]
        a.data[1] *= 2
        before = a.detach().clone(), b.detach().clone()
        step_together([optimizer], generator, 1)
        assert torch.equal(a, before[0]) and torch.equal(b, before[1])
        assert optimizer._graphed.found(all_steps=True) == (False, True)

    def test_a_factor_that_is_not_of_full_rank_is_left_to_the_plain_step(self):
        optimizer = build(whitened, SMALL, torch.float32, **OPTIONS)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            pairs_of(optimizer)[0][1].zero_()
        hand_over([optimizer], uneven_gradients(optimizer, generator))
        optimizer.step()  # gives it a start, and steps the others
        assert optimizer._graphed is None
        step_together([optimizer], generator, 1)  # a start also moves the other factor
        assert optimizer._graphed is None
        step_together([optimizer], generator, 1)
        assert optimizer._graphed is not None
        assert all(torch.isfinite(tensor).all() for tensor in tensors(optimizer))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
class TestOnTheGpu:
    """Against the plain step in float64 on the CPU, all ranks in one optimizer."""

    def both(self, spread=0.1, **options):
        fast = build(whitened, RANKS, torch.float32, "cuda", spread, lr=0.01, **options)
        return fast, build(whitened, RANKS, torch.float64, "cpu", spread, lr=0.01, **options)

    @pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"max_tangent_norm": 0.1}], ids=["decay", "clipped"])
    @pytest.mark.parametrize("spread", [0.1, 1e-8])
    def test_follows_float64_with_the_same_bits_twice(self, options, spread):
        """The plain step in float32 is within 2e-6 of it."""
        fast, exact = self.both(spread, **options)
        again, _ = self.both(spread, **options)
        step_together([exact, fast, again], torch.Generator().manual_seed(1), 40)
        assert fast._graphed is not None
        assert worst_error(fast, exact) < 1e-4
        errors = errors_of_state(fast, exact)
        assert errors["momentum"] < 1e-2 and errors["curvature"] < 1e-4
        assert_same_bits(fast, again)

    @pytest.mark.slow
    @pytest.mark.parametrize("spread", [0.1, 1e-8])
    def test_a_thousand_steps(self, spread):
        """With a gradient of zero or of rank one now and then."""
        fast, exact = self.both(spread, weight_decay=0.1)
        generator = torch.Generator().manual_seed(1)
        kinds = {3: torch.zeros_like, 5: rank_one}
        for step in range(1000):
            step_together([exact, fast], generator, 1, kinds.get(step % 7, lambda g: g))
        assert fast._graphed is not None
        assert worst_error(fast, exact) < 1e-4

    @pytest.mark.parametrize(("kind", "steps"), [(torch.zeros_like, 10), (rank_one, 3), (one_row, 3)])
    def test_gradients_of_low_rank(self, kind, steps):
        fast, exact = self.both()
        gradients = [kind(g) for g in uneven_gradients(exact, torch.Generator().manual_seed(1))]
        for _ in range(steps):
            hand_over([fast, exact], gradients)
            fast.step(), exact.step()
        assert fast._graphed is not None
        assert worst_error(fast, exact) < 1e-4

    def test_a_gradient_that_is_not_finite_changes_nothing_and_is_told_two_steps_late(self):
        fast = build(whitened, SEVERAL, torch.float32, "cuda", **OPTIONS)
        generator = torch.Generator().manual_seed(1)
        step_together([fast], generator, 4)
        hand_over([fast], uneven_gradients(fast, generator))
        pairs_of(fast)[2][1].grad[0, 0] = float("inf")
        before = tensors(fast)
        fast.step()
        assert all(torch.equal(x, y) for x, y in zip(before, tensors(fast), strict=True))
        step_together([fast], generator, 1)
        with pytest.raises(UserError, match="not finite"):
            fast.step()
        fast.step()  # and goes on

    def test_no_synchronisation_and_a_graph(self):
        fast, _ = self.both(max_tangent_norm=1.0)
        step_together([fast], torch.Generator().manual_seed(1), 4)
        allocated = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                fast.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_allocated() == allocated
        assert fast._graphed._graph is not None

    def test_changes_from_outside_copies_and_checkpoints(self):
        """A re-factoring carries the momentum along; a copy, and a checkpoint on a CPU and back, go on alike."""
        cases = SEVERAL
        generator = torch.Generator().manual_seed(1)
        fast, untouched = (build(whitened, cases, torch.float32, "cuda", **OPTIONS) for _ in range(2))
        step_together([fast, untouched], generator, 5)
        for a, b, _ in pairs_of(fast):
            mix = torch.linalg.qr(torch.randn(len(a), len(a), generator=generator, dtype=torch.float64)).Q.cuda()
            with torch.no_grad():
                b.copy_(b.double() @ mix), a.copy_(mix.mT @ a.double())
        step_together([fast, untouched], generator, 5)
        assert worst_error(fast, untouched) < 1e-4
        others = [copy.deepcopy(fast)]
        source = fast
        for device in ("cpu", "cuda"):
            moved = build(whitened, cases, torch.float32, device, **OPTIONS)
            for pair, other in zip(pairs_of(moved), pairs_of(source), strict=True):
                for factor, value in zip(pair[:2], other[:2], strict=True):
                    factor.data.copy_(value.data)
            moved.load_state_dict(copy.deepcopy(source.state_dict()))
            others.append(moved)
            source = moved
        step_together([fast, *others], generator, 5)
        for other in others:
            assert worst_error(other, fast) < 1e-5
