"""The variational autoencoder (VAE): pictures to small latents, and back.

    x (B, 3, H, W) in [-1, 1] --encode--> q(z|x) = N(mu, sigma^2) --sample--> z (B, 4, h, w) --decode--> x' (B, 3, H, W)

Why compress at all? Most of a picture's numbers are fine grain that the eye barely notices, yet a diffusion model would
spend most of its work on predicting them. So two models share the job (Rombach et al. 2022, section 3): the VAE learns,
once, which few numbers are enough to redraw a picture (in Stable Diffusion 4 x 64 x 64 instead of 3 x 512 x 512, 48
times fewer); the diffusion model then lives entirely in them.

Why *variational*? A plain autoencoder may scatter its codes anywhere, with gaps where the decoder draws rubbish, and a
generator would fall into the gaps. A VAE encodes each picture not as a point but as a small Gaussian cloud and asks the
decoder to redraw from any point of it, while the clouds are pulled towards N(0, I). The gaps close.

Papers: Kingma & Welling 2013, "Auto-Encoding Variational Bayes"; Rombach et al. 2022, "High-Resolution Image Synthesis
with Latent Diffusion Models". Names and defaults are the published Stable Diffusion 1.5's. Read next: clip_encoder.py.
Letters: B pictures; C channels; H, W their size; h = H/f, w = W/f the latents', f = 2**(levels - 1); N = h*w tokens."""
import inspect, itertools, math, re
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.checkpoint import checkpoint

# ---- Leaves: attention, the residual block, down- and upsampling. unet.py is built from the same ones ----------------
def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, Eq. 1): q (..., N, d) and k, v (..., M, d) -> (..., N, d)."""
    if q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.size(-2) * k.size(-2) <= 128 ** 2:
        # As the equation says; for the gradient of few tokens, in bfloat16 on a CPU, up to four times as fast as below.
        scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1) # (..., N, M), of O(1): how well n matches m
        return scores.softmax(dim=-1) @ v                          # each query's weighted mean of the values
    return F.scaled_dot_product_attention(q, k, v)                 # piece by piece: the scores never exist as a whole

class Attention(nn.Module):
    """Multi-head attention: tokens x (B, N, C) look at M words (B, M, D), or without any at each other -> (B, N, C)."""
    def __init__(self, channels, context_channels=None, heads=1, qkv_bias=False, upcast=False):
        super().__init__()
        assert channels % heads == 0, f"{channels} channels do not split into {heads} heads"
        self.heads, self.upcast = heads, upcast
        self.to_q = nn.Linear(channels, channels, bias=qkv_bias)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=qkv_bias)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])   # a list of one: published as `to_out.0`
    def forward(self, x, context=None):
        context = x if context is None else context                # no text: self-attention
        B, N, C = x.shape
        def split(t):                                              # (B, L, C) -> (B, heads, L, C/heads)
            return t.view(B, -1, self.heads, C // self.heads).transpose(1, 2)
        q, k, v = split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context))
        wide = torch.float32 if self.upcast else v.dtype           # Stable Diffusion 2.1's scores overflow float16
        y = attend(q.to(wide), k.to(wide), v.to(wide)).to(v.dtype)
        return self.to_out[0](y.transpose(1, 2).reshape(B, N, C))  # join the heads

class SpatialAttention(Attention):
    """Self-attention in which every pixel of x (B, C, H, W) is a token; adds its result to x."""
    def __init__(self, channels, groups, heads=1):
        super().__init__(channels, heads=heads, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
    def forward(self, x):
        B, C, H, W = x.shape
        tokens = self.group_norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)
        return x + super().forward(tokens).view(B, H, W, C).permute(0, 3, 1, 2)

class Conv(nn.Conv2d):
    """A 3x3 convolution of stride 1, (B, Cin, H, W) -> (B, Cout, H, W). In inference on a CPU, few pixels of many
    channels go as one matrix product: nn.Conv2d re-orders its weights at every call, and there that takes longest.
    The step of Stable Diffusion 1.5's U-Net in float32: 1.4 times as fast for 32x32 latents, 1.8 for 16x16."""
    def forward(self, x):
        B, C, H, W = x.shape
        if torch.is_grad_enabled() or x.device.type != "cpu" or 2 * B * H * W > self.out_channels:
            return super().forward(x)
        x = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1).unfold(1, 3, 1).unfold(2, 3, 1)         # (B, H, W, Cin, 3, 3)
        x = x.permute(0, 1, 2, 4, 5, 3).reshape(B * H * W, 9 * C)  # each pixel's neighbours, as its channels
        y = F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)      # (B * H * W, Cout)
        return y.view(B, H, W, self.out_channels).permute(0, 3, 1, 2)

