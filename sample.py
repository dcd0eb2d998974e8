"""Text to picture: load a model, encode the prompt, denoise, decode, save. Before this file: unet.py. Then: train.py.

The whole of it in five lines; `generate` says the same at length (from Python: load_pipeline, generate, save_pipeline):

    context = text_encoder(tokenize(["", prompt]))        what to move away from, and what to draw      (2, T, D)
    z = randn(1, 4, H/f, W/f)                             start from pure noise
    for t, t_prev in times:                               from noisy to clean, `steps` times
        z = step(z, guided(unet, context, w)(z, t))       take out some of the noise that the U-Net sees
    picture = vae.decode(z / vae.scaling_factor)          from latent to pixels                         (1, 3, H, W)"""
import argparse, contextlib, dataclasses, io, json, os, pathlib, re, shutil, sys, tempfile, warnings
SAMPLER_NAMES = {"ddpm": "DDPM", "ddim": "DDIM", "dpmpp": "DPM++ 2M"}              # ours: what other tools call them

def parse_args():
    """The command line -> its values."""
    p = argparse.ArgumentParser(description="Draw pictures from prompts.")
    p.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw; several prompts draw several pictures")
    p.add_argument("--model", help="folder, hub id, single .safetensors or .ckpt (default: out, else assets/model)")
    p.add_argument("--tokenizer", metavar="DIR|HUB_ID", help="for a single file (default: OpenAI's, from the hub)")
    p.add_argument("--prediction-type", choices=["epsilon", "v_prediction"], help="instead of what the files tell")
    p.add_argument("--like", metavar="PNG", help="prompt and settings of this picture; other flags override them")
    p.add_argument("--negative", default="", metavar="TEXT", help="what not to draw (not with --guidance 1)")
    p.add_argument("--steps", type=int, default=25, help="denoising steps: more is slower and finer (default: 25)")
    p.add_argument("--guidance", type=float, help="how strictly to follow the prompt (default: by model, 4 or 7.5)")
    p.add_argument("--sampler", choices=SAMPLER_NAMES, default="dpmpp", help="see ddpm.py (default: dpmpp)")
    p.add_argument("--seed", type=int, default=0, help="picture k is drawn with seed + k (default: 0)")
    p.add_argument("--num-images", type=int, default=1, help="pictures for each prompt (default: 1)")
    p.add_argument("--height", type=int, help="in pixels (default: the model's, or the init image's if not far larger)")
    p.add_argument("--width", type=int, help="in pixels (default: likewise)")
    p.add_argument("--init-image", metavar="FILE", help="start from this picture instead of from noise")
    p.add_argument("--strength", type=float, default=0.8, help="how far to leave the init image, up to 1 (default 0.8)")
    p.add_argument("--mask", metavar="FILE", help="with --init-image: redraw only where this picture is white")
    p.add_argument("--tile", action="store_true", help="decode in tiles: large pictures in less memory")
    p.add_argument("--output", default="out.png", metavar="FILE", help="where to put the picture (default: out.png)")
    p.add_argument("--gif", action="store_true", help="also write the denoising as a GIF, beside the picture")
    p.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    p.add_argument("--compile", action="store_true", help="torch.compile the U-Net: a slow start, then faster steps")
    p.error = lambda message: p.exit(2, f"sample.py: {' '.join(message.split())}\n")  # one line, without usage
    args = p.parse_intermixed_args()
    if args.like:
        try:
            p.set_defaults(**read_parameters(args.like))           # strings: argparse makes of them what flags take
        except Exception as e:                                     # whatever a foreign file may hold
            p.error(f"--like {args.like}: no settings in it (sheets have none) ({type(e).__name__} {e})")
        args = p.parse_intermixed_args()
        args.prediction_type in (None, "epsilon", "v_prediction") or p.error(f"{args.like}: unknown prediction type")
    for flag in (flag for flag, value in vars(args).items() if value == "" and flag != "negative"):
        p.error(f"argument --{flag.replace('_', '-')}: expected a name, not nothing")
    if args.sampler is None or not args.prompts:
        p.error(f"{args.like} has a sampler not known here: add --sampler" if args.prompts else "a PROMPT is required")
    return args

