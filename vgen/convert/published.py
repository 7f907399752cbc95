"""The registry of published checkpoints: where each one lives, what it is, how its paper samples it, what it scored.

One YAML file per checkpoint in `configs/published/` (installed as `vgen/configs/published/`); its stem is the checkpoint's name. They
are facts about other people's releases, with their licences: vgen ships none of these weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from vgen.errors import VgenError, first_line, nearest
from vgen.recipes import PUBLISHED, config_folder
from vgen.samplers.settings import Sampling
from vgen.settings import merge, read_yaml

VERSION = 1
KINDS = ("generator", "tokenizer", "text_encoder")
NESTINGS = ("flat", "model", "model_ema", "state_dict", "folder")


@dataclass(frozen=True)
class PublishedSampling(Sampling):
    """The settings of the published figures, as the pipeline's, and two figures: precision, and calls (forward passes a picture)."""

    order: str = "raster"
    guidance_scale: float = 1.0
    precision: str = "fp32"
    calls: int | None = None


@dataclass(frozen=True)
class Protocol:
    """How the figures were measured: 'not stated' where the release does not say."""

    reference: str = "not stated"  # statistics that the samples are compared with
    samples: int | None = None
    classes: str = "not stated"
    resize: str = "none"
    rounding: str = "not stated"


@dataclass(frozen=True)
class Measurement:
    """Published figures of one evaluation: who says so, and what is not certain about them.

    source: paper, README, issue, … that states them. settings: where they differ from `Published.sampling`.
    unverified: why the values or their settings may be wrong (None: the source was read and says so).
    """

    source: str
    values: dict[str, float]  # fid, is, sfid, precision, recall, rfid, geneval, images_per_second, …
    settings: str = "as sampling"
    protocol: Protocol = field(default_factory=Protocol)
    unverified: str | None = None


@dataclass(frozen=True)
class Published:
    """One published checkpoint.

    family: llamagen, par, nar, rar, lumina, or of a tokenizer or text encoder. repo: on the Hugging Face hub (None:
    elsewhere, see `where`). files: names or patterns; with nesting 'folder' all of them are wanted, else one, the first of
    them that is there. nesting: entry of the file that holds the tensors, or 'flat'. size, options: the family's `size_config(size)`
    updated by `options` gives the constructor arguments. grid: (H, W) tokens. parameters: without buffers; None where not known.
    tokenizer, text_encoder: names of other entries; tokenizer_options: constructor arguments of the tokenizer where this
    release sets other ones. orders: what it decodes without retraining. code_licence, weights_licence: 'none stated' where so.
    sources, unverified: field -> who states its value, or why it may be wrong ('sampling.top_k': a field of `sampling`); of
    the other fields the release itself (paper, repository, file) is the source. notes: what else a user must know.
    """

    name: str = MISSING
    version: int = MISSING
    kind: str = MISSING
    family: str = MISSING
    paper: str = MISSING
    repo: str | None = MISSING
    files: list[str] = MISSING
    nesting: str = MISSING
    code_licence: str = MISSING
    weights_licence: str = MISSING
    where: str | None = None
    size: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    grid: list[int] = field(default_factory=list)  # empty: any (tokenizers)
    parameters: int | None = None
    tokenizer: str | None = None
    tokenizer_options: dict[str, Any] = field(default_factory=dict)
    text_encoder: str | None = None
    orders: list[str] = field(default_factory=list)
    sampling: PublishedSampling = field(default_factory=PublishedSampling)
    measurements: list[Measurement] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    unverified: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def source(self) -> str:
        """Where its files are, in words: 'c2i_B_256.pt from the hub repository FoundationVision/LlamaGen'."""
        origin = f"the hub repository {self.repo}" if self.repo else self.where
        return f"{(', ' if self.nesting == 'folder' else ' or ').join(self.files)} from {origin}"

    @property
    def parts(self) -> dict[str, str]:
        """role -> name of everything that a picture needs: 'model' (itself), 'tokenizer', 'text_encoder'."""
        roles = {"model": self.name, "tokenizer": self.tokenizer, "text_encoder": self.text_encoder}
        return {role: name for role, name in roles.items() if name is not None}


# What `sources` and `unverified` can be about.
FIELDS = (*(part.name for part in fields(Published)), *(f"sampling.{part.name}" for part in fields(PublishedSampling)))


def folder() -> Path:
    """The folder with the YAML files, of an installed package or of a checkout."""
    return config_folder() / PUBLISHED


def names(family: str | None = None, kind: str | None = None) -> list[str]:
    """Names of all published checkpoints, or of those of one family and kind (`KINDS`), sorted."""
    entries = (path.stem for path in folder().glob("*.yaml"))
    return sorted(
        name
        for name in entries
        if (family is None or published(name).family == family) and (kind is None or published(name).kind == kind)
    )


def find(name: str) -> Path:
    """The YAML file of a checkpoint. Raises VgenError for an unknown name, naming the nearest ones."""
    path = folder() / f"{name}.yaml"
    if name not in names():
        raise VgenError(
            f"there is no published checkpoint {name!r}{nearest(name, names())}; `vgen convert --list` prints all of them"
        )
    return path


