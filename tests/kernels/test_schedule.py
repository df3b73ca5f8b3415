"""The order and owners of tiles: every tile once, few captures, no process idle for longer than a tile."""

import itertools
import random

import pytest

from adaptive_tangents.kernels.schedule import FeatureCache, captures, dealt, in_turn, keys_of, ordered
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


# passing features on


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(8, None), (16, None), (9, 7)])
def test_each_range_is_captured_by_one_rank_and_no_rank_has_a_capture_more_to_do(
    rows: int, columns: int | None, ranks: int
) -> None:
    places, symmetric = grid(rows, columns), columns is None
    count = rows + (columns or 0)
    costs = tile_costs(places, 5, 5 * rows, 5 * (columns or rows), symmetric=symmetric)
    deal = dealt(places, costs, ranks, count, symmetric=symmetric, capture=4.0, passing=0.4)
    assert set(deal.owners) == {key for place in places for key in keys_of(place, symmetric=symmetric)}
    assert deal.captures(count, symmetric=symmetric) == count
    assert deal.copies == 1
    work = [
        sum(costs[place] for place in share) + 4.0 * len(deal.owned(rank)) for rank, share in enumerate(deal.shares)
    ]
    assert max(work) - min(work) <= 4.0 + 1e-9
    needs = [{key for place in share for key in keys_of(place, symmetric=symmetric)} for share in deal.shares]
    assert sum(key not in needs[rank] for key, rank in deal.owners.items()) <= count / 4
    apart = dealt(places, costs, ranks, count, symmetric=symmetric, capture=4.0)
    assert (apart.owners, apart.copies) == ({}, 0)
    assert apart.captures(count, symmetric=symmetric) > count


def test_features_are_passed_only_where_ranks_can_keep_their_own_beside_a_tile() -> None:
    places = grid(12)
    costs = dict.fromkeys(places, 1.0)
    for capacity, passes in ((5, False), (8, True), (12, True)):
        deal = dealt(places, costs, 2, capacity, symmetric=True, capture=5.0, passing=0.5)
        assert bool(deal.owners) == passes
        assert deal.copies == (0 if not passes else 1 if capacity == 12 else deal.copies)
    assert deal.captures(12, symmetric=True) == 12
    narrow = dealt(places, costs, 2, 8, symmetric=True, capture=5.0, passing=0.5)
    assert narrow.captures(8, symmetric=True) == 12
    assert narrow.copies > 1
    assert not dealt(places, costs, 1, 12, symmetric=True, capture=5.0, passing=0.5).owners


@pytest.mark.parametrize("capacity", [5, 7])
def test_what_is_kept_is_never_let_go_and_the_rest_is_within_capacity(capacity: int) -> None:
    kept = [(0, 2), (0, 4), (0, 7)]
    order = random.Random(0).sample(grid(9), 30)
    made: list[tuple[int, int]] = []
    held = FeatureCache(lambda key: made.append(key) or key, order, capacity, symmetric=True, kept=kept)
    for key in kept:
        held.one(key)
    for place in order:
        held.pair(place)
        assert len(held._held) <= capacity
        assert all(key in held for key in kept)
    assert all(made.count(key) == 1 for key in kept)


@pytest.mark.parametrize("skipped", [False, True])
def test_a_tile_that_another_rank_makes_is_no_use_of_its_features(skipped: bool) -> None:
    held = FeatureCache(lambda key: key, [(0, 1), (0, 4), (2, 4), (1, 5), (0, 6)], 3, symmetric=True)
    held.pair((0, 1))
    if skipped:
        held.skip((1, 5))
    held.pair((0, 4))
    held.pair((2, 4))
    assert ((0, 0) in held, (0, 1) in held) == (skipped, not skipped)


def test_tiles_that_are_not_ready_let_others_pass_and_come_when_waiting_is_given_up() -> None:
    order, ready = grid(4), {(0, 0), (1, 1), (2, 3)}
    then = {(2, 3): {(0, 1)}, (0, 2): {(3, 3), (0, 3)}, (0, 3): {(1, 2)}, (1, 2): set(order)}
    waits = iter([True, True, False])  # after (0, 1): nothing is ready, and (0, 2) comes when waiting is given up
    seen = []
    for place in in_turn(order, ready.__contains__, lambda: next(waits)):
        seen.append(place)
        ready |= then.get(place, set())
    assert seen == [(0, 0), (1, 1), (2, 3), (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 2), (3, 3)]
    assert next(waits, None) is None
    assert list(in_turn(order, lambda place: False, lambda: False)) == order
