"""Structures 𝓜: which transforms of the features are allowed, and the regularizer Ω̃ that each induces.

From coefficients, one matrix B for each block, a structure computes all that solvers need: the best transform, Ω̃(B), its
gradient and curvature, and the dual Ω̃* for lower bounds. To add one that acts block by block, subclass ``BlockStructure``
and write ``block_solution`` (one decomposition of B gives all of it) and ``block_dual``.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from inspect import isabstract, signature

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.features.transforms import Joint, Sides, Transform
from adaptive_tangents.penalties.closed_forms import Penalty, Quadratic
from adaptive_tangents.runtime.chunks import ranges
from adaptive_tangents.structures.inner import Inner

_AT_A_TIME = 16  # samples whose kernel is computed at once, for its diagonal
Matrices = Mapping[str, Float[Tensor, "_o _i"]]


@dataclass(frozen=True, eq=False)
class Solution:
    """The inner minimum over M at given coefficients β.

    Attributes:
        transforms: the best M of each block.
        penalty: Ω̃(β).
        gradient: ∇Ω̃(β) = 2 M⁻¹M⁻ᵀβ, one matrix for each block.
        curvature: maps X, one matrix for each block, to the Hessian ∇²Ω̃(β)[X], set up at its first call; None if unknown.
    """

    transforms: Mapping[str, Transform]
    penalty: float
    gradient: Matrices
    curvature: Callable[[Matrices], dict[str, Tensor]] | None = None


@dataclass(frozen=True, eq=False)
class BlockSolution:
    """The inner minimum over the M of one block.

    Attributes:
        transform: the best M.
        penalty: Ω̃(B).
        gradient: ∇Ω̃(B), (o, i).
        curvature: maps X (o, i) to the Hessian ∇²Ω̃(B)[X]; None if unknown.
    """

    transform: Transform
    penalty: float
    gradient: Float[Tensor, "o i"]
    curvature: Callable[[Tensor], Tensor] | None = None


class Structure(ABC):
    """A set of transforms 𝓜. Coefficients are a mapping from block names to matrices B (o, i)."""

    def prepared(self, feats: TangentFeatures) -> "Structure":
        """The structure with all it needs to know of the features; ``fit`` calls this once.

        Args:
            feats: tangent features φ to be fitted.
        """
        return self

    @property
    def whole_blocks(self) -> bool:
        """Whether transforms act on whole blocks only, not within them: sketched features allow no others."""
        return False

    def rotates(self, names: Iterable[str]) -> dict[str, tuple[bool, bool]]:
        """For each block, whether Ω̃ is invariant under rotations of its output side, and of its input side.

        On such sides ``fit`` works in the subspace that the features span; zero rows or columns must add nothing to Ω̃.

        Args:
            names: names of the blocks.
        """
        return dict.fromkeys(names, (False, False))

    def norms_of(self, names: Sequence[str]) -> dict[str, tuple[str, ...]] | None:
        """Groups of blocks, by the first name of each, if Ω̃ depends on β only through the groups' norms; else None.

        Such structures can be fitted to kernels alone.

        Args:
            names: names of the blocks; empty for one kernel without blocks, called "". {} then says that blocks are needed.
        """
        return None

    def with_scales(self, scales: Mapping[str, float]) -> "Structure":
        """The structure as ``prepared`` returns it, from the scales of the blocks.

        Args:
            scales: s_ℓ, the root mean square norm of each block's features.
        """
        return self

    @abstractmethod
    def solution(self, coefficients: Matrices) -> Solution:
        """The best transforms for β, with the penalty, its gradient and its curvature.

        Args:
            coefficients: B (o, i) of each block.
        """

    @abstractmethod
    def dual(self, matrices: Matrices) -> float:
        """Ω̃*(G) = sup over β of ⟨G, β⟩ − Ω̃(β), or an upper bound of it, or infinity.

        Args:
            matrices: G, one matrix for each block.
        """

    def proximal(self, coefficients: Matrices, step: float) -> dict[str, Tensor]:
        """The global argmin over β of ‖β − X‖²/(2·step) + Ω̃(β).

        Args:
            coefficients: X, one matrix for each block.
            step: the step size, positive.

        Raises:
            TangentError: when no closed form is known.
        """
        raise TangentError(f"proximal: {type(self).__name__} has no proximal operator; write proximal, or use fit")

    def update(self, coefficients: Matrices) -> Mapping[str, Transform]:
        """The transforms M that attain Ω̃(β).

        Args:
            coefficients: B (o, i) of each block.
        """
        return self.solution(coefficients).transforms

    def penalty(self, coefficients: Matrices) -> float:
        """Ω̃(β) = min over M in 𝓜 of ‖M⁻ᵀβ‖² + Ω(M).

        Args:
            coefficients: B (o, i) of each block.
        """
        return self.solution(coefficients).penalty

    def gradient(self, coefficients: Matrices) -> Matrices:
        """∇Ω̃(β), one matrix for each block.

        Args:
            coefficients: B (o, i) of each block.
        """
        return self.solution(coefficients).gradient


def check_structure(call: str, given: object, argument: str = "structure=") -> Structure:
    """The structure given; raises TangentError for a class, a name or anything else, saying what to pass."""
    if isinstance(given, Structure):
        return given
    wanted = "at.TwoSided()"
    for kind in _kinds(Structure):  # type: ignore[type-abstract]
        if given is kind or (isinstance(given, str) and _bare(given) == _bare(kind.__name__)):
            asks = any(p.default is p.empty for p in signature(kind).parameters.values())
            ours = kind.__module__.startswith("adaptive_tangents.")
            wanted = f"{'at.' if ours else ''}{kind.__name__}({'...' if asks else ''})"
    got = f"the class {given.__name__}" if isinstance(given, type) else repr(given)
    raise TangentError(f"{call}: {got} is no structure; pass one, such as {argument}{wanted}")


def _kinds(of: type[Structure]) -> list[type[Structure]]:
    """All concrete subclasses."""
    return [kind for sub in of.__subclasses__() for kind in (sub, *_kinds(sub)) if not isabstract(kind)]


def _bare(name: str) -> str:
    return re.sub(r"\W|_", "", name).lower()


def check_sketch(call: str, structure: Structure, feats: TangentFeatures) -> None:
    """Raise TangentError if features are sketched and the structure transforms within blocks."""
    if feats.origin != "exact" and not structure.whole_blocks:
        raise TangentError(
            f"{call}: the features are {feats.origin}, whose coordinates have no output and input units left for "
            f"{type(structure).__name__} to act on; use Fixed, LayerScale or Full, or exact features"
        )


@dataclass(frozen=True)
class BlockStructure(Structure):
    """A structure that treats each block by itself, Ω̃ = Σ_ℓ Ω̃_ℓ(B_ℓ).

    Args:
        scale_invariant: measure each block's coefficients in units of s_ℓ², the mean diagonal of its kernel over samples and
            outputs: Ω̃_ℓ(B) = Ω̃(s_ℓB)/s_ℓ². One strength then suits layers with features of different size. Small B still
            cost ‖B‖²; for a penalty proportional to λ, this is the strength λ/s_ℓ².
        scales: s_ℓ of each block, set by ``prepared``.
    """

    scale_invariant: bool = field(default=False, kw_only=True)
    scales: Mapping[str, float] | None = field(default=None, kw_only=True, repr=False, hash=False)

    def __init_subclass__(cls) -> None:
        # A dataclass keeps a __repr__ that the class has; its own would show unset options first.
        if "__repr__" not in vars(cls):
            cls.__repr__ = BlockStructure.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.repr and f.name != "scale_invariant"]
        shown += ["scale_invariant=True"] if self.scale_invariant else []
        return f"{type(self).__name__}({', '.join(shown)})"

    @abstractmethod
    def block_solution(self, matrix: Float[Tensor, "o i"]) -> BlockSolution:
        """The best transform of one block, Ω̃(B), ∇Ω̃(B) and the curvature.

        Args:
            matrix: B.
        """

    @abstractmethod
    def block_dual(self, matrix: Float[Tensor, "o i"]) -> float:
        """Ω̃*(G) of one block.

        Args:
            matrix: G.
        """

    def block_proximal(self, matrix: Float[Tensor, "o i"], step: float) -> Float[Tensor, "o i"]:
        """The global argmin over B of ‖B − X‖²/(2·step) + Ω̃(B) of one block.

        Args:
            matrix: X.
            step: the step size, positive.

        Raises:
            TangentError: when no closed form is known.
        """
        raise TangentError(
            f"proximal: {type(self).__name__} has no proximal operator; write block_proximal, or use fit"
        )

    def block_solutions(self, matrices: Matrices) -> dict[str, BlockSolution]:
        """``block_solution`` of every block; structures whose blocks can share work override this.

        Args:
            matrices: B of each block, in units of its scale.
        """
        return {name: self.for_block(name).block_solution(matrix) for name, matrix in matrices.items()}

    def for_block(self, name: str) -> "BlockStructure":
        """The structure of one block, for classes in which blocks differ.

        Args:
            name: the block.
        """
        return self

    def prepared(self, feats: TangentFeatures) -> "BlockStructure":
        return self.with_scales(kernel_scales(feats)) if self.scale_invariant else self

    def with_scales(self, scales: Mapping[str, float]) -> "BlockStructure":
        return replace(self, scales=dict(scales)) if self.scale_invariant else self

    def solution(self, coefficients: Matrices) -> Solution:
        scales = {name: self._scale(name) for name in coefficients}
        found = self.block_solutions({name: scaled(s, coefficients[name]) for name, s in scales.items()})
        return joined_solution([_of_block(name, found[name], s) for name, s in scales.items()])

    def dual(self, matrices: Matrices) -> float:
        scales = {name: self._scale(name) for name in matrices}
        # With C = sB, sup over B of ⟨G, B⟩ − Ω̃(sB)/s² is sup over C of ⟨sG, C⟩ − Ω̃(C), divided by s².
        return sum(self.for_block(name).block_dual(s * matrices[name]) / s**2 for name, s in scales.items())

    def proximal(self, coefficients: Matrices, step: float) -> dict[str, Tensor]:
        scales = {name: self._scale(name) for name in coefficients}
        # With C = sB, both terms are those of C and sX, divided by s².
        return {n: self.for_block(n).block_proximal(s * coefficients[n], step) / s for n, s in scales.items()}

    def _scale(self, name: str) -> float:
        if not self.scale_invariant:
            return 1.0
        if self.scales is None or name not in self.scales:
            raise TangentError(
                f"{type(self).__name__}: the scale of block {name!r} is not known; use structure.prepared(feats), as fit does"
            )
        return self.scales[name]


def kernel_scales(feats: TangentFeatures) -> dict[str, float]:
    """s_ℓ = √(trace K_ℓ/(nc)), the root mean square norm of each block's features; 1 if they are zero."""
    traces = dict.fromkeys(feats.blocks, 0.0)
    for part in ranges(feats.n, _AT_A_TIME):
        for name, kernel in feats[part].kernel(outputs="trace", by_block=True).items():
            traces[name] += float(kernel.diagonal().sum())
    return {name: math.sqrt(trace / (feats.n * feats.c)) or 1.0 for name, trace in traces.items()}


