"""Files of a run: written atomically, loaded safely; checkpoints; the lock on its folder."""

import contextlib
import os
import platform
from pathlib import Path

import cv2
import filelock
import torch

from engine.config import UserError, one_line, plain

# keys that may differ between a checkpoint and the command that goes on with it
FREE_KEYS = {
    "name", "output", "stages", "device", "compile", "workers", "accumulate", "val", "evaluation",
    "log_every", "pictures_every", "save_every", "val_every",
}  # fmt: skip
_locks = {}  # folder -> the lock that this process holds on it


def write_atomically(path, write):
    """Write a file wholly or not at all: write(temporary path), then rename. Raises UserError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("r+b") as file:  # Windows synchronises no file that is read only
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError, cv2.error) as error:  # torch.save: RuntimeError on a full disk
        fault = f"cannot be written ({getattr(error, 'strerror', None) or error})"
        raise UserError(f"{path}: {fault}; free disk space and run the command again") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a UTF-8 text file atomically. Raises UserError."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def load_tensors(path):
    """Return the state dict in a file, on the CPU; no code in it is executed. Raises UserError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file of weights") from error
    except Exception as error:  # a dozen types, depending on what the file is instead
        raise UserError(
            f"{path}: not a file of tensors that is safe to load ({one_line(error)})"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a state dict")
    return state


def find(path, cfg):
    """Return `path`, or else the file of this name in the run's folder. Raises UserError."""
    for found in (Path(path), Path(cfg.output) / cfg.name / path):
        if found.exists():
            return found
    raise UserError(f"{path}: there is no such file, nor {found}")


def require_same(path, cfg, section, inputs):
    """Raise UserError unless a checkpoint was made with this configuration and these inputs.

    inputs: file name -> digest. Of the stages' sections (with `steps`), only `section` counts.
    """
    saved, changes = load_tensors(path), []
    config, digests = saved.get("config", {}), saved.get("inputs", {})
    for key, value in plain(cfg).items():
        of_another_stage = isinstance(value, dict) and "steps" in value and key != section
        if key not in FREE_KEYS and not of_another_stage and config.get(key) != value:
            changes.append(f"another {key}: {config.get(key)} instead of {value}")
    others = [name for name, digest in inputs.items() if digests.get(name) != digest]
    changes += [f"another {name} than the one that is there now" for name in others]
    if changes:
        raise UserError(f"{path}: was made with {changes[0]}; give --force or another name=...")


def lock(folder, stage):
    """Create a run's folder and lock it until unlock_all. Raises UserError if it is locked."""
    if folder in _locks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ".lock"
    try:
        _locks[folder] = filelock.FileLock(file).acquire(blocking=False).lock
    except filelock.Timeout as error:
        owner = (os.name != "nt" and file.read_text(encoding="utf-8")) or "another process"
        raise UserError(f"{folder}: {owner} is at work here; wait, or set name=...") from error
    if os.name != "nt":  # Windows refuses every other handle on a locked file
        file.write_text(f"process {os.getpid()} on {platform.node()} ({stage})", encoding="utf-8")


def unlock_all():
    """Release all locks; remove a folder in which nothing else was written."""
    while _locks:
        folder, held = _locks.popitem()
        held.release()
        if [path.name for path in folder.glob("*")] == [".lock"]:
            (folder / ".lock").unlink()
            with contextlib.suppress(OSError):  # other runs may be in it
                folder.rmdir()
                folder.parent.rmdir()
