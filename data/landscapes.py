"""Draws nanoSD's default data set: landscapes in the manner of flat-design posters, with captions.

    python data/landscapes.py                                   # 8,400 pictures in data/landscapes
    python data/landscapes.py --split val --count 400 --out val

It writes 00000.png, 00001.png, ... and then metadata.jsonl, one line for each picture:

    {"file_name": "00000.png", "text": "rolling hills at dawn, pines, the sun on the left",
     "sky": "dawn", "land": "hills", "place": "left", "extras": ["pines"]}

A scene is chosen first, at random: a sky, a land, the place of the sun or moon, and up to three
extras. Then it is described in words, and drawn. Your own pictures can be trained on in the same
way: a folder with a metadata.jsonl of `file_name` and `text`.

Seed, split and index decide a scene; the size only scales it. "val" shows the same pairs of sky and
land as "train". "novel" shows pairs that "train" never does: a model that draws them right has
learnt what the two words mean, and not the pictures by heart.
"""
import argparse
import functools
import json
import multiprocessing
import random
from pathlib import Path
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageOps
from tqdm import tqdm

# Skies, and their colors: at the top, at the horizon, of the sun or moon, of clouds, and of the
# shadow that tints the land.
SKIES = {
    "day":    ("#3a8ee0", "#d4eef8", "#fff0a0", "#ffffff", "#a0b8a8"),
    "dawn":   ("#8098dc", "#ffccc0", "#fff6e0", "#fff0f0", "#a06080"),
    "sunset": ("#5c2f80", "#ff8456", "#ffe070", "#ffbe98", "#402038"),
    "night":  ("#0b1030", "#5470b8", "#f6f2dc", "#7c8cc4", "#000018"),
    "storm":  ("#454d5c", "#a4acb8", "#ffffff", "#2c303c", "#202428"),
}

# Lands: three rows of a shape, how many in a row, about how tall (1: the picture), their color.
LANDS = {
    "mountains": ("peak", 4, 0.19, "#56688e"),
    "hills":     ("hill", 3, 0.13, "#4c9c4c"),
    "dunes":     ("dune", 3, 0.13, "#e09c50"),
    "forest":    ("fir", 7, 0.28, "#24594a"),
}

# "train" and "val" show the other 16 pairs: every sky and every land in three or more.
NOVEL_PAIRS = [("dawn", "forest"), ("sunset", "hills"), ("night", "dunes"), ("storm", "mountains")]

# Where the sun or moon stands, from 0 to 1; None: outside of the picture.
PLACES = {"left": 0.2, "middle": 0.5, "right": 0.8, None: 2.0}

# Each extra comes from another group: mist would hide snow. A storm has clouds of its own, and
# takes nothing from the last group. Half of the lakes have a boat.
GROUPS = [["lake"], ["pines"], ["cabin"], ["mist", "snow"], ["clouds", "birds"]]

# What captions call all these.
WORDS = {
    "day": "on a clear day|under a blue sky|at midday",
    "dawn": "at dawn|at sunrise|under a pink morning sky",
    "sunset": "at sunset|at dusk|under a red evening sky",
    "night": "at night|on a starry night|under a starry sky",
    "storm": "in a storm|under a stormy sky|under a dark grey sky",
    "mountains": "mountains|rocky peaks|a mountain range",
    "hills": "hills|rolling hills|gentle hills",
    "dunes": "dunes|sand dunes|a desert",
    "forest": "a forest|a fir forest|the woods",
    "left": "on the left|to the left",
    "middle": "in the middle|in the center",
    "right": "on the right|to the right",
    "lake": "a lake|a calm lake",
    "boat": "a sailing boat|a sailboat",
    "pines": "pines|tall pines|pine trees",
    "cabin": "a cabin|a cabin with a lit window",
    "mist": "mist|fog",
    "snow": "snow|fresh snow",
    "clouds": "clouds|some clouds",
    "birds": "birds|flying birds",
}

