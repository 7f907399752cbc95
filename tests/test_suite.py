"""What holds for every test: it can fail, and it draws the same numbers in every run."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

FILES = sorted(Path(__file__).parent.rglob("test_*.py"))
CHECKING = {"raises", "assert_close", "fail"}


def can_fail(test: ast.FunctionDef, others: dict[str, ast.FunctionDef], seen: frozenset[str] = frozenset()) -> bool:
    """Whether a function asserts: itself, by `pytest.raises`, in a process that is checked, or in a function that it calls."""
    for node in ast.walk(test):
        if isinstance(node, ast.Assert):
            return True
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        checked = name == "run" and any(k.arg == "check" and getattr(k.value, "value", 0) for k in node.keywords)
        if name in CHECKING or checked or name.startswith("assert_"):
            return True
        if name in others and name not in seen and can_fail(others[name], others, seen | {name}):
            return True
    return False


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FILES[0].parents[1])))
def test_every_test_can_fail(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    tests = [name for name in functions if name.startswith("test_")]
    assert tests, "a file without tests"
    empty = [name for name in tests if not can_fail(functions[name], functions)]
    assert not empty, f"nothing is asserted in {empty}"


@pytest.mark.parametrize("run", [1, 2])
def test_draws_begin_anew_in_every_test(run):
    assert torch.initial_seed() == 0 and np.random.get_state()[2] == 624
    expected = torch.rand(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(3), expected)
