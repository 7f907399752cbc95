"""Training a token generator on cached tokens: what all families share.

A family's module (llamagen.py, par.py, nar.py, dar.py, rar.py, anyorder.py, …) has its `Config`, and a subclass of
`GeneratorSystem` that says how its model is made and which random draws its loss takes.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin
from PIL import Image
from torch import Generator, Tensor, nn

from vgen.data.batches import batches, collate
from vgen.data.identity import weights_digest
from vgen.data.sources import HELD_OUT_SPLIT
from vgen.data.splits import held_out_among
from vgen.data.token_splits import check_together
from vgen.data.tokens import TokenDataset, TokenSetSpec
from vgen.errors import VgenError
from vgen.models.conditions.classes import ClassVocabulary
from vgen.models.conditions.t5 import T5Captions
from vgen.models.conditions.vocabulary import Vocabulary
from vgen.pipelines.visual import VisualPipeline
from vgen.samplers.settings import Sampling
from vgen.samplers.types import Condition, as_grid
from vgen.settings import require, require_choice, require_share
from vgen.tokenizers_vis.registry import SHIPPED, find_tokenizer, open_tokenizer, saved_config
from vgen.train.config import TrainConfig, check_token_file
from vgen.train.seeds import derived_seed
from vgen.train.system import Loss, spread, to_dtype
from vgen.viz.sheets import sheet

log = logging.getLogger("vgen.train")


@dataclass(frozen=True)
class ShapeConfig:
    """What the token set holds, so that a dry run can count parameters where it is not there yet; nothing else reads it.

    grid: [H, W] or [N] tokens; codes: of the tokenizer, or channels: floats a token; low_grid: of the smaller pictures; conditions: classes, or
    entries of the vocabulary of captions; code_channels: numbers of a code vector (DAR).
    """

    grid: list[int] = field(default_factory=list)
    codes: int | None = None
    channels: int | None = None
    low_grid: list[int] = field(default_factory=list)
    conditions: int = 0
    code_channels: int = 0

    @property
    def spec(self) -> TokenSetSpec:
        """As the token set would describe itself. VgenError: no grid is set."""
        require(bool(self.grid), "data.shape.grid must say what the token set will hold, which is not there yet")
        return TokenSetSpec(
            as_grid(self.grid), self.codes, self.channels, as_grid(self.low_grid) if self.low_grid else None
        )


@dataclass(frozen=True)
class DataConfig:
    """tokens: folder written by `vgen tokenize`; tokenizer: the model it was made with, for previews and the exported pipeline;
    held_out_split: what is measured (None: heldout, else val, … test)."""

    tokens: str
    tokenizer: str | None = None
    train_split: str = "train"
    held_out_split: str | None = None
    shape: ShapeConfig = field(default_factory=ShapeConfig)

    @property
    def files(self) -> tuple[Path, Path]:
        """The token sets that train and that are measured; the second one may lack, as `check_generator` says."""
        folder = Path(self.tokens)
        held_out = self.held_out_split or held_out_among(file.stem for file in folder.glob("*.safetensors"))
        return folder / f"{self.train_split}.safetensors", folder / f"{held_out or HELD_OUT_SPLIT}.safetensors"


@dataclass(frozen=True)
class ConditionConfig:
    """kind: `words` (captions over a vocabulary made of the training captions), `class` (labels), or `text` (captions through
    the family's frozen `text_encoder`, a T5 or CLIP, as a name or folder of transformers). dropout: share of samples without a
    condition, for guidance. class_share: share of samples that see their class instead of their caption (`words` only).
    """

    kind: str = "words"
    dropout: float = 0.1
    class_share: float = 0.0
    text_encoder: str = "google/flan-t5-xl"


@dataclass(frozen=True)
class SamplingConfig(Sampling):
    """Settings of previews, and defaults of the exported pipeline. order, size: None means the model's own, and that of its training."""

    order: str | None = None


@dataclass(frozen=True)
class GeneratorConfig(TrainConfig):
    """What every generator system shares. A family adds `model`, and what else its loss needs."""

    data: DataConfig = field(default_factory=lambda: DataConfig(tokens=""))
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


class TokenObjective(nn.Module):
    """The model's loss as a forward pass: what DDP and FSDP2 hook on to."""

    def __init__(self, model: ModelMixin):
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # the blocks that accelerate's FSDP2 policy shards one by one

    def forward(
        self, ids: Tensor, mask: Tensor, extras: dict[str, Tensor], tokens: Tensor, draws: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """A condition (ids, mask [B, P], extras), tokens [B, N] and the draws of the family -> loss and figures."""
        return self.model.loss(Condition(ids, mask, extras), tokens, **draws)


class GeneratorSystem:
    """One model, one objective."""

    averaged: Sequence[str] = ("model",)
    items = "images"
    score = ("cross_entropy", -1)  # continuous families: ("loss", -1)
    continuous: ClassVar[bool] = False  # trained on latents instead of codes
    conditions: ClassVar[Sequence[str]] = ("words", "class")  # kinds that the family can take
    captions_kind: ClassVar[type] = T5Captions  # what makes conditions of captions where the kind is "text"

    @classmethod
    def make_model(cls, config: Any, tokens: TokenSetSpec, conditions: int) -> ModelMixin:
        """A model of `tokens` with fresh weights. conditions: entries of its vocabulary. Raises VgenError for impossible sizes."""
        raise NotImplementedError

    @classmethod
    def missing(cls, config: Any) -> list[str]:
        """What the config names and is not there yet: `vgen train --dry-run` then counts parameters by `sketch`."""
        folders = [config.data.tokens, config.data.tokenizer]
        return [name for name in filter(None, folders) if name not in SHIPPED and not Path(name).exists()]

    @classmethod
    def sketch(cls, config: Any) -> dict[str, nn.Module]:
        """The networks on the meta device, for a token set that is as `data.shape` says; no data is opened."""
        with torch.device("meta"):
            return {"model": cls.make_model(config, config.data.shape.spec, config.data.shape.conditions)}

    def draws(self, batch: int, progress: float | None, generator: Generator) -> dict[str, Tensor]:
        """Further arguments of the model's loss, on the CPU. progress: share of the training done; None: evaluation."""
        return {}

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Further arguments of the model's loss that the data holds (Hi-MAR: the latents of the smaller pictures)."""
        return {}

    def __init__(self, config: Any, device: torch.device):
        self.config, self.device = config, device
        self.train_tokens, self.held_out = (TokenDataset(file, config.seed) for file in config.data.files)
        check_together(self.train_tokens, self.held_out)
        self._check_labels()
        self.tokenizer = self._tokenizer()
        self.vocabulary = self._vocabulary()
        self.model = self._make_model()
        self.prepare(self.model)
        if self.tokenizer is not None:
            self._check_sampling()
        self.networks: dict[str, nn.Module] = {"model": TokenObjective(self.model)}
        self.optimizers = {"model": config.optimizer}

    def _check_labels(self) -> None:
        """Raises VgenError where pictures have no class, and the model none for "no class"."""
        condition = self.config.condition
        if condition.kind != "class" or condition.dropout:
            return
        for data in (self.train_tokens, self.held_out):
            if missing := sum(label < 0 for label in data.labels):
                raise VgenError(
                    f"condition.dropout=0: {missing} of the {len(data)} pictures of {data.path} have no class, and only a model that "
                    "trains with condition.dropout above 0 knows pictures without one; set it, or label them"
                )

    def _check_sampling(self) -> None:
        """Raises VgenError for settings that previews and the exported pipeline would stumble over."""
        pipe = self._pipeline(self.tokenizer, self.model)
        try:
            pipe.check_settings()
        except VgenError as error:
            raise VgenError(f"config: sampling: {error}") from error

    def prepare(self, model: ModelMixin) -> None:
        """Work on a fresh model that needs the tokenizer (DAR's codebook)."""

    def _make_model(self) -> ModelMixin:
        entries = 0 if self.config.condition.kind == "text" else len(self.vocabulary)
        model = self.make_model(self.config, self.train_tokens.spec, entries)
        model.vocabulary = self.vocabulary
        return model

    def _vocabulary(self) -> Vocabulary | ClassVocabulary | Any:
        condition, data = self.config.condition, self.train_tokens
        if condition.kind == "text":
            try:
                captions = self.captions_kind.from_pretrained(condition.text_encoder)
            except (OSError, ValueError) as error:
                raise VgenError(
                    f"condition.text_encoder: {condition.text_encoder} cannot be loaded: it is no folder with an encoder and a tokenizer of "
                    "transformers, and no such name was found"
                ) from error
            captions.encoder.requires_grad_(False).to(self.device)
            return captions
        if condition.kind == "class":
            return ClassVocabulary(len(data.class_names), data.class_names)
        classes = data.class_names if condition.class_share else ()
        vocabulary = Vocabulary.build(data.captions, len(classes), classes)
        self._warn_without_captions(vocabulary)
        return vocabulary

    def _warn_without_captions(self, vocabulary: Vocabulary) -> None:
        """Says what a model of prompts learns from pictures without captions, and which setting shows it their classes."""
        if vocabulary.words:
            return
        data, share = self.train_tokens, self.config.condition.class_share
        setting = "condition.kind=class" if "class" in self.conditions else "condition.class_share=1"
        if not data.class_names:
            log.warning("%s has no captions: the model learns to make pictures without a prompt", data.path)
        elif share < 1:
            log.warning(
                f"{data.path} has no captions, and {share:.0%} of the samples see their class: what the others teach is to make "
                f"pictures without a prompt (it has {len(data.class_names)} classes: {setting})"
            )

    def _tokenizer(self) -> ModelMixin | None:
        folder = self.config.data.tokenizer
        if folder is None:
            return None
        found = weights_digest(find_tokenizer(folder))
        differs = "its weights differ" if self.train_tokens.tokenizer_sha256 not in ("", found) else ""
        config, made_with = saved_config(folder), self.train_tokens.tokenizer_config
        if made_with is not None and not differs:
            changed = sorted(key for key in {**config, **made_with} if config.get(key) != made_with.get(key))
            differs = f"in its config {', '.join(changed)} changed" if changed else ""
        if differs:
            raise VgenError(
                f"the tokens in {self.config.data.tokens} were made with another tokenizer than {folder} ({differs}); "
                "run `vgen tokenize` again or name the right tokenizer"
            )
        return open_tokenizer(folder).to(self.device)

    # ---------------------------------------------------------------- training

    def data_digests(self) -> dict[str, str]:
        """Of both token sets."""
        return {str(tokens.path): tokens.digest for tokens in (self.train_tokens, self.held_out)}

    def batches(self, start: int, rank: int, world: int) -> Iterator[dict[str, Any]]:
        """Endless training tokens with captions and labels."""
        return batches(self.train_tokens, self.config.batch_size, self.config.seed, start, rank, world)

    def losses(self, batch: dict[str, Any], step: int, generator: Generator) -> Iterator[Loss]:
        """Cross-entropy under freshly drawn condition drops and the family's own draws."""
        # A CPU generator: what is drawn are host decisions, equal on every kind of device.
        host = torch.Generator().manual_seed(generator.initial_seed())
        condition = self.condition(batch["caption"], batch["label"], host)
        draws = self.draws(len(batch["tokens"]), step / self.config.steps, host)
        terms = self._objective(condition, batch, draws)
        yield Loss("model", terms.pop("loss"), terms)

    def _objective(
        self, condition: Condition, batch: Mapping[str, Any], draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        device, draws = self.device, {**draws, **self.inputs(batch)}
        extras, draws = ({name: value.to(device) for name, value in part.items()} for part in (condition.extras, draws))
        ids, mask = condition.ids.to(device), condition.mask.to(device)
        return dict(self.networks["model"](ids, mask, extras, batch["tokens"].to(device), draws))

    def condition(self, captions: Sequence[str], labels: Tensor, draws: Generator) -> Condition:
        """Conditions of a batch, some of them dropped, by the shares of the config."""
        drop, pick = torch.rand(2, len(captions), generator=draws)
        condition = self.full_condition(captions, labels, pick < self.config.condition.class_share)
        return self.drop(condition, drop.to(condition.mask.device))

    def drop(self, condition: Condition, uniform: Tensor) -> Condition:
        """Conditions with some rows made unconditional. uniform: [B] draws."""
        return self.model.drop(condition, uniform)

    def full_condition(self, captions: Sequence[str], labels: Tensor, by_class: Tensor | None = None) -> Condition:
        """Conditions of a batch: the classes, or the captions (words: cut to what the model takes; the class where `by_class`)."""
        if self.config.condition.kind == "text":
            return self.vocabulary.captions(captions)
        if isinstance(self.vocabulary, ClassVocabulary):
            return self.vocabulary.labels(labels.tolist(), strict=False)
        limit = self.model.prefix_limit
        rows = []
        for index, (caption, label) in enumerate(zip(captions, labels.tolist())):
            if by_class is not None and by_class[index] and label >= 0:
                prefix = [self.vocabulary.class_id(label)]
            else:
                prefix = self.vocabulary.encode(caption, strict=False)
            rows.append([*(prefix[: limit - 1] if limit else prefix), self.vocabulary.start])
        return self.vocabulary.condition(rows)

    def after_step(self, step: int, generator: Generator, averages: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
        """Nothing to do between steps."""
        return []

    # ---------------------------------------------------------------- looking at it

    def preview(self, step: int) -> Image.Image | None:
        """Sixteen pictures for training captions (or classes), or None without a tokenizer."""
        if self.tokenizer is None:
            return None
        pipe, seed = self._pipeline(self.tokenizer, self.model), self.config.seed
        if self.config.condition.kind == "class":
            labels = spread(len(self.train_tokens.class_names), 16)
            images = pipe(class_labels=labels, seed=seed, progress=False).images
            names = [self.train_tokens.class_names[label] for label in labels]
        else:
            names = [self.train_tokens.captions[i] for i in spread(len(self.train_tokens), 16)]
            limit = self.model.prefix_limit
            if limit:  # as training cuts them
                names = [self.vocabulary.shortened(name, limit) for name in names]
            images = pipe(names, seed=seed, progress=False).images
        return sheet(images, names, columns=4, scale=max(1, 128 // images[0].width))

    def evaluate(self, step: int) -> dict[str, float]:
        """The objective (cross-entropy in nats per token) with conditions: held-out, and of as many training rows.

        The draws are the same at every call, so figures compare along a run.
        """
        name = self.score[0]
        held_out = self.objective(self.held_out, range(len(self.held_out)))
        train = self.objective(self.train_tokens, spread(len(self.train_tokens), len(self.held_out)))
        return {name: held_out, f"{name}_train": train}

    def objective(self, dataset: TokenDataset, indices: Sequence[int], chunk: int = 64) -> float:
        """Mean loss over rows of a token set, with the objective of training."""
        seed = derived_seed(self.config.seed, "evaluate")
        draws, rows, total = torch.Generator().manual_seed(seed), list(indices), 0.0
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # heads draw times and noise from the global generator
            torch.manual_seed(seed)
            for start in range(0, len(rows), chunk):
                batch = collate([dataset[i] for i in rows[start : start + chunk]])
                condition = self.full_condition(batch["caption"], batch["label"])
                terms = self._objective(condition, batch, self.draws(len(batch["tokens"]), None, draws))
                total += terms["loss"].item() * len(batch["tokens"])
        return total / len(rows)

    # ---------------------------------------------------------------- files

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

    def _pipeline(self, tokenizer: ModelMixin, model: ModelMixin) -> VisualPipeline:
        settings = asdict(self.config.sampling)
        settings["order"] = settings["order"] or model.default_order().name
        settings["size"] = settings["size"] or self.train_tokens.spec.size
        if model.vocabulary.unconditional:  # nothing to be guided to: one row a picture is enough
            settings |= {"guidance_scale": 1.0, "low_guidance_scale": None}
        return VisualPipeline(tokenizer, model, **settings)


def check_generator(config: Any, system: type[GeneratorSystem]) -> TokenSetSpec:
    """Raises VgenError for settings that cannot work; of the data only the small description is read. Returns its shape."""
    data = config.data
    require(bool(data.tokens), "data.tokens must name a folder written by `vgen tokenize`")
    for path in data.files:
        check_token_file(path)
    if data.tokenizer is not None:
        try:
            find_tokenizer(data.tokenizer)
        except VgenError as error:
            raise VgenError(f"data.tokenizer: {error}") from error
    condition = config.condition
    require_choice("condition.kind", condition.kind, system.conditions)
    require_share(condition, "dropout", "class_share", prefix="condition.")
    require(
        condition.kind == "words" or condition.class_share == 0,
        f"condition.class_share mixes classes into words; leave it at 0 for condition.kind={condition.kind}",
    )
    config.sampling.check_ranges("sampling.")
    tokens, classes = _token_set(config)
    require(
        condition.kind != "class" or classes > 0, f"condition.kind=class: the token set {data.tokens} has no classes"
    )
    require(
        (tokens.vocabulary is None) == system.continuous,
        f"data.tokens: {data.tokens} holds {'latents' if tokens.vocabulary is None else 'codes'}, this system trains on "
        f"{'latents of a continuous' if system.continuous else 'codes of a discrete'} tokenizer; run `vgen tokenize` with one",
    )
    with torch.device("meta"):
        system.make_model(config, tokens, 8)  # raises for impossible sizes
    return tokens


def model_options(size_config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Constructor arguments of a `model:` group: its size's numbers, replaced by those that are set."""
    chosen = {key: value for key, value in asdict(model).items() if key != "size" and value is not None}
    return {**size_config, **chosen}


def _token_set(config: Any) -> tuple[TokenSetSpec, int]:
    """Shape and number of classes, from the training set's description."""
    path = Path(config.data.tokens) / f"{config.data.train_split}.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return TokenSetSpec.of_record(record), len(record["class_names"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VgenError(
            f"{path} does not describe a token set ({error}); make it again with `vgen tokenize`"
        ) from error
