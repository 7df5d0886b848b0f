"""What one sample is: dataset layouts, label values, scaling and cropping."""

import copy
import functools
import os
import signal
import zlib
from pathlib import Path

import cv2
import numpy as np
from torch.utils.data import DataLoader, Dataset, StackDataset

from augment import DRAWS
from engine.config import Config, UserError, one_line, require
from engine.files import write_text
from engine.folders import Aligned, Folder, warn
from engine.images import read_image, read_label, resize, resize_pixels, size_of, threads
from engine.processes import decided_by_first, rank, world
from layouts import classes, find_pairs, label_values, narrow

IGNORED, NO_CLASS = 255, 254
CODE = np.array([1, 256, 65536])  # of a colour (r, g, b): its place in a table


class Images(Folder):
    """The images of cfg's dataset `domain` and, if `labelled`, its label maps, or UserError."""

    def __init__(self, cfg, domain, labelled):
        self.domain = domain
        self.spec = functools.reduce(Config.__getitem__, domain.split("."), cfg)
        self.labelled = labelled
        self.classes = classes(cfg)
        self.list_file = Path(cfg.output) / cfg.name / f"{domain}.txt"
        self.folder, labels = find_pairs(self.spec, domain, labelled)
        self.names = list(labels)
        if self.spec.list is not None:
            self.names = narrow(self.names, self.spec.list, self.folder)
        self.label_paths = [labels[name] for name in self.names]
        if labelled and None in self.label_paths:
            name = self.names[self.label_paths.index(None)]
            raise UserError(f"{self.folder / name}: has no label; add it or drop the image")
        values = label_values(self.spec.ids, self.classes)
        if any(isinstance(value, tuple) for value in values):
            self.coding = "colours"
            self.table = np.full(2**24, IGNORED, np.uint8)
        else:
            self.coding = "red" if self.spec.layout == "synthia" else "values"
            self.table = np.full(65536, NO_CLASS, np.uint8)
        for value, k in values.items():
            self.table[np.dot(value, CODE) if isinstance(value, tuple) else value] = k

    def unlabelled(self):
        """Return the same images, as if they had no labels."""
        images = copy.copy(self)
        images.labelled = False
        return images

    def files(self):
        """Return a line with name, size and time for each file, as an input of a result."""
        paths = [self.folder / name for name in self.names]
        if self.labelled:
            paths += self.label_paths
        found = ((path, path.stat()) for path in paths)
        return "\n".join(f"{path.name} {x.st_size} {x.st_mtime:.0f}" for path, x in found)

    def check(self):
        """Return self. Raises UserError for wrong sizes in any file, other faults in 256 files."""
        odd = {}
        labelled = range(len(self)) if self.labelled else ()
        for name, sizes in zip(self.names, threads.map(self._sizes, labelled), strict=False):
            if None not in sizes and sizes[0] != sizes[1]:
                odd[name] = f"{name} {sizes}"
        if odd:
            fault = f"{len(odd)} labels differ from their images in size (W, H)"
            remedy = "turn or scale them to fit, without new values (nearest)"
            if others := [name for name in self.names if name not in odd]:
                write_text(self.list_file, "\n".join([*others, ""]))
                remedy += f", or set {self.domain}.list={self.list_file}, which names the others"
            first = one_line(", ".join(odd.values()))
            raise UserError(f"{self.folder}: {fault}: {first}; {remedy}")
        some = np.unique(np.linspace(0, len(self.names) - 1, 256, dtype=int)).tolist()
        self._judge(threads.map(self.summary, some))
        return self

    def _sizes(self, i):
        return size_of(self.folder / self.names[i]), size_of(self.label_paths[i])

    def summary(self, i):
        """Return image i's (H, W), largest value, label's pixels of each class, blended_share."""
        image = self.image(i)
        if not self.labelled:
            return image.shape[:2], image.max(), np.ones(256, int), 0
        values = self.label_values(i, image)
        pixels = np.bincount(self.to_classes(values, i).ravel(), minlength=256)
        return image.shape[:2], image.max(), pixels, blended_share(values)

    def _judge(self, summaries):
        """Raise UserError for what cannot be meant, judged by samples; warn of what is odd."""
        shapes, bright, counts, blended = zip(*summaries, strict=True)
        height, width = size = np.median(shapes, axis=0).astype(int).tolist()
        for h, w in self.spec.get("sizes", []):
            stretch, swapped = abs(np.log([w / h / width * height, h / w / width * height]))
            must = f"be [height, width]: the images are {size}"
            require(stretch < swapped + 0.4, self.folder, f"{self.domain}.sizes", [h, w], must)
        shares = np.sum(counts, axis=0) / np.sum(counts)
        if shares[IGNORED] == 1:
            fault = "no pixel of its labels belongs to a class"
            raise UserError(f"{self.domain}: {fault}; are {self.domain}.ids right?")
        if np.median(bright) < 32:
            warn(f"{self.domain}: half of the images are nearly black")
        if shares[IGNORED] > (0.05 if self.coding == "colours" else 0.5):
            warn(f"{self.domain}: {shares[IGNORED]:.1%} of the labels' pixels are ignored")
        if np.median(blended) > 0.3:
            remedy = "scale labels with nearest, and draw them without smooth edges"
            warn(f"{self.domain}: borders in its labels are blended with other values; {remedy}")
        absent = ", ".join(name for k, name in enumerate(self.classes) if not shares[k])
        if absent:
            warn(f"{self.domain}: none of {len(shapes)} labels holds {one_line(absent)}")

    def label_values(self, i, image):
        """Return the values (H, W) in the label file of image i, which is `image`."""
        values = read_label(self.label_paths[i], self.coding)
        require_same_size(self.label_paths[i], values, self.folder / self.names[i], image)
        return values

    def label(self, i, image=None):
        """Return the label map of `image`, image i: (H, W) uint8 classes, 255 ignored."""
        image = self.image(i) if image is None else image
        return self.to_classes(self.label_values(i, image), i)

    def to_classes(self, values, i):
        """Return the classes of values of label i, or of a part of them."""
        if self.coding == "colours":
            return self.table.take(values)
        is_small = values.dtype == np.uint8
        label = cv2.LUT(values, self.table[:256]) if is_small else self.table[values]
        if (label == NO_CLASS).any():
            fault = f"the label value {values[label == NO_CLASS][0]} has no class"
            raise UserError(f"{self.label_paths[i]}: {fault}; add it to ids (null: ignored)")
        return label


