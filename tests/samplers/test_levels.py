"""Canvases of several levels: their parts, orders over them, guidance and choices by phase."""

import pytest
import torch

from vgen.errors import VgenError
from vgen.samplers.choice import DiffusionChoice, PhaseChoice, TokenChoice
from vgen.samplers.diffusion import GaussianDiffusion, ancestral, ddim
from vgen.samplers.guidance import ClassifierFree, PhaseGuidance
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.orders import make_order
from vgen.samplers.orders.levels import LevelsOrder
from vgen.samplers.predictions import Diffusion, GridDiffusion, rows_needed
from vgen.samplers.types import Canvas, Step

LEVELS = ((1, 2, 2), (1, 4, 4))


def order(low="random-3", dense="blocks-2"):
    return LevelsOrder((make_order(low, LEVELS[0]), make_order(dense, LEVELS[1])))


def step(phase=0, size=16, unknown=(16, 0)):
    return Step(0, torch.arange(size), size, unknown, 1, unknown[0], phase)


def test_parts_of_a_canvas_are_views():
    canvas = Canvas.blank(LEVELS, 2, channels=3)
    assert canvas.grid == LEVELS[1] and canvas.values.shape == (2, 20, 3)
    canvas.write(torch.tensor([3, 5]), torch.ones(2, 2, 3), None, 2)
    low, dense = canvas.part(0), canvas.part(-1)
    assert low.known.tolist() == [[False, False, False, True]] * 2 and low.levels == LEVELS[:1]
    assert dense.known.nonzero().tolist() == [[0, 1], [1, 1]] and (dense.values[:, 1] == 1).all()
    dense.values[:] = 7
    assert (canvas.values[:, 4:] == 7).all() and (canvas.values[:, :3] == 0).all()


def test_levels_are_decoded_one_after_the_other():
    steps = list(order().steps(Canvas.blank(LEVELS, 3)))
    assert len(steps) == order().calls == 3 + 4 and {s.total for s in steps} == {7}
    assert [s.phase for s in steps] == [0] * 3 + [1] * 4  # calls of a level have its phase
    assert [s.unknown for s in steps[:3]] == [(4, 3), (3, 2), (2, 0)] and steps[3].unknown == (16, 12)
    assert [s.start_unknown for s in steps] == [4] * 3 + [16] * 4
    assert steps[0].targets.shape == (3, 1) and max(int(s.targets.max()) for s in steps[:3]) == 3
    assert torch.cat([s.targets for s in steps[3:]]).sort().values.tolist() == list(range(4, 20))
    positions, sizes = order().sequence()
    assert positions.sort().values.tolist() == list(range(20)) and sum(sizes) == 20
    assert order().name == "random-3 then blocks-2" and order().varies == "differs by sample"


def test_known_positions_are_dropped_level_by_level():
    canvas = Canvas.blank(LEVELS, 1)
    canvas.known[:, :5] = True
    steps = list(order(dense="raster").steps(canvas))
    assert [s.phase for s in steps] == [1] * 15 and steps[0].targets.tolist() == [5]


def test_another_canvas_is_refused():
    with pytest.raises(VgenError, match="levels of 1x2x2 and 1x4x4, the canvas has 1x4x4"):
        next(iter(order().steps(Canvas.blank(LEVELS[1], 1))))


def test_confidence_inside_a_level():
    confident = order(dense="confidence-4")
    canvas = Canvas.blank(LEVELS, 1)
    last = list(confident.steps(canvas))[3]
    assert last.phase == 1 and last.targets.shape == (1, 16)  # it sees the whole level, and the canvas of that time
    assert last.targets[0].tolist() == list(range(4, 20))


def test_guidance_and_choice_by_phase():
    guidance = PhaseGuidance((ClassifierFree(2.7), ClassifierFree(1.0)))
    assert guidance.rows == ("cond", "null")
    assert guidance.weights(step(0)) == pytest.approx((2.7, -1.7)) and guidance.weights(step(1)) == (1.0, 0.0)
    assert guidance.weights(step(5)) == (1.0, 0.0)  # the last one for later phases
    parts = torch.randn(2, 3)
    assert torch.allclose(guidance.mix(parts, (2.0, -1.0)), 2 * parts[0] - parts[1])
    assert PhaseGuidance((ClassifierFree(), ClassifierFree())).rows == ("cond",)
    choice = PhaseChoice((DiffusionChoice(substeps="100"), TokenChoice(top_k=3)))
    assert choice.at(step(0)).substeps == "100" and choice.at(step(1)).top_k == choice.at(step(2)).top_k == 3


