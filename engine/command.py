"""A script's command line, and its end: every foreseeable failure is one line and an exit code."""

import argparse
import multiprocessing
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from engine import processes, signals
from engine.config import UserError
from engine.files import unlock_all

GO_ON = "the same command goes on from the last checkpoint"
LESS_MEMORY = "raise accumulate, lower crop or evaluation.tile, or set model.output_stride=16"


def command(main):
    """Run a script's main(). Of several processes, the first that fails writes a line on stderr.

    Exit codes: 2 for a UserError and for too little memory, 130 for SIGINT, 143 for SIGTERM, 1 in a
    process that loses another one.
    """
    handlers = signals.handle(signals.stop, signals.stop)
    try:
        processes.join()
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        # from a DataLoader worker it comes inside that worker's traceback, as its last line
        _end(2, str(error).strip().splitlines()[-1].removeprefix("engine.config.UserError: "))
    except signals.Stopped as stop:
        _end(128 + stop.args[0], f"stopped by {signal.Signals(*stop.args).name}; {GO_ON}")
    except torch.OutOfMemoryError:
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        _end(2, f"the GPU's {size / 2**30:.0f} GiB are not enough; {LESS_MEMORY}")
    except RuntimeError as error:
        is_loss = isinstance(error, dist.DistError) or "gloo" in str(error)
        if "can't allocate memory" in str(error):  # on a CPU
            _end(2, f"there is not enough memory; {LESS_MEMORY}")
        if not (is_loss and dist.is_initialized()):
            raise
        _end(1, f"another process of this job has died or cannot be reached; {GO_ON}")
    finally:
        unlock_all()
        for worker in multiprocessing.active_children():  # of a loader that ended before its data
            if hasattr(signal, "SIGCHLD"):  # of PyTorch, which reports killed workers; not Windows
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            worker.kill()
        signals.handle(*handlers)


def _end(code, reason):
    signals.ignore()  # torchrun stops the other processes as soon as one has ended
    if processes.is_first_to_end():
        print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
    sys.exit(code)


def arguments(doc, cfg="config.yaml"):
    """Return a parser for --cfg, by default `cfg`, and overrides. doc: the script's docstring."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    words = "configuration (default: %(default)s)"
    parser.add_argument("--cfg", default=cfg, metavar="FILE", help=words)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a value")
    return parser
