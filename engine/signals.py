"""SIGINT and SIGTERM: raised as Stopped at once, but in a training loop only after the step.

During imports, and when one is repeated, they end the process at once.
"""

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

GO_ON = "the same command goes on from the last checkpoint"
ROOT = Path(__file__).parent.parent
_owner = None  # the process that answers: a worker has its handlers too, until it ignores both


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived; its only argument is the signal's number."""

    def __str__(self):
        return f"stopped by {signal.Signals(*self.args).name}; {GO_ON}"


def stop(number, _):
    """Handle a signal: raise Stopped."""
    if os.getpid() == _owner:
        # torchrun repeats a signal; so does an impatient user
        handle(*[signal.SIG_IGN if "RANK" in os.environ else leave] * 2)
        raise Stopped(number)


def leave(number, _):
    """Handle a signal: end the process and its workers, with a line on stderr."""
    if os.getpid() == _owner:
        for worker in multiprocessing.active_children():
            worker.kill()
        if sys.stderr and os.environ.get("RANK", "0") == "0":  # print may be at work
            name = Path(sys.argv[0]).name
            os.write(sys.stderr.fileno(), f"{name}: {Stopped(number)}\n".encode())
        os._exit(128 + number)


def handle(on_sigint, on_sigterm):
    """Set the handlers of both signals and return the previous two."""
    global _owner
    _owner = os.getpid()
    return signal.signal(signal.SIGINT, on_sigint), signal.signal(signal.SIGTERM, on_sigterm)


def ignore():
    """Ignore both signals: in a worker, whose parent answers them, or once a process is ending."""
    if hasattr(signal, "SIGCHLD"):  # with it, torch raises an error for each worker that is lost
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    handle(signal.SIG_IGN, signal.SIG_IGN)


def end_with_parent():
    """End this worker as soon as its parent has ended, even where that one was killed.

    torch's watchdog notes the parent that it finds when it starts: a worker whose parent was killed
    before that would wait for ever.
    """

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if Path(sys.argv[0]).resolve().parent in (ROOT, ROOT / "tools"):  # a script of ours, not a test
    handle(leave, leave)
