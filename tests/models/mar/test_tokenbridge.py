"""TokenBridge's generator: the channel head and its cache, decoding, training, files, the tokenizer's tables, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from vgen.errors import VgenError
from vgen.models.mar.tokenbridge import TokenBridgeModel
from vgen.models.mar.tokenbridge_head import ChannelHead
from vgen.pipelines.visual import VisualPipeline
from vgen.samplers.choice import TokenChoice
from vgen.samplers.decode import decode
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.orders import make_order
from vgen.samplers.types import Canvas, Step
from vgen.tokenizers_vis.kl import KLModel
from vgen.tokenizers_vis.latents.dimensionwise import DimensionwiseQuantizer, low_frequencies_first
from vgen.tokenizers_vis.tokenbridge import TokenBridge

STACK = {"width": 32, "layers": 1, "heads": 2}
OPTIONS = {
    **{f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in STACK.items()},
    **{"head_width": 24, "head_layers": 2, "head_heads": 2, "mlp_ratio": 2.0, "buffer": 3, "classes": 5},
    **{
        "channels": 3,
        "levels": 8,
        "channel_order": (2, 0, 1),
        "grid": (3, 3),
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
}
KL = {"ch": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "latent_channels": 3, "num_groups": 4}


def build(**changes):
    torch.manual_seed(0)
    model = TokenBridgeModel(**{**OPTIONS, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # zeros would make comparisons trivially true
    return model.eval()


def floats(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def levels(*shape, seed=0):
    return torch.randint(8, shape, generator=torch.Generator().manual_seed(seed))


def run(model, order="random-4", scale=2.0, samples=(0, 1, 2), choice=None, known=None):
    """The filled canvas and the state; sample i has class i."""
    samples = torch.tensor(samples)
    condition = model.vocabulary.labels(samples.tolist())
    canvas = Canvas.blank(model.grid, samples, channels=3, codes=True)
    if known is not None:
        canvas.values, canvas.known = known[0].clone(), known[1].clone()
    guidance = ClassifierFree(scale, "linear-clamped")
    state = model.start([condition, model.null(condition)][: len(guidance.rows)], canvas)
    order = make_order(order, model.grid) if isinstance(order, str) else order
    choice = choice or TokenChoice(temperature=0.9)
    for _ in decode(model, state, canvas, order, guidance, choice, PhiloxNoise(3, samples)):
        pass
    return canvas, state


# ---------------------------------------------------------------- the head


def recorded(head, features, given):
    """Logits [n, C, V] that `sample` meets when the levels [n, C] are chosen, in the tokenizer's order of channels."""
    met = {}

    def choose(place, logits):
        met[head.order[place]] = logits
        return given[:, head.order[place]]

    assert torch.equal(head.sample(features, choose), given)
    return torch.stack([met[channel] for channel in range(given.shape[1])], dim=1)


@torch.no_grad()
def test_cached_channels_equal_the_whole_pass():
    head, features, given = build().head, floats(6, 32), levels(6, 3)
    torch.testing.assert_close(recorded(head, features, given), head(features, given, sampling=True))


@torch.no_grad()
def test_training_starts_from_another_first_slot_than_sampling():
    head, features, given = build().head, floats(6, 32), levels(6, 3)
    training, sampling = head(features, given), head(features, given, sampling=True)
    assert not torch.allclose(training, sampling)
    head.timesteps_embeddings[:, 0] = 0  # what the first slot of training lacks
    torch.testing.assert_close(head(features, given), head(features, given, sampling=True))


@torch.no_grad()
def test_a_channel_sees_those_before_it_in_the_heads_order():
    head, features, given = build().head, floats(6, 32), levels(6, 3)
    before = head(features, given)
    for place, channel in enumerate(head.order):
        changed = given.clone()
        changed[:, channel] = (changed[:, channel] + 1) % 8
        after = head(features, changed)
        same = [torch.equal(before[:, other], after[:, other]) for other in head.order]
        assert same == [other <= place for other in range(3)], "itself and what came before do not change"


