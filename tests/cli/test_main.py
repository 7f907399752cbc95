"""The door: the table of commands, errors as sentences, and what is not imported."""

import argparse
import ast
import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vgen
from vgen.cli import main as door
from vgen.cli.main import main
from vgen.errors import VgenError, in_words, nearest

WITHOUT_TORCH = [
    (["--help"], 0),
    (["--version"], 0),
    ([], 2),
    (["smaple"], 2),
    *(([command, "--help"], 0) for command in door.COMMANDS),
    (["sample", "--batch-size", "0"], 2),
    (["reconstruct", "--model", "emoji-vq", "--input", "not/there"], 2),
    (["tokenize", "--model", "emoji-vq", "--data", "not/there", "--out", "x"], 2),
    (["reconstruct", "--model", "emoji-vk", "--input", "."], 2),
    (["tokenize", "--model", "emoji-vk", "--data", ".", "--out", "x"], 2),
    (["train", "not/there.yaml"], 2),
    (["train", "config.yaml", "system=anyordr"], 2),
    (["train", "config.yaml", "steps=0"], 2),
    (["train", "config.yaml", "precision=off"], 2),
    (["train", "config.yaml", "seed=12:30"], 2),
    (["train", "config.yaml", "data.path=not/there"], 2),
    (["train", "config.yaml", "data.path=none/{000..004}.tar"], 2),
    (["train", "config.yaml", "data.tokens=not/there"], 2),
    (["train", "config.yaml", "out=taken"], 2),
    (["data", "info", "{000..004}.tar"], 2),
    (["tokenize", "--model", "emoji-vq", "--data", "nothing/*.tar", "--out", "x"], 2),
    (["reconstruct", "--model", "emoji-vq", "--input", "pictures", "--split", "valid"], 2),
    (["sample", "--model", "emojy"], 2),
    (["sample", "--order", "rastr"], 2),
    (["orders", "--order", "raster", "--order", "region-4"], 2),
    (["sample", "--model", "."], 2),
    (["convert", "llamagen-vq1", "--out", "x"], 2),
    (["data", "info", "not/there"], 2),
    (["orders", "--grid", "0"], 2),
    (["convert", "--out", "x"], 2),
    # From here on pictures are looked at, which takes numpy.
    (["sample", "--prompt", "ghost", "--mask", "empty.png"], 2),
    (["sample", "--prompt", "ghost", "--init-image", "empty.png", "--mask", "empty.png"], 2),
]


