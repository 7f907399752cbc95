"""RAR: teacher-forced logits, loss, and traces with guidance schedules and recorded noise."""

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.models.rar.rar import RARModel
from vgen.samplers.choice import TokenChoice
from vgen.samplers.decode import decode
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.noise import PhiloxNoise, TapeNoise
from vgen.samplers.orders import make_order
from vgen.samplers.types import Canvas


def _model(fixture: Fixture) -> RARModel:
    config = fixture.config
    return RARModel.from_original(
        fixture.weights,
        {
            "codes": config["codebook_size"],
            "classes": config["condition_num_classes"],
            "grid": (config["image_seq_len"],),
            "width": config["hidden_size"],
            "layers": config["num_hidden_layers"],
            "heads": config["num_attention_heads"],
            "hidden": config["intermediate_size"],
            "dropout": config["dropout"],
            "attention_dropout": config["attn_drop"],
        },
    )


@checker("rar.forward")
@torch.no_grad()
def check_forward(fixture: Fixture):
    model, inputs, out = _model(fixture), fixture.inputs, fixture.outputs
    tokens, orders = inputs["tokens"], inputs["orders"]
    condition = model.vocabulary.labels(inputs["labels"].tolist())
    null = model.vocabulary.null(len(tokens))
    assert_equal(condition.ids[:, 0] + model.config.codes + 1, out["condition"], "row of the class")
    sequence = tokens.gather(1, orders)
    assert_equal(sequence, out["targets"], "targets")
    assert_close(model(condition, sequence, orders), out["logits"], what="logits")
    assert_close(model(null, sequence, orders), out["logits_none"], what="null class")
    assert_close(model(condition, tokens), out["logits_raster"], what="raster")
    prefix = out["logits_prefix"].shape[1] - 1
    assert_close(model(condition, tokens[:, :prefix]), out["logits_prefix"], what="prefix")
    found = model.loss(condition, tokens, orders)
    assert_close(found["loss"], out["loss"], what="loss")
    assert_close(found["accuracy"], out["correct_tokens"], what="accuracy")
    assert_close(model.loss(condition, tokens)["loss"], out["loss_raster"], what="raster loss")


@checker("rar.generate")
@torch.no_grad()
def check_generate(fixture: Fixture):
    model, inputs, out = _model(fixture), fixture.inputs, fixture.outputs
    labels = inputs["labels"].tolist()
    order = make_order("raster", model.grid)
    for name, run in fixture.config["runs"].items():
        scale = run["guidance_scale"] or 1.0  # the original turns guidance off by 0, vgen by 1
        guidance = ClassifierFree(scale, "power-cosine", run["guidance_scale_pow"])
        canvas = Canvas.blank(model.grid, len(labels))
        noise = PhiloxNoise(0, canvas.samples)
        if not run["greedy"]:
            noise = TapeNoise.from_exponential([inputs[f"{name}.exp_{k}"] for k in range(order.calls)])
        choice = TokenChoice(0.0 if run["greedy"] else run["randomize_temperature"])
        conditions = [model.vocabulary.labels(labels), model.vocabulary.null(len(labels))][: len(guidance.rows)]
        state = model.start(conditions, canvas)
        recorded, raw = out[f"{name}.last_logits"], []

        def spy(state, step, canvas, raw=raw):
            prediction = type(model).predict(model, state, step, canvas)
            raw.append(prediction.logits.flatten(0, 2))
            return prediction

        model.predict = spy
        for _ in decode(model, state, canvas, order, guidance, choice, noise):
            pass
        del model.predict
        assert_equal(canvas.values, out[f"{name}.ids"], f"{name}: tokens")
        rows = len(labels) * len(conditions)  # vgen leaves the null half out at scale 1
        assert_close(torch.stack(raw), recorded[:, :rows], what=f"{name}: logits")
        assert state.counters.calls == len(recorded)
        assert state.counters.fed_tokens == rows * (order.calls + 1)
        if run.get("kv_cache", True) is False:
            whole = torch.cat([model(condition, canvas.values)[:, :-1] for condition in conditions])
            assert_close(whole.transpose(0, 1), recorded[:, :rows], what=f"{name}: without a cache")
