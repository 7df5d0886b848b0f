"""Files of a run: written atomically, loaded safely; checkpoints; the lock on its folder."""

import contextlib
import errno
import os
from pathlib import Path

import cv2
import filelock
import torch

from engine.config import UserError, flat, one_line

# keys that may differ between a checkpoint and the command that goes on with it
FREE_KEYS = {
    "name", "output", "stages", "device", "compile", "workers", "accumulate", "val", "more_val",
    "evaluation", "log_every", "pictures_every", "save_every",
}  # fmt: skip
locks = {}  # folder -> the lock that this process holds on it


def write_atomically(path, write):
    """Write a file wholly or not at all: write(temporary path), then rename. Raises UserError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("r+b") as file:  # Windows synchronises no file that is read only
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError, cv2.error) as error:  # torch.save: RuntimeError on a full disk
        with contextlib.suppress(OSError):  # it would keep the disk full
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {reason(error)}") from error


def write_text(path, text):
    """Write a UTF-8 text file atomically. Raises UserError."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def reason(error):
    """Return what an error of the system says, and what to do about it."""
    is_full = getattr(error, "errno", None) in (None, errno.ENOSPC, errno.EDQUOT)
    remedy = "free disk space" if is_full else "make it a place to read and write, or give another"
    words = getattr(error, "strerror", None) or error
    return f"{one_line(words)}; {remedy}, then run the same command again"


def load_tensors(path):
    """Return the state dict in a file, on the CPU; no code in it is executed. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file of weights, or it is not a regular file")
    with Path(path).open("rb") as file:
        start = file.read(16)
    if start[:2] != b"PK" and start[:1] != b"\x80":  # PyTorch's archive, or a pickle
        raise UserError(f"{path}: is no checkpoint, it begins with {start!r}; restore the file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a dozen types, depending on what the file is instead
        fault = "is damaged, or holds more than tensors and could execute code"
        raise UserError(f"{path}: {fault} ({one_line(error)}); restore the file") from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a state dict; remove it")
    return state


def find(path, cfg):
    """Return `path`, or else the file of this name in the run's folder. Raises UserError."""
    for found in (Path(path), Path(cfg.output) / cfg.name / path):
        if found.exists():
            return found
    raise UserError(f"{path}: there is no such file, nor {found}")


def require_same(path, saved, cfg, section, inputs):
    """Raise UserError unless a checkpoint has this configuration, of `section`, and inputs."""
    old, new, changes = flat(saved.get("config", {})), flat(cfg), []
    for key, value in new.items():
        top = key.partition(".")[0]
        is_free = top in FREE_KEYS or (f"{top}.steps" in new and top != section)
        if not is_free and old.get(key, value) != value:
            changes.append(f"{key} = {one_line(old[key])} instead of {one_line(value)}")
    for name, now in inputs.items():
        before = saved.get("inputs", {}).get(name, now)  # an earlier release noted fewer
        files = {line.rsplit(" ", 2)[0] for line in {*before.split("\n")} ^ {*now.split("\n")}}
        if "\n" in now and files:
            changes.append(f"other {name} images: {len(files)} files changed, as {min(files)}")
        elif files:
            changes.append(f"another {name} than the one that is there now")
    if changes:
        fault = f"was made with {one_line(', '.join(changes))}"
        raise UserError(f"{path}: {fault}; give --force or another name=...")


def lock(folder):
    """Create a run's folder and lock it until unlock_all. Raises UserError if it is locked."""
    if folder in locks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        locks[folder] = filelock.FileLock(folder / ".lock").acquire(blocking=False).lock
    except filelock.Timeout as error:
        fault = "another process is at work here"
        raise UserError(f"{folder}: {fault}; wait until it ends, or set name=...") from error


def unlock_all():
    """Release all locks of this process."""
    while locks:
        locks.popitem()[1].release()
