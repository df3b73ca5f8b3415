"""Systems made from the curvature: their inverse is the dense one, and the fits that use them end where others do."""

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptive_tangents as at
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.solvers import costs, curved_systems
from adaptive_tangents.solvers.curved_systems import curved_system
from adaptive_tangents.solvers.losses import CrossEntropy, Loss, SquaredError
from adaptive_tangents.solvers.newton import Direction, line_search
from adaptive_tangents.solvers.problem import Point, Problem, System
from adaptive_tangents.structures.spectral import SpectralCurvature

search = importlib.import_module("adaptive_tangents.solvers.search")
N, C = 6, 3
STRUCTURES = {"TwoSided": at.TwoSided(at.Quadratic(0.1), at.Quadratic(0.3)), "Left": at.Left(at.Quadratic(0.1))}
LOSSES = ("interpolation", "squared", "cross-entropy")


def network() -> tuple[TangentFeatures, Tensor, Tensor]:
    """Features with blocks wider than tall and taller than wide, held as columns and as factors; targets and labels."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(1, 3, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(3, 7, 1), torch.nn.MaxPool2d(2)]
    head = [torch.nn.Linear(28, 4), torch.nn.Tanh(), torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, C)]
    model = torch.nn.Sequential(*layers, torch.nn.Flatten(), *head)
    feats = at.tangent_features(model, torch.randn(N, 1, 4, 4))
    return feats.to(torch.float64), torch.randn(N, C, dtype=torch.float64), torch.randint(C, (N,))


@pytest.fixture(autouse=True)
def linear_blocks_as_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of this size would all be held as columns."""
    monkeypatch.setattr(costs, "dense_product", lambda block: math.inf if block.positions == 1 else 0.0)


def made(kind: str, structure: at.structures.Structure, seed: int = 0) -> tuple[Problem, Point, System]:
    """A problem, a point where some of Ω̃'s curvature is negative, and the system of the curvature there."""
    feats, r, labels = network()
    loss: Loss = SquaredError(r.flatten(), 0.0 if kind == "interpolation" else 0.05)
    if kind == "cross-entropy":
        loss = CrossEntropy(labels, torch.zeros_like(r), 0.05)
    problem = Problem(feats, structure, loss, "dense", None)
    plain = problem.first_system()
    problem.temper = 2.0
    torch.manual_seed(seed)
    beta = torch.randn_like(problem.zeros) * torch.logspace(-2, 0.5, len(problem.zeros), dtype=torch.float64)
    point = problem.point(beta, problem.inner(beta))
    found = curved_system(problem, point, plain.kernel)
    assert found is not None
    return problem, point, found


def dense(curvature: SpectralCurvature, matrix: Tensor) -> Tensor:
    """E₀ as a matrix, one eigenvector after the other, with eigenvalues from products with the curvature."""
    u, _, vt = torch.linalg.svd(matrix)
    slope = curvature.inner.slope
    k, adapted = len(slope), int((2 / slope >= curved_systems._LITTLE).sum())
    size = matrix.numel()
    found = torch.zeros(size, size, dtype=torch.float64)
    for i in range(len(u)):
        for j in range(len(vt)):
            one, pair = torch.outer(u[:, i], vt[j]), i < k and j < k and i != j
            x = (one + (1 if i < j else -1) * torch.outer(u[:, j], vt[i])) / math.sqrt(2) if pair else one
            eigenvalue = float((x * curvature(x)).sum())
            torch.testing.assert_close(curvature(x), eigenvalue * x, rtol=1e-7, atol=1e-9)
            least = min(float(slope[at]) for at in (i, j) if at < k)
            e = max(abs(eigenvalue), curved_systems._LEAST * least) if i < k and j < k else eigenvalue
            little = 2 / e < curved_systems._LITTLE or min(i, j) >= adapted
            found += (2.0 if little else e) * torch.outer(x.flatten(), x.flatten())
    return found


def metric_of(problem: Problem, point: Point) -> Tensor:
    """E₀ of all blocks."""
    curvatures = curved_systems._curvatures(point.solution)
    assert curvatures is not None
    return torch.block_diag(*[dense(curvatures[k], point.coefficients[k]) for k in problem.held.layout.shapes])


