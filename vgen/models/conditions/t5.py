"""What stands in front of the visual tokens of LlamaGen, PAR and NAR: a class, or a caption as FLAN-T5 features.

`T5Captions` needs the extra `text` (transformers, ftfy, beautifulsoup4) and imports it when it is first used.
"""

from __future__ import annotations

import html
import types
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.errors import VgenError
from vgen.models.conditions.base import Conditions
from vgen.models.conditions.classes import mean_vector
from vgen.samplers.types import Condition


class ClassEmbedding(nn.Module):
    """One row per class (or word), and the null class behind them if the model has one."""

    def __init__(self, classes: int, width: int, null: bool):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + null, width)

    def forward(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """One token [B, 1, width] and its mask [B, 1]: the class, or the mean of the caption's words."""
        device = self.embedding_table.weight.device
        mask = condition.mask.to(device)
        token = mean_vector(self.embedding_table(condition.ids.to(device)), mask)
        return token[:, None], mask[:, :1]


class TextEmbedding(nn.Module):
    """fc2(gelu(fc1 features)) without biases; zero features (padding) stay zero."""

    def __init__(self, features: int, tokens: int, width: int):
        super().__init__()
        self.cap_proj = nn.ModuleDict(
            {"fc1": nn.Linear(features, width, bias=False), "fc2": nn.Linear(width, width, bias=False)}
        )
        # Never trained, yet part of every checkpoint: its random values are the null caption.
        self.register_buffer("uncond_embedding", torch.randn(tokens, features) / features**0.5)

    def forward(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """extras["features"] [B, P, C] -> [B, P, width] and the mask [B, P]."""
        features = condition.extras["features"].to(self.uncond_embedding)
        prefix = self.cap_proj["fc2"](F.gelu(self.cap_proj["fc1"](features), approximate="tanh"))
        return prefix, condition.mask.to(prefix.device)

    def null(self, condition: Condition) -> Condition:
        """The null caption in every row, under the mask of the prompt."""
        return self.drop(condition, torch.ones_like(condition.mask[:, 0]))

    def drop(self, condition: Condition, dropped: Tensor) -> Condition:
        """The whole null caption where dropped [B]."""
        features = condition.extras["features"]
        null = self.uncond_embedding.to(features)
        return Condition(
            condition.ids, condition.mask, {"features": torch.where(dropped[:, None, None], null, features)}
        )


def text_condition(features: Tensor, mask: Tensor) -> Condition:
    """features [B, P, C] of a text encoder, already left-padded (`left_pad`), and their mask [B, P]."""
    ids = torch.empty(len(features), 0, dtype=torch.long, device=features.device)
    return Condition(ids, mask.bool(), {"features": features})


def left_pad(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the padding from the right to the left and zeroes it, as LlamaGen and NAR were trained.

    features [B, P, C], mask [B, P] (true or 1: a token; padding at the end).
    """
    length = mask.shape[1]
    rows = (torch.arange(length, device=mask.device) + mask.sum(dim=1, keepdim=True)) % length  # [B, P]
    flipped = mask.flip(1)
    moved = features.gather(1, rows[..., None].expand_as(features))
    return moved * flipped[..., None].to(features), flipped


@dataclass
class T5Captions(Conditions):
    """Captions to conditions with a T5 encoder (FLAN-T5-XL in all published models).

    tokenizer, encoder: of transformers; tokens: length of the prefix.
    """

    tokenizer: Any
    encoder: Any
    tokens: int = 120
    encodes: ClassVar[bool] = True

    @classmethod
    def from_pretrained(
        cls, name: str = "google/flan-t5-xl", tokens: int = 120, dtype: torch.dtype = torch.bfloat16
    ) -> T5Captions:
        """Loads (and downloads, if need be) tokenizer and encoder. bfloat16 is what the published models were fed."""
        require_text_extra()
        from transformers import AutoTokenizer, T5EncoderModel

        return cls(AutoTokenizer.from_pretrained(name), T5EncoderModel.from_pretrained(name, torch_dtype=dtype), tokens)

    @torch.no_grad()
    def captions(self, captions: Sequence[str], limit: int = 0, strict: bool = False) -> Condition:
        """One condition for a batch of captions, cleaned and left-padded.

        limit: unused, the prefix always has `tokens` tokens. strict: a caption that does not fit is a VgenError; else its
        end is cut off, as in the published models.
        """
        cleaned = [clean_caption(clean_caption(caption)) for caption in captions]  # twice, as published
        if strict:
            for caption, ids in zip(captions, self.tokenizer(cleaned)["input_ids"]):
                if len(ids) > self.tokens:
                    raise VgenError(
                        f"a prompt may have {self.tokens} tokens, {caption[:40]!r}... has {len(ids)}; shorten it"
                    )
        batch = self.tokenizer(
            cleaned, max_length=self.tokens, padding="max_length", truncation=True, return_tensors="pt"
        ).to(self.encoder.device)
        features = self.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return text_condition(*left_pad(features["last_hidden_state"].detach(), batch["attention_mask"].bool()))


def clean_caption(caption: str) -> str:
    """The caption cleaning of DeepFloyd-IF, by way of diffusers (which lacks one `strip` of the released LlamaGen script)."""
    cleaner, bad_punctuation = _cleaner()
    return cleaner(types.SimpleNamespace(bad_punct_regex=bad_punctuation), caption)


@cache
def _cleaner() -> tuple[Any, Any]:
    """diffusers' method, with an `html.unescape` that strips: the strip stands right after that call in the release."""
    require_text_extra()
    from diffusers.pipelines.deepfloyd_if.pipeline_if import IFPipeline

    original = IFPipeline._clean_caption
    stripping = types.SimpleNamespace(unescape=lambda text: html.unescape(text).strip())
    function = types.FunctionType(original.__code__, {**original.__globals__, "html": stripping}, "clean_caption")
    return function, IFPipeline.bad_punct_regex


def require_text_extra() -> None:
    try:
        import bs4  # noqa: F401
        import ftfy  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise VgenError(
            f"captions need {error.name}, which is not installed: install the extra 'text' (pip install 'vgen[text]')"
        ) from error
