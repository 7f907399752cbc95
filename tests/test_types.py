"""The types of the public API: a program that uses all of it passes mypy's strictest check, and nothing of it is unknown."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vgen

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
from vgen import *
from vgen import __version__
from vgen.samplers.orders import FixedOrder, OrderKind
from vgen.samplers.types import Condition, Grid, TokenModel


def run(model: TokenModel, condition: Condition) -> Canvas:
    canvas = Canvas.blank((1, 8, 8), 2)
    order = make_order("random-8", (1, 8, 8))
    guidance = ClassifierFree(3.0)
    state = model.start((condition, condition), canvas)
    for step, canvas in decode(model, state, canvas, order, guidance, TokenChoice(), PhiloxNoise(0, canvas)):
        print(step.size)
    return canvas


def mine(grid: Grid) -> FixedOrder:
    return FixedOrder("mine", grid, [[0]])


def pictures(pipe: VisualPipeline) -> float:
    made = pipe(["a", "b"], seed=3)
    assert not isinstance(made, tuple)
    seconds: float = made.stats.seconds
    return seconds


register_order("mine", OrderKind(mine, "what", "paper"))
register_system("mine", "module")
version: str = __version__
error: Exception = VgenError("no")
"""
CONFIG = """
[mypy]
follow_imports = silent
[mypy-torch.*,torchvision.*,diffusers.*,transformers.*,accelerate.*,PIL.*,omegaconf.*,einops.*,tokenizers.*,safetensors.*]
follow_imports = skip
ignore_missing_imports = True
[mypy-huggingface_hub.*,yaml.*,numpy.*,tqdm.*,triton.*,braceexpand.*,tensorboard.*]
follow_imports = skip
ignore_missing_imports = True
"""


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="the extra 'dev' is not installed")
def test_a_program_that_uses_the_public_api_is_typed(tmp_path):
    # As a wheel lays it out: mypy does not follow the finder of an editable install.
    for folder in ("kernels", "samplers", "tokenizers_vis"):
        shutil.copytree(ROOT / folder, tmp_path / "vgen" / folder)
    shutil.copytree(ROOT / "vgen", tmp_path / "vgen", dirs_exist_ok=True, ignore=shutil.ignore_patterns("assets"))
    names = [name for name in vgen.__all__ if name != "__version__"]
    reveal = "".join(f"reveal_type({name})\n" for name in names)
    (tmp_path / "program.py").write_text(PROGRAM + reveal)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "mypy.ini", "program.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    revealed = [line for line in run.stdout.splitlines() if "Revealed type is" in line]
    assert run.returncode == 0, run.stdout + run.stderr
    unknown = {name for name, line in zip(names, revealed, strict=True) if 'is "Any"' in line}
    # Decorators of torch and diffusers, whose types are not looked at here, stand around these.
    assert unknown == {"AnyOrderModel", "VQModel", "decode"}, revealed
