"""One writer at a time: a lease on a folder (a store, or a run), which does not outlive a process that died.

`lease.json` in the folder names its holder and is renewed every `BEAT_S` seconds. While it is renewed, other runs are
refused. A lease is taken over if its process no longer exists, where that can be looked up (same boot, same PID
namespace), or if it has not been renewed for `EXPIRY_S` seconds. The file system or the object store decides which of
two runs creates the file.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import msgspec

from zpipe.schemas.atomic import write_bytes
from zpipe.schemas.errors import ZpipeError, first_line, remedy_for
from zpipe.schemas.formats import Format, Text
from zpipe.schemas.names import printable
from zpipe.schemas.storage import as_path, create_exclusively, is_remote, read_file, remove, storage_errors

LEASE_NAME = "lease.json"
BEAT_S = 10.0  # between two renewals
EXPIRY_S = 40.0  # without a renewal, after which a lease is taken over
SETTLE_S = 0.5  # after taking a lease, in which another run may take it too
RENEWAL_S = 10.0  # how long a run that slept past its lease waits for the renewal before it fails
MAX_BYTES = 64 << 10  # of the file, which has some 300


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lease: the content of `lease.json`."""

    token: Text
    """Drawn anew for each lease."""
    host: Text
    """Name of the machine."""
    pid: Annotated[int, msgspec.Meta(ge=0, le=2**31)]
    """Process."""
    namespace: Text | None
    """PID namespace of the process; None where it is not known."""
    process: Text | None
    """Boot and start time of the process; None where they are not known."""
    since: Text
    """When the lease was taken, for the reader."""
    beat: float
    """When it was renewed last, in seconds since 1970."""

    def __str__(self) -> str:
        return f"process {self.pid} on {printable(self.host)}"


LEASE = Format(
    name="zpipe-lease",
    version=1,
    content=Holder,
    what="a lease",
    remedy="delete it when no run is writing here",
    max_bytes=MAX_BYTES,
)


