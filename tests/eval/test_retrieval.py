"""The retrieval figure."""

import pytest
import torch
from PIL import Image

from vgen.errors import VgenError
from vgen.eval.retrieval import nearest_pictures, pixel_features, retrieval_share


def test_share_of_pictures_that_find_their_own():
    gallery = torch.randn(20, 12)
    generated = gallery[[3, 7, 9]] + 0.01 * torch.randn(3, 12)
    assert nearest_pictures(generated, gallery).tolist() == [3, 7, 9]
    assert retrieval_share(generated, gallery, torch.tensor([3, 7, 0])) == pytest.approx(2 / 3)


def test_features_are_pixels():
    features = pixel_features([Image.new("RGB", (4, 4), "white"), Image.new("RGB", (4, 4), "black")])
    assert features.shape == (2, 48) and features[0].eq(1).all() and features[1].eq(-1).all()
    with pytest.raises(VgenError, match="one picture size"):
        nearest_pictures(features, torch.zeros(3, 12))
