"""MAR's Gaussian diffusion and its per-token head; MaskGen's tables are of the same process."""

import re

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.layers.diffusion_head import DiffusionHead
from vgen.layers.sinusoid import cos_sin
from vgen.samplers.choice import DiffusionChoice
from vgen.samplers.diffusion import GaussianDiffusion, ancestral
from vgen.samplers.diffusion_loss import diffusion_terms
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.noise import DIFFUSION
from vgen.samplers.predictions import Diffusion
from vgen.samplers.types import Step

# recorded table -> ours
TABLES = {
    "betas": "beta",
    "alphas_cumprod": "alpha_bar",
    "alphas_cumprod_prev": "alpha_bar_before",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance_clipped": "posterior_log_variance",
    "posterior_mean_coef1": "posterior_x0",
    "posterior_mean_coef2": "posterior_x",
    "sqrt_recip_alphas_cumprod": "x0_of_x",
    "sqrt_recipm1_alphas_cumprod": "x0_of_noise",
    "fixed_large_variance": "fixed_large_variance",
}


def check_process(process: GaussianDiffusion, recorded: dict[str, torch.Tensor], what: str) -> None:
    """Every recorded table of one process, relative to each entry (fp64 on both sides)."""
    for name, table in recorded.items():
        name = name.removesuffix("_f64")
        if name in ("timestep_map", "timesteps"):
            assert_equal(torch.tensor(process.timesteps), table, f"{what}: {name}")
        else:
            torch.testing.assert_close(
                process.tables[TABLES[name]], table, rtol=1e-9, atol=1e-12, msg=f"{what}: {name}"
            )


def grouped(outputs: dict[str, torch.Tensor], separator: str) -> dict[str, dict[str, torch.Tensor]]:
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in outputs.items():
        group, found, name = key.partition(separator)
        if found:
            groups.setdefault(group, {})[name] = value
    return groups


@checker("mar.diffusion_tables")
def check_mar_tables(fixture: Fixture):
    config, out = fixture.config, fixture.outputs
    process = GaussianDiffusion.named(config["noise_schedule"], config["diffusion_steps"])
    groups = grouped(out, "/")
    spacings = {spacing.replace(",", "_") or "train": spacing for spacing in config["respacings"]}
    assert groups.keys() == spacings.keys()
    for group, recorded in groups.items():
        check_process(process.respaced(spacings[group]), recorded, group)
    embeddings = [key for key in out if key.startswith("timestep_embedding_")]
    for key in embeddings:
        assert_close(cos_sin(fixture.inputs["t"], int(key.rpartition("_")[2])), out[key], what=key)
    assert len(embeddings) + sum(map(len, groups.values())) == len(out)


@checker("maskgen.diffusion_tables")
def check_maskgen_tables(fixture: Fixture):
    config = fixture.config
    process = GaussianDiffusion.named(config["schedule"], config["steps"])
    groups = grouped(fixture.outputs, ".")
    spacings = {name: s for s in config["respacing"] for name in (s or "full", s.replace(",", "_") or "full")}
    assert groups.keys() <= spacings.keys() and len(groups) == len(config["respacing"])
    for group, recorded in groups.items():
        check_process(process.respaced(spacings[group]), recorded, group)


class SubstepNoise:
    """Recorded draws of one run of the head: `initial` [n, C], and one tensor per substep in call order (largest t first)."""

    def __init__(self, initial: torch.Tensor, draws: torch.Tensor):
        self.initial, self.draws = initial, draws

    def normal(self, stream, step, shape, dtype=torch.float32):
        k = stream - DIFFUSION - 1
        rows = self.initial if k < 0 else self.draws[len(self.draws) - 1 - k]
        return rows[: shape[0] * shape[1]].view(
            shape
        )  # guided runs record unconditional rows, too: they have no effect


def both_halves(head, c, guidance, weights, noise, process, temperature) -> torch.Tensor:
    """A run as recorded: unconditional rows have a course of their own, which nothing reads but the recording. c: [R * n, D]."""
    rows, size = len(weights), len(c) // len(weights)

    def denoise(x, t):
        predicted, spread = head(x[:size].repeat(rows, 1), t, c).chunk(2, dim=-1)
        return guidance.mix(predicted.unflatten(0, (rows, size)), weights).repeat(rows, 1), spread

    return ancestral(denoise, process, noise.initial.repeat(rows, 1), lambda k: noise.draws[-1 - k], temperature)


