"""Stage 1: distillation warm-up with cross-domain mixing. Leaves runs/NAME/warmup.pth.

python warmup.py --cfg config.yaml
"""

import torch
from torch.utils.data import StackDataset

import models
from augment import cross_domain_mix
from datasets import Crops, Images, loader, recalibration_crops, translated_images
from engine.command import arguments, command
from engine.files import find
from engine.loop import Run, micro_batch_size
from layouts import classes
from losses import ohem_loss, supervised_loss, symmetric_distillation
from metrics import finish, judge_translation
from settings import load_config


def main():
    parser = arguments(__doc__)
    parser.add_argument("--init", metavar="FILE", help="go on from this network, of any stage")
    parser.add_argument("--force", action="store_true", help="replace an earlier result")
    args = parser.parse_intermixed_args()
    cfg = load_config(args.cfg, args.overrides)
    run, init = Run(cfg, "warmup", "warmup"), args.init and find(args.init, cfg)
    source = Images(cfg, "source", labelled=True)
    inputs = [source]
    if "target" in cfg.bn_recalibrate:
        inputs.append(Images(cfg, "target", labelled=False))
    if cfg.warmup.crdomix:
        inputs.append(run.folder / "translator.pth")
    if init:
        inputs.append(init)
    if not run.is_finished(args.force, inputs):
        train(run, init, source.check())


def train(run, init, source):
    """Train from the network in the file `init`, or from model.weights (None)."""
    cfg = run.cfg
    options = cfg.warmup
    total = options.steps
    n = micro_batch_size(cfg, "warmup")
    names = classes(cfg)

    # data
    aligned = {"translated": translated_images(cfg, source)} if options.crdomix else {}
    if aligned:
        judge_translation(run, source, **aligned)
    batch = options.batch
    rare = cfg.rare_classes
    source_crops = Crops(cfg, run.stage, "source", source, batch, total, rare=rare, aligned=aligned)
    recalibration = recalibration_crops(cfg, batch, cfg.bn_recalibrate, source=source)

    # student, teacher, optimizer
    if init:
        student = models.load_segmenter(init, cfg, same_model=True)[0]
    else:
        student = models.build_segmenter(num_classes=len(names), **cfg.model)
    student = run.place(student)
    teacher = models.make_teacher(student)
    optimizer = models.build_optimizer(student, cfg.optimizer)
    run.resume(student=student, teacher=teacher, optimizer=optimizer)

    # training
    network = run.parallel(student)
    supervised = {"ce": supervised_loss, "ohem": ohem_loss}[cfg.supervised]
    crops = StackDataset(source=source_crops)
    batches = loader(run, crops, run.first * source_crops.batch_size, n)
    for step, parts in run.steps(batches, total):
        models.set_learning_rate(optimizer, step, total, cfg.optimizer)
        models.ema_update(teacher, student, step, cfg.ema_limit)
        for batch in parts:
            # views: x_s is the weak one, x_cdm the strong one
            x_s, y_s, draws = map(batch["source"].get, ("image", "label", "draws"))
            translated = batch["source"].get("translated")
            x_cdm = cross_domain_mix(x_s, y_s, translated, draws, options.strong)
            size = y_s.shape[-2:]

            # the teacher comes first, while the student's activations do not take memory yet
            with torch.no_grad(), run.autocast():
                logits, _, _ = teacher(torch.cat([x_s, x_cdm]))
            t_s, t_cdm = logits.split(n)

            # losses: labels are for the weak view, both views learn from the teacher
            with run.autocast():
                logits, _, auxiliary = network(torch.cat([x_s, x_cdm]))
            z_s, z_cdm = logits.split(n)
            ce = supervised(z_s, y_s)
            if auxiliary is not None:
                ce = ce + cfg.model.auxiliary * supervised(auxiliary[:n], y_s)
            kappa = options.strong_to_weak
            kd = symmetric_distillation((z_s, z_cdm), (t_s, t_cdm), kappa, size)
            loss = ce + options.distill * kd
            run.backward(loss)
            run.log(loss=loss, ce=ce, kd=kd)

        run.update(optimizer)
        if run.shows:
            pictures = {"source_image": x_s, "translated": translated, "strong_view": x_cdm}
            pictures |= {"source_labels": y_s, "prediction": z_s.argmax(1)}
            run.show(names, **pictures)

    finish(run, recalibration, student=student, teacher=teacher)


if __name__ == "__main__":
    command(main)
