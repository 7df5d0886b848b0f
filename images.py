"""Image files: reading and writing them with OpenCV, resizing, colours for labels.

Images are RGB uint8 (H, W, 3); label maps are uint8 (H, W), classes 0 ... K-1 and 255 where a pixel is ignored.
"""

import collections
import contextlib
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import cv2
import numpy as np

from config import UserError, classes
from files import write_atomically

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# All threads that use OpenCV beside the main one. They are never ended: an ending thread holds a lock of OpenCV's, for which a
# loader's process that is forked in that moment would wait without end.
threads = ThreadPoolExecutor(4)


def read_image(path):
    """An image file as RGB uint8 (H, W, 3). Raises UserError for a file that is missing, broken or no image."""
    return _decode(path, _read(path), cv2.IMREAD_COLOR_RGB)


def read_label(path, red_only=False):
    """A label file's values, (H, W) uint8 or uint16: a paletted PNG gives its indices, not its colours.

    red_only: take the first (red) channel, SYNTHIA's way of storing classes. Raises UserError.
    """
    data = _read(path)
    values = _decode(path, _indices_as_gray(data), cv2.IMREAD_UNCHANGED)
    if data.startswith(PNG_SIGNATURE) and data[24] < 8 and values.ndim == 2:
        values = values // (255 // (2 ** data[24] - 1))  # OpenCV spreads 1, 2 and 4 bits over 0 ... 255
    if red_only and values.ndim == 3:
        values = np.ascontiguousarray(values[..., 2])
    if values.ndim != 2:
        raise UserError(
            f"{path}: is a colour image; a label holds one value a pixel: convert it to a gray or paletted PNG"
        )
    if values.dtype not in (np.uint8, np.uint16):
        raise UserError(f"{path}: holds {values.dtype} values; a label holds 8- or 16-bit integers")
    return values


def _read(path):
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore the file or remove it") from error
    cut = (data.startswith(PNG_SIGNATURE) and b"IEND" not in data[-64:]) or (
        data.startswith(b"\xff\xd8") and b"\xff\xd9" not in data[-65536:]
    )
    if cut or not data:
        raise UserError(f"{path}: is {'cut short' if data else 'empty'}; restore the file or remove it")
    return data


def _decode(path, data, flags):
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise UserError(f"{path}: is broken, or no image that OpenCV reads; restore the file or remove it")
    return image


def _indices_as_gray(data):
    """A paletted PNG rewritten as a gray one with the same pixel data, since OpenCV decodes palettes to colours."""
    if data[:8] != PNG_SIGNATURE or data[25:26] != b"\x03":
        return data
    header = data[12:25] + b"\0" + data[26:29]
    parts, at = [data[:12], header, struct.pack(">I", zlib.crc32(header))], 33
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] in (b"IDAT", b"IEND"):
            parts.append(data[at:end])
        at = end
    return b"".join(parts)


def write_image(path, image):
    """Writes uint8 RGB (H, W, 3) or gray (H, W); the extension gives the format."""

    def write(temporary):
        done, data = cv2.imencode(Path(path).suffix, image[..., ::-1] if image.ndim == 3 else image)
        if not done:
            raise OSError("OpenCV failed")
        temporary.write_bytes(data.tobytes())

    write_atomically(path, write)


@contextlib.contextmanager
def image_writer():
    """write_image in other threads, since encoding takes as long as a network does; on leaving, all files are there."""
    pending = collections.deque()

    def write(path, image):
        pending.append(threads.submit(write_image, path, image))
        if len(pending) > 8:
            pending.popleft().result()

    try:
        yield write
    finally:
        wait(pending)
    for result in pending:
        result.result()


@contextlib.contextmanager
def video_writer(path, rate, size):
    """A function that appends an RGB frame (H, W, 3) of `size` (H, W) to an MP4 file, which appears when it is complete."""
    temporary = Path(path).with_name(f".{Path(path).stem}.partial.mp4")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter_fourcc(*"mp4v"), rate, (size[1], size[0]))
    if not writer.isOpened():
        raise UserError(f"{path}: cannot be written; is there place, and OpenCV's video support?")
    try:
        yield lambda frame: writer.write(frame[..., ::-1])
        writer.release()
        temporary.replace(path)
    finally:
        writer.release()
        temporary.unlink(missing_ok=True)


def resize(array, size, labels=False):
    """(h, w[, 3]) to (*size[, 3]): labels by nearest neighbour, images averaging when they shrink."""
    if labels:
        method = cv2.INTER_NEAREST_EXACT
    else:
        method = cv2.INTER_AREA if size[0] <= array.shape[0] and size[1] <= array.shape[1] else cv2.INTER_LINEAR
    return cv2.resize(array, (int(size[1]), int(size[0])), interpolation=method)


def legend(cfg, width, cell=150):
    """The classes' colours with their names, (H, width, 3)."""
    across = max(width // cell, 1)
    names = [*classes(cfg).items(), ("ignored", (0, 0, 0))]
    picture = np.full((24 * -(-len(names) // across), width, 3), 255, np.uint8)
    for k, (name, colour) in enumerate(names):
        x, y = k % across * cell + 4, k // across * 24 + 4
        cv2.rectangle(picture, (x, y), (x + 16, y + 16), [int(part) for part in colour], cv2.FILLED)
        cv2.putText(picture, name, (x + 22, y + 13), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return picture


def paint(label, cfg):
    """A label map (H, W) in the classes' colours, (H, W, 3); 255 is black."""
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(classes(cfg))] = list(classes(cfg).values())
    return palette[label]
