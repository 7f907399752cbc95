"""Saved folders: whole, of the right class, without gaps; and the pipeline's folder around them."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from vgen.errors import VgenError
from vgen.pipelines.components import MOVED, ROLES, component_modules
from vgen.pipelines.visual import Sampler, VisualPipeline
from vgen.saved import has_model, open_saved, read_json, weight_files
from vgen.tokenizers_vis.registry import open_tokenizer
from vgen.tokenizers_vis.vq import VQModel

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def pipeline(pipeline_folder, tmp_path):
    return shutil.copytree(pipeline_folder, tmp_path / "pipe")


def change(path, **fields):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **fields}))


def rewrite(path, act):
    state = load_file(path)
    path.unlink()  # the file is mapped: writing into it would change the tensors that are being written
    save_file(act(state), path)


def halves(folder, names, index=None):
    """The weights of a folder in two shards with an index, as `save_pretrained(max_shard_size=…)` leaves them."""
    state = load_file(folder / FILE)
    (folder / FILE).unlink()
    keys = sorted(state)
    parts = (keys[::2], keys[1::2])
    for name, part in zip(names, parts):
        save_file({key: state[key].clone() for key in part}, folder / name)
    table = {key: name for name, part in zip(names, parts) for key in part}
    (folder / (index or f"{FILE}.index.json")).write_text(json.dumps({"metadata": {}, "weight_map": table}))


SHARDS = ("diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors")
HALF = ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "diffusion_pytorch_model.fp16-00002-of-00002.safetensors")  # fmt: skip


@pytest.mark.parametrize(
    "arrange",
    [
        lambda folder: halves(folder, SHARDS),
        lambda folder: halves(folder, HALF, f"{FILE}.index.fp16.json"),
        lambda folder: (folder / FILE).rename(folder / "diffusion_pytorch_model.fp16.safetensors"),
    ],
    ids=["shards", "shards of a variant", "variant"],
)
def test_shards_and_variants_open_as_the_whole(pipeline, arrange):
    wanted = VQModel.from_pretrained(pipeline / "tokenizer").state_dict()
    arrange(pipeline / "tokenizer")
    assert has_model(pipeline / "tokenizer")
    for opened in (open_tokenizer(pipeline), VisualPipeline.from_pretrained(pipeline).tokenizer):
        found = opened.state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_of_several_variants_one_must_be_named(pipeline):
    folder = pipeline / "tokenizer"
    shutil.copy(folder / FILE, folder / "diffusion_pytorch_model.fp16.safetensors")
    assert weight_files(folder) == ([folder / FILE], None)
    assert weight_files(folder, "fp16")[0][0].name == "diffusion_pytorch_model.fp16.safetensors"
    (folder / FILE).rename(folder / "diffusion_pytorch_model.ema.safetensors")
    with pytest.raises(VgenError, match=r"ema.safetensors, .*fp16.safetensors; name one"):
        open_tokenizer(pipeline)
    assert isinstance(open_saved(VQModel, folder, variant="ema"), VQModel)


BROKEN = {
    "index gone": (lambda p: (p / "model_index.json").unlink(), "has no model_index.json"),
    "index no JSON": (lambda p: (p / "model_index.json").write_text("{"), "model_index.json is not a JSON file"),
    "index a list": (lambda p: (p / "model_index.json").write_text("[]"), "holds a JSON list, expected an object"),
    "index not text": (lambda p: (p / "model_index.json").write_bytes(b"\xff\xfe"), "is not a JSON file"),
    "another pipeline": (lambda p: change(p / "model_index.json", _class_name="DDPMPipeline"), "describes a DDPMPipeline"),
    "no model": (lambda p: change(p / "model_index.json", model=None), "names no model as \\[module, class\\]"),
    "foreign module": (lambda p: change(p / "model_index.json", model=["surely.foreign", "Model"]), "no code that a file names"),
    "other class": (lambda p: change(p / "model_index.json", model=["vgen.models.anyorder", "NewModel"]), "no model NewModel"),
    "a name of the module": (lambda p: change(p / "model_index.json", model=["vgen.models.anyorder", "ModelMixin"]), "no model"),
    "newer setting": (lambda p: change(p / "model_index.json", sharpness=2), "settings sharpness, which this vgen does not"),
    "no folder": (lambda p: shutil.rmtree(p / "model"), "there is no folder .*/model"),
    "config gone": (lambda p: (p / "model" / "config.json").unlink(), "has no config.json"),
    "config no JSON": (lambda p: (p / "model" / "config.json").write_text("width: 3"), "config.json is not a JSON file"),
    "config of another": (lambda p: shutil.copy(p / "tokenizer" / "config.json", p / "model"), "holds a VQModel, expected AnyOrderModel"),
    "newer field": (lambda p: change(p / "model" / "config.json", gates=3), "config.json has gates, which this vgen's"),
    "wrong value": (lambda p: change(p / "model" / "config.json", width="wide"), "cannot be opened as AnyOrderModel"),
    "wrong size": (lambda p: change(p / "model" / "config.json", hidden=32), "cannot be opened as AnyOrderModel"),
    "weights gone": (lambda p: (p / "model" / FILE).unlink(), f"no weights: {FILE} is missing"),
    "weights empty": (lambda p: (p / "model" / FILE).write_bytes(b""), r"safetensors \(0 bytes\) is not a complete"),
    "weights cut": (lambda p: (p / "model" / FILE).write_bytes((p / "model" / FILE).read_bytes()[:-64]), "not a complete"),
    "weights of another": (lambda p: shutil.copy(p / "tokenizer" / FILE, p / "model" / FILE), "(do not fit|cannot be opened)"),
    "shard gone": (lambda p: (halves(p / "model", SHARDS), (p / "model" / SHARDS[1]).unlink()), f"lacks {SHARDS[1]}"),
    "index of shards broken": (lambda p: (halves(p / "model", SHARDS), (p / "model" / f"{FILE}.index.json").write_text("{}")), "names no shards"),
    "words gone": (lambda p: (p / "model" / "vocabulary.json").unlink(), "vocabulary.json"),
    "words broken": (lambda p: (p / "model" / "vocabulary.json").write_text("{"), "vocabulary.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pipeline_is_one_sentence(name, pipeline):
    act, words = BROKEN[name]
    act(pipeline)
    with pytest.raises(VgenError, match=words) as found:
        VisualPipeline.from_pretrained(pipeline)
    assert "\n" not in str(found.value)


def test_gaps_in_the_weights_are_no_warning(pipeline):
    path = pipeline / "tokenizer" / FILE
    key = sorted(load_file(path))[0]
    rewrite(path, lambda state: {name: value for name, value in state.items() if name != key})
    with pytest.raises(VgenError, match=rf"expected \d+ tensors, found \d+: 1 missing \({key}\)"):
        open_tokenizer(pipeline)
    rewrite(path, lambda state: {**state, key: torch.zeros(3), "stray": torch.zeros(1)})
    with pytest.raises(VgenError, match=r"(cannot be opened|1 unexpected)"):
        open_tokenizer(pipeline)


def test_names_that_are_no_folder(tmp_path, monkeypatch):
    import huggingface_hub

    with pytest.raises(VgenError, match="nothing/here/at/all does not exist; give the folder of a pipeline"):
        VisualPipeline.from_pretrained("nothing/here/at/all")
    (tmp_path / "weights.pt").touch()
    with pytest.raises(VgenError, match=r"weights\.pt is a file"):
        VisualPipeline.from_pretrained(tmp_path / "weights.pt")

    def offline(name, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(VgenError, match=r"no folder owner/name here, and the hub .*no network"):
        VisualPipeline.from_pretrained("owner/name")


def test_a_repository_of_the_hub(pipeline_folder, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: (asked.append((name, options["revision"])), pipeline_folder)[1]
    )  # fmt: skip
    pipe = VisualPipeline.from_pretrained("owner/name", revision="v2", guidance_scale=1.25)
    assert asked == [("owner/name", "v2")] and pipe.config.guidance_scale == 1.25


def test_dtypes_reach_the_parts(pipeline_folder):
    pipe = VisualPipeline.from_pretrained(pipeline_folder, torch_dtype=torch.bfloat16)
    assert pipe.model.dtype == pipe.tokenizer.dtype == torch.bfloat16
    pipe = VisualPipeline.from_pretrained(
        pipeline_folder, torch_dtype={"model": torch.bfloat16, "default": torch.float32}
    )
    assert pipe.model.dtype == torch.bfloat16 and pipe.tokenizer.dtype == torch.float32


def test_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')  # a byte-order mark, as editors of Windows leave
    assert read_json(path) == {"a": 1}
    with pytest.raises(VgenError, match=r"a\.json/b\.json: Not a directory"):
        read_json(path / "b.json")


@pytest.mark.parametrize("words", [[], ["--model", "FOLDER"]])
def test_sampling_imports_only_what_it_needs(words, pipeline_folder, tmp_path):
    words = [str(pipeline_folder) if word == "FOLDER" else word for word in words]
    words += [
        "--prompt",
        "cat" if words else "red heart",
        "--steps",
        "2",
        "--order",
        "random",
        "--out",
        "a.png",
        "--device",
        "cpu",
    ]
    code = f"""