def require_same_size(path, array, image_path, image):
    """Raise UserError unless two arrays have one height and width."""
    if array.shape[:2] != image.shape[:2]:
        sizes = "{1}x{0}, but {3}x{2}".format(*array.shape[:2], *image.shape[:2])
        raise UserError(f"{path}: is {sizes} is the size of {image_path}; make them equal")


def blended_share(values):
    """Return how many changes along the rows of a label (H, W) pass through a third value, in 0..1.

    At most 0.15 in labels of streets, medians from 0.37 once an interpolation made new values.
    """
    left, middle, right = values[:, :-2], values[:, 1:-1], values[:, 2:]
    changes = middle != right
    return (changes & (left != middle) & (left != right)).sum() / max(changes.sum(), 1)


def translated_images(cfg, source):
    """Return the reader of G(x_s), from translation.images or translate_cyclegan.py."""
    folder = cfg.translation.images or Path(cfg.output) / cfg.name / "translated"
    remedy = "run translate_cyclegan.py first, or set translation.images"
    return Aligned(folder, source.names, read_image, remedy)


class RareClasses:
    """Rare-class sampling (DAFormer, CVPR 2022): class k with P(k) = softmax_k((1 - f_k) / T).

    f_k: the share of the class in the labelled pixels of `images`. An image is then drawn in which
    the class has at least LEAST of the pixels, or where no image has, one that has the most.
    """

    LEAST = 0.0015

    def __init__(self, images, num_classes, temperature):
        def shares(i):
            values = read_label(images.label_paths[i], images.coding)
            pixels = np.bincount(images.to_classes(values, i).ravel(), minlength=256)
            return pixels[:num_classes] / pixels.sum()

        everywhere = np.stack(decided_by_first(lambda: [*threads.map(shares, range(len(images)))]))
        frequency = everywhere.sum(0) / max(everywhere.sum(), 1e-12)
        chance = np.where(frequency > 0, (1 - frequency) / temperature, -np.inf)
        chance = np.exp(chance - chance.max())
        self.chance = chance / chance.sum()
        least = np.minimum(everywhere.max(0), self.LEAST)
        self.images_of = [np.flatnonzero(of_class) for of_class in (everywhere >= least).T]

    def draw(self, rng):
        """Return an image's number and the class that it was chosen for."""
        k = int(rng.choice(len(self.chance), p=self.chance))
        return int(rng.choice(self.images_of[k])), k


