"""The channels of one token, one after another: TokenBridge's head (arXiv 2503.16430).

A token has C channels of V levels each, far too many combinations for one softmax. A small causal transformer over the
channels, with the backbone's vector of the token as its condition, says p(channel | the channels before it). Every slot
has an embedding table and an output layer of its own, and its norms are modulated by condition + a learned vector of the slot.

Training and sampling differ in what enters the first slot: the bare condition in training, the condition plus the vector
of slot 0 in sampling. The published weights live with it, so both are kept; do not "fix" one.

Parameter names are those of the released files. Shapes: n tokens, C channels, V levels, D features, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vgen.errors import VgenError
from vgen.layers.attention import Mask
from vgen.layers.cache import KVCache, Memory, remember
from vgen.layers.modulation import FinalNorm, ModulatedBlock, Modulation, SelfAttention
from vgen.layers.transformer import Checkpointed, GeluMLP

EPS = 1e-6
# (place in the sequence of channels, logits [n, V]) -> the chosen levels [n] int64
Choose = Callable[[int, Tensor], Tensor]


class ChannelHead(Checkpointed, nn.Module):
    """p(levels of a token | features), channel by channel (module docstring).

    channels: C; levels: V; features: D; width, layers, heads, hidden: of the transformer; order: the channels in the order in
    which they are made. Levels and logits are in the tokenizer's order of channels everywhere outside of this class.
    """

    def __init__(
        self,
        *,
        channels: int,
        levels: int,
        features: int,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        order: Sequence[int],
    ):
        super().__init__()
        if width % heads:
            raise VgenError(f"the head's width {width} must be a multiple of its {heads} heads")
        self.heads = heads
        self.set_order(order, channels)
        self.condition_proj = nn.Linear(features, width)
        self.channel_embed = nn.Parameter(torch.empty(1, channels, width))
        self.timesteps_embeddings = nn.Parameter(torch.empty(1, channels, width))
        self.token_embeddings = nn.ModuleList(nn.Embedding(levels, width) for _ in range(channels - 1))
        self.channel_blocks = nn.ModuleList(
            ModulatedBlock(
                SelfAttention(width, heads, bias=True, norm_eps=EPS), GeluMLP(width, hidden), affine=True, eps=EPS
            )
            for _ in range(layers)
        )
        self.channel_norm = nn.LayerNorm(width, eps=EPS)
        self.channel_final = FinalNorm(width)  # normalises a second time, as released
        self.channel_heads = nn.ModuleList(nn.Linear(width, levels) for _ in range(channels))
        self.gradient_checkpointing = False

    def set_order(self, order: Sequence[int], channels: int) -> None:
        """Which channel stands in which place. Raises VgenError unless every channel occurs once."""
        if sorted(order) != list(range(channels)):
            raise VgenError(
                f"the order of channels must name each of 0 to {channels - 1} once, got {', '.join(map(str, order))}"
            )
        self.order = tuple(order)

    def reset_parameters(self) -> None:
        """Xavier for linear layers, N(0, 0.02) for the tables of slots, N(0, 1) for levels, zero modulations (released code)."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
            elif isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight)
        for part in self.modules():
            if isinstance(part, Modulation):
                part.reset_parameters()
        for table in (self.channel_embed, self.timesteps_embeddings):
            nn.init.normal_(table, std=0.02)

    def forward(self, features: Tensor, levels: Tensor, sampling: bool = False) -> Tensor:
        """Teacher-forced logits [n, C, V]. features [n, D], levels [n, C] int64.

        sampling: what enters the first slot is that of sampling, so that the logits are those `sample` meets.
        """
        condition = self.condition_proj(features)
        modulating = condition[:, None] + self.timesteps_embeddings  # [n, C, W]
        first = modulating[:, 0] if sampling else condition
        given = zip(self.token_embeddings, self.order)  # the channel made last stands in no slot
        x = torch.stack((first, *(table(levels[:, channel]) for table, channel in given)), dim=1) + self.channel_embed
        size = len(self.order)
        mask = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
        x = self._run(x, modulating, mask)
        logits = {channel: head(x[:, i]) for i, (channel, head) in enumerate(zip(self.order, self.channel_heads))}
        return torch.stack([logits[channel] for channel in range(size)], dim=1)

    def sample(self, features: Tensor, choose: Choose) -> Tensor:
        """Makes the channels one after another: features [n, D] -> levels [n, C] int64; `choose` draws each.

        Keys and values are cached, so every channel enters once. The original runs the prefix again for each channel.
        """
        condition = self.condition_proj(features)
        (rows, width), size = condition.shape, len(self.order)
        cache = KVCache(
            len(self.channel_blocks), rows, self.heads, size, width // self.heads, condition.device, condition.dtype
        )
        levels: dict[int, Tensor] = {}
        for place, channel in enumerate(self.order):
            modulating = condition + self.timesteps_embeddings[:, place]
            x = modulating if place == 0 else self.token_embeddings[place - 1](levels[self.order[place - 1]])
            x = x + self.channel_embed[:, place]
            x = self._run(x[:, None], modulating[:, None], None, cache, slice(place, place + 1))
            levels[channel] = choose(place, self.channel_heads[place](x[:, 0]))
        return torch.stack([levels[channel] for channel in range(size)], dim=1)

    def _run(
        self, x: Tensor, modulating: Tensor, mask: Mask, cache: KVCache | None = None, slots: slice = slice(None)
    ) -> Tensor:
        """Blocks and norms: [n, f, W] -> [n, f, W] for the f slots at hand."""
        for layer, block in enumerate(self.channel_blocks):
            memory = remember(cache, layer, slots)
            x = self._checkpointed(self._layer, block, x, modulating, mask, memory)
        return self.channel_final(self.channel_norm(x), modulating)

    @staticmethod
    def _layer(block: ModulatedBlock, x: Tensor, modulating: Tensor, mask: Mask, memory: Memory | None) -> Tensor:
        return block(x, block.adaLN_modulation(modulating), mask, memory=memory)
