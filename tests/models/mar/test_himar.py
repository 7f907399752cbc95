"""Hi-MAR: both phases, pivots, the grid head around known tokens, losses, orders over levels, files, bad input."""

import pytest
import torch
from conftest import assert_same_weights

from vgen.errors import VgenError
from vgen.layers.grid_head import grid_positions
from vgen.models.conditions.vocabulary import Vocabulary
from vgen.models.mar.himar import DENSE, LOW, HiMARChoice, HiMARModel
from vgen.samplers.decode import decode
from vgen.samplers.guidance import ClassifierFree, PhaseGuidance
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.orders import make_order
from vgen.samplers.settings import Sampling
from vgen.samplers.types import Canvas

SMALL = {
    "channels": 3,
    "grid": (4, 4),
    "low_grid": (2, 2),
    "width": 32,
    "encoder_layers": 2,
    "encoder_heads": 2,
    "decoder_layers": 1,
    "decoder_heads": 4,
    "buffer": 2,
    "head_width": 16,
    "head_layers": 1,
    "grid_head_width": 16,
    "grid_head_layers": 1,
    "grid_head_heads": 2,
    "classes": 5,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "diffusion_batch": 2,
}
QUICK = Sampling(substeps="ddim5", low_substeps="ddim4")
LABELS = (0, 1, 2)


