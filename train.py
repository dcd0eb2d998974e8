"""Train Stable Diffusion from nothing: VAE, CLIP and U-Net, one after the other.

    python train.py                                            everything, on landscapes that this file draws
    python train.py --data photos/                             everything, on your own pictures
    python train.py --stage unet --init MODEL --data photos/   fine-tune any model that sample.py can load
    python train.py --stage eval                               how good is the model in out/?

Three stages, each frozen before the next begins (Rombach et al. 2022):

    vae     pictures -> latents -> pictures                  vae.py            loss: squared error + KL
    clip    captions beside their pictures, in one space     clip_encoder.py   loss: contrastive
    unet    noise in latents, given the time and the text    ddpm.py, unet.py  loss: squared error of the noise

Meanwhile OUT/samples/ fills with pictures: reconstructions under their originals, samples for fixed prompts. Beside it
lie the losses, as curves and as numbers (loss-STAGE.png, log-STAGE.jsonl). The U-Net's looks flat by nature, since most
noise cannot be guessed: trust the samples, and the loss in each range of t. OUT itself is the model, for sample.py and
for diffusers; OUT/train_state/ is what --resume needs. Before this file: sample.py. Then run it.
"""
import argparse
import sys

STAGES = ("vae", "clip", "unet")
PRESETS = {   # what flags leave open; for each stage: optimizer steps, batch size, learning rate
    "tiny": dict(image_size=64, max_images=8000, vae=(1600, 8, 4e-3), clip=(200, 64, 1e-3), unet=(2000, 32, 2e-3)),
    "base": dict(image_size=256, vae=(50_000, 32, 1e-3), clip=(10_000, 512, 5e-4), unet=(200_000, 128, 5e-4)),
    "sd15": dict(image_size=512, vae=(200_000, 64, 2e-4), clip=(50_000, 1024, 3e-4), unet=(500_000, 512, 2e-4))}


def parse_args():
    p = argparse.ArgumentParser(description="Train a VAE, a CLIP and a diffusion U-Net, one after the other.")
    p.add_argument("--stage", choices=["all", *STAGES, "eval"], default="all", help="what to train (default: all three)")
    p.add_argument("--data", default="landscapes", metavar="DIR", help="folder of pictures (default: drawn ones)")
    p.add_argument("--out", default="out", metavar="DIR", help="where the model goes (default: out)")
    p.add_argument("--init", metavar="MODEL", help="start from this model, keep its VAE and words")
    p.add_argument("--text-encoder", default="scratch", metavar="DIR|HUB_ID", help="use a published CLIP's, frozen")
    p.add_argument("--preset", choices=PRESETS, default="tiny", help="tiny: CPU; base: one GPU; sd15: as published")
    p.add_argument("--image-size", type=int, metavar="N", help="pixels on a side")
    p.add_argument("--max-images", type=int, metavar="N", help="use only the first N pictures")
    p.add_argument("--steps", type=int, metavar="N", help="optimizer steps; --stage all: the U-Net's, others in proportion")
    p.add_argument("--batch-size", type=int, metavar="N", help="pictures for one optimizer step")
    p.add_argument("--grad-accum", type=int, default=1, metavar="N", help="a batch in N parts, to fit memory")
    p.add_argument("--grad-checkpoint", action="store_true", help="recompute activations: less memory, more time")
    p.add_argument("--lr", type=float, metavar="X", help="peak learning rate")
    p.add_argument("--kl-weight", type=float, default=3e-5, metavar="X", help="see vae.py (default: %(default)s)")
    p.add_argument("--min-snr", type=float, default=5.0, metavar="X", help="see ddpm.py, 0: off (default: %(default)s)")
    p.add_argument("--p-uncond", type=float, default=0.1, metavar="X", help="captions dropped (default: %(default)s)")
    p.add_argument("--ema", type=float, default=0.995, metavar="X", help="decay of the weights' moving average")
    p.add_argument("--prediction-type", choices=["epsilon", "v_prediction"], help="see ddpm.py (default: epsilon)")
    p.add_argument("--resume", action="store_true", help="go on where the run in OUT stopped")
    p.add_argument("--save-every", type=int, default=500, metavar="N", help="steps from checkpoint to checkpoint")
    p.add_argument("--sample-every", type=int, default=250, metavar="N", help="steps from picture to picture")
    p.add_argument("--seed", type=int, default=0, metavar="N")
    p.add_argument("--workers", type=int, default=1, metavar="N", help="threads that prepare pictures")
    p.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="of arithmetic")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    args = p.parse_args()
    for key, value in PRESETS[args.preset].items():
        if key not in STAGES and getattr(args, key) is None:
            setattr(args, key, value)
    for key, value in vars(args).items():
        if type(value) in (int, float) and value <= 0 and key not in ("seed", "min_snr", "kl_weight", "p_uncond", "ema"):
            p.error(f"argument --{key.replace('_', '-')}: {value} is not above 0")
    return args


ARGS = parse_args() if __name__ == "__main__" else None            # before the slow imports: --help answers at once

