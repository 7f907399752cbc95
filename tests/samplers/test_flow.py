"""Flow solvers, guidance of velocities, times of training."""

import math

import pytest
import torch

from vgen.errors import VgenError
from vgen.samplers.choice import DiffusionChoice, FlowChoice
from vgen.samplers.diffusion import GaussianDiffusion
from vgen.samplers.flow import (
    TIMES,
    FlowGuidance,
    ProjectedGuidance,
    euler,
    even_times,
    mode_times,
    noisy,
    sde,
    sde_times,
    shifted_times,
    spread_draws,
    weighted_sum,
)
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.noise import DIFFUSION, PhiloxNoise
from vgen.samplers.predictions import Diffusion, Flow, GridDiffusion, MeanFlow
from vgen.samplers.types import Step


def test_even_times_end_at_zero():
    assert even_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    with pytest.raises(VgenError, match="at least 1 step"):
        even_times(0)


def test_euler_follows_a_straight_flow_exactly_and_never_evaluates_the_end():
    data, noise, seen = torch.randn(2, 3), torch.randn(2, 3), []

    def velocity(x, t):
        seen.append(t)
        assert torch.allclose(x, noisy(data, noise, torch.full((2,), t)), atol=1e-6)
        return noise - data

    assert torch.allclose(euler(velocity, noise, even_times(5)), data, atol=1e-6)
    assert seen == [1.0, 0.8, 0.6, 0.4, 0.2]
    backwards = euler(lambda x, t: noise - data, data, even_times(3)[::-1])  # a solver goes where the times go
    assert torch.allclose(backwards, noise, atol=1e-6)


def test_euler_converges_and_keeps_the_dtype_of_the_state():
    x = torch.ones(1, 1, dtype=torch.float64)
    ends = [euler(lambda x, t: x.float(), x, even_times(n)) for n in (10, 100)]
    errors = [abs(end.item() - math.exp(-1)) for end in ends]
    assert errors[1] < errors[0] / 5 and ends[0].dtype == torch.float64


def gaussian_flow(spread, x, t):
    """The velocity of a flow to N(0, spread²): E[noise - data | x_t = x]."""
    return x * (t - (1 - t) * spread**2) / (t**2 + (1 - t) ** 2 * spread**2)


def test_the_sde_has_the_marginals_of_the_flow():
    torch.manual_seed(0)
    seen = []

    def velocity(x, t):
        assert x.dtype == torch.float32
        seen.append((t, x.std().item()))
        return gaussian_flow(0.5, x, t)

    end = sde(velocity, torch.randn(40000), 200, 1.0, lambda k: torch.randn(40000))
    assert end.dtype == torch.float32 and end.std() == pytest.approx(0.5, rel=0.02)
    for t, spread in seen[::20]:
        assert spread == pytest.approx(math.hypot(t, (1 - t) * 0.5), rel=0.02)


def test_the_sde_adds_noise_to_every_substep_but_the_last():
    asked, x = [], torch.zeros(3)

    def normal(k):
        asked.append(k)
        return torch.zeros(3)

    assert torch.equal(sde(lambda x, t: torch.zeros_like(x), x, 5, 1.0, normal), x) and asked == [0, 1, 2, 3]
    assert sde_times(4) == pytest.approx([1.0, 0.68, 0.36, 0.04, 0.0])
    with pytest.raises(VgenError, match="at least 3 substeps, got 2"):
        sde(lambda x, t: x, x, 2, 1.0, normal)


def test_scale_one_needs_one_row_and_a_function_two():
    assert FlowGuidance(1.0).rows == ProjectedGuidance(1).rows == ("cond",)
    assert FlowGuidance(1.0).weights(0.3) == (1.0,)
    guidance = FlowGuidance(lambda t: 1 + 2 * t)
    assert guidance.rows == ("cond", "null") and guidance.weights(0.5) == (2.0, -1.0)
    cond, null = torch.randn(2, 4, 3)
    mixed = guidance.start()(torch.stack((cond, null)), guidance.weights(0.5))
    assert torch.allclose(mixed, null + 2 * (cond - null), atol=1e-6)
    assert torch.equal(ProjectedGuidance(1).start()(cond[None], (1.0,)), cond)
    for scale in (-1, math.inf, math.nan):
        with pytest.raises(VgenError, match="guidance scale"):
            FlowGuidance(scale)


