"""Stage 2: threshold-free self-training on bilateral-consensus pseudo-labels, in rounds.

Leaves runs/NAME/selftrain.pth:  python selftrain.py --cfg config.yaml --init warmup.pth
"""

from engine.command import arguments, command  # isort: skip  (first: it answers Ctrl-C)
import itertools
import math

import torch
from torch.utils.data import StackDataset

from augment import FOR_STRONG, class_mix, cross_domain_mix, mix, strong_view
from datasets import Crops, Images, RecalibrationImages, Whole, loader, translated_images
from engine.files import find
from engine.folders import Aligned
from engine.images import image_writer, read_label
from engine.loop import part_size
from engine.processes import all_gather_rows, in_batch_order
from engine.run import Run
from losses import (
    Centroids,
    bilateral_consensus,
    confident_share,
    ohem_loss,
    probability_labels,
    supervised_loss,
    symmetric_distillation,
)
from metrics import predictions, validate
from models import (
    build_optimizer,
    ema_update,
    load_segmenter,
    make_teacher,
    recalibrate_batchnorm,
    require_sizes,
    set_learning_rate,
)
from settings import classes, load_config

SCALES = (1.0, 0.5)  # of the probability labels; centroids of target images are taken at the last


def main():
    parser = arguments(__doc__)
    init = {"default": "warmup.pth", "metavar": "FILE"}
    parser.add_argument("--init", **init, help="network to start from (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace earlier results")
    args = parser.parse_intermixed_args()
    cfg = load_config(args.cfg, args.overrides)
    init = find(args.init, cfg)
    for number in range(1, cfg.selftrain.rounds + 1):
        last = number == cfg.selftrain.rounds
        run = Run(cfg, "selftrain" if last else f"selftrain_round{number}", "selftrain")
        inputs = [init, *[run.folder / "translator.pth"] * cfg.selftrain.crdomix]
        if not run.is_finished(args.force, inputs):
            train(run, init, run.folder / "pseudo_labels" / f"round{number}")
        init = run.result


