"""Training TokenBridge (arXiv 2503.16430; `system: tokenbridge`).

Latents are sampled anew every epoch and quantised; the objective is the levels of the masked tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch
from diffusers import ModelMixin
from einops import rearrange

from vgen.data.tokens import TokenSetSpec
from vgen.models.mar.tokenbridge import KL16_ORDER, TokenBridgeModel
from vgen.settings import require_choice, require_share
from vgen.tokenizers_vis.latents.dimensionwise import low_frequencies_first
from vgen.tokenizers_vis.tokenbridge import TokenBridge
from vgen.train.system import spread
from vgen.train.systems.generator import GeneratorConfig, check_generator, model_options
from vgen.train.systems.mar import AutoencoderConfig, MaskedAutoencoderSystem

CHANNEL_ORDERS = ("frequency", "kl16", "stored")
MEASURED = 1024  # pictures that the order "frequency" is measured on


@dataclass(frozen=True)
class QuantizerConfig:
    """Bits per channel, the range of the scaled latents, and the deviations that it stands for (`DimensionwiseQuantizer`)."""

    bits: int = 6
    low: float = -5.0
    high: float = 5.0
    std_range: float = 3.0


@dataclass(frozen=True)
class ModelConfig(AutoencoderConfig):
    """See `TokenBridgeModel` for the meanings."""

    size: str = "L"
    head_heads: int | None = None


@dataclass(frozen=True)
class Config(GeneratorConfig):
    """`system: tokenbridge`. data.tokenizer: a continuous tokenizer, which is quantised here, or a TokenBridge tokenizer.

    channel_order: `frequency`, measured on the training latents; `kl16`, that of the published models, for MAR's KL-16 only;
    `stored`, as the tokenizer has the channels.
    """

    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    channel_order: str = "frequency"
    model: ModelConfig = field(default_factory=ModelConfig)


class TokenBridgeSystem(MaskedAutoencoderSystem):
    """TokenBridge. Its score is the cross-entropy in nats per *channel* of the masked tokens."""

    @classmethod
    def make_model(cls, config: Config, tokens: TokenSetSpec, conditions: int) -> TokenBridgeModel:
        """See `GeneratorSystem.make_model`. The order `frequency` is set when the latents are at hand."""
        options = model_options(TokenBridgeModel.size_config(config.model.size), config.model)
        quantizer, condition = asdict(config.quantizer), config.condition
        options |= {"levels": 2 ** quantizer.pop("bits"), **quantizer}
        options |= {"channels": tokens.channels, "grid": tokens.grid, "classes": conditions}
        options["channel_order"] = KL16_ORDER if config.channel_order == "kl16" else None
        return TokenBridgeModel(conditioning=condition.kind, condition_dropout=condition.dropout, **options)

    def _make_model(self) -> TokenBridgeModel:
        model = super()._make_model()
        if self.config.channel_order == "frequency":
            rows = self.train_tokens.tokens[spread(len(self.train_tokens), MEASURED), 0]
            _, height, width = self.train_tokens.grid
            model.set_channel_order(
                low_frequencies_first(rearrange(rows, "n (t h w) c -> (n t) c h w", h=height, w=width))
            )
        return model

    def _tokenizer(self) -> TokenBridge | None:
        tokenizer = super()._tokenizer()
        if tokenizer is None or isinstance(tokenizer, TokenBridge):
            return tokenizer
        return TokenBridge.quantize(tokenizer, **asdict(self.config.quantizer)).eval()

    def prepare(self, model: ModelMixin) -> None:
        """Raises VgenError for a TokenBridge tokenizer with another quantizer than the config's."""
        if self.tokenizer is not None:
            model.share_tables(self.tokenizer)


def check(config: Config) -> None:
    """Raises VgenError for settings that cannot work."""
    model = config.model
    require_choice("model.size", model.size, TokenBridgeModel.SIZES)
    require_choice("channel_order", config.channel_order, CHANNEL_ORDERS)
    require_share(model, "dropout", "attention_dropout", prefix="model.", below_one=True)
    check_generator(config, TokenBridgeSystem)


missing, sketch = TokenBridgeSystem.missing, TokenBridgeSystem.sketch


def build(config: Config, device: torch.device) -> TokenBridgeSystem:
    """Opens the token sets and makes the model."""
    return TokenBridgeSystem(config, device)
