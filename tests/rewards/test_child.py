"""Scripts in processes of their own: answers, and what becomes of those that give none."""

from __future__ import annotations

import gc
import time
from threading import Thread

import pytest

from rewards._child import Child, EndedError, LateError, Pool

ECHO = """
import sys, time
print("ready", flush=True)
for line in sys.stdin:
    if line.startswith("sleep"):
        time.sleep(float(line.split()[1]))
    if line.startswith("end"):
        sys.exit(3)
    print(line.strip().upper(), flush=True)
"""


def start():
    child = Child(["-c", ECHO])
    child.await_ready()
    return child


@pytest.fixture
def pool():
    return Pool(start, 1)


def test_answers(pool):
    assert [pool.ask(question, 5) for question in (b"a\n", b"b\n")] == ["A", "B"]


def test_a_late_answer_is_not_taken_for_the_next(pool):
    with pytest.raises(LateError, match=r"timed out after 0\.2 s"):
        pool.ask(b"sleep 60\n", 0.2)
    assert pool.ask(b"a\n", 5) == "A"


def test_a_process_that_ends(pool):
    with pytest.raises(EndedError, match="ended with exit code 3"):
        pool.ask(b"end\n", 5)
    assert pool.ask(b"a\n", 5) == "A"


def test_a_question_for_a_process_that_has_ended():
    child = start()
    child.end()
    with pytest.raises(EndedError, match="exit code -9"):
        child.say(b"a\n")


def test_a_process_that_only_closes_its_output():
    child = Child(["-c", "import os, time; os.close(1); time.sleep(60)"])
    with pytest.raises(EndedError, match="exit code -9"):
        child.line(5)


def test_waiting_for_an_idle_child_is_not_in_the_limit(pool):
    found = []
    pool.ask(b"a\n", 5)
    threads = [Thread(target=lambda: found.append(pool.ask(b"sleep 0.3\n", 0.8))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["SLEEP 0.3"] * 4


def test_lines_until_the_end():
    child = Child(["-c", "print(1); print(2)"])
    start = time.monotonic()
    assert list(child.lines(30)) == ["1", "2"]
    assert time.monotonic() - start < 10


def test_lines_until_it_is_ended():
    child = Child(["-c", "import time; print(1, flush=True); time.sleep(60)"])
    assert list(child.lines(1)) == ["1"]
    assert child._process.poll() == -9


def test_a_child_ends_with_its_object():
    child = start()
    process = child._process
    del child
    gc.collect()
    assert process.poll() == -9


def test_one_that_does_not_start():
    with pytest.raises(RuntimeError, match="-c 1/0 does not start"):
        Child(["-c", "1/0"]).await_ready()
