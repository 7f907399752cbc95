"""LlamaGen's transformer (specs/llamagen.md): logits, losses, gradients, traces; what PAR, NAR and ZipAR share of it."""

from __future__ import annotations

from typing import Any

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker
from torch import Tensor

from vgen.kernels.choose_tokens import choose_tokens
from vgen.layers.norm import RMSNorm
from vgen.layers.rope2d import rope2d_table, rotate_pairs
from vgen.layers.transformer import llama_hidden
from vgen.models.conditions.t5 import left_pad, text_condition
from vgen.models.llama.llamagen import LlamaGenModel
from vgen.samplers.choice import TokenChoice
from vgen.samplers.decode import decode
from vgen.samplers.noise import PhiloxNoise, TapeNoise
from vgen.samplers.types import Canvas, Condition

GREEDY = TokenChoice(temperature=0)
GUIDED = 1e-3  # guidance multiplies rounding errors by its scale


def options(config: dict[str, Any]) -> dict[str, Any]:
    """A fixture's config as arguments of our models."""
    side = int(config["block_size"] ** 0.5)
    found = {
        "codes": config["vocab_size"],
        "grid": (1, side, side),
        "width": config["dim"],
        "depth": config["n_layer"],
        "heads": config["n_head"],
        "hidden": llama_hidden(config["dim"], config["multiple_of"]),
        "condition_dropout": config.get("class_dropout_prob", 0.1),
        "theta": config.get("rope_base", 10000.0),
        "attention_dropout": config.get("attn_dropout_p", 0.0),
        "residual_dropout": config.get("resid_dropout_p", 0.1),
    }
    for ours, theirs in (
        ("token_dropout", "token_dropout_p"),
        ("ffn_dropout", "ffn_dropout_p"),
        ("classes", "num_classes"),
    ):
        if theirs in config:
            found[ours] = config[theirs]
    if config["model_type"] == "t2i":
        found |= {
            "conditioning": "text",
            "caption_width": config["caption_dim"],
            "caption_tokens": config.get("caption_token_num", 120),
            "prefix_tokens": config["cls_token_num"],
        }
    return found


def labels(values: Tensor) -> Condition:
    return Condition(values[:, None], torch.ones(len(values), 1, dtype=torch.bool))


def run(model, condition: Condition, order, guidance, choice=GREEDY, draws: list[Tensor] | None = None):
    """Decodes through the one loop: tokens [B, N], guided logits [B, N, V] in raster order, state, steps.

    draws: recorded Exp(1) noise, [B, m, V] for every call.
    """
    batch = len(condition.mask)
    conditions = [condition, model.null(condition)] if len(guidance.rows) == 2 else [condition]
    canvas = Canvas.blank(order.grid, batch)
    state = model.start(conditions, canvas)
    noise = PhiloxNoise(0, canvas.samples) if draws is None else TapeNoise.from_exponential(draws)
    logits = torch.zeros(*canvas.values.shape, model.config.codes)
    original = model.predict

    def predict(state, step, canvas):
        prediction = original(state, step, canvas)
        logits[:, step.targets] = guidance.mix(prediction.logits, guidance.weights(step))
        return prediction

    model.predict = predict
    steps = []
    try:
        for step, _ in decode(model, state, canvas, order, guidance, choice, noise):
            steps.append(step)
    finally:
        del model.predict
    assert canvas.known.all() and state.counters.calls == order.calls == len(steps)
    assert state.counters.call_rows == order.calls * batch * len(conditions)
    return canvas.values, logits, state, steps


def by_call(noise: Tensor, order) -> list[Tensor]:
    """Recorded noise [N, B, V], a draw per token, as one [B, m, V] per call."""
    return [part.movedim(0, 1) for part in noise.split([len(group) for group in order.groups()])]


def sampling(settings: dict[str, Any]) -> TokenChoice:
    return TokenChoice(settings["temperature"], settings["top_k"], settings["top_p"])


def check_gradients(model, fixture: Fixture) -> None:
    parameters = dict(model.named_parameters())
    names = [name for name in fixture.outputs if name.startswith("grad/")]
    assert names
    for name in names:
        assert_close(parameters[name.removeprefix("grad/")].grad, fixture.outputs[name], what=name)


@checker("llamagen.gpt_c2i")
def check_c2i(fixture: Fixture) -> None:
    config, inputs, out = fixture.config, fixture.inputs, fixture.outputs
    model = LlamaGenModel.from_original(fixture.weights, options(config))
    tokens, condition = inputs["idx"], labels(inputs["labels"])
    assert_close(model.sequence_rope(torch.arange(tokens.shape[1])), out["freqs_cis"], what="rope")
    with torch.no_grad():
        assert_close(model.sequence_logits(condition, tokens), out["eval_logits"], what="eval logits")

    model.train()
    dropped = model.drop(condition, inputs["label_drop_uniform"])
    assert_close(model(dropped, tokens), out["train_logits"], what="train logits")
    loss = model.loss(dropped, tokens)["loss"]
    assert_close(loss, out["train_loss"], what="loss")
    loss.backward()
    check_gradients(model.eval(), fixture)

    order = model.default_order()
    found, logits, state, _ = run(model, condition, order, model.guidance(config["cfg_scale"]))
    assert_equal(found, out["greedy_cfg_tokens"], "greedy, guided")
    assert_close(logits, out["greedy_cfg_guided_logits"], GUIDED, "guided logits")
    assert state.counters.calls == tokens.shape[1]
    found = run(model, condition, order, model.guidance(1.0))[0]
    assert_equal(found, out["greedy_nocfg_tokens"], "greedy, unguided")
    found = run(model, condition, order, model.guidance(config["cfg_scale"], config["cfg_interval"]))[0]
    assert_equal(found, out["greedy_cfg_interval_tokens"], "greedy, guided in an interval")
    guidance = model.guidance(config["sampling"]["cfg_scale"])
    draws = by_call(inputs["exp_noise"], order)
    found = run(model, condition, order, guidance, sampling(config["sampling"]), draws)[0]
    assert_equal(found, out["sample_tokens"], "recorded noise")


