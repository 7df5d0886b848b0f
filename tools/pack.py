"""Copy the training images once into files that load faster, of the size that training uses.

    python -m tools.pack --cfg my.yaml [--out DIR]

Images and labels of source and target that are larger than the largest of `sizes` are scaled to it;
smaller ones keep their size. Images become raw pixels (PPM), labels PNG: nothing is lost but by the
scaling. The same command goes on where it was stopped. Prints what to write into the configuration.
"""

import functools
import shutil
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from datasets import Images
from engine.command import arguments, command
from engine.config import UserError
from engine.images import read_image, read_label, resize, threads, write_image
from engine.log import progress
from settings import load_config

IMAGES, LABELS = ".ppm", ".png"  # measured in docs/performance.md


def main():
    parser = arguments(__doc__)
    words = "the folder to write (default: data/NAME_packed, with the configuration's name)"
    parser.add_argument("--out", metavar="DIR", type=Path, help=words)
    args = parser.parse_intermixed_args()
    cfg = load_config(args.cfg, args.overrides)
    out = args.out or Path(f"data/{cfg.name}_packed")
    labelled = {"source": True, "target": cfg.selftrain.diagnose or "oracle" in cfg.stages}
    roots = {}
    for domain in labelled:
        # one level more than needed: the labels of the layout `flat` may lie beside the root
        roots[domain] = out / domain / (Path(cfg[domain].root).resolve().name or "data")
        pack(Images(cfg, domain, labelled[domain]), cfg[domain], roots[domain])
    lines = {domain: {"root": str(root), "list": None} for domain, root in roots.items()}
    print(yaml.safe_dump(lines, default_flow_style=None, sort_keys=False), end="")


def pack(images, spec, root):
    """Write the files of a datasets.Images below `root`, under the names they have below spec.root.

    spec: cfg.source or cfg.target. Raises UserError where a file cannot be read or written, or is
    read back with other values.
    """
    largest = np.max(spec.sizes, axis=0)
    room_for(images, largest, root)
    one, written = functools.partial(pack_one, images, Path(spec.root), root, largest), 0
    with progress(total=len(images), desc=str(root), unit="img") as bar:
        for done in threads.map(one, range(len(images))):
            written += done
            bar.update()
    print(f"{root}: {len(images)} images, {written} of them written now")


def pack_one(images, origin, root, largest, i):
    """Write image i and its label unless both are there; return whether they were written."""
    path = images.folder / images.names[i]
    files = {path: (root / path.relative_to(origin)).with_suffix(IMAGES)}
    if images.labelled:
        label = images.label_paths[i]
        files[label] = (root / label.relative_to(origin)).with_suffix(LABELS)
    size = np.minimum(size_of(path), largest)
    if all(is_done(*pair, size) for pair in files.items()):
        return False
    image = images.image(i)
    arrays = [resize(image, size)]
    if images.labelled:
        arrays.append(resize(images.label_values(i, image), size, labels=True))
    for target, array in zip(files.values(), arrays, strict=True):
        write_image(target, array)
        back = read_image(target) if array.ndim == 3 else read_label(target)
        if back.dtype != array.dtype or not np.array_equal(back, array):
            target.unlink()
            raise UserError(f"{target}: is read back with other values; check the disk")
    return True


def is_done(origin, target, size):
    """Return whether `target` is newer than its origin and has this size (H, W)."""
    newer = target.exists() and target.stat().st_mtime >= origin.stat().st_mtime
    return newer and size_of(target) == tuple(size)


def size_of(path):
    """Return the (H, W) in a file's header."""
    try:
        with Image.open(path) as image:
            return image.size[::-1]
    except (OSError, Image.DecompressionBombError):
        return read_image(path).shape[:2]


def room_for(images, largest, root):
    """Raise UserError unless `root` can be made on a disk with room for all images of this size."""
    needed = len(images) * 3 * int(np.minimum(images.image(0).shape[:2], largest).prod())
    there = sum(path.stat().st_size for path in root.rglob("*" + IMAGES))
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{root}: cannot be made ({error.strerror}); set another --out") from error
    free = shutil.disk_usage(root).free
    if needed - there > free:
        gb = f"{(needed - there) / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free"
        raise UserError(f"{root}: {gb}; set --out to a folder on another disk")


if __name__ == "__main__":
    command(main)
