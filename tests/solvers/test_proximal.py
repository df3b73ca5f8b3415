"""The proximal operators of structures, and the proximal gradient method as an independent check of fit()."""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptive_tangents as at
import theory_reference as reference
from adaptive_tangents.solvers.proximal import _smooth
from draws import examples
from theory_reference import CURVED, JointProblem, Problem, problem, torch_absolute, torch_quadratic

CONVEX = [name for name in CURVED if name != "TwoSided"]
RIDGE = 10.0  # of the small network's fits: a first-order method needs few steps there
BLOCKS = ((2, 3), (2, 1))
few = examples(8)
steps = st.floats(-2, 2).map(lambda x: 10.0**x)
strengths = st.floats(-1, 2).map(lambda x: 10.0**x)


def matrices(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"block{k}": scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        for k, shape in enumerate(BLOCKS)
    }


def cost(structure: at.structures.Structure, b: Mapping[str, Tensor], x: Mapping[str, Tensor], step: float) -> float:
    """‖B − X‖²/(2·step) + Ω̃(B)."""
    return sum(float(((b[name] - x[name]) ** 2).sum()) for name in x) / (2 * step) + structure.penalty(b)


def identity_features(x: Mapping[str, Tensor]) -> Problem:
    """One sample per entry of X: its feature is that entry's direction, its target the entry."""
    total, start, phi = sum(matrix.numel() for matrix in x.values()), 0, {}
    for name, matrix in x.items():
        rows = torch.zeros(total, matrix.numel(), dtype=torch.float64)
        rows[start : start + matrix.numel()] = torch.eye(matrix.numel(), dtype=torch.float64)
        phi[name], start = rows.reshape(total, 1, *matrix.shape), start + matrix.numel()
    targets = torch.cat([matrix.flatten() for matrix in x.values()])[:, None]
    return Problem(phi, reference.features_from(phi), targets)


# ------------------------------------------------------------------------------------------------ proximal operators


@pytest.mark.parametrize("step", [0.2, 3.0])
@pytest.mark.parametrize("name", CURVED)
def test_the_proximal_point_is_the_minimum_over_coefficients_and_dense_transforms(name: str, step: float) -> None:
    """‖θ‖² + Ω(M) + ‖Mᵀθ − X‖²/(2·step) by L-BFGS over θ and M: the joint problem of features that are the identity."""
    x = matrices(1, scale=3.0)
    structure = CURVED[name](at.Quadratic(0.5), at.Quadratic(2.0))
    found = cost(structure, structure.proximal(x, step), x, step)
    joint = JointProblem(identity_features(x), name, [torch_quadratic(0.5), torch_quadratic(2.0)], 2 * step)
    assert min(joint.minimize(starts=1 if name in CONVEX else 4)) == pytest.approx(found, rel=1e-8)


@pytest.mark.parametrize("name", ["LayerScale", "Right", "Columns"])
def test_the_proximal_point_is_the_global_minimum_where_the_penalty_is_not_convex(name: str) -> None:
    x, step = matrices(2, scale=3.0), 1.5
    structure = CURVED[name](at.Absolute(2.0), at.Absolute(2.0))
    found = cost(structure, structure.proximal(x, step), x, step)
    joint = JointProblem(identity_features(x), name, [torch_absolute(2.0)], 2 * step, symmetric=True)
    reached = min(joint.minimize(starts=4))
    assert found <= reached * (1 + 1e-10)
    assert reached == pytest.approx(found, rel=1e-6)


