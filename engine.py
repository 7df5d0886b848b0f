"""What every stage shares and is no method: commands, run folder, precision, checkpoints, log, progress."""

import argparse
import contextlib
import copy
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
import yaml
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import processes
from batchnorm import synchronise_batchnorm
from config import NAME, UserError
from files import load_tensors, write_atomically, write_text
from images import paint, resize, write_image
from processes import rank, world

# keys that may differ between a checkpoint and the command that goes on with it; of the stages' own sections
# (translation, warmup, selftrain) only the stage's own counts
FREE_KEYS = {
    "name", "output", "stages", "device", "compile", "workers", "accumulate", "val", "evaluation",
    "log_every", "pictures_every", "save_every", "val_every",
}  # fmt: skip


class Stopped(BaseException):
    """SIGINT or SIGTERM came. Raised at once, except in a training loop: there after the step, with a checkpoint."""


_locks = {}  # of the folders that this process trains in


def _unlock(folder, file):
    """Closes the lock; a folder in which nothing came of it goes too."""
    file.close()
    if [path.name for path in folder.glob("*")] == [".lock"]:
        (folder / ".lock").unlink()
        with contextlib.suppress(OSError):  # other runs may be in it
            folder.rmdir()
            folder.parent.rmdir()


def forget_locks():
    """In a loader's process: should it outlive the training that started it, the folder is free all the same."""
    while _locks:
        _locks.popitem()[1].close()


class _Signals:
    in_loop, received = False, None

    @classmethod
    def handle(cls, number, _):
        # a second one is of an impatient user; among many processes, of torchrun and of a scheduler for the same reason
        if not cls.in_loop or (cls.received and world() == 1):
            raise Stopped(number)
        cls.received = number


