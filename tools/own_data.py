"""Write a first configuration for your own image folders, and check every file that one names.

python tools/own_data.py --init FOLDER_WITH_LABELS FOLDER_WITHOUT --out my.yaml
python tools/own_data.py --check --cfg my.yaml
"""

import colorsys
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

from datasets import CODE, IGNORED, NO_CLASS, Crops, Images
from engine.command import arguments, command
from engine.config import UserError, one_line
from engine.files import write_text
from engine.folders import list_images
from engine.images import paint, read_image, read_label, resize, threads, write_image
from engine.log import progress
from layouts import classes, label_values
from settings import load_config
from tools.find_layout import find_splits, looks, some
from tools.templates import render

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 1052 * 1914, 360 * 640  # pixels of a training image at most: GTA5's; without a GPU
ENLARGED = 360 * 480  # pixels to which smaller images grow: what is thin is hardly learned
SCALES = {"source": (0.8, 1), "target": (0.8, 1)}  # low and high size, of the full one
COARSE = SCALES | {"source": (0.8, 1.6)}  # where the source's files have half the pixels at most
SAMPLED = 200  # at most this many files are read for sizes and label values
LISTED = 60  # colours that are made classes, the most frequent ones
NAMED = 20  # values or colours that are printed


def main():
    parser = arguments(__doc__)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--check", action="store_true", help="read every file and show what it holds")
    words = "write a configuration for a folder with labels and one without"
    task.add_argument("--init", nargs=2, metavar="FOLDER", type=Path, help=words)
    parser.add_argument("--out", default="my.yaml", type=Path, help="the file that --init writes")
    args = parser.parse_intermixed_args()
    warnings.simplefilter("ignore")  # Pillow's, about metadata
    if args.init:
        write_config(*args.init, args.out)
        return
    cfg = load_config(args.cfg, args.overrides)
    labelled = {"source": True, "target": cfg.selftrain.diagnose or "oracle" in cfg.stages}
    labelled |= {"val": True} if cfg.val.root else {}
    labelled |= {f"more_val.{name}": True for name in cfg.more_val}
    found = {domain: Images(cfg, domain, labelled[domain]) for domain in labelled}
    unknown = [line for domain in found for line in check(cfg, domain, found[domain])]
    path = Path(cfg.output) / cfg.name / "crops.png"
    write_image(path, crops(cfg, found["source"], found["target"]))
    print(f"crops in training, source above target: {path}; are objects about as large in both?")
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
    gpu = torch.cuda.is_available()
    values = meaning(found) | {"gpu": gpu, "sizes": training_sizes(found, LARGEST[not gpu])}
    name = re.sub(r"[^\w.-]+", "_", path.stem).strip("._-") or "my"
    for domain, x in found.items():
        if not x:
            print(f"{domain}: nothing with labels")
            continue
        what = f"{len(x['images'])} images, {len(x['pairs'])} labels, in {x['root']}"
        print(f"{domain}: {what}, layout {x['layout']}, split {x['split']}")
        if domain != "target" and len(x["pairs"]) < len(x["images"]):
            x["list"] = path.with_name(f"{name}_{domain}.txt")
            names = (image.relative_to(x["folder"]).as_posix() for image in x["pairs"])
            write_text(x["list"], "\n".join([*names, ""]))
    read = [(x["pairs"] if x["list"] else x["images"], x["pairs"]) for x in found.values() if x]
    used = [path for images, labels in read for path in (*images, *labels.values())]
    for root in dict.fromkeys((source, target)):
        files = map(root.joinpath, list_images(root, unique=False))
        print(f"{root}: left out: {left_out(files, used)}")
    smallest = np.minimum(*(low for low, _ in values["sizes"].values()))
    here = "" if Path.cwd() == ROOT else f"{ROOT}/"
    values |= {
        "name": name,
        "check": shlex.join(["python", f"{here}tools/own_data.py", "--check", "--cfg", str(path)]),
        "run": shlex.join(["bash", f"{here}run_all.sh", str(path)]),
        "base": os.path.relpath(ROOT / "config.yaml", path.parent.resolve()),
        "crop": (smallest * 5 // 6 // 16 * 16).tolist(),
        "translation_crop": np.maximum(smallest // 2 // 4 * 4, 32).tolist(),
    }
    render(path, "own_data.yaml.jinja", **found, **values)
    load_config(path)
    print(f"{path}: written, name: {name}; read it through, then {values['check']}")


def choose(sources, targets):
    """Return the splits to use: source, target, and val, which is None without labels."""

    def is_split(x, kind):
        return (x["split"] or "").lower().startswith(kind)

    source = max(sources, key=lambda x: (bool(x["pairs"]), is_split(x, "train"), len(x["pairs"])))
    target = max(targets, key=lambda x: (is_split(x, "train"), not x["split"], -len(x["pairs"])))
    others = [x for x in targets if x["pairs"] and x is not target]
    val = max(others, key=lambda x: (is_split(x, "val"), len(x["pairs"])), default=None)
    return {"source": source, "target": target, "val": val}


def training_sizes(found, largest):
    """Return {domain: two [height, width], low and high} of source and target, in their own shapes.

    Full size has the pixels of the larger domain in both, at most `largest`; below ENLARGED up to 4
    times as many: what is small is not recognised. Both grow by one factor, until a crop that fits
    into both has the pixels that it has between equal shapes. A COARSE source is enlarged more.
    """
    shapes = {x: median_size(found[x]) for x in SCALES}
    pixels = max(shape.prod() for shape in shapes.values())
    pixels = min(np.clip(ENLARGED, pixels, 4 * pixels), largest)
    full = {x: shape * (pixels / shape.prod()) ** 0.5 for x, shape in shapes.items()}
    growth = (pixels / np.minimum(*full.values()).prod()) ** 0.5
    scales = COARSE if shapes["source"].prod() <= shapes["target"].prod() / 2 else SCALES
    return {x: np.outer(scales[x], growth * full[x]).astype(int).tolist() for x in scales}


def median_size(x):
    """Return the median (H, W) of a split's images, of the more frequent of portrait, landscape."""
    sizes = np.array([read_image(path).shape[:2] for path in some(x["images"], SAMPLED)])
    landscape = sizes[:, 1] >= sizes[:, 0]
    size = np.median(sizes[landscape == (landscape.mean() >= 0.5)], axis=0)
    if size.min() < 20:  # a translation's crop is 32, of the low size
        fault = f"the images are {size[1]:.0f}x{size[0]:.0f}; they need 20x20 pixels at least"
        raise UserError(f"{x['root']}: {fault}")
    return size


def coding_of(x):
    """Return how most labels of a split are coded: values, red or colours."""
    coding = "colours" if looks(x["pairs"].values())[2] > 2 else "values"
    return "red" if x["layout"] == "synthia" else coding


def meaning(found):
    """Return what the template says of the labels of source and val. Raises UserError.

    entries: (value or [r, g, b] as text, share of the pixels, class or None, the class's colour).
    """
    source, coding = found["source"], coding_of(found["source"])
    if found["val"] and coding_of(found["val"]) != coding:
        print("val: its labels are of another kind than the source's, and are not used")
        found["val"] = None
    pixels, colours = Counter(), {}  # of each value or colour; a palette's colours
    for x in filter(None, (source, found["val"])):
        for path in some(x["pairs"].values(), SAMPLED):
            values = read_label(path, coding)
            of_file = tally(values)
            pixels.update(of_file)
            if coding == "values" and of_file.keys() - colours.keys():
                painted = read_image(path)
                colours |= {value: painted[values == value][0].tolist() for value in of_file}
    shares = {code: pixels[code] / pixels.total() for code in sorted(pixels)}
    by_colour = coding == "colours"
    if len(shares) < 2 or (len(shares) > 255 and not by_colour):
        path, fault = next(iter(source["pairs"].values())), f"{len(shares)} values"
        remedy = "a label holds the number of a class in every pixel"
        raise UserError(f"{path}: this label and the others hold {fault}; {remedy}")
    if by_colour:
        names = {code: f"class_{k}" for k, (code, _) in enumerate(pixels.most_common(LISTED), 1)}
    else:
        names = {value: f"class_{value}" for value in shares}
        if 255 in shares:
            names[255] = "class_255" if is_class_255(shares) else None
            taken = names[255] or "ignored"
            print(f"value 255, {shares[255]:.1%} of the pixels, is taken as {taken}; see ids")
        painted = {*map(tuple, colours.values())}
        if len(painted) < len(colours) or all(len({*x}) == 1 for x in painted):  # no palette
            colours = {value: distinct_colour(k) for k, value in enumerate(names)}
    entries = [(in_words(x, coding), shares[x], names[x], colours.get(x)) for x in names]
    first = ", ".join(f"{key} ({share:.1%})" for key, share, *_ in entries[:NAMED])
    print(f"label {'colours' if by_colour else 'values'}, {len(shares)}: {first}")
    return {"by_colour": by_colour, "entries": entries}


def tally(values):
    """Return value, or code of a colour -> pixels, of the values of a label."""
    found, pixels = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), pixels.tolist(), strict=True))


