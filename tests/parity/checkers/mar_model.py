"""MAR: the training forward with its gradients, and whole sampling runs."""

import torch
from einops import rearrange
from parity.checkers.mar_diffusion import SubstepNoise, both_halves
from parity.checkers.maskgen import RecordedOrder
from parity.registry import Fixture, assert_close, assert_equal, checker
from torch import nn

from vgen.models.mar.backbone import EPS, MaskedAutoencoder
from vgen.models.mar.mar import MARModel
from vgen.samplers.choice import DiffusionChoice
from vgen.samplers.decode import decode
from vgen.samplers.diffusion_loss import diffusion_terms
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.types import Canvas
from vgen.tokenizers_vis.base import from_maps, to_maps

SCHEDULES = {"linear": "linear-clamped", "constant": "constant"}


def autoencoder_options(config: dict) -> dict:
    """Constructor arguments that MAR and its relatives share."""
    stacks = {
        f"{stack}_{ours}": config[f"{stack}_{theirs}"]
        for stack in ("encoder", "decoder")
        for ours, theirs in (("width", "embed_dim"), ("layers", "depth"), ("heads", "num_heads"))
    }
    side = config["img_size"] // config["vae_stride"] // config["patch_size"]
    return {
        **stacks,
        "channels": config["vae_embed_dim"] * config["patch_size"] ** 2,
        "grid": (side, side),
        "mlp_ratio": config["mlp_ratio"],
        "buffer": config["buffer_size"],
        "classes": config["class_num"],
        "condition_dropout": config["label_drop_prob"],
        "mask_ratio_min": config["mask_ratio_min"],
    }


def set_norm_eps(model: MaskedAutoencoder, config: dict) -> None:
    """The eps of the norms of both stacks is an argument of the original; `z_proj_ln` and the heads have EPS whatever it is."""
    for stack in (model.encoder_blocks, model.encoder_norm, model.decoder_blocks, model.decoder_norm):
        for part in stack.modules():
            if isinstance(part, nn.LayerNorm):
                part.eps = config.get("norm_eps", EPS)


def _model(fixture: Fixture) -> MARModel:
    config = fixture.config
    model = MARModel.from_original(
        fixture.weights,
        {
            **autoencoder_options(config),
            "head_width": config["diffloss_w"],
            "head_layers": config["diffloss_d"],
            "dropout": config["proj_dropout"],
            "attention_dropout": config["attn_dropout"],
            "diffusion_batch": config["diffusion_batch_mul"],
        },
    )
    set_norm_eps(model, config)
    return model


@checker("mar.forward_loss")
def check_forward(fixture: Fixture):
    model, inputs, out = _model(fixture).train(), fixture.inputs, fixture.outputs
    unchecked = set(out)

    def same(actual, name, tol=1e-4):
        assert_close(actual, out[name], tol, name)
        unchecked.discard(name)

    tokens = from_maps(inputs["latents"], packing=fixture.config["patch_size"])
    same(tokens, "patches")
    condition = model.drop(model.vocabulary.labels(inputs["labels"].tolist()), inputs["label_drop_u"])
    shown = model.draw_shown(inputs["orders"], inputs["mask_rate"].item())
    features, masked = model.masked_features(condition, tokens, shown)
    same(masked.float(), "mask")
    same(features, "z")
    encoded = model.encode(*model.context(condition), model.z_proj(tokens), shown, model.encoder_pos_embed_learned)
    same(encoded, "encoder")
    rounds = model.config.diffusion_batch
    rows, targets = (part.flatten(0, 1).repeat(rounds, 1) for part in (features, tokens))
    t, noise, head = inputs["t"], inputs["noise"], model.diffloss
    mse, bits = diffusion_terms(
        head.process, head.net(head.process.noised(targets, t, noise), t, rows), targets, noise, t
    )
    same(mse, "mse")
    assert_close(bits[t > 0], out["vb"][t > 0], what="vb")
    same(bits, "vb", 1e-3)  # t = 0 is a difference of nearly equal numbers in fp32
    loss = model.loss(condition, tokens, shown, t, noise)["loss"]
    same(loss.view_as(out["loss"]), "loss")
    loss.backward()
    parameters = dict(model.named_parameters())
    for name in [key for key in out if key.startswith("grad/")]:
        same(parameters[name.removeprefix("grad/")].grad, name)
    assert not unchecked, f"recorded but not checked: {sorted(unchecked)}"


class RunNoise:
    """The draws of a run: those of its steps, one after the other."""

    def __init__(self, inputs: dict[str, torch.Tensor], steps: int):
        self.steps = [SubstepNoise(inputs[f"step{i}/init_noise"], inputs[f"step{i}/noise"]) for i in range(steps)]

    def normal(self, stream, step, shape, dtype=torch.float32):
        return self.steps[step.index].normal(stream, step, shape, dtype)


@checker("mar.generate")
@torch.no_grad()
def check_generate(fixture: Fixture):
    model, config, inputs, out = _model(fixture), fixture.config, fixture.inputs, fixture.outputs
    run, spacing, unchecked = config["sampling"], config["num_sampling_steps"], set(out)

    def same(actual, name, tol=1e-4):
        assert_close(actual, out[name], tol, name)
        unchecked.discard(name)

    steps, batch, labels = run["num_iter"], run["bsz"], run.get("labels")
    guidance = ClassifierFree(run["cfg"], SCHEDULES[run["cfg_schedule"]])
    null = model.vocabulary.null(batch)
    conditions = [null if labels is None else model.vocabulary.labels(labels), null]
    noise, head = RunNoise(inputs, steps), model.diffloss
    canvas = Canvas.blank(model.grid, batch, channels=model.config.channels)
    state = model.start(conditions[: len(guidance.rows)], canvas)

    def predict(state, step, canvas):
        name, weights = f"step{step.index}", guidance.weights(step)
        assert_equal(~canvas.known, out[f"{name}/mask"], f"{name}/mask")
        unchecked.discard(f"{name}/mask")
        same(torch.full((1,), weights[0]), f"{name}/cfg")
        if f"{name}/z_all" in out:
            tokens, masked = canvas.values.repeat(state.rows, 1, 1), ~canvas.known.repeat(state.rows, 1)
            same(model.run(state.context, tokens, masked, state.visible), f"{name}/z_all")
        prediction = MARModel.predict(model, state, step, canvas)
        z = rearrange(prediction.features, "r b m d -> (r b m) d")
        same(z, f"{name}/z")
        process = head.process.respaced(spacing)
        same(
            both_halves(head.net, z, guidance, weights, noise.steps[step.index], process, run["temperature"]),
            f"{name}/sampled",
        )
        return prediction

    model.predict = predict
    order, choice = RecordedOrder(model.grid, inputs["orders"], steps), DiffusionChoice(run["temperature"], spacing)
    for _ in decode(model, state, canvas, order, guidance, choice, noise):
        pass
    same(to_maps(canvas.values, model.grid, config["patch_size"]), "tokens")
    assert state.counters.calls == steps
    assert not unchecked, f"recorded but not checked: {sorted(unchecked)}"
