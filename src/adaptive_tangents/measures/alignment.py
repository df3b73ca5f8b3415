"""Measures of a kernel and its change: alignment with targets, CKA, decomposition, representability, effective rank.

A kernel is a tensor (n, n), or (n, c, n, c) for c outputs, or a store, which is read tile by tile and never held whole;
targets are (n,) or (n, c). With a full kernel the target kernel is K_y = vec(y)vec(y)ᵀ; with a trace kernel (n, n) it is
Σ_c y_c y_cᵀ. Everything is computed in float64.
"""

import warnings
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.checks import check_finite
from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.kernels.derived_kernels import CenteredKernel, OuterKernel, gram
from adaptive_tangents.kernels.eigen import eigen
from adaptive_tangents.kernels.products import KernelProducts
from adaptive_tangents.kernels.regression import solved
from adaptive_tangents.kernels.tiles import Cached, Kernels, Request, Sum, TensorKernel, Tiled, tiled
from adaptive_tangents.runtime.memory import limit_for, require_memory

Values = Tensor | np.ndarray

_NOTHING = 1e-13  # of a kernel's norm: what is left of it is rounding
_COPIES = 4  # a kernel, its eigenvectors, its inverse, and what finding them takes
_SOLVED, _LOOSELY = 1e-12, 1e-6  # relative residuals: asked for, and warned of
_TOP = 50  # eigenvectors whose energy is told where all would take the whole kernel


@dataclass(frozen=True)
class Decomposition:
    """K ≈ w₀K₀ + w_yK_y + residual by least squares; ``explained`` is 1 − ‖residual‖²/‖K‖².

    ``residual`` is a tensor as K, or of a store a kernel by tiles, made as they are read: ``residual.diagonal()``,
    ``residual.dense()``, or any measure of it.
    """

    initial_weight: float
    target_weight: float
    explained: float
    residual: Tensor | Tiled = field(repr=False)


@dataclass(frozen=True)
class Representability:
    """How well a kernel K₀ represents targets r.

    ``rkhs_norm`` rᵀK₀⁻¹r; ``energy`` (k,) the share of ‖r‖² in the top 1, 2, ... eigenvectors; ``leave_one_out`` the
    residuals ((K₀⁻¹)_kk)⁻¹α_k of kernel interpolation without sample k, all of its outputs, shaped as r; ``jitter`` what
    was added to invert K₀; ``residual`` ‖(K₀ + jitter)α − r‖/‖r‖ where that was by products with K₀ alone, which tell nothing
    of ``leave_one_out``: then it is None.
    """

    rkhs_norm: float
    energy: Tensor = field(repr=False)
    leave_one_out: Tensor | None = field(repr=False)
    jitter: float
    residual: float = 0.0

    @property
    def leave_one_out_rmse(self) -> float:
        """Root mean square of the leave-one-out residuals; raises TangentError where there are none."""
        if self.leave_one_out is None:
            raise TangentError(
                "leave_one_out_rmse: residuals need the diagonal of K₀⁻¹, which products with K₀ do not give; use "
                "form='dense' on a machine that holds it, or fewer samples"
            )
        return float((self.leave_one_out**2).mean().sqrt())


@dataclass(frozen=True)
class EffectiveRank:
    """Soft counts of the singular values σ of a matrix.

    ``stable`` Σσ²/max σ²; ``entropy`` exp(−Σ p log p), p = σ/Σσ; ``participation`` (Σσ²)²/Σσ⁴.
    Sources: Rudelson & Vershynin 2007; Roy & Vetterli 2007.
    """

    stable: float
    entropy: float
    participation: float


def alignment(K: Kernels, y: Values, *, centered: bool = False) -> float:
    r"""Cosine between a kernel and the target kernel, ⟨K, K_y⟩/(‖K‖‖K_y‖); ``centered`` centers both over samples first.

    K is a tensor or a store. The uncentered cosine is the paper's "sim". Raises TangentError where shapes do not fit, values
    are not finite, or K or K_y is zero. Source: LeJeune & Alemohammad, CPAL 2024, §4; Cortes et al. 2012 (centered).

    >>> y = torch.tensor([1.0, -2.0, 0.5])
    >>> round(alignment(torch.outer(y, y), y), 6)
    1.0
    """
    kernel, target = _pair("alignment", K, y)
    targets = OuterKernel(kernel, target)
    if not centered:
        return _cosine("alignment", gram([kernel, targets]))
    middled = OuterKernel(kernel, _middled(kernel, target))
    whole = CenteredKernel(kernel)
    return _cosine("alignment", gram([whole, middled]), before=(whole.before, _norm(target)))


