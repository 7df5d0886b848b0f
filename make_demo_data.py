"""The built-in benchmark: a procedural street world, seen by a game engine and by a camera.

    python make_demo_data.py --cfg configs/demo.yaml        # a few seconds

Writes the game's images and labels in GTA5's layout to the configuration's source.root, the camera's in Cityscapes' layout
(splits train and val) to target.root. Both draw their scenes from the same world; what differs is how a game and a camera
show it: palette, texture, light, haze, blur, noise, vignetting. Every file is a pure function of (seed, split, number).
"""

import signal
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from config import CITYSCAPES, load_config
from engine import arguments, command
from files import write_text
from images import write_image

HEIGHT, WIDTH, OVERSAMPLING = 192, 384, 2
SPLITS = {"game": 300, "train": 200, "val": 50}
LABEL = {name: CITYSCAPES[name][1] for name in
         ("road", "sidewalk", "building", "pole", "vegetation", "sky", "person", "car")}  # fmt: skip

# RGB in [0, 1]: each object takes one of its class's colours and strays a little from it
GAME = {
    "road": [(0.36, 0.36, 0.38)],
    "sidewalk": [(0.62, 0.58, 0.54), (0.66, 0.63, 0.60)],
    "building": [(0.80, 0.55, 0.38), (0.86, 0.78, 0.60), (0.62, 0.32, 0.26), (0.72, 0.72, 0.76)],
    "pole": [(0.30, 0.32, 0.34), (0.16, 0.17, 0.19)],
    "vegetation": [(0.22, 0.55, 0.15), (0.35, 0.62, 0.18), (0.16, 0.44, 0.16)],
    "sky": [(0.35, 0.60, 0.95)],
    "person": [(0.85, 0.20, 0.20), (0.20, 0.35, 0.80), (0.90, 0.80, 0.25), (0.55, 0.25, 0.60)],
    "car": [(0.85, 0.10, 0.10), (0.10, 0.25, 0.75), (0.95, 0.80, 0.10), (0.90, 0.90, 0.92), (0.10, 0.55, 0.35)],
}
CAMERA = {
    "road": [(0.37, 0.36, 0.34)],
    "sidewalk": [(0.56, 0.53, 0.50), (0.51, 0.47, 0.44)],
    "building": [(0.60, 0.54, 0.47), (0.70, 0.67, 0.61), (0.50, 0.40, 0.35), (0.56, 0.56, 0.55)],
    "pole": [(0.13, 0.14, 0.13), (0.18, 0.17, 0.15)],
    "vegetation": [(0.23, 0.31, 0.14), (0.29, 0.34, 0.17), (0.17, 0.25, 0.12)],
    "sky": [(0.86, 0.87, 0.86)],
    "person": [(0.16, 0.16, 0.18), (0.30, 0.24, 0.22), (0.22, 0.26, 0.34), (0.45, 0.42, 0.40)],
    "car": [(0.12, 0.12, 0.13), (0.55, 0.56, 0.57), (0.30, 0.31, 0.33), (0.20, 0.24, 0.32), (0.42, 0.14, 0.13)],
}


class Scene:
    """A canvas for colour, label and distance, with a pinhole camera above a street that runs along +Z, metres."""

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
        """(X right, Y up, Z ahead) -> pixels (N, 2)."""
        x, y, z = np.asarray(points, np.float64).T
        return np.stack([self.centre + self.focal * x / z, self.horizon + self.focal * (self.eye - y) / z], 1)

    def tint(self, name):
        colours = self.palette[name]
        return np.array(colours[self.rng.integers(len(colours))]) * self.rng.uniform(0.85, 1.15) + self.rng.normal(
            0, 0.02, 3
        )

    def fill(self, pixels, colour, name, distance):
        points = np.clip(np.rint(pixels * 16), -(2**24), 2**24).astype(np.int32)
        cv2.fillPoly(self.colour, [points], [float(c) for c in colour], cv2.LINE_8, 4)
        if name:
            cv2.fillPoly(self.label, [points], LABEL[name], cv2.LINE_8, 4)
            cv2.fillPoly(self.distance, [points], float(distance), cv2.LINE_8, 4)

    def quad(self, corners, colour, name=None):
        self.fill(self.project(corners), colour, name, np.mean([z for _, _, z in corners]))

    def disc(self, x, y, z, radius, colour, name, stretch=1.0):
        angle = np.linspace(0, 2 * np.pi, 20)
        centre = self.project([(x, y, z)])
        reach = self.focal * radius / z
        self.fill(centre + np.stack([np.cos(angle), stretch * np.sin(angle)], 1) * reach, colour, name, z)