@few
@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(list(CURVED)),
    step=steps,
    one=strengths,
    other=strengths,
    kind=st.sampled_from([at.Quadratic, at.Absolute, at.penalties.LogSquared]),
    invariant=st.booleans(),
)
def test_no_point_is_better_than_the_proximal_one_and_it_is_stationary(
    seed: int, name: str, step: float, one: float, other: float, kind: type[Any], invariant: bool
) -> None:
    x = matrices(seed, scale=10.0 ** ((seed % 5) - 2))
    structure = CURVED[name](kind(one), kind(other))
    if invariant and isinstance(structure, at.structures.BlockStructure):
        structure = type(structure)(**{
            **{f: getattr(structure, f) for f in structure.__dataclass_fields__},
            "scale_invariant": True,
            "scales": {block: 0.5 + k for k, block in enumerate(x)},
        })  # fmt: skip
    found = structure.proximal(x, step)
    least = cost(structure, found, x, step)
    gradient = structure.gradient(found)
    for block, matrix in x.items():
        left = (matrix - found[block]) / step - gradient[block]
        assert float(left.norm()) <= 1e-9 * float(matrix.norm()) / step + 1e-12
    noise = matrices(seed + 1)
    for size, sign in itertools.product((1e-3, 0.3), (-1, 1)):
        near = {block: (1 + sign * size * noise[block]) * found[block] for block in x}
        aside = {block: found[block] + sign * size * float(x[block].norm()) * noise[block] for block in x}
        between = {block: found[block] + size * (x[block] - found[block]) for block in x}
        for other_point in (near, aside, between, {block: (1 - size) * found[block] for block in x}):
            assert cost(structure, other_point, x, step) >= least * (1 - 1e-9)


@pytest.mark.parametrize("name", CURVED)
def test_the_proximal_point_of_zero_is_zero(name: str) -> None:
    zeros = {block: torch.zeros_like(matrix) for block, matrix in matrices(0).items()}
    for matrix in CURVED[name](at.Quadratic(1.0), at.Quadratic(1.0)).proximal(zeros, 0.7).values():
        assert not bool(matrix.any())


def test_a_mixture_takes_the_proximal_point_of_each_group() -> None:
    x = matrices(3, scale=4.0)
    parts = {"block0": at.Rows(at.Quadratic(0.1)), "*": at.Full(at.Quadratic(2.0))}
    found = at.Mixed(parts).proximal(x, 0.8)
    rest = {"block1": x["block1"]}
    wanted = {**parts["block0"].proximal({"block0": x["block0"]}, 0.8), **parts["*"].proximal(rest, 0.8)}
    assert set(found) == set(x)
    for name, matrix in wanted.items():
        torch.testing.assert_close(found[name], matrix, rtol=0, atol=0)


def test_modes_with_one_mode_take_the_proximal_point_of_its_unfolding() -> None:
    case = problem(3, c=2, shapes=reference.KERNEL, modes=reference.KERNEL_MODES)
    x = {"block0": 3 * torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    x["block1"] = torch.ones(2, 3, dtype=torch.float64)
    found = at.Modes({"spatial": at.Quadratic(0.1)}).prepared(case.feats).proximal(x, 0.6)
    kernel, bias = x["block0"][:, :6].reshape(3, 2, 3), x["block0"][:, 6:]
    flat = at.Left(at.Quadratic(0.1)).proximal({"": kernel.permute(2, 0, 1).reshape(3, 6)}, 0.6)[""]
    wanted = torch.cat([flat.reshape(3, 3, 2).permute(1, 2, 0).flatten(1), bias / 2.2], 1)
    torch.testing.assert_close(found["block0"], wanted)
    torch.testing.assert_close(found["block1"], x["block1"] / 2.2)


# ---------------------------------------------------------------------------------------------------- the same fits


@functools.cache
def network() -> tuple[at.TangentFeatures, Tensor]:
    """A small network with biases, two outputs; captured once, as features are never changed."""
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 2)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    y = torch.stack([torch.sign(x[:, 0] * x[:, 1]), x[:, 2]], 1)
    return at.tangent_features(model, x), 2 * y


