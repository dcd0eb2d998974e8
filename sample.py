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

From Python: `from sample import load_pipeline, save_pipeline, generate`. Before this file: unet.py. Read next: train.py.
"""
import argparse
import json
import os
import re
import sys


def parse_args():
    p = argparse.ArgumentParser(description="Draw pictures from prompts.")
    p.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw; several prompts draw several pictures")
    p.add_argument("--model", default="out", help="a folder that train.py or diffusers wrote, or a hub id (default: out)")
    p.add_argument("--negative", default="", metavar="TEXT", help="what not to draw")
    p.add_argument("--steps", type=int, default=25, help="denoising steps: more is slower and finer (default: 25)")
    p.add_argument("--guidance", type=float, default=7.5, help="how strictly to follow the prompt: 1 is freely (default: 7.5)")
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
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                   help="auto: the fastest that the device is built for")
    p.add_argument("--compile", action="store_true", help="torch.compile the U-Net: a slow start, then faster steps")
    return p.parse_args()


ARGS = parse_args() if __name__ == "__main__" else None            # before the slow imports: --help answers at once

import copy                                                        # noqa: E402
from dataclasses import dataclass                                  # noqa: E402

import numpy as np                                                 # noqa: E402
import torch                                                       # noqa: E402
import torch.nn.functional as F                                    # noqa: E402
from PIL import Image, ImageChops, ImageFilter, ImageOps, PngImagePlugin           # noqa: E402
from safetensors import safe_open                                  # noqa: E402
from safetensors.torch import save_file                            # noqa: E402
from tqdm import tqdm                                              # noqa: E402

from clip_encoder import CLIP, CLIPTextEncoder, tokenize                 # noqa: E402
from ddpm import SAMPLERS, NoiseSchedule, guide                    # noqa: E402
from unet import UNet                                              # noqa: E402
from vae import VAE                                                # noqa: E402


class BadInput(ValueError):
    """Something the user can put right. The message is one line that names the flag, file or key, and what would do."""


def pick_device(device="auto", dtype="auto"):
    """Names as on the command line -> (torch.device, torch.dtype): where this machine is fastest."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available() or device == "mps" and not torch.backends.mps.is_available():
        raise BadInput(f"--device {device}: this machine has none; try --device cpu")
    if dtype != "auto":
        return torch.device(device), getattr(torch, dtype)
    if device == "cuda":
        half = torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    elif device == "mps":
        half = torch.float16
    else:                                                          # bfloat16 pays only where the processor multiplies it
        built = [getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("amx_tile", "avx512_bf16")]
        half = torch.bfloat16 if any(built) else torch.float32
    return torch.device(device), half


# ---------------------------------------------------------------------------------------------------------------------
# Load and save. A model is a folder as diffusers lays it out, one sub-folder for each part.

@dataclass
class Pipeline:
    """A whole model: the five parts that turn text into pictures."""
    unet: UNet
    vae: VAE
    text_encoder: CLIPTextEncoder
    tokenizer: object                                              # transformers' CLIPTokenizer
    schedule: NoiseSchedule
    name: str = ""

    @property
    def device(self):
        return next(self.vae.parameters()).device


WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model", "clip": "model"}
CLASSES = {"unet": UNet, "vae": VAE, "text_encoder": CLIPTextEncoder, "clip": CLIP}
PARTS = ("unet", "vae", "text_encoder")


