"""SIGINT and SIGTERM: raised as Stopped at once, but in a training loop only after the step.

While a script is still importing, and once Stopped is on its way, they end the process at once.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
GO_ON = "the same command goes on from the last checkpoint"
_owner = None  # the process that answers; a worker that was just forked has its handlers too


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived; its only argument is the signal's number."""


def reason(number):
    """Return what a signal's end of a command is called, without the command's name."""
    return f"stopped by {signal.Signals(number).name}; {GO_ON}"


def stop(number, _):
    """Handle a signal: raise Stopped."""
    if os.getpid() == _owner:
        # torchrun sends a signal of its own to each process; a user who repeats one is impatient
        alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
        handle(*[leave if alone else signal.SIG_IGN] * 2)
        raise Stopped(number)


def leave(number, _):
    """Handle a signal: end the process, with a line on stderr."""
    if os.getpid() == _owner:
        for child in multiprocessing.active_children():
            child.kill()
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(Exception):  # without print: it may be at work
                line = f"{Path(sys.argv[0]).name}: {reason(number)}\n"
                os.write(sys.stderr.fileno(), line.encode())
        os._exit(128 + number)


def handle(on_sigint, on_sigterm):
    """Set the handlers of both signals and return the previous two."""
    global _owner
    _owner = os.getpid()
    return signal.signal(signal.SIGINT, on_sigint), signal.signal(signal.SIGTERM, on_sigterm)


def ignore():
    """Ignore both signals: in a worker, whose parent answers them, or once a process is ending."""
    handle(signal.SIG_IGN, signal.SIG_IGN)


if Path(sys.argv[0]).resolve().parent in (ROOT, ROOT / "tools"):  # a script of ours, no test
    handle(leave, leave)