@pytest.mark.parametrize("name", CONVEX)
def test_convex_fits_have_the_objective_of_a_first_order_method_from_zero(name: str) -> None:
    feats, r = network()
    structure = CURVED[name](at.Quadratic(0.3), at.Quadratic(0.3))
    fitted = at.fit(feats, r, structure=structure, ridge=RIDGE, tol=1e-12)
    found = at.solvers.proximal_gradient(feats, r, structure=structure, ridge=RIDGE, tol=1e-5)
    assert found.converged
    assert found.objective == pytest.approx(fitted.objective, rel=1e-8)
    for block, matrix in fitted.coefficients.items():
        torch.testing.assert_close(found.coefficients[block], matrix, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.predict(feats), fitted.predict(feats), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("penalty", [at.Quadratic(0.3), at.Absolute(0.3), at.penalties.LogSquared(0.3)], ids=repr)
@pytest.mark.parametrize("name", ["TwoSided", "Left", "Diagonal"])
def test_a_first_order_method_finds_nothing_below_a_fit_it_starts_from(name: str, penalty: at.Penalty) -> None:
    """Its steps reach global minima of the proximal problem, so it would leave a fit that is no local minimum."""
    feats, r = network()
    structure = CURVED[name](penalty, penalty)
    fitted = at.fit(feats, r, structure=structure, ridge=RIDGE, tol=1e-14, max_rounds=1000)
    found = at.solvers.proximal_gradient(
        feats, r, structure=structure, ridge=RIDGE, tol=1e-5, max_steps=300, start=fitted.coefficients
    )
    assert found.objectives[0] == pytest.approx(fitted.objective, rel=1e-12)
    assert found.objective <= fitted.objective * (1 + 1e-14)
    assert found.objective >= fitted.objective * (1 - 1e-8)


def test_a_two_sided_fit_is_where_a_first_order_method_from_zero_ends_too() -> None:
    case = problem(3, c=2, scale=2.0)
    structure = at.TwoSided(at.Quadratic(0.5), at.Quadratic(2.0))
    fitted = at.fit(case.feats, case.r, structure=structure, ridge=10.0, tol=1e-14, max_rounds=1000)
    found = at.solvers.proximal_gradient(case.feats, case.r, structure=structure, ridge=10.0, tol=1e-5)
    assert found.objective == pytest.approx(fitted.objective, rel=1e-8)


@pytest.mark.parametrize(
    "structure",
    [
        {"0": at.Left(at.Quadratic(0.1)), "*": at.Fixed()},
        at.Rows(at.Quadratic(0.3), scale_invariant=True),
        at.Modes({"out": at.Quadratic(0.3)}),
    ],
    ids=["by pattern", "scale invariant", "one mode"],
)
def test_fits_of_mixed_scaled_and_modal_structures_agree_too(structure: Any) -> None:
    feats, r = network()
    fitted = at.fit(feats, r, structure=structure, ridge=RIDGE, tol=1e-12)
    found = at.solvers.proximal_gradient(feats, r, structure=structure, ridge=RIDGE, tol=1e-5)
    assert found.objective == pytest.approx(fitted.objective, rel=1e-8)


@pytest.mark.parametrize("c", [1, 2])
@pytest.mark.parametrize("name", ["Fixed", "Left", "LayerScale"])
def test_fits_by_cross_entropy_agree_too(name: str, c: int) -> None:
    case = problem(4, n=8, c=c)
    labels = torch.arange(8) % 2
    structure = CURVED[name](at.Quadratic(2.0), at.Quadratic(2.0))
    given: dict[str, Any] = {"loss": "cross-entropy", "offset": 0.3 * case.r, "ridge": 3.0}
    fitted = at.fit(case.feats, labels, structure=structure, tol=1e-12, **given)
    found = at.solvers.proximal_gradient(case.feats, labels, structure=structure, tol=1e-5, **given)
    assert found.objective == pytest.approx(fitted.objective, rel=1e-8)


@examples(3)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(list(CURVED)), strength=strengths, ridge=st.floats(3.0, 30.0))
def test_the_objective_never_rises_and_is_never_below_that_of_a_fit_for_convex_structures(
    seed: int, name: str, strength: float, ridge: float
) -> None:
    case = problem(seed, c=2)
    structure = CURVED[name](at.Quadratic(strength), at.Quadratic(strength))
    found = at.solvers.proximal_gradient(case.feats, case.r, structure=structure, ridge=ridge, tol=1e-4)
    assert all(after <= before * (1 + 1e-14) for before, after in itertools.pairwise(found.objectives))
    assert found.stationarity <= 1e-4
    assert found.objective == found.objectives[-1]
    assert found.objective == pytest.approx(_objective(case, structure, found.coefficients, ridge), rel=1e-12)
    if name in CONVEX:
        fitted = at.fit(case.feats, case.r, structure=structure, ridge=ridge, tol=1e-12)
        assert found.objective >= fitted.objective * (1 - 1e-10)
        assert found.objective == pytest.approx(fitted.objective, rel=1e-5)


