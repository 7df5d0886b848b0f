"""Times the stages against what the network alone takes, on made-up images of the configuration's sizes.

    python bench.py --cfg config.yaml                                  # on the device of the configuration
    python bench.py --cfg configs/demo.yaml --steps 30 --parts warmup,loader

Both sides of each ratio run in one process, turn by turn; medians are printed, and written to bench.json.
"""

import json
import multiprocessing
import re
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter

import selftrain
import translate_cyclegan
import warmup
from config import UserError, checked, classes, load_config
from datasets import Crops, Images, Whole, translated_images
from engine import Run, _environment, _memory_gb, _plain, arguments, command
from files import write_text
from images import write_image
from losses import Centroids
from metrics import at_scales, predictions
from models import ema_update, load_segmenter, make_teacher
from translators import Generator

PARTS = "warmup,selftrain,loader,evaluate,pseudo_labels,translate,teacher,checkpoint,precision,classes,memory"


class Timed(Run):
    """A run whose loop repeats its first batch, turn by turn with the bare network on the views of that step."""

    def __init__(self, cfg, stage, section, steps, networks):
        super().__init__(cfg, stage, section)
        self.repeats, self.networks, self.times = steps, networks, ([], [])

    def steps(self, batches, first, total, state):
        batch = self.fetch(next(iter(batches)))
        bare = self.networks(self, state)
        for step in range(self.repeats + 2):
            for side, times in enumerate(self.times):
                started = now(self.device)
                if side:
                    bare()
                else:
                    yield step, [batch]
                times.append(now(self.device) - started)

    def save(self, *_, **__):
        pass

    def finish(self, steps, state):
        pass


def main():
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=10, help="repetitions of each measurement (%(default)s)")
    parser.add_argument("--parts", default=PARTS, help="what to measure (%(default)s)")
    parser.add_argument("--out", default="bench.json", help="the figures for machines (%(default)s)")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config(args.cfg, [*args.overrides, *make_files(load_config(args.cfg, args.overrides), folder)])
        figures = {"cfg": args.cfg, **_environment(Run(cfg, "bench", "evaluation").device)}
        for part in args.parts.split(","):
            if part not in MEASURES:
                raise UserError(f"--parts {part} must be of {PARTS}")
            figures[part] = MEASURES[part](cfg, args.steps)
            print(f"{part}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures[part].items()), flush=True)
    asked = load_config(args.cfg, args.overrides)
    steps = {"warmup": asked.warmup.steps, "selftrain": asked.selftrain.steps * asked.selftrain.rounds}
    figures["hours"] = {s: figures[s]["seconds"] * n / 3600 for s, n in steps.items() if s in figures}
    print("hours of training: " + ", ".join(f"{stage} {hours:.3g}" for stage, hours in figures["hours"].items()))
    write_text(args.out, json.dumps(figures, indent=1) + "\n")


def make_files(cfg, folder, count=4):
    """Writes `count` images of each domain and their labels, and a warmed-up network; returns the overrides that name them."""
    rng = np.random.default_rng(0)
    names = list(classes(cfg))
    sizes = {
        "source": cfg.source.sizes[-1],
        "target": cfg.target.sizes[-1],
        "val": cfg.val.size or cfg.target.sizes[-1],
    }
    for domain, size in sizes.items():
        for i in range(count):
            coarse = rng.integers(0, len(names), (12, 20)).astype(np.uint8)
            label = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_NEAREST)
            shades = cv2.resize(rng.integers(0, 256, (60, 100, 3)).astype(np.uint8), size[::-1])
            image = cv2.add(shades, rng.integers(0, 12, (*size, 3)).astype(np.uint8))
            write_image(f"{folder}/{domain}/images/{i}.png", image)
            write_image(f"{folder}/{domain}/labels/{i}.png", label)
    overrides = [f"{domain}.{key}" for domain in sizes for key in
                 (f"root={folder}/{domain}", "layout=folder", "split=null", "ids=index", "list=null")]  # fmt: skip
    return [*overrides, f"translation.images={folder}/source/images", f"output={folder}", "name=bench", "bn_images=1",
            "selftrain.diagnose=false", "val_every=0", "workers=0", "model.weights=null", "selftrain.rounds=1"]  # fmt: skip


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def ratio(ours, bare, first=2):
    """Medians in seconds, without the first turns, and ours / bare."""
    ours, bare = statistics.median(ours[first:]), statistics.median(bare[first:])
    return {"seconds": ours, "bare": bare, "ratio": ours / bare}


def alternate(device, steps, ours, bare):
    times = ([], [])
    for _ in range(steps + 2):
        for run, kept in zip((ours, bare), times, strict=True):
            started = now(device)
            run()
            kept.append(now(device) - started)
    return ratio(*times)