import copy, csv, functools, json, math, os, time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from clip_encoder import CLIP, CLIP_SIZES, contrastive_loss, own_caption_wins, tokenize, train_tokenizer
from ddpm import NoiseSchedule, diffusion_loss, loss_by_time
from sample import (BadInput, Pipeline, encode_prompts, generate, grid, load_part, load_pipeline, load_tokenizer,
                    open_picture, picture_to_tensor, pick_device, save_module, save_pipeline, tensor_to_pictures,
                    write_beside)
from unet import UNET_SIZES, UNet
from vae import VAE, VAE_SIZES, DiagonalGaussian, psnr, vae_loss


# ---------------------------------------------------------------------------------------------------------------------
# Data: landscapes drawn by code. A scene is a few choices; its caption names them, its picture shows them.

SKIES = {   # in words; colours of the zenith, of the horizon, of the light on the land, of the sun or moon
    "day": ("a clear day|a bright blue sky|a blue sky", (58, 120, 200), (190, 219, 238), (255, 255, 247), (255, 250, 214)),
    "dawn": ("dawn|sunrise|a pink morning sky", (120, 150, 205), (252, 203, 190), (219, 189, 194), (255, 238, 205)),
    "sunset": ("sunset|a red evening sky|dusk", (74, 48, 108), (255, 150, 62), (168, 107, 97), (255, 226, 140)),
    "night": ("a starry night|night|a starry sky", (7, 9, 30), (40, 52, 100), (61, 69, 107), (244, 240, 222)),
    "storm": ("a storm|a stormy sky|a dark grey sky", (58, 66, 78), (150, 156, 163), (128, 135, 143), (0, 0, 0))}
TERRAINS = {   # in words; colours of the farthest ridge and of the nearest; how many ridges
    "mountains": ("mountains|rocky peaks|a mountain range", (126, 128, 142), (76, 78, 84), 3),
    "hills": ("hills|rolling hills|green hills", (128, 160, 96), (74, 118, 48), 4),
    "dunes": ("dunes|sand dunes|a desert of dunes", (230, 190, 130), (206, 148, 82), 4),
    "forest": ("a forest|a pine forest|deep woods", (70, 104, 84), (22, 52, 38), 4),
    "cliffs": ("red cliffs|table mountains|a red canyon", (198, 124, 92), (150, 70, 44), 3)}
PLACES = {"left": "on the left|to the left", "middle": "in the middle|in the centre", "right": "on the right|to the right"}
EXTRAS = {"lake": "a lake|a calm lake|still water", "pines": "pine trees|a few pines", "clouds": "clouds|drifting clouds",
          "mist": "mist|fog", "snow": "snow|snow on the ground"}
NOVEL = {("night", "dunes"), ("sunset", "forest"), ("dawn", "cliffs"), ("storm", "hills")}     # kept out of training


def noise(rng, x, y=None, first=(2, 2), octaves=5, gain=0.5, smooth=True):
    """Fractal noise, about [-1, 1], at columns x (W,) and rows y (H,) in [0, 1) -> (H, W); without rows (W,).

    Random heights on a coarse grid of `first` columns and rows, plus heights on a grid twice as fine and `gain` times as
    high, and so on; between the grid's points rounded (smooth) or straight.
    """
    total, rows = 0.0, np.zeros(1) if y is None else y
    for k in range(octaves):
        n, m = first[0] * 2 ** k, first[1] * 2 ** k if y is not None else 0
        knots = rng.uniform(-1, 1, (m + 2, n + 2))
        i, f, j, g = (rows * m).astype(int), rows * m % 1, (x * n).astype(int), x * n % 1
        f, g = (t * t * (3 - 2 * t) if smooth else t for t in (f, g))
        across = knots[:, j] * (1 - g) + knots[:, j + 1] * g                      # (m + 2, W)
        total = total + gain ** k * (across[i] * (1 - f)[:, None] + across[i + 1] * f[:, None])
    return total if y is not None else total[0]


