"""One change at a time: rows of configs/ablation on top of one config, worked through by the pipeline's own stages."""
