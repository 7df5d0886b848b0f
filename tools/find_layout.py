"""Find images and their labels in a folder, by their names and by what the pictures look like."""

import functools
import heapq
import random
import re
from collections import Counter, defaultdict
from difflib import SequenceMatcher
from posixpath import commonpath, dirname, normpath, splitext

import numpy as np
from PIL import Image

from datasets import CODE
from engine.config import UserError, one_line
from engine.folders import list_images
from layouts import LAYOUTS, match

# what a folder of a split is called; any other folder in the place of {split} is a *
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
SPLIT = rf"(?P<split>(?:[^/]+/)??(?i:{'|'.join(SPLITS)})(?=/)|[^/]+)"
# names of what is neither a photo nor a label of classes
OTHER = re.compile(r"viz|vis(?!ib)|overlay|blend|depth|disp|normal|flow|inst", re.IGNORECASE)
WRITE = 'write both patterns by hand: layout: {images: "rgb/*_rgb", labels: "seg/*_seg"}'


def find_splits(root, labelled=False):
    """Return the splits of the images below `root`, all in one layout. Raises UserError.

    A split is a dict: layout, a name or {images, labels}, two patterns; root; split; images, names
    relative to root; pairs, image -> its label; list, the names of the images to use, None for all.
    With `labelled`, one split at least has pairs.
    """
    look.cache_clear()
    if root.name == "images" and (root.parent / "labels").is_dir():
        root = root.parent
    files = list_images(root, unique=False)
    if not files:
        raise UserError(f"{root}: no images were found; see docs/own_data.md for the layouts")
    known = {LAYOUTS["folder"][0]: "folder", ("images/{split}/*", "labels/{split}/*"): None}
    for name in LAYOUTS:
        if name not in ("gta5", "flat"):  # as folder; one that takes every file for a photo
            known |= {pair: known.get(pair, name) for pair in LAYOUTS[name]}
    found = [splits_in(root, files, pair, name) for pair, name in known.items()]
    best = max(found, key=lambda splits: (count(splits, "pairs"), named(splits)))
    if not is_labelled(best):
        best = []
    if 2 * count(best, "pairs") <= count(best, "images"):
        best = max(best, guess(root, files), key=lambda splits: count(splits, "pairs"))
    if best:
        return best
    if labelled:
        groups = (f"{len(names)} files as {names[0]}" for names in groups_of(files).values())
        fault = f"holds {one_line(', '.join(groups))}, and no labels of those names"
        raise UserError(f"{root}: {fault}; labels are PNG; {WRITE}")
    photos = photos_in(root, files)
    best = max(found, key=lambda splits: (count(splits, "images"), named(splits)))
    if best and {name for x in best for name in x["images"]} <= photos:
        return best
    if len(photos) < len(files):
        place = commonpath([dirname(name) for name in photos])
        root, photos = root / place, {name[len(place) :].lstrip("/") for name in photos}
        files = list_images(root, unique=False)
    list_images(root)  # raises UserError where names differ in their extension only
    best = splits_in(root, files, ("{split}/*", "{split}/*"), "flat")
    for x in best:
        kept = [name for name in x["images"] if name in photos]
        x["list"] = kept if len(kept) < len(x["images"]) else None
    return [x for x in best if x["list"] != []]


def splits_in(root, files, pair, layout=None):
    """Return the splits that have images that fit a pair of patterns; layout: its name, if any.

    Files that differ in their extension only, which the core refuses, are in none.
    """
    layout, names, found = layout or {"images": pair[0], "labels": pair[1]}, set(), []
    if all(pattern.find("{split}") < pattern.find("*") for pattern in pair):
        names.add(None)  # a split of null leaves patterns that the core can read
    if "{split}" in pair[0]:
        expression = re.escape(pair[0]).replace(r"\{split\}", SPLIT, 1).replace(r"\*", ".*")
        for found_split in filter(None, (re.match(expression, name) for name in files)):
            parts = found_split["split"].split("/")
            names.add("/".join(part if part.lower() in SPLITS else "*" for part in parts))
    for split in sorted(names, key=str):
        patterns = [normpath(x.replace("{split}", split or ".")) for x in pair]
        images, labels = (match(files, pattern) for pattern in patterns)
        if len(patterns[1]) > len(patterns[0]):  # as in layouts.find_pairs
            images = {name: texts for name, texts in images.items() if name not in labels}
        if any(len({splitext(x)[0] for x in fits}) < len(fits) for fits in (images, labels)):
            continue
        label_of = {texts: name for name, texts in labels.items()}
        pairs = {x: label_of[texts] for x, texts in images.items() if label_of.get(texts, x) != x}
        if images:
            one = {"layout": layout, "root": root, "split": split, "list": None}
            found.append(one | {"images": list(images), "pairs": pairs})
    return found


def count(splits, key):
    return len({name for x in splits for name in x[key]})


