"""Sides of few directions against dense least squares, whatever form the features have (theory §7)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import adaptive_tangents as at
import theory_reference as reference
from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.summands import Dense, Flipped, Lookup, Outer, Shared, Summand, Weighted
from adaptive_tangents.features.transforms import Matrix, Update
from adaptive_tangents.measures import few_directions, terms
from adaptive_tangents.measures.explain import explanations

N, T, C, O, I = 16, 2, 2, 5, 6
Array = NDArray[np.float64]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * len(shape)), dtype=torch.float64)


def lookup(seed: int = 0, rank: int = 0, size: int = I) -> Lookup:
    index = torch.randint(size, (N, T), generator=torch.Generator().manual_seed(seed))
    return Lookup(draw(N, T, C, O, seed=seed), index, draw(N, T, seed=seed), draw(N, T, rank), draw(rank, size))


def outer(seed: int = 0, positions: int = T) -> Outer:
    return Outer(draw(N, positions, C, O, seed=seed), draw(N, positions, I, seed=seed + 1))


FLIPPED = Flipped(draw(N, T, C, I, seed=2), draw(N, T, O, seed=3))
KINDS: dict[str, list[Summand]] = {
    "outer": [outer()],
    "many positions": [outer(positions=9)],
    "lookup": [lookup()],
    "moved lookup": [lookup(rank=2)],
    "flipped": [FLIPPED],
    "dense": [Dense(draw(N, C, O, I))],
    "tied table": [lookup(seed=4), FLIPPED],
    "weighted": [Weighted(draw(O, I), (outer(),))],
    "shared": [outer(seed=5), Shared(draw(N, C, 3), draw(3, O, I))],
    "of everything": [outer(seed=6), lookup(seed=7), FLIPPED, Dense(draw(N, C, O, I, seed=8))],
}


def block(kind: str) -> Block:
    return Block("b", (O, I), ()).of(KINDS[kind])


def feats(made: Block) -> at.TangentFeatures:
    return at.TangentFeatures(made.samples, made.outputs, {"b": made}, {"b": made.shape})


def changed(made: Block, seed: int = 1, spread: float = 0.4) -> Block:
    """The block after a transform near the identity, with noise."""
    left, right = (torch.eye(size, dtype=torch.float64) + spread * draw(size, size, seed=seed) for size in made.shape)
    noise = Dense(0.2 * draw(*made.features().shape, seed=seed + 9))
    return made.of([*made.transformed(Matrix(left), Matrix(right)).summands, noise])


@pytest.fixture
def rows_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """No lookup is multiplied out."""
    monkeypatch.setattr(terms, "_LISTED", 0)


# ------------------------------------------------------------------------------------------------------ sums by terms


@pytest.mark.usefixtures("rows_kept")
@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_moments_and_products_of_every_kind_are_those_of_the_features(first: str, second: str) -> None:
    a, b = block(first), block(second)
    x, y = a.features(), b.features()
    one, two = terms.terms_of(a), terms.terms_of(b)
    assert terms.inner(one, two) == pytest.approx(float((x * y).sum()), rel=1e-10, abs=1e-9)
    left, right = draw(O, 3), draw(I, 4)
    for columns, axis in ((left, "o"), (right, "i")):
        turned = [one, two] if axis == "o" else [[t.flipped for t in each] for each in (one, two)]
        narrow = [[t.onto(columns, None) for t in each] for each in turned]
        spec = ("ncoi,ncpi,po->oo" if axis == "o" else "").replace("po->oo", "pk->ok")
        spec = spec if axis == "o" else "ncoi,ncoj,jk->ik"
        torch.testing.assert_close(terms.moment(turned[0], narrow[1]), torch.einsum(spec, x, y, columns))
        both = torch.einsum(
            spec.replace("->", ",").replace(",ok", ",ol->lk").replace(",ik", ",il->lk"), x, y, columns, columns
        )
        torch.testing.assert_close(terms.moment(narrow[0], narrow[1]), both)
    core = terms.values(terms.joined([t.onto(left, right) for t in one])).expand(N, C, 3, 4)
    torch.testing.assert_close(core, left.mT @ x @ right)


# --------------------------------------------------------------------------------------------------------- one side


def reduced_rank(a: Array, b: Array, rank: int, strength: float, scale: float) -> tuple[float, Array]:
    """The least Σ‖B − MA‖² + μ‖M − σI‖² over M − σI of a rank, and its M; features (n, c, o, i)."""
    units = a.shape[2]
    square, cross = (np.einsum("ncoi,ncpi->op", x, a) for x in (a, b))
    root = np.linalg.cholesky(square + strength * np.trace(square) / units * np.eye(units))
    u, values, vt = np.linalg.svd(np.linalg.solve(root, (cross - scale * square).T).T)
    change = (u[:, :rank] * values[:rank]) @ vt[:rank] @ np.linalg.inv(root)
    error = scale**2 * np.trace(square) - 2 * scale * np.trace(cross) - (values[:rank] ** 2).sum() + (b**2).sum()
    return float(error), scale * np.eye(units) + change


def parts_of(n: int) -> tuple[list[int], list[int]]:
    """The samples that are fitted, and those reported on."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    quarter = max(2, n // 4)
    return sorted(order[2 * quarter :]), sorted(order[quarter : 2 * quarter])


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("strength", [1e-6, 0.1, 3.0])
@pytest.mark.parametrize("side", ["left", "right"])
def test_one_side_is_reduced_rank_regression(side: str, strength: float, rank: int) -> None:
    before, after = block("outer"), changed(block("outer"))
    structure = at.Left() if side == "left" else at.Right()
    found = at.explain(feats(before), feats(after), structure, strengths=(strength,), rank=rank)
    assert found.ranks == {"b": rank}
    fitted = parts_of(N)[0]
    a, b = (x.features()[fitted].numpy() for x in (before, after))
    if side == "right":
        a, b = np.swapaxes(a, 2, 3), np.swapaxes(b, 2, 3)
    sides = found.transforms["b"]
    matrix = getattr(sides, side).matrix().numpy()
    least, wanted = reduced_rank(a, b, rank, strength, sides.scale)
    np.testing.assert_allclose(sides.scale * matrix, wanted, rtol=1e-6, atol=1e-8)
    assert np.linalg.matrix_rank(matrix - np.eye(len(wanted)), 1e-8) == rank
    for step in (-1e-2, 1e-2):  # the scale is best, too
        assert reduced_rank(a, b, rank, strength, sides.scale + step)[0] > least


