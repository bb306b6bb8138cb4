"""Top-K retrieval: the search contract, ranking rules, metrics, and the stages `index` and `score`."""
