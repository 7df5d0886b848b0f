"""Runs of a stage that measure it and write no result, on made-up images; for bench, gpu_hour."""

import itertools
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from engine.run import Run
from PIL import Image

import selftrain
import translate_cyclegan
import warmup
from datasets import Images
from engine.images import threads, write_image
from losses import supervised_loss, symmetric_distillation
from models import build_segmenter
from settings import classes

SETTLE = 4  # steps before those that are measured


class Timed(Run):
    """A run whose loop repeats its first batch `steps` + 2 times, and which writes no result.

    networks(run, state) returns a function: the bare networks of a step. times: seconds of both.
    """

    def __init__(self, cfg, stage, section, steps, networks=None):
        super().__init__(cfg, stage, section)
        self.repeats, self.networks, self.times = steps, networks, ([], [])

    def steps(self, batches, first, total, state):
        self.state, batch = state, self.fetch(next(iter(batches)))
        bare = self.networks(self, state) if self.networks else lambda: None
        for step in range(self.repeats + 2):
            started = now(self.device)
            yield min(step, total - 1), [batch]
            between = now(self.device)
            bare()
            self.times[0].append(between - started)
            self.times[1].append(now(self.device) - between)

    def save(self, *_, **__):
        pass

    finish = save


class Measured(Timed):
    """A run that fills the row `found` with its times in ms and memory, and writes no result.

    resident: the stage's step on one batch that is on the GPU; step: the stage's step, with loader
    and log; bare: networks, losses and optimizer alone.
    """

    def __init__(self, found, *arguments):
        super().__init__(*arguments)
        self.found, self.made = found, {}

    def compiled(self, network):
        """Return the compiled network, the same one for the stage and for the bare step."""
        if network not in self.made:
            self.made[network] = super().compiled(network)
        return self.made[network]

    def steps(self, batches, first, total, state):
        parts = [self.fetch(next(iter(batches)))] * self.cfg.accumulate
        began = now(self.device)
        yield first, parts
        self.found["first step s"] = now(self.device) - began
        torch.cuda.empty_cache()  # what cuDNN has tried out is not what a step needs
        torch.cuda.reset_peak_memory_stats()
        yield from self.measured("resident ms", ((first, parts) for _ in range(total)))
        self.found["GiB allocated"] = torch.cuda.max_memory_allocated() / 2**30
        self.found["GiB reserved"] = torch.cuda.max_memory_reserved() / 2**30
        yield from self.measured("step ms", Run.steps(self, batches, first, total, state))
        images = sum(self.cfg[self.section].batch)
        self.found["images/s"] = 1000 * images / self.found["step ms"]
        if "teacher" in state:
            bare = bare_step(self, state)
            for _ in self.measured("bare ms", range(total)):
                bare()
            self.found["step / bare"] = self.found["step ms"] / self.found["bare ms"]

    def measured(self, name, steps):
        """Yield `steps` and time them, without the first SETTLE and the last, which logs."""
        for step, value in enumerate(steps):
            if step == SETTLE:
                began = now(self.device)
            if step == SETTLE + self.repeats:
                self.found[name] = 1000 * (now(self.device) - began) / self.repeats
            yield value


class Loading(Timed):
    """A run that trains nothing and times the batches of its loader, the first ones left out."""

    def steps(self, batches, first, total, state):
        for step, _ in enumerate(batches, 1):
            if step == 2 * self.cfg.workers:  # so many are prefetched at once
                began = time.perf_counter()
        self.seconds = (time.perf_counter() - began) / (step - 2 * self.cfg.workers)
        yield from ()


def train(run):
    """Run the loop of a stage's Timed, without what the stage needs to have been done before."""
    run.is_finished(True)
    if run.stage == "translator":
        translate_cyclegan.train(run, Images(run.cfg, "source", labelled=True))
    elif run.stage == "selftrain":
        selftrain.train(run, warmed_up(run.cfg), run.folder / "pseudo_labels")
    else:
        warmup.train(run)
    return run


def bare_networks(views, run, state):
    """Return the networks' part of a step: forward of both, backward of the student."""
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


