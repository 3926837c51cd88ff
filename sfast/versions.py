"""Which torch releases sfast works with, and a clear word for the others.

The trace front end uses torch internals, so an old torch would fail deep inside with a riddle: it is refused by name
before anything is touched. A torch newer than the newest one tested is allowed, and says so once.
"""

import logging
import re

import torch

OLDEST = (2, 10)
NEWEST_TESTED = (2, 13)

logger = logging.getLogger("sfast")
_said: set[str] = set()


def release(version: str) -> tuple[int, int]:
    """Major and minor of a torch version string: "2.13.0+cpu" -> (2, 13), "2.14.0a0+git1f2e" -> (2, 14)."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise ValueError(f"a torch version starts with two numbers, got {version!r}")
    return int(match[1]), int(match[2])


def refusal(version: str) -> str | None:
    """Why this torch version cannot be used, with the command that helps; None if it can."""
    if release(version) >= OLDEST:
        return None
    oldest = ".".join(map(str, OLDEST))
    return f"sfast needs torch {oldest} or later, found {version}; run: pip install --upgrade 'torch>={oldest}'"


def caution(version: str) -> str | None:
    """What to know about a torch version newer than those tested; None for the tested ones."""
    if release(version) <= NEWEST_TESTED:
        return None
    newest = ".".join(map(str, NEWEST_TESTED))
    return f"sfast was tested with torch up to {newest}, found {version}; if something breaks, take {newest}"


def check_torch(version: str = torch.__version__) -> None:
    """Raises RuntimeError for a torch that is too old; logs one warning for one newer than those tested."""
    word = refusal(version)
    if word is not None:
        raise RuntimeError(word)
    word = caution(version)
    if word is not None and word not in _said:
        _said.add(word)
        logger.warning(word)
