"""Fits and certificates where features are zero, or where the coefficients given miss the targets."""

import math

import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
from adaptive_tangents.features.transforms import Sides
from adaptive_tangents.solvers import certify
from adaptive_tangents.solvers.proximal import proximal_gradient
from theory_reference import problem

CASE = problem(3, n=8, c=2, shapes=((4, 3, 1), (3, 5, 0)))
ZERO = CASE.feats.transformed({name: Sides(scale=0.0) for name in CASE.feats.blocks})
STRUCTURES: dict[str, at.structures.Structure] = {
    "Fixed": at.Fixed(), "Left": at.Left(), "TwoSided": at.TwoSided(), "Diagonal": at.Diagonal(),
    "LayerScale": at.LayerScale(), "Full": at.Full(),
}  # fmt: skip
FORMS = ("dense", "primal", "matrix-free")
LABELS = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])


def ones() -> dict[str, Tensor]:
    return {name: torch.ones(block.shape, dtype=torch.float64) for name, block in CASE.feats.blocks.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_coefficients_that_zero_features_do_not_need_are_not_stationary(name: str, form: str) -> None:
    found = certify(ZERO, CASE.r, coefficients=ones(), structure=STRUCTURES[name], ridge=0.1, form=form)  # type: ignore[arg-type]
    assert found.objective > float((CASE.r**2).sum()) / 0.1 + 1  # what zero coefficients cost
    assert not found.converged
    assert found.stationarity == math.inf
    assert "NOT converged" in found.summary()
    assert certify(ZERO, CASE.r, coefficients={k: 0 * b for k, b in ones().items()}, ridge=0.1).converged


@pytest.mark.parametrize("solver", ["newton", "anderson", "alternation"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_a_fit_of_zero_features_is_zero_wherever_it_starts(name: str, solver: str) -> None:
    start = at.fit(CASE.feats, CASE.r, structure=STRUCTURES[name], ridge=0.1)
    for form in FORMS:
        found = at.fit(ZERO, CASE.r, structure=STRUCTURES[name], ridge=0.1, start=start, solver=solver, form=form)  # type: ignore[arg-type]
        assert found.converged
        assert found.stationarity == 0
        assert not any(bool(matrix.any()) for matrix in found.coefficients.values())
        assert found.objective == pytest.approx(float((CASE.r**2).sum()) / 0.1, rel=1e-12)


def test_targets_that_no_feature_reaches_leave_the_model_at_zero_wherever_it_starts() -> None:
    half = at.features.summands.Dense(
        CASE.feats.blocks["block0"].features() * (torch.arange(8) < 4)[:, None, None, None]
    )
    blocks = {"block0": CASE.feats.blocks["block0"].of([half])}
    feats = at.TangentFeatures(8, 2, blocks, {s.parameter: s.shape for s in blocks["block0"].slots})
    r = CASE.r * (torch.arange(8) >= 4)[:, None]
    start = at.fit(feats, CASE.r, structure=at.Left(), ridge=0.1)
    found = at.fit(feats, r, structure=at.Left(), ridge=0.1, start=start)
    assert found.converged
    assert found.objective == pytest.approx(float((r**2).sum()) / 0.1, rel=1e-12)


def test_cross_entropy_of_zero_features_is_that_of_the_offset() -> None:
    offset = torch.zeros(8, 2, dtype=torch.float64)
    found = at.fit(ZERO, LABELS, loss="cross-entropy", offset=offset, ridge=0.5)
    assert found.converged
    assert found.objective == pytest.approx(8 * math.log(2) / 0.5, rel=1e-12)


@pytest.mark.parametrize("form", ["auto", "dense", "matrix-free"])
def test_interpolation_with_zero_features_says_that_they_are_zero(form: str) -> None:
    words = "the features are zero, so no β interpolates targets that are not; use a positive ridge"
    with pytest.raises(at.TangentError, match=f"^fit: {words}"):
        at.fit(ZERO, CASE.r, form=form)  # type: ignore[arg-type]
    with pytest.raises(at.TangentError, match=f"^certify: {words}"):
        certify(ZERO, CASE.r, coefficients=ones(), form=form)  # type: ignore[arg-type]
    assert at.fit(ZERO, 0 * CASE.r, form=form).converged  # type: ignore[arg-type]


def test_a_module_trained_on_dead_units_is_not_called_converged() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2, bias=False)).double()
    x, r = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    with torch.no_grad():
        model[0].bias -= 100  # type: ignore[operator]
    adaptive = at.TangentModule(model, at.TwoSided())
    given = {name: torch.ones(block.shape, dtype=torch.float64) for name, block in adaptive.blocks.items()}
    adaptive.load_fit(certify(at.tangent_features(model, x), r, coefficients=given, structure=at.TwoSided(), ridge=0.1))
    found = adaptive.as_fit(x, r, ridge=0.1)
    assert not found.converged
    assert found.stationarity == math.inf


def test_proximal_steps_on_zero_features_end_at_the_zero_model() -> None:
    found = proximal_gradient(ZERO, CASE.r, structure=at.Left(), ridge=0.1)
    assert found.converged
    assert found.objective == pytest.approx(float((CASE.r**2).sum()) / 0.1, rel=1e-12)


@pytest.mark.parametrize("form", ["dense", "matrix-free"])
@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_given_coefficients_that_miss_the_targets_are_what_is_blamed_for_it(factor: float, form: str) -> None:
    given = {name: factor * matrix for name, matrix in ones().items()}
    found = certify(CASE.feats, CASE.r, coefficients=given, structure=at.Left(), form=form)  # type: ignore[arg-type]
    outputs = sum(
        torch.einsum("ncoi,oi->nc", block.features(), given[name]) for name, block in CASE.feats.blocks.items()
    )
    miss = float((outputs - CASE.r).norm() / CASE.r.norm())
    assert not found.converged
    assert found.feasibility == pytest.approx(miss, rel=1e-9)
    assert found.reason == f"coefficients as given, which miss the targets by {miss:.1e} relative"
    assert found.gap is None
    assert "no gap: the targets are missed" in found.summary()
    assert found.lower_bound_reason != "the targets are zero"