FIELDS = {"Steps": "steps", "CFG scale": "guidance", "Seed": "seed", "Model": "model", "Denoising strength": "strength",
          "Init image": "init_image", "Mask": "mask", "Asked width": "width", "Asked height": "height", "Tiles": "tile",
          "Tokenizer": "tokenizer", "Prediction type": "prediction_type"}           # name in a PNG: flag's name

def write_parameters(args, k, size):
    """What Stable Diffusion tools keep in a PNG as `parameters`, of picture k: the prompts, then a line of settings."""
    given = vars(args) | {"seed": args.seed + k, "strength": args.init_image and args.strength}
    fields = {name: v for name, flag in FIELDS.items() if (v := given[flag]) is not None and v is not False}
    fields |= {"Sampler": SAMPLER_NAMES[args.sampler], "Size": "{}x{}".format(*size)}
    settings = [name + ": " + (json.dumps(v) if set(str(v)) & set(',:"\n') else str(v)) for name, v in fields.items()]
    return f"{args.prompts[k // args.num_images]}\nNegative prompt: {args.negative}\n{', '.join(settings)}"

def read_parameters(path):
    """The flags that drew the PNG at path, as strings, from its `parameters`. KeyError, ValueError or OSError."""
    from PIL import Image
    words, _, settings = Image.open(path).info["parameters"].rpartition("\n")
    prompt, _, negative = words.rpartition("\nNegative prompt: ") if "\nNegative prompt: " in words else (words, "", "")
    field = dict(re.findall(r'(?:^|, )([\w ]+): ("(?:[^"\\]|\\.)*"|[^,]*)(?=, |$)', settings))
    field = {k.strip(): json.loads(v) if v[:1] == '"' else v for k, v in field.items()}
    if "Init image" not in field:                                  # with one, the size follows unless it was asked for
        field["Asked width"], _, field["Asked height"] = field["Size"].partition("x")
    sampler = {name: sampler for sampler, name in SAMPLER_NAMES.items()}.get(field["Sampler"])
    return {"prompts": [prompt], "negative": negative, "sampler": sampler} | {
        flag: field[name] for name, flag in FIELDS.items() if name in field}
ARGS = parse_args() if __name__ == "__main__" else None            # before the slow imports: --help answers at once
os.environ.setdefault("GOMP_SPINCOUNT", "4000")                    # waiting threads soon sleep: else busy cores crawl
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps, PngImagePlugin
from safetensors.torch import save_file
from tqdm import tqdm
from clip_encoder import CLIP, CLIPTextEncoder, cut_off, find, load_tokenizer, plain, settle, tokenize, weights_names
from ddpm import SAMPLERS, NoiseSchedule, guided, pin
from unet import UNet, assemble, pick_device, read_weights
from vae import VAE, grid, open_picture, picture_to_tensor, tensor_to_pictures

class BadInput(ValueError):
    """Something the user can put right. The message is one line that names the flag, file or key, and what would do."""

@contextlib.contextmanager
def blame(what):
    """An error of what runs inside, in some library's words, becomes BadInput: one line that begins with `what`."""
    try:
        yield
    except Exception as e:
        if isinstance(e, BadInput): raise
        why = " ".join(f"{'' if type(e) in (ValueError, AssertionError) else type(e).__name__} {e}".split())[:300]
        raise BadInput(f"{what}: {why}" if why else what) from None

def run(main, args):
    """main(args) as a command: what goes wrong is told in one line; status 2 if input or files are at fault, else 1."""
    warnings.formatwarning = lambda message, *_: f"{os.path.basename(sys.argv[0])}: {message}\n"
    try:
        return main(args)
    except (BadInput, OSError, ArithmeticError) as e:              # one of --workers tells it after its traceback
        status, why = 2 - isinstance(e, ArithmeticError), str(e).split(".BadInput: ")[-1] or type(e).__name__
    except (KeyboardInterrupt, MemoryError, RuntimeError) as e:
        status, why = 1, next((why for clue, why in (
            ("Interrupt", "stopped"), ("[Mm]emory", "out of memory; try a smaller picture, batch or model"),
            ("CxxCompiler|CppCompile", "--compile needs a C++ compiler, and found none that works"),
            ("DataLoader worker|gloo|NCCL|peer", "another process of this run is gone; --resume goes on"))
            if re.search(clue, f"{type(e).__name__} {e}")), None)
        if not why: raise                                          # an error of ours: show where
    print(f"{os.path.basename(sys.argv[0])}: {' '.join(why.split())}", file=sys.stderr)
    sys.exit(status)

