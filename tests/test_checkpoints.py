"""Reading checkpoints: every nesting, every kind of bad file, exact loading."""

from __future__ import annotations

import argparse
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vgen.checkpoints import load_exactly, read_state_dict
from vgen.errors import VgenError

STATE = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
MARKS: list[str] = []


class Hostile:
    """Runs code when unpickled."""

    def __reduce__(self):
        return MARKS.append, ("ran",)


def test_safetensors(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors")
    assert read_state_dict(tmp_path / "a.safetensors").keys() == STATE.keys()


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"model": STATE},
        {"module": STATE},
        {"state_dict": STATE, "epoch": 3},
        {
            "ema": STATE,
            "model": {"weight": torch.zeros(1)},
            "args": argparse.Namespace(lr=1e-4),
            "optimizer": {"state": {}},
        },
        {"ema": None, "model": STATE},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_nestings(tmp_path, content, zipped):
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = read_state_dict(tmp_path / "a.pt")
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in STATE.items()}


def test_the_caller_may_prefer_another_entry(tmp_path):
    torch.save({"ema": STATE, "model": {"weight": torch.zeros(1)}}, tmp_path / "a.pt")
    assert read_state_dict(tmp_path / "a.pt", prefer=("model",)).keys() == {"weight"}


def test_an_average_of_the_parameters_lies_over_the_other_tensors(tmp_path):
    whole = {**STATE, "table": torch.ones(3)}
    torch.save({"model": whole, "model_ema": {"bias": torch.full((2,), 5.0)}}, tmp_path / "a.pt")
    found = read_state_dict(tmp_path / "a.pt", ("model",), overlay="model_ema")
    assert found.keys() == whole.keys() and found["bias"].tolist() == [5, 5]
    torch.save(STATE, tmp_path / "flat.pt")
    assert read_state_dict(tmp_path / "flat.pt", ("model",), overlay="model_ema").keys() == STATE.keys()
    torch.save({"model": whole}, tmp_path / "b.pt")
    with pytest.raises(VgenError, match="under model_ema"):
        read_state_dict(tmp_path / "b.pt", ("model",), overlay="model_ema")


