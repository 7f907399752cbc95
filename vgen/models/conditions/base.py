"""What the pipeline and training ask of whatever makes conditions: words, classes, captions through a frozen encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from torch import Tensor

from vgen.errors import VgenError
from vgen.samplers.types import Condition


class Conditions:
    """Makes conditions of what a picture shows, `model.vocabulary`. What a kind does not say is as here: prompts and no classes."""

    # Whether labels of classes make conditions, how many classes there are and how they are called by label (empty: not known).
    takes_labels: bool = False
    classes: int = 0
    class_names: tuple[str, ...] = ()
    # All words that a prompt may use; None: it is free text.
    words: Sequence[str] | None = None
    # Whether there is nothing to choose from, so that pictures are made without a prompt.
    unconditional: bool = False
    # Whether captions go through a frozen text encoder: then a condition is features, which take memory.
    encodes: bool = False

    def captions(self, captions: Sequence[str], limit: int = 0, strict: bool = True) -> Condition:
        """One condition a caption. limit: the longest prefix (0: as long as the kind allows); strict: what does not fit is a
        VgenError, else it is cut off."""
        raise NotImplementedError

    def class_number(self, label: int | str) -> int:
        """The number of a class that is given by number or by name. VgenError for a class that is not there."""
        raise VgenError("this model takes prompts and knows no classes; give a prompt")

    def labels(self, labels: Sequence[int | str], strict: bool = True) -> Condition:
        """One condition a class, given by number or name. strict: VgenError for a class that is not there; else a number below 0
        is a picture without a class."""
        raise VgenError("this model takes prompts and knows no classes; give a prompt")

    def named(self, class_names: Sequence[str]) -> Self:
        """The same with names of its classes."""
        return self

    def null(self, batch: int) -> Condition:
        """Nothing, for `batch` pictures: the unconditional row of classifier-free guidance."""
        raise VgenError(
            "what makes conditions here has none for no prompt; ask the model for it: `model.null(condition)`"
        )

    def drop(self, condition: Condition, share: float, uniform: Tensor | None = None) -> Condition:
        """Training: every row becomes unconditional with probability `share`. uniform: [B] draws (None: drawn here)."""
        raise VgenError(f"vgen does not train on conditions of {type(self).__name__}")

    def check(self, condition: Condition) -> None:
        """Raises VgenError unless `condition` is of this kind. Synchronises: once a run."""
