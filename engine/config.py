"""Configurations: rules for values, reading YAML, merging with a base and overrides, checks.

No key is known here: settings.py has the keys, as a schema of nested dicts whose leaves are rules.
A rule is a pair: what is expected, in words; the test of a value.
"""

import difflib
import os
import re
import reprlib
from pathlib import Path

import yaml


class UserError(Exception):
    """Invalid input: one line that names the file, key or value and says how to fix it."""


class Config(dict):
    """A nested dict whose keys are attributes as well."""

    __getattr__ = dict.__getitem__


def plain(config):
    """Return a Config as nested plain dicts."""
    return {k: plain(v) for k, v in config.items()} if isinstance(config, dict) else config


def integer(low, high=10**9):
    return f"an integer from {low} to {high}", lambda v: type(v) is int and low <= v <= high


def number(low, high=1e6):
    words = f"a number from {low:g} to {high:g}"
    return words, lambda v: type(v) in (int, float) and low <= v <= high


def choice(*options):
    words = " | ".join(map(str, options))
    return words, lambda v: any(type(v) is type(option) and v == option for option in options)


def multiple_of(step, low, high):
    is_between = integer(low, high)[1]
    return f"a multiple of {step} from {low} to {high}", lambda v: is_between(v) and v % step == 0


def sequence(rule, low=0, high=10**6):
    words = f"a list of {low if low == high else f'{low} or more'}, each {rule[0]}"
    return words, lambda v: isinstance(v, list) and low <= len(v) <= high and all(map(rule[1], v))


def mapping(key, value, low=1, high=10**6):
    def test(tree):
        right = isinstance(tree, dict) and low <= len(tree) <= high
        return right and all(map(key[1], tree)) and all(map(value[1], tree.values()))

    return f"a mapping of {low} to {high}, each from {key[0]} to {value[0]}", test


def either(*rules):
    return ", or ".join(words for words, _ in rules), lambda v: any(test(v) for _, test in rules)


def pattern(words, expression):
    return words, lambda v: isinstance(v, str) and re.fullmatch(expression, v) is not None


NULL = choice(None)
FLAG = choice(True, False)
TEXT = ("text", lambda v: isinstance(v, str) and v == v.strip() != "" and v.isprintable())
NAME = pattern("a name of letters, digits, - _ .", r"[\w.-]*\w")
ANY = "*"  # as a key of a schema: any name


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Safe loader of YAML 1.2's core schema (1.1 reads 1:30 as 90); refuses duplicate keys."""

    def flatten_mapping(self, node):
        super().flatten_mapping(node)
        if len(node.value) > 10**5:  # merge keys of merge keys: the next would fill the memory
            raise yaml.constructor.ConstructorError(None, None, "too large", node.start_mark)

    def construct_mapping(self, node, deep=False):
        pairs = super().construct_mapping(node, deep=True)
        if len(pairs) != len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "duplicate key", node.start_mark)
        return pairs


CORE = {
    "null": r"(null|Null|NULL|~|)$",
    "bool": r"(true|True|TRUE|false|False|FALSE)$",
    "int": r"([-+]?\d+|0o[0-7]+|0x[\da-fA-F]+)$",
    "float": r"([-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.inf|\.nan)$",
}
_core = [(f"tag:yaml.org,2002:{tag}", re.compile(words, re.A)) for tag, words in CORE.items()]
_Loader.yaml_implicit_resolvers = {None: _core}
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value, 0))