def read_json(path):
    """A JSON file -> dict; BadInput names the file that is missing or broken."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        raise BadInput(f"{path} is missing") from None
    except (OSError, ValueError) as e:
        raise BadInput(f"{path} is not readable JSON: {e}") from None


def read_weights(folder, stem, dtype):
    """The weights in `folder`, in any of the published variants -> {name: tensor of dtype}."""
    names = [stem + ext for ext in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")]
    names += [n.replace("model.", "pytorch_model.", 1) for n in names if n.startswith("model.") and n.endswith("bin")]
    path = next((p for p in (os.path.join(folder, n) for n in names) if os.path.exists(p)), None)
    if path is None:
        raise BadInput(f"{folder} holds no weights: none of {', '.join(names)}")
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, "pt") as f:                       # tensor by tensor: never twice in memory
                return {key: f.get_tensor(key).to(dtype) for key in f.keys()}
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)      # runs no code from the file
        return {key: value.to(dtype) for key, value in state.items()}
    except Exception as e:                                         # each library has its own idea of what broken means
        raise BadInput(f"{path} is not readable: {str(e).splitlines()[0]}") from None


def modern(part, state):
    """Undo what older versions of diffusers and transformers named otherwise."""
    if part == "text_encoder":                                     # without prefix, or with a table of 0, 1, 2, ...
        state = {k if k.startswith("text_model.") else "text_model." + k: v for k, v in state.items()}
        return {k: v for k, v in state.items() if not k.endswith("position_ids")}
    if part == "vae":
        old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        state = {re.sub(r"\.(query|key|value|proj_attn)\.", lambda m: f".{old[m[1]]}.", k): v for k, v in state.items()}
    return state


def load_part(part, folder, dtype):
    """One sub-folder -> its module in eval mode, with weights of dtype. BadInput says what is missing or wrong."""
    config = read_json(os.path.join(folder, "config.json"))
    try:
        with torch.device("meta"):                                 # the shapes without the memory
            module = CLASSES[part].from_config(config)
    except (ValueError, TypeError, AssertionError) as e:
        raise BadInput(f"{folder}: {e}") from None
    return fill(part, module, modern(part, read_weights(folder, WEIGHTS[part], dtype)), folder)


def fill(part, module, state, source):
    """Give a module built on the meta device its weights, strictly: every name and every shape."""
    wanted = module.state_dict()
    wrong = [f"{k} is missing" for k in wanted if k not in state] + [f"{k} is unknown" for k in state if k not in wanted]
    wrong += [f"{k} is {tuple(state[k].shape)}, should be {tuple(wanted[k].shape)}" for k in wanted
              if k in state and state[k].shape != wanted[k].shape]
    if wrong:
        raise BadInput(f"{source}: the weights do not fit the {part}'s config: {wrong[0]} ({len(wrong)} such)")
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def locate(model):
    """A path, or a hub id that is then downloaded -> the folder."""
    if os.path.isdir(model):
        return model
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or os.path.exists(model):
        hint = "; train one with `python train.py`" if model == "out" else ""
        raise BadInput(f"--model {model}: there is no such model folder{hint}")
    from huggingface_hub import snapshot_download
    patterns = [f"{part}/{name}" for part in ("unet", "vae", "text_encoder") for name in ("config.json", "*.safetensors")]
    try:
        return snapshot_download(model, allow_patterns=patterns + ["tokenizer/*", "scheduler/*", "model_index.json"],
                                 ignore_patterns=["*.fp16.*", "*.non_ema.*"])
    except Exception as e:
        raise BadInput(f"--model {model}: neither a folder here nor to be had from the hub: {str(e).splitlines()[0]}") from None


def load_pipeline(model, device="cpu", dtype=torch.float32, tokenizer=None):
    """A folder in diffusers' layout, or a hub id -> Pipeline. tokenizer: a folder or hub id to use instead of its own.

    In float16 the VAE stays in float32: its activations overflow on some pictures. Raises BadInput.
    """
    folder = locate(model)
    parts = {}
    for part in PARTS:
        wide = part == "vae" and dtype == torch.float16
        parts[part] = load_part(part, os.path.join(folder, part), torch.float32 if wide else dtype).to(device)
    # Convolutions are fastest where the channels of a pixel lie side by side in memory.
    for part in ("unet", "vae"):
        parts[part].to(memory_format=torch.channels_last)
    scheduler = os.path.join(folder, "scheduler", "scheduler_config.json")
    try:                                                           # without a file: Stable Diffusion 1.5's
        schedule = NoiseSchedule.from_config(read_json(scheduler)) if os.path.exists(scheduler) else NoiseSchedule()
    except (ValueError, TypeError) as e:
        raise BadInput(f"{scheduler}: {e}") from None
    return Pipeline(**parts, tokenizer=load_tokenizer(tokenizer or os.path.join(folder, "tokenizer")),
                    schedule=schedule, name=os.path.basename(os.path.abspath(folder)))


def load_tokenizer(source):
    """A folder (vocab.json and merges.txt, or tokenizer.json) or a hub id -> transformers' CLIPTokenizer."""
    from transformers import CLIPTokenizer
    try:
        return CLIPTokenizer.from_pretrained(source)
    except Exception as e:
        raise BadInput(f"{source} holds no readable CLIP tokenizer: {str(e).splitlines()[0]}") from None


