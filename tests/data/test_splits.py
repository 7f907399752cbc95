"""Which split shards and folders belong to."""

import gzip
import os
import subprocess
import sys

import pytest
from data.made import PNG, put, sample
from hypothesis import given
from hypothesis import strategies as st

from vgen.data.shards import write_shard
from vgen.data.sources import open_data, splits_of
from vgen.data.splits import FOLDER, SHARDS, SPLITS, layout, split_word
from vgen.errors import VgenError


def shards(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_shard(root / name, [sample(name)])
    return root


def parts(path):
    return {split: [part.name for part in found] for split, found in layout(path).parts.items()}


# names


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("imagenet-train-000", "train"),
        ("imagenet1k_VAL_0012", "val"),
        ("train256", "train"),
        ("cc12m-validation-{}", "validation"),
        ("held-out-3", "heldout"),
        ("Training.0", "training"),
        ("00017", None),
        ("strain-0", None),
        ("trainval-0", None),
        ("latest-000", None),
        ("contest_1", None),
    ],
)
def test_shards_say_their_split_anywhere_in_the_name(name, split):
    assert split_word(name, whole=False) == split


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("Train", "train"),
        ("VAL", "val"),
        ("train2017", "train"),
        ("held_out", "heldout"),
        ("trains", None),
        ("my-train", None),
    ],
)
def test_folders_say_nothing_else(name, split):
    assert split_word(name, whole=True) == split


@given(st.sampled_from(SPLITS), st.integers(0, 99999), st.sampled_from(["", "imagenet-", "a_b."]), st.booleans())
def test_every_split_word_is_found_in_usual_shard_names(split, number, prefix, upper):
    name = f"{prefix}{split}-{number:05d}"
    assert split_word(name.upper() if upper else name, whole=False) == split


def test_a_name_with_two_splits_is_refused():
    with pytest.raises(VgenError, match="names test and train: rename it"):
        split_word("train-test-000", whole=False)


# shards


def test_shards_named_by_dataset_and_split(tmp_path):
    shards(tmp_path, "imagenet-train-000.tar", "imagenet-train-001.tar", "imagenet-val-000.tar")
    assert parts(tmp_path) == {
        "train": ["imagenet-train-000.tar", "imagenet-train-001.tar"],
        "val": ["imagenet-val-000.tar"],
    }
    assert (
        parts(f"{tmp_path}/*.tar")
        == parts(f"{tmp_path}/imagenet-{{train-000,train-001,val-000}}.tar")
        == parts(tmp_path)
    )


def test_a_pattern_or_file_of_one_split_is_that_split_and_says_what_it_leaves_out(tmp_path):
    shards(tmp_path, "a-train-0.tar", "a-val-0.tar", "a-val-1.tar")
    for path in (f"{tmp_path}/*val*.tar", f"{tmp_path}/a-val-{{0..1}}.tar"):
        assert parts(path) == {"val": ["a-val-0.tar", "a-val-1.tar"]}
        assert "1 more shards beside these are not read" in str(open_data(path).report)
    assert splits_of(tmp_path / "a-val-1.tar") == ("val",)
    with pytest.raises(VgenError, match="no split 'train': found val"):
        open_data(f"{tmp_path}/*val*.tar").source("train")


def test_ranges_of_shards_are_complete(tmp_path):
    shards(tmp_path, *(f"x-{number:03d}.tar" for number in range(9, 12)))
    assert parts(f"{tmp_path}/x-{{009..011}}.tar") == {"train": ["x-009.tar", "x-010.tar", "x-011.tar"]}
    with pytest.raises(VgenError, match=r"2 of 5 shards of .* do not exist, beginning with .*x-007\.tar"):
        layout(f"{tmp_path}/x-{{007..011}}.tar")
    with pytest.raises(VgenError, match="range of shards is written like"):
        layout(f"{tmp_path}/x-{{007..011.tar")


def test_shards_with_and_without_split_names_are_refused(tmp_path):
    shards(tmp_path, "train-0.tar", "00000.tar")
    with pytest.raises(VgenError, match=r"some shards name a split \(train-0.tar\) and others do not \(00000.tar\)"):
        layout(tmp_path)
    assert splits_of(f"{tmp_path}/0*.tar") == ("train",)


def test_shards_in_split_folders(tmp_path):
    shards(tmp_path, "Train/00000.tar", "Train/00001.tar", "val/00000.tar")
    found = layout(tmp_path)
    assert found.kind == SHARDS and parts(tmp_path) == {"train": ["00000.tar", "00001.tar"], "val": ["00000.tar"]}
    put(tmp_path, {"test/1.png": PNG})
    with pytest.raises(VgenError, match="test none"):
        layout(tmp_path)


def test_folders_beside_shards_are_reported(tmp_path):
    put(shards(tmp_path, "0.tar"), {"cat/1.png": PNG, "docs/readme.txt": "x"})
    assert "cat/ beside the shards: not read" in str(open_data(tmp_path).report)


# folders


def test_split_folders_with_strays(tmp_path):
    put(
        tmp_path,
        {
            "Train/a/1.png": PNG,
            "Test/a/2.png": PNG,
            "__MACOSX/Train/a/1.png": PNG,
            "extra/3.png": PNG,
            "loose.png": PNG,
        },
    )
    data = open_data(tmp_path)
    assert data.splits == splits_of(tmp_path) == ("train", "test") and data.report.kind == FOLDER
    assert data.source("TRAIN").keys == ["a/1"] and data.source("test").keys == ["a/2"]
    said = str(data.report)
    assert (
        "extra/ is no split" in said
        and "__MACOSX/ is not read" in said
        and "beside the split folders are not read: 1" in said
    )


