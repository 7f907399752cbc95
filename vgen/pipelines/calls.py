"""What calls of pipelines have in common: diffusers' names, seeds from generators, and the forms in which pictures come back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from vgen.errors import VgenError, nearest
from vgen.samplers.noise import LARGEST
from vgen.samplers.types import Step
from vgen.values import shown, whole

# callback_on_step_end(pipeline, index, step, {"canvas": Canvas}): diffusers' four arguments, with vgen's Step in the place of a timestep.
# What it returns is not used: a model has read the tokens of a step by then, so they cannot change.
Callback = Callable[[Any, int, Step, dict[str, Any]], Any]
Generators = torch.Generator | Sequence[torch.Generator]

# What arguments of calls were called before they took diffusers' names.
RENAMED = {
    "num_images": "num_images_per_prompt",
    "steps": "num_inference_steps",
    "callback": "callback_on_step_end",
}


def refuse(given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises VgenError for arguments that a call does not have, naming the one that is meant."""
    for name in given:
        if name in RENAMED:
            raise VgenError(f"{name} is called {RENAMED[name]} here, as in diffusers; use that name")
        raise VgenError(f"a pipeline takes no {name!r}{nearest(name, known)}; its help names what it takes")


def check_callback(callback: Callback | None) -> None:
    """Raises VgenError unless it can be called."""
    if callback is not None and not callable(callback):
        raise VgenError(
            f"callback_on_step_end must be a function of (pipeline, index, step, values), got {shown(callback)}"
        )


def seeds_of(seed: int, generator: Generators | None, pictures: int) -> int | list[int]:
    """The seed of a run, or of each of its pictures where there are several generators.

    A generator gives one whole number of 32 bits, so it moves on and the next call with it makes other pictures, as in diffusers.
    VgenError: both a seed and a generator, something else, not one generator for every picture.
    """
    seed = whole(seed, "the seed", 0, LARGEST)
    if generator is None:
        return seed
    if seed:
        raise VgenError("give a seed or a generator (from which the seed is drawn), not both")
    single = isinstance(generator, torch.Generator)
    listed = [generator] if single else generator
    if not isinstance(listed, list | tuple) or not all(isinstance(one, torch.Generator) for one in listed):
        raise VgenError(f"generator is a torch.Generator or a list of them, got {shown(generator)}; a number is a seed")
    if not single and len(listed) != pictures:
        raise VgenError(f"there are {len(listed)} generators for {pictures} pictures; give one, or one for each")
    seeds = [int(torch.randint(LARGEST + 1, (), generator=one, device=one.device)) for one in listed]
    return seeds[0] if single else seeds


def _arrays(images: list[Image.Image], tokens: Tensor) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.float32) / 255 for image in images])


def _tensor(images: list[Image.Image], tokens: Tensor) -> Tensor:
    return rearrange(torch.from_numpy(_arrays(images, tokens)), "b h w c -> b c h w")


# output_type -> (pictures, tokens) -> what a caller gets. All show the same picture: floats are the levels of the PIL image / 255.
OUTPUTS: dict[str, Callable[[list[Image.Image], Tensor], Any]] = {
    "pil": lambda images, tokens: images,
    "np": _arrays,
    "pt": _tensor,
    "latent": lambda images, tokens: tokens,
}


def check_output(output_type: str) -> None:
    """Raises VgenError unless it is one of OUTPUTS."""
    if not isinstance(output_type, str) or output_type not in OUTPUTS:
        raise VgenError(f"output_type is one of {', '.join(OUTPUTS)}, got {shown(output_type)}")


def joined(parts: Sequence[Any]) -> Any:
    """The pictures of several batches, in one list, array or tensor (none: an empty list)."""
    if not parts or isinstance(parts[0], list):
        return [image for part in parts for image in part]
    return torch.cat(parts) if isinstance(parts[0], Tensor) else np.concatenate(parts)
