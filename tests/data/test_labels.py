"""What written labels mean, and one numbering of the classes."""

import math

import pytest
from data.made import PNG, put, sample
from hypothesis import given
from hypothesis import strategies as st

from vgen.data.labels import MOST_CLASSES, BadLabel, of_folders, of_labels, of_manifest, read_label
from vgen.data.shards import write_shard
from vgen.data.sources import open_data


@pytest.mark.parametrize(
    ("written", "label"),
    [
        ("3", 3),
        (" 3\n", 3),
        ("3.0", 3),
        (3.0, 3),
        ("007", 7),
        (7, 7),
        ("None", None),
        ("", None),
        ("nan", None),
        (math.nan, None),
        (None, None),
        ("-1", None),
        (-1, None),
        ("tench, Tinca tinca", "tench, Tinca tinca"),
        ("none", "none"),
        ("n01440764", "n01440764"),
        ("3a", "3a"),
        ("日本", "日本"),
    ],
)
def test_labels_as_people_write_them(written, label):
    assert read_label(written) == label


@pytest.mark.parametrize("written", ["²", "--5", "-2", "3.5", "٣", "+", True, [3], {"id": 3}, math.inf])
def test_what_is_no_label_is_never_a_class(written):
    if written == math.inf:
        assert of_labels([[read_label(written), 0, 1]]).number("inf") == -1
        return
    with pytest.raises(BadLabel):
        read_label(written)


@given(st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.lists(st.integers())))
def test_every_value_is_a_label_none_or_refused(value):
    try:
        label = read_label(value)
    except BadLabel:
        return
    assert label is None or isinstance(label, str) or (isinstance(label, int) and label >= 0)


def test_folder_names_that_are_numbers_are_in_numeric_order():
    assert of_folders(map(str, range(12))).names == tuple(map(str, range(12)))
    assert of_folders(["10", "9", "a"]).names == ("10", "9", "a")
    assert of_folders([]).names == ()


def test_numbers_keep_their_value_and_name_the_classes():
    numbering = of_labels([[5, None], [2, "oops"]])
    assert numbering.names == ("0", "1", "2", "3", "4", "5")
    assert [numbering.number(label) for label in (5, 2, None, "oops", 7)] == [5, 2, -1, -1, -1]


def test_large_numbers_are_identifiers():
    numbering = of_labels([[MOST_CLASSES + 5, 17], [17]])
    assert numbering.names == ("17", str(MOST_CLASSES + 5)) and numbering.number(17) == 0


def test_a_number_among_names_is_no_class():
    numbering = of_labels([["dog", "cat", 0]])
    assert numbering.names == ("cat", "dog") and numbering.number(0) == -1


def test_a_manifest_wins():
    numbering = of_manifest(["dog", "cat"], numbered=True)
    assert [numbering.number(label) for label in (0, 1, "cat", 2, "eel", None)] == [0, 1, 1, -1, -1, -1]
    assert of_manifest(["0", "1"], numbered=False).number(0) == -1  # folders have names only


def test_shards_of_all_splits_share_one_numbering(tmp_path):
    write_shard(tmp_path / "train-0.tar", [sample(0, cls="cat"), sample(1, cls="eel")])
    write_shard(tmp_path / "val-0.tar", [sample(2, cls="eel"), sample(3, json={"label": "dog"})])
    data = open_data(tmp_path)
    assert data.source("train").class_names == data.source("val").class_names == ("cat", "dog", "eel")
    assert data.source("train").labels == [0, 2] and data.source("val").labels == [2, 1]
    assert "1 of its classes have no picture in train: dog" in str(data.report)
    put(tmp_path, {"manifest.json": {"classes": ["eel", "cat"]}})
    data = open_data(tmp_path)
    assert data.source("train").labels == [1, 0] and data.source("val").labels == [0, -1]
    assert "1 without a class: labels that are not among the classes of manifest.json, such as that of 3" in str(
        data.report
    )


def test_odd_labels_are_counted_and_the_first_decides_nothing(tmp_path):
    written = ["", "3.0", "²", "--5", "None", "1", "two", b"\xff\xff\xff", "0"]
    write_shard(tmp_path / "a.tar", [sample(number, cls=value) for number, value in enumerate(written)])
    data = open_data(tmp_path)
    source, (split,) = data.source("train"), data.report.splits
    assert source.labels == [-1, 3, -1, -1, -1, 1, -1, -1, 0] and source.class_names == ("0", "1", "2", "3")
    assert split.labelled == 3 and split.classes == 3 and sum(split.unlabelled.values()) == 4
    assert split.unlabelled["labels that are neither number nor name, such as that of 2"] == 2


def test_a_loose_picture_beside_classes_is_unlabelled(tmp_path):
    put(tmp_path, {"b/1.png": PNG, "a/2.png": PNG, "3.png": PNG})
    data = open_data(tmp_path)
    assert dict(zip(data.source("train").keys, data.source("train").labels)) == {"a/2": 0, "b/1": 1, "3": -1}
    assert "3 pictures found, 3 used; 2 labelled (2 classes)" in str(data.report)


def test_a_manifest_numbers_class_folders(tmp_path):
    put(
        tmp_path,
        {"train/a/1.png": PNG, "train/b/2.png": PNG, "val/b/3.png": PNG, "manifest.json": {"classes": ["b", "a"]}},
    )
    data = open_data(tmp_path)
    assert data.source("train").labels == [1, 0] and data.source("val").labels == [0]
    assert data.source("val").class_names == ("b", "a")
