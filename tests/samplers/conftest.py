"""Property tests must not depend on the speed of the machine."""

from hypothesis import settings

settings.register_profile("vgen", deadline=None, max_examples=60)
settings.load_profile("vgen")
