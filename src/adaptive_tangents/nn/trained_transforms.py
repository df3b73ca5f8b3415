"""Trainable transforms M: the parameters that each structure gives to gradient descent.

A factor holds M of one block (of several for ``Full``) as parameters. It computes β = Mᵀθ, M as a transform of features, and
Ω(M), and can load the M of a fit. All start at M = I.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.transforms import (
    Entrywise,
    Joint,
    LowRank,
    Matrix,
    Modal,
    Scaled,
    Side,
    Sides,
    Transform,
    does_nothing,
    is_identity,
)
from adaptive_tangents.penalties.closed_forms import NoAdaptation, Penalty
from adaptive_tangents.structures.base import BlockStructure, Fixed, Full, Matrices, Structure
from adaptive_tangents.structures.grouped import Grouped
from adaptive_tangents.structures.mixed import Mixed
from adaptive_tangents.structures.modes import ManyModes, Modes, OneMode
from adaptive_tangents.structures.spectral import Spectral

Shapes = Mapping[str, tuple[int, int]]
_Key = TypeVar("_Key", str, int)
ModesOf = Mapping[str, tuple[tuple[str, int], ...]]


class Factor(nn.Module):
    """M of the blocks ``names``; ``unit`` is the s of ``scale_invariant``, or 1, or None if it is not known."""

    def __init__(self, names: tuple[str, ...], unit: float | None = 1.0) -> None:
        super().__init__()
        self.names, self.unit = names, unit

    @abstractmethod
    def coefficients(self, inner: Matrices) -> dict[str, Tensor]:
        """β = Mᵀθ."""

    @abstractmethod
    def transforms(self, inner: Matrices) -> dict[str, Transform]:
        """M as a transform of features."""

    @abstractmethod
    def cost(self) -> Tensor:
        """Ω(M) for the unit 1."""

    @abstractmethod
    def take(self, transforms: Mapping[str, Transform], coefficients: Matrices) -> dict[str, Tensor]:
        """Load the M of ``transforms``, and return θ = M⁻ᵀβ."""

    def penalty(self) -> Tensor:
        """Ω(M)."""
        if self.unit is None:
            raise TangentError(
                "TangentModule: a scale_invariant structure measures coefficients in units of the features; give "
                "structure.prepared(feats)"
            )
        return self.cost() / self.unit**2


def factors(structure: Structure, shapes: Shapes, modes: ModesOf, rank: int | None) -> list[Factor]:
    """The factors of all blocks; ``rank`` limits the rank of M − I of each side that is a matrix."""
    if isinstance(structure, Mixed):
        groups = structure.groups(shapes)
        return [
            factor
            for pattern, names in groups.items()
            for factor in factors(structure.structures[pattern], {k: shapes[k] for k in names}, modes, rank)
        ]
    if isinstance(structure, Full):
        return [JointGain(tuple(shapes), structure.penalty_on_transform)]
    if isinstance(structure, Modes):
        structure = Modes(
            structure.penalties, modes=modes, scale_invariant=structure.scale_invariant, scales=structure.scales
        )
    if not isinstance(structure, BlockStructure):
        raise _unknown(structure)
    return [_factor(structure, name, shape, rank) for name, shape in shapes.items()]


def _factor(structure: BlockStructure, name: str, shape: tuple[int, int], rank: int | None) -> Factor:
    here = structure.for_block(name)
    unit = 1.0 if not structure.scale_invariant else None if structure.scales is None else structure.scales[name]
    if isinstance(here, Fixed):
        return SideFactors(name, {}, unit)
    if isinstance(here, Spectral):
        sizes = {"left": shape[0], "right": shape[1]}
        return SideFactors(name, {side: Square(sizes[side], p, rank) for side, p in _moving(here.sides).items()}, unit)
    if isinstance(here, OneMode | ManyModes):
        penalties = {here.axis: here.penalty_on_mode} if isinstance(here, OneMode) else here.penalties
        lengths = (shape[0], *here.sizes)
        squares = {str(axis): Square(lengths[axis], p, rank) for axis, p in _moving(penalties).items()}
        return ModeFactors(name, here.sizes, squares, unit)
    if isinstance(here, Grouped):
        return Gains(name, here, shape, unit)
    raise _unknown(here)


def _moving(penalties: Mapping[_Key, Penalty]) -> dict[_Key, Penalty]:
    return {key: penalty for key, penalty in penalties.items() if not isinstance(penalty, NoAdaptation)}


def _unknown(structure: Structure) -> TangentError:
    return TangentError(
        f"TangentModule: cannot train the transforms of {type(structure).__name__}; use one of the library's "
        "structures, or a mapping from block names to them"
    )


class Square(nn.Module):
    """A square matrix M (d, d), or I + UVᵀ with U, V (d, k); starts at the identity, with U random so that V learns."""

    def __init__(self, size: int, penalty: Penalty, rank: int | None) -> None:
        super().__init__()
        self.size, self.penalty = size, penalty
        self.low = rank is not None and rank < size
        if self.low:
            assert rank is not None
            self.u = nn.Parameter(torch.randn(size, rank, device="cpu") / size**0.5)
            self.v = nn.Parameter(torch.zeros(size, rank, device="cpu"))
        else:
            self.whole = nn.Parameter(torch.eye(size, device="cpu"))

    def matrix(self) -> Float[Tensor, "d d"]:
        """M."""
        return torch.eye(self.size, device="cpu").to(self.u) + self.u @ self.v.mT if self.low else self.whole

    def pull(self, x: Float[Tensor, "*_batch d k"]) -> Float[Tensor, "*_batch d k"]:
        """Mᵀx."""
        return x + self.v @ (self.u.mT @ x) if self.low else self.whole.mT @ x

    def push_back(self, x: Float[Tensor, "*_batch d k"]) -> Float[Tensor, "*_batch d k"]:
        """M⁻ᵀx."""
        found: Tensor = torch.linalg.solve(self.matrix().mT, x)
        return found

    def cost(self) -> Tensor:
        """Σ ω(max(σ_j(M), 1)): only stretching costs."""
        return self.penalty.value(torch.linalg.svdvals(self.matrix()).clamp_min(1)).sum()

    def take(self, side: Side | None) -> None:
        """Load a side of a fit."""
        with torch.no_grad():
            if not self.low:
                like = self.whole
                identity = torch.eye(self.size, device="cpu").to(like)
                self.whole.copy_(identity if side is None else side.apply(identity).mT)
                return
            self.v.zero_()
            if does_nothing(side):
                return
            if not isinstance(side, LowRank) or side.gains.shape[0] > self.u.shape[1]:
                moved = side.gains.shape[0] if isinstance(side, LowRank) else self.size
                raise TangentError(
                    f"TangentModule: a side of the fit moves {moved} directions and rank is {self.u.shape[1]}; raise rank"
                )
            k = side.gains.shape[0]
            self.u[:, :k] = side.directions.to(self.u)
            self.v[:, :k] = (side.directions * (side.gains - 1)).to(self.v)


class SideFactors(Factor):
    """M_L and M_R of one block, either of which may be absent: β = M_LᵀΘM_R."""

    def __init__(self, name: str, sides: Mapping[str, Square], unit: float | None) -> None:
        super().__init__((name,), unit)
        self.sides = nn.ModuleDict(sides)

    def _side(self, which: str) -> Square | None:
        side = dict(self.sides.items()).get(which)
        assert side is None or isinstance(side, Square)
        return side

    def coefficients(self, inner: Matrices) -> dict[str, Tensor]:
        (name,), (left, right) = self.names, (self._side("left"), self._side("right"))
        matrix = inner[name] if left is None else left.pull(inner[name])
        return {name: matrix if right is None else right.pull(matrix.mT).mT}

    def transforms(self, inner: Matrices) -> dict[str, Transform]:
        sides = {which: Matrix(square.matrix().detach().clone()) for which, square in self.sides.items()}  # type: ignore[operator]
        return {self.names[0]: Sides(sides.get("left"), sides.get("right"))}

    def cost(self) -> Tensor:
        return _sum([square.cost() for square in self.sides.values()])  # type: ignore[operator]

    def take(self, transforms: Mapping[str, Transform], coefficients: Matrices) -> dict[str, Tensor]:
        (name,), (left, right) = self.names, (self._side("left"), self._side("right"))
        transform, matrix = _sides(name, transforms), coefficients[name]
        if (left is None and not does_nothing(transform.left)) or (right is None and not does_nothing(transform.right)):
            raise _moves(name, "a side")
        if left is not None:
            left.take(transform.left)
            matrix = left.push_back(matrix.to(left.matrix()))
        if right is not None:
            right.take(transform.right)
            matrix = right.push_back(matrix.to(right.matrix()).mT).mT
        return {name: matrix}


class ModeFactors(Factor):
    """Square factors for some modes of a block's kernel (out, *sizes); that of "out" also acts on the bias column."""

    def __init__(self, name: str, sizes: tuple[int, ...], squares: Mapping[str, Square], unit: float | None) -> None:
        super().__init__((name,), unit)
        self.sizes, self.squares = sizes, nn.ModuleDict(squares)

    def _apply_each(self, matrix: Tensor, what: str) -> Tensor:
        total = torch.Size(self.sizes).numel()
        for axis, square in self.squares.items():
            move = getattr(square, what)
            if axis == "0":
                matrix = move(matrix)
                continue
            kernel = matrix[:, :total].reshape(-1, *self.sizes).movedim(int(axis), 0)
            moved = move(kernel.flatten(1)).reshape(kernel.shape).movedim(0, int(axis))
            matrix = torch.cat([moved.flatten(1), matrix[:, total:]], 1)
        return matrix

    def coefficients(self, inner: Matrices) -> dict[str, Tensor]:
        return {self.names[0]: self._apply_each(inner[self.names[0]], "pull")}

    def transforms(self, inner: Matrices) -> dict[str, Transform]:
        made = {int(axis): Matrix(s.matrix().detach().clone()) for axis, s in self.squares.items()}  # type: ignore[operator]
        right = tuple(made.get(k + 1) for k in range(len(self.sizes)))
        modal = Modal(self.sizes, right) if any(side is not None for side in right) else None
        return {self.names[0]: Sides(made.get(0), modal)}

    def cost(self) -> Tensor:
        return _sum([square.cost() for square in self.squares.values()])  # type: ignore[operator]

    def take(self, transforms: Mapping[str, Transform], coefficients: Matrices) -> dict[str, Tensor]:
        (name,) = self.names
        transform = _sides(name, transforms)
        modal = transform.right if isinstance(transform.right, Modal) else None
        if (modal is None or modal.sizes != self.sizes) and not does_nothing(transform.right):
            raise _moves(name, "more than one mode of")
        moved = [transform.left, *(modal.factors if modal is not None else ())]
        if any(str(axis) not in self.squares and not does_nothing(side) for axis, side in enumerate(moved)):
            raise _moves(name, "a mode")
        for axis, square in self.squares.items():
            within = modal.factors[int(axis) - 1] if modal is not None and axis != "0" else None
            square.take(transform.left if axis == "0" else within)  # type: ignore[operator]
        like = next(self.parameters())
        return {name: self._apply_each(coefficients[name].to(like), "push_back")}