# ---- Load: a folder in diffusers' layout, the same on the hub, or a single file of the original release --------------
@dataclasses.dataclass
class Pipeline:
    """A whole model: the five parts that turn text into pictures; None for one that is not loaded or trained yet."""
    unet: UNet = None
    vae: VAE = None
    text_encoder: CLIPTextEncoder = None
    tokenizer: object = None                                       # transformers' CLIPTokenizer
    schedule: NoiseSchedule = None
    device = property(lambda self: next(self.vae.parameters()).device)
    guidance = property(lambda self: 4.0 if self.unet.config["addition_embed_type"] and             # what looks best;
                        self.text_encoder.config["max_position_embeddings"] > 8 else 7.5)           # 8: class names

PARTS = ("unet", "vae", "text_encoder")
CLASSES = {"unet": UNet, "vae": VAE, "text_encoder": CLIPTextEncoder, "clip": CLIP}
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}

def read_json(path):
    """A JSON file -> dict. Raises BadInput."""
    with blame(path), open(path, encoding="utf-8") as f:
        return dict(json.load(f))

def load_part(part, folder, dtype):
    """A sub-folder -> its module, with weights of dtype. Raises BadInput."""
    config, model = read_json(os.path.join(folder, "config.json")), CLASSES[part]
    there = [name for name in weights_names(part) if os.path.isfile(os.path.join(folder, name))]
    if not there:
        raise BadInput(f"{folder} holds no weights in one file: none of {', '.join(weights_names(part))}")
    with blame(os.path.join(folder, there[0])):
        state = model.current_names(read_weights(f"{folder}/{there[0]}", lambda _: dtype))
    with blame(folder):
        return assemble(model, config, state)

def load_clip(source, device="cpu", part="clip"):
    """A published CLIP (folder or hub id) -> (CLIP, tokenizer); part="text_encoder": its text tower alone."""
    with blame(source):
        folder = find(source, [part])
        inside = os.path.join(folder, part)
        clip = load_part(part, inside if os.path.isdir(inside) else folder, torch.float32).to(device)
        return clip, load_tokenizer(folder, clip.text_model.embeddings)