@checker("mar.diffloss")
def check_diffloss(fixture: Fixture):
    config, inputs, out = fixture.config, fixture.inputs, fixture.outputs
    channels = config["target_channels"]
    head = DiffusionHead(channels, config["z_channels"], config["width"], config["depth"])
    head.load_state_dict({key.removeprefix("net."): value for key, value in fixture.weights.items()})
    train = GaussianDiffusion.named()
    unchecked = set(out)
    option = {
        "guided scale": r"forward_with_cfg\(x,t,c,([\d.]+)\)",
        "one-step spacing": r"p_sample/\*: one ancestral step of the '(\w+)' respacing",
        "one-step temperature": r"p_sample/noise\[j\], temperature ([\d.]+)",
        "four spacing": r"four/\*: as cfg/\* with respacing '(\w+)'",
    }
    option = {name: re.search(pattern, fixture.notes).group(1) for name, pattern in option.items()}

    def same(actual, name, tol=1e-4):
        assert_close(actual, out[name], tol, name)
        unchecked.discard(name)

    # the network, alone and guided (half of the rows are unconditional and see the same noisy tokens)
    x, t, c = (inputs[f"net/{name}"] for name in ("x", "t", "c"))
    half = len(x) // 2
    with torch.no_grad():
        same(head(x, t, c), "net/out")
        same(train.noised(x, t, x.flip(0)), "net/q_sample")
        one = Step(0, torch.arange(half), half, (half, 0), 1, half)
        guidance = ClassifierFree(float(option["guided scale"]))
        # The recording has other timesteps in the unconditional rows, which no sampler does: the head gets them all.
        prediction = Diffusion(c.view(2, 1, half, -1), lambda x, _, z: head(x, t, z), train, channels)
        noise, spread = prediction.denoise(x[:half], t[:half], guidance, guidance.weights(one))
        free = head(x[:half], t[half:], c[half:])[:, channels:]
        same(torch.cat((torch.cat((noise, spread), 1), torch.cat((noise, free), 1))), "net/out_cfg", 1e-3)

    # single ancestral steps
    process, temperature = train.respaced(option["one-step spacing"]), float(option["one-step temperature"])
    samples, cleans = [], []
    with torch.no_grad():
        for k, noise in zip(inputs["p_sample/index"].tolist(), inputs["p_sample/noise"]):
            timesteps = torch.full((len(x),), process.timesteps[k])
            predicted, spread = head(x, timesteps, c).chunk(2, dim=-1)
            clean = process.clean(x, k, predicted)
            spread = (0.5 * process.log_variance(spread, k, x.device)).exp()
            samples.append(process.posterior_mean(clean, x, k) + (k > 0) * spread * noise * temperature)
            cleans.append(clean)
    same(torch.stack(samples), "p_sample/sample")
    same(torch.stack(cleans), "p_sample/pred_xstart")

    # whole runs
    runs = {
        "cfg": (config["num_sampling_steps"], config["cfg"], config["temperature"]),
        "nocfg": (config["num_sampling_steps"], 1.0, 1.0),
        "four": (option["four spacing"], config["cfg"], config["temperature"]),
    }
    for name, (substeps, scale, temperature) in runs.items():
        guidance = ClassifierFree(scale)
        rows = len(guidance.rows)
        size = len(c) // rows
        one = Step(0, torch.arange(size), size, (size, 0), 1, size)
        prediction = Diffusion(c.view(rows, 1, size, -1), head, train, channels)
        noise = SubstepNoise(inputs[f"{name}/init_noise"], inputs[f"{name}/noise"])
        with torch.no_grad():
            drawn = prediction.draw(one, guidance, DiffusionChoice(temperature, substeps), noise).values[0]
            whole = both_halves(head, c, guidance, guidance.weights(one), noise, train.respaced(substeps), temperature)
        assert_close(drawn, out[f"{name}/sample"][:size], what=f"{name}: drawn")
        same(whole, f"{name}/sample")

    # training
    x0, t, noise, mask = (inputs[f"loss/{name}"] for name in ("target", "t", "noise", "mask"))
    z = inputs["loss/z"].clone().requires_grad_()
    mse, bits = diffusion_terms(train, head(train.noised(x0, t, noise), t, z), x0, noise, t)
    same(mse, "loss/mse")
    assert_close(bits[t > 0], out["loss/vb"][t > 0], what="vb")
    same(bits, "loss/vb", 1e-3)  # t = 0 is a difference of nearly equal numbers in fp32
    loss = ((mse + bits) * mask).sum() / mask.sum()
    same(loss.view_as(out["loss/loss"]), "loss/loss", 1e-3)
    loss.backward()
    same(z.grad, "loss/grad_z")
    same(head.input_proj.weight.grad, "loss/grad_input_proj")
    same(head.final_layer.linear.weight.grad, "loss/grad_final_linear")
    assert not unchecked, f"recorded but not checked: {sorted(unchecked)}"