class Gains(Factor):
    """One gain for each group of a block's entries: β_g = z_gθ_g."""

    def __init__(self, name: str, structure: Grouped, shape: tuple[int, int], unit: float | None) -> None:
        super().__init__((name,), unit)
        self.structure = structure
        self.gains = nn.Parameter(
            torch.ones([1 if k in structure.dimensions else size for k, size in enumerate(shape)], device="cpu")
        )

    def coefficients(self, inner: Matrices) -> dict[str, Tensor]:
        return {self.names[0]: self.gains * inner[self.names[0]]}

    def transforms(self, inner: Matrices) -> dict[str, Transform]:
        return {self.names[0]: self.structure.transform(self.gains.detach().clone())}

    def cost(self) -> Tensor:
        return self.structure.penalty_on_transform.value(self.gains.abs().clamp_min(1)).sum()

    def take(self, transforms: Mapping[str, Transform], coefficients: Matrices) -> dict[str, Tensor]:
        (name,), matrix = self.names, coefficients[self.names[0]]
        entries = _entries(name, transforms, matrix)
        found = entries[tuple(slice(1) if size == 1 else slice(None) for size in self.gains.shape)]
        if not torch.equal(found.expand_as(matrix), entries):
            raise _moves(name, "entries by gains of their own")
        with torch.no_grad():
            self.gains.copy_(found)
        return {name: matrix.to(self.gains) / self.gains.detach()}