def command(main):
    """Runs a script's main(): a UserError becomes one line on stderr and exit code 2, SIGINT 130 and SIGTERM 143.

    Of many processes, the first that ends this way writes the line; those that lose it by that end silently, with code 1.
    """
    script = Path(sys.argv[0]).name
    previous = {number: signal.signal(number, _Signals.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    goes_on = "the same command goes on from the last checkpoint"
    less_memory = "raise accumulate, lower crop (for evaluate.py, evaluation.tile) or set model.output_stride=16; the last checkpoint is kept"

    def end(code, reason):
        for number in previous:  # torchrun stops the others as soon as one has ended
            signal.signal(number, signal.SIG_IGN)
        if processes.is_first_to_end():
            print(f"{script}: {reason}", file=sys.stderr)
        sys.exit(code)

    try:
        processes.join()
        main()
        processes.leave()
    except UserError as error:
        # raised in a loader's process, it comes wrapped in that process's traceback, whose last line is ours
        end(2, str(error).strip().splitlines()[-1].removeprefix("config.UserError: "))
    except Stopped as stop:
        end(128 + stop.args[0], f"stopped by {signal.Signals(stop.args[0]).name}; {goes_on}")
    except torch.OutOfMemoryError:
        gib = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
        end(2, f"the GPU's {gib:.0f} GiB are not enough for this step; {less_memory}")
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # of a CPU
            end(2, f"there is not enough memory for this step; {less_memory}")
        if not processes.is_loss_of_another(error):
            raise
        end(1, f"another process of this job has died or cannot be reached; {goes_on}")
    finally:
        _Signals.in_loop, _Signals.received = False, None
        while _locks:
            _unlock(*_locks.popitem())
        if loaders := multiprocessing.active_children():  # of a stage that ended before its data did
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for loader in loaders:
                loader.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def arguments(doc, cfg="config.yaml"):
    """The arguments that every script takes; doc: the script's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", default=cfg, metavar="FILE", help="configuration (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the configuration")
    return parser


class Compiled(nn.Module):
    """A module whose forward pass is compiled. falls_back: where that fails, one line says so, and it goes on without."""

    told = False

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
                raise UserError(
                    f"compile = true: PyTorch cannot compile this network here ({reason}); set compile=false"
                ) from error
            if rank() == 0 and not Compiled.told:
                Compiled.told = True
                print(
                    f"compile = auto: goes on without compilation, which fails here ({reason})",
                    file=sys.stderr,
                    flush=True,
                )
            self.call = self.module.forward
            return self.call(*inputs)


# ---------------------------------------------------------------- a run


class Run:
    """One stage at work in the folder of its run, where it leaves `{stage}.pth`.

    section: the part of the configuration that is the stage's own; state: everything that a checkpoint holds, as
    name -> module, optimizer or scaler.
    """

    def __init__(self, cfg, stage, section):
        if not NAME[1](stage):
            raise UserError(f"--as {stage!r} must be {NAME[0]}")
        self.cfg, self.stage, self.section = cfg, stage, section
        self.folder = Path(cfg.output) / cfg.name
        self.result = self.folder / f"{stage}.pth"
        self.unfinished = self.folder / f"{stage}.unfinished.pth"
        if cfg.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device = cuda, but PyTorch finds no GPU here; use device=auto or device=cpu")
        self.device = torch.device(
            cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        )
        if self.device.type == "cuda" and world() > 1:
            local = int(os.environ["LOCAL_RANK"])
            if local >= torch.cuda.device_count():
                raise UserError(f"--nproc_per_node is more than the {torch.cuda.device_count()} GPUs of this machine")
            torch.cuda.set_device(local)
        self.dtype = _precision(cfg.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.recent, self.overall, self.began = {}, {}, time.perf_counter()
        self.parts, self.means, self.shows = world() * cfg.accumulate, [], None
        torch.backends.cudnn.benchmark = True
        torch.manual_seed(cfg.seed)
        cv2.setNumThreads(1)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def place(self, module):
        if self.device.type == "cuda":
            module = synchronise_batchnorm(module)
        return module.to(self.device, memory_format=torch.channels_last)

    def parallel(self, network):
        """The network for the forward passes of the steps, the gradients of which are averaged over all processes.

        Other passes, and checkpoints, take the network itself.
        """
        if world() > 1:
            self.means.append(processes.GradientMean(network))
        return self.compiled(network)

    def compiled(self, network):
        """The network for forward passes that are alike in all steps, compiled where cfg.compile says so.

        Its parts are compiled one by one, so that the gradients of one are averaged during the backward pass of the next.
        """
        automatic = self.cfg.compile == "auto"
        if self.cfg.compile is False or (automatic and self.device.type == "cpu"):
            return network
        if isinstance(network, nn.Sequential):
            return Compiled(network, automatic)
        view = copy.copy(network)
        view._modules = {name: part and Compiled(part, automatic) for name, part in network._modules.items()}
        return view

    def part_size(self):
        """The number of images in one of the equal parts that a step's batch is worked through in.

        Every process has cfg.accumulate parts of each step. Raises UserError where the batch cannot be divided so.
        """
        batch = self.cfg[self.section].batch
        if sum(batch) % self.parts:
            raise UserError(
                f"{self.section}.batch = {batch}: the {sum(batch)} images of a step cannot be divided into {self.parts} equal "
                f"parts ({world()} processes x accumulate = {self.cfg.accumulate}); change one of the three"
            )
        return sum(batch) // self.parts

    def fetch(self, batch):
        """What was loaded, on the device: images ([B,] H, W, 3) as ([B,] 3, H, W) in [0, 1], label maps as int64."""
        if isinstance(batch, dict):
            return {name: self.fetch(part) for name, part in batch.items()}
        batch = batch.to(self.device, non_blocking=True)
        if batch.dtype != torch.uint8:
            return batch
        return batch.movedim(-1, -3).float().div_(255) if batch.shape[-1] == 3 else batch.long()

    # -- checkpoints

    def is_finished(self, force, inputs=()):
        """Whether the stage's result is there; from here on, no other job may train in the run's folder.

        inputs: files of earlier stages that this one reads, if they are there. Raises UserError where the result, or its
        unfinished checkpoint, is of another configuration or of other inputs; `force` removes both first.
        """
        return processes.from_first(lambda: self._is_finished(force, inputs))

    def _is_finished(self, force, inputs):
        self._lock()
        for left in self.folder.glob(f".{self.stage}.*.partial"):  # by a process that was killed while it wrote
            left.unlink(missing_ok=True)
        self.inputs = {Path(path).name: _digest(path) for path in inputs if Path(path).is_file()}
        for path in (self.result, self.unfinished):
            if force:
                path.unlink(missing_ok=True)
            elif path.exists():
                change = self._difference(load_tensors(path))
                if change:
                    raise UserError(f"{path}: was made with {change}; --force replaces it, name=... starts another run")
        if self.result.exists():
            print(f"{self.stage}: {self.result} is finished; --force makes it anew")
        return self.result.exists()

    def _difference(self, saved):
        config = saved.get("config", {})
        for key, value in _plain(self.cfg).items():
            relevant = key == self.section or key not in FREE_KEYS | {"translation", "warmup", "selftrain"}
            if relevant and config.get(key) != value:
                return f"another {key}: {config.get(key)} instead of {value}"
        for name, digest in self.inputs.items():
            if saved.get("inputs", {}).get(name) != digest:
                return f"another {name} than the one that is there now"
        return None

    def _lock(self):
        """Held until the process ends, however it ends."""
        if self.folder in _locks:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = (self.folder / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(f"{self.folder}: {file.read()} is at work here; wait for it, or set name=...") from error
        _locks[self.folder] = file
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} ({self.stage})")
        file.flush()

    def describe(self):
        """Leaves in the run's folder what is run, and on what."""
        if rank() == 0:
            write_text(self.folder / "config.yaml", yaml.safe_dump(_plain(self.cfg), sort_keys=False))
            write_text(self.folder / "environment.json", json.dumps(_environment(self.device), indent=1) + "\n")

    def resume(self, state):
        """Loads the unfinished checkpoint into `state`. Returns the number of steps done, None without a checkpoint.

        Raises UserError for a checkpoint that does not fit.
        """
        if not self.unfinished.exists():
            return None
        saved = load_tensors(self.unfinished)
        try:
            for name, part in state.items():
                part.load_state_dict(saved[name])
            self.overall = saved["overall"]
            self.began -= saved["seconds"]
            return saved["step"]
        except (KeyError, ValueError, RuntimeError) as error:  # what load_state_dict raises
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"{self.unfinished}: does not fit this version of the code, or this device ({reason}); remove it, and the "
                "stage begins anew"
            ) from error

    def save(self, path, step, state, **more):
        if rank() > 0:
            return
        saved = {name: part.state_dict() for name, part in state.items()}
        saved |= {"stage": self.stage, "step": step, "config": _plain(self.cfg), "inputs": self.inputs, **more}
        write_atomically(path, lambda temporary: torch.save(saved, temporary))

    def finish(self, steps, state):
        """Writes the stage's result and removes its unfinished checkpoint."""
        self.save(self.result, steps, state)
        processes.wait()
        if rank() == 0:
            self.unfinished.unlink(missing_ok=True)
        means = {name: _rounded(above / max(below, 1e-12)) for name, (above, below) in self.overall.items()}
        self.write_log(finished=steps, **means, seconds=self.seconds())
        print(f"{self.stage}: wrote {self.result}  {_figures(means)}")

    def seconds(self):
        """What the stage has taken so far, in this process and in those that it goes on from."""
        return round(time.perf_counter() - self.began, 1)

    # -- the loop

    def steps(self, batches, first, total, state):
        """Yields (step, parts) for the steps from `first`; logs and saves `state` at the configured intervals.

        Going through parts gives this process's parts of the step's batch, on the device. Step and parts start with torch's
        generators as (seed, stage, step, place of the part in the batch) alone decide; gradients are averaged in the last.
        """
        images, batches = batches.batch_size * self.parts, iter(batches)
        if rank() == 0:
            self.writer = SummaryWriter(self.folder / "tensorboard" / self.stage, purge_step=first)
        self.started, self.done = time.perf_counter(), 0
        _Signals.in_loop = True
        with progress(
            total=total * images, initial=first * images, unit="img", desc=self.stage, dynamic_ncols=True
        ) as self.bar:
            for step in range(first, total):
                shows = rank() == 0 and ((step + 1) % self.cfg.pictures_every == 0 or step + 1 == total)
                self.shows = step + 1 if shows else None
                self._seed(step, 0)
                yield step, self._parts(step, batches)
                self.bar.update(images)
                self.done += 1
                stop = processes.largest(_Signals.received or 0)
                saves = stop or ((step + 1) % self.cfg.save_every == 0 and step + 1 < total)
                if (step + 1) % self.cfg.log_every == 0 or saves or step + 1 == total:
                    self._flush(step + 1, total, images)
                if saves:
                    self.save(self.unfinished, step + 1, state, overall=self.overall, seconds=self.seconds())
                if stop:
                    processes.wait()  # for the checkpoint: torchrun stops all as soon as one has ended
                    raise Stopped(stop)
        _Signals.in_loop = False
        if rank() == 0:
            self.writer.close()

    def _parts(self, step, batches):
        for k in range(self.cfg.accumulate):
            self._seed(step, k * world() + rank())
            if k + 1 == self.cfg.accumulate:
                for mean in self.means:
                    mean.begin()
            yield self.fetch(next(batches))
        for mean in self.means:
            mean.finish()

    def _seed(self, step, place):
        sequence = np.random.SeedSequence([self.cfg.seed, *self.stage.encode(), step])
        torch.manual_seed(int(sequence.generate_state(place + 1)[place]))

    def log(self, **figures):
        """Adds to the figures of this log interval: a mean of scalars, or a ratio given as (above, below). Stays on the device."""
        for name, figure in figures.items():
            above, below = figure if isinstance(figure, tuple) else (figure, 1)
            total = self.recent.setdefault(name, [0, 0])
            total[0] += above.detach() if isinstance(above, torch.Tensor) else above
            total[1] += below

    def show(self, **pictures):
        """The first of each batch of pictures, into TensorBoard and samples/STAGE/NAME.png; to be called if `shows`.

        A picture: images (B, 3, H, W) in [0, 1], label maps (B, h, w), or None: left out.
        """
        pictures = {name: batch[0].cpu() for name, batch in pictures.items() if batch is not None}
        size = next(picture.shape[1:] for picture in pictures.values() if picture.dim() == 3)
        for name, picture in pictures.items():
            if picture.dim() == 3:
                picture = picture.float().mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
            else:
                picture = paint(resize(picture.byte().numpy(), size, labels=True), self.cfg)
            self.writer.add_image(f"{self.stage}/{name}", picture, self.shows, dataformats="HWC")
            write_image(self.folder / "samples" / self.stage / f"{name}.png", picture)

    def _flush(self, step, total, images):
        names = list(self.recent)
        sums = [
            torch.as_tensor(x, dtype=torch.float64, device=self.device) for name in names for x in self.recent[name]
        ]
        sums = processes.total(torch.stack(sums)).view(-1, 2).tolist()
        self.recent = {}
        figures = {name: above / max(below, 1e-12) for name, (above, below) in zip(names, sums, strict=True)}
        for name, pair in zip(names, sums, strict=True):
            if not math.isfinite(figures[name]):
                raise UserError(
                    f"{self.stage}: {name} became {figures[name]} in the {self.done} steps before step {step}; the last "
                    f"checkpoint is kept; lower optimizer.lr_backbone and lr_head, or use precision=fp32"
                )
            old = self.overall.get(name, [0, 0])
            self.overall[name] = [old[0] + pair[0], old[1] + pair[1]]
            if rank() == 0:
                self.writer.add_scalar(f"{self.stage}/{name}", figures[name], step)
        rate = self.done * images / (time.perf_counter() - self.started)
        self.started, self.done = time.perf_counter(), 0
        self.bar.set_postfix_str(_figures(figures))
        if self.bar.disable:
            left = (total - step) * images / rate
            print(
                f"{self.stage} {step}/{total}  {_figures(figures)}  {rate:.1f} img/s  {left / 60:.1f} min left",
                flush=True,
            )
        figures = {name: _rounded(value) for name, value in figures.items()}
        self.write_log(step=step, **figures, images_per_second=round(rate, 2), memory_gb=_memory_gb(self.device))

    def write_log(self, **figures):
        """Appends a line to the run's log.jsonl."""
        if rank() == 0:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": self.stage, **figures}) + "\n")


def progress(*args, **options):
    """tqdm's bar, on a terminal, by the first process."""
    return tqdm(*args, disable=rank() > 0 or None, **options)


def _rounded(value):
    return float(f"{value:.6g}")


def _figures(figures):
    return "  ".join(f"{name} {value:.3g}" for name, value in figures.items())


def _precision(name, device):
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        name = "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def _digest(path):
    sha = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
    return sha.hexdigest()


def _plain(config):
    """A Config as plain dicts."""
    return {k: _plain(v) for k, v in config.items()} if isinstance(config, dict) else config


def _memory_gb(device):
    """The peak so far: of the GPU's memory where there is one, else of this process's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def _environment(device):
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "commit": git.stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "processes": world(),
    }
