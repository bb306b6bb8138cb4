"""The model: LLM backbone, continuous inputs and the fused diffusion head. Knows tensors and configs, no files.

Read in this order: noise_schedule, samplers, then the denoiser and the modules that put them on the LLM.
"""
