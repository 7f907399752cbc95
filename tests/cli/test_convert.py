import os
import subprocess
import sys

import pytest
import torch

from vgen.cli.main import main
from vgen.convert import published as registry
from vgen.convert.published import published
from vgen.pipelines.visual import VisualPipeline
from vgen.tokenizers_vis.registry import open_tokenizer
from vgen.tokenizers_vis.vq import VQModel

OPTIONS = {
    "ch": 8, "encoder_ch_mult": [1, 1], "decoder_ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 8,
    "codebook_size": 32, "codebook_embed_dim": 4, "usage_window": 16, "num_groups": 4,
}  # fmt: skip
MODEL = {"grid": [4, 4], "width": 32, "depth": 1, "heads": 2, "hidden": 64, "codes": 32, "classes": 5}
COMMON = "version: 1\npaper: none\nnesting: model\ncode_licence: MIT\nweights_licence: none stated\nrepo: a/b\n"


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    from vgen.models.llama.llamagen import LlamaGenModel

    folder, files = tmp_path / "registry", tmp_path / "files"
    folder.mkdir()
    files.mkdir()
    monkeypatch.setattr(registry, "folder", lambda: folder)
    published.cache_clear()
    (folder / "tiny-vq.yaml").write_text(f"{COMMON}kind: tokenizer\nfamily: vq\nfiles: [vq.pt]\noptions: {OPTIONS}\n")
    (folder / "tiny.yaml").write_text(
        f"{COMMON}kind: generator\nfamily: llamagen\nsize: B\nfiles: [tiny.pt]\noptions: {MODEL}\ntokenizer: tiny-vq\n"
    )
    torch.manual_seed(0)
    torch.save({"model": VQModel(**OPTIONS).state_dict()}, files / "vq.pt")
    torch.save({"model": LlamaGenModel(**MODEL).state_dict()}, files / "tiny.pt")
    yield files
    published.cache_clear()


def test_a_tokenizer_and_a_pipeline(checkpoints, tmp_path, capsys):
    source = ["--checkpoint-dir", str(checkpoints)]
    assert main(["convert", "tiny-vq", *source, "--out", str(tmp_path / "vq")]) == 0
    tokenizer = open_tokenizer(tmp_path / "vq")
    assert tokenizer.spec.vocabulary == 32
    assert main(["convert", "tiny", *source, "--out", str(tmp_path / "pipe"), "--dtype", "bfloat16"]) == 0
    assert "weights none stated" in capsys.readouterr().out
    pipe = VisualPipeline.from_pretrained(tmp_path / "pipe", torch_dtype=torch.bfloat16)
    assert pipe.model.dtype == torch.bfloat16 and len(pipe(class_labels=[1], num_images_per_prompt=2).images) == 2
    assert main(["convert", "--list"]) == 0
    assert "vq.pt from the hub repository a/b" in capsys.readouterr().out


def test_bad_input_is_one_sentence_and_leaves_nothing(checkpoints, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        (["tiny-vq", "--out", str(tmp_path / "there")], "exists already"),
        (["tiny-vk", "--out", str(tmp_path / "new")], "did you mean 'tiny-vq'"),
        (["tiny"], "--out FOLDER"),
        (["tiny", "--out", str(tmp_path / "new"), "--checkpoint-dir", str(tmp_path / "empty")], "tiny.pt"),
    ):
        assert main(["convert", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error
    assert not (tmp_path / "new").exists()


def test_a_reader_that_leaves_early_is_no_error():
    read, write = os.pipe()
    os.close(read)  # gone before the first line
    command = [sys.executable, "-m", "vgen.cli.main", "convert", "--list"]
    process = subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert b"Traceback" not in process.stderr.read()
    assert process.wait() == 141
