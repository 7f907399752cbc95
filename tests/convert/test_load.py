"""From a published name to pictures, with tiny entries and files made here."""

import pytest
import torch

from vgen.cli.main import main
from vgen.convert import published as registry
from vgen.convert.load import load_published
from vgen.convert.published import published
from vgen.errors import VgenError
from vgen.models.llama.llamagen import LlamaGenModel
from vgen.models.registry import GENERATORS
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
