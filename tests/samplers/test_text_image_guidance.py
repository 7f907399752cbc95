"""Guidance by text and picture: rows, weights, the norm's limit."""

import pytest
import torch

from vgen.errors import VgenError
from vgen.samplers.guidance import TextImageGuidance


def test_rows_are_those_that_weigh_anything():
    assert TextImageGuidance().rows == ("cond", "null")
    assert TextImageGuidance(image_row=True).rows == ("cond", "null", "image")
    assert TextImageGuidance(1.0).rows == ("cond",)
    assert TextImageGuidance(1.0, 1.5, image_row=True).rows == ("cond", "null", "image")
    assert TextImageGuidance(1.0, 1.0, image_row=True).rows == ("cond",)


@pytest.mark.parametrize("image_row", [False, True])
def test_the_mix_is_the_papers(image_row):
    guidance = TextImageGuidance(3.0, 1.5, image_row)
    cond, null, image = torch.randn(3, 2, 1, 4)
    parts = torch.stack((cond, null, image)[: len(guidance.rows)])
    base = null + 1.5 * (image - null) if image_row else null
    expected = base + 3.0 * (cond - (image if image_row else null))
    torch.testing.assert_close(guidance.mix(parts, guidance.weights(None)), expected)


def test_renorm_shortens_and_never_lengthens():
    guidance = TextImageGuidance(5.0, renorm=True)
    parts = torch.randn(2, 64, 1, 4)
    mixed, plain = guidance.mix(parts, (5.0, -4.0)), TextImageGuidance(5.0).mix(parts, (5.0, -4.0))
    lengths = [x.norm(dim=-1) for x in (mixed, plain, parts[0])]
    torch.testing.assert_close(lengths[0], torch.minimum(lengths[1], lengths[2]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.nn.functional.normalize(mixed, dim=-1), torch.nn.functional.normalize(plain, dim=-1)
    )


@pytest.mark.parametrize("scales", [(0.9, 1.1), (3.0, 0.0), (float("nan"), 1.0), (float("inf"), 1.0)])
def test_scales_below_one_are_refused(scales):
    with pytest.raises(VgenError, match="must be a finite number of at least 1"):
        TextImageGuidance(*scales)
