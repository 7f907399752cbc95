"""`vgen data` as a user meets it."""

import json

import torch
from PIL import Image

from vgen.cli.main import main
from vgen.data.tokens import write_tokens


def test_info_of_a_folder_with_sheet(tmp_path, capsys):
    for name, color in {"cat/a.png": "red", "dog/b.png": "blue"}.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True)
        Image.new("RGB", (30, 20), color).save(tmp_path / "set" / name)
    (tmp_path / "set/cat/a.txt").write_text("a red cat")
    sheet = tmp_path / "sheet.png"
    assert main(["data", "info", str(tmp_path / "set"), "--sheet", str(sheet)]) == 0
    said = capsys.readouterr().out
    assert (
        "image folder" in said
        and "train: 2 pictures found, 2 used" in said
        and "cat (1), dog (1)" in said
        and "a red cat" in said
    )
    with Image.open(sheet) as image:
        assert image.size == (2 * 96, 64 + 44) and image.getpixel((48, 30)) == (255, 0, 0)


def test_info_of_tokens(tmp_path, capsys):
    path = tmp_path / "t.safetensors"
    tokens = torch.zeros(3, 4, dtype=torch.long)
    write_tokens(
        path, tokens, captions=["x"] * 3, labels=[0] * 3, keys=list("abc"), grid=(1, 2, 2), vocabulary=9, tokenizer="vq"
    )
    assert main(["data", "info", str(path)]) == 0
    assert "grid 1x2x2, vocabulary 9, 1 codes used, tokenizer vq" in capsys.readouterr().out
    assert main(["data", "info", str(path), "--sheet", str(tmp_path / "s.png")]) == 2
    assert main(["data", "info", str(tmp_path), "--split", "t"]) == 0  # the folder that `vgen tokenize` writes
    assert "grid 1x2x2" in capsys.readouterr().out


def test_errors_are_one_line(tmp_path, capsys):
    assert main(["data", "info", str(tmp_path / "nothing")]) == 2
    assert main(["data", "emoji", "--out", str(tmp_path / "out"), "--archives", str(tmp_path)]) == 2
    assert main(["data", "emoji", "--out", str(tmp_path / "out"), "--size", "4"]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 3 and "npm pack" in said.err and not said.out
    assert not (tmp_path / "out").exists()


def test_complete_emoji_data_is_only_verified(tmp_path, capsys):
    from vgen.data.emoji import FORMAT, NAMES, PICTURES

    counts = dict.fromkeys(
        ("pictures", "train", "heldout", "captions", "classes", "names_without_picture", "pictures_without_name"), 0
    )
    manifest = {
        "kind": "emoji",
        "format": FORMAT,
        "image_size": 64,
        "shard_size": 1000,
        "packages": [PICTURES.spec, NAMES.spec],
        "complete": True,
        "counts": counts,
        "shards": {},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert main(["data", "emoji", "--out", str(tmp_path)]) == 0
    assert "0 pictures of 64 px" in capsys.readouterr().out


def test_info_shows_every_split_and_why_samples_are_left_out(tmp_path, capsys):
    for name in ("Train/cat/1.png", "Train/dog/2.png", "Test/cat/3.png", "more/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "Train/dog/2.txt").write_bytes(b"caf\xe9")
    (tmp_path / "Test/metadata.jsonl").write_text('{"file_name": "cat/3.png", "text": "a cat"}\n')
    (tmp_path / "manifest.json").write_text('["of another program"]')
    assert main(["data", "info", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "more/ is no split and is not read" in said
    assert "train: 2 pictures found, 1 used; 1 labelled (1 class); no captions" in said
    assert "1 skipped: text that is not UTF-8, such as dog/2.png" in said
    assert "test: 1 picture found, 1 used; 1 labelled (1 class); 1 caption from Test/metadata.jsonl" in said
    assert main(["data", "info", str(tmp_path), "--split", "heldout"]) == 2
    assert "no split 'heldout': found train, test" in capsys.readouterr().err
    assert main(["data", "info", str(tmp_path / "Train"), "--held-out", "5%"]) == 2  # one picture cannot be divided


def test_info_shows_what_training_would_hold_out(tmp_path, capsys):
    for number in range(9):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    assert main(["data", "info", str(tmp_path), "--held-out", "3"]) == 0
    said = capsys.readouterr().out
    assert "train: 6 pictures found" in said and "heldout: 3 pictures found" in said
