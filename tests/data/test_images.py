"""Reading picture files of every kind, folders, shards, bad files."""

import io
import json
import logging
import pickle
import tarfile

import numpy as np
import pytest
import torch
from data.made import encode, png, put
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vgen.data.dataset import open_images
from vgen.data.images import Augment, BadFile, decode_image, shrink, view
from vgen.data.shards import read_index, write_shard
from vgen.data.sources import splits_of
from vgen.errors import VgenError


def gradient(width=24, height=16, seed=0):
    pixels = np.random.Generator(np.random.Philox(seed)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# decoding

MIDDLE = 128
ODD_FILES = {
    "grey": (encode(Image.new("L", (5, 4), MIDDLE)), (MIDDLE,) * 3),
    "16 bit": (encode(Image.fromarray(np.full((4, 5), MIDDLE * 257, np.uint16))), (MIDDLE,) * 3),
    "float tiff": (encode(Image.fromarray(np.full((4, 5), MIDDLE / 255, np.float32)), "TIFF"), (MIDDLE,) * 3),
    "1 bit": (encode(Image.new("1", (5, 4), 1)), (255,) * 3),
    "palette": (
        encode(Image.new("RGB", (5, 4), (0, 0, 255)).convert("P", palette=Image.Palette.ADAPTIVE)),
        (0, 0, 255),
    ),
    "transparent": (encode(Image.new("RGBA", (5, 4), (9, 9, 9, 0))), (255,) * 3),
    "half transparent": (encode(Image.new("RGBA", (5, 4), (0, 0, 0, 51))), (204,) * 3),
    "grey with alpha": (encode(Image.new("LA", (5, 4), (0, 0))), (255,) * 3),
    "transparent colour": (encode(Image.new("RGB", (5, 4), (1, 2, 3)), transparency=(1, 2, 3)), (255,) * 3),
    "transparent palette": (encode(Image.new("P", (5, 4), 0), transparency=0), (255,) * 3),
    "cmyk": (encode(Image.new("CMYK", (5, 4), (0, 0, 0, 0)), "TIFF"), (255,) * 3),
    "webp": (encode(Image.new("RGBA", (5, 4), (0, 255, 0, 255)), "WEBP", lossless=True), (0, 255, 0)),
    "animation": (
        encode(Image.new("RGB", (5, 4), (255, 0, 0)), "GIF", save_all=True, append_images=[Image.new("RGB", (5, 4))]),
        (255, 0, 0),
    ),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_every_kind_of_picture_becomes_rgb_on_white(name):
    contents, color = ODD_FILES[name]
    image = decode_image(contents)
    assert image.dtype == torch.uint8 and image.shape == (3, 4, 5)
    assert (image - torch.tensor(color, dtype=torch.uint8)[:, None, None]).eq(0).all()


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    assert decode_image(encode(Image.new("RGB", (6, 4)), "JPEG", exif=exif)).shape == (3, 6, 4)


@pytest.mark.parametrize("contents", [b"", b"text", png()[:40], encode(gradient(), "JPEG")[:300]])
def test_broken_pictures(contents):
    with pytest.raises(BadFile):
        decode_image(contents)


# image folders


def test_folder_classes_captions_and_pixels(tmp_path):
    put(
        tmp_path,
        {
            "cat/one.png": png((255, 0, 0), (20, 10)),
            "cat/one.txt": "a red cat\n",
            "dog/b/two.PNG": png((0, 255, 0), (5, 30)),
            "dog/b/two.json": json.dumps({"caption": " a green dog "}),
            "three.png": png(),
            ".hidden/four.png": png(),
            "notes.md": "no picture",
        },
    )
    data = open_images(tmp_path, size=16)
    assert data.keys == ["cat/one", "dog/b/two", "three"] and data.class_names == ("cat", "dog")
    assert data.labels == [0, 1, -1] and data.captions == ["a red cat", "a green dog", ""]
    item = data[0]
    assert item["image"].shape == (3, 16, 16) and item["image"].dtype == torch.float32
    assert item["image"].amax((1, 2)).tolist() == [1, -1, -1] and item["image"].amin((1, 2)).tolist() == [1, -1, -1]
    assert (item["caption"], item["label"], item["key"]) == ("a red cat", 0, "cat/one")
    assert len(list(data)) == 3 and data[-1]["key"] == "three"


@pytest.mark.parametrize(
    "files",
    [
        {"captions.csv": 'file,caption\na.png,first\nb,"second, with comma"\n'},
        {"captions.json": '{"a.png": "first", "b": "second, with comma"}'},
        {
            "captions.json": '[{"file": "a.png", "caption": "first"}, {"file": "b.png", "caption": "second, with comma"}]'
        },
    ],
)
def test_caption_tables(tmp_path, files):
    put(tmp_path, {"a.png": png(), "b.png": png(), "c.png": png(), "c.txt": "not asked", **files})
    assert open_images(tmp_path).captions == ["first", "second, with comma", ""]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"captions.csv": "name;words\n"}, "columns file and caption"),
        ({"captions.csv": "file,caption\nz.png,last\n"}, "names no picture"),
        ({"captions.csv": b"file,caption\na.png,caf\xe9\n"}, "UTF-8"),
        ({"captions.json": "{"}, "not JSON"),
        ({"captions.json": '["a.png"]'}, "must be"),
    ],
)
def test_bad_caption_tables(tmp_path, files, message):
    put(tmp_path, {"a.png": png(), **files})
    with pytest.raises(VgenError, match=message):
        open_images(tmp_path)


