"""MAR: masks and losses of all heads, decoding in any order, known tokens, conditions, files, bad input."""

import math
from statistics import mean

import pytest
import torch

from vgen.errors import VgenError
from vgen.models.conditions.vocabulary import Vocabulary
from vgen.models.mar.backbone import mask_rate, put_rows, shown_positions, take_rows
from vgen.models.mar.heads import HEADS
from vgen.models.mar.mar import MARModel
from vgen.samplers.choice import DiffusionChoice
from vgen.samplers.decode import decode
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.orders import make_order
from vgen.samplers.settings import Sampling
from vgen.samplers.types import Canvas

SMALL = {
    "channels": 3,
    "grid": (4, 4),
    "encoder_width": 32,
    "encoder_layers": 2,
    "encoder_heads": 2,
    "decoder_width": 24,  # another one than the encoder's
    "decoder_layers": 1,
    "decoder_heads": 3,
    "buffer": 2,
    "head_width": 16,
    "head_layers": 1,
    "classes": 5,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "diffusion_batch": 2,
}


def build(spread=0.1, **changes):
    torch.manual_seed(0)
    model = MARModel(**{**SMALL, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=spread)  # zeros at the start would make comparisons trivially true
    return model.eval()


def run(model, order, scale=2.0, known=None, samples=None, labels=(0, 1, 2), given=None, settings=None):
    """The filled canvas and the state."""
    condition = model.vocabulary.labels(labels) if given is None else given
    samples = torch.arange(len(condition.mask)) if samples is None else samples
    canvas = Canvas.blank(model.grid, samples, channels=3)
    if known is not None:
        canvas.values, canvas.known = known[0].clone(), known[1].clone()
    guidance = ClassifierFree(scale, "linear-clamped")
    choice = model.choice_kind.of(settings or Sampling(substeps="ddim5"))
    state = model.start([condition, model.null(condition)][: len(guidance.rows)], canvas)
    for _ in decode(model, state, canvas, order, guidance, choice, PhiloxNoise(3, samples)):
        assert (canvas.known.sum(dim=1) == state.visible).all()
    return canvas, state


# ---------------------------------------------------------------- masks and gathers


def test_mask_rates_are_a_truncated_normal():
    rates = [mask_rate((i + 0.5) / 2000, 0.7) for i in range(2000)]
    assert mask_rate(0.0, 0.7) == 0.7 and 0.7 <= min(rates) < 0.701 and 0.999 < max(rates) < 1
    # Mean of N(1, 0.25²) cut off to [0.7, 1]: 1 - 0.25 (phi(0) - phi(1.2)) / (Phi(0) - Phi(-1.2)).
    density = (1 - math.exp(-0.72)) / math.sqrt(2 * math.pi)
    assert mean(rates) == pytest.approx(1 - 0.25 * density / (0.5 - 0.1150697), abs=1e-4)


def test_the_first_entries_of_an_order_are_masked():
    model, orders = build(), torch.stack([torch.arange(16), torch.arange(16).flip(0)])
    shown = model.draw_shown(orders, 0.75001)
    assert shown.tolist() == [[13, 14, 15], [0, 1, 2]]  # ceil(16 x 0.75001) = 13 are hidden
    assert model.draw_shown(orders, 1.0).shape == (2, 0)


def test_known_rows_are_taken_and_put_back():
    masked = torch.tensor([[True, False, True, False], [False, False, True, True]])
    shown = shown_positions(masked, 2)
    assert shown.tolist() == [[1, 3], [0, 1]]
    x = torch.randn(2, 4, 3)
    rows = take_rows(x, shown)
    assert torch.equal(rows[0], x[0, [1, 3]])
    back = put_rows(torch.zeros(2, 4, 3), shown, rows)
    assert torch.equal(back, x.masked_fill(masked[..., None], 0))


@torch.no_grad()
def test_features_read_what_is_known_and_nothing_else():
    model, tokens = build(0.3), torch.randn(2, 16, 3)
    condition = model.vocabulary.labels([1, 2])
    masked = torch.ones(2, 16, dtype=torch.bool)
    masked[0, [2, 5]] = masked[1, [0, 9]] = False
    features = model(condition, tokens, masked, 2)
    assert features.shape == (2, 16, 24)
    hidden = tokens.masked_fill(masked[..., None], float("nan"))
    assert torch.equal(features, model(condition, hidden, masked, 2))
    other = tokens.clone()
    other[0, 5] += 1
    moved = (features - model(condition, other, masked, 2)).abs().amax(dim=(1, 2))
    assert moved[0] > 1e-3 and moved[1] == 0
    alone = model(condition.take(torch.tensor([1])), tokens[1:], masked[1:], 2)
    torch.testing.assert_close(features[1:], alone, atol=1e-5, rtol=1e-5)
    nothing = torch.ones_like(masked)
    assert model(condition, tokens, nothing, 0).isfinite().all()
    assert model(condition, tokens, ~nothing, 16).isfinite().all()


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("head", HEADS)
def test_every_head_trains_every_parameter(head):
    model, tokens = build(head=head).train(), torch.randn(3, 16, 3)
    condition = model.drop(model.vocabulary.labels([0, 1, 2]), torch.tensor([0.05, 0.5, 0.9]))
    terms = model.loss(condition, tokens)
    terms["loss"].backward()
    assert terms["loss"].isfinite() and [key for key, p in model.named_parameters() if p.grad is None] == []
    assert (model.fake_latent.grad != 0).any() and (model.class_emb.weight.grad[0] == 0).all()


def test_the_loss_is_repeatable_and_of_the_masked_tokens_only():
    model, tokens = build().train(), torch.randn(3, 16, 3)
    condition = model.vocabulary.labels([0, 1, 2])
    shown = model.draw_shown(torch.rand(3, 16).argsort(dim=1), 0.7)
    assert shown.shape == (3, 4)
    draws = {"shown": shown, "times": torch.randint(1, 1000, (96,)), "noise": torch.randn(96, 3)}
    terms = model.loss(condition, tokens, **draws)
    assert terms["loss"].item() == pytest.approx((terms["mse"] + terms["bits"]).item())
    assert torch.equal(terms["loss"], model.loss(condition, tokens, **draws)["loss"])
    assert not torch.equal(terms["loss"], model.loss(condition, tokens)["loss"])
    # Rows are whole rounds over the batch: noise at a known token's rows changes nothing.
    known = torch.zeros(3, 16, dtype=torch.bool).scatter(1, shown, True).flatten().repeat(2)
    noise = torch.where(known[:, None], torch.randn(96, 3), draws["noise"])
    assert torch.equal(terms["loss"], model.loss(condition, tokens, **{**draws, "noise": noise})["loss"])


def test_gradient_checkpointing_changes_nothing():
    model, tokens = build().train(), torch.randn(3, 16, 3)
    condition = model.vocabulary.labels([0, 1, 2])
    draws = {"shown": torch.arange(4).expand(3, 4), "times": torch.full((96,), 500), "noise": torch.randn(96, 3)}
    plain = model.loss(condition, tokens, **draws)["loss"]
    model.enable_gradient_checkpointing()
    assert torch.allclose(plain, model.loss(condition, tokens, **draws)["loss"])


def test_dropout_is_for_training():
    model, tokens = build(0.3, dropout=0.5, attention_dropout=0.5), torch.randn(2, 16, 3)
    arguments = (model.vocabulary.labels([0, 1]), tokens, torch.ones(2, 16, dtype=torch.bool), 0)
    assert torch.equal(model(*arguments), model(*arguments))
    model.train()
    assert not torch.equal(model(*arguments), model(*arguments))


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("order", ["random:steps=5,schedule=mar", "raster", "regions-4", "hierarchical", "blocks-2"])
@torch.no_grad()
def test_any_order_fills_the_canvas(order):
    model = build()
    order = make_order(order, model.grid)
    model.check_order(order)
    canvas, state = run(model, order)
    assert canvas.known.all() and canvas.values.isfinite().all() and state.visible == 16
    counters = state.counters  # two guidance rows of three samples; 2 + 16 places in the decoder
    assert (counters.calls, counters.call_rows, counters.fed_tokens) == (
        order.calls,
        6 * order.calls,
        108 * order.calls,
    )


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_a_picture_depends_on_its_sample_only(head):
    model = build(head=head)
    order, settings = model.default_order(), Sampling(substeps="ddim5" if head == "diffusion" else 3)
    assert order.calls == 16
    together = run(model, order, settings=settings)[0].values
    alone = run(model, order, samples=torch.tensor([1]), labels=[1], settings=settings)[0].values
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_temperature_and_guidance_change_the_picture():
    model = build(0.3)
    order = make_order("random:steps=4,schedule=mar", model.grid)
    plain = run(model, order, 1.0)
    assert plain[1].counters.call_rows == 12  # one guidance row
    assert not torch.allclose(plain[0].values, run(model, order, 3.0)[0].values, atol=1e-3)
    cold = run(model, order, 1.0, settings=Sampling(temperature=0.0, substeps="ddim5"))[0].values
    assert not torch.allclose(plain[0].values, cold, atol=1e-3)


@torch.no_grad()
def test_known_tokens_stay_and_are_read():
    model, order = build(0.3), make_order("random:steps=3,schedule=mar", (4, 4))
    values, known = torch.randn(3, 16, 3), torch.zeros(3, 16, dtype=torch.bool)
    known[0, [1, 5, 7]] = known[1, [0, 2, 9]] = known[2, [3, 4, 5]] = True  # every sample its own
    canvas, state = run(model, order, known=(values, known))
    assert torch.equal(canvas.values[known], values[known]) and canvas.known.all() and state.counters.calls == 3
    features = []
    for start in (values, torch.where(known[..., None], values + 1, values)):
        canvas = Canvas((model.grid,), start.clone(), known.clone())
        state = model.start([model.vocabulary.labels([0, 1, 2])], canvas)
        assert state.visible == 3
        features.append(model.predict(state, next(iter(order.steps(canvas))), canvas).features)
    assert (features[0] - features[1]).abs().max() > 1e-3
    known[2, 6] = True
    with pytest.raises(VgenError, match="equally many unknown positions"):
        model.start([model.vocabulary.labels([0, 1, 2])], Canvas((model.grid,), values, known))


@torch.no_grad()
def test_predictions_are_the_forward_of_the_masked_picture():
    model = build(0.3)
    given = [model.vocabulary.labels([0, 2]), model.vocabulary.null(2)]
    canvas = Canvas.blank(model.grid, 2, channels=3)
    canvas.values[:, 4], canvas.known[:, 4] = 0.5, True
    state = model.start(given, canvas)
    step = next(iter(make_order("random-2", model.grid).steps(canvas)))
    features = model.predict(state, step, canvas).features
    for part, condition in zip(features, given):
        expected = model(condition, canvas.values, ~canvas.known, 1)[torch.arange(2)[:, None], step.targets]
        torch.testing.assert_close(part, expected)
    swapped = model.predict(model.start(given[::-1], canvas), step, canvas).features
    torch.testing.assert_close(swapped, features.flip(0))


# ---------------------------------------------------------------- conditions, files and bad input


def test_the_null_class_is_a_vector_of_its_own():
    model = build()
    (vectors,) = model.context(model.vocabulary.null(2))
    assert torch.equal(vectors, model.fake_latent.expand(2, -1))
    (vectors,) = model.context(model.vocabulary.labels([3]))
    assert torch.equal(vectors[0], model.class_emb.weight[3])


@torch.no_grad()
def test_captions_may_condition_it(tmp_path):
    vocabulary = Vocabulary.build(["red apple", "a cat on a mat"])
    model = build(0.3, conditioning="words", classes=len(vocabulary))
    model.vocabulary = vocabulary
    condition = vocabulary.captions(["red apple", "cat"])
    order = make_order("random:steps=3,schedule=mar", model.grid)
    canvas, _ = run(model, order, given=condition)
    model.save_pretrained(tmp_path)
    again = MARModel.from_pretrained(tmp_path).eval()
    assert again.vocabulary.words == vocabulary.words
    assert torch.equal(run(again, order, given=condition)[0].values, canvas.values)
    other, _ = run(model, order, given=vocabulary.captions(["mat", "cat"]))
    assert not torch.equal(other.values[0], canvas.values[0])
    torch.testing.assert_close(other.values[1], canvas.values[1])


def test_released_files_hold_two_models(tmp_path):
    model, average = build(), build(0.2)
    path = tmp_path / "checkpoint-last.pth"
    torch.save({"model": model.state_dict(), "model_ema": average.state_dict()}, path)
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    for arguments, expected in (((), average), (("model",), model)):
        loaded = MARModel.from_single_file(path, config, *arguments).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in expected.state_dict().items())
    with pytest.raises(VgenError, match="under ema"):
        MARModel.from_single_file(path, config, "ema")
    with pytest.raises(VgenError, match="does not fit"):
        MARModel.from_single_file(path, {**config, "decoder_width": 48})
    with pytest.raises(VgenError, match="does not fit"):
        MARModel.from_single_file(path, {**config, "head": "flow"})
    with pytest.raises(VgenError, match="unknown MARModel size 'XL'"):
        MARModel.from_single_file(path, "XL")


def test_bad_input_is_one_sentence():
    for changes, message in (
        ({"encoder_heads": 3}, "width 32 must be a multiple of the 3 heads"),
        ({"decoder_heads": 5}, "width 24 must be a multiple of the 5 heads"),
        ({"buffer": 0}, "at least 1 copy"),
        ({"mask_ratio_min": 1.5}, "0 to 1, got 1.5"),
        ({"head": "difusion"}, "did you mean 'diffusion'"),
        ({"conditioning": "text"}, "class or words"),
    ):
        with pytest.raises(VgenError, match=message):
            build(**changes)
    model = build()
    with pytest.raises(VgenError, match="16 tokens a picture, the canvas has 9"):
        model.start([model.vocabulary.labels([0])], Canvas.blank((1, 3, 3), 1, channels=3))
    with pytest.raises(VgenError, match="0 to 4, got 5"):
        model.vocabulary.labels([5])
    with pytest.raises(VgenError, match="16 tokens can be decoded in 1 to 16 steps, got 17"):
        make_order("random:steps=17,schedule=mar", model.grid)
    with pytest.raises(VgenError, match="confidence order needs predictions with a score"):
        run(model, make_order("confidence-4", model.grid))
    with pytest.raises(VgenError, match="no top-k"):
        model.choice_kind.of(Sampling(top_k=5))
    assert model.choice_kind is DiffusionChoice
