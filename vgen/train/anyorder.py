"""Training the native any-order generator on cached tokens: cross-entropy over random and named decode orders."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from torch import Generator, Tensor, nn

from vgen.data.batches import batches, collate
from vgen.data.tokens import TokenDataset
from vgen.errors import VgenError
from vgen.files import sha256
from vgen.models.anyorder import AnyOrderModel, size_config
from vgen.models.vocabulary import Vocabulary
from vgen.pipelines.visual import VisualPipeline
from vgen.samplers.mixture import OrderMixture
from vgen.samplers.types import Condition, Grid
from vgen.tokenizers_vis.vq import VQModel
from vgen.train.config import TrainConfig, require, require_not_negative, require_positive, require_share
from vgen.train.seeds import derived_seed
from vgen.train.system import Loss, spread, to_dtype
from vgen.viz.sheets import sheet


@dataclass(frozen=True)
class DataConfig:
    """tokens: folder written by `vgen tokenize`; tokenizer: the model it was made with, for previews and the exported pipeline."""

    tokens: str
    tokenizer: str | None = None
    train_split: str = "train"
    held_out_split: str = "heldout"


@dataclass(frozen=True)
class ModelConfig:
    """A named size of `vgen.models.anyorder.SIZES`; a number that is set replaces that of the size."""

    size: str = "XS"
    width: int | None = None
    content_layers: int | None = None
    query_layers: int | None = None
    heads: int | None = None
    hidden: int | None = None
    dropout: float = 0.1
    prefix_limit: int = 16  # longest prefix in tokens; longer captions are cut


@dataclass(frozen=True)
class OrdersConfig:
    """Which decode orders training sees (`vgen.samplers.mixture.OrderMixture`)."""

    named: list[str] = field(default_factory=lambda: ["raster", "diagonal", "neighbor", "locality"])
    random_share: float = 0.5
    steps: list[int] = field(default_factory=lambda: [8, 16, 32, 64])
    merge_share: float = 0.1


@dataclass(frozen=True)
class ConditionConfig:
    """Share of samples that see no condition (for guidance) and that see their class instead of their caption."""

    dropout: float = 0.1
    class_share: float = 0.0


@dataclass(frozen=True)
class SamplingConfig:
    """Settings of previews, and defaults of the exported pipeline."""

    order: str = "random"
    steps: int | None = None
    guidance_scale: float = 3.0
    guidance_schedule: str = "constant"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Config(TrainConfig):
    """`system: anyorder`."""

    data: DataConfig = field(default_factory=lambda: DataConfig(tokens=""))
    model: ModelConfig = field(default_factory=ModelConfig)
    orders: OrdersConfig = field(default_factory=OrdersConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def check(config: Config) -> None:
    """Raises VgenError for settings that cannot work; of the data only the small description is read."""
    data = config.data
    require(bool(data.tokens), "data.tokens must name a folder written by `vgen tokenize`")
    for split in (data.train_split, data.held_out_split):
        path = Path(data.tokens) / f"{split}.safetensors"
        require(
            path.is_file(),
            f"data.tokens: {path} does not exist; make it with `vgen tokenize --model … --data … --out {data.tokens}`",
        )
    if data.tokenizer is not None:
        path = Path(data.tokenizer) / SAFETENSORS_WEIGHTS_NAME
        require(path.is_file(), f"data.tokenizer: {path} does not exist; expected a folder written by `vgen train`")
    require_share(config.condition, "dropout", "class_share", prefix="condition.")
    require_share(config.orders, "random_share", "merge_share", prefix="orders.")
    require(
        all(count > 0 for count in config.orders.steps) and config.orders.steps, "orders.steps must list counts above 0"
    )
    require_share(config.model, "dropout", prefix="model.", below_one=True)
    require_positive(config.model, "prefix_limit", prefix="model.")
    require_not_negative(config.sampling, "temperature", "top_k", "guidance_scale", prefix="sampling.")
    grid, codes = _token_set(config)
    mixture(config, grid)  # raises for unknown orders
    with torch.device("meta"):
        AnyOrderModel(8, codes, grid, **_model_options(config))  # raises for impossible sizes


def build(config: Config, device: torch.device) -> AnyOrderSystem:
    """Opens the token sets and makes the model."""
    return AnyOrderSystem(config, device)


def mixture(config: Config, grid: Grid) -> OrderMixture:
    """The orders of the config for a grid."""
    orders = config.orders
    return OrderMixture(grid, orders.named, orders.random_share, orders.steps, merge_share=orders.merge_share)


class TokenObjective(nn.Module):
    """The model's loss as a forward pass: what DDP and FSDP2 hook on to."""

    def __init__(self, model: AnyOrderModel):
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # the blocks that accelerate's FSDP2 policy shards one by one

    def forward(self, ids: Tensor, mask: Tensor, tokens: Tensor, step_ids: Tensor) -> dict[str, Tensor]:
        """ids, mask [B, P]; tokens, step_ids [B, N] -> loss and figures."""
        return self.model.loss(Condition(ids, mask), tokens, step_ids)


