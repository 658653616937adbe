"""Run shards in this process or on Ray actors, with the same signature. The only file of the pipeline that imports ray.

Only paths and counts pass through Ray, never pixels or maps: a worker reads its tar and writes its map shard itself.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from zpipe.pipeline.sick_gpus import Place, SickGpus
from zpipe.pipeline.worker import ShardReport, ShardTask, ShardWorker, WorkerSpec, process_all, shards_at_once
from zpipe.schemas.devices import device_fault
from zpipe.schemas.errors import ZpipeError, first_line
from zpipe.schemas.ray_session import RaySession, cause_of, ray_session


class Worker(Protocol):
    """What runs shards: a `ShardWorker`."""

    def process(self, task: ShardTask) -> ShardReport:
        """Run one shard and commit its maps."""


OnReport = Callable[[ShardReport], None]
Check = Callable[[], None]
MakeWorker = Callable[[WorkerSpec], Worker]

READY_TIMEOUT_S = 300.0  # without any worker
TICK_S = 1.0  # at most, between two calls of `check`
GRACE_S = 600.0  # per shard, beside the time for its images: a slow store, a first compilation
IMAGE_TIMEOUT_S = 10.0  # per image of a shard, until one is finished
PATIENCE = 20.0  # a shard may take so many times as long as the slowest finished one
MAX_RETRIES = 2  # of a shard whose worker died
GPU_REMEDY = "look at nvidia-smi and dmesg there, choose other GPUs by CUDA_VISIBLE_DEVICES, and run again to resume"


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The resources that a run may use."""

    actors: int = 0
    """Number of workers; 0 takes as many as Ray has resources for."""
    gpus_per_actor: float = 0.0
    """GPUs of each worker, a fraction where workers share one; 0 takes 1 where the device is CUDA."""
    address: str | None = None
    """Address of a Ray cluster; None takes RAY_ADDRESS, else starts Ray on this machine."""
    image_timeout_s: float | None = None
    """Seconds per image of a shard, beside `GRACE_S`, after which a silent worker counts as hung; None follows the pace
    of the run, see :func:`hang_limit`."""


def hang_limit(count: int, slowest: float | None, image_timeout_s: float | None = None) -> float:
    """Seconds after which a worker that has not finished a shard counts as hung.

    Args:
        count: Images of the shard.
        slowest: Seconds per image of the slowest shard that is finished; None if there is none.
        image_timeout_s: Seconds per image that the user gave.
    """
    if image_timeout_s is None:
        image_timeout_s = IMAGE_TIMEOUT_S if slowest is None else min(IMAGE_TIMEOUT_S, PATIENCE * slowest)
    return GRACE_S + image_timeout_s * count


def run_local(
    spec: WorkerSpec, tasks: Sequence[ShardTask], resources: Resources, on_report: OnReport, check: Check
) -> None:
    """Run the tasks in this process, two at a time on a GPU, one after the other on a CPU.

    Args:
        spec: What the worker needs.
        tasks: The shards.
        resources: Not used here.
        on_report: Called with the report of each shard.
        check: Called before each shard; it may raise to end the run.

    Raises:
        ZpipeError: The device failed, so that this process can't use it any more.
    """
    worker = ShardWorker(replace(spec, sharing=1))
    for report in process_all(worker, tasks, check):
        if report.fault == "device":
            raise ZpipeError(f"{report.error}: {spec.device} has failed; {GPU_REMEDY}")
        if report.fault == "assert":
            raise ZpipeError(
                f"{report.error}: a value in this shard is out of range, or in the other one that the device had; "
                "leave the shard out, and report a defect of zpipe; run again to resume"
            )
        on_report(report)


def run_ray(
    spec: WorkerSpec,
    tasks: Sequence[ShardTask],
    resources: Resources,
    on_report: OnReport,
    check: Check,
    make_worker: MakeWorker = ShardWorker,
) -> None:
    """Run the tasks on Ray actors, two at a time on each with a GPU, one at a time on others.

    A worker that hangs or dies, alone, with its GPU or with its node, is replaced, and its shard is retried up to
    `MAX_RETRIES` times; then the shard is reported as failed, and the others continue. If the worker had several
    shards, nobody knows which one is to blame: each is retried alone, and only that counts. A GPU on which workers die
    again and again is not used any more, see :class:`SickGpus`.

    Args:
        spec: What each worker needs.
        tasks: The shards.
        resources: The resources to use. Without an address, Ray is started on this machine for the time of the run.
        on_report: Called with the report of each shard, in the order of completion.
        check: Called every few seconds; it may raise to end the run.
        make_worker: Makes a worker in its process.

    Raises:
        ZpipeError: Ray cannot be reached, does not have the resources or is lost, no worker can begin, or no GPU is
            left.
    """
    cpus = resources.actors * spec.threads
    with ray_session(_import_ray, resources.address, cpus, instead="use --executor local") as session:
        _Fleet(session, spec, tasks, resources, on_report).run(check, make_worker)


