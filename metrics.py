"""Intersection over union, a model's predictions at several scales, and validation while training."""

import copy

import torch
import torch.nn.functional as F

from config import classes
from datasets import Whole, loader
from files import load_tensors
from losses import probability_labels
from models import recalibrate_batchnorm
from processes import total


class ConfusionMatrix:
    """Counts pixels by (label, prediction) on the device; the scores come from it once, at the end."""

    def __init__(self, num_classes, device="cpu"):
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, labels, predictions):
        """Both of one shape, integers; pixels with a label of K or more (255: ignored) are left out."""
        k = len(self.counts)
        pairs = torch.where(labels < k, labels * k + predictions, k * k)
        self.counts += torch.bincount(pairs.flatten(), minlength=k * k + 1)[:-1].view(k, k)

    def scores(self, names, subsets=None):
        """Percentages: miou, pixel_accuracy, iou by class name, and miou_KEY for each subset, KEY -> class names.

        A class in neither labels nor predictions has no IoU (None) and does not count, as in cityscapesscripts. Of many
        processes, each has counted its images; the scores are of all.
        """
        counts = total(self.counts).double().cpu()
        hits = counts.diag()
        union = counts.sum(0) + counts.sum(1) - hits
        iou = {n: 100 * (h / u).item() if u else None for n, h, u in zip(names, hits, union, strict=True)}

        def mean(chosen):
            values = [iou[name] for name in chosen if iou[name] is not None]
            return sum(values) / len(values) if values else None

        means = {"miou": mean(names), "pixel_accuracy": 100 * (hits.sum() / counts.sum()).item()}
        return means | {f"miou_{key}": mean(chosen) for key, chosen in (subsets or {}).items()} | {"iou": iou}


def at_scales(model, images, scales):
    """The model's outputs for the images (B, 3, H, W) scaled by each of the factors, in a list."""
    outputs = []
    for scale in scales:
        size = [max(round(side * scale), 1) for side in images.shape[-2:]]
        outputs.append(model(F.interpolate(images, size, mode="bilinear", antialias=True) if scale != 1 else images))
    return outputs


@torch.no_grad()
def predictions(run, model, whole, scales):
    """Yields, for each sample of a datasets.Whole that falls to this process, it, the prediction (H, W) at the file's size, int64, and the network's
    outputs at each of the scales, both on the device."""
    model.eval()
    for sample in loader(run, whole):
        with run.autocast():
            outputs = at_scales(model, run.fetch(sample["image"])[None], scales)
        yield sample, probability_labels([logits for logits, *_ in outputs], sample["shape"])[0], outputs


def validate(run, step, images, recalibration, student, teacher):
    """Logs both networks' mIoU on labelled Images; keeps the best student as {stage}_best_on_val.pth.

    On copies with batch norm recalibrated, so that training goes on as if nothing had been looked at.
    """
    mious = {}
    for name, model in (("student", student), ("teacher", teacher)):
        model = copy.deepcopy(model)
        with run.autocast():
            recalibrate_batchnorm(model, recalibration)
        matrix = ConfusionMatrix(len(classes(run.cfg)), run.device)
        for sample, prediction, _ in predictions(run, model, Whole(images, run.cfg.val.size), [1.0]):
            matrix.update(run.fetch(sample["label"]), prediction)
        mious[name] = matrix.scores(classes(run.cfg))["miou"]
        if name == "student":
            best = run.folder / f"{run.stage}_best_on_val.pth"
            if not best.exists() or load_tensors(best)["miou"] < mious[name]:
                run.save(best, step, {"student": model}, miou=mious[name])
    run.write_log(step=step, **{f"val_miou_{name}": round(miou, 4) for name, miou in mious.items()})
