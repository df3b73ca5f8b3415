"""The change of the kernel by a transform, against dense matrices and theorems on the adapted kernel."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import adaptive_tangents as at
import theory_reference as reference
from adaptive_tangents.features.summands import Dense, Flipped, Lookup, Outer
from adaptive_tangents.features.transforms import Joint, LowRank, Matrix, Modal, Sides
from adaptive_tangents.measures.kernel_change import joint_change, scale_change, side_change
from draws import examples
from theory_reference import Problem, problem

few = examples(4)
fewest = examples(2)  # each example is a fit or two
seeds = st.integers(0, 10_000)
OUTPUTS = ("full", "trace")
TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(seed: int, d: int, k: int, least: float = 1.0) -> LowRank:
    directions, _ = torch.linalg.qr(normal(seed, d, d))
    return LowRank(directions[:, :k], least + 2 * normal(seed + 1, k).abs())


def dense_kernel(phi: Mapping[str, Tensor], sides: Mapping[str, tuple[Tensor, Tensor]], outputs: str) -> Tensor:
    """⟨M_L Φ(x)_a M_Rᵀ, M_L Φ(x′)_b M_Rᵀ⟩ summed over blocks, M_L and M_R dense."""
    total = torch.zeros((), dtype=torch.float64)
    for name, values in phi.items():
        left, right = sides.get(name, (torch.eye(values.shape[2]).double(), torch.eye(values.shape[3]).double()))
        moved = torch.einsum("po,ncoi,qi->ncpq", left, values, right)
        total = total + torch.einsum("kapq,lbpq->kalb", moved, moved)
    return total if outputs == "full" else torch.einsum("kala->kl", total)


def dense_sides(case: Problem, transforms: Mapping[str, Sides]) -> dict[str, tuple[Tensor, Tensor]]:
    """Each block's M_L and M_R, with the scale in M_L; a modal side leaves bias columns unchanged."""

    def padded(side: object, d: int) -> Tensor:
        out = torch.eye(d, dtype=torch.float64)
        if side is not None:
            small = side.matrix()
            out[: len(small), : len(small)] = small
        return out

    return {
        name: (t.scale * padded(t.left, case.phi[name].shape[2]), padded(t.right, case.phi[name].shape[3]))
        for name, t in transforms.items()
    }


SIDES: dict[str, Callable[[int, int, int], Sides]] = {
    "left": lambda s, o, i: Sides(left=low_rank(s, o, 1)),
    "right": lambda s, o, i: Sides(right=low_rank(s, i, 1)),
    "both": lambda s, o, i: Sides(low_rank(s, o, min(o, 2)), low_rank(s + 5, i, 1)),
    "shrinking": lambda s, o, i: Sides(low_rank(s, o, o, least=-1.0), low_rank(s + 5, i, i, least=0.0)),
    "matrices": lambda s, o, i: Sides(Matrix(normal(s, o, o)), Matrix(normal(s + 1, i, i))),
    "matrix and low rank": lambda s, o, i: Sides(Matrix(normal(s, o, o)), low_rank(s, i, 1)),
    "modes": lambda s, o, i: Sides(low_rank(s, o, 1), Modal((1, i), (None, low_rank(s + 3, i, 1)))),
    "scale": lambda s, o, i: Sides(scale=1.7),
    "scale and side": lambda s, o, i: Sides(right=low_rank(s, i, 1), scale=0.4),
    "scale and both": lambda s, o, i: Sides(low_rank(s, o, 1), low_rank(s + 5, i, i), scale=1.7),
    "scale and matrices": lambda s, o, i: Sides(Matrix(normal(s, o, o)), Matrix(normal(s + 1, i, i)), scale=-2.0),
    "nothing": lambda s, o, i: Sides(),
}


def sides_for(case: Problem, kind: str, seed: int) -> dict[str, Sides]:
    return {name: SIDES[kind](seed + 10 * k, *part.shape[2:]) for k, (name, part) in enumerate(case.phi.items())}


