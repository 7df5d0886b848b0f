"""The methods that DiGA is compared with: same networks, data path, checkpoints and evaluation.

python -m tools.baselines --cfg my.yaml --method dacs
python evaluate.py --cfg my.yaml --weights dacs.pth

source_only: cross-entropy on the source. oracle: the same on the target, with its labels. Both have
the steps and the batch of the warm-up; they frame a result.

source_strong: cross-entropy on strong views of the source. dacs (Tranheden et al., WACV 2021):
labels of a moving teacher on target images, class mixing, weighted by the share of confident
pixels. daformer (Hoyer et al., CVPR 2022): rare-class sampling on top, without the feature distance
to ImageNet. mic (Hoyer et al., CVPR 2023): masked consistency on top. These have the batch of
self-training and the steps of all of DiGA's stages together. Leaves runs/NAME/METHOD.pth.
"""

import math
import sys
from pathlib import Path

import torch
from torch.utils.data import StackDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to be run by its path too

import models
from augment import class_mix, strong_view
from datasets import Crops, Images, loader, recalibration_crops
from engine.command import arguments, command
from engine.loop import Run, micro_batch_size
from layouts import classes
from losses import confident_share, ohem_loss, probability_labels, supervised_loss
from metrics import finish
from settings import load_config

PLAIN = ("source_only", "oracle")  # no strong views, no target
ADAPTING = ("dacs", "daformer", "mic")  # each adds to the one before
TEMPERATURE = 0.1  # of rare-class sampling; DAFormer has 0.01 for the 19 classes of GTA5
MASKED = 0.7  # share of the blocks that are hidden (MIC)
STRONG = 1.0  # beta: the augmented image is not blended with the image


def main():
    parser = arguments(__doc__)
    parser.add_argument("--method", choices=(*PLAIN, "source_strong", *ADAPTING), required=True)
    parser.add_argument("--force", action="store_true", help="replace an earlier result")
    args = parser.parse_intermixed_args()
    cfg = load_config(args.cfg, args.overrides)
    run = Run(cfg, args.method, "warmup" if args.method in PLAIN else "selftrain")
    domain = "target" if args.method == "oracle" else "source"
    labelled, target = Images(cfg, domain, labelled=True), Images(cfg, "target", labelled=False)
    inputs = [labelled, target] if args.method in ADAPTING else [labelled]
    if not run.is_finished(args.force, inputs):
        train(run, args.method, labelled.check(), target)


def train(run, method, labelled, target):
    cfg, options, names = run.cfg, run.cfg[run.section], classes(run.cfg)
    n, batch, total = micro_batch_size(cfg, run.section), options.batch, options.steps
    adapts, domain, domains = method in ADAPTING, labelled.domain, cfg.bn_recalibrate
    rare = TEMPERATURE if method in ADAPTING[1:] else 0
    if method in PLAIN:
        rare, domains = cfg.rare_classes, domains and [domain]
    else:
        total = cfg.warmup.steps + cfg.selftrain.rounds * cfg.selftrain.steps

    # data
    images = {domain: labelled}
    crops = {"labelled": Crops(cfg, run.stage, domain, labelled, batch, total, rare=rare)}
    if adapts:
        images["target"] = target.check()
        crops["target"] = Crops(cfg, run.stage, "target", target, batch, total)
    recalibration = recalibration_crops(cfg, batch, domains, **images)

    # student, teacher, optimizer
    student = run.place(models.build_segmenter(num_classes=len(names), **cfg.model))
    teacher = models.make_teacher(student)
    optimizer = models.build_optimizer(student, cfg.optimizer)
    run.resume(student=student, teacher=teacher, optimizer=optimizer)

    # training
    network = run.parallel(student)
    supervised = {"ce": supervised_loss, "ohem": ohem_loss}[cfg.supervised]
    batches = loader(run, StackDataset(**crops), run.first * sum(batch), n)
    for step, parts in run.steps(batches, total):
        models.set_learning_rate(optimizer, step, total, cfg.optimizer)
        models.ema_update(teacher, student, step, cfg.ema_limit)
        for part in parts:
            x_s, y_s, draws = (part["labelled"][key] for key in ("image", "label", "draws"))
            views = [strong_view(x_s, draws, STRONG) if method == "source_strong" else x_s]
            targets = [(y_s,)]
            if adapts:
                x_t, target_draws = part["target"]["image"], part["target"]["draws"]
                with torch.no_grad(), run.autocast():
                    teacher_logits, _, _ = teacher(x_t)
                y_t = probability_labels([teacher_logits], x_t.shape[-2:])
                w_t = confident_share(teacher_logits, x_t.shape[-2:])
                pair = (x_s, y_s, draws), (x_t, y_t, w_t, target_draws)
                x_mix, y_mix, w_mix = class_mix(*pair, STRONG)
                views.append(x_mix)
                targets.append((y_mix, w_mix))
                run.log(confident=w_t.mean())
            if method == "mic":
                strong = strong_view(x_t, target_draws, STRONG)
                views.append(masked_view(strong, MASKED, student.mean))
                targets.append((y_t, w_t))

            with run.autocast():
                logits, _, auxiliary = network(torch.cat(views))
            losses = [supervised(z, *y) for z, y in zip(logits.split(n), targets, strict=True)]
            if auxiliary is not None:
                losses[0] = losses[0] + cfg.model.auxiliary * supervised(auxiliary[:n], y_s)
            loss = sum(losses)
            run.backward(loss)
            run.log(loss=loss)

        run.update(optimizer)
        if run.shows:
            run.show(names, image=x_s, labels=y_s, prediction=logits.argmax(1))

    finish(run, recalibration, student=student, teacher=teacher)


def masked_view(images, share, colour):
    """Return images (B, 3, H, W) of which each square block is hidden with probability `share`.

    It shows `colour` (3, 1, 1). A block's side is a 16th of the images' shorter side. Blocks are
    drawn by torch, which is seeded for each step.
    """
    (height, width), count = images.shape[-2:], len(images)
    side = max(min(height, width) // 16, 1)
    blocks = count, 1, math.ceil(height / side), math.ceil(width / side)
    shown = torch.rand(blocks, device=images.device) >= share
    shown = shown.repeat_interleave(side, 2).repeat_interleave(side, 3)
    return torch.where(shown[..., :height, :width], images, colour)


if __name__ == "__main__":
    command(main)
