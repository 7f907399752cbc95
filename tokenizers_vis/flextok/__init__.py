"""FlexTok: a picture as 1 to 256 ordered tokens, from coarse to fine."""
