"""Paths of fits and the held-out errors that choose among them."""

import pytest
import torch
from torch import Tensor

import adaptive_tangents as at
from adaptive_tangents.solvers.model_selection import leave_one_out
from theory_reference import problem

SHAPES = ((6, 5, 2), (5, 6, 1), (3, 1, 0))


@pytest.mark.parametrize("ridge", [0.0, 0.2])
@pytest.mark.parametrize("name", ["Fixed", "TwoSided"])
def test_leave_one_out_residuals_are_those_of_fits_without_each_sample_the_transform_held(
    name: str, ridge: float
) -> None:
    case = problem(3, n=6, c=2, shapes=SHAPES, scale=3.0)
    chosen = at.Fixed() if name == "Fixed" else at.TwoSided(at.Quadratic(0.2))
    found = at.fit(case.feats, case.r, structure=chosen, ridge=ridge, tol=1e-14)
    residuals, adapted = leave_one_out(found), found.transform(case.feats)
    for k in range(6):
        rest = torch.tensor([j for j in range(6) if j != k])
        without = at.fit(adapted[rest], case.r[rest], structure=at.Fixed(), ridge=ridge)
        expected = case.r[k] - without.predict(adapted[torch.tensor([k])])[0]
        torch.testing.assert_close(residuals[k], expected, rtol=1e-5, atol=1e-6)


def test_a_path_gives_the_fits_made_one_by_one_and_the_best_of_them() -> None:
    case = problem(11, n=6, c=2, shapes=((4, 3, 2), (3, 4, 1)), scale=4.0)
    structures = [at.Left(at.Quadratic(strength)) for strength in (1.0, 0.1)]
    path = at.fit_path(case.feats, case.r, structures=structures, ridges=(0.1, 1.0), tol=1e-12, folds=3)
    grid = [(structure, ridge) for ridge in (0.1, 1.0) for structure in structures]
    assert [(found.structure, found.ridge) for found in path.fits] == grid
    for found, (structure, ridge), error in zip(path.fits, grid, path.errors, strict=True):
        alone = at.fit(case.feats, case.r, structure=structure, ridge=ridge, tol=1e-12)
        assert found.objective == pytest.approx(alone.objective, rel=1e-9)
        assert error == pytest.approx(refitted(case.feats, case.r, structure, ridge, folds=3), rel=1e-4)
    (chosen,) = [error for found, error in zip(path.fits, path.errors, strict=True) if found is path.best]
    assert chosen == min(path.errors)
    assert path.criterion == "3-fold squared error"
    assert path.summary().count("*") == 1


def refitted(
    feats: at.TangentFeatures, r: Tensor, structure: at.structures.Structure, ridge: float, folds: int
) -> float:
    """The mean squared error of samples that no fit has seen, fold by fold."""
    total, order = 0.0, torch.randperm(feats.n, generator=torch.Generator().manual_seed(0))
    for held in order.tensor_split(folds):
        kept = torch.tensor([k for k in range(feats.n) if k not in held])
        found = at.fit(feats[kept], r[kept], structure=structure, ridge=ridge, tol=1e-12)
        total += float(((r[held] - found.predict(feats[held])) ** 2).sum())
    return total / feats.n


ADAPTIVE = [at.TwoSided(), at.LayerScale(), at.Full(), at.Rows(), {"block0": at.Fixed(), "*": at.Left()}]


@pytest.mark.parametrize("structure", ADAPTIVE)
def test_what_adapts_is_chosen_by_errors_of_samples_that_its_transform_has_not_seen(structure: object) -> None:
    case = problem(3, n=7, c=1, shapes=((6, 5, 2), (5, 6, 1)), scale=3.0)
    feats, r = case.feats, case.r
    path = at.fit_path(feats, r, structures=[structure, at.Fixed()], ridges=(0.3,), tol=1e-12)
    assert path.criterion == "5-fold squared error"
    assert "transforms and coefficients are refitted without the samples of each fold" in path.summary()
    assert "the least of 2 errors has seen all samples, by the choice" in path.summary()
    for found, error in zip(path.fits, path.errors, strict=True):
        assert error == pytest.approx(refitted(feats, r, found.structure, 0.3, folds=5), rel=1e-4)


