"""Models in bf16 and fp16 draw from noise in fp32: of the few values of a 16-bit uniform many are equal, and the first code wins."""

import pytest
import torch

from vgen.kernels.choose_tokens import choose_tokens
from vgen.kernels.philox import philox_gumbel
from vgen.samplers import predictions
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.types import Step

HALF = [torch.bfloat16, torch.float16]
DRAWS = ["rand", "randn", "rand_like", "randn_like", "randint", "multinomial", "bernoulli", "normal"]


@pytest.mark.parametrize("dtype", HALF)
def test_tokens_of_half_logits_are_those_of_fp32_noise(dtype):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(1, 2, 7, 500, generator=generator).to(dtype)
    key = {"seed": 3, "samples": torch.arange(2), "positions": torch.arange(7), "step": 4, "stream": 0}
    noise = philox_gumbel(**key, elements=500)
    tokens, log_prob = choose_tokens(logits, [1.0], temperature=1.0, **key)
    assert torch.equal(tokens, (logits[0].float() + noise).argmax(dim=-1)) and log_prob.dtype == torch.float32
    # The same with noise in 16 bits: equal maxima, other tokens. So the case can tell.
    coarse = philox_gumbel(**{**key, "positions": torch.arange(20000)}, elements=16).to(dtype)
    best = coarse.amax(dim=-1, keepdim=True)
    assert ((coarse == best).sum(dim=-1) > 1).any()


@pytest.mark.parametrize("dtype", HALF)
def test_a_half_precision_default_changes_no_draw(dtype):
    noise = PhiloxNoise(7, torch.arange(2))
    step = Step(0, torch.arange(3)[None].expand(2, -1), 3, (3, 0), 1, 3)
    drawn = [
        lambda: noise.gumbel(0, step, (2, 3, 4)),
        lambda: noise.uniform(0, step, (2, 3)),
        lambda: noise.picture((2, 5)),
    ]
    drawn.append(lambda: noise.normal(0, step, (2, 3, 4)))
    expected = [draw() for draw in drawn]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = [draw() for draw in drawn]
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(expected, found):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("order", ["random", "confidence"])
def test_a_pipeline_in_half_precision_draws_nothing_but_fp32_noise(pipeline, monkeypatch, dtype, order):
    for part in (pipeline.tokenizer, pipeline.model):
        torch.nn.Module.to(part, dtype)
    kinds, seen = [], []
    for name in ("gumbel", "uniform", "normal", "picture"):
        draw = getattr(PhiloxNoise, name)
        monkeypatch.setattr(PhiloxNoise, name, lambda *a, draw=draw, **k: kinds.append(draw(*a, **k)) or kinds[-1])
    choose = predictions.choose_tokens
    monkeypatch.setattr(
        predictions, "choose_tokens", lambda x, *a, **k: seen.append((x.dtype, k["seed"])) or choose(x, *a, **k)
    )
    for name in DRAWS:
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, original=original, name=name, **k: _allowed(original, name, a, k))
    pipeline("a cat on a mat", seed=1, order=order)
    assert seen and {kind for kind, _ in seen} == {dtype} and all(seed == 1 for _, seed in seen)
    assert all(values.dtype == torch.float32 for values in kinds)
    assert kinds or order == "random"


def _allowed(original, name, arguments, options):
    """Orders draw their permutations, in fp64, from a generator of their own; nothing else draws from torch."""
    assert options.get("generator") is not None and options.get("dtype", torch.int64) in (torch.float64, torch.int64), (
        name
    )
    return original(*arguments, **options)