class Crops(Dataset):
    """Random crops for training. Sample n is a pure function of (seed, stage, n).

    Sample n belongs to step n // B, B = sum(batch), and has the resolution of its place in the
    batch: batch[r] images at sizes[r]. Each side is scaled by a factor of its own in
    [cfg.min_scale, 1], not below the crop. A labelled crop is drawn again, up to 5 times, while one
    class fills more than cfg.max_class_share of it. Flipped with probability 0.5.

    crop: (H, W), by default cfg.crop. rare: above 0, the temperature of RareClasses, which then
    choose the images; one with hardly any of the chosen class is drawn again, around a pixel of it.
    aligned: name -> function(i) that reads an array (H, W[, 3]), to crop like image i.
    A sample: image (H, W, 3), label (H, W) of labelled images, the aligned arrays, all uint8; draws
    (DRAWS,) float32 in [0, 1).
    """

    def __init__(self, cfg, stage, domain, images, batch, steps, crop=None, rare=0, aligned=None):
        self.cfg = cfg
        self.images = images
        self.aligned = aligned or {}
        self.steps = steps
        self.crop = crop or cfg.crop
        self.rare = RareClasses(images, len(classes(cfg)), rare) if rare else None
        self.sizes = np.repeat(cfg[domain].sizes, batch, axis=0)
        self.batch_size = len(self.sizes)
        self.seed = (cfg.seed, zlib.crc32(f"{stage} {domain}".encode()))
        self.epoch = None

    def __len__(self):
        return self.steps * self.batch_size

    def _index(self, n):
        epoch, place = divmod(n, len(self.images))
        if epoch != self.epoch:
            rng = np.random.default_rng([*self.seed, 0, epoch])
            self.order = rng.permutation(len(self.images))
            self.epoch = epoch
        return int(self.order[place])

    def __getitem__(self, n):
        rng = np.random.default_rng([*self.seed, 1, n])
        i, k = self.rare.draw(rng) if self.rare else (self._index(n), None)
        image = self.images.image(i)
        values = self.images.label_values(i, image) if self.images.labelled else None

        shape = np.array(image.shape[:2])
        size = self.sizes[n % self.batch_size]
        own = shape * np.sqrt(size.prod() / shape.prod())  # its own shape, at as many pixels
        scale = rng.uniform(self.cfg.min_scale, 1, 2)
        scaled = np.maximum(size * scale, self.crop)
        if not 1 / 1.1 < (own[0] / size[0]) ** 2 < 1.1:  # as portrait among landscape
            scaled = own * scale * max((self.crop / (own * scale)).max(), 1)
        extent = np.maximum(np.rint(self.crop * shape / scaled), 1)  # of the crop, in file's pixels
        for attempt in range(6):
            corner = rng.integers(0, shape - extent.astype(int) + 1)
            if attempt and k is not None:  # around a pixel of the class
                places = np.flatnonzero(self.images.to_classes(values, i) == k)
                corner = np.unravel_index(rng.choice(places), shape) - rng.integers(0, extent)
            window = _window(image, corner, extent)
            if values is None:
                break
            label = self.images.to_classes(resize(values[window], self.crop, labels=True), i)
            pixels = cv2.calcHist([label], [0], None, [256], [0, 256])  # of each class
            enough = k is None or pixels[k] >= self.rare.LEAST / 2 * label.size
            if enough and pixels.max() <= self.cfg.max_class_share * label.size:
                break
        sample = {"image": resize(image[window], self.crop)}
        if values is not None:
            sample["label"] = label
        for key, read in self.aligned.items():
            array = read(i)
            ratio = np.array(array.shape[:2]) / shape  # a translation may have another size
            if abs(ratio[0] / ratio[1] - 1) > 0.02:
                name = self.images.names[i]
                require_same_size(f"{key} for {name}", array, self.images.folder / name, image)
            array = array[_window(array, corner * ratio, extent * ratio)]
            sample[key] = resize(array, self.crop, labels=array.ndim == 2)
        if rng.random() < 0.5:
            sample = {key: cv2.flip(array, 1) for key, array in sample.items()}
        return sample | {"draws": rng.random(DRAWS, dtype=np.float32)}


