"""In which order the tiles of a kernel are made, by which process, and which features are kept for the next tiles."""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

Place = tuple[int, int]  # a tile: its row and column among the tiles
Key = tuple[int, int]  # features of a range of samples: 0 for x or 1 for x2, and the number of the range
_Features = TypeVar("_Features")


class FeatureCache(Generic[_Features]):
    """Features of ranges of samples, made when first needed; at most ``capacity`` are held at a time.

    The order of the tiles is known, so the features dropped first are those needed again last. No rule captures less often.
    Features of the ranges ``kept`` are never dropped.
    """

    def __init__(
        self, make: Callable[[Key], _Features], order: Sequence[Place], capacity: int, *,
        symmetric: bool, kept: Collection[Key] = (),
    ) -> None:  # fmt: skip
        self.make, self.capacity, self.symmetric, self.kept = make, capacity, symmetric, frozenset(kept)
        self.captured = 0
        self._held: dict[Key, _Features] = {}
        self._places = {place: k for k, place in enumerate(order)}
        self._uses: dict[Key, deque[int]] = {}
        self._over: set[int] = set()
        for k, place in enumerate(order):
            for key in sorted(set(keys_of(place, symmetric=symmetric))):
                self._uses.setdefault(key, deque()).append(k)

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    def pair(self, place: Place) -> tuple[_Features, _Features]:
        """The features of a tile's rows and columns; the same ones twice on the diagonal."""
        self.skip(place)
        keys = keys_of(place, symmetric=self.symmetric)
        return self.one(keys[0], keys), self.one(keys[1], keys)

    def one(self, key: Key, needed: Collection[Key] = ()) -> _Features:
        """The features of one range; those ``needed`` beside it stay."""
        if key not in self._held:
            self._make_room({key, *needed})
            self._held[key] = self.make(key)
            self.captured += 1
        return self._held[key]

    def skip(self, place: Place) -> None:
        """A tile is made, or another process makes it: its features are no longer needed for it."""
        self._over.add(self._places[place])

    def _make_room(self, needed: Collection[Key]) -> None:
        while len(self._held) >= self.capacity:
            free = [key for key in self._held if key not in needed and key not in self.kept]
            if not free:
                return
            del self._held[max(free, key=self._next)]

    def _next(self, key: Key) -> int:
        """When features are needed next, as the number of that tile in the order."""
        uses = self._uses.get(key, deque())
        while uses and uses[0] in self._over:
            uses.popleft()
        return uses[0] if uses else len(self._places)


@dataclass(frozen=True)
class Deal:
    """Who makes what: the tiles of every rank in the order it makes them, and the rank that captures each range.

    ``owners`` is empty if every rank captures what it needs. Otherwise the owner of a range passes its features to any
    other rank up to ``copies`` times.
    """

    shares: Sequence[Sequence[Place]]
    owners: Mapping[Key, int] = field(default_factory=dict)
    copies: int = 0

    def owned(self, rank: int) -> list[Key]:
        """The ranges that a rank captures and keeps."""
        return [key for key, owner in self.owners.items() if owner == rank]

    def captures(self, capacity: int, *, symmetric: bool) -> int:
        """How often features of a range are captured, by all ranks together."""
        return len(self.owners) or sum(captures(share, capacity, symmetric=symmetric) for share in self.shares)


def keys_of(place: Place, *, symmetric: bool) -> tuple[Key, Key]:
    """The keys of the features that a tile is made of: those of its rows and of its columns."""
    return (0, place[0]), (0 if symmetric else 1, place[1])


def captures(order: Sequence[Place], capacity: int, *, symmetric: bool) -> int:
    """The number of captures when tiles are made in this order."""
    return sum(_makes(order, capacity, symmetric=symmetric).values())


def _makes(order: Sequence[Place], capacity: int, *, symmetric: bool, kept: Collection[Key] = ()) -> Counter[Key]:
    """How often the features of each range are made when tiles are made in this order."""
    made: Counter[Key] = Counter()

    def count(key: Key) -> Key:
        made[key] += 1
        return key

    held = FeatureCache(count, order, capacity, symmetric=symmetric, kept=kept)
    for key in kept:
        held.one(key)
    for place in order:
        held.pair(place)
    return made


def in_turn(order: Sequence[Place], ready: Callable[[Place], bool], wait: Callable[[], bool]) -> Iterator[Place]:
    """The tiles in their order, except that those which are not ready let others pass.

    If none is ready, ``wait`` is called again and again; when it is false, the first tile comes all the same.
    """
    left = deque(order)
    while left:
        late = []
        while left and not ready(left[0]):
            late.append(left.popleft())
        given_up = not left and not wait()
        left.extendleft(reversed(late))
        if given_up or len(late) < len(left):
            place = left[0 if given_up else len(late)]
            left.remove(place)
            yield place


