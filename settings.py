"""The keys of a configuration, what each may be and what must agree; classes, label values."""

import math
from pathlib import Path

from engine import config
from engine.config import (
    ANY,
    FLAG,
    NAME,
    NULL,
    TEXT,
    choice,
    either,
    integer,
    mapping,
    multiple_of,
    number,
    one_line,
    pattern,
    require,
    sequence,
)

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


# ---------------------------------------------------------------- the keys

RATE = ("a number above 0, at most 100", lambda v: type(v) in (int, float) and 0 < v <= 100)
SIZE = sequence(integer(8, 65536), 2, 2)
BATCH = sequence(integer(0, 4096), 1)
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
NAMED_IDS = choice("cityscapes", "synthia", "mapillary", "train_ids", "index")


def _dataset(**sizes):
    return {
        "layout": choice(*LAYOUTS),
        "root": TEXT,
        "split": either(TEXT, NULL),
        "ids": either(NAMED_IDS, mapping(integer(0, 65535), either(TEXT, NULL))),
        "list": either(TEXT, NULL),
        **sizes,
    }


TRAINING = {
    "steps": integer(1),
    "batch": BATCH,
    "distill": number(0),
    "strong_to_weak": number(0),
    "strong": number(0, 1),
    "crdomix": FLAG,
}
OWN_NETWORKS = {}  # name -> function, of models.register
OWN = ("a name that models.register was given", lambda value: value in [*OWN_NETWORKS])
SMP = pattern("smp/ARCHITECTURE/ENCODER", r"smp/\w+/[\w.-]+")
NETWORKS = ("deeplab_v2_resnet101", "resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2")
STAGES = ("demo_data", "translate", "source_only", "warmup", "selftrain", "oracle")
COLOURS = mapping(TEXT, sequence(integer(0, 255), 3, 3), 2, 254)  # 255 is ignored, in 8 bits

SCHEMA = {
    "name": NAME,
    "output": TEXT,
    "stages": sequence(choice(*STAGES)),
    "seed": integer(0, 2**31 - 1),
    "device": choice("auto", "cpu", "cuda"),
    "precision": choice("auto", "bf16", "fp16", "fp32"),
    "compile": choice("auto", True, False),
    "workers": either(choice("auto"), integer(0, 256)),
    "accumulate": integer(1, 4096),
    "classes": either(choice("cityscapes"), sequence(choice(*CITYSCAPES), 2), COLOURS),
    "source": _dataset(sizes=sequence(SIZE, 1)),
    "target": _dataset(sizes=sequence(SIZE, 1)),
    "val": _dataset(size=either(SIZE, NULL)) | {"root": either(TEXT, NULL)},
    "more_val": {ANY: _dataset(size=either(SIZE, NULL))},
    "crop": SIZE,
    "min_scale": number(0.01, 1),
    "max_class_share": number(0.01, 1),
    "rare_classes": number(0, 100),
    "model": {
        "network": either(choice(*NETWORKS), SMP, OWN),
        "output_stride": choice(8, 16),
        "channels": multiple_of(32, 32, 4096),
        "weights": either(TEXT, NULL),
        "auxiliary": number(0),
    },
    "supervised": choice("ce", "ohem"),
    "optimizer": {
        "name": choice("sgd", "adamw"),
        "lr_backbone": number(0, 100),
        "lr_head": RATE,
        "layer_decay": number(0.01, 1),
        "momentum": number(0, 0.9999),
        "weight_decay": number(0, 1),
        "power": number(0, 10),
        "warmup": integer(0),
    },
    "ema_limit": number(0, 1),
    "bn_recalibrate": sequence(choice("source", "target")),
    "bn_images": integer(1),
    "translation": {
        "images": either(TEXT, NULL),
        "weights": either(TEXT, NULL),
        "steps": integer(1),
        "batch": BATCH,
        "crop": sequence(multiple_of(4, 32, 65536), 2, 2),
        "filters": integer(4, 512),
        "blocks": integer(1, 64),
        "lr": RATE,
        "cycle": number(0),
        "identity": number(0),
        "edge": number(0),
    },
    "warmup": TRAINING | {"labels_from": choice("source", "target")},
    "selftrain": TRAINING
    | {
        "rounds": integer(1, 100),
        "centroids": choice("crdomix", "target"),
        "momentum": number(0, 1),
        "labels": choice("consensus", "online", "probability", "feature"),
        "class_mixing": FLAG,
        "diagnose": FLAG,
    },
    "evaluation": {
        "scales": sequence(number(0.05, 4), 1),
        "tile": sequence(multiple_of(32, 32, 65536), 2, 2),
        "subsets": mapping(NAME, sequence(TEXT, 1), low=0),
        "pictures": integer(0),
    },
    "log_every": integer(1),
    "pictures_every": integer(1),
    "save_every": integer(1),
    "val_every": integer(0),
}


# ---------------------------------------------------------------- loading


def load_config(path, overrides=()):
    """Return the checked Config of a YAML file on top of its `base:`, with overrides on top.

    overrides: texts of the form key.sub=value. Raises UserError.
    """
    return checked(config.read_with_base(path, SCHEMA), overrides, path)


def load_saved(tree, overrides, origin):
    """Return the Config of a tree, or of a YAML file, that a run has written.

    Keys that are newer than the run have the values of config.yaml. Raises UserError.
    """
    tree = tree if isinstance(tree, dict) else config.read(tree)
    defaults = config.read(Path(__file__).parent / "config.yaml")
    return checked(config.merge(defaults, tree, SCHEMA), overrides, origin)


def checked(tree, overrides, origin):
    """Return the Config of a tree of plain values and overrides.

    origin: where the tree comes from, for messages. Raises UserError.
    """
    cfg = config.check(config.override(tree, overrides, SCHEMA), SCHEMA, origin)
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
        ("warmup", "crop", cfg.crop, (cfg.warmup.labels_from,)),
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
