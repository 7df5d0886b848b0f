"""Files that are written whole or not at all, and checkpoints that are read without executing anything in them."""

import os
from pathlib import Path

import cv2
import jinja2
import torch

from config import UserError


def write_atomically(path, write):
    """Calls write(temporary path), then moves the result to `path`: there is the old file or the complete new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError, cv2.error) as error:  # torch.save meets a full disk with a RuntimeError
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path}: cannot be written ({reason}); free the place and run the same command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def render(path, template, /, **values):
    """Writes a template that lies beside this file, filled with `values`; what goes into HTML is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    write_text(path, environment.get_template(template).render(values))


def load_tensors(path):
    """A file of tensors, as torch.save writes it; nothing in it is executed. Raises UserError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file of weights") from error
    except Exception as error:  # a dozen types, depending on what the file is instead
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: not a file of tensors that is safe to load ({reason})") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a state dict")
    return state


def find(path, cfg):
    """`path` as it stands or, failing that, inside the run's folder."""
    inside = Path(cfg.output) / cfg.name / path
    if not Path(path).exists() and not inside.exists():
        raise UserError(f"{path}: there is no such file, nor {inside}")
    return Path(path) if Path(path).exists() else inside
