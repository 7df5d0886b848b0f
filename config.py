"""The configuration: which keys there are, what each may be, and how a file, its base and overrides become one."""

import difflib
import functools
import re
from pathlib import Path

import yaml


class UserError(Exception):
    """Bad input, told in one line that names the file, key or value and what to do."""


class Config(dict):
    """A nested dict whose keys are attributes as well."""

    __getattr__ = dict.__getitem__


# Cityscapes' 19 classes in their order, with their colours; ids in Cityscapes and GTA5, in SYNTHIA, in Mapillary Vistas 1.2
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


def classes(config):
    """The classes of a configuration: name -> (r, g, b), in the order of their numbers."""
    if config.classes == "cityscapes":
        return {name: colour for name, (colour, *_) in CITYSCAPES.items()}
    if isinstance(config.classes, list):
        return {name: CITYSCAPES[name][0] for name in config.classes}
    return {name: tuple(colour) for name, colour in config.classes.items()}


def label_values(ids, names):
    """What each label value of a dataset stands for: value -> class number, or 255 where it is ignored.

    ids: "cityscapes", "synthia", "mapillary", "index" (value k is class k, 255 ignored), "train_ids" (Cityscapes' 19 in
    their order, whichever of them are trained, 255 ignored), or a mapping from value to class name or None. A value that is not in the result has no class at all: an error in the data.
    """
    number = {name: k for k, name in enumerate(names)}
    if ids == "cityscapes":
        ids = dict.fromkeys([*range(35), 255]) | {value: name for name, (_, value, _, _) in CITYSCAPES.items()}
    elif ids == "synthia":
        ids = dict.fromkeys(range(23)) | {value: name for name, (_, _, value, _) in CITYSCAPES.items()}
    elif ids == "mapillary":
        ids = dict.fromkeys(range(66)) | {value: name for name, row in CITYSCAPES.items() for value in row[3]}
    elif ids == "train_ids":
        ids = {**dict(enumerate(CITYSCAPES)), 255: None}
    elif ids == "index":
        ids = {**{k: name for name, k in number.items()}, 255: None}
    return {value: number.get(name, 255) for value, name in ids.items()}


# ---------------------------------------------------------------- rules: (what is expected, in words; the test)


def integer(low, high=10**9):
    return f"an integer from {low} to {high}", lambda v: type(v) is int and low <= v <= high


def number(low, high=1e6):
    return f"a number from {low:g} to {high:g}", lambda v: type(v) in (int, float) and low <= v <= high


def choice(*options):
    return " | ".join(map(str, options)), lambda v: any(type(v) is type(o) and v == o for o in options)


def sequence(rule, low=0, high=10**6):
    words = f"{low}" if low == high else f"{low} or more"
    return (
        f"a list of {words}, each {rule[0]}",
        lambda v: isinstance(v, list) and low <= len(v) <= high and all(map(rule[1], v)),
    )


def mapping(key, value, low=1):
    return (
        f"a mapping from {key[0]} to {value[0]}",
        lambda v: isinstance(v, dict) and len(v) >= low and all(map(key[1], v)) and all(map(value[1], v.values())),
    )


def either(*rules):
    return ", or ".join(words for words, _ in rules), lambda v: any(test(v) for _, test in rules)


NULL = choice(None)
FLAG = choice(True, False)
TEXT = ("text", lambda v: isinstance(v, str) and v == v.strip() != "" and v.isprintable())
NAME = ("a name of letters, digits, - _ .", lambda v: isinstance(v, str) and re.fullmatch(r"[\w.-]*\w", v) is not None)
RATE = ("a number above 0, at most 100", lambda v: type(v) in (int, float) and 0 < v <= 100)
SIZE = sequence(integer(8, 65536), 2, 2)
BATCH = sequence(integer(0, 4096), 1)


def _dataset(**sizes):
    return {
        "layout": choice("gta5", "synthia", "cityscapes", "bdd100k", "folder", "flat"),
        "root": TEXT,
        "split": either(TEXT, NULL),
        "ids": either(
            choice("cityscapes", "synthia", "mapillary", "train_ids", "index"),
            mapping(integer(0, 65535), either(TEXT, NULL)),
        ),
        "list": either(TEXT, NULL),
        **sizes,
    }


def _training(**more):
    return {
        "steps": integer(1),
        "batch": BATCH,
        "distill": number(0),
        "strong_to_weak": number(0),
        "strong": number(0, 1),
        "crdomix": FLAG,
        **more,
    }


