"""Measures of a kernel and its change: alignment with targets, CKA, decomposition, representability, effective rank.

A kernel is a tensor (n, n), or (n, c, n, c) for c outputs, or a store, which is read tile by tile and never held whole.
Targets are (n,) or (n, c). The target kernel is K_y = vec(y)vec(y)ᵀ for a full kernel, and Σ_c y_c y_cᵀ for a trace kernel
(n, n). Integers are class numbers, which are one-hot encoded, unless they are two of −1, 0 and 1. Everything is computed in
float64, on kernels and targets brought to a size whose squares it holds.
"""

import math
import warnings
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.checks import check_choice
from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.kernels.derived_kernels import (
    CenteredKernel,
    Gram,
    OuterKernel,
    gram,
    in_range,
    largest,
    power_of_two,
)
from adaptive_tangents.kernels.eigen import eigen, lowest
from adaptive_tangents.kernels.products import KernelProducts
from adaptive_tangents.kernels.regression import solved
from adaptive_tangents.kernels.tiles import Cached, Kernels, Request, Sum, TensorKernel, Tiled, tiled
from adaptive_tangents.measures.inputs import (
    Values,
    check_resolved,
    check_square,
    columns,
    numbers,
    rounding_of,
    shape_of,
)
from adaptive_tangents.runtime.memory import limit_for, require_memory

Form = Literal["auto", "dense", "matrix-free"]

_ZERO = "a kernel is zero (after centering, if asked for), so the angle is not defined"
_DOUBTFUL = 1e-5  # of a norm before centering: what float32 does not resolve
_COPIES = 4  # a kernel, its eigenvectors, its inverse, and the work space to find them
_SOLVED, _LOOSELY = 1e-12, 1e-6  # relative residuals: the goal, and where a warning starts
_INDEFINITE = 1e-6  # of the largest eigenvalue: a negative one below is no rounding, even of float32
_REMEDY = "give the kernel of features, not a difference of kernels or its negative"
_TOP = 50  # eigenvectors with energy reported in the matrix-free form


@dataclass(frozen=True, eq=False)
class Decomposition:
    """K = w₀K₀ + w_yK_y + residual by least squares.

    Attributes:
        initial_weight: w₀.
        target_weight: w_y.
        explained: 1 − ‖residual‖²/‖K‖².
        residual: a tensor shaped as K. For a store it is a kernel whose tiles are computed when read: use
            ``residual.diagonal()``, ``residual.dense()``, or any measure of it.
    """

    initial_weight: float
    target_weight: float
    explained: float
    residual: Tensor | Tiled = field(repr=False)


@dataclass(frozen=True, eq=False)
class Representability:
    """How well a kernel K₀ represents targets r.

    Attributes:
        rkhs_norm: rᵀK₀⁻¹r.
        energy: (k,), the share of ‖r‖² in the top 1, 2, ... eigenvectors.
        leave_one_out: residuals ((K₀⁻¹)_kk)⁻¹α_k of kernel interpolation without sample k (all its outputs), shaped as r;
            None in the matrix-free form.
        jitter: added to the diagonal of K₀ to invert it.
        residual: ‖(K₀ + jitter)α − r‖/‖r‖ in the matrix-free form; 0 in the dense form.
    """

    rkhs_norm: float
    energy: Tensor = field(repr=False)
    leave_one_out: Tensor | None = field(repr=False)
    jitter: float
    residual: float = 0.0

    @property
    def leave_one_out_rmse(self) -> float:
        """Root mean square of the leave-one-out residuals; raises TangentError if they were not computed."""
        if self.leave_one_out is None:
            raise TangentError(
                "leave_one_out_rmse: residuals need the diagonal of K₀⁻¹, which products with K₀ do not give; use "
                "form='dense', which may need more memory, or fewer samples"
            )
        return float((self.leave_one_out**2).mean().sqrt())