# ---------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("kind", ["left", "right", "both", "shrinking"])
@few
@given(seed=seeds)
def test_low_rank_sides_add_the_grams_of_their_directions(kind: str, outputs: str, seed: int) -> None:
    """K_M − K₀ = Σ_j (a_j² − 1)·gram(u_jᵀΦ); two sides add the products of both."""
    case = problem(seed, c=2)
    transforms = sides_for(case, kind, seed)
    left = {name: t.left for name, t in transforms.items() if t.left is not None}
    right = {name: t.right for name, t in transforms.items() if t.right is not None}
    found = side_change(case.feats, left, right, outputs=outputs)
    before, after = (dense_kernel(case.phi, m, outputs) for m in ({}, dense_sides(case, transforms)))
    torch.testing.assert_close(found, after - before, **TIGHT)
    written_out = torch.zeros_like(found)
    for name, values in case.phi.items():
        ups = [(u[:, None], g**2 - 1) for u, g in _directions(left.get(name))]
        downs = [(v[:, None], g**2 - 1) for v, g in _directions(right.get(name))]
        grams = [(torch.einsum("or,ncoi->ncri", u, values), w) for u, w in ups]
        grams += [(torch.einsum("ncoi,ir->ncor", values, v), w) for v, w in downs]
        grams += [(torch.einsum("or,ncoi,is->ncrs", u, values, v), wu * wv) for u, wu in ups for v, wv in downs]
        for gram, weight in grams:
            full = weight * torch.einsum("kapq,lbpq->kalb", gram, gram)
            written_out += full if outputs == "full" else torch.einsum("kala->kl", full)
    torch.testing.assert_close(found, written_out, **TIGHT)


def _directions(side: LowRank | None) -> list[tuple[Tensor, Tensor]]:
    return [] if side is None else list(zip(side.directions.mT, side.gains, strict=True))


@pytest.mark.parametrize("outputs", OUTPUTS)
@few
@given(seed=seeds)
def test_a_scale_per_block_adds_its_square_less_one_of_the_blocks_kernel(outputs: str, seed: int) -> None:
    """K_M = Σ s_ℓ²K_ℓ."""
    case = problem(seed, c=2)
    scales = {name: float(s) for name, s in zip(case.phi, normal(seed, 3), strict=True)}
    by_block = case.feats.kernel(outputs=outputs, by_block=True)
    expected = sum(scales[name] ** 2 * kernel for name, kernel in by_block.items())
    found = scale_change(case.feats, scales, outputs=outputs)
    torch.testing.assert_close(case.feats.kernel(outputs=outputs) + found, expected, **TIGHT)
    adapted = case.feats.transformed({name: Sides(scale=s) for name, s in scales.items()})
    torch.testing.assert_close(adapted.kernel(outputs=outputs), expected, **TIGHT)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("outputs", OUTPUTS)
@fewest
@given(seed=seeds, strength=st.floats(-2, 2).map(lambda x: 10.0**x))
def test_the_joint_transform_of_full_adds_the_outer_product_of_the_fitted_function(
    outputs: str, ridge: float, seed: int, strength: float
) -> None:
    """K_M = K₀ + ((z² − 1)/‖β‖²) f fᵀ with f = φβ on any samples; on those interpolated f = r."""
    case, other = problem(seed, c=2, scale=3.0), problem(seed + 1, n=5, c=2)
    fit = at.fit(case.feats, case.r, structure=at.Full(at.Quadratic(strength)), ridge=ridge)
    joint = next(iter(fit.transforms.values()))
    beta = case.flatten(fit.coefficients)
    z = float(reference.bisected_gain(strength, beta.norm().reshape(1).numpy())[0])
    for these in (case, other):
        f = (these.rows @ beta).reshape(-1, 2)
        full = (z**2 - 1) / float(beta @ beta) * torch.einsum("ka,lb->kalb", f, f)
        expected = full if outputs == "full" else torch.einsum("kala->kl", full)
        found = joint_change(these.feats, joint, outputs=outputs)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))
        whole = these.feats.kernel(outputs=outputs) + found
        torch.testing.assert_close(fit.transform(these.feats).kernel(outputs=outputs), whole, **TIGHT)
    if ridge == 0:
        torch.testing.assert_close((case.rows @ beta).reshape(-1, 2), case.r, rtol=1e-9, atol=1e-9)


