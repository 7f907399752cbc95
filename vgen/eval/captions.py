"""How well a text-to-image model makes the pictures that its training captions belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vgen.data.batches import collate
from vgen.data.dataset import open_images
from vgen.data.tokens import TokenDataset
from vgen.eval.retrieval import pixel_features, retrieval_share
from vgen.pipelines.results import VisualOutput
from vgen.pipelines.visual import VisualPipeline
from vgen.samplers.types import Condition


@dataclass(frozen=True)
class CaptionTask:
    """Training captions, and what their own pictures are. M captions, G pictures of both splits, N tokens.

    picks [M]: which pictures; gallery [G, 3 * H * W] in [-1, 1]; tokens [M, N] (or latents [M, N, C]): of the captions' pictures;
    held_out: the token set that no model has seen.
    """

    prompts: list[str]
    picks: Tensor
    gallery: Tensor
    tokens: Tensor
    held_out: TokenDataset

    @classmethod
    def draw(cls, data: str | Path, tokens: str | Path, size: int, captions: int, seed: int = 0) -> CaptionTask:
        """`captions` training pictures of the dataset folder `data` with pictures of `size` pixels; tokens: of `vgen tokenize`."""
        train, held_out = (open_images(data, split, size) for split in ("train", "heldout"))
        gallery = torch.stack([item["image"].flatten() for part in (train, held_out) for item in part.readable()])
        picks = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:captions]
        cached = TokenDataset(Path(tokens) / "train.safetensors")
        index = {key: i for i, key in enumerate(cached.keys)}
        own = torch.stack([cached[index[train.keys[i]]]["tokens"] for i in picks.tolist()])
        prompts = [train.captions[i] for i in picks.tolist()]
        return cls(prompts, picks, gallery, own, TokenDataset(Path(tokens) / "heldout.safetensors"))

    def figures(self, result: VisualOutput) -> dict[str, float]:
        """retrieval: share whose nearest picture is the caption's own; psnr: mean in dB against it, at most 60 a picture;
        own_tokens, of codes only: share of tokens equal to its tokens. result: one picture a prompt, in order."""
        pixels = pixel_features(result.images)
        error = (pixels - self.gallery[self.picks]).square().mean(dim=1).clamp_min(4e-6)
        figures = {
            "retrieval": retrieval_share(pixels, self.gallery, self.picks),
            "psnr": (10 * torch.log10(4 / error)).mean().item(),
        }
        if not self.tokens.is_floating_point():
            figures["own_tokens"] = (result.tokens == self.tokens).float().mean().item()
        return figures

    def held_out_batches(self, pipe: VisualPipeline, chunk: int = 32) -> Iterator[tuple[Condition, Tensor]]:
        """Conditions and tokens [b, N] of the held-out pictures; unknown words are `<unknown>`."""
        limit = pipe.model.config.get("prefix_limit", 0)
        for start in range(0, len(self.held_out), chunk):
            batch = collate([self.held_out[i] for i in range(start, min(start + chunk, len(self.held_out)))])
            yield pipe.model.vocabulary.captions(batch["caption"], limit, strict=False), batch["tokens"].to(pipe.device)

    @torch.no_grad()
    def held_out_loss(self, pipe: VisualPipeline, loss: Callable[[Condition, Tensor, int], Tensor]) -> float:
        """Nats per token over the held-out pictures. loss(condition, tokens [b, N], index of the first one) -> mean."""
        total, done = 0.0, 0
        for condition, tokens in self.held_out_batches(pipe):
            total += loss(condition, tokens, done).item() * len(tokens)
            done += len(tokens)
        return total / done


def ordered_loss(pipe: VisualPipeline, order) -> Callable[[Condition, Tensor, int], Tensor]:
    """The native model's loss under an order's own mask; orders that vary are drawn anew for every picture."""

    def loss(condition: Condition, tokens: Tensor, first: int) -> Tensor:
        draws = [order.step_ids(torch.Generator().manual_seed(first + i)) for i in range(len(tokens))]
        return pipe.model.loss(condition, tokens, torch.stack(draws).to(tokens.device))["loss"]

    return loss
