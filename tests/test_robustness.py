"""Kills, signals, full disks, hostile and broken files by the hundred; LONG=1 runs all of them."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import CLASSES, ROOT, Command, picture, save, state
from engine.run import Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets import Images
from engine import files
from engine.config import Config, UserError
from engine.images import read_image, resize
from settings import SCHEMA, load_config

LONG = bool(os.environ.get("LONG"))
SHIPPED = [ROOT / "config.yaml", *sorted((ROOT / "configs").glob("*.yaml"))]
GENERATED = settings(
    max_examples=5000 if LONG else 60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)


def start(script, dataset, *arguments):
    """Start a script in a process and a session of its own."""
    return Command(script, "--cfg", dataset / "test.yaml", *arguments, cwd=dataset, out=dataset)


def wait_for(process, condition, seconds=120):
    for _ in range(seconds * 20):
        if condition() or process.poll() is not None:
            return
        time.sleep(0.05)


def networks(path):
    """Return every tensor of the networks in a stage's result."""
    saved = state(path)
    parts = [name for name in ("student", "teacher", "generator") if name in saved]
    return {f"{part}.{key}": value for part in parts for key, value in saved[part].items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------- kills and signals


@pytest.mark.parametrize("script", ["translate_cyclegan", "warmup", "selftrain"])
def test_killed_at_random_moments_a_stage_ends_as_if_undisturbed(dataset, run, script):
    section = {"translate_cyclegan": "translation"}.get(script, script)
    options = [f"{section}.steps=24", "save_every=3", "log_every=3", "selftrain.rounds=1"]
    options += ["warmup.crdomix=false", "selftrain.crdomix=false"]
    if script == "selftrain":
        assert run("warmup", *options)[0] == 0
        shutil.copytree(dataset / "runs/test", dataset / "runs/killed")
    code, _, err = start(script, dataset, *options).end()
    assert code == 0, err
    result = {"translate_cyclegan": "translator"}.get(script, script)
    rng, kills = np.random.default_rng(0), 0
    undisturbed, killed = dataset / "runs/test", dataset / "runs/killed"
    for attempt in range(60):
        process = start(script, dataset, *options, "name=killed", f"workers={attempt % 3}")
        if kills == (12 if LONG else 2):
            code, _, err = process.end()
            assert code == 0, err
            break
        begun = killed / ".lock"
        before = begun.stat().st_mtime_ns if begun.exists() else 0
        wait_for(process, lambda b=begun, t=before: b.exists() and b.stat().st_mtime_ns > t)
        time.sleep(rng.uniform(0, 2.5))
        kills += process.poll() is None
        process.kill()
        process.end()
        for path in killed.glob("*.pth"):
            assert state(path)  # complete, whenever the kill came
    assert not list(killed.glob(f".{result}.*"))
    assert equal(networks(undisturbed / f"{result}.pth"), networks(killed / f"{result}.pth"))
    if script == "translate_cyclegan":
        for path in (undisturbed / "translated").iterdir():
            other = killed / "translated" / path.name
            assert np.array_equal(read_image(path), read_image(other))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_stage_after_the_step_with_a_checkpoint(dataset, run, number, code):
    options = ("warmup.crdomix=false", "warmup.steps=400", "save_every=1000", "log_every=5")
    process = start("warmup", dataset, *options, "workers=1")
    log = dataset / "runs/test/log.jsonl"
    wait_for(process, log.exists)
    # to the loader's processes as well, as a terminal, timeout and SLURM do
    os.killpg(process.pid, number)
    found, _, err = process.end()
    assert found == code, err
    assert f"stopped by {number.name}; the same command goes on" in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    saved = state(dataset / "runs/test/warmup.unfinished.pth")
    assert 0 < saved["step"] < 400
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["step"] == saved["step"]


DAMAGES = [
    lambda saved: saved.pop("optimizer"),
    lambda saved: saved["student"].popitem(),
    lambda saved: saved["optimizer"]["param_groups"].pop(),
    lambda saved: saved.pop("seconds"),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_unfinished_checkpoint_of_another_version(dataset, run, monkeypatch, damage):
    def killed(self, steps, state):
        raise OSError

    options = ("warmup.crdomix=false", "save_every=1")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Run, "finish", killed)
        run("warmup", *options)
    path = dataset / "runs/test/warmup.unfinished.pth"
    saved = state(path)
    damage(saved)
    torch.save(saved, path)
    code, _, err = run("warmup", *options)
    assert (code, err.count("\n")) == (2, 1), err
    assert f"{path}: does not fit this version" in err
    path.unlink()
    assert run("warmup", *options)[0] == 0


def test_two_stages_in_one_folder(dataset):
    first = start("warmup", dataset, "warmup.crdomix=false", "warmup.steps=100000", "log_every=1")
    wait_for(first, (dataset / "runs/test/log.jsonl").exists)
    code, _, err = start("warmup", dataset, "--as", "source_only", "warmup.crdomix=false").end()
    first.kill()
    first.end()
    assert code == 2
    assert f"process {first.pid} on" in err
    code, _, err = start("warmup", dataset, "--as", "source_only", "warmup.crdomix=false").end()
    assert code == 0, err  # the dead hold no lock


def test_other_inputs_are_noticed(dataset, run):
    assert run("translate_cyclegan")[0] == 0
    assert run("warmup")[0] == 0
    assert run("selftrain", "selftrain.rounds=1")[0] == 0
    assert run("translate_cyclegan", "--force", "translation.cycle=5")[0] == 0
    for script in ("warmup", "selftrain"):
        code, _, err = run(script, "selftrain.rounds=1")
        assert code == 2
        assert "another translator.pth" in err
    assert run("warmup", "--force")[0] == 0
    assert "another warmup.pth" in run("selftrain", "selftrain.rounds=1")[2]


def test_a_full_disk_leaves_the_last_checkpoint(dataset, run):
    disk = dataset / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        options = ("warmup.crdomix=false", f"output={disk}")
        process = start("warmup", dataset, *options, "warmup.steps=100000", "save_every=5")
        checkpoint = disk / "test/warmup.unfinished.pth"
        wait_for(process, checkpoint.exists)
        with (disk / "filler").open("wb") as file, pytest.raises(OSError):
            while True:
                file.write(bytes(1 << 20))
                file.flush()
        code, _, err = process.end()
        assert code == 2, err
        assert "No space left on device" in err or "cannot be written" in err
        assert len(err.strip().splitlines()) == 1
        assert state(checkpoint)["step"] % 5 == 0
        assert not list((disk / "test").glob(".*partial*"))
    finally:
        subprocess.run(["umount", "-l", disk], check=False)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")
    before = path.open()

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("no")

    with pytest.raises(UserError, match="cannot be written"):
        files.write_atomically(path, fail)
    assert path.read_text() == "old"
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert before.read() == "old"  # who had it open still has the old one, complete
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- hostile files


class Trace:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_with_code_in_it_is_refused(dataset, run, tmp_path):
    trace, bomb = tmp_path / "trace", tmp_path / "bomb.pth"
    torch.save({"student": Trace(trace), "config": {}}, bomb)
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(Trace(trace)))
    for path in (bomb, plain):
        for script, option in (
            ("evaluate", ("--weights", path)),
            ("selftrain", ("--init", path, "selftrain.crdomix=false")),
            ("translate_cyclegan", (f"translation.weights={path}",)),
            ("warmup", (f"model.weights={path}", "warmup.crdomix=false")),
        ):
            code, _, err = run(script, *option)
            assert (code, len(err.strip().splitlines())) == (2, 1), err
            assert path.name in err
            assert not trace.exists()
    torch.load(bomb, weights_only=False)
    assert trace.exists()  # so it would have


