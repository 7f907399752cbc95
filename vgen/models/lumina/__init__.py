"""Lumina-mGPT: Chameleon's language model making pictures."""
