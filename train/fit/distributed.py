"""Training in several processes, on one machine or many, through Ray Train or torchrun.

This is the only file of training that imports ray.

Every process runs the same function that a single process runs, and torch.distributed joins them. They share the run
folder: weights, checkpoints and metrics are files there. Only reports of progress, errors and the request to stop go
through Ray.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist

from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.progress import Progress, silent
from zpipe.schemas.ray_session import RaySession, cause_of, ray_session
from zpipe.train.fit.loop import Stopped
from zpipe.train.fit.mailbox import Mailbox
from zpipe.train.fit.torchrun import is_launched, run_as_rank
from zpipe.train.fit.train_vit import VitConfig
from zpipe.train.fit.train_zoomer import ZoomerConfig
from zpipe.train.ranks import check_batch, is_lost_process

POLL_S = 0.5
RESTARTS = 3
# How long an interrupted run may take to finish its step and write a checkpoint.
SAVE_TIMEOUT_S = 600.0
# Settings of Ray itself; the values of the user's environment take precedence.
RAY_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
}

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The processes that train.

    A single process without an address is this one, without Ray. For more, Ray is started on this machine for the
    duration of the run, unless `address` or RAY_ADDRESS names a cluster.
    """

    count: int = 1
    """Number of processes, one per GPU if there are GPUs; 0 means 1."""

    address: str | None = None
    """Address of a Ray cluster."""

    def __post_init__(self) -> None:
        if self.count < 0:
            raise UsageError(f"--num-workers {self.count}: give a number >= 0")


def run_training(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    config: VitConfig | ZoomerConfig,
    workers: Workers,
    *,
    progress: Progress = silent,
    say: Say = lambda line: None,
) -> None:
    """Call `train_vit` or `train_zoomer`, in this process, in all `workers` at once, or as a rank of torchrun.

    If a process dies, alone or with its machine, the others end too, and all start again from the run's last
    checkpoint, at most `RESTARTS` times. An error that a single process would fail with too, of whatever type, ends all
    of them without another attempt. If this process is interrupted, the others save their state and end.

    All machines need zpipe, and must reach the paths, the run folder among them, under the same names.

    Args:
        function: `train_vit` or `train_zoomer`.
        arguments: Its keyword arguments, such as the paths and `resume`.
        config: Its configuration.
        workers: The processes to call it in.
        progress: Called with the progress of the training.
        say: Called with lines for the user, such as the warning that training starts again.

    Raises:
        UsageError: If the settings don't allow so many workers; else as `function`.
        ZpipeError: If Ray can't be reached or has too few resources, or the restarts did not help; else as `function`.
    """
    count = max(1, workers.count)
    device = config.train.device
    if is_launched():
        if workers != Workers():
            raise UsageError("--num-workers, --address: torchrun has started the training processes; leave them out")
        _check_processes(config, int(os.environ["WORLD_SIZE"]))
        run_as_rank(function, {**arguments, "config": config}, device, progress)
        return
    if count == 1 and workers.address is None:
        function(**arguments, config=config, progress=progress)
        return
    _check_processes(config, count)
    with (
        ray_session(
            _import_ray, workers.address, count, instead="leave out --num-workers", settings=RAY_SETTINGS
        ) as session,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
    ):
        use_gpu = _choose_resource(session.ray.cluster_resources(), device, count) == "GPU"
        job = _Job(function, {**arguments, "config": config}, _start_mailbox(session.ray))
        for restart in range(RESTARTS + 1):
            rendezvous = f"{scratch}/rendezvous-{restart}" if session.local else None
            group = _Group(session, _trainer(job, count, use_gpu, scratch, rendezvous))
            failure = _run_once(session, group, job.mailbox, progress, say)
            if failure is None:
                return
            reason = cause_of(failure.error)
            if restart == RESTARTS or not failure.may_restart:
                raise ZpipeError(
                    f"the training processes failed, {restart} restarts included: {reason}; "
                    "run the same command again to resume"
                ) from failure.error
            say(f"warning: a training process died; all begin again from the last checkpoint ({reason})")
            job.arguments["resume"] = "auto"


