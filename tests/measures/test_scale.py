"""Measures at any scale and offset, against exact rational arithmetic, and of kernels that are none."""

import inspect
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at

SCALES = (1e-300, 1e-200, 1e-154, 1e-30, 1.0, 1e30, 1e154, 1e200, 1e300)
N = 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def psd(seed: int, n: int = N, c: int = 1) -> Tensor:
    rows = draw(n * c, 2 * n * c, seed=seed)
    return (rows @ rows.mT).reshape(n, c, n, c) if c > 1 else rows @ rows.mT


def exact(matrix: Tensor) -> list[list[Fraction]]:
    return [[Fraction(x) for x in row] for row in matrix.tolist()]


def centered(K: list[list[Fraction]], *, unbiased: bool) -> list[list[Fraction]]:
    n = len(K)
    if unbiased:
        K = [[K[i][j] if i != j else Fraction(0) for j in range(n)] for i in range(n)]
    rows, columns = [sum(row) for row in K], [sum(column) for column in zip(*K, strict=True)]
    a, b = (n - 2, (n - 1) * (n - 2)) if unbiased else (n, n * n)
    return [
        [K[i][j] - rows[i] / a - columns[j] / a + sum(rows) / b if i != j or not unbiased else Fraction(0)
         for j in range(n)] for i in range(n)
    ]  # fmt: skip


def cosine(A: list[list[Fraction]], B: list[list[Fraction]]) -> float:
    def inner(X: list[list[Fraction]], Y: list[list[Fraction]]) -> Fraction:
        return sum((x * y for p, q in zip(X, Y, strict=True) for x, y in zip(p, q, strict=True)), Fraction(0))

    square = inner(A, B) ** 2 / inner(A, A) / inner(B, B)
    return math.copysign(math.sqrt(square), inner(A, B))


def exact_cka(a: Tensor, b: Tensor, *, unbiased: bool = False) -> float:
    return cosine(*(centered(exact(K), unbiased=unbiased) for K in (a, b)))


# ------------------------------------------------------------------------------------------------------------ scale


@pytest.mark.parametrize("scale", SCALES)
def test_measures_without_a_unit_are_the_same_at_every_scale(scale: float) -> None:
    kernel, other, y = psd(0), psd(1), draw(N, seed=2)
    factor = 2.0 ** round(math.log2(scale))  # changes no digit
    for small in (1.0, 2.0**-300, 2.0**300, 2.0**-900, 2.0**900):
        for centering in (False, True):
            assert at.alignment(kernel * factor, y * small, centered=centering) == pytest.approx(
                at.alignment(kernel, y, centered=centering), rel=1e-13
            )
    for unbiased in (False, True):
        assert at.cka(kernel * factor, other / factor, unbiased=unbiased) == pytest.approx(
            at.cka(kernel, other, unbiased=unbiased), rel=1e-13
        )
    ranks, wanted = at.effective_rank(kernel * factor), at.effective_rank(kernel)
    assert (ranks.stable, ranks.entropy) == pytest.approx((wanted.stable, wanted.entropy), rel=1e-12)
    found, plain = at.representability(kernel * factor, y), at.representability(kernel, y)
    torch.testing.assert_close(found.energy, plain.energy, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.leave_one_out, plain.leave_one_out, rtol=1e-9, atol=0)
    assert found.rkhs_norm * factor == pytest.approx(plain.rkhs_norm, rel=1e-9)
    assert found.jitter / factor == pytest.approx(plain.jitter, rel=1e-9)


@pytest.mark.parametrize("k", [3, 200])
def test_eigenvalues_and_their_residual_have_the_kernels_scale(k: int) -> None:
    kernel = psd(0, 410)
    wanted = at.kernels.kernel_eigen(kernel, k)
    for exponent in (-900, 900):
        found = at.kernels.kernel_eigen(kernel * 2.0**exponent, k)
        torch.testing.assert_close(found.values / 2.0**exponent, wanted.values, rtol=1e-9, atol=0)
        assert 0 < found.residual < 1e-9
        assert found.trace / 2.0**exponent == pytest.approx(wanted.trace, rel=1e-12)


