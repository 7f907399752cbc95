"""Files are whole or absent, and only what vgen wrote is ever replaced or removed."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vgen import files
from vgen.errors import VgenError
from vgen.files import MARK, atomic_folder, atomic_path, check_folder, remove_folder, sole_user


def write(path: Path, text: str, kind: str = "model") -> None:
    with atomic_folder(path, kind) as temporary:
        (temporary / "part").mkdir()
        (temporary / "part" / "a.txt").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    """Name -> text of everything below a folder, without the marks."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != MARK)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in found}


def test_a_folder_of_ours_is_replaced_and_nothing_else_is_left(tmp_path):
    write(tmp_path / "out", "one")
    (tmp_path / "empty").mkdir()
    for name in ("out", "empty"):
        write(tmp_path / name, "two")
        assert contents(tmp_path / name) == {"part/a.txt": "two"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


@pytest.mark.parametrize("extra", ["notes.txt", "part/notes.txt", "new/notes.txt", ".notes"])
def test_files_of_others_are_never_touched(tmp_path, extra):
    write(tmp_path / "out", "one")
    (tmp_path / "out" / extra).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / extra).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(VgenError, match=rf"did not write as a model \({extra}\); nothing was changed"):
        write(tmp_path / "out", "two")
    assert not remove_folder(tmp_path / "out", "model")
    assert contents(tmp_path) == before


def test_what_comes_during_the_work_is_not_touched_either(tmp_path):
    with pytest.raises(VgenError, match=r"mine\.txt"), atomic_folder(tmp_path / "out") as temporary:
        (temporary / "a.txt").write_text("new")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
    assert contents(tmp_path) == {"out/mine.txt": "mine"}


