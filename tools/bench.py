"""Time the stages against their bare networks, on made-up images of the sizes of --cfg.

    python -m tools.bench --cfg config.yaml          # on the device of the configuration
    python -m tools.bench --cfg configs/demo.yaml --steps 30 --parts warmup,loader
    python -m tools.bench --cfg config.yaml precision=bf16 compile=true

Both sides of a ratio take turns in one process. Prints a Markdown table of medians, seconds where
nothing else is said, and writes the same to a JSON file. On a GPU, its tests are run too.
"""

import contextlib
import functools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to be run by its path too

import selftrain
import translate_cyclegan
import warmup
from datasets import Crops, Images, Whole
from engine.command import arguments, command
from engine.config import UserError
from engine.device import environment, memory_gb
from engine.files import write_text
from engine.folders import Aligned
from engine.images import read_image, read_label, write_image
from engine.loop import Run
from layouts import classes
from metrics import at_scales, predictions
from models import build_segmenter
from settings import load_config
from tools.make_demo_data import render

# stage -> its section, and the views of each image that pass through both networks
STAGES = {"translator": ("translation", 0), "warmup": ("warmup", 2), "selftrain": ("selftrain", 3)}
SETTLE = 2  # the first turns, which do not count


def main():
    parser = arguments(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=10, help="repetitions of each measurement (%(default)s)")
    add("--parts", default=",".join(PARTS), help="what to measure (%(default)s)")
    add("--out", default="bench.json", help="the JSON file to write (%(default)s)")
    args = parser.parse_intermixed_args()
    asked, parts = load_config(args.cfg, args.overrides), args.parts.split(",")
    for part in parts:
        if part not in PARTS:
            raise UserError(f"--parts {part}: no such part; choose from {', '.join(PARTS)}")
    machine = environment(Run(asked, "bench", "evaluation").device)
    figures = {"cfg": args.cfg, "overrides": args.overrides} | machine
    print("| part | seconds | bare | ratio | more |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config(args.cfg, [*args.overrides, *make_files(asked, folder)])
        for part in parts:
            with contextlib.redirect_stdout(sys.stderr):
                figures[part] = PARTS[part](cfg, args.steps)
            words = {key: f"{value:.4g}" for key, value in figures[part].items()}
            cells = [words.pop(key, "") for key in ("seconds", "bare", "ratio")]
            cells.append(", ".join(f"{key} {word}" for key, word in words.items()))
            print(f"| {' | '.join([part, *cells])} |", flush=True)
            write_text(args.out, json.dumps(figures, indent=1) + "\n")


class Timed(Run):
    """A run that repeats its first batch `repeats` + SETTLE times and writes nothing.

    times: seconds of each step, and of the bare networks after it.
    """

    def __init__(self, cfg, stage, repeats):
        super().__init__(cfg, stage, STAGES[stage][0])
        self.repeats = repeats
        self.times = ([], [])
        self.shows = False

    def steps(self, batches, total):
        batch = self.fetch(next(iter(batches)))
        views = STAGES[self.stage][1] * batches.batch_size
        images = torch.rand(views, 3, *self.cfg.crop, device=self.device)
        for name in ("student", "teacher") if self.cfg.compile and views else ():
            self.state[name].compile()
        for step in range(self.repeats + SETTLE):
            started = now(self.device)
            yield min(step, total - 1), [batch] * self.cfg.accumulate
            between = now(self.device)
            if views:
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


def measure_step(stage, cfg, steps):
    """Time a stage's steps.

    first: the first step, which compiles and chooses kernels. GiB: the peak of the process so far.
    """
    run = Timed(cfg, stage, steps)
    run.is_finished(True)
    source, target = Images(cfg, "source", True), Images(cfg, "target", False)
    if stage == "translator":
        translate_cyclegan.train(run, source, target)
    elif stage == "warmup":
        warmup.train(run, None, source)
    else:
        first = Run(cfg, "warmup", "warmup")
        model = build_segmenter(num_classes=len(classes(cfg)), **cfg.model)
        first.save(first.result, 0, {"student": first.place(model)})
        selftrain.train(run, first.result, run.folder / "pseudo_labels", source, target)
    found = {"first": run.times[0][0], "GiB": memory_gb(run.device)}
    if stage == "translator":
        return found | {"seconds": statistics.median(run.times[0][SETTLE:])}
    return found | ratio(*run.times)


def measure_loader(cfg, steps):
    """Time a sample of the warm-up, and one of self-training, against decoding their files."""
    source = time_samples(cfg, "source", "translated", read_image, steps)
    target = time_samples(cfg, "target", "pseudo", read_label, steps)
    ours, bare = source["seconds"] + target["seconds"], source["bare"] + target["bare"]
    return source | {"selftrain": ours, "selftrain_bare": bare, "selftrain_ratio": ours / bare}


def time_samples(cfg, domain, kind, read, steps):
    """Time samples of one image at full size, with the file of `kind` that belongs to it."""
    images = Images(cfg, domain, labelled=domain == "source")
    aligned = Aligned(f"{cfg.output}/{domain}/{kind}", images.names, read, "")
    batch = [0] * (len(cfg[domain].sizes) - 1) + [1]
    crops = Crops(cfg, "bench", domain, images, batch, 10**6, aligned={kind: aligned})

    def decode(n):
        i = crops._index(n)
        cv2.imread(str(images.folder / images.names[i]))
        cv2.imread(str(aligned.paths[i]), cv2.IMREAD_UNCHANGED)
        if images.labelled:
            np.array(Image.open(images.label_paths[i]))  # paletted

    seconds = [], []
    for n in range(5 * steps + SETTLE):
        for call, kept in zip((crops.__getitem__, decode), seconds, strict=True):
            started = time.process_time()
            call(n)
            kept.append(time.process_time() - started)
    return ratio(*seconds)


@torch.no_grad()
def measure_evaluate(cfg, steps):
    """Time the segmentation of all target images against the networks alone."""
    run = Run(cfg, "evaluate", "evaluation")
    model = build_segmenter(num_classes=len(classes(cfg)), **cfg.model)
    model = run.place(model).eval()
    whole = Whole(Images(cfg, "target", False), cfg.val.size)
    images = [run.fetch(torch.tensor(sample["image"][None])) for sample in whole]
    seconds = [], []
    for _ in range(steps + SETTLE):
        started = now(run.device)
        list(predictions(run, model, whole, cfg.evaluation.scales))
        between = now(run.device)
        for image in images:
            with run.autocast():
                at_scales(model, image, cfg.evaluation.scales)
        seconds[0].append(between - started)
        seconds[1].append(now(run.device) - between)
    return ratio(*seconds)


def measure_gpu_tests(cfg, steps):
    """Run the tests that need a GPU; return how many passed and how many did not."""
    if not torch.cuda.is_available():
        return {}
    ask = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    root = Path(__file__).parent.parent
    out = subprocess.run(ask, cwd=root, stdout=subprocess.PIPE, text=True, check=False).stdout
    print(out)
    outcome = re.findall(r"(\d+) (\w+)", out.strip().rpartition("\n")[2])
    return {word: int(count) for count, word in outcome}


PARTS = {stage: functools.partial(measure_step, stage) for stage in STAGES}
PARTS |= {"loader": measure_loader, "evaluate": measure_evaluate, "gpu_tests": measure_gpu_tests}


def now(device):
    """Return the time in seconds, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def ratio(ours, bare):
    """Return the medians of two lists of seconds, and their ratio."""
    ours, bare = (statistics.median(seconds[SETTLE:]) for seconds in (ours, bare))
    return {"seconds": ours, "bare": bare, "ratio": ours / bare}


def make_files(cfg, folder, count=4):
    """Write `count` images and labels of each domain; return overrides that use them.

    They are the demo's, enlarged, with noise: PNGs as large as those of photographs. Labels are
    paletted, as in GTA5.
    """
    rng = np.random.default_rng(0)
    overrides = [f"output={folder}", f"translation.images={folder}/source/translated"]
    for domain in ("source", "target"):
        root, size = Path(folder) / domain, cfg[domain].sizes[-1]
        (root / "images").mkdir(parents=True)
        (root / "labels").mkdir()
        for i in range(count):
            image, label = (cv2.resize(x, size[::-1]) for x in render(0, "game", i))
            image = (image + rng.normal(0, 1.5, image.shape)).clip(0, 255).astype(np.uint8)
            label %= len(classes(cfg))
            Image.fromarray(image).save(root / f"images/{i}.png")
            paletted = Image.frombytes("P", size[::-1], label.tobytes())
            paletted.putpalette([*range(256)] * 3)
            paletted.save(root / f"labels/{i}.png")
            write_image(root / f"translated/{i}.jpg", image)
            write_image(root / f"pseudo/{i}.png", label)
        keys = f"root={root}", "layout=folder", "split=null", "ids=index", "list=null"
        overrides += [f"{domain}.{key}" for key in keys]
    run = "name=bench bn_images=1 workers=0 model.weights=null"
    return [*overrides, *run.split(), "selftrain.diagnose=false", "selftrain.rounds=1"]


if __name__ == "__main__":
    command(main)
