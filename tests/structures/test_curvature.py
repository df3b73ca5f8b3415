"""The curvature of every regularizer against finite differences, at the hardest points."""

from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import adaptive_tangents as at
from draws import examples
from finite_differences import derivative
from theory_reference import CURVED as STRUCTURES

every_structure = pytest.mark.parametrize("name", STRUCTURES)
few = examples(8)
seeds = st.integers(0, 10_000)
strengths = st.floats(-2, 2).map(lambda x: 10.0**x)
scales = st.floats(-2, 2).map(lambda x: 10.0**x)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(matrices: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([matrices[name].flatten() for name in sorted(matrices)])


def orthogonal(seed: int, rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(normal(seed, rows, columns)).Q


def with_values(seed: int, o: int, i: int, values: list[float]) -> Tensor:
    """A matrix (o, i) with these singular values, the rest zero."""
    k = len(values)
    return (
        orthogonal(seed, o, k) @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ orthogonal(seed + 1, i, k).mT
    )


# Matrices of unit size at which the Hessian has a limit.
MATRICES: dict[str, Callable[[int], Tensor]] = {
    "wide": lambda seed: normal(seed, 2, 5),
    "tall": lambda seed: normal(seed, 5, 3),
    "square": lambda seed: normal(seed, 4, 4),
    "column": lambda seed: normal(seed, 4, 1),
    "repeated": lambda seed: with_values(seed, 5, 4, [2.0, 1.0, 1.0, 1.0]),
    "nearly repeated": lambda seed: with_values(seed, 4, 5, [1.0, 1.0 + 1e-9, 0.5, 0.5 + 1e-4]),
    "orthogonal": lambda seed: orthogonal(seed, 4, 4),
    "rank one of five": lambda seed: with_values(seed, 5, 6, [1.5]),
    "rank two, tall": lambda seed: with_values(seed, 6, 3, [2.0, 1e-3]),
    "rank two, repeated": lambda seed: with_values(seed, 4, 4, [1.0, 1.0]),
    "zero": lambda seed: torch.zeros(3, 4, dtype=torch.float64),
    "a row and a column of zeros": lambda seed: (
        normal(seed, 4, 4) * (torch.arange(4) > 0) * (torch.arange(4) > 0)[:, None]
    ),
}


@pytest.mark.parametrize("matrix", MATRICES)
@every_structure
@examples(2)
@given(seed=seeds, one=strengths, other=strengths, scale=scales)
def test_curvature_is_the_derivative_of_the_gradient(
    name: str, matrix: str, seed: int, one: float, other: float, scale: float
) -> None:
    structure = STRUCTURES[name](at.Quadratic(one * scale**2), at.Quadratic(other * scale**2))
    b = {"w": scale * MATRICES[matrix](seed), "v": scale * normal(seed + 3, 2, 3)}
    x = {key: scale * normal(seed + 5, *part.shape) for key, part in b.items()}

    def gradient(t: float) -> Tensor:
        return flat(structure.gradient({key: part + t * x[key] for key, part in b.items()}))

    curvature = structure.solution(b).curvature
    assert curvature is not None
    derivative(gradient, 2e-4).check(flat(curvature(x)))


@every_structure
@few
@given(seed=seeds, one=strengths, other=strengths)
def test_curvature_is_the_second_difference_of_the_penalty(name: str, seed: int, one: float, other: float) -> None:
    structure = STRUCTURES[name](at.Quadratic(one), at.Quadratic(other))
    b, x = (
        {"w": normal(seed, 4, 3), "v": normal(seed + 1, 1, 2)},
        {"w": normal(seed + 2, 4, 3), "v": normal(seed + 3, 1, 2)},
    )

    def along(t: float) -> float:
        return structure.penalty({key: part + t * x[key] for key, part in b.items()})

    curvature = structure.solution(b).curvature
    assert curvature is not None
    step = 1e-3  # well below the √λ = 0.1 over which the weakest penalty bends
    derivative(along, step, order=2).check(float((flat(curvature(x)) * flat(x)).sum()))


@every_structure
@few
@given(seed=seeds, one=strengths, scale=scales)
def test_curvature_is_symmetric_and_linear_and_along_rotations_is_what_invariance_says(
    name: str, seed: int, one: float, scale: float
) -> None:
    """⟨Y, H X⟩ = ⟨H Y, X⟩; for spectral Ω̃, H[AB] = A∇Ω̃ for every antisymmetric A, because ∇Ω̃(QB) = Q∇Ω̃(B)."""
    structure = STRUCTURES[name](at.Quadratic(one), at.Quadratic(2 * one))
    b = {"w": scale * normal(seed, 5, 3)}
    x, y = ({"w": normal(seed + k, 5, 3)} for k in (1, 2))
    curvature = structure.solution(b).curvature
    assert curvature is not None
    size = float(x["w"].norm() * y["w"].norm())
    assert float((y["w"] * curvature(x)["w"]).sum()) == pytest.approx(
        float((curvature(y)["w"] * x["w"]).sum()), abs=1e-12 * size
    )
    both = curvature({"w": 2 * x["w"] - y["w"]})["w"]
    torch.testing.assert_close(both, 2 * curvature(x)["w"] - curvature(y)["w"], rtol=0, atol=1e-11 * size)
    if name in ("Fixed", "Full", "LayerScale", "Left", "Right", "TwoSided"):
        turn = normal(seed + 7, 5, 5)
        turn = turn - turn.mT
        expected = turn @ structure.gradient(b)["w"]
        torch.testing.assert_close(curvature({"w": turn @ b["w"]})["w"], expected, rtol=0, atol=1e-10 * scale)


@every_structure
@few
@given(seed=seeds)
def test_at_zero_every_curvature_is_that_of_the_squared_norm(name: str, seed: int) -> None:
    structure = STRUCTURES[name](at.Quadratic(0.3), at.Absolute(0.2))
    x = {"w": normal(seed, 3, 4)}
    curvature = structure.solution({"w": torch.zeros(3, 4, dtype=torch.float64)}).curvature
    assert curvature is not None
    torch.testing.assert_close(curvature(x)["w"], 2 * x["w"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [name for name in STRUCTURES if name not in ("Fixed", "TwoSided")])
@few
@given(seed=seeds, one=strengths, scale=scales)
def test_convex_structures_have_no_negative_curvature_and_two_absolute_sides_have(
    name: str, seed: int, one: float, scale: float
) -> None:
    b = {"w": scale * normal(seed, 4, 3)}
    x = {"w": normal(seed + 1, 4, 3)}
    curvature = STRUCTURES[name](at.Quadratic(one), at.Quadratic(one)).solution(b).curvature
    assert curvature is not None
    assert float((curvature(x)["w"] * x["w"]).sum()) >= 0
    bent = at.TwoSided(at.Absolute(1e-4 * scale**2)).solution(b).curvature
    assert bent is not None
    assert float((bent(b)["w"] * b["w"]).sum()) < 0


def test_nothing_is_computed_for_a_curvature_that_nobody_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    elasticity = at.Quadratic.elasticity
    monkeypatch.setattr(at.Quadratic, "elasticity", lambda self, u: asked.append(u.shape) or elasticity(self, u))
    b = {"w": normal(0, 4, 3)}
    solution = at.Left(at.Quadratic(1.0)).solution(b)
    before = len(asked)
    assert solution.curvature is not None
    solution.curvature(b)
    once = len(asked)
    solution.curvature(b)
    assert before < once == len(asked)


@few
@given(seed=seeds, one=strengths)
def test_curvature_of_a_single_mode_is_that_of_its_unfolding(seed: int, one: float) -> None:
    structure = at.Modes({"spatial": at.Quadratic(one)}, modes={"w": (("in", 2), ("spatial", 3))})
    b, x = normal(seed, 4, 7), normal(seed + 1, 4, 7)
    curvature = structure.solution({"w": b}).curvature
    assert curvature is not None
    derivative(lambda t: structure.gradient({"w": b + t * x})["w"], 1e-4).check(curvature({"w": x})["w"])
