"""Gaussian diffusion: the process against its definition, solvers on a distribution whose noise is known, the training terms."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from vgen.errors import VgenError
from vgen.layers.diffusion_head import DiffusionHead
from vgen.samplers.choice import DiffusionChoice
from vgen.samplers.diffusion import BETAS, GaussianDiffusion, ancestral, ddim, solver, spaced_timesteps
from vgen.samplers.diffusion_loss import diffusion_terms, discretised_log_likelihood, gaussian_kl
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.predictions import Diffusion
from vgen.samplers.types import Step


@pytest.mark.parametrize("schedule, name", [("cosine", "squaredcos_cap_v2"), ("linear", "linear")])
def test_betas_are_those_of_diffusers(schedule, name):
    """The one table of theirs that agrees, up to fp32."""
    theirs = DDPMScheduler(num_train_timesteps=1000, beta_schedule=name, beta_start=1e-4, beta_end=0.02).betas
    torch.testing.assert_close(torch.tensor(BETAS[schedule](1000)), theirs, rtol=2e-4, atol=1e-6)


def test_spacings():
    assert spaced_timesteps("4") == [0, 333, 666, 999] and spaced_timesteps("1") == [0]
    assert spaced_timesteps("ddim5") == [0, 200, 400, 600, 800]
    assert spaced_timesteps("100")[:8] == [0, 10, 20, 30, 40, 50, 61, 71] and spaced_timesteps("100")[-1] == 999
    assert spaced_timesteps("3,2,1") == [0, 166, 333, 334, 666, 667]
    assert spaced_timesteps("1000") == list(range(1000))
    for wrong in ("", "0", "1001", "ddim999", "ten", "400,400,400", "-3"):
        with pytest.raises(VgenError):
            spaced_timesteps(wrong)


@pytest.mark.parametrize("spacing", ["", "50", "ddim20"])
def test_respacing_keeps_the_signal_of_the_kept_timesteps(spacing):
    train = GaussianDiffusion.named("cosine")
    process = train.respaced(spacing)
    assert process is train.respaced(spacing), "made once"
    kept = train.tables["alpha_bar"][process.timesteps]
    torch.testing.assert_close(process.tables["alpha_bar"], kept, rtol=1e-10, atol=0)
    # The posterior's mean of a noiseless pair is the point on the way.
    x0 = torch.ones(1, 1)
    k = len(process) // 2
    x = process.tables["signal"][k].float() * x0
    mean = process.posterior_mean(x0, x, k)
    torch.testing.assert_close(mean, process.tables["signal"][k - 1].float().view(1, 1), rtol=1e-4, atol=1e-5)


def gaussian_denoiser(process, mean, deviation):
    """The exact noise prediction for data N(mean, deviation^2): E[noise | x_t]."""
    place = {t: k for k, t in enumerate(process.timesteps)}

    def denoise(x, t):
        k = place[int(t[0])]
        signal, noise = (process.tables[name][k].float() for name in ("signal", "noise"))
        return noise * (x - signal * mean) / (signal**2 * deviation**2 + noise**2), None

    return denoise


@pytest.mark.parametrize("solve", [ancestral, ddim])
def test_solvers_reach_the_data(solve):
    process = GaussianDiffusion.named("cosine").respaced("100")
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, generator=draw)
    normal = lambda k: torch.randn(4000, 1, generator=draw)  # noqa: E731
    found = solve(gaussian_denoiser(process, 1.5, 0.5), process, x, normal, 1.0)
    assert found.mean().item() == pytest.approx(1.5, abs=0.05) and found.std().item() == pytest.approx(0.5, abs=0.05)


def test_the_temperature_narrows_ancestral_samples():
    process = GaussianDiffusion.named("cosine").respaced("100")
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, generator=draw)
    denoise = gaussian_denoiser(process, 0.0, 1.0)
    spread = [
        ancestral(denoise, process, x, lambda k: torch.randn(4000, 1, generator=draw), t).std() for t in (1.0, 0.5, 0)
    ]
    assert spread[0] > spread[1] > spread[2]


def test_the_last_substep_draws_no_noise():
    process, asked = GaussianDiffusion.named("cosine").respaced("5"), []

    def normal(k):
        asked.append(k)
        return torch.zeros(2, 3)

    ancestral(lambda x, t: (torch.zeros_like(x), torch.zeros_like(x)), process, torch.zeros(2, 3), normal)
    assert asked == [4, 3, 2, 1]


def test_variances_lie_between_the_posterior_and_beta():
    process = GaussianDiffusion.named("linear").respaced("10")
    table, device = process.on(torch.device("cpu")), torch.device("cpu")
    spread = torch.tensor([[-1.0], [1.0]])
    low, high = process.log_variance(spread, 4, device).flatten()
    torch.testing.assert_close(low, table["posterior_log_variance"][4])
    torch.testing.assert_close(high, table["log_beta"][4])
    fixed = process.log_variance(None, 4, device)
    torch.testing.assert_close(fixed, table["log_beta"][4])
    torch.testing.assert_close(process.log_variance(None, 0, device), table["posterior_log_variance"][0])


def test_only_the_variance_learns_from_the_bound():
    process = GaussianDiffusion.named("cosine")
    x0, noise, t = torch.randn(6, 2), torch.randn(6, 2), torch.tensor([0, 1, 10, 500, 900, 999])
    output = torch.randn(6, 4, requires_grad=True)
    mse, bits = diffusion_terms(process, output, x0, noise, t)
    assert mse.shape == bits.shape == (6,) and (bits > 0).all()
    gradient = torch.autograd.grad(bits.sum(), output)[0]
    assert (gradient[:, :2] == 0).all() and (gradient[:, 2:] != 0).any()
    right = torch.cat((noise, -torch.ones(6, 2)), dim=1)  # the true noise, with the posterior's own variance
    mse, bits = diffusion_terms(process, right, x0, noise, t)
    assert mse.max() == 0 and bits[1:].abs().max() < 1e-3


def test_likelihoods_of_bins_sum_to_one():
    levels = torch.linspace(-1, 1, 256)
    logs = discretised_log_likelihood(levels, torch.tensor(0.3), torch.tensor(math.log(0.2)))
    assert logs.exp().sum().item() == pytest.approx(1, abs=1e-3)
    assert gaussian_kl(*torch.tensor([0.0, 0.0, 1.0, 0.0])).item() == pytest.approx(0.5)


# ---------------------------------------------------------------- the prediction


def prediction(rows=2, batch=3, size=2, channels=4):
    torch.manual_seed(0)
    head = DiffusionHead(channels, 8, 16, 1)
    return Diffusion(torch.randn(rows, batch, size, 8), head, GaussianDiffusion.named(), channels)


def drawn(made, samples, choice=None, guidance=None):
    one = Step(0, torch.tensor([5, 2]), 2, (4, 2), 2, 4)
    choice, guidance = choice or DiffusionChoice(substeps="ddim10"), guidance or ClassifierFree(2.0)
    with torch.no_grad():
        return made.draw(one, guidance, choice, PhiloxNoise(7, samples)).values


def test_tokens_do_not_depend_on_their_batch():
    made = prediction()
    together = drawn(made, torch.tensor([4, 5, 6]))
    alone = Diffusion(made.features[:, 1:2], made.head, made.process, made.channels)
    torch.testing.assert_close(drawn(alone, torch.tensor([5])), together[1:2], atol=1e-4, rtol=1e-4)


def test_guidance_of_one_is_the_conditional_row():
    made = prediction()
    alone = Diffusion(made.features[:1], made.head, made.process, made.channels)
    plain = drawn(alone, torch.arange(3), guidance=ClassifierFree(1.0))
    assert plain.shape == (3, 2, 4) and not torch.allclose(drawn(made, torch.arange(3)), plain)
    same = Diffusion(made.features[:1].repeat(2, 1, 1, 1), made.head, made.process, made.channels)
    torch.testing.assert_close(drawn(same, torch.arange(3)), plain, atol=1e-4, rtol=1e-4)


def test_settings_are_checked_and_ddim_draws_the_first_noise_only():
    made = prediction()
    ddims = [drawn(made, torch.arange(3), DiffusionChoice(t, "ddim10", "ddim")) for t in (1.0, 0.0)]
    assert torch.equal(*ddims)
    with pytest.raises(VgenError, match="did you mean 'ancestral'"):
        solver("ancestrel")
    with pytest.raises(VgenError, match="at least 0"):
        DiffusionChoice(-1.0)
    with pytest.raises(VgenError, match="did you mean 'cosine'"):
        GaussianDiffusion.named("cosin")


def test_a_fresh_head_predicts_nothing():
    head = DiffusionHead(4, 8, 16, 2)
    head.reset_parameters()
    out = head(torch.randn(5, 4), torch.randint(1000, (5,)), torch.randn(5, 8))
    assert out.shape == (5, 8) and (out == 0).all()


def test_the_variational_bound_is_in_bits():
    """KL between the true and the predicted posterior; at t = 0 the likelihood of the bin of x_0. Against torch.distributions."""
    process, rng = GaussianDiffusion.named("cosine"), torch.Generator().manual_seed(0)
    t = torch.tensor([0, 1, 30, 400, 900])
    x0, noise = 0.5 * torch.randn(2, 5, 3, generator=rng)
    output = torch.cat((noise + 0.2 * torch.randn(5, 3, generator=rng), torch.rand(5, 3, generator=rng) * 2 - 1), dim=1)
    mse, bits = diffusion_terms(process, output, x0, noise, t)
    torch.testing.assert_close(mse, (output[:, :3] - noise).square().mean(dim=1))
    table = {name: values[t][:, None] for name, values in process.tables.items()}
    x = table["signal"] * x0 + table["noise"] * noise
    clean = (x - table["noise"] * output[:, :3]) / table["signal"]
    true, mean = (table["posterior_x0"] * start + table["posterior_x"] * x for start in (x0, clean))
    share = (output[:, 3:] + 1) / 2
    deviation = (0.5 * (share * table["log_beta"] + (1 - share) * table["posterior_log_variance"])).exp()
    made = torch.distributions.Normal(mean, deviation)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(true, (0.5 * table["posterior_log_variance"]).exp()), made
    )
    bin = made.cdf(x0 + 1 / 255) - made.cdf(x0 - 1 / 255)
    expected = torch.where(t == 0, -bin.log().mean(dim=1), kl.mean(dim=1)) / math.log(2)
    torch.testing.assert_close(bits[1:], expected[1:].float(), rtol=1e-3, atol=1e-5)
    assert bits[0].item() == pytest.approx(expected[0].item(), rel=0.02)  # the tanh approximation of the normal


@pytest.mark.parametrize("clip", [None, 0.4])
def test_ancestral_substeps_are_their_formula(clip):
    """mean of q(x_{t-1} | x_t, x_0) + temperature · deviation · N, with x_0 kept within the bound; no noise at the end."""
    process = GaussianDiffusion.named("cosine").respaced("4", clip)
    rng = torch.Generator().manual_seed(0)
    x, normals = torch.randn(3, 2, generator=rng), torch.randn(4, 3, 2, generator=rng)
    found = ancestral(lambda x, t: (0.3 * x, -torch.ones_like(x)), process, x, lambda k: normals[k], 0.7)
    expected, table = x.double(), process.tables
    for k in (3, 2, 1, 0):
        start = (expected - table["noise"][k] * 0.3 * expected) / table["signal"][k]
        start = start if clip is None else start.clamp(-clip, clip)
        expected = table["posterior_x0"][k] * start + table["posterior_x"][k] * expected
        if k:
            expected = expected + 0.7 * table["posterior_variance"][k].sqrt() * normals[k]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_only_the_noise_is_guided_and_the_variance_is_the_conditional_rows():
    features = torch.tensor([1.0, -2.0])[:, None, None, None].expand(2, 3, 2, 1)
    made = Diffusion(features, lambda x, t, z: torch.cat((z, 10 * z), dim=1), GaussianDiffusion.named(), 1)
    noise, spread = made.denoise(torch.zeros(6, 1), torch.zeros(6, dtype=torch.long), ClassifierFree(3.0), (3.0, -2.0))
    assert noise.flatten().tolist() == [3.0 + 4.0] * 6 and spread.flatten().tolist() == [10.0] * 6
