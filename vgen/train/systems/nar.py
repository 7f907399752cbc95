"""Training NAR: cross-entropy of the mixed predictions of neighbours (arXiv 2503.10696; `system: nar`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from vgen.models.llama.nar import NARModel
from vgen.settings import require_share
from vgen.train.systems.generator import check_generator
from vgen.train.systems.llamagen import DROPOUTS, Config, LlamaSystem


class NARSystem(LlamaSystem):
    """NAR. `depth` is that of the trunk: there is one block more."""

    model_class = NARModel
    conditions: ClassVar[Sequence[str]] = ("words", "class", "text")


def check(config: Config) -> None:
    """Raises VgenError for settings that cannot work."""
    require_share(config.model, *DROPOUTS, prefix="model.", below_one=True)
    check_generator(config, NARSystem)


missing, sketch = NARSystem.missing, NARSystem.sketch


def build(config: Config, device: torch.device) -> NARSystem:
    """Opens the token sets and makes the model."""
    return NARSystem(config, device)
