"""Data without captions and classes, and data of which some pictures have none: every system trains, previews, exports and samples."""

import json
import logging

import pytest
import torch
import yaml

from vgen.cli.main import main
from vgen.data.tokens import TokenDataset, write_tokens
from vgen.errors import VgenError
from vgen.models.conditions.vocabulary import Vocabulary
from vgen.pipelines.visual import VisualPipeline
from vgen.tokenizers_vis.flextok.flextok import FlexTok
from vgen.tokenizers_vis.kl import KLModel
from vgen.train.loop import Trainer, train
from vgen.train.system import load_config

LLAMA = {"width": 32, "depth": 1, "heads": 2, "hidden": 64}
ADALN = {"width": 32, "layers": 1, "heads": 2, "hidden": 64}
MAR = {
    "encoder_width": 32,
    "encoder_layers": 1,
    "encoder_heads": 2,
    "decoder_width": 32,
    "decoder_layers": 1,
    "decoder_heads": 2,
}
HEAD = {"head_width": 32, "head_layers": 1}
CODES = {
    "anyorder": {"width": 64, "content_layers": 1, "query_layers": 1, "heads": 2},
    "llamagen": LLAMA,
    "par": {**LLAMA, "parallel": 4},
    "nar": LLAMA,
    "dar": ADALN,
    "rar": ADALN,
    "maskgit": {"size": "L-32", **ADALN},
}
LATENTS = {
    "mar": {**MAR, **HEAD, "buffer": 4, "diffusion_batch": 1},
    "xar": {"entities": "blocks-4", "width": 32, "encoder_depth": 1, "decoder_depth": 1, "heads": 2},
    "himar": {
        "width": 32, "encoder_layers": 1, "encoder_heads": 2, "decoder_layers": 1, "decoder_heads": 2, "buffer": 4, **HEAD,
        "grid_head_width": 32, "grid_head_layers": 1, "grid_head_heads": 2, "diffusion_batch": 1,
    },
    "tokenbridge": {**MAR, "buffer": 4, "head_width": 32, "head_layers": 1, "head_heads": 2},
}  # fmt: skip
# A model of two steps knows nothing: without a bound its diffusion runs away.
QUICK = {
    "mar": {"substeps": "4", "clip": 3.0},
    "himar": {"substeps": "4", "low_substeps": "4", "clip": 3.0},
    "xar": {"substeps": 2},
}


def recaption(folder, captions, classes=False):
    """Writes the sets of a folder anew with `captions(number of the picture)` and without classes, or with theirs."""
    for path in folder.glob("*.safetensors"):
        old = TokenDataset(path)
        latents = {name: part[:, 0] for name, part in old.tensors.items() if name != "tokens"}
        write_tokens(
            path, old.tokens[:, 0], captions=[captions(i) for i in range(len(old))], keys=old.keys,
            labels=list(old.labels) if classes else [-1] * len(old), class_names=old.class_names if classes else (),
            grid=old.grid, vocabulary=old.vocabulary, tokenizer="none", low_grid=old.spec.low_grid, more=latents,
        )  # fmt: skip


