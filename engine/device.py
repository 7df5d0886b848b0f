"""The device and the precision of a run; what depends on the hardware."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

from engine.config import UserError
from engine.processes import world

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose(name, precision):
    """Return the device and the dtype of cfg.device and cfg.precision; auto: the fastest."""
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise UserError("device = cuda: PyTorch finds no GPU here; use device=auto or device=cpu")
    if name == "auto":
        name = "cuda" if has_gpu else "cpu"
    if name == "cuda" and world() > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if precision == "auto" and name == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp16"
    elif precision == "auto":
        precision = "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    return torch.device(name), DTYPES[precision]


def fetch(batch, device):
    """Return nested tensors on the device: uint8 images as floats in [0, 1], labels as int64."""
    if isinstance(batch, dict):
        return {name: fetch(part, device) for name, part in batch.items()}
    batch = batch.to(device, non_blocking=True)
    if batch.dtype != torch.uint8:
        return batch
    return batch.movedim(-1, -3).float().div_(255) if batch.dim() == 4 else batch.long()


def environment(device):
    """Return what a result depends on besides its configuration: code, versions, hardware."""
    import cv2
    import numpy
    import torchvision

    commit = None
    if git := shutil.which("git"):
        ask = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": False}
        commit = subprocess.run([git, "rev-parse", "HEAD"], **ask).stdout.strip() or None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {x.__name__: x.__version__ for x in (torch, torchvision, numpy, cv2)}
    found = {"commit": commit, "python": platform.python_version(), **versions}
    return found | {"device": name, "cores": os.cpu_count(), "processes": world()}


def memory_gb(device):
    """Return the peak memory in GiB, of the GPU or of this process; None where none is known."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+)", status.read_text("utf-8")) if status.is_file() else None
    return peak and round(int(peak[1]) / 2**20, 3)
