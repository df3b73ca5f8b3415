"""fit() against the theorems of the adaptive model and the joint problem minimized densely (theory §1, §4, §5)."""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import adaptive_tangents as at
import clean_process
import theory_reference as reference
from adaptive_tangents.linalg import kernel_systems as systems
from adaptive_tangents.linalg.cholesky import factorize
from adaptive_tangents.linalg.kernel_systems import DenseKernel
from adaptive_tangents.solvers import constraints
from adaptive_tangents.solvers.constraints import independent_constraints
from adaptive_tangents.solvers.losses import SquaredError
from draws import examples
from theory_reference import CURVED, JointProblem, Problem, problem, torch_absolute, torch_quadratic

EXACT = {"tol": 1e-14, "max_rounds": 2000}
STRUCTURES: dict[str, Callable[[at.Penalty, at.Penalty], at.structures.Structure]] = {
    **CURVED,
    "Modes": lambda p, q: at.Modes({"out": p, "in": q}),
}
EVERY = {**STRUCTURES, "Mixed": lambda p, q: at.Mixed({"block0": at.Diagonal(p), "*": at.Left(p)})}
COMPOSED = ("TwoSided", "Modes")  # several transforms of one value: not convex, without a dual bound
INVARIANT = ("Fixed", "Full", "LayerScale", "Left", "Right", "TwoSided", "Modes")  # to a rotation of either side
SOLVERS = ("newton", "anderson", "alternation")
CONVEX = [name for name in EVERY if name not in COMPOSED]
few = examples(8)
fewest = examples(4)
seeds = st.integers(0, 10_000)
names = st.sampled_from(sorted(EVERY))
ridges = st.one_of(st.just(0.0), st.floats(-4, 3).map(lambda x: 10.0**x))
strengths = st.floats(-2, 3).map(lambda x: 10.0**x)
scales = st.floats(-2, 1.5).map(lambda x: 10.0**x)


def structure(name: str, one: float = 0.5, other: float = 2.0) -> at.structures.Structure:
    return EVERY[name](at.Quadratic(one), at.Quadratic(other))


def matrix(kernel: Tensor) -> Tensor:
    return kernel.flatten(2).flatten(0, 1)


def rises(found: at.Fit) -> float:
    """The largest relative rise of the objective from one round to the next."""
    pairs = itertools.pairwise(entry.objective for entry in found.history)
    return max((after / before - 1 for before, after in pairs), default=0.0)


# ------------------------------------------------------------------------------------------ the optimum itself


