"""MaskGIT over TiTok's 1-D tokens: two networks, ViT (TiTok-L-32, B-64) and U-ViT (S-128) (arXiv 2406.07550, 2202.04200).

The sequence is [class, L tokens]; the output at the class is dropped. One embedding table holds codes, the mask, classes and
the null class, in this order. Parameter names are those of the released files. Shapes as in masked.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vgen.layers.bert import EPS as BERT_EPS
from vgen.layers.bert import BertBlock
from vgen.layers.vit import SkipBlock, ViTBlock
from vgen.models.conditions.classes import ClassConditional, mean_vector
from vgen.models.masked.base import MaskedTokenModel, init_weights
from vgen.samplers.orders import make_order
from vgen.samplers.orders.base import BaseOrder
from vgen.samplers.types import Condition, grid_size

EPS = 1e-5  # U-ViT's norms


class MaskGIT(ClassConditional, MaskedTokenModel):
    """What the two networks share: the meaning of the embedding table, and the condition."""

    def rows(self) -> int:
        """Rows of the embedding table: codes, mask, classes, null class."""
        return self.config.codes + 1 + self.config.classes + 1

    def class_rows(self, condition: Condition, table: nn.Embedding) -> tuple[Tensor]:
        """The condition vectors [B, D] of a batch."""
        rows = table(condition.ids.to(self.device) + self.config.codes + 1)
        return (mean_vector(rows, condition.mask.to(self.device)),)

    def default_order(self) -> BaseOrder:
        """By confidence, in 8 calls at the most."""
        return make_order("confidence", self.grid, steps=min(8, grid_size(self.grid)))


class BertEmbeddings(nn.Module):
    """Word + position + type, normalised. The type is always 0, and its row is part of every file."""

    def __init__(self, words: int, positions: int, width: int, dropout: float):
        super().__init__()
        self.word_embeddings = nn.Embedding(words, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=BERT_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, n, D]: rows of the word table -> [B, n, D]."""
        x = x + self.token_type_embeddings.weight[0] + self.position_embeddings.weight[: x.shape[1]]
        return self.dropout(self.LayerNorm(x))


class MaskGITViTModel(MaskGIT, ModelMixin, ConfigMixin):
    """The post-norm network of TiTok-L-32 and B-64 (BERT's). Its head stands by itself: no last norm, not tied.

    codes: visual vocabulary; conditioning: class, or words (`ClassConditional`); classes: the null class not counted; grid:
    (1, 1, L) for 1-D tokens; width, layers, heads, hidden: as in SIZES; dropout, attention_dropout: in training;
    condition_dropout: share of null classes in training; mask_schedule, unmasked_weight, label_smoothing: of the loss.
    """

    # TiTok, table 1, and the configs of the released files; 177 M parameters both.
    SIZES: ClassVar = {
        name: {"codes": 4096, "grid": [1, 1, length], "width": 768, "layers": 24, "heads": 16, "hidden": 3072}
        for name, length in (("L-32", 32), ("B-64", 64))
    }
    IGNORED = ("model.embeddings.position_ids",)  # a counter that old exports carry
    _repeated_blocks = ("BertBlock",)
    _no_split_modules = ("BertBlock",)

    @register_to_config
    def __init__(
        self,
        codes: int = 4096,
        conditioning: str = "class",
        classes: int = 1000,
        grid: Sequence[int] = (1, 1, 32),
        width: int = 768,
        layers: int = 24,
        heads: int = 16,
        hidden: int = 3072,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        condition_dropout: float = 0.1,
        mask_schedule: str = "arccos",
        unmasked_weight: float = 0.1,
        label_smoothing: float = 0.1,
    ):
        super().__init__()
        self.set_vocabulary()
        self.set_stack(grid, width, heads)
        blocks = (BertBlock(width, heads, hidden, dropout, attention_dropout) for _ in range(layers))
        self.model = nn.ModuleDict(
            {
                "embeddings": BertEmbeddings(self.rows(), 1 + grid_size(self.grid), width, dropout),
                "encoder": nn.ModuleDict({"layer": nn.ModuleList(blocks)}),
                "lm_head": nn.Linear(width, codes),
            }
        )
        init_weights(self, truncated=False)

    def context(self, condition: Condition) -> tuple[Tensor]:
        """The class vector [B, D], before positions and norm."""
        return self.class_rows(condition, self.model["embeddings"].word_embeddings)

    def run(self, context: tuple[Tensor], ids: Tensor) -> Tensor:
        """ids [B, L] -> logits [B, L, codes]."""
        embeddings = self.model["embeddings"]
        x = embeddings(torch.cat((context[0][:, None], embeddings.word_embeddings(ids)), dim=1))  # [B, 1 + L, D]
        for block in self.model["encoder"]["layer"]:
            x = self._checkpointed(block, x)
        return self.model["lm_head"](x[:, 1:])


class MaskGITUViTModel(MaskGIT, ModelMixin, ConfigMixin):
    """The pre-norm network of TiTok-S-128 with long skips between its halves (U-ViT, arXiv 2209.12152); no dropout.

    layers: an even number; one more block stands in the middle. The other arguments are those of `MaskGITViTModel`.
    """

    SIZES: ClassVar = {
        "S-128": {"codes": 4096, "grid": [1, 1, 128], "width": 1024, "layers": 20, "heads": 16, "hidden": 4096}
    }  # 295 M parameters
    _repeated_blocks = ("ViTBlock", "SkipBlock")
    _no_split_modules = ("ViTBlock", "SkipBlock")

    @register_to_config
    def __init__(
        self,
        codes: int = 4096,
        conditioning: str = "class",
        classes: int = 1000,
        grid: Sequence[int] = (1, 1, 128),
        width: int = 1024,
        layers: int = 20,
        heads: int = 16,
        hidden: int = 4096,
        condition_dropout: float = 0.1,
        mask_schedule: str = "arccos",
        unmasked_weight: float = 0.1,
        label_smoothing: float = 0.1,
    ):
        super().__init__()
        self.set_vocabulary()
        self.set_stack(grid, width, heads)
        shape, options = (width, heads, hidden), {"eps": EPS, "bias": False}
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid_size(self.grid), width))
        self.embeddings = nn.Embedding(self.rows(), width)
        self.in_blocks = nn.ModuleList(ViTBlock(*shape, **options) for _ in range(layers // 2))
        self.mid_block = ViTBlock(*shape, **options)
        self.out_blocks = nn.ModuleList(SkipBlock(*shape, **options) for _ in range(layers // 2))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.lm_head = nn.Linear(width, codes)
        init_weights(self)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def context(self, condition: Condition) -> tuple[Tensor]:
        """The class vector [B, D], before positions."""
        return self.class_rows(condition, self.embeddings)

    def run(self, context: tuple[Tensor], ids: Tensor) -> Tensor:
        """ids [B, L] -> logits [B, L, codes]."""
        x = torch.cat((context[0][:, None], self.embeddings(ids)), dim=1) + self.pos_embed  # [B, 1 + L, D]
        skips = []
        for block in self.in_blocks:
            x = self._checkpointed(block, x)
            skips.append(x)
        x = self._checkpointed(self.mid_block, x)
        for block in self.out_blocks:
            x = self._checkpointed(block, x, skips.pop())
        return self.lm_head(self.norm(x[:, 1:]))
