"""Ray for the duration of a run: started on this machine, or that of a cluster. The extraction and training share it.

This module does not import ray: `pipeline/executor.py` and `train/fit/distributed.py` do, and pass it on.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.secrets import redacted

# The smallest object store that Ray accepts has 75 MiB; we put nothing into it.
OBJECT_STORE_BYTES = 80 * 1024 * 1024
CONNECT_TIMEOUT_S = 10.0
POLL_S = 0.5  # between two looks at whether Ray still runs
CLUSTER_POLL_S = 5.0  # the same for a cluster, which takes a connection
MAX_SOCKET_PATH = 107  # bytes, of the operating system
SESSION_FOLDER = "session_0000-00-00_00-00-00_000000_0000000"  # as Ray names it: date, time and process id
# Without these processes of Ray nothing more is done; the others show or scale a cluster.
VITAL = ("raylet", "gcs_server")
# Without it, Ray announces a change of its GPU defaults on every start.
SETTINGS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
# Ray has one switch for "this machine alone": listen on the loopback interface. It is on elsewhere than on Linux.
ONE_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Where the processes of a training on one machine listen for each other.
ONE_MACHINE_INTERFACE = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class RaySession:
    """A connection to Ray that notices when Ray is lost.

    Ray's own calls wait for minutes for a raylet that was killed.

    Attributes:
        ray: The module.
        local: Whether Ray was started on this machine, for this session alone.
    """

    def __init__(self, ray: Any, where: str, local: bool) -> None:
        self.ray = ray
        self.local = local
        self._where = where
        self._node = ray._private.worker._global_node  # None for a Ray client
        self._checked = time.monotonic()

    def get(self, reference: Any) -> Any:
        """`ray.get`, for as long as Ray runs.

        Raises:
            ZpipeError: Ray was lost.
        """
        while not self.ray.wait([reference], timeout=POLL_S)[0]:
            self.check()
        return self.ray.get(reference)

    def check(self) -> None:
        """Raise ZpipeError if Ray was lost."""
        reason = self._problem()
        if reason is not None:
            raise ZpipeError(f"{self._where} was lost ({reason}); run the same command again to resume")

    @property
    def folder(self) -> str:
        """Where Ray keeps sockets and logs on this machine."""
        return str(self._node.get_session_dir_path())

    def lost(self, error: Exception) -> ZpipeError:
        """The error for an exception of Ray's that nothing else handles."""
        reason = self._problem() or cause_of(error)
        return ZpipeError(f"{self._where} was lost ({reason}); run the same command again to resume")

    def _problem(self) -> str | None:
        if self._node is None:
            return None
        for kind, process in self._node.dead_processes():
            if kind in VITAL:
                code = process.returncode
                how = f"was killed by signal {-code}, often for lack of memory" if code < 0 else f"exited with {code}"
                return f"its {kind} {how}"
        if self.local or time.monotonic() - self._checked < CLUSTER_POLL_S:
            return None
        self._checked = time.monotonic()
        try:
            _check_reachable(self._node.gcs_address)
        except OSError as error:
            return f"nothing answers at {self._node.gcs_address}: {cause_of(error)}"
        with socket.socket(socket.AF_UNIX) as raylet:
            if raylet.connect_ex(self._node.raylet_socket_name):
                return "its raylet on this machine ended"
        return None


