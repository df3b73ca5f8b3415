"""The regularizer each structure induces, its gradient, its best transform and its dual, against their definitions."""

import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import adaptive_tangents as at
import theory_reference as reference
from adaptive_tangents.features.transforms import (
    Entrywise,
    Joint,
    LowRank,
    Modal,
    Scaled,
    Sides,
    squared,
    transform_matrices,
)
from adaptive_tangents.structures import modes
from adaptive_tangents.structures.base import Solution
from draws import examples
from finite_differences import derivative

Coefficients = dict[str, Tensor]
SHAPES = {"wide": (2, 4), "tall": (5, 3), "column": (3, 1), "single": (1, 1), "kernel": (3, 7)}
MODES = {**dict.fromkeys(SHAPES, ()), "kernel": (("in", 2), ("spatial", 3))}

# name: (structure for a strength, ω of the singular values of one factor per side)
SIDED = {
    "Left": lambda p, q: at.Left(p),
    "Right": lambda p, q: at.Right(p),
    "TwoSided": lambda p, q: at.TwoSided(p, q),
}
STRUCTURES: dict[str, Callable[[at.Penalty, at.Penalty], at.structures.Structure]] = {
    **reference.CURVED,
    "Modes": lambda p, q: at.Modes({"out": p, "in": q, "spatial": p}, modes=MODES),
}
# Structures that are invariant to a rotation of both sides of every block.
INVARIANT = ("Fixed", "Full", "LayerScale", *SIDED)
PENALTIES = {"quadratic": at.Quadratic, "absolute": at.Absolute}
few = examples(5)
seeds = st.integers(0, 10_000)
penalties = st.sampled_from(sorted(PENALTIES))
strengths = st.floats(-3, 3).map(lambda x: 10.0**x)
scales = st.floats(-2, 2).map(lambda x: 10.0**x)


def coefficients(seed: int, scale: float = 1.0) -> Coefficients:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()
    }


