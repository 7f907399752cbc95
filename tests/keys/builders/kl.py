"""The KL-16 autoencoder, as published with MAR and with TokenBridge."""

from functools import partial

from vgen.layers.taming import rename_taming
from vgen.tokenizers_vis.kl import KLModel

BUILDERS = {name: partial(KLModel.of_size, "kl-16") for name in ("mar-kl16", "tokenbridge-vae-kl16")}
RENAMES = dict.fromkeys(BUILDERS, partial(rename_taming, levels=5))