@contextmanager
def ray_session(
    import_ray: Callable[[], Any],
    address: str | None,
    cpus: int,
    *,
    instead: str,
    settings: Mapping[str, str] | None = None,
) -> Iterator[RaySession]:
    """Connect to Ray at `address`, or start it on this machine, where it listens on the loopback interface alone.

    What was started on this machine ends with the block, and also when this process is killed.

    Args:
        import_ray: Imports ray and returns the module.
        address: Address of a cluster; None takes RAY_ADDRESS, else starts Ray on this machine, as `local` does.
        cpus: CPUs that Ray should count at least on this machine.
        instead: What the user may do without Ray, for messages.
        settings: Further settings of Ray from the environment, which take effect when it is imported.

    Raises:
        ZpipeError: Ray can't be reached or started, or is lost in the block.
    """
    for name, value in (SETTINGS | dict(settings or {})).items():
        os.environ.setdefault(name, value)
    address = address or os.environ.get("RAY_ADDRESS")
    local = address in (None, "local")
    where = "Ray on this machine" if local else f"Ray at {redacted(str(address))}"
    problem = socket_path_problem() if local else None
    if problem is not None:
        raise ZpipeError(f"{where} can't be started: {problem}, or {instead}")
    ray = import_ray()
    try:
        if not local:
            _check_reachable(str(address))
        with _environment(_one_machine() if local else {}), _sigterm_kept():
            _start(ray, None if local else address, cpus)
    except (OSError, OverflowError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = cause_of(error)
        raise ZpipeError(
            f"{where} could not be reached or started ({reason}); {_remedy(reason, local)}, or {instead}"
        ) from error
    session = RaySession(ray, where, local)
    with _reaper(session), signals_as_raised():
        try:
            yield session
        except ray.exceptions.RayError as error:
            raise session.lost(error) from error
        finally:
            ray.shutdown()


def _start(ray: Any, address: str | None, cpus: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    # Ray reads the switch when it is imported, which another part of this process may have done.
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = address is not None
    # It prints errors to standard output, among the results, with twenty lines of a log. Exceptions have them, too.
    ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: None
    if address is not None:
        ray.init(address=address, **quiet)
        return
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, cpus),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        **quiet,
    )


def _one_machine() -> dict[str, str]:
    """The environment for the processes of a Ray on this machine."""
    if not any(name == "lo" for _, name in socket.if_nameindex()):
        return ONE_MACHINE
    return ONE_MACHINE | dict.fromkeys(ONE_MACHINE_INTERFACE, "lo")


@contextmanager
def _reaper(session: RaySession) -> Iterator[None]:
    """End what is left of a Ray on this machine after the block, or when this process is killed in it."""
    if not session.local:
        yield
        return
    program = str(Path(__file__).with_name("reaper.py"))
    line = [sys.executable, "-I", "-S", program, os.path.realpath(session.folder), str(os.getpid())]
    # In a session of its own, because signals to the process group are not for it.
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True):
        yield


@contextmanager
def signals_as_raised() -> Iterator[None]:
    """Raise what a signal handler raised, where a compiled function had a result already.

    Python then reports a SystemError about the function, whose cause is the handler's exception.
    """
    try:
        yield
    except SystemError as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, Exception):
            raise
        raise cause from None


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep the handler of SIGTERM, which `ray.init` replaces by one that exits."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    exits: SystemExit | None = None
    try:
        yield
    except SystemExit as error:
        exits = error
    finally:
        signal.signal(signal.SIGTERM, before)
    if exits is not None:
        signal.raise_signal(signal.SIGTERM)
        raise exits


def socket_path_problem(folder: str | None = None) -> str | None:
    """Why Ray can't keep its sockets below a folder for temporary files, with the remedy; None if it can.

    Args:
        folder: The folder; None takes the one that Ray takes: RAY_TMPDIR, else TMPDIR, else that of the system.
    """
    folder = folder or os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or tempfile.gettempdir()
    longest = os.fsencode(f"{folder.rstrip('/')}/ray/{SESSION_FOLDER}/sockets/plasma_store")
    if len(longest) <= MAX_SOCKET_PATH:
        return None
    most = MAX_SOCKET_PATH - (len(longest) - len(os.fsencode(folder)))
    return (
        f"{folder} is too long for the paths of its sockets (at most {most} bytes); "
        "set RAY_TMPDIR to a shorter folder, such as /tmp"
    )


def cause_of(error: BaseException) -> str:
    """The line of an exception of Ray's that says the cause, at most 200 characters, without secrets.

    Ray wraps exceptions in others, puts tracebacks into messages, and begins with what happened, not with why.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if any(line.startswith("Traceback (most recent call last)") or ", in " in line for line in lines[:-1]):
        lines = lines[-1:]  # of a traceback
    reasons = [line for line in lines if " because " in line]
    return redacted(" ".join(reasons or lines))[:200]


def _remedy(reason: str, local: bool) -> str:
    if "Version mismatch" in reason:
        return "install the same versions of Ray and Python on all machines"
    if "token" in reason.lower():
        return "give the cluster's token in RAY_AUTH_TOKEN, and RAY_AUTH_MODE=token"
    if local:
        return f"its logs are in {os.environ.get('RAY_TMPDIR') or tempfile.gettempdir()}/ray/session_latest/logs"
    return "check the address, and RAY_AUTH_TOKEN if the cluster asks for a token"


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing answers at the address, for which Ray itself would wait many minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():  # not so for `auto`, which Ray understands too
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
