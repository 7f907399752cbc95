"""PAR (specs/par.md): logits, loss, gradients, traces, calls."""

from __future__ import annotations

import torch
from parity.checkers.llamagen_gpt import GUIDED, check_gradients, labels, options, run, sampling
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.layers.masks import group_visible, prefix_mask
from vgen.models.llama.par import PARModel


@checker("par.gpt")
def check_gpt(fixture: Fixture) -> None:
    config, inputs, out = fixture.config, fixture.inputs, fixture.outputs
    n = config["ar_token_num"]
    assert config["spe_token_num"] == n - 1, "the published form"
    model = PARModel.from_original(fixture.weights, {**options(config), "parallel": n})
    order = model.default_order()
    positions = torch.cat(order.groups())
    tokens, condition = inputs["raster_idx"], labels(inputs["labels"])
    assert_equal(tokens[:, positions], out["par_idx"], "order")
    zero = torch.full((n - 1,), -1)
    rope = model.sequence_rope(torch.cat((positions[:n], zero, positions[n:])))
    assert_close(rope, out["freqs_cis"], what="rope")
    assert_equal(prefix_mask(group_visible(len(positions) + n, n)), out["group_mask"], "mask")
    with torch.no_grad():
        assert_close(model.sequence_logits(condition, out["par_idx"]), out["eval_logits"], what="eval logits")

    model.train()
    dropped = model.drop(condition, inputs["label_drop_uniform"])
    assert_close(model(dropped, tokens)[:, positions], out["train_logits"], what="train logits")
    loss = model.loss(dropped, tokens)["loss"]
    assert_close(loss, out["train_loss"], what="loss")
    loss.backward()
    check_gradients(model.eval(), fixture)

    found, logits, state, _ = run(model, condition, order, model.guidance(config["cfg_scale"]))
    assert_equal(found[:, positions], out["greedy_cfg_tokens_par"], "greedy, guided, in PAR order")
    assert_equal(found, out["greedy_cfg_tokens_raster"], "greedy, guided")
    assert_close(logits[:, positions], out["greedy_cfg_guided_logits"], GUIDED, "guided logits")
    assert state.counters.calls == len(out["calls_num_input_tokens"]) == n + len(positions) // n - 1
    assert_equal(torch.arange(state.length), out["calls_positions"], "slots")
    found = run(model, condition, order, model.guidance(1.0))[0]
    assert_equal(found[:, positions], out["greedy_nocfg_tokens_par"], "greedy, unguided")
    found = run(model, condition, order, model.guidance(config["cfg_scale"], config["cfg_interval"]))[0]
    assert_equal(found[:, positions], out["greedy_cfg_interval_tokens_par"], "greedy, guided in an interval")
    guidance = model.guidance(config["sampling"]["cfg_scale"])
    draws = [draw[:, None] for draw in inputs["exp_noise_seq"]] + list(inputs["exp_noise_multi"])
    found = run(model, condition, order, guidance, sampling(config["sampling"]), draws)[0]
    assert_equal(found[:, positions], out["sample_tokens_par"], "recorded noise")
