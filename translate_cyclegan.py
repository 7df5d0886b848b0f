"""Stage 0: source images in the target's style. Leaves runs/NAME/translator.pth and runs/NAME/translated/.

    python translate_cyclegan.py --cfg config.yaml
    python translate_cyclegan.py translation.weights=latest_net_G_A.pth      # writes images with a generator that exists

A CycleGAN (Zhu et al., ICCV 2017) whose generator G: source -> target must also keep the pixels at the borders between
classes, so that the source's labels stay valid for the translated image. Only G is used afterwards.
"""

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import StackDataset, Subset

from config import load_config
from datasets import Aligned, Crops, Images, Whole, loader
from engine import Run, arguments, command, progress
from images import image_writer, read_image
from losses import semantic_edge_loss
from processes import from_first, gathered, rank, world
from translators import Discriminator, Generator, init_gan, load_generator

POOL = 50  # earlier translations that the discriminators see half of the time


def main():
    parser = arguments(__doc__)
    parser.add_argument("--force", action="store_true", help="replace an earlier result")
    args = parser.parse_intermixed_args()
    cfg = load_config(args.cfg, args.overrides)
    run = Run(cfg, "translator", "translation")
    options = cfg.translation
    source = Images(cfg, "source", labelled=options.images is None and options.weights is None)
    if options.images:
        Aligned(options.images, source.names, read_image, "translation.images must hold every source image")
        print(f"translator: {len(source)} translated images are in {options.images}")
        return
    if options.weights:
        generator = load_generator(options.weights)
    else:
        if not run.is_finished(args.force):
            train(run, source)
        generator = load_generator(run.result)
    write(run, run.place(generator), source, options.weights or run.result)


def train(run, source):
    cfg, options, total = run.cfg, run.cfg.translation, run.cfg.translation.steps

    # data
    size = run.part_size()
    crops = StackDataset(
        source=Crops(cfg, run.stage, "source", source, options.batch, total, options.crop),
        target=Crops(cfg, run.stage, "target", Images(cfg, "target", False), options.batch, total, options.crop),
    )

    # generators, discriminators, optimizers
    to_target, to_source = (run.place(Generator(options.filters, options.blocks).apply(init_gan)) for _ in range(2))
    is_target, is_source = (run.place(Discriminator(options.filters).apply(init_gan)) for _ in range(2))
    pool_target, pool_source = (run.place(Pool(options.crop)) for _ in range(2))
    judges = nn.ModuleList([is_target, is_source])
    adam = {
        "lr": options.lr,
        "betas": (0.5, 0.999),
        "fused": run.device.type == "cuda",
    }  # fused: GradScaler reads nothing back
    optimizer = torch.optim.Adam([*to_target.parameters(), *to_source.parameters()], **adam)
    judges_optimizer = torch.optim.Adam(judges.parameters(), **adam)
    state = {
        "generator": to_target, "back": to_source, "judges": judges, "pool_target": pool_target, "pool_source": pool_source,
        "optimizer": optimizer, "judges_optimizer": judges_optimizer, "scaler": run.scaler,
    }  # fmt: skip

    # training
    run.describe()
    first = run.resume(state) or 0
    to_target, to_source = map(run.parallel, (to_target, to_source))
    judge_target, judge_source = map(run.parallel, judges)
    crops = loader(run, crops, first * sum(options.batch), size)
    for step, parts in run.steps(crops, first, total, state):
        for group in itertools.chain(optimizer.param_groups, judges_optimizer.param_groups):
            group["lr"] = options.lr * min(1, 2 * (1 - step / total))
        places = torch.randint(2 * POOL, (2, sum(options.batch)))  # in the pools; every process draws the same
        for k, batch in enumerate(parts):
            source, labels, target = batch["source"]["image"], batch["source"]["label"], batch["target"]["image"]

            judges.requires_grad_(False)
            with run.autocast():
                fake_target, same_target = to_target(torch.cat([source, target])).chunk(2)
                fake_source, same_source = to_source(torch.cat([target, source])).chunk(2)
                cycled_source, cycled_target = to_source(fake_target), to_target(fake_source)
                adversarial = least_squares(is_target(fake_target), 1) + least_squares(is_source(fake_source), 1)
            cycle = distance(cycled_source, source) + distance(cycled_target, target)
            identity = distance(same_source, source) + distance(same_target, target)
            edge = semantic_edge_loss(fake_target, source, labels)
            loss = adversarial + options.cycle * cycle + options.identity * identity + options.edge * edge
            run.scaler.scale(loss / cfg.accumulate).backward()

            judges.requires_grad_(True)
            number = step * sum(options.batch) + k * world() * size  # of the first image of all processes' k-th parts
            with run.autocast():
                old_target = pool_target.exchange(fake_target.detach(), number, places[0])
                old_source = pool_source.exchange(fake_source.detach(), number, places[1])
                judged = least_squares(judge_target(target), 1) + least_squares(judge_target(old_target), 0)
                judged = judged + least_squares(judge_source(source), 1) + least_squares(judge_source(old_source), 0)
            run.scaler.scale(judged / 2 / cfg.accumulate).backward()
            run.log(loss=loss, adversarial=adversarial, cycle=cycle, identity=identity, edge=edge, judges=judged)
            run.log(lr=optimizer.param_groups[0]["lr"])

        run.scaler.step(optimizer)
        run.scaler.step(judges_optimizer)
        run.scaler.update()
        optimizer.zero_grad()
        judges_optimizer.zero_grad()
        if run.shows:
            run.show(source_image=source, translated=fake_target, back_again=cycled_source, target_image=target)
    run.finish(total, {"generator": state["generator"]})