@pytest.mark.parametrize("scale", SCALES)
def test_decompose_recovers_weights_at_every_scale(scale: float) -> None:
    y, initial = draw(N, seed=2), psd(1)
    found = at.decompose((2 * initial + 3 * torch.outer(y, y)) * scale, initial, y)
    assert (found.initial_weight / scale, found.target_weight / scale) == pytest.approx((2, 3), rel=1e-10)
    assert found.explained == pytest.approx(1, rel=1e-12)
    assert float((found.residual / scale).abs().max()) < 1e-10
    if scale > 1e250:
        return
    half = at.decompose(psd(3) * scale, initial, y * 2.0**-40)
    whole = at.decompose(psd(3), initial, y)
    torch.testing.assert_close(half.residual / scale, whole.residual, rtol=1e-9, atol=1e-9)
    assert half.target_weight / scale == pytest.approx(whole.target_weight * 2.0**80, rel=1e-9)


def test_results_that_float64_does_not_hold_are_errors() -> None:
    kernel, y = psd(0), draw(N, seed=2)
    with pytest.raises(
        at.TangentError, match=r"^decompose: the weight of K0 is about 1e\+5\d\d, which float64 does not"
    ):
        at.decompose(kernel * 1e300, psd(1) * 1e-250, y)
    with pytest.raises(
        at.TangentError, match=r"^decompose: the weight of the targets is about 1e\+6\d\d, which float64"
    ):
        at.decompose(kernel, psd(1), y * 1e-300)
    with pytest.raises(
        at.TangentError, match=r"^representability: the RKHS norm is about 1e\+[45]\d\d, .*scale the kernel"
    ):
        at.representability(kernel, y * 1e250)


@pytest.mark.parametrize("scale", [1e-170, 1e-20, 1.0, 1e30, 1e160])
def test_kernel_change_and_explain_are_the_same_at_every_scale_of_the_features(scale: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = draw(16, 3), draw(16, 2, seed=3)
    factor = 2.0 ** round(math.log2(scale) / 2)
    feats, large = (at.tangent_features(model, x, output_fn=lambda out, f=f: out * f) for f in (1.0, factor))
    transforms = {"0": at.features.Sides(at.features.Matrix(torch.eye(4, dtype=torch.float64) + psd(1, 4)))}
    wanted, found = (at.measures.kernel_change(f, transforms, y) for f in (feats, large))
    assert found.alignment == pytest.approx(wanted.alignment, rel=1e-12)
    for name in ("norm", "growth", "contribution", "target_cosine"):
        assert getattr(found.whole, name) == pytest.approx(getattr(wanted.whole, name), rel=1e-10)
    assert found.whole.target_weight / factor**2 == pytest.approx(wanted.whole.target_weight, rel=1e-10)
    for structure in (at.LayerScale(), at.Left(), at.TwoSided(), at.Full(), at.Rows()):
        one, other = (at.explain(f, f.transformed(transforms), structure) for f in (feats, large))
        assert other.total == pytest.approx(one.total, rel=1e-9)
        assert other.strengths == one.strengths


# ----------------------------------------------------------------------------------------------------------- offset


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3, 1e5])
def test_cka_of_features_with_a_large_mean_is_that_of_exact_arithmetic(offset: float, unbiased: bool) -> None:
    rows = draw(9, 5) + offset
    other = rows + draw(9, 5, seed=1)
    a, b = rows @ rows.mT, other @ other.mT
    assert at.cka(a, b, unbiased=unbiased) == pytest.approx(exact_cka(a, b, unbiased=unbiased), abs=1e-5)
    assert at.cka(a, b, unbiased=unbiased) == pytest.approx(
        at.cka(*(f @ f.mT for f in (rows - offset, other - offset)), unbiased=unbiased), abs=1e-3
    )


def test_unbiased_cka_of_fifty_samples_with_a_mean_of_a_thousand_is_known() -> None:
    torch.manual_seed(0)
    rows = torch.randn(50, 20, dtype=torch.float64)
    other = rows + torch.randn(50, 20, dtype=torch.float64)
    wanted = at.cka(rows @ rows.mT, other @ other.mT, unbiased=True)
    rows, other = rows + 1e3, other + 1e3
    assert at.cka(rows @ rows.mT, other @ other.mT, unbiased=True) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_rounding_has_buried_is_an_error_and_all_else_is_right(dtype: torch.dtype) -> None:
    told = set()
    for offset in (0.0, 1.0, 10.0, 100.0, 1e3, 1e4):
        rows, other = draw(30, 8), draw(30, 8) + draw(30, 8, seed=1)
        wanted = at.cka(rows @ rows.mT, other @ other.mT)
        size = 1e-6 if dtype == torch.float16 else 1.0
        a, b = ((((f + offset) @ (f + offset).mT) * size).to(dtype) for f in (rows, other))
        try:
            assert at.cka(a, b) == pytest.approx(wanted, abs=0.02)
            told.add("right")
        except at.TangentError as error:
            assert "whose numbers are rounded to" in str(error) or "a kernel is zero" in str(error)  # noqa: PT017
            told.add("refused")
    assert told == ({"right", "refused"} if dtype != torch.float16 else told)


