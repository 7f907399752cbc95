"""Cached visual tokens: what a frozen tokenizer made of a dataset, ready for training a generator.

NAME.safetensors   tokens [M, N], or [M, A, N] with A augmented variants of every picture; int16 or int32
                   of a continuous tokenizer: tokens [M, (A,) N, C] float16, the means of its posteriors, and `deviations` like
                   them, their standard deviations, where it has any; `low` and `low_deviations`: of the same pictures made smaller
NAME.json          captions, labels, keys, class names, grid, vocabulary or channels, and which tokenizer made them (its weights' digest
                   and its config); aesthetic scores where the pictures have any
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vgen.data.dataset import EpochDataset
from vgen.data.identity import digest
from vgen.data.images import item_generator
from vgen.errors import VgenError
from vgen.files import atomic_path

_FIELDS = ("captions", "labels", "keys", "class_names", "tokenizer", "tokenizer_sha256")


@dataclass(frozen=True)
class TokenSetSpec:
    """The shape of a token set: what a generator is made for.

    grid: (T, H, W); vocabulary: number of codes, or None and channels: floats a token; low_grid: of the smaller pictures; size: (height,
    width) of the pictures in pixels, where the grid does not say it (FlexTok).
    """

    grid: tuple[int, int, int]
    vocabulary: int | None = None
    channels: int | None = None
    low_grid: tuple[int, int, int] | None = None
    size: tuple[int, int] | None = None

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> TokenSetSpec:
        """From the sidecar. Raises KeyError or TypeError for another file."""
        grid = tuple(int(side) for side in record["grid"])
        # Sets of the past have neither of these two.
        low, size = (None if record.get(key) is None else tuple(record[key]) for key in ("low_grid", "size"))
        return cls(grid, record["vocabulary"], record.get("channels"), low, size)

    def check(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Raises VgenError unless the tensors of a set fit."""
        tokens = tensors["tokens"]
        if tokens.numel() == 0:
            raise VgenError(f"{path} would hold no tokens: expected at least one sample")
        if self.vocabulary is None:
            for name, grid in (("tokens", self.grid), ("low", self.low_grid)):
                if grid is not None:
                    self._check_latents(tensors, name, grid, path)
            return
        length = math.prod(self.grid)
        if tokens.ndim not in (2, 3) or tokens.is_floating_point() or tokens.shape[-1] != length:
            raise VgenError(
                f"tokens must be integers [M, N] or [M, A, N] with N = {length} for the grid {self.grid}, "
                f"found {tokens.dtype} {list(tokens.shape)}"
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocabulary:
            raise VgenError(f"{path}: tokens must lie in [0, {self.vocabulary}), found {low} to {high}")

    def _check_latents(self, tensors: Mapping[str, Tensor], name: str, grid: Sequence[int], path: Path) -> None:
        latents, size = tensors.get(name), [math.prod(grid), self.channels]
        if (
            latents is None
            or not latents.is_floating_point()
            or latents.ndim not in (3, 4)
            or list(latents.shape[-2:]) != size
        ):
            found = "nothing" if latents is None else f"{latents.dtype} {list(latents.shape)}"
            raise VgenError(
                f"{name} must be floats [M, {size[0]}, {size[1]}] or [M, A, {size[0]}, {size[1]}], found {found}"
            )
        deviations = tensors.get(_deviations(name))
        if deviations is not None and deviations.shape != latents.shape:
            raise VgenError(f"{path}: the deviations of {name} have another shape than {name}: make the set again")
        if not bool(latents.isfinite().all()):
            raise VgenError(f"{path}: the latents hold numbers that float16 cannot (above 65,504, or NaN)")


def _deviations(name: str) -> str:
    return {"tokens": "deviations", "low": "low_deviations"}[name]


def write_tokens(
    path: str | Path,
    tokens: Tensor,
    *,
    captions: Sequence[str],
    labels: Sequence[int],
    keys: Sequence[str],
    grid: tuple[int, int, int],
    vocabulary: int | None,
    tokenizer: str,
    tokenizer_sha256: str = "",
    tokenizer_config: Mapping[str, Any] | None = None,
    class_names: Sequence[str] = (),
    low_grid: tuple[int, int, int] | None = None,
    size: tuple[int, int] | None = None,
    more: Mapping[str, Tensor] | None = None,
    aesthetics: Sequence[float] = (),
) -> str:
    """Writes a token set: `path` (.safetensors) and its sidecar (.json). Returns the digest of the sidecar.

    tokens: integer `[M, N]` or `[M, A, N]` in [0, vocabulary), N positions of `grid` (T, H, W) in raster order; vocabulary None:
    floats `[M, N, C]` or `[M, A, N, C]`, with `more` as the module says (deviations, low, low_deviations).
    size: of the pictures, where the grid does not say it. aesthetics: a score of every picture, NaN where it is not known (empty: none is).
    tokenizer, tokenizer_sha256, tokenizer_config: name or path of the tokenizer, the digest of its weights, and its config, so that
    a generator trained on these tokens can be paired with the right decoder.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise VgenError(f"a token set is a .safetensors file, found {path.name}")
    counts = {"captions": len(captions), "labels": len(labels), "keys": len(keys)}
    counts |= {"aesthetics": len(aesthetics)} if len(aesthetics) else {}
    if set(counts.values()) != {len(tokens)}:
        raise VgenError(f"{len(tokens)} rows of tokens need as many captions, labels and keys, found {counts}")
    spec = TokenSetSpec(tuple(grid), vocabulary, None if vocabulary else tokens.shape[-1], low_grid, size)
    if vocabulary is None:
        dtype = torch.float16
    else:
        dtype = torch.int16 if vocabulary <= 2**15 else torch.int32
    tensors = {"tokens": tokens, **(more or {})}
    stored = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    # Codes before a narrower type hides what is out of range, latents behind it: float16 has a range of its own.
    spec.check(stored if vocabulary is None else tensors, path)
    record = {
        "captions": list(captions),
        "labels": [int(label) for label in labels],
        "keys": list(keys),
        "class_names": list(class_names),
        "aesthetics": [None if math.isnan(score) else score for score in aesthetics],  # JSON knows no NaN
        **asdict(spec),
        "tokenizer": tokenizer,
        "tokenizer_sha256": tokenizer_sha256,
        "tokenizer_config": None if tokenizer_config is None else dict(tokenizer_config),
    }
    text = json.dumps(record, ensure_ascii=False, indent=1)
    with atomic_path(path.with_suffix(".json")) as temporary:
        temporary.write_text(text, encoding="utf-8")
    with atomic_path(path) as temporary:
        # The digest ties the two files together: a half-finished rewrite must not pair new captions with old tokens.
        save_file(stored, temporary, metadata={"sidecar_sha256": _digest(text)})
    return _digest(text)


class TokenDataset(EpochDataset):
    """Items: `tokens` int64 [N], or float32 [N, C] (and `low` [n, C] where there is one), `caption` str, `label` int, `key` str;
    where the pictures have scores, `aesthetic` float32 [], NaN for those without.

    With A variants per picture, epoch e of sample i takes variant (e + a shift drawn from (seed, i)) mod A: every variant once in
    A epochs. Latents are samples of their posteriors, drawn anew from (seed, epoch, i). Raises VgenError for missing, foreign or
    mismatched files and for tokens outside the vocabulary.
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
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
            record = json.loads(text)
            fields = {name: record[name] for name in _FIELDS}
            self.spec = TokenSetSpec.of_record(record)
            if "tokens" not in tensors:
                raise KeyError("tokens")
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise VgenError(f"{path} is not a token set of `vgen tokenize` ({error}): make it again") from error
        self.sidecar_sha256 = _digest(text)
        if metadata.get("sidecar_sha256") != self.sidecar_sha256:
            raise VgenError(
                f"{path.name} and {sidecar.name} do not belong together: make them again with `vgen tokenize`"
            )
        self.spec.check(tensors, path)
        self.path, self.seed = path, seed
        plain = 2 if self.spec.vocabulary is not None else 3  # dimensions of a set without variants
        self.tensors = {name: part[:, None] if part.ndim == plain else part for name, part in tensors.items()}
        self.tokens = self.tensors["tokens"]  # [M, A, N] or [M, A, N, C]
        self.grid, self.vocabulary = self.spec.grid, self.spec.vocabulary
        self.tokenizer: str = fields["tokenizer"]
        self.tokenizer_sha256: str = fields["tokenizer_sha256"]
        self.captions: list[str] = fields["captions"]
        self.labels: list[int] = fields["labels"]
        self.keys: list[str] = fields["keys"]
        self.class_names = tuple(fields["class_names"])
        # Sets of the past have neither of these two.
        self.tokenizer_config: dict[str, Any] | None = record.get("tokenizer_config")
        scores = record.get("aesthetics", [])
        self.aesthetics = torch.tensor([math.nan if score is None else score for score in scores])

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that training reads; not of keys, nor of where the tokenizer was."""
        whole = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            whole.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        tokenizer = (self.tokenizer_sha256, self.tokenizer_config)
        scores = ["" if math.isnan(score) else score for score in self.aesthetics.tolist()]
        said = digest(self.captions, self.labels, self.class_names, scores, asdict(self.spec), tokenizer)
        whole.update(said.encode())
        return whole.hexdigest()

    @property
    def variants(self) -> int:
        return self.tokens.shape[1]

    def item(self, index: int, epoch: int) -> dict:
        variant = 0
        if self.variants > 1:
            shift = int(torch.randint(self.variants, (), generator=item_generator(self.seed, 0, index)))
            variant = (epoch + shift) % self.variants
        score = {"aesthetic": self.aesthetics[index]} if len(self.aesthetics) else {}
        return {
            **self._values(index, variant, epoch),
            **score,
            "caption": self.captions[index],
            "label": self.labels[index],
            "key": self.keys[index],
        }

    def _values(self, index: int, variant: int, epoch: int) -> dict[str, Tensor]:
        if self.spec.vocabulary is not None:
            return {"tokens": self.tokens[index, variant].long()}
        generator, values = item_generator(self.seed, epoch, index), {}
        for name in ("tokens", "low"):
            if name in self.tensors:
                mean = self.tensors[name][index, variant].float()
                noise = torch.randn(mean.shape, generator=generator)
                deviation = self.tensors.get(_deviations(name))
                values[name] = mean if deviation is None else mean + deviation[index, variant].float() * noise
        return values


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
