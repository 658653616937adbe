"""Run shards in this process or on Ray actors, with the same signature. The only file of the pipeline that imports ray.

Only paths and counts pass through Ray, never pixels or maps: a worker reads its tar and writes its map shard itself.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zpipe.pipeline.worker import ShardReport, ShardTask, ShardWorker, WorkerSpec
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.ray_session import RaySession, cause_of, ray_session

OnReport = Callable[[ShardReport], None]
Check = Callable[[], None]

READY_TIMEOUT_S = 300.0  # without any worker
TICK_S = 1.0  # at most, between two calls of `check`
GRACE_S = 600.0  # per shard, beside the time for its images: a slow store, a first compilation
MAX_RETRIES = 2  # of a shard whose worker died


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The resources that a run may use."""

    actors: int = 0
    """Number of workers; 0 takes as many as Ray has resources for."""
    gpus_per_actor: float = 0.0
    """GPUs of each worker, a fraction where workers share one; 0 takes 1 where the device is CUDA."""
    address: str | None = None
    """Address of a Ray cluster; None takes RAY_ADDRESS, else starts Ray on this machine."""
    image_timeout_s: float = 10.0
    """Seconds per image of a shard, beside `GRACE_S`, after which a silent worker counts as hung."""


def run_local(
    spec: WorkerSpec, tasks: Sequence[ShardTask], resources: Resources, on_report: OnReport, check: Check
) -> None:
    """Run the tasks one after the other in this process.

    Args:
        spec: What the worker needs.
        tasks: The shards.
        resources: Not used here.
        on_report: Called with the report of each shard.
        check: Called before each shard; it may raise to end the run.
    """
    worker = ShardWorker(replace(spec, sharing=1))
    for task in tasks:
        check()
        on_report(worker.process(task))


def run_ray(
    spec: WorkerSpec, tasks: Sequence[ShardTask], resources: Resources, on_report: OnReport, check: Check
) -> None:
    """Run the tasks on Ray actors, one task at a time on each.

    A worker that hangs or dies, alone or with its node, is replaced, and its shard is retried up to `MAX_RETRIES`
    times; then the shard is reported as failed, and the others continue.

    Args:
        spec: What each worker needs.
        tasks: The shards.
        resources: The resources to use. Without an address, Ray is started on this machine for the time of the run.
        on_report: Called with the report of each shard, in the order of completion.
        check: Called every few seconds; it may raise to end the run.

    Raises:
        ZpipeError: Ray cannot be reached, does not have the resources or is lost, or no worker can begin.
    """
    cpus = resources.actors * spec.threads
    with ray_session(_import_ray, resources.address, cpus, instead="use --executor local") as session:
        _Fleet(session, spec, tasks, resources, on_report).run(check)


def _import_ray() -> Any:
    import ray

    return ray


@dataclass
class _Job:
    """A task that runs on an actor."""

    actor: Any
    task: ShardTask
    deadline: float  # monotonic seconds after which the actor counts as hung


