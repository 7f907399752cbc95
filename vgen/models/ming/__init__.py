"""Ming-UniVision: a language model that reads and makes pictures as continuous tokens."""
