"""Heads of continuous tokens: losses that teach the right thing, tokens that follow from it."""

import pytest
import torch

from vgen.errors import VgenError
from vgen.models.mar.heads import HEADS, TokenMeanFlow, head_kind
from vgen.models.mar.himar import HiMARChoice
from vgen.samplers.choice import DiffusionChoice, FlowChoice, TokenChoice
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.predictions import Flow, MeanFlow
from vgen.samplers.settings import Sampling
from vgen.samplers.types import Step


def one_step(batch=2, size=3):
    return Step(index=0, targets=torch.arange(size), keep=size, unknown=(size, 0), total=1, start_unknown=size)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_learns_tokens_that_its_features_decide(name):
    torch.manual_seed(0)
    head = head_kind(name)(channels=2, features=2, width=32, layers=2)
    head.reset_parameters()
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(128, 1)
    targets = torch.tensor([[0.8, -0.5], [-0.6, 0.9]]).repeat(128, 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(250):
        optimizer.zero_grad()
        terms = head.loss(features, targets, torch.ones(len(features)))
        terms["loss"].backward()
        optimizer.step()
    prediction = head.prediction(features[:6].view(1, 2, 3, 2))
    substeps = {"diffusion": "50", "flow": 20, "mean_flow": 1}[name]
    choice = head.choice_kind.of(Sampling(substeps=substeps, clip=2.0 if name == "diffusion" else None))
    with torch.no_grad():
        draw = prediction.draw(one_step(), ClassifierFree(), choice, PhiloxNoise(1, torch.arange(2)))
    assert draw.values.shape == (2, 3, 2)
    assert (draw.values.flatten(0, 1) - targets[:6]).abs().mean() < 0.25


@pytest.mark.parametrize("name", HEADS)
def test_rows_of_weight_zero_do_not_count(name):
    torch.manual_seed(0)
    head = head_kind(name)(channels=2, features=4, width=16, layers=1)
    features, targets, noise = torch.randn(6, 4), torch.randn(6, 2), torch.randn(6, 2)
    times = {
        "diffusion": torch.tensor([5, 100, 400, 700, 900, 999]),
        "flow": torch.rand(6),
        "mean_flow": torch.rand(6, 3).sort(dim=1).values,
    }[name]
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    changed = targets.clone()
    changed[3:] += 5
    whole = head.loss(features, targets, weight, times, noise)["loss"]
    assert torch.equal(whole, head.loss(features, changed, weight, times, noise)["loss"])
    part = head.loss(features[:3], targets[:3], weight[:3], times[:3], noise[:3])["loss"]
    assert torch.allclose(whole, part, atol=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_of_a_bfloat16_head_is_finite(name):
    torch.manual_seed(0)
    head = head_kind(name)(channels=2, features=4, width=16, layers=1).bfloat16()
    terms = head.loss(torch.randn(6, 4).bfloat16(), torch.randn(6, 2), torch.ones(6))
    assert terms["loss"].dtype == torch.float32 and terms["loss"].isfinite()


def test_splitting_has_the_true_average_as_its_fixed_point():
    # For one data point the flow is x_t = t·n + (1 - t)·d: its velocity (x - d) / t is constant along a path, so every average
    # equals it and the loss of the exact head is zero at the boundary and inside.
    data = torch.tensor([0.3, -0.7])
    head = TokenMeanFlow(channels=2, features=1, width=8, layers=1)
    head.average = lambda x, t, r, features: (x - data) / t[:, None]
    times = (torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.1).sort(dim=1).values
    times[:10] = times[:10, 2:]
    terms = head.loss(torch.zeros(50, 1), data.expand(50, 2), torch.ones(50), times)
    assert terms["loss"] < 1e-10 and terms["mse"] < 1e-10 and terms["split"] < 1e-10


def test_drawn_times_are_in_order_and_half_on_the_boundary():
    torch.manual_seed(0)
    head = TokenMeanFlow(channels=2, features=1, width=8, layers=1)
    r, s, t = head.draw_times(4000, torch.device("cpu")).unbind(dim=1)
    assert bool((r <= s).all() and (s <= t).all() and (r >= 0).all() and (t <= 1).all())
    assert abs(float((r == t).float().mean()) - head.BOUNDARY) < 0.05
    assert torch.equal(s[r == t], t[r == t])


def test_a_flow_guides_every_velocity_and_scales_the_initial_noise():
    step, noise = one_step(), PhiloxNoise(3, torch.arange(2))
    parts = torch.stack((torch.full((2, 3, 1), -1.0), torch.full((2, 3, 1), 2.0)))
    flow = Flow(lambda x, t: parts, 2, 1, torch.device("cpu"))
    cold = flow.draw(step, ClassifierFree(3.0), FlowChoice(temperature=0.0, substeps=4), noise).values
    assert torch.allclose(cold, torch.full_like(cold, -(2.0 + 3.0 * (-1.0 - 2.0))))  # x_0 = -(u + s (c - u))
    mean = MeanFlow(lambda x, now, then: parts, 2, 1, torch.device("cpu"))
    assert torch.allclose(mean.draw(step, ClassifierFree(3.0), FlowChoice(0.0, 1), noise).values, cold)
    with pytest.raises(VgenError, match="solver is 'euler'"):
        mean.draw(step, ClassifierFree(), FlowChoice(solver="sde"), noise)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: head_kind("flo"), "did you mean 'flow'"),
        (lambda: FlowChoice(substeps=0), "substeps of a flow must be a whole number of at least 1"),
        (lambda: FlowChoice(shift=0.0), "time shift must be above 0"),
        (lambda: FlowChoice.of(Sampling(substeps="ddim50")), "a whole number of at least 1, got 'ddim50'"),
        (lambda: FlowChoice.of(Sampling(top_k=5)), "no top-k or top-p"),
        (lambda: DiffusionChoice.of(Sampling(shift=2.0)), "time shift is for flows"),
        (lambda: TokenChoice.of(Sampling(substeps=5)), "leave out substeps"),
        (lambda: DiffusionChoice.of(Sampling(substeps=0)), "1 to 1000, got 0"),
        (lambda: DiffusionChoice.of(Sampling(substeps="")), "are a count such as '100'"),
        (lambda: DiffusionChoice.of(Sampling(substeps="abc")), "are a count such as '100'"),
        (lambda: HiMARChoice.of(Sampling(substeps=0)), "1 to 1000, got 0"),
        (lambda: HiMARChoice.of(Sampling(low_substeps="0")), "1 to 1000 substeps, got 0"),
        (lambda: FlowChoice.of(Sampling(substeps=0)), "at least 1, got 0"),
        (lambda: FlowChoice.of(Sampling(substeps="")), "at least 1, got ''"),
    ],
)
def test_bad_settings_are_one_sentence(make, message):
    with pytest.raises(VgenError, match=message):
        make()


