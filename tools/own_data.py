"""Write a first configuration for your own image folders, and check every file that one names.

    python -m tools.own_data --init FOLDER_WITH_LABELS FOLDER_WITHOUT --out my.yaml
    python -m tools.own_data --check --cfg my.yaml

--check reads every image and label, prints sizes and class shares, and draws contact sheets.
"""

import functools
import os
import warnings
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from datasets import IGNORED, Images
from engine.command import arguments, command
from engine.config import UserError, one_line
from engine.folders import EXTENSIONS, list_images, warn
from engine.images import paint, read_image, read_label, resize, threads, write_image
from engine.log import progress
from layouts import LAYOUTS, classes
from settings import load_config
from tools.templates import render

ROOT = Path(__file__).parent.parent
SAMPLED = 200  # at most this many files are read for sizes and label values
LARGEST = 1052 * 1914  # pixels of a training image at most: GTA5's


def main():
    parser = arguments(__doc__)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--check", action="store_true", help="read every file and show what it holds")
    words = "write a configuration for a folder with labels and one without"
    task.add_argument("--init", nargs=2, metavar="FOLDER", type=Path, help=words)
    words = "the file that --init writes (default: %(default)s)"
    parser.add_argument("--out", default="my.yaml", metavar="FILE", type=Path, help=words)
    args = parser.parse_intermixed_args()
    if args.init:
        write_config(*args.init, args.out)
        return
    warnings.simplefilter("ignore")  # Pillow's, about metadata
    cfg = load_config(args.cfg, args.overrides)
    labelled = {"source": True, "target": cfg.selftrain.diagnose or "oracle" in cfg.stages}
    if cfg.val.root:
        labelled["val"] = True
    for domain in (*labelled, *(f"more_val.{name}" for name in cfg.more_val)):
        check(cfg, domain, Images(cfg, domain, labelled.get(domain, True)))


