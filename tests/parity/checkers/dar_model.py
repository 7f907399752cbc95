"""DAR: teacher-forced logits, loss and the greedy guided trace (of our own implementation of the spec: none is published)."""

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.models.dar.dar import DARModel
from vgen.samplers.choice import TokenChoice
from vgen.samplers.decode import decode
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.types import Canvas


@checker("dar.model")
@torch.no_grad()
def check_model(fixture: Fixture):
    config, inputs, out = fixture.config, fixture.inputs, fixture.outputs
    model = DARModel.from_original(
        fixture.weights,
        {
            "codes": config["V"],
            "code_channels": config["code_dim"],
            "classes": config["num_classes"],
            "grid": (config["h"], config["w"]),
            "width": config["width"],
            "layers": config["depth"],
            "heads": config["heads"],
            "hidden": config["ffn"],
            "first": config["order"].partition("first=")[2] or "right",
        },
    )
    tokens, labels = inputs["tokens_raster"], inputs["label"].tolist()
    condition = model.vocabulary.labels(labels)
    order = model.default_order()
    assert_equal(tokens[:, order.positions], out["seq"], "scan order")
    assert_close(model(condition, tokens), out["logits"], what="logits")
    assert_close(model.loss(condition, tokens)["loss"].view(1), out["loss"].view(1), what="loss")

    guidance = ClassifierFree(config["cfg_scale"], "power-cosine", config["cfg_power"])
    canvas = Canvas.blank(model.grid, len(labels))
    state = model.start([condition, model.vocabulary.null(len(labels))], canvas)
    guided, weights = [], []

    def spy(state, step, canvas):
        prediction = type(model).predict(model, state, step, canvas)
        weights.append(guidance.weights(step)[0])
        guided.append(guidance.mix(prediction.logits, guidance.weights(step))[:, 0])
        return prediction

    model.predict = spy
    for _ in decode(model, state, canvas, order, guidance, TokenChoice(0.0), PhiloxNoise(0, canvas.samples)):
        pass
    assert_close(torch.tensor(weights), out["cfg_weights"], what="guidance weights")
    assert_close(torch.stack(guided, dim=1), out["greedy_logits"], what="guided logits")
    assert_equal(canvas.values, out["greedy_tokens_raster"], "tokens")
    assert_equal(canvas.values[:, order.positions], out["greedy_seq"], "tokens in scan order")
    assert (state.counters.calls, state.counters.fed_tokens) == (order.calls, 2 * len(labels) * order.calls)