def bare_step(views):
    """Student forward and backward and teacher forward, on as many random views as the step has."""

    def networks(run, state):
        student, teacher = run.compiled(state["student"]), run.compiled(state["teacher"])
        images = torch.rand(views, 3, *run.cfg.crop, device=run.device)

        def bare():
            with torch.no_grad(), run.autocast():
                teacher(images)
            with run.autocast():
                logits, *_ = student(images)
            logits.backward(torch.ones_like(logits))
            state["optimizer"].zero_grad()

        return bare

    return networks


def measure_warmup(cfg, steps):
    run = Timed(cfg, "warmup", "warmup", steps, bare_step(2 * sum(cfg.warmup.batch)))
    run.is_finished(True)
    warmup.train(run)
    return ratio(*run.times) | {"memory_gb": _memory_gb(run.device)}


def warmed_up(cfg):
    """The file of an untrained network, as a warm-up leaves it."""
    run = Run(cfg, "warmup", "warmup")
    run.is_finished(True)
    student = warmup.build_segmenter(num_classes=len(classes(cfg)), **cfg.model)
    run.save(run.result, 0, {"student": student})
    return run.result


def measure_selftrain(cfg, steps):
    run = Timed(cfg, "selftrain", "selftrain", steps, bare_step(3 * sum(cfg.selftrain.batch)))
    init = warmed_up(cfg)
    run.is_finished(True)
    selftrain.train(run, init, run.folder / "pseudo_labels")
    return ratio(*run.times) | {"memory_gb": _memory_gb(run.device)}


def measure_loader(cfg, steps):
    source = Images(cfg, "source", labelled=True)
    batch = [0] * (len(cfg.source.sizes) - 1) + [1]
    crops = Crops(cfg, "bench", "source", source, batch, 10**6, translated=translated_images(cfg, source))
    at = iter(range(10**6))
    paths = [(source.folder / name, label) for name, label in zip(source.names, source.label_paths, strict=True)]

    def decode():
        image, label = paths[crops._index(decode.n)]
        decode.n += 1
        for path, flag in ((image, cv2.IMREAD_COLOR), (label, cv2.IMREAD_UNCHANGED), (image, cv2.IMREAD_COLOR)):
            cv2.imread(str(path), flag)

    decode.n = 0
    return alternate(torch.device("cpu"), 5 * steps, lambda: crops[next(at)], decode)


def measure_evaluate(cfg, steps):
    run = Run(cfg, "evaluate", "evaluation")
    model = run.place(load_segmenter(warmed_up(cfg), cfg)[0]).eval()
    whole = Whole(Images(cfg, "val", labelled=True), cfg.val.size)
    return alternate(run.device, steps, lambda: list(predictions(run, model, whole, cfg.evaluation.scales)),
                     bare_pass(run, model, whole, cfg.evaluation.scales))  # fmt: skip


def bare_pass(run, model, whole, scales):
    images = [torch.from_numpy(sample["image"]).permute(2, 0, 1)[None] / 255 for sample in whole]
    images = [image.to(run.device).contiguous(memory_format=torch.channels_last) for image in images]

    @torch.no_grad()
    def bare():
        for image in images:
            with run.autocast():
                at_scales(model, image, scales)

    return bare


def measure_pseudo_labels(cfg, steps):
    run = Run(cfg, "selftrain", "selftrain")
    model = run.place(load_segmenter(warmed_up(cfg), cfg)[0]).eval()
    target = Images(cfg, "target", labelled=False)
    centroids = Centroids(len(classes(cfg)), model.channels).to(run.device)
    folder = run.folder / "pseudo_labels"
    return alternate(run.device, steps, lambda: list(selftrain.label_target(run, model, target, centroids, folder)),
                     bare_pass(run, model, Whole(target, cfg.target.sizes[-1]), selftrain.SCALES))  # fmt: skip


def measure_translate(cfg, steps):
    run = Run(cfg, "translator", "translation")
    generator = run.place(Generator(cfg.translation.filters, cfg.translation.blocks))
    source = Images(cfg, "source", labelled=False)
    weights = run.folder / "translator.pth"
    run.folder.mkdir(parents=True, exist_ok=True)

    def ours():
        weights.touch()  # newer than what is there, so that all is written again
        translate_cyclegan.write(run, generator, source, weights)

    def bare(images=bare_images(run, source)):  # noqa: B008
        with torch.no_grad(), run.autocast():
            for image in images:
                generator(image)

    return alternate(run.device, steps, ours, bare)


