"""The device and the precision of a run, and what is put there."""

import copy
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

from engine.batchnorm import synchronise_batchnorm
from engine.config import UserError
from engine.processes import rank, world

MEASURED = Path(__file__).parent.parent / "gpu.json"  # what tools/gpu_hour.py leaves
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(name):
    """Return the device for "auto", "cpu" or "cuda"; under torchrun, the GPU of the local rank.

    Raises UserError where there is no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        message = "device = cuda, but PyTorch finds no GPU here; use device=auto or device=cpu"
        raise UserError(message)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world() > 1:
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise UserError(f"--nproc_per_node is more than the {count} GPUs of this machine")
        torch.cuda.set_device(local)
    return torch.device(name)


def choose_dtype(precision, device):
    """Return the dtype for "bf16", "fp16", "fp32" or "auto": the fastest that the device has."""
    if precision == "auto" and device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp16"
    elif precision == "auto":
        precision = "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    return DTYPES[precision]


def place(module, device):
    """Return the module on the device, in channels-last, with batch norm shared between GPUs."""
    if device.type == "cuda":
        module = synchronise_batchnorm(module)
    return module.to(device, memory_format=torch.channels_last)


def fetch(batch, device):
    """Return what a loader yields, on the device.

    Images uint8 ([B,] H, W, 3) become float32 ([B,] 3, H, W) in [0, 1], label maps uint8 become
    int64, and dicts keep their keys.
    """
    if isinstance(batch, dict):
        return {name: fetch(part, device) for name, part in batch.items()}
    batch = batch.to(device, non_blocking=True)
    if batch.dtype != torch.uint8:
        return batch
    return batch.movedim(-1, -3).float().div_(255) if batch.shape[-1] == 3 else batch.long()


def compilation_pays(device):
    """Return the decision of "auto": never on a CPU; on a GPU, unless gpu.json speaks against it.

    gpu.json lies in the repository's root and holds for GPUs of the same name.
    """
    if device.type == "cpu":
        return False
    try:
        gpu = json.loads(MEASURED.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return gpu["compile"] is not False or gpu["device"] != torch.cuda.get_device_name(device)


def compiled(network, wanted, device):
    """Return a network's compiled forward pass, for batches that are alike in all steps.

    wanted: True, False or "auto": if it pays, and without it where compilation fails. Each part of
    the network is compiled by itself, so that the gradients of one part are averaged during the
    backward pass of the next.
    """
    if wanted is False or (wanted == "auto" and not compilation_pays(device)):
        return network
    if isinstance(network, nn.Sequential):
        return Compiled(network, wanted == "auto")
    view = copy.copy(network)
    view._modules = {
        name: part and Compiled(part, wanted == "auto") for name, part in network._modules.items()
    }
    return view


class Compiled(nn.Module):
    """A module whose forward pass is compiled.

    falls_back: where compilation fails, say so in one line and go on without it, instead of raising
    UserError.
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
            reason = " ".join(str(error).partition("Set TORCHDYNAMO_VERBOSE")[0].split())[:160]
            if not self.falls_back:
                message = f"compile = true: PyTorch cannot compile this network here ({reason})"
                raise UserError(f"{message}; set compile=false") from error
            if rank() == 0 and not Compiled.reported:
                Compiled.reported = True
                message = "compile = auto: compilation fails here, training goes on without it"
                print(f"{message} ({reason})", file=sys.stderr, flush=True)
            self.call = self.module.forward
            return self.call(*inputs)