def in_words(code, coding):
    """Return a value, or the colour of a code, as it is written in a configuration."""
    return str([code // place % 256 for place in CODE.tolist()] if coding == "colours" else code)


def is_class_255(shares):
    """Return whether the label value 255 is a class, by the shares of all values.

    It is one in a mask: beside one other value, or with a few percent of the pixels beside values
    that are not the numbers of three or more classes.
    """
    others = shares.keys() - {255}
    are_numbers = len(others) > 2 and max(others) < 64
    return len(others) < 2 or (shares[255] > 0.03 and not are_numbers)


def distinct_colour(k):
    """Return colour k, [r, g, b], of a series whose neighbours differ in hue and lightness."""
    colour = colorsys.hsv_to_rgb(k * 0.382 % 1, 1 - k % 3 * 0.25, 1 - k % 2 * 0.4)
    return [round(255 * channel) for channel in colour]


def check(cfg, domain, images):
    """Read all files of a datasets.Images, print sizes and class shares, draw a contact sheet.

    Returns the label values without a class, in words. Raises UserError for a file that cannot be
    trained on.
    """
    known = label_values(images.spec.ids, images.classes)
    known = {np.dot(x, CODE) if isinstance(x, tuple) else x for x in known}
    images.table[images.table == NO_CLASS] = IGNORED  # all are named below, not the first one
    sizes, pixels, first = Counter(), Counter(), {}  # pixels of each code; the first label with it
    with progress(total=len(images), desc=domain) as bar:
        found = threads.map(lambda i: read(images, i), range(len(images)))
        for path, (size, codes) in zip(images.label_paths, found, strict=True):
            sizes[size] += 1
            first |= dict.fromkeys(codes.keys() - pixels.keys(), path)
            pixels.update(codes)
            bar.update()
    words = "" if images.labelled else ", labels not read"
    print(f"{domain}: {len(images)} images in {images.folder}{words}")
    used = {images.folder / x for x in images.names} | {*filter(None, images.label_paths)}
    files = (path for folder in {x.parent for x in used} for path in folder.iterdir())
    print(f"  left out: {left_out(filter(Path.is_file, files), used)}")
    print("  sizes: " + ", ".join(f"{n} of {w}x{h}" for (h, w), n in sizes.most_common(5)))
    if images.labelled:
        names = [*classes(cfg), "ignored"]
        counts = np.bincount(images.table[[*pixels]], [*pixels.values()], 256)
        counts = np.append(counts[: len(names) - 1], counts[IGNORED])
        shares = zip(names, 100 * counts / pixels.total(), strict=True)
        print("  classes: " + ", ".join(f"{name} {share:.2f}%" for name, share in shares))
    kind = "colour" if images.coding == "colours" else "value"
    unknown = [code for code, _ in pixels.most_common() if code not in known]
    for code in unknown[:NAMED]:
        share = f"{pixels[code] / pixels.total():.2%} of the pixels, first in {first[code]}"
        print(f"  unknown {kind} {in_words(code, images.coding)}: {share}")
    images.check()
    path = Path(cfg.output) / cfg.name / f"contact_sheet_{domain}.png"
    write_image(path, contact_sheet(images, classes(cfg)))
    print(f"  contact sheet: {path}")
    return [f"{domain}: {code}" for code in unknown if kind == "value"]


def left_out(files, used):
    """Return in words which of the files are not among those that are used; all are Paths."""
    left = {*files} - {*used}
    kinds = Counter(path.suffix.lower() for path in left)
    words = [f"{count} *{kind}" for kind, count in kinds.most_common()]
    return one_line(f"{', '.join(words)}, as {min(left)}") if left else "nothing"


def read(images, i):
    """Return image i's (H, W), and its label's codes -> pixels.

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
    return size, tally(read_label(labels[0], images.coding)) if labels else {}


def contact_sheet(images, colours):
    """Return a picture (H, W, 3) uint8 of images, three a row, each beside its painted label."""
    tiles = []
    for i in some(range(len(images)), 12):
        pair = [images.image(i)]
        if images.labelled:
            painted = paint(images.label(i), colours)
            pair.append(cv2.addWeighted(pair[0], 0.4, painted, 0.6, 0))
        if not tiles:  # all have the shape of the first image
            size = (160, round(160 * pair[0].shape[1] / pair[0].shape[0]))
        tiles.append(np.hstack([resize(picture, size) for picture in pair]))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % 3)
    rows = [np.hstack(tiles[at : at + 3]) for at in range(0, len(tiles), 3)]
    if images.labelled:
        rows.append(legend(colours, rows[0].shape[1]))
    return np.vstack(rows)


def crops(cfg, *domains):
    """Return a picture of crops as in training, a row for each datasets.Images, (H, W, 3) uint8."""
    rows = []
    for images in domains:
        given = images.domain, images.unlabelled(), cfg.warmup.batch, 2
        of_domain = Crops(cfg, "warmup", *given)
        rows.append(np.hstack([of_domain[n]["image"] for n in range(len(of_domain))]))
    return np.vstack(rows)


def legend(colours, width, cell=150):
    """Return a picture of the classes' colours with their names, (H, width, 3) uint8."""
    across = max(width // cell, 1)
    entries = [*colours.items(), ("ignored", (0, 0, 0))]
    picture = np.full((24 * -(-len(entries) // across), width, 3), 255, np.uint8)
    font = (cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    for k, (name, colour) in enumerate(entries):
        x, y = k % across * cell + 4, k // across * 24 + 4
        picture[y : y + 16, x : x + 16] = colour
        cv2.putText(picture, name, (x + 22, y + 13), *font)
    return picture


if __name__ == "__main__":
    command(main)
