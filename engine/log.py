"""Figures and pictures of a stage: progress bar, stdout, TensorBoard, log.jsonl, samples."""

import json
import math
import time

import torch
from tqdm import tqdm

from engine import processes
from engine.config import UserError
from engine.device import memory_gb
from engine.images import paint, resize, write_image
from engine.processes import rank


def progress(*args, **options):
    """Return tqdm's progress bar; it is shown by rank 0, and on a terminal only."""
    return tqdm(*args, disable=rank() > 0 or None, dynamic_ncols=True, **options)


class Figures:
    """Figures of a stage: name -> [numerator, denominator], summed without a wait."""

    def __init__(self, folder, stage, device):
        self.folder = folder
        self.stage = stage
        self.device = device
        self.recent = {}
        self.overall = {}
        self.began = time.perf_counter()

    def seconds(self):
        """Return the time since the stage began."""
        return round(time.perf_counter() - self.began, 1)

    def start(self, first, total, images):
        """Begin after `first` steps of `total`, of `images` images each."""
        from torch.utils.tensorboard import SummaryWriter

        self.total = total
        self.images = images
        self.written = first
        self.started = time.perf_counter()
        if rank() == 0:
            self.writer = SummaryWriter(self.folder / "tensorboard" / self.stage, purge_step=first)
        self.bar = progress(None, self.stage, total, initial=first, unit="img", unit_scale=images)

    def add(self, **figures):
        """Add scalars, to be averaged, or ratios as pairs (numerator, denominator)."""
        for name, figure in figures.items():
            above, below = figure if isinstance(figure, tuple) else (figure, 1)
            total = self.recent.setdefault(name, [0, 0])
            total[0] += above.detach() if isinstance(above, torch.Tensor) else above
            total[1] += below

    def advance(self, writes):
        """Count a step. With `writes`, or at the end, write means, or UserError for one of NaN."""
        self.bar.update()
        step = self.done
        if not writes and step < self.total:
            return
        parts = [part for pair in self.recent.values() for part in pair]
        sums = [torch.as_tensor(part, dtype=torch.float64, device=self.device) for part in parts]
        sums = processes.sum_over_processes(torch.stack(sums)).view(-1, 2).tolist()
        sums = dict(zip(self.recent, sums, strict=True))
        self.recent = {}
        figures = _means(sums)
        done = step - self.written
        for name, (above, below) in sums.items():
            if not math.isfinite(figures[name]):
                fault = f"{name} became {figures[name]} in the {done} steps before step {step}"
                remedy = "lower optimizer.lr_backbone and lr_head, or use precision=fp32"
                raise UserError(f"{self.stage}: {fault}; the last checkpoint is kept; {remedy}")
            old = self.overall.get(name, [0, 0])
            self.overall[name] = [old[0] + above, old[1] + below]
            if rank() == 0:
                self.writer.add_scalar(name, figures[name], step)
        seconds = time.perf_counter() - self.started
        self.written = step
        self.started += seconds
        rate = done * self.images / seconds
        left = (self.total - step) * seconds / done / 60
        text = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            speed = f"{rate:.1f} img/s  {left:.1f} min left"
            print(f"{self.stage} {step}/{self.total}  {text}  {speed}", flush=True)
        figures |= {"images_per_second": rate, "memory_gb": memory_gb(self.device)}
        write_log(self.folder, self.stage, step=step, **figures)

    def finish(self, result):
        """Write the means over the whole stage."""
        self.bar.close()
        if rank() == 0:
            self.writer.close()
        figures = _means(self.overall)
        figures |= {"seconds": self.seconds(), "date": time.strftime("%Y-%m-%d")}
        write_log(self.folder, self.stage, finished=self.total, **figures)
        print(f"{self.stage}: wrote {result}")

    def show(self, colours, **pictures):
        """Write the first of images (B, 3, H, W), label maps (B, h, w), or nothing for None."""
        first = {name: batch[0].cpu() for name, batch in pictures.items() if batch is not None}
        size = next(picture.shape[1:] for picture in first.values() if picture.dim() == 3)
        for name, picture in first.items():
            if picture.dim() == 3:
                picture = picture.float().mul(255).round().clamp(0, 255).byte()
                picture = picture.permute(1, 2, 0).numpy()
            else:
                picture = paint(resize(picture.byte().numpy(), size, labels=True), colours)
            self.writer.add_image(name, picture, self.done, dataformats="HWC")
            write_image(self.folder / "samples" / self.stage / f"{name}.png", picture)


def write_log(folder, stage, **figures):
    """Append a line to the run's log.jsonl, in rank 0."""
    if rank() == 0:
        short = {key: float(f"{x:.6g}") if type(x) is float else x for key, x in figures.items()}
        with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, **short}) + "\n")


def _means(sums):
    return {name: above / max(below, 1e-12) for name, (above, below) in sums.items()}
