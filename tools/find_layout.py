"""Find images and their labels in a folder, by their names and by what the pictures look like."""

import contextlib
import functools
import itertools
import re
from collections import defaultdict
from posixpath import commonpath, dirname, splitext

import numpy as np
from PIL import Image

from datasets import CODE
from engine.config import Config, UserError, one_line
from engine.folders import list_images
from layouts import LAYOUTS, find_pairs

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
# a word that begins a name, as in rgb_0001 or rgb0001, and one that ends it, as in 0001_rgb
FIRST, LAST = r"[^\W\d_]+(?:[\W_]+(?=.)|(?=\d))", r"(?<=.)[\W_]+[^\W\d_](?:[^\W_]*[^\W\d_])?"
# names of what is neither a photo nor a label of classes
OTHER = re.compile("viz|overlay|blend|depth|normal|flow|inst", re.IGNORECASE)


def find_splits(root, labelled=False):
    """Return the splits of the images below `root`, all in one layout. Raises UserError.

    A split is a dict: layout, root, split and list, as in a configuration; folder, below which the
    images are; images, their paths; pairs, image -> its label. With `labelled`, one split at least
    has pairs.
    """
    look.cache_clear()
    if root.name == "images" and (root.parent / "labels").is_dir():
        root = root.parent
    files = list_images(root, unique=False)
    if not files:
        raise UserError(f"{root}: no images there; give their folder (of a video: its frames)")
    groups = groups_of(files)
    photos = [x for x in groups if looks(root / name for name in groups[x].values())[0] <= 0.5]
    found = (splits_in(root, files, pair) for pair in dict.fromkeys(guesses(groups, photos)))
    if best := max(filter(is_labelled, found), key=rank, default=None):
        known = {None, "*", *(x["split"] for x in best)}  # of the others, some are photos alone
        photos = {root / name for key in photos for name in groups[key].values()}
        others = splits_in(root, files, LAYOUTS["flat"][0], labelled=False)
        return best + [x for x in others if not ({x["split"]} & known or {*x["images"]} - photos)]
    if labelled:
        kinds = (f"{len(names)} files as {min(names.values())}" for names in groups.values())
        fault = f"holds {one_line(', '.join(kinds))}, and no labels of those names, as sharp PNGs"
        remedy = 'write their patterns by hand: layout: {images: "rgb/*_rgb", labels: "seg/*_seg"}'
        raise UserError(f"{root}: {fault}; {remedy}")
    if len(photos) < len(groups):
        fault = "holds pictures of few colours, as labels are"
        raise UserError(f"{root}: {fault}; give the folder of the photos alone")
    root = root / commonpath(map(dirname, files))
    return splits_in(root, list_images(root), LAYOUTS["flat"][0], labelled=False)


def splits_in(root, files, pair, labelled=True):
    """Return the splits of a pair of patterns that have images, as layouts.find_pairs has them."""
    names, found = [None] if pair[0].find("{split}") < pair[0].find("*") else [], []
    if "{split}" in pair[0]:
        parts = {part for name in files for part in dirname(name).split("/")}
        names += sorted(part for part in parts if part.lower() in SPLITS) or ["*"]
    layout = {pairs[0]: name for name, pairs in LAYOUTS.items()}.get(pair)
    layout = layout or {"images": pair[0], "labels": pair[1]}
    for split in names:
        spec = Config(layout=layout, root=root, split=split, list=None, ids=None)
        with contextlib.suppress(UserError):  # no images, or two of one name
            folder, label_of = find_pairs(spec, "", labelled)
            images = [folder / name for name in label_of]
            pairs = zip(images, label_of.values(), strict=True)
            pairs = {image: label for image, label in pairs if labelled and label}
            found.append(spec | {"folder": folder, "images": images, "pairs": pairs})
    return found


# ---------------------------------------------------------------- what the pictures look like


