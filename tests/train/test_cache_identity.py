"""A cache of tokens is what its pictures, captions, labels, tokenizer and settings are, by content; what is not ours stays."""

import json
import os
import shutil

import pytest
import torch
from PIL import Image

from vgen.cli.main import main
from vgen.data import caching
from vgen.data.caching import cache_tokens
from vgen.data.dataset import open_images
from vgen.data.token_splits import FILE, check_together
from vgen.data.tokens import TokenDataset, write_tokens
from vgen.errors import VgenError
from vgen.tokenizers_vis.vq import VQModel


@pytest.fixture
def cache(tmp_path, pictures, tokenizer, monkeypatch):
    """cache(**changes) -> (what it said, the pictures that were coded) of a run over `pictures` into `out`."""
    coded = []
    encode = caching._encode
    monkeypatch.setattr(
        caching, "_encode", lambda coder, data, *rest: (coded.extend(data.keys), encode(coder, data, *rest))[1]
    )

    def run(data=pictures, model=tmp_path / "tokenizer", out=tmp_path / "out", **changes):
        coded.clear()
        said = []
        cache_tokens(model, data, out, **{"size": 32, "say": said.append, **changes})
        return said[1:], list(coded)

    return run


def sets(out):
    return {split: TokenDataset(out / f"{split}.safetensors") for split in ("train", "heldout")}


def touch_all(folder):
    """Gives every file another time: no content has changed."""
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))


def test_nothing_changed_nothing_is_coded(tmp_path, pictures, cache):
    first, coded = cache()
    assert len(coded) == 18 and not any("kept" in line for line in first)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    touch_all(pictures)
    again, coded = cache()
    assert coded == [] and all("kept: same pictures, captions, tokenizer and settings" in line for line in again)
    shutil.move(pictures, tmp_path / "elsewhere")  # a path is no identity either
    assert cache(data=tmp_path / "elsewhere")[1] == []
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before


def test_another_picture_of_the_same_size_and_time(tmp_path, pictures, tokenizer, cache):
    path = pictures / "heldout" / "red" / "1.png"
    path.write_bytes(path.read_bytes().ljust(1000, b"\0"))  # readers stop at the end of the picture
    cache()
    stat = path.stat()
    image = Image.open(path).convert("RGB")
    image.putpixel((5, 5), (1, 2, 3))
    image.paste((0, 90, 0), (0, 0, 16, 16))
    image.save(path)
    path.write_bytes(path.read_bytes().ljust(1000, b"\0"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (1000, stat.st_mtime_ns)
    _, coded = cache()
    assert len(coded) == 6  # the held-out pictures; the training split is kept
    images = open_images(pictures, "heldout", 32)
    with torch.no_grad():
        expected = tokenizer.encode(torch.stack([images[i]["image"] for i in range(6)]))
    assert torch.equal(sets(tmp_path / "out")["heldout"].tokens[:, 0].long(), expected)


def test_other_captions_keep_the_tokens(tmp_path, pictures, cache):
    (pictures / "train" / "red" / "2.png").write_bytes(b"no picture")  # indices and rows differ behind it
    cache()
    before = sets(tmp_path / "out")
    (pictures / "train" / "red" / "4.txt").write_text("something else")
    said, coded = cache()
    assert coded == [] and "tokens kept" in said[0] and "captions, labels and class names written anew" in said[0]
    after = sets(tmp_path / "out")
    assert torch.equal(after["train"].tokens, before["train"].tokens) and len(after["train"]) == 11
    row = after["train"].keys.index("red/4")
    assert after["train"].captions[row] == "something else"
    assert after["train"].captions[:row] == before["train"].captions[:row]
    check_together(*after.values())
    assert all("kept: same pictures, captions" in line for line in cache()[0])


def test_other_classes_keep_the_tokens(tmp_path, pictures, cache):
    cache()
    for split in ("train", "heldout"):
        (pictures / split / "red").rename(pictures / split / "ruby")
    said, coded = cache()
    assert coded == [] and all("written anew" in line for line in said)
    assert all(data.class_names == ("blue", "ruby") for data in sets(tmp_path / "out").values())


def test_another_class_that_sorts_first_moves_labels(tmp_path, pictures, cache):
    cache()
    for split in ("train", "heldout"):
        (pictures / split / "red").rename(pictures / split / "amber")  # and the order of the pictures
    cache()
    cached = sets(tmp_path / "out")
    for split, data in cached.items():
        images = open_images(pictures, split, 32)
        assert data.class_names == ("amber", "blue") and (data.keys, data.labels) == (images.keys, images.labels)


@pytest.mark.parametrize(
    "changes",
    [{"size": 64}, {"flips": True}, {"variants": 1}, {"variants": 1, "min_scale": 0.5}, {"ten_crop": 1.25}],
    ids=str,
)
def test_other_settings_are_coded(cache, changes):
    cache(**({"variants": 1} if "min_scale" in changes else {}))
    _, coded = cache(**changes)
    assert len(coded) == (18 if "size" in changes else 12)  # the other settings are of training pictures alone
    assert cache(**changes)[1] == []


def test_another_tokenizer_is_coded(tmp_path, tokenizer, cache):
    cache()
    torch.manual_seed(1)
    VQModel(**{k: v for k, v in tokenizer.config.items() if k[0] != "_"}).save_pretrained(tmp_path / "tokenizer")
    assert len(cache()[1]) == 18
    config = json.loads((tmp_path / "tokenizer" / "config.json").read_text())
    (tmp_path / "tokenizer" / "config.json").write_text(json.dumps({**config, "_diffusers_version": "0.0.1"}))
    assert cache()[1] == []
    (tmp_path / "tokenizer" / "config.json").write_text(json.dumps({**config, "commit_loss_beta": 0.125}))
    assert len(cache()[1]) == 18


def test_what_codes_pictures_is_part_of_it(cache, monkeypatch):
    cache()
    monkeypatch.setattr(caching, "CODING", caching.CODING + 1)
    assert len(cache()[1]) == 18


@pytest.mark.parametrize("name", ["train.safetensors", "heldout.json"])
def test_damaged_files_are_made_again(tmp_path, cache, name):
    cache()
    path = tmp_path / "out" / name
    contents = bytearray(path.read_bytes())
    contents[-3] ^= 1
    path.write_bytes(contents)
    assert len(cache()[1]) == (12 if name.startswith("train") else 6)
    check_together(*sets(tmp_path / "out").values())


def other_data(tmp_path, *splits):
    """Another dataset: one class, two captioned pictures a split."""
    folder = tmp_path / "other"
    for split in splits:
        (folder / split / "green").mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (32, 32), (0, 90 * number, 0)).save(folder / split / "green" / f"{number}.png")
    return folder


def test_splits_of_another_dataset_do_not_stay(tmp_path, cache):
    cache()
    said, coded = cache(data=other_data(tmp_path, "train", "val"))
    out = tmp_path / "out"
    assert len(coded) == 4 and said[-1].startswith("heldout: ") and said[-1].endswith("its old tokens are removed")
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [
            ".vgen.lock",
            FILE,
            *(f"{split}{end}" for split in ("train", "val") for end in (".json", ".report.json", ".safetensors")),
        ]
    )


