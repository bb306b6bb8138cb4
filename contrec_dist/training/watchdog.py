"""Ends a run that stands still, after writing down where every rank stands.

A rank that hangs makes all others wait for it in a collective, so each rank has a watchdog: a thread that looks how long
ago anything was made, on this rank or, as the ranks tell each other through small files, on any other (rank 0 exports
while the others wait). After launch.stall_seconds without progress it writes the stacks of its rank to
logs/rank-<r>.stacks.txt, names the ranks that give no sign of life, and ends the process with exit code 1, upon which the
launcher ends the others. The last checkpoint stays. A rank that is blocked outside Python, so that its thread cannot run,
is dumped and ended by faulthandler's own thread, which needs no interpreter.
Cost     A counter a step; one small file a rank every few seconds. Other ranks' files are read when nothing moves here.
"""

import faulthandler
import json
import os
import threading
import time
from pathlib import Path

from contrec_dist.progress import get_logger

EXIT_CODE = 1
LOOKS_PER_STALL = 20
MAX_LOOK_SECONDS = 10.0
GRACE_LOOKS = 3  # for the other watchdogs to come to the same conclusion before the launcher ends their ranks


class Watchdog:
    """A context in which `beat` must be called at least every stall_seconds by some rank; 0 seconds: no watch is kept."""

    def __init__(self, stall_seconds: float, folder: Path, *, rank: int, world_size: int):
        self.stall_seconds, self.folder, self.rank = stall_seconds, Path(folder), rank
        self.look_seconds = min(stall_seconds / LOOKS_PER_STALL, MAX_LOOK_SECONDS)
        self.stacks_path = self.folder / f"rank-{rank}.stacks.txt"
        self._others = {other: _Other(self._life_path(other)) for other in range(world_size) if other != rank}
        self._num_beats, self._num_looks, self._doing = 0, 0, "start"
        self._moved_at = time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.stall_seconds:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._stacks = open(self.stacks_path, "a")
            self.beat("start")
            self._arm_last_word(0.0)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self.stall_seconds:
            self._ended.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._stacks.close()
            self._life_path(self.rank).unlink(missing_ok=True)
            if self.stacks_path.stat().st_size == 0:
                self.stacks_path.unlink()

    def beat(self, done: str) -> None:
        """Something was made: a step, a checkpoint, a part of the export."""
        self._num_beats, self._doing, self._moved_at = self._num_beats + 1, done, time.monotonic()

    def _watch(self) -> None:
        while True:
            self._look()
            still = time.monotonic() - self._moved_at
            if still > self.stall_seconds:
                self._end_run(still)
            self._arm_last_word(still)
            if self._ended.wait(self.look_seconds):
                return

    def _arm_last_word(self, still: float) -> None:
        """What happens when this thread does not come back to put it off."""
        seconds = self.stall_seconds - still + 2 * GRACE_LOOKS * self.look_seconds
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._stacks)

    def _look(self) -> None:
        """Tell the others how far this rank is; where nothing moved here for a while, see whether they moved."""
        self._num_looks += 1
        life = self._life_path(self.rank)
        partial = life.with_name(f".{life.name}.tmp")
        partial.write_text(json.dumps({"beats": self._num_beats, "looks": self._num_looks, "doing": self._doing}))
        os.replace(partial, life)
        now = time.monotonic()
        if now - self._moved_at > self.stall_seconds / 4:
            if any([other.look(now) for other in self._others.values()]):
                self._moved_at = now

    def _end_run(self, still: float) -> None:
        """Write the stacks, say so, give the others the time to do the same, and end the process."""
        now = time.monotonic()
        silent = [rank for rank, other in self._others.items() if now - other.alive_at > GRACE_LOOKS * self.look_seconds]
        what = f"no progress for {still:.0f} s since: {self._doing}"
        print(f"{time.strftime('%F %T')} rank {self.rank}: {what}", file=self._stacks, flush=True)
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        get_logger("train").error("rank %d: %s; stacks: %s", self.rank, what, self.stacks_path)
        if silent:
            get_logger("train").error("no sign of life from rank %s", ", ".join(map(str, silent)))
        self._ended.wait(GRACE_LOOKS * self.look_seconds)
        os._exit(EXIT_CODE)

    def _life_path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.alive.json"


class _Other:
    """Another rank, as far as its file tells. Times are when this rank saw a change: clocks of machines differ."""

    def __init__(self, path: Path):
        self.path, self.alive_at = path, time.monotonic()
        self._looks = self._beats = None

    def look(self, now: float) -> bool:
        """Whether it has made something since the last look at it."""
        try:
            seen = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return False
        moved = self._beats is not None and seen["beats"] != self._beats
        if seen["looks"] != self._looks:
            self.alive_at = now
        self._looks, self._beats = seen["looks"], seen["beats"]
        return moved