def write_beside(path, write):
    """Call write(temporary path), then move the result to path: a reader sees the old file or the new, never a half."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    beside = os.path.join(os.path.dirname(path), ".writing-" + os.path.basename(path))
    write(beside)
    os.replace(beside, path)


def save_json(path, value):
    """value as JSON at path, in one move."""
    def write(to):
        with open(to, "w", encoding="utf-8") as f:
            json.dump(value, f, indent=2)
    write_beside(path, write)


def save_module(module, folder, stem):
    """config.json and STEM.safetensors, as diffusers and transformers read them."""
    state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    save_json(os.path.join(folder, "config.json"), module.to_config())
    write_beside(os.path.join(folder, stem + ".safetensors"), lambda to: save_file(state, to, {"format": "pt"}))


def save_pipeline(pipe, folder, parts=PARTS):
    """Write pipe, or only some parts of it, as a folder that diffusers.StableDiffusionPipeline.from_pretrained reads."""
    for part in parts:
        save_module(getattr(pipe, part), os.path.join(folder, part), WEIGHTS[part])
    if "text_encoder" in parts:
        pipe.tokenizer.save_pretrained(os.path.join(folder, "tokenizer"))
        pipe.tokenizer.backend_tokenizer.model.save(os.path.join(folder, "tokenizer"))     # vocab.json and merges.txt
    save_json(os.path.join(folder, "scheduler", "scheduler_config.json"), pipe.schedule.to_config())
    save_json(os.path.join(folder, "model_index.json"), {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0",
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None], "feature_extractor": [None, None],
        "requires_safety_checker": False})


# ---------------------------------------------------------------------------------------------------------------------
# Draw.

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
    return [p for part in z.split(few) for p in tensor_to_pictures(pipe.vae.decode(part.to(dtype) / pipe.vae.scaling_factor))]


def encode_picture(pipe, x, generators):
    """A picture (1, 3, H, W) -> scaled latents (B, 4, h, w), one draw from its posterior for each generator."""
    q = pipe.vae.encode(x.to(pipe.device, next(pipe.vae.parameters()).dtype))
    return pipe.vae.scaling_factor * torch.cat([q.sample(g) for g in generators])


def pin(schedule, model, known, mask):
    """A model that has nothing to guess where mask (1, 1, h, w) is 0: there the picture is `known` (B, 4, h, w).

    Inpainting for any model: after each prediction of x_0, the part that is to be kept is put in its place.
    """
    def pinned(x, t):
        x0, _ = schedule.x0_and_eps(model(x, t).float(), x, t)
        x0 = mask * x0 + (1 - mask) * known
        abar = schedule.alpha_bar[t].item()
        eps = (x - abar ** 0.5 * x0) / (1 - abar) ** 0.5                           # DDPM Eq. 4 solved for eps
        return schedule.velocity(x0, t, eps) if schedule.prediction_type == "v_prediction" else eps
    return pinned


@torch.inference_mode()
def generate(pipe, prompt, negative_prompt="", steps=25, guidance=7.5, sampler="dpmpp", seed=0, num_images=1,
             height=None, width=None, init_image=None, strength=0.8, mask_image=None, latents=None, progress=True,
             frames=None):
    """Draw `num_images` pictures for a prompt (str), or for each of several (list of str) -> list of PIL pictures.

    Picture k is drawn with seed + k, from a random generator of its own on the CPU: it is the same alone, in a batch, and
    on any device. height, width: pixels; by default as the model was trained, or as the init image.
    init_image (PIL): start from it, `strength` in (0, 1] of the way back to noise. mask_image (PIL): white is redrawn,
    black is kept. latents (B, 4, h, w): the noise to start from. frames: a list to which every step's (B, 4, h, w)
    prediction of the finished latents is added. Raises BadInput.
    """
    prompts = [p for p in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(num_images)]
    vae, schedule, f = pipe.vae, pipe.schedule, pipe.vae.f
    if mask_image is not None and init_image is None:
        raise BadInput("--mask needs --init-image, the picture to redraw a part of")
    if init_image is not None and not 0 < strength <= 1:
        raise BadInput(f"--strength {strength} is not above 0 and at most 1")
    if steps < 1 or steps > schedule.T or num_images < 1:
        raise BadInput(f"--steps {steps} or --num-images {num_images}: at least 1, and at most {schedule.T} steps")

    # How large? The picture is drawn at the next multiple of f and cropped.
    native = pipe.unet.config["sample_size"] or 64
    sizes = (init_image.height, init_image.width) if init_image is not None else (native * f, native * f)
    if init_image is not None and sizes[0] * sizes[1] > 2.5 * (native * f) ** 2:    # far beyond what it was trained on,
        shrink = native * f / (sizes[0] * sizes[1]) ** 0.5                          # a model draws everything twice
        sizes = (round(sizes[0] * shrink), round(sizes[1] * shrink))
    height, width = height or sizes[0], width or sizes[1]
    if height < f or width < f:
        raise BadInput(f"--height {height}, --width {width}: at least {f} pixels")
    H, W = -(-height // f) * f, -(-width // f) * f
    shape = (pipe.unet.config["out_channels"], H // f, W // f)
    if latents is not None and tuple(latents.shape) != (len(prompts), *shape):
        raise BadInput(f"latents are {tuple(latents.shape)}, should be {(len(prompts), *shape)}")
    init = None if init_image is None else picture_to_tensor(init_image, H, W)
    if mask_image is not None:
        mask_pixels = (picture_to_tensor(mask_image, H, W)[:, :1] > 0).float()      # (1, 1, H, W), 1 is redrawn
        mask = F.interpolate(mask_pixels, (H // f, W // f)).to(pipe.device)         # (1, 1, h, w)
    if pipe.unet.config["in_channels"] != shape[0] and mask_image is None:
        raise BadInput("this is an inpainting model: it needs --init-image and --mask")

    times = schedule.timesteps(steps, sampler)
    if init is not None:                                           # skip the first steps: they would decide everything
        times = times[max(len(times) - int(len(times) * strength), 0):] or times[-1:]

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

        # Where to start.
        inpainting_model = pipe.unet.config["in_channels"] == 9
        known = None
        if init is not None and not (inpainting_model and strength == 1):
            known = encode_picture(pipe, init, generators)
        z = randn() if latents is None else latents[first: first + few].to(pipe.device).float()
        if known is not None:
            z = schedule.q_sample(known, times[0][0], z)
        seen = None
        if inpainting_model:                                       # it is told what is to be redrawn, and what is around
            around = encode_picture(pipe, init * (mask_pixels < 0.5), generators)
            seen = torch.cat([mask.expand(B, -1, -1, -1), around], dim=1)           # (B, 5, h, w)

        def model(z, t):                                           # (B, 4, h, w), int -> guided prediction, likewise
            x = z if seen is None else torch.cat([z, seen], dim=1)
            x = torch.cat([x] * (len(context) // B)).to(context.dtype)              # both branches in one batch
            out = pipe.unet(x, torch.full((len(x),), t, device=x.device), context).float()
            return out if guidance == 1 else guide(out[B:], out[:B], guidance)

        if mask_image is not None and not inpainting_model:
            denoiser = pin(schedule, model, known, mask)
        else:
            denoiser = model
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


# ---------------------------------------------------------------------------------------------------------------------
# Save pictures.

def grid(pictures, columns=None):
    """PIL pictures of one size, laid out in rows -> one PIL picture."""
    columns = columns or int(np.ceil(len(pictures) ** 0.5))
    w, h = pictures[0].size
    sheet = Image.new("RGB", (columns * w, -(-len(pictures) // columns) * h))
    for k, picture in enumerate(pictures):
        sheet.paste(picture, (k % columns * w, k // columns * h))
    return sheet


def open_picture(path, flag):
    """The picture at path, upright, as PIL reads it. BadInput names the flag."""
    try:
        return ImageOps.exif_transpose(Image.open(path))
    except OSError as e:
        raise BadInput(f"{flag} {path}: not a readable picture: {e}") from None


def main(args):
    device, dtype = pick_device(args.device, args.dtype)
    init = open_picture(args.init_image, "--init-image") if args.init_image else None
    mask = open_picture(args.mask, "--mask") if args.mask else None
    pipe = load_pipeline(args.model, device, dtype)
    if args.compile:
        pipe.unet.compile()
    frames = [] if args.gif else None
    pictures = generate(pipe, args.prompts, args.negative, args.steps, args.guidance, args.sampler, args.seed,
                        args.num_images, args.height, args.width, init, args.strength, mask, frames=frames)

    # The text chunk that other Stable Diffusion tools show and read.
    stem, ext = os.path.splitext(args.output)
    names = [args.output] if len(pictures) == 1 else [f"{stem}-{k}{ext}" for k in range(len(pictures))]
    for k, (name, picture) in enumerate(zip(names, pictures)):
        info = PngImagePlugin.PngInfo()
        sampler = {"ddpm": "DDPM", "ddim": "DDIM", "dpmpp": "DPM++ 2M"}[args.sampler]
        info.add_itxt("parameters", f"{args.prompts[k // args.num_images]}\nNegative prompt: {args.negative}\nSteps: "
                      f"{args.steps}, Sampler: {sampler}, CFG scale: {args.guidance:g}, Seed: {args.seed + k}, "
                      f"Size: {picture.width}x{picture.height}, Model: {pipe.name}")
        picture.save(name, **({"pnginfo": info} if ext.lower() == ".png" else {}))
    if len(pictures) > 1:
        grid(pictures).save(args.output)
    if args.gif:
        with torch.inference_mode():
            movie = [grid(decode(pipe, x0)) for x0 in frames[: len(frames)]]
        movie[0].save(stem + ".gif", save_all=True, append_images=movie[1:], duration=[80] * (len(movie) - 1) + [2000], loop=0)
    print(f"{args.output}" + (f" and {names[0]} ... {names[-1]}" if len(pictures) > 1 else "")
          + (f" and {stem}.gif" if args.gif else ""))


if __name__ == "__main__":
    try:
        main(ARGS)
    except BadInput as e:
        sys.exit(f"sample.py: {e}") if False else (print(f"sample.py: {e}", file=sys.stderr), sys.exit(2))
