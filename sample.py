"""Text to picture: load a model, encode the prompt, denoise, decode, save.

    python sample.py "a landscape"                                        the model that train.py left in out/
    python sample.py "a lake at dusk" "snow on the hills" --num-images 4  several prompts, four pictures each
    python sample.py "make it night" --init-image photo.png --strength 0.6
    python sample.py "a full moon" --init-image photo.png --mask sky.png  white is redrawn, black is kept

The whole of it is five lines, to be found in `generate`:

    context = text_encoder(tokenize(prompt))              what to draw                                  (1, T, D)
    z = randn(1, 4, H/f, W/f)                             start from pure noise
    for t, t_prev in times:                               from noisy to clean, `steps` times
        z = sampler_step(z, guided(unet, z, t, context))  take out some of the noise that the U-Net sees
    picture = vae.decode(z / vae.scaling_factor)          from latent to pixels                         (1, 3, H, W)

From Python: `from sample import load_pipeline, save_pipeline, generate`. Before this file: unet.py. Then: train.py.
"""
import argparse
import json
import os
import pathlib
import re
import sys

def parse_args():
    """The command line -> its values."""
    p = argparse.ArgumentParser(description="Draw pictures from prompts.")
    p.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw; several prompts draw several pictures")
    p.add_argument("--model", default="out", help="folder in diffusers' layout, or hub id (default: out)")
    p.add_argument("--negative", default="", metavar="TEXT", help="what not to draw")
    p.add_argument("--steps", type=int, default=25, help="denoising steps: more is slower and finer (default: 25)")
    p.add_argument("--guidance", type=float, default=7.5, help="how strictly to follow the prompt (default: 7.5)")
    p.add_argument("--sampler", choices=["ddpm", "ddim", "dpmpp"], default="dpmpp", help="see ddpm.py (default: dpmpp)")
    p.add_argument("--seed", type=int, default=0, help="picture k is drawn with seed + k (default: 0)")
    p.add_argument("--num-images", type=int, default=1, help="pictures for each prompt (default: 1)")
    p.add_argument("--height", type=int, help="in pixels (default: as the model was trained, or as the init image)")
    p.add_argument("--width", type=int, help="in pixels (default: likewise)")
    p.add_argument("--init-image", metavar="FILE", help="start from this picture instead of from noise")
    p.add_argument("--strength", type=float, default=0.8, help="how far to leave the init image: 0 to 1 (default: 0.8)")
    p.add_argument("--mask", metavar="FILE", help="with --init-image: redraw only where this picture is white")
    p.add_argument("--output", default="out.png", metavar="FILE", help="where to put the picture (default: out.png)")
    p.add_argument("--gif", action="store_true", help="also write the denoising as a GIF, beside the picture")
    p.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    p.add_argument("--compile", action="store_true", help="torch.compile the U-Net: a slow start, then faster steps")
    return p.parse_args()
ARGS = parse_args() if __name__ == "__main__" else None            # before the slow imports: --help answers at once

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageFilter, ImageOps, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from clip_encoder import CLIP, CLIPTextEncoder, load_tokenizer, tokenize
from ddpm import SAMPLERS, NoiseSchedule, guide, pin
from unet import UNet
from vae import VAE

class BadInput(ValueError):
    """Something the user can put right. The message is one line that names the flag, file or key, and what would do."""

