"""Perceptual distances: LPIPS (arXiv 1801.03924, eq. 1), ConvNeXt logits, mixtures, and a stated substitute for machines without weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import convnext_small

from vgen.checkpoints import load_exactly, read_state_dict
from vgen.errors import VgenError

# VGG16's convolutions by their index in torchvision's `features`, one tuple per tap; a 2x2 max-pool precedes every tap but the first.
TAPS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


class _VGGTaps(nn.Module):
    """The activations after relu1_2, 2_2, 3_3, 4_3 and 5_3."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        previous = 3
        for tap, (indices, width) in enumerate(zip(TAPS, widths)):
            part = nn.Sequential()
            if tap:
                part.add_module(str(indices[0] - 1), nn.MaxPool2d(2))
            for index in indices:
                part.add_module(str(index), nn.Conv2d(previous, width, 3, padding=1))
                part.add_module(str(index + 1), nn.ReLU())
                previous = width
            self.add_module(f"slice{tap + 1}", part)

    def forward(self, x: Tensor) -> list[Tensor]:
        taps = []
        for part in self.children():
            x = part(x)
            taps.append(x)
        return taps


class _Scaling(nn.Module):
    """ImageNet statistics on the [-1, 1] scale."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class _Head(nn.Module):
    def __init__(self, channels: int, dropout: float):
        super().__init__()
        # The dropout fixes the published key `model.1`; it acts only if asked for (LPIPS.head_dropout).
        self.model = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).mean(dim=(2, 3), keepdim=True)


class LPIPS(nn.Module):
    """Learned perceptual distance on VGG16 features. Frozen.

    widths: channels per tap. head_dropout: drop half of the head inputs in train mode, as LlamaGen's (and taming-transformers')
    tokenizer training does by accident; off by default.
    """

    def __init__(self, widths: Sequence[int] = (64, 128, 256, 512, 512), head_dropout: bool = False):
        super().__init__()
        self.scaling_layer = _Scaling()
        self.net = _VGGTaps(widths)
        for tap, width in enumerate(widths):
            self.add_module(f"lin{tap}", _Head(width, 0.5 if head_dropout else 0.0))
        self.requires_grad_(False)

    @classmethod
    def from_files(cls, vgg: str | Path, heads: str | Path, head_dropout: bool = False) -> LPIPS:
        """From torchvision's VGG16 file (keys `features.{i}.*`) and the LPIPS file with the five heads (`lin{k}.model.1.weight`)."""
        model = cls(head_dropout=head_dropout)
        slice_of = {index: tap + 1 for tap, indices in enumerate(TAPS) for index in indices}
        state = {}
        for key, value in read_state_dict(vgg).items():
            part, _, rest = key.partition(".")
            index, _, name = rest.partition(".")
            if part == "features" and index.isdigit() and int(index) in slice_of:
                state[f"net.slice{slice_of[int(index)]}.{index}.{name}"] = value
        state |= {key: value for key, value in read_state_dict(heads).items() if key.startswith("lin")}
        state |= {f"scaling_layer.{name}": value for name, value in model.scaling_layer.state_dict().items()}
        load_exactly(model, state)
        return model.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[B, 3, H, W] twice, in [-1, 1] -> distances [B, 1, 1, 1]."""
        total = x.new_zeros(x.shape[0], 1, 1, 1)
        features = zip(self.net(self.scaling_layer(x)), self.net(self.scaling_layer(y)))
        for tap, (a, b) in enumerate(features):
            total = total + getattr(self, f"lin{tap}")((_unit(a) - _unit(b)).square())
        return total


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


class ConvNeXtDistance(nn.Module):
    """Mean squared difference of ConvNeXt-Small's 1000 class logits at 224 px (TiTok, arXiv 2406.07550, appendix). Frozen.

    network: maps [B, 3, 224, 224], normalised with ImageNet's statistics, to logits.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    @classmethod
    def from_file(cls, path: str | Path) -> ConvNeXtDistance:
        """From torchvision's file of `convnext_small` (IMAGENET1K_V1)."""
        network = convnext_small()
        load_exactly(network, read_state_dict(path))
        return cls(network)

    def train(self, mode: bool = True) -> ConvNeXtDistance:
        """Stays in evaluation mode: its drop-path must not act on the objective."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[B, 3, H, W] twice, in [-1, 1] -> distances [B, 1, 1, 1]."""
        return _mean((self._logits(x) - self._logits(y)).square()[..., None, None])

    def _logits(self, pixels: Tensor) -> Tensor:
        resized = F.interpolate((pixels + 1) / 2, size=(224, 224), mode="bilinear", antialias=True)
        return self.network((resized - self.mean) / self.std)


