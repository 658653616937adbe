"""What the key of a sample may be, and how names of strangers are shown.

Keys, class names and the texts in other people's files reach terminals, web pages, CSV files and file names. A line
break or an escape sequence in one would there be more than a name.
"""

from __future__ import annotations

import re

from zpipe.schemas.errors import ZpipeError

MAX_KEY_BYTES = 240  # a file name has at most 255, and a key gets a suffix

# Control characters, line and paragraph separators, marks that reorder or hide text, and halves of surrogate pairs.
# Joiners (U+200C, U+200D) are left: words and emoji need them.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)


def printable(text: object) -> str:
    """The text with characters that a terminal would obey, or not show, as Python's escapes: one line."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), str(text))


def check_key(key: str, where: str, remedy: str = "rename it") -> None:
    """Check a key: 1 to 240 bytes of UTF-8 without control characters, line separators, or invisible characters.

    Args:
        key: The key.
        where: File that it comes from, for messages.
        remedy: What to do about another one.

    Raises:
        ZpipeError: The key breaks the rule; the message shows it escaped.
    """
    odd = _UNPRINTABLE.search(key)
    if odd is None and 0 < len(key.encode()) <= MAX_KEY_BYTES:
        return
    if odd is not None:
        code = ord(odd[0])
        # Python reads bytes that are not UTF-8 as U+DC80 to U+DCFF.
        reason = "is not UTF-8" if 0xD800 <= code <= 0xDFFF else f"holds the unprintable character U+{code:04X}"
    else:
        reason = f"has {len(key.encode())} bytes, a key has 1 to {MAX_KEY_BYTES}"
    shown = printable(key)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    raise ZpipeError(f"{where}: key '{shown}': its name {reason}; {remedy}")
