"""Score networks on cfg.val, or segment images without labels: a folder, a video, the target.

python evaluate.py --cfg config.yaml                   # every finished stage; which one to use
python evaluate.py --weights runs/NAME/selftrain.pth   # with the checkpoint's configuration
python evaluate.py --weights runs/NAME/selftrain.pth evaluation.scales=[1.0,0.5]
python evaluate.py --weights runs/NAME/selftrain.pth --images FOLDER_OR_VIDEO --out DIR

Scores go to results.json in the run's folder (without --cfg: the checkpoint's), pictures beside it.
"""

import contextlib
import json
import sys
from pathlib import Path

import cv2
import numpy as np

from datasets import Images, Whole
from engine.command import arguments, command
from engine.config import UserError
from engine.files import find, load_tensors, write_text
from engine.folders import EXTENSIONS, Folder, warn
from engine.images import image_writer, paint, resize
from engine.loop import Run
from engine.processes import barrier, rank, world
from layouts import classes, label_values
from losses import confidence
from metrics import ConfusionMatrix, predictions, shared_information
from models import load_segmenter
from settings import load_config, load_saved

UNSURE = 1  # a smaller difference says nothing: the later stage is preferred then
# the table's order, with the other methods of tools.baselines before DiGA's stages
STAGES = ("source_only", "source_strong", "dacs", "daformer", "mic")
STAGES += ("warmup", "selftrain_round1", "selftrain", "oracle")


def main():
    parser = arguments(__doc__, cfg=None)
    add = parser.add_argument
    which = "a checkpoint, or its name in runs/NAME; may be repeated (default: all in runs/NAME)"
    add("--weights", action="append", metavar="FILE", help=which)
    add("--images", metavar="PATH", help="segment this folder of images, or this video, instead")
    add("--out", metavar="DIR", help="where the pictures go (default: the run's folder)")
    add("--ids", action="store_true", help="write label values too, for the Cityscapes server")
    add("--confidence", action="store_true", help="write the class's probability, as 8-bit PNG")
    args = parser.parse_intermixed_args()
    cfg = configuration(args)
    run = Run(cfg, "evaluate", "evaluation")
    stages = {path.stem for path in run.folder.glob("*.pth")} - {"translator"}
    stages = sorted(stage for stage in stages if not stage.endswith(".unfinished"))
    stages.sort(key=[*STAGES, *stages].index)
    if not (args.weights or stages):
        raise UserError(f"{run.folder}: holds no trained network; run warmup.py, or give --weights")
    paths = [find(path, cfg) for path in args.weights or [f"{stage}.pth" for stage in stages]]
    if world() > 1 and Path(args.images or "").is_file():
        raise UserError(f"{args.images}: a video is for one process; leave torchrun out")
    out = Path(args.out) if args.out else run.folder
    if args.images and out.resolve().is_relative_to(Path(args.images).resolve()):
        remedy = "give --out a folder elsewhere"
        raise UserError(f"{out}: the next run would take its pictures for --images; {remedy}")
    datasets = what_to_segment(cfg, args.images)
    for path in paths:
        evaluate(run, path, datasets, out, args)
    barrier()  # for the pictures of all processes
    results = read_results(run.folder / "results.json")
    if any(whole.images.labelled for whole in datasets.values()):
        print(table(results, list(classes(cfg))))
    if not args.images and advice(results):
        print(advice(results))


def configuration(args):
    """Return the configuration of --cfg, else the first checkpoint's, else config.yaml."""
    saved = {} if args.cfg or not args.weights else load_tensors(args.weights[0])
    if "config" not in saved:
        return load_config(args.cfg or "config.yaml", args.overrides)
    folder = Path(args.weights[0]).resolve().parent  # a checkpoint does not say where to write
    place = {"output": str(folder.parent), "name": folder.name}
    return load_saved(saved["config"] | place, args.overrides, args.weights[0])


