"""Slow, dense references for the theory, from its definitions: numeric minimization instead of closed forms.

A penalty is a function of the excess e = z − 1 of a singular value, so that v = 1e-12 loses no precision.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mpmath
import numpy as np
import torch
from scipy.optimize import minimize, minimize_scalar
from torch import Tensor

import adaptive_tangents as at
from adaptive_tangents.features.blocks import Slot
from adaptive_tangents.features.summands import Dense, Outer

Omega = Callable[[np.ndarray], np.ndarray]  # ω as a function of z − 1

# Every structure whose regularizer has a curvature, made from two penalties.
CURVED: dict[str, Callable[[at.Penalty, at.Penalty], at.structures.Structure]] = {
    "Fixed": lambda p, q: at.Fixed(),
    "Full": lambda p, q: at.Full(p),
    "LayerScale": lambda p, q: at.LayerScale(p),
    "Left": lambda p, q: at.Left(p),
    "Right": lambda p, q: at.Right(p),
    "TwoSided": lambda p, q: at.TwoSided(p, q),
    "Rows": lambda p, q: at.Rows(p),
    "Columns": lambda p, q: at.Columns(p),
    "Diagonal": lambda p, q: at.Diagonal(p),
}
MIXED = {"block0": "Diagonal"}  # the structure "Mixed" of a joint problem: this, and Left for the rest


class PrecisePart(NamedTuple):
    """ω and zω′/2 (its pull) as functions of z − 1, in any arithmetic."""

    value: Callable[[mpmath.mpf], mpmath.mpf]
    pull: Callable[[mpmath.mpf], mpmath.mpf]


# ---------------------------------------------------------------------------------------------------------- penalties


def quadratic(strength: float) -> Omega:
    return lambda e: strength * e**2


def absolute(strength: float) -> Omega:
    return lambda e: strength * e


def power(q: float, strength: float) -> Omega:
    return lambda e: strength * e**q


def logarithm_squared(strength: float) -> Omega:
    return lambda e: strength * np.log1p(e) ** 2


def no_adaptation() -> Omega:
    return lambda e: np.where(e > 0, np.inf, 0.0)


def minimum_over_excess(cost: Callable[[np.ndarray], np.ndarray], largest: float = 1e30) -> tuple[float, float]:
    """(minimum, minimizer) over e in [0, largest] of a function with one valley: grid in log e, then golden section."""
    if largest <= 0:
        return float(cost(np.zeros(1))[0]), 0.0
    grid = np.linspace(math.log(1e-60), math.log(largest), 4001)
    with np.errstate(over="ignore"):
        values = cost(np.exp(grid))
    best = int(np.argmin(values))
    low, high = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    found = minimize_scalar(
        lambda s: float(cost(np.exp(np.array([s])))[0]), bounds=(low, high), method="bounded", options={"xatol": 1e-13}
    )
    candidates = [(float(found.fun), math.exp(found.x)), (float(values[best]), math.exp(grid[best]))]
    for end in (0.0, largest):
        candidates.append((float(cost(np.array([end]))[0]), end))
    return min(candidates)


def composed(first: Omega, second: Omega) -> Omega:
    """(ω₁ ⊕ ω₂)(z) = min over 1 ≤ a ≤ z of ω₁(a) + ω₂(z/a)."""

    def value(e: np.ndarray) -> np.ndarray:
        def one(total: float) -> float:
            return minimum_over_excess(
                lambda a: first(np.minimum(a, total)) + second(np.maximum(total - a, 0) / (1 + a)), total
            )[0]

        return np.array([one(float(total)) for total in np.ravel(e)]).reshape(np.shape(e))

    return value


def induced(omega: Omega, v: float) -> tuple[float, float]:
    """ω̃(v) = min over z ≥ 1 of ω(z) + v²/z², and its minimizer z."""
    value, excess = minimum_over_excess(lambda e: omega(e) + (v / (1 + e)) ** 2)
    return value, 1 + excess


def induced_values(omega: Omega, v: np.ndarray) -> np.ndarray:
    """ω̃ of many v: the grid and the golden section of ``minimum_over_excess`` for all of them at once."""
    grid = np.linspace(math.log(1e-60), math.log(1e30), 4001)
    costs = omega(np.exp(grid)) + (v[:, None] / (1 + np.exp(grid))) ** 2
    best = costs.argmin(1)
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, len(grid) - 1)]

    def cost(s: np.ndarray) -> np.ndarray:
        return omega(np.exp(s)) + (v / (1 + np.exp(s))) ** 2

    share = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        one, two = high - share * (high - low), low + share * (high - low)
        left = cost(one) <= cost(two)
        low, high = np.where(left, low, one), np.where(left, two, high)
    return np.minimum.reduce([cost((low + high) / 2), costs.min(1), omega(np.zeros(1)) + v**2])


def induced_by_two(first: Omega, second: Omega, v: float) -> float:
    """min over a, b ≥ 1 of ω₁(a) + ω₂(b) + v²/(ab)², the two-sided inner problem in one block's singular value."""

    def given(log_a: float) -> float:
        a = math.exp(log_a)
        return float(first(np.array([a - 1]))[0]) + induced(second, v / a)[0]

    grid = np.linspace(0, math.log(1 + v) + 15, 201)
    values = first(np.exp(grid) - 1) + induced_values(second, v / np.exp(grid))
    best = int(np.argmin(values))
    bounds = (grid[max(0, best - 1)], grid[min(200, best + 1)])
    return min(minimize_scalar(given, bounds=bounds, method="bounded", options={"xatol": 1e-11}).fun, values[best])


