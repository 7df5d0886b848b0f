"""The methods that DiGA is compared with: their parts against plain versions, and whole runs."""

import numpy as np
import pytest
import torch
from conftest import killed_after, log, ok, same_networks, save

from datasets import Crops, Images, RareClasses
from tools import baselines


def test_rare_class_sampling_draws_classes_by_the_published_formula(dataset, config):
    label = np.full((48, 64), 7, np.uint8)  # road alone: this image is drawn for road only
    save(dataset / "game/labels/00000.png", label)
    images, temperature = Images(config(), "source", labelled=True), 0.3
    labels = np.stack([images.label(i) for i in range(len(images))])
    frequency = np.array([(labels == k).mean((1, 2)).sum() for k in range(3)])
    frequency /= frequency.sum()
    expected = np.exp((1 - frequency) / temperature)
    expected /= expected.sum()

    rare, rng = RareClasses(images, 3, temperature), np.random.default_rng(0)
    drawn = [rare.draw(rng) for _ in range(4000)]
    counts = np.bincount([k for _, k in drawn], minlength=3) / len(drawn)
    np.testing.assert_allclose(counts, expected, atol=0.03)
    assert {i for i, k in drawn if k == 0} == set(range(6))
    assert {i for i, k in drawn if k == 1} == set(range(1, 6))
    for i, k in drawn[:50]:
        assert (labels[i] == k).mean() >= RareClasses.LEAST


def test_crops_of_rare_classes_hold_the_class_and_depend_on_their_number_alone(dataset, config):
    for i in range(4):
        save(dataset / f"game/labels/{i:05d}.png", np.full((48, 64), 7, np.uint8))
    images = Images(config("crop=[16,16]"), "source", labelled=True)
    arguments = config("crop=[16,16]"), "warmup", "source", images, [1, 1], 100
    common, rare = Crops(*arguments), Crops(*arguments, rare=0.05)
    cars = [
        np.mean([(crops[n]["label"] == 1).mean() for n in range(60)]) for crops in (common, rare)
    ]
    assert cars[1] > 1.3 * cars[0]
    for n in (7, 3, 7):
        again = Crops(*arguments, rare=0.05)[n]
        assert all(np.array_equal(rare[n][key], again[key]) for key in again)


def test_a_masked_view_hides_square_blocks():
    torch.manual_seed(0)
    images, colour = torch.rand(8, 3, 49, 70), torch.full((3, 1, 1), 2.0)
    view = baselines.masked_view(images, 0.7, colour)
    hidden = (view == 2).all(1)
    assert torch.equal(view.movedim(1, -1)[~hidden], images.movedim(1, -1)[~hidden])
    assert hidden.float().mean() == pytest.approx(0.7, abs=0.02)
    for top in range(0, 48, 3):  # blocks of 49 // 16 pixels
        for left in range(0, 69, 3):
            block = hidden[:, top : top + 3, left : left + 3].flatten(1)
            assert torch.equal(block.all(1), block.any(1))


@pytest.mark.parametrize("method", baselines.METHODS)
def test_a_method_trains_for_as_many_steps_as_all_of_diga_and_is_scored(dataset, run, method):
    name = f"name={method}"
    ok(run("tools.baselines", "--method", method, name))
    lines = log(dataset / "runs" / method)
    assert lines[-1]["finished"] == 6 + 2 * 4
    assert ("confident" in lines[-1]) == (method != "source")
    assert "| " + method in ok(run("evaluate", "--weights", f"{method}.pth", name))


def test_a_method_resumes_exactly(dataset, run):
    ok(run("tools.baselines", "--method", "mic", "name=whole"))
    with killed_after(9):
        run("tools.baselines", "--method", "mic", "name=killed")
    ok(run("tools.baselines", "--method", "mic", "name=killed"))
    assert same_networks(dataset / "runs/whole/mic.pth", dataset / "runs/killed/mic.pth")


def test_rare_class_sampling_in_the_stages(dataset, run):
    more = ("name=rare", "rare_classes=0.1", f"translation.images={dataset}/game/images")
    ok(run("warmup", *more))
    ok(run("selftrain", *more, "selftrain.rounds=1"))
    ok(run("warmup", *more, "name=uniform", "rare_classes=0"))
    rare, uniform = (dataset / f"runs/{name}/warmup.pth" for name in ("rare", "uniform"))
    assert not same_networks(rare, uniform)
