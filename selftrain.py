"""Stage 2: threshold-free self-training on bilateral-consensus pseudo-labels, in rounds.

Leaves runs/NAME/selftrain.pth:  python selftrain.py --cfg config.yaml --init warmup.pth
"""

import itertools
import math

import torch
from torch.utils.data import StackDataset

import models
from augment import class_mix, cross_domain_mix, strong_view
from datasets import Crops, Images, Whole, loader, recalibration_crops, translated_images
from engine.command import arguments, command
from engine.files import find
from engine.folders import Aligned
from engine.images import image_writer, read_label
from engine.loop import Run, micro_batch_size
from engine.processes import all_gather_rows, in_batch_order
from layouts import classes
from losses import (
    Centroids,
    LogitAlignment,
    bilateral_consensus,
    confident_share,
    ohem_loss,
    probability_labels,
    supervised_loss,
    symmetric_distillation,
)
from metrics import finish, predictions
from settings import load_config

SCALES = (1.0, 0.5)  # of the probability labels; centroids of target images are taken at the last


def main():
    parser = arguments(__doc__)
    init = {"default": "warmup.pth", "metavar": "FILE"}
    parser.add_argument("--init", **init, help="network to start from (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace earlier results")
    args = parser.parse_intermixed_args()
    cfg = load_config(args.cfg, args.overrides)
    init = find(args.init, cfg)
    source = Images(cfg, "source", labelled=True)
    target = Images(cfg, "target", labelled=cfg.selftrain.diagnose)
    for number in range(1, cfg.selftrain.rounds + 1):
        is_last = number == cfg.selftrain.rounds
        run = Run(cfg, "selftrain" if is_last else f"selftrain_round{number}", "selftrain")
        inputs = [init, source, target]
        if cfg.selftrain.crdomix:
            inputs.append(run.folder / "translator.pth")
        if not run.is_finished(args.force, inputs):
            folder = run.folder / "pseudo_labels" / f"round{number}"
            train(run, init, folder, source.check(), target.check())
        init = run.result


def train(run, init, folder, source, target):
    """Run one round from the network in the file `init`; probability labels go to `folder`."""
    cfg = run.cfg
    options = cfg.selftrain
    total = options.steps
    n = micro_batch_size(cfg, "selftrain")
    names = classes(cfg)

    # data
    aligned = {"translated": translated_images(cfg, source)} if options.crdomix else {}
    batch = options.batch
    rare = cfg.rare_classes
    source_crops = Crops(cfg, run.stage, "source", source, batch, total, rare=rare, aligned=aligned)
    both = {"source": source, "target": target}
    recalibration = recalibration_crops(cfg, batch, cfg.bn_recalibrate, **both)

    # student, teacher, optimizer, centroids
    student = models.load_segmenter(init, cfg, same_model=True)[0]
    student = run.place(student)
    teacher = models.make_teacher(student)
    optimizer = models.build_optimizer(student, cfg.optimizer)
    centroids = Centroids(len(names), student.channels, options.momentum).to(run.device)
    state = {"student": student, "teacher": teacher, "optimizer": optimizer}
    align = None
    if options.align_logits:
        align = LogitAlignment(len(names), options.align_logits).to(run.device)
        state["align"] = align
    if not run.resume(**state, centroids=centroids):
        begin_round(run, student, centroids, source, target.unlabelled(), aligned, folder)
    target_crops = crops_of_target(run, target, folder)

    # training
    network = run.parallel(student)
    supervised = {"ce": supervised_loss, "ohem": ohem_loss}[cfg.supervised]
    crops = StackDataset(source=source_crops, target=target_crops)
    batches = loader(run, crops, run.first * source_crops.batch_size, n)
    for step, parts in run.steps(batches, total):
        models.set_learning_rate(optimizer, step, total, cfg.optimizer)
        models.ema_update(teacher, student, step, cfg.ema_limit)
        target_means = []
        source_means = []
        for batch in parts:
            # views: x_s and x_t are weak ones, x_cdm the strong one of the source
            x_s, y_s, draws = map(batch["source"].get, ("image", "label", "draws"))
            x_t, stored, target_draws = map(batch["target"].get, ("image", "pseudo", "draws"))
            translated = batch["source"].get("translated")
            x_cdm = cross_domain_mix(x_s, y_s, translated, draws, options.strong)
            size = y_s.shape[-2:]

            # the teacher comes first, while the student's activations do not take memory yet
            with torch.no_grad(), run.autocast():
                logits, features, _ = teacher(torch.cat([x_s, x_cdm, x_t]))
            t_s, t_cdm, t_t = logits.split(n)
            _, f_cdm, f_t = features.split(n)

            # consensus of probability labels and feature labels; stored ones weigh 1, as published
            if stored is None:
                y_p, w_t = probability_labels([t_t], size), confident_share(t_t, size)
                run.log(confident=w_t.mean())
            else:
                y_p, w_t = stored, torch.ones(stored.shape, device=stored.device)
            y_f = centroids.assign(f_t, size)
            single = {"probability": y_p, "feature": y_f}
            y_t = single.get(options.labels, bilateral_consensus(y_p, y_f))

            # half of the source's classes are pasted into the strong target view
            if options.class_mixing:
                pair = (x_s, y_s, draws), (x_t, y_t, w_t, target_draws)
                x_mix, y_mix, w_mix = class_mix(*pair, options.strong)
            else:
                x_mix, y_mix, w_mix = strong_view(x_t, target_draws, options.strong), y_t, w_t

            # losses: labels are for the weak view, both views learn from the teacher
            with run.autocast():
                logits, _, auxiliary = network(torch.cat([x_s, x_cdm, x_mix]))
            z_s, z_cdm, z_mix = logits.split(n)
            a_s, a_mix = (align(z_s, y_s), align(z_mix, y_mix)) if align else (z_s, z_mix)
            ce = supervised(a_s, y_s)
            ce_mix = supervised(a_mix, y_mix, w_mix)
            if auxiliary is not None:
                ce = ce + cfg.model.auxiliary * supervised(auxiliary[:n], y_s)
                of_mix = supervised(auxiliary[2 * n :], y_mix, w_mix)
                ce_mix = ce_mix + cfg.model.auxiliary * of_mix
            kappa = options.strong_to_weak
            kd = symmetric_distillation((z_s, z_cdm), (t_s, t_cdm), kappa, size)
            loss = ce + ce_mix + options.distill * kd
            run.backward(loss)
            run.log(loss=loss, ce=ce, ce_mix=ce_mix, kd=kd, kept=(y_t != 255).float().mean())
            if options.diagnose:
                diagnose(run, y_p, y_t, batch["target"]["truth"])

            target_means.append(centroids.class_means(f_t, t_t, y_t))
            source_means.append(centroids.class_means(f_cdm, t_cdm, y_s))

        run.update(optimizer)
        # centroids move with the target first, then with the source
        for means, found in target_means + source_means:
            centroids.move(all_gather_rows(means), all_gather_rows(found))
        if align:
            # the source's first, and at once: bit for bit the same with any number of processes
            rows = (map(all_gather_rows, part) for part in align.rows[::2] + align.rows[1::2])
            align.move(*map(torch.cat, zip(*rows, strict=True)))
            align.rows.clear()
        if run.shows:
            pictures = {"target_image": x_t, "probability_labels": y_p, "feature_labels": y_f}
            pictures |= {"pseudo_labels": y_t, "mixed_image": x_mix, "mixed_labels": y_mix}
            run.show(names, **pictures, truth=batch["target"].get("truth"))

    finish(run, recalibration, student=student, teacher=teacher)