def test_projected_guidance_is_orthogonal_bounded_and_per_sample():
    parts = torch.randn(2, 3, 4, 5) * 10
    guidance = ProjectedGuidance(4.0)
    mixed = guidance.start()(parts, guidance.weights(1.0))
    push = (mixed - parts[0]).flatten(1)
    assert (push.norm(dim=1) <= 3 * guidance.threshold + 1e-3).all()
    assert torch.allclose((push * parts[0].flatten(1)).sum(dim=1), torch.zeros(3), atol=1e-2)
    alone = guidance.start()(parts[:, 1:2], guidance.weights(1.0))
    assert torch.allclose(alone, mixed[1:2], atol=1e-5)


def test_projected_guidance_remembers_within_a_trajectory_only():
    guidance = ProjectedGuidance(4.0, threshold=1e9)
    parts, weights = torch.randn(2, 1, 6), guidance.weights(1.0)
    mix = guidance.start()
    first, second = mix(parts, weights), mix(parts, weights)
    assert not torch.allclose(first, second)
    assert torch.equal(guidance.start()(parts, weights), first)
    # Without its three changes it is plain guidance.
    plain = ProjectedGuidance(4.0, momentum=0.0, threshold=1e9, parallel=1.0)
    assert torch.allclose(plain.start()(parts, weights), weighted_sum(parts, weights), atol=1e-5)


def test_times_of_training():
    uniform = torch.linspace(0, 1, 101)
    assert torch.allclose(mode_times(uniform, 0.0), 1 - uniform)
    for scale in (0.0, 0.25, 1.0):
        times = mode_times(uniform, scale)
        assert times[0] == pytest.approx(1) and times[-1] == pytest.approx(0, abs=1e-6)
        assert (times.diff() < 0).all()
    # Half of the draws lie in the middle 29 % of the times: 1 - u - (cos²(π u / 2) - 1 + u) at u = 1/4, 1/2 and 3/4.
    cosine = math.cos(math.pi / 8) ** 2
    middle = mode_times(torch.tensor([0.25, 0.5, 0.75]), 1.0)
    assert middle.tolist() == pytest.approx([1.5 - cosine, 0.5, cosine - 0.5])


def test_logit_normal_times_of_training():
    torch.manual_seed(0)
    uniform = torch.rand(4096, dtype=torch.float64)
    times = TIMES["logit-normal"](uniform, 0.25)
    odds = times.double().logit()
    assert odds.mean().abs() < 0.06 and odds.std() == pytest.approx(1, abs=0.04)
    assert torch.equal(times, TIMES["logit-normal"](uniform, 0.0)), "the scale is that of `mode`"
    spread = TIMES["logit-normal-spread"](uniform, 0.0)
    ends = torch.special.ndtri(torch.arange(4097) / 4096).sigmoid()
    assert ((ends[:-1] <= spread + 1e-6) & (spread <= ends[1:] + 1e-6)).all(), "one time in each part of equal mass"
    assert torch.isfinite(TIMES["logit-normal"](torch.zeros(3), 0.0)).all()


# ---------------------------------------------------------------- the predictions


class Listening:
    """Philox noise that notes which streams it is asked for."""

    def __init__(self, samples=2):
        self.noise, self.streams = PhiloxNoise(5, torch.arange(samples)), []

    def normal(self, stream, step, shape, dtype=torch.float32):
        self.streams.append(stream - DIFFUSION)
        return self.noise.normal(stream, step, shape, dtype)


ONE = Step(0, torch.arange(3), 3, (3, 0), 1, 3)


def drawn_with(kind, choice, noise):
    """Draws from a prediction of 3 tokens of 2 channels."""
    features, process = torch.zeros(1, 2, 3, 4), GaussianDiffusion.named()
    prediction = {
        "flow": lambda: Flow(lambda x, t: torch.zeros_like(x)[None], 2, 2, torch.device("cpu")),
        "diffusion": lambda: Diffusion(features, lambda x, t, z: torch.zeros_like(x), process, 2),
        "grid": lambda: GridDiffusion(
            features,
            torch.zeros(2, 3, 2),
            torch.ones(2, 3, dtype=torch.bool),
            lambda x, t, z: torch.zeros_like(x),
            process,
        ),
    }[kind]()
    return prediction.draw(ONE, ClassifierFree(), choice, noise).values