def pick_device(device="auto", dtype="auto"):
    """Names as on the command line -> (torch.device, torch.dtype): where this machine is fastest."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available() or device == "mps" and not torch.backends.mps.is_available():
        raise BadInput(f"--device {device}: this machine has none; try --device cpu")
    if dtype == "auto":
        if device == "cpu":                                        # bfloat16 pays where the processor multiplies it
            built = [getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("amx_tile", "avx512_bf16")]
            dtype = "bfloat16" if any(built) else "float32"
        else:
            dtype = "bfloat16" if device == "cuda" and torch.cuda.get_device_capability()[0] >= 8 else "float16"
    return torch.device(device), getattr(torch, dtype)

# ---- Load and save. A model is a folder as diffusers lays it out, one sub-folder for each part -----------------------
@dataclass
class Pipeline:
    """A whole model: the five parts that turn text into pictures; None for one that is not loaded or trained yet."""
    unet: UNet = None
    vae: VAE = None
    text_encoder: CLIPTextEncoder = None
    tokenizer: object = None                                       # transformers' CLIPTokenizer
    schedule: NoiseSchedule = None
    name: str = ""

    @property
    def device(self):
        return next(self.vae.parameters()).device

PARTS = ("unet", "vae", "text_encoder")
CLASSES = {"unet": UNet, "vae": VAE, "text_encoder": CLIPTextEncoder, "clip": CLIP}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model", "clip": "model"}

def read_json(path):
    """A JSON file -> dict; BadInput names the file that is missing or broken."""
    try:
        with open(path, encoding="utf-8") as f:
            return dict(json.load(f))
    except (OSError, ValueError, TypeError) as e:
        why = "missing" if isinstance(e, FileNotFoundError) else f"not readable JSON ({e})"
        raise BadInput(f"{path} is {why}") from None

def read_weights(folder, stem, dtype):
    """The weights in `folder`, in whichever of the published forms -> {name: tensor of dtype}."""
    old = "pytorch_model" if stem == "model" else stem
    names = [f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{old}.bin", f"{old}.fp16.bin"]
    path = next((p for p in (os.path.join(folder, name) for name in names) if os.path.exists(p)), None)
    if path is None:
        raise BadInput(f"{folder} holds no weights: none of {', '.join(names)}")
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, "pt") as f:                       # tensor by tensor: never twice in memory
                return {key: f.get_tensor(key).to(dtype) for key in f.keys()}
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # runs no code from the file
        return {key: value.to(dtype) for key, value in state.items()}
    except Exception as e:                                         # each library words "broken" in its own way
        raise BadInput(f"{path} is not readable: {(str(e) or type(e).__name__).splitlines()[0]}") from None

def load_part(part, folder, dtype):
    """One sub-folder -> its module, in eval mode, with weights of dtype. BadInput says what is missing or wrong."""
    config = read_json(os.path.join(folder, "config.json"))
    try:
        with torch.device("meta"):                                 # the shapes without the memory
            module = CLASSES[part].from_config(config)
    except (ValueError, TypeError, KeyError, AssertionError, RuntimeError) as e:
        raise BadInput(f"{folder}: {e}") from None
    state, wanted = module.current_names(read_weights(folder, STEMS[part], dtype)), module.state_dict()
    wrong = [f"{k} is missing" for k in wanted if k not in state]
    wrong += [f"{k} is unknown" for k in state if k not in wanted]
    wrong += [f"{k} is {tuple(state[k].shape)}, should be {tuple(v.shape)}" for k, v in wanted.items()
              if k in state and state[k].shape != v.shape]
    if wrong:
        raise BadInput(f"{folder}: the weights do not fit config.json: {wrong[0]} ({len(wrong)} such)")
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)

def load_words(source):
    """A tokenizer's folder or hub id -> tokenizer, or BadInput."""
    try:
        return load_tokenizer(source)
    except ValueError as e:
        raise BadInput(str(e)) from None

def load_text_encoder(source, device="cpu"):
    """A published CLIP text encoder (folder or hub id), alone or as part of a model -> (CLIPTextEncoder, tokenizer)."""
    folder = locate(source)
    whole = os.path.isdir(os.path.join(folder, "text_encoder"))
    text, words = (os.path.join(folder, part) if whole else folder for part in ("text_encoder", "tokenizer"))
    return load_part("text_encoder", text, torch.float32).to(device), load_words(words)

def locate(model):
    """A path, or a hub id that is then downloaded -> the folder."""
    if os.path.isdir(model):
        return model
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or os.path.exists(model):
        raise BadInput(f"{model}: no such model folder; `python train.py` makes one (--stage vae, clip, unet in turn)")
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(model, allow_patterns=["*.json", "*.txt", "*.safetensors"],
                                 ignore_patterns=["*.fp16.*", "*.non_ema.*", "safety_checker/*", "v1-5*", "v2-1*"])
    except Exception as e:
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise BadInput(f"{model}: no folder here, and not to be had from the hub ({why})") from None

