"""FlexTok: round trips with any number of tokens, files and their facts, saved folders, bad input."""

import json

import pytest
import torch
from safetensors.torch import save_file

from vgen.errors import VgenError
from vgen.eval.reconstruction import joined, reconstruct_batches
from vgen.samplers.flow import FlowGuidance
from vgen.samplers.noise import PhiloxNoise
from vgen.tokenizers_vis.base import check_tokens
from vgen.tokenizers_vis.flextok.files import file_facts
from vgen.tokenizers_vis.flextok.flextok import SIZES, FlexTok, token_counts
from vgen.tokenizers_vis.flextok.nets import Attention, FlexTokEncoder, norm
from vgen.tokenizers_vis.flextok.training import KEEP, FlexTokObjective
from vgen.tokenizers_vis.flextok.vae import FlexTokVAE, modern_names

TINY_VAE = {"latent_channels": 4, "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
TINY = {
    "vae_options": TINY_VAE,
    "encoder_width": 32,
    "encoder_depth": 2,
    "decoder_width": 48,
    "decoder_depth": 2,
    "head_dim": 16,
    "max_grid": (3, 3),
    "registers": 6,
    "levels": (5, 4, 3),
    "frequencies": 16,
    "steps": 2,
}


def tiny(**changes) -> FlexTok:
    torch.manual_seed(0)
    model = FlexTok(**{**TINY, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("vae"):
                parameter.normal_(
                    std=0.3
                )  # heads and modulations start at zero: every comparison would be trivially true
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_round_trip(model, pixels):
    tokens = model.encode(pixels)
    assert tokens.shape == (2, 6) and tokens.dtype == torch.int64
    check_tokens(tokens, model.spec.vocabulary)
    assert model.spec.grid(12, 12) == (1, 1, 6) and model.spec.vocabulary == 60
    assert model.decode(tokens).shape == pixels.shape
    assert torch.equal(model.decode(tokens), model.decode(tokens, grid=(1, 1, 6))), "the noise is fixed"


def test_a_picture_comes_back_the_same_in_any_batch(model):
    pixels = torch.rand(5, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def back(batch_size):
        return joined(list(reconstruct_batches(model, pixels, 3, batch_size=batch_size))).reconstruction

    alone = back(1)
    assert torch.equal(back(2), alone) and torch.equal(back(5), alone)
    same = joined(list(reconstruct_batches(model, pixels[:1].expand(2, -1, -1, -1), 3))).reconstruction
    assert not torch.equal(same[0], same[1]), "the noise belongs to the number of the picture"


def test_the_posterior_is_sampled_when_noise_is_given(model, pixels):
    noise = torch.randn(2, 4, 6, 6) * 30
    assert not torch.equal(model.encode(pixels, noise), model.encode(pixels))
    assert torch.equal(model.encode(pixels, torch.zeros_like(noise)), model.encode(pixels))


def test_dropped_tokens_do_not_matter_and_kept_ones_do(model, pixels):
    tokens = model.encode(pixels)
    changed = tokens.clone()
    changed[:, 3:] = (changed[:, 3:] + 7) % 60
    short = model.decode(tokens[:, :3])
    assert torch.equal(short, model.decode(tokens, num_tokens=3))
    assert torch.equal(short, model.decode(changed, num_tokens=[3, 3]))
    assert not torch.allclose(model.decode(tokens), model.decode(changed))
    assert not torch.allclose(model.decode(tokens, num_tokens=4), model.decode(changed, num_tokens=4))


def test_samples_do_not_depend_on_the_batch(model, pixels):
    tokens = model.encode(pixels)
    keep = torch.tensor([2, 5])
    noise = PhiloxNoise(3, torch.tensor([7, 9]))
    both = model.decode(tokens, num_tokens=keep, noise=noise)
    alone = model.decode(tokens[1:], num_tokens=keep[1:], noise=PhiloxNoise(3, torch.tensor([9])))
    assert torch.allclose(both[1:], alone, atol=1e-5)
    assert not torch.allclose(both[1:], model.decode(tokens[1:], num_tokens=keep[1:]), atol=1e-2)
    assert torch.allclose(model.encode(pixels[1:]), model.encode(pixels)[1:])


def test_guidance_and_steps(model, pixels):
    tokens = model.encode(pixels)
    plain = model.decode(tokens, guidance=1.0)
    assert torch.allclose(plain, model.decode(tokens, guidance=FlowGuidance(1.0)))
    assert torch.allclose(plain, model.decode(tokens, guidance=FlowGuidance(lambda t: 1.0)), atol=1e-5)
    assert not torch.allclose(plain, model.decode(tokens))
    assert not torch.allclose(plain, model.decode(tokens, guidance=1.0, steps=3))


def test_reconstruct_starts_every_count_from_one_noise(model, pixels):
    made = model.reconstruct(pixels, steps=1, guidance=1.0)
    assert made.shape == (4, *pixels.shape) and token_counts(6) == [1, 2, 4, 6] and token_counts(1) == [1]
    assert torch.allclose(made[2], model.decode(model.encode(pixels), num_tokens=4, steps=1, guidance=1.0), atol=1e-6)


def test_smaller_pictures_use_the_corner_of_the_table(model):
    small = torch.rand(1, 3, 8, 4) * 2 - 1
    tokens = model.encode(small)
    assert tokens.shape == (1, 6) and model.decode(tokens, size=(8, 4)).shape == small.shape


def test_pixels_without_a_vae():
    model = tiny(vae_family=None, vae_options=None, patch_size=4)
    pixels = torch.rand(1, 3, 12, 12) * 2 - 1
    assert model.decode(model.encode(pixels)).shape == pixels.shape and model.latents(pixels) is pixels


def test_any_kl_tokenizer_is_a_latent_space(pixels):
    kl = {
        "ch": 8,
        "ch_mult": [1, 1],
        "num_res_blocks": 1,
        "latent_channels": 4,
        "num_groups": 4,
        "encoder_attention": [],
    }
    model = tiny(vae_family="kl", vae_options=kl)
    assert model.decode(model.encode(pixels)).shape == pixels.shape


def test_attention_is_scaled_by_eight_over_the_head_size():
    layer, x = Attention(32, 16), torch.randn(1, 5, 32)
    query, key, value = (part(x).unflatten(-1, (2, 16)).transpose(1, 2) for part in (layer.wq, layer.wk, layer.wv))
    weights = (norm(query) @ norm(key).mT * 8 / 16).softmax(dim=-1)
    assert torch.allclose(layer(x), layer.proj((weights @ value).transpose(1, 2).flatten(2)), atol=1e-5)


def test_encoder_mask_is_a_prefix_lm():
    mask = FlexTokEncoder.mask(2, 3)
    assert mask.int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("name", KEEP)
def test_numbers_of_kept_tokens(name):
    kept = KEEP[name](torch.rand(4000), 16)
    allowed = set(range(1, 17)) if name == "uniform" else {1, 2, 4, 8, 16}
    assert set(kept.tolist()) == allowed
    assert set(KEEP[name](torch.tensor([0.0, 1 - 2**-24]), 16).tolist()) == {1, 16}


def test_every_part_learns():
    objective = FlexTokObjective(tiny(), teacher_width=5, alignment_hidden=8).train()
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 6, 6)
    terms = objective(
        latents,
        noise,
        torch.rand(3),
        torch.tensor([1, 6, 2]),
        torch.tensor([True, False, False]),
        torch.randn(3, 5, 5, 5),
    )
    terms["loss"].backward()
    assert terms["tokens"].shape == (3, 6)
    assert terms["loss"].item() == pytest.approx((terms["flow"] + terms["alignment"]).item(), rel=1e-5)
    still = [n for n, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert still == []


def test_fresh_weights_predict_nothing():
    decoder = FlexTok(**TINY).decoder
    codes = torch.rand(1, 6, 3)
    velocity, _ = decoder(torch.randn(1, 4, 6, 6), torch.rand(1), decoder.registers(codes))
    assert not velocity.any(), "the head starts at zero"


def test_gradient_checkpointing_changes_nothing(model):
    objective = FlexTokObjective(tiny()).train()
    arguments = (
        torch.randn(1, 4, 6, 6),
        torch.randn(1, 4, 6, 6),
        torch.rand(1),
        torch.tensor([3]),
        torch.tensor([False]),
    )
    plain = objective(*arguments)["loss"]
    objective.encoder.gradient_checkpointing = objective.decoder.gradient_checkpointing = True
    checkpointed = objective(*arguments)["loss"]
    checkpointed.backward()
    assert torch.equal(plain, checkpointed)


# ---------------------------------------------------------------- files


def test_saved_and_loaded(model, pixels, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = FlexTok.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(pixels), model.encode(pixels))
    assert torch.equal(loaded.decode(loaded.encode(pixels)), model.decode(model.encode(pixels)))


def write(path, model, metadata):
    save_file({key: value.clone() for key, value in model.state_dict().items()}, path, metadata)


def test_a_file_tells_how_time_is_scaled(model, pixels, tmp_path):
    path = tmp_path / "model.safetensors"
    decoder = "{'module_dict': {'dec_time_embedder': {'_target_': 'x.Y', 'max_timestep': 1000.0, 'drop': None}}}"
    write(path, model, {"decoder": decoder, "vae": "{scaling_factor: 0.5, other: None}", "regularizer": "no: [yaml"})
    assert file_facts(path) == {"max_time": 1000.0, "scale": 0.5}
    loaded = FlexTok.from_original(path, TINY)
    assert loaded.config.max_time == 1000.0 and loaded.vae.config.scale == 0.5
    assert FlexTok.from_original(path, {**TINY, "max_time": 1.0}).config.max_time == 1.0  # what is said wins


def test_a_file_that_does_not_tell_is_refused_unless_config_json_does(model, tmp_path):
    path = tmp_path / "model.safetensors"
    write(path, model, None)
    with pytest.raises(VgenError, match="max_timestep"):
        FlexTok.from_original(path, TINY)
    content = {"config": {"decoder": {"time": {"max_timestep": 1.0}}, "regularizer": {"levels": [5, 4, 3]}}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert FlexTok.from_original(path, TINY).config.max_time == 1.0


def test_extra_and_wrong_keys(model):
    state = dict(model.state_dict())
    state["decoder.module_dict.dec_repa_mlp.weight"] = torch.zeros(1)
    FlexTok.from_original(state, TINY)
    state["encoder.module_dict.other"] = torch.zeros(1)
    with pytest.raises(VgenError, match="1 unexpected"):
        FlexTok.from_original(state, TINY)
    with pytest.raises(VgenError, match="does not fit FlexTok"):
        FlexTok.from_original(model.state_dict(), {**TINY, "decoder_depth": 3})


# ---------------------------------------------------------------- bad input


def tokens_of(count, value=0):
    return torch.full((2, count), value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.encode(torch.zeros(1, 3, 12, 10)), "multiples of 4, got 12x10"),
        (lambda m: m.encode(torch.zeros(1, 3, 16, 12)), "up to 12x12"),
        (lambda m: m.decode(tokens_of(7)), "1 to 6 tokens a picture.*got .2, 7."),
        (lambda m: m.decode(tokens_of(0)), "1 to 6 tokens a picture.*got .2, 0."),
        (lambda m: m.decode(torch.zeros(2, 3, 4)), r"\[B, k\], got \[2, 3, 4\]"),
        (lambda m: m.decode(tokens_of(4, 60)), r"0\.\.59"),
        (lambda m: m.decode(tokens_of(4), num_tokens=5), r"num_tokens must lie in 1\.\.4.*got 5"),
        (lambda m: m.decode(tokens_of(4), num_tokens=0), r"num_tokens must lie in 1\.\.4.*got 0"),
        (lambda m: m.decode(tokens_of(4), num_tokens=[1, 2, 3]), "one for each of the 2 pictures"),
        (lambda m: m.decode(tokens_of(4), steps=0), "at least 1 step"),
        (lambda m: m.decode(tokens_of(4), guidance=-2.0), "guidance scale"),
        (lambda m: m.decode(tokens_of(4), noise=torch.zeros(2, 4, 5, 5)), r"shape \[2, 4, 6, 6\]"),
        (lambda m: m.decode(tokens_of(4), noise=PhiloxNoise(0, torch.arange(3))), "for 3 pictures, got tokens of 2"),
        (lambda m: m.decode(tokens_of(4), size=(12, 13)), "multiples of 4"),
        (lambda m: FlexTok.of_size("d12-d21"), "did you mean 'd12-d12'"),
        (lambda m: FlexTok(**{**TINY, "head_dim": 12}), "multiple of the head size 12"),
        (lambda m: FlexTok(**{**TINY, "vae_family": "klx"}), "did you mean 'kl'"),
        (lambda m: FlexTok(**{**TINY, "vae_family": "vq", "vae_options": None}), "vq is none"),
    ],
)
def test_bad_input(model, call, words):
    with pytest.raises(VgenError, match=words) as error:
        call(model)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the VAE alone


def test_vae_is_a_continuous_tokenizer(tmp_path):
    vae = FlexTokVAE(**TINY_VAE, scale=0.5).eval()
    pixels = torch.rand(2, 3, 8, 12) * 2 - 1
    tokens = vae.encode(pixels)
    assert tokens.shape == (2, 24, 4) and vae.spec.grid(8, 12) == (1, 4, 6)
    assert vae.decode(tokens, (1, 4, 6)).shape == pixels.shape
    assert not torch.allclose(vae.encode(pixels, torch.ones_like(tokens)), tokens)
    with pytest.raises(VgenError, match="multiple of 2"):
        vae.encode(pixels[..., 1:])
    vae.save_pretrained(tmp_path)
    assert torch.equal(FlexTokVAE.from_pretrained(tmp_path).encode(pixels), tokens)


def test_vae_files_old_and_new(tmp_path):
    vae = FlexTokVAE(**TINY_VAE).eval()
    state = vae.vae.state_dict()
    old = {}
    for key, value in state.items():
        for new, ancient in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f".{new}." in key:
                key = key.replace(new, ancient)
                value = value[..., None, None] if value.dim() == 2 else value
        old[key] = value
    assert old.keys() != state.keys() and modern_names(old).keys() == state.keys()
    loaded = FlexTokVAE.from_original(old, TINY_VAE)
    pixels = torch.rand(1, 3, 8, 8)
    assert torch.equal(loaded.encode(pixels), vae.encode(pixels))
    vae.vae.save_pretrained(tmp_path)
    opened = FlexTokVAE.from_autoencoder(tmp_path, scale=0.88)
    assert torch.equal(opened.encode(pixels), vae.encode(pixels))
    with pytest.raises(VgenError, match="did you mean 'c16'"):
        FlexTokVAE.of_size("c6")


def test_sizes_can_be_built():
    for size in SIZES:
        with torch.device("meta"):
            model = FlexTok.of_size(size)
        assert model.spec.grid(*model.size) == (1, 1, model.config.registers)


# ---------------------------------------------------------------- pictures that are not square


def by_hand(model, pixels):
    """The encoder on one picture, patch by patch, with positions gathered one by one from the table of the largest grid."""
    latent = model.latents(pixels)[0]
    patch, parts = model.config.patch_size, model.encoder.module_dict
    rows, columns = latent.shape[1] // patch, latent.shape[2] // patch
    table, project = parts["enc_posemb_module"].posembs, parts["enc_patch_emb"].patch_proj
    sequence = []
    for i in range(rows):
        for j in range(columns):
            square = latent[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            sequence.append(project(square.permute(1, 2, 0).flatten()) + table[0, :, i, j])
    x = torch.stack([*sequence, *parts["enc_register_module"].registers])[None]
    count, total = rows * columns, x.shape[1]
    sees = torch.zeros(total, total, dtype=torch.bool)
    for query in range(total):
        for key in range(total):
            sees[query, key] = key < count or (query >= count and key <= query)
    for block in parts["enc_transformer"].blocks:
        x = block(x, sees)
    return model.quantizer.quantize(parts["enc_to_latents"].proj(norm(x[:, count:])))[1]


@pytest.mark.parametrize("size", [(4, 12), (12, 8), (8, 4), (12, 12)])
def test_any_multiples_of_the_patch_are_coded_as_a_straightforward_computation_does(model, size):
    pixels = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    tokens = model.encode(pixels)
    assert tokens.shape == (1, 6) and torch.equal(tokens, by_hand(model, pixels))
    assert model.decode(tokens, size=size).shape == pixels.shape
    assert model.spec.grid(*size) == (1, 1, 6) and model.spec.size_options(*size) == {"size": size}


def test_a_turned_picture_has_other_tokens(model):
    """Rows and columns have tables of their own: swapping them would go unnoticed with squares."""
    pixels = torch.rand(4, 3, 4, 12, generator=torch.Generator().manual_seed(4)) * 2 - 1
    assert not torch.equal(model.encode(pixels), model.encode(pixels.mT))


def test_the_size_of_the_largest_picture_changes_nothing_of_a_square(model, pixels):
    tokens = model.encode(pixels)
    assert torch.equal(model.decode(tokens), model.decode(tokens, size=(12, 12)))


@pytest.mark.parametrize("size", [(4, 13), (6, 12), (16, 8), (0, 12)])
def test_sizes_without_positions_are_refused(model, size):
    with pytest.raises(VgenError, match=r"up to 12x12 .* multiples of 4, got"):
        model.spec.grid(*size)
    with pytest.raises(VgenError, match="multiples of 4"):
        model.decode(torch.zeros(1, 6, dtype=torch.long), size=size)


def test_pictures_that_are_not_square_through_the_figures():
    model = tiny(max_grid=(4, 5))
    pixels = torch.rand(3, 3, 12, 20, generator=torch.Generator().manual_seed(5)) * 2 - 1
    found = joined(list(reconstruct_batches(model, pixels, 4, batch_size=2)))
    assert found.reconstruction.shape == pixels.shape
    made = model.decode(model.encode(pixels[:2]), num_tokens=4, size=(12, 20))
    torch.testing.assert_close(found.reconstruction[:2], made.clamp(-1, 1))