def test_one_split_folder_beside_folders_without_pictures(tmp_path):
    put(tmp_path, {"train/a/1.png": PNG, "annotations/x.json": "{}"})
    assert splits_of(tmp_path) == ("train",) and open_data(tmp_path).source("train").keys == ["a/1"]
    assert open_data(tmp_path).source("train").class_names == ("a",)


def test_one_folder_named_train_among_classes(tmp_path):
    put(tmp_path, {"train/1.png": PNG, "bus/2.png": PNG, "car/3.png": PNG})
    source = open_data(tmp_path).source("train")
    assert source.class_names == ("bus", "car", "train") and source.labels == [0, 1, 2]


def test_a_folder_that_may_be_split_or_class_is_refused(tmp_path):
    put(tmp_path, {"train/cat/1.png": PNG, "unlabeled/2.png": PNG})
    with pytest.raises(VgenError, match="train/ may be a split or a class"):
        layout(tmp_path)


def test_two_folders_of_one_split_are_refused(tmp_path):
    put(tmp_path, {"train2014/1.png": PNG, "train2017/2.png": PNG})
    with pytest.raises(VgenError, match="train2014/ and train2017/ are both split train"):
        layout(tmp_path)


def test_splits_one_level_down_are_not_classes(tmp_path):
    put(tmp_path, {"images/train/1.png": PNG, "images/val/2.png": PNG})
    with pytest.raises(VgenError, match="split folders inside images/"):
        layout(tmp_path)


def test_no_split_is_ever_replaced_by_the_training_data(tmp_path):
    put(tmp_path, {"a/1.png": PNG})
    with pytest.raises(VgenError, match="no split 'val', it is all training data"):
        open_data(tmp_path).source("val")
    put(tmp_path, {"train/a/1.png": PNG, "val/a/1.png": PNG, "test/a/1.png": PNG})
    with pytest.raises(VgenError, match="no split 'heldout': found train, val, test"):
        open_data(tmp_path).source("heldout")


# links


def test_links_to_folders_are_followed_once(tmp_path):
    put(tmp_path, {"store/x/1.png": PNG, "store/x/2.png": PNG, "set/one/3.png": PNG})
    for target, link in {
        "store/x": "set/zero",
        "set": "set/loop",
        "store": "set/one/more",
        "nowhere": "set/one/gone.png",
        "set/me": "set/me",
    }.items():
        os.symlink(tmp_path / target, tmp_path / link)
    os.symlink(tmp_path / "set", tmp_path / "store/x/back")
    source = open_data(tmp_path / "set").source("train")
    assert source.keys == ["one/3", "one/more/x/1", "one/more/x/2", "zero/1", "zero/2"]
    assert source.class_names == ("one", "zero") and source.labels == [0, 0, 0, 1, 1]
    said = str(open_data(tmp_path / "set").report)
    assert "link that leads nowhere: 2" in said and "link to a folder that is read already: 3" in said


# manifests


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "JSON that cannot be read"),
        ({"classes": ["a", "a"]}, "list of different names"),
        ({"classes": "ab"}, "list of different names"),
        ({"complete": False, "kind": "emoji"}, "run `vgen data emoji` again"),
    ],
)
def test_bad_manifests(tmp_path, manifest, message):
    put(tmp_path, {"1.png": PNG, "manifest.json": manifest})
    with pytest.raises(VgenError, match=message):
        layout(tmp_path)


def test_another_programs_manifest_is_no_trouble(tmp_path):
    put(tmp_path, {"a/1.png": PNG, "manifest.json": ["a.png"]})
    assert open_data(tmp_path).source("train").class_names == ("a",)


def test_looking_at_names_needs_no_torch(tmp_path):
    put(tmp_path, {"train/1.png": PNG, "val/2.png": PNG})
    code = f"import sys; from vgen.data.sources import open_data; open_data({str(tmp_path)!r}); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_systems_leave_behind_is_no_class(tmp_path):
    put(
        tmp_path,
        {"cat/1.png": PNG, "__MACOSX/cat/1.png": PNG, "cat/@eaDir/1.png": PNG, "cat/._1.png": b"x", ".t/2.png": PNG},
    )
    data = open_data(tmp_path)
    assert data.source("train").keys == ["cat/1"] and data.source("train").class_names == ("cat",)
    assert "__MACOSX/ is not read" in str(data.report)


def test_two_splits_are_never_the_same_data(tmp_path):
    """By links: held-out figures would be those of training pictures."""
    put(tmp_path, {"folders/all/0.png": PNG, "folders/all/1.png": PNG})
    shards(tmp_path / "shards", "train-0.tar")
    for root, source, names in (("folders", "all", ("train", "val")), ("shards", "train-0.tar", ("val-0.tar",))):
        for name in names:
            (tmp_path / root / name).symlink_to(source)
        with pytest.raises(
            VgenError, match=r"train\S* and val\S* are the same data \(by a link\), so val would measure"
        ):
            layout(tmp_path / root)


def test_a_packed_shard_is_called_so(tmp_path):
    shards(tmp_path, "train-0.tar")
    (tmp_path / "packed.tar").write_bytes(gzip.compress((tmp_path / "train-0.tar").read_bytes()))
    with pytest.raises(VgenError, match=r"packed\.tar is compressed \(gzip\).*: unpack it"):
        open_data(tmp_path / "packed.tar")
