"""SIGINT and SIGTERM: raised as Stopped at once, but in a training loop only after the step."""

import contextlib
import signal

from engine.processes import world

NUMBERS = (signal.SIGINT, signal.SIGTERM)
_state = {"in_loop": False, "received": 0}


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived; its only argument is the signal's number."""


def received():
    """Return the number of the signal that arrived in the loop, 0 for none."""
    return _state["received"]


def _handle(number, _):
    # A second signal comes from an impatient user; in a job of several processes, though, from
    # torchrun or a scheduler for the same reason as the first.
    impatient = _state["received"] and world() == 1
    if impatient or not _state["in_loop"]:
        raise Stopped(number)
    _state["received"] = number


@contextlib.contextmanager
def handled():
    """Context manager: SIGINT and SIGTERM raise Stopped, or are noted during a loop's steps."""
    previous = {number: signal.signal(number, _handle) for number in NUMBERS}
    try:
        yield
    finally:
        _state.update(in_loop=False, received=0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def noted_until_the_step_ends(is_noted):
    """Note signals (see `received`) instead of raising Stopped, from now on or no longer."""
    _state["in_loop"] = is_noted


def ignore():
    """Ignore both signals: in a worker, whose parent answers them, or once a process is ending."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)
