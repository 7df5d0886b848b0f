"""Stage 0: translation of the source into the target's style. Leaves runs/NAME/translated/.

python translate_cyclegan.py --cfg config.yaml

A CycleGAN (Zhu et al., ICCV 2017) whose loss keeps borders of classes, so that labels stay valid.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import StackDataset, Subset

from datasets import Crops, Images, Whole, loader, translated_images
from engine.command import arguments, command
from engine.files import load_tensors
from engine.images import image_writer
from engine.log import progress
from engine.loop import Run, micro_batch_size
from engine.processes import all_gather_rows, barrier, decided_by_first, rank, world
from layouts import classes
from losses import semantic_edge_loss
from metrics import judge_translation
from models import load_exactly
from settings import load_config

POOL = 50  # earlier translations that the discriminators see half of the time


def main():
    parser = arguments(__doc__)
    parser.add_argument("--force", action="store_true", help="replace an earlier result")
    args = parser.parse_intermixed_args()
    cfg = load_config(args.cfg, args.overrides)
    # what the networks of later stages need for their memory, CycleGAN's batch of 1 cannot do
    cfg.accumulate = min(cfg.accumulate, sum(cfg.translation.batch))
    run = Run(cfg, "translator", "translation")
    source = Images(cfg, "source", labelled=True)
    folder = cfg.translation.images or run.folder / "translated"
    if not cfg.translation.images:
        target = Images(cfg, "target", labelled=False)
        if not run.is_finished(args.force, [source, target]):
            train(run, source.check(), target.check())
        made = decided_by_first(lambda: run.result.stat().st_mtime)
        generator = Generator(cfg.translation.filters, cfg.translation.blocks)
        load_exactly(generator, load_tensors(run.result).get("generator", {}), run.result)
        generator = run.place(generator)
        write(lambda x: generate(run, generator, x), run, source, folder, made)
        barrier()  # for the images of all processes
    judge_translation(run, source, translated_images(cfg, source))
    print(f"translator: {len(source)} translated images are in {folder}")


def train(run, source, target):
    cfg = run.cfg
    options = cfg.translation
    total = options.steps
    n = micro_batch_size(cfg, "translation")
    batch_size = sum(options.batch)

    # data
    images = {"source": source, "target": target}
    alike = options.batch, total, options.crop
    crops = {key: Crops(cfg, run.stage, key, images[key], *alike) for key in images}

    # generators, discriminators, optimizers
    generators = [Generator(options.filters, options.blocks).apply(init_gan) for _ in range(2)]
    discriminators = [Discriminator(options.filters).apply(init_gan) for _ in range(2)]
    to_target, to_source = map(run.place, generators)
    is_target, is_source = judges = nn.ModuleList(map(run.place, discriminators))
    pool_target, pool_source = (run.place(Pool(options.crop)) for _ in range(2))
    # fused on a GPU: with another Adam, the scaler of fp16 reads back in every step
    adam = {"lr": options.lr, "betas": (0.5, 0.999), "fused": run.device.type == "cuda"}
    optimizer = torch.optim.Adam([*to_target.parameters(), *to_source.parameters()], **adam)
    judges_optimizer = torch.optim.Adam(judges.parameters(), **adam)
    state = {"generator": to_target, "back": to_source, "judges": judges}
    state |= {"pool_target": pool_target, "pool_source": pool_source}
    run.resume(**state, optimizer=optimizer, judges_optimizer=judges_optimizer)

    # training
    to_target, to_source = map(run.parallel, (to_target, to_source))
    judge_target, judge_source = map(run.parallel, judges)
    batches = loader(run, StackDataset(**crops), run.first * batch_size, n)
    for step, parts in run.steps(batches, total):
        for group in (*optimizer.param_groups, *judges_optimizer.param_groups):
            group["lr"] = options.lr * min(1, 2 * (1 - step / total))
        places = torch.randint(2 * POOL, (2, batch_size))  # in the pools; the same in all processes
        for k, batch in enumerate(parts):
            source = batch["source"]["image"]
            labels = batch["source"]["label"]
            target = batch["target"]["image"]

            # the generators: into the other domain, back, and their own domain as it is
            judges.requires_grad_(False)
            with run.autocast():
                fake_target, same_target = to_target(torch.cat([source, target])).chunk(2)
                fake_source, same_source = to_source(torch.cat([target, source])).chunk(2)
                cycled_source = to_source(fake_target)
                cycled_target = to_target(fake_source)
                adversarial = least_squares(is_target(fake_target), 1)
                adversarial = adversarial + least_squares(is_source(fake_source), 1)
            cycle = distance(cycled_source, source) + distance(cycled_target, target)
            identity = distance(same_source, source) + distance(same_target, target)
            edge = semantic_edge_loss(fake_target, source, labels)
            loss = adversarial + options.cycle * cycle + options.identity * identity
            loss = loss + options.edge * edge
            run.backward(loss)

            # the discriminators: real images against translations of this and earlier steps
            judges.requires_grad_(True)
            number = step * batch_size + k * world() * n  # of the first image in all processes
            with run.autocast():
                old_target = pool_target.exchange(fake_target.detach(), number, places[0])
                old_source = pool_source.exchange(fake_source.detach(), number, places[1])
                judged = least_squares(judge_target(target), 1)
                judged = judged + least_squares(judge_target(old_target), 0)
                judged = judged + least_squares(judge_source(source), 1)
                judged = judged + least_squares(judge_source(old_source), 0)
            run.backward(judged / 2)
            run.log(loss=loss, adversarial=adversarial, cycle=cycle, identity=identity, edge=edge)
            run.log(judges=judged)

        run.update(optimizer, judges_optimizer)
        if run.shows:
            pictures = {"source_image": source, "translated": fake_target}
            pictures |= {"back_again": cycled_source, "target_image": target}
            run.show(classes(cfg), **pictures)
    run.finish(generator=state["generator"])


@torch.no_grad()
def generate(run, generator, sample):
    """Return the generator's G(x_s) of a Whole's sample, uint8 RGB (H, W, 3)."""
    height, width = sample["shape"]
    image = run.fetch(sample["image"][None])
    image = F.pad(image, (0, -width % 4, 0, -height % 4), mode="reflect")
    with run.autocast():
        image = generator(image)
    image = image[0, :, :height, :width].mul(255).round().byte().permute(1, 2, 0)
    return image.cpu().numpy()


def write(translate, run, source, folder, made):
    """Write the translation of every source image to NAME.jpg in `folder`, of the same size.

    Images that were written after the time `made` and after their own image are left alone.
    """
    # JPEG takes a third of a PNG's space and of its decoding, which is most of a sample's time
    paths = [(folder / name).with_suffix(".jpg") for name in source.names]

    def is_old(i):
        newest = max(made, (source.folder / source.names[i]).stat().st_mtime)
        return not paths[i].exists() or paths[i].stat().st_mtime < newest

    # before another process writes one of them
    todo = decided_by_first(lambda: [i for i in range(len(source)) if is_old(i)])
    images = loader(run, Subset(Whole(source.unlabelled()), todo))
    with image_writer() as write_image:
        for sample in progress(images, desc="translated", unit="img"):
            write_image(paths[sample["index"]], translate(sample))


def least_squares(scores, wanted):
    """Return LSGAN's loss, the mean of (D - wanted)^2 over the patches' scores (B, 1, h, w)."""
    return (scores.float() - wanted).square().mean()


def distance(a, b):
    """Return the L1 distance of images in [0, 1], on the scale [-1, 1] of CycleGAN's weights."""
    return 2 * F.l1_loss(a, b)


