"""Hi-MAR: the grid head, the training forward with its gradients, and whole sampling runs over both phases."""

import re

import torch
from einops import rearrange
from parity.checkers.mar_diffusion import both_halves
from parity.checkers.mar_model import SCHEDULES, RunNoise, autoencoder_options, set_norm_eps
from parity.checkers.maskgen import RecordedOrder
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.models.mar.himar import DENSE, LOSS_WEIGHTS, LOW, LOW_STEPS, HiMARModel
from vgen.models.mar.himar_head import GridDenoiser
from vgen.samplers.choice import DiffusionChoice, PhaseChoice
from vgen.samplers.decode import decode
from vgen.samplers.diffusion import ancestral
from vgen.samplers.diffusion_loss import diffusion_terms
from vgen.samplers.guidance import ClassifierFree, PhaseGuidance
from vgen.samplers.noise import DIFFUSION
from vgen.samplers.orders.levels import LevelsOrder
from vgen.samplers.predictions import GridDiffusion
from vgen.samplers.types import Canvas, Step
from vgen.tokenizers_vis.base import from_maps, to_maps

RELEASED_WEIGHTS = (2.0 * 64 / 320, 0.75 * 256 / 320)  # of the two losses, in the released training step


class GridNoise:
    """Recorded draws of one run of the grid head: `initial` [n, L, C] and one [n, L, C] per substep, largest t first."""

    def __init__(self, initial: torch.Tensor, draws: torch.Tensor):
        self.initial, self.draws = from_maps(initial), [from_maps(draw) for draw in draws]

    def normal(self, stream, step, shape, dtype=torch.float32):
        k = stream - DIFFUSION - 1
        rows = self.initial if k < 0 else self.draws[-1 - k]
        return rows[: shape[0]].view(shape)  # guided runs record unconditional rows, too: they have no effect


def _whole_run(head, parts, tokens, masked, guidance, weights, noise, process, temperature) -> torch.Tensor:
    """A run of the grid head as recorded: unconditional rows have a course of their own. parts [R, n, L, D], tokens [R * n, L, C]."""
    rows, size = parts.shape[:2]
    initial = noise.initial if len(noise.initial) == rows * size else noise.initial.repeat(rows, 1, 1)

    def denoise(x, t):
        predicted = head(x[:size].repeat(rows, 1, 1), t, parts.flatten(0, 1))
        return guidance.mix(predicted.unflatten(0, (rows, size)), weights).repeat(rows, 1, 1), None

    def given(x, k):
        return torch.where(masked[..., None], x, process.noised(tokens, k, initial))

    return ancestral(denoise, process, initial, lambda k: noise.draws[-1 - k], temperature, given)


