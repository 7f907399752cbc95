"""choose_tokens against its definition, one rule at a time, in both implementations."""

from __future__ import annotations

import math

import pytest
import torch

from vgen.errors import VgenError
from vgen.kernels.choose_tokens import choose_tokens
from vgen.kernels.philox import philox_gumbel


def survivors(logits, impl, temperature=1.0, **options) -> list[int]:
    """The tokens that the filters leave of `logits` [V]: one row per token whose noise lifts that token above all others."""
    size = len(logits)
    lift = 1e4 * torch.eye(size, device=logits.device)[None]
    tokens, _ = choose_tokens(
        logits.expand(1, 1, size, size), [1.0], temperature=temperature, gumbel=lift, impl=impl, **options
    )
    return (tokens[0].cpu() == torch.arange(size)).nonzero().flatten().tolist()


def definition(logits, top_k=0, top_p=1.0) -> list[int]:
    """The filters, word for word, in double precision."""
    values = logits.double().tolist()
    kept = list(range(len(values)))
    if top_k:
        smallest = sorted(values, reverse=True)[min(top_k, len(values)) - 1]
        kept = [t for t in kept if values[t] >= smallest]
    if top_p < 1:
        kept.sort(key=lambda t: (-values[t], t))
        total = sum(math.exp(values[t]) for t in kept)
        before, walked = [], 0.0  # before[r]: the probability of the ranks before r
        for t in kept:
            before.append(walked)
            walked += math.exp(values[t]) / total
        assert min(abs(b - top_p) for b in before[1:]) > 1e-5, "an unlucky test: rounding decides"
        kept = [t for t, b in zip(kept, before, strict=True) if b <= top_p]
    return sorted(kept)


@pytest.mark.parametrize("options", [
    {"top_k": 4}, {"top_k": 12}, {"top_k": 99}, {"top_p": 0.0}, {"top_p": 0.77}, {"top_p": 0.9999}, {"top_k": 7, "top_p": 0.613},
], ids=str)  # fmt: skip
def test_the_survivors_are_those_of_the_definition(options, impl, device):
    rng = torch.Generator().manual_seed(5)
    logits = torch.randint(-4, 5, (13,), generator=rng) / 2  # many ties, both signs
    assert survivors(logits.to(device), impl, **options) == definition(logits, **options)


def test_ties_with_the_kth_largest_stay(impl, device):
    assert survivors(torch.tensor([2.0, 1.0, 3.0, 1.0, 0.0, 1.0], device=device), impl, top_k=3) == [0, 1, 2, 3, 5]
    tiny = torch.tensor([0.0, -1e-45, 1.0, -1.0], device=device)  # divided by 100: -0, equal to 0 but with other bits
    assert survivors(tiny, impl, temperature=100.0, top_k=2) == [0, 1, 2]


def test_the_token_that_crosses_top_p_stays(impl, device):
    logits = torch.tensor([0.1, 0.5, 0.05, 0.35], device=device).log()
    assert survivors(logits, impl, top_p=0.6) == [1, 3]
    assert survivors(logits, impl, top_p=0.4) == [1]
    assert survivors(logits, impl, top_p=0.0) == [1]
    assert survivors(torch.zeros(4, device=device), impl, top_p=0.4) == [0, 1]  # equal: lower tokens first
    assert survivors(torch.zeros(4, device=device), impl, top_p=0.5) == [0, 1, 2]  # not more than top_p before token 2


def test_top_p_acts_on_the_survivors_of_top_k(impl, device):
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1], device=device).log()
    assert survivors(logits, impl, top_p=0.5) == [0, 1]
    assert survivors(logits, impl, top_k=2, top_p=0.5) == [0]


def test_equal_tokens_are_counted_across_the_blocks_of_the_kernel(impl, device):
    lift = torch.zeros(1, 4, 1500, device=device)
    for row, token in enumerate((1023, 1200, 1201, 1499)):
        lift[0, row, token] = 1.0
    tokens, _ = choose_tokens(
        torch.zeros_like(lift)[None], [1.0], temperature=1.0, top_p=0.8002, gumbel=lift, impl=impl
    )
    assert tokens.tolist() == [[1023, 1200, 0, 0]]  # 1201 / 1500 is more than 0.8002