def cka(K1: Kernels, K2: Kernels, *, unbiased: bool = False) -> float:
    r"""CenteredKernel kernel alignment ⟨HK₁H, HK₂H⟩/(‖HK₁H‖‖HK₂H‖), H = I − 11ᵀ/n, of two kernels on the same samples.

    ``unbiased`` uses the unbiased HSIC estimator, which needs n ≥ 4 kernels (n, n) and may be negative.
    Raises TangentError where shapes differ, n < 4 for the unbiased estimate, or a kernel is constant.
    Source: Kornblith et al., ICML 2019; Song et al., JMLR 2012 (unbiased).

    >>> K = torch.eye(5)
    >>> round(cka(K, K), 6), round(cka(K, 2 * K + 1, unbiased=False), 6)
    (1.0, 1.0)
    """
    a, b = tiled(Request("cka"), K1), tiled(Request("cka"), K2)
    if _shape(a) != _shape(b):
        raise TangentError(f"cka: the kernels have shapes {_shape(a)} and {_shape(b)}; use the same samples")
    if unbiased and a.width > 1:
        raise TangentError("cka: the unbiased estimate is for kernels (n, n); use outputs='trace'")
    if unbiased and a.n < 4:
        raise TangentError(f"cka: the unbiased estimate needs at least 4 samples, got {a.n}; use unbiased=False")
    pair = [CenteredKernel(kernel, unbiased=unbiased) for kernel in (a, b)]
    products = gram(pair)
    if not unbiased:
        return _cosine("cka", products, before=(pair[0].before, pair[1].before))
    if any(float(products[k, k]) <= _NOTHING * kernel.before**2 for k, kernel in enumerate(pair)):
        raise TangentError(
            "cka: a kernel has no unbiased variance on these samples; use more samples or unbiased=False"
        )
    return _cosine("cka", products)


def decompose(K: Kernels, K0: Kernels, y: Values) -> Decomposition:
    r"""Least squares of a kernel on the initial kernel and the target kernel, K = w₀K₀ + w_yK_y + residual.

    The residual's diagonal is large at samples that the smooth part of the target does not explain.
    Raises TangentError where shapes differ, K is zero, or K₀ and K_y are proportional.
    Source: LeJeune & Alemohammad, CPAL 2024, §4.

    >>> y, K0 = torch.tensor([1.0, -1.0, 2.0]), torch.eye(3)
    >>> found = decompose(2 * K0 + 3 * torch.outer(y, y), K0, y)
    >>> round(found.initial_weight, 6), round(found.target_weight, 6)
    (2.0, 3.0)
    """
    kernel, target = _pair("decompose", K, y)
    initial = tiled(Request("decompose"), K0)
    if _shape(initial) != _shape(kernel):
        raise TangentError(f"decompose: K has shape {_shape(kernel)} and K0 {_shape(initial)}; use the same samples")
    products = gram([kernel, initial, OuterKernel(kernel, target)])
    whole, parts = float(products[0, 0]), products[1:, 1:]
    if whole == 0:
        raise TangentError("decompose: K is zero, so there is nothing to decompose")
    if float(torch.linalg.det(parts)) <= 1e-12 * float(parts[0, 0] * parts[1, 1]):
        raise TangentError("decompose: K0 and the target kernel are proportional, so the weights are not determined")
    weights = torch.linalg.solve(parts, products[1:, 0])
    first, second = float(weights[0]), float(weights[1])
    residual = Sum([kernel, initial, OuterKernel(kernel, target)], [1.0, -first, -second])
    explained = 1 - float(gram([residual])) / whole
    return Decomposition(first, second, explained, residual.dense() if isinstance(kernel, TensorKernel) else residual)


def representability(
    K0: Kernels,
    r: Values,
    *,
    jitter: float = 1e-10,
    form: Literal["auto", "dense", "matrix-free"] = "auto",
    top: int | None = None,
    memory_limit: int | None = None,
) -> Representability:
    r"""How well a kernel represents targets: RKHS norm rᵀK₀⁻¹r, energy in its top eigenvectors, leave-one-out residuals.

    ``jitter`` is relative to the mean of the diagonal and added before inverting. Adaptation, and alignment, grow with how
    poorly r is represented. ``form`` "dense" holds K₀ and its eigenvectors; "matrix-free" uses products with it alone:
    conjugate gradients, and Lanczos for the ``top`` eigenvectors (default: 50), but no leave-one-out residuals; "auto" is
    dense where ``memory_limit`` (default: half of what is free) allows it. Raises TangentError where shapes do not fit, r is
    zero, or memory is short. Source: theory in the docs, §5.

    >>> found = representability(torch.diag(torch.tensor([4.0, 1.0])), torch.tensor([2.0, 0.0]))
    >>> round(found.rkhs_norm, 6), found.energy.tolist()
    (1.0, [1.0, 1.0])
    """
    kernel, target = _pair("representability", K0, r)
    if not kernel.full and target.shape[1] > 1:
        raise TangentError(
            "representability: several outputs need the full kernel (n, c, n, c), or one output at a time"
        )
    if not bool(target.any()):
        raise TangentError("representability: the targets are zero, which every kernel represents")
    added = jitter * float(kernel.diagonal().mean())
    room = limit_for(memory_limit, kernel.device)
    dense = _COPIES * 8 * kernel.size**2 <= room if form == "auto" else form == "dense"
    if dense:
        require_memory("representability", _COPIES * 8 * kernel.size**2, room, remedy="use form='matrix-free'")
    return (_represented if dense else _represented_by_products)(kernel, target[:, 0], r.shape, added, top, room)


