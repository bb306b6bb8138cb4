"""From raw logs to what training reads: sources, cleaning, split, catalogue, prompts and batches."""
