"""Folders that `save_pretrained` wrote: is one whole, is it of the expected class, and the model in it. Nothing here imports torch.

diffusers opens such folders with gaps: weights that a file lacks stay random and fields of a config that a class does not know are
dropped, both with a warning only. Here they are errors, and whatever its loaders raise names the file.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vgen.errors import VgenError, file_reason, first_line

# diffusers' name; then `.safetensors`, `.VARIANT.safetensors`, or an index of shards
WEIGHTS = "diffusion_pytorch_model"
AGAIN = "copy or download the folder again"
# Names that classes had when vgen 0.1 wrote folders which still open.
RENAMED = {
    "MAR": "MARModel",
    "HiMAR": "HiMARModel",
    "TokenBridgeGenerator": "TokenBridgeModel",
    "MaskGITViT": "MaskGITViTModel",
    "MaskGITUViT": "MaskGITUViTModel",
    "MaskGenVQ": "MaskGenVQModel",
    "MaskGenKL": "MaskGenKLModel",
    "MingUniVision": "MingUniVisionModel",
}


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. VgenError: not there, not readable, not UTF-8, no JSON, or no object."""
    path = Path(path)
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise VgenError(f"{file_reason(error)}; {AGAIN}") from error
    except (ValueError, RecursionError) as error:  # of the decoding, or of JSON
        raise VgenError(f"{path} is not a JSON file ({first_line(error)}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise VgenError(f"{path} holds a JSON {type(content).__name__}, expected an object {{…}}; {AGAIN}")
    return content


def has_model(folder: str | Path) -> bool:
    """Whether a saved model lies in this folder: `config.json` and weights, in one file or several."""
    folder = Path(folder)
    return (folder / "config.json").is_file() and any(folder.glob(f"{WEIGHTS}*.safetensors*"))


def weight_files(folder: str | Path, variant: str | None = None) -> tuple[list[Path], str | None]:
    """The files with the weights of a saved model, and their variant (None: they have none).

    variant: such as 'fp16'. None: the weights without one, or else the only one there is. VgenError: none, several variants,
    or shards that the index names and the folder lacks.
    """
    folder = Path(folder)
    found = _variants(folder)
    if variant is None and None not in found and len(found) == 1:
        variant = next(iter(found))
    if variant not in found:
        wanted = f"{WEIGHTS}{f'.{variant}' if variant else ''}.safetensors"
        others = ", ".join(sorted(path.name for path in found.values()))
        if not folder.is_dir():
            raise VgenError(f"there is no folder {folder}; give the folder of a saved model")
        choose = f"it has {others}; name one (variant=…)" if others else AGAIN
        raise VgenError(f"{folder} has no weights: {wanted} is missing; {choose}")
    path = found[variant]
    if path.suffix == ".safetensors":
        return [path], variant
    return index_shards(path), variant


def index_shards(path: Path) -> list[Path]:
    """The files that an index of shards (`….index.json`) names, beside it. VgenError: no index, or shards that are not there."""
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()) or not index:
        raise VgenError(f"{path} names no shards (weight_map); {AGAIN}")
    shards = [path.parent / Path(name).name for name in sorted(set(index.values()))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise VgenError(f"{path.parent} lacks {', '.join(missing)}, which {path.name} names; {AGAIN}")
    return shards


def _variants(folder: Path) -> dict[str | None, Path]:
    """variant -> its file or index; a whole file wins over an index, as in diffusers."""
    found: dict[str | None, Path] = {}
    for path in sorted(folder.glob(f"{WEIGHTS}.safetensors.index*.json")):
        found[
            path.name.removesuffix(".json").removeprefix(f"{WEIGHTS}.safetensors.index").removeprefix(".") or None
        ] = path
    for path in sorted(folder.glob(f"{WEIGHTS}*.safetensors")):
        variant = path.name.removesuffix(".safetensors").removeprefix(WEIGHTS).removeprefix(".") or None
        if variant is None or "-of-" not in variant:
            found[variant] = path
    return found


def saved_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in safetensors files, from their headers. VgenError: cut off, empty, or no such file."""
    import safetensors

    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            size = path.stat().st_size if path.is_file() else 0
            raise VgenError(
                f"{path} ({size} bytes) is not a complete safetensors file ({first_line(error)}); {AGAIN}"
            ) from error
    return shapes


def check_saved(
    kind: type, folder: str | Path, variant: str | None = None
) -> tuple[dict[str, tuple[int, ...]], str | None]:
    """Shapes of the weights in `folder` and their variant; VgenError unless the folder holds a whole model of the class `kind`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise VgenError(f"there is no folder {folder}; give the folder of a saved {kind.__name__}")
    if not (folder / "config.json").is_file():
        raise VgenError(f"{folder} has no config.json, so it is no saved {kind.__name__}; {AGAIN}")
    config = read_json(folder / "config.json")
    found = config.get("_class_name", kind.__name__)
    if RENAMED.get(found, found) != kind.__name__:
        raise VgenError(f"{folder} holds a {found}, expected {kind.__name__}; name the folder of such a model")
    known = inspect.signature(kind.__init__).parameters
    unknown = [name for name in config if not name.startswith("_") and name not in (*known, "auto_map")]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        raise VgenError(
            f"{folder / 'config.json'} has {', '.join(unknown)}, which this vgen's {kind.__name__} does not know; a newer vgen "
            "wrote it: update vgen"
        )
    files, variant = weight_files(folder, variant)
    return saved_shapes(files), variant


def open_saved(kind: Any, folder: str | Path, variant: str | None = None, **options: Any) -> Any:
    """The model of the class `kind` that lies in `folder`, as `kind.from_pretrained(folder, **options)`, without gaps.

    VgenError: see `check_saved`; a config that the class refuses, weights that are missing, left over or of another shape.
    """
    shapes, variant = check_saved(kind, folder, variant)
    try:
        model = kind.from_pretrained(folder, variant=variant, **options)
    except (VgenError, MemoryError):
        raise
    except Exception as error:  # diffusers' loaders have no common base
        raise VgenError(
            f"{folder} cannot be opened as {kind.__name__} ({type(error).__name__}: {first_line(error)}); its config.json and its "
            f"weights do not belong together, or a value is wrong: {AGAIN}"
        ) from error
    _compare({name: tuple(value.shape) for name, value in model.state_dict().items()}, shapes, folder)
    return model


def _compare(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], folder: str | Path) -> None:
    gaps = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
    }
    said = "; ".join(
        f"{len(names)} {label} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for label, names in gaps.items()
        if names
    )
    if said:
        raise VgenError(
            f"the weights in {folder} do not fit its config.json: expected {len(wanted)} tensors, found {len(found)}: {said}; {AGAIN}"
        )
