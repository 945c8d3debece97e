"""Scripts in processes of their own: what hangs or crashes there costs one answer, not the run.

The one mechanism of every reward that calls code which may not return.  A script gets questions
from its standard input; each line of its standard output is an answer.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import IO, Any

READY = "ready"
"""What a script says once it can be asked."""

START_SECONDS = 60.0
"""For loading what a script needs."""

GRACE_SECONDS = 1.0
"""For reading what was said before a process was ended."""


class LateError(TimeoutError):
    """No answer in time."""


class EndedError(RuntimeError):
    """The process ended in place of an answer."""


class Child:
    """A Python process that runs a script, ended at the latest with this object."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        quiet: bool = True,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """``arguments`` of Python.  ``quiet``: nobody sees its errors.  ``cwd`` and ``env``: its
        folder and all of its environment; ``None``: those of this process.
        """
        self._command = [sys.executable, *arguments]
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            start_new_session=True,
            cwd=cwd,
            env=env,
        )
        assert self._process.stdout is not None
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        Thread(target=_listen, args=(self._process.stdout, self._lines), daemon=True).start()
        self.end: Callable[[], Any] = weakref.finalize(self, _end, self._process)

    def say(self, message: bytes, *, last: bool = False) -> None:
        """Write to its input, which ``last`` closes; ``EndedError`` if nothing reads it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(message)
            self._process.stdin.close() if last else self._process.stdin.flush()
        except (OSError, ValueError) as error:  # ValueError: ended by us
            raise self._ended() from error

    def line(self, limit_s: float) -> str:
        """The next line; ``LateError`` after ``limit_s``, ``EndedError`` if there is none."""
        try:
            line = self._lines.get(timeout=limit_s)
        except Empty:
            raise LateError(f"timed out after {limit_s:g} s") from None
        if line is None:
            raise self._ended()
        return line

    def lines(self, limit_s: float) -> Iterator[str]:
        """All lines, until the process ends or is ended after ``limit_s``."""
        deadline = time.monotonic() + limit_s
        try:
            while True:
                yield self.line(max(0.0, deadline - time.monotonic()))
        except EndedError:
            return
        except LateError:
            self.end()
        with suppress(LateError, EndedError):
            while True:  # what left the session may still write: nobody waits for its end
                yield self.line(max(0.0, deadline + GRACE_SECONDS - time.monotonic()))

    def await_ready(self) -> None:
        """``RuntimeError`` unless it says ``READY``; it has ended then."""
        with suppress(LateError, EndedError):
            if self.line(START_SECONDS) == READY:
                return
        self.end()
        raise RuntimeError(f"{' '.join(self._command)} does not start")

    def _ended(self) -> EndedError:
        self.end()  # it may have closed its output alone; the exit code of an ended one stays
        return EndedError(f"the process ended with exit code {self._process.returncode}")


class Pool:
    """Children that answer one question at a time each.

    A child is started when one is first needed, and again after one was late or ended.
    """

    def __init__(self, start: Callable[[], Child], count: int) -> None:
        self._start = start
        self._idle: SimpleQueue[Child | None] = SimpleQueue()
        for _ in range(count):
            self._idle.put(None)

    def ask(self, question: bytes, limit_s: float) -> str:
        """The answer; waiting for a child that is idle, and for its start, is not in the limit.

        ``LateError`` or ``EndedError`` without an answer, ``RuntimeError`` if no child starts.
        """
        child, answered = self._idle.get(), False
        try:
            if child is None:
                child = self._start()
            child.say(question)
            answer = child.line(limit_s)
            answered = True
        finally:
            if child is not None and not answered:
                child.end()
            self._idle.put(child if answered else None)
        return answer


def _listen(stream: IO[bytes], lines: SimpleQueue[str | None]) -> None:
    """Lines into the queue, ``None`` at their end."""
    with stream:
        for line in stream:
            lines.put(line.decode(errors="replace").rstrip("\n"))
    lines.put(None)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started, unless that left its session."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    if process.stdin is not None:
        with suppress(OSError):  # a question that it never read
            process.stdin.close()
