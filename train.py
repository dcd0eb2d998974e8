"""Train Stable Diffusion from nothing: VAE, CLIP and U-Net, one after the other.

    python train.py                                            everything, on landscapes that this file draws
    python train.py --data photos/                             everything, on your own pictures
    python train.py --stage unet --init MODEL --data photos/   fine-tune any model that sample.py can load
    python train.py --stage eval                               how good is the model in out/?
Three stages, each frozen before the next: vae, clip, unet. Trust OUT/samples/, not the loss. Before: sample.py."""
import argparse, contextlib, csv, dataclasses, itertools, json, math, os, re, shutil, signal, sys, tempfile, time, zlib
PRESETS = {   # what flags leave open; each stage's steps (below 64x64, where VAEs are quick, a third more), batch, rate
    "tiny": dict(image_size=128, max_images=8000, vae=(900, 16, 4e-3), clip=(250, 128, 5e-3), unet=(1100, 32, 4e-3)),
    "base": dict(image_size=256, vae=(50_000, 32, 1e-3), clip=(10_000, 512, 5e-4), unet=(200_000, 128, 5e-4)),
    "sd15": dict(image_size=512, vae=(200_000, 64, 2e-4), clip=(50_000, 1024, 3e-4), unet=(500_000, 512, 2e-4))}