def test_nothing_heavy_is_imported_for_help_and_refusals(tmp_path):
    """One process for all: what a command imports stays, so none of them imports torch."""
    (tmp_path / "config.yaml").write_text("version: 1\nsystem: anyorder\nout: run\nsteps: 1\n", encoding="utf-8")
    (tmp_path / "pictures" / "train").mkdir(parents=True)
    (tmp_path / "pictures" / "train" / "a.png").touch()
    (tmp_path / "empty.png").touch()
    (tmp_path / "taken" / "previews").mkdir(parents=True)  # of somebody else
    code = f"""
import sys
from vgen.cli.main import main
for words, wanted in {WITHOUT_TORCH!r}:
    try:
        found = main(words)
    except SystemExit as end:
        found = end.code
    assert found == wanted, (words, found)
    heavy = {{"torch", "diffusers", "transformers", "accelerate", "huggingface_hub"}}
    heavy = sorted((heavy if "empty.png" in words else heavy | {{"numpy"}}) & sys.modules.keys())
    assert not heavy, (words, heavy)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"vgen {vgen.__version__}\n"


@pytest.mark.parametrize(
    "words, said",
    [
        (["smaple"], "(did you mean 'sample'?)"),
        (["quantum"], "got 'quantum'; `vgen --help`"),
        (["sample", "--gudance-scale", "3"], "no option --gudance-scale (did you mean '--guidance-scale'?); `vgen sample --help`"),
        (["sample", "--dtype", "half"], "--dtype is one of float32, bfloat16, float16; got 'half'; `vgen sample"),
        (["train", "c.yaml", "--steps=5"], "no option --steps, settings are written without dashes (steps=…)"),
        (["train", "c.yaml", "--dry-run", "steps=4"], "'steps=4' is one argument too many; settings stand right behind CONFIG"),
        (["train"], "the following arguments are required: CONFIG; `vgen train --help`"),
        (["data", "emojj"], "(did you mean 'emoji'?)"),
        (["data", "emoji", "--out", "x", "--sise", "8"], "(did you mean '--size'?); `vgen data emoji --help`"),
    ],
)  # fmt: skip
def test_mistakes_of_the_command_line(words, said, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("vgen") and error.count("\n") == 1


def no_memory():
    import torch

    torch.empty(1 << 60, dtype=torch.uint8)


def raise_(error):
    def act():
        raise error

    return act


@pytest.mark.parametrize(
    "act, code, said",
    [
        (raise_(VgenError("two\nlines")), 2, "two lines"),
        (lambda: Path("/no/such/file").read_bytes(), 2, "/no/such/file: No such file or directory; check the path"),
        (lambda: Path("/").read_bytes(), 2, "/: Is a directory"),
        (raise_(OSError(errno.ENOSPC, "No space left on device", "a", None, "b")), 2, "b: No space left on device"),
        (raise_(PermissionError(errno.EACCES, "Permission denied", "out.png")), 2, "out.png: Permission denied"),
        (raise_(RuntimeError("I/O error: No space left on device (os error 28)")), 2, "check the space on the disk"),
        (lambda: {}["width"], 1, "a fault of vgen (KeyError: 'width'); run it again with --debug"),
        (raise_(ValueError()), 1, "a fault of vgen (ValueError); run"),
        (no_memory, 1, "there is not enough memory"),
        (raise_(MemoryError()), 1, "there is not enough memory (MemoryError); give a smaller --batch-size"),
        (lambda: __import__("surely_not_installed"), 2, "module surely_not_installed is missing; install vgen again"),
        (raise_(ModuleNotFoundError("no", name="vgen.gone")), 1, "a fault of vgen"),
        (raise_(KeyboardInterrupt()), 130, "interrupted"),
    ],
)
def test_any_exception_is_one_sentence(act, code, said, monkeypatch, capsys):
    from vgen.cli import orders

    monkeypatch.setattr(orders, "run", lambda args: act())
    assert main(["orders"]) == code
    error = capsys.readouterr().err
    assert said in error and error.startswith("vgen orders: ") and error.count("\n") == 1
    assert main(["orders", "--debug"]) == code
    assert code == 130 or "Traceback" in capsys.readouterr().err


def test_memory_of_a_gpu():
    import torch

    assert in_words(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"))[0] == 1
    assert "not enough memory" in in_words(torch.OutOfMemoryError("CUDA out of memory"))[1]


def test_a_check_runs_before_the_command(monkeypatch, capsys):
    from vgen.cli import orders

    seen = []
    monkeypatch.setattr(orders, "run", lambda args: seen.append("run"))
    monkeypatch.setattr(orders, "check", lambda args: seen.append("check"))
    assert main(["orders"]) == 0 and seen == ["check", "run"]


@pytest.mark.parametrize(
    "word, known, found",
    [
        ("rastr", ["raster", "random"], "raster"),
        ("Raster", ["raster"], "raster"),
        ("XL", ["xl", "XXL"], "xl"),
        ("smaple", ["sample", "train"], "sample"),
        ("quantum", ["atm", "ant", "quart"], None),
        ("dragon", ["wagon", "rag", "orange"], None),
        ("cat", ["bat", "car", "cart-horse"], None),
        ("", ["a", "b"], None),
    ],
)
def test_only_close_spellings_are_suggested(word, known, found):
    assert nearest(word, known) == (f" (did you mean {found!r}?)" if found else "")


def test_every_option_that_a_text_of_the_program_names_exists():
    """Texts of errors, logs and help: what they tell the user to type is there."""
    options = {"--help", "--version"}
    pending = [door.build_parser(command) for command in door.COMMANDS]
    while pending:
        for action in pending.pop()._actions:
            options |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                pending += action.choices.values()
    of_others = {
        "--shm-size",
        "--num_processes",
        "--nproc_per_node",
        "--silent",
        "--pack-destination",
    }  # docker, torch, npm
    root = Path(vgen.__file__).parents[1]
    named = {}
    for folder in ("vgen", "samplers", "tokenizers_vis", "kernels"):
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    for option in re.findall(r"(?<![\w-])--[a-z][\w-]*[a-z0-9]", node.value):
                        named.setdefault(option, path.name)
    options |= of_others | {"--low"}  # the beginning of three, which a loop makes
    unknown = {option: file for option, file in named.items() if option not in options}
    assert len(named) > 30 and not unknown