@dataclass(frozen=True)
class EffectiveRank:
    """Soft counts of the singular values σ of a matrix.

    Attributes:
        stable: Σσ²/max σ².
        entropy: exp(−Σ p log p), p = σ/Σσ.
        participation: (Σσ²)²/Σσ⁴.

    Sources: Rudelson & Vershynin 2007; Roy & Vetterli 2007.
    """

    stable: float
    entropy: float
    participation: float


def alignment(K: Kernels, y: Values, *, centered: bool = False) -> float:
    r"""Cosine between a kernel and the target kernel, ⟨K, K_y⟩/(‖K‖‖K_y‖).

    Args:
        K: the kernel, a tensor (n, n) or (n, c, n, c), or a store.
        y: targets, (n,) or (n, c); class numbers (n,) count as one-hot columns.
        centered: center both kernels over samples first; the uncentered cosine is the paper's "sim".

    Raises:
        TangentError: when shapes do not fit, values are not finite, or K or K_y is zero.

    Source: LeJeune & Alemohammad, CPAL 2024, §4; Cortes et al. 2012 (centered).

    >>> y = torch.tensor([1.0, -2.0, 0.5])
    >>> round(alignment(torch.outer(y, y), y), 6)
    1.0
    """
    kernel = tiled(Request("alignment"), K)
    target, _, rounding = columns("alignment", kernel, y)
    if not centered:
        check_square("alignment", kernel)
        return _cosine("alignment", gram([kernel, OuterKernel(kernel, target)]))
    middled = _middled(kernel, target)
    whole = CenteredKernel(kernel)
    check_square("alignment", whole, whole.before)
    products = gram([whole, OuterKernel(kernel, middled)])
    _check_centered("alignment", whole, products, 0)
    check_resolved("alignment", "the targets", float(middled.norm()), float(target.norm()), rounding, _ZERO)
    return _cosine("alignment", products)


def cka(K1: Kernels, K2: Kernels, *, unbiased: bool = False) -> float:
    r"""Centered kernel alignment ⟨HK₁H, HK₂H⟩/(‖HK₁H‖‖HK₂H‖), H = I − 11ᵀ/n, of two kernels on the same samples.

    Args:
        K1: a kernel, a tensor (n, n) or (n, c, n, c), or a store.
        K2: the other kernel, shaped as K1.
        unbiased: use the unbiased HSIC estimator, which may be negative; it needs kernels (n, n) with n ≥ 4.

    Raises:
        TangentError: when shapes differ, n < 4 for the unbiased estimate, or a kernel is constant.

    Source: Kornblith et al., ICML 2019; Song et al., JMLR 2012 (unbiased).

    >>> K = torch.eye(5)
    >>> round(cka(K, K), 6), round(cka(K, 2 * K + 1, unbiased=False), 6)
    (1.0, 1.0)
    """
    a, b = tiled(Request("cka"), K1), tiled(Request("cka"), K2)
    if shape_of(a) != shape_of(b):
        raise TangentError(f"cka: the kernels have shapes {shape_of(a)} and {shape_of(b)}; use the same samples")
    if unbiased and a.width > 1:
        raise TangentError("cka: the unbiased estimate is for kernels (n, n); use outputs='trace'")
    if unbiased and a.n < 4:
        raise TangentError(f"cka: the unbiased estimate needs at least 4 samples, got {a.n}; use unbiased=False")
    pair = [CenteredKernel(kernel, unbiased=unbiased) for kernel in (a, b)]
    products = gram(pair)
    none = "a kernel has no unbiased variance on these samples; use more samples or unbiased=False"
    for k, kernel in enumerate(pair):
        check_square("cka", kernel, kernel.before)
        _check_centered("cka", kernel, products, k, none if unbiased else _ZERO)
    return _cosine("cka", products)


