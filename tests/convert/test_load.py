"""From a published name to pictures, with tiny entries and files made here."""

import pytest
import torch

import vgen
from tests.models.conditions.test_t5 import encoder_folder  # noqa: F401
from vgen.cli.main import main
from vgen.convert import published as registry
from vgen.convert.load import load_published
from vgen.convert.published import published
from vgen.errors import VgenError
from vgen.models.llama.llamagen import LlamaGenModel
from vgen.models.registry import GENERATORS
from vgen.pipelines.pipeline import VisualPipeline
from vgen.tokenizers_vis.registry import TOKENIZERS
from vgen.tokenizers_vis.vq import VQModel

COMMON = "version: 1\npaper: none\nnesting: model\ncode_licence: MIT\nweights_licence: none stated\n"
TOKENIZER = {
    "ch": 8,
    "encoder_ch_mult": [1, 1],
    "decoder_ch_mult": [1, 1],
    "num_res_blocks": 1,
    "z_channels": 8,
    "codebook_size": 32,
    "codebook_embed_dim": 4,
    "usage_window": 16,
    "num_groups": 4,
}
OPTIONS = {"grid": [4, 4], "width": 32, "depth": 2, "heads": 2, "hidden": 64, "codes": 32, "classes": 5}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A registry with one tiny LlamaGen and its tokenizer, and a folder with their files."""
    registry_folder, checkpoints = tmp_path / "registry", tmp_path / "checkpoints"
    registry_folder.mkdir()
    checkpoints.mkdir()
    monkeypatch.setattr(registry, "folder", lambda: registry_folder)
    published.cache_clear()
    (registry_folder / "tiny.yaml").write_text(
        f"{COMMON}kind: generator\nfamily: llamagen\nrepo: a/b\nfiles: [tiny.pt]\nsize: B\noptions: {OPTIONS}\ntokenizer: tiny-vq\n"
        "sampling: {guidance_scale: 2.0, top_k: 8}\n"
    )
    (registry_folder / "tiny-vq.yaml").write_text(
        f"{COMMON}kind: tokenizer\nfamily: vq\nrepo: a/b\nfiles: [vq.pt]\noptions: {TOKENIZER}\n"
    )
    (registry_folder / "later.yaml").write_text(
        f"{COMMON}kind: generator\nfamily: unheard\nrepo: a/b\nfiles: [x.pt]\ntokenizer: tiny-vq\n"
    )
    torch.manual_seed(0)
    model = LlamaGenModel(**OPTIONS)
    torch.nn.init.normal_(model.output.weight)
    torch.save({"model": model.state_dict()}, checkpoints / "tiny.pt")
    torch.save({"model": VQModel(**TOKENIZER).state_dict()}, checkpoints / "vq.pt")
    yield checkpoints
    published.cache_clear()


def test_a_published_model_samples_with_its_papers_settings(files):
    pipe = load_published("tiny", files)
    assert pipe.config.guidance_scale == 2.0 and pipe.config.top_k == 8 and pipe.config.order == "raster"
    result = pipe(class_labels=[0, 4], seed=1)
    assert len(result.images) == 2 and result.images[0].size == (8, 8)
    assert result.stats.calls == 16 and result.stats.call_rows == 16 * 4
    zipped = pipe(class_labels=[0, 4], order="zip-2", seed=1)
    assert zipped.stats.calls < 16


def test_a_flat_file_under_another_of_its_names_loads(files):
    """FSDP training writes a flat consolidated.pth where the other sizes are a .pt with their tensors under `model`."""
    entry = registry.folder() / "tiny.yaml"
    entry.write_text(entry.read_text().replace("files: [tiny.pt]", "files: [consolidated.pth, '*.pt']"))
    state = torch.load(files / "tiny.pt", weights_only=True)["model"]
    (files / "tiny.pt").unlink()
    (files / "b").mkdir()
    torch.save(state, files / "b" / "consolidated.pth")
    model = load_published("tiny", files).model
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_generator_may_set_options_of_its_tokenizer(files):
    entry = registry.folder() / "tiny.yaml"
    entry.write_text(entry.read_text() + "tokenizer_options: {commit_loss_beta: 0.75}\n")
    assert load_published("tiny", files).tokenizer.config.commit_loss_beta == 0.75


def test_the_command_takes_published_names(files, tmp_path, capsys):
    out = tmp_path / "out.png"
    arguments = ["sample", "--model", "tiny", "--checkpoint-dir", str(files), "--device", "cpu", "--out", str(out)]
    assert main([*arguments, "--class-label", "3"]) == 0 and out.is_file()
    for wrong, words in (
        (["--class-label", "9"], "0 to 4"),
        (["--prompt", "a cat"], "no words"),
        (["--class-label", "1", "--order", "random"], "raster or zip"),
        (["--class-label", "1", "--prompt", "cat"], "not both"),
    ):
        assert main([*arguments, *wrong]) == 2
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error


def test_missing_files_and_families_are_said_in_one_sentence(files, tmp_path):
    with pytest.raises(VgenError, match=r"tiny\.pt from the hub repository a/b"):
        load_published("tiny", tmp_path)
    with pytest.raises(VgenError, match="no unheard model yet"):
        load_published("later", files)


def test_a_tokenizer_is_no_generator():
    with pytest.raises(VgenError, match="mar-kl16 is a tokenizer, expected a generator"):
        load_published("mar-kl16")


def test_every_listed_family_has_a_model_or_is_known_to_have_none():
    listed = {
        kind: {published(name).family for name in registry.names(kind=kind)} for kind in ("generator", "tokenizer")
    }
    assert listed["tokenizer"] <= set(TOKENIZERS)
    assert listed["generator"] - set(GENERATORS) == {
        "gridar"
    }  # FlexAR's control on a grid: its layout is not published


def test_names_of_every_kind_load(files, tmp_path, monkeypatch):
    """Shipped, published, a folder, and a repository of the hub (of a stand-in: nothing is downloaded here)."""
    made = vgen.load("tiny", checkpoint_dir=files)
    made.save_pretrained(tmp_path / "saved")
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or tmp_path / "saved")
    tokens = made(class_labels=1, seed=3).tokens
    for pipe in (vgen.load(tmp_path / "saved"), vgen.load("somebody/theirs")):
        assert isinstance(pipe, vgen.VisualPipeline) and torch.equal(pipe(class_labels=1, seed=3).tokens, tokens)
    for name in (tmp_path / "saved", "somebody/theirs"):
        assert isinstance(vgen.load_tokenizer(name), VQModel)
    assert asked == ["somebody/theirs"] * 2
    tokenizer = vgen.load_tokenizer("tiny-vq", checkpoint_dir=files, dtype=torch.bfloat16)
    assert not tokenizer.training and {p.dtype for p in tokenizer.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in tokenizer.parameters())


@pytest.mark.parametrize("load", [vgen.load, vgen.load_tokenizer])
def test_a_name_of_nothing_is_one_sentence_and_asks_no_network(load, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the network"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("emojo", "runs/emoji", "a/b/c", "/nowhere/at/all", "file", "", "../x/y"):
        with pytest.raises(VgenError):
            load(name)
    nearest = "emoji" if load is vgen.load else "emoji-kl"
    with pytest.raises(VgenError, match=f"did you mean '{nearest}'"):
        load(nearest + "x")


def test_one_precision_reaches_a_frozen_text_encoder(encoder_folder):  # noqa: F811
    model = LlamaGenModel(**OPTIONS, conditioning="text", caption_width=16, caption_tokens=6)
    model.read_words({"text_encoder": encoder_folder})
    pipe = VisualPipeline(VQModel(**TOKENIZER), model)

    def precisions():
        parts = (pipe.tokenizer, pipe.model, model.vocabulary.encoder)
        return [{value.dtype for value in part.state_dict().values() if value.is_floating_point()} for part in parts]

    pipe.move()
    assert precisions() == [{torch.float32}, {torch.float32}, {torch.bfloat16}]  # as published, where nothing is said
    pipe.move(dtype=torch.float64)
    assert precisions() == [{torch.float64}] * 3
    pipe.to(torch.float32)
    assert precisions() == [{torch.float32}] * 3
    pipe.to("cpu", torch.bfloat16)
    assert precisions() == [{torch.bfloat16}] * 3
    assert pipe("a red cat", order="raster", seed=1).tokens.shape == (1, 16)
    # Half precision does not hold the range of some of T5's layers: transformers keeps them, and so does vgen.
    wide = {name.split(".")[-2] for name, value in model.vocabulary.encoder.half().state_dict().items()}
    pipe.move(dtype=torch.float16)
    kept = {n.split(".")[-2] for n, v in model.vocabulary.encoder.state_dict().items() if v.dtype == torch.float32}
    assert kept == {"wo"} < wide


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": 5}, "a model is named by a text or a path, got 5"),
        ({"dtype": "fp8"}, "dtype is a torch.dtype such as torch.bfloat16, got 'fp8'"),
        ({"dtype": torch.int64}, "dtype is a torch.dtype"),
        ({"device": "gpu"}, "device is cpu, cuda, .* got 'gpu'"),
        ({"device": 1.5}, "device is cpu, cuda, .* got 1.5"),
    ],
    ids=str,
)
def test_wrong_types_are_one_sentence(arguments, message):
    for call, name in ((vgen.load, "emoji"), (vgen.load_tokenizer, "emoji-vq")):
        with pytest.raises(VgenError, match=message):
            call(**{"name": name, **arguments})
