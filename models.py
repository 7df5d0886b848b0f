"""The segmentation networks, their optimizer, the EMA teacher, and the loading of foreign weights.

A segmentation network takes RGB images (B, 3, H, W) in [0, 1] (it normalises them itself) and returns logits (B, K, h, w),
features (B, C, h, w), h about H / output stride, and the logits of its auxiliary classifier or None.
"""

import copy
import urllib.error
from collections import OrderedDict

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from config import Config, UserError, classes
from files import load_tensors
from processes import rank, total, world

NETWORKS = ("deeplab_v2_resnet101", "resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2")


class Segmenter(nn.Module):
    """A backbone, a head whose output is f, and a classifier of f; `channels` is the number of f's channels.

    divisor: what the backbone needs the sides of an image to be multiples of; others are scaled to the nearest. auxiliary:
    a second classifier, of the backbone's last output.
    """

    def __init__(self, backbone, head, classifier, divisor=1, auxiliary=None):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        self.backbone, self.head, self.classifier, self.auxiliary = backbone, head, classifier, auxiliary
        self.divisor = divisor
        self.channels = next(m.in_channels for m in classifier.modules() if isinstance(m, nn.Conv2d))

    def forward(self, images):
        if self.divisor > 1:
            size = [max((side + self.divisor // 2) // self.divisor, 1) * self.divisor for side in images.shape[-2:]]
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        maps = self.backbone((images - self.mean) / self.std)
        maps = maps if isinstance(maps, tuple) else (maps,)  # what the head takes
        features = self.head(*maps)
        deepest = maps[0][-1] if isinstance(maps[0], list) else maps[0]
        return self.classifier(features), features, self.auxiliary(deepest) if self.auxiliary else None


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


def build_segmenter(network, num_classes, output_stride=8, channels=256, weights=None, auxiliary=0):
    """A segmentation network by its name: one of NETWORKS, or smp/ARCHITECTURE/ENCODER of segmentation-models-pytorch.

    weights, of the backbone: "imagenet" (the library's, downloaded once), a file, or None: from scratch. auxiliary: the weight
    of the auxiliary classifier's loss; 0: it has none. Raises UserError where the weights cannot be had or do not fit.
    """
    if network.startswith("smp/"):
        backbone, head, classifier, divisor = _smp(network, num_classes, weights)
        deepest = backbone.out_channels[-1]
    else:
        backbone, deepest = _backbone(network, output_stride)
        head, divisor = Head(deepest, channels), 1
        classifier = nn.Conv2d(channels, num_classes, 1, bias=False)
    if auxiliary:
        auxiliary = nn.Sequential(nn.Conv2d(deepest, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, num_classes, 1))
    model = Segmenter(backbone, head, classifier, divisor, auxiliary or None)
    if weights == "imagenet" and not network.startswith("smp/"):
        load_exactly(backbone, backbone_weights(_imagenet_weights(network)), weights)
    elif weights not in (None, "imagenet"):
        state = load_tensors(weights)
        load_exactly(backbone, backbone_weights(state), weights)
        if "Scale.conv1.weight" in state:
            model.mean.copy_(torch.tensor(AUTHORS_BGR_MEAN[::-1])[:, None, None] / 255)
            model.std.fill_(1 / 255)
    return model


def backbone_weights(state):
    """A file's tensors under the names of its torchvision network, without the classifier.

    Takes torchvision's own layout; the old DeepLab one (`Scale.` before every name, for BGR images in 0 ... 255 less a mean);
    and ProDA's SimCLR one (a torchvision network under `state_dict`).
    """
    state = state.get("state_dict", state)
    caffe = "Scale.conv1.weight" in state
    state = {key.removeprefix("module.").removeprefix("Scale."): value for key, value in state.items()}
    state = {k: v for k, v in state.items() if not k.startswith(("fc.", "classifier.", "features.18.", "layer5."))}
    if caffe:
        state["conv1.weight"] = state["conv1.weight"].flip(1)
    norms = [key.removesuffix("running_var") for key in state if key.endswith("running_var")]
    # old PyTorch versions did not count batches
    return {f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms} | state


def _smp(name, num_classes, weights):
    """Encoder, decoder, the convolutions of the segmentation head, and what an image's sides are multiples of."""
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise UserError(f"model.network = {name} needs `pip install segmentation-models-pytorch`") from error
    _, architecture, encoder = name.split("/")
    pretrained = "imagenet" if weights == "imagenet" else None
    # a ViT then takes images of any size; smp's DPT works for patches of 16 pixels alone, to which timm resamples others
    more = {"dynamic_img_size": True, "patch_size": 16} if architecture == "DPT" else {}
    try:
        model = smp.create_model(architecture, encoder, pretrained, classes=num_classes, **more)
    except Exception as error:  # an unknown name, or no network to download from; of a dozen types
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model.network = {name} with model.weights = {weights}: {reason}") from error
    head = model.segmentation_head
    classifier = head.head if hasattr(head, "head") else head[0]  # without the upsampling that follows
    return model.encoder, model.decoder, classifier, 32  # an image is halved at most 5 times


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


class AdamW(torch.optim.AdamW):
    """torch's, to which tensors are given as views in the order of memory: on a CPU, it copies those that are channels-last."""

    def _init_group(self, group, *lists):
        answer = super()._init_group(group, *lists)  # which fills them: parameters, gradients, means, ...
        for tensors in lists:
            tensors[:] = [tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor for tensor in tensors]
        return answer


def build_optimizer(model, name, lr_backbone, lr_head, momentum, weight_decay, **_):
    """SGD or AdamW over the parameters that are not frozen, each in one group that keeps its base rate as `base_lr`.

    lr_backbone = 0 freezes the backbone.
    """
    groups = []
    if lr_backbone == 0:
        model.backbone.requires_grad_(False)
    for rate, of_backbone in ((lr_backbone, True), (lr_head, False)):
        parameters = [p for name, p in model.named_parameters() if name.startswith("backbone.") == of_backbone]
        groups.append({"params": [p for p in parameters if p.requires_grad], "lr": rate, "base_lr": rate})
    if name == "adamw":
        return AdamW(groups, weight_decay=weight_decay, fused=True)
    return torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay, fused=True)


def poly_lr(base, step, total, power):
    """Polynomial decay: base (1 - step / total)^power."""
    return base * (1 - step / total) ** power


def set_learning_rate(optimizer, step, total, power, warmup, **_):
    """Gives every group its base rate's poly_lr, which rises linearly over the first `warmup` steps."""
    for group in optimizer.param_groups:
        group["lr"] = poly_lr(group["base_lr"], step, total, power) * min(1, (step + 1) / (warmup + 1))


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
    """T: a frozen copy of S whose batch norm uses the batch's statistics, without dropout or any other randomness.

    Its running statistics do not move by its own forward passes; ema_update copies the student's.
    """
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
            module.train()
    return teacher


def ema_decay(step, limit=0.999):
    """alpha of the teacher's update at `step`, counted from 0: min(1 - 1 / (step + 1), limit)."""
    return min(1 - 1 / (step + 1), limit)


@torch.no_grad()
def ema_update(teacher, student, step, limit=0.999):
    """theta_T <- alpha theta_T + (1 - alpha) theta_S, alpha = ema_decay(step, limit); buffers (batch-norm statistics) are copied."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - ema_decay(step, limit))
    for dtype in {buffer.dtype for buffer in student.buffers()}:  # a list of one dtype is copied by one kernel
        ours, theirs = ([b for b in net.buffers() if b.dtype == dtype] for net in (teacher, student))
        torch._foreach_copy_(ours, theirs)


@torch.no_grad()
def recalibrate_batchnorm(model, batches):
    """Replaces the batch-norm running statistics by their plain average over `batches` of images, in one pass.

    Leaves the model in evaluation mode; one without batch norm, or with no batches, is otherwise left as it is. batches: len()
    counts those of all processes, iterating gives this one's; all have the same statistics in the end.
    """
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    share = int(rank() == 0)  # with no batches, all take the first process's statistics
    if len(batches):
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.track_running_stats = True  # a teacher's does not
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average, of this process's batches
            norm.train()
        share = 0
        for images in batches:
            model(images)
            share += 1 / len(batches)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.fill_(len(batches))
        model.eval()
    if world() > 1:
        for norm in norms:
            for statistic in (norm.running_mean, norm.running_var):
                statistic.copy_(total(share * statistic))