def _represented(
    kernel: Tiled, flat: Float[Tensor, " N"], shape: tuple[int, ...], added: float, top: int | None, room: int
) -> Representability:
    """From all eigenvectors."""
    values, vectors = torch.linalg.eigh(kernel.matrices()[0])
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
    """By conjugate gradients and Lanczos: no residuals, which need the inverse's diagonal."""
    held = Cached(kernel, room // 2)
    operator = KernelProducts(held, ridge=added)
    found = solved(operator, flat[:, None], room=room // 2, tol=_SOLVED)
    alpha = found.solution[:, 0]
    if found.residual > _LOOSELY:
        warnings.warn(
            f"representability: K₀ + jitter was inverted to {found.residual:.1e} relative only in {found.steps} steps, so "
            "rkhs_norm is a lower estimate; raise jitter",
            TangentWarning,
            stacklevel=3,
        )
    count = min(kernel.size, _TOP if top is None else top)
    vectors = eigen("representability", KernelProducts(held), count, tol=_SOLVED, memory_limit=room // 2).vectors
    energy = ((vectors.mT @ flat) ** 2).cumsum(0) / (flat @ flat)
    return Representability(
        2 * float(flat @ alpha) - float(alpha @ operator.apply(alpha)), energy, None, added, found.residual,
    )  # fmt: skip


def effective_rank(B: Values) -> EffectiveRank:
    r"""Stable, entropy and participation rank of a matrix (o, i), or of a vector of singular values.

    A zero matrix has rank zero by all three. Raises TangentError for other shapes or non-finite values.

    >>> rank = effective_rank(torch.eye(3))
    >>> round(rank.stable, 6), round(rank.entropy, 6), round(rank.participation, 6)
    (3.0, 3.0, 3.0)
    """
    matrix = _tensor("effective_rank", B)
    if matrix.ndim not in (1, 2):
        raise TangentError(f"effective_rank: expected a matrix or its singular values, got shape {tuple(matrix.shape)}")
    values = matrix.abs() if matrix.ndim == 1 else torch.linalg.svdvals(matrix)
    if values.numel() == 0 or float(values.max()) == 0:
        return EffectiveRank(0.0, 0.0, 0.0)
    values = values / values.max()
    squares, shares = values**2, values / values.sum()
    entropy = -float((shares * shares.clamp_min(torch.finfo(shares.dtype).tiny).log()).sum())
    return EffectiveRank(float(squares.sum()), float(np.exp(entropy)), float(squares.sum() ** 2 / (squares**2).sum()))


def _tensor(call: str, values: Values) -> Tensor:
    tensor = torch.as_tensor(values).detach().double()
    check_finite(call, "the value", [tensor])
    return tensor


def _shape(kernel: Tiled) -> tuple[int, ...]:
    return (kernel.n, kernel.width, kernel.n, kernel.width) if kernel.full else (kernel.n, kernel.n)


def _pair(call: str, K: Kernels, y: Values) -> tuple[Tiled, Float[Tensor, "N k"]]:
    """A kernel by tiles, and Y with K_y = Y Yᵀ."""
    kernel, target = tiled(Request(call), K), _tensor(call, y)
    target = (target[:, None] if target.ndim == 1 else target).to(kernel.device)
    wanted = (kernel.n, kernel.width) if kernel.full else (kernel.n, *target.shape[1:2])
    if target.ndim != 2 or tuple(target.shape) != wanted:
        raise TangentError(f"{call}: targets of shape {tuple(y.shape)} do not fit a kernel of shape {_shape(kernel)}")
    return kernel, target.reshape(-1, 1) if kernel.full else target


def _middled(kernel: Tiled, target: Float[Tensor, "N k"]) -> Float[Tensor, "N k"]:
    """HY over samples, for each output."""
    cube = target.reshape(kernel.n, kernel.width, -1)
    return (cube - cube.mean(0)).reshape(target.shape)


def _norm(target: Float[Tensor, "N k"]) -> float:
    """‖Y Yᵀ‖."""
    return float((target.mT @ target).norm())


def _cosine(call: str, products: Float[Tensor, "2 2"], *, before: tuple[float, float] = (0.0, 0.0)) -> float:
    """The cosine of two kernels, unless one of them is zero, or the rounding that centring left ``before`` with."""
    sizes = [float(products[k, k].sqrt()) for k in (0, 1)]
    if any(size <= _NOTHING * whole for size, whole in zip(sizes, before, strict=True)):
        raise TangentError(f"{call}: a kernel is zero (after centring, if asked for), so the angle is not defined")
    return float(products[0, 1]) / sizes[0] / sizes[1]
