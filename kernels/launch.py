"""How an op finds its implementation, and how Triton stays a lazy, optional import."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from vgen.errors import VgenError

IMPLS = ("torch", "triton")


class Kernel:
    """A function in Triton's language that becomes `triton.jit(function)` at its first launch; `kernel[grid](…)` launches it.

    Nothing of Triton is touched when the module is imported: the name `tl` and the kernels that `function` calls enter its
    module's globals at the first launch, because that is where Triton's compiler looks names up.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.__doc__ = function.__doc__

    @cached_property
    def jitted(self) -> Any:
        """The object that Triton made of the function."""
        import triton
        import triton.language

        names = self.function.__globals__
        names["tl"] = triton.language
        for name in self.function.__code__.co_names:  # the names that its body uses
            if isinstance(names.get(name), Kernel):
                names[name] = names[name].jitted
        return triton.jit(self.function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return self.jitted[grid]


@cache
def has_triton() -> bool:
    """Whether the triton package is installed (Linux only)."""
    return importlib.util.find_spec("triton") is not None


def resolve(impl: str | None, tensor: Tensor) -> str:
    """The implementation to run on `tensor`: 'torch' or 'triton'. None: Triton on CUDA tensors where it is installed, else torch.

    On the CPU 'triton' is Triton's interpreter (tests): the environment must hold TRITON_INTERPRET=1 before triton is imported.
    Raises VgenError for an unknown name, and for 'triton' where it cannot run.
    """
    if impl is None:
        return "triton" if tensor.is_cuda and has_triton() else "torch"
    if impl not in IMPLS:
        raise VgenError(f"impl must be None, 'torch' or 'triton', got {impl!r}")
    if impl == "triton" and not has_triton():
        raise VgenError("impl='triton' needs the package triton (Linux only), which is not installed: use impl='torch'")
    if impl == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise VgenError(f"impl='triton' needs tensors on a CUDA GPU, got {tensor.device.type}: use impl='torch'")
    return impl


def device_scalar(value: int | Tensor, name: str, device: torch.device) -> Tensor:
    """A 32-bit unsigned number as a 0-dim int64 tensor on `device`, so that a captured CUDA graph reads its current value.

    A tensor is taken as it is: looking at its value would synchronise. Raises VgenError for integers outside 0 … 2^32-1.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_floating_point():
            raise VgenError(
                f"{name} must be an integer or one integer in a tensor, got {value.dtype} {list(value.shape)}"
            )
        return value.reshape(()).to(device, torch.int64)
    if not 0 <= value < 2**32:
        raise VgenError(f"{name} must lie in 0 … 4294967295 (32 bits), got {value}")
    return torch.full((), value, dtype=torch.int64, device=device)