def test_guidance_temperature_and_confidence(impl, device):
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 2, 50, generator=rng).to(device)
    noise = -torch.empty(3, 2, 50).exponential_(generator=rng).log().to(device)
    x = (3.5 * logits[0] - 2.5 * logits[1]) / 0.8
    tokens, log_prob = choose_tokens(logits, (3.5, -2.5), temperature=0.8, gumbel=noise, top_k=9, impl=impl)
    kept = x.masked_fill(x < x.topk(9).values[..., -1:], -math.inf)
    assert torch.equal(tokens, (kept + noise).argmax(-1))
    torch.testing.assert_close(log_prob, x.log_softmax(-1).gather(-1, tokens[..., None])[..., 0], rtol=1e-5, atol=1e-5)

    per_token = torch.tensor([[3.5, 1.0], [-2.5, 0.0]], device=device)
    tokens, _ = choose_tokens(logits, per_token, temperature=0.8, gumbel=noise, impl=impl)
    assert torch.equal(tokens[:, 0], (x + noise).argmax(-1)[:, 0])
    assert torch.equal(tokens[:, 1], (logits[0] / 0.8 + noise).argmax(-1)[:, 1])


def test_greedy_takes_the_first_maximum_and_needs_no_noise(impl, device):
    logits = torch.tensor([[1.0, 4.0, 2.0, 4.0], [-1.0, -3.0, -2.0, -1.0]], device=device)[None, :, None]
    tokens, log_prob = choose_tokens(logits, [1.0], temperature=0, top_k=1, top_p=0.1, impl=impl)
    assert tokens.tolist() == [[1], [0]]
    torch.testing.assert_close(log_prob, logits[0].log_softmax(-1).amax(-1), rtol=1e-5, atol=1e-5)
    equal = torch.zeros(1, 1, 1, 1500, device=device)  # two blocks of the kernel
    assert choose_tokens(equal, [1.0], temperature=0, impl=impl)[0].item() == 0


def test_minus_infinity_is_never_drawn(impl, device):
    logits = torch.full((1, 1, 8, 1100), -math.inf, device=device)
    logits[..., 1050:1060] = 0.0  # the first block of the kernel holds nothing else
    tokens, log_prob = choose_tokens(
        logits, [1.0], temperature=1.0, seed=0, samples=torch.arange(1), positions=torch.arange(8), impl=impl
    )
    assert bool(((tokens >= 1050) & (tokens < 1060)).all())
    torch.testing.assert_close(log_prob, torch.full((1, 8), -math.log(10), device=device))


def test_the_fused_noise_is_philox_gumbel(impl, device):
    logits = torch.randn(1, 2, 3, 21, generator=torch.Generator().manual_seed(2)).to(device)
    counter = {
        "samples": torch.tensor([8, 3]),
        "positions": torch.tensor([[5, 2, 0], [1, 9, 4]], device=device),
        "step": 2,
        "stream": 4,
    }
    noise = philox_gumbel(7, elements=21, **counter)
    fused = choose_tokens(logits, [1.0], temperature=1.0, seed=7, **counter, impl=impl)
    taped = choose_tokens(logits, [1.0], temperature=1.0, gumbel=noise, impl=impl)
    assert torch.equal(fused[0], taped[0])


def test_a_token_does_not_depend_on_its_batch(impl, device):
    logits = torch.randn(2, 4, 5, 33, generator=torch.Generator().manual_seed(3)).to(device)
    samples, positions = torch.tensor([4, 0, 17, 2]), torch.tensor([30, 2, 5, 11, 1], device=device)
    common = {"temperature": 1.0, "top_k": 20, "seed": 9, "step": 1, "impl": impl}
    tokens, log_prob = choose_tokens(logits, [2.0, -1.0], samples=samples, positions=positions, **common)
    some = torch.tensor([3, 1])
    for b in range(4):
        alone = choose_tokens(
            logits[:, b : b + 1, some], [2.0, -1.0], samples=samples[b : b + 1], positions=positions[some.to(device)], **common
        )  # fmt: skip
        assert torch.equal(alone[0][0], tokens[b, some.to(device)])
        torch.testing.assert_close(alone[1][0], log_prob[b, some.to(device)])


