"""Step sizes: how many of the N tokens each of the K forward passes decodes.

`step_sizes` is what vgen's own orders use: exactly K positive sizes for every 1 <= K <= N. The functions named after a
paper reproduce that paper's counts, rounding included, and are what its published checkpoints were sampled with. The
guidance and temperature ramps that are tied to such a count stand beside it. Everything here is a pure function of host
numbers; torch is imported by the two that round as torch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from vgen.errors import VgenError, nearest

if TYPE_CHECKING:
    import torch

# ---- vgen's own rule -------------------------------------------------------------------------------------------------

# Share of the tokens that is still unknown after the share r of the steps, from 1 at r = 0 to 0 at r = 1.
CURVES: dict[str, Callable[[float], float]] = {
    "cosine": lambda r: math.cos(math.pi / 2 * r),  # few tokens first, many at the end (MaskGIT's paper, MAR, ARPG)
    "arccos": lambda r: math.acos(r) / (math.pi / 2),  # nearly even, then one big last step (MaskGIT's code, ARPG)
    "square": lambda r: 1 - r * r,  # between linear and cosine
}


def curve_sizes(tokens: int, steps: int, curve: str) -> list[int]:
    """Sizes that follow `CURVES[curve]`, rounded down, at least one token a step and one left for every later step."""
    _check(tokens, steps)
    sizes, unknown = [], tokens
    for step in range(1, steps + 1):
        after = math.floor(tokens * CURVES[curve](step / steps))
        after = max(steps - step, min(unknown - 1, after))
        sizes.append(unknown - after)
        unknown = after
    return sizes


def linear_sizes(tokens: int, steps: int) -> list[int]:
    """Near-equal sizes: they differ by at most one token."""
    _check(tokens, steps)
    return [(step + 1) * tokens // steps - step * tokens // steps for step in range(steps)]


def mar_sizes(tokens: int, steps: int) -> list[int]:
    """Tokens per step of MAR, Hi-MAR and MaskGen-KL: `mar_unknown` as sizes. It is the cosine curve, rounded differently."""
    return _sizes(mar_unknown(tokens, steps))


SCHEDULES: dict[str, Callable[[int, int], list[int]]] = {
    **{name: partial(curve_sizes, curve=name) for name in CURVES},
    "linear": linear_sizes,
    "mar": mar_sizes,
}


def step_sizes(tokens: int, steps: int, schedule: str = "cosine") -> list[int]:
    """Exactly `steps` positive sizes that sum to `tokens`.

    tokens: N >= 1. steps: 1..N. schedule: a name of `SCHEDULES`. Raises VgenError for anything else.
    """
    if schedule not in SCHEDULES:
        raise VgenError(
            f"a step schedule is one of {', '.join(SCHEDULES)}, got {schedule!r}{nearest(schedule, SCHEDULES)}"
        )
    return SCHEDULES[schedule](tokens, steps)


def default_steps(tokens: int) -> int:
    """Passes of a free-count order when none is asked for: about two for every row of a square grid (16x16: 32)."""
    return min(tokens, max(1, round(2 * math.sqrt(tokens))))


def scaled_sizes(sizes: list[int], tokens: int) -> list[int]:
    """`sizes` shrunk in proportion to the smaller sum `tokens`: one entry per size, some of them possibly 0."""
    total, done, scaled = sum(sizes), 0, []
    for size in sizes:
        before = (done * tokens + total // 2) // total
        done += size
        scaled.append((done * tokens + total // 2) // total - before)
    return scaled


def _sizes(unknown: list[int]) -> list[int]:
    """Unknown tokens before each step -> how many each step decodes; the last one decodes all that are left."""
    return [before - after for before, after in pairwise([*unknown, 0])]


def _check(tokens: int, steps: int) -> None:
    if not 1 <= steps <= tokens:
        raise VgenError(f"{tokens} tokens can be decoded in 1 to {tokens} steps, got {steps}")


# ---- ARPG and RandAR: random orders ----------------------------------------------------------------------------------


def arpg_sizes(tokens: int, steps: int, schedule: str = "arccos") -> list[int]:
    """Tokens per pass of ARPG (arXiv 2503.10568): 'arccos' or 'cosine' schedule; 1 <= steps <= tokens."""
    _check(tokens, steps)
    if schedule not in ("arccos", "cosine"):
        raise VgenError(f"ARPG's schedules are 'arccos' and 'cosine', got {schedule!r}")
    sizes, done = [], 0
    for step in range(1, steps):
        left = max(1, min(tokens - done - 1, int(tokens * CURVES[schedule](step / steps))))
        sizes.append(tokens - done - left)
        done = tokens - left
    return [*sizes, tokens - done]


def randar_sizes(tokens: int, steps: int) -> list[int]:
    """Tokens per pass of RandAR (arXiv 2412.01827, released sampler).

    steps: `num_inference_steps`; -1 means one token a pass. The first pass always decodes one token, so steps = 1 gives
    two passes; more steps than tokens give one token a pass.
    """
    steps = tokens if steps == -1 else steps
    if steps < 1:
        raise VgenError(f"RandAR's steps are at least 1, or -1 for one token a step; got {steps}")
    sizes, done = [1], 1
    while done < tokens:
        target = min(int((1 - math.cos(math.pi / 2 * (len(sizes) + 1) / steps)) * tokens + 1), tokens)
        size = min(max(target - done, 1), tokens - done)
        sizes.append(size)
        done += size
    return sizes


# ---- MAR, Hi-MAR, MaskGIT, ENAT, Lumos-1: masked models --------------------------------------------------------------


def mar_unknown(tokens: int, steps: int) -> list[int]:
    """Unknown tokens before each step of MAR (arXiv 2406.11838) and of either phase of Hi-MAR (arXiv 2505.20288).

    Cosine in double precision, forced down by at least one a step; the last step predicts all that is left.
    """
    _check(tokens, steps)
    return _mar_counts(tokens, steps)[:-1]


def mar_guidance(tokens: int, steps: int, scale: float, schedule: str = "linear") -> list[float]:
    """Guidance weight of every step of MAR and Hi-MAR: 1 + (scale - 1) * known share after the step, or constant.

    The count after the last step is 1, not 0 (the released clamp), so a linear ramp ends just below `scale`.
    """
    _check(tokens, steps)
    if schedule not in ("linear", "constant"):
        raise VgenError(f"MAR's guidance schedules are 'linear' and 'constant', got {schedule!r}")
    after = _mar_counts(tokens, steps)[1:]
    return [scale if schedule == "constant" else 1 + (scale - 1) * (tokens - left) / tokens for left in after]


def _mar_counts(tokens: int, steps: int) -> list[int]:
    counts = [tokens]
    for step in range(1, steps + 1):
        counts.append(max(1, min(counts[-1] - 1, math.floor(tokens * math.cos(math.pi / 2 * step / steps)))))
    return counts


def maskgit_unknown(tokens: int, steps: int) -> list[int]:
    """Unknown tokens before each step of the MaskGIT sampler used with TiTok (arXiv 2406.07550): the arccos rule.

    More steps than tokens are allowed, as in the released sampler: late steps then re-decide one last token. MaskGen-VQ
    (arXiv 2501.07730) computes the same in fp32, which gives other counts from 557 tokens on (it has 128).
    """
    if min(tokens, steps) < 1:
        raise VgenError(f"MaskGIT needs at least one token and one step, got {tokens} tokens and {steps} steps")
    counts = [tokens]
    for step in range(1, steps):
        counts.append(max(1, min(counts[-1] - 1, math.floor(tokens * math.acos(step / steps) / (math.pi / 2)))))
    return counts


# Sizes of the released masked samplers, by (tokens, steps). Unlike those of SCHEDULES they may be 0: steps may outnumber tokens.
MASKED_SCHEDULES: dict[str, Callable[[int, int], list[int]]] = {
    "maskgit": lambda tokens, steps: _sizes(maskgit_unknown(tokens, steps)),
}


# What the confidence order takes where nothing else is asked for.
CONFIDENCE_SCHEDULE, CONFIDENCE_TEMPERATURE = "arccos", 4.5


def enat_unknown(tokens: int, steps: int) -> list[int]:
    """Unknown tokens before each step of ENAT (arXiv 2411.06959): floor(N cos(pi/2 * share done)), without a clamp."""
    return [math.floor(tokens * math.cos(math.pi / 2 * step / steps)) for step in range(steps)]


def lumos_unknown(tokens: int, steps: int) -> list[int]:
    """Codes that stay masked after each step inside one frame of Lumos-1 (arXiv 2507.08801, released sampler).

    Every operation is in fp32 in this order: a double-precision cosine gives other counts (16 codes at 2/3: 7, not 8).
    The last entry is the rule's value (>= 1) although the last step keeps everything.
    """
    import torch

    counts, unknown = [], tokens
    for step in range(1, steps + 1):
        ratio = torch.tensor(step / steps, dtype=torch.float32)
        left = int((tokens * torch.cos((ratio * math.pi) * 0.5)).floor())
        unknown = max(1, min(unknown - 1, left))
        counts.append(unknown)
    return counts


def lumos_temperatures(steps: int, frames: int, start: float = 1.0) -> list[float]:
    """Confidence temperature of every step of every frame of Lumos-1: [frames * steps].

    Multiplied by (1 - share of the steps done) at each step and never reset: 0 from the end of the first frame on.
    """
    values, temperature = [], start
    for _ in range(frames):
        for step in range(1, steps + 1):
            temperature *= 1 - step / steps
            values.append(temperature)
    return values


def lumos_history(length: int, ratio: float) -> torch.Tensor:
    """Evenly spaced content slots of a finished frame that Lumos-1 hides when it writes the frame to the cache.

    length: content tokens of one frame, row ends included. ratio: share to hide. Returns
    [max(1, round(ratio * length))] int64, ascending; computed in fp32 as released.
    """
    import torch

    count = max(1, round(ratio * length))
    slots = torch.arange(count, dtype=torch.float32) * (length / count)
    return slots.round().long().clamp(max=length - 1)


# ---- LPD: published group sizes --------------------------------------------------------------------------------------

# Group sizes of LPD (arXiv 2507.01957) by (tokens, steps), in order; "2*46" is 46 groups of two tokens. They are
# tables, not a formula: only 256/20 and 1024/48 follow the cosine rule of `lpd_sizes` exactly.
LPD_TABLES = {
    (256, 256): "1*256",
    (256, 128): "1*41 2*46 3*41",
    (256, 64): "1*10 2*7 3*7 4*9 5*11 6*20",
    (256, 32): "1*2 2*2 3*2 4 5*2 6*2 7*2 8*2 9*2 10*3 11*4 12*8",
    (256, 24): "1 2 3 4 5 6 7 8 9 10 11*2 12 13 14*3 15*2 16*3 17*2",
    (256, 20): "1 2 4 5 7 8 10 11 12 14 15 16 17 18*2 19*2 20*3",
    (256, 16): "1 4 6 8 11 13 15 17 19 20 22 23 24*3 25",
    (256, 12): "1 7 11 15 19 22 25 28 30 32 33*2",
    (256, 8): "1 15 24 32 40 45 49 50",
    (1024, 1024): "1*1024",
    (1024, 512): "1*162 2*188 3*162",
    (1024, 256): "1*39 2*28 3*31 4*34 5*44 6*80",
    (1024, 224): "1*32 2*21 3*21 4*24 5*27 6*37 7*62",
    (1024, 192): "1*22 2*15 3*16 4*16 5*19 6*21 7*27 8*55 10*1",
    (1024, 160): "1*15 2*11 3*10 4*12 5*12 6*13 7*14 8*17 9*23 10*33",
    (1024, 128): "1*10 2*6 3*7 4*7 5*7 6*7 7*8 8*9 9*9 10*11 11*14 12*26 13*7",
    (1024, 96): "1*5 2*4 3*4 4*4 5*3 6*4 7*4 8*5 9*4 10*4 11*6 12*5 13*6 14*7 15*8 16*13 17*10",
    (1024, 80): "1*4 2*2 3*3 4*2 5*3 6*3 7*2 8*3 9*3 10*3 11*3 12*3 13*3 14*4 15*4 16*4 17*6 18*6 19*7 20*12",
    (1024, 64): (
        "1*2 2*2 3*2 4 5*2 6*2 7 8*2 9*2 10*2 11 12*2 13*2 14*2 15*2 16*2 17*2 18*3 19*2 20*3 21*3 22*3 23*5 24*6 25*8"
    ),
    (1024, 56): (
        "1*2 2 3 4*2 5 6 7 8*2 9 10 11*2 12 13 14*2 15 16*2 17 18*2 19*2 20 21*2 22*2 23*2 24*2 25*3 26*3 27*5 28*6 29*3"
    ),
    (1024, 48): (
        "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23*2 24 25 26*2 27 28*2 29*2 30*2 31*2 32*3 33*7 34"
    ),
    (1024, 40): "1 2 4 6 7 9 10 12 13 15 16 18 19 20 22 23 24 26 27 28 29 30 31 32 33 34 35*2 36 37*2 38*2 39*3 40*4",
    (1024, 32): "1 4 6 9 11 13 16 18 20 23 25 27 29 31 33 35 36 38 40 41 42 44 45 46 47 48*2 49*2 50*3",
}


def lpd_sizes(tokens: int, steps: int) -> list[int]:
    """Group sizes of LPD: the published table for (tokens, steps) where there is one, else its cosine rule.

    The rule is max(1, round(N (cos(pi k / 2K) - cos(pi (k+1) / 2K)))); what rounding adds or misses is paid back by the
    last, largest groups, so the sizes always sum to `tokens`.
    """
    _check(tokens, steps)
    if (tokens, steps) in LPD_TABLES:
        runs = (entry.partition("*") for entry in LPD_TABLES[tokens, steps].split())
        return [int(size) for size, _, count in runs for _ in range(int(count or 1))]
    curve = [tokens * math.cos(math.pi * k / (2 * steps)) for k in range(steps + 1)]
    sizes = [max(1, round(curve[k] - curve[k + 1])) for k in range(steps)]
    excess = sum(sizes) - tokens
    while excess:
        for k in reversed(range(steps)):
            change = (excess > 0) - (excess < 0)
            if change and sizes[k] - change >= 1:
                sizes[k] -= change
                excess -= change
    return sizes


# ---- guidance ramp by step number ------------------------------------------------------------------------------------


def power_cosine_weights(scale: float, power: float, steps: int) -> list[float]:
    """Guidance weights 1 + (scale - 1)/2 (1 - cos(pi (t/K)^power)) for t = 0..K-1 (RAR, DAR: arXiv 2503.11129).

    The first weight is 1 (unguided) and `scale` itself is never reached.
    """
    return [1 + (scale - 1) / 2 * (1 - math.cos(math.pi * (step / steps) ** power)) for step in range(steps)]
