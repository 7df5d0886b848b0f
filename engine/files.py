"""Files of a run: written atomically, loaded safely; checkpoints; the lock on its folder."""

import contextlib
import errno
import os
import platform
from pathlib import Path

import cv2
import filelock
import torch

from engine import config
from engine.config import TEXT, UserError, integer, mapping, number, one_line, plain

# keys that may differ between a checkpoint and the command that goes on with it
FREE_KEYS = {
    "name", "output", "stages", "device", "compile", "workers", "accumulate", "val", "evaluation",
    "log_every", "pictures_every", "save_every", "val_every",
}  # fmt: skip
ANY_TEXT = "text", lambda v: isinstance(v, str)
TENSORS = mapping(ANY_TEXT, ("a tensor", lambda v: isinstance(v, torch.Tensor)), low=0)
SUMS = config.sequence(number(-1e300, 1e300), 2, 2)
CHECKPOINT = {
    "step": integer(0), "config": ("a mapping", lambda v: isinstance(v, dict)),
    "inputs": mapping(ANY_TEXT, TEXT, low=0), "seconds": number(0, 1e12),
    "overall": mapping(TEXT, SUMS, low=0), "miou": number(0, 100),
    "student": TENSORS, "teacher": TENSORS, "generator": TENSORS,
}  # fmt: skip
locks = {}  # folder -> the lock that this process holds on it


def write_atomically(path, write):
    """Write a file wholly or not at all: write(temporary path), then rename. Raises UserError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("r+b") as file:  # Windows synchronises no file that is read only
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError, cv2.error) as error:  # torch.save: RuntimeError on a full disk
        raise UserError(f"{path}: cannot be written: {reason(error)}") from error
    finally:
        with contextlib.suppress(OSError):  # which would replace the error above
            temporary.unlink(missing_ok=True)


def reason(error):
    """Return what an error of the system says, and what to do about it."""
    words = getattr(error, "strerror", None) or one_line(str(error).strip().rpartition("\n")[2])
    is_place = isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT)
    remedy = "make it a place to read and write, or give another" if is_place else "free disk space"
    return f"{words}; {remedy}, then run the same command again"


def remove_partial(folder):
    """Remove what killed processes of this machine have left unfinished in a folder.

    Another machine's processes cannot be asked whether they are alive, and may be writing.
    """
    for left in Path(folder).rglob(f".*.{platform.node()}.*.partial"):
        import psutil  # which not every system has whole

        pid = left.name.split(".")[-2]
        if not pid.isdigit() or int(pid) == os.getpid() or not psutil.pid_exists(int(pid)):
            left.unlink(missing_ok=True)


def write_text(path, text):
    """Write a UTF-8 text file atomically. Raises UserError."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def load_tensors(path):
    """Return the state dict in a file, on the CPU; no code in it is executed. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file of weights, or it is not a regular file")
    damaged = "restore the file, or remove it"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a dozen types, depending on what the file is instead
        fault = f"not a file of tensors that is safe to load ({one_line(error) or 'it is empty'})"
        raise UserError(f"{path}: {fault}; {damaged}") from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a state dict; {damaged}")
    return config.check_known(state, CHECKPOINT, f"{path}: {damaged}")


def find(path, cfg):
    """Return `path`, or else the file of this name in the run's folder. Raises UserError."""
    for found in (Path(path), Path(cfg.output) / cfg.name / path):
        if found.exists():
            return found
    raise UserError(f"{path}: there is no such file, nor {found}")


def require_same(path, cfg, section, inputs):
    """Return a checkpoint that was made with this configuration and these inputs, or UserError.

    inputs: file name -> digest. Of the stages' sections (with `steps`), only `section` counts.
    """
    saved, changes = load_tensors(path), []
    old, digests = saved.get("config", {}), saved.get("inputs", {})
    for key, value in plain(cfg).items():
        of_another_stage = isinstance(value, dict) and "steps" in value and key != section
        if key not in FREE_KEYS and not of_another_stage and old.get(key) != value:
            changes.append(f"another {key}: {config.shown.repr(old.get(key))} instead of {value}")
    others = [name for name, digest in inputs.items() if digests.get(name) != digest]
    changes += [f"another {name} than the one that is there now" for name in others]
    if changes:
        raise UserError(f"{path}: was made with {changes[0]}; give --force or another name=...")
    return saved


def lock(folder, stage):
    """Create a run's folder and lock it until unlock_all. Raises UserError if it is locked."""
    if folder in locks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ".lock"
    try:
        locks[folder] = filelock.FileLock(file).acquire(blocking=False).lock
    except filelock.Timeout as error:
        text = "" if os.name == "nt" else file.read_text(encoding="utf-8", errors="replace")
        owner = text or "another process"
        raise UserError(f"{folder}: {owner} is at work here; wait, or set name=...") from error
    if os.name != "nt":  # Windows refuses every other handle on a locked file
        file.write_text(f"process {os.getpid()} on {platform.node()} ({stage})", encoding="utf-8")


def unlock_all():
    """Release all locks; remove a folder in which nothing else was written."""
    while locks:
        folder, held = locks.popitem()
        held.release()
        if [path.name for path in folder.glob("*")] == [".lock"]:
            (folder / ".lock").unlink()
            with contextlib.suppress(OSError):  # other runs may be in it
                folder.rmdir()
                folder.parent.rmdir()
