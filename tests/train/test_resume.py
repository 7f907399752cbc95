"""Looking at a run changes nothing, and a run that continues is the run that was not disturbed: accumulation, ranks, late critics."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train import test_loop
from train.neutral import changed_by_looking
from train.test_loop import config_of, final_state
from train.tiny_system import TinySystem

from vgen.errors import VgenError
from vgen.files import sole_user
from vgen.settings import save_config
from vgen.train.checkpoint import checkpoints, load_optimizer_state, optimizer_state
from vgen.train.loop import Trainer, train

tiny = test_loop.tiny
MUON = ("optimizer.name=muon", "critic.name=muon")
SILENT = ("checkpoint_every=0", "evaluate_every=0", "preview_every=0", "log_every=1000")
EVERY = ("checkpoint_every=1", "evaluate_every=1", "preview_every=1", "log_every=1")


@pytest.mark.parametrize("options", [("critic_from=2",), ("critic_from=2", *MUON), ("critic_from=99",)], ids=str)
def test_looking_changes_nothing(tmp_path, options):
    assert changed_by_looking(Trainer(config_of(tmp_path, *options)), tmp_path / "looks", 4) == []


@pytest.mark.parametrize("options", [(), MUON], ids=["adamw", "muon"])
def test_a_late_critic_has_the_same_weights_however_often_is_saved(tmp_path, options):
    states = []
    for name, cadences in {"silent": SILENT, "every": EVERY}.items():
        (tmp_path / name).mkdir()
        train(config_of(tmp_path / name, "steps=9", "critic_from=5", *options, *cadences))
        states.append(final_state(tmp_path / name))
    assert states[0] == states[1]


@pytest.mark.parametrize("options", [("accumulate=2",), ("critic_from=5", *MUON)], ids=str)
def test_stopped_after_every_step_it_reaches_the_same_weights(tmp_path, options):
    """Also from checkpoints whose critic had no optimizer state yet."""
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    common = ("steps=8", *options, *SILENT)
    train(config_of(tmp_path / "whole", *common))
    calls = 1
    while not (summary := train(config_of(tmp_path / "stopped", "time_limit_minutes=1e-9", *common))).finished:
        assert summary.exit_code == 124
        calls += 1
    assert calls == 8 and summary.exit_code == 0
    assert final_state(tmp_path / "whole") == final_state(tmp_path / "stopped")


def test_a_resumed_run_reads_the_batches_that_were_not_read_yet(tmp_path):
    trainers = []
    build = Trainer.__init__

    def remember(self, config):
        build(self, config)
        trainers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "__init__", remember)
        train(config_of(tmp_path, "steps=4", "accumulate=3", "time_limit_minutes=1e-9", *SILENT))
        train(config_of(tmp_path, "steps=4", "accumulate=3", *SILENT))
    first, second = (trainer.system.seen for trainer in trainers)
    assert first + second == [4 * batch for batch in range(12)] and len(first) == 3


def test_optimizer_states_go_and_come_back_and_the_config_keeps_its_settings():
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    assert optimizer_state(net, [optimizer]) == {} and not optimizer.state
    net[0](torch.ones(1, 3)).sum().backward()  # the second layer has no gradient, and so no state
    optimizer.step()
    saved = optimizer_state(net, [optimizer])
    assert saved.keys() == {"0.weight", "0.bias"}
    other = torch.optim.AdamW(net.parameters(), lr=0.5, weight_decay=0.25)
    load_optimizer_state(net, [other], saved)
    assert (other.param_groups[0]["lr"], other.param_groups[0]["weight_decay"]) == (0.5, 0.25)
    assert len(other.state) == 2 and str(optimizer_state(net, [other])) == str(saved)
    with pytest.raises(KeyError, match=r"9\.weight"):
        load_optimizer_state(net, [other], {"9.weight": {}})
    with pytest.raises(RuntimeError, match=r"shape \[2\] for a parameter \[2, 3\]"):
        load_optimizer_state(net, [other], {"0.weight": {"exp_avg": torch.zeros(2)}})


@pytest.mark.parametrize("clip", [0.05, 0.0])
def test_gradients_are_clipped_to_the_norm_asked_for(tmp_path, clip):
    """With plain descent the step is the clipped gradient."""
    exact = ("adversarial=false", "optimizer.warmup_steps=0", "optimizer.schedule=constant")
    trainer = Trainer(config_of(tmp_path, f"optimizer.clip={clip}", *exact))
    trainee = trainer.trainees["regressor"]
    trainee.optimizers = [torch.optim.SGD(trainee.network.parameters(), lr=1.0)]
    before = [p.detach().clone() for p in trainee.network.parameters()]
    trainer.step(0, trainer.system.batches(0, 0, 1))
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, trainee.network.parameters())]).norm().item()
    norm = 0.01 * trainer.watch.pending[0][1]["grad_norm_regressor"].item()  # the learning rate is 0.01
    assert norm > 2 * 0.01 * 0.05
    assert moved == pytest.approx(0.01 * 0.05 if clip else norm, rel=1e-3)


def test_draws_depend_on_the_rank(tmp_path):
    trainer, losses = Trainer(config_of(tmp_path, "adversarial=false")), []
    batch = next(trainer.system.batches(0, 0, 1))
    for trainer.rank in (0, 1, 0):
        for average in trainer.trainees.values():
            average.network.requires_grad_(True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "_update", lambda name, step: torch.zeros(()))
            trainer.step(0, iter([batch]))
        losses.append(trainer.watch.pending[-1][1]["loss"].item())
    assert losses[0] == losses[2] != losses[1]


def test_two_ranks_with_draws_of_their_own_resume_exactly_and_agree_to_stop(tmp_path):
    """The signal reaches one rank alone; both stop after that step and save. Another number of processes is refused."""
    common = ["steps=6", "batch_norm=false", "critic_from=4", "accumulate=2", *SILENT]
    path = tmp_path / "ranks.yaml"
    save_config(config_of(tmp_path, *common), path)
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("localhost", 0))) for _ in range(3)]
        ports = [str(free.getsockname()[1]) for free in sockets]
    shared = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "localhost"}
    script = str(Path(__file__).with_name("run_ranks.py"))
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(path), str(tmp_path / f"codes{rank}"), *ports],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)
    assert [json.loads((tmp_path / f"codes{rank}").read_text()) for rank in (0, 1)] == [[0, 143, 0]] * 2
    assert "stopped by SIGTERM after step 3 of 6, saved" in errors[0] and "continues after step 3" in errors[0]
    whole, resumed = (checkpoints(tmp_path / name / "checkpoints")[-1].folder for name in ("whole", "run"))
    for name in ("regressor.safetensors", "critic.safetensors", "regressor.average.safetensors"):
        a, b = load_file(whole / name), load_file(resumed / name)
        assert all(torch.equal(a[key], b[key]) for key in a), name
    with pytest.raises(VgenError, match=r"was trained by 2 process\(es\) and now there are 1, which gives other"):
        train(config_of(tmp_path, *common, "signal_from=1"))


def test_another_number_of_processes_is_allowed_when_asked_for_and_said(tmp_path, capsys):
    train(config_of(tmp_path, "steps=6", "time_limit_minutes=1e-9"))
    (first,) = checkpoints(tmp_path / "run" / "checkpoints")
    state = first.folder / "state.json"
    content = json.loads(state.read_text())
    assert content["made_with"] == {"processes": 1, "device": "cpu", "data": {"the rows": "counted"}}
    content["made_with"] = {"processes": 4, "device": "cuda"}
    state.write_text(json.dumps(content))
    with pytest.raises(VgenError, match="start 4, or continue it with --allow-changes"):
        train(config_of(tmp_path, "steps=6"))
    assert train(config_of(tmp_path, "steps=6"), allow_changes=True).finished
    assert "warning: this run continues elsewhere (processes 4 -> 1, device cuda -> cpu)" in capsys.readouterr().err
    del content["made_with"]  # of an older vgen
    state.write_text(json.dumps(content))


def test_other_data_is_refused_and_said_where_it_is_allowed(tmp_path, capsys, monkeypatch):
    train(config_of(tmp_path, "steps=6", "time_limit_minutes=1e-9"))
    monkeypatch.setattr(TinySystem, "data_digests", lambda self: {"the rows": "drawn", "a set of today": "new"})
    with pytest.raises(VgenError, match=r"first 1 steps on other data: the rows changed since then; .*--allow-changes"):
        train(config_of(tmp_path, "steps=6"))
    assert len(checkpoints(tmp_path / "run" / "checkpoints")) == 1
    assert train(config_of(tmp_path, "steps=6"), allow_changes=True).finished
    assert "warning: this run continues on other data (the rows)" in capsys.readouterr().err


def test_fewer_steps_than_are_done_is_a_sentence(tmp_path):
    train(config_of(tmp_path, "steps=4"))
    for allow in (False, True):
        with pytest.raises(VgenError, match=r"has done 4 steps already, more than steps=3: .* --export FOLDER"):
            train(config_of(tmp_path, "steps=3"), allow_changes=allow)


def test_a_damaged_log_is_repaired(tmp_path):
    train(config_of(tmp_path, "steps=6", "log_every=1"))
    path = tmp_path / "run" / "log.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        b"".join([whole[0], b"\n", b"[]\n", b"7\n", b'{"step": "x"}\n', b"\xff\x00\n", *whole[1:], b'{"kin'])
    )
    train(config_of(tmp_path, "steps=6", "log_every=1"))
    assert path.read_bytes() == b"".join(whole)


def test_two_trainings_in_one_folder(tmp_path):
    with sole_user(tmp_path / "run", "training"):
        with pytest.raises(VgenError, match=rf"run is in use by training, process {os.getpid()} on "):
            train(config_of(tmp_path, "steps=3"))
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".vgen.lock"]
    assert train(config_of(tmp_path, "steps=3")).finished


@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl", "model", "checkpoints", "previews"])
@pytest.mark.parametrize("allow", [False, True])
def test_files_of_others_in_the_run_folder_are_not_touched(tmp_path, name, allow):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / name
    path = path if path.suffix else path / "mine.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine: 1")
    with pytest.raises(VgenError, match=rf"run holds {name} and no config.yaml of a vgen run.* nothing was changed"):
        train(config_of(tmp_path, "steps=3"), allow_changes=allow)
    assert path.read_text() == "mine: 1" and len(list((tmp_path / "run").iterdir())) == 1


def test_files_of_others_in_the_model_folder_are_found_before_the_work(tmp_path, monkeypatch):
    train(config_of(tmp_path, "steps=3"))
    (tmp_path / "run" / "model" / "notes.txt").write_text("mine")
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("it began to train"))
    with pytest.raises(VgenError, match=r"model holds files that vgen did not write as a model \(notes.txt\)"):
        train(config_of(tmp_path, "steps=6"), allow_changes=True)
