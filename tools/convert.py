"""Write weights of other projects once in the form that the stages read.

python -m tools.convert student student.pth --out authors.pth
python -m tools.convert backbone deeplab.pth --out weights/backbone.pth
python -m tools.convert translator FOLDER_OR_FILE --out data/translated --cfg my.yaml

student: the network that the DiGA authors released -> a checkpoint for evaluate.py --weights and
selftrain.py --init. Its classes are those of --cfg.
backbone: a ResNet of old DeepLab ("Scale." before each name; for BGR in 0 ... 255, less a mean) ->
a file for model.weights. Files in torchvision's layout, as ProDA's SimCLR, need no conversion.
translator: the authors' folder that holds enc_s.pth and dec_s2t.pth, or a latest_net_G_A.pth of
pytorch-CycleGAN-and-pix2pix -> a translated image for each one of cfg.source, in a folder for
translation.images.
"""

import functools
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to be run by its path too

from datasets import Images
from engine.command import Parser, command
from engine.config import UserError
from engine.files import load_tensors, write_atomically
from engine.loop import Run
from layouts import classes
from models import build_segmenter, load_exactly
from settings import load_config
from translate_cyclegan import Generator, ResidualBlock, generate, layer, write

BGR_MEAN = (104.00698793, 116.66876762, 122.67891434)  # of images in 0 ... 255
STUDENT = {"network": "deeplab_v2_resnet101", "output_stride": 8, "channels": 256, "weights": None}
# what names begin with, in the authors' student and in a models.Segmenter
STUDENT_KEYS = {
    "layer0.0.": "backbone.conv1.",
    "layer0.1.": "backbone.bn1.",
    "layer": "backbone.layer",
    "final.conv2d_list.": "head.branches.",
    "final.bottleneck.0.se.0.": "head.excite.1.",
    "final.bottleneck.0.se.2.": "head.excite.3.",
    "final.bottleneck.1.": "head.project.0.",
    "final.bottleneck.2.": "head.project.1.",
    "final.head.1.": "classifier.",
}


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("kind", choices=("student", "backbone", "translator"))
    add("path", help="the file or folder to convert")
    add("--out", required=True, metavar="PATH", help="the file or folder to write")
    add("--cfg", default="config.yaml", metavar="FILE", help="configuration (%(default)s)")
    add("overrides", nargs="*", metavar="key.sub=value", help="replaces a value")
    args = parser.parse_intermixed_args()
    cfg = load_config(args.cfg, args.overrides)
    if args.kind == "translator":
        load = authors_translator if Path(args.path).is_dir() else cyclegan
        run, source = Run(cfg, "translator", "translation"), Images(cfg, "source", labelled=False)
        translate = functools.partial(generate, run, run.place(load(args.path)))
        write(translate, run, source, Path(args.out), time.time())
        print(f"translation.images={args.out} uses them")
        return
    state = student(args.path, cfg) if args.kind == "student" else backbone(args.path)
    write_atomically(args.out, lambda temporary: torch.save(state, temporary))
    print(f"wrote {args.out}")


def student(path, cfg):
    """Return a checkpoint's entries from the authors' student.pth. Raises UserError."""
    ours = mean_and_std(128 / 255)
    for key, value in load_tensors(path).items():
        prefix = next((prefix for prefix in STUDENT_KEYS if key.startswith(prefix)), "")
        name = STUDENT_KEYS.get(prefix, "") + key.removeprefix(prefix)
        if key == "layer0.0.weight":
            value = value.flip(1)
        elif ".se." in key and value.dim() == 2:  # linear there, a convolution here
            value = value[..., None, None]
        ours[name] = value
    model = build_segmenter(num_classes=len(classes(cfg)), **STUDENT)
    load_exactly(model, ours, path)
    config = {"classes": cfg.classes, "model": STUDENT | {"auxiliary": 0.0}}
    return {"student": ours, "config": config}


