"""What one sample is: dataset layouts, label values, scaling, cropping. As a command, a first configuration, and the check of all files.

python datasets.py --init FOLDER_WITH_LABELS FOLDER_WITHOUT --out my.yaml
python datasets.py --check --cfg my.yaml
"""

import functools
import signal
import zlib
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, StackDataset

from augment import DRAWS
from config import Config, UserError, classes, label_values, load_config
from engine import arguments, command, forget_locks
from images import read_image, read_label, resize, threads
from processes import rank, world

IGNORED, NO_CLASS = 255, 254
EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"}
# layout: image folder, label folders (in the root; the first that is there), ending of an image's and of its label's stem
LAYOUTS = {
    "gta5": ("images", ["labels"], "", ""),
    "synthia": ("RGB", ["GT/LABELS"], "", ""),
    "cityscapes": ("leftImg8bit/{split}", ["gtFine/{split}"], "_leftImg8bit", "_gtFine_labelIds"),
    "bdd100k": ("images/{split}", ["labels/{split}", "gtFine/{split}"], "", "_train_id"),
    "folder": ("{split}/images", ["{split}/labels"], "", ""),
    "flat": ("{split}", ["{split}/../labels"], "", ""),
}


class Folder:
    """The images below a folder; `names` are their paths relative to it, in order."""

    labelled = False

    def __init__(self, folder):
        self.folder = Path(folder)
        self.names = list_images(folder)
        if not self.names:
            raise UserError(f"{folder}: no such folder of images, or there are none in it")

    def __len__(self):
        return len(self.names)

    def image(self, i):
        return read_image(self.folder / self.names[i])


class Video:
    """The frames of a video file, in the order in which they are asked for quickly; rate: frames per second; size: (H, W).

    Raises UserError for a file that OpenCV cannot play.
    """

    labelled = False

    def __init__(self, path):
        self.path, count, self.capture = Path(path), 0, cv2.VideoCapture(str(path))
        self.rate = self.capture.get(cv2.CAP_PROP_FPS) or 25
        while self.capture.grab():  # the count in the file's head is an estimate
            count += 1
        if not count:
            raise UserError(f"{path}: no folder of images, and no video that OpenCV plays")
        self.names = [f"{self.path.stem}_{i:06d}.png" for i in range(count)]
        self.next, self.capture = count, None  # a capture does not survive the way into a loader's process
        self.size = self.image(0).shape[:2]
        self.next, self.capture = count, None

    def __len__(self):
        return len(self.names)

    def image(self, i):
        if i < self.next:
            self.next, self.capture = 0, cv2.VideoCapture(str(self.path))
        while self.next < i:
            self.next += self.capture.grab()
        self.next += 1
        return np.ascontiguousarray(self.capture.read()[1][..., ::-1])


class Images(Folder):
    """The images of a dataset and, if `labelled`, their label maps. domain: source, target, val or more_val.NAME.

    Raises UserError for a missing folder, an empty split, an image without a label, a list that names what is not there,
    and for what is wrong in any of 256 evenly spaced files; all are checked as they are read.
    """

    def __init__(self, cfg, domain, labelled):
        spec = functools.reduce(Config.__getitem__, domain.split("."), cfg)
        self.labelled, self.red_only = labelled, spec.layout == "synthia"
        image_folder, label_folders, image_end, label_end = LAYOUTS[spec.layout]
        self.folder = Path(spec.root) / image_folder.format(split=spec.split or ".")
        if not self.folder.is_dir():
            raise UserError(
                f"{self.folder}: no such folder of images; set {domain}.root, or see the README for the data"
            )
        self.names = [name for name in list_images(self.folder) if Path(name).stem.endswith(image_end)]
        if not self.names:
            raise UserError(
                f"{self.folder}: holds no images; is {domain}.split or {domain}.layout = {spec.layout} right?"
            )
        if spec.list is not None:
            self.names = _narrow(self.names, spec.list, self.folder)
        if labelled:
            label_folders = [Path(spec.root) / folder.format(split=spec.split or ".") for folder in label_folders]
            label_folder = next((folder for folder in label_folders if folder.is_dir()), label_folders[0])
            labels = {_stem(name): label_folder / name for name in list_images(label_folder)}
            self.label_paths = []
            for name in self.names:
                stem = _stem(name).removesuffix(image_end) + label_end
                if stem not in labels:
                    raise UserError(
                        f"{self.folder / name}: has no label {label_folder / stem}.png; add it or drop the image"
                    )
                self.label_paths.append(labels[stem])
            self.table = np.full(65536, NO_CLASS, np.uint8)
            for value, k in label_values(spec.ids, classes(cfg)).items():
                self.table[value] = k
        some = np.unique(np.linspace(0, len(self.names) - 1, 256, dtype=int)).tolist()
        list(threads.map(self._check, some))

    def _check(self, i):
        if self.labelled:
            self.label(i)
        else:
            self.image(i)

    def label_values(self, i, image):
        """The label file of `image` as it stands: (H, W), values of the dataset."""
        path = self.label_paths[i]
        values = read_label(path, self.red_only)
        same_size(path, values, self.folder / self.names[i], image)
        return values

    def label(self, i):
        """The whole label map of image i as classes."""
        return self.to_classes(self.label_values(i, self.image(i)), i)

    def to_classes(self, values, i):
        """Values of label i, or of a part of it, as classes."""
        label = cv2.LUT(values, self.table[:256]) if values.dtype == np.uint8 else self.table[values]
        if (label == NO_CLASS).any():
            value = values[label == NO_CLASS][0]
            raise UserError(
                f"{self.label_paths[i]}: the label value {value} has no class; add it to ids (null: ignored)"
            )
        return label


