"""Where FAISS shards are searched: on the CPU, or as copies on the GPUs where faiss-gpu and a GPU are there.

Shards are spread over the GPUs in turn. The CPU index stays beside its copy: lists longer than faiss-gpu selects, and
exact scores, come from it. faiss-gpu has no form of graphs, of PQx4fs and of Refine, so a catalogue that is to be
searched on GPUs names another factory (IVFn,Flat).
"""

import faiss

from contrec_dist.errors import ConfigError
from contrec_dist.progress import get_logger

TEMPORARY_BYTES = 256 * 2**20  # scratch memory of a shard; faiss would take 1.5 GB
CPU_ONLY_PARTS = ("HNSW", "x4fs", "RFlat", "Refine")


def will_use_gpus(device: str, factory: str) -> bool:
    """Whether indexes of this factory are searched on GPUs of this machine.

    Errors   ConfigError for device 'gpu' where FAISS finds none, or has no GPU form of such an index.
    """
    num_gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    cpu_only = any(part in factory for part in CPU_ONLY_PARTS)
    if device == "gpu" and not num_gpus:
        raise ConfigError("index.device", "gpu", "faiss-gpu (the extra 'gpu') and a GPU, or device cpu or auto")
    if device == "gpu" and cpu_only:
        raise ConfigError(
            "index.device", f"gpu, with '{factory}'", "cpu for this index.factory, or index.factory=IVFn,Flat"
        )
    return device != "cpu" and num_gpus > 0 and not cpu_only


def copy_to_gpus(indexes: list[faiss.Index], device: str, parameters: dict[str, int]) -> list[faiss.Index | None]:
    """Copies of the indexes on the GPUs in turn; one log line says so.

    For an index without a GPU form: None each with device 'auto', ConfigError with 'gpu'.
    """
    log, num_gpus = get_logger("index"), faiss.get_num_gpus()
    try:
        copies = [_copy_to_gpu(index, number % num_gpus, parameters) for number, index in enumerate(indexes)]
    except RuntimeError as error:
        if device == "gpu":
            raise ConfigError(
                "index.device", f"gpu ({str(error).splitlines()[0]})", "cpu for this index.factory"
            ) from None
        log.info("search on CPU: FAISS has no GPU form of this index")
        return [None] * len(indexes)
    log.info("search on GPU: %d shards on %d GPUs", len(indexes), num_gpus)
    return copies


def _copy_to_gpu(index: faiss.Index, gpu: int, parameters: dict[str, int]) -> faiss.Index:
    """One copy with resources of its own: these may not be used by two threads at a time."""
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(TEMPORARY_BYTES)
    copy = faiss.index_cpu_to_gpu(resources, gpu, index)
    for name, value in parameters.items():
        faiss.GpuParameterSpace().set_index_parameter(copy, name, value)
    return copy
