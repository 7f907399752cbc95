"""Canvas, guidance, choice, noise, predictions and the decode loop, on a model that is a table."""

import math
from types import SimpleNamespace

import pytest
import torch

from vgen.errors import VgenError
from vgen.samplers.choice import RECIPES, Ramp, TokenChoice, token_choice
from vgen.samplers.decode import decode
from vgen.samplers.guidance import SCHEDULES, ClassifierFree, PhaseGuidance
from vgen.samplers.noise import CONFIDENCE, TOKENS, GridTape, PhiloxNoise, TapeNoise
from vgen.samplers.orders import make_order
from vgen.samplers.predictions import Logits
from vgen.samplers.types import Canvas, Counters, Step, as_grid, grid_coordinates


def step(targets, index=0, unknown=(16, 12), start=16, total=4):
    return Step(index, torch.as_tensor(targets), len(targets), unknown, total, start)


def test_grids():
    assert as_grid(5) == (1, 1, 5) and as_grid((2, 3)) == (1, 2, 3) and as_grid([4, 2, 3]) == (4, 2, 3)
    assert grid_coordinates((2, 2, 3))[7].tolist() == [1, 0, 1]
    with pytest.raises(VgenError, match="at least 1"):
        as_grid((0, 3))


def test_canvas_write_keeps_what_it_is_told_to():
    canvas = Canvas.blank((1, 2, 3), 2)
    values = torch.tensor([[5, 6, 7], [8, 9, 10]])
    keep = torch.tensor([[True, False, True], [False, True, True]])
    canvas.write(torch.tensor([4, 2, 0]), values, keep, 2)
    assert canvas.values.tolist() == [[7, 0, 0, 0, 5, 0], [10, 0, 9, 0, 0, 0]]
    assert canvas.known.tolist() == [[True, False, False, False, True, False], [True, False, True, False, False, False]]
    assert canvas.fresh.tolist() == [[4, 0], [2, 0]]
    assert canvas.unknown_count() == 4
    canvas.known[0, 1] = True
    with pytest.raises(VgenError, match="found 3 to 4"):
        canvas.unknown_count()


def test_canvas_of_floats():
    canvas = Canvas.blank((1, 1, 4), 1, channels=2)
    canvas.write(torch.tensor([3, 1]), torch.ones(1, 2, 2), torch.tensor([[False, True]]), 1)
    assert canvas.values[0].tolist() == [[0, 0], [1, 1], [0, 0], [0, 0]]


def test_canvas_checks_its_size():
    with pytest.raises(VgenError, match="holds 6 values"):
        Canvas(((1, 2, 3),), torch.zeros(1, 7))


@pytest.mark.parametrize("schedule", sorted(set(SCHEDULES) - {"step-flipped-cosine"}))
def test_guidance_weights_sum_to_one_and_stay_between_one_and_the_scale(schedule):
    guidance = ClassifierFree(4.0, schedule)
    scales = []
    for index, unknown in enumerate(((16, 12), (12, 1), (1, 0))):
        weights = guidance.weights(step([0], index=index, total=3, unknown=unknown))
        assert sum(weights) == pytest.approx(1) and 1 <= weights[0] <= 4 + 1e-9
        scales.append(weights[0])
    assert scales == sorted(scales)
    if "before" not in schedule and "power" not in schedule:  # these read what is known when the step begins
        assert scales[-1] == pytest.approx(4 if schedule != "linear-clamped" else 1 + 3 * 15 / 16)


def test_guidance_schedules_may_begin_elsewhere_and_fall():
    guidance = ClassifierFree(
        13.0, "step-cosine", power=1.0, start=2.0
    )  # MaskGen-VQ: c + s (c - u) with s from 1 to 12
    scales = [guidance.weights(step([0], index=i, total=4))[0] for i in range(4)]
    assert scales == pytest.approx([2 + 11 * (1 - math.cos(math.pi * r)) / 2 for r in (0.25, 0.5, 0.75, 1)])
    flipped = ClassifierFree(13.0, "step-flipped-cosine", power=1.0, start=2.0)
    assert flipped.weights(step([0], index=3, total=4))[0] == pytest.approx(2 - 11 / 2)
    assert ClassifierFree(1.0, start=2.0).rows == ("cond", "null")


