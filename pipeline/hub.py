"""Data sets on the Hugging Face Hub: their addresses, bounded reads of their files, and what errors of the Hub mean.

Tokens come from where huggingface_hub looks itself: the environment (HF_TOKEN) or its own login. They appear in no
argument, file or message.
"""

from __future__ import annotations

import errno
import re
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from zpipe.schemas.errors import UsageError, ZpipeError, first_line, remedy_for
from zpipe.schemas.names import printable
from zpipe.schemas.secrets import refuse_secret
from zpipe.schemas.storage import storage_errors

T = TypeVar("T")

SCHEME = "hf://"
TIMEOUT_S = 60  # without a byte from the server
RETRIES = 3  # of a request that the server refuses for now
MAX_WAIT_S = 330  # for a limit of requests to be lifted; the Hub counts them over five minutes
ANNOUNCED_WAIT_S = 5
_ADDRESS = re.compile(r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+(/[\w.-]+)*))?/?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOGIN = "log in with hf auth login, or set HF_TOKEN"


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """A data set repository on the Hub, at a revision."""

    name: str
    """Owner and name: ``OWNER/NAME``."""
    revision: str = "main"
    """Branch, tag or commit."""

    def __str__(self) -> str:
        return f"{SCHEME}datasets/{self.name}" + (f"@{self.revision}" if self.revision != "main" else "")


def is_hub_address(text: str) -> bool:
    """Whether a text is meant as an address on the Hub."""
    return text.lower().startswith(SCHEME)


def parse_address(text: str) -> HubDataset:
    """The data set that an address ``hf://datasets/OWNER/NAME[@REVISION]`` names.

    Raises:
        UsageError: It is no such address.
    """
    refuse_secret(text)
    found = _ADDRESS.fullmatch(text)
    if found is None or ".." in text:
        raise UsageError(f"{text}: is no data set on the Hub; write it as hf://datasets/OWNER/NAME[@REVISION]")
    _check_installed(text)
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(found["name"])
    except HFValidationError as error:
        raise UsageError(f"{text}: {first_line(error)}") from error
    return HubDataset(name=found["name"], revision=found["revision"] or "main")


def _check_installed(text: str) -> None:
    try:
        from huggingface_hub.utils import disable_progress_bars, logging
    except ImportError as error:
        raise UsageError(f"{text}: needs huggingface_hub; install the extra hub") from error
    disable_progress_bars()  # ours shows the whole
    logging.set_verbosity_error()  # its warnings quote the signed URLs of uploads


def pinned(dataset: HubDataset, stopped: threading.Event) -> HubDataset:
    """The data set at the commit that its revision is now, so that all reads see the same files.

    Args:
        dataset: The data set.
        stopped: Ends waiting when it is set.

    Raises:
        ZpipeError: There is no such data set or revision, it may not be read, or the Hub can't be reached.
    """
    from huggingface_hub import HfApi

    info = patiently(
        lambda: HfApi().dataset_info(dataset.name, revision=dataset.revision, timeout=TIMEOUT_S), dataset, stopped
    )
    if info.sha is None or not _COMMIT.fullmatch(info.sha):
        raise ZpipeError(f"{dataset}: the Hub names no commit of it; check HF_ENDPOINT")
    return replace(dataset, revision=info.sha)


def read_from_hub(dataset: HubDataset, name: str, max_bytes: int) -> bytes:
    """Read one file of a data set.

    The file goes through memory, not through huggingface_hub's cache: its size is bounded whatever the server sends.

    Args:
        dataset: The data set.
        name: Path of the file in the repository.
        max_bytes: Largest size of the file.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It is larger, or what `hub_errors` lists.
    """
    from huggingface_hub import hf_hub_url, hf_raise_for_status
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(dataset.name, name, repo_type="dataset", revision=dataset.revision)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    data = bytearray()
    # The token goes to the Hub alone: the session drops it where a file lies on another host.
    with session().stream("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S) as response:
        try:
            hf_raise_for_status(response)
        except EntryNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "no such file", name) from error
        for piece in response.iter_bytes():
            data += piece
            if len(data) > max_bytes:
                raise OSError(errno.EFBIG, f"has more than {max_bytes} bytes, too many for a file of its kind", name)
    return bytes(data)


def session() -> Any:
    """The HTTP client of huggingface_hub, which refuses to wait longer than `MAX_WAIT_S` seconds for a limit to end."""
    from huggingface_hub import get_session

    client = get_session()
    if _check_wait not in client.event_hooks["response"]:
        client.event_hooks["response"].append(_check_wait)
    return client


def _check_wait(response: Any) -> None:
    """Refuse or announce a long wait before the library, or :func:`patiently`, sleeps."""
    from huggingface_hub import hf_raise_for_status

    wait = _asked_wait_s(response.headers) if response.status_code == 429 else None
    if wait is not None and wait > MAX_WAIT_S:
        response.read()
        hf_raise_for_status(response)
    if wait is not None and wait >= ANNOUNCED_WAIT_S:
        warnings.warn(f"too many requests: the server asks to wait {wait} s", stacklevel=2)


def hub_errors() -> tuple[type[Exception], ...]:
    """The exceptions that requests to the Hub may raise.

    Errors of an upload come as RuntimeError with their cause; answers that are not the Hub's, as ValueError or
    KeyError.
    """
    return (OSError, *http_errors(), RuntimeError, ValueError, KeyError)


