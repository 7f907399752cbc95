"""LlamaGen, PAR, NAR: generators, tokenizers, discriminator."""

from vgen.models.llama.llamagen import LlamaGenModel
from vgen.models.llama.nar import NARModel
from vgen.models.llama.par import PARModel
from vgen.tokenizers_vis.losses.patchgan import PatchDiscriminator
from vgen.tokenizers_vis.vq import VQModel

BUILDERS = {
    "llamagen-vq16": lambda: VQModel.of_size("vq-16"),
    "llamagen-vq8": lambda: VQModel.of_size("vq-8"),
    "llamagen-patchgan": PatchDiscriminator,
    **{
        f"llamagen-{kind}-{size}": (lambda size=size: LlamaGenModel.of_size(size))
        for kind, sizes in (("c2i", ("B", "L", "XL", "XXL", "3B")), ("unreleased", ("1B", "7B", "XXXL")))
        for size in sizes
    },
    "llamagen-t2i-XL": lambda: LlamaGenModel.of_size("XL", conditioning="text"),
    **{
        f"par-{size}": (lambda size=size: PARModel.of_size(size))
        for size in ("L-4x", "XL-4x", "XXL-4x", "3B-4x", "XXL-16x", "3B-16x")
    },
    **{f"nar-{size}-c2i-256": (lambda size=size: NARModel.of_size(size)) for size in ("B", "M", "L", "XL", "XXL")},
    "nar-XL-t2i-256": lambda: NARModel.of_size("XL", conditioning="text"),
}
