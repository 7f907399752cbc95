"""Folders that vgen wrote open in processes that import diffusers and nothing else; what they hold besides weights."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

import vgen
from vgen.errors import VgenError
from vgen.exports import MODEL_FILE, PIPELINE_FILE
from vgen.files import MARK, atomic_folder, foreign_files
from vgen.tokenizers_vis.registry import saved_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("exports") / "emoji"
    vgen.load("emoji").save_pretrained(path)
    return path


def plain(code, folder, tmp_path):
    """What a process prints that runs `code` with a `folder` and a cache of its own; it has not imported vgen before."""
    script = "import sys\nfrom diffusers import AutoModel, DiffusionPipeline\nfolder = sys.argv[1]\n"
    script += "assert not any(name.split('.')[0] == 'vgen' for name in sys.modules)\n" + textwrap.dedent(code)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    return run.stdout.splitlines(), run.stderr


def test_plain_diffusers_opens_a_pipeline_and_makes_the_same_pictures(folder, tmp_path):
    code = """
        import torch
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float64)
        print({part.dtype for part in pipe.components.values()}, {part.training for part in pipe.components.values()})
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        made = pipe("red heart", num_inference_steps=2, seed=3)
        print(type(pipe).__name__, pipe.config.guidance_scale, made.tokens[0].tolist())
        pipe.save_pretrained("again")
        again = DiffusionPipeline.from_pretrained("again", trust_remote_code=True)
        print(again("red heart", num_inference_steps=2, seed=3).tokens[0].tolist() == made.tokens[0].tolist())
    """
    out, errors = plain(code, folder, tmp_path)
    tokens = vgen.load(folder)("red heart", num_inference_steps=2, seed=3).tokens[0].tolist()
    assert out == ["{torch.float64} {False}", f"VisualPipeline 1.5 {tokens}", "True"], errors
    assert "not expected" not in errors, "diffusers does not know an entry of the config"


def test_auto_model_opens_parts_and_never_takes_its_own_class_of_the_same_name(folder, tmp_path):
    code = """
        for place, options in ((folder + "/tokenizer", {}), (folder, {"subfolder": "tokenizer"}), (folder, {"subfolder": "model"})):
            try:
                print(type(AutoModel.from_pretrained(place, **options)).__module__)
            except Exception as error:
                print(type(error).__name__)
            print(type(AutoModel.from_pretrained(place, trust_remote_code=True, **options)).__module__)
    """
    out, errors = plain(code, folder, tmp_path)
    tokenizer, model = "vgen.tokenizers_vis.vq", "vgen.models.anyorder"
    assert out == ["ValueError", tokenizer, "ValueError", tokenizer, "ValueError", model], errors


def test_a_folder_with_gaps_is_one_sentence_through_auto_model(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    vgen.load_tokenizer(folder).save_pretrained(tmp_path / "part")
    weights = tmp_path / "part" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state.pop(next(iter(state)))
    save_file(state, weights)
    _, errors = plain("AutoModel.from_pretrained(folder, trust_remote_code=True)", tmp_path / "part", tmp_path)
    assert "VgenError" in errors and "1 missing" in errors


def test_the_code_of_a_folder_is_never_run_by_vgen(folder, tmp_path):
    vgen.load(folder).save_pretrained(tmp_path / "own")
    for path in (tmp_path / "own").rglob("*.py"):
        path.write_text("raise SystemExit('ran')")
    pipe = vgen.VisualPipeline.from_pretrained(tmp_path / "own", trust_remote_code=True)
    assert pipe.config.steps == 16 and vgen.load_tokenizer(tmp_path / "own")


def test_a_foreign_module_is_refused_before_it_is_imported(folder, tmp_path):
    vgen.load(folder).save_pretrained(tmp_path / "own")
    index = json.loads((tmp_path / "own" / "model_index.json").read_text())
    index["model"] = ["antigravity", "AnyOrderModel"]
    (tmp_path / "own" / "model_index.json").write_text(json.dumps(index))
    code = "DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)"
    out, errors = plain(
        f"try:\n    {code}\nfinally:\n    print('antigravity' in sys.modules)", tmp_path / "own", tmp_path
    )
    assert out == ["False"] and "vgen loads no code that a file names" in " ".join(errors.split())


def test_a_folder_without_these_files_still_opens(folder, tmp_path):
    """Those of vgen 0.1 name the class of the pipeline alone."""
    pipe = vgen.load(folder)
    pipe.save_pretrained(tmp_path / "old")
    for path in (tmp_path / "old").rglob("*"):
        if path.suffix in (".py", ".md") or path.name == MARK:
            path.unlink()
        elif path.suffix == ".json" and "vocabulary" not in path.name:
            config = json.loads(path.read_text())
            config.pop("auto_map")
            if isinstance(config["_class_name"], list):
                config["_class_name"] = "VisualPipeline"
            path.write_text(json.dumps(config))
    options = {"num_inference_steps": 2, "seed": 3}
    assert torch.equal(vgen.load(tmp_path / "old")("ghost", **options).tokens, pipe("ghost", **options).tokens)
    assert saved_config(tmp_path / "old") == saved_config(folder), (
        "cached tokens know the tokenizer they were made with"
    )
    assert not foreign_files(tmp_path / "old", "model")


def test_the_card_says_how_it_is_used_and_its_code_runs(folder, tmp_path):
    card = (folder / "README.md").read_text()
    front, code = card.split("---")[1], card.split("```python")[1].split("```")[0]
    assert "library_name: diffusers" in front
    out, errors = plain(code.replace('"FOLDER"', "folder") + "\nprint(image.size)", folder, tmp_path)
    assert out == ["(64, 64)"], errors
    part = (folder / "tokenizer" / "README.md").read_text().split("```python")[1].split("```")[0]
    out, errors = plain(
        part.replace('"FOLDER"', "folder + '/tokenizer'") + "\nprint(type(model).__name__)", folder, tmp_path
    )
    assert out == ["VQModel"], errors


def test_an_export_can_be_replaced_and_nothing_else_is_lost(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    (out / "README.md").write_text("my card")
    pipe = vgen.load(folder)
    pipe.save_pretrained(out)
    assert foreign_files(out, "model") == ["README.md", "mine.txt"] and (out / "README.md").read_text() == "my card"
    with pytest.raises(VgenError, match=r"mine\.txt"), atomic_folder(out):
        pass
    (out / "mine.txt").unlink()
    (out / "README.md").unlink()
    pipe.save_pretrained(out, variant="fp16")  # beside the first weights, as diffusers does
    names = {path.name for path in (out / "model").iterdir()}
    assert {
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "vocabulary.json",
    } <= names
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="2MB")
    assert len(list((tmp_path / "shards" / "model").glob("*-of-*.safetensors"))) > 1
    assert not foreign_files(out, "model") and not foreign_files(out / "model", "model")
    with atomic_folder(out) as temporary:
        pipe.tokenizer.save_pretrained(temporary)
    assert (out / f"{MODEL_FILE}.py").is_file() and not (out / f"{PIPELINE_FILE}.py").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(VgenError, match="is a file"):
        pipe.save_pretrained(tmp_path / "file")


def test_offloading_brings_each_part_when_it_works(folder, monkeypatch):
    """There is no accelerator here: the hooks are the real ones, for the CPU."""
    accelerate = pytest.importorskip("accelerate")
    pipe, moved = vgen.load(folder), []
    plain = pipe("ghost", num_inference_steps=2, seed=1).tokens
    forward = accelerate.hooks.CpuOffload.pre_forward

    def pre_forward(hook, module, *args, **kwargs):
        moved.append(type(module).__name__)
        return forward(hook, module, *args, **kwargs)

    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", pre_forward)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(pipe("ghost", num_inference_steps=2, seed=1).tokens, plain)
    assert moved == ["AnyOrderModel", "VQModel"]
    assert all(hasattr(part, "_hf_hook") for part in pipe.components.values())  # and the next call has them again


def test_every_model_of_vgen_is_exported():
    import importlib

    from diffusers import ModelMixin

    from vgen.exports import Exported
    from vgen.models.registry import GENERATORS
    from vgen.tokenizers_vis.registry import TOKENIZERS

    for module, name in (*GENERATORS.values(), *TOKENIZERS.values()):
        bases = getattr(importlib.import_module(module), name).__mro__
        assert Exported in bases and bases.index(Exported) < bases.index(ModelMixin), name