def write_config(source, target, path):
    """Write a commented configuration for two image folders, of which the first has labels.

    All are pathlib.Path. Raises UserError where images or labels are missing, or `path` exists.
    """
    if path.exists():
        raise UserError(f"{path}: exists already; remove it, or choose another name with --out")
    sources, targets = splits_of(source), splits_of(target)
    source = max(sources, key=lambda x: (x["split"] == "train", len(x["labels"])))
    if not source["labels"]:
        fault = "has images, but no label of the same name as one of them"
        raise UserError(f"{source['folder']}: {fault}; see docs/own_data.md")

    def preference(x):
        return x["split"] == "train", x["split"] is None, len(x["images"]) - len(x["labels"])

    target = max(targets, key=preference)
    labelled = [x for x in targets if x["labels"] and x is not target]
    val = max(labelled, key=lambda x: (x["split"] == "val", len(x["labels"])), default=None)
    found = {"source": source, "target": target, "val": val}
    for name, x in found.items():
        counts = x and f"{len(x['images'])} images, {len(x['labels'])} labels, in {x['folder']}"
        print(f"{name}: {counts or 'nothing with labels'}")

    shares, colours = label_values([*source["labels"], *(val["labels"] if val else [])])
    print("label values: " + ", ".join(f"{value} ({x:.1%})" for value, x in shares.items()))
    sizes = {"source": training_sizes(source["images"]), "target": training_sizes(target["images"])}
    smallest = np.minimum(sizes["source"][0], sizes["target"][0])
    values = {"path": path, "base": os.path.relpath(ROOT / "config.yaml", path.parent)}
    values |= {"shares": shares, "colours": colours, "sizes": sizes}
    values["gpu"] = torch.cuda.is_available()
    values["crop"] = (smallest * 5 // 6 // 16 * 16).tolist()
    values["translation_crop"] = np.maximum(smallest // 2 // 4 * 4, 32).tolist()
    render(path, "own_data.yaml.jinja", **found, **values)
    load_config(path)
    print(f"{path}: written; read it through, then python -m tools.own_data --check --cfg {path}")


def splits_of(root):
    """Return the splits that have images below `root`, all in the layout with the most labels.

    A split is a dict: layout, root, split, folder, images and labels (lists of paths). A bare
    folder of images is the last choice. Raises UserError without images.
    """
    found = []
    for layout, (image_folder, label_folders, image_end, label_end) in LAYOUTS.items():
        if layout == "gta5":  # equals the layout `folder` without a split
            continue
        splits, (head, split_in_name, _) = [None], image_folder.partition("{split}")
        if split_in_name and (root / head).is_dir():
            splits += sorted(path.name for path in (root / head).iterdir() if path.is_dir())
        for split in splits:
            places = [root / x.format(split=split or ".") for x in (image_folder, *label_folders)]
            images = {s: x for s, x in by_stem(places[0]).items() if s.endswith(image_end)}
            labels = {stem: path for place in places[1:] for stem, path in by_stem(place).items()}
            names = [stem.removesuffix(image_end) + label_end for stem in images]
            one = {"layout": layout, "root": root, "split": split, "folder": places[0]}
            paired = [labels[name] for name in names if name in labels]
            found.append(one | {"images": [*images.values()], "labels": paired})
    found = [x for x in found if x["images"]]
    if not found:
        raise UserError(f"{root}: no images were found; see docs/own_data.md for the layouts")
    best = max(found, key=lambda x: (len(x["labels"]), x["layout"] != "flat"))["layout"]
    return [x for x in found if x["layout"] == best]


def by_stem(folder):
    """Return the images below a folder: relative path without its extension -> path."""
    return {name.rpartition(".")[0]: folder / name for name in list_images(folder)}


def sample(paths):
    """Return at most SAMPLED of the paths, evenly spaced."""
    return paths[:: -(-len(paths) // SAMPLED)]


def label_values(paths):
    """Return two dicts of label files' values, in order: value -> share, value -> colour [r, g, b].

    The colours are a palette's or distinct ones. Raises UserError unless there are 2 to 255 values.
    """
    pixels, colours = np.zeros(65536, np.int64), {}
    for path in sample(paths):
        values, painted = read_label(path, red_only="LABELS" in path.parts), read_image(path)
        pixels += np.bincount(values.ravel(), minlength=65536)
        for value in np.unique(values).tolist():
            if value not in colours:
                colours[value] = painted[values == value][0].tolist()
    if not 2 <= len(colours) <= 255:
        fault = f"this label and the others hold {len(colours)} values"
        raise UserError(f"{paths[0]}: {fault}; a label holds the number of a class in every pixel")
    distinct = len(set(map(tuple, colours.values()))) == len(colours)
    if not distinct or all(len(set(colour)) == 1 for colour in colours.values()):  # no palette
        colours = dict(zip(sorted(colours), distinct_colours(len(colours)), strict=True))
    return {value: pixels[value] / pixels.sum() for value in sorted(colours)}, colours


def distinct_colours(count):
    """Return `count` colours [r, g, b], each far in CIELAB from those before it and from black."""
    rgb = np.stack(np.meshgrid(*[np.arange(0, 256, 36)] * 3), -1).reshape(-1, 3)
    lab = cv2.cvtColor(np.float32(rgb[None] / 255), cv2.COLOR_RGB2LAB)[0]
    distance, chosen = np.linalg.norm(lab, axis=1), []
    for _ in range(count):
        chosen.append(distance.argmax())
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    return rgb[chosen].tolist()


def training_sizes(paths):
    """Return two [height, width], low and full: of the median image, at most LARGEST pixels."""
    size = np.median([read_image(path).shape[:2] for path in sample(paths)], axis=0)
    size = size * min(1, (LARGEST / size.prod()) ** 0.5)
    return [(size * scale).astype(int).tolist() for scale in (0.8, 1)]


def check(cfg, domain, images, shown=12):
    """Read all files of a datasets.Images, print sizes and class shares, draw a contact sheet.

    shown: the number of images on it. Raises UserError for a file that cannot be trained on.
    """
    sizes, pixels, turned = Counter(), np.zeros(256, np.int64), 0
    with progress(total=len(images), desc=domain) as bar:
        for size, _, counts, is_turned in threads.map(
            functools.partial(read, images), range(len(images))
        ):
            sizes[size] += 1
            pixels += counts
            turned += is_turned
            bar.update()
    if turned:
        fault = f"{turned} of {len(images)} images have an EXIF orientation, which is not applied"
        warn(f"{domain}: {fault}; turn their pixels, for example by mogrify -auto-orient")
    labels = "" if images.labelled else ", labels not read"
    print(f"{domain}: {len(images)} images in {images.folder}{labels}")
    print(f"  left out: {left_out(images)}")
    print("  sizes: " + ", ".join(f"{n} of {w}x{h}" for (h, w), n in sizes.most_common(5)))
    if images.labelled:
        names = [*classes(cfg), "ignored"]
        counts = np.append(pixels[: len(names) - 1], pixels[IGNORED])
        shares = zip(names, 100 * counts / pixels.sum(), strict=True)
        print("  classes: " + ", ".join(f"{name} {share:.2f}%" for name, share in shares))
    path = Path(cfg.output) / cfg.name / f"contact_sheet_{domain}.png"
    write_image(path, contact_sheet(images, classes(cfg), shown))
    print(f"  contact sheet: {path}")


def left_out(images):
    """Return in words which files in the folders of a datasets.Images are not read, and why."""
    counts, seen = Counter(), set()
    for path, folders, files in os.walk(images.folder, followlinks=True):
        real, names = Path(path).resolve(), folders + files
        if real in seen:
            counts["linked a second time"] += 1
            names, files = [], []
        counts["hidden"] += sum(name.startswith(".") for name in names)
        kinds = (Path(name).suffix.lower() for name in files if not name.startswith("."))
        counts.update(f"named *{kind}" for kind in kinds if kind not in EXTENSIONS)
        folders[:] = [x for x in folders if not x.startswith(".") and real not in seen]
        seen.add(real)
    counts["not in the list or of the layout"] = len(list_images(images.folder)) - len(images)
    if images.labelled:
        stems = (name.rpartition(".")[0] for name in list_images(images.label_folder))
        labels = sum(stem.endswith(images.label_end) for stem in stems)
        counts["labels without an image"] = labels - len(images)
    return one_line(", ".join(f"{n} {why}" for why, n in counts.most_common() if n)) or "nothing"


def read(images, i):
    """Return images.summary(i), and whether EXIF says to turn image i.

    Pillow reads the files as well: what OpenCV guesses in a damaged one, it refuses.
    """
    turned = False
    for path in (images.folder / images.names[i], *images.label_paths[i : i + 1]):
        try:
            with Image.open(path) as image:
                turned = turned or image.getexif().get(ExifTags.Base.Orientation, 1) != 1
                image.load()
        except UnidentifiedImageError:  # a format that OpenCV alone knows, or none
            continue
        except Exception as error:  # Pillow raises a dozen types, depending on the damage
            fault = f"is damaged inside ({one_line(error)})"
            raise UserError(f"{path}: {fault}; restore the file or remove it") from error
    return *images.summary(i), turned


def contact_sheet(images, colours, shown):
    """Return a picture (H, W, 3) uint8 of images, three a row, each beside its painted label."""
    tiles = []
    for i in np.unique(np.linspace(0, len(images) - 1, shown, dtype=int)).tolist():
        pair = [images.image(i)]
        if images.labelled:
            painted = paint(images.label(i), colours)
            pair.append(cv2.addWeighted(pair[0], 0.4, painted, 0.6, 0))
        size = (160, round(160 * pair[0].shape[1] / pair[0].shape[0]))
        tiles.append(np.hstack([resize(picture, size) for picture in pair]))
    tiles = [resize(tile, tiles[0].shape[:2]) for tile in tiles]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % 3)
    rows = [np.hstack(tiles[at : at + 3]) for at in range(0, len(tiles), 3)]
    if images.labelled:
        rows.append(legend(colours, rows[0].shape[1]))
    return np.vstack(rows)


def legend(colours, width, cell=150):
    """Return a picture of the classes' colours with their names, (H, width, 3) uint8."""
    across = max(width // cell, 1)
    entries = [*colours.items(), ("ignored", (0, 0, 0))]
    picture = np.full((24 * -(-len(entries) // across), width, 3), 255, np.uint8)
    font = (cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    for k, (name, colour) in enumerate(entries):
        x, y = k % across * cell + 4, k // across * 24 + 4
        cv2.rectangle(picture, (x, y), (x + 16, y + 16), colour, cv2.FILLED)
        cv2.putText(picture, name, (x + 22, y + 13), *font)
    return picture


if __name__ == "__main__":
    command(main)
