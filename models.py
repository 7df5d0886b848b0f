"""Segmentation networks, their optimizer, the EMA teacher, loading weights.

A network takes RGB images (B, 3, H, W) in [0, 1] and returns logits (B, K, h, w), features f
(B, C, h, w) and the logits of the auxiliary classifier or None; h is about H / output stride.
"""

import copy
import difflib
import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from engine.config import UserError, one_line
from engine.files import load_tensors
from engine.images import resize_pixels
from layouts import classes
from losses import upsample
from settings import NETWORKS, OWN_NETWORKS, load_saved


class Segmenter(nn.Module):
    """A backbone, a head (output f), classifiers; images are scaled to multiples of `divisor`."""

    def __init__(self, backbone, head, classifier, divisor=1, auxiliary=None):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        self.backbone, self.head = backbone, head
        self.classifier, self.auxiliary = classifier, auxiliary
        self.divisor, self.channels = divisor, _layers(classifier, nn.Conv2d)[0].in_channels

    def forward(self, images):
        if self.divisor > 1:
            sides = [side + self.divisor // 2 for side in images.shape[-2:]]
            size = [max(side // self.divisor, 1) * self.divisor for side in sides]
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        maps = self.backbone((images - self.mean) / self.std)
        maps = maps if isinstance(maps, tuple) else (maps,)  # what the head takes
        features = self.head(*maps)
        deepest = maps[0][-1] if isinstance(maps[0], list) else maps[0]
        auxiliary = self.auxiliary(deepest) if self.auxiliary else None
        return self.classifier(features), features, auxiliary


class Head(nn.Module):
    """DeepLab-V2 head with squeeze-excite, as in ProDA; f has a multiple of 32 channels."""

    def __init__(self, backbone_channels, channels, dilations=(6, 12, 18, 24), dropout=0.1):
        super().__init__()
        convs = [nn.Conv2d(backbone_channels, channels, 1)]
        convs += [nn.Conv2d(backbone_channels, channels, 3, 1, d, d) for d in dilations]
        branches = [nn.Sequential(conv, nn.GroupNorm(32, channels), nn.ReLU()) for conv in convs]
        self.branches = nn.ModuleList(branches)
        wide = len(convs) * channels
        squeeze, expand = nn.Conv2d(wide, wide // 16, 1), nn.Conv2d(wide // 16, wide, 1)
        layers = nn.AdaptiveAvgPool2d(1), squeeze, nn.ReLU(), expand, nn.Sigmoid()
        self.excite = nn.Sequential(*layers)
        project = nn.Conv2d(wide, channels, 3, padding=1)
        self.project = nn.Sequential(project, nn.GroupNorm(32, channels))
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x):
        x = torch.cat([branch(x) for branch in self.branches], 1)
        return self.dropout(self.project(x * self.excite(x)))


def build_segmenter(network, num_classes, output_stride=8, channels=256, weights=None, auxiliary=0):
    """Return a Segmenter by the keys of `model` in config.yaml. Raises UserError."""
    if network.startswith("smp/"):
        backbone, head, classifier, divisor = _smp(network, num_classes, weights)
        deepest = backbone.out_channels[-1]
    elif network in OWN_NETWORKS:
        options = {"output_stride": output_stride, "channels": channels, "weights": weights}
        backbone, head, classifier = OWN_NETWORKS[network](num_classes=num_classes, **options)
        deepest, divisor, weights = auxiliary and backbone.out_channels, 1, None
    elif network == "small":
        backbone, head, classifier = _small(channels, num_classes)
        deepest, divisor, weights = channels, 1, None
    elif network not in NETWORKS:
        raise UserError(f"model.network = {network}: unknown; import the module that registers it")
    else:
        backbone, deepest = _backbone(network, output_stride)
        head, divisor = Head(deepest, channels), 1
        classifier = nn.Conv2d(channels, num_classes, 1, bias=False)
    if auxiliary:
        first = nn.Conv2d(deepest, 256, 3, padding=1)
        auxiliary = nn.Sequential(first, nn.ReLU(), nn.Conv2d(256, num_classes, 1))
    model = Segmenter(backbone, head, classifier, divisor, auxiliary or None)
    if weights is not None and (weights != "imagenet" or not network.startswith("smp/")):
        _load_backbone(model, network, weights)
    return model


def register(name):
    """Return a decorator: model.network = `name` stands for its function; see docs/python.md."""
    if name in NETWORKS or name.startswith("smp/"):
        raise UserError(f"register({name!r}): this name is in use; choose another one")
    OWN_NETWORKS.pop(name, None)  # a cell of a notebook may run twice
    return lambda function: OWN_NETWORKS.setdefault(name, function)


def _small(channels, num_classes):
    """Return backbone, head, classifier of stride 4: they learn a drawn world in 200 steps."""

    def block(inputs, outputs, stride=1, dilation=1):
        conv = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    first = block(3, channels // 2, 2), block(channels // 2, channels, 2)
    wide = [block(channels, channels, dilation=d) for d in (1, 2, 4, 8, 1)]
    return nn.Sequential(*first, *wide[:-1]), wide[-1], nn.Conv2d(channels, num_classes, 1)


def _smp(name, num_classes, weights):
    """Return encoder, decoder, classifier, and what the sides of images must be multiples of."""
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        remedy = "needs `pip install -r tools/requirements.txt`"
        raise UserError(f"model.network = {name} {remedy}") from error
    _, architecture, encoder = name.split("/")
    pretrained = "imagenet" if weights == "imagenet" else None
    # a ViT then takes images of any size; smp's DPT needs patches of 16 pixels: timm resamples
    more = {"dynamic_img_size": True, "patch_size": 16} if architecture == "DPT" else {}
    try:
        model = smp.create_model(architecture, encoder, pretrained, classes=num_classes, **more)
    except Exception as error:  # of a dozen types: an unknown name, no network to download from
        near = difflib.get_close_matches(encoder, smp.encoders.get_encoder_names(), 3, 0)
        known = one_line(f"encoders like it: {', '.join(near)}; {error}")
        raise UserError(f"model.network = {name}, model.weights = {weights}: {known}") from error
    head = model.segmentation_head
    classifier = head.head if hasattr(head, "head") else head[0]  # without the final upsampling
    return model.encoder, model.decoder, classifier, 32  # encoders halve an image 5 times at most


def _backbone(network, output_stride):
    """Return torchvision's network without its classifier, and its number of output channels."""
    import torchvision

    name = network.removeprefix("deeplab_v2_")
    net = torchvision.models.get_model(name, weights=None)
    if name == "mobilenet_v2":
        stages, channels = (net.features[7:14], net.features[14:18]), 320
        kept = [("features", net.features[:18])]
    else:
        stages, channels = (net.layer3, net.layer4), net.fc.in_features
        kept = list(net.named_children())[:-2]
    dilated = [(stages[0], 2), (stages[1], 4)] if output_stride == 8 else [(stages[1], 2)]
    for stage, dilation in dilated:  # in place of strides
        for conv in _layers(stage, nn.Conv2d):
            conv.stride = (1, 1)
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (dilation, dilation)
    if name != network:  # what DeepLab-V2 does differently
        for block in (net.layer2[0], net.layer3[0], net.layer4[0]):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
        net.maxpool.ceil_mode = True
        for norm in _layers(net, nn.BatchNorm2d):
            norm.requires_grad_(False)
    return nn.Sequential(OrderedDict(kept)), channels


def _layers(module, kind):
    return [layer for layer in module.modules() if isinstance(layer, kind)]


# ---------------------------------------------------------------- optimizer and teacher


BLOCK = re.compile(r"backbone\..*\bblocks\.(\d+)\.")


def build_optimizer(model, options):
    """Return SGD or AdamW with groups for the backbone (frozen at rate 0) and one for the rest.

    layer_decay: a factor on lr_backbone for each block, counted from the last (BEiT, ICLR 2022).
    """
    if options.lr_backbone == 0:
        model.backbone.requires_grad_(False)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    block_of = {n: int(match[1]) for n, _ in trained if (match := BLOCK.match(n))}
    blocks = max(block_of.values(), default=-1) + 1
    groups = {(options.lr_backbone, True): [], (options.lr_head, False): []}
    for n, p in trained:
        in_backbone = n.startswith("backbone.")
        at_end = n.startswith("backbone.model.norm.")
        later = 0 if at_end else blocks - 1 - block_of.get(n, -1)  # blocks after it
        rate = options.lr_backbone * options.layer_decay**later if in_backbone else options.lr_head
        groups.setdefault((rate, in_backbone), []).append(p)
    groups = [{"params": ps, "lr": rate, "base_lr": rate} for (rate, _), ps in groups.items()]
    decay = options.weight_decay
    if options.name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=decay, fused=True)
    sgd = torch.optim.SGD(groups, momentum=options.momentum, weight_decay=decay, fused=True)
    if options.momentum:  # where fp16 skips the first step, PyTorch would not initialise these
        for _, p in trained:
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd


def set_learning_rate(optimizer, step, total, options):
    """Set each rate to base (1 - step / total)^power, after a linear rise of `warmup` steps."""
    decay = (1 - step / total) ** options.power
    rise = min(1, (step + 1) / (options.warmup + 1))
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * decay * rise


def make_teacher(student):
    """Return T, a frozen copy of S that uses batch statistics and moves none, without dropout."""
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    for norm in _layers(teacher, nn.modules.batchnorm._BatchNorm):
        norm.track_running_stats = False
        norm.train()
    return teacher


@torch.no_grad()
def ema_update(teacher, student, step, limit=0.999):
    """Update theta_T <- a theta_T + (1 - a) theta_S, a = min(1 - 1 / (step + 1), limit)."""
    alpha = min(1 - 1 / (step + 1), limit)
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - alpha)
    for dtype in {buffer.dtype for buffer in student.buffers()}:  # of one dtype: one kernel
        pair = ([b for b in net.buffers() if b.dtype == dtype] for net in (teacher, student))
        torch._foreach_copy_(*pair)


@torch.no_grad()
def recalibrate_batchnorm(model, batches):
    """Set batch norm's running statistics to their plain average over batches of images."""
    model.eval()
    norms = _layers(model, nn.modules.batchnorm._BatchNorm)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:  # a teacher tracks nothing; without momentum it is a plain average
        norm.track_running_stats, norm.momentum = True, None
        norm.reset_running_stats()
        norm.train()
    for images in batches:
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


# ---------------------------------------------------------------- weights


class Predictor(nn.Module):
    """Logits (B, K, H, W) for images (B, 3, H, W) in [0, 1]; class names, colours, `size`."""

    def __init__(self, network, colours, size=None):
        super().__init__()
        self.network, self.classes, self.colours = network, list(colours), colours
        self.size = size

    def forward(self, images):
        return upsample(self.network(images)[0], images.shape[-2:])

    @torch.no_grad()
    def predict(self, image):
        """Return the class numbers (H, W) uint8 of an RGB image (H, W, 3) uint8, NumPy arrays."""
        small = torch.tensor(resize_pixels(image, self.size), device=self.network.mean.device)
        logits = self.network(small.movedim(2, 0)[None].float() / 255)[0]
        return upsample(logits, image.shape[:2])[0].argmax(0).byte().cpu().numpy()


def load(path):
    """Return the Predictor of a checkpoint's student, in eval mode on the CPU. Raises UserError."""
    model, cfg, saved = load_segmenter(path)
    return Predictor(model, classes(cfg), saved["config"].get("val", {}).get("size")).eval()


def load_segmenter(path, cfg=None, which="student", same_model=False):
    """Return a checkpoint's student or teacher (or None), its Config, its entries, or UserError.

    `cfg` must have the classes of the checkpoint, and with `same_model` its model.
    """
    saved = load_tensors(path)
    if not {"student", "config"} <= saved.keys():
        fault = "holds no segmentation network of warmup.py, selftrain.py or tools.baselines"
        remedy = "of another project's weights, tools/convert.py makes one"
        raise UserError(f"{path}: {fault}; {remedy}")
    own = {key: saved["config"][key] for key in ("classes", "model") if key in saved["config"]}
    own = load_saved(own, (), f"{path}: config")
    names = list(classes(own))
    if cfg and names != list(classes(cfg)):
        order = ", in another order" if {*names} == {*classes(cfg)} else ""
        fault = f"was trained for other classes{order}: {', '.join(names)}"
        raise UserError(f"{path}: {fault}; set classes to these")
    for key, value in own.model.items() if same_model else ():
        if key != "weights" and cfg.model[key] != value:
            raise UserError(f"{path}: has model.{key} = {value}, not {cfg.model[key]}; set it")
    if which not in saved:
        return None, own, saved
    model = build_segmenter(num_classes=len(names), **own.model | {"weights": None})
    load_exactly(model, saved[which], path)
    return model, own, saved


def load_exactly(module, state, origin):
    """Load a state dict that fits and is finite, else raise a UserError with its `origin`."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        faults = one_line(str(error).partition("\n")[2])
        raise UserError(f"{origin}: does not fit this network: {faults}") from error
    odd = [key for key, value in state.items() if not value.isfinite().all()]
    if odd:
        raise UserError(f"{origin}: is not finite in {one_line(', '.join(odd))}; restore the file")


def _load_backbone(model, network, weights):
    """Load "imagenet", or a file in torchvision's layout, with `mean` and `std` of its images."""
    if weights == "imagenet":
        import torchvision

        name = network.removeprefix("deeplab_v2_")
        source = torchvision.models.get_model_weights(name).IMAGENET1K_V1
        try:
            state = source.get_state_dict(weights_only=True)
        except OSError as error:
            fault = f"model.weights: imagenet could not be downloaded from {source.url} ({error})"
            remedy = "fetch that file where there is a network and give its path as model.weights"
            raise UserError(f"{fault}; {remedy}") from error
    else:
        state = load_tensors(weights)
    wrapped = [x for x in state.values() if isinstance(x, dict) and {*map(type, x)} == {str}]
    state = max(wrapped, key=len, default=state)  # beside a few options, or an optimizer
    for name in ("mean", "std"):
        if name in state:
            model.get_buffer(name).copy_(state.pop(name))
    for name in ("module.", "backbone.", "encoder."):
        state = {k[len(name) :]: x for k, x in state.items() if k.startswith(name)} or state
    unused = ("fc.", "classifier.", "features.18.", "head.")
    state = {key: value for key, value in state.items() if not key.startswith(unused)}
    load_exactly(model.backbone, state, weights)