def draw(scene, rng, S):
    """A scene (sky, terrain, place or None, extras) -> picture (S, S, 3), float in [0, 255].

    Lengths are parts of the side and edges are one pixel soft: the same scene at any size.
    """
    (sky, terrain, place, extras), ridges = scene, TERRAINS[scene[1]][3]
    zenith, horizon, light, disc, far, near = (np.array(v, float) for v in SKIES[sky][1:] + TERRAINS[terrain][1:3])
    light, ground = light / 255, 0.60 + rng.uniform(-0.04, 0.04)
    c = (np.arange(S) + 0.5) / S                                   # pixel centres; Y = 0 is the top
    X, Y = np.meshgrid(c, c)

    def mix(picture, colour, amount):                              # lay a colour over the picture, as far as amount says
        return picture + (colour - picture) * np.asarray(amount)[..., None]

    def inside(distance):                                          # 1 where distance > 0, 0 elsewhere, one pixel soft
        return (distance * S + 0.5).clip(0, 1)

    # Sky: a gradient, stars, the sun or the moon in its glow, clouds.
    picture = horizon + (zenith - horizon) * ((1 - Y / ground).clip(0, 1) ** 0.8)[..., None]
    if sky == "night":
        for x, y, bright in zip(rng.uniform(0, S, 70), rng.uniform(0, 0.6 * S, 70), rng.uniform(0.35, 1, 70)):
            picture[int(y), int(x)] += bright * (235 - picture[int(y), int(x)])
    if place:
        x, y, r = {"left": 0.2, "middle": 0.5, "right": 0.8}[place], rng.uniform(0.13, 0.27), rng.uniform(0.055, 0.075)
        distance = np.hypot(X - x - rng.uniform(-0.07, 0.07), Y - y)
        picture = mix(picture, disc, (0.3 if sky == "night" else 0.65) * np.exp(-(distance / (2.2 * r)) ** 1.3))
        picture = mix(picture, disc, inside(r - distance))
    if "clouds" in extras or sky == "storm":
        puffs = noise(rng, c, c, (2, 7), 4) * (0.9 if sky == "storm" else 1.6) + 0.1
        colour = np.array((40, 45, 55)) if sky == "storm" else 0.35 * horizon + 166 * light ** 0.6
        picture = mix(picture, colour, puffs.clip(0, 0.85) * (1 - Y / ground).clip(0, 1) ** 0.35)

    # Land: ridges from far (z = 0) to near (1), each less hidden by the air than the one behind it.
    for z in np.linspace(0, 1, ridges):
        base, slope = ground + 0.30 * z, 0.0
        if terrain == "mountains":                                 # straight between the noise's points: jagged
            crest = noise(rng, c, octaves=6, gain=0.52, smooth=False)
            top, slope = base - (0.20 - 0.08 * z) * (0.5 + 0.6 * crest), np.gradient(crest, c) * 0.05
        elif terrain == "hills":
            top = base - 0.09 * noise(rng, c, octaves=3, gain=0.35)
        elif terrain == "dunes":                                   # long windward slopes, short lee slopes in shadow
            u = c * rng.uniform(1.3, 2.2) + rng.uniform(0, 1)
            wave = np.where(u % 1 < 0.68, np.sin(u % 1 / 0.68 * np.pi / 2) ** 2, ((1 - u % 1) / 0.32) ** 1.5)
            top = base + 0.03 - 0.10 * wave - 0.02 * noise(rng, c, octaves=2)
            edge = u - 1.1 * (Y - top).clip(0) + 0.05 * np.sin(14 * Y)            # winds down from the crest
            slope = np.where((edge % 1 > 0.68) & (u % 1 > 0.5), -0.6, 0.2)
        elif terrain == "forest":                                  # a row of pointed trees
            u = c * rng.uniform(22, 28) / (1 + 0.6 * z) + rng.uniform(0, 1)
            tall = (0.05 + 0.05 * z) * (0.75 + 0.25 * np.sin(u.astype(int) * 12.9898))
            top = base - 0.06 * noise(rng, c, octaves=3, gain=0.4) - tall * (1 - abs(2 * (u % 1) - 1))
        else:                                                      # cliffs: flat tops, steep sides
            crest = np.tanh(5 * noise(rng, c, octaves=2, gain=0.6)).clip(-0.3)
            top = base - 0.17 * (1 - 0.5 * z) * crest - 0.02 * z + 0.006 * noise(rng, c, first=(16, 0), octaves=2)
        depth = ((Y - top) / 0.3).clip(0, 1)                       # 0 at the ridge, 1 well below
        shade = 1 + 0.5 * np.clip(slope, -0.8, 0.8) * np.exp(-2 * depth) - 0.25 * depth
        shade = (shade + 0.07 * noise(rng, c, c, (6, 10), 2))[..., None]
        if terrain == "cliffs":                                    # layers of stone
            shade = shade + (0.10 * np.sin(90 * Y + 2 * noise(rng, c, octaves=2)) * (depth < 0.5))[..., None]
        land = (far + (near - far) * z) * light * shade
        if "snow" in extras or terrain == "mountains":             # everywhere, or above a jagged line
            line = inside((ground - 0.11 + 0.05 * noise(rng, c, None, (12, 0), 3, 0.7, smooth=False) - Y) / 2)
            white = np.array((242, 246, 252)) * light ** 0.6 * shade.clip(0.72, 1.08)
            land = mix(land, white, 0.85 * np.maximum(line, "snow" in extras))
        land = mix(land, horizon * (0.4 + 0.6 * light), 0.55 * (1 - z) ** 1.5 * np.ones((S, S)))  # the air between
        picture = mix(picture, land, inside(Y - top))
        if "mist" in extras:                                       # lies in the valley before each ridge
            veil = 0.75 * np.exp(-((Y - base - 0.06) / 0.07) ** 2) * (1 + 0.4 * noise(rng, c, c, (3, 3), 3))
            picture = mix(picture, (0.5 * horizon + 110 * light).clip(0, 255), veil.clip(0, 0.85))

    if "lake" in extras:                                           # a mirror: squeezed, tinted, rippled, lit at its bank
        shore = 0.78 + rng.uniform(-0.03, 0.03)
        mirrored = shore - 1.6 * (c - shore) + 0.012 * noise(rng, c, first=(24, 0), octaves=2)
        water = 0.72 * picture[(mirrored * S).clip(0, S - 1).astype(int)] + 0.28 * (0.55 * zenith + 0.45 * horizon)
        bank = shore + 0.012 * noise(rng, c, first=(3, 0), octaves=3)
        picture = mix(picture, water, inside(Y - bank))
        picture = mix(picture, water * 1.15 + 12, 0.5 * np.exp(-((Y - bank) * 90) ** 2))
    if "pines" in extras:                                          # near, and dark against everything
        side = rng.integers(2)
        for _ in range(rng.integers(2, 5)):
            x, foot, tall = abs(side - rng.uniform(0.03, 0.3)), rng.uniform(0.93, 1.02), rng.uniform(0.3, 0.48)
            up = (foot - Y) / tall                                 # 0 at the foot, 1 at the tip
            width = np.where(up < 0.1, 0.03, 0.26 * (1 - up) * (1 - 0.38 * ((6 * up) % 1))) * tall
            green = np.array((30, 54, 40)) * (0.25 + 0.6 * light)
            picture = mix(picture, green, inside(width - abs(X - x)) * (up > 0) * (up < 1))
    return picture.clip(0, 255)


