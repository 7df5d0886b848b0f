"""The methods that DiGA is compared with: same networks, data path, checkpoints and evaluation.

python -m tools.baselines --cfg my.yaml --method dacs      # or source, daformer, mic
python evaluate.py --cfg my.yaml --weights dacs.pth

source: cross-entropy on strong views of the source. dacs (Tranheden et al., WACV 2021): labels of a
moving teacher on target images, class mixing, weighted by the share of confident pixels. daformer
(Hoyer et al., CVPR 2022): rare-class sampling on top, without the feature distance to ImageNet. mic
(Hoyer et al., CVPR 2023): masked consistency on top. Steps are those of all of DiGA's stages
together, warmup.steps + selftrain.rounds x selftrain.steps, with the batch of selftrain. Leaves
runs/NAME/METHOD.pth.
"""

import math

import torch
from torch.utils.data import StackDataset

from augment import FOR_STRONG, class_mix, mix, strong_view
from datasets import Crops, Images, RecalibrationImages, loader
from engine.command import arguments, command
from engine.loop import part_size
from engine.run import Run
from losses import confident_share, probability_labels, supervised_loss
from models import (
    build_optimizer,
    build_segmenter,
    ema_update,
    make_teacher,
    recalibrate_batchnorm,
    set_learning_rate,
)
from settings import classes, load_config

METHODS = ("source", "dacs", "daformer", "mic")  # each adds to the one before
TEMPERATURE = 0.1  # of rare-class sampling; DAFormer has 0.01 for the 19 classes of GTA5
MASKED = 0.7  # share of the blocks that are hidden (MIC)
STRONG = 1.0  # beta: the augmented image is not blended with the image


def main():
    parser = arguments(__doc__)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--force", action="store_true", help="replace an earlier result")
    args = parser.parse_intermixed_args()
    run = Run(load_config(args.cfg, args.overrides), args.method, "selftrain")
    if not run.is_finished(args.force):
        train(run, METHODS.index(args.method))


def train(run, level):
    cfg, batch = run.cfg, run.cfg.selftrain.batch
    total = cfg.warmup.steps + cfg.selftrain.rounds * cfg.selftrain.steps

    # data
    source, size = Images(cfg, "source", labelled=True), part_size(cfg, "selftrain")
    rare = TEMPERATURE if level >= 2 else 0
    crops = {"source": Crops(cfg, run.stage, "source", source, batch, total, rare=rare)}
    if level >= 1:
        target = Images(cfg, "target", labelled=False)
        crops["target"] = Crops(cfg, run.stage, "target", target, batch, total)
    recalibration = RecalibrationImages(run, batch)

    # student, teacher, optimizer
    student = run.place(build_segmenter(num_classes=len(classes(cfg)), **cfg.model))
    teacher = make_teacher(student)
    optimizer = build_optimizer(student, **cfg.optimizer)
    state = {"student": student, "teacher": teacher, "optimizer": optimizer, "scaler": run.scaler}
    first = run.resume(state) or 0

    # training
    run.describe()
    network, teacher_network = run.parallel(student), run.compiled(teacher)
    crops = loader(run, StackDataset(**crops), first * sum(batch), size)
    for step, parts in run.steps(crops, first, total, state):
        set_learning_rate(optimizer, step, total, **cfg.optimizer)
        ema_update(teacher, student, step, cfg.ema_limit)
        for part in parts:
            x_s, y_s, draws = (part["source"][key] for key in ("image", "label", "draws"))
            views = [x_s if level else strong_view(x_s, draws[:, FOR_STRONG], STRONG)]
            if level >= 1:
                x_t, target_draws = part["target"]["image"], part["target"]["draws"]
                with torch.no_grad(), run.autocast():
                    teacher_logits, _, _ = teacher_network(x_t)
                y_t = probability_labels([teacher_logits], x_t.shape[-2:])
                weight = confident_share(teacher_logits, x_t.shape[-2:])
                weight = weight[:, None, None].expand(y_t.shape)
                both = draws, target_draws
                x_mix, y_mix, mask = class_mix(x_s, y_s, x_t, y_t, both, STRONG)
                w_mix = mix(mask, torch.ones_like(weight), weight)
                views.append(x_mix)
            if level >= 3:
                strong = strong_view(x_t, target_draws[:, FOR_STRONG], STRONG)
                views.append(masked_view(strong, MASKED, student.mean))

            with run.autocast():
                logits = network(torch.cat(views))[0].split(size)
            loss = supervised_loss(logits[0], y_s)
            if level >= 1:
                loss = loss + supervised_loss(logits[1], y_mix, w_mix)
                run.log(confident=weight.mean())
            if level >= 3:
                loss = loss + supervised_loss(logits[2], y_t, weight)
            run.scaler.scale(loss / cfg.accumulate).backward()
            run.log(loss=loss, lr=optimizer.param_groups[0]["lr"])

        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad()

    with run.autocast():
        recalibrate_batchnorm(student, recalibration)
        recalibrate_batchnorm(teacher, recalibration)
    run.finish(total, {"student": student, "teacher": teacher})


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
