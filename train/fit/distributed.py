"""Training in several processes, on one machine or many, through Ray Train; the only file of training that imports ray.

Every process runs the same function that one process runs, joined by torch.distributed. What they share is the run folder:
weights, checkpoints and figures go through files there, and only a few numbers for the eye cross Ray.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from zpipe.schemas.errors import UsageError, ZpipeError, last_line
from zpipe.schemas.progress import Progress, silent
from zpipe.train.checkpoint import Resume
from zpipe.train.fit.loop import Stopped
from zpipe.train.fit.mailbox import Mailbox
from zpipe.train.fit.train_vit import VitConfig
from zpipe.train.fit.train_zoomer import ZoomerConfig
from zpipe.train.ranks import check_batch

# The smallest object store Ray accepts is 75 MiB; we put nothing in it.
OBJECT_STORE_BYTES = 80 * 1024 * 1024
CONNECT_TIMEOUT_S = 10.0
TICK_S = 0.5
RESTARTS = 3
# How long an interrupted run may take to save; a step, and the writing of a checkpoint.
SAVE_S = 600.0
# Of Ray itself: a user's own values stand.
RAY_SETTINGS = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it announces a change of its GPU defaults on every start
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths stay what they are
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
}

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Who trains. count: processes, one for each GPU where there are GPUs; 0 is taken as 1. address: of a Ray cluster.

    One process without an address is this process, without Ray. More start Ray on this machine for the time of the run,
    unless `address` or RAY_ADDRESS names a cluster.
    """

    count: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise UsageError(f"--num-workers {self.count}: give a number >= 0")


def run_training(
    function: Callable[..., Any],
    places: Mapping[str, Path | None],
    config: VitConfig | ZoomerConfig,
    workers: Workers,
    *,
    resume: Resume = "auto",
    progress: Progress = silent,
    say: Say = lambda line: None,
) -> None:
    """Call `train_vit` or `train_zoomer` with `places` and `config`: here, or in all `workers` at once.

    A process that dies, alone or with its machine, takes the others with it; all begin again from the run's last
    checkpoint, at most `RESTARTS` times, which is told to `say`. What one process would fail on, whatever its type, ends all
    of them with the same error and no second try. When this process is interrupted, the others save their state and end.

    All machines need zpipe, and must reach the paths under the same names; the run folder too. Errors:
    :class:`UsageError`, :class:`ZpipeError`, as of `function`; also when Ray can't give the workers.
    """
    count = max(1, workers.count)
    if count == 1 and workers.address is None:
        function(**places, config=config, resume=resume, progress=progress)
        return
    check_batch(config.train.batch_size, count)
    if config.train.device.startswith("cuda:"):
        raise UsageError(
            f"--device {config.train.device}: training processes take a GPU each; give --device cuda, and name GPUs in "
            "CUDA_VISIBLE_DEVICES"
        )
    with (
        _session(workers.address or os.environ.get("RAY_ADDRESS"), count) as ray,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
    ):
        has = ray.cluster_resources()
        device = config.train.device
        use_gpu = device.startswith("cuda") or (device == "auto" and has.get("GPU", 0) > 0)
        kind = "GPU" if use_gpu else "CPU"
        if has.get(kind, 0) < count:
            raise ZpipeError(
                f"--num-workers {count}: Ray has {has.get(kind, 0):g} {kind}s; give fewer, or add machines"
            )
        mailbox = _start_mailbox(ray)
        threads = os.environ.get("OMP_NUM_THREADS", "")
        job = {
            "function": function,
            "arguments": {**places, "config": config, "resume": resume},
            "mailbox": mailbox,
            "folder": os.getcwd(),
            "threads": int(threads) if threads.isdecimal() else 0,
        }
        for restart in range(RESTARTS + 1):
            group = _Group(job, count, use_gpu, scratch)
            try:
                _follow(ray, mailbox, group, progress)
            except BaseException:  # Ctrl-C, SIGTERM
                _end_group(ray, mailbox, group, say)
                raise
            if group.failure is None:
                return
            error = ray.get(mailbox.error.remote())
            if error is not None:
                raise error from group.failure  # which shows where, when it is no error of ours
            told = last_line(group.failure)
            if restart == RESTARTS or not group.may_restart:
                raise ZpipeError(
                    f"the training processes failed, {restart} restarts included: {told}"
                ) from group.failure
            say(f"warning: a training process died; all begin again from the last checkpoint ({told})")
            job["arguments"]["resume"] = "auto"


def _follow(ray: Any, mailbox: Any, group: _Group, progress: Progress) -> None:
    """Show progress until the processes have ended."""
    while True:
        ended = group.wait(TICK_S)
        for stage, done, total, facts in ray.get(mailbox.news.remote()):
            progress(stage, done, total, **facts)
        if ended:
            return


