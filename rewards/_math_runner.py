"""Run as a script by ``math_verify``, never imported: compares expressions, line by line.

A question comes as a line of JSON, and ``1``, ``0`` or ``null`` (the right answer cannot be parsed)
goes out.  A question that takes too long ends this process.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
from contextlib import suppress
from typing import Any

MEMORY = 4 * 2**30


def main() -> None:
    """Says ``ready`` once the package is loaded."""
    sys.path.pop(0)  # this folder, whose math_verify is another
    import math_verify

    logging.disable(logging.ERROR)  # its own limits are off, which it warns of
    _limit_memory()
    print("ready", flush=True)
    for line in sys.stdin:
        _alarm(json.loads(line)["limit_s"])
        print(json.dumps(_verdict(math_verify, **json.loads(line))), flush=True)
        _alarm(0)


def _limit_memory() -> None:
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _alarm(seconds: float) -> None:
    """Without a handler it ends the process, whatever that is doing; 0 calls it off."""
    if hasattr(signal, "alarm"):
        signal.alarm(math.ceil(seconds + 1) if seconds else 0)


def _verdict(package: Any, right: str, found: str, digits: int, limit_s: float) -> int | None:
    expected = package.parse(right, parsing_timeout=None)
    if not expected:
        return None
    answer = package.parse(found, parsing_timeout=None)
    return int(package.verify(expected, answer, float_rounding=digits, timeout_seconds=None))


if __name__ == "__main__":
    main()