def load_pipeline(model, device="cpu", dtype=torch.float32, tokenizer=None, parts=PARTS, prediction_type=None):
    """A folder in diffusers' layout, a hub id, or a single .safetensors or .ckpt -> Pipeline, of some parts if asked.
    tokenizer (a folder or hub id) and prediction_type ("epsilon" or "v_prediction") count instead of what the files
    hold or say. In float16 the VAE stays float32: it would overflow on some pictures. Raises BadInput."""
    with blame(model):
        path, pipe = find(model, parts), Pipeline(schedule=NoiseSchedule())
    dtypes = {part: torch.float32 if part == "vae" and dtype == torch.float16 else dtype for part in parts}
    if os.path.isdir(path):
        tokenizer, config = tokenizer or path, os.path.join(path, "scheduler", "scheduler_config.json")
        for part in parts:
            folder, stage = os.path.join(path, part), part.replace("text_encoder", "clip")
            if not os.path.isdir(folder):
                raise BadInput(f"{path} holds no {part}; `python train.py --stage {stage}` trains one")
            setattr(pipe, part, load_part(part, folder, dtypes[part]))
        with blame(config):                                        # without a file: Stable Diffusion 1.5's
            pipe.schedule = NoiseSchedule.from_config(read_json(config)) if os.path.exists(config) else pipe.schedule
    else:                                                          # all parts in one, told apart by their names
        tokenizer = tokenizer or "openai/clip-vit-large-patch14"
        def part_of(name): return next((part for part in parts if name.startswith(PREFIXES[part])), None)
        with blame(path):
            state = read_weights(path, lambda name: dtypes.get(part_of(name)))
        for part in parts:
            own = {k[len(PREFIXES[part]):]: state.pop(k) for k in list(state) if part_of(k) == part}
            if not own:
                raise BadInput(f"{path} holds no {part}: no tensor {PREFIXES[part]}*")
            with blame(f"{path}: its {part} is not Stable Diffusion 1's or 2's"):
                setattr(pipe, part, assemble(CLASSES[part], *CLASSES[part].from_original(own), strays=part != "unet"))
        config = pipe.unet.config if pipe.unet else {}
        if config.get("use_linear_projection") and config["in_channels"] == 4 and prediction_type != "epsilon":
            config["sample_size"], prediction_type = 96, "v_prediction"             # Stable Diffusion 2.1, most likely
    pipe.schedule.prediction_type = prediction_type or pipe.schedule.prediction_type
    pipe.schedule.clip_sample = False            # for pixels, not for latents: diffusers overrules files, too
    for part in parts: getattr(pipe, part).to(device)
    if "text_encoder" in parts:
        with blame(f"--tokenizer {tokenizer}"):
            pipe.tokenizer = load_tokenizer(tokenizer, pipe.text_encoder.text_model.embeddings)
        if tokenizer != path and pipe.text_encoder.config["hidden_act"] == "gelu":
            pipe.tokenizer.add_special_tokens({"pad_token": "!"})  # id 0: as Stable Diffusion 2 was trained
    takes, gives = (module.config if module else {} for module in (pipe.unet, pipe.text_encoder))
    for part, key, *fit in (("unet", "in_channels", 4, 9), ("unet", "out_channels", 4), ("vae", "latent_channels", 4),
                            ("vae", "in_channels", 3), ("vae", "out_channels", 3)):
        if part in parts and (n := getattr(pipe, part).config[key]) not in fit:
            raise BadInput(f"{model}: its {part} has {key} = {n}; supported is only {' and '.join(map(str, fit))}")
    if takes and gives and takes["cross_attention_dim"] != gives["hidden_size"]:
        raise BadInput(f"{model}: its U-Net reads text {takes['cross_attention_dim']} wide, not {gives['hidden_size']}")
    return pipe

@contextlib.contextmanager
def all_at_once(folder):
    """A folder to write into. Its files then move into `folder`: all of them, or after an error or a power cut none.
    One rename, which no crash can halve, makes them count; `settle` moves them, now or later. OSError says why not."""
    settle(folder)
    writing = os.path.join(folder, ".writing")
    try:
        shutil.rmtree(writing, ignore_errors=True)                 # what a killed run began
        os.makedirs(writing)
        yield writing
        for path in filter(os.path.isfile, pathlib.Path(writing).rglob("*")):
            with open(path, "rb+") as f:
                os.fsync(f.fileno())                               # on the disk, not only on its way there
        os.rename(writing, os.path.join(folder, ".written"))
    except Exception as e:
        full = os.path.isdir(writing) and shutil.disk_usage(writing).free < 2 ** 20
        why = "the disk is full" if full else getattr(e, "strerror", None) or " ".join(str(e).split())[:300]
        shutil.rmtree(writing, ignore_errors=True)
        raise OSError(f"{folder} could not be written ({why}); what it held before is unharmed") from None
    settle(folder)

