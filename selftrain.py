"""Stage 2: threshold-free self-training on bilateral-consensus pseudo-labels, in rounds. Leaves runs/NAME/selftrain.pth.

python selftrain.py --cfg config.yaml --init warmup.pth
"""

import itertools
import math

import torch
from torch.utils.data import StackDataset

from augment import class_mix, cross_domain_mix, strong_view
from config import classes, load_config
from datasets import Aligned, Crops, Images, RecalibrationImages, Whole, loader, translated_images
from engine import Run, arguments, command
from files import find
from images import image_writer, read_label
from losses import Centroids, bilateral_consensus, ohem_loss, supervised_loss, symmetric_distillation
from metrics import predictions, validate
from models import build_optimizer, ema_update, load_segmenter, make_teacher, recalibrate_batchnorm, set_learning_rate
from processes import gathered, in_order

SCALES = (1.0, 0.5)  # of the probability labels; centroids from target images are taken at the last


def main():
    parser = arguments(__doc__)
    parser.add_argument("--init", default="warmup.pth", metavar="FILE", help="what round 1 starts from (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace earlier results")
    args = parser.parse_intermixed_args()
    cfg = load_config(args.cfg, args.overrides)
    init = find(args.init, cfg)
    for number in range(1, cfg.selftrain.rounds + 1):
        stage = "selftrain" if number == cfg.selftrain.rounds else f"selftrain_round{number}"
        run = Run(cfg, stage, "selftrain")
        if not run.is_finished(args.force, [init, *[run.folder / "translator.pth"] * cfg.selftrain.crdomix]):
            train(run, init, run.folder / "pseudo_labels" / f"round{number}")
        init = run.result


