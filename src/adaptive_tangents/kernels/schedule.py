"""In which order the tiles of a kernel are made, by which process, and which features are kept for the next tiles."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

Place = tuple[int, int]  # a tile: its row and column among the tiles
Key = tuple[int, int]  # features of a range of samples: 0 for x or 1 for x2, and the number of the range
_Features = TypeVar("_Features")


class FeatureCache(Generic[_Features]):
    """Features of ranges of samples, made when first needed; at most ``capacity`` are held at a time.

    The order of the tiles is known, so the features dropped first are those needed again last. No rule captures less often.
    """

    def __init__(
        self, make: Callable[[Key], _Features], order: Sequence[Place], capacity: int, *, symmetric: bool
    ) -> None:
        self.make, self.capacity, self.symmetric = make, capacity, symmetric
        self.captured = 0
        self._held: dict[Key, _Features] = {}
        self._places = {place: k for k, place in enumerate(order)}
        self._uses: dict[Key, list[int]] = {}
        for k, place in enumerate(order):
            for key in keys_of(place, symmetric=symmetric):
                self._uses.setdefault(key, []).append(k)

    def pair(self, place: Place) -> tuple[_Features, _Features]:
        """The features of a tile's rows and columns; the same ones twice on the diagonal."""
        keys = keys_of(place, symmetric=self.symmetric)
        for key in keys:
            if key not in self._held:
                self._make_room(self._places[place], keys)
                self._held[key] = self.make(key)
                self.captured += 1
        return self._held[keys[0]], self._held[keys[1]]

    def _make_room(self, now: int, needed: tuple[Key, Key]) -> None:
        while len(self._held) >= self.capacity:
            free = [key for key in self._held if key not in needed]
            if not free:
                return
            del self._held[max(free, key=lambda key: self._next(key, now))]

    def _next(self, key: Key, now: int) -> int:
        """When features are needed next, as the number of that tile in the order."""
        uses = self._uses[key]
        following = bisect_right(uses, now)
        return uses[following] if following < len(uses) else len(self._places)


def keys_of(place: Place, *, symmetric: bool) -> tuple[Key, Key]:
    """The keys of the features that a tile is made of: those of its rows and of its columns."""
    return (0, place[0]), (0 if symmetric else 1, place[1])


def captures(order: Sequence[Place], capacity: int, *, symmetric: bool) -> int:
    """The number of captures when tiles are made in this order."""
    held = FeatureCache(lambda key: key, order, capacity, symmetric=symmetric)
    for place in order:
        held.pair(place)
    return held.captured


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
    places: Sequence[Place], costs: Mapping[Place, float], ranks: int, capacity: int, *, symmetric: bool, capture: float
) -> list[list[Place]]:
    """The tiles of every rank: of equal cost up to one tile, and chosen so that few features are captured twice.

    Ranks get consecutive tiles, either row by row or along a curve that keeps neighbors together; of these two the one
    with the smaller cost for the busiest rank is taken. ``capture`` is the cost of one capture.
    """

    def busiest(shares: list[list[Place]]) -> float:
        return max(
            sum(costs[place] for place in share) + capture * captures(share, capacity, symmetric=symmetric)
            for share in shares
        )

    deals = []
    for along in (sorted(places), sorted(places, key=_along_curve)):
        parts = _split(along, costs, ranks)
        deals.append([ordered(part, capacity, symmetric=symmetric) for part in parts])
    return min(deals, key=busiest)


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
