"""Draw the built-in benchmark: a procedural street world, seen by a game engine and by a camera.

    python -m tools.make_demo_data --cfg configs/demo.yaml        # a few seconds

The game's files go to source.root in GTA5's layout, the camera's to target.root in Cityscapes'
layout, splits train and val. Both domains draw their scenes from one distribution and differ in
appearance: palette, texture, light, haze, blur, noise, vignetting.
Every file is a pure function of (seed, split, number).
"""

import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to be run by its path too

from engine.command import arguments, command
from engine.files import write_text
from engine.images import write_image
from layouts import CITYSCAPES
from settings import load_config

HEIGHT, WIDTH, OVERSAMPLING = 128, 256, 2
SPLITS = {"game": 150, "train": 100, "val": 40}
# RGB in [0, 1]. An object takes one of its class's colours, with a small random deviation.
GAME = {
    "road": [(0.36, 0.36, 0.38)], "sidewalk": [(0.62, 0.58, 0.54), (0.66, 0.63, 0.60)],
    "building": [(0.80, 0.55, 0.38), (0.86, 0.78, 0.60), (0.62, 0.32, 0.26), (0.72, 0.72, 0.76)],
    "pole": [(0.30, 0.32, 0.34), (0.16, 0.17, 0.19)], "sky": [(0.35, 0.60, 0.95)],
    "vegetation": [(0.22, 0.55, 0.15), (0.35, 0.62, 0.18), (0.16, 0.44, 0.16)],
    "person": [(0.85, 0.20, 0.20), (0.20, 0.35, 0.80), (0.90, 0.80, 0.25), (0.55, 0.25, 0.60)],
    "car": [(0.85, 0.10, 0.10), (0.10, 0.25, 0.75), (0.95, 0.80, 0.10), (0.90, 0.90, 0.92)],
}  # fmt: skip
CAMERA = {
    "road": [(0.37, 0.36, 0.34)], "sidewalk": [(0.56, 0.53, 0.50), (0.51, 0.47, 0.44)],
    "building": [(0.60, 0.54, 0.47), (0.70, 0.67, 0.61), (0.50, 0.40, 0.35), (0.56, 0.56, 0.55)],
    "pole": [(0.13, 0.14, 0.13), (0.18, 0.17, 0.15)], "sky": [(0.86, 0.87, 0.86)],
    "vegetation": [(0.23, 0.31, 0.14), (0.29, 0.34, 0.17), (0.17, 0.25, 0.12)],
    "person": [(0.48, 0.18, 0.16), (0.18, 0.25, 0.45), (0.50, 0.44, 0.20), (0.36, 0.22, 0.36)],
    "car": [(0.12, 0.12, 0.13), (0.55, 0.56, 0.57), (0.30, 0.31, 0.33), (0.42, 0.14, 0.13)],
}  # fmt: skip
# Cityscapes' ids
LABEL = {name: CITYSCAPES[name][1] for name in GAME}
shrink = partial(cv2.resize, dsize=(WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)


class Scene:
    """Oversampled canvases (colour, label, distance) and a pinhole camera above a street along +Z.

    World coordinates are metres: X to the right, Y up, Z ahead.
    """

    def __init__(self, rng, palette):
        self.rng, self.palette = rng, palette
        self.height, self.width = HEIGHT * OVERSAMPLING, WIDTH * OVERSAMPLING
        self.colour = np.zeros((self.height, self.width, 3), np.float32)
        self.label = np.zeros((self.height, self.width), np.uint8)
        self.distance = np.full((self.height, self.width), 1000, np.float32)
        self.focal = self.width * rng.uniform(0.95, 1.2)
        self.eye = rng.uniform(1.3, 1.8)
        self.centre = self.width * rng.uniform(0.42, 0.58)
        self.horizon = self.height * rng.uniform(0.38, 0.48)

    def project(self, points):
        """Return the pixels (N, 2), as (x, y), of world points (N, 3)."""
        x, y, z = np.asarray(points, np.float64).T
        across = self.centre + self.focal * x / z
        down = self.horizon + self.focal * (self.eye - y) / z
        return np.stack([across, down], 1)

    def tint(self, name):
        """Return a random colour (3,) of the class `name`."""
        colour = np.array(self.palette[name][self.rng.integers(len(self.palette[name]))])
        return colour * self.rng.uniform(0.85, 1.15) + self.rng.normal(0, 0.02, 3)

    def fill(self, pixels, colour, name, distance):
        """Fill the polygon `pixels` (N, 2). Without a name, label and distance stay."""
        points = np.clip(np.rint(pixels * 16), -(2**24), 2**24).astype(np.int32)
        cv2.fillPoly(self.colour, [points], [float(c) for c in colour], cv2.LINE_8, 4)
        if name:
            cv2.fillPoly(self.label, [points], LABEL[name], cv2.LINE_8, 4)
            cv2.fillPoly(self.distance, [points], float(distance), cv2.LINE_8, 4)

    def quad(self, corners, colour, name=None):
        """Fill a quadrilateral, given by its four corners (X, Y, Z)."""
        self.fill(self.project(corners), colour, name, np.mean([z for _, _, z in corners]))

    def front(self, x, y, z, colour, name=None):
        """Fill a rectangle that faces the camera. x: (left, right); y: (bottom, top)."""
        (a, b), (low, high) = x, y
        self.quad([(a, low, z), (b, low, z), (b, high, z), (a, high, z)], colour, name)

    def side(self, x, y, z, colour, name=None):
        """Fill a rectangle along the street. y: (bottom, top); z: (near, far)."""
        (low, high), (near, far) = y, z
        self.quad([(x, low, near), (x, low, far), (x, high, far), (x, high, near)], colour, name)

    def disc(self, x, y, z, radius, colour, name, stretch=1.0):
        """Fill an upright ellipse. stretch: its height divided by its width."""
        angle = np.linspace(0, 2 * np.pi, 20)
        outline = np.stack([np.cos(angle), stretch * np.sin(angle)], 1)
        pixels = self.project([(x, y, z)]) + outline * (self.focal * radius / z)
        self.fill(pixels, colour, name, z)


def draw_ground(scene):
    """Draw road and sidewalks; return the X of both kerbs, then of both outer edges."""
    rng = scene.rng
    rows, columns = np.mgrid[0 : scene.height, 0 : scene.width].astype(np.float32)
    below = rows > scene.horizon + 0.5
    z = np.where(below, scene.focal * scene.eye / np.maximum(rows - scene.horizon, 0.5), 1000)
    x = (columns - scene.centre) * z / scene.focal
    left, right = -rng.uniform(2.2, 4.5), rng.uniform(2.2, 4.5)
    walk_left, walk_right = left - rng.uniform(3, 6), right + rng.uniform(3, 6)
    for name, inside in (
        ("vegetation" if rng.random() < 0.5 else "sidewalk", below),
        ("sidewalk", below & (x > walk_left) & (x < walk_right)),
        ("road", below & (x > left) & (x < right)),
    ):
        scene.colour[inside], scene.label[inside] = scene.tint(name), LABEL[name]
    scene.distance = np.where(below, np.minimum(z, 1000), scene.distance).astype(np.float32)
    # the grain is sampled in the plane of the street, so that it shrinks with distance
    grain = rng.normal(0, 1, (256, 256)).astype(np.float32)
    u, v = (x * 12) % 256, (z * 6) % 256
    grain = cv2.remap(grain, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    scene.colour[below] *= 1 + 0.05 * grain[below][:, None]
    if rng.random() < 0.8:
        lane = rng.uniform(left, right) * 0.3
        mark = below & (np.abs(x - lane) < 0.08) & ((z + rng.uniform(0, 6)) % 6 < 3)
        scene.colour[mark] = 0.8
    return left, right, walk_left, walk_right


def draw_building(scene, x, z0, z1, height, outward):
    """Draw a box whose facade stands at X = x. outward: -1 on the left side, 1 on the right."""
    rng, colour = scene.rng, scene.tint("building")
    window, light = colour * rng.uniform(0.35, 0.7), rng.uniform(0.7, 1.0)
    scene.front((x, x + outward * 14), (0, height), z0, colour * light, "building")
    scene.side(x, (0, height), (z0, z1), colour, "building")
    storey, bay = rng.uniform(2.6, 3.6), rng.uniform(1.8, 3.2)
    for y in np.arange(rng.uniform(0.8, 1.4), height - 1.2, storey):
        for z in np.arange(z0 + 0.5, z1 - 1.2, bay):
            scene.side(x, (y, y + 1.5), (z, z + 1.1), window)
        for a in np.arange(0.6, 12, bay) * outward + x:
            scene.front((a, a + 1.1 * outward), (y, y + 1.5), z0, window * light)


def draw_tree(scene, x, z):
    rng, colour, height = scene.rng, scene.tint("vegetation"), scene.rng.uniform(2.5, 5)
    trunk = [(x - 0.15, 0, z), (x + 0.15, 0, z), (x + 0.12, height, z), (x - 0.12, height, z)]
    scene.quad(trunk, np.array([0.25, 0.19, 0.14]), "vegetation")
    for _ in range(14):
        shade = colour * rng.uniform(0.7, 1.25)
        dx, dy = rng.normal(0, 0.9), rng.normal(0.6, 0.9)
        radius, stretch = rng.uniform(0.5, 1.1), rng.uniform(0.7, 1.1)
        scene.disc(x + dx, height + dy, z, radius, shade, "vegetation", stretch)


def draw_pole(scene, x, z):
    rng, colour, height = scene.rng, scene.tint("pole"), scene.rng.uniform(3.5, 7)
    r = rng.uniform(0.18, 0.28)
    scene.front((x - r, x + r), (0, height), z, colour, "pole")
    reach = -np.sign(x) * rng.uniform(0.6, 1.5)
    scene.front((x, x + reach), (height - 2 * r, height), z, colour, "pole")


def draw_person(scene, x, z):
    rng, coat, size = scene.rng, scene.tint("person"), scene.rng.uniform(0.9, 1.1)
    legs = scene.tint("person") * 0.6
    skin = np.array([0.72, 0.52, 0.42]) * rng.uniform(0.4, 1.1)
    stride = rng.uniform(0.05, 0.3)
    for side in (-1, 1):
        foot, hip, top = x + side * stride, x + 0.16 * side, 0.9 * size
        leg = [(foot - 0.12, 0, z), (foot + 0.12, 0, z), (hip + 0.12, top, z), (hip - 0.12, top, z)]
        scene.quad(leg, legs, "person")
    scene.disc(x, 1.15 * size, z, 0.3 * size, coat, "person", 1.35)
    scene.disc(x, 1.62 * size, z, 0.13 * size, skin, "person", 1.25)


def draw_car(scene, x, z):
    """Draw a car seen from behind: shadow, flank, rear, glass, lamps, wheels."""
    rng, colour = scene.rng, scene.tint("car")
    length, waist, roof = rng.uniform(3.4, 4.8), rng.uniform(0.8, 1.0), rng.uniform(1.35, 1.8)
    glass, dark = np.array([0.16, 0.19, 0.23]), np.array([0.07, 0.07, 0.08])
    half, end, a, b = 0.9, z + length, x - 0.9, x + 0.9
    near = -np.sign(x) * half + x  # the flank that the camera sees
    scene.quad([(a, 0.02, z), (b, 0.02, z), (near, 0.02, end), (near, 0.02, end)], dark * 1.5)
    scene.side(near, (0.25, waist), (z, end), colour * 0.8, "car")
    last = z + 0.85 * length
    top = [(near * 0.97 + x * 0.03, roof, last - 0.5), (near, roof, z + 0.2 * length)]
    scene.quad([(near, waist, z), (near, waist, last), *top], glass * 1.3, "car")
    scene.front((a, b), (0.25, waist), z, colour, "car")
    a_roof, b_roof = x - half * 0.8, x + half * 0.8
    top = [(b_roof, roof, z + 0.3), (a_roof, roof, z + 0.3)]
    scene.quad([(a, waist, z), (b, waist, z), *top], glass, "car")
    scene.front((a_roof, b_roof), (roof - 0.08, roof), z, colour * 1.1, "car")
    lamp = np.array([0.75, 0.08, 0.06])
    for side in (-1, 1):
        scene.disc(x + side * 0.7, 0.28, z, 0.28, dark, "car")
        scene.disc(x + side * 0.7, waist - 0.15, z - 0.01, 0.11, lamp, None)
    scene.disc(near, 0.3, z + length * 0.8, 0.3, dark, "car", 1.0)


def scatter(rng, draw, distances, counts, x):
    """Return (z, draw, its arguments) for a random number of objects. x: called for each X."""
    return [(z, draw, (x(), z)) for z in rng.uniform(*distances, rng.integers(*counts))]


def side_of_street(rng, side, kerb, edge):
    """Return the objects on one side (-1 left, 1 right), as scatter does; edge: of the sidewalk."""
    objects = []
    z, gap = rng.uniform(2, 8), rng.uniform(0, 2.5)
    while z < 110:
        depth = rng.uniform(7, 20)
        if rng.random() < 0.75:
            walls = edge + side * gap, z, z + depth
            objects.append((z, draw_building, (*walls, rng.uniform(4, 15), side)))
        else:
            for t in z + rng.uniform(0, depth, 3):
                objects.append((t, draw_tree, (edge + side * rng.uniform(0.5, 6), t)))
        z += depth + rng.uniform(0, 1.5)
    poles = np.arange(rng.uniform(4.5, 9), 24, rng.uniform(6, 9))
    objects += [(z, draw_pole, (kerb + side * 0.5, z)) for z in poles]
    for draw, distances, counts, x in (
        (draw_tree, (6, 40), (1, 5), lambda: kerb + side * 1.2),
        (draw_person, (4, 12), (3, 8), lambda: rng.uniform(*sorted((kerb, edge)))),
        (draw_car, (5, 30), (1, 4), lambda: kerb - side * rng.uniform(1.1, 1.5)),
    ):
        objects += scatter(rng, draw, distances, counts, x)
    return objects


def draw_world(rng, palette):
    """Return the Scene of a random street, its objects drawn from far to near."""
    scene = Scene(rng, palette)
    scene.colour[:] = scene.tint("sky") * np.linspace(1.0, 1.12, scene.height)[:, None, None]
    scene.label[:] = LABEL["sky"]
    left, right, walk_left, walk_right = draw_ground(scene)
    objects = side_of_street(rng, -1, left, walk_left) + side_of_street(rng, 1, right, walk_right)
    objects += scatter(rng, draw_person, (4, 12), (0, 4), lambda: rng.uniform(left, right))
    objects += scatter(rng, draw_car, (9, 40), (0, 3), lambda: rng.uniform(left, right) * 0.4)
    for _, draw, where in sorted(objects, key=lambda placed: -placed[0]):
        draw(scene, *where)
    return scene


def blotches(rng, shape, size):
    """Return smooth noise (H, W) of `shape`, deviation about 1, in blotches of `size` pixels."""
    small = (max(shape[0] // size, 2), max(shape[1] // size, 2))
    noise = rng.normal(0, 1, small).astype(np.float32)
    return cv2.resize(noise, shape[::-1], interpolation=cv2.INTER_CUBIC)


def as_game(scene, rng):
    """Return a scene as a game engine shows it, (H, W, 3): clean, bright, lit from one side."""
    image, sky = scene.colour, scene.label == LABEL["sky"]
    clouds = (blotches(rng, sky.shape, 60) + blotches(rng, sky.shape, 25)) > 1.4
    image[sky & clouds] = 0.97
    tiles = ((np.indices(sky.shape) // 4).sum(0) % 2).astype(np.float32)
    for name, strength in (("building", 0.05), ("vegetation", 0.14), ("road", 0.02)):
        inside = scene.label == LABEL[name]
        image[inside] *= 1 + strength * (2 * tiles[inside][:, None] - 1)
    sun = np.linspace(1, rng.uniform(0.8, 1.2), sky.shape[1])[None, :, None]
    image = shrink(image * sun.astype(np.float32))
    return image * rng.uniform(0.95, 1.1) + rng.normal(0, 0.004, image.shape)


def as_camera(scene, rng):
    """Return a scene as a camera shows it, (H, W, 3): dull light, haze, stains, blur and noise."""
    image, shape = scene.colour, scene.label.shape
    solid = scene.label != LABEL["sky"]
    stains = 0.05 * blotches(rng, shape, 24) + 0.05 * blotches(rng, shape, 7)
    stains = stains + 0.06 * rng.normal(0, 1, shape)
    leaves = 0.3 * blotches(rng, shape, 3) * (scene.label == LABEL["vegetation"])
    image = image * (1 + (stains * (0.25 + 0.75 * solid) + leaves)[..., None])
    haze = (1 - np.exp(-scene.distance / rng.uniform(90, 250)))[..., None] * solid[..., None]
    image = image + haze * 0.9 * (np.array([0.74, 0.75, 0.74]) - image)
    light = np.linspace(rng.uniform(0.8, 1.1), rng.uniform(0.8, 1.1), shape[1])[None, :, None]
    image = shrink((image * light).astype(np.float32))
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.6))
    y, x = np.mgrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j]
    image *= (1 - rng.uniform(0.15, 0.35) * (x**2 + y**2) / 2)[..., None]
    image *= np.array([0.97, 1.02, 0.93]) * rng.uniform(0.7, 0.95)
    image = image + rng.normal(0, 0.012, image.shape[:2])[..., None]
    return image + rng.normal(0, 0.012, image.shape)


def render(seed, split, number):
    """Return an RGB image (H, W, 3) and its label (H, W), Cityscapes' ids, both uint8."""
    rng = np.random.default_rng([seed, list(SPLITS).index(split), number])
    scene = draw_world(rng, GAME if split == "game" else CAMERA)
    image = (as_game if split == "game" else as_camera)(scene, rng)
    label = scene.label[1::OVERSAMPLING, 1::OVERSAMPLING].copy()
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8), label


def write(source, target, split, number):
    """Write image and label `number` of a split below `source` or `target`."""
    image, label = render(0, split, number)
    if split == "game":
        write_image(Path(source) / f"images/{number:05d}.png", image)
        write_image(Path(source) / f"labels/{number:05d}.png", label)
    else:
        name = f"{split}/demo/demo_{number:06d}_000019"
        write_image(Path(target) / f"leftImg8bit/{name}_leftImg8bit.png", image)
        write_image(Path(target) / f"gtFine/{name}_gtFine_labelIds.png", label)


def main():
    args = arguments(__doc__, cfg="configs/demo.yaml").parse_intermixed_args()
    cfg = load_config(args.cfg, args.overrides)
    mark = Path(cfg.source.root) / "complete.txt"
    text = f"seed 0, {SPLITS}\n"
    if mark.exists() and mark.read_text(encoding="utf-8") == text:
        print(f"demo data: {cfg.source.root} and {cfg.target.root} are complete")
        return
    for split, count in SPLITS.items():
        for number in range(count):
            write(cfg.source.root, cfg.target.root, split, number)
    write_text(mark, text)


if __name__ == "__main__":
    command(main)
