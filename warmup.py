"""Stage 1: distillation warm-up with cross-domain mixing. Leaves runs/NAME/warmup.pth.

python warmup.py --cfg config.yaml
"""

import torch

import models
from augment import cross_domain_mix
from datasets import Crops, Images, loader, recalibration_crops, translated_images
from engine.command import arguments, command
from engine.files import find
from engine.loop import Run, micro_batch_size
from layouts import classes
from losses import ohem_loss, supervised_loss, symmetric_distillation
from metrics import finish
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
    cfg, options, total = run.cfg, run.cfg.warmup, run.cfg.warmup.steps
    n, names = micro_batch_size(cfg, "warmup"), classes(cfg)

    # data
    aligned = {"translated": translated_images(cfg, source)} if options.crdomix else {}
    batch, rare = options.batch, cfg.rare_classes
    crops = Crops(cfg, run.stage, "source", source, batch, total, rare=rare, aligned=aligned)
    recalibration = recalibration_crops(cfg, batch, cfg.bn_recalibrate, source=source)

    # student, teacher, optimizer
    if init:
        student = run.place(models.load_segmenter(init, cfg, same_model=True)[0])
    else:
        student = run.place(models.build_segmenter(num_classes=len(names), **cfg.model))
    teacher = models.make_teacher(student)
    optimizer = models.build_optimizer(student, cfg.optimizer)
    run.resume(student=student, teacher=teacher, optimizer=optimizer)

    # training
    network = run.parallel(student)
    supervised = {"ce": supervised_loss, "ohem": ohem_loss}[cfg.supervised]
    batches = loader(run, crops, run.first * crops.batch_size, n)
    for step, parts in run.steps(batches, total):
        models.set_learning_rate(optimizer, step, total, cfg.optimizer)
        models.ema_update(teacher, student, step, cfg.ema_limit)
        for batch in parts:
            x_s, y_s, draws = batch["image"], batch["label"], batch["draws"]
            size = y_s.shape[-2:]
            # x_s is the weak view, x_cdm the strong one
            x_cdm = cross_domain_mix(x_s, y_s, batch.get("translated"), draws, options.strong)
            views = torch.cat([x_s, x_cdm])

            # the teacher comes first, while the student's activations do not take memory yet
            with run.autocast():
                with torch.no_grad():
                    teacher_logits = teacher(views)[0].split(n)
                logits, _, auxiliary = network(views)
            z_s, z_cdm = logits.split(n)

            # labels are for the weak view alone; both views learn from the teacher
            ce = supervised(z_s, y_s)
            if auxiliary is not None:
                ce = ce + cfg.model.auxiliary * supervised(auxiliary[:n], y_s)
            kappa = options.strong_to_weak
            kd = symmetric_distillation((z_s, z_cdm), teacher_logits, kappa, size)
            loss = ce + options.distill * kd
            run.backward(loss)
            run.log(loss=loss, ce=ce, kd=kd)

        run.update(optimizer)
        if run.shows:
            pictures = {"source_image": x_s, "translated": batch.get("translated")}
            pictures |= {"source_labels": y_s, "strong_view": x_cdm}
            run.show(names, **pictures, prediction=logits.argmax(1))

    finish(run, recalibration, student, teacher)


if __name__ == "__main__":
    command(main)