def _objective(case: Problem, structure: at.structures.Structure, beta: Mapping[str, Tensor], ridge: float) -> float:
    missing = case.r.flatten() - case.rows @ case.flatten(beta)
    return structure.penalty(beta) + float(missing @ missing) / ridge


# ------------------------------------------------------------------------------------------------------ its behavior


def test_neither_a_kernel_nor_the_features_are_ever_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    feats, r = network()

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("formed")

    monkeypatch.setattr(at.TangentFeatures, "kernel", refuse)
    monkeypatch.setattr(at.TangentFeatures, "dense", refuse)
    state = torch.random.get_rng_state()
    assert at.solvers.proximal_gradient(feats, r, structure=at.Left(), ridge=RIDGE, tol=1e-3).converged
    assert torch.equal(state, torch.random.get_rng_state())


@functools.cache
def descended() -> at.solvers.ProximalFit:
    """The network's fit, made once for the tests that compare others with it."""
    feats, r = network()
    return at.solvers.proximal_gradient(feats, r, structure=at.Left(), ridge=RIDGE, tol=1e-5)


def test_single_precision_features_are_fitted_in_double() -> None:
    feats, r = network()
    single = at.solvers.proximal_gradient(
        feats.to(torch.float32), r.float(), structure=at.Left(), ridge=RIDGE, tol=1e-5
    )
    double = descended()
    assert {matrix.dtype for matrix in single.coefficients.values()} == {torch.float64}
    assert single.objective == pytest.approx(double.objective, rel=1e-5)


def test_targets_of_zero_are_met_by_the_model_of_zero() -> None:
    feats, r = network()
    found = at.solvers.proximal_gradient(feats, torch.zeros_like(r), structure=at.TwoSided(), ridge=1.0)
    assert found.converged
    assert found.objective == 0


def test_a_largest_eigenvalue_taken_too_small_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    (feats, r), wanted = network(), descended()
    monkeypatch.setattr("adaptive_tangents.solvers.proximal._Descent._largest_eigenvalue", lambda self: 1e-3)
    found = at.solvers.proximal_gradient(feats, r, structure=at.Left(), ridge=RIDGE, tol=1e-5)
    assert found.objective == pytest.approx(wanted.objective, rel=1e-8)
    assert all(after <= before * (1 + 1e-14) for before, after in itertools.pairwise(found.objectives))