WRAPPED = {
    "compiled": {"_orig_mod.weight": STATE["weight"], "_orig_mod.bias": STATE["bias"]},
    "in parallel": {"module.weight": STATE["weight"], "module.bias": STATE["bias"]},
    "both": {f"module._orig_mod.{key}": value for key, value in STATE.items()},
    "both, the other way": {f"_orig_mod.module.{key}": value for key, value in STATE.items()},
    "an average": {"n_averaged": torch.tensor(3), **{f"module.{key}": value for key, value in STATE.items()}},
    "sharded": {f"_fsdp_wrapped_module.{key}": value for key, value in STATE.items()},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_wrappers_add_to_names_is_taken_off(name, tmp_path):
    torch.save({"state_dict": WRAPPED[name]}, tmp_path / "a.pt")
    save_file(WRAPPED[name], tmp_path / "a.safetensors")
    for file in ("a.pt", "a.safetensors"):
        found = read_state_dict(tmp_path / file)
        assert found.keys() == STATE.keys() and all(torch.equal(found[key], STATE[key]) for key in STATE)


def test_wrappers_inside_of_names_and_names_that_only_look_so(tmp_path):
    blocks = {"blocks.0._orig_mod.weight": torch.ones(1), "blocks.1._checkpoint_wrapped_module.weight": torch.ones(1)}
    save_file(blocks, tmp_path / "a.safetensors")
    assert read_state_dict(tmp_path / "a.safetensors").keys() == {"blocks.0.weight", "blocks.1.weight"}
    own = {"module.weight": torch.ones(1), "head.weight": torch.ones(1)}  # a part that is called module
    save_file(own, tmp_path / "b.safetensors")
    assert read_state_dict(tmp_path / "b.safetensors").keys() == own.keys()
    save_file({"w": torch.ones(1), "_orig_mod.w": torch.zeros(1)}, tmp_path / "c.safetensors")
    with pytest.raises(VgenError, match="holds w twice"):
        read_state_dict(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    "path", [("state_dict", "model"), ("model", "state_dict"), ("model_ema",), ("ema", "module", "model")]
)
def test_entries_nested_in_one_another(path, tmp_path):
    content = STATE
    for name in reversed(path):
        content = {name: content, "step": 3, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "a.pt")
    assert read_state_dict(tmp_path / "a.pt").keys() == STATE.keys()


def shards(folder, kind, variant="", index=True):
    """STATE in two files and an index, as the libraries of the hub write them; returns the files."""
    dotted = f".{variant}" if variant else ""
    stem, suffix = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    names = [f"{stem}{dotted}-{number:05d}-of-00002{suffix}" for number in (1, 2)]
    for name, (key, value) in zip(names, STATE.items()):
        save_file({key: value}, folder / name) if suffix == ".safetensors" else torch.save({key: value}, folder / name)
    if index:
        table = {"metadata": {}, "weight_map": dict(zip(STATE, names))}
        (folder / f"{stem}{suffix}.index{dotted}.json").write_text(json.dumps(table))
    return [folder / name for name in names]


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("variant", ["", "fp16"])
def test_shards(kind, variant, index, tmp_path):
    files = shards(tmp_path, kind, variant, index)
    torch.save({"state": {}}, tmp_path / "optimizer.bin")  # what else lies in such folders
    torch.save([1], tmp_path / "training_args.bin")
    for path in (tmp_path, *files, *tmp_path.glob("*.index*.json")):
        assert read_state_dict(path).keys() == STATE.keys(), path
    files[1].unlink()
    for path in (tmp_path, files[0], *tmp_path.glob("*.index*.json")):
        with pytest.raises(VgenError, match=f"lacks {files[1].name}"):
            read_state_dict(path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_variant_beside_the_whole_weights_is_not_read(kind, tmp_path):
    shards(tmp_path, kind)
    half = {key: value.half() for key, value in STATE.items()}
    save_file(half, tmp_path / "model.fp16.safetensors") if kind == "safetensors" else torch.save(
        half, tmp_path / "pytorch_model.fp16.bin"
    )
    assert {value.dtype for value in read_state_dict(tmp_path).values()} == {torch.float32}


def test_folders_without_weights_and_with_too_many(tmp_path):
    with pytest.raises(VgenError, match=r"lacks any \.safetensors or \.bin file"):
        read_state_dict(tmp_path)
    save_file(STATE, tmp_path / "a.safetensors")
    save_file(STATE, tmp_path / "b.safetensors")
    with pytest.raises(VgenError, match="holds bias in two files"):
        read_state_dict(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[")
    with pytest.raises(VgenError, match="is not a JSON file"):
        read_state_dict(tmp_path)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    import builtins

    torch.save(STATE, tmp_path / "a.pt")

    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(builtins, "open", refuse)  # root may read anything
    with pytest.raises(VgenError, match=r"a\.pt cannot be read .*Permission denied"):
        read_state_dict(tmp_path / "a.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, zipped):
    torch.save({"model": STATE, "extra": Hostile()}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(VgenError, match="would have to run code to load"):
        read_state_dict(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(VgenError):
        read_state_dict(tmp_path / "b.pt")
    assert MARKS == []


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_named(tmp_path, suffix, share):
    path = tmp_path / f"a.{suffix}"
    big = {"weight": torch.randn(64, 64)}
    save_file(big, path) if suffix == "safetensors" else torch.save(big, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(VgenError, match=rf"a\.{suffix} is not a .*download it again") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


def test_other_bad_files(tmp_path):
    with pytest.raises(VgenError, match="does not exist"):
        read_state_dict(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("<html>404</html>")
    with pytest.raises(VgenError, match="not a torch checkpoint"):
        read_state_dict(tmp_path / "text.pt")
    torch.save({"generator": STATE, "step": 3}, tmp_path / "nested.pt")
    with pytest.raises(VgenError, match="it holds the entries generator, step"):
        read_state_dict(tmp_path / "nested.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(VgenError, match="it holds a list"):
        read_state_dict(tmp_path / "list.pt")


def test_torchscript_is_never_run(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(3, 2)), tmp_path / "a.jit")
    with pytest.raises(VgenError, match="TorchScript"):
        read_state_dict(tmp_path / "a.jit")


def test_load_exactly_fills_a_module_on_the_meta_device():
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    load_exactly(module, {**STATE, "freqs_cis": torch.ones(1)}, ignore=("freqs_cis",))
    assert torch.equal(module.weight, STATE["weight"]) and isinstance(module.weight, nn.Parameter)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": STATE["weight"]}, r"1 missing \(bias\)"),
        ({**STATE, "extra": STATE["bias"]}, r"1 unexpected \(extra\)"),
        ({**STATE, "bias": torch.zeros(4)}, r"1 of another shape \(bias \[4\] instead of \[2\]\)"),
        (
            {f"x{i}": torch.zeros(1) for i in range(9)},
            r"2 missing \(weight, bias\); 9 unexpected \(x0, x1, x2, \.\.\.\)",
        ),
    ],
)
def test_load_exactly_names_what_differs_and_changes_nothing(state, message):
    module = nn.Linear(3, 2)
    before = module.weight.clone()
    with pytest.raises(VgenError, match=message):
        load_exactly(module, state)
    assert torch.equal(before, module.weight)


def test_load_exactly_does_not_leave_meta_buffers():
    class Table(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.register_buffer("table", torch.ones(3), persistent=False)

    with torch.device("meta"):
        module = Table()
    with pytest.raises(RuntimeError, match="table"):
        load_exactly(module, STATE)