def test_float32_numbers_do_not_become_exact_in_float64() -> None:
    torch.manual_seed(0)
    rows = torch.randn(50, 20, dtype=torch.float64)
    other = rows + torch.randn(50, 20, dtype=torch.float64)
    a, b = ((f + 1e4) @ (f + 1e4).mT for f in (rows, other))
    assert at.cka(a, b) == pytest.approx(at.cka(rows @ rows.mT, other @ other.mT), abs=1e-4)
    for given in (a.float(), a.float().double(), a.float().numpy(), a.float().double().numpy()):
        with pytest.raises(
            at.TangentError, match=r"^cka: centering leaves .* of a kernel, whose numbers are rounded to 1e-07"
        ):
            at.cka(given, b)


def test_targets_with_a_large_mean_are_centered_first() -> None:
    kernel, y = psd(0), draw(N, seed=2)
    wanted = at.alignment(kernel, y, centered=True)
    assert at.alignment(kernel, y + 1e8, centered=True) == pytest.approx(wanted, rel=1e-6)
    assert at.alignment(kernel.float(), (y + 1e3).float(), centered=True) == pytest.approx(wanted, rel=1e-3)
    with pytest.raises(
        at.TangentError, match=r"^alignment: centering leaves .* of the targets, whose numbers are rounded"
    ):
        at.alignment(kernel, (y + 1e7).float(), centered=True)


# ------------------------------------------------------------------------------------------------- kernels that are none

Measure = Callable[[Tensor], object]
Y = draw(N, seed=2)
MEASURES: dict[str, Measure] = {
    "alignment": lambda K: at.alignment(K, Y),
    "alignment centered": lambda K: at.alignment(K, Y, centered=True),
    "cka": lambda K: at.cka(psd(0), K),
    "cka unbiased": lambda K: at.cka(K, psd(0), unbiased=True),
    "decompose": lambda K: at.decompose(K, psd(0), Y),
    "decompose from": lambda K: at.decompose(psd(0), K, Y),
    "representability": lambda K: at.representability(K, Y),
    "representability matrix-free": lambda K: at.representability(K, Y, form="matrix-free"),
    "kernel_regression": lambda K: at.kernel_regression(K, Y),
    "kernel_regression matrix-free": lambda K: at.kernel_regression(K, Y, form="matrix-free"),
    "kernel_eigen": lambda K: at.kernels.kernel_eigen(K, 2),
    "fit": lambda K: at.fit(K, Y, structure=at.Fixed()),
    "fit with a ridge": lambda K: at.fit(K, Y, structure=at.Fixed(), ridge=0.1),
}
NO_KERNELS: dict[str, tuple[Tensor, str]] = {
    "nan": (psd(0).index_fill(0, torch.tensor([2]), math.nan), "is not finite"),
    "infinite": (torch.diag(torch.tensor([1.0, 2, math.inf, 1, 1, 1])), "of sample 2 is not finite"),
    "asymmetric": (psd(0) + draw(N, N), r"a kernel of samples with themselves is symmetric, and K − Kᵀ here is"),
    "of features and others": (draw(N, 9) @ draw(N, 9, seed=4).mT, "a kernel of samples with themselves is symmetric"),
    "complex": (psd(0).to(torch.complex128), "a kernel has real entries, got torch.complex128; give its real part"),
}


@pytest.mark.parametrize("kind", NO_KERNELS)
@pytest.mark.parametrize("measure", MEASURES)
def test_what_is_no_kernel_is_refused_by_every_measure_and_solver(measure: str, kind: str) -> None:
    kernel, words = NO_KERNELS[kind]
    with pytest.raises(at.TangentError, match=f"^{measure.split()[0]}: .*{words}"):
        MEASURES[measure](kernel)