def flat(matrices: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([matrices[name].flatten() for name in SHAPES])


def omega(values: Tensor, penalty: at.Penalty) -> float:
    """Ω(M) = Σ ω(σ_j(M)) over the singular values of a factor; values below 1 cost nothing."""
    return float(penalty.value(values.clamp_min(1)).sum())


def random_factor(size: int, generator: torch.Generator, spread: float) -> Tensor:
    return torch.eye(size, dtype=torch.float64) + spread * torch.randn(
        size, size, generator=generator, dtype=torch.float64
    )


def inner_objective(
    name: str, b: Coefficients, first: at.Penalty, second: at.Penalty, seed: int, spread: float
) -> float:
    """‖M⁻ᵀβ‖² + Ω(M) of a random M of the structure, written with dense matrices."""
    generator = torch.Generator().manual_seed(seed)
    if name == "Full":
        beta = flat(b)
        m = random_factor(len(beta), generator, spread / 3)
        return float((torch.linalg.solve(m.mT, beta) ** 2).sum()) + omega(torch.linalg.svdvals(m), first)
    total = 0.0
    for key, matrix in b.items():
        o, i = matrix.shape
        theta = matrix
        if name in ("Rows", "Columns", "Diagonal"):
            shape = {"Rows": (o, 1), "Columns": (1, i), "Diagonal": (o, i)}[name]
            gains = 1 + spread * torch.rand(shape, generator=generator, dtype=torch.float64) * 3
            theta = matrix / gains
            total += omega(gains, first)
        if name == "LayerScale":
            s = 1 + spread * float(torch.rand(1, generator=generator)) * 3
            theta = matrix / s
            total += omega(torch.tensor([s], dtype=torch.float64), first)
        if name in ("Left", "TwoSided", "Modes"):
            left = random_factor(o, generator, spread)
            theta = torch.linalg.solve(left.mT, theta)  # B = M_Lᵀ Θ M_R
            total += omega(torch.linalg.svdvals(left), first)
        if name == "Modes" and MODES[key]:
            parts = [random_factor(d, generator, spread) for _, d in MODES[key]]
            total += sum(omega(torch.linalg.svdvals(part), w) for part, w in zip(parts, (second, first), strict=True))
            right = torch.block_diag(torch.kron(*parts), torch.eye(1, dtype=torch.float64))
            theta = torch.linalg.solve(right.mT, theta.mT).mT
        elif name in ("Right", "TwoSided", "Modes"):
            right = random_factor(i, generator, spread)
            theta = torch.linalg.solve(right.mT, theta.mT).mT
            total += omega(torch.linalg.svdvals(right), first if name == "Right" else second)
        total += float((theta**2).sum())
    return total


@pytest.mark.parametrize("name", STRUCTURES)
@few
@given(
    penalty=penalties, seed=seeds, one=strengths, other=strengths, scale=scales, spread=st.floats(0.0, 3.0)
)  # fmt: skip
def test_no_transform_of_the_structure_is_cheaper_than_the_induced_penalty(
    name: str, penalty: str, seed: int, one: float, other: float, scale: float, spread: float
) -> None:
    first, second = PENALTIES[penalty](one), PENALTIES[penalty](other)
    b = coefficients(seed, scale)
    least = STRUCTURES[name](first, second).penalty(b)
    assert least <= inner_objective(name, b, first, second, seed + 1, spread) * (1 + 1e-9)


def attained(
    transforms: Mapping[str, at.features.transforms.Transform],
    b: Coefficients,
    first: at.Penalty,
    second: at.Penalty,
    right: at.Penalty,
) -> float:
    """‖M⁻ᵀβ‖² + Ω(M) at the transforms a structure returned, from their dense matrices."""
    joint = next(iter(transforms.values()))
    if isinstance(joint, Joint):
        direction = flat(joint.direction)
        m = torch.eye(len(direction), dtype=torch.float64) + (joint.gain - 1) * torch.outer(direction, direction)
        return float((torch.linalg.solve(m.mT, flat(b)) ** 2).sum()) + omega(torch.linalg.svdvals(m), first)
    total = 0.0
    for name, matrix in b.items():
        sides = transforms[name]
        if isinstance(sides, Entrywise):
            total += float(((matrix / sides.gains) ** 2).sum()) + omega(sides.gains, first)
            continue
        assert isinstance(sides, Sides)
        theta = matrix / sides.scale
        if sides.scale != 1:
            total += omega(torch.tensor([sides.scale], dtype=torch.float64), first)
        if sides.left is not None:
            m = sides.left.matrix()
            theta = torch.linalg.solve(m.mT, theta)
            total += omega(torch.linalg.svdvals(m), first)
        if isinstance(sides.right, Modal):
            # The bias column comes after the modes and is unchanged.
            m = torch.block_diag(sides.right.matrix(), torch.eye(1, dtype=torch.float64))
            theta = torch.linalg.solve(m.mT, theta.mT).mT
            for factor, w in zip(sides.right.factors, (right, first), strict=True):
                total += omega(torch.linalg.svdvals(factor.matrix()), w)
        elif sides.right is not None:
            m = sides.right.matrix()
            theta = torch.linalg.solve(m.mT, theta.mT).mT
            total += omega(torch.linalg.svdvals(m), right)
        total += float((theta**2).sum())
    return total


@pytest.mark.parametrize("name", STRUCTURES)
@few
@given(penalty=penalties, seed=seeds, one=strengths, other=strengths, scale=scales)
def test_update_attains_the_induced_penalty(
    name: str, penalty: str, seed: int, one: float, other: float, scale: float
) -> None:
    first, second = PENALTIES[penalty](one), PENALTIES[penalty](other)
    structure, b = STRUCTURES[name](first, second), coefficients(seed, scale)
    found = attained(structure.update(b), b, first, second, second if name in ("TwoSided", "Modes") else first)
    # Singular values of a dense M round at eps·σ_max, so ω there is known to about λ·eps·σ_max.
    assert found == pytest.approx(structure.penalty(b), rel=1e-9, abs=1e-12 * max(one, other))


def scalars(name: str, matrix: np.ndarray) -> np.ndarray:
    """The numbers over which ω̃ is summed in one block."""
    if name in ("Rows", "Columns"):
        return np.linalg.norm(matrix, axis=1 if name == "Rows" else 0)
    return np.abs(matrix).ravel() if name == "Diagonal" else np.linalg.svd(matrix, compute_uv=False)


@pytest.mark.parametrize("name", [name for name in STRUCTURES if name != "Modes"])  # Modes has no closed form
@few
@given(seed=seeds, scale=scales)
def test_induced_penalty_is_the_stated_sum_of_scalar_penalties(name: str, seed: int, scale: float) -> None:
    one, other = reference.quadratic(0.5), reference.quadratic(4.0)
    b = coefficients(seed, scale)
    if name == "Fixed":
        expected = float((flat(b) ** 2).sum())
    elif name == "Full":
        expected = reference.induced(one, float(flat(b).norm()))[0]
    elif name == "LayerScale":
        expected = sum(reference.induced(one, float(matrix.norm()))[0] for matrix in b.values())
    else:
        if name == "TwoSided":  # the reference is slow: one block only
            b = {"wide": b["wide"]}
        values = np.concatenate([scalars(name, matrix.numpy()) for matrix in b.values()])
        expected = sum(
            reference.induced_by_two(one, other, float(v))
            if name == "TwoSided"
            else reference.induced(one, float(v))[0]
            for v in values
        )
    structure = STRUCTURES[name](at.Quadratic(0.5), at.Quadratic(4.0))
    assert structure.penalty(b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", STRUCTURES)
@few
@given(penalty=penalties, seed=seeds, one=strengths, other=strengths, scale=scales)
def test_gradient_is_the_derivative_along_every_direction(
    name: str, penalty: str, seed: int, one: float, other: float, scale: float
) -> None:
    structure = STRUCTURES[name](PENALTIES[penalty](one), PENALTIES[penalty](other))
    b, direction = coefficients(seed, scale), coefficients(seed + 1, scale)

    def along(t: float) -> float:
        return structure.penalty({key: matrix + t * direction[key] for key, matrix in b.items()})

    derivative(along, 3e-5).check(float((flat(structure.gradient(b)) * flat(direction)).sum()))


@pytest.mark.parametrize("name", STRUCTURES)
@few
@given(seed=seeds, scale=scales)
def test_gradient_is_twice_the_coefficients_whitened_by_the_best_transform(name: str, seed: int, scale: float) -> None:
    structure, b = STRUCTURES[name](at.Quadratic(0.3), at.Quadratic(2.0)), coefficients(seed, scale)
    transforms = structure.update(b)
    back = structure.gradient(b)
    for _ in range(2):  # M symmetric: P = MᵀM is M twice
        back = transform_matrices(back, transforms)
    torch.testing.assert_close(flat(back), 2 * flat(b), rtol=1e-9, atol=1e-9 * scale)
    at_once = transform_matrices(structure.gradient(b), squared(transforms))
    torch.testing.assert_close(flat(at_once), 2 * flat(b), rtol=1e-9, atol=1e-9 * scale)


@pytest.mark.parametrize("name", INVARIANT)
@few
@given(seed=seeds, scale=scales)
def test_penalty_does_not_change_under_rotations_of_either_side(name: str, seed: int, scale: float) -> None:
    structure, b = STRUCTURES[name](at.Quadratic(0.3), at.Absolute(2.0)), coefficients(seed, scale)
    generator = torch.Generator().manual_seed(seed + 1)
    turned, gradients, gradient = {}, {}, structure.gradient(b)
    for key, matrix in b.items():
        q, _ = torch.linalg.qr(torch.randn(len(matrix), len(matrix), generator=generator, dtype=torch.float64))
        w, _ = torch.linalg.qr(torch.randn(matrix.shape[1], matrix.shape[1], generator=generator, dtype=torch.float64))
        turned[key] = q @ matrix @ w
        gradients[key] = q @ gradient[key] @ w
    assert structure.penalty(turned) == pytest.approx(structure.penalty(b), rel=1e-11)
    torch.testing.assert_close(flat(structure.gradient(turned)), flat(gradients), rtol=1e-8, atol=1e-10 * scale)


@few
@given(seed=seeds, one=strengths, other=strengths, scale=scales)
def test_best_factors_are_identity_plus_gains_along_the_singular_vectors(
    seed: int, one: float, other: float, scale: float
) -> None:
    """M_L = I + U diag(a − 1)Uᵀ, M_R = I + V diag(b − 1)Vᵀ; (a, b) minimize ω_L(a) + ω_R(b) + σ²/(ab)²."""
    matrix = coefficients(seed, scale)["tall"]
    sides = at.TwoSided(at.Quadratic(one), at.Quadratic(other)).update({"tall": matrix})["tall"]
    assert isinstance(sides, Sides)
    assert sides.left is not None
    assert sides.right is not None
    u, sigma, vt = torch.linalg.svd(matrix, full_matrices=False)
    a, b = (u.mT @ sides.left.matrix() @ u).diagonal(), (vt @ sides.right.matrix() @ vt.mT).diagonal()
    torch.testing.assert_close(
        sides.left.matrix(),
        torch.eye(5, dtype=torch.float64) + (u * (a - 1)) @ u.mT,
        rtol=1e-9,
        atol=1e-11 * float(a.max()),
    )
    torch.testing.assert_close(
        sides.right.matrix(),
        torch.eye(3, dtype=torch.float64) + (vt.mT * (b - 1)) @ vt,
        rtol=1e-9,
        atol=1e-11 * float(b.max()),
    )
    # Zero derivative in log a and in log b, of a sum that is convex in them.
    shared = 2 * sigma**2 / (a * b) ** 2
    for gain, strength in ((a, one), (b, other)):
        torch.testing.assert_close(
            2 * strength * (gain - 1) * gain, shared, rtol=1e-8, atol=1e-13 * strength * float(gain.max()) ** 2
        )


def test_equal_sides_move_equally_and_a_stronger_penalty_moves_less() -> None:
    matrix = coefficients(3, 3.0)["single"]
    even = at.TwoSided(at.Quadratic(1.0)).update({"single": matrix})["single"]
    assert float(even.left.gains) == pytest.approx(float(even.right.gains), rel=1e-14)
    uneven = at.TwoSided(at.Quadratic(1.0), at.Quadratic(100.0)).update({"single": matrix})["single"]
    a, b = float(uneven.left.gains), float(uneven.right.gains)
    assert a > float(even.left.gains) > b > 1
    assert 1.0 * (a - 1) * a == pytest.approx(100.0 * (b - 1) * b, rel=1e-10)


def test_a_composition_can_be_the_penalty_of_a_side() -> None:
    """With two transforms on the left and one on the right, the induced penalty is that of all three composed."""
    one, two, three = at.Quadratic(0.5), at.Absolute(0.7), at.Quadratic(3.0)
    b = coefficients(5, 4.0)
    nested = at.TwoSided(one.compose(two), three)
    values = torch.cat([torch.linalg.svdvals(matrix) for matrix in b.values()])
    expected = float(one.compose(two).compose(three).induced().value(values).sum())
    assert nested.penalty(b) == pytest.approx(expected, rel=1e-12)
    composed = one.compose(two)
    assert attained(nested.update(b), b, composed, three, three) == pytest.approx(expected, rel=1e-9)
    assert at.Left(composed).penalty(b) < at.Left(one).penalty(b)


@few
@given(seed=seeds, scale=scales)
def test_more_freedom_never_costs_more(seed: int, scale: float) -> None:
    b, p = coefficients(seed, scale), at.Quadratic(0.5)
    fixed, full = at.Fixed().penalty(b), at.Full(p).penalty(b)
    one, both = at.Left(p).penalty(b), at.TwoSided(p).penalty(b)
    assert both <= one * (1 + 1e-12)
    assert one <= fixed * (1 + 1e-12)
    assert at.LayerScale(p).penalty(b) <= fixed * (1 + 1e-12)
    assert full <= at.LayerScale(p).penalty(b) * (1 + 1e-12)  # one rank-one M against one factor per block
    for finer, coarser in ((at.Left, at.Rows), (at.Right, at.Columns)):  # a diagonal M_L is an M_L
        assert finer(p).penalty(b) <= coarser(p).penalty(b) * (1 + 1e-12)
    modes = at.Modes(p, modes=MODES)
    assert modes.penalty(b) <= at.Modes({"out": p, "in": p}, modes=MODES).penalty(b) * (1 + 1e-10)
    assert at.Right(p).penalty(b) == pytest.approx(one, rel=1e-13)


@pytest.mark.parametrize("name", STRUCTURES)
@few
@given(seed=seeds, strength=strengths, scale=scales, share=st.floats(0.0, 0.999))
def test_dual_bounds_the_conjugate(name: str, seed: int, strength: float, scale: float, share: float) -> None:
    """⟨G, β⟩ − Ω̃(β) ≤ Ω̃*(G) for every pair."""
    p = at.Quadratic(strength)
    structure = STRUCTURES[name](p, p)
    b, g = coefficients(seed, scale), coefficients(seed + 1)
    largest = max(float(torch.linalg.matrix_norm(matrix, 2)) for matrix in g.values())
    if name not in SIDED:
        largest = float(flat(g).norm())
    g = {key: share * 2 * math.sqrt(strength) / largest * matrix for key, matrix in g.items()}
    conjugate = structure.dual(g)
    if name in ("TwoSided", "Modes"):
        assert conjugate == math.inf or not flat(g).any()  # the smallest share leaves zeros
    else:
        assert math.isfinite(conjugate)
    reached = float((flat(g) * flat(b)).sum()) - structure.penalty(b)
    assert reached <= conjugate + 1e-10 * abs(reached)


@pytest.mark.parametrize("name", [name for name in STRUCTURES if name not in ("TwoSided", "Modes")])
@few
@given(seed=seeds, scale=st.floats(-2, 1).map(lambda x: 10.0**x))
def test_dual_is_attained_at_the_gradient_of_a_convex_structure(name: str, seed: int, scale: float) -> None:
    structure, b = STRUCTURES[name](at.Quadratic(0.5), at.Quadratic(0.5)), coefficients(seed, scale)
    g = structure.gradient(b)
    expected = float((flat(g) * flat(b)).sum()) - structure.penalty(b)
    assert structure.dual(g) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("name", STRUCTURES)
def test_zero_coefficients_cost_nothing_and_move_nothing(name: str, penalty: str) -> None:
    structure = STRUCTURES[name](PENALTIES[penalty](0.5), PENALTIES[penalty](2.0))
    b = coefficients(0, 0.0)
    solution = structure.solution(b)
    assert solution.penalty == 0
    assert float(flat(solution.gradient).norm()) == 0
    assert structure.dual(b) == 0
    probe = coefficients(1)
    torch.testing.assert_close(flat(transform_matrices(probe, solution.transforms)), flat(probe), rtol=0, atol=0)


@pytest.mark.parametrize("name", SIDED)
@few
@given(seed=seeds, scale=scales)
def test_rank_deficient_coefficients_move_only_the_directions_they_have(name: str, seed: int, scale: float) -> None:
    tall = coefficients(seed, scale)["tall"]
    u, sigma, vt = torch.linalg.svd(tall, full_matrices=False)
    b = {"tall": sigma[0] * torch.outer(u[:, 0], vt[0])}
    structure = SIDED[name](at.Quadratic(1e-3), at.Quadratic(1e-3))
    sides = structure.update(b)["tall"]
    for side in (sides.left, sides.right):
        assert side is None or int((torch.linalg.svdvals(side.matrix()) > 1 + 1e-9).sum()) == 1
    alone = structure.penalty({"one": sigma[0].reshape(1, 1)})
    assert structure.penalty(b) == pytest.approx(alone, rel=1e-11)


@few
@given(seed=seeds)
def test_low_rank_factors_are_the_dense_matrices_they_stand_for(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(5, 2, generator=generator, dtype=torch.float64))
    gains = 1 + 3 * torch.rand(2, generator=generator, dtype=torch.float64)
    factor = LowRank(q, gains)
    dense = torch.eye(5, dtype=torch.float64) + q @ torch.diag(gains - 1) @ q.mT
    torch.testing.assert_close(factor.matrix(), dense)
    torch.testing.assert_close(factor.squared().matrix(), dense @ dense)
    torch.testing.assert_close(factor.inverse().matrix(), torch.linalg.inv(dense))
    rows = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(factor.apply(rows), torch.einsum("ij,abj->abi", dense, rows))


@pytest.mark.parametrize("name", STRUCTURES)
@few
@given(seed=seeds)
def test_features_and_coefficients_are_transformed_by_the_same_matrix(name: str, seed: int) -> None:
    """⟨Mφ, θ⟩ = ⟨φ, Mᵀθ⟩ with symmetric M; the library computes both sides."""
    case = reference.problem(seed, n=3, c=2, shapes=(*reference.KERNEL, (2, 1, 0)), modes=reference.KERNEL_MODES)
    structure = STRUCTURES[name](at.Quadratic(0.1), at.Quadratic(0.2)).prepared(case.feats)
    generator = torch.Generator().manual_seed(seed + 1)
    b, theta = (case.split(torch.randn(case.rows.shape[1], generator=generator, dtype=torch.float64)) for _ in range(2))
    transforms = structure.update(b)
    moved = case.feats.transformed(transforms).inner(theta)
    expected = case.rows @ case.flatten(transform_matrices(theta, transforms))
    torch.testing.assert_close(moved.flatten(), expected, rtol=1e-10, atol=1e-10)
    dense = written_out(case, transforms)
    adapted = case.feats.transformed(transforms)
    torch.testing.assert_close(adapted.dense().flatten(0, 1), case.rows @ dense.mT, rtol=1e-9, atol=1e-9)
    kernel = case.rows @ dense.mT @ dense @ case.rows.mT
    torch.testing.assert_close(adapted.kernel().flatten(2).flatten(0, 1), kernel, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sum(adapted.kernel(by_block=True).values()), adapted.kernel(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(adapted[1:].kernel(adapted), adapted.kernel()[1:], rtol=1e-9, atol=1e-9)
    assert adapted.to(torch.float32).dense().dtype == torch.float32
    assert adapted.plan().feature_bytes == sum(block.bytes for block in adapted.blocks.values())


def written_out(case: reference.Problem, transforms: Mapping[str, at.features.transforms.Transform]) -> Tensor:
    """M (p, p) from the fields of the transforms."""
    joint = next(iter(transforms.values()))
    if isinstance(joint, Joint):
        vector = case.flatten(joint.direction)
        return torch.eye(len(vector), dtype=torch.float64) + (joint.gain - 1) * torch.outer(vector, vector)

    def side(factor: at.features.transforms.Side | None, d: int) -> Tensor:
        if factor is None:
            return torch.eye(d, dtype=torch.float64)
        whole = factor.matrix()
        return torch.block_diag(whole, torch.eye(d - len(whole), dtype=torch.float64))

    pieces = []
    for name, part in case.phi.items():
        o, i = part.shape[2:]
        found = transforms[name]
        if isinstance(found, Entrywise):
            pieces.append(torch.diag(found.gains.flatten()))
        else:
            assert isinstance(found, Sides)
            pieces.append(found.scale * torch.kron(side(found.left, o), side(found.right, i)))
    return torch.block_diag(*pieces)


# ------------------------------------------------------------------------------------- structures in terms of others


@few
@given(seed=seeds, strength=strengths, scale=scales)
def test_rows_are_left_of_coefficients_with_orthogonal_rows_and_diagonal_is_rows_of_single_entries(
    seed: int, strength: float, scale: float
) -> None:
    """If the left singular vectors are the axes, the best M_L is diagonal, so requiring that loses nothing."""
    p, b = at.Quadratic(strength), coefficients(seed, scale)["wide"]
    _, _, vt = torch.linalg.svd(b, full_matrices=False)
    matrix = {"w": scale * torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)) @ vt}
    rows, left = at.Rows(p).solution(matrix), at.Left(p).solution(matrix)
    assert rows.penalty == pytest.approx(left.penalty, rel=1e-11)
    dense = [found.transforms["w"].left.matrix() for found in (rows, left)]
    torch.testing.assert_close(dense[0], dense[1], rtol=1e-9, atol=1e-9 * float(dense[0].max()))
    turned = at.Columns(p).solution({"w": matrix["w"].mT})
    assert turned.penalty == pytest.approx(rows.penalty, rel=1e-13)
    torch.testing.assert_close(turned.gradient["w"].mT, rows.gradient["w"])
    entries, singles = at.Diagonal(p).solution({"w": b}), at.Rows(p).solution({"w": b.reshape(-1, 1)})
    assert entries.penalty == pytest.approx(singles.penalty, rel=1e-13)
    torch.testing.assert_close(entries.gradient["w"].reshape(-1, 1), singles.gradient["w"])
    torch.testing.assert_close(entries.transforms["w"].gains.flatten(), singles.transforms["w"].left.gains)


@few
@given(seed=seeds, one=strengths, other=strengths, scale=scales)
def test_modes_with_one_mode_are_left_of_its_unfolding_and_without_modes_two_sided(
    seed: int, one: float, other: float, scale: float
) -> None:
    p, q, b = at.Quadratic(one), at.Quadratic(other), coefficients(seed, scale)
    out = at.Modes({"out": p}, modes=MODES)
    assert_same(out.solution(b), at.Left(p).solution(b))
    assert out.dual(b) == at.Left(p).dual(b)
    flat = {key: matrix for key, matrix in b.items() if not MODES[key]}
    assert_same(at.Modes({"out": p, "in": q}, modes=MODES).solution(flat), at.TwoSided(p, q).solution(flat))
    assert_same(at.Modes({"in": q}, modes=MODES).solution(flat), at.Right(q).solution(flat))
    assert_same(at.Modes({"spatial": q}, modes=MODES).solution(flat), at.Fixed().solution(flat))
    kernel, bias = b["kernel"][:, :6].reshape(3, 2, 3), b["kernel"][:, 6:]
    for mode, unfolded in (("in", kernel.movedim(1, 0)), ("spatial", kernel.movedim(2, 0))):
        alone = at.Modes({mode: p}, modes=MODES)
        found, expected = alone.solution({"kernel": b["kernel"]}), at.Left(p).solution({"w": unfolded.flatten(1)})
        assert found.penalty == pytest.approx(expected.penalty + float((bias**2).sum()), rel=1e-12)
        back = expected.gradient["w"].reshape(unfolded.shape).movedim(0, 1 if mode == "in" else 2).flatten(1)
        torch.testing.assert_close(found.gradient["kernel"], torch.cat([back, 2 * bias], 1))
        assert alone.dual(found.gradient) == pytest.approx(
            float((found.gradient["kernel"] * b["kernel"]).sum()) - found.penalty, rel=1e-8
        )


def assert_same(found: Solution, expected: Solution) -> None:
    assert found.penalty == expected.penalty
    assert found.curvature is not None
    assert expected.curvature is not None
    for name, matrix in expected.gradient.items():
        torch.testing.assert_close(found.gradient[name], matrix, rtol=0, atol=0)
    for name, matrix in expected.curvature(expected.gradient).items():
        torch.testing.assert_close(found.curvature(expected.gradient)[name], matrix, rtol=0, atol=0)


@few
@given(seed=seeds, one=strengths, other=strengths, scale=scales)
def test_every_turn_of_the_modes_lowers_the_objective_and_no_factor_can_be_improved_in_the_end(
    seed: int, one: float, other: float, scale: float
) -> None:
    b = {"kernel": coefficients(seed, scale)["kernel"]}
    penalties = {"out": at.Quadratic(one), "in": at.Absolute(other), "spatial": at.Quadratic(other)}
    objectives = []
    for sweeps in (1, 2, 3, 5, 10, 500):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(modes, "_SWEEPS", sweeps)
            objectives.append(at.Modes(penalties, modes=MODES).penalty(b))
    # Large gains cancel in the value, so its rounding is some hundred times that of a sum.
    assert all(after <= before * (1 + 1e-11) for before, after in itertools.pairwise(objectives))
    assert objectives[0] <= at.Modes({"out": penalties["out"]}, modes=MODES).penalty(b) * (1 + 1e-13)
    found = at.Modes(penalties, modes=MODES).solution(b)
    assert found.curvature is None
    # With the other modes fixed, each mode's factor is optimal.
    sides = found.transforms["kernel"]
    kernel, bias = b["kernel"][:, :6].reshape(3, 2, 3), b["kernel"][:, 6:]
    dense = [sides.left.matrix(), *(factor.matrix() for factor in sides.right.factors)]
    inverses = [torch.linalg.inv(m) for m in dense]
    eye = torch.eye(3, dtype=torch.float64)
    for k, mode in enumerate(penalties):
        others = [eye[: len(m), : len(m)] if j == k else m for j, m in enumerate(inverses)]
        whitened = torch.einsum("ois,oa,ib,sc->abc", kernel, *others).movedim(k, 0).flatten(1)
        whitened = torch.cat([whitened, bias], 1) if k == 0 else whitened
        best = at.Left(penalties[mode]).update({"w": whitened})["w"].left.matrix()
        torch.testing.assert_close(dense[k], best, rtol=1e-6, atol=1e-6 * float(best.max()))


def test_modes_say_what_they_lack() -> None:
    b = {"kernel": coefficients(0)["kernel"]}
    with pytest.raises(at.TangentError, match=r"Modes: the modes of block 'kernel' are not known; use .*prepared"):
        at.Modes().penalty(b)
    feats = reference.problem(0, shapes=reference.KERNEL, modes=reference.KERNEL_MODES).feats
    with pytest.raises(at.TangentError, match=r"got \['depth'\]; modes of these features are out, in, spatial"):
        at.Modes({"depth": at.Quadratic()}).prepared(feats)
    with pytest.raises(at.TangentError, match=r"give penalties by the names of modes, got \[\]"):
        at.Modes({}).prepared(feats)
    assert repr(at.Modes().prepared(feats)) == "Modes(penalties=Quadratic(strength=1.0))"
    assert repr(at.TwoSided(at.Quadratic(2.0))) == "TwoSided(left=Quadratic(strength=2.0), right=None)"
    assert repr(at.Fixed(scale_invariant=True)) == "Fixed(scale_invariant=True)"


@few
@given(seed=seeds)
def test_a_diagonal_side_is_the_matrix_it_stands_for(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gains = 1 + 3 * torch.rand(5, generator=generator, dtype=torch.float64)
    side, dense = Scaled(gains), torch.diag(gains)
    torch.testing.assert_close(side.matrix(), dense)
    torch.testing.assert_close(side.squared().matrix(), dense @ dense)
    torch.testing.assert_close(side.inverse().matrix(), torch.linalg.inv(dense))
    rows = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(side.apply(rows), torch.einsum("ij,abj->abi", dense, rows))
