"""Where shards run: in this process, or on Ray actors. Same signature; the only file of the pipeline that imports ray.

Only paths and counts cross Ray, never pixels or maps: a worker reads its tar and writes its map shard itself.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from zpipe.pipeline.worker import ShardReport, ShardTask, ShardWorker, WorkerSpec
from zpipe.schemas.errors import ZpipeError, first_line, last_line

OnReport = Callable[[ShardReport], None]
Check = Callable[[], None]

# The smallest object store Ray accepts is 75 MiB; we put nothing in it.
OBJECT_STORE_BYTES = 80 * 1024 * 1024
READY_TIMEOUT_S = 300.0
CONNECT_TIMEOUT_S = 10.0
TICK_S = 2.0
GRACE_S = 600.0  # for what a shard takes besides its images: a slow store, a first compilation
MAX_RETRIES = 2


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the run may use.

    actors: worker processes; 0 takes what Ray has room for. gpus_per_actor: fractions share a GPU; 0 chooses 1 where the
    device is CUDA. address: of a Ray cluster. image_timeout_s: a worker that is silent for longer than this times the images of
    its shard (and `GRACE_S`) is taken for hung.
    """

    actors: int = 0
    gpus_per_actor: float = 0.0
    address: str | None = None
    image_timeout_s: float = 10.0


def run_local(
    spec: WorkerSpec, tasks: Sequence[ShardTask], resources: Resources, on_report: OnReport, check: Check
) -> None:
    """Run the tasks one after the other in this process. `check` is called between them and may raise."""
    worker = ShardWorker(replace(spec, sharing=1))
    for task in tasks:
        check()
        on_report(worker.process(task))


def run_ray(
    spec: WorkerSpec, tasks: Sequence[ShardTask], resources: Resources, on_report: OnReport, check: Check
) -> None:
    """Run the tasks on Ray actors, one task at a time on each; reports arrive in the order of completion.

    Connects to `resources.address` or RAY_ADDRESS when given, else starts Ray on this machine for the time of the run.
    A worker that dies, with its node or alone, or that hangs is replaced and its shard retried, `MAX_RETRIES` times; then the
    shard is reported as failed and the rest goes on. `check` is called every few seconds and may raise. Errors:
    :class:`ZpipeError` when Ray can't give the resources or no worker can begin.
    """
    with _session(resources, spec.threads) as ray:
        _Fleet(ray, spec, tasks, resources, on_report).run(check)


@contextmanager
def _session(resources: Resources, threads: int) -> Iterator[Any]:
    # Ray reads these at import; without them it announces a change of its GPU defaults on every start.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    from ray.exceptions import RayError

    address = resources.address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    on_main = threading.current_thread() is threading.main_thread()
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            _check_reachable(address)
            ray.init(address=address, **quiet)
        else:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, resources.actors * threads),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                **quiet,
            )
    except (OSError, OverflowError, RuntimeError, ValueError, RayError) as error:
        where = f"Ray at {address}" if address else "Ray on this machine"
        token = " (and RAY_AUTH_TOKEN, when it asks for one)" if address else ""
        raise ZpipeError(
            f"{where} could not be reached or started ({first_line(error)}); check it{token}, or use --executor local"
        ) from error
    try:
        if on_main:
            signal.signal(signal.SIGTERM, on_terminate)  # Ray puts its own in its place
        yield ray
    finally:
        ray.shutdown()


@dataclass
class _Job:
    """A task on an actor. `deadline`: when we take the actor for hung (monotonic seconds)."""

    actor: Any
    task: ShardTask
    deadline: float