class WeightedMean(nn.Module):
    """Weighted mean of distances: (sum of weight_i distance_i) / (sum of weight_i)."""

    def __init__(self, distances: Sequence[nn.Module], weights: Sequence[float]):
        super().__init__()
        self.distances, self.weights = nn.ModuleList(distances), tuple(weights)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[B, 3, H, W] twice, in [-1, 1] -> distances [B, 1, 1, 1]."""
        parts = (weight * distance(x, y) for weight, distance in zip(self.weights, self.distances))
        return sum(parts) / sum(self.weights)


class PyramidLoss(nn.Module):
    """A stand-in for LPIPS where its weights are not at hand. It is **not** LPIPS: it knows no semantics and its numbers do not compare.

    Over `levels` octaves: L1 of the Laplacian-pyramid band (arXiv 1707.05776 trains with that loss), L1 of the Sobel gradients
    (edges), and 1 - SSIM's contrast-structure factor over 8x8 windows. No parameters; a few ms for a batch on a CPU.
    """

    def __init__(self, levels: int = 3, edges: float = 1.0, structure: float = 0.5):
        super().__init__()
        self.levels, self.edges, self.structure = levels, edges, structure
        sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
        kernels = torch.stack((sobel, sobel.T))[:, None].repeat(3, 1, 1, 1)  # [6, 1, 3, 3]: two per colour
        self.register_buffer("sobel", kernels, persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[B, 3, H, W] twice, in [-1, 1] -> distances [B, 1, 1, 1]. VgenError when a side is smaller than 8 * 2**(levels-1)."""
        least = 8 * 2 ** (self.levels - 1)
        if min(x.shape[-2:]) < least:
            raise VgenError(
                f"PyramidLoss with {self.levels} levels needs pictures of at least {least} px, got {list(x.shape[-2:])}"
            )
        x, y = x.float(), y.float()
        total = x.new_zeros(x.shape[0], 1, 1, 1)
        for level in range(self.levels):
            difference = x - y  # band and gradient are linear, so one difference serves both
            low = F.avg_pool2d(difference, 2)
            band = (
                difference if level == self.levels - 1 else difference - F.interpolate(low, size=difference.shape[-2:])
            )
            gradient = F.conv2d(difference, self.sobel, groups=3)
            total = total + _mean(band.abs()) + self.edges * _mean(gradient.abs())
            total = total + self.structure * (1 - _mean(_structure(x, y)))
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return total / self.levels


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=(1, 2, 3), keepdim=True)


def _structure(x: Tensor, y: Tensor) -> Tensor:
    """The contrast-structure factor of SSIM (Wang et al. 2004, eqs. 9-10) over 8x8 box windows every 4 pixels.

    Its luminance factor is left out: it needs positive values, and the lowest band of the pyramid compares means already.
    """
    c2 = (0.03 * 2) ** 2
    mx, my, xx, yy, xy = F.avg_pool2d(torch.cat((x, y, x * x, y * y, x * y)), 8, stride=4).split(x.shape[0])
    return (2 * (xy - mx * my) + c2) / (xx - mx * mx + yy - my * my + c2)
