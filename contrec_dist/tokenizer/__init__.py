"""Stage tokenize: the sigma-VAE that turns an embedding into K continuous tokens, and the probes of what it kept."""
