"""The U-Net: sees a noisy latent, the time and the prompt, and predicts the noise in it.

    eps (or v) = unet(z_t (B, 4, h, w), t (B,), context (B, L, D)) -> (B, 4, h, w)

Why this shape? To tell noise from picture, a network must see the whole scene (is this a sky?) and
the single pixel (is this grain?). A U-Net walks down to a coarse view and back up, and hands the
details of each resolution across: what it understood below, it paints at full detail above. In
Stable Diffusion 1.5, for pictures of 512 x 512:

      z_t 4 @ 64x64                                                        eps 4 @ 64x64
          |                                                                     ^
      320 @ 64x64  R T R T ------------------- skips ------------------> R T R T R T
          | down                                                                | up
      640 @ 32x32  R T R T ------------------- skips ------------------> R T R T R T
          | down                                                                | up
     1280 @ 16x16  R T R T ------------------- skips ------------------> R T R T R T
          | down                                                                | up
     1280 @  8x8   R   R   ------- skips -------> R T R (middle) -----> R   R   R

    R = residual block. The TIME enters here, added to every channel.
    T = transformer. The TEXT enters here. Pixels look at each other (self-attention), then at the
        tokens of the prompt (cross-attention): Q from pixels, K and V from text.

Papers: Ronneberger et al. 2015 (the U); Ho et al. 2020, appendix B (time); Rombach et al. 2022,
section 3.3 (text). With v-prediction the same network predicts v instead of eps: see ddpm.py.

Letters: B batch; C channels; h, w latent size; N = h*w pixels as tokens; L text tokens of width D;
E width of the time embedding; nh attention heads of size hs. Before this file: vae.py,
clip_encoder.py, ddpm.py. Next: sample.py.
"""
import math
import re
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---- Time ----------------------------------------------------------------------------------------

def timestep_embedding(t, dim):
    """t (B,) -> (B, dim): cosines and sines of t at dim/2 frequencies, from 1 to near 1/10000.

    Like the hands of many clocks: fast ones tell t from t + 1, slow ones tell early from late
    (Vaswani et al. 2017, section 3.5). DDPM's code puts the sines first; published weights expect
    the cosines first.
    """
    half = dim // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
    frequencies = torch.exp(-math.log(10000) * exponents)          # (dim/2,)
    angles = t[:, None].float() * frequencies                      # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)

class TimestepEmbedding(nn.Module):
    """Two layers: sinusoidal embedding (B, C) -> time embedding (B, E), for all residual blocks."""

    def __init__(self, channels, temb_channels):
        super().__init__()
        self.linear_1 = nn.Linear(channels, temb_channels)
        self.linear_2 = nn.Linear(temb_channels, temb_channels)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))

# ---- Residual block, down- and upsampling. `config` is that of the UNet below --------------------