def save_json(path, value):
    """value as JSON at path, whose folder is made if it is missing."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    pathlib.Path(path).write_text(json.dumps(value, indent=2, allow_nan=False), encoding="utf-8")

def save_module(module, folder, part):
    """config.json and the weights of a part, as diffusers and transformers read them."""
    config, weights = (os.path.join(folder, name) for name in ("config.json", weights_names(part)[0]))
    save_json(config, module.to_config())
    save_file({k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}, weights, {"format": "pt"})
    with contextlib.suppress(OSError): shutil.copymode(config, weights)             # else for their owner alone

def save_pipeline(pipe, folder, parts=PARTS, into=all_at_once):
    """Write pipe, or some parts, as a folder that diffusers' from_pretrained reads: all, or after an OSError none."""
    with into(folder) as to:
        for part in parts:
            save_module(getattr(pipe, part), os.path.join(to, part), part)
        if "text_encoder" in parts:
            tokenize(pipe.tokenizer, [""])                         # its file keeps the last call's padding: always this
            pipe.tokenizer.save_pretrained(os.path.join(to, "tokenizer"))
            pipe.tokenizer.backend_tokenizer.model.save(os.path.join(to, "tokenizer"))     # vocab.json and merges.txt
        if "unet" in parts:                                        # the schedule belongs to it
            save_json(os.path.join(to, "scheduler", "scheduler_config.json"), pipe.schedule.to_config())
            save_json(os.path.join(to, "model_index.json"), {
                "_class_name": f"StableDiffusion{'Inpaint' * (pipe.unet.config['in_channels'] == 9)}Pipeline",
                "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
                "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
                "scheduler": ["diffusers", "DDIMScheduler"], "_diffusers_version": "0.30.0", "requires_safety_checker":
                False, "safety_checker": [None, None], "feature_extractor": [None, None]})

# ---- Draw ------------------------------------------------------------------------------------------------------------
def encode_prompts(pipe, texts):
    """texts (list of str) -> (len(texts), T, D), what the U-Net's cross-attention reads."""
    T = pipe.text_encoder.config["max_position_embeddings"]
    return pipe.text_encoder(tokenize(pipe.tokenizer, texts, T).to(pipe.device))

