"""In which order the tiles of a kernel are made, by whom, and which captured features are kept for the next ones."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from adaptive_tangents.features import TangentFeatures

Place = tuple[int, int]
Key = tuple[int, int]  # features of a tile's samples: 0 for x and 1 for x2, and which


class FeatureCache:
    """Features of the tiles' samples, made when first asked for; the least recently used go when there are too many."""

    def __init__(self, make: Callable[[Key], TangentFeatures], capacity: int) -> None:
        self.make, self.capacity = make, capacity
        self.captured = 0
        self._held: OrderedDict[Key, TangentFeatures] = OrderedDict()

    def get(self, key: Key) -> TangentFeatures:
        """The features of one range of samples."""
        if key not in self._held:
            while len(self._held) >= self.capacity:
                self._held.popitem(last=False)
            self._held[key] = self.make(key)
            self.captured += 1
        self._held.move_to_end(key)
        return self._held[key]


def keys_of(place: Place, *, symmetric: bool) -> tuple[Key, Key]:
    """The features that a tile is made of."""
    return (0, place[0]), (0 if symmetric else 1, place[1])


def captures(order: Sequence[Place], capacity: int, *, symmetric: bool) -> int:
    """How many times features are captured when tiles are made in this order."""
    held: OrderedDict[Key, None] = OrderedDict()
    count = 0
    for place in order:
        for key in keys_of(place, symmetric=symmetric):
            if key not in held:
                count += 1
                while len(held) >= capacity:
                    held.popitem(last=False)
            held[key] = None
            held.move_to_end(key)
    return count


def ordered(places: Sequence[Place], capacity: int, *, symmetric: bool) -> list[Place]:
    """Tiles in the order of fewest captures: as many rows as are held at a time, columns streamed past them.

    For N tiles a side of which ``capacity`` are held that is about N²/2·capacity captures, N where all are held.
    """
    options = [_streamed(places, capacity)]
    if not symmetric:
        options.append([(i, j) for j, i in _streamed([(j, i) for i, j in places], capacity)])
    return min(options, key=lambda order: captures(order, capacity, symmetric=symmetric))


def _streamed(places: Sequence[Place], capacity: int) -> list[Place]:
    """Ranges of rows; past each first the columns of the same numbers, then the others towards the next range."""
    wanted, height = set(places), max(1, capacity - 1)
    rows = sorted({i for i, _ in places})
    columns = sorted({j for _, j in places})
    order: list[Place] = []
    for turn, start in enumerate(range(0, len(rows), height)):
        here = rows[start : start + height]
        own = [j for j in columns if here[0] <= j <= here[-1]]
        rest = [j for j in columns if not here[0] <= j <= here[-1]]
        # Where rows and columns are the same samples the last column is the next row; else the next range begins with it.
        triangle = all(i <= j for i, j in places)
        rest = rest[::-1] if triangle or turn % 2 else rest
        order += [(i, j) for j in own + rest for i in here if (i, j) in wanted]
    return order


def dealt(
    places: Sequence[Place], costs: Mapping[Place, float], ranks: int, capacity: int, *, symmetric: bool, capture: float
) -> list[list[Place]]:
    """Tiles for every rank, of equal cost to within a tile, and dealt so that few features are captured twice.

    Either whole rows go to one rank after the other, or ranges along a curve that stays in one neighbourhood;
    ``capture`` is the cost of a capture. The deal with the smaller cost of the busiest rank is taken.
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
    """A tile's place along the curve that visits quadrant after quadrant."""
    i, j = place
    return sum(((i >> bit & 1) << (2 * bit + 1)) | ((j >> bit & 1) << (2 * bit)) for bit in range(32))


def _split(places: Sequence[Place], costs: Mapping[Place, float], ranks: int) -> list[list[Place]]:
    """Consecutive parts of equal cost."""
    total, passed = sum(costs[place] for place in places) or 1.0, 0.0
    parts: list[list[Place]] = [[] for _ in range(ranks)]
    for place in places:
        # By its middle, so that no part is off by more than half a tile at either end.
        middle = passed + costs[place] / 2
        parts[min(ranks - 1, int(ranks * middle / total))].append(place)
        passed += costs[place]
    return parts
