"""The order and owners of tiles: every tile once, few captures, no process idle for longer than a tile."""

import itertools
import random

import pytest

from adaptive_tangents.kernels.schedule import FeatureCache, captures, dealt, keys_of, ordered
from adaptive_tangents.storage.planning import tile_costs


def grid(rows: int, columns: int | None = None) -> list[tuple[int, int]]:
    if columns is None:
        return [(i, j) for i in range(rows) for j in range(i, rows)]
    return list(itertools.product(range(rows), range(columns)))


@pytest.mark.parametrize("capacity", [2, 3, 5, 9, 50])
@pytest.mark.parametrize(("rows", "columns"), [(1, None), (9, None), (8, None), (5, 12), (12, 5), (1, 7)])
def test_every_tile_comes_once_whatever_is_held(rows: int, columns: int | None, capacity: int) -> None:
    places = grid(rows, columns)
    order = ordered(places, capacity, symmetric=columns is None)
    assert sorted(order) == sorted(places)
    some = random.Random(0).sample(places, len(places) // 2)
    assert sorted(ordered(some, capacity, symmetric=columns is None)) == sorted(some)


@pytest.mark.parametrize("n", [1, 7, 20])
def test_where_all_features_are_held_each_is_captured_once(n: int) -> None:
    assert captures(ordered(grid(n), n, symmetric=True), n, symmetric=True) == n
    assert captures(ordered(grid(n, 4), n + 4, symmetric=False), n + 4, symmetric=False) == n + 4


@pytest.mark.parametrize("held", [2, 3, 5, 8, 13])
def test_captures_are_those_of_ranges_of_rows_past_which_columns_stream(held: int) -> None:
    n, height = 24, held - 1
    starts = range(0, n, height)
    # Every range captures its rows and all later columns, except for the tile shared with the previous range.
    expected = sum(n - start for start in starts) - (len(starts) - 1)
    assert captures(ordered(grid(n), held, symmetric=True), held, symmetric=True) <= expected
    if held > 2:
        assert expected < captures(sorted(grid(n)), held, symmetric=True)


def test_columns_are_held_instead_where_there_are_fewer_of_them() -> None:
    for rows, columns in ((30, 6), (6, 30)):
        order = ordered(grid(rows, columns), 7, symmetric=False)
        assert captures(order, 7, symmetric=False) == 36


def test_features_are_held_within_capacity_and_captured_as_often_as_is_counted() -> None:
    for capacity, symmetric in itertools.product((2, 3, 6), (True, False)):
        order = ordered(grid(10, None if symmetric else 7), capacity, symmetric=symmetric)
        made: list[tuple[int, int]] = []
        held = FeatureCache(lambda key, made=made: made.append(key) or key, order, capacity, symmetric=symmetric)
        for place in order:
            assert held.pair(place) == keys_of(place, symmetric=symmetric)
            assert len(held._held) <= capacity
        assert held.captured == len(made) == captures(order, capacity, symmetric=symmetric)


def test_no_other_choice_of_what_to_let_go_captures_less() -> None:
    def least(order: list[tuple[int, int]], held: frozenset[tuple[int, int]], capacity: int) -> int:
        if not order:
            return 0
        keys = frozenset(keys_of(order[0], symmetric=True))
        new = keys - held
        spare = sorted(held - keys)
        over = len(held | keys) - capacity
        options = itertools.combinations(spare, over) if over > 0 else [()]
        return len(new) + min(least(order[1:], (held | keys) - set(gone), capacity) for gone in options)

    for seed in range(5):
        order = random.Random(seed).sample(grid(5), 9)
        for capacity in (2, 3):
            assert captures(order, capacity, symmetric=True) == least(order, frozenset(), capacity)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 16])
@pytest.mark.parametrize(("n", "m"), [(100, None), (95, None), (100, 37)])
def test_every_tile_is_dealt_once_and_no_rank_has_a_tile_more_of_work_than_its_share(
    n: int, m: int | None, ranks: int
) -> None:
    tile, symmetric = 7, m is None
    places = grid(-(-n // tile), None if m is None else -(-m // tile))
    costs = tile_costs(places, tile, n, m or n, symmetric=symmetric)
    shares = dealt(places, costs, ranks, 4, symmetric=symmetric, capture=0.3).shares
    assert sorted(itertools.chain(*shares)) == sorted(places)
    work = [sum(costs[place] for place in share) for share in shares]
    assert max(abs(one - sum(costs.values()) / ranks) for one in work) <= 1.0


def test_ranks_share_few_features() -> None:
    n = 32
    places = grid(n)
    costs = dict.fromkeys(places, 1.0)
    for ranks in (2, 8, 32):
        shares = dealt(places, costs, ranks, n, symmetric=True, capture=1.0).shares
        busiest = max(captures(share, n, symmetric=True) for share in shares)
        at_random = random.Random(0).sample(places, len(places))
        dispersed = max(captures(at_random[k::ranks], n, symmetric=True) for k in range(ranks))
        # A square of that many tiles has equally many rows and columns.
        assert busiest <= min(n, 3.2 * (len(places) / ranks) ** 0.5)
        assert busiest <= dispersed


def test_work_is_less_at_the_edges_and_on_the_diagonal() -> None:
    costs = tile_costs(grid(3), 4, 10, 10, symmetric=True)
    assert costs == {(0, 0): 0.6, (0, 1): 1.0, (0, 2): 0.5, (1, 1): 0.6, (1, 2): 0.5, (2, 2): 0.15}
    assert tile_costs([(2, 2)], 4, 10, 10, symmetric=False) == {(2, 2): 0.25}
