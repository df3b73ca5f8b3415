"""Sides of a transform with few directions, M = σI + UVᵀ, by least squares on factors of the features.

1. Wide sides are narrowed (`narrowed`): U and V are sought in the span of what each side alone would choose.
2. Sums over samples are made once, in these coordinates (`Sums`); no fit, strength or rank goes back to the features.
3. One side given the other is reduced-rank regression in closed form (`_solve`); two sides alternate (`Search`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptive_tangents.features.blocks import Block
from adaptive_tangents.measures.terms import (
    Term,
    inner,
    joined,
    moment,
    positions_of,
    rows_of,
    stacked,
    terms_of,
    values,
)
from adaptive_tangents.runtime.chunks import ranges

WIDE = 64  # units; a wider side is narrowed to this many, and more explain no more of the networks measured
_PRINCIPAL = 128  # of the features' principal directions, in which V is sought on a wide side
_FORMED = 1024  # units; moments of wider sides are not formed
_ENTRIES = 3_000_000  # of one tensor; the memory of larger ones is new at each use
_KEPT = 30_000_000  # entries of terms that are kept; more are made again for each sum
_TABLE = 2048  # entries of a matrix whose fourth moments are formed
_CALL = 2e7  # operations that take as long as the calls for one product of moments
FIRST, NEXT, LAST, ROUNDS = 3, 1, 10, 30  # rounds: at the first rank, each other, the one chosen, and full rank
_CLOSE, _CLOSER, _EXACT = 1e-3, 1e-4, 1e-12  # relative changes that end an alternation, one at full rank, a side alone
_ALONE = 10  # times more rounds, of a side alone
SIDES = ("left", "right")


@dataclass(frozen=True)
class Samples:
    """Some samples of a block's features before (A) and after (B)."""

    before: Block
    after: Block
    index: Int[Tensor, " k"]
    _moments: dict[tuple[str, int], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _held: dict[tuple[str, int], tuple[Tensor | None, list[tuple[list[Term], list[Term]]]]] = field(
        default_factory=dict, repr=False
    )

    @cached_property
    def norms(self) -> tuple[float, float, float]:
        """Σ‖B‖², Σ⟨B, A⟩ and Σ‖A‖²."""
        after = mixed = before = 0.0
        for a, b in self.parts():
            after, mixed, before = after + inner(b, b), mixed + inner(b, a), before + inner(a, a)
        return after, mixed, before

    @property
    def change(self) -> float:
        """Σ‖B − A‖², or zero if it is only rounding."""
        after, mixed, before = self.norms
        change = after - 2 * mixed + before
        return 0.0 if change <= 1e-13 * after else change  # so that NaN stays

    def onto(self, side: str, columns: Tensor | None) -> list[tuple[list[Term], list[Term]]]:
        """A and B with a side on some columns, a few samples at a time; made once."""
        key = (side, id(columns))
        if key not in self._held:
            turned = ((_turned(a, side), _turned(b, side)) for a, b in self.parts())
            # The columns are held too, so that no others get their id.
            self._held[key] = (columns, [(_onto(a, columns), _onto(b, columns)) for a, b in turned])
        return self._held[key][1]

    def moments(self, side: str, columns: Tensor | None) -> tuple[Tensor, Tensor]:
        """Σ AAᵀ and Σ BAᵀ of a side, onto some columns; made once."""
        key = (side, id(columns))
        if key not in self._moments:
            pieces = [(moment(a, a), moment(b, a)) for a, b in self.onto(side, columns)]
            square, cross = (torch.stack(each).sum(0) for each in zip(*pieces, strict=True))
            self._moments[key] = (square, cross)
        return self._moments[key]

    def core(self, axes: Mapping[str, Tensor | None]) -> list[tuple[list[Term], list[Term]]]:
        """A and B on the columns of both sides."""
        both = zip(*(self.onto(side, axes[side]) for side in SIDES), strict=True)
        return [(_sides_joined(left[0], right[0]), _sides_joined(left[1], right[1])) for left, right in both]

    @cached_property
    def _each(self) -> int:
        """Entries that one sample takes."""
        (o, i), c = self.before.shape, self.before.outputs
        positions = max(self.before.positions, self.after.positions, 1)
        return max(1, min(positions * (c * o + i), c * o * i), min((c + 1) * positions**2, c * o * i))

    @cached_property
    def _kept(self) -> list[tuple[list[Term], list[Term]]]:
        return list(self._made())

    def _made(self) -> Iterator[tuple[list[Term], list[Term]]]:
        for part in ranges(len(self.index), max(1, _ENTRIES // self._each)):
            a, b = (block.map(index=self.index[part], dtype=torch.float64) for block in (self.before, self.after))
            yield terms_of(a), terms_of(b)

    def parts(self) -> Iterator[tuple[list[Term], list[Term]]]:
        """A and B as terms in float64, a few samples at a time."""
        return iter(self._kept) if len(self.index) * self._each <= _KEPT else self._made()


def _turned(terms: Sequence[Term], side: str) -> list[Term]:
    """The terms with a side on the left."""
    return [term.flipped if side == "right" else term for term in terms]


def _onto(terms: Sequence[Term], left: Tensor | None = None, right: Tensor | None = None) -> list[Term]:
    return [term.onto(left, right) for term in terms]


def narrowed(
    samples: Samples, side: str, strengths: Sequence[float], rank: int, width: int
) -> Float[Tensor, "d w"] | None:
    """Orthonormal directions that hold what the side alone would read and write at any strength; None if it is narrow.

    With S = Σ AAᵀ and X = Σ (B − σA)Aᵀ, a side of rank k at ridge μ and scale σ writes along the leading left singular
    vectors u of X(S + μ)^(−1/2) and reads along (S + μ)⁻¹Xᵀu. σ is first that of a layer scale, then the best one beside the
    directions found before. More directions than k are taken where the width has room for them.
    """
    size = samples.before.shape[SIDES.index(side)]
    if size <= width:
        return None

    def total(first: int, columns: Tensor | None) -> Tensor:
        pieces = [
            moment(_turned(part[first], side), _onto(_turned(part[0], side), columns)) for part in samples.parts()
        ]
        return torch.stack(pieces).sum(0) if len(pieces) > 1 else pieces[0]

    square = total(0, None) if size <= _FORMED else None
    trace = float(square.trace()) if square is not None else sum(inner(a, a) for a, _ in samples.parts())
    product: Callable[[Tensor], Tensor] = (lambda q: total(0, q)) if square is None else square.matmul
    values, principal = _leading(product, size, min(size, 2 * width, _PRINCIPAL), samples)
    cross, own = total(1, principal), product(principal)
    _, mixed, before = samples.norms
    scale, most = mixed / before if before > 0 else 1.0, max(rank, width // (2 * len(strengths)))
    found: list[list[Tensor]] = []
    for strength in (strengths[0], *strengths):  # the first one twice: once for its scale alone
        root = (values + strength * trace / size + torch.finfo(values.dtype).tiny).sqrt()
        wanted, held = cross / root, own / root
        white = wanted - scale * held
        squares, vectors = torch.linalg.eigh(white.mT @ white)
        kept = min(most, int((squares > 1e-14 * squares[-1]).sum())) if squares[-1] > 0 else 0
        found.append([])
        if kept:
            sizes, vectors = squares[-kept:].sqrt(), vectors[:, -kept:]
            shares = sizes / sizes.norm()
            written, read = white @ vectors / sizes, principal @ (vectors / root[:, None])
            found[-1] = [written * shares, read / read.norm(dim=0) * shares]
            # The scale as in ``_solve``, which takes only directions of the rank.
            wanted, held = (x.mT @ written[:, -rank:] for x in (wanted, held))
            room = before - float((held * held).sum())
            scale = (mixed - float((wanted * held).sum())) / room if room > 1e-12 * before else scale
    columns = [column for pair in found[1:] for column in pair]
    if not columns:
        return principal[:, -width:]
    stacked = torch.cat(columns, 1)
    squares, vectors = torch.linalg.eigh(stacked.mT @ stacked)
    kept = min(width, int((squares > 1e-12 * squares[-1]).sum()))
    axes: Tensor = torch.linalg.qr(stacked @ (vectors[:, -kept:] / squares[-kept:].sqrt()))[0]
    return axes


def _leading(product: Callable[[Tensor], Tensor], size: int, count: int, samples: Samples) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a moment, and their vectors, by subspace iteration; they need not be exact."""
    more = min(size, count + 16)
    like = torch.empty(0, dtype=torch.float64, device=samples.index.device)
    axes = torch.randn(size, more, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu").to(
        like
    )
    for _ in range(2):
        axes = torch.linalg.qr(product(axes))[0]
    values, vectors = torch.linalg.eigh(axes.mT @ product(axes))
    return values[-count:].clamp_min(0), (axes @ vectors)[:, -count:]


@dataclass(frozen=True)
class Side:
    """A batch of M = σI + QΔQᵀ, one for each strength, with ``inside`` σI + Δ in the coordinates of Q."""

    inside: Float[Tensor, "b d d"]
    scale: Float[Tensor, " b"]

    @property
    def change(self) -> Float[Tensor, "b d d"]:
        """Δ."""
        return self.inside - self.scale[:, None, None] * torch.eye(self.inside.shape[-1], device="cpu").to(self.inside)

    def __getitem__(self, which: Tensor | slice) -> "Side":
        return Side(self.inside[which], self.scale[which])

    def with_(self, which: Tensor, other: "Side") -> "Side":
        """The batch with some of its members replaced."""
        inside, scale = self.inside.clone(), self.scale.clone()
        inside[which], scale[which] = other.inside, other.scale
        return Side(inside, scale)


@dataclass(frozen=True)
class _Table:
    """Fourth moments: ½Σ(A_oi A_pj + A_oj A_pi) for the pairs o ≤ p and i ≤ j, and Σ B_oi A_pj for all pairs op and ij."""

    square: Float[Tensor, "op ij"]
    cross: Float[Tensor, "oo ii"]
    units: dict[str, int]

    @staticmethod
    def of(a: Float[Tensor, "n oi"], b: Float[Tensor, "n oi"], p: int, q: int) -> "_Table":
        """The moments of features A (n, o·i) and B."""
        i, j = torch.triu_indices(q, q, device=a.device)
        rows = a.reshape(-1, p, q)
        square = []
        for o in range(p):  # with the units from o on, as the moments are symmetric
            gram = (rows[:, o].mT @ rows[:, o:].flatten(1)).reshape(q, p - o, q).transpose(0, 1)
            square.append(((gram + gram.mT) / 2)[:, i, j])
        cross = (b.mT @ a).reshape(p, q, p, q).permute(0, 2, 1, 3).reshape(p * p, q * q)
        return _Table(torch.cat(square), cross, {"left": p, "right": q})

    def moments(self, side: str, other: Float[Tensor, "b d d"]) -> tuple[Tensor, Tensor]:
        """Σ AM′ᵀM′Aᵀ and Σ BM′Aᵀ of a side, for each M′ of the other."""
        size, units = other.shape[-1], self.units[side]
        i, j = torch.triu_indices(size, size, device=other.device)
        packed = (other.mT @ other)[:, i, j] * (1 + (i < j).to(other))
        square, cross = (self.square.mT, self.cross.mT) if side == "left" else (self.square, self.cross)
        half, whole = packed @ square, other.flatten(1) @ cross
        o, r = torch.triu_indices(units, units, device=other.device)
        full = half.new_empty(len(half), units, units)
        full[:, o, r] = half
        full[:, r, o] = half
        return full, whole.reshape(-1, units, units)


@dataclass(frozen=True)
class Sums:
    """Σ‖B‖², Σ⟨B, A⟩, Σ‖A‖², and for the sides fitted, in the coordinates of their narrowed spaces, Σ AAᵀ and Σ BAᵀ.

    ``core`` holds A and B narrowed on both sides. The other side does not move what lies outside its narrowed space, so the
    moments of that are what they are at M = I (``_outside``).
    """

    after: float
    mixed: float
    before: float
    change: float
    square: dict[str, Float[Tensor, "d d"]]
    cross: dict[str, Float[Tensor, "d d"]]
    core: list[tuple[list[Term], list[Term]]] = field(repr=False)
    solves: int = 1

    @cached_property
    def _table(self) -> "_Table | None":
        """Fourth moments of the core, where they are cheaper than the products."""
        p, q = (len(self.square[side]) for side in SIDES)
        a, b = ([pair[k] for pair in self.core] for k in (0, 1))
        samples = sum(rows_of(part) for part in a)
        positions = max(positions_of(part[0]) for part in (*a, *b))
        each = _CALL + 4 * samples * (min(positions, p, q) * (p + q) ** 2)
        if p * q > _TABLE or 4 * (p * q) ** 2 * (samples + self.solves) > self.solves * each:
            return None
        rows = [torch.cat([values(joined(part)).flatten(0, 1).flatten(1) for part in parts]) for parts in (a, b)]
        return _Table.of(rows[0], rows[1], p, q)

    def _inside(self, side: str, other: Tensor) -> tuple[Tensor, Tensor]:
        """Σ AM′ᵀM′Aᵀ and Σ BM′Aᵀ of the core, for each M′ of the other side."""
        if self._table is not None:
            return self._table.moments(side, other)
        squares, crosses = [], []
        for m in other:
            pairs = [(_onto(_turned(a, side), None, m.mT), _turned(b, side)) for a, b in self.core]
            squares.append(torch.stack([moment(a, a) for a, _ in pairs]).sum(0))
            crosses.append(torch.stack([moment(b, a) for a, b in pairs]).sum(0))
        return torch.stack(squares), torch.stack(crosses)

    @cached_property
    def _outside(self) -> dict[str, tuple[Tensor, Tensor]]:
        found = {}
        for side, other in zip(SIDES, reversed(SIDES), strict=True):
            eye = torch.eye(len(self.square[other]), device="cpu").to(self.square[other])[None]
            square, cross = self._inside(side, eye)
            found[side] = (self.square[side] - square[0], self.cross[side] - cross[0])
        return found

    def given(self, side: str, other: Side | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """With à = AM′ᵀ: Σ ÃÃᵀ and Σ BÃᵀ in the side's coordinates, and Σ‖Ã‖² and Σ⟨B, Ã⟩ in all."""
        if other is None:
            square, cross = self.square[side][None], self.cross[side][None]
            return square, cross, square.new_tensor([self.before]), square.new_tensor([self.mixed])
        square, cross = self._inside(side, other.inside)
        beyond, scale, change = self._outside[side], other.scale, other.change
        square = square + scale[:, None, None] ** 2 * beyond[0]
        cross = cross + scale[:, None, None] * beyond[1]
        own = {"left": "right", "right": "left"}[side]
        size = scale**2 * self.before + (change * (2 * scale[:, None, None] * self.square[own])).sum((1, 2))
        size = size + ((change.mT @ change) * self.square[own]).sum((1, 2))
        return square, cross, size, scale * self.mixed + (change * self.cross[own]).sum((1, 2))

    def errors(self, sides: dict[str, Side]) -> Float[Tensor, " b"]:
        """Σ‖B − MA‖² for each of a batch."""
        (side, one), *rest = sides.items()
        square, cross, size, mixed = self.given(side, rest[0][1] if rest else None)
        scale, change = one.scale, one.change
        moved = (
            scale**2 * size + 2 * scale * (change * square).sum((1, 2)) + ((change.mT @ change) * square).sum((1, 2))
        )
        error: Tensor = self.after - 2 * (scale * mixed + (change * cross).sum((1, 2))) + moved
        return error.clamp_min(0)


def sums(samples: Samples, axes: Mapping[str, Tensor | None], solves: int) -> Sums:
    """The sums over some samples; ``solves`` says how many fits will use them."""
    moments = {side: samples.moments(side, columns) for side, columns in axes.items()}
    core = [(_small(a), _small(b)) for a, b in samples.core(axes)] if len(axes) == 2 else []
    square, cross = ({side: each[k] for side, each in moments.items()} for k in (0, 1))
    return Sums(*samples.norms, samples.change, square, cross, _together(core), solves)


def _sides_joined(left: list[Term], right: list[Term]) -> list[Term]:
    """Terms with the left factors of the first, and the right ones of the second, which are flipped."""
    return [Term(one.left, other.left) for one, other in zip(left, right, strict=True)]


def _small(terms: list[Term]) -> list[Term]:
    """The terms, or their sum multiplied out where that is smaller or its products are."""
    positions, least = 0, 0
    for term in terms:
        if not isinstance(term.left, Tensor) or not isinstance(term.right, Tensor):
            return [joined(terms)]
        positions, least = positions + term.left.shape[2], min(term.left.shape[3], term.right.shape[3])
    return terms if positions < least / 2 else [joined(terms)]


def _together(core: list[tuple[list[Term], list[Term]]]) -> list[tuple[list[Term], list[Term]]]:
    """The parts as one, where they have the same terms: fewer and larger products."""
    if len({tuple(len(part) for part in pair) for pair in core}) != 1:
        return core
    a, b = ([stacked(same) for same in zip(*(pair[k] for pair in core), strict=True)] for k in (0, 1))
    return [(a, b)]


def _solve(
    square: Float[Tensor, "b d d"], cross: Float[Tensor, "b d d"], size: Float[Tensor, " b"],
    mixed: Float[Tensor, " b"], ridge: Float[Tensor, " b"], rank: int | None, scale: Float[Tensor, " b"],
    times: int = 1,
) -> Side:  # fmt: skip
    """The side of rank k: U from the eigenvectors at the scale so far, then the best scale and V for this U; some times over.

    At full rank M = (X + μI)(S + μI)⁻¹, with the ridge toward the identity.
    """
    units = square.shape[-1]
    eye = torch.eye(units, device="cpu").to(square)
    ridge = (ridge + torch.finfo(square.dtype).tiny)[:, None, None]
    lower = torch.linalg.cholesky(square + ridge * eye)
    if rank is None or rank >= units:
        return Side(torch.cholesky_solve((cross + ridge * eye).mT, lower).mT, torch.ones_like(scale))
    # In the whitened coordinates the features are L⁻¹S and what they should become is L⁻¹Xᵀ.
    both = torch.linalg.solve_triangular(lower, torch.cat([cross.mT.expand_as(square), square], -1), upper=False)
    all_wanted, all_held = both.split(units, -1)
    seen = [scale]
    for _ in range(times):
        missing = all_wanted - scale[:, None, None] * all_held
        written = torch.linalg.eigh(missing.mT @ missing)[1][:, :, -rank:]
        wanted, held = all_wanted @ written, all_held @ written
        rest, room = mixed - (wanted * held).sum((1, 2)), size - (held * held).sum((1, 2))
        scale = torch.where(room > 1e-12 * size, rest / room.clamp_min(torch.finfo(room.dtype).tiny), scale)
        seen.append(scale)
        if bool(((scale - seen[-2]).abs() <= _EXACT * scale.abs()).all()):
            break
        if len(seen) > 2 and len(seen) % 3 == 0 and len(seen) <= times:
            scale = _extrapolated(*seen[-3:])
            seen.append(scale)
    read = torch.linalg.solve_triangular(lower.mT, wanted - scale[:, None, None] * held, upper=True)
    return Side(scale[:, None, None] * eye + written @ read.mT, scale)


def _extrapolated(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """Where a sequence that converges linearly ends (Aitken), or its last member if it does not."""
    steps, bend = (second - first, third - second), third - 2 * second + first
    converging = (steps[1].abs() < steps[0].abs()) & (bend.abs() > 1e-12 * third.abs())
    return torch.where(converging, first - steps[0] ** 2 / torch.where(converging, bend, 1.0), third)


@dataclass(frozen=True)
class Search:
    """Fits of one or two sides on some sums: ``units`` are those of each side, ``strengths`` the ridges of the batch."""

    fitting: Sums
    units: dict[str, int]
    strengths: Float[Tensor, " b"]

    def begin(self) -> dict[str, Side]:
        """M = I with the scale of a layer scale on the first side."""
        held = self.fitting
        scale = held.mixed / held.before if held.before > 0 else 1.0
        found = {}
        for side in self.units:
            eye = (
                torch.eye(len(held.square[side]), device="cpu")
                .to(held.square[side])
                .expand(len(self.strengths), -1, -1)
            )
            found[side] = Side(scale * eye, torch.full_like(self.strengths, scale))
            scale = 1.0
        return found

    def improved(
        self, sides: dict[str, Side], rank: int | None, rounds: int, which: slice = slice(None)
    ) -> dict[str, Side]:
        """Alternating least squares at some of the strengths, for some rounds or until the sides change no more."""
        left = torch.arange(len(self.strengths), device=self.strengths.device)[which]
        previous = torch.full_like(self.strengths, torch.inf)
        alone = len(self.units) == 1  # then only the scale is to be found along with the directions
        for _ in range(1 if alone else rounds):
            held = {side: one[left] for side, one in sides.items()}
            for side in held:
                other = next((one for key, one in held.items() if key != side), None)
                square, cross, size, mixed = (
                    x.expand(len(left), *x.shape[1:]) for x in self.fitting.given(side, other)
                )
                ridge = self.strengths[left] * size / self.units[side]
                times = _ALONE * rounds if alone else 1
                held[side] = _solve(square, cross, size, mixed, ridge, rank, held[side].scale, times)
            sides = {side: one.with_(left, held[side]) for side, one in sides.items()}
            current = torch.stack([one.inside.norm(dim=(1, 2)) for one in held.values()]).sum(0)
            going = (current - previous[left]).abs() > (_CLOSER if rank is None else _CLOSE) * current
            previous[left] = current
            left = left[going]
            if not len(left):
                break
        return sides


def rounds_of(count: int, rank: int | None) -> int:
    """Rounds of a search at the first, second, ... rank tried; one at full rank goes to its end."""
    return ROUNDS if rank is None else FIRST if count == 1 else NEXT
