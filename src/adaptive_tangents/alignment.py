"""Measures of a kernel and its change: alignment with targets, CKA, decomposition, representability, effective rank.

A kernel is (n, n), or (n, c, n, c) for c outputs; targets are (n,) or (n, c). With a full kernel the target kernel is
K_y = vec(y)vec(y)ᵀ; with a trace kernel (n, n) it is Σ_c y_c y_cᵀ. Everything is computed in float64.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.inputs import check_finite

Kernel = Tensor | np.ndarray

_NOTHING = 1e-13  # of a kernel's norm: what is left of it is rounding


@dataclass(frozen=True)
class Decomposition:
    """K ≈ w₀K₀ + w_yK_y + residual by least squares; ``explained`` is 1 − ‖residual‖²/‖K‖²."""

    initial_weight: float
    target_weight: float
    explained: float
    residual: Tensor = field(repr=False)


@dataclass(frozen=True)
class Representability:
    """How well a kernel K₀ represents targets r.

    ``rkhs_norm`` rᵀK₀⁻¹r; ``energy`` (k,) the share of ‖r‖² in the top 1, 2, ... eigenvectors; ``leave_one_out`` the
    residuals ((K₀⁻¹)_kk)⁻¹α_k of kernel interpolation without sample k, all of its outputs, shaped as r; ``jitter`` what
    was added to invert K₀.
    """

    rkhs_norm: float
    energy: Tensor = field(repr=False)
    leave_one_out: Tensor = field(repr=False)
    jitter: float

    @property
    def leave_one_out_rmse(self) -> float:
        """Root mean square of the leave-one-out residuals."""
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


def alignment(K: Kernel, y: Kernel, *, centered: bool = False) -> float:
    r"""Cosine between a kernel and the target kernel, ⟨K, K_y⟩/(‖K‖‖K_y‖); ``centered`` centres both over samples first.

    The uncentred cosine is the paper's "sim". Raises TangentError where shapes do not fit, values are not finite, or K or
    K_y is zero. Source: LeJeune & Alemohammad, CPAL 2024, §4; Cortes et al. 2012 (centred).

    >>> y = torch.tensor([1.0, -2.0, 0.5])
    >>> round(alignment(torch.outer(y, y), y), 6)
    1.0
    """
    kernel, target = _pair("alignment", K, y)
    pair = (kernel, target @ target.mT)
    return _cosine("alignment", *((_center(matrix, K) for matrix in pair) if centered else pair), before=pair)


def cka(K1: Kernel, K2: Kernel, *, unbiased: bool = False) -> float:
    r"""Centred kernel alignment ⟨HK₁H, HK₂H⟩/(‖HK₁H‖‖HK₂H‖), H = I − 11ᵀ/n, of two kernels on the same samples.

    ``unbiased`` uses the unbiased HSIC estimator, which needs n ≥ 4 kernels (n, n) and may be negative.
    Raises TangentError where shapes differ, n < 4 for the unbiased estimate, or a kernel is constant.
    Source: Kornblith et al., ICML 2019; Song et al., JMLR 2012 (unbiased).

    >>> K = torch.eye(5)
    >>> round(cka(K, K), 6), round(cka(K, 2 * K + 1, unbiased=False), 6)
    (1.0, 1.0)
    """
    a, b = _kernel("cka", K1), _kernel("cka", K2)
    if tuple(K1.shape) != tuple(K2.shape):
        raise TangentError(
            f"cka: the kernels have shapes {tuple(K1.shape)} and {tuple(K2.shape)}; use the same samples"
        )
    if not unbiased:
        return _cosine("cka", _center(a, K1), _center(b, K2), before=(a, b))
    if K1.ndim != 2:
        raise TangentError("cka: the unbiased estimate is for kernels (n, n); use outputs='trace'")
    if a.shape[0] < 4:
        raise TangentError(f"cka: the unbiased estimate needs at least 4 samples, got {a.shape[0]}; use unbiased=False")
    a, b = (matrix - torch.diag(matrix.diagonal()) for matrix in (a, b))
    own = [_hsic(matrix, matrix) for matrix in (a, b)]
    if any(float(size) <= _NOTHING * float((matrix**2).sum()) for size, matrix in zip(own, (a, b), strict=True)):
        raise TangentError(
            "cka: a kernel has no unbiased variance on these samples; use more samples or unbiased=False"
        )
    return float(_hsic(a, b) / (own[0] * own[1]).sqrt())


def decompose(K: Kernel, K0: Kernel, y: Kernel) -> Decomposition:
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
    initial = _kernel("decompose", K0)
    if tuple(K0.shape) != tuple(K.shape):
        raise TangentError(f"decompose: K has shape {tuple(K.shape)} and K0 {tuple(K0.shape)}; use the same samples")
    if not bool(kernel.any()):
        raise TangentError("decompose: K is zero, so there is nothing to decompose")
    parts = (initial, target @ target.mT)
    gram = torch.stack([torch.stack([(a * b).sum() for b in parts]) for a in parts])
    if float(torch.linalg.det(gram)) <= 1e-12 * float(gram[0, 0] * gram[1, 1]):
        raise TangentError("decompose: K0 and the target kernel are proportional, so the weights are not determined")
    weights = torch.linalg.solve(gram, torch.stack([(a * kernel).sum() for a in parts]))
    residual = kernel - weights[0] * parts[0] - weights[1] * parts[1]
    explained = 1 - float((residual**2).sum() / (kernel**2).sum())
    return Decomposition(float(weights[0]), float(weights[1]), explained, residual.reshape(K.shape))


def representability(K0: Kernel, r: Kernel, *, jitter: float = 1e-10) -> Representability:
    r"""How well a kernel represents targets: RKHS norm rᵀK₀⁻¹r, energy in its top eigenvectors, leave-one-out residuals.

    ``jitter`` is relative to the mean of the diagonal and added before inverting. Adaptation, and alignment, grow with how
    poorly r is represented. Raises TangentError where shapes do not fit or r is zero. Source: theory in the docs, §5.

    >>> found = representability(torch.diag(torch.tensor([4.0, 1.0])), torch.tensor([2.0, 0.0]))
    >>> round(found.rkhs_norm, 6), found.energy.tolist()
    (1.0, [1.0, 1.0])
    """
    kernel, target = _pair("representability", K0, r)
    if K0.ndim == 2 and target.shape[1] > 1:
        raise TangentError(
            "representability: several outputs need the full kernel (n, c, n, c), or one output at a time"
        )
    if not bool(target.any()):
        raise TangentError("representability: the targets are zero, which every kernel represents")
    added = jitter * float(kernel.diagonal().mean())
    values, vectors = torch.linalg.eigh(kernel)
    inverse = (vectors / (values.clamp_min(0) + added)) @ vectors.mT
    flat = target[:, 0]
    alpha = inverse @ flat
    energy = ((vectors.mT @ flat) ** 2).flip(0).cumsum(0) / (flat @ flat)
    n = K0.shape[0]
    own = inverse.reshape(n, len(flat) // n, n, -1).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (K₀⁻¹)_kk, c × c
    residuals = torch.linalg.solve(own, alpha.reshape(n, -1)).reshape(r.shape)
    return Representability(float(flat @ alpha), energy, residuals, added)


def effective_rank(B: Kernel) -> EffectiveRank:
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


def _tensor(call: str, values: Kernel) -> Tensor:
    tensor = torch.as_tensor(values).detach().double()
    check_finite(call, "the value", [tensor])
    return tensor


def _kernel(call: str, K: Kernel) -> Float[Tensor, "N N"]:
    kernel = _tensor(call, K)
    shape = tuple(kernel.shape)
    if not (len(shape) in (2, 4) and shape[: len(shape) // 2] == shape[len(shape) // 2 :]):
        raise TangentError(f"{call}: a kernel has shape (n, n) or (n, c, n, c), got {shape}")
    return kernel if len(shape) == 2 else kernel.flatten(2).flatten(0, 1)


def _pair(call: str, K: Kernel, y: Kernel) -> tuple[Float[Tensor, "N N"], Float[Tensor, "N k"]]:
    """A kernel as a matrix, and Y with K_y = Y Yᵀ."""
    kernel, target = _kernel(call, K), _tensor(call, y)
    target = target[:, None] if target.ndim == 1 else target
    wanted = tuple(K.shape[:2]) if K.ndim == 4 else (K.shape[0], *target.shape[1:2])
    if target.ndim != 2 or tuple(target.shape) != wanted:
        raise TangentError(f"{call}: targets of shape {tuple(y.shape)} do not fit a kernel of shape {tuple(K.shape)}")
    return kernel, target.reshape(-1, 1) if K.ndim == 4 else target


def _center(matrix: Float[Tensor, "N N"], like: Kernel) -> Float[Tensor, "N N"]:
    """HKH over samples, for each pair of outputs."""
    n, c = like.shape[0], like.shape[1] if like.ndim == 4 else 1
    cube = matrix.reshape(n, c, n, c)
    cube = cube - cube.mean(0, keepdim=True)
    return (cube - cube.mean(2, keepdim=True)).reshape(n * c, n * c)


def _cosine(call: str, a: Tensor, b: Tensor, *, before: tuple[Tensor, Tensor]) -> float:
    """cos(a, b), unless one of them is zero, or the rounding that centring left ``before`` with."""
    sizes = [matrix.norm() for matrix in (a, b)]
    if any(float(size) <= _NOTHING * float(whole.norm()) for size, whole in zip(sizes, before, strict=True)):
        raise TangentError(f"{call}: a kernel is zero (after centring, if asked for), so the angle is not defined")
    return float((a / sizes[0] * (b / sizes[1])).sum())


def _hsic(a: Tensor, b: Tensor) -> Tensor:
    """Unbiased HSIC of two kernels with zero diagonals, up to the common factor 1/(n(n − 3))."""
    n = a.shape[0]
    product = a @ b
    return product.trace() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * product.sum() / (n - 2)