import sys
from vgen.cli.main import main
assert main(["sample", *{words!r}]) == 0
print("modules", *sys.modules)
"""
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True).stdout
    found = set(printed.partition("modules ")[2].split())
    assert component_modules() & found == {"vgen.models.anyorder", "vgen.tokenizers_vis.vq"}
    heavy = {"diffusers.pipelines.pipeline_utils", "diffusers.models.autoencoders", "torchvision.transforms.v2"}
    assert not heavy & found


def test_where_moved_modules_lie_is_known():
    assert set(MOVED.values()) <= component_modules() and not set(MOVED) & component_modules()


def test_both_doors_open_the_same(pipeline_folder):
    sampler, pipe = Sampler.open(pipeline_folder), VisualPipeline.open(pipeline_folder)
    assert isinstance(pipe, Sampler) and not isinstance(sampler, VisualPipeline)
    settings = {key: value for key, value in pipe.config.items() if not key.startswith("_") and key not in ROLES}
    assert settings == {key: value for key, value in sampler.config.items() if not key.startswith("_")}
    made = [one(["cat"], num_images_per_prompt=2, seed=5) for one in (sampler, pipe)]
    assert torch.equal(made[0].tokens, made[1].tokens) and not sampler.model.training
    assert [image.tobytes() for image in made[0].images] == [image.tobytes() for image in made[1].images]
