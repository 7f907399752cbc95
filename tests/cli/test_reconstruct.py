import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vgen.cli.main import main
from vgen.tokenizers_vis.flextok.flextok import FlexTok
from vgen.tokenizers_vis.kl import KLModel
from vgen.tokenizers_vis.vq import VQModel


@pytest.fixture
def folder(tmp_path):
    """Three pictures: RGB, grey, 16-bit grey with other sides."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(256, size=(20, 16, 3), dtype=np.uint8)).save(pictures / "a.png")
    Image.new("L", (16, 16), 90).save(pictures / "b.png")
    Image.fromarray(rng.integers(65536, size=(16, 16), dtype=np.uint16)).save(pictures / "c.png")
    return pictures


@pytest.fixture
def vq(tmp_path):
    torch.manual_seed(0)
    model = VQModel(
        ch=8, encoder_ch_mult=(1, 1), decoder_ch_mult=(1, 1), num_res_blocks=1, z_channels=8, codebook_size=32,
        codebook_embed_dim=4, usage_window=16, num_groups=4,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "vq")
    return str(tmp_path / "vq")


def test_a_folder_and_a_picture(folder, vq, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    arguments = ["reconstruct", "--model", vq, "--out", str(out), "--size", "16", "--device", "cpu", "--json"]
    assert main([*arguments, "--input", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    # 8x8 codes of 5 bits for 16x16 pixels.
    assert any(
        "3 pictures of 16 px, 64 tokens each (1.25 bits per pixel, 1/19 of raw pixels): PSNR" in line for line in lines
    )
    report = json.loads(lines[-1])
    assert report["pictures"] == 3 and report["rows"][0]["tokens"] == 64 and 0 < report["rows"][0]["psnr"] < 30
    assert Image.open(out).width > 3 * 16
    assert main([*arguments, "--input", str(folder / "a.png")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pictures"] == 1


def test_a_continuous_tokenizer_is_counted_in_half_precision(folder, tmp_path, capsys):
    torch.manual_seed(0)
    KLModel(ch=8, ch_mult=(1, 1), num_res_blocks=1, latent_channels=4, num_groups=4).save_pretrained(tmp_path / "kl")
    arguments = [
        "--model",
        str(tmp_path / "kl"),
        "--input",
        str(folder),
        "--size",
        "16",
        "--out",
        str(tmp_path / "s.png"),
    ]
    assert main(["reconstruct", *arguments, "--device", "cpu"]) == 0
    assert "64 tokens each (16 bits per pixel" in capsys.readouterr().out  # 64 tokens x 4 floats x 16 bits / 256 pixels


def test_bad_input_is_one_sentence(folder, vq, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    good = ["--model", vq, "--input", str(folder), "--size", "16", "--out", str(tmp_path / "s.png"), "--device", "cpu"]
    for change, words in (
        (["--size", "15"], "multiple of 2 for this tokenizer, got 15; use 14 or 16"),
        (["--num-tokens", "65"], "65 of them cannot be kept; choose 1 to 64"),
        (["--num-tokens", "0"], "at least 1"),
        (["--steps", "3"], "takes no steps"),
        (["--model", "emoji-vk"], "did you mean 'emoji-vq'"),
        (["--input", str(tmp_path / "text.png")], "not an image that can be read"),
        (["--input", str(tmp_path / "nowhere")], "nowhere"),
        (["--out", str(tmp_path / "s.txt")], ".png or .webp"),
        (["--lpips-vgg", "a.pt"], "both --lpips-vgg and --lpips-heads"),
    ):
        assert main(["reconstruct", *good, *change]) == 2, change
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error
    assert not Path(tmp_path / "s.png").exists()


def test_pictures_that_are_not_square(folder, vq, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    common = ["reconstruct", "--input", str(folder), "--out", str(out), "--device", "cpu", "--json"]
    assert main([*common, "--model", vq, "--size", "16x24"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("3 pictures of 16 x 24 px, 96 tokens each" in line for line in lines) and json.loads(lines[-1])[
        "size"
    ] == [16, 24]
    torch.manual_seed(0)
    model = FlexTok(
        vae_family=None, encoder_width=16, encoder_depth=1, decoder_width=16, decoder_depth=1, head_dim=8, patch_size=4,
        max_grid=(4, 5), registers=6, levels=(5, 4), frequencies=8, steps=1,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "flextok")
    common += ["--model", str(tmp_path / "flextok")]
    for size, found in ((["--size", "12x20"], [12, 20]), (["--size", "12"], 12), ([], [16, 20])):
        assert main([*common, *size, "--num-tokens", "2", "6"]) == 0
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert report["size"] == found and [row["tokens"] for row in report["rows"]] == [2, 6]
    assert main([*common, "--size", "12x24"]) == 2
    assert "up to 16x20 (height x width) whose sides are multiples of 4, got 12x24" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "12x", "-4", "12x-4", "x8", "12.5", "8 8", "12x8x3", "nine"])
def test_a_size_is_a_side_or_height_x_width(size, vq, folder, capsys):
    assert main(["reconstruct", "--model", vq, "--input", str(folder), f"--size={size}"]) == 2
    assert "height x width such as 192x256" in capsys.readouterr().err


def divided(folder, *splits):
    """The three pictures in every split, darker from split to split."""
    for number, split in enumerate(splits):
        (folder / split).mkdir()
        for path in sorted(folder.glob("*.png")):
            Image.open(path).convert("RGB").point(lambda value, part=number: value // (part + 1)).save(
                folder / split / path.name
            )
    for path in folder.glob("*.png"):
        path.unlink()
    return folder


def test_which_split_is_measured(folder, vq, tmp_path, capsys):
    divided(folder, "train", "val", "test")
    arguments = [
        "reconstruct",
        "--model",
        vq,
        "--out",
        str(tmp_path / "s.png"),
        "--size",
        "16",
        "--device",
        "cpu",
        "--json",
    ]
    figures = {}
    for asked, measured in ((None, "val"), ("train", "train"), ("val", "val"), ("test", "test")):
        assert main([*arguments, "--input", str(folder), *(["--split", asked] if asked else [])]) == 0
        out = capsys.readouterr().out
        report = json.loads(out.splitlines()[-1])
        assert report["split"] == measured and f"measured: the 3 pictures of split {measured}" in out
        assert ("no split heldout (it has train, val, test)" in out) == (asked is None)
        figures.setdefault(measured, []).append(report["rows"][0]["psnr"])
    assert figures["val"][0] == figures["val"][1] and len({values[0] for values in figures.values()}) == 3
    for split, words in (("heldout", "no split 'heldout': found train, val, test"), ("vall", "did you mean 'val'")):
        assert main([*arguments, "--input", str(folder), "--split", split]) == 2
        assert words in capsys.readouterr().err


def test_undivided_pictures_are_training_pictures_and_it_says_so(folder, vq, tmp_path, capsys):
    arguments = ["reconstruct", "--model", vq, "--out", str(tmp_path / "s.png"), "--size", "16", "--device", "cpu"]
    assert main([*arguments, "--input", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "3 pictures of split train, for the data has no split heldout (it has train)" in out
    assert "a tokenizer trained on this data has seen them" in out
    assert main([*arguments, "--input", str(folder), "--split", "heldout"]) == 2
    assert "no split 'heldout'" in capsys.readouterr().err
    assert main([*arguments, "--input", str(folder / "a.png"), "--split", "train"]) == 2
    assert "is one picture and has no split 'train'" in capsys.readouterr().err


def test_no_more_pictures_are_read_than_asked_for(folder, vq, tmp_path, capsys, monkeypatch):
    from vgen.data.dataset import ImageDataset

    for number in range(30):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"n{number:02d}.png")
    read = []
    own_item = ImageDataset.own_item
    monkeypatch.setattr(
        ImageDataset, "own_item", lambda self, index, *rest: (read.append(index), own_item(self, index, *rest))[1]
    )
    arguments = ["reconstruct", "--model", vq, "--input", str(folder), "--out", str(tmp_path / "s.png"), "--size", "16"]
    assert main([*arguments, "--device", "cpu", "--count", "5", "--batch-size", "2", "--shown", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pictures"] == 5
    assert max(read) <= 5


def test_pictures_too_small_to_be_measured(folder, vq, tmp_path, capsys):
    arguments = [
        "reconstruct",
        "--model",
        vq,
        "--input",
        str(folder),
        "--out",
        str(tmp_path / "s.png"),
        "--device",
        "cpu",
    ]
    assert main([*arguments, "--size", "8"]) == 2
    assert "windows of 11 x 11 pixels, so pictures need as many on a side, got 8 x 8" in capsys.readouterr().err
