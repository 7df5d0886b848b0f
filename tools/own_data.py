"""Write a first configuration for your own image folders, and check every file that one names.

    python -m tools.own_data --init FOLDER_WITH_LABELS FOLDER_WITHOUT --out my.yaml
    python -m tools.own_data --check --cfg my.yaml

--check reads every image and label, prints sizes and class shares, and draws contact sheets.
"""

import os
import re
import shlex
import sys
import warnings
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to be run by its path too

from datasets import CODE, IGNORED, NO_CLASS, Images
from engine.command import arguments, command
from engine.config import UserError, one_line
from engine.files import write_text
from engine.folders import EXTENSIONS, list_images
from engine.images import paint, read_image, read_label, resize, threads, write_image
from engine.log import progress
from layouts import classes, label_values
from settings import load_config
from tools.find_layout import find_splits
from tools.label_values import NAMED, in_words, meaning, sample, tally
from tools.templates import render

ROOT = Path(__file__).resolve().parent.parent
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
    warnings.simplefilter("ignore")  # Pillow's, about metadata
    if args.init:
        write_config(*args.init, args.out)
        return
    cfg = load_config(args.cfg, args.overrides)
    labelled = {"source": True, "target": cfg.selftrain.diagnose or "oracle" in cfg.stages}
    if cfg.val.root:
        labelled["val"] = True
    unknown = []
    for domain in (*labelled, *(f"more_val.{name}" for name in cfg.more_val)):
        unknown += check(cfg, domain, Images(cfg, domain, labelled.get(domain, True)))
    if unknown:
        fault = f"no class for {one_line(', '.join(unknown))}"
        raise UserError(f"{args.cfg}: {fault}; add these values to ids (null: ignored)")


