"""Scores networks on cfg.val, or segments images that nobody labelled: a folder's or, without val.root, the target's.

    python evaluate.py --cfg config.yaml                              # every stage of the run that is finished
    python evaluate.py --weights runs/NAME/selftrain.pth              # with the configuration that it was trained with
    python evaluate.py --cfg config.yaml --weights warmup.pth --weights selftrain.pth evaluation.scales=[1.0,0.5]
    python evaluate.py --weights runs/NAME/selftrain.pth --images FOLDER_OR_VIDEO --out DIR
    python evaluate.py --weights runs/NAME/selftrain.pth --export model.onnx

Scores go to results.json in the run's folder, or beside a checkpoint given without --cfg; predictions/, overlays/ and comparison.png beside it, or into DIR.
"""

import json
from pathlib import Path

import cv2
import numpy as np
import torch

from config import UserError, classes, label_values, load_config, load_saved
from datasets import Folder, Images, Video, Whole
from engine import Run, arguments, command
from files import find, load_tensors, write_atomically, write_text
from images import image_writer, paint, read_image, resize, video_writer, write_image
from losses import upsample
from metrics import ConfusionMatrix, predictions
from models import load_segmenter
from processes import rank, wait, world

STAGES = ("source_only", "warmup", "selftrain_round1", "selftrain", "oracle")  # the table's order; others follow


def main():
    parser = arguments(__doc__, cfg=None)
    parser.add_argument(
        "--weights",
        action="append",
        metavar="FILE",
        help="a checkpoint, or its name in runs/NAME; may be given several times (default: all in runs/NAME)",
    )
    parser.add_argument("--images", metavar="PATH", help="segment this folder of images, or this video, instead")
    parser.add_argument("--out", metavar="DIR", help="where the pictures go (default: the run's folder)")
    parser.add_argument(
        "--ids", action="store_true", help="write label values as PNGs too: what the Cityscapes server takes"
    )
    parser.add_argument("--export", metavar="FILE", help="write the network as ONNX instead, with its class names")
    args = parser.parse_intermixed_args()
    saved = {} if args.cfg or not args.weights else load_tensors(args.weights[0])
    if "config" in saved:
        folder = Path(args.weights[0]).resolve().parent  # a checkpoint does not say where to write
        place = {"output": str(folder.parent), "name": folder.name}
        cfg = load_saved(saved["config"] | place, args.overrides, args.weights[0])
    else:
        cfg = load_config(args.cfg or "config.yaml", args.overrides)
    run = Run(cfg, "evaluate", "evaluation")
    paths = [find(path, cfg) for path in args.weights or finished(run.folder)]
    if world() > 1 and (args.export or Path(args.images or "").is_file()):
        raise UserError("--export and videos are the work of one process; leave torchrun out")
    if args.export:
        if len(paths) > 1:
            raise UserError(f"--export {args.export}: one network goes into a file; choose it with --weights")
        export(load_segmenter(paths[0], cfg)[0], cfg, args.export)
        return
    datasets = what_to_segment(cfg, args.images)
    first = next(iter(datasets))
    out = Path(args.out) if args.out else run.folder

    for path in paths:
        student, saved = load_segmenter(path, cfg)
        teacher, _ = load_segmenter(path, cfg, "teacher")
        for key, whole in datasets.items():
            stage = path.stem if key == first else f"{path.stem}_on_{key}"
            if isinstance(whole.images, Video):
                film(run, student, whole, out / f"{whole.images.path.stem}_{stage}.mp4")
                continue
            pictures = len(whole) if args.images or args.ids else cfg.evaluation.pictures
            pictured = np.unique(np.linspace(0, len(whole) - 1, pictures, dtype=int))
            scores = segment(run, student, whole, out, stage, pictured, args.ids or args.images, key)
            if not whole.images.labelled:
                print(f"{path}: pictures of {len(pictured)} images are in {out}")
                continue
            if teacher is not None:
                scores["teacher_miou"] = segment(run, teacher, whole, out, stage)["miou"]
            scores |= {
                "dataset": key,
                "split": cfg.val.split if key == "val" else cfg.more_val[key].split,
                "scales": cfg.evaluation.scales,
                "weights": "best_on_val" if path.stem.endswith("_best_on_val") else "last",
                "step": saved.get("step"),
            }
            if rank() == 0:
                record(run.folder / "results.json", stage, scores)

    wait()  # for the pictures
    if rank() > 0:
        return
    stages = [path.stem for path in paths]
    if any(whole.images.labelled for whole in datasets.values()):
        results = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
        print(table(results, list(classes(cfg))))
        if first == "val":
            stages = [stage for stage, entry in results.items() if entry["dataset"] == "val"]
    if not isinstance(datasets[first].images, Video):
        compare(out, datasets[first], stages, cfg)


