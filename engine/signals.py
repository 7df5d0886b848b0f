"""SIGINT and SIGTERM: raised as Stopped at once, but in a training loop only after the step."""

import signal


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived; its only argument is the signal's number."""


def stop(number, _):
    """Handle a signal: raise Stopped."""
    raise Stopped(number)


def handle(on_sigint, on_sigterm):
    """Set the handlers of both signals and return the previous two."""
    return signal.signal(signal.SIGINT, on_sigint), signal.signal(signal.SIGTERM, on_sigterm)


def ignore():
    """Ignore both signals: in a worker, whose parent answers them, or once a process is ending."""
    handle(signal.SIG_IGN, signal.SIG_IGN)
