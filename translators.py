"""Image translation: CycleGAN's generator and discriminator, and the loading of generators that others trained."""

from pathlib import Path

import torch
from torch import nn

from config import UserError
from files import load_tensors
from models import AUTHORS_BGR_MEAN, load_exactly


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
            nn.ReLU(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x):
        return x + self.conv_block(x)


class Generator(nn.Module):
    """CycleGAN's ResNet generator (Zhu et al., ICCV 2017), (B, 3, H, W) -> (B, 3, H, W), both RGB in [0, 1].

    H and W are multiples of 4. Its parameter names are those of junyanz/pytorch-CycleGAN-and-pix2pix.
    """

    def __init__(self, filters=64, blocks=9):
        super().__init__()
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, filters, 7), nn.InstanceNorm2d(filters), nn.ReLU()]
        for width in (filters, 2 * filters):
            layers += [nn.Conv2d(width, 2 * width, 3, 2, 1), nn.InstanceNorm2d(2 * width), nn.ReLU()]
        layers += [ResidualBlock(4 * filters) for _ in range(blocks)]
        for width in (4 * filters, 2 * filters):
            layers += [nn.ConvTranspose2d(width, width // 2, 3, 2, 1, 1), nn.InstanceNorm2d(width // 2), nn.ReLU()]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(filters, 3, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, images):
        return (self.model(2 * images - 1).float() + 1) / 2

    @classmethod
    def from_file(cls, path):
        """A generator of ours or a `latest_net_G_A.pth`; its width and depth are read off the file."""
        state = load_tensors(path)
        state = state.get("generator", state)
        state = {key.removeprefix("module."): value for key, value in state.items()}
        blocks = len({key.split(".")[1] for key in state if ".conv_block." in key})
        if "model.1.weight" not in state or not blocks:
            raise UserError(
                f"{path}: no CycleGAN ResNet generator (there is no model.1.weight); see translation.weights"
            )
        # instance norm without affine has no state; files of old PyTorch versions hold statistics that nothing uses
        state = {k: v for k, v in state.items() if "running_" not in k and "num_batches" not in k}
        generator = cls(state["model.1.weight"].shape[0], blocks)
        load_exactly(generator, state, path)
        return generator


class Discriminator(nn.Sequential):
    """70x70 PatchGAN: (B, 3, H, W) in [0, 1] -> (B, 1, H / 8 - 2, W / 8 - 2), one score a patch."""

    def __init__(self, filters=64):
        layers = [nn.Conv2d(3, filters, 4, 2, 1), nn.LeakyReLU(0.2)]
        for width, stride in ((filters, 2), (2 * filters, 2), (4 * filters, 1)):
            layers += [nn.Conv2d(width, 2 * width, 4, stride, 1), nn.InstanceNorm2d(2 * width), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(8 * filters, 1, 4, 1, 1))

    def forward(self, images):
        return super().forward(2 * images - 1)


def init_gan(module):
    """N(0, 0.02) for every convolution, zero bias."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


# the convolutions in the authors' files, in order
BLOCKS = [f"model.{block}.model.{conv}.conv" for block in range(4) for conv in range(2)]
ENCODER = ["model.0.conv", "model.1.conv", "model.2.conv", *(f"model.3.{name}" for name in BLOCKS)]
DECODER = [*(f"model.0.{name}" for name in BLOCKS), "model.2.conv", "model.4.conv", "model.5.conv"]


class AuthorsGenerator(nn.Module):
    """The DiGA authors' translator, (B, 3, H, W) -> (B, 3, H, W), both RGB in [0, 1]; H and W are multiples of 4.

    After MUNIT: an encoder (a 7x7 convolution, two of 4x4 and stride 2, 4 residual blocks) and a decoder (4 residual
    blocks, twice upsampling and a 5x5 convolution, then 7x7). Their files hold convolutions alone; the norms between
    them have no parameters and are taken to be instance norms.
    """

    def __init__(self, filters=64):
        super().__init__()
        self.register_buffer("mean", torch.tensor(AUTHORS_BGR_MEAN[::-1])[:, None, None] / 255, persistent=False)

        def layer(inputs, outputs, kernel, stride=1):
            pad = nn.ReflectionPad2d((kernel - 1) // 2)
            return [pad, nn.Conv2d(inputs, outputs, kernel, stride), nn.InstanceNorm2d(outputs), nn.ReLU()]

        encoder, decoder = layer(3, filters, 7), [ResidualBlock(4 * filters) for _ in range(4)]
        for width in (filters, 2 * filters):
            encoder += layer(width, 2 * width, 4, 2)
            decoder += [nn.Upsample(scale_factor=2), *layer(4 * filters**2 // width, 2 * filters**2 // width, 5)]
        self.encoder = nn.Sequential(*encoder, *(ResidualBlock(4 * filters) for _ in range(4)))
        self.decoder = nn.Sequential(*decoder, nn.ReflectionPad2d(3), nn.Conv2d(filters, 3, 7), nn.Tanh())

    def forward(self, images):
        bgr = (images - self.mean).flip(1) * (255 / 128)
        return (self.decoder(self.encoder(bgr)).float().flip(1) * (128 / 255) + self.mean).clamp(0, 1)

    @classmethod
    def from_folder(cls, folder):
        """The generator in a folder's enc_s.pth and dec_s2t.pth."""
        parts = (("enc_s.pth", "encoder", ENCODER), ("dec_s2t.pth", "decoder", DECODER))
        states = {part: load_tensors(Path(folder) / file) for file, part, _ in parts}
        first = states["encoder"].get("model.0.conv.weight")
        generator = cls(64 if first is None else first.shape[0])
        for file, part, names in parts:
            module = getattr(generator, part)
            convs = [name for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)]
            ours = dict(zip(names, convs, strict=True))
            state = {f"{ours.get(key.rpartition('.')[0], '?')}.{key.rpartition('.')[2]}": value
                     for key, value in states[part].items()}  # fmt: skip
            load_exactly(module, state, Path(folder) / file)
        return generator


def load_generator(path):
    """The generator that translation.weights names: a file of ours, of pytorch-CycleGAN-and-pix2pix, or the authors' folder."""
    return AuthorsGenerator.from_folder(path) if Path(path).is_dir() else Generator.from_file(path)