class Landscapes:
    """Drawn scenes: [i] -> (picture (3, S, S) float32 in [-1, 1], caption). The same i is always the same scene.

    split "train": 20,000 scenes; "val": 3,000 others of the same kinds; "novel": 3,000 that join a sky and a terrain
    which "train" never shows together, though it shows each of them with others.
    """

    def __init__(self, image_size=64, split="train"):
        self.image_size, self.split = image_size, ("train", "val", "novel").index(split)

    def __len__(self):
        return 3000 if self.split else 20000

    def plan(self, i):
        """Scene i: its choices, their words (all, some, or just "a landscape"), and the generator to draw it with."""
        if not 0 <= i < len(self):
            raise IndexError(f"scene {i} of {len(self)}")
        rng = np.random.default_rng((self.split, i))
        pairs = [(sky, land) for sky in SKIES for land in TERRAINS if ((sky, land) in NOVEL) == (self.split == 2)]
        sky, terrain = pairs[rng.integers(len(pairs))]
        place = [*PLACES, None][rng.choice(4, p=(0.27, 0.27, 0.27, 0.19))] if sky != "storm" else None
        weather = (None, "clouds", "mist", "snow")[rng.choice(4, p=(0.4, 0.22, 0.2, 0.18))]
        extras = [e for e, p in (("lake", 0.35), ("pines", 0.25), (weather, 1)) if e and rng.random() < p]

        def say(words):
            return rng.choice(words.split("|"))
        above, below = say(SKIES[sky][0]), say(TERRAINS[terrain][0])
        details = [say(EXTRAS[e]) for e in extras]
        details += [f"the {'moon' if sky == 'night' else 'sun'} {say(PLACES[place])}"] if place else []
        rng.shuffle(details)
        joint = "under" if "sky" in above or "storm" in above else "on" if above.startswith("a ") else "at"
        whole = "|".join([f"{above} over {below}", f"{below}, {above}", f"a landscape with {below}, {above}",
                          f"{below} {joint} {above}"])
        kind = rng.random()
        some = [say(f"{above}|{below}|{whole}"), *details[: rng.integers(len(details) + 1)]]
        words = ["a landscape"] if kind < 0.08 else some if kind < 0.28 else [say(whole), *details]
        return (sky, terrain, place, extras), ", ".join(words), rng

    def caption(self, i):
        """The caption of scene i, without drawing it."""
        return self.plan(i)[1]

    def __getitem__(self, i):
        scene, caption, rng = self.plan(i)
        return torch.from_numpy(draw(scene, rng, self.image_size)).permute(2, 0, 1).float() / 127.5 - 1, caption


# ---------------------------------------------------------------------------------------------------------------------
# Data: a folder of pictures; and how either kind is kept.

class ImageFolder:
    """Pictures below root: [i] -> (picture (3, S, S) float32 in [-1, 1], caption). Cropped to squares, never stretched.

    Captions, the first that is there: the picture's line in root/metadata.jsonl or .csv ("file_name", "text"); the text
    beside it (a.txt or a.caption for a.jpg); its folder's name; its own name. Every 20th picture is for split "val"
    alone. Raises BadInput.
    """

    def __init__(self, root, image_size=64, split="train"):
        if not os.path.isdir(root):
            raise BadInput(f"--data {root}: there is no such folder")
        Image.init()
        known = {ext for ext, kind in Image.EXTENSION.items() if kind in Image.OPEN}
        paths = sorted(os.path.relpath(os.path.join(folder, name), root) for folder, _, names in os.walk(root)
                       for name in names if os.path.splitext(name)[1].lower() in known)
        if not paths:
            raise BadInput(f"--data {root}: there is no picture in it (.png, .jpg, .webp, ...)")
        self.root, self.image_size, self.table = root, image_size, {}
        self.paths = paths if len(paths) < 20 else [p for k, p in enumerate(paths) if (k % 20 == 10) == (split == "val")]
        for path in (os.path.join(root, name) for name in ("metadata.csv", "metadata.jsonl")):
            if os.path.exists(path):
                try:
                    with open(path, encoding="utf-8", newline="") as f:
                        rows = csv.DictReader(f) if path.endswith("csv") else map(json.loads, filter(str.strip, f))
                        self.table |= {os.path.normpath(row["file_name"]): str(row["text"]) for row in rows}
                except (OSError, ValueError, KeyError, TypeError) as e:
                    raise BadInput(f"{path}: every line needs file_name and text ({type(e).__name__}: {e})") from None

    def __len__(self):
        return len(self.paths)

    def caption(self, i):
        """The caption of picture i, without opening it."""
        stem = os.path.splitext(self.paths[i])[0]
        if self.paths[i] in self.table:
            return self.table[self.paths[i]]
        for path in (os.path.join(self.root, stem + ext) for ext in (".txt", ".caption")):
            if os.path.exists(path):
                with open(path, encoding="utf-8", errors="replace") as f:
                    return f.read().strip()
        folder, name = os.path.split(stem)
        return (os.path.basename(folder) or name).replace("_", " ").replace("-", " ")

    def __getitem__(self, i):
        picture = open_picture(os.path.join(self.root, self.paths[i]), "--data")
        return picture_to_tensor(picture, self.image_size, self.image_size)[0], self.caption(i)


