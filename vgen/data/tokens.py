"""Cached visual tokens: what a frozen tokenizer made of a dataset, ready for training a generator.

NAME.safetensors   tokens [M, N], or [M, A, N] with A augmented variants of every picture; int16 or int32
NAME.json          captions, labels, keys, class names, grid, vocabulary, and which tokenizer made them
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vgen.data.dataset import EpochDataset
from vgen.data.images import item_generator
from vgen.errors import VgenError
from vgen.files import atomic_path

_FIELDS = ("captions", "labels", "keys", "class_names", "grid", "vocabulary", "tokenizer", "tokenizer_sha256")


def write_tokens(
    path: str | Path,
    tokens: Tensor,
    *,
    captions: Sequence[str],
    labels: Sequence[int],
    keys: Sequence[str],
    grid: tuple[int, int, int],
    vocabulary: int,
    tokenizer: str,
    tokenizer_sha256: str = "",
    class_names: Sequence[str] = (),
) -> None:
    """Writes a token set: `path` (.safetensors) and its sidecar (.json).

    tokens: integer `[M, N]` or `[M, A, N]` in [0, vocabulary), N positions of `grid` (T, H, W) in raster order.
    tokenizer, tokenizer_sha256: name or path of the tokenizer, and the digest of its weights, so that a generator trained on these
    tokens can be paired with the right decoder.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise VgenError(f"a token set is a .safetensors file, found {path.name}")
    if tokens.ndim not in (2, 3) or tokens.is_floating_point() or tokens.shape[-1] != math.prod(grid):
        raise VgenError(
            f"tokens must be integers [M, N] or [M, A, N] with N = {math.prod(grid)} for the grid {tuple(grid)}, "
            f"found {tokens.dtype} {list(tokens.shape)}"
        )
    counts = {"captions": len(captions), "labels": len(labels), "keys": len(keys)}
    if set(counts.values()) != {len(tokens)}:
        raise VgenError(f"{len(tokens)} rows of tokens need as many captions, labels and keys, found {counts}")
    _check_range(tokens, vocabulary, path)
    record = {
        "captions": list(captions),
        "labels": [int(label) for label in labels],
        "keys": list(keys),
        "class_names": list(class_names),
        "grid": list(grid),
        "vocabulary": vocabulary,
        "tokenizer": tokenizer,
        "tokenizer_sha256": tokenizer_sha256,
    }
    text = json.dumps(record, ensure_ascii=False, indent=1)
    with atomic_path(path.with_suffix(".json")) as temporary:
        temporary.write_text(text, encoding="utf-8")
    stored = tokens.to("cpu", torch.int16 if vocabulary <= 2**15 else torch.int32).contiguous()
    with atomic_path(path) as temporary:
        # The digest ties the two files together: a half-finished rewrite must not pair new captions with old tokens.
        save_file({"tokens": stored}, temporary, metadata={"sidecar_sha256": _digest(text)})


class TokenDataset(EpochDataset):
    """Items: `tokens` int64 [N], `caption` str, `label` int, `key` str.

    With A variants per picture, epoch e of sample i takes variant (e + a shift drawn from (seed, i)) mod A: every variant once in
    A epochs. Raises VgenError for missing, foreign or mismatched files and for tokens outside the vocabulary.
    """

    kind = "cached tokens"

    def __init__(self, path: str | Path, seed: int = 0):
        path = Path(path)
        sidecar = path.with_suffix(".json")
        for file in (path, sidecar):
            if not file.is_file():
                raise VgenError(
                    f"{file} does not exist: a token set is a .safetensors file and a .json file (made by `vgen tokenize`)"
                )
        text = sidecar.read_text(encoding="utf-8")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tokens = file.get_tensor("tokens")
            record = json.loads(text)
            fields = {name: record[name] for name in _FIELDS}
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise VgenError(f"{path} is not a token set of `vgen tokenize` ({error}): make it again") from error
        if metadata.get("sidecar_sha256") != _digest(text):
            raise VgenError(
                f"{path.name} and {sidecar.name} do not belong together: make them again with `vgen tokenize`"
            )
        self.path, self.seed = path, seed
        self.tokens = tokens if tokens.ndim == 3 else tokens[:, None]  # [M, A, N]
        self.grid = tuple(fields["grid"])
        self.vocabulary: int = fields["vocabulary"]
        self.tokenizer: str = fields["tokenizer"]
        self.tokenizer_sha256: str = fields["tokenizer_sha256"]
        self.captions: list[str] = fields["captions"]
        self.labels: list[int] = fields["labels"]
        self.keys: list[str] = fields["keys"]
        self.class_names = tuple(fields["class_names"])
        _check_range(self.tokens, self.vocabulary, path)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def variants(self) -> int:
        return self.tokens.shape[1]

    def item(self, index: int, epoch: int) -> dict:
        variant = 0
        if self.variants > 1:
            shift = int(torch.randint(self.variants, (), generator=item_generator(self.seed, 0, index)))
            variant = (epoch + shift) % self.variants
        return {
            "tokens": self.tokens[index, variant].long(),
            "caption": self.captions[index],
            "label": self.labels[index],
            "key": self.keys[index],
        }


def _check_range(tokens: Tensor, vocabulary: int, path: Path) -> None:
    if tokens.numel() == 0:
        raise VgenError(f"{path} would hold no tokens: expected at least one sample")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise VgenError(f"{path}: tokens must lie in [0, {vocabulary}), found {low} to {high}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
