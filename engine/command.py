"""A script's command line, and its end: every foreseeable failure is one line and an exit code."""

import argparse
import multiprocessing
import signal
import sys
from pathlib import Path

import torch

from engine import processes, signals
from engine.config import UserError
from engine.folder import unlock_all
from engine.signals import Stopped

GO_ON = "the same command goes on from the last checkpoint"
LESS_MEMORY = (
    "raise accumulate, lower crop (in evaluate.py: evaluation.tile) or set model.output_stride=16; "
    "the last checkpoint is kept"
)


def command(main):
    """Run a script's main().

    Exit codes: 2 for a UserError and for too little memory, 130 for SIGINT, 143 for SIGTERM, 1 in a
    process that loses another one. Each comes with one line on stderr; of several processes, only
    the first that ends writes it.
    """
    with signals.handled():
        try:
            processes.join()
            main()
            processes.leave()
        except UserError as error:
            # from a DataLoader worker it comes inside that worker's traceback, as its last line
            _end(2, str(error).strip().splitlines()[-1].removeprefix("engine.config.UserError: "))
        except Stopped as stop:
            number = stop.args[0]
            _end(128 + number, f"stopped by {signal.Signals(number).name}; {GO_ON}")
        except torch.OutOfMemoryError:
            size = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            _end(2, f"the GPU's {size / 2**30:.0f} GiB are not enough; {LESS_MEMORY}")
        except RuntimeError as error:
            if "can't allocate memory" in str(error):  # on a CPU
                _end(2, f"there is not enough memory; {LESS_MEMORY}")
            if not processes.is_loss_of_another(error):
                raise
            _end(1, f"another process of this job has died or cannot be reached; {GO_ON}")
        finally:
            unlock_all()
            _kill_workers()


def _end(code, reason):
    signals.ignore()  # torchrun stops the other processes as soon as one has ended
    if processes.is_first_to_end():
        print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
    sys.exit(code)


def _kill_workers():
    """Kill the DataLoader workers of a stage that ended before its data did."""
    if workers := multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in workers:
            worker.kill()


def arguments(doc, cfg="config.yaml"):
    """Return a parser with the arguments of every script: --cfg and overrides.

    doc: the script's docstring; cfg: the default of --cfg.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    parser.add_argument(
        "--cfg", default=cfg, metavar="FILE", help="configuration (default: %(default)s)"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="replaces a value of the configuration",
    )
    return parser
