"""What lies in folders of images: their names, files that belong to them."""

import functools
import os
import sys
from pathlib import Path

from engine.config import UserError
from engine.images import read_image
from engine.processes import rank

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"}


class Folder:
    """The images below a folder, or one image; `names` are relative to `folder`, sorted."""

    labelled = False

    def __init__(self, folder):
        self.folder, self.names = Path(folder), list_images(folder)
        if self.folder.is_file():
            self.folder, self.names = self.folder.parent, [self.folder.name]
        if not self.names:
            raise UserError(f"{folder}: no such folder of images, or there are none in it")

    def __len__(self):
        return len(self.names)

    def image(self, i):
        """Return image i, RGB uint8 (H, W, 3)."""
        return read_image(self.folder / self.names[i])


class Aligned:
    """Files that belong to images by their names: called with i, read the file for names[i]."""

    def __init__(self, folder, names, read, remedy):
        paths = {Path(name).with_suffix(""): Path(folder) / name for name in list_images(folder)}
        self.paths, self.read = [paths.get(Path(name).with_suffix("")) for name in names], read
        if None in self.paths:
            missing = Path(folder) / names[self.paths.index(None)]
            raise UserError(f"{missing}: is missing; {remedy}")

    def __call__(self, i):
        return self.read(self.paths[i])


def list_images(folder, unique=True):
    """Return all image paths below a folder, sorted, or UserError; unique: no two of one stem."""
    names = {}
    for path, folders, files in os.walk(folder, followlinks=True):
        below = os.path.relpath(path, folder).replace(os.sep, "/")
        place = "" if below == "." else f"{below}/"
        folders[:] = [x for x in folders if x[0] != "."]
        for file in files:
            stem, extension = os.path.splitext(file)  # noqa: PTH122  (pathlib: a second for 25,000)
            if file[0] == "." or extension.lower() not in EXTENSIONS:
                continue
            name = place + (stem if unique else file)
            if name in names:
                fault = "another image has the same name without extension"
                raise UserError(f"{Path(folder) / place / file}: {fault}; rename one of them")
            names[name] = place + file
    return sorted(names.values())


@functools.cache
def warn(line):
    """Write a warning on stderr, once."""
    if rank() == 0:
        print(f"{Path(sys.argv[0]).name}: warning: {line}", file=sys.stderr)