def test_split_folders_share_one_numbering(tmp_path):
    put(tmp_path, {"train/a/1.png": png(), "train/c/2.png": png(), "heldout/b/3.png": png(), "heldout/c/4.png": png()})
    heldout = open_images(tmp_path, "heldout")
    assert heldout.class_names == open_images(tmp_path).class_names == ("a", "b", "c")
    assert heldout.labels == [1, 2] and splits_of(tmp_path) == ("train", "heldout")
    with pytest.raises(VgenError, match=r"no split 'heldoot': found .*did you mean 'heldout'"):
        open_images(tmp_path, "heldoot")


def test_a_class_called_train_is_not_a_split(tmp_path):
    put(tmp_path, {"train/1.png": png(), "bus/2.png": png()})
    assert open_images(tmp_path).class_names == ("bus", "train") and splits_of(tmp_path) == ("train",)
    with pytest.raises(VgenError, match="all training data"):
        open_images(tmp_path, "heldout")


# bad files


@pytest.fixture
def partly_broken(tmp_path):
    files = {f"{number}.png": png((number, 0, 0)) for number in range(6)}
    return put(tmp_path, files | {"1.png": b"", "2.png": b"no picture", "5.png": png()[:30], "3.txt": b"\xff\xfe\xff"})


def test_bad_files_are_replaced_counted_and_reported_once(partly_broken, caplog):
    data = open_images(partly_broken)
    assert [item["key"] for item in data] == ["0", "4", "4", "4", "0"]
    assert data.bad_files == ["1", "2", "5"] and len(data) == 5  # 3, whose caption is no text, is not used at all
    assert [item["key"] for item in data.readable()] == ["0", "4"]
    assert data.captions == [""] * 5
    with caplog.at_level(logging.WARNING):
        data.report_bad_files()
        data.report_bad_files()
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 5 samples could not be read and were skipped: 1, 2, 5"
    ]


def test_nothing_readable_is_an_error(tmp_path):
    put(tmp_path, {"a.png": b"", "b.jpg": b"text"})
    with pytest.raises(VgenError, match="none of the 2 pictures can be read"):
        open_images(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [("missing", "does not exist"), ("empty", "holds no pictures"), ("file.txt", "neither"), ("bad.tar", "intact tar")],
)
def test_unusable_paths(tmp_path, path, message):
    put(tmp_path, {"file.txt": "x", "bad.tar": "this is no archive" * 100})
    (tmp_path / "empty").mkdir()
    with pytest.raises(VgenError, match=message):
        open_images(tmp_path / path)


# shards


def sample(number, **members):
    return f"{number:04d}", {"png": png((number, 0, 0)), **{name: value.encode() for name, value in members.items()}}