INDEFINITE = {
    "negative": -psd(0),
    "indefinite": psd(0) - psd(1),
    "with one negative value": psd(0)
    - 1.5 * float(torch.linalg.eigvalsh(psd(0))[-1]) * torch.outer(Y, Y) / float(Y @ Y),
    "zero": torch.zeros(N, N, dtype=torch.float64),
    "of zero diagonal": torch.ones(N, N) - torch.eye(N),
}


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
@pytest.mark.parametrize("form", ["dense", "matrix-free"])
@pytest.mark.parametrize("kind", INDEFINITE)
def test_a_kernel_that_is_not_positive_represents_nothing(kind: str, form: str, scale: float) -> None:
    words = r"^representability: the kernel is (not positive|zero).*; give the kernel of features, not a difference"
    with pytest.raises(at.TangentError, match=words):
        at.representability(INDEFINITE[kind].double() * scale, Y, form=form)


@pytest.mark.parametrize("n", [10, 60])
def test_rounding_does_not_make_a_kernel_indefinite(n: int) -> None:
    rows = draw(n, n // 2)
    rounded = (rows.float() @ rows.float().mT + 100).double()  # singular, so that rounding makes eigenvalues negative
    assert float(torch.linalg.eigvalsh(rounded)[0]) < 0
    found = at.representability(rounded, draw(n, seed=2), jitter=1e-4)
    assert found.rkhs_norm > 0


def test_a_kernel_between_stays_defined_as_a_matrix() -> None:
    """A difference of kernels has a direction: alignment, CKA and decompose are cosines and projections of matrices."""
    change = psd(0) - psd(1)
    a, b = change.numpy(), np.outer(Y, Y)
    assert at.alignment(change, Y) == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-12)
    assert at.cka(change, -change) == pytest.approx(-1, rel=1e-12)


OPTIONS: dict[str, tuple[dict[str, object], str]] = {
    "a negative jitter": ({"jitter": -1e-3}, "jitter is zero or positive and top at least 1, got -0.001 and None"),
    "no jitter": ({"jitter": math.nan}, "jitter is zero or positive .*, got nan"),
    "an endless jitter": ({"jitter": math.inf}, "jitter is zero or positive .*, got inf"),
    "no top": ({"top": 0}, "jitter is zero or positive and top at least 1, got 1e-10 and 0"),
    "another form": ({"form": "sparse"}, "form is one of auto, dense, matrix-free, got 'sparse'"),
    "a singular kernel without jitter": (
        {"jitter": 0.0, "K0": torch.outer(Y, Y)},
        "the kernel has no inverse in float64; use a positive jitter, such as 1e-10",
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_representability_out_of_range_are_refused(case: str) -> None:
    given, words = OPTIONS[case]
    with pytest.raises(at.TangentError, match=f"^representability: {words}"):
        inspect.unwrap(at.representability)(**{"K0": psd(0), "r": Y} | given)


# ---------------------------------------------------------------------------------------------------------- overflow


@pytest.mark.parametrize(("dtype", "size", "remedy"), [
    (torch.float32, 1e25, "use float64: precision='float64'"),
    (torch.float64, 1e180, "scale the outputs, e.g. output_fn=lambda out: out / 1e100"),
])  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"tile": 3}, {"by_block": True, "tile": 2}, {"outputs": "trace"}])
def test_a_kernel_that_overflows_is_an_error_with_the_remedy(
    dtype: torch.dtype, size: float, remedy: str, options: dict[str, object]
) -> None:
    model, x = nn.Linear(3, 2).to(dtype), torch.ones(7, 3, dtype=dtype)
    x[4:] *= size
    words = rf"^tangent_kernel: products of the features of sample \d are too large for {str(dtype)[6:]}, .*; {remedy}"
    with pytest.raises(at.TangentError, match=words):
        at.tangent_kernel(model, x, **options)
    with pytest.raises(at.TangentError, match=rf"^kernel: products of the features of sample 4 .*{remedy}"):
        at.tangent_features(model, x).kernel()
    if dtype == torch.float32:
        kernel = at.tangent_kernel(model, x, precision="float64", outputs="trace")
        torch.testing.assert_close(kernel, at.tangent_kernel(model.double(), x.double(), outputs="trace"))
