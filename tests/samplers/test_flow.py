"""Flow solvers, guidance of velocities, times of training."""

import math

import pytest
import torch

from vgen.errors import VgenError
from vgen.samplers.flow import FlowGuidance, ProjectedGuidance, euler, even_times, mode_times, noisy, weighted_sum


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
