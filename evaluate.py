"""Score networks on cfg.val, or segment images without labels: a folder, a video, the target.

python evaluate.py --cfg config.yaml                   # every finished stage; which one to use
python evaluate.py --weights runs/NAME/selftrain.pth   # with the checkpoint's configuration
python evaluate.py --weights runs/NAME/selftrain.pth evaluation.scales=[1.0,0.5]
python evaluate.py --weights runs/NAME/selftrain.pth --images FOLDER_OR_VIDEO --out DIR

Scores go to results.json in the run's folder (without --cfg: the checkpoint's folder), pictures to
predictions/ and overlays/ beside it, or into DIR.
"""

import json
from pathlib import Path

import cv2
import numpy as np
from torch.utils.data import Subset

from datasets import Images, Whole
from engine.command import arguments, command
from engine.config import UserError
from engine.files import find, load_tensors, write_text
from engine.folders import Folder, Video
from engine.images import image_writer, paint, resize, video_writer
from engine.loop import Run
from engine.processes import barrier, rank, world
from metrics import ConfusionMatrix, agreement, predictions
from models import load_segmenter, require_sizes
from settings import classes, label_values, load_config, load_saved

COMPARED = 50  # images of the target on which networks are compared without labels
UNSURE = 1  # a smaller difference in agreement says nothing: the later stage is preferred then
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
    args = parser.parse_intermixed_args()
    cfg = configuration(args)
    run = Run(cfg, "evaluate", "evaluation")
    stages = {path.stem for path in run.folder.glob("*.pth")} - {"translator"}
    stages = sorted(stage for stage in stages if not stage.endswith(".unfinished"))
    stages.sort(key=[*STAGES, *stages].index)
    if not (args.weights or stages):
        remedy = "run warmup.py first, or give --weights"
        raise UserError(f"{run.folder}: holds no trained network; {remedy}")
    paths = [find(path, cfg) for path in args.weights or [f"{stage}.pth" for stage in stages]]
    if world() > 1 and Path(args.images or "").is_file():
        raise UserError(f"{args.images}: a video is for one process; leave torchrun out")
    datasets = what_to_segment(cfg, args.images)
    out = Path(args.out) if args.out else run.folder
    for path in paths:
        evaluate(run, path, datasets, out, args)
    barrier()  # for the pictures of all processes
    if rank() == 0:
        summarise(run, datasets)


def configuration(args):
    """Return the configuration of --cfg, else the first checkpoint's, else config.yaml."""
    saved = {} if args.cfg or not args.weights else load_tensors(args.weights[0])
    if "config" not in saved:
        return load_config(args.cfg or "config.yaml", args.overrides)
    folder = Path(args.weights[0]).resolve().parent  # a checkpoint does not say where to write
    place = {"output": str(folder.parent), "name": folder.name}
    return load_saved(saved["config"] | place, args.overrides, args.weights[0])


def what_to_segment(cfg, path=None):
    """Return name -> datasets.Whole: the images in `path`, or val (else target) and more_val."""
    if path:
        images = Video(path) if Path(path).is_file() else Folder(path)
        return {"images": Whole(images, cfg.val.size)}
    first, size = ("val", cfg.val.size) if cfg.val.root else ("target", cfg.target.sizes[-1])
    datasets = {first: Whole(Images(cfg, first, labelled=first == "val"), size)}
    for key, spec in cfg.more_val.items():
        datasets[key] = Whole(Images(cfg, f"more_val.{key}", labelled=True), spec.size)
    return datasets


def evaluate(run, path, datasets, out, args):
    """Segment the datasets with the network in `path`: scores to results.json, pictures to out."""
    cfg, first = run.cfg, next(iter(datasets))
    student, saved = load_segmenter(path, cfg)
    require_sizes(student, cfg)
    teacher, _ = load_segmenter(path, cfg, "teacher")
    how = cfg.evaluation.scales, cfg.evaluation.tile
    for key, whole in datasets.items():
        stage = path.stem if key == first else f"{path.stem}_on_{key}"
        if isinstance(whole.images, Video):
            video = whole.images
            file = out / f"{video.path.stem}_{stage}.mp4"
            with video_writer(file, video.rate, video.size) as append:
                for sample, prediction, _ in predictions(run, run.place(student), whole, *how):
                    append(overlay(sample, prediction.byte().cpu().numpy(), classes(cfg)))
            print(f"{file}: {len(video)} frames, {video.rate:g} a second")
            continue
        count = len(whole) if args.images or args.ids else cfg.evaluation.pictures
        pictured = np.unique(np.linspace(0, len(whole) - 1, count, dtype=int))
        ids = args.ids or args.images
        scores = segment(run, student, whole, key, out, stage, pictured, ids)
        if not whole.images.labelled:
            print(f"{path}: pictures of {len(pictured)} images are in {out}")
        elif teacher is not None:
            scores["teacher_miou"] = segment(run, teacher, whole, key)["miou"]
        if key == first and not (args.images or args.weights):
            scores |= without_labels(run, student)
        if not scores:
            continue
        scores["dataset"] = key
        scores["split"] = cfg.more_val.get(key, cfg.get(key)).split
        scores["scales"] = cfg.evaluation.scales
        scores["weights"] = "best_on_val" if path.stem.endswith("_best_on_val") else "last"
        scores["step"] = saved.get("step")
        if rank() == 0:
            file = run.folder / "results.json"
            results = read_results(file)
            text = json.dumps(scores)
            results[stage] = json.loads(text, parse_float=lambda digits: round(float(digits), 3))
            order = sorted(results, key=[*STAGES, *results].index)
            write_text(file, json.dumps({name: results[name] for name in order}, indent=1) + "\n")


