"""Checkpoints: plain functions of a path and a state, name -> module, optimizer or scaler."""

import hashlib

import torch

from engine.config import UserError, plain
from engine.files import load_tensors, write_atomically
from engine.processes import rank

# keys that may differ between a checkpoint and the command that goes on with it
FREE_KEYS = {
    "name", "output", "stages", "device", "compile", "workers", "accumulate", "val", "evaluation",
    "log_every", "pictures_every", "save_every", "val_every",
}  # fmt: skip


def save(path, state, **more):
    """Write the state dicts of `state`, and `more`, atomically, in rank 0."""
    if rank() == 0:
        saved = {name: part.state_dict() for name, part in state.items()} | more
        write_atomically(path, lambda temporary: torch.save(saved, temporary))


def restore(path, state, names):
    """Load a checkpoint into the parts of `state`; return its other entries of these `names`.

    Raises UserError for a checkpoint that does not fit.
    """
    saved = load_tensors(path)
    try:
        for name, part in state.items():
            part.load_state_dict(saved[name])
        return [saved[name] for name in names]
    except (KeyError, ValueError, RuntimeError) as error:  # what load_state_dict raises
        reason = " ".join(str(error).split())[:120]
        fault = f"does not fit this version of the code, or this device ({reason})"
        raise UserError(f"{path}: {fault}; remove it, and the stage begins anew") from error


def require_same(path, cfg, section, inputs):
    """Raise UserError unless a checkpoint was made with this configuration and these inputs.

    Of the sections of stages (those with `steps`), only the stage's own, `section`, counts.
    inputs: file name -> digest.
    """
    change = _difference(load_tensors(path), cfg, section, inputs)
    if change:
        remedy = "--force replaces it, name=... starts another run"
        raise UserError(f"{path}: was made with {change}; {remedy}")


def _difference(saved, cfg, section, inputs):
    """Return in words what is different; None if nothing is."""
    config = saved.get("config", {})
    for key, value in plain(cfg).items():
        of_another_stage = isinstance(value, dict) and "steps" in value and key != section
        if key not in FREE_KEYS and not of_another_stage and config.get(key) != value:
            return f"another {key}: {config.get(key)} instead of {value}"
    for name, digest in inputs.items():
        if saved.get("inputs", {}).get(name) != digest:
            return f"another {name} than the one that is there now"
    return None


def digest(path):
    """Return a file's SHA-256 in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
    return sha.hexdigest()