# Shapes: colored polygons, those at the back first, as points "x y" with y up and (0, 0) at
# the foot. "body" and "snow" are colors that the drawing chooses.
SHADE = "#00000030"    # black, nearly clear: colors may have alpha, "#rrggbbaa"
SHAPES = {
    "ground": [
        ("body", "-1 0  2 0  2 -2  -1 -2")],
    "disc": [
        ("body", "1 0  .98 .2  .92 .38  .83 .56  .71 .71  .56 .83  .38 .92  .2 .98  0 1  "
                 "-.2 .98  -.38 .92  -.56 .83  -.71 .71  -.83 .56  -.92 .38  -.98 .2  -1 0  "
                 "-.98 -.2  -.92 -.38  -.83 -.56  -.71 -.71  -.56 -.83  -.38 -.92  -.2 -.98  "
                 "0 -1  .2 -.98  .38 -.92  .56 -.83  .71 -.71  .83 -.56  .92 -.38  .98 -.2")],
    "cloud": [
        ("body", "-1 .2  -.98 .29  -.92 .36  -.83 .4  -.66 .4  -.6 .5  -.52 .56  -.43 .59  "
                 "-.33 .58  -.25 .54  -.18 .48  -.14 .59  -.05 .68  .05 .74  .17 .76  .31 .73  "
                 ".43 .65  .5 .54  .53 .4  .88 .38  .97 .31  1 .2  .98 .12  .94 .06  .88 .02  "
                 ".8 0  -.8 0  -.88 .02  -.94 .06  -.98 .12")],
    "bolt": [
        ("#fff2a8", ".1 1  -.18 .48  .02 .48  -.12 0  .24 .6  .06 .6  .34 1")],
    "birds": [
        ("#ffffff", "-1.7 .5  -1.45 .5  -1.2 .25  -.95 .5  -.7 .5  -1.2 -.1"),
        ("#ffffff", "-.5 -.3  -.25 -.3  0 -.55  .25 -.3  .5 -.3  0 -.9"),
        ("#ffffff", ".6 .8  .85 .8  1.1 .55  1.35 .8  1.6 .8  1.1 .2")],
    "peak": [
        ("body", "-1.2 0  0 1  1.2 0"),
        ("snow", "-.6 .5  0 1  .6 .5  .3 .65  0 .4  -.3 .65"),
        (SHADE, "0 1  .3 0  1.2 0")],
    "hill": [
        ("body", "-3.5 0  -3.1 .03  -2.8 .1  -2.4 .22  -2.1 .35  -1.7 .52  -1.4 .66  -1 .81  "
                 "-.7 .91  -.35 .98  0 1  .35 .98  .7 .91  1 .81  1.4 .66  1.7 .52  2.1 .35  "
                 "2.4 .22  2.8 .1  3.1 .03  3.5 0"),
        ("snow", "-1.7 .52  -1.4 .66  -1 .81  -.7 .91  -.35 .98  0 1  .35 .98  .7 .91  1 .81  "
                 "1.4 .66  1.7 .52  1.1 .55  .6 .4  0 .5  -.6 .4  -1.1 .55")],
    "dune": [
        ("body", "-3 0  -2.5 .06  -2 .18  -1.5 .38  -1 .63  -.5 .85  0 1  .3 .72  .7 .4  "
                 "1.2 .14  1.8 0"),
        ("snow", "-1.5 .38  -1 .63  -.5 .85  0 1  .3 .72  .7 .4  0 .5  -.6 .36"),
        (SHADE, "0 1  .3 .72  .7 .4  1.2 .14  1.8 0  .4 0  0 .15  -.1 .3  0 .45  .2 .6  .2 .75")],
    "fir": [
        ("#3a2a22", "-.03 0  -.03 .12  .03 .12  .03 0"),
        ("body", "-.27 .1  -.11 .5  -.2 .5  0 1  .2 .5  .11 .5  .27 .1"),
        ("snow", "-.12 .7  0 1  .12 .7"),
        (SHADE, "0 .1  0 1  .2 .5  .11 .5  .27 .1")],
    "cabin": [
        ("#8a4e34", "-.45 0  -.45 .55  .45 .55  .45 0"),
        ("#4a2a24", "-.6 .5  0 1  .6 .5"),
        ("#ffe27a", "-.16 .14  -.16 .42  .16 .42  .16 .14")],
    "boat": [
        ("#ffffff", "0 .24  0 1  .45 .24"),
        ("#f4cfb4", "-.07 .24  -.07 .85  -.36 .24"),
        ("#b03028", "-.5 .2  .55 .2  .35 0  -.3 0")],
}

# Where the stars are, "x y" in image widths, y down; every night they are a little off.
STARS = (".04 .06  .09 .25  .13 .12  .17 .37  .23 .05  .27 .2  .31 .32  .36 .1  .41 .24  .44 .04  "
         ".49 .35  .55 .09  .58 .22  .63 .03  .66 .3  .72 .14  .76 .38  .82 .07  .85 .24  .91 .15  "
         ".94 .33  .97 .04")

def mix(a, b, share):
    """The color a for share 0, b for share 1; colors are "#rrggbb"."""
    pairs = zip(ImageColor.getrgb(a), ImageColor.getrgb(b))
    return "#%02x%02x%02x" % tuple(round(x + share * (y - x)) for x, y in pairs)

