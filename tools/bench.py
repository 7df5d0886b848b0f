"""Time every stage against its bare networks, on made-up images of a configuration's sizes.

    python -m tools.bench --cfg config.yaml          # on the device of the configuration
    python -m tools.bench --cfg configs/demo.yaml --steps 30 --parts warmup,loader
    python -m tools.bench --cfg config.yaml precision=bf16 compile=true

Both sides of a ratio take turns in one process. Prints a Markdown table of medians, seconds where
nothing else is said, and writes the same to a JSON file. Where there is a GPU, its tests run too.
"""

import contextlib
import functools
import itertools
import json
import multiprocessing
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
from engine.config import UserError, plain
from engine.device import environment, memory_gb
from engine.files import write_text
from engine.folders import Aligned
from engine.images import read_image, read_label, write_image
from engine.loop import Run
from layouts import classes
from losses import Centroids
from metrics import at_scales, predictions
from models import build_segmenter
from settings import checked, load_config

ROOT = Path(__file__).parent.parent
VIEWS = {"warmup": 2, "selftrain": 3}  # of each image, which pass through both networks
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
        super().__init__(cfg, stage, "translation" if stage == "translator" else stage)
        self.repeats, self.times = repeats, ([], [])

    def steps(self, batches, total):
        self.shows, batch = False, self.fetch(next(iter(batches)))
        views = VIEWS.get(self.stage, 0) * batches.batch_size
        images = torch.rand(views, 3, *self.cfg.crop, device=self.device)
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


def train(run):
    """Run the loop of a Timed, without what its stage needs to have been done before."""
    run.is_finished(True)
    source, target = Images(run.cfg, "source", True), Images(run.cfg, "target", False)
    if run.stage == "translator":
        translate_cyclegan.train(run, source, target)
    elif run.stage == "warmup":
        warmup.train(run, None, source)
    else:
        first, model = network(run.cfg, "warmup")
        first.save(first.result, 0, {"student": model})
        selftrain.train(run, first.result, run.folder / "pseudo_labels", source, target)
    return run


def time_steps(tree, stage, steps):
    """Return a stage's row of the table. tree: the configuration, as plain dicts."""
    run = train(Timed(checked(tree, [], "bench"), stage, steps))
    found = ratio(*run.times) if stage in VIEWS else {"seconds": median(run.times[0])}
    return found | {"first": run.times[0][0], "GiB": memory_gb(run.device)}


def measure_step(stage, cfg, steps):
    """Time a stage's steps. first: the first one, which compiles and chooses kernels. GiB: peak."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # no other part's peak
        return pool.apply(time_steps, (plain(cfg), stage, steps))


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

    ours, bare = (map(call, itertools.count()).__next__ for call in (crops.__getitem__, decode))
    return in_turns(time.process_time, 5 * steps, ours, bare)


def measure_evaluate(cfg, steps):
    run, model = network(cfg, "evaluation")
    given = model, Whole(Images(cfg, "val", labelled=True), cfg.val.size), cfg.evaluation.scales
    return against_networks(run, steps, lambda: [*predictions(run, *given)], *given)


def measure_pseudo_labels(cfg, steps):
    run, model = network(cfg, "selftrain")
    target = Images(cfg, "target", labelled=False)
    centroids = Centroids(len(classes(cfg)), model.channels).to(run.device)
    given = run, model, target, centroids, run.folder / "pseudo_labels"
    networks = model, Whole(target, cfg.target.sizes[-1]), selftrain.SCALES
    return against_networks(run, steps, lambda: [*selftrain.label_target(*given)], *networks)


def measure_translate(cfg, steps):
    run = Run(cfg, "translator", "translation")
    generator = translate_cyclegan.Generator(cfg.translation.filters, cfg.translation.blocks)
    generator, source = run.place(generator), Images(cfg, "source", labelled=False)

    def ours():
        folder = run.folder / "translated"
        translate_cyclegan.write(run, generator, source, folder, time.time())

    return against_networks(run, steps, ours, generator, Whole(source), [1])


def measure_gpu_tests(cfg, steps):
    """Run the tests that need a GPU; return how many passed and how many did not."""
    if not torch.cuda.is_available():
        return {}
    ask = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    out = subprocess.run(ask, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False).stdout
    print(out)
    outcome = re.findall(r"(\d+) (\w+)", out.strip().rpartition("\n")[2])
    return {word: int(count) for count, word in outcome}


PARTS = {
    "translator": functools.partial(measure_step, "translator"),
    "warmup": functools.partial(measure_step, "warmup"),
    "selftrain": functools.partial(measure_step, "selftrain"),
    "loader": measure_loader,
    "evaluate": measure_evaluate,
    "pseudo_labels": measure_pseudo_labels,
    "translate": measure_translate,
    "gpu_tests": measure_gpu_tests,
}


def now(device):
    """Return the time in seconds, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def in_turns(clock, turns, *calls):
    """Return the ratio of two functions that are called in turns."""
    seconds = [], []
    for _ in range(turns + SETTLE):
        for call, kept in zip(calls, seconds, strict=True):
            started = clock()
            call()
            kept.append(clock() - started)
    return ratio(*seconds)


