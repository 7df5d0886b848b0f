"""Somebody's own folders: what `python datasets.py --init` writes, a first configuration, and `--check` reads, every file."""

import functools
import os
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import torch

from config import UserError, classes, load_config
from datasets import IGNORED, LAYOUTS, list_images
from engine import progress
from files import render
from images import legend, paint, read_image, read_label, resize, threads, write_image

SAMPLED = 200  # files that are looked into
LARGEST = 1052 * 1914  # pixels of an image in training: GTA5's


def write_config(source, target, path):
    """Writes a commented configuration for two folders, one with labels, as far as their files tell; prints what was found.

    Raises UserError where images or labels are not found, or `path` is there already.
    """
    if path.exists():
        raise UserError(f"{path}: is there already; remove it, or give another name with --out")
    source = max(find(source), key=lambda x: (x["split"] == "train", len(x["labels"])))
    if not source["labels"]:
        raise UserError(
            f"{source['folder']}: holds images, but no label has a name like one of theirs; see docs/own_data.md"
        )
    splits = find(target)
    target = max(splits, key=lambda x: (x["split"] == "train", x["split"] is None, len(x["images"]) - len(x["labels"])))
    labelled = [x for x in splits if x["labels"] and x is not target]
    val = max(labelled, key=lambda x: (x["split"] == "val", len(x["labels"])), default=None)
    found = {"source": source, "target": target, "val": val}
    for name, x in found.items():
        print(
            f"{name}: "
            + (
                f"{len(x['images'])} images, {len(x['labels'])} labels, in {x['folder']}"
                if x
                else "nothing with labels"
            )
        )

    shares, colours = label_values([*source["labels"], *(val["labels"] if val else [])])
    known = source["layout"] if source["layout"] in ("cityscapes", "synthia") else None
    print("label values: " + ", ".join(f"{value} ({share:.1%})" for value, share in shares.items()))
    sizes = {name: training_sizes(found[name]["images"]) for name in ("source", "target")}
    smallest = np.minimum(sizes["source"][0], sizes["target"][0])
    render(
        path, "own_data.yaml.jinja", **found, path=path, base=os.path.relpath(Path(__file__).parent / "config.yaml", path.parent), known=known,
        ids=known or "*ids", values=list(shares), shares=shares, colours=colours, sizes=sizes, gpu=torch.cuda.is_available(), workers=min(os.cpu_count(), 8),
        crop=(smallest * 5 // 6 // 16 * 16).tolist(), translation_crop=np.maximum(smallest // 2 // 4 * 4, 32).tolist(),
    )  # fmt: skip
    load_config(path)
    print(f"{path}: written; go through it, then python datasets.py --check --cfg {path}")


def find(root):
    """The layouts and splits under a folder that have images: dicts of layout, root, split, folder, images, labels (paths).

    Those with labels, if there are any; a bare folder of images if there is nothing else. Raises UserError without images.
    """
    found = []
    for layout, (image_folder, label_folders, image_end, label_end) in LAYOUTS.items():
        head, split_in_name, _ = image_folder.partition("{split}")
        splits = [None]
        if split_in_name and (root / head).is_dir():
            splits += sorted(path.name for path in (root / head).iterdir() if path.is_dir())
        for split in splits if layout != "gta5" else []:  # which is folder without a split
            folder = root / image_folder.format(split=split or ".")
            images = {name.rpartition(".")[0]: folder / name for name in list_images(folder)}
            images = {stem.removesuffix(image_end): path for stem, path in images.items() if stem.endswith(image_end)}
            folders = [root / label.format(split=split or ".") for label in label_folders]
            labels = {name.rpartition(".")[0]: path / name for path in folders for name in list_images(path)}
            labels = [labels[stem + label_end] for stem in images if stem + label_end in labels]
            found.append({"layout": layout, "root": root, "split": split, "folder": folder,
                          "images": list(images.values()), "labels": labels})  # fmt: skip
    found = [x for x in found if x["images"]]
    if not found:
        raise UserError(f"{root}: no images were found; see docs/own_data.md for the layouts")
    first = max(found, key=lambda x: (len(x["labels"]), x["layout"] != "flat"))["layout"]
    return [x for x in found if x["layout"] == first]


def label_values(paths):
    """The values in label files: value -> share of the pixels, in order; and value -> colour, the palette's if there is one."""
    pixels, colours = np.zeros(65536, np.int64), {}
    for path in paths[:: -(-len(paths) // SAMPLED)]:
        values, painted = read_label(path, red_only="LABELS" in path.parts), read_image(path)
        pixels += np.bincount(values.ravel(), minlength=65536)
        for value in np.unique(values).tolist():
            if value not in colours:
                colours[value] = painted[values == value][0].tolist()
    if not 2 <= len(colours) <= 255:
        raise UserError(
            f"{paths[0]}: such labels hold {len(colours)} values; a label holds the number of a class in every pixel"
        )
    if all(len(set(colour)) == 1 for colour in colours.values()):  # gray
        colours = dict(zip(sorted(colours), distinct_colours(len(colours)), strict=True))
    return {value: pixels[value] / pixels.sum() for value in sorted(colours)}, colours


def distinct_colours(count):
    """RGB colours, each of which is as far in CIELAB as can be from those before it and from black, which stands for ignored."""
    rgb = np.stack(np.meshgrid(*[np.arange(0, 256, 36)] * 3), -1).reshape(-1, 3)
    lab = cv2.cvtColor(np.float32(rgb[None] / 255), cv2.COLOR_RGB2LAB)[0]
    distance, chosen = np.linalg.norm(lab, axis=1), []
    for _ in range(count):
        chosen.append(distance.argmax())
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    return rgb[chosen].tolist()


def training_sizes(paths):
    """The [height, width] to train at, low and full: of the images' median size, scaled down to LARGEST pixels if larger."""
    size = np.median([read_image(path).shape[:2] for path in paths[:: -(-len(paths) // SAMPLED)]], axis=0)
    size = size * min(1, (LARGEST / size.prod()) ** 0.5)
    return [(size * scale).astype(int).tolist() for scale in (0.8, 1)]


# ---------------------------------------------------------------- the check of all files


def check(cfg, domain, images, shown=12):
    """Reads every file of Images; prints their number, sizes and class shares, writes a contact sheet to the run's folder."""
    sizes, pixels, bar = Counter(), np.zeros(256, np.int64), progress(total=len(images), desc=domain)
    for size, counts in threads.map(functools.partial(_count, images), range(len(images))):
        sizes[size] += 1
        pixels += counts
        bar.update()
    bar.close()
    print(f"{domain}: {len(images)} images in {images.folder}{'' if images.labelled else ', labels not read'}")
    print("  sizes: " + ", ".join(f"{n} of {w}x{h}" for (h, w), n in sizes.most_common(5)))
    if images.labelled:
        names = [*classes(cfg), "ignored"]
        shares = 100 * np.append(pixels[: len(names) - 1], pixels[IGNORED]) / pixels.sum()
        print("  classes: " + ", ".join(f"{name} {share:.2f}%" for name, share in zip(names, shares, strict=True)))
    tiles = []
    for i in np.unique(np.linspace(0, len(images) - 1, shown, dtype=int)).tolist():
        image = images.image(i)
        size = (160, round(160 * image.shape[1] / image.shape[0]))
        pair = [image, cv2.addWeighted(image, 0.4, paint(images.label(i), cfg), 0.6, 0)] if images.labelled else [image]
        tiles.append(np.hstack([resize(tile, size) for tile in pair]))
    tiles = [resize(tile, tiles[0].shape[:2]) for tile in tiles]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % 3)
    sheet = np.vstack([np.hstack(tiles[at : at + 3]) for at in range(0, len(tiles), 3)])
    if images.labelled:
        sheet = np.vstack([sheet, legend(cfg, sheet.shape[1])])
    path = Path(cfg.output) / cfg.name / f"contact_sheet_{domain}.png"
    write_image(path, sheet)
    print(f"  contact sheet: {path}")


def _count(images, i):
    """The size of image i, and how many pixels of each class its label has."""
    image = images.image(i)
    counts = np.zeros(256, np.int64)
    if images.labelled:
        label = images.to_classes(images.label_values(i, image), i)
        counts = np.bincount(label.ravel(), minlength=256)
    return image.shape[:2], counts