def named(splits):
    return sum((x["split"] or "").rpartition("/")[2].lower() in SPLITS for x in splits)


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


def some(names, count):
    """Return at most `count` of the names, drawn at random but always the same."""
    return random.Random(0).sample(sorted(names), min(count, len(names)))


def are_labels(root, names):
    """Return whether most of the pictures look like labels, judged by some."""
    looks = [look(root / name)[0] for name in some(names, 6)]
    return sum(looks) > len(looks) / 2


def is_labelled(splits):
    return any(are_labels(x["root"], x["pairs"].values()) for x in splits)


def groups_of(files):
    """Return (folder, extension) -> names."""
    groups = defaultdict(list)
    for name in files:
        groups[dirname(name), splitext(name)[1]].append(name)
    return groups


def photos_in(root, files):
    """Return the names of the photos below a folder: not those that look like labels."""
    groups = [names for names in groups_of(files).values() if not are_labels(root, names)]
    photos = {name for names in groups for name in names}
    if not photos:
        fault = "holds pictures of few colours, as labels are, and no photos"
        raise UserError(f"{root}: {fault}; give the folder of the photos")
    return photos


def guess(root, files):
    """Return the splits of the pair of patterns that fits best, [] if no pictures are labels.

    Patterns are made from some labels and the photos whose names share their rarest words.
    """
    groups = groups_of(files)
    names = [name for group in some(groups, 24) for name in some(groups[group], 6)]
    words = {name: set(split_words(name)) for name in files}
    common = Counter(word for of_name in words.values() for word in of_name)
    votes = Counter()
    for label in some([name for name in names if look(root / name)[0]], 12):
        near = {name: sum(1 / common[x] for x in words[name] & words[label]) for name in files}
        nearest = [x for group in groups.values() for x in heapq.nlargest(3, group, near.get)]
        for image in heapq.nlargest(12, nearest, near.get):
            if not look(root / image)[0]:
                votes.update(patterns_of(image, label))
    found = []
    for pair, _ in votes.most_common(40):
        splits = splits_in(root, files, pair)
        images = {name for x in splits for name in x["pairs"]}
        if len(images) > 1 and is_labelled(splits) and not are_labels(root, images):
            found.append(splits)
    most = max((count(splits, "pairs") for splits in found), default=0)
    found = [splits for splits in found if count(splits, "pairs") > most / 2]
    return max(found, key=rank, default=[])


def split_words(name):
    return re.findall(r"[^\W\d_]+|\d+|[\W_]", splitext(name)[0])


def patterns_of(image, label):
    """Return pairs of patterns that fit two names, without and with their extensions.

    What the names share becomes a *, or {split} for a folder's name such as train.
    """
    words = split_words(image), split_words(label)
    patterns, ends = ["", ""], [0, 0]
    for *starts, size in SequenceMatcher(None, *words, autojunk=False).get_matching_blocks():
        shared = "".join(words[0][starts[0] : starts[0] + size])
        for k in range(2):
            patterns[k] += "".join(words[k][ends[k] : starts[k]])
            patterns[k] += wildcard(shared, patterns[k].endswith("/") or starts == [0, 0])
            ends[k] = starts[k] + size
    pairs = [tuple(patterns), (patterns[0] + splitext(image)[1], patterns[1] + splitext(label)[1])]
    splits = [[x for x in pattern.lower().split("/") if x in SPLITS] for pattern in patterns]
    if splits[0] != splits[1] or "*" not in patterns[0]:  # of train and val, or of no common name
        return []
    return [pair for pair in pairs if pair[0] != pair[1]]


def wildcard(text, starts_folder):
    """Return the pattern for a text that two names share. Marks at its ends stay as they are."""
    left, inner, right = re.fullmatch(r"([\W_]*)(.*?)([\W_]*)", text, re.DOTALL).groups()
    pattern, starts_folder = "", starts_folder or left.endswith("/")
    for part, slash in re.findall(r"([^/]+)(/?)", inner + ("/" if right.startswith("/") else "")):
        is_split = slash and starts_folder and part.lower() in SPLITS
        pattern += ("{split}" if is_split else "*") + slash
        starts_folder = True
    return left + re.sub(r"\*(/\*)+", "*", pattern) + right.removeprefix("/" * bool(inner))


def rank(splits):
    """Return the key that orders pairs of patterns, the one of photos and classes at the end."""
    x = max(splits, key=lambda x: len(x["pairs"]))
    looks = np.array([look(x["root"] / label) for label in some(x["pairs"].values(), 6)])
    words, others = (set(split_words(name)) for name in next(iter(x["pairs"].items())))
    patterns = x["layout"].values()
    return (
        not any(map(OTHER.search, patterns)),
        count(splits, "pairs"),
        looks[:, 2].max() == 1,  # values before colours
        -len(words ^ others),
        -np.median(looks[:, 1]),  # classes before instances
        -count(splits, "images"),
        -sum(map(len, patterns)),
    )
