"""FlexAR: a causal transformer over FlexTok's tokens, from coarse to fine, under a class or a prompt.

Published with "Search over Tokens" (EPFL-VILAB/search-over-tokens); the generator of FlexTok's paper (arXiv 2502.13967,
section 5) has the same form. The sequence is [start, token 0, token 1, …] with a learned table of positions; the output
of slot i predicts token i. A class is one vector added to the start; a prompt is read by cross-attention in every block. Ours: a
caption as the mean vector of its words, added to the start.

Any number of leading tokens is a picture, so a canvas may be shorter than the model's sequence.

What the release's config.yaml would say (kind of norm, biases, norms of queries and keys) was not seen: the parts are taken
from the file's keys, the kind of norm is an option. Parameter names are those of the published files behind
`models.ar_image_model.`.

Shapes: B batch, R guidance rows, N tokens, n slots at hand, P prompt tokens, D width, V codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vgen.checkpoints import load_exactly, read_state_dict
from vgen.errors import VgenError, nearest
from vgen.layers.cache import KVCache, remember
from vgen.layers.transformer import Checkpointed, llama_hidden
from vgen.models.base import Generator
from vgen.models.conditions.classes import ClassVocabulary, mean_vector, token_loss
from vgen.models.conditions.vocabulary import SavesVocabulary, Vocabulary
from vgen.models.flexar.blocks import NORMS, ClassBlock, TextBlock
from vgen.models.flexar.text import Prompts, drop_prompts, null_prompt
from vgen.samplers.orders.base import BaseOrder
from vgen.samplers.orders.registry import make_order
from vgen.samplers.predictions import Logits
from vgen.samplers.types import Canvas, Condition, Counters, Step

# name: (width, depth, heads) of the text-to-image models (the repository's configs). What the class-conditional one has is
# not published outside its config.yaml; `from_original` reads it from the file.
SIZES = {
    "113M": (768, 12, 12),
    "382M": (1152, 18, 18),
    "1B": (1664, 26, 26),
    "3B": (2304, 36, 36),
}
CONDITIONINGS = ("class", "words", "text")
HEAD_DIM = 64  # of all published sizes
PREFIXES = {"models.ar_image_model.": "", "models.text_encoder.mlp.": "text_mlp."}
OTHER_REPOSITORIES = ("image_tokenizer", "t5_embedder")  # parts that some files carry and that load from elsewhere


def size_config(size: str | None) -> dict[str, int]:
    """Constructor arguments of a named size (`SIZES`). None: nothing, `from_original` reads all of it from the file."""
    if size is None:
        return {}
    if size not in SIZES:
        raise VgenError(f"unknown FlexAR size {size!r}{nearest(size, SIZES)}; sizes: {', '.join(SIZES)}")
    return dict(zip(("width", "depth", "heads"), SIZES[size]))


class Inputs(nn.Module):
    """[start | embeddings of the tokens] plus a table of positions; the class (or the words) is added to the start."""

    def __init__(self, codes: int, tokens: int, width: int, positions: bool, classes: int):
        super().__init__()
        self.embedding = nn.Embedding(codes, width)
        self.sos_token_embed = nn.Parameter(torch.empty(1, 1, width))
        self.positional_embedding = nn.Parameter(torch.empty(tokens, width)) if positions else None
        self.cls_embedding = nn.Embedding(classes, width) if classes else None

    def classes(self, ids: Tensor, mask: Tensor) -> Tensor:
        """A class, or a caption's words [B, P], mask [B, P] -> their mean vector [B, D].

        The id behind the last class is none and adds nothing: no row stands for it.
        """
        count = self.cls_embedding.num_embeddings
        vectors = self.cls_embedding(ids.clamp_max(count - 1))
        return mean_vector(torch.where((ids < count)[..., None], vectors, 0.0), mask)

    def forward(self, start: Tensor | None, tokens: Tensor, slots: slice) -> Tensor:
        """start [B, D]: what is added to the start, where it is among the slots; tokens [B, n] or [B, n - 1] -> [B, n, D]."""
        x = self.embedding(tokens)
        if start is not None:
            x = torch.cat((self.sos_token_embed.expand(len(x), -1, -1), x), dim=1)
        if self.positional_embedding is not None:
            x = x + self.positional_embedding[slots]
        return x if start is None else torch.cat((x[:, :1] + start[:, None], x[:, 1:]), dim=1)


@dataclass
class FlexARState:
    """Memory of one run: slot 0 is the start, slot i + 1 token i."""

    cache: KVCache
    start: Tensor  # [R * B, D]: what the start token carries besides itself (zero, or the class)
    memory: list[tuple[Tensor, Tensor]]  # of every block: keys and values of the prompt
    mask: Tensor | None  # [R * B, P] of the prompt
    rows: int  # R
    counters: Counters


class FlexARModel(SavesVocabulary, Checkpointed, Generator, ModelMixin, ConfigMixin):
    """Class- or text-conditional generator of FlexTok tokens (module docstring).

    codes: visual vocabulary; tokens: N; width, depth, heads, hidden: as in SIZES (hidden: 8/3 of the width, rounded up to
    256); conditioning: "class" (`classes` labels), "words" (captions over a `Vocabulary` of `classes` entries, which training
    sets) or "text" (features of `text_width` numbers); positions: learned table, or none; norm: "layer" or "rms", norm_bias: whether norms have a bias; qk_norm: norms of queries and keys; bias: of linear layers but the MLPs and the head;
    post_norm: a norm behind the blocks; condition_dropout: share of samples without condition in training.

    faithful: sample classes as the release does. Its guidance has a bug: from the second token on the unconditional rows
    are conditioned on *class 0* (start token included, because nothing is cached there). Off: they stay unconditional.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ("ClassBlock", "TextBlock")
    _no_split_modules = ("ClassBlock", "TextBlock")
    size_config = staticmethod(size_config)

    @register_to_config
    def __init__(
        self,
        *,
        codes: int = 64000,
        tokens: int = 256,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int | None = None,
        conditioning: str = "class",
        classes: int = 1000,
        text_width: int = 2048,
        positions: bool = True,
        norm: str = "layer",
        norm_bias: bool = False,
        qk_norm: bool = True,
        bias: bool = False,
        post_norm: bool = True,
        condition_dropout: float = 0.1,
        faithful: bool = False,
    ):
        super().__init__()
        if width % heads:
            raise VgenError(f"width {width} must be a multiple of the {heads} heads")
        for name, value, known in (("conditioning", conditioning, CONDITIONINGS), ("norm", norm, NORMS)):
            if value not in known:
                raise VgenError(f"FlexAR's {name} is one of {', '.join(known)}, got {value!r}{nearest(value, known)}")
        self.set_grids(tokens)
        self.vocabulary: ClassVocabulary | Vocabulary | Prompts | None = None
        self.preprocessor = Inputs(codes, tokens, width, positions, 0 if conditioning == "text" else classes)
        self.text_mlp: nn.ModuleDict | None = None
        if conditioning == "class":
            self.vocabulary = ClassVocabulary(classes)
        elif conditioning == "text":
            layers = nn.Linear(text_width, text_width, bias=False), nn.Linear(text_width, width, bias=False)
            self.text_mlp = nn.ModuleDict(dict(zip(("fc1", "fc2"), layers)))
        block = TextBlock if conditioning == "text" else ClassBlock
        options = (width, heads, hidden or llama_hidden(width), bias, qk_norm, norm, norm_bias)
        self.trunk = nn.ModuleDict({"blocks": nn.ModuleList(block(*options) for _ in range(depth))})
        if post_norm:
            self.trunk["post_trunk_norm"] = NORMS[norm](width, norm_bias)
        self.head = nn.ModuleDict({"linear": nn.Linear(width, codes, bias=False)})
        self.gradient_checkpointing = False
        self._init_weights()

    def _init_weights(self) -> None:
        """N(0, 0.02) for matrices and tables; ours, the release's is muP's and its sizes are not stated."""
        for part in self.modules():
            if isinstance(part, (nn.Linear, nn.Embedding)):
                nn.init.normal_(part.weight, std=0.02)
                if getattr(part, "bias", None) is not None:
                    nn.init.zeros_(part.bias)
        for table in self.preprocessor.parameters(recurse=False):
            nn.init.normal_(table, std=0.02)

    # ---------------------------------------------------------------- files

    @classmethod
    def from_original(
        cls, source: str | Path | Mapping[str, Tensor], config: str | Mapping[str, Any] | None = None
    ) -> FlexARModel:
        """A model from a released file (or its state dict).

        config: a size of SIZES or constructor arguments; what it leaves open is read from the tensors (`file_config`), which is
        all but the kind of norm and the number of heads of a file without norms of queries and keys. Raises VgenError for
        another file, family or size.
        """
        state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
        state = {key: value for key, value in state.items() if not any(name in key for name in OTHER_REPOSITORIES)}
        for prefix, ours in PREFIXES.items():
            state = {key.replace(prefix, ours, 1): value for key, value in state.items()}
        options = cls.size_config(config) if isinstance(config, str) else dict(config or {})
        with torch.device("meta"):
            model = cls(**{**file_config(state), **options})
        load_exactly(model, state)
        return model.eval()

    from_single_file = from_original

    # ---------------------------------------------------------------- conditions

    def read_words(self, paths: Mapping[str, Path]) -> None:
        """Loads what makes conditions of prompts, the T5 in the folder `paths["text_encoder"]`, where the model takes any."""
        if self.text_mlp is not None:
            self.vocabulary = Prompts.from_pretrained(str(paths["text_encoder"]))

    def null(self, condition: Condition) -> Condition:
        """The unconditional row of guidance for `condition`: no class, no words, or the empty prompt that came with the prompts."""
        return self.vocabulary.null(len(condition.mask)) if self.text_mlp is None else null_prompt(condition)

    def drop(self, condition: Condition, uniform: Tensor | None = None) -> Condition:
        """Training: every row becomes unconditional with probability `condition_dropout`. uniform: [B] draws."""
        share, mask = self.config.condition_dropout, condition.mask
        uniform = torch.rand(len(mask), device=mask.device) if uniform is None else uniform
        if self.text_mlp is None:
            return self.vocabulary.drop(condition, share, uniform)
        return drop_prompts(condition, uniform < share)

    def check_condition(self, condition: Condition) -> None:
        """Raises VgenError unless `condition` is of the model's kind. Synchronises: once a run."""
        if self.text_mlp is None:
            self.vocabulary.check(condition)
            return
        features = condition.extras.get("features")
        width = self.config.text_width
        if features is None or features.dim() != 3 or features.shape[2] != width:
            found = "none" if features is None else list(features.shape)
            raise VgenError(
                f"this FlexAR takes prompts as features [B, P, {width}], got {found}; vgen.models.flexar.text.Prompts makes them"
            )

    def read_condition(self, condition: Condition) -> tuple[Tensor, list[Any], Tensor | None]:
        """What is added to the start [B, D], keys and values of the prompt for every block, and its mask [B, P]."""
        blocks = self.trunk["blocks"]
        if self.text_mlp is None:
            ids, mask = condition.ids.to(self.device), condition.mask.to(self.device)
            return self.preprocessor.classes(ids, mask), [None] * len(blocks), None
        features = condition.extras["features"].to(self.device, self.dtype)
        text = self.text_mlp["fc2"](F.gelu(self.text_mlp["fc1"](features), approximate="tanh"))
        start = text.new_zeros(len(text), self.config.width)
        return start, [block.cross_attn.memory(text) for block in blocks], condition.mask.to(self.device)

    # ---------------------------------------------------------------- shared by training and decoding

    def _run(
        self, x: Tensor, slots: slice, memory: Sequence[Any], mask: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """Blocks and head over the given slots: [B, n, D] -> [B, n, codes]."""
        for layer, block in enumerate(self.trunk["blocks"]):
            x = self._checkpointed(block, x, slots, remember(cache, layer, slots), memory[layer], mask)
        return self.head["linear"](self.trunk["post_trunk_norm"](x) if self.config.post_norm else x)

    def forward(self, condition: Condition, tokens: Tensor) -> Tensor:
        """Teacher-forced logits [B, n, codes] of tokens [B, n], n <= N, each given those before it."""
        start, memory, mask = self.read_condition(condition)
        slots = slice(0, tokens.shape[1])
        return self._run(self.preprocessor(start, tokens[:, :-1], slots), slots, memory, mask)

    def loss(self, condition: Condition, tokens: Tensor) -> dict[str, Tensor]:
        """Mean cross-entropy in nats per token, fp32, and accuracy. tokens [B, n]. The recipe drops conditions first (`drop`)."""
        return token_loss(self(condition, tokens), tokens)

    # ---------------------------------------------------------------- decoding (TokenModel)

    def default_order(self) -> BaseOrder:
        """Raster: from the first token to the last, which is from coarse to fine."""
        return make_order("raster", self.grid)

    def check_order(self, order: BaseOrder) -> None:
        """Raises VgenError for every other order."""
        expected = make_order("raster", order.grid)
        if order.calls != expected.calls or not all(map(torch.equal, order.groups(), expected.groups())):
            raise VgenError(
                f"FlexAR decodes one token a call, from coarse to fine: use the order raster, not {order.name!r}"
            )

    @torch.no_grad()
    def start(self, conditions: Sequence[Condition], canvas: Canvas) -> FlexARState:
        """Reads the conditions, one per guidance row. The canvas has 1 to N positions; known ones enter with the first call."""
        config, count = self.config, canvas.values.shape[1]
        if count > config.tokens:
            raise VgenError(f"this FlexAR makes up to {config.tokens} tokens a picture, the canvas has {count}")
        for condition in conditions:
            self.check_condition(condition)
        starts, memories, masks = zip(*(self.read_condition(condition) for condition in conditions))
        start = torch.cat(starts)
        memory, mask = list(memories[0]), None
        if self.text_mlp is not None:
            memory = [tuple(torch.cat(parts) for parts in zip(*layer)) for layer in zip(*memories)]
            mask = torch.cat(masks)
        cache = KVCache(
            config.depth, len(start), config.heads, count, config.width // config.heads, self.device, self.dtype
        )
        return FlexARState(cache, start, memory, mask, len(conditions), Counters())

    def plan(self, state: FlexARState, step: Step) -> slice:
        """The slots of this call: those behind the last call's, up to the one that answers."""
        feed = step.feed
        if feed is None or step.size != 1 or not torch.equal(feed.source, feed.slot):
            raise VgenError("FlexAR decodes one token a call, from coarse to fine; use the order raster")
        # Host integers. A feed lists given tokens before decoded ones; here their slots are one run. Slot 0 is position -1.
        return slice(int(feed.slot.min()) + 1, int(feed.slot.max()) + 2)

    def run(self, state: FlexARState, slots: slice, values: Tensor) -> Tensor:
        """values: tokens [R * B, n] of the slots (the start has none) -> logits [R * B, 1, codes] of the last slot."""
        start = state.start if slots.start == 0 else None
        x = self.preprocessor(start, values, slots)
        return self._run(x, slots, state.memory, state.mask, state.cache)[:, -1:]

    @torch.no_grad()
    def predict(self, state: FlexARState, step: Step, canvas: Canvas) -> Logits:
        """One call of the backbone over R * B rows."""
        slots = self.plan(state, step)
        if self.config.faithful and self.config.conditioning == "class" and state.rows > 1 and step.index == 1:
            slots = slice(0, slots.stop)  # the start has changed, and with it everything behind it
            state.start = self._as_released(state.start, canvas.batch)
        values = canvas.values[:, max(slots.start - 1, 0) : slots.stop - 1].repeat(state.rows, 1)
        logits = self.run(state, slots, values)
        state.counters.add(len(logits), slots.stop - slots.start)
        return Logits(rearrange(logits.float(), "(r b) m v -> r b m v", r=state.rows))

    def _as_released(self, start: Tensor, batch: int) -> Tensor:
        """The release's bug (class docstring): [R * B, D] with class 0 in all rows but those of the first condition."""
        class_zero = self.preprocessor.cls_embedding.weight[:1]
        return torch.cat((start[:batch], class_zero.expand(len(start) - batch, -1)))


def file_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments that the tensors of a FlexAR file tell, names without the release's prefixes (`PREFIXES`).

    Raises VgenError for another family.
    """
    wanted = ("preprocessor.embedding.weight", "trunk.blocks.0.mlp.fc1.weight", "trunk.blocks.0.norm_1.weight")
    if missing := [key for key in wanted if key not in state]:
        raise VgenError(f"this is no FlexAR checkpoint: it has no {missing[0]}; name the file of a FlexAR model")
    codes, width = state["preprocessor.embedding.weight"].shape
    text = "trunk.blocks.0.cross_attn.Wq.weight" in state
    attention = "trunk.blocks.0." + ("self_attn" if text else "attn")
    head_norm = state.get(f"{attention}.q_norm.weight")
    table = state.get("preprocessor.positional_embedding")
    options = {
        "codes": codes,
        "width": width,
        "depth": 1 + max(int(key.split(".")[2]) for key in state if key.startswith("trunk.blocks.")),
        "heads": width // (HEAD_DIM if head_norm is None else len(head_norm)),
        "hidden": len(state["trunk.blocks.0.mlp.fc1.weight"]),
        "conditioning": "text" if text else "class",
        "positions": table is not None,
        "norm_bias": "trunk.blocks.0.norm_1.bias" in state,
        "qk_norm": head_norm is not None,
        "bias": f"{attention}.qkv.bias" in state,
        "post_norm": "trunk.post_trunk_norm.weight" in state,
    }
    if table is not None:
        options["tokens"] = len(table)
    if text and "text_mlp.fc1.weight" in state:
        options["text_width"] = state["text_mlp.fc1.weight"].shape[1]
    if "preprocessor.cls_embedding.weight" in state:
        options["classes"] = len(state["preprocessor.cls_embedding.weight"])
    return options