class AnyOrderSystem:
    """One model, one objective."""

    averaged: Sequence[str] = ("model",)
    items = "images"
    score = ("cross_entropy", -1)

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        folder = Path(config.data.tokens)
        self.train_tokens = TokenDataset(folder / f"{config.data.train_split}.safetensors", config.seed)
        self.held_out = TokenDataset(folder / f"{config.data.held_out_split}.safetensors", config.seed)
        self.tokenizer = self._tokenizer()
        classes = len(self.train_tokens.class_names) if config.condition.class_share else 0
        self.vocabulary = Vocabulary.build(self.train_tokens.captions, classes)
        self.model = self._make_model()
        self.mixture = mixture(config, self.train_tokens.grid)
        self.networks: dict[str, nn.Module] = {"model": TokenObjective(self.model)}
        self.optimizers = {"model": config.optimizer}

    def _make_model(self) -> AnyOrderModel:
        codes, grid = self.train_tokens.vocabulary, self.train_tokens.grid
        model = AnyOrderModel(len(self.vocabulary), codes, grid, **_model_options(self.config))
        model.vocabulary = self.vocabulary
        return model

    def _tokenizer(self) -> VQModel | None:
        folder = self.config.data.tokenizer
        if folder is None:
            return None
        found = sha256(Path(folder) / SAFETENSORS_WEIGHTS_NAME)
        if self.train_tokens.tokenizer_sha256 not in ("", found):
            raise VgenError(
                f"the tokens in {self.config.data.tokens} were made with another tokenizer than {folder} (its weights differ); "
                "run `vgen tokenize` again or name the right tokenizer"
            )
        return VQModel.from_pretrained(folder).eval().requires_grad_(False).to(self.device)

    def batches(self, start: int, rank: int, world: int) -> Iterator[dict[str, Any]]:
        """Endless training tokens with captions and labels."""
        return batches(self.train_tokens, self.config.batch_size, self.config.seed, start, rank, world)

    def losses(self, batch: dict[str, Any], step: int, generator: Generator) -> Iterator[Loss]:
        """Cross-entropy under freshly drawn orders and condition drops."""
        # A CPU generator: orders and drops are host decisions, equal on every kind of device.
        draws = torch.Generator().manual_seed(generator.initial_seed())
        condition = self.condition(batch["caption"], batch["label"], draws)
        tokens = batch["tokens"]
        step_ids = self.mixture.sample(len(tokens), draws)
        terms = dict(
            self.networks["model"](
                *(t.to(tokens.device) for t in (condition.ids, condition.mask)), tokens, step_ids.to(tokens.device)
            )
        )
        yield Loss("model", terms.pop("loss"), terms)

    def condition(self, captions: Sequence[str], labels: Tensor, draws: Generator) -> Condition:
        """Prefixes of a batch: nothing, the class, or the caption, by the shares of the config."""
        shares = self.config.condition
        drop, pick = torch.rand(2, len(captions), generator=draws).tolist()
        rows = []
        for caption, label, u, v in zip(captions, labels.tolist(), drop, pick):
            prefix: list[int] = []
            if u >= shares.dropout:
                use_class = v < shares.class_share and label >= 0
                prefix = (
                    [self.vocabulary.class_id(label)] if use_class else self.vocabulary.encode(caption, strict=False)
                )
            rows.append([*prefix[: self.config.model.prefix_limit - 1], self.vocabulary.start])
        return self.vocabulary.condition(rows)

    def after_step(self, step: int, generator: Generator, averages: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
        """Nothing to do between steps."""
        return []

    def preview(self, step: int) -> Image.Image | None:
        """Sixteen pictures for training captions, or None without a tokenizer."""
        if self.tokenizer is None:
            return None
        prompts = [self.train_tokens.captions[i] for i in spread(len(self.train_tokens), 16)]
        limit = self.config.model.prefix_limit - 1
        prompts = [prompt for prompt in prompts if len(self.vocabulary.encode(prompt)) <= limit]
        images = self._pipeline(self.tokenizer, self.model)(prompts, seed=self.config.seed).images
        return sheet(images, prompts, columns=4, scale=max(1, 128 // images[0].width))

    def evaluate(self, step: int) -> dict[str, float]:
        """Cross-entropy (nats per token) with captions over the training mixture of orders: held-out, and as many training rows.

        The orders are the same at every call, so figures compare along a run.
        """
        held_out = self._cross_entropy(self.held_out, range(len(self.held_out)))
        train = self._cross_entropy(self.train_tokens, spread(len(self.train_tokens), len(self.held_out)))
        return {"cross_entropy": held_out, "cross_entropy_train": train}

    def _cross_entropy(
        self, dataset: TokenDataset, indices: Sequence[int], draws_per_row: int = 1, chunk: int = 64
    ) -> float:
        draws = torch.Generator().manual_seed(derived_seed(self.config.seed, "evaluate"))
        rows = [i for i in indices for _ in range(draws_per_row)]
        total = 0.0
        for start in range(0, len(rows), chunk):
            batch = collate([dataset[i] for i in rows[start : start + chunk]])
            condition = self.vocabulary.captions(batch["caption"], self.config.model.prefix_limit, strict=False)
            step_ids = self.mixture.sample(len(batch["tokens"]), draws)
            terms = self.networks["model"](
                *(t.to(self.device) for t in (condition.ids, condition.mask, batch["tokens"], step_ids))
            )
            total += terms["loss"].item() * len(batch["tokens"])
        return total / len(rows)

    def export(self, folder: Path, weights: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype) -> None:
        """A pipeline folder (tokenizer, model, sampling settings), or the model alone where no tokenizer is named."""
        model = self._make_model()
        model.load_state_dict({key.removeprefix("model."): value for key, value in weights["model"].items()})
        model = to_dtype(model, dtype)
        if self.tokenizer is None:
            model.save_pretrained(folder)
        else:
            tokenizer = to_dtype(copy.deepcopy(self.tokenizer), dtype)
            self._pipeline(tokenizer, model).save_pretrained(folder)

    def _pipeline(self, tokenizer: VQModel, model: AnyOrderModel) -> VisualPipeline:
        return VisualPipeline(tokenizer, model, **asdict(self.config.sampling))


def _model_options(config: Config) -> dict[str, Any]:
    options = {key: value for key, value in asdict(config.model).items() if key != "size" and value is not None}
    return {**size_config(config.model.size), **options}


def _token_set(config: Config) -> tuple[Grid, int]:
    """Grid and number of codes, from the training set's description."""
    path = Path(config.data.tokens) / f"{config.data.train_split}.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return tuple(record["grid"]), record["vocabulary"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VgenError(
            f"{path} does not describe a token set ({error}); make it again with `vgen tokenize`"
        ) from error
