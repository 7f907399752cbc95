"""From words or classes to pictures: tokenizer + generator + order, through the one decode loop."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin
from PIL import Image
from torch import Tensor

from vgen.errors import VgenError
from vgen.layers.pictures import Picture
from vgen.layers.pixels import to_images
from vgen.pipelines.calls import OUTPUTS, Callback, Generators, check_callback, check_output, joined, refuse, seeds_of
from vgen.pipelines.components import INDEX, parts_of, shipped_folder
from vgen.pipelines.results import Batch, Stats, VisualOutput
from vgen.samplers.decode import decode
from vgen.samplers.guidance import ClassifierFree, PhaseGuidance
from vgen.samplers.noise import LARGEST, PhiloxNoise
from vgen.samplers.orders import ORDERS, make_order, read_order
from vgen.samplers.settings import Sampling, takes_sampling
from vgen.samplers.types import Canvas, Condition, Grid, Guidance, Order
from vgen.tokenizers_vis.base import decode_each
from vgen.values import real, several, shown, string, whole

if TYPE_CHECKING:
    from vgen.models.base import Generator
    from vgen.pipelines.inpainting import Painting

# Prompts that a frozen text encoder turns into features at a time: of FLAN-T5-XL they take half a GB to 1 GB.
ENCODED = 1024


@dataclass(frozen=True)
class Job:
    """What all batches of a call have in common. shape: what the tokenizer's `decode` is told about the size of the pictures."""

    guidance: Guidance
    choice: Any
    painting: Painting | None
    paste_back: bool
    shape: dict[str, tuple[int, int]]
    output_type: str
    callback: Callback | None
    progress: bool


