"""Models that read and make pictures in one dialogue (Ming-UniVision), for pictures and text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vgen.errors import VgenError
from vgen.layers.pictures import Picture as AnyPicture
from vgen.layers.pictures import open_picture
from vgen.layers.pixels import to_images
from vgen.models.ming.dialogue import LIMIT, Context, Picture, Settings, Word, answer
from vgen.models.ming.mingunivision import MingUniVisionModel
from vgen.models.ming.prompts import (
    FIND_REGION,
    GENERATE,
    REFINE,
    Reply,
    for_editing,
    for_understanding,
    load_picture,
)
from vgen.pipelines.calls import Callback, Generators, check_callback, refuse, seeds_of
from vgen.samplers.choice import FlowChoice, TokenChoice
from vgen.samplers.guidance import TextImageGuidance
from vgen.samplers.noise import PhiloxNoise
from vgen.saved import open_saved
from vgen.values import string, whole

Said = AnyPicture | Reply  # what a turn of the user is made of; a str is text, so a picture's file is a Path


@dataclass(frozen=True)
class Turn:
    """An answer: its text without special words, and its pictures in order."""

    text: str
    images: list[Image.Image]


class UnifiedPipeline:
    """Makes pictures, changes pictures, answers questions about them, one call each or in a `Dialogue`.

    model: with its text tokenizer (`MingUniVisionModel.set_words`). text_guidance, image_guidance: how much an answering picture
    follows the words, and an input picture (at least 1: not at all more than a model without guidance does); substeps: of
    every visual token; temperature: factor of the initial noise; word_temperature: 0 takes the likeliest word.

    The release ignores what users set here and always applies the defaults.
    """

    def __init__(
        self,
        model: MingUniVisionModel,
        *,
        text_guidance: float = 3.0,
        image_guidance: float = 1.1,
        substeps: int = 16,
        temperature: float = 1.0,
        word_temperature: float = 0.0,
    ):
        self.model = model
        self.settings = Settings(
            guidance=TextImageGuidance(text_guidance, image_guidance),
            choice=FlowChoice(temperature, substeps),
            words=TokenChoice(word_temperature),
        )

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype | None = None, **settings: Any
    ) -> UnifiedPipeline:
        """From a folder that `model.save_pretrained` wrote. settings: as for the constructor."""
        return cls(open_saved(MingUniVisionModel, folder, torch_dtype=dtype).eval(), **settings)

    @classmethod
    def from_original(
        cls, source: str | Path, config: str | dict[str, Any] = "16b-a3b", **settings: Any
    ) -> UnifiedPipeline:
        """From the published folder; see `MingUniVisionModel.from_original`. settings: as for the constructor."""
        return cls(MingUniVisionModel.from_original(source, config), **settings)

    def dialogue(
        self,
        seed: int = 0,
        keep_masks: bool = False,
        *,
        generator: Generators | None = None,
        callback_on_step_end: Callback | None = None,
        **unknown: Any,
    ) -> Dialogue:
        """A dialogue that begins empty. Its k-th picture depends on (seed, k) and on what was said; keep_masks: see `after_round`.

        generator: one from which the seed is drawn; callback_on_step_end: as of `VisualPipeline`, after every visual token.
        """
        refuse(unknown, ("seed", "keep_masks", "generator", "callback_on_step_end"))
        return Dialogue(self.model, self._settings(seed, generator, keep_masks, callback_on_step_end))

    def generate(
        self,
        prompt: str,
        num_images_per_prompt: int = 1,
        *,
        batch_size: int = 4,
        seed: int = 0,
        generator: Generators | None = None,
        callback_on_step_end: Callback | None = None,
        **unknown: Any,
    ) -> list[Image.Image]:
        """Pictures of a description. Picture i depends on (seed, i) only. The prompt is read once for all of them."""
        refuse(unknown, ("num_images_per_prompt", "batch_size", "seed", "generator", "callback_on_step_end"))
        num_images = whole(num_images_per_prompt, "the number of images", 1)
        batch_size = whole(batch_size, "the batch size", 1)
        if not string(prompt, "the prompt").strip():
            raise VgenError("a prompt needs text: say what to make")
        settings = self._settings(seed, generator, False, callback_on_step_end)
        context = Context(self.model)
        context.read(self.model.vocabulary.prompt(GENERATE.format(caption=prompt)))
        images = []
        for begin in range(0, num_images, batch_size):
            samples = torch.arange(begin, min(begin + batch_size, num_images))
            images += to_images(context.draw_picture(settings, samples)[0].pixels)
        return images

    def edit(
        self,
        image: AnyPicture,
        instruction: str,
        *,
        region_first: bool = False,
        refine: bool = False,
        seed: int = 0,
        generator: Generators | None = None,
        callback_on_step_end: Callback | None = None,
        **unknown: Any,
    ) -> Image.Image:
        """The picture, changed as the instruction says.

        region_first: a round before it makes a picture of the region to change; refine: a round behind it asks for more clarity. With both this
        is the release's recommended dialogue.
        """
        dialogue = self.dialogue(seed, generator=generator, callback_on_step_end=callback_on_step_end, **unknown)
        if not string(instruction, "the instruction").strip():
            raise VgenError("a prompt needs text: say what to change")
        image = open_picture(image)
        if region_first:
            dialogue.say(image, FIND_REGION.format(instruction=instruction), picture=True)
            turn = dialogue.say(instruction, picture=True)
        else:
            turn = dialogue.say(image, instruction, picture=True)
        if refine:
            turn = dialogue.say(REFINE, picture=True)
        return turn.images[0]

    def ask(self, image: AnyPicture, question: str, *, limit: int = LIMIT, seed: int = 0) -> str:
        """What the model says to a question about a picture, in at most `limit` words of its vocabulary."""
        return self.dialogue(seed).say(open_picture(image), question, limit=limit).text

    def _settings(
        self, seed: int, generator: Generators | None, keep_masks: bool, callback: Callback | None
    ) -> Settings:
        check_callback(callback)
        if isinstance(generator, list | tuple):
            raise VgenError("pictures of one dialogue or prompt share its cache and its seed: give one generator")
        drawn = seeds_of(seed, generator, 1)
        changes: dict[str, Any] = {}
        if callback is not None:
            changes["callback"] = lambda step, canvas: callback(self, step.index, step, {"canvas": canvas})
        return replace(
            self.settings, noise=lambda samples: PhiloxNoise(drawn, samples), keep_masks=keep_masks, **changes
        )


class Dialogue:
    """Rounds of one dialogue: what was said and shown stays in the model's cache. The published model was trained on two rounds."""

    def __init__(self, model: MingUniVisionModel, settings: Settings):
        self.model, self.settings = model, settings
        self.context = Context(model)

    def say(self, *contents: Said, picture: bool = False, limit: int = LIMIT) -> Turn:
        """The answer to text and pictures, in any order; `Reply` stands for an earlier answer that is not in the cache.

        picture: the answer is one picture and nothing else, and pictures among the contents are made ready for editing (512 px,
        centre) instead of understanding (1024 px, squashed). Without it the model answers as it likes, in at most `limit` words.
        """
        parts = [self._prepared(content, picture) for content in contents]
        config = self.model.config
        forced = (config.image_start, config.image_end, config.end) if picture else ()
        words: list[int] = []
        images: list[Image.Image] = []
        for event in answer(self.context, self.model.vocabulary.prompt(*parts), self.settings, limit, forced):
            match event:
                case Word(id=word):
                    words.append(word)
                case Picture(pixels=pixels):
                    images += to_images(pixels)
        return Turn(self.model.vocabulary.text(words), images)

    def reset(self) -> None:
        """Forgets everything."""
        self.context = Context(self.model)

    def _prepared(self, content: Said, editing: bool) -> str | Reply | Tensor:
        if isinstance(content, (str, Reply)):
            return content
        if editing:
            return for_editing(load_picture(content), self.model.vision.config.image_size)
        return for_understanding(load_picture(content), self.model.config.understanding_size)