class ResnetBlock(nn.Module):
    """x + f(x), with f two rounds of normalize, SiLU, 3x3 convolution: (B, Cin, H, W) -> (B, Cout, H, W).
    In the U-Net, the time embedding temb (B, E) is added between the two rounds, one number per channel.
    eps is 1e-6 in the VAE and 1e-5 in the U-Net: the published weights were trained so."""
    def __init__(self, in_channels, out_channels, groups=32, eps=1e-6, temb_channels=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = Conv(in_channels, out_channels, 3, padding=1)
        if temb_channels:
            self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = Conv(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:                            # x must grow or shrink before it can be added
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        # Starts as the identity, or the shortcut: at first a deep stack learns like a shallow one (Goyal et al. 2017).
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)
    def forward(self, x, temb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)

class Downsample(nn.Module):
    """Halve height and width with a strided convolution.
    The published VAE pads only the right and bottom edges, the published U-Net all four: no deeper reason, but weights
    fit one way only. Padding the VAE evenly would shift its pictures by one pixel at each level: subtly wrong."""
    def __init__(self, channels, pad_all_sides):
        super().__init__()
        self.pad_all_sides = pad_all_sides
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if pad_all_sides else 0)
    def forward(self, x):
        return self.conv(x if self.pad_all_sides else F.pad(x, (0, 1, 0, 1)))

class Upsample(nn.Module):
    """Double height and width (or reach `size`): repeat pixels, then let a convolution smooth them.
    A transposed convolution would overlap unevenly and draw a checkerboard (Odena et al. 2016)."""
    def __init__(self, channels):
        super().__init__()
        self.conv = Conv(channels, channels, 3, padding=1)
    def forward(self, x, size=None):
        size = size or (2 * x.size(2), 2 * x.size(3))
        return self.conv(F.interpolate(x, size=size, mode="nearest"))

# ---- Encoder and decoder: mirror images of each other, coarse in the middle ------------------------------------------
class Level(nn.Module):
    """One resolution of the encoder or decoder: residual blocks, then an optional change of resolution."""
    def __init__(self, in_channels, out_channels, layers, groups, resample=None):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(out_channels if i else in_channels, out_channels, groups)
                                     for i in range(layers))
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(out_channels, pad_all_sides=False)])
        if resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])
        self.grad_checkpoint = False
    def forward(self, x):
        for layer in (*self.resnets, *getattr(self, "downsamplers", getattr(self, "upsamplers", []))):
            x = checkpoint(layer, x, use_reentrant=False) if self.grad_checkpoint else layer(x)
        return x

class MidBlock(nn.Module):
    """The coarsest resolution, where pixels are few enough for each to look at all the others."""
    def __init__(self, channels, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups)])
    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))

class Encoder(nn.Module):
    """x (B, 3, H, W) -> (B, 2*Z, h, w): Z channels of mean, Z of log variance."""
    def __init__(self, in_channels, latent_channels, channels, layers, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(channels[max(i - 1, 0)], c, layers, groups, "down" if i < len(channels) - 1 else None)
            for i, c in enumerate(channels))
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent_channels, 3, padding=1)
    def forward(self, x):
        x = self.conv_in(x)                                        # (B, 128, H,   W)      numbers: Stable Diffusion 1.5
        for block in self.down_blocks:                             # (B, 512, H/8, W/8)
            x = block(x)
        x = self.mid_block(x)                                      # (B, 512, H/8, W/8)
        return self.conv_out(F.silu(self.conv_norm_out(x)))        # (B, 8,   H/8, W/8)

