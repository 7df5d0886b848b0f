"""Where a dataset has its images and labels, what its label values mean; classes and colours."""

import re
from pathlib import Path

import numpy as np

from engine.config import UserError, one_line
from engine.folders import EXTENSIONS, list_images

# Cityscapes' 19 classes in order: colour; id in Cityscapes and GTA5, in SYNTHIA, ids in Mapillary
# Vistas 1.2, and 2.0 where several classes together are one of 1.2
CITYSCAPES = {
    "road": ((128, 64, 128), 7, 3, (13, 24, 41), (21, *range(35, 45), *range(46, 56), 57, 58, 74)),
    "sidewalk": ((244, 35, 232), 8, 4, (2, 15), (4, 24)),
    "building": ((70, 70, 70), 11, 2, (17,), (27, 28)),
    "wall": ((102, 102, 156), 12, 21, (6,), (12,)),
    "fence": ((190, 153, 153), 13, 5, (3,), (5,)),
    "pole": ((153, 153, 153), 17, 7, (45, 47), (85, 86, 88)),
    "traffic light": ((250, 170, 30), 19, 15, (48,), (*range(90, 96),)),
    "traffic sign": ((220, 220, 0), 20, 9, (50,), (99, 100, 101, 103)),
    "vegetation": ((107, 142, 35), 21, 6, (30,), (64,)),
    "terrain": ((152, 251, 152), 22, 16, (29,), (63,)),
    "sky": ((70, 130, 180), 23, 1, (27,), (61,)),
    "person": ((220, 20, 60), 24, 10, (19,), (30, 31)),
    "rider": ((255, 0, 0), 25, 17, (20, 21, 22), (32, 33, 34)),
    "car": ((0, 0, 142), 26, 8, (55,), (108,)),
    "truck": ((0, 0, 70), 27, 18, (61,), (114,)),
    "bus": ((0, 60, 100), 28, 19, (54,), (107,)),
    "train": ((0, 80, 100), 31, 20, (58,), (111,)),
    "motorcycle": ((0, 0, 230), 32, 12, (57,), (110,)),
    "bicycle": ((119, 11, 32), 33, 11, (52,), (105,)),
}


def classes(cfg):
    """Return the classes of a configuration in the order of their numbers: name -> (r, g, b)."""
    if cfg.classes == "cityscapes":
        return {name: colour for name, (colour, *_) in CITYSCAPES.items()}
    if isinstance(cfg.classes, list):
        return {name: CITYSCAPES[name][0] for name in cfg.classes}
    return {name: tuple(colour) for name, colour in cfg.classes.items()}


# ids -> all label values; the column of CITYSCAPES with those that are not ignored
KNOWN = [*range(35), 255]
NAMED_IDS = {
    "cityscapes": (KNOWN, 1),
    "synthia": (range(23), 2),
    "mapillary": (range(66), 3),
    "mapillary_v2": (range(124), 4),
}


def label_values(ids, classes):
    """Return what each label value of a dataset means: value -> class number, or 255 (ignored).

    ids: a name of NAMED_IDS, "index" (value k is class k), "train_ids" (0 to 18 are Cityscapes' 19
    classes), "colours" (the values are the classes' colours), or a mapping from value or colour to
    class name or None (ignored). classes: the trained ones, name -> colour; others are ignored.
    """
    if ids in ("train_ids", "index"):
        own = dict(enumerate(CITYSCAPES if ids == "train_ids" else classes)) | {255: None}
    elif ids == "colours":
        own = {colour: name for name, colour in classes.items()}
    elif isinstance(ids, str):
        values, column = NAMED_IDS[ids]
        own = dict.fromkeys(values)
        for name, row in CITYSCAPES.items():
            own |= dict.fromkeys(np.ravel(row[column]).tolist(), name)
    else:
        own = ids
    number_of = {name: k for k, name in enumerate(classes)}
    return {value: number_of.get(name, 255) for value, name in own.items()}


