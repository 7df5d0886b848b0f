"""Files of a run: written atomically, loaded safely; checkpoints; the lock on its folder."""

import contextlib
import hashlib
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
        fault = f"not a file of tensors that is safe to load ({one_line(error)})"
        raise UserError(f"{path}: {fault}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a state dict")
    return state


def find(path, cfg):
    """Return `path` or, where it does not exist, the file of this name in the run's folder.

    Raises UserError where neither exists.
    """
    for found in (Path(path), Path(cfg.output) / cfg.name / path):
        if found.exists():
            return found
    raise UserError(f"{path}: there is no such file, nor {found}")


def restore(path, state, names):
    """Load a checkpoint into the parts of `state`; return its other entries of these `names`.

    state: name -> module, optimizer or scaler. Raises UserError for a checkpoint that does not fit.
    """
    saved = load_tensors(path)
    try:
        for name, part in state.items():
            part.load_state_dict(saved[name])
        return [saved[name] for name in names]
    except (KeyError, ValueError, RuntimeError) as error:  # what load_state_dict raises
        fault = f"does not fit this version of the code, or this device ({one_line(error)})"
        raise UserError(f"{path}: {fault}; remove it, and the stage begins anew") from error


def require_same(path, cfg, section, inputs):
    """Raise UserError unless a checkpoint was made with this configuration and these inputs.

    Of the sections of stages (those with `steps`), only the stage's own, `section`, counts.
    inputs: file name -> digest.
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
        remedy = "--force replaces it, name=... starts another run"
        raise UserError(f"{path}: was made with {changes[0]}; {remedy}")


def digest(path):
    """Return a file's SHA-256 in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
    return sha.hexdigest()


def lock(folder, stage):
    """Create and lock a run's folder until the process ends or calls unlock_all.

    Raises UserError, which names the other process, if the folder is locked.
    """
    if folder in _locks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ".lock"
    held = filelock.FileLock(file, blocking=False)
    try:
        held.acquire()
    except filelock.Timeout as error:
        owner = file.read_text(encoding="utf-8") or "another process"
        fault = f"{owner} is at work here; wait for it, or set name=..."
        raise UserError(f"{folder}: {fault}") from error
    _locks[folder] = held
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
