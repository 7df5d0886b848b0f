"""Layouts, reading, geometry: what one sample is."""

from concurrent.futures import ProcessPoolExecutor

import cv2
import numpy as np
import pytest
from conftest import CLASSES, IDS, PALETTE, SIZE, ok, paletted_png, picture, refused, save
from PIL import Image

import datasets
from datasets import Crops, Images, Whole
from engine import folders
from engine.config import UserError
from engine.images import read_label, resize
from engine.loop import Run


def as_classes(label):
    classes = np.full(label.shape, 255, np.uint8)
    for k, name in enumerate(CLASSES):
        classes[label == IDS[name]] = k
    return classes


# ---------------------------------------------------------------- layouts


def test_gta5_with_paletted_labels_of_equal_colours(dataset, config):
    palette = np.random.default_rng(0).integers(0, 255, (35, 3))
    palette[34] = palette[IDS["car"]]  # as in GTA5, where two ids are drawn in one colour
    images = Images(config(), "source", labelled=True)
    assert len(images) == 6
    for i in range(6):
        image, label = picture(i)
        label[-4:, -4:] = 34
        (dataset / f"game/labels/{i:05d}.png").write_bytes(paletted_png(label, palette))
        assert np.array_equal(images.image(i), image)
        assert np.array_equal(images.label(i), as_classes(label))


def test_synthia_stores_the_class_in_the_first_of_three_16_bit_channels(dataset, config):
    ids = {"sky": 1, "road": 3, "car": 8}
    for i in range(2):
        image, label = picture(i)
        values = np.zeros((*SIZE, 3), np.uint16)
        for name, value in ids.items():
            values[label == IDS[name], 0] = value
        values[..., 1] = 40000  # instance numbers
        save(dataset / f"synthia/RGB/{i:07d}.png", image)
        save(dataset / f"synthia/GT/LABELS/{i:07d}.png", values)
    cfg = config("source.layout=synthia", f"source.root={dataset}/synthia", "source.ids=synthia")
    images = Images(cfg, "source", labelled=True)
    assert np.array_equal(images.label(1), as_classes(picture(1)[1]))


@pytest.mark.parametrize("split", [None, "train"])
def test_folder_with_any_extension(dataset, config, split):
    root = dataset / "own" / (split or "")
    image, label = picture(3)
    for name in ("a.png", "b.bmp", "sub/c.tiff", "d.JPG"):
        save(root / "images" / name, image)
        save(root / "labels" / name.replace(".JPG", ".png").replace(".bmp", ".tif"), label)
    ids = "{7: road, 23: sky, 26: car, 0: null}"
    own = ("source.layout=folder", f"source.root={dataset}/own", f"source.ids={ids}")
    cfg = config(*own, f"source.split={split or 'null'}")
    images = Images(cfg, "source", labelled=True)
    assert images.names == ["a.png", "b.bmp", "d.JPG", "sub/c.tiff"]
    for i in range(4):
        assert np.array_equal(images.label(i), as_classes(label))
    assert np.array_equal(images.image(3), image)


