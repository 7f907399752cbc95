"""Masked generators: masks and losses, decoding in any order, known tokens, files, bad input (MaskGIT, MaskGen-VQ, MaskGen-KL)."""

from types import SimpleNamespace

import pytest
import torch

from vgen.errors import VgenError
from vgen.models.conditions.vocabulary import Vocabulary
from vgen.models.masked.base import MASK_SCHEDULES, draw_mask, mask_share, masked_token_loss
from vgen.models.masked.maskgen import MaskGenVQModel
from vgen.models.masked.maskgen_kl import MaskGenKLModel
from vgen.models.masked.maskgit import MaskGITUViTModel, MaskGITViTModel
from vgen.samplers.choice import DiffusionChoice, token_choice
from vgen.samplers.decode import decode
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.orders import make_order
from vgen.samplers.types import Canvas, Condition

SMALL = {"grid": (1, 1, 10), "width": 32, "layers": 2, "heads": 4}
CODES = {"codes": 19, "hidden": 48, "classes": 5, **SMALL}
TEXT = {"text_width": 12, "micro_width": 8, **SMALL}
BUILD = {
    "vit": lambda **changes: MaskGITViTModel(**{**CODES, **changes}),
    "uvit": lambda **changes: MaskGITUViTModel(**{**CODES, **changes}),
    "vq": lambda **changes: MaskGenVQModel(**{"codes": 19, "spare_rows": 3, **TEXT, **changes}),
    "kl": lambda **changes: MaskGenKLModel(**{"channels": 4, "head_width": 16, "head_layers": 1, **TEXT, **changes}),
}


def build(name, **changes):
    torch.manual_seed(0)
    model = BUILD[name](**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)  # zeros at the start would make comparisons trivially true
    return model.eval()


def captions(seed, batch=3, score=6.0):
    """CLIP features of made-up captions."""
    draw = torch.Generator().manual_seed(seed)
    extras = {"text": torch.randn(batch, 6, 12, generator=draw), "pooled": torch.randn(batch, 12, generator=draw)}
    extras["aesthetic"] = torch.full((batch,), score)
    return Condition(torch.empty(batch, 0, dtype=torch.long), torch.ones(batch, 6, dtype=torch.bool), extras)


def conditions(model, batch=3):
    if hasattr(model.config, "classes"):
        condition = model.vocabulary.labels(list(range(batch)))
        return [condition, model.null(condition)]
    return [captions(1, batch), captions(2, batch)]


def run(model, order, scale=2.0, known=None, samples=None, given=None):
    """The filled canvas and the state."""
    given = conditions(model) if given is None else given
    samples = torch.arange(len(given[0].mask)) if samples is None else samples
    channels = model.config.get("channels")
    canvas = Canvas.blank(model.grid, samples, channels=channels)
    if known is not None:
        canvas.values, canvas.known = known[0].clone(), known[1].clone()
    guidance = ClassifierFree(scale)
    choice = token_choice("maskgit", 1.0) if channels is None else DiffusionChoice(substeps="ddim5")
    state = model.start(given[: len(guidance.rows)], canvas)
    for _ in decode(model, state, canvas, order, guidance, choice, PhiloxNoise(3, samples)):
        pass
    return canvas, state


# ---------------------------------------------------------------- training


def test_mask_shares_run_from_everything_to_almost_nothing():
    t = torch.linspace(0, 1, 11)
    for name in MASK_SCHEDULES:
        share = mask_share(t, name)
        assert share[0] == 1 and share[-1] == pytest.approx(1e-6) and (share.diff() <= 0).all()
    with pytest.raises(VgenError, match="did you mean 'arccos'"):
        mask_share(t, "arcos")


def test_masks_have_the_drawn_size_and_at_least_one_token():
    permutation = torch.rand(4, 10).argsort(dim=1)
    masked = draw_mask(torch.tensor([0.0, 0.5, 0.999999, 0.3]), permutation, "linear")
    assert masked.sum(dim=1).tolist() == [10, 5, 1, 7]
    assert torch.equal(masked[1], permutation[1] < 5)


