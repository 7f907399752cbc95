"""Guidance mix, temperature, top-k, top-p and the draw of a token, in one op.

    guided  = sum_r weights[r] * logits[r]                                                          float32
    x       = guided / max(temperature, 1e-5)                  temperature 0: the greedy token; no filters, no noise
    top-k   keeps x >= the k-th largest x: ties with it stay
    top-p   walks down the survivors in descending x (equal x: lower token first) with their softmax p and drops one when the p
            walked past before it sum to more than top_p: the token that crosses top_p stays, the first always stays
    token   = argmax(survivors + gumbel), the first of equals: a draw from the survivors' softmax
    log_prob = log-softmax of x at the token, before the filters (temperature 0: of guided): the confidence of adaptive orders

logits: [R, B, m, V] in any float dtype, finite; with one guidance row also -inf. Gumbel noise is a tape [B, m, V], or Philox words
with key (seed, sample) and counter (token // 4, position, step, stream): see philox.py.

Cost: R*V logits are read, 12 bytes are written per row; about 2R+10 FLOPs and 30 integer operations per logit with Philox noise.
The Triton kernel stores no [B, m, V] intermediate: one program per row makes one pass over its logits for the log-sum-exp, one for
the draw, and with a filter eight (top-k) or nine (top-p) more, which find the threshold digit by digit on the bit patterns instead
of sorting; a row of logits stays in the caches between passes. It is bit-exact where the result is discrete: `x` is rounded as in
the twin (no fused multiply-add, IEEE division), so the top-k threshold is the exact k-th largest value. The probability sums of
top-p and the logarithms of the noise are float32 sums in another order, equal up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from vgen.errors import VgenError
from vgen.kernels.launch import Kernel, resolve
from vgen.kernels.philox import PhiloxKey, chunk_rows, gumbel, philox_gumbel_block

if TYPE_CHECKING:
    import triton.language as tl

MIN_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Case:
    """One test or benchmark of `choose_tokens`. large: for the benchmark only, too slow for Triton's interpreter."""

    R: int
    B: int
    m: int
    V: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    noise: str = "philox"  # or "tape"
    token_weights: bool = False  # weights [R, m] instead of [R]
    dtype: torch.dtype = torch.float32
    large: bool = False


CASES = (
    Case(R=1, B=1, m=1, V=1),
    Case(R=1, B=2, m=3, V=37),
    Case(R=2, B=2, m=2, V=130, temperature=0.7, dtype=torch.bfloat16),
    Case(R=3, B=1, m=3, V=1025, temperature=1.3, noise="tape", token_weights=True),
    Case(R=2, B=2, m=2, V=67, temperature=0.0, dtype=torch.float16),
    Case(R=1, B=2, m=3, V=301, top_k=17, dtype=torch.bfloat16),
    Case(R=2, B=1, m=2, V=2053, temperature=0.9, top_k=400),
    Case(R=2, B=1, m=3, V=129, top_p=0.7, noise="tape"),
    Case(R=1, B=2, m=3, V=301, top_p=0.9, dtype=torch.bfloat16),
    Case(R=2, B=1, m=2, V=1100, temperature=1.1, top_k=300, top_p=0.8, token_weights=True),
    Case(R=2, B=16, m=8, V=4096, large=True),
    Case(R=2, B=16, m=8, V=4096, top_k=256, large=True),
    Case(R=2, B=16, m=8, V=4096, top_p=0.95, large=True),
    Case(R=2, B=16, m=16, V=16384, top_k=2000, top_p=0.95, dtype=torch.bfloat16, large=True),
    Case(R=2, B=4, m=16, V=65536, dtype=torch.bfloat16, large=True),
)


