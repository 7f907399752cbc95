"""Ming-UniVision."""

from functools import partial

from vgen.models.ming.files import published_names
from vgen.models.ming.mingunivision import MingUniVisionModel

BUILDERS = {"mingunivision-16b-a3b": partial(MingUniVisionModel.of_size, "16b-a3b")}
RENAMES = {"mingunivision-16b-a3b": partial(published_names, heads=16, key_heads=4, head_dim=128)}