@cache
def published(name: str) -> Published:
    """What is known about a published checkpoint. Raises VgenError for an unknown name or a broken file."""
    path = find(name)
    found = merge(Published, {"name": name}, read_yaml(path))
    for field_name, value, allowed in (("kind", found.kind, KINDS), ("nesting", found.nesting, NESTINGS)):
        if value not in allowed:
            raise VgenError(f"{path}: {field_name} is one of {', '.join(allowed)}, got {value!r}")
    if found.version != VERSION:
        raise VgenError(f"{path} has version {found.version}, this vgen reads version {VERSION}")
    if not found.files or (found.repo is None) == (found.where is None):
        raise VgenError(f"{path} must name files, and either a hub repository (repo) or another place (where)")
    for claim in [*found.sources, *found.unverified]:
        if claim not in FIELDS:
            raise VgenError(
                f"{path}: sources and unverified are about fields of an entry, {claim!r} is none{nearest(claim, FIELDS)}"
            )
    return found


def locate(name: str, checkpoint_dir: str | Path | None = None) -> dict[str, Path]:
    """Files of a checkpoint and of what it needs: 'model', 'tokenizer', 'text_encoder' -> a file (or folder: nesting 'folder').

    checkpoint_dir: a folder that holds them, directly, under `<repository>/`, under `<owner>/<repository>/`, or as `<name>.<suffix>`;
    nothing is downloaded then. None: the hub's cache, filled from the network where needed. Raises one VgenError that says
    which files are wanted and from where.
    """
    parts = {role: published(part) for role, part in published(name).parts.items()}
    paths: dict[str, Path] = {}
    failures: dict[str, str] = {}
    for role, part in parts.items():
        try:
            paths[role] = _download(part) if checkpoint_dir is None else _in_folder(part, Path(checkpoint_dir))
        except FileNotFoundError as error:
            failures[role] = str(error)
    if failures:
        wanted = "; ".join(parts[role].source for role in failures)
        reason = next(iter(failures.values()))
        by_hand = any(parts[role].repo is None for role in failures)  # not on the hub: no network helps
        if checkpoint_dir is None:
            advice = "download them elsewhere and pass --checkpoint-dir"
            advice = advice if by_hand else f"connect to the network, or {advice}"
        else:
            advice = "put them there" if by_hand else "put them there, or leave --checkpoint-dir out to download them"
        raise VgenError(f"{name} needs {wanted}, but {reason}; {advice}")
    return paths


def _in_folder(entry: Published, root: Path) -> Path:
    """FileNotFoundError: not there; VgenError: more than one file fits a pattern."""
    places = _places(entry, root)
    if entry.nesting == "folder":
        for place in places[1:]:
            if place.is_dir() and all(any(place.glob(pattern)) for pattern in entry.files):
                return place
        raise FileNotFoundError(f"{root} has no folder {places[1].name} with them")
    own_names = [(root, f"{entry.name}{Path(pattern).suffix}") for pattern in entry.files]
    for place, wanted in [*own_names, *((place, pattern) for place in places for pattern in entry.files)]:
        if place == root and "*" in wanted:
            continue  # a pattern such as *.pt says nothing in a folder that many checkpoints share
        found = sorted(place.glob(wanted)) if place.is_dir() else []
        if len(found) > 1:
            raise VgenError(f"{place} has {len(found)} files that could be {entry.name} ({wanted}); leave one there")
        if found:
            return found[0]
    raise FileNotFoundError(f"{root} does not have all of them")


def _places(entry: Published, root: Path) -> list[Path]:
    owner, _, repository = (entry.repo or f"/{entry.name}").rpartition("/")
    return [root, root / repository, root / owner / repository]


def _download(entry: Published) -> Path:
    """FileNotFoundError when the hub cannot be reached or has no such file."""
    if entry.repo is None:
        raise FileNotFoundError(f"{entry.name} is not on the hub")
    import huggingface_hub

    huggingface_hub.utils.logging.set_verbosity_error()  # its retries are not ours to show: one sentence follows
    try:
        if entry.nesting != "folder" and len(entry.files) == 1 and "*" not in entry.files[0]:
            return Path(huggingface_hub.hf_hub_download(entry.repo, entry.files[0]))
        copy = Path(huggingface_hub.snapshot_download(entry.repo, allow_patterns=entry.files))
    except Exception as error:  # the hub client's errors (HTTP, offline, cache, name) have no common base
        raise FileNotFoundError(f"the download failed ({type(error).__name__}: {first_line(error)})") from error
    return copy if entry.nesting == "folder" else _only(copy, entry.files)


def _only(place: Path, patterns: Sequence[str]) -> Path:
    """The file that fits the first pattern that any file fits."""
    found = next((paths for pattern in patterns if (paths := sorted(place.glob(pattern)))), [])
    if len(found) != 1:
        raise FileNotFoundError(f"{place} has {len(found)} files that fit {' or '.join(patterns)}, expected one")
    return found[0]