class Video(Folder):
    """The frames of a video file, `rate` a second; fast where they are read in order."""

    def __init__(self, path):
        self.path = Path(path)
        self.restart()
        self.rate = self.capture.get(cv2.CAP_PROP_FPS) or 25
        expected = int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT))
        found, frame = self.capture.read()
        if not found:
            raise UserError(f"{path}: no folder of images, no image, no video that OpenCV plays")
        self.size = frame.shape[:2]
        self.next = 1
        while self.capture.grab():
            self.next += 1
        if self.next < expected:
            warn(f"{path}: {self.next} of {expected} frames can be read")
        self.names = [f"{self.path.stem}_{i:06d}.png" for i in range(self.next)]
        self.capture = None  # each DataLoader worker opens its own: a forked one hangs

    def restart(self):
        self.capture = cv2.VideoCapture(str(self.path))
        self.next = 0

    def image(self, i):
        """Return frame i, RGB uint8 (H, W, 3)."""
        if i < self.next:
            self.restart()
        while self.next < i:
            self.next += self.capture.grab()
        self.next += 1
        return np.ascontiguousarray(self.capture.read()[1][..., ::-1])


def open_film(path, video):
    """Return an OpenCV writer of an MP4 file for pictures of a video's size, or UserError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    code = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(path), code, video.rate, video.size[::-1])
    if not writer.isOpened():
        raise UserError(f"{path}: cannot be written; check the disk and OpenCV's video support")
    return writer


def what_to_segment(cfg, path=None):
    """Return name -> datasets.Whole: the images in `path`, or val (else target) and more_val."""
    if path:
        is_video = Path(path).is_file() and Path(path).suffix.lower() not in EXTENSIONS
        images = Video(path) if is_video else Folder(path)
        return {"images": Whole(images, cfg.val.size, goes_on=True)}
    first, size = ("val", cfg.val.size) if cfg.val.root else ("target", cfg.target.sizes[-1])
    datasets = {first: Whole(Images(cfg, first, labelled=first == "val").check(), size)}
    for key, spec in cfg.more_val.items():
        datasets[key] = Whole(Images(cfg, f"more_val.{key}", labelled=True).check(), spec.size)
    return datasets


def evaluate(run, path, datasets, out, args):
    """Segment the datasets with the network in `path`: scores to results.json, pictures to out."""
    cfg, first = run.cfg, next(iter(datasets))
    student, _, saved = load_segmenter(path, cfg)
    teacher, *_ = load_segmenter(path, cfg, "teacher")
    for key, whole in datasets.items():
        stage = path.stem if key == first else f"{path.stem}_on_{key}"
        scores = segment(run, student, whole, out, stage, args)
        if whole.images.labelled and teacher is not None:
            scores["teacher_miou"] = segment(run, teacher, whole)["miou"]
        if key == first and not (args.images or args.weights):
            scores["information"] = shared_information(run, run.place(student))
        if scores and rank() == 0:
            scores["dataset"] = key
            scores["split"] = cfg.more_val.get(key, cfg.get(key)).split
            scores["scales"] = cfg.evaluation.scales
            scores["step"] = saved.get("step")
            results = read_results(run.folder / "results.json")
            short = json.loads(json.dumps(scores), parse_float=lambda x: round(float(x), 3))
            results[stage] = short
            order = sorted(results, key=[*STAGES, *results].index)
            text = json.dumps({name: results[name] for name in order}, indent=1)
            write_text(run.folder / "results.json", text + "\n")


def segment(run, model, whole, out=None, stage=None, args=None):
    """Return a model's scores on labelled images, else {}; given `out`, write pictures there."""
    cfg = run.cfg
    how = cfg.evaluation
    names = classes(cfg)
    images = whole.images
    matrix = ConfusionMatrix(len(names), run.device)
    faults = []
    pictured = []
    if out:
        count = len(whole) if args.images or args.ids else how.pictures
        pictured = np.unique(np.linspace(0, len(whole) - 1, count, dtype=int))
    with contextlib.ExitStack() as files:
        write = files.enter_context(image_writer())
        film = None
        if isinstance(images, Video):
            film = open_film(out / f"{images.path.stem}_{stage}.mp4", images)
            files.callback(film.release)
        segmented = predictions(run, run.place(model), whole, how.scales)
        for sample, prediction, outputs in segmented:
            if "fault" in sample:
                print(f"{Path(sys.argv[0]).name}: {sample['fault']}", file=sys.stderr)
                faults.append(sample["fault"])
                continue
            if images.labelled:
                matrix.update(run.fetch(sample["label"]), prediction)
            if sample["index"] not in pictured:
                continue
            prediction = prediction.byte().cpu().numpy()
            picture = Path(images.names[sample["index"]]).with_suffix(".png")
            image = resize(sample["image"].numpy(), sample["shape"])
            painted = paint(prediction, names)
            overlay = cv2.addWeighted(image, 0.5, painted, 0.5, 0)
            write(out / "predictions" / stage / picture, painted)
            write(out / "overlays" / stage / picture, overlay)
            if args.images or args.ids:
                write(out / "ids" / stage / picture, values_of(prediction, cfg))
            if args.confidence:
                share = confidence([logits for logits, *_ in outputs], sample["shape"])[0]
                grey = share.mul(255).round().byte().cpu().numpy()
                write(out / "confidence" / stage / picture, grey)
            if film:
                film.write(overlay[..., ::-1])
    if faults:
        raise UserError(f"{len(faults)} of {len(whole)} images could not be read; see above")
    if not images.labelled:
        print(f"{stage}: pictures of {len(pictured)} images are in {out}")
        return {}
    return matrix.scores(names, how.subsets)


