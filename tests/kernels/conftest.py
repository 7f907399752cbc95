"""Where the kernels are tested: natively on a CUDA GPU, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib
import os
import sys

import pytest
import torch

from vgen.kernels.launch import has_triton


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    """Switches the interpreter on for the tests of this folder, if there is no GPU.

    Triton decides between compiler and interpreter when a function is decorated. Ours are decorated at their first launch, in a test;
    those of its own library at import, which other tests of this process may have caused long ago (diffusers imports Triton).
    """
    if torch.cuda.is_available() or not has_triton():
        yield
        return
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    if before != "1" and "triton.language" in sys.modules:
        importlib.reload(sys.modules["triton.language.standard"])
        importlib.reload(sys.modules["triton.language"])
    yield
    if before is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = before


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def impl(request) -> str:
    if request.param == "triton" and not has_triton():
        pytest.skip("the package triton is not installed")
    return request.param
