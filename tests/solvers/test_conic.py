"""Fits of convex structures against the same convex programs solved by an interior-point conic solver.

Nothing here uses the library's penalties or its alternation. With ω = λ(z − 1)² the penalty on coefficients has conic forms:

- spectral, one side: Ω̃(B) = min over Z ⪰ 0, S, T of λd − 2 tr S + tr Z + tr T subject to
  [[λI, S], [Sᵀ, Z]] ⪰ 0 and [[Z, √λB], [√λBᵀ, T]] ⪰ 0. At the optimum Z = λMᵀM, S = λM, T = B ᵀ(MᵀM)⁻¹B;
- its conjugate: λ tr((I − GᵀG/4λ)⁻¹ − I) is the least λ tr(W − I) with
  [[W, I, 0], [I, I, Gᵀ/2√λ], [0, G/2√λ, I]] ⪰ 0, by two Schur complements;
- one factor: λ(u − 2√u + 1) + ‖B‖²/u with u = z².
"""

import functools
import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch

import adaptive_tangents as at
from theory_reference import Problem, problem

SOLVER = {"solver": cp.CLARABEL, "tol_gap_abs": 1e-13, "tol_gap_rel": 1e-13, "tol_feas": 1e-13}
STRUCTURES = {"Left": at.Left, "Right": at.Right, "LayerScale": at.LayerScale, "Full": at.Full}
PROBLEMS = {
    "one output": problem(1, n=8, shapes=((4, 5, 2), (3, 4, 1)), scale=3.0),
    "two outputs": problem(2, n=6, c=2, shapes=((4, 5, 3), (5, 3, 0)), scale=3.0),
    "one block": problem(3, n=10, shapes=((5, 4, 2),), scale=5.0),
}
every_problem = pytest.mark.parametrize("named", PROBLEMS)
interpolating_and_with_ridge = pytest.mark.parametrize(("ridge", "strength"), [(0.0, 1.0), (0.2, 0.05)])


def solve(program: cp.Problem) -> float:
    with warnings.catch_warnings():
        # It warns if rounding stopped it before 1e-13; the result is compared below.
        warnings.simplefilter("ignore", UserWarning)
        program.solve(**SOLVER)
    assert program.status in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE)
    return float(program.value)


def flat(case: Problem, name: str) -> np.ndarray:
    """Φ_ℓ as a matrix (n·c, o·i)."""
    values = case.phi[name]
    return values.reshape(values.shape[0] * values.shape[1], -1).numpy()


def primal(case: Problem, kind: str, strength: float, ridge: float) -> tuple[cp.Problem, dict, dict]:
    """(E) with its coefficients, and the variable for λMᵀM if a side adapts."""
    cost, constraints, prediction, squares = 0, [], 0, {}
    coefficients = {name: cp.Variable(tuple(part.shape[2:])) for name, part in case.phi.items()}
    for name, matrix in coefficients.items():
        prediction = prediction + flat(case, name) @ cp.reshape(matrix, (matrix.size,), order="C")
        if kind == "LayerScale":
            cost += one_factor(cp.vec(matrix, order="C"), strength)
        if kind in ("Left", "Right"):
            oriented = matrix if kind == "Left" else matrix.T
            d, e = oriented.shape
            z, s, t = cp.Variable((d, d), symmetric=True), cp.Variable((d, d)), cp.Variable((e, e), symmetric=True)
            root = np.sqrt(strength)
            constraints += [
                cp.bmat([[strength * np.eye(d), s], [s.T, z]]) >> 0,
                cp.bmat([[z, root * oriented], [root * oriented.T, t]]) >> 0,
            ]
            cost += strength * d - 2 * cp.trace(s) + cp.trace(z) + cp.trace(t)
            squares[name] = z
    if kind == "Full":
        cost += one_factor(cp.hstack([cp.vec(matrix, order="C") for matrix in coefficients.values()]), strength)
    r = case.r.flatten().numpy()
    if ridge == 0:
        constraints.append(prediction == r)
    else:
        cost += cp.sum_squares(r - prediction) / ridge
    return cp.Problem(cp.Minimize(cost), constraints), coefficients, squares


def one_factor(entries: cp.Expression, strength: float) -> cp.Expression:
    u = cp.Variable(nonneg=True)
    return strength * (u - 2 * cp.sqrt(u) + 1) + cp.quad_over_lin(entries, u)


