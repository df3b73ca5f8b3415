"""Fits in the subspaces that features span equal fits in the whole space, for every structure that allows it."""

import importlib

import pytest
import torch

import adaptive_tangents as at
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.features.transforms import Matrix, Scaled, Sides
from adaptive_tangents.solvers.subspaces import Compressed, Kept, Span, Subspace, compressed
from adaptive_tangents.structures.base import Structure
from theory_reference import CURVED, problem

WIDE = ((30, 2, 1), (3, 40, 2), (35, 41, 1), (2, 2, 1))
STRUCTURES = {name: make(at.Quadratic(0.3), at.Quadratic(1.0)) for name, make in CURVED.items()}
STRUCTURES["mixed"] = at.Mixed({"0": at.Diagonal(at.Quadratic(0.3)), "*": at.TwoSided(at.Quadratic(0.3))})


def whole(feats: TangentFeatures, structure: Structure) -> Compressed:
    """Features whose blocks are not compressed."""
    return Compressed(feats, dict.fromkeys(feats.blocks, Subspace()))


def looked_up() -> tuple[TangentFeatures, torch.Tensor]:
    """An embedding of which few rows are used, and a table used both ways."""
    torch.manual_seed(0)

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.table = torch.nn.Embedding(50, 3), torch.nn.Embedding(12, 40)
            self.up = torch.nn.Linear(3, 40)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            hidden = torch.tanh(self.up(self.first(tokens)) + self.table(tokens % 12)).mean(1)
            return (hidden @ self.table.weight.mT)[:, :2]

    model = Tied().double()
    tokens = torch.randint(0, 50, (4, 3))
    return at.tangent_features(model, tokens), torch.randn(4, 2, dtype=torch.float64)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize(("kind", "ridge"), [("factors", 0.0), ("tables", 0.2)])