@torch.no_grad()
def test_channels_have_noise_of_their_own():
    model = build()
    for part in model.head.channel_heads:  # every level equally likely, whatever came before
        part.weight.zero_()
        part.bias.zero_()
    values = run(model, scale=1.0, samples=range(5))[0].values.flatten(0, 1)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        # One in eight by chance; with the same noise, all of them.
        assert (values[:, one] == values[:, other]).float().mean() < 0.25
    assert values.unique().tolist() == list(range(8))


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("order", ["random:steps=4,schedule=mar", "raster", "confidence-3", "locality-4"])
def test_any_order_fills_the_canvas(order):
    model = build()
    made = make_order(order, model.grid)
    canvas, state = run(model, made)
    assert canvas.known.all() and canvas.values.dtype == torch.int64 and canvas.values.shape == (3, 9, 3)
    assert canvas.values.min() >= 0 and canvas.values.max() < 8
    assert (state.counters.calls, state.counters.call_rows) == (made.calls, made.calls * 6)


def test_a_sample_does_not_depend_on_its_batch():
    model = build()
    together, alone = run(model)[0], run(model, samples=(1,))[0]
    assert torch.equal(together.values[1:2], alone.values)
    assert not torch.equal(together.values[0], together.values[1])


def test_greedy_is_the_likeliest_level_of_every_channel():
    model = build()
    greedy = run(model, choice=TokenChoice(temperature=0))[0].values
    assert torch.equal(greedy, run(model, choice=TokenChoice(top_k=1))[0].values), "filters work per channel"
    assert not torch.equal(greedy, run(model)[0].values)


@torch.no_grad()
def test_guidance_mixes_features_and_scores_add_up():
    model = build()
    condition = model.vocabulary.labels([0, 1])
    canvas = Canvas.blank(model.grid, 2, channels=3, codes=True)
    state = model.start([condition, model.null(condition)], canvas)
    step = Step(0, torch.tensor([4, 7]), 2, (9, 7), 2, 9)
    prediction = model.predict(state, step, canvas)
    assert prediction.features.shape == (2, 2, 2, 32)
    draw = prediction.draw(step, ClassifierFree(3.0), TokenChoice(temperature=0), PhiloxNoise(0, canvas.samples))
    cond, null = prediction.features
    logits = model.head((null + 3 * (cond - null)).flatten(0, 1), draw.values.flatten(0, 1), sampling=True)
    assert torch.equal(logits.argmax(dim=-1), draw.values.flatten(0, 1))
    expected = logits.log_softmax(dim=-1).gather(-1, draw.values.flatten(0, 1)[..., None]).sum(dim=(1, 2))
    torch.testing.assert_close(draw.score.flatten(), expected)


def test_half_precision_keeps_the_tables():
    model, shown, codes = build().train(), torch.tensor([[0, 8]] * 3), levels(3, 9, 3)
    condition = model.vocabulary.labels([0, 1, 2])
    loss = model.loss(condition, codes, shown)["loss"].item()
    assert model.to(torch.bfloat16).loss(condition, codes, shown)["loss"].item() == pytest.approx(loss, rel=0.02)
    quantizer, every = DimensionwiseQuantizer(6).to(torch.bfloat16), torch.arange(64)
    assert torch.equal(quantizer.encode(quantizer.decode(every)), every), "all levels stay apart"
    # bfloat16 rounds numbers between 2 and 4 by up to 2 ** -7; a deviation of the normal is 10 / 6 of a latent.
    exact = DimensionwiseQuantizer(6).decode(every)
    torch.testing.assert_close(quantizer.decode(every), exact, atol=2**-7 * 10 / 6, rtol=0)


