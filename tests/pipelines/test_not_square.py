"""Pictures that are wider than high: rows stay rows, from the mask's pixels to the tokens that stay."""

import pytest
import torch
from conftest import tiny_pipeline
from PIL import Image

from vgen.models.anyorder import AnyOrderModel
from vgen.pipelines.visual import VisualPipeline


@pytest.fixture(scope="module")
def wide():
    """16x8-pixel pictures of 4 rows and 8 columns of tokens."""
    small = tiny_pipeline()
    torch.manual_seed(1)
    model = AnyOrderModel(
        len(small.model.vocabulary), 32, (1, 4, 8), width=64, content_layers=1, query_layers=1, heads=2, prefix_limit=8
    )
    torch.nn.init.normal_(model.head.weight, std=0.3)
    model.vocabulary = small.model.vocabulary
    return VisualPipeline(small.tokenizer, model.eval(), order="random", steps=5, guidance_scale=2.0)


@pytest.mark.parametrize(
    ("box", "new"),
    [
        ((0, 0, 16, 2), {(0, column) for column in range(8)}),  # the top row
        ((14, 0, 16, 8), {(row, 7) for row in range(4)}),  # the right column
        ((6, 4, 10, 6), {(2, 3), (2, 4)}),
    ],
)
def test_the_mask_names_rows_and_columns(wide, box, new):
    picture = wide("red apple", seed=1).images[0]
    assert picture.size == (16, 8)
    mask = Image.new("L", (16, 8))
    mask.paste(255, box)
    first = []

    def note(pipe, index, step, values):
        first.append(values["canvas"].known[0].clone())

    result = wide("a cat", init_image=picture, mask=mask, order="raster", callback_on_step_end=note)
    assert result.stats.calls == len(new)
    before = first[0].view(4, 8)  # after the first call: all but one of the new positions are still unknown
    unknown = {(row, column) for row, column in (~before).nonzero().tolist()}
    assert unknown == new - {min(new)}
