"""Data from npm packages: obtain a pinned archive, check it, read its members."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vgen.errors import VgenError
from vgen.files import sha256


@dataclass(frozen=True)
class Package:
    """One version of one npm package. `digest` (SHA-256 of its archive) pins the bytes; None accepts any readable archive."""

    name: str
    version: str
    digest: str | None = None

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def file_name(self) -> str:
        """The name `npm pack` gives the archive: "@scope/name" becomes "scope-name"."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


def find_archive(package: Package, folder: str | Path) -> Path:
    """The archive of `package` in a user's folder; raises VgenError when it is missing or broken."""
    path = Path(folder) / package.file_name
    if not path.is_file():
        raise VgenError(f"{folder} has no {package.file_name}: put it there with `npm pack {package.spec}`")
    if problem := _problem(package, path):
        raise VgenError(f"{path} {problem}: delete it and run `npm pack {package.spec}` in its folder")
    return path


def fetch_archive(package: Package, cache: str | Path) -> Path:
    """The archive of `package` in `cache`: reused when it is there and intact, else fetched with `npm pack`."""
    path = Path(cache) / package.file_name
    if path.is_file() and _problem(package, path) is None:
        return path
    _npm_pack(package, path)
    if problem := _problem(package, path):
        path.unlink()
        raise VgenError(f"the archive of {package.spec} that npm fetched {problem}: try again")
    return path


def read_members(path: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """(name inside the package, contents) of every file whose name ends in `suffix`, in archive order."""
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(suffix):
                    yield member.name.partition("/")[2], archive.extractfile(member).read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise VgenError(f"{path} is not an intact .tgz archive ({error}): delete it and start again") from error


def _problem(package: Package, path: Path) -> str | None:
    """What is wrong with an archive, as the end of a sentence about it."""
    if package.digest is not None:
        found = sha256(path)
        return (
            None if found == package.digest else f"is broken (SHA-256 {found[:12]}…, expected {package.digest[:12]}…)"
        )
    try:
        for _ in read_members(path, suffix="\0"):  # matches nothing: reads to the end, which checks every block's CRC
            pass
    except VgenError as error:
        return f"is broken ({error.__cause__})"
    return None


def _npm_pack(package: Package, path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise VgenError(
            f"npm is needed to fetch {package.spec} and was not found: install Node.js, or run `npm pack {package.spec}` "
            "on another machine and pass the folder of the archives with --archives"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".npm-", dir=path.parent) as folder:
        command = [npm, "pack", package.spec, "--silent", "--pack-destination", folder]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        made = list(Path(folder).glob("*.tgz"))
        if result.returncode or len(made) != 1:
            said = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()[-1]
            raise VgenError(
                f"`npm pack {package.spec}` failed (exit code {result.returncode}: {said}): check the network"
            )
        made[0].replace(path)