def _end_group(ray: Any, mailbox: Any, group: _Group, say: Say) -> None:
    """Let the processes save, if there is anything to save. Another interrupt ends them at once."""
    if not ray.get(mailbox.ask_to_stop.remote()):
        return
    say("stopping: the training processes save their state; interrupt again to end them at once")
    ended = group.wait(SAVE_S)
    error = ray.get(mailbox.error.remote()) or group.failure
    if not ended or (error is not None and not isinstance(error, Stopped)):
        told = f"not done after {SAVE_S:.0f} s" if error is None else last_line(error)
        say(f"warning: their state was not saved ({told}); the last checkpoint stands")


class _Group:
    """The training processes, from one start to their end, under Ray Train in a thread of its own: there it leaves Ctrl-C
    alone.
    """

    def __init__(self, job: dict[str, Any], count: int, use_gpu: bool, scratch: str) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        self.failure: Exception | None = None
        self.may_restart = False
        self._trainer = TorchTrainer(
            partial(
                _work, job
            ),  # as train_loop_config the job, and all that it imports, would go to Ray's controller too
            scaling_config=ScalingConfig(num_workers=count, use_gpu=use_gpu),
            run_config=RunConfig(
                name="run",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )
        self._ended = threading.Event()
        threading.Thread(target=self._fit, daemon=True).start()

    def _fit(self) -> None:
        from ray.exceptions import RayError
        from ray.train import TrainingFailedError, WorkerGroupError

        try:
            self._trainer.fit()
        except (TrainingFailedError, RayError) as error:
            self.failure, self.may_restart = error, isinstance(error, WorkerGroupError)
        finally:
            self._ended.set()

    def wait(self, seconds: float) -> bool:
        """Whether the processes end, well or not, within that time."""
        # Not by Thread.join: before Python 3.13, one that a signal's exception interrupts takes the thread for ended.
        return self._ended.wait(seconds)


def _start_mailbox(ray: Any) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()


def _work(job: dict[str, Any]) -> None:
    """What every training process does."""
    import ray
    from ray.train import get_context

    mailbox, context = job["mailbox"], get_context()
    try:
        try:
            os.chdir(job["folder"])
        except FileNotFoundError as error:
            raise ZpipeError(
                f"{job['folder']}: not on {socket.gethostname()}; start from a folder that all machines share"
            ) from error
        # Ray leaves a process one thread for each CPU that it asked for.
        torch.set_num_threads(job["threads"] or max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
        if context.get_world_rank() > 0:
            job["function"](**job["arguments"])
            return
        ray.get(mailbox.begin.remote())
        stopped = mailbox.stopped.remote()
        job["function"](
            **job["arguments"],
            progress=lambda stage, done, total, **facts: ray.get(mailbox.tell.remote(stage, done, total, facts)),
            stop=lambda: bool(ray.wait([stopped], timeout=0)[0]),
        )
    except Exception as error:  # whatever it is: told on the way, and raised again
        if not _is_a_lost_process(error):
            ray.get(mailbox.fail.remote(error))
        raise


def _is_a_lost_process(error: Exception) -> bool:
    """Whether it says that another process, or a device, is gone: then a new start can help.

    gloo, torch's loader and CUDA raise plain RuntimeErrors, which their texts alone tell from our own mistakes.
    """
    from ray.exceptions import RayError

    if isinstance(error, (dist.DistError, RayError)):
        return True
    told = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in told for sign in ("gloo", "Gloo", "DataLoader worker (pid", "CUDA error")
    )


@contextmanager
def _session(address: str | None, count: int) -> Iterator[Any]:
    """Ray, connected to `address` or started on this machine with room for `count` processes."""
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)  # read at import
    import ray
    from ray.exceptions import RayError

    where = f"Ray at {address}" if address else "Ray on this machine"
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    on_main = threading.current_thread() is threading.main_thread()
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            _check_reachable(address)
            ray.init(address=address, **quiet)
        else:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, count),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                **quiet,
            )
    except (OSError, OverflowError, RuntimeError, ValueError, RayError) as error:
        token = " (and RAY_AUTH_TOKEN, when it asks for one)" if address else ""
        raise ZpipeError(
            f"{where} could not be reached or started ({last_line(error)}); check it{token}, or leave out --num-workers"
        ) from error
    try:
        if on_main:
            signal.signal(signal.SIGTERM, on_terminate)  # Ray puts its own in its place
        yield ray
    except RayError as error:
        raise ZpipeError(f"{where} was lost ({last_line(error)}); run the same command again to go on") from error
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself goes on for many minutes where nobody answers. Errors: OSError."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():  # not the `auto` or `local` that Ray understands too
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
