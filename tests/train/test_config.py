from pathlib import Path

import pytest
import yaml

from vgen.errors import VgenError
from vgen.train.config import check_common, differences, merge, parse_overrides, read_yaml, save_config, to_dict
from vgen.train.system import SYSTEMS, load_config, system_module

CONFIGS = sorted(
    path
    for path in (Path(__file__).parents[2] / "configs").rglob("*.yaml")
    if "system" in yaml.safe_load(path.read_text(encoding="utf-8"))
)
GOOD = {"version": 1, "system": "tiny", "out": "run", "steps": 10}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SYSTEMS, "tiny", "train.tiny_system")


def write(path: Path, content: object) -> Path:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_file_and_overrides_merge(tmp_path):
    path = write(tmp_path / "c.yaml", {**GOOD, "optimizer": {"lr": 0.1, "beta1": 0.8}})
    config = load_config(path, ["optimizer.lr=1e-4", "precision=bf16", "dropout=0"])
    assert (config.optimizer.lr, config.optimizer.beta1) == (1e-4, 0.8)
    assert (config.precision, config.dropout, config.batch_size) == ("bf16", 0.0, 32)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimiser.lr=1"], ["unknown key `optimiser`", "did you mean 'optimizer'"]),
        (["optimizer.learning=1"], ["unknown key `optimizer.learning`", "lr"]),
        (["optimizer.warmup_step=1"], ["`optimizer.warmup_step`", "did you mean 'warmup_steps'"]),
        (["steps=many"], ["many", "steps"]),
        (["optimizer.lr=[1]"], ["optimizer.lr"]),
        (["optimizer=3"], ["optimizer is a group of settings", "found 3"]),
        (["steps=0"], ["steps must be above 0, found 0"]),
        (["precision=fp16"], ["precision must be one of no, bf16", "'fp16'"]),
        (["optimizer.schedule=cosin"], ["optimizer.schedule", "did you mean 'cosine'"]),
        (["optimizer.beta2=1.0"], ["optimizer.beta2 must lie in [0, 1)"]),
        (["ema_decay=1"], ["ema_decay"]),
        (["version=2"], ["version must be 1, found 2"]),
        (["dropout=1.5"], ["dropout must lie in [0, 1]"]),
        (["system=tinny"], ["unknown system 'tinny'", "did you mean 'tiny'"]),
        (["steps"], ["key=value", "'steps'"]),
        (["--steps=3"], ["key=value"]),
    ],
)
def test_errors_say_what_is_wrong(tmp_path, overrides, words):
    path = write(tmp_path / "c.yaml", GOOD)
    with pytest.raises(VgenError) as error:
        load_config(path, overrides)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_missing_values_and_files(tmp_path):
    with pytest.raises(VgenError, match=r"there is no config file .*none\.yaml"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(VgenError, match="steps must be set"):
        load_config(write(tmp_path / "c.yaml", {key: value for key, value in GOOD.items() if key != "steps"}))
    with pytest.raises(VgenError, match="names no system"):
        load_config(write(tmp_path / "c.yaml", {"version": 1}))
    with pytest.raises(VgenError, match="must hold a mapping"):
        load_config(write(tmp_path / "c.yaml", [1, 2]))
    (tmp_path / "broken.yaml").write_text("a: [1,\nb: }", encoding="utf-8")
    with pytest.raises(VgenError, match="not readable YAML"):
        load_config(tmp_path / "broken.yaml")


def test_saved_config_loads_to_the_same(tmp_path):
    config = load_config(write(tmp_path / "c.yaml", GOOD), ["optimizer.lr=0.02"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_differences_name_what_changes_the_weights(tmp_path):
    path = write(tmp_path / "c.yaml", GOOD)
    old = to_dict(load_config(path))
    assert differences(old, to_dict(load_config(path, ["log_every=3", "threads=1", "keep=9", "out=elsewhere"]))) == []
    assert differences(old, to_dict(load_config(path, ["optimizer.lr=0.5"]))) == ["optimizer.lr: 0.0003 -> 0.5"]


def test_overrides_parse_as_yaml():
    assert parse_overrides(["a.b=1e-3", "c=[1,2]", "d=null", "e=x=y"]) == {
        "a": {"b": 1e-3},
        "c": [1, 2],
        "d": None,
        "e": "x=y",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_committed_configs_fit_their_systems(path):
    content = read_yaml(path)
    check_common(merge(system_module(content["system"]).Config, content))
    header = path.read_text(encoding="utf-8").split("\nversion:")[0]
    assert all(word in header for word in ("command:", "expected:", "duration:"))