@checker("himar.dit_head")
def check_head(fixture: Fixture):
    config, inputs, out = fixture.config, fixture.inputs, fixture.outputs
    grid = (1, config["grid"], config["grid"])
    widths = (config["width"], config["depth"], config["heads"], config["mlp_ratio"])
    denoiser = GridDenoiser(grid, config["target_channels"], config["z_channels"], *widths)
    same_positions = denoiser.net.pos_embed.clone()
    denoiser.load_state_dict(fixture.weights)
    net, train, unchecked = denoiser.net, denoiser.process, set(out)
    x, z, tokens = (from_maps(inputs[name]) for name in ("x", "z", "tokens"))
    t, masked = inputs["t"], inputs["mask"].flatten(1)

    def same(actual, name, tol=1e-4):
        assert_close(actual, out[name], tol, name)
        unchecked.discard(name)

    def same_map(actual, name, tol=1e-4):
        same(to_maps(actual, grid), name, tol)

    same(same_positions, "pos_embed")
    same_map(net(x, t, z), "net")
    half, every = len(x) // 2, grid[1] * grid[2]
    scale = float(re.search(r"forward_with_cfg\(\.\.\.,([\d.]+)\)", fixture.notes).group(1))
    guidance, one = ClassifierFree(scale), Step(0, torch.arange(every), every, (every, 0), 1, every)
    # The recording has other timesteps in the unconditional rows, which no sampler does: the head gets them all.
    prediction = GridDiffusion(
        z.unflatten(0, (2, half)), tokens[:half], masked[:half], lambda x, _, z: net(x, t, z), train
    )
    same_map(prediction.noise(x[:half], t[:half], guidance, guidance.weights(one)).repeat(2, 1, 1), "net_cfg", 1e-3)

    # single ancestral steps
    spacing = re.search(r"true '(\w+)' respacing", fixture.notes).group(1)
    temperature = float(re.search(r"respaced index, temperature ([\d.]+)", fixture.notes).group(1))
    process, samples, cleans = train.respaced(spacing), [], []
    for k, noise in zip(inputs["p_sample/index"].tolist(), inputs["p_sample/noise"]):
        predicted = net(x, torch.full((len(x),), process.timesteps[k]), z)
        clean = process.clean(x, k, predicted)
        spread = (0.5 * process.log_variance(None, k, x.device)).exp()
        step = process.posterior_mean(clean, x, k) + (k > 0) * spread * from_maps(noise) * temperature
        samples.append(to_maps(step, grid))
        cleans.append(to_maps(clean, grid))
    same(torch.stack(samples), "p_sample/sample")
    same(torch.stack(cleans), "p_sample/pred_xstart")

    # whole runs with known tokens
    process = train.respaced(config["phase2_sampling_steps"])
    for name, scale, temperature in (("cfg", config["cfg"], config["temperature"]), ("nocfg", 1.0, 1.0)):
        guidance, choice = ClassifierFree(scale), DiffusionChoice(temperature, config["phase2_sampling_steps"])
        rows, weights = len(guidance.rows), guidance.weights(one)
        parts, size = z.unflatten(0, (rows, -1)), len(z) // rows
        noise = GridNoise(inputs[f"{name}/init_noise"], inputs[f"{name}/noise"])
        prediction = denoiser.prediction(parts, tokens[:size], masked[:size], 0)
        drawn = to_maps(prediction.draw(one, guidance, choice, noise).values, grid)
        assert_close(drawn, out[f"{name}/sample"][:size], what=f"{name}: drawn")
        same_map(
            _whole_run(net, parts, tokens, masked, guidance, weights, noise, process, temperature),
            f"{name}/sample",
        )

    # training
    z = z.clone().requires_grad_()
    draws = inputs["loss/t"], from_maps(inputs["loss/noise"])
    error = denoiser.error(z, tokens, *draws) * masked[..., None]
    same(error.mean(dim=(1, 2)), "loss/mse")
    loss = denoiser.loss(z, tokens, masked, *draws)["loss"]
    same(loss.view_as(out["loss/loss"]), "loss/loss")
    loss.backward()
    same_map(z.grad, "loss/grad_z")
    assert not unchecked, f"recorded but not checked: {sorted(unchecked)}"


def _model(fixture: Fixture) -> HiMARModel:
    config = fixture.config
    options, scale = autoencoder_options(config), config["cond_scale"]
    width = options.pop("encoder_width")
    assert options.pop("decoder_width") == width and config["cond_dim"] == options["channels"]
    assert config["seq_len"] == options["grid"][0] * options["grid"][1]
    model = HiMARModel.from_original(
        fixture.weights,
        {
            **options,
            "width": width,
            "low_grid": (scale, scale),
            "head_width": config["diffloss_w"],
            "head_layers": config["diffloss_d"],
            "grid_head_width": config["gdm_w"],
            "grid_head_layers": config["gdm_d"],
            "grid_head_heads": config["head"],
            "grid_head_mlp_ratio": config["ratio"],
            "dropout": config["proj_dropout"],
            "attention_dropout": config["attn_dropout"],
            "diffusion_batch": config["diffusion_batch_mul"],
            "dense_masks": "cosine" if config["cos"] else "normal",
            "pivot_rate": config["step_stage2_rate"],
        },
    )
    set_norm_eps(model, config)
    return model


