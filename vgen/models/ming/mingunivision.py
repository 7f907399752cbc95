"""Ming-UniVision (arXiv 2510.06590): a language model that reads and makes pictures as continuous tokens of MingTok.

    hidden state -> vision head -> flow head -> latent -> semantic feature -> connector -> next input of the language model

A visual token is an ordinary position of the causal language model, without 2-D positions. Picture generation is
`decode()` in raster order: `predict` gives the flow of the next latent, `commit` expands the drawn latent to its semantic feature
(MingTok's causal decoder, with a cache of its own) and runs the language model on it. Words are drawn in an ordinary loop
(`ming_dialogue.py`), which `branch`es into a picture at <image>. `start` instead makes pictures of prompts that every guidance
row has read by itself: standard guidance, as in the first version of the release.

The language model needs the extra `text` (transformers); it is imported when a model is made. Names of the published files
are translated in `ming_files.py`. Shapes: B samples, R guidance rows, n tokens of a call, L keys, N visual tokens of C
channels, D width, F channels of a semantic feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange, repeat
from torch import Tensor, nn

from vgen.checkpoints import load_exactly, read_state_dict
from vgen.errors import VgenError, nearest
from vgen.models.base import Generator
from vgen.models.ming.files import IMAGE_GATE, published_names
from vgen.models.ming.flow_head import MingFlowHead
from vgen.models.ming.guidance import cache_rows, positions_of
from vgen.models.ming.prompts import END, END_OF_IMAGE, PATCH, START_OF_IMAGE, WORDS, MingPrompts
from vgen.samplers.choice import FlowChoice
from vgen.samplers.orders import make_order
from vgen.samplers.orders.base import BaseOrder
from vgen.samplers.predictions import Flow
from vgen.samplers.types import Canvas, Condition, Counters, Step, grid_size
from vgen.tokenizers_vis.mingtok.mingtok import MingTok
from vgen.tokenizers_vis.mingtok.nets import SemanticMemory

if TYPE_CHECKING:
    from transformers import DynamicCache

    from vgen.models.ming.llm import MingLLM

# Keyword arguments of MingUniVisionModel: Ling-lite with the builder's defaults of the flow head. 18.8 B parameters.
SIZES: dict[str, dict[str, Any]] = {"16b-a3b": {}}
UNUSED = ("audio", "talker", "linear_proj_audio")  # parts of a larger model whose config the release kept


def size_config(size: str) -> dict[str, Any]:
    """Constructor arguments of a named size (`SIZES`)."""
    if size not in SIZES:
        raise VgenError(f"unknown Ming-UniVision size {size!r}{nearest(size, SIZES)}; sizes: {', '.join(SIZES)}")
    return dict(SIZES[size])


@dataclass
class MingState:
    """Memory of a picture that is being made. Rows are [R B], guidance rows first."""

    cache: DynamicCache
    mask: Tensor  # [R B, L] bool: keys that a row sees, up to the picture's last token
    length: int  # keys in the cache
    position: Tensor  # [R B] of the next token
    hidden: Tensor  # [R B, D] of the last token
    memory: SemanticMemory  # B rows: all guidance rows have the same features
    features: Tensor  # [B, N, F]
    rows: int  # R
    goes_on: bool  # text follows the picture, so its last token enters the cache, too
    counters: Counters


class MingUniVisionModel(Generator, ModelMixin, ConfigMixin):
    """One model that answers in words and pictures (module docstring).

    words, width, layers, heads, key_heads, head_dim, experts, experts_per_token, expert_hidden, shared_hidden, theta, eps,
    positions: of the language model, see `MingLLM`; modality_gates: routers with a gate for text, pictures and audio;
    connector_layers: linear layers from features to D; head_width, head_layers, head_ratio: of the flow head; grid: (H, W)
    of a picture that is made; channels: of its latents; mingtok: arguments of the tokenizer; understanding_size: pixels per
    side of pictures that are looked at; end, image_start, image_patch, image_end: ids of the special words.
    """

    choice_kind: ClassVar[type] = FlowChoice
    size_config = staticmethod(size_config)
    # Recomputed blocks would not see the modalities of their tokens (`ming_llm.routed`).
    _supports_gradient_checkpointing = False
    _repeated_blocks = ("HeadBlock", "ViTBlock")  # nor would compiled blocks of the language model
    _no_split_modules = ("GraniteMoeSharedDecoderLayer", "ViTBlock", "HeadBlock")
    _keep_in_fp32_modules: ClassVar[list[str]] = MingTok._keep_in_fp32_modules

    @register_to_config
    def __init__(
        self,
        *,
        words: int = 126464,
        width: int = 2048,
        layers: int = 28,
        heads: int = 16,
        key_heads: int = 4,
        head_dim: int = 128,
        experts: int = 64,
        experts_per_token: int = 6,
        expert_hidden: int = 1408,
        shared_hidden: int = 2816,
        modality_gates: bool = True,
        theta: float = 600000.0,
        eps: float = 1e-5,
        positions: int = 32768,
        connector_layers: int = 2,
        head_width: int = 3072,
        head_layers: int = 12,
        head_ratio: int = 4,
        grid: Sequence[int] = (16, 16),
        channels: int = 32,
        mingtok: Mapping[str, Any] | None = None,
        understanding_size: int = 1024,
        end: int = 126081,
        image_start: int = 126347,
        image_patch: int = 126346,
        image_end: int = 126348,
    ):
        super().__init__()
        self.set_grids(grid)
        specials = {END: end, START_OF_IMAGE: image_start, PATCH: image_patch, END_OF_IMAGE: image_end}
        if max(specials.values()) >= words:
            raise VgenError(f"the ids of the special words must be below the vocabulary of {words}, got {specials}")
        if connector_layers < 1:
            raise VgenError(f"the connector has at least 1 layer, got {connector_layers}")
        self.specials = specials
        self.prompts: MingPrompts | None = None
        self.llm: MingLLM = _language_model()(
            words=words,
            width=width,
            layers=layers,
            heads=heads,
            key_heads=key_heads,
            head_dim=head_dim,
            experts=experts,
            experts_per_token=experts_per_token,
            expert_hidden=expert_hidden,
            shared_hidden=shared_hidden,
            gates=3 if modality_gates else 1,
            theta=theta,
            eps=eps,
            positions=positions,
            padding=end,
        )
        self.vis_head = nn.Sequential(nn.Linear(width, head_width), nn.LayerNorm(head_width, eps=1e-6))
        self.diffloss = MingFlowHead(channels, head_width, head_width, head_layers, head_ratio)
        self.vision = MingTok(**(mingtok or {}))
        if self.vision.spec.channels != channels:
            raise VgenError(
                f"the flow head makes latents of {channels} channels, the tokenizer has {self.vision.spec.channels}; make them equal"
            )
        connector = [nn.Linear(self.vision.config.semantic_width, width)]
        for _ in range(connector_layers - 1):
            connector += [nn.GELU(), nn.Linear(width, width)]
        self.linear_proj = nn.Sequential(*connector)
        self.diffloss.reset_parameters()

    # ---------------------------------------------------------------- files

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> MingUniVisionModel:
        """A model with fresh weights of a published size; `changes` are further constructor arguments."""
        return cls(**{**size_config(size), **changes})

    @classmethod
    def from_original(
        cls, source: str | Path | Mapping[str, Tensor], config: str | Mapping[str, Any] = "16b-a3b"
    ) -> MingUniVisionModel:
        """A model from the published folder of shards, a file or a state dict. config: a size of SIZES or constructor arguments.

        A `tokenizer.json` in the folder is read, too (`read_words`). Raises VgenError for another family or size.
        """
        with torch.device("meta"):
            model = cls(**(size_config(config) if isinstance(config, str) else config))
        state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
        heads = {name: model.config[name] for name in ("heads", "key_heads", "head_dim")}
        load_exactly(model, published_names(state, **heads), ignore=UNUSED)
        for name in cls._keep_in_fp32_modules:  # whatever the file's precision, as in the release
            getattr(model.vision, name).float()
        if not isinstance(source, Mapping):
            model.read_words({"model": Path(source)})
        return model.eval()

    from_single_file = from_original

    def read_words(self, paths: Mapping[str, Path]) -> None:
        """Reads the text tokenizer where the folder `paths["model"]` has one: it is a file of the code repository's folder."""
        if (paths["model"] / WORDS).is_file():
            self.set_words(paths["model"] / WORDS)

    def set_words(self, tokenizer: str | Path | Any) -> None:
        """The text tokenizer: a `tokenizer.json`, or an object as `MingPrompts` takes. VgenError: its special ids are not the model's."""
        kind = MingPrompts.load if isinstance(tokenizer, (str, Path)) else MingPrompts
        self.prompts = kind(tokenizer, self.specials, self.vision.config.patch_size)

    @property
    def vocabulary(self) -> MingPrompts:
        """Writes prompts. Raises VgenError while there is no text tokenizer."""
        if self.prompts is None:
            raise VgenError(
                f"Ming-UniVision has no text tokenizer yet: put the {WORDS} of its code repository into the model's folder, or "
                "give it to set_words"
            )
        return self.prompts

    def save_beside(self, folder: Path) -> None:
        """The text tokenizer where it can be saved."""
        if self.prompts is not None and hasattr(self.prompts.tokenizer, "save"):
            self.prompts.tokenizer.save(str(folder / WORDS))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> MingUniVisionModel:
        """As diffusers, plus the text tokenizer where it was saved."""
        model = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model.read_words({"model": Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")})
        return model

    # ---------------------------------------------------------------- orders and guidance

    def default_order(self) -> BaseOrder:
        """Raster, a token a call: the only order a causal model without 2-D positions knows."""
        return make_order("raster", self.grid)

    def check_order(self, order: BaseOrder) -> None:
        """Raises VgenError unless the order is raster over the model's grid."""
        if order.grid != self.grid or not torch.equal(order.step_ids(), torch.arange(grid_size(self.grid))):
            height, width = self.grid[1:]
            raise VgenError(
                f"Ming-UniVision makes {height}x{width} tokens in raster order, got {order.name!r}; use raster"
            )

    def null(self, condition: Condition) -> Condition:
        """The condition of `MingPrompts.captions` without what the user says."""
        return Condition(condition.ids, condition.mask & ~condition.extras["user"], condition.extras)

    # ---------------------------------------------------------------- into the language model

    def connect(self, features: Tensor) -> Tensor:
        """Semantic features [B, n, F] -> inputs of the language model [B, n, D]."""
        return self.linear_proj(features.to(self.linear_proj[0].weight.dtype))

    def embed_prompt(self, ids: Tensor, pictures: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor | None]:
        """ids [1, n] with places for the tokens of pictures [3, H, W] -> embeddings [1, n, D], modalities [1, n] (None: all text)."""
        ids = ids.to(self.device)
        embeds, places = self.llm.embed(ids), ids == self.config.image_patch
        weight = self.vision.semantic_decoder.in_proj.weight
        features = [self.vision.features(pixels[None].to(weight))[0] for pixels in pictures]
        found, wanted = sum(map(len, features)), int(places.sum())
        if found != wanted:
            raise VgenError(
                f"the prompt has places for {wanted} tokens of pictures, the {len(pictures)} pictures have {found}; give the "
                "pictures that it was written for"
            )
        if not features:
            return embeds, None
        # masked_scatter wants equal dtypes, and keeps raster order and the order of the pictures.
        filled = embeds.masked_scatter(places[..., None], self.connect(torch.cat(features)).to(embeds.dtype))
        return filled, places * IMAGE_GATE

    # ---------------------------------------------------------------- decoding (TokenModel)

    @torch.no_grad()
    def start(self, conditions: Sequence[Condition], canvas: Canvas) -> MingState:
        """Every guidance row reads its prompt by itself. Prompts are left-padded and end in <image> (`MingPrompts.captions`)."""
        batches = sorted({len(condition.ids) for condition in conditions})
        if batches != [canvas.batch]:
            raise VgenError(
                f"every guidance row needs a prompt for each of the {canvas.batch} samples, found {' and '.join(map(str, batches))}"
            )
        ids = torch.cat([condition.ids for condition in conditions]).to(self.device)
        mask = torch.cat([condition.mask for condition in conditions]).to(self.device)
        return self._begin(self.llm.new_cache(), self.llm.embed(ids), mask, canvas, len(conditions), goes_on=False)

    @torch.no_grad()
    def branch(self, cache: DynamicCache, masks: Tensor, canvas: Canvas) -> MingState:
        """A picture in a dialogue: copies of its cache (one row) read <image>, one for every guidance row and sample.

        masks: [R, L] bool, the keys that a row sees, up to <image> (`ming_guidance.picture_rows`). The cache stays as it is.
        """
        count = len(masks) * canvas.batch
        start = torch.full((count, 1), self.config.image_start, device=self.device)
        rows = cache_rows(cache, torch.zeros(count, dtype=torch.long, device=self.device))
        mask = repeat(masks.to(self.device), "r l -> (r b) l", b=canvas.batch)
        return self._begin(rows, self.llm.embed(start), mask, canvas, len(masks), goes_on=True)

    def _begin(
        self, cache: DynamicCache, embeds: Tensor, mask: Tensor, canvas: Canvas, rows: int, goes_on: bool
    ) -> MingState:
        self._check_canvas(canvas)
        count, length, positions = embeds.shape[1], mask.shape[1], positions_of(mask)
        hidden = self.llm(embeds, mask, positions[:, -count:], cache)[:, -1]
        counters = Counters()
        counters.add(*embeds.shape[:2])
        tokens = grid_size(self.grid)
        features = torch.zeros(canvas.batch, tokens, self.vision.config.semantic_width, device=self.device)
        return MingState(
            cache=cache,
            mask=F.pad(mask, (0, tokens), value=True),
            length=length,
            position=positions[:, -1] + 1,
            hidden=hidden,
            memory=self.vision.start(canvas.batch, tokens),
            features=features,
            rows=rows,
            goes_on=goes_on,
            counters=counters,
        )

    def _check_canvas(self, canvas: Canvas) -> None:
        channels, tokens = self.config.channels, grid_size(self.grid)
        if canvas.grid != self.grid or canvas.values.shape[2:] != (channels,):
            raise VgenError(
                f"Ming-UniVision makes {tokens} latents of {channels} channels a picture, the canvas holds "
                f"{list(canvas.values.shape[1:])}; use its own tokenizer (model.vision)"
            )
        if canvas.unknown_count() < tokens:
            raise VgenError(
                "Ming-UniVision makes whole pictures: it takes no known tokens; edit the picture with words"
            )

    @torch.no_grad()
    def predict(self, state: MingState, step: Step, canvas: Canvas) -> Flow:
        """The flow of the next latent, from the hidden state that `start`, `branch` or the last `commit` left."""
        return self.diffloss.prediction(rearrange(self.vis_head(state.hidden), "(r b) d -> r b 1 d", r=state.rows))

    @torch.no_grad()
    def commit(self, state: MingState, step: Step, canvas: Canvas) -> None:
        """Expands the latent to its feature, and runs the language model on it; after the last one only if text follows."""
        features = self.vision.expand(canvas.values[:, step.targets], state.memory)
        state.features[:, step.targets] = features.float()
        if step.closes and not state.goes_on:
            return
        embeds = repeat(self.connect(features), "b 1 d -> (r b) 1 d", r=state.rows)
        state.length += 1
        mask = state.mask[:, : state.length]
        state.hidden = self.llm(embeds, mask, state.position[:, None], state.cache)[:, -1]
        state.position = state.position + 1
        state.counters.add(len(embeds), 1)

    @torch.no_grad()
    def picture(self, state: MingState) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] of a finished picture, from its features."""
        return self.vision.reconstruct(state.features, self.grid)

    # ---------------------------------------------------------------- training

    def hidden_states(self, condition: Condition, tokens: Tensor) -> Tensor:
        """Teacher-forced hidden states [B, N, D]: the one that each of tokens [B, N, C] is predicted from. condition: as for `start`."""
        prompt, mask = condition.ids.to(self.device), condition.mask.to(self.device)
        visual = self.connect(self.vision.expand(tokens[:, :-1]))
        embeds = torch.cat((self.llm.embed(prompt), visual.to(self.llm.lm_head.weight.dtype)), dim=1)
        mask = F.pad(mask, (0, visual.shape[1]), value=True)
        return self.llm(embeds, mask, positions_of(mask))[:, -tokens.shape[1] :]

    def loss(
        self, condition: Condition, tokens: Tensor, times: Tensor | None = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Flow loss of the tokens [B, N, C] (MingTok's normalised latents) of a captioned picture. times [B N], noise [B N, C]: see `MingFlowHead.loss`."""
        features = self.vis_head(self.hidden_states(condition, tokens))
        return self.diffloss.loss(features.flatten(0, 1), tokens.flatten(0, 1), None, times, noise)


def _language_model() -> type[MingLLM]:
    try:
        from vgen.models.ming.llm import MingLLM
    except ImportError as error:
        raise VgenError(
            f"Ming-UniVision needs transformers 5.14 or newer for its language model ({error}): install the extra 'text' "
            "(pip install -U 'vgen[text]')"
        ) from error
    return MingLLM
