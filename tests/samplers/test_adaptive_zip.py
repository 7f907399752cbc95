"""Adaptive ZipAR: the accepted token has the distribution of the latest call, rows start in time, raster at full width."""

import pytest
import torch

from vgen.errors import VgenError
from vgen.models.anyorder import AnyOrderModel
from vgen.models.llama.llamagen import LlamaGenModel
from vgen.samplers.choice import TokenChoice
from vgen.samplers.decode import decode
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.orders import make_order
from vgen.samplers.orders.adaptive_zip import Proposal
from vgen.samplers.types import Canvas, Condition

GRID = (1, 4, 6)


def llamagen(std=0.3):
    torch.manual_seed(0)
    model = LlamaGenModel(codes=16, grid=GRID, width=32, depth=2, heads=2, hidden=64, classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=std)
    return model.eval()


PLAIN = TokenChoice()


def run(model, order, choice=PLAIN, seed=0, scale=2.0):
    condition = (
        model.vocabulary.labels([1])
        if model.vocabulary
        else Condition(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool))
    )
    guidance = ClassifierFree(scale)
    conditions = [condition, model.null(condition)] if scale != 1 else [condition]
    canvas = Canvas.blank(GRID, 1)
    state = model.start(conditions, canvas)
    steps = [
        step for step, _ in decode(model, state, canvas, order, guidance, choice, PhiloxNoise(seed, canvas.samples))
    ]
    assert canvas.known.all()
    return canvas.values[0], steps, state


def test_a_verdict_leaves_the_distribution_of_the_latest_call():
    """Speculative sampling: if x ~ p_before, the value after a verdict is ~ p_now, whichever way it went."""
    generator = torch.Generator().manual_seed(0)
    before, now = torch.tensor([[0.5, 0.3, 0.2, 0.0]]), torch.tensor([[0.1, 0.3, 0.2, 0.4]])
    counts, accepted, draws = torch.zeros(4), 0, 4000
    for _ in range(draws):
        proposal = Proposal(6)
        proposal.consider(torch.multinomial(before[0], 1, generator=generator), before.log(), torch.zeros(1), before)
        gumbel = -torch.log(-torch.log(torch.rand(1, 4, generator=generator)))
        proposal.consider(torch.zeros(1, dtype=torch.long), now.log(), torch.rand(1, generator=generator), gumbel)
        counts[proposal.value] += 1
        accepted += proposal.accepted
    assert torch.allclose(counts / draws, now[0], atol=0.03)
    assert accepted / draws == pytest.approx(torch.minimum(before, now).sum().item(), abs=0.03)  # the best possible


@pytest.mark.parametrize("window", [1, 2, 4])
def test_rows_start_after_the_window_and_one_call_more(window):
    _, steps, state = run(llamagen(), make_order("zip", GRID, window=window, adaptive=True))
    height, width = GRID[1:]
    assert width + (height - 1) * (window + 1) <= len(steps) <= height * width and state.counters.calls == len(steps)
    call = torch.full((height * width,), -1)
    for step in steps:
        call[step.targets[: step.keep]] = step.index
    call = call.view(height, width)
    seconds, firsts = call[1:, 1], call[:-1]
    assert (call[:, 2:] == call[:, 1:-1] + 1).all()  # within a row: one token a call
    for row, second in enumerate(seconds.tolist()):
        assert second - 2 >= firsts[row, window - 1] + 1 or second - 1 > firsts[row, width - 1]


def test_a_model_that_never_changes_its_mind_starts_rows_as_early_as_it_can():
    model = llamagen(std=0.0)  # uniform, whatever it is fed
    steps = run(model, make_order("zip", GRID, window=2, adaptive=True))[1]
    assert len(steps) == 6 + 3 * 3


def test_a_window_of_a_full_row_is_raster():
    model = llamagen()
    wide, raster = (
        run(model, order)[0] for order in (make_order("zip:window=6,adaptive=true", GRID), make_order("raster", GRID))
    )
    assert torch.equal(wide, raster)


def test_greedy_and_filtered_draws_agree_with_their_own_distributions():
    model = llamagen()
    for choice in (TokenChoice(temperature=0), TokenChoice(top_k=3), TokenChoice(top_p=0.6, temperature=0.8)):
        one, other = (run(model, make_order("zip:window=1,adaptive=true", GRID), choice, seed=4)[0] for _ in range(2))
        assert torch.equal(one, other)  # reproducible
    different = run(model, make_order("zip:window=1,adaptive=true", GRID), seed=5)[0]
    assert not torch.equal(one, different)


def test_the_native_model_follows_it_too():
    torch.manual_seed(0)
    model = AnyOrderModel(4, 16, GRID, width=32, content_layers=1, query_layers=1, heads=1)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    values, steps, _ = run(model.eval(), make_order("zip:window=2,adaptive=true", GRID), scale=1.0)
    assert 6 + 3 * 3 <= len(steps) <= 24 and values.min() >= 0


def test_bad_input_is_one_sentence():
    with pytest.raises(VgenError, match="faithful to the released code or adaptive"):
        make_order("zip", GRID, faithful=True, adaptive=True)
    with pytest.raises(VgenError, match="one picture a batch"):
        next(iter(make_order("zip", GRID, adaptive=True).steps(Canvas.blank(GRID, 2))))
    with pytest.raises(VgenError, match="defined for pictures, got 2 frames"):
        make_order("zip", (2, 4, 4), adaptive=True)