# layout -> pairs of patterns below `root`, of images and of their labels; the first pair with files
# counts. A * stands for the same text in both, over folders too. Without an extension: any.
LAYOUTS = {
    "gta5": [("images/*", "labels/*")],
    "synthia": [("RGB/*", "GT/LABELS/*")],
    "cityscapes": [("leftImg8bit/{split}/*_leftImg8bit", "gtFine/{split}/*_gtFine_labelIds")],
    "acdc": [("rgb_anon/{split}/*_rgb_anon", "gt/{split}/*_gt_labelIds")],
    "dark_zurich": [("rgb_anon/{split}/night/*_rgb_anon", "gt/{split}/night/*_gt_labelIds")],
    "bdd100k": [
        ("images/10k/{split}/*", "labels/sem_seg/masks/{split}/*"),
        ("images/{split}/*", "labels/{split}/*_train_id"),
        ("images/{split}/*", "gtFine/{split}/*_train_id"),
    ],
    "mapillary": [
        ("{split}/images/*", "{split}/v1.2/labels/*"),
        ("{split}/images/*", "{split}/labels/*"),
    ],
    "mapillary_v2": [("{split}/images/*", "{split}/v2.0/labels/*")],
    "folder": [("{split}/images/*", "{split}/labels/*")],
    "flat": [("{split}/*", "{split}/../labels/*")],
}


def matching(root, pattern):
    """Return the folder before a pattern's first *, and `match` of the images below it."""
    start = pattern[: pattern.index("*")].rpartition("/")[0]
    folder = Path(root) / start
    names = list_images(folder, unique=Path(pattern).suffix.lower() not in EXTENSIONS)
    return folder, match(names, pattern[len(start) :].lstrip("/"))


def match(names, pattern):
    """Return the names that fit a pattern: name -> texts that stand for each *, over folders."""
    ending = "" if Path(pattern).suffix.lower() in EXTENSIONS else r"\.\w+"
    expression = re.compile(re.escape(pattern).replace(r"\*", "(.*)") + ending)
    matches = {name: expression.fullmatch(name) for name in names}
    return {name: found.groups() for name, found in matches.items() if found}


def find_pairs(spec, domain, labelled):
    """Return a dataset's folder of images, and image name -> path of its label, or None.

    A file that fits both patterns is no image if the labels' pattern is the longer one.
    """
    own = spec.layout
    pairs = LAYOUTS[own] if isinstance(own, str) else [(own["images"], own["labels"])]
    for pair in pairs:
        if spec.ids == "train_ids":
            pair = [pattern.replace("labelIds", "labelTrainIds") for pattern in pair]
        images, labels = (pattern.replace("{split}", spec.split or ".") for pattern in pair)
        folder, texts = matching(spec.root, images)
        is_mixed = len(labels) > len(images) and labels.startswith(images.partition("*")[0])
        label_folder, label_texts = None, {}
        if labelled or is_mixed:
            label_folder, label_texts = matching(spec.root, labels)
        if is_mixed:
            of_labels = {label_folder / name for name in label_texts}
            texts = {name: text for name, text in texts.items() if folder / name not in of_labels}
        paths = {text: label_folder / name for name, text in label_texts.items()}
        if texts and (paths or not labelled):
            break
    if not texts:
        keys = f"are {domain}.root, {domain}.split and {domain}.layout right?"
        raise UserError(f"{folder}: holds no images of layout {own}; {keys}")
    return folder, {name: paths.get(text) for name, text in texts.items()}


def narrow(names, path, folder):
    """Return the names that a list file asks for; each of its lines begins with a path to one."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: this list of images cannot be read ({error})") from error
    known = set(names)
    wanted = set()
    for line in filter(str.strip, lines):
        name = line if line in known else line.split()[0]  # a label's path may follow
        while name not in known and "/" in name:  # it may begin above the folder
            name = name.partition("/")[2]
        if name not in known:
            fault = f"names {one_line(line)}; one path a line, relative to {folder}"
            raise UserError(f"{path}: {fault}")
        wanted.add(name)
    if not wanted:
        raise UserError(f"{path}: names no image; one path a line, relative to {folder}")
    return [name for name in names if name in wanted]