def _window(array, corner, extent):
    """Return the slices of a window within an array: `extent` (h, w), about at (top, left)."""
    h, w = np.maximum(np.rint(extent), 1).astype(int)
    top, left = np.clip(np.rint(corner), 0, np.array(array.shape[:2]) - (h, w)).astype(int)
    return slice(top, top + h), slice(left, left + w)


class Whole(Dataset):
    """Whole images in order, scaled to as many pixels as `size` (H, W) has, in their own shape.

    A sample: index; image (H, W, 3); shape, the (H, W) of the file; label (H, W) at the file's size
    if the images are labelled. With `goes_on`, what cannot be read has index and fault, a line.
    """

    def __init__(self, images, size=None, goes_on=False):
        self.images = images
        self.size = size
        self.goes_on = goes_on

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        try:
            image = self.images.image(i)
        except UserError as error:
            if not self.goes_on:
                raise
            return {"index": i, "fault": str(error)}
        small = resize_pixels(image, self.size)
        sample = {"index": i, "shape": image.shape[:2], "image": small}
        if self.images.labelled:
            sample["label"] = self.images.label(i, image)
        return sample


def loader(run, dataset, first=0, batch_size=None, shared=True):
    """Return a DataLoader from sample `first` on; of N processes, each takes every N-th batch."""
    share = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    auto = min(max(share, 1), 8)  # a GPU's steps use up what 3 cores load
    samples = np.arange(first, len(dataset))
    if shared:
        mine = (samples - first) // (batch_size or 1) % world() == rank()
        samples = samples[mine]
    return DataLoader(
        dataset,
        batch_size,
        sampler=samples.tolist(),
        num_workers=auto if run.cfg.workers == "auto" else run.cfg.workers,
        pin_memory=run.device.type == "cuda",
        worker_init_fn=_set_up_worker,
    )


def _set_up_worker(_):
    cv2.setNumThreads(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # a whole group gets them: the parent answers
        signal.signal(number, signal.SIG_IGN)


def recalibration_crops(cfg, batch, domains, **images):
    """Return crops of all `domains`, in dicts, for batch norm's statistics; None without any."""
    steps = max(cfg.bn_images // sum(batch), 1)
    crops = {}
    for domain in domains:
        of_domain = images.get(domain) or Images(cfg, domain, labelled=False).check()
        of_domain = of_domain.unlabelled()
        crops[domain] = Crops(cfg, "recalibrate", domain, of_domain, batch, steps)
    return StackDataset(**crops) if crops else None
