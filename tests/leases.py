"""Leases that other processes hold, or held."""

import json
import os
import socket
import time

from zpipe.schemas import lease as leases
from zpipe.schemas.lease import LEASE_NAME


def a_lease():
    """The lease that a process in this very place would write."""
    return {
        "format": "zpipe-lease",
        "version": 1,
        "token": "t",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "namespace": leases._namespace(),
        "process": leases._process(os.getpid()),
        "since": "noon",
        "beat": time.time(),
    }


def holder_of(folder, **changes):
    """Write the lease that a run in this very place would write, but for `changes`."""
    (folder / LEASE_NAME).write_text(json.dumps(a_lease() | changes))


def foreign(folder, age):
    """A lease of a process on another machine, renewed `age` seconds ago."""
    holder_of(folder, host="elsewhere", pid=1, process="p", beat=time.time() - age)
