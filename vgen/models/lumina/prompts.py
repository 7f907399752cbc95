"""Prompts of Lumina-mGPT as word ids of Chameleon's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from vgen.errors import VgenError
from vgen.models.conditions.base import Conditions
from vgen.samplers.types import Condition, Grid

BOS, PAD, END_OF_TURN = 0, 1, 8710  # <s>, <pad>, <reserved08706>
PIXELS = 16  # a token's side
TEMPLATE = "Generate an image of {width}x{height} according to the following prompt:\n{prompt}"


class LuminaPrompts(Conditions):
    """<s>, the template of the release around a prompt, and the separator behind which the answer starts.

    tokenizer: Chameleon's `text_tokenizer.json`; grid: of the pictures, whose size the template names.
    """

    def __init__(self, tokenizer: Tokenizer, grid: Grid):
        self.tokenizer, self.grid = tokenizer, grid

    @classmethod
    def load(cls, path: str | Path, grid: Grid) -> LuminaPrompts:
        """From `text_tokenizer.json`. Raises VgenError when it cannot be read."""
        try:
            return cls(Tokenizer.from_file(str(path)), grid)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise VgenError(f"{path} is not a tokenizer file ({error}); Chameleon's is text_tokenizer.json") from error

    def captions(self, captions: Sequence[str], limit: int = 0, strict: bool = True) -> Condition:
        """Right-padded ids [B, P] and mask [B, P]; limit: most words of a row (0: any number)."""
        _, height, width = self.grid
        rows = []
        for prompt in captions:
            text = TEMPLATE.format(width=width * PIXELS, height=height * PIXELS, prompt=prompt)
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            if limit and len(ids) + 2 > limit:
                raise VgenError(
                    f"the prompt {prompt[:40]!r} takes {len(ids) + 2} words with its template, the limit is {limit}; shorten it"
                )
            rows.append([BOS, *ids, END_OF_TURN])
        length = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return Condition(ids, torch.arange(length) < lengths[:, None])
