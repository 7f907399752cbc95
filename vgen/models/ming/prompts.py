"""Prompts of Ming-UniVision: text and pictures in one sequence of ids, and how pictures are made ready.

    <role>HUMAN</role> contents … <role>ASSISTANT</role>

A picture is <image>, as many <imagePatch> as it has tokens, </image> and a newline. The text tokenizer is that of the code
repository (`tokenizer.json` of its folder; it is not with the weights), read by `tokenizers`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from vgen.errors import VgenError
from vgen.layers.pictures import Picture, open_picture
from vgen.layers.pixels import centre_square, to_pixels
from vgen.models.conditions.base import Conditions
from vgen.models.ming.guidance import NULL, prompt_masks
from vgen.samplers.types import Condition

WORDS = "tokenizer.json"
HUMAN, ASSISTANT, END = "<role>HUMAN</role>", "<role>ASSISTANT</role>", "<|endoftext|>"
START_OF_IMAGE, PATCH, END_OF_IMAGE = "<image>", "<imagePatch>", "</image>"
# Wordings that the release recommends. Its first version had a newline before the caption.
GENERATE = "Please generate the corresponding image based on the description. {caption}"
GENERATE_V1 = "Please generate the corresponding image based on the description.\n{caption}"
FIND_REGION = "Given the edit instruction: {instruction}, please identify the editing region"
REFINE = "Refine the image for better clarity."

FACTOR = 28  # sides after loading are multiples of it; left over from a Qwen vision tower
LEAST, MOST = 4 * FACTOR**2, 1024 * FACTOR**2  # pixels
LONGEST = 200  # times the short side


@dataclass(frozen=True)
class Reply:
    """An assistant's turn among the contents of a prompt."""

    text: str


Content = str | Tensor | Reply  # text, pixels [3, H, W] in [-1, 1], an earlier answer


@dataclass(frozen=True)
class Prompt:
    """ids [1, n] int64; masks [3, n] bool of the guidance rows (`ming_guidance`); pictures: [3, H, W] each, in order."""

    ids: Tensor
    masks: Tensor
    pictures: tuple[Tensor, ...] = ()


class MingPrompts(Conditions):
    """Writes prompts as ids, and ids as text.

    tokenizer: a `tokenizers.Tokenizer`, or what has its `encode(text, add_special_tokens)`, `decode(ids)` and `token_to_id`;
    specials: word -> id as the model knows them; patch_size: pixels per side of a picture's token.
    """

    def __init__(self, tokenizer: Any, specials: dict[str, int], patch_size: int):
        self.tokenizer, self.specials, self.patch_size = tokenizer, specials, patch_size
        for word, number in specials.items():
            if tokenizer.token_to_id(word) != number:
                raise VgenError(
                    f"the text tokenizer's id of {word} is {tokenizer.token_to_id(word)}, the model's is {number}; use the "
                    f"{WORDS} that belongs to the model"
                )
        self.human, self.assistant = self._encode(HUMAN), self._encode(ASSISTANT)

    @classmethod
    def load(cls, path: str | Path, specials: dict[str, int], patch_size: int) -> MingPrompts:
        """From a `tokenizer.json`. Raises VgenError when it cannot be read."""
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise VgenError(f"{path} is not a tokenizer file ({error}); Ming-UniVision's is {WORDS}") from error
        return cls(tokenizer, specials, patch_size)

    def prompt(self, *contents: Content) -> Prompt:
        """One turn of the user, behind earlier ones if there are replies among its contents. VgenError: no text at all."""
        if not any(isinstance(content, str) and content.strip() for content in contents):
            raise VgenError("a prompt needs text: say what to make, to change, or to look for")
        text = HUMAN + "".join(map(self._written, contents)) + ASSISTANT
        return self._prompt(text, tuple(content for content in contents if isinstance(content, Tensor)))

    def captions(self, captions: Sequence[str], limit: int = 0, strict: bool = True) -> Condition:
        """Conditions for pictures of their own cache (the release's first version): left-padded ids [B, P] that end in <image>.

        extras["user"] [B, P]: what the null condition does not see. limit: most ids of a row (0: any number); VgenError
        beyond it, and for an empty caption.
        """
        rows = []
        for caption in captions:
            if not caption.strip():
                raise VgenError("a prompt needs text: say what to make")
            text = HUMAN + GENERATE_V1.format(caption=caption) + ASSISTANT + START_OF_IMAGE
            rows.append(self._prompt(text, ()))
            if limit and rows[-1].ids.shape[1] > limit:
                raise VgenError(
                    f"the prompt {caption[:40]!r} takes {rows[-1].ids.shape[1]} words with its template, the limit is {limit}; shorten it"
                )
        length = max(row.ids.shape[1] for row in rows)
        ids = torch.full((len(rows), length), self.specials[END])
        mask, user = torch.zeros(2, len(rows), length, dtype=torch.bool)
        for index, row in enumerate(rows):
            places = slice(length - row.ids.shape[1], length)
            ids[index, places], mask[index, places], user[index, places] = row.ids[0], True, ~row.masks[NULL]
        return Condition(ids, mask, {"user": user})

    def text(self, ids: Sequence[int]) -> str:
        """What the words say; special ones are left out."""
        return self.tokenizer.decode([number for number in ids if number not in self.specials.values()]).strip()

    def _written(self, content: Content) -> str:
        if isinstance(content, Reply):
            return ASSISTANT + content.text + END + HUMAN
        if isinstance(content, str):
            return content
        _, height, width = content.shape
        return START_OF_IMAGE + PATCH * (height // self.patch_size * (width // self.patch_size)) + END_OF_IMAGE + "\n"

    def _prompt(self, text: str, pictures: tuple[Tensor, ...]) -> Prompt:
        ids = self._encode(text)  # at once: words may join across the borders of contents
        kept = {self.specials[word] for word in (START_OF_IMAGE, PATCH, END_OF_IMAGE)}
        return Prompt(torch.tensor([ids]), prompt_masks(ids, self.human, self.assistant, kept), pictures)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


# ---- pictures -----------------------------------------------------------------------------------------------------------


def loaded_size(height: int, width: int) -> tuple[int, int]:
    """Height and width that every input picture is resized to first: multiples of 28, of 3136 to 802816 pixels."""
    if max(height, width) > LONGEST * min(height, width):
        raise VgenError(
            f"a picture may be at most {LONGEST} times as long as wide, this one has {height}x{width} pixels; crop it"
        )
    rounded = tuple(max(FACTOR, round(side / FACTOR) * FACTOR) for side in (height, width))  # halves to even
    area = rounded[0] * rounded[1]
    if LEAST <= area <= MOST:
        return rounded
    shrink = math.sqrt(height * width / (MOST if area > MOST else LEAST))
    whole = math.floor if area > MOST else math.ceil
    return tuple(whole(side / shrink / FACTOR) * FACTOR for side in (height, width))


def load_picture(image: Picture) -> Image.Image:
    """What the release's loader makes of any input picture, whatever it is for: a 512 x 512 file becomes 504 x 504."""
    image = open_picture(image)
    height, width = loaded_size(image.height, image.width)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def for_understanding(image: Image.Image, size: int = 1024) -> Tensor:
    """A loaded picture -> [3, size, size] in [-1, 1]; its sides are squashed, not cropped."""
    return to_pixels(image.resize((size, size), Image.Resampling.BICUBIC))


def for_editing(image: Image.Image, size: int = 512) -> Tensor:
    """A loaded picture -> [3, size, size] in [-1, 1]: short side resized, centre."""
    return to_pixels(centre_square(image, size))
