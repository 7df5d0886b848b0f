"""The segmentation networks, the EMA teacher, the CycleGAN networks, and the loading of foreign weights.

A segmentation network takes RGB images (B, 3, H, W) in [0, 1] (it normalises them itself) and returns
logits (B, K, h, w) and features (B, C, h, w), h about H / output stride.
"""

import copy
import urllib.error
from collections import OrderedDict

import torch
import torchvision
from torch import nn

from config import Config, UserError, classes
from engine import load_tensors

NETWORKS = ("deeplab_v2_resnet101", "resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2")


class Segmenter(nn.Module):
    """A backbone with the DeepLab-V2 head of ProDA; `features` is f, the head's output before the classifier."""

    def __init__(self, backbone, backbone_channels, num_classes, channels=256):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        self.backbone = backbone
        self.head = Head(backbone_channels, channels)
        self.classifier = nn.Conv2d(channels, num_classes, 1, bias=False)

    def forward(self, images):
        features = self.head(self.backbone((images - self.mean) / self.std))
        return self.classifier(features), features


class Head(nn.Module):
    """Parallel dilated convolutions, squeeze-excite over their concatenation, one convolution down to f.

    (B, backbone_channels, h, w) -> (B, channels, h, w).
    """

    def __init__(self, backbone_channels, channels, dilations=(6, 12, 18, 24), dropout=0.1):
        super().__init__()
        convs = [nn.Conv2d(backbone_channels, channels, 1)]
        convs += [nn.Conv2d(backbone_channels, channels, 3, padding=d, dilation=d) for d in dilations]
        self.branches = nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(32, channels), nn.ReLU()) for conv in convs)
        wide = len(convs) * channels
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(wide, wide // 16, 1),
            nn.ReLU(),
            nn.Conv2d(wide // 16, wide, 1),
            nn.Sigmoid(),
        )
        self.project = nn.Sequential(nn.Conv2d(wide, channels, 3, padding=1), nn.GroupNorm(32, channels))
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x):
        x = torch.cat([branch(x) for branch in self.branches], 1)
        return self.dropout(self.project(x * self.excite(x)))


def build_segmenter(network, num_classes, output_stride=8, channels=256, weights=None):
    """A segmentation network by its name in NETWORKS.

    weights: "imagenet" (torchvision's, downloaded once), a file with a torchvision state dict, or None: from scratch.
    Raises UserError where the weights cannot be had or do not fit.
    """
    backbone, backbone_channels = _backbone(network, output_stride)
    if weights is not None:
        state = _imagenet_weights(network) if weights == "imagenet" else load_tensors(weights)
        kept = {k: v for k, v in state.items() if not k.startswith(("fc.", "classifier.", "features.18."))}
        load_exactly(backbone, kept, weights)
    return Segmenter(backbone, backbone_channels, num_classes, channels)


def _backbone(network, output_stride):
    """torchvision's network without its classifier, key names kept, and its number of output channels."""
    deeplab = network == "deeplab_v2_resnet101"
    name = network.removeprefix("deeplab_v2_")
    net = torchvision.models.get_model(name, weights=None)
    if name == "mobilenet_v2":
        stages, channels = (net.features[7:14], net.features[14:18]), 320
        backbone = nn.Sequential(OrderedDict(features=net.features[:18]))
    else:
        stages, channels = (net.layer3, net.layer4), net.fc.in_features
        backbone = nn.Sequential(OrderedDict(list(net.named_children())[:-2]))
    if output_stride == 8:
        _dilate(stages[0], 2)
        _dilate(stages[1], 4)
    else:
        _dilate(stages[1], 2)
    if deeplab:
        for layer in (net.layer2, net.layer3, net.layer4):
            layer[0].conv1.stride, layer[0].conv2.stride = layer[0].conv2.stride, layer[0].conv1.stride
        net.maxpool.ceil_mode = True
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
    return backbone, channels


def _dilate(stage, dilation):
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (dilation, dilation)


def _imagenet_weights(network):
    weights = torchvision.models.get_model_weights(network.removeprefix("deeplab_v2_")).IMAGENET1K_V1
    try:
        return weights.get_state_dict(weights_only=True)
    except (urllib.error.URLError, OSError) as error:
        raise UserError(
            f"model.weights: imagenet could not be downloaded from {weights.url} ({error}); fetch that file where there "
            "is a network and give its path as model.weights"
        ) from error


