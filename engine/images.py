"""Image files: reading, writing, resizing, and label maps in colour.

Images are RGB uint8 (H, W, 3). Label maps are uint8 (H, W): classes 0 ... K-1, and 255 where a
pixel is ignored. Colours are a dict: class name -> (r, g, b), in the order of the class numbers.
"""

import contextlib
import ctypes
import io
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from engine.config import UserError
from engine.files import write_atomically

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
RAW = re.compile(rb"P6\s(\d{1,5})\s(\d{1,5})\s255\s")  # a PPM: width, height; no overflow
JPEG = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111]  # 4:4:4
# IMWRITE_PNG_FILTER, ..._NONE, unknown to OpenCV 4.11: labels decode in a third of the time
UNFILTERED = [19, 8]
# The only threads beside the main one that use OpenCV. They are never ended: an ending thread holds
# a lock of OpenCV, for which a DataLoader worker that is forked in that moment waits for ever.
threads = ThreadPoolExecutor(4)
# 0: silent, for its errors are raised here; OpenCV 4 has the function elsewhere
(cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)
Image.MAX_IMAGE_PIXELS = 2**29  # Pillow refuses twice as many, which is OpenCV's limit
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_gate, _reports = threading.Lock(), None
if hasattr(_libc, "gnu_get_libc_version"):
    # libjpeg tells of damage nowhere but on C's `stderr`, which is memory from here on: longer than
    # what will be written, so that it stays in place. Python's stderr and descriptor 2 are as ever.
    _text, _size = ctypes.c_void_p(), ctypes.c_size_t()
    _libc.open_memstream.restype = ctypes.c_void_p
    _reports = ctypes.c_void_p.in_dll(_libc, "stderr")
    _reports.value = _libc.open_memstream(ctypes.byref(_text), ctypes.byref(_size))
    _libc.fputs(b" " * 2**20, _reports)


def keep_freed_memory():
    """Make glibc reuse the memory of the last image: new pages take a tenth of a sample's time."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(-1, 2**28)  # M_TRIM_THRESHOLD
        _libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, its largest


def read_image(path):
    """Return an image file as RGB uint8 (H, W, 3), not turned by EXIF. Raises UserError.

    Raw pixels (PPM) are mapped into memory: what a crop leaves out is never read from the disk.
    """
    image = _map(path) if Path(path).suffix == ".ppm" and Path(path).is_file() else None
    if image is None:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image = _decode(path, _read(path), flags)
    return image


def read_label(path, red_only=False):
    """Return the values of a label file, (H, W) uint8 or uint16; of a paletted PNG its indices.

    red_only: of a colour image, its red channel, where SYNTHIA has classes. Raises UserError.
    """
    data = _read(path)
    png = data.startswith(PNG_SIGNATURE)
    if data.startswith(b"\xff\xd8"):
        raise UserError(f"{path}: is a JPEG, which changes values next to edges; write PNG instead")
    if png and data[25:26] == b"\x03":  # with a palette: OpenCV would return its colours
        return _decode(path, data)
    values = _decode(path, data, cv2.IMREAD_UNCHANGED)
    if png and data[24] < 8 and values.ndim == 2:  # OpenCV spreads 1, 2 and 4 bits over 0 ... 255
        values = values // (255 // (2 ** data[24] - 1))
    if red_only and values.ndim == 3:
        values = np.ascontiguousarray(values[..., 2])
    if values.ndim != 2:
        raise UserError(f"{path}: is a colour image; convert it to a gray or paletted PNG")
    if values.dtype not in (np.uint8, np.uint16):
        raise UserError(f"{path}: holds {values.dtype} values; a label holds 8- or 16-bit integers")
    return values


def _map(path):
    """Return the pixels of a PPM, mapped into memory; None where it must be read and judged."""
    with contextlib.suppress(OSError, ValueError), Path(path).open("rb") as file:
        if header := RAW.match(file.read(64)):
            shape = int(header[2]), int(header[1]), 3
            if min(shape[:2]) >= 8:
                return np.memmap(file, np.uint8, "c", header.end(), shape)
    return None


def _read(path):
    try:
        if not Path(path).is_file() and Path(path).exists():  # a pipe would be waited for
            raise UserError(f"{path}: is no regular file; remove it")
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it") from error
    cut_png = data.startswith(PNG_SIGNATURE) and b"IEND" not in data[-64:]
    cut_jpeg = data.startswith(b"\xff\xd8") and b"\xff\xd9" not in data[-65536:]
    if cut_png or cut_jpeg or not data:
        raise UserError(f"{path}: is empty or cut short; restore the file or remove it")
    return data


def _decode(path, data, flags=None):
    """Decode with OpenCV or, without its flags, with Pillow."""
    try:
        if flags is None:
            return np.array(Image.open(io.BytesIO(data)))
        image, guessed = _imdecode(data, flags)
        if guessed:  # or another thread's: they wait here, at most 4
            with _gate:
                guessed = all(_imdecode(data, flags)[1] for _ in range(6))
    except Exception:  # cv2.error; Pillow raises a dozen types, depending on the damage
        image, guessed = None, False
    if image is None or guessed:
        fault = "is damaged inside" if guessed else "is broken, too large, or not an image"
        raise UserError(f"{path}: {fault}; restore the file or remove it")
    if min(image.shape[:2]) < 8:
        fault = "is {1}x{0} pixels, too few for a network".format(*image.shape)
        raise UserError(f"{path}: {fault}; remove it")
    return image


def _imdecode(data, flags):
    """Return OpenCV's image or None, and whether libjpeg told of damage meanwhile."""
    before = _libc.ftell(_reports) if _reports else 0
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if not _reports or _libc.ftell(_reports) == before or _libc.fflush(_reports):
        return image, False
    return image, b"Corrupt JPEG" in ctypes.string_at(_text.value + before)


