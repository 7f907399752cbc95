"""NAR: cached decoding equals the forward, diagonal by diagonal; what it refuses."""

import pytest
import torch
from models.llama.test_llamagen import (
    TEXT,
    assert_decoding_equals_forward,
    assert_loss_falls_to_the_forward,
    assert_saves_and_loads,
    run,
    tiny,
)

from vgen.errors import VgenError
from vgen.models.llama.nar import NARModel, mix_neighbors
from vgen.samplers.orders import make_order
from vgen.samplers.types import Canvas


@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 3, 5), (1, 5, 2)])
@pytest.mark.parametrize("changes", [{}, TEXT], ids=["class", "text"])
def test_cached_decoding_equals_the_uncached_forward(grid, changes):
    model = tiny(NARModel, grid=grid, **changes)
    assert model.default_order().calls == grid[1] + grid[2] - 1
    assert_decoding_equals_forward(model)


def test_neighbors_are_mixed():
    """Right neighbors say 1, upper ones 3; the mean where both exist."""
    positions = torch.arange(6)
    mixed = mix_neighbors(torch.ones(1, 6, 1), torch.full((1, 6, 1), 3.0), positions, positions, 3)
    assert mixed.flatten().tolist() == [0, 1, 1, 3, 2, 2]


def test_loss():
    assert_loss_falls_to_the_forward(tiny(NARModel))


def test_save_and_load(tmp_path):
    assert_saves_and_loads(tiny(NARModel, **TEXT), tmp_path)


def test_bad_input_is_one_sentence():
    model = tiny(NARModel)
    with pytest.raises(VgenError, match="neighbor"):
        run(model, make_order("raster", model.grid))
    with pytest.raises(VgenError, match="got 'zip-2'"):
        model.check_order(make_order("zip-2", model.grid))
    model.check_order(model.default_order())
    with pytest.raises(VgenError, match="a NAR checkpoint, expected LlamaGen"):
        type(tiny()).from_original(model.state_dict(), "B")
    canvas = Canvas.blank(model.grid, 1)
    canvas.known[:, 0] = True
    with pytest.raises(VgenError, match="no known tokens"):
        model.start([model.vocabulary.labels([0])], canvas)
