"""The second-order solver, its linear systems and cross-entropy, against the joint problem and each other."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import adaptive_tangents as at
from adaptive_tangents.linalg.cholesky import partial_cholesky
from adaptive_tangents.linalg.conjugate_gradients import conjugate_gradients
from adaptive_tangents.linalg.kernel_systems import DenseKernel, KernelSystem, PivotedKernel, RoundedKernel
from adaptive_tangents.solvers import certificates, newton
from adaptive_tangents.solvers.feature_systems import FeatureProducts, PrimalKernel
from adaptive_tangents.solvers.fit import check_choice
from adaptive_tangents.solvers.losses import CrossEntropy, SquaredError
from adaptive_tangents.solvers.problem import Point, Problem
from draws import examples
from theory_reference import Problem as Case
from theory_reference import problem

few = examples(8)
seeds = st.integers(0, 10_000)
SHAPES = ((6, 5, 2), (5, 6, 1), (3, 1, 0))
STRUCTURES: dict[str, at.structures.Structure] = {
    "Left": at.Left(at.Quadratic(0.1)),
    "TwoSided": at.TwoSided(at.Quadratic(0.1), at.Quadratic(0.3)),
    "Absolute": at.TwoSided(at.Absolute(0.3)),
    "Diagonal": at.Diagonal(at.Quadratic(0.05)),
    "Full": at.Full(at.Quadratic(0.2)),
    "LayerScale": at.LayerScale(at.penalties.LogSquared(0.1)),
}


def labels_of(case: Case, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labels and offsets for features of a case."""
    generator = torch.Generator().manual_seed(seed)
    classes = max(case.feats.c, 2)
    labels = torch.randint(0, classes, (case.feats.n,), generator=generator)
    return labels, torch.randn(case.feats.n, case.feats.c, dtype=torch.float64, generator=generator)


def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of cross-entropies, computed directly; a single output is the logit of label 1 against 0."""
    logits = torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits
    return -(logits.log_softmax(1).gather(1, labels[:, None])).sum()


# ------------------------------------------------------------------------------------------------------ the optimum


@pytest.mark.parametrize(
    ("name", "ridge"), [*zip(STRUCTURES, itertools.cycle((0.0, 0.3)), strict=False), ("TwoSided", 0.0)]
)
def test_all_solvers_and_forms_reach_the_same_optimum(name: str, ridge: float) -> None:
    case = problem(11, n=5, c=2, shapes=((4, 3, 2), (3, 4, 1), (3, 1, 0)), scale=4.0)
    fits = [
        at.fit(case.feats, case.r, structure=STRUCTURES[name], ridge=ridge, tol=1e-11, max_rounds=5000, **options)
        for options in ({}, {"solver": "anderson"}, {"form": "matrix-free"})
    ]
    assert [found.form for found in fits] == ["dense", "dense", "matrix-free"]
    for found in fits:
        assert found.converged
        assert found.objective == pytest.approx(fits[0].objective, rel=1e-8)
        torch.testing.assert_close(found.predict(case.feats), fits[0].predict(case.feats), rtol=1e-4, atol=1e-4)
        if ridge == 0:
            assert found.feasibility < 1e-9


def test_the_primal_form_is_taken_where_parameters_are_fewer_than_outputs_and_agrees() -> None:
    case = problem(3, n=12, c=2, shapes=((3, 2, 1), (2, 2, 1)), scale=3.0)
    options = {"structure": at.TwoSided(at.Quadratic(0.1)), "ridge": 0.2, "tol": 1e-12}
    primal = at.fit(case.feats, case.r, **options)
    dense = at.fit(case.feats, case.r, form="dense", **options)
    assert primal.form == "primal"
    assert primal.objective == pytest.approx(dense.objective, rel=1e-10)
    torch.testing.assert_close(primal.dual, dense.dual, rtol=1e-5, atol=1e-6)
    labels, offset = labels_of(case)
    fits = [
        at.fit(case.feats, labels, loss="cross-entropy", offset=offset, form=form, **options)
        for form in ("primal", "dense", "matrix-free")
    ]
    for found in fits:
        assert found.objective == pytest.approx(fits[1].objective, rel=1e-9)


@pytest.mark.slow
def test_newton_needs_few_kernel_solves_where_the_alternation_takes_hundreds() -> None:
    """8 samples, 2 outputs, a 6-9-7-2 network, ‖r‖ = 16: the plain alternation takes hundreds of rounds here."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2)]
    feats = at.tangent_features(torch.nn.Sequential(*layers).double(), torch.randn(8, 6, dtype=torch.float64))
    r = torch.randn(8, 2, dtype=torch.float64)
    r *= 16 / r.norm()
    cases: list[tuple[at.structures.Structure, float]] = [
        (at.TwoSided(at.Quadratic(1.0)), 0.1),
        (at.TwoSided(at.Quadratic(0.01)), 0.0),
    ]
    # The curvature jumps here, so the last digits of stationarity are the hardest.
    cases += [(at.TwoSided(at.Absolute(0.05)), 0.0), (at.Left(at.Quadratic(0.05)), 0.0)]
    for chosen, ridge in cases:
        found = at.fit(feats, r, structure=chosen, ridge=ridge, tol=1e-12)
        assert found.converged
        assert found.stationarity <= 1e-6
        assert found.rounds <= 60
    with pytest.warns(at.TangentWarning, match="stopped after 200 rounds"):
        plain = at.fit(
            feats, r, structure=at.TwoSided(at.Quadratic(1.0)), solver="alternation", tol=1e-12, max_rounds=200
        )
    assert not plain.converged