class Pool(nn.Module):
    """The last POOL translations, of all processes (Shrivastava et al., CVPR 2017)."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("images", torch.zeros(POOL, 3, *size))

    def exchange(self, images, number, places):
        """Return images (B, 3, H, W), half of which come from the pool once it is full.

        number: of the first image in all processes. places: (batch,) integers, drawn.
        """
        answer = []
        size = len(images)
        for n, image in enumerate(all_gather_rows(images), number):
            place = n if n < POOL else int(places[n % len(places)])
            swapped = n >= POOL and place < POOL
            answer.append(self.images[place].clone() if swapped else image)
            if place < POOL:
                self.images[place] = image
        return torch.stack(answer[rank() * size : (rank() + 1) * size])


def layer(conv, reflect=0, activation=None):
    """Return a list: reflection padding, if any, a convolution, instance norm, ReLU by default."""
    padding = [nn.ReflectionPad2d(reflect)] if reflect else []
    return [*padding, conv, nn.InstanceNorm2d(conv.out_channels), activation or nn.ReLU()]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with instance norm and reflection padding, added to their input."""

    def __init__(self, channels):
        super().__init__()
        first, second = (layer(nn.Conv2d(channels, channels, 3), 1) for _ in range(2))
        self.conv_block = nn.Sequential(*first, *second[:-1])

    def forward(self, x):
        return x + self.conv_block(x)


class Generator(nn.Module):
    """CycleGAN's ResNet generator of RGB (B, 3, H, W) in [0, 1]; H and W are multiples of 4."""

    def __init__(self, filters=64, blocks=9):
        super().__init__()
        layers = layer(nn.Conv2d(3, filters, 7), 3)
        for width in (filters, 2 * filters):
            layers += layer(nn.Conv2d(width, 2 * width, 3, 2, 1))
        layers += [ResidualBlock(4 * filters) for _ in range(blocks)]
        for width in (4 * filters, 2 * filters):
            layers += layer(nn.ConvTranspose2d(width, width // 2, 3, 2, 1, 1))
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(filters, 3, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, images):
        return (self.model(2 * images - 1).float() + 1) / 2


class Discriminator(nn.Sequential):
    """70x70 PatchGAN: RGB (B, 3, H, W) in [0, 1] -> scores (B, 1, H / 8 - 2, W / 8 - 2)."""

    def __init__(self, filters=64):
        layers = [nn.Conv2d(3, filters, 4, 2, 1), nn.LeakyReLU(0.2)]
        for width, stride in ((filters, 2), (2 * filters, 2), (4 * filters, 1)):
            layers += layer(nn.Conv2d(width, 2 * width, 4, stride, 1), 0, nn.LeakyReLU(0.2))
        super().__init__(*layers, nn.Conv2d(8 * filters, 1, 4, 1, 1))

    def forward(self, images):
        return super().forward(2 * images - 1)


def init_gan(module):
    """Initialise a convolution with N(0, 0.02) and zero bias."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


if __name__ == "__main__":
    command(main)
