"""Image files: reading, writing, resizing, and label maps in colour.

Images are RGB uint8 (H, W, 3). Label maps are uint8 (H, W): classes 0 ... K-1, and 255 where a
pixel is ignored. Colours are a dict: class name -> (r, g, b), in the order of the class numbers.
"""

import contextlib
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from engine.config import UserError
from engine.files import write_atomically

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111]  # 4:4:4
# IMWRITE_PNG_FILTER, ..._NONE, unknown to OpenCV 4.11: labels decode in a third of the time
UNFILTERED = [19, 8]
# never ended: an ending thread holds a lock of OpenCV, for which a worker that is forked waits
threads = ThreadPoolExecutor(4)
Image.MAX_IMAGE_PIXELS = 2**29  # Pillow refuses twice as many, which is OpenCV's limit


def read_image(path):
    """Return an image file as RGB uint8 (H, W, 3), turned as EXIF says. Raises UserError."""
    return _decode(path, _read(path), cv2.IMREAD_COLOR_RGB)


def read_label(path, coding="values"):
    """Return the values of a label file, (H, W) uint8 or uint16, turned as EXIF says.

    Of a paletted PNG its indices. coding: "red": a colour image's red channel; "colours": the codes
    of its colours, r + 256 g + 65536 b, int32. Raises UserError.
    """
    data = _read(path)
    is_png = data.startswith(PNG_SIGNATURE)
    if data.startswith(b"\xff\xd8"):
        raise UserError(f"{path}: is a JPEG, which changes values next to edges; write PNG instead")
    if coding == "colours":
        colours = _decode(path, data, cv2.IMREAD_COLOR_RGB)
        return cv2.cvtColor(colours, cv2.COLOR_RGB2RGBA).view("<i4")[..., 0] & 0xFFFFFF
    if is_png and data[25:26] == b"\x03":  # with a palette: OpenCV would return its colours
        return _decode(path, data)
    values = _decode(path, data, cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH)
    if is_png and data[24] < 8 and values.ndim == 2:  # OpenCV spreads 1, 2, 4 bits over 0 ... 255
        values = values // (255 // (2 ** data[24] - 1))
    if coding == "red" and values.ndim == 3:
        values = np.ascontiguousarray(values[..., 2])
    if values.ndim != 2:
        raise UserError(f"{path}: is a colour image; see `ids: colours` in config.yaml")
    if values.dtype not in (np.uint8, np.uint16):
        raise UserError(f"{path}: holds {values.dtype} values; a label holds 8- or 16-bit integers")
    return values


def size_of(path):
    """Return (width, height) by a file's header, as EXIF turns it; None where Pillow has none."""
    try:
        with Image.open(path) as image:
            turned = "exif" in image.info and image.getexif().get(274, 1) > 4  # orientation
            return image.size[::-1] if turned else image.size
    except Exception:  # it is read, and judged, by others
        return None


def _read(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it") from error


def _decode(path, data, flags=None):
    """Decode with OpenCV or, without its flags, with Pillow. Raises UserError."""
    image = None
    with contextlib.suppress(Exception):  # cv2.error; Pillow raises a dozen types
        if flags is None:
            image = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        else:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None or min(image.shape[:2]) < 8:
        fault = "is broken, empty, too large, too small, or not an image"
        raise UserError(f"{path}: {fault}; restore the file or remove it")
    return image


def write_image(path, image):
    """Write uint8 RGB (H, W, 3) or uint8, uint16 gray (H, W) atomically, by the file extension."""
    options = JPEG if Path(path).suffix == ".jpg" else UNFILTERED if image.ndim == 2 else []
    pixels = image[..., ::-1] if image.ndim == 3 else image
    data = cv2.imencode(Path(path).suffix, pixels, options)[1]
    write_atomically(path, lambda temporary: temporary.write_bytes(data.tobytes()))


@contextlib.contextmanager
def image_writer():
    """Context manager: write_image in background threads; all files are complete at its exit."""
    pending = []

    def write(path, image):
        pending.append(threads.submit(write_image, path, image))
        if len(pending) > 8:
            pending.pop(0).result()

    yield write
    for result in pending:
        result.result()


def resize(array, size, labels=False):
    """Return (h, w[, 3]) scaled to (*size[, 3]): by area or bilinearly, labels by nearest."""
    (height, width), method = map(int, size), cv2.INTER_LINEAR
    if height <= array.shape[0] and width <= array.shape[1]:
        method = cv2.INTER_AREA
    if labels:
        method = cv2.INTER_NEAREST_EXACT
    return cv2.resize(array, (width, height), interpolation=method)


def resize_pixels(image, size):
    """Return an image with about as many pixels as `size` (H, W), in its own shape; None: all."""
    shape = image.shape[:2]
    if size is not None:
        factor = (size[0] * size[1] / (shape[0] * shape[1])) ** 0.5
        shape = [max(round(side * factor), 8) for side in shape]
    return resize(image, shape)


def paint(label, colours):
    """Return a label map (H, W) in the classes' colours, (H, W, 3) uint8; 255 is black."""
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(colours)] = list(colours.values())
    return palette[label]