def test_guidance_mix_is_u_plus_s_times_the_difference():
    conditional, null = torch.randn(2, 3, 4)
    guidance = ClassifierFree(2.5)
    mixed = guidance.mix(torch.stack((conditional, null)), guidance.weights(step([0])))
    assert torch.allclose(mixed, null + 2.5 * (conditional - null), atol=1e-6)
    assert ClassifierFree(1.0).rows == ("cond",) and ClassifierFree(0.0).rows == ("cond", "null")


def test_noise_depends_on_the_sample_not_on_the_row():
    one = step([3, 7])
    together = PhiloxNoise(9, torch.tensor([4, 5, 6])).gumbel(TOKENS, one, (3, 2, 11))
    alone = PhiloxNoise(9, torch.tensor([5])).gumbel(TOKENS, one, (1, 2, 11))
    assert torch.equal(together[1:2], alone)
    swapped = PhiloxNoise(9, torch.tensor([5])).gumbel(TOKENS, step([7, 3]), (1, 2, 11))
    assert torch.equal(swapped.flip(1), alone)
    other = [
        PhiloxNoise(8, torch.tensor([5])).gumbel(TOKENS, one, (1, 2, 11)),
        PhiloxNoise(9, torch.tensor([5])).gumbel(CONFIDENCE, one, (1, 2, 11)),
        PhiloxNoise(9, torch.tensor([5])).gumbel(TOKENS, step([3, 7], index=1), (1, 2, 11)),
    ]
    assert not any(torch.equal(alone, values) for values in other)


def test_noise_moments():
    noise, one = PhiloxNoise(0, torch.arange(50)), step(list(range(16)))
    normal = noise.normal(0, one, (50, 16, 64))
    uniform = noise.uniform(0, one, (50, 16, 64))
    gumbel = noise.gumbel(0, one, (50, 16, 64))
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    assert uniform.min() > 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
    assert abs(gumbel.mean() - 0.5772) < 0.03


def test_tape_replays_multinomial():
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 1, 9)
    generator = torch.Generator().manual_seed(5)
    drawn = torch.multinomial(logits[0, :, 0].softmax(-1), 1, generator=generator)
    exponential = torch.empty(4, 9).exponential_(generator=torch.Generator().manual_seed(5))
    tape = TapeNoise.from_exponential([exponential])
    result = Logits(logits).draw(step([2]), ClassifierFree(1.0), TokenChoice(), tape)
    assert torch.equal(result.values, drawn)
    with pytest.raises(VgenError, match="used up"):
        tape.gumbel(TOKENS, step([2]), (4, 1, 9))


def test_tape_checks_shapes():
    with pytest.raises(VgenError, match="asks for"):
        TapeNoise([torch.zeros(3)], [], []).gumbel(TOKENS, step([2]), (1, 1, 4))


def test_a_grid_tape_gives_the_rows_of_the_targets():
    draws = torch.arange(2 * 5 * 3).view(2, 5, 3).float()
    shared = GridTape([draws], [], []).gumbel(TOKENS, step([4, 1]), (2, 2, 3))
    assert torch.equal(shared, draws[:, [4, 1]])
    own = GridTape([draws], [], []).token_noise(TOKENS, step([[4, 1], [0, 2]]), (2, 2, 3))["gumbel"]
    assert torch.equal(own, torch.stack((draws[0, [4, 1]], draws[1, [0, 2]])))
    uniform = torch.tensor([[0.5, 0.0, 1.0]])
    gumbel = GridTape.from_uniform([uniform]).gumbel(TOKENS, step([0, 1, 2]), (1, 3))[0]
    assert gumbel[0] == pytest.approx(-math.log(math.log(2))) and torch.isfinite(gumbel).all()