@pytest.mark.parametrize(
    ("kind", "choice", "streams"),
    [
        ("flow", FlowChoice(substeps=5, solver="sde"), [0, 1, 2, 3, 4]),
        ("flow", FlowChoice(substeps=5), [0]),
        ("diffusion", DiffusionChoice(substeps="5", clip=3.0), [0, 5, 4, 3, 2]),
        ("grid", DiffusionChoice(substeps="5", clip=3.0), [0, 5, 4, 3, 2]),
        ("diffusion", DiffusionChoice(substeps="5", solver="ddim", clip=3.0), [0]),
    ],
)
def test_every_substep_has_noise_of_its_own(kind, choice, streams):
    """Stream 0 is the initial noise, 1 + k that of the substep of index k; the last one adds none."""
    noise = Listening()
    assert drawn_with(kind, choice, noise).isfinite().all() and noise.streams == streams


def test_the_sde_is_its_formula():
    """x + dt ((2 - t) v + x) + sqrt(2 t dt') N for every substep, with the shifted times and the noise of its index."""
    steps, shift = 4, 3.0
    normals = torch.randn(steps, 6, generator=torch.Generator().manual_seed(1)).double()
    x = torch.linspace(-1, 1, 6)
    found = sde(lambda x, t: 0.5 * x + t, x, steps, shift, lambda k: normals[k].float())
    times = [3 * t / (1 + 2 * t) for t in (1.0, 0.68, 0.36, 0.04, 0.0)]
    expected = x.double()
    for k in range(steps):
        now, then = times[k], times[k + 1]
        velocity = 0.5 * expected + now
        expected = expected + (then - now) * ((2 - now) * velocity + expected)
        if k < steps - 1:
            expected = expected + (2 * now * (now - then)) ** 0.5 * normals[k]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_shift_moves_times_towards_the_noise():
    """a t / (1 + (a - 1) t), arXiv 2403.03206, equation 23, in every prediction and solver that has times."""
    assert shifted_times([1.0, 0.75, 0.5, 0.25, 0.0], 3.0) == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    assert shifted_times([1.0, 0.3, 0.0], 1.0) == pytest.approx([1.0, 0.3, 0.0])
    seen, device = [], torch.device("cpu")

    def velocity(x, *times):
        seen.append(times)
        return torch.zeros_like(x)[None]

    for made, solver in ((Flow, "euler"), (Flow, "sde"), (MeanFlow, "euler")):
        made(velocity, 2, 1, device).draw(ONE, ClassifierFree(), FlowChoice(1.0, 4, solver, 3.0), Listening())
    even, late = [1.0, 0.9, 0.75, 0.5, 0.0], [3 * t / (1 + 2 * t) for t in (1.0, 0.68, 0.36, 0.04)]
    assert [t for (t,) in seen[:4]] == pytest.approx(even[:4]) and [t for (t,) in seen[4:8]] == pytest.approx(late)
    assert [now for now, _ in seen[8:]] == pytest.approx(even[:4])
    assert [then for _, then in seen[8:]] == pytest.approx(even[1:])


def test_projected_guidance_damps_recent_directions():
    """arXiv 2410.02416, algorithm 1, without bound and projection: c + (s - 1) of the sum of momentum^age · (c - u), momentum < 0."""
    guidance = ProjectedGuidance(4.0, threshold=1e9, parallel=1.0)
    mix, average = guidance.start(), torch.zeros(2, 6)
    assert guidance.momentum == -0.5
    for parts in torch.randn(3, 2, 2, 6, generator=torch.Generator().manual_seed(2)):
        cond, null = parts
        average = (cond - null) - 0.5 * average
        torch.testing.assert_close(mix(parts, guidance.weights(0.5)), cond + 3.0 * average, rtol=1e-5, atol=1e-5)


def test_projected_guidance_is_its_formula():
    """Bounded to 2.5, then the share 0.25 of the part along c, per sample."""
    guidance = ProjectedGuidance(4.0, parallel=0.25)
    parts = 4 * torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(3))
    found = guidance.start()(parts, guidance.weights(0.5))
    for row, cond, null in zip(found, *parts):
        update = (cond - null) * min(1.0, 2.5 / (cond - null).norm().item())
        along = (update @ cond) / (cond @ cond) * cond
        torch.testing.assert_close(row, cond + 3 * (update - along + 0.25 * along), rtol=1e-5, atol=1e-5)


def test_spread_draws_keep_their_place_in_their_part():
    assert spread_draws(torch.tensor([0.0, 0.25, 0.9, 0.5])).tolist() == pytest.approx(
        [0.0, 1.25 / 4, 2.9 / 4, 3.5 / 4]
    )
