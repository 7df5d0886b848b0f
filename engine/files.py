"""Files that are written completely or not at all, and checkpoints that cannot execute code."""

import os
from pathlib import Path

import cv2
import torch

from engine.config import UserError


def write_atomically(path, write):
    """Call write(temporary path), then rename the result to `path`.

    Readers see the old file or the complete new one. Raises UserError where writing fails.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError, cv2.error) as error:  # torch.save: RuntimeError on a full disk
        reason = getattr(error, "strerror", None) or error
        remedy = "free some disk space, then run the same command again"
        raise UserError(f"{path}: cannot be written ({reason}); {remedy}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a UTF-8 text file atomically. Raises UserError."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def load_tensors(path):
    """Return the state dict in a file written by torch.save, on the CPU.

    Nothing in the file is executed. Raises UserError for any other file.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file of weights") from error
    except Exception as error:  # a dozen types, depending on what the file is instead
        reason = " ".join(str(error).split())[:120]
        message = f"{path}: not a file of tensors that is safe to load ({reason})"
        raise UserError(message) from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a state dict")
    return state


def find(path, cfg):
    """Return `path` if it exists, else the file of this name in the run's folder.

    Raises UserError where neither exists.
    """
    inside = Path(cfg.output) / cfg.name / path
    if not Path(path).exists() and not inside.exists():
        raise UserError(f"{path}: there is no such file, nor {inside}")
    return Path(path) if Path(path).exists() else inside