# --------------------------------------------------------------------------------------------------------- two sides


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_each_of_two_sides_is_reduced_rank_regression_given_the_other(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"LAST": 300, "ROUNDS": 300, "_CLOSE": 1e-9}.items():
        monkeypatch.setattr(few_directions, name, value)
    before, after = block("outer"), changed(block("outer"))
    strength, fitted = 0.1, parts_of(N)[0]
    found = at.explain(feats(before), feats(after), at.TwoSided(), strengths=(strength,), rank=rank).transforms["b"]
    left, right = (getattr(found, side).matrix().numpy() for side in ("left", "right"))
    a, b = (x.features()[fitted].numpy() for x in (before, after))
    turned = [np.swapaxes(x, 2, 3) for x in (left @ a, b)]
    for moved, wanted, side, most in ((a @ right.T, b, left, 5e-3), (turned[0], turned[1], right, 1e-3)):
        best, _ = reduced_rank(moved, wanted, rank, strength, found.scale)
        ridge = strength * (moved**2).sum() / len(side)
        change = found.scale * (side - np.eye(len(side)))
        reached = ((wanted - found.scale * side @ moved) ** 2).sum() + ridge * (change**2).sum()
        assert best * (1 - 1e-9) <= reached <= best * (1 + most)  # the right side was the last