def bare_step(run, state):
    """Return a function: networks, losses and optimizer of a warm-up or self-training step."""
    views = 3 if run.stage == "selftrain" else 2  # of each source image
    student, teacher = map(run.compiled, (state["student"], state["teacher"]))
    size, crop = sum(run.cfg[run.section].batch) // run.cfg.accumulate, run.cfg.crop
    images = torch.rand(views * size, 3, *crop, device=run.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(len(classes(run.cfg)), (size, *crop), device=run.device)

    def bare():
        for _ in range(run.cfg.accumulate):
            with torch.no_grad(), run.autocast():
                teacher_logits, *_ = teacher(images)
            with run.autocast():
                logits, *_ = student(images)
            pair = logits[: 2 * size], teacher_logits[: 2 * size]
            loss = supervised_loss(logits[:size], labels) + symmetric_distillation(*pair, 0.5, crop)
            if views == 3:
                loss = loss + supervised_loss(logits[2 * size :], labels)
            run.scaler.scale(loss).backward()
        run.scaler.step(state["optimizer"])
        run.scaler.update()
        state["optimizer"].zero_grad()

    return bare


def make_files(cfg, folder, count=4):
    """Write `count` images and labels of each domain; return overrides that use them.

    Source images are PNGs with filters at level 6, labels paletted, as in GTA5.
    """
    full, folder = cfg.target.sizes[-1], Path(folder)
    sizes = {"source": cfg.source.sizes[-1], "target": full, "val": cfg.val.size or full}

    def make(job):
        (domain, size), i = job
        image, label = scene(np.random.default_rng(i), size, len(classes(cfg)))
        Image.fromarray(image).save(folder / domain / f"images/{i}.png")
        paletted = Image.frombytes("P", size[::-1], label.tobytes())
        paletted.putpalette([*range(256)] * 3)
        paletted.save(folder / domain / f"labels/{i}.png")
        write_image(folder / domain / f"translated/{i}.jpg", image)
        write_image(folder / domain / f"pseudo/{i}.png", label)

    for domain, kind in itertools.product(sizes, ("images", "labels")):
        (folder / domain / kind).mkdir(parents=True, exist_ok=True)
    list(threads.map(make, itertools.product(sizes.items(), range(count))))
    overrides = [f"output={folder}", f"translation.images={folder}/source/translated"]
    for domain in sizes:
        keys = (f"root={folder}/{domain}", "layout=folder", "split=null", "ids=index", "list=null")
        overrides += [f"{domain}.{key}" for key in keys]
    run = "name=bench bn_images=1 val_every=0 workers=0 model.weights=null"
    return [*overrides, *run.split(), "selftrain.diagnose=false", "selftrain.rounds=1"]


def scene(rng, size, count):
    """Return an image of discs that hide each other and its label of `count` classes, uint8.

    Disc sizes follow r^-3. Spectrum and edges are then those of photographs ("dead leaves"), and
    so is the time to decode the image, unlike that of noise.
    """
    label, image = np.zeros(size, np.uint8), np.full((*size, 3), 128, np.uint8)
    discs = size[0] * size[1] // 100
    radius = 1.5 / np.sqrt(np.maximum(rng.random(discs), (6 / size[0]) ** 2))
    kind, centre = rng.integers(0, count, discs), rng.integers(0, size[::-1], (discs, 2))
    colour = rng.integers(40, 216, (count, 1))[kind] + rng.normal(0, 25, (discs, 1))
    colour = np.clip(colour + rng.normal(0, 8, (discs, 3)), 0, 255)
    discs = zip(centre.tolist(), radius.tolist(), colour.tolist(), kind.tolist(), strict=True)
    for at, r, shade, k in discs:
        cv2.circle(image, at, max(round(r), 1), shade, cv2.FILLED)
        if r > size[0] / 60:
            cv2.circle(label, at, round(r), k, cv2.FILLED)
    image = cv2.GaussianBlur(image, (0, 0), 0.8) + rng.normal(0, 0.8, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), label


def warmed_up(cfg):
    """Return the path of a checkpoint of an untrained network, as a warm-up would leave it."""
    run = Run(cfg, "warmup", "warmup")
    run.is_finished(True)
    student = build_segmenter(num_classes=len(classes(cfg)), **cfg.model)
    run.save(run.result, 0, {"student": student})
    return run.result


def now(device):
    """Return the time in seconds, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def times(device, turns, *calls):
    """Return a list of seconds for each of the functions, which are called in turns."""
    seconds = [[] for _ in calls]
    for _ in range(turns):
        for call, kept in zip(calls, seconds, strict=True):
            started = now(device)
            call()
            kept.append(now(device) - started)
    return seconds
