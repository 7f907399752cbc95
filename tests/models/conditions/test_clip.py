"""CLIP captions: files of both kinds, the three outputs, tokens, the empty caption."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from vgen.errors import VgenError
from vgen.models.conditions.clip import OUTSIDE, ClipCaptions, clean_prompt

WIDTH, LENGTH, WORDS = 16, 6, 30


class Words:
    """A tokenizer of made-up ids: start, the length of every word, end (the largest id)."""

    eos_token_id = WORDS - 1

    def __call__(self, captions):
        return {"input_ids": [[WORDS - 2, *(len(word) for word in c.split()), WORDS - 1] for c in captions]}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=32,
        projection_dim=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=0,
        eos_token_id=2,
    )
    return CLIPTextModelWithProjection(config).eval()


def open_clip_names(encoder):
    """The reverse of the conversion, written down once more."""
    state = encoder.state_dict()
    names = {old: state[new] for old, new in OUTSIDE.items()}
    names["text_projection"] = state["text_projection.weight"].T
    for block in range(3):
        old, new = f"transformer.resblocks.{block}", f"text_model.encoder.layers.{block}"
        for kind in ("weight", "bias"):
            parts = [state[f"{new}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            names[f"{old}.attn.in_proj_{kind}"] = torch.cat(parts)
            names[f"{old}.attn.out_proj.{kind}"] = state[f"{new}.self_attn.out_proj.{kind}"]
            for theirs, ours in (
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                names[f"{old}.{theirs}.{kind}"] = state[f"{new}.{ours}.{kind}"]
    return {**names, "logit_scale": torch.tensor(1.0), "visual.conv1.weight": torch.zeros(1)}


def test_files_of_openai_and_open_clip_load(encoder, tmp_path):
    state = open_clip_names(encoder)
    path = tmp_path / "clip.pt"
    torch.save(state, path)
    captions = ClipCaptions.from_original(path, heads=2)
    ids = torch.tensor([[28, 3, 29, 0, 0, 0], [28, 1, 2, 3, 4, 29]])
    found, expected = captions.features(ids), ClipCaptions(None, encoder).features(ids)
    for name in ("text", "pooled", "final"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert found.text.shape == found.final.shape == (2, LENGTH, WIDTH) and found.pooled.shape == (2, 12)
    other = ClipCaptions.from_original(path, heads=2, activation="gelu").features(ids)
    assert not torch.allclose(other.text, found.text)
    with pytest.raises(VgenError, match="quick_gelu or gelu, got 'relu'"):
        ClipCaptions.from_original(path, activation="relu")
    del state["ln_final.bias"]
    with pytest.raises(VgenError, match="does not fit"):
        ClipCaptions.from_original(state, heads=2)
    with pytest.raises(VgenError, match="no CLIP text tower"):
        ClipCaptions.from_original({"a": torch.zeros(1)})


def test_the_outputs_come_from_different_depths(encoder):
    ids = torch.tensor([[28, 3, 29, 0, 0, 0]])
    features = ClipCaptions(None, encoder).features(ids)
    tower = encoder.text_model(input_ids=ids, output_hidden_states=True)
    assert torch.equal(features.text, tower.hidden_states[2])  # after two of three blocks, no norm
    assert torch.equal(features.final, tower.last_hidden_state)
    expected = encoder.text_projection(tower.last_hidden_state[:, 2])  # the end token
    torch.testing.assert_close(features.pooled, expected)
    causal = ClipCaptions(None, encoder).features(torch.tensor([[28, 3, 29, 5, 5, 5]]))
    torch.testing.assert_close(causal.text[:, :3], features.text[:, :3])


def test_captions_become_conditions(encoder):
    captions = ClipCaptions(Words(), encoder)
    assert captions.tokenize(["a cat", "one two three four five six"]).tolist() == [
        [28, 1, 3, 29, 0, 0],
        [28, 3, 3, 5, 4, 29],  # cut, with the end token in the last place
    ]
    with pytest.raises(VgenError, match="may have 4 tokens, 'one two"):
        captions.captions(["one two three four five six"], strict=True)
    condition = captions.captions(["a cat", "red"])
    assert condition.ids.shape == (2, 0) and condition.mask.shape == (2, LENGTH)
    assert condition.extras["pooled"].shape == (2, 12) and condition.extras["decoder_text"].shape == (2, LENGTH, WIDTH)
    null = captions.null(3)
    expected = captions.captions([""]).extras["text"].expand(3, -1, -1)
    torch.testing.assert_close(null.extras["text"], expected)


def test_prompts_are_cleaned_as_clip_cleans_them():
    assert clean_prompt("  A &amp;amp; B\n\tred   Apple ") == "a & b red apple"


def test_a_saved_tower_can_be_opened(encoder, tmp_path, monkeypatch):
    encoder.save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.CLIPTokenizer.from_pretrained", lambda name: Words())
    opened = ClipCaptions.from_pretrained(str(tmp_path), activation="gelu")
    assert opened.encoder.config.hidden_act == "gelu"
    assert opened.captions(["a cat"]).extras["text"].shape == (1, LENGTH, WIDTH)
