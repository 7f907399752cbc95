"""precision=auto follows the hardware, says why, and a run keeps what it began with."""

import pytest
import torch
import yaml
from train import test_loop
from train.test_loop import config_of

from vgen.errors import VgenError
from vgen.train import precision
from vgen.train.loop import train
from vgen.train.precision import has_bf16, resolved
from vgen.train.system import autocast, build_system

tiny = test_loop.tiny
CPU = torch.device("cpu")


def pretend(monkeypatch, bf16: bool) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: bf16)
    monkeypatch.setattr("vgen.train.loop.has_bf16", lambda device: bf16)


@pytest.mark.parametrize(
    ("machine", "avx", "amx", "arm", "expected"),
    [
        ("x86_64", False, False, True, False),  # torch emulates, and calls it supported
        ("x86_64", True, False, True, True),
        ("AMD64", False, True, True, True),
        ("aarch64", False, False, True, True),
        ("aarch64", False, False, False, False),
    ],
)
def test_cpus(monkeypatch, machine, avx, amx, arm, expected):
    monkeypatch.setattr(precision.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: arm, raising=False)
    assert has_bf16(CPU) is expected


def test_gpus(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation))
    assert not has_bf16(torch.device("cuda")) and asked == [False]
    assert not has_bf16(torch.device("mps"))


@pytest.mark.parametrize(("bf16", "name", "words"), [(True, "bf16", "has bf16"), (False, "fp32", "has no bf16")])
def test_auto_follows_the_hardware_and_the_opening_line_says_why(tmp_path, monkeypatch, capsys, bf16, name, words):
    pretend(monkeypatch, bf16)
    config = config_of(tmp_path, "precision=auto", "steps=2")
    assert resolved(config, CPU).precision == name
    system = build_system(config, CPU)
    assert system.config.precision == name and autocast(system.config, CPU)._enabled is bf16
    train(config)
    assert f"precision {name} (auto: this CPU {words} instructions)" in capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["precision"] == name
    pretend(monkeypatch, not bf16)  # another machine
    other = "fp32" if bf16 else "bf16"
    with pytest.raises(VgenError, match=rf"other settings \(precision: {name} -> {other}; steps: 2 -> 4\)"):
        train(config_of(tmp_path, "precision=auto", "steps=4"))
    assert train(config_of(tmp_path, f"precision={name}", "steps=4"), allow_changes=True).finished


def test_bf16_without_instructions_is_warned_of_with_the_figure(tmp_path, monkeypatch, capsys):
    pretend(monkeypatch, False)
    train(config_of(tmp_path, "precision=bf16", "steps=1"))
    errors = capsys.readouterr().err
    assert "warning: precision=bf16, but this CPU has no bf16 instructions" in errors
    assert "2.4 to 3.2 times slower than fp32; precision=auto chooses by the hardware" in errors
    pretend(monkeypatch, True)
    train(config_of(tmp_path, "precision=bf16", "steps=2"), allow_changes=True)
    assert "warning" not in capsys.readouterr().err


def test_runs_of_the_old_name_resume(tmp_path):
    train(config_of(tmp_path, "steps=3", "time_limit_minutes=1e-9"))
    path = tmp_path / "run" / "config.yaml"
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**content, "precision": "no"}))
    assert train(config_of(tmp_path, "steps=3")).finished
    assert yaml.safe_load(path.read_text())["precision"] == "fp32"
