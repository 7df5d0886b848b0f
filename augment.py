"""Views of a batch on the device: the strong view, CrDoMix and class mixing.

Every random number is an input. `draws` (B, DRAWS) float32 in [0, 1) comes with each image, a pure
function of (seed, stage, step, index): a step has the same views on any machine and in any number
of processes. Images are (B, 3, H, W) float32, RGB in [0, 1]; labels (B, H, W) int64, 255 ignored.
"""

import functools

import torch
import torch.nn.functional as F

IGNORED = 255
DRAWS = 8 + 256 + 256  # per image: for the strong view, CrDoMix's classes, class mixing's classes
FOR_STRONG, FOR_CRDOMIX, FOR_MIXING = slice(0, 8), slice(8, 264), slice(264, 520)
GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601 luma, as in torchvision
SECTORS = (5, 3, 1)  # of red, green and blue in the circle of hues
GAUSSIAN = (0.319168, 0.361664, 0.319168)  # three taps, sigma 2
SMOOTHING = ((1 / 13,) * 3, (1 / 13, 5 / 13, 1 / 13), (1 / 13,) * 3)  # as in torchvision


def cross_domain_mix(images, labels, translated, draws, beta):
    """Return CrDoMix's x_cdm = M x~_s + (1 - M) G(x_s), (B, 3, H, W).

    M covers half of the classes of y_s. translated: G(x_s), or None: x_cdm is x~_s then.
    """
    strong = strong_view(images, draws, beta)
    if translated is None:
        return strong
    mask = class_mask(labels, choose_classes(labels, draws[:, FOR_CRDOMIX]))
    return mix(mask, strong, translated)


def class_mix(source, target, beta):
    """Return class mixing's x_mix = M' x_s + (1 - M') x~_t, and y_mix, w_mix, mixed alike (DACS).

    source: images x_s, labels y_s, draws, which choose M'; the weak view, of weight 1. target:
    images x_t, labels y_t, their weights (B, H, W) float32, draws, which make the strong view x~_t.
    """
    images, labels, draws = source
    target_images, target_labels, target_weights, target_draws = target
    mask = class_mask(labels, choose_classes(labels, draws[:, FOR_MIXING]))
    x_mix = mix(mask, images, strong_view(target_images, target_draws, beta))
    weights = mix(mask, torch.ones_like(target_weights), target_weights)
    return x_mix, mix(mask, labels, target_labels), weights


def strong_view(images, draws, beta):
    """Return x~ = beta A(x) + (1 - beta) x, (B, 3, H, W), with an A of its own for each image.

    A: colour jitter (brightness 0.4, contrast 0.4, saturation 0.2, hue 0.1; p 0.5), grayscale
    (p 0.3), 3x3 Gaussian blur (sigma 2, p 0.8), sharpness 0.5 (p 0.3).
    """
    draws = draws[:, FOR_STRONG, None, None, None]
    spread = (2 * draws[:, 1:5] - 1) * (draws[:, :1] < 0.5)
    view = (images * (1 + 0.4 * spread[:, 0])).clamp(0, 1)
    view = _blend(gray(view).mean((1, 2, 3), keepdim=True), view, 1 + 0.4 * spread[:, 1])
    view = _blend(gray(view), view, 1 + 0.2 * spread[:, 2])
    view = shift_hue(view, 0.1 * spread[:, 3])
    view = torch.where(draws[:, 5] < 0.3, gray(view), view)
    gaussian = _constant(GAUSSIAN, images.device)
    view = torch.where(draws[:, 6] < 0.8, _filter(view, gaussian.outer(gaussian)), view)
    smooth = _filter(view, _constant(SMOOTHING, images.device))
    view = torch.where(draws[:, 7] < 0.3, _blend(smooth, view, 0.5), view)
    return torch.lerp(images, view, beta)


def gray(images):
    """Return the luma of images, (B, 1, H, W)."""
    return (images * _constant(GRAY, images.device)[:, None, None]).sum(1, keepdim=True)


def shift_hue(images, turns):
    """Return images with their hue turned by `turns` (B, 1, 1, 1) full circles, in HSV space."""
    red, green, blue = images.split(1, 1)
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    lower = torch.where(green == value, 2 * chroma + blue - red, 4 * chroma + red - green)
    hue = torch.where(red == value, green - blue, lower) / chroma.clamp(min=1e-8)
    sector = (hue + 6 * turns + _constant(SECTORS, images.device)[:, None, None]) % 6
    turned = value - chroma * torch.minimum(sector, 4 - sector).clamp(0, 1)
    return turned.contiguous(memory_format=torch.channels_last)  # for the convolutions to come


def _blend(base, images, factor):
    """Return base + factor (images - base), clamped to [0, 1]."""
    return (base + factor * (images - base)).clamp(0, 1)


def _filter(images, kernel):
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel.expand(3, 1, 3, 3), groups=3)


@functools.cache
def _constant(values, device):
    """Return a float32 tensor, made once: a copy to a GPU makes the host wait."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def choose_classes(labels, scores):
    """Return which label values to take, (B, 256) bool, for class_mask.

    Half of the values present, rounded down, those with the highest scores; 255 counts as one of
    them, and is always taken. scores: (B, 256), uniform draws.
    """
    present = torch.zeros_like(scores).scatter_(1, labels.flatten(1), 1.0)
    rank = (scores * present).argsort(1, descending=True).argsort(1)
    chosen = (rank < present.sum(1, keepdim=True) // 2) & present.bool()
    chosen.select(1, IGNORED).fill_(True)  # an assignment would copy True to the device
    return chosen


def class_mask(labels, chosen):
    """Return M, (B, 1, H, W) bool: True where the label is one of the image's chosen values."""
    return chosen.gather(1, labels.long().flatten(1)).view_as(labels)[:, None]


def mix(mask, front, back):
    """Return M front + (1 - M) back, for images (B, 3, H, W) or label maps (B, H, W)."""
    mask = mask.bool() if front.dim() == 4 else mask[:, 0].bool()
    return torch.where(mask, front, back)