def read(path):
    """Return the mapping in a YAML file. Raises UserError."""
    try:
        if not Path(path).is_file() and Path(path).exists():
            raise OSError("it is not a regular file")
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(2**20)
        if len(text) == 2**20:
            raise ValueError("it is longer than a configuration")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); see --cfg") from error
    tree = _parse(text, path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a configuration maps keys to values; see config.yaml")
    return tree


def read_with_base(path, schema):
    """Return a file's mapping on top of the file that its `base:` names. Raises UserError."""
    tree, base = read(path), {}
    if "base" in tree:
        require(TEXT[1](tree["base"]), path, "base", tree["base"], "be a path")
        base_path = Path(path).parent / os.path.expanduser(tree.pop("base"))  # noqa: PTH111
        base = read(base_path)
        if "base" in base:
            raise UserError(f"{base_path}: is a base and names a base itself; one level is read")
    return merge(base, tree, schema)


def merge(base, over, schema):
    """Return `over` on top of `base`; a mapping that the schema takes as one value is replaced."""
    merged = dict(base)
    for key, value in over.items():
        rule = schema.get(key, schema.get(ANY))
        nested = all(isinstance(x, dict) for x in (rule, value, merged.get(key)))
        merged[key] = merge(merged[key], value, rule) if nested else value
    return merged


def override(tree, overrides, schema):
    """Return `tree` with `key.sub=value` overrides on top. Raises UserError."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{one_line(text)}: an override has the form key.sub=value")
        value = _parse(value, one_line(text))
        for name in reversed(key.split(".")):
            value = {name: value}
        tree = merge(tree, value, schema)
    return tree


def _parse(text, origin):
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{origin}: not valid YAML ({one_line(error)})") from error


# aliases make of a few lines a value whose whole text fills the memory
shown = reprlib.Repr()
shown.maxlevel, shown.maxdict, shown.maxlist, shown.maxstring = 3, 16, 16, 120


def one_line(value):
    """Return a value's text on one line of at most 120 characters."""
    text = " ".join(str(value)[:10000].split())
    return text if len(text) <= 120 else f"{text[:117]}..."


def check(tree, schema, origin, prefix="", whole=None):
    """Return the Config of a tree. Raises UserError unless it fits the schema.

    prefix, whole: of a nested tree, its key with a dot, and the schema of everything.
    """
    checked, whole = Config(), whole or schema
    if ANY in schema:
        schema = {key if NAME[1](key) else ANY: schema[ANY] for key in tree}
    for key, value in tree.items():
        if key not in schema:
            name = f"{prefix}{one_line(key)}"
            found, known = one_line(f"{name} = {shown.repr(value)}"), nearest(name, whole)
            raise UserError(f"{origin}: unknown key {found}; the nearest is {known}")
    for key, rule in schema.items():
        name, value = f"{prefix}{key}", tree.get(key)
        if key not in tree:
            raise UserError(f"{origin}: {name} is missing; start from config.yaml with `base:`")
        if isinstance(rule, dict):
            must = f"hold the keys {', '.join(rule)}"
            require(isinstance(value, dict), origin, name, value, must)
            value = check(value, rule, origin, f"{name}.", whole)
        else:
            require(rule[1](value), origin, name, value, f"be {rule[0]}")
        if isinstance(value, str):
            value = os.path.expanduser(value)  # noqa: PTH111
        checked[key] = value
    return checked


def check_known(tree, schema, origin):
    """Return a tree. Raises UserError unless it is a dict whose values fit the schema's rules."""
    require(isinstance(tree, dict), origin, "what it holds", tree, "be a mapping")
    for key in schema.keys() & tree.keys():
        require(schema[key][1](tree[key]), origin, key, tree[key], f"be {schema[key][0]}")
    return tree


def nearest(name, schema):
    """Return the key of the schema that is most like `name`, as key.sub."""

    def keys(schema, prefix=""):
        for key, rule in schema.items():
            yield prefix + key
            yield from keys(rule, f"{prefix}{key}.") if isinstance(rule, dict) else ()

    def likeness(key):
        whole = difflib.SequenceMatcher(None, name, key).ratio()
        last = name.rsplit(".", 1)[-1], key.rsplit(".", 1)[-1]
        return max(whole, 0.99 * difflib.SequenceMatcher(None, *last).ratio())

    return max(keys(schema), key=likeness)


def require(holds, origin, key, value, must):
    """Raise UserError unless a condition between keys holds."""
    if not holds:
        raise UserError(f"{origin}: {key} = {one_line(shown.repr(value))} must {must}")
