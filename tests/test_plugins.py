"""Plug-ins: what may be registered, how they are found, and that files never import one. The page docs/plugins.md is followed
in tests/test_readme.py."""

import subprocess
import sys
from importlib import metadata

import pytest

from vgen import plugins
from vgen.cli.main import main
from vgen.errors import VgenError
from vgen.models.registry import GENERATORS, register_model
from vgen.pipelines.components import component_names
from vgen.plugins import load_plugin, register, registered
from vgen.samplers.orders import ORDERS, FixedOrder, OrderKind, make_order, register_order
from vgen.samplers.types import grid_size
from vgen.tokenizers_vis.registry import TOKENIZERS, register_tokenizer
from vgen.train.config import SYSTEMS, register_system

PLUGIN = """
from vgen import register_order
from vgen.samplers.orders import FixedOrder, OrderKind
from vgen.samplers.types import grid_size

def backwards(grid):
    return FixedOrder("backwards", grid, [[i] for i in reversed(range(grid_size(grid)))])

register_order("backwards", OrderKind(backwards, "last row first", "ours"))
"""


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What a test registers and imports is forgotten."""
    monkeypatch.setattr(plugins, "_OWNERS", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    tables = [(table, dict(table)) for table in (ORDERS, TOKENIZERS, GENERATORS, SYSTEMS)]
    modules = set(sys.modules)
    plugins.load_installed.cache_clear()
    yield
    plugins.load_installed.cache_clear()
    for table, rows in tables:
        table.clear()
        table.update(rows)
    for name in set(sys.modules) - modules:
        if "plug" in name:
            del sys.modules[name]


def backwards(grid):
    return FixedOrder("backwards", grid, [[i] for i in reversed(range(grid_size(grid)))])


class Model:
    from_pretrained = start = predict = commit = None


class VQModel:
    from_pretrained = spec = encode = decode = None


def test_a_registered_order_is_made_by_name_and_may_be_registered_again():
    for _ in range(2):  # a cell of a notebook runs twice
        register_order("backwards", OrderKind(backwards, "last row first", "ours"))
    assert [group.tolist() for group in make_order("backwards", 3).groups()] == [[2], [1], [0]]
    assert registered("order") == ["backwards"]


@pytest.mark.parametrize(
    "add, said",
    [
        (
            lambda: register_order("raster", OrderKind(backwards, "", "")),
            "the order 'raster' is there already, from vgen",
        ),
        (lambda: register_order("zig-zag", OrderKind(backwards, "", "")), "small letters, digits and _"),
        (lambda: register_order("zig:zag", OrderKind(backwards, "", "")), "small letters, digits and _"),
        (lambda: register_order("mine", backwards), "registered as an OrderKind"),
        (lambda: register_order("mine", OrderKind(backwards, "", "", short="n")), "short='n' is none of its options"),
        (lambda: register_model("anyorder", Model), "the model 'anyorder' is there already, from vgen"),
        (lambda: register_model("mine", VQModel), "VQModel has no start, predict, commit"),
        (lambda: register_model("mine", Model()), "registered by its class"),
        (lambda: register_tokenizer("mine", Model), "Model has no encode, decode"),
        (lambda: register_tokenizer("mine", VQModel), "has a class VQModel already"),
        (lambda: register_system("par", "mine"), "the system 'par' is there already"),
        (lambda: register_system("mine", sys), "by the name of its module"),
    ],
)
def test_what_cannot_be_registered(add, said):
    rows = [dict(table) for table in (ORDERS, TOKENIZERS, GENERATORS, SYSTEMS)]
    with pytest.raises(VgenError, match=said):
        add()
    assert rows == [dict(table) for table in (ORDERS, TOKENIZERS, GENERATORS, SYSTEMS)] and not plugins._OWNERS


def test_two_plugins_with_one_name():
    table = {}
    register(table, "order", "mine", 1, "first")
    with pytest.raises(VgenError, match="is there already, from first; give the one of second another name"):
        register(table, "order", "mine", 2, "second")
    assert table == {"mine": 1}


def test_the_command_line_loads_a_module_of_the_current_folder_or_a_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "plug_one.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    assert main(["orders", "--grid", "2x2", "--order", "backwards"]) == 2
    capsys.readouterr()
    assert main(["orders", "--plugin", "plug_one", "--grid", "2x2"]) == 0
    assert "last row first" in capsys.readouterr().out
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "plug_two.py").write_text(PLUGIN.replace("backwards", "inwards"))
    assert main(["orders", "--plugin", "sub/plug_two.py", "--grid", "2x2", "--order", "inwards"]) == 0


@pytest.mark.parametrize(
    "text, name, said",
    [
        (None, "plug_none", "there is no module plug_none; install it"),
        (None, "plug_none.sub", "there is no module plug_none; install it"),
        (None, "plug_none.py", "there is no such file"),
        ("import plug_not_there", "plug_bad", "fails when it is imported .ModuleNotFoundError: No module named 'plug_not_there'"),
        ("1 / 0", "plug_bad", r"fails when it is imported .ZeroDivisionError: division by zero"),
        ("import vgen; vgen.register_order('raster', 1)", "plug_bad", "--plugin plug_bad: an order is registered as"),
        ("", "json.py", "another module is called json"),
    ],
)  # fmt: skip
def test_a_plugin_that_cannot_be_loaded_is_one_sentence(text, name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / f"{name.removesuffix('.py')}.py").write_text(text)
    with pytest.raises(VgenError, match=said):
        load_plugin(name)


def test_a_module_of_the_current_folder_does_not_stand_in_for_a_library(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('the wrong torch')")
    (tmp_path / "plug_one.py").write_text(PLUGIN)
    code = "import sys; from vgen.cli.main import main; sys.exit(main(['orders', '--plugin', 'plug_one', '--grid', '2x2']))"
    run = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "backwards" in run.stdout, run.stderr


def test_installed_plugins_are_imported_when_a_name_is_not_known(tmp_path, monkeypatch):
    (tmp_path / "plug_installed.py").write_text(PLUGIN)
    entry = tmp_path / "plug-1.0.dist-info"
    entry.mkdir()
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (entry / "entry_points.txt").write_text("[vgen.plugins]\nplug = plug_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert [found.value for found in metadata.entry_points(group="vgen.plugins")] == ["plug_installed"]
    assert make_order("raster", 4).calls == 4 and "plug_installed" not in sys.modules
    assert make_order("backwards", 4).calls == 4 and "plug_installed" in sys.modules


def test_a_file_cannot_have_a_plugin_imported(tmp_path, monkeypatch):
    (tmp_path / "plug_evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    index = {"tokenizer": ["vgen.tokenizers_vis.vq", "VQModel"], "model": ["plug_evil", "Model"]}
    with pytest.raises(VgenError, match=r"from plug_evil, which is no module .* \(--plugin plug_evil, or import it"):
        component_names(index, "pipe")
    register_model("mine", Model)
    index["model"] = [Model.__module__, "Model"]
    assert component_names(index, "pipe")["model"] == (Model.__module__, "Model")