class Kept:
    """Rows (n, *shape), each computed when first asked for, then kept in a file that is mapped into memory.

    So training starts at once and nothing needs to fit in memory. The file vanishes with the process.
    """

    def __init__(self, n, shape, dtype, compute, folder):
        self.compute, self.done = compute, torch.zeros(n, dtype=torch.bool)
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, f".kept-{os.getpid()}-{id(self)}")
        self.rows = torch.from_file(path, shared=True, size=n * math.prod(shape), dtype=dtype).view(n, *shape)
        os.remove(path)

    def __call__(self, indices):
        todo = [i for i in dict.fromkeys(indices) if not self.done[i]]
        if todo:
            self.rows[todo] = self.compute(todo).to("cpu", self.rows.dtype)
            self.done[todo] = True
        return self.rows[indices]


class Data:
    """A data set as the stages want it: n, captions (list of str), and pixels(indices) -> bytes (B, 3, S, S)."""

    def __init__(self, args, split):
        source = Landscapes if args.data == "landscapes" else functools.partial(ImageFolder, args.data)
        self.pictures = source(image_size=args.image_size, split=split)
        self.n = min(len(self.pictures), args.max_images or sys.maxsize)
        self.captions = [self.pictures.caption(i) for i in range(self.n)]
        self.pixels, shape = self.read, (3, args.image_size, args.image_size)
        if self.n * math.prod(shape) < 2 ** 33:                    # 8 GiB of disk; beyond that, draw or decode again
            self.pixels = Kept(self.n, shape, torch.uint8, self.read, args.out)

    def read(self, indices):
        return torch.stack([((self.pictures[i][0] + 1) * 127.5).round().byte() for i in indices])


# ---------------------------------------------------------------------------------------------------------------------
# The loop: one for all three stages.

@functools.lru_cache(4)
def shuffled(n, seed, epoch):
    """All n pictures in the order of this epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1000 + epoch)).tolist()


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, then a step of the same size in every direction that the gradient points in.

    A layer's gradient is a matrix with few large singular values, and AdamW's steps, made entry by entry, mostly repeat
    those. Muon sets all singular values to about 1, so that rare directions learn as fast as common ones. In 90 seconds
    of training on two cores the VAE reaches 31.5 dB with it, 26.7 dB with AdamW alone.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """Update every parameter that has a gradient; convolutions (O, I, 3, 3) count as matrices (O, 9 I)."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                X = p.grad.lerp(mean, group["momentum"]).flatten(1).float()
                X = X / (X.norm() + 1e-7)                          # singular values in [0, 1]
                wide = X if X.size(0) <= X.size(1) else X.T
                for _ in range(5):                                 # Newton-Schulz: s -> 3.4445 s - 4.775 s^3 + 2.0315 s^5
                    A = wide @ wide.T
                    wide = 3.4445 * wide + (-4.7750 * A + 2.0315 * A @ A) @ wide
                X = wide if X.size(0) <= X.size(1) else wide.T
                # Entries of about 0.2 lr in size, as AdamW's steps have: one learning rate serves both.
                p.add_(X.view_as(p), alpha=-0.2 * group["lr"] * max(X.shape) ** 0.5)