def make_inputs(case: Case, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Arguments of `choose_tokens` for a case; in 16 bits many logits are equal, so thresholds meet ties."""
    rng = torch.Generator().manual_seed(case.V)
    logits = 3 * torch.randn(case.R, case.B, case.m, case.V, generator=rng)
    weights = torch.linspace(1.75, -0.75, case.R) if case.R > 1 else torch.ones(1)
    inputs: dict[str, Any] = {
        "logits": logits.to(device, case.dtype),
        "temperature": case.temperature,
        "top_k": case.top_k,
        "top_p": case.top_p,
    }
    if case.token_weights:
        inputs["weights"] = (weights[:, None] * torch.linspace(0.5, 1.0, case.m)).to(device)
    else:
        inputs["weights"] = weights.tolist()
    if case.noise == "tape":
        words = torch.randint(2**32, (case.B, case.m, case.V), generator=rng)
        inputs["gumbel"] = gumbel(words).to(device)
    else:
        inputs |= {"seed": 11, "samples": torch.arange(case.B, device=device) + 5, "step": 2, "stream": 1}
        inputs["positions"] = torch.arange(case.m, device=device) * 3
    return inputs


@torch.no_grad()
def choose_tokens(
    logits: Tensor,
    weights: Sequence[float] | Tensor,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Tensor | None = None,
    samples: Tensor | None = None,
    positions: Tensor | None = None,
    step: int | Tensor = 0,
    stream: int | Tensor = 0,
    gumbel: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws one token per row of guided logits; the module's docstring defines the result.

    logits: [R, B, m, V], one block per guidance row. weights: R numbers, or a tensor [R] or [R, m] (guidance per token).
    temperature: >= 0, 0 is greedy. top_k: 0 … V, 0 is off. top_p: 0 … 1, 1 is off.
    Noise (not needed when greedy): either `gumbel` [B, m, V], or seed (32 bits), samples [B] (global indices of the images),
    positions [m] or [B, m], step and stream; seed and step may be tensors of one element on the device.
    Returns tokens int64 [B, m] and log_prob float32 [B, m]. Raises VgenError for wrong shapes, ranges, or missing noise.
    """
    _check(logits, temperature, top_k, top_p)
    _, batch, m, vocabulary = logits.shape
    weights = _weights(weights, logits)
    noise: PhiloxKey | Tensor | None = gumbel
    if temperature == 0:
        noise = None
    elif gumbel is None:
        if seed is None or samples is None or positions is None:
            raise VgenError(
                "choose_tokens with temperature > 0 needs noise: either gumbel, or seed, samples and positions"
            )
        noise = PhiloxKey.make(seed, samples, positions, step, stream, device=logits.device)
        if noise.positions.shape != (batch, m):
            raise VgenError(
                f"noise is for {list(noise.positions.shape)} [B, m] positions, the logits have {[batch, m]}"
            )
    elif gumbel.shape != logits.shape[1:]:
        raise VgenError(f"gumbel must be [B, m, V] = {list(logits.shape[1:])}, got {list(gumbel.shape)}")
    top_k = 0 if temperature == 0 or top_k >= vocabulary else top_k
    top_p = 1.0 if temperature == 0 else top_p
    return _IMPLEMENTATIONS[resolve(impl, logits)](logits, weights, noise, temperature, top_k, top_p)


def choose_tokens_torch(
    logits: Tensor, weights: Tensor, noise: PhiloxKey | Tensor | None, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """The meaning of `choose_tokens`, over as many rows at once as fit a CPU's cache. weights: [R, m]; noise: None is greedy."""
    batch, m, vocabulary = logits.shape[1:]
    logits = rearrange(logits, "r b m v -> r (b m) v")
    weights = weights.repeat(1, batch)[..., None]  # [R, B*m, 1]
    # Dividing by a Python number would multiply by its reciprocal on CUDA: not the same last bit.
    divisor = torch.full((), max(temperature, MIN_TEMPERATURE) if temperature else 1.0, device=logits.device)
    key_rows = noise.rows() if isinstance(noise, PhiloxKey) else None
    tape = rearrange(noise, "b m v -> (b m) v") if isinstance(noise, Tensor) else None
    tokens = torch.empty(batch * m, 1, dtype=torch.int64, device=logits.device)
    log_prob = torch.empty(batch * m, 1, device=logits.device)

    chunk = chunk_rows(vocabulary, logits.device)
    for start in range(0, batch * m, chunk):
        rows = slice(start, start + chunk)
        x = logits[0, rows].float() * weights[0, rows]
        for part, weight in zip(logits[1:, rows], weights[1:, rows], strict=True):
            x += part.float() * weight
        x /= divisor
        score = keep_likeliest(x, top_k, top_p)
        if key_rows is not None:
            score = gumbel(noise.words(key_rows[0][rows], key_rows[1][rows], vocabulary)).add_(score)
        elif tape is not None:
            score = score + tape[rows].float()
        torch.argmax(score, dim=-1, keepdim=True, out=tokens[rows])
        log_prob[rows] = x.gather(1, tokens[rows]) - x.logsumexp(-1, keepdim=True)
    return tokens.view(batch, m), log_prob.view(batch, m)


def keep_likeliest(score: Tensor, top_k: int, top_p: float) -> Tensor:
    """[n, V] with -inf outside the top-k and the nucleus (module docstring); top_k 0 and top_p 1 are off."""
    if top_k and top_k < score.shape[-1]:
        score = score.masked_fill(score < score.topk(top_k).values[:, -1:], -math.inf)
    return _top_p(score, top_p) if top_p < 1 else score


def _top_p(score: Tensor, top_p: float) -> Tensor:
    """-inf outside the nucleus of softmax(score), [n, V]."""
    descending, token = score.sort(dim=-1, descending=True, stable=True)
    dropped = torch.zeros_like(score, dtype=torch.bool)
    dropped[:, 1:] = descending.softmax(-1).cumsum(-1)[:, :-1] > top_p
    return score.masked_fill(dropped.scatter(1, token, dropped), -math.inf)


def _check(logits: Tensor, temperature: float, top_k: int, top_p: float) -> None:
    if logits.dim() != 4 or not logits.is_floating_point() or 0 in (logits.shape[0], logits.shape[3]):
        raise VgenError(f"logits must be floats [R, B, m, V], got {logits.dtype} {list(logits.shape)}")
    if not 0 <= temperature < math.inf:
        raise VgenError(f"temperature must be 0 (greedy) or a positive number, got {temperature}")
    if top_k < 0:
        raise VgenError(f"top_k must be 0 (off) or a positive count, got {top_k}")
    if not 0 <= top_p <= 1:
        raise VgenError(f"top_p must lie in 0 … 1 (1: off), got {top_p}")


def _weights(weights: Sequence[float] | Tensor, logits: Tensor) -> Tensor:
    """[R, m] float32 on the device of `logits`, without a copy of a device tensor."""
    rows, _, m, _ = logits.shape
    if isinstance(weights, Tensor):
        tensor = weights.to(logits.device, torch.float32)
    else:  # filled on the device: a copy from the host would wait for it
        parts = [torch.full((1,), weight, dtype=torch.float32, device=logits.device) for weight in weights]
        tensor = torch.cat(parts) if parts else torch.empty(0)
    if tensor.shape not in ((rows,), (rows, m)):
        raise VgenError(f"weights must be [R] = [{rows}] or [R, m] = [{rows}, {m}], got {list(tensor.shape)}")
    return tensor[:, None].expand(rows, m) if tensor.dim() == 1 else tensor


# ------------------------------------------------------------------------------------------------------------ Triton


@Kernel
def _guided(
    row_ptr,
    weight_ptr,
    start,
    temperature,
    stride_r,
    stride_v,
    stride_weight,
    R: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x of the tokens start … start+BLOCK-1 of one row; -inf beyond V."""
    token = start + tl.arange(0, BLOCK)
    x = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in tl.static_range(R):
        x += tl.load(row_ptr + token * stride_v, mask=token < V, other=0.0).to(tl.float32) * tl.load(weight_ptr)
        row_ptr += stride_r
        weight_ptr += stride_weight
    return tl.where(token < V, tl.math.div_rn(x, temperature), -float("inf"))


@Kernel
def _ordered(x):
    """uint32 that sort as the floats do: negative ones with all bits flipped, others with the sign bit set; -0 counts as 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@Kernel
def _threshold(
    row_ptr, weight_ptr, temperature, stride_r, stride_v, stride_weight, R: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    floor, top, limit, COUNT: tl.constexpr,
):  # fmt: skip
    """The smallest value v of a row (as `_ordered`, not below `floor`) such that the values above v weigh at most `limit`; and their weight.

    COUNT: every value weighs 1, so that limit = k-1 gives the k-th largest; else exp(x - top). Eight passes find four bits each:
    the weights of the sixteen possible digits, below the bits found so far, say which digit v has.
    """
    digits = tl.arange(0, 16)
    found = tl.cast(0, tl.uint32)
    above = tl.cast(0.0, tl.float32)  # weight of everything larger than the bits found so far
    for i in tl.static_range(8):
        shift = 28 - 4 * i
        mass = tl.zeros([16], dtype=tl.float32)
        for start in range(0, V, BLOCK):
            x = _guided(row_ptr, weight_ptr, start, temperature, stride_r, stride_v, stride_weight, R, V, BLOCK)
            key = _ordered(x)
            weight = tl.exp(x - top)
            if COUNT:
                weight = tl.zeros([BLOCK], dtype=tl.float32) + 1.0
            inside = (key >= floor) & (((key >> shift) >> 4) == found)  # the padding is last of all: never reached
            weight = tl.where(inside, weight, 0.0)
            digit = ((key >> shift) & 15).to(tl.int32)
            mass += tl.sum(tl.where(digit[None, :] == digits[:, None], weight[None, :], 0.0), axis=1)
        heavier = above + tl.sum(tl.where(digits[None, :] > digits[:, None], mass[None, :], 0.0), axis=1)
        chosen = tl.min(tl.where((mass > 0.0) & (heavier <= limit), digits, 15), axis=0)
        above = tl.sum(tl.where(digits == chosen, heavier, 0.0), axis=0)
        found = (found << 4) | chosen.to(tl.uint32)
    return found, above


@Kernel
def _choose_tokens_kernel(
    tokens_ptr, log_prob_ptr, logits_ptr, weights_ptr, tape_ptr, seed_ptr, samples_ptr, positions_ptr, step_ptr, stream_ptr,
    temperature, top_p, m,
    stride_r, stride_b, stride_m, stride_v, stride_weight, stride_weight_m, tape_b, tape_m, tape_v, stride_sample, position_b, position_m,
    R: tl.constexpr, V: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # [B*m] rows of V logits may exceed 2^31 elements
    b = row // m
    i = row % m
    row_ptr = logits_ptr + b * stride_b + i * stride_m
    weight_ptr = weights_ptr + i * stride_weight_m

    top = -float("inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        x = _guided(row_ptr, weight_ptr, start, temperature, stride_r, stride_v, stride_weight, R, V, BLOCK)
        highest = tl.maximum(top, tl.max(x, axis=0))
        shift = tl.where(highest == -float("inf"), 0.0, highest)  # a block of -inf only: no inf - inf
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), axis=0)
        top = highest

    lowest = tl.cast(0, tl.uint32)  # the smallest kept value, as `_ordered`
    above = 0.0
    limit = total
    if TOP_K > 0:
        count = tl.cast(TOP_K - 1, tl.float32)
        lowest, above = _threshold(
            row_ptr, weight_ptr, temperature, stride_r, stride_v, stride_weight, R, V, BLOCK, lowest, top, count, True
        )  # fmt: skip
    if TOP_P:
        kept = 0.0
        for start in range(0, V, BLOCK):
            x = _guided(row_ptr, weight_ptr, start, temperature, stride_r, stride_v, stride_weight, R, V, BLOCK)
            kept += tl.sum(tl.where(_ordered(x) >= lowest, tl.exp(x - top), 0.0), axis=0)
        limit = top_p * kept
        lowest, above = _threshold(
            row_ptr, weight_ptr, temperature, stride_r, stride_v, stride_weight, R, V, BLOCK, lowest, top, limit, False
        )  # fmt: skip

    if NOISE == "philox":
        seed = tl.load(seed_ptr).to(tl.uint32)
        sample = tl.load(samples_ptr + b * stride_sample).to(tl.uint32)
        position = tl.load(positions_ptr + b * position_b + i * position_m).to(tl.uint32)
        step = tl.load(step_ptr).to(tl.uint32)
        stream = tl.load(stream_ptr).to(tl.uint32)
    best = -float("inf")
    best_token = 0
    best_x = 0.0
    ties = 0  # survivors seen so far that equal the top-p threshold
    for start in range(0, V, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = _guided(row_ptr, weight_ptr, start, temperature, stride_r, stride_v, stride_weight, R, V, BLOCK)
        score = x
        if NOISE == "philox":
            score += philox_gumbel_block(start, seed, sample, position, step, stream, BLOCK)
        if NOISE == "tape":
            score += tl.load(tape_ptr + b * tape_b + i * tape_m + token * tape_v, mask=token < V, other=0.0).to(
                tl.float32
            )
        if TOP_K > 0 or TOP_P:
            key = _ordered(x)
            kept_here = key >= lowest
            if TOP_P:
                tie = (key == lowest).to(tl.int32)
                rank = ties + tl.cumsum(tie, axis=0) - tie
                kept_here = kept_here & ((tie == 0) | (above + rank.to(tl.float32) * tl.exp(x - top) <= limit))
                ties += tl.sum(tie, axis=0)
            score = tl.where(kept_here, score, -float("inf"))
        value, lane = tl.max(score, axis=0, return_indices=True)  # the leftmost of equals
        better = value > best
        best = tl.where(better, value, best)
        best_token = tl.where(better, start + lane, best_token)
        best_x = tl.where(better, tl.sum(tl.where(tl.arange(0, BLOCK) == lane, x, 0.0), axis=0), best_x)
    tl.store(tokens_ptr + row, best_token.to(tl.int64))
    tl.store(log_prob_ptr + row, best_x - top - tl.log(total))


def choose_tokens_triton(
    logits: Tensor, weights: Tensor, noise: PhiloxKey | Tensor | None, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """`choose_tokens` as one kernel, one program per row; the same arguments as `choose_tokens_torch`."""
    rows, batch, m, vocabulary = logits.shape
    tokens = torch.empty(batch, m, dtype=torch.int64, device=logits.device)
    log_prob = torch.empty(batch, m, device=logits.device)
    if tokens.numel() == 0:
        return tokens, log_prob
    key = noise if isinstance(noise, PhiloxKey) else None
    tape = noise if isinstance(noise, Tensor) else None
    _choose_tokens_kernel[(batch * m,)](
        tokens, log_prob, logits, weights, tape,
        *((key.seed, key.samples, key.positions, key.step, key.stream) if key else (None,) * 5),
        max(temperature, MIN_TEMPERATURE) if temperature else 1.0, top_p, m,
        *logits.stride(), *weights.stride(), *(tape.stride() if tape is not None else (0, 0, 0)),
        *((key.samples.stride(0), *key.positions.stride()) if key else (0, 0, 0)),
        R=rows, V=vocabulary, TOP_K=top_k, TOP_P=top_p < 1, NOISE="philox" if key else "tape" if tape is not None else "none",
        BLOCK=min(1024, max(16, 1 << (vocabulary - 1).bit_length())),
        enable_fp_fusion=False,  # a fused multiply-add would round x differently from the twin
    )  # fmt: skip
    return tokens, log_prob


_IMPLEMENTATIONS = {"torch": choose_tokens_torch, "triton": choose_tokens_triton}
