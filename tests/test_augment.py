"""Strong views against torchvision, class choice and masks against plain loops."""

import pytest
import torch
import torchvision.transforms.v2.functional as tv

import augment


def images(n=6, size=(20, 24)):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(1))


def draws_of(n=6):
    return torch.rand(n, augment.DRAWS, generator=torch.Generator().manual_seed(2))


def torchvision_view(image, draws, beta):
    """One image through torchvision's operations, in the order of the docstring."""
    jitter, brightness, contrast, saturation, hue, grayscale, blur, sharpness = draws.tolist()
    view = image
    if jitter < 0.5:
        view = tv.adjust_brightness(view, 1 + 0.4 * (2 * brightness - 1))
        view = tv.adjust_contrast(view, 1 + 0.4 * (2 * contrast - 1))
        view = tv.adjust_saturation(view, 1 + 0.2 * (2 * saturation - 1))
        view = tv.adjust_hue(view, 0.1 * (2 * hue - 1))
    if grayscale < 0.3:
        view = tv.rgb_to_grayscale(view, 3)
    if blur < 0.8:
        view = tv.gaussian_blur(view, 3, 2.0)
    if sharpness < 0.3:
        view = tv.adjust_sharpness(view, 0.5)
    return beta * view + (1 - beta) * image


def test_strong_view_is_torchvisions_image_by_image():
    n = 64
    x, draws = images(n), draws_of(n)
    ours = augment.strong_view(x, draws, beta=0.4)
    pairs = zip(x, draws[:, :8], strict=True)
    theirs = torch.stack([torchvision_view(image, d, 0.4) for image, d in pairs])
    # torchvision leaves the outermost pixels as they are when it sharpens
    torch.testing.assert_close(ours[..., 1:-1, 1:-1], theirs[..., 1:-1, 1:-1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_beta_is_the_share_of_the_augmented_image(beta):
    x, draws = images(), draws_of()
    full = augment.strong_view(x, draws, 1.0)
    assert not torch.equal(full, x)
    assert torch.equal(augment.strong_view(x, draws, beta), full if beta else x)
    assert full.min() >= 0
    assert full.max() <= 1


def test_gray_pixels_have_no_hue_to_turn():
    x = torch.linspace(0, 1, 16).view(1, 1, 4, 4).expand(2, 3, 4, 4)
    turned = augment.shift_hue(x, torch.tensor([0.3, -0.1]).view(2, 1, 1, 1))
    torch.testing.assert_close(turned, x)


def test_half_of_the_classes_present_and_always_the_ignored_region():
    g = torch.Generator().manual_seed(3)
    for _ in range(200):
        values = torch.randperm(19, generator=g)[: torch.randint(1, 19, (), generator=g)]
        if torch.rand((), generator=g) < 0.5:
            values = torch.cat([values, torch.tensor([255])])
        labels = values[torch.randint(0, len(values), (1, 8, 9), generator=g)]
        present = labels.unique()
        scores = torch.rand(1, 256, generator=g)
        chosen = augment.choose_classes(labels, scores)[0]
        best = sorted(present.tolist(), key=lambda k: -scores[0, k])[: len(present) // 2]
        assert chosen.nonzero().flatten().tolist() == sorted({*best, 255})


def test_crdomix_takes_chosen_classes_from_the_strong_view_and_the_rest_from_the_translation():
    x, translated, draws = images(), images().flip(0), draws_of()
    labels = torch.randint(0, 5, (6, 20, 24), generator=torch.Generator().manual_seed(4))
    labels[:, :3] = 255
    strong = augment.strong_view(x, draws, 0.4)
    mixed = augment.cross_domain_mix(x, labels, translated, draws, 0.4)
    for b in range(6):
        chosen = augment.choose_classes(labels, draws[:, 8:264])[b]
        for i in range(20):
            for j in range(24):
                wanted = strong if chosen[labels[b, i, j]] else translated
                assert torch.equal(mixed[b, :, i, j], wanted[b, :, i, j])
    assert torch.equal(augment.cross_domain_mix(x, labels, None, draws, 0.4), strong)


def test_class_mix_pastes_the_weak_source_and_its_labels():
    x, target, draws = images(), images().flip(0), (draws_of(), draws_of().flip(1))
    shares = torch.rand(6, 20, 24)
    g = torch.Generator().manual_seed(5)
    labels, target_labels = (torch.randint(0, 5, (6, 20, 24), generator=g) for _ in range(2))
    pair = (x, labels, draws[0]), (target, target_labels, shares, draws[1])
    mixed, mixed_labels, weights = augment.class_mix(*pair, 0.3)
    mask = augment.class_mask(labels, augment.choose_classes(labels, draws[0][:, 264:]))
    strong = augment.strong_view(target, draws[1], 0.3)
    assert torch.equal(weights, torch.where(mask[:, 0], torch.ones(()), shares))
    assert torch.equal(mixed, mask * x + ~mask * strong)
    assert torch.equal(mixed_labels, torch.where(mask[:, 0], labels, target_labels))
