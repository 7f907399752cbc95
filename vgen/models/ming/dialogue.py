"""Words and pictures in turn: one call of Ming-UniVision, and what it leaves for the next one.

Words are drawn one at a time; where <image> is drawn (or forced), the cache branches into guidance rows, `decode()` makes the
picture, and the conditional row goes on. A round always enters as embeddings, so pictures may come in any round. (The
release embeds the placeholders of later rounds' pictures instead of the pictures.)

Shapes: R guidance rows, n ids of a prompt, L keys, D width, N visual tokens of C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vgen.errors import VgenError
from vgen.models.ming.guidance import COND, after_round, cache_rows, extended, picture_rows, positions_of
from vgen.models.ming.mingunivision import MingState, MingUniVisionModel
from vgen.models.ming.prompts import Prompt
from vgen.samplers.choice import FlowChoice, TokenChoice
from vgen.samplers.decode import decode
from vgen.samplers.guidance import ClassifierFree, TextImageGuidance
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.predictions import Logits
from vgen.samplers.types import Canvas, Noise, Step

LIMIT = 512  # words of an answer, <image> among them; visual tokens do not count


@dataclass(frozen=True)
class Settings:
    """How words and pictures are drawn; the defaults are those that the release always applies.

    guidance: its image row is switched on where it is needed; choice: of latents; words: of words, greedy by default; noise: from global sample
    indices [B] to the source of all draws, the k-th picture of a dialogue is sample k; keep_masks: see `after_round`;
    callback: called after every visual token, as in `VisualPipeline`.
    """

    guidance: TextImageGuidance = field(default_factory=TextImageGuidance)
    choice: FlowChoice = field(default_factory=lambda: FlowChoice(substeps=16))
    words: TokenChoice = field(default_factory=lambda: TokenChoice(temperature=0.0))
    noise: Callable[[Tensor], Noise] = lambda samples: PhiloxNoise(0, samples)
    keep_masks: bool = False
    callback: Callable[[Step, Canvas], None] = lambda step, canvas: None


@dataclass(frozen=True)
class Word:
    """A word that was drawn (or forced)."""

    id: int


@dataclass(frozen=True)
class Picture:
    """A picture that was made: pixels [B, 3, H, W] in [-1, 1], latents [B, N, C]."""

    pixels: Tensor
    latents: Tensor


class Context:
    """What has been said and shown: a cache of one row, and the masks that guidance rows will have of it.

    masks: [3, L'] bool of all prompts (`ming_guidance`), what was generated since comes behind them; length: keys in the
    cache; hidden: [1, D] of the last token; words, pictures: how many were drawn.
    """

    def __init__(self, model: MingUniVisionModel):
        self.model = model
        self.cache = model.llm.new_cache()
        self.masks = torch.ones(3, 0, dtype=torch.bool)
        self.length = self.words = self.pictures = 0
        self.hidden: Tensor | None = None

    @torch.no_grad()
    def read(self, prompt: Prompt) -> None:
        """The prompt enters the cache, its pictures in place of their placeholders."""
        if prompt.masks.shape != (3, prompt.ids.shape[1]):
            raise VgenError(
                f"a prompt of {prompt.ids.shape[1]} ids needs masks of 3 rows as long, found {list(prompt.masks.shape)}"
            )
        self._room(prompt.ids.shape[1])
        embeds, modality = self.model.embed_prompt(prompt.ids, prompt.pictures)
        self.masks = torch.cat((extended(self.masks, self.length), prompt.masks), dim=1)
        self._feed(embeds, modality)

    @torch.no_grad()
    def feed(self, word: int) -> None:
        """One word enters the cache."""
        self._room(1)
        self._feed(self.model.llm.embed(torch.tensor([[word]], device=self.model.device)))

    def _feed(self, embeds: Tensor, modality: Tensor | None = None) -> None:
        count = embeds.shape[1]
        self.length += count
        mask = extended(self.masks[COND : COND + 1], self.length).to(embeds.device)
        self.hidden = self.model.llm(embeds, mask, positions_of(mask)[:, -count:], self.cache, modality)[:, -1]

    @torch.no_grad()
    def draw_word(self, settings: Settings) -> int:
        """The next word: greedy, or drawn with noise that belongs to its number in the dialogue."""
        logits = self.model.llm.logits(self.hidden)[None, :, None]  # [1, 1, 1, V]
        place = torch.tensor([self.words], device=logits.device)
        step = Step(self.words, place, keep=1, unknown=(1, 0), total=self.words + 1, start_unknown=1)
        noise = settings.noise(torch.zeros(1, dtype=torch.long))
        return int(Logits(logits).draw(step, ClassifierFree(), settings.words, noise).values)

    @torch.no_grad()
    def draw_picture(self, settings: Settings, samples: Tensor) -> tuple[Picture, MingState]:
        """Pictures of the given samples [B] that begin here, behind all that was said; the context stays as it is."""
        model = self.model
        self._room(model.grid[1] * model.grid[2] + 1)
        rows = picture_rows(self.masks, self.length + 1)
        guidance = replace(settings.guidance, image_row=len(rows) == 3)
        canvas = Canvas.blank(model.grid, samples, model.device, model.config.channels)
        state = model.branch(self.cache, rows[: len(guidance.rows)], canvas)
        order = model.default_order()
        for step, _ in decode(model, state, canvas, order, guidance, settings.choice, settings.noise(samples)):
            settings.callback(step, canvas)
        return Picture(model.picture(state), canvas.values), state

    def draw_and_read_picture(self, settings: Settings) -> Picture:
        """One picture, which enters the context: its conditional row goes on."""
        picture, state = self.draw_picture(settings, torch.tensor([self.pictures]))
        self.cache = cache_rows(state.cache, torch.zeros(1, dtype=torch.long, device=self.model.device))
        self.hidden, self.length, self.pictures = state.hidden[:1], state.length, self.pictures + 1
        return picture

    def close_round(self, keep_masks: bool) -> None:
        """Decides what guidance rows of the next round will see of this one."""
        self.masks = after_round(self.masks, self.length, keep_masks)

    def _room(self, count: int) -> None:
        limit = self.model.config.positions
        if self.length + count > limit:
            raise VgenError(
                f"the dialogue would have {self.length + count} tokens, the model knows {limit} positions; start a new one"
            )


def answer(
    context: Context,
    prompt: Prompt,
    settings: Settings,
    limit: int = LIMIT,
    forced: Sequence[int | None] = (),
) -> Iterator[Word | Picture]:
    """One round: reads the prompt, then yields words and pictures as they are made, until the end word or `limit` words.

    forced: words to take instead of drawing them (None: draw), from the first on. The last word is not fed, whatever it is,
    so an <image> that comes as the last one makes no picture. The round is closed when the iterator is, used up or not.
    """
    config = context.model.config
    if limit < 1:
        raise VgenError(f"an answer has at least 1 word, got a limit of {limit}")
    context.read(prompt)
    try:
        for index in range(limit):
            given = forced[index] if index < len(forced) else None
            word = context.draw_word(settings) if given is None else given
            context.words += 1
            yield Word(word)
            if word == config.end or index == limit - 1:
                return
            if word == config.image_start:
                yield context.draw_and_read_picture(settings)
            else:
                context.feed(word)
    finally:
        context.close_round(settings.keep_masks)