def bare_images(run, source):
    return [torch.from_numpy(source.image(i)[: len(source.image(i)) // 4 * 4]).permute(2, 0, 1)[None].to(run.device) / 255
            for i in range(len(source))]  # fmt: skip


def measure_teacher(cfg, steps):
    run = Run(cfg, "warmup", "warmup")
    student = run.place(load_segmenter(warmed_up(cfg), cfg)[0])
    teacher, times = make_teacher(student), []
    for _ in range(steps + 2):
        started = now(run.device)
        ema_update(teacher, student, 1000)
        times.append(now(run.device) - started)
    return {"seconds": statistics.median(times[2:])}


def measure_checkpoint(cfg, steps):
    """Writing a checkpoint, and sample pictures, and their share of a warm-up at the configuration's intervals."""
    run, parts = Timed(cfg, "warmup", "warmup", steps, lambda _, state: parts.append(state) or (lambda: None)), []
    run.is_finished(True)
    warmup.train(run)
    times = []
    for _ in range(3):
        started = now(run.device)
        Run.save(run, run.unfinished, 0, parts[0])
        times.append(now(run.device) - started)
    pictures = {f"image_{k}": torch.rand(1, 3, *cfg.crop, device=run.device) for k in range(4)}
    pictures |= {f"labels_{k}": torch.randint(2, (1, *cfg.crop), device=run.device) for k in range(3)}
    run.shows, shown = 1, []
    with SummaryWriter(run.folder / "tensorboard") as run.writer:
        for _ in range(3):
            started = now(run.device)
            run.show(**pictures)
            shown.append(now(run.device) - started)
    step, seconds, of_pictures = map(statistics.median, (run.times[0][2:], times, shown))
    return {"seconds": seconds, "share_percent": 100 * seconds / (step * cfg.save_every),
            "pictures": of_pictures, "pictures_percent": 100 * of_pictures / (step * cfg.pictures_every)}  # fmt: skip


def compare(configs, steps, blocks=3):
    """Warm-up steps of two configurations, in turns of some steps each."""
    runs = [Timed(cfg, "warmup", "warmup", steps, lambda *_: lambda: None) for cfg in configs]
    for _ in range(blocks):
        for run in runs:
            run.is_finished(True)
            warmup.train(run)
    times = [[t for at, t in enumerate(run.times[0]) if at % (steps + 2) >= 2] for run in runs]
    ours, theirs = map(statistics.median, times)
    return {"seconds": ours, "theirs": theirs, "ratio": ours / theirs}


def measure_precision(cfg, steps):
    """The configuration's precision against single precision."""
    return compare([cfg, checked(cfg, ["precision=fp32"], "bench")], steps)


def measure_classes(cfg, steps):
    """150 classes against 19."""
    names = [{f"c{k}": [k, k, k] for k in range(n)} for n in (150, 19)]
    return compare(
        [checked(dict(cfg, classes=n, evaluation=dict(cfg.evaluation, subsets={})), [], "bench") for n in names], steps
    )


def measure_memory(cfg, steps):
    """The peak of a process that takes a few warm-up steps, against losses written the plain way, there and in single precision."""
    peaks = []
    for plain, precision in ((False, cfg.precision), (True, cfg.precision), (True, "fp32")):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks.append(pool.apply(_peak_gb, (_plain(cfg) | {"precision": precision, "name": "memory"}, plain)))
    ours, plain, single = peaks
    return {"gb": ours, "plain_gb": plain, "ratio": ours / plain, "plain_fp32_gb": single, "fp32_ratio": ours / single}


def _peak_gb(tree, plain):
    def supervised_loss(logits, labels):
        logits = F.interpolate(logits.float(), labels.shape[-2:], mode="bilinear", align_corners=True)
        return F.cross_entropy(logits, labels, ignore_index=255, reduction="sum") / labels.numel()

    def symmetric_distillation(student, teacher, strong_to_weak, size):
        student = F.interpolate(student.float(), size, mode="bilinear", align_corners=True)
        teacher = F.interpolate(teacher.float(), size, mode="bilinear", align_corners=True).softmax(1)
        (weak, strong), (weak_p, strong_p) = student.chunk(2), teacher.chunk(2)
        return F.cross_entropy(strong, weak_p) + strong_to_weak * F.cross_entropy(weak, strong_p)

    if plain:
        warmup.supervised_loss, warmup.symmetric_distillation = supervised_loss, symmetric_distillation
    run = Timed(checked(tree, [], "bench"), "warmup", "warmup", 2, lambda *_: lambda: None)
    run.is_finished(True)
    warmup.train(run)
    if run.device.type == "cuda":
        return _memory_gb(run.device)
    # of this process alone; what getrusage says begins with the parent's peak
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


MEASURES = {part: globals()[f"measure_{part}"] for part in PARTS.split(",")}

if __name__ == "__main__":
    command(main)