def draw_ground(scene):
    rng = scene.rng
    rows, columns = np.mgrid[0 : scene.height, 0 : scene.width].astype(np.float32)
    below = rows > scene.horizon + 0.5
    z = np.where(below, scene.focal * scene.eye / np.maximum(rows - scene.horizon, 0.5), 1000)
    x = (columns - scene.centre) * z / scene.focal
    left, right = -rng.uniform(2.2, 5.5), rng.uniform(2.2, 5.5)
    walk_left, walk_right = left - rng.uniform(2, 4.5), right + rng.uniform(2, 4.5)
    for name, inside in (
        ("vegetation" if rng.random() < 0.5 else "sidewalk", below),
        ("sidewalk", below & (x > walk_left) & (x < walk_right)),
        ("road", below & (x > left) & (x < right)),
    ):
        scene.colour[inside], scene.label[inside] = scene.tint(name), LABEL[name]
    scene.distance = np.where(below, np.minimum(z, 1000), scene.distance).astype(np.float32)
    # grain that lies in the street's plane, kerbs, lane marks
    grain = rng.normal(0, 1, (256, 256)).astype(np.float32)
    grain = cv2.remap(grain, (x * 12) % 256, (z * 6) % 256, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    scene.colour[below] *= 1 + 0.05 * grain[below][:, None]
    slabs = below & (scene.label == LABEL["sidewalk"]) & (((x % 1.5) < 0.08) | ((z % 1.5) < 0.1)) & (z < 25)
    scene.colour[slabs] *= 0.85
    kerb = below & ((np.abs(x - left) < 0.12) | (np.abs(x - right) < 0.12))
    scene.colour[kerb] *= 1.2
    if rng.random() < 0.8:
        lane = rng.uniform(left, right) * 0.3
        mark = below & (np.abs(x - lane) < 0.08) & ((z + rng.uniform(0, 6)) % 6 < 3)
        scene.colour[mark] = 0.8
    return left, right, walk_left, walk_right


def draw_building(scene, x, z0, z1, height, outward):
    """A box whose facade stands at X = x along the street; `outward` is -1 on the left side, 1 on the right."""
    rng, colour = scene.rng, scene.tint("building")
    window = colour * rng.uniform(0.35, 0.7) if rng.random() < 0.8 else colour * 1.25
    light = rng.uniform(0.7, 1.0)
    x1 = x + outward * 14
    scene.quad([(x, 0, z0), (x1, 0, z0), (x1, height, z0), (x, height, z0)], colour * light, "building")
    scene.quad([(x, 0, z0), (x, 0, z1), (x, height, z1), (x, height, z0)], colour, "building")
    storey, bay = rng.uniform(2.6, 3.6), rng.uniform(1.8, 3.2)
    for y in np.arange(rng.uniform(0.8, 1.4), height - 1.2, storey):
        for z in np.arange(z0 + 0.5, z1 - 1.2, bay):
            scene.quad([(x, y, z), (x, y, z + 1.1), (x, y + 1.5, z + 1.1), (x, y + 1.5, z)], window)
        for a in np.arange(0.6, 12, bay) * outward + x:
            b = a + 1.1 * outward
            scene.quad([(a, y, z0), (b, y, z0), (b, y + 1.5, z0), (a, y + 1.5, z0)], window * light)


def draw_tree(scene, x, z):
    rng, colour = scene.rng, scene.tint("vegetation")
    height = rng.uniform(2.5, 5)
    trunk = np.array([0.25, 0.19, 0.14])
    scene.quad([(x - 0.15, 0, z), (x + 0.15, 0, z), (x + 0.12, height, z), (x - 0.12, height, z)], trunk, "vegetation")
    for _ in range(14):
        shade = colour * rng.uniform(0.7, 1.25)
        dx, dy = rng.normal(0, 0.9), rng.normal(0.6, 0.9)
        scene.disc(x + dx, height + dy, z, rng.uniform(0.5, 1.1), shade, "vegetation", rng.uniform(0.7, 1.1))


def draw_bush(scene, x, z):
    colour = scene.tint("vegetation")
    for _ in range(8):
        dx, shade = scene.rng.normal(0, 0.7), colour * scene.rng.uniform(0.75, 1.2)
        scene.disc(x + dx, scene.rng.uniform(0.2, 0.7), z, scene.rng.uniform(0.3, 0.6), shade, "vegetation")


def draw_pole(scene, x, z):
    rng, colour, height = scene.rng, scene.tint("pole"), scene.rng.uniform(3.5, 7)
    r = rng.uniform(0.14, 0.24)
    scene.quad([(x - r, 0, z), (x + r, 0, z), (x + r, height, z), (x - r, height, z)], colour, "pole")
    reach = -np.sign(x) * rng.uniform(0.6, 1.5)
    top = height - 2 * r
    scene.quad([(x, top, z), (x + reach, top, z), (x + reach, height, z), (x, height, z)], colour, "pole")


def draw_person(scene, x, z):
    rng, coat, size = scene.rng, scene.tint("person"), scene.rng.uniform(0.9, 1.1)
    legs, skin = scene.tint("person") * 0.6, np.array([0.72, 0.52, 0.42]) * rng.uniform(0.4, 1.1)
    stride = rng.uniform(0.05, 0.3)
    for side in (-1, 1):
        foot = x + side * stride
        scene.quad([(foot - 0.1, 0, z), (foot + 0.1, 0, z), (x + 0.16 * side + 0.1, 0.9 * size, z),
                    (x + 0.16 * side - 0.1, 0.9 * size, z)], legs, "person")  # fmt: skip
    scene.disc(x, 1.15 * size, z, 0.27 * size, coat, "person", 1.35)
    scene.disc(x, 1.62 * size, z, 0.13 * size, skin, "person", 1.25)


def draw_car(scene, x, z):
    rng, colour = scene.rng, scene.tint("car")
    half, length, waist, roof = 0.9, rng.uniform(3.4, 4.8), rng.uniform(0.8, 1.0), rng.uniform(1.35, 1.8)
    glass, dark = np.array([0.16, 0.19, 0.23]), np.array([0.07, 0.07, 0.08])
    near = -np.sign(x) * half + x  # the flank that the camera sees
    scene.quad(
        [(x - half, 0.02, z), (x + half, 0.02, z), (near, 0.02, z + length), (near, 0.02, z + length)], dark * 1.5
    )
    scene.quad(
        [(near, 0.25, z), (near, 0.25, z + length), (near, waist, z + length), (near, waist, z)], colour * 0.8, "car"
    )
    front, back = z + 0.2 * length, z + 0.85 * length
    scene.quad([(near, waist, z), (near, waist, back), (near * 0.97 + x * 0.03, roof, back - 0.5), (near, roof, front)],
               glass * 1.3, "car")  # fmt: skip
    scene.quad([(x - half, 0.25, z), (x + half, 0.25, z), (x + half, waist, z), (x - half, waist, z)], colour, "car")
    scene.quad([(x - half, waist, z), (x + half, waist, z), (x + half * 0.8, roof, z + 0.3), (x - half * 0.8, roof, z + 0.3)],
               glass, "car")  # fmt: skip
    scene.quad([(x - half * 0.8, roof - 0.08, z), (x + half * 0.8, roof - 0.08, z), (x + half * 0.8, roof, z),
                (x - half * 0.8, roof, z)], colour * 1.1, "car")  # fmt: skip
    lamp = np.array([0.75, 0.08, 0.06]) if rng.random() < 0.6 else np.array([0.95, 0.93, 0.80])
    for side in (-1, 1):
        scene.disc(x + side * 0.7, 0.28, z, 0.28, dark, "car")
        scene.disc(x + side * 0.7, waist - 0.15, z - 0.01, 0.11, lamp, None)
    scene.disc(near, 0.3, z + length * 0.8, 0.3, dark, "car", 1.0)


def draw_world(rng, palette):
    """A street with all its objects, from far to near."""
    scene = Scene(rng, palette)
    sky = np.linspace(1.0, 1.12, scene.height)[:, None, None]
    scene.colour[:] = scene.tint("sky") * sky
    scene.label[:] = LABEL["sky"]
    left, right, walk_left, walk_right = draw_ground(scene)
    things = []
    for side, edge in ((-1, walk_left), (1, walk_right)):
        z, gap = rng.uniform(2, 8), rng.uniform(0, 2.5)
        while z < 110:
            depth = rng.uniform(7, 20)
            if rng.random() < 0.75:
                things.append((z, draw_building, (edge + side * gap, z, z + depth, rng.uniform(4, 15), side)))
            else:
                things += [(t, draw_tree, (edge + side * rng.uniform(0.5, 6), t)) for t in z + rng.uniform(0, depth, 3)]
            z += depth + rng.uniform(0, 1.5)
        kerb = left if side < 0 else right
        things += [
            (t, draw_pole, (kerb + side * 0.5, t)) for t in np.arange(rng.uniform(4.5, 9), 24, rng.uniform(6, 9))
        ]
        things += [(t, draw_tree, (kerb + side * 1.2, t)) for t in rng.uniform(6, 60, rng.integers(0, 4))]
        things += [
            (t, draw_bush, (edge + side * rng.uniform(-0.4, 0.6), t)) for t in rng.uniform(4, 40, rng.integers(0, 4))
        ]
        things += [
            (t, draw_person, (rng.uniform(*sorted((kerb, edge))), t)) for t in rng.uniform(5, 14, rng.integers(3, 8))
        ]
        lanes = rng.uniform(5, 30, rng.integers(1, 4))
        things += [(t, draw_car, (kerb - side * rng.uniform(1.1, 1.5), t)) for t in lanes]
    things += [(t, draw_person, (rng.uniform(left, right), t)) for t in rng.uniform(5, 13, rng.integers(0, 4))]
    things += [(t, draw_car, (rng.uniform(left, right) * 0.4, t)) for t in rng.uniform(9, 40, rng.integers(0, 3))]
    for _, draw, place in sorted(things, key=lambda thing: -thing[0]):
        draw(scene, *place)
    return scene


def blotches(rng, shape, size):
    """Smooth noise with features of about `size` pixels, mean 0, deviation about 1."""
    small = rng.normal(0, 1, (max(shape[0] // size, 2), max(shape[1] // size, 2))).astype(np.float32)
    return cv2.resize(small, shape[::-1], interpolation=cv2.INTER_CUBIC)


def as_game(scene, rng):
    """Clean and bright: flat saturated colours, repeated textures, clouds with edges, sun from one side."""
    image, sky = scene.colour, scene.label == LABEL["sky"]
    clouds = (blotches(rng, sky.shape, 60) + blotches(rng, sky.shape, 25)) > 1.4
    image[sky & clouds] = 0.97
    tiles = ((np.indices(sky.shape) // 4).sum(0) % 2).astype(np.float32)
    for name, strength in (("building", 0.05), ("vegetation", 0.14), ("road", 0.02)):
        inside = scene.label == LABEL[name]
        image[inside] *= 1 + strength * (2 * tiles[inside][:, None] - 1)
    sun = np.linspace(1, rng.uniform(0.8, 1.2), sky.shape[1])[None, :, None]
    image = cv2.resize(image * sun.astype(np.float32), (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
    return image * rng.uniform(0.95, 1.1) + rng.normal(0, 0.004, image.shape)


def as_camera(scene, rng):
    """Dull light and a real lens: stains and grain on everything, haze, colour cast, blur, noise, vignetting."""
    image, shape = scene.colour, scene.label.shape
    solid = scene.label != LABEL["sky"]
    stains = 0.05 * blotches(rng, shape, 24) + 0.05 * blotches(rng, shape, 7) + 0.06 * rng.normal(0, 1, shape)
    leaves = 0.3 * blotches(rng, shape, 3) * (scene.label == LABEL["vegetation"])
    image = image * (1 + (stains * (0.25 + 0.75 * solid) + leaves)[..., None])
    haze = (1 - np.exp(-scene.distance / rng.uniform(90, 250)))[..., None] * solid[..., None]
    image = image + haze * 0.9 * (np.array([0.74, 0.75, 0.74]) - image)
    light = np.linspace(rng.uniform(0.8, 1.1), rng.uniform(0.8, 1.1), shape[1])[None, :, None]
    image = cv2.resize((image * light).astype(np.float32), (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 0.9))
    y, x = np.mgrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j]
    image *= (1 - rng.uniform(0.15, 0.35) * (x**2 + y**2) / 2)[..., None]
    image *= np.array([0.97, 1.02, 0.93]) * rng.uniform(0.7, 0.95)
    return image + rng.normal(0, 0.012, image.shape[:2])[..., None] + rng.normal(0, 0.012, image.shape)


def render(seed, split, number):
    """One picture: image (H, W, 3) and label (H, W) with Cityscapes' ids, both uint8."""
    rng = np.random.default_rng([seed, list(SPLITS).index(split), number])
    scene = draw_world(rng, GAME if split == "game" else CAMERA)
    image = (as_game if split == "game" else as_camera)(scene, rng)
    label = scene.label[1::OVERSAMPLING, 1::OVERSAMPLING].copy()
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8), label


def write(seed, source, target, split, number):
    image, label = render(seed, split, number)
    if split == "game":
        write_image(Path(source) / f"images/{number:05d}.png", image)
        write_image(Path(source) / f"labels/{number:05d}.png", label)
    else:
        name = f"{split}/demo/demo_{number:06d}_000019"
        write_image(Path(target) / f"leftImg8bit/{name}_leftImg8bit.png", image)
        write_image(Path(target) / f"gtFine/{name}_gtFine_labelIds.png", label)


def main():
    parser = arguments(__doc__, cfg="configs/demo.yaml")
    parser.add_argument("--seed", type=int, default=0, help="another world (default: %(default)s)")
    args = parser.parse_intermixed_args()
    cfg = load_config(args.cfg, args.overrides)
    roots = cfg.source.root, cfg.target.root
    mark = Path(cfg.source.root) / "complete.txt"
    text = f"seed {args.seed}, {SPLITS}\n"
    if mark.exists() and mark.read_text(encoding="utf-8") == text:
        print(f"demo data: {cfg.source.root} and {cfg.target.root} are complete")
        return
    jobs = [(split, number) for split, count in SPLITS.items() for number in range(count)]
    with ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        list(
            tqdm(
                pool.map(partial(write, args.seed, *roots), *zip(*jobs, strict=True), chunksize=8),
                total=len(jobs),
                disable=None,
            )
        )
    write_text(mark, text)


if __name__ == "__main__":
    command(main)
