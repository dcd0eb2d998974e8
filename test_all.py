"""Every test of nanoSD. Needs pytest and diffusers beside what requirements.txt lists.

    python test_all.py                      all of them
    python test_all.py -k samplers          those with a word in their name
    python test_all.py --bench              no tests: how fast is it here? (--compile: compiled)

Tests check mathematics, or compare with what others wrote (diffusers, transformers, PyTorch). First
come helpers and fixtures, then published formats, then the files in their reading order.
"""
import contextlib
import functools
import io
import itertools
import json
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "data"))

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers.loaders import single_file_utils
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence

import clip_encoder
import landscapes
import sample
import train
import unet
import vae
from clip_encoder import CLIP, CLIPTextEncoder, contrastive_loss, tokenize, train_tokenizer
from ddpm import SAMPLERS, NoiseSchedule, diffusion_loss
from sample import PARTS, generate, load_pipeline, picture_to_tensor, save_pipeline
from train import ImageFolder, Muon, learning_rate, update_ema
from unet import UNet
from vae import VAE, DiagonalGaussian, vae_loss

pytestmark = pytest.mark.filterwarnings(                           # other people's warnings
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Detected pickle protocol")

# ---- Helpers: published configs, and narrow ones -------------------------------------------------

UNET_15 = dict(
    act_fn="silu", attention_head_dim=8, block_out_channels=[320, 640, 1280, 1280], freq_shift=0,
    center_input_sample=False, cross_attention_dim=768, flip_sin_to_cos=True, in_channels=4,
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], downsample_padding=1,
    layers_per_block=2, mid_block_scale_factor=1, norm_eps=1e-5, norm_num_groups=32,
    out_channels=4, sample_size=64, up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
UNET_21 = dict(
    UNET_15, attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, sample_size=96,
    dual_cross_attention=False, num_class_embeds=None, only_cross_attention=False,
    upcast_attention=True, use_linear_projection=True)
UNET_INPAINTING = dict(UNET_15, in_channels=9)
UNET_INPAINTING_2 = dict(UNET_21, in_channels=9, sample_size=64)
VAE_15 = dict(
    act_fn="silu", block_out_channels=[128, 256, 512, 512], in_channels=3, latent_channels=4,
    down_block_types=["DownEncoderBlock2D"] * 4, layers_per_block=2, norm_num_groups=32,
    up_block_types=["UpDecoderBlock2D"] * 4, out_channels=3, sample_size=512)
TEXT_15 = dict(
    architectures=["CLIPTextModel"], bos_token_id=0, eos_token_id=2, pad_token_id=1, dropout=0.0,
    hidden_act="quick_gelu", hidden_size=768, intermediate_size=3072, layer_norm_eps=1e-5,
    max_position_embeddings=77, model_type="clip_text_model", num_attention_heads=12,
    num_hidden_layers=12, projection_dim=768, torch_dtype="float32", vocab_size=49408)
TEXT_21 = dict(
    TEXT_15, hidden_act="gelu", hidden_size=1024, intermediate_size=4096, num_attention_heads=16,
    num_hidden_layers=23, projection_dim=512)
SCHEDULER_15 = dict(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000,
    steps_offset=1, set_alpha_to_one=False, skip_prk_steps=True, trained_betas=None,
    clip_sample=False, _class_name="PNDMScheduler", _diffusers_version="0.6.0")
SCHEDULER_21 = dict(SCHEDULER_15, _class_name="DDIMScheduler", prediction_type="v_prediction")
PUBLISHED = dict(vae=VAE_15, clip=TEXT_15, unet=UNET_15, schedule={})
OURS = dict(vae=VAE, clip=CLIPTextEncoder, unet=UNet, schedule=NoiseSchedule)

NARROW_TEXT = dict(intermediate_size=48, num_attention_heads=2, num_hidden_layers=2, vocab_size=560)
NARROW_1 = dict(
    unet=dict(block_out_channels=[32, 32, 64, 64], cross_attention_dim=32, sample_size=8),
    vae=dict(block_out_channels=[32, 32, 32, 64]), text_encoder=dict(NARROW_TEXT, hidden_size=32))
NARROW_2 = dict(
    unet=dict(block_out_channels=[32, 64, 64, 64], cross_attention_dim=64, sample_size=8,
              attention_head_dim=[1, 2, 2, 2]),
    vae=NARROW_1["vae"], text_encoder=dict(NARROW_TEXT, hidden_size=64))
KINDS = {                                                          # configs, and how to narrow them
    "Stable Diffusion 1": (UNET_15, TEXT_15, SCHEDULER_15, NARROW_1),
    "Stable Diffusion 1 inpainting": (UNET_INPAINTING, TEXT_15, SCHEDULER_15, NARROW_1),
    "Stable Diffusion 2": (UNET_21, TEXT_21, SCHEDULER_21, NARROW_2),
    "Stable Diffusion 2 inpainting": (UNET_INPAINTING_2, TEXT_21, SCHEDULER_15, NARROW_2)}
SD1, SD1_INPAINTING, SD2, SD2_INPAINTING = KINDS

SMALL_UNET = dict(
    block_out_channels=[16, 24, 32], cross_attention_dim=24, norm_num_groups=8, sample_size=16,
    down_block_types=["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"], layers_per_block=1,
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2, attention_head_dim=4)
SMALL_VAE = dict(
    block_out_channels=[8, 12, 16], down_block_types=["DownEncoderBlock2D"] * 3, norm_num_groups=4,
    up_block_types=["UpDecoderBlock2D"] * 3, layers_per_block=1, scaling_factor=0.9)
SMALL_TEXT = dict(
    TEXT_15, hidden_size=24, intermediate_size=40, num_attention_heads=3, num_hidden_layers=2,
    vocab_size=600, max_position_embeddings=20, bos_token_id=598, eos_token_id=599)
SMALL_VISION = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, patch_size=4,
                    num_attention_heads=4, image_size=16)
BETAS = ["linear", "scaled_linear", "squaredcos_cap_v2"]
SPACINGS = [None, "leading", "trailing", "linspace"]
SCHEDULERS = dict(ddpm=diffusers.DDPMScheduler, ddim=diffusers.DDIMScheduler,
                  dpmpp=diffusers.DPMSolverMultistepScheduler)
WEIGHTS = "diffusion_pytorch_model.safetensors"
copy = shutil.copytree
WORDY = PngImagePlugin.PngInfo()                                   # more than Pillow reads
WORDY.add_text("words", "x" * 2**21, zip=True)

# ---- Helpers: weights ----------------------------------------------------------------------------

def theirs_of(room, config):
    """The model that diffusers or transformers makes from a config."""
    if room == "vae":
        return diffusers.AutoencoderKL.from_config(config)
    if room == "clip":
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    return diffusers.UNet2DConditionModel.from_config(config)

def shake(module, seed=0):
    """Random weights everywhere, also where a new model starts at zero and would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.5 * noise / parameter[0].numel() ** 0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.1 * noise)
    return module.eval()

def relative(a, b):
    """The largest difference, as a part of the largest value of b."""
    return ((a - b).abs().max() / b.abs().max()).item()

def shapes(module):
    """{name: shape} of all weights."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}

def epsilons(module):
    """{name: eps} of all normalization layers."""
    parts = module.named_modules()
    return {name + ".eps": part.eps for name, part in parts if hasattr(part, "eps")}

def equal(a, b):
    """Whether nested dicts and lists with tensors are the same to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b

def same_weights(a, b):
    """Whether two pipelines have the same weights."""
    return all(equal(getattr(a, part).state_dict(), getattr(b, part).state_dict())
               for part in PARTS)

def rename(state, rules):
    """{name: tensor}, each name changed by regular expressions, one after the other."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed

def original_unet(state):
    """Weights under diffusers' names -> those of the original release. So do the next two."""
    entries = 1 + max(int(name.split(".")[3]) for name in state if "up_blocks.0.res" in name)

    def entry(match):
        side, level, kind, index = match[1], int(match[2]), match[3], int(match[4])
        first = entries * level
        if kind == "downsamplers":
            return f"input_blocks.{first + entries}.0.op"
        if kind == "upsamplers":
            attends = f"up_blocks.{level}.attentions.0.norm.weight" in state
            return f"output_blocks.{first + entries - 1}.{2 if attends else 1}.conv"
        part = 1 if kind == "attentions" else 0
        if side == "down":
            return f"input_blocks.{first + index + 1}.{part}"      # entry 0 is conv_in
        return f"output_blocks.{first + index}.{part}"

    resnet = r"(put_blocks\.\d+\.0|middle_block\.[02])"
    return rename(state, [
        (r"^(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)((?<=samplers\.0)\.conv)?", entry),
        (r"^mid_block\.resnets\.0", "middle_block.0"), (r"^mid_block\.att\w+\.0", "middle_block.1"),
        (r"^mid_block\.resnets\.1", "middle_block.2"),
        (resnet + r"\.norm1", r"\1.in_layers.0"), (resnet + r"\.norm2", r"\1.out_layers.0"),
        (resnet + r"\.conv1", r"\1.in_layers.2"), (resnet + r"\.conv2", r"\1.out_layers.3"),
        (r"\.time_emb_proj", r".emb_layers.1"), (r"\.conv_shortcut", r".skip_connection"),
        ("^time_embedding.linear_1", "time_embed.0"), ("^time_embedding.linear_2", "time_embed.2"),
        (r"^conv_in", "input_blocks.0.0"), (r"^conv_norm_out", "out.0"), (r"^conv_out", "out.2")])