def test_the_loss_weighs_masked_tokens():
    logits, tokens = torch.zeros(1, 4, 8), torch.arange(4)[None]
    logits[0, 0, 0] = 100.0  # certain and right, and not masked
    masked = torch.tensor([[False, True, True, True]])
    terms = masked_token_loss(logits, tokens, masked, unmasked_weight=0.5, label_smoothing=0.0)
    assert terms["loss"].item() == pytest.approx(3 * torch.tensor(8.0).log().item() / 3.5)
    assert terms["accuracy"] == 0  # of the masked ones the first code is always the guess


@pytest.mark.parametrize("name", ["vit", "uvit", "vq"])
def test_a_fresh_model_knows_nothing_and_trains_every_parameter(name):
    torch.manual_seed(0)
    model, tokens = BUILD[name](), torch.randint(19, (3, 10))
    condition = conditions(model)[0]
    draws = {"uniform": torch.tensor([0.1, 0.5, 0.7]), "permutation": torch.rand(3, 10).argsort(dim=1)}
    assert abs(model.eval().loss(condition, tokens, **draws)["loss"] - torch.tensor(19.0).log()) < 0.3
    first, again = (model.loss(condition, tokens, **draws)["loss"] for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, model.loss(condition, tokens)["loss"])
    model = build(name).train()
    model.loss(condition, tokens, **draws)["loss"].backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_the_continuous_loss_is_repeatable_and_trains_every_parameter():
    model, tokens = build("kl").train(), torch.randn(3, 10, 4)
    condition = conditions(model)[0]
    draws = {
        "uniform": torch.tensor([0.5]),
        "orders": torch.rand(3, 10).argsort(dim=1),
        "timesteps": torch.randint(1000, (120,)),
        "noise": torch.randn(120, 4),
    }
    masked = model.draw_mask(draws["uniform"], draws["orders"])
    assert masked.sum(dim=1).tolist() == [7, 7, 7]  # ceil(10 acos(1/2) / (pi/2)), the same in every sample
    terms = model.loss(condition, tokens, **draws)
    assert torch.equal(terms["loss"], model.loss(condition, tokens, **draws)["loss"])
    assert terms["loss"].item() == pytest.approx((terms["mse"] + terms["bits"]).item())
    # Known tokens are not part of it, but what the masked ones are predicted from.
    hidden = torch.where(masked[..., None], tokens, torch.zeros_like(tokens))
    assert not torch.allclose(terms["loss"], model.loss(condition, hidden, **draws)["loss"])
    terms["loss"].backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_gradient_checkpointing_changes_nothing():
    for name in ("vit", "uvit", "vq"):
        model = build(name, **({"dropout": 0.0, "attention_dropout": 0.0} if name == "vit" else {})).train()
        tokens, condition = torch.randint(19, (3, 10)), conditions(model)[0]
        draws = {"uniform": torch.tensor([0.1, 0.5, 0.7]), "permutation": torch.rand(3, 10).argsort(dim=1)}
        plain = model.loss(condition, tokens, **draws)["loss"]
        model.enable_gradient_checkpointing()
        assert torch.allclose(plain, model.loss(condition, tokens, **draws)["loss"])


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("order", ["confidence-4", "random-3", "raster"])
@torch.no_grad()
def test_any_order_fills_the_canvas(name, order):
    model = build(name)
    if name == "kl" and order.startswith("confidence"):
        with pytest.raises(VgenError, match="a confidence order needs predictions with a score"):
            run(model, make_order(order, model.grid))
        return
    order = make_order(order, model.grid)
    model.check_order(order)
    canvas, state = run(model, order)
    assert canvas.known.all()
    counters = state.counters
    assert (counters.calls, counters.call_rows, counters.fed_tokens) == (order.calls, 6 * order.calls, 60 * order.calls)


