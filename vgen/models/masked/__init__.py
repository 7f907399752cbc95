"""MaskGIT and MaskGen: unknown tokens are masked, every call recomputes the whole picture."""