ANY = "*"  # in the schema: any name

SCHEMA = {
    "name": NAME,
    "output": TEXT,
    "stages": sequence(choice("demo_data", "translate", "source_only", "warmup", "selftrain", "oracle")),
    "seed": integer(0, 2**31 - 1),
    "device": choice("auto", "cpu", "cuda"),
    "precision": choice("auto", "bf16", "fp16", "fp32"),
    "compile": choice("auto", True, False),
    "workers": integer(0, 256),
    "accumulate": integer(1, 4096),
    "classes": either(
        choice("cityscapes"), sequence(choice(*CITYSCAPES), 2), mapping(TEXT, sequence(integer(0, 255), 3, 3), low=2)
    ),
    "source": _dataset(sizes=sequence(SIZE, 1)),
    "target": _dataset(sizes=sequence(SIZE, 1)),
    "val": _dataset(size=either(SIZE, NULL)) | {"root": either(TEXT, NULL)},
    "more_val": {ANY: _dataset(size=either(SIZE, NULL))},
    "crop": SIZE,
    "min_scale": number(0.01, 1),
    "max_class_share": number(0.01, 1),
    "model": {
        "network": either(
            choice("deeplab_v2_resnet101", "resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2"),
            ("smp/ARCHITECTURE/ENCODER", lambda v: re.fullmatch(r"smp/\w+/[\w.-]+", str(v)) is not None),
        ),
        "output_stride": choice(8, 16),
        "channels": ("a multiple of 32 up to 4096", lambda v: type(v) is int and v in range(32, 4097, 32)),
        "weights": either(TEXT, NULL),
        "auxiliary": number(0),
    },
    "supervised": choice("ce", "ohem"),
    "optimizer": {
        "name": choice("sgd", "adamw"),
        "lr_backbone": number(0, 100),
        "lr_head": RATE,
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
        "crop": sequence(("a multiple of 4 from 32", lambda v: type(v) is int and v in range(32, 65537, 4)), 2, 2),
        "filters": integer(4, 512),
        "blocks": integer(1, 64),
        "lr": RATE,
        "cycle": number(0),
        "identity": number(0),
        "edge": number(0),
    },
    "warmup": _training(labels_from=choice("source", "target")),
    "selftrain": _training(
        rounds=integer(1, 100),
        centroids=choice("crdomix", "target"),
        momentum=number(0, 1),
        labels=choice("consensus", "probability", "feature"),
        class_mixing=FLAG,
        diagnose=FLAG,
    ),
    "evaluation": {
        "scales": sequence(number(0.05, 4), 1),
        "tile": sequence(("a multiple of 32", lambda v: type(v) is int and v in range(32, 65537, 32)), 2, 2),
        "subsets": mapping(NAME, sequence(TEXT, 1), low=0),
        "pictures": integer(0),
    },
    "log_every": integer(1),
    "pictures_every": integer(1),
    "save_every": integer(1),
    "val_every": integer(0),
}


# ---------------------------------------------------------------- loading


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Reads 1e-4 as a number, as YAML 1.2 has it, and refuses a key that stands twice."""

    def construct_mapping(self, node, deep=False):
        pairs = super().construct_mapping(node, deep=True)
        if len(pairs) != len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key stands twice", node.start_mark)
        return pairs


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_config(path, overrides=()):
    """The checked Config of a YAML file on top of its `base:`, with `key.sub=value` overrides on top of both.

    Raises UserError, naming the key, the value and what it must be, or the nearest valid key.
    """
    tree = _read(path)
    if "base" in tree:
        base_path = Path(path).parent / str(tree.pop("base"))
        base = _read(base_path)
        if "base" in base:
            raise UserError(f"{base_path}: is the base of {path} and names a base itself; only one level is read")
        tree = _merge(base, tree, SCHEMA)
    return checked(tree, overrides, path)


def load_saved(tree, overrides, origin):
    """The Config of a tree, or of a file, that a run has left; keys that have come since are as in config.yaml."""
    tree = tree if isinstance(tree, dict) else _read(tree)
    return checked(_merge(_read(Path(__file__).parent / "config.yaml"), tree, SCHEMA), overrides, origin)


def checked(tree, overrides, origin):
    """The Config of a tree of plain values and `key.sub=value` overrides; origin: where the tree came from, for messages."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"{_line(override)}: an override reads key.sub=value, for instance warmup.steps=1000")
        value = _parse(value, _line(override))
        tree = _merge(tree, functools.reduce(lambda v, k: {k: v}, reversed(key.split(".")), value), SCHEMA)
    config = _check(tree, SCHEMA, "", origin)
    _check_together(config, origin)
    return config


