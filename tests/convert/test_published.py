"""The registry of published checkpoints: complete, true to the models and orders, and able to say what it wants."""

import math
import re
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch

from vgen.convert import published as registry
from vgen.convert.published import find, locate, names, published
from vgen.errors import VgenError
from vgen.models.llama.llamagen import LlamaGenModel
from vgen.models.llama.nar import NARModel
from vgen.models.llama.par import PARModel
from vgen.models.mar.himar import LOW_STEPS, HiMARModel
from vgen.models.mar.mar import MARModel
from vgen.models.mar.tokenbridge import TokenBridgeModel
from vgen.models.masked.maskgen import MaskGenVQModel
from vgen.models.masked.maskgen_kl import MaskGenKLModel
from vgen.models.masked.maskgit import MaskGITUViTModel, MaskGITViTModel
from vgen.models.ming.mingunivision import MingUniVisionModel
from vgen.models.rar.rar import RARModel
from vgen.models.xar.xar import XARModel
from vgen.samplers.choice import FlowChoice, token_choice
from vgen.samplers.diffusion import GaussianDiffusion
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.orders import make_order
from vgen.tokenizers_vis.flextok.flextok import SIZES as FLEXTOK_SIZES
from vgen.tokenizers_vis.flextok.flextok import FlexTok
from vgen.tokenizers_vis.flextok.vae import SIZES as FLEXTOK_VAE_SIZES
from vgen.tokenizers_vis.flextok.vae import FlexTokVAE
from vgen.tokenizers_vis.kl import SIZES as KL_SIZES
from vgen.tokenizers_vis.kl import KLModel
from vgen.tokenizers_vis.maskgit_vqgan import SIZES as MASKGIT_SIZES
from vgen.tokenizers_vis.maskgit_vqgan import MaskGITVQGAN
from vgen.tokenizers_vis.mingtok.mingtok import SIZES as MINGTOK_SIZES
from vgen.tokenizers_vis.mingtok.mingtok import MingTok
from vgen.tokenizers_vis.titok.legacy import SIZES as TITOK_LEGACY_SIZES
from vgen.tokenizers_vis.titok.legacy import TiTokLegacy
from vgen.tokenizers_vis.titok.titok import VAE_SIZES as TITOK_VAE_SIZES
from vgen.tokenizers_vis.titok.titok import VQ_SIZES as TITOK_VQ_SIZES
from vgen.tokenizers_vis.titok.titok import TiTokVAE, TiTokVQ
from vgen.tokenizers_vis.tokenbridge import SIZES as TOKENBRIDGE_SIZES
from vgen.tokenizers_vis.tokenbridge import TokenBridge
from vgen.tokenizers_vis.vq import SIZES as VQ_SIZES
from vgen.tokenizers_vis.vq import VQModel

FAMILIES = {
    "llamagen": (LlamaGenModel, LlamaGenModel.size_config),
    "par": (PARModel, PARModel.size_config),
    "nar": (NARModel, NARModel.size_config),
    "rar": (RARModel, RARModel.size_config),
    "mar": (MARModel, MARModel.size_config),
    "himar": (HiMARModel, HiMARModel.size_config),
    "xar": (XARModel, XARModel.size_config),
    "mingunivision": (MingUniVisionModel, MingUniVisionModel.size_config),
    "maskgit_vit": (MaskGITViTModel, MaskGITViTModel.size_config),
    "maskgit_uvit": (MaskGITUViTModel, MaskGITUViTModel.size_config),
    "maskgen_vq": (MaskGenVQModel, MaskGenVQModel.size_config),
    "maskgen_kl": (MaskGenKLModel, MaskGenKLModel.size_config),
    "tokenbridge_generator": (TokenBridgeModel, TokenBridgeModel.size_config),
    "vq": (VQModel, VQ_SIZES.__getitem__),
    "maskgit_vqgan": (MaskGITVQGAN, MASKGIT_SIZES.__getitem__),
    "titok_vq": (TiTokVQ, TITOK_VQ_SIZES.__getitem__),
    "titok_vae": (TiTokVAE, TITOK_VAE_SIZES.__getitem__),
    "titok_legacy": (TiTokLegacy, TITOK_LEGACY_SIZES.__getitem__),
    "flextok": (FlexTok, FLEXTOK_SIZES.__getitem__),
    "flextok_vae": (FlexTokVAE, FLEXTOK_VAE_SIZES.__getitem__),
    "kl": (KLModel, KL_SIZES.__getitem__),
    "tokenbridge": (TokenBridge, TOKENBRIDGE_SIZES.__getitem__),
    "mingtok": (MingTok, MINGTOK_SIZES.__getitem__),
}
EXPECTED = {
    *(f"llamagen-c2i-{name}" for name in ("B-256", "B-384", "L-256", "L-384", "XL-384", "XXL-384", "3B-384")),
    *("llamagen-t2i-XL-256", "llamagen-t2i-XL-512"),
    *(f"par-{name}-384" for name in ("XL-4x", "XXL-4x", "3B-4x", "3B-16x")),
    *(f"nar-c2i-{size}-256" for size in ("B", "M", "L", "XL", "XXL")),
    *("nar-t2i-XL-256", "nar-t2i-XL-512"),
    *(f"rar-{size}-256" for size in ("B", "L", "XL", "XXL")),
    *(f"mar-{size}-256" for size in "blh"),
    *(f"himar-{size}-256" for size in "blh"),
    *(f"xar-{size}-256" for size in "blh"),
    *(f"tokenbridge-{size}-256" for size in "lh"),
    *(f"maskgit-titok-{size}" for size in ("l32", "b64", "s128")),
    *(f"maskgen-{kind}-{size}" for kind in ("vq", "kl") for size in ("L", "XL")),
}


