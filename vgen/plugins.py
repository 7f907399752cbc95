"""Plug-ins: modules outside of vgen that register orders, tokenizers, models and systems of their own. Nothing here imports torch.

A plug-in calls `register_order`, `register_tokenizer`, `register_model` or `register_system` (all in `vgen`) when it is imported.
It is imported by whoever uses it: `import my_module` in Python, `--plugin my_module` on the command line, or, for a package that
is installed, by vgen itself when a name is asked for that vgen does not know; such a package names its module in `pyproject.toml`:

    [project.entry-points."vgen.plugins"]
    mine = "my_package.my_module"

A file (a config, a saved pipeline) cannot name a plug-in: what a file names is looked up among what is registered, never imported.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from vgen.errors import VgenError, first_line, nearest

GROUP = "vgen.plugins"
# (what, name) of all that plug-ins registered -> the module that it is from.
_OWNERS: dict[tuple[str, str], str] = {}


def register(table: MutableMapping[str, Any], what: str, name: str, entry: Any, owner: str) -> None:
    """Adds a row to a table of vgen; a module that is imported again (a notebook) replaces its own rows.

    what: "order", "tokenizer", "model" or "system"; owner: the module it is from. VgenError: a name that cannot be written on a
    command line or in a config, or that vgen or another plug-in has.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise VgenError(
            f"the name of a new {what} is made of small letters, digits and _, and begins with a letter, got {name!r}"
        )
    if name in table and _OWNERS.get((what, name)) != owner:
        raise VgenError(
            f"the {what} {name!r} is there already, from {_OWNERS.get((what, name), 'vgen')}; give the one of {owner} another name"
        )
    table[name] = entry
    _OWNERS[what, name] = owner


def register_class(
    table: MutableMapping[str, tuple[str, str]], what: str, name: str, kind: type, needs: Iterable[str]
) -> None:
    """As `register`, for a table of (module, class): `kind` is a class with all of `needs`, and no other row has one of its name."""
    if not isinstance(kind, type):
        raise VgenError(f"a {what} is registered by its class, got {kind!r}")
    if missing := [method for method in needs if not hasattr(kind, method)]:
        raise VgenError(
            f"{kind.__name__} has no {', '.join(missing)}, which every {what} has; see docs/architecture.md"
        )
    for other, (module, class_name) in table.items():
        if class_name == kind.__name__ and other != name:  # saved models are told apart by the names of their classes
            raise VgenError(
                f"the {what} {other!r} ({module}) has a class {class_name} already; give yours another name"
            )
    register(table, what, name, (kind.__module__, kind.__name__), kind.__module__)


def registered(what: str) -> list[str]:
    """Names of all that plug-ins have registered: of each "order", "tokenizer", "model" or "system"."""
    return [name for kind, name in _OWNERS if kind == what]


def known(table: Mapping[str, Any] | Callable[[], Iterable[str]], name: Any) -> bool:
    """Whether `name` is in a table of vgen, or in what makes one; installed plug-ins are imported before the answer is no."""

    def here() -> bool:
        return isinstance(name, str) and name in (table() if callable(table) else table)

    if not here():
        load_installed()
    return here()


def class_of(table: Mapping[str, tuple[str, str]], what: str, family: str) -> Any:
    """The class of a row of a table of (module, class). what: "generator", "tokenizer". VgenError: none, naming the nearest."""
    if not known(table, family):
        raise VgenError(f"unknown {what} family {family!r}{nearest(family, table)}; families: {', '.join(table)}")
    module, name = table[family]
    return getattr(importlib.import_module(module), name)


@cache
def load_installed() -> None:
    """Imports the plug-ins of installed packages, once. VgenError: one of them fails."""
    for entry in metadata.entry_points(group=GROUP):
        _import(entry.value.partition(":")[0], f"the installed plug-in {entry.name} ({entry.value})")


def load_plugin(name: str) -> None:
    """Imports a plug-in: a module's name, which may lie in the current folder, or the path of a `.py` file.

    VgenError: there is none, or it fails when it is imported.
    """
    asked = f"--plugin {name}"
    if not name.endswith(".py"):
        _look_in(Path.cwd())
        _import(name, asked)
        return
    path = Path(name).resolve()
    if not path.is_file():
        raise VgenError(f"{asked}: there is no such file; give the name of a module, or the path of a .py file")
    _look_in(path.parent)
    found = _import(path.stem, asked)
    if Path(found.__file__ or "").resolve() != path:
        raise VgenError(f"{asked}: another module is called {path.stem} ({found.__file__}); rename the file")


def _look_in(folder: Path) -> None:
    """At the end of the path: a file in the current folder must not stand in for a module of some library."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _import(module: str, asked: str) -> Any:
    try:
        return importlib.import_module(module)
    except VgenError as error:
        raise VgenError(f"{asked}: {error}") from error
    except Exception as error:  # it is somebody's code: anything can happen
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            raise VgenError(
                f"{asked}: there is no module {error.name}; install it, or go to the folder where it lies"
            ) from error
        raise VgenError(
            f"{asked} fails when it is imported ({type(error).__name__}: {first_line(error)}); `python -c 'import {module}'` shows where"
        ) from error
