"""Stage 1: distillation warm-up with cross-domain mixing. Leaves runs/NAME/warmup.pth.

python warmup.py --cfg config.yaml
python warmup.py --as source_only warmup.distill=0 warmup.crdomix=false bn_recalibrate=[source]
"""

from engine.command import arguments, command  # isort: skip  (first: it answers Ctrl-C)
import torch

from augment import cross_domain_mix
from datasets import Crops, Images, RecalibrationImages, loader, translated_images
from engine.config import UserError, one_line, pattern
from engine.loop import part_size
from engine.run import Run
from losses import ohem_loss, supervised_loss, symmetric_distillation
from metrics import validate
from models import (
    build_optimizer,
    build_segmenter,
    ema_update,
    make_teacher,
    recalibrate_batchnorm,
    require_sizes,
    set_learning_rate,
)
from settings import classes, load_config

# what other stages write: translator.pth, selftrain_round1.pth, entries of results.json
OTHERS = r"(translator|evaluate|selftrain(_round\d+)?|.*[._](unfinished|best_on_val|on_.*))$"
RESULT = pattern("a name that no other stage has", rf"(?!{OTHERS})[\w.-]*\w")


def main():
    parser = arguments(__doc__)
    name = {"dest": "stage", "default": "warmup", "metavar": "NAME"}
    parser.add_argument("--as", **name, help="name of the result (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace an earlier result")
    args = parser.parse_intermixed_args()
    if not RESULT[1](args.stage):
        raise UserError(f"--as {one_line(args.stage)} must be {RESULT[0]}")
    cfg = load_config(args.cfg, args.overrides)
    run = Run(cfg, args.stage, "warmup")
    if not run.is_finished(args.force, [run.folder / "translator.pth"] * cfg.warmup.crdomix):
        train(run)


def train(run):
    cfg, options, total = run.cfg, run.cfg.warmup, run.cfg.warmup.steps

    # data
    source = Images(cfg, options.labels_from, labelled=True)
    beside = {"translated": translated_images(cfg, source)} if options.crdomix else {}
    size = part_size(cfg, "warmup")
    domain = options.labels_from
    source_crops = Crops(
        cfg, run.stage, domain, source, options.batch, total, rare=cfg.rare_classes, **beside
    )
    recalibration = RecalibrationImages(run, options.batch)
    val = Images(cfg, "val", labelled=True) if cfg.val_every else None

    # student, teacher, optimizer
    student = build_segmenter(num_classes=len(classes(cfg)), **cfg.model)
    student = run.place(require_sizes(student, cfg, size * (2 if options.distill else 1)))
    teacher = make_teacher(student)
    optimizer = build_optimizer(student, **cfg.optimizer)
    state = {"student": student, "teacher": teacher, "optimizer": optimizer, "scaler": run.scaler}
    first = run.resume(state) or 0

    # training
    if run.stage == "warmup":
        run.describe()
    network, teacher_network = run.parallel(student), run.compiled(teacher)
    supervised = {"ce": supervised_loss, "ohem": ohem_loss}[cfg.supervised]
    crops = loader(run, source_crops, first * source_crops.batch_size, size)
    for step, parts in run.steps(crops, first, total, state):
        set_learning_rate(optimizer, step, total, **cfg.optimizer)
        ema_update(teacher, student, step, cfg.ema_limit)
        for batch in parts:
            x_s, y_s, draws = batch["image"], batch["label"], batch["draws"]
            views = x_s
            if options.distill:
                translated = batch.get("translated")
                x_cdm = cross_domain_mix(x_s, y_s, translated, draws, options.strong)
                views = torch.cat([x_s, x_cdm])
                # the teacher comes first, while the student's activations do not take memory yet
                with torch.no_grad(), run.autocast():
                    teacher_logits, _, _ = teacher_network(views)

            with run.autocast():
                logits, _, auxiliary = network(views)
            loss = ce = supervised(logits[:size], y_s)
            if cfg.model.auxiliary:
                loss = ce = ce + cfg.model.auxiliary * supervised(auxiliary[:size], y_s)
            if options.distill:
                kappa, label_size = options.strong_to_weak, y_s.shape[-2:]
                kd = symmetric_distillation(logits, teacher_logits, kappa, label_size)
                loss = ce + options.distill * kd
                run.log(kd=kd)

            run.scaler.scale(loss / cfg.accumulate).backward()
            run.log(loss=loss, ce=ce, lr=optimizer.param_groups[0]["lr"])

        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad()
        if run.shows:
            strong = views[size:] if options.distill else None
            pictures = {"source_image": x_s, "translated": batch.get("translated")}
            pictures |= {"source_labels": y_s, "strong_view": strong}
            run.show(classes(cfg), **pictures, prediction=logits.argmax(1))
        if cfg.val_every and (step + 1) % cfg.val_every == 0:
            validate(run, step + 1, val, recalibration, student, teacher)

    with run.autocast():
        recalibrate_batchnorm(student, recalibration)
        recalibrate_batchnorm(teacher, recalibration)
    run.finish(total, {"student": student, "teacher": teacher})


if __name__ == "__main__":
    command(main)