def list_images(folder):
    """The paths of all image files below `folder`, relative to it, sorted. Raises UserError for equal stems."""
    folder = Path(folder)
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS)
    stems = set()
    for name in names:
        if _stem(name) in stems:
            raise UserError(f"{folder / name}: another image has the same name without extension; rename one of them")
        stems.add(_stem(name))
    return names


def _stem(name):
    return name.rpartition(".")[0]


def _narrow(names, path, folder):
    """The names that a list file asks for. A line is a path that ends with a name; what follows a space is a label's."""
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: this list of images cannot be read ({error})") from error
    known, wanted = set(names), set()
    for line in lines:
        parts = (line if line in known else line.split()[0]).split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        name = next((end for end in ends if end in known), None)
        if name is None:
            raise UserError(f"{path}: names {line}; one path a line, relative to {folder}")
        wanted.add(name)
    if not wanted:
        raise UserError(f"{path}: names no image; one path a line, relative to {folder}")
    return [name for name in names if name in wanted]


def same_size(path, array, image_path, image):
    if array.shape[:2] != image.shape[:2]:
        sizes = "{1}x{0}, but {3}x{2}".format(*array.shape[:2], *image.shape[:2])
        raise UserError(f"{path}: is {sizes} is the size of {image_path}; make them equal")


# ---------------------------------------------------------------- samples


class Crops(Dataset):
    """Random crops for training. Sample n is a pure function of (seed, stage, n), whoever loads it.

    Sample n belongs to step n // B, B = sum(batch), and takes the resolution of its place in the batch: batch[r] images
    at sizes[r]. Each side is scaled by its own factor in [cfg.min_scale, 1], though never below the crop. A labelled crop is
    drawn again, up to 5 times, while one class fills more than cfg.max_class_share of it. Flipped with probability 0.5.

    images: Images; crop: (H, W), cfg.crop by default; beside: name -> function(i) that reads a further array (H, W[, 3])
    of image i, to get the same geometry. A sample: image (H, W, 3), label (H, W) if the images are labelled, what is
    beside, all uint8, and draws (DRAWS,), float32 in [0, 1).
    """

    def __init__(self, cfg, stage, domain, images, batch, steps, crop=None, **beside):
        self.images, self.crop, self.beside, self.steps = images, crop or cfg.crop, beside, steps
        self.sizes = np.repeat(cfg[domain].sizes, batch, axis=0)
        self.min_scale, self.max_class_share = cfg.min_scale, cfg.max_class_share
        self.seed = (cfg.seed, zlib.crc32(f"{stage} {domain}".encode()))
        self.epoch, self.order = None, None

    @property
    def batch_size(self):
        return len(self.sizes)

    def __len__(self):
        return self.steps * self.batch_size

    def _index(self, n):
        epoch, place = divmod(n, len(self.images))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([*self.seed, 0, epoch]).permutation(len(self.images))
        return int(self.order[place])

    def __getitem__(self, n):
        rng = np.random.default_rng([*self.seed, 1, n])
        i = self._index(n)
        image = self.images.image(i)
        values = self.images.label_values(i, image) if self.images.labelled else None
        beside = {name: read(i) for name, read in self.beside.items()}
        for name, array in beside.items():
            same_size(f"{name} for {self.images.names[i]}", array, self.images.folder / self.images.names[i], image)

        size = self.sizes[n % self.batch_size]
        scaled = np.maximum(size * rng.uniform(self.min_scale, 1, 2), self.crop)
        extent = np.maximum(np.rint(self.crop * np.array(image.shape[:2]) / scaled), 1).astype(int)
        for _ in range(6):
            top, left = rng.integers(0, np.array(image.shape[:2]) - extent + 1)
            window = (slice(top, top + extent[0]), slice(left, left + extent[1]))
            if values is None:
                break
            label = self.images.to_classes(resize(values[window], self.crop, labels=True), i)
            if np.bincount(label.ravel()).max() <= self.max_class_share * label.size:
                break
        sample = {"image": resize(image[window], self.crop)}
        if values is not None:
            sample["label"] = label
        for name, array in beside.items():
            sample[name] = resize(array[window], self.crop, labels=array.ndim == 2)
        if rng.random() < 0.5:
            sample = {name: np.ascontiguousarray(array[:, ::-1]) for name, array in sample.items()}
        return sample | {"draws": rng.random(DRAWS, dtype=np.float32)}


