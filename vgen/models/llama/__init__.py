"""LlamaGen, PAR and NAR: Llama blocks over the tokens of a picture."""
