"""Flow solvers, guidance of velocities, times of training."""

import math

import pytest
import torch

from vgen.errors import VgenError
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
    weighted_sum,
)


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
    middle = ((mode_times(torch.rand(20000), 1.0) - 0.5).abs() < 0.25).float().mean()
    assert middle > 0.55, "the middle is denser"


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