def median(seconds):
    return statistics.median(seconds[SETTLE:])


def ratio(ours, bare):
    """Return the medians of two lists of seconds, and their ratio."""
    ours, bare = median(ours), median(bare)
    return {"seconds": ours, "bare": bare, "ratio": ours / bare}


@torch.no_grad()
def against_networks(run, steps, ours, model, whole, scales):
    """Return the ratio of a function to passing all images of a datasets.Whole through the model.

    The images are on the device; their sides are cut to multiples of 4.
    """
    images = [run.fetch(torch.tensor(sample["image"])[None]) for sample in whole]
    images = [x[..., : x.shape[2] // 4 * 4, : x.shape[3] // 4 * 4] for x in images]

    def bare():
        for image in images:
            with run.autocast():
                at_scales(model, image, scales)

    return in_turns(functools.partial(now, run.device), steps, ours, bare)


def network(cfg, section):
    """Return a run and an untrained network, on its device and in eval mode."""
    run = Run(cfg, "warmup", section)
    model = build_segmenter(num_classes=len(classes(cfg)), **cfg.model)
    return run, run.place(model).eval()


def make_files(cfg, folder, count=4):
    """Write `count` images and labels of each domain; return overrides that use them.

    Source images are PNGs with filters at level 6, labels paletted, as in GTA5.
    """
    overrides = [f"output={folder}", f"translation.images={folder}/source/translated"]
    full = cfg.target.sizes[-1]
    sizes = {"source": cfg.source.sizes[-1], "target": full, "val": cfg.val.size or full}
    for domain, size in sizes.items():
        root = Path(folder) / domain
        (root / "images").mkdir(parents=True)
        (root / "labels").mkdir()
        for i in range(count):
            image, label = scene(np.random.default_rng(i), size, len(classes(cfg)))
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


def scene(rng, size, count):
    """Return an image of discs that hide each other and its label of `count` classes, uint8.

    Disc sizes follow r^-3 ("dead leaves"): it takes as long to decode as a photograph.
    """
    image, label = np.full((*size, 3), 128, np.uint8), np.zeros(size, np.uint8)
    colours = rng.integers(40, 216, (count, 1))
    for _ in range(size[0] * size[1] // 100):
        k, at = int(rng.integers(count)), rng.integers(0, size[::-1]).tolist()
        radius = 1.5 / max(rng.random(), (6 / size[0]) ** 2) ** 0.5
        shade = colours[k] + rng.normal(0, 25) + rng.normal(0, 8, 3)
        cv2.circle(image, at, max(round(radius), 1), shade.clip(0, 255).tolist(), cv2.FILLED)
        if radius > size[0] / 60:
            cv2.circle(label, at, round(radius), k, cv2.FILLED)
    image = cv2.GaussianBlur(image, (0, 0), 0.8) + rng.normal(0, 0.8, image.shape)
    return image.clip(0, 255).astype(np.uint8), label


if __name__ == "__main__":
    command(main)
