"""What labels hold: values or colours, their shares, and a first class for each."""

import contextlib
from collections import Counter

import cv2
import numpy as np
from PIL import Image

from datasets import CODE
from engine.config import UserError
from engine.images import read_image, read_label
from layouts import CITYSCAPES, label_values

SAMPLED = 200  # at most this many files are read for sizes and label values
LISTED = 60  # colours of labels that are made classes, the most frequent ones
NAMED = 20  # colours or values that are printed
KNOWN_IDS = {"cityscapes": "cityscapes", "acdc": "cityscapes", "dark_zurich": "cityscapes"}
KNOWN_IDS |= {"synthia": "synthia", "bdd100k": "train_ids", "mapillary": "mapillary"}


def sample(x, names):
    """Return the paths of at most SAMPLED of a split's files, evenly spaced."""
    names = list(names)
    return [x["root"] / name for name in names[:: -(-len(names) // SAMPLED)]]


def coding_of(x):
    """Return how the labels of a split are coded: values, red or colours. Raises UserError."""
    if x["layout"] == "synthia":
        return "red"
    kinds = {}
    for path in sample(x, x["pairs"].values()):
        with contextlib.suppress(OSError), Image.open(path) as image:
            kinds[image.mode.startswith("RGB") or image.mode == "LA"] = path
    if len(kinds) > 1:
        fault = f"is a colour image, but {kinds[False]} is not; labels must be of one kind"
        raise UserError(f"{kinds[True]}: {fault}")
    return "colours" if True in kinds else "values"


def tally(values):
    """Return value -> pixels of a label's values (H, W), or of its colours (H, W, 3) as codes."""
    codes = (values if values.ndim == 2 else values @ CODE).ravel()
    starts = np.append(0, np.flatnonzero(codes[1:] != codes[:-1]) + 1)  # few: labels are flat
    found, where = np.unique(codes[starts], return_inverse=True)
    pixels = np.bincount(where, np.diff(np.append(starts, codes.size))).astype(int)
    return dict(zip(found.tolist(), pixels.tolist(), strict=True))


def in_words(code, coding):
    """Return a value, or the colour of a code, as it is written in a configuration."""
    return str([code // place % 256 for place in CODE.tolist()] if coding == "colours" else code)


def meaning(found):
    """Return what the template says of the labels in source and val. Raises UserError.

    entries: (value or [r, g, b] as text, share of the pixels, class or None, the class's colour).
    """
    source, val = found["source"], found["val"]
    coding = coding_of(source)
    other = val and coding_of(val) != coding
    pixels, colours = Counter(), {}  # of each value or code; a palette's colours, or its own
    for x in (source, val) if val and not other else (source,):
        for path in sample(x, x["pairs"].values()):
            values = read_label(path, coding)
            of_file = tally(values)
            pixels.update(of_file)
            new = of_file.keys() - colours.keys()
            painted = read_image(path) if new else None
            codes = values if values.ndim == 2 else values @ CODE
            colours |= {code: painted[codes == code][0].tolist() for code in new}
    shares = {code: pixels[code] / pixels.total() for code in sorted(pixels)}
    told = {"known": None, "note": None, "rest": 0, "other": other}
    grey = all(len(set(colour)) == 1 for colour in colours.values())
    told["by_colour"] = coding == "colours" and not grey
    if len(shares) < 2 or (len(shares) > 255 and not told["by_colour"]):
        path, fault = sample(source, source["pairs"].values())[0], f"{len(shares)} values"
        remedy = "a label holds the number of a class in every pixel"
        raise UserError(f"{path}: this label and the others hold {fault}; {remedy}")
    if told["by_colour"]:
        listed = pixels.most_common(LISTED)
        names = {code: f"class_{k}" for k, (code, _) in enumerate(listed, 1)}
        told["rest"], left = len(shares) - len(names), 1 - sum(shares[code] for code in names)
        if left > 0.05:
            fault = f"{told['rest']} rare colours hold {left:.0%} of the pixels, and are ignored"
            told["note"] = f"{fault}: were the labels scaled or compressed?"
    else:
        value_of = {code: code & 255 if coding == "colours" else code for code in shares}
        is_class, told["note"] = judge_255({value_of[code]: shares[code] for code in shares})
        names = {code: f"class_{value}" for code, value in value_of.items()}
        names |= {code: None for code in names if value_of[code] == 255 and not is_class}
        ids = isinstance(source["layout"], str) and KNOWN_IDS.get(source["layout"])
        if ids and shares.keys() <= label_values(ids, CITYSCAPES).keys():
            told["known"] = ids
        if grey or len(set(map(tuple, colours.values()))) < len(colours):  # no palette
            colours = dict(zip(names, distinct_colours(len(names)), strict=True))
    told["entries"] = [(in_words(x, coding), shares[x], names[x], colours[x]) for x in names]
    first = ", ".join(f"{key} ({share:.1%})" for key, share, *_ in told["entries"][:NAMED])
    more = f", and {len(shares) - NAMED} more" if len(shares) > NAMED else ""
    print(f"label {'colours' if told['by_colour'] else 'values'}: {first}{more}")
    if told["note"]:
        print(f"  {told['note']}")
    return told


def judge_255(shares):
    """Return whether the label value 255 is a class, and a line that says so; None without it.

    It is one in a mask: beside one other value, or with a few percent of the pixels beside values
    that are not the numbers of three or more classes.
    """
    if 255 not in shares:
        return True, None
    others, words = shares.keys() - {255}, f"value 255, {shares[255]:.1%} of the pixels, is taken"
    numbered = len(others) > 2 and max(others) < 64
    if len(others) < 2 or (shares[255] > 0.03 and not numbered):
        return True, f"{words} as a class; if it is none, write null for it in ids"
    return False, f"{words} as ignored; if it is a class, name it in ids and classes"


def distinct_colours(count):
    """Return `count` colours [r, g, b], each far in CIELAB from those before it and from black."""
    rgb = np.stack(np.meshgrid(*[np.arange(0, 256, 36)] * 3), -1).reshape(-1, 3)
    lab = cv2.cvtColor(np.float32(rgb[None] / 255), cv2.COLOR_RGB2LAB)[0]
    distance, chosen = np.linalg.norm(lab, axis=1), []
    for _ in range(count):
        chosen.append(distance.argmax())
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    return rgb[chosen].tolist()