def test_known_tokens_stay_and_are_read():
    model = build()
    known = torch.zeros(3, 9, dtype=torch.bool)
    known[:, :4] = True
    values = levels(3, 9, 3).masked_fill(~known[..., None], 0)
    canvas, state = run(model, "random-2", known=(values, known), choice=TokenChoice(temperature=0))
    assert torch.equal(canvas.values[:, :4], values[:, :4]) and state.visible == 9
    other = run(
        model, "random-2", known=((values + known[..., None].long()) % 8, known), choice=TokenChoice(temperature=0)
    )
    assert not torch.equal(canvas.values[:, 4:], other[0].values[:, 4:])


# ---------------------------------------------------------------- training


def test_the_loss_of_latents_is_that_of_their_levels():
    model, latents = build().train(), 2 * floats(3, 9, 3)
    condition, shown = model.vocabulary.labels([0, 1, 2]), model.draw_shown(torch.arange(9).expand(3, -1), 0.7)
    assert shown.tolist() == [[7, 8]] * 3  # ceil(9 * 0.7) = 7 are masked
    terms = model.loss(condition, latents, shown)
    again = model.loss(condition, model.quantizer.encode(latents), shown)
    assert torch.equal(terms["loss"], again["loss"]) and 0 <= terms["accuracy"] <= 1
    terms["loss"].backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == []
    model.loss(condition, latents)  # draws its own mask
    assert not torch.equal(terms["loss"], model.loss(condition, latents.roll(1, dims=0), shown)["loss"])


def test_a_fresh_model_knows_nothing():
    torch.manual_seed(0)
    model = TokenBridgeModel(**OPTIONS)
    loss = model.loss(model.vocabulary.labels([0] * 16), floats(16, 9, 3))["loss"]
    assert abs(loss.item() - math.log(8)) < 1.0
    assert model.head.channel_blocks[0].adaLN_modulation[1].weight.eq(0).all()


def test_gradient_checkpointing_changes_nothing():
    model, condition = build().train(), build().vocabulary.labels([0, 1, 2])
    shown, tokens = torch.tensor([[0, 8]] * 3), levels(3, 9, 3)
    plain = model.loss(condition, tokens, shown)["loss"]
    model.enable_gradient_checkpointing()
    assert model.head.gradient_checkpointing
    assert torch.allclose(plain, model.loss(condition, tokens, shown)["loss"])


def test_an_order_of_channels_from_data():
    rows = torch.arange(8.0)
    slow, fast = torch.cos(math.pi / 4 * rows), torch.cos(math.pi * rows)
    maps = (
        torch.stack((fast, slow, 3 * fast + slow)).view(1, 3, 1, 8).expand(4, 3, 8, 8) + 100.0
    )  # a constant says nothing
    assert low_frequencies_first(maps) == [1, 2, 0]
    assert low_frequencies_first(maps[:, :, :1]) == [1, 2, 0], "also of 1-D tokens"
    model = build()
    model.set_channel_order([1, 2, 0])
    assert model.head.order == (1, 2, 0) and model.config.channel_order == [1, 2, 0]


# ---------------------------------------------------------------- files, and the tokenizer


def released(model):
    """The state dict of a model under the released names."""
    state = {key.removeprefix("head.").removeprefix("quantizer."): value for key, value in model.state_dict().items()}
    return state | {"channel_mask": torch.zeros(3, 3)}


def test_a_released_file_has_averages_of_the_parameters_only(tmp_path):
    model = build()
    averaged = {name: value for name, value in released(model).items() if name in released_parameters(model)}
    trained = {name: value + 1 if name in averaged else value for name, value in released(model).items()}
    trained["reconstruction_values"] = trained["reconstruction_values"] + 1e-6  # a table from another machine
    torch.save({"model": trained, "model_ema": averaged, "epoch": 3, "scaler": {}}, tmp_path / "checkpoint-last.pth")
    again = TokenBridgeModel.from_single_file(tmp_path / "checkpoint-last.pth", OPTIONS)
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)
    assert torch.equal(again.quantizer.reconstruction_values, trained["reconstruction_values"])


def released_parameters(model):
    return {name.removeprefix("head.") for name, _ in model.named_parameters()}