def parse_args():
    """The command line -> its values, completed by the preset."""
    p = argparse.ArgumentParser(description="Train a VAE, a CLIP and a diffusion U-Net, one after the other.")
    p.add_argument("--stage", choices=["all", "vae", "clip", "unet", "eval"], default="all")
    p.add_argument("--data", default="landscapes", metavar="DIR", help="folder of pictures (default: drawn landscapes)")
    p.add_argument("--out", default="out", metavar="DIR", help="where the model goes (default: out)")
    p.add_argument("--init", metavar="MODEL", help="start from this model; by default only its U-Net learns")
    p.add_argument("--text-encoder", default="scratch", metavar="DIR|HUB_ID", help="a published CLIP's; eval: judge")
    p.add_argument("--tokenizer", metavar="DIR|HUB_ID", help="words for an --init that is a single file")
    p.add_argument("--preset", choices=PRESETS, default="tiny", help="tiny: CPU; base: one GPU; sd15: published sizes")
    p.add_argument("--image-size", type=int, metavar="N", help="pixels on a side (default: 128, 256, 512; --init's)")
    p.add_argument("--max-images", type=int, metavar="N", help="use N pictures, of all folders (tiny: 8000, else all)")
    p.add_argument("--steps", type=int, metavar="N", help="optimizer steps; --stage all: the U-Net's, others follow")
    p.add_argument("--batch-size", type=int, metavar="N", help="pictures for one optimizer step")
    p.add_argument("--grad-accum", type=int, default=1, metavar="N", help="cut a batch in N parts, to fit memory")
    p.add_argument("--grad-checkpoint", action="store_true", help="recompute activations: less memory, more time")
    p.add_argument("--lr", type=float, metavar="X", help="peak learning rate")
    p.add_argument("--min-snr", type=float, metavar="X", help="see ddpm.py; 0: off (default: 5, for v_prediction off)")
    p.add_argument("--gan-weight", type=float, default=0.0, metavar="X", help="VAE: see vae_loss; 0.5 (default: 0)")
    p.add_argument("--prediction-type", choices=["epsilon", "v_prediction"], help="see ddpm.py (tiny: v_prediction)")
    p.add_argument("--resume", action="store_true", help="go on where the run in OUT stopped")
    p.add_argument("--save-every", type=int, default=500, metavar="N", help="steps between checkpoints (%(default)s)")
    p.add_argument("--sample-every", type=int, default=250, metavar="N", help="steps between pictures (%(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="N")
    p.add_argument("--workers", type=int, default=1, metavar="N", help="processes that prepare pictures (default: 1)")
    p.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    p.add_argument("--compile", action="store_true", help="torch.compile the U-Net")
    p.error = lambda message: p.exit(2, f"train.py: {' '.join(message.split())}\n")   # one line, without usage
    args = p.parse_args()
    for flag, value in vars(args).items():
        least = 0 if flag in ("seed", "workers", "min_snr", "gan_weight") else 1e-9
        most = {"workers": 256, "batch_size": 2 ** 16, "image_size": 2 ** 11}.get(flag, 1e12)
        if type(value) in (int, float) and (not least <= value <= most or flag == "image_size" and value % 16):
            p.error(f"argument --{flag.replace('_', '-')}: {value} is not {'above' if least else 'at least'} 0, "
                    f"at most {most:g}{', a multiple of 16' * (flag == 'image_size')}")
        if value == "": p.error(f"argument --{flag.replace('_', '-')}: expected a name, not nothing")
    own = {os.path.realpath(os.path.join(args.out, part)) for part in ("", "text_encoder", "train_state/clip")}
    if args.stage != "eval" and own & {os.path.realpath(name) for name in (args.init, args.text_encoder) if name}:
        p.error("--init or --text-encoder is --out, or a part of it: the run would take it away")
    if args.stage == "clip" and (args.init or args.text_encoder != "scratch"):
        p.error("--stage clip trains one from nothing: leave out --init and --text-encoder")
    return args
ARGS = parse_args() if __name__ == "__main__" else None            # before the slow imports: --help answers at once
os.environ.setdefault("GOMP_SPINCOUNT", "4000")                    # see sample.py: beside other work 6 times as fast
import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm
from clip_encoder import build_clip, contrastive_loss, own_caption_wins, plain, settle, tokenize
from ddpm import (RANK, WORLD, Learner, NoiseSchedule, chances, diffusion_loss, endless, join, learning_rate,
                  loss_by_time, loss_profile)
from sample import (PARTS, BadInput, Pipeline, all_at_once, blame, encode_prompts, generate, load_clip, load_pipeline,
                    run, save_module, save_pipeline)
from unet import UNET_SIZES, UNet, pick_device
from vae import (VAE, DiagonalGaussian, Discriminator, as_pictures, grid, open_picture, picture_to_tensor, psnr,
                 tensor_to_pictures, vae_loss, vae_sizes)

# ---- Data: landscapes. A scene is a few choices; its caption names them, its picture shows them ----------------------
SKIES = {   # in words; colours of the zenith, the horizon, the light on the land, the sun or moon (in a storm: clouds)
    "day": ("a clear day|a bright blue sky|midday", (58, 120, 200), (190, 219, 238), (255, 255, 247), (255, 250, 214)),
    "dawn": ("dawn|sunrise|a pink morning sky", (120, 150, 205), (252, 203, 190), (219, 189, 194), (255, 238, 205)),
    "sunset": ("sunset|dusk|a red evening sky", (74, 48, 108), (255, 150, 62), (196, 138, 118), (255, 226, 140)),
    "night": ("a starry night|night|a starry sky", (7, 9, 30), (40, 52, 100), (160, 168, 205), (244, 240, 222)),
    "storm": ("a storm|a stormy sky|a dark grey sky", (58, 66, 78), (150, 156, 163), (186, 192, 198), (40, 45, 55))}
LANDS = {   # in words; colours of the farthest ridge and of the nearest
    "mountains": ("mountains|rocky peaks|a mountain range", (126, 128, 142), (76, 78, 84)),
    "hills": ("hills|rolling hills|green hills", (106, 166, 88), (54, 122, 44)),
    "dunes": ("dunes|sand dunes|a desert of dunes", (230, 190, 130), (206, 148, 82)),
    "forest": ("a forest|a fir forest|deep woods", (70, 104, 84), (22, 52, 38))}
PLACES = dict(left="on the left|to the left", middle="in the middle|in the centre", right="on the right|to the right")
EXTRAS = {"lake": "a lake|a calm lake|still water", "pines": "pine trees|a few pines", "mist": "mist|fog",
          "clouds": "clouds|drifting clouds", "snow": "snow|snow on the ground"}
NOVEL = {("night", "dunes"), ("sunset", "forest"), ("dawn", "mountains"), ("storm", "hills")}  # kept out of training

def relief(rng, x, y=None, first=(2, 2), octaves=5, gain=0.5, smooth=True):
    """Fractal noise, about [-1, 1], at columns x (W,) and rows y (H,) in [0, 1) -> (H, W), without rows (W,): random
    heights on a grid of `first` columns and rows, on it a grid twice as fine and `gain` times as high, and so on."""
    total, rows = 0.0, np.zeros(1) if y is None else y
    for k in range(octaves):
        n, m = first[0] * 2 ** k, first[1] * 2 ** k if y is not None else 0
        knots, i, j = rng.uniform(-1, 1, (m + 2, n + 2)), (rows * m).astype(int), (x * n).astype(int)
        f, g = (t * t * (3 - 2 * t) if smooth else t for t in (rows * m % 1, x * n % 1))
        across = knots[:, j] * (1 - g) + knots[:, j + 1] * g       # (m + 2, W)
        total = total + gain ** k * (across[i] * (1 - f)[:, None] + across[i + 1] * f[:, None])
    return total if y is not None else total[0]

def draw(sky, land, place, extras, rng, S):
    """A scene (place may be None) -> picture (S, S, 3), float in [0, 255]: by the same rng the same at any size S."""
    zenith, horizon, light, disc, far, near = (                    # no two evenings, nor two hills, are quite alike
        rng.uniform(0.88, 1.1) * rng.uniform(0.95, 1.05, 3) * v for v in SKIES[sky][1:] + LANDS[land][1:])
    light, ground, night, storm = light / 255, 0.60 + rng.uniform(-0.04, 0.04), sky == "night", sky == "storm"
    X, Y = np.meshgrid(c := (np.arange(S) + 0.5) / S, c)           # pixel centres; Y = 0 is the top
    def mix(picture, colour, amount): return picture + (colour - picture) * np.asarray(amount)[..., None]    # 0 to 1
    def inside(distance): return (distance * S + 0.5).clip(0, 1)   # 1 where distance > 0, 0 elsewhere, one pixel soft
    high = (1 - Y / ground).clip(0, 1)                             # the sky: a gradient, stars, clouds, sun or moon
    picture = mix(horizon, zenith, high ** 0.8)
    x, y, bright = rng.uniform((0, 0, 0.3), (1, 0.6, 1), (22 * night, 3)).T[..., None]
    rows, columns = (np.exp(-((c - at) / max(0.015, 0.7 / S)) ** 2) for at in (y, x))
    picture = mix(picture, 235, ((bright * rows).T @ columns).clip(0, 1))           # round points, whatever S
    if "clouds" in extras or storm:
        puffs = (relief(rng, c, c, (2, 7), 4) * (0.9 if storm else 1.6) + 0.1).clip(0, 0.85)
        picture = mix(picture, disc if storm else 0.35 * horizon + 166 * light ** 0.6, puffs * high ** 0.35)
    if place:
        x, y, r = rng.uniform((-0.07, 0.13, 0.055), (0.07, 0.27, 0.075))
        x += {"left": 0.2, "middle": 0.5, "right": 0.8}[place]
        d = np.hypot(X - x, Y - y) / r                             # from its centre, in radii
        picture = mix(picture, disc, (0.15 if night else 0.35) * (np.exp(-(d / 6) ** 2) + np.exp(-(d / 2.2) ** 1.3)))
        picture = mix(picture, disc, inside(r - r * d))
        light = light * (0.9 + 0.35 * np.exp(-((X - x) / 0.3) ** 2))[..., None]     # brightest below it
    for z in np.linspace(0, 1, 3 if land == "mountains" else 4):   # the land: ridges, from far (0) to near (1)
        base, slope = ground + 0.30 * z, 0.0
        if land == "mountains":                                    # straight between the knots: jagged
            crest = relief(rng, c, first=(3, 0), octaves=2, gain=0.45, smooth=False)
            top = base - (0.23 - 0.09 * z) * (0.5 + 0.7 * crest)
            slope = 0.13 * np.interp(X + 0.35 * (Y - top).clip(0), c, np.gradient(crest, c))       # lit from the left
        elif land == "hills":
            top = base - 0.09 * relief(rng, c, octaves=3, gain=0.35)
        elif land == "dunes":                                      # long windward slopes, short lee slopes in shadow
            u = c * rng.uniform(1.3, 2.2) + rng.uniform(0, 1)
            wave = np.where(u % 1 < 0.68, np.sin(u % 1 / 0.68 * np.pi / 2) ** 2, ((1 - u % 1) / 0.32) ** 1.5)
            top = base + 0.03 - 0.10 * wave - 0.02 * relief(rng, c, octaves=2)
            edge = u - 1.1 * (Y - top).clip(0) + 0.05 * np.sin(14 * Y)              # winds down from the crest
            slope = np.where((edge % 1 > 0.68) & (u % 1 > 0.5), -0.6, 0.2)
        else:                                                      # a forest: a row of pointed trees
            u = c * rng.uniform(13, 16) / (1 + 0.5 * z) + rng.uniform(0, 1)
            tall = (0.08 + 0.06 * z) * (0.75 + 0.25 * np.sin(u.astype(int) * 12.9898))
            top = base - 0.06 * relief(rng, c, octaves=3, gain=0.4) - tall * (1 - abs(2 * (u % 1) - 1))
        depth = ((Y - top) / 0.3).clip(0, 1)                       # 0 at the ridge, 1 well below
        shade = 1 + 0.5 * np.clip(slope, -0.8, 0.8) * np.exp(-2 * depth) - 0.25 * depth
        ridge = (far + (near - far) * z) * light * (shade + 0.07 * relief(rng, c, c, (6, 10), 2))[..., None]
        if "snow" in extras or land == "mountains":         # on crests, and over all that is nearest; always on peaks
            line = inside((ground - 0.11 + 0.05 * relief(rng, c, None, (12, 0), 3, 0.7, smooth=False) - Y) / 2)
            cap = inside(0.03 + 0.02 * relief(rng, c, octaves=3) + (z >= 1 - 0.5 * ("lake" in extras)) + top - Y)
            snow = 0.92 * np.maximum(line, cap * ("snow" in extras))
            ridge = mix(ridge, 250 * light ** 0.35 * shade.clip(0.72, 1.05)[..., None], snow)
        ridge = mix(ridge, horizon * (0.4 + 0.6 * light), 0.55 * (1 - z) ** 1.5)    # the air between
        picture = mix(picture, ridge, inside(Y - top))
        if "mist" in extras:                                       # a bank hides the horizon; what is near shows
            bank = 0.95 * np.exp(-((Y - ground - 0.055 - 0.02 * relief(rng, c, octaves=3)) / 0.045) ** 4) * (z < 0.4)
            veil = (0.7 - z / 3) * np.exp(-((Y - base - 0.055) / 0.08) ** 2) * (1 + 0.3 * relief(rng, c, c, (3, 3), 3))
            picture = mix(picture, (0.1 * horizon + 215 * light ** 0.5).clip(0, 255), np.maximum(veil, bank))
    if "lake" in extras:                                           # a mirror: squeezed, tinted, rippled
        shore = 0.83 + rng.uniform(-0.03, 0.03)                    # higher up, too little land would be left to learn
        mirrored = shore - 2.1 * (c - shore) + 0.012 * relief(rng, c, first=(24, 0), octaves=2)
        water = 0.6 * picture[(mirrored * S).clip(0, S - 1).astype(int)] + 0.4 * (0.2 * zenith + 0.8 * horizon)
        picture = mix(picture, water, inside(Y - shore - 0.012 * relief(rng, c, first=(3, 0), octaves=3)))
    side, many = rng.integers(2), rng.integers(2, 5) * ("pines" in extras)
    for x, foot, tall in rng.uniform((0.03, 0.95, 0.34), (0.3, 1.02, 0.52), (many, 3)):
        up = (foot - Y) / tall                                     # a pine near by: 0 at its foot, 1 at its tip
        width = np.where(up < 0.1, 0.03, 0.26 * (1 - up) * (1 - 0.38 * ((6 * up) % 1))) * tall
        tree = inside(width - abs(X - abs(side - x))) * (up > 0) * (up < 1)
        picture = mix(picture, np.array((30, 54, 40)) * (0.25 + 0.6 * light), tree)
    return picture.clip(0, 255)

class Landscapes:
    """Drawn scenes: [i] -> (picture (3, S, S) float32 in [-1, 1], caption), the same i always the same. split "train":
    20,000; "val": 3,000 others of the same kinds; "novel": 3,000 joining a sky and a land that "train" never joins."""
    def __init__(self, image_size=64, split="train"):
        self.image_size, self.split = image_size, ("train", "val", "novel").index(split)
    def __len__(self): return 3000 if self.split else 20000
    def plan(self, i):
        """Scene i: its choices, its caption (all of it, some, or just "a landscape"), the generator to draw it with."""
        rng = np.random.default_rng((self.split, range(len(self))[i]))              # IndexError beyond
        def say(words): return str(rng.choice(words.split("|")))
        pairs = [(sky, land) for sky in SKIES for land in LANDS if ((sky, land) in NOVEL) == (self.split == 2)]
        sky, land = pairs[rng.integers(len(pairs))]
        place = [*PLACES, None][rng.choice(4, p=(0.27, 0.27, 0.27, 0.19))] if sky != "storm" else None
        weather = (None, "clouds", "mist", "snow")[rng.choice(4, p=(0.4, 0.22, 0.2, 0.18))]
        extras = [e for e, p in (("lake", 0.35), ("pines", 0.35), (weather, 1)) if e and rng.random() < p]
        details = [say(EXTRAS[e]) for e in extras]
        details += [f"the {'moon' if sky == 'night' else 'sun'} {say(PLACES[place])}"] if place else []
        rng.shuffle(details)
        above, below, kind = say(SKIES[sky][0]), say(LANDS[land][0]), rng.random()
        under = "under" if "sky" in above or "storm" in above else "on" if above.startswith("a ") else "at"
        whole = f"{above} over {below}|{below}, {above}|a landscape with {below}, {above}|{below} {under} {above}"
        some = [say(f"{above}|{below}|{whole}"), *details[: rng.integers(len(details) + 1)]]
        words = ["a landscape"] if kind < 0.08 else some if kind < 0.45 else [say(whole), *details]
        return (sky, land, place, extras), say(", |, | with | and ").join(rng.permutation(words)), rng
    def caption(self, i): return self.plan(i)[1]                   # without drawing it
    def __getitem__(self, i):
        scene, caption, rng = self.plan(i)
        return torch.from_numpy(draw(*scene, rng, self.image_size)).permute(2, 0, 1).float() / 127.5 - 1, caption

# ---- Data: a folder of pictures; and how pictures, latents and text states are kept ----------------------------------
class ImageFolder:
    """Pictures below root, but for those in `out`: [i] -> (picture (3, S, S) float32 in [-1, 1], caption), cropped to
    squares. The caption is what is there first: a line of root/metadata.jsonl or .csv (file_name, text), the text
    beside it (a.txt, a.caption for a.jpg), its subfolder's name, its own. Every 20th is "val", not "train". What cannot
    be used is told once. BadInput if nothing can; ValueError from [i] if a picture is broken."""
    def __init__(self, root, image_size=64, split="train", out=""):
        drawn, lost = [os.path.realpath(f"{out}/{name}") for name in ("", "samples") if out], []    # training's own
        kinds = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN} | {".heic", ".jxl"}
        files = sorted(os.path.relpath(os.path.join(folder, name), root)
                       for folder, _, names in os.walk(root, onerror=lambda e: lost.append(e.filename))
                       if os.path.realpath(folder) not in drawn and f"{os.sep}." not in folder[len(str(root)) - 1:]
                       for name in names if name[0] != "." and os.path.splitext(name)[1].lower() in kinds)
        def readable(path):
            with contextlib.suppress(Exception):                   # of a picture the head alone, of a pipe nothing
                return os.path.isfile(os.path.join(root, path)) and Image.open(os.path.join(root, path)).close() is None
        paths = [p for k, p in enumerate(files) if k >= 10_000 or readable(p)]      # the rest shows when its turn comes
        self.paths = [p for k, p in enumerate(paths) if len(paths) < 20 or (k % 20 == 10) == (split == "val")]
        self.root, self.image_size, rows = root, image_size, []
        for path in filter(os.path.isfile, (os.path.join(root, name) for name in ("metadata.csv", "metadata.jsonl"))):
            with blame(f"{path}: each line has file_name and text"), open(path, encoding="utf-8-sig", newline="") as f:
                for line in (csv.DictReader(f, strict=True) if path.endswith("csv") else
                             map(json.loads, filter(str.strip, f))):
                    assert not any(line.get(None, ())), "a text with commas belongs in quotes"
                    rows.append((os.path.normpath(line["file_name"]), plain(str(line["text"] or ""))))
        self.table, names = dict(rows), [name for name, _ in rows]
        twice = {name for name, following in itertools.pairwise(sorted(names)) if name == following}
        for what, odd in (("unreadable, left out", {*files, *lost} - {*paths, root}),
                          ("in metadata, but not in the folder, or twice", {*names} - {*files} | twice)):
            if odd and split == "train" and RANK == 0:
                print(f"train.py: --data {root}: {len(odd)} {what}: {sorted(odd)[:20]}", file=sys.stderr)
        if not self.paths:
            raise BadInput(f"--data {root}: no such folder, or no readable picture in it (.png, ...), nor in --out")
    def __len__(self): return len(self.paths)
    def caption(self, i):                                          # without opening it
        stem = os.path.splitext(self.paths[i])[0]
        if self.paths[i] in self.table: return self.table[self.paths[i]]
        for beside in filter(os.path.isfile, (os.path.join(self.root, stem + ext) for ext in (".txt", ".caption"))):
            with contextlib.suppress(OSError), open(beside, encoding="utf-8-sig", errors="replace") as f:
                return f.read(10_000).strip()
        return plain((os.path.basename(os.path.dirname(stem)) or stem).replace("_", " ").replace("-", " "))
    def __getitem__(self, i):
        picture = open_picture(os.path.join(self.root, self.paths[i]))
        return picture_to_tensor(picture, self.image_size, self.image_size)[0], self.caption(i)

