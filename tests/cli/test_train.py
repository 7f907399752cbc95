from pathlib import Path

import pytest
import yaml

from vgen.cli.main import main
from vgen.train.system import SYSTEMS


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setitem(SYSTEMS, "tiny", "train.tiny_system")
    path = tmp_path / "config.yaml"
    content = {"version": 1, "system": "tiny", "out": str(tmp_path / "run"), "steps": 4, "tensorboard": False}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def test_train_then_export(tmp_path, config, capsys):
    assert main(["train", config, "batch_size=2"]) == 0
    errors = capsys.readouterr().err
    assert "tiny starts in" in errors and "finished 4 steps" in errors
    assert main(["train", config, "batch_size=2", "--export", str(tmp_path / "out"), "--dtype", "float16"]) == 0
    assert "wrote the model of step 4" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_dry_run_prints_the_config_and_writes_nothing(tmp_path, config, capsys):
    assert main(["train", config, "optimizer.lr=0.25", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["optimizer"]["lr"] == 0.25
    assert "# regressor: 180 parameters" in printed
    assert not Path(tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optimzer.lr=1"], "unknown key `optimzer` (did you mean 'optimizer'?)"),
        (["steps=-1"], "steps must be above 0"),
        (["--export", "out"], "has no checkpoint yet"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(config, arguments, words, capsys):
    assert main(["train", config, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vgen train: ") and words in error and error.count("\n") == 1


def test_missing_config_file(capsys):
    assert main(["train", "nowhere.yaml"]) == 2
    assert "there is no config file nowhere.yaml" in capsys.readouterr().err