def vary(rng, color):
    """The color with a little of a random one in it: a word stands for many shades, not one."""
    return mix(color, f"#{rng.randrange(2**24):06x}", 0.15)

def near(rng, x, reach=0.05):
    """A random number from x - reach to x + reach."""
    return rng.uniform(x - reach, x + reach)

def points(text):
    """The numbers in "x y  x y  ..." as an array (N, 2)."""
    return np.fromstring(text, sep=" ").reshape(-1, 2)

def paint(image, name, x, y, size, body=None, snow=None):
    """Paint one of SHAPES, its foot at (x, y); x, y and `size`, its unit, are in image widths."""
    pen = ImageDraw.Draw(image, "RGBA")
    colors = {"body": body, "snow": snow}
    for color, outline in SHAPES[name]:
        corners = image.width * ((x, y) + points(outline) * (size, -size))
        pen.polygon(corners.ravel().tolist(), colors.get(color, color))

def fade(image, y, height, color):
    """Lay a color over a band of the image: it is clear at y and solid at y + height."""
    mask = Image.linear_gradient("L").resize((image.width, round(height * image.width)))
    image.paste(color, (0, round(y * image.width)), mask)

def draw(scene, size):
    """A scene that `scene` has chosen, as an RGB image of size x size pixels."""
    rng = random.Random("drawing " + scene["key"])
    extras = scene["extras"]
    top, horizon, disc, cloud, shadow = SKIES[scene["sky"]]
    shape, count, height, color = LANDS[scene["land"]]
    top, horizon, color = vary(rng, top), vary(rng, horizon), vary(rng, color)
    between = mix(top, horizon, 0.5)    # the color of water, and of snow far away
    height *= rng.uniform(0.8, 1.3)
    skyline = near(rng, 0.6, 0.04)
    # Twice the size; in the end each pixel is the mean of four, so that edges are smooth.
    width = 2 * size
    image = Image.new("RGB", (width, width), top)

    # The sky, and all that is in it.
    fade(image, 0, skyline, horizon)
    if scene["sky"] == "night":
        for x, y in points(STARS):
            paint(image, "disc", near(rng, x, 0.015), near(rng, y, 0.015), 0.01, "#f0f0f8")
    disc_x = near(rng, PLACES[scene["place"]])
    disc_y = near(rng, 0.19, 0.03)
    for radius, opacity in ((0.132, "60"), (0.102, "60"), (0.073, "ff")):    # two rings of light
        paint(image, "disc", disc_x, disc_y, radius, disc + opacity)
    if scene["sky"] == "storm":
        paint(image, "bolt", rng.uniform(0.5, 0.7), 0.52, 0.36)
    if scene["sky"] == "storm" or "clouds" in extras:
        for x, y in ((0.12, 0.14), (0.37, 0.28), (0.62, 0.14), (0.87, 0.28)):
            x = near(rng, x)
            if abs(x - disc_x) > 0.3:    # a cloud never hides the sun
                paint(image, "cloud", x, y, 0.115, cloud)
    if "birds" in extras:
        paint(image, "birds", (disc_x + 0.35) % 1, 0.2, 0.115)    # beside the sun

    # Three rows of the land's shapes, and the ground below each. Far ones are like the sky.
    distance = 0.07 if "lake" in extras else 0.14
    snow = "#00000000"    # clear
    for row in range(3):
        base = skyline + distance * row
        share = 0.55 + 0.2 * row
        if "mist" in extras:
            fade(image, base - 0.2, 0.2, mix(horizon, "#ffffff", 0.3))
        body = mix(horizon, mix(shadow, color, 0.7), share)
        if "snow" in extras:
            snow = mix(between, "#ffffff", share) + "c0"    # the land shows through
        for i in range(count):
            x = near(rng, i, 0.25) / (count - 1)
            paint(image, shape, x, base + 0.02, height * rng.uniform(0.7, 1), body, snow)
        paint(image, "ground", 0, base, 1, body)

    if "lake" in extras:    # a mirror, the color of water over it, and the shore on this side
        shore = round((skyline + 0.16) * width)
        above = image.crop((0, 0, width, shore))
        image.paste(ImageOps.flip(above), (0, shore))
        paint(image, "ground", 0, shore / width, 1, between + "80")
        paint(image, "hill", near(rng, 0.5, 0.3), 1.2, 0.3, body, snow)
    if "boat" in extras:
        paint(image, "boat", near(rng, 0.5, 0.1), 0.87, 0.2)
    # Pines below the sun, a cabin on the other side. Left to chance, a small model draws two.
    side = int(scene["place"] == "right")
    if "pines" in extras:
        green = mix(shadow, "#1c4634", 0.7)
        for x in (0.04, 0.25, 0.145):
            x = abs(side - near(rng, x, 0.03))
            paint(image, "fir", x, 0.97, rng.uniform(0.36, 0.5), green, snow)
    if "cabin" in extras:
        paint(image, "cabin", abs(side - near(rng, 0.81)), 0.97, rng.uniform(0.19, 0.25))
    return image.reduce(2)

