"""Lumina-mGPT's transformer, and Chameleon's VQGAN under taming's names."""

from vgen.layers.taming import rename_taming
from vgen.models.lumina.lumina import LuminaModel
from vgen.tokenizers_vis.chameleon import ChameleonVQGAN

BUILDERS = {
    "zipar-lumina-mgpt-7B": lambda: LuminaModel.of_size("7B"),
    "zipar-chameleon-vqgan": ChameleonVQGAN,
    "chameleon_vq-512": ChameleonVQGAN,
}
RENAMES = {name: lambda state: rename_taming(state, 5) for name in ("zipar-chameleon-vqgan", "chameleon_vq-512")}
