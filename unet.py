"""The U-Net: looks at a noisy latent, the time and the prompt, and says which noise was added (or v: ddpm.py).

    eps = unet(z_t (B, 4, h, w), t (B,), context (B, M, D)) -> (B, 4, h, w)

Why this shape? To tell noise from picture, a network must see the whole scene (is this a sky?) and the single pixel (is
this grain?). A U-Net walks down to a coarse view and back up, and hands each resolution's details across, so that what
it understood below is painted at full detail above. Numbers: Stable Diffusion 1.5 at 512 x 512.

      z_t 4 @ 64x64                                                        eps 4 @ 64x64
          |                                                                     ^
      320 @ 64x64  R T R T ------------------- skips ------------------> R T R T R T
          | down                                                                | up
      640 @ 32x32  R T R T ------------------- skips ------------------> R T R T R T
          | down                                                                | up
     1280 @ 16x16  R T R T ------------------- skips ------------------> R T R T R T
          | down                                                                | up
     1280 @  8x8   R   R   -------- skips --------> R T R (middle) ---> R   R   R

    R = residual block: here the TIME enters, added to every channel.
    T = transformer: here the TEXT enters. Pixels look at each other (self-attention), then at the prompt's words
        (cross-attention): Q = pixels, K and V = text (Rombach et al. 2022, section 3.3).

Papers: Ronneberger et al. 2015 (the U); Ho et al. 2020, appendix B (with time); Rombach et al. 2022 (with text).
Letters: B batch; C channels; h, w latent size; N = h*w pixels as tokens; M words (before: T) of width D; E time width.
Before this file: vae.py, clip_encoder.py, ddpm.py. Read next: sample.py."""
import functools, math, os, pickle, re, unittest.mock
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint
from vae import Attention, Downsample, ResnetBlock, Upsample, attend, supported