@checker("himar.forward_loss")
def check_forward(fixture: Fixture):
    model, config, inputs, out = _model(fixture).train(), fixture.config, fixture.inputs, fixture.outputs
    unchecked = set(out)

    def same(actual, name, tol=1e-4):
        assert_close(actual, out[name], tol, name)
        unchecked.discard(name)

    tokens, low, noise2 = (from_maps(inputs[name]) for name in ("latents", "cond", "noise2"))
    length, (rate1, rate2) = low.shape[1], (inputs[f"mask_rate{phase}"].item() for phase in (1, 2))
    if config["cos"]:
        assert abs(model.dense_rate(inputs["mask_rate2_u"].item()) - rate2) < 1e-6
    low_shown = model.draw_shown(inputs["orders"][:, :length], rate1)
    shown = model.draw_shown(inputs["orders"][:, length:] - length, rate2)
    steered = model.steered(inputs["small_cond_u"], min(1.0, config["epoch"] / config["step_warmup"]))
    drops = torch.stack((inputs["label_drop_u1"], inputs["label_drop_u2"]))
    labels = model.vocabulary.labels(inputs["labels"].tolist())
    run, seen = model.run, []

    def spy(context, phase, x, masked, visible):
        features = run(context, phase, x, masked, visible)
        seen.append((masked, features))
        return features

    model.run = spy
    encoded = []
    model.encoder_norm.register_forward_hook(lambda _, __, result: encoded.append(result))
    draws = inputs["t1"], inputs["noise1"], inputs["t2"], noise2
    loss = model.loss(labels, tokens, low, low_shown, shown, drops, steered, *draws)["loss"]
    for phase, ((masked, features), visible) in enumerate(zip(seen, encoded, strict=True), 1):
        same(masked.float(), f"mask{phase}")
        same(features, f"z{phase}")
        same(visible, f"encoder{phase}")

    rounds = model.config.diffusion_batch
    rows, targets = (part.flatten(0, 1).repeat(rounds, 1) for part in (seen[LOW][1][:, :length], low))
    weight = seen[LOW][0][:, :length].flatten().repeat(rounds).float()
    t, noise, head = inputs["t1"], inputs["noise1"], model.diffloss
    output = head.net(head.process.noised(targets, t, noise), t, rows)
    mse, bits = diffusion_terms(head.process, output, targets, noise, t)
    same(mse, "mlp_mse")
    assert_close(bits[t > 0], out["mlp_vb"][t > 0], what="mlp_vb")
    same(bits, "mlp_vb", 1e-3)  # t = 0 is a difference of nearly equal numbers in fp32
    same(mse + bits, "mlp_loss", 1e-3)
    coarse = 2.0 * ((mse + bits) * weight).sum() / weight.sum()
    same(coarse.view_as(out["loss1"]), "loss1", 1e-3)
    rows, targets = (part.repeat(rounds, 1, 1) for part in (seen[DENSE][1][:, length:], tokens))
    masked = seen[DENSE][0][:, length:].repeat(rounds, 1)
    error = (model.cond_diffloss.error(rows, targets, inputs["t2"], noise2) * masked[..., None]).mean(dim=(1, 2))
    same(error, "dit_mse")
    same(error, "dit_loss")
    same(0.75 * error.mean().view_as(out["loss2"]), "loss2")
    assert LOSS_WEIGHTS == RELEASED_WEIGHTS
    same(loss.view_as(out["loss"]), "loss")

    loss.backward()
    parameters = dict(model.named_parameters())
    for name in [key for key in out if key.startswith("grad/")]:
        same(parameters[name.removeprefix("grad/")].grad, name)
    assert not unchecked, f"recorded but not checked: {sorted(unchecked)}"


class PhasesNoise:
    """The draws of a run: those of the first phase, then those of the second."""

    def __init__(self, inputs: dict[str, torch.Tensor], low_steps: int, steps: int):
        first = {key.removeprefix("p1/"): value for key, value in inputs.items() if key.startswith("p1/")}
        self.steps = [
            *RunNoise(first, low_steps).steps,
            *(GridNoise(*(inputs[f"p2/step{i}/{name}"] for name in ("init_noise", "noise"))) for i in range(steps)),
        ]

    def normal(self, stream, step, shape, dtype=torch.float32):
        return self.steps[step.index].normal(stream, step, shape, dtype)


