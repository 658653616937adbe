"""Where shards run: in this process, or on Ray actors. Same signature; the only file of the pipeline that imports ray.

Only paths and counts cross Ray, never pixels or maps: a worker reads its tar and writes its map shard itself.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zpipe.pipeline.worker import ShardReport, ShardTask, ShardWorker, WorkerSpec
from zpipe.schemas.errors import ZpipeError

OnReport = Callable[[ShardReport], None]

# The smallest object store Ray accepts is 75 MiB; we put nothing in it.
OBJECT_STORE_BYTES = 80 * 1024 * 1024
READY_TIMEOUT_S = 300.0
CONNECT_TIMEOUT_S = 10.0
MAX_RETRIES = 2


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the run may use. `actors`: worker processes; `gpus_per_actor`: 0 on CPU, fractions share a GPU."""

    actors: int
    gpus_per_actor: float = 0.0
    address: str | None = None


def run_local(spec: WorkerSpec, tasks: Sequence[ShardTask], resources: Resources, on_report: OnReport) -> None:
    """Run the tasks one after the other in this process."""
    worker = ShardWorker(spec)
    for task in tasks:
        on_report(worker.process(task))


def run_ray(spec: WorkerSpec, tasks: Sequence[ShardTask], resources: Resources, on_report: OnReport) -> None:
    """Run the tasks on Ray actors, one task at a time on each; reports arrive in the order of completion.

    Connects to `resources.address` or RAY_ADDRESS when given, else starts Ray on this machine for the time of the run.
    A worker that dies is replaced and its shard retried, `MAX_RETRIES` times; then the shard is reported as failed
    and the rest goes on. Errors: :class:`ZpipeError` when Ray can't give the resources or a worker can't begin.
    """
    # Ray reads these at import; without them it announces a change of its GPU defaults on every start.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

    address = resources.address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    try:
        if address:
            _check_reachable(address)
            ray.init(address=address, **quiet)
        else:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, resources.actors * spec.threads),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                **quiet,
            )
    except (OSError, OverflowError, RuntimeError, ValueError, RayError) as error:
        where = f"Ray at {address}" if address else "Ray on this machine"
        raise ZpipeError(
            f"{where} could not be reached or started ({_first_line(error)}); check it, or use --executor local"
        ) from error
    try:
        gpus = resources.gpus_per_actor
        actor_class = ray.remote(
            num_cpus=0 if gpus else spec.threads, num_gpus=gpus, max_restarts=0, max_task_retries=0
        )(ShardWorker)
        actors = [actor_class.remote(spec) for _ in range(min(resources.actors, len(tasks)))]
        _wait_until_one_is_ready(ray, actors, spec, gpus, (RayActorError, RayTaskError, GetTimeoutError))
        queue = list(reversed(tasks))
        tries: dict[str, int] = {}
        running = {}
        for actor in actors:
            if queue:
                task = queue.pop()
                running[actor.process.remote(task)] = (actor, task)
        while running:
            (reference,), _ = ray.wait(list(running), num_returns=1)
            actor, task = running.pop(reference)
            try:
                on_report(ray.get(reference))
            except RayError as error:
                # The worker died (killed, out of memory, node lost) or raised something that is a defect of ours.
                stem = task.entry.stem
                tries[stem] = tries.get(stem, 0) + 1
                died = isinstance(error, RayActorError)
                if died:
                    # A new actor, not a restart: Ray refuses calls to an actor while it restarts, and counts restarts
                    # over the whole run, so that one bad shard would use up what belongs to the others.
                    actor = actor_class.remote(spec)
                if died and tries[stem] <= MAX_RETRIES:
                    queue.append(task)
                else:
                    on_report(ShardReport(stem=stem, error=f"{task.path}: worker failed: {_last_line(error)}"))
            if queue:
                task = queue.pop()
                running[actor.process.remote(task)] = (actor, task)
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself goes on for many minutes where nobody answers. Errors: OSError."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():  # not the `auto` or `local` that Ray understands too
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()


def _wait_until_one_is_ready(ray, actors, spec: WorkerSpec, gpus: float, errors: tuple) -> None:
    """Work begins with the first worker that is up; none in time means that the cluster hasn't what was asked for."""
    begun = time.monotonic()
    ready, _ = ray.wait([actor.ready.remote() for actor in actors], num_returns=1, timeout=READY_TIMEOUT_S)
    if not ready:
        wants = f"{gpus:g} GPU" if gpus else f"{spec.threads} CPU"
        raise ZpipeError(
            f"no worker came up in {time.monotonic() - begun:.0f} s: each wants {wants}, Ray has {ray.available_resources()}; "
            "lower --threads or --gpus-per-actor, or use --executor local"
        )
    try:
        ray.get(ready[0])
    except errors as error:
        raise ZpipeError(f"a worker could not begin: {_last_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().split("\n") if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