class Whole(Dataset):
    """Whole images, in order, scaled to as many pixels as `size` (H, W) has, in their own proportions, or not, where it is None.

    A sample: index; image (H, W, 3); shape, the (H, W) of the file; label at the file's size where labelled.
    """

    def __init__(self, images, size=None):
        self.images, self.size = images, size

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images.image(i)
        size = image.shape[:2]
        if self.size is not None:
            factor = (self.size[0] * self.size[1] / (size[0] * size[1])) ** 0.5
            size = [max(round(side * factor), 8) for side in size]
        sample = {"index": i, "shape": image.shape[:2], "image": resize(image, size)}
        if self.images.labelled:
            sample["label"] = self.images.to_classes(self.images.label_values(i, image), i)
        return sample


class Aligned:
    """Files that belong to images by their names: calling it with i reads the one for names[i].

    remedy: what to do where one is missing. Raises UserError.
    """

    def __init__(self, folder, names, read, remedy):
        there = {_stem(name): Path(folder) / name for name in list_images(folder)}
        missing = next((name for name in names if _stem(name) not in there), None)
        if missing is not None:
            raise UserError(f"{Path(folder) / missing}: is missing; {remedy}")
        self.paths, self.read = [there[_stem(name)] for name in names], read

    def __call__(self, i):
        return self.read(self.paths[i])


def loader(run, dataset, first=0, batch_size=None):
    """A DataLoader over samples `first` ... of `dataset`, in order, read by cfg.workers processes.

    Of N processes, each takes every N-th batch: nothing is left out, nothing repeated.
    """
    samples = np.arange(first, len(dataset))
    return DataLoader(
        dataset,
        batch_size,
        sampler=samples[(samples - first) // (batch_size or 1) % world() == rank()].tolist(),
        num_workers=run.cfg.workers,
        pin_memory=run.device.type == "cuda",
        worker_init_fn=_set_up_worker,
    )


def _set_up_worker(_):
    cv2.setNumThreads(1)
    forget_locks()
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group, for the training itself to answer
        signal.signal(number, signal.SIG_IGN)


def translated_images(cfg, source):
    """The reader of G(x_s): translation.images where given, or what translate_cyclegan.py wrote."""
    folder = cfg.translation.images or Path(cfg.output) / cfg.name / "translated"
    return Aligned(folder, source.names, read_image, "run translate_cyclegan.py first, or set translation.images")


class RecalibrationImages:
    """Batches of crops of the domains in cfg.bn_recalibrate, mixed alike in each; cfg.bn_images of each domain in all.

    Iterating yields images (B, 3, H, W) in [0, 1] on the run's device; of N processes, each has every N-th of the batches.
    """

    def __init__(self, run, batch):
        cfg, steps = run.cfg, max(run.cfg.bn_images // sum(batch), 1)
        crops = {d: Crops(cfg, "recalibrate", d, Images(cfg, d, False), batch, steps) for d in cfg.bn_recalibrate}
        self.run, self.batches = run, loader(run, StackDataset(**crops), batch_size=sum(batch)) if crops else []
        self.count = steps if crops else 0

    def __len__(self):
        return self.count

    def __iter__(self):
        for batch in self.batches:
            yield torch.cat([part["image"] for part in self.run.fetch(batch).values()])


# ---------------------------------------------------------------- the command


def main():
    parser = arguments(__doc__)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--check", action="store_true", help="read every file; show what is there")
    task.add_argument(
        "--init", nargs=2, metavar="FOLDER", help="write a configuration for a labelled and another folder"
    )
    parser.add_argument("--out", default="my.yaml", metavar="FILE", help="what --init writes (default: %(default)s)")
    args = parser.parse_intermixed_args()
    from own_data import check, write_config  # which need this file

    if args.init:
        write_config(*map(Path, args.init), Path(args.out))
        return
    cfg = load_config(args.cfg, args.overrides)
    labelled = {"source": True, "target": cfg.selftrain.diagnose or cfg.warmup.labels_from == "target"}
    labelled |= {"val": True} if cfg.val.root else {}
    for domain in (*labelled, *(f"more_val.{name}" for name in cfg.more_val)):
        check(cfg, domain, Images(cfg, domain, labelled.get(domain, True)))


if __name__ == "__main__":
    command(main)