class _Fleet:
    """Actors that are starting (no task yet, so that none waits for a worker that never comes) or running one task.

    One that finds nothing to do is ended: kept, it would hold what a new one needs, and die unseen with its node.
    """

    def __init__(
        self, ray: Any, spec: WorkerSpec, tasks: Sequence[ShardTask], resources: Resources, on_report: OnReport
    ) -> None:
        has = ray.cluster_resources()
        device = spec.device if spec.device != "auto" else "cuda" if has.get("GPU", 0) else "cpu"
        gpus = (resources.gpus_per_actor or 1.0) if device.startswith("cuda") else 0.0
        room = has.get("GPU", 0) / gpus if gpus else has.get("CPU", 1) / spec.threads
        self._ray, self._on_report = ray, on_report
        self._wanted = min(resources.actors or max(1, int(room)), len(tasks))
        # What the machines have is Ray's to say: this one may be none of theirs. The fullest one tells, as any may be it.
        most = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
        # Not what is left to do: it bounds the batch, and a resumed run would sum in another order than an undisturbed one.
        sharing = max(1, min(resources.actors or int(room), int(most / spec.threads), spec.sharing))
        self._spec = replace(spec, device=device, sharing=sharing)
        self._image_timeout_s = resources.image_timeout_s
        self._gpus = gpus
        # GPU workers wait more than they compute: they must not queue for CPUs that nobody uses.
        self._actor_class = ray.remote(
            num_cpus=0 if gpus else spec.threads, num_gpus=gpus, max_restarts=0, max_task_retries=0
        )(ShardWorker)
        self._queue = deque(tasks)
        self._tries: dict[str, int] = {}
        self._starting: dict[Any, Any] = {}  # reference of ready() -> actor
        self._running: dict[Any, _Job] = {}  # reference of process() -> job
        self._failed_starts = 0
        self._working_since = time.monotonic()  # when a worker last was at work

    def run(self, check: Check) -> None:
        """Until every task has been reported."""
        for _ in range(self._wanted):
            self._start_actor()
        while self._queue or self._running:
            check()
            waited_for = [*self._starting, *self._running]
            done, _ = self._ray.wait(waited_for, num_returns=len(waited_for), timeout=0)
            if not done:
                done, _ = self._ray.wait(waited_for, num_returns=1, timeout=TICK_S)
            for reference in done:
                if reference in self._starting:
                    self._on_started(reference)
                else:
                    self._on_finished(reference)
            self._end_hung_ones()

    def _start_actor(self) -> None:
        actor = self._actor_class.remote(self._spec)
        self._starting[actor.ready.remote()] = actor

    def _assign(self, actor: Any) -> None:
        if self._queue:
            task = self._queue.popleft()
            limit = GRACE_S + self._image_timeout_s * task.entry.count
            self._running[actor.process.remote(task)] = _Job(actor, task, time.monotonic() + limit)
        else:
            self._ray.kill(actor)

    def _replace_actor(self) -> None:
        # One that is starting takes a shard from the queue, too.
        if len(self._queue) > len(self._starting):
            self._start_actor()

    def _on_started(self, reference: Any) -> None:
        from ray.exceptions import RayError

        actor = self._starting.pop(reference)
        try:
            self._ray.get(reference)
        except RayError as error:
            # A constructor that raises, or a node lost under it. Some failures may be of one node: go on with the others.
            self._failed_starts += 1
            if self._failed_starts > MAX_RETRIES * self._wanted:
                raise ZpipeError(f"{self._failed_starts} workers could not begin: {last_line(error)}") from error
            if not self._starting and not self._running and not _is_death(error):
                raise ZpipeError(f"a worker could not begin: {last_line(error)}") from error
            if _is_death(error):
                self._replace_actor()
            return
        self._assign(actor)

    def _on_finished(self, reference: Any) -> None:
        from ray.exceptions import RayActorError, RayError

        job = self._running.pop(reference)
        try:
            self._on_report(self._ray.get(reference))
        except RayActorError as error:
            # The worker died: killed, out of memory, node lost. A new actor, not a restart: Ray refuses calls to an actor
            # while it restarts, and counts restarts over the whole run, so that one bad shard would use up the others'.
            self._retry(job.task, f"worker failed: {last_line(error)}")
            self._replace_actor()
        except RayError as error:
            # It lives, but raised what no worker should: a defect of ours, the same on every try.
            self._on_report(ShardReport(stem=job.task.entry.stem, error=f"{job.task.path}: {last_line(error)}"))
            self._assign(job.actor)
        else:
            self._assign(job.actor)

    def _retry(self, task: ShardTask, why: str) -> None:
        stem = task.entry.stem
        self._tries[stem] = self._tries.get(stem, 0) + 1
        if self._tries[stem] <= MAX_RETRIES:
            self._queue.append(task)
        else:
            self._on_report(ShardReport(stem=stem, error=f"{task.path}: {why}"))

    def _end_hung_ones(self) -> None:
        now = time.monotonic()
        for reference, job in list(self._running.items()):
            if now > job.deadline:
                del self._running[reference]
                self._ray.kill(job.actor)
                self._retry(job.task, "worker gave no answer in time; give more by --image-timeout")
                self._replace_actor()
        if self._running:
            self._working_since = now
        elif now - self._working_since > READY_TIMEOUT_S:
            wants = f"{self._gpus:g} GPU" if self._gpus else f"{self._spec.threads} CPU"
            raise ZpipeError(
                f"no worker came up in {READY_TIMEOUT_S:.0f} s: each wants {wants}, Ray has "
                f"{self._ray.available_resources()}; lower --threads or --gpus-per-actor, or use --executor local"
            )


def _is_death(error: Exception) -> bool:
    """Whether the process or its node died, as against a constructor that raised."""
    from ray.exceptions import ActorDiedError, RayActorError

    raised = isinstance(error, ActorDiedError) and "creation task" in str(error)
    return isinstance(error, RayActorError) and not raised


def _check_reachable(address: str) -> None:
    """Ray itself goes on for many minutes where nobody answers. Errors: OSError."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():  # not the `auto` or `local` that Ray understands too
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