def _check_processes(config: VitConfig | ZoomerConfig, count: int) -> None:
    """Check that so many processes can share the batch and the GPUs.

    Raises:
        UsageError: If they can't.
    """
    check_batch(config.train.batch_size, count)
    device = config.train.device
    if device.startswith("cuda:") and count > 1:
        raise UsageError(
            f"--device {device}: training processes take a GPU each; give --device cuda, and name GPUs in "
            "CUDA_VISIBLE_DEVICES"
        )


def _choose_resource(available: Mapping[str, float], device: str, count: int) -> Literal["GPU", "CPU"]:
    """The resource of which each process takes one, given the device that the user chose.

    Raises:
        ZpipeError: If Ray has too few of them.
    """
    use_gpu = device.startswith("cuda") or (device == "auto" and available.get("GPU", 0) > 0)
    kind: Literal["GPU", "CPU"] = "GPU" if use_gpu else "CPU"
    if available.get(kind, 0) < count:
        raise ZpipeError(
            f"--num-workers {count}: Ray has {available.get(kind, 0):g} {kind}s; give fewer, or add machines"
        )
    return kind


@dataclass(frozen=True)
class _Failure:
    """How Ray's attempt to train failed."""

    error: Exception
    may_restart: bool  # processes were lost, so that another attempt may succeed


def _run_once(session: RaySession, group: _Group, mailbox: Any, progress: Progress, say: Say) -> _Failure | None:
    """Show the progress of a group of processes until it ends, and return its failure if a restart may help.

    Raises:
        Exception: The error that a process reported.
        ZpipeError: Ray was lost.
    """
    try:
        ended = False
        while not ended:
            ended = group.wait(POLL_S)
            for stage, done, total, metrics in session.get(mailbox.take_reports.remote()):
                progress(stage, done, total, **metrics)
    except BaseException:  # Ctrl-C, SIGTERM
        session.check()
        _stop_group(session, mailbox, group, say)
        raise
    if group.failure is None:
        return None
    session.check()
    error = session.get(mailbox.error.remote())
    if error is not None:
        raise error from group.failure.error  # whose traceback shows where an error that is not ours comes from
    return group.failure


def _stop_group(session: RaySession, mailbox: Any, group: _Group, say: Say) -> None:
    """Let the processes save their state, if they have any. Another interrupt ends them at once."""
    if not session.get(mailbox.request_stop.remote()):
        return
    say("stopping: the training processes save their state; interrupt again to end them at once")
    ended = group.wait(SAVE_TIMEOUT_S)
    error = session.get(mailbox.error.remote()) or (group.failure.error if group.failure is not None else None)
    if not ended or (error is not None and not isinstance(error, Stopped)):
        reason = f"not done after {SAVE_TIMEOUT_S:.0f} s" if error is None else cause_of(error)
        say(f"warning: their state was not saved ({reason}); the last checkpoint stands")


def _import_ray() -> Any:
    import ray

    return ray


class _Job:
    """What every training process does: call `function` with `arguments`."""

    def __init__(self, function: Callable[..., Any], arguments: dict[str, Any], mailbox: Any) -> None:
        threads = os.environ.get("OMP_NUM_THREADS", "")
        self.function, self.arguments, self.mailbox = function, arguments, mailbox
        self.folder = os.getcwd()
        self.threads = int(threads) if threads.isdecimal() else 0  # 0: share the machine's cores


