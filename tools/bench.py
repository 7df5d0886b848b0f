"""Time every stage against its bare networks, on made-up images of the configuration's sizes.

    python -m tools.bench --cfg config.yaml          # on the device of the configuration
    python -m tools.bench --cfg configs/demo.yaml --steps 30 --parts warmup,loader

Both sides of a ratio take turns in one process. Prints the medians and writes them to bench.json.
"""

import functools
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from engine.run import Run
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import selftrain
import translate_cyclegan
import warmup
from datasets import Crops, Images, Whole, translated_images
from engine.command import arguments, command
from engine.config import UserError, plain
from engine.device import environment, memory_gb
from engine.files import write_text
from engine.folders import Aligned
from engine.images import keep_freed_memory, read_label
from losses import Centroids, upsample
from metrics import at_scales, predictions
from models import ema_update, load_segmenter, make_teacher
from settings import checked, classes, load_config
from tools.pack import pack
from tools.timed import Timed, bare_networks, make_files, times, train, warmed_up
from translate_cyclegan import Generator

GPU_STEP = {"warmup": 0.094, "selftrain": 0.140}  # seconds of a step of config.yaml on a GPU


def main():
    parser = arguments(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=10, help="repetitions of each measurement (%(default)s)")
    add("--parts", default=PARTS, help="what to measure (%(default)s)")
    add("--out", default="bench.json", help="the JSON file to write (%(default)s)")
    args = parser.parse_intermixed_args()
    asked = load_config(args.cfg, args.overrides)
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config(args.cfg, [*args.overrides, *make_files(asked, folder)])
        figures = {"cfg": args.cfg, **environment(Run(cfg, "bench", "evaluation").device)}
        for part in args.parts.split(","):
            if part not in MEASURES:
                raise UserError(f"--parts {part}: there is no such part; choose from {PARTS}")
            figures[part] = MEASURES[part](cfg, args.steps)
            words = (f"{key} {value:.4g}" for key, value in figures[part].items())
            print(f"{part}: {', '.join(words)}", flush=True)
    steps = {"warmup": asked.warmup.steps}
    steps["selftrain"] = asked.selftrain.steps * asked.selftrain.rounds
    hours = {s: figures[s]["seconds"] * n / 3600 for s, n in steps.items() if s in figures}
    print("hours of training: " + ", ".join(f"{stage} {x:.3g}" for stage, x in hours.items()))
    write_text(args.out, json.dumps(figures | {"hours": hours}, indent=1) + "\n")


def ratio(ours, bare, first=2):
    """Return the medians of two lists of seconds and ours / bare, without the first turns."""
    ours, bare = statistics.median(ours[first:]), statistics.median(bare[first:])
    return {"seconds": ours, "bare": bare, "ratio": ours / bare}


def alternate(device, steps, ours, bare):
    """Return the ratio of two functions that are called in turns."""
    return ratio(*times(device, steps + 2, ours, bare))


def bare_pass(run, model, whole, scales):
    """Return a function that passes all images of a datasets.Whole through the model."""
    images = [torch.from_numpy(sample["image"]).permute(2, 0, 1)[None] / 255 for sample in whole]
    images = [x.to(run.device).contiguous(memory_format=torch.channels_last) for x in images]

    @torch.no_grad()
    def bare():
        for image in images:
            with run.autocast():
                at_scales(model, image, scales)

    return bare


def measure_warmup(cfg, steps):
    bare = functools.partial(bare_networks, 2 * sum(cfg.warmup.batch))
    run = train(Timed(cfg, "warmup", "warmup", steps, bare))
    return ratio(*run.times) | {"memory_gb": memory_gb(run.device)}


def measure_selftrain(cfg, steps):
    bare = functools.partial(bare_networks, 3 * sum(cfg.selftrain.batch))
    run = train(Timed(cfg, "selftrain", "selftrain", steps, bare))
    return ratio(*run.times) | {"memory_gb": memory_gb(run.device)}