@few
@given(seed=seeds, strength=st.floats(-2, 2).map(lambda x: 10.0**x), scale=st.floats(-2, 2).map(lambda x: 10.0**x))
def test_full_adapts_by_how_poorly_the_kernel_represents_the_targets(seed: int, strength: float, scale: float) -> None:
    """The one singular value that changes is z(‖β‖), and ‖β‖² = rᵀK₀⁻¹r is the RKHS norm: it grows with it."""
    case = problem(seed, c=2, scale=scale)
    norm = at.representability(case.feats.kernel(), case.r, jitter=0.0).rkhs_norm
    gains = []
    for factor in (1.0, 3.0):
        fit = at.fit(case.feats, factor * case.r, structure=at.Full(at.Quadratic(strength)))
        gains.append(next(iter(fit.transforms.values())).gain)
        root = torch.tensor([factor * math.sqrt(norm)], dtype=torch.float64)
        expected = float(at.Quadratic(strength).induced().minimizer(root))
        assert gains[-1] - 1 == pytest.approx(expected - 1, rel=1e-6)
    assert gains[1] > gains[0] > 1


# --------------------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("kind", SIDES)
@few
@given(seed=seeds)
def test_sides_add_up_to_blocks_and_blocks_to_the_whole_change(kind: str, outputs: str, seed: int) -> None:
    case = problem(seed, c=2)
    transforms = sides_for(case, kind, seed)
    found = at.kernel_change(case.feats, transforms, case.r, outputs=outputs, keep=True)
    dense = dense_sides(case, transforms)
    before, after = (dense_kernel(case.phi, m, outputs) for m in ({}, dense))
    total = torch.zeros_like(before)
    for name, t in transforms.items():
        alone = {name: case.phi[name]}
        own = dense_kernel(alone, {}, outputs)
        sides = found.kernels[name]
        eyes = tuple(torch.eye(len(m), dtype=torch.float64) for m in dense[name])
        if "left" in sides:
            left = dense_kernel(alone, {name: (dense[name][0] / t.scale, eyes[1])}, outputs)
            torch.testing.assert_close(sides["left"], left - own, **TIGHT)
        if "right" in sides:
            right = dense_kernel(alone, {name: (eyes[0], dense[name][1])}, outputs)
            torch.testing.assert_close(sides["right"], right - own, **TIGHT)
        if "scale" in sides:
            torch.testing.assert_close(sides["scale"], (t.scale**2 - 1) * own, **TIGHT)
        there = {"left": t.left is not None, "right": t.right is not None, "scale": t.scale != 1}
        wanted = {side for side, has in there.items() if has}
        assert set(sides) == wanted | ({"interaction"} if len(wanted) > 1 else set())
        whole = sum(sides.values(), torch.zeros_like(own))
        torch.testing.assert_close(whole, dense_kernel(alone, dense, outputs) - own, **TIGHT)
        total += whole
    torch.testing.assert_close(total, after - before, **TIGHT)


@pytest.mark.parametrize("kind", ["both", "scale and matrices", "joint"])
@pytest.mark.parametrize("outputs", OUTPUTS)
@few
@given(seed=seeds)
def test_every_number_of_a_part_is_that_of_its_dense_kernel(kind: str, outputs: str, seed: int) -> None:
    case = problem(seed, n=5, c=2)
    transforms = _transforms(case, kind, seed)
    found = at.kernel_change(case.feats, transforms, case.r, outputs=outputs, keep=True)
    initial = case.feats.kernel(outputs=outputs)
    change = case.feats.transformed(transforms).kernel(outputs=outputs) - initial
    target = torch.from_numpy(reference.target_kernel(case.r.numpy(), full=outputs == "full"))
    size = 10 if outputs == "full" else 5

    def check(part: at.measures.KernelPart, kernel: Tensor) -> None:
        matrix, own = kernel.reshape(size, size), initial.reshape(size, size)
        assert part.norm == pytest.approx(float(kernel.norm() / initial.norm()), rel=1e-9)
        assert part.growth == pytest.approx(float(matrix.trace() / own.trace()), rel=1e-9, abs=1e-12)
        assert part.target_cosine == pytest.approx(
            reference.cosine(kernel.numpy(), target.numpy()), rel=1e-9, abs=1e-12
        )
        weight = float((kernel * target).sum() / (target**2).sum())
        assert part.target_weight == pytest.approx(weight, rel=1e-9, abs=1e-12)
        rest = kernel - part.target_weight * target
        assert float((rest * target).sum()) == pytest.approx(0, abs=1e-10 * float(kernel.norm() * target.norm()))
        assert part.contribution == pytest.approx(
            float((kernel * change).sum() / (change**2).sum()), rel=1e-9, abs=1e-9
        )

    check(found.whole, change)
    for name, sides in found.kernels.items():
        check(found.blocks[name], sum(sides.values()))
        for side, kernel in sides.items():
            check(found.sides[name][side], kernel)
    after = initial + change
    assert found.alignment == pytest.approx((at.alignment(initial, case.r), at.alignment(after, case.r)), rel=1e-10)
    pair = (at.alignment(initial, case.r, centered=True), at.alignment(after, case.r, centered=True))
    assert found.centered == pytest.approx(pair, rel=1e-9, abs=1e-12)


