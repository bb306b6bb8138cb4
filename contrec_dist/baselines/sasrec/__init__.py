"""SASRec: a causal transformer over item vectors, with and without the items' text."""