def proximal(omega: Omega, v: float, step: float) -> tuple[float, float]:
    """(least value, argmin) over w ≥ 0 of (w − v)²/(2·step) + ω̃(w), by a grid over w and golden section in each valley."""

    def objective(w: float) -> float:
        return (w - v) ** 2 / (2 * step) + induced(omega, w)[0]

    grid = np.unique(np.concatenate([np.linspace(0, v, 201), np.geomspace(v * 1e-5, v, 201), [1.01 * v]]))
    values = (grid - v) ** 2 / (2 * step) + induced_values(omega, grid)
    valleys = [k for k in range(1, len(grid) - 1) if values[k] <= min(values[k - 1], values[k + 1])]
    found = [
        minimize_scalar(objective, bounds=(grid[k - 1], grid[k + 1]), method="bounded", options={"xatol": 1e-11})
        for k in valleys
    ]
    return min([(float(f.fun), float(f.x)) for f in found] + [(values[0], 0.0), (values[-1], v)])


def precise_power(q: float, strength: float) -> PrecisePart:
    # Written with the excess: (q·λ/2)·e^{q−1}(1 + e).
    return PrecisePart(
        lambda e: strength * e**q,
        lambda e: mpmath.mpf(q) * strength / 2 * (e ** (mpmath.mpf(q) - 1) if q != 1 else 1) * (1 + e),
    )


def precise_log_squared(strength: float) -> PrecisePart:
    return PrecisePart(lambda e: strength * mpmath.log1p(e) ** 2, lambda e: strength * mpmath.log1p(e))


def precise_root(rises: Callable[[mpmath.mpf], mpmath.mpf], low: float, high: mpmath.mpf, width: float) -> mpmath.mpf:
    """The root of a rising function to within ``width``: bisection, then secants; a sign change proves it."""
    low, high = mpmath.mpf(low), mpmath.mpf(high)

    def halve(down_to: float) -> None:
        nonlocal low, high
        while high - low > down_to:
            middle = (low + high) / 2
            low, high = (middle, high) if rises(middle) <= 0 else (low, middle)

    halve(1)
    (x, value), (last, before) = ((end, rises(end)) for end in (high, low))
    for _ in range(20):
        if value == before or abs(x - last) <= width / 4:
            break
        step = value * (x - last) / (value - before)
        last, before, x = x, value, min(max(x - step, low), high)
        value = rises(x)
    if rises(x - width / 2) <= 0 <= rises(x + width / 2):
        return x
    halve(width)
    return low


def precise_gain(pull: Callable[[mpmath.mpf], mpmath.mpf], u: mpmath.mpf) -> mpmath.mpf:
    """The excess e at which a rising pull, a function of e, reaches u, found in log e; 0 if it starts above."""
    if pull(mpmath.mpf(0)) >= u:
        return mpmath.mpf(0)
    return mpmath.exp(precise_root(lambda s: mpmath.log(pull(mpmath.exp(s)) / u), -12000, mpmath.mpf(12000), 1e-35))