def _trainer(job: _Job, count: int, use_gpu: bool, scratch: str, rendezvous: str | None) -> Any:
    """Ray Train's trainer of a group of processes.

    Args:
        job: What each process does.
        count: Number of processes.
        use_gpu: Whether each takes a GPU.
        scratch: Folder for Ray Train's own files.
        rendezvous: File through which the processes find each other, if all are on this machine.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    return TorchTrainer(
        # Not as train_loop_config: Ray's controller would load the job too, and all that it imports.
        partial(_work, job),
        torch_config=None if rendezvous is None else _file_rendezvous(rendezvous),
        scaling_config=ScalingConfig(num_workers=count, use_gpu=use_gpu),
        run_config=RunConfig(
            name="run",
            storage_path=scratch,
            failure_config=FailureConfig(
                max_failures=0,
                controller_failure_limit=0,  # type: ignore[call-arg]  # of the class under RAY_TRAIN_V2_ENABLED=1
            ),
        ),
    )


def _file_rendezvous(path: str) -> Any:
    """A TorchConfig whose processes find each other through a new file, which only this user may open.

    Ray's own uses torch's TCPStore, which listens on all addresses and lets everyone read and write.
    """
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _TorchBackend

    # Classes of this function are sent to Ray's controller by value, so that it does not import this module.
    class FileBackend(_TorchBackend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            import ray

            backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
            count, timeout = len(worker_group), timedelta(seconds=backend_config.timeout_s)

            def join(number: int) -> None:
                dist.init_process_group(
                    backend, init_method=f"file://{path}", timeout=timeout, world_size=count, rank=number
                )

            ray.get([worker_group.execute_single_async(number, join, number) for number in range(count)])

    class FileConfig(TorchConfig):
        @property
        def backend_cls(self) -> type[FileBackend]:
            return FileBackend

    return FileConfig()


class _Group:
    """The training processes from their start to their end.

    Ray Train runs in a thread of its own, where it does not handle Ctrl-C.
    """

    def __init__(self, session: RaySession, trainer: Any) -> None:
        self.failure: _Failure | None = None
        self._session, self._trainer = session, trainer
        self._ended = threading.Event()
        threading.Thread(target=self._fit, daemon=True).start()

    def _fit(self) -> None:
        from ray.exceptions import RayError
        from ray.train import TrainingFailedError, WorkerGroupError

        try:
            self._trainer.fit()
        except (TrainingFailedError, RayError) as error:
            self.failure = _Failure(error, may_restart=isinstance(error, WorkerGroupError))
        finally:
            self._ended.set()

    def wait(self, seconds: float) -> bool:
        """Whether the processes end, successfully or not, within that time.

        Raises:
            ZpipeError: Ray was lost.
        """
        end = time.monotonic() + seconds
        while True:
            self._session.check()
            # Not by Thread.join: before Python 3.13, a join that a signal's exception interrupts marks it as ended.
            if self._ended.wait(min(POLL_S, seconds)) or time.monotonic() >= end:
                return self._ended.is_set()


def _start_mailbox(ray: Any) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()


def _work(job: _Job) -> None:
    """Run the job in a training process."""
    import ray
    from ray.train import get_context

    mailbox, context = job.mailbox, get_context()
    try:
        try:
            os.chdir(job.folder)
        except FileNotFoundError as error:
            raise ZpipeError(
                f"{job.folder}: not on {socket.gethostname()}; start from a folder that all machines share"
            ) from error
        # Ray limits a process to one thread per CPU that it reserved.
        torch.set_num_threads(job.threads or max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
        if context.get_world_rank() > 0:
            job.function(**job.arguments)
            return
        ray.get(mailbox.begin.remote())
        stop_requested = mailbox.wait_for_stop.remote()
        job.function(
            **job.arguments,
            progress=lambda stage, done, total, **metrics: ray.get(mailbox.report.remote(stage, done, total, metrics)),
            stop=lambda: bool(ray.wait([stop_requested], timeout=0)[0]),
        )
    except Exception as error:  # of any type: it is reported and raised again
        if not _is_a_lost_process(error):
            ray.get(mailbox.fail.remote(error))
        raise


def _is_a_lost_process(error: Exception) -> bool:
    """Whether the error means that another process or a device was lost, so that a restart can help."""
    from ray.exceptions import RayError

    return isinstance(error, RayError) or is_lost_process(error)