@checker("himar.generate")
@torch.no_grad()
def check_generate(fixture: Fixture):
    model, config, inputs, out = _model(fixture), fixture.config, fixture.inputs, fixture.outputs
    run, unchecked = config["sampling"], set(out)
    batch, labels, temperature = run["bsz"], run.get("labels"), run["temperature"]
    length, low_steps = config["cond_scale"] ** 2, LOW_STEPS * config["cond_scale"]

    def same(actual, name, tol=1e-4):
        assert_close(actual, out[name], tol, name)
        unchecked.discard(name)

    guidance = PhaseGuidance(
        tuple(ClassifierFree(run[name], SCHEDULES[run["cfg_schedule"]]) for name in ("re_cfg", "cfg"))
    )
    spacings = config["num_sampling_steps"], config["phase2_sampling_steps"]
    choice = PhaseChoice(tuple(DiffusionChoice(temperature, spacing) for spacing in spacings))
    places = inputs["orders"].split([length, inputs["orders"].shape[1] - length], dim=1)
    order = LevelsOrder(
        (
            RecordedOrder(model.grids[LOW], places[LOW], low_steps),
            RecordedOrder(model.grids[DENSE], places[DENSE] - length, run["num_iter"]),
        )
    )
    null = model.vocabulary.null(batch)
    conditions = [null if labels is None else model.vocabulary.labels(labels), null]
    noise = PhasesNoise(inputs, low_steps, run["num_iter"])
    canvas = Canvas.blank(model.grids, batch, channels=model.config.channels)
    state = model.start(conditions[: len(guidance.rows)], canvas)
    everything, drafts, network = [], [torch.zeros_like(canvas.part(DENSE).values)], model.run

    def spy(*args):
        everything.append(network(*args))
        return everything[-1]

    def predict(state, step, canvas):
        name = f"p{step.phase + 1}/step{step.index - step.phase * low_steps}"
        known = canvas.known
        assert_equal(~known, out[f"{name}/mask"], f"{name}/mask")
        unchecked.discard(f"{name}/mask")
        weights = guidance.phases[step.phase].weights(step)
        rows = len(weights)  # of the recording, which runs no unconditional rows where there is no guidance
        same(torch.full((1,), weights[0]), f"{name}/cfg")
        prediction = HiMARModel.predict(model, state, step, canvas)
        if f"{name}/z_all" in out:
            same(everything[-1][: rows * batch], f"{name}/z_all")
        parts, recorded = prediction.features[:rows], noise.steps[step.index]
        if step.phase == LOW:
            z, head = rearrange(parts, "r b m d -> (r b m) d"), model.diffloss
            same(z, f"{name}/z")
            process = head.process.respaced(spacings[LOW])
            sampled = both_halves(head.net, z, guidance, weights, recorded, process, temperature)
            same(sampled, f"{name}/sampled")
        else:
            tokens, masked = prediction.tokens.repeat(rows, 1, 1), prediction.masked.repeat(rows, 1)
            # The release writes all that was denoised to the grid, though nothing reads what stays masked.
            written = torch.where(prediction.masked[..., None], drafts[-1], prediction.tokens)
            same(
                to_maps(written, model.grid).repeat(rows, 1, 1, 1)[: len(out[f"{name}/head_tokens"])],
                f"{name}/head_tokens",
            )
            head = model.cond_diffloss
            process = head.process.respaced(spacings[DENSE])
            sampled = _whole_run(head.net, parts, tokens, masked, guidance, weights, recorded, process, temperature)
            same(to_maps(sampled, model.grid), f"{name}/sampled")
            drafts.append(sampled[:batch])
        return prediction

    model.run, model.predict = spy, predict
    for _ in decode(model, state, canvas, order, guidance, choice, noise):
        pass
    low, dense = (canvas.part(level).values for level in (LOW, DENSE))
    same(state.pivots[:batch], "small_z")
    same(to_maps(low, model.grids[LOW]), "small_tokens")
    same(to_maps(dense, model.grids[DENSE]), "tokens")
    assert state.counters.calls == low_steps + run["num_iter"]
    assert not unchecked, f"recorded but not checked: {sorted(unchecked)}"