def test_places_where_nothing_may_be_written(tmp_path, monkeypatch):
    (tmp_path / "here" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deeper")
    for path in (".", "..", "../..", tmp_path, Path.cwd(), "/"):
        with pytest.raises(VgenError, match="is the current folder or one that holds it"):
            check_folder(path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(VgenError, match="file is a file, expected a folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(VgenError, match=r"below cannot be written: .*file is a file"):
        check_folder(tmp_path / "file" / "below")
    with pytest.raises(VgenError, match="is a folder, expected the name of a file"), atomic_path(tmp_path / "here"):
        pass
    write(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("link", "dangling"):
        with pytest.raises(VgenError, match="is a link"):
            write(tmp_path / name, "two")
    assert not remove_folder(tmp_path / "link", "model")
    assert contents(tmp_path / "real") == {"part/a.txt": "one"} and (tmp_path / "dangling").is_symlink()
    check_folder("new/folder")


def test_a_folder_of_another_kind_or_with_a_broken_mark_is_not_ours(tmp_path):
    write(tmp_path / "out", "one", kind="checkpoint")
    with pytest.raises(VgenError, match="did not write as a model"):
        write(tmp_path / "out", "two")
    for mark in ("", "[]", '{"kind": "checkpoint"}', '{"kind": "checkpoint", "files": 3}', "\udcff"):
        (tmp_path / "out" / MARK).write_bytes(mark.encode("utf-8", "surrogateescape"))
        with pytest.raises(VgenError, match="did not write as a checkpoint"):
            write(tmp_path / "out", "two", kind="checkpoint")
    assert contents(tmp_path / "out") == {"part/a.txt": "one"}


@pytest.mark.parametrize(
    ("config", "extra", "ours"),
    [
        ({"_class_name": "KLModel"}, "diffusion_pytorch_model.safetensors", True),
        ({"_class_name": "VisualPipeline"}, "model/vocabulary.json", True),
        ({"_class_name": "VQModel", "encoder_ch_mult": [1]}, "diffusion_pytorch_model.safetensors", True),
        ({"_class_name": "VQModel", "block_out_channels": [1]}, "diffusion_pytorch_model.safetensors", False),
        ({"_class_name": "KLModel"}, "README.md", False),
        ({"_class_name": "KLModel"}, "data/config.json", False),
        ({"_class_name": "UNet2DModel"}, "diffusion_pytorch_model.safetensors", False),
        ({"name": "my project"}, "diffusion_pytorch_model.safetensors", False),
    ],
)
def test_models_from_before_the_mark(tmp_path, config, extra, ours):
    name = "model_index.json" if config.get("_class_name") == "VisualPipeline" else "config.json"
    (tmp_path / "out" / extra).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text(json.dumps(config))
    (tmp_path / "out" / extra).write_text("weights")
    before = contents(tmp_path)
    if ours:
        write(tmp_path / "out", "two")
        assert contents(tmp_path) == {"out/part/a.txt": "two"}
    else:
        with pytest.raises(VgenError, match="did not write as a model"):
            write(tmp_path / "out", "two")
        assert contents(tmp_path) == before


def test_checkpoints_from_before_the_mark_are_removed_unless_they_hold_more(tmp_path):
    for name in ("plain", "noted"):
        (tmp_path / name).mkdir()
        for file in ("state.json", "net.safetensors", "net.optimizer.pt"):
            (tmp_path / name / file).write_text("ours")
    (tmp_path / "noted" / "notes.md").write_text("mine")
    assert remove_folder(tmp_path / "plain", "checkpoint")
    assert not remove_folder(tmp_path / "noted", "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["noted"] and len(contents(tmp_path / "noted")) == 4


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_kill_or_failure_at_any_moment_leaves_the_old_or_the_new(tmp_path, monkeypatch, in_one_step):
    """Stops after every system call that moves something, in turn."""
    monkeypatch.setattr(files.sys, "platform", "linux" if in_one_step else "other")
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == fails_at:
            raise OSError("the disk went away")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", failing)
    fails_at = 0
    write(tmp_path / "out", "old")
    seen = set()
    for fails_at in (1, 2):
        calls.clear()
        try:
            write(tmp_path / "out", f"new {fails_at}")
        except OSError:
            seen.add("failed")
        assert len(contents(tmp_path / "out")) == 1
        seen.add(contents(tmp_path / "out")["part/a.txt"])
    # In one step there is no second call that could fail; with two, the old folder is back.
    assert seen == ({"new 1", "new 2"} if in_one_step else {"failed", "old"})


def hold(folder: Path, ready: Path) -> subprocess.Popen:
    """A process that holds the lock of `folder` until it is killed, with a child that outlives it."""
    code = (
        "import os, pathlib, sys, time\nfrom vgen.files import sole_user\n"
        "with sole_user(sys.argv[1], 'training'):\n"
        "    child = os.fork()\n"
        "    if child: pathlib.Path(sys.argv[2]).write_text(str(child))\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), str(ready)])
    while not (ready.exists() and ready.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    return process


def test_one_user_at_a_time_and_the_second_is_told_who_holds_it(tmp_path):
    process = hold(tmp_path / "run", tmp_path / "ready")
    child = int((tmp_path / "ready").read_text())
    try:
        with (
            pytest.raises(VgenError, match=rf"run is in use by training, process {process.pid} on .* since \d{{4}}-"),
            sole_user(tmp_path / "run", "training"),
        ):
            pass
        process.kill()
        process.wait()
        # Although its child is alive.
        os.kill(child, 0)
        with sole_user(tmp_path / "run", "training"):
            with pytest.raises(VgenError, match=f"process {os.getpid()} "), sole_user(tmp_path / "run", "training"):
                pass
            # The refused attempt of the same process took nothing away.
            with pytest.raises(VgenError, match=f"process {os.getpid()} "), sole_user(tmp_path / "run", "training"):
                pass
    finally:
        os.kill(child, signal.SIGKILL)
        process.kill()
    with sole_user(tmp_path / "run", "training"):
        pass


def test_a_forked_child_does_not_free_the_lock(tmp_path):
    with sole_user(tmp_path, "training"):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0,))
        child.start()
        child.join()
        with pytest.raises(VgenError, match="is in use by"), sole_user(tmp_path, "training"):
            pass