def test_ramps_move_over_the_calls_and_end_where_they_should():
    ramp = Ramp(1.3, 0.5)
    assert [ramp.at(step([0], index=i, total=4)) for i in range(4)] == pytest.approx([1.1, 0.9, 0.7, 0.5])
    choice = TokenChoice(Ramp(2.0, 0.0), softmax_temperature=ramp).at(step([0], index=3, total=4))
    assert choice.temperature == 0 and choice.softmax_temperature == pytest.approx(0.5)


def test_maskgit_draws_as_its_paper_writes_it():
    """argmax(l / s + a G), and the guided logit l / s of the drawn token as its confidence."""
    torch.manual_seed(0)
    logits, gumbel = torch.randn(2, 3, 4, 9), torch.randn(3, 4, 9)
    one, guidance = step([0, 1, 2, 3], index=1, total=4), ClassifierFree(3.0)
    draw = Logits(logits).draw(one, guidance, token_choice("maskgit", 2.0), TapeNoise([gumbel], [], []))
    guided = (3 * logits[0] - 2 * logits[1]) / (0.5 + 0.8 * 0.5)
    expected = (guided + 2.0 * 0.5 * gumbel).argmax(dim=-1)
    assert torch.equal(draw.values, expected)
    torch.testing.assert_close(draw.score, guided.gather(-1, expected[..., None])[..., 0])
    demo = Logits(logits).draw(one, guidance, token_choice("maskgit-demo", 2.0), TapeNoise([gumbel], [], []))
    assert torch.equal(demo.values, (guided * 0.9 + gumbel).argmax(dim=-1))
    assert all(isinstance(token_choice(name), TokenChoice) for name in RECIPES)


class Table:
    """A "model" whose logits are a fixed table: every order must give the same greedy picture."""

    def __init__(self, table):
        self.table = table
        self.calls = 0

    def predict(self, state, step, canvas):
        self.calls += 1
        targets = step.targets.expand(canvas.batch, -1)
        return Logits(self.table[targets][None])

    def commit(self, state, step, canvas):
        pass


@pytest.mark.parametrize("name", ["raster", "neighbor", "regions-4", "zip-2", "random", "locality", "confidence"])
def test_greedy_decoding_reads_the_table_in_any_order(name):
    table = torch.randn(16, 7)
    model, canvas, order = Table(table), Canvas.blank((1, 4, 4), 3), make_order(name, (1, 4, 4))
    state = SimpleNamespace(counters=Counters())
    seen = [
        s.index
        for s, _ in decode(
            model, state, canvas, order, ClassifierFree(1.0), TokenChoice(0.0), PhiloxNoise(0, canvas.samples)
        )
    ]
    assert seen == list(range(order.calls)) and model.calls == order.calls
    assert torch.equal(canvas.values, table.argmax(dim=-1).expand(3, -1))


def test_samples_follow_the_softmax():
    """Chi-square over 4000 samples of one position; 99.9 % point for 7 degrees of freedom."""
    table = torch.randn(1, 8)
    canvas = Canvas.blank((1, 1, 1), 4000)
    order = make_order("raster", (1, 1, 1))
    for _ in decode(
        Table(table), None, canvas, order, ClassifierFree(1.0), TokenChoice(), PhiloxNoise(1, canvas.samples)
    ):
        pass
    expected = 4000 * table.softmax(-1)[0]
    observed = torch.bincount(canvas.values.flatten(), minlength=8)
    assert ((observed - expected).square() / expected).sum() < 24.3


def test_bad_choices():
    for arguments in (
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"temperature": Ramp(1.0, -1.0)},
        {"softmax_temperature": 0.0},
        {"score": "margin"},
    ):
        with pytest.raises(VgenError):
            TokenChoice(**arguments)
    with pytest.raises(VgenError, match="did you mean 'maskgit'"):
        token_choice("maskgitt")