def test_rows_that_weigh_nothing_are_not_run():
    assert [rows_needed(weights) for weights in ((1.0,), (1.0, 0.0), (2.0, -1.0), (0.0, 1.0))] == [1, 1, 2, 2]
    process, rows = GaussianDiffusion.named(), []

    def head(x, t, features):
        rows.append(len(x))
        return 0.1 * x + features.mean(dim=-1, keepdim=True)

    features = torch.randn(2, 3, 4, 5)
    guided, free = ClassifierFree(3.0), PhaseGuidance((ClassifierFree(), ClassifierFree(3.0)))
    one, choice, noise = step(0, 4, (4, 0)), DiffusionChoice(substeps="ddim5"), PhiloxNoise(0, torch.arange(3))
    plain = Diffusion(features[:1], head, process, 2).draw(one, ClassifierFree(), choice, noise).values
    same = Diffusion(features, head, process, 2).draw(one, free, choice, noise).values
    assert torch.equal(plain, same) and set(rows) == {12}
    other = Diffusion(features, head, process, 2).draw(one, guided, choice, noise).values
    assert set(rows) == {12, 24} and not torch.equal(plain, other)


@pytest.mark.parametrize("solve", [ancestral, ddim])
def test_solvers_put_back_what_is_given(solve):
    process, seen = GaussianDiffusion.named().respaced("ddim4"), []

    def given(x, k):
        seen.append(k)
        return x.index_fill(1, torch.tensor([0]), float(k))

    def denoise(x, t):
        assert (x[:, 0] == seen[-1]).all()
        return torch.zeros_like(x), None

    solve(denoise, process, torch.randn(2, 3), lambda k: torch.randn(2, 3), given=given)
    assert seen == [3, 2, 1, 0]


def test_a_grid_is_denoised_around_what_is_known():
    process = GaussianDiffusion.named()
    tokens, masked = torch.randn(2, 16, 3), torch.ones(2, 16, dtype=torch.bool)
    masked[:, :6] = False
    seen = []

    def head(x, t, features):
        seen.append((x, t))
        return torch.zeros_like(x) + features.mean(dim=-1, keepdim=True)

    prediction = GridDiffusion(torch.randn(1, 2, 16, 5), tokens, masked, head, process, first=4)
    choice, noise = DiffusionChoice(substeps="ddim5"), PhiloxNoise(0, torch.arange(2))
    targets = torch.tensor([[12, 15], [19, 11]])
    drawn = prediction.draw(Step(0, targets, 2, (10, 8), 1, 16), ClassifierFree(), choice, noise).values
    assert drawn.shape == (2, 2, 3) and len(seen) == 5
    whole = prediction.denoised(Step(0, targets, 2, (10, 8), 1, 16), ClassifierFree(), choice, noise)
    assert torch.equal(drawn, whole[torch.arange(2)[:, None], targets - 4])
    # Every substep sees the known tokens at its noise level, all with one and the same noise.
    (x, t), (again, later) = seen[0], seen[3]
    table = process.tables
    start = (x - table["signal"][t[0]] * tokens)[:, :6] / table["noise"][t[0]]
    expected = table["signal"][later[0]] * tokens[:, :6] + table["noise"][later[0]] * start
    torch.testing.assert_close(again[:, :6].double(), expected.double(), atol=1e-5, rtol=1e-5)


def test_noise_of_a_grid_belongs_to_positions():
    process, tokens = GaussianDiffusion.named(), torch.zeros(1, 16, 3)

    def head(x, t, features):
        return 0.5 * x

    masked, choice = torch.ones(1, 16, dtype=torch.bool), DiffusionChoice(substeps="ddim5")
    prediction = GridDiffusion(torch.zeros(1, 1, 16, 2), tokens, masked, head, process, first=4)
    draws = [
        prediction.draw(
            Step(0, torch.tensor(targets), len(targets), (16, 14), 1, 16),
            ClassifierFree(),
            choice,
            PhiloxNoise(1, torch.tensor([9])),
        ).values
        for targets in ([4, 9], [9])
    ]
    assert torch.equal(draws[0][:, 1:], draws[1])
