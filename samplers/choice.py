"""How a token is picked from logits: data, not code, because every family has its own settings."""

from __future__ import annotations

from dataclasses import dataclass

from vgen.errors import VgenError


@dataclass(frozen=True)
class TokenChoice:
    """Order of operations: guidance, divide by `temperature`, top-k (ties with the k-th kept), top-p (the crossing token
    kept), then argmax(logits + Gumbel), which is a draw from the softmax. temperature 0 is greedy; top_k 0 and top_p 1 are off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise VgenError(
                f"the temperature must be at least 0 (0: always the likeliest token), got {self.temperature}"
            )
        if self.top_k < 0:
            raise VgenError(f"top-k must be a positive count, or 0 for all tokens, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise VgenError(f"top-p must be in (0, 1], got {self.top_p}")
