"""ZipAR on LlamaGen (specs/zipar.md): traces of the released variant, and raster at full width."""

from __future__ import annotations

import torch
from parity.checkers.llamagen_gpt import GUIDED, by_call, labels, options, run, sampling
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.models.conditions.t5 import text_condition
from vgen.models.llama.llamagen import LlamaGenModel
from vgen.samplers.orders import make_order


@checker("zipar.c2i", "zipar.t2i")
def check_llamagen(fixture: Fixture) -> None:
    config, inputs, out = fixture.config, fixture.inputs, fixture.outputs
    model = LlamaGenModel.from_original(fixture.weights, options(config))
    condition = labels(inputs["cond"]) if "cond" in inputs else text_condition(inputs["caption"], inputs["emb_mask"])
    side, guidance = config["grid"], model.guidance(config["cfg_scale"])
    for index, window in enumerate(config["windows"]):
        order = make_order("zip", (side, side), window=window, faithful=True)
        found, logits, _, _ = run(model, condition, order, guidance)
        assert_equal(found, out[f"tokens_w{window}"], f"window {window}, greedy, guided")
        assert_close(logits, out[f"logits_w{window}"], GUIDED, f"window {window}, guided logits")
        if f"call_order_w{window}" in out:
            assert_equal(torch.cat(order.groups()), out[f"call_order_w{window}"], f"window {window}, draws")
        if f"tokens_nocfg_w{window}" in out:
            found = run(model, condition, order, model.guidance(1.0))[0]
            assert_equal(found, out[f"tokens_nocfg_w{window}"], f"window {window}, unguided")
        if f"tokens_interval_w{window}" in out:
            found = run(model, condition, order, model.guidance(config["cfg_scale"], config["cfg_interval"]))[0]
            assert_equal(found, out[f"tokens_interval_w{window}"], f"window {window}, guided in an interval")
        if index == 0 and f"tokens_sampled_w{window}" in out:
            draws = by_call(inputs["exp"], order)
            found = run(model, condition, order, guidance, sampling(config["sampler"]), draws)[0]
            assert_equal(found, out[f"tokens_sampled_w{window}"], f"window {window}, recorded noise")
    for faithful in (False, True):
        order = make_order("zip", (side, side), window=side, faithful=faithful)
        assert_equal(run(model, condition, order, guidance)[0], out["tokens_raster"], "a window of a full row")
    assert_equal(run(model, condition, model.default_order(), guidance)[0], out["tokens_raster"], "raster")