def decompose(K: Kernels, K0: Kernels, y: Values) -> Decomposition:
    r"""Least squares of a kernel on the initial kernel and the target kernel, K = w₀K₀ + w_yK_y + residual.

    The residual's diagonal is large at samples that the smooth part of the target does not explain.

    Args:
        K: the kernel, a tensor (n, n) or (n, c, n, c), or a store.
        K0: the initial kernel, shaped as K.
        y: targets, (n,) or (n, c); class numbers (n,) count as one-hot columns.

    Raises:
        TangentError: when shapes differ, K is zero, or K₀ and K_y are proportional.

    Source: LeJeune & Alemohammad, CPAL 2024, §4.

    >>> y, K0 = torch.tensor([1.0, -1.0, 2.0]), torch.eye(3)
    >>> found = decompose(2 * K0 + 3 * torch.outer(y, y), K0, y)
    >>> round(found.initial_weight, 6), round(found.target_weight, 6)
    (2.0, 3.0)
    """
    kernel = tiled(Request("decompose"), K)
    target, unit, _ = columns("decompose", kernel, y)
    initial = tiled(Request("decompose"), K0)
    if shape_of(initial) != shape_of(kernel):
        raise TangentError(
            f"decompose: K has shape {shape_of(kernel)} and K0 {shape_of(initial)}; use the same samples"
        )
    for one in (kernel, initial):
        check_square("decompose", one)
    outer = OuterKernel(kernel, target)
    found = gram([kernel, initial, outer])
    whole, parts = float(found.values[0, 0]), found.values[1:, 1:]
    if whole == 0:
        raise TangentError("decompose: K is zero, so there is nothing to decompose")
    for k, name in enumerate(("K0 is", "the targets are")):
        if float(parts[k, k]) == 0:
            raise TangentError(f"decompose: {name} zero, so the weights are not determined; give a kernel and targets")
    if float(torch.linalg.det(parts)) <= 1e-12 * float(parts[0, 0] * parts[1, 1]):
        raise TangentError("decompose: K0 and the target kernel are proportional, so the weights are not determined")
    weights = torch.linalg.solve(parts, found.values[1:, 0])
    scale, *scales = found.scales
    first, own = (
        in_range("decompose", f"the weight of {name}", float(weight), scale, 1 / each)
        for name, weight, each in zip(("K0", "the targets"), weights, scales, strict=True)
    )
    residual = Sum([kernel, initial, outer], [1.0, -first, -own])
    rest = gram([residual])
    return Decomposition(
        first,
        in_range("decompose", "the weight of the targets", own, 1 / unit, 1 / unit),
        1 - float(rest.values) * (rest.scales[0] / scale) ** 2 / whole,
        residual.dense() if isinstance(kernel, TensorKernel) else residual,
    )