def _transforms(case: Problem, kind: str, seed: int) -> Mapping[str, at.features.transforms.Transform]:
    if kind != "joint":
        return sides_for(case, kind, seed)
    vector = normal(seed + 7, case.rows.shape[1])
    return dict.fromkeys(case.phi, Joint(case.split(vector / vector.norm()), 2.5))


@pytest.mark.parametrize("kind", ["both", "scale and both", "matrices", "joint"])
@few
@given(seed=seeds)
def test_contributions_growths_and_weights_add_up(kind: str, seed: int) -> None:
    case = problem(seed, c=2)
    found = at.kernel_change(case.feats, _transforms(case, kind, seed), case.r)
    assert found.whole.contribution == pytest.approx(1, rel=1e-12)
    for quantity in ("contribution", "growth", "target_weight"):
        for name, block in found.blocks.items():
            total = sum(getattr(part, quantity) for part in found.sides[name].values())
            assert total == pytest.approx(getattr(block, quantity), rel=1e-8, abs=1e-9)
        total = sum(getattr(block, quantity) for block in found.blocks.values())
        assert total == pytest.approx(getattr(found.whole, quantity), rel=1e-8, abs=1e-9)


@few
@given(seed=seeds)
def test_the_joint_change_by_block_adds_up_to_the_closed_form(seed: int) -> None:
    case = problem(seed, c=2)
    transforms = _transforms(case, "joint", seed)
    joint = next(iter(transforms.values()))
    found = at.kernel_change(case.feats, transforms, case.r, keep=True)
    adapted = case.feats.transformed(transforms).kernel(by_block=True)
    initial = case.feats.kernel(by_block=True)
    for name, sides in found.kernels.items():
        assert list(sides) == ["joint"]
        torch.testing.assert_close(sides["joint"], adapted[name] - initial[name], **TIGHT)
    torch.testing.assert_close(
        sum(sides["joint"] for sides in found.kernels.values()), joint_change(case.feats, joint), **TIGHT
    )


@pytest.mark.parametrize("kind", ["both", "scale and matrices", "joint"])
@few
@given(seed=seeds)
def test_the_order_of_blocks_does_not_matter(kind: str, seed: int) -> None:
    case = problem(seed, c=2)
    transforms = _transforms(case, kind, seed)
    turned = dataclasses.replace(case.feats, blocks=dict(reversed(case.feats.blocks.items())))
    one = at.kernel_change(case.feats, transforms, case.r)
    other = at.kernel_change(turned, dict(reversed(transforms.items())), case.r)
    assert list(other.blocks) == list(reversed(one.blocks))
    pairs = [(one.whole, other.whole), *((part, other.blocks[name]) for name, part in one.blocks.items())]
    pairs += [(part, other.sides[name][side]) for name in one.sides for side, part in one.sides[name].items()]
    for a, b in pairs:
        assert dataclasses.astuple(a) == pytest.approx(dataclasses.astuple(b), rel=1e-10, abs=1e-12)
    assert one.alignment == pytest.approx(other.alignment, rel=1e-12)