class Sampler(ConfigMixin):
    """A tokenizer and a generator that fit together, with the sampling settings the generator likes.

    tokenizer: see tokenizers_vis/base.py; model: see `vgen.models.base.Generator`. The other arguments are
    defaults of a call, saved in `model_index.json`; choice: a name of `samplers.choice.RECIPES`; substeps, solver, shift, clip: of
    continuous tokens (None: the default of their kind). A model with several `grids` makes a small picture first (Hi-MAR);
    low_steps, low_guidance_scale, low_substeps are the settings of that level (None: as the model's, or as the other level's). size: (height,
    width) in pixels of the pictures that the model learned, where tokens leave it open (FlexTok; None: what the tokenizer was made for).

    This is all of a pipeline but diffusers' base class, whose import takes longer than a picture: the command line opens this one,
    everything else `VisualPipeline` (pipelines/pipeline.py), which has the base class as well.
    """

    config_name = INDEX

    @takes_sampling
    def __init__(
        self,
        tokenizer: ModelMixin,
        model: ModelMixin,
        *values: Any,
        **settings: Any,
    ):
        super().__init__()
        sampling = Sampling(*values, **settings)
        if sampling.size is not None:
            sampling = replace(sampling, size=list(sampling.size))
        _check_low(model, sampling.low_steps, sampling.low_guidance_scale, sampling.low_substeps)
        spec = tokenizer.spec
        kinds = {"codes": spec.vocabulary, "channels": spec.channels, "levels": spec.levels}
        for kind, wanted in model.tokens.items():
            found = kinds[kind]
            if found != wanted:
                raise VgenError(
                    f"the tokenizer has {found or 'no'} {kind}, the generator was made for {wanted or 'none'}; "
                    "use the tokenizer it was trained with"
                )
        model.share_tables(tokenizer)
        self.register_modules(tokenizer=tokenizer, model=model)
        self.register_to_config(**asdict(sampling))

    def register_modules(self, **modules: Any) -> None:
        """As diffusers' pipelines, where there is none."""
        for role, module in modules.items():
            setattr(self, role, module)

    @property
    def device(self) -> torch.device:
        """Where the generator is."""
        return self.model.device

    def move(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Puts all parts there, and gives all one precision: tokenizer, generator, and a frozen text encoder. Returns the pipeline.

        dtype None: float32 (weights may be stored in half precision), but a text encoder keeps what it was trained with.
        """
        for part in (self.tokenizer, self.model):
            torch.nn.Module.to(part, device, dtype or torch.float32)  # diffusers' own `to` warns about nothing here
        move_encoder(self.model, device, dtype)
        return self

    def wake(self, part: ModelMixin) -> None:
        """Called before a part works, for pipelines that keep parts off the accelerator."""

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The levels of a canvas, coarse first; most models have one."""
        return self.model.grids

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """The pipeline in a folder. VgenError: the folder is not whole or of a newer vgen, saying which file and what is wrong."""
        settings, parts = parts_of(folder, cls)
        return cls(**parts, **settings)

    @classmethod
    def shipped(cls, name: str = "emoji") -> Self:
        """A pipeline whose weights come with the package; no network needed."""
        return cls.open(shipped_folder(name))

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """As diffusers' pipelines, where there is none."""
        from tqdm import tqdm

        return tqdm(iterable, total=total, **self.__dict__.get("_progress_bar_config", {}))

    def set_progress_bar_config(self, **config: Any) -> None:
        """As diffusers' pipelines: options of tqdm, such as disable=True."""
        self._progress_bar_config = config

    def __call__(
        self,
        prompt: str | Iterable[str] | None = None,
        class_labels: int | str | Iterable[int | str] | None = None,
        *,
        return_dict: bool = True,
        progress: bool = True,
        **settings: Any,
    ) -> VisualOutput | tuple[Any, ...]:
        """Makes `num_images_per_prompt` pictures for every prompt or class label and returns all of them.

        return_dict: False for a tuple, whose first entry is the pictures. The others: as for `stream`.
        """
        start = time.perf_counter()
        stats, tokens, images = Stats(), [], []
        for batch in self.stream(prompt, class_labels, progress=progress, **settings):
            stats.add(batch)
            tokens.append(batch.tokens)
            images.append(batch.images)
        stats.seconds = time.perf_counter() - start
        output = VisualOutput(joined(images), torch.cat(tokens) if tokens else torch.empty(0), stats)
        return output if return_dict else output.to_tuple()

    def stream(
        self,
        prompt: str | Iterable[str] | None = None,
        class_labels: int | str | Iterable[int | str] | None = None,
        *,
        num_images_per_prompt: int = 1,
        first: int = 0,
        skip: Container[int] = (),
        batch_size: int = 16,
        order: str | Order | None = None,
        num_inference_steps: int | None = None,
        order_options: dict[str, Any] | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        substeps: int | str | None = None,
        low_steps: int | None = None,
        low_guidance_scale: float | None = None,
        low_substeps: int | str | None = None,
        seed: int = 0,
        generator: Generators | None = None,
        init_image: Picture | None = None,
        mask: Picture | None = None,
        outpaint: Sequence[float] | None = None,
        paste_back: bool = True,
        size: tuple[int, int] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        progress: bool = False,
        **unknown: Any,
    ) -> Iterator[Batch]:
        """`num_images_per_prompt` pictures for every prompt or class label, batch by batch as they are finished: memory stays flat.

        first: number of the first picture; skip: numbers that are not made (what is there already), asked when their turn comes.
        order: a name for `make_order` (with `order_options`) or an Order; num_inference_steps: forward passes where the
        order leaves the count free; substeps: of every continuous token; low_*: of the small picture that some models make first, where
        the others are for the whole one; init_image and mask: white areas of the mask are made anew, tokens under black areas stay;
        outpaint: new margins (left, top, right, bottom) around the init image, ints in its pixels, floats as shares of its sides
        (`read_painting`); paste_back: what stays has the init image's own pixels, with a soft seam, instead of the tokenizer's;
        size: (height, width) of the pictures where the tokens leave it open (FlexTok; None: what the model learned);
        output_type: 'pil', 'np' ([B, H, W, 3] in [0, 1]), 'pt' ([B, 3, H, W] in [0, 1]) or 'latent' (the tokens, not decoded);
        callback_on_step_end(pipeline, index, step, {"canvas": canvas}) is called after every step of a batch; progress: a bar of the
        steps of each batch (`set_progress_bar_config`). Picture i depends on (seed, i) only, not on `batch_size`, `first` or `skip`.

        generator: a torch.Generator from which the seed is drawn (32 bits: the next
        call with it makes other pictures), or a list with one for every picture: picture i is then decoded by itself and is picture 0
        of a call with generator[i] alone. Raises VgenError for anything that does not fit, before the first picture.
        """
        refuse(unknown, inspect.signature(self.stream).parameters)
        num_images = whole(num_images_per_prompt, "the number of images", 1)
        batch_size = whole(batch_size, "the batch size", 1)
        first = whole(first, "the number of the first picture", 0, LARGEST)
        if not isinstance(skip, Container):
            raise VgenError(
                f"skip holds the numbers of pictures that are not made, such as {{0, 3}}, got {shown(skip)}"
            )
        check_callback(callback_on_step_end)
        check_output(output_type)
        _check_low(self.model, low_guidance_scale, low_substeps)
        subjects = self._subjects(prompt, class_labels)
        whole(first + len(subjects) * num_images - 1, "the number of the last picture", 0, LARGEST)
        sampling = self.sampling.given(
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            substeps=substeps,
            low_guidance_scale=low_guidance_scale,
            low_substeps=low_substeps,
        )
        guidance, choice = self._guidance(sampling), self.model.choice_kind.of(sampling)
        seeds = seeds_of(seed, generator, len(subjects) * num_images)

        def order_of(seed: int) -> Order:
            return self.make_order(order, num_inference_steps, seed, order_options, low_steps)

        made = order_of(seeds[0] if isinstance(seeds, list) else seeds)
        self.model.check_order(made)
        painting = None
        if any(given is not None for given in (init_image, mask, outpaint)):
            from vgen.pipelines.inpainting import read_painting  # it imports torchvision, which only pictures need

            self.wake(self.tokenizer)
            painting = read_painting(self.tokenizer, self.grids, init_image, mask, outpaint)
        shape = self._shape(size)
        vocabulary = self.model.vocabulary
        # Ids take next to nothing: all are read before the first picture, so that a mistake in the last prompt is an error now.
        block = ENCODED if vocabulary is not None and vocabulary.encodes else len(subjects)
        condition = self._condition(subjects[:block])

        job = Job(guidance, choice, painting, paste_back, shape, output_type, callback_on_step_end, progress)
        size_of_batch = 1 if isinstance(seeds, list) else batch_size

        def batches() -> Iterator[Batch]:
            part = condition
            for begin in range(0, len(subjects), block):
                part = self._condition(subjects[begin : begin + block]) if begin else part
                start = begin * num_images
                wanted = [i for i in range(start, start + len(part.mask) * num_images) if first + i not in skip]
                for at in range(0, len(wanted), size_of_batch):
                    places = torch.tensor(wanted[at : at + size_of_batch])
                    mine = part.take((places - start) // num_images)
                    if isinstance(seeds, list):
                        own = seeds[wanted[at]]
                        batch = self._batch(job, torch.zeros(1, dtype=torch.long), mine, order_of(own), own)
                        yield replace(batch, numbers=[first + wanted[at]])
                    else:
                        yield self._batch(job, first + places, mine, made, seeds)

        return batches()

    @torch.no_grad()
    def _batch(self, job: Job, samples: Tensor, condition: Condition, order: Order, seed: int) -> Batch:
        """Decodes the pictures of these numbers [B]."""
        self.wake(self.model)
        canvas = self._canvas(samples, job.painting)
        conditions = [condition] if len(job.guidance.rows) == 1 else [condition, self.model.null(condition)]
        state = self.model.start(conditions, canvas)
        steps = decode(self.model, state, canvas, order, job.guidance, job.choice, PhiloxNoise(seed, samples))
        with self.progress_bar(total=order.calls) if job.progress else nullcontext() as bar:
            for index, (step, _) in enumerate(steps):
                if bar is not None:
                    bar.update()
                if job.callback is not None:
                    job.callback(self, index, step, {"canvas": canvas})
        images = []
        if job.output_type != "latent":
            images = self.decode_tokens(canvas.values, condition, samples=samples, seed=seed, **job.shape)
            if job.painting is not None and job.paste_back:
                images = job.painting.paste(images)
        images = OUTPUTS[job.output_type](images, canvas.values)
        return Batch(samples.tolist(), images, canvas.values, condition, state.counters)

    def fingerprint(self) -> str:
        """Says which weights these are, in 16 hex digits: a digest of a few values of every tensor of tokenizer and generator.

        Another training changes nearly every value. The same weights in another precision count as others.
        """
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.tokenizer, self.model):
            for name, tensor in sorted(part.state_dict().items()):
                values = tensor.reshape(-1)
                few = values[:: max(1, len(values) // 64)].to("cpu", torch.float64)
                digest.update(f"{name} {tuple(tensor.shape)} ".encode() + few.numpy().tobytes())
        return digest.hexdigest()

    @property
    def settings(self) -> dict[str, Any]:
        """The defaults of a call, as saved in `model_index.json`."""
        return asdict(self.sampling)

    @property
    def sampling(self) -> Sampling:
        """The same, as one object."""
        return Sampling(**{part.name: self.config.get(part.name) for part in fields(Sampling)})

    def check_settings(self) -> None:
        """Raises VgenError for default settings that no call can use: substeps, orders, guidance of another kind of model."""
        self.model.choice_kind.of(self.sampling)
        self._guidance(self.sampling)
        self._shape(None)
        self.model.check_order(self.make_order(None, None, seed=0))

    def make_order(
        self,
        order: str | Order | None,
        steps: int | None,
        seed: int,
        options: dict[str, Any] | None = None,
        low_steps: int | None = None,
    ) -> Order:
        """The Order of a call: the pipeline's default when nothing is asked for; `steps` and `seed` go where they fit.

        A name is that of the finest level: a model with several puts its own order of the others (`low_steps`) before it.
        """
        _check_low(self.model, low_steps)
        if order is not None and not isinstance(order, str):
            if not hasattr(order, "steps"):
                raise VgenError(f"an order is a name such as 'raster' or what make_order returns, got {shown(order)}")
            return order
        name = self.config.order if order is None else order
        if not isinstance(options, dict | None):
            raise VgenError(f"the options of an order are a dict such as {{'steps': 8}}, got {shown(options)}")
        options = {string(key, "the name of an option of an order"): value for key, value in (options or {}).items()}
        if steps is None and name == self.config.order:
            steps = self.config.steps
        kind, written = read_order(name)
        if order is None and steps is not None and "steps" in written:  # what is asked for wins over the default's own
            name, options, written = kind, {**written, "steps": steps, **options}, {}
        if steps is not None:
            options.setdefault("steps", steps)  # an order without this option says so
        if "seed" in ORDERS[kind].options and "seed" not in written:
            options.setdefault("seed", seed)
        made = make_order(name, self.model.grid, **options)
        return self.model.over_levels(made, _first(low_steps, self.config.low_steps), seed)

    @torch.no_grad()
    def decode_tokens(
        self,
        tokens: Tensor,
        condition: Condition | None = None,
        level: int = -1,
        *,
        samples: Tensor | None = None,
        seed: int = 0,
        size: tuple[int, int] | None = None,
    ) -> list[Image.Image]:
        """[B, N] codes or [B, N, C] latents of all levels -> B images. condition: what they were made for; text-aware decoders read it.

        level: which one is shown where there are several: -1 the picture, 0 the small one that was made first. samples, seed: of
        the pictures, for decoders that start from noise (None: 0 to B - 1). size: of `stream`.
        """
        if not isinstance(tokens, Tensor):
            raise VgenError(f"tokens are a tensor [B, N] or [B, N, C], got {shown(tokens)}")
        caption = None if condition is None else condition.extras.get("decoder_text")
        values = tokens if len(self.grids) == 1 else Canvas(self.grids, tokens).part(level).values
        samples = torch.arange(len(tokens)) if samples is None else samples
        options = {"samples": samples, "seed": seed, "condition": caption, **self._shape(size)}
        self.wake(self.tokenizer)
        return to_images(decode_each(self.tokenizer, values.to(self.tokenizer.device), self.grids[level], **options))

    def picture_size(self, size: Sequence[int] | None = None) -> tuple[int, int]:
        """(height, width) in pixels of the pictures that a call with this `size` makes."""
        return self._shape(size).get("size", self.tokenizer.spec.pixels(self.grids[-1])[1:])

    def _shape(self, size: tuple[int, int] | None) -> dict[str, tuple[int, int]]:
        """What the tokenizer's `decode` is told about a picture of this size, checked."""
        size = _first(size, self.config.get("size"))
        if size is None:
            return {}
        try:
            height, width = (whole(side, "a side of the picture", 1) for side in size)
        except (TypeError, ValueError):
            raise VgenError(f"size is (height, width) in pixels such as (192, 256), got {shown(size)}") from None
        spec = self.tokenizer.spec
        if spec.multiple is None:
            fixed = "x".join(map(str, spec.pixels(self.grids[-1])[1:]))
            if f"{height}x{width}" != fixed:
                raise VgenError(
                    f"the tokens of this model make pictures of {fixed}, got the size {height}x{width}; leave it out"
                )
        spec.grid(height, width)
        return spec.size_options(height, width)

    def _guidance(self, sampling: Sampling) -> Guidance:
        least = self.model.least_guidance

        def free(scale: float) -> ClassifierFree:
            scale = real(scale, "the guidance scale")
            if scale < least:
                raise VgenError(
                    f"the guidance scale of this model is at least {least:g} (1: no guidance), got {scale:g}"
                )
            return ClassifierFree(
                scale,
                sampling.guidance_schedule,
                sampling.guidance_power,
                start=1.0 if scale == 1 else sampling.guidance_start,  # scale 1 is no guidance, wherever a ramp begins
            )

        if len(self.grids) == 1:
            return free(sampling.guidance_scale)
        low = sampling.low_guidance_scale
        return PhaseGuidance((free(sampling.guidance_scale if low is None else low), free(sampling.guidance_scale)))

    def _subjects(
        self, prompt: str | Iterable[str] | None, labels: int | str | Iterable[int | str] | None
    ) -> list[str] | list[int]:
        """What the pictures show: texts, or numbers of classes (which may be given by name)."""
        vocabulary = self.model.vocabulary
        if prompt is None and labels is None and vocabulary is not None and vocabulary.unconditional:
            return [""]
        if (prompt is None) == (labels is None):
            raise VgenError("give either prompts or class labels, not both and not neither")
        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else several(prompt, "the prompts (a str, or several)")
            return [string(one, "a prompt") for one in prompts]
        if vocabulary is None or not vocabulary.takes_labels:
            raise VgenError("this model takes prompts and knows no classes; give a prompt")
        single = isinstance(labels, str) or not isinstance(labels, Iterable) or getattr(labels, "ndim", 1) == 0
        listed = [labels] if single else several(labels, "the class labels")
        return [vocabulary.class_number(one) if isinstance(one, str) else whole(one, "a class label") for one in listed]

    def _condition(self, subjects: Sequence[str] | Sequence[int]) -> Condition:
        """One row for each."""
        vocabulary = self.model.vocabulary
        if vocabulary is None:
            raise VgenError(
                "this model reads prompts through a frozen text encoder, which its folder does not hold; give it one: "
                'pipe.model.read_words({"text_encoder": folder})'
            )
        if isinstance(subjects[0], str):
            return vocabulary.captions(subjects, self.model.prefix_limit)
        return vocabulary.labels(subjects)

    def _canvas(self, samples: Tensor, painting: Painting | None) -> Canvas:
        canvas = self.model.canvas(samples)
        if painting is not None:
            stays = painting.stays.to(canvas.known.device)
            canvas.values[:, stays] = painting.tokens[painting.stays].to(canvas.values)
            canvas.known[:, stays] = True
        return canvas


def move_encoder(model: ModelMixin, device: Any = None, dtype: torch.dtype | None = None) -> None:
    """Puts the frozen text encoder of a generator's vocabulary, which is no part of its modules, beside it; without one nothing."""
    if model.vocabulary is None or not model.vocabulary.encodes:
        return
    encoder = model.vocabulary.encoder
    encoder.to(device=device, dtype=dtype)
    if dtype == torch.float16:  # as transformers' own loading: layers of T5 that half precision's range does not hold
        wide = getattr(encoder, "_keep_in_fp32_modules", None) or ()
        for name, module in encoder.named_modules():
            if name.rpartition(".")[2] in wide:
                module.float()


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check_low(model: Generator, *settings: Any) -> None:
    if len(model.grids) == 1 and any(value is not None for value in settings):
        raise VgenError(
            "low_steps, low_guidance_scale and low_substeps are for models that make a small picture first (Hi-MAR), and "
            "this one does not; leave them out"
        )


def __getattr__(name: str) -> Any:
    if name == "VisualPipeline":  # imported when it is asked for: see `Sampler`
        from vgen.pipelines.pipeline import VisualPipeline

        return VisualPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