class Kept:
    """kept[indices] -> rows (B, *shape), each computed when first asked for, then kept in a memory-mapped file for as
    long as the process lives (beyond 8 GiB, not kept): training starts at once, and nothing need fit in memory."""
    def __init__(self, n, shape, dtype, compute, folder, block=1):
        # `block` neighbours are computed together, so that who asks first changes no bit; forked processes share them
        self.compute, self.block, self.rows, size = compute, block, None, n * math.prod(shape)
        self.done = torch.zeros(n, dtype=torch.bool).share_memory_()
        if size * dtype.itemsize < 2 ** 33:
            with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as f:
                if hasattr(os, "posix_fallocate"): os.posix_fallocate(f.fileno(), 0, size * dtype.itemsize)  # no room?
                self.rows = torch.from_numpy(np.memmap(f, str(dtype)[6:], "r+", shape=(n, *shape)))
    def __getitem__(self, indices):
        if self.rows is None: return self.compute(indices).cpu()
        for first in sorted({i // self.block * self.block for i in indices if not self.done[i]}):
            todo = list(range(first, min(first + self.block, len(self.done))))
            self.rows[todo], self.done[todo] = self.compute(todo).to("cpu", self.rows.dtype), True
        return self.rows[indices]

def open_data(args, split):
    """The data set, with what the stages want of it: n, captions, pixels[indices] -> bytes (B, 3, S, S), and then
    shown[indices], which pictures these are: the next stands in for one that cannot be read. To learn from, photographs
    count twice, the second time mirrored, unless their caption says left or right: a few then last longer."""
    S, drawn = args.image_size, args.data == "landscapes"
    data = Landscapes(S, split) if drawn else ImageFolder(args.data, S, split, args.out)
    most = min(len(data), args.max_images or PRESETS[args.preset].get("max_images", len(data)))
    at = range(most) if drawn else [k * len(data) // most for k in range(most)]     # some of every folder
    data.captions = [data.caption(i) for i in at] * (1 + (split == "train" and not drawn))
    n, sided = len(data.captions), re.compile(r"(?<![^\W_])(left|right)(most|wards?)?(?![^\W_])", re.IGNORECASE)
    data.n, data.files, data.shown = n, most, torch.arange(n).share_memory_()
    def read(i):
        for j in itertools.chain(range(i, n), range(i)):
            try:
                x, data.shown[i] = data[at[j % most]][0] + 1, j
                return ((x.flip(2) if j >= most and not sided.search(data.captions[j]) else x) * 127.5).round().byte()
            except ValueError as e:
                if i == j == data.shown[i] and i < most:           # told once
                    print(f"train.py: --data: left out: {e}", file=sys.stderr)
        raise BadInput(f"--data {args.data}: none of its pictures can be read")
    os.makedirs(f"{args.out}/samples", exist_ok=True)
    data.pixels = Kept(n, (3, S, S), torch.uint8, lambda indices: torch.stack([*map(read, indices)]), args.out)
    data.pixels[[0]]                                               # is there any that can be read?
    return data

def set_aside(out, anew, resume):
    """Copy OUT's model to OUT/previous-K, then take away what is trained anew and a U-Net on it. BadInput to resume."""
    gone = ("unet scheduler model_index.json train_state/unet.pt" + " vae train_state/vae.pt" * ("vae" in anew)).split()
    gone += "text_encoder tokenizer train_state/clip train_state/clip.pt".split() * ("clip" in anew)
    old = [path for path in (f"{out}/{name}" for name in gone) if os.path.exists(path)]
    if old and resume:
        raise BadInput(f"--resume: {out}/ holds another run: repeat its --stage and --init, or leave out --resume")
    if old:
        to = next(path for k in itertools.count(1) if not os.path.exists(path := f"{out}/previous-{k}"))
        model = {*PARTS, "tokenizer", "scheduler", "model_index.json", "train_state"}       # not what else lies there
        with all_at_once(f"{out}/.copy") as copy:
            shutil.copytree(out, copy, ignore=lambda at, all_: {*all_} - model if at == out else (), dirs_exist_ok=True)
        os.rename(f"{out}/.copy", to)
        print(f"train.py: {out}/ holds an earlier run, of which {to}/ is a copy", file=sys.stderr)
    for path in old: os.remove(path) if os.path.isfile(path) or os.path.islink(path) else shutil.rmtree(path)

# ---- The loop: one for all three stages ------------------------------------------------------------------------------
def fit(stage, model, args, data, loss_of, show, keep, pixels=None):
    """Train model for the stage's steps. loss_of(model, pixels, indices, generators: each picture's own) -> (loss, its
    parts); show(average, step) draws, for a person to judge; keep(average) hands it on -> write(folder), to save it."""
    (steps, B, peak), unet_steps = PRESETS[args.preset][stage], PRESETS[args.preset]["unet"][0]
    asked = args.steps or (1500 if args.preset == "tiny" and args.image_size < 64 and not args.init else unet_steps)
    steps = max(1, asked * steps // unet_steps) if args.stage == "all" or not args.steps else args.steps
    B, peak = args.batch_size or B, args.lr or (1e-5 if args.init else peak)        # --init: gently
    size, path = B // (args.grad_accum * WORLD), f"{args.out}/train_state/{stage}.pt"       # size: of what fits at once
    learner = Learner(model.to(args.device), loss_of, args.dtype, args.settings | dict(steps=steps), stage)
    if args.resume and os.path.exists(path):
        with blame(f"--resume: {path}"):
            learner.load_state_dict(torch.load(path, map_location=args.device, weights_only=True))
            after = f"{args.out}/{'train_state/unet.pt' if args.init else 'unet'}"  # --init's own U-Net comes along
            assert stage == "unet" or learner.done == steps and not args.init or not os.path.exists(after), \
                f"the U-Net in {args.out}/ was trained with this part as it is; move {after} away first"
    start, rows, picture_at = learner.done, learner.rows, endless(data.n, args.seed)    # place in a row -> picture
    if args.compile: model.compile()
    # Side by side, for each part of a batch of this process: its pixels, its indices, its random generators.
    def places(): return (range(k, k + size) for k in range(start * B + RANK * size, steps * B, WORLD * size))
    def batches(): return ([picture_at(place) for place in batch] for batch in places())
    stop = vars(args).setdefault("stop", [])                       # one list for all stages
    signal.signal(signal.SIGINT, lambda *_: stop.append("Ctrl-C"))                 # finish the step, save, and go
    workers = args.workers if sys.platform == "linux" else 0       # elsewhere processes cannot share what they keep
    ready = itertools.repeat(None) if pixels is None else torch.utils.data.DataLoader(
        pixels, None, sampler=batches(), num_workers=workers, multiprocessing_context="fork" if workers else None)
    supply, sums = zip(ready, batches(), (chances(args.seed, batch) for batch in places())), {}
    def save():
        write = keep(learner.average)
        if RANK == 0:
            with all_at_once(args.out) as to:
                write(to)
                os.makedirs(f"{to}/train_state", exist_ok=True)
                torch.save(learner.state_dict(), f"{to}/train_state/{stage}.pt")
    began, log = time.time(), open(os.devnull if RANK else f"{args.out}/log-{stage}.jsonl", "w", 1)
    log.writelines(json.dumps(row) + "\n" for row in rows)
    bar = tqdm(range(start, steps), stage, initial=start, total=steps, unit="step", mininterval=1, disable=RANK > 0)
    for step in bar:
        numbers, stopping = learner.gradient([*itertools.islice(supply, args.grad_accum)], stop)
        learner.step(lr := learning_rate(step, steps, peak))
        for name, value in numbers.items(): sums.setdefault(name, []).append(value)
        done, last = step + 1, step + 1 == steps or stopping
        if done % 10 == 0 or done % args.sample_every == 0 or last:
            row, sums = {name: sum(values) / len(values) for name, values in sums.items()}, {}
            rows.append(dict(step=done, lr=lr, samples_per_second=(done - start) * B / (time.time() - began), **row))
            log.write(json.dumps(rows[-1]) + "\n")
            bar.set_postfix_str(" ".join(f"{name} {value:.3g}" for name, value in row.items()))
        if RANK == 0 and (done % args.sample_every == 0 or last):
            show(learner.average, done)
            plot(rows, f"{args.out}/loss-{stage}.png")
        if done % args.save_every == 0 or last: save()
        if stopping and done < steps: sys.exit(f"train.py: {stage} stopped at step {done} of {steps}; --resume goes on")
    if start >= steps: save()                                      # resumed at the end: nothing was left to train

def plot(rows, path, W=640, H=360):
    """The losses of a log (list of dict) as a curve, on a logarithmic scale."""
    xs, ys = [row["step"] / rows[-1]["step"] for row in rows], [math.log10(max(row["loss"], 1e-9)) for row in rows]
    low, high, pen = min(ys), max(ys) + 1e-6, ImageDraw.Draw(sheet := Image.new("L", (W, H), 255))
    pen.line([(10 + x * (W - 20), 30 + (high - y) / (high - low) * (H - 40)) for x, y in zip(xs, ys)], 0)
    pen.text((10, 5), f"loss: {10 ** high:.3g} (top) to {10 ** low:.3g}", 0)
    sheet.save(path)

# ---- The three stages, each with its `loss_of`, and the measure of the result ----------------------------------------
def train_vae(pipe, data, val, args):
    """Stage 1: pictures -> latents -> pictures. Sets pipe.vae. Learns from windows of half the side, as published ones
    did. Scales latents to a spread of 1, tiny to less: layouts drown at more t (Chen 2023)."""
    fresh, vae = pipe.vae is None, pipe.vae or VAE(**vae_sizes(args.preset, args.image_size))
    vae.to(memory_format=torch.channels_last).set_grad_checkpoint(args.grad_checkpoint)
    models = torch.nn.ModuleDict({"vae": vae} | ({"discriminator": Discriminator()} if args.gan_weight else {}))
    unseen = as_pictures(val.pixels[list(range(min(val.n, max(8, 2 ** 18 // args.image_size ** 2))))], args.device)
    def show(models, step):
        x, redrawn = unseen[:8], models["vae"].decode(models["vae"].encode(unseen[:8]).mode())
        grid(tensor_to_pictures(torch.cat([x, redrawn])), len(x), 128).save(f"{args.out}/samples/vae-{step:06d}.png")
    def keep(models):
        vae = pipe.vae = models["vae"]
        if fresh:                    # right at 64x64: novel pairs 96 % at 0.7, 94 at 1; CIFAR-10 74 % at 0.5, 66 at 0.7
            spread = vae.encode(unseen).sample(torch.Generator().manual_seed(0)).std().item()
            vae.scaling_factor = (1 if args.preset != "tiny" else 0.7 if args.data == "landscapes" else 0.5) / spread
        return lambda to: save_pipeline(pipe, to, ["vae"] if fresh else PARTS, contextlib.nullcontext)
    def loss_of(models, pixels, _, generators, side=max(1, args.image_size // vae.f // 2) * vae.f):         # of windows
        corners = [torch.randint(args.image_size - side + 1, (2,), generator=g) for g in generators]
        x = torch.stack([picture[:, i: i + side, j: j + side] for picture, (i, j) in zip(pixels, corners)])
        return vae_loss(**models, x=as_pictures(x, args.device), generator=generators, gan_weight=args.gan_weight)
    fit("vae", models, args, data, loss_of, show, keep, data.pixels)     # in equal time 1.3 dB above whole pictures

def train_clip(pipe, data, val, args):
    """Stage 2: captions beside their pictures. Sets pipe.tokenizer and pipe.text_encoder."""
    pipe.tokenizer, clip = build_clip(args.preset, args.image_size, data.captions)
    ids = tokenize(pipe.tokenizer, data.captions)
    def keep(clip):
        pipe.text_encoder = clip.text_encoder(0 if args.preset == "tiny" else None)         # see build_clip
        return lambda to: (save_pipeline(pipe, to, ["text_encoder"], contextlib.nullcontext),
                           save_module(clip, f"{to}/train_state/clip", "clip"),
                           pipe.tokenizer.save_pretrained(f"{to}/train_state/clip"))    # eval needs both towers
    fit("clip", clip, args, data, lambda clip, pixels, indices, _: contrastive_loss(clip, as_pictures(
        pixels, args.device), ids[data.shown[indices]].to(args.device), join), lambda *_: None, keep, data.pixels)

def train_unet(pipe, data, val, args):
    """Stage 3: noise in latents, given the time and the text. Sets pipe.unet."""
    vae, schedule, device, side = pipe.vae, pipe.schedule, args.device, args.image_size // pipe.vae.f
    length, width = encode_prompts(pipe, [""]).shape[1:]           # of every text: T, D
    unet = pipe.unet or UNet(**UNET_SIZES[args.preset], cross_attention_dim=width, sample_size=side)
    unet.config["sample_size"] = side                              # what sample.py will draw by default
    unet.to(memory_format=torch.channels_last).set_grad_checkpoint(args.grad_checkpoint)
    min_snr = 5.0 * (schedule.prediction_type == "epsilon") if args.min_snr is None else args.min_snr
    # VAE and text encoder are frozen: what they say of a picture and of a caption is computed once.
    row = {text: k for k, text in enumerate(dict.fromkeys(["", *data.captions]))}   # each once; 0 is for dropped ones
    @torch.autocast(device.type, args.dtype, enabled=args.dtype == torch.bfloat16)          # float16 may overflow there
    def moments(indices):                                          # -> mean and log variance (B, 2*4, h, w)
        return vae.quant_conv(vae.encoder(as_pictures(data.pixels[indices], device)))
    latents = Kept(data.n, (2 * vae.config["latent_channels"], side, side), torch.float16, moments, args.out, 8)
    contexts = Kept(len(row), (length, width), torch.float16,
                    lambda rows, texts=[*row]: encode_prompts(pipe, [texts[r] for r in rows]), args.out, 8)
    def loss_of(unet, _, indices, generators):                     # DDPM's Algorithm 1, on latents: LATENT diffusion
        x0 = vae.scaling_factor * DiagonalGaussian(latents[indices]).sample(generators).to(device)
        # Drop the caption of every tenth: one network learns to answer with and without text. `guide` needs both.
        captions = (data.captions[i] for i in data.shown[indices].tolist())
        rows = [0 if torch.rand((), generator=g) < 0.1 else row[text] for text, g in zip(captions, generators)]
        context = contexts[rows].float().to(device)                # (B, T, D)
        t = torch.cat([torch.randint(0, schedule.T, (1,), generator=g) for g in generators]).to(device)
        eps = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators]).to(device)
        losses = diffusion_loss(schedule, lambda x_t, t: unet(x_t, t, context), x0, t, eps, min_snr)
        return losses.mean(), loss_by_time(losses, t, schedule.T)
    prompts = list(dict.fromkeys(["a landscape"] * (args.data == "landscapes") + val.captions))[:16]
    def show(unet, step):
        pictures = generate(now := dataclasses.replace(pipe, unet=unet), prompts, "", 15, now.guidance, progress=False)
        grid(pictures, 8, 128).save(f"{args.out}/samples/unet-{step:06d}.png")
    def keep(unet):
        pipe.unet = unet
        return lambda to: save_pipeline(pipe, to, into=contextlib.nullcontext)
    fit("unet", unet, args, data, loss_of, show, keep)

@torch.no_grad()
def evaluate(pipe, data, val, args, n=100):
    """Print how good the model is, by pictures that training never saw and with the CLIP as judge."""
    few = list(range(min(val.n, max(8, 2 ** 20 // args.image_size ** 2))))
    x, generator = as_pictures(val.pixels[few], args.device), torch.Generator().manual_seed(0)
    print(f"reconstruction PSNR     {psnr(pipe.vae, x):.1f} dB")
    x0 = pipe.vae.scaling_factor * pipe.vae.encode(x).sample(generator)
    context = encode_prompts(pipe, [val.captions[i] for i in val.shown[few].tolist()])
    profile = loss_profile(pipe.schedule, lambda x_t, t: pipe.unet(x_t, t, context), x0, generator)
    print("loss per range of t     " + ", ".join(f"{name} {loss:.3f}" for name, loss in profile.items()))
    judge = f"{args.out}/train_state/clip" if args.text_encoder == "scratch" else args.text_encoder
    if judge != args.text_encoder and not os.path.isdir(judge):
        return print("no CLIP to judge by: name one, such as --text-encoder openai/clip-vit-large-patch14")
    clip, words = load_clip(judge, args.device)
    chosen = sorted({val.captions[i]: i for i in reversed(range(val.n))}.values())[:n]     # the first of each caption
    real, captions = as_pictures(val.pixels[chosen], args.device), [val.captions[i] for i in val.shown[chosen].tolist()]
    grid(drawn := generate(pipe, captions, guidance=pipe.guidance), 10, 128).save(f"{args.out}/samples/eval.png")
    drawn = torch.cat([picture_to_tensor(picture, *picture.size[::-1]) for picture in drawn])
    ids = tokenize(words, captions).to(args.device)
    for name, x in (("CLIP retrieval, real   ", real), ("R-precision, drawn     ", drawn.to(args.device))):
        print(f"{name} {own_caption_wins(clip, x, ids):.0%} pick their own caption out of {len(captions)}")

def main(args):
    """Run the stages that the command line (parse_args) asks for."""
    with blame("--device" + f", {WORLD} processes" * (WORLD > 1)):
        args.device, args.dtype = pick_device(args.device, args.dtype)
        if WORLD > 1: torch.distributed.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    settle(args.out)
    words = ["text_encoder"] * (args.text_encoder == "scratch" or args.stage == "eval")
    todo = [args.stage] if args.stage != "all" else ["unet"] if args.init else ["vae", *["clip"] * len(words), "unet"]
    need = PARTS if args.init else {"unet": ["vae", *words], "eval": ["vae", *words, "unet"]}.get(todo[0], [])
    pipe = load_pipeline(args.init or args.out + "/", args.device, tokenizer=args.tokenizer, parts=need,
                         prediction_type=args.prediction_type) if need else Pipeline(schedule=NoiseSchedule())
    if not words: pipe.text_encoder, pipe.tokenizer = load_clip(args.text_encoder, args.device, "text_encoder")
    if pipe.unet is None:                                          # a new one; why: see diffusion_loss
        pipe.schedule.prediction_type = args.prediction_type or ("v_prediction" if args.preset == "tiny" else "epsilon")
    takes, preset = pipe.unet.config if pipe.unet else {}, PRESETS[args.preset]
    args.image_size = args.image_size or (takes["sample_size"] * pipe.vae.f if takes else preset["image_size"])
    if pipe.vae and args.image_size % pipe.vae.f:
        raise BadInput(f"--image-size {args.image_size} is no multiple of {pipe.vae.f}, as this VAE halves pictures")
    if takes and (takes["in_channels"], takes["cross_attention_dim"]) != (4, pipe.text_encoder.config["hidden_size"]):
        raise BadInput("--init: a U-Net for inpainting, or for a text encoder of another width")
    if any((args.batch_size or preset[stage][1]) % (args.grad_accum * WORLD) for stage in todo if stage != "eval"):
        raise BadInput(f"--batch-size is no multiple of --grad-accum {args.grad_accum} x {WORLD} processes")
    data = val = open_data(args, "train")                          # fewer than 20 serve as both
    with contextlib.suppress(BadInput):                            # or where none for "val" can be read
        val = open_data(args, "val") if len(data) > 18 else data
    free = "stage out resume save_every sample_every workers device compile grad_checkpoint steps".split()
    args.settings = {flag: str(value).removeprefix("torch.") for flag, value in vars(args).items() if flag not in free}
    said = zlib.crc32(repr(data.captions).encode())                # settings: what changes weights
    args.settings["data"] = f"{os.path.normpath(args.data)} with {data.n} pictures, captions {said:x}"
    begun = args.resume and os.path.exists(f"{args.out}/train_state/{todo[0]}.pt")          # else there is nothing yet
    if WORLD > 1: torch.distributed.barrier()                      # all have read what they need
    anew = todo + ["vae", "clip"] * bool(args.init) + ["clip"] * (args.text_encoder != "scratch")
    if not (begun or todo == ["eval"] or RANK): set_aside(args.out, anew, args.resume)
    usual = (args.preset, len(todo), args.image_size, args.batch_size, args.device.type, args.dtype, begun, WORLD) == (
        "tiny", 3, 128, None, "cpu", torch.float32, False, 1)      # each step of it takes as long as 50 of these:
    x, w, steps = torch.randn(32, 64, 32, 32), torch.randn(64, 64, 3, 3), args.steps or preset["unet"][0]
    wait = np.ptp([(torch.conv2d(x, w, padding=1), time.time())[1] for _ in range(100 * usual + 1)]) * 0.50 * steps
    RANK or print(f"{data.files:,} pictures of {args.image_size}x{args.image_size}; {', '.join(todo)} on {args.device} "
          f"in {str(args.dtype)[6:]}{f'; about {wait / 60:.0f} minutes' * usual}; model: {plain(args.out)}/")
    for stage in todo:
        torch.manual_seed(args.seed)                               # so that a stage run apart starts the same
        {"vae": train_vae, "clip": train_clip, "unet": train_unet, "eval": evaluate}[stage](pipe, data, val, args)
    if WORLD > 1: torch.distributed.destroy_process_group()

if __name__ == "__main__": run(main, ARGS)