def ordered(places: Sequence[Place], capacity: int, *, symmetric: bool) -> list[Place]:
    """The tiles in an order with few captures: as many rows as fit are held, and the columns stream past them.

    For N ranges of which k are held, this takes about N²/2k captures, or N if all are held.
    """
    height = max(1, capacity - 1)
    if symmetric:
        return _past_ranges(places, height, own_first=True)
    turned = _past_ranges([(j, i) for i, j in places], height, own_first=False)
    options = [_past_ranges(places, height, own_first=False), [(i, j) for j, i in turned]]
    return min(options, key=lambda order: captures(order, capacity, symmetric=False))


def _past_ranges(places: Sequence[Place], height: int, *, own_first: bool) -> list[Place]:
    """Stream columns past ranges of ``height`` rows: back and forth, or the range's own samples first, then toward them."""
    wanted = set(places)
    rows, columns = sorted({i for i, _ in places}), sorted({j for _, j in places})
    order: list[Place] = []
    for turn, start in enumerate(range(0, len(rows), height)):
        here = rows[start : start + height]
        own = [j for j in columns if own_first and here[0] <= j <= here[-1]]
        rest = [j for j in columns if j not in own]
        # The next range begins with a column that is still held: this range's last one.
        rest = rest[::-1] if own_first or turn % 2 else rest
        order += [(i, j) for j in own + rest for i in here if (i, j) in wanted]
    return order


def dealt(
    places: Sequence[Place], costs: Mapping[Place, float], ranks: int, capacity: int, *,
    symmetric: bool, capture: float, passing: float = float("inf"),
) -> Deal:  # fmt: skip
    """The tiles of every rank: of equal cost up to one tile, and chosen so that few features are captured twice.

    Ranks get consecutive tiles, either row by row or along a curve that keeps neighbors together. Features are passed on
    if there is room for it. Of these the deal with the smallest cost for the busiest rank is taken. ``capture`` is the cost
    of one capture, ``passing`` that of passing on what was captured.
    """

    def busiest(deal: Deal) -> float:
        return max(cost(deal, rank) for rank in range(ranks))

    def cost(deal: Deal, rank: int) -> float:
        share, owned = deal.shares[rank], deal.owned(rank)
        makes = _makes(share, capacity, symmetric=symmetric, kept=owned).total()
        others = passing if deal.owners else capture
        return sum(costs[place] for place in share) + capture * len(owned) + others * (makes - len(owned))

    deals = []
    for along in (sorted(places), sorted(places, key=_along_curve)):
        parts = [ordered(part, capacity, symmetric=symmetric) for part in _split(along, costs, ranks)]
        deals.append(Deal(parts))
        owners = _owners(parts, costs, capture, symmetric=symmetric)
        kept = Counter(owners.values())
        if ranks > 1 and passing < capture and capacity >= min(len(owners), max(kept.values(), default=0) + 2):
            deal = Deal(parts, owners)
            makes = [_makes(part, capacity, symmetric=symmetric, kept=deal.owned(r)) for r, part in enumerate(parts)]
            deals.append(replace(deal, copies=max(max(made.values(), default=1) for made in makes)))
    return min(deals, key=busiest)


def _owners(
    shares: Sequence[Sequence[Place]], costs: Mapping[Place, float], capture: float, *, symmetric: bool
) -> dict[Key, int]:
    """The rank that captures each range: one that needs it, if no other rank has a capture less to do."""
    work = [sum(costs[place] for place in share) for share in shares]
    needing: dict[Key, set[int]] = {}
    for rank, share in enumerate(shares):
        for key in {key for place in share for key in keys_of(place, symmetric=symmetric)}:
            needing.setdefault(key, set()).add(rank)
    owners = {}
    for key in sorted(needing, key=lambda key: (len(needing[key]), key)):
        owners[key] = min(sorted(needing[key]), key=lambda rank: work[rank])
        work[owners[key]] += capture
    while True:
        most, least = (pick(range(len(work)), key=lambda rank: work[rank]) for pick in (max, min))
        owned = [key for key, rank in owners.items() if rank == most]
        if not owned or work[most] - work[least] <= capture:
            return owners
        moved = min(owned, key=lambda key: least not in needing[key])
        owners[moved], work[most], work[least] = least, work[most] - capture, work[least] + capture


def _along_curve(place: Place) -> int:
    """A tile's place along the Morton curve, which visits quadrant after quadrant."""
    i, j = place
    return sum(((i >> bit & 1) << (2 * bit + 1)) | ((j >> bit & 1) << (2 * bit)) for bit in range(32))


def _split(places: Sequence[Place], costs: Mapping[Place, float], ranks: int) -> list[list[Place]]:
    """Consecutive parts of equal cost."""
    total, passed = sum(costs[place] for place in places) or 1.0, 0.0
    parts: list[list[Place]] = [[] for _ in range(ranks)]
    for place in places:
        # A tile belongs where its middle falls: then no part is off by more than half a tile at either end.
        middle = passed + costs[place] / 2
        parts[min(ranks - 1, int(ranks * middle / total))].append(place)
        passed += costs[place]
    return parts
