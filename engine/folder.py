"""A run's folder: the lock that one job holds on it, its log, and what describes the run."""

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import cv2
import filelock
import numpy as np
import psutil
import torch
import torchvision
import yaml

from engine.config import UserError, plain
from engine.files import write_text
from engine.processes import rank, world

_locks = {}  # folder -> the lock that this process holds on it


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
        message = f"{folder}: {owner} is at work here; wait for it, or set name=..."
        raise UserError(message) from error
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


def write_log(folder, stage, **figures):
    """Append a line to the run's log.jsonl, in rank 0."""
    if rank() == 0:
        with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, **figures}) + "\n")


def describe(folder, cfg, device):
    """Write config.yaml, as resolved, and environment.json into the run's folder, in rank 0."""
    if rank() == 0:
        write_text(folder / "config.yaml", yaml.safe_dump(plain(cfg), sort_keys=False))
        text = json.dumps(environment(device), indent=1)
        write_text(folder / "environment.json", text + "\n")


def environment(device):
    """Return what a result depends on besides its configuration: code, versions, hardware."""
    here = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": False}
    git = shutil.which("git")
    commit = git and subprocess.run([git, "rev-parse", "HEAD"], **here).stdout.strip()
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else platform.processor()
    return {
        "commit": commit or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "device": name or platform.machine(),
        "cores": os.cpu_count(),
        "processes": world(),
    }


def memory_gb(device):
    """Return the peak memory in GiB: of the GPU, or of this process on a CPU.

    psutil has a process's peak on Windows alone; without Linux's, it is the memory of now.
    """
    status = Path("/proc/self/status")
    if device.type == "cuda":
        size = torch.cuda.max_memory_allocated(device)
    elif status.is_file():
        peak = re.search(r"VmHWM:\s+(\d+)", status.read_text(encoding="utf-8"))
        size = int(peak[1]) * 2**10
    else:
        memory = psutil.Process().memory_info()
        size = getattr(memory, "peak_wset", memory.rss)
    return round(size / 2**30, 3)
