"""The folders, what may import what, and the package list."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A folder may import from itself and from everything to its left.
DIRECTION = [
    "vgen.errors",
    "vgen.values",
    "vgen.plugins",
    "vgen.files",
    "vgen.exports",
    "vgen.saved",
    "vgen.sizes",
    "vgen.yaml12",
    "vgen.recipes",
    "vgen.settings",
    "vgen.metrics",
    "vgen.checkpoints",
    "vgen.kernels",
    "vgen.layers",
    "vgen.samplers",
    "vgen.tokenizers_vis",
    "vgen.models",
    "vgen.data",
    "vgen.viz",
    "vgen.pipelines",
    "vgen.train",
    "vgen.eval",
    "vgen.convert",
    "vgen.cli",
]
TOP = {"kernels": "vgen.kernels", "samplers": "vgen.samplers", "tokenizers_vis": "vgen.tokenizers_vis"}


def modules():
    for folder in ("kernels", "samplers", "tokenizers_vis", "vgen"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join((TOP.get(parts[0], parts[0]), *parts[1:])).removesuffix(".__init__")
            yield name, path


def rank(name: str) -> int | None:
    if name.endswith(".__main__"):  # `python -m vgen.train` is a door to the command line
        return len(DIRECTION)
    found = [i for i, prefix in enumerate(DIRECTION) if name == prefix or name.startswith(prefix + ".")]
    return found[0] if found else None


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


@pytest.mark.parametrize("name, path", list(modules()), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_point_one_way(name, path):
    own = rank(name)
    assert own is not None or name in ("vgen", "vgen.assets"), f"{name} has no place in the import order"
    for imported in imports(path):
        if imported.startswith("vgen") and own is not None and rank(imported) is not None:
            assert rank(imported) <= own, f"{name} imports {imported}, which lies to its right"
        assert imported.split(".")[0] not in TOP, (
            f"{name} imports the top-level folder {imported}; write vgen.{imported}"
        )


def test_package_list_is_complete():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {name for name, path in modules() if path.name == "__init__.py"}
    assert set(settings["packages"]) == found | {"vgen.configs"}
    assert (ROOT / settings["package-dir"]["vgen.configs"]).is_dir() and settings["package-data"]["vgen.configs"]


def test_import_is_lazy():
    code = "import vgen, sys; assert vgen.__version__; assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_public_names_resolve():
    import vgen

    assert set(vgen.__all__) == {"__version__", *vgen._LAZY}
    for name in vgen.__all__:
        assert getattr(vgen, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vgen.nothing  # noqa: B018


def test_a_clone_called_vgen_is_no_trap_for_python_above_it(tmp_path):
    (tmp_path / "vgen").symlink_to(ROOT)
    code = (
        "from vgen import VisualPipeline, __version__; import vgen, vgen.kernels, vgen.samplers.orders, vgen.tokenizers_vis;"
        "assert vgen.__path__[0].endswith('/vgen') and vgen.Canvas and __version__ == vgen.__version__"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=120)
    said = subprocess.run([sys.executable, "-m", "vgen", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert said.stdout.startswith("vgen ") and said.returncode == 0, said.stderr


def test_extras_hold_only_what_is_imported():
    """Every package of an extra is imported somewhere (dev: by the tests, or it is a tool)."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {"beautifulsoup4": "bs4"}
    tools = {"pytest", "ruff", "mypy"}
    source = "\n".join(path.read_text() for _, path in modules())
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for extra, requirements in extras.items():
        for requirement in requirements:
            package = requirement.split(">")[0]
            wanted = names.get(package, package)
            assert package in tools or wanted in (source if extra != "dev" else source + tests), f"[{extra}] {package}"


def test_one_version_is_named_everywhere():
    import yaml

    import vgen

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["version"] == citation["version"] == vgen.__version__ and project["license"] == citation["license"]
    assert f"## {vgen.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_picture_of_the_rooms_shows_what_is_there():
    """Every folder of the picture in docs/architecture.md exists, and every folder with modules is in it."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = page.split("## Rooms")[1].split("```")[1]
    shown, room = set(), ""
    for line in picture.strip("\n").splitlines():
        if line[1] != " ":
            room = line.split()[0].rstrip(",")
            shown |= {word.rstrip(",") for word in line[:28].split() if word.endswith(("/", "/,"))}
        shown |= {
            room + word for word in re.findall(r"\b\w+/", line[28:]) if word != "configs/" and word != "published/"
        }
    there = {f"{path.parent.relative_to(ROOT).as_posix()}/" for _, path in modules() if path.name == "__init__.py"}
    assert shown == there - {"vgen/", "vgen/assets/"}
