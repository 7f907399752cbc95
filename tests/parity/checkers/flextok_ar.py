"""FlexAR (specs/flextok.md, section 12): teacher forcing, and traces through the one decode loop, the release's bug included."""

from __future__ import annotations

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker
from torch import Tensor

from vgen.models.flexar.flexar import FlexARModel
from vgen.models.flexar.text import prompt_condition
from vgen.samplers.choice import TokenChoice
from vgen.samplers.decode import decode
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.noise import PhiloxNoise, TapeNoise
from vgen.samplers.types import Canvas, Condition

GREEDY = TokenChoice(temperature=0)


def load(fixture: Fixture, **options) -> FlexARModel:
    """The model: heads and conditioning are in the config, the rest in the weights."""
    config = fixture.config
    model = FlexARModel.from_original(fixture.weights, {"heads": config["heads"], **options})
    found = model.config
    expected = config["dim"], config["blocks"], config["codebook"], config["tokens"]
    assert (found.width, found.depth, found.codes, found.tokens) == expected
    return model


def generate(
    model: FlexARModel,
    condition: Condition,
    guided: bool,
    scale: float,
    choice=GREEDY,
    draws: list[Tensor] | None = None,
):
    """Tokens [B, N], and the raw logits of every call [N, R * B, V].

    guided: run the null row even where the scale turns guidance off, as the release does.
    """
    batch, order = len(condition.mask), model.default_order()
    canvas = Canvas.blank(model.grid, batch)
    state = model.start([condition, model.null(condition)] if guided else [condition], canvas)
    noise = PhiloxNoise(0, canvas.samples) if draws is None else TapeNoise.from_exponential(draws)
    raw, original = [], model.predict

    def predict(state, step, canvas):
        prediction = original(state, step, canvas)
        raw.append(prediction.logits.flatten(0, 2))
        return prediction

    model.predict = predict
    for _ in decode(model, state, canvas, order, ClassifierFree(scale), choice, noise):
        pass
    del model.predict
    assert state.counters.calls == canvas.values.shape[1]
    return canvas.values, torch.stack(raw)


def check_greedy(fixture: Fixture, model: FlexARModel, condition: Condition) -> None:
    """The greedy runs with and without guidance: tokens, and the logits of the first and of the last call.

    The release has no cache: the logits of its last call are those of all slots, of which ours are the last.
    """
    out = fixture.outputs
    for name, guided in (("greedy_cfg", True), ("greedy_nocfg", False)):
        scale = fixture.config["cfg_factor"] if guided else 1.0
        tokens, logits = generate(model, condition, guided, scale)
        assert_equal(tokens, out[f"{name}_ids"], name)
        assert_close(logits[0][:, None], out[f"{name}_logits_0"], what=f"{name}: first call")
        last = out[f"{name}_logits_last"]
        assert_close(logits[-1], last[:, -1], what=f"{name}: last call")
        for rows, expected in zip((condition, model.null(condition)), last.split(len(tokens))):
            if name == "greedy_nocfg" or rows is condition or not model.config.faithful:
                assert_close(model(rows, tokens), expected, what=f"{name}: all slots of the last call")
            else:  # by then the unconditional rows are of class 0
                zero = model.vocabulary.labels([0] * len(tokens))
                assert_close(model(zero, tokens), expected, what=f"{name}: all slots of the last call, null rows")


@checker("flextok.ar_c2i")
@torch.no_grad()
def check_c2i(fixture: Fixture) -> None:
    model = load(fixture, faithful=True)
    assert model.config.classes == fixture.config["classes"]
    inputs = fixture.inputs
    condition = model.vocabulary.labels(inputs["labels"].tolist())
    assert_close(model(condition, inputs["tf_ids"]), fixture.outputs["tf_logits"], what="teacher forcing")
    check_greedy(fixture, model, condition)


@checker("flextok.ar_t2i")
@torch.no_grad()
def check_t2i(fixture: Fixture) -> None:
    model, inputs, out = load(fixture), fixture.inputs, fixture.outputs
    prompts = sorted(name.removeprefix("text_emb_") for name in inputs if name.startswith("text_emb_"))
    prompts.remove("null")
    features, mask = (
        torch.stack([inputs[f"{kind}_{name}"] for name in sorted(prompts, key=int)])
        for kind in ("text_emb", "text_mask")
    )
    condition = prompt_condition(features, mask, inputs["text_emb_null"], inputs["text_mask_null"])
    check_greedy(fixture, model, condition)
    if "sampled" in fixture.config:
        settings = fixture.config["sampled"]
        choice = TokenChoice(settings["temperature"], settings["top_k"], settings["top_p"] or 1.0)
        draws = [draw[:, None] for draw in inputs["exp"]]
        tokens, _ = generate(model, condition, True, fixture.config["cfg_factor"], choice, draws)
        assert_equal(tokens, out["sampled_ids"], "recorded noise")
