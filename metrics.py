"""Scores with labels and without, predictions at several scales, validation."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset

from datasets import Images, Whole, loader
from engine.config import UserError, one_line
from engine.folders import warn
from engine.images import resize, write_image
from engine.log import progress
from engine.processes import rank, sum_over_processes
from layouts import classes
from losses import probability_labels
from models import load_segmenter, recalibrate_batchnorm

SCALES, COMPARED = (1.0, 0.5), 50  # of shared_information: scales, number of images
KEPT, LOST = 0.9, 0.75  # of the IoU on the source; below: a translation, a class, is said to be bad


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


def at_scales(model, images, scales):
    """Return the model's outputs for images (B, 3, H, W) scaled by each factor, as a list."""
    outputs = []
    for scale in scales:
        scaled = images
        if scale != 1:
            size = [max(round(side * scale), 1) for side in images.shape[-2:]]
            scaled = F.interpolate(images, size, mode="bilinear", antialias=True)
        outputs.append(model(scaled))
    return outputs


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
        with run.autocast():
            outputs = at_scales(model, run.fetch(sample["image"][None]), scales)
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


@torch.random.fork_rng([])  # what is trained afterwards begins as it would without
def judge_translation(run, source, translated):
    """Warn of translations G(x_s) in which a network of the source alone misses what it knew.

    translated: function(i) that reads G(x_s), RGB uint8 (H, W, 3). Prints the share of the mIoU
    that is kept; writes the pairs with the most, and with the median, of pixels that became wrong
    to samples/. Without the run's source_only.pth nobody can be asked.
    """
    path = run.folder / "source_only.pth"
    if not path.exists():
        return
    model = run.place(load_segmenter(path, run.cfg)[0])
    names = classes(run.cfg)
    some = np.unique(np.linspace(0, len(source) - 1, COMPARED, dtype=int)).tolist()
    plain, view = source.unlabelled(), source.unlabelled()
    view.image = translated
    scores = []
    wrong = dict.fromkeys(some, 0)  # share of pixels that become wrong
    for images, sign in ((plain, -1), (view, 1)):
        matrix = ConfusionMatrix(len(names), run.device)
        whole = Subset(Whole(images, run.cfg.source.sizes[-1]), some)
        for sample, prediction, _ in predictions(run, model, whole, (1.0,)):
            i = sample["index"]
            label = source.label(i)
            prediction = resize(prediction.byte().cpu().numpy(), label.shape, labels=True)
            wrong[i] += sign * ((prediction != label) & (label != 255)).mean()
            matrix.update(*(torch.from_numpy(x).long().to(run.device) for x in (label, prediction)))
        scores.append(matrix.scores(names, dataset="source"))
    before, after = scores
    if rank() == 0:
        order = sorted(some, key=wrong.get)
        for name, i in {"median": order[len(some) // 2], "worst": order[-1]}.items():
            pair = np.hstack([plain.image(i), resize(translated(i), plain.image(i).shape[:2])])
            write_image(run.folder / f"samples/translator/{name}_translation.png", pair)
    kept = after["miou"] / max(before["miou"], 1e-6)
    words = f"source_only.pth has {kept:.0%} of its mIoU on translated images"
    print(f"translator: {words}")
    if kept < KEPT:
        lost = [k for k, iou in before["iou"].items() if iou and after["iou"][k] < LOST * iou]
        fault = f"{words}, which have lost content: {one_line(', '.join(lost))}"
        remedy = "set another translation.method, or crdomix=false in warmup and selftrain"
        warn(f"{fault}; look at {run.folder / 'samples/translator'}, then {remedy}")


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