def _sides(name: str, transforms: Mapping[str, Transform]) -> Sides:
    """A block's transform as ``Sides`` of scale 1; raises TangentError for others."""
    transform = transforms.get(name, Sides())
    if is_identity({name: transform}):
        return Sides()
    if not isinstance(transform, Sides):
        raise _moves(name, "all blocks as one" if isinstance(transform, Joint) else "entries by gains of their own")
    if transform.scale != 1:
        raise _moves(name, "the whole")
    return transform


def _entries(name: str, transforms: Mapping[str, Transform], like: Tensor) -> Float[Tensor, "o i"]:
    """The gain of each entry of a block; raises TangentError if the transform mixes entries."""
    transform = transforms.get(name, Sides())
    if isinstance(transform, Entrywise):
        return transform.gains.to(like)
    if is_identity({name: transform}):
        return torch.ones_like(like)
    if not isinstance(transform, Sides):
        raise _moves(name, "all blocks as one")
    gains = torch.full_like(like, transform.scale)
    for side, line in ((transform.left, (-1, 1)), (transform.right, (1, -1))):
        if isinstance(side, Scaled):
            gains = gains * side.gains.to(like).reshape(line)
        elif not does_nothing(side):
            raise _moves(name, "a side")
    return gains


def _moves(name: str, what: str) -> TangentError:
    return TangentError(
        f"TangentModule: the fit's M moves {what} in block {name!r}, which the structure of this module does not; make the "
        "module with the structure of the fit"
    )


