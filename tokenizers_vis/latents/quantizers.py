"""Vector quantisation with an L2-normalised codebook (ViT-VQGAN, arXiv 2110.04627, section 3.2; LlamaGen, arXiv 2406.06525, section 2.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vgen.kernels.vq_nearest import vq_nearest


@dataclass(frozen=True)
class Quantized:
    """What a quantizer returns. The losses are scalars, already weighted, and None in eval mode.

    quantized: [B, C, h, w], gradient straight through to the (normalised) input; indices: [B, h*w] int64;
    vq: pulls codes to features; commit: pulls features to codes; entropy: favours confident use of many codes;
    usage: share of the codebook that the recent past used (None without a usage queue).
    """

    quantized: Tensor
    indices: Tensor
    vq: Tensor | None = None
    commit: Tensor | None = None
    entropy: Tensor | None = None
    usage: Tensor | None = None

    def losses(self) -> dict[str, Tensor]:
        """The losses by name, to be added to an objective."""
        named = {"vq": self.vq, "commit": self.commit, "entropy": self.entropy}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class CodebookStatistics:
    """Use of the codebook over the last `seen` indices: distinct codes, their share, exp(entropy) of the histogram."""

    seen: int
    used: int
    usage: float
    perplexity: float


class VectorQuantizer(nn.Module):
    """Nearest code of a codebook [K, C].

    normalise: compare and return unit vectors; the stored weight stays raw. beta: weight of the commitment loss;
    entropy_ratio: weight of the entropy loss (0: not computed). window: length of the usage queue (0: none is kept).
    vq_weight: weight of the loss that moves the codes.
    """

    def __init__(
        self,
        codes: int,
        channels: int,
        normalise: bool = True,
        beta: float = 0.25,
        entropy_ratio: float = 0.0,
        window: int = 65536,
        vq_weight: float = 1.0,
    ):
        super().__init__()
        self.codes, self.normalise, self.beta, self.entropy_ratio = codes, normalise, beta, entropy_ratio
        self.vq_weight = vq_weight
        self.embedding = nn.Embedding(codes, channels)
        # The last `window` indices, newest at the end. Starts as zeros, so code 0 counts as used early on. Integers, because
        # published files hold floats that a cast of the model to bf16 would round; a buffer, because training updates it.
        self.register_buffer("codebook_used", torch.zeros(window, dtype=torch.int32) if window else None)
        self._remembered = 0  # since this object was made; only statistics() reads it
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """uniform(-1/K, 1/K), then unit rows where codes are normalised."""
        self.embedding.weight.uniform_(-1.0 / self.codes, 1.0 / self.codes)
        if self.normalise:
            self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))

    def _unit(self, rows: Tensor) -> Tensor:
        return F.normalize(rows.float(), dim=-1, eps=1e-12) if self.normalise else rows.float()

    def codebook(self) -> Tensor:
        """The vectors that indices stand for: [K, C] fp32, unit rows where codes are normalised."""
        return self._unit(self.embedding.weight)

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes of any shape [...] -> vectors [..., C]."""
        return self._unit(self.embedding(indices))

    def soft_lookup(self, weights: Tensor) -> Tensor:
        """Weights over the codes [..., K] -> mixtures of the stored rows [..., C], unit vectors where codes are normalised."""
        return self._unit(weights.float() @ self.embedding.weight.float())

    def forward(self, z: Tensor) -> Quantized:
        """[B, C, h, w] -> Quantized; runs in fp32 whatever the autocast state (a distance in bf16 picks wrong codes)."""
        with torch.autocast(z.device.type, enabled=False):
            batch, _, height, _ = z.shape
            rows = self._unit(rearrange(z, "b c h w -> (b h w) c"))
            indices = vq_nearest(rows.detach(), self.codebook().detach())
            chosen = self.lookup(indices)
            through = rows + (chosen - rows).detach()
            quantized = rearrange(through, "(b h w) c -> b c h w", b=batch, h=height)
            shaped = rearrange(indices, "(b n) -> b n", b=batch)
            if not self.training:
                return Quantized(quantized, shaped)
            if self.codebook_used is not None:
                self._remember(indices)
            return Quantized(
                quantized,
                shaped,
                vq=self.vq_weight * F.mse_loss(chosen, rows.detach()),
                commit=self.beta * F.mse_loss(rows, chosen.detach()),
                entropy=self.entropy_ratio * self._entropy(rows) if self.entropy_ratio else rows.new_zeros(()),
                usage=None if self.codebook_used is None else self._used().float().mean(),
            )

    def _entropy(self, rows: Tensor, temperature: float = 0.01) -> Tensor:
        """Mean entropy of the soft assignments minus the entropy of their mean (MAGVIT-v2, arXiv 2310.05737, eq. 4)."""
        codebook = self.codebook()
        # -d / temperature without the |row|^2 term, which is the same for every code and cancels in the softmax.
        affinity = (2 * rows @ codebook.T - codebook.square().sum(dim=1)) / temperature
        log_p = affinity.log_softmax(dim=-1)
        p = log_p.exp()
        mean_p = p.mean(dim=0)
        return -(p * log_p).sum(dim=-1).mean() + (mean_p * (mean_p + 1e-5).log()).sum()

    # -- use of the codebook ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _remember(self, indices: Tensor) -> None:
        window = self.codebook_used.numel()
        newest = indices[-window:].to(self.codebook_used.dtype)
        self.codebook_used.copy_(torch.cat((self.codebook_used[newest.numel() :], newest)))
        self._remembered += newest.numel()

    def _used(self, recent: int | None = None) -> Tensor:
        """[K] bool: codes among the last `recent` indices (default: the whole queue)."""
        queue = self.codebook_used if recent is None else self.codebook_used[-recent:]
        mask = torch.zeros(self.codes, dtype=torch.bool, device=queue.device)
        return mask.index_fill_(0, queue.long(), True)

    def statistics(self) -> CodebookStatistics:
        """Use of the codebook over the queue, without the zeros that it started with. Synchronises: call it when logging."""
        if self.codebook_used is None:
            return CodebookStatistics(0, 0, 0.0, 0.0)
        # A loaded queue says how full it is by its leading zeros; counting too serves a model that knows no code but 0.
        written = self.codebook_used.nonzero()
        window = self.codebook_used.numel()
        seen = min(window, max(self._remembered, window - int(written[0]) if written.numel() else 0))
        if seen == 0:
            return CodebookStatistics(0, 0, 0.0, 0.0)
        counts = torch.bincount(self.codebook_used[-seen:].long(), minlength=self.codes).double()
        p = counts / seen
        perplexity = torch.special.entr(p).sum().exp().item()
        used = int((counts > 0).sum())
        return CodebookStatistics(seen, used, used / self.codes, perplexity)

    def collapsed(self, threshold: float = 0.1) -> str | None:
        """A sentence if fewer codes are in use than `threshold` of what evenly spread indices would reach, else None.

        n indices spread evenly over K codes reach K (1 - exp(-n/K)) of them. Says nothing before min(n, K) = 64 indices.
        """
        found = self.statistics()
        if min(found.seen, self.codes) < 64:
            return None
        even = self.codes * -torch.expm1(torch.tensor(-found.seen / self.codes)).item()
        if found.perplexity >= threshold * even:
            return None
        return (
            f"the codebook has collapsed: {found.used} of {self.codes} codes were used by the last {found.seen} tokens "
            f"(perplexity {found.perplexity:.1f}); set loss.restart_every (unused codes are revived), or raise model.entropy_loss_ratio"
        )

    @torch.no_grad()
    def restart_dead_codes(
        self, rows: Tensor, generator: torch.Generator | None = None, recent: int | None = None
    ) -> int:
        """Replaces codes that the last `recent` indices did not use by random encoder outputs; returns how many.

        rows: [R, C] raw or normalised encoder outputs. recent: steps x tokens per step, at most the queue's length
        (default: all of it); call it only after that many tokens were seen, or untried codes count as dead.
        The choice depends on the queue and the generator alone, so a resumed run makes the same one; with several processes let
        one of them choose and broadcast `embedding.weight`.
        """
        dead = (~self._used(recent)).nonzero().squeeze(1)
        if dead.numel() == 0:
            return 0
        pick = torch.randint(rows.shape[0], (dead.numel(),), generator=generator, device="cpu").to(rows.device)
        self.embedding.weight[dead] = self._unit(rows[pick]).to(self.embedding.weight.dtype)
        return dead.numel()


def with_bookkeeping(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with zeros for those buffers of `model` that it lacks: what a codebook counts in training, which files need not hold."""
    return {name: torch.zeros(buffer.shape, dtype=buffer.dtype) for name, buffer in model.named_buffers()} | dict(state)
