"""A script's command line and its end: foreseeable failures are one line and an exit code."""

import argparse
import runpy
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from engine import files, processes
from engine.config import UserError

LESS_MEMORY = "raise accumulate, lower crop or val.size, or set model.output_stride=16"
ONE_IMAGE = "this network's batch norm takes no batch of one image"
# what PyTorch says where the input is to blame -> the line for it
PYTORCH = {
    "MemoryError": f"there is not enough memory; {LESS_MEMORY}",
    "can't allocate memory": f"there is not enough memory; {LESS_MEMORY}",
    "more than 1 value per channel": f"{ONE_IMAGE}; raise warmup.batch and selftrain.batch",
}


def command(main):
    """Run a script's main(); end the process with an exit code unless it succeeds.

    Exit codes: 2 for invalid input and for a lack of memory or disk, 130 for SIGINT and 143 for
    SIGTERM (see engine.loop). A fault of the code is a traceback.
    """
    try:
        processes.join()
        main_without_frames(main)
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
        files.unlock_all()
        if dist.is_initialized():
            dist.destroy_process_group()


def main_without_frames(main):
    """Call main(); clear the frames of what it raises: they hold the DataLoaders' workers.

    Python would end these by SIGTERM, which they ignore, and wait for them for ever.
    """
    try:
        main()
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


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


def run_file(path):
    """Run a Python file, which may register networks (models.register); return its path."""
    try:
        runpy.run_path(path)
    except FileNotFoundError as error:
        raise UserError(f"--import {path}: there is no such file") from error
    return path


def arguments(doc, cfg="config.yaml"):
    """Return a parser for --cfg, by default `cfg`, and overrides. doc: the script's docstring."""
    parser = Parser(doc)
    words = "run this Python file first, which registers a network"
    parser.add_argument("--import", dest="imported", metavar="FILE", type=run_file, help=words)
    words = "configuration (default: %(default)s)"
    parser.add_argument("--cfg", default=cfg, metavar="FILE", help=words)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a value")
    return parser