def test_a_fit_leaves_a_saddle_in_a_few_steps() -> None:
    """Along directions without a minimum a step continues while the objective falls: 16 steps instead of 79."""
    torch.manual_seed(1)
    layers = [torch.nn.Linear(16, 512), torch.nn.Tanh(), torch.nn.Linear(512, 512), torch.nn.Tanh()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(512, 1))
    feats = at.tangent_features(model, torch.randn(12, 16))
    found = at.fit(feats, 3 * torch.randn(12, 1), structure=at.TwoSided(at.Quadratic(0.1)))
    assert found.converged
    assert len(found.history) <= 35
    for before, after in itertools.pairwise(found.history):
        assert after.objective <= before.objective * (1 + 1e-12)


@few
@given(seed=seeds, name=st.sampled_from(sorted(STRUCTURES)), ridge=st.sampled_from([0.0, 0.01, 1.0]))
def test_the_objective_never_rises_while_adaptation_sets_in(seed: int, name: str, ridge: float) -> None:
    case = problem(seed, c=2, scale=10.0)
    found = at.fit(case.feats, case.r, structure=STRUCTURES[name], ridge=ridge)
    objectives = [entry.objective for entry in found.history]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(objectives))
    tempers = [entry.temper for entry in found.history]
    assert tempers == sorted(tempers, reverse=True)
    assert tempers[0] == math.inf
    assert tempers[-1] == 1


def test_a_fit_may_start_from_another_and_needs_fewer_steps() -> None:
    case = problem(11, n=8, c=2, shapes=SHAPES, scale=4.0)
    first = at.fit(case.feats, case.r, structure=at.TwoSided(at.Quadratic(0.11)), tol=1e-12)
    cold, warm = (
        at.fit(case.feats, case.r, structure=at.TwoSided(at.Quadratic(0.1)), tol=1e-12, start=start)
        for start in (None, first)
    )
    assert warm.objective == pytest.approx(cold.objective, rel=1e-10)
    assert len(warm.history) < len(cold.history)


