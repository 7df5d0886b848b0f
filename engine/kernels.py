"""Cross-entropy of upsampled logits, without the full-size maps of a batch in memory."""

import functools

import torch

BAND = {"cpu": 2**19, "cuda": 2**24}  # elements of a band's maps: a CPU's cache; a crop on a GPU


def upsampled_cross_entropy(logits, target, size, ignore_index=-100, weights=None):
    """Return the sum over all pixels of -w log q_y, or of H(p, q), as a scalar that has gradients.

    q = softmax(upsampled logits), in float32; upsampling is bilinear with aligned corners.
    logits: (B, K, h, w) float. size: (H, W). target: labels y (B, H, W) int64, `ignore_index` where
    a pixel is left out; or logits (B, K, h, w) float, whose upsampled softmax is p (no gradient).
    weights: w (B, H, W) float32 beside labels; None: 1.
    """
    return _CrossEntropy.apply(logits, target, size, ignore_index, weights)


class _CrossEntropy(torch.autograd.Function):
    """Goes through bands of rows, with their gradients; upsampling is two matrix products."""

    @staticmethod
    def forward(ctx, logits, target, size, ignore_index, weights):
        (height, width), (classes, h, w), device = size, logits.shape[1:], logits.device
        down, across = _bilinear(height, h, device), _bilinear(width, w, device)
        rows = max(BAND[device.type] // (classes * width), 1)
        gradient = torch.empty_like(logits, dtype=torch.float32)
        total = torch.zeros((), device=device)
        for b in range(len(logits)):
            z = logits[b].float() @ across.T
            gradient_z = torch.zeros(classes, h, width, device=device)
            z_target = target[b].float() @ across.T if target.is_floating_point() else target[b]
            for top in range(0, height, rows):
                band = down[top : top + rows]
                log_q = (band @ z).log_softmax(0)
                if target.is_floating_point():
                    p = (band @ z_target).softmax(0)
                    total -= torch.dot(p.flatten(), log_q.flatten())
                    full = log_q.exp_().sub_(p)
                else:
                    y = z_target[top : top + rows][None]
                    weight = known = y != ignore_index
                    if weights is not None:
                        weight = known * weights[b, top : top + rows]
                    y = torch.where(known, y, 0)
                    total -= (log_q.gather(0, y) * weight).sum()
                    one = log_q.new_full((), -1).expand(y.shape)
                    full = log_q.exp_().scatter_add_(0, y, one).mul_(weight)
                gradient_z += band.T @ full
            gradient[b] = gradient_z @ across
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, above):
        return (ctx.saved_tensors[0] * above).to(ctx.dtype), None, None, None, None


@functools.cache
def _bilinear(outputs, inputs, device):
    """Return the matrix (outputs, inputs) of linear interpolation with aligned corners."""
    at = torch.linspace(0, inputs - 1, outputs, device=device)[:, None]
    return (1 - (at - torch.arange(inputs, device=device)).abs()).clamp(min=0)
