"""Image folders as people lay them out."""

import math
import os

import pytest
from data.made import PNG, encode, put
from PIL import Image

from vgen.data.dataset import open_images
from vgen.data.sources import open_data
from vgen.errors import VgenError


def test_imagenet(tmp_path):
    put(
        tmp_path,
        {f"{split}/n0{c}/n0{c}_{i}.JPEG": PNG for split in ("train", "val") for c in range(3) for i in range(2)},
    )
    data = open_data(tmp_path)
    for split in ("train", "val"):
        source = data.source(split)
        assert source.class_names == ("n00", "n01", "n02") and source.labels == [0, 0, 1, 1, 2, 2]
    assert str(data.report).splitlines()[:2] == [
        f"{tmp_path}: image folder, 12 pictures in 2 splits, 3 classes (from the folders)",
        "  train: 6 pictures found, 6 used; 6 labelled (3 classes); no captions",
    ]


def test_files_of_img2dataset(tmp_path):
    for part in ("00000", "00001"):
        put(tmp_path, {f"{part}_stats.json": {}, f"{part}.parquet": b"PAR1"})
        for number in range(2):
            key = f"{part}/{part}{number:04d}"
            put(tmp_path, {f"{key}.jpg": PNG, f"{key}.txt": f"caption {number}", f"{key}.json": {"caption": None}})
    data = open_data(tmp_path)
    source = data.source("train")
    assert source.class_names == () and set(source.labels) == {-1} and len(source.keys) == 4
    assert [sample.caption for sample in source.samples] == ["caption 0", "caption 1"] * 2
    assert "2 folders of img2dataset, such as 00000/, are no classes" in str(data.report)


@pytest.mark.parametrize("suffix", ["jfif", "avif", "JPE", "apng", "ppm"])
def test_less_common_suffixes(tmp_path, suffix):
    kind = {"jfif": "JPEG", "JPE": "JPEG", "apng": "PNG"}.get(suffix, suffix.upper())
    put(tmp_path, {f"a.{suffix}": encode(Image.new("RGB", (8, 8), "red"), kind), "b.heic": b"x"})
    data = open_images(tmp_path, size=8)
    assert data.keys == ["a"] and data[0]["image"][0].min() > 0.9
    assert "1 .heic not read: convert them" in str(open_data(tmp_path).report)


def test_pictures_with_one_stem_are_two_samples(tmp_path):
    put(tmp_path, {"a.jpg": b"broken", "a.png": PNG, "a.b.png": PNG, "a.txt": "both", "a.b.txt": "dotted"})
    data = open_images(tmp_path, size=8)
    assert dict(zip(data.keys, data.captions)) == {"a.b": "dotted", "a.jpg": "both", "a.png": "both"}
    assert [item["key"] for item in data.readable()] == ["a.b", "a.png"] and data.own_item(1) is None
    assert data.bad_files == ["a.jpg"]


def test_sidecars(tmp_path):
    put(tmp_path, {f"{name}.png": PNG for name in "abcdef"})
    put(
        tmp_path,
        {
            "a.txt": "text first",
            "a.json": {"caption": "not this", "aesthetic_score": "5.5"},
            "b.txt": " ",
            "b.json": {"caption": ["of the", "record"], "aesthetic_score": "good"},
            "c.txt": b"caf\xe9",
            "d.json": "[1]",
            "e.json": "{",
        },
    )
    data = open_data(tmp_path)
    samples = {sample.key: sample for sample in data.source("train").samples}
    assert {key: sample.caption for key, sample in samples.items()} == {"a": "text first", "b": "of the", "f": ""}
    assert samples["a"].aesthetic == 5.5 and math.isnan(samples["b"].aesthetic)
    (split,) = data.report.splits
    assert (
        split.found == 6
        and split.used == 3
        and split.captioned == 2
        and split.captions_from == ".txt files, .json files"
    )
    assert split.skipped == {
        "text that is not UTF-8, such as c.png": 1,
        "JSON that is no object, such as d.png": 1,
        "JSON that cannot be read, such as e.png": 1,
    }


def test_names_that_are_no_text(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(PNG)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    data = open_images(tmp_path, size=8)
    assert data.keys == ["caf\ufffd"] and data[0]["key"].encode()


def test_nothing_usable_says_why(tmp_path):
    put(tmp_path, {"train/1.png": PNG, "val/2.png": PNG, "val/2.txt": b"\xff\xff\xff"})
    with pytest.raises(
        VgenError, match=r"split val of .* holds no pictures.*1 skipped: text that is not UTF-8, such as 2\.png"
    ):
        open_data(tmp_path)


def test_captions_of_taggers(tmp_path):
    put(tmp_path, {f"{n}.png": PNG for n in range(3)} | {"0.caption": "0.caption", "1.txt": "1.txt", "1.caption": "no"})
    data = open_data(tmp_path)
    assert [sample.caption for sample in data.source("train").samples] == ["0.caption", "1.txt", ""]
    assert "captions from .caption files, .txt files" in str(data.report)