def segment(run, model, whole, key, out=None, stage=None, pictured=(), ids=False):
    """Return a model's scores on labelled images, else {}; write those numbered `pictured`."""
    cfg, names, scored = run.cfg, classes(run.cfg), whole.images.labelled
    matrix = ConfusionMatrix(len(names), run.device)
    how = cfg.evaluation.scales, cfg.evaluation.tile
    with image_writer() as write:
        for sample, prediction, _ in predictions(run, run.place(model), whole, *how):
            if scored:
                matrix.update(run.fetch(sample["label"]), prediction)
            if sample["index"] in pictured:
                prediction = prediction.byte().cpu().numpy()
                picture = Path(whole.images.names[sample["index"]]).with_suffix(".png")
                write(out / "predictions" / stage / picture, paint(prediction, names))
                write(out / "overlays" / stage / picture, overlay(sample, prediction, names))
                if ids:
                    write(out / "ids" / stage / picture, values_of(prediction, cfg))
    dataset = key if key == "val" else f"more_val.{key}"
    return matrix.scores(names, cfg.evaluation.subsets, dataset) if scored else {}


def without_labels(run, model):
    """Return a model's agreement on images of the target, {} where these are not there."""
    cfg = run.cfg
    if not Path(cfg.target.root).is_dir():
        return {}
    whole = Whole(Images(cfg, "target", labelled=False), cfg.target.sizes[-1])
    some = np.unique(np.linspace(0, len(whole) - 1, COMPARED, dtype=int)).tolist()
    return {"agreement": agreement(run, run.place(model), Subset(whole, some))}


def advice(results):
    """Return a line that says which network to use, judged without labels; "" for less than two."""
    found = {stage: entry.get("agreement") for stage, entry in results.items() if stage != "oracle"}
    found = {stage: x for stage, x in found.items() if x is not None}
    if len(found) < 2:
        return ""
    best = [stage for stage, x in found.items() if x >= max(found.values()) - UNSURE][-1]
    figures = ", ".join(f"{stage} {x:.1f}" for stage, x in found.items())
    harm = " Adaptation may have harmed." if best in ("source_only", "source_strong") else ""
    return f"Without labels, {best} is the one to use.{harm} Agreement between scales: {figures}"


def read_results(path):
    """Return what results.json holds: stage -> scores. Raises UserError where it is damaged."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        fault = f"is damaged, remove it and evaluate again ({error})"
        raise UserError(f"{path}: {fault}") from error


def values_of(prediction, cfg):
    """Return a prediction (H, W) uint8 as label values of cfg.val, uint8 or uint16."""
    lookup = np.zeros(256, np.uint16)
    for value, k in sorted(label_values(cfg.val.ids, classes(cfg)).items(), reverse=True):
        lookup[k] = value  # at last a class's smallest value
    values = lookup[prediction]
    return values.astype(np.uint8) if values.max() < 256 else values


def overlay(sample, prediction, colours):
    """Return a sample's image, at its file's size, under the prediction (H, W) uint8."""
    image = resize(sample["image"].numpy(), sample["shape"])
    return cv2.addWeighted(image, 0.5, paint(prediction, colours), 0.5, 0)


def table(results, names):
    """Return the results as a Markdown table, a row per stage."""
    means = sorted({key for entry in results.values() for key in entry if key.startswith("miou_")})
    rows = [["", "mIoU", *means, "accuracy", "teacher", *names]]
    for stage, entry in results.items():
        keys = ("miou", *means, "pixel_accuracy", "teacher_miou")
        figures = [*map(entry.get, keys), *map((entry.get("iou") or {}).get, names)]
        rows.append([stage, *("-" if x is None else f"{x:.1f}" for x in figures)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = ([c.ljust(width) for c, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summarise(run, datasets):
    """Print the table of results, and which network to use."""
    results = read_results(run.folder / "results.json")
    if any(whole.images.labelled for whole in datasets.values()):
        print(table(results, list(classes(run.cfg))))
    if "images" not in datasets and advice(results):
        print(advice(results))


if __name__ == "__main__":
    command(main)
