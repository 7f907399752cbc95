"""Philox 4x32-10, the counter-based random generator behind every draw of sampling.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC'11). A draw is a pure function of

    key     = (seed, sample)                         sample: the global index of the image, not its row in the batch
    counter = (element // 4, position, step, stream)

and the four 32-bit words of a counter serve elements 4i … 4i+3. So the noise of a token does not depend on the batch it is drawn
in, on the number of processes, or on the order in which positions are decoded; PyTorch and Triton give the same integers.

Op `philox_u32`: writes 8 bytes per element and reads next to nothing; about 100 integer operations per four elements. The Triton
kernel fuses the ten rounds; `choose_tokens` fuses the generator itself and never stores a word.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from vgen.errors import VgenError
from vgen.kernels.launch import Kernel, device_scalar, resolve

if TYPE_CHECKING:
    import triton.language as tl

MASK = 0xFFFFFFFF
CPU_CHUNK, GPU_CHUNK = (
    1 << 17,
    1 << 24,
)  # elements per pass of the PyTorch twins; a CPU's temporaries should stay in its L2 cache


@dataclass(frozen=True)
class PhiloxKey:
    """Where draws of a [B, m] block of positions sit in the generator's space; all int64 on one device, values of 32 bits.

    seed: [], samples: [B, 1], positions: [B, m], step: [], stream: [].
    """

    seed: Tensor
    samples: Tensor
    positions: Tensor
    step: Tensor
    stream: Tensor

    @classmethod
    def make(
        cls,
        seed: int | Tensor,
        samples: Tensor,
        positions: Tensor,
        step: int | Tensor = 0,
        stream: int | Tensor = 0,
        device: torch.device | None = None,
    ) -> PhiloxKey:
        """Checks and broadcasts: samples [B], positions [m] or [B, m]; device: None is that of `positions`."""
        device = positions.device if device is None else device
        if (
            samples.dim() != 1
            or positions.dim() not in (1, 2)
            or (positions.dim() == 2 and len(positions) != len(samples))
        ):
            raise VgenError(
                f"noise needs samples [B] and positions [m] or [B, m], got {list(samples.shape)} and {list(positions.shape)}"
            )
        return cls(
            seed=device_scalar(seed, "seed", device),
            samples=samples.to(device, torch.int64)[:, None],
            positions=positions.to(device, torch.int64).expand(len(samples), positions.shape[-1]),
            step=device_scalar(step, "step", device),
            stream=device_scalar(stream, "stream", device),
        )

    def rows(self) -> tuple[Tensor, Tensor]:
        """(sample, position) of every row: [B*m, 1] each."""
        samples = self.samples.expand_as(self.positions)
        return rearrange(samples, "b m -> (b m) 1"), rearrange(self.positions, "b m -> (b m) 1")

    def words(self, samples: Tensor, positions: Tensor, elements: int) -> Tensor:
        """Words [n, elements] for some of `rows()`, each [n, 1]; int64 holding 32-bit values."""
        block = torch.arange(-(-elements // 4), device=samples.device)
        words = philox_4x32(block[None], positions, self.step, self.stream, self.seed, samples)
        return torch.stack(words, dim=-1).flatten(1)[:, :elements]


def chunk_rows(elements: int, device: torch.device) -> int:
    """Rows of `elements` that a PyTorch twin handles at once."""
    return max(1, (CPU_CHUNK if device.type == "cpu" else GPU_CHUNK) // max(elements, 1))


# ------------------------------------------------------------------------------------------------------------ the op


@dataclass(frozen=True)
class Case:
    """Sizes of one test or benchmark of `philox_u32`. large: for the benchmark only, too slow for Triton's interpreter."""

    B: int
    m: int
    elements: int
    step: int = 0
    large: bool = False


CASES = (
    Case(B=1, m=1, elements=1),
    Case(B=2, m=3, elements=7, step=5),
    Case(B=3, m=2, elements=1030, step=2**32 - 1),
    Case(B=16, m=64, elements=16, large=True),
    Case(B=16, m=64, elements=4096, large=True),
)


