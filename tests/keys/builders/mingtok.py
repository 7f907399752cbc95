"""MingTok."""

from functools import partial

from vgen.tokenizers_vis.mingtok.mingtok import MingTok

BUILDERS = {"mingtok-vision": partial(MingTok.of_size, "vision")}
