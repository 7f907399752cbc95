"""The configs that come with vgen, by name; and that a wheel has all of them, and all that is read at run time."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vgen import recipes
from vgen.convert.published import names as published_names
from vgen.errors import VgenError
from vgen.recipes import config_folder, config_names, config_summary, find_config

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "published")


def test_every_config_has_a_name_and_a_line():
    assert [find_config(name) for name in config_names()] == FILES and len(FILES) > 40
    for name in config_names():
        assert len(config_summary(name)) > 20 and not config_summary(name).startswith("#"), name


def test_a_path_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("emoji/anyorder") == config_folder() / "emoji" / "anyorder.yaml"
    (tmp_path / "emoji").mkdir()
    (tmp_path / "emoji" / "anyorder").write_text("version: 1\n")
    assert find_config("emoji/anyorder") == Path("emoji/anyorder")
    assert find_config(ROOT / "configs" / "dar" / "B_256.yaml") == ROOT / "configs" / "dar" / "B_256.yaml"


@pytest.mark.parametrize(
    "given, said",
    [
        ("emoji/anyordre", r"did you mean 'emoji/anyorder'"),
        ("configs/emoji/kl.yaml", r"did you mean 'emoji/kl'"),
        ("emoji/kl.yaml", r"did you mean 'emoji/kl'"),
        ("published/rar-B-256", "no config of this name"),
        ("../pyproject", "no config of this name"),
        ("emoji", "is a folder, expected a YAML file"),
        ("", "is a folder, expected a YAML file"),
    ],
)
def test_what_is_no_config_is_one_sentence(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").mkdir()
    with pytest.raises(VgenError, match=said) as error:
        find_config(given)
    assert "vgen configs" in str(error.value)


@pytest.mark.parametrize("ask", [config_names, published_names])
def test_missing_files_are_an_error(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "FOLDERS", (tmp_path / "a", tmp_path / "b"))
    with pytest.raises(VgenError, match="install vgen again"):
        ask()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel of this tree. It is built from a copy: setuptools leaves folders behind."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("vgen", "kernels", "samplers", "tokenizers_vis", "configs"):
        shutil.copytree(ROOT / folder, copy / folder, copy_function=os.link if _links(copy) else shutil.copy2)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy)
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=copy, check=True, capture_output=True, timeout=120)
    return zipfile.ZipFile(next(out.glob("vgen-*.whl")))


def _links(folder: Path) -> bool:
    """Whether files of this tree can be linked into `folder` instead of copied."""
    return os.stat(ROOT).st_dev == os.stat(folder).st_dev


def test_a_wheel_holds_all_that_is_read_at_run_time(wheel):
    held = set(wheel.namelist())
    installed = {"configs": "vgen/configs", "vgen/assets": "vgen/assets"}
    for folder, place in installed.items():
        files = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file()]
        wanted = {f"{place}/{path.as_posix()}" for path in files if "__pycache__" not in path.parts}
        assert len(wanted) > 10 and wanted <= held, f"the wheel lacks {sorted(wanted - held)}"
    assert "vgen/py.typed" in held and not [
        name for name in held if name.startswith(("kernels/", "tests/", "configs/"))
    ]


def test_a_wheel_trains_by_name(wheel, tmp_path):
    """The files of a wheel, unpacked, in a process that does not see the checkout."""
    wheel.extractall(tmp_path / "site")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
from vgen.cli.main import main
import vgen
assert vgen.__file__.startswith({str(tmp_path)!r}), vgen.__file__
assert main(["configs"]) == main(["configs", "emoji/kl"]) == 0
quick = ["steps=2", "batch_size=2", "precision=fp32", "out=run", "preview_every=0", "evaluate_every=0", "tensorboard=false"]
assert main(["train", "emoji/kl", "data.path=pictures", *quick]) == 0
from vgen.tokenizers_vis.registry import open_tokenizer
open_tokenizer("emoji-vq")
"""
    _pictures(tmp_path / "pictures")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment
    )
    assert run.returncode == 0, run.stderr
    lines = [line.split(maxsplit=1) for line in run.stdout.splitlines()]
    assert all([name, config_summary(name)] in lines for name in config_names())
    assert find_config("emoji/kl").read_text() in run.stdout
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def _pictures(folder: Path) -> None:
    from PIL import Image

    folder.mkdir()
    for index in range(30):
        Image.new("RGB", (64, 64), (8 * index, 255 - 8 * index, 99)).save(folder / f"{index}.png")
