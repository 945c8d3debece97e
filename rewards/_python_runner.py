"""Run as a script by ``python`` with workers: calls a user's function, question by question.

Questions are pickles: first where the function is, then the arguments of a call.  A line of JSON
goes out for each call, with its ``value`` and what it ``logged``, or its ``error``.  Imports
nothing of this project, whose libraries take their time.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from threading import Thread
from typing import IO, Any

MODULE = "rewards._python_runner"


def main() -> None:
    """Says ``ready`` once the function is imported."""
    sys.modules[MODULE] = sys.modules[__name__]  # what pickles call it
    questions, answers = _taken_streams()
    sys.path[:], name = pickle.load(questions)
    module, _, attribute = name.replace(":", ".").rpartition(".")
    function = getattr(importlib.import_module(module), attribute)
    print("ready", file=answers, flush=True)
    waiting: SimpleQueue[Any] = SimpleQueue()
    Thread(target=_listen, args=(questions, waiting), daemon=True).start()
    while True:
        print(_answer(function, waiting.get()), file=answers, flush=True)


def _taken_streams() -> tuple[IO[bytes], IO[str]]:
    """Where questions come from and answers go; whatever the function prints joins the errors."""
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.dup2(2, 1)
    return questions, answers


def _listen(questions: IO[bytes], waiting: SimpleQueue[Any]) -> None:
    """Ends the process with whoever asks, even in the middle of a call."""
    while True:
        try:
            waiting.put(pickle.load(questions))
        except EOFError:
            os._exit(0)
        except Exception as error:
            waiting.put(error)


def _answer(function: Callable[..., Any], question: Any) -> str:
    try:
        if isinstance(question, Exception):
            raise question
        args, kwargs = question
        value = function(*args, **kwargs)
        value = asyncio.run(_result(value)) if inspect.isawaitable(value) else value
        logged = [entry for recorder in recorders(kwargs) for entry in recorder.entries]
        return json.dumps({"value": value, "logged": logged}, default=_plain)
    except BaseException as error:  # sys.exit() too
        return json.dumps({"error": f"{type(error).__name__}: {error}"})


async def _result(coming: Any) -> Any:
    return await coming


def _plain(value: Any) -> Any:
    """Numbers of arrays and tensors; anything else by its name, of which no number comes."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def ignore(*args: Any, **kwargs: Any) -> None:
    """In place of TRL's ``log_extra``; here, since calls with it are pickled."""


class Recorder:
    """TRL's ``log_metric``: keeps what a function logs.  Pickled it is empty."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, float]] = []

    def __call__(self, name: str, value: float) -> None:
        """``TypeError`` or ``ValueError`` for a value that is not one number."""
        self.entries.append((str(name), float(value)))

    def __reduce__(self) -> tuple[type[Recorder], tuple[()]]:
        return Recorder, ()


def recorders(kwargs: Mapping[str, Any]) -> list[Recorder]:
    """Those among the arguments of a call."""
    return [value for value in kwargs.values() if isinstance(value, Recorder)]


if __name__ == "__main__":
    main()
