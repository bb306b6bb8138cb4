"""Being asked to stop: SIGTERM, SIGINT, or the file STOP in the run's folder.

A request is only noted when it comes. At the next step boundary all ranks agree on it, save a checkpoint together and end;
nothing is saved inside a signal handler, which would wait for ranks that were not asked. A request during an export or a
validation probe waits for its end.
"""

import signal
from pathlib import Path

from contrec_dist.config import Config
from contrec_dist.progress import get_logger

STOP_NAME = "STOP"
REASONS = ("", "a signal", f"the stop-file {STOP_NAME}")


def stop_file(config: Config) -> Path:
    """The file whose being there asks the run to stop: `touch RUN_DIR/STOP`."""
    return Path(config.run_dir) / STOP_NAME


def remove_stop_file(config: Config) -> bool:
    """Remove the stop-file, which has done its work, so that the next start does not stop at once; False: none was there."""
    try:
        stop_file(config).unlink()
    except FileNotFoundError:
        return False
    get_logger("train").warning("%s: honoured and removed", stop_file(config))
    return True


class StopRequest:
    """Collects requests on this rank; handles SIGTERM and SIGINT from its making on."""

    def __init__(self, config: Config):
        self.config = config
        self.signalled = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def agree(self, device) -> str:
        """Why the run is to stop, "" where it is not. A collective: the same answer on all ranks."""
        import torch
        import torch.distributed as dist

        by_file = dist.get_rank() == 0 and stop_file(self.config).exists()
        asked = torch.tensor(float(2 * by_file or self.signalled), device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return REASONS[int(asked)]

    def honour(self) -> None:
        """After the checkpoint: the stop-file goes. Called on all ranks."""
        import torch.distributed as dist

        if dist.get_rank() == 0:
            remove_stop_file(self.config)

    def _note(self, number: int, frame: object) -> None:
        self.signalled = True
