"""The train stage: DeepSpeed on any number of ranks. Read train.py, rank.py, loop.py.

What is guaranteed, and by whom:

    the same order of samples on any number of ranks       sharding/partition.py: integers of (seed, epoch, step)
    the same bits for the same seed, data, ranks, threads  loop.py: every draw is seeded by (seed, step, micro-batch), sums
                                                           over ranks have one order
    the same losses but for rounding on other ranks,       loop.py: sums over the global batch, divided by its counts
    ZeRO stages, launchers and hosts
    no step of a loss or gradient that is not finite       loop.py refuses and names it; DeepSpeed's norm check (stages 1 to
                                                           3), a hook before the optimizer (stage 0)
    a checkpoint is complete or invisible                  checkpoint_files.py: hashes, fsync, rename, then `latest`
    a resumed run ends with the bits of one that was not   checkpoint.py (weights, moments, averages, position), on other
    interrupted                                            ranks but for rounding: repartition.py
    no checkpoint is lost by going back or starting anew   checkpoint_files.py: set aside, never removed
    adapters meet the base they were trained on            frozen_base.py: its hash is in every checkpoint
    a signal or stop-file ends with a checkpoint           stop.py on the ranks, at a step boundary; starter.py carries
                                                           signals from `contrec` to them
    a run that stands still ends and says where            watchdog.py
    no start waits for a lock that a killed one left       abandoned_builds.py
    no rank outlives its command                           starter.py; on other hosts the launcher there

Not guaranteed: the same bits on another number of threads, another CPU or GPU, or other versions of torch and DeepSpeed.
`deepspeed` and torchrun, when they themselves get a signal, kill ranks that take longer than 30 seconds over their last
checkpoint; `contrec train` and the stop-file give them all the time they need.
"""