def dual(case: Problem, strength: float, ridge: float) -> tuple[cp.Problem, cp.Variable]:
    """The greatest ⟨a, r⟩ − ρ‖a‖²/4 − Σ_ℓ Σ_j λq/(1 − q), q = σ_j(Σ a_kΦ_ℓ(x_k))²/(4λ): the same for either side."""
    a = cp.Variable(case.r.numel())
    value, constraints = a @ case.r.flatten().numpy() - ridge * cp.sum_squares(a) / 4, []
    for name, part in case.phi.items():
        o, i = part.shape[2:]
        g = cp.reshape(flat(case, name).T @ a, (o, i), order="C") / (2 * np.sqrt(strength))
        w = cp.Variable((i, i), symmetric=True)
        constraints.append(
            cp.bmat([[w, np.eye(i), np.zeros((i, o))], [np.eye(i), np.eye(i), g.T], [np.zeros((o, i)), g, np.eye(o)]])
            >> 0
        )
        value -= strength * (cp.trace(w) - i)
    return cp.Problem(cp.Maximize(value), constraints), a


@functools.cache
def fitted(named: str, kind: str, strength: float, ridge: float) -> at.Fit:
    case = PROBLEMS[named]
    structure = STRUCTURES[kind](at.Quadratic(strength))
    return at.fit(case.feats, case.r, structure=structure, ridge=ridge, tol=1e-13, max_rounds=3000)


@interpolating_and_with_ridge
@every_problem
@pytest.mark.parametrize("kind", STRUCTURES)
def test_a_fit_is_the_minimum_of_its_conic_program(kind: str, named: str, ridge: float, strength: float) -> None:
    case = PROBLEMS[named]
    found = fitted(named, kind, strength, ridge)
    program, coefficients, squares = primal(case, kind, strength, ridge)
    assert solve(program) == pytest.approx(found.objective, rel=1e-8)
    # The program with one factor is worse conditioned: its solver reaches only 1e-10.
    accuracy = 1e-6 if squares else 1e-5
    size = float(case.flatten(found.coefficients).norm())
    for name, matrix in coefficients.items():
        assert np.linalg.norm(matrix.value - found.coefficients[name].numpy()) < accuracy * size
    for name, square in squares.items():
        side = found.transforms[name].left if kind == "Left" else found.transforms[name].right
        torch.testing.assert_close(
            torch.from_numpy(square.value / strength), side.squared().matrix(), rtol=1e-4, atol=1e-4
        )
    assert any(float(p.norm()) > 1e-3 for p in found.coefficients.values())


@interpolating_and_with_ridge
@every_problem
def test_the_lower_bound_of_one_sided_fits_is_the_maximum_of_the_dual_program(
    named: str, ridge: float, strength: float
) -> None:
    case = PROBLEMS[named]
    program, a = dual(case, strength, ridge)
    value = solve(program)
    for kind in ("Left", "Right"):
        found = fitted(named, kind, strength, ridge)
        assert value == pytest.approx(found.objective, rel=1e-8)
        assert value == pytest.approx(found.lower_bound, rel=1e-8)
        assert np.linalg.norm(a.value / 2 - found.dual.flatten().numpy()) < 1e-5 * float(found.dual.norm())


@pytest.mark.parametrize("strength", [0.1, 1.0, 10.0])
def test_the_conic_form_of_the_penalty_is_the_sum_over_singular_values(strength: float) -> None:
    """The program with B held: Σ_j min over z ≥ 1 of λ(z − 1)² + σ_j²/z²."""
    matrix = np.random.default_rng(0).normal(size=(4, 3)) * 2
    case = problem(0, n=12, shapes=((4, 3, 0),))
    held = Problem(case.phi, case.feats, (case.rows @ torch.from_numpy(matrix).flatten())[:, None])
    program, *_ = primal(held, "Left", strength, 0.0)
    z = 1 + np.concatenate([[0], np.geomspace(1e-6, 50, 400_001)])
    by_grid = sum(float((strength * (z - 1) ** 2 + (s / z) ** 2).min()) for s in np.linalg.svd(matrix)[1])
    assert solve(program) == pytest.approx(by_grid, rel=1e-7)