def test_what_is_kept_changes_no_number() -> None:
    case = problem(3, c=2)
    transforms = sides_for(case, "both", 3)
    kept, dropped = (at.kernel_change(case.feats, transforms, case.r, keep=keep) for keep in (True, False))
    assert dropped.kernels is None
    assert kept.whole == dropped.whole
    assert kept.sides == dropped.sides
    assert kept.kernels["block0"]["left"].shape == (4, 2, 4, 2)


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_every_kind_of_summand_is_split_alike(outputs: str) -> None:
    """Lookups, flipped factors and whole features give the same as the features materialized."""
    n, c, t, o, i = 4, 2, 3, 3, 5
    signals = normal(0, n, t, c, o)
    lookup = Lookup(
        signals, torch.randint(0, i, (n, t), generator=torch.Generator().manual_seed(0)), normal(1, n, t),
        normal(2, n, t, 2), normal(3, 2, i),
    )  # fmt: skip
    blocks = {
        "outer": at.features.Block("outer", (o, i), (), outer=Outer(signals, normal(4, n, t, i))),
        "lookup": at.features.Block("lookup", (o, i), (), lookup=lookup),
        "flipped": at.features.Block("flipped", (o, i), (), flipped=Flipped(normal(5, n, t, c, i), normal(6, n, t, o))),
        "all": at.features.Block(
            "all", (o, i), (), outer=Outer(signals, normal(4, n, t, i)), lookup=lookup,
            flipped=Flipped(normal(5, n, t, c, i), normal(6, n, t, o)), dense=Dense(normal(7, n, c, o, i)),
        ),
    }  # fmt: skip
    feats = at.TangentFeatures(n, c, blocks, {})
    dense = reference.features_from({name: block.features() for name, block in blocks.items()})
    transforms = {name: Sides(low_rank(1, o, 2), low_rank(2, i, 2), 1.3) for name in blocks}
    one, other = (at.kernel_change(f, transforms, normal(8, n, c), outputs=outputs, keep=True) for f in (feats, dense))
    for name in blocks:
        for side in ("left", "right", "scale", "interaction"):
            torch.testing.assert_close(one.kernels[name][side], other.kernels[name][side], **TIGHT)


def test_features_in_single_precision_are_measured_in_double() -> None:
    case = problem(5, c=2)
    transforms = sides_for(case, "both", 5)
    wide = at.kernel_change(case.feats, transforms, case.r, keep=True)
    narrow = at.kernel_change(case.feats.to(torch.float32), transforms, case.r.float(), keep=True)
    assert narrow.kernels["block0"]["left"].dtype == torch.float64
    assert dataclasses.astuple(narrow.whole) == pytest.approx(dataclasses.astuple(wide.whole), rel=1e-5)
    assert side_change(case.feats.to(torch.float32), {"block0": transforms["block0"].left}, {}).dtype == torch.float32


