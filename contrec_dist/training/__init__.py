"""The train stage: DeepSpeed ZeRO-3 on any number of ranks. Read train.py, rank.py, loop.py."""