class _Fleet:
    """The actors of a run, each starting or running one task.

    A starting actor has no task yet, so no task waits for a worker that never comes. An actor without a further task is
    killed: it would hold the resources that a new one needs, and could die unnoticed with its node.
    """

    def __init__(
        self,
        session: RaySession,
        spec: WorkerSpec,
        tasks: Sequence[ShardTask],
        resources: Resources,
        on_report: OnReport,
    ) -> None:
        ray = session.ray
        has = ray.cluster_resources()
        device = spec.device if spec.device != "auto" else "cuda" if has.get("GPU", 0) else "cpu"
        gpus = (resources.gpus_per_actor or 1.0) if device.startswith("cuda") else 0.0
        room = has.get("GPU", 0) / gpus if gpus else has.get("CPU", 1) / spec.threads
        self._session, self._ray, self._on_report = session, ray, on_report
        self._wanted = min(resources.actors or max(1, int(room)), len(tasks))
        # Ask Ray for the CPUs of the machines, which this one need not belong to; any worker may be on the largest one.
        most = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
        # It bounds the batch size, so it must not depend on how many tasks are left: a resumed run would sum in another
        # order than an undisturbed one.
        sharing = max(1, min(resources.actors or int(room), int(most / spec.threads), spec.sharing))
        self._spec = replace(spec, device=device, sharing=sharing)
        self._image_timeout_s = resources.image_timeout_s
        self._gpus = gpus
        # GPU workers hardly use CPUs, so they must not wait until some are free.
        self._actor_class = ray.remote(
            num_cpus=0 if gpus else spec.threads, num_gpus=gpus, max_restarts=0, max_task_retries=0
        )(ShardWorker)
        self._queue = deque(tasks)
        self._tries: dict[str, int] = {}
        self._starting: dict[Any, Any] = {}  # reference of ready() -> actor
        self._running: dict[Any, _Job] = {}  # reference of process() -> job
        self._failed_starts = 0
        self._last_active = time.monotonic()  # when a worker last had a task

    def run(self, check: Check) -> None:
        """Run until every task has been reported."""
        for _ in range(self._wanted):
            self._start_actor()
        while self._queue or self._running:
            check()
            waited_for = [*self._starting, *self._running]
            done, _ = self._ray.wait(waited_for, num_returns=len(waited_for), timeout=0)
            if not done:
                done, _ = self._ray.wait(waited_for, num_returns=1, timeout=TICK_S)
            self._session.check()  # first: without Ray, all workers seem to have died
            for reference in done:
                if reference in self._starting:
                    self._on_started(reference)
                else:
                    self._on_finished(reference)
            self._kill_hung_actors()

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
        # Each starting actor will take a shard from the queue.
        if len(self._queue) > len(self._starting):
            self._start_actor()

    def _on_started(self, reference: Any) -> None:
        from ray.exceptions import RayError

        actor = self._starting.pop(reference)
        try:
            self._ray.get(reference)
        except RayError as error:
            # The constructor raised, or its node was lost. If others may still start, one failure is no reason to end.
            self._failed_starts += 1
            if self._failed_starts > MAX_RETRIES * self._wanted:
                raise ZpipeError(f"{self._failed_starts} workers could not begin: {cause_of(error)}") from error
            if not self._starting and not self._running and not _is_death(error):
                raise ZpipeError(f"a worker could not begin: {cause_of(error)}") from error
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
            # The worker died: killed, out of memory, node lost. It gets a new actor, not a restart, because Ray refuses
            # calls to an actor while it restarts, and counts restarts over the whole run, so that one bad shard would
            # use up those of the others.
            self._retry(job.task, f"worker failed: {cause_of(error)}")
            self._replace_actor()
        except RayError as error:
            # The worker lives, but raised an exception that none should raise: a bug of ours, the same on every retry.
            self._on_report(ShardReport(stem=job.task.entry.stem, error=f"{job.task.path}: {cause_of(error)}"))
            self._assign(job.actor)
        else:
            self._assign(job.actor)

    def _retry(self, task: ShardTask, reason: str) -> None:
        stem = task.entry.stem
        self._tries[stem] = self._tries.get(stem, 0) + 1
        if self._tries[stem] <= MAX_RETRIES:
            self._queue.append(task)
        else:
            self._on_report(ShardReport(stem=stem, error=f"{task.path}: {reason}"))

    def _kill_hung_actors(self) -> None:
        now = time.monotonic()
        for reference, job in list(self._running.items()):
            if now > job.deadline:
                del self._running[reference]
                self._ray.kill(job.actor)
                self._retry(job.task, "worker gave no answer in time; give more by --image-timeout")
                self._replace_actor()
        if self._running:
            self._last_active = now
        elif now - self._last_active > READY_TIMEOUT_S:
            wants = f"{self._gpus:g} GPU" if self._gpus else f"{self._spec.threads} CPU"
            raise ZpipeError(
                f"no worker came up in {READY_TIMEOUT_S:.0f} s: each wants {wants}, Ray has "
                f"{self._ray.available_resources()}; lower --threads or --gpus-per-actor, or use --executor local"
            )


def _is_death(error: Exception) -> bool:
    """Whether the process or its node died, and not merely its constructor raised."""
    from ray.exceptions import ActorDiedError, RayActorError

    raised = isinstance(error, ActorDiedError) and "creation task" in str(error)
    return isinstance(error, RayActorError) and not raised
