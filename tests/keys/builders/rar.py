"""RAR and the MaskGIT-VQGAN tokenizer."""

from vgen.models.rar.rar import SIZES, RARModel
from vgen.tokenizers_vis.maskgit_vqgan import MaskGITVQGAN

BUILDERS = {
    "titok-maskgit_vqgan_f16_1024": MaskGITVQGAN,
    **{f"rar-{size.lower()}": (lambda size=size: RARModel(**RARModel.size_config(size))) for size in SIZES},
}
