"""Lumina-mGPT: Chameleon's language model making pictures (arXiv 2408.02657, 2405.09818), in raster order or by ZipAR (2412.04062).

The sequence is [prompt, <start of image>, <height>, <width>, row 0, <end of line>, row 1, …]: every row is read from the
token before it, which is the width token for row 0 and a forced <end of line> for the others. So a row can start before
the row above is complete, without a stand-in: orders need every row from left to right, and nothing else.

A slot of the cache is the token's place in that sequence; a query sees the slots up to its own that hold a token.
Parameter names are those of the Hugging Face files.

Shapes: B batch, R guidance rows, P prompt slots, H x W grid, f fed tokens, m targets, D head size, K codes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange, repeat
from torch import Tensor, nn

from vgen.checkpoints import load_exactly, read_state_dict
from vgen.errors import VgenError, nearest
from vgen.layers.attention import attend
from vgen.layers.cache import KVCache, Memory
from vgen.layers.mmrope import rotate
from vgen.layers.norm import RMSNorm
from vgen.layers.transformer import merge_heads, split_heads
from vgen.models.base import Generator
from vgen.models.lumina.prompts import BOS, PAD, LuminaPrompts
from vgen.samplers.orders import make_order
from vgen.samplers.orders.base import BaseOrder
from vgen.samplers.predictions import Logits
from vgen.samplers.types import Canvas, Condition, Counters, Grid, Step, grid_size
from vgen.tokenizers_vis.chameleon import WORDS, image_token_ids

# name: (width, layers, heads, hidden). The Chameleon defaults of ZipAR's release; no published config.json could be read.
SIZES = {"7B": (4096, 32, 32, 11008)}
# Word ids of Chameleon's vocabulary: specs/zipar.md, section 2.
START_OF_IMAGE, END_OF_LINE, SIZE_ZERO, FIRST_CODE = 8197, 8803, 8804, 4
HEADER = 3  # start of image, height, width
UNUSED = "model.vqmodel."  # the VQ encoder inside the files: pictures are coded by `ChameleonVQGAN`
Tables = tuple[Tensor, Tensor]


def size_config(size: str) -> dict[str, int]:
    """Constructor arguments of a named size (`SIZES`)."""
    if size not in SIZES:
        raise VgenError(f"unknown Lumina size {size!r}{nearest(size, SIZES)}; sizes: {', '.join(SIZES)}")
    return dict(zip(("width", "layers", "heads", "hidden"), SIZES[size]))


class HeadNorm(nn.Module):
    """LayerNorm over a head's channels with weights per model-parallel shard [shards, D], each for its share of the heads."""

    def __init__(self, shards: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shards, head_dim))
        self.bias = nn.Parameter(torch.zeros(shards, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, n, D] -> the same."""
        weight, bias = (
            repeat(part, "s d -> (s h) 1 d", h=x.shape[1] // len(part)) for part in (self.weight, self.bias)
        )
        return F.layer_norm(x, x.shape[-1:], eps=1e-5) * weight + bias


class Attention(nn.Module):
    """Causal attention with normalised queries and keys, half-rotated rope, and fewer key heads than query heads if asked for."""

    def __init__(self, width: int, heads: int, key_heads: int, shards: int):
        super().__init__()
        size = width // heads
        self.heads, self.key_heads = heads, key_heads
        self.q_proj = nn.Linear(width, heads * size, bias=False)
        self.k_proj = nn.Linear(width, key_heads * size, bias=False)
        self.v_proj = nn.Linear(width, key_heads * size, bias=False)
        self.o_proj = nn.Linear(heads * size, width, bias=False)
        self.q_norm = HeadNorm(shards, size)
        self.k_norm = HeadNorm(shards, size)

    def forward(self, x: Tensor, rope: Tables, mask: Tensor, memory: Memory) -> Tensor:
        """[B, f, width] -> the same; keys and values enter the cache at the given slots first."""
        query = rotate(self.q_norm(split_heads(self.q_proj(x), self.heads)), rope)
        key = rotate(self.k_norm(split_heads(self.k_proj(x), self.key_heads)), rope)
        key, value = memory.extend(key, split_heads(self.v_proj(x), self.key_heads))
        if self.key_heads < self.heads:
            key, value = (part.repeat_interleave(self.heads // self.key_heads, dim=1) for part in (key, value))
        return self.o_proj(merge_heads(attend(query, key, value, mask)))


class MLP(nn.Module):
    """down(silu(gate x) * up x), without biases."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LuminaBlock(nn.Module):
    """x += attention(norm x), then x += mlp(norm x)."""

    def __init__(self, width: int, heads: int, key_heads: int, hidden: int, shards: int):
        super().__init__()
        self.input_layernorm = RMSNorm(width)
        self.self_attn = Attention(width, heads, key_heads, shards)
        self.post_attention_layernorm = RMSNorm(width)
        self.mlp = MLP(width, hidden)

    def forward(self, x: Tensor, rope: Tables, mask: Tensor, memory: Memory) -> Tensor:
        """[B, f, width] -> the same."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, memory)
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass
class LuminaState:
    """Memory of one run."""

    cache: KVCache
    image_ids: Tensor  # [K]: the word of every code
    prefix: Tensor  # [R * B, P + 3] words fed in the first call: prompt, start of image, height, width
    filled: Tensor  # [R * B, slots] bool: which slots hold a token; padding never does
    lengths: Tensor  # [R * B] words of the prefix without padding: the width token's position is one less
    rows: int  # R
    counters: Counters


@dataclass(frozen=True)
class Plan:
    """One call. `places` counts from the width token (0): column c of row r is 1 + c + r (W + 1), and an end of line
    stands before every row but the first."""

    positions: Tensor  # [f] canvas positions whose tokens enter; -1: an end of line
    places: Tensor  # [f]
    reads: Tensor  # [m] which of the fed tokens (behind the prefix of the first call) answer
    first: bool


class LuminaModel(Generator, ModelMixin, ConfigMixin):
    """Text-conditional generator over image codes that are words of one vocabulary (module docstring).

    words: vocabulary; codes: image codes among them; grid: (H, W) of even sides; width, layers, heads, hidden: as in SIZES;
    key_heads: heads of keys and values (None: as many); norm_shards: rows of the query and key norms; theta: base of the rope.
    `image_ids` [codes] says which word a code is; by default the words from 4 on, in order.
    """

    size_config = staticmethod(size_config)
    _repeated_blocks = ("LuminaBlock",)
    _no_split_modules = ("LuminaBlock",)

    @register_to_config
    def __init__(
        self,
        words: int = 65536,
        codes: int = 8192,
        grid: Sequence[int] = (1, 48, 48),
        width: int = 4096,
        layers: int = 32,
        heads: int = 32,
        key_heads: int | None = None,
        hidden: int = 11008,
        norm_shards: int = 1,
        theta: float = 10000.0,
    ):
        super().__init__()
        key_heads = key_heads or heads
        if width % heads or heads % key_heads or heads % norm_shards or key_heads % norm_shards:
            raise VgenError(
                f"width {width} must be a multiple of the {heads} heads, and these of the {key_heads} key heads; both of the "
                f"{norm_shards} norm shards"
            )
        self.set_grids(grid)
        check_grid(self.grid, words)
        self.vocabulary: LuminaPrompts | None = None
        self.image_ids = torch.arange(FIRST_CODE, FIRST_CODE + codes, device="cpu")
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(words, width),
                "layers": nn.ModuleList(
                    LuminaBlock(width, heads, key_heads, hidden, norm_shards) for _ in range(layers)
                ),
                "norm": RMSNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, words, bias=False)

    # ---------------------------------------------------------------- files

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> LuminaModel:
        """A model with fresh weights of a published size; `changes` are further constructor arguments."""
        return cls(**{**size_config(size), **changes})

    @classmethod
    def from_original(
        cls, source: str | Path | Mapping[str, Tensor], config: str | Mapping[str, Any] = "7B"
    ) -> LuminaModel:
        """A model from the published folder (shards and config.json, whose numbers win over `config`), file or state dict.

        config: a size of SIZES or constructor arguments. Raises VgenError for another family or size, and for Chameleon's
        34B variant, whose blocks norm after attention.
        """
        options = size_config(config) if isinstance(config, str) else dict(config)
        if not isinstance(source, Mapping) and (Path(source) / "config.json").is_file():
            options |= published_options(Path(source) / "config.json")
        state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
        with torch.device("meta"):
            model = cls(**options)
        load_exactly(model, state, ignore=(UNUSED,))
        return model.eval()

    from_single_file = from_original

    def read_words(self, paths: Mapping[str, Path]) -> None:
        """Reads Chameleon's words from the folder `paths["tokenizer"]`: how prompts are written, and which word a code is."""
        self.vocabulary = LuminaPrompts.load(paths["tokenizer"] / WORDS, self.grid)
        self.image_ids = image_token_ids(paths["tokenizer"] / WORDS, self.config.codes)

    def save_beside(self, folder: Path) -> None:
        """Chameleon's words."""
        if self.vocabulary is not None:
            self.vocabulary.tokenizer.save(str(folder / WORDS))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> LuminaModel:
        """As diffusers, plus the words where they were saved."""
        model = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        folder = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        if (folder / WORDS).is_file():
            model.read_words({"tokenizer": folder})
        return model

    # ---------------------------------------------------------------- orders and guidance

    def default_order(self) -> BaseOrder:
        """ZipAR with the window of its script: 15 image tokens (16 counting the start of a row)."""
        return make_order("zip", self.grid, window=min(15, self.grid[2]))

    def check_order(self, order: BaseOrder) -> None:
        """Raises VgenError unless every row is decoded from left to right."""
        check_grid(order.grid, self.config.words)
        _, height, width = order.grid
        calls = order.step_ids().view(height, width)
        if (calls[:, 1:] <= calls[:, :-1]).any():
            raise VgenError(
                f"Lumina reads every row from left to right, one token of a row a call; order {order.name!r} does not: use raster or zip"
            )

    def null(self, condition: Condition) -> Condition:
        """The unconditional row: as many words as the prompt, <s> and then padding that is *not* masked, as released."""
        ids = torch.full_like(condition.ids, PAD)
        ids[:, 0] = BOS
        return Condition(ids, condition.mask)

    # ---------------------------------------------------------------- decoding (TokenModel)

    @torch.no_grad()
    def start(self, conditions: Sequence[Condition], canvas: Canvas) -> LuminaState:
        """Lays out the sequences; the prompts enter with the first call. Prompts are right-padded and masked."""
        check_grid(canvas.grid, self.config.words)
        _, height, width = canvas.grid
        if canvas.unknown_count() < grid_size(canvas.grid):
            raise VgenError(
                "Lumina decodes whole pictures here: it takes no known tokens; use the native model or LlamaGen"
            )
        header = torch.tensor([START_OF_IMAGE, SIZE_ZERO + height // 2, SIZE_ZERO + width // 2], device=self.device)
        ids = torch.cat([condition.ids for condition in conditions]).to(self.device)
        mask = torch.cat([condition.mask for condition in conditions]).to(self.device)
        prefix = torch.cat((ids, header.expand(len(ids), -1)), dim=1)
        slots = prefix.shape[1] + height * (width + 1) - 1
        filled = F.pad(mask, (0, slots - mask.shape[1]), value=False)
        config = self.config
        heads, size = config.key_heads or config.heads, config.width // config.heads
        cache = KVCache(config.layers, len(ids), heads, slots, size, self.device, self.dtype)
        words = self.image_ids.to(self.device)
        return LuminaState(cache, words, prefix, filled, mask.sum(dim=1) + HEADER, len(conditions), Counters())

    def plan(self, state: LuminaState, step: Step, canvas: Canvas) -> Plan:
        """What the last step wrote enters, and an end of line before every row that starts now."""
        width = canvas.grid[2]
        targets = step.targets.to(self.device)
        fresh = targets[:0] if step.index == 0 else canvas.fresh[0]
        starts = targets[(targets % width == 0) & (targets > 0)]
        positions = torch.cat((fresh, torch.full_like(starts, -1)))
        places = torch.cat((self._places(fresh, width), self._places(starts, width) - 1))
        order = places.argsort()
        positions, places = positions[order], places[order]
        wanted = self._places(targets, width) - 1  # every target is read from the token before it
        if step.index == 0:
            reads = torch.full_like(targets, -1)  # the width token, the last of the prefix
        else:
            reads = torch.searchsorted(places, wanted)
        return Plan(positions, places, reads, step.index == 0)

    @staticmethod
    def _places(positions: Tensor, width: int) -> Tensor:
        return 1 + positions % width + positions // width * (width + 1)

    def run(self, state: LuminaState, plan: Plan, words: Tensor) -> Tensor:
        """Feeds words [R * B, f] and answers the targets: logits of the image codes [R * B, m, K]. Device only."""
        prefix = state.prefix.shape[1]
        slots, distance = plan.places + prefix - 1, plan.places
        if plan.first:
            front = torch.arange(prefix, device=words.device)
            slots, distance = torch.cat((front, slots)), torch.cat((front - prefix + 1, distance))
        state.filled[:, slots] |= slots >= prefix - HEADER  # padding of prompts stays hidden
        every = torch.arange(state.filled.shape[1], device=words.device)
        mask = ((every <= slots[:, None]) & state.filled[:, None, :]) | (every == slots[:, None])
        # The header follows the prompt without a gap, whatever the padding between their slots; padding has any position.
        own = torch.where(slots < prefix - HEADER, slots, state.lengths[:, None] - 1 + distance)
        x, rope = self.model["embed_tokens"](words), self._rope(own)
        for layer, block in enumerate(self.model["layers"]):
            x = block(x, rope, mask[:, None], Memory(state.cache, layer, slots, mask.shape[-1]))
        return self.lm_head(self.model["norm"](x[:, plan.reads]))[..., state.image_ids].float()

    def _rope(self, positions: Tensor) -> Tables:
        """cos and sin [B, f, D] fp32 of positions [B, f]."""
        size = self.config.width // self.config.heads
        exponent = torch.arange(0, size, 2, device=positions.device).float() / size
        angles = positions[..., None].float() / self.config.theta**exponent
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    @torch.no_grad()
    def predict(self, state: LuminaState, step: Step, canvas: Canvas) -> Logits:
        """One call of the backbone."""
        plan = self.plan(state, step, canvas)
        codes = canvas.values[:, plan.positions.clamp(min=0)]
        words = torch.where(plan.positions < 0, END_OF_LINE, state.image_ids[codes])
        words = words.repeat(state.rows, 1)
        words = torch.cat((state.prefix, words), dim=1) if plan.first else words
        logits = self.run(state, plan, words)
        state.counters.add(*words.shape)
        return Logits(rearrange(logits, "(r b) m v -> r b m v", r=state.rows))


def check_grid(grid: Grid, words: int) -> None:
    """Raises VgenError unless the size tokens can say this grid: pictures of even sides, counted in steps of 2."""
    frames, height, width = grid
    if frames != 1 or height % 2 or width % 2:
        raise VgenError(f"Lumina's grids are HxW with even sides (32 pixels a step), got {'x'.join(map(str, grid))}")
    if SIZE_ZERO + max(height, width) // 2 >= words:
        raise VgenError(f"the vocabulary of {words} words has no size token for a grid of {height}x{width}")


def published_options(path: Path) -> dict[str, Any]:
    """Constructor arguments in a Hugging Face config.json of Lumina-mGPT or Chameleon."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        options = {
            "words": found["vocab_size"],
            "width": found["hidden_size"],
            "layers": found["num_hidden_layers"],
            "heads": found["num_attention_heads"],
            "key_heads": found.get("num_key_value_heads"),
            "hidden": found["intermediate_size"],
            "norm_shards": found.get("model_parallel_size", 1),
            "theta": found.get("rope_theta", 10000.0),
        }
    except (ValueError, KeyError) as error:
        raise VgenError(f"{path} is not a config of Lumina-mGPT ({error}); give the folder of its files") from error
    if found.get("swin_norm"):
        raise VgenError(
            f"{path} is of a model that norms after attention and MLP (swin_norm, Chameleon 34B); vgen runs the 7B kind"
        )
    return options
