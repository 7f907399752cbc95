"""VQGANs of taming-transformers: names and shapes written down from its architecture (Esser et al. 2021, appendix, table 8, and the
model.yaml files of the repository), every layer against plain functions on a state dict of those names, files and folders."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from vgen.cli.main import main
from vgen.convert.load import load_file
from vgen.errors import VgenError
from vgen.layers.taming import rename_taming, taming_facts
from vgen.tokenizers_vis.chameleon import ChameleonVQGAN
from vgen.tokenizers_vis.kl import KLModel
from vgen.tokenizers_vis.registry import open_tokenizer
from vgen.tokenizers_vis.taming_vqgan import SIZES, TamingVQGAN, config_from_yaml, config_of

# ddconfig, n_embed, embed_dim as in the model.yaml of a release; small ones have 32 channels, because GroupNorm has 32 groups.
IMAGENET = {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "resolution": 256,
            "z_channels": 256, "double_z": False}  # fmt: skip
SMALL = {"ch": 32, "ch_mult": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [8, 16], "resolution": 32,
         "z_channels": 8, "double_z": False}  # fmt: skip


def table(nets: dict, codes: int, width: int, gumbel: bool = False, vae: bool = False) -> dict[str, tuple[int, ...]]:
    """name -> shape of every tensor of a file, in the order of the original's constructor."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name, inner, outer, kernel):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outer, inner, kernel, kernel), (outer,)

    def norm(name, channels):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (channels,)

    def resnet(name, inner, outer):
        norm(f"{name}.norm1", inner)
        conv(f"{name}.conv1", inner, outer, 3)
        norm(f"{name}.norm2", outer)
        conv(f"{name}.conv2", outer, outer, 3)
        if inner != outer:
            conv(f"{name}.nin_shortcut", inner, outer, 1)

    def attention(name, channels):
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", channels, channels, 1)

    def middle(name, channels):
        resnet(f"{name}.block_1", channels, channels)
        attention(f"{name}.attn_1", channels)
        resnet(f"{name}.block_2", channels, channels)

    ch, mult, blocks, z = nets["ch"], nets["ch_mult"], nets["num_res_blocks"], nets["z_channels"]
    levels, last = len(mult), ch * mult[-1]
    features = 2 * z if nets["double_z"] else z
    attends = [nets["resolution"] // 2**level in nets["attn_resolutions"] for level in range(levels)]
    conv("encoder.conv_in", 3, ch, 3)
    inner = ch
    for level in range(levels):
        for block in range(blocks):
            resnet(f"encoder.down.{level}.block.{block}", inner, ch * mult[level])
            inner = ch * mult[level]
            if attends[level]:
                attention(f"encoder.down.{level}.attn.{block}", inner)
        if level < levels - 1:
            conv(f"encoder.down.{level}.downsample.conv", inner, inner, 3)
    middle("encoder.mid", last)
    norm("encoder.norm_out", last)
    conv("encoder.conv_out", last, features, 3)
    conv("decoder.conv_in", z, last, 3)
    middle("decoder.mid", last)
    inner = last
    for level in reversed(range(levels)):
        for block in range(blocks + 1):
            resnet(f"decoder.up.{level}.block.{block}", inner, ch * mult[level])
            inner = ch * mult[level]
            if attends[level]:
                attention(f"decoder.up.{level}.attn.{block}", inner)
        if level:
            conv(f"decoder.up.{level}.upsample.conv", inner, inner, 3)
    norm("decoder.norm_out", inner)
    conv("decoder.conv_out", inner, 3, 3)
    if gumbel:
        conv("quantize.proj", z, codes, 1)
        shapes["quantize.embed.weight"] = (codes, width)
    elif not vae:
        shapes["quantize.embedding.weight"] = (codes, width)
    conv("quant_conv", features, 2 * width if vae else width, 1)
    conv("post_quant_conv", width, z, 1)
    return shapes


def made_up(shapes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=draw) * max(1, torch.Size(shape[1:]).numel()) ** -0.5
             for name, shape in shapes.items()}  # fmt: skip
    return {name: value * 0.2 + ("norm" in name and "weight" in name) if value.dim() == 1 else value
            for name, value in state.items()}  # fmt: skip