@pytest.mark.parametrize("name", STRUCTURES)
def test_tempering_is_the_structure_at_smaller_coefficients(name: str) -> None:
    """min over M of ‖M⁻ᵀβ‖² + τΩ(M) = τΩ̃(β/√τ): for these penalties, that of strength τλ."""
    case = problem(4, c=2, shapes=SHAPES, scale=2.0)
    beta = {k: torch.randn(b.shape, dtype=torch.float64) for k, b in case.feats.blocks.items()}
    scaled = {
        "Left": at.Left(at.Quadratic(0.7)),
        "TwoSided": at.TwoSided(at.Quadratic(0.7), at.Quadratic(2.1)),
        "Absolute": at.TwoSided(at.Absolute(2.1)),
        "Diagonal": at.Diagonal(at.Quadratic(0.35)),
        "Full": at.Full(at.Quadratic(1.4)),
        "LayerScale": at.LayerScale(at.penalties.LogSquared(0.7)),
    }
    tempered = Problem(case.feats, STRUCTURES[name], SquaredError(case.r.flatten(), 1.0), "dense", 1, temper=7.0)
    found, expected = tempered.solution(beta), scaled[name].solution(beta)
    assert found.penalty == pytest.approx(expected.penalty, rel=1e-10)
    x = {k: torch.randn_like(matrix) for k, matrix in beta.items()}
    for one, other in ((found.gradient, expected.gradient), (found.curvature(x), expected.curvature(x))):
        for k in beta:
            torch.testing.assert_close(one[k], other[k], rtol=1e-7, atol=1e-9)