def test_full_rank_is_the_alternation_of_dense_least_squares() -> None:
    before, after = block("outer"), changed(block("outer"))
    strength = 0.05
    found = at.explain(feats(before), feats(after), at.TwoSided(), strengths=(strength,), rank=None).transforms["b"]
    fitted = parts_of(N)[0]
    a, b = (x.features()[fitted].numpy() for x in (before, after))
    left, right, previous = np.eye(O), np.eye(I), np.inf
    for _ in range(30):
        moved = a @ right.T
        left = reference.best_left(moved, b, strength * (moved**2).sum() / O)
        moved = left @ a
        right = reference.best_right(moved, b, strength * (moved**2).sum() / I)
        current = np.linalg.norm(left) + np.linalg.norm(right)
        if abs(current - previous) <= 1e-4 * current:
            break
        previous = current
    assert found.scale == 1.0
    np.testing.assert_allclose(found.left.matrix().numpy(), left, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(found.right.matrix().numpy(), right, rtol=1e-7, atol=1e-8)


@pytest.mark.usefixtures("rows_kept")
@pytest.mark.parametrize("wide", [2, 64], ids=["narrowed", "whole"])
@pytest.mark.parametrize("kind", KINDS)
def test_r2_is_that_of_the_transform_applied_to_the_features(
    kind: str, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_directions, "WIDE", wide)
    before, after = block(kind), changed(block(kind))
    for structure in (at.Left(), at.Right(), at.TwoSided(), at.LayerScale()):
        found = at.explain(feats(before), feats(after), structure, strengths=(0.1, 1.0), rank=(1, 2))
        moved = feats(before).transformed(found.transforms).blocks["b"].features()
        for samples, told in zip(parts_of(N), (found.fit_r2["b"], found.r2["b"]), strict=True):
            a, b, m = (x[samples].numpy() for x in (before.features(), after.features(), moved))
            assert told == pytest.approx(reference.r2(a, b, m), abs=1e-8)
        assert found.total == pytest.approx(found.r2["b"])
        if found.ranks:
            assert set(found.r2_by_rank["b"]) == {1, 2}
            assert found.r2_by_rank["b"][found.ranks["b"]] == found.r2["b"]


def test_fourth_moments_and_products_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = block("many positions"), changed(block("many positions"))
    one = at.explain(feats(before), feats(after), at.TwoSided())
    monkeypatch.setattr(few_directions, "_TABLE", 0)
    other = at.explain(feats(before), feats(after), at.TwoSided())
    assert other.r2_by_rank["b"] == pytest.approx(one.r2_by_rank["b"], abs=1e-9)
    assert (other.ranks, other.strengths) == (one.ranks, one.strengths)


def test_lookups_kept_and_multiplied_out_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = block("tied table"), changed(block("tied table"))
    one = at.explain(feats(before), feats(after), at.TwoSided())
    monkeypatch.setattr(terms, "_LISTED", 0)
    assert at.explain(feats(before), feats(after), at.TwoSided()).r2_by_rank["b"] == pytest.approx(
        one.r2_by_rank["b"], abs=1e-9
    )


def test_samples_in_many_parts_or_kept_nowhere_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = block("tied table"), changed(block("tied table"))
    one = at.explain(feats(before), feats(after), at.TwoSided())
    monkeypatch.setattr(few_directions, "_ENTRIES", 1)
    monkeypatch.setattr(few_directions, "_KEPT", 0)
    other = at.explain(feats(before), feats(after), at.TwoSided())
    assert other.r2_by_rank["b"] == pytest.approx(one.r2_by_rank["b"], abs=1e-9)


# ------------------------------------------------------------------------------------------------------- wide sides


def wide_problem(
    n: int = 60, o: int = 90, i: int = 110, rank: int = 3
) -> tuple[at.TangentFeatures, at.TangentFeatures]:
    """Features of wide sides, and what 0.5 · (I + UVᵀ) on both sides makes of them."""
    spread = torch.linspace(1, 0.02, i, dtype=torch.float64) ** 2
    before = Block("b", (o, i), (), outer=Outer(draw(n, 3, 1, o), draw(n, 3, i, seed=1) * spread))
    sides = [Update(draw(d, rank, seed=2) / d**0.5, draw(d, rank, seed=3) / d**0.5) for d in (o, i)]
    return feats(before), feats(before.transformed(sides[0], sides[1], 0.5))


def test_few_directions_of_wide_sides_are_found_without_forming_features(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = wide_problem()
    monkeypatch.setattr(Outer, "features", lambda *_: pytest.fail("features were formed"))
    found = at.explain(before, after, at.TwoSided())
    assert found.r2["b"] > 0.97
    assert found.ranks["b"] > 2
    assert found.r2_by_rank["b"][4] > 0.9
    assert found.r2_by_rank["b"][1] < found.r2_by_rank["b"][2] < found.r2["b"]
    sides = found.transforms["b"]
    assert sides.left.written.shape == (90, found.ranks["b"])
    assert sides.right.read.shape == (110, found.ranks["b"])


@pytest.mark.parametrize("formed", [1024, 8], ids=["moments formed", "only their products"])
def test_a_narrowed_side_loses_little(formed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = wide_problem(n=80)
    noisy = after.blocks["b"].of([*after.blocks["b"].summands, Dense(0.1 * draw(80, 1, 90, 110, seed=6))])
    monkeypatch.setattr(few_directions, "_FORMED", formed)
    found = at.explain(before, feats(noisy), at.TwoSided(), rank=(2, 4))
    monkeypatch.setattr(few_directions, "WIDE", 200)
    whole = at.explain(before, feats(noisy), at.TwoSided(), rank=(2, 4))
    assert found.total == pytest.approx(whole.total, abs=0.02)


@pytest.mark.parametrize("strengths", [(1e-4,), (1e-8, 1e-4)])
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.5, -0.7])
@pytest.mark.parametrize("kind", ["Left", "Right"])
def test_a_narrowed_side_holds_the_directions_of_any_scale_at_few_strengths(
    kind: str, scale: float, strengths: tuple[float, ...]
) -> None:
    d = 100
    shape = (d, 20) if kind == "Left" else (20, d)
    before = Block("b", shape, (), outer=Outer(draw(200, 3, 2, shape[0]), draw(200, 3, shape[1], seed=1)))
    for seed in (2, 3, 4):
        moved = scale * torch.eye(d, dtype=torch.float64) + draw(d, 2, seed=seed) @ draw(2, d, seed=seed + 10) / d**0.5
        side = Matrix(moved)
        after = before.transformed(*((side, None) if kind == "Left" else (None, side)))
        structure = at.Left() if kind == "Left" else at.Right()
        found = at.explain(feats(before), feats(after), structure, rank=2, strengths=strengths)
        assert found.r2["b"] > 0.9995


def test_entries_that_no_sample_looks_up_are_left_alone() -> None:
    size = 70_000
    part = lookup(size=size)
    moved = replace(part, backward=part.backward + 0.5 * draw(N, T, C, O, seed=9))
    before, after = (Block("b", (O, size), (), lookup=each) for each in (part, moved))
    found = at.explain(feats(before), feats(after), at.TwoSided(), rank=(1, 2)).transforms["b"]
    unused = torch.ones(size, dtype=torch.bool)
    unused[part.index.flatten()] = False
    assert (found.right.written[unused] == 0).all()
    assert found.right.read[~unused].abs().max() > 0
    assert isinstance(before.transformed(found.left, found.right).summands[0], Lookup)


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_acts_as_its_matrix(kind: str) -> None:
    left, right = (Update(draw(d, 2, seed=2), draw(d, 2, seed=3)) for d in (O, I))
    torch.testing.assert_close(left.matrix(), torch.eye(O, dtype=torch.float64) + left.written @ left.read.mT)
    moved = block(kind).transformed(left, right).features()
    torch.testing.assert_close(moved, left.matrix() @ block(kind).features() @ right.matrix().mT)


# ------------------------------------------------------------------------------------------------------- the request


def test_the_rank_is_chosen_on_samples_held_out() -> None:
    """With noise alone, more directions fit the samples better and others worse."""
    before = block("dense")
    after = before.of([Dense(before.features() + 2 * draw(N, C, O, I, seed=4))])
    chosen = at.explain(feats(before), feats(after), at.TwoSided(), strengths=(1e-6,), rank=(1, 5))
    one, five = (at.explain(feats(before), feats(after), at.TwoSided(), strengths=(1e-6,), rank=k) for k in (1, 5))
    assert chosen.ranks == {"b": 1}
    assert five.fit_r2["b"] > one.fit_r2["b"]
    assert five.r2["b"] < one.r2["b"]


def test_several_structures_at_once_are_each_alone() -> None:
    before, after = feats(block("of everything")), feats(changed(block("of everything")))
    asked: dict[str, at.structures.Structure] = {
        "scale": at.LayerScale(),
        "left": at.Left(),
        "both": at.TwoSided(),
        "any": at.Full(),
    }
    told: list[float] = []
    found = explanations(before, after, asked, progress=lambda _, fraction: told.append(fraction))
    assert list(found) == list(asked)
    for key, structure in asked.items():
        alone = at.explain(before, after, structure)
        assert found[key].total == pytest.approx(alone.total, abs=1e-12)
        assert found[key].structure == structure
    assert told == sorted(told)
    assert told[-1] == 1.0


@pytest.mark.parametrize("structure", [at.Left(), at.TwoSided()], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("kind", ["outer", "lookup"])
def test_rank_zero_is_the_factor_of_a_layer_scale(kind: str, structure: at.structures.Structure) -> None:
    before, after = block(kind), changed(block(kind))
    found = at.explain(feats(before), feats(after), structure, rank=0)
    scale = at.explain(feats(before), feats(after), at.LayerScale())
    assert found.ranks == {"b": 0}
    assert found.total == pytest.approx(scale.total, abs=1e-12)
    assert found.transforms["b"].scale == pytest.approx(scale.transforms["b"].scale)


def test_where_a_factor_explains_all_no_direction_is_chosen() -> None:
    before = block("outer")
    found = at.explain(feats(before), feats(before.transformed(None, None, 3.0)), at.TwoSided())
    assert found.ranks == {"b": 0}
    assert found.r2["b"] == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("rank", [-1, (), (2, -1), True])
def test_a_rank_that_is_none_is_refused(rank: int | tuple[int, ...]) -> None:
    made = feats(block("outer"))
    with pytest.raises(at.TangentError, match=r"^explain: rank must be 0 or more, several such .* or None .* got"):
        at.explain(made, feats(changed(block("outer"))), at.TwoSided(), rank=rank)


def test_little_memory_narrows_a_side_further() -> None:
    before, after = wide_problem(n=80)
    roomy, scarce = (at.explain(before, after, at.TwoSided(), memory_limit=limit) for limit in (10**9, 400_000))
    assert roomy.r2["b"] > scarce.r2["b"] > 0.1
    with pytest.raises(
        at.TangentError, match=r"^explain: needs .* leave block 'b' out with wrt, or use .* right side, of 110"
    ):
        at.explain(before, after, at.TwoSided(), memory_limit=20_000)
