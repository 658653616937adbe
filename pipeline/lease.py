"""One writer at a time: a lease on a store that a dead run does not hold for ever.

`lease.json` in the store names its holder and is renewed every `BEAT_S` seconds. A second run is refused while it is; a
lease whose process is gone, where its number can be looked up (same boot, same PID namespace), or that nobody renews for
`EXPIRY_S`, is taken over. Creating the file is decided by the file system or the object store, so of two runs that begin
together one gets it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zpipe.schemas.atomic import write_bytes
from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.formats import check_format, header
from zpipe.schemas.storage import create_exclusively, remove, storage_errors

LEASE_NAME = "lease.json"
BEAT_S = 10.0
EXPIRY_S = 40.0
SETTLE_S = 0.5
# How long a run that slept past its lease waits for the renewal before it gives up.
RENEWAL_S = 10.0
FORMAT = "zpipe-lease"
VERSION = 1
FIELDS: dict[str, Any] = {
    "token": str,
    "host": str,
    "pid": int,
    "namespace": (str, type(None)),
    "process": (str, type(None)),
    "since": str,
    "beat": (int, float),
}


class Lease:
    """A held lease. `check()` raises :class:`ZpipeError` once another run has taken it, or it could not be renewed in time."""

    def __init__(self, path: Path, holder: dict[str, Any]) -> None:
        self._path, self._holder = path, holder
        self._lost = ""
        self._end = threading.Event()
        self._renewed = _now()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Whether we may still write."""
        # Late, but continued (a machine that slept, Ctrl-Z): the thread renews it in a moment. Unless it hangs in the store.
        waited_until = _now() + RENEWAL_S
        while not self._lost and self._late() and _now() < waited_until:
            time.sleep(RENEWAL_S / 100)
        if not self._lost and self._late():
            raise ZpipeError(
                f"{self._path}: the lease was last renewed {_now() - self._renewed:.0f} s ago, the store doesn't "
                "answer: another run may have it; run again to go on"
            )
        if self._lost:
            raise ZpipeError(self._lost)

    def release(self) -> None:
        """Give it back, if it is still ours. What can't be given back is left to expire: the work is done or has failed already."""
        self._end.set()
        self._thread.join(BEAT_S)
        if self._lost or self._thread.is_alive():
            return
        try:
            found = _read(self._path)
            if found is not None and found["token"] == self._holder["token"]:
                remove(self._path)
        except storage_errors(ZpipeError):
            return

    def _late(self) -> bool:
        return _now() - self._renewed > EXPIRY_S

    def _keep(self) -> None:
        while not self._end.wait(BEAT_S):
            try:
                found = _read(self._path)
                if found is None or found["token"] != self._holder["token"]:
                    holder = "nobody" if found is None else _name(found)
                    self._lost = f"{self._path}: the lease is {holder}'s now; end the other run, then run this again"
                    return
                write_bytes(self._path, _encode(self._holder))
                self._renewed = _now()
            except storage_errors(ZpipeError) as error:
                # A store that is out of reach for a moment; for longer, another run may believe us dead.
                if _now() - self._renewed > EXPIRY_S - BEAT_S:
                    self._lost = f"{self._path}: the lease could not be renewed ({error}); run again to go on"
                    return


@contextmanager
def held_lease(root: Path) -> Iterator[Lease]:
    """Hold the lease of the store at `root`. Errors: :class:`ZpipeError` naming the run that holds it."""
    path = root / LEASE_NAME
    holder = {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "namespace": _namespace(),
        "process": _process(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    _take(path, holder)
    lease = Lease(path, holder)
    try:
        yield lease
    finally:
        lease.release()


def _take(path: Path, holder: dict[str, Any]) -> None:
    try:
        while not create_exclusively(path, _encode(holder)):
            found = _read(path)
            if found is None:
                continue  # given back this moment
            if not _is_dead(path, found):
                raise ZpipeError(
                    f"{path}: {_name(found)} has been writing to this store since {found['since']}; "
                    "wait for it, or give another --out folder"
                )
            if _read(path) == found:  # and not another heir's by now
                remove(path)
        # Two heirs may both have removed a dead run's lease; the last to write holds it, the other learns it here.
        time.sleep(SETTLE_S)
        found = _read(path)
    except storage_errors() as error:
        raise ZpipeError(f"{path}: could not be written ({error}); fix permissions, then run again") from error
    if found is None or found["token"] != holder["token"]:
        raise ZpipeError(f"{path}: another run took this store in the same moment; wait for it to end")


def _is_dead(path: Path, found: dict[str, Any]) -> bool:
    ours, namespace = _process(os.getpid()), _namespace()
    # Containers and machines may share a name. A process number means the same to both only under one boot, in one namespace.
    if ours and namespace and found["process"]:
        boots = [process.partition(":")[0] for process in (ours, found["process"])]
        if (found["host"], found["namespace"], boots[1]) == (socket.gethostname(), namespace, boots[0]):
            return _process(found["pid"]) != found["process"]
    # Elsewhere: the clocks of two machines differ, so only whether the file goes on being renewed tells. One that seems to come
    # from the future may be a dead run's whose clock was ahead.
    if 0 <= time.time() - found["beat"] < EXPIRY_S:
        return False
    time.sleep(EXPIRY_S)
    later = _read(path)
    return later is None or later == found


def _process(pid: int) -> str | None:
    """What tells a process from a later one of the same number: boot and start time. None when there is none, or no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] in "ZX":
            return None  # ended, its parent just hasn't looked
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + ":" + fields[19]
    except OSError:
        return None


def _now() -> float:
    """Seconds that go on while the machine sleeps, where its clock can."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _namespace() -> str | None:
    """The PID namespace in which our own number counts. None where /proc is absent, or is that of another namespace."""
    try:
        return os.readlink("/proc/self/ns/pid") if os.readlink("/proc/self") == str(os.getpid()) else None
    except OSError:
        return None


def _name(found: dict[str, Any]) -> str:
    return f"process {found['pid']} on {found['host']}"


def _encode(holder: dict[str, Any]) -> bytes:
    return (json.dumps(header(FORMAT, VERSION) | holder | {"beat": time.time()}) + "\n").encode()


def _read(path: Path) -> dict[str, Any] | None:
    """The lease, None when there is none. Errors: :class:`ZpipeError` when the file is no lease."""
    remedy = "delete it when no run is writing here"
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ZpipeError(f"{path}: not a lease ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise ZpipeError(f"{path}: not a lease (no JSON object); {remedy}")
    check_format(path, value, FORMAT, VERSION, remedy=remedy)
    for name, kinds in FIELDS.items():
        if name not in value or not isinstance(value[name], kinds):
            raise ZpipeError(f"{path}: not a lease ({name} missing or wrong); {remedy}")
    return value
