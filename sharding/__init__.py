"""Which piece of data lies where, and how it is written and read back. Knows no model.

    partition      who reads which shard and sample: pure integers
    token_writer   one WebDataset shard of training samples, byte-deterministic
    token_reader   random access to those samples, strict
    faiss_shards   the sharded index; faiss_factory, faiss_devices and faiss_settings are its choices
    ray_jobs       parts of a stage's output, each made exactly once by Ray workers
"""