def decode(pipe, z, tile=False):
    """Scaled latents (B, 4, h, w) -> list of B PIL pictures, a few at a time: decoding is where memory peaks."""
    dtype, draw, pictures = next(pipe.vae.parameters()).dtype, pipe.vae.decode_tiles if tile else pipe.vae.decode, []
    for part in z.split(max(1, 64 * 64 // z[0, 0].numel())):
        if not (x := draw((part / pipe.vae.scaling_factor).to(dtype))).isfinite().all():
            raise BadInput("the model has drawn numbers that are none (nan): try --dtype float32, or other weights")
        pictures += tensor_to_pictures(x)
    return pictures

def encode_picture(pipe, x, generators):
    """A picture (1, 3, H, W) -> scaled latents (B, 4, h, w), one draw from its posterior for each generator."""
    q = pipe.vae.encode(x.to(pipe.device, next(pipe.vae.parameters()).dtype))
    return pipe.vae.scaling_factor * torch.cat([q.sample(g) for g in generators])

@torch.inference_mode()
def generate(pipe, prompt, negative_prompt="", steps=25, guidance=7.5, sampler="dpmpp", seed=0, num_images=1,
             height=None, width=None, init_image=None, strength=0.8, mask_image=None, latents=None, progress=True,
             frames=None, tile=False, last=False):
    """Draw num_images pictures for a prompt (str), or for each of several (list of str) -> list of PIL pictures.
    Picture k is drawn with seed + k, by a random generator of its own on the CPU: the same alone, in a batch, on any
    device. height, width: in pixels; by default the model's, or init_image's if not far larger. init_image (PIL): start
    from it, strength in (0, 1] of the way back to noise. mask_image (PIL): white is redrawn, black kept. latents (B, 4,
    h, w): the noise to start from. frames: a list, gets each step's guess of the first few finished latents. tile:
    decode in tiles. last: let go of text encoder and U-Net once they are done. Raises BadInput."""
    prompts = [p for p in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(num_images)]
    schedule, f, config = pipe.schedule, pipe.vae.f, pipe.unet.config
    inpainting_model = config["in_channels"] == 9                  # one that sees mask and surroundings as inputs
    for flag, value, low, high in (
            ("steps", steps, 1, schedule.T), ("num-images", num_images, 1, 10 ** 5), ("seed", seed, 0, 10 ** 15),
            ("guidance", guidance, -99, 99), ("strength", strength, 1e-6, 1)):
        if not low <= value <= high:
            raise BadInput(f"--{flag} {value} is not between {low} and {high}")
    init_image = init_image and init_image.convert("RGB")
    if mask_image is not None and init_image is None or inpainting_model and mask_image is None:
        raise BadInput("--mask and --init-image go together, and an inpainting model needs both")
    mask_image = mask_image and mask_image.convert("L").point(lambda v: 255 * (v > 127))    # nothing between the two
    texts = list(dict.fromkeys((negative_prompt, *prompts)))       # each once
    for lost in filter(None, (cut_off(pipe.tokenizer, text) for text in texts)):
        warnings.warn(f"the prompt is too long, its end is cut off: {lost!r}", stacklevel=3)
    # How large? Drawn at the next multiple of f, the init image's edges repeated; then cropped, pasted at `finished`.
    native = (config["sample_size"] or 64) * f
    own = (width or native, height or native) if init_image is None else init_image.size
    if mask_image is not None and not 0.98 < own[0] * mask_image.height / (own[1] * mask_image.width) < 1.02:
        raise BadInput(f"--mask is {mask_image.size}, --init-image {own}: they should have the same shape")
    shrink = native / (own[0] * own[1]) ** 0.5                     # far beyond its size, a model draws everything twice
    scale = height / own[1] if height else width / own[0] if width else shrink if shrink < 0.6 else 1.0
    paste = mask_image is not None and not inpainting_model        # the result goes into the init image,
    finished = own if height is None and width is None else None   # at its own size unless another was asked for
    height, width = (round(n * scale) if side is None else side for n, side in ((own[1], height), (own[0], width)))
    if not f <= min(height, width) <= max(height, width) <= 2 ** 14:
        raise BadInput(f"--width {width} x --height {height}: each takes {f} to {2 ** 14} pixels")
    _, h, w = shape = config["out_channels"], -(-height // f), -(-width // f)
    left, top = (w * f - width) // 2, (h * f - height) // 2
    assert latents is None or latents.shape == (len(prompts), *shape), f"{tuple(latents.shape)} should be B, {shape}"
    def pixels(image):                                             # PIL -> (1, 3, h*f, w*f) in [-1, 1]
        edges = (left, w * f - width - left, top, h * f - height - top)
        return F.pad(picture_to_tensor(image, height, width), edges, mode="replicate")
    init = None if init_image is None else pixels(init_image)
    if mask_image is not None:
        redrawn = (pixels(mask_image)[:, :1] > 0).float().to(pipe.device)           # (1, 1, h*f, w*f), 1 is redrawn
        # Inpainting models were trained with every f-th pixel's mask. For others, a latent is redrawn if any pixel is.
        mask = F.interpolate(redrawn, (h, w)) if inpainting_model else F.max_pool2d(redrawn, f)     # (1, 1, h, w)
    times = schedule.timesteps(steps, sampler, 1.0 if init is None else strength)
    drawn, few = [], max(1, 4 * 64 * 64 // (h * w))                # so many at once: four of Stable Diffusion's
    states = {text: encode_prompts(pipe, [text])[0] for text in texts}              # what to draw, what not: (T, D)
    pipe.text_encoder = None if last else pipe.text_encoder
    bar = tqdm(total=-(-len(prompts) // few) * len(times), desc="drawing", unit="step", disable=not progress)
    for first in range(0, len(prompts), few):
        batch = prompts[first: first + few]                        # guidance moves away from the negative prompt
        context = torch.stack([states[text] for text in [negative_prompt] * len(batch) * (guidance != 1) + batch])
        generators = [torch.Generator().manual_seed(seed + first + k) for k in range(len(batch))]
        def randn(_=None):
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(pipe.device)
        # Where to start: from noise, or from a picture with as much noise as the first step expects.
        start = init is not None and not (inpainting_model and strength == 1)
        known, seen = encode_picture(pipe, init, generators) if start else None, None
        z = randn() if latents is None else latents[first: first + few].to(pipe.device).float()
        z = schedule.q_sample(known, times[0][0], z) if start else z
        if inpainting_model:
            around = encode_picture(pipe, init * (redrawn.cpu() < 0.5), generators)
            seen = torch.cat([mask.expand(len(generators), -1, -1, -1), around], dim=1)  # (B, 5, h, w)
        model = guided(pipe.unet, context, guidance, seen)
        model = pin(schedule, model, known, mask) if paste else model
        for z, x0 in SAMPLERS[sampler](schedule, model, z, times, randn=randn):
            bar.update()
            if frames is not None and first == 0: frames.append(x0)
        drawn.append(z)
    model, pipe.unet = None, None if last else pipe.unet           # model holds the U-Net, too
    pictures = [p.crop((left, top, left + width, top + height)) for z in drawn for p in decode(pipe, z, tile)]
    if paste:                                                      # what is kept is kept to the pixel, with a soft seam
        size = finished or (width, height)
        original, white = (ImageOps.fit(p, size, Image.Resampling.LANCZOS) for p in (init_image, mask_image))
        # The seam: a third, two thirds, then all of what was redrawn. A wider one would swallow thin strokes.
        once, twice = (white.filter(ImageFilter.MinFilter(n)) for n in (3, 5))      # without its edge, and once more
        soft = Image.blend(Image.blend(white, once, 1 / 2), twice, 1 / 3)
        pictures = [Image.composite(p.resize(size, Image.Resampling.LANCZOS), original, soft) for p in pictures]
    return pictures

# ---- The command line ------------------------------------------------------------------------------------------------
def main(args):
    """Draw what the command line (parse_args) asks for, and say where the pictures are."""
    with blame("--device"): device, dtype = pick_device(args.device, args.dtype)
    with blame("--init-image"): init = open_picture(args.init_image) if args.init_image else None
    with blame("--mask"): mask = open_picture(args.mask, "black") if args.mask else None
    (folder, name), (stem, ext) = os.path.split(args.output), os.path.splitext(os.path.basename(args.output))
    with blame(f"--output {args.output}: it takes a folder to write to and a name that ends like .png"):
        Image.new("RGB", (8, 8)).save(io.BytesIO(), Image.registered_extensions()[ext.lower()])     # can it be written?
        assert ext.lower() != ".gif" and os.access(folder or ".", os.W_OK | os.X_OK) and not os.path.isdir(args.output)
    if not args.model:                                             # what was trained here, or what comes with this file
        settle("out")
        box = os.path.relpath(pathlib.Path(__file__).resolve().parent / "assets" / "model")
        args.model = "out" if os.path.isdir("out/unet") or not os.path.isdir(box) else box
    pipe = load_pipeline(args.model, device, dtype, args.tokenizer, prediction_type=args.prediction_type)
    args.guidance = pipe.guidance if args.guidance is None else args.guidance
    if args.compile: pipe.unet.compile()
    pictures = generate(pipe, args.prompts, args.negative, args.steps, args.guidance, args.sampler, args.seed,
                        args.num_images, args.height, args.width, init, args.strength, mask, tile=args.tile, last=True,
                        frames=(frames := []))                     # what each step foresaw of the first few pictures
    names = [name, *(f"{stem}-{k}{ext}" for k in range(len(pictures)) if len(pictures) > 1)]
    gif = [grid([ImageOps.fit(p, pictures[0].size) for p in decode(pipe, z, args.tile)]) for z in frames if args.gif]
    with blame(f"--output {args.output}"), tempfile.TemporaryDirectory(dir=folder or ".", prefix=".writing-") as to:
        grid(pictures).save(os.path.join(to, name))
        for k, (each, picture) in enumerate(zip(names[-len(pictures):], pictures)):
            info = PngImagePlugin.PngInfo()
            info.add_itxt("parameters", plain(write_parameters(args, k, picture.size)))
            picture.save(os.path.join(to, each), pnginfo=info)     # formats other than PNG pass over it
        if gif:
            gif[0].save(f"{to}/{stem}.gif", save_all=True, append_images=gif[1:] + gif[-1:] * 10, duration=100, loop=0)
        names += [f"{stem}.gif"] * args.gif
        for each in names: assert not os.path.isdir(os.path.join(folder, each)), f"{plain(each)} is a folder"
        for each in names:                                         # whole, or not at all
            os.replace(os.path.join(to, each), os.path.join(folder, each))
    print(f"sample.py: drawn by the model in {plain(args.model)}", file=sys.stderr)
    print("\n".join(plain(os.path.join(folder, name)) for name in names))

if __name__ == "__main__":
    run(main, ARGS)
