"""The commands of the README are taken out of it and run; those of the other texts (docs, configs, --help) are parsed.

Run means: in a folder of its own with the README's paths, two steps where a training would take long, and a tiny dataset made
here in the place of the one that npm would bring. Published files are not at hand, so commands that need them must say so.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import itertools
import os
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from data.test_emoji import ENTRIES, NAMES, PICTURES, entry, make_archives
from PIL import Image

from vgen import plugins
from vgen.cli.main import COMMANDS, build_parser, main
from vgen.convert.published import names
from vgen.data.emoji import build_emoji
from vgen.errors import VgenError
from vgen.models.registry import GENERATORS
from vgen.pipelines.components import SHIPPED
from vgen.pipelines.pipeline import VisualPipeline
from vgen.recipes import find_config
from vgen.samplers.orders import ORDERS, make_order
from vgen.settings import merge, parse_overrides, read_yaml
from vgen.tokenizers_vis.registry import SHIPPED as TOKENIZERS
from vgen.tokenizers_vis.registry import TOKENIZERS as FAMILIES
from vgen.train.config import SYSTEMS, check_common
from vgen.train.system import system_module

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PLUGINS = ROOT / "docs" / "plugins.md"  # run from top to bottom, as it has names of its own
TEXTS = [README, *sorted(set((ROOT / "docs").rglob("*.md")) - {PLUGINS})]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "published")
QUICK = ["steps=2", "batch_size=4", "threads=1", "tensorboard=false"]
"""Appended to every `vgen train` of the README."""


@dataclass(frozen=True)
class Block:
    """Text between two fences of a Markdown file."""

    file: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a shell, without what `#` begins; stdin: its here-document."""

    words: tuple[str, ...]
    stdin: str = ""

    def __str__(self) -> str:
        return shlex.join(self.words)


def blocks(*files: Path) -> list[Block]:
    found = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            found.append(Block(file, text.count("\n", 0, match.start()) + 1, match[1], match[2]))
    return found


def commands(script: str) -> Iterator[Command]:
    lines = iter(script.replace("\\\n", " ").splitlines())
    for line in lines:
        line, _, end = line.partition("<<")
        end = end.strip().strip("'\"")
        stdin = "\n".join(itertools.takewhile(end.__ne__, lines)) if end else ""
        for is_and, words in itertools.groupby(shlex.split(line, comments=True), key=lambda word: word == "&&"):
            if not is_and:
                yield Command(tuple(words), stdin)


def arguments(command: Command) -> list[str] | None:
    """What `vgen.cli.main.main` is given for a command; None: the command is not ours."""
    words = list(itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=\S*", word), command.words))
    if words[:1] == ["vgen"]:
        return words[1:]
    if words[:2] == ["python", "sample.py"]:
        return ["sample", *words[2:]]
    if words[:1] in (["accelerate"], ["torchrun"]) and "vgen.train" in words:
        return ["train", *words[words.index("vgen.train") + 1 :]]
    return None


README_BLOCKS = [block for block in blocks(README) if block.language]
DOC_BLOCKS = [block for block in blocks(*TEXTS[1:]) if block.language in ("bash", "python")]


# ---- the README is run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with what the README's commands find in a clone, a home and an npm of its own, and tiny emoji in data/emoji."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("sample.py", "configs", "vgen"):
        (folder / name).symlink_to(ROOT / name)
    archives = make_archives(folder / "npm", [*ENTRIES[:-1], entry("1F47B", "GHOST"), ENTRIES[-1]])
    npm = folder / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(
        f'#!/bin/sh\nfor last; do :; done\ncase "$2" in\n  {PICTURES.spec}) cp {archives}/{PICTURES.file_name} "$last";;\n'
        f'  {NAMES.spec}) cp {archives}/{NAMES.file_name} "$last";;\n  *) exit 1;;\nesac\n'
    )
    npm.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder / "home"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
        patch.setitem(build_emoji.__kwdefaults__, "packages", (PICTURES, NAMES))
        assert main(["data", "emoji", "--out", "data/emoji", "--size", "64"]) == 0
        yield folder


@pytest.mark.parametrize("block", README_BLOCKS, ids=str)
def test_the_readme_runs(block, workspace, capsys):
    assert block.language in ("bash", "python"), f"{block}: say here how a block of {block.language} is tested"
    if block.language == "python":
        exec(compile(block.text, str(block), "exec"), {})
        return
    for command in commands(block.text):
        check(command, workspace, capsys)


def test_the_decode_loop_of_the_docs_runs(capsys):
    (block,) = (block for block in DOC_BLOCKS if "in decode(" in block.text and block.file.name == "architecture.md")
    found: dict[str, Any] = {}
    exec(compile(block.text, str(block), "exec"), found)
    assert capsys.readouterr().out.count("\n") == 16 and bool(found["canvas"].known.all())
    assert found["pixels"].shape == (2, 3, 64, 64)


def test_the_page_of_plugins_runs(workspace, capsys):
    """docs/plugins.md from top to bottom: its module is written down, its commands and its Python are run, in order."""
    module, *rest = [block for block in blocks(PLUGINS) if block.language in ("python", "bash", "yaml")]
    tables = [(table, dict(table)) for table in (ORDERS, FAMILIES, GENERATORS, SYSTEMS)]
    Path("my_plugin.py").write_text(module.text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(workspace)])
        patch.setattr(plugins, "_OWNERS", {})
        try:
            for block in rest:
                if block.language == "yaml":
                    Path("cells.yaml").write_text(block.text, encoding="utf-8")
                elif block.language == "python":
                    exec(compile(block.text, str(block), "exec"), {})
                else:
                    for command in commands(block.text):
                        check(command, workspace, capsys)
            pipe = VisualPipeline.from_pretrained("runs/cells/model")
            assert type(pipe.model).__module__ == type(pipe.tokenizer).__module__ == "my_plugin"
        finally:
            sys.modules.pop("my_plugin", None)
            for table, rows in tables:
                table.clear()
                table.update(rows)
    # Without the plug-in the pipeline is refused, and what is missing is said.
    assert vgen(["sample", "--model", "runs/cells/model", "--prompt", "ghost"]) == 2
    assert "(--plugin my_plugin, or import it in Python)" in capsys.readouterr().err