def original_vae(state):
    coarsest = max(int(name.split(".")[2]) for name in state if ".up_blocks." in name)
    renamed = rename(state, [
        (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0", "mid.attn_1"), ("down_blocks", "down"),
        (r"up_blocks\.(\d+)", lambda match: f"up.{coarsest - int(match[1])}"),
        ("resnets", "block"), (r"(down|up)samplers\.0", r"\1sample"), ("group_norm", "norm"),
        (r"attn_1\.to_([qkv])", r"attn_1.\1"), (r"to_out\.0", "proj_out"),
        ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out")])
    for name, tensor in renamed.items():
        if "attn_1" in name and tensor.dim() == 2:
            renamed[name] = tensor[:, :, None, None]               # a 1x1 convolution there
    return renamed

def original_text(state, open_clip):
    if not open_clip:
        return {"transformer." + name: tensor for name, tensor in state.items()}
    fused = {}
    for name, tensor in state.items():
        if ".q_proj." in name:                                     # q, k and v in one matrix
            parts = [state[name.replace("q_proj", letter + "_proj")] for letter in "qkv"]
            fused[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            fused[name] = tensor
    return rename(fused, [
        (r"^text_model\.", "model."), (r"encoder\.layers", "transformer.resblocks"),
        ("self_attn", "attn"), ("layer_norm([12])", r"ln_\1"), ("final_layer_norm", "ln_final"),
        (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"),
        (r"embeddings\.token_embedding", "token_embedding"),
        (r"embeddings\.position_embedding\.weight", "positional_embedding")])

def single_file_state(pipe):
    """A pipeline's weights under the original release's names, and what else is in such files."""
    open_clip = pipe.text_encoder.config["hidden_act"] == "gelu"
    parts = {
        "model.diffusion_model.": original_unet(pipe.unet.state_dict()),
        "first_stage_model.": original_vae(pipe.vae.state_dict()),
        "cond_stage_model.": original_text(pipe.text_encoder.state_dict(), open_clip)}
    state = {prefix + name: tensor for prefix in parts for name, tensor in parts[prefix].items()}
    further = dict.fromkeys(["alphas_cumprod", "model_ema.input_blocks00weight"], torch.ones(9))
    if open_clip:                                                  # it has one layer more
        layer = "cond_stage_model.model.transformer.resblocks.2."
        further[layer + "attn.in_proj_weight"] = torch.ones(192, 64)
        further["cond_stage_model.model.text_projection"] = torch.ones(64, 64)
    else:
        ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
        further[ids] = torch.arange(77)[None]
    return state | further

class ModelCheckpoint:
    """Stands for the class of this name that Lightning leaves in its checkpoints."""

def write_single_file(state, path, form):
    """The forms in which single files go about."""
    if form == "safetensors":
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    elif form == "flat":
        torch.save(state, path)
    elif form == "nested":
        state = dict(state_dict=state, base_lrs=[np.float64(1e-4)], seen=set("a"))
        torch.save(state, path, pickle_protocol=4)
    else:
        callbacks = {ModelCheckpoint: dict(best=np.float64(0.1), model=ModelCheckpoint())}
        state = dict(state_dict=state, callbacks=callbacks)
        torch.save(state, path, _use_new_zipfile_serialization=False)
        data = path.read_bytes().replace(b"numpy._core", b"numpy.core")    # as older numpy wrote it
        lightning = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint"
        path.write_bytes(data.replace(f"c{__name__}\nModelCheckpoint".encode(), lightning))

# ---- Helpers: pipelines, pictures, files ---------------------------------------------------------

def few_words(max_length=20):
    captions = ["a red house on a green hill", "a blue boat in the fog"] * 5
    return train_tokenizer(captions, 560, max_length)

def heed_the_text(unet):
    """Make pictures depend on the U-Net, and on what it reads, more than at random."""
    unet.conv_out.weight.data *= 4
    for name, parameter in unet.named_parameters():
        if "attn2" in name:
            parameter.data *= 2
    return unet

def small_pipeline(unet={}, vae={}, **schedule):
    """A narrow model with random weights and its own tokenizer."""
    tokenizer = few_words()
    text = dict(SMALL_TEXT, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    return sample.Pipeline(
        unet=heed_the_text(shake(UNet.from_config({**SMALL_UNET, **unet}), 1)),
        vae=shake(VAE.from_config({**SMALL_VAE, **vae}), 2),
        text_encoder=shake(CLIPTextEncoder.from_config(text), 3),
        tokenizer=tokenizer, schedule=NoiseSchedule(**schedule))

def draw(pipe, prompt="fog", **settings):
    return generate(pipe, prompt, progress=False, **{"steps": 3, **settings})

def draw_theirs(folder, sampler, prompt, kind="", seeds=[0], **settings):
    """Pictures that diffusers draws. kind: "", "Img2Img" or "Inpaint"."""
    pipe = getattr(diffusers, f"StableDiffusion{kind}Pipeline").from_pretrained(folder)
    pipe.scheduler = SCHEDULERS[sampler].from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompt, generator=generators, **settings).images

def pixels(picture):
    return np.asarray(picture).astype(int)

def decibel(a, b):
    """Peak signal-to-noise ratio between two lists of PIL pictures."""
    assert len(a) == len(b)
    error = np.stack([pixels(x) - pixels(y) for x, y in zip(a, b)])
    return 10 * np.log10(255**2 / max((error**2).mean(), 1e-9))

def photo(width=64, height=64, seed=0):
    """A picture with large shapes, fine grain and no symmetry."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8))
    coarse = coarse.resize((width, height), Image.Resampling.BICUBIC)
    return Image.fromarray(np.uint8(0.8 * pixels(coarse) + rng.integers(0, 50, (height, width, 3))))

def white_in(*box):
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, box)
    return mask

def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

def files_under(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}

@contextlib.contextmanager
def disk_full_after(size):
    """While it is open, no file can grow beyond so many bytes."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))

def python(*arguments, cwd, **env):
    """Run Python in a process of its own. env adds variables, or with "" removes them."""
    env = {name: value for name, value in {**os.environ, **env}.items() if value}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True)

# ---- Helpers: command lines, training ------------------------------------------------------------

TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
MINI = dict(
    train.PRESETS["tiny"], vae_steps=1500, clip_steps=375, unet_steps=1000,
    vae=dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4),
    vocab_size=600, text=TOWER, vision=dict(TOWER, image_size=32, patch_size=8), projection_dim=16,
    unet=dict(block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=2,
              down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=4))
train.PRESETS["mini"] = MINI
STEPS = dict(vae=12, clip=3, unet=8)                               # of --stage all --steps 8

def call(module, *arguments):
    """Run a script in this process, on an old console -> (status, what it printed, its errors)."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "cp1252", write_through=True) for _ in range(2))
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        try:
            if module is landscapes:
                landscapes.main()
            else:
                sample.run_command(module.main, module.parse_args())
        except SystemExit as end:
            status = end.code
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return status, out.buffer.getvalue().decode("cp1252"), err.buffer.getvalue().decode("cp1252")

def draw_landscapes(folder, arguments):
    """Run data/landscapes.py -> the lines of metadata.jsonl."""
    status, _, err = call(landscapes, "--out", folder, *arguments.split())
    assert status == 0, err
    return list(map(json.loads, (folder / "metadata.jsonl").read_text("utf-8").splitlines()))

def save_picture(path, color="red", size=(20, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)

def save_clip(folder, trained):
    """A CLIP as transformers saves it, with the tokenizer of `trained` -> its text weights."""
    torch.manual_seed(0)
    config = json.loads((trained / "train_state/clip/config.json").read_text())
    clip = transformers.CLIPModel(transformers.CLIPConfig(**config))
    clip.save_pretrained(folder)
    load_pipeline(trained).tokenizer.save_pretrained(folder)
    return clip.text_model.state_dict()

def read_state(out, stage):
    return torch.load(out / "train_state" / f"{stage}.pt", weights_only=True)

def contents(folder, endings=("",)):
    """{path: bytes} of the files below a folder whose names end like this."""
    names = [name for name in files_under(folder) if name.endswith(endings)]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}

def weights(out):
    """{path: bytes} of a model's weights, configs and tokenizer."""
    return contents(out, (".safetensors", "/config.json", "index.json", "vocab.json", ".txt"))

def assert_same_run(a, b):
    """The same model and the same states in two folders, bit for bit."""
    assert weights(a) == weights(b) and len(weights(a)) > 8
    for stage in STEPS:
        assert equal(read_state(a, stage), read_state(b, stage)), stage

def spy(monkeypatch, owner, name, before=lambda *_, **__: None):
    """A list that receives what owner.name returns. `before` gets what it is called with."""
    original, returned = getattr(owner, name), []
    def spied(*args, **kwargs):
        before(*args, **kwargs)
        returned.append(original(*args, **kwargs))
        return returned[-1]
    monkeypatch.setattr(owner, name, spied)
    return returned

# ---- Fixtures ------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A narrow pipeline as a folder."""
    folder = tmp_path_factory.mktemp("models") / "small"
    save_pipeline(small_pipeline(), folder)
    return folder

@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """{kind: folder}: written by diffusers, with the published configs, only narrow."""
    folders = {}
    for kind, (unet, text, scheduler, narrow) in KINDS.items():
        folders[kind] = folder = tmp_path_factory.mktemp("published") / kind.replace(" ", "-")
        cls = diffusers.StableDiffusionPipeline
        if unet["in_channels"] == 9:
            cls = diffusers.StableDiffusionInpaintPipeline
        cls(
            unet=heed_the_text(shake(theirs_of("unet", unet | narrow["unet"]), 1)),
            vae=shake(theirs_of("vae", VAE_15 | narrow["vae"]), 2),
            text_encoder=shake(theirs_of("clip", text | narrow["text_encoder"]), 3),
            tokenizer=few_words(77), scheduler=diffusers.DDIMScheduler.from_config(scheduler),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(folder)
        change_json(folder / "unet/config.json", sample_size=8)
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    return folders

@pytest.fixture
def narrow_single_files(monkeypatch):
    """Make sample.SINGLE_FILE_CONFIGS as narrow as the folders in `published`."""
    configs = {}
    for kind, wide in sample.SINGLE_FILE_CONFIGS.items():
        narrow = KINDS[kind][3]
        configs[kind] = wide | {part: {**wide[part], **narrow[part]} for part in narrow}
    monkeypatch.setattr(sample, "SINGLE_FILE_CONFIGS", configs)

@pytest.fixture
def hub(monkeypatch, tmp_path):
    """huggingface_hub's two functions, over local folders. Notes which files are asked for."""
    hub = SimpleNamespace(repositories={}, online=True, asked=[])

    def model_info(name):
        if not hub.online or name not in hub.repositories:
            raise OSError("404, or no network")
        files = files_under(hub.repositories[name])
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

    def snapshot_download(name, allow_patterns=None, local_files_only=False):
        target = tmp_path / "cache" / name.replace("/", "--")
        if local_files_only and not target.is_dir():
            raise FileNotFoundError("not in the cache")
        for file in [] if local_files_only else allow_patterns:
            hub.asked.append(file)
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub.repositories[name] / file, target / file)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return hub

@pytest.fixture
def command(monkeypatch, tmp_path, small):
    """command(*arguments): `python sample.py` in tmp_path -> (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    def command(*arguments):
        defaults = [("--model", small), ("--device", "cpu"), ("--dtype", "float32")]
        missing = [pair for pair in defaults if pair[0] not in arguments]
        return call(sample, *arguments, *itertools.chain(*missing))
    return command

@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """120 landscapes of 32 pixels: 114 to train on, 6 to validate by."""
    folder = tmp_path_factory.mktemp("data") / "landscapes"
    draw_landscapes(folder, "--size 32 --count 120 --workers 1")
    return folder

@pytest.fixture(scope="session")
def flags(pictures):
    return ["--data", pictures, *"--preset mini --image-size 32 --batch-size 8 --dtype float32 "
            "--device cpu --workers 0 --save-every 1000 --sample-every 1000".split()]

@pytest.fixture(scope="session")
def attempt(flags):
    """attempt(out, flags): `python train.py` -> (status, what it printed, the error's line)."""
    def attempt(out, more):
        status, printed, err = call(train, "--out", out, *flags, *more.split())
        return status, printed, err.rpartition("train.py: ")[2].partition("\n")[0]
    return attempt

@pytest.fixture(scope="session")
def learn(attempt):
    """learn(stage, out, flags): the same for a run that must go well -> what it printed."""
    def learn(stage, out, more):
        status, printed, message = attempt(out, f"--stage {stage} {more}")
        assert status == 0, message
        return printed
    return learn

@pytest.fixture(scope="session")
def trained(tmp_path_factory, learn):
    """A folder with a model of all three stages, and their states. Not to be changed."""
    out = tmp_path_factory.mktemp("trained") / "out"
    learn("all", out, "--steps 8")
    return out

@pytest.fixture
def begin(trained, tmp_path, monkeypatch):
    """begin(stage, name): a folder with what a stage needs. And no samples are drawn: too slow."""
    monkeypatch.setattr(train, "generate", lambda *_, **__: [Image.new("RGB", (32, 32))])
    def begin(stage="all", name="out"):
        if stage == "unet":
            copy(trained, tmp_path / name, ignore=shutil.ignore_patterns("unet*", "log-unet*"))
        return tmp_path / name
    return begin

# ---- Published formats, and what several rooms compute -------------------------------------------

@pytest.mark.parametrize("room, config", [
    ("vae", VAE_15), ("vae", {}), ("clip", TEXT_15), ("clip", TEXT_21), ("clip", {}),
    ("unet", UNET_15), ("unet", UNET_21), ("unet", UNET_INPAINTING), ("unet", {})])
def test_names_and_shapes_are_the_published_ones(room, config):
    """An empty config means diffusers' and transformers' defaults."""
    with torch.device("meta"):
        ours, theirs = OURS[room].from_config(config), theirs_of(room, config)
        if config is PUBLISHED[room]:
            assert shapes(OURS[room]()) == shapes(ours)            # Stable Diffusion 1.5
    # transformers from 5.6 on leaves text_model out. Every published file has it.
    change = clip_encoder.rename_published if room == "clip" else dict
    assert shapes(ours) == change(shapes(theirs))
    assert epsilons(ours) == change(epsilons(theirs))
    if room == "vae":
        assert ours.scaling_factor == theirs.config.scaling_factor == 0.18215

REFUSED = dict(
    vae=dict(act_fn="relu", mid_block_add_attention=None, shift_factor=0.1, latents_mean=[0.0] * 4,
             scaling_factor=None,
             down_block_types=["AttnDownEncoderBlock2D"] * 4, up_block_types=["UpBlock2D"] * 4),
    clip=dict(hidden_act="relu", model_type="t5", hidden_size=None),
    schedule=dict(prediction_type="sample", timestep_spacing="log", beta_schedule="sigmoid",
                  trained_betas=[0.1] * 1000, thresholding=True, beta_end=1.5, beta_start=None,
                  _class_name="FlowMatchEulerDiscreteScheduler", use_flow_sigmas=True),
    unet=dict(act_fn="mish", addition_embed_type="text", class_embed_type="timestep", freq_shift=1,
              num_attention_heads=8, flip_sin_to_cos=False, attention_head_dim=[5, 10],
              mid_block_type="UNetMidBlock2D", norm_num_groups=None, conv_in_kernel=None,
              down_block_types=["ResnetDownsampleBlock2D"] * 4, transformer_layers_per_block=[1, 2],
              up_block_types=["CrossAttnUpBlock2D"] * 4))

@pytest.mark.parametrize("room, key", [(room, key) for room in REFUSED for key in REFUSED[room]])
def test_config_that_asks_for_something_else_is_refused_by_its_key(room, key):
    with pytest.raises(ValueError, match=key):
        OURS[room].from_config({**PUBLISHED[room], key: REFUSED[room][key]})

def formula(q, k, v):
    """What F.scaled_dot_product_attention computes, in the type that it is given."""
    return (q @ k.transpose(-2, -1) / q.size(-1) ** 0.5).softmax(dim=-1) @ v

@pytest.mark.parametrize("room", ["vae", "unet"])
def test_attention_equals_the_formula(room, monkeypatch):
    torch.manual_seed(0)
    layer, x = shake(vae.Attention(12, groups=4)), torch.randn(2, 12, 3, 5)
    if room == "unet":
        layer, x = shake(unet.Attention(12, 12, heads=3, upcast=False)), torch.randn(2, 7, 12)
    expected = layer(x)
    monkeypatch.setattr(F, "scaled_dot_product_attention", formula)
    assert torch.allclose(layer(x), expected, atol=1e-5)

# ---- vae.py --------------------------------------------------------------------------------------

@pytest.mark.parametrize("extra", [
    dict(), dict(use_quant_conv=False, use_post_quant_conv=False, latent_channels=3)])
def test_vae_equals_diffusers(extra):
    torch.manual_seed(0)
    theirs = shake(theirs_of("vae", dict(SMALL_VAE, **extra)))
    ours = VAE.from_config(dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 12, 20) * 2 - 1
    p, q = theirs.encode(x).latent_dist, ours.encode(x)
    for a, b in ((q.mode(), p.mode()), (q.logvar, p.logvar), (q.kl(), p.kl())):
        assert relative(a, b) < 1e-5
    assert relative(ours.decode(q.mean), theirs.decode(p.mean).sample) < 1e-5
    again = theirs_of("vae", ours.to_config())
    assert shapes(again) == shapes(ours) and again.config.scaling_factor == 0.9

def test_vae_sample_is_mean_plus_sigma_times_noise_and_its_gradient_too():
    moments = torch.randn(3, 8, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    noise = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(5))
    q = DiagonalGaussian(moments)
    assert torch.equal(q.sample(noise=noise), q.sample(torch.Generator().manual_seed(5)))
    by_mean, by_logvar = torch.autograd.grad(q.sample(noise=noise).sum(), moments)[0].chunk(2, 1)
    assert torch.allclose(by_mean, torch.ones(3, 4, 2, 2))
    assert torch.allclose(by_logvar, noise * (moments[:, 4:] / 2).exp() / 2, atol=1e-6)

@pytest.mark.parametrize("logvar", [-1e4, 1e4])
def test_vae_log_variance_is_clamped(logvar):
    moments = torch.cat([torch.zeros(1, 4, 2, 2), torch.full((1, 4, 2, 2), logvar)], dim=1)
    q = DiagonalGaussian(moments.half())
    assert q.sample(torch.Generator().manual_seed(0)).isfinite().all()
    assert q.mean.dtype == torch.float32 and q.kl().item() < 1e10
    assert -30 <= q.logvar.min() and q.logvar.max() <= 20

def test_vae_negative_elbo_is_squared_error_plus_weighted_kl():
    torch.manual_seed(0)
    model = shake(VAE.from_config(SMALL_VAE))
    x, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 4, 4)
    loss, mse, kl = vae_loss(model, x, noise, kl_weight=0.5)
    q = model.encode(x)
    error = model.decode(q.sample(noise=noise)) - x
    nats = kl_divergence(Normal(q.mean, (q.logvar / 2).exp()), Normal(0.0, 1.0))
    assert mse.item() == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert kl.item() == pytest.approx(nats.mean().item(), rel=1e-4)
    assert loss.item() == pytest.approx(mse.item() + 0.5 * nats.sum().item() / x.numel(), rel=1e-5)

# ---- clip_encoder.py -----------------------------------------------------------------------------

NIGHTS = ["a starry night", "a lake at night", "a starry lake"] * 10

def test_tokenizer_knows_every_word_and_reads_back():
    tokenizer = train_tokenizer(NIGHTS, vocab_size=560, max_length=60)
    text = "zebra,\u00e9t\u00e9 \u043b\u0435\u0442\u043e \u6c99\u4e18 \U0001f389 #7!"
    row = tokenize(tokenizer, [text])[0].tolist()
    decoded = tokenizer.decode(row, skip_special_tokens=True)
    assert decoded.replace(" ", "") == text.replace(" ", "")
    texts = ["a starry night", "A Starry NIGHT", "night \udc80\udcff", "night ??"]
    ids = tokenize(tokenizer, texts)
    assert ids[0].tolist().index(tokenizer.eos_token_id) == 4      # each frequent word is one token
    assert torch.equal(ids[0], ids[1])
    assert torch.equal(ids[2], ids[3])                             # bytes that are no characters

def test_tokenizer_pads_and_cuts_to_max_length():
    tokenizer = train_tokenizer(NIGHTS, vocab_size=560, max_length=24)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert eos == bos + 1 == len(tokenizer) - 1                    # where CLIP's pooling looks
    night = tokenizer.convert_tokens_to_ids("night</w>")
    ids = tokenize(tokenizer, ["", "night " * 100])
    assert ids.tolist() == [[bos] + [eos] * 23, [bos] + [night] * 22 + [eos]]
    tokenizer.model_max_length = 10**30                            # where a folder does not say
    assert tokenize(tokenizer, ["night"]).shape == (1, 77)

@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_equals_transformers(activation):
    torch.manual_seed(0)
    text = dict(SMALL_TEXT, hidden_act=activation)
    config = transformers.CLIPConfig(text_config=text, vision_config=SMALL_VISION)
    theirs = shake(transformers.CLIPModel(config))
    theirs.logit_scale.data.fill_(1.7)
    ours = CLIP.from_config(config.to_dict()).eval()
    assert ours.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    ours.load_state_dict(clip_encoder.rename_published(theirs.state_dict()))
    x, ids = torch.rand(4, 3, 16, 16) * 2 - 1, torch.randint(0, 598, (4, 20))
    for row, end in enumerate((6, 19, 3, 11)):                     # pooled at the first end of text
        ids[row, end:] = 599
    mean = torch.tensor(transformers.utils.constants.OPENAI_CLIP_MEAN).view(3, 1, 1)
    std = torch.tensor(transformers.utils.constants.OPENAI_CLIP_STD).view(3, 1, 1)
    expected = theirs(input_ids=ids, pixel_values=((x + 1) / 2 - mean) / std, return_loss=True)
    images, texts, scale = ours(x, ids)
    loss, _ = contrastive_loss(images, texts, scale, ids)
    assert relative(images, expected.image_embeds) < 1e-4
    assert relative(texts, expected.text_embeds) < 1e-5
    assert relative(scale * images @ texts.T, expected.logits_per_image) < 1e-4
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
    for some in (ids, ids[:, :7]):
        states = theirs.text_model(some).last_hidden_state
        assert relative(ours.text_encoder()(some), states) < 1e-5
    again = transformers.CLIPModel(transformers.CLIPConfig(**ours.to_config()))
    assert shapes(again) == shapes(theirs) and again.text_model.config.hidden_act == activation
    with pytest.raises(ValueError, match="hidden_act"):
        CLIP(SMALL_TEXT, dict(SMALL_VISION, hidden_act="relu"))

def test_clip_identical_captions_do_not_compete():
    generator = torch.Generator().manual_seed(0)
    images, texts = F.normalize(torch.randn(2, 4, 6, generator=generator), dim=2)
    texts[1] = texts[0]
    ids = torch.tensor([[5, 1], [5, 1], [5, 2], [4, 1]])           # the first two are the same
    loss, _ = contrastive_loss(images, texts, torch.tensor(3.0), ids)
    terms = []
    for batch in ([0, 2, 3], [1, 2, 3], [2, 0, 1, 3], [3, 0, 1, 2]):               # its own first
        logits = 3 * images[batch] @ texts[batch].T
        terms += [-logits.log_softmax(dim=1)[0, 0], -logits.log_softmax(dim=0)[0, 0]]
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)

# ---- ddpm.py -------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_schedule_reads_x0_and_eps_from_the_prediction(kind):
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 5, 4, 3, 3)
    t = torch.tensor([0, 10, 400, 900, 999])
    schedule = NoiseSchedule(prediction_type=kind)
    v = diffusers.DDPMScheduler.from_config(schedule.to_config()).get_velocity(x0, noise, t)
    assert torch.allclose(schedule.velocity(x0, t, noise), v, atol=1e-5)
    x_t = schedule.q_sample(x0, t, noise)
    output = noise if kind == "epsilon" else v
    for i, time in ((slice(None), t), (2, 400)):                   # t as a tensor, and as an int
        back, eps = schedule.x0_and_eps(output[i], x_t[i], time)
        assert torch.allclose(back, x0[i], atol=2e-3) and torch.allclose(eps, noise[i], atol=1e-4)

@pytest.mark.parametrize("kind, more", [("epsilon", 0), ("v_prediction", 1)])
def test_schedule_min_snr_weighs_the_error_in_x0(kind, more):
    """Wrong by d in x_0: the loss is min(SNR, gamma) d^2, whatever the network predicts."""
    torch.manual_seed(0)
    schedule = NoiseSchedule(prediction_type=kind)
    x0, noise = torch.randn(2, 4, 2, 3, 3)
    t, d = torch.tensor([1, 300, 600, 950]), 0.3
    abar = schedule.alpha_bar[t].view(-1, 1, 1, 1)
    x_t = schedule.q_sample(x0, t, noise)
    output = (x_t - abar.sqrt() * (x0 + d)) / (1 - abar).sqrt()    # the noise that fits x0 + d
    if kind == "v_prediction":
        output = schedule.velocity(x0 + d, t, output)
    snr = (abar / (1 - abar)).flatten()
    weighted = diffusion_loss(schedule, output, x0, t, noise, min_snr=5.0)
    assert weighted.tolist() == pytest.approx((snr.clamp(max=5) * d**2).tolist(), rel=1e-2)
    simple = diffusion_loss(schedule, output, x0, t, noise)
    assert simple.tolist() == pytest.approx(((snr + more) * d**2).tolist(), rel=1e-2)

@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_schedule_and_timesteps_equal_diffusers(sampler, spacing):
    for kind, offset in itertools.product(BETAS, (0, 1)):
        config = dict(beta_start=0.00085, beta_end=0.012, beta_schedule=kind, steps_offset=offset,
                      rescale_betas_zero_snr=offset == 1)
        config |= dict(timestep_spacing=spacing) if spacing else {}
        ours = NoiseSchedule.from_config(config)
        theirs = SCHEDULERS[sampler].from_config(config)
        assert torch.allclose(ours.alpha_bar, theirs.alphas_cumprod, rtol=2e-3, atol=1e-6)
        for steps in (1, 7, 20, 25, 30, 48, 50, 96, 333):
            theirs.set_timesteps(steps)
            times = [t for t, _ in ours.timesteps(steps, sampler)]
            assert times == theirs.timesteps.tolist(), (kind, offset, steps)
        assert max(ours.timesteps(1000, sampler))[0] <= 999
    config = dict(rescale_betas_zero_snr=True)                     # of diffusers' default betas
    theirs = diffusers.DDIMScheduler.from_config(config).alphas_cumprod
    assert torch.allclose(NoiseSchedule.from_config(config).alpha_bar, theirs, atol=1e-6)

@pytest.mark.parametrize("trial", range(25))
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_samplers_equal_diffusers(sampler, trial):
    """Whole ways of a network that is wrong in its own way at every t, some from the middle on."""
    rng = np.random.default_rng(trial)
    T, steps = int(rng.choice([1000, 333])), int(rng.choice([1, 2, 5, 7, 20, 25]))
    config = dict(
        num_train_timesteps=T, beta_start=0.00085, beta_end=0.012, beta_schedule=BETAS[trial % 3],
        steps_offset=int(rng.integers(2)), prediction_type=["epsilon", "v_prediction"][trial % 2],
        set_alpha_to_one=bool(rng.integers(2)), timestep_spacing=SPACINGS[1 + rng.integers(3)],
        clip_sample=False, rescale_betas_zero_snr=trial % 4 == 1)  # with v: eps says nothing there
    ours, theirs = NoiseSchedule.from_config(config), SCHEDULERS[sampler].from_config(config)
    theirs.set_timesteps(steps)
    first = int(rng.choice([0, steps // 3]))
    if sampler == "dpmpp":
        theirs.set_begin_index(first)
    W, a = torch.from_numpy(rng.normal(size=(2, 3, 3))).float()

    def model(x, t):
        return (W @ x).tanh() * (1 + t / T)

    generator = torch.Generator().manual_seed(trial)
    times = ours.timesteps(steps, sampler)[first:]
    b = a
    for t in theirs.timesteps[first:]:
        b = theirs.step(model(b, int(t)), t, b, generator=generator).prev_sample
    generator = torch.Generator().manual_seed(trial)
    randn = functools.partial(torch.randn, a.shape, generator=generator)
    *_, (a, _) = SAMPLERS[sampler](ours, model, a, times, randn)
    assert relative(a, b) < 2e-3, config

# ---- unet.py -------------------------------------------------------------------------------------

@pytest.mark.parametrize("extra, size", [
    (dict(), (16, 16)), (dict(), (13, 22)), (dict(in_channels=9, layers_per_block=2), (12, 8)),
    (dict(use_linear_projection=True, upcast_attention=True, attention_head_dim=[2, 3, 4]), (8, 6)),
    (dict(mid_block_type=None, upcast_attention=None, sample_size=None), (8, 6))])
def test_unet_equals_diffusers(extra, size):
    torch.manual_seed(0)
    theirs = shake(theirs_of("unet", dict(SMALL_UNET, **extra)))
    ours = UNet.from_config(dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict())
    z, t = torch.randn(3, theirs.config.in_channels, *size), torch.tensor([0, 500, 999])
    context = torch.randn(3, 7, 24)
    expected = theirs(z, t, context).sample
    assert relative(ours(z, t, context), expected) < 1e-5
    assert relative(ours(z, t, context.roll(1, 0)), expected) > 1e-3           # text matters
    assert relative(ours(z, t.roll(1), context), expected) > 1e-3              # time matters
    assert shapes(theirs_of("unet", ours.to_config())) == shapes(ours)

def test_unet_upcast_attention_keeps_float16_scores_from_overflowing(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", formula)
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0)).half()
    for upcast in (False, True):
        model = shake(UNet.from_config(dict(SMALL_UNET, upcast_attention=upcast)))
        layer = model.mid_block.attentions[0].transformer_blocks[0].attn1
        layer.to_q.weight.data *= 1000
        layer.to_k.weight.data *= 1000
        y = layer.half()(x)
        assert y.dtype == torch.float16 and y.isfinite().all() == upcast

# ---- sample.py: drawing and saving ---------------------------------------------------------------

@pytest.mark.parametrize("sampler, steps, config", [
    ("ddim", 7, dict(prediction_type="v_prediction", timestep_spacing="trailing")),
    ("ddim", 6, dict(timestep_spacing="linspace", set_alpha_to_one=True)),
    ("dpmpp", 7, dict(prediction_type="v_prediction", timestep_spacing="leading")),
    ("dpmpp", 8, dict(timestep_spacing="trailing"))])
def test_samplers_and_diffusers_draw_the_same_from_what_is_saved(tmp_path, sampler, steps, config):
    save_pipeline(small_pipeline(**config), tmp_path)
    prompts = ["a red house", "fog"]
    expected = draw_theirs(
        tmp_path, sampler, prompts, seeds=[11, 12], negative_prompt=["boat", "boat"],
        num_inference_steps=steps, guidance_scale=5.0, height=64, width=48)
    # Latents are never clipped, whatever the scheduler's file says.
    path = tmp_path / "scheduler/scheduler_config.json"
    assert json.loads(path.read_text())["clip_sample"] is False
    change_json(path, clip_sample=True, _class_name="EulerDiscreteScheduler")
    pipe = load_pipeline(tmp_path)
    settings = dict(negative_prompt="boat", guidance=5, sampler=sampler, seed=11, width=48)
    assert decibel(draw(pipe, prompts, steps=steps, **settings), expected) > 45
    for other in (dict(guidance=3), dict(negative_prompt=""), dict(seed=13)):
        assert decibel(draw(pipe, prompts, steps=steps, **{**settings, **other}), expected) < 40

@pytest.mark.parametrize("sampler", ["ddim", "dpmpp"])
@pytest.mark.parametrize("kind", [SD1, SD2])
def test_samplers_and_image_to_image_draw_what_diffusers_draws(published, kind, sampler):
    folder = published[kind]
    pipe = load_pipeline(folder)
    expected = draw_theirs(folder, sampler, "boat", "Img2Img", [5], image=photo(), strength=0.6,
                           num_inference_steps=10, guidance_scale=7.5)
    settings = dict(sampler=sampler, steps=10, seed=5, init_image=photo())     # guidance: 7.5
    assert decibel(draw(pipe, "boat", strength=0.6, **settings), expected) > 45
    assert decibel(draw(pipe, "boat", strength=0.4, **settings), expected) < 40

@pytest.mark.parametrize("kind, sampler, strength", [
    (SD1_INPAINTING, "ddim", 1.0), (SD1_INPAINTING, "dpmpp", 0.6),
    (SD2_INPAINTING, "dpmpp", 1.0), (SD2_INPAINTING, "ddim", 0.6)])
def test_inpainting_models_draw_what_diffusers_draws(published, kind, sampler, strength):
    folder, mask = published[kind], white_in(16, 24, 56, 64)
    expected = draw_theirs(
        folder, sampler, "fog", "Inpaint", [4], image=photo(), mask_image=mask, height=64, width=64,
        strength=strength, num_inference_steps=8, guidance_scale=7.5)
    pipe = load_pipeline(folder)
    settings = dict(sampler=sampler, seed=4, strength=strength, init_image=photo(), steps=8)
    assert decibel(draw(pipe, mask_image=mask, **settings), expected) > 45
    assert decibel(draw(pipe, mask_image=white_in(0, 0, 64, 64), **settings), expected) < 40
    with pytest.raises(ValueError, match="--mask"):
        draw(pipe, **settings)

@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_inpainting_keeps_what_is_black_and_redraws_what_is_white(sampler, prediction_type):
    pipe = small_pipeline(prediction_type=prediction_type)
    settings = dict(init_image=photo(), sampler=sampler, strength=1, steps=6)
    after = pixels(draw(pipe, mask_image=white_in(32, 0, 64, 64), **settings)[0])
    assert (after[:, :32] == pixels(photo())[:, :32]).all()
    assert abs(after[:, 36:] - pixels(photo())[:, 36:]).mean() > 10
    # What is kept guides the rest: without a mask the same noise becomes something else.
    assert decibel([after[:, 36:]], [pixels(draw(pipe, **settings)[0])[:, 36:]]) < 40

@pytest.mark.parametrize("sampler, settings", [("ddpm", {}), ("ddim", {}), ("dpmpp", {}),
    ("ddpm", dict(init_image=photo(128, 64), strength=1))])
def test_samplers_picture_depends_on_its_own_seed_alone(sampler, settings):
    # With f = 1, one batch holds two pictures of 64 x 128.
    unet = dict(block_out_channels=[8, 8, 8], down_block_types=["DownBlock2D"] * 3,
                up_block_types=["UpBlock2D"] * 3, attention_head_dim=1, norm_num_groups=2)
    pipe = small_pipeline(unet, dict(block_out_channels=[4], norm_num_groups=2))
    for side in (pipe.vae.encoder, pipe.vae.decoder):              # slow for so many latents
        side.mid_block.attentions[0] = torch.nn.Identity()
    settings = dict(settings, sampler=sampler, height=64, width=128, guidance=2, steps=2)
    together = draw(pipe, seed=3, num_images=5, **settings)
    for k in range(5):                                             # in batches 0 1, 2 3, 4
        assert decibel(together[k:k + 1], draw(pipe, seed=3 + k, **settings)) > 45, k
        for other in range(k):
            assert decibel(together[k:k + 1], together[other:other + 1]) < 40

def test_guidance_one_ignores_the_negative_prompt_and_others_do_not(small):
    pipe, rows = load_pipeline(small), []
    pipe.unet.conv_in.register_forward_pre_hook(lambda _, z: rows.append(len(z[0])))
    plain = draw(pipe, guidance=1)
    assert decibel(draw(pipe, guidance=1, negative_prompt="boat"), plain) > 80
    assert rows == [1] * 6 and decibel(draw(pipe, guidance=1.0001), plain) > 45 and rows[6] == 2
    assert decibel(draw(pipe, guidance=5, negative_prompt="boat"), draw(pipe, guidance=5)) < 40
    # To avoid the prompt itself cancels it. Guidance 0 leaves the prompt out.
    assert decibel(draw(pipe, guidance=9, negative_prompt="fog"), plain) > 45
    assert decibel(draw(pipe, guidance=0), draw(pipe, "", guidance=1)) > 45

def test_any_size_is_drawn_and_cropped_and_a_large_picture_is_shrunk(small):
    pipe = load_pipeline(small)                                    # trained at 64 x 64
    odd = draw(pipe, height=50, width=90)
    assert decibel(odd, [draw(pipe, height=52, width=92)[0].crop((0, 0, 90, 50))]) > 80
    assert draw(pipe, init_image=photo(800, 200))[0].size == (128, 32)
    assert draw(pipe, init_image=photo(90, 50))[0].size == (90, 50)

def test_generate_takes_what_python_users_bring(small, tmp_path, capsys):
    pipe = load_pipeline(small)
    lists = dict(negative_prompt=["a house", "a boat"], guidance=5, seed=3, num_images=2)
    alone = draw(pipe, "boat", negative_prompt="a boat", guidance=5, seed=6)
    assert decibel(draw(pipe, ("fog", "boat"), **lists)[3:], alone) > 45
    assert decibel(draw(pipe, negative_prompt=None), draw(pipe)) > 80
    random = draw(pipe, seed=None)
    seed = int(capsys.readouterr().out.removeprefix("seed "))
    assert decibel(random, draw(pipe, seed=np.int64(seed))) > 80
    exif = Image.Exif()
    exif[0x0112] = 6                                               # a phone's, on its side
    photo(64, 48).save(tmp_path / "phone.png", exif=exif)
    upright, mask = sample.open_picture(tmp_path / "phone.png"), Image.new("RGBA", (48, 64))
    mask.paste("white", (0, 0, 9, 64))                             # transparent elsewhere
    drawn = draw(pipe, init_image=Image.open(tmp_path / "phone.png"), mask_image=mask)
    assert decibel(drawn, draw(pipe, init_image=upright, mask_image=mask.getchannel("R"))) > 80
    for name, value in dict(
            init_image=np.zeros((8, 8, 3)), mask_image="mask.png", latents=torch.zeros(1, 4, 9, 9),
            sampler="euler", negative_prompt=["a", "b"], seed="1", steps=2.5, guidance="3").items():
        with pytest.raises(ValueError, match=name):
            draw(pipe, **{name: value})

def test_loading_and_drawing_leave_the_process_as_it_was_also_in_threads(small, tmp_path):
    pipe, before = load_pipeline(small), torch.get_rng_state()
    safe = set(torch.serialization.get_safe_globals())
    texts = ["fog " * k for k in range(40)]
    expected = tokenize(load_pipeline(small).tokenizer, texts)     # pipe's is not used yet
    write_single_file(single_file_state(pipe), tmp_path / "m.ckpt", "nested")
    torch.save(np.float64(1), tmp_path / "lr.pt")

    def work(k):
        sample.read_weights(tmp_path / "m.ckpt")
        with pytest.raises(pickle.UnpicklingError):                # torch's own list is as it was
            torch.load(tmp_path / "lr.pt", weights_only=True)
        sample.check_length(pipe, texts[:9])
        return torch.equal(tokenize(pipe.tokenizer, texts[k:]), expected[k:])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, [k % 40 for k in range(80)]))
    drawn = draw(pipe)
    torch.set_default_dtype(torch.float64)
    try:
        again = draw(load_pipeline(small))
    finally:
        torch.set_default_dtype(torch.float32)
    assert decibel(again, drawn) > 80 and torch.equal(torch.get_rng_state(), before)
    assert set(torch.serialization.get_safe_globals()) == safe

@pytest.mark.parametrize("dtype, least", [(torch.bfloat16, 28), (torch.float16, 40)])
def test_half_precision_draws_nearly_the_same(small, dtype, least):
    pipe, half = load_pipeline(small), load_pipeline(small, dtype=dtype)
    vae_dtype = torch.float32 if dtype == torch.float16 else dtype     # it overflows in float16
    assert half.unet.conv_in.weight.dtype == dtype
    assert half.vae.decoder.conv_in.weight.dtype == vae_dtype
    edit = dict(sampler="ddpm", init_image=photo(), mask_image=white_in(16, 0, 64, 40))
    for settings in (dict(guidance=2), dict(edit, guidance=2)):
        assert decibel(draw(half, **settings), draw(pipe, **settings)) > least

@pytest.mark.parametrize("part, module", [("unet", "conv_out"), ("vae", "decoder.conv_out")])
def test_weights_that_compute_nan_are_a_clear_error(small, part, module):
    pipe = load_pipeline(small)
    getattr(pipe, part).get_submodule(module).bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN.*float32"):
        draw(pipe)

def test_saved_pipeline_is_the_same_model_and_its_files_are_readable_by_others(tmp_path):
    pipe = small_pipeline(prediction_type="v_prediction", timestep_spacing="trailing")
    pipe.guidance, pipe.vae.scaling_factor, pipe.unet.config["sample_size"] = 3.5, 0.7, 5
    save_pipeline(pipe, tmp_path / "a")
    again = load_pipeline(str(tmp_path / "a"))
    assert same_weights(again, pipe)
    assert again.guidance == 3.5 and again.vae.scaling_factor == 0.7
    assert again.schedule.to_config() == pipe.schedule.to_config()
    assert decibel(draw(again), draw(pipe, guidance=3.5, height=20, width=20)) > 80
    theirs = transformers.CLIPTextModel.from_pretrained(tmp_path / "a/text_encoder")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "a/tokenizer")
    ids = tokenizer(["a red house"], padding="max_length", return_tensors="pt").input_ids
    expected = theirs(ids).last_hidden_state
    assert relative(sample.encode_prompts(again, ["a red house"]), expected) < 1e-5
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.*")} == {0o644}
    assert not list(tmp_path.rglob(".*"))
    pipe.unet = torch.compile(pipe.unet)                           # renames all weights
    save_pipeline(pipe, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")

# ---- sample.py: single files, folders, the hub ---------------------------------------------------

@pytest.mark.parametrize("kind", [SD1, SD2])
def test_single_file_names_in_these_tests_are_the_original_ones(published, kind):
    """diffusers' converters, made for the real files, find every weight."""
    pipe = load_pipeline(published[kind])
    state = single_file_state(pipe)
    for room, part in (("unet", pipe.unet), ("vae", pipe.vae)):
        convert = getattr(single_file_utils, f"convert_ldm_{room}_checkpoint")
        converted = convert(dict(state), theirs_of(room, part.to_config()).config)
        assert equal(converted, part.state_dict())
    if kind == SD1:
        converted = single_file_utils.convert_ldm_clip_checkpoint(state)
    else:
        theirs = theirs_of("clip", pipe.text_encoder.to_config())
        converted = single_file_utils.convert_open_clip_checkpoint(
            theirs, state, prefix="cond_stage_model.model.")
    converted = clip_encoder.rename_published(converted)
    expected = pipe.text_encoder.state_dict()
    assert equal({name: converted[name] for name in expected}, expected)

@pytest.mark.parametrize("kind, form", [
    *[(kind, "safetensors") for kind in KINDS], (SD1, "flat"), (SD1, "nested"), (SD1, "lightning")])
def test_single_file_is_its_folders_model(published, narrow_single_files, tmp_path, kind, form):
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.ckpt")
    folder = load_pipeline(published[kind])
    write_single_file(single_file_state(folder), path, form)
    ours = load_pipeline(path, tokenizer=published[kind] / "tokenizer")
    assert same_weights(ours, folder)
    assert ours.schedule.to_config() == folder.schedule.to_config()
    # Stable Diffusion 2 pads with "!", whatever OpenAI's tokenizer says.
    ids = tokenize(ours.tokenizer, ["fog"])[0].tolist()
    pad = "!" if "Diffusion 2" in kind else "<|endoftext|>"
    assert len(ids) == 77 and ids[-1] == ids[-2] == ours.tokenizer.get_vocab()[pad]
    part = load_pipeline(path, parts=["unet"], prediction_type="v_prediction")
    assert part.schedule.prediction_type == "v_prediction" and part.vae is None

@pytest.mark.parametrize("kind", KINDS)
def test_single_file_configs_are_the_published_ones(kind):
    unet, text, scheduler, _ = KINDS[kind]
    ours = sample.SINGLE_FILE_CONFIGS[kind]
    for part, theirs in (("unet", unet), ("vae", VAE_15), ("text_encoder", text)):
        for key in set(ours[part]) & set(theirs) - {"bos_token_id", "eos_token_id", "pad_token_id"}:
            value = ours[part][key]
            assert (list(value) if isinstance(value, tuple) else value) == theirs[key], key
    theirs = NoiseSchedule.from_config(scheduler)
    assert NoiseSchedule(**ours["scheduler"]).to_config() == theirs.to_config()

@pytest.mark.parametrize("remove, add, size, words", [
    ("first_stage_model.decoder.up.1.block.0.conv1", "", (), "decoder.up_blocks.2.resnets.0.conv1"),
    ("x", "first_stage_model.quant_conv.bias", 5, r"\s*size mismatch for quant_conv.bias"),
    ("cond_stage_model", "", (), "text_encoder"),
    ("x", "model.diffusion_model.label_emb.0.0.weight", 5, "label_emb.0.0.weight has no place"),
    ("model.diffusion_model", "", (), "model.diffusion_model")])
def test_single_file_that_does_not_fit_is_an_error_that_names_it(
        published, narrow_single_files, tmp_path, remove, add, size, words):
    state = single_file_state(load_pipeline(published[SD1]))
    state = {name: tensor for name, tensor in state.items() if not name.startswith(remove)}
    write_single_file({**state, add: torch.ones(size)}, tmp_path / "odd.safetensors", "safetensors")
    with pytest.raises(ValueError, match="odd.safetensors.*" + words):
        load_pipeline(tmp_path / "odd.safetensors", tokenizer=published[SD1])

class Hostile(tuple):                                              # (function, argument): called
    def __reduce__(self):
        return self[0], self[1:]

@pytest.mark.parametrize("form", ["zip 2", "zip 4", "legacy 2", "legacy 4", "pickle 3"])
def test_single_file_and_bin_that_hold_code_run_nothing(small, tmp_path, form):
    trace, protocol = tmp_path / "was_here", int(form[-1])
    state = dict(a=torch.ones(2), state_dict=Hostile((os.system, f"touch {trace}")))
    folder = copy(small, tmp_path / "m")
    (folder / "vae" / WEIGHTS).unlink()
    for path in (tmp_path / "m.ckpt", folder / "vae/diffusion_pytorch_model.bin"):
        if form.startswith("pickle"):
            path.write_bytes(pickle.dumps(state, protocol=protocol))
        else:
            torch.save(state, path, pickle_protocol=protocol,
                       _use_new_zipfile_serialization=form.startswith("zip"))
        with pytest.raises(ValueError, match=f"{path.name}: refused: it asks for"):
            load_pipeline(path if path.suffix == ".ckpt" else folder)
    assert not trace.exists()

@pytest.mark.parametrize("suffix", [".bin", ".fp16.safetensors", ".non_ema.safetensors"])
def test_folder_of_every_published_form_loads(small, tmp_path, suffix):
    """Other file names, older names of tensors, wrapped ones, no scheduler, no tokenizer.json."""
    folder = copy(small, tmp_path / "m")
    older = [(r"\.to_q\.", ".query."), (r"\.to_k\.", ".key."), (r"\.to_v\.", ".value."),
             (r"\.to_out\.0\.", ".proj_attn."), (r"text_model\.", "")]
    for part in PARTS:
        path = folder / part / ("model.safetensors" if part == "text_encoder" else WEIGHTS)
        wrapped = [("^", "module._orig_mod."), ("attn1", "_checkpoint_wrapped_module.attn1")]
        state = rename(load_file(path), wrapped if part == "unet" else older)
        path.unlink()
        if part == "text_encoder":
            state["embeddings.position_ids"] = torch.arange(20)
            path = path.with_name("pytorch_model" if suffix == ".bin" else "model")
        # What a file is, its first bytes say, and not its ending.
        write = torch.save if (suffix == ".bin") == (part != "vae") else save_file
        write(state, path.with_name(path.stem + suffix))
    shutil.rmtree(folder / "scheduler")
    (folder / "tokenizer/tokenizer.json").unlink()
    ours, expected = load_pipeline(folder), load_pipeline(small)
    assert same_weights(ours, expected)
    assert ours.schedule.config == NoiseSchedule().config
    assert ours.tokenizer("a house").input_ids == expected.tokenizer("a house").input_ids

def test_folder_with_fewer_text_layers_than_weights_is_clip_skip(small, tmp_path):
    folder = copy(small, tmp_path / "m")
    change_json(folder / "text_encoder/config.json", num_hidden_layers=1)
    theirs = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    pipe, ids = load_pipeline(folder), torch.arange(20)[None]
    assert relative(pipe.text_encoder(ids), theirs(ids).last_hidden_state) < 1e-5

@pytest.mark.parametrize("file, content, words", [                 # None: not there
    ("unet", None, "holds no unet"), (f"vae/{WEIGHTS}", None, "vae: no weights"),
    ("vae/config.json", "{", "vae.config.json"), (f"unet/{WEIGHTS}", "x" * 99, f"unet.{WEIGHTS}"),
    ("unet/config.json", dict(layers_per_block=2), r"unet.*\s*size mismatch"),
    ("unet/config.json", dict(in_channels=5), r"unet.*\s*size mismatch for conv_in.weight"),
    ("text_encoder/config.json", dict(hidden_act="relu"), "text_encoder.*hidden_act"),
    ("scheduler/scheduler_config.json", dict(beta_schedule="x"), "scheduler.*beta_schedule"),
    ("scheduler/scheduler_config.json", '{"error": "not found"}', "scheduler.*no _class_name"),
    ("tokenizer", None, "no usable CLIP tokenizer"), (f"unet/{WEIGHTS}", "\n<!doctype", "web page"),
    (f"vae/{WEIGHTS}", "version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    ("vae/config.json", "<html>", "web page"), ("tokenizer/vocab.json", "<p>", "web page")])
def test_folder_that_is_broken_is_an_error_that_names_what(small, tmp_path, file, content, words):
    path = copy(small, tmp_path / "model") / file
    if isinstance(content, dict):
        change_json(path, **content)
    elif content is not None:
        path.write_text(content)
    else:
        path.rename(tmp_path / "away")
    with pytest.raises(ValueError, match="model.*" + words):
        load_pipeline(tmp_path / "model")

def test_hub_is_asked_for_exactly_the_files_that_are_needed(small, tmp_path, hub, capsys):
    repository = copy(small, tmp_path / "repository")
    half, text = WEIGHTS.replace(".s", ".fp16.s"), repository / "text_encoder/model.safetensors"
    torch.save(load_file(text), text.with_name("pytorch_model.bin"))
    text.unlink()
    (repository / "vae" / WEIGHTS).rename(repository / "vae" / half)
    (repository / "safety_checker").mkdir()
    for stray in ("v1-5-pruned.ckpt", "model.safetensors", "safety_checker/model.safetensors",
                  "safety_checker/config.json", "README.md", "unet/diffusion_flax_model.msgpack",
                  f"unet/{half}", "unet/diffusion_pytorch_model.bin"):
        (repository / stray).write_text("gigabytes")
    hub.repositories["stable-diffusion-v1-5/stable-diffusion-v1-5"] = repository
    ours = load_pipeline("runwayml/stable-diffusion-v1-5")         # where it was once
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in capsys.readouterr().err
    assert same_weights(ours, load_pipeline(small))
    configs = {file for file in files_under(small) if file.endswith((".json", ".txt"))}
    weights = {f"unet/{WEIGHTS}", f"vae/{half}", "text_encoder/pytorch_model.bin"}
    assert sorted(hub.asked) == sorted(configs | weights)
    hub.online, hub.asked = False, []                              # now the cache serves
    assert same_weights(load_pipeline("runwayml/stable-diffusion-v1-5"), ours) and not hub.asked
    with pytest.raises(ValueError, match="someone/else: .*cache"):
        load_pipeline("someone/else")

def test_hub_clip_loads_as_a_whole_and_as_a_text_encoder(small, tmp_path, hub):
    text = dict(SMALL_TEXT, vocab_size=560, eos_token_id=2)        # 2 as published: the largest id
    config = transformers.CLIPConfig(text_config=text, vision_config=SMALL_VISION, projection_dim=9)
    theirs = shake(transformers.CLIPModel(config))
    theirs.save_pretrained(tmp_path / "clip")
    few_words().save_pretrained(tmp_path / "clip")
    hub.repositories.update({"a/clip": tmp_path / "clip", "a/small": small})
    clip, _ = sample.load_clip("a/clip")
    assert equal(clip.state_dict(), theirs.state_dict())
    encoder, tokenizer = sample.load_clip("a/clip", part="text_encoder")
    ids = tokenize(tokenizer, ["fog", "a red house"])
    assert relative(encoder(ids), theirs.text_model(ids).last_hidden_state) < 1e-5
    encoder, _ = sample.load_clip("a/small", part="text_encoder")
    assert equal(encoder.state_dict(), load_pipeline(small).text_encoder.state_dict())
    assert not any(file.startswith(("unet", "vae")) for file in hub.asked)

def test_tokenizer_that_does_not_fit_is_refused_or_limited(small, tmp_path):
    captions = [a + b for a in "abcdefghijklm" for b in "nopqrstuvwxyz"]
    many = train_tokenizer(captions, 600, 77)
    many.save_pretrained(tmp_path / "many")
    assert len(many) == 600
    with pytest.raises(ValueError, match="many: no usable CLIP tokenizer: .* knows"):
        load_pipeline(small, tokenizer=tmp_path / "many")
    (tmp_path / "few").mkdir()
    few_words().backend_tokenizer.model.save(str(tmp_path / "few"))    # says not how many tokens
    assert load_pipeline(small, tokenizer=tmp_path / "few").tokenizer.model_max_length == 20

def test_open_picture_reads_every_kind(tmp_path):
    flag = Image.new("RGB", (40, 20), (255, 0, 0))
    flag.paste((0, 0, 255), (20, 0, 40, 20))                       # red to the left, blue right
    layer = flag.convert("RGBA")
    layer.paste((0, 0, 0, 0), (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6                                               # to be turned clockwise
    deep = Image.fromarray(np.full((20, 40), 40000, np.uint16))
    half = np.repeat([[1, 0.25]], 20, axis=1).repeat(20, axis=0)   # white, and a quarter of it
    for name, picture, left, right in (
            ("palette.png", flag.convert("P"), (255, 0, 0), (0, 0, 255)),
            ("cmyk.jpg", flag.convert("CMYK"), (255, 0, 0), (0, 0, 255)),
            ("layer.png", layer, (255, 0, 0), (255, 255, 255)),
            ("clear.png", layer.quantize(), (255, 0, 0), (255, 255, 255)),     # palette with alpha
            ("float.tiff", Image.fromarray(np.float32(half)), (255, 255, 255), (64, 64, 64)),
            ("int.tiff", Image.fromarray(np.int32(half * 200)), (200, 200, 200), (50, 50, 50)),
            ("bits.tiff", Image.fromarray(np.int32(half * 4095)), (255, 255, 255), (64, 64, 64)),
            ("long.tiff", Image.fromarray(np.int32(half * 2e9)), (255, 255, 255), (64, 64, 64)),
            ("one.tiff", Image.fromarray(np.float32(half * 1.01)), (255, 255, 255), (64, 64, 64)),
            ("over.tiff", Image.fromarray(np.float32(half * 257)), (255, 255, 255), (64, 64, 64)),
            ("deep.png", deep, (156, 156, 156), (156, 156, 156))):
        picture.save(tmp_path / name)
        opened = sample.open_picture(tmp_path / name)
        assert opened.mode == "RGB" and opened.size == (40, 20), name
        assert opened.getpixel((5, 5)) == pytest.approx(left, abs=20), name
        assert opened.getpixel((35, 5)) == pytest.approx(right, abs=20), name
    flag.save(tmp_path / "words.png", pnginfo=WORDY)
    flag.save(tmp_path / "turned.png", exif=exif)
    flag.save(tmp_path / "both.png", pnginfo=WORDY, exif=exif)
    flag.save(tmp_path / "exif.png", exif=b"broken")
    flag.save(tmp_path / "exif.jpg", exif=b"Exif\0\0broken")
    for name in ("turned.png", "both.png", "words.png", "exif.png", "exif.jpg"):
        opened = sample.open_picture(tmp_path / name)              # metadata cost no pixels
        assert opened.getpixel((5, 5))[0] > 250 and opened.size[name[0] not in "tb"] == 20
        assert pixels(sample.upright_rgb(opened)).tolist() == pixels(opened).tolist()
    (tmp_path / "cut.png").write_bytes((tmp_path / "layer.png").read_bytes()[:70])
    with pytest.raises(ValueError, match="cut.png"):
        sample.open_picture(tmp_path / "cut.png")

def test_pictures_are_cropped_never_stretched_and_come_back():
    stripes = Image.new("RGB", (96, 32), "black")
    stripes.paste("white", (32, 0, 64, 32))
    assert picture_to_tensor(stripes, 32, 32).min() > 0.99         # the middle stripe alone
    x = picture_to_tensor(photo(), 64, 64)
    assert (pixels(sample.tensor_to_pictures(x)[0]) == pixels(photo())).all()
    assert pixels(sample.tensor_to_pictures(3 * x)[0]).max() == 255

# ---- sample.py: the command line -----------------------------------------------------------------

def test_cli_draws_one_picture_and_says_how_in_the_png(command, small, tmp_path):
    flags = "--steps 2 --guidance 5 --seed 7 --height 48 --negative boat".split()
    status, out, err = command("a red house", *flags)
    assert (status, out) == (0, "out.png\n"), err
    picture = Image.open(tmp_path / "out.png")
    assert picture.info["parameters"] == (
        "a red house\nNegative prompt: boat\n"
        "Steps: 2, Sampler: DPM++ 2M, CFG scale: 5.0, Seed: 7, Size: 64x48, Model: small")
    settings = dict(negative_prompt="boat", steps=2, guidance=5, seed=7, height=48)
    expected = draw(load_pipeline(small), "a red house", **settings)
    assert decibel([picture], expected) > 80
    assert files_under(tmp_path) == {"out.png"}
    assert command("a red house", *flags, "--prediction-type", "v_prediction")[0] == 0
    assert decibel([Image.open(tmp_path / "out.png")], expected) < 40

def test_cli_draws_several_pictures_a_sheet_and_a_gif(command, small, tmp_path):
    copy(small, tmp_path / "out")
    flags = "--num-images 2 --steps 3 --sampler ddim --gif --output out/o.png --model out".split()
    status, out, err = command("fog", "boat", *flags)
    names = ["o-0.png", "o-1.png", "o-2.png", "o-3.png", "o.png", "o.gif"]
    assert (status, out.split()) == (0, [f"out/{name}" for name in names]), err
    assert files_under(tmp_path / "out") == files_under(small) | set(names)
    third, sheet, gif = (Image.open(tmp_path / "out" / names[k]) for k in (2, 4, 5))
    assert sheet.size == gif.size == (128, 128) and gif.n_frames == 3
    assert (pixels(sheet)[64:, :64] == pixels(third)).all()
    assert third.info["parameters"].startswith("boat\n")
    assert "Sampler: DDIM, CFG scale: 7.5, Seed: 2, Size" in third.info["parameters"]
    assert decibel([third], draw(load_pipeline(small), "boat", sampler="ddim", seed=2)) > 45

def test_cli_inpaints_a_thin_stroke_of_any_bright_colour(command, tmp_path):
    photo().save(tmp_path / "photo.png")
    mask = Image.new("RGBA", (64, 64))                             # transparent elsewhere
    mask.paste("lime", (30, 0, 33, 64))
    mask.save(tmp_path / "mask.png")
    flags = "--init-image photo.png --mask mask.png --strength 1 --steps 2".split()
    status, _, err = command("fog", *flags)
    assert status == 0, err
    changed = abs(pixels(Image.open(tmp_path / "out.png")) - pixels(photo())).max(axis=2)
    assert (np.delete(changed, [30, 31, 32], axis=1) == 0).all()
    assert (changed[:, 31] > 5).mean() > 0.8

@pytest.mark.parametrize("prompt", [
    "", "\u05dc\u05d9 \u200f\u0644", "a \udcff b", "two\nlines", "Steps: 7, Size: 8x8",
    "\\\"\\n' \x1b[31m", "\U0001f303 over \u6c99\u4e18 " + "fog " * 40])
def test_cli_takes_any_prompt_and_says_which_is_too_long(command, tmp_path, prompt):
    status, _, err = command(prompt, "--steps", 1, "--output", "\udcff.png")
    assert status == 0, err
    assert ("tokens, but only 20 count: \\U0001f303" in err) == (len(prompt) > 99)
    text = Image.open(tmp_path / "\udcff.png").info["parameters"]
    assert text.startswith(prompt.replace("\udcff", "?") + "\nNegative prompt: \nSteps: 1, ")

BAD_INPUT = """
    --steps 0; --steps 1001; --steps x; --guidance nan; --strength 0; --strength 2; --seed -1
    --seed 1.5; --num-images 0; --height 0; --width 99999; --sampler euler; --dtype int8
    --device tpu; --device cuda; --prediction-type x0; --init-image none.png; --init-image words.txt
    --mask red.png; --mask wide.png --init-image red.png; --tokenizer none; --what
    --output none/x.png; --output x.what; --output x.gif; --output x.psd; --output folder.png
    --model none; --model folder.png; --model words.txt; --model random.ckpt; --model a/b
    --model random.safetensors; --model list.ckpt; --model red.png; --model no/such/id
"""

@pytest.mark.parametrize("arguments", re.split(r"\s*[;\n]\s*", BAD_INPUT.strip()))
def test_cli_bad_input_is_one_line_and_writes_nothing(command, tmp_path, hub, arguments):
    if arguments == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "words.txt").write_text("words")
    for name in ("random.ckpt", "random.safetensors"):
        (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(5000))
    torch.save([1, 2, 3], tmp_path / "list.ckpt")
    Image.new("RGB", (64, 64)).save(tmp_path / "red.png")
    Image.new("RGB", (96, 64)).save(tmp_path / "wide.png")
    before = files_under(tmp_path)
    arguments = arguments.split()
    status, out, err = command("fog", *arguments)
    assert (status, out) == (2, ""), err
    assert err.count("\n") == 1 and err.startswith("sample.py: ")
    assert arguments[0] in err or arguments[1] in err              # the flag, or the file
    assert files_under(tmp_path) == before

def test_cli_full_disk_leaves_the_old_picture_and_nothing_half_written(command, tmp_path):
    (tmp_path / "out.png").write_bytes(b"old")
    with disk_full_after(1000):
        status, _, err = command("fog", "boat", "--steps", 1)
    last = err.splitlines()[-1]
    assert status == 2 and last.startswith("sample.py: ") and "too large" in last, err
    assert files_under(tmp_path) == {"out.png"}
    assert (tmp_path / "out.png").read_bytes() == b"old"

@pytest.mark.parametrize("script, argument, given, wanted", [
    (sample, "--help", "", b"usage: "), (train, "--help", "", b"usage: "),
    (sample, "fog", "", b"torch, 4000"), (sample, "fog", "7", b"torch, 7"),
    (train, "--flip", "", b"torch, 4000")])
def test_cli_help_needs_no_torch_and_threads_sleep(tmp_path, script, argument, given, wanted):
    torch = "import os; raise SystemExit('torch, ' + os.environ['GOMP_SPINCOUNT'])"
    (tmp_path / "torch.py").write_text(torch)
    env = dict(PYTHONPATH=str(tmp_path), GOMP_SPINCOUNT=given)
    done = python(script.__file__, argument, cwd=tmp_path, **env)
    assert (done.stdout + done.stderr).startswith(wanted)

@pytest.mark.skipif(sys.platform != "linux", reason="malloc is another one")
def test_cli_keeps_freed_memory_for_the_next_tensor():
    done = python("-c", """if True:                    # alone: earlier tests leave gaps in a heap
        import resource, sample, torch
        sample.run_command(lambda args: torch.ones(2**24), None)               # 64 MB
        start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(8):
            torch.ones(2**24)
        new_pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
        print(new_pages * resource.getpagesize(), sample.keep_memory())""", cwd=HERE)
    new_bytes, agrees = done.stdout.split()
    assert int(new_bytes) < 2**27 or agrees != b"1"    # two tensors; or the C library refuses it

# ---- data/landscapes.py --------------------------------------------------------------------------

def test_landscapes_same_index_is_the_same_scene_at_any_count_workers_and_size(tmp_path, pictures):
    few = draw_landscapes(tmp_path / "few", "--size 32 --count 5 --workers 2")
    large = draw_landscapes(tmp_path / "large", "--size 128 --count 4 --workers 1")
    other = draw_landscapes(tmp_path / "other", "--size 32 --count 4 --workers 1 --seed 1")
    lines = (pictures / "metadata.jsonl").read_text("utf-8").splitlines()
    assert few == [json.loads(line) for line in lines[:5]]
    assert large == few[:4] and other != few[:4]
    for k, name in enumerate(line["file_name"] for line in large):
        assert (tmp_path / "few" / name).read_bytes() == (pictures / name).read_bytes()
        halved = Image.open(tmp_path / "large" / name).reduce(2)
        assert np.abs(pixels(landscapes.draw(landscapes.scene(k), 64)) - pixels(halved)).mean() < 4

def scenes(split, count=1500):
    return [landscapes.scene(index, split) for index in range(count)]

def test_landscapes_novel_pairs_are_never_in_train_or_val():
    learnt, val, novel = ({(scene["sky"], scene["land"]) for scene in scenes(split)}
                          for split in ("train", "val", "novel"))
    assert learnt == val and not learnt & novel and len(learnt) == 16 and len(novel) == 4
    for k in (0, 1):                                               # both words are known
        assert {pair[k] for pair in novel} <= {pair[k] for pair in learnt}
    assert scenes("train", 9) != scenes("val", 9)

WORDS = {
    "day": "clear day|blue sky|midday", "dawn": "dawn|sunrise|pink", "storm": "storm|grey",
    "sunset": "sunset|dusk|red evening", "night": "night|starry", "mountains": "mountain|peaks",
    "hills": "hills", "dunes": "dunes|desert", "forest": "forest|woods", "left": "the left",
    "middle": "the middle|the center", "right": "the right", "lake": "lake", "boat": "boat",
    "pines": "pine", "cabin": "cabin", "birds": "birds", "mist": "mist|fog", "snow": "snow",
    "clouds": "clouds"}

def test_landscapes_captions_are_true_and_three_of_four_are_complete():
    complete = 0
    for scene in scenes("train") + scenes("novel"):
        there = {scene["sky"], scene["land"], scene["place"], *scene["extras"]} - {None}
        said = {name for name, words in WORDS.items() if re.search(words, scene["text"])}
        assert said <= there, scene
        complete += said == there
        assert "moon" not in scene["text"] or scene["sky"] == "night"
        assert "the sun " not in scene["text"] or scene["sky"] not in ("night", "storm")
        assert "boat" not in scene["extras"] or "lake" in scene["extras"]
    assert 0.72 < complete / 3000 < 0.86

def test_landscapes_left_is_left():
    seen = dict(left=[], middle=[], right=[])                      # where the sky is brightest
    for scene in scenes("train", 250):
        if scene["place"] and scene["sky"] in ("night", "sunset"):
            sky = landscapes.draw(scene, 64).convert("L").crop((0, 0, 64, 24)).reduce(4)
            seen[scene["place"]].append(pixels(sky).max(axis=0).argmax() / 16)
    assert min(map(len, seen.values())) > 10
    assert max(seen["left"]) < 0.35 < min(seen["middle"])
    assert max(seen["middle"]) < 0.65 < min(seen["right"])

def test_landscapes_metadata_is_written_last_and_never_over_another(tmp_path):
    arguments = ["--out", tmp_path / "d", "--size", 64, "--count", 4, "--workers", 1]
    with disk_full_after(200):
        status, _, err = call(landscapes, *arguments)
    assert status == 2 and "too large" in err and not (tmp_path / "d/metadata.jsonl").exists()
    assert call(landscapes, *arguments)[0] == 0
    kept = contents(tmp_path)
    status, _, err = call(landscapes, *arguments)
    assert status == 2 and "metadata.jsonl" in err
    for bad in ("--size 8", "--count 0", "--split all", "--seed x", "--what"):
        status, _, err = call(landscapes, "--out", tmp_path / "e", *bad.split())
        assert status == 2 and bad.split()[0] in err and err.count("\n") == 1
    assert contents(tmp_path) == kept

def test_landscapes_are_drawn_first_where_they_are_missing(tmp_path, monkeypatch):
    (tmp_path / "landscapes.py").write_text(                       # fails if it is called twice
        "from pathlib import Path\nfolder = Path(__file__).with_suffix('')\nfolder.mkdir()\n"
        "(folder / 'a.ppm').write_bytes(b'P6 1 1 255 abc')\n(folder / 'metadata.jsonl').touch()\n")
    monkeypatch.setattr(train, "LANDSCAPES", tmp_path / "landscapes")
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--data", "./landscapes"]):
        monkeypatch.setattr(sys, "argv", ["train.py", "--image-size", "16", *more])
        args = train.parse_args()
        assert [len(data) for data in train.open_data(args)] == [1, 1]
        assert train.load_frozen(["vae"], args).guidance == 3      # 7.5 for other pictures

# ---- train.py: pictures and captions of any folder -----------------------------------------------

def test_image_folder_takes_captions_in_the_promised_order(tmp_path):
    expected = {"cats/a.png": "cats", "cats/deep_down/b.png": "deep down", "cats/c.png": "sidecar",
                "cats/d.jpg": "another \u00e9", "red_barn-door.png": "red barn door"}
    for name in (*expected, ".a.png", ".thumbs/a.png", "out/samples/a.png"):    # hidden; a model
        save_picture(tmp_path / name)
    (tmp_path / "out/train_state").mkdir()
    (tmp_path / "cats/c.caption").write_text("sidecar\n")
    (tmp_path / "cats/c.txt").write_bytes(b"\xe9")                 # in no encoding: passed over
    (tmp_path / "cats/d.caption").write_text("\ufeffanother \u00e9", "utf-8")
    for name, text, caption in (
            ("nothing.csv", "", "sidecar"),
            ("metadata.csv", 'file_name,text\ncats/c.png,"a table, read"\n', "a table, read"),
            ("metadata.jsonl", '{"file_name": "./cats/c.png", "text": "lines"}\n', "lines")):
        (tmp_path / name).write_text(text)
        data = ImageFolder(tmp_path, image_size=16)
        captions = dict(zip(map(str, data.names), data.captions))
        assert captions == dict(expected, **{"cats/c.png": caption})

BARN, LINE = "a barn, \u00e9t\u00e9", '{"file_name": "train/a.png", "text": %s}'

@pytest.mark.parametrize("file, content, caption", [
    ("metadata.jsonl", LINE % f'["", "{BARN}", "dawn"]', BARN), ("metadata.jsonl", LINE % 0, "0"),
    ("train/metadata.jsonl", LINE.replace("train/", "") % f'"{BARN}"', BARN),
    ("train/metadata.csv", f'file_name,caption\na.png,"{BARN}"\n'.encode("utf-16"), BARN),
    ("metadata.jsonl", LINE % "null", "train"), ("train/a.TXT", BARN, BARN),
    ("metadata.jsonl", LINE % "NaN", "train"), ("train/a.txt", BARN.encode("utf-16-le"), "train"),
    ("train/a.png.txt", BARN, BARN), ("train/a.png.Caption", BARN, BARN),
    ("train/a.txt", BARN.encode("utf-16"), BARN), ("train/a.txt", BARN.encode("cp1252"), "train"),
    ("train/a.txt", BARN.encode("utf-32"), BARN), ("train/a.txt", b":\4@\4", "train"),
    ("train/b.txt", BARN, "train"), ("metadata.jsonl", '{"image": "a.png", "prompt": "b"}', None),
    ("train/metadata.csv", "file,text\na.png,b\n", None), ("metadata.jsonl", "{", None),
    ("train/metadata.csv", 'file_name,text\na.png,"b\nc.png,d\n', None),
    ("train/metadata.csv", f"file_name,text\na.png,{BARN}\n", None)])
def test_image_folder_finds_captions_as_others_write_them(tmp_path, capsys, file, content, caption):
    save_picture(tmp_path / "train/a.png")
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / file).write_bytes(content)
    if caption is None:
        words = "not (image, prompt|file, text)|char 1|quotes|unexpected end"
        with pytest.raises(ValueError, match=f"{file}: .*({words})"):
            ImageFolder(tmp_path, 16)
        return
    data = ImageFolder(tmp_path, 16)
    ImageFolder(tmp_path, 16, "val")
    assert data[0][1] == caption
    assert capsys.readouterr().err.count("a.txt") == (caption == "train" and "a.txt" in file)
    source = "metadata" if "metadata" in file else "text files"
    source = "folder names" if caption == "train" else source
    assert train.describe_captions(data) == (
        f"captions: 1 from {source}; caption files not used: {int('b.txt' in file)}\n"
        f"for example: {caption} | {caption} | {caption}")

def test_image_folder_takes_pictures_of_any_name(tmp_path, capsys):
    for name in ("a.jpg_large", "b", "c.jpg"):
        photo(16, 16).save(tmp_path / name, "JPEG")
    photo(16, 16).save(tmp_path / "e", "PNG", pnginfo=WORDY)
    (tmp_path / "d.heif").write_bytes(b"not known")
    (tmp_path / "notes.json").write_text("{}")
    assert ImageFolder(tmp_path, 16).names == ["a.jpg_large", "b", "c.jpg", "e"]
    words = "2 files that are no pictures or captions, such as d.heif"
    assert capsys.readouterr().err.count(words) == 1

def test_image_folder_keeps_every_twentieth_picture_to_validate_by(tmp_path):
    for k in range(45):
        save_picture(tmp_path / f"{k // 19}/{k:02}.png", size=(4, 4))
    learnt, kept = (ImageFolder(tmp_path, 16, split).names for split in ("train", "val"))
    assert len(kept) == 2 and len(learnt) == 43 and not set(learnt) & set(kept)
    few = [ImageFolder(tmp_path / "0", 16, split).names for split in ("train", "val")]
    assert len(few[0]) == 19 and few[0] == few[1]                  # too few to spare any
    assert set(ImageFolder(tmp_path, 16, max_images=9).captions) == {"0", "1", "2"}

def test_image_folder_scales_and_flips(tmp_path):
    photo(30, 10).save(tmp_path / "a.png")
    photo(16, 16, seed=1).save(tmp_path / "b.png")
    (a, _), (b, caption), _, (mirrored, again) = ImageFolder(tmp_path, 16, flip=True)
    assert a.shape == (3, 16, 16) and a.dtype == torch.float32
    assert torch.equal(b, picture_to_tensor(photo(16, 16, seed=1), 16, 16)[0])
    assert torch.equal(b.flip(2), mirrored) and not torch.equal(b, mirrored) and caption == again

def test_image_folder_replaces_a_broken_picture_and_logs_it_once(tmp_path, capsys):
    for name, color in (("a", "red"), ("b", "green"), ("c", "blue")):
        save_picture(tmp_path / name / "x.png", color)
    (tmp_path / "b/x.png").write_bytes((tmp_path / "b/x.png").read_bytes()[:40])
    data = ImageFolder(tmp_path, 16)
    for _ in range(2):
        x, caption = data[1]
        assert caption == "c" and x[2].min() > 0.9                 # the next, with its own caption
    assert capsys.readouterr().err.count("left out") == 1
    (tmp_path / "c/x.png").write_bytes(b"")
    assert ImageFolder(tmp_path, 16)[1][1] == "a"                  # after the last, the first
    (tmp_path / "a/x.png").unlink()
    with pytest.raises(ValueError, match="--data"):
        ImageFolder(tmp_path, 16)[0]

# ---- train.py: optimizers, learning rate, EMA ----------------------------------------------------

def walk(optimizer, shape, **settings):
    """Where an optimizer takes a parameter in six steps down a random slope -> (6, O, I)."""
    generator = torch.Generator().manual_seed(0)
    p, other = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    other.grad = torch.ones(shape)
    optimizer = optimizer([p, other], lr=0.1, **settings)
    slope = torch.randn(shape, generator=generator)
    path = []
    for _ in range(6):
        p.grad = slope + torch.randn(shape, generator=generator)
        optimizer.step()
        path.append(p.detach().clone().flatten(1))
    return torch.stack(path)

@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (16, 16), (8, 4, 3, 3)])
def test_muon_equals_torchs_muon_and_takes_a_convolution_as_a_matrix(shape):
    matrix = (shape[0], math.prod(shape[1:]))
    theirs = walk(torch.optim.Muon, matrix, weight_decay=0, momentum=0.95, nesterov=True,
                  adjust_lr_fn="match_rms_adamw")
    assert (walk(Muon, shape) - theirs).norm() < 0.03 * theirs.norm()          # it is in bfloat16
    assert (walk(Muon, shape, momentum=0.0) - theirs).norm() > 0.2 * theirs.norm()

def held(optimizer):
    return {id(p) for group in optimizer.param_groups for p in group["params"]}

def test_muon_gets_the_matrices_inside_and_fine_tuning_is_adamw_alone():
    text = dict(CLIPTextEncoder.DEFAULTS, **TOWER, vocab_size=600)
    for model in (VAE(**MINI["vae"]), UNet(**MINI["unet"]), CLIP(text, MINI["vision"], 16)):
        inner = {id(p) for name, p in model.named_parameters()
                 if p.dim() > 1 and not re.search("embedding|conv_in|conv_out", name)}
        adamw, muon = train.make_optimizers(model, fine_tune=False)
        only, = train.make_optimizers(model, fine_tune=True)
        assert held(muon) == inner and held(adamw) == held(only) - inner
        assert held(only) == set(map(id, model.parameters()))
        assert type(adamw) is type(only) is torch.optim.AdamW and type(muon) is Muon

def test_learning_rate_warms_up_stays_and_falls_to_zero(trained):
    rates = [learning_rate(step, 1000, 0.5) for step in range(1001)]
    assert rates[0] == pytest.approx(0.005) and rates[49] == pytest.approx(0.25)
    assert set(rates[99:501]) == {0.5} and rates[750] == pytest.approx(0.25) and rates[1000] == 0
    for stage, steps in STEPS.items():                             # and it reaches both optimizers
        expected = learning_rate(steps - 1, steps, MINI[f"{stage}_lr"])
        for optimizer in read_state(trained, stage)["optimizers"]:
            assert optimizer["param_groups"][0]["lr"] == pytest.approx(expected)

@pytest.mark.parametrize("first, steps, share", [
    (0, 1, 0.9), (9, 1, 9 / 19), (5000, 1, 0.005), (5000, 200, 1 - 0.995**200), (0, 30, 0.999)])
def test_ema_follows_the_last_two_hundred_steps_and_at_first_fewer(first, steps, share):
    ema, model = torch.nn.PReLU(init=0.0), torch.nn.PReLU(init=1.0)
    for step in range(first, first + steps):
        update_ema(ema, model, step)
    assert ema.weight.item() == pytest.approx(share, abs=1e-3)

@pytest.mark.parametrize("stage", STEPS)
def test_ema_is_updated_in_each_stage_and_is_what_is_saved(stage, begin, monkeypatch, learn):
    out, first = begin(stage), []
    spy(monkeypatch, train, "learning_rate", lambda *_: first.append(read_state(out, stage)))
    learn(stage, out, "--steps 1")
    initial, state = first[0]["model"], read_state(out, stage)
    assert first[0]["step"] == 0 and state["step"] == 1 and not equal(initial, state["model"])
    for name in initial:
        expected = 0.1 * initial[name] + 0.9 * state["model"][name]
        assert torch.allclose(state["ema"][name], expected, atol=1e-6)
    part = train.PART_OF[stage]
    saved = getattr(load_pipeline(out, parts=[part]), part).state_dict()
    assert all(torch.equal(saved[name], state["ema"][name]) for name in saved)
    if stage == "clip":
        clip, _ = sample.load_clip(out / "train_state/clip")
        assert equal(clip.state_dict(), state["ema"])

# ---- train.py: the training step -----------------------------------------------------------------

def test_batches_hold_each_picture_once_an_epoch(tmp_path, monkeypatch, learn):
    seen = []
    spy(monkeypatch, ImageFolder, "__getitem__",
        lambda data, i: seen.append(i) if len(data) == 24 else None)
    learn("vae", tmp_path, "--steps 6 --max-images 24 --grad-accum 2")
    first, second = seen[-48:-24], seen[-24:]
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second and first != sorted(first)

def test_unet_learns_by_algorithm_1(trained, begin, monkeypatch, learn, pictures):
    """z_t holds scaled latents, any t and fresh noise; contexts are the pictures' own, or empty."""
    out, inputs, targets = begin("unet"), [], []
    change_json(out / "vae/config.json", scaling_factor=3.0)
    spy(monkeypatch, UNet, "forward", lambda _, *call: inputs.append(call))
    spy(monkeypatch, train, "diffusion_loss", lambda _, output, *call: targets.append(call[:3]))
    learn("unet", out, "--steps 8 --batch-size 32")
    z_t, t, context = map(torch.cat, zip(*inputs))
    z0, t_again, noise = map(torch.cat, zip(*targets))
    assert len(t) == 256 and torch.equal(t, t_again)
    assert torch.allclose(z_t, NoiseSchedule().q_sample(z0, t, noise), atol=1e-5)
    assert 450 < t.float().mean() < 550 and t.min() < 20 and t.max() > 980
    spread = t.view(8, 32).sort(dim=1).values - 31.25 * torch.arange(32)
    assert -1 < spread.min() < 1 and 30 < spread.max() <= 31.25    # one from each 32nd of all
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    pipe, data = load_pipeline(trained), ImageFolder(pictures, 32)
    assert z0.std() * pipe.vae.scaling_factor == pytest.approx(3, rel=0.1)
    contexts = sample.encode_prompts(pipe, ["", *data.captions])
    distances = torch.cdist(context.flatten(1), contexts.flatten(1))
    assert distances.min(dim=1).values.max() < 0.05
    caption = distances.argmin(dim=1)                              # its number, or 0: forgotten
    assert 0.04 < (caption == 0).float().mean() < 0.17
    means = 3.0 * pipe.vae.encode(torch.stack([x for x, _ in data])).mean
    picture = torch.cdist(z0.flatten(1), means.flatten(1)).argmin(dim=1)
    own = [k == 0 or data.captions[k - 1] == data.captions[i] for k, i in zip(caption, picture)]
    assert np.mean(own) > 0.95

@pytest.mark.parametrize("more, expected", [
    ("--prediction-type epsilon", 5.0), ("--prediction-type v_prediction", 0.0),
    ("--min-snr 3", 3.0), ("--prediction-type epsilon --min-snr 0", 0.0)])
def test_unet_min_snr_is_5_with_epsilon(more, expected, begin, monkeypatch, learn):
    out, seen = begin("unet"), []
    spy(monkeypatch, train, "diffusion_loss",
        lambda schedule, *given: seen.append((schedule.prediction_type, given[-1])))
    learn("unet", out, f"--steps 1 --batch-size 1 --max-images 9 {more}")
    kind = "epsilon" if "epsilon" in more else "v_prediction"
    assert seen == [(kind, expected)] and load_pipeline(out).schedule.prediction_type == kind

@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_training_in_parts_equals_the_whole_batch(stage, begin, monkeypatch, learn):
    """Compares gradients, before they are clipped to 1."""
    most, counts = [], []
    norms = spy(monkeypatch, torch.nn.utils, "clip_grad_norm_", lambda _, norm: most.append(norm))
    checkpointed = spy(monkeypatch, vae if stage == "vae" else unet, "checkpoint")
    for k, more in enumerate(("", "--grad-accum 2 --grad-checkpoint", "--seed 1")):
        learn(stage, begin(stage, str(k)), f"--steps 3 {more}")
        counts.append(len(checkpointed))
    whole, parts, other = torch.stack(norms).view(3, 3)
    assert counts[0] == 0 and 24 <= counts[1] == counts[2] and most == [1.0] * 9
    assert torch.allclose(parts, whole, rtol=1e-3) and not torch.allclose(other, whole, rtol=1e-2)

def poison(monkeypatch, value):
    """Multiply the VAE's loss by value at its third step."""
    steps = []
    def poisoned(*args):
        loss, mse, kl = vae_loss(*args)
        steps.append(1)
        return loss * (value if len(steps) == 3 else 1.0), mse, kl
    monkeypatch.setattr(train, "vae_loss", poisoned)

def test_training_stops_at_nan_before_a_checkpoint(tmp_path, monkeypatch, attempt):
    poison(monkeypatch, math.nan)
    status, _, message = attempt(tmp_path, "--stage vae --steps 4 --save-every 1")
    assert status == 2 and "NaN" in message and "--lr" in message
    state = read_state(tmp_path, "vae")
    assert state["step"] == 2 and all(p.isfinite().all() for p in state["ema"].values())

def interrupt(monkeypatch, stage, at):
    """Press Ctrl-C in a step of a stage."""
    def press(run):
        if (run.stage, run.step) == (stage, at):
            os.kill(os.getpid(), signal.SIGINT)
    spy(monkeypatch, train.Training, "clip_gradients", press)

def test_training_in_float16_skips_steps_that_overflow(tmp_path, monkeypatch, learn, attempt):
    seen = []
    poison(monkeypatch, math.inf)
    with monkeypatch.context() as patch:
        spy(patch, train, "update_ema", lambda _, m, __: seen.append(next(m.parameters()).clone()))
        interrupt(patch, "vae", 5)
        assert attempt(tmp_path, "--stage vae --dtype float16 --steps 12")[0] == 1
    assert [equal(a, b) for a, b in zip(seen, seen[1:])] == [False, True, False, False, False]
    scale = read_state(tmp_path, "vae")["scaler"]["scale"]
    learn("vae", tmp_path, "--dtype float16 --steps 12 --resume")
    assert scale == read_state(tmp_path, "vae")["scaler"]["scale"] < 2.0**16

PROGRAM = """
import json, os, pathlib, signal, sys
root, preset, kill_at = json.loads(sys.argv.pop(1))
sys.path.insert(0, root)
import torch, sample, train
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
train.PRESETS["mini"] = preset
norms, exchanges = [], []
clip = torch.nn.utils.clip_grad_norm_
def clip_and_record(*args):
    if len(norms) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    norms.append(clip(*args))
    return norms[-1]
torch.nn.utils.clip_grad_norm_ = clip_and_record
def exchange(group, bucket):
    exchanges.append(bucket.is_last())
    return allreduce_hook(group, bucket)
class Counted(train.DistributedDataParallel):
    def __init__(self, model):
        super().__init__(model)
        self.register_comm_hook(None, exchange)
train.DistributedDataParallel = Counted
sample.run_command(train.main, train.parse_args())
results = json.dumps([torch.stack(norms).tolist(), sum(exchanges)])
pathlib.Path(f"record-{train.RANK}.json").write_text(results)
"""

def run_program(folder, launcher, kill_at, *arguments):
    """Train with --steps 8 in processes of their own -> (exit status, errors)."""
    (folder / "program.py").write_text(PROGRAM)
    arguments = [json.dumps([str(HERE), MINI, kill_at]), *map(str, arguments), "--steps", "8"]
    done = python(*launcher, "program.py", *arguments, cwd=folder)
    return done.returncode, done.stderr

def test_processes_two_learn_what_one_does(begin, tmp_path, flags, monkeypatch, learn):
    """And exchange gradients once a step. Compares those before clipping: Adam hides a factor."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    status, err = run_program(tmp_path, launcher, -1, "--out", "two", *flags, "--grad-accum", 2)
    assert status == 0, err
    parallel, exchanges = json.loads((tmp_path / "record-0.json").read_text())
    norms = spy(monkeypatch, torch.nn.utils, "clip_grad_norm_")
    learn("all", begin(name="one"), "--steps 8")
    assert len(norms) == exchanges == sum(STEPS.values())
    assert parallel == pytest.approx(torch.stack(norms).tolist(), rel=1e-2)
    pipes = [load_pipeline(tmp_path / name) for name in ("one", "two")]
    assert decibel(*[draw(pipe, "a hill") for pipe in pipes]) > 45
    assert not list((tmp_path / "two").glob("*.tmp"))

# ---- train.py: checkpoints -----------------------------------------------------------------------

def test_resume_after_ctrl_c_is_bit_for_bit(trained, begin, monkeypatch, attempt, learn):
    """Stage by stage, which equals all of them in one go."""
    for stage, at in (("vae", 5), ("clip", 1), ("unet", 3)):
        steps = f"--steps {STEPS[stage]}"
        with monkeypatch.context() as patch:
            interrupt(patch, stage, at)
            status, _, message = attempt(begin(), f"--stage {stage} {steps}")
        assert (status, message) == (1, "stopped") and read_state(begin(), stage)["step"] == at + 1
        learn(stage, begin(), f"{steps} --resume --grad-accum 1 --workers 1 --save-every 7")
    assert_same_run(trained, begin())

def test_resume_after_kill_9_is_bit_for_bit(trained, begin, tmp_path, flags, learn):
    """Killed in the U-Net's sixth step, when the fourth was saved."""
    out, kill_at = begin(), STEPS["vae"] + STEPS["clip"] + 5
    status, err = run_program(tmp_path, [], kill_at, "--out", "out", *flags, "--save-every", 4)
    assert status == -signal.SIGKILL, err
    assert read_state(out, "unet")["step"] == 4
    learn("all", out, "--steps 8 --resume")
    assert_same_run(trained, out)

class PowerCut(BaseException):
    """Ends a program on the spot: no handler catches it."""

def test_resume_after_a_power_cut_at_any_file(begin, monkeypatch, learn, attempt):
    """At each os.replace of a save the model loads, and the state, which comes last, is whole."""
    more = "--stage unet --steps 2 --save-every 1 --max-images 8"
    whole, moves = begin("unet", "whole"), []
    with monkeypatch.context() as patch:
        spy(patch, os, "replace", lambda old, new: moves.append(Path(new).name))
        learn("all", whole, more)
    start, one, two = [k for k, name in enumerate(moves) if name == "unet.pt"]
    assert start == 0 and two == len(moves) - 1
    for at in range(one + 1, two + 1):
        broken, count = begin("unet", str(at)), []
        with monkeypatch.context() as patch:
            def cut(*_):
                count.append(1)
                if len(count) > at:
                    patch.setattr(shutil, "rmtree", lambda *_, **__: None)     # nor tidies it up
                    raise PowerCut
            spy(patch, os, "replace", cut)
            with pytest.raises(PowerCut):
                attempt(broken, more)
        assert read_state(broken, "unet")["step"] == 1 and load_pipeline(broken)
        if at % 4 == 0 or at == two:
            learn("all", broken, f"{more} --resume")
            assert_same_run(whole, broken)

@pytest.mark.parametrize("more", [
    "--lr 0.01", "--batch-size 4", "--steps 16", "--seed 3", "--image-size 16", "--min-snr 4",
    "--prediction-type epsilon", "--dtype bfloat16", "--preset tiny", "--data OTHER", "--flip"])
def test_resume_with_other_settings_is_refused(more, trained, tmp_path, attempt, pictures):
    if "OTHER" in more:                                            # a single caption is another
        metadata = copy(pictures, tmp_path / "other") / "metadata.jsonl"
        metadata.write_text(metadata.read_text().replace('"text": "', '"text": "a ', 1))
        more = f"--data {tmp_path / 'other'}"
    kept = contents(trained)
    status, _, message = attempt(trained, f"--steps 8 --resume {more}")
    assert status == 2 and "--resume" in message and contents(trained) == kept
    assert more.split()[0] in message

def test_resume_is_the_only_way_to_write_over_a_model(trained, begin, tmp_path, attempt):
    save_clip(tmp_path / "clip", trained)
    part = begin("unet")                                           # a text encoder, but no U-Net
    tuned, foreign = f"--init {trained}", f"--stage unet --text-encoder {tmp_path / 'clip'}"
    again = [(trained, f"--stage {stage}") for stage in ("all", *STEPS)]
    for out, more in (*again, (trained, f"--stage vae {tuned}"), (trained, tuned),
                      (trained, foreign), (part, tuned), (part, foreign)):
        kept = contents(out)
        status, _, message = attempt(out, f"--steps 8 {more}")
        assert status == 2 and "is there already" in message, (more, message)
        assert str(out) in message and contents(out) == kept

# ---- train.py: from the first step to a picture, evaluation --------------------------------------

def test_whole_path_train_then_eval_sample_and_diffusers(trained, tmp_path, pictures):
    out = copy(trained, tmp_path / "out")
    for name in ("samples/vae-000012.png", "samples/unet-000008.png", "log-clip.jsonl"):
        assert (out / name).is_file()
    done = python(train.__file__, "--stage", "eval", "--data", str(pictures), cwd=tmp_path)
    words = "114 pictures of 32x32|PSNR|t0-249|t250-499|t500-749|t750-999|retrieval|R-precision"
    assert done.returncode == 0 and re.findall(words, done.stdout.decode()) == words.split("|")
    assert b"nan" not in done.stdout and (out / "samples/eval.png").is_file()
    done = python(sample.__file__, "dunes at night", cwd=tmp_path)
    assert done.returncode == 0 and Image.open(tmp_path / "out.png").size == (32, 32)
    expected = draw_theirs(trained, "ddim", "fog", num_inference_steps=5, guidance_scale=7.5)
    pipe, data = load_pipeline(trained), ImageFolder(pictures, 32)
    ours = draw(pipe, steps=5, sampler="ddim")
    assert pipe.guidance == 7.5 and decibel(ours, expected) > 45 and pixels(ours[0]).std() > 2
    q = pipe.vae.encode(torch.stack([x for x, _ in data]))
    z = pipe.vae.scaling_factor * q.sample(torch.Generator().manual_seed(0))
    assert z.std().item() == pytest.approx(1, abs=0.1) and abs(pipe.vae.scaling_factor - 1) > 0.15

@pytest.mark.parametrize("preset", ["tiny", "base", "sd15"])
def test_presets_are_published_architectures(preset):
    sizes = train.PRESETS[preset]
    text = dict(CLIPTextEncoder.DEFAULTS, **sizes["text"], vocab_size=sizes["vocab_size"],
                max_position_embeddings=sizes["max_length"])
    with torch.device("meta"):
        ours = dict(vae=VAE(**train.vae_config(preset, sizes["image_size"])),
                    unet=UNet(**sizes["unet"], cross_attention_dim=text["hidden_size"]))
        for room in ours:
            assert shapes(theirs_of(room, ours[room].to_config())) == shapes(ours[room])
        clip = CLIP(text, sizes["vision"], sizes["projection_dim"])
        theirs = transformers.CLIPModel(transformers.CLIPConfig(**clip.to_config()))
        assert shapes(theirs) == shapes(clip) and text["num_hidden_layers"] >= 2
        for size in (32, 64, 128, 256):                            # latents stay near 16x16
            assert preset != "tiny" or VAE(**train.vae_config(preset, size)).f == size // 16

def test_fine_tuning_keeps_the_other_parts(trained, begin, tmp_path, learn, monkeypatch):
    pipe, single = load_pipeline(trained), tmp_path / "model.ckpt"
    torch.save(single_file_state(pipe), single)
    configs = {part: getattr(pipe, part).config for part in PARTS}
    configs["scheduler"] = pipe.schedule.to_config()
    monkeypatch.setattr(sample, "SINGLE_FILE_CONFIGS", {"narrow": configs})
    unet, path = begin(name="unet"), trained / ".." / trained.name             # another spelling
    printed = learn("all", unet, f"--init {trained} --steps 2 --flip --resume")
    assert "228 pictures" in printed and "; unet on" in printed and "nothing to resume" in printed
    assert "captions: 114 from metadata; caption files not used: 0\nfor example: " in printed
    assert "nothing" not in learn("all", unet, f"--init {path} --steps 2 --flip --resume")
    learn("vae", tmp_path / "vae", f"--init {single} --tokenizer {trained} --steps 2")
    old = weights(trained)
    for part, layer in (("unet", "conv_in.weight"), ("vae", "encoder.conv_in.weight")):
        new = weights(tmp_path / part)                             # scaling_factor and all stays
        changed = {path for path in new if new[path] != old[path]} - {"model_index.json"}
        assert changed == {f"{part}/{WEIGHTS}"}
        state = read_state(tmp_path / part, part)
        change = state["model"][layer] - read_state(trained, part)["ema"][layer]
        assert len(state["optimizers"]) == 1 and 0 < change.abs().max() < 3e-5

def test_whole_path_with_a_published_text_encoder(trained, tmp_path, attempt, learn):
    theirs = save_clip(tmp_path / "clip", trained)
    out, judge = tmp_path / "out", f"--text-encoder {tmp_path / 'clip'}"
    assert "vae, unet on" in learn("all", out, f"--steps 2 {judge}")
    ours = load_pipeline(out).text_encoder.state_dict()
    ours = {name.removeprefix("text_model."): tensor for name, tensor in ours.items()}
    assert equal(ours, {name.removeprefix("text_model."): theirs[name] for name in theirs})
    status, _, message = attempt(out, "--stage eval")
    assert status == 2 and "clip" in message                       # it has no CLIP to judge by
    assert "R-precision" in learn("eval", out, judge)

def test_training_vae_clip_and_unet_learn_and_follow_the_prompt(tmp_path, learn, monkeypatch):
    """In bfloat16, on plain colors: they are redrawn, told apart, and drawn as asked."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self)))
    colors = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
    for name in colors:
        for k in range(8):
            save_picture(tmp_path / "data" / name / f"{k}.png", colors[name], (16, 16))
    out = tmp_path / "out"
    for stage, steps in (("vae", 60), ("clip", 25), ("unet", 150)):
        learn(stage, out, f"--data {tmp_path / 'data'} --image-size 16 --batch-size 24 --lr 0.01 "
                          f"--steps {steps} --dtype bfloat16 --compile")
    assert compiled == [VAE, CLIP, UNet]
    logs = [(out / f"log-{stage}.jsonl").read_text().splitlines()[-1] for stage in STEPS]
    vae_log, clip_log, unet_log = map(json.loads, logs)
    assert vae_log["mse"] < 0.03 and clip_log["accuracy"] > 0.9 and unet_log["loss"] < 0.5
    drawn = draw(load_pipeline(out), list(colors), steps=10, guidance=2.0, num_images=4)
    x = torch.cat([picture_to_tensor(picture, 16, 16) for picture in drawn])
    assert (x.mean(dim=(2, 3)).argmax(dim=1) == torch.arange(12) // 4).sum() >= 9  # chance: 4

def test_eval_retrieval_counts_pictures_that_find_their_own_caption():
    # Pictures (rows) prefer captions 0, 1, 0, 3. Captions (columns) prefer pictures 0, 0, 2, 0.
    scores = torch.tensor([[9.0, 8, 1, 8], [2, 3, 0, 2], [5, 1, 4, 1], [1, 2, 0, 3]])
    clip = SimpleNamespace(encode_image=lambda x: x, encode_text=lambda ids: torch.eye(4))
    for x, expected in ((scores, 0.75), (torch.eye(4).roll(1, 0), 0)):
        assert train.retrieval(clip, x, torch.arange(4)[:, None]) == expected

def test_eval_r_precision_is_of_drawn_pictures(trained, pictures, monkeypatch, learn):
    """By a CLIP that knows each real picture: black ones are not worth a caption."""
    val = ImageFolder(pictures, 32, "val")
    real = torch.stack([x for x, _ in val])
    tokenizer = load_pipeline(trained).tokenizer
    known = tokenize(tokenizer, val.captions)
    clip = SimpleNamespace(encode_image=lambda x: -torch.cdist(x.flatten(1), real.flatten(1)),
                           encode_text=lambda ids: (ids[:, None] == known[None]).all(dim=2).float())
    monkeypatch.setattr(train, "load_clip", lambda *_, **__: (clip, tokenizer))
    monkeypatch.setattr(train, "save_sheet", lambda *_, **__: None)
    for x, expected in ((real, ["100", "100"]), (torch.zeros_like(real) - 1, ["100", "17"])):
        monkeypatch.setattr(train, "generate", lambda pipe, prompts, **_: sample.tensor_to_pictures(
            x[[val.captions.index(text) for text in prompts]]))
        printed = learn("eval", trained, "")
        assert re.findall(r"(?:retrieval|R-precision).* (\d+)%", printed) == expected

def test_eval_psnr_is_in_decibels_of_the_peak():
    ae = SimpleNamespace(encode=lambda x: SimpleNamespace(mode=lambda: x + 0.2), decode=lambda z: z)
    assert train.psnr(ae, torch.zeros(12, 3, 8, 8)) == pytest.approx(20, abs=1e-4)

BAD_TRAINING = """
    --steps 0; --batch-size -4; --grad-accum x; --lr nan; --lr inf; --min-snr -1; --image-size 30
    --max-images 0; --seed -1; --save-every 0; --sample-every -1; --workers -1; --stage nope
    --preset huge; --device tpu; --dtype int8; --prediction-type x0; --what; prompt; --data nowhere
    --data words.txt; --data broken; --data cut; --out words.txt; --init nowhere; --init words.txt
    --text-encoder nowhere; --text-encoder broken; --out . --stage unet; --out nowhere --stage eval
    --grad-accum 4 --batch-size 6; --init OUT --stage clip; --text-encoder OUT --stage clip
"""

@pytest.mark.parametrize("more", re.split(r"\s*[;\n]\s*", BAD_TRAINING.strip()))
def test_cli_bad_training_input(more, tmp_path, monkeypatch, attempt, trained):
    """One line names the flag, or the file. Nothing is written."""
    monkeypatch.chdir(tmp_path)
    save_picture(tmp_path / "cut/a.png")
    (tmp_path / "broken").mkdir()
    for name, text in (("words.txt", "words"), ("cut/metadata.jsonl", "{"),
                       ("broken/a.png", "no picture"), ("broken/config.json", "{")):
        (tmp_path / name).write_text(text)
    kept, words = contents(tmp_path), more.split()
    status, _, message = attempt("out", f"--steps 1 {more}".replace("OUT", str(trained)))
    assert status == 2 and (words[0] in message or words[:2][-1] in message), message
    assert contents(tmp_path) == kept

# ---- README.md -----------------------------------------------------------------------------------

README = (HERE / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

def test_readme_commands_parse_and_its_flags_exist(monkeypatch):
    lines = re.findall(r"`([^`\n]*python [^`\n]*\.py[^`\n]*)`", README)
    for language, block in BLOCKS:
        if language == "":
            lines += [line for line in block.splitlines() if ".py" in line]
    seen = []
    for command in " && ".join(lines).split(" && "):
        words = shlex.split(command)
        for k, word in enumerate(words):
            if word in ("train.py", "sample.py"):
                monkeypatch.setattr(sys, "argv", words[k:])
                seen.append({"train.py": train, "sample.py": sample}[word].parse_args())
    assert len(seen) > 12
    line = re.search(r"^.*test_all\.py$", README, re.MULTILINE)[0]    # as .ci/run finds it
    assert line.endswith("&& python test_all.py") and "diffusers>=" in line
    scripts = [(HERE / name).read_text() for name in ("train.py", "sample.py")]
    for flag in re.findall(r"`(--[a-z-]+)", README):
        assert f'"{flag}"' in "".join(scripts), flag
    assert len(README.splitlines()) <= 200

def test_readme_python_blocks_run(trained, tmp_path, monkeypatch):
    copy(trained, tmp_path / "out")
    copy(trained, tmp_path / "assets/model")
    for step in (100, 300, 600, 900):
        Image.new("RGB", (64, 16)).save(tmp_path / f"out/samples/unet-{step:06d}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "generate", functools.partial(generate, steps=2, progress=False))
    cls = diffusers.StableDiffusionPipeline
    in_two_steps = functools.partialmethod(cls.__call__, num_inference_steps=2)
    monkeypatch.setattr(cls, "__call__", in_two_steps)
    for block in [block for language, block in BLOCKS if language == "python"]:
        exec(compile(block, "README.md", "exec"), {})
    shown = re.findall(r'src="(assets/\w+\.png)"', README)
    assert len(shown) >= 4 and all((HERE / name).exists() for name in shown)
    assert all((tmp_path / name).exists() for name in shown if "reconstructions" not in name)

# ---- Benchmarks: python test_all.py --bench ------------------------------------------------------

import importlib.util
import tempfile
import time
from copy import deepcopy

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

class Bench:
    """Measures on one device. The rows of a table take turns, so that all meet the same noise."""

    def __init__(self, device, dtype, turns=5, compile=False):
        self.device, self.dtype, self.turns, self.compile = device, dtype, turns, compile
        side = 8192 if device.type == "cuda" else 2048
        self.matrix = self.random(side, side).to(dtype)

    def random(self, *shape):
        return torch.randn(shape, device=self.device)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def ready(self, model):
        """A model with random weights, to draw with."""
        model = shake(model).to(self.device, self.dtype).requires_grad_(False)
        if self.compile:
            model.compile()
        return model

    def training_step(self, model, loss, optimizers=None):
        """A step of train.py's: loss(model), its gradient, the optimizers, the EMA."""
        model = model.to(self.device)
        ema = deepcopy(model)
        optimizers = optimizers or train.make_optimizers(model, fine_tune=False)
        if self.compile:
            model.compile()
        def gradient():
            with self.autocast():
                value = loss(model)
            value.backward()
        def step():
            gradient()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            update_ema(ema, model, 1000)
        step.counted = gradient                                    # an optimizer's do not count
        return step

    def table(self, title, unit, rows):
        """Time rows {name: (function, units of a call)}, one turn to warm up, and print the rates.

        The share is that of a matrix product's rate, where PyTorch can count the operations.
        """
        works = {"product": lambda: [self.matrix @ self.matrix for _ in range(4)]}
        works |= {name: function for name, (function, units) in rows.items()}
        seconds = {name: [] for name in works}
        for turn in range(self.turns + 1):
            for name, work in works.items():
                start = time.perf_counter()
                work()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                if turn > 0:
                    seconds[name].append(time.perf_counter() - start)
        peak = operations(works["product"]) / min(seconds["product"])
        print(f"\n{title}: {unit}, median (least to most) of {self.turns} turns, and share of the "
              f"{peak / 1e12:.3g} TFLOP/s of a matrix product")
        for name, (work, units) in rows.items():
            rates = units / np.array(seconds[name])
            share = operations(getattr(work, "counted", work)) / np.median(seconds[name]) / peak
            print_row(name, rates, f" {share:.0%}" if share else "")

def print_row(name, rates, share=""):
    """Median, least and most of some rates, and perhaps a share."""
    print(f"  {name:30} {np.median(rates):8.4g} ({min(rates):.4g} to {max(rates):.4g}){share}",
          flush=True)

def operations(work):
    """The multiplications and additions in a call, as PyTorch counts them."""
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if not torch.cuda.is_available():
        kernels = [SDPBackend.MATH]                                # it counts no others on a CPU
    with sdpa_kernel(kernels), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()

def unet_inputs(bench, config, batch, side):
    """Random z_t, t and context."""
    z_t, t = bench.random(batch, 4, side, side), torch.arange(batch, device=bench.device)
    return z_t, t, bench.random(batch, 77, config["cross_attention_dim"])

def denoise(bench, config, batch, side):
    """A function of a U-Net, ours or theirs: the mean square of its output for a random batch."""
    inputs = unet_inputs(bench, config, batch, side)
    def loss(unet):
        output = unet(*inputs)
        return getattr(output, "sample", output).square().mean()
    return loss

def bench_stages(bench, preset="tiny"):
    """The three steps of the default run, with its batches."""
    sizes = train.PRESETS[preset]
    text = {**CLIPTextEncoder.DEFAULTS, **sizes["text"], "vocab_size": sizes["vocab_size"],
            "max_position_embeddings": sizes["max_length"], "eos_token_id": 1}
    x = bench.random(sizes["vae_batch"], 3, sizes["image_size"] // 2, sizes["image_size"] // 2)
    pictures = bench.random(sizes["clip_batch"], 3, sizes["image_size"], sizes["image_size"])
    ids = torch.randint(sizes["vocab_size"], (sizes["clip_batch"], sizes["max_length"]))
    ids = ids.to(bench.device)
    config = {**sizes["unet"], "cross_attention_dim": text["hidden_size"]}
    bench.table("The default run", "samples a second", {
        "VAE": (bench.training_step(VAE(**train.vae_config(preset, sizes["image_size"])),
                lambda vae: vae_loss(vae, x)[0]), len(x)),
        "CLIP": (bench.training_step(CLIP(text, sizes["vision"], sizes["projection_dim"]),
                 lambda clip: contrastive_loss(*clip(pictures, ids), ids)[0]), len(ids)),
        "U-Net": (bench.training_step(UNet(**config),
                  denoise(bench, config, sizes["unet_batch"], 16)), sizes["unet_batch"])})

def bench_training(bench, config, side, batches):
    """A U-Net's training step with AdamW, ours beside diffusers'."""
    ours, theirs = UNet.from_config(config), theirs_of("unet", config)
    for batch in batches:
        rows = {}
        for name, model in {"nanoSD": ours, "diffusers": theirs}.items():
            optimizers = [torch.optim.AdamW(model.parameters())]
            loss = denoise(bench, config, batch, side)
            rows[name] = bench.training_step(model, loss, optimizers), batch
        bench.table(f"Training a U-Net {config['block_out_channels']}, {side}x{side}, {batch} at a "
                    "time, AdamW", "samples a second", rows)

def bench_drawing(bench, config, shapes):
    """A guided step of a U-Net: ours, diffusers', OpenVINO's. First a check that all agree."""
    ours, theirs = bench.ready(UNet.from_config(config)), bench.ready(theirs_of("unet", config))
    theirs.load_state_dict(ours.state_dict(), assign=True)         # one copy, as if alone
    limit = 1e-4 if bench.dtype == torch.float32 else 0.1
    compiled = None
    if importlib.util.find_spec("openvino") and bench.device.type == "cpu":
        import openvino
        example = unet_inputs(bench, config, 2, 8)
        converted = openvino.convert_model(theirs, example_input=example)
        compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for side, batch in shapes:
        z_t, t, context = unet_inputs(bench, config, 2 * batch, side)
        inputs = z_t.to(bench.dtype), t, context.to(bench.dtype)
        works = {"nanoSD": lambda: ours(*inputs), "diffusers": lambda: theirs(*inputs)[0]}
        if compiled:
            works["OpenVINO"] = lambda: torch.from_numpy(compiled([x.numpy() for x in inputs])[0])
        with torch.no_grad():
            expected = works["nanoSD"]()
            for name, work in works.items():
                assert relative(work(), expected) < limit, f"{name} computes something else"
            rows = {name: (work, 1) for name, work in works.items()}
            bench.table(f"Drawing {batch} of {side}x{side}, guided, with a U-Net of "
                        f"{config['block_out_channels']}", "steps a second", rows)

def bench_stable_diffusion_cpp(bench, pipe, sides, steps=6):
    """A guided step of stable-diffusion.cpp with the weights of pipe, and ours in turn.

    It reports progress before its first step and after each. Our step runs inside that report, so
    the time from the end of one report to the start of the next is a step of stable-diffusion.cpp.
    """
    from cyllama.sd.stable_diffusion import SDContext, SDContextParams, set_progress_callback
    state = single_file_state(pipe)
    names = [name for name in state if name.startswith(tuple(sample.PREFIXES.values()))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_single_file({name: state[name] for name in names}, path, "safetensors")
        params = SDContextParams(model_path=str(path))
        params.n_threads = torch.get_num_threads()
        params.free_params_immediately = False                     # more than one picture follows
        context = SDContext(params)
    for side in sides:
        inputs = unet_inputs(bench, pipe.unet.config, 2, side)
        starts, ends = [], []                                      # of our steps

        def progress(step, total, seconds):
            if total == steps:                                     # else it loads weights
                starts.append(time.perf_counter())
                with torch.no_grad():
                    pipe.unet(*inputs)
                ends.append(time.perf_counter())

        set_progress_callback(progress)
        context.generate("fog", width=8 * side, height=8 * side, sample_steps=steps, cfg_scale=7.5)
        starts, ends = np.array(starts), np.array(ends)
        assert len(ends) == steps + 1
        print(f"\nDrawing 1 of {side}x{side}, guided: steps a second, {steps} in turn")
        print_row("nanoSD", 1 / (ends - starts)[1:])               # the first one warms up
        print_row("stable-diffusion.cpp", 1 / (starts[1:] - ends[:-1]))

def bench_growth(bench, folder, preset="tiny"):
    """How the time of a picture grows with their number and size, that of a step with the width."""
    pipe, rows = load_pipeline(folder, bench.device, bench.dtype), {}
    size = pipe.unet.config["sample_size"] * pipe.vae.f
    for count, times in [(1, 1), (4, 1), (16, 1), (1, 2), (1, 4)]:
        name = f"{count} of {times * size}x{times * size}"
        rows[name] = functools.partial(
            generate, pipe, "a landscape", num_images=count, height=times * size,
            width=times * size, progress=False), count
    bench.table(f"Drawing with {folder}, 25 steps", "pictures a second", rows)
    rows = {}
    for factor in (1, 2, 4):
        config = dict(train.PRESETS[preset]["unet"], cross_attention_dim=128)
        config["block_out_channels"] = [factor * c for c in config["block_out_channels"]]
        loss = denoise(bench, config, 8, 16)
        unet = UNet(**config)
        step = bench.training_step(unet, loss, [torch.optim.AdamW(unet.parameters())])
        rows[str(config["block_out_channels"])] = step, 8
    bench.table("Training the default U-Net, wider, 8 at a time, AdamW", "samples a second", rows)

def run_benchmarks(bench):
    """All tables. On a CPU the published U-Net is only drawn with: it would learn for minutes."""
    torch.manual_seed(0)
    narrow = dict(
        UNET_15, block_out_channels=[64, 128, 256],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"])
    bench_stages(bench)
    if bench.device.type == "cuda":
        bench_training(bench, UNET_15, 64, batches=[32, 64])
        bench_drawing(bench, UNET_15, shapes=[(64, 1), (64, 16)])
    else:
        bench_training(bench, narrow, 16, batches=[64])
        bench_drawing(bench, UNET_15, shapes=[(32, 1), (64, 1)])
    bench_growth(bench, HERE / "assets/model")
    if bench.device.type == "cpu" and importlib.util.find_spec("cyllama"):
        # Last, since what it leaves in memory slows others down.
        published = sample.Pipeline(shake(UNet()), shake(VAE()), shake(CLIPTextEncoder()))
        bench_stable_diffusion_cpp(bench, published, sides=[32, 64])

def test_benchmarks_compare_and_count(small, capsys, monkeypatch):
    bench = Bench(torch.device("cpu"), torch.float32, turns=1)
    bench.matrix = bench.random(64, 64)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)        # no OpenVINO
    monkeypatch.setattr(sys.modules[__name__], "generate", functools.partial(generate, steps=1))
    assert operations(lambda: bench.matrix @ bench.matrix) == 2 * 64**3
    attention = functools.partial(F.scaled_dot_product_attention, *bench.random(3, 1, 2, 16, 8))
    assert operations(attention) == 2 * 2 * 2 * 16 * 16 * 8
    narrow = dict(UNET_15, **NARROW_1["unet"])
    bench_stages(bench, "mini")
    bench_training(bench, narrow, 8, [2])
    bench_drawing(bench, narrow, [(8, 1), (8, 2)])
    bench_growth(bench, small, "mini")
    printed = capsys.readouterr().out
    for row, count in {"VAE": 1, "CLIP": 1, "U-Net": 1, "nanoSD": 3, "diffusers": 3,
                       "16 of 64x64": 1, "1 of 256x256": 1, "[64, 128]": 1}.items():
        assert len(re.findall(rf"^  {re.escape(row)} +[0-9.e+]+ \(", printed, re.M)) == count, row
    functions = []                                                 # that report progress

    def fake_generate(prompt, sample_steps, **_):
        for step in range(sample_steps + 1):
            functions[0](step, sample_steps, 0.0)

    cyllama = SimpleNamespace(
        SDContextParams=SimpleNamespace, set_progress_callback=functions.append,
        SDContext=lambda params: SimpleNamespace(generate=fake_generate))
    for name in ("cyllama", "cyllama.sd", "cyllama.sd.stable_diffusion"):
        monkeypatch.setitem(sys.modules, name, cyllama)
    bench_stable_diffusion_cpp(bench, load_pipeline(small), [8])
    assert re.search(r"6 in turn\n  nanoSD .*\n  stable-diffusion.cpp ", capsys.readouterr().out)
    monkeypatch.setattr(UNet, "forward", lambda self, z, *_: z)
    with pytest.raises(AssertionError, match="something else"):
        bench_drawing(bench, narrow, [(8, 1)])

if __name__ == "__main__":
    if "--bench" in sys.argv:
        sample.keep_memory()
        run_benchmarks(Bench(*sample.pick_device(), compile="--compile" in sys.argv))
        sys.exit()
    sys.exit(pytest.main([__file__, "-q", "-p", "no:cacheprovider", "-W", "ignore", *sys.argv[1:]]))
