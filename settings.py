"""Classes, label values, layouts; what the keys of a configuration may be and what must agree."""

import math
from pathlib import Path

from engine import config
from engine.config import (
    NULL,
    TEXT,
    choice,
    either,
    integer,
    mapping,
    number,
    one_line,
    require,
    sequence,
)

DEFAULTS = Path(__file__).parent / "config.yaml"
# Cityscapes' 19 classes in order: colour; id in Cityscapes and GTA5, in SYNTHIA, ids in Mapillary
CITYSCAPES = {
    "road": ((128, 64, 128), 7, 3, (13, 24, 41)),
    "sidewalk": ((244, 35, 232), 8, 4, (2, 15)),
    "building": ((70, 70, 70), 11, 2, (17,)),
    "wall": ((102, 102, 156), 12, 21, (6,)),
    "fence": ((190, 153, 153), 13, 5, (3,)),
    "pole": ((153, 153, 153), 17, 7, (45, 47)),
    "traffic light": ((250, 170, 30), 19, 15, (48,)),
    "traffic sign": ((220, 220, 0), 20, 9, (50,)),
    "vegetation": ((107, 142, 35), 21, 6, (30,)),
    "terrain": ((152, 251, 152), 22, 16, (29,)),
    "sky": ((70, 130, 180), 23, 1, (27,)),
    "person": ((220, 20, 60), 24, 10, (19,)),
    "rider": ((255, 0, 0), 25, 17, (20, 21, 22)),
    "car": ((0, 0, 142), 26, 8, (55,)),
    "truck": ((0, 0, 70), 27, 18, (61,)),
    "bus": ((0, 60, 100), 28, 19, (54,)),
    "train": ((0, 80, 100), 31, 20, (58,)),
    "motorcycle": ((0, 0, 230), 32, 12, (57,)),
    "bicycle": ((119, 11, 32), 33, 11, (52,)),
}


def classes(cfg):
    """Return the classes of a configuration in the order of their numbers: name -> (r, g, b)."""
    if cfg.classes == "cityscapes":
        return {name: colour for name, (colour, *_) in CITYSCAPES.items()}
    if isinstance(cfg.classes, list):
        return {name: CITYSCAPES[name][0] for name in cfg.classes}
    return {name: tuple(colour) for name, colour in cfg.classes.items()}


def label_values(ids, names):
    """Return what each label value of a dataset means: value -> class number, or 255 (ignored).

    ids: "cityscapes", "synthia", "mapillary", "index" (value k is class k), "train_ids" (0 to 18
    are Cityscapes' 19 classes), or a mapping from value to class name or None (ignored).
    names: the trained classes in order; a class that is not among them is ignored.
    A value that is missing from the result is an error in the data.
    """
    number_of = {name: k for k, name in enumerate(names)}
    if ids == "cityscapes":
        own = {value: name for name, (_, value, _, _) in CITYSCAPES.items()}
        ids = dict.fromkeys([*range(35), 255]) | own
    elif ids == "synthia":
        own = {value: name for name, (_, _, value, _) in CITYSCAPES.items()}
        ids = dict.fromkeys(range(23)) | own
    elif ids == "mapillary":
        own = {value: name for name, row in CITYSCAPES.items() for value in row[3]}
        ids = dict.fromkeys(range(66)) | own
    elif ids == "train_ids":
        ids = dict(enumerate(CITYSCAPES)) | {255: None}
    elif ids == "index":
        ids = dict(enumerate(names)) | {255: None}
    return {value: number_of.get(name, 255) for value, name in ids.items()}


