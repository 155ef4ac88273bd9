"""What the optimizers of single pairs should do: the papers' formulas, one pair at a time, dense, in float64.

Every oracle is a function of one step, `step(pair, g, **options)`: it moves `pair.a` (r, n) and `pair.b` (m, r), given
the loss gradient g (m, n) with respect to the product X = c B A, and keeps what it needs in `pair.memory`. The scaling
c appears as it does in X, where the package takes it into the factors; roots and polar factors come from SVDs.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Pair:
    a: Tensor
    b: Tensor
    c: float
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def product(self) -> Tensor:
        return self.c * self.b @ self.a

    def gradients(self, g: Tensor) -> tuple[Tensor, Tensor]:
        return self.c * self.b.mT @ g, self.c * g @ self.a.mT

    def means(self, g: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
        """Running means of the two factor gradients."""
        new = self.gradients(g)
        old = self.memory.get("means", [torch.zeros_like(x) for x in new])
        self.memory["means"] = [momentum * x + (1 - momentum) * y for x, y in zip(old, new, strict=True)]
        return tuple(self.memory["means"])

    def shrink(self, decay: float, d_a: Tensor, d_b: Tensor) -> None:
        """LoRA-Muon's split decay."""
        root = (1 - decay) ** 0.5
        self.a, self.b = root * self.a + d_a / root, root * self.b + d_b / root


def msign(x: Tensor) -> Tensor:
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    return (u * (s > 1e-5 * s[0])) @ vt


def power(n: Tensor, exponent: float, ridge: float = 0.0) -> Tensor:
    """A power of a positive semidefinite matrix plus a ridge; the ridge alone where it is zero, which is zero here."""
    if not n.any():
        return torch.zeros_like(n)
    u, s, _ = torch.linalg.svd(n)
    return (u * (s + ridge) ** exponent) @ u.mT


def torch_adamw(pair: Pair, d: list[tuple[str, Tensor]], **options: Any) -> None:
    """torch's own AdamW on some of the factors, with given gradients."""
    if "adamw" not in pair.memory:
        pair.memory["factors"] = {name: torch.nn.Parameter(getattr(pair, name).clone()) for name, _ in d}
        pair.memory["adamw"] = torch.optim.AdamW(pair.memory["factors"].values(), **options)
    for name, gradient in d:
        pair.memory["factors"][name].grad = gradient
    pair.memory["adamw"].step()
    for name, factor in pair.memory["factors"].items():
        setattr(pair, name, factor.detach().clone())


def rprec_adamw(pair: Pair, g: Tensor, *, damping: float, **options: Any) -> None:
    g_a, g_b = pair.gradients(g)
    eye = torch.eye(len(pair.a), dtype=torch.float64)
    d_a = torch.linalg.inv(pair.b.mT @ pair.b + damping * eye) @ g_a
    d_b = g_b @ torch.linalg.inv(pair.a @ pair.a.mT + damping * eye)
    torch_adamw(pair, [("a", d_a), ("b", d_b)], **options)


def lora_fa(pair: Pair, g: Tensor, **options: Any) -> None:
    """With B's gradient the coefficients of the nearest matrix to G in A's row space."""
    d_b = g @ torch.linalg.pinv(pair.a) / pair.c
    torch_adamw(pair, [("b", d_b)], **options)


def factor_muon(pair: Pair, g: Tensor, *, lr: float, momentum: float, weight_decay: float) -> None:
    def polar(x: Tensor) -> Tensor:
        """Five steps on the singular values."""
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        s = s / s.norm().clamp_min(1e-7)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        return (u * s) @ vt

    new = pair.gradients(g)
    means = pair.means(g, momentum)
    factors = []
    for factor, gradient, mean in zip((pair.a, pair.b), new, means, strict=True):
        rows, columns = factor.shape
        direction = polar((1 - momentum) * gradient + momentum * mean)
        rate = lr * max(1, rows / columns) ** 0.5
        factors.append((1 - lr * weight_decay) * factor - rate * direction)
    pair.a, pair.b = factors


def lora_muon(pair: Pair, g: Tensor, *, lr: float, momentum: float, weight_decay: float) -> None:
    m_a, m_b = pair.means(g, momentum)
    n_b, n_a = pair.b.mT @ pair.b, pair.a @ pair.a.mT
    root_b, root_a = (power(n, -0.5, 1e-5 * float(n.norm())) for n in (n_b, n_a))
    d_a = -lr / (2 * pair.c) * root_b @ msign(root_b @ m_a)
    d_b = -lr / (2 * pair.c) * msign(m_b @ root_a) @ root_a
    pair.shrink(lr * weight_decay, d_a, d_b)