def test_shards_random_access_labels_captions(tmp_path):
    write_shard(tmp_path / "train-00000.tar", [sample(n, txt=f"caption {n}", cls=str(n % 3)) for n in range(5)])
    write_shard(
        tmp_path / "train-00001.tar",
        [sample(n, json=json.dumps({"caption": f"caption {n}", "label": n % 3})) for n in range(5, 8)],
    )
    write_shard(tmp_path / "heldout-00000.tar", [sample(9)])
    (tmp_path / ".train-00002-x.tar").write_bytes(b"left by a killed build")
    data = open_images(tmp_path, size=8)
    assert data.captions == [f"caption {n}" for n in range(8)] and data.labels == [n % 3 for n in range(8)]
    for number in (7, 0, 5, 3):
        item = data[number]
        assert item["key"] == f"{number:04d}" and round(float((item["image"][0, 0, 0] + 1) * 127.5)) == number
    assert splits_of(tmp_path) == ("train", "heldout") and len(open_images(tmp_path, "heldout")) == 1
    assert len(open_images(tmp_path / "train-00001.tar")) == 3
    assert len(open_images(str(tmp_path / "train-*.tar"))) == 8
    with pytest.raises(VgenError, match=r"has no split 'tset': found train, heldout"):
        open_images(tmp_path, "tset")


def test_shard_class_names(tmp_path):
    write_shard(tmp_path / "a.tar", [sample(0, cls="dog"), sample(1, cls="cat"), sample(2, json="{}")])
    data = open_images(tmp_path)
    assert data.class_names == ("cat", "dog") and data.labels == [1, 0, -1]
    (tmp_path / "manifest.json").write_text(json.dumps({"classes": ["dog", "cat"]}))
    assert open_images(tmp_path).labels == [0, 1, -1]


def test_shards_of_other_writers(tmp_path):
    """PAX headers, folders inside, members of a sample apart from each other, samples without a picture."""
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, contents in {
            "set/é" + "x" * 120 + ".png": png(),
            "set/b.json": b'{"text": "b"}',
            "set/é" + "x" * 120 + ".txt": b"long name",
            "set/b.left.txt": b"ignored",
            "set/b.jpg": encode(gradient(), "JPEG"),
            "set/c.txt": b"no picture",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
    data = open_images(tmp_path)
    assert dict(zip(data.keys, data.captions)) == {"set/é" + "x" * 120: "long name", "set/b": "b"}


def test_truncated_shard(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(path, [sample(n, txt="x") for n in range(3)])
    end = max(span.offset + span.size for item in read_index(path) for span in item.members.values())
    whole = path.read_bytes()
    for length in range(100, end, 131):  # in headers, in contents, between members
        path.write_bytes(whole[:length])
        with pytest.raises(VgenError, match="intact tar"):
            open_images(path)
    for length in range(512, end, 512):
        path.write_bytes(whole[:length])
        with pytest.raises(VgenError, match="intact tar"):
            open_images(path)


def test_shards_are_reproducible_and_indexed_exactly(tmp_path):
    samples = [sample(n, txt="x" * n) for n in range(9)]
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, samples)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    read = [
        (item.key, {name: span.read() for name, span in item.members.items()})
        for item in read_index(tmp_path / "a.tar")
    ]
    assert read == samples


def test_shards_can_be_read_by_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    write_shard(tmp_path / "a.tar", [sample(n, txt=f"caption {n}", cls=str(n)) for n in range(3)])
    found = list(
        webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False).decode("pil").to_tuple("png", "txt", "cls")
    )
    assert [row[1:] for row in found] == [(f"caption {n}", n) for n in range(3)] and found[1][0].size == (8, 8)


# views


def test_native_size_is_untouched_and_larger_is_centre_cropped(tmp_path):
    image = gradient(16, 16)
    put(tmp_path, {"a.png": encode(image), "b.png": encode(gradient(60, 30))})
    data = open_images(tmp_path, size=16)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(data[0]["image"], pixels)
    centre = Image.fromarray(np.array(gradient(60, 30))[:, 15:45]).resize((16, 16), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(centre)).permute(2, 0, 1) / 127.5 - 1
    assert (data[1]["image"] - expected).abs()[
        :, :, 2:-2
    ].max() < 0.03  # resize, then crop: the border columns see beyond the crop


@pytest.mark.parametrize("shape", [(1, 1), (1, 400), (400, 1), (2, 3)])
def test_extreme_shapes(tmp_path, shape):
    put(tmp_path, {"a.png": png((0, 0, 255), shape)})
    for augment in (False, True):
        image = open_images(tmp_path, size=32, augment=augment)[0]["image"]
        assert image.shape == (3, 32, 32) and image[2].min() == 1 and image[0].max() == -1


