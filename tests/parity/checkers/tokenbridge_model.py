"""TokenBridge's generator (specs/tokenbridge.md): the training forward, and whole sampling traces."""

from __future__ import annotations

import torch
from einops import rearrange
from parity.checkers.maskgen import RecordedOrder
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.models.mar.tokenbridge import TokenBridgeModel
from vgen.samplers.choice import TokenChoice
from vgen.samplers.decode import decode
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.noise import PhiloxNoise, TapeNoise
from vgen.samplers.types import Canvas, Condition


def _model(fixture: Fixture) -> TokenBridgeModel:
    config = fixture.config
    side = config["img_size"] // (config["vae_stride"] * config["patch_size"])
    stacks = {
        f"{stack}_{ours}": config[f"{stack}_{theirs}"]
        for stack in ("encoder", "decoder")
        for ours, theirs in (("width", "embed_dim"), ("layers", "depth"), ("heads", "num_heads"))
    }
    return TokenBridgeModel.from_original(
        fixture.weights,
        {
            **stacks,
            "channels": config["vae_embed_dim"] * config["patch_size"] ** 2,
            "levels": config["quant_levels"],
            "low": config["quant_min"],
            "high": config["quant_max"],
            "std_range": config["std_range"],
            "channel_order": config["channel_order"],
            "grid": (side, side),
            "head_width": config["channel_embed_dim"],
            "head_layers": config["channel_depth"],
            "head_heads": config["channel_heads"],
            "mlp_ratio": config["mlp_ratio"],
            "buffer": config["buffer_size"],
            "classes": config["class_num"],
            "condition_dropout": config["label_drop_prob"],
            "mask_ratio_min": config["mask_ratio_min"],
        },
    )


def _condition(model: TokenBridgeModel, labels: torch.Tensor) -> Condition:
    return model.vocabulary.labels(labels.tolist())


@checker("tokenbridge.forward")
@torch.no_grad()
def check_forward(fixture: Fixture) -> None:
    model, inputs, out = _model(fixture), fixture.inputs, fixture.outputs
    order = list(model.head.order)
    tokens = rearrange(inputs["latents"], "b c h w -> b (h w) c")
    levels = model.quantised(tokens)
    values = model.quantizer.decode(levels)
    assert_equal(levels, out["indices"], "levels")
    assert_close(values, out["dequant"], what="dequantised latents")
    assert_equal(levels[..., order], out["targets"], "targets in the head's order")
    shown = model.draw_shown(inputs["orders"], fixture.config["mask_rate"])

    condition = _condition(model, inputs["labels"])
    dropped = model.drop(condition, inputs["label_drop_u"])
    encoded = model.encode(
        model.context(dropped)[0], model.z_proj(values), shown, model.encoder_pos_embed_learned
    )  # [B, buffer + v, D]
    assert_close(encoded, out["enc_x"], what="encoder output")
    for name, given in (("train", dropped), ("eval", condition)):
        features, masked = model.masked_features(given, values, shown)
        assert_equal(masked, out["mask"], "mask")
        if name == "train":
            assert_close(features, out["z"], what="features")
        logits = model.head(features[masked], levels[masked])
        assert_close(logits[:, order], out[f"logits_{name}"], what=f"{name}: logits")
        assert_close(model.loss(given, tokens, shown)["loss"], out[f"loss_{name}"], what=f"{name}: loss of latents")
        assert_close(model.loss(given, levels, shown)["loss"], out[f"loss_{name}"], what=f"{name}: loss of levels")
    kinds = {f"{figure}_{name}" for figure in ("logits", "loss") for name in ("train", "eval")}
    assert kinds | {"indices", "dequant", "targets", "enc_x", "mask", "z"} == set(out)


@checker("tokenbridge.generate")
@torch.no_grad()
def check_generate(fixture: Fixture) -> None:
    model, inputs, out = _model(fixture), fixture.inputs, fixture.outputs
    steps, schedules = fixture.config["num_iter"], {"linear": "linear-clamped", "constant": "constant"}
    order = list(model.head.order)
    condition = _condition(model, inputs["labels"])
    checked = set()

    def recorded(name: str) -> torch.Tensor:
        checked.add(name)
        return out[name]

    for name, run in fixture.config["runs"].items():
        guidance = ClassifierFree(run["cfg"], schedules[run["schedule"]])
        canvas = Canvas.blank(model.grid, len(inputs["labels"]), channels=model.config.channels, codes=True)
        noise = PhiloxNoise(0, canvas.samples)  # not used where the run is greedy
        if run["temperature"]:
            noise = TapeNoise.from_exponential([draw for k in range(steps) for draw in inputs[f"exp_{k}"]])
        masks, fed = [], []

        def spy(state, step, canvas, name=name, guidance=guidance, masks=masks, fed=fed):
            masks.append(~canvas.known)
            fed.append(model.quantizer.decode(canvas.values))
            prediction = type(model).predict(model, state, step, canvas)
            if f"{name}_feat_{step.index}" in out:
                guided = guidance.mix(prediction.features, guidance.weights(step)).flatten(0, 1)
                assert_close(guided, recorded(f"{name}_feat_{step.index}"), 1e-3, f"{name}: features {step.index}")
            return prediction

        model.predict = spy
        conditions = [condition, model.null(condition)][: len(guidance.rows)]
        state = model.start(conditions, canvas)
        run_order = RecordedOrder(model.grid, inputs["orders"], steps)
        choice = TokenChoice(temperature=run["temperature"])
        for step, _ in decode(model, state, canvas, run_order, guidance, choice, noise):
            new = torch.stack([row[targets] for row, targets in zip(canvas.values, step.targets)])[..., order]
            assert_equal(new.flatten(0, 1), recorded(f"{name}_newtokens_{step.index}"), f"{name}: step {step.index}")
        del model.predict
        assert_equal(torch.stack(masks), recorded(f"{name}_masks"), f"{name}: masks")
        assert_close(torch.stack(fed), recorded(f"{name}_inputs"), what=f"{name}: inputs")
        assert_equal(canvas.values, recorded(f"{name}_tokens"), f"{name}: levels")
        latents = rearrange(model.quantizer.decode(canvas.values), "b (h w) c -> b c h w", h=model.grid[1])
        assert_close(latents, recorded(f"{name}_latents"), what=f"{name}: latents")
        assert state.counters.calls == steps
    assert checked == set(out)
