"""A held-out split for data that has none."""

import pytest
from data.made import PNG, put, sample
from hypothesis import given
from hypothesis import strategies as st

from vgen.data.dataset import open_images
from vgen.data.heldout import AUTO, choose
from vgen.data.shards import write_shard
from vgen.data.sources import open_data, splits_of
from vgen.errors import VgenError

KEYS = st.lists(st.integers().map(str), min_size=2, max_size=40, unique=True)


@given(KEYS, st.sampled_from(["5%", "50%", "0.1%", "99.9%"]), st.randoms())
def test_a_share_depends_on_keys_alone(keys, share, random):
    chosen = {keys[index] for index in choose(keys, share)}
    shuffled = random.sample(keys, len(keys))
    assert chosen == {shuffled[index] for index in choose(shuffled, share)}
    assert 0 < len(chosen) < len(keys)


@given(KEYS, st.integers().map(str))
def test_more_pictures_move_none_out_of_a_share(keys, more):
    before = {keys[index] for index in choose(keys, "40%")}
    grown = [*keys, more] if more not in keys else keys
    after = {grown[index] for index in choose(grown, "40%")}
    # One is held out even where the share holds out none: that one alone may change.
    assert len(before ^ (after - {more})) <= 1


def test_shares_and_counts_are_what_they_say():
    keys = [f"cat/{number}" for number in range(4000)]
    assert len(choose(keys, "5%")) == pytest.approx(200, abs=45)
    assert len(choose(keys, 17)) == len(choose(keys, "17")) == 17
    assert choose(keys, 10) < choose(keys, 17)


@pytest.mark.parametrize("held_out", ["0", "0%", "100%", "-5%", "5 per cent", "half", "1.5", "", "nan%"])
def test_impossible_amounts(held_out, tmp_path):
    put(tmp_path, {"1.png": PNG, "2.png": PNG})
    with pytest.raises(VgenError, match="a share such as 5%"):
        splits_of(tmp_path, held_out)


def test_too_few_pictures(tmp_path):
    put(tmp_path, {"1.png": PNG})
    with pytest.raises(VgenError, match="leaves none to train on: expected at least 2 pictures"):
        open_data(tmp_path, AUTO)
    with pytest.raises(VgenError, match=r"holding out 5 of 3 pictures .* at least 6"):
        choose(["a", "b", "c"], 5)


def test_folders_and_shards_are_divided_without_overlap(tmp_path):
    put(tmp_path / "folder", {f"{'ab'[n % 2]}/{n}.png": PNG for n in range(40)})
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards/000.tar", [sample(f"{'ab'[n % 2]}/{n}", cls="ab"[n % 2]) for n in range(40)])
    chosen = []
    for kind in ("folder", "shards"):
        assert splits_of(tmp_path / kind) == ("train",) and splits_of(tmp_path / kind, "20%") == ("train", "heldout")
        data = open_data(tmp_path / kind, "20%")
        train, heldout = (open_images(data, split, 8) for split in data.splits)
        assert not set(train.keys) & set(heldout.keys) and len(train) + len(heldout) == 40
        assert train.class_names == heldout.class_names == ("a", "b")
        assert all(item["label"] == "ab".index(item["key"][0]) for item in heldout)
        assert "20% of the pictures are held out, chosen by their keys" in str(data.report)
        assert [split.found for split in data.report.splits] == [len(train), len(heldout)]
        chosen.append(sorted(heldout.keys))
    assert chosen[0] == chosen[1]  # the same keys, whatever holds them


def test_splits_of_the_data_stay_what_they_are(tmp_path):
    put(tmp_path, {f"{split}/{n}.png": PNG for split in ("train", "val") for n in range(9)})
    assert splits_of(tmp_path, AUTO) == ("train", "val")
    data = open_data(tmp_path, 4)
    assert data.splits == ("train", "heldout", "val") and len(data.source("heldout").keys) == 4
    assert len(data.source("val").keys) == 9 and len(data.source("train").keys) == 5
    put(tmp_path, {"heldout/1.png": PNG})
    with pytest.raises(VgenError, match="has a split heldout already, so that held_out=4"):
        open_data(tmp_path, 4)
    assert splits_of(tmp_path, AUTO) == ("train", "heldout", "val")


def test_a_test_set_alone_is_not_divided(tmp_path):
    put(tmp_path, {"val/1.png": PNG, "test/2.png": PNG})
    assert splits_of(tmp_path, AUTO) == ("val", "test")
    with pytest.raises(VgenError, match="no split 'train': found val, test"):
        splits_of(tmp_path, "5%")