def fit(stage, model, args, n, load, loss_of, show, keep):
    """Train model for the stage's steps. What is kept is the moving average of its weights.

    load(indices): called in a thread, ahead of time.  loss_of(model, loaded, indices, generator) -> (loss, {name: number}).
    show(average, step): draw something for a person to judge.  keep(average): save it where the next stage finds it.
    """
    steps, batch_size, peak = PRESETS[args.preset][stage]
    if args.steps:                                                 # --stage all: the U-Net's, the others in proportion
        steps = max(1, round(args.steps * (steps / PRESETS[args.preset]["unet"][0] if args.stage == "all" else 1)))
    batch_size, peak, device = args.batch_size or batch_size, args.lr or peak, args.device
    size, left = divmod(batch_size, args.grad_accum)
    if left:
        raise BadInput(f"--grad-accum {args.grad_accum} does not divide the batch size, {batch_size}")
    model.requires_grad_(True).train().to(device)
    average = copy.deepcopy(model).requires_grad_(False).eval()
    params = list(model.parameters())
    # Muon for the matrices inside; AdamW for what has no directions to even out (gains, biases, tables of words), and for
    # the first and last layer, whose rows are pixels.
    inner = [p for name, p in model.named_parameters() if p.dim() > 1 and "embedding" not in name
             and not name.endswith(("conv_in.weight", "conv_out.weight"))]
    outer = [p for p in params if not any(p is q for q in inner)]
    opts = [Muon(inner), torch.optim.AdamW(outer, betas=(0.9, 0.99), weight_decay=0.0)]
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == torch.float16)
    state = {"model": model, "average": average, "muon": opts[0], "adamw": opts[1], "scaler": scaler}
    path, log, start = os.path.join(args.out, "train_state", f"{stage}.pt"), os.path.join(args.out, f"log-{stage}.jsonl"), 0
    if args.resume and os.path.exists(path):
        saved = torch.load(path, map_location=device, weights_only=True)
        for name, part in state.items():
            part.load_state_dict(saved[name])
        start = saved["step"]
    if args.compile:
        model.compile()

    def indices_of(k):                                             # of the k-th part-batch: a matter of seed and k alone
        return [shuffled(n, args.seed, p // n)[p % n] for p in range(k * size, (k + 1) * size)]

    waiting, sums, began = deque(), {}, time.time()
    bar = tqdm(range(start, steps), desc=stage, initial=start, total=steps, unit="step", mininterval=1)
    with ThreadPoolExecutor(args.workers) as pool, open(log, "a" if start else "w") as log_file:
        for step in bar:
            # All chance comes from the step's number: a resumed run draws what an uninterrupted one would have drawn.
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
            # Warm up while AdamW's averages are still empty; then decay along a cosine, to settle.
            lr = peak * min((step + 1) / min(100, steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
            for k in range(step * args.grad_accum, (step + 1) * args.grad_accum):
                while len(waiting) <= args.workers:
                    indices = indices_of(k + len(waiting))
                    waiting.append((pool.submit(load, indices), indices))
                loaded, indices = waiting.popleft()
                with torch.autocast(device.type, args.dtype, enabled=args.dtype != torch.float32):
                    loss, numbers = loss_of(model, loaded.result(), indices, generator)
                scaler.scale(loss / args.grad_accum).backward()
                for name, value in {"loss": loss.detach(), **numbers}.items():
                    sums.setdefault(name, []).append(float(value))
            if not math.isfinite(sums["loss"][-1]):
                sys.exit(f"train.py: the loss is {sums['loss'][-1]} at step {step} of stage {stage}: try a smaller --lr")
            for opt in opts:
                scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(params, 1.0)            # one odd batch must not throw the weights far off
            for opt in opts:
                opt.param_groups[0]["lr"] = lr
                scaler.step(opt)
                opt.zero_grad(set_to_none=True)
            scaler.update()
            # An average over the last 1 / (1 - decay) steps, fewer at first: the jitter of single steps cancels out.
            decay = min(args.ema, (1 + step) / (10 + step))
            for a, p in zip(average.parameters(), params):
                a.lerp_(p.detach(), 1 - decay)

            done, last = step + 1, step + 1 == steps
            if done % 10 == 0 or last:
                row = {name: round(sum(values) / len(values), 5) for name, values in sums.items()}
                rate, sums = (done - start) * batch_size / (time.time() - began), {}
                log_file.write(json.dumps(dict(step=done, lr=lr, samples_per_second=round(rate, 1), **row)) + "\n")
                log_file.flush()
                bar.set_postfix_str(" ".join(f"{name} {value:.3g}" for name, value in row.items()) + f" {rate:.0f}/s")
            if done % args.sample_every == 0 or last:
                show(average, done)
                plot(log, os.path.join(args.out, f"loss-{stage}.png"))
            if done % args.save_every == 0 or last:
                keep(average)
                write_beside(path, lambda to: torch.save({k: v.state_dict() for k, v in state.items()} | {"step": done}, to))
    keep(average)
    return average


def plot(log, path, W=640, H=360):
    """Draw the losses of a log file, on a logarithmic scale."""
    with open(log) as f:
        steps, losses = zip(*((row["step"], math.log10(max(row["loss"], 1e-9))) for row in map(json.loads, f)))
    low, high = min(losses), max(max(losses), min(losses) + 1e-6)
    curve = [(50 + s / steps[-1] * (W - 70), 20 + (high - y) / (high - low) * (H - 60)) for s, y in zip(steps, losses)]
    sheet = Image.new("RGB", (W, H), "white")
    pen = ImageDraw.Draw(sheet)
    pen.line(curve, fill="steelblue", width=2)
    for text, place in ((f"{10 ** high:.3g}", (5, 15)), (f"{10 ** low:.3g}", (5, H - 47)), (f"step {steps[-1]}", (W - 80, H - 25))):
        pen.text(place, text, fill="black")
    sheet.save(path)


# ---------------------------------------------------------------------------------------------------------------------
# The three stages, and the measure of the result.

def as_pictures(pixels, device):
    """Bytes (B, 3, S, S) -> float32 in [-1, 1] on the device."""
    return (pixels.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def save_sheet(pictures, columns, args, name):
    """A sheet of PIL pictures in OUT/samples/, small ones enlarged."""
    sheet, k = grid(pictures, columns), max(1, 128 // pictures[0].width)
    write_beside(os.path.join(args.out, "samples", name + ".png"),
                 lambda to: sheet.resize((sheet.width * k, sheet.height * k), Image.Resampling.NEAREST).save(to))


def train_vae(pipe, data, val, args):
    """Stage 1: pictures -> latents -> pictures. Sets pipe.vae."""
    levels = max(2, round(math.log2(args.image_size / 16)) + 1)    # tiny: latents of about 16x16 at any picture size
    sizes = dict(VAE_SIZES[args.preset])
    if args.preset == "tiny":
        sizes["block_out_channels"] = sizes["block_out_channels"][-levels:]
    fresh, vae = pipe.vae is None, pipe.vae or VAE(**sizes)
    if args.image_size % vae.f:
        raise BadInput(f"--image-size {args.image_size} is not a multiple of {vae.f}")
    vae.to(memory_format=torch.channels_last).set_grad_checkpoint(args.grad_checkpoint)
    held_out = as_pictures(val.pixels(list(range(min(val.n, 64)))), args.device)

    def loss_of(vae, pixels, indices, generator):
        return vae_loss(vae, as_pictures(pixels, args.device), args.kl_weight, generator)

    @torch.no_grad()
    def show(vae, step):
        x = held_out[:8]
        both = torch.cat([x, vae.decode(vae.encode(x).mode())])
        save_sheet(tensor_to_pictures(both), len(x), args, f"vae-{step:06d}")

    @torch.no_grad()
    def keep(vae):
        pipe.vae = vae
        if fresh:                                                  # diffusion wants latents of unit variance
            vae.scaling_factor = 1 / vae.encode(held_out).sample(torch.Generator().manual_seed(0)).std().item()
        save_pipeline(pipe, args.out, ["vae"])
    fit("vae", vae, args, data.n, data.pixels, loss_of, show, keep)


def train_clip(pipe, data, val, args):
    """Stage 2: captions beside their pictures. Sets pipe.tokenizer and pipe.text_encoder; the CLIP is kept for eval."""
    text, vision, words, shared = CLIP_SIZES[args.preset]
    tok = pipe.tokenizer = train_tokenizer(data.captions, **words)
    text = dict(text, vocab_size=len(tok), max_position_embeddings=words["max_length"], bos_token_id=tok.bos_token_id,
                eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    vision = dict(vision, image_size=args.image_size, patch_size=max(args.image_size // vision["patches"], 1))
    ids = tokenize(tok, data.captions)

    def loss_of(clip, pixels, indices, generator):
        return contrastive_loss(clip, as_pictures(pixels, args.device), ids[indices].to(args.device))

    def keep(clip):
        pipe.text_encoder = clip.text_encoder()
        save_module(clip, os.path.join(args.out, "train_state", "clip"), "model")
        save_pipeline(pipe, args.out, ["text_encoder"])
    fit("clip", CLIP(text, vision, shared), args, data.n, data.pixels, loss_of, lambda clip, step: None, keep)


def train_unet(pipe, data, val, args):
    """Stage 3: noise in latents, given the time and the text. Sets pipe.unet."""
    vae, device, side = pipe.vae, args.device, args.image_size // pipe.vae.f
    if args.image_size % vae.f:
        raise BadInput(f"--image-size {args.image_size} is not a multiple of {vae.f}, which this VAE needs")
    width, length = (pipe.text_encoder.config[key] for key in ("hidden_size", "max_position_embeddings"))
    unet = pipe.unet or UNet(**UNET_SIZES[args.preset], cross_attention_dim=width, sample_size=side)
    unet.to(memory_format=torch.channels_last).set_grad_checkpoint(args.grad_checkpoint)

    # VAE and text encoder are frozen: what they say of a picture and of a caption is computed once.
    texts = list(dict.fromkeys(["", *data.captions]))
    row = {text: k for k, text in enumerate(texts)}

    @torch.no_grad()
    def moments(indices):                                          # -> mean and log variance (B, 2*4, h, w)
        q = vae.encode(as_pictures(data.pixels(indices), device))
        return torch.cat([q.mean, q.logvar], dim=1)

    @torch.no_grad()
    def states(rows):                                              # -> (B, T, D)
        return encode_prompts(pipe, [texts[r] for r in rows])
    latents = Kept(data.n, (2 * vae.config["latent_channels"], side, side), torch.float16, moments, args.out)
    contexts = Kept(len(texts), (length, width), torch.float16, states, args.out)

    def load(indices):                                             # in a thread: the pictures that have no latents yet
        todo = [i for i in indices if not latents.done[i]]
        return data.pixels(todo) if todo else None

    def loss_of(unet, loaded, indices, generator):                 # DDPM's Algorithm 1, on latents
        x0 = vae.scaling_factor * DiagonalGaussian(latents(indices)).sample(generator).to(device)
        # Sometimes forget the caption: one network learns eps(x_t, t, text) and eps(x_t, t). Guidance needs both.
        dropped = torch.rand(len(x0), generator=generator) < args.p_uncond
        context = contexts([0 if drop else row[data.captions[i]] for i, drop in zip(indices, dropped)]).float().to(device)
        t = torch.randint(0, pipe.schedule.T, (len(x0),), generator=generator).to(device)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        losses = diffusion_loss(pipe.schedule, lambda x_t, t: unet(x_t, t, context), x0, t, noise, args.min_snr)
        return losses.mean(), loss_by_time(losses, t, pipe.schedule.T)

    prompts = list(dict.fromkeys(["a landscape"] * (args.data == "landscapes") + val.captions))[:16]

    def show(unet, step):
        drawing = replace(pipe, unet=unet)
        save_sheet(generate(drawing, prompts, steps=15, guidance=4.0, progress=False), 8, args, f"unet-{step:06d}")

    def keep(unet):
        pipe.unet = unet
        save_pipeline(pipe, args.out, ["unet"])
    fit("unet", unet, args, data.n, load, loss_of, show, keep)


@torch.no_grad()
def evaluate(pipe, val, args, n=100):
    """Print how good the model is, by pictures that training never saw and with the CLIP as judge."""
    few = list(range(min(val.n, 256)))
    x = as_pictures(val.pixels(few), args.device)
    print(f"reconstruction PSNR     {psnr(pipe.vae, x):.1f} dB")
    generator, T = torch.Generator().manual_seed(0), pipe.schedule.T
    x0 = pipe.vae.scaling_factor * pipe.vae.encode(x).sample(generator)
    t = (torch.arange(len(x0)) * T // len(x0)).to(args.device)
    context = encode_prompts(pipe, [val.captions[i] for i in few])
    eps = torch.randn(x0.shape, generator=generator).to(args.device)
    losses = diffusion_loss(pipe.schedule, lambda x_t, t: pipe.unet(x_t, t, context), x0, t, eps)
    print("loss per range of t     " + ", ".join(f"{k} {v:.3f}" for k, v in loss_by_time(losses, t, T).items()))
    folder = os.path.join(args.out, "train_state", "clip")
    if not os.path.exists(folder):
        return print(f"There is no CLIP in {folder} to judge captions by.")
    clip = load_part("clip", folder, torch.float32).to(args.device)
    chosen = list({val.captions[i]: i for i in reversed(range(val.n))}.values())[-n:]     # no caption twice
    captions = [val.captions[i] for i in chosen]
    ids = tokenize(pipe.tokenizer, captions).to(args.device)
    real = own_caption_wins(clip, as_pictures(val.pixels(chosen), args.device), ids)
    print(f"CLIP retrieval          {real:.0%} of real pictures pick their caption out of {len(chosen)}")
    pictures = generate(pipe, captions, guidance=4.0)
    drawn = own_caption_wins(clip, torch.cat([picture_to_tensor(p, *p.size) for p in pictures]).to(args.device), ids)
    print(f"R-precision             {drawn:.0%} of drawn pictures pick their prompt out of {len(chosen)}")
    save_sheet(pictures, 10, args, "eval")


def main(args):
    args.device, args.dtype = pick_device(args.device, args.dtype)
    torch.manual_seed(args.seed)
    data, val = Data(args, "train"), Data(args, "val")
    pipe = Pipeline(None, None, None, None, NoiseSchedule(prediction_type=args.prediction_type or "epsilon"))
    stages = list(STAGES) if args.stage == "all" else [args.stage]
    if args.init:
        pipe = load_pipeline(args.init, args.device)
        pipe.schedule = NoiseSchedule(**pipe.schedule.config | ({"prediction_type": args.prediction_type} if args.prediction_type else {}))
        stages = ["unet"] if args.stage == "all" else stages
    if args.text_encoder != "scratch":
        pipe.text_encoder, pipe.tokenizer = load_text_encoder(args.text_encoder)
        stages = [stage for stage in stages if stage != "clip"]
    print(f"{data.n:,} pictures of {args.image_size}x{args.image_size}; {', '.join(stages)} on {args.device} in "
          f"{str(args.dtype)[6:]}; the model goes to {args.out}/")
    for stage in stages:
        for part, before in (("vae", "vae"), ("text_encoder", "clip"), ("unet", "unet")):
            if stage in ("unet", "eval") and before != stage and getattr(pipe, part) is None:
                folder = os.path.join(args.out, part)
                if not os.path.exists(os.path.join(folder, "config.json")):
                    raise BadInput(f"--stage {stage} needs {folder}/: run `python train.py --stage {before}` first")
                setattr(pipe, part, load_part(part, folder, torch.float32).to(args.device))
                if part == "text_encoder":
                    pipe.tokenizer = load_tokenizer(os.path.join(args.out, "tokenizer"))
        if stage == "eval":
            evaluate(pipe, val, args)
        else:
            {"vae": train_vae, "clip": train_clip, "unet": train_unet}[stage](pipe, data, val, args)


if __name__ == "__main__":
    try:
        main(ARGS)
    except BadInput as e:
        sys.exit(print(f"train.py: {e}", file=sys.stderr) or 2)