@pytest.mark.parametrize(("ridge", "c"), [(0.0, 2), (0.3, 1)])
@pytest.mark.parametrize("name", EVERY)
def test_fit_reaches_the_minimum_of_the_joint_problem(name: str, ridge: float, c: int) -> None:
    case = problem(3, c=c, scale=2.0)
    found = at.fit(case.feats, case.r, structure=structure(name), ridge=ridge, **EXACT)
    joint = JointProblem(
        case, name, [torch_quadratic(0.5), torch_quadratic(2.0)][: 2 if name in COMPOSED else 1], ridge
    )
    (reached,) = joint.minimize(starts=1)
    assert reached == pytest.approx(found.objective, rel=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("name", ["LayerScale", "Left", "TwoSided", "Rows", "Diagonal"])
def test_no_random_start_beats_the_fit_where_the_penalty_is_not_convex(name: str, ridge: float) -> None:
    case = problem(7, c=2, scale=2.0)
    found = at.fit(
        case.feats, case.r, structure=STRUCTURES[name](at.Absolute(0.5), at.Absolute(0.5)), ridge=ridge, **EXACT
    )
    joint = JointProblem(case, name, [torch_absolute(0.5)], ridge, symmetric=True)
    reached = joint.minimize(starts=2)
    if name == "Diagonal":
        # ω̃ is concave beyond a kink: many sparse solutions are stationary, and no method finds the best.
        assert any(one == pytest.approx(found.objective, rel=1e-8) for one in reached)
        return
    assert min(reached) == pytest.approx(found.objective, rel=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_fit_of_modes_reaches_the_minimum_of_the_joint_problem_with_its_kronecker_products(ridge: float) -> None:
    """Three modes of a convolution's kernel with three penalties, a bias column, and a block without modes."""
    modes = {"block0": (("in", 2), ("spatial", 2))}
    case = problem(3, n=3, c=2, shapes=((2, 5, 2), (2, 2, 1)), modes=modes, scale=1.5)
    penalties = {"out": at.Quadratic(0.5), "in": at.Quadratic(2.0), "spatial": at.Quadratic(0.1)}
    found = at.fit(case.feats, case.r, structure=at.Modes(penalties), ridge=ridge, **EXACT)
    joint = JointProblem(case, "Modes", [torch_quadratic(0.5), torch_quadratic(2.0), torch_quadratic(0.1)], ridge)
    reached = joint.minimize()
    assert min(reached) == pytest.approx(found.objective, rel=1e-8)
    assert found.lower_bound is None
    assert rises(found) <= 1e-12


@examples(8)
@given(
    seed=seeds, name=names, ridge=st.sampled_from([0.0, 0.05, 1.0]), one=st.sampled_from([0.05, 0.5, 5.0]),
    other=st.sampled_from([0.2, 2.0]), n=st.integers(2, 4), c=st.integers(1, 2), kinds=st.permutations(reference.SHAPES),
)  # fmt: skip
def test_no_minimizer_of_the_joint_problem_gets_below_a_fit_and_from_nearby_it_comes_back(
    seed: int, name: str, ridge: float, one: float, other: float, n: int, c: int, kinds: list[tuple[int, int, int]]
) -> None:
    """(J) = (E): from any start if the problem is convex, from near the fit if there are other minima."""
    case = problem(seed, n=n, c=c, shapes=kinds[:2], scale=2.0)
    assume(ridge > 0 or float(torch.linalg.cond(case.rows @ case.rows.mT)) < 1e6)
    found = at.fit(case.feats, case.r, structure=structure(name, one, other), ridge=ridge, **EXACT)
    joint = JointProblem(
        case, name, [torch_quadratic(one), torch_quadratic(other)][: 2 if name in COMPOSED else 1], ridge
    )
    m = found.transform(_basis(case)).dense().flatten(0, 1).mT
    theta = torch.linalg.solve(m.mT, case.flatten(found.coefficients))
    near = joint.minimize(starts=1, seed=seed, spread=1e-2, near=(theta, _sides(found)))
    assert near[0] == pytest.approx(found.objective, rel=1e-8)
    if name not in COMPOSED:
        assert joint.minimize(starts=1, seed=seed)[0] >= found.objective * (1 - 1e-8)


def _sides(found: at.Fit) -> list[Tensor]:
    """The fitted transforms' factors, in the order and shapes of the joint problem."""
    sides: list[Tensor] = []
    for name, transform in found.transforms.items():
        o, i = found.coefficients[name].shape
        whole = found.structure
        chosen = whole.of_blocks(found.coefficients)[name] if isinstance(whole, at.Mixed) else whole
        if isinstance(transform, at.features.transforms.Joint):
            b = torch.cat([transform.direction[k].flatten() for k in found.coefficients])
            return [torch.eye(len(b), dtype=b.dtype) + (transform.gain - 1) * torch.outer(b, b)]
        if isinstance(transform, at.features.transforms.Entrywise):
            sides.append(transform.gains.flatten())
        elif isinstance(chosen, at.LayerScale):
            sides.append(torch.tensor([transform.scale], dtype=torch.float64))
        elif isinstance(chosen, at.Rows | at.Columns):
            side = transform.left or transform.right
            assert isinstance(side, at.features.transforms.Scaled)
            sides.append(side.gains)
        else:
            wanted = {"Fixed": (), "Left": ("left",), "Right": ("right",)}.get(type(chosen).__name__, ("left", "right"))
            for which, size in (("left", o), ("right", i)):
                side = getattr(transform, which)
                if which in wanted:
                    sides.append(torch.eye(size, dtype=torch.float64) if side is None else side.matrix())
    return sides


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fit_reaches_the_minimum_of_the_equivalent_problem_with_its_constraint_eliminated(seed: int) -> None:
    case = problem(seed, n=3, c=2, shapes=((3, 4, 2), (4, 2, 1)), scale=3.0)
    for one in (at.Left, at.Right):
        found = at.fit(case.feats, case.r, structure=one(at.Quadratic(0.2)), **EXACT)
        for reached in reference.minimize_equivalent(case, reference.spectral_quadratic(case, 0.2), seed=seed):
            assert reached == pytest.approx(found.objective, rel=1e-8)


@few
@given(seed=seeds, name=names, ridge=ridges, one=strengths, other=strengths, scale=scales)
def test_the_transforms_and_coefficients_found_attain_the_objective(
    seed: int, name: str, ridge: float, one: float, other: float, scale: float
) -> None:
    """(J) at M and θ = M⁻ᵀβ, with dense matrices, is the objective reported."""
    case = problem(seed, c=2, scale=scale)
    found = at.fit(case.feats, case.r, structure=structure(name, one, other), ridge=ridge)
    adapted = torch.cat([b.features().flatten(2) for b in found.transform(case.feats).blocks.values()], 2).flatten(0, 1)
    # φMᵀ = A, so θ has φβ = Aθ for every φ: recover M from probes that span the parameters.
    m = found.transform(_basis(case)).dense().flatten(0, 1).mT
    beta = case.flatten(found.coefficients)
    torch.testing.assert_close(adapted, case.rows @ m.mT, rtol=1e-8, atol=1e-10)
    theta = torch.linalg.solve(m.mT, beta)
    value = float((theta**2).sum()) + (
        0 if ridge == 0 else float(((case.r.flatten() - case.rows @ beta) ** 2).sum()) / ridge
    )
    omegas = [at.Quadratic(one), at.Quadratic(other)]
    for factor, penalty in _factors(found, omegas):
        value += float(penalty.value(torch.linalg.svdvals(factor).clamp_min(1)).sum())
    assert value == pytest.approx(found.objective, rel=1e-8)


def _basis(case: Problem) -> at.TangentFeatures:
    """The p basis vectors of the parameters as features of p samples."""
    parts = [case.split(row) for row in torch.eye(case.rows.shape[1], dtype=torch.float64)]
    return reference.features_from({name: torch.stack([part[name] for part in parts])[:, None] for name in case.phi})


def _factors(found: at.Fit, omegas: list[at.Penalty]) -> list[tuple[Tensor, at.Penalty]]:
    factors: list[tuple[Tensor, at.Penalty]] = []
    for transform in found.transforms.values():
        if isinstance(transform, at.features.transforms.Joint):
            return [(torch.tensor([[transform.gain]], dtype=torch.float64), omegas[0])]
        if isinstance(transform, at.features.transforms.Entrywise):
            factors.append((torch.diag(transform.gains.flatten()), omegas[0]))
            continue
        if transform.scale != 1:
            factors.append((torch.tensor([[transform.scale]], dtype=torch.float64), omegas[0]))
        both = isinstance(found.structure, at.TwoSided | at.Modes)
        factors += [(transform.left.matrix(), omegas[0])] if transform.left is not None else []
        factors += [(transform.right.matrix(), omegas[1 if both else 0])] if transform.right is not None else []
    return factors


# ------------------------------------------------------------------------------------------------- theorems


@few
@given(seed=seeds, strength=strengths, scale=scales)
def test_full_keeps_the_fixed_prediction_and_adds_the_targets_to_the_kernel(
    seed: int, strength: float, scale: float
) -> None:
    """§5: K = K₀ + ((z² − 1)/‖β‖²) r rᵀ among the training samples."""
    case, other = problem(seed, c=2, scale=scale), problem(seed + 1, n=5, c=2).feats
    fixed = at.fit(case.feats, case.r, structure=at.Fixed())
    full = at.fit(case.feats, case.r, structure=at.Full(at.Quadratic(strength)))
    torch.testing.assert_close(full.predict(other), fixed.predict(other), rtol=1e-8, atol=1e-9 * scale)
    beta, r = case.flatten(fixed.coefficients), case.r.flatten()
    z = float(reference.bisected_gain(strength, beta.norm().reshape(1).numpy())[0])
    expected = case.rows @ case.rows.mT + (z**2 - 1) / float(beta @ beta) * torch.outer(r, r)
    torch.testing.assert_close(
        matrix(full.transform(case.feats).kernel()), expected, rtol=1e-8, atol=1e-9 * float(expected.max())
    )


def test_full_with_a_ridge_is_fixed_with_a_smaller_one() -> None:
    """Stationarity of (1/ρ)‖r − φβ‖² + ω̃(‖β‖) is that of the fixed kernel at ρ/z²: another prediction than at ρ."""
    case = problem(2, c=2, scale=3.0)
    full = at.fit(case.feats, case.r, structure=at.Full(at.Quadratic(0.1)), ridge=0.7, **EXACT)
    z = next(iter(full.transforms.values())).gain
    fixed = at.fit(case.feats, case.r, structure=at.Fixed(), ridge=0.7 / z**2)
    torch.testing.assert_close(full.predict(case.feats), fixed.predict(case.feats), rtol=1e-6, atol=1e-8)
    assert z > 1.5


@pytest.mark.slow
@few
@given(
    seed=seeds, name=names, ridge=ridges, one=strengths, other=strengths, scale=scales, solver=st.sampled_from(SOLVERS)
)
def test_the_objective_never_rises(
    seed: int, name: str, ridge: float, one: float, other: float, scale: float, solver: str
) -> None:
    case = problem(seed, c=2, scale=scale)
    found = at.fit(
        case.feats, case.r, structure=structure(name, one, other), ridge=ridge, solver=solver, max_rounds=5000
    )
    assert rises(found) <= 1e-12
    seconds = [entry.seconds for entry in found.history]
    assert seconds == sorted(seconds)
    if solver == "newton":
        assert found.rounds <= len(seconds)
    else:
        assert found.rounds == len(seconds)
    assert found.history[-1].objective == pytest.approx(found.objective, rel=1e-9)
    assert found.converged
    assert found.stationarity <= 1e-4  # √tol


@few
@given(seed=seeds, name=names, ridge=ridges, one=strengths, other=strengths, scale=scales)
def test_the_lower_bound_is_below_the_objective_and_meets_it_where_the_structure_is_convex(
    seed: int, name: str, ridge: float, one: float, other: float, scale: float
) -> None:
    case = problem(seed, c=2, scale=scale)
    found = at.fit(case.feats, case.r, structure=structure(name, one, other), ridge=ridge, tol=1e-11)
    if name in COMPOSED:
        assert found.lower_bound is None
        assert found.gap is None
        assert "stationarity alone certifies" in found.lower_bound_reason
        return
    assert found.lower_bound is not None
    assert found.lower_bound <= found.objective * (1 + 1e-11)
    assert found.gap is not None
    assert found.gap < 1e-8  # at this tolerance: stationarity 3e-6 squared, with room
    # The bound holds for every model, including one with a random M.
    early = _stopped(case, structure(name, one, other), ridge, rounds=1)
    assert early.lower_bound is not None
    assert early.lower_bound <= found.objective * (1 + 1e-11)


def _stopped(case: Problem, chosen: at.structures.Structure, ridge: float, *, rounds: int) -> at.Fit:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", at.TangentWarning)
        found = at.fit(case.feats, case.r, structure=chosen, ridge=ridge, max_rounds=rounds)
    # If nothing adapts, one round may be enough.
    assert found.converged != any(issubclass(w.category, at.TangentWarning) for w in caught)
    return found


@pytest.mark.parametrize("ridge", [0.0, 0.05])
@pytest.mark.parametrize("name", CONVEX)
def test_the_gap_of_convex_structures_closes_to_rounding(name: str, ridge: float) -> None:
    case = problem(11, n=5, c=2, shapes=((4, 3, 2), (3, 4, 1), (3, 1, 0)), scale=4.0)
    found = at.fit(case.feats, case.r, structure=structure(name, 0.05), ridge=ridge, **EXACT)
    assert abs(found.gap) < 1e-12


@pytest.mark.parametrize(("name", "ridge"), zip(STRUCTURES, itertools.cycle((0.0, 0.05)), strict=False))
def test_accelerated_and_plain_alternation_agree_and_the_first_needs_no_more_rounds(name: str, ridge: float) -> None:
    case = problem(11, n=4, c=2, shapes=((4, 3, 2), (3, 4, 1)), scale=4.0)
    chosen = structure(name, 0.4, 0.8)
    plain, fast = (
        at.fit(case.feats, case.r, structure=chosen, ridge=ridge, solver=solver, tol=1e-13, max_rounds=5000)
        for solver in ("alternation", "anderson")
    )
    assert fast.objective == pytest.approx(plain.objective, rel=1e-9)
    torch.testing.assert_close(fast.predict(case.feats), plain.predict(case.feats), rtol=1e-4, atol=1e-4)
    assert fast.rounds <= plain.rounds
    assert not any(entry.accelerated for entry in plain.history)
    if plain.rounds > 20:
        assert any(entry.accelerated for entry in fast.history)
    if plain.rounds > 40:
        assert 2 * fast.rounds < plain.rounds


@pytest.mark.parametrize("ridge", [0.0, 0.4])
@pytest.mark.parametrize("name", EVERY)
def test_a_penalty_without_limit_recovers_the_fixed_kernel(name: str, ridge: float) -> None:
    case, other = problem(4, c=2), problem(5, n=3, c=2).feats
    fixed = at.fit(case.feats, case.r, structure=at.Fixed(), ridge=ridge)
    errors = []
    for strength in (1e3, 1e6, 1e9):
        found = at.fit(case.feats, case.r, structure=structure(name, strength, strength), ridge=ridge)
        errors.append(float((found.predict(other) - fixed.predict(other)).norm()))
    assert errors[2] < 1e-7
    assert found.objective == pytest.approx(fixed.objective, rel=1e-8)
    if name not in ("Fixed", "Full"):
        assert errors[0] > 100 * errors[1] > 1e4 * errors[2] / 2


SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "Left": torch.linalg.svdvals,
    "Right": torch.linalg.svdvals,
    "Diagonal": lambda matrix: matrix.abs().flatten(),
    "Rows": lambda matrix: matrix.norm(dim=1),
    "Columns": lambda matrix: matrix.norm(dim=0),
    "LayerScale": lambda matrix: matrix.norm()[None],
}


@pytest.mark.parametrize("name", SIZES)
def test_without_penalty_convex_structures_tend_to_the_least_sum_of_sizes(name: str) -> None:
    """ω̃(v)/(2√λ) → v as λ → 0. That Σv is least is certified by its own dual: ⟨a, r⟩ where Σ a_kΦ_k has sizes up to 1."""
    case = problem(8, n=4, shapes=((4, 3, 1),))
    ratios = []
    for strength in (1e-4, 1e-9):
        found = at.fit(case.feats, case.r, structure=STRUCTURES[name](at.Quadratic(strength), at.Quadratic(strength)))
        total = float(SIZES[name](found.coefficients["block0"]).sum())
        generator = torch.einsum("kc,kcoi->oi", found.dual, case.phi["block0"])
        certificate = float((found.dual * case.r).sum() / SIZES[name](generator).max())
        assert certificate <= total * (1 + 1e-12)
        ratios.append((total / certificate - 1, abs(found.objective / (2 * math.sqrt(strength)) / total - 1)))
    assert ratios[1][0] < 1e-2
    assert ratios[1][1] < 1e-2
    assert ratios[0][1] > 10 * ratios[1][1]


@few
@given(seed=seeds, name=names, ridge=st.floats(-4, 3).map(lambda x: 10.0**x), one=strengths, scale=scales)
def test_the_residual_of_a_ridge_solution_is_the_ridge_times_its_dual_coefficients(
    seed: int, name: str, ridge: float, one: float, scale: float
) -> None:
    case = problem(seed, c=2, scale=scale)
    found = at.fit(case.feats, case.r, structure=structure(name, one), ridge=ridge)
    torch.testing.assert_close(case.r - found.predict(case.feats), ridge * found.dual, rtol=1e-7, atol=1e-9 * scale)


@few
@given(seed=seeds, name=names, one=strengths, scale=scales)
def test_interpolation_meets_its_targets_and_its_coefficients_are_stationary(
    seed: int, name: str, one: float, scale: float
) -> None:
    case = problem(seed, c=2, scale=scale)
    chosen = structure(name, one).prepared(case.feats)
    found = at.fit(case.feats, case.r, structure=chosen, tol=1e-12, max_rounds=2000)
    torch.testing.assert_close(found.predict(case.feats), case.r, rtol=1e-9, atol=1e-10 * scale)
    assert found.feasibility < 1e-9
    # ∇Ω̃(B) = 2 Σ α_kΦ(x_k), from the dense features.
    gradient = case.flatten(chosen.gradient(found.coefficients))
    generator = 2 * case.rows.mT @ found.dual.flatten()
    assert float((gradient - generator).norm() / generator.norm()) == pytest.approx(found.stationarity, abs=1e-9)
    assert found.stationarity <= 1e-6
    # The adapted kernel gives the same coefficients: K_M α = r.
    kernel = matrix(found.transform(case.feats).kernel())
    torch.testing.assert_close(kernel @ found.dual.flatten(), case.r.flatten(), rtol=1e-4, atol=1e-4 * scale)


@fewest
@given(seed=seeds, name=names, ridge=ridges)
def test_the_order_of_samples_does_not_matter(seed: int, name: str, ridge: float) -> None:
    case = problem(seed, n=5, c=2, scale=2.0)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    found = at.fit(case.feats, case.r, structure=structure(name), ridge=ridge, tol=1e-12)
    shuffled = at.fit(case.feats[order], case.r[order], structure=structure(name), ridge=ridge, tol=1e-12)
    assert shuffled.objective == pytest.approx(found.objective, rel=1e-10)
    torch.testing.assert_close(shuffled.dual, found.dual[order], rtol=1e-4, atol=1e-5)


@fewest
@given(seed=seeds, name=st.sampled_from(INVARIANT), ridge=ridges)
def test_the_order_of_blocks_and_the_basis_of_their_sides_do_not_matter(seed: int, name: str, ridge: float) -> None:
    case = problem(seed, c=2, scale=2.0)
    generator = torch.Generator().manual_seed(seed)
    turned = {}
    for key, part in reversed(case.phi.items()):
        q, w = (torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0] for d in part.shape[2:])
        turned[key] = q @ part @ w
    found = at.fit(case.feats, case.r, structure=structure(name), ridge=ridge, tol=1e-12)
    other = at.fit(reference.features_from(turned), case.r, structure=structure(name), ridge=ridge, tol=1e-12)
    assert other.objective == pytest.approx(found.objective, rel=1e-10)
    torch.testing.assert_close(other.dual, found.dual, rtol=1e-4, atol=1e-5)


