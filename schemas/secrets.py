"""Credentials in the text of paths, URLs and settings: one function recognises them, one leaves them out.

What the user gives is written into manifests, settings and messages, so credentials in it are refused. They belong into
the environment or into the configuration files of each store's library.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

from zpipe.schemas.errors import UsageError

# Those whose ordinary URLs have a container (container@account.dfs.core.windows.net) or a user name before an @.
AT_PROTOCOLS = ("az", "abfs", "abfss", "hdfs")

# A URL, also after `KEY=`, in a chain (`zip::https://...`), or after pathlib has merged its slashes.
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):(?P<slashes>[/\\]+)(?P<rest>.*)", re.DOTALL)
# `//user:password@host` and `user:password@host`, as programs such as scp and mount take them.
_NO_SCHEME = re.compile(r"(?:^|=)(?:[A-Za-z0-9+.-]+:)?(?:[/\\]{2})?[^/\\\s:@=,]+:[^/\\\s:@]+@[^/\\\s@]+")
# NAME=VALUE of connection strings, query strings and credential files.
_NAMED = re.compile(
    r"(?P<name>(?<![A-Za-z0-9])(?:[A-Za-z0-9]+[_-])*"
    r"(?:account_?key|access_?key(?:_?id)?|shared_?access_?(?:key|signature)|api_?key|client_?secret|secret(?:_?key)?"
    r"|pass(?:word|wd|phrase)|pwd|(?:access|auth|refresh|session|security|sas|id)_?token|signature|sig|credential)"
    r"|(?<![A-Za-z0-9_.-])(?:token|authorization))\s*[=:]\s*(?P<value>[^\s;&,\"'}]+)",
    re.IGNORECASE,
)
# What stands before a colon in names that zpipe takes: `hf-hub:org/model@revision` has no password.
_PREFIXES = (
    *("timm", "hf-hub", "hf_hub", "local-dir", "class"),
    *("cifar10", "flowers102", "imagenet", "parquet", "voc", "coco"),  # the sources of `make-shards`
)


def holds_secret(text: str) -> bool:
    """Whether a text carries what may be a credential.

    These are a user name or password before an @, a query or a fragment of a URL, where signatures and tokens stand,
    and values with names such as AccountKey; percent-encoded too.

    Args:
        text: A path, a URL, or a setting that may contain one.
    """
    for form in _decoded(text):
        if _NAMED.search(form) or _has_password_without_scheme(form):
            return True
        at = 0
        while found := _URL.search(form, at):
            if _is_secret_url(found["scheme"].lower(), found["slashes"], found["rest"]):
                return True
            at = found.start("rest")
    return False


def redacted(text: str) -> str:
    """The text without credentials: of a URL that has some, only the scheme is left.

    Args:
        text: Any text, such as a message that quotes a URL.
    """
    words = re.split(r"(\s+)", text)
    return "".join(_redacted_word(word) if holds_secret(word) else word for word in words)


def refuse_secret(text: str) -> None:
    """Check that a text carries no credentials.

    Raises:
        UsageError: It carries some, which the message leaves out.
    """
    if holds_secret(text):
        raise UsageError(
            f"{_redacted_word(text)}: the URL carries credentials or a query, which would be written down; leave them "
            "out, and give them by the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3)"
        )


def _decoded(text: str) -> list[str]:
    forms = [text]
    for _ in range(3):
        text = unquote(text)
        if text == forms[-1]:
            break
        forms.append(text)
    return forms


def _is_secret_url(scheme: str, slashes: str, rest: str) -> bool:
    host = re.split(r"[/\\?#]", rest, maxsplit=1)[0]
    user, at, _ = host.rpartition("@")
    if len(slashes) < 2:  # `cifar10:/home/me@work/x` is a path; pathlib makes a single slash of the two of a URL
        return (at and ":" in user) or (
            scheme in ("http", "https", "s3", "gs", "ftp") and bool(re.search("[@?]", rest))
        )
    if at and (scheme not in AT_PROTOCOLS or ":" in user):
        return True
    # A password may contain what ends a host.
    port = re.sub(r"^\[[^\]]*\]", "", host).partition(":")[2]
    if "@" in rest and port and not port.isdecimal():
        return True
    return scheme not in ("file", "local") and re.search(r"[?#]|;[^/]*=", rest) is not None


def _has_password_without_scheme(text: str) -> bool:
    found = _NO_SCHEME.search(text)
    return found is not None and not text.startswith(tuple(f"{prefix}:" for prefix in _PREFIXES))


def _redacted_word(word: str) -> str:
    """What stands before the credentials, if that can be told, and `...`."""
    name, equals, value = word.partition("=")
    if equals and re.fullmatch(r"-{0,2}[A-Za-z][\w.-]*", name):
        return f"{name}={_redacted_word(value) if holds_secret(value) and not _NAMED.match(word) else '...'}"
    found = re.match(r"[^A-Za-z0-9]{0,3}(?:[A-Za-z][A-Za-z0-9+.-]{0,15}:{1,2})*[/\\]{1,2}", word)
    return f"{found[0] if found else ''}..."
