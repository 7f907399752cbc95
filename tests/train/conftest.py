import pytest
import torch
import yaml

from vgen.data.tokens import write_tokens
from vgen.tokenizers_vis.kl import KLModel
from vgen.train.system import load_config


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
def latent_sets(tmp_path):
    """A folder of token sets on 4x4 and 2x2 grids of 3 channels: the caption decides the sign of the first channel."""
    folder = tmp_path / "latents"
    folder.mkdir()
    for split, rows in (("train", 24), ("heldout", 6)):
        kind = torch.arange(rows) % 2
        tokens, low = torch.zeros(rows, 16, 3), torch.zeros(rows, 4, 3)
        for latents in (tokens, low):
            latents[..., 0] = (2.0 * kind - 1)[:, None]
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
            low_grid=(1, 2, 2),
            more={
                "deviations": torch.full_like(tokens, 0.1),
                "low": low,
                "low_deviations": torch.full_like(low, 0.1),
            },
        )
    return folder


@pytest.fixture
def latent_config(tmp_path, latent_sets):
    """Makes the config of a system that trains on `latent_sets`, with a tiny KL tokenizer of two pixels a latent.

    latent_config(groups of the config, override, …); scalars replace those below.
    """
    KLModel(
        ch=8, ch_mult=(1, 1), num_res_blocks=1, latent_channels=3, num_groups=4, scale=1.0
    ).save_pretrained(tmp_path / "tokenizer")  # fmt: skip

    def make(content, *overrides):
        common = {
            "version": 1,
            "out": str(tmp_path / content["system"]),
            "batch_size": 8,
            "preview_every": 0,
            "ema_decay": 0.9,
            "tensorboard": False,
            "data": {"tokens": str(latent_sets), "tokenizer": str(tmp_path / "tokenizer")},
        }
        path = tmp_path / f"{content['system']}.yaml"
        path.write_text(yaml.safe_dump({**common, **content}), encoding="utf-8")
        return load_config(path, overrides)

    return make