def test_a_configuration_with_a_python_tag_is_refused(dataset, run, tmp_path):
    trace = tmp_path / "trace"
    for text in (
        f"!!python/object/apply:pathlib.Path.touch [{trace}]",
        f"name: !!python/object/apply:os.mkdir [{trace}]",
    ):
        (tmp_path / "bad.yaml").write_text(text)
        code, _, err = run("warmup", "--cfg", tmp_path / "bad.yaml")
        assert (code, len(err.strip().splitlines())) == (2, 1), err
        code, _, err = run("warmup", f"name={text.removeprefix('name: ')}")
        assert code == 2
        assert not trace.exists()


@pytest.mark.parametrize("name", ["../out", "..", "/tmp/out", "a/b", "a\\b", "a b", ""])
def test_a_name_does_not_lead_out_of_the_folder_of_runs(dataset, run, name):
    for arguments in ((f"name={name!r}",), ("--as", name)):
        code, _, err = run("warmup", *arguments)
        assert (code, len(err.strip().splitlines())) == (2, 1), err


# ---------------------------------------------------------------- generated input

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


def leaves(schema, prefix=()):
    for key, rule in schema.items():
        yield (*prefix, key)
        yield from leaves(rule, (*prefix, key)) if isinstance(rule, dict) else ()


PATHS = list(leaves(SCHEMA))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
@GENERATED
@given(
    keys=st.lists(st.tuples(st.sampled_from(PATHS), values, st.booleans()), min_size=1, max_size=3),
    typo=st.one_of(st.none(), st.text(max_size=8)),
)
def test_a_mutated_configuration_is_valid_or_one_line(path, tmp_path_factory, keys, typo):
    tree = yaml.safe_load(path.read_text())
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


PAIRS = st.tuples(st.sampled_from(PATHS), st.text(max_size=12))
OVERRIDES = PAIRS.map(lambda pair: f"{'.'.join(pair[0])}={pair[1]}")


@GENERATED
@given(text=st.one_of(st.text(max_size=40), OVERRIDES))
def test_any_text_as_an_override_is_valid_or_one_line(text):
    try:
        load_config(ROOT / "config.yaml", [text])
    except UserError as error:
        assert "\n" not in str(error)


