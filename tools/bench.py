"""Time steps against their bare networks, samples against decoding their files; images are made up.

    python -m tools.bench --cfg config.yaml          # on the device of the configuration

Both sides of a ratio take turns in one process. Prints a Markdown table of medians, in seconds.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import selftrain
import warmup
from datasets import Crops, Images, translated_images
from engine.command import arguments, command
from engine.device import memory_gb
from engine.images import read_label, resize, write_image
from engine.loop import Run
from layouts import classes
from models import build_segmenter
from settings import load_config
from tools.make_demo_data import render

VIEWS = {"warmup": 2, "selftrain": 3}  # of each image, that pass through both networks
SETTLE = 2  # the first turns, which do not count


def main():
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=10, help="repetitions (%(default)s)")
    args = parser.parse_intermixed_args()
    asked = load_config(args.cfg, args.overrides)
    print("| part | seconds | bare | ratio | first | GiB |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config(args.cfg, [*args.overrides, *make_files(asked, folder)])
        for part in (*VIEWS, "samples"):
            with contextlib.redirect_stdout(sys.stderr):
                measure = measure_steps if part in VIEWS else measure_samples
                cells = [f"{x:.4g}" for x in measure(part, cfg, args.steps).values()]
            print(f"| {' | '.join([part, *cells])} |", flush=True)


class Timed(Run):
    """A run that repeats its first batch `repeats` + SETTLE times and writes nothing.

    times: seconds of each step, and of the bare networks after it.
    """

    def __init__(self, cfg, stage, repeats):
        super().__init__(cfg, stage, stage)
        self.repeats = repeats
        self.times = ([], [])
        self.shows = False

    def steps(self, batches, total):
        batch = self.fetch(next(iter(batches)))
        views = VIEWS[self.stage] * batches.batch_size
        images = torch.rand(views, 3, *self.cfg.crop, device=self.device)
        for name in ("student", "teacher") if self.cfg.compile else ():
            self.state[name].compile()
        for step in range(self.repeats + SETTLE):
            started = now(self.device)
            yield min(step, total - 1), [batch] * self.cfg.accumulate
            between = now(self.device)
            bare_networks(self, images)
            self.times[0].append(between - started)
            self.times[1].append(now(self.device) - between)

    def save(self, *_, **__):
        """Write no checkpoint, and no result."""

    finish = save


def bare_networks(run, images):
    """Run the networks of a step: forward of both, backward of the student."""
    for _ in range(run.cfg.accumulate):
        with torch.no_grad(), run.autocast():
            run.state["teacher"](images)
        with run.autocast():
            logits, *_ = run.state["student"](images)
        logits.backward(torch.ones_like(logits))
    run.state["optimizer"].zero_grad()


def measure_steps(stage, cfg, steps):
    """Return the medians of a stage's steps and of its bare networks, and their ratio.

    first: the first step, which compiles and chooses kernels. GiB: the peak of the process so far.
    """
    run = Timed(cfg, stage, steps)
    run.is_finished(True)
    source, target = Images(cfg, "source", True), Images(cfg, "target", False)
    if stage == "warmup":
        warmup.train(run, None, source)
    else:
        first = Run(cfg, "warmup", "warmup")
        model = build_segmenter(num_classes=len(classes(cfg)), **cfg.model)
        first.save(first.result, 0, {"student": first.place(model)})
        selftrain.train(run, first.result, run.folder / "pseudo_labels", source, target)
    return ratio(*run.times) | {"first": run.times[0][0], "GiB": memory_gb(run.device)}


def measure_samples(_, cfg, steps):
    """Return the medians of a warm-up's sample and of decoding its files, and their ratio."""
    source = Images(cfg, "source", True)
    aligned = {"translated": translated_images(cfg, source)}
    crops = Crops(cfg, "bench", "source", source, cfg.warmup.batch, len(source), aligned=aligned)
    files = source.image, lambda i: read_label(source.label_paths[i]), aligned["translated"]
    times = [], []
    for n in range(5 * steps + SETTLE):
        for kept, reads in zip(times, ([crops.__getitem__], files), strict=True):
            started = time.process_time()
            for read in reads:
                read(n % len(source))
            kept.append(time.process_time() - started)
    return ratio(*times)


def ratio(ours, bare):
    """Return the medians of two lists of seconds, and their ratio."""
    ours, bare = (statistics.median(seconds[SETTLE:]) for seconds in (ours, bare))
    return {"seconds": ours, "bare": bare, "ratio": ours / bare}


def now(device):
    """Return the time in seconds, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def make_files(cfg, folder):
    """Write images and labels of both domains, the demo's, enlarged; return overrides."""
    overrides = [f"output={folder}", f"translation.images={folder}/source/images"]
    for domain in ("source", "target"):
        for i in range(4):
            size = cfg[domain].sizes[-1]
            image, label = (resize(x, size, labels=True) for x in render(0, "game", i))
            write_image(Path(folder) / f"{domain}/images/{i}.png", image)
            write_image(Path(folder) / f"{domain}/labels/{i}.png", label % len(classes(cfg)))
        keys = f"root={folder}/{domain}", "layout=folder", "split=null", "ids=index", "list=null"
        overrides += [f"{domain}.{key}" for key in keys]
    run = "name=bench bn_images=1 workers=0 model.weights=null"
    return [*overrides, *run.split(), "selftrain.diagnose=false", "selftrain.rounds=1"]


if __name__ == "__main__":
    command(main)
