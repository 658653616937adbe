"""What the operating system says that processes listen on, from /proc."""

import contextlib
import ipaddress
import os
from pathlib import Path

LISTENING = "0A"


def addresses(pids):
    """The addresses on which these processes accept TCP connections or receive UDP, as ipaddress objects."""
    owned = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            for file in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    owned.add(os.readlink(file))
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in owned and (fields[3] == LISTENING or table.startswith("udp")):
                found.add(_address(fields[1].partition(":")[0]))
    return found


def _address(text):
    # In 32-bit words, each in the order of the machine: little-endian on all that PyTorch supports.
    words = [bytes.fromhex(text[at : at + 8])[::-1] for at in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    return getattr(address, "ipv4_mapped", None) or address


def reachable(pids):
    """Those of the addresses that other machines may reach."""
    return {address for address in addresses(pids) if not address.is_loopback}
