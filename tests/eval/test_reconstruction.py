"""Measuring pictures as they come."""

import gc
import weakref

import pytest
import torch

from vgen.errors import VgenError
from vgen.eval import reconstruction
from vgen.eval.reconstruction import joined, measure, reconstruct_batches
from vgen.tokenizers_vis.vq import VQModel


@pytest.fixture(scope="module")
def vq():
    torch.manual_seed(0)
    return VQModel(
        ch=8, encoder_ch_mult=(1,), decoder_ch_mult=(1,), num_res_blocks=1, z_channels=8, codebook_size=32, num_groups=4, patch_size=4
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(11, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("batch_size", "shown"), [(1, 3), (4, 3), (4, 6), (11, 11), (16, 99), (4, 0)])
def test_a_stream_is_measured_as_the_whole(vq, pixels, batch_size, shown):
    whole = joined(list(reconstruct_batches(vq, pixels)))
    originals, (row,) = measure(vq, iter(pixels), shown=shown, batch_size=batch_size)
    assert torch.equal(originals, pixels[:shown])
    assert torch.equal(row.shown, whole.reconstruction[:shown])
    assert row.means() == pytest.approx(whole.means()) and len(row.figures["psnr"]) == 11


def test_pictures_are_numbered_through(vq, pixels, monkeypatch):
    """A decoder that draws noise of its own gets the same for a picture, wherever the batches end."""
    seen, decode_each = [], reconstruction.decode_each

    def counting(*args, samples, **more):
        seen.extend(samples.tolist())
        return decode_each(*args, samples=samples, **more)

    monkeypatch.setattr(reconstruction, "decode_each", counting)
    measure(vq, iter(pixels), batch_size=4)
    assert seen == list(range(11))


def test_pictures_do_not_stay_in_memory(vq):
    alive, most = weakref.WeakSet(), 0

    class Picture(torch.Tensor):
        """Can be counted."""

    def stream():
        nonlocal most
        for number in range(40):
            picture = torch.full((3, 16, 16), number / 40).as_subclass(Picture)
            alive.add(picture)
            gc.collect()
            most = max(most, len(alive))
            yield picture

    _, (row,) = measure(vq, stream(), shown=2, batch_size=4)
    assert len(row.figures["psnr"]) == 40 and most <= 10


def test_nothing_to_measure(vq):
    with pytest.raises(VgenError, match="no pictures to measure"):
        measure(vq, iter([]))