class Lease:
    """A lease that this process holds. A thread renews it."""

    def __init__(self, path: Path, holder: Holder, what: str) -> None:
        self._path, self._holder, self._what = path, holder, what
        self._lost = ""
        self._end = threading.Event()
        self._renewed = _now()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise :class:`ZpipeError` if another run has taken the lease, or if it could not be renewed in time."""
        # A process that was suspended (a machine that slept, Ctrl-Z) is late, but the thread renews the lease in a
        # moment, unless the file system does not answer.
        waited_until = _now() + RENEWAL_S
        while not self._lost and self._late() and _now() < waited_until:
            time.sleep(RENEWAL_S / 100)
        if not self._lost and self._late():
            raise ZpipeError(
                f"{self._path}: the lease was last renewed {_now() - self._renewed:.0f} s ago, the {self._what}'s "
                "disk doesn't answer: another run may have it; run again to resume"
            )
        if self._lost:
            raise ZpipeError(self._lost)

    def release(self) -> None:
        """Delete the lease if it is still ours. If that fails it expires: the work has succeeded or failed already."""
        self._end.set()
        self._thread.join(BEAT_S)
        if self._lost or self._thread.is_alive():
            return
        try:
            current = _read(self._path)
            if current is not None and current.token == self._holder.token:
                remove(self._path)
        except storage_errors(ZpipeError):
            return

    def _late(self) -> bool:
        return _now() - self._renewed > EXPIRY_S

    def _keep(self) -> None:
        while not self._end.wait(BEAT_S):
            try:
                current = _read(self._path)
                if current is None or current.token != self._holder.token:
                    holder = "nobody" if current is None else current
                    self._lost = f"{self._path}: the lease is {holder}'s now; end the other run, then run this again"
                    return
                write_bytes(self._path, _encode(self._holder))
                self._renewed = _now()
            except storage_errors(ZpipeError) as error:
                # The disk may be out of reach for a moment. After that, another run may take this one for dead.
                if _now() - self._renewed > EXPIRY_S - BEAT_S:
                    self._lost = f"{self._path}: the lease could not be renewed ({error}); run again to resume"
                    return


@contextmanager
def held_lease(folder: Path, what: str = "store") -> Iterator[Lease]:
    """Hold the lease of a folder within the context.

    Args:
        folder: The folder that only one process may write to, a path or a URL. It exists.
        what: What messages call it.

    Raises:
        ZpipeError: Another process holds the lease; the message names it and its machine.
    """
    path = as_path(folder) / LEASE_NAME
    holder = Holder(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=os.getpid(),
        namespace=_namespace(),
        process=_process(os.getpid()),
        since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        beat=time.time(),
    )
    _take(path, holder, what)
    lease = Lease(path, holder, what)
    try:
        yield lease
    finally:
        lease.release()


def _take(path: Path, holder: Holder, what: str) -> None:
    try:
        while not create_exclusively(path, _encode(holder)):
            current = _read(path)
            if current is None:
                continue  # it was released at this moment
            if not _is_dead(path, current):
                raise ZpipeError(
                    f"{path}: {current} has been writing to this {what} since {printable(current.since)}; "
                    "wait for it, or give another --out folder"
                )
            if _read(path) == current:  # no other run has taken it over meanwhile
                remove(path)
        # Two runs may both have removed the lease of a dead run: the last one that wrote holds it.
        time.sleep(SETTLE_S)
        current = _read(path)
    except storage_errors() as error:
        raise ZpipeError(
            f"{path}: could not be written ({first_line(error)}); {remedy_for(error)}, then run again"
        ) from error
    if current is None or current.token != holder.token:
        raise ZpipeError(f"{path}: another run took this {what} in the same moment; wait for it to end")


def _is_dead(path: Path, lease: Holder) -> bool:
    """Whether the process that holds a lease has died. Takes `EXPIRY_S` where only a missing renewal can tell."""
    ours, namespace = _process(os.getpid()), _namespace()
    # Machines and containers may share a host name; a PID is unique only within one boot and one namespace.
    if ours and namespace and lease.process:
        boots = [process.partition(":")[0] for process in (ours, lease.process)]
        if (lease.host, lease.namespace, boots[1]) == (socket.gethostname(), namespace, boots[0]):
            return _process(lease.pid) != lease.process
    # The process is elsewhere. The clocks of two machines differ, so only a missing renewal proves that it died. A
    # lease from the future may be that of a dead run whose clock was ahead.
    if 0 <= time.time() - lease.beat < EXPIRY_S:
        return False
    time.sleep(EXPIRY_S)
    later = _read(path)
    return later is None or later == lease


def _process(pid: int) -> str | None:
    """Boot and start time, which tell a process from a later one of the same PID; None if either is unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] in "ZX":
            return None  # it has ended; only its parent has not waited for it yet
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + ":" + fields[19]
    except OSError:
        return None


def _now() -> float:
    """Seconds since boot, including those in which the machine slept where it has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _namespace() -> str | None:
    """The PID namespace of this process; None if /proc is absent or belongs to another namespace."""
    try:
        return os.readlink("/proc/self/ns/pid") if os.readlink("/proc/self") == str(os.getpid()) else None
    except OSError:
        return None


def _encode(holder: Holder) -> bytes:
    return msgspec.json.encode(LEASE.header | asdict(replace(holder, beat=time.time()))) + b"\n"


def _read(path: Path) -> Holder | None:
    """The content of the lease; None if there is none. Raises :class:`ZpipeError` if the file is no lease."""
    if not is_remote(path) and path.is_symlink():  # one that leads nowhere would be neither absent nor present
        raise ZpipeError(f"{path}: is a link, not a lease; {LEASE.remedy}")
    try:
        data = read_file(path, LEASE.max_bytes)
        if not data:  # without hard links, a lease is empty for a moment
            time.sleep(SETTLE_S)
            data = read_file(path, LEASE.max_bytes)
    except FileNotFoundError:
        return None
    except storage_errors() as error:
        raise ZpipeError(f"{path}: not readable as a lease ({first_line(error)}); {LEASE.remedy}") from error
    return LEASE.decode(data, path)
