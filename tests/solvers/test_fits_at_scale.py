"""Fits and kernel regression of very large and very small features and targets: right, or an error in words."""

import pytest
import torch

import adaptive_tangents as at
from adaptive_tangents.features.transforms import Sides
from theory_reference import problem

CASE = problem(3, n=6, c=2, shapes=((4, 3, 1), (3, 2, 0)), scale=2.0)
EXPONENTS = (-900, -600, -300, -100, -30, 30, 100, 300, 600, 900)  # of two: scaling changes no digit


def scaled(exponent: int) -> at.TangentFeatures:
    return CASE.feats.transformed(dict.fromkeys(CASE.feats.blocks, Sides(scale=2.0**exponent)))


@pytest.mark.parametrize("form", ["dense", "matrix-free"])
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_kernel_regression_is_the_same_at_every_scale(exponent: int, form: str) -> None:
    kernel, r, ridge = CASE.feats.kernel(), CASE.r, 0.25
    plain = at.kernel_regression(kernel, r, ridge=ridge, form=form)
    found = at.kernel_regression(kernel * 2.0**exponent, r, ridge=ridge * 2.0**exponent, form=form)
    torch.testing.assert_close(found.dual * 2.0**exponent, plain.dual, rtol=1e-9, atol=0)
    assert found.ridge == ridge * 2.0**exponent
    assert found.objective * 2.0**exponent == pytest.approx(plain.objective, rel=1e-9)
    assert found.converged
    small = at.kernel_regression(kernel, r * 2.0 ** (exponent // 2), ridge=ridge, form=form)
    torch.testing.assert_close(small.dual / 2.0 ** (exponent // 2), plain.dual, rtol=1e-9, atol=0)
    assert small.converged
    assert small.residual == pytest.approx(plain.residual, abs=1e-12)


@pytest.mark.parametrize("on_kernels", [False, True])
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_a_fit_is_right_at_every_scale_or_says_that_it_cannot_be(exponent: int, on_kernels: bool) -> None:
    r, ridge = CASE.r, 0.25
    plain = at.fit(CASE.feats, r, structure=at.Fixed(), ridge=ridge)
    for of_features, of_targets in ((exponent, 0), (0, exponent), (exponent, exponent)):
        feats = scaled(of_features)
        try:
            given = feats.kernel() if on_kernels else feats
            found = at.fit(given, r * 2.0**of_targets, structure=at.Fixed(), ridge=ridge * 2.0 ** (2 * of_features))
        except (at.TangentError, OverflowError) as error:
            assert isinstance(error, OverflowError) or "scale" in str(error) or "the ridge" in str(error)  # noqa: PT017
            assert abs(exponent) > 100
            continue
        unit = 2.0 ** (of_targets - 2 * of_features)
        torch.testing.assert_close(found.dual / unit, plain.dual, rtol=1e-9, atol=0)
        assert found.objective / 2.0 ** (2 * of_targets - 2 * of_features) == pytest.approx(plain.objective, rel=1e-9)
        assert found.converged


@pytest.mark.parametrize("form", ["dense", "matrix-free"])
def test_adaptive_fits_agree_where_features_and_targets_grow_together(form: str) -> None:
    plain = at.fit(CASE.feats, CASE.r, ridge=0.25, tol=1e-12)
    for exponent in (-40, -20, 20, 40):
        found = at.fit(
            scaled(exponent), CASE.r * 2.0**exponent, ridge=0.25 * 2.0 ** (2 * exponent), tol=1e-12, form=form
        )
        assert found.objective == pytest.approx(plain.objective, rel=1e-9)


EXTREMES = {
    "large features": (lambda: at.fit(scaled(250), CASE.r), "fit: features are of size .*; scale both, e.g. output_fn"),
    "small features": (lambda: at.fit(scaled(-700), CASE.r, ridge=1.0), "fit: features are of size"),
    "large targets": (lambda: at.fit(CASE.feats, CASE.r * 1e150), "fit: targets are of size 3e\\+150"),
    "small targets": (lambda: at.fit(CASE.feats, CASE.r * 1e-150, ridge=1.0), "fit: targets are of size 3e-150"),
    "large coefficients": (
        lambda: at.fit(scaled(-150), CASE.r * 1e50, ridge=1.0),
        r"fit: coefficients are of size .* \(features .*, targets 3e\+50\)",
    ),
    "labels": (
        lambda: at.fit(
            scaled(700),
            torch.tensor([0, 1] * 3),
            loss="cross-entropy",
            offset=torch.zeros(6, 2, dtype=torch.float64),
            ridge=1.0,
        ),
        "fit: features are of size",
    ),
    "a kernel": (
        lambda: at.fit(CASE.feats.kernel() * 1e200, CASE.r, structure=at.Fixed()),
        "fit: features are of size .*",
    ),
    "proximal steps": (
        lambda: at.solvers.proximal_gradient(scaled(700), CASE.r, ridge=1.0),
        "proximal_gradient: features are of size",
    ),
    "a path": (lambda: at.fit_path(scaled(700), CASE.r, ridges=(1.0,)), "fit_path: features are of size"),
    "a small ridge": (
        lambda: at.fit(CASE.feats, CASE.r, ridge=1e-320, structure=at.Fixed()),
        "fit: the objective is beyond float64's range; scale features and targets, or use a larger ridge",
    ),
    "float32 kernels": (
        lambda: at.fit(scaled(100), CASE.r, structure=at.Fixed(), form="matrix-free", ridge=1.0),
        "fit: the kernel is too large for single precision; use form='dense'",
    ),
}


@pytest.mark.parametrize("case", EXTREMES)
def test_what_float64_cannot_square_is_refused_with_what_to_scale(case: str) -> None:
    call, words = EXTREMES[case]
    with pytest.raises(at.TangentError, match=f"^{words}"):
        call()
