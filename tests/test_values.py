"""Numbers of Python, numpy and torch are read alike; everything else is one sentence."""

import decimal
import fractions

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vgen.errors import VgenError
from vgen.values import real, several, shown, string, whole


@given(st.integers(0, 2**31 - 1))
def test_whole_numbers_of_all_three_kinds(number):
    for value in (number, np.int64(number), np.uint32(number), np.array(number), torch.tensor(number)):
        read = whole(value, "it")
        assert type(read) is int and read == number


@pytest.mark.parametrize(
    "value",
    [None, True, np.bool_(True), torch.tensor(True), 3.0, np.float32(3), torch.tensor(3.0), "3", b"3", [3], -1, 11]
    + [np.array([1, 2]), torch.arange(2), float("nan"), 3 + 0j, {}, np.array("3")],
    ids=repr,
)
def test_what_is_no_whole_number(value):
    with pytest.raises(VgenError, match=r"^it must be a whole number from 0 to 10, got .+$"):
        whole(value, "it", 0, 10)


@given(st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False))
def test_real_numbers_of_all_kinds(number):
    for value in (number, np.float32(number), np.float64(number), torch.tensor(number), np.array(number)):
        read = real(value, "it")
        assert type(read) is float and read == number


@pytest.mark.parametrize(
    "value", [fractions.Fraction(1, 2), decimal.Decimal("0.5"), torch.tensor(0.5, dtype=torch.bfloat16)]
)
def test_other_numbers_are_numbers(value):
    assert real(value, "it") == 0.5


@pytest.mark.parametrize(
    "value",
    [
        None,
        False,
        np.bool_(False),
        torch.tensor(True),
        "3",
        b"3",
        float("nan"),
        float("inf"),
        np.float32("-inf"),
        10**400,
    ]
    + [[3.0], np.array([1.0, 2.0]), torch.ones(2), 1j, -0.5],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_real_number(value):
    with pytest.raises(VgenError, match=r"^it must be a finite number of at least 0, got .+$"):
        real(value, "it", 0)


@pytest.mark.parametrize(
    "value", [["a", "b"], ("a", "b"), (x for x in "ab"), np.array(["a", "b"]), {"a": 0, "b": 1}.keys()], ids=str
)
def test_lists_of_all_kinds(value):
    assert several(value, "it") == ["a", "b"]


@pytest.mark.parametrize(
    "value", [[], (), iter(()), "ab", b"ab", {"a": 1}, {"a"}, 3, None, np.zeros((2, 2)), torch.tensor(3)], ids=str
)
def test_what_is_no_list(value):
    with pytest.raises(VgenError, match=r"^it must"):
        several(value, "it")


def test_texts():
    assert type(string(np.str_("ghost"), "it")) is str
    for value in (3, None, b"ghost", ["ghost"]):
        with pytest.raises(VgenError, match=r"^it must be a text \(str\), got "):
            string(value, "it")
    with pytest.raises(VgenError, match=r"^it must be a text of whole characters \(UTF-8\), got 'gh\\udcffost'"):
        string(b"gh\xffost".decode(errors="surrogateescape"), "it")  # as Python takes an argument of the shell


def test_values_in_messages_are_short_and_typed():
    assert (
        shown("3") == "'3' (str)" and shown(None) == "None" and shown(np.zeros((2, 3))) == "a ndarray of shape [2, 3]"
    )
    assert len(shown("x" * 1000)) < 60


@pytest.mark.parametrize(
    "grid", [(8.5, 8), True, None, "8x8", (8, True), (), (1, 2, 3, 4), np.array([8.0, 8.0]), 0], ids=str
)
def test_sizes_of_a_grid_are_not_rounded(grid):
    from vgen.samplers.orders import make_order

    assert make_order("raster", np.array([4, 2])).grid == make_order("raster", torch.Size((4, 2))).grid == (1, 4, 2)
    with pytest.raises(VgenError, match="a grid"):
        make_order("raster", grid)