def load_pipeline(model, device="cpu", dtype=torch.float32, tokenizer=None, parts=PARTS):
    """A folder in diffusers' layout, or a hub id -> Pipeline, with only some parts if asked. Raises BadInput.
    tokenizer: a folder or hub id to use instead of the model's own. In float16 the VAE stays in float32: it would
    overflow on some pictures."""
    folder, loaded = locate(model), dict.fromkeys(PARTS)
    for part in parts:
        if not os.path.isdir(os.path.join(folder, part)):
            stage = {"text_encoder": "clip"}.get(part, part)
            raise BadInput(f"{folder} holds no {part}; `python train.py --stage {stage}` trains one")
        wide = part == "vae" and dtype == torch.float16
        loaded[part] = load_part(part, os.path.join(folder, part), torch.float32 if wide else dtype).to(device)
        if part != "text_encoder":                                 # convolutions like a pixel's channels side by side
            loaded[part].to(memory_format=torch.channels_last)
    path = os.path.join(folder, "scheduler", "scheduler_config.json")
    try:                                                           # without a file: Stable Diffusion 1.5's
        schedule = NoiseSchedule.from_config(read_json(path)) if os.path.exists(path) else NoiseSchedule()
    except (ValueError, TypeError) as e:
        raise BadInput(f"{path}: {e}") from None
    words = load_words(tokenizer or os.path.join(folder, "tokenizer")) if "text_encoder" in parts else None
    return Pipeline(**loaded, tokenizer=words, schedule=schedule, name=os.path.basename(os.path.abspath(folder)))

def write_beside(path, write):
    """Call write(temporary path), then move the result to path: a reader sees the old file or the new, never a half."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    beside = os.path.join(os.path.dirname(path), ".writing-" + os.path.basename(path))
    write(beside)
    os.replace(beside, path)

def save_json(path, value):
    """value as JSON at path, in one move."""
    write_beside(path, lambda to: pathlib.Path(to).write_text(json.dumps(value, indent=2), encoding="utf-8"))

def save_module(module, folder, stem):
    """config.json and STEM.safetensors, as diffusers and transformers read them."""
    state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    save_json(os.path.join(folder, "config.json"), module.to_config())
    write_beside(os.path.join(folder, stem + ".safetensors"), lambda to: save_file(state, to, {"format": "pt"}))

def save_pipeline(pipe, folder, parts=PARTS):
    """Write pipe, or only some parts, as a folder that diffusers.StableDiffusionPipeline.from_pretrained reads."""
    for part in parts:
        save_module(getattr(pipe, part), os.path.join(folder, part), STEMS[part])
    if "text_encoder" in parts:
        pipe.tokenizer.save_pretrained(os.path.join(folder, "tokenizer"))
        pipe.tokenizer.backend_tokenizer.model.save(os.path.join(folder, "tokenizer"))     # vocab.json and merges.txt
    if "unet" not in parts:                                        # the schedule belongs to it
        return
    save_json(os.path.join(folder, "scheduler", "scheduler_config.json"), pipe.schedule.to_config())
    save_json(os.path.join(folder, "model_index.json"), {
        "_class_name": f"StableDiffusion{'Inpaint' * (pipe.unet.config['in_channels'] == 9)}Pipeline",
        "_diffusers_version": "0.30.0",
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None], "feature_extractor": [None, None],
        "requires_safety_checker": False})

# ---- Draw ------------------------------------------------------------------------------------------------------------
def encode_prompts(pipe, texts):
    """texts (list of str) -> (len(texts), T, D), what the U-Net's cross-attention reads."""
    T = pipe.text_encoder.config["max_position_embeddings"]
    return pipe.text_encoder(tokenize(pipe.tokenizer, texts, T).to(pipe.device))

def picture_to_tensor(image, height, width):
    """A PIL picture, scaled and cropped at the centre, never stretched -> (1, 3, height, width) in [-1, 1]."""
    image = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1

def tensor_to_pictures(x):
    """(B, 3, H, W) in [-1, 1] -> list of B PIL pictures."""
    x = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a) for a in x]