@checker("llamagen.gpt_t2i")
def check_t2i(fixture: Fixture) -> None:
    config, inputs, out = fixture.config, fixture.inputs, fixture.outputs
    model = LlamaGenModel.from_original(fixture.weights, options(config))
    features, mask = left_pad(inputs["caption_embs_right_padded"], inputs["emb_masks_right_padded"])
    assert_close(features, out["left_padded_embs"], what="left padding")
    assert_equal(mask, out["left_padded_masks"], "left padding")
    condition, tokens = text_condition(features, mask), inputs["idx"]
    assert_close(model.sequence_rope(torch.arange(tokens.shape[1])), out["freqs_cis"], what="rope")
    with torch.no_grad():
        assert_close(model._prefix(condition)[0], out["cond_embedding"], what="projected text")
    length = out["train_attn_mask"].shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    masked = model.sequence_mask(causal, condition.mask[:, : model.prefix_tokens])
    assert_equal(masked, out["train_attn_mask"], "mask")

    model.train()
    dropped = model.drop(condition, inputs["caption_drop_uniform"])
    assert_close(model(dropped, tokens), out["train_logits"], what="train logits")
    loss = model.loss(dropped, tokens, inputs["valid"])["loss"]
    assert_close(loss, out["train_loss"], what="loss")
    loss.backward()
    check_gradients(model.eval(), fixture)

    order, guidance = model.default_order(), model.guidance(config["cfg_scale"])
    found, logits, _, _ = run(model, condition, order, guidance)
    assert_equal(found, out["greedy_cfg_tokens"], "greedy, guided")
    assert_close(logits, out["greedy_cfg_guided_logits"], GUIDED, "guided logits")
    length = model.prefix_tokens + tokens.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    rows = torch.cat((condition.mask, condition.mask))[:, : model.prefix_tokens]
    masked = model.sequence_mask(causal, rows)[:, 0]
    assert_equal(masked, out["generate_mask"][:, :length, :length], "mask of generation")
    found = run(model, text_condition(features, torch.ones_like(mask)), order, guidance)[0]
    assert_equal(found, out["greedy_cfg_nomask_tokens"], "greedy, without mask")
    found = run(model, condition, order, model.guidance(1.0))[0]
    assert_equal(found, out["greedy_nocfg_tokens"], "greedy, unguided")


@checker("llamagen.tables")
def check_tables(fixture: Fixture) -> None:
    config, inputs, out = fixture.config, fixture.inputs, fixture.outputs
    for index, (side, head_dim, base, prefix) in enumerate(config["rope"]):
        table = rope2d_table(side, side, head_dim, base, prefix)
        name = f"rope_g{side}_d{head_dim}_b{base:g}_c{prefix}"
        assert_close(table, out[name], what=name)
        if index == 0:
            rotated = rotate_pairs(inputs["rope_x"].movedim(1, 2), table).movedim(1, 2)
            assert_close(rotated, out["rope_applied"], what="rope")
    norm = RMSNorm(inputs["rms_x"].shape[-1], config["rms_eps"])
    norm.load_state_dict({"weight": fixture.weights["rms.weight"]})
    with torch.no_grad():
        assert_close(norm(inputs["rms_x"]), out["rms"], what="RMS norm")
        halved = norm.to(torch.bfloat16)(inputs["rms_x"].to(torch.bfloat16)).float()
        assert_close(halved, out["rms_bf16"].float(), what="RMS norm in bfloat16")
    for name, filtered in out.items():
        if name.startswith("filter_"):
            _, k, p = name.split("_")
            check_filter(inputs["logits"], filtered, int(k[1:]), float(p[1:]))


def check_filter(logits: Tensor, filtered: Tensor, top_k: int, top_p: float) -> None:
    """A token can be drawn exactly if the filter keeps it: huge noise on one token at a time, in a batch of V."""
    rows, codes = logits.shape
    noise = torch.eye(codes)[:, None] * 1e6  # [V, 1, V]
    for row in range(rows):
        drawn, _ = choose_tokens(
            logits[row].expand(1, codes, 1, codes), (1.0,),
            temperature=1.0, top_k=top_k, top_p=top_p, gumbel=noise,
        )  # fmt: skip
        kept = drawn[:, 0] == torch.arange(codes)
        # Values, not tokens: which of two equal logits crosses top-p depends on the sort of the release.
        expected = filtered[row][filtered[row] > -torch.inf]
        assert torch.equal(logits[row][kept].sort().values, expected.sort().values), f"top-k {top_k}, top-p {top_p}"
