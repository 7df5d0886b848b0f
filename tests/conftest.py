"""Small datasets in the real layouts, a configuration for them, and scripts run in this process."""

import importlib
import struct
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent
SIZE = (48, 64)
CLASSES = {"road": [128, 64, 128], "car": [0, 0, 142], "sky": [70, 130, 180]}
IDS = {"road": 7, "car": 26, "sky": 23}


def paletted_png(indices, palette, depth=8):
    """The bytes of a paletted PNG, written here since OpenCV cannot: indices (H, W), palette (N, 3) RGB."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = indices.shape
    bits = np.unpackbits(indices[..., None].astype(np.uint8), axis=2)[..., 8 - depth :].reshape(height, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(bits, axis=1))
    header = struct.pack(">IIBBBBB", width, height, depth, 3, 0, 0, 0)
    body = (
        chunk(b"PLTE", palette.astype(np.uint8).tobytes()) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def picture(seed, size=SIZE):
    """An RGB image and its label map in Cityscapes' ids: a road, a sky, some cars, an unlabelled corner."""
    rng = np.random.default_rng(seed)
    label = np.full(size, IDS["sky"], np.uint8)
    label[size[0] // 2 :] = IDS["road"]
    for _ in range(3):
        top, left = rng.integers(10, size[0] - 14), rng.integers(0, size[1] - 16)
        label[top : top + 12, left : left + 16] = IDS["car"]
    label[:4, :4] = 0
    colours = np.zeros((256, 3))
    for name, colour in CLASSES.items():
        colours[IDS[name]] = colour
    image = np.clip(colours[label] + rng.normal(0, 12, (*size, 3)), 0, 255).astype(np.uint8)
    return image, label


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), array[..., ::-1] if array.ndim == 3 else array)


@pytest.fixture
def dataset(tmp_path):
    """A game and a camera of 6 pictures each (4 to train on, 2 to validate), and the configuration that names them."""
    for i in range(6):
        image, label = picture(i)
        save(tmp_path / f"game/images/{i:05d}.png", image)
        save(tmp_path / f"game/labels/{i:05d}.png", label)
        split, name = ("train", f"a/a_{i}") if i < 4 else ("val", f"b/b_{i}")
        image, label = picture(100 + i)
        save(tmp_path / f"camera/leftImg8bit/{split}/{name}_leftImg8bit.png", image // 2 + 20)
        save(tmp_path / f"camera/gtFine/{split}/{name}_gtFine_labelIds.png", label)
    config = {
        "base": str(ROOT / "config.yaml"),
        "name": "test",
        "output": str(tmp_path / "runs"),
        "device": "cpu",
        "precision": "fp32",
        "workers": 0,
        "classes": CLASSES,
        "source": {"root": str(tmp_path / "game"), "sizes": [[40, 56], [48, 64]]},
        "target": {"root": str(tmp_path / "camera"), "sizes": [[40, 56], [48, 64]]},
        "val": {"root": str(tmp_path / "camera"), "size": [48, 64]},
        "crop": [32, 40],
        "model": {"network": "mobilenet_v2", "output_stride": 8, "channels": 32, "weights": None},
        "bn_images": 4,
        "translation": {"steps": 4, "batch": [0, 1], "crop": [32, 32], "filters": 4, "blocks": 1},
        "warmup": {"steps": 6, "batch": [1, 1]},
        "selftrain": {"steps": 4, "batch": [1, 1], "diagnose": True},
        "log_every": 2,
        "save_every": 2,
    }
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return tmp_path


@pytest.fixture
def run(dataset, monkeypatch, capsys):
    """run("warmup", "key=value", ...) runs a script's command in this process: (exit code, stdout, stderr)."""
    threads = torch.get_num_threads()

    def call(script, *arguments):
        import engine

        cfg = [] if script == "report" or "--cfg" in arguments else ["--cfg", str(dataset / "test.yaml")]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *cfg, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            engine.command(importlib.import_module(script).main)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    yield call
    torch.set_num_threads(threads)


@pytest.fixture
def config(dataset):
    from config import load_config

    return lambda *overrides: load_config(dataset / "test.yaml", overrides)