@pytest.mark.parametrize("name", BUILD)
@torch.no_grad()
def test_a_picture_depends_on_its_sample_only(name):
    model = build(name)
    order = make_order("random-3" if name == "kl" else "confidence-4", model.grid)
    together = run(model, order)[0].values
    alone = run(model, order, samples=torch.tensor([1]), given=[c.take(torch.tensor([1])) for c in conditions(model)])[
        0
    ]
    torch.testing.assert_close(together[1:2], alone.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", BUILD)
@torch.no_grad()
def test_known_tokens_stay_and_are_read(name):
    model = build(name)
    continuous = name == "kl"
    order = make_order("random-3" if continuous else "confidence-3", model.grid)
    values = torch.randn(3, 10, 4) if continuous else torch.randint(19, (3, 10))
    known = torch.zeros(3, 10, dtype=torch.bool)
    known[0, [1, 5, 7]] = known[1, [0, 2, 9]] = known[2, [3, 4, 5]] = True  # every sample its own
    canvas, state = run(model, order, known=(values, known))
    assert torch.equal(canvas.values[known], values[known]) and canvas.known.all()
    assert state.counters.calls == 3
    other = values.clone()
    other[known] = (other[known] + 1) if continuous else (other[known] + 1) % 19
    said = []
    for start in (values, other):
        canvas = Canvas((model.grid,), start.clone(), known.clone())
        prediction = model.predict(model.start(conditions(model), canvas), next(iter(order.steps(canvas))), canvas)
        said.append(prediction.features if continuous else prediction.logits)
    assert (said[0] - said[1]).abs().max() > 1e-3


@torch.no_grad()
def test_predictions_are_the_forward_of_the_masked_picture():
    model = build("vit")
    canvas = Canvas.blank(model.grid, 2)
    canvas.values[:, 4], canvas.known[:, 4] = 7, True
    given = [c.take(torch.tensor([0, 2])) for c in conditions(model)]
    state = model.start(given, canvas)
    step = next(iter(make_order("random-2", model.grid).steps(canvas)))
    logits = model.predict(state, step, canvas).logits
    ids = torch.full((2, 10), 19)
    ids[:, 4] = 7
    for part, condition in zip(logits, given):
        expected = model(condition, ids)[torch.arange(2)[:, None], step.targets]
        torch.testing.assert_close(part, expected)
    swapped = model.predict(model.start(given[::-1], canvas), step, canvas).logits
    torch.testing.assert_close(swapped, logits.flip(0))


@torch.no_grad()
def test_more_calls_than_tokens_decide_the_last_token_again_and_again():
    model = build("vit")
    order = make_order("confidence", model.grid, steps=14, schedule="maskgit")
    known = []
    canvas = Canvas.blank(model.grid, 3)
    state = model.start(conditions(model), canvas)
    noise = PhiloxNoise(0, canvas.samples)
    for step, _ in decode(model, state, canvas, order, ClassifierFree(2.0), token_choice("maskgit", 1.0), noise):
        known.append(canvas.known.sum(dim=1).tolist())
        assert step.size >= 1
    assert len(known) == 14 and known[8:] == [[9] * 3] * 5 + [[10] * 3]


# ---------------------------------------------------------------- conditions


def test_captions_may_condition_maskgit():
    vocabulary = Vocabulary.build(["red apple", "a cat on a mat"])
    model = build("uvit", conditioning="words", classes=len(vocabulary))
    model.vocabulary = vocabulary
    condition = vocabulary.captions(["red apple", "cat"])
    with torch.no_grad():
        canvas, _ = run(model, make_order("confidence-4", model.grid), given=[condition, model.null(condition)])
        ids = torch.full((2, 10), 19)
        apple, mat = model(condition, ids), model(vocabulary.captions(["mat", "cat"]), ids)
    assert canvas.known.all() and torch.equal(apple[1], mat[1]) and (apple[0] - mat[0]).abs().max() > 1e-3
    dropped = model.drop(condition, torch.tensor([0.05, 0.5]))
    assert torch.equal(dropped.ids[1], condition.ids[1]) and not torch.equal(dropped.ids[0], condition.ids[0])


def test_dropped_captions_become_the_empty_one_and_keep_their_score():
    model, caption, empty = build("vq"), captions(1, score=5.0), captions(2, score=1.0)
    model.vocabulary = SimpleNamespace(null=lambda batch: empty)
    dropped = model.drop(caption, torch.tensor([0.05, 0.5, 0.9]))
    assert torch.equal(dropped.extras["text"][0], empty.extras["text"][0])
    assert torch.equal(dropped.extras["pooled"][1:], caption.extras["pooled"][1:])
    assert dropped.extras["aesthetic"].tolist() == [5.0] * 3


@torch.no_grad()
def test_the_aesthetic_score_matters_and_has_a_default():
    ids = torch.full((3, 10), 19)
    for name in ("vq", "kl"):
        model = build(name, aesthetic=5.0)
        inputs = (ids,) if name == "vq" else (torch.zeros(3, 10, 4), torch.ones(3, 10, dtype=torch.bool))
        asked = captions(1, score=5.0)
        unasked = Condition(asked.ids, asked.mask, {k: v for k, v in asked.extras.items() if k != "aesthetic"})
        assert torch.equal(model(asked, *inputs), model(unasked, *inputs))
        assert not torch.allclose(model(asked, *inputs), model(captions(1, score=7.0), *inputs))
        plain = build(name, micro_width=0)
        assert torch.equal(plain(asked, *inputs), plain(captions(1, score=7.0), *inputs))


# ---------------------------------------------------------------- files and bad input


@pytest.mark.parametrize("name", BUILD)
@torch.no_grad()
def test_saved_models_come_back_and_original_files_load(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    order = make_order("raster", model.grid)
    assert torch.equal(run(model, order)[0].values, run(again, order)[0].values) and again.grid == (1, 1, 10)
    path = tmp_path / "model.bin"
    torch.save(model.state_dict(), path)
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    loaded = type(model).from_single_file(path, config)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    with pytest.raises(VgenError, match="does not fit"):
        type(model).from_single_file(path, {**config, "width": 64})
    with pytest.raises(VgenError, match=f"unknown {type(model).__name__} size 'huge'"):
        type(model).from_single_file(path, "huge")


def test_tied_files_may_hold_their_table_twice():
    model = build("vq")
    state = model.state_dict()
    table = state["embeddings.weight"]
    both = MaskGenVQModel.from_original({**state, "lm_head.weight": table}, dict(model.config))
    assert torch.equal(both.embeddings.weight, table)
    with pytest.raises(VgenError, match="set head_rows"):
        MaskGenVQModel.from_original({**state, "lm_head.weight": table + 1}, dict(model.config))
    untied = build("vq", head_rows=19)
    again = MaskGenVQModel.from_original(untied.state_dict(), dict(untied.config))
    assert torch.equal(again.lm_head.weight, untied.lm_head.weight)


def test_old_exports_of_the_vit_carry_a_counter():
    model = build("vit")
    state = {**model.state_dict(), "model.embeddings.position_ids": torch.arange(11)[None]}
    again = MaskGITViTModel.from_original(state, dict(model.config)).state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


def test_bad_input_is_one_sentence():
    for name in BUILD:
        with pytest.raises(VgenError, match="multiple of the 3 heads"):
            build(name, heads=3)
        model = build(name)
        with pytest.raises(VgenError, match="10 tokens a picture, the canvas has 16"):
            model.start(conditions(model), Canvas.blank((1, 4, 4), 3))
    with pytest.raises(VgenError, match="class or words"):
        build("vit", conditioning="text")
    with pytest.raises(VgenError, match="0 to 4, got 5"):
        build("uvit").vocabulary.labels([5])
    model = build("vq")
    with pytest.raises(VgenError, match=r"text \[B, T, 12\] and pooled \[B, 12\]; found none"):
        model.start([build("vit").vocabulary.labels([1])], Canvas.blank(model.grid, 1))
    with pytest.raises(VgenError, match=r"set `model\.vocabulary`"):
        model.null(captions(1))


def test_smoothed_labels_give_every_code_its_share():
    """Target (1 - e) on the code plus e / V on all: cross-entropy of both, over masked tokens (1) and others (unmasked_weight)."""
    logits, tokens = torch.randn(2, 4, 7), torch.randint(7, (2, 4))
    masked = torch.tensor([[True, False, True, False], [True, True, False, False]])
    found = masked_token_loss(logits, tokens, masked, 0.1, 0.2)["loss"]
    log_p = logits.log_softmax(dim=-1)
    each = -0.8 * log_p.gather(-1, tokens[..., None])[..., 0] - 0.2 * log_p.mean(dim=-1)
    weight = torch.where(masked, 1.0, 0.1)
    torch.testing.assert_close(found, (each * weight).sum() / weight.sum())