def test_augmentation_depends_on_seed_epoch_and_index_only(tmp_path):
    put(tmp_path, {f"{name}.png": encode(gradient(40, 30)) for name in "ab"})
    data = open_images(tmp_path, size=16, augment=True, seed=3)
    views = {(index, epoch): data[index, epoch]["image"] for index in range(2) for epoch in range(4)}
    torch.manual_seed(99)
    again = open_images(tmp_path, size=16, augment=True, seed=3, cache=True)
    for (index, epoch), image in reversed(views.items()):
        assert torch.equal(again[index, epoch]["image"], image)
        assert image.min() >= -1 and image.max() <= 1
    images = list(views.values())
    assert all(not torch.equal(images[i], images[j]) for i in range(8) for j in range(i))
    assert not torch.equal(open_images(tmp_path, size=16, augment=True, seed=4)[0]["image"], images[0])


def test_flip_and_crop_can_be_switched_off(tmp_path):
    put(tmp_path, {"a.png": encode(gradient(16, 16))})
    plain = open_images(tmp_path, size=16)[0]["image"]
    for flip in (0, 1):
        view = open_images(tmp_path, size=16, augment=Augment(flip=flip, min_scale=1))[0]["image"]
        assert torch.equal(view, plain.flip(-1) if flip else plain)
    with pytest.raises(VgenError, match="min_scale"):
        open_images(tmp_path, augment=Augment(min_scale=0))
    with pytest.raises(VgenError, match="at least 1 pixel"):
        open_images(tmp_path, size=0)


def test_cache_reads_files_once_and_changes_nothing(tmp_path):
    put(tmp_path, {"a.png": encode(gradient(90, 70)), "a.txt": "caption"})
    plain, cached = open_images(tmp_path, size=16), open_images(tmp_path, size=16, cache=True)
    first = plain[0]
    (tmp_path / "a.png").unlink()
    assert torch.equal(cached[0]["image"], first["image"]) and cached[0]["caption"] == "caption"


def test_datasets_can_be_pickled(tmp_path):
    put(tmp_path, {"a.png": png(), "b.png": png()})
    data = open_images(tmp_path)
    assert torch.equal(pickle.loads(pickle.dumps(data))[1]["image"], data[1]["image"])


# other shapes than squares


@pytest.mark.parametrize("size, box", [((8, 8), (0, 4, 16, 20)), ((4, 12), (4, 0, 12, 24)), ((12, 4), (0, 9, 16, 14))])
def test_the_largest_part_of_the_wanted_shape_around_the_centre(size, box):
    picture = decode_image(encode(gradient(24, 16)))
    top, left, bottom, right = box
    part = Image.fromarray(picture[:, top:bottom, left:right].permute(1, 2, 0).numpy())
    expected = F.resize(torch.from_numpy(np.asarray(part).copy()).permute(2, 0, 1), list(size), antialias=True,
                        interpolation=InterpolationMode.BICUBIC)  # fmt: skip
    found = view(picture, size, None, None)
    assert found.shape == (3, *size) and torch.allclose(found, expected.float() / 255 * 2 - 1, atol=1e-6)


@given(height=st.integers(1, 60), width=st.integers(1, 60), rows=st.integers(2, 40), columns=st.integers(2, 40))
def test_every_shape_is_cut_out_of_every_picture(height, width, rows, columns):
    picture = torch.randint(256, (3, height, width), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    for augment in (None, Augment(flip=0.5, min_scale=0.5)):
        small = shrink(picture, (rows, columns), augment)
        assert small.shape[1] <= height and small.shape[2] <= width
        assert view(small, (rows, columns), augment, generator).shape == (3, rows, columns)


@given(height=st.integers(1, 60), width=st.integers(1, 60), side=st.integers(2, 40))
def test_a_side_and_its_square_are_the_same(height, width, side):
    picture = torch.randint(256, (3, height, width), dtype=torch.uint8)
    for augment in (None, Augment()):
        assert torch.equal(shrink(picture, side, augment), shrink(picture, (side, side), augment))
        whole, both = (view(picture, size, augment, torch.Generator().manual_seed(1)) for size in (side, (side, side)))
        assert torch.equal(whole, both)