class ResnetBlock(nn.Module):
    """x + f(x); f is twice normalize, SiLU, 3x3 convolution. The time is added in between.

    x (B, Cin, h, w), temb (B, E) -> (B, Cout, h, w).
    """

    def __init__(self, in_channels, out_channels, config):
        super().__init__()
        groups, eps = config["norm_num_groups"], config["norm_eps"]
        temb_channels = 4 * config["block_out_channels"][0]
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)    # 1e-5; in the VAE it is 1e-6
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))
        time = self.time_emb_proj(F.silu(temb))                    # (B, Cout): one number a channel
        h = h + time[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + h

class Downsample(nn.Module):
    """Halve height and width. Unlike the VAE's, this convolution pads all four sides."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)

class Upsample(nn.Module):
    """Bring x (B, C, h, w) to `size`, about twice its own: repeat pixels, then smooth."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size):
        return self.conv(F.interpolate(x, size=size, mode="nearest"))

# ---- Text ----------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head attention: x (B, N, C) looks at context (B, L, D), or at itself -> (B, N, C)."""

    def __init__(self, channels, context_channels, heads, upcast):
        super().__init__()
        assert channels % heads == 0, f"{channels} channels do not split into {heads} heads"
        self.heads = heads
        self.upcast = upcast
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])   # published as `to_out.0`

    def forward(self, x, context=None):
        context = x if context is None else context                # no text: self-attention
        q = self.split_heads(self.to_q(x))                         # (B, nh, N, hs)
        k = self.split_heads(self.to_k(context))                   # (B, nh, L, hs)
        v = self.split_heads(self.to_v(context))                   # (B, nh, L, hs)
        dtype = v.dtype
        if self.upcast:                                            # Stable Diffusion 2.1's scores
            q, k, v = q.float(), k.float(), v.float()              # overflow float16
        # softmax(q k^T / sqrt(hs)) v, as clip_encoder.py writes it out, but never holding all
        # N x L scores.
        y = F.scaled_dot_product_attention(q, k, v).to(dtype)      # (B, nh, N, hs)
        y = y.transpose(1, 2).flatten(2)                           # (B, N, C): join the heads
        return self.to_out[0](y)

    def split_heads(self, x):
        """(B, N, C) -> (B, nh, N, hs), with C = nh * hs."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

class GEGLU(nn.Module):
    """value * gelu(gate): what to pass on, and how much (Shazeer 2020). (B, N, C) -> (B, N, 4C)."""

    def __init__(self, channels):
        super().__init__()
        self.proj = nn.Linear(channels, 8 * channels)              # value and gate in one product

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)

class FeedForward(nn.Module):
    """Each token by itself: widen fourfold, gate, narrow again. (B, N, C) -> (B, N, C)."""

    def __init__(self, channels):
        super().__init__()
        # Published as net.0 and net.2. net.1 is a dropout of 0.
        self.net = nn.Sequential(GEGLU(channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x):
        return self.net(x)

class TransformerBlock(nn.Module):
    """Pixels look at each other, then at the text, then each is transformed by itself."""

    def __init__(self, channels, context_channels, heads, upcast):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads, upcast)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_channels, heads, upcast)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)                 # the prompt enters the picture
        return x + self.ff(self.norm3(x))

class SpatialTransformer(nn.Module):
    """x (B, C, h, w) as h*w tokens through a transformer block with context, added back to x."""

    def __init__(self, channels, heads, config):
        super().__init__()
        self.norm = nn.GroupNorm(config["norm_num_groups"], channels, eps=1e-6)    # published so
        if config["use_linear_projection"]:                        # Stable Diffusion 2
            self.proj_in = nn.Linear(channels, channels)
            self.proj_out = nn.Linear(channels, channels)
        else:                                                      # Stable Diffusion 1
            self.proj_in = nn.Conv2d(channels, channels, 1)
            self.proj_out = nn.Conv2d(channels, channels, 1)
        context_channels, upcast = config["cross_attention_dim"], config["upcast_attention"]
        block = TransformerBlock(channels, context_channels, heads, upcast)
        self.transformer_blocks = nn.ModuleList([block])

    def forward(self, x, context):
        B, C, h, w = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(B, h * w, C)
        # A 1x1 convolution is a linear layer on each pixel, so both forms compute the same.
        tokens = F.linear(tokens, self.proj_in.weight.flatten(1), self.proj_in.bias)
        tokens = self.transformer_blocks[0](tokens, context)
        tokens = F.linear(tokens, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + tokens.view(B, h, w, C).permute(0, 3, 1, 2)

# ---- Down, middle, up ----------------------------------------------------------------------------

class DownBlock(nn.Module):
    """One resolution on the way down: (R [T]) for each layer, then halve, but for the coarsest.

    heads None: no transformers. Returns x and the skips.
    """

    def __init__(self, in_channels, out_channels, heads, is_last, config):
        super().__init__()
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()
        self.downsamplers = nn.ModuleList()
        for _ in range(config["layers_per_block"]):
            self.resnets.append(ResnetBlock(in_channels, out_channels, config))
            if heads:
                self.attentions.append(SpatialTransformer(out_channels, heads, config))
            in_channels = out_channels
        if not is_last:
            self.downsamplers.append(Downsample(out_channels))

    def forward(self, x, temb, context):
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsample in self.downsamplers:                       # one, or none
            x = downsample(x)
            skips.append(x)
        return x, skips

class MidBlock(nn.Module):
    """The coarsest view: R T R."""

    def __init__(self, channels, heads, config):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, config) for _ in range(2)])
        self.attentions = nn.ModuleList([SpatialTransformer(channels, heads, config)])

    def forward(self, x, temb, context):
        x = self.resnets[0](x, temb)
        x = self.attentions[0](x, context)
        return self.resnets[1](x, temb)

class UpBlock(nn.Module):
    """One resolution on the way up: join each skip to x, R [T]; double, but for the finest."""

    def __init__(self, in_channels, skip_channels, out_channels, heads, is_last, config):
        super().__init__()
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()
        self.upsamplers = nn.ModuleList()
        for channels in skip_channels:
            self.resnets.append(ResnetBlock(in_channels + channels, out_channels, config))
            if heads:
                self.attentions.append(SpatialTransformer(out_channels, heads, config))
            in_channels = out_channels
        if not is_last:
            self.upsamplers.append(Upsample(out_channels))

    def forward(self, x, skips, temb, context, size):
        for i, resnet in enumerate(self.resnets):
            x = torch.cat([x, skips[i]], dim=1)
            x = resnet(x, temb)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:                           # one, or none
            x = upsample(x, size)
        return x

class UNet(nn.Module):
    """The noise predictor. `UNet()` is Stable Diffusion 1.5's."""

    DEFAULTS = dict(
        in_channels=4,                                # 9 for inpainting: z_t, mask, masked picture
        block_out_channels=(320, 640, 1280, 1280),    # width of each level, finest first
        down_block_types=(                            # which levels have transformers
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        layers_per_block=2,                           # R [T] a level; on the way up one more
        attention_head_dim=8,                         # the NUMBER of heads, in spite of its name;
                                                      # one for all levels, or a list
        cross_attention_dim=768,                      # D, width of the text states
        norm_num_groups=32,                           # of every GroupNorm
        norm_eps=1e-5,                                # of the residual blocks' GroupNorm
        use_linear_projection=False,                  # True in Stable Diffusion 2
        upcast_attention=False,                       # True in Stable Diffusion 2.1
        mid_block_type="UNetMidBlock2DCrossAttn",     # None: no middle, in some distilled models
        sample_size=64,                               # h and w that it was trained with
    )

    def __init__(self, **config):
        super().__init__()
        self.config = config = {**self.DEFAULTS, **config}
        widths, layers = config["block_out_channels"], config["layers_per_block"]
        heads = config["attention_head_dim"]
        if isinstance(heads, int):
            heads = [heads for _ in widths]
        mid_heads = heads[-1]                          # a middle always has a transformer
        attends = [kind == "CrossAttnDownBlock2D" for kind in config["down_block_types"]]
        heads = [heads[i] if attends[i] else None for i in range(len(widths))]

        self.conv_in = nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])

        self.down_blocks = nn.ModuleList()
        channels = widths[0]
        skips = [channels]                             # widths of what the way up will take
        for i, width in enumerate(widths):
            is_last = i == len(widths) - 1
            self.down_blocks.append(DownBlock(channels, width, heads[i], is_last, config))
            skips += [width for _ in range(layers if is_last else layers + 1)]
            channels = width

        self.mid_block = None
        if config["mid_block_type"]:
            self.mid_block = MidBlock(channels, mid_heads, config)

        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(widths))):
            taken = [skips.pop() for _ in range(layers + 1)]
            self.up_blocks.append(UpBlock(channels, taken, widths[i], heads[i], i == 0, config))
            channels = widths[i]
        assert not skips, f"{len(skips)} skips are left over"

        groups, eps = config["norm_num_groups"], config["norm_eps"]
        self.conv_norm_out = nn.GroupNorm(groups, channels, eps=eps)
        self.conv_out = nn.Conv2d(channels, 4, 3, padding=1)
        self.grad_checkpoint = False                   # True: less memory, more time (run_block)
        # All residual branches start at 0, and so does the output: the first loss of eps is 1.
        for name, p in self.named_parameters():
            if re.search("conv2|proj_out|conv_out", name):
                nn.init.zeros_(p)

    @classmethod
    def from_config(cls, config):
        """Build from a published unet/config.json (a dict).

        ValueError names a key that asks for what this code does not do. Unknown keys are ignored.
        """
        required = dict(
            act_fn="silu",
            addition_embed_type=None,
            attention_type="default",
            center_input_sample=False,
            class_embed_type=None,
            conv_in_kernel=3,
            conv_out_kernel=3,
            cross_attention_norm=None,
            downsample_padding=1,
            dual_cross_attention=False,
            encoder_hid_dim_type=None,
            flip_sin_to_cos=True,
            freq_shift=0,
            mid_block_scale_factor=1,
            num_attention_heads=None,
            num_class_embeds=None,
            only_cross_attention=False,
            out_channels=4,
            resnet_out_scale_factor=1.0,
            resnet_time_scale_shift="default",
            time_cond_proj_dim=None,
            time_embedding_type="positional",
            timestep_post_act=None,
            transformer_layers_per_block=1,
        )
        for key, value in required.items():
            given = config.get(key, value)
            if given is None and value is False:
                given = False
            if given != value:
                raise ValueError(f"{key} = {given!r} is not supported, only {value!r}")
        # null means: no middle block, no preferred size, or False. Elsewhere it is an error.
        unet = {**cls.DEFAULTS, "cross_attention_dim": 1280, **config}         # as in diffusers
        unet["sample_size"] = unet["sample_size"] or cls.DEFAULTS["sample_size"]
        for key, value in cls.DEFAULTS.items():
            if unet[key] is None and value is not False and key != "mid_block_type":
                raise ValueError(f"{key} = null is not supported")
        if not isinstance(unet["sample_size"], int):
            raise ValueError(f"sample_size = {unet['sample_size']!r} is not a whole number")
        if unet["mid_block_type"] not in (None, cls.DEFAULTS["mid_block_type"]):
            raise ValueError(f"mid_block_type = {unet['mid_block_type']!r} is not supported")
        kinds = unet["down_block_types"]
        if not set(kinds) <= {"CrossAttnDownBlock2D", "DownBlock2D"}:
            raise ValueError("down_block_types: only CrossAttnDownBlock2D and DownBlock2D")
        mirrored = [kind.replace("Down", "Up") for kind in reversed(kinds)]
        if list(config.get("up_block_types", mirrored) or []) != mirrored:
            raise ValueError(f"up_block_types: should mirror down_block_types: {mirrored}")
        for key in ("down_block_types", "attention_head_dim"):
            levels = len(unet["block_out_channels"])
            if not isinstance(unet[key], int) and len(unet[key]) != levels:
                raise ValueError(f"{key}: should have {levels} entries, as block_out_channels has")
        return cls(**{key: unet[key] for key in cls.DEFAULTS})

    def to_config(self):
        """The dict that belongs in unet/config.json, with diffusers' keys."""
        kinds = self.config["down_block_types"]
        return dict(
            self.config,
            _class_name="UNet2DConditionModel",
            out_channels=4,
            up_block_types=[kind.replace("Down", "Up") for kind in reversed(kinds)],
        )

    def run_block(self, block, *inputs):
        if self.grad_checkpoint:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def forward(self, z_t, t, context):
        """z_t (B, 4, h, w), t (B,) in [0, T), context (B, L, D) -> eps or v, (B, 4, h, w)."""
        # Every residual block reads the same embedding of t. Shapes are Stable Diffusion 1.5's.
        sinusoids = timestep_embedding(t, self.config["block_out_channels"][0])    # (B, 320)
        temb = self.time_embedding(sinusoids.to(z_t.dtype))        # (B, 1280)

        x = self.conv_in(z_t)                                      # (B,  320, h,   w)
        skips = [x]
        for block in self.down_blocks:                             # (B, 1280, h/8, w/8)
            x, block_skips = self.run_block(block, x, temb, context)
            skips += block_skips

        if self.mid_block is not None:
            x = self.run_block(self.mid_block, x, temb, context)   # (B, 1280, h/8, w/8)

        for block in self.up_blocks:                               # (B,  320, h,   w)
            taken = [skips.pop() for _ in block.resnets]           # last in, first out
            # Upsample to the next skip's size. Twice this one misses it if an odd size was halved.
            size = skips[-1].shape[2:] if skips else None
            x = self.run_block(block, x, taken, temb, context, size)

        return self.conv_out(F.silu(self.conv_norm_out(x)))        # (B,    4, h,   w)