def build(spread=0.1, **changes):
    torch.manual_seed(0)
    model = HiMARModel(**{**SMALL, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=spread)  # zeros at the start would make comparisons trivially true
    return model.eval()


def blank(model, samples, known=None):
    canvas = Canvas.blank(model.grids, samples, channels=3)
    if known is not None:
        canvas.values, canvas.known = known[0].clone(), known[1].clone()
    return canvas


def run(model, dense="random:steps=3,schedule=mar", scales=(2.0, 3.0), known=None, samples=None, given=None, **options):
    """The filled canvas and the state."""
    condition = model.vocabulary.labels(LABELS) if given is None else given
    samples = torch.arange(len(condition.mask)) if samples is None else samples
    canvas = blank(model, samples, known)
    order = model.over_levels(make_order(dense, model.grid), **options)
    model.check_order(order)
    guidance = PhaseGuidance(tuple(ClassifierFree(scale, "linear-clamped") for scale in scales))
    state = model.start([condition, model.null(condition)][: len(guidance.rows)], canvas)
    choice = model.choice_kind.of(QUICK)
    for _ in decode(model, state, canvas, order, guidance, choice, PhiloxNoise(3, samples)):
        counts = [canvas.part(level).known.sum(dim=1) for level in (LOW, DENSE)]
        assert (counts[LOW] == state.visible_low).all() and (counts[DENSE] == state.visible).all()
    return canvas, state


# ---------------------------------------------------------------- the network


def test_blocks_start_plain():
    model = HiMARModel(**SMALL)
    block = model.encoder_blocks[0]
    x, vector = torch.randn(2, 5, 32), torch.randn(128)
    plain = x + block.attn(block.norm1(x))
    assert torch.allclose(block(x, vector, DENSE), plain + block.mlp(block.norm2(plain)))
    with torch.no_grad():
        block.adaLN_scale[DENSE] = 1.0
    assert torch.allclose(block(x, vector, LOW), plain + block.mlp(block.norm2(plain)))
    assert not torch.allclose(block(x, vector, DENSE), block(x, vector, LOW))


def test_columns_come_first_in_the_heads_positions():
    table = grid_positions((2, 3), 8).view(2, 3, 8)
    assert torch.equal(table[0, 1, :4], table[1, 1, :4]) and not torch.equal(table[0, 1, :4], table[0, 2, :4])
    assert torch.equal(table[1, 0, 4:], table[1, 2, 4:]) and not torch.equal(table[0, 0, 4:], table[1, 0, 4:])
    angle = torch.tensor([1.0, 0.01])  # of column 1: periods 1 and 10000 ** (1/2)
    assert torch.allclose(table[0, 1, :4], torch.cat((angle.sin(), angle.cos())))


@torch.no_grad()
def test_features_read_what_is_known_and_nothing_else():
    model, x = build(0.3), torch.randn(2, 20, 32)
    condition = model.vocabulary.labels([1, 2])
    masked = torch.ones(2, 20, dtype=torch.bool)
    masked[:, [0, 3, 9]] = False  # low-resolution ones are the first 4
    for phase in (LOW, DENSE):
        features = model(condition, phase, x, masked, 3)
        assert features.shape == (2, 20, 32)
        hidden = x.masked_fill(masked[..., None], float("nan"))
        assert torch.equal(features, model(condition, phase, hidden, masked, 3))
        assert not torch.allclose(features, model(condition, phase, x.flip(-1), masked, 3), atol=1e-3)
        assert not torch.allclose(features, model(condition, 1 - phase, x, masked, 3), atol=1e-3)


@torch.no_grad()
def test_phases_see_their_own_tokens():
    model, tokens, low = build(0.3), torch.randn(2, 16, 3), torch.randn(2, 4, 3)
    context, states = model.context(model.vocabulary.labels([1, 2])), torch.randn(2, 4, 32)
    low_masked, masked = torch.arange(4).expand(2, 4) >= 2, torch.arange(16).expand(2, 16) >= 5
    features = model.low_features(context, low, low_masked, 2)
    x = torch.cat((model.cond_proj(low), torch.randn(2, 16, 32)), dim=1)
    everything = torch.cat((low_masked, torch.ones_like(masked)), dim=1)
    assert features.shape == (2, 20, 32) and torch.equal(features, model.run(context, LOW, x, everything, 2))
    features = model.dense_features(context, states, tokens, masked, 5)
    x = torch.cat((states, model.z_proj(tokens)), dim=1)
    everything = torch.cat((torch.zeros_like(low_masked), masked), dim=1)
    assert torch.equal(features, model.run(context, DENSE, x, everything, 9)[:, 4:])


# ---------------------------------------------------------------- training


def draws(model, batch=3):
    torch.manual_seed(1)
    return {
        "low_shown": model.draw_shown(torch.rand(batch, 4).argsort(dim=1), 0.7),
        "shown": model.draw_shown(torch.rand(batch, 16).argsort(dim=1), 0.5),
        "drops": torch.tensor([[0.05, 0.5, 0.9], [0.5, 0.05, 0.9]]),
        "steered": torch.tensor([True, False, True]),
        "low_times": torch.randint(1, 1000, (2 * batch * 4,)),
        "low_noise": torch.randn(2 * batch * 4, 3),
        "times": torch.randint(1000, (2 * batch,)),
        "noise": torch.randn(2 * batch, 16, 3),
    }


def test_one_step_trains_every_parameter():
    model, tokens, low = build().train(), torch.randn(3, 16, 3), torch.randn(3, 4, 3)
    terms = model.loss(model.vocabulary.labels(LABELS), tokens, low, **draws(model))
    terms["loss"].backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    assert (model.cond_tokens.grad != 0).any() and (model.cond_z_proj.weight.grad != 0).any()
    assert model.loss(model.vocabulary.labels(LABELS), tokens, low)["loss"].isfinite()  # all draws its own


def test_the_loss_is_the_released_sum_and_repeatable():
    model, tokens, low = build().train(), torch.randn(3, 16, 3), torch.randn(3, 4, 3)
    given = draws(model)
    terms = model.loss(model.vocabulary.labels(LABELS), tokens, low, **given)
    masked_share = 1 - given["shown"].shape[1] / 16
    expected = 0.4 * (terms["low_mse"] + terms["low_bits"]) + 0.6 * terms["dense_mse"] * masked_share
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(terms["loss"], model.loss(model.vocabulary.labels(LABELS), tokens, low, **given)["loss"])


def test_phases_drop_conditions_of_their_own():
    model, tokens, low = build(0.3).train(), torch.randn(3, 16, 3), torch.randn(3, 4, 3)
    given, seen = draws(model), []
    context = model.context
    model.context = lambda condition: seen.append(condition.ids.flatten().tolist()) or context(condition)
    model.loss(model.vocabulary.labels(LABELS), tokens, low, **given)
    assert seen == [[5, 1, 2], [0, 5, 2]]  # 5: no class; a tenth is dropped


def test_pivots_are_shown_to_some_and_train_the_second_phase_only():
    model = build(0.3, pivot_rate=0.5)
    uniform = torch.tensor([0.2, 0.5, 0.51, 0.8])
    assert model.steered(uniform).tolist() == [False, False, True, True]
    assert model.steered(uniform, 0.5).tolist() == [False, False, False, True]
    states = torch.randn(1, 4, 32, requires_grad=True)
    made = torch.tensor([[True, False, True, False]])
    pivots = model.embed_pivots(states, made)
    assert torch.equal(pivots[made], model.cond_z_proj(states)[made])
    assert torch.equal(pivots[~made], model.cond_proj(model.cond_tokens)[~made])
    tokens, low, given = torch.randn(3, 16, 3), torch.randn(3, 4, 3), draws(model)
    grads = []
    for steered in (True, False):
        model.zero_grad()
        terms = model.loss(
            model.vocabulary.labels(LABELS), tokens, low, **{**given, "steered": torch.full((3,), steered)}
        )
        terms["loss"].backward()
        grads.append(
            (terms["loss"].item(), model.cond_z_proj.weight.grad.abs().sum(), model.diffloss.net.input_proj.weight.grad)
        )
    assert grads[0][0] != grads[1][0] and grads[0][1] > 0 and grads[1][1] == 0
    assert torch.equal(grads[0][2], grads[1][2])  # what the second phase sees does not train the first


def test_shares_of_masked_dense_tokens():
    cosine, normal = build(), build(dense_masks="normal")
    assert cosine.dense_rate(0.0) == 1 and cosine.dense_rate(2 / 3) == pytest.approx(0.5)
    assert normal.dense_rate(0.0) == 0.38 and 0.9 < normal.dense_rate(0.9) < 1


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("order", ["random:steps=5,schedule=mar", "raster", "neighbor", "blocks-2"])
@torch.no_grad()
def test_any_order_of_the_dense_level(order):
    model = build()
    canvas, state = run(model, order)
    calls = 4 + make_order(order, model.grid).calls
    assert canvas.known.all() and canvas.values.isfinite().all()
    counters = state.counters  # two guidance rows of three samples; 2 + 4 + 16 places in the decoder, in either phase
    assert (counters.calls, counters.call_rows, counters.fed_tokens) == (calls, 6 * calls, 6 * 22 * calls)


@torch.no_grad()
def test_a_picture_depends_on_its_sample_only():
    model = build()
    together = run(model)[0].values
    alone = run(model, samples=torch.tensor([1]), given=model.vocabulary.labels([1]))[0].values
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_phases_have_guidance_and_steps_of_their_own():
    model = build(0.3)
    plain, guided = run(model)[0], run(model, scales=(2.0, 1.0))[0]
    low = torch.equal(plain.part(LOW).values, guided.part(LOW).values)
    assert low and not torch.allclose(plain.part(DENSE).values, guided.part(DENSE).values, atol=1e-3)
    assert run(model, scales=(1.0, 1.0))[1].counters.call_rows == 3 * 7  # no guidance at all: one row
    assert run(model, low_steps=2)[1].counters.calls == 5
    phases = [step.phase for step in model.over_levels(make_order("raster", model.grid)).steps(blank(model, 1))]
    assert phases == [LOW] * 4 + [DENSE] * 16


@torch.no_grad()
def test_pivots_are_the_conditional_states_of_the_moment():
    model = build(0.3)
    condition = model.vocabulary.labels(LABELS)
    canvas = blank(model, 3)
    order = model.over_levels(make_order("raster", model.grid), low_steps=2)
    state = model.start([condition, model.null(condition)], canvas)
    steps = list(order.steps(canvas))
    for step in steps[:2]:
        prediction = model.predict(state, step, canvas)
        places = step.targets.expand(3, -1)[..., None].expand(-1, -1, 32)
        for rows in state.pivots.chunk(2):
            assert torch.equal(rows.gather(1, places), prediction.features[0])
        canvas.write(step.targets, torch.randn(3, step.size, 3), None, step.keep)
        model.commit(state, step, canvas)
    features = model.predict(state, steps[2], canvas).features
    canvas.values[:, :4] += 1  # the second phase sees pivots, not tokens
    assert torch.equal(features, model.predict(state, steps[2], canvas).features)
    state.pivots = state.pivots.flip(1)
    assert not torch.allclose(features, model.predict(state, steps[2], canvas).features, atol=1e-3)


@torch.no_grad()
def test_the_grid_head_keeps_known_tokens_and_reads_them():
    model = build(0.5)
    values, known = torch.randn(3, 20, 3), torch.zeros(3, 20, dtype=torch.bool)
    known[:, :4] = True
    known[0, [5, 9]] = known[1, [4, 6]] = known[2, [18, 19]] = True  # every sample its own
    canvas, state = run(model, "random:steps=1,schedule=mar", known=(values, known))
    assert torch.equal(canvas.values[known], values[known]) and canvas.known.all() and state.counters.calls == 1
    assert (
        not state.pivots.any() and state.given.all()
    )  # given tokens have no states: the learned table stands for them
    moved = torch.where(known[..., None], values + 1, values)
    other, _ = run(model, "random:steps=1,schedule=mar", known=(moved, known))
    assert (other.values - canvas.values)[~known].abs().max() > 1e-3
    known[2, 7] = True
    with pytest.raises(VgenError, match="equally many unknown positions"):
        model.start([model.vocabulary.labels(LABELS)], blank(model, 3, (values, known)))


# ---------------------------------------------------------------- files and bad input


@torch.no_grad()
def test_captions_may_condition_it(tmp_path):
    vocabulary = Vocabulary.build(["red apple", "a cat on a mat"])
    model = build(0.3, conditioning="words", classes=len(vocabulary))
    model.vocabulary = vocabulary
    condition = vocabulary.captions(["red apple", "cat"])
    canvas, _ = run(model, given=condition)
    model.save_pretrained(tmp_path)
    again = HiMARModel.from_pretrained(tmp_path).eval()
    assert again.vocabulary.words == vocabulary.words and again.grids == model.grids
    assert_same_weights(again, model)
    torch.testing.assert_close(run(again, given=condition)[0].values, canvas.values, rtol=1e-4, atol=1e-4)
    other, _ = run(model, given=vocabulary.captions(["mat", "cat"]))
    assert not torch.equal(other.values[0], canvas.values[0])
    torch.testing.assert_close(other.values[1], canvas.values[1])


def test_released_files_hold_two_models(tmp_path):
    model, average = build(), build(0.2)
    path = tmp_path / "checkpoint-last.pth"
    torch.save({"model": model.state_dict(), "model_ema": average.state_dict()}, path)
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    loaded = HiMARModel.from_single_file(path, config).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in average.state_dict().items())
    with pytest.raises(VgenError, match="does not fit HiMARModel"):
        HiMARModel.from_single_file(path, {**config, "low_grid": (3, 3)})
    with pytest.raises(VgenError, match="unknown HiMARModel size 'XL'"):
        HiMARModel.from_single_file(path, "XL")


def test_substeps_have_released_defaults():
    low, dense = HiMARChoice.of(Sampling(temperature=0.9)).phases
    assert (low.substeps, dense.substeps, low.temperature, dense.temperature) == ("100", "250", 0.9, 0.9)
    low, dense = HiMARChoice.of(QUICK).phases
    assert (low.substeps, dense.substeps) == ("ddim4", "ddim5")


def test_bad_input_is_one_sentence():
    for changes, message in (
        ({"encoder_heads": 3}, "width 32 must be a multiple of the 3 heads"),
        ({"grid_head_width": 18}, "multiple of 4 and of its 2 heads, got 18"),
        ({"grid_head_heads": 3}, "multiple of 4 and of its 3 heads, got 16"),
        ({"grid": (2, 4, 4)}, "makes one picture"),
        ({"dense_masks": "linear"}, "cosine or normal, got 'linear'"),
        ({"buffer": 0}, "at least 1 copy"),
        ({"conditioning": "text"}, "class or words"),
    ):
        with pytest.raises(VgenError, match=message):
            build(**changes)
    model = build()
    condition = model.vocabulary.labels([0])
    with pytest.raises(VgenError, match="a canvas of the levels"):
        model.start([condition], Canvas.blank(model.grid, 1, channels=3))
    with pytest.raises(VgenError, match="4 tokens can be decoded in 1 to 4 steps, got 5"):
        model.over_levels(make_order("raster", model.grid), low_steps=5)
    with pytest.raises(VgenError, match="16 tokens can be decoded in 1 to 16 steps, got 17"):
        make_order("random:steps=17,schedule=mar", model.grid)
    with pytest.raises(VgenError, match="a small grid and then a dense one"):
        model.check_order(make_order("raster", model.grid))
    order = model.over_levels(make_order("raster", (2, 4)))
    with pytest.raises(VgenError, match="other levels"):
        model.check_order(order)
    with pytest.raises(VgenError, match="1x2x2 and 1x2x4, the canvas has 1x2x2 and 1x4x4"):
        next(iter(order.steps(blank(model, 1))))
    with pytest.raises(VgenError, match="needs predictions with a score"):
        run(model, "confidence-4")


def test_the_second_phase_does_not_train_the_first():
    """Parameters that the first phase alone reads get no gradient from the loss of the dense tokens, through pivots or otherwise."""
    model, tokens, low = build(0.3).train(), torch.randn(3, 16, 3), torch.randn(3, 4, 3)
    zero = torch.zeros(())
    model.diffloss.loss = lambda *_: {"loss": zero, "mse": zero, "bits": zero}
    given = {**draws(model), "steered": torch.ones(3, dtype=torch.bool)}
    model.loss(model.vocabulary.labels(LABELS), tokens, low, **given)["loss"].backward()
    for block in (*model.encoder_blocks, *model.decoder_blocks):
        assert not block.adaLN_scale.grad[LOW].any() and not block.adaLN_shift.grad[LOW].any()
        assert block.adaLN_shift.grad[DENSE].any()
    assert model.cond_z_proj.weight.grad.any(), "the pivots were seen"


@torch.no_grad()
def test_the_second_phase_sees_the_table_where_low_tokens_were_given():
    """Given low-resolution tokens have no states of the first phase: the learned table stands for them, pivots for the others."""
    model = build(0.3)
    condition, canvas = model.vocabulary.labels([1]), blank(model, 1)
    canvas.values[:, [1, 2]], canvas.known[:, [1, 2]] = torch.randn(1, 2, 3), True
    order = model.over_levels(make_order("raster", model.grid), low_steps=1)
    state = model.start([condition], canvas)
    first, second = list(order.steps(canvas))[:2]
    states = model.predict(state, first, canvas).features[0]  # [1, 2, 32], in the order of the targets
    canvas.write(first.targets, torch.randn(1, 2, 3), None, 2)
    model.commit(state, first, canvas)
    pivots = model.cond_proj(model.cond_tokens).clone()
    for place, row in zip(first.targets.flatten().tolist(), states[0]):
        assert place in (0, 3)
        pivots[0, place] = model.cond_z_proj(row)
    expected = model.dense_features(
        model.context(condition), pivots, canvas.values[:, 4:], torch.ones(1, 16, dtype=torch.bool), 0
    )
    torch.testing.assert_close(model.predict(state, second, canvas).features[0], expected)