def check(command: Command, workspace: Path, capsys) -> None:
    """Runs a command of the README. It must succeed, or say in one sentence that published files are not there."""
    words = [os.path.expanduser(word) for word in command.words]
    if words[:2] == ["pip", "install"]:
        check_install(words)
        return
    if words == ["pytest"]:  # that is this
        return
    if words == ["python", "-"]:
        exec(compile(command.stdin, "stdin", "exec"), {})
        return
    given = arguments(Command(tuple(words)))
    assert given, f"{command}: the README has a command that this test does not know"
    needs_files = "--checkpoint-dir" in given
    if given[0] == "train":
        given += QUICK
    elif given[:2] == ["data", "emoji"]:
        shutil.rmtree(given[given.index("--out") + 1])
    capsys.readouterr()
    code = sample_py(given[1:]) if words[0] == "python" else vgen(given)
    said = capsys.readouterr().err
    if needs_files:
        folder = given[given.index("--checkpoint-dir") + 1]
        assert (code, said.count("\n")) == (2, 1) and folder in said, f"{command}: exit code {code}, {said}"
        return
    assert code == 0, f"{command}: exit code {code}, {said}"
    for option, value in itertools.pairwise(given):
        if option in ("--out", "--trace") and Path(value).suffix:
            Image.open(value).load()
        elif option in ("--out", "--trace"):
            assert any(Path(value).iterdir()), f"{command}: {value} is empty"


def vgen(given: list[str]) -> int:
    try:
        return main(given)
    except SystemExit as refused:  # argparse
        return refused.code


def sample_py(given: list[str]) -> int:
    """`python sample.py …` of the folder we are in, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sample.py", *given])
        patch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as done:
            runpy.run_path("sample.py", run_name="__main__")
    return done.value.code


def check_install(words: list[str]) -> None:
    """`pip install -e .` and its extras: named as in pyproject.toml. Nothing is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    what = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[-1])
    assert words[:-1] == ["pip", "install", "-e"] and what, f"{shlex.join(words)} installs something else"
    extras = set(filter(None, (what[1] or "").split(",")))
    assert extras <= set(project["optional-dependencies"]), f"there is no extra {extras}"


@pytest.mark.parametrize(
    "rotten",
    [
        "vgen sampel --prompt ghost",
        "python sample.py --prompt ghost --ordre raster",
        "python sample.py --prompt ghost --order rastre",
        "python sampel.py --prompt ghost",
        "python sample.py --model llamagen-c2i-B-265 --class-label 207 --checkpoint-dir ~/checkpoints --out outputs/dog.png",
        "vgen train emoji/nothing",
        "vgen reconstruct --model emoji-nothing --input data/emoji --out outputs/x.png",
        "vgen data emojis --out data/emoji --size 64",
        'pip install -e ".[nothing]"',
        "make",
    ],
)
def test_a_rotten_command_would_be_noticed(rotten, workspace, capsys):
    (command,) = commands(rotten)
    with pytest.raises((AssertionError, FileNotFoundError)):
        check(command, workspace, capsys)


# ---- everything else is parsed ---------------------------------------------------------------------------------------