def test_other_files_are_refused():
    state = released(build())
    with pytest.raises(VgenError, match="does not fit TokenBridgeModel"):
        TokenBridgeModel.from_original(state, {**OPTIONS, "levels": 16})
    with pytest.raises(VgenError, match="1 missing"):
        TokenBridgeModel.from_original({k: v for k, v in state.items() if k != "mask_token"}, OPTIONS)
    with pytest.raises(VgenError, match="sizes: B, L, H"):
        TokenBridgeModel.from_original(state, "XL")


def test_saved_and_loaded(tmp_path):
    model = build(conditioning="class")
    model.save_pretrained(tmp_path)
    again = TokenBridgeModel.from_pretrained(tmp_path).eval()
    assert again.head.order == (2, 0, 1)
    assert torch.equal(run(model)[0].values, run(again)[0].values)


def pipeline(bits=3, **changes):
    tokenizer = TokenBridge.quantize(KLModel(**KL).eval(), bits=bits, **changes)
    return VisualPipeline(tokenizer, build(grid=(4, 4)), order="random:steps=3,schedule=mar", temperature=0.9)


def test_a_pipeline_has_one_table(tmp_path):
    torch.manual_seed(1)
    model = build(grid=(4, 4))
    model.quantizer.reconstruction_values += 1e-6
    pipe = VisualPipeline(TokenBridge.quantize(KLModel(**KL).eval(), bits=3), model, order="random-3")
    assert torch.equal(pipe.tokenizer.quantizer.reconstruction_values, model.quantizer.reconstruction_values)
    result = pipe(class_labels=[0, 4], seed=1)
    assert result.tokens.shape == (2, 16, 3) and result.images[0].size == (8, 8)
    pipe.save_pretrained(tmp_path)
    again = VisualPipeline.from_pretrained(tmp_path)
    assert torch.equal(again(class_labels=[0, 4], seed=1).tokens, result.tokens)
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 4, 8, 8))
    kept = pipe(class_labels=0, init_image=result.images[0], mask=mask, num_inference_steps=2).tokens[0, :8]
    assert torch.equal(
        kept, pipe(class_labels=3, init_image=result.images[0], mask=mask, num_inference_steps=2, seed=9).tokens[0, :8]
    )


def test_a_tokenizer_that_reads_levels_in_another_way_is_refused():
    with pytest.raises(VgenError, match="low -4, high 5"):
        pipeline(low=-4.0)
    with pytest.raises(VgenError, match="16 levels"):
        pipeline(bits=4)
    with pytest.raises(VgenError, match="no levels"):
        VisualPipeline(KLModel(**KL), build(grid=(4, 4)))


# ---------------------------------------------------------------- bad input


def test_bad_input():
    model = build()
    condition, canvas = model.vocabulary.labels([0]), Canvas.blank(model.grid, 1, channels=3, codes=True)
    canvas.values[0, 0, 0] = 8
    with pytest.raises(VgenError, match=r"0\.\.7"):
        model.start([condition], canvas)
    with pytest.raises(VgenError, match="9 tokens of 3 channels"):
        model.start([condition], Canvas.blank(model.grid, 1, channels=4, codes=True))
    with pytest.raises(VgenError, match="must hold integers"):
        model.start([condition], Canvas.blank(model.grid, 1, channels=3))
    with pytest.raises(VgenError, match="9 tokens of 3 channels"):
        model.loss(condition, floats(1, 9, 2))
    with pytest.raises(VgenError, match="steps"):
        make_order("random:steps=10,schedule=mar", model.grid)
    with pytest.raises(VgenError, match="each of 0 to 2 once"):
        build(channel_order=(0, 1, 1))
    with pytest.raises(VgenError, match="multiple of its 5 heads"):
        ChannelHead(channels=3, levels=8, features=16, width=24, layers=1, heads=5, hidden=48, order=range(3))
    with pytest.raises(VgenError, match="2 levels"):
        DimensionwiseQuantizer(levels=1)