def finished(folder):
    """The checkpoints of all stages that left a network in a run's folder, in the table's order."""
    stages = {path.stem for path in folder.glob("*.pth")} - {"translator"}
    stages = sorted(stage for stage in stages if not stage.endswith(".unfinished"))
    stages.sort(key=[*STAGES, *stages].index)
    if not stages:
        raise UserError(f"{folder}: holds no trained network; run warmup.py first, or give --weights")
    return [f"{stage}.pth" for stage in stages]


def what_to_segment(cfg, folder=None):
    """A datasets.Whole by name: a folder's or video's images or, without one, val (the target where val.root is null) and more_val."""
    if folder:
        return {"images": Whole(Video(folder) if Path(folder).is_file() else Folder(folder), cfg.val.size)}
    if cfg.val.root:
        datasets = {"val": Whole(Images(cfg, "val", labelled=True), cfg.val.size)}
    else:
        datasets = {"target": Whole(Images(cfg, "target", labelled=False), cfg.target.sizes[-1])}
    more = {key: Whole(Images(cfg, f"more_val.{key}", labelled=True), spec.size) for key, spec in cfg.more_val.items()}
    return datasets | more


def segment(run, model, whole, out, name, pictured=(), ids=False, dataset="val"):
    """The scores of a model on labelled images, {} on others; writes pictures of the numbers in `pictured`."""
    cfg, matrix = run.cfg, ConfusionMatrix(len(classes(run.cfg)), run.device)
    with image_writer() as write:
        for sample, prediction, _ in predictions(
            run, run.place(model), whole, cfg.evaluation.scales, cfg.evaluation.tile
        ):
            if "label" in sample:
                matrix.update(run.fetch(sample["label"]), prediction)
            if sample["index"] in pictured:
                prediction = prediction.cpu().numpy().astype(np.uint8)
                picture = Path(whole.images.names[sample["index"]]).with_suffix(".png")
                write(out / "predictions" / name / picture, paint(prediction, cfg))
                write(out / "overlays" / name / picture, overlay(sample, prediction, cfg))
                if ids:
                    value = {k: v for v, k in sorted(label_values(cfg.val.ids, classes(cfg)).items(), reverse=True)}
                    lookup = np.array([value.get(k, 0) for k in range(256)], np.uint16)
                    values = lookup[prediction]
                    write(out / "ids" / name / picture, values.astype(np.uint8) if values.max() < 256 else values)
    dataset = dataset if dataset == "val" else f"more_val.{dataset}"
    return matrix.scores(classes(cfg), cfg.evaluation.subsets, dataset) if whole.images.labelled else {}


def overlay(sample, prediction, cfg):
    """The prediction (H, W), uint8, painted over the sample's image, at its file's size."""
    image = resize(sample["image"].numpy(), sample["shape"])
    return cv2.addWeighted(image, 0.5, paint(prediction, cfg), 0.5, 0)


def film(run, model, whole, path):
    """The overlays of a video's frames as a video."""
    cfg, video = run.cfg, whole.images
    with video_writer(path, video.rate, video.size) as append:
        for sample, prediction, _ in predictions(
            run, run.place(model), whole, cfg.evaluation.scales, cfg.evaluation.tile
        ):
            append(overlay(sample, prediction.cpu().numpy().astype(np.uint8), cfg))
    print(f"{path}: {len(video)} frames, {video.rate:g} a second")