# ---- Published weights ---------------------------------------------------------------------------

def rename_published(state):
    """{name: tensor} under any published names -> the same under the names used here.

    The original release lists conv_in and then each level's blocks and downsampler as input_blocks,
    the way up as output_blocks. In an entry, .0 is the residual block, .1 the transformer, the last
    one the upsampler. Current names pass unchanged.
    """
    downsamplers = [int(name.split(".")[1]) for name in state if name.endswith(".0.op.weight")]
    per_level = min(downsamplers, default=3)                       # entries a level; 3: published

    def rename_entry(match):
        way, entry, part = match[1], int(match[2]), match[3]
        level, index = divmod(entry - 1 if way == "in" else entry, per_level)
        prefix = f"down_blocks.{level}" if way == "in" else f"up_blocks.{level}"
        if part == "0.op":
            return f"{prefix}.downsamplers.0.conv."
        if part in ("1.conv", "2.conv"):
            return f"{prefix}.upsamplers.0.conv."
        return f"{prefix}.{'attentions' if part == '1' else 'resnets'}.{index}."

    rules = [
        (r"^input_blocks\.0\.0\.", "conv_in."),
        (r"^(in|out)put_blocks\.(\d+)\.(0\.op|[12]\.conv|0|1)\.", rename_entry),
        (r"^middle_block\.0\.", "mid_block.resnets.0."),
        (r"^middle_block\.1\.", "mid_block.attentions.0."),
        (r"^middle_block\.2\.", "mid_block.resnets.1."),
        (r"^time_embed\.0\.", "time_embedding.linear_1."),
        (r"^time_embed\.2\.", "time_embedding.linear_2."),
        (r"\.in_layers\.0\.", ".norm1."),
        (r"\.in_layers\.2\.", ".conv1."),
        (r"\.emb_layers\.1\.", ".time_emb_proj."),
        (r"\.out_layers\.0\.", ".norm2."),
        (r"\.out_layers\.3\.", ".conv2."),
        (r"\.skip_connection\.", ".conv_shortcut."),
        (r"^out\.0\.", "conv_norm_out."),
        (r"^out\.2\.", "conv_out."),
    ]
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed
