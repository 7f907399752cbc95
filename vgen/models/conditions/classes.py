"""Conditions that are one vector a picture: a class, as published, or the mean of a caption's word vectors, which is ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vgen.errors import VgenError, nearest
from vgen.models.conditions.base import Conditions
from vgen.models.conditions.class_names import class_number
from vgen.models.conditions.vocabulary import SavesVocabulary, Vocabulary
from vgen.samplers.types import Condition


@dataclass(frozen=True)
class ClassVocabulary(Conditions):
    """One prefix id per class, 0 to classes - 1, and the null class `classes` behind them. class_names: by label; empty: not known."""

    classes: int
    class_names: tuple[str, ...] = ()
    takes_labels: ClassVar[bool] = True

    def __len__(self) -> int:
        return self.classes

    def class_number(self, label: int | str) -> int:
        """The number of a class that is given by number or by name. VgenError for a class that is not there."""
        return class_number(label, self.classes, self.class_names)

    def labels(self, labels: Sequence[int | str], strict: bool = True) -> Condition:
        """One class a row, by number or name: ids [B, 1]. strict: VgenError for a class that is not there; else numbers below 0
        (pictures without a label) become the null class."""
        return self._condition([self.class_number(label) if strict or label >= 0 else self.classes for label in labels])

    def named(self, class_names: Sequence[str]) -> ClassVocabulary:
        """The same classes with names."""
        return ClassVocabulary(self.classes, tuple(class_names))

    def null(self, batch: int) -> Condition:
        """The null class: the unconditional row of classifier-free guidance."""
        return self._condition([self.classes] * batch)

    def captions(self, captions: Sequence[str], limit: int = 0, strict: bool = True) -> Condition:
        """Raises VgenError: a class-conditional model takes no prompt."""
        names = f", such as {self.class_names[0]!r}" if self.class_names else ""
        raise VgenError(
            f"this model knows {self.classes} classes and no words; give a class label{names} instead of a prompt"
        )

    def drop(self, condition: Condition, share: float, uniform: Tensor | None = None) -> Condition:
        """Training: every row becomes the null class with probability `share`. uniform: [B] draws."""
        ids = condition.ids
        uniform = torch.rand(len(ids), device=ids.device) if uniform is None else uniform
        return Condition(ids.masked_fill((uniform < share)[:, None], self.classes), condition.mask, condition.extras)

    def check(self, condition: Condition) -> None:
        """Raises VgenError unless `condition` is one class (or null) a row. Synchronises: once a run, never in the loop."""
        ids = condition.ids
        if ids.dim() != 2 or ids.shape[1] != 1:
            raise VgenError(f"this model takes one class id a row, [B, 1], got ids of shape {list(ids.shape)}")
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < 0 or high > self.classes:
            raise VgenError(
                f"class ids of this model are 0 to {self.classes - 1}, and {self.classes} for none, got {low} to {high}"
            )

    @staticmethod
    def _condition(rows: list[int]) -> Condition:
        ids = torch.tensor(rows, dtype=torch.long)[:, None]
        return Condition(ids, torch.ones_like(ids, dtype=torch.bool))


CONDITIONINGS = ("class", "words")


class ClassConditional(SavesVocabulary):
    """For models with `conditioning`, `classes` and `condition_dropout` in their config.

    conditioning "class": `classes` labels, as published. "words": captions over a `Vocabulary` of `classes` entries,
    which belongs to the model as `vocabulary` (training sets it); the condition is the mean of the word vectors.
    """

    def set_vocabulary(self, allowed: Sequence[str] = CONDITIONINGS) -> None:
        """Called by constructors. Raises VgenError for an unknown conditioning."""
        kind = self.config.conditioning
        if kind not in allowed:
            raise VgenError(f"the conditioning is {' or '.join(allowed)}, got {kind!r}{nearest(kind, allowed)}")
        self.vocabulary: ClassVocabulary | Vocabulary | None = None
        if kind == "class":
            self.vocabulary = ClassVocabulary(self.config.classes)


def mean_vector(vectors: Tensor, mask: Tensor) -> Tensor:
    """[B, P, D], mask [B, P] -> [B, D]: the mean over what the mask shows; exactly the vector where P = 1."""
    weight = mask.to(vectors)
    return (vectors * weight[..., None]).sum(dim=1) / weight.sum(dim=1, keepdim=True)


def token_loss(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Mean cross-entropy in nats per token, fp32, and accuracy. logits [B, n, V], targets [B, n] int64."""
    loss = F.cross_entropy(rearrange(logits.float(), "b n v -> b v n"), targets)
    return {"loss": loss, "accuracy": (logits.detach().argmax(dim=-1) == targets).float().mean()}