def test_a_small_change_loses_nothing_beside_a_large_kernel() -> None:
    """Gains of 1 + 1e-13 change K₀ by less than its rounding, but the parts are still right."""
    case = problem(5, c=2)
    direction = low_rank(0, 3, 1).directions
    tiny = LowRank(direction, torch.tensor([1 + 2**-43], dtype=torch.float64))
    unit = LowRank(direction, torch.tensor([math.sqrt(2)], dtype=torch.float64))
    small, whole = (side_change(case.feats, {"block0": side}, {}) for side in (tiny, unit))
    torch.testing.assert_close(small / 2**-42, whole, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------------------------- changes by a fit


STRUCTURES: dict[str, at.structures.Structure] = {
    "Fixed": at.Fixed(),
    "Full": at.Full(at.Quadratic(0.3)),
    "LayerScale": at.LayerScale(at.Quadratic(0.3)),
    "Left": at.Left(at.Quadratic(0.3)),
    "Right": at.Right(at.Quadratic(0.3)),
    "TwoSided": at.TwoSided(at.Quadratic(0.3)),
}


@pytest.mark.parametrize("ridge", [0.0, 0.2])
@pytest.mark.parametrize("name", STRUCTURES)
@fewest
@given(seed=seeds)
def test_the_change_of_a_fit_is_that_of_its_adapted_kernel_along_its_targets(
    name: str, ridge: float, seed: int
) -> None:
    case = problem(seed, c=2, scale=3.0)
    fit = at.fit(case.feats, case.r, structure=STRUCTURES[name], ridge=ridge)
    found = fit.kernel_change(keep=True)
    change = fit.transform(case.feats).kernel() - case.feats.kernel()
    total = sum((k for sides in found.kernels.values() for k in sides.values()), torch.zeros_like(change))
    torch.testing.assert_close(total, change, **TIGHT)
    assert found.alignment[1] == pytest.approx(at.alignment(fit.transform(case.feats).kernel(), case.r), rel=1e-8)
    other = normal(seed, 4, 2)
    assert fit.kernel_change(other).alignment[0] == pytest.approx(at.alignment(case.feats.kernel(), other), rel=1e-10)


@few
@given(seed=seeds, ridge=st.sampled_from([0.0, 0.5]))
def test_a_fixed_structure_changes_nothing(seed: int, ridge: float) -> None:
    case = problem(seed, c=2)
    found = at.fit(case.feats, case.r, structure=at.Fixed(), ridge=ridge).kernel_change()
    parts = [found.whole, *found.blocks.values(), *(p for sides in found.sides.values() for p in sides.values())]
    for part in parts:
        assert dataclasses.astuple(part) == (0.0,) * 5
    assert found.alignment[0] == found.alignment[1]


@few
@given(seed=seeds, strength=st.floats(-2, 2).map(lambda x: 10.0**x), scale=st.floats(-1, 2).map(lambda x: 10.0**x))
def test_the_whole_change_of_full_lies_along_the_targets_it_interpolates(
    seed: int, strength: float, scale: float
) -> None:
    case = problem(seed, c=2, scale=scale)
    fit = at.fit(case.feats, case.r, structure=at.Full(at.Quadratic(strength)))
    found = fit.kernel_change()
    assert found.whole.target_cosine == pytest.approx(1, abs=1e-8)
    beta = case.flatten(fit.coefficients)
    z = next(iter(fit.transforms.values())).gain
    assert found.whole.target_weight == pytest.approx((z**2 - 1) / float(beta @ beta), rel=1e-7)
    assert found.alignment[1] > found.alignment[0]


@pytest.mark.parametrize("name", ["LayerScale", "Left", "Right", "TwoSided"])
@fewest
@given(seed=seeds)
def test_no_part_of_a_fits_change_is_negative(name: str, seed: int) -> None:
    """Gains are at least 1, so every part is a positive semidefinite kernel, and yᵀΔy ≥ 0."""
    case = problem(seed, c=2, scale=3.0)
    found = at.fit(case.feats, case.r, structure=STRUCTURES[name]).kernel_change(keep=True)
    for name, sides in found.kernels.items():
        for side, kernel in sides.items():
            size = float(kernel.norm())
            assert float(torch.linalg.eigvalsh(kernel.reshape(8, 8))[0]) >= -1e-12 * max(size, 1e-300)
            assert found.sides[name][side].target_cosine >= -1e-12


def test_a_network_is_split_by_its_layers() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 12), torch.nn.Tanh(), torch.nn.Linear(12, 2))
    x, y = normal(0, 10, 3).float(), normal(1, 10, 2).float()
    fit = at.fit(at.tangent_features(model, x), y, structure=at.TwoSided(at.Quadratic(0.05)), ridge=0.1)
    found = fit.kernel_change()
    assert list(found.blocks) == list(fit.features.blocks)
    assert fit.features.dtype == torch.float32  # the features given, not the copy used by the solver
    assert all(set(sides) == {"left", "right", "interaction"} for sides in found.sides.values())
    assert found.alignment[1] > found.alignment[0]
    assert "TangentFeatures" not in repr(fit)


# ----------------------------------------------------------------------------------------------------- output


def test_summary_is_a_table_of_blocks_and_sides() -> None:
    case = problem(2, c=2, scale=2.0)
    found = at.fit(case.feats, case.r, structure=at.TwoSided(at.Quadratic(0.1))).kernel_change()
    lines = found.summary().splitlines()
    assert f"{found.alignment[0]:.3f} → {found.alignment[1]:.3f}" in lines[0]
    assert "centered" in lines[0]
    assert lines[1].split() == [
        "block",
        "side",
        "of",
        "the",
        "change",
        "norm",
        "growth",
        "along",
        "K_y",
        "times",
        "K_y",
    ]
    assert lines[2].startswith("all")
    assert "100.0 %" in lines[2]
    assert [line.split()[0] for line in lines[3:7]] == ["block0", "left", "right", "interaction"]
    assert len({len(line) for line in lines[1:]}) == 1
    one_sided = at.fit(case.feats, case.r, structure=at.Left(at.Quadratic(0.1))).kernel_change().summary()
    assert len(one_sided.splitlines()) == 6
    assert one_sided.splitlines()[3].split()[:2] == ["block0", "left"]


def test_alignment_after_centring_is_left_out_where_it_is_not_defined() -> None:
    case = problem(1, n=4)
    transforms = sides_for(case, "left", 1)
    assert at.kernel_change(case.feats, transforms, torch.ones(4, 1).double()).centered is None
    alone = at.kernel_change(case.feats[:1], transforms, torch.ones(1).double())
    assert alone.centered is None
    assert "centered" not in alone.summary()
    assert at.kernel_change(case.feats, transforms, case.r[:, 0]).centered is not None