@pytest.fixture
def config_of(tmp_path):
    def make(system, model, tokens, **more):
        content = {
            "version": 1,
            "system": system,
            "out": str(tmp_path / "run"),
            "steps": 2,
            "batch_size": 4,
            "preview_every": 2,
            "tensorboard": False,
            "data": {"tokens": str(tokens), "tokenizer": str(tmp_path / "tokenizer")},
            "model": model,
            "sampling": QUICK.get(system, {}),
            **more,
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return load_config(path)

    return make


def trained(config):
    """Trains, and returns the exported pipeline; the preview is there."""
    summary = train(config)
    assert (summary.folder / "previews" / "step_00000002.png").is_file()
    return summary.model, VisualPipeline.from_pretrained(summary.model)


@pytest.mark.parametrize("system", [*CODES, *LATENTS])
def test_without_captions_and_classes(system, request, config_of, tmp_path):
    if system in CODES:
        request.getfixturevalue("tokenizer")
        folder = request.getfixturevalue("token_sets")
    else:
        torch.manual_seed(0)
        small = {"ch": 8, "ch_mult": (1, 1), "num_res_blocks": 1, "latent_channels": 3, "num_groups": 4, "scale": 1.0}
        KLModel(**small).save_pretrained(tmp_path / "tokenizer")
        folder = request.getfixturevalue("latent_sets")
    recaption(folder, lambda i: "")
    _, pipe = trained(config_of(system, {**CODES, **LATENTS}[system], folder))
    assert pipe.model.vocabulary.unconditional and pipe.config.guidance_scale == 1.0
    made = pipe(num_images_per_prompt=2, seed=3)
    assert len(made.images) == 2 and made.tokens.isfinite().all()
    assert torch.equal(pipe("", num_images_per_prompt=2, seed=3).tokens, made.tokens)
    with pytest.raises(VgenError, match="trained without captions and knows no words, got the prompt 'a cat'"):
        pipe("a cat")


def test_flexar_without_captions(tmp_path, config_of):
    shape = {
        "encoder_width": 16,
        "encoder_depth": 1,
        "decoder_width": 16,
        "decoder_depth": 1,
        "head_dim": 8,
        "registers": 4,
    }
    options = {"levels": [5, 4], "max_grid": [4, 4], "frequencies": 8, "steps": 2, "guidance": 1.0}
    FlexTok.of_size("emoji-pixels", **shape, **options).save_pretrained(tmp_path / "tokenizer")
    for split, rows in (("train", 8), ("heldout", 3)):
        write_tokens(
            tmp_path / "sets" / f"{split}.safetensors", torch.arange(rows)[:, None].expand(-1, 4) % 20, captions=[""] * rows,
            labels=[-1] * rows, keys=[str(i) for i in range(rows)], grid=(1, 1, 4), vocabulary=20, tokenizer="none",
        )  # fmt: skip
    _, pipe = trained(config_of("flexar", {"width": 32, "depth": 1, "heads": 2}, tmp_path / "sets"))
    assert len(pipe(num_images_per_prompt=2).images) == 2


@pytest.mark.parametrize("system", ["anyorder", "llamagen", "dar"])
def test_with_some_empty_captions(system, token_sets, tokenizer, config_of):
    recaption(token_sets, lambda i: "" if i % 2 else f"pattern {i % 4}")
    _, pipe = trained(config_of(system, CODES[system], token_sets))
    empty, null = pipe.model.vocabulary.captions([""]), pipe.model.vocabulary.null(1)
    assert torch.equal(empty.ids, null.ids) and torch.equal(empty.mask, null.mask)
    assert len(pipe(["", "pattern 2"]).images) == 2
    with pytest.raises(VgenError, match="give either prompts or class labels"):
        pipe()


def test_pictures_without_a_class_train_the_null_class(token_sets, tokenizer, config_of):
    for path in token_sets.glob("*.safetensors"):
        old = TokenDataset(path)
        labels = [-1, *old.labels[1:]]
        write_tokens(
            path, old.tokens[:, 0], captions=old.captions, labels=labels, keys=old.keys, grid=old.grid, vocabulary=32,
            tokenizer="none", class_names=old.class_names,
        )  # fmt: skip
    with pytest.raises(VgenError, match=r"condition.dropout=0: 1 of the 24 pictures of .* have no class"):
        Trainer(config_of("llamagen", LLAMA, token_sets, condition={"kind": "class", "dropout": 0.0}))
    config = config_of("llamagen", LLAMA, token_sets, condition={"kind": "class", "dropout": 0.1})
    system = Trainer(config).system
    assert system.full_condition(["", ""], torch.tensor([-1, 2])).ids.tolist() == [[4], [2]]
    _, pipe = trained(config)
    with pytest.raises(VgenError, match="at least 0, got -1"):
        pipe(class_labels=-1)


def test_the_command_needs_no_prompt(token_sets, tokenizer, config_of, tmp_path, capsys):
    recaption(token_sets, lambda i: "")
    model, _ = trained(config_of("anyorder", CODES["anyorder"], token_sets))
    out = tmp_path / "pictures"
    arguments = ["sample", "--model", str(model), "--device", "cpu", "--num-images", "3"]
    assert main([*arguments, "--out", str(out), "--json"]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 3
    assert len(list(out.glob("*.png"))) == 3
    assert main([*arguments, "--prompt", "a cat", "--out", str(tmp_path / "cat.png")]) == 2
    assert "leave the prompt out" in capsys.readouterr().err


def test_a_long_caption_is_cut_between_words():
    vocabulary = Vocabulary.build(["Red  apple, on a table"])
    assert [vocabulary.shortened("Red  apple, on a table", limit) for limit in (1, 2, 3, 4, 7, 99, 0)] == [
        "",
        "Red",
        "Red  apple",
        "Red  apple,",
        "Red  apple, on a table",
        "Red  apple, on a table",
        "Red  apple, on a table",
    ]
    assert vocabulary.shortened("", 4) == ""


@pytest.mark.parametrize(
    ("system", "share", "setting"),
    [
        ("anyorder", 0.1, "condition.class_share=1"),
        ("llamagen", 0.0, "condition.kind=class"),
        ("anyorder", 1.0, None),
    ],
)
def test_classes_that_hardly_anything_sees_are_named(
    system, share, setting, config_of, token_sets, tokenizer, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("vgen.train"), "propagate", True)
    recaption(token_sets, lambda i: "", classes=True)
    system = Trainer(config_of(system, CODES[system], token_sets, condition={"class_share": share})).system
    said = " ".join(record.getMessage() for record in caplog.records)
    assert system.vocabulary.words == []
    if setting is None:
        assert "no captions" not in said
    else:
        assert f"{share:.0%} of the samples see their class" in said and f"{setting})" in said
