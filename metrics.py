"""Scores with labels and without, predictions at several scales, validation."""

import math
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset

from datasets import Images, Whole, loader
from engine.config import UserError, one_line
from engine.folders import warn
from engine.images import resize, threads, write_image
from engine.log import progress
from engine.processes import rank, sum_over_processes
from layouts import classes
from losses import IGNORED, probability_labels
from models import recalibrate_batchnorm

SCALES, COMPARED = (1.0, 0.5), 50  # of shared_information: scales, number of images
KEPT = 0.75  # of explained colour; good translations have 0.86 to 1, spoiled ones 0.1 to 0.66


class ConfusionMatrix:
    """Counts pixels by (label, prediction), on the device; scores are computed once, at the end."""

    def __init__(self, num_classes, device="cpu"):
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, labels, predictions):
        """Count integers of one shape; pixels with a label of K or more (255) are left out."""
        k = len(self.counts)
        pairs = torch.where(labels < k, labels * k + predictions, k * k)
        self.counts += torch.bincount(pairs.flatten(), minlength=k * k + 1)[:-1].view(k, k)

    def scores(self, names, subsets=None, dataset="val"):
        """Return percentages over all processes: miou, pixel_accuracy, iou, miou_KEY of subsets.

        iou: class name -> IoU, None for a class in neither labels nor predictions; it counts in no
        mean. Raises UserError, which names `dataset`, without any label.
        """
        counts = sum_over_processes(self.counts).double().cpu()
        if not counts.any():
            fault = "no pixel of its labels belongs to a class"
            raise UserError(f"{dataset}: {fault}; are {dataset}.ids right?")
        hits = counts.diag()
        union = counts.sum(0) + counts.sum(1) - hits
        pairs = zip(names, hits, union, strict=True)
        iou = {name: 100 * (hit / all_).item() if all_ else None for name, hit, all_ in pairs}

        def mean(chosen):
            values = [iou[name] for name in chosen if iou[name] is not None]
            return sum(values) / len(values) if values else None

        accuracy = 100 * (hits.sum() / counts.sum()).item()
        means = {f"miou_{key}": mean(chosen) for key, chosen in (subsets or {}).items()}
        return {"miou": mean(names), "pixel_accuracy": accuracy} | means | {"iou": iou}


@torch.no_grad()
def predictions(run, model, whole, scales):
    """Yield (sample, prediction, outputs) for this process's share of a datasets.Whole.

    prediction: (H, W) int64 at the file's size. outputs: the model's, one tuple per scale.
    """
    model.eval()
    for sample in progress(loader(run, whole), desc="predictions", unit="img", leave=False):
        if "fault" in sample:
            yield sample, None, None
            continue
        image = run.fetch(sample["image"][None])
        outputs, smooth = [], {"mode": "bilinear", "antialias": True}
        for scale in scales:
            size = [max(round(side * scale), 1) for side in image.shape[-2:]]
            with run.autocast():
                scaled = image if scale == 1 else F.interpolate(image, size, **smooth)
                outputs.append(model(scaled))
        logits = [logits for logits, *_ in outputs]
        yield sample, probability_labels(logits, sample["shape"])[0], outputs


def shared_information(run, model):
    """Return mutual_information of predictions at two SCALES of COMPARED target images, or None."""
    if not Path(run.cfg.target.root).is_dir():
        return None
    whole = Whole(Images(run.cfg, "target", labelled=False).check(), run.cfg.target.sizes[-1])
    some = np.unique(np.linspace(0, len(whole) - 1, COMPARED, dtype=int)).tolist()
    k = len(classes(run.cfg))
    counts = torch.zeros(k * k, dtype=torch.int64, device=run.device)
    for sample, _, outputs in predictions(run, model, Subset(whole, some), SCALES):
        full, half = (probability_labels([x], sample["shape"]) for x, *_ in outputs)
        counts += torch.bincount((full * k + half).flatten(), minlength=k * k)
    return mutual_information(sum_over_processes(counts).view(k, k))


def mutual_information(counts):
    """Return the mutual information in counts (K, K) of two labellings, in percent of log K."""
    joint = counts.double() / counts.sum()
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    terms = torch.where(joint > 0, joint * (joint / apart).log(), 0)
    return 100 * terms.sum().item() / math.log(len(counts))


def explained(image, label, num_classes):
    """Return the shares of the variance of L, a, b that lie between the classes of a label, (K,).

    Their sum is R^2: 1 where each class has one colour, less where the label is another image's.
    image: RGB (H, W, 3) uint8. label: (H, W) uint8.
    """
    label, known = label[label != IGNORED], label != IGNORED
    colours = cv2.cvtColor(np.float32(image) / 255, cv2.COLOR_RGB2LAB)[known]
    colours -= colours.sum(0) / max(len(label), 1)
    pixels = np.bincount(label, minlength=num_classes)
    sums = [np.bincount(label, x, num_classes) for x in colours.T]
    return np.square(sums).sum(0) / np.maximum(pixels, 1) / max(np.square(colours).sum(), 1e-6)


def judge_translation(run, source, translated):
    """Warn of translations G(x_s) whose content is not that of the labels any more.

    translated: function(i) that reads G(x_s), RGB uint8 (H, W, 3). Writes the pairs that lose most,
    and as much as the median, to samples/translator/.
    """
    if rank() > 0:
        return
    names = np.array(list(classes(run.cfg)))
    some = np.unique(np.linspace(0, len(source) - 1, COMPARED, dtype=int)).tolist()

    def pair(i):
        image = source.image(i)
        return image, resize(translated(i), image.shape[:2])

    k = len(names)
    found = threads.map(lambda i: [explained(x, source.label(i), k) for x in pair(i)], some)
    found = np.array(list(found))  # (images, 2, K)
    order = np.argsort(np.subtract(*found.sum(2).T))
    folder = run.folder / "samples/translator"
    for name, n in {"median": order[len(some) // 2], "worst": order[-1]}.items():
        write_image(folder / f"{name}_translation.png", np.hstack(pair(some[n])))
    before, after = found.mean(0)
    kept = after.sum() / max(before.sum(), 1e-6)
    words = f"labels explain {kept:.0%} as much of translated colours as of the source's"
    print(f"translator: {words}")
    if kept < KEPT:
        lost = one_line(", ".join(names[after < KEPT * before]))
        remedy = "set another translation.method, or crdomix=false in warmup and selftrain"
        warn(f"{words}: content of {lost} is lost; look at {folder}, then {remedy}")


def finish(run, crops, **networks):
    """Recalibrate networks on datasets.recalibration_crops, if any; they are the stage's result."""
    batch_size = sum(run.cfg[run.section].batch)
    for network in networks.values():
        network.eval()
        if crops is None:
            continue
        batches = map(run.fetch, loader(run, crops, 0, batch_size, shared=False))
        images = (torch.cat([part["image"] for part in batch.values()]) for batch in batches)
        with run.autocast():
            recalibrate_batchnorm(network, images)
    run.finish(**networks)