class Decoder(nn.Module):
    """z (B, Z, h, w) -> (B, 3, H, W). One block more per level than the encoder, as in U-Nets (for one more skip)."""
    def __init__(self, out_channels, latent_channels, channels, layers, groups):
        super().__init__()
        channels = channels[::-1]
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(channels[max(i - 1, 0)], c, layers + 1, groups, "up" if i < len(channels) - 1 else None)
            for i, c in enumerate(channels))
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)
    def forward(self, z):
        x = self.mid_block(self.conv_in(z))                        # (B, 512, h,   w)
        for block in self.up_blocks:                               # (B, 128, 8*h, 8*w)
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))        # (B, 3,   8*h, 8*w)

# ---- The probabilistic part ------------------------------------------------------------------------------------------
class DiagonalGaussian:
    """q(z|x) = N(mean, diag(exp(logvar))), as the encoder predicts it; mean and logvar are (B, Z, h, w).
    The encoder predicts log(sigma^2), not sigma: any real number is then valid, and tiny variances stay exact."""
    def __init__(self, moments):
        self.mean, logvar = moments.float().chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)                    # exp stays finite in float32
    def sample(self, generator=None):
        """z = mu + sigma * eps with eps ~ N(0, I): the reparameterization trick (Kingma & Welling, section 2.4).
        Drawing z directly would cut the gradient: chance has no derivative. Written this way chance enters as an input
        eps, and z depends smoothly on mu and sigma. generator: one, or a list with one for each picture, whose z is
        then the same in any batch. Chance comes from the CPU, unless the generator is another device's."""
        shape = self.mean.shape
        eps = torch.stack([torch.randn(shape[1:], generator=g) for g in generator]) if isinstance(generator, list) \
            else torch.randn(shape, generator=generator, device=getattr(generator, "device", "cpu"))
        return self.mean + (0.5 * self.logvar).exp() * eps.to(self.mean.device)
    def mode(self):
        """The most likely z: mu itself, (B, Z, h, w)."""
        return self.mean
    def kl(self):
        """KL(q(z|x) || N(0, I)) in nats for each picture, (B,) (Kingma & Welling, appendix B)."""
        # 1/2 sum(mu^2 + sigma^2 - 1 - log sigma^2): for each latent at least 0, and 0 at mu = 0, sigma = 1.
        return 0.5 * (self.mean ** 2 + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))

