"""A codebook that moves its idle codes to features (CVQ-VAE, arXiv 2307.15139, section 3), as TA-TiTok trains with (arXiv 2501.07730)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from vgen.kernels.vq_nearest import vq_nearest
from vgen.tokenizers_vis.latents.quantizers import Quantized, VectorQuantizer

DECAY = 0.99  # of the running share of tokens that each code gets


class OnlineClusteringQuantizer(VectorQuantizer):
    """VectorQuantizer whose training forward ends with a step towards the features: often for idle codes, never for busy ones.

    codes, channels, normalise, beta, window: `VectorQuantizer`. There is no entropy loss: its gradient needs the codebook that
    this class overwrites in the forward pass.
    """

    def __init__(self, codes: int, channels: int, normalise: bool = False, beta: float = 0.25, window: int = 65536):
        super().__init__(codes, channels, normalise, beta, window=window)
        self.register_buffer(
            "embed_prob", torch.zeros(codes)
        )  # running share of each code; name of the published buffer

    def forward(self, z: Tensor) -> Quantized:
        """[B, C, h, w] -> Quantized, with the codes as they were before this call."""
        found = super().forward(z)
        if self.training and self.embedding.weight.requires_grad:  # a frozen codebook stays as it is
            with torch.autocast(z.device.type, enabled=False):
                self._follow(rearrange(z.detach().float(), "b c h w -> (b h w) c"), found.indices.flatten())
        return found

    @torch.no_grad()
    def _follow(self, rows: Tensor, indices: Tensor) -> None:
        """One update from all processes' features [R, C], not normalised, and their codes [R]."""
        rows, indices = _of_all_processes(rows), _of_all_processes(indices)
        used = torch.zeros_like(self.embed_prob).index_add_(0, indices, torch.ones_like(indices, dtype=torch.float32))
        self.embed_prob.lerp_(used / indices.numel(), 1 - DECAY)
        nearest = rows[vq_nearest(self.codebook(), self._unit(rows))]  # [K, C]: the feature closest to each code
        step = torch.exp(-self.embed_prob * self.codes * 10 / (1 - DECAY) - 1e-3)
        self.embedding.weight.lerp_(nearest.to(self.embedding.weight), step[:, None].to(self.embedding.weight))


def _of_all_processes(tensor: Tensor) -> Tensor:
    """Rows of every process, in rank order; equally many from each."""
    if not torch.distributed.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
