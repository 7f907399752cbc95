"""Every generator of the table keeps the contract of vgen/models/base.py."""

import ast
import inspect
from pathlib import Path

import pytest
import torch

from vgen.errors import VgenError
from vgen.models.anyorder import AnyOrderModel
from vgen.models.base import Generator
from vgen.models.conditions.base import Conditions
from vgen.models.registry import GENERATORS, generator_class
from vgen.samplers.types import Condition

ROOT = Path(__file__).parents[2]
METHODS = [name for name, part in vars(Generator).items() if inspect.isfunction(part) and not name.startswith("_")]
ATTRIBUTES = ("choice_kind", "least_guidance", "grid", "tokens", "prefix_limit")


def shape(method):
    """Names, kinds and defaults of the parameters."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]


@pytest.mark.parametrize("family", GENERATORS)
def test_every_family_has_every_method_with_the_same_signature(family):
    kind = generator_class(family)
    assert issubclass(kind, Generator)
    for name in METHODS:
        if name != "loss":
            assert shape(getattr(kind, name)) == shape(getattr(Generator, name)), f"{family}.{name}"
    # The draws of a loss are the family's own; the trainer passes them by name.
    assert [name for name, _, _ in shape(kind.loss)][:3] == ["self", "condition", "tokens"]
    assert all(hasattr(kind, name) for name in ATTRIBUTES)


@pytest.mark.parametrize("family", GENERATORS)
def test_every_family_says_how_it_decodes(family):
    kind = generator_class(family)
    for name in ("default_order", "start", "predict"):
        assert getattr(kind, name) is not getattr(Generator, name), f"{family}.{name}"


def subclasses(kind):
    return [kind, *(below for part in kind.__subclasses__() for below in subclasses(part))]


def test_whatever_makes_conditions_has_every_method_with_the_same_parameters():
    for family in GENERATORS:
        generator_class(family)
    kinds = subclasses(Conditions)[1:]
    assert len(kinds) >= 7
    for kind in kinds:
        for name, part in vars(Conditions).items():
            if inspect.isfunction(part):
                found, expected = (
                    [p.name for p in inspect.signature(getattr(k, name)).parameters.values()]
                    for k in (kind, Conditions)
                )
                assert found == expected, f"{kind.__name__}.{name}"


def test_nothing_asks_a_model_whether_it_has_something():
    for path in [
        path for folder in ("pipelines", "train", "convert", "cli") for path in (ROOT / "vgen" / folder).rglob("*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("hasattr", "getattr")
            ):
                asked, name = node.args[:2]
                about_a_model = ast.unparse(asked).endswith(("self.model", "pipe.model", "vocabulary")) or (
                    ast.unparse(asked) == "model" and isinstance(name, ast.Constant) and "tokenizer" not in path.name
                )
                allowed = path.name == "latents.py"  # there the model is a tokenizer in training
                assert not about_a_model or allowed, f"{path}:{node.lineno}"


def test_what_a_model_does_not_say_is_the_contract_s():
    model = AnyOrderModel(8, 5, (1, 2, 3), width=32, heads=1, content_layers=1, query_layers=1)
    assert model.grids == ((1, 2, 3),) and model.grid == (1, 2, 3)
    assert model.tokens == {"codes": 5, "channels": None, "levels": None}
    canvas = model.canvas(torch.tensor([4, 7]))
    assert canvas.values.dtype == torch.int64 and canvas.values.shape == (2, 6) and canvas.samples.tolist() == [4, 7]
    assert model.over_levels(model.default_order(), 3, 1).grid == (1, 2, 3)
    ids = torch.ones(1, 1, dtype=torch.long)
    with pytest.raises(VgenError, match="no share of dropped conditions"):
        model.drop(Condition(ids, ids.bool()))


def test_what_makes_conditions_of_prompts_alone_refuses_classes():
    for ask in (lambda: Conditions().class_number("cat"), lambda: Conditions().labels([1])):
        with pytest.raises(VgenError, match="takes prompts and knows no classes"):
            ask()
