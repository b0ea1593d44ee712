"""Runs work that leaves its process unusable in a fork, which has all of the caller's objects but does not change them."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def isolated(work: Callable[[], T]) -> T:
    """The result of `work`, which runs in a separate process; it must be picklable. What is printed there goes to stderr.

    Raises what `work` raises, and RuntimeError if the process dies.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(2, 1)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(_answer(work))
        sys.stderr.flush()
        os._exit(0)  # skips destructors: of threads, and of tensors on a device that is not present
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not answer:
        raise RuntimeError(f"te_dynamo.estimate: its process ended with {os.waitstatus_to_exitcode(status)} before it had a result")
    result, error = pickle.loads(answer)
    if error is not None:
        raise error
    made: T = result
    return made


def _answer(work: Callable[[], T]) -> bytes:
    try:
        return pickle.dumps((work(), None))
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
        try:
            pickle.loads(answer := pickle.dumps((None, error)))
        except Exception:  # an exception that cannot be pickled
            answer = pickle.dumps((None, RuntimeError(f"te_dynamo.estimate: {said}")))
        if not isinstance(error, (ValueError, TypeError)):
            traceback.print_exc()
        return answer
