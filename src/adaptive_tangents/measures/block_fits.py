"""What explains the change of one block best: its fits at every rank and strength, chosen on samples held out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.plans import narrowed as without_unused
from adaptive_tangents.features.transforms import Entrywise, Matrix, Sides, Transform, Update
from adaptive_tangents.measures import few_directions
from adaptive_tangents.measures.few_directions import SIDES, Samples, Search, Side, narrowed, sums
from adaptive_tangents.runtime.chunks import ranges
from adaptive_tangents.runtime.memory import require_memory
from adaptive_tangents.structures.base import Structure
from adaptive_tangents.structures.grouped import Grouped, LayerScale
from adaptive_tangents.structures.spectral import Left, Right, TwoSided

_CHUNK = 4_000_000  # entries of features that are formed at once
_LEAST = 8  # units that a wide side is narrowed to where memory is scarce
_ALIKE = 1e-12  # of ‖B‖²: errors that differ by less are alike
_TINY = 1e-8  # of a scale, so that directions relative to it are finite


@dataclass(frozen=True)
class Found:
    """What explains one block best; errors and changes on the samples fitted, used to choose, and reported on."""

    transform: Transform
    strength: float
    errors: tuple[float, float, float]
    changes: tuple[float, float, float]
    rank: int | None = None
    by_rank: Mapping[int, float] = field(default_factory=dict)

    def r2(self, which: int) -> float:
        return r_squared(self.errors[which], self.changes[which])


def sides_of(structure: Structure) -> tuple[str, ...]:
    """The sides that a structure fits."""
    return {Left: SIDES[:1], Right: SIDES[1:], TwoSided: SIDES}.get(type(structure), ())


def width_of(block: Block, structure: Structure, n: int, ranks: tuple[int, ...] | None, limit: int) -> int:
    """To how many units a wide side is narrowed, so that the sums of a block stay within the limit."""
    sides = sides_of(structure)
    widest = max(block.shape)
    width = widest if ranks is None else max(few_directions.WIDE, 2 * max(ranks))

    def needed(width: int) -> int:
        o, i = (min(size, width) for size in block.shape)
        moments = sum({"left": o, "right": i}[side] ** 2 for side in sides)
        held = 2 * n * block.outputs * o * i if len(sides) == 2 and ranks is not None else 0
        return 8 * (4 * moments + held)

    while ranks is not None and needed(width) > limit and width > _LEAST:
        width = max(_LEAST, width // 2)
    side = max(sides, key=lambda side: block.shape[SIDES.index(side)], default="")
    if sides:
        units = block.shape[SIDES.index(side)]
        remedy = (
            f"leave block {block.name!r} out with wrt, or use a structure without its {side} side, of {units} units"
        )
        less = "give a rank, " if ranks is None else ""
        require_memory("explain", needed(width), limit, remedy=less + remedy)
    return width


@dataclass(frozen=True)
class Fits:
    """The fits of one block, which share its samples, narrowed sides and sums."""

    name: str
    before: Block
    after: Block
    parts: tuple[Tensor, Tensor, Tensor]
    strengths: tuple[float, ...]
    ranks: tuple[int, ...] | None
    width: int
    _axes: dict[str, Tensor | None] = field(default_factory=dict, repr=False)

    @cached_property
    def sets(self) -> tuple[Samples, Samples, Samples]:
        """The samples fitted, those that choose, and those reported on."""
        fitted, choosing, reported = (Samples(self.before, self.after, index) for index in self.parts)
        return fitted, choosing, reported

    @cached_property
    def compact(self) -> "tuple[Fits, Tensor] | None":
        """The same with only the columns that some sample looks up, and which these are; None where nothing is looked up."""
        before, after = without_unused(self.before, self.after)
        if self.ranks is None or before is self.before:
            return None
        assert self.before.lookup is not None
        assert self.after.lookup is not None
        kept = torch.unique(torch.cat([part.index.flatten() for part in (self.before.lookup, self.after.lookup)]))
        return replace(self, before=before, after=after, _axes={}), kept

    def axes(self, side: str) -> Tensor | None:
        """Directions that hold what a side reads and writes, if it is wide."""
        if self.ranks is not None and side not in self._axes:
            self._axes[side] = narrowed(self.sets[0], side, self.strengths[::2], max(self.ranks), self.width)
        return self._axes.get(side)

    def best(self, structure: Structure, tick: Callable[[float], None]) -> Found:
        if self.compact is None or (isinstance(structure, Grouped) and not isinstance(structure, LayerScale)):
            return self._best(structure, self.before.shape, tick)
        fits, kept = self.compact
        found = fits._best(structure, self.before.shape, tick)
        return replace(found, transform=_spread(found.transform, kept, self.before.shape[1]))

    def _best(self, structure: Structure, shape: tuple[int, int], tick: Callable[[float], None]) -> Found:
        if sides_of(structure):
            return self._by_sides(sides_of(structure), shape, tick)
        transform: Transform = Sides()
        strength = 0.0
        if isinstance(structure, LayerScale):
            _, mixed, size = self.sets[0].norms
            transform = Sides(scale=mixed / size if size > 0 else 1.0)
        elif isinstance(structure, Grouped):
            transform, strength = _by_group(self.sets, structure, self.strengths)
        fitted, choosing, reported = self.sets
        return Found(
            transform, strength, (_error(fitted, transform), _error(choosing, transform), _error(reported, transform)),
            (fitted.change, choosing.change, reported.change),
        )  # fmt: skip

    def _by_sides(self, sides: tuple[str, ...], shape: tuple[int, int], tick: Callable[[float], None]) -> Found:
        """Sides of every rank and strength from the same sums, each rank from the one before; then the chosen one alone."""
        units = {side: shape[SIDES.index(side)] for side in sides}
        most = max(self.before.shape[SIDES.index(side)] for side in sides)
        tried = (None,) if self.ranks is None else sorted({min(k, most) for k in self.ranks})
        axes = {side: self.axes(side) for side in sides}
        solves = len(self.strengths) * (len(tried) + few_directions.FIRST)
        counts = (solves, solves // 2, 1)
        fitting, choosing, reporting = (sums(samples, axes, k) for samples, k in zip(self.sets, counts, strict=True))
        tick(0.5)
        search = Search(fitting, units, fitting.square[sides[0]].new_tensor(self.strengths))
        batch, near = search.begin(), slice(0, len(self.strengths))
        found: list[tuple[float, int | None, float, dict[str, Side]]] = []
        by_rank: dict[int, float] = {}
        for count, k in enumerate(tried, start=int(0 not in tried)):
            if k != 0:  # at rank 0 the scale alone, with which the search begins
                batch = search.improved(batch, k, few_directions.rounds_of(count, k), near)
            errors = choosing.errors({side: each[near] for side, each in batch.items()}).tolist()
            last = last_of_least(errors, choosing.after) if k != 0 else -1  # rank 0 is the strongest ridge's limit
            best = range(near.start, near.stop)[last]
            one = {side: each[best : best + 1] for side, each in batch.items()}
            found.append((errors[last], k, self.strengths[best], one))
            by_rank[most if k is None else k] = r_squared(float(reporting.errors(one)), reporting.change)
            # The best ridge moves little with the rank.
            if k != 0:
                near = slice(max(0, best - 1), min(len(self.strengths), best + 2))
            tick(0.5 + 0.4 * count / len(tried))
        simplest = last_of_least([candidate[0] for candidate in reversed(found)], choosing.after)
        _, k, strength, chosen = found[len(found) - 1 - simplest]
        if k:
            only = replace(search, strengths=search.strengths.new_tensor([strength]))
            chosen = only.improved(chosen, k, min(few_directions.LAST, few_directions.ROUNDS))
        left = (float(fitting.errors(chosen)), float(choosing.errors(chosen)), float(reporting.errors(chosen)))
        changes = (fitting.change, choosing.change, reporting.change)
        k, transform = most if k is None else k, _transform(chosen, axes, k)
        by_rank[k] = r_squared(left[2], changes[2])
        return Found(transform, strength, left, changes, k, by_rank)


def _spread(transform: Transform, kept: Tensor, units: int) -> Sides:
    """The transform on all columns, from that on those that are looked up."""
    assert isinstance(transform, Sides)
    if transform.right is None:
        return transform
    assert isinstance(transform.right, Update)
    columns = (transform.right.written, transform.right.read)
    return replace(transform, right=Update(*(x.new_zeros(units, x.shape[1]).index_copy(0, kept, x) for x in columns)))


def _transform(sides: dict[str, Side], axes: Mapping[str, Tensor | None], rank: int | None) -> Sides:
    """M_L, M_R = I + UVᵀ and their common scale, or matrices if they were asked to be of full rank."""
    found: dict[str, Matrix | Update] = {}
    total = 1.0
    for name, side in sides.items():
        columns, inside = axes[name], side.inside[0]
        if rank is None:
            found[name] = Matrix(inside)
            continue
        scale = float(side.scale)
        if rank == 0:
            total *= scale
            continue
        scale = scale if abs(scale) > _TINY else _TINY
        u, values, vt = torch.linalg.svd(side.change[0] / scale)
        u, v = u[:, :rank] * values[:rank], vt[:rank].mT
        found[name] = Update(u, v) if columns is None else Update(columns @ u, columns @ v)
        total *= scale
    return Sides(found.get("left"), found.get("right"), total)


def _error(samples: Samples, transform: Transform) -> float:
    """Σ‖B − M A‖²."""
    if isinstance(transform, Entrywise):
        moved = samples.before.entrywise(transform.gains)
    else:
        assert isinstance(transform, Sides)
        if transform.left is None and transform.right is None:
            after, mixed, before = samples.norms
            return unrounded(after - 2 * transform.scale * mixed + transform.scale**2 * before)
        moved = samples.before.transformed(transform.left, transform.right, transform.scale)
    after, mixed, before = Samples(moved, samples.after, samples.index).norms
    return unrounded(after - 2 * mixed + before)


def unrounded(square: float) -> float:
    """A sum of squares that rounding made negative as zero; NaN stays, which ``max`` would hide."""
    return 0.0 if square < 0 else square


def _by_group(sets: Sequence[Samples], structure: Grouped, strengths: Sequence[float]) -> tuple[Transform, float]:
    """One factor for each group of entries, z = (Σ B·A + μ)/(Σ A·A + μ)."""

    def totals(samples: Samples) -> tuple[Tensor, Tensor]:
        """Σ A·A and Σ B·A, entry by entry, in one pass over the features."""
        (o, i), c = samples.before.shape, samples.before.outputs
        square = cross = torch.zeros((), dtype=torch.float64, device=samples.index.device)
        for part in ranges(len(samples.index), max(1, _CHUNK // (c * o * i))):
            index = samples.index[part]
            a, b = (x.map(index=index, dtype=torch.float64).features() for x in (samples.before, samples.after))
            square, cross = square + (a * a).sum((0, 1)), cross + (b * a).sum((0, 1))
        dims = structure.dimensions
        return (square.sum(dims, keepdim=True), cross.sum(dims, keepdim=True)) if dims else (square, cross)

    fitting, (square, cross) = totals(sets[0]), totals(sets[1])
    found: list[tuple[float, float, Tensor]] = []
    after = sets[1].norms[0]
    for strength in strengths:
        ridge = strength * float(fitting[0].mean()) + torch.finfo(square.dtype).tiny
        gains = (fitting[1] + ridge) / (fitting[0] + ridge)
        found.append((after + float((gains**2 * square - 2 * gains * cross).sum()), strength, gains))
    _, strength, gains = found[last_of_least([candidate[0] for candidate in found], after)]
    return structure.transform(gains), strength


def last_of_least(errors: Sequence[float], size: float) -> int:
    """The last of the least errors, where those that differ by rounding of a size are alike: no scale changes the choice."""
    most = min(errors) + _ALIKE * size
    return max((k for k, error in enumerate(errors) if error <= most), default=len(errors) - 1)


def r_squared(error: float, change: float) -> float:
    """R², or NaN if nothing changed."""
    return 1 - error / change if change > 0 else float("nan")