def test_every_published_generator_has_an_entry():
    assert set(names(kind="generator")) >= EXPECTED
    assert set(names("rar")) == {f"rar-{size}-256" for size in ("B", "L", "XL", "XXL")}


@pytest.mark.parametrize("name", names())
def test_entries_hold_together(name):
    entry = published(name)
    assert entry.name == name and entry.code_licence and entry.weights_licence
    for role, part in entry.parts.items():
        assert published(part).kind == ("generator" if role == "model" else role) or part == name
    for measurement in entry.measurements:
        assert all(math.isfinite(value) for value in measurement.values.values())
    if entry.kind != "generator":
        return
    sampling = entry.sampling
    ClassifierFree(sampling.guidance_scale, sampling.guidance_schedule, sampling.guidance_power)
    token_choice(sampling.choice, sampling.temperature, sampling.top_k, sampling.top_p)
    if isinstance(sampling.substeps, int):  # of a flow
        FlowChoice(substeps=sampling.substeps)
    else:
        GaussianDiffusion.named().respaced(sampling.substeps)
    order = make_order(sampling.order, entry.grid)
    first = (
        LOW_STEPS * HiMARModel.SIZES[entry.size]["low_grid"][1] if entry.family == "himar" else 0
    )  # the small picture
    assert sampling.calls in (first + order.calls, None)
    assert any(sampling.order.startswith(kind) for kind in entry.orders)
    assert entry.options.get("grid", entry.grid) == entry.grid


@pytest.mark.parametrize("name", [name for name in names() if published(name).family in FAMILIES])
def test_sizes_have_the_published_parameter_counts(name):
    entry = published(name)
    model, size_config = FAMILIES[entry.family]
    with torch.device("meta"):
        built = model(**{**size_config(entry.size), **entry.options})
    assert sum(parameter.numel() for parameter in built.parameters()) == entry.parameters
    if entry.tokenizer:
        tokenizer = published(entry.tokenizer)
        kind, sizes = FAMILIES[tokenizer.family]
        with torch.device("meta"):
            spec = kind(**sizes(tokenizer.size)).spec
        assert spec.vocabulary == built.config.get("codes") and spec.channels == built.config.get("channels")


# ---------------------------------------------------------------- facts, as checked against their sources on 2026-11-28


