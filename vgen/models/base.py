"""The contract of a generator: everything that the pipeline, training, conversion and the command line ask of a model.

A family says how it decodes (`start`, `predict`, `commit`, see samplers/types.py), what it learns from (`loss`), and where it
differs from what is written here. Nothing outside asks a model whether it has a method: all have all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from diffusers import ModelMixin
from torch import Tensor

from vgen.errors import VgenError
from vgen.exports import Exported
from vgen.models.conditions.base import Conditions
from vgen.samplers.choice import TokenChoice
from vgen.samplers.orders.base import BaseOrder
from vgen.samplers.types import Canvas, Condition, Grid, Prediction, State, Step, as_grid


class Generator(Exported):
    """A model that makes visual tokens from a condition. Families inherit it, and then diffusers' `ModelMixin` and `ConfigMixin`.

    These two are named by every family itself, because diffusers looks for them among the names of a component's module.
    A constructor calls `set_grids` and sets `vocabulary` (or calls `ClassConditional.set_vocabulary`).

    Config entries that others read: codes (size of the codebook), or channels of continuous tokens, or channels and levels of
    channels that are codes of their own; prefix_limit; condition_dropout.
    """

    # The kind of settings that its predictions take: has `of(Sampling)`, which refuses what does not fit.
    choice_kind: ClassVar[type] = TokenChoice
    # The smallest guidance scale it can be asked for. 0: towards the unconditional picture, too.
    least_guidance: ClassVar[float] = 0.0

    # Levels of the canvas, coarse first; most models have one.
    grids: tuple[Grid, ...]
    # What makes conditions; None: a frozen text encoder that `read_words` has not read yet.
    vocabulary: Conditions | None

    def set_grids(self, *grids: int | Sequence[int]) -> None:
        """Called by constructors: the levels of the canvas, coarse first, each as `as_grid` takes it."""
        self.grids = tuple(map(as_grid, grids))

    # ---------------------------------------------------------------- its tokens

    @property
    def grid(self) -> Grid:
        """(T, H, W) of the finished picture: the finest level."""
        return self.grids[-1]

    @property
    def tokens(self) -> dict[str, int | None]:
        """What a token is, for the tokenizer to agree: codes of one codebook, channels, or channels of so many levels each."""
        return {kind: self.config.get(kind) for kind in ("codes", "channels", "levels")}

    @property
    def prefix_limit(self) -> int:
        """Longest prefix of words that it takes, with what stands around them; 0: no limit of its own."""
        return self.config.get("prefix_limit", 0)

    def canvas(self, samples: int | Tensor) -> Canvas:
        """An empty canvas for its tokens, on its device. samples: B, or the [B] numbers of the pictures."""
        kinds = self.tokens
        codes = kinds["channels"] is None or kinds["levels"] is not None
        return Canvas.blank(self.grids, samples, self.device, kinds["channels"], codes=codes)

    def share_tables(self, tokenizer: ModelMixin) -> None:
        """Gives the tokenizer it works with what the two must have in common. VgenError for one that it cannot work with."""

    # ---------------------------------------------------------------- orders

    def default_order(self) -> BaseOrder:
        """The order that it is sampled in unless another one is asked for; of the finest level."""
        raise NotImplementedError

    def check_order(self, order: BaseOrder) -> None:
        """Raises VgenError for an order (of all levels) that it cannot follow."""

    def over_levels(self, order: BaseOrder, low_steps: int | None = None, seed: int = 0) -> BaseOrder:
        """`order` of the finest level, with its own orders of the others before it.

        low_steps: calls for these (None: its own number); seed: of the run, where they are random.
        """
        return order

    # ---------------------------------------------------------------- conditions

    def read_words(self, paths: Mapping[str, Path]) -> None:
        """Reads what makes conditions where that is not saved with the model: `text_encoder`, `tokenizer` or `model` -> a folder."""

    def check_condition(self, condition: Condition) -> None:
        """Raises VgenError unless `condition` is of the model's kind. Synchronises: once a run."""
        if self.vocabulary is not None:
            self.vocabulary.check(condition)

    def null(self, condition: Condition) -> Condition:
        """The unconditional row of guidance for `condition`, of equally many pictures."""
        return self.vocabulary.null(len(condition.mask))

    def drop(self, condition: Condition, uniform: Tensor | None = None) -> Condition:
        """Training: every row becomes unconditional with probability `condition_dropout`. uniform: [B] draws (None: drawn here)."""
        share = self.config.get("condition_dropout")
        if share is None:
            raise VgenError(
                f"{type(self).__name__} has no share of dropped conditions in its config; say one: `model.vocabulary.drop(condition, share)`"
            )
        return self.vocabulary.drop(condition, share, uniform)

    # ---------------------------------------------------------------- training

    def loss(self, condition: Condition, tokens: Tensor, **draws: Tensor) -> dict[str, Tensor]:
        """The objective `loss` and figures, fp32 scalars, of tokens [B, N] or [B, N, C] in raster order.

        draws: every random number of the objective, by the family's own names; where one may be left out it is drawn here.
        Conditions are dropped before (`drop`).
        """
        raise NotImplementedError

    # ---------------------------------------------------------------- decoding

    def start(self, conditions: Sequence[Condition], canvas: Canvas) -> State:
        """The memory of a run: reads the conditions, one per guidance row, and what the canvas knows. VgenError: they do not fit."""
        raise NotImplementedError

    def predict(self, state: State, step: Step, canvas: Canvas) -> Prediction:
        """What it says about the targets of a step: one call of the backbone, or as many as the prediction makes when it is drawn."""
        raise NotImplementedError

    def commit(self, state: State, step: Step, canvas: Canvas) -> None:
        """After a step was written. Most models have nothing to do: their next call feeds `canvas.fresh`."""
