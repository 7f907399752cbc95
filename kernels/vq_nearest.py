"""The nearest code of a vector quantizer: distance and argmin without a [rows, codes] matrix.

    index = argmin_k  |e_k|^2 - 2 r·e_k        the squared distance less |r|^2, which is the same for every code of a row

rows [R, C], codebook [K, C] in any float dtype; products and sums in float32; the first of equally near codes. Cost: 2*R*K*C FLOPs;
(R + K)*C numbers are read and 8 bytes per row written, where a distance matrix would add 8*R*K bytes. Both forms tile: the PyTorch
twin over rows, the Triton kernel over rows and codes with a running (minimum, argmin). The Triton kernel multiplies in IEEE float32,
not in TF32, whose 10 bits would choose other codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vgen.errors import VgenError
from vgen.kernels.launch import Kernel, resolve

if TYPE_CHECKING:
    import triton.language as tl

CPU_CHUNK, GPU_CHUNK = 1 << 20, 1 << 26  # distances that the PyTorch twin holds at once


@dataclass(frozen=True)
class Case:
    """Sizes of one test or benchmark of `vq_nearest`. large: for the benchmark only, too slow for Triton's interpreter."""

    R: int
    K: int
    C: int
    dtype: torch.dtype = torch.float32
    large: bool = False


CASES = (
    Case(R=1, K=1, C=1),
    Case(R=37, K=129, C=5),
    Case(R=65, K=300, C=8, dtype=torch.bfloat16),
    Case(R=130, K=77, C=32, dtype=torch.float16),
    Case(R=19, K=200, C=130),
    Case(R=4096, K=1024, C=8, large=True),
    Case(R=4096, K=16384, C=8, large=True),
    Case(R=4096, K=8192, C=256, dtype=torch.bfloat16, large=True),
)


def make_inputs(case: Case, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Arguments of `vq_nearest` for a case: quarters, whose distances are exact in any order of summation and often equal."""
    rng = torch.Generator().manual_seed(case.K)
    rows = torch.randint(-8, 9, (case.R, case.C), generator=rng) / 4
    codebook = torch.randint(-8, 9, (case.K, case.C), generator=rng) / 4
    return {"rows": rows.to(device, case.dtype), "codebook": codebook.to(device, case.dtype)}


@torch.no_grad()
def vq_nearest(rows: Tensor, codebook: Tensor, *, impl: str | None = None) -> Tensor:
    """Index of the code nearest to each row in squared L2 distance; the module's docstring defines it.

    rows: [R, C], codebook: [K, C], floats on one device. Returns int64 [R], values 0 … K-1.
    Raises VgenError for shapes that do not fit and for an unknown `impl`.
    """
    if rows.dim() != 2 or codebook.dim() != 2 or rows.shape[1] != codebook.shape[1] or len(codebook) == 0:
        raise VgenError(
            f"vq_nearest needs rows [R, C] and a codebook [K, C], got {list(rows.shape)} and {list(codebook.shape)}"
        )
    return _IMPLEMENTATIONS[resolve(impl, rows)](rows, codebook)


def vq_nearest_torch(rows: Tensor, codebook: Tensor) -> Tensor:
    """The meaning of `vq_nearest`."""
    codes = codebook.float()
    squares = codes.square().sum(dim=1)
    chunk = max(1, (CPU_CHUNK if rows.device.type == "cpu" else GPU_CHUNK) // len(codes))
    parts = [torch.addmm(squares, part.float(), codes.T, alpha=-2).argmin(dim=1) for part in rows.split(chunk)]
    return torch.cat(parts)


@Kernel
def _vq_nearest_kernel(
    out_ptr, rows_ptr, codebook_ptr, R, row_stride, row_channel, code_stride, code_channel,
    K: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    nearest = tl.full([BLOCK_R], float("inf"), dtype=tl.float32)
    index = tl.zeros([BLOCK_R], dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        code = start + tl.arange(0, BLOCK_K)
        products = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
        squares = tl.zeros([BLOCK_K], dtype=tl.float32)
        for first in range(0, C, BLOCK_C):
            channel = first + tl.arange(0, BLOCK_C)
            r = tl.load(
                rows_ptr + row[:, None] * row_stride + channel[None, :] * row_channel,
                mask=(row < R)[:, None] & (channel < C)[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            e = tl.load(
                codebook_ptr + code[:, None] * code_stride + channel[None, :] * code_channel,
                mask=(code < K)[:, None] & (channel < C)[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            products = tl.dot(r, tl.trans(e), acc=products, input_precision="ieee")
            squares += tl.sum(e * e, axis=1)
        distance = tl.where((code < K)[None, :], squares[None, :] - 2.0 * products, float("inf"))
        value, lane = tl.min(distance, axis=1, return_indices=True)  # the leftmost of equals
        closer = value < nearest
        nearest = tl.where(closer, value, nearest)
        index = tl.where(closer, start + lane, index)
    tl.store(out_ptr + row, index.to(tl.int64), mask=row < R)


def vq_nearest_triton(rows: Tensor, codebook: Tensor) -> Tensor:
    """`vq_nearest` as one kernel: one program per 32 rows walks over all codes."""
    index = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    if len(rows) == 0:
        return index
    block_rows = 32
    _vq_nearest_kernel[(-(-len(rows) // block_rows),)](
        index, rows, codebook, len(rows), *rows.stride(), *codebook.stride(),
        K=len(codebook), C=rows.shape[1], BLOCK_R=block_rows, BLOCK_K=128,
        BLOCK_C=min(32, max(16, 1 << (rows.shape[1] - 1).bit_length())), enable_fp_fusion=False,
    )  # fmt: skip
    return index


_IMPLEMENTATIONS = {"torch": vq_nearest_torch, "triton": vq_nearest_triton}