def measure_loader(cfg, steps):
    """Time a sample of the warm-up and one of self-training against decoding their files.

    In core-seconds. cores: how many load the batches of a GPU whose step takes GPU_STEP.
    """
    source, target = Images(cfg, "source", labelled=True), Images(cfg, "target", labelled=False)
    pseudo = Aligned(f"{cfg.output}/target/pseudo", target.names, read_label, "")
    translated = translated_images(cfg, source)
    batch = [0] * (len(cfg.source.sizes) - 1) + [1]
    of_source = Crops(cfg, "bench", "source", source, batch, 10**6, translated=translated)
    of_target = Crops(cfg, "bench", "target", target, batch, 10**6, pseudo=pseudo)

    def decode(crops, n):
        i = crops._index(n)
        cv2.imread(str(crops.images.folder / crops.images.names[i]))
        if crops is of_target:
            cv2.imread(str(pseudo.paths[i]), cv2.IMREAD_UNCHANGED)
        else:
            cv2.imread(str(translated.paths[i]))
            np.array(Image.open(source.label_paths[i]))

    keep_freed_memory()  # as in a DataLoader worker
    calls = [crops.__getitem__ for crops in (of_source, of_target)]
    calls += [functools.partial(decode, crops) for crops in (of_source, of_target)]
    seconds = [[] for _ in calls]
    for n in range(5 * steps + 2):
        for call, kept in zip(calls, seconds, strict=True):
            started = time.process_time()
            call(n)
            kept.append(time.process_time() - started)
    ours, ours_target, bare, bare_target = (statistics.median(kept[2:]) for kept in seconds)
    both, bare_both = ours + ours_target, bare + bare_target
    figures = {"seconds": ours, "bare": bare, "ratio": ours / bare}
    figures["cores"] = ours * sum(cfg.warmup.batch) / GPU_STEP["warmup"]
    figures |= {"selftrain": both, "selftrain_bare": bare_both, "selftrain_ratio": both / bare_both}
    figures["selftrain_cores"] = both * sum(cfg.selftrain.batch) / GPU_STEP["selftrain"]
    return figures


def measure_packed(cfg, steps):
    """Time the same samples from the files that tools.pack writes."""
    roots = {domain: Path(cfg.output) / "packed" / domain for domain in ("source", "target")}
    for domain, root in roots.items():
        pack(Images(cfg, domain, labelled=domain == "source"), cfg[domain], root)
    overrides = [f"{domain}.root={root}" for domain, root in roots.items()]
    return measure_loader(checked(cfg, overrides, "bench"), steps)


def measure_evaluate(cfg, steps):
    run = Run(cfg, "evaluate", "evaluation")
    model = run.place(load_segmenter(warmed_up(cfg), cfg)[0]).eval()
    whole, scales = Whole(Images(cfg, "val", labelled=True), cfg.val.size), cfg.evaluation.scales
    bare = bare_pass(run, model, whole, scales)
    return alternate(run.device, steps, lambda: [*predictions(run, model, whole, scales)], bare)


def measure_pseudo_labels(cfg, steps):
    run = Run(cfg, "selftrain", "selftrain")
    model = run.place(load_segmenter(warmed_up(cfg), cfg)[0]).eval()
    target = Images(cfg, "target", labelled=False)
    centroids = Centroids(len(classes(cfg)), model.channels).to(run.device)
    what = run, model, target, centroids, run.folder / "pseudo_labels"
    bare = bare_pass(run, model, Whole(target, cfg.target.sizes[-1]), selftrain.SCALES)
    return alternate(run.device, steps, lambda: [*selftrain.label_target(*what)], bare)


