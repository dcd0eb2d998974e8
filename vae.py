"""The variational autoencoder (VAE): pictures to small latents, and back.

    x (B, 3, H, W) in [-1, 1] --encode--> q(z|x) = N(mean, sigma^2)
                                             --sample--> z (B, Z, h, w) --decode--> x' (B, 3, H, W)

Why compress at all? Most of a picture's numbers are fine grain that the eye barely notices. A
diffusion model that works on pixels spends most of its effort on them. So two models share the job
(Rombach et al. 2022, section 3). The VAE learns once which few numbers are enough to redraw a
picture: in Stable Diffusion 4 x 64 x 64 instead of 3 x 512 x 512, 48 times fewer. The diffusion
model then works on these latents alone.

Why *variational*? A plain autoencoder may put its codes anywhere and leave gaps where the decoder
draws rubbish. A generator would fall into the gaps. A VAE encodes each picture as a small Gaussian
instead of a point, asks the decoder to redraw the picture from any sample of it, and pulls all
Gaussians towards N(0, I). The gaps close.

Papers: Kingma & Welling 2013, "Auto-Encoding Variational Bayes"; Rombach et al. 2022,
"High-Resolution Image Synthesis with Latent Diffusion Models".

Letters: B pictures; C channels; H, W picture size; Z latent channels, 4 in Stable Diffusion;
h = H/f, w = W/f latent size, f = 2**(levels - 1), 8 in Stable Diffusion. Read next:
clip_encoder.py.
"""
import re
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---- Building blocks -----------------------------------------------------------------------------

class ResnetBlock(nn.Module):
    """x + f(x); f is twice normalize, SiLU, 3x3 convolution. (B, Cin, H, W) -> (B, Cout, H, W)."""

    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        # eps is 1e-6 throughout the VAE: the published weights expect it. PyTorch's own is 1e-5.
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None
        if in_channels != out_channels:        # x needs the width of f(x) before they can be added
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + h

class Attention(nn.Module):
    """Self-attention, one head: each pixel of x (B, C, H, W) is a token. Adds its result to x.

    clip_encoder.py explains q, k and v. On a first reading skip this class.
    """

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])   # published as `to_out.0`

    def forward(self, x):
        B, C, H, W = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)         # (B, H*W, C)
        tokens = tokens[:, None]                                       # (B, 1, H*W, C): one head
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        # softmax(q k^T / sqrt(C)) v, but never holding all H*W x H*W scores.
        y = F.scaled_dot_product_attention(q, k, v)                    # (B, 1, H*W, C)
        y = self.to_out[0](y).transpose(2, 3).reshape(B, C, H, W)
        return x + y

class Downsample(nn.Module):
    """Halve height and width with a convolution of stride 2.

    The published VAE pads the right and bottom edges only; the published U-Net pads all four. There
    is no deeper reason, but weights need the padding that they were trained with.
    """

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))

class Upsample(nn.Module):
    """Double height and width: repeat each pixel, then smooth with a convolution.

    A transposed convolution would overlap unevenly and draw a checkerboard (Odena et al. 2016).
    """

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))

# ---- Encoder and decoder: mirror images of each other --------------------------------------------

class Level(nn.Module):
    """One resolution: residual blocks, then a change of size: "down", "up" or None."""

    def __init__(self, in_channels, out_channels, layers, groups, resample):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(in_channels, out_channels, groups)])
        for _ in range(layers - 1):
            self.resnets.append(ResnetBlock(out_channels, out_channels, groups))
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()
        if resample == "down":
            self.downsamplers.append(Downsample(out_channels))
        if resample == "up":
            self.upsamplers.append(Upsample(out_channels))

    def forward(self, x):
        for layer in [*self.resnets, *self.downsamplers, *self.upsamplers]:
            x = layer(x)
        return x

class MidBlock(nn.Module):
    """The coarsest resolution. Pixels are few here, so each can look at all the others."""

    def __init__(self, channels, groups):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x):
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)

def run_block(block, x, grad_checkpoint):
    """block(x). With grad_checkpoint the backward pass recomputes it: less memory, more time."""
    if grad_checkpoint:
        return checkpoint(block, x, use_reentrant=False)
    return block(x)