def test_tokens_are_drawn_with_the_noise_of_their_step_and_position():
    """argmax(logits + Gumbel) with the numbers of (seed, sample, position, step, stream): what `gumbel` gives for the same step."""
    logits = torch.randn(1, 3, 2, 64, generator=torch.Generator().manual_seed(0))
    noise, drawn = PhiloxNoise(4, torch.tensor([7, 1, 12])), []
    for index in range(4):
        now = step([9, 3], index=index)
        drawn.append(Logits(logits).draw(now, ClassifierFree(1.0), TokenChoice(), noise).values)
        assert torch.equal(drawn[-1], (logits[0] + noise.gumbel(TOKENS, now, (3, 2, 64))).argmax(dim=-1))
    assert len({tuple(tokens.flatten().tolist()) for tokens in drawn}) == 4, "every step has numbers of its own"


def test_every_guidance_schedule_is_its_formula():
    """Call 2 of 4 that takes 16 positions from 4 to 12 known ones, scale 4, power 2."""
    half = lambda share: (1 - math.cos(math.pi * share)) / 2  # noqa: E731
    expected = {
        "constant": 1.0,
        "linear": 0.75,
        "linear-clamped": 0.75,
        "linear-before": 0.25,
        "cosine": half(0.75),
        "power-cosine": half(0.25**2),
        "step-linear-before": 0.25,
        "step-power-cosine": half(0.25**2),
        "step-linear": 0.5,
        "step-linear-ends": 1 / 3,
        "step-cosine": half(0.5**2),
        "step-flipped-cosine": 0.5 * math.cos(math.pi * 0.5**2),
    }
    assert expected.keys() == SCHEDULES.keys()
    now = step([0], index=1, total=4, unknown=(12, 4))
    for name, share in expected.items():
        scale = 1 + 3 * share
        assert ClassifierFree(4.0, name, 2.0).weights(now) == pytest.approx((scale, 1 - scale)), name


def test_log_probs_are_those_of_the_draw():
    """What the filters took away is -inf, the rest is renormalised; temperature 0 leaves the likeliest token alone."""
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])[None, None, None].expand(2, 1, 2, 4)
    now, noise = step([0, 1]), PhiloxNoise(0, torch.tensor([0]))
    draw = Logits(logits).draw(now, ClassifierFree(2.0), TokenChoice(0.5, top_k=2), noise)
    expected = torch.tensor([6.0, 4.0, -math.inf, -math.inf]).log_softmax(dim=0)
    torch.testing.assert_close(draw.log_probs(slice(1, 2))[0, 0], expected)
    greedy = Logits(logits).draw(now, ClassifierFree(2.0), TokenChoice(0.0), noise).log_probs(slice(0, 2))
    assert greedy.tolist() == [[[0.0, -math.inf, -math.inf, -math.inf]] * 2]


def test_a_guidance_that_mixes_in_its_own_way_is_honoured():
    class Backwards(ClassifierFree):
        def mix(self, parts, weights):
            return -super().mix(parts, weights)

    logits = torch.randn(2, 3, 4, 7, generator=torch.Generator().manual_seed(5))
    step = next(iter(make_order("random", (1, 2, 2), steps=1).steps(Canvas.blank((1, 2, 2), 3))))
    noise, greedy = PhiloxNoise(0, torch.arange(3)), TokenChoice(temperature=0.0)
    mixed = ClassifierFree(2.0).mix(logits, (2.0, -1.0))
    assert torch.equal(Logits(logits).draw(step, ClassifierFree(2.0), greedy, noise).values, mixed.argmax(dim=-1))
    assert torch.equal(Logits(logits).draw(step, Backwards(2.0), greedy, noise).values, mixed.argmin(dim=-1))
    phases = PhaseGuidance((Backwards(2.0), Backwards(2.0)))
    assert torch.equal(Logits(logits).draw(step, phases, greedy, noise).values, mixed.argmin(dim=-1))
