"""Where `vgen sample` puts its pictures: one file, or a folder that can be interrupted at any moment and continued.

A folder holds numbered pictures and `samples.jsonl`, a line for each: its file, number, prompt or class, and every setting that
it was made with. The lines of a batch are on the disk before its pictures, so a picture never lacks its line; a line whose
picture is missing is dropped by the next run, which then makes the picture. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen.cli.arguments import writable_file, writable_folder
from vgen.errors import VgenError, file_reason
from vgen.files import atomic_path, sole_user

if TYPE_CHECKING:
    from PIL import Image

LIST = "samples.jsonl"
SHEET = 256  # pictures of the largest sheet: all of it is in memory, and an interruption loses it
ENLARGED = 256  # pictures up to this width are doubled on a sheet
OF_PICTURE = ("file", "number", "prompt", "class")  # what differs from line to line; "device" may, too
TEMPORARY = re.compile(r"\.(\d{5,}-.{8}\.png|samples-.{8}\.jsonl)")  # of `atomic_path`, left by a kill

Subject = Mapping[str, Any]  # {"prompt": "red apple"} or {"class": 7}


def destination(out: str, first: int, subjects: Sequence[Subject], overwrite: bool) -> OneFile | SampleFolder:
    """What `--out` names: a file by its suffix, else a folder, which may end in a slash. VgenError: it cannot be written.

    first: number of the first picture; subjects: of every picture.
    """
    from vgen.layers.picture_files import suffixes

    known, path = suffixes(), Path(out)
    if not out:
        raise VgenError("--out takes the name of a file or folder, got an empty one")
    if out.endswith(("/", os.sep)) or (path.is_dir() and path.suffix.lower() not in known):
        return SampleFolder(path, first, subjects, overwrite)
    if path.suffix.lower() in known:
        return OneFile(path, subjects)
    if path.suffix:
        raise VgenError(
            f"--out takes a file with {', '.join(known)}, or a folder, whose name may end in a slash; got {out!r}"
        )
    return SampleFolder(path, first, subjects, overwrite)


def caption(subject: Subject) -> str:
    """A subject as it stands under its picture."""
    return subject["prompt"] if "prompt" in subject else f"class {subject['class']}"


class OneFile:
    """One picture, or all of them on a labelled sheet. It is written when the last picture is done."""

    def __init__(self, path: Path, subjects: Sequence[Subject]):
        if len(subjects) > SHEET:
            raise VgenError(
                f"a sheet holds up to {SHEET} pictures and this would be {len(subjects)}; give a folder, --out {path.with_suffix('')}/"
            )
        writable_file("--out", path)
        self.path, self.subjects, self.page, self.done = path, subjects, None, 0
        self.kept: set[int] = set()

    @contextmanager
    def open(self, settings: Mapping[str, Any], size: tuple[int, int]) -> Iterator[None]:
        """size: (width, height) of a picture. VgenError for a sheet that its format cannot hold."""
        from vgen.layers.picture_files import check_side
        from vgen.viz.sheets import Layout, Sheet, columns_for

        count = len(self.subjects)
        if count > 1:
            scale = 2 if size[0] <= ENLARGED else 1
            layout = Layout(count, (size[0] * scale, size[1] * scale), columns_for(count), labelled=True)
            check_side(self.path, layout.page)
            self.page = Sheet(layout)
        yield

    def add(self, indices: Iterable[int], images: Iterable[Image.Image]) -> None:
        """Finished pictures, by their place in the run. The last one writes the file."""
        from vgen.layers.picture_files import save_picture

        for index, image in zip(indices, images):
            if self.page is not None:
                self.page.put(index, image, caption(self.subjects[index]))
            self.done += 1
        if self.done == len(self.subjects):
            with _written(self.path, lambda: "nothing was written"):
                save_picture(image if self.page is None else self.page.page, self.path)

    def progress(self) -> str:
        """What an interruption leaves."""
        return f"{self.done} of {len(self.subjects)} pictures were made and nothing was written; a folder as --out keeps finished pictures"


class SampleFolder:
    """Numbered pictures with `samples.jsonl`. Pictures of the same settings that are there already stay and are not made again."""

    def __init__(self, folder: Path, first: int, subjects: Sequence[Subject], overwrite: bool):
        if folder.exists() and not folder.is_dir():
            raise VgenError(f"--out {folder} is a file without a picture's suffix; give a folder or another name")
        writable_folder("--out", folder)
        self.path, self.first, self.subjects, self.overwrite = folder, first, subjects, overwrite
        self.kept: set[int] = set()
        self._look()

    @contextmanager
    def open(self, settings: Mapping[str, Any], size: tuple[int, int]) -> Iterator[None]:
        """settings: of all pictures of this run. Within the block the folder is ours, and `kept` has the numbers that are there.

        VgenError where the folder holds pictures of other settings (nothing is changed then), or another process is at work.
        """
        settings = json.loads(json.dumps(settings))  # as they are read again: tuples are lists
        with sole_user(self.path, "vgen sample"):
            self.kept |= {line["number"] for line in self._begin(settings)} & set(self._numbers())
            self.settings, self.done = settings, len(self.kept)
            yield

    def add(self, indices: Sequence[int], images: Iterable[Image.Image]) -> None:
        """Finished pictures, by their place in the run: on the disk when this returns."""
        from vgen.layers.picture_files import save_picture

        numbers = [self.first + index for index in indices]
        with _written(self.path, lambda: f"{self.progress()} when there is room"):
            self._append([self._line(number) for number in numbers])
            for number, image in zip(numbers, images):
                save_picture(image, self.path / _name(number))
                self.done += 1

    def progress(self) -> str:
        """What an interruption leaves."""
        return f"{self.done} of {len(self.subjects)} pictures are in {self.path}; the same command makes the others"

    def _numbers(self) -> range:
        return range(self.first, self.first + len(self.subjects))

    def _line(self, number: int) -> dict[str, Any]:
        return {"file": _name(number), "number": number, **self.subjects[number - self.first], **self.settings}

    def _look(self) -> list[dict[str, Any]]:
        """The lines of the folder. VgenError for a list that is not ours, and for pictures in the way that it does not name."""
        lines = _read(self.path / LIST)
        listed = {line["file"] for line in lines}
        for number in self._numbers():
            if _name(number) not in listed and os.path.lexists(self.path / _name(number)):
                raise VgenError(
                    f"{self.path / _name(number)} is in the way: it is not in {LIST}, so vgen does not replace it; "
                    "give another folder or another --first"
                )
        return lines

    def _begin(self, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Settles what the folder holds: the lines that stay, on the disk."""
        lines = self._look()
        there = [line for line in lines if (self.path / line["file"]).is_file()]
        if self.overwrite:
            for line in there:
                (self.path / line["file"]).unlink()
            there = []
        self._compare(there, settings)
        if (self.path / LIST).exists():
            for leftover in filter(lambda file: TEMPORARY.fullmatch(file.name), self.path.iterdir()):
                leftover.unlink()
            text = "".join(map(_written_line, there)).encode()
            if text != (self.path / LIST).read_bytes():
                with atomic_path(self.path / LIST) as temporary:
                    temporary.write_bytes(text)
        return there

    def _compare(self, lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
        """VgenError for pictures that were made with other settings, or from another prompt."""
        advice = "give another folder, or --overwrite to replace what is there"
        for line in lines:
            of_all = {key: value for key, value in line.items() if key not in OF_PICTURE}
            for key in dict.fromkeys((*settings, *of_all)):
                if key != "device" and of_all.get(key) != settings.get(key):
                    raise VgenError(
                        f"the pictures in {self.path} have {key} {json.dumps(of_all.get(key), ensure_ascii=False)}, this command has "
                        f"{json.dumps(settings.get(key), ensure_ascii=False)}; {advice}"
                    )
            if line["number"] in self._numbers():
                subject = self.subjects[line["number"] - self.first]
                if {key: line.get(key) for key in subject} != subject:
                    raise VgenError(
                        f"{self.path / line['file']} shows {caption(line)!r} and this command makes {caption(subject)!r} there; "
                        f"{advice}, or another --first"
                    )

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """All of the lines, or none if there is no room."""
        with open(self.path / LIST, "ab") as file:
            before = file.tell()
            try:
                file.write("".join(map(_written_line, lines)).encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path / LIST, before)
                raise


def _name(number: int) -> str:
    return f"{number:05d}.png"


def _written_line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a list, without the torn last one of a run that was killed. VgenError for a list that vgen did not write."""
    try:
        *whole, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    lines = []
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
            if line["file"] != _name(line["number"]) or not ("prompt" in line or "class" in line):
                raise ValueError
        except (ValueError, TypeError, KeyError):
            raise VgenError(
                f"line {number} of {path} is not one of vgen sample; give another folder, or mend the line"
            ) from None
        lines.append(line)
    return lines


@contextmanager
def _written(path: Path, state: Callable[[], str]) -> Iterator[None]:
    """A sentence for a disk that is full, or gone. state: says what is there."""
    try:
        yield
    except OSError as error:
        raise VgenError(f"{path} cannot be written ({file_reason(error)}); {state()}") from None
