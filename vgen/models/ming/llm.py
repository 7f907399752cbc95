"""The language model of Ming-UniVision: Ling-lite (BailingMoe), run by the stock GraniteMoeShared of transformers.

The two architectures are the same: pre-norm blocks with RMS norms, grouped-query attention with half-rotated rope, and in
every block a mixture of experts beside one shared expert. Granite takes the softmax over the chosen experts' logits, Bailing
renormalises the chosen probabilities, which is equal. Two things are ours: routers with a gate per modality, and rope
without buffers. Names of the published files are translated in `ming_files.py`.

This module imports transformers (5.14 or newer, where the experts are stacked tensors) and is imported only where a model
is made. Shapes: B rows, n tokens, L keys, D width, E experts, H heads, V words.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GraniteMoeSharedConfig
from transformers.models.granitemoeshared.modeling_granitemoeshared import (
    GraniteMoeSharedModel,
    GraniteMoeSharedTopKRouter,
)

from vgen.errors import VgenError
from vgen.models.ming.files import TEXT_GATE

# transformers 5.24 renamed the argument.
CACHE = "cache" if "cache" in inspect.signature(GraniteMoeSharedModel.forward).parameters else "past_key_values"


def _router_places() -> dict[str, int]:
    """Where the stock router returns its logits, weights and indices: transformers swapped the first and the last.

    Asked of a router over 3 experts of which 2 are chosen: the three differ in width and dtype.
    """
    with torch.device("meta"):
        router = GraniteMoeSharedTopKRouter(SimpleNamespace(hidden_size=1, num_local_experts=3, num_experts_per_tok=2))
        answer = router(torch.empty(1, 1))
    return {
        "logits" if part.shape[-1] == 3 else "weights" if part.is_floating_point() else "index": place
        for place, part in enumerate(answer)
    }


ROUTER_PLACES = _router_places()
INIT = 0.006  # standard deviation of fresh weights, from the release's config
# The stock blocks hand nothing but hidden states to their router, so the tokens' modalities reach it beside the call.
_modality: ContextVar[Tensor | None] = ContextVar("modality", default=None)


@contextmanager
def routed(modality: Tensor | None) -> Iterator[None]:
    """Inside, routers use the gates of `modality` [B, n] int64, as numbered in `ming_files.py` (None: all text)."""
    token = _modality.set(modality)
    try:
        yield
    finally:
        _modality.reset(token)


class ModalityRouter(GraniteMoeSharedTopKRouter):
    """Granite's router with a gate per modality over the same experts: weight [gates, E, D]."""

    def __init__(self, config: GraniteMoeSharedConfig, gates: int):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(gates, *self.weight.shape))
        nn.init.normal_(self.weight, std=config.initializer_range)

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """[B n, D] -> logits [B n, E] fp32, weights and indices [B n, k] of the chosen experts, in the stock router's order."""
        modality = _modality.get()
        if modality is None or len(self.weight) == 1:
            logits = F.linear(hidden, self.weight[TEXT_GATE])
        else:
            every = torch.einsum("n d, g e d -> n g e", hidden, self.weight)
            logits = every[torch.arange(len(hidden), device=hidden.device), modality.flatten()]
        logits = logits.float()
        chosen, index = logits.topk(self.top_k, dim=-1)
        parts = {"logits": logits, "weights": chosen.softmax(dim=-1).type_as(hidden), "index": index}
        return tuple(parts[name] for name in sorted(parts, key=ROUTER_PLACES.__getitem__))


class Rotary(nn.Module):
    """Granite's rope tables, made anew in every call: buffers would lose precision when a model is cast to bf16."""

    def __init__(self, head_dim: int, theta: float):
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """x for its dtype, positions [B, n] -> cosines and sines [B, n, head_dim], both halves alike."""
        exponent = torch.arange(0, self.head_dim, 2, device=x.device) / self.head_dim
        angle = positions[..., None].float() / self.theta**exponent
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


class MingLLM(nn.Module):
    """Trunk and word head. What Ming-UniVision asks of a language model is what is public here.

    words: V; key_heads: heads of keys and values; experts_per_token: how many run; expert_hidden, shared_hidden: widths of
    the SwiGLUs; gates: 3 with a gate per modality, else 1; padding: the word whose embedding is not trained.
    """

    def __init__(
        self,
        *,
        words: int,
        width: int,
        layers: int,
        heads: int,
        key_heads: int,
        head_dim: int,
        experts: int,
        experts_per_token: int,
        expert_hidden: int,
        shared_hidden: int,
        gates: int,
        theta: float,
        eps: float,
        positions: int,
        padding: int,
    ):
        super().__init__()
        if heads % key_heads or not 0 < experts_per_token <= experts:
            raise VgenError(
                f"the {heads} heads must be a multiple of the {key_heads} key heads, and experts_per_token from 1 to "
                f"{experts}, got {experts_per_token}"
            )
        config = GraniteMoeSharedConfig(
            vocab_size=words,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            num_local_experts=experts,
            num_experts_per_tok=experts_per_token,
            intermediate_size=expert_hidden,
            shared_intermediate_size=shared_hidden,
            attention_multiplier=head_dim**-0.5,
            max_position_embeddings=positions,
            rms_norm_eps=eps,
            initializer_range=INIT,
            pad_token_id=padding,
            bos_token_id=None,
            eos_token_id=padding,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
        config.head_dim = head_dim  # no field of this config, but its attention looks for it
        self.model = GraniteMoeSharedModel(config)
        self.model.rotary_emb = Rotary(head_dim, theta)
        for layer in self.model.layers:
            layer.block_sparse_moe.router = ModalityRouter(config, gates)
        self.lm_head = nn.Linear(width, words, bias=False)
        nn.init.normal_(self.lm_head.weight, std=INIT)

    def embed(self, ids: Tensor) -> Tensor:
        """[B, n] int64 -> [B, n, D]."""
        return self.model.embed_tokens(ids)

    def forward(
        self,
        embeds: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: DynamicCache | None = None,
        modality: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [B, n, D] -> hidden states [B, n, D] behind the last norm. New keys and values enter `cache`.

        mask: [B, L] bool, which keys are visible (cached ones first), beside causality; positions: [B, n] int64, the rope's;
        modality: [B, n] int64 (None: all text).
        """
        with routed(modality):
            output = self.model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                use_cache=cache is not None,
                **{CACHE: cache},
            )
        return output.last_hidden_state

    @staticmethod
    def new_cache() -> DynamicCache:
        """An empty cache. It is copied whenever it grows: some 100 MB a visual token, beside some GB of weights that are read."""
        return DynamicCache()

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] fp32."""
        return self.lm_head(hidden).float()