def device_of_cluster(address: str | None) -> str:
    """The kind of device that workers on a Ray cluster get: cuda if a machine of it has a GPU, else cpu.

    Raises:
        ZpipeError: Ray cannot be reached.
    """
    with ray_session(_import_ray, address, 0, instead="use --executor local") as session:
        return "cuda" if session.ray.cluster_resources().get("GPU", 0) else "cpu"


def _import_ray() -> Any:
    import ray

    return ray


class ShardActor:
    """A worker on Ray. It loads nothing before `begin`, which first finds out on which GPU the process is."""

    def __init__(self, spec: WorkerSpec, make_worker: MakeWorker, gpus: float, actors: int) -> None:
        self._spec, self._make, self._gpus, self._actors = spec, make_worker, gpus, actors
        self._worker: Worker | None = None

    def begin(self, sick: SickGpus) -> tuple[Place, str]:
        """Load the teacher, unless the GPU is known to be sick; returns the place, and why the GPU failed or ""."""
        place, cpus_per_worker = self._place()
        if place not in sick:
            try:
                self._worker = self._make(replace(self._spec, threads=self._spec.threads or cpus_per_worker))
            except RuntimeError as error:
                if device_fault(error) is None:
                    raise
                return place, first_line(error)
        return place, ""

    def process(self, task: ShardTask) -> ShardReport:
        """Run one shard and commit its maps."""
        assert self._worker is not None  # only those that began get tasks
        return self._worker.process(task)

    def _place(self) -> tuple[Place, int]:
        """Where this process is, and its share of the machine's CPUs where GPUs limit the number of workers."""
        ray = _import_ray()
        context = ray.get_runtime_context()
        number = context.get_node_id()
        node = next(each for each in ray.nodes() if each["NodeID"] == number)
        place = Place(node["NodeManagerHostname"], number, tuple(context.get_accelerator_ids().get("GPU", ())))
        room = int(node["Resources"].get("GPU", 0) / self._gpus) if self._gpus else 1
        workers = max(1, min(room, self._actors))
        return place, max(1, int(node["Resources"].get("CPU", 1) / workers))


@dataclass
class _Job:
    """A task that runs on an actor."""

    actor: _Actor
    task: ShardTask
    begun: float  # monotonic seconds


@dataclass(eq=False)
class _Actor:
    """An actor that has begun."""

    handle: Any
    place: Place
    running: dict[Any, _Job] = field(default_factory=dict)  # reference of process() -> job


