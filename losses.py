"""The equations of DiGA (Shen et al., CVPR 2023), one function each, on plain tensors.

Notation as in the paper: S student, T teacher, f the features before the classifier, rho_k the centroid of class k,
y^p the probability labels, y^f the feature labels. Label maps hold classes 0 ... K-1 and 255 where a pixel is ignored.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

IGNORED = 255


def upsample(maps, size):
    """Maps (B, K, h, w) to single-precision maps (B, K, *size): bilinear, corner pixels aligned, as in DeepLab-V2."""
    return F.interpolate(maps.float(), size=tuple(size), mode="bilinear", align_corners=True)


class _CrossEntropy(torch.autograd.Function):
    """The sum over all pixels of -log q_y, or of H(p, q), q = softmax(logits upsampled to `size`).

    labels (B, H, W), or teacher_logits (B, K, h, w), which p is the softmax of, upsampled as well. The full-size maps of a
    few rows of one image exist at a time, and stay in the cache: the gradient is made at the logits' own size on the way
    forward. Upsampling is two matrix products, and so is its gradient.
    """

    @staticmethod
    def forward(ctx, logits, size, labels, teacher_logits):
        (height, width), (classes, h, w), device = size, logits.shape[1:], logits.device
        down, across = _bilinear(height, h, device), _bilinear(width, w, device)
        rows = max(BAND[device.type == "cuda"] // (classes * width), 1)
        gradient = torch.empty_like(logits, dtype=torch.float32)
        total = torch.zeros((), device=device)
        for b in range(len(logits)):
            z, gradient_z = logits[b].float() @ across.T, torch.zeros(classes, h, width, device=device)
            teacher_z = None if teacher_logits is None else teacher_logits[b].float() @ across.T
            for top in range(0, height, rows):
                band = down[top : top + rows]
                log_q = (band @ z).log_softmax(0)
                if teacher_z is None:
                    y = labels[b, top : top + rows][None]
                    known, y = y != IGNORED, torch.where(y == IGNORED, 0, y)
                    total -= (log_q.gather(0, y) * known).sum()
                    full = log_q.exp_().scatter_add_(0, y, log_q.new_full((), -1).expand(y.shape)).mul_(known)
                else:
                    p = (band @ teacher_z).softmax(0)
                    total -= torch.dot(p.flatten(), log_q.flatten())
                    full = log_q.exp_().sub_(p)
                gradient_z += band.T @ full
            gradient[b] = gradient_z @ across
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, above):
        return (ctx.saved_tensors[0] * above).to(ctx.dtype), None, None, None


BAND = (2**19, 2**24)  # elements of a band's maps, on a CPU and on a GPU


@functools.cache
def _bilinear(outputs, inputs, device):
    """The matrix (outputs, inputs) of linear interpolation, corner pixels aligned; made once for each size."""
    at = torch.linspace(0, inputs - 1, outputs, device=device)[:, None]
    return (1 - (at - torch.arange(inputs, device=device)).abs()).clamp(min=0)


def supervised_loss(logits, labels):
    """L_ce: cross-entropy of S(x) against y, averaged over all pixels, the ignored ones counted in the divisor.

    logits (B, K, h, w), upsampled to the labels' size first; labels (B, H, W), integers. Returns a scalar.
    """
    return _CrossEntropy.apply(logits, labels.shape[-2:], labels.long(), None) / labels.numel()


def ohem_loss(logits, labels, threshold=0.7, min_pixels=100_000):
    """Cross-entropy over hard pixels alone (online hard example mining), for SYNTHIA: averaged over those that are kept.

    Kept are the labelled pixels whose class has a probability below `threshold`, and at least the `min_pixels` hardest
    (all, where there are fewer). Shapes as for supervised_loss. Returns a scalar.
    """
    logits = upsample(logits, labels.shape[-2:])
    losses = F.cross_entropy(logits, labels.long(), ignore_index=IGNORED, reduction="none").flatten()
    hardest = losses.detach().topk(min(min_pixels, losses.numel())).values[-1]
    kept = (losses >= hardest.clamp(max=-math.log(threshold))) & (labels.flatten() != IGNORED)
    return (losses * kept).sum() / kept.sum().clamp(min=1)


def symmetric_distillation(student_logits, teacher_logits, strong_to_weak=0.5, size=None):
    """L_kd = H(T(x_s), S(x_cdm)) + kappa H(T(x_cdm), S(x_s)), H averaged over all pixels, the teacher detached.

    Both (2B, K, h, w): the weak views x_s in the first half of the batch, the strong views x_cdm in the second, in the
    same order; upsampled to `size` first (None: as they are). kappa = strong_to_weak. Returns a scalar.
    """
    size = torch.Size(size or student_logits.shape[-2:])
    student_weak, student_strong = student_logits.chunk(2)
    teacher_weak, teacher_strong = teacher_logits.detach().chunk(2)
    weak_to_strong = _CrossEntropy.apply(student_strong, size, None, teacher_weak)
    kd = weak_to_strong + strong_to_weak * _CrossEntropy.apply(student_weak, size, None, teacher_strong)
    return kd / (len(student_weak) * size.numel())


def probability_labels(logits, size):
    """y^p: argmax of the elementwise max of the logits at several resolutions, each upsampled to `size` first.

    logits: a list of (B, K, h, w). Returns (B, *size), int64.
    """
    best = upsample(logits[0], size)
    for other in logits[1:]:
        best = torch.maximum(best, upsample(other, size))
    return best.argmax(1)


def bilateral_consensus(probability_labels, feature_labels):
    """y_t: the label that y^p and y^f agree on, 255 where they differ. Both (B, H, W) of one integer type."""
    return torch.where(probability_labels == feature_labels, probability_labels, IGNORED)


def semantic_edge_loss(translated, images, labels):
    """L1 between G(x_s) and x_s at semantic edges, averaged over all pixels.

    An edge is where the Laplacian of some class's indicator is not zero: a neighbour above, below, left or right has
    another label. translated, images (B, 3, H, W); labels (B, H, W), integers. Returns a scalar.
    """
    padded = F.pad(labels[:, None].float(), (1, 1, 1, 1), mode="replicate")
    neighbours = (padded[..., :-2, 1:-1], padded[..., 2:, 1:-1], padded[..., 1:-1, :-2], padded[..., 1:-1, 2:])
    edge = torch.stack([neighbour != labels[:, None] for neighbour in neighbours]).any(0)
    return ((translated - images).abs() * edge).mean()


class Centroids(nn.Module):
    """rho_k: one running mean feature per class.

    vectors (K, C), single precision, zero for a class that was never seen; counts (K,), the images behind each vector,
    at most `cap`. Both are buffers, so that a checkpoint holds them.
    """

    def __init__(self, num_classes, channels, momentum=1e-4, cap=3000):
        super().__init__()
        self.momentum, self.cap = momentum, cap
        self.register_buffer("vectors", torch.zeros(num_classes, channels))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.long))

    def class_means(self, features, logits, labels=None, min_pixels=5, padded=False):
        """Per image, the mean feature over the pixels predicted as class k (and, given labels, labelled k as well).

        features (B, C, h, w), logits (B, K, h, w); labels (B, H, W), taken at (h, w) by nearest neighbour.
        Returns means (M, C) and classes (M,), ordered by image, then class; classes with fewer than `min_pixels` such
        pixels in an image are left out. With `padded` they stay, as rows of class 255: M = B * K whatever the data, so
        that nothing waits for the device.
        """
        predicted = logits.argmax(1)
        if labels is not None:
            labels = F.interpolate(labels[:, None].float(), size=predicted.shape[-2:], mode="nearest-exact")[:, 0]
            predicted = torch.where(predicted == labels, predicted, IGNORED)
        classes = torch.arange(logits.shape[1], device=logits.device)
        member = (predicted.flatten(1)[:, None] == classes[:, None]).float()
        pixels = member.sum(2)
        means = (member @ features.float().flatten(2).transpose(1, 2) / pixels.clamp(min=1)[..., None]).flatten(0, 1)
        classes = torch.where(pixels >= min_pixels, classes, IGNORED).flatten()
        return (means, classes) if padded else (means[classes != IGNORED], classes[classes != IGNORED])

    def accumulate(self, means, classes):
        """rho_k <- rho_k + (mean - rho_k) / (n_k + 1), row by row: the running mean over images, n_k held at `cap`."""
        for mean, k in zip(means, classes.tolist(), strict=True):
            self.vectors[k] += (mean - self.vectors[k]) / (self.counts[k] + 1)
            self.counts[k] = (self.counts[k] + 1).clamp(max=self.cap)

    def move(self, means, classes):
        """rho_k <- (1 - m) rho_k + m mean, m = momentum, one row after the other; rows of class 255 are passed over.

        In closed form, since the order within a class is all that matters: a row that j rows of its class follow ends
        up with the weight m (1 - m)^j.
        """
        row_of = (classes[:, None] == torch.arange(len(self.vectors), device=classes.device)).float()
        later = (row_of.flip(0).cumsum(0).flip(0) - 1).clamp(min=0)
        weights = self.momentum * (1 - self.momentum) ** later * row_of
        kept = (1 - self.momentum) ** row_of.sum(0)
        self.vectors.copy_(kept[:, None] * self.vectors + weights.T @ means.float())

    def assign(self, features, size):
        """y^f = argmax_k upsample(softmax_k(-||f - rho_k||_2)).

        features (B, C, h, w), size (H, W). Returns (B, H, W), int64.
        """
        pixels = features.float().flatten(2).transpose(1, 2)
        distance = torch.cdist(pixels, self.vectors[None].expand(len(pixels), -1, -1))
        # classes outermost, as the authors have them: of classes with equal centroids, none having been seen, one wins by rounding
        closeness = (-distance).transpose(1, 2).unflatten(2, features.shape[-2:]).contiguous().softmax(1)
        return upsample(closeness, size).max(1).indices  # which is faster than argmax