# layout: folder of images; folders of labels, of which the first that exists is used; what ends the
# stem of an image's and of a label's name (labelIds become labelTrainIds where ids = train_ids)
LAYOUTS = {
    "gta5": ("images", ["labels"], "", ""),
    "synthia": ("RGB", ["GT/LABELS"], "", ""),
    "cityscapes": ("leftImg8bit/{split}", ["gtFine/{split}"], "_leftImg8bit", "_gtFine_labelIds"),
    "acdc": ("rgb_anon/{split}", ["gt/{split}"], "_rgb_anon", "_gt_labelIds"),
    "dark_zurich": ("rgb_anon/{split}/night", ["gt/{split}/night"], "_rgb_anon", "_gt_labelIds"),
    "bdd100k": ("images/{split}", ["labels/{split}", "gtFine/{split}"], "", "_train_id"),
    "folder": ("{split}/images", ["{split}/labels"], "", ""),
    "flat": ("{split}", ["{split}/../labels"], "", ""),
}

# ---------------------------------------------------------------- the keys of a configuration

STAGES = ("demo_data", "translate", "source_only", "warmup", "selftrain", "oracle")
NETWORKS = ("deeplab_v2_resnet101", "resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2")
OWN_NETWORKS = {}  # name -> function, of models.register


def _is_network(name):
    known = name in NETWORKS or name in OWN_NETWORKS
    return known or (isinstance(name, str) and name.count("/") == 2 and name.startswith("smp/"))


def _is_name(name):
    return TEXT[1](name) and all(c.isalnum() or c in "-_." for c in name) and name[-1] != "."


SHARE, STEPS, POSITIVE = number(0, 1), integer(1), number(1e-12)
NAME = ("a name of letters, digits, - _ .", _is_name)
OWN = (f"{' | '.join(NETWORKS)}, smp/ARCHITECTURE/ENCODER, or registered", _is_network)
SIZE = sequence(integer(8), 2, 2)
COLOUR = sequence(integer(0, 255), 3, 3)
LABELS = ("consensus", "online", "probability", "feature")
WHOLE = ("classes", "ids", "subsets")  # their mappings are one value
# key.sub or key -> rule, where the type of config.yaml's value does not say what a value may be
RULES = {
    "name": NAME,
    "stages": sequence(choice(*STAGES)),
    "device": choice("auto", "cpu", "cuda"),
    "precision": choice("auto", "bf16", "fp16", "fp32"),
    "workers": either(choice("auto"), integer(0, 256)),
    "classes": either(
        choice("cityscapes"),
        sequence(choice(*CITYSCAPES), 2),
        mapping(TEXT, COLOUR, 2, 254),  # 255 is ignored, in 8 bits
    ),
    "layout": choice(*LAYOUTS),
    "ids": either(
        choice("cityscapes", "synthia", "mapillary", "train_ids", "index"),
        mapping(integer(0, 65535), either(TEXT, NULL)),
    ),
    "sizes": sequence(SIZE, 1),
    "size": either(SIZE, NULL),
    "crop": SIZE,
    "translation.crop": sequence(integer(32, step=4), 2, 2),
    "tile": sequence(integer(32, step=32), 2, 2),
    "batch": sequence(integer(0, 4096), 1),
    "network": OWN,
    "output_stride": choice(8, 16),
    "channels": integer(32, step=32),
    "filters": integer(4),
    "supervised": choice("ce", "ohem"),
    "optimizer.name": choice("sgd", "adamw"),
    "bn_recalibrate": sequence(choice("source", "target")),
    "centroids": choice("crdomix", "target"),
    "labels": choice(*LABELS),
    "scales": sequence(number(0.05, 4), 1),
    "subsets": mapping(NAME, sequence(TEXT, 1), low=0),
    **dict.fromkeys(("split", "list", "val.root", "images", "weights"), either(TEXT, NULL)),
    **dict.fromkeys(("min_scale", "max_class_share", "layer_decay"), number(0.01, 1)),
    **dict.fromkeys(("ema_limit", "strong", "momentum"), SHARE),
    **dict.fromkeys(("lr_head", "translation.lr"), POSITIVE),
    **dict.fromkeys(("accumulate", "steps", "rounds", "blocks", "bn_images"), STEPS),
    **dict.fromkeys(("log_every", "pictures_every", "save_every"), STEPS),
}


