"""Limits of this machine that commands run into: shared memory, descriptors, socket paths, memory, clock, disk."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

MIB = 1 << 20
SHARED_MEMORY = Path("/dev/shm")
MIN_FOLDER_BYTES = 1 << 30
MIN_INODES = 10_000
MIN_MEMORY_BYTES = 1 << 30
MIN_DESCRIPTORS = 256
MAX_SKEW_S = 60.0  # the leases of stores and runs count as given up after minutes
MAX_SOCKET_BYTES = 107  # of the path of a socket, on Linux
# What Ray puts behind the folder of temporary files.
RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    """What was checked."""
    value: str
    """The result, with the remedy if there is a problem."""
    ok: bool = True
    """False if a command would fail later."""


def shared_memory(path: Path, minimum: int) -> Finding:
    """Room in shared memory, for Ray.

    Args:
        path: Where it is mounted.
        minimum: Bytes that Ray needs.
    """
    name = str(path)
    if not path.is_dir():
        return Finding(name=name, value="absent; Ray uses temporary files instead")
    free = shutil.disk_usage(path).free
    value = f"{free // MIB} MiB free"
    if free < minimum:
        value += f", Ray wants {minimum // MIB}; docker: --shm-size=1g"
    return Finding(name=name, value=value, ok=free >= minimum)


def descriptors() -> Finding:
    """Limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = ["unlimited" if limit == resource.RLIM_INFINITY else str(limit) for limit in (soft, hard)]
    value = f"{shown[0]} (at most {shown[1]})"
    if soft == resource.RLIM_INFINITY or soft >= MIN_DESCRIPTORS:
        return Finding(name="file descriptors", value=value)
    enough = hard == resource.RLIM_INFINITY or hard >= MIN_DESCRIPTORS
    remedy = "ulimit -n 4096" if enough else "have the administrator raise the limit (docker: --ulimit nofile=4096)"
    return Finding(
        name="file descriptors", value=f"{value}; Ray and data-loading workers want more: {remedy}", ok=False
    )


def sockets() -> Finding:
    """Length of the paths of Ray's sockets, which lie in the folder of temporary files."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    length, room = len(os.fsencode(folder)), MAX_SOCKET_BYTES - len(RAY_SOCKET)
    value = f"{folder}: {length} bytes of at most {room}"
    value += "" if length <= room else "; set RAY_TMPDIR to a short folder, such as /tmp"
    return Finding(name="sockets of Ray", value=value, ok=length <= room)


def temporary_folder(minimum: int) -> Finding:
    """Whether the folder of temporary files can be used, and has that many bytes."""
    # Python ignores a TMPDIR that it cannot use, but Ray and C libraries do not.
    tmpdir = os.environ.get("TMPDIR")
    folder = Path(tmpdir or "/tmp")
    try:
        folder = Path(tmpdir or tempfile.gettempdir())
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        return Finding(
            name="temp", value=f"{folder}: not writable ({error.strerror}); set TMPDIR to a folder that is", ok=False
        )
    free = shutil.disk_usage(folder).free
    if free < minimum:
        return Finding(
            name="temp",
            value=f"{folder}: {free // MIB} MiB free, Ray wants {minimum // MIB}; set TMPDIR",
            ok=False,
        )
    return Finding(name="temp", value=f"{folder}: writable, {free >> 30} GiB free")


def memory() -> Finding:
    """The memory that the container or job allows, which the kernel enforces by killing."""
    for folder, (limit_name, usage_name) in product(_cgroup_folders(), CGROUP_FILES):
        try:
            limit, used = (int((folder / name).read_text()) for name in (limit_name, usage_name))
        except (OSError, ValueError):  # another kind of cgroup, or the limit is `max`
            continue
        if limit >= 1 << 60:  # how the older kind says that there is none
            continue
        value = f"{used // MIB} of {limit // MIB} MiB in use"
        if limit - used < MIN_MEMORY_BYTES:
            remedy = "processes will be killed; raise the limit (docker run --memory=16g)"
            return Finding(name="memory limit", value=f"{value}; {remedy}", ok=False)
        return Finding(name="memory limit", value=value)
    return Finding(name="memory limit", value="none")


def _cgroup_folders() -> list[Path]:
    """Where the limits of this process may be: in a container at the root, in a job of a scheduler below it."""
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:  # not Linux
        return []
    older = [CGROUPS / "memory" / path.strip("/") for _, controllers, path in groups if "memory" in controllers]
    newer = [CGROUPS / path.strip("/") for _, controllers, path in groups if not controllers]
    return [*newer, *older, CGROUPS, CGROUPS / "memory"]


def clock(now: float | None = None) -> Finding:
    """Whether the clock is plausible: it names what was made when, and leases expire by it.

    Args:
        now: Seconds since 1970; None for the clock's.
    """
    now = time.time() if now is None else now
    installed = Path(__file__).stat().st_mtime
    value = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(now))} UTC"
    if now < installed - 86_400:
        before = time.strftime("%Y-%m-%d", time.gmtime(installed))
        return Finding(name="clock", value=f"{value} is before this version, {before}; set the clock (NTP)", ok=False)
    return Finding(name="clock", value=value)


def output_folder(folder: Path) -> list[Finding]:
    """Whether shards, stores and runs can be written below a folder, and with what precautions."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return [Finding(name="folder", value=f"{existing}: no folder; give another", ok=False)]
    status = os.statvfs(existing)
    free, inodes = status.f_bavail * status.f_frsize, status.f_favail
    findings = []
    short = free < MIN_FOLDER_BYTES
    value = f"{folder}: {free // MIB} MiB free" + ("; free some, or give a folder on another disk" if short else "")
    findings.append(Finding(name="space", value=value, ok=not short))
    counted = status.f_files > 0  # some file systems have no fixed number
    short = counted and inodes < MIN_INODES
    value = f"{folder}: {inodes:,} free" if counted else f"{folder}: not limited"
    value += "; a store has several files per shard: remove files, or give a folder on another disk" if short else ""
    findings.append(Finding(name="inodes", value=value, ok=not short))
    try:
        findings += _written(existing)
    except OSError as error:
        value = f"{folder}: not writable ({error.strerror}); fix its permissions, or give another"
        findings.append(Finding(name="folder", value=value, ok=False))
    return findings


def _written(folder: Path) -> list[Finding]:
    """What a file that is written there shows: hard links, and the clock of the file system."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".tmp-doctor-") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
        skew = os.stat(file.name).st_mtime - time.time()
        link = Path(f"{file.name}-link")
        try:
            os.link(file.name, link)
        except OSError as error:
            value = f"{folder}: none ({error.strerror}); have only one machine write to a store or run there at a time"
        else:
            link.unlink()
            value = f"{folder}: work"
    links = Finding(name="hard links", value=value)
    if abs(skew) <= MAX_SKEW_S:
        return [links]
    value = f"{folder}: {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's; synchronise both (NTP)"
    return [links, Finding(name="clock of the folder", value=value, ok=False)]
