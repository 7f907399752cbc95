import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from vgen.errors import VgenError
from vgen.train import loop
from vgen.train.checkpoint import checkpoints
from vgen.train.loop import Trainer, export_checkpoint, train
from vgen.train.system import SYSTEMS, load_config

SCRIPT = Path(__file__).with_name("run_tiny.py")
BASE = {
    "version": 1,
    "system": "tiny",
    "steps": 40,
    "batch_size": 4,
    "threads": 1,
    "seed": 3,
    "ema_decay": 0.9,
    "log_every": 5,
    "evaluate_every": 10,
    "preview_every": 20,
    "checkpoint_every": 7,
    "checkpoint_minutes": 0,
    "tensorboard": False,
    "optimizer": {"lr": 0.01, "warmup_steps": 5},
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SYSTEMS, "tiny", "train.tiny_system")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def config_of(folder: Path, *overrides: str):
    path = folder / "config_in.yaml"
    path.write_text(yaml.safe_dump({**BASE, "out": str(folder / "run")}), encoding="utf-8")
    return load_config(path, overrides)


def start(folder: Path, *overrides: str, before: tuple[str, ...] = ()) -> subprocess.Popen:
    config_of(folder)
    command = [sys.executable, str(SCRIPT), *before, str(folder / "config_in.yaml"), *overrides]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "the process made no progress"
        time.sleep(0.005)


def final_state(folder: Path) -> dict[str, bytes]:
    """Every byte that the last checkpoint says about weights, averages and optimizers, and the exported model."""
    newest = checkpoints(folder / "run" / "checkpoints")[-1]
    state = {}
    for path in sorted(newest.folder.glob("*.safetensors")):
        for key, value in load_file(path).items():
            state[f"{path.name}/{key}"] = value.numpy().tobytes()
    for path in sorted(newest.folder.glob("*.pt")):
        content = torch.load(path, weights_only=True)
        for name, values in content["state"].items():
            for key, value in values.items():
                state[f"{path.name}/{name}/{key}"] = value.numpy().tobytes()
    state["model"] = (folder / "run" / "model" / "model.safetensors").read_bytes()
    return state


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The final state of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    SYSTEMS["tiny"] = "train.tiny_system"
    summary = train(config_of(folder))
    assert summary.finished and summary.steps == 40
    return folder


def test_run_folder_holds_everything(uninterrupted):
    run = uninterrupted / "run"
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if e["kind"] == "held_out"] == [10, 20, 30, 40]
    train_steps = [e["step"] for e in entries if e["kind"] == "train"]
    assert train_steps == sorted({*range(5, 41, 5), *range(7, 41, 7)})
    assert {"loss", "loss_critic", "output", "grad_norm_regressor", "rows_per_second", "lr"} <= entries[0].keys()
    assert sorted(path.name for path in (run / "previews").iterdir()) == ["step_00000020.png", "step_00000040.png"]
    found = checkpoints(run / "checkpoints")
    errors = {e["step"]: e["error"] for e in entries if e["kind"] == "held_out"}
    assert [c.step for c in found] == sorted({35, 40, min(errors, key=errors.get)})  # the two newest and the best
    assert entries[-2]["loss"] < entries[0]["loss"] / 2  # it learns
    assert load_config(run / "config.yaml").out == str(run)


def test_killed_at_a_random_moment_it_continues_bit_identically(tmp_path, uninterrupted):
    process = start(tmp_path, "pause=0.02")
    wait_for(lambda: checkpoints(tmp_path / "run" / "checkpoints"), process)
    time.sleep(random.random() * 0.5)  # any moment: steps take 20 ms, a checkpoint is written every 7
    process.kill()
    process.wait()
    reached = checkpoints(tmp_path / "run" / "checkpoints")[-1].step
    assert 7 <= reached < 40
    process = start(tmp_path, "pause=0.02")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert f"continues after step {reached}" in errors
    assert final_state(tmp_path) == final_state(uninterrupted)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_killed_while_writing_a_checkpoint_it_falls_back_to_the_one_before(tmp_path, uninterrupted):
    process = start(tmp_path, before=("--die-in-save", "14"))
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    folder = tmp_path / "run" / "checkpoints"
    assert [c.step for c in checkpoints(folder)] == [7, 10]
    assert [p.name for p in folder.glob(".*")], (
        "the kill must have left an unfinished folder for this test to mean anything"
    )
    train(config_of(tmp_path))
    assert not list(folder.glob(".*"))
    assert final_state(tmp_path) == final_state(uninterrupted)