def export(model, cfg, path):
    """An ONNX file: image (1, 3, H, W), RGB in [0, 1], of any size -> logits (1, K, H, W); class names and colours as metadata."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--export {path} needs `pip install onnx onnxscript onnxruntime`") from error

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.segmenter = model

        def forward(self, image):
            return upsample(self.segmenter(image)[0], image.shape[-2:])

    size = cfg.val.size or cfg.crop
    sides = dict.fromkeys((2, 3), torch.export.Dim.DYNAMIC)
    network = Network().eval()
    program = torch.onnx.export(network, (torch.zeros(1, 3, *size),), dynamo=True, verbose=False,
        input_names=["image"], output_names=["logits"], dynamic_shapes=[sides])  # fmt: skip
    for key, value in (("classes", list(classes(cfg))), ("colours", list(classes(cfg).values())), ("size", size)):
        program.model.metadata_props[key] = json.dumps(value)
    written = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
    for image in (torch.rand(1, 3, *size), torch.rand(1, 3, *(side * 3 // 4 + 5 for side in size))):
        with torch.no_grad():
            difference = np.abs(session.run(None, {"image": image.numpy()})[0] - network(image).numpy()).max()
        if not difference < 1e-3:
            raise UserError(
                f"--export {path}: at {list(image.shape[2:])}, ONNX's logits are {difference:.2g} off; this network has a layer "
                "that cannot be written for images of any size"
            )
    write_atomically(path, lambda temporary: temporary.write_bytes(written))
    print(f"{path}: image (1, 3, height, width), RGB in [0, 1] -> logits (1, {len(classes(cfg))}, height, width)")


def record(path, stage, entry):
    """Puts a stage's scores into results.json, rounded, beside those of other stages."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results[stage] = json.loads(json.dumps(entry), parse_float=lambda text: round(float(text), 3))
    order = [*STAGES, *results]
    write_text(path, json.dumps(dict(sorted(results.items(), key=lambda item: order.index(item[0]))), indent=1) + "\n")


def table(results, names):
    """The results as a Markdown table, a row per stage."""
    means = sorted({key for entry in results.values() for key in entry if key.startswith("miou_")})
    head = ["", "mIoU", *means, "accuracy", "teacher", *names]
    rows = []
    for stage, entry in results.items():
        figures = [entry.get(key) for key in ("miou", *means, "pixel_accuracy", "teacher_miou")]
        figures += [entry["iou"].get(name) for name in names]
        rows.append([stage, *("-" if x is None else f"{x:.1f}" for x in figures)])
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def gallery(out, whole, stages, cfg, rows=4):
    """Yields, for a few images, [(title, picture), ...]: the image, what each model made of it, its label if there is one."""
    folders = [out / "predictions" / stage for stage in stages]
    names = [Path(name).with_suffix(".png") for name in whole.images.names]
    shown = [i for i, name in enumerate(names) if all((folder / name).exists() for folder in folders)]
    shown = [shown[j] for j in np.linspace(0, len(shown) - 1, min(rows, len(shown)), dtype=int)]
    for i in shown:
        made = [(stage, read_image(folder / names[i])) for stage, folder in zip(stages, folders, strict=True)]
        truth = [("label", paint(whole.images.label(i), cfg))] if whole.images.labelled else []
        yield [("image", whole.images.image(i)), *made, *truth]


def compare(out, whole, stages, cfg):
    """comparison.png: the gallery as one picture."""
    titles, lines, width = [], [], None
    for tiles in gallery(out, whole, stages, cfg):
        titles, pictures = zip(*tiles, strict=True)
        width = width or round(pictures[0].shape[1] * 144 / pictures[0].shape[0])
        lines.append(
            np.hstack(
                [np.pad(resize(x, (144, width)), ((0, 4), (0, 4), (0, 0)), constant_values=255) for x in pictures]
            )
        )
    if lines:
        head = np.full((18, lines[0].shape[1], 3), 255, np.uint8)
        for k, title in enumerate(titles):
            cv2.putText(
                head, title, (k * (width + 4) + 2, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA
            )
        write_image(out / "comparison.png", np.vstack([head, *lines]))


if __name__ == "__main__":
    command(main)
