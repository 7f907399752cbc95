"""What tokenizers are trained with: reconstruction, perceptual distances, discriminators, alignment."""
