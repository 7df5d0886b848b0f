"""Intersection over union, a model's predictions at several scales, and validation while training."""

import copy
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from config import classes
from datasets import Whole, loader
from engine import progress
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


def tiled(model, images, tile):
    """The logits (1, K, h, w) of an image (1, 3, H, W), in a tuple; of one that is larger than `tile`, tile by tile.

    tile: (H, W), multiples of 128, whose quarters every network's strides divide; a portrait has them swapped. Tiles overlap
    by half, and each place is taken from the one in which it is farthest from the border. Group norms and global pooling
    take their statistics from the whole image, as they do without tiles: each sweep over all tiles makes those of one more
    layer right, and models.Head has three in a row.
    """
    height, width = images.shape[-2:]
    rows, columns = _tiles(height, tile[height > width]), _tiles(width, tile[height <= width])
    if len(rows) == len(columns) == 1:
        return model(images)
    layers = [m for m in model.modules() if isinstance(m, nn.GroupNorm) or getattr(m, "output_size", 0) in (1, (1, 1))]
    here, sums, known = None, {}, {}

    def kept(maps):
        stride = 2 ** round(math.log2((here[1][1] - here[1][0]) / maps.shape[-1]))
        rows, columns = (slice(first // stride, end and end // stride) for *_, first, end in here)
        return maps[..., rows, columns]

    def of_the_whole_image(layer, inputs, _):
        x = inputs[0].float()
        groups = getattr(layer, "num_groups", x.shape[1])
        part = kept(x).reshape(groups, -1)
        moments = torch.stack([torch.full_like(part[:, 0], part.shape[1]), part.sum(1), part.square().sum(1)])
        sums[layer] = sums.get(layer, 0) + moments
        count, total, squares = known.get(layer, sums[layer])
        mean = total / count
        if not isinstance(layer, nn.GroupNorm):
            return mean.view(1, -1, 1, 1)
        deviation = (squares / count - mean**2 + layer.eps).sqrt()
        x = ((x.view(groups, -1) - mean[:, None]) / deviation[:, None]).view_as(x)
        return x * layer.weight[:, None, None] + layer.bias[:, None, None]

    hooks = [layer.register_forward_hook(of_the_whole_image) for layer in layers]
    for _ in range(4 if layers else 1):
        sums, lines = {}, []
        for row in rows:
            lines.append([])
            for column in columns:
                here = (row, column)
                (top, bottom, *_), (left, right, *_) = here
                lines[-1].append(kept(model(images[..., top:bottom, left:right])[0]))
        known = sums
    for hook in hooks:
        hook.remove()
    return (torch.cat([torch.cat(line, -1) for line in lines], -2),)


def _tiles(side, tile):
    """Tiles along a side: (first, end, first and end of what is kept of it)."""
    count = max(math.ceil(2 * side / tile) - 1, 1)
    half, quarter = tile // 2, tile // 4
    tiles = [(k * half, k * half + tile, quarter * (k > 0), 3 * quarter) for k in range(count)]
    return [*tiles[:-1], (tiles[-1][0], side, tiles[-1][2], None)]


@torch.no_grad()
def predictions(run, model, whole, scales, tile=None):
    """Yields, for each sample of a datasets.Whole that falls to this process, it, the prediction (H, W) at the file's size, int64, and the network's
    outputs at each of the scales, both on the device."""
    network = functools.partial(tiled, model, tile=tile) if tile else model
    model.eval()
    for sample in progress(loader(run, whole), desc="predictions", unit="img", leave=False):
        with run.autocast():
            outputs = at_scales(network, run.fetch(sample["image"])[None], scales)
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
