"""What stands between an encoder and a decoder: codebooks, scalar quantizers, Gaussian posteriors."""