class VAE(nn.Module):
    """Encoder, decoder and the Gaussian between them. `VAE()` is Stable Diffusion 1.5's; `from_config` takes others.
    Diffusion works on `scaling_factor * z`, of about unit variance, like its noise. The KL pulls too weakly (kl_weight)
    to give z itself that; 1 / (the standard deviation of z) is Stable Diffusion's factor, 0.18215."""
    def __init__(self, in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(128, 256, 512, 512),
                 layers_per_block=2, norm_num_groups=32, scaling_factor=0.18215, use_quant_conv=True,
                 use_post_quant_conv=True):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__", "scaling_factor")}
        channels = self.config["block_out_channels"] = tuple(block_out_channels)
        self.scaling_factor, self.f = scaling_factor, 2 ** (len(channels) - 1)
        self.encoder = Encoder(in_channels, latent_channels, channels, layers_per_block, norm_num_groups)
        self.decoder = Decoder(out_channels, latent_channels, channels, layers_per_block, norm_num_groups)
        # 1x1 mixtures of the latent channels, kept from the vector-quantized sibling of this model.
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else nn.Identity()
        if use_quant_conv:                                         # Clouds start small, sigma about exp(-8/2): from 1,
            nn.init.constant_(self.quant_conv.bias[latent_channels:], -8.0)         # a channel may stay noise: -0.6 dB

    @classmethod
    def from_config(cls, config):
        """Build from a published vae/config.json (a dict). ValueError names a key that asks for something else."""
        config = {"block_out_channels": (64,), "layers_per_block": 1, **config}       # diffusers' defaults
        return cls(**supported(config, cls, dict(
            act_fn="silu", down_block_types="DownEncoderBlock2D", up_block_types="UpDecoderBlock2D",
            mid_block_add_attention=True)))

    def to_config(self):
        """The dict that belongs in vae/config.json, in diffusers' words."""
        levels = len(self.config["block_out_channels"])
        return {"_class_name": "AutoencoderKL", **self.config, "scaling_factor": self.scaling_factor, "act_fn": "silu",
                "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}

    @staticmethod
    def current_names(state):
        """Published weights (a dict) under the names used here: older files call the attention query, key, value."""
        new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        return {re.sub(r"\b(query|key|value|proj_attn)\b", lambda m: new[m[1]], k): v for k, v in state.items()}

    @staticmethod
    def from_original(state):
        """Weights of the original release (a dict, prefix removed) -> (config, the same under the names used here).
        Its decoder numbers levels from the finest; its attention's 1x1 convolutions are linear layers on each pixel."""
        last = max(int(k.split(".")[2]) for k in state if k.startswith("encoder.down."))
        state = {k: x.flatten(1) if ".attn_1." in k and x.dim() > 1 else x for k, x in state.items()}
        for old, new in (
                (r"\.down\.", ".down_blocks."), (r"\.up\.(\d+)", lambda m: f".up_blocks.{last - int(m[1])}"),
                (r"\.(down|up)sample\.", r".\1samplers.0."), (r"\.block\.", ".resnets."),
                (r"\.mid\.block_(\d)", lambda m: f".mid_block.resnets.{int(m[1]) - 1}"),
                (r"\.mid\.attn_1\.", ".mid_block.attentions.0."), (r"0\.norm\.", "0.group_norm."),
                (r"0\.([qkv])\.", r"0.to_\1."), (r"0\.proj_out\.", "0.to_out.0."),
                (r"nin_shortcut", "conv_shortcut"), (r"\.norm_out", ".conv_norm_out")):
            state = {re.sub(old, new, k): x for k, x in state.items()}
        channels = [state[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].size(0) for i in range(last + 1)]
        layers = len({k.split(".")[4] for k in state if k.startswith("encoder.down_blocks.0.resnets.")})
        groups = math.gcd(32, *channels)
        return dict(block_out_channels=channels, layers_per_block=layers, norm_num_groups=groups), state

    def encode(self, x):
        """Pictures (B, 3, H, W) in [-1, 1], sides multiples of f -> DiagonalGaussian over latents (B, Z, H/f, W/f)."""
        assert x.size(2) % self.f == 0 and x.size(3) % self.f == 0, f"{tuple(x.shape)} is not divisible by {self.f}"
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def decode(self, z):
        """Latents (B, Z, h, w), not scaled -> pictures (B, 3, h*f, w*f), about [-1, 1]: clamp before showing them."""
        return self.decoder(self.post_quant_conv(z))

    def decode_tiles(self, z, side=64, overlap=16):
        """As `decode`, in squares of `side` latents that fade into each other: the network's memory is that of one.
        Colours may drift a little from square to square: normalization and attention see one at a time."""
        f, (h, w), step = self.f, z.shape[2:], side - overlap
        sums = torch.zeros(len(z), 3 + 1, h * f, w * f, device=z.device)            # 3: weight * colour; 1: weight
        for top, left in itertools.product(range(0, max(h - overlap, 1), step), range(0, max(w - overlap, 1), step)):
            x = self.decode(z[:, :, top: top + side, left: left + side]).float()
            ramps = [torch.arange(1.0, n + 1, device=z.device) for n in x.shape[2:]]                # 1, 2, 3, ...
            rows, columns = (torch.minimum(i, i.flip(0)).clamp(max=overlap * f) for i in ramps)     # from either edge
            tile = sums[:, :, top * f: top * f + x.size(2), left * f: left * f + x.size(3)]
            tile += torch.cat([x, torch.ones_like(x[:, :1])], dim=1) * rows[:, None] * columns
        return sums[:, :3] / sums[:, 3:]

    def set_grad_checkpoint(self, on=True):
        """Trade time for memory: forget activations inside each block and compute them again for the backward pass."""
        for level in (*self.encoder.down_blocks, *self.decoder.up_blocks):
            level.grad_checkpoint = on

def vae_sizes(preset, image_size):
    """Arguments of the VAE that train.py builds for a preset."""
    if preset == "tiny":                     # latents near 16x16 (8x8 for pictures of 16); size & -size: its power of 2
        levels = min(max(2, round(math.log2(image_size / 16)) + 1), (image_size & -image_size).bit_length())
        return dict(block_out_channels=(16,) * (levels - 2) + (32, 64), layers_per_block=1, norm_num_groups=4)
    return {"base": dict(block_out_channels=(64, 128, 256, 256), norm_num_groups=16), "sd15": {}}[preset]

class Discriminator(nn.Sequential):
    """x (B, 3, H, W) -> (B, 1, H/4, W/4): is this patch, 18x18 pixels, real, or redrawn? (Isola et al. 2017)."""
    def __init__(self, channels=64):
        super().__init__(nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(channels, 2 * channels, 4, 2, 1),
                         nn.GroupNorm(8, 2 * channels), nn.LeakyReLU(0.2), nn.Conv2d(2 * channels, 1, 3, padding=1))

def vae_loss(vae, x, kl_weight=3e-5, generator=None, discriminator=None, gan_weight=0.0):
    """The negative ELBO, up to a factor and constants, of pictures x (B, 3, H, W) -> (loss, its parts as a dict).

    We would like to maximize log p(x), but that needs an integral over every z. For any q, Jensen's inequality gives
    (Kingma & Welling, Eq. 3)

        log p(x) >= E_{z ~ q(z|x)} [log p(x|z)] - KL(q(z|x) || p(z))  =  ELBO.

    First term: redraw the picture from its cloud. With p(x|z) = N(x; decode(z), s^2 I) it is -|x - x'|^2 / (2 s^2) plus
    a constant. Second term: keep the cloud near the prior p(z) = N(0, I). Multiplying -ELBO by 2 s^2 and dividing by
    the number of pixel values gives the mean squared error plus a small multiple of the KL; s hides in kl_weight: the
    larger it is, the less exactly pictures must return, the smoother the latents, the blurrier the pictures.

    Where detail is lost, the smallest squared error is the mean of all that it may have been: blur. The published VAE
    also had a discriminator (Esser et al. 2021, Eq. 5 to 7). It learns to tell x from x' (by a hinge loss, as in their
    code), the decoder to pass for real: the gradient of this, at its last layer, at most gan_weight times the other."""
    q = vae.encode(x)
    z = q.sample(generator)
    redrawn = vae.decode(z).float()
    rec, kl = F.mse_loss(redrawn, x.float()), q.kl().mean() / z[0].numel()          # kl: nats per latent number
    loss, parts = rec + kl_weight * kl, {"mse": rec.detach(), "kl": kl.detach()}
    if discriminator is not None:
        hinge = F.relu(1 - discriminator(x)).mean() + F.relu(1 + discriminator(redrawn.detach())).mean()
        fixed = {name: p.detach() for name, p in discriminator.named_parameters()}  # not to be taught by the decoder
        fooled = -torch.func.functional_call(discriminator, fixed, redrawn).mean()
        last = vae.decoder.conv_out.weight     # 256 cancels in a / b: without it they may be too small for float16
        a, b = (torch.autograd.grad(256 * y, last, retain_graph=True)[0].norm() for y in (rec, fooled))
        right = (1 - hinge.detach() / 2).clamp(min=0)              # 0: it guesses, as at first; 1: it is never wrong
        loss, parts["gan"] = loss + hinge + gan_weight * right * a / (b + 1e-8) * fooled, hinge.detach()
    return loss, parts

def open_picture(path, paper="white"):
    """The picture at path as RGB: upright, laid on paper, 16 bits cut to 8. ValueError if it is none, or too large."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):                             # Pillow would clip 16 bits at 255
            image = Image.fromarray((np.asarray(image) / 256).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, paper), image.convert("RGBA"))
        return image.convert("RGB")
    except Exception as e:                                         # a broken file may raise anything
        raise ValueError(f"{path} is not a readable picture ({e})") from None

def picture_to_tensor(image, height, width):
    """A PIL picture, scaled and cropped at the centre, never stretched -> (1, 3, height, width) in [-1, 1]."""
    image = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1

def tensor_to_pictures(x):
    """(B, 3, H, W) in [-1, 1] -> list of B PIL pictures."""
    x = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a) for a in x]

def grid(pictures, columns=None, least=0):
    """PIL pictures of one size, laid out in rows, and small ones enlarged towards `least` -> one PIL picture."""
    columns, (w, h) = columns or math.ceil(len(pictures) ** 0.5), pictures[0].size
    sheet, k = Image.new("RGB", (columns * w, -(-len(pictures) // columns) * h), "white"), max(1, least // w)
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * w, i // columns * h))
    return sheet.resize((sheet.width * k, sheet.height * k), Image.Resampling.NEAREST)

def as_pictures(pixels, device):
    """Bytes (B, 3, H, W) -> x (B, 3, H, W), float32 in [-1, 1], on the device."""
    return (pixels.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)

def psnr(vae, x):
    """How well x (B, 3, H, W) in [-1, 1] survives the way through the latents: peak signal-to-noise ratio in dB.
    10 log10(peak^2 / mean squared error), peak = 2, a mean over pictures. 30 dB: hard to see; 20 dB: plain."""
    redrawn = torch.cat([vae.decode(vae.encode(part).mode()).clamp(-1, 1) for part in x.split(8)])
    return (10 * torch.log10(4 / (redrawn - x).pow(2).mean(dim=(1, 2, 3)))).mean().item()

# ---- Published configs, of this model and of the U-Net ---------------------------------------------------------------
def supported(config, model, only):
    """Keep of a published config.json (dict) what `model` (a class) takes as arguments; refuse what it cannot do.
    only: {key: the one value this code implements}, for switches that are not arguments here. Any other key is
    bookkeeping unless it is switched on. Numbers are sizes: above 0 and within reason. ValueError names the key."""
    arguments = inspect.signature(model).parameters
    bookkeeping = {"sample_size", "force_upcast", "dropout", "addition_time_embed_dim", "decay", "min_decay", "power",
                   "inv_gamma", "optimization_step", "update_after_step", "use_ema_warmup"}
    kept, config = {}, {key: value for key, value in config.items() if value is not None}           # null: the default
    for key, value in config.items():
        if key in arguments:
            kept[key] = tuple(value) if isinstance(value, list) else value
            kinds = {int: (int,), float: (int, float)}.get(type(arguments[key].default))
            values = value if isinstance(value, list) and key in ("attention_head_dim", "sample_size") else [value]
            limit = 64 if "layers" in key else 512 if key == "sample_size" else 2 ** 16
            if kinds and not all(type(v) in kinds and 0 < v <= limit for v in values):
                raise ValueError(f"config.json: {key} = {value!r} is not above 0, or beyond reason")
        elif key in only:
            values = value if isinstance(value, (list, tuple)) else [value]
            if any(v != only[key] for v in values):
                raise ValueError(f"config.json: {key} = {value!r} is not supported, only {only[key]!r}")
        elif not key.startswith("_") and key not in bookkeeping and value is not False:
            raise ValueError(f"config.json: {key} = {value!r} is not known to {model.__name__}")
    return kept