def precise_induced(parts: Sequence[PrecisePart], v: float) -> tuple[float, float]:
    """(ω̃(v), z(v) − 1) with 40 digits: the level u with u·Π(1 + e_j(u))² = v², found in log u."""
    with mpmath.workdps(40):
        square = mpmath.mpf(v) ** 2

        def excess(s: mpmath.mpf) -> mpmath.mpf:
            u = mpmath.exp(s)
            return mpmath.log(u * mpmath.fprod(1 + precise_gain(part.pull, u) for part in parts) ** 2 / square)

        u = mpmath.exp(precise_root(excess, -2000, mpmath.log(square), 1e-30))
        excesses = [precise_gain(part.pull, u) for part in parts]
        paid = mpmath.fsum(part.value(e) for part, e in zip(parts, excesses, strict=True))
        return float(paid + u), float(mpmath.fprod(1 + e for e in excesses) - 1)


def dual(omega: Omega, s: float) -> float:
    """ω̃*(s) = sup over z ≥ 1 of s²z²/4 − ω(z)."""
    return -minimum_over_excess(lambda e: omega(e) - (s * (1 + e) / 2) ** 2)[0]


# ------------------------------------------------------------------------------------------------------ small problems


@dataclass(frozen=True)
class Problem:
    """Random features as dense arrays (n, c, o, i) and as the library's blocks."""

    phi: Mapping[str, Tensor]
    feats: at.TangentFeatures
    r: Tensor

    @property
    def rows(self) -> Tensor:
        """φ as a matrix (n·c, p)."""
        return torch.cat([part.flatten(2) for part in self.phi.values()], 2).flatten(0, 1)

    def flatten(self, matrices: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([matrices[name].flatten() for name in self.phi])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        sizes = [part[0, 0].numel() for part in self.phi.values()]
        pieces = vector.split(sizes)
        return {name: v.reshape(part.shape[2:]) for (name, part), v in zip(self.phi.items(), pieces, strict=True)}


SHAPES = ((3, 2, 2), (2, 3, 1), (2, 1, 0))  # (o, i, positions); no positions: a materialized block
KERNEL = ((3, 7, 2), (2, 3, 1))  # the first a convolution's: two channels, a window of three, and a bias
KERNEL_MODES = {"block0": (("in", 2), ("spatial", 3))}
Modes = Mapping[str, tuple[tuple[str, int], ...]]


def problem(
    seed: int,
    *,
    n: int = 4,
    c: int = 1,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    scale: float = 1.0,
    modes: Modes | None = None,
) -> Problem:
    """Features and targets with standard normal factors."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    phi: dict[str, Tensor] = {}
    blocks: dict[str, at.features.Block] = {}
    parameters: dict[str, tuple[int, ...]] = {}
    for k, (o, i, t) in enumerate(shapes):
        name = f"block{k}"
        slots = (Slot(name, (o, i), 0, i),)
        parameters[name] = (o, i)
        if t:
            backward, inputs = normal(n, t, c, o), normal(n, t, i)
            phi[name] = torch.einsum("ntco,nti->ncoi", backward, inputs)
            parts = {"outer": Outer(backward, inputs)}
        else:
            phi[name] = normal(n, c, o, i)
            parts = {"dense": Dense(phi[name])}
        blocks[name] = at.features.Block(name, (o, i), slots, modes=(modes or {}).get(name, ()), **parts)
    return Problem(phi, at.TangentFeatures(n, c, blocks, parameters), scale * normal(n, c))


def features_from(phi: Mapping[str, Tensor]) -> at.TangentFeatures:
    """The library's materialized features from dense arrays (n, c, o, i)."""
    n, c = next(iter(phi.values())).shape[:2]
    blocks, parameters = {}, {}
    for name, values in phi.items():
        o, i = values.shape[2:]
        blocks[name] = at.features.Block(name, (o, i), (Slot(name, (o, i), 0, i),), dense=Dense(values))
        parameters[name] = (o, i)
    return at.TangentFeatures(n, c, blocks, parameters)


# ------------------------------------------------------------------------------------------- the joint problem (J)

TorchOmega = Callable[[Tensor], Tensor]  # ω of singular values, extended by 0 below 1


def torch_quadratic(strength: float) -> TorchOmega:
    return lambda z: strength * ((z - 1).clamp_min(0) ** 2).sum()


def torch_absolute(strength: float) -> TorchOmega:
    return lambda z: strength * (z - 1).clamp_min(0).sum()


@dataclass(frozen=True)
class JointProblem:
    """min over M ∈ 𝓜, θ of ‖θ‖² + Ω(M) + (1/ρ)‖r − φMᵀθ‖², with every M of 𝓜 written as a dense p × p matrix.

    ``kind`` is a structure's name; ``omegas`` has one penalty per side. With ``symmetric``, M ranges over I + AAᵀ instead of
    all matrices. That loses nothing (by the polar decomposition, and because ω does not fall) and smooths a kinked ω.
    """

    problem: Problem
    kind: str
    omegas: Sequence[TorchOmega]
    ridge: float
    symmetric: bool = False

    @functools.cached_property
    def factors(self) -> list[tuple[str, tuple[int, ...], int]]:
        """For each factor, its block, its shape ((d, d), or (d,) if diagonal) and its penalty."""
        p = self.problem.rows.shape[1]
        if self.kind == "Full":
            return [("", (p, p), 0)]
        found = []
        for name, part in self.problem.phi.items():
            o, i = part.shape[2:]
            sizes = [size for _, size in self.problem.feats.blocks[name].modes]
            by_kind: dict[str, list[tuple[tuple[int, ...], int]]] = {
                "Fixed": [],
                "LayerScale": [((1,), 0)],
                "Diagonal": [((o * i,), 0)],
                "Rows": [((o,), 0)],
                "Columns": [((i,), 0)],
                "Left": [((o, o), 0)],
                "Right": [((i, i), 0)],
                "TwoSided": [((o, o), 0), ((i, i), 1)],
                "Modes": [((d, d), k) for k, d in enumerate([o, *(sizes or [i])])],
            }
            found += [(name, shape, k % len(self.omegas)) for shape, k in by_kind[self.kind_of(name)]]
        return found

    def kind_of(self, name: str) -> str:
        """A block's kind of structure."""
        return MIXED.get(name, "Left") if self.kind == "Mixed" else self.kind

    def transform(self, values: list[Tensor]) -> tuple[Tensor, Tensor]:
        """M (p, p) and Ω(M)."""
        if self.symmetric:
            values = [1 + a**2 if a.ndim == 1 else torch.eye(len(a), dtype=a.dtype) + a @ a.mT for a in values]
        cost = torch.zeros((), dtype=torch.float64)
        held: dict[str, list[Tensor]] = {}
        for (name, _, k), value in zip(self.factors, values, strict=True):
            # The singular values of a diagonal matrix are the sizes of its entries.
            cost = cost + self.omegas[k](value.abs() if value.ndim == 1 else torch.linalg.svdvals(value))
            held.setdefault(name, []).append(torch.diag(value) if value.ndim == 1 else value)
        if self.kind == "Full":
            return held[""][0], cost
        pieces = []
        for name, part in self.problem.phi.items():
            o, i = part.shape[2:]
            left, right = torch.eye(o, dtype=torch.float64), torch.eye(i, dtype=torch.float64)
            mine, kind = held.get(name, []), self.kind_of(name)
            if kind == "LayerScale":
                left = left * mine[0]
            if kind in ("Left", "Rows", "TwoSided", "Modes"):
                left = mine[0]
            if kind in ("Right", "Columns", "TwoSided"):
                right = mine[-1]
            if kind == "Modes":
                inner = mine[1] if len(mine) == 2 else torch.kron(mine[1], mine[2])
                right = torch.block_diag(inner, torch.eye(i - len(inner), dtype=torch.float64))
            # vec by rows: M_L B M_Rᵀ ↦ (M_L ⊗ M_R) vec B
            pieces.append(mine[0] if kind == "Diagonal" else torch.kron(left, right))
        return torch.block_diag(*pieces), cost

    def objective(self, theta: Tensor | None, factors: list[Tensor]) -> Tensor:
        """The objective; without θ, at the best θ for M (interpolating if ρ = 0)."""
        matrix, cost = self.transform(factors)
        rows, r = self.problem.rows @ matrix.mT, self.problem.r.flatten()
        if theta is None:
            # Normal equations of the dense problem: min ‖θ‖² + ‖r − rows θ‖²/ρ has the value rᵀ(rows rowsᵀ + ρI)⁻¹r.
            kernel = rows @ rows.mT + self.ridge * torch.eye(len(r), dtype=r.dtype)
            return cost + r @ torch.linalg.solve(kernel, r)
        return cost + (theta**2).sum() + ((r - rows @ theta) ** 2).sum() / self.ridge

    def minimize(
        self, starts: int = 3, seed: int = 0, spread: float = 0.5, near: tuple[Tensor, list[Tensor]] | None = None
    ) -> list[float]:
        """Minima that L-BFGS finds from random starts: over M, with the best θ for each.

        ``near`` gives θ (p,) and factors to start near, instead of the identity; with a ridge, over (θ, M) then.
        """
        generator = np.random.default_rng(seed)
        shapes = [shape for _, shape, _ in self.factors]
        p = self.problem.rows.shape[1] if self.ridge > 0 and near is not None else 0
        sizes = [math.prod(shape) for shape in shapes]

        def unpack(x: Tensor) -> tuple[Tensor | None, list[Tensor]]:
            head, *rest = x.split([p, *sizes])
            return (head if p else None), [part.reshape(shape) for part, shape in zip(rest, shapes, strict=True)]

        def value(x: np.ndarray) -> tuple[float, np.ndarray]:
            point = torch.tensor(x, dtype=torch.float64, requires_grad=True)
            objective = self.objective(*unpack(point))
            if not objective.requires_grad:
                return objective.item(), np.zeros_like(x)
            (gradient,) = torch.autograd.grad(objective, point)
            return objective.item(), gradient.numpy()

        reached = []
        for _ in range(starts):
            identities = [np.zeros(s) if self.symmetric else np.eye(*s) if len(s) == 2 else np.ones(s) for s in shapes]
            if near is None:
                head = generator.normal(size=p)
            else:
                identities = [factor.numpy() for factor in near[1]]
                head = near[0].numpy()[:p] + spread * generator.normal(size=p)
            parts = [head] + [(one + spread * generator.normal(size=one.shape)).ravel() for one in identities]
            x, before = np.concatenate(parts), math.inf
            for _ in range(4):  # restarts drop a stale curvature estimate
                found = minimize(
                    value, x, jac=True, method="L-BFGS-B",
                    options={"maxiter": 6000, "maxfun": 12000, "ftol": 1e-13, "gtol": 1e-11, "maxcor": 30},
                )  # fmt: skip
                x = found.x
                if before - found.fun <= 1e-11 * abs(found.fun):  # the restart changed nothing
                    break
                before = found.fun
            reached.append(float(found.fun) if len(x) else value(x)[0])
        return reached


def minimize_equivalent(
    problem: Problem, penalty: Callable[[Tensor], tuple[float, Tensor]], *, seed: int = 0, starts: int = 2
) -> list[float]:
    """(E) with its constraint eliminated: β = particular + N w, N a basis of the null space of φ; L-BFGS in w.

    ``penalty`` gives Ω̃ and its gradient at β as a vector.
    """
    rows, r = problem.rows.numpy(), problem.r.flatten().numpy()
    particular = np.linalg.lstsq(rows, r, rcond=None)[0]
    null = np.linalg.svd(rows)[2][np.linalg.matrix_rank(rows) :].T
    generator = np.random.default_rng(seed)

    def value(w: np.ndarray) -> tuple[float, np.ndarray]:
        cost, gradient = penalty(torch.from_numpy(particular + null @ w))
        return cost, null.T @ gradient.numpy()

    options = {"maxiter": 6000, "maxfun": 12000, "ftol": 1e-16, "gtol": 1e-11}
    reached = []
    for _ in range(starts):
        w = generator.normal(size=null.shape[1])
        for _ in range(3):
            found = minimize(value, w, jac=True, method="L-BFGS-B", options=options)
            w = found.x
        reached.append(float(found.fun))
    return reached


def bisected_gain(strength: float, v: np.ndarray, power: float = 3.0) -> np.ndarray:
    """The root z ≥ 1 of λ(z − 1)z^power = v², by bisection."""
    low, high = np.ones_like(v), np.full_like(v, 2.0)
    while (strength * (high - 1) * high**power < v**2).any():
        high = high * 2
    for _ in range(200):
        middle = (low + high) / 2
        if ((middle == low) | (middle == high)).all():
            break
        below = strength * (middle - 1) * middle**power < v**2
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def spectral_quadratic(problem: Problem, strength: float) -> Callable[[Tensor], tuple[float, Tensor]]:
    """Ω̃(β) = Σ over blocks and singular values of λ(z − 1)² + σ²/z², one side with ω = λ(z − 1)²."""

    def penalty(beta: Tensor) -> tuple[float, Tensor]:
        total, gradients = 0.0, []
        for matrix in problem.split(beta).values():
            u, s, vt = np.linalg.svd(matrix.numpy(), full_matrices=False)
            z = bisected_gain(strength, s)
            total += float((strength * (z - 1) ** 2 + (s / z) ** 2).sum())
            gradients.append(((u * (2 * s / z**2)) @ vt).ravel())
        return total, torch.from_numpy(np.concatenate(gradients))

    return penalty


# ----------------------------------------------------------------------------------------------------- kernel measures


def center(kernel: np.ndarray) -> np.ndarray:
    """HKH with H = I − 11ᵀ/n written out; for (n, c, n, c), for each pair of outputs."""
    n = kernel.shape[0]
    h = np.eye(n) - np.ones((n, n)) / n
    if kernel.ndim == 2:
        return h @ kernel @ h
    out = np.empty_like(kernel)
    for a, b in itertools.product(range(kernel.shape[1]), range(kernel.shape[3])):
        out[:, a, :, b] = h @ kernel[:, a, :, b] @ h
    return out


def target_kernel(y: np.ndarray, *, full: bool) -> np.ndarray:
    """K_y by loops: y_{ka} y_{lb} for a full kernel, Σ_a y_{ka} y_{la} for one summed over outputs."""
    y = y[:, None] if y.ndim == 1 else y
    n, c = y.shape
    out = np.zeros((n, c, n, c)) if full else np.zeros((n, n))
    for k, l, a in itertools.product(range(n), range(n), range(c)):
        if full:
            for b in range(c):
                out[k, a, l, b] = y[k, a] * y[l, b]
        else:
            out[k, l] += y[k, a] * y[l, a]
    return out


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.vdot(a, b) / math.sqrt(np.vdot(a, a) * np.vdot(b, b)))


