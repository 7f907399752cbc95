"""Every op: its Triton kernel against its PyTorch twin, over its own list of cases."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from vgen.errors import VgenError
from vgen.kernels import OPS, launch

CASES = [(name, case) for name, file in OPS.items() for case in importlib.import_module(file).CASES]
ULPS = {torch.float32: 1e-5, torch.float16: 4 * 2**-11, torch.bfloat16: 4 * 2**-8}


@pytest.mark.parametrize(("name", "case"), CASES, ids=lambda value: str(value).replace("torch.", ""))
@pytest.mark.skipif(not launch.has_triton(), reason="the package triton is not installed")
def test_triton_equals_its_twin(name, case, device):
    if case.large and device == "cpu":
        pytest.skip("a benchmark's size: too slow in the interpreter")
    module = importlib.import_module(OPS[name])
    inputs = module.make_inputs(case, device)
    expected, actual = (getattr(module, name)(**inputs, impl=impl) for impl in launch.IMPLS)
    for e, a in zip(*((v,) if isinstance(v, Tensor) else v for v in (expected, actual)), strict=True):
        tolerance = ULPS.get(e.dtype, 0)
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OPS)
def test_an_op_keeps_the_contract(name):
    module = importlib.import_module(OPS[name])
    assert callable(getattr(module, name)) and getattr(module, name).__doc__
    assert callable(getattr(module, f"{name}_torch")) and callable(getattr(module, f"{name}_triton"))
    assert any(case.large for case in module.CASES) and not all(case.large for case in module.CASES)
    with pytest.raises(VgenError, match="'torch' or 'triton', got 'cuda'"):
        getattr(module, name)(**module.make_inputs(module.CASES[0]), impl="cuda")


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(launch, "has_triton", lambda: True)
    with pytest.raises(VgenError, match="CUDA GPU, got cpu"):
        launch.resolve("triton", torch.zeros(1))
    monkeypatch.setattr(launch, "has_triton", lambda: False)
    with pytest.raises(VgenError, match="not installed"):
        launch.resolve("triton", torch.zeros(1))
    assert launch.resolve(None, torch.zeros(1)) == "torch"


def test_everything_works_without_triton():
    script = """if True:
        import importlib, sys
        sys.modules["triton"] = None  # `import triton` raises
        from vgen.kernels import OPS
        for name, file in OPS.items():
            module = importlib.import_module(file)
            getattr(module, name)(**module.make_inputs(module.CASES[1]))
    """
    subprocess.run([sys.executable, "-c", script], check=True)
