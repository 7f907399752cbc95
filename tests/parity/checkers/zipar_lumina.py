"""ZipAR on Lumina-mGPT (specs/zipar.md, section 2): traces and schedules for every window; the widest is raster."""

from __future__ import annotations

from typing import Any

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.models.lumina.lumina import LuminaModel
from vgen.samplers.choice import TokenChoice
from vgen.samplers.decode import decode
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.orders import make_order
from vgen.samplers.types import Canvas, Condition


def options(config: dict[str, Any]) -> dict[str, Any]:
    low, high = config["ids"]["image"]
    return {
        "words": config["vocab_size"],
        "codes": high - low + 1,
        "grid": (1, config["grid"], config["grid"]),
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "key_heads": config["num_key_value_heads"],
        "hidden": config["intermediate_size"],
        "norm_shards": config["model_parallel_size"],
        "theta": config["rope_theta"],
    }


class Recorder:
    """A model that notes its guided logits by position, and what it is fed: [call, place, source, predicted] as recorded."""

    def __init__(self, model: LuminaModel, guidance: ClassifierFree):
        self.model, self.guidance, self.commit = model, guidance, model.commit
        self.logits: dict[int, torch.Tensor] = {}
        self.schedule: list[list[int]] = []

    def predict(self, state, step, canvas):
        plan, targets = self.model.plan(state, step, canvas), step.targets.tolist()
        answers = {int(row): target for row, target in zip(plan.reads, targets)}
        if plan.first:
            self.schedule.append([step.index, 0, -1, answers[-1]])
        for row, (position, place) in enumerate(zip(plan.positions.tolist(), plan.places.tolist())):
            self.schedule.append([step.index, place, position if position >= 0 else -2, answers.get(row, -1)])
        prediction = self.model.predict(state, step, canvas)
        mixed = self.guidance.mix(prediction.logits, self.guidance.weights(step))[0]
        self.logits |= dict(zip(targets, mixed))
        return prediction


@checker("zipar.lumina")
@torch.no_grad()
def check_lumina(fixture: Fixture) -> None:
    config, out, prompt = fixture.config, fixture.outputs, fixture.inputs["prompt"]
    assert not config["swin_norm"]
    model = LuminaModel.from_original(fixture.weights, options(config))
    ids, side = config["ids"], config["grid"]
    low, _ = ids["image"]
    condition = Condition(prompt, torch.ones_like(prompt, dtype=torch.bool))
    guidance = ClassifierFree(config["cfg_scale"])
    header = [ids["soi"], ids["grid_base"] + side // 2, ids["grid_base"] + side // 2]
    for window in config["windows"]:
        # The recording counts a row's start token, an order counts image tokens.
        order = make_order("zip", model.grid, window=window - 1)
        model.check_order(order)
        recorder, canvas = Recorder(model, guidance), Canvas.blank(model.grid, 1)
        state = model.start([condition, model.null(condition)], canvas)
        greedy, noise = TokenChoice(temperature=0), PhiloxNoise(0, canvas.samples)
        for _ in decode(recorder, state, canvas, order, guidance, greedy, noise):
            pass
        logits = torch.stack([recorder.logits[position] for position in range(side * side)])
        tokens = canvas.values[0] + low
        assert_equal(tokens, out[f"tokens_w{window}"], f"window {window}, tokens")
        assert_close(logits[:, :64], out[f"logits_first64_w{window}"], 1e-3, f"window {window}, guided logits")
        assert_close(logits.amax(dim=1), out[f"top_logit_w{window}"], 1e-3, f"window {window}, top logit")
        rows = [[*row.tolist(), ids["eol"]] for row in tokens.view(side, side)]
        sequence = [*header, *(word for row in rows for word in row), ids["eoi"], ids["end"]]
        assert_equal(torch.tensor(sequence), out[f"sequence_w{window}"], f"window {window}, sequence")
        found = torch.tensor(sorted(recorder.schedule))
        recorded = torch.tensor(sorted(out[f"sched_w{window}"].tolist()))
        assert_equal(found, recorded, f"window {window}, schedule")
