"""Members of shards as other programs write them."""

import io
import tarfile

import pytest
from data.made import PNG, png, put, sample

from vgen.data.dataset import open_images
from vgen.data.shards import write_shard
from vgen.data.sources import open_data
from vgen.errors import VgenError


def tar(path, members):
    """A tar of (name, contents), repeats and all."""
    with tarfile.open(path, "w") as archive:
        for name, contents in members:
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))


def test_a_member_given_twice_counts_as_extracted(tmp_path):
    tar(
        tmp_path / "a.tar",
        [("0.png", PNG), ("0.txt", b"old"), ("1.png", PNG), ("0.png", png((0, 0, 255))), ("0.txt", b"new")],
    )
    data = open_images(tmp_path, size=8)
    assert data.keys == ["0", "1"] and data.captions == ["new", ""] and data[0]["image"][2].min() == 1
    assert "members given twice in a shard: 2, of which the last counts" in str(open_data(tmp_path).report)


def test_a_broken_picture_beside_a_readable_one(tmp_path):
    write_shard(tmp_path / "a.tar", [sample(0, jpg=b"broken", png=png((0, 255, 0)), txt="x"), sample(1, jpg=b"broken")])
    data = open_images(tmp_path, size=8)
    assert data[0]["image"][1].min() == 1 and data[0]["caption"] == "x" and data.own_item(1) is None


def test_keys_end_at_the_first_dot(tmp_path):
    tar(
        tmp_path / "a.tar",
        [
            ("v1.0/a.left.png", PNG),
            ("v1.0/a.left.txt", b"dotted"),
            ("b.png", PNG),
            ("b.mask.png", PNG),
            ("b.txt", b"plain"),
            ("c.1.png", PNG),
            ("c.2.png", PNG),
            ("__MACOSX/b.png", b"x"),
            ("._b.png", b"x"),
        ],
    )
    data = open_data(tmp_path)
    assert {item.key: item.caption for item in data.source("train").samples} == {"v1.0/a": "dotted", "b": "plain"}
    assert data.report.splits[0].skipped == {
        "several pictures under one key, which ends at the first dot, such as c": 1
    }


def test_keys_that_every_shard_counts_anew_become_unique(tmp_path):
    for number in range(2):
        write_shard(tmp_path / f"train-{number}.tar", [sample(0, txt=f"{number}"), sample(f"only{number}")])
    source = open_data(tmp_path).source("train")
    assert source.keys == ["train-0/0", "only0", "train-1/0", "only1"]


def test_output_of_img2dataset(tmp_path):
    records = [
        {"caption": "a cat", "key": "000000000", "status": "success", "width": 8},
        {"caption": None, "key": "000000001", "status": "success"},
        {"caption": "\ud83d", "key": "000000002"},
    ]
    samples = [sample(record["key"], jpg=PNG, json=record) for record in records]
    samples[0][1]["txt"], samples[1][1]["txt"] = b"a cat", b""
    write_shard(tmp_path / "00000.tar", samples)
    put(tmp_path, {"00000_stats.json": {}, "00000.parquet": b"PAR1"})
    data = open_data(tmp_path)
    assert [item.caption for item in data.source("train").samples] == ["a cat", "", "\ufffd"]
    assert data.report.splits[0].captions_from == ".txt members, .json members"


def test_samples_that_are_not_used_are_counted_by_reason(tmp_path):
    write_shard(
        tmp_path / "a.tar",
        [
            sample(0),
            ("1", {"txt": b"no picture here"}),
            sample(2, json="{"),
            sample(3, json="{]"),
            sample(4, txt=b"caf\xe9"),
        ],
    )
    data = open_data(tmp_path)
    assert data.source("train").keys == ["0"]
    assert data.report.splits[0].skipped == {
        "no picture, such as 1": 1,
        "JSON that cannot be read, such as 2": 2,
        "text that is not UTF-8, such as 4": 1,
    }
    write_shard(tmp_path / "a.tar", [("1", {"txt": b"x"})])
    with pytest.raises(
        VgenError, match=r"holds no pictures: expected members like KEY.png .*1 skipped: no picture, such as 1"
    ):
        open_data(tmp_path)


def test_hard_links_are_the_files_they_name(tmp_path):
    """What GNU tar writes of two names of one file."""
    put(tmp_path / "in", {"0.png": png((0, 0, 255)), "0.txt": "zero"})
    (tmp_path / "in/1.png").hardlink_to(tmp_path / "in/0.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("0.png", "0.txt", "1.png"):
            archive.add(tmp_path / "in" / name, name)
        assert archive.getmember("1.png").islnk()
    data = open_images(tmp_path / "a.tar", size=8)
    assert data.keys == ["0", "1"] and data[1]["image"][2].min() == 1 and data.own_item(1)["key"] == "1"
