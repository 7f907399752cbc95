"""Where pictures of `vgen sample` go: a folder that survives every interruption, and a file that is written whole."""

import errno
import json
import random
import re

import pytest
from cli.test_sample import names, sample
from PIL import Image

from vgen.cli.sample_files import OneFile, SampleFolder, destination
from vgen.errors import VgenError
from vgen.layers import picture_files

PROMPTS = [{"prompt": "red apple"}, {"prompt": "a cat"}]


def many(folder, out, *arguments):
    """Eight pictures, three at a time."""
    prompts = ("--prompt", "red apple", "--prompt", "a cat", "--num-images", 4)
    return sample(folder, *prompts, "--batch-size", 3, "--out", out, *arguments)


def lines(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def failing(monkeypatch, after, error):
    """Pictures are saved `after` times, then `error` happens."""
    save, count = picture_files.save_picture, iter(range(after))

    def saving(image, path):
        if next(count, None) is None:
            raise error
        save(image, path)

    monkeypatch.setattr(picture_files, "save_picture", saving)


@pytest.fixture(scope="module")
def whole(pipeline_folder, tmp_path_factory):
    """What an undisturbed run makes."""
    folder = tmp_path_factory.mktemp("whole")
    assert many(pipeline_folder, f"{folder}/") == 0
    return folder


def test_every_picture_has_a_line_with_all_that_made_it(whole):
    assert names(whole) == [*(f"0000{i}.png" for i in range(8)), "samples.jsonl"]
    assert [line["prompt"] for line in lines(whole)] == ["red apple"] * 4 + ["a cat"] * 4
    line = lines(whole)[5]
    assert line["file"] == "00005.png" and line["number"] == 5 and line["seed"] == 0 and line["guidance_scale"] == 2.0
    assert (
        line["order"] == "random-5" and line["steps"] == 5 and line["dtype"] == "float32" and line["temperature"] == 1.0
    )
    assert re.fullmatch("[0-9a-f]{16}", line["weights"])


@pytest.mark.parametrize("after", [0, 1, 3, 4, 7])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=["ctrl-c", "full"]
)
def test_the_same_command_continues(pipeline_folder, tmp_path, capsys, whole, after, error):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, after, error)
        assert many(pipeline_folder, out) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    said = capsys.readouterr().err
    assert f"{after} of 8 pictures are in {out}; the same command" in said and "Traceback" not in said
    assert isinstance(error, KeyboardInterrupt) or "No space left" in said
    assert contents(out) == dict(list(contents(whole).items())[:after])
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert many(pipeline_folder, out) == 0
    assert contents(out) == contents(whole) and lines(out) == lines(whole)
    assert times == {path: path.stat().st_mtime_ns for path in times}, "finished pictures are not made again"


def test_a_run_that_was_killed_anywhere_is_mended(pipeline_folder, tmp_path, capsys, whole):
    rng = random.Random(3)
    for trial in range(6):
        out = tmp_path / str(trial)
        out.mkdir()
        text = (whole / "samples.jsonl").read_bytes()
        (out / "samples.jsonl").write_bytes(text[: rng.randrange(len(text))])  # the last line is torn
        for line in lines_of(out):  # and any of its pictures may be missing
            if rng.random() < 0.7:
                (out / line["file"]).write_bytes((whole / line["file"]).read_bytes())
        (out / ".00003-abcd_123.png").write_bytes(b"half a picture")
        (out / ".mine.png").write_bytes(b"not vgen's")
        assert many(pipeline_folder, out) == 0, capsys.readouterr().err
        assert contents(out) == {**contents(whole), ".mine.png": b"not vgen's"}
        assert sorted(map(str, lines(out))) == sorted(map(str, lines(whole)))


def lines_of(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_bytes().split(b"\n")[:-1]]


def test_all_there_already(pipeline_folder, whole, tmp_path, capsys):
    before = contents(whole)
    assert many(pipeline_folder, whole, "--json", "--trace", tmp_path / "t.gif") == 0
    captured = capsys.readouterr()
    assert "8 of 8 pictures were there already" in captured.out and "no animation" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["images"] == 0 and contents(whole) == before


def test_a_set_grows(pipeline_folder, tmp_path, whole):
    assert sample(pipeline_folder, "--prompt", "a cat", "--num-images", 2, "--first", 4, "--out", tmp_path / "a") == 0
    assert contents(tmp_path / "a").keys() == {"00004.png", "00005.png"}
    assert contents(tmp_path / "a").items() < contents(whole).items(), "picture i depends on the seed and i only"
    assert sample(pipeline_folder, "--prompt", "mat", "--first", 100, "--out", tmp_path / "a") == 0
    assert [line["number"] for line in lines(tmp_path / "a")] == [4, 5, 100]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--seed", 1], "have seed 0, this command has 1"),
        (["--order", "raster"], '"random-5", this command has "raster"'),
        (["--guidance-scale", 1.25], "guidance_scale 2.0, this command has 1.25"),
        (["--first", 2], "shows 'a cat' and this command makes 'red apple' there"),
    ],
)
def test_other_settings_are_refused_or_replace(pipeline_folder, tmp_path, capsys, whole, arguments, words):
    out = tmp_path / "out"
    assert many(pipeline_folder, out) == 0
    (out / "notes.txt").write_text("mine")
    (out / "00020.png").write_text("mine too")
    before = contents(out)
    assert many(pipeline_folder, out, *arguments) == 2
    assert words in capsys.readouterr().err and contents(out) == before
    assert many(pipeline_folder, out, *arguments, "--overwrite", "--prompt", "unicorn") == 2
    assert contents(out) == before, "nothing is removed for a command that cannot run"
    assert many(pipeline_folder, out, *arguments, "--overwrite") == 0
    assert len(lines(out)) == 8 and (out / "notes.txt").read_text() == "mine"
    assert (out / "00020.png").read_text() == "mine too" and len(contents(out)) == 9