def decode(pipe, z):
    """Scaled latents (B, 4, h, w) -> list of B PIL pictures, a few at a time: decoding is where memory peaks."""
    dtype = next(pipe.vae.parameters()).dtype
    few = max(1, 64 * 64 // z[0, 0].numel())
    drawn = (pipe.vae.decode((part / pipe.vae.scaling_factor).to(dtype)) for part in z.split(few))
    return [picture for x in drawn for picture in tensor_to_pictures(x)]

def encode_picture(pipe, x, generators):
    """A picture (1, 3, H, W) -> scaled latents (B, 4, h, w), one draw from its posterior for each generator."""
    q = pipe.vae.encode(x.to(pipe.device, next(pipe.vae.parameters()).dtype))
    return pipe.vae.scaling_factor * torch.cat([q.sample(g) for g in generators])

@torch.inference_mode()
def generate(pipe, prompt, negative_prompt="", steps=25, guidance=7.5, sampler="dpmpp", seed=0, num_images=1,
             height=None, width=None, init_image=None, strength=0.8, mask_image=None, latents=None, progress=True,
             frames=None):
    """Draw num_images pictures for a prompt (str), or for each of several (list of str) -> list of PIL pictures.

    Picture k is drawn with seed + k, by a random generator of its own on the CPU: the same alone, in a batch, on any
    device. height, width: in pixels; by default as the model was trained, or as the init image. init_image (PIL): start
    from it, strength in (0, 1] of the way back to noise. mask_image (PIL): white is redrawn, black is kept. latents
    (B, 4, h, w): the noise to start from. frames: a list, to which each step's prediction of the finished latents is
    added. Raises BadInput.
    """
    prompts = [p for p in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(num_images)]
    schedule, f, config = pipe.schedule, pipe.vae.f, pipe.unet.config
    inpainting_model = config["in_channels"] == 9                  # one that sees mask and surroundings as inputs
    for flag, value, low, high in (
            ("steps", steps, 1, schedule.T), ("num-images", num_images, 1, 10 ** 6), ("seed", seed, 0, 10 ** 15),
            ("strength", strength, 1e-6, 1), ("guidance", guidance, -99, 99)):
        if not low <= value <= high:
            raise BadInput(f"--{flag} {value} is not between {low} and {high}")
    if mask_image is not None and init_image is None or inpainting_model and mask_image is None:
        raise BadInput("--mask and --init-image go together, and an inpainting model needs both")

    # How large? Drawn at the next multiple of f, then cropped.
    native = (config["sample_size"] or 64) * f
    own_width, own_height = (native, native) if init_image is None else init_image.size
    shrink = native / (own_width * own_height) ** 0.5
    shrink = shrink if shrink < 0.6 else 1                         # far beyond its size, a model draws everything twice
    height, width = height or round(own_height * shrink), width or round(own_width * shrink)
    if min(height, width) < f:
        raise BadInput(f"--height {height}, --width {width}: a picture has at least {f} pixels on a side")
    H, W = -(-height // f) * f, -(-width // f) * f
    shape = (config["out_channels"], H // f, W // f)
    if latents is not None and tuple(latents.shape) != (len(prompts), *shape):
        raise BadInput(f"latents are {tuple(latents.shape)}, should be {(len(prompts), *shape)}")
    init = None if init_image is None else picture_to_tensor(init_image, H, W)
    if mask_image is not None:
        mask_pixels = (picture_to_tensor(mask_image, H, W)[:, :1] > 0).float()      # (1, 1, H, W), 1 is redrawn
        mask = F.interpolate(mask_pixels, (H // f, W // f)).to(pipe.device)         # (1, 1, h, w)
    times = schedule.timesteps(steps, sampler)
    if init is not None:                                           # skip the first steps: they would decide everything
        times = times[len(times) - max(int(len(times) * strength), 1):]
    pictures = []
    few = max(1, 4 * 64 * 64 // (shape[1] * shape[2]))             # pictures drawn at once: four of Stable Diffusion's
    bar = tqdm(total=-(-len(prompts) // few) * len(times), desc="drawing", unit="step", disable=not progress)
    for first in range(0, len(prompts), few):
        batch = prompts[first: first + few]
        B = len(batch)
        generators = [torch.Generator().manual_seed(seed + first + k) for k in range(B)]

        def randn(_=None):
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(pipe.device)
        # What to draw: the prompts and, for guidance, what to move away from.
        context = encode_prompts(pipe, batch)                                       # (B, T, D)
        if guidance != 1:
            context = torch.cat([encode_prompts(pipe, [negative_prompt]).expand_as(context), context])

        # Where to start: from noise, or from a picture with as much noise as the first step expects.
        start = init is not None and not (inpainting_model and strength == 1)
        known, seen = encode_picture(pipe, init, generators) if start else None, None
        z = randn() if latents is None else latents[first: first + few].to(pipe.device).float()
        z = schedule.q_sample(known, times[0][0], z) if start else z
        if inpainting_model:
            around = encode_picture(pipe, init * (mask_pixels < 0.5), generators)
            seen = torch.cat([mask.expand(B, -1, -1, -1), around], dim=1)           # (B, 5, h, w)

        def model(z, t):                                           # (B, 4, h, w), int -> guided prediction, likewise
            x = z if seen is None else torch.cat([z, seen], dim=1)
            x = torch.cat([x] * (len(context) // B)).to(context.dtype)              # both branches in one batch
            out = pipe.unet(x, torch.full((len(x),), t, device=x.device), context).float()
            return out if guidance == 1 else guide(out[B:], out[:B], guidance)
        denoiser = pin(schedule, model, known, mask) if mask_image is not None and seen is None else model
        for z, x0 in SAMPLERS[sampler](schedule, denoiser, z, times, randn=randn):
            bar.update()
            if frames is not None:
                frames.append(x0)
        pictures += decode(pipe, z)
    bar.close()
    if mask_image is not None:                                     # what is kept is kept to the pixel, with a soft seam
        original = tensor_to_pictures(init)[0]
        white = tensor_to_pictures(mask_pixels.expand(-1, 3, -1, -1) * 2 - 1)[0].convert("L")
        soft = ImageChops.darker(white, white.filter(ImageFilter.GaussianBlur(f / 2)))
        pictures = [Image.composite(p, original, soft) for p in pictures]
    left, top = (W - width) // 2, (H - height) // 2
    return [p.crop((left, top, left + width, top + height)) for p in pictures]

# ---- The command line ------------------------------------------------------------------------------------------------
def grid(pictures, columns=None):
    """PIL pictures of one size, laid out in rows -> one PIL picture."""
    columns, (w, h) = columns or int(np.ceil(len(pictures) ** 0.5)), pictures[0].size
    sheet = Image.new("RGB", (columns * w, -(-len(pictures) // columns) * h))
    for k, picture in enumerate(pictures):
        sheet.paste(picture, (k % columns * w, k // columns * h))
    return sheet

def open_picture(path, flag):
    """The picture at path as RGB: upright, transparent parts white, 16 bits cut to 8. BadInput names the flag."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):                             # Pillow would clip 16 bits at 255
            image = Image.fromarray((np.asarray(image) / 256).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise BadInput(f"{flag} {path} is not a readable picture ({e})") from None

def main(args):
    """Draw what the command line (parse_args) asks for, and say where the pictures are."""
    device, dtype = pick_device(args.device, args.dtype)
    init = open_picture(args.init_image, "--init-image") if args.init_image else None
    mask = open_picture(args.mask, "--mask") if args.mask else None
    stem, ext = os.path.splitext(args.output)
    known = Image.registered_extensions().get(ext.lower()) in Image.SAVE and ext.lower() != ".gif"
    if not known or not os.path.isdir(os.path.dirname(stem) or "."):
        raise BadInput(f"--output {args.output}: it takes an existing folder and a name that ends like .png")
    pipe = load_pipeline(args.model, device, dtype)
    if args.compile:
        pipe.unet.compile()
    frames = []
    pictures = generate(pipe, args.prompts, args.negative, args.steps, args.guidance, args.sampler, args.seed,
                        args.num_images, args.height, args.width, init, args.strength, mask, frames=frames)
    names = [args.output] if len(pictures) == 1 else [f"{stem}-{k}{ext}" for k in range(len(pictures))]
    for k, (name, picture) in enumerate(zip(names, pictures)):
        info = PngImagePlugin.PngInfo()                            # what other Stable Diffusion tools show and read
        sampler = {"ddpm": "DDPM", "ddim": "DDIM", "dpmpp": "DPM++ 2M"}[args.sampler]
        info.add_itxt("parameters", f"{args.prompts[k // args.num_images]}\nNegative prompt: {args.negative}\nSteps: "
                      f"{args.steps}, Sampler: {sampler}, CFG scale: {args.guidance:g}, Seed: "
                      f"{args.seed + k}, Size: {picture.width}x{picture.height}, Model: {pipe.name}")
        picture.save(name, **({"pnginfo": info} if ext.lower() == ".png" else {}))
    if len(pictures) > 1:
        grid(pictures).save(args.output)
        names.insert(0, args.output)
    if args.gif:
        names.append(f"{stem}.gif")
        with torch.inference_mode():                               # what each step foresaw, of the first few pictures
            movie = [grid(decode(pipe, x0)) for x0 in frames[: len(frames) // -(-len(pictures) // len(frames[0]))]]
        movie[0].save(names[-1], save_all=True, append_images=movie[1:] + movie[-1:] * 10, duration=100, loop=0)
    print("\n".join(names))

if __name__ == "__main__":
    try:
        main(ARGS)
    except (BadInput, OSError) as e:
        print(f"sample.py: {e}", file=sys.stderr)
        sys.exit(2)
