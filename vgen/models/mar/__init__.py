"""MAR, Hi-MAR and TokenBridge: a masked autoencoder, and heads that make continuous or channel-wise tokens."""