def backbone(path):
    """Return a state dict in torchvision's layout, and its images' `mean` and `std`."""
    theirs = {key: value for key, value in load_tensors(path).items() if ".layer5." not in key}
    if "Scale.conv1.weight" not in theirs:
        raise UserError(f"{path}: holds no ResNet of old DeepLab; see --help")
    ours = {key.removeprefix("Scale."): value for key, value in theirs.items()}
    ours["conv1.weight"] = ours["conv1.weight"].flip(1)
    return ours | mean_and_std(1 / 255)


def mean_and_std(std):
    """Return `mean` and `std` (3, 1, 1) of RGB in [0, 1] for a network whose input was BGR."""
    mean = torch.tensor(BGR_MEAN[::-1])[:, None, None] / 255
    return {"mean": mean, "std": torch.full((3, 1, 1), std)}


# ---------------------------------------------------------------- translators


def cyclegan(path):
    """Return the Generator in a latest_net_G_A.pth. Raises UserError."""
    state = {key.removeprefix("module."): value for key, value in load_tensors(path).items()}
    if "model.2.weight" in state:
        raise UserError(f"{path}: has batch norm; only generators with instance norm are read")
    # old PyTorch versions saved statistics of instance norm, which nothing reads
    unused = ("running_mean", "running_var", "num_batches_tracked")
    state = {key: value for key, value in state.items() if not key.endswith(unused)}
    # with dropout, the second convolution stands one place further
    state = {key.replace("block.6.", "block.5."): value for key, value in state.items()}
    blocks = len({key.split(".")[1] for key in state if ".conv_block." in key})
    if "model.1.weight" not in state or not blocks:
        raise UserError(f"{path}: holds no ResNet generator of CycleGAN; see --help")
    generator = Generator(len(state["model.1.weight"]), blocks)
    load_exactly(generator, state, path)
    return generator


class AuthorsGenerator(nn.Module):
    """The DiGA authors' translator: (B, 3, H, W) -> (B, 3, H, W), RGB in [0, 1].

    H and W are multiples of 4. After MUNIT; instance norms are assumed, no file holds one.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", mean_and_std(1)["mean"])
        layers = layer(nn.Conv2d(3, 64, 7), 3)
        for width in (64, 128):
            layers += layer(nn.Conv2d(width, 2 * width, 4, 2), 1)
        layers += [ResidualBlock(256) for _ in range(8)]
        for width in (256, 128):
            layers += [nn.Upsample(scale_factor=2), *layer(nn.Conv2d(width, width // 2, 5), 2)]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(64, 3, 7), nn.Tanh()]
        self.encoder = nn.Sequential(*layers[:16])
        self.decoder = nn.Sequential(*layers[16:])

    def forward(self, images):
        bgr = (images - self.mean).flip(1) * (255 / 128)
        rgb = self.decoder(self.encoder(bgr)).float().flip(1)
        return (rgb * (128 / 255) + self.mean).clamp(0, 1)


def authors_translator(folder):
    """Return the generator in a folder that holds enc_s.pth and dec_s2t.pth. Raises UserError."""
    blocks = [f"model.{block}.model.{conv}" for block in range(4) for conv in range(2)]
    encoder = ["model.0", "model.1", "model.2", *(f"model.3.{name}" for name in blocks)]
    decoder = [*(f"model.0.{name}" for name in blocks), "model.2", "model.4", "model.5"]
    generator = AuthorsGenerator()
    parts = ("enc_s.pth", encoder, generator.encoder), ("dec_s2t.pth", decoder, generator.decoder)
    for name, convs, module in parts:
        names = [f"{conv}.conv.{kind}" for conv in convs for kind in ("weight", "bias")]
        ours = dict(zip(names, module.state_dict(), strict=True))
        theirs = load_tensors(Path(folder) / name)
        renamed = {ours.get(key, f"? {key}"): value for key, value in theirs.items()}
        load_exactly(module, renamed, Path(folder) / name)
    return generator


if __name__ == "__main__":
    command(main)