def write_image(path, image):
    """Write uint8 RGB (H, W, 3) or uint8, uint16 gray (H, W) atomically, by the file extension."""
    options = JPEG if Path(path).suffix == ".jpg" else UNFILTERED if image.ndim == 2 else []

    def write(temporary):
        pixels = image[..., ::-1] if image.ndim == 3 else image
        done, data = cv2.imencode(Path(path).suffix, pixels, options)
        if not done:
            raise OSError("OpenCV failed")
        temporary.write_bytes(data.tobytes())

    write_atomically(path, write)


@contextlib.contextmanager
def image_writer():
    """Context manager: write_image in background threads; all files are complete at its exit."""
    pending = []

    def write(path, image):
        pending.append(threads.submit(write_image, path, image))
        if len(pending) > 8:
            pending.pop(0).result()

    try:
        yield write
    finally:
        wait(pending)
    for result in pending:
        result.result()


@contextlib.contextmanager
def video_writer(path, rate, size):
    """Context manager: append RGB frames of `size` (H, W) to an MP4 file. Raises UserError."""
    temporary = Path(path).with_name(f".{Path(path).stem}.partial.mp4")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter_fourcc(*"mp4v"), rate, size[::-1])
    if not writer.isOpened():
        raise UserError(f"{path}: cannot be written; check the disk and OpenCV's video support")
    try:
        yield lambda frame: writer.write(frame[..., ::-1])
        writer.release()
        temporary.replace(path)
    finally:
        writer.release()
        temporary.unlink(missing_ok=True)


def resize(array, size, labels=False):
    """Return (h, w[, 3]) scaled to (*size[, 3]): by area or bilinearly, labels by nearest."""
    (height, width), method = map(int, size), cv2.INTER_LINEAR
    if height <= array.shape[0] and width <= array.shape[1]:
        method = cv2.INTER_AREA
    if labels:
        method = cv2.INTER_NEAREST_EXACT
    return cv2.resize(array, (width, height), interpolation=method)


def paint(label, colours):
    """Return a label map (H, W) in the classes' colours, (H, W, 3) uint8; 255 is black."""
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(colours)] = list(colours.values())
    return palette[label]