def joined_solution(parts: list[Solution]) -> Solution:
    """The solution of a sum of regularizers on different blocks."""
    curvatures = [part.curvature for part in parts if part.curvature is not None]
    return Solution(
        {name: transform for part in parts for name, transform in part.transforms.items()},
        sum(part.penalty for part in parts),
        {name: matrix for part in parts for name, matrix in part.gradient.items()},
        JoinedCurvature(tuple(curvatures)) if len(curvatures) == len(parts) else None,
    )


def _of_block(name: str, found: BlockSolution, s: float) -> Solution:
    """The solution of one block of scale s."""
    # The chain rule's s² cancels the division by s², so the curvature stays as it is.
    curvature = None if found.curvature is None else _OfBlock(name, found.curvature)
    return Solution({name: found.transform}, found.penalty / s**2, {name: scaled(1 / s, found.gradient)}, curvature)


def scaled(factor: float, matrix: Tensor) -> Tensor:
    """The matrix times a factor."""
    return matrix if factor == 1 else factor * matrix


@dataclass(frozen=True)
class JoinedCurvature:
    """The curvature of a sum of regularizers on different blocks."""

    parts: tuple[Callable[[Matrices], dict[str, Tensor]], ...]

    @property
    def blocks(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The curvature of each block that has one of its own."""
        found: dict[str, Callable[[Tensor], Tensor]] = {}
        for part in self.parts:
            if isinstance(part, JoinedCurvature):
                found |= part.blocks
            elif isinstance(part, _OfBlock):
                found[part.name] = part.function
        return found

    def __call__(self, x: Matrices) -> dict[str, Tensor]:
        return {name: matrix for part in self.parts for name, matrix in part(x).items()}


@dataclass(frozen=True)
class _OfBlock:
    """The curvature of one block, as a map on all blocks."""

    name: str
    function: Callable[[Tensor], Tensor]

    def __call__(self, x: Matrices) -> dict[str, Tensor]:
        return {self.name: self.function(x[self.name])}


@dataclass(frozen=True)
class Fixed(BlockStructure):
    """No adaptation, M = I: kernel regression with the tangent kernel, Ω̃(β) = ‖β‖².

    Args:
        scale_invariant, scales: as in ``BlockStructure``.
    """

    whole_blocks = True

    def norms_of(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return _together(names)

    def rotates(self, names: Iterable[str]) -> dict[str, tuple[bool, bool]]:
        return dict.fromkeys(names, (True, True))

    def block_solution(self, matrix: Tensor) -> BlockSolution:
        return BlockSolution(Sides(), float((matrix**2).sum()), 2 * matrix, lambda x: 2 * x)

    def block_dual(self, matrix: Tensor) -> float:
        return float((matrix**2).sum()) / 4

    def block_proximal(self, matrix: Tensor, step: float) -> Tensor:
        if not 0 < step < math.inf:
            raise TangentError(f"proximal: the step is positive and finite, got {step}")
        return matrix / (1 + 2 * step)


@dataclass(frozen=True)
class Full(Structure):
    """Any p × p matrix: Ω̃(β) = ω̃(‖β‖).

    Interpolation gives the fit of ``Fixed``; only the kernel changes. With a ridge ρ the fit is that of ``Fixed`` with ridge
    ρ/z², z the one singular value other than 1.

    Args:
        penalty_on_transform: ω on z.
    """

    penalty_on_transform: Penalty = field(default_factory=Quadratic)
    whole_blocks = True

    def norms_of(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return _together(names)

    def rotates(self, names: Iterable[str]) -> dict[str, tuple[bool, bool]]:
        return dict.fromkeys(names, (True, True))

    def solution(self, coefficients: Matrices) -> Solution:
        norm = _norm(coefficients)
        inner = Inner((self.penalty_on_transform,), norm)
        unit = {name: matrix / norm if norm > 0 else matrix for name, matrix in coefficients.items()}

        def curvature(x: Matrices) -> dict[str, Tensor]:
            along = (inner.bend - inner.slope) * torch.stack([(unit[name] * x[name]).sum() for name in unit]).sum()
            return {name: inner.slope * x[name] + along * unit[name] for name in unit}

        gradient = {name: inner.slope * matrix for name, matrix in coefficients.items()}
        joint = dict.fromkeys(coefficients, Joint(unit, float(inner.gains)))
        return Solution(joint, inner.total, gradient, curvature)

    def dual(self, matrices: Matrices) -> float:
        return float(self.penalty_on_transform.induced().dual(_norm(matrices)))

    def proximal(self, coefficients: Matrices, step: float) -> dict[str, Tensor]:
        factor = shrinkage(self.penalty_on_transform, _norm(coefficients), step)
        return {name: factor * matrix for name, matrix in coefficients.items()}


def shrinkage(penalty: Penalty, norms: Float[Tensor, "*s"], step: float) -> Float[Tensor, "*s"]:
    """The factors by which the proximal operator of ω̃ multiplies these norms."""
    return torch.where(norms > 0, penalty.induced().proximal(norms, step) / norms, 0.0)


def _together(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """All blocks as one group."""
    return {names[0] if names else "": tuple(names)}


def _norm(matrices: Matrices) -> Float[Tensor, " 1"]:
    """‖β‖."""
    return torch.sqrt(torch.stack([(matrix**2).sum() for matrix in matrices.values()]).sum())[None]