def begin_round(run, model, centroids, source, target, aligned, folder):
    """Write the probability labels to `folder` and take the first centroids; save both."""
    options = run.cfg.selftrain
    class_means = ()
    if options.labels != "online" or options.centroids == "target":
        class_means = label_target(run, model, target, centroids, folder)
    if options.centroids == "crdomix":
        of_source = class_means_of_source(run, model, source, aligned, centroids)
        class_means = itertools.chain(class_means, of_source)
    for means, found in in_batch_order(class_means):
        centroids.accumulate(means.to(run.device), found)
    model.train()
    run.save_unfinished(0)


def crops_of_target(run, target, folder):
    """Return the target's crops, with the probability labels and the truth where they are read."""
    options = run.cfg.selftrain
    aligned = {"truth": target.label} if options.diagnose else {}
    if options.labels != "online":
        remedy = "give --force to make pseudo-labels anew"
        aligned["pseudo"] = Aligned(folder, target.names, read_label, remedy)
    given = target.unlabelled(), options.batch, options.steps
    return Crops(run.cfg, run.stage, "target", *given, aligned=aligned)


def label_target(run, model, target, centroids, folder):
    """Write y^p of every target image as an 8-bit PNG; yield class means for its centroids."""
    whole = Whole(target, run.cfg.target.sizes[-1])
    with image_writer() as write_image:
        for sample, labels, outputs in predictions(run, model, whole, SCALES):
            name = target.names[sample["index"]].rpartition(".")[0] + ".png"
            write_image(folder / name, labels.byte().cpu().numpy())
            if run.cfg.selftrain.centroids == "target":
                logits, features, _ = outputs[-1]
                yield centroids.class_means(features, logits)


@torch.no_grad()
def class_means_of_source(run, model, source, aligned, centroids):
    """Yield the class means of x_cdm, a batch at a time, on one crop of every source image."""
    options = run.cfg.selftrain
    model.eval()
    steps = math.ceil(len(source) / sum(options.batch))
    given = "source", source, options.batch, steps
    crops = Crops(run.cfg, f"{run.stage} centroids", *given, aligned=aligned)
    for batch in map(run.fetch, loader(run, crops, 0, crops.batch_size)):
        x_s, y_s, draws = map(batch.get, ("image", "label", "draws"))
        x_cdm = cross_domain_mix(x_s, y_s, batch.get("translated"), draws, options.strong)
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
