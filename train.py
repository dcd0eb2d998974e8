"""Train Stable Diffusion from nothing: VAE, CLIP and U-Net, one after the other.

    python train.py                                            on landscapes that it draws first
    python train.py --data photos/ --out mine                  on your own pictures
    python train.py --stage unet --init MODEL --data photos/   fine-tune what sample.py can load
    python train.py --stage eval                               measure the model in out/

Each stage learns in one loop, with the stages before it frozen.

    vae     pictures -> latents -> pictures                     loss: vae_loss in vae.py
    clip    pictures and captions -> one space                  contrastive_loss in clip_encoder.py
    unet    noisy latents, the time, a caption -> eps or v      diffusion_loss in ddpm.py

The default takes about 16 minutes on two CPU cores. Look at OUT/samples/ rather than at the loss.
OUT is a model that sample.py and diffusers read; OUT/train_state is what --resume goes on from.
Under torchrun each process takes its share of every batch, DistributedDataParallel averages the
gradients, the CLIP compares the shares of all (gather), and process 0 writes the files.

Letters: B batch; S side of a picture; f the VAE's factor; h, w latent size; L tokens of width D; T
diffusion steps. Before this file: sample.py. This is the last one.
"""
import argparse
import os
import sys
from pathlib import Path

# Values of flags that are not given. Every preset is the published architecture in other sizes.
PRESETS = {
    "tiny": dict(                                    # minutes on a CPU
        image_size=128,
        prediction_type="v_prediction",
        vae=dict(                                    # vae_config adds block_out_channels
            layers_per_block=1,
            norm_num_groups=4,
        ),
        vae_steps=2700,
        vae_batch=8,
        vae_lr=4e-3,
        vocab_size=1024,                             # of the tokenizer
        max_length=32,                               # L
        text=dict(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
        ),
        vision=dict(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=64,
            patch_size=16,
        ),
        projection_dim=64,
        clip_steps=400,
        clip_batch=128,
        clip_lr=5e-3,
        unet=dict(
            block_out_channels=(64, 128, 128),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            attention_head_dim=4,
            norm_num_groups=8,
        ),
        unet_steps=900,
        unet_batch=32,
        unet_lr=4e-3,
    ),
    "base": dict(                                    # for one GPU
        image_size=256,
        prediction_type="epsilon",
        vae=dict(
            block_out_channels=(64, 128, 256, 256),
            norm_num_groups=16,
        ),
        vae_steps=50_000,
        vae_batch=32,
        vae_lr=1e-3,
        vocab_size=8192,
        max_length=77,
        text=dict(
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=6,
            num_attention_heads=8,
        ),
        vision=dict(
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=6,
            num_attention_heads=8,
            image_size=256,
            patch_size=16,
        ),
        projection_dim=256,
        clip_steps=10_000,
        clip_batch=512,
        clip_lr=5e-4,
        unet=dict(
            block_out_channels=(128, 256, 512),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        ),
        unet_steps=200_000,
        unet_batch=128,
        unet_lr=5e-4,
    ),
    "sd15": dict(                                    # the published sizes, for many GPUs
        image_size=512,
        prediction_type="epsilon",
        vae=dict(),
        vae_steps=200_000,
        vae_batch=64,
        vae_lr=2e-4,
        vocab_size=49408,
        max_length=77,
        text=dict(),
        vision=dict(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=224,
            patch_size=14,
        ),
        projection_dim=768,
        clip_steps=50_000,
        clip_batch=1024,
        clip_lr=3e-4,
        unet=dict(),
        unet_steps=500_000,
        unet_batch=512,
        unet_lr=2e-4,
    ),
}

LANDSCAPES = Path(__file__).resolve().parent / "data" / "landscapes"