def advice(results, title=str):
    """Return a line that says which network to use without labels, or "" where one has a score."""
    best, found = judged(results)
    if best is None:
        return ""
    figures = ", ".join(f"{title(stage)} {x:.1f}" for stage, x in found.items())
    harm = " Adaptation may have harmed." if best.startswith("source") else ""
    use = f"Without labels, {title(best)} is the one to use.{harm}"
    return f"{use} Shared by two scales, in percent: {figures}"


def judged(results):
    """Return (the stage to use or None, stage -> shared information), judged without labels."""
    found = {stage: entry.get("information") for stage, entry in results.items()}
    found = {stage: x for stage, x in found.items() if x is not None and stage != "oracle"}
    if len(found) < 2 or any(results[stage].get("miou") is not None for stage in found):
        return None, found
    return [stage for stage, x in found.items() if x >= max(found.values()) - UNSURE][-1], found


def read_results(path):
    """Return what results.json holds: stage -> scores. Raises UserError where it is damaged."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        fault = f"is damaged, remove it and evaluate again ({error})"
        raise UserError(f"{path}: {fault}") from error


def values_of(prediction, cfg):
    """Return a prediction (H, W) uint8 as label values, or colours, of cfg.val, else cfg.source."""
    meanings = label_values((cfg.val if cfg.val.root else cfg.source).ids, classes(cfg))
    has_colours = any(isinstance(value, tuple) for value in meanings)
    lookup = np.zeros((256, 3) if has_colours else 256, np.uint16)
    for value, k in sorted(meanings.items(), reverse=True):
        lookup[k] = value  # at last a class's smallest value
    return lookup[prediction].astype(np.uint8 if lookup.max() < 256 else np.uint16)


def table(results, names):
    """Return the results as a Markdown table, a row per stage."""
    means = sorted({key for entry in results.values() for key in entry if key.startswith("miou_")})
    keys = ("miou", *means, "pixel_accuracy", "teacher_miou")
    head = ["", "mIoU", *means, "accuracy", "teacher", *names]
    rows = [head, ["---"] * len(head)]
    for stage, entry in results.items():
        iou = entry.get("iou") or {}
        figures = [*map(entry.get, keys), *map(iou.get, names)]
        rows.append([stage, *("-" if x is None else f"{x:.1f}" for x in figures)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    command(main)
