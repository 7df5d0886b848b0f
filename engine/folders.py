"""What lies in folders of images: their names, videos, lists of them, files that belong to them."""

import functools
import os
import sys
from pathlib import Path

import cv2
import numpy as np

from engine.config import UserError, one_line
from engine.images import read_image
from engine.processes import rank

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"}


class Folder:
    """The images below a folder; `names` are their paths relative to it, sorted.

    Raises UserError where there are none.
    """

    labelled = False

    def __init__(self, folder):
        self.folder = Path(folder)
        self.names = list_images(folder)
        if not self.names:
            raise UserError(f"{folder}: no such folder of images, or there are none in it")

    def __len__(self):
        return len(self.names)

    def image(self, i):
        """Return image i, RGB uint8 (H, W, 3)."""
        return read_image(self.folder / self.names[i])


class Video:
    """The frames of a video file; fast where they are read in order.

    rate: frames per second. size: (H, W). Raises UserError for a file that OpenCV cannot play.
    """

    labelled = False

    def __init__(self, path):
        self.path = Path(path)
        self.capture = cv2.VideoCapture(str(path))
        self.rate = self.capture.get(cv2.CAP_PROP_FPS) or 25
        count = 0
        while self.capture.grab():  # the count in the file's header is an estimate
            count += 1
        if not count:
            raise UserError(f"{path}: no folder of images, and no video that OpenCV plays")
        self.names = [f"{self.path.stem}_{i:06d}.png" for i in range(count)]
        self.next = count
        self.size = self.image(0).shape[:2]
        self.next, self.capture = count, None  # a capture cannot be sent to a DataLoader worker

    def __len__(self):
        return len(self.names)

    def image(self, i):
        """Return frame i, RGB uint8 (H, W, 3)."""
        if i < self.next:
            self.next, self.capture = 0, cv2.VideoCapture(str(self.path))
        while self.next < i:
            self.next += self.capture.grab()
        self.next += 1
        return np.ascontiguousarray(self.capture.read()[1][..., ::-1])


class Aligned:
    """Files that belong to images by their names: calling it with i reads the file for names[i].

    remedy: what to do where one is missing. Raises UserError.
    """

    def __init__(self, folder, names, read, remedy):
        there = {stem_of(name): Path(folder) / name for name in list_images(folder)}
        missing = next((name for name in names if stem_of(name) not in there), None)
        if missing is not None:
            raise UserError(f"{Path(folder) / missing}: is missing; {remedy}")
        self.paths, self.read = [there[stem_of(name)] for name in names], read

    def __call__(self, i):
        return self.read(self.paths[i])


def list_images(folder):
    """Return the paths of all image files below a folder, relative to it, sorted.

    Links are followed; hidden files are left out. Raises UserError for an unreadable folder, and
    where two images differ in their extension only.
    """
    names = {}
    for path, folders, files in os.walk(folder, onerror=_unreadable, followlinks=True):
        below = Path(path).relative_to(folder).as_posix()
        place = "" if below == "." else f"{below}/"
        folders[:] = [x for x in folders if x[0] != "."]
        for file in files:
            stem, extension = os.path.splitext(file)  # noqa: PTH122  (pathlib: a second for 25,000)
            if file[0] == "." or extension.lower() not in EXTENSIONS:
                continue
            if place + stem in names:
                fault = "another image has the same name without extension"
                raise UserError(f"{Path(folder) / place / file}: {fault}; rename one of them")
            names[place + stem] = place + file
    return sorted(names.values())


def _unreadable(error):
    if Path(error.filename).is_dir():
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); allow it")


def stem_of(name):
    return name.rpartition(".")[0]


def narrow(names, path, folder):
    """Return the names that a list file asks for.

    Each line is a path that ends with a name; what follows a space is a label's path.
    """
    usage = f"one path a line, relative to {folder}"
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: this list of images cannot be read ({error})") from error
    known, wanted = set(names), set()
    for line in filter(str.strip, lines):
        parts = (line if line in known else line.split()[0]).split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        name = next((end for end in ends if end in known), None)
        if name is None:
            raise UserError(f"{path}: names {one_line(line)}; {usage}")
        wanted.add(name)
    if not wanted:
        raise UserError(f"{path}: names no image; {usage}")
    return [name for name in names if name in wanted]


def require_same_size(path, array, image_path, image):
    """Raise UserError unless two arrays have one height and width."""
    if array.shape[:2] != image.shape[:2]:
        sizes = "{1}x{0}, but {3}x{2}".format(*array.shape[:2], *image.shape[:2])
        raise UserError(f"{path}: is {sizes} is the size of {image_path}; make them equal")


@functools.cache
def warn(line):
    """Write a warning on stderr, once."""
    if rank() == 0:
        print(f"{Path(sys.argv[0]).name}: warning: {line}", file=sys.stderr)