@pytest.fixture(scope="module")
def state():
    return made_up(table(SMALL, codes=24, width=6))


@pytest.fixture(scope="module")
def model(state):
    return TamingVQGAN.from_original(state)


def pictures(height=16, width=24):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ---------------------------------------------------------------- the nets as plain functions of the original names


def conv(state, name, x, stride=1, padding=None):
    weight = state[f"{name}.weight"]
    padding = weight.shape[-1] // 2 if padding is None else padding
    return F.conv2d(x, weight, state[f"{name}.bias"], stride, padding)


def swish_norm(state, name, x):
    y = F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)
    return y * torch.sigmoid(y)


def resnet(state, name, x):
    h = conv(state, f"{name}.conv1", swish_norm(state, f"{name}.norm1", x))
    h = conv(state, f"{name}.conv2", swish_norm(state, f"{name}.norm2", h))
    return h + (conv(state, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)


def attention(state, name, x):
    y = F.group_norm(x, 32, state[f"{name}.norm.weight"], state[f"{name}.norm.bias"], 1e-6)
    query, key, value = (conv(state, f"{name}.{part}", y).flatten(2) for part in "qkv")
    out = torch.zeros_like(query)
    for picture in range(len(x)):
        for position in range(query.shape[2]):
            scores = torch.stack([query[picture, :, position] @ key[picture, :, j] for j in range(key.shape[2])])
            shares = torch.softmax(scores * x.shape[1] ** -0.5, dim=0)
            out[picture, :, position] = (value[picture] * shares).sum(dim=1)
    return x + conv(state, f"{name}.proj_out", out.view_as(x))


def level(state, name, x, blocks):
    for block in range(blocks):
        x = resnet(state, f"{name}.block.{block}", x)
        if f"{name}.attn.{block}.q.weight" in state:
            x = attention(state, f"{name}.attn.{block}", x)
    return x


def middle(state, name, x):
    x = attention(state, f"{name}.attn_1", resnet(state, f"{name}.block_1", x))
    return resnet(state, f"{name}.block_2", x)


def encoded(state, x):
    x = conv(state, "encoder.conv_in", x)
    for index in range(3):
        x = level(state, f"encoder.down.{index}", x, 1)
        if index < 2:
            x = conv(state, f"encoder.down.{index}.downsample.conv", F.pad(x, (0, 1, 0, 1)), 2, 0)
    x = middle(state, "encoder.mid", x)
    return conv(state, "quant_conv", conv(state, "encoder.conv_out", swish_norm(state, "encoder.norm_out", x)))


def decoded(state, vectors):
    x = middle(state, "decoder.mid", conv(state, "decoder.conv_in", conv(state, "post_quant_conv", vectors)))
    for index in (2, 1, 0):
        x = level(state, f"decoder.up.{index}", x, 2)
        if index:
            x = conv(state, f"decoder.up.{index}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return conv(state, "decoder.conv_out", swish_norm(state, "decoder.norm_out", x))


def test_codes_and_pictures_are_those_of_the_plain_functions(state, model):
    assert model.config.attention_levels == (1, 2) and hasattr(model.encoder.conv_blocks[1], "attn")
    features = encoded(state, pictures())
    torch.testing.assert_close(model.features(pictures()), features, atol=1e-4, rtol=1e-4)
    codebook = state["quantize.embedding.weight"]
    nearest = torch.cdist(features.permute(0, 2, 3, 1).flatten(1, 2), codebook[None]).argmin(dim=-1)
    tokens = model.encode(pictures())
    assert torch.equal(tokens, nearest) and model.spec.grid(16, 24) == (1, 4, 6)
    vectors = codebook[nearest].unflatten(1, (4, 6)).permute(0, 3, 1, 2)
    torch.testing.assert_close(model.decode(tokens, (1, 4, 6)), decoded(state, vectors), atol=1e-4, rtol=1e-4)


def test_the_attention_of_the_levels_is_in_use(state, model):
    without = {name: value * (".attn.1" in name or ".attn." not in name) for name, value in state.items()}
    other = TamingVQGAN.from_original({**state, **{n: v for n, v in without.items() if "proj_out" in n}})
    assert not torch.allclose(other.features(pictures()), model.features(pictures()), atol=1e-3)


# ---------------------------------------------------------------- published shapes, configs, names


@pytest.mark.parametrize(
    "size, nets, codes, gumbel",
    [
        ("imagenet-f16-1024", IMAGENET, 1024, False),
        ("imagenet-f16-16384", IMAGENET, 16384, False),
        ("gumbel-f8-8192", {**IMAGENET, "ch_mult": [1, 1, 2, 4], "attn_resolutions": [32]}, 8192, True),
    ],
)
def test_published_sizes_have_the_names_and_shapes_of_the_original(size, nets, codes, gumbel):
    with torch.device("meta"):
        model = TamingVQGAN.of_size(size)
        file = {name: torch.empty(shape) for name, shape in table(nets, codes, 256, gumbel).items()}
    assert "encoder.down.4.attn.0.norm.weight" in file or gumbel
    renamed = rename_taming(file, len(nets["ch_mult"]))
    assert {n: v.shape for n, v in renamed.items()} == {n: v.shape for n, v in model.state_dict().items()}
    found = config_of(file)
    assert found == {key: model.config[key] for key in found}


@pytest.mark.parametrize("gumbel", [False, True])
def test_a_yaml_and_the_names_say_the_same(tmp_path, gumbel):
    path = tmp_path / "model.yaml"
    path.write_text(
        f"model:\n  base_learning_rate: 4.5e-06\n  target: taming.models.vqgan.{'GumbelVQ' if gumbel else 'VQModel'}\n  params:\n"
        f"    embed_dim: 8\n    n_embed: 24\n    ddconfig: {SMALL}\n    lossconfig: {{target: x}}\n"
    )
    file = made_up(table(SMALL, 24, 8, gumbel))
    assert config_from_yaml(path) == config_of(file)
    one, other = TamingVQGAN.from_original(file, path), TamingVQGAN.from_original(file)
    assert dict(one.config) == dict(other.config)
    path.write_text("model: {params: {n_embed: 24}}\n")
    with pytest.raises(VgenError, match=r"no config of a VQGAN \(KeyError: 'ddconfig'\)"):
        TamingVQGAN.from_original(file, str(path))


def test_a_gumbel_quantizer_takes_the_largest_logit():
    file = made_up(table(SMALL, 24, 8, gumbel=True))
    model = TamingVQGAN.from_original(file)
    logits = conv(file, "quantize.proj", encoded(file, pictures()))
    tokens = model.encode(pictures())
    assert torch.equal(tokens, logits.argmax(dim=1).flatten(1))
    vectors = file["quantize.embed.weight"][tokens].unflatten(1, (4, 6)).permute(0, 3, 1, 2)
    torch.testing.assert_close(model.decode(tokens, (1, 4, 6)), decoded(file, vectors), atol=1e-4, rtol=1e-4)
    model.train()
    model(pictures()).reconstruction.sum().backward()
    assert model.quantize.proj.weight.grad.abs().sum() > 0 and model.encoder.conv_in.weight.grad.abs().sum() > 0


def test_double_z_is_read_where_there_is_a_codebook_and_named_where_there_is_none(state):
    doubled = {**SMALL, "double_z": True}
    model = TamingVQGAN.from_original(made_up(table(doubled, 24, 6)))
    assert model.config.double_z and model.encoder.conv_out.out_channels == 16 == model.quant_conv.in_channels
    assert model.encode(pictures()).shape == (2, 24)
    latents = made_up(table(doubled, 0, 8, vae=True))
    with pytest.raises(VgenError, match=r"no codebook: .*quant_conv\.weight.*KLModel reads"):
        TamingVQGAN.from_original(latents)
    vae = KLModel.from_original(latents, None)
    assert vae.spec.channels == 8 and vae.config.scale == 1.0 and vae.config.decoder_attention == (1, 2)
    mean = encoded(latents, pictures())[:, :8]
    torch.testing.assert_close(vae.posterior(pictures()).mean, mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vae.reconstruct(mean), decoded(latents, mean), atol=1e-4, rtol=1e-4)
    with pytest.raises(VgenError, match=r"no double_z|is no VAE"):
        KLModel.from_original(state, None)


# ---------------------------------------------------------------- files


@pytest.fixture
def lightning(tmp_path, state, monkeypatch):
    """A training checkpoint as PyTorch Lightning 1.0 wrote them: state of callbacks under their classes, optimizers, losses."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    extra = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(2)}
    content = {
        "epoch": 3,
        "pytorch-lightning_version": "1.0.8",
        "callbacks": {module.ModelCheckpoint: {"monitor": "val/rec_loss", "best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}],
        "state_dict": {**state, **extra},
    }
    path = tmp_path / "release" / "last.ckpt"
    path.parent.mkdir()
    torch.save(content, path)
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    return path


def test_a_lightning_checkpoint_its_folder_and_a_plain_file_give_the_same_model(lightning, model, state, tmp_path):
    save_file(state, tmp_path / "plain.safetensors")
    for source in (lightning, lightning.parent, str(tmp_path / "plain.safetensors")):
        found = load_file(source)
        assert type(found) is TamingVQGAN and dict(found.config) == dict(model.config)
        assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())
    (lightning.parent / "other.pt").write_bytes(b"")
    with pytest.raises(VgenError, match=r"found last\.ckpt, other\.pt; name the file"):
        load_file(lightning.parent)


def test_the_command_converts_files(lightning, model, tmp_path, capsys):
    out = tmp_path / "converted"
    assert main(["convert", str(lightning), "--out", str(out)]) == 0
    assert "TamingVQGAN" in capsys.readouterr().out
    found = open_tokenizer(out)
    assert type(found) is TamingVQGAN and torch.equal(found.encode(pictures()), model.encode(pictures()))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    assert main(["convert", str(tmp_path / "other.pt"), "--out", str(tmp_path / "more")]) == 2
    error = capsys.readouterr().err
    assert "no checkpoint of the VQGAN family" in error and not (tmp_path / "more").exists()


def test_a_vae_file_is_told_from_a_vqgan(tmp_path):
    torch.save({"state_dict": made_up(table({**SMALL, "double_z": True}, 0, 8, vae=True))}, tmp_path / "kl.ckpt")
    assert type(load_file(tmp_path / "kl.ckpt")) is KLModel


def test_chameleon_is_one_of_them():
    nets = {**SMALL, "attn_resolutions": []}
    file = made_up(table(nets, 24, 6))
    one, other = ChameleonVQGAN.from_original(file, config_of(file)), TamingVQGAN.from_original(file)
    assert type(one) is ChameleonVQGAN and other.config.attention_levels == ()
    assert torch.equal(one.encode(pictures()), other.encode(pictures()))


def test_files_of_other_kinds_are_refused(state):
    with pytest.raises(VgenError, match=r"expected encoder\.conv_in\.weight, found a"):
        taming_facts({"a": torch.zeros(1)})
    with pytest.raises(VgenError, match="levels without a gap"):
        taming_facts({name: value for name, value in state.items() if "down.1." not in name})
    with pytest.raises(VgenError, match="reads 1 channels"):
        taming_facts({**state, "encoder.conv_in.weight": torch.zeros(32, 1, 3, 3)})
    lopsided = {name: value for name, value in state.items() if "decoder.up.1.attn" not in name}
    with pytest.raises(VgenError, match="other levels in its decoder"):
        TamingVQGAN.from_original(lopsided)
    with pytest.raises(VgenError, match="does not fit TamingVQGAN"):
        TamingVQGAN.from_original(state, "imagenet-f16-1024")
    assert set(SIZES) == {"imagenet-f16-1024", "imagenet-f16-16384", "gumbel-f8-8192"}