def test_scaling_targets_and_penalty_together_scales_the_coefficients() -> None:
    """(r, λ) → (sr, s²λ) takes β to sβ and the objective to s² times itself, with the same transforms."""
    case = problem(6, scale=2.0)
    one = at.fit(case.feats, case.r, structure=at.TwoSided(at.Quadratic(0.3)), **EXACT)
    ten = at.fit(case.feats, 10 * case.r, structure=at.TwoSided(at.Quadratic(30.0)), **EXACT)
    assert ten.objective == pytest.approx(100 * one.objective, rel=1e-10)
    torch.testing.assert_close(
        ten.transform(case.feats).kernel(), one.transform(case.feats).kernel(), rtol=1e-5, atol=1e-6
    )


# --------------------------------------------------------------------------------------------------- input


def test_targets_of_one_output_may_be_a_vector() -> None:
    case = problem(1)
    column = at.fit(case.feats, case.r)
    vector = at.fit(case.feats, case.r[:, 0])
    assert isinstance(vector.structure, at.TwoSided)
    assert vector.dual.shape == (4, 1)
    torch.testing.assert_close(vector.dual, column.dual, rtol=0, atol=0)
    assert vector.predict(case.feats).shape == (4, 1)


@pytest.mark.parametrize("name", STRUCTURES)
def test_zero_targets_are_met_by_the_zero_model(name: str) -> None:
    case = problem(1, c=2)
    for ridge in (0.0, 0.5):
        found = at.fit(case.feats, torch.zeros_like(case.r), structure=structure(name), ridge=ridge)
        assert found.converged
        assert found.reason == "the targets are zero, and so is the model"
        assert found.objective == found.feasibility == found.stationarity == found.lower_bound == 0
        assert float(found.predict(case.feats).norm()) == 0
        assert "converged" in found.summary()


