"""The equations of DiGA (Shen et al., CVPR 2023), one function each, on plain tensors.

Notation of the paper: S student, T teacher, f the features before the classifier, rho_k the
centroid of class k, y^p probability labels, y^f feature labels; H(p, q) is the cross-entropy.
Label maps are integers: classes 0 ... K-1, and 255 where a pixel is ignored.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from engine.kernels import upsampled_cross_entropy

IGNORED = 255
CONFIDENT = 0.968  # a pixel's probability (DACS)


def upsample(maps, size):
    """Return maps (B, K, h, w) at `size` (H, W), float32: bilinear, aligned corners."""
    return F.interpolate(maps.float(), size=tuple(size), mode="bilinear", align_corners=True)


def at_size(labels, size):
    """Return labels (B, H, W) at `size` (h, w), int64: those of the nearest pixels."""
    return F.interpolate(labels[:, None].float(), size=size, mode="nearest-exact")[:, 0].long()


def supervised_loss(logits, labels, weights=None):
    """Return L_ce = mean over pixels of -w log S(x)_y, a scalar; w = 1 without `weights`.

    The mean is over all pixels: ignored ones add nothing, but count in the divisor.
    logits: (B, K, h, w), upsampled to the labels' size. labels: (B, H, W) integers. weights: w,
    (B, H, W) float32.
    """
    size = labels.shape[-2:]
    return upsampled_cross_entropy(logits, labels.long(), size, IGNORED, weights) / labels.numel()


def ohem_loss(logits, labels, weights=None, threshold=0.7, min_pixels=100_000):
    """Return the cross-entropy over hard pixels (online hard example mining), a scalar.

    Hard are the labelled pixels whose class has a probability below `threshold`, and at least the
    `min_pixels` hardest ones. For SYNTHIA. The rest is as for supervised_loss.
    """
    logits, options = upsample(logits, labels.shape[-2:]), {"ignore_index": IGNORED}
    losses = F.cross_entropy(logits, labels.long(), reduction="none", **options).flatten()
    hardest = losses.detach().topk(min(min_pixels, losses.numel())).values[-1]
    hard = losses >= hardest.clamp(max=-math.log(threshold))
    hard &= labels.flatten() != IGNORED
    weight = hard if weights is None else hard * weights.flatten()
    return (losses * weight).sum() / hard.sum().clamp(min=1)


def symmetric_distillation(student, teacher, strong_to_weak=0.5, size=None):
    """Return L_kd = H(T(x_s), S(x_cdm)) + kappa H(T(x_cdm), S(x_s)), a scalar.

    H is averaged over all pixels; the teacher is detached; kappa = strong_to_weak.
    student, teacher: their logits for the weak views x_s and for the strong views x_cdm, a pair of
    (B, K, h, w). They are upsampled to `size` (H, W), or left as they are (None).
    """
    student_weak, student_strong = student
    teacher_weak, teacher_strong = teacher
    size = torch.Size(size or student_weak.shape[-2:])
    weak_to_strong = upsampled_cross_entropy(student_strong, teacher_weak.detach(), size)
    back = upsampled_cross_entropy(student_weak, teacher_strong.detach(), size)
    return (weak_to_strong + strong_to_weak * back) / (len(student_weak) * size.numel())


def probability_labels(logits, size):
    """Return y^p, the argmax of the elementwise maximum of the logits at several scales.

    logits: a list of (B, K, h, w), each upsampled to `size` (H, W). Returns (B, H, W) int64.
    """
    return _best(logits, size).argmax(1)


def confidence(logits, size):
    """Return the probability of the class in probability_labels, (B, H, W) float32."""
    return _best(logits, size).softmax(1).amax(1)


def _best(logits, size):
    return functools.reduce(torch.maximum, (upsample(scale, size) for scale in logits))


def confident_share(logits, size):
    """Return q of DACS, the share of confident pixels of its image, at each pixel (B, H, W)."""
    is_confident = (confidence([logits], size) >= CONFIDENT).float()
    return is_confident.mean((1, 2), keepdim=True).expand_as(is_confident)


def bilateral_consensus(probability_labels, feature_labels):
    """Return y_t: y^p where y^p = y^f, else 255. All (B, H, W) of one integer dtype."""
    return torch.where(probability_labels == feature_labels, probability_labels, IGNORED)


def semantic_edge_loss(translated, images, labels):
    """Return the L1 distance of G(x_s) and x_s at semantic edges, averaged over all pixels.

    An edge is where the Laplacian of a class's indicator is not zero: a pixel above, below, left or
    right has another label. translated, images: (B, 3, H, W). labels: (B, H, W). Returns a scalar.
    """
    padded = F.pad(labels[:, None].float(), (1, 1, 1, 1), mode="replicate")
    vertical = padded[..., :-2, 1:-1], padded[..., 2:, 1:-1]
    horizontal = padded[..., 1:-1, :-2], padded[..., 1:-1, 2:]
    edge = torch.stack([near != labels[:, None] for near in (*vertical, *horizontal)]).any(0)
    return ((translated - images).abs() * edge).mean()


class Centroids(nn.Module):
    """rho_k, one running mean feature per class.

    Buffers, so that a checkpoint holds them: vectors (K, C) float32, zero for a class that was
    never seen; counts (K,) int64, the images in each mean, at most `cap`.
    """

    def __init__(self, num_classes, channels, momentum=1e-4, cap=3000):
        super().__init__()
        self.momentum, self.cap = momentum, cap
        self.register_buffer("vectors", torch.zeros(num_classes, channels))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.long))

    def class_means(self, features, logits, labels=None, min_pixels=5):
        """Return the mean feature of each class in each image: means (B K, C), classes (B K,).

        A pixel is of class k if it is predicted, and (given labels) labelled, as k. A class with
        fewer than `min_pixels` pixels in an image is a row of class 255.
        features: (B, C, h, w). logits: (B, K, h, w). labels: (B, H, W), resized to (h, w).
        """
        predicted = logits.argmax(1)
        if labels is not None:
            labels = at_size(labels, predicted.shape[-2:])
            predicted = torch.where(predicted == labels, predicted, IGNORED)
        return self.label_means(features, predicted, min_pixels)

    def label_means(self, features, labels, min_pixels=5):
        """Return what class_means does, where labels (B, h, w) alone say what a pixel is."""
        classes = torch.arange(len(self.vectors), device=labels.device)
        member = (labels.flatten(1)[:, None] == classes[:, None]).float()
        pixels = member.sum(2)
        means = member @ features.float().flatten(2).transpose(1, 2)
        means = (means / pixels.clamp(min=1)[..., None]).flatten(0, 1)
        return means, torch.where(pixels >= min_pixels, classes, IGNORED).flatten()

    def accumulate(self, means, classes):
        """Update rho_k <- rho_k + (mean - rho_k) / (n_k + 1), row by row; n_k is capped."""
        for mean, k in zip(means, classes.tolist(), strict=True):
            if k != IGNORED:
                self.vectors[k] += (mean - self.vectors[k]) / (self.counts[k] + 1)
                self.counts[k] = (self.counts[k] + 1).clamp(max=self.cap)

    def move(self, means, classes):
        """Update rho_k <- (1 - m) rho_k + m mean, row by row; rows of class 255 change nothing.

        In closed form: a row that is followed by j rows of its class has the weight m (1 - m)^j.
        """
        classes_of_rows = torch.arange(len(self.vectors), device=classes.device)
        row_of = (classes[:, None] == classes_of_rows).float()
        later = (row_of.flip(0).cumsum(0).flip(0) - 1).clamp(min=0)
        weights = self.momentum * (1 - self.momentum) ** later * row_of
        kept = (1 - self.momentum) ** row_of.sum(0)
        self.vectors.copy_(kept[:, None] * self.vectors + weights.T @ means.float())

    def assign(self, features, size):
        """Return y^f = argmax_k upsample(softmax_k(-||f - rho_k||_2)), (B, H, W) int64.

        features: (B, C, h, w). size: (H, W).
        """
        pixels = features.float().flatten(2).transpose(1, 2)
        distance = torch.cdist(pixels, self.vectors[None].expand(len(pixels), -1, -1))
        # classes first, as in the authors' code: rounding decides between classes never seen
        distance = distance.transpose(1, 2).unflatten(2, features.shape[-2:])
        closeness = (-distance).contiguous().softmax(1)
        return upsample(closeness, size).max(1).indices  # on a CPU 10 times as fast as argmax


class LogitAlignment(Centroids):
    """The mean logits of each label, against classes that are predicted too often or too rarely.

    After BLDA (Li et al., ICML 2025), with means in the place of mixtures of Gaussians.
    """

    def __init__(self, num_classes, weight=1.0, momentum=0.02):
        super().__init__(num_classes, num_classes, momentum)
        self.weight = weight
        self.rows = []  # class means of this step, for `move`

    def forward(self, logits, labels):
        """Return logits + w (mu_yk - a), (B, K, h, w), for a loss that lowers what exceeds a.

        mu_yk: the mean logit of class k on label y. a: its anchor, the mean of mu_yy over labels
        for k = y, the mean of the others elsewhere. Nothing is added where a pixel is ignored.
        logits: (B, K, h, w). labels: (B, H, W).
        """
        labels = at_size(labels, logits.shape[-2:])
        self.rows.append(self.label_means(logits.detach(), labels))
        means = self.vectors - self.vectors.mean(1, keepdim=True)  # a softmax does not see it
        own = torch.eye(len(means), device=means.device)
        seen = means.any(1, keepdim=True)
        for part in (own, 1 - own):
            means = means - part * (means * part).sum() / (seen * part).sum().clamp(min=1)
        shift = F.pad(self.weight * means * seen, (0, 0, 0, 1))[labels.clamp(max=len(means))]
        return logits + shift.permute(0, 3, 1, 2).to(logits.dtype)