def train(run, init, folder):
    """Run one round from the network in the file `init`; probability labels go to `folder`."""
    cfg, options, total = run.cfg, run.cfg.selftrain, run.cfg.selftrain.steps

    # data
    source = Images(cfg, "source", labelled=True)
    target = Images(cfg, "target", labelled=False)
    beside = {"translated": translated_images(cfg, source)} if options.crdomix else {}
    size = part_size(cfg, "selftrain")
    source_crops = Crops(
        cfg, run.stage, "source", source, options.batch, total, rare=cfg.rare_classes, **beside
    )
    recalibration = RecalibrationImages(run, options.batch)
    val = Images(cfg, "val", labelled=True) if cfg.val_every else None
    stored = options.labels != "online"  # else the moving teacher's own take their place
    beside_target = {}
    if options.diagnose:
        beside_target["truth"] = Images(cfg, "target", labelled=True).label

    # student, teacher, optimizer, centroids
    student = run.place(require_sizes(load_segmenter(init, cfg)[0], cfg, 3 * size))
    teacher = make_teacher(student)
    optimizer = build_optimizer(student, **cfg.optimizer)
    centroids = Centroids(len(classes(cfg)), student.channels, options.momentum).to(run.device)
    state = {"student": student, "teacher": teacher, "optimizer": optimizer, "scaler": run.scaler}
    state["centroids"] = centroids
    first = run.resume(state)

    # probability labels and first centroids, fixed before the round's training begins
    run.describe()
    if first is None:
        first = 0
        class_means = ()
        if stored or options.centroids == "target":
            class_means = label_target(run, student, target, centroids, folder)
        if options.centroids == "crdomix":
            of_source = class_means_of_source(run, student, source, beside, centroids)
            class_means = itertools.chain(class_means, of_source)
        for means, found in in_batch_order(class_means):
            centroids.accumulate(means.to(run.device), found)
        student.train()
        run.save_unfinished(first, state)
    if stored:
        remedy = "give --force to make pseudo-labels anew"
        beside_target["pseudo"] = Aligned(folder, target.names, read_label, remedy)
    target_crops = Crops(cfg, run.stage, "target", target, options.batch, total, **beside_target)

    # training
    network, teacher_network = run.parallel(student), run.compiled(teacher)
    supervised = {"ce": supervised_loss, "ohem": ohem_loss}[cfg.supervised]
    crops = StackDataset(source=source_crops, target=target_crops)
    crops = loader(run, crops, first * source_crops.batch_size, size)
    for step, parts in run.steps(crops, first, total, state):
        set_learning_rate(optimizer, step, total, **cfg.optimizer)
        ema_update(teacher, student, step, cfg.ema_limit)
        target_means, source_means = [], []
        for batch in parts:
            of_source, of_target = batch["source"], batch["target"]
            x_s, y_s, draws = of_source["image"], of_source["label"], of_source["draws"]
            x_t, target_draws = of_target["image"], of_target["draws"]
            translated, label_size = of_source.get("translated"), y_s.shape[-2:]
            x_cdm = cross_domain_mix(x_s, y_s, translated, draws, options.strong)

            with torch.no_grad(), run.autocast():
                teacher_logits, features, _ = teacher_network(torch.cat([x_s, x_cdm, x_t]))
            y_f = centroids.assign(features[2 * size :], label_size)
            if stored:
                y_p, weights = of_target["pseudo"], None
            else:
                y_p = probability_labels([teacher_logits[2 * size :]], label_size)
                share = confident_share(teacher_logits[2 * size :], label_size)
                weights = share[:, None, None].expand(y_p.shape)
                run.log(confident=weights.mean())
            single = {"probability": y_p, "feature": y_f}
            y_t = single.get(options.labels, bilateral_consensus(y_p, y_f))
            if options.class_mixing:
                both = draws, target_draws
                x_mix, y_mix, mask = class_mix(x_s, y_s, x_t, y_t, both, options.strong)
                if not stored:
                    weights = mix(mask, torch.ones_like(weights), weights)
            else:
                x_mix, y_mix = strong_view(x_t, target_draws[:, FOR_STRONG], options.strong), y_t

            with run.autocast():
                logits, _, auxiliary = network(torch.cat([x_s, x_cdm, x_mix]))
            ce = supervised(logits[:size], y_s)
            ce_mix = supervised(logits[2 * size :], y_mix, weights)
            if cfg.model.auxiliary:
                ce = ce + cfg.model.auxiliary * supervised(auxiliary[:size], y_s)
                of_mix = supervised(auxiliary[2 * size :], y_mix, weights)
                ce_mix = ce_mix + cfg.model.auxiliary * of_mix
            pair, kappa = slice(2 * size), options.strong_to_weak
            kd = symmetric_distillation(logits[pair], teacher_logits[pair], kappa, label_size)
            loss = ce + ce_mix + options.distill * kd

            run.scaler.scale(loss / cfg.accumulate).backward()
            for part, y, found in (
                (slice(2 * size, None), y_t, target_means),
                (slice(size, 2 * size), y_s, source_means),
            ):
                means = centroids.class_means(features[part], teacher_logits[part], y, padded=True)
                found.append(means)

            run.log(loss=loss, ce=ce, ce_mix=ce_mix, kd=kd, kept=(y_t != 255).float().mean())
            run.log(lr=optimizer.param_groups[0]["lr"])
            if options.diagnose:
                diagnose(run, y_p, y_t, of_target["truth"])

        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad()
        for means, found in target_means + source_means:
            centroids.move(all_gather_rows(means), all_gather_rows(found))
        if run.shows:
            pictures = {"target_image": x_t, "probability_labels": y_p, "feature_labels": y_f}
            pictures |= {"pseudo_labels": y_t, "mixed_image": x_mix, "mixed_labels": y_mix}
            run.show(classes(cfg), **pictures, truth=of_target.get("truth"))
        if cfg.val_every and (step + 1) % cfg.val_every == 0:
            validate(run, step + 1, val, recalibration, student, teacher)

    with run.autocast():
        recalibrate_batchnorm(student, recalibration)
        recalibrate_batchnorm(teacher, recalibration)
    run.finish(total, {"student": student, "teacher": teacher})


def label_target(run, model, target, centroids, folder):
    """Write y^p of every target image as an 8-bit PNG of the image's size.

    Yields the class means of each image where cfg.selftrain.centroids is "target".
    """
    whole = Whole(target, run.cfg.target.sizes[-1])
    with image_writer() as write_image:
        for sample, labels, outputs in predictions(run, model, whole, SCALES):
            name = target.names[sample["index"]].rpartition(".")[0] + ".png"
            write_image(folder / name, labels.byte().cpu().numpy())
            if run.cfg.selftrain.centroids == "target":
                logits, features, _ = outputs[-1]
                yield centroids.class_means(features, logits)


@torch.no_grad()
def class_means_of_source(run, model, source, beside, centroids):
    """Yield the class means of x_cdm, a batch at a time, on one crop of every source image."""
    cfg, options, model = run.cfg, run.cfg.selftrain, model.eval()
    steps = math.ceil(len(source) / sum(options.batch))
    stage = f"{run.stage} centroids"
    crops = Crops(cfg, stage, "source", source, options.batch, steps, **beside)
    for batch in map(run.fetch, loader(run, crops, 0, crops.batch_size)):
        x_s, y_s, translated = batch["image"], batch["label"], batch.get("translated")
        x_cdm = cross_domain_mix(x_s, y_s, translated, batch["draws"], options.strong)
        with run.autocast():
            logits, features, _ = model(x_cdm)
        yield centroids.class_means(features, logits, y_s)


def diagnose(run, y_p, y_t, truth):
    """Log the precision of y_t and the accuracy of y^p; all (B, H, W), truth 255 where unknown."""
    known = truth != 255
    precision = (known & (y_t == truth)).sum(), (known & (y_t != 255)).sum()
    run.log(precision=precision, probability_accuracy=((known & (y_p == truth)).sum(), known.sum()))


if __name__ == "__main__":
    command(main)