def some(paths, count):
    """Return at most `count` of the paths, evenly spaced."""
    paths = list(paths)
    return paths[:: (len(paths) - 1) // count + 1 or 1]


@functools.cache
def look(path):
    """Return whether a picture looks like a label, its number of colours, and its channels."""
    try:
        with Image.open(path) as image:
            is_jpeg, pixels = image.format == "JPEG", np.atleast_3d(np.asarray(image)).astype(int)
    except Exception:  # Pillow raises a dozen types; --check names the file
        return False, 0, 0
    channels = pixels.shape[2]
    colours = len(np.unique(pixels[..., :3] @ CODE if channels >= 3 else pixels[..., 0]))
    flat = (pixels[:, 1:] == pixels[:, :-1]).all(axis=2).mean()
    is_label = colours <= 64 or (colours <= 1024 and flat > 0.5)
    return is_label and not is_jpeg, colours, channels


def looks(paths):
    """Return the medians of `look` over some of the paths: a label if above 0.5, and so on."""
    return np.median([look(path) for path in some(paths, 6)], axis=0)


def is_labelled(splits):
    """Return whether the labels of a split look like labels, and its images do not."""
    pairs = [x["pairs"] for x in splits if x["pairs"]]
    return any(looks(x.values())[0] > 0.5 >= looks(x)[0] for x in pairs)


def rank(splits):
    """Return the key that orders pairs of patterns, the best at the end."""
    x = max(splits, key=lambda x: len(x["pairs"]))
    names = [str(path.relative_to(x["root"])) for path in next(iter(x["pairs"].items()))]
    is_other = any(map(OTHER.search, names))
    _, colours, channels = looks(x["pairs"].values())  # few: of classes; one channel: values
    shared = len(set.intersection(*({*dirname(name).split("/")} for name in names)))
    length = sum(len(name.rpartition("/")[2]) for name in names)
    return sum(len(x["pairs"]) for x in splits), not is_other, shared, -colours, -channels, -length


# ---------------------------------------------------------------- patterns from names


def groups_of(files):
    """Return 40 groups, the largest of each folder first: (folder, extension, words) -> names."""
    groups, of_folder = defaultdict(dict), defaultdict(list)
    for name in files:
        folder, (path, extension) = dirname(name), splitext(name)
        stem = path[len(folder) :].lstrip("/")
        first, last = ends_of(stem)
        groups[folder, extension, first[1], last[1]][stem] = name
    for key in sorted(groups, key=lambda key: -len(groups[key])):
        of_folder[key[:2]].append(key)
    in_turns = itertools.chain(*itertools.zip_longest(*of_folder.values()))
    return {key: groups[key] for key in list(filter(None, in_turns))[:40]}


def ends_of(stem):
    """Return what may be the prefix of a name: nothing, a word, all words; and the suffix."""
    first = [re.match(f"(?:{FIRST}){count}", stem)[0] for count in ("{0}", "?", "*")]
    last = [re.search(f"(?:{LAST}){count}$", stem)[0] for count in ("{0}", "?", "*")]
    return first, last


def guesses(groups, photos):
    """Yield the pairs of patterns that fit a group of photos and a group of labels named alike."""
    others = [key for key in groups if key not in photos]
    for keys in itertools.product(photos, others):
        ends = ends_that_fit(*(groups[key] for key in keys))
        folders = folder_patterns(*(key[0].split("/") for key in keys))
        if ends and folders:
            pair = [f"{folder}/{a}*{b}" for folder, (a, b) in zip(folders, ends, strict=True)]
            pair = [re.sub(r"\*(/\*)+", "*", pattern).lstrip("/") for pattern in pair]
            if pair[0] == pair[1]:
                pair = [pattern + key[1] for pattern, key in zip(pair, keys, strict=True)]
            yield tuple(pair)


def ends_that_fit(images, labels):
    """Return the shortest (prefix, suffix) of images and labels that fit most labels, or None."""
    few = some(labels, 12)
    tried = itertools.product(*ends_of(min(images)), *ends_of(min(labels)))
    for a, b, c, d in sorted(tried, key=lambda ends: len("".join(ends))):
        inner = (x[len(c) : len(x) - len(d)] for x in few if x.startswith(c) and x.endswith(d))
        if sum(f"{a}{x}{b}" in images for x in inner) > len(few) / 2:
            return (a, b), (c, d)
    return None


def folder_patterns(images, labels):
    """Return the patterns of two folders, given as lists of names; None if their splits differ.

    A name that both share becomes {split}, if it is one such as train, or a *.
    """
    if {name.lower() for name in {*images} ^ {*labels}} & SPLITS:
        return None
    if len(images) == len(labels):
        for k, (x, y) in enumerate(zip(images, labels, strict=True)):
            if x == y:
                images[k] = labels[k] = "{split}" if x.lower() in SPLITS else "*"
    return "/".join(images), "/".join(labels)