class JointGain(Factor):
    """M = I + (z − 1)bbᵀ over several blocks at once, along the best direction, b = θ/‖θ‖: β = zθ."""

    def __init__(self, names: tuple[str, ...], penalty: Penalty) -> None:
        super().__init__(names)
        self.penalty_on_transform = penalty
        self.gain = nn.Parameter(torch.ones((), device="cpu"))

    def coefficients(self, inner: Matrices) -> dict[str, Tensor]:
        return {name: self.gain * inner[name] for name in self.names}

    def transforms(self, inner: Matrices) -> dict[str, Transform]:
        norm = torch.stack([(inner[name].detach() ** 2).sum() for name in self.names]).sum().sqrt()
        unit = {name: inner[name].detach() / norm if norm > 0 else inner[name].detach() for name in self.names}
        return dict.fromkeys(self.names, Joint(unit, float(self.gain.detach())))

    def cost(self) -> Tensor:
        return self.penalty_on_transform.value(self.gain.abs().clamp_min(1))

    def take(self, transforms: Mapping[str, Transform], coefficients: Matrices) -> dict[str, Tensor]:
        found = [transforms.get(name, Sides()) for name in self.names]
        joint = next((transform for transform in found if isinstance(transform, Joint)), None)
        for name, transform in zip(self.names, found, strict=True):
            if transform is not joint and not is_identity({name: transform}):
                raise _moves(name, "something by itself")
        with torch.no_grad():
            self.gain.fill_(1.0 if joint is None else joint.gain)
        return {name: coefficients[name].to(self.gain) / self.gain.detach() for name in self.names}


def _sum(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum() if terms else torch.zeros((), device="cpu")
