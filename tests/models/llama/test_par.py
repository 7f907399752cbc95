"""PAR: cached decoding equals the forward in regions order; what it refuses."""

import pytest
from models.llama.test_llamagen import (
    assert_decoding_equals_forward,
    assert_loss_falls_to_the_forward,
    assert_saves_and_loads,
    run,
    tiny,
)

from vgen.errors import VgenError
from vgen.models.llama.par import PARModel, par_config
from vgen.samplers.orders import make_order
from vgen.samplers.types import Canvas


@pytest.mark.parametrize(("grid", "parallel"), [((1, 4, 4), 4), ((1, 4, 6), 4), ((1, 6, 6), 9), ((1, 4, 4), 16)])
def test_cached_decoding_equals_the_uncached_forward(grid, parallel):
    model = tiny(PARModel, grid=grid, parallel=parallel)
    assert model.default_order().calls == parallel + grid[1] * grid[2] // parallel - 1
    assert_decoding_equals_forward(model)


def test_loss_reaches_the_learned_tokens():
    model = tiny(PARModel)
    assert_loss_falls_to_the_forward(model)
    assert (model.learned.grad.abs().sum(dim=1) > 0).all()


def test_save_and_load(tmp_path):
    assert_saves_and_loads(tiny(PARModel), tmp_path)


def test_guidance_interval_starts_anew_in_the_second_phase():
    steps = list(make_order("regions-4", (4, 4)).steps(Canvas.blank((1, 4, 4), 1)))
    guided = [weights[0] == 3.0 for weights in map(PARModel.guidance(3.0, 1).weights, steps)]
    assert guided == [True, True, True, False] + [True, False, False]


def test_bad_input_is_one_sentence():
    model = tiny(PARModel)
    with pytest.raises(VgenError, match="multiples of 2, got 5x4"):
        tiny(PARModel, grid=(1, 5, 4))
    with pytest.raises(VgenError, match="square number"):
        tiny(PARModel, parallel=8)
    with pytest.raises(VgenError, match="regions-4"):
        run(model, make_order("raster", model.grid))
    with pytest.raises(VgenError, match="got 'neighbor'"):
        model.check_order(make_order("neighbor", model.grid))
    model.check_order(model.default_order())
    with pytest.raises(VgenError, match="SIZE-4x"):
        par_config("XL")
    with pytest.raises(VgenError, match="a PAR checkpoint, expected LlamaGen"):
        type(tiny()).from_original(model.state_dict(), "B")
    canvas = Canvas.blank(model.grid, 1)
    canvas.known[:, 0] = True
    with pytest.raises(VgenError, match="no known tokens"):
        model.start([model.vocabulary.labels([0])], canvas)
