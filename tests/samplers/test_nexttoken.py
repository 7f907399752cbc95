"""Feeds of next-token orders: what stands in for a token that is not there yet."""

from hypothesis import given
from hypothesis import strategies as st

from vgen.samplers.orders.nexttoken import Feeding
from vgen.samplers.types import grid_coordinates


def stand_in(grid, there, target):
    """The token that is fed at slot target - 1 when only `there` are decoded."""
    feeding = Feeding(grid, None)
    feeding.next([0])
    feeding.write(there)
    feeding.waiting = []  # fed already
    feed = feeding.next([target])
    assert feed.slot.tolist() == [target - 1]
    return feed.source.item()


def test_of_equally_near_tokens_the_later_one_stands_in():
    assert stand_in((1, 1, 5), [0, 4], 3) == 4  # both are two steps from 2
    assert stand_in((1, 1, 5), [0, 3], 2) == 0  # one step is nearer than two
    assert stand_in((1, 3, 3), [1, 3, 5, 7], 5) == 7  # all four neighbours of the centre
    assert stand_in((1, 3, 3), [1, 3, 5], 5) == 5
    assert stand_in((1, 3, 3), [2, 3], 2) == 2  # 1: right beside 2; 3 is two steps away though its number is as near
    assert stand_in((1, 3, 3), [4], 5) == 4  # it is there itself


@given(st.sets(st.integers(0, 11), min_size=1), st.integers(1, 11))
def test_the_nearest_in_the_grid_stands_in(there, target):
    cells = grid_coordinates((1, 3, 4)).tolist()

    def key(place):
        return sum(abs(a - b) for a, b in zip(cells[place], cells[target - 1])), -place

    assert stand_in((1, 3, 4), sorted(there), target) == min(there, key=key)
