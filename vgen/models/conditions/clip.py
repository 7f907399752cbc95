"""Captions as MaskGen and the TA-TiTok decoder read them: three outputs of one CLIP text tower (arXiv 2103.00020, 2501.07730).

Needs the extra `text` (transformers) and imports it when it is first used. Shapes: B captions, P = 77 tokens, C = 768 width.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vgen.checkpoints import load_exactly, read_state_dict
from vgen.errors import VgenError
from vgen.models.conditions.base import Conditions
from vgen.models.conditions.t5 import require_text_extra
from vgen.samplers.types import Condition

REPOSITORY = "openai/clip-vit-large-patch14-336"
# Activations of the tower, by their name in transformers. OpenAI trained with quick_gelu; some releases of open_clip that run
# MaskGen's code build exact GELU with the same weights, and which one MaskGen was trained with is not known.
ACTIVATIONS = ("quick_gelu", "gelu")
# Names of OpenAI's and open_clip's files -> those of transformers. In a block, the fused attention weights are cut in three.
OUTSIDE = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
INSIDE = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
IGNORED = ("logit_scale", "visual.", "attn_mask")


@dataclass(frozen=True)
class ClipFeatures:
    """What models read of a batch of captions. Padding is not masked anywhere: it is part of what they were trained on."""

    text: Tensor  # [B, P, C]: states before the last block, without the final norm (MaskGen)
    pooled: Tensor  # [B, E]: the projected state of the end token (MaskGen)
    final: Tensor  # [B, P, C]: states of the last block under the final norm (the TA-TiTok decoder)

    def condition(self) -> Condition:
        """As a condition of MaskGen; `extras["decoder_text"]` is what its tokenizer's decoder reads."""
        batch, length, _ = self.text.shape
        ids = torch.empty(batch, 0, dtype=torch.long, device=self.text.device)
        mask = torch.ones(batch, length, dtype=torch.bool, device=self.text.device)
        return Condition(ids, mask, {"text": self.text, "pooled": self.pooled, "decoder_text": self.final})


@dataclass
class ClipCaptions(Conditions):
    """Captions to conditions. tokenizer (None: ids only), encoder: of transformers (`CLIPTextModelWithProjection`)."""

    tokenizer: Any
    encoder: Any
    encodes: ClassVar[bool] = True
    _empty: dict[torch.device, Condition] = field(default_factory=dict, repr=False)

    @classmethod
    def from_pretrained(
        cls, name: str = REPOSITORY, activation: str = "quick_gelu", dtype: torch.dtype = torch.float32
    ) -> ClipCaptions:
        """Loads (and downloads, if need be) the tokenizer and the text tower of a CLIP repository or folder."""
        require_text_extra()
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer

        _check_activation(activation)
        encoder = CLIPTextModelWithProjection.from_pretrained(name, hidden_act=activation).to(dtype)
        return cls(CLIPTokenizer.from_pretrained(name), encoder.eval().requires_grad_(False))

    @classmethod
    def from_original(
        cls,
        source: str | Path | Mapping[str, Tensor],
        heads: int = 12,
        activation: str = "quick_gelu",
        tokenizer: Any = None,
    ) -> ClipCaptions:
        """From a file in OpenAI's or open_clip's names (a whole CLIP or its text tower). Sizes but `heads` are read from it."""
        require_text_extra()
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        _check_activation(activation)
        state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
        state = {key: value for key, value in state.items() if not key.startswith(IGNORED)}
        if "token_embedding.weight" not in state or "text_projection" not in state:
            raise VgenError(
                "this file holds no CLIP text tower (token_embedding, text_projection); expected OpenAI's or open_clip's names"
            )
        words, width = state["token_embedding.weight"].shape
        blocks = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("transformer.resblocks."))
        config = CLIPTextConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            projection_dim=state["text_projection"].shape[1],
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            max_position_embeddings=len(state["positional_embedding"]),
            hidden_act=activation,
            bos_token_id=0,  # neither is used: see `features`
            eos_token_id=2,
        )
        encoder = CLIPTextModelWithProjection(config)
        load_exactly(encoder, transformers_names(state))
        return cls(tokenizer, encoder.eval().requires_grad_(False))

    @torch.no_grad()
    def features(self, ids: Tensor) -> ClipFeatures:
        """ids [B, P] int64 with the end token, the largest id, behind the words."""
        ids = ids.to(self.encoder.device)
        tower = self.encoder.text_model(input_ids=ids, output_hidden_states=True)
        final = tower.last_hidden_state  # under the final norm
        # Not transformers' own pooling, which looks for a configured end token: the released code takes the largest id.
        end = final[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]
        return ClipFeatures(tower.hidden_states[-2], self.encoder.text_projection(end), final)

    def tokenize(self, captions: Sequence[str], strict: bool = False) -> Tensor:
        """[B, P] ids: start, lower-cased words, end, zeros; the end of a long caption is cut off, or a VgenError if `strict`."""
        length = self.encoder.config.max_position_embeddings
        rows = torch.zeros(len(captions), length, dtype=torch.long)
        cleaned = [clean_prompt(caption) for caption in captions]
        for row, caption, ids in zip(rows, captions, self.tokenizer(cleaned)["input_ids"]):
            if len(ids) > length and strict:
                raise VgenError(
                    f"a prompt may have {length - 2} tokens, {caption[:40]!r}... has {len(ids) - 2}; shorten it"
                )
            ids = ids if len(ids) <= length else [*ids[: length - 1], self.tokenizer.eos_token_id]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def captions(self, captions: Sequence[str], limit: int = 0, strict: bool = False) -> Condition:
        """One condition for a batch of captions. limit: unused, the number of tokens is CLIP's."""
        return self.features(self.tokenize(captions, strict)).condition()

    def null(self, batch: int) -> Condition:
        """The empty caption in every row: the unconditional row of guidance. Encoded once."""
        device = self.encoder.device
        if device not in self._empty:
            self._empty[device] = self.captions([""])
        return self._empty[device].take(torch.zeros(batch, dtype=torch.long, device=device))


def transformers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an OpenAI or open_clip text tower under the names of transformers."""
    renamed = {"text_projection.weight": state["text_projection"].T.contiguous()}
    for key, value in state.items():
        if key in OUTSIDE:
            renamed[OUTSIDE[key]] = value
        elif key.startswith("transformer.resblocks."):
            _, _, block, name = key.split(".", 3)
            prefix = f"text_model.encoder.layers.{block}"
            if name.startswith("attn.in_proj_"):
                kind = name.removeprefix("attn.in_proj_")
                for part, rows in zip("qkv", value.chunk(3)):
                    renamed[f"{prefix}.self_attn.{part}_proj.{kind}"] = rows.contiguous()
            elif name.startswith("attn.out_proj"):
                renamed[f"{prefix}.self_{name}"] = value
            else:
                module, _, kind = name.rpartition(".")
                renamed[f"{prefix}.{INSIDE.get(module, module)}.{kind}"] = value
        elif key != "text_projection":
            renamed[key] = value  # unknown: the check of the loader says so
    return renamed


def clean_prompt(caption: str) -> str:
    """As OpenAI's and open_clip's tokenizers: repaired text, HTML entities resolved twice, single spaces, lower case."""
    require_text_extra()
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split()).lower()


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise VgenError(f"the activation of a CLIP tower is {' or '.join(ACTIVATIONS)}, got {activation!r}")