# ---------------------------------------------------------------------------------------------------- the inverse


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_metric_is_twice_the_inverse_of_the_curvature_made_positive(name: str) -> None:
    problem, point, system = made("squared", STRUCTURES[name])
    shapes = problem.held.layout.shapes.values()
    assert any(o > i for o, i in shapes)
    assert any(o < i for o, i in shapes)
    assert problem.held.rows is not None
    assert {o > i for o, i in (problem.held.layout.shapes[name] for name in problem.held.rest)} == {True, False}
    metric = metric_of(problem, point)
    x = torch.randn_like(point.vector)
    torch.testing.assert_close(metric @ system.square(x), 2 * x, rtol=1e-9, atol=1e-9)
    assert float(torch.linalg.eigvalsh(metric)[0]) > 0
    curvatures = curved_systems._curvatures(point.solution)
    assert curvatures is not None
    if name == "TwoSided":  # its penalty is not convex: somewhere the sign was changed
        assert min(float(part.multipliers[0].min()) for part in curvatures.values()) < 0


@pytest.mark.parametrize(("kind", "samples"), [*((kind, N) for kind in LOSSES), ("squared", 1), ("squared", 4)])
def test_the_step_of_a_system_of_the_curvature_is_that_of_its_dense_inverse(
    kind: str, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its kernel is made for a few samples at a time."""
    monkeypatch.setattr(curved_systems, "_BUFFER", samples * 8 * N * C * 6)
    problem, point, system = made(kind, STRUCTURES["TwoSided"])
    rows = torch.stack([problem.combine(unit) for unit in torch.eye(N * C, dtype=torch.float64)])
    metric, slope = metric_of(problem, point), problem.loss.slope(point.outputs)
    reduced = problem.reduce(system, point.gradient, slope)
    w = point.gradient + rows.mT @ slope
    if kind == "interpolation":
        zeros = torch.zeros(N * C, N * C, dtype=torch.float64)
        whole = torch.cat([torch.cat([metric, rows.mT], 1), torch.cat([rows, zeros], 1)])
        v = torch.linalg.solve(whole, torch.cat([w, zeros[0]]))[: len(w)]
    else:
        root = problem.loss.root(point.outputs)
        bent = torch.eye(N * C, dtype=torch.float64) * 2 / problem.loss.ridge
        bent = bent if root is None else torch.block_diag(*(root @ root.mT))
        v = torch.linalg.solve(metric + rows.mT @ bent @ rows, w)
    torch.testing.assert_close(reduced.step, -v, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(reduced.outputs, -rows @ v, rtol=1e-6, atol=1e-8)
    assert reduced.size == pytest.approx(float(w @ v), rel=1e-8)


@pytest.mark.parametrize("kind", ["interpolation", "cross-entropy"])
def test_a_step_that_is_too_long_is_shortened_until_it_lowers_the_objective(kind: str) -> None:
    """A held transform's metric bounds Ω̃ from above, so that a whole step lowers it; the curvature at a point does not."""
    longer = 0
    for seed in range(19, 25):
        problem, point, system = made(kind, STRUCTURES["TwoSided"], seed)
        if kind == "interpolation":
            vector, outputs = problem.restored(system, point.vector, point.outputs)
            point = problem.point(vector, outputs)
        plain = problem.reduce(system, point.gradient, problem.loss.slope(point.outputs))
        whole = problem.point(point.vector + plain.step, point.outputs + plain.outputs)
        longer += whole.objective > point.objective
        uphill = Direction(-plain.step, 1)
        found, _ = line_search(problem, point, uphill, plain)
        assert point.objective - found.objective > 0.01 * min(plain.size, point.objective)
    assert longer


# ------------------------------------------------------------------------------------------------------- the fits


def fitted(kind: str, structure: at.structures.Structure) -> at.Fit:
    feats, r, labels = network()
    options: dict[str, Any] = {"structure": structure, "tol": 1e-12, "ridge": 0.0 if kind == "interpolation" else 0.05}
    if kind == "cross-entropy":
        return at.fit(feats, labels, loss="cross-entropy", offset=torch.zeros_like(r), **options)
    return at.fit(feats, r, **options)


@pytest.mark.parametrize(("name", "kind"), [*(("TwoSided", kind) for kind in LOSSES), ("Left", "squared")])
def test_a_fit_ends_at_the_same_optimum_with_and_without_the_curvature(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_systems: list[System | None] = []
    original = curved_system

    def watched(*arguments: Any) -> System | None:
        made_systems.append(original(*arguments))
        return made_systems[-1]

    monkeypatch.setattr(search, "curved_system", watched)
    monkeypatch.setattr(costs, "curved", lambda *_: True)
    monkeypatch.setattr(costs, "patience", lambda *_: (4.0, 4.0))
    found = fitted(kind, STRUCTURES[name])
    assert any(system is not None for system in made_systems)
    count = len(made_systems)
    monkeypatch.setattr(costs, "curved", lambda *_: False)
    expected = fitted(kind, STRUCTURES[name])
    assert len(made_systems) == count
    assert found.converged
    assert expected.converged
    assert found.objective == pytest.approx(expected.objective, rel=1e-9)
    assert found.stationarity < 1e-6
    for a, b in zip(found.history[1:], found.history[2:], strict=False):
        assert b.objective <= a.objective * (1 + 1e-12)
    assert sum(entry.products for entry in found.history) < sum(entry.products for entry in expected.history)
    if found.lower_bound is not None:
        assert found.lower_bound == pytest.approx(found.objective, rel=1e-6)


def test_a_fit_that_has_converged_makes_no_last_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "curved", lambda *_: True)
    monkeypatch.setattr(costs, "patience", lambda *_: (1.0, 1.0))  # every system is stale after two products
    found = fitted("squared", STRUCTURES["TwoSided"])
    assert found.converged
    assert not found.history[-1].solved
    steps = [entry for entry in found.history[1:] if entry.products]
    assert any(entry.solved for entry in steps)


# ------------------------------------------------------------------------------------------------------ the choice


def test_the_curvature_is_used_where_a_dense_kernel_has_few_coefficients() -> None:
    feats, r, _ = network()
    wide = torch.nn.Sequential(torch.nn.Linear(80, 90), torch.nn.ReLU(), torch.nn.Linear(90, 1))
    large = at.tangent_features(wide, torch.randn(90, 80)).to(torch.float64)
    for features, form, room, used in (
        (feats, "dense", math.inf, True),
        (feats, "matrix-free", math.inf, False),
        (feats, "dense", 1000.0, False),
        (large, "dense", math.inf, False),
    ):
        target = SquaredError(torch.zeros(features.n * features.c, dtype=torch.float64), 0.1)
        problem = Problem(features, STRUCTURES["TwoSided"], target, form, None, room)
        assert curved_systems.serves(problem, problem.point(problem.zeros, target.targets).solution) == used
    loss, structures = SquaredError(r.flatten(), 0.1), {**STRUCTURES, "Rows": at.Rows(at.Quadratic(0.1))}
    for name, structure in structures.items():
        problem = Problem(feats, structure, loss, "dense", None)
        point = problem.point(torch.randn_like(problem.zeros), r.flatten())
        assert curved_systems.serves(problem, point.solution) == (name != "Rows")
    mixed = at.Mixed({"*": at.TwoSided(at.Quadratic(0.1))})
    problem = Problem(feats, mixed, loss, "dense", None)
    assert curved_systems.serves(problem, problem.point(problem.zeros, r.flatten()).solution)


def test_where_nothing_adapts_the_system_is_the_one_of_the_plain_kernel() -> None:
    feats, r, _ = network()
    problem = Problem(feats, at.TwoSided(at.Quadratic(1e6)), SquaredError(r.flatten(), 0.1), "dense", None)
    plain = problem.first_system()
    point = problem.point(torch.randn_like(problem.zeros), r.flatten())
    system = curved_system(problem, point, plain.kernel)
    assert system is not None
    x = torch.randn_like(r.flatten())
    torch.testing.assert_close(system.kernel.apply(x), plain.kernel.apply(x))