def load_config(path, overrides=()):
    """Return the checked Config of a YAML file on top of its `base:`, with overrides on top.

    overrides: texts of the form key.sub=value. Raises UserError.
    """
    return checked(config.read(path, WHOLE), overrides, path)


def load_saved(tree, overrides, origin):
    """Return the Config of a tree, or of a YAML file, that a run of any release has written.

    Keys that are newer than the run have the values of config.yaml; older ones that are gone are
    left out. Raises UserError.
    """
    tree = tree if isinstance(tree, dict) else config.read(tree)
    defaults = config.read(DEFAULTS)
    tree = config.merge(defaults, _known(tree, defaults), WHOLE)
    tree["compile"] = tree["compile"] is True  # it could be auto
    return checked(tree, overrides, origin)


def _known(tree, defaults):
    """Return a tree without the keys that `defaults` lacks; names of more_val are the user's."""
    kept = {}
    for key, value in tree.items():
        if key in defaults:
            nested = isinstance(value, dict) and key not in ("more_val", *WHOLE)
            kept[key] = _known(value, defaults[key]) if nested else value
    return kept


def checked(tree, overrides, origin):
    """Return the Config of a tree of plain values and overrides.

    origin: where the tree comes from, for messages. Raises UserError.
    """
    tree, example = config.override(tree, overrides, WHOLE), config.read(DEFAULTS)
    more = tree.get("more_val")
    is_known = isinstance(more, dict) and all(map(NAME[1], more))
    require(is_known, origin, "more_val", more, "map names to datasets, each with the keys of val")
    example["more_val"] = dict.fromkeys(more, example["val"])
    cfg = config.check(tree, example, RULES, origin)
    _check_classes(cfg, origin)
    _check_sizes(cfg, origin)
    return cfg


def _check_classes(cfg, origin):
    names = classes(cfg)
    differ = cfg.classes == "cityscapes" or len(set(names.values())) == len(cfg.classes)
    require(differ, origin, "classes", cfg.classes, "differ in their names and colours")
    known = f"name one of the classes: {one_line(', '.join(names))}"
    datasets = {key: cfg[key] for key in ("source", "target", "val")}
    datasets |= {f"more_val.{key}": spec for key, spec in cfg.more_val.items()}
    for domain, spec in datasets.items():
        wanted = spec.ids.values() if isinstance(spec.ids, dict) else ()
        unknown = [name for name in wanted if name is not None and name not in names]
        require(not unknown, origin, f"{domain}.ids", unknown, known)
    for key, wanted in cfg.evaluation.subsets.items():
        unknown = [name for name in wanted if name not in names]
        require(not unknown, origin, f"evaluation.subsets.{key}", unknown, known)
    scored = cfg.val.root or not cfg.val_every
    require(scored, origin, "val_every", cfg.val_every, "be 0 without val.root")


def _check_sizes(cfg, origin):
    for section, crop_key, crop, domains in (
        ("translation", "translation.crop", cfg.translation.crop, ("source", "target")),
        ("warmup", "crop", cfg.crop, ("source",)),
        ("selftrain", "crop", cfg.crop, ("source", "target")),
    ):
        batch = cfg[section].batch
        require(sum(batch) > 0, origin, f"{section}.batch", batch, "hold at least one image")
        for domain in domains:
            sizes = cfg[domain].sizes
            rises = sizes == sorted(sizes, key=math.prod)
            require(rises, origin, f"{domain}.sizes", sizes, "be in ascending order")
            count = f"have one count for each of {domain}.sizes {sizes}"
            require(len(batch) == len(sizes), origin, f"{section}.batch", batch, count)
            fits = all(c <= s for size in sizes for c, s in zip(crop, size, strict=True))
            require(fits, origin, crop_key, crop, f"fit into every one of {domain}.sizes {sizes}")