class Encoder(nn.Module):
    """x (B, 3, H, W) -> moments (B, 2*Z, h, w): Z channels of mean, Z of log variance."""

    def __init__(self, latent_channels, widths, layers, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        channels = widths[0]
        for i, width in enumerate(widths):
            resample = "down" if i < len(widths) - 1 else None
            self.down_blocks.append(Level(channels, width, layers, groups, resample))
            channels = width
        self.mid_block = MidBlock(channels, groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 2 * latent_channels, 3, padding=1)
        self.grad_checkpoint = False

    def forward(self, x):                                       # in Stable Diffusion 1.5:
        x = self.conv_in(x)                                     # (B, 128, H,   W)
        for block in self.down_blocks:                          # (B, 512, H/8, W/8)
            x = run_block(block, x, self.grad_checkpoint)
        x = self.mid_block(x)                                   # (B, 512, H/8, W/8)
        return self.conv_out(F.silu(self.conv_norm_out(x)))     # (B, 8,   H/8, W/8)

class Decoder(nn.Module):
    """z (B, Z, h, w) -> x (B, 3, H, W). One residual block a level more than the encoder has."""

    def __init__(self, latent_channels, widths, layers, groups):
        super().__init__()
        channels = widths[-1]
        self.conv_in = nn.Conv2d(latent_channels, channels, 3, padding=1)
        self.mid_block = MidBlock(channels, groups)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(reversed(widths)):
            resample = "up" if i < len(widths) - 1 else None
            self.up_blocks.append(Level(channels, width, layers + 1, groups, resample))
            channels = width
        self.conv_norm_out = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)
        self.grad_checkpoint = False

    def forward(self, z):
        x = self.conv_in(z)                                     # (B, 512, h,   w)
        x = self.mid_block(x)                                   # (B, 512, h,   w)
        for block in self.up_blocks:                            # (B, 128, 8*h, 8*w)
            x = run_block(block, x, self.grad_checkpoint)
        return self.conv_out(F.silu(self.conv_norm_out(x)))     # (B, 3,   8*h, 8*w)

# ---- The probabilistic part ----------------------------------------------------------------------

class DiagonalGaussian:
    """q(z|x) = N(mean, diag(exp(logvar))) from moments (B, 2*Z, h, w); in float32.

    The encoder predicts log(sigma^2) rather than sigma: every real number is then valid.
    """

    def __init__(self, moments):
        self.mean, logvar = moments.float().chunk(2, dim=1)     # (B, Z, h, w) each
        self.logvar = logvar.clamp(-30.0, 20.0)                 # so that exp and the KL stay finite

    def sample(self, generator=None, noise=None):
        """z = mean + sigma * noise, (B, Z, h, w): the reparameterization trick (K&W, section 2.4).

        To draw z directly would cut the gradient: a random draw has no derivative. Written like
        this, randomness is an input, and z is a smooth function of mean and sigma. noise, of the
        shape of z, is drawn with `generator` unless it is given.
        """
        if noise is None:
            device = self.mean.device if generator is None else generator.device
            noise = torch.randn(
                self.mean.shape, generator=generator, device=device, dtype=torch.float32
            )
        sigma = (0.5 * self.logvar).exp()
        return self.mean + sigma * noise.to(self.mean.device)

    def mode(self):
        """The most likely z, (B, Z, h, w): the mean."""
        return self.mean

    def kl(self):
        """KL(q(z|x) || N(0, I)) in nats for each picture, (B,) (K&W, appendix B)."""
        # Zero at mean 0 and sigma 1, positive elsewhere.
        each = 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar)
        return each.sum(dim=(1, 2, 3))

class VAE(nn.Module):
    """Encoder, decoder and the Gaussian between them. `VAE()` is Stable Diffusion 1.5's."""

    DEFAULTS = dict(
        latent_channels=4,                          # Z
        block_out_channels=(128, 256, 512, 512),    # width of each level, finest first
        layers_per_block=2,                         # residual blocks a level; decoder: one more
        norm_num_groups=32,                         # of every GroupNorm
        scaling_factor=0.18215,                     # 1 / (standard deviation of z)
        use_quant_conv=True,                        # a 1x1 convolution on the moments
        use_post_quant_conv=True,                   # a 1x1 convolution on z
    )

    def __init__(self, **config):
        super().__init__()
        self.config = {**self.DEFAULTS, **config}
        widths = self.config["block_out_channels"]
        Z = self.config["latent_channels"]
        layers = self.config["layers_per_block"]
        groups = self.config["norm_num_groups"]
        self.f = 2 ** (len(widths) - 1)
        # The KL pulls too weakly to give z unit variance. Diffusion works on scaling_factor * z,
        # which has it: there the latents are as large as the noise. train.py measures the factor
        # (save_vae); 0.18215 is the published VAE's.
        self.scaling_factor = self.config["scaling_factor"]
        self.encoder = Encoder(Z, widths, layers, groups)
        self.decoder = Decoder(Z, widths, layers, groups)
        self.quant_conv = nn.Identity()
        self.post_quant_conv = nn.Identity()
        if self.config["use_quant_conv"]:
            self.quant_conv = nn.Conv2d(2 * Z, 2 * Z, 1)
            # Start with sigma near exp(-8/2) = 0.02. From sigma = 1, a channel of z may drown in
            # noise and never learn to carry anything.
            nn.init.constant_(self.quant_conv.bias[Z:], -8.0)
        if self.config["use_post_quant_conv"]:
            self.post_quant_conv = nn.Conv2d(Z, Z, 1)
        for name, p in self.named_parameters():
            if "conv2" in name:    # residual blocks start as the identity: they learn sooner
                nn.init.zeros_(p)

    @classmethod
    def from_config(cls, config):
        """Build from a published vae/config.json (a dict).

        ValueError names a key that asks for what this code does not do. Unknown keys are ignored.
        """
        required = dict(
            act_fn="silu",
            in_channels=3,
            out_channels=3,
            mid_block_add_attention=True,
            shift_factor=None,
            latents_mean=None,
        )
        for key, value in required.items():
            if config.get(key, value) != value:
                raise ValueError(f"{key} = {config[key]!r} is not supported, only {value!r}")
        for key in (*cls.DEFAULTS, "down_block_types", "up_block_types"):
            if key in config and config[key] is None:
                raise ValueError(f"{key} = null is not supported")
        for kind in [*config.get("down_block_types", []), *config.get("up_block_types", [])]:
            if kind not in ("DownEncoderBlock2D", "UpDecoderBlock2D"):
                raise ValueError(f"down_block_types, up_block_types: {kind!r} is not supported")
        config = {"block_out_channels": (64,), "layers_per_block": 1, **config}    # as in diffusers
        return cls(**{key: config[key] for key in cls.DEFAULTS if key in config})

    def to_config(self):
        """The dict that belongs in vae/config.json, with diffusers' keys."""
        widths = self.config["block_out_channels"]
        return dict(
            self.config,
            _class_name="AutoencoderKL",
            act_fn="silu",
            in_channels=3,
            out_channels=3,
            down_block_types=["DownEncoderBlock2D" for _ in widths],
            up_block_types=["UpDecoderBlock2D" for _ in widths],
            scaling_factor=self.scaling_factor,
        )

    def encode(self, x):
        """Pictures (B, 3, H, W) in [-1, 1], sides multiples of f -> DiagonalGaussian over z."""
        H, W = x.shape[2:]
        assert H % self.f == 0 and W % self.f == 0, f"{H}x{W} pixels: not multiples of {self.f}"
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def decode(self, z):
        """z (B, Z, h, w), not scaled -> pictures (B, 3, h*f, w*f), about [-1, 1]: clamp to show."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x, noise=None):
        """Pictures x -> x' redrawn from a sample of their latents (B, 3, H, W), and q."""
        q = self.encode(x)
        z = q.sample(noise=noise)
        return self.decode(z), q