def test_stop_signal_saves_and_says_how_to_go_on(tmp_path, uninterrupted):
    process = start(tmp_path, "pause=0.02", "checkpoint_every=0", "evaluate_every=0")
    wait_for(lambda: (tmp_path / "run" / "log.jsonl").exists(), process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    (saved,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert saved.step < 40
    assert f"stopped by SIGTERM after step {saved.step} of 40, saved; run the same command again" in errors
    train(config_of(tmp_path, "pause=0.02"))
    assert final_state(tmp_path) == final_state(uninterrupted)


def test_time_limit_keeps_the_schedule(tmp_path, uninterrupted):
    summary = train(config_of(tmp_path, "time_limit_minutes=1e-9"))
    assert (summary.steps, summary.finished, summary.model) == (1, False, None)
    train(config_of(tmp_path))
    assert final_state(tmp_path) == final_state(uninterrupted)


def test_finished_run_does_nothing_but_restore_a_missing_model(tmp_path):
    train(config_of(tmp_path, "steps=4"))
    model = tmp_path / "run" / "model" / "model.safetensors"
    content = model.read_bytes()
    shutil.rmtree(model.parent)
    assert train(config_of(tmp_path, "steps=4")).finished
    assert model.read_bytes() == content


def test_other_settings_are_refused(tmp_path):
    train(config_of(tmp_path, "steps=3"))
    with pytest.raises(
        VgenError, match=r"holds a run with other settings \(optimizer.lr: 0.01 -> 0.5; steps: 3 -> 6\)"
    ):
        train(config_of(tmp_path, "steps=6", "optimizer.lr=0.5"))
    assert train(config_of(tmp_path, "steps=6", "optimizer.lr=0.5"), allow_changes=True).steps == 6


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(VgenError, match=r"loss became nan at step 17 .*the last checkpoint is .*step_00000014"):
        train(config_of(tmp_path, "poison=17"))
    assert [c.step for c in checkpoints(tmp_path / "run" / "checkpoints")][-1] == 14


def damage(folder: Path, how: str) -> None:
    state, weights = folder / "state.json", folder / "regressor.safetensors"
    {
        "empty": lambda: state.write_text(""),
        "other step": lambda: state.write_text('{"step": 3}'),
        "list": lambda: state.write_text("[]"),
        "no state": state.unlink,
        "no file": weights.unlink,
        "weights": lambda: weights.write_bytes(weights.read_bytes()[:-9]),
        "optimizer": lambda: os.truncate(folder / "critic.optimizer.pt", 500),
    }[how]()


@pytest.mark.parametrize("how", ["empty", "other step", "list", "no state", "no file", "weights", "optimizer"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(tmp_path, uninterrupted, capsys, how):
    train(config_of(tmp_path))
    folder = tmp_path / "run" / "checkpoints"
    damage(folder / "step_00000040", how)
    assert 40 not in [c.step for c in checkpoints(folder)]
    assert train(config_of(tmp_path)).finished
    errors = capsys.readouterr().err
    assert re.search(r"step_00000040 is damaged \(.+\) and is not used; it is now step_00000040.damaged\n", errors)
    assert "continues after step 35" in errors
    assert final_state(tmp_path) == final_state(uninterrupted)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 40
    assert (folder / "step_00000040.damaged").is_dir()


def test_without_a_whole_checkpoint_nothing_starts_anew_by_itself(tmp_path):
    train(config_of(tmp_path, "steps=3"))
    (newest,) = checkpoints(tmp_path / "run" / "checkpoints")
    (newest.folder / "regressor.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(
        VgenError, match=r"no checkpoint in .* can be read \(step_00000003: .*\); restore one, or delete"
    ):
        train(config_of(tmp_path, "steps=3"))
    assert newest.folder.is_dir()


def test_weights_of_another_model_are_one_clear_sentence(tmp_path):
    train(config_of(tmp_path, "steps=3"))
    (newest,) = checkpoints(tmp_path / "run" / "checkpoints")
    save_file({"0.weight": torch.zeros(3)}, newest.folder / "regressor.safetensors")
    saved = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(VgenError, match=r"step_00000003 does not fit this config"):
        train(config_of(tmp_path, "steps=3", "optimizer.lr=9"), allow_changes=True)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == saved


def test_accumulation_equals_a_larger_batch(tmp_path):
    # No BatchNorm, dropout or noise: they depend on the size of a forward pass by nature.
    exact = ("steps=5", "adversarial=false", "noise=0", "dropout=0", "batch_norm=false", "optimizer.clip=0.5")
    results = []
    for name, sizes in {"large": ("batch_size=8",), "split": ("batch_size=4", "accumulate=2")}.items():
        (tmp_path / name).mkdir()
        trainer = Trainer(config_of(tmp_path / name, *exact, *sizes))
        batches = trainer.system.batches(0, 0, 1)
        for step in range(5):
            trainer.step(step, batches)
        results.append(torch.cat([p.detach().flatten() for p in trainer.system.regressor.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_every_network_steps_on_its_own_loss(tmp_path):
    trainer = Trainer(config_of(tmp_path))
    before = {name: [p.detach().clone() for p in t.network.parameters()] for name, t in trainer.trainees.items()}
    order = []
    update = trainer._update
    trainer._update = lambda name, step: order.append(name) or update(name, step)
    trainer.step(10, trainer.system.batches(0, 0, 1))
    assert order == ["regressor", "critic"]
    for name, trainee in trainer.trainees.items():
        moved = [not torch.equal(old, new) for old, new in zip(before[name], trainee.network.parameters())]
        assert all(moved), name
        assert all(p.grad is None for p in trainee.network.parameters())


def test_bf16_keeps_fp32_weights(tmp_path):
    summary = train(config_of(tmp_path, "precision=bf16", "steps=10"))
    weights = load_file(summary.model / "model.safetensors")
    assert weights["0.weight"].dtype == torch.float32
    assert summary.figures["loss"] < 2


def test_export_of_any_checkpoint(tmp_path):
    config = config_of(tmp_path, "keep=9")
    train(config)
    for which, step in (("last", 40), ("7", 7)):
        found = export_checkpoint(config, which, tmp_path / which, "float16")
        assert found.step == step
        exported = load_file(tmp_path / which / "model.safetensors")["0.weight"]
        average = load_file(found.folder / "regressor.average.safetensors")["0.weight"]
        assert torch.equal(exported, average.half())
    scores = {
        c.step: c.state["score"] for c in checkpoints(tmp_path / "run" / "checkpoints") if c.state["score"] is not None
    }
    assert export_checkpoint(config, "best", tmp_path / "best").step == min(scores, key=scores.get)
    with pytest.raises(VgenError, match=r"no checkpoint '8'; it has .*7, .*last, best"):
        export_checkpoint(config, "8", tmp_path / "never")


def test_best_checkpoint_outlives_newer_ones(tmp_path, monkeypatch):
    errors = iter([0.5, 0.1, 0.9, 0.8])
    monkeypatch.setattr("train.tiny_system.TinySystem.evaluate", lambda self, step: {"error": next(errors)})
    train(config_of(tmp_path, "keep=1"))
    assert [c.step for c in checkpoints(tmp_path / "run" / "checkpoints")] == [20, 40]


def test_two_processes_train_as_one_with_the_same_rows(tmp_path):
    exact = ("steps=6", "noise=0", "dropout=0", "adversarial=false", "batch_norm=false")
    config_of(tmp_path)
    # `accelerate launch` starts several processes on GPUs only; on CPUs torchrun does, and accelerate finds its variables.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [
        *launch,
        str(SCRIPT),
        str(tmp_path / "config_in.yaml"),
        *exact,
        "batch_size=2",
        f"out={tmp_path / 'two'}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "cpu x 2" in done.stderr
    train(config_of(tmp_path, *exact, "batch_size=4"))
    two, one = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("two", "run"))
    assert loop.checkpoints(tmp_path / "two" / "checkpoints")[-1].step == 6
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