def test_a_fit_is_the_same_in_the_subspaces_that_its_features_span(
    kind: str, name: str, ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = problem(4, n=5, c=2, shapes=WIDE, scale=4.0)
    feats, r = (case.feats, case.r) if kind == "factors" else looked_up()
    structure = STRUCTURES[name]
    if name == "mixed":
        first, *_ = feats.blocks
        structure = at.Mixed({first: at.Diagonal(at.Quadratic(0.3)), "*": at.TwoSided(at.Quadratic(0.3))})
    options = {"structure": structure, "ridge": ridge, "tol": 1e-13}
    found = at.fit(feats, r, **options)
    monkeypatch.setattr(
        importlib.import_module("adaptive_tangents.solvers.fit"), "compressed", whole
    )  # the package's ``fit`` is the function
    plain = at.fit(feats, r, **options)
    assert found.converged
    assert plain.converged
    assert found.objective == pytest.approx(plain.objective, rel=1e-10)
    assert found.stationarity < 1e-6
    for block in feats.blocks:
        torch.testing.assert_close(found.coefficients[block], plain.coefficients[block], rtol=1e-4, atol=1e-4)
    adapted = [feats.transformed(one.transforms).kernel() for one in (found, plain)]
    torch.testing.assert_close(*adapted, rtol=1e-3, atol=1e-3 * float(adapted[1].abs().max()))
    assert found.structure.penalty(found.coefficients) == pytest.approx(plain.structure.penalty(plain.coefficients))


def test_sides_are_restricted_only_where_their_rotation_leaves_the_penalty_as_it_is() -> None:
    feats = problem(4, n=5, c=2, shapes=WIDE).feats
    names = list(feats.blocks)
    shapes = {
        name: [compressed(feats, structure).features.blocks[block].shape for block in names]
        for name, structure in {
            "both": at.TwoSided(), "right": at.Rows(), "left": at.Columns(), "none": at.Diagonal(), "modes": at.Modes(),
            "mixed": at.Mixed({names[0]: at.Diagonal(), "*": at.Full()}),
        }.items()
    }  # fmt: skip
    assert shapes["both"] == [(10, 2), (3, 10), (10, 5), (2, 2)]
    assert shapes["right"] == [(30, 2), (3, 10), (35, 5), (2, 2)]
    assert shapes["left"] == [(10, 2), (3, 40), (10, 41), (2, 2)]
    assert shapes["none"] == shapes["modes"] == [(30, 2), (3, 40), (35, 41), (2, 2)]
    assert shapes["mixed"] == [(30, 2), (3, 10), (10, 5), (2, 2)]


def test_a_table_keeps_the_rows_looked_up_and_no_basis_is_made_of_them() -> None:
    feats, _ = looked_up()
    found = compressed(feats, at.TwoSided()).subspaces
    assert found["first"].left is None  # 3 units
    assert isinstance(found["first"].right, Kept)
    assert isinstance(found["table"].left, Span)
    assert found["table"].right is None  # looked up, and read out from: all of it


def test_going_down_undoes_going_up_and_what_features_see_is_kept() -> None:
    feats = problem(4, n=5, c=2, shapes=WIDE).feats
    within = compressed(feats, at.TwoSided())
    generator = torch.Generator().manual_seed(0)
    wide = {
        name: torch.randn(block.shape, dtype=torch.float64, generator=generator) for name, block in feats.blocks.items()
    }
    narrow = within.down(wide)
    for name, matrix in within.down(within.up(narrow)).items():
        torch.testing.assert_close(matrix, narrow[name])
    torch.testing.assert_close(feats.inner(wide), within.features.inner(narrow))
    torch.testing.assert_close(feats.kernel(), within.features.kernel())


def test_a_layer_of_4096_units_is_decomposed_at_the_size_of_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    case = problem(4, n=6, c=1, shapes=((4096, 4096, 1),), scale=50.0)
    sizes, svd = [], torch.linalg.svd

    def spied(matrix: torch.Tensor, **options: bool) -> object:
        sizes.append(tuple(matrix.shape))
        return svd(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", spied)
    found = at.fit(case.feats, case.r, structure=at.TwoSided(at.Quadratic(0.1)))
    assert found.converged
    assert set(sizes) == {(6, 6)}
    (name,) = found.coefficients
    assert found.coefficients[name].shape == (4096, 4096)
    assert found.transforms[name].left.directions.shape == (4096, 6)
    torch.testing.assert_close(found.predict(case.feats), case.r, rtol=1e-6, atol=1e-6)


def test_a_start_outside_what_the_features_span_is_projected() -> None:
    case = problem(4, n=8, c=1, shapes=WIDE, scale=4.0)
    first = at.fit(case.feats[:5], case.r[:5], structure=at.TwoSided(at.Quadratic(0.3)))
    other = at.fit(case.feats[3:], case.r[3:], structure=at.TwoSided(at.Quadratic(0.3)), tol=1e-12)
    warm = at.fit(case.feats[3:], case.r[3:], structure=at.TwoSided(at.Quadratic(0.3)), tol=1e-12, start=first)
    assert warm.converged
    assert warm.objective == pytest.approx(other.objective, rel=2e-2)  # local optima of the two sides differ this much


@pytest.mark.parametrize("side", [Scaled(torch.tensor([2.0, 3.0])), Matrix(torch.tensor([[2.0, 1.0], [0.0, 3.0]]))])
def test_any_side_within_a_subspace_is_the_identity_outside_it(side: Scaled | Matrix) -> None:
    basis = Span(torch.linalg.qr(torch.randn(5, 2))[0])
    within = Compressed(problem(4, n=5, c=2, shapes=WIDE).feats, {"w": Subspace(None, basis)})
    found = within.up_transforms({"w": Sides(right=side)})["w"].right.matrix()
    q = basis.columns
    torch.testing.assert_close(q.mT @ found @ q, side.matrix())
    rest = torch.eye(5) - q @ q.mT
    torch.testing.assert_close(found @ rest, rest)