# ---- The loss ------------------------------------------------------------------------------------

def vae_loss(vae, x, noise=None, kl_weight=1.44e-3):
    """The negative ELBO of pictures x (B, 3, H, W), up to scale and constants -> (loss, mse, kl).

    We want to maximize log p(x), but that needs an integral over every z. For any q, Jensen's
    inequality gives (Kingma & Welling, Eq. 3)

        log p(x)  >=  E_{z ~ q(z|x)} [log p(x|z)]  -  KL(q(z|x) || p(z))   =   ELBO

    First term: redraw the picture from its latents. With p(x|z) = N(x; decode(z), s^2 I) it is
    -|x - x'|^2 / (2 s^2) plus a constant. Second term: keep q near the prior p(z) = N(0, I).
    Multiply -ELBO by 2 s^2 and divide by the number of pixel values: the mean squared error, plus
    kl_weight = 2 s^2 times the KL per pixel value. s is the standard deviation that we assume for
    the error of a pixel: here 0.027, or 3.4 of 256 levels. A larger s makes latents smoother and
    pictures blurrier.

    noise (B, Z, h, w) is that of z = mean + sigma * noise, drawn if None. kl is in nats per latent
    number. The published VAE adds a perceptual and an adversarial loss (Esser et al. 2021), which
    need further networks. vae may be wrapped in DistributedDataParallel.
    """
    x_rec, q = vae(x, noise)
    mse = F.mse_loss(x_rec.float(), x.float())
    kl = q.kl().mean() / q.mean[0].numel()
    weight = kl_weight * q.mean.numel() / x.numel()            # where f = 8: kl_weight / 48
    return mse + weight * kl, mse, kl

# ---- Published weights ---------------------------------------------------------------------------

def rename_published(state):
    """{name: tensor} under any published names -> the same under the names used here.

    The original release numbers the decoder's levels from the finest and writes the attention's
    linear layers as 1x1 convolutions. Older diffusers folders call these query, key, value and
    proj_attn. Current names pass unchanged.
    """
    up_levels = [int(name.split(".")[2]) for name in state if name.startswith("decoder.up.")]
    coarsest = max(up_levels, default=0)
    rules = [
        (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
        (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
        (r"\.up\.(\d+)\.", lambda match: f".up_blocks.{coarsest - int(match[1])}."),
        (r"(up_blocks\.\d+)\.block\.", r"\1.resnets."),
        (r"(up_blocks\.\d+)\.upsample\.", r"\1.upsamplers.0."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"\.attentions\.0\.norm\.", ".attentions.0.group_norm."),
        (r"\.attentions\.0\.(q|query)\.", ".attentions.0.to_q."),
        (r"\.attentions\.0\.(k|key)\.", ".attentions.0.to_k."),
        (r"\.attentions\.0\.(v|value)\.", ".attentions.0.to_v."),
        (r"\.attentions\.0\.(proj_out|proj_attn)\.", ".attentions.0.to_out.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
    ]
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if ".attentions." in name and tensor.dim() == 4:
            tensor = tensor.flatten(1)
        renamed[name] = tensor
    return renamed
