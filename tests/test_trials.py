"""Damaged checkpoints, random configurations: exit code 0, or 2 and one line; LONG=1: more."""

import random
import shutil

import pytest
import torch
import yaml
from conftest import LONG, ROOT, SHIPPED, state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import Config, UserError, parse
from settings import load_config

# ---------------------------------------------------------------- damages


def damage_bytes(path, rng):
    """Cut a file, empty it, change some of its bytes, or put a folder in its place."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(["cut", "cut", "empty", "flip", "noise", "folder"])
    path.unlink()
    if kind == "folder":
        path.mkdir()
        return
    if kind == "flip":
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] ^= rng.randint(1, 255)
    elif kind == "noise":
        data = rng.randbytes(200)
    elif kind == "cut":
        data = data[: rng.randrange(len(data))]
    else:
        data = b""
    path.write_bytes(data)


def damage_checkpoint(path, rng):
    if rng.random() < 0.4:
        damage_bytes(path, rng)
        return
    saved = state(path)
    tree = saved
    # the entries that a command reads; a fault of the others is that of who changed them
    key = rng.choice([key for key in ("config", "student", "step") if key in saved])
    if isinstance(saved[key], dict) and saved[key] and rng.random() < 0.5:
        tree, key = saved[key], rng.choice(list(saved[key]))
    del tree[key]
    torch.save(saved, path)


@pytest.mark.parametrize("seed", range(300 if LONG else 6))
def test_a_damaged_checkpoint(finished, run, template, seed):
    rng = random.Random(seed)
    path = finished / ("warmup.pth", "selftrain.pth", "warmup.unfinished.pth")[seed % 3]
    commands = [("evaluate", "--weights", path), ("evaluate",), ("selftrain", "--init", path)]
    commands += [("warmup",), ("warmup", f"model.weights={path}")]
    if path.name == "warmup.unfinished.pth":
        shutil.copy(template / path.name, path)
        (finished / "warmup.pth").unlink()
        commands = [("warmup", "warmup.crdomix=false")]
    damage_checkpoint(path, rng)
    code, out, err = run(*rng.choice(commands))
    assert code in (0, 2), err
    assert "Traceback" not in out + err
    if code == 2:
        assert len(err.splitlines()) == 1, err
        assert err.count(": ") >= 1


# ---------------------------------------------------------------- generated configurations

GENERATED = settings(
    max_examples=5000 if LONG else 30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)

SPECIAL = ["", "1e-4", "nan", "on", "~", "cityscapes", "../..", "\0", "é" * 300]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(SPECIAL),
)


def nested(inner):
    return st.one_of(st.lists(inner, max_size=4), st.dictionaries(scalars, inner, max_size=4))


values = st.recursive(scalars, nested, max_leaves=6)


def leaves(tree, prefix=()):
    for key, value in tree.items():
        yield (*prefix, key)
        yield from leaves(value, (*prefix, key)) if isinstance(value, dict) else ()


PATHS = list(leaves(yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))))


@pytest.mark.parametrize("path", SHIPPED if LONG else SHIPPED[:2], ids=lambda path: path.name)
@GENERATED
@given(
    keys=st.lists(st.tuples(st.sampled_from(PATHS), values, st.booleans()), min_size=1, max_size=3),
    typo=st.one_of(st.none(), st.text(max_size=8)),
)
def test_a_mutated_configuration_is_valid_or_one_line(path, tmp_path_factory, keys, typo):
    tree = parse(path.read_text(encoding="utf-8"), path)
    if "base" in tree:
        tree["base"] = str(ROOT / "config.yaml")
    for key, value, delete in keys:
        node = tree
        for part in key[:-1]:
            node = node.setdefault(part, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            name = key[-1] + (typo or "")
            node.pop(name, None) if delete else node.__setitem__(name, value)
    file = tmp_path_factory.getbasetemp() / "mutated.yaml"
    text = yaml.safe_dump(tree, allow_unicode=True)
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        assert isinstance(load_config(file), Config)
    except UserError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 2000


UTF_16 = st.text(max_size=300).map(lambda text: text.encode("utf-16"))


@GENERATED
@given(data=st.one_of(st.binary(max_size=300), UTF_16))
def test_any_bytes_as_a_configuration_are_valid_or_one_line(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "bytes.yaml"
    file.write_bytes(data)
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert "\n" not in str(caught.value)