def caption(rng, sky, land, place, extras):
    """Describe a scene, a string: all of it (75 %), some (18 %), or hardly anything (7 %)."""
    def pick(name):
        return rng.choice(WORDS[name].split("|"))

    ground, when = pick(land), pick(sky)
    details = [pick(name) for name in extras]
    if place:
        disc = "moon" if sky == "night" else "sun"
        details.append(f"the {disc} {pick(place)}")

    time = when.split(maxsplit=1)[1]    # "at dawn" -> "dawn"
    start = rng.choice([f"{ground} {when}", f"{time} over {ground}"])
    vague = rng.choice(["a landscape", ground, time])
    completeness = rng.random()
    if completeness < 0.07:
        return vague
    if completeness < 0.25:
        start = vague
        details = details[len(details) // 2:]
    if not details:
        return start
    rest = ", ".join(details)
    return rng.choice([f"{start}, {rest}", f"{rest}, {start}", f"{start} with {rest}"])

def scene(index, split="train", seed=0):
    """Choose what picture `index` (0, 1, ...) shows, and its caption; `key` seeds the drawing.

    The keys are those of metadata.jsonl, without file_name; place is None where no sun is seen.
    """
    key = f"{seed}/{split}/{index}"
    rng = random.Random(key)
    pairs = NOVEL_PAIRS
    if split != "novel":
        pairs = [(s, l) for s in SKIES for l in LANDS if (s, l) not in NOVEL_PAIRS]
    sky, land = rng.choice(pairs)
    place = rng.choice(list(PLACES))
    groups = GROUPS
    if sky == "storm":
        place = None
        groups = GROUPS[:-1]
    extras = [rng.choice(group) for group in rng.sample(groups, rng.randint(0, 3))]
    if "lake" in extras and rng.random() < 0.5:
        extras.append("boat")
    text = caption(rng, sky, land, place, extras)
    return dict(text=text, sky=sky, land=land, place=place, extras=extras, key=key)

def save_picture(args, index):
    """Draw a scene into the folder args.out; returns its line of metadata.jsonl."""
    line = {"file_name": f"{index:05d}.png", **scene(index, args.split, args.seed)}
    draw(line, args.size).save(args.out / line["file_name"])
    del line["key"]
    return json.dumps(line) + "\n"

def main():
    """Draw the pictures that the command line asks for, and then write metadata.jsonl."""
    p = argparse.ArgumentParser(description="Draw landscapes, with captions, into a folder.")
    p.error = lambda message: p.exit(2, f"landscapes.py: {' '.join(message.split())}\n")
    out = Path(__file__).parent / "landscapes"
    p.add_argument("--out", type=Path, default=out, help="folder (%(default)s)")
    p.add_argument("--size", type=int, default=128, help="width and height (%(default)s pixels)")
    p.add_argument("--count", type=int, default=8400, help="number of pictures (%(default)s)")
    p.add_argument("--split", choices=["train", "val", "novel"], default="train")
    p.add_argument("--seed", type=int, default=0, help="each draws other scenes (%(default)s)")
    p.add_argument("--workers", type=int, default=8, help="processes (%(default)s)")
    args = p.parse_args()
    if not 16 <= args.size <= 8192 or min(args.count, args.workers) < 1:
        p.error("--size should be 16 to 8192, --count and --workers at least 1")
    metadata = args.out / "metadata.jsonl"
    if metadata.exists():
        p.error(f"{metadata} is there already: remove {args.out} or name another --out")

    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with multiprocessing.Pool(args.workers) as pool:
            job = functools.partial(save_picture, args)
            lines = list(tqdm(pool.imap(job, range(args.count), 16), total=args.count))
        # Written last and moved in one step: a folder that has it is complete.
        unfinished = metadata.with_suffix(".part")
        unfinished.write_text("".join(lines))
        unfinished.replace(metadata)
    except OSError as error:
        p.error(f"--out {args.out}: {error.strerror}")

if __name__ == "__main__":
    main()