def corrupt(kind, path, rng):
    """Make of the image or label file at `path` what `kind` says."""

    def write(array, extension=".png"):
        path.write_bytes(cv2.imencode(extension, array)[1].tobytes())

    data = path.read_bytes()
    array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if kind == "truncated":
        path.write_bytes(data[: rng.integers(0, len(data))])
    elif kind == "zeros":
        start = rng.integers(0, len(data))
        path.write_bytes(data[:start] + bytes(int(rng.integers(1, 200))) + data[start:])
    elif kind == "flipped":
        flipped = bytearray(data)
        for at in rng.integers(0, len(data), rng.integers(1, 20)):
            flipped[at] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(flipped))
    elif kind == "other format":
        write(array, rng.choice([".jpg", ".bmp", ".webp", ".tiff"]))
    elif kind == "16 bit":
        write(array.astype(np.uint16) * int(rng.choice([1, 257])))
    elif kind == "alpha":
        colour = array if array.ndim == 3 else cv2.cvtColor(array, cv2.COLOR_GRAY2BGR)
        write(cv2.cvtColor(colour, cv2.COLOR_BGR2BGRA))
    elif kind == "size":
        write(array[: rng.integers(1, 48), : rng.integers(1, 64)])
    elif kind == "values":
        write(rng.integers(0, 256, array.shape).astype(np.uint8))
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "loop":
        path.unlink()
        path.symlink_to(path)
    elif kind == "directory":
        path.unlink()
        path.mkdir()


KINDS = [
    "truncated",
    "zeros",
    "flipped",
    "other format",
    "16 bit",
    "alpha",
    "size",
    "values",
    "text",
    "loop",
    "directory",
]


def test_a_corrupted_image_or_label_is_read_or_named(tmp_path, dataset, config):
    rng, refused = np.random.default_rng(0), dict.fromkeys(KINDS, 0)
    for n in range(1000 if LONG else 110):
        kind, part = KINDS[n % len(KINDS)], ("images", "labels")[n // len(KINDS) % 2]
        root = tmp_path / f"c{n}"
        image, label = picture(n)
        save(root / "images/0.png", image)
        save(root / "labels/0.png", label)
        corrupt(kind, root / part / "0.png", rng)
        try:
            images_ = Images(config(f"source.root={root}"), "source", labelled=True)
            assert images_.image(0).shape[:2] == images_.label(0).shape
        except UserError as error:
            refused[kind] += 1
            assert "\n" not in str(error)
            assert str(root) in str(error)
        shutil.rmtree(root)
    never_read = ("truncated", "size", "values", "text", "loop", "directory")
    assert all(refused[kind] for kind in never_read), refused


def many(dataset):
    """Make the game's 6 images 520, more than are checked before training."""
    for i in range(6, 520):
        for part in ("images", "labels"):
            path = dataset / f"game/{part}/{i:05d}.png"
            path.symlink_to(dataset / f"game/{part}/{i % 6:05d}.png")


def test_an_error_in_a_loader_process_is_one_line_too(dataset):
    """In the 300th of many images, which the checks before training leave out."""
    many(dataset)
    checked = set(np.unique(np.linspace(0, 519, 256, dtype=int)).tolist())
    for i in set(range(6, 520)) - checked:
        (dataset / f"game/labels/{i:05d}.png").unlink()
        save(dataset / f"game/labels/{i:05d}.png", np.full((48, 64), 200, np.uint8))
    options = ("warmup.crdomix=false", "warmup.steps=300", "workers=2")
    code, _, err = start("warmup", dataset, *options).end()
    assert code == 2, err
    assert "the label value 200 has no class" in err
    assert len(err.strip().splitlines()) == 1, err


# ---------------------------------------------------------------- the check of all files


def test_the_check_counts_what_is_there(dataset, run, config):
    code, out, err = run("tools.own_data", "--check", "selftrain.diagnose=false")
    assert code == 0, err
    assert [line for line in out.splitlines() if "images in" in line] == [
        f"source: 6 images in {dataset}/game/images",
        f"target: 4 images in {dataset}/camera/leftImg8bit/train, labels not read",
        f"val: 2 images in {dataset}/camera/leftImg8bit/val",
    ]
    assert out.count("sizes: ") == 3
    assert "6 of 64x48" in out
    labels = np.stack([picture(i)[1] for i in range(6)])
    for name, value in (("road", 7), ("car", 26), ("sky", 23), ("ignored", 0)):
        assert f"{name} {100 * (labels == value).mean():.2f}%" in out
    sheet = read_image(dataset / "runs/test/contact_sheet_source.png")
    assert sheet.shape == (2 * 160 + 24, 3 * 2 * 213, 3)
    swatches = sheet[-12, 6 : 4 * 150 : 150].tolist()
    assert swatches == [*CLASSES.values(), [0, 0, 0]]
    difference = sheet[:160, :213].astype(int) - resize(picture(0)[0], (160, 213))
    assert np.abs(difference).max() == 0


def test_the_check_finds_what_the_check_before_training_leaves_out(dataset, run):
    many(dataset)
    unchecked = min(set(range(6, 520)) - set(np.linspace(0, 519, 256, dtype=int).tolist()))
    (dataset / f"game/images/{unchecked:05d}.png").unlink()
    (dataset / f"game/images/{unchecked:05d}.png").write_bytes(b"no image")
    code, _, err = run("tools.own_data", "--check")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert f"{unchecked:05d}.png: is broken" in err