# layout, and a word -> where its images and labels are
PLACES = {
    '{"images":"rgb_*.png","labels":"seg_*"}': ("rgb_{}.png", "seg_{}.png"),
    '{"images":"cam/*/frame_*_rgb.png","labels":"cam/*/frame_*_mask.png"}':
        ("cam/{0}/frame_{0}_rgb.png", "cam/{0}/frame_{0}_mask.png"),
    '{"images":"town*/rgb/*","labels":"town*/seg/*"}': ("town1/rgb/{}.png", "town1/seg/{}.png"),
    "bdd100k 10k": ("images/10k/val/{}.png", "labels/sem_seg/masks/val/{}.png"),
    "bdd100k": ("images/val/{}.png", "labels/val/{}_train_id.png"),
    "bdd100k gtFine": ("images/val/{}.png", "gtFine/val/{}_train_id.png"),
    "mapillary": ("val/images/{}.png", "val/labels/{}.png"),
    "mapillary 1.2": ("val/images/{}.png", "val/v1.2/labels/{}.png"),
    "mapillary_v2": ("val/images/{}.png", "val/v2.0/labels/{}.png"),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_layout_is_a_pair_of_patterns(dataset, config, place):
    """A * stands for the same text, folders included; what fits neither pattern is left out."""
    for i, name in enumerate(("a1", "b2")):
        for file, array in zip(PLACES[place], picture(i), strict=True):
            save(dataset / "own" / file.format(name), array)
    save(dataset / "own/cam/a1/depth.png", picture(2)[0])
    cfg = config(f"val.layout={place.split()[0]}", "val.root=own")
    found = Images(cfg, "val", labelled=True).check()
    assert len(found) == 2
    for i in range(2):
        assert np.array_equal(found.image(i), picture(i)[0])
        assert np.array_equal(found.label(i), as_classes(picture(i)[1]))
    found.label_paths[1].unlink()
    with pytest.raises(UserError, match="has no label"):
        Images(cfg, "val", labelled=True)


# ---------------------------------------------------------------- what files may hold


@pytest.mark.parametrize("how", ["rgb", "palette", "mapping"])
def test_labels_in_colours_equal_those_of_numbers(dataset, config, how):
    expected = [Images(config(), "source", labelled=True).label(i) for i in range(6)]
    for i in range(6):
        path, label = dataset / f"game/labels/{i:05d}.png", picture(i)[1]
        save(path, PALETTE[label])
        if how == "palette":
            path.write_bytes(paletted_png(label, PALETTE))
    ids = "colours"
    if how == "mapping":
        ids = "{[128, 64, 128]: road, [0, 0, 142]: car, [70, 130, 180]: sky, [1, 2, 3]: null}"
    images = Images(config(f"source.ids={ids}"), "source", labelled=True).check()
    assert all(np.array_equal(images.label(i), expected[i]) for i in range(6))


def test_a_colour_of_no_class_is_ignored_and_many_are_warned_of(dataset, run, capsys):
    for i in range(6):
        colours = PALETTE[picture(i)[1]]
        colours[:30] = 9, 9, 9
        save(dataset / f"game/labels/{i:05d}.png", colours)
    code, _, err = run("warmup", "source.ids=colours", "warmup.crdomix=false", "warmup.steps=1")
    assert (code, err.count("of the labels' pixels are ignored")) == (0, 1)


@pytest.mark.parametrize("scaled", [cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_AREA])
def test_labels_that_scaling_gave_new_values_are_warned_of(dataset, config, capsys, scaled):
    folders.warn.cache_clear()
    for i in range(6):
        label = picture(i, (SIZE[0] * 2, SIZE[1] * 2))[1]
        label = cv2.resize(label, (SIZE[1] * 5 // 3, SIZE[0] * 5 // 3), interpolation=scaled)
        save(dataset / f"game/labels/{i:05d}.png", label)
        save(dataset / f"game/images/{i:05d}.png", PALETTE[label])
    Images(config(), "source", labelled=True).check()
    is_blended = scaled != cv2.INTER_NEAREST
    assert ("in its labels are blended with other values" in capsys.readouterr().err) == is_blended


def turned(path, array, orientation, mode=None, **options):
    """Save an array so that EXIF's orientation turns it into what was given; mode: Pillow's."""
    back = {3: 2, 6: 1, 8: 3}[orientation]  # quarter turns, counterclockwise
    exif = Image.Exif()
    exif[274] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.ascontiguousarray(np.rot90(array, back))).convert(mode)
    image.save(path, exif=exif, **options)


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_an_image_is_turned_as_exif_says_to_its_labels_size(dataset, config, orientation, kind):
    (image, label), name = picture(3), "00003"
    (dataset / f"game/images/{name}.png").unlink()
    options = {"quality": 100, "subsampling": 0} if kind == "jpg" else {}
    turned(dataset / f"game/images/{name}.{kind}", image, orientation, **options)
    images = Images(config(), "source", labelled=True).check()
    assert np.abs(images.image(3).astype(int) - image).mean() < 2
    assert np.array_equal(images.label(3), as_classes(label))
    for mode in ("L", "P"):  # a label that says so is turned, too
        turned(dataset / f"game/labels/{name}.png", label, orientation, mode)
        assert np.array_equal(images.check().label(3), as_classes(label))
    # a label that was never turned has the size of the file's pixels, which is not the image's
    if orientation != 3:
        save(dataset / f"game/labels/{name}.png", np.rot90(label))
        with pytest.raises(UserError, match="1 labels differ from their images in size"):
            Images(config(), "source", labelled=True).check()


def test_unequal_sizes_are_found_at_the_start_with_a_list_of_the_good_images(dataset, run):
    save(dataset / "game/labels/00004.png", picture(4, (48, 60))[1])
    given = ("warmup", "warmup.crdomix=false", "warmup.steps=1")
    listed = dataset / "runs/test/source.txt"
    outcome = run(*given)
    refused(outcome, "1 labels differ", "00004.png ((64, 48), (60, 48))", "source.list=runs/test")
    assert listed.read_text().split() == [f"{i:05d}.png" for i in range(6) if i != 4]
    ok(run(*given, f"source.list={listed}"))
    listed.unlink()
    for i in range(6):
        save(dataset / f"game/labels/{i:05d}.png", picture(i, (48, 60))[1])
    refused(run(*given, "--force"), "6 labels differ", "scale them to fit, without new values")
    assert not listed.exists()


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_palettes_indices_are_read(tmp_path, depth):
    rng = np.random.default_rng(depth)
    indices = rng.integers(0, 2**depth, (13, 29))
    palette = rng.integers(0, 256, (2**depth, 3))
    (tmp_path / "a.png").write_bytes(paletted_png(indices, palette, depth))
    assert np.array_equal(read_label(tmp_path / "a.png"), indices)


# ---------------------------------------------------------------- crops


def crops(cfg, steps=8, **more):
    images = Images(cfg, "source", labelled=True)
    return Crops(cfg, "test", "source", images, [1, 1], steps, **more)


def equal_samples(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_a_sample_is_a_pure_function_of_its_number(config):
    forwards, backwards = crops(config()), crops(config())
    samples = [forwards[n] for n in range(16)]
    assert all(equal_samples(samples[n], backwards[n]) for n in reversed(range(16)))
    with ProcessPoolExecutor(1) as pool:
        assert equal_samples(samples[5], pool.submit(crops(config()).__getitem__, 5).result())
    assert not equal_samples(samples[5], crops(config("seed=1"))[5])
    assert not np.array_equal(samples[5]["draws"], samples[6]["draws"])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_number_of_loader_processes_changes_nothing(config, workers):
    cfg = config(f"workers={workers}")
    batches = list(datasets.loader(Run(cfg, "test", "warmup"), crops(cfg), 2, 2))
    expected = crops(cfg)
    assert len(batches) == 7
    for step, batch in enumerate(batches, 1):
        for slot in range(2):
            for key, value in expected[2 * step + slot].items():
                assert np.array_equal(batch[key][slot], value)


def test_every_image_once_an_epoch(config):
    order = crops(config(), steps=9)
    seen = [order._index(n) for n in range(18)]
    assert sorted(seen[:6]) == sorted(seen[6:12]) == sorted(seen[12:]) == list(range(6))
    assert seen[:6] != seen[6:12]


def gradient(dataset, size=(60, 80)):
    """Write images whose red and green are the pixel's row and column, and a label of both."""
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]].astype(np.uint8)
    image = np.stack([rows * 4, columns * 3, rows * 0], -1)
    label = np.where((rows // 8 + columns // 8) % 2 == 0, IDS["road"], IDS["sky"]).astype(np.uint8)
    for i in range(6):
        save(dataset / f"game/images/{i:05d}.png", image)
        save(dataset / f"game/labels/{i:05d}.png", label)
    return image, label


def test_image_label_and_translations_share_one_geometry(dataset, config):
    """A translation of the image's size, and one of twice the size."""
    image, _ = gradient(dataset)
    cfg = config("source.sizes=[[48, 64], [60, 80]]")
    aligned = {"inverted": lambda _: 255 - image, "twice": lambda _: resize(image, (120, 160))}
    flips = scales = 0
    for n in range(40):
        sample = crops(cfg, 20, aligned=aligned)[n]
        picture, label = sample["image"].astype(int), sample["label"]
        assert picture.shape == (32, 40, 3)
        assert np.abs(255 - picture - sample["inverted"]).max() <= 1
        apart = (picture - sample["twice"])[2:-2, 2:-2]
        assert np.abs(apart).max() <= 6  # a pixel is 4 and 3
        assert np.abs(apart.mean((0, 1))).max() < 2
        rows, columns = picture[..., 0] / 4, picture[..., 1] / 3
        # where the label's pixel came from, read off the image: half a pixel of doubt at borders
        inside = (np.abs((rows + 0.5) % 8 - 4) < 3) & (np.abs((columns + 0.5) % 8 - 4) < 3)
        inside &= (rows > 1) & (columns > 1)
        expected = np.where((rows // 8 + columns // 8) % 2 == 0, 0, 2)
        assert np.array_equal(label[inside], expected[inside])
        flips += columns[0, 0] > columns[0, -1]
        steps = np.abs(np.diff(columns[16])).mean(), np.diff(rows[:, 20]).mean()
        low, high = (1.0, 1 / 0.7) if n % 2 else (80 / 64, 80 / 64 / 0.7)
        assert all(low * 0.95 <= step <= high * 1.05 for step in steps)
        scales += abs(steps[0] - steps[1]) > 0.05
    assert 8 < flips < 32
    assert scales > 10  # each side has a factor of its own
    aligned = {"translated": lambda i: image if i else resize(image, (60, 120))}
    with pytest.raises(UserError, match=r"translated for 00000\.png: is 120x60, but 80x60"):
        [crops(cfg, 20, aligned=aligned)[n] for n in range(20)]


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((60, 80), (48, 64)),  # the shape of the size: both sides are scaled to it
        ((120, 40), (96, 32)),  # portrait among landscape: as many pixels, in its own shape
        ((59, 80), (48, 64)),  # 2% off, as in GTA5: to the size itself, as the paper has it
    ],
)
def test_the_scale_of_an_image(dataset, config, shape, sides):
    gradient(dataset, shape)
    size = ("source.sizes=[[48, 64], [48, 64]]", "min_scale=1.0", "crop=[16, 16]")
    wanted = np.divide(shape, sides) * (4, 3)  # of the gradient, from pixel to pixel
    for n in range(8):
        image = crops(config(*size))[n]["image"]
        rows, columns = image[..., 0].astype(float), image[..., 1].astype(float)
        found = np.diff(rows, axis=0).mean(), np.abs(np.diff(columns, axis=1)).mean()
        assert found == pytest.approx(wanted, rel=0.05)


def test_a_crop_of_one_class_is_drawn_again(dataset, config):
    def share_of_one_class(limit):
        sizes = ("source.sizes=[[60, 80], [60, 80]]", "crop=[16, 20]")
        samples = crops(config(f"max_class_share={limit}", *sizes), 40)
        counts = [np.bincount(samples[n]["label"].ravel()) for n in range(80)]
        return np.mean([count.max() / 320 > 0.75 for count in counts])

    for i in range(6):
        image, label = picture(i, (60, 80))
        save(dataset / f"game/images/{i:05d}.png", image)
        save(dataset / f"game/labels/{i:05d}.png", label)
    assert share_of_one_class(0.75) < 0.5 * share_of_one_class(1.0)


def test_whole_images_keep_their_proportions(dataset):
    save(dataset / "own/a.png", np.zeros((100, 50, 3), np.uint8))
    sample = Whole(folders.Folder(dataset / "own"), [50, 100])[0]
    assert sample["image"].shape == (100, 50, 3)
    assert Whole(folders.Folder(dataset / "own"), [20, 40])[0]["image"].shape == (40, 20, 3)
