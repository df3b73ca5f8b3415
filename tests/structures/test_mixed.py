"""Structures by pattern, and penalties in units of each block's kernel."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import adaptive_tangents as at
import theory_reference as reference
from adaptive_tangents.features.transforms import Entrywise, Joint, LowRank, Sides
from adaptive_tangents.structures.base import kernel_scales
from draws import examples
from theory_reference import problem

EXACT = {"tol": 1e-13, "max_rounds": 2000}
few = examples(8)
seeds = st.integers(0, 10_000)
factors = st.floats(-3, 3).map(lambda x: 10.0**x)
SCALED: dict[str, Callable[..., at.structures.BlockStructure]] = {
    "Fixed": lambda p, **kw: at.Fixed(**kw),
    "LayerScale": at.LayerScale,
    "Left": at.Left,
    "Right": at.Right,
    "TwoSided": at.TwoSided,
    "Rows": at.Rows,
    "Columns": at.Columns,
    "Diagonal": at.Diagonal,
    "Modes": at.Modes,
}
every_structure = pytest.mark.parametrize("name", SCALED)


def case(seed: int, scale: float = 2.0) -> reference.Problem:
    return problem(seed, n=5, c=2, shapes=(*reference.KERNEL, (2, 1, 0)), modes=reference.KERNEL_MODES, scale=scale)


def rescaled(feats: at.TangentFeatures, factors: Mapping[str, float]) -> at.TangentFeatures:
    blocks = {name: block.scaled(factors.get(name, 1.0)) for name, block in feats.blocks.items()}
    return replace(feats, blocks=blocks)


def random_coefficients(given: reference.Problem, seed: int) -> dict[str, Tensor]:
    vector = torch.randn(given.rows.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return given.split(vector)


# ------------------------------------------------------------------------------------------------------ by pattern


@few
@given(seed=seeds)
def test_a_mixture_is_the_sum_of_its_structures_on_their_blocks(seed: int) -> None:
    given_case = case(seed)
    b, x = random_coefficients(given_case, seed + 1), random_coefficients(given_case, seed + 2)
    parts = {"block0": at.Left(at.Quadratic(0.3)), "*[12]": at.Full(at.Quadratic(0.7))}
    mixed = at.Mixed(parts).prepared(given_case.feats)
    first, rest = {"block0": b["block0"]}, {k: b[k] for k in ("block1", "block2")}
    found, one, two = mixed.solution(b), parts["block0"].solution(first), parts["*[12]"].solution(rest)
    assert found.penalty == pytest.approx(one.penalty + two.penalty, rel=1e-13)
    assert mixed.dual(found.gradient) == pytest.approx(
        sum(float((found.gradient[k] * b[k]).sum()) for k in b) - found.penalty, rel=1e-8
    )
    expected = {**one.gradient, **two.gradient}
    assert found.curvature is not None
    curved = found.curvature(x)
    bent = {**one.curvature(x), **two.curvature({k: x[k] for k in rest})}
    for name in b:
        torch.testing.assert_close(found.gradient[name], expected[name], rtol=0, atol=0)
        torch.testing.assert_close(curved[name], bent[name], rtol=0, atol=0)
    assert found.transforms["block1"] is found.transforms["block2"]
    assert isinstance(found.transforms["block1"], Joint)
    assert list(found.transforms["block1"].direction) == ["block1", "block2"]


@pytest.mark.parametrize("ridge", [0.0, 0.2])
def test_a_fit_of_one_structure_by_patterns_is_the_fit_of_that_structure(ridge: float) -> None:
    given_case = case(1)
    penalty = at.Quadratic(0.4)
    plain = at.fit(given_case.feats, given_case.r, structure=at.Left(penalty), ridge=ridge, **EXACT)
    mapping = {"block0": at.Left(penalty), "*": at.Left(penalty)}
    mixed = at.fit(given_case.feats, given_case.r, structure=mapping, ridge=ridge, **EXACT)
    assert isinstance(mixed.structure, at.Mixed)
    assert mixed.objective == pytest.approx(plain.objective, rel=1e-12)
    assert mixed.lower_bound == pytest.approx(plain.lower_bound, rel=1e-12)


def test_a_fit_with_a_structure_and_a_strength_for_each_block_closes_its_gap_and_moves_only_what_it_may() -> None:
    given_case = case(2, scale=4.0)
    structures = {
        "block0": at.Modes({"out": at.Quadratic(0.1)}),
        "block1": at.Fixed(),
        "*": at.Full(at.Quadratic(0.5)),
    }
    found = at.fit(given_case.feats, given_case.r, structure=structures, **EXACT)
    assert abs(found.gap) < 1e-10
    assert found.transforms["block1"] == Sides()
    assert isinstance(found.transforms["block2"], Joint)
    assert found.transforms["block0"].left.gains.max() > 1
    # If a block's penalty keeps it fixed, the others move more.
    stiff = {**structures, "block0": at.Modes({"out": at.Quadratic(1e9)})}
    other = at.fit(given_case.feats, given_case.r, structure=stiff, **EXACT)
    assert other.objective > found.objective
    assert other.transforms["block2"].gain > found.transforms["block2"].gain


def test_patterns_that_do_not_divide_the_blocks_are_refused_with_names() -> None:
    given_case = case(0)

    def refused(structures: Mapping[str, at.structures.Structure], match: str) -> None:
        with pytest.raises(at.TangentError, match=match):
            at.fit(given_case.feats, given_case.r, structure=structures)

    fixed = at.Fixed()
    refused({"conv*": fixed, "*": fixed}, r"'conv\*' matches no block; blocks are block0, block1, block2")
    refused({"block*": fixed, "*0": fixed}, r"block 'block0' is matched by 'block\*' and by '\*0'")
    refused({"block0": fixed, "*1": fixed}, r"no pattern matches block 'block2'; add '\*'")
    refused({}, r"Mixed: give structures by pattern, .* got none")
    unchecked = at.Mixed({"*": fixed})
    object.__setattr__(unchecked, "structures", {"*": "left"})  # bypasses the tests' type checks
    with pytest.raises(at.TangentError, match=r"got 'left' for '\*'"):
        unchecked.__post_init__()
    everything = at.fit(given_case.feats, given_case.r, structure={"block?": fixed, "*": at.Left()})
    assert everything.converged  # an empty rest is no error


def test_explain_takes_patterns_but_no_joint_transform_of_a_part() -> None:
    start = problem(0, n=24, c=1, shapes=((3, 4, 2), (2, 3, 1))).feats
    end = start.transformed({"block0": Sides(scale=2.0), "block1": Sides(scale=0.5)})
    found = at.explain(start, end, {"block0": at.LayerScale(), "*": at.Fixed()})
    assert found.r2["block0"] == pytest.approx(1.0, abs=1e-9)
    assert found.r2["block1"] == pytest.approx(0.0, abs=1e-9)
    assert found.transforms["block0"].scale == pytest.approx(2.0)
    with pytest.raises(at.TangentError, match="explain: Full explains all blocks by one transform; pass it alone"):
        at.explain(start, end, {"block0": at.Full(), "*": at.Fixed()})
    with pytest.raises(at.TangentError, match="explain: Modes has no least-squares fit"):
        at.explain(start, end, {"block0": at.Modes(), "*": at.Fixed()})


@pytest.mark.parametrize("name", ["Rows", "Columns", "Diagonal"])
def test_explain_recovers_one_factor_a_unit_or_an_entry(name: str) -> None:
    start = problem(0, n=60, c=2).feats
    generator = torch.Generator().manual_seed(1)
    truth = {}
    for key, block in start.blocks.items():
        shape = {"Rows": (block.shape[0], 1), "Columns": (1, block.shape[1]), "Diagonal": block.shape}[name]
        gains = 0.2 + 2 * torch.rand(shape, generator=generator, dtype=torch.float64)
        truth[key] = SCALED[name](at.Quadratic()).transform(gains)
    end = start.transformed(truth)
    found = at.explain(start, end, SCALED[name](at.Quadratic()), strengths=(1e-12, 1e-2))
    assert found.total > 1 - 1e-9
    assert set(found.strengths.values()) == {1e-12}
    torch.testing.assert_close(start.transformed(found.transforms).dense(), end.dense(), rtol=1e-6, atol=1e-6)
    # A mix of units is explained only in part.
    turned = start.transformed(
        {
            key: Sides(
                left=LowRank(
                    torch.ones(b.shape[0], 1, dtype=torch.float64) / b.shape[0] ** 0.5,
                    torch.tensor([3.0], dtype=torch.float64),
                )
            )
            for key, b in start.blocks.items()
        }
    )
    partly = at.explain(start, turned, SCALED[name](at.Quadratic()))
    assert 0 < partly.fit_r2["block0"] < 1


# ------------------------------------------------------------------------------------- in units of a block's kernel


def test_the_scale_of_a_block_is_the_mean_diagonal_of_its_kernel() -> None:
    given_case = problem(3, n=37, c=2, shapes=(*reference.KERNEL, (2, 1, 0)))
    for name, s in kernel_scales(given_case.feats).items():
        phi = given_case.phi[name]
        assert s**2 == pytest.approx(float((phi**2).sum()) / (37 * 2), rel=1e-12)
    empty = rescaled(given_case.feats, {"block1": 0.0})
    assert kernel_scales(empty)["block1"] == 1.0


@every_structure
@few
@given(seed=seeds, factor=factors)
def test_a_scale_invariant_penalty_does_not_see_the_units_of_the_features(name: str, seed: int, factor: float) -> None:
    """With features times c and coefficients over c, transforms stay, and the penalty scales by 1/c²."""
    given_case = case(seed)
    b = random_coefficients(given_case, seed + 1)
    structure = SCALED[name](at.Quadratic(0.3), scale_invariant=True)
    one = structure.prepared(given_case.feats)
    other = structure.prepared(rescaled(given_case.feats, dict.fromkeys(b, factor)))
    shrunk = {key: matrix / factor for key, matrix in b.items()}
    first, second = one.solution(b), other.solution(shrunk)
    assert second.penalty * factor**2 == pytest.approx(first.penalty, rel=1e-9)
    probe = random_coefficients(given_case, seed + 2)
    moved = [at.features.transforms.transform_matrices(probe, found.transforms) for found in (first, second)]
    for key in b:
        torch.testing.assert_close(moved[0][key], moved[1][key], rtol=1e-7, atol=1e-7)


@every_structure
@few
@given(seed=seeds)
def test_a_scale_invariant_structure_keeps_what_structures_promise(name: str, seed: int) -> None:
    """The transforms attain ‖M⁻ᵀB‖² + Ω(M)/s²; gradient, curvature and dual are those of the penalty so defined."""
    given_case = case(seed)
    b, x = random_coefficients(given_case, seed + 1), random_coefficients(given_case, seed + 2)
    strength = 0.3
    structure = SCALED[name](at.Quadratic(strength), scale_invariant=True).prepared(given_case.feats)
    found, scales = structure.solution(b), kernel_scales(given_case.feats)
    # For a penalty proportional to its strength: the plain structure of strength λ/s², block by block.
    mapping = {key: SCALED[name](at.Quadratic(strength / s**2)) for key, s in scales.items()}
    plain = at.Mixed(mapping).prepared(given_case.feats)
    expected = plain.solution(b)
    assert found.penalty == pytest.approx(expected.penalty, rel=1e-9)
    for key in b:
        torch.testing.assert_close(found.gradient[key], expected.gradient[key], rtol=1e-7, atol=1e-9)
    assert (found.curvature is None) == (expected.curvature is None) == (name == "Modes")
    if found.curvature is not None:
        bent, wanted = found.curvature(x), expected.curvature(x)
        for key in b:
            torch.testing.assert_close(bent[key], wanted[key], rtol=1e-7, atol=1e-7)
    if name not in ("TwoSided", "Modes"):
        value = sum(float((found.gradient[key] * b[key]).sum()) for key in b) - found.penalty
        assert structure.dual(found.gradient) == pytest.approx(value, rel=1e-8)
    tiny = {key: 1e-6 * matrix for key, matrix in b.items()}
    assert structure.penalty(tiny) == pytest.approx(sum(float((m**2).sum()) for m in tiny.values()), rel=1e-9)


@pytest.mark.parametrize("name", ["Left", "TwoSided", "Rows", "Diagonal"])
def test_predictions_do_not_depend_on_the_units_of_the_features_exactly_where_asked(name: str) -> None:
    given_case = case(4, scale=3.0)
    bigger = rescaled(given_case.feats, dict.fromkeys(given_case.phi, 10.0))
    other = case(5).feats
    other_bigger = rescaled(other, dict.fromkeys(given_case.phi, 10.0))
    gaps = {}
    for invariant in (True, False):
        structure = SCALED[name](at.Quadratic(0.3), scale_invariant=invariant)
        one = at.fit(given_case.feats, given_case.r, structure=structure, **EXACT).predict(other)
        two = at.fit(bigger, given_case.r, structure=structure, **EXACT).predict(other_bigger)
        gaps[invariant] = float((one - two).norm() / one.norm())
    assert gaps[True] < 1e-5
    assert gaps[False] > 1e-3


def test_one_strength_moves_large_and_small_layers_alike_exactly_where_asked() -> None:
    """Two blocks whose features differ only in size, with coefficients that give the same predictions."""
    phi = problem(6, n=5, shapes=((3, 4, 2),)).phi["block0"]
    feats = reference.features_from({"small": 0.01 * phi, "large": 100 * phi})
    matrix = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b = {"small": 100 * matrix, "large": 0.01 * matrix}

    def gains(structure: at.structures.Structure) -> list[float]:
        transforms = structure.prepared(feats).update(b)
        return [float(transforms[key].left.gains.max()) if transforms[key].left.gains.numel() else 1.0 for key in b]

    small, large = gains(at.Left(at.Quadratic(1.0), scale_invariant=True))
    assert small == pytest.approx(large, rel=1e-9)
    small, large = gains(at.Left(at.Quadratic(1.0)))
    assert small > 3 * large


def test_a_scale_invariant_fit_is_certified_and_says_so() -> None:
    given_case = case(7, scale=4.0)
    structure = at.Left(at.Quadratic(0.2), scale_invariant=True)
    found = at.fit(given_case.feats, given_case.r, structure=structure, **EXACT)
    assert abs(found.gap) < 1e-10
    assert "scale_invariant=True" in found.summary()
    assert "scales" not in found.summary()
    with pytest.raises(
        at.TangentError, match=r"Left: the scale of block 'block0' is not known; use structure.prepared"
    ):
        structure.penalty(random_coefficients(given_case, 0))
    entries = at.fit(given_case.feats, given_case.r, structure=at.Diagonal(at.Quadratic(0.2), scale_invariant=True))
    assert isinstance(entries.transforms["block0"], Entrywise)
    assert math.isfinite(entries.objective)
