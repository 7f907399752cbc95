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


def latents(tmp_path, **changes):
    means = torch.randn(5, 6, 3, generator=torch.Generator().manual_seed(0))
    more = {"deviations": torch.full_like(means, 0.5), "low": means[:, :2], "low_deviations": torch.zeros(5, 2, 3)}
    options = {"vocabulary": None, "low_grid": (1, 1, 2), "more": more} | changes
    return means, write(tmp_path / "t.safetensors", means, **options)


def test_latents_are_drawn_anew_every_epoch_and_the_same_for_the_same_epoch(tmp_path):
    means, path = latents(tmp_path)
    data = TokenDataset(path, seed=2)
    assert (data.vocabulary, data.spec.channels, data.spec.low_grid, data.variants) == (None, 3, (1, 1, 2), 1)
    first, again, other = data[3, 0], data[3, 0], data[3, 1]
    assert first["tokens"].dtype == torch.float32 and torch.equal(first["tokens"], again["tokens"])
    assert not torch.equal(first["tokens"], other["tokens"])
    assert torch.equal(first["low"], means[3, :2].half().float()), "no deviation: the mean"
    draws = torch.stack([data[3, epoch]["tokens"] for epoch in range(400)])
    assert torch.allclose(draws.mean(dim=0), means[3], atol=0.15) and abs(draws.std(dim=0).mean() - 0.5) < 0.05


def test_latents_without_deviations_are_what_they_are(tmp_path):
    means, path = latents(tmp_path, more={}, low_grid=None)
    item = TokenDataset(path)[1]
    assert torch.equal(item["tokens"], means[1].half().float()) and "low" not in item


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more": {"deviations": torch.ones(5, 6, 2)}, "low_grid": None}, "deviations of tokens have another shape"),
        ({"more": {}}, r"low must be floats \[M, 2, 3\]"),
        ({"grid": (1, 2, 2)}, r"tokens must be floats \[M, 4, 3\]"),
        ({"more": {"low": torch.full((5, 2, 3), 1e6)}}, "numbers that float16 cannot"),
    ],
)
def test_latents_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(VgenError, match=message):
        latents(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"tokenizer": "moved/vq-test", "keys": list("abcde")}, True),
        ({"captions": ["caption 0", "another", "caption 2", "caption 3", "caption 4"]}, False),
        ({"labels": [0, 1, 0, 1, 1]}, False),
        ({"class_names": ["odd", "even"]}, False),
        ({"aesthetics": [5.0, float("nan"), 5.0, 5.0, 5.0]}, False),
        ({"grid": (1, 3, 2)}, False),
        ({"vocabulary": 101}, False),
        ({"tokenizer_sha256": "cd" * 32}, False),
        ({"tokenizer_config": {"scale": 2.0}}, False),
        ({"tokens": 1}, False),
    ],
    ids=str,
)
def test_the_digest_is_of_what_training_reads(tmp_path, changes, same):
    tokens = torch.arange(30).reshape(5, 6)
    first = TokenDataset(write(tmp_path / "t.safetensors", tokens))
    changes = dict(changes)
    tokens[4, 5] += changes.pop("tokens", 0)
    other = TokenDataset(write(tmp_path / "moved" / "u.safetensors", tokens, **changes))
    assert (first.digest == other.digest) is same
