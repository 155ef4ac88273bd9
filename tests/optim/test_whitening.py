"""Whitened Riemannion against full m x n matrices in float64."""

import io

import pytest
import torch
from dense_steps import bases, relative, tangent_part
from dense_whitening import Whitened, fourth_root, whitened_start, whitened_step
from peft_layers import adapted, hand_over, mixing, products, refactor
from torch import nn

from lightning_rlora.adapters import find_pairs, matrix
from lightning_rlora.errors import UserError
from lightning_rlora.geometry import RANK_TOLERANCE, point_to_dense, random_point
from lightning_rlora.optim import Riemannion, WhitenedRiemannion
from lightning_rlora.optim.reference import whitened_reference_step
from lightning_rlora.optim.whitening import row_weights

R = 3
OPTIONS = {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.1}
ABSOLUTE = OPTIONS | {"relative": False}  # in the unit of the dense iteration
DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]


def spread_gradients(m, n, steps, seed=1):
    """A drift and noise, with rows and columns of sizes from 0.01 to 1."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (10 ** (-2 * torch.rand(k, generator=generator, dtype=torch.float64)) for k in (m, n))
    drift, *noise = torch.randn(steps + 1, m, n, generator=generator, dtype=torch.float64)
    return [rows.unsqueeze(1) * (drift + other) * columns for other in noise]


def the_gradients(model, steps):
    """Gradients of every pair, a list (of steps) of lists (of pairs)."""
    of_pairs = [spread_gradients(*pair.shape[:2], steps, seed) for seed, pair in enumerate(find_pairs(model))]
    return [list(step) for step in zip(*of_pairs, strict=True)]


def run(model, gradients, *, optimizer=None, before_step=lambda step, pairs: None):
    optimizer = optimizer or WhitenedRiemannion.for_model(model, **ABSOLUTE)
    pairs = find_pairs(model)
    for number, step in enumerate(gradients):
        before_step(number, pairs)
        hand_over(pairs, step)
        optimizer.step()
    return optimizer


def dense_run(starts, gradients, dtype, **options):
    """The oracle of every product, after each step."""
    points, after = [whitened_start(x) for x in starts], []
    for step in gradients:
        points = [
            whitened_step(d, g, R, tolerance=RANK_TOLERANCE[dtype], **(OPTIONS | options))
            for d, g in zip(points, step, strict=True)
        ]
        after.append(points)
    return after


def worst_error(got, expected: list[Whitened]):
    return max(relative(x, d.x) for x, d in zip(got, expected, strict=True))


@pytest.fixture(scope="module", params=DTYPES)
def case(request):
    """The dtype, the gradients and the oracle's points after every step."""
    model = adapted(request.param)
    gradients = the_gradients(model, 200)
    return request.param, gradients, dense_run(products(model), gradients, request.param)


def check(model, case, what, allowed):
    error = worst_error(products(model), case[2][-1])
    print(f"\n{what}, {case[0]}: {error:.1e}")
    assert error <= allowed[case[0]]


