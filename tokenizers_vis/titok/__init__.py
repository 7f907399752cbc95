"""TiTok and TA-TiTok: a picture as 32 to 256 tokens without a grid."""
