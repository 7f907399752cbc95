from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vgen import yaml12
from vgen.errors import VgenError
from vgen.settings import merge, parse_overrides, read_yaml, save_config, to_dict
from vgen.train.config import check_common, differences
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
        (["optimizer.lr=[1]"], ["optimizer.lr must be a number, found [1]"]),
        (["optimizer.lr=yes"], ["optimizer.lr must be a number, found 'yes'"]),
        (["optimizer.lr=true"], ["optimizer.lr must be a number, found true"]),
        (["optimizer.lr=.inf"], ["optimizer.lr must be a number, found .inf"]),
        (["steps=12:30"], ["steps must be a whole number, found '12:30'"]),
        (["steps=1_000"], ["steps must be a whole number, found '1_000'"]),
        (["steps=true"], ["steps must be a whole number, found true"]),
        (["steps=10.5"], ["steps must be a whole number, found 10.5"]),
        (["steps="], ["steps must be a whole number, found null"]),
        (["tensorboard=on"], ["tensorboard must be true or false, found 'on'"]),
        (["tensorboard=0"], ["tensorboard must be true or false, found 0"]),
        (["precision=off"], ["precision must be one of auto, fp32, bf16, found 'off'"]),
        (["precision=false"], ["precision must be text, found false"]),
        (["out=007"], ["out must be text, found 7", "quotes"]),
        (["out=@home"], ["'out=@home' is not readable YAML", """'out="@home"'"""]),
        (["out=${nowhere}"], ["nowhere"]),
        (["optimizer.adamw_names=head"], ["optimizer.adamw_names must be a list ([…]), each text, found 'head'"]),
        (["optimizer.milestones=[0.5, no]"], ["optimizer.milestones must be a list ([…]), each a number"]),
        (["system=[tiny]"], ["unknown system ['tiny']"]),
        (["steps=1", "steps.more=2"], ["steps is given a value and a setting of its own (steps.more=2)"]),
        (["optimizer=3"], ["optimizer is a group of settings", "found 3"]),
        (["steps=0"], ["steps must be above 0, found 0"]),
        (["precision=fp16"], ["precision must be one of auto, fp32, bf16", "'fp16'"]),
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


@pytest.mark.parametrize("word", ["no", "No", "off", "on", "yes", "y", "N", "12:30", "2026-11-28", "1:2:3", "=", "0b1"])
def test_words_stay_words(tmp_path, word):
    """In files and in overrides; YAML 1.1 makes truth values, numbers, dates of them."""
    path = tmp_path / "c.yaml"
    path.write_text(f"version: 1\nsystem: tiny\nout: {word}\nsteps: 10\n", encoding="utf-8")
    assert load_config(path).out == word
    assert load_config(path, ["out=run", f"out={word}"]).out == word


def test_numbers_are_numbers(tmp_path):
    text = "version: 1\nsystem: tiny\nout: run\nsteps: 0010\noptimizer: {lr: 1e-3, eps: 1E-9, weight_decay: 1, beta1: .5}\n"
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    config = load_config(tmp_path / "c.yaml", ["seed=0x10", "dropout=5e-1", "threads=+2"])
    found = config.optimizer
    assert (config.steps, config.seed, config.threads) == (10, 16, 2)
    assert (found.lr, found.eps, found.weight_decay, found.beta1, config.dropout) == (1e-3, 1e-9, 1.0, 0.5, 0.5)


@pytest.mark.parametrize("text", ["precision: no", "precision: 'no'", 'precision: "no"'])
def test_precision_no_is_the_old_name_of_fp32(tmp_path, text):
    path = write(tmp_path / "c.yaml", GOOD)
    path.write_text(path.read_text(encoding="utf-8") + text + "\n", encoding="utf-8")
    assert load_config(path).precision == "fp32"
    assert load_config(path, ["precision=no"]) == load_config(path, ["precision=fp32"])


def test_a_key_that_comes_twice_is_an_error(tmp_path):
    (tmp_path / "c.yaml").write_text("steps: 1\nout: run\nsteps: 2\n", encoding="utf-8")
    with pytest.raises(VgenError, match=r"not readable YAML.*'steps' comes twice"):
        read_yaml(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("5: 1\n", encoding="utf-8")
    with pytest.raises(VgenError, match="key 5 is no word"):
        read_yaml(tmp_path / "c.yaml")


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
    | st.sampled_from(
        ["1e-3", "0o7", "0x1F", "no", "null", "~", ".5", "1.", "+.inf", "12:30", "1_0", "2026-11-28", "<<"]
    )
)
def test_what_is_dumped_is_read_as_the_same_by_both_versions(value):
    text = yaml12.dump(value)
    assert yaml12.load(text) == value
    assert yaml.safe_load(text) == value


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


@dataclass(frozen=True)
class Part:
    name: str
    size: int = 1


@dataclass(frozen=True)
class Whole:
    parts: list[Part] = field(default_factory=list)


def test_lists_of_groups_are_checked_item_by_item():
    """As the measurements of published presets are."""
    assert merge(Whole, {"parts": [{"name": "a"}, {"name": "b", "size": 3}]}) == Whole([Part("a"), Part("b", 3)])
    for value, words in (
        ([{"name": "a", "siez": 3}], r"unknown key `parts\[0\].siez` \(did you mean 'size'"),
        ([{"name": "a"}, {"name": "b", "size": "3"}], r"parts\[1\].size must be a whole number, found '3'"),
        (["a"], r"parts must be a list \(\[…\]\), each a group of settings"),
    ):
        with pytest.raises(VgenError, match=words):
            merge(Whole, {"parts": value})