def unbiased_hsic(a: np.ndarray, b: np.ndarray) -> float:
    """The U-statistic as a mean over quadruples of distinct samples: E[K_ij L_ij + K_ij L_qr − 2 K_ij L_iq]."""
    n, total, count = len(a), 0.0, 0
    for i, j, q, r in itertools.permutations(range(n), 4):
        total += a[i, j] * (b[i, j] + b[q, r] - 2 * b[i, q])
        count += 1
    return total / count


def unbiased_cka(a: np.ndarray, b: np.ndarray) -> float:
    return unbiased_hsic(a, b) / math.sqrt(unbiased_hsic(a, a) * unbiased_hsic(b, b))


# ------------------------------------------------------------------------------------------------- structured change


def best_left(before: np.ndarray, after: np.ndarray, ridge: float = 0.0) -> np.ndarray:
    """M_L by dense least squares, one equation for every sample, output, row and column; features (n, c, o, i)."""
    o = before.shape[2]
    design = np.moveaxis(before, 2, -1).reshape(-1, o)
    wanted = np.moveaxis(after, 2, -1).reshape(-1, o)
    design = np.concatenate([design, math.sqrt(ridge) * np.eye(o)])
    wanted = np.concatenate([wanted, math.sqrt(ridge) * np.eye(o)])
    return np.linalg.lstsq(design, wanted, rcond=None)[0].T


def best_right(before: np.ndarray, after: np.ndarray, ridge: float = 0.0) -> np.ndarray:
    """M_R by dense least squares."""
    return best_left(np.swapaxes(before, 2, 3), np.swapaxes(after, 2, 3), ridge)


def best_full(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The p × p matrix of least ‖M − I‖ among those with the least squares; features (N, p)."""
    return np.eye(before.shape[1]) + (np.linalg.pinv(before) @ (after - before)).T


def r2(before: np.ndarray, after: np.ndarray, moved: np.ndarray) -> float:
    return 1 - float(((after - moved) ** 2).sum() / ((after - before) ** 2).sum())