@pytest.mark.parametrize(
    "pattern, field, value",
    [
        ("xar-*", "repo", "OliverRen/xAR"),
        ("maskgen-*", "repo", "fun-research/MaskGen"),
        ("llamagen-*", "weights_licence", "MIT"),
        ("flexar-*", "weights_licence", "Apache-2.0"),
        ("gridar-*", "weights_licence", "Apache-2.0"),
        ("maskgen-*", "weights_licence", "Apache-2.0; the authors add: for research purposes only"),
        ("maskgit-titok-*", "weights_licence", "Apache-2.0; the authors add: for research purposes only"),
        ("flan-t5-xl", "weights_licence", "Apache-2.0"),
        ("lumina-*", "weights_licence", "none stated"),
        ("mar-kl16", "where", "the Dropbox link in util/download.py of github.com/LTH14/mar"),
        ("nar-c2i-XXL-*", "nesting", "flat"),
        ("nar-c2i-XXL-*", "files", ["consolidated.pth", "*.pt"]),
        ("flextok-d*", "options", {"steps": 20}),
        ("flexar-*", "tokenizer_options", {"steps": 25}),
        ("gridar-*", "grid", [16, 16]),
    ],
)
def test_corrected_fields_have_their_values_and_a_source(pattern, field, value):
    entries = [published(name) for name in names() if fnmatch(name, pattern)]
    assert entries
    for entry in entries:
        assert getattr(entry, field) == value
        assert field in {**entry.sources, **entry.unverified}


@pytest.mark.parametrize(
    "name, source, values",
    [
        ("rar-B-256", "Tables 4-6", {"is": 290.5, "precision": 0.82, "recall": 0.58}),
        ("rar-L-256", "Tables 4-6", {"is": 299.5, "precision": 0.81, "recall": 0.6}),
        ("rar-XL-256", "Tables 4-6", {"is": 306.9, "precision": 0.8, "recall": 0.62}),
        ("rar-XXL-256", "Tables 4-6", {"is": 326.0, "precision": 0.8, "recall": 0.63}),
        ("mar-b-256", "Hi-MAR", {"fid": 3.48, "is": 192.4, "precision": 0.78, "recall": 0.58}),
        ("mar-l-256", "Hi-MAR", {"fid": 2.6, "is": 221.4, "precision": 0.79, "recall": 0.6}),
        ("mar-h-256", "Hi-MAR", {"fid": 2.35, "is": 227.8, "precision": 0.79, "recall": 0.62}),
        ("mar-kl16", "issue 3 of LTH14/mar", {"rfid": 0.53, "is": 210.12}),
        ("maskgen-vq-L", "paper", {"images_per_second": 30.3}),
        ("maskgen-vq-XL", "paper", {"images_per_second": 18.5}),
        ("maskgen-kl-L", "paper", {"images_per_second": 11.1}),
        ("maskgen-kl-XL", "paper", {"images_per_second": 9.1}),
        ("maskgit-titok-s128", "RAR", {"images_per_second": 7.8}),
        ("maskgit-vqgan-f16-1024", "google-research/maskgit", {"rfid": 2.28}),
        ("xar-b-256", "issue 15", {"fid": 3.11}),
        ("tokenbridge-l-256", "third party", {"precision": 0.8, "recall": 0.63}),
        ("flextok-d12-d12-in1k", "independent", {"rfid": 3.18}),
        ("flextok-d18-d18-in1k", "independent", {"rfid": 1.18}),
        ("flextok-d18-d28-in1k", "independent", {"rfid": 1.05}),
    ],
)
def test_settled_figures_are_stated_with_their_source(name, source, values):
    assert any(source in found.source and found.values == values for found in published(name).measurements)


# What people write when they did not look.
DOUBT = re.compile(
    r"recall|likely|assum|not (re-)?(verified|checked|established|seen|read|noted)|presum", re.IGNORECASE
)


@pytest.mark.parametrize("name", names())
def test_every_figure_has_a_source_and_every_doubt_is_marked(name):
    entry = published(name)
    for measurement in entry.measurements:
        assert measurement.source.strip() and measurement.values
        assert not DOUBT.search(measurement.source)
        assert not DOUBT.search(measurement.settings) or measurement.unverified
    for field in ("repo", "where", "paper", "code_licence", "weights_licence"):
        assert not DOUBT.search(getattr(entry, field) or ""), f"{field}: say so under unverified"
    assert ("not known" in entry.weights_licence) <= ("weights_licence" in entry.unverified)
    assert all(text.strip() for text in (*entry.sources.values(), *entry.unverified.values()))