class _Fleet:
    """The actors of a run, each starting or running tasks.

    A starting actor has no task yet, so no task waits for a worker that never comes. An actor without a further task is
    killed: it would hold the resources that a new one needs, and could die unnoticed with its node. An actor on a sick
    GPU is kept without a task for that very reason: Ray gives the GPU to no other one.
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
        gpus = (resources.gpus_per_actor or 1.0) if spec.device.startswith("cuda") else 0.0
        room = has.get("GPU", 0) / gpus if gpus else has.get("CPU", 1) / spec.threads
        self._session, self._ray, self._on_report = session, ray, on_report
        self._wanted = min(resources.actors or max(1, int(room)), len(tasks))
        self._at_once = shards_at_once(spec.device)
        if not gpus:
            # Ask Ray for the CPUs of the machines, which this one need not belong to; any worker may be on the largest
            # one. It bounds the batch size, so it must not depend on how many tasks are left: a resumed run would sum
            # in another order than an undisturbed one.
            most = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
            sharing = max(1, min(resources.actors or int(room), int(most / spec.threads), spec.sharing))
            spec = replace(spec, sharing=sharing)
        self._spec, self._gpus, self._image_timeout_s = spec, gpus, resources.image_timeout_s
        # GPU workers hardly use CPUs, so they must not wait until some are free.
        self._actor_class = ray.remote(
            num_cpus=0 if gpus else spec.threads,
            num_gpus=gpus,
            max_concurrency=self._at_once,
            max_restarts=0,
            max_task_retries=0,
        )(ShardActor)
        self._queue = deque(tasks)
        self._tries: dict[str, int] = {}
        self._suspects: set[str] = set()  # stems of shards that are retried alone
        self._starting: dict[Any, Any] = {}  # reference of begin() -> actor
        self._running: dict[Any, _Job] = {}  # reference of process() -> job
        self._failed_starts = 0
        self._last_active = time.monotonic()  # when a worker last had a task
        self._slowest: float | None = None  # seconds per image, of the finished shards
        self._sick = SickGpus()
        self._parked: list[_Actor] = []  # they hold the sick GPUs
        self._notes: list[str] = []  # for the next report

    def run(self, check: Check, make_worker: MakeWorker) -> None:
        """Run until every task has been reported."""
        self._make_worker = self._ray.put(make_worker)
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
            self._check_workers()

    def _start_actor(self) -> None:
        handle = self._actor_class.remote(self._spec, self._make_worker, self._gpus, self._wanted)
        self._starting[handle.begin.remote(self._sick)] = handle

    def _assign(self, actor: _Actor) -> None:
        """Give an actor as many tasks as it can have; park it if its GPU is sick, or end it if there are none."""
        if actor.place in self._sick and not actor.running:
            self._parked.append(actor)
            self._replace_actor()
            return
        while actor.place not in self._sick and (task := self._next_task(actor)):
            job = _Job(actor, task, time.monotonic())
            reference = actor.handle.process.remote(task)
            actor.running[reference] = self._running[reference] = job
        if not actor.running:
            self._ray.kill(actor.handle)

    def _next_task(self, actor: _Actor) -> ShardTask | None:
        """Take a task for an actor from the queue; None if it shall have no further one."""
        # An actor that starts, or has nothing else to do, must find one.
        spare = len(self._queue) - len(self._starting)
        alone = any(job.task.entry.stem in self._suspects for job in actor.running.values())
        if len(actor.running) >= self._at_once or (actor.running and (alone or spare <= 0)):
            return None
        for task in self._queue:
            if not (actor.running and task.entry.stem in self._suspects):
                self._queue.remove(task)
                return task
        return None

    def _replace_actor(self) -> None:
        # Each starting actor will take a shard from the queue.
        if len(self._queue) > len(self._starting):
            self._start_actor()

    def _on_started(self, reference: Any) -> None:
        from ray.exceptions import RayError

        handle = self._starting.pop(reference)
        try:
            place, failure = self._ray.get(reference)
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
        actor = _Actor(handle, place)
        if failure:
            self._leave(actor, {""}, failure)
            self._replace_actor()
        else:
            self._assign(actor)

    def _on_finished(self, reference: Any) -> None:
        if reference not in self._running:  # counted, or lost with its actor, because of another task
            return
        actor, task = self._running[reference].actor, self._running[reference].task
        outcome = self._outcome(reference)
        if isinstance(outcome, str) or outcome.fault:
            self._count_finished(actor)
        if isinstance(outcome, str):
            self._retry(actor, outcome)
        elif outcome.fault == "device" or (outcome.fault and len(actor.running) > 1):
            reason = outcome.error.removeprefix(f"{task.path}: ")
            if outcome.fault == "device":
                self._leave(actor, {job.task.entry.stem for job in actor.running.values()}, reason)
            else:
                self._ray.kill(actor.handle)
            self._retry(actor, f"{actor.place} failed: {reason}")
        else:
            self._count(reference, outcome)
            if outcome.fault:  # an assertion, the same on every GPU; but this worker can't use its own any more
                self._ray.kill(actor.handle)
                self._replace_actor()
            else:
                self._assign(actor)

    def _outcome(self, reference: Any) -> ShardReport | str:
        """The report of a task, or why its worker died."""
        from ray.exceptions import RayActorError, RayError

        task = self._running[reference].task
        try:
            report: ShardReport = self._ray.get(reference)
        except RayActorError as error:
            # Killed, out of memory, node lost. It gets a new actor, not a restart: Ray refuses calls to an actor while
            # it restarts, and counts restarts over the whole run, so one bad shard would use up those of the others.
            return f"worker failed: {cause_of(error)}"
        except RayError as error:
            # The worker lives, but raised an exception that none should raise: a bug of ours, the same on every retry.
            return ShardReport(stem=task.entry.stem, error=f"{task.path}: {cause_of(error)}")
        return report

    def _count(self, reference: Any, report: ShardReport) -> None:
        """Report a task that needs no retry."""
        job = self._running.pop(reference)
        del job.actor.running[reference]
        if not report.error:
            pace = (time.monotonic() - job.begun) / max(1, report.count)
            self._slowest = max(pace, self._slowest or 0.0)
            self._sick.worked(job.actor.place)
        self._report(report)

    def _count_finished(self, actor: _Actor) -> None:
        """Count what an actor that is to be given up has finished, such as a shard that was being written."""
        references = list(actor.running)
        done, _ = self._ray.wait(references, num_returns=len(references), timeout=TICK_S)
        for reference in done:
            outcome = self._outcome(reference)
            if not isinstance(outcome, str) and not outcome.fault:
                self._count(reference, outcome)

    def _leave(self, actor: _Actor, stems: set[str], reason: str) -> None:
        """Give up an actor whose GPU has failed while it had some shards ("" while it started)."""
        if self._sick.died(actor.place, stems, reason):
            self._notes.append(f"{actor.place} failed again ({reason}): not used any more")
            if len(actor.running) > 1:
                self._ray.kill(actor.handle)  # it may still write the other shard; the next actor there is parked
            else:
                self._parked.append(actor)
        else:
            self._notes.append(f"{actor.place} failed ({reason}): its worker was replaced")
            self._ray.kill(actor.handle)

    def _report(self, report: ShardReport) -> None:
        self._on_report(replace(report, notes=(*self._notes, *report.notes)))
        self._notes.clear()

    def _retry(self, actor: _Actor, reason: str) -> None:
        """Replace an actor, and queue its tasks again, unless it was one that has failed too often."""
        tasks = [job.task for job in actor.running.values()]
        for reference in actor.running:
            del self._running[reference]
        actor.running.clear()
        stems = [task.entry.stem for task in tasks]
        if len(tasks) > 1:  # any of them may be to blame
            self._suspects.update(stems)
        else:
            self._tries[stems[0]] = self._tries.get(stems[0], 0) + 1
        if self._tries.get(stems[0], 0) <= MAX_RETRIES:  # of a single task; others were not counted
            self._queue.extend(tasks)
        else:
            self._report(ShardReport(stem=stems[0], error=f"{tasks[0].path}: {reason}"))
        self._replace_actor()

    def _kill_hung_actors(self) -> None:
        now = time.monotonic()
        for reference, job in list(self._running.items()):
            limit = hang_limit(job.task.entry.count, self._slowest, self._image_timeout_s)
            if reference in self._running and now > job.begun + limit:
                self._ray.kill(job.actor.handle)
                self._retry(job.actor, f"worker gave no answer in {limit:.0f} s; give more by --image-timeout")

    def _check_workers(self) -> None:
        """Raise ZpipeError if no worker comes up, or none can because no GPU is left."""
        if self._running or not self._queue:
            self._last_active = time.monotonic()
            return
        if self._parked and self._gpus_left() < self._gpus:
            raise ZpipeError(f"no GPU is left: {self._sick}; {GPU_REMEDY}")
        if time.monotonic() - self._last_active > READY_TIMEOUT_S:
            wants = f"{self._gpus:g} GPU" if self._gpus else f"{self._spec.threads} CPU"
            raise ZpipeError(
                f"no worker came up in {READY_TIMEOUT_S:.0f} s: each wants {wants}, Ray has "
                f"{self._ray.available_resources()}; lower --threads or --gpus-per-actor, or use --executor local"
            )

    def _gpus_left(self) -> float:
        """GPUs that Ray can give to new workers, now or when others end."""
        alive = {node["NodeID"]: node["Resources"].get("GPU", 0.0) for node in self._ray.nodes() if node["Alive"]}
        return sum(alive.values()) - self._gpus * sum(actor.place.node_id in alive for actor in self._parked)


def _is_death(error: Exception) -> bool:
    """Whether the process or its node died, and not merely its constructor raised."""
    from ray.exceptions import ActorDiedError, RayActorError

    raised = isinstance(error, ActorDiedError) and "creation task" in str(error)
    return isinstance(error, RayActorError) and not raised
