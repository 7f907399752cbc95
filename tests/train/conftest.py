import pytest
import torch
from PIL import Image

from vgen.data.tokens import write_tokens
from vgen.tokenizers_vis.vq import VQModel


@pytest.fixture
def pictures(tmp_path):
    """A folder with train/ (two classes, 6 pictures each) and heldout/ (3 each): squares of one colour on white, 32 px, captioned."""
    folder = tmp_path / "pictures"
    colours = {"red": (200, 30, 30), "blue": (30, 30, 200)}
    for split, count in (("train", 6), ("heldout", 3)):
        for name, colour in colours.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (32, 32), "white")
                image.paste(colour, (2 + number, 3, 20 + number, 18 + 2 * number))
                image.save(folder / split / name / f"{number}.png")
                (folder / split / name / f"{number}.txt").write_text(f"{name} square number {number}")
    return folder


@pytest.fixture
def token_sets(tmp_path):
    """A folder of token sets on a 4x4 grid with 32 codes: the caption decides the tokens."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    for split, rows in (("train", 24), ("heldout", 6)):
        kind = torch.arange(rows) % 4
        tokens = (kind[:, None] * 8 + torch.arange(16) % 8).int()
        write_tokens(
            folder / f"{split}.safetensors",
            tokens,
            captions=[f"pattern {['one', 'two', 'three', 'four'][k]}" for k in kind],
            labels=kind.tolist(),
            keys=[f"{split}-{i}" for i in range(rows)],
            grid=(1, 4, 4),
            vocabulary=32,
            tokenizer="none",
            class_names=("a", "b", "c", "d"),
        )
    return folder


@pytest.fixture
def tokenizer(tmp_path):
    """A tiny VQ model (32 codes, 8x8 pixels a token), saved in tmp_path / "tokenizer"."""
    model = VQModel.of_size(
        "emoji-f8",
        ch=8,
        encoder_ch_mult=[1],
        decoder_ch_mult=[1],
        z_channels=8,
        codebook_size=32,
        num_groups=4,
        patch_size=8,
    )
    model.save_pretrained(tmp_path / "tokenizer")
    return model.eval()


@pytest.fixture
def latent_sets(tmp_path):
    """A folder of token sets on a 4x4 grid of 3 channels: the caption decides the sign of the first channel."""
    folder = tmp_path / "latents"
    folder.mkdir()
    for split, rows in (("train", 24), ("heldout", 6)):
        kind = torch.arange(rows) % 2
        tokens = torch.zeros(rows, 16, 3)
        tokens[..., 0] = (2.0 * kind - 1)[:, None]
        write_tokens(
            folder / f"{split}.safetensors",
            tokens,
            captions=[f"sign {['minus', 'plus'][k]}" for k in kind],
            labels=kind.tolist(),
            keys=[f"{split}-{i}" for i in range(rows)],
            grid=(1, 4, 4),
            vocabulary=None,
            tokenizer="none",
            class_names=("minus", "plus"),
            more={"deviations": torch.full_like(tokens, 0.1)},
        )
    return folder