def test_figures_that_may_be_wrong_say_why():
    assert "1-256" in published("flextok-d18-d28-in1k").measurements[0].unverified
    assert "not stated" in published("nar-t2i-XL-512").measurements[0].unverified
    for name in ("nar-t2i-XL-256", "nar-t2i-XL-512"):
        assert "sample_t2i_ddp.py" in published(name).unverified["sampling.top_k"]
    guided = {name: published(name).sampling.guidance_scale for name in names("lumina")}
    assert {name for name, scale in guided.items() if scale == 4} == {
        "lumina-mgpt-34B-512",
        "lumina-mgpt-7B-512",
        "lumina-mgpt-7B-1024",
    }


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(VgenError, match="did you mean 'llamagen-c2i-B-256'"):
        find("llamagen-c2i-B-265")


# ---------------------------------------------------------------- files in a folder


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


@pytest.mark.parametrize("inside", ["", "RAR/", "yucornetto/RAR/"])
def test_files_are_found_where_users_put_them(tmp_path, inside):
    model = touch(tmp_path / f"{inside}rar_b.bin")
    tokenizer = touch(tmp_path / "maskgit-vqgan-imagenet-f16-256.bin")
    assert locate("rar-B-256", tmp_path) == {"model": model, "tokenizer": tokenizer}


def test_a_file_may_have_the_name_of_the_entry(tmp_path):
    tokenizer = touch(tmp_path / "llamagen-vq16.pt")
    touch(tmp_path / "something-else.pt")
    model = touch(tmp_path / "nar-c2i-L-256.pt")
    assert locate("nar-c2i-L-256", tmp_path) == {"model": model, "tokenizer": tokenizer}


def test_a_file_of_unknown_name_is_found_in_the_folder_of_its_repository(tmp_path):
    touch(tmp_path / "vq_ds16_c2i.pt")
    model = touch(tmp_path / "NAR-imagenet-256-L" / "anything.pt")
    assert locate("nar-c2i-L-256", tmp_path)["model"] == model
    touch(tmp_path / "NAR-imagenet-256-L" / "another.pt")
    with pytest.raises(VgenError, match="2 files that could be nar-c2i-L-256"):
        locate("nar-c2i-L-256", tmp_path)


@pytest.mark.parametrize("inside", ["", "MaskGen/", "fun-research/MaskGen/"])
@pytest.mark.parametrize("kind", ["vq-L", "vq-XL", "kl-L", "kl-XL"])
def test_maskgen_is_found_beside_its_tokenizer_from_another_repository(tmp_path, inside, kind):
    model = touch(tmp_path / f"{inside}maskgen_{kind.lower().replace('-', '_')}.bin")
    names_of = {"vq": "tatitok_bl128_vq.bin", "kl": "tatitok_bl32_vae.bin"}
    tokenizer = touch(tmp_path / "TA-TiTok" / names_of[kind[:2]])
    for pattern in published("clip-vit-l-14-336").files:
        touch(tmp_path / "clip-vit-large-patch14-336" / pattern.replace("*", ""))
    found = locate(f"maskgen-{kind}", tmp_path)
    assert found["model"] == model and found["tokenizer"] == tokenizer


def test_the_first_of_several_names_is_taken(tmp_path, monkeypatch):
    touch(tmp_path / "vq_ds16_c2i.pt")
    other = touch(tmp_path / "NAR-imagenet-256-XXL" / "last_version.pt")
    assert locate("nar-c2i-XXL-256", tmp_path)["model"] == other
    wanted = touch(tmp_path / "NAR-imagenet-256-XXL" / "consolidated.pth")
    assert locate("nar-c2i-XXL-256", tmp_path)["model"] == wanted
    own = touch(tmp_path / "nar-c2i-XXL-256.pt")
    assert locate("nar-c2i-XXL-256", tmp_path)["model"] == own

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: str(tmp_path / file))
    place = wanted.parent
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, allow_patterns: str(place))
    assert locate("nar-c2i-XXL-256")["model"] == wanted
    wanted.unlink()
    assert locate("nar-c2i-XXL-256")["model"] == other
    touch(place / "another.pt")
    with pytest.raises(VgenError, match=r"2 files that fit consolidated\.pth or \*\.pt"):
        locate("nar-c2i-XXL-256")