def _read(path):
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a configuration ({_line(error)}); see --cfg") from error
    tree = _parse(text, path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a configuration maps keys to values; see config.yaml")
    return tree


def _parse(text, origin):
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{origin}: not valid YAML ({_line(error)})") from error


def _line(value):
    text = " ".join(str(value).split())
    return text if len(text) <= 120 else f"{text[:117]}..."


def _merge(base, over, schema):
    """`over` on top of `base`; a mapping that is one value to the schema (classes, ids) is replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        rule = schema.get(key, schema.get(ANY))
        nested = all(isinstance(x, dict) for x in (rule, value, merged.get(key)))
        merged[key] = _merge(merged[key], value, rule) if nested else value
    return merged


def _check(tree, schema, prefix, path):
    if ANY in schema:
        schema = {key if NAME[1](key) else ANY: schema[ANY] for key in tree}
    for key, value in tree.items():
        if key not in schema:
            name = f"{prefix}{key}"
            raise UserError(
                f"{path}: unknown key {_line(name)} = {_line(repr(value))}; the nearest is {_nearest(name)}"
            )
    checked = Config()
    for key, rule in schema.items():
        if key not in tree:
            raise UserError(f"{path}: the key {prefix}{key} is missing; start from config.yaml with `base:`")
        value = tree[key]
        if isinstance(rule, dict):
            if not isinstance(value, dict):
                raise UserError(f"{path}: {prefix}{key} = {_line(repr(value))} must hold the keys {', '.join(rule)}")
            checked[key] = _check(value, rule, f"{prefix}{key}.", path)
        elif not rule[1](value):
            raise UserError(f"{path}: {prefix}{key} = {_line(repr(value))} must be {rule[0]}")
        else:
            checked[key] = value
    return checked


def _nearest(name):
    def keys(schema, prefix=""):
        for key, rule in schema.items():
            yield prefix + key
            yield from keys(rule, f"{prefix}{key}.") if isinstance(rule, dict) else ()

    def likeness(key):
        whole = difflib.SequenceMatcher(None, name, key).ratio()
        last = difflib.SequenceMatcher(None, name.rsplit(".", 1)[-1], key.rsplit(".", 1)[-1]).ratio()
        return max(whole, 0.99 * last)

    return max(keys(SCHEMA), key=likeness)


def _check_together(config, path):
    """What two keys must agree on."""

    def require(holds, key, value, must):
        if not holds:
            raise UserError(f"{path}: {key} = {_line(repr(value))} must {must}")

    names = classes(config)
    require(
        len(names) <= 254, "classes", f"{len(names)} of them", "be at most 254: label maps have 8 bits, 255 is ignored"
    )
    datasets = {key: config[key] for key in ("source", "target", "val")}
    datasets |= {f"more_val.{key}": spec for key, spec in config.more_val.items()}
    for domain, spec in datasets.items():
        ids = spec.ids
        if isinstance(ids, dict):
            unknown = [name for name in ids.values() if name is not None and name not in names]
            require(not unknown, f"{domain}.ids", unknown, f"name one of the classes: {', '.join(names)}")
    require(config.val.root or not config.val_every, "val_every", config.val_every, "be 0 without val.root")
    for key, wanted in config.evaluation.subsets.items():
        unknown = [name for name in wanted if name not in names]
        require(not unknown, f"evaluation.subsets.{key}", unknown, f"name one of the classes: {', '.join(names)}")
    for stage, domains in (
        ("translation", ("source", "target")),
        ("warmup", (config.warmup.labels_from,)),
        ("selftrain", ("source", "target")),
    ):
        batch = config[stage].batch
        require(sum(batch) > 0, f"{stage}.batch", batch, "hold at least one image")
        for domain in domains:
            sizes = config[domain].sizes
            require(
                len(batch) == len(sizes), f"{stage}.batch", batch, f"have one count for each of {domain}.sizes {sizes}"
            )
            key = "translation.crop" if stage == "translation" else "crop"
            crop = config.translation.crop if stage == "translation" else config.crop
            fits = all(c <= s for size in sizes for c, s in zip(crop, size, strict=True))
            require(fits, key, crop, f"fit into every one of {domain}.sizes {sizes}")
