"""Worker processes of a Ray job, and which of them makes which part.

Stage    precompute and score, through sharding/ray_jobs.py.
Promise  Up to `num_workers` workers are asked for and put to work as the cluster has room for them, none before
         `min_workers` are up. A worker that dies, with its process or with its node, gives its parts back: the workers
         that are left make them, and a replacement is asked for, which joins if there is room. So a job ends as long as
         one worker can be placed. The part at work when a worker died is made again at most MAX_WORKER_DEATHS times.
Cost     PARTS_IN_FLIGHT parts a worker are in flight. Workers with nothing left to do are let go before the job ends.
"""

from collections import deque
from typing import Callable, Iterator, Sequence

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from contrec_dist.config import RayConfig
from contrec_dist.errors import ContRecError
from contrec_dist.progress import get_logger

PARTS_IN_FLIGHT = 2
MAX_WORKER_DEATHS = 3
WARN_AFTER_SECONDS = 60.0


class PartError(ContRecError):
    """A part that could not be made: which one, of which stage, and why."""

    def __init__(self, stage: str, part: str, cause: str):
        super().__init__(stage, part, cause)
        self.stage, self.part, self.cause = stage, part, cause

    def __str__(self) -> str:
        return f"{self.stage}, part '{self.part}': {self.cause}"


class WorkerPool:
    """Actors with `ready()` and `work(part)`, made by `start_actor`; parts have a `name`."""

    def __init__(self, start_actor: Callable, config: RayConfig, num_parts: int, stage: str):
        self.start_actor, self.config, self.stage = start_actor, config, stage
        self.num_workers = min(config.num_workers, num_parts)
        self.num_needed = min(config.min_workers, self.num_workers)  # 0 once they have been up
        self.starting: dict = {}  # reference of ready() -> actor
        self.running: dict = {}  # reference of work() -> (part, actor)
        self.load: dict = {}  # actor -> its parts in flight, the one at work first
        self.deaths: dict[str, int] = {}  # of workers, by the part at work or "start of a worker"

    def finish(self, parts: Sequence) -> Iterator[tuple[object, dict]]:
        """Yield (part, result) as they finish. Errors   PartError, see the module."""
        waiting = deque(parts)
        for _ in range(self.num_workers):
            self._start()
        while waiting or self.running:
            done, _ = ray.wait([*self.running, *self.starting], timeout=WARN_AFTER_SECONDS)
            if not done and not self.running:
                self._warn_no_worker()
            for reference in done:
                if reference in self.starting:
                    self._welcome(reference)
                elif reference in self.running:  # no longer when its worker's death was seen in another reference
                    yield from self._collect(reference, waiting)
                self._hand_out(waiting)

    def close(self) -> None:
        """Let all workers go."""
        for actor in [*self.starting.values(), *self.load]:
            ray.kill(actor)
        self.starting, self.running, self.load = {}, {}, {}

    def _start(self) -> None:
        actor = self.start_actor()
        self.starting[actor.ready.remote()] = actor

    def _welcome(self, reference) -> None:
        """A worker's process is up; or it died in starting, and another is asked for."""
        actor, name = self.starting.pop(reference), "start of a worker"
        try:
            ray.get(reference)
        except RayActorError as error:
            self._count_death(name, error)
            self._start()
            return
        except RayError as error:
            raise PartError(self.stage, name, f"{type(error).__name__}: {error}") from error
        self.load[actor] = []

    def _collect(self, reference, waiting: deque) -> Iterator[tuple[object, dict]]:
        """The answer to one part; or the end of its worker, whose parts go back in front of the others."""
        part, actor = self.running[reference]
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            raise PartError(self.stage, part.name, f"{type(error.cause).__name__}: {error.cause}") from error
        except RayError as error:
            lost = self._bury(actor)
            self._count_death(lost[0].name, error)
            waiting.extendleft(reversed(lost))
            self._start()
            return
        del self.running[reference]
        self.load[actor].remove(part)
        yield part, result

    def _hand_out(self, waiting: deque) -> None:
        """Fill every worker to PARTS_IN_FLIGHT, the emptiest first; let go who has nothing left."""
        if len(self.load) < self.num_needed:
            return
        self.num_needed = 0
        while waiting and self.load:
            actor = min(self.load, key=lambda one: len(self.load[one]))
            if len(self.load[actor]) >= PARTS_IN_FLIGHT:
                return
            part = waiting.popleft()
            self.load[actor].append(part)
            self.running[actor.work.remote(part)] = (part, actor)
        if not waiting:
            for actor in [actor for actor, parts in self.load.items() if not parts]:
                del self.load[actor]
                ray.kill(actor)

    def _bury(self, actor) -> list:
        """Forget a dead worker; its parts, the one at work first."""
        ray.kill(actor)  # it may live on a node that is cut off
        self.running = {one: (part, owner) for one, (part, owner) in self.running.items() if owner is not actor}
        return self.load.pop(actor)

    def _count_death(self, name: str, error: RayError) -> None:
        deaths = self.deaths[name] = self.deaths.get(name, 0) + 1
        if deaths > MAX_WORKER_DEATHS:
            cause = f"its worker process died {deaths} times ({type(error).__name__}: {error})"
            raise PartError(self.stage, name, cause) from error
        get_logger(self.stage).warning("a worker died, %s is made again (%s)", name, type(error).__name__)

    def _warn_no_worker(self) -> None:
        asked = {"CPU": self.config.cpus_per_worker, "GPU": self.config.gpus_per_worker}
        asked["memory"] = self.config.memory_bytes_per_worker
        message = "no worker has had work for %d s: %d are up; each asks for %s, the cluster has %s"
        get_logger(self.stage).warning(message, WARN_AFTER_SECONDS, len(self.load), asked, ray.cluster_resources())