def make_inputs(case: Case, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Arguments of `philox_u32` for a case."""
    positions = torch.arange(case.B * case.m, device=device).view(case.B, case.m) * 7
    samples = torch.arange(case.B, device=device) + 2**32 - case.B
    return {
        "seed": 2**32 - 5,
        "samples": samples,
        "positions": positions,
        "step": case.step,
        "stream": 3,
        "elements": case.elements,
    }


@torch.no_grad()
def philox_u32(
    seed: int | Tensor,
    samples: Tensor,
    positions: Tensor,
    step: int | Tensor = 0,
    stream: int | Tensor = 0,
    elements: int = 1,
    *,
    impl: str | None = None,
) -> Tensor:
    """Random 32-bit words.

    seed, step, stream: integers of 32 bits, or one-element tensors (read on the device). samples: [B]; positions: [m] or [B, m].
    Returns int64 [B, m, elements] holding values 0 … 2^32-1, on the device of `positions`.
    Raises VgenError for integers out of range, wrong shapes, an unknown `impl`.
    """
    key = PhiloxKey.make(seed, samples, positions, step, stream)
    return _IMPLEMENTATIONS[resolve(impl, positions)](key, elements)


def philox_u32_torch(key: PhiloxKey, elements: int) -> Tensor:
    """The meaning of `philox_u32`."""
    samples, positions = key.rows()
    words = torch.empty(len(samples), elements, dtype=torch.int64, device=samples.device)
    chunk = chunk_rows(elements, samples.device)
    for start in range(0, len(samples), chunk):
        part = slice(start, start + chunk)
        words[part] = key.words(samples[part], positions[part], elements)
    return words.view(*key.positions.shape, elements)


def philox_4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, ...]:
    """Ten rounds on broadcastable int64 tensors of 32-bit values.

    A product may exceed 63 bits: int64 wraps, which leaves all 64 bits as they should be, and after `>> 32` the mask removes the
    copies of the sign. c1 and c3 carry whole products between rounds, because their upper halves vanish under the same mask.
    """
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((product1 >> 32) ^ (c1 ^ k0)) & MASK, product1
        c2, c3 = ((product0 >> 32) ^ (c3 ^ k1)) & MASK, product0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85  # no mask: the bits above 32 stay above 32
    return c0, c1 & MASK, c2, c3 & MASK


# ------------------------------------------------------------------------------------------------ words -> distributions


def uniform(words: Tensor) -> Tensor:
    """U(0, 1) in float32 from 32-bit words: the middles of 2^23 equal cells, so exact, and never 0 or 1."""
    return (words >> 9).float().add_(0.5).mul_(2.0**-23)


def gumbel(words: Tensor) -> Tensor:
    """Gumbel(0, 1) in float32, within -2.82 … 16.64: argmax(logits + gumbel) is a draw from softmax(logits)."""
    return uniform(words).log_().neg_().log_().neg_()


def normal(words: Tensor) -> Tensor:
    """N(0, 1) in float32, within ±5.77, by Box and Muller's transform of each pair of words (last dimension even)."""
    u = rearrange(uniform(words), "... (n pair) -> pair ... n", pair=2)
    radius = u[0].log().mul_(-2.0).sqrt_()
    angle = u[1] * (2 * math.pi)
    return rearrange([radius * angle.cos(), radius * angle.sin()], "pair ... n -> ... (n pair)")


def philox_uniform(
    seed: int | Tensor, samples: Tensor, positions: Tensor, step: int | Tensor, stream: int | Tensor, elements: int
) -> Tensor:
    """U(0, 1) noise, float32 [B, m, elements]; arguments as in `philox_u32`."""
    return uniform(philox_u32(seed, samples, positions, step, stream, elements))


def philox_gumbel(
    seed: int | Tensor, samples: Tensor, positions: Tensor, step: int | Tensor, stream: int | Tensor, elements: int
) -> Tensor:
    """Gumbel(0, 1) noise, float32 [B, m, elements]; arguments as in `philox_u32`. The noise that `choose_tokens` adds."""
    return gumbel(philox_u32(seed, samples, positions, step, stream, elements))


def philox_normal(
    seed: int | Tensor, samples: Tensor, positions: Tensor, step: int | Tensor, stream: int | Tensor, elements: int
) -> Tensor:
    """N(0, 1) noise, float32 [B, m, elements]; arguments as in `philox_u32`. An odd count leaves half a pair unused."""
    return normal(philox_u32(seed, samples, positions, step, stream, elements + elements % 2))[..., :elements]


# ------------------------------------------------------------------------------------------------------------ Triton


@Kernel
def philox_rounds(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32 values: the same words as `philox_4x32`."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@Kernel
def philox_words(start, seed, sample, position, step, stream, BLOCK: tl.constexpr):
    """Words of elements start … start+BLOCK-1 (uint32; both numbers multiples of 4); four elements share one run of the rounds."""
    zero = tl.zeros([BLOCK // 4], dtype=tl.uint32)
    block = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    w0, w1, w2, w3 = philox_rounds(block, zero + position, zero + step, zero + stream, zero + seed, zero + sample)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@Kernel
def philox_gumbel_block(start, seed, sample, position, step, stream, BLOCK: tl.constexpr):
    """Gumbel noise of elements start … start+BLOCK-1, as `gumbel`."""
    words = philox_words(start, seed, sample, position, step, stream, BLOCK)
    u = ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return -tl.log(-tl.log(u))


@Kernel
def _philox_u32_kernel(
    out_ptr, seed_ptr, samples_ptr, positions_ptr, step_ptr, stream_ptr, m, stride_sample, stride_b, stride_m, E: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    start = tl.program_id(1) * BLOCK
    words = philox_words(
        start,
        tl.load(seed_ptr).to(tl.uint32),
        tl.load(samples_ptr + row // m * stride_sample).to(tl.uint32),
        tl.load(positions_ptr + row // m * stride_b + row % m * stride_m).to(tl.uint32),
        tl.load(step_ptr).to(tl.uint32),
        tl.load(stream_ptr).to(tl.uint32),
        BLOCK,
    )
    element = start + tl.arange(0, BLOCK)
    tl.store(out_ptr + row.to(tl.int64) * E + element, words.to(tl.int64), mask=element < E)


def philox_u32_triton(key: PhiloxKey, elements: int) -> Tensor:
    """`philox_u32` as one kernel: one program per row and block of elements."""
    words = torch.empty(*key.positions.shape, elements, dtype=torch.int64, device=key.positions.device)
    if words.numel() == 0:
        return words
    block = min(1024, max(16, 1 << (elements - 1).bit_length()))
    grid = (key.positions.numel(), -(-elements // block))
    _philox_u32_kernel[grid](
        words, key.seed, key.samples, key.positions, key.step, key.stream,
        key.positions.shape[1], key.samples.stride(0), *key.positions.stride(), E=elements, BLOCK=block, enable_fp_fusion=False,
    )  # fmt: skip
    return words


_IMPLEMENTATIONS = {"torch": philox_u32_torch, "triton": philox_u32_triton}