def measure_translate(cfg, steps):
    run = Run(cfg, "translator", "translation")
    generator = run.place(Generator(cfg.translation.filters, cfg.translation.blocks))
    source = Images(cfg, "source", labelled=False)
    images = [torch.from_numpy(source.image(i)) for i in range(len(source))]
    images = [x[: len(x) // 4 * 4].permute(2, 0, 1)[None].to(run.device) / 255 for x in images]
    weights = run.folder / "translator.pth"
    run.folder.mkdir(parents=True, exist_ok=True)

    def ours():
        weights.touch()  # newer than the translated images, so that all are written again
        translate_cyclegan.write(run, generator, source, weights)

    @torch.no_grad()
    def bare():
        with run.autocast():
            for image in images:
                generator(image)

    return alternate(run.device, steps, ours, bare)


def measure_teacher(cfg, steps):
    run = Run(cfg, "warmup", "warmup")
    student = run.place(load_segmenter(warmed_up(cfg), cfg)[0])
    teacher = make_teacher(student)
    [update] = times(run.device, steps + 2, lambda: ema_update(teacher, student, 1000))
    return {"seconds": statistics.median(update[2:])}


def measure_checkpoint(cfg, steps):
    """Time a checkpoint and sample pictures; their share of a warm-up at the set intervals."""
    run = train(Timed(cfg, "warmup", "warmup", steps))
    [save] = times(run.device, 3, lambda: Run.save(run, run.unfinished, 0, run.state))
    one, device = (1, *cfg.crop), run.device
    pictures = {f"image_{k}": torch.rand(1, 3, *cfg.crop, device=device) for k in range(4)}
    pictures |= {f"labels_{k}": torch.randint(2, one, device=device) for k in range(3)}
    run.shows = 1
    with SummaryWriter(run.folder / "tensorboard") as run.figures.writer:
        [show] = times(run.device, 3, lambda: run.show(classes(cfg), **pictures))
    step, save, show = map(statistics.median, (run.times[0][2:], save, show))
    figures = {"seconds": save, "share_percent": 100 * save / step / cfg.save_every}
    return figures | {"pictures": show, "pictures_percent": 100 * show / step / cfg.pictures_every}


def compare(ours, theirs, steps, blocks=3):
    """Time warm-up steps of two configurations, in turns of `steps` steps each."""
    runs = [Timed(cfg, "warmup", "warmup", steps) for cfg in (ours, theirs)]
    for run in runs * blocks:
        train(run)
    taken = [[t for at, t in enumerate(run.times[0]) if at % (steps + 2) >= 2] for run in runs]
    ours, theirs = map(statistics.median, taken)
    return {"seconds": ours, "theirs": theirs, "ratio": ours / theirs}


def measure_precision(cfg, steps):
    """Time the configuration's precision against single precision."""
    return compare(cfg, checked(cfg, ["precision=fp32"], "bench"), steps)


def measure_classes(cfg, steps):
    """Time 150 classes against 19."""
    cfg = dict(cfg, evaluation=dict(cfg.evaluation, subsets={}))
    colours = {n: {f"c{k}": [k, k, k] for k in range(n)} for n in (150, 19)}
    cfgs = [checked(cfg | {"classes": colours[n]}, [], "bench") for n in colours]
    return compare(*cfgs, steps)


def measure_memory(cfg, steps):
    """Return the peak in GiB of a warm-up, of one with plain losses, and of that in fp32."""
    peaks = []
    for plainly, precision in ((False, cfg.precision), (True, cfg.precision), (True, "fp32")):
        tree = plain(cfg) | {"precision": precision, "name": "memory"}
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks.append(pool.apply(_peak_gb, (tree, plainly)))
    ours, theirs, single = peaks
    figures = {"gb": ours, "plain_gb": theirs, "ratio": ours / theirs}
    return figures | {"plain_fp32_gb": single, "fp32_ratio": ours / single}


def _peak_gb(tree, plainly):
    """Return the peak memory of some warm-up steps, with the losses in their plain form or not."""

    def supervised_loss(logits, labels):
        logits = upsample(logits, labels.shape[-2:])
        return F.cross_entropy(logits, labels, ignore_index=255, reduction="sum") / labels.numel()

    def symmetric_distillation(student, teacher, strong_to_weak, size):
        weak, strong = upsample(student, size).chunk(2)
        weak_p, strong_p = upsample(teacher, size).softmax(1).chunk(2)
        return F.cross_entropy(strong, weak_p) + strong_to_weak * F.cross_entropy(weak, strong_p)

    if plainly:
        warmup.supervised_loss = supervised_loss
        warmup.symmetric_distillation = symmetric_distillation
    return memory_gb(train(Timed(checked(tree, [], "bench"), "warmup", "warmup", 2)).device)


MEASURES = {name[8:]: f for name, f in dict(globals()).items() if name.startswith("measure_")}
PARTS = ",".join(MEASURES)

if __name__ == "__main__":
    command(main)