def test_choices_take_what_they_know():
    assert DiffusionChoice.of(Sampling(temperature=0.9, substeps=25)) == DiffusionChoice(0.9, "25")
    assert DiffusionChoice.of(Sampling()) == DiffusionChoice()
    assert FlowChoice.of(Sampling(temperature=0.9, substeps=8, shift=2.0)) == FlowChoice(0.9, 8, shift=2.0)
    assert TokenChoice.of(Sampling(temperature=0.5, top_k=3)) == TokenChoice(0.5, 3)


def test_the_target_of_a_split_interval_is_its_formula():
    """(t - r) u(x_t, r, t) = (t - s) u(x_t, s, t) + (s - r) u(x_s, r, s), x_s = x_t - (t - s) u(x_t, s, t): arXiv 2507.16884."""
    data, noise = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))
    head, asked = TokenMeanFlow(channels=2, features=1, width=8, layers=1), []

    def average(x, t, r, features):  # no true average: every part of the formula shows
        asked.append(x)
        return x * (1 + t[:, None]) + r[:, None]

    head.average = average
    r, s, t = torch.tensor([[0.1, 0.3, 0.9], [0.0, 0.5, 0.6], [0.2, 0.2, 0.8], [0.4, 0.7, 0.7]]).T
    terms = head.loss(torch.zeros(4, 1), data, torch.ones(4), torch.stack((r, s, t), dim=1), noise)
    x = t[:, None] * noise + (1 - t)[:, None] * data
    upper = x * (1 + t)[:, None] + s[:, None]
    below = x - (t - s)[:, None] * upper
    lower = below * (1 + s)[:, None] + r[:, None]
    target = ((t - s)[:, None] * upper + (s - r)[:, None] * lower) / (t - r)[:, None]
    error = (x * (1 + t)[:, None] + r[:, None] - target).square().mean()
    torch.testing.assert_close(asked[1], below)
    torch.testing.assert_close(terms["loss"], error, rtol=1e-5, atol=1e-6)