def test_other_weights_are_other_settings(pipeline_folder, tmp_path, capsys):
    import torch
    from conftest import tiny_pipeline

    other = tiny_pipeline()
    torch.nn.init.normal_(other.model.head.weight, std=0.31)
    other.save_pretrained(tmp_path / "model")
    assert sample(tmp_path / "model", "--prompt", "mat", "--out", tmp_path / "out") == 0
    tiny_pipeline().save_pretrained(tmp_path / "model")
    assert sample(tmp_path / "model", "--prompt", "mat", "--out", tmp_path / "out") == 2
    assert "have weights" in capsys.readouterr().err


def test_pictures_that_are_not_ours_are_in_the_way(pipeline_folder, tmp_path, capsys):
    (tmp_path / "00003.png").write_text("mine")
    for more in ([], ["--overwrite"]):
        assert many(pipeline_folder, tmp_path, *more) == 2
        assert "00003.png is in the way" in capsys.readouterr().err
    assert names(tmp_path) == ["00003.png"] and (tmp_path / "00003.png").read_text() == "mine"


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "[1]",
        "hello",
        '{"file": "../../x.png", "number": 1, "prompt": "a"}',
        '{"file": "00001.png", "number": "1"}',
    ],
)
def test_a_list_that_is_not_ours(tmp_path, line):
    (tmp_path / "samples.jsonl").write_text(line + "\n")
    with pytest.raises(VgenError, match=r"line 1 of .*samples.jsonl is not one of vgen sample"):
        SampleFolder(tmp_path, 0, PROMPTS, True)


def test_a_second_process_is_refused(tmp_path):
    first, second = (SampleFolder(tmp_path, 0, PROMPTS, False) for _ in range(2))
    with first.open({}, (8, 8)), pytest.raises(VgenError, match="in use by vgen sample"), second.open({}, (8, 8)):
        pass


@pytest.mark.parametrize("suffix", picture_files.suffixes())
def test_formats_by_suffix(pipeline_folder, tmp_path, suffix):
    out = tmp_path / f"one{suffix.upper()}"
    assert sample(pipeline_folder, "--prompt", "mat", "--out", out) == 0
    assert Image.open(out).format == {".jpg": "JPEG", ".jpeg": "JPEG"}.get(suffix, suffix[1:].upper())
    assert Image.open(out).size == (8, 8)
    assert (
        many(pipeline_folder, tmp_path / f"sheet{suffix}") == 0 and Image.open(tmp_path / f"sheet{suffix}").width > 48
    )


def test_files_and_folders_are_told_apart(tmp_path):
    (tmp_path / "v1.5").mkdir()
    for out in ("new", "new.jpg/", "v1.5", "v2.0/"):
        assert isinstance(destination(f"{tmp_path}/{out}", 0, PROMPTS, False), SampleFolder)
    assert isinstance(destination(f"{tmp_path}/new.jpg", 0, PROMPTS, False), OneFile)
    assert list(tmp_path.iterdir()) == [tmp_path / "v1.5"], "asking makes nothing"


@pytest.mark.parametrize(
    "out, words",
    [
        ("x.tif", ".png, .jpg, .jpeg, .webp"),
        ("v2.0", "may end in a slash"),
        ("", "an empty one"),
        ("folder.png", "is a folder"),
        ("file/x.png", "is in the way"),
        ("file", "is a file"),
    ],
)
def test_places_that_cannot_be(tmp_path, monkeypatch, out, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(VgenError, match=re.escape(words)):
        destination(out, 0, PROMPTS, False)


def test_a_file_that_is_read_is_not_written(pipeline_folder, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"mine")
    assert (
        sample(pipeline_folder, "--prompt", "mat", "--init-image", tmp_path / "a.png", "--out", tmp_path / "a.png") == 2
    )
    assert "one of the other files" in capsys.readouterr().err and (tmp_path / "a.png").read_bytes() == b"mine"


def test_sheets_have_an_end(tmp_path):
    with pytest.raises(VgenError, match=r"up to 256 pictures and this would be 257; give a folder, --out .*many/"):
        destination(str(tmp_path / "many.png"), 0, [{"class": 1}] * 257, False)
    sheet = OneFile(tmp_path / "large.webp", [{"class": 1}] * 256)
    with pytest.raises(VgenError, match="at most 16383 pixels a side"), sheet.open({}, (1024, 1024)):
        pass


def test_an_interrupted_sheet_leaves_nothing(pipeline_folder, tmp_path, capsys, monkeypatch):
    failing(monkeypatch, 0, OSError(errno.ENOSPC, "No space left on device"))
    assert many(pipeline_folder, tmp_path / "a.png") == 2
    assert "No space left on device" in capsys.readouterr().err and names(tmp_path) == []
    failing(monkeypatch, 0, KeyboardInterrupt())
    assert many(pipeline_folder, tmp_path / "a.png") == 130
    assert "nothing was written; a folder as --out keeps" in capsys.readouterr().err and names(tmp_path) == []


def test_a_list_that_finds_no_room_stays_as_it_was(tmp_path, monkeypatch):
    target = SampleFolder(tmp_path, 0, PROMPTS, False)
    with target.open({"seed": 1}, (8, 8)):
        target.add([0], [Image.new("RGB", (8, 8))])
        before = (tmp_path / "samples.jsonl").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(
                "os.fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
            )
            with pytest.raises(VgenError, match=r"No space left on device.*1 of 2 pictures are in"):
                target.add([1], [Image.new("RGB", (8, 8))])
        assert (tmp_path / "samples.jsonl").read_bytes() == before and names(tmp_path) == ["00000.png", "samples.jsonl"]
