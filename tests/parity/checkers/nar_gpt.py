"""NAR images (specs/nar.md): both heads, combined logits, loss, mask, traces, calls."""

from __future__ import annotations

import torch
from parity.checkers.llamagen_gpt import GUIDED, by_call, labels, options, run, sampling
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.layers.masks import step_causal_mask
from vgen.models.conditions.t5 import text_condition
from vgen.models.llama.nar import NARModel


def _model(fixture: Fixture) -> NARModel:
    side = fixture.config["grid"]
    assert fixture.config["block_size"] == side * side
    return NARModel.from_original(fixture.weights, options(fixture.config))


def _check_forward(model: NARModel, condition, fixture: Fixture) -> None:
    tokens, out = fixture.inputs["idx"], fixture.outputs
    with torch.no_grad():
        assert_close(model(condition, tokens), out["logits"], what="combined logits")
        assert_close(model.loss(condition, tokens)["loss"], out["loss"], what="loss")


@checker("nar.c2i")
def check_c2i(fixture: Fixture) -> None:
    config, inputs, out = fixture.config, fixture.inputs, fixture.outputs
    model = _model(fixture)
    order = model.default_order()
    condition = labels(inputs["cond"])
    assert_equal(step_causal_mask(order.step_ids(), 1), out["mask"], "mask")
    with torch.no_grad():
        right, below = model.sequence_logits(condition, inputs["idx"])
    assert_close(right, out["logits_right"], what="right head")
    assert_close(below, out["logits_below"], what="lower head")
    _check_forward(model, condition, fixture)

    condition, guidance = labels(inputs["gen_cond"]), model.guidance(config["cfg_scale"])
    found, logits, state, steps = run(model, condition, order, guidance)
    assert_equal(found, out["tokens_cfg"], "greedy, guided")
    assert_close(logits, out["logits_cfg"], GUIDED, "guided logits")
    assert_equal(torch.cat([step.targets for step in steps]), out["call_order"], "order of the draws")
    fed = torch.tensor([1] + [step.size for step in steps[:-1]])
    assert_equal(fed, out["input_len"], "tokens fed")
    assert state.length == out["input_len"].sum()
    positions = torch.cat([torch.zeros(1, dtype=torch.long)] + [1 + step.targets for step in steps[:-1]])
    assert_equal(positions, out["input_pos"], "positions fed")
    found, logits, _, _ = run(model, condition, order, model.guidance(1.0))
    assert_equal(found, out["tokens_nocfg"], "greedy, unguided")
    assert_close(logits, out["logits_nocfg"], what="unguided logits")
    found = run(model, condition, order, model.guidance(config["cfg_scale"], config["cfg_interval"]))[0]
    assert_equal(found, out["tokens_interval"], "greedy, guided in an interval")
    draws = by_call(inputs["exp"], order)
    found, logits, _, _ = run(model, condition, order, guidance, sampling(config["sampler"]), draws)
    assert_equal(found, out["tokens_sampled"], "recorded noise")
    assert_close(logits, out["logits_sampled"], GUIDED, "guided logits")


@checker("nar.t2i")
def check_t2i(fixture: Fixture) -> None:
    config, inputs, out = fixture.config, fixture.inputs, fixture.outputs
    model = _model(fixture)
    order = model.default_order()
    condition = text_condition(inputs["caption"], inputs["emb_mask"])
    mask = model.sequence_mask(step_causal_mask(order.step_ids(), model.prefix_tokens), condition.mask)
    assert_equal(mask[:, 0], out["mask"], "mask")
    _check_forward(model, condition, fixture)
    guidance = model.guidance(config["cfg_scale"])
    plain = text_condition(inputs["caption"], torch.ones_like(inputs["emb_mask"]))
    runs = {"cfg": (condition, guidance), "nocfg": (condition, model.guidance(1.0)), "nomask": (plain, guidance)}
    for name, (prompt, mix) in runs.items():
        found, logits, _, _ = run(model, prompt, order, mix)
        assert_equal(found, out[f"tokens_{name}"], f"greedy, {name}")
        if f"logits_{name}" in out:
            assert_close(logits, out[f"logits_{name}"], GUIDED, f"logits, {name}")
