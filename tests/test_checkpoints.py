"""Reading checkpoints: every nesting, every kind of bad file, exact loading."""

from __future__ import annotations

import argparse
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
