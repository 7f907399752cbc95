"""Token sets: round trip, variants, and files that do not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from vgen.data.batches import batches
from vgen.data.tokens import TokenDataset, write_tokens
from vgen.errors import VgenError


def write(path, tokens, **changes):
    count = len(tokens)
    fields = {
        "captions": [f"caption {n}" for n in range(count)],
        "labels": [n % 2 for n in range(count)],
        "keys": [f"k{n}" for n in range(count)],
        "grid": (1, 2, 3),
        "vocabulary": 100,
        "tokenizer": "vq-test",
        "tokenizer_sha256": "ab" * 32,
        "class_names": ["even", "odd"],
    }
    write_tokens(path, tokens, **fields | changes)
    return path


def test_round_trip(tmp_path):
    tokens = torch.randint(0, 100, (5, 6))
    data = TokenDataset(write(tmp_path / "t.safetensors", tokens))
    assert len(data) == 5 and data.grid == (1, 2, 3) and data.vocabulary == 100 and data.variants == 1
    assert (data.tokenizer, data.tokenizer_sha256, data.class_names) == ("vq-test", "ab" * 32, ("even", "odd"))
    item = data[3]
    assert item["tokens"].dtype == torch.int64 and torch.equal(item["tokens"], tokens[3])
    assert (item["caption"], item["label"], item["key"]) == ("caption 3", 1, "k3")
    batch = next(batches(data, 4, seed=0))
    assert batch["tokens"].shape == (4, 6) and batch["label"].dtype == torch.int64 and len(batch["caption"]) == 4


@pytest.mark.parametrize(("vocabulary", "dtype"), [(2**15, torch.int16), (2**15 + 1, torch.int32)])
def test_stored_in_the_smallest_type_that_holds_the_vocabulary(tmp_path, vocabulary, dtype):
    tokens = torch.full((2, 6), vocabulary - 1)
    path = write(tmp_path / "t.safetensors", tokens, vocabulary=vocabulary)
    assert load_file(path)["tokens"].dtype == dtype and torch.equal(TokenDataset(path)[1]["tokens"], tokens[1])


def test_every_variant_once_in_as_many_epochs(tmp_path):
    tokens = torch.arange(7 * 4).reshape(7, 4, 1).repeat(1, 1, 6)
    data = TokenDataset(write(tmp_path / "t.safetensors", tokens), seed=1)
    starts = set()
    for index in range(7):
        seen = [int(data[index, epoch]["tokens"][0]) - 4 * index for epoch in range(8)]
        assert sorted(seen[:4]) == [0, 1, 2, 3] and seen[:4] == seen[4:]
        starts.add(seen[0])
    assert len(starts) > 1


@pytest.mark.parametrize(
    ("tokens", "changes", "message"),
    [
        (torch.zeros(2, 5, dtype=torch.long), {}, "N = 6"),
        (torch.zeros(2, 6), {}, "integers"),
        (torch.full((2, 6), 100), {}, r"\[0, 100\), found 100 to 100"),
        (torch.full((2, 6), -1), {}, "found -1"),
        (torch.zeros(2, 6, dtype=torch.long), {"captions": ["one"]}, "as many captions"),
        (torch.zeros(0, 6, dtype=torch.long), {}, "at least one"),
    ],
)
def test_what_cannot_be_written(tmp_path, tokens, changes, message):
    with pytest.raises(VgenError, match=message):
        write(tmp_path / "t.safetensors", tokens, **changes)
    assert not (tmp_path / "t.safetensors").exists()


def test_what_cannot_be_read(tmp_path):
    tokens = torch.zeros(2, 6, dtype=torch.long)
    with pytest.raises(VgenError, match="does not exist"):
        TokenDataset(tmp_path / "none.safetensors")
    with pytest.raises(VgenError, match=r"is a \.safetensors file"):
        write(tmp_path / "t.pt", tokens)
    path = write(tmp_path / "t.safetensors", tokens)
    other = write(tmp_path / "other.safetensors", tokens, captions=["x", "y"])
    other.with_suffix(".json").replace(path.with_suffix(".json"))
    with pytest.raises(VgenError, match="do not belong together"):
        TokenDataset(path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(VgenError, match="not a token set"):
        TokenDataset(path)
    path.write_bytes(b"broken")
    with pytest.raises(VgenError, match="not a token set"):
        TokenDataset(path)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(1)}, foreign)
    foreign.with_suffix(".json").write_text(json.dumps({}))
    with pytest.raises(VgenError, match="not a token set"):
        TokenDataset(foreign)
