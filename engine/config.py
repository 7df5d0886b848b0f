"""Configurations: YAML on a base, overrides; checked by an example and rules (words, test)."""

import difflib
import os
import re
from pathlib import Path

import yaml


class UserError(Exception):
    """Invalid input: one line that names the file, key or value and says how to fix it."""


class Config(dict):
    """A nested dict whose keys are attributes as well."""

    __getattr__ = dict.__getitem__


class Loader(yaml.SafeLoader):
    """Safe loader: 1e-4 is a number, a list as a key a tuple; a key that stands twice a fault."""

    def construct_mapping(self, node, deep=False):
        self.flatten_mapping(node)
        pairs = [[self.construct_object(part, deep=True) for part in pair] for pair in node.value]
        mapping = {tuple(k) if isinstance(k, list) else k: v for k, v in pairs}
        if len(mapping) < len(pairs):
            raise yaml.constructor.ConstructorError(None, None, "duplicate key", node.start_mark)
        return mapping


EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))


NUMBER = ("a number from 0", lambda v: type(v) in (int, float) and 0 <= v < 1e9)
COUNT = ("an integer from 0", lambda v: type(v) is int and 0 <= v < 2**31)
TEXT = ("text", lambda v: isinstance(v, str) and v == v.strip() != "" and v.isprintable())


def one_of(*options):
    words = " | ".join(map(str, options))
    return words, lambda v: any(type(v) is type(option) and v == option for option in options)


def either(*rules):
    return ", or ".join(words for words, _ in rules), lambda v: any(test(v) for _, test in rules)


def list_of(rule, low=1, high=10**6):
    words = f"a list of {low if low == high else f'{low} or more'}, each {rule[0]}"
    return words, lambda v: isinstance(v, list) and low <= len(v) <= high and all(map(rule[1], v))


RULE_OF = {bool: one_of(True, False), int: COUNT, float: NUMBER, str: TEXT}


def plain(config):
    """Return a Config as nested plain dicts."""
    return {k: plain(v) for k, v in config.items()} if isinstance(config, dict) else config


def one_line(value):
    """Return a value's text on one line of at most 120 characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= 120 else f"{text[:117]}..."


def read(path, whole=(), above=()):
    """Return the mapping in a YAML file on top of its `base:`; `whole` keys are one value."""
    path = Path(path)
    try:
        tree = parse(path.read_text(encoding="utf-8"), path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); see --cfg") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a configuration maps keys to values; see config.yaml")
    if "base" not in tree:
        return tree
    base = tree.pop("base")
    require(TEXT[1](base), path, "base", base, "be a path")
    base = path.parent / Path(base).expanduser()
    if base.resolve() in above:
        raise UserError(f"{path}: base = {base} leads back to itself; name another file")
    return merge(read(base, whole, (*above, path.resolve())), tree, whole)


def parse(text, origin):
    try:
        return yaml.load(text, Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{origin}: not valid YAML ({one_line(error)})") from error


def merge(base, over, whole=()):
    """Return `over` on top of `base`, key by key; the mappings of `whole` keys are replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        nested = key not in whole and isinstance(value, dict) and isinstance(old, dict)
        merged[key] = merge(old, value, whole) if nested else value
    return merged


def override(tree, overrides, whole=()):
    """Return `tree` with `key.sub=value` overrides on top. Raises UserError."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{one_line(text)}: an override has the form key.sub=value")
        value = parse(value, one_line(text))
        for name in reversed(key.split(".")):
            value = {name: value}
        tree = merge(tree, value, whole)
    return tree


def flat(tree, whole=(), prefix=""):
    """Return a nested dict as key.sub -> value; the mappings of `whole` keys are one value."""
    values = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and key not in whole
        values |= flat(value, whole, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return values


def check(tree, example, rules, origin, prefix=""):
    """Return a tree as a Config; the example's keys and types, and `rules`, must hold."""
    checked = Config()
    for key, default in example.items():
        if key not in tree:
            fault = f"{prefix}{key} is missing; start from config.yaml with `base:`"
            raise UserError(f"{origin}: {fault}")
        name, value = f"{prefix}{key}", tree[key]
        rule = rules.get(name) or rules.get(key)
        if rule or not isinstance(default, dict):
            words, holds = rule or RULE_OF[type(default)]
            require(holds(value), origin, name, value, f"be {words}")
        else:
            must = f"hold the keys {', '.join(default)}"
            require(isinstance(value, dict), origin, name, value, must)
            value = check(value, default, rules, origin, f"{name}.")
        checked[key] = os.path.expanduser(value) if type(value) is str else value  # noqa: PTH111
    for key in tree.keys() - example.keys():
        near = difflib.get_close_matches(str(key), example, 1, 0)[0]
        fault = f"unknown key {one_line(f'{prefix}{key} = {tree[key]}')}"
        raise UserError(f"{origin}: {fault}; the nearest is {prefix}{near}")
    return checked


def require(holds, origin, key, value, must):
    """Raise UserError unless a condition on a key's value holds."""
    if not holds:
        raise UserError(f"{origin}: {key} = {one_line(repr(value))} must {must}")