def http_errors() -> tuple[type[Exception], ...]:
    """The bases of the errors of the HTTP libraries that are imported; huggingface_hub's is httpx or its successor."""
    bases = (("httpx", "HTTPError"), ("httpx2", "HTTPError"), ("aiohttp", "ClientError"))
    return tuple(getattr(sys.modules[module], name) for module, name in bases if module in sys.modules)


def patiently(
    request: Callable[[], T],
    where: object,
    stopped: threading.Event,
    errors: tuple[type[Exception], ...] | None = None,
) -> T:
    """Return what a request returns, which is made again when the server asks for patience.

    A limit of requests (429) is waited for as long as the server says, at most `MAX_WAIT_S` seconds; an error of the
    server (500 and more) or of the connection, for some seconds.

    Args:
        request: The request. It may be repeated.
        where: What messages call what is read or written.
        stopped: Ends waiting when it is set.
        errors: The exceptions that the request may raise. None takes those of the Hub.

    Raises:
        FileNotFoundError: The request raised it.
        ZpipeError: It failed; the message says what to do.
    """
    errors = errors or hub_errors()
    for attempt in range(RETRIES + 1):
        try:
            return request()
        except FileNotFoundError:
            raise
        except errors as error:
            wait = _wait_s(error, attempt)
            if wait is None or attempt == RETRIES or stopped.wait(wait):
                raise explained(where, error) from error
    raise AssertionError("the last attempt returns or raises")


def _wait_s(error: Exception, attempt: int) -> float | None:
    """Seconds to wait before a request is repeated; None if that is of no use."""
    status, headers = _answer(error)
    if status == 429:
        wait = _asked_wait_s(headers)
        return None if wait is not None and wait > MAX_WAIT_S else 2.0**attempt if wait is None else wait
    passes = _is_of_transport(error) if status is None else status >= 500
    return 0.5 * 2**attempt if passes else None


def _is_of_transport(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is that of a connection, not of the disk or of an answer."""
    while isinstance(error, RuntimeError):
        error = error.__cause__
    if isinstance(error, (*http_errors(), ConnectionError, TimeoutError)):
        return True
    return isinstance(error, storage_errors()) and not isinstance(error, OSError)  # of a library of an object store


def _asked_wait_s(headers: Any) -> int | None:
    """The seconds that a server asks to wait for, by `Retry-After` or by the Hub's `RateLimit` (``"api";r=0;t=55``)."""
    plain = re.fullmatch(r"\s*(\d{1,9})\s*", headers.get("Retry-After", ""))
    limit = re.search(r";\s*t\s*=\s*(\d{1,9})", headers.get("RateLimit", ""))
    found = plain or limit
    return int(found[1]) if found else None


def _answer(error: BaseException | None) -> tuple[int | None, Any]:
    """Status and headers of the answer that an error, or one of its causes, is about; None if there was no answer."""
    while error is not None:
        response: Any = getattr(error, "response", None)
        if getattr(response, "status_code", None) is not None:
            return int(response.status_code), response.headers
        if isinstance(status := getattr(error, "status", None), int):  # aiohttp, with which fsspec reads http
            return status, getattr(error, "headers", None) or {}
        error = error.__cause__
    return None, {}


def is_denied(error: ZpipeError) -> bool:
    """Whether a request failed because access is denied."""
    return isinstance(error.__cause__, PermissionError) or _answer(error.__cause__)[0] in (401, 403)


def explained(where: object, error: Exception) -> ZpipeError:
    """The one line that a user reads about an error of the Hub, or of another web server.

    Args:
        where: What the message calls what is read or written.
        error: What the library raised.
    """
    status, headers = _answer(error)
    code, is_hub = headers.get("X-Error-Code", ""), is_hub_address(str(where))
    if status is None and isinstance(error, OSError) and not _is_of_transport(error):
        said = f"can't be read ({_reason(error)}); {remedy_for(error)}, then run again to resume"
    elif status is None:
        said = f"{_reason(error)}; check the network and the address, then run again to resume"
    elif status in (401, 403) and not is_hub:
        said = f"access is denied ({status}); check the address, or ask its owner"
    elif status == 401:
        said = f"access is denied (401): it does not exist, is private, or is gated; check the address, and {_LOGIN}"
    elif status == 403 and code == "GatedRepo":
        said = f"access is gated (403); accept its terms on its page on the Hub, and {_LOGIN}"
    elif status == 403:
        said = "access is forbidden (403); set HF_TOKEN to a token that may do this, or ask its owner"
    elif status == 404:
        said = f"there is no such {'revision' if code == 'RevisionNotFound' else 'repository or file'} (404); check it"
    elif status == 429:
        wait = _asked_wait_s(headers)
        said = f"too many requests (429); wait {f'{wait} s' if wait else 'some minutes'}, then run again to resume"
    elif status >= 500:
        said = f"the server fails ({status}); wait some minutes, then run again to resume"
    else:
        said = f"the request was refused ({status}: {_reason(error)}); mend that, then run again to resume"
    return ZpipeError(f"{where}: {said}")


def _reason(error: Exception) -> str:
    """What the library says, in one line and without the token."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    said = getattr(error, "server_message", None) or first_line(error)
    said = " ".join(str(said).split())[:200]
    if _is_of_transport(error):
        said = f"can't be reached ({said})"
    return printable(without_token(said))


def without_token(text: str) -> str:
    """The text without the token that huggingface_hub has, if any: libraries quote headers that they refuse."""
    try:
        from huggingface_hub import get_token
    except ImportError:
        return text
    token = get_token()
    return text.replace(token, "...") if token else text
