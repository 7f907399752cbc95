"""Philox 4x32-10: the published answers, the place of every word, the distributions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vgen.errors import VgenError
from vgen.kernels.launch import Kernel
from vgen.kernels.philox import (
    gumbel,
    normal,
    philox_4x32,
    philox_gumbel,
    philox_normal,
    philox_rounds,
    philox_u32,
    philox_uniform,
    uniform,
)

# Counter, key, words: the known answers that the authors distribute with Random123 (kat_vectors, philox4x32 10).
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@Kernel
def _known_answer_kernel(out_ptr, in_ptr):
    c0 = tl.load(in_ptr + 0).to(tl.uint32)  # noqa: F821  (`tl` enters with the first launch)
    c1 = tl.load(in_ptr + 1).to(tl.uint32)  # noqa: F821
    c2 = tl.load(in_ptr + 2).to(tl.uint32)  # noqa: F821
    c3 = tl.load(in_ptr + 3).to(tl.uint32)  # noqa: F821
    k0 = tl.load(in_ptr + 4).to(tl.uint32)  # noqa: F821
    k1 = tl.load(in_ptr + 5).to(tl.uint32)  # noqa: F821
    w0, w1, w2, w3 = philox_rounds(c0, c1, c2, c3, k0, k1)
    tl.store(out_ptr + 0, w0.to(tl.int64))  # noqa: F821
    tl.store(out_ptr + 1, w1.to(tl.int64))  # noqa: F821
    tl.store(out_ptr + 2, w2.to(tl.int64))  # noqa: F821
    tl.store(out_ptr + 3, w3.to(tl.int64))  # noqa: F821


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words, impl, device):
    numbers = torch.tensor(counter + key, device=device)
    if impl == "torch":
        assert [int(word) for word in philox_4x32(*numbers)] == list(words)
    else:
        out = torch.zeros(4, dtype=torch.int64, device=device)
        _known_answer_kernel[(1,)](out, numbers, enable_fp_fusion=False)
        assert out.tolist() == list(words)


def test_every_word_has_its_place(impl, device):
    seed, samples, positions, step, stream = 2**32 - 1, [3, 2**32 - 1], [[9, 0, 4], [1, 2**31, 7]], 6, 5
    out = philox_u32(
        seed, torch.tensor(samples), torch.tensor(positions, device=device), step, stream, elements=10, impl=impl
    )
    assert out.dtype == torch.int64 and out.shape == (2, 3, 10)
    for b, sample in enumerate(samples):
        for i, position in enumerate(positions[b]):
            blocks = [
                philox_4x32(*map(torch.tensor, (block, position, step, stream, seed, sample))) for block in range(3)
            ]
            assert out[b, i].tolist() == [int(word) for block in blocks for word in block][:10]


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 4), m=st.integers(1, 5), elements=st.integers(1, 40), fewer=st.integers(1, 40), chunk=st.integers(1, 200)
)  # fmt: skip
def test_a_draw_depends_on_nothing_but_its_key_and_counter(batch, m, elements, fewer, chunk):
    samples, positions = torch.arange(batch) + 100, torch.randperm(m, generator=torch.Generator().manual_seed(m))
    whole = philox_u32(1, samples, positions, 2, 3, elements, impl="torch")
    fewer = min(fewer, elements)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vgen.kernels.philox.CPU_CHUNK", chunk)
        part = philox_u32(1, samples[-1:], positions.flip(0).expand(1, m), 2, 3, fewer, impl="torch")
    assert torch.equal(part[0], whole[-1].flip(0)[:, :fewer])


def test_seed_step_and_stream_may_live_on_the_device(impl, device):
    samples, positions = torch.arange(2), torch.arange(3, device=device)
    numbers = philox_u32(7, samples, positions, 8, 9, 5, impl=impl)
    scalars = [torch.tensor([value], device=device) for value in (7, 8, 9)]
    assert torch.equal(numbers, philox_u32(scalars[0], samples, positions, *scalars[1:], 5, impl=impl))
    others = [philox_u32(*args, 5, impl=impl) for args in (
        (6, samples, positions, 8, 9), (7, samples + 2, positions, 8, 9), (7, samples, positions + 3, 8, 9),
        (7, samples, positions, 7, 9), (7, samples, positions, 8, 8),
    )]  # fmt: skip
    assert all(not (numbers == other).any() for other in others)


def test_floats_stay_inside_their_range():
    ends = torch.tensor([0, 0x1FF, 0x200, 2**32 - 1])
    assert uniform(ends).tolist() == [2.0**-24, 2.0**-24, 3 * 2.0**-24, 1 - 2.0**-24]
    assert gumbel(ends).isfinite().all()
    assert normal(torch.cartesian_prod(ends, ends)).isfinite().all()


def test_distributions():
    key = {
        "seed": 3,
        "samples": torch.arange(8),
        "positions": torch.arange(16),
        "step": 1,
        "stream": 0,
        "elements": 1025,
    }
    u, g, n = (draw(**key).double() for draw in (philox_uniform, philox_gumbel, philox_normal))
    count = u.numel()
    for values, mean, variance, kurtosis in (
        (u, 0.5, 1 / 12, 1.8),
        (g, 0.5772156649, math.pi**2 / 6, 5.4),
        (n, 0.0, 1.0, 3.0),
    ):
        assert abs(values.mean() - mean) < 4 * (variance / count) ** 0.5
        assert abs(values.var() - variance) < 4 * variance * ((kurtosis - 1) / count) ** 0.5
    pairs = n[..., :1024].unflatten(-1, (512, 2))
    assert abs((pairs[..., 0] * pairs[..., 1]).mean()) < 4 / pairs[..., 0].numel() ** 0.5
    assert torch.equal(n[..., :5], philox_normal(**(key | {"elements": 5})).double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed must lie in 0"),
        ({"step": 2**32}, "step must lie in 0"),
        ({"stream": torch.tensor(0.5)}, "stream must be an integer"),
        ({"samples": torch.tensor(3)}, r"samples \[B\]"),
        ({"positions": torch.zeros(3, 1, dtype=torch.long)}, r"positions \[m\] or \[B, m\]"),
    ],
)
def test_errors(change, message):
    arguments = {
        "seed": 0,
        "samples": torch.arange(2),
        "positions": torch.arange(3),
        "step": 0,
        "stream": 0,
        "elements": 4,
    }
    with pytest.raises(VgenError, match=message):
        philox_u32(**(arguments | change))