def mentions() -> Iterator[tuple[str, str, bool]]:
    """(place, command, whether it is whole) of docs, configs and --help. Code inside a sentence may be a part of a command."""
    for block in blocks(*TEXTS):
        if block.language == "bash":
            for command in commands(block.text):
                if arguments(command):
                    yield str(block), str(command), True
    for file in TEXTS:
        place = str(file.relative_to(ROOT))
        for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", file.read_text(encoding="utf-8")):
            yield place, code, False
    for file in CONFIGS:
        place = str(file.relative_to(ROOT))
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("#"):
                whole = re.fullmatch(r"# (?:command:)? +((?:vgen|accelerate|torchrun) .*?)(?: {2,}\(.*)?", line)
                found = [whole[1]] if whole else re.findall(r"`([^`]+)`", line)
                yield from ((place, code, bool(whole)) for code in found)
    for module, _ in COMMANDS.values():
        for line in importlib.import_module(f"vgen.cli.{module}").EPILOG.splitlines():
            line = re.split(r" {2,}| #", line.strip())[0]
            yield f"vgen {module} --help", line, "…" not in line


def expanded(text: str) -> list[str]:
    """ "a/{b,c}.yaml" -> both; placeholders of the texts become something that exists."""
    text = re.sub(r"\bCONFIG\b|\bmine\.yaml$", "emoji/anyorder", text.removesuffix(" > mine.yaml"))
    braces = re.search(r"\{([\w,]+)\}", text)
    texts = [text] if not braces else [text.replace(braces[0], part) for part in braces[1].split(",")]
    return [each.replace("COMMAND", name) for each in texts for name in (COMMANDS if "COMMAND" in each else [""])]


MENTIONS = sorted(
    {
        (place, command, whole)
        for place, text, whole in mentions()
        for command in expanded(text)
        if re.match(r"([A-Z_]+=\S+ )?(vgen|python|accelerate|torchrun) ", command)
    }
)
EXPORTED = {f"{read_yaml(path)['out']}/model" for path in CONFIGS}
# …and what the trainings of the texts write with a setting of their own.
EXPORTED |= {f"{out}/model" for _, text, _ in MENTIONS for out in re.findall(r"^vgen train .*\bout=(\S+)", text)}


@pytest.mark.parametrize(("place", "text", "whole"), MENTIONS)
def test_a_command_of_the_texts_exists(place, text, whole):
    (command,) = commands(text)
    given = arguments(command)
    if given is None:  # a script of the repository
        assert command.words[0] == "python" and (ROOT / command.words[1]).is_file(), f"{place}: there is no {text}"
        return
    if not whole:
        given = [word for word in given if word != "…"]
    if given == ["--help"] or given[1:] == ["--help"]:
        with pytest.raises(SystemExit) as done:
            main(given)
        assert done.value.code == 0
        return
    try:
        args = parser(given[0], whole).parse_args(given)
    except (SystemExit, VgenError):
        pytest.fail(f"{place}: `{text}` is no command of vgen")
    if given[0] == "train" and args.config:
        changes = parse_overrides([word for word in args.overrides if "…" not in word])
        settings = read_yaml(find_config(args.config)), changes
        check_common(merge(system_module(settings[0]["system"]).Config, *settings))
    if given[0] == "configs":
        assert args.name in (None, "emoji") or find_config(args.name).is_file()
        return
    model = str(getattr(args, "model", None) or getattr(args, "name", None) or SHIPPED[0])
    if model.startswith(("runs/", "vgen/")):  # what another command of these texts wrote, or what is in the package
        assert model in EXPORTED or (ROOT / model).is_dir(), f"{place}: nothing writes {model}"
    elif "/" not in model and not re.fullmatch(r"[A-Z]+|…", model):  # else: files of the user's own
        assert model in {*SHIPPED, *TOKENIZERS, *names()}, f"{place}: there is no {model} in `{text}`"
    order = getattr(args, "order", None)
    for name in [order] if isinstance(order, str) else order or []:
        if name not in ("NAME", "…") and not name.startswith("given:"):
            assert make_order(name, (1, 24, 24) if not name.startswith("frames") else (4, 8, 8)).calls > 0


def parser(command: str, whole: bool) -> argparse.ArgumentParser:
    """That of vgen; what a text only mentions may lack required options and be cut off behind one."""
    made = build_parser(command)
    if not whole:
        (subparsers,) = (action for action in made._actions if isinstance(action, argparse._SubParsersAction))
        for action in subparsers.choices[command]._actions:
            action.required = False
            if action.nargs in (None, "+"):
                action.nargs = "?" if action.nargs is None else "*"
    return made


@pytest.mark.parametrize("block", [block for block in DOC_BLOCKS if block.language == "python"], ids=str)
def test_python_of_the_docs_uses_what_exists(block):
    """It compiles, its imports exist, and what is imported takes the keywords that it is given."""
    tree = ast.parse(block.text)
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            known |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    checked = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (called := resolve(node.func, known)) is not None:
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(called).bind_partial(**keywords)
            checked += 1
    assert checked or not known, f"{block}: nothing of it was checked"


def resolve(node: ast.expr, known: dict[str, object]) -> object | None:
    """What `Name` or `Name.attribute` of an imported name stands for; None: a variable. AttributeError: it does not exist."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := resolve(node.value, known)) is not None:
        return getattr(owner, node.attr)
    return None
