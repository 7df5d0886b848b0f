"""A script's command line and its end: foreseeable failures are one line and an exit code."""

import argparse
import multiprocessing
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from engine import files, processes
from engine.config import UserError

LESS_MEMORY = "raise accumulate, lower crop or val.size, or set model.output_stride=16"
# what PyTorch says where the input is to blame -> the line for it
PYTORCH = {
    "MemoryError": f"there is not enough memory; {LESS_MEMORY}",
    "can't allocate memory": f"there is not enough memory; {LESS_MEMORY}",
    "more than 1 value per channel": "this network's batch norm needs 2 images; raise batch",
}


def command(main):
    """Run a script's main(); exit codes: 2 for invalid input and a lack of memory or disk.

    engine.loop has 130 for SIGINT and 143 for SIGTERM. A fault of the code is a traceback.
    """
    try:
        processes.join()
        main()
    except UserError as error:  # a DataLoader worker's holds its traceback, the message at its end
        sys.exit(tell(str(error).rpartition("UserError: ")[2], 2))
    except torch.OutOfMemoryError:
        sys.exit(tell(f"the GPU's memory is not enough; {LESS_MEMORY}", 2))
    except OSError as error:
        sys.exit(tell(f"{error.filename or 'disk'}: {files.reason(error)}", 2))
    except (MemoryError, RuntimeError, ValueError) as error:
        for words, remedy in PYTORCH.items():
            if words in f"{type(error).__name__}: {error}":
                sys.exit(tell(remedy, 2))
        raise
    finally:
        for worker in multiprocessing.active_children():  # a loader's ignores Python's SIGTERM
            worker.kill()
        files.unlock_all()
        if dist.is_initialized():
            dist.destroy_process_group()


def tell(error, code):
    """Write an error on stderr as one line; return the exit code."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose --help shows the text as it is written."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message}; see --help")

    def parse_intermixed_args(self):
        """Return the arguments, once the file of --import, which registers networks, has run."""
        args = super().parse_intermixed_args()
        if getattr(args, "imported", None):
            runpy.run_path(args.imported)
        return args


def arguments(doc, cfg="config.yaml"):
    """Return a parser for --cfg, by default `cfg`, and overrides. doc: the script's docstring."""
    parser = Parser(doc)
    words = "run this Python file first, which registers a network"
    parser.add_argument("--import", dest="imported", metavar="FILE", help=words)
    words = "configuration (default: %(default)s)"
    parser.add_argument("--cfg", default=cfg, metavar="FILE", help=words)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a value")
    return parser