def test_the_error_of_a_choice_is_that_of_new_samples_where_adaptation_fits_noise() -> None:
    """Features of noise: with the transform held, leaving one out claims to predict what cannot be predicted."""
    case = problem(9, n=24, c=1, shapes=((12, 12, 1),), scale=1.0)
    r = torch.randn(24, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    strong = at.TwoSided(at.Quadratic(1e-3))
    path = at.fit_path(case.feats, r, structures=[at.Fixed(), strong], ridges=(0.5,))
    noise = float((r**2).mean())
    assert float((leave_one_out(path.fits[1]) ** 2).mean()) < 0.5 * noise
    assert path.errors[1] > 0.7 * noise


@pytest.mark.parametrize("structure", [at.Fixed(), {"*": at.Fixed()}])
def test_what_does_not_adapt_keeps_the_exact_leave_one_out(structure: object) -> None:
    case = problem(3, n=6, c=2, shapes=SHAPES, scale=3.0)
    path = at.fit_path(case.feats, case.r, structures=[structure], ridges=(0.2, 1.0))
    assert path.criterion == "leave-one-out squared error"
    assert "exact: nothing adapts, so no transform has seen the sample left out" in path.summary()
    for found, error in zip(path.fits, path.errors, strict=True):
        assert error == pytest.approx(refitted(case.feats, case.r, at.Fixed(), found.ridge, folds=6), rel=1e-8)


@pytest.mark.parametrize("c", [1, 3])
def test_as_many_folds_as_samples_leave_one_out(c: int) -> None:
    case = problem(5, n=5, c=c, shapes=((4, 3, 1),), scale=2.0)
    path = at.fit_path(case.feats, case.r, structures=[at.Fixed()], ridges=(0.3,), folds=5)
    exact = at.fit_path(case.feats, case.r, structures=[at.Fixed()], ridges=(0.3,))
    assert path.errors[0] == pytest.approx(exact.errors[0], rel=1e-9)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, max(c, 2), (5,), generator=generator)
    offset = torch.zeros(5, c, dtype=torch.float64)
    entropies = at.fit_path(
        case.feats, labels, structures=[at.Fixed(), at.Left()], ridges=(0.1, 1e6), loss="cross-entropy", offset=offset
    )
    assert entropies.criterion == "5-fold cross-entropy"
    # With an infinite ridge nothing is predicted: the loss is the log of the number of classes.
    assert entropies.errors[2] == pytest.approx(float(torch.tensor(float(max(c, 2))).log()), rel=1e-3)


def test_grids_and_folds_that_cannot_be_are_refused() -> None:
    case = problem(1, n=4)
    with pytest.raises(at.TangentError, match="fit_path: give one or more structures, and one or more ridges"):
        at.fit_path(case.feats, case.r, structures=[])
    for folds in (1, 5):
        with pytest.raises(at.TangentError, match=rf"fit_path: folds are 2\.\.n = 4, got {folds}"):
            at.fit_path(case.feats, case.r, structures=[at.Fixed()], folds=folds)
    entropy = at.fit(case.feats, torch.tensor([0, 1, 0, 1]), loss="cross-entropy", offset=torch.zeros(4, 1), ridge=1.0)
    with pytest.raises(at.TangentError, match="the closed form is for squared error"):
        leave_one_out(entropy)
    doubled = case.feats[torch.tensor([0, 1, 1])]
    with pytest.raises(at.TangentError, match="some constraints follow from others"):
        leave_one_out(at.fit(doubled, case.r[torch.tensor([0, 1, 1])]))