def test_a_text_encoder_is_a_folder(tmp_path):
    for file in ("t2i_XL_stage1_256.pt", "vq_ds16_t2i.pt"):
        touch(tmp_path / file)
    with pytest.raises(VgenError, match="google/flan-t5-xl"):
        locate("llamagen-t2i-XL-256", tmp_path)
    for pattern in published("flan-t5-xl").files:
        touch(tmp_path / "flan-t5-xl" / pattern.replace("*", "x"))
    assert locate("llamagen-t2i-XL-256", tmp_path)["text_encoder"] == tmp_path / "flan-t5-xl"


def test_missing_files_are_named_with_their_sources(tmp_path):
    touch(tmp_path / "vq_ds16_c2i.pt")
    with pytest.raises(VgenError) as error:
        locate("llamagen-c2i-B-256", tmp_path)
    message = str(error.value)
    assert "c2i_B_256.pt from the hub repository FoundationVision/LlamaGen" in message and str(tmp_path) in message
    assert "vq_ds16_c2i" not in message, "what is there is not asked for"


# ---------------------------------------------------------------- downloads


def test_files_come_from_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(repo, file):
        asked.append((repo, file))
        return str(touch(tmp_path / file))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    paths = locate("rar-XL-256")
    assert asked == [("yucornetto/RAR", "rar_xl.bin"), ("fun-research/TiTok", "maskgit-vqgan-imagenet-f16-256.bin")]
    assert paths["model"] == tmp_path / "rar_xl.bin"


def test_patterns_and_folders_are_downloaded_as_snapshots(tmp_path, monkeypatch):
    def snapshot(repo, allow_patterns):
        for pattern in allow_patterns:
            touch(tmp_path / repo / pattern.replace("*", "x"))
        return str(tmp_path / repo)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: str(touch(tmp_path / file)))
    paths = locate("nar-t2i-XL-512")
    assert paths["model"] == tmp_path / "yefly/NAR-XL-t2i-stage2" / "x.pt"
    assert paths["text_encoder"] == tmp_path / "google/flan-t5-xl"


def test_without_a_network_one_error_says_what_is_wanted(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route to host\nmore lines")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(VgenError) as error:
        locate("llamagen-c2i-B-256")
    message = str(error.value)
    assert "c2i_B_256.pt" in message and "vq_ds16_c2i.pt" in message and "--checkpoint-dir" in message
    assert "no route to host" in message and "\n" not in message


def test_a_checkpoint_that_is_not_on_the_hub_says_where_it_is(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: "/")
    with pytest.raises(VgenError, match="Meta's Chameleon release"):
        locate("chameleon-vqgan")


def test_what_is_not_on_the_hub_is_not_promised_as_a_download(tmp_path):
    with pytest.raises(VgenError, match="is not on the hub; download them elsewhere and pass --checkpoint-dir"):
        locate("mar-kl16")
    with pytest.raises(VgenError, match=r"put them there$"):
        locate("mar-kl16", tmp_path)
    with pytest.raises(VgenError, match="leave --checkpoint-dir out"):
        locate("titok-l32", tmp_path)


# ---------------------------------------------------------------- broken entries


GOOD = """
version: 1
kind: tokenizer
family: vq
paper: none
repo: someone/something
files: [a.pt]
nesting: flat
code_licence: none stated
weights_licence: none stated
"""


@pytest.fixture
def entry(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "folder", lambda: tmp_path)
    published.cache_clear()
    yield lambda text: (tmp_path / "mine.yaml").write_text(text)
    published.cache_clear()


def test_a_good_entry_is_read(entry):
    entry(GOOD)
    assert names() == ["mine"] and published("mine").source == "a.pt from the hub repository someone/something"


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("nesting: flat", "nestin: flat", "nesting"),
        ("nesting: flat", "nesting: deep", "nesting is one of flat"),
        ("kind: tokenizer", "kind: tokeniser", "kind is one of"),
        ("version: 1", "version: 2", "reads version 1"),
        ("repo: someone/something", "repo: null", "repo"),
        ("code_licence: none stated", "", "code_licence must be set"),
        ("version: 1", "version: 1\nsources: {licence: the card}", "'licence' is none"),
        ("version: 1", "version: 1\nunverified: {sampling.topk: guessed}", "did you mean 'sampling.top_k'"),
    ],
)
def test_a_broken_entry_is_an_error(entry, old, new, message):
    entry(GOOD.replace(old, new))
    with pytest.raises(VgenError, match=message):
        published("mine")
