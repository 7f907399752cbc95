"""Prompts of FlexAR text-to-image: T5 features as they are, and those of the empty prompt as the null condition.

Needs the extra `text` (transformers), which is imported when it is first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vgen.errors import VgenError
from vgen.models.conditions.base import Conditions
from vgen.samplers.types import Condition

LIMIT = 512  # T5 was trained with no longer texts


def prompt_condition(features: Tensor, mask: Tensor, null_features: Tensor, null_mask: Tensor) -> Condition:
    """A condition of features [B, P, C] with mask [B, P] (True: a token) that carries its null: [Q, C] and [Q].

    The encoder is frozen and not part of the model, so the empty prompt's features travel with those of the prompt.
    """
    batch, length = mask.shape
    extra = len(null_mask) - length
    features, mask = F.pad(features, (0, 0, 0, max(extra, 0))), F.pad(mask.bool(), (0, max(extra, 0)))
    null_features, null_mask = F.pad(null_features, (0, 0, 0, -min(extra, 0))), F.pad(null_mask, (0, -min(extra, 0)))
    ids = torch.empty(batch, 0, dtype=torch.long, device=features.device)
    null = {
        "null_features": null_features.expand(batch, -1, -1),
        "null_mask": null_mask.bool().expand(batch, -1),
    }
    return Condition(ids, mask, {"features": features, **null})


def null_prompt(condition: Condition) -> Condition:
    """The empty prompt in every row of a `prompt_condition`."""
    extras = {**condition.extras, "features": condition.extras["null_features"]}
    return Condition(condition.ids, condition.extras["null_mask"], extras)


def drop_prompts(condition: Condition, dropped: Tensor) -> Condition:
    """The empty prompt where dropped [B]."""
    null = null_prompt(condition)
    features = torch.where(dropped[:, None, None], null.extras["features"], condition.extras["features"])
    mask = torch.where(dropped[:, None], null.mask, condition.mask)
    return Condition(condition.ids, mask, {**condition.extras, "features": features})


@dataclass
class Prompts(Conditions):
    """Prompts to conditions with a T5 encoder (FLAN-T5-XL in all published models). tokenizer, encoder: of transformers."""

    tokenizer: Any
    encoder: Any
    encodes: ClassVar[bool] = True

    @classmethod
    def from_pretrained(cls, name: str = "google/flan-t5-xl", dtype: torch.dtype = torch.bfloat16) -> Prompts:
        """Loads (and downloads, if need be) tokenizer and encoder."""
        try:
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError as error:
            raise VgenError(
                "prompts need transformers, which is not installed: install the extra 'text' (pip install 'vgen[text]')"
            ) from error
        return cls(AutoTokenizer.from_pretrained(name), T5EncoderModel.from_pretrained(name, torch_dtype=dtype))

    @torch.no_grad()
    def captions(self, captions: Sequence[str], limit: int = 0, strict: bool = False) -> Condition:
        """One condition for a batch of prompts, right-padded to the longest: padding is masked and changes nothing.

        limit: longest prompt in T5 tokens (0: 512). strict: a longer one is a VgenError; else its end is cut off.
        """
        limit = limit or LIMIT
        if strict:
            for caption, ids in zip(captions, self.tokenizer(list(captions))["input_ids"]):
                if len(ids) > limit:
                    raise VgenError(f"a prompt may have {limit} tokens, {caption[:40]!r}... has {len(ids)}; shorten it")
        # The empty prompt last: T5 turns it into its end token, so it has features of its own.
        batch = self.tokenizer(
            [*captions, ""], max_length=limit, padding="longest", truncation=True, return_tensors="pt"
        ).to(self.encoder.device)
        mask = batch["attention_mask"]
        features = self.encoder(input_ids=batch["input_ids"], attention_mask=mask)["last_hidden_state"]
        return prompt_condition(features[:-1], mask[:-1], features[-1], mask[-1])
