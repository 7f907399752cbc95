"""FlexAR: a causal transformer over FlexTok's tokens, from coarse to fine."""
