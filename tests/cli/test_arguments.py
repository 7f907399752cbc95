"""The types and checks of arguments."""

import argparse
from pathlib import Path

import pytest
from PIL import Image

from vgen.cli import arguments
from vgen.cli.main import main
from vgen.errors import VgenError
from vgen.layers.picture_files import save_picture


@pytest.mark.parametrize(
    "read, good, bad",
    [
        (arguments.whole(0), {"0": 0, "12": 12}, ["-1", "1.5", "many", "", "1e3"]),
        (arguments.whole(1), {"1": 1}, ["0", "-3"]),
        (arguments.whole(0, 2**32 - 1), {"4294967295": 2**32 - 1}, ["4294967296", "-1"]),
        (arguments.number(), {"-1.5": -1.5, "3": 3.0}, ["nan", "inf", "-inf", "x"]),
        (arguments.number(0), {"0": 0.0}, ["-0.1", "nan"]),
        (arguments.number(0, 1, above=True), {"1": 1.0, "0.2": 0.2}, ["0", "1.01"]),
        (arguments.device, dict.fromkeys(("cpu", "cuda", "mps", "xpu"), None), ["gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", ""]),
    ],
)  # fmt: skip
def test_types(read, good, bad):
    for text, value in good.items():
        assert read(text) == (text if value is None else value)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="expected"):
            read(text)


def test_a_device_with_a_number_and_a_word_for_gpus():
    assert arguments.device("cuda:7") == "cuda:7"
    with pytest.raises(argparse.ArgumentTypeError, match="called cuda"):
        arguments.device("gpu")


@pytest.mark.parametrize(
    "words",
    [
        ("sample", "--batch-size", "0"),
        ("sample", "--num-images", "0"),
        ("sample", "--seed", "4294967296"),
        ("sample", "--top-p", "1.5"),
        ("sample", "--temperature", "nan"),
        ("reconstruct", "--model", "emoji-vq", "--input", ".", "--count", "-1"),
        ("reconstruct", "--model", "emoji-vq", "--input", ".", "--shown", "0"),
        ("reconstruct", "--model", "emoji-vq", "--input", ".", "--batch-size", "0"),
        ("tokenize", "--model", "emoji-vq", "--data", ".", "--out", "x", "--batch-size", "0"),
        ("tokenize", "--model", "emoji-vq", "--data", ".", "--out", "x", "--threads", "-1"),
        ("data", "emoji", "--out", "x", "--shard-size", "0"),
        ("orders", "--grid", "0x4"),
        ("orders", "--seed", "-1"),
    ],
)
def test_values_out_of_range_are_one_sentence(words, capsys):
    assert main(list(words)) == 2
    error = capsys.readouterr().err
    option = words[-2]
    assert error.startswith(f"vgen {words[0]}: {option}: ") and error.count("\n") == 1


def test_existing(tmp_path):
    file = tmp_path / "a.png"
    file.touch()
    arguments.existing("--x", None)
    arguments.existing("--x", file, "file")
    arguments.existing("--x", tmp_path, "folder")
    with pytest.raises(VgenError, match=r"\*.tar does not exist"):
        arguments.existing_data("--x", tmp_path / "*.tar")
    (tmp_path / "train-0.tar").touch()
    arguments.existing_data("--x", tmp_path / "*.tar")
    for path, kind, words in (
        (tmp_path / "b" / "c.png", "file", f"there is no {tmp_path / 'b'}\\)"),
        (tmp_path / "b.png", "file", "--x .*b.png does not exist; give a file"),
        (tmp_path, "file", "takes a file, and .* is a folder"),
        (file, "folder", "takes a folder, and .* is a file"),
    ):
        with pytest.raises(VgenError, match=words):
            arguments.existing("--x", path, kind)
    with pytest.raises(VgenError, match="does not exist"):
        arguments.existing_data("--x", tmp_path / "none")


def test_writable(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    file.touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    monkeypatch.chdir(tmp_path)
    arguments.writable_file("--out", None)
    for good in (Path("new.png"), Path("x/y/new.PNG"), file):
        arguments.writable_file("--out", good, (".png", ".webp"))
    arguments.writable_folder("--out", Path("x/y"))
    for path, words in (
        (Path("a.jpg"), "writes a .png or .webp file, got a.jpg"),
        (file / "b.png", "is in the way, it is a file"),
        (Path("link/b.png"), "is in the way, it is a broken link"),
    ):
        with pytest.raises(VgenError, match=words):
            arguments.writable_file("--out", path, (".png", ".webp"))
    with pytest.raises(VgenError, match="is a folder; give the name of a file"):
        arguments.writable_file("--out", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "link"], "a check writes nothing"
    Image.new("RGB", (2, 2)).save(file)
    with pytest.raises(VgenError, match=r"vgen did not write .*a\.png, so it is not replaced"):
        arguments.writable_file("--out", file)
    save_picture(Image.new("RGB", (2, 2)), file)
    arguments.writable_file("--out", file)


@pytest.mark.parametrize("reason", ["Read-only file system", "No space left on device"])
def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch, reason):
    def refusing(dir):
        raise OSError(30, reason)

    monkeypatch.setattr(arguments.tempfile, "TemporaryFile", refusing)  # root may write anywhere else
    with pytest.raises(VgenError, match=f"nothing can be written to the folder .*{reason}"):
        arguments.writable_folder("--out", tmp_path / "new" / "deep")
    assert list(tmp_path.iterdir()) == []


def test_devices_of_this_machine(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert arguments.usable_device(None) == arguments.usable_device("cpu") == "cpu"
    with pytest.raises(VgenError, match=r"--device cuda is not on this machine; it has cpu$"):
        arguments.usable_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [arguments.usable_device(name) for name in (None, "cuda", "cuda:1")] == ["cuda", "cuda", "cuda:1"]
    with pytest.raises(VgenError, match="cuda:7 is not on this machine; it has cpu, cuda:0, cuda:1"):
        arguments.usable_device("cuda:7")