def representability(
    K0: Kernels,
    r: Values,
    *,
    jitter: float = 1e-10,
    form: Form = "auto",
    top: int | None = None,
    memory_limit: int | None = None,
) -> Representability:
    r"""How well a kernel represents targets: RKHS norm rᵀK₀⁻¹r, energy in its top eigenvectors, leave-one-out residuals.

    The more poorly r is represented, the larger are adaptation and alignment.

    Args:
        K0: the kernel, a tensor (n, n) or (n, c, n, c), or a store.
        r: targets, (n,) or (n, c).
        jitter: added to the diagonal before inverting, relative to its mean.
        form: "dense" holds K₀ and its eigenvectors; "matrix-free" needs only products with K₀ (conjugate gradients and
            Lanczos), but gives no leave-one-out residuals; "auto" is dense if memory allows.
        top: how many eigenvectors ``energy`` counts; None is all in the dense form, 50 in the matrix-free form.
        memory_limit: bytes that may be used; None is half of what is free.

    Raises:
        TangentError: when shapes do not fit, r is zero, K₀ is zero, asymmetric, not positive definite, or singular without
            a jitter, the jitter is negative, or there is not enough memory.

    Source: theory in the docs, §5.

    >>> found = representability(torch.diag(torch.tensor([4.0, 1.0])), torch.tensor([2.0, 0.0]))
    >>> round(found.rkhs_norm, 6), found.energy.tolist()
    (1.0, [1.0, 1.0])
    """
    call = "representability"
    check_choice(call, "form", form, get_args(Form))
    if not 0 <= jitter < math.inf or (top is not None and top < 1):
        raise TangentError(f"{call}: jitter is zero or positive and top at least 1, got {jitter} and {top}")
    kernel = tiled(Request(call), K0)
    target, unit, _ = columns(call, kernel, r)
    if not kernel.full and target.shape[1] > 1:
        raise TangentError(
            f"{call}: several outputs need the full kernel (n, c, n, c), or one output at a time; integers other than "
            "two of −1, 0 and 1 are classes, an output each"
        )
    if not bool(target.any()):
        raise TangentError(f"{call}: the targets are zero, which every kernel represents")
    check_square(call, kernel)
    scale = power_of_two(largest(kernel.diagonal()))
    kernel = kernel if scale == 1 else Sum([kernel], [1 / scale])
    mean = float(kernel.diagonal().mean())
    if mean <= 0:
        raise TangentError(
            f"{call}: the kernel is {'zero' if mean == 0 else 'not positive'} on its diagonal; {_REMEDY}"
        )
    room = limit_for(memory_limit, kernel.device)
    dense = _COPIES * 8 * kernel.size**2 <= room if form == "auto" else form == "dense"
    if dense:
        require_memory(call, _COPIES * 8 * kernel.size**2, room, remedy="use form='matrix-free'")
    shape = np.shape(r) if target.numel() == math.prod(np.shape(r)) else (kernel.n, -1)
    found = (_represented if dense else _represented_by_products)(kernel, target[:, 0], shape, jitter * mean, top, room)
    left = found.leave_one_out
    return replace(
        found,
        rkhs_norm=in_range(call, "the RKHS norm", found.rkhs_norm, unit, unit, 1 / scale),
        leave_one_out=None if left is None else left * unit,
        jitter=found.jitter * scale,
    )


def _check_positive(call: str, kernel: Tiled, smallest: float, largest: float, added: float) -> None:
    """Raise TangentError for a kernel with negative eigenvalues, or that rounding and jitter leave without an inverse."""
    rounding = kernel.size * torch.finfo(kernel.dtype).eps
    if smallest < -max(rounding, _INDEFINITE) * largest:
        raise TangentError(
            f"{call}: the kernel is not positive definite, its smallest eigenvalue is {smallest / largest:.1e} of the "
            f"largest; {_REMEDY}"
        )
    if max(smallest, 0.0) + added <= 8 * torch.finfo(torch.float64).eps * largest:
        raise TangentError(f"{call}: the kernel has no inverse in float64; use a positive jitter, such as 1e-10")


