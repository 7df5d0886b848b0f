"""Find images and their labels in a folder, by their names and by what the pictures look like."""

import functools
import itertools
import re
from collections import defaultdict
from posixpath import commonpath, dirname, normpath, splitext

import numpy as np
from PIL import Image

from datasets import CODE
from engine.config import UserError, one_line
from engine.folders import list_images
from layouts import LAYOUTS, match

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
# a word that begins a name, as in rgb_0001 or rgb0001, and one that ends it, as in 0001_rgb
FIRST, LAST = r"[^\W\d_]+(?:[\W_]+(?=.)|(?=\d))", r"(?<=.)[\W_]+[^\W\d_](?:[^\W_]*[^\W\d_])?"
# names of what is neither a photo nor a label of classes
OTHER = re.compile("viz|overlay|blend|depth|normal|flow|inst", re.IGNORECASE)


def find_splits(root, labelled=False):
    """Return the splits of the images below `root`, all in one layout. Raises UserError.

    A split is a dict: layout, a name or {images, labels}, two patterns; root; split; images, names
    relative to root; pairs, image -> its label. With `labelled`, one split at least has pairs.
    """
    look.cache_clear()
    if root.name == "images" and (root.parent / "labels").is_dir():
        root = root.parent
    files = list_images(root, unique=False)
    if not files:
        raise UserError(f"{root}: no images were found; see docs/own_data.md for the layouts")
    groups = groups_of(files)
    photos = [names for names in groups if not are_labels(root, groups[names].values())]
    found = [splits_in(root, files, pair) for pair in dict.fromkeys(guesses(groups, photos))]
    found = [splits for splits in found if is_labelled(splits)]
    if found:
        return max(found, key=rank)
    if labelled:
        kinds = (f"{len(names)} files as {min(names.values())}" for names in groups.values())
        fault = f"holds {one_line(', '.join(kinds))}, and no labels of those names, as PNG"
        remedy = 'write their patterns by hand: layout: {images: "rgb/*_rgb", labels: "seg/*_seg"}'
        raise UserError(f"{root}: {fault}; {remedy}")
    if len(photos) < len(groups):
        fault = "holds pictures of few colours, as labels are"
        raise UserError(f"{root}: {fault}; give the folder of the photos alone")
    root = root / commonpath(map(dirname, files))
    files = list_images(root)  # raises UserError where names differ in their extension only
    return splits_in(root, files, LAYOUTS["flat"][0])


def splits_in(root, files, pair):
    """Return the splits that have images that fit a pair of patterns.

    Files that differ in their extension only, which the core refuses, are in none.
    """
    name_of = {pairs[0]: name for name, pairs in LAYOUTS.items()}
    layout = name_of.get(pair) or {"images": pair[0], "labels": pair[1]}
    found, names = [], [None] if pair[0].find("{split}") < pair[0].find("*") else []
    if "{split}" in pair[0]:
        parts = {part for name in files for part in dirname(name).split("/")}
        names += sorted(part for part in parts if part.lower() in SPLITS) or ["*"]
    for split in names:
        patterns = [normpath(x.replace("{split}", split or ".")) for x in pair]
        images, labels = (match(files, pattern) for pattern in patterns)
        if len(patterns[1]) > len(patterns[0]):  # as in layouts.find_pairs
            images = {name: texts for name, texts in images.items() if name not in labels}
        if any(len({splitext(x)[0] for x in fits}) < len(fits) for fits in (images, labels)):
            continue
        label_of = {texts: name for name, texts in labels.items()}
        pairs = {x: label_of[y] for x, y in images.items() if label_of.get(y, x) != x}
        one = {"layout": layout, "root": root, "split": split}
        found += [one | {"images": list(images), "pairs": pairs}] if images else []
    return found


# ---------------------------------------------------------------- what the pictures look like


def some(names, count):
    """Return at most `count` of the names, evenly spaced."""
    names = list(names)
    return names[:: (len(names) - 1) // count + 1 or 1]


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


def are_labels(root, names):
    """Return whether most of the pictures look like labels, judged by some."""
    looks = [look(root / name)[0] for name in some(names, 6)]
    return sum(looks) > len(looks) / 2


def is_labelled(splits):
    """Return whether the labels of a split look like labels, and its images do not."""
    kinds = [[are_labels(x["root"], y) for y in (x["pairs"], x["pairs"].values())] for x in splits]
    return [False, True] in kinds


def rank(splits):
    """Return the key that orders pairs of patterns, the best at the end."""
    x = max(splits, key=lambda x: len(x["pairs"]))
    names = next(iter(x["pairs"].items()))
    is_other = any(map(OTHER.search, names))
    looks = [look(x["root"] / label) for label in some(x["pairs"].values(), 6)]
    _, colours, channels = np.median(looks, axis=0)  # few: of classes; one channel: values
    length = sum(len(name.rpartition("/")[2]) for name in names)
    return sum(len(x["pairs"]) for x in splits), not is_other, -colours, -channels, -length


# ---------------------------------------------------------------- patterns from names


def groups_of(files):
    """Return 40 groups: (folder, extension, first word, last word) -> stem -> name.

    They are the largest one of each folder, then the second one of each, and so on.
    """
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
    """Return the shortest (prefix, suffix) of the images and of the labels, or None.

    They fit if most labels have the name of an image in between.
    """
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