def polora(pair: Pair, g: Tensor, *, lr: float, momentum: float, curvature_beta: float, weight_decay: float) -> None:
    g_a, g_b = pair.gradients(g)
    m_a, m_b = ((1 - momentum) * x + momentum * y for x, y in zip((g_a, g_b), pair.means(g, momentum), strict=True))

    def diagonal(name: str, size: int) -> tuple[Tensor, Tensor]:
        found = pair.memory.get(name, torch.zeros(size, dtype=torch.float64))
        scaled = found / found.max() if found.max() > 0 else torch.ones_like(found)
        return found, torch.diag(scaled + 1e-4)

    (old_q, q), (old_p, p) = diagonal("q", g.shape[1]), diagonal("p", g.shape[0])
    c_b, c_a = pair.b.mT @ p @ pair.b, pair.a @ q @ pair.a.mT
    root_b, root_a = (power(n, -0.5, 1e-4 * float(torch.linalg.matrix_norm(n, 2))) for n in (c_b, c_a))
    root_q, root_p = power(q, -0.5), power(p, -0.5)
    d_a = root_b @ msign(root_b @ m_a @ root_q) @ root_q
    d_b = root_p @ msign(root_p @ m_b @ root_a) @ root_a
    norm_a, norm_b, norm_d_a, norm_d_b = (float(torch.linalg.matrix_norm(x, 2)) for x in (pair.a, pair.b, d_a, d_b))
    h = lr / (pair.c * (norm_a + norm_b))
    pair.memory["q"] = curvature_beta * old_q + (1 - curvature_beta) * (g_a.mT @ root_b @ root_b @ g_a).diag() / len(
        g_a
    )
    pair.memory["p"] = curvature_beta * old_p + (1 - curvature_beta) * (g_b @ root_a @ root_a @ g_b.mT).diag() / len(
        g_a
    )
    pair.shrink(lr * weight_decay, -h * d_a / (norm_d_a or 1), -h * d_b / (norm_d_b or 1))


def lora_tsd(pair: Pair, g: Tensor, *, lr: float, momentum: float, weight_decay: float, max_step_norm: float) -> None:
    m_a, m_b = pair.means(g, momentum)
    a_plus, b_plus = torch.linalg.pinv(pair.a), torch.linalg.pinv(pair.b)
    onto_columns, onto_rows = pair.b @ b_plus, a_plus @ pair.a

    def tangent(of_rows: Tensor, of_columns: Tensor) -> Tensor:
        """The projection of Z from Z times the rows' projector and the columns' projector times Z."""
        return of_columns + of_rows - onto_columns @ of_rows

    t = tangent(m_b @ a_plus.mT / pair.c, b_plus.mT @ m_a / pair.c)
    d = msign(t)
    d = tangent(d @ onto_rows, onto_columns @ d)
    d = d * min(lr, max_step_norm / max(float(d.norm()), 1e-30))
    d_b = -d @ a_plus / pair.c
    d_a = -b_plus @ (d / pair.c + d_b @ pair.a)
    pair.shrink(lr * weight_decay, d_a, d_b)
    ratio = (pair.b.norm() / pair.a.norm()).sqrt() if pair.b.any() else 1.0
    pair.a, pair.b = pair.a * ratio, pair.b / ratio
    pair.memory["means"] = [m_a / ratio, m_b * ratio]


def lora_rite(pair: Pair, g: Tensor, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    g_a, g_b = pair.gradients(g)
    t = pair.memory["step"] = pair.memory.get("step", 0) + 1
    beta1, beta2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in betas)
    r = len(pair.a)
    (v, r_a), (u, r_b) = torch.linalg.qr(pair.a.mT), torch.linalg.qr(pair.b)
    moved = {}
    sides = {"b": (g_b, v, r_a), "a": (g_a.mT, u, r_b)}
    for name, (gradient, basis, factor) in sides.items():
        rows = len(gradient)
        nothing = (basis, torch.zeros(rows, r), torch.zeros(r, r), 0.0)
        old_basis, first, second, escaped = pair.memory.get(name, nothing)
        bare = gradient @ torch.linalg.pinv(factor, rtol=1e-5) / pair.c
        turn = basis.mT @ old_basis
        carried = turn @ second.double() @ turn.mT
        values = [torch.linalg.svdvals(x.double()) for x in (second, carried)]
        lost = max(0.0, min(float((values[0] - values[1]).max()), float(values[0].sum() - values[1].sum())))
        escaped = beta2 * (escaped + lost)
        second = beta2 * carried + (1 - beta2) * bare.mT @ bare / rows
        w, s, _ = torch.linalg.svd(second)
        scaled = bare @ (w / ((s + escaped).sqrt() + eps)) @ w.mT
        first = beta1 * first.double() @ turn.mT + (1 - beta1) * scaled
        moved[name] = -lr / pair.c * first @ torch.linalg.pinv(factor, rtol=1e-5).mT
        pair.memory[name] = basis, first, second, escaped
    pair.a = (1 - lr * weight_decay) * pair.a + moved["a"].mT
    pair.b = (1 - lr * weight_decay) * pair.b + moved["b"]
