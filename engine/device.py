"""The device and the precision of a run, compiled networks, hardware and memory."""

import contextlib
import copy
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from torch import nn

from engine.config import UserError, one_line
from engine.processes import rank, world

COMPILED_FROM = 10_000  # steps; on an H100, compilation took as long as 1,000 steps without it
MEASURED = Path(__file__).parent.parent / "gpu.json"  # what tools/gpu_hour.py leaves
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose(name, precision):
    """Return the device and the dtype that cfg.device and cfg.precision name. Raises UserError.

    "auto": a GPU (under torchrun, of the local rank) where there is one; the fastest dtype it has.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device = cuda: PyTorch finds no GPU here; use device=auto or device=cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world() > 1:
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise UserError(f"--nproc_per_node is more than the {count} GPUs of this machine")
        torch.cuda.set_device(local)
    if precision == "auto" and name == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp16"
    elif precision == "auto":
        precision = "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    return torch.device(name), DTYPES[precision]


def fetch(batch, device):
    """Return a tensor that a loader yields, or nested dicts of them, on the device.

    Images uint8 ([B,] H, W, 3) become float32 ([B,] 3, H, W) in [0, 1], label maps uint8 int64.
    """
    if isinstance(batch, dict):
        return {name: fetch(part, device) for name, part in batch.items()}
    batch = batch.to(device, non_blocking=True)
    if batch.dtype != torch.uint8:
        return batch
    return batch.movedim(-1, -3).float().div_(255) if batch.shape[-1] == 3 else batch.long()


def compilation_pays(device, steps):
    """Return the decision of "auto" for a stage of so many steps: never on a CPU.

    gpu.json, in the repository's root, says from how many steps on it pays on a GPU of its name.
    """
    if device.type == "cpu":
        return False
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        gpu = json.loads(MEASURED.read_text(encoding="utf-8"))
        if gpu["device"] == torch.cuda.get_device_name(device):
            return steps >= gpu["compile_from_steps"]
    return steps >= COMPILED_FROM


def compiled(network, wanted, device, steps):
    """Return the network, compiled if `wanted` is True, or "auto" and it pays in so many steps."""
    if wanted is False or (wanted == "auto" and not compilation_pays(device, steps)):
        return network
    if isinstance(network, nn.Sequential):
        return Compiled(network, wanted == "auto")
    # each part by itself: its gradients are averaged during the backward pass of the next
    view, parts = copy.copy(network), network._modules.items()
    view._modules = {name: part and Compiled(part, wanted == "auto") for name, part in parts}
    return view


class Compiled(nn.Module):
    """A module whose forward pass is compiled, for batches that are alike in all steps.

    falls_back: where compilation fails, say so and go on without it, instead of raising UserError.
    """

    reported = False

    def __init__(self, module, falls_back):
        super().__init__()
        self.module, self.falls_back = module, falls_back
        self.call = torch.compile(module.forward)

    def forward(self, *inputs):
        try:
            return self.call(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = one_line(str(error).partition("Set TORCHDYNAMO_VERBOSE")[0])
            fault = f"compilation fails here ({reason})"
            if not self.falls_back:
                raise UserError(f"compile = true: {fault}; set compile=false") from error
            if rank() == 0 and not Compiled.reported:
                Compiled.reported = True
                print(f"compile = auto: {fault}, training goes on without it", file=sys.stderr)
            self.call = self.module.forward
            return self.call(*inputs)


def environment(device):
    """Return what a result depends on besides its configuration: code, versions, hardware."""
    here = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": False}
    git = shutil.which("git")
    commit = git and subprocess.run([git, "rev-parse", "HEAD"], **here).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    versions |= {"numpy": np.__version__, "opencv": cv2.__version__}
    found = {"commit": commit or None, "python": platform.python_version(), **versions}
    machine = {"device": name or platform.machine(), "cores": os.cpu_count()}
    return found | machine | {"processes": world()}


def memory_gb(device):
    """Return the peak memory in GiB, of the GPU or of this process; on macOS, the memory of now."""
    status = Path("/proc/self/status")
    if device.type == "cuda":
        size = torch.cuda.max_memory_allocated(device)
    elif status.is_file():
        size = 2**10 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text(encoding="utf-8"))[1])
    else:
        import psutil

        memory = psutil.Process().memory_info()
        size = getattr(memory, "peak_wset", memory.rss)
    return round(size / 2**30, 3)
