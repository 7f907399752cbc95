"""What generators are conditioned on: classes, a small vocabulary of words, CLIP and T5 features."""