def write_config(source, target, path):
    """Write a commented configuration for two image folders, of which the first has labels.

    All are pathlib.Path. Raises UserError where images or labels are missing, or `path` exists.
    """
    if path.exists():
        raise UserError(f"{path}: exists already; remove it, or choose another name with --out")
    found = choose(find_splits(source, labelled=True), find_splits(target))
    for domain, x in found.items():
        if x:
            what = f"{len(x['images'])} images, {len(x['pairs'])} labels, in {x['root']}"
            print(f"{domain}: {what}, layout {x['layout']}, split {x['split']}")
        else:
            print(f"{domain}: nothing with labels")
    sizes = {domain: training_sizes(found[domain]) for domain in ("source", "target")}
    smallest = np.minimum(sizes["source"][0], sizes["target"][0])
    name = re.sub(r"[^\w.-]+", "_", path.stem).strip("._-") or "my"
    in_root = Path.cwd().resolve() == ROOT
    tool = "-m tools.own_data" if in_root else shlex.quote(str(ROOT / "tools/own_data.py"))
    script = shlex.quote("run_all.sh" if in_root else str(ROOT / "run_all.sh"))
    check_it = f"python {tool} --check --cfg {shlex.quote(str(path))}"
    values = {
        "name": name,
        "check": check_it,
        "run": f"bash {script} {shlex.quote(str(path))}",
        "base": os.path.relpath(ROOT / "config.yaml", path.parent.resolve()),
        "gpu": torch.cuda.is_available(),
        "sizes": sizes,
        "crop": (smallest * 5 // 6 // 16 * 16).tolist(),
        "translation_crop": np.maximum(smallest // 2 // 4 * 4, 32).tolist(),
        **meaning(found),
    }
    written = [path]
    try:
        for domain, x in found.items():
            if x and x["list"]:
                x["list_file"] = path.with_name(f"{name}_{domain}.txt")
                written.append(x["list_file"])
                write_text(x["list_file"], "".join(f"{image}\n" for image in x["list"]))
        render(path, "own_data.yaml.jinja", **found, **values)
        load_config(path)
    except UserError:
        for file in written:
            file.unlink(missing_ok=True)
        raise
    print(f"{path}: written, name: {name}; read it through, then {check_it}")


def choose(sources, targets):
    """Return the splits to use: source, target, and val, which is None without labels."""

    def is_split(x, kind):
        return (x["split"] or "").rpartition("/")[2].lower().startswith(kind)

    def preference(x):
        return is_split(x, "train"), x["split"] is None, len(x["images"]) - len(x["pairs"])

    source = max(sources, key=lambda x: (is_split(x, "train"), len(x["pairs"])))
    target = max(targets, key=preference)
    labelled = [x for x in targets if x["pairs"] and x is not target]
    val = max(labelled, key=lambda x: (is_split(x, "val"), len(x["pairs"])), default=None)
    for x in (source, val):
        if x and len(x["pairs"]) < len(x["images"]):
            x["list"] = list(x["pairs"])  # of the images that have labels
    return {"source": source, "target": target, "val": val}


def training_sizes(x):
    """Return two [height, width], low and full: the median of a split's images, at most LARGEST.

    If there are landscape and portrait images, those of the more frequent shape count.
    """
    paths = sample(x, x["list"] or x["images"])
    sizes = np.array([read_image(path).shape[:2] for path in paths])
    landscape = sizes[:, 1] >= sizes[:, 0]
    size = np.median(sizes[landscape == (landscape.mean() >= 0.5)], axis=0)
    if size.min() < 40:  # a translation's crop is 32, of the low size
        fault = f"the images are {size[1]:.0f}x{size[0]:.0f}; they need 40x40 pixels at least"
        raise UserError(f"{x['root']}: {fault}")
    size = size * min(1, (LARGEST / size.prod()) ** 0.5)
    return [(size * scale).astype(int).tolist() for scale in (0.8, 1)]


def check(cfg, domain, images, shown=12):
    """Read all files of a datasets.Images, print sizes and class shares, draw a contact sheet.

    shown: the number of images on it. Returns the label values without a class, in words. Raises
    UserError for a file that cannot be trained on.
    """
    sizes, pixels, unknown, first = Counter(), np.zeros(256, np.int64), Counter(), {}
    known = set()
    if images.labelled:
        named = label_values(images.spec.ids, images.classes)
        known = {np.dot(x, CODE) if isinstance(x, tuple) else x for x in named}
        images.table[images.table == NO_CLASS] = IGNORED  # all are named below, not the first one
    with progress(total=len(images), desc=domain) as bar:
        for i, (size, found, counts) in enumerate(
            threads.map(lambda i: read(images, i), range(len(images)))
        ):
            sizes[size] += 1
            pixels += counts
            for code in found.keys() - known:
                unknown[code] += found[code]
                first.setdefault(code, images.label_paths[i])
            bar.update()
    labels = "" if images.labelled else ", labels not read"
    print(f"{domain}: {len(images)} images in {images.folder}{labels}")
    print(f"  left out: {left_out(images)}")
    print("  sizes: " + ", ".join(f"{n} of {w}x{h}" for (h, w), n in sizes.most_common(5)))
    if images.labelled:
        names = [*classes(cfg), "ignored"]
        counts = np.append(pixels[: len(names) - 1], pixels[IGNORED])
        shares = zip(names, 100 * counts / pixels.sum(), strict=True)
        print("  classes: " + ", ".join(f"{name} {share:.2f}%" for name, share in shares))
    kind = "colour" if images.coding == "colours" else "value"
    for code, count in unknown.most_common(NAMED):
        share = f"{count / pixels.sum():.2%} of the pixels, first in {first[code]}"
        print(f"  unknown {kind} {in_words(code, images.coding)}: {share}")
    if len(unknown) > NAMED:
        print(f"  and {len(unknown) - NAMED} more unknown {kind}s")
    images.check()
    path = Path(cfg.output) / cfg.name / f"contact_sheet_{domain}.png"
    write_image(path, contact_sheet(images, classes(cfg), shown))
    print(f"  contact sheet: {path}")
    return [f"{domain}: {code}" for code in unknown if kind == "value"]


def left_out(images):
    """Return in words which files in the folders of a datasets.Images are not read, and why."""
    counts = Counter()
    for _, folders, files in os.walk(images.folder):
        counts["hidden"] += sum(name.startswith(".") for name in folders + files)
        kinds = (Path(name).suffix.lower() for name in files if not name.startswith("."))
        counts.update(f"named *{kind}" for kind in kinds if kind not in EXTENSIONS)
        folders[:] = [name for name in folders if not name.startswith(".")]
    used = {images.folder / name for name in images.names} | set(images.label_paths)
    places = {"not in the list or of the layout": images.folder}
    if images.labelled:
        labels = os.path.commonpath([path.parent for path in images.label_paths])
        places["labels without an image"] = Path(labels)
    for why, folder in places.items():
        files = {folder / name for name in list_images(folder, unique=False)}
        counts[why] = len(files - used)
        used |= files
    return one_line(", ".join(f"{n} {why}" for why, n in counts.most_common() if n)) or "nothing"


def read(images, i):
    """Return image i's (H, W), its label's values -> pixels, and its label's pixels of each class.

    Pillow reads the files as well: what OpenCV guesses in a damaged one, it refuses.
    """
    labels = images.label_paths[i : i + 1] if images.labelled else []
    for path in (images.folder / images.names[i], *labels):
        try:
            with Image.open(path) as image:
                image.load()
        except UnidentifiedImageError:  # a format that OpenCV alone knows, or none
            continue
        except Exception as error:  # Pillow raises a dozen types, depending on the damage
            fault = f"is damaged inside ({one_line(error)})"
            raise UserError(f"{path}: {fault}; restore the file or remove it") from error
    size = images.image(i).shape[:2]
    if not images.labelled:
        return size, {}, np.zeros(256, int)
    values = read_label(images.label_paths[i], images.coding)
    return size, tally(values), np.bincount(images.to_classes(values, i).ravel(), minlength=256)


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
