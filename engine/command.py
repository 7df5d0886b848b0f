"""A script's command line, and its end: every foreseeable failure is one line and an exit code."""

import argparse
import contextlib
import faulthandler
import multiprocessing
import os
import re
import sys
import threading
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from engine import files, processes, signals
from engine.config import UserError
from engine.signals import GO_ON

LESS_MEMORY = "raise accumulate, lower crop or evaluation.tile, or set model.output_stride=16"
LOST_WORKER = re.compile(r"DataLoader worker \(pid|process pool|shared memory|/multiprocessing/")
EXPECTED = OSError, EOFError, RuntimeError, UserError


def command(main):
    """Run a script's main(). Of several processes, the first that fails writes a line on stderr.

    Exit codes: 2 for invalid input and for what is lacking (disk, memory, a worker), 130 for
    SIGINT, 143 for SIGTERM, 1 in a process that loses another one, and for a fault of the code.
    """
    is_script = sys.stderr is not None and sys.stderr is sys.__stderr__
    if is_script and not sys.flags.dev_mode:
        _silence_libraries()
    home = os.path.expanduser("~")  # noqa: PTH111  # a shell leaves the ~ of key=~/data as it is
    sys.argv[1:] = [re.sub(r"(^|(?<==))~(?=/)", lambda _: home, arg) for arg in sys.argv[1:]]
    handlers = signals.handle(signals.stop, signals.stop)
    try:
        processes.join()
        if sys.stdout is not None:
            sys.stdout.reconfigure(errors="backslashreplace")  # for names that it cannot encode
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        print(end="", flush=True)
    except (Exception, signals.Stopped) as error:
        signals.ignore()  # torchrun stops the other processes as soon as one has ended
        code, reason = _explain(error)
        if code is None:
            raise
        if processes.is_first_to_end():
            reason = "".join(c if c.isprintable() else repr(c)[1:-1] for c in reason)
            with contextlib.suppress(OSError):
                print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
        sys.exit(code)
    finally:
        signals.ignore()
        with contextlib.suppress(OSError):  # it must not replace the error above
            files.unlock_all()
        for worker in multiprocessing.active_children():  # of a loader that ended before its data
            worker.kill()
        if _stdout_fails():  # Python would fail once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not is_script:
            signals.handle(*handlers)


def _silence_libraries():
    """Leave stderr to the code: what a library writes there is raised too, or of no use."""
    options = {"buffering": 1, "errors": "backslashreplace"}
    sys.stderr = open(os.dup(2), "w", **options)  # noqa: PTH123, SIM115
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # of libpng, OpenCV, FFmpeg and C++
    faulthandler.enable(sys.stderr)  # a crash in one of them says where
    warnings.simplefilter("ignore")
    threading.excepthook = lambda _: None  # TensorBoard raises its thread's error again in main()
    sys.unraisablehook = _unraisable


def _unraisable(hook):
    if isinstance(hook.exc_value, signals.Stopped):  # in __del__, where nothing is raised
        signals.leave(*hook.exc_value.args, None)


def _explain(error):
    """Return the exit code and the line for what ended main(); None, None for a fault of the code.

    An error that a signal or a lost worker led to is theirs.
    """
    first, text, whole = error, str(error).strip(), "".join(traceback.format_exception(error))
    while not isinstance(first, signals.Stopped) and (first.__cause__ or first.__context__):
        first = first.__cause__ or first.__context__
    if isinstance(first, signals.Stopped):
        return 128 + first.args[0], str(first)
    if LOST_WORKER.search(whole) and isinstance(error, EXPECTED):
        fault = "a loader's process was killed, by a lack of memory or of shared memory (/dev/shm)"
        return 2, f"workers: {fault}; set workers=0, or give Docker a larger --shm-size; {GO_ON}"
    if isinstance(error, UserError):  # of a loader: inside its worker's traceback, at its end
        return 2, text.rpartition("engine.config.UserError: ")[2]
    if isinstance(error, torch.OutOfMemoryError):
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return 2, f"the GPU's {size / 2**30:.0f} GiB are not enough; {LESS_MEMORY}"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:  # on a CPU
        return 2, f"there is not enough memory; {LESS_MEMORY}"
    if isinstance(error, OSError) and error.args:
        place = error.filename or ("stdout" if _stdout_fails() else next(iter(files.locks), "disk"))
        return 2, f"{place}: {files.reason(error)}"
    is_loss = isinstance(error, dist.DistError) or "gloo" in text
    if isinstance(error, RuntimeError) and is_loss and dist.is_initialized():
        return 1, f"another process of this job has died or cannot be reached; {GO_ON}"
    return None, None


def _stdout_fails():
    """Return whether the reader of stdout is gone, as after `| head`, or its disk is full."""
    try:
        print(end="", flush=True)
    except OSError:
        return True
    return False


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line too."""

    def error(self, message):
        raise UserError(f"{message}; see --help")


def arguments(doc, cfg="config.yaml"):
    """Return a parser for --cfg, by default `cfg`, and overrides. doc: the script's docstring."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=doc, formatter_class=raw)
    words = "configuration (default: %(default)s)"
    parser.add_argument("--cfg", default=cfg, metavar="FILE", help=words)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a value")
    return parser