# --------------------------------------------------------------------------------------------------- cross-entropy


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("name", ["Fixed", "Left", "TwoSided"])
def test_cross_entropy_reaches_the_minimum_of_the_joint_problem(name: str, c: int) -> None:
    """L-BFGS on θ and M of f = offset + φMᵀθ, from M = I and a small random θ, finds nothing lower."""
    case = problem(5, n=4, c=c, shapes=((3, 2, 1), (2, 3, 1)))
    labels, offset = labels_of(case)
    ridge, strength = 0.05, 0.2
    chosen = {
        "Fixed": at.Fixed(),
        "Left": at.Left(at.Quadratic(strength)),
        "TwoSided": at.TwoSided(at.Quadratic(strength)),
    }
    found = at.fit(
        case.feats, labels, structure=chosen[name], loss="cross-entropy", offset=offset, ridge=ridge, tol=1e-12
    )
    assert found.converged
    generator = torch.Generator().manual_seed(1)
    thetas = [0.3 * torch.randn(b.shape, dtype=torch.float64, generator=generator) for b in case.feats.blocks.values()]
    lefts, rights = (
        [
            0.1 * torch.randn(b.shape[k], b.shape[k], dtype=torch.float64, generator=generator)
            for b in case.feats.blocks.values()
        ]
        if name != "Fixed" and (k == 0 or name == "TwoSided")
        else [torch.zeros(b.shape[k], b.shape[k], dtype=torch.float64) for b in case.feats.blocks.values()]
        for k in (0, 1)
    )
    free = thetas + (lefts if name != "Fixed" else []) + (rights if name == "TwoSided" else [])
    for tensor in free:
        tensor.requires_grad_()

    def value() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        logits = offset
        for theta, left, right, phi in zip(thetas, lefts, rights, case.phi.values(), strict=True):
            # M_L = I + LLᵀ is any symmetric matrix with singular values of 1 and more.
            a, b = torch.eye(len(left)) + left @ left.mT, torch.eye(len(right)) + right @ right.mT
            logits = logits + torch.einsum("ncoi,oi->nc", phi, a @ theta @ b)
            moved = ((a - torch.eye(len(a))) ** 2).sum() + ((b - torch.eye(len(b))) ** 2).sum()
            total = total + (theta**2).sum() + strength * moved
        return total + entropy(logits, labels) / ridge

    optimizer = torch.optim.LBFGS(
        free,
        max_iter=4000,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = value()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(value().detach()) == pytest.approx(found.objective, rel=1e-7)


@few
@given(seed=seeds, c=st.sampled_from([1, 2, 4]), ridge=st.floats(-3, 1).map(lambda x: 10.0**x))
def test_the_bound_of_cross_entropy_is_below_its_objective_and_meets_it(seed: int, c: int, ridge: float) -> None:
    case = problem(seed, n=5, c=c, scale=2.0)
    labels, offset = labels_of(case, seed)
    found = at.fit(
        case.feats,
        labels,
        structure=at.Left(at.Quadratic(0.1)),
        loss="cross-entropy",
        offset=offset,
        ridge=ridge,
        tol=1e-10,
    )
    assert found.lower_bound <= found.objective * (1 + 1e-10)
    assert found.gap < 1e-6
    assert found.feasibility is None
    p = (offset + found.predict(case.feats)).softmax(1) if c > 1 else (offset + found.predict(case.feats)).sigmoid()
    goal = functional.one_hot(labels, c) if c > 1 else labels[:, None]
    torch.testing.assert_close(2 * ridge * found.dual, goal - p, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("c", [1, 3])
def test_slope_and_root_of_cross_entropy_are_its_derivatives(c: int) -> None:
    case = problem(2, n=4, c=c)
    labels, offset = labels_of(case)
    loss = CrossEntropy(labels, offset, 0.3)
    at_point = torch.randn(4 * c, dtype=torch.float64, requires_grad=True)
    value = entropy(offset + at_point.reshape(4, c), labels) / 0.3
    assert loss.value(at_point.detach()) == pytest.approx(float(value.detach()), rel=1e-12)
    (slope,) = torch.autograd.grad(value, at_point)
    torch.testing.assert_close(loss.slope(at_point.detach()), slope)
    root = loss.root(at_point.detach())
    hessian = torch.autograd.functional.hessian(
        lambda f: entropy(offset + f.reshape(4, c), labels) / 0.3, at_point.detach()
    )
    torch.testing.assert_close(torch.block_diag(*(root @ root.mT)), hessian, rtol=1e-9, atol=1e-12)


def test_cross_entropy_refuses_what_it_cannot_fit() -> None:
    case = problem(1, n=4, c=3)
    labels, offset = labels_of(case)
    ask = {"loss": "cross-entropy", "ridge": 0.1}
    with pytest.raises(at.TangentError, match=r"fit: cross-entropy needs offset = f\(x;θ₀\)"):
        at.fit(case.feats, labels, **ask)
    with pytest.raises(at.TangentError, match=r"fit: offset has shape \(4, 2\), features are of n = 4 samples, c = 3"):
        at.fit(case.feats, labels, offset=offset[:, :2], **ask)
    with pytest.raises(at.TangentError, match=r"takes n = 4 integer labels, got torch.float32 of shape \(4,\)"):
        at.fit(case.feats, labels.float(), offset=offset, **ask)
    for wrong in (-1, 3):
        bad = labels.clone()
        bad[2] = wrong
        with pytest.raises(at.TangentError, match=rf"fit: labels are 0\.\.2, sample 2 has {wrong}"):
            at.fit(case.feats, bad, offset=offset, **ask)
    for ridge in (0.0, -1.0, math.inf):
        with pytest.raises(at.TangentError, match=r"positive, finite ridge ρ, got .* separate have no optimum"):
            at.fit(case.feats, labels, loss="cross-entropy", offset=offset, ridge=ridge)
    with pytest.raises(at.TangentError, match="offset is for cross-entropy"):
        at.fit(case.feats, case.r, offset=offset)
    with pytest.raises(at.TangentError, match=r"fit: solver is one of newton, anderson, got 'none'"):
        check_choice("fit", "solver", "none", ("newton", "anderson"))
    with pytest.raises(at.TangentError, match="the primal form needs a ridge"):
        at.fit(case.feats, case.r, form="primal")
    with pytest.raises(at.TangentError, match="fit: start was fitted to blocks"):
        at.fit(case.feats, case.r, start=at.fit(problem(1, shapes=((2, 2, 1),)).feats, torch.ones(4)))


# ------------------------------------------------------------------------------------------------- linear systems


@pytest.mark.parametrize("kind", ["dense", "primal", "sketched", "rounded"])
def test_every_form_inverts_the_same_systems(kind: str) -> None:
    case = problem(6, n=5, c=2, shapes=SHAPES)
    kernel: KernelSystem = {
        "dense": lambda: DenseKernel(case.feats.kernel().flatten(2).flatten(0, 1)),
        "primal": lambda: PrimalKernel(case.feats),
        "sketched": lambda: PivotedKernel(FeatureProducts(case.feats), 4),
        "rounded": lambda: RoundedKernel(FeatureProducts(case.feats)),
    }[kind]()
    exact = case.rows @ case.rows.mT
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(kernel.apply(x), exact @ x)
    shifted = exact + 0.2 * torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(kernel.shifted(0.2)(x), torch.linalg.solve(shifted, x), rtol=1e-8, atol=1e-10)
    root = torch.randn(5, 2, 2, dtype=torch.float64, generator=generator)
    whole = torch.block_diag(*root)
    rooted = torch.eye(10, dtype=torch.float64) + whole.mT @ exact @ whole / 2
    torch.testing.assert_close(kernel.rooted(root)(x), torch.linalg.solve(rooted, x), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("threads", [1, 2])
def test_rounding_of_outputs_tracked_through_the_steps_does_not_end_a_fit(threads: int) -> None:
    # With two threads, whose sums round differently, the objective stopped falling at 7e-6.
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = [
                nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 15), nn.Tanh(), nn.Linear(15, 1)
            ]  # fmt: skip
            feats = at.tangent_features(nn.Sequential(*layers).double(), torch.randn(100, 20, dtype=torch.float64))
            r = torch.randn(100, 1, dtype=torch.float64)
        found = at.fit(feats, 40 * r / r.norm(), structure=at.Rows(at.Quadratic(0.01)), ridge=0.1, tol=1e-12)
    finally:
        torch.set_num_threads(before)
    assert found.converged, found.reason


def stationarity_of(fit: at.Fit) -> float:
    """‖∇Ω̃(β) − 2φᵀα‖/‖2φᵀα‖ with α = (r − φβ)/ρ, all from the coefficients."""
    assert fit.targets is not None
    blocks = fit.features.to(torch.float64).blocks
    phi = torch.cat([block.features().reshape(fit.targets.numel(), -1) for block in blocks.values()], 1)
    beta = torch.cat([fit.coefficients[name].reshape(-1) for name in blocks])
    found = fit.structure.solution({name: fit.coefficients[name] for name in blocks}).gradient
    generators = 2 * phi.mT @ (fit.targets.flatten() - phi @ beta) / fit.ridge
    gradient = torch.cat([found[name].reshape(-1) for name in blocks])
    return float((gradient - generators).norm() / generators.norm())


def dependent() -> tuple[at.TangentFeatures, Tensor]:
    """More outputs than parameters, so that directions of K₀ are far below a small ridge, and targets."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)]
        return at.tangent_features(nn.Sequential(*layers), torch.randn(30, 7)), torch.randn(30, 4)


@pytest.mark.filterwarnings("ignore::adaptive_tangents.TangentWarning")
def test_the_stationarity_told_is_that_of_the_coefficients_however_ill_conditioned_the_kernel_is() -> None:
    # With outputs carried along by the systems, 3e-6 was told of coefficients whose stationarity is 1.
    feats, r = dependent()
    for structure, ridge in ((at.Left(at.Absolute(0.1)), 1e-3), (at.TwoSided(at.Quadratic(1.0)), 1e-6)):
        found = at.fit(feats, r, structure=structure, ridge=ridge, max_rounds=40)
        assert found.stationarity == pytest.approx(stationarity_of(found), rel=1e-3)
        assert found.converged == (found.stationarity <= 1e-4)
        objectives = [entry.objective for entry in found.history]
        assert found.objective <= min(objectives) * (1 + 1e-9)  # the penalty of the last stages is the largest


@pytest.mark.filterwarnings("ignore::adaptive_tangents.TangentWarning")
@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("form", ["dense", "primal", "matrix-free"])
def test_no_structure_and_form_is_said_to_have_converged_where_its_coefficients_are_not_stationary(
    name: str, form: Any
) -> None:
    feats, r = dependent()
    found = at.fit(feats, r, structure=STRUCTURES[name], ridge=1e-2, form=form, max_rounds=30)
    true = stationarity_of(found)
    assert found.stationarity == pytest.approx(true, rel=1e-2, abs=1e-6)
    assert not found.converged or true <= 2e-4


@pytest.mark.parametrize("form", ["dense", "matrix-free"])
def test_a_fit_on_kernels_that_are_ill_conditioned_is_not_said_to_have_converged(form: str) -> None:
    feats, r = dependent()
    parts = {name: block.features().double().flatten(0, 1).flatten(1) for name, block in feats.blocks.items()}
    kernels = {name: (phi @ phi.mT).reshape(30, 4, 30, 4) for name, phi in parts.items()}
    structure = at.LayerScale(at.penalties.LogSquared(0.1))
    assert at.fit(kernels, r, structure=structure, ridge=0.1, form=form).stationarity <= 2e-4
    with pytest.warns(at.TangentWarning, match="did not converge"):
        found = at.fit(kernels, r, structure=structure, ridge=1e-3, form=form)
    assert not found.converged
    assert found.stationarity > 2e-4


def test_a_search_that_ends_at_other_outputs_than_its_coefficients_has_not_converged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = problem(6, n=7, c=2, shapes=SHAPES, scale=3.0)
    options: dict[str, Any] = {"structure": STRUCTURES["TwoSided"], "ridge": 0.1}
    assert at.fit(case.feats, case.r, **options).converged

    def wrong(problem: Problem, point: Point, step: Tensor) -> Callable[[float], Point]:
        outputs = 1.01 * problem.inner(step)
        return lambda length: problem.point(point.vector + length * step, point.outputs + length * outputs)

    monkeypatch.setattr(newton, "_mover", wrong)
    with pytest.warns(at.TangentWarning, match=r"rounding in it was too large: by its coefficients, .* larger ridge"):
        found = at.fit(case.feats, case.r, **options)
    assert not found.converged
    assert found.stationarity == pytest.approx(stationarity_of(found), rel=1e-6)


def test_constraints_missed_by_more_than_rounding_are_not_called_met(monkeypatch: pytest.MonkeyPatch) -> None:
    case = problem(6, n=7, c=2, shapes=SHAPES, scale=3.0)
    assert at.fit(case.feats, case.r, form="matrix-free").converged
    monkeypatch.setattr(certificates, "FEASIBLE", -1.0)  # no miss is small enough
    with pytest.warns(at.TangentWarning, match=r"the targets are missed by .* matrix-free form; use form='dense'"):
        found = at.fit(case.feats, case.r, form="matrix-free")
    assert not found.converged


def test_partial_cholesky_of_full_rank_is_the_kernel() -> None:
    case = problem(6, n=7, c=2, shapes=SHAPES)
    columns, left = partial_cholesky(FeatureProducts(case.feats), 14)
    exact = case.rows @ case.rows.mT
    torch.testing.assert_close(columns @ columns.mT, exact, rtol=1e-9, atol=1e-9)
    assert left < 1e-10
    some, more = partial_cholesky(FeatureProducts(problem(6, n=40, c=2, shapes=SHAPES).feats), 10)
    assert some.shape[1] < 80
    assert more > 0


def test_conjugate_gradients_solve_to_rounding_and_stop() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 40, dtype=torch.float64, generator=generator)
    matrix = rows @ rows.mT
    b = torch.randn(30, dtype=torch.float64, generator=generator)
    found = conjugate_gradients(lambda x: matrix @ x, b, lambda x: x / matrix.diagonal())
    torch.testing.assert_close(found, torch.linalg.solve(matrix, b), rtol=1e-7, atol=1e-9)
    assert not conjugate_gradients(lambda x: matrix @ x, 0 * b, lambda x: x).any()