def train(run, init, folder):
    """One round, from the network in the file `init`; `folder`: of its probability labels."""
    cfg, options, total = run.cfg, run.cfg.selftrain, run.cfg.selftrain.steps

    # data
    source = Images(cfg, "source", labelled=True)
    target = Images(cfg, "target", labelled=False)
    beside = {"translated": translated_images(cfg, source)} if options.crdomix else {}
    size = run.part_size()
    source_crops = Crops(cfg, run.stage, "source", source, options.batch, total, **beside)
    recalibration = RecalibrationImages(run, options.batch)
    val = Images(cfg, "val", labelled=True) if cfg.val_every else None
    truth = {"truth": Images(cfg, "target", labelled=True).label} if options.diagnose else {}

    # student, teacher, optimizer, centroids
    student = run.place(load_segmenter(init, cfg)[0])
    teacher = make_teacher(student)
    optimizer = build_optimizer(student, **cfg.optimizer)
    centroids = Centroids(len(classes(cfg)), student.channels, options.momentum).to(run.device)
    state = {
        "student": student,
        "teacher": teacher,
        "optimizer": optimizer,
        "scaler": run.scaler,
        "centroids": centroids,
    }
    first = run.resume(state)

    # probability labels and first centroids, fixed before the round's training begins
    run.describe()
    if first is None:
        first = 0
        class_means = label_target(run, student, target, centroids, folder)
        if options.centroids == "crdomix":
            class_means = itertools.chain(class_means, class_means_of_source(run, student, source, beside, centroids))
        for means, found in in_order(class_means):
            centroids.accumulate(means.to(run.device), found)
        student.train()
        run.save(run.unfinished, first, state, overall={}, seconds=run.seconds())
    labels = Aligned(folder, target.names, read_label, "give --force to make the pseudo-labels anew")
    target_crops = Crops(cfg, run.stage, "target", target, options.batch, total, pseudo=labels, **truth)

    # training
    network, teacher_network = run.parallel(student), run.compiled(teacher)
    crops = StackDataset(source=source_crops, target=target_crops)
    crops = loader(run, crops, first * source_crops.batch_size, size)
    supervised = {"ce": supervised_loss, "ohem": ohem_loss}[cfg.supervised]
    for step, parts in run.steps(crops, first, total, state):
        set_learning_rate(optimizer, step, total, **cfg.optimizer)
        ema_update(teacher, student, step, cfg.ema_limit)
        target_means, source_means = [], []
        for batch in parts:
            x_s, y_s, draws = batch["source"]["image"], batch["source"]["label"], batch["source"]["draws"]
            x_t, y_p, target_draws = batch["target"]["image"], batch["target"]["pseudo"], batch["target"]["draws"]
            x_cdm = cross_domain_mix(x_s, y_s, batch["source"].get("translated"), draws, options.strong)

            with torch.no_grad(), run.autocast():
                teacher_logits, teacher_features, _ = teacher_network(torch.cat([x_s, x_cdm, x_t]))
            y_f = centroids.assign(teacher_features[2 * size :], y_p.shape[-2:])
            y_t = {"consensus": bilateral_consensus(y_p, y_f), "probability": y_p, "feature": y_f}[options.labels]
            if options.class_mixing:
                x_mix, y_mix = class_mix(x_s, y_s, x_t, y_t, (draws, target_draws), options.strong)
            else:
                x_mix, y_mix = strong_view(x_t, target_draws[:, :8], options.strong), y_t

            with run.autocast():
                logits, _, auxiliary = network(torch.cat([x_s, x_cdm, x_mix]))
            ce = supervised(logits[:size], y_s)
            ce_mix = supervised(logits[2 * size :], y_mix)
            if cfg.model.auxiliary:
                ce = ce + cfg.model.auxiliary * supervised(auxiliary[:size], y_s)
                ce_mix = ce_mix + cfg.model.auxiliary * supervised(auxiliary[2 * size :], y_mix)
            kd = symmetric_distillation(
                logits[: 2 * size], teacher_logits[: 2 * size], options.strong_to_weak, y_s.shape[-2:]
            )
            loss = ce + ce_mix + options.distill * kd

            run.scaler.scale(loss / cfg.accumulate).backward()
            of_t, of_cdm = slice(2 * size, None), slice(size, 2 * size)
            target_means += [centroids.class_means(teacher_features[of_t], teacher_logits[of_t], y_t, padded=True)]
            source_means += [centroids.class_means(teacher_features[of_cdm], teacher_logits[of_cdm], y_s, padded=True)]

            run.log(loss=loss, ce=ce, ce_mix=ce_mix, kd=kd, kept=(y_t != 255).float().mean())
            run.log(lr=optimizer.param_groups[0]["lr"])
            if options.diagnose:
                known = batch["target"]["truth"] != 255
                run.log(
                    precision=((known & (y_t == batch["target"]["truth"])).sum(), (known & (y_t != 255)).sum()),
                    probability_accuracy=((known & (y_p == batch["target"]["truth"])).sum(), known.sum()),
                )

        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad()
        for means, found in target_means + source_means:
            centroids.move(gathered(means), gathered(found))
        if run.shows:
            run.show(target_image=x_t, probability_labels=y_p, feature_labels=y_f, pseudo_labels=y_t,
                     mixed_image=x_mix, mixed_labels=y_mix, truth=batch["target"].get("truth"))  # fmt: skip
        if cfg.val_every and (step + 1) % cfg.val_every == 0:
            validate(run, step + 1, val, recalibration, student, teacher)

    with run.autocast():
        recalibrate_batchnorm(student, recalibration)
        recalibrate_batchnorm(teacher, recalibration)
    run.finish(total, {"student": student, "teacher": teacher})


def label_target(run, model, target, centroids, folder):
    """Writes y^p for every target image as an 8-bit PNG of the image's size; yields its class means if centroids come from it."""
    with image_writer() as write_image:
        for sample, labels, outputs in predictions(run, model, Whole(target, run.cfg.target.sizes[-1]), SCALES):
            name = target.names[sample["index"]].rpartition(".")[0] + ".png"
            write_image(folder / name, labels.byte().cpu().numpy())
            if run.cfg.selftrain.centroids == "target":
                logits, features, _ = outputs[-1]
                yield centroids.class_means(features, logits)


@torch.no_grad()
def class_means_of_source(run, model, source, beside, centroids):
    """Yields those of x_cdm, the mixed source images, a batch at a time: of one crop of every image."""
    options, model = run.cfg.selftrain, model.eval()
    steps = math.ceil(len(source) / sum(options.batch))
    crops = Crops(run.cfg, f"{run.stage} centroids", "source", source, options.batch, steps, **beside)
    for batch in map(run.fetch, loader(run, crops, 0, crops.batch_size)):
        x_cdm = cross_domain_mix(
            batch["image"], batch["label"], batch.get("translated"), batch["draws"], options.strong
        )
        with run.autocast():
            logits, features, _ = model(x_cdm)
        yield centroids.class_means(features, logits, batch["label"])


if __name__ == "__main__":
    command(main)