def test_draws_follow_the_softmax(device):
    """Pearson's chi-square of 32768 draws at a fixed seed: 11 degrees of freedom, 31.3 is passed once in a thousand seeds."""
    logits = torch.linspace(-2.0, 1.5, 12, device=device)
    batch, m = 8, 4096
    tokens, _ = choose_tokens(
        logits.expand(1, batch, m, 12), [1.0], temperature=1.0, seed=1, samples=torch.arange(batch), positions=torch.arange(m)
    )  # fmt: skip
    expected = batch * m * logits.softmax(-1).cpu()
    observed = tokens.flatten().bincount(minlength=12).cpu()
    assert float(((observed - expected) ** 2 / expected).sum()) < 31.3
    one_sample = tokens[0].bincount(minlength=12).cpu()  # not the same draws for every sample
    assert not torch.equal(one_sample * batch, observed)


def test_any_strides(impl, device):
    logits = torch.randn(40, 3, 2, 2, generator=torch.Generator().manual_seed(4)).to(device)
    noise = torch.zeros(40, 2, 3, device=device)
    strided = choose_tokens(
        logits.permute(3, 2, 1, 0), [1.5, -0.5], temperature=1.0, gumbel=noise.permute(1, 2, 0), top_p=0.6, impl=impl
    )
    packed = choose_tokens(
        logits.permute(3, 2, 1, 0).contiguous(), [1.5, -0.5], temperature=1.0, gumbel=torch.zeros(2, 3, 40, device=device),
        top_p=0.6, impl=impl,
    )  # fmt: skip
    assert torch.equal(strided[0], packed[0])
    torch.testing.assert_close(strided[1], packed[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, r"logits must be floats \[R, B, m, V\]"),
        ({"weights": [1.0]}, r"weights must be \[R\] = \[2\]"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 1.5}, "top_p must lie in 0"),
        ({"seed": None}, "needs noise"),
        ({"positions": torch.arange(5)}, r"noise is for \[1, 5\]"),
        ({"gumbel": torch.zeros(1, 3, 5)}, r"gumbel must be \[B, m, V\] = \[1, 3, 4\]"),
    ],
)
def test_errors(change, message):
    arguments = {
        "logits": torch.zeros(2, 1, 3, 4), "weights": [2.0, -1.0], "temperature": 1.0, "seed": 0, "samples": torch.arange(1), "positions": torch.arange(3)
    }  # fmt: skip
    with pytest.raises(VgenError, match=message):
        choose_tokens(**(arguments | change))


@pytest.mark.parametrize("temperature", [1e-6, 1e-9, 1e-40])
def test_a_temperature_near_zero_is_1e_5(temperature, impl, device):
    """Smaller ones would overflow the logits; 1e-5 decides as greedily as anybody can measure."""
    logits = torch.tensor([0.0, 2e-5, 1e-5], device=device)[None, None, None]
    tokens, log_prob = choose_tokens(
        logits, [1.0], temperature=temperature, gumbel=torch.zeros(1, 1, 3, device=device), impl=impl
    )
    assert tokens.item() == 1
    assert log_prob.item() == pytest.approx(torch.tensor([0.0, 2.0, 1.0]).log_softmax(0)[1].item(), abs=1e-5)
    large = 1e3 * torch.eye(4, device=device)[None, None]
    tokens, log_prob = choose_tokens(
        large, [1.0], temperature=temperature, gumbel=torch.zeros(1, 4, 4, device=device), impl=impl
    )
    assert tokens.tolist() == [[0, 1, 2, 3]] and log_prob.tolist() == [[0.0] * 4]
