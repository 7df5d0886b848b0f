"""Scores with labels and without, predictions at several scales, validation."""

import math
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset

from datasets import Images, Whole, loader
from engine.folders import warn
from engine.images import resize, threads, write_image
from engine.log import progress
from engine.processes import rank, sum_over_processes
from layouts import classes
from losses import probability_labels
from models import recalibrate_batchnorm

SCALES, COMPARED = (1.0, 0.5), 50  # of shared_information: scales, number of images
# of translations: useful ones keep 0.7 to 1 of the edges, with up to 1.5 times the noise; swapped,
# mirrored and shifted ones keep less than 0.25, a checkerboard has 1.9 times the noise
KEPT, NOISE = 0.4, 1.7


class ConfusionMatrix:
    """Counts pixels by (label, prediction), on the device; scores are computed once, at the end."""

    def __init__(self, num_classes, device="cpu"):
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, labels, predictions):
        """Count integers of one shape; pixels with a label of K or more (255) are left out."""
        k = len(self.counts)
        pairs = torch.where(labels < k, labels * k + predictions, k * k)
        self.counts += torch.bincount(pairs.flatten(), minlength=k * k + 1)[:-1].view(k, k)

    def scores(self, names, subsets=None):
        """Return percentages over all processes: miou, pixel_accuracy, iou, miou_KEY of subsets.

        iou: class name -> IoU, None for a class in neither labels nor predictions; it counts in no
        mean.
        """
        counts = sum_over_processes(self.counts).double().cpu()
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


def evenly(images):
    """Return the numbers of COMPARED evenly spaced images."""
    return np.unique(np.linspace(0, len(images) - 1, COMPARED, dtype=int)).tolist()


def shared_information(run, model):
    """Return mutual_information of predictions at two SCALES of COMPARED target images, or None."""
    if not Path(run.cfg.target.root).is_dir():
        return None
    whole = Whole(Images(run.cfg, "target", labelled=False).check(), run.cfg.target.sizes[-1])
    k = len(classes(run.cfg))
    counts = torch.zeros(k * k, dtype=torch.int64, device=run.device)
    for sample, _, outputs in predictions(run, model, Subset(whole, evenly(whole)), SCALES):
        full, half = (probability_labels([x], sample["shape"]) for x, *_ in outputs)
        counts += torch.bincount((full * k + half).flatten(), minlength=k * k)
    return mutual_information(sum_over_processes(counts).view(k, k))


def mutual_information(counts):
    """Return the mutual information in counts (K, K) of two labellings, in percent of log K."""
    joint = counts.double() / counts.sum()
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    terms = torch.where(joint > 0, joint * (joint / apart).log(), 0)
    return 100 * terms.sum().item() / math.log(len(counts))


def edges_and_noise(image):
    """Return the gradients at half size, (h, w), and the noise (Immerkaer, 1996) of RGB uint8."""
    luma = np.float32(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
    small = cv2.resize(luma, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    gradients = np.hypot(cv2.Sobel(small, -1, 1, 0), cv2.Sobel(small, -1, 0, 1))
    mask = np.outer([1, -2, 1], [1, -2, 1])
    return gradients, np.median(np.abs(cv2.filter2D(luma, -1, mask)))


def judge_translation(run, source, translated):
    """Warn of translations G(x_s) that have lost the edges of x_s, or have noise of their own.

    translated: function(i) that reads G(x_s), RGB uint8 (H, W, 3). Edges are kept as far as their
    gradients correlate. Writes the worst pair, and the median one, to samples/translator/.
    """
    if rank() > 0:
        return

    def pair(i):
        image = source.image(i)
        return image, resize(translated(i), image.shape[:2])

    def compared(i):
        (edges, noise), (other, noise_after) = map(edges_and_noise, pair(i))
        return cv2.matchTemplate(edges, other, cv2.TM_CCOEFF_NORMED).item(), noise, noise_after

    some = evenly(source)
    found = np.array(list(threads.map(compared, some)))
    order = np.argsort(-found[:, 0])
    folder = run.folder / "samples/translator"
    for name, n in {"median": order[len(some) // 2], "worst": order[-1]}.items():
        write_image(folder / f"{name}_translation.png", np.hstack(pair(some[n])))
    kept, noise, noise_after = found.mean(0)
    if Path(run.cfg.target.root).is_dir():
        target = Images(run.cfg, "target", labelled=False)
        noise = max(noise, np.mean([edges_and_noise(target.image(i))[1] for i in evenly(target)]))
    ratio = noise_after / max(noise, 1)
    words = f"translated images keep {kept:.0%} of the edges, and have {ratio:.1f} x the noise"
    print(f"translator: {words}")
    if kept < KEPT or ratio > NOISE:
        remedy = "raise translation.steps, or set crdomix=false in warmup and selftrain"
        warn(f"{words}: their content may be lost; look at {folder}, then {remedy}")


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