def test_a_descent_that_runs_out_of_steps_says_so() -> None:
    feats, r = network()
    seen: list[tuple[int, float]] = []
    with pytest.warns(at.TangentWarning, match="proximal_gradient did not converge: stopped after 3 steps"):
        found = at.solvers.proximal_gradient(
            feats, r, structure=at.Left(), ridge=0.1, max_steps=3, progress=lambda *entry: seen.append(entry)
        )
    assert not found.converged
    assert "raise max_steps or tol" in found.reason
    assert (found.steps, len(seen)) == (3, 3)
    assert seen[-1] == (3, found.objective)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ridge": 0.0}, "the ridge ρ is positive and finite, got 0.0; to interpolate use fit"),
        ({"ridge": math.inf}, "the ridge ρ is positive and finite"),
        ({"tol": 0.0}, "tol and max_steps are positive"),
        ({"max_steps": 0}, "tol and max_steps are positive"),
        ({"r": torch.zeros(11, 2)}, r"targets are real and of shape \(12, 2\) on cpu, got torch.float32 of shape \(11, 2\)"),
        ({"r": torch.zeros(12, 2, dtype=torch.int64)}, "targets are real .* got torch.int64"),
        ({"r": torch.full((12, 2), math.nan)}, "the target of sample 0 is not finite"),
        ({"offset": torch.zeros(12, 2)}, "offset is for cross-entropy"),
        ({"loss": "cross-entropy"}, "cross-entropy needs offset"),
        (
            {"loss": "cross-entropy", "offset": torch.full((12, 2), math.inf), "r": torch.zeros(12, dtype=torch.int64)},
            "the offset of sample 0 is not finite",
        ),
        (
            {"loss": "cross-entropy", "offset": torch.zeros(12, 2), "r": torch.zeros(12)},
            r"cross-entropy takes 12 integer labels 0..1 on cpu, got torch.float32 of shape \(12,\)",
        ),
        (
            {"loss": "cross-entropy", "offset": torch.zeros(12, 2), "r": torch.arange(12) % 3},
            "cross-entropy takes 12 integer labels 0..1 .* from 0 to 2",
        ),
        ({"start": {"0": torch.zeros(7, 5)}}, "start has blocks .*, these features have"),
        ({"start": {"0": torch.full((7, 5), math.nan), "2": torch.zeros(2, 8)}}, "start has blocks that are not finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted_is_refused(changes: dict[str, Any], message: str) -> None:
    feats, r = network()
    given = {"r": r, "ridge": 1.0, "structure": at.Left(), **changes}
    with pytest.raises(at.TangentError, match=f"proximal_gradient: {message}"):
        at.solvers.proximal_gradient(feats, **given)


def test_an_unknown_loss_is_refused() -> None:
    feats, r = network()
    with pytest.raises(at.TangentError, match="proximal_gradient: loss is squared or cross-entropy, got 'hinge'"):
        _smooth(feats, r, "hinge", None, 1.0)


def test_a_structure_without_a_proximal_operator_is_refused_by_name() -> None:
    case = problem(3, c=2, shapes=reference.KERNEL, modes=reference.KERNEL_MODES)
    with pytest.raises(at.TangentError, match=r"proximal: Modes has a proximal operator with one mode only; use fit"):
        at.solvers.proximal_gradient(case.feats, case.r, structure=at.Modes(), ridge=1.0)

    class Own(at.structures.BlockStructure):
        block_solution = at.Fixed.block_solution
        block_dual = at.Fixed.block_dual

    class Whole(at.structures.Structure):
        solution = at.Fixed.solution
        dual = at.Fixed.dual

    with pytest.raises(
        at.TangentError, match=r"proximal: Own has no proximal operator; write block_proximal, or use fit"
    ):
        Own().proximal(matrices(0), 1.0)
    with pytest.raises(at.TangentError, match=r"proximal: Whole has no proximal operator; write proximal, or use fit"):
        Whole().proximal(matrices(0), 1.0)


@pytest.mark.parametrize("step", [0.0, -1.0, math.inf])
@pytest.mark.parametrize("name", CURVED)
def test_a_step_that_is_not_positive_is_refused(name: str, step: float) -> None:
    with pytest.raises(at.TangentError, match="proximal: the step is positive and finite"):
        CURVED[name](at.Quadratic(1.0), at.Quadratic(1.0)).proximal(matrices(0), step)
