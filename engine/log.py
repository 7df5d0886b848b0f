"""The log of a stage: figures, averaged over an interval of steps, and sample pictures."""

import math
import time

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from engine.config import UserError
from engine.folder import memory_gb, write_log
from engine.images import paint, resize, write_image
from engine.processes import rank, sum_over_processes


def progress(*args, **options):
    """Return tqdm's progress bar; it is shown by rank 0, and on a terminal only."""
    return tqdm(*args, disable=rank() > 0 or None, **options)


class Log:
    """Collects figures on the device, without waiting for it, and writes them at intervals.

    They go to the progress bar or stdout, to TensorBoard and to log.jsonl in the run's folder.
    overall: name -> [numerator, denominator] since the stage began.
    """

    def __init__(self, folder, stage, device):
        self.folder, self.stage, self.device = folder, stage, device
        self.recent, self.overall = {}, {}
        self.began = time.perf_counter()

    def start(self, bar, first):
        """Begin with the steps from `first`, whose progress `bar` shows."""
        self.bar, self.done, self.started = bar, 0, time.perf_counter()
        if rank() == 0:
            folder = self.folder / "tensorboard" / self.stage
            self.writer = SummaryWriter(folder, purge_step=first)

    def stop(self):
        if rank() == 0:
            self.writer.close()

    def seconds(self):
        """Return the time since the stage began, that before a resumption included."""
        return round(time.perf_counter() - self.began, 1)

    def add(self, **figures):
        """Add scalars, to be averaged, or ratios as pairs (numerator, denominator)."""
        for name, figure in figures.items():
            above, below = figure if isinstance(figure, tuple) else (figure, 1)
            total = self.recent.setdefault(name, [0, 0])
            total[0] += above.detach() if isinstance(above, torch.Tensor) else above
            total[1] += below

    def step_done(self, images):
        self.bar.update(images)
        self.done += 1

    def write(self, step, total, images):
        """Write the means since the last call; `step` of `total` steps are done, of `images` each.

        Raises UserError where a figure is not finite.
        """
        sums = self._collect(step)
        figures = {name: _mean(pair) for name, pair in sums.items()}
        for name, (above, below) in sums.items():
            old = self.overall.get(name, [0, 0])
            self.overall[name] = [old[0] + above, old[1] + below]
            if rank() == 0:
                self.writer.add_scalar(f"{self.stage}/{name}", figures[name], step)
        rate = self.done * images / (time.perf_counter() - self.started)
        self.started, self.done = time.perf_counter(), 0
        text = _in_words(figures)
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            left = (total - step) * images / rate / 60
            line = f"{self.stage} {step}/{total}  {text}  {rate:.1f} img/s  {left:.1f} min left"
            print(line, flush=True)
        figures = {name: _rounded(value) for name, value in figures.items()}
        more = {"images_per_second": round(rate, 2), "memory_gb": memory_gb(self.device)}
        write_log(self.folder, self.stage, step=step, **figures, **more)

    def _collect(self, step):
        """Return the sums over all processes, name -> (numerator, denominator), read back once."""
        names = list(self.recent)
        parts = [part for name in names for part in self.recent[name]]
        sums = [torch.as_tensor(part, dtype=torch.float64, device=self.device) for part in parts]
        sums = sum_over_processes(torch.stack(sums)).view(-1, 2).tolist()
        self.recent = {}
        for name, pair in zip(names, sums, strict=True):
            if not math.isfinite(_mean(pair)):
                when = f"in the {self.done} steps before step {step}"
                remedy = "lower optimizer.lr_backbone and lr_head, or use precision=fp32"
                fault = f"{name} became {_mean(pair)} {when}"
                raise UserError(f"{self.stage}: {fault}; the last checkpoint is kept; {remedy}")
        return dict(zip(names, sums, strict=True))

    def finish(self, steps, result):
        """Write the means over the whole stage."""
        means = {name: _rounded(_mean(pair)) for name, pair in self.overall.items()}
        write_log(self.folder, self.stage, finished=steps, **means, seconds=self.seconds())
        print(f"{self.stage}: wrote {result}  {_in_words(means)}")

    def show(self, step, colours, pictures):
        """Write the first of each batch to TensorBoard and to samples/STAGE/NAME.png.

        pictures: name -> images (B, 3, H, W) in [0, 1], label maps (B, h, w), or None (left out).
        """
        first = {name: batch[0].cpu() for name, batch in pictures.items() if batch is not None}
        size = next(picture.shape[1:] for picture in first.values() if picture.dim() == 3)
        for name, picture in first.items():
            if picture.dim() == 3:
                picture = picture.float().mul(255).round().clamp(0, 255).byte()
                picture = picture.permute(1, 2, 0).numpy()
            else:
                picture = paint(resize(picture.byte().numpy(), size, labels=True), colours)
            self.writer.add_image(f"{self.stage}/{name}", picture, step, dataformats="HWC")
            write_image(self.folder / "samples" / self.stage / f"{name}.png", picture)


def _mean(pair):
    return pair[0] / max(pair[1], 1e-12)


def _rounded(value):
    return float(f"{value:.6g}")


def _in_words(figures):
    return "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