def test_float32_features_are_solved_in_float64() -> None:
    case = problem(9, c=2, scale=2.0)
    low = case.feats.to(torch.float32)
    found = at.fit(low, case.r.float(), structure=structure("TwoSided"))
    same = at.fit(low.to(torch.float64), case.r.float().double(), structure=structure("TwoSided"))
    assert found.objective == same.objective
    assert found.feasibility < 1e-10
    assert found.dual.dtype == torch.float64
    assert found.predict(low).dtype == torch.float64
    assert found.transform(low).dtype == torch.float32
    torch.testing.assert_close(
        found.transform(low).kernel(), same.transform(case.feats).kernel().float(), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("name", STRUCTURES)
def test_duplicated_samples_with_equal_targets_are_left_out_and_still_met(name: str) -> None:
    case = problem(12, n=4, c=2, scale=2.0)
    index = torch.tensor([0, 1, 2, 3, 1, 1])
    once = at.fit(case.feats, case.r, structure=structure(name), tol=1e-12)
    found = at.fit(case.feats[index], case.r[index], structure=structure(name), tol=1e-12)
    assert found.dropped == 4  # two samples, two outputs each
    assert once.dropped == 0
    assert "4 follow from the others and were left out" in found.summary()
    assert found.feasibility < 1e-10
    assert found.objective == pytest.approx(once.objective, rel=1e-9)
    torch.testing.assert_close(found.predict(case.feats), case.r, rtol=1e-9, atol=1e-9)
    if name not in COMPOSED:
        assert abs(found.gap) < 1e-9


def test_more_consistent_constraints_than_parameters_are_reduced_to_the_independent_ones() -> None:
    case = problem(13, n=12, c=2, shapes=((3, 2, 1), (2, 2, 1)))
    beta = torch.linspace(-1, 2, 10, dtype=torch.float64)
    r = (case.rows @ beta).reshape(12, 2)
    found = at.fit(case.feats, r, structure=at.TwoSided(at.Quadratic(0.1)))
    assert found.dropped == 14
    assert found.feasibility < 1e-9
    torch.testing.assert_close(case.flatten(found.coefficients), beta, rtol=1e-7, atol=1e-8)


def test_duplicates_may_contradict_each_other_under_a_ridge() -> None:
    case = problem(12, n=3)
    feats = case.feats[torch.tensor([0, 1, 2, 1])]
    r = torch.tensor([1.0, 2.0, 3.0, -2.0])
    found = at.fit(feats, r, structure=at.Left(at.Quadratic(0.5)), ridge=0.1)
    assert found.dropped == 0
    assert abs(found.gap) < 1e-8
    predicted = found.predict(feats)
    torch.testing.assert_close(predicted[1], predicted[3])


def test_smallest_eigenvalue_is_that_of_the_kernel() -> None:
    case = problem(2, c=2)
    expected = float(torch.linalg.eigvalsh(case.rows @ case.rows.mT)[0])
    for ridge in (0.0, 1.0):
        assert at.fit(case.feats, case.r, ridge=ridge).smallest_eigenvalue == pytest.approx(expected, rel=1e-9)


def test_progress_hears_of_every_round() -> None:
    case, heard = problem(2, scale=3.0), []
    found = at.fit(case.feats, case.r, progress=lambda count, objective: heard.append((count, objective)))
    assert heard == [(k + 1, entry.objective) for k, entry in enumerate(found.history)]


def test_the_features_and_targets_given_are_left_as_they_were() -> None:
    case = problem(2, c=2)
    before = {name: block.features().clone() for name, block in case.feats.blocks.items()}, case.r.clone()
    case.r.requires_grad_(True)
    at.fit(case.feats, case.r)
    assert all(torch.equal(block.features(), before[0][name]) for name, block in case.feats.blocks.items())
    assert torch.equal(case.r, before[1])


# --------------------------------------------------------------------------------------------------- output


def test_summary_names_the_certificates() -> None:
    case = problem(2, c=2, scale=2.0)
    text = at.fit(case.feats, case.r, structure=at.Left(at.Quadratic(0.5))).summary()
    for words in (
        "Left",
        "interpolation",
        "converged",
        "objective",
        "lower bound",
        "gap",
        "feasibility",
        "stationarity",
    ):
        assert words in text
    assert "smallest eigenvalue" in text
    assert "constraints" not in text
    text = at.fit(case.feats, case.r, ridge=0.25).summary()
    assert "ridge 0.25" in text
    assert "stationarity alone certifies" in text
    assert "not asked for: ridge" in text


def test_running_out_of_rounds_warns_and_says_so() -> None:
    case = problem(11, n=8, c=2, shapes=((6, 5, 2), (5, 6, 1)), scale=4.0)
    words = r"fit did not converge: stopped after 3 rounds with the objective changing by .* raise max_rounds or tol"
    with pytest.warns(at.TangentWarning, match=words):
        found = at.fit(case.feats, case.r, structure=structure("TwoSided", 0.01, 0.01), max_rounds=3)
    assert not found.converged
    assert len(found.history) == 4  # the fit of the fixed kernel, and three more
    assert "stopped after 3 rounds" in found.reason
    assert "NOT converged" in found.summary()
    # The state reached is still returned completely.
    assert found.feasibility < 1e-9
    # Whether it stops during or after the tempering stages, it gives the reason.
    fixed = at.fit(case.feats, case.r, structure=at.Fixed())
    for rounds in (1, 2, 5, 8):
        with pytest.warns(at.TangentWarning, match=rf"stopped after {rounds} rounds"):
            early = at.fit(case.feats, case.r, structure=structure("TwoSided", 0.01, 0.01), max_rounds=rounds)
        assert not early.converged
        assert len(early.history) == rounds + 1
        assert early.objective <= fixed.objective
    with pytest.warns(at.TangentWarning, match=r"stopped after 1 rounds"):
        assert len(at.fit(case.feats, case.r, max_rounds=1).history) == 2


def test_a_tolerance_beyond_float64_stops_and_says_why() -> None:
    case = problem(11, n=3, c=2, shapes=((3, 2, 2), (2, 3, 1)), scale=4.0)
    with pytest.warns(
        at.TangentWarning, match=r"objective no longer changes in float64 but stationarity is .* ill-conditioned"
    ):
        found = at.fit(case.feats, case.r, structure=structure("Left"), tol=1e-40, max_rounds=500)
    assert found.rounds < 500
    assert abs(found.gap) < 1e-12


@pytest.mark.parametrize("name", STRUCTURES)
def test_rounds_that_move_nothing_are_not_extrapolated(name: str) -> None:
    """At its fixed point the map has residuals of exactly zero, which cannot be combined."""
    feats = reference.features_from({"w": torch.tensor([[[[2.0]]]], dtype=torch.float64)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", at.TangentWarning)  # the tolerance is practically zero, so it may not be met
        found = at.fit(feats, torch.tensor([3.0]), structure=structure(name), tol=1e-300, max_rounds=40)
    assert found.coefficients["w"].item() == pytest.approx(1.5, rel=1e-12)
    assert found.stationarity < 1e-14


@clean_process.in_one_group
def test_the_warning_points_at_the_line_that_called() -> None:
    script = (
        "import torch, adaptive_tangents as at, warnings\n"
        "feats = at.tangent_features(torch.nn.Linear(3, 2), torch.randn(2, 3))\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    at.fit(feats, torch.randn(2, 2), max_rounds=1)\n"
        "print([(w.category.__name__, w.filename, w.lineno) for w in caught])\n"
    )
    done = clean_process.run(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[('TangentWarning', '<string>', 5)]"


# ------------------------------------------------------------------------------------------------------ refusals


def test_ridges_tolerances_and_rounds_out_of_range_are_refused() -> None:
    case = problem(1)
    for ridge in (-1.0, math.inf, math.nan):
        with pytest.raises(
            at.TangentError, match=rf"fit: the ridge ρ is zero \(interpolation\) or positive, got {ridge}"
        ):
            at.fit(case.feats, case.r, ridge=ridge)
    for wrong in ({"tol": 0.0}, {"tol": -1.0}, {"tol": math.nan}, {"max_rounds": 0}):
        with pytest.raises(at.TangentError, match="fit: tol and max_rounds are positive, got"):
            at.fit(case.feats, case.r, **wrong)


def test_targets_of_another_shape_are_refused_with_both_shapes() -> None:
    case = problem(1, c=2)
    for wrong in (case.r[:3], case.r[:, :1], case.r[:, 0], case.r.flatten(), case.r[None]):
        shape = r"\(" + ", ".join(map(str, wrong.shape)) + r",?\)"
        with pytest.raises(
            at.TangentError,
            match=rf"fit: targets have shape {shape}, features are of n = 4 samples, c = 2 outputs",
        ):
            at.fit(case.feats, wrong)


def test_targets_elsewhere_of_integers_or_not_finite_are_refused() -> None:
    case = problem(1)
    with pytest.raises(
        at.TangentError, match=r"fit: targets are on meta and features on cpu; move one with \.to\(device\)"
    ):
        at.fit(case.feats, case.r.to("meta"))
    with pytest.raises(at.TangentError, match=r"fit: targets are torch\.int64; give real residuals"):
        at.fit(case.feats, case.r.long())
    with pytest.raises(at.TangentError, match=r"fit: targets are torch\.complex128; give real residuals"):
        at.fit(case.feats, case.r.to(torch.complex128))
    for bad in (math.nan, math.inf):
        r = case.r.clone()
        r[2] = bad
        with pytest.raises(at.TangentError, match=r"fit: the target of sample 2 is not finite"):
            at.fit(case.feats, r)


def test_contradicting_duplicates_are_refused_by_name() -> None:
    case = problem(12, n=4)
    feats = case.feats[torch.tensor([0, 1, 2, 3, 2])]
    with pytest.raises(
        at.TangentError,
        match=r"fit: 1 of 5 constraints are linearly dependent .* contradict .* samples 2, 4 \(duplicate inputs",
    ):
        at.fit(feats, torch.tensor([1.0, 2.0, 3.0, 4.0, -3.0]))
    many = case.feats[torch.zeros(14, dtype=torch.long)]
    targets = torch.tensor([1.0, -1.0]).repeat(7)
    with pytest.raises(at.TangentError, match=r"samples 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 4 more"):
        at.fit(many, targets)


def test_a_kernel_too_large_for_memory_is_refused_before_it_is_made() -> None:
    case = problem(1, c=2)
    feats = dataclasses.replace(case.feats, limit=1000)
    with pytest.raises(
        at.TangentError,
        match=r"fit: needs 3\.07 kB .* limit is 1 kB; use form='matrix-free', or fewer samples \(the kernel is 8 × 8\)",
    ):
        at.fit(feats, case.r, form="dense")


def test_a_kernel_that_is_not_positive_definite_is_refused() -> None:
    with pytest.raises(
        at.TangentError, match=r"not positive definite even with a jitter of 1e-8 .* use a positive ridge"
    ):
        factorize(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64), 0.0)


def test_the_jitter_added_is_the_least_that_serves_and_is_reported() -> None:
    u = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kernel = u @ u.mT - 1e-11 * torch.eye(6, dtype=torch.float64)
    found = factorize(kernel, 0.0)
    mean = float(kernel.diagonal().mean())
    assert 1e-12 * mean < found.jitter <= 1.01e-10 * mean
    torch.testing.assert_close(
        found.factor @ found.factor.mT, kernel + found.jitter * torch.eye(6, dtype=torch.float64)
    )
    exact = factorize(u.mT @ u, 0.5)
    assert exact.jitter == 0
    r = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close((u.mT @ u + 0.5 * torch.eye(3, dtype=torch.float64)) @ exact.solve(r), r)


def test_independent_constraints_span_the_same_space() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(4, 9, dtype=torch.float64, generator=generator)
    mixed = torch.randn(10, 4, dtype=torch.float64, generator=generator) @ rows
    r = mixed @ torch.ones(9, dtype=torch.float64)
    found = independent_constraints(DenseKernel(mixed @ mixed.mT), r, samples=10)
    assert found.kept is not None
    assert len(set(found.kept.tolist())) == 4
    assert int(torch.linalg.matrix_rank(mixed[found.kept])) == 4
    whole = rows @ rows.mT
    assert independent_constraints(DenseKernel(whole), r[:4], samples=4).kept is None


def test_squared_error_and_its_bound_are_conjugate() -> None:
    """⟨a, r⟩ − ρ‖a‖²/4 = min over predictions f of ⟨a, f⟩ + ‖r − f‖²/ρ."""
    generator = torch.Generator().manual_seed(0)
    a, r, f = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    loss = SquaredError(r, 0.3)
    assert loss.bound(a) <= float(a @ f) + loss.value(f)
    best = r - 0.15 * a
    assert loss.bound(a) == pytest.approx(float(a @ best) + loss.value(best), rel=1e-12)
    torch.testing.assert_close(loss.slope(best), -a)
    assert SquaredError(r, 0.0).value(f) == 0


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_smallest_eigenvalue_of_a_large_kernel_is_that_of_a_decomposition(
    ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = problem(3, c=2)
    kernel = case.rows @ case.rows.mT
    expected = float(torch.linalg.eigvalsh(kernel)[0])
    for size in ("_MEDIUM", "_LARGE"):
        monkeypatch.setattr(constraints, size, 0)
    calls: list[float] = []
    made = systems.factorize
    monkeypatch.setattr(systems, "factorize", lambda matrix, shift: calls.append(shift) or made(matrix, shift))
    found = at.fit(case.feats, case.r, structure=at.Fixed(), ridge=ridge)
    assert found.smallest_eigenvalue == pytest.approx(expected, abs=1e-6 * (expected + ridge))
    assert calls == [ridge]  # both share one factorization of K₀