def parse_args():
    """The command line -> its values."""
    p = argparse.ArgumentParser(description="Train a VAE, a CLIP and a U-Net, one after the other.")
    p.add_argument("--stage", choices=["all", "vae", "clip", "unet", "eval"], default="all")
    p.add_argument("--data", default=LANDSCAPES, help="pictures (drawn landscapes)")
    p.add_argument("--out", default="out", help="where the model goes (out)")
    p.add_argument("--init", metavar="MODEL", help="fine-tune this model's U-Net (or --stage vae)")
    p.add_argument("--text-encoder", default="scratch", metavar="DIR|HUB_ID",
                   help="a published CLIP instead of a new one; with --stage eval, the judge")
    p.add_argument("--tokenizer", metavar="DIR|HUB_ID", help="for an --init that is a single file")
    p.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes of the models (tiny)")
    p.add_argument("--image-size", type=int, help="pixels, a multiple of 16 (128)")
    p.add_argument("--max-images", type=int, help="learn from N pictures (all)")
    p.add_argument("--steps", type=int, help="with --stage all the U-Net's, others follow")
    p.add_argument("--batch-size", type=int, help="of all processes together")
    p.add_argument("--grad-accum", type=int, default=1, help="micro-batches of a step (1)")
    p.add_argument("--grad-checkpoint", action="store_true", help="less memory, more time")
    p.add_argument("--lr", type=float, help="peak learning rate")
    p.add_argument("--prediction-type", choices=["epsilon", "v_prediction"], help="(the preset's)")
    p.add_argument("--min-snr", type=float,
                   help="gamma in ddpm.py, 0: off (5 with epsilon, 0 with v_prediction)")
    p.add_argument("--flip", action="store_true", help="learn the mirrored pictures too")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in OUT")
    p.add_argument("--save-every", type=int, default=500, help="in steps (500)")
    p.add_argument("--sample-every", type=int, default=100, help="in steps (100)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=1, help="that read pictures (1)")
    p.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    p.add_argument("--compile", action="store_true", help="torch.compile the model that learns")
    p.error = lambda message: p.exit(2, f"train.py: {' '.join(message.split())}\n")
    args = p.parse_args()
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if value == "":
            p.error(f"argument {flag}: expected a name, not nothing")
        if type(value) in (int, float):
            least = 0 if name in ("min_snr", "workers", "seed") else 1e-9
            if not least <= value < 1e9:
                p.error(f"argument {flag}: {value} should be above 0, and below 1e9")
    if args.image_size and args.image_size % 16:
        p.error(f"argument --image-size: {args.image_size} is not a multiple of 16")
    if Path(args.data).resolve() == LANDSCAPES:
        args.data = LANDSCAPES        # however it is spelt
    args.out = Path(args.out)
    return args

if __name__ == "__main__":
    ARGS = parse_args()               # before the slow imports, so that --help answers at once

os.environ.setdefault("GOMP_SPINCOUNT", "4000")      # before torch: see sample.py

import collections
import contextlib
import copy
import csv
import functools
import io
import json
import math
import re
import signal
import subprocess
import zlib

import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clip_encoder import (CLIP, CLIPTextEncoder, contrastive_loss, to_text, tokenize,
                          train_tokenizer)
from ddpm import NoiseSchedule, diffusion_loss
from sample import (PARTS, Pipeline, encode_prompts, filling, generate, grid, load_clip,
                    load_pipeline, naming, open_picture, pick_device, picture_to_tensor,
                    run_command, save_pipeline, tensor_to_pictures, write_part, write_tokenizer)
from unet import UNet
from vae import VAE, DiagonalGaussian, vae_loss

RANK = int(os.environ.get("RANK", 0))                # this process; torchrun sets both
WORLD = int(os.environ.get("WORLD_SIZE", 1))         # the number of processes

# ---- Data ----------------------------------------------------------------------------------------

class ImageFolder(Dataset):
    """Pictures anywhere below root: [i] -> (picture (3, S, S) float32 in [-1, 1], caption).

    Pictures are scaled and cropped to squares. The caption is the first that exists: `text` (or
    `caption`) beside `file_name` in a metadata.jsonl or metadata.csv, in the picture's folder or
    one above it; a text file, a.txt, a.caption or a.jpg.txt for a.jpg; the name of the sub-folder;
    the name of the file. Of 20 pictures or more every 20th is for validation, split "val"; the
    others are "train". flip: all of them once more, mirrored. A broken picture is logged once, and
    the next one takes its place. ValueError: no picture to be had.
    """

    def __init__(self, root, image_size=64, split="train", flip=False, max_images=None):
        self.root = Path(root)
        self.image_size = image_size
        self.logs = RANK == 0 and split == "train"   # the other split has the same files
        names, tables, texts = self.find_files()
        if not names:
            raise ValueError(f"--data {root}: no such folder, or no pictures (.png, .jpg) in it")
        table = self.read_metadata(tables)
        strange = set(table) - set(names)
        if strange and len(strange) == len(table):
            raise ValueError(f"--data {root}: no file_name of its metadata is a picture in it")
        if strange:
            self.log(f"lines of metadata for {len(strange)} pictures that are not there, such as "
                     f"{min(strange)}")
        self.unused = set().union(*texts.values())   # text files that are no picture's caption
        found = {name: self.find_caption(name, table, texts) for name in names}
        if len(names) >= 20:                         # else too few to spare any
            if split == "val":
                names = names[10::20]
            else:
                del names[10::20]
        if max_images and max_images < len(names):
            names = [names[k * len(names) // max_images] for k in range(max_images)]
        self.names = names
        self.captions = [to_text(found[name][1]) for name in names]
        self.sources = collections.Counter(found[name][0] for name in names)
        self.mirrored_from = len(names)
        if flip:
            self.names *= 2
            self.captions *= 2
        self.broken = set()

    def find_files(self):
        """Paths below root -> [pictures], [files of metadata], {"a": [a.txt, a.caption]}.

        Passes over hidden files and folders, and over models with their samples.
        """
        kinds = Image.registered_extensions()
        pictures, tables, texts, others = [], [], {}, []
        for folder, folders, files in os.walk(self.root):
            folders[:] = [name for name in folders if not name.startswith(".")
                          and not Path(folder, name, "train_state").is_dir()]
            for file in sorted(files, reverse=True):           # a.txt before a.caption
                path = Path(folder, file).relative_to(self.root)
                ending = path.suffix.lower()
                if file.startswith("."):
                    continue
                if file.lower() in ("metadata.csv", "metadata.jsonl"):
                    tables.append(path)
                elif ending in (".txt", ".caption"):
                    texts.setdefault(str(path.with_suffix("")), []).append(path)
                elif ending in kinds or can_open(self.root / path):
                    pictures.append(str(path))
                else:
                    others.append(str(path))
        if others:
            self.log(f"{len(others)} files that are no pictures or captions, such as {min(others)}")
        return sorted(pictures), sorted(tables), texts

    def log(self, what):
        """Say what is left out."""
        if self.logs:
            print(f"train.py: left out: {what}", file=sys.stderr)

    def read_metadata(self, tables):
        """{picture: caption} of files of metadata. ValueError names one that lacks a column.

        file_name is a path from the folder of its file. Where two files tell of one picture, the
        deeper one counts, and metadata.jsonl before metadata.csv.
        """
        captions = {}
        for path in sorted(tables, key=lambda path: len(path.parts)):
            with naming(self.root / path):
                text = read_text(self.root / path)
                if path.suffix.lower() == ".csv":
                    rows = io.StringIO(text, newline="")
                    lines = list(csv.DictReader(rows, strict=True))
                else:
                    lines = [json.loads(line) for line in text.split("\n") if line.strip()]
                for line in lines:
                    if "file_name" not in line or not {"text", "caption"} & set(line):
                        raise ValueError("its columns should be file_name and text, not "
                                         + ", ".join(map(str, line)))
                    if None in line:                 # what csv has beyond its columns
                        raise ValueError("a text with a comma should be in quotes")
                    caption = first_text([line.get("text"), line.get("caption")])
                    if caption:
                        file = str(line["file_name"]).replace("\\", "/")
                        name = os.path.normpath(path.parent / file)
                        captions[name] = caption
        return captions

    def find_caption(self, name, table, texts):
        """The caption of a picture -> (where it was found, caption)."""
        if name in table:
            return "metadata", table[name]
        path = Path(name)
        for beside in (str(path.with_suffix("")), name):       # a.txt or a.jpg.txt for a.jpg
            for text in texts.get(beside, []):
                self.unused.discard(text)
                try:
                    caption = read_text(self.root / text).strip()
                    if caption:
                        return "text files", caption
                except (UnicodeError, OSError) as error:
                    self.log(f"{text}: {error}")
        words = path.parent.name or path.stem
        source = "folder names" if path.parent.name else "file names"
        return source, words.replace("_", " ").replace("-", " ")

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError(i)
        for offset in range(len(self)):                        # i, or the next that can be read
            k = (i + offset) % len(self)
            name = self.names[k]
            try:
                image = open_picture(self.root / name)
                x = picture_to_tensor(image, self.image_size, self.image_size)[0]
                return x.flip(2) if k >= self.mirrored_from else x, self.captions[k]
            except ValueError as error:
                if name not in self.broken:
                    print(f"train.py: left out: {error}", file=sys.stderr)
                self.broken.add(name)
        raise ValueError(f"--data {self.root}: none of the pictures can be read")

def first_text(values):
    """The first that is not empty of texts, numbers and lists of these, or None. ValueError."""
    for value in values:
        if isinstance(value, list):
            value = first_text(value)
        if isinstance(value, dict):
            raise ValueError("a caption should be a text, not a table")
        if value is None or value != value:          # null, NaN
            continue
        if str(value).strip():
            return str(value).strip()
    return None

def can_open(path):
    """Whether open_picture takes a file for a picture, whatever its name."""
    with contextlib.suppress(Exception), Image.open(path):
        return True
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(4) == b"\x89PNG"            # Pillow may refuse it for its metadata alone
    return False

def read_text(path):
    """A text file in UTF-8, or with a mark in UTF-16 or UTF-32 -> str. UnicodeError: another."""
    data = path.read_bytes()
    encoding = json.detect_encoding(data)            # utf-16-le and the like are guesses
    text = data.decode(encoding)
    strange = re.search("[\0-\x08]", text)           # as where UTF-16 is read as UTF-8
    if strange or encoding.endswith(("le", "be")):
        raise UnicodeError("not in UTF-8, and without the mark of UTF-16 or UTF-32")
    return text

def describe_captions(data):
    """Two lines: where the captions of an ImageFolder come from, and three of them."""
    sources = ", ".join(f"{count} from {source}" for source, count in data.sources.items())
    texts = [data.captions[k * len(data) // 3] for k in range(3)]
    examples = [" ".join(text.split())[:60] for text in texts]
    return (f"captions: {sources}; caption files not used: {len(data.unused)}\n"
            f"for example: {' | '.join(examples)}")

def open_data(args):
    """The pictures to learn from, and those to validate by. Draws the landscapes if need be."""
    if RANK == 0 and args.data == LANDSCAPES and not (LANDSCAPES / "metadata.jsonl").exists():
        drawing = subprocess.run([sys.executable, LANDSCAPES.with_suffix(".py")])
        if drawing.returncode:
            raise ValueError(f"{LANDSCAPES}: the pictures could not be drawn")
    barrier()
    data = ImageFolder(args.data, args.image_size, "train", args.flip, args.max_images)
    val = ImageFolder(args.data, args.image_size, "val")
    for folder in (data, val):
        folder[0]                                    # ValueError: none can be read
    return data, val

@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    """The order in which an epoch takes n pictures."""
    rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=rng)

def batch_indices(n, batch_size, step, seed):
    """Which of n pictures make the batch of a step, (B,). Each comes once an epoch."""
    first = step * batch_size
    places = range(first, first + batch_size)
    return torch.stack([permutation(n, seed, place // n)[place % n] for place in places])

# ---- Optimizers, EMA, processes ------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, then a step of one size in all directions of a matrix.

    The gradient of a layer has few large singular values, and so has Adam's step. Muon sets them
    all to about 1, so that rare directions learn as fast as common ones. A convolution (O, I, 3, 3)
    counts as a matrix (O, 9*I). torch.optim.Muon takes plain matrices alone. Here all parameters of
    one shape form a group and are updated as one batch of matrices.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95):
        by_shape = {}
        for p in params:
            by_shape.setdefault(p.shape, []).append(p)
        groups = [dict(params=group) for group in by_shape.values()]
        super().__init__(groups, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grad = torch.stack([p.grad for p in params])                       # (n, O, I, ...)
            state = self.state[params[0]]            # of the whole group
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(grad)
            average = state["momentum"]
            average.lerp_(grad, 1 - group["momentum"])
            update = grad.lerp(average, group["momentum"])                     # Nesterov
            update = orthogonalize(update.flatten(2))
            # Entries of about 0.2 lr, as in Adam's steps: both take the same learning rate.
            scale = 0.2 * max(update.shape[1:]) ** 0.5
            for p, change in zip(params, update):
                p.add_(change.reshape(p.shape), alpha=-group["lr"] * scale)

def orthogonalize(G):
    """Matrices with the singular vectors of G (n, M, N) and singular values near 1.

    Each of five rounds of Newton-Schulz, X <- a X + b (X X^T) X + c (X X^T)^2 X, takes a singular
    value s to a s + b s^3 + c s^5. Small ones grow fast, and all end between 0.7 and 1.2. As X X^T
    is small, it is carried along instead of X: X <- M X with M = a I + b A + c A^2 means
    A = X X^T <- M A M.
    """
    if G.size(1) > G.size(2):
        return orthogonalize(G.mT).mT
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G / (G.norm(dim=(1, 2), keepdim=True) + 1e-7)
    A = X @ X.mT
    identity = torch.eye(G.size(1)).to(A)
    M = a * identity + b * A + c * A @ A             # the first round
    Q = M                                            # the product of all M
    for _ in range(4):
        A = M @ A @ M
        M = a * identity + b * A + c * A @ A
        Q = M @ Q
    return Q @ X

def make_optimizers(model, fine_tune):
    """[Muon, AdamW] for a model that starts from nothing; [AdamW] alone to fine-tune."""
    # Muon takes the matrices inside. AdamW takes biases, norms, embeddings, the two layers of the
    # time embedding, and the first and last convolution.
    matrices, others = [], []
    for name, p in model.named_parameters():
        outer = p.dim() < 2 or re.search("embedding|conv_in|conv_out", name)
        if outer or fine_tune:
            others.append(p)
        else:
            matrices.append(p)
    optimizers = [torch.optim.AdamW(others, weight_decay=0.01 if fine_tune else 0.0)]
    if matrices:
        optimizers.append(Muon(matrices))
    return optimizers

def learning_rate(step, steps, peak):
    """Warm up for 100 steps, stay, and from half-way on fall to 0."""
    warmup = (step + 1) / min(100, steps)
    decay = 2 - 2 * step / steps
    return peak * min(warmup, decay, 1)

@torch.no_grad()
def update_ema(ema, model, step):
    """The exponential moving average of the weights: jitter of single steps cancels out.

    Over about 200 steps, and at first fewer. Samples and the saved model use it; training goes on
    from the weights themselves.
    """
    decay = min(0.995, (1 + step) / (10 + step))
    for average, p in zip(ema.parameters(), model.parameters()):
        average.lerp_(p, 1 - decay)

def barrier():
    """Wait for all processes."""
    if WORLD > 1:
        dist.barrier()

def gather(x):
    """(b, ...) of this process -> (B, ...) of all processes, in their order."""
    if WORLD == 1:
        return x
    shares = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(shares, x.detach())
    # Gradients flow into this process's rows alone, and WORLD times as large: the mean over all
    # processes, which follows, is then the gradient of the whole batch.
    shares[RANK] = WORLD * x - (WORLD - 1) * x.detach()
    return torch.cat(shares)

# ---- What the three loops share: all but the training step ---------------------------------------

def ignore_ctrl_c(worker):
    """Ctrl-C reaches worker processes too. The main process decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

class Training:
    """One stage: its model, EMA and optimizers, its batches, random numbers, log and checkpoint."""

    def __init__(self, stage, model, args):
        preset = PRESETS[args.preset]
        self.stage = stage
        self.args = args
        self.steps = stage_steps(stage, args)
        self.batch_size = args.batch_size or preset[f"{stage}_batch"]
        self.peak_lr = args.lr or (1e-5 if args.init else preset[f"{stage}_lr"])
        self.step = 0                                # steps done so far
        self.recent = []                             # metrics since they were logged last

        # Micro-batches: the slices of every batch that this process takes, one after the other.
        count = 1 if stage == "clip" else args.grad_accum      # a CLIP compares the whole batch
        size, rest = divmod(self.batch_size, count * WORLD)
        if rest:
            raise ValueError("--batch-size is not a multiple of --grad-accum times the processes")
        starts = range(RANK * size, self.batch_size, WORLD * size)
        self.micro_batches = [slice(start, start + size) for start in starts]

        model.to(args.device)
        self.model = model.requires_grad_(True).train()
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        self.optimizers = make_optimizers(model, fine_tune=args.init is not None)
        # float16 ends at 65504 and starts at 6e-8: the scaler keeps gradients in between.
        self.scaler = torch.amp.GradScaler(args.device.type, enabled=args.dtype == torch.float16)
        self.path = args.out / "train_state" / f"{stage}.pt"
        if args.resume and self.path.exists():
            self.load()
        elif RANK == 0:
            self.save_state()                        # before all else: OUT is this run's from now
        barrier()
        if args.compile:
            model.compile()
        self.ddp = model if WORLD == 1 else DistributedDataParallel(model)

        self.stopping = False
        if WORLD == 1:
            signal.signal(signal.SIGINT, self.stop)
        self.bar = tqdm(total=self.steps, initial=self.step, desc=stage, disable=RANK > 0)

    def stop(self, *_):
        """Ctrl-C: finish the step, save, and end. Once more: end at once."""
        self.stopping = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def rng(self):
        """A random generator for the whole batch of this step, whatever came before it."""
        seed = zlib.crc32(f"{self.args.seed} {self.stage} {self.step}".encode())
        return torch.Generator().manual_seed(seed)

    def batch_order(self, n):
        """The indices of each micro-batch that is left, for a DataLoader."""
        for step in range(self.step, self.steps):
            indices = batch_indices(n, self.batch_size, step, self.args.seed)
            for rows in self.micro_batches:
                yield indices[rows].tolist()

    def batches(self, data):
        """Pictures and captions for each micro-batch that is left: (b, 3, S, S), [str]."""
        return iter(DataLoader(
            data,
            batch_sampler=self.batch_order(len(data)),
            num_workers=self.args.workers,
            worker_init_fn=ignore_ctrl_c,
        ))

    def autocast(self):
        """Compute in --dtype where that is safe."""
        dtype = self.args.dtype
        return torch.autocast(self.args.device.type, dtype, enabled=dtype != torch.float32)

    def set_learning_rate(self):
        """For this step, in all optimizers."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, self.steps, self.peak_lr)

    def clip_gradients(self):
        """Scale the gradient to a norm of at most 1. ValueError: NaN or inf."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if norm.isfinite():
            return
        if not self.scaler.is_enabled() or self.scaler.get_scale() < 1e-3:
            raise ValueError("the gradient is NaN or inf; try a smaller --lr or --dtype float32")
        # float16 overflowed somewhere. No optimizer takes this step, and update() halves the scale.
        self.model.zero_grad()

    def finish_step(self, **metrics):
        """Count the step. Log the metrics (scalar tensors) of every ten steps, as means.

        They are those of this process's last micro-batch: a sample, which costs nothing.
        """
        self.step += 1
        self.bar.update()
        self.recent.append([value.item() for value in metrics.values()])
        if self.step % 10 == 0 or self.step == self.steps:
            means = torch.tensor(self.recent).nanmean(dim=0)
            row = dict(zip(metrics, means.tolist()))           # NaN: no such t in these steps
            self.recent = []
            self.bar.set_postfix(row)
            if RANK == 0:
                with open(self.args.out / f"log-{self.stage}.jsonl", "a") as file:
                    file.write(json.dumps(dict(step=self.step, **row)) + "\n")

    def due(self, every):
        """Whether it is time for what happens every so many steps, and at the end."""
        return self.step % every == 0 or self.step == self.steps

    def settings(self):
        """What a run must share with the checkpoint that it resumes: {flag: value}."""
        free = ("stage", "out", "resume", "save_every", "sample_every", "grad_accum", "workers",
                "grad_checkpoint", "device", "compile")
        flags = {flag: str(value) for flag, value in vars(self.args).items() if flag not in free}
        for flag in ("init", "text_encoder", "tokenizer"):
            name = flags[flag]
            if name not in ("None", "scratch") and Path(name).exists():
                flags[flag] = str(Path(name).resolve())        # however it is spelt
        data = flags.pop("data")                     # last: other flags change it
        return dict(flags, steps=self.steps, data=data)

    def save(self, pipe, parts):
        """Write parts of the model, and last the state that --resume loads."""
        if RANK == 0:
            save_pipeline(pipe, self.args.out, parts)
            self.save_state()
        barrier()
        if self.stopping:
            raise KeyboardInterrupt

    def save_state(self):
        """Write OUT/train_state/STAGE.pt."""
        state = dict(
            step=self.step,
            settings=self.settings(),
            model=self.model.state_dict(),
            ema=self.ema.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            scaler=self.scaler.state_dict(),
        )
        with filling(self.path.parent) as unfinished:
            torch.save(state, unfinished / self.path.name)

    def load(self):
        """Go on from OUT/train_state/STAGE.pt. ValueError names settings that are not the same."""
        with naming(f"--resume: {self.path} cannot be read; remove it"):
            state = torch.load(self.path, map_location=self.args.device, weights_only=True)
            settings = dict(state["settings"])
        for name, now in self.settings().items():
            before = settings.get(name)
            if now != before:
                raise ValueError(f"--resume: --{name.replace('_', '-')} was {before}, is now {now}")
        with naming(f"--resume: {self.path} does not fit; remove it"):
            self.step = state["step"]
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            self.scaler.load_state_dict(state["scaler"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)

def stage_steps(stage, args):
    """--stage all --steps N counts the U-Net's steps; the other stages follow in proportion."""
    preset = PRESETS[args.preset]
    steps = preset[f"{stage}_steps"]
    if args.steps and args.stage == "all":
        return max(1, args.steps * steps // preset["unet_steps"])
    return args.steps or steps

def save_sheet(pictures, columns, args, name):
    """Write OUT/samples/NAME.png."""
    folder = args.out / "samples"
    folder.mkdir(exist_ok=True, parents=True)
    grid(pictures, columns).save(folder / f"{name}.png")

# ---- Stage 1: the VAE ----------------------------------------------------------------------------

def vae_config(preset, image_size):
    """The VAE's config. tiny: as many levels as keep the latents near 16x16."""
    config = dict(PRESETS[preset]["vae"])
    if preset == "tiny":
        halvings = max(1, round(math.log2(image_size / 16)))
        while image_size % 2**halvings:
            halvings -= 1
        config["block_out_channels"] = [16] * (halvings - 1) + [32, 64]
    return config

def train_vae(pipe, data, val, args):
    """Learn to redraw pictures from few numbers. Sets pipe.vae."""
    vae = pipe.vae or VAE(**vae_config(args.preset, args.image_size))
    vae.encoder.grad_checkpoint = args.grad_checkpoint
    vae.decoder.grad_checkpoint = args.grad_checkpoint
    run = Training("vae", vae, args)
    B, S = run.batch_size, args.image_size
    crop = max(1, S // vae.f // 2) * vae.f                     # half the side: cheaper by four
    latent = (B, vae.config["latent_channels"], crop // vae.f, crop // vae.f)
    examples = load_examples(val, 32, args)
    if run.step > 0:
        save_vae(run, pipe, examples)            # sets pipe.vae, also if this stage was done before
    batches = run.batches(data)

    for step in range(run.step, run.steps):
        run.set_learning_rate()
        rng = run.rng()
        corners = torch.randint(S - crop + 1, (B, 2), generator=rng).tolist()
        noise = torch.randn(latent, generator=rng)
        for rows in run.micro_batches:
            x, _ = next(batches)
            x = random_crops(x, corners[rows], crop).to(args.device)
            run.ddp.require_backward_grad_sync = rows == run.micro_batches[-1]     # once a step
            with run.autocast():
                loss, mse, kl = vae_loss(run.ddp, x, noise[rows])
            run.scaler.scale(loss / len(run.micro_batches)).backward()
        run.clip_gradients()
        for optimizer in run.optimizers:
            run.scaler.step(optimizer)
            optimizer.zero_grad()
        run.scaler.update()
        update_ema(run.ema, vae, step)

        run.finish_step(loss=loss, mse=mse, kl=kl)
        if RANK == 0 and run.due(args.sample_every):
            save_reconstructions(run.ema, examples[:8], args, f"vae-{run.step:06d}")
        if run.due(args.save_every) or run.stopping:
            save_vae(run, pipe, examples)

def save_vae(run, pipe, examples):
    """Set pipe.vae, and its scale so that latents have unit variance; a tuned one keeps its own."""
    pipe.vae = run.ema
    parts = PARTS
    if not run.args.init:
        parts = ["vae"]
        rng = torch.Generator().manual_seed(0)
        pipe.vae.scaling_factor = 1 / pipe.vae.encode(examples).sample(rng).std().item()
    run.save(pipe, parts)

def load_examples(val, most, args):
    """The first pictures to validate by, (B, 3, S, S), at most that many."""
    return torch.stack([val[i][0] for i in range(min(most, len(val)))]).to(args.device)

def random_crops(x, corners, side):
    """x (b, 3, S, S) -> (b, 3, side, side), each picture's from its own corner (top, left)."""
    return torch.stack([picture[:, top:top + side, left:left + side]
                        for picture, (top, left) in zip(x, corners)])

def save_reconstructions(vae, x, args, name):
    """Pictures x (B, 3, S, S) above what the VAE makes of them."""
    x_rec = vae.decode(vae.encode(x).mode())
    save_sheet(tensor_to_pictures(torch.cat([x, x_rec])), len(x), args, name)

# ---- Stage 2: the CLIP ---------------------------------------------------------------------------

def train_clip(pipe, data, val, args):
    """Learn which caption belongs to which picture. Sets pipe.tokenizer and pipe.text_encoder."""
    sizes = PRESETS[args.preset]
    L = sizes["max_length"]
    tokenizer = train_tokenizer(data.captions, sizes["vocab_size"], L)
    pipe.tokenizer = tokenizer
    text = dict(
        CLIPTextEncoder.DEFAULTS,
        **sizes["text"],
        max_position_embeddings=L,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    clip = CLIP(text, sizes["vision"], sizes["projection_dim"])
    run = Training("clip", clip, args)
    if run.step > 0:
        save_clip(run, pipe)                     # sets pipe.text_encoder, as above
    batches = run.batches(data)

    for step in range(run.step, run.steps):
        run.set_learning_rate()
        x, captions = next(batches)
        x = x.to(args.device)
        ids = tokenize(tokenizer, captions).to(args.device)
        with run.autocast():
            images, texts, scale = run.ddp(x, ids)             # (b, P), (b, P)
            # All pictures and captions of the batch compete, those of other processes too.
            loss, accuracy = contrastive_loss(gather(images), gather(texts), scale, gather(ids))
        run.scaler.scale(loss).backward()
        run.clip_gradients()
        for optimizer in run.optimizers:
            run.scaler.step(optimizer)
            optimizer.zero_grad()
        run.scaler.update()
        clip.logit_scale.data.clamp_(max=math.log(100))        # section 2.5
        update_ema(run.ema, clip, step)

        run.finish_step(loss=loss, accuracy=accuracy)
        if run.due(args.save_every) or run.stopping:
            save_clip(run, pipe)

def save_clip(run, pipe):
    """Set pipe.text_encoder. Both towers go to OUT/train_state/clip, for --stage eval."""
    pipe.text_encoder = run.ema.text_encoder()
    if RANK == 0:
        with filling(run.path.parent) as unfinished:
            write_part(run.ema, unfinished / "clip", "clip")
            write_tokenizer(pipe.tokenizer, unfinished / "clip")
    run.save(pipe, ["text_encoder"])

# ---- Stage 3: the U-Net --------------------------------------------------------------------------

def train_unet(pipe, data, val, args):
    """Learn which noise is in a latent, given the time and the caption. Sets pipe.unet."""
    vae, schedule = pipe.vae, pipe.schedule
    T = schedule.T
    side = args.image_size // vae.f
    unet = pipe.unet or UNet(
        **PRESETS[args.preset]["unet"],
        cross_attention_dim=pipe.text_encoder.config["hidden_size"],
    )
    unet.config["sample_size"] = side                          # what sample.py draws by default
    unet.grad_checkpoint = args.grad_checkpoint
    run = Training("unet", unet, args)
    pipe.unet = run.ema
    if run.step > 0:
        run.save(pipe, PARTS)                    # a killed run may have left files of another step
    if run.step == run.steps:
        return
    B = run.batch_size
    latent = (B, vae.config["latent_channels"], side, side)
    prompts = list(dict.fromkeys(val.captions))[:8]
    moments, captions = encode_pictures(pipe, data, args)

    for step in range(run.step, run.steps):                    # DDPM, Algorithm 1, on latents
        run.set_learning_rate()
        rng = run.rng()
        indices = batch_indices(len(data), B, step, args.seed)
        vae_noise = torch.randn(latent, generator=rng)
        all_noise = torch.randn(latent, generator=rng)
        # One time from each B-th of 0 ... T-1, so that every step sees all levels of noise.
        all_t = torch.arange(B) * T + torch.randint(T, (B,), generator=rng)
        all_t = (all_t // B)[torch.randperm(B, generator=rng)]
        # Caption dropout: one in ten becomes "", so one network learns eps(z, c) and eps(z).
        drop = torch.rand(B, generator=rng) < 0.1
        for rows in run.micro_batches:
            q = DiagonalGaussian(moments[indices[rows]])
            z0 = vae.scaling_factor * q.sample(noise=vae_noise[rows]).to(args.device)
            texts = ["" if drop[i] else captions[indices[i]] for i in range(B)[rows]]
            t = all_t[rows].to(args.device)
            noise = all_noise[rows].to(args.device)
            run.ddp.require_backward_grad_sync = rows == run.micro_batches[-1]     # once a step
            with run.autocast():
                context = encode_prompts(pipe, texts)                              # (b, L, D)
                z_t = schedule.q_sample(z0, t, noise)                              # Eq. 4
                output = run.ddp(z_t, t, context)                                  # eps or v
            losses = diffusion_loss(schedule, output, z0, t, noise, args.min_snr)  # Eq. 14, (b,)
            run.scaler.scale(losses.mean() / len(run.micro_batches)).backward()
        run.clip_gradients()
        for optimizer in run.optimizers:
            run.scaler.step(optimizer)
            optimizer.zero_grad()
        run.scaler.update()
        update_ema(run.ema, unet, step)

        run.finish_step(loss=losses.mean(), **loss_by_time(losses, t, T))
        if RANK == 0 and run.due(args.sample_every):
            pictures = generate(pipe, prompts, steps=15, progress=False)
            save_sheet(pictures, 8, args, f"unet-{run.step:06d}")
        if run.due(args.save_every) or run.stopping:
            run.save(pipe, PARTS)

def loss_by_time(losses, t, T):
    """Means of losses (B,) over four ranges of times t (B,), NaN where there are none."""
    means = {}
    for first in range(0, T, T // 4):
        last = first + T // 4 - 1
        means[f"t{first}-{last}"] = losses[(first <= t) & (t <= last)].mean()
    return means

def encode_pictures(pipe, data, args):
    """What the frozen VAE makes of all pictures, computed once -> (moments, captions).

    moments (n, 2*Z, h, w): mean and log variance of each picture's latents, in a memory-mapped
    file, so that they need not fit in memory. captions (n): a list. Each process encodes its share.
    """
    number = {caption: i for i, caption in enumerate(data.captions)}
    Z, side = pipe.vae.config["latent_channels"], args.image_size // pipe.vae.f
    moments = shared_tensor(args.out / "moments.tmp", torch.float16, len(data), 2 * Z, side, side)
    caption_of = shared_tensor(args.out / "caption_of.tmp", torch.int64, len(data))
    mine = torch.arange(RANK, len(data), WORLD).split(8)
    loader = DataLoader(data, 8, sampler=range(RANK, len(data), WORLD), num_workers=args.workers,
                        worker_init_fn=ignore_ctrl_c)
    bfloat16 = args.dtype == torch.bfloat16                    # float16 may overflow in a VAE
    for rows, (x, captions) in zip(tqdm(mine, "latents", disable=RANK > 0), loader):
        with torch.autocast(args.device.type, torch.bfloat16, enabled=bfloat16):
            q = pipe.vae.encode(x.to(args.device))
        moments[rows] = torch.cat([q.mean, q.logvar], dim=1).cpu().half()
        # Not always their own: in place of a broken picture comes the next.
        caption_of[rows] = torch.tensor([number[caption] for caption in captions])
    barrier()
    return moments, [data.captions[i] for i in caption_of]

def shared_tensor(path, dtype, *shape):
    """A tensor in a file that all processes share. Unlinked at once, the file ends with them.

    ValueError where the disk has no room for it.
    """
    size = math.prod(shape)
    if RANK == 0 and hasattr(os, "posix_fallocate"):           # a sparse file may fail later on
        with naming(f"{path}: cannot be written, or the disk is full"), open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
    barrier()
    tensor = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
    barrier()
    if RANK == 0 and os.name != "nt":                          # Windows keeps open files
        path.unlink()
    return tensor.view(shape)

# ---- How good is it? -----------------------------------------------------------------------------

@torch.no_grad()
def evaluate(pipe, data, val, args):
    """Print how good the model is, on up to 100 pictures that it has not learnt from."""
    judge = args.text_encoder
    if judge == "scratch":
        judge = args.out / "train_state" / "clip"
    clip, tokenizer = load_clip(judge, args.device)
    x = load_examples(val, 100, args)
    captions = val.captions[:len(x)]
    print(f"pictures                   {len(x)}")
    print(f"PSNR of reconstructions    {psnr(pipe.vae, x):.1f} dB")

    rng = torch.Generator().manual_seed(0)
    T = pipe.schedule.T
    t = torch.arange(len(x), device=args.device) * T // len(x)           # spread evenly
    losses = []
    for rows in torch.arange(len(x)).split(8):                           # as memory allows
        z0 = pipe.vae.scaling_factor * pipe.vae.encode(x[rows]).sample(rng)
        noise = torch.randn(z0.shape, generator=rng).to(args.device)
        z_t = pipe.schedule.q_sample(z0, t[rows], noise)
        context = encode_prompts(pipe, [captions[i] for i in rows])
        output = pipe.unet(z_t, t[rows], context)
        losses.append(diffusion_loss(pipe.schedule, output, z0, t[rows], noise))
    for name, loss in loss_by_time(torch.cat(losses), t, T).items():
        print(f"loss for {name:17} {loss:.3f}")

    ids = tokenize(tokenizer, captions).to(args.device)
    pictures = generate(pipe, captions)
    save_sheet(pictures, 10, args, "eval")
    drawn = torch.cat([picture_to_tensor(p, p.height, p.width) for p in pictures])
    print(f"retrieval, real pictures   {retrieval(clip, x, ids):.0%}")
    print(f"R-precision, drawn ones    {retrieval(clip, drawn.to(args.device), ids):.0%}")

def psnr(vae, x):
    """Peak signal-to-noise ratio in dB of pictures x (B, 3, S, S) in [-1, 1] after the VAE.

    10 log10(peak^2 / mse) with peak 2, a mean over pictures. At 20 dB one sees the loss, at 30
    hardly.
    """
    x_rec = torch.cat([vae.decode(vae.encode(part).mode()) for part in x.split(8)]).clamp(-1, 1)
    mse = (x_rec - x).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4 / mse)).mean().item()

def retrieval(clip, x, ids):
    """How often a CLIP finds the caption of picture x[i] the best of all captions ids: 0 to 1."""
    scores = clip.encode_image(x) @ clip.encode_text(ids).T    # (B, B): picture i, caption j
    best = ids[scores.argmax(dim=1)]
    return (best == ids).all(dim=1).float().mean().item()      # equal captions are as good

# ---- The command line ----------------------------------------------------------------------------

STAGES = {"vae": train_vae, "clip": train_clip, "unet": train_unet, "eval": evaluate}
PART_OF = {"vae": "vae", "clip": "text_encoder", "unet": "unet"}

def stages_to_run(args):
    """The names of the stages that the flags ask for, in their order."""
    if args.stage == "clip" and (args.init or args.text_encoder != "scratch"):
        raise ValueError("--stage clip trains a new CLIP, without --init and --text-encoder")
    if args.stage != "all":
        return [args.stage]
    if args.init:
        return ["unet"]
    if args.text_encoder != "scratch":
        return ["vae", "unet"]
    return ["vae", "clip", "unet"]

def load_frozen(stages, args):
    """The parts that the first stage needs, from --init, --text-encoder or OUT -> Pipeline."""
    own_text = args.text_encoder == "scratch" or stages == ["eval"]
    pipe = Pipeline(schedule=NoiseSchedule())
    if args.init:
        pipe = load_pipeline(args.init, args.device, tokenizer=args.tokenizer,
                             prediction_type=args.prediction_type)
    elif stages[0] in ("unet", "eval"):
        parts = ["vae"]
        if own_text:
            parts = ["vae", "text_encoder"]
        if stages == ["eval"]:
            parts = PARTS
        if not args.out.is_dir():
            raise ValueError(f"--out {args.out}: no such folder; train a VAE and a CLIP first")
        pipe = load_pipeline(args.out, args.device, parts=parts)
    if not own_text:
        pipe.text_encoder, pipe.tokenizer = load_clip(
            args.text_encoder, args.device, "text_encoder")
    if pipe.unet is None:                                      # a new one
        preset = PRESETS[args.preset]
        pipe.schedule.prediction_type = args.prediction_type or preset["prediction_type"]
        # The usual 7.5 blotches the plain skies of the drawn landscapes.
        pipe.guidance = 3.0 if args.data == LANDSCAPES else 7.5
    elif pipe.unet.config["cross_attention_dim"] != pipe.text_encoder.config["hidden_size"]:
        raise ValueError("--text-encoder: too narrow or too wide for the U-Net of --init")
    elif pipe.unet.config["in_channels"] != 4:
        raise ValueError("--init: a U-Net for inpainting cannot be trained here")
    return pipe

def refuse_to_overwrite(stages, args):
    """ValueError where OUT holds what this run would train anew, or bring from elsewhere."""
    for stage in stages:
        state = args.out / "train_state" / f"{stage}.pt"
        if state.exists() and args.resume:
            continue
        parts = [PART_OF[stage]]
        if args.init:
            parts = PARTS
        elif stage == "unet" and args.text_encoder != "scratch":
            parts = ["unet", "text_encoder"]
        for path in [state, *[args.out / part for part in parts]]:
            if path.exists():
                raise ValueError(f"{path} is there already, of an earlier run: add --resume to go "
                                 "on, name another --out, or remove it")

def main(args):
    """Run the stages that the command line asks for."""
    args.device, args.dtype = pick_device(args.device, args.dtype)
    if WORLD > 1:
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    stages = stages_to_run(args)
    if stages != ["eval"]:
        refuse_to_overwrite(stages, args)
    pipe = load_frozen(stages, args)
    if args.min_snr is None:
        args.min_snr = 5.0 if pipe.schedule.prediction_type == "epsilon" else 0.0
    if args.image_size is None and pipe.unet:
        args.image_size = pipe.unet.config["sample_size"] * pipe.vae.f
    args.image_size = args.image_size or PRESETS[args.preset]["image_size"]
    data, val = open_data(args)
    # What --resume compares: the pictures and captions, and not the path to them.
    args.data = f"{len(data)} pictures, captions {zlib.crc32(repr(data.captions).encode())}"
    if RANK == 0:
        print(f"{len(data)} pictures of {args.image_size}x{args.image_size}; {', '.join(stages)} "
              f"on {args.device} in {args.dtype}; the model goes to {args.out}/")
        print(describe_captions(data))
        states = [args.out / "train_state" / f"{stage}.pt" for stage in stages]
        if args.resume and stages != ["eval"] and not any(state.exists() for state in states):
            print(f"--resume: there is nothing to resume in {args.out}/; the run begins")
    for stage in stages:
        torch.manual_seed(args.seed)                 # a stage starts the same, alone or not
        STAGES[stage](pipe, data, val, args)
    if WORLD > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    run_command(main, ARGS)
