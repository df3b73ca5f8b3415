"""What a fit chooses by cost changes how it gets there, never where: products, scalar problems, systems and stages."""

import importlib
import itertools
import math
from typing import Literal

import pytest
import torch

import adaptive_tangents as at
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.linalg import kernel_systems
from adaptive_tangents.solvers import constraints, costs
from adaptive_tangents.solvers.held_features import HeldFeatures, held
from adaptive_tangents.solvers.losses import CrossEntropy
from adaptive_tangents.solvers.problem import Problem
from adaptive_tangents.structures.base import Solution
from adaptive_tangents.structures.inner import Inner, joint
from cases import CASES
from theory_reference import CURVED, problem

STRUCTURES = {name: make(at.Quadratic(0.3), at.Power(3.0, 0.5)) for name, make in CURVED.items()}
SOME = {case.name: case for case in CASES if not (case.output_fn or case.wrt or case.requires or case.tolerance)}
SOME = dict(list(SOME.items())[::6])


def digits_of(n: int = 12, c: int = 4) -> tuple[TangentFeatures, torch.Tensor, torch.Tensor]:
    """Features of a small convolutional network, targets and labels."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(36, 8), torch.nn.ReLU(), torch.nn.Linear(8, c))
    x = torch.randn(n, 1, 6, 6)
    return at.tangent_features(model, x), torch.randn(n, c), torch.randint(c, (n,))


def rooms(feats: TangentFeatures) -> list[HeldFeatures]:
    """The features held with all the room they could use, with a little, and with none."""
    return [held(feats, room) for room in (math.inf, 2 * 8 * feats.n * feats.c * 30, 0)]


# ------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("name", SOME)
def test_products_of_held_features_are_those_of_the_features(name: str) -> None:
    model, x = SOME[name].build()
    torch.manual_seed(0)
    feats = at.tangent_features(model, x).to(torch.float64)
    matrices = {k: torch.randn(b.shape, dtype=torch.float64) for k, b in feats.blocks.items()}
    weights = torch.randn(feats.n, feats.c, dtype=torch.float64)
    wanted = feats.combine(weights)
    for found in rooms(feats):
        torch.testing.assert_close(found.inner(found.layout.join(matrices)), feats.inner(matrices).flatten())
        combined = found.layout.split(found.combine(weights.flatten()))
        assert set(combined) == set(wanted)
        for k, matrix in wanted.items():
            torch.testing.assert_close(combined[k], matrix)


def test_a_matrix_takes_no_more_than_its_room_and_holds_what_gains_most() -> None:
    feats = digits_of()[0].to(torch.float64)
    whole, some, none = rooms(feats)
    assert whole.rows is not None
    assert none.rows is None
    assert set(none.rest) == set(feats.blocks)
    assert 2 * whole.rows.nbytes > 2 * 8 * feats.n * feats.c * 30
    assert some.rows is None or 2 * some.rows.nbytes <= 2 * 8 * feats.n * feats.c * 30
    assert whole.cost < none.cost


def test_the_form_leaves_the_matrix_the_memory_that_systems_do_not_take() -> None:
    module = importlib.import_module("adaptive_tangents.solvers.fit")
    feats, r, _ = digits_of()
    size = 8 * (feats.n * feats.c) ** 2
    tight = at.TangentFeatures(feats.n, feats.c, feats.blocks, feats.parameters, 6 * size + 100)
    assert module._form(tight, "auto", interpolates=False) == ("dense", None, 100)
    options = {"structure": at.Left(), "ridge": 0.1, "tol": 1e-12}
    free, held_back = at.fit(feats, r, **options), at.fit(feats, r, memory_limit=6 * size + 100, **options)
    assert held_back.form == "dense"
    assert held_back.objective == pytest.approx(free.objective, rel=1e-10)


# ------------------------------------------------------------------------------------------------ scalar problems


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("scaled", [False, True])
def test_blocks_solved_together_are_those_solved_one_by_one(name: str, scaled: bool) -> None:
    if name == "Full":
        return
    case = problem(3, shapes=((4, 3, 1), (3, 5, 1), (1, 4, 1)))
    made = type(STRUCTURES[name])(**(vars(STRUCTURES[name]) | {"scale_invariant": scaled})).prepared(case.feats)
    beta = {
        k: torch.randn(b.shape, dtype=torch.float64) * 10.0**j for j, (k, b) in enumerate(case.feats.blocks.items())
    }
    x = {k: torch.randn_like(matrix) for k, matrix in beta.items()}
    together = made.solution(beta)
    alone = [made.solution({k: matrix}) for k, matrix in beta.items()]
    assert together.penalty == pytest.approx(sum(part.penalty for part in alone), rel=1e-13)
    for part, k in zip(alone, beta, strict=True):
        torch.testing.assert_close(together.gradient[k], part.gradient[k], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(together.curvature(x)[k], part.curvature(x)[k], rtol=1e-10, atol=1e-11)


def test_a_structure_with_its_own_solution_is_asked_block_by_block() -> None:
    seen: list[torch.Tensor] = []

    class Watched(at.Left):
        def block_solution(self, matrix: torch.Tensor) -> at.structures.BlockSolution:
            seen.append(matrix)
            return super().block_solution(matrix)

    beta = {"a": torch.eye(2, dtype=torch.float64), "b": torch.ones(2, 3, dtype=torch.float64)}
    found: Solution = Watched().solution(beta)
    assert len(seen) == 2
    assert found.penalty == pytest.approx(at.Left().solution(beta).penalty, rel=1e-14)


@pytest.mark.parametrize(
    "penalties",
    [
        (at.Quadratic(0.5),),
        (at.Quadratic(0.2), at.Absolute(1.0)),
        (at.Quadratic(1.0).compose(at.penalties.LogSquared(2.0)),),
    ],
)
def test_the_bend_of_joint_values_is_the_induced_second_derivative(penalties: tuple[at.Penalty, ...]) -> None:
    values = [torch.tensor([0.0, 1e-9, 0.3]), torch.tensor([[2.0], [40.0]])]
    parts = joint(penalties, [part.double() for part in values])
    induced = penalties[0].compose(*penalties[1:]).induced()
    for part, given in zip(parts, values, strict=True):
        assert isinstance(part, Inner)
        torch.testing.assert_close(part.bend, induced.second_derivative(given.double()), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(2 / part.gains**2, part.slope)
        assert part.total == pytest.approx(float(induced.value(given.double()).sum()), rel=1e-12)


# --------------------------------------------------------------------------------------------------------- systems


def test_a_system_is_remade_sooner_the_cheaper_it_is() -> None:
    wide = problem(0, n=8, shapes=((200, 200, 1), (200, 200, 1))).feats
    deep = problem(0, n=60, c=10, shapes=((8, 72, 16),)).feats
    cheap, dear = (costs.patience(feats, "dense", held(feats, 0).cost) for feats in (wide, deep))
    assert cheap[0] == costs._LEAST
    assert dear[0] > cheap[0]
    for form in ("dense", "primal", "matrix-free"):
        assert min(costs.patience(deep, form, 1e6)) >= costs._LEAST


@pytest.mark.parametrize("patience", [(0, 0), (math.inf, math.inf), (2, math.inf)])
def test_however_long_systems_are_kept_the_optimum_is_the_same(
    patience: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    feats, r, labels = digits_of()
    tasks = [((feats, r), {}), ((feats, labels), {"loss": "cross-entropy", "offset": torch.zeros_like(r)})]
    for arguments, options in tasks:
        options = options | {"structure": at.Left(at.Quadratic(0.3)), "ridge": 0.05, "tol": 1e-12}
        expected = at.fit(*arguments, **options)
        with monkeypatch.context() as patched:
            patched.setattr(costs, "patience", lambda *_: (max(1, min(patience[0], 1000)), patience[1]))
            found = at.fit(*arguments, **options)
        assert found.converged
        assert found.objective == pytest.approx(expected.objective, rel=1e-10)
        assert found.lower_bound == pytest.approx(found.objective, rel=1e-6)


@pytest.mark.parametrize("form", ["dense", "matrix-free"])
def test_the_step_of_a_system_that_was_factorized_elsewhere_is_exact_for_its_own_curvature(form: str) -> None:
    """−φv follows from u alone, and ⟨w, v⟩ = ⟨Dv, v⟩ + ⟨L″φv, φv⟩ with the L″ that was factorized."""
    case = problem(7, n=5, c=3, shapes=((4, 3, 2), (3, 4, 1)))
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (5,), generator=generator)
    loss = CrossEntropy(labels, torch.zeros(5, 3, dtype=torch.float64), 0.1)
    made = Problem(case.feats, at.TwoSided(at.Quadratic(0.1)), loss, form, None)
    there = torch.randn(15, dtype=torch.float64, generator=generator)
    beta = torch.randn(made.zeros.shape, dtype=torch.float64, generator=generator)
    point = made.point(beta, made.inner(beta))
    system = made.system(point.solution.transforms, there)
    reduced = made.reduce(system, point.gradient, loss.slope(point.outputs))
    torch.testing.assert_close(reduced.outputs, made.inner(reduced.step), rtol=1e-8, atol=1e-9)
    whole = point.gradient + made.combine(loss.slope(point.outputs))
    assert reduced.size == pytest.approx(-float(whole @ reduced.step), rel=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 100.0])
def test_the_smallest_eigenvalue_of_a_medium_kernel_is_as_exact_whatever_the_ridge(
    ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = problem(3, c=2)
    expected = float(torch.linalg.eigvalsh(case.rows @ case.rows.mT)[0])
    monkeypatch.setattr(constraints, "_MEDIUM", 0)
    shifts: list[float] = []
    made = kernel_systems.factorize
    monkeypatch.setattr(kernel_systems, "factorize", lambda matrix, shift: shifts.append(shift) or made(matrix, shift))
    found = at.fit(case.feats, case.r, structure=at.Fixed(), ridge=ridge)
    assert shifts == ([0.0] if ridge == 0 else [0.0, ridge])  # inverse iteration with a large ridge would find no digit
    assert found.smallest_eigenvalue == pytest.approx(expected, rel=2e-6)


# ---------------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("solver", ["newton", "anderson"])
def test_a_watcher_hears_fractions_that_rise_to_one(solver: Literal["newton", "anderson"]) -> None:
    feats, r, _ = digits_of()
    heard: list[tuple[str, float]] = []
    found = at.fit(
        feats, r, structure=at.TwoSided(at.Quadratic(0.1)), ridge=0.1, solver=solver,
        watch=lambda stage, fraction: heard.append((stage, fraction)),
    )  # fmt: skip
    assert found.converged
    assert heard[-1] == ("τ = 1", 1.0)
    assert all(0 <= before[1] <= after[1] for before, after in itertools.pairwise(heard))
    if solver == "newton":
        assert len({stage for stage, _ in heard}) == len({entry.temper for entry in found.history}) - 1
