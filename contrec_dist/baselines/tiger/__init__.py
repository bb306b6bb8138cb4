"""TIGER: semantic ids by an RQ-VAE, a causal LM over them, beam search (arXiv 2305.05065)."""
