"""The training configs that come with vgen, by name: `emoji/anyorder` is `configs/emoji/anyorder.yaml` of a checkout or a wheel.

Nothing here imports torch. The published checkpoints beside them (`configs/published/`) are read by `vgen/convert/published.py`.
"""

from __future__ import annotations

from pathlib import Path

from vgen.errors import VgenError, nearest

HERE = Path(__file__).resolve().parent
FOLDERS = (HERE / "configs", HERE.parent / "configs")  # installed; a checkout
PUBLISHED = "published"


def config_folder() -> Path:
    """The folder with all YAML files, of an installed package or of a checkout. VgenError: it is missing."""
    found = next((path for path in FOLDERS if path.is_dir()), None)
    if found is None:
        raise VgenError(f"vgen's configs are missing: expected {' or '.join(map(str, FOLDERS))}; install vgen again")
    return found


def config_names() -> list[str]:
    """Names of the training configs that come with vgen, sorted: `emoji/anyorder`, …"""
    folder = config_folder()
    files = (path.relative_to(folder).with_suffix("") for path in folder.glob("*/*.yaml"))
    return sorted(path.as_posix() for path in files if path.parts[0] != PUBLISHED)


def find_config(config: str | Path) -> Path:
    """The file of a config, given its path or its name; of what is both the path counts. VgenError: neither, with the nearest name."""
    path, name = Path(config), str(config)
    if path.is_file():
        return path
    if name in config_names():
        return config_folder() / f"{name}.yaml"
    guess = Path(name.removesuffix(".yaml").removesuffix(".yml")).as_posix().removeprefix("configs/")
    hint = f" (did you mean {guess!r}?)" if guess in config_names() else nearest(guess, config_names())
    if path.is_dir():
        raise VgenError(
            f"{path} is a folder, expected a YAML file with a config; `vgen configs` lists those that come with vgen"
        )
    raise VgenError(
        f"there is no config file {path}, and no config of this name comes with vgen{hint}; give the path of a YAML file, or a "
        "name that `vgen configs` lists"
    )


def config_summary(name: str) -> str:
    """The first line of a config that comes with vgen: what it trains."""
    with (config_folder() / f"{name}.yaml").open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()
