"""What a folder of a saved model or pipeline holds besides weights: the way in for diffusers, a model card, and vgen's mark.

diffusers opens a class that is not its own by a file of code in the folder, where `trust_remote_code=True` allows it. The files here
import vgen and hold nothing else, so they are the same for every model: diffusers copies them to one place for all folders. vgen
itself never runs code from a folder; it looks classes up in its own tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vgen.errors import VgenError
from vgen.files import marked, ours

CARD = "README.md"
MODEL_FILE, PIPELINE_FILE = "vgen_model", "vgen_pipeline"  # names of modules: with `.py` in the folder
# For diffusers' AutoModel, in config.json and model_index.json.
AUTO_MAP = {"AutoModel": f"{MODEL_FILE}.Component"}
_CODE = {
    MODEL_FILE: '"""For diffusers: AutoModel.from_pretrained(folder, trust_remote_code=True). Needs the package vgen."""\n\n'
    "from vgen.pipelines.components import Component\n\n__all__ = ['Component']\n",
    PIPELINE_FILE: '"""For diffusers: DiffusionPipeline.from_pretrained(folder, trust_remote_code=True). Needs the package vgen."""\n\n'
    "from vgen.pipelines.pipeline import VisualPipeline\n\n__all__ = ['VisualPipeline']\n",
}


@contextmanager
def exporting(folder: str | Path, module: str, card: str) -> Iterator[None]:
    """Around the saving of a model or pipeline in `folder`: adds the file for diffusers, the card and the mark.

    module: MODEL_FILE or PIPELINE_FILE. A card that somebody else wrote stays. VgenError: `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise VgenError(f"{folder} is a file, expected a folder to save in")
    folder.mkdir(parents=True, exist_ok=True)
    with marked(folder, "model"):
        (folder / f"{module}.py").write_text(_CODE[module], encoding="utf-8")
        if not (folder / CARD).exists() or CARD in ours(folder, "model"):
            (folder / CARD).write_text(card, encoding="utf-8")
        yield


def with_auto_map(text: str, **changes: Any) -> str:
    """The JSON of a config, plus the entry that leads diffusers' AutoModel to vgen, and other changes."""
    return json.dumps({**json.loads(text), "auto_map": AUTO_MAP, **changes}, indent=2, sort_keys=True) + "\n"


def without_auto_map(config: dict[str, Any]) -> dict[str, Any]:
    """A config without that entry, which is no argument of a constructor."""
    return {name: value for name, value in config.items() if name != "auto_map"}


def write_card(title: str, text: str, code: str) -> str:
    """A model card (README.md, with the front matter that the hub reads). text: what it is; code: Python, how it is used."""
    front = "---\nlibrary_name: diffusers\ntags:\n- vgen\n---\n\n"
    return f"{front}# {title}\n\n{text}\n\n```python\n{code}\n```\n\nIt needs the package `vgen`; the `.py` files here import it and hold nothing else.\n"


class Exported:
    """For diffusers models of vgen, before `ModelMixin` among the bases: their folders open in plain diffusers and hold a card."""

    def to_json_string(self) -> str:
        """As diffusers, plus where AutoModel finds the class. (Without it AutoModel takes its own class of the same name.)"""
        return with_auto_map(super().to_json_string())

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As diffusers, for configs with that entry."""
        return super().extract_init_dict(without_auto_map(config_dict), **kwargs)

    def save_beside(self, folder: Path) -> None:
        """Writes what this model keeps in its folder besides weights and config: words, names of classes."""

    # diffusers' pipelines hand an argument on only where it is named here.
    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **kwargs: Any,
    ) -> None:
        """As diffusers, plus a model card, a file that lets diffusers' AutoModel open it, and the mark by which vgen may replace it."""
        kind = type(self).__name__
        size = sum(parameter.numel() for parameter in self.parameters()) / 1e6
        card = write_card(
            kind,
            f"A `{kind}` of vgen, {size:.1f} M parameters.",
            "from diffusers import AutoModel\n\n"
            'model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True)\n\n'
            f"# or, without code from this folder\nfrom {type(self).__module__} import {kind}\n\n"
            f'model = {kind}.from_pretrained("FOLDER")',
        )
        with exporting(save_directory, MODEL_FILE, card):
            super().save_pretrained(
                save_directory,
                safe_serialization=safe_serialization,
                variant=variant,
                max_shard_size=max_shard_size,
                **kwargs,
            )
            self.save_beside(Path(save_directory))
