"""What the keys of a configuration may be and what must agree; loading configurations."""

import re
from pathlib import Path

from engine import config
from engine.config import COUNT, NUMBER, TEXT, either, list_of, one_line, one_of, require
from layouts import CITYSCAPES, LAYOUTS, NAMED_IDS, classes

DEFAULTS = Path(__file__).parent / "config.yaml"
STAGES = ("demo_data", "translate", "source_only", "warmup", "selftrain", "oracle")
NETWORKS = ("deeplab_v2_resnet101", "resnet18", "resnet34", "resnet50", "resnet101")
NETWORKS += ("mobilenet_v2", "small")
OWN_NETWORKS = {}  # name -> function, of models.register


def _is_network(name):
    return name in (*NETWORKS, *OWN_NETWORKS) or re.fullmatch(r"smp/[^/]+/[^/]+", str(name))


def _maps(keys, values, least=1, most=65536):
    """Return the test of a mapping whose keys and values follow two rules."""

    def test(tree):
        right = isinstance(tree, dict) and least <= len(tree) <= most
        return right and all(map(keys[1], tree)) and all(map(values[1], tree.values()))

    return test


def _from(low, step=1):
    words = f"an integer from {low}" if step == 1 else f"a multiple of {step}, from {low}"
    return words, lambda v: COUNT[1](v) and v >= low and v % step == 0


SHARE = ("a number from 0 to 1", lambda v: NUMBER[1](v) and v <= 1)
ABOVE_0 = ("a number above 0", lambda v: NUMBER[1](v) and v > 0)
WORD = re.compile(r"[\w.-]*\w")
NAME = ("a name of letters, digits, - _ .", lambda v: isinstance(v, str) and WORD.fullmatch(v))
TEXT_OR_NULL = either(TEXT, one_of(None))
SIZE = list_of(_from(8), 2, 2)
BYTE = ("an integer from 0 to 255", lambda v: COUNT[1](v) and v <= 255)
COLOUR = list_of(BYTE, 3, 3)
COLOURS = ("2 to 254 names with colours [r, g, b]", _maps(TEXT, COLOUR, 2, 254))
PATTERN = ("a pattern with a *", lambda v: TEXT[1](v) and "*" in v)
PATTERNS = ("{images: PATTERN, labels: PATTERN}", _maps(one_of("images", "labels"), PATTERN, 2))
VALUE = ("a label value", lambda v: COUNT[1](v) and v < 65536)
KEY = either(VALUE, ("[r, g, b]", lambda v: isinstance(v, tuple) and COLOUR[1](list(v))))
VALUES = ("a mapping from label value to class or null", _maps(KEY, TEXT_OR_NULL))
WHOLE = ("classes", "layout", "ids", "subsets")  # their mappings are one value
# key.sub or key -> rule, where the type of config.yaml's value does not say what a value may be
RULES = {
    "name": NAME,
    "stages": list_of(one_of(*STAGES), 0),
    "device": one_of("auto", "cpu", "cuda"),
    "precision": one_of("auto", "bf16", "fp16", "fp32"),
    "workers": either(one_of("auto"), COUNT),
    "classes": either(one_of("cityscapes"), list_of(one_of(*CITYSCAPES), 2), COLOURS),
    "layout": either(one_of(*LAYOUTS), PATTERNS),
    "ids": either(one_of(*NAMED_IDS, "train_ids", "index", "colours"), VALUES),
    "sizes": list_of(SIZE),
    "size": either(SIZE, one_of(None)),
    "crop": SIZE,
    "translation.crop": list_of(_from(32, 4), 2, 2),
    "batch": ("a list of counts, not all 0", lambda v: list_of(COUNT)[1](v) and any(v)),
    "network": (f"{' | '.join(NETWORKS)}, smp/ARCHITECTURE/ENCODER, or registered", _is_network),
    "output_stride": one_of(8, 16),
    "channels": _from(32, 32),
    "filters": _from(4),
    "supervised": one_of("ce", "ohem"),
    "optimizer.name": one_of("sgd", "adamw"),
    "bn_recalibrate": list_of(one_of("source", "target"), 0),
    "centroids": one_of("crdomix", "target"),
    "labels": one_of("consensus", "online", "probability", "feature"),
    "scales": list_of(ABOVE_0),
    "subsets": ("a mapping from name to classes", _maps(NAME, list_of(TEXT), 0)),
    **dict.fromkeys(("split", "list", "val.root", "images", "weights"), TEXT_OR_NULL),
    **dict.fromkeys(("ema_limit", "strong", "momentum"), SHARE),
    **dict.fromkeys(("min_scale", "max_class_share", "layer_decay"), SHARE),
    **dict.fromkeys(("lr_head", "translation.lr"), ABOVE_0),
    **dict.fromkeys(("accumulate", "steps", "rounds", "blocks", "bn_images"), _from(1)),
    **dict.fromkeys(("log_every", "pictures_every", "save_every"), _from(1)),
}


def load_config(path, overrides=()):
    """Return the checked Config of a YAML file, with `key.sub=value` texts on top, or UserError."""
    return checked(config.read(path, WHOLE), overrides, path)


def load_saved(tree, overrides, origin):
    """Return the Config of a tree, or of a YAML file, that a run of any release has written."""
    tree, defaults = tree if isinstance(tree, dict) else config.read(tree), config.read(DEFAULTS)
    known = {key: value for key, value in tree.items() if key in defaults}
    for key, section in known.items():
        if isinstance(section, dict) and key not in ("more_val", "classes"):
            known[key] = {k: v for k, v in section.items() if k in defaults[key]}
    known["compile"] = known.get("compile") is True  # it could be auto
    return checked(config.merge(defaults, known, WHOLE), overrides, origin)


def checked(tree, overrides, origin):
    """Return the Config of a tree of plain values and overrides, or UserError: `origin`, fault."""
    tree, example = config.override(tree, overrides, WHOLE), config.read(DEFAULTS)
    more = tree.get("more_val")
    must = "map names to datasets, each with the keys of val"
    require(isinstance(more, dict) and all(map(NAME[1], more)), origin, "more_val", more, must)
    example["more_val"] = dict.fromkeys(more, example["val"])
    cfg = config.check(tree, example, RULES, origin)
    _check_classes(cfg, origin)
    _check_sizes(cfg, origin)
    return cfg


def _check_classes(cfg, origin):
    names = classes(cfg)
    differ = len(set(names.values())) == len(names if cfg.classes == "cityscapes" else cfg.classes)
    require(differ, origin, "classes", cfg.classes, "differ in their names and colours")
    named = {f"evaluation.subsets.{key}": found for key, found in cfg.evaluation.subsets.items()}
    for key, spec in config.flat(cfg, WHOLE).items():
        if key.endswith(".ids") and isinstance(spec, dict):
            named[key] = spec.values()
    for key, found in named.items():
        unknown = [name for name in found if name not in (None, *names)]
        must = f"name one of the classes: {one_line(', '.join(names))}"
        require(not unknown, origin, key, unknown, must)


def _check_sizes(cfg, origin):
    for domain in ("source", "target"):
        sizes = cfg[domain].sizes
        for key, crop in (("crop", cfg.crop), ("translation.crop", cfg.translation.crop)):
            fits = all(c <= s for size in sizes for c, s in zip(crop, size, strict=True))
            require(fits, origin, key, crop, f"fit into every one of {domain}.sizes {sizes}")
        for section in ("translation", "warmup", "selftrain"):
            batch = cfg[section].batch
            count = f"have one count for each of {domain}.sizes {sizes}"
            require(len(batch) == len(sizes), origin, f"{section}.batch", batch, count)