def least_squares(scores, wanted):
    """The GAN loss of LSGAN: mean (D - wanted)^2 over the patches' scores (B, 1, h, w)."""
    return (scores.float() - wanted).square().mean()


def distance(a, b):
    """L1 between images in [0, 1], on the scale of [-1, 1] that CycleGAN's weights are meant for."""
    return 2 * F.l1_loss(a, b)


class Pool(nn.Module):
    """The last translations that the discriminators have not been done with (Shrivastava et al., CVPR 2017).

    Every process has the same: the translations of all.
    """

    def __init__(self, size):
        super().__init__()
        self.register_buffer("images", torch.zeros(POOL, 3, *size))

    def exchange(self, images, number, places):
        """Each image (B, 3, H, W) itself or, once the pool is full and half of the time, one from the pool in its place.

        number: of the first image of all processes, counted from the first step on; places: the step's draws, one an image.
        """
        answer, images, size = [], gathered(images), len(images)
        for n, image in enumerate(images, number):
            place = n if n < POOL else int(places[n % len(places)])
            if n >= POOL and place < POOL:
                answer.append(self.images[place].clone())
            else:
                answer.append(image)
            if place < POOL:
                self.images[place] = image
        return torch.stack(answer[rank() * size : (rank() + 1) * size])


@torch.no_grad()
def write(run, generator, source, weights):
    """translated/NAME for every source image, of the same size; those written since the weights were are left alone."""
    folder, made = run.folder / "translated", Path(weights).stat().st_mtime
    paths = [folder / name for name in source.names]
    todo = [i for i, path in enumerate(paths) if not path.exists() or path.stat().st_mtime < made]
    todo = from_first(lambda: todo)  # before any other writes one of them
    with image_writer() as write_image:
        for sample in progress(loader(run, Subset(Whole(source), todo)), desc="translated", unit="img"):
            image, (height, width) = run.fetch(sample["image"])[None], sample["shape"]
            image = F.pad(image, (0, -width % 4, 0, -height % 4), mode="reflect")
            with run.autocast():
                image = generator(image)
            image = image[0, :, :height, :width].mul(255).round().byte().permute(1, 2, 0)
            write_image(paths[sample["index"]], image.cpu().numpy())
    print(f"translator: {len(paths)} translated images are in {folder}")


if __name__ == "__main__":
    command(main)