# ---- Time ------------------------------------------------------------------------------------------------------------
def timestep_embedding(t, dim):
    """t (B,) -> (B, dim): cosines and sines at dim/2 frequencies, from 1 to near 1/10000 (Vaswani et al. 2017, 3.5).

    Like the hands of many clocks: fast ones tell t from t + 1, slow ones tell early from late. The paper writes sine
    first; the published weights expect cosine first."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t[:, None].float() * frequencies                      # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)

class TimestepEmbedding(nn.Module):
    """Two layers that turn the clock (B, dim) into features (B, E) for all residual blocks."""
    def __init__(self, dim, temb_channels):
        super().__init__()
        self.linear_1 = nn.Linear(dim, temb_channels)
        self.linear_2 = nn.Linear(temb_channels, temb_channels)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))

class AttentionPooling(nn.Module):
    """Words (B, M, D) -> one vector (B, D): a query asks all words, and their mean, what the sentence says.
    Trained here it stays a mean: queries and keys start at 0, and the gradient of each is a multiple of the other. If
    it attended, "sunset" would outvote a "forest" never seen with it (73 % had their forest; with the mean 100 %)."""
    def __init__(self, channels, heads):
        super().__init__()
        if channels % heads:
            raise ValueError(f"config.json: addition_embed_type_num_heads = {heads} does not divide {channels}")
        self.heads = heads
        self.positional_embedding = nn.Parameter(nn.init.normal_(torch.empty(1, channels), std=channels ** -0.5))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        for parameter in (*self.q_proj.parameters(), *self.k_proj.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x):
        query = x.mean(dim=1, keepdim=True) + self.positional_embedding
        x = torch.cat([query, x], dim=1)                           # (B, 1 + M, D)
        def split(y):                                              # (B, L, D) -> (B, heads, L, D/heads)
            return y.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return attend(split(self.q_proj(query)), split(self.k_proj(x)), split(self.v_proj(x))).flatten(1)      # (B, D)

class TextTimeEmbedding(nn.Module):
    """The whole sentence (B, M, D) as one vector (B, E), added to the time embedding. Not in Stable Diffusion.
    Cross-attention lets each pixel pick its words; this tells every residual block "night, dunes" at once. At latents
    of unit variance 96 % of pictures had all that was asked for (without it 93 %), of pairs never shown 93 % (94 %)."""
    def __init__(self, channels, temb_channels, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.pool = AttentionPooling(channels, heads)
        self.proj = nn.Linear(channels, temb_channels)
        self.norm2 = nn.LayerNorm(temb_channels)

    def forward(self, context):
        return self.norm2(self.proj(self.pool(self.norm1(context))))

# ---- Text ------------------------------------------------------------------------------------------------------------
class GEGLU(nn.Module):
    """value * gelu(gate): what to say, and how much of it (Shazeer 2020). (B, N, C) -> (B, N, inner)."""
    def __init__(self, channels, inner):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)                 # value and gate in one product

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)

class FeedForward(nn.Module):
    """Each token thinks for itself: widen fourfold, gate, narrow again. (B, N, C) -> (B, N, C)."""
    def __init__(self, channels):
        super().__init__()
        # Published as net.0 and net.2; net.1 was a dropout.
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x):
        return self.net[2](self.net[0](x))

class TransformerBlock(nn.Module):
    """Pixels look at each other, then at the words, then think. (B, N, C), (B, M, D) -> (B, N, C)."""
    def __init__(self, channels, context_channels, heads, upcast):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads=heads, upcast=upcast)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_channels, heads, upcast=upcast)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)                 # the prompt enters the picture (also: add_embedding)
        return x + self.ff(self.norm3(x))

class SpatialTransformer(nn.Module):
    """A picture (B, C, h, w) as a sequence of h*w tokens, through a transformer block, added back to the picture."""
    def __init__(self, channels, context_channels, heads, groups, linear, upcast):
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)       # residual blocks have 1e-5: both as published
        projection = nn.Linear if linear else lambda a, b: nn.Conv2d(a, b, 1)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_channels, heads, upcast)])
        self.proj_out = projection(channels, channels)
        nn.init.zeros_(self.proj_out.weight)                       # starts as the identity, like the residual blocks
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x, context):
        B, C, h, w = x.shape
        # A 1x1 convolution is a linear layer on each pixel. Stable Diffusion 1 stores one, 2 the other.
        tokens = self.norm(x) if self.linear else self.proj_in(self.norm(x))
        tokens = tokens.permute(0, 2, 3, 1).reshape(B, h * w, C)
        tokens = self.proj_in(tokens) if self.linear else tokens
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        tokens = self.proj_out(tokens) if self.linear else tokens
        y = tokens.view(B, h, w, C).permute(0, 3, 1, 2)
        return x + (y if self.linear else self.proj_out(y))

# ---- Down, middle, up ------------------------------------------------------------------------------------------------
class DownBlock(nn.Module):
    """One resolution on the way down: (R [T]) * layers, then halve. Returns what goes on, and every skip."""
    def __init__(self, in_channels, channels, layers, resnet, transformer=None, last=False):
        super().__init__()
        self.resnets = nn.ModuleList(resnet(channels if i else in_channels, channels) for i in range(layers))
        if transformer:
            self.attentions = nn.ModuleList(transformer(channels) for _ in range(layers))
        if not last:
            self.downsamplers = nn.ModuleList([Downsample(channels, pad_all_sides=True)])

    def forward(self, x, temb, context):
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips

class MidBlock(nn.Module):
    """The coarsest view: R T R."""
    def __init__(self, channels, resnet, transformer):
        super().__init__()
        self.resnets = nn.ModuleList(resnet(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([transformer(channels)])

    def forward(self, x, temb, context):
        return self.resnets[1](self.attentions[0](self.resnets[0](x, temb), context), temb)

class UpBlock(nn.Module):
    """One resolution on the way up: take a skip, R [T], for every skip of this level; then double."""
    def __init__(self, in_channels, skip_channels, channels, resnet, transformer=None, last=False):
        super().__init__()
        self.resnets = nn.ModuleList(resnet((channels if i else in_channels) + skip, channels)
                                     for i, skip in enumerate(skip_channels))
        if transformer:
            self.attentions = nn.ModuleList(transformer(channels) for _ in skip_channels)
        if not last:
            self.upsamplers = nn.ModuleList([Upsample(channels)])

    def forward(self, x, skips, temb, context, size):
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips[-1 - i]], dim=1), temb) # last in, first out
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context)
        return self.upsamplers[0](x, size) if hasattr(self, "upsamplers") else x

# What train.py builds, see its --preset. tiny attends at its coarsest level alone: in equal time as good as at two.
UNET_SIZES = {
    "tiny": dict(block_out_channels=(64, 128, 128), layers_per_block=1, attention_head_dim=16, norm_num_groups=8,
                 down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
                 addition_embed_type="text", addition_embed_type_num_heads=4),
    "base": dict(block_out_channels=(128, 256, 512), down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
                 addition_embed_type="text", addition_embed_type_num_heads=8), "sd15": {}}

class UNet(nn.Module):
    """The noise predictor. `UNet()` is Stable Diffusion 1.5's; `from_config` takes a published unet/config.json.

    block_out_channels    width of each level, finest first
    down_block_types      "CrossAttnDownBlock2D" (with transformers) or "DownBlock2D", per level; the up path mirrors it
    attention_head_dim    the NUMBER of attention heads, for all levels or per level: the published name is a misnomer
    use_linear_projection, upcast_attention          Stable Diffusion 2's variants: see SpatialTransformer and Attention
    addition_embed_type   None, or "text": add the whole sentence to the time embedding: see TextTimeEmbedding
    in_channels           4; 9 for inpainting (z_t, mask, latent of the masked picture)"""
    def __init__(self, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
                 down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=None,
                 attention_head_dim=8, cross_attention_dim=768, norm_num_groups=32, norm_eps=1e-5,
                 use_linear_projection=False, upcast_attention=False, addition_embed_type=None,
                 addition_embed_type_num_heads=64, sample_size=64):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        channels, levels = tuple(block_out_channels), len(block_out_channels)
        heads = attention_head_dim if isinstance(attention_head_dim, tuple) else (attention_head_dim,) * levels
        attends = [name == "CrossAttnDownBlock2D" for name in down_block_types]
        for name in set(down_block_types) - {"CrossAttnDownBlock2D", "DownBlock2D"}:
            raise ValueError(f"config.json: down_block_types: {name!r} is not CrossAttnDownBlock2D or DownBlock2D")
        mirrored = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends))
        if tuple(up_block_types or mirrored) != mirrored or not len(attends) == len(heads) == levels:
            raise ValueError("config.json: *_block_types, attention_head_dim, block_out_channels are not of one ladder")
        side = max(sample_size) if isinstance(sample_size, tuple) else sample_size
        self.config |= dict(block_out_channels=channels, up_block_types=mirrored, sample_size=side)
        temb = 4 * channels[0]
        def resnet(cin, cout):
            return ResnetBlock(cin, cout, norm_num_groups, norm_eps, temb)
        def transformer(level):
            return lambda c: SpatialTransformer(c, cross_attention_dim, heads[level], norm_num_groups,
                                                use_linear_projection, upcast_attention)
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], temb)
        if addition_embed_type == "text":
            self.add_embedding = TextTimeEmbedding(cross_attention_dim, temb, addition_embed_type_num_heads)
        elif addition_embed_type is not None:
            raise ValueError(f"config.json: addition_embed_type = {addition_embed_type!r} is not 'text' or null")
        self.down_blocks, skips = nn.ModuleList(), [channels[0]]   # skips: channels of what the way up will take
        for i, c in enumerate(channels):
            last = i == levels - 1
            self.down_blocks.append(DownBlock(channels[max(i - 1, 0)], c, layers_per_block, resnet,
                                              transformer(i) if attends[i] else None, last))
            skips += [c] * (layers_per_block + (not last))
        self.mid_block = MidBlock(channels[-1], resnet, transformer(levels - 1))
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(levels)):                          # one block more per level than on the way down
            taken = [skips.pop() for _ in range(layers_per_block + 1)]
            self.up_blocks.append(UpBlock(channels[min(i + 1, levels - 1)], taken, channels[i], resnet,
                                          transformer(i) if attends[i] else None, last=i == 0))
        assert not skips, f"{len(skips)} skips are never used"
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels[0], eps=norm_eps)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)                       # first guess: 0; the loss of eps starts at 1
        nn.init.zeros_(self.conv_out.bias)
        self.grad_checkpoint = False

    @classmethod
    def from_config(cls, config):
        """Build from a published unet/config.json (a dict). ValueError names a key that asks for something else."""
        config = {"cross_attention_dim": 1280, **config}           # diffusers' default where a file leaves it out
        if re.match(r"0\.[0-8]\.", str(config.get("_diffusers_version"))) and config.get("sample_size") == 32:
            config["sample_size"] = 64             # a slip of early converters: Stable Diffusion 1 was trained at 64
        return cls(**supported(config, cls, dict(
            act_fn="silu", center_input_sample=False, flip_sin_to_cos=True, freq_shift=0, downsample_padding=1,
            mid_block_type="UNetMidBlock2DCrossAttn", mid_block_scale_factor=1, resnet_time_scale_shift="default",
            resnet_out_scale_factor=1.0, time_embedding_type="positional", conv_in_kernel=3, conv_out_kernel=3,
            transformer_layers_per_block=1, attention_type="default", only_cross_attention=False)))

    def to_config(self):
        """The dict that belongs in unet/config.json, in diffusers' words."""
        return {"_class_name": "UNet2DConditionModel", **self.config}

    current_names = staticmethod(dict)                             # published U-Nets have always had the same names

    @staticmethod
    def from_original(state):
        """Weights of the original release (a dict, prefix removed) -> (config, the same under the names used here).

        input_blocks lists conv_in, then each level's blocks and its downsampler, "op"; output_blocks the way up. In a
        block, 0 is the residual block, 1 the transformer, the last the upsampler. Heads, not told, are as in 1 or 2."""
        ends = sorted(int(k.split(".")[1]) for k in state if k.endswith(".0.op.weight"))
        n = ends[0]                                                # entries of each level: 3
        def block(m):
            i, j = divmod(int(m[2]) - (m[1] == "in"), n)
            return f"{'down' if m[1] == 'in' else 'up'}_blocks.{i}.{'attentions' if m[3] == '1' else 'resnets'}.{j}"
        for old, new in (
                (r"^input_blocks\.0\.0", "conv_in"), (r"^out\.0", "conv_norm_out"), (r"^out\.2", "conv_out"),
                (r"^input_blocks\.(\d+)\.0\.op", lambda m: f"down_blocks.{int(m[1]) // n - 1}.downsamplers.0.conv"),
                (r"^output_blocks\.(\d+)\.\d\.conv", lambda m: f"up_blocks.{int(m[1]) // n}.upsamplers.0.conv"),
                (r"^(in|out)put_blocks\.(\d+)\.([01])", block), (r"^middle_block\.1", "mid_block.attentions.0"),
                (r"^middle_block\.([02])", lambda m: f"mid_block.resnets.{int(m[1]) // 2}"),
                (r"^time_embed\.([02])", lambda m: f"time_embedding.linear_{int(m[1]) // 2 + 1}"),
                (r"in_layers\.0", "norm1"), (r"in_layers\.2", "conv1"), (r"emb_layers\.1", "time_emb_proj"),
                (r"out_layers\.0", "norm2"), (r"out_layers\.3", "conv2"), (r"skip_connection", "conv_shortcut")):
            state = {re.sub(old, new, k): x for k, x in state.items()}
        channels = [state[f"down_blocks.{i}.resnets.0.conv2.weight"].size(0) for i in range(len(ends) + 1)]
        attends = [f"down_blocks.{i}.attentions.0.proj_in.weight" in state for i in range(len(ends) + 1)]
        linear = state["mid_block.attentions.0.proj_in.weight"].dim() == 2          # Stable Diffusion 2
        return dict(
            in_channels=state["conv_in.weight"].size(1), block_out_channels=channels, layers_per_block=n - 1,
            down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            cross_attention_dim=state["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].size(1),
            attention_head_dim=[max(c // 64, 1) for c in channels] if linear else 8,
            norm_num_groups=math.gcd(32, *channels), use_linear_projection=linear, upcast_attention=linear), state

    def set_grad_checkpoint(self, on=True):
        """Trade time for memory: forget activations inside each block and compute them again for the backward pass."""
        self.grad_checkpoint = on

    def forward(self, z_t, t, context):
        """z_t (B, 4, h, w), t (B,) integers in [0, 1000), context (B, M, D) -> predicted noise (or v), (B, 4, h, w)."""
        def run(block, *args):
            return checkpoint(block, *args, use_reentrant=False) if self.grad_checkpoint else block(*args)
        # When and what: the time (B, 1280), and where the model has it the sentence as a whole.
        temb = self.time_embedding(timestep_embedding(t, self.config["block_out_channels"][0]).to(z_t.dtype))
        if hasattr(self, "add_embedding"):
            temb = temb + self.add_embedding(context)
        x = self.conv_in(z_t)                                      # (B,  320, h,   w)      Stable Diffusion 1.5
        skips = [x]
        for block in self.down_blocks:                             # (B, 1280, h/8, w/8)
            x, details = run(block, x, temb, context)
            skips += details
        x = run(self.mid_block, x, temb, context)                  # (B, 1280, h/8, w/8)
        for block in self.up_blocks:                               # (B,  320, h,   w)
            n = len(block.resnets)
            taken, skips = skips[-n:], skips[:-n]
            # The next skip's size, not twice this one's: an odd height, halved and doubled, would not come back.
            x = run(block, x, taken, temb, context, skips[-1].shape[2:] if skips else None)
        return self.conv_out(F.silu(self.conv_norm_out(x)))        # (B,    4, h,   w)

# ---- Published weights: from a file into this model or those before it, and onto a device ----------------------------
def read_weights(path, dtype_of):
    """A file -> {name: tensor}. A .safetensors is opened anew every 16 tensors: so memory holds them once.
    dtype_of(name): a torch.dtype, or None to leave the tensor out. A pickle (.ckpt, .bin) may ask Python to call any
    function at all: weights_only refuses what tensors do not need. One name is let through, to an empty class, because
    Lightning leaves it in its files. Convolutions are fastest with a pixel's channels side by side: channels_last."""
    if path.endswith(".safetensors"):
        opened = functools.lru_cache(1)(lambda sixteen: safe_open(path, "pt"))      # anew: what was read is let go
        names, read = opened(0).keys(), lambda name, k: opened(k // 16).get_tensor(name)
    else:
        lightning = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
        try:
            with torch.serialization.safe_globals([(type("ModelCheckpoint", (), {}), lightning)]):
                state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
            names, read = [k for k, x in state.items() if torch.is_tensor(x)], lambda name, _: state.pop(name)
        except (pickle.UnpicklingError, AttributeError) as e:      # its message names what is refused, up to protocol 3
            raw = open(path, encoding="latin-1").read(2 ** 20)     # from 4 on: module, name, the byte 0x93
            new = re.findall(r"\x8c.((?!torch[\x94\x8c]|torch\._|collect)[\w.]+)\x94?\x8c.(\w+)\x94?\x93", raw, re.S)
            asked = re.findall(r"GLOBAL (\S+)", str(e)) + [".".join(pair) for pair in new]
            why = f"refused: it asks for {asked[0]}, which weights do not need" if asked else "not a file of weights"
            raise ValueError(why) from None
        for x in map(state.get, names):                            # one number, repeated, may fill any memory
            if x.layout != torch.strided or x.is_meta or x.untyped_storage().nbytes() < x.nbytes:
                raise ValueError("a file of sparse, empty or repeated tensors")
    return {name: x.to(dtype_of(name), memory_format=torch.channels_last if x.dim() == 4 else torch.preserve_format)
            for k, name in enumerate(names) if dtype_of(name) for x in [read(name, k)]}

def assemble(model, config, state, strays=False):
    """A class, its published config and weights (dicts) -> the module, in eval mode. ValueError names a misfit.
    Passes over position_ids, a table of 0, 1, 2, ..., and, if strays, over any other tensor without a place in it."""
    # Shapes alone: no memory, and no random numbers, for which the meta device imports a compiler (1.1 seconds).
    with torch.device("meta"), unittest.mock.patch.object(nn.init, "normal_", lambda x, *_, **__: x):
        module = model.from_config(config)
    wanted = {k: tuple(x.shape) for k, x in module.state_dict().items()}
    state = {k: x for k, x in state.items() if k in wanted or not strays and not k.endswith("position_ids")}
    for k in (*wanted, *state):
        shape = tuple(state[k].shape) if k in state else "missing"
        if shape != wanted.get(k):
            raise ValueError(f"the weights do not fit the config: {k} is {shape}, should be {wanted.get(k, 'absent')}")
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)

def pick_device(device="auto", dtype="auto"):
    """Names as on the command line -> (torch.device, torch.dtype), for the models: by default what the machine is built
    for. Schedules and samplers compute in float32 all the same. ValueError where there is no such device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available() or device == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"this machine has no {device}; try --device cpu")
    if dtype == "auto":
        if device == "cpu":                                        # bfloat16 pays where the processor multiplies it
            built = [getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("amx_tile", "avx512_bf16")]
            dtype = "bfloat16" if any(built) else "float32"
        else:
            dtype = "bfloat16" if device == "cuda" and torch.cuda.get_device_capability()[0] >= 8 else "float16"
    if device == "cuda":                                           # to each process that torchrun starts its own
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(device), getattr(torch, dtype)
