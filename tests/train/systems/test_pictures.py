"""The pictures that tokenizers train on: splits, a held-out part, and what is said about them."""

import pytest
from PIL import Image

from vgen.errors import VgenError
from vgen.train.systems.pictures import DataConfig, check_data, open_pictures, picture_digests


@pytest.fixture
def undivided(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "all" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "all" / name / f"{number}.png")
    (tmp_path / "all/cat/0.txt").write_bytes(b"caf\xe9")
    return tmp_path / "all"


@pytest.mark.parametrize(("held_out", "count"), [(None, 2), ("6", 6), ("50%", None)])
def test_an_undivided_folder_trains_and_says_what_it_holds_out(undivided, capsys, held_out, count):
    data = DataConfig(path=str(undivided), size=8, held_out=held_out)
    check_data(data, "runs/x")
    train, plain = open_pictures(data, seed=0)
    assert len(train) + len(plain) == 19 and not set(train.keys) & set(plain.keys)
    assert len(plain) == count if count else 4 < len(plain) < 15
    assert (
        train.augment is not None and plain.augment is None and train.class_names == plain.class_names == ("cat", "dog")
    )
    said = capsys.readouterr().err
    assert f"no split heldout in the data: {held_out or '5%'} of the pictures are held out" in said
    assert "1 skipped: text that is not UTF-8, such as cat/0.png" in said and f"heldout: {len(plain)} picture" in said


def test_splits_that_do_not_exist_are_refused_before_anything_is_read(undivided, tmp_path):
    (tmp_path / "divided").mkdir()
    for name in ("train", "val"):
        (undivided / {"train": "cat", "val": "dog"}[name]).rename(tmp_path / "divided" / name)
    path = str(tmp_path / "divided")
    with pytest.raises(VgenError, match=r"config: data\.held_out_split: .* has no split 'heldout': found train, val"):
        check_data(DataConfig(path=path, held_out_split="heldout"), "runs/x")
    with pytest.raises(
        VgenError, match=r"config: data\.train_split: .* has no split 'trian': found train, val \(did you"
    ):
        check_data(DataConfig(path=path, train_split="trian"), "runs/x")
    check_data(DataConfig(path=path, held_out_split="Val"), "runs/x")
    check_data(DataConfig(path=path, held_out="3"), "runs/x")
    with pytest.raises(VgenError, match="a share such as 5%"):
        check_data(DataConfig(path=path, held_out="some"), "runs/x")
    with pytest.raises(VgenError, match="does not exist"):
        check_data(DataConfig(path=f"{path}/nowhere"), "runs/x")


def test_patterns_and_ranges_of_shards_train(tmp_path):
    from vgen.data.shards import write_shard

    for split in ("train", "val"):
        image = tmp_path / "x.png"
        Image.new("RGB", (8, 8)).save(image)
        write_shard(tmp_path / f"set-{split}-0.tar", [(f"{n}", {"png": image.read_bytes()}) for n in range(4)])
    data = DataConfig(path=f"{tmp_path}/set-{{train,val}}-0.tar", size=8)
    check_data(data, "runs/x")
    assert [len(part) for part in open_pictures(data, seed=0)] == [4, 4]


@pytest.mark.parametrize(
    "splits, asked, measured",
    [
        (["train", "val"], {}, "val"),
        (["test", "train", "validation"], {}, "validation"),
        (["heldout", "train", "val"], {}, "heldout"),
        (["train", "val"], {"held_out": "1"}, "heldout"),
        (["train"], {}, "heldout"),
        (["train", "val", "test"], {"held_out_split": "test"}, "test"),
    ],
)
def test_what_is_measured_where_nobody_says_it(tmp_path, capsys, splits, asked, measured):
    for number, split in enumerate(splits):
        for index in range(20 if split == "train" else 2 + number):
            (tmp_path / split).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / f"{split}{index}.png")
    data = DataConfig(path=str(tmp_path), size=8, **asked)
    check_data(data, "runs/x")
    train, held_out = open_pictures(data, seed=0)
    made = measured not in splits
    assert all(key.startswith("train" if made else measured) for key in held_out.keys), held_out.keys
    assert not set(train.keys) & set(held_out.keys)
    assert f"measured: {measured}" in capsys.readouterr().err
    assert set(picture_digests(data, train, held_out)) == {f"{tmp_path} (train)", f"{tmp_path} ({measured})"}


def test_a_run_folder_is_not_among_its_pictures(pictures):
    data = DataConfig(path=str(pictures))
    check_data(data, str(pictures / "runs"))  # beside the split folders: read by none of them
    for out in (pictures / "train", pictures / "train" / "red", pictures / "heldout" / "runs" / "new"):
        with pytest.raises(VgenError, match=r"lies in \S+(train|heldout), whose pictures are read: the previews"):
            check_data(data, str(out))
    (pictures.parent / "link").symlink_to(pictures / "train")
    with pytest.raises(VgenError, match="lies in"):
        check_data(DataConfig(path=str(pictures / "train")), str(pictures.parent / "link" / "runs"))