@pytest.mark.parametrize("shape", [(14, 11), (5, 17), (3, 9)])
def test_the_reference_step_follows_the_dense_iteration(shape):
    x = point_to_dense(random_point(*shape, R, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    dense, m = whitened_start(x), torch.zeros_like(x)
    curvatures = x.new_zeros(shape[0]), x.new_zeros(shape[1])
    for g in spread_gradients(*shape, 20):
        dense = whitened_step(dense, g, R, tolerance=RANK_TOLERANCE[torch.float64], **OPTIONS)
        x, m, curvatures = whitened_reference_step(x, m, curvatures, g, R, **OPTIONS)
    errors = [relative(x, dense.x), relative(m, dense.m), relative(curvatures[0].square(), dense.p)]
    assert max(errors) < 1e-11  # measured 2e-14


def test_follows_the_dense_iteration(case):
    dtype, gradients, after = case
    model = adapted(dtype)
    start = products(model)
    optimizer = run(model, gradients[:20])
    early = worst_error(products(model), after[19])
    run(model, gradients[20:], optimizer=optimizer)
    late = worst_error(products(model), after[-1])
    print(f"\n{dtype}: {early:.1e} after 20 steps, {late:.1e} after 200")
    assert early < {torch.float64: 1e-11, torch.float32: 1e-4}[dtype]
    assert late < {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    assert min(relative(x, y) for x, y in zip(products(model), start, strict=True)) > 0.5  # it has gone somewhere


@pytest.mark.parametrize("condition", [1.0, 1e3])
@pytest.mark.parametrize("when", [0, 100])
def test_does_not_depend_on_how_the_product_is_factored(case, condition, when):
    """At the start, or half way, where the momentum must come along."""
    generator = torch.Generator().manual_seed(2)

    def mixed(step, pairs):
        if step == when:
            for pair in pairs:
                refactor(pair, mixing(R, condition, generator))

    model = adapted(case[0])
    run(model, case[1], before_step=mixed)
    # measured 5e-13, 2e-5: float32 rounds the mixed factors themselves by eps * cond
    check(model, case, f"refactored at {when}, cond {condition:g}", {torch.float64: 1e-10, torch.float32: 1e-4})


@pytest.mark.parametrize("scale", [1e3, 1e-20])
def test_does_not_depend_on_the_gradients_scale(case, scale):
    model = adapted(case[0])
    run(model, [[scale * g for g in step] for step in case[1]])
    check(model, case, f"gradients times {scale:g}", {torch.float64: 1e-10, torch.float32: 1e-4})


def test_it_is_neither_riemannion_nor_a_metric_that_stands_still(case):
    """So that the tests above can fail."""
    dtype, gradients, after = case
    plain = adapted(dtype)
    run(plain, gradients[:20], optimizer=Riemannion.for_model(plain, **OPTIONS))
    assert all(relative(x, d.x) > 1e-2 for x, d in zip(products(plain), after[19], strict=True))
    points = after[2]
    for step in gradients[3:20]:
        points = [
            whitened_step(d, g, R, tolerance=RANK_TOLERANCE[dtype], moving=False, **OPTIONS)
            for d, g in zip(points, step, strict=True)
        ]
    assert all(relative(d.x, e.x) > 1e-2 for d, e in zip(points, after[19], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_equal_curvatures_it_is_riemannion(dtype):
    """Orthogonal gradients at square points of full rank have rows and columns of one size."""
    ends = []
    for kind in (WhitenedRiemannion, Riemannion):
        generator = torch.Generator().manual_seed(0)
        a, b, *gradients = torch.randn(32, 5, 5, generator=generator, dtype=torch.float64)
        a, b = (nn.Parameter(x.to(dtype)) for x in (a, b))
        optimizer = kind([{"params": [a, b]}], **ABSOLUTE)
        for g in torch.linalg.qr(torch.stack(gradients)).Q.to(dtype):
            a.grad, b.grad = b.detach().mT @ g, g @ a.detach().mT
            optimizer.step()
        ends.append((b @ a).detach())
    error = relative(*ends)
    print(f"\n{dtype}: {error:.1e}")
    assert error < {torch.float64: 1e-11, torch.float32: 1e-5}[dtype]  # measured 7e-15, 5e-7


def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit():
    model = adapted()
    gradients = the_gradients(model, 12)
    optimizer = run(model, gradients[:5])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run(model, gradients[5:], optimizer=optimizer)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = adapted(seed=5)
    fresh = WhitenedRiemannion.for_model(resumed, **ABSOLUTE)
    resumed.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    run(resumed, gradients[5:], optimizer=fresh)
    for pair, other in zip(find_pairs(model), find_pairs(resumed), strict=True):
        for p, q in ((pair.a, other.a), (pair.b, other.b)):
            assert torch.equal(p, q)
            assert optimizer.state[p].keys() == fresh.state[q].keys()
            assert all(torch.equal(value, fresh.state[q][name]) for name, value in optimizer.state[p].items())


def test_the_state_of_riemannion_is_refused():
    model = adapted()
    other = run(model, the_gradients(model, 1), optimizer=Riemannion.for_model(model, **OPTIONS))
    with pytest.raises(UserError, match="another optimizer"):
        WhitenedRiemannion.for_model(model, **ABSOLUTE).load_state_dict(other.state_dict())


def test_the_state_has_a_number_for_every_row_and_column_more():
    model = adapted()
    optimizer = run(model, the_gradients(model, 1))
    for pair in find_pairs(model):
        m, n, r = pair.shape
        state = [optimizer.state[f] for f in (pair.a, pair.b)]
        assert [len(one["curvature"]) for one in state] == [n, m]
        assert sum(t.numel() for one in state for t in one.values()) <= (m + n) * (r + 1) + 2 * r * (r + 8)
        assert all(t.dtype == torch.float32 for one in state for t in one.values())


def test_steps_without_a_gradient_at_the_start_change_nothing():
    """No curvature is known then, and none is made up."""
    model, twin = adapted(torch.float64), adapted(torch.float64)
    gradients = the_gradients(model, 10)
    options = ABSOLUTE | {"weight_decay": 0.0}
    nothing = [[torch.zeros_like(g) for g in gradients[0]]] * 3
    optimizer = run(model, nothing, optimizer=WhitenedRiemannion.for_model(model, **options))
    assert worst_error(products(model), [whitened_start(x) for x in products(twin)]) < 1e-13
    run(model, gradients, optimizer=optimizer)
    run(twin, gradients, optimizer=WhitenedRiemannion.for_model(twin, **options))
    error = max(relative(x, y) for x, y in zip(products(model), products(twin), strict=True))
    assert error < 1e-11  # measured 4e-15


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 9), (3, 8), (40, 5)], ids=["2r > m", "r = m", "2r > n"])
def test_small_matrices_and_singular_values_far_apart(dtype, shape):
    generator = torch.Generator().manual_seed(3)
    point = random_point(*shape, R, generator=generator, dtype=torch.float64)
    # the oracle finds the bases of the smallest from the product, to eps over it
    root = torch.tensor([1.0, 1e-1, 1e-2], dtype=torch.float64)
    b, a = (nn.Parameter(x.to(dtype)) for x in (point.u * root, (point.v * root).mT.contiguous()))
    dense = whitened_start((b.double() @ a.double()).detach())
    optimizer = WhitenedRiemannion([{"params": [a, b]}], **ABSOLUTE)
    for g in spread_gradients(*shape, 15):
        b.grad, a.grad = ((x.detach().double()).to(dtype) for x in (g @ a.double().mT, b.double().mT @ g))
        optimizer.step()
        dense = whitened_step(dense, g, R, tolerance=RANK_TOLERANCE[dtype], **OPTIONS)
    error = relative((b @ a).detach(), dense.x)
    assert error < {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]  # measured 1e-12, 5e-7


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(value):
    model = adapted()
    gradients = the_gradients(model, 3)
    optimizer = run(model, gradients[:2])
    hand_over(find_pairs(model), gradients[2])
    factor = find_pairs(model)[1].a
    factor.grad[0, 0] = value
    before = {id(f): [f.detach().clone(), *map(torch.clone, optimizer.state[f].values())] for f in optimizer.state}
    with pytest.raises(UserError, match="not finite"):
        optimizer.step()
    for f, entry in optimizer.state.items():
        assert all(torch.equal(x, y) for x, y in zip([f, *entry.values()], before[id(f)], strict=True))


def test_factors_reset_to_zero_start_again():
    model = adapted()
    gradients = the_gradients(model, 6)

    @torch.no_grad()
    def reset(step, pairs):
        if step == 3:
            pairs[0].b.zero_()

    run(model, gradients, before_step=reset)
    for x in products(model):
        assert torch.isfinite(x).all() and torch.linalg.matrix_rank(x, rtol=1e-6) == R


def test_factors_are_balanced_in_the_frame_of_their_step():
    model = adapted(torch.float64)
    gradients = the_gradients(model, 10)
    optimizer = run(model, gradients[:9])
    frames = [[row_weights(optimizer.state[f]["curvature"], 1e-3) for f in (p.b, p.a)] for p in find_pairs(model)]
    run(model, gradients[9:], optimizer=optimizer)
    for pair, (left, right) in zip(find_pairs(model), frames, strict=True):
        b, a = (left.unsqueeze(1) * matrix(pair.b)).detach(), (matrix(pair.a) * right).detach()
        s = (b.mT @ b).diagonal()
        assert relative(b.mT @ b, s.diag()) < 1e-12 and relative(a @ a.mT, s.diag()) < 1e-12  # measured 2e-16
        assert relative(matrix(pair.b).mT.detach() @ matrix(pair.b).detach(), s.diag()) > 1e-2


def rank_one(g):
    u, s, vt = torch.linalg.svd(g)
    return s[0] * u[:, :1] @ vt[:1]


def one_row(g):
    return torch.zeros_like(g).index_copy_(0, torch.tensor([1]), g[1:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [rank_one, one_row, torch.zeros_like])
def test_gradients_of_low_rank(dtype, kind):
    """Also after others: most of the momentum's directions die out then, and most rows of a single one have none."""
    model = adapted(dtype)
    gradients = the_gradients(model, 12)
    gradients = [[kind(g) if number % 3 else g for g in step] for number, step in enumerate(gradients)]
    gradients = [[kind(g) for g in gradients[0]], *gradients]
    after = dense_run(products(model), gradients, dtype)
    run(model, gradients)
    error = worst_error(products(model), after[-1])
    print(f"\n{kind.__name__}, {dtype}: {error:.1e}")
    assert error < {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]  # measured 2e-14, 5e-7


def test_clips_to_the_norm_in_its_own_metric():
    """As smaller gradients would: in the momentum, and in the curvatures."""
    model, twin = adapted(torch.float64), adapted(torch.float64)
    gradients = the_gradients(model, 6)
    gradients[3] = [1e4 * g for g in gradients[3]]
    threshold, scales = 20.0, []
    optimizer = WhitenedRiemannion.for_model(model, max_tangent_norm=threshold, **ABSOLUTE)
    run(model, gradients, optimizer=optimizer)
    points = [whitened_start(x) for x in products(twin)]
    for step in gradients:
        square = 0.0
        for d, g in zip(points, step, strict=True):
            roots = [fourth_root(p, d.steps, 0.98, 1e-3) for p in (d.p, d.q)]
            left, right = (root.diagonal() for root in roots)
            u, v = bases(left.unsqueeze(1) * d.x * right, R)
            square += float(tangent_part(u, v, g / left.unsqueeze(1) / right).square().sum())
        scales.append(min(1.0, threshold / square**0.5))
        options = OPTIONS | {"tolerance": RANK_TOLERANCE[torch.float64]}
        points = [whitened_step(d, scales[-1] * g, R, **options) for d, g in zip(points, step, strict=True)]
    assert min(scales) < 1e-2 and max(scales) == 1
    assert worst_error(products(model), points) < 1e-10  # measured 2e-14


def test_another_product_from_outside_forgets_that_momentum_and_keeps_the_curvatures():
    point = random_point(16, 12, R, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    @torch.no_grad()
    def in_the_middle(step, pairs):
        if step == 5:
            pairs[2].b.copy_(point.u)
            pairs[2].a.copy_(point.v.mT)

    model = adapted(torch.float64)
    scaling = find_pairs(model)[2].scaling
    gradients = the_gradients(model, 10)
    after = dense_run(products(model), gradients, torch.float64)
    run(model, gradients, before_step=in_the_middle)
    x = scaling * point.u @ point.v.mT
    changed = after[4][2]._replace(x=x, m=torch.zeros_like(x))
    for step in gradients[5:]:
        changed = whitened_step(changed, step[2], R, tolerance=RANK_TOLERANCE[torch.float64], **OPTIONS)
    for i, got in enumerate(products(model)):
        assert relative(got, changed.x if i == 2 else after[-1][i].x) < 1e-11  # measured 4e-15


def test_groups_of_other_algorithms_and_options_step_beside_it():
    """One optimizer object may hold both; a group's options are its own."""
    model, twin, third = (adapted(torch.float64) for _ in range(3))
    gradients = the_gradients(model, 8)

    def by_hand(model, kind, *changes):
        groups = [
            {"params": [p.a, p.b], "scaling": p.scaling} | change
            for p, change in zip(find_pairs(model), changes, strict=True)
        ]
        return run(model, gradients, optimizer=kind(groups, **ABSOLUTE))

    by_hand(model, WhitenedRiemannion, {}, {"algorithm": "riemannion"}, {"curvature_decay": 0.5}, {}, {"lr": 0.1})
    by_hand(twin, WhitenedRiemannion, *[{}] * 5)
    by_hand(third, Riemannion, *[{}] * 5)
    same = [relative(x, y) < 1e-11 for x, y in zip(products(model), products(twin), strict=True)]
    assert same == [True, False, False, True, False]
    assert relative(products(model)[1], products(third)[1]) < 1e-11


@pytest.mark.parametrize("option", [{"curvature_decay": 1.0}, {"curvature_decay": -0.1}, {"curvature_floor": 0.0}])
def test_options_that_no_step_can_take_are_refused(option):
    with pytest.raises(UserError, match=next(iter(option))):
        WhitenedRiemannion.for_model(adapted(), **option)