def test_undivided_data_holds_some_out(tmp_path, cache):
    data = other_data(tmp_path, "train")
    cache(data=data)
    assert len(sets(tmp_path / "out")["heldout"]) == 1 == len(sets(tmp_path / "out")["train"])


def test_an_interruption_between_splits_is_met_in_training(tmp_path, cache, monkeypatch):
    cache()
    pair = sets(tmp_path / "out")
    check_together(pair["train"], pair["heldout"])
    make = caching.Coding._make
    monkeypatch.setattr(
        caching.Coding, "_make", lambda self, files, *rest: 1 / (files.split == "train") and make(self, files, *rest)
    )
    with pytest.raises(ZeroDivisionError):
        cache(data=other_data(tmp_path, "train", "heldout"))
    pair = sets(tmp_path / "out")
    with pytest.raises(
        VgenError, match=r"do not belong together.*the first has 1 classes, the second 2.*class 0 is 'green'"
    ):
        check_together(pair["train"], pair["heldout"])


def test_the_same_classes_of_another_run_are_met_in_training(tmp_path, pictures, cache):
    cache()
    (pictures / "heldout" / "red" / "0.txt").write_text("another caption")
    cache(out=tmp_path / "other")
    for name in ("heldout.safetensors", "heldout.json"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "out" / name)
    with pytest.raises(
        VgenError,
        match=r"splits\.json notes the splits of the last finished run.*heldout\.safetensors is not of that run",
    ):
        check_together(*sets(tmp_path / "out").values())


@pytest.mark.parametrize("name", ["train.json", "heldout.safetensors", "heldout.report.json"])
def test_files_that_are_not_ours_are_in_the_way(tmp_path, cache, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"mine": 1}')
    with pytest.raises(VgenError, match=f"{name} is in the way and was not written by `vgen tokenize`"):
        cache()
    assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == '{"mine": 1}'


def test_foreign_files_beside_ours_stay(tmp_path, cache):
    out = tmp_path / "out"
    hidden = out / ".train-0123456789abcdef"
    hidden.mkdir(parents=True)
    (hidden / "notes.txt").write_text("mine")
    (out / "other.safetensors").write_text("mine")
    (out / ".train-notes").mkdir()
    cache()
    cache(size=64)
    assert (hidden / "notes.txt").read_text() == (out / "other.safetensors").read_text() == "mine"
    assert (out / ".train-notes").is_dir()


def test_a_kill_before_the_report_leaves_ours(tmp_path, cache, monkeypatch):
    def killed(*args, **more):
        write_tokens(*args, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(caching, "write_tokens", killed)
    with pytest.raises(KeyboardInterrupt):
        cache()
    monkeypatch.undo()
    cache_tokens(tmp_path / "tokenizer", tmp_path / "pictures", tmp_path / "out", size=32, say=str)
    check_together(*sets(tmp_path / "out").values())


def test_the_command_says_what_was_found(tmp_path, pictures, tokenizer, capsys):
    (pictures / "train" / "red" / "3.txt").unlink()
    arguments = [
        "--model",
        str(tmp_path / "tokenizer"),
        "--data",
        str(pictures),
        "--out",
        str(tmp_path / "out"),
        "--size",
        "32",
    ]
    assert main(["tokenize", *arguments, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "18 pictures in 2 splits, 2 classes" in lines[0]
    assert any("train: 12 pictures found, 12 used; 12 labelled (2 classes); 11 captions" in line for line in lines)
    assert main(["tokenize", *arguments, "--device", "cpu", "--held-out", "3"]) == 2
    assert "has a split heldout already" in capsys.readouterr().err