def load_exactly(module, state, origin):
    """load_state_dict that names what does not fit; `origin` says in the message where `state` came from."""
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    shape = [f"{k} is {list(state[k].shape)}, not {list(own[k].shape)}" for k in own.keys() & state.keys()
             if state[k].shape != own[k].shape]  # fmt: skip
    for what, keys in (("lacks", missing), ("has unknown", extra), ("differs in shape:", sorted(shape))):
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise UserError(f"{origin}: {what} {', '.join(keys[:5])}{more}; it does not fit this network")
    module.load_state_dict(state)


def build_optimizer(model, name, lr_backbone, lr_head, momentum, weight_decay, **_):
    """SGD or AdamW over the parameters that are not frozen, each in one group that keeps its base rate as `base_lr`."""
    groups = []
    for rate, modules in ((lr_backbone, [model.backbone]), (lr_head, [model.head, model.classifier])):
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        groups.append({"params": parameters, "lr": rate, "base_lr": rate})
    if name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
    return torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay, fused=True)


def load_segmenter(path, cfg, which="student"):
    """The student or teacher of a stage's checkpoint, on the CPU, and the checkpoint's other entries.

    The authors' released student is taken too. None for a teacher that the file does not hold. Raises UserError where it is
    no checkpoint, or one for other classes than the configuration's.
    """
    saved = load_tensors(path)
    if "layer0.0.weight" in saved:
        model = build_segmenter("deeplab_v2_resnet101", len(classes(cfg)))
        load_exactly(model, from_authors(saved), path)
        return (model, {}) if which == "student" else (None, {})
    if not {"student", "config"} <= saved.keys():
        raise UserError(f"{path}: holds no segmentation network of warmup.py or selftrain.py")
    trained = Config(saved["config"])
    if list(classes(trained)) != list(classes(cfg)):
        raise UserError(
            f"{path}: was trained for other classes than the configuration's: {', '.join(classes(trained))}"
        )
    if which not in saved:
        return None, saved
    model = build_segmenter(num_classes=len(classes(cfg)), **saved["config"]["model"] | {"weights": None})
    load_exactly(model, saved[which], path)
    return model, saved


AUTHORS_KEYS = {
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
AUTHORS_BGR_MEAN = (104.00698793, 116.66876762, 122.67891434)


def from_authors(state):
    """The state dict of the authors' released DeepLab-V2 (`student.pth`) as one of build_segmenter's network.

    Their network takes BGR images in 0 ... 255, less a mean, divided by 128; ours then takes RGB in [0, 1] all the same.
    """
    ours = {}
    for key, value in state.items():
        prefix = next((p for p in AUTHORS_KEYS if key.startswith(p)), "")
        linear = ".se." in key and value.dim() == 2
        ours[AUTHORS_KEYS.get(prefix, "") + key.removeprefix(prefix)] = value[..., None, None] if linear else value
    ours["backbone.conv1.weight"] = ours["backbone.conv1.weight"].flip(1)
    ours["mean"] = torch.tensor(AUTHORS_BGR_MEAN[::-1])[:, None, None] / 255
    ours["std"] = torch.full((3, 1, 1), 128 / 255)
    return ours


def make_teacher(student):
    """T: a frozen copy of S in training mode, its batch norm using the batch's statistics, without dropout.

    Its running statistics do not move by its own forward passes; ema_update copies the student's.
    """
    teacher = copy.deepcopy(student).requires_grad_(False).train()
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
        elif isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    return teacher


@torch.no_grad()
def ema_update(teacher, student, decay):
    """theta_T <- decay theta_T + (1 - decay) theta_S; buffers (batch-norm statistics) are copied."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)
    torch._foreach_copy_(list(teacher.buffers()), list(student.buffers()))


@torch.no_grad()
def recalibrate_batchnorm(model, batches):
    """Replaces the batch-norm running statistics by their plain average over `batches` of images, in one pass.

    Leaves the model in evaluation mode; one without batch norm, or with no batches, is otherwise left as it is.
    """
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms or not len(batches):
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    for images in batches:
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


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