def _represented(
    kernel: Tiled, flat: Float[Tensor, " N"], shape: tuple[int, ...], added: float, top: int | None, room: int
) -> Representability:
    """The dense form: from all eigenvectors."""
    values, vectors = torch.linalg.eigh(kernel.matrices()[0])
    _check_positive("representability", kernel, float(values[0]), float(values[-1]), added)
    inverse = (vectors / (values.clamp_min(0) + added)) @ vectors.mT
    alpha = inverse @ flat
    energy = ((vectors.mT @ flat) ** 2).flip(0)[:top].cumsum(0) / (flat @ flat)
    n = kernel.n
    own = inverse.reshape(n, len(flat) // n, n, -1).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (K₀⁻¹)_kk, c × c
    residuals = torch.linalg.solve(own, alpha.reshape(n, -1)).reshape(shape)
    return Representability(float(flat @ alpha), energy, residuals, added)


def _represented_by_products(
    kernel: Tiled, flat: Float[Tensor, " N"], shape: tuple[int, ...], added: float, top: int | None, room: int
) -> Representability:
    """The matrix-free form; leave-one-out residuals would need the inverse's diagonal."""
    held = Cached(kernel, room // 2)
    products = KernelProducts(held)
    smallest, largest = lowest(products)
    _check_positive("representability", kernel, min(smallest, 0.0), largest, math.inf)
    operator = KernelProducts(held, ridge=added)
    found = solved(operator, flat[:, None], room=room // 2, tol=_SOLVED)
    alpha = found.solution[:, 0]
    if found.residual > _LOOSELY:
        warnings.warn(
            f"representability: solving with K₀ + jitter stopped at a relative residual of {found.residual:.1e} after "
            f"{found.steps} steps, so rkhs_norm is too low; raise jitter",
            TangentWarning,
            stacklevel=3,
        )
    count = min(kernel.size, _TOP if top is None else top)
    vectors = eigen("representability", products, count, tol=_SOLVED, memory_limit=room // 2).vectors
    energy = ((vectors.mT @ flat) ** 2).cumsum(0) / (flat @ flat)
    return Representability(
        2 * float(flat @ alpha) - float(alpha @ operator.apply(alpha)), energy, None, added, found.residual,
    )  # fmt: skip


def effective_rank(B: Values) -> EffectiveRank:
    r"""Stable, entropy and participation rank of a matrix (o, i), or of a vector of singular values.

    All three are zero for a zero matrix.

    Args:
        B: the matrix (o, i), or its singular values (k,).

    Raises:
        TangentError: for other shapes, or values that are not finite.

    >>> rank = effective_rank(torch.eye(3))
    >>> round(rank.stable, 6), round(rank.entropy, 6), round(rank.participation, 6)
    (3.0, 3.0, 3.0)
    """
    matrix = numbers("effective_rank", B)
    if matrix.ndim not in (1, 2):
        raise TangentError(f"effective_rank: expected a matrix or its singular values, got shape {tuple(matrix.shape)}")
    matrix = matrix / power_of_two(largest(matrix))
    values = matrix.abs() if matrix.ndim == 1 else torch.linalg.svdvals(matrix)
    if values.numel() == 0 or float(values.max()) == 0:
        return EffectiveRank(0.0, 0.0, 0.0)
    values = values / values.max()
    squares, shares = values**2, values / values.sum()
    entropy = -float((shares * shares.clamp_min(torch.finfo(shares.dtype).tiny).log()).sum())
    return EffectiveRank(float(squares.sum()), float(np.exp(entropy)), float(squares.sum() ** 2 / (squares**2).sum()))


def _middled(kernel: Tiled, target: Float[Tensor, "N k"]) -> Float[Tensor, "N k"]:
    """HY: centered over samples, for each output."""
    cube = target.reshape(kernel.n, kernel.width, -1)
    return (cube - cube.mean(0)).reshape(target.shape)


def _check_centered(call: str, kernel: CenteredKernel, products: Gram, k: int, zero: str = _ZERO) -> None:
    """Raise TangentError if centering leaves nothing of a kernel, the k-th, or nothing but rounding."""
    left = products.scales[k] * math.sqrt(max(0.0, float(products.values[k, k])))
    rounding = torch.finfo(kernel.dtype).eps
    if left <= _DOUBTFUL * kernel.before:
        rounding = rounding_of(kernel.dtype, (kernel.of.read(*place) for place in kernel.grid))
    check_resolved(call, "a kernel", left, kernel.before, rounding, zero)


def _cosine(call: str, products: Gram) -> float:
    """The cosine of two kernels; an error if one is zero."""
    sizes = [math.sqrt(float(products.values[k, k])) for k in (0, 1)]
    if not all(sizes):
        raise TangentError(f"{call}: {_ZERO}")
    return float(products.values[0, 1]) / sizes[0] / sizes[1]
