"""Step sizes: exact counts, sums, published examples."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgen.errors import VgenError
from vgen.samplers import schedules

COUNTS = st.integers(1, 300).flatmap(lambda tokens: st.tuples(st.just(tokens), st.integers(1, tokens)))


@given(COUNTS, st.sampled_from(sorted(schedules.SCHEDULES)))
def test_step_sizes_are_positive_and_sum_to_the_tokens(counts, schedule):
    tokens, steps = counts
    sizes = schedules.step_sizes(tokens, steps, schedule)
    assert len(sizes) == steps
    assert sum(sizes) == tokens
    assert min(sizes) >= 1


@given(COUNTS)
def test_linear_sizes_are_near_equal(counts):
    sizes = schedules.linear_sizes(*counts)
    assert max(sizes) - min(sizes) <= 1


@given(COUNTS)
def test_lpd_sizes_for_any_count(counts):
    tokens, steps = counts
    sizes = schedules.lpd_sizes(tokens, steps)
    assert (len(sizes), sum(sizes)) == (steps, tokens)
    assert min(sizes) >= 1


@pytest.mark.parametrize(("tokens", "steps"), schedules.LPD_TABLES)
def test_lpd_tables_are_complete(tokens, steps):
    sizes = schedules.lpd_sizes(tokens, steps)
    assert (len(sizes), sum(sizes), sizes[0]) == (steps, tokens, 1)


def test_lpd_rule_equals_the_tables_that_follow_it(monkeypatch):
    tables = {key: schedules.lpd_sizes(*key) for key in [(256, 20), (1024, 48)]}
    monkeypatch.setattr(schedules, "LPD_TABLES", {})
    for key, sizes in tables.items():
        assert schedules.lpd_sizes(*key) == sizes


@given(COUNTS)
def test_arpg_and_randar_decode_every_token(counts):
    tokens, steps = counts
    for schedule in ("arccos", "cosine"):
        sizes = schedules.arpg_sizes(tokens, steps, schedule)
        assert (len(sizes), sum(sizes)) == (steps, tokens)
        assert min(sizes) >= 1
    sizes = schedules.randar_sizes(tokens, steps)
    assert (sizes[0], sum(sizes)) == (1, tokens)
    assert len(sizes) == (min(2, tokens) if steps == 1 else steps)


def test_randar_more_steps_than_tokens():
    assert schedules.randar_sizes(36, 100) == schedules.randar_sizes(36, -1) == [1] * 36


@given(COUNTS)
def test_masked_models_decode_something_in_every_step(counts):
    for unknown in (schedules.mar_unknown(*counts), schedules.maskgit_unknown(*counts)):
        assert (unknown[0], len(unknown)) == counts
        assert all(a > b >= 1 for a, b in itertools.pairwise(unknown))


def test_published_examples():
    assert schedules.arpg_sizes(256, 32)[-5:] == [10, 11, 14, 17, 40]
    assert schedules.mar_unknown(256, 8) == [256, 251, 236, 212, 181, 142, 97, 49]
    assert schedules.maskgit_unknown(32, 8) == [32, 29, 26, 24, 21, 18, 14, 10]
    assert schedules.maskgit_unknown(5, 8) == [5, 4, 3, 2, 1, 1, 1, 1]
    assert schedules.enat_unknown(256, 8)[:2] == [256, math.floor(256 * math.cos(math.pi / 16))]
    assert schedules.lumos_unknown(16, 3)[1] == 7  # fp32: a double-precision cosine gives 8
    assert schedules.linear_sizes(10, 4) == [2, 3, 2, 3]


def test_mar_guidance():
    linear = schedules.mar_guidance(256, 64, 3.0)
    assert linear == sorted(linear)
    assert linear[0] > 1
    assert linear[-1] == 1 + 2 * 255 / 256  # the released clamp keeps one token "unknown" after the last step
    assert schedules.mar_guidance(256, 4, 3.0, "constant") == [3.0] * 4


def test_power_cosine_starts_unguided():
    weights = schedules.power_cosine_weights(6.9, 1.5, 256)
    assert weights[0] == 1
    assert 1 < weights[1] < weights[-1] < 6.9


def test_lumos_temperature_is_never_reset():
    first, second = schedules.lumos_temperatures(8, 2)[:8], schedules.lumos_temperatures(8, 2)[8:]
    assert first[0] == 0.875
    assert first[-1] == 0
    assert second == [0] * 8


@given(st.integers(1, 400), st.floats(0.01, 1.0))
def test_lumos_history_slots(length, ratio):
    slots = schedules.lumos_history(length, ratio)
    assert len(slots) == max(1, round(ratio * length))
    assert slots.min() >= 0
    assert slots.max() < length
    assert (slots.diff() >= 0).all()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.data())
def test_scaled_sizes_sum_to_the_tokens(sizes, data):
    tokens = data.draw(st.integers(0, sum(sizes)))
    scaled = schedules.scaled_sizes(sizes, tokens)
    assert (len(scaled), sum(scaled)) == (len(sizes), tokens)
    assert all(0 <= small <= size for small, size in zip(scaled, sizes))
    assert schedules.scaled_sizes(sizes, sum(sizes)) == sizes


@pytest.mark.parametrize(
    "call",
    [
        lambda: schedules.step_sizes(4, 5),
        lambda: schedules.step_sizes(4, 0),
        lambda: schedules.step_sizes(4, 2, "cosin"),
        lambda: schedules.arpg_sizes(4, 2, "linear"),
        lambda: schedules.randar_sizes(4, 0),
        lambda: schedules.mar_unknown(4, 5),
        lambda: schedules.mar_guidance(4, 2, 2.0, "cosine"),
        lambda: schedules.maskgit_unknown(4, 0),
        lambda: schedules.lpd_sizes(4, 5),
    ],
)
def test_bad_counts_are_one_sentence(call):
    with pytest.raises(VgenError):
        call()


def test_unknown_schedule_names_the_nearest():
    with pytest.raises(VgenError, match="did you mean 'cosine'"):
        schedules.step_sizes(4, 2, "cosin")
