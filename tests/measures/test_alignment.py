"""Measures of kernels against textbook formulas with explicit H and loops (theory §5)."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import adaptive_tangents as at
import theory_reference as reference
from draws import examples

few = examples(20)
seeds = st.integers(0, 10_000)


def psd(seed: int, n: int, c: int | None = None, rank: int = 30) -> Tensor:
    size = n * (c or 1)
    rows = torch.randn(size, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kernel = rows @ rows.mT + 0.3  # not centered
    return kernel if c is None else kernel.reshape(n, c, n, c)


def targets(seed: int, n: int, c: int | None = None) -> Tensor:
    shape = (n,) if c is None else (n, c)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) + 0.5


# ------------------------------------------------------------------------------------------------------- alignment


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("c", "full"), [(None, False), (3, False), (2, True), (1, True)])
@few
@given(seed=seeds)
def test_alignment_is_the_cosine_with_the_target_kernel(c: int | None, full: bool, centered: bool, seed: int) -> None:
    kernel, y = psd(seed, 6, c if full else None), targets(seed, 6, c)
    a, b = kernel.numpy(), reference.target_kernel(y.numpy(), full=full)
    if centered:
        a, b = reference.center(a), reference.center(b)
    assert at.alignment(kernel, y, centered=centered) == pytest.approx(reference.cosine(a, b), rel=1e-11)


@few
@given(seed=seeds, factor=st.floats(-20, 20).map(lambda x: 10.0**x))
def test_alignment_does_not_change_with_the_scale_of_kernel_or_targets(seed: int, factor: float) -> None:
    kernel, y = psd(seed, 7), targets(seed, 7)
    expected = at.alignment(kernel, y)
    assert at.alignment(factor * kernel, y) == pytest.approx(expected, rel=1e-12)
    assert at.alignment(kernel, -factor * y) == pytest.approx(expected, rel=1e-12)
    assert 0 < expected < 1
    assert at.alignment(torch.outer(y, y), y) == pytest.approx(1, rel=1e-12)


@few
@given(seed=seeds)
def test_centered_alignment_ignores_what_is_constant_over_samples(seed: int) -> None:
    kernel, y = psd(seed, 7, 2), targets(seed, 7, 2)
    shift = torch.tensor([3.0, -2.0], dtype=torch.float64)
    expected = at.alignment(kernel, y, centered=True)
    assert at.alignment(kernel, y + shift, centered=True) == pytest.approx(expected, rel=1e-10)
    assert at.alignment(kernel, y + shift) != pytest.approx(at.alignment(kernel, y), rel=1e-9)
    moved = kernel + torch.randn(2, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert at.alignment(moved, y, centered=True) == pytest.approx(expected, rel=1e-10)


def test_adaptation_of_the_full_structure_raises_alignment_to_one() -> None:
    case = reference.problem(1, n=6, c=2, scale=3.0)
    found = [
        at.alignment(
            at.fit(case.feats, case.r, structure=at.Full(at.Quadratic(s))).transform(case.feats).kernel(), case.r
        )
        for s in (1e3, 1.0, 1e-3, 1e-6, 1e-12)
    ]
    assert found == sorted(found)
    assert found[-1] > 0.9999


# -------------------------------------------------------------------------------------------------------------- CKA


@pytest.mark.parametrize("c", [None, 2])
@few
@given(seed=seeds)
def test_cka_is_the_cosine_of_kernels_centered_with_an_explicit_h(c: int | None, seed: int) -> None:
    a, b = psd(seed, 6, c), psd(seed + 1, 6, c)
    expected = reference.cosine(reference.center(a.numpy()), reference.center(b.numpy()))
    assert at.cka(a, b) == pytest.approx(expected, rel=1e-11)
    assert at.cka(b, a) == pytest.approx(expected, rel=1e-11)
    assert at.cka(a, 3 * a + 2) == pytest.approx(1, rel=1e-11)


@examples(8)
@given(seed=seeds, n=st.integers(4, 7))
def test_unbiased_cka_is_the_mean_over_quadruples_of_distinct_samples(seed: int, n: int) -> None:
    a, b = psd(seed, n, rank=3), psd(seed + 1, n, rank=3)
    # HSIC of a kernel with itself is a squared norm, hence positive; between two kernels it need not be.
    assert at.cka(a, b, unbiased=True) == pytest.approx(
        reference.unbiased_cka(a.numpy(), b.numpy()), rel=1e-7, abs=1e-9
    )
    assert at.cka(a, a, unbiased=True) == pytest.approx(1, rel=1e-9)


def test_unbiased_cka_of_independent_data_is_zero_in_the_mean_where_the_biased_one_is_not() -> None:
    pairs = [(psd(2 * k, 12, rank=8), psd(2 * k + 1, 12, rank=8)) for k in range(300)]
    unbiased = np.array([at.cka(a, b, unbiased=True) for a, b in pairs])
    biased = np.array([at.cka(a, b) for a, b in pairs])
    assert abs(unbiased.mean()) < 4 * unbiased.std() / math.sqrt(len(pairs))
    assert (unbiased < 0).any()
    assert biased.mean() > 0.4


def test_unbiased_cka_ignores_the_diagonal() -> None:
    a, b = psd(0, 8), psd(1, 8)
    noise = torch.diag(torch.linspace(1, 50, 8, dtype=torch.float64))
    assert at.cka(a + noise, b, unbiased=True) == pytest.approx(at.cka(a, b, unbiased=True), rel=1e-9)
    assert at.cka(a + noise, b) != pytest.approx(at.cka(a, b), rel=1e-3)


# -------------------------------------------------------------------------------------------------------- decompose


@pytest.mark.parametrize(("c", "full"), [(None, False), (3, False), (2, True)])
@few
@given(seed=seeds, first=st.floats(-5, 5), second=st.floats(-5, 5))
def test_decompose_recovers_planted_weights(c: int | None, full: bool, seed: int, first: float, second: float) -> None:
    initial, y = psd(seed, 7, c if full else None), targets(seed, 7, c)
    planted = first * initial + second * torch.from_numpy(reference.target_kernel(y.numpy(), full=full))
    if float(planted.norm()) < 1e-3:
        return
    found = at.decompose(planted, initial, y)
    assert found.initial_weight == pytest.approx(first, abs=1e-9)
    assert found.target_weight == pytest.approx(second, abs=1e-8)
    assert found.explained == pytest.approx(1, abs=1e-12)
    assert found.residual.shape == planted.shape
    assert float(found.residual.norm()) < 1e-8


@few
@given(seed=seeds)
def test_what_decompose_leaves_is_orthogonal_to_both_kernels(seed: int) -> None:
    kernel, initial, y = psd(seed, 7), psd(seed + 5, 7), targets(seed, 7)
    found = at.decompose(kernel, initial, y)
    size = float(kernel.norm())
    assert float((found.residual * initial).sum()) == pytest.approx(0, abs=1e-9 * size * float(initial.norm()))
    assert float((found.residual * torch.outer(y, y)).sum()) == pytest.approx(0, abs=1e-9 * size * float(y @ y))
    fitted = found.initial_weight * initial + found.target_weight * torch.outer(y, y)
    torch.testing.assert_close(fitted + found.residual, kernel)
    # Pythagoras: the explained part and the residual add up.
    assert found.explained == pytest.approx(float((fitted**2).sum()) / size**2, rel=1e-9)
    assert 0 <= found.explained <= 1


def test_decompose_finds_what_the_full_structure_adds() -> None:
    """§5: exactly K₀ + ((z² − 1)/‖β‖²) r rᵀ."""
    case = reference.problem(1, n=6, c=2, scale=3.0)
    fit = at.fit(case.feats, case.r, structure=at.Full(at.Quadratic(0.2)))
    z = next(iter(fit.transforms.values())).gain
    found = at.decompose(fit.transform(case.feats).kernel(), case.feats.kernel(), case.r)
    assert found.initial_weight == pytest.approx(1, rel=1e-9)
    beta = case.flatten(fit.coefficients)
    assert found.target_weight == pytest.approx((z**2 - 1) / float(beta @ beta), rel=1e-9)
    assert found.explained == pytest.approx(1, abs=1e-12)


# -------------------------------------------------------------------------------------------------- representability


@pytest.mark.parametrize("c", [None, 1, 2])
@few
@given(seed=seeds)
def test_representability_is_norm_energy_and_residuals_by_definition(c: int | None, seed: int) -> None:
    n = 7
    kernel, r = psd(seed, n, c), targets(seed, n, c)
    found = at.representability(kernel, r, jitter=0.0)
    dense, flat = kernel.reshape(n * (c or 1), -1).numpy(), r.numpy().ravel()
    assert found.rkhs_norm == pytest.approx(flat @ np.linalg.solve(dense, flat), rel=1e-7)
    _, vectors = np.linalg.eigh(dense)
    energy = [
        sum((vectors[:, -j] @ flat) ** 2 for j in range(1, k + 1)) / (flat @ flat) for k in range(1, len(flat) + 1)
    ]
    np.testing.assert_allclose(found.energy.numpy(), energy, rtol=1e-8)
    assert found.energy[-1].item() == pytest.approx(1, rel=1e-12)
    # Leave out each sample with all its outputs, and predict it by interpolation from the rest.
    width, out = c or 1, np.zeros((n, c or 1))
    for k in range(n):
        own = np.arange(k * width, (k + 1) * width)
        rest = np.setdiff1d(np.arange(n * width), own)
        predicted = dense[np.ix_(own, rest)] @ np.linalg.solve(dense[np.ix_(rest, rest)], flat[rest])
        out[k] = flat[own] - predicted
    assert found.leave_one_out.shape == r.shape
    np.testing.assert_allclose(found.leave_one_out.numpy(), out.reshape(r.shape), rtol=1e-6, atol=1e-8)
    assert found.leave_one_out_rmse == pytest.approx(math.sqrt((out**2).mean()), rel=1e-6)
    assert found.jitter == 0


def test_a_target_in_the_top_eigenvector_is_represented_best() -> None:
    values, vectors = torch.linalg.eigh(psd(3, 8))
    kernel = (vectors * values) @ vectors.mT
    top, bottom = (at.representability(kernel, vectors[:, k], jitter=0.0) for k in (-1, 0))
    assert top.rkhs_norm == pytest.approx(1 / float(values[-1]), rel=1e-8)
    assert bottom.rkhs_norm == pytest.approx(1 / float(values[0]), rel=1e-8)
    assert top.energy[0].item() == pytest.approx(1, rel=1e-12)
    assert bottom.energy[-2].item() == pytest.approx(0, abs=1e-12)


def test_rkhs_norm_is_the_norm_of_the_fixed_fit() -> None:
    case = reference.problem(4, n=6, c=2, scale=2.0)
    fit = at.fit(case.feats, case.r, structure=at.Fixed())
    found = at.representability(case.feats.kernel(), case.r, jitter=0.0)
    assert found.rkhs_norm == pytest.approx(fit.objective, rel=1e-9)


def test_a_singular_kernel_is_inverted_with_the_jitter_reported() -> None:
    u = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    found = at.representability(torch.outer(u, u), u)
    assert found.jitter == pytest.approx(2e-10, rel=1e-9)
    assert found.rkhs_norm == pytest.approx(1, rel=1e-6)


# ------------------------------------------------------------------------------------------------------- effective rank


@pytest.mark.parametrize(
    ("spectrum", "stable", "entropy", "participation"),
    [
        ([1.0, 1.0, 1.0, 1.0], 4, 4, 4),
        ([5.0], 1, 1, 1),
        ([2.0, 0.0, 0.0], 1, 1, 1),
        ([2.0, 1.0], 1.25, math.exp(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)), 25 / 17),
        ([3.0, 1.0, 1.0], 11 / 9, math.exp(-0.6 * math.log(0.6) - 0.4 * math.log(0.2)), 121 / 83),
    ],
)
def test_effective_ranks_of_known_spectra(
    spectrum: list[float], stable: float, entropy: float, participation: float
) -> None:
    for given_as in (torch.tensor(spectrum), torch.diag(torch.tensor(spectrum)), np.diag(spectrum)):
        found = at.effective_rank(given_as)
        assert found.stable == pytest.approx(stable, rel=1e-7)
        assert found.entropy == pytest.approx(entropy, rel=1e-7)
        assert found.participation == pytest.approx(participation, rel=1e-7)


@few
@given(seed=seeds, rank=st.integers(1, 4), factor=st.floats(-100, 100).map(lambda x: 10.0**x))
def test_effective_ranks_lie_between_one_and_the_rank_and_ignore_scale_and_rotation(
    seed: int, rank: int, factor: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right, turn = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((6, rank), (rank, 4), (6, 6))
    )
    b = left @ right
    found = at.effective_rank(b)
    q, _ = torch.linalg.qr(turn)
    for other in (at.effective_rank(factor * b), at.effective_rank(q @ b), at.effective_rank(b.mT)):
        for kind in ("stable", "entropy", "participation"):
            assert 1 - 1e-12 <= getattr(found, kind) <= rank + 1e-9
            assert getattr(other, kind) == pytest.approx(getattr(found, kind), rel=1e-9)
    assert found.stable <= found.participation * (1 + 1e-12)  # Σσ²/σ₁² ≤ (Σσ²)²/Σσ⁴, as Σσ⁴ ≤ σ₁²Σσ²
    assert found.participation <= found.entropy * (1 + 1e-9)  # Rényi entropies: order 2 of σ² against order 1 of σ


def test_a_zero_matrix_has_rank_zero() -> None:
    for empty in (torch.zeros(3, 2), torch.zeros(4), torch.zeros(0, 3)):
        found = at.effective_rank(empty)
        assert (found.stable, found.entropy, found.participation) == (0.0, 0.0, 0.0)


# ------------------------------------------------------------------------------------------------------------ input


def test_numpy_and_float32_inputs_give_the_same_numbers() -> None:
    kernel, other, y = psd(0, 6), psd(1, 6), targets(0, 6)
    calls: list[Callable[[Callable[[Tensor], Tensor | np.ndarray]], list[float]]] = [
        lambda f: [at.alignment(f(kernel), f(y)), at.alignment(f(kernel), f(y), centered=True)],
        lambda f: [at.cka(f(kernel), f(other)), at.cka(f(kernel), f(other), unbiased=True)],
        lambda f: [at.decompose(f(kernel), f(other), f(y)).target_weight],
        lambda f: [at.representability(f(kernel), f(y)).rkhs_norm],
        lambda f: [at.effective_rank(f(kernel)).entropy],
    ]
    for call in calls:
        expected = call(lambda t: t)
        assert call(lambda t: t.numpy()) == expected
        assert call(lambda t: t.clone().requires_grad_(True)) == expected
        assert call(lambda t: t.float()) == pytest.approx(expected, rel=1e-4)


K, Y = torch.eye(5) + 1, torch.arange(5.0)
REFUSED = {
    "kernel not square": (
        lambda: at.alignment(torch.ones(3, 4), Y),
        r"alignment: a kernel has shape \(n, n\) or \(n, c, n, c\), got \(3, 4\)",
    ),
    "kernel of three dimensions": (
        lambda: at.cka(torch.ones(3, 3, 3), K),
        r"cka: a kernel has shape .* got \(3, 3, 3\)",
    ),
    "blocks that do not match": (lambda: at.decompose(torch.ones(2, 3, 3, 2), K, Y), r"decompose: a kernel has shape"),
    "no samples": (
        lambda: at.cka(torch.zeros(0, 2, 0, 2), torch.zeros(0, 2, 0, 2)),
        r"cka: a kernel of shape \(0, 2, 0, 2\) has no entries",
    ),
    "no samples aligned": (
        lambda: at.alignment(torch.zeros(0, 0), torch.zeros(0)),
        r"alignment: a kernel of shape \(0, 0\) has no entries",
    ),
    "no outputs": (
        lambda: at.decompose(torch.zeros(3, 0, 3, 0), torch.zeros(3, 0, 3, 0), torch.zeros(3, 0)),
        r"decompose: a kernel of shape \(3, 0, 3, 0\) has no entries",
    ),
    "eigenvalues of no samples": (
        lambda: at.kernels.kernel_eigen(torch.zeros(0, 0), 1),
        r"kernel_eigen: a kernel of shape \(0, 0\) has no entries",
    ),
    "regression on no samples": (
        lambda: at.kernel_regression(torch.zeros(0, 0), torch.zeros(0), ridge=1.0),
        r"kernel_regression: a kernel of shape \(0, 0\) has no entries",
    ),
    "targets of other samples": (
        lambda: at.alignment(K, Y[:4]),
        r"alignment: targets of shape \(4,\) do not fit a kernel of shape \(5, 5\)",
    ),
    "targets of no dimension": (lambda: at.alignment(K, Y[0]), r"alignment: targets of shape \(\) do not fit"),
    "targets of three dimensions": (
        lambda: at.alignment(K, torch.ones(5, 2, 2)),
        r"alignment: targets of shape \(5, 2, 2\) do not fit",
    ),
    "one output missing": (
        lambda: at.alignment(psd(0, 4, 2), torch.ones(4)),
        r"targets of shape \(4,\) do not fit a kernel of shape \(4, 2, 4, 2\)",
    ),
    "non-finite kernel": (
        lambda: at.alignment(torch.diag(torch.tensor([1.0, math.nan, 1.0])), Y[:3]),
        r"alignment: the value of sample 1 is not finite",
    ),
    "non-finite targets": (lambda: at.decompose(K, K, Y / 0), r"decompose: the value of sample 0 is not finite"),
    "zero kernel": (
        lambda: at.alignment(torch.zeros(5, 5), Y),
        r"alignment: a kernel is zero \(after centering, if asked for\)",
    ),
    "zero targets": (lambda: at.alignment(K, 0 * Y), r"alignment: a kernel is zero"),
    "constant targets centered": (
        lambda: at.alignment(K, torch.full((5,), 0.1), centered=True),
        r"alignment: a kernel is zero",
    ),
    "constant kernel": (lambda: at.cka(torch.full((7, 7), 0.1), psd(0, 7)), r"cka: a kernel is zero"),
    "kernels of other samples": (
        lambda: at.cka(K, torch.eye(4)),
        r"cka: the kernels have shapes \(5, 5\) and \(4, 4\); use the same samples",
    ),
    "kernels of other outputs": (
        lambda: at.cka(torch.eye(4), psd(0, 2, 2)),
        r"cka: the kernels have shapes \(4, 4\) and \(2, 2, 2, 2\)",
    ),
    "unbiased with outputs": (
        lambda: at.cka(psd(0, 5, 2), psd(1, 5, 2), unbiased=True),
        r"cka: the unbiased estimate is for kernels \(n, n\); use outputs='trace'",
    ),
    "unbiased of three": (
        lambda: at.cka(torch.eye(3), torch.eye(3), unbiased=True),
        r"needs at least 4 samples, got 3; use unbiased=False",
    ),
    "unbiased of a constant": (
        lambda: at.cka(torch.full((7, 7), 0.1), psd(0, 7), unbiased=True),
        r"cka: a kernel has no unbiased variance on these samples",
    ),
    "unbiased of a diagonal": (
        lambda: at.cka(psd(0, 7), torch.eye(7), unbiased=True),
        r"cka: a kernel has no unbiased variance on these samples",
    ),
    "decompose shapes": (
        lambda: at.decompose(K, torch.eye(4), Y),
        r"decompose: K has shape \(5, 5\) and K0 \(4, 4\); use the same samples",
    ),
    "decompose outputs": (
        lambda: at.decompose(torch.eye(4), psd(0, 2, 2), torch.ones(4)),
        r"decompose: K has shape \(4, 4\) and K0 \(2, 2, 2, 2\)",
    ),
    "proportional": (
        lambda: at.decompose(K, torch.outer(Y, Y), Y),
        r"decompose: K0 and the target kernel are proportional, so the weights are not determined",
    ),
    "zero K": (lambda: at.decompose(0 * K, K, Y), r"decompose: K is zero"),
    "several outputs": (
        lambda: at.representability(K, torch.ones(5, 2)),
        r"representability: several outputs need the full kernel \(n, c, n, c\), or one output",
    ),
    "nothing to represent": (lambda: at.representability(K, 0 * Y), r"representability: the targets are zero"),
    "rank of a scalar": (
        lambda: at.effective_rank(torch.tensor(2.0)),
        r"effective_rank: expected a matrix or its singular values, got shape \(\)",
    ),
    "rank of a cube": (
        lambda: at.effective_rank(torch.ones(2, 2, 2)),
        r"effective_rank: expected a matrix .* \(2, 2, 2\)",
    ),
    "rank of nan": (
        lambda: at.effective_rank(torch.tensor([[1.0], [math.nan]])),
        r"effective_rank: the value of sample 1 is not finite",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_requests_without_an_answer_are_refused(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(at.TangentError, match=words):
        call()