# ------------------------------------------------------------------------------------------------------ refusals


CASE = problem(1, c=2)
GIVEN = sides_for(CASE, "both", 1)
JOINT = _transforms(CASE, "joint", 1)
REFUSED = {
    "unknown block": (
        lambda: at.kernel_change(CASE.feats, {"w": Sides()}, CASE.r),
        r"kernel_change: there is no block 'w'; blocks are block0, block1, block2",
    ),
    "unknown block of a scale": (lambda: scale_change(CASE.feats, {"w": 2.0}), r"there is no block 'w'"),
    "unknown block of a side": (
        lambda: side_change(CASE.feats, {"w": low_rank(0, 3, 1)}, {}),
        r"there is no block 'w'",
    ),
    "unknown block of a direction": (
        lambda: joint_change(CASE.feats, Joint({"w": torch.ones(1, 1)}, 2.0)),
        r"there is no block 'w'",
    ),
    "a joint transform beside sides": (
        lambda: at.kernel_change(CASE.feats, {**JOINT, "block0": Sides()}, CASE.r),
        r"kernel_change: a joint transform moves all of its blocks together and cannot be combined with others; pass it",
    ),
    "two joint transforms": (
        lambda: at.kernel_change(CASE.feats, {**JOINT, "block0": _transforms(CASE, "joint", 2)["block0"]}, CASE.r),
        r"kernel_change: a joint transform .* the same for every block",
    ),
    "a joint transform of some blocks": (
        lambda: at.kernel_change(CASE.feats, {"block0": JOINT["block0"]}, CASE.r),
        r"joint transform moves blocks block0, block1, block2 and was given for block0; give it for each",
    ),
    "targets of another shape": (
        lambda: at.kernel_change(CASE.feats, GIVEN, CASE.r[:3]),
        r"kernel_change: targets have shape \(3, 2\), features are of n = 4 samples, c = 2 outputs",
    ),
    "targets as a vector for two outputs": (
        lambda: at.kernel_change(CASE.feats, GIVEN, CASE.r[:, 0]),
        r"targets have shape \(4,\), features are of n = 4 samples, c = 2 outputs",
    ),
    "targets elsewhere": (
        lambda: at.kernel_change(CASE.feats, GIVEN, CASE.r.to("meta")),
        r"kernel_change: targets are on meta and features on cpu; move one with \.to\(device\)",
    ),
    "integers": (
        lambda: at.kernel_change(CASE.feats, GIVEN, CASE.r.long()),
        r"kernel_change: targets are torch\.int64; give real numbers, e\.g\. y\.double\(\)",
    ),
    "not finite": (
        lambda: at.kernel_change(CASE.feats, GIVEN, CASE.r / torch.tensor([[1.0], [1.0], [0.0], [1.0]])),
        r"kernel_change: the target of sample 2 is not finite",
    ),
    "zero targets": (
        lambda: at.kernel_change(CASE.feats, GIVEN, 0 * CASE.r),
        r"kernel_change: the targets are zero, so there is no target kernel",
    ),
    "zero kernel": (
        lambda: at.kernel_change(
            CASE.feats.transformed(dict.fromkeys(CASE.phi, Sides(scale=0.0))), GIVEN, CASE.r
        ),
        r"kernel_change: the initial kernel is zero, so its change has no scale",
    ),
    "too little memory": (
        lambda: at.kernel_change(dataclasses.replace(CASE.feats, limit=1000), GIVEN, CASE.r),
        r"kernel_change: needs 5\.63 kB of memory and the limit is 1 kB; use outputs='trace', keep=False, or fewer",
    ),
    "too little memory to keep": (
        lambda: at.kernel_change(dataclasses.replace(CASE.feats, limit=6000), GIVEN, CASE.r, keep=True),
        r"kernel_change: needs 11\.8 kB",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_requests_without_an_answer_are_refused(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(at.TangentError, match=words):
        call()


def test_unknown_outputs_are_refused_by_name() -> None:
    unchecked = getattr(at.kernel_change, "__wrapped__", at.kernel_change)
    with pytest.raises(at.TangentError, match="kernel_change: outputs is one of full, trace, got 'diagonal'"):
        unchecked(CASE.feats, GIVEN, CASE.r, outputs="diagonal")
