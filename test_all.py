"""Every test. `python test_all.py` runs them as pytest does; it needs pytest and diffusers beside requirements.txt.

Tests state mathematics, or compare with code that others wrote (diffusers, transformers); none repeats the formula that
it checks. Sections: names and shapes; equal outputs; the VAE's probabilities; diffusion; samplers; whole pictures;
published models; CLIP and tokenizer; learning; data; loading and saving; the command lines; nothing lost; nothing let
in."""
import contextlib
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import OrderedDict

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image

import clip_encoder
import ddpm
import sample
import train
from clip_encoder import (CLIP, CLIPTextEncoder, contrastive_loss, load_tokenizer, own_caption_wins, tokenize,
                          train_tokenizer)
from ddpm import SAMPLERS, NoiseSchedule, diffusion_loss, guide
from sample import BadInput, Pipeline, generate, load_pipeline, save_pipeline
from train import ImageFolder, Landscapes
from unet import UNET_SIZES, UNet, pick_device
from vae import (VAE, Conv, DiagonalGaussian, Discriminator, Encoder, attend, picture_to_tensor, psnr, vae_loss,
                 vae_sizes)

HERE = os.path.dirname(os.path.abspath(__file__))
torch.manual_seed(0)


def relative(a, b):
    """The largest difference, as a part of the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def shake(module, seed=0):
    """Random weights everywhere, also where a fresh model starts at zero: else parity would compare zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            spread = 0.5 * p[0].numel() ** -0.5 if p.dim() > 1 else 0.1
            p.copy_(torch.randn(p.shape, generator=generator) * spread + (1.0 if "norm" in name and p.dim() == 1
                                                                       and name.endswith("weight") else 0.0))
    return module.eval()


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------------
# Names and shapes of the published models, on the meta device: no memory, no weights.

UNET_15 = dict(act_fn="silu", attention_head_dim=8, block_out_channels=[320, 640, 1280, 1280],
               center_input_sample=False,
               cross_attention_dim=768, down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
               downsample_padding=1, flip_sin_to_cos=True, freq_shift=0, in_channels=4, layers_per_block=2,
               mid_block_scale_factor=1, norm_eps=1e-05, norm_num_groups=32, out_channels=4, sample_size=64,
               up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, _class_name="UNet2DConditionModel",
               _diffusers_version="0.6.0")
UNET_21 = dict(UNET_15, attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, dual_cross_attention=False,
               num_class_embeds=None, only_cross_attention=False, sample_size=96, upcast_attention=True,
               use_linear_projection=True)
VAE_15 = dict(act_fn="silu", block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4,
              in_channels=3, latent_channels=4, layers_per_block=2, norm_num_groups=32, out_channels=3, sample_size=512,
              up_block_types=["UpDecoderBlock2D"] * 4, _class_name="AutoencoderKL", _diffusers_version="0.6.0")
TEXT_15 = dict(architectures=["CLIPTextModel"], attention_dropout=0.0, bos_token_id=0, dropout=0.0, eos_token_id=2,
               hidden_act="quick_gelu", hidden_size=768, initializer_factor=1.0, initializer_range=0.02,
               intermediate_size=3072, layer_norm_eps=1e-05, max_position_embeddings=77, model_type="clip_text_model",
               num_attention_heads=12, num_hidden_layers=12, pad_token_id=1, projection_dim=768, torch_dtype="float32",
               transformers_version="4.22.0.dev0", vocab_size=49408)
TEXT_21 = dict(TEXT_15, hidden_act="gelu", hidden_size=1024, intermediate_size=4096, num_attention_heads=16,
               num_hidden_layers=23, projection_dim=512)


@pytest.mark.parametrize("config", [UNET_15, UNET_21, dict(UNET_15, in_channels=9)], ids=["1.5", "2.1", "inpainting"])
def test_unet_has_the_published_names_and_shapes(config):
    with torch.device("meta"):
        ours, theirs = UNet.from_config(config), diffusers.UNet2DConditionModel.from_config(config)
        assert shapes(ours) == shapes(theirs) and len(shapes(ours)) == 686
        assert config is not UNET_15 or shapes(UNet()) == shapes(theirs)


def test_vae_has_the_published_names_and_shapes():
    with torch.device("meta"):
        theirs = shapes(diffusers.AutoencoderKL.from_config(VAE_15))
        assert shapes(VAE.from_config(VAE_15)) == shapes(VAE()) == theirs and len(theirs) == 248
    assert VAE.from_config(dict(VAE_15,
                                block_out_channels=[32])).scaling_factor == 0.18215   # which the file leaves out


@pytest.mark.parametrize("config", [TEXT_15, TEXT_21], ids=["1.5", "2.1"])
def test_text_encoder_has_the_published_names_and_shapes(config):
    with torch.device("meta"):
        ours = CLIPTextEncoder.from_config(config)
        theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    # transformers from 5.6 on leaves the prefix out; every published file has it.
    theirs = {name if name.startswith("text_model.") else "text_model." + name: s for name, s in shapes(theirs).items()}
    assert shapes(ours) == theirs
    assert config is not TEXT_15 or len(theirs) == 196


@pytest.mark.parametrize("shape", [(1, 64, 3, 5), (2, 96, 4, 4), (1, 7, 1, 1), (3, 32, 2, 8)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_of_few_pixels_is_the_same_as_of_many(monkeypatch, shape, layout):
    """As a matrix product, which only inference takes, and as PyTorch's own."""
    torch.manual_seed(0)
    conv = Conv(shape[1], 200, 3, padding=1).to(memory_format=layout)
    x, calls = torch.randn(shape).to(memory_format=layout), []
    expected = torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
    real = torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *args, **rest: calls.append(1) or real(*args, **rest))
    with torch.no_grad():
        assert torch.allclose(conv(x), expected, atol=1e-5) and not calls
        conv(torch.randn(1, shape[1], 11, 11))                     # more than half as many pixels as channels
    assert torch.allclose(conv(x), expected, atol=1e-5) and len(calls) == 2


@pytest.mark.parametrize("N, M", [(1, 5), (64, 32), (128, 128), (129, 128), (600, 600)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_the_papers_formula_in_every_way_it_is_computed(N, M, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16, dtype=torch.float64) for n in (N, M, M))
    expected = torch.einsum("bhnm,bhmd->bhnd", (torch.einsum("bhnd,bhmd->bhnm", q, k) / 4).softmax(-1), v)
    for gradient in (False, True):
        given = [x.to(dtype).requires_grad_(gradient) for x in (q, k, v)]
        result = attend(*given)
        assert (result - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.04)
        if gradient:
            result.float().square().sum().backward()
            assert all(x.grad.isfinite().all() and x.grad.any() for x in given)


@pytest.mark.parametrize("model, config, key", [
    (UNet, dict(UNET_15, act_fn="mish"), "act_fn"),
    (UNet, dict(UNET_15, class_embed_type="timestep"), "class_embed_type"),
    (UNet, dict(UNET_15, transformer_layers_per_block=[1, 2, 10]), "transformer_layers_per_block"),
    (UNet, dict(UNET_15, down_block_types=["ResnetDownsampleBlock2D"] * 4), "down_block_types"),
    (UNet, dict(UNET_15, attention_head_dim=[5, 10]), "attention_head_dim"),
    (UNet, dict(UNET_15, addition_embed_type="text_image"), "addition_embed_type"),
    (UNet, dict(UNET_15, addition_embed_type="text", addition_embed_type_num_heads=5), "addition_embed_type_num_heads"),
    (NoiseSchedule, dict(trained_betas=[0.1] * 1000), "trained_betas is not supported"),
    (VAE, dict(VAE_15, act_fn="relu"), "act_fn"), (VAE, dict(VAE_15, latents_mean=[0.0] * 4), "latents_mean"),
    (VAE, dict(VAE_15, mid_block_add_attention=False), "mid_block_add_attention"),
    (CLIPTextEncoder, dict(TEXT_15, hidden_act="relu"), "hidden_act"),
    (CLIPTextEncoder, dict(TEXT_15, model_type="t5"), "model_type"),
    (CLIPTextEncoder, dict(TEXT_15, hidden_size=0), "hidden_size"),
    (CLIPTextEncoder, dict(TEXT_15, hidden_size=768.5), "hidden_size"),
    (CLIPTextEncoder, dict(TEXT_15, num_hidden_layers=-1), "num_hidden_layers"),
    (CLIPTextEncoder, dict(TEXT_15, layer_norm_eps=0), "layer_norm_eps"),
    (CLIP, dict(text_config=TEXT_15, vision_config=dict(num_hidden_layers=0)), "num_hidden_layers"),
    (NoiseSchedule, dict(prediction_type="sample"), "prediction_type"),
    (NoiseSchedule, dict(thresholding=True), "thresholding"),
    (NoiseSchedule, dict(beta_schedule="sigmoid"), "beta_schedule"),
    (NoiseSchedule, dict(timestep_spacing="log"), "timestep_spacing")])
def test_a_config_that_asks_for_something_else_is_refused_by_key(model, config, key):
    with torch.device("meta"), pytest.raises(ValueError, match=key):
        model.from_config(config)


# ---------------------------------------------------------------------------------------------------------------------
# Equal outputs from equal weights, on small models of odd shapes.

SMALL_UNET = dict(block_out_channels=[32, 48, 64], down_block_types=["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
                  up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2, cross_attention_dim=24, norm_num_groups=8,
                  layers_per_block=1, attention_head_dim=4, sample_size=16)
SMALL_VAE = dict(block_out_channels=[16, 24, 32], down_block_types=["DownEncoderBlock2D"] * 3, layers_per_block=2,
                 up_block_types=["UpDecoderBlock2D"] * 3, norm_num_groups=8, sample_size=64, scaling_factor=0.9)
SMALL_TEXT = dict(TEXT_15, hidden_size=24, intermediate_size=40, num_attention_heads=3, num_hidden_layers=2,
                  vocab_size=600,
                  max_position_embeddings=20, eos_token_id=599, bos_token_id=598, pad_token_id=599)


@pytest.mark.parametrize("extra, side", [
    (dict(), (16, 16)), (dict(attention_head_dim=[2, 3, 4], use_linear_projection=True,
                              upcast_attention=True), (8, 20)),
    (dict(in_channels=9, layers_per_block=2), (12, 8)), (dict(), (13, 22)),
    (dict(addition_embed_type="text", addition_embed_type_num_heads=4), (8, 8))],
    ids=["heads-conv", "heads-per-level-linear", "nine-channels", "odd-size", "text-added-to-time"])
def test_unet_equals_diffusers(extra, side):
    config = dict(SMALL_UNET, **extra)
    theirs = shake(diffusers.UNet2DConditionModel(**config))
    ours = UNet.from_config(dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict())
    z, t, context = torch.randn(3, config.get("in_channels", 4),
                                *side), torch.tensor([0, 500, 999]), torch.randn(3, 7, 24)
    with torch.no_grad():
        expected = theirs(z, t, context).sample
        assert relative(ours(z, t, context), expected) < 1e-5
        assert relative(ours(z, t, context.roll(1, 0)), expected) > 1e-2          # the text does matter
    back = diffusers.UNet2DConditionModel.from_config(ours.to_config())
    back.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("extra", [dict(), dict(use_quant_conv=False, use_post_quant_conv=False, layers_per_block=1)])
def test_vae_equals_diffusers(extra):
    theirs = shake(diffusers.AutoencoderKL(**dict(SMALL_VAE, **extra)))
    ours = VAE.from_config(dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 24, 40) * 2 - 1
    with torch.no_grad():
        p, q = theirs.encode(x).latent_dist, ours.encode(x)
        assert relative(q.mean, p.mean) < 1e-5 and relative(q.logvar, p.logvar) < 1e-5
        assert relative(q.kl(), p.kl()) < 1e-5
        assert relative(ours.decode(q.mean), theirs.decode(p.mean).sample) < 1e-5
    back = diffusers.AutoencoderKL.from_config(ours.to_config())
    back.load_state_dict(ours.state_dict())
    assert back.config.scaling_factor == 0.9


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_text_encoder_equals_transformers(activation):
    config = transformers.CLIPTextConfig(**dict(SMALL_TEXT, hidden_act=activation))
    theirs = shake(transformers.CLIPTextModel(config))
    ours = CLIPTextEncoder.from_config(config.to_dict()).eval()
    ours.load_state_dict(CLIPTextEncoder.current_names(theirs.state_dict()))
    ids = torch.randint(0, 598, (3, 20))
    with torch.no_grad():
        assert relative(ours(ids), theirs(ids).last_hidden_state) < 1e-5
        # Causal: what comes later changes nothing before it.
        changed = torch.cat([ids[:, :11], ids[:, 11:].flip(1)], dim=1)
        assert torch.equal(ours(ids)[:, :11], ours(changed)[:, :11])


def test_clip_equals_transformers():
    config = transformers.CLIPConfig(
        text_config=SMALL_TEXT, projection_dim=12,
        vision_config=dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                           image_size=16,
                           patch_size=4))
    theirs = shake(transformers.CLIPModel(config))
    ours = CLIP.from_config(config.to_dict()).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.endswith("position_ids")})
    x, ids = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randint(0, 598, (3, 20))
    ids[0, 6:], ids[1, 19:], ids[2, 3:] = 599, 599, 599
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP.MEAN, CLIP.STD))
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=((x + 1) / 2 - mean) / std).logits_per_image
        assert relative(ours.logit_scale.exp() * ours.encode_image(x) @ ours.encode_text(ids).T, expected) < 1e-4
        assert relative(ours.text_encoder()(ids), theirs.text_model(ids).last_hidden_state) < 1e-5
        states = theirs.text_model(ids, output_hidden_states=True).hidden_states   # before block 0, before 1, after
        for blocks in (0, 1, 2):
            text, norm = ours.text_encoder(blocks), theirs.text_model.final_layer_norm
            assert text.config["num_hidden_layers"] == blocks and relative(text(ids), norm(states[blocks])) < 1e-5
            published = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text.to_config())).eval()
            prefix = "" if "embeddings.token_embedding.weight" in published.state_dict() else "text_model."
            published.load_state_dict({prefix + k[11:]: x for k, x in text.state_dict().items()}, strict=False)
            assert relative(published(ids).last_hidden_state, text(ids)) < 1e-5


def test_a_sentence_added_to_the_time_is_the_mean_of_its_words_and_training_leaves_it_so():
    torch.manual_seed(0)
    unet = UNet.from_config(dict(SMALL_UNET, addition_embed_type="text", addition_embed_type_num_heads=4))
    z, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 800]), torch.randn(2, 7, 24)
    learner = ddpm.Learner(unet, lambda unet: ((unet(z, t, context) - z).square().mean(), {}))
    pool, means = unet.add_embedding.pool, []
    for _ in range(4):
        query = context.mean(dim=1, keepdim=True) + pool.positional_embedding
        means.append(pool.v_proj(torch.cat([query, context], dim=1)).mean(dim=1))
        assert relative(pool(context), means[-1]) < 1e-5
        learner.gradient([()])
        learner.step(1e-2)
    assert relative(means[-1], means[0]) > 1e-2                    # it did learn


# ---------------------------------------------------------------------------------------------------------------------
# The VAE's probabilities.

def test_kl_equals_monte_carlo():
    q = DiagonalGaussian(torch.randn(1, 4, 2, 2) * 0.7)
    z = torch.cat([q.sample(torch.Generator().manual_seed(k)) for k in range(20000)])
    normal = torch.distributions.Normal
    log_ratio = normal(q.mean, (q.logvar / 2).exp()).log_prob(z) - normal(0.0, 1.0).log_prob(z)
    assert q.kl().item() == pytest.approx(log_ratio.sum(dim=(1, 2, 3)).mean().item(), rel=0.02)
    assert DiagonalGaussian(torch.zeros(1, 4, 2, 2)).kl().item() == 0              # q is the prior


def test_reparameterized_gradient_equals_finite_differences():
    moments = (torch.randn(1, 4, 1, 1) * 0.5).requires_grad_()

    def value(m):                                                  # some smooth function of a draw with fixed chance
        return DiagonalGaussian(m).sample(torch.Generator().manual_seed(3)).sin().sum()
    gradient, = torch.autograd.grad(value(moments), moments)
    for k in range(4):
        step = torch.zeros(1, 4, 1, 1)
        step[0, k] = 1e-2
        slope = (value(moments + step) - value(moments - step)).item() / 2e-2
        assert gradient[0, k].item() == pytest.approx(slope, abs=2e-3)


def test_a_new_vae_has_small_clouds():                             # in large ones a channel of latents may drown
    for vae in (VAE.from_config(SMALL_VAE), VAE(**vae_sizes("tiny", 64)), VAE(**vae_sizes("base", 256))):
        q = vae.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
        assert 0.002 < q.logvar.div(2).exp().min() and q.logvar.div(2).exp().max() < 0.1
    assert VAE.from_config(SMALL_VAE | {"use_quant_conv": False}).encode(torch.zeros(1, 3, 32, 32)).mean.size(1) == 4


@pytest.mark.parametrize("preset", ["tiny", "base", "sd15"])
def test_a_new_vae_halves_every_size_that_may_be_asked_for(preset):
    for size in range(16, 2049, 16):
        f = 2 ** (len(vae_sizes(preset, size).get("block_out_channels", range(4))) - 1)
        assert size % f == 0, f"{size} does not halve into {f}ths"
        assert preset != "tiny" or 8 <= size // f, f"{size} leaves latents of {size // f}"


def test_negative_elbo_is_squared_error_plus_weighted_kl():
    vae, x = shake(VAE.from_config(SMALL_VAE)), torch.rand(2, 3, 16, 16) * 2 - 1
    losses = {w: vae_loss(vae, x, w, torch.Generator().manual_seed(0))[0].item() for w in (0.0, 0.5, 1.0)}
    redrawn = vae.decode(vae.encode(x).sample(torch.Generator().manual_seed(0)))
    assert losses[0.0] == pytest.approx(((redrawn - x) ** 2).mean().item(), rel=1e-5)
    per_number = vae.encode(x).kl().sum().item() / vae.encode(x).mean.numel()
    assert losses[1.0] - losses[0.5] == pytest.approx(0.5 * per_number, rel=1e-3)


def test_the_discriminator_is_taught_by_pictures_and_teaches_the_decoder():
    vae, judge, x = shake(VAE.from_config(SMALL_VAE)), Discriminator(8), torch.rand(2, 3, 32, 32) * 2 - 1
    assert judge(x).shape == (2, 1, 8, 8)
    redrawn = vae.decode(vae.encode(x).sample(torch.Generator().manual_seed(0)))

    def hinge():
        return (1 - judge(x)).clamp(min=0).mean() + (1 + judge(redrawn.detach())).clamp(min=0).mean()
    optimizer = torch.optim.Adam(judge.parameters(), 1e-2)
    while hinge() > 1:                                             # it must know something
        hinge().backward()
        optimizer.step()
        optimizer.zero_grad()
    both, last = [*vae.parameters(), *judge.parameters()], vae.decoder.conv_out.weight

    def gradients(weight):
        return dict(zip(both, torch.autograd.grad(vae_loss(
            vae, x, 0.0, torch.Generator().manual_seed(0), judge, weight)[0], both)))
    rec, fooled = torch.nn.functional.mse_loss(redrawn, x), -judge(redrawn).mean()
    at_last = [torch.autograd.grad(term, last, retain_graph=True)[0] for term in (rec, fooled)]
    off, on = gradients(0.0), gradients(0.5)
    for p, wanted in zip(judge.parameters(), torch.autograd.grad(hinge(), list(judge.parameters()))):
        assert torch.allclose(off[p], wanted, atol=1e-6) and torch.allclose(on[p], wanted, atol=1e-6)
    assert torch.allclose(off[last], at_last[0], atol=1e-7)        # without weight the decoder takes no notice
    extra = on[last] - off[last]                                   # with it, it is drawn to where the judge says "real"
    assert torch.cosine_similarity(extra.flatten(), at_last[1].flatten(), dim=0) > 0.999
    assert extra.norm() / at_last[0].norm() == pytest.approx(0.5 * (1 - hinge().item() / 2), rel=1e-2)
    assert all(on[p].abs().sum() > 0 for p in vae.encoder.parameters() if off[p].abs().sum() > 0)


class Grey(torch.nn.Module):
    """A VAE that draws nothing yet: its last convolution is still 0."""

    def __init__(self):
        super().__init__()
        self.decoder = torch.nn.Module()
        self.decoder.conv_out = torch.nn.Conv2d(4, 3, 3, padding=1)
        torch.nn.init.zeros_(self.decoder.conv_out.weight)
        torch.nn.init.zeros_(self.decoder.conv_out.bias)

    def encode(self, x):
        return DiagonalGaussian(torch.cat([torch.ones(1, 4, 64, 64), torch.full((1, 4, 64, 64), -30.0)], dim=1))

    def decode(self, z):
        return self.decoder.conv_out(torch.nn.functional.interpolate(z, scale_factor=8))


def test_the_discriminator_counts_in_float16_too():
    """An error of 0.01 in a picture of 512x512: its gradient begins at 3e-8, which float16 takes for 0."""
    vae, judge, x = Grey(), torch.nn.Conv2d(3, 1, 1), torch.full((1, 3, 512, 512), 0.01)
    judge.weight.data.fill_(200 / 3)                               # says 1 to x, and -1 to grey
    judge.bias.data.fill_(-1)

    def share(dtype):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            off, on = (2.0 ** 14 * vae_loss(vae, x, 0.0, None, judge, weight)[0] for weight in (0.0, 0.5))
        off, on = (torch.autograd.grad(loss, vae.decoder.conv_out.weight)[0] for loss in (off, on))
        return ((on - off).norm() / off.norm()).item()
    assert share(torch.float32) == pytest.approx(0.5, rel=1e-2)
    assert share(torch.float16) == pytest.approx(0.5, rel=5e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion.

@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
def test_many_small_steps_equal_the_closed_form(kind):
    schedule = NoiseSchedule(beta_schedule=kind)
    x, x0 = torch.full((40000,), 1.5), torch.full((40000,), 1.5)
    checked = 0
    for t in range(1000):                                          # q(x_t | x_{t-1}), Eq. 2
        x = (1 - schedule.beta[t]).sqrt() * x + schedule.beta[t].sqrt() * torch.randn(40000)
        if t in (0, 99, 499, 999):
            direct = schedule.q_sample(x0, t, torch.randn(40000))
            assert x.mean().item() == pytest.approx(direct.mean().item(), abs=0.03)
            assert x.var().item() == pytest.approx(direct.var().item(), abs=0.03)
            checked += 1
    assert checked == 4 and schedule.alpha_bar[-1] < 0.01


def test_posterior_equals_bayes_rule():
    schedule, x0, x_t = NoiseSchedule(), 0.7, -0.4
    grid = torch.linspace(-8, 8, 200001, dtype=torch.float64)

    def normal(x, mean, var):
        return torch.exp(-(x - mean) ** 2 / (2 * var)) / math.sqrt(2 * math.pi * var)
    for t, t_prev in ((500, 499), (800, 760), (10, 3)):
        abar, abar_prev = schedule.alpha_bar[t].double(), schedule.alpha_bar[t_prev].double()
        alpha = abar / abar_prev                                   # q(x_t | x_prev) q(x_prev | x_0), normalized
        density = normal(torch.tensor(x_t), alpha.sqrt() * grid, 1 - alpha) * normal(grid, abar_prev.sqrt() * x0,
                                                                                     1 - abar_prev)
        density /= density.sum()
        mean = (density * grid).sum().item()
        variance = (density * (grid - mean) ** 2).sum().item()
        ours = schedule.posterior(torch.tensor(x0), torch.tensor(x_t), t, t_prev)
        assert float(ours[0]) == pytest.approx(mean, abs=1e-4) and float(ours[1]) == pytest.approx(variance, rel=1e-3)


def test_velocity_and_noise_say_the_same():
    x0, noise = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3)
    t = torch.tensor([0, 10, 400, 900, 999])
    eps_schedule, v_schedule = NoiseSchedule(), NoiseSchedule(prediction_type="v_prediction")
    x_t = eps_schedule.q_sample(x0, t, noise)
    for schedule, output in ((eps_schedule, noise), (v_schedule, v_schedule.velocity(x0, t, noise))):
        back, eps = schedule.x0_and_eps(output, x_t, t)
        assert torch.allclose(back, x0, atol=2e-3) and torch.allclose(eps, noise, atol=1e-4)


def test_min_snr_weighs_the_error_in_x0_alike_for_both_predictions():
    """A model that is wrong by a known d in x_0 has loss min(SNR, gamma) * |d|^2, whatever it predicts."""
    x0, noise, d = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), 0.3
    t = torch.tensor([1, 300, 600, 950])
    for kind in ("epsilon", "v_prediction"):
        schedule = NoiseSchedule(prediction_type=kind)
        abar = schedule.alpha_bar[t].view(-1, 1, 1, 1)
        x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        wrong = (x_t - abar.sqrt() * (x0 + d)) / (1 - abar).sqrt()                 # the noise that goes with x0 + d
        output = wrong if kind == "epsilon" else abar.sqrt() * wrong - (1 - abar).sqrt() * (x0 + d)
        snr = (abar / (1 - abar)).flatten()
        weighted = diffusion_loss(schedule, lambda x, t: output, x0, t, noise, min_snr=5)
        assert torch.allclose(weighted, snr.clamp(max=5) * d ** 2, rtol=1e-2)
        plain = diffusion_loss(schedule, lambda x, t: output, x0, t, noise)
        assert torch.allclose(plain, (snr + (kind == "v_prediction")) * d ** 2, rtol=1e-2)


def test_guidance_is_linear():
    cond, uncond = torch.randn(2, 4), torch.randn(2, 4)
    assert torch.equal(guide(cond, uncond, 0), uncond) and torch.allclose(guide(cond, uncond, 1), cond)
    assert torch.allclose(guide(cond, uncond, 7.5) - uncond, 7.5 * (cond - uncond), atol=1e-5)


SPACINGS = [None, "leading", "trailing", "linspace"]
SCHEDULERS = {"ddim": diffusers.DDIMScheduler, "dpmpp": diffusers.DPMSolverMultistepScheduler,
              "ddpm": diffusers.DDPMScheduler}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "ddpm"])
def test_schedule_and_times_equal_diffusers(sampler, spacing):
    for beta in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        config = dict(beta_start=0.00085, beta_end=0.012, beta_schedule=beta, steps_offset=1, clip_sample=False)
        config |= {"timestep_spacing": spacing} if spacing else {}
        ours, other = NoiseSchedule.from_config(config), SCHEDULERS[sampler].from_config(config)
        assert relative(ours.alpha_bar, other.alphas_cumprod) < 1e-4
        for steps in (1, 7, 20, 25, 30, 48, 50, 96, 333):
            other.set_timesteps(steps)
            assert [t for t, _ in ours.timesteps(steps, sampler)] == other.timesteps.tolist(), (beta, steps)


def test_steps_equal_diffusers_whatever_the_schedule_says():
    """Schedules, strides and parts of the way at random, for a model that is wrong in its own way at every t."""
    rng, compared = np.random.default_rng(0), 0
    for trial in range(120):
        def one_of(*values): return values[rng.integers(len(values))]
        sampler, T, steps = one_of(*SCHEDULERS), one_of(1000, 1000, 100, 333, 4000), one_of(1, 2, 3, 5, 7, 20, 25, 50)
        config = dict(num_train_timesteps=T, beta_start=one_of(0.00085, 1e-4), beta_end=one_of(0.012, 0.02),
                      beta_schedule=one_of("linear", "scaled_linear", "squaredcos_cap_v2"), steps_offset=one_of(0, 1),
                      prediction_type=one_of("epsilon", "v_prediction"), set_alpha_to_one=one_of(True, False),
                      clip_sample=one_of(True, False)) | one_of({}, *(dict(timestep_spacing=s) for s in SPACINGS[1:]))
        ours, other = NoiseSchedule.from_config(config), SCHEDULERS[sampler].from_config(config)
        strength = one_of(1, 1, 0.6)
        other.set_timesteps(steps)
        first = steps - int(steps * strength)
        if first == steps:
            continue
        times = ours.timesteps(steps, sampler, strength)
        if [t for t, _ in times] != other.timesteps[first:].tolist():
            assert 2 * steps >= T, (config, steps)                 # so many that theirs repeat or leave the schedule
            continue
        sampler == "dpmpp" and other.set_begin_index(first)
        W, start = torch.randn(2, 2), torch.randn(1, 2, 4, 4)

        def model(x, t):
            return torch.einsum("ij,bjhw->bihw", W, x.float()).tanh() * (1 + t / T)
        torch.manual_seed(trial)
        for a, _ in SAMPLERS[sampler](ours, model, start, times, randn=lambda x: torch.randn(x.shape)):
            pass
        torch.manual_seed(trial)
        b = start
        for t in other.timesteps[first:]:
            b = other.step(model(b, int(t)), t, b).prev_sample
        assert relative(a, b) < 2e-3, (config, sampler, steps, strength)
        compared += 1
    assert compared > 100


def test_a_thousand_steps_stay_within_the_schedule():
    for spacing in SPACINGS:
        for sampler in SAMPLERS:
            times = NoiseSchedule(timestep_spacing=spacing).timesteps(1000, sampler)
            assert all(0 <= t < 1000 for t, _ in times) and len(times) >= 998
    for steps in (0, -1, 1001):
        with pytest.raises(ValueError, match="steps"):
            NoiseSchedule().timesteps(steps)


# ---------------------------------------------------------------------------------------------------------------------
# Samplers, driven by the perfect denoiser of data that has one in closed form.

def gaussian_denoiser(schedule, mean, std):
    """For x_0 ~ N(mean, std^2): x_t is Gaussian too, and E[eps | x_t] is linear in x_t."""
    def model(x, t):
        abar = schedule.alpha_bar[t].item()
        eps = math.sqrt(1 - abar) * (x - math.sqrt(abar) * mean) / (abar * std ** 2 + 1 - abar)
        x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        return eps if schedule.prediction_type == "epsilon" else math.sqrt(abar) * eps - math.sqrt(1 - abar) * x0
    return model


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler, steps", [("ddpm", 1000), ("ddim", 200), ("dpmpp", 50)])
def test_samplers_return_gaussian_data(sampler, steps, prediction):
    # DDPM's own schedule ends in noise alone. Stable Diffusion's keeps 7 % of the picture; a start without it shifts
    # what the deterministic samplers return.
    schedule = NoiseSchedule(1000, 1e-4, 0.02, "linear", prediction, set_alpha_to_one=True, timestep_spacing="trailing")
    x = torch.randn(20000, 1)
    for x, _ in SAMPLERS[sampler](schedule, gaussian_denoiser(schedule, 0.8, 0.5), x,
                                  schedule.timesteps(steps, sampler)):
        pass
    assert x.mean().item() == pytest.approx(0.8, abs=0.02) and x.std().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("sampler, steps", [("ddpm", 1000), ("ddim", 200), ("dpmpp", 100)])
def test_samplers_return_two_points(sampler, steps):
    """x_0 is -1 or +1: E[x_0 | x_t] = tanh(sqrt(abar) x_t / (1 - abar)). A sampler must decide, half for each."""
    schedule = NoiseSchedule(set_alpha_to_one=True, timestep_spacing="trailing")

    def model(x, t):
        abar = schedule.alpha_bar[t].item()
        return (x - math.sqrt(abar) * torch.tanh(math.sqrt(abar) * x / (1 - abar))) / math.sqrt(1 - abar)
    x = torch.randn(8000, 1)
    for x, _ in SAMPLERS[sampler](schedule, model, x, schedule.timesteps(steps, sampler)):
        pass
    assert ((x.abs() - 1).abs() < 0.05).float().mean() > 0.99 and abs((x > 0).float().mean().item() - 0.5) < 0.03


def test_ddim_with_eta_one_has_the_spread_of_ddpm():
    schedule = NoiseSchedule(set_alpha_to_one=True)
    times, model, ends = schedule.timesteps(20, "ddim"), gaussian_denoiser(schedule, 0.0, 1.0), []
    for run in (lambda x: ddpm.ddim(schedule, model, x, times, eta=1.0),
                lambda x: ddpm.ddpm(schedule, model, x, times)):
        for x, _ in run(torch.randn(40000, 1)):
            pass
        ends.append(x.std().item())
    assert ends[0] == pytest.approx(ends[1], rel=0.02)
    assert ends[0] < 0.99                                          # too few steps lose variance, and both as much


def test_solvers_converge_at_their_order():
    """Down to a fixed time, the exact solution for N(m, s^2) is known: DDIM's error halves, DPM++'s quarters."""
    schedule, mean, std = NoiseSchedule(num_train_timesteps=200_000, beta_start=0.00085 / 200,
                                        beta_end=0.012 / 200), 0.8, 0.5
    alpha_bar = torch.cumprod(1 - schedule.beta.double(), 0)
    schedule.alpha_bar = alpha_bar                                 # float64: rounding must not hide the order
    log_snr = 0.5 * torch.log(alpha_bar / (1 - alpha_bar))
    first, last = 190_000, 2_000
    x = torch.tensor([[1.3], [-0.4]], dtype=torch.float64)

    def spread(t):
        return math.sqrt(alpha_bar[t] * std ** 2 + 1 - alpha_bar[t])
    exact = math.sqrt(alpha_bar[last]) * mean + (x - math.sqrt(alpha_bar[first]) * mean) * spread(last) / spread(first)
    errors = {"ddim": [], "dpmpp": []}
    model = gaussian_denoiser(schedule, mean, std)
    for name in errors:
        for steps in (20, 40, 80):
            wanted = torch.linspace(log_snr[first], log_snr[last], steps + 1, dtype=torch.float64)
            times = [(log_snr - w).abs().argmin().item() for w in wanted]
            for end, _ in getattr(ddpm, name)(schedule, Double(model), x, list(zip(times, times[1:]))):
                pass
            errors[name].append((end - exact).abs().max().item())
    for name, ratio in (("ddim", 2), ("dpmpp", 4)):
        for coarse, fine in zip(errors[name], errors[name][1:]):
            assert coarse / fine == pytest.approx(ratio, rel=0.25), errors


class Double:
    """A model whose answers survive the samplers' .float() in float64."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x, t):
        answer = self.model(x, t)
        return type("Answer", (), {"float": lambda self: answer})()


# ---------------------------------------------------------------------------------------------------------------------
# Whole pictures: the same weights and the same start latents give diffusers' picture.

def make_pipeline(**schedule):
    """A small model with random weights and a trained tokenizer, without any training of its own."""
    tokenizer = train_tokenizer(["a red house on a green hill", "a blue boat in the fog"] * 5, vocab_size=560,
                                max_length=20)
    text = dict(SMALL_TEXT, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return Pipeline(shake(UNet.from_config(SMALL_UNET), 1), shake(VAE.from_config(SMALL_VAE), 2),
                    shake(CLIPTextEncoder.from_config(text), 3), tokenizer, NoiseSchedule(**schedule))


def decibel(a, b):
    """Peak signal-to-noise ratio between two lists of PIL pictures."""
    a, b = (np.stack([np.asarray(p, dtype=float) for p in pictures]) for pictures in (a, b))
    return 10 * np.log10(255 ** 2 / max(((a - b) ** 2).mean(), 1e-9))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The small pipeline as a folder."""
    folder = str(tmp_path_factory.mktemp("model") / "small")
    save_pipeline(make_pipeline(), folder)
    return folder


def theirs_from(folder, sampler, cls=diffusers.StableDiffusionPipeline, **config):
    pipe = cls.from_pretrained(folder)
    pipe.scheduler = SCHEDULERS[sampler].from_config(dict(pipe.scheduler.config) | config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("sampler, steps", [("ddim", 20), ("ddim", 30), ("dpmpp", 20), ("dpmpp", 9)])
@pytest.mark.parametrize("config", [dict(), dict(prediction_type="v_prediction", timestep_spacing="trailing")])
def test_pictures_equal_diffusers(saved, tmp_path, sampler, steps, config):
    pipe = make_pipeline(**config)
    save_pipeline(pipe, str(tmp_path))
    latents = torch.randn(2, 4, 16, 12)
    expected = theirs_from(str(tmp_path), sampler)(
        ["a red house", "fog"], negative_prompt=["boat", "boat"], latents=latents, num_inference_steps=steps,
        guidance_scale=5.0, height=64, width=48).images
    ours = generate(load_pipeline(str(tmp_path)), ["a red house", "fog"], "boat", steps, 5.0, sampler, latents=latents,
                    height=64, width=48, progress=False)
    assert decibel(ours, expected) > 45
    assert decibel(ours[:1], ours[1:]) < 40                        # and they are two pictures, not one


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DDIMScheduler"])
def test_latents_are_not_clipped_whatever_the_scheduler_file_says(saved, tmp_path, scheduler):
    """DDIMScheduler clips by default, Euler's file does not say; but diffusers' pipelines see to it that none does."""
    shutil.copytree(saved, tmp_path / "m")
    getattr(diffusers, scheduler)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                  steps_offset=1).save_pretrained(tmp_path / "m/scheduler")
    parts = diffusers.StableDiffusionPipeline.from_pretrained(saved).components
    parts["scheduler"] = diffusers.DDIMScheduler.from_pretrained(tmp_path / "m/scheduler")
    theirs, latents = diffusers.StableDiffusionPipeline(**parts), 3 * torch.randn(1, 4, 16, 16)
    expected = theirs("a red house", latents=latents, num_inference_steps=5).images
    pipe = load_pipeline(str(tmp_path / "m"))
    assert decibel(generate(pipe, "a red house", steps=5, sampler="ddim", latents=latents, progress=False),
                   expected) > 45 and pipe.schedule.to_config()["clip_sample"] is False


def test_image_to_image_equals_diffusers_from_the_same_seed(saved):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for sampler in ("ddim", "dpmpp"):
        pipe = theirs_from(saved, sampler, diffusers.StableDiffusionImg2ImgPipeline)
        expected = pipe("a blue boat", image=photo, strength=0.6, num_inference_steps=20, guidance_scale=4.0,
                        generator=torch.Generator().manual_seed(5)).images
        ours = generate(load_pipeline(saved), "a blue boat", "", 20, 4.0, sampler, seed=5,
                        init_image=photo, strength=0.6,
                        progress=False)
        assert decibel(ours, expected) > 45


def test_the_same_seed_draws_what_diffusers_draws(saved):
    expected = theirs_from(saved, "dpmpp")("fog", num_inference_steps=8, guidance_scale=3.0, height=64, width=64,
                                           generator=torch.Generator().manual_seed(11)).images
    ours = generate(load_pipeline(saved), "fog", steps=8, guidance=3.0, seed=11, height=64, width=64, progress=False)
    assert decibel(ours, expected) > 45


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_picture_depends_on_its_own_seed_alone(saved, sampler):
    pipe = load_pipeline(saved)
    settings = dict(steps=6, sampler=sampler, progress=False)
    together = generate(pipe, "fog", seed=3, num_images=3, **settings)
    for k in range(3):
        assert decibel([together[k]], generate(pipe, "fog", seed=3 + k, **settings)) > 45
    assert decibel(together[:1], together[1:2]) < 40
    several = generate(pipe, ["boat", "fog"], seed=2, **settings)
    assert decibel(several[1:], together[:1]) > 45


def test_guidance_one_ignores_the_negative_prompt(saved):
    pipe, settings = load_pipeline(saved), dict(steps=5, progress=False)
    assert decibel(generate(pipe, "fog", "boat", guidance=1, **settings),
                   generate(pipe, "fog", guidance=1, **settings)) > 80
    assert decibel(generate(pipe, "fog", "boat", guidance=5, **settings),
                   generate(pipe, "fog", guidance=5, **settings)) < 60


def test_any_size_and_init_image(saved):
    pipe = load_pipeline(saved)
    assert generate(pipe, "fog", steps=2, height=50, width=90, progress=False)[0].size == (90, 50)
    wide = Image.new("RGB", (400, 100), "red")
    picture = generate(pipe, "fog", steps=3, init_image=wide, progress=False)[0]
    assert picture.width / picture.height == pytest.approx(4, rel=0.1)
    # Cropped at the centre, not stretched: a square from the middle of three stripes is all of the middle one.
    stripes = Image.new("RGB", (96, 32), "black")
    stripes.paste("white", (32, 0, 64, 32))
    assert picture_to_tensor(stripes, 32, 32).min() > 0.99


def test_inpainting_keeps_what_the_mask_keeps(saved):
    rng = np.random.default_rng(1)
    photo = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    ours = np.asarray(generate(load_pipeline(saved), "fog", steps=6, init_image=photo, mask_image=mask, strength=1.0,
                               progress=False)[0]).astype(int)
    before = np.asarray(photo).astype(int)
    assert (ours[:, :32] == before[:, :32]).all() and abs(ours[:, 40:] - before[:, 40:]).mean() > 20


def test_pinning_makes_the_kept_part_exact():
    """Whatever the model says, where the mask is 0 every sampler must end at the known picture."""
    schedule = NoiseSchedule(set_alpha_to_one=True)
    known, mask = torch.randn(1, 4, 8, 8), torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    for name, sampler in SAMPLERS.items():
        model = ddpm.pin(schedule, lambda x, t: torch.randn_like(x), known, mask)
        for x, _ in sampler(schedule, model, torch.randn(1, 4, 8, 8), schedule.timesteps(20, name)):
            pass
        assert torch.allclose(x[..., :4], known[..., :4], atol=1e-3), name
        assert not torch.allclose(x[..., 4:], known[..., 4:], atol=0.1), name


# ---------------------------------------------------------------------------------------------------------------------
# Published models: their configs at reduced width, as diffusers writes them, and as the original release's single file.

SCHEDULER_15 = dict(_class_name="PNDMScheduler", _diffusers_version="0.6.0", beta_end=0.012,
                    beta_schedule="scaled_linear",
                    beta_start=0.00085, num_train_timesteps=1000, set_alpha_to_one=False, skip_prk_steps=True,
                    steps_offset=1,
                    trained_betas=None, clip_sample=False)
SCHEDULER_21 = dict(SCHEDULER_15, _class_name="DDIMScheduler", _diffusers_version="0.8.0",
                    prediction_type="v_prediction")
NARROW = dict(block_out_channels=[32, 64, 64, 64], cross_attention_dim=64, sample_size=8)
WIDE_HEADS = dict(block_out_channels=[64, 128, 128, 128], cross_attention_dim=128, attention_head_dim=[1, 2, 2, 2],
                  sample_size=8)
KINDS = {"1.5": (dict(UNET_15, **NARROW), SCHEDULER_15), "2.1": (dict(UNET_21, **WIDE_HEADS), SCHEDULER_21),
         "inpainting": (dict(UNET_21, **WIDE_HEADS, in_channels=9), dict(SCHEDULER_15, _class_name="PNDMScheduler"))}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """{kind: (folder written by diffusers, its pipeline)}, with random weights, the published configs, but narrow."""
    found, words = {}, make_pipeline().tokenizer
    for kind, (unet, scheduler) in KINDS.items():
        width, old = unet["cross_attention_dim"], kind == "1.5"
        text = dict(TEXT_15 if old else TEXT_21, hidden_size=width, intermediate_size=96,
                    num_attention_heads=width // 64,
                    num_hidden_layers=2 if old else 23, vocab_size=len(words), eos_token_id=words.eos_token_id)
        parts = dict(unet=shake(diffusers.UNet2DConditionModel.from_config(unet), 1),
                     vae=shake(diffusers.AutoencoderKL.from_config(dict(VAE_15, block_out_channels=[32, 32, 64, 64])),
                               2),
                     text_encoder=shake(transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)), 3),
                     scheduler=getattr(diffusers, scheduler["_class_name"]).from_config(scheduler), tokenizer=words)
        with torch.no_grad():
            parts["unet"].conv_out.weight *= 8                     # a U-Net whose word counts
        cls = diffusers.StableDiffusionInpaintPipeline if kind == "inpainting" else diffusers.StableDiffusionPipeline
        folder = str(tmp_path_factory.mktemp("published") / kind)
        pipe = cls(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipe.save_pretrained(folder)
        with open(os.path.join(folder, "scheduler/scheduler_config.json"), "w") as f:
            json.dump(scheduler, f)                                # word for word as published
        found[kind] = (folder, pipe)
    return found


def photo(width=64, height=64, seed=0):
    """Something with large shapes, fine grain and no symmetry."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8)).resize((width, height),
                                                                                     Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(coarse) * 0.8 + rng.integers(0, 50, (height, width, 3))).astype(np.uint8))


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp"])
@pytest.mark.parametrize("kind", ["1.5", "2.1"])
def test_published_configs_draw_what_diffusers_draws(published, kind, sampler):
    folder, latents = published[kind][0], torch.randn(1, 4, 8, 12)
    prompt, settings = "a red house on a green hill", dict(num_inference_steps=20, guidance_scale=7.5)
    expected = theirs_from(folder, sampler)(prompt, latents=latents, height=64, width=96, **settings).images
    ours = generate(load_pipeline(folder), prompt, "", 20, 7.5, sampler, latents=latents, height=64, width=96,
                    progress=False)
    assert decibel(ours, expected) > 45
    expected = theirs_from(folder, sampler, diffusers.StableDiffusionImg2ImgPipeline)(
        prompt, image=photo(), strength=0.7, generator=torch.Generator().manual_seed(9), **settings).images
    ours = generate(load_pipeline(folder), prompt, "", 20, 7.5, sampler, 9, init_image=photo(), strength=0.7,
                    progress=False)
    assert decibel(ours, expected) > 45


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_nine_channel_inpainting_equals_diffusers(published, sampler, strength):
    folder, mask = published["inpainting"][0], Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 24, 56, 64))
    expected = theirs_from(folder, sampler, diffusers.StableDiffusionInpaintPipeline)(
        "fog", image=photo(), mask_image=mask, height=64, width=64, strength=strength, num_inference_steps=20,
        guidance_scale=7.5, generator=torch.Generator().manual_seed(4)).images
    pipe, settings = load_pipeline(folder), dict(steps=20, sampler=sampler, seed=4, strength=strength, progress=False)
    assert decibel(generate(pipe, "fog", init_image=photo(), mask_image=mask, **settings), expected) > 45
    other = generate(pipe, "fog", init_image=photo(), mask_image=Image.new("L", (64, 64), 255), **settings)
    assert decibel(other, expected) < 40                           # the mask does matter
    with pytest.raises(BadInput, match="--mask"):
        generate(pipe, "fog", progress=False)


def original(unet, vae, text, open_clip=False):
    """Weights under diffusers' names (dicts) -> one dict under those of the original release, prefixes and all."""
    state, depth = {}, max(int(k.split(".")[2]) for k in vae if k.startswith("encoder.down_blocks"))

    def renamed(k, names):
        for new, old in names.items():
            k = k.replace(new, old)
        return k
    for k, v in unet.items():
        if m := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", k):
            side, i, what, j, rest = m[1], int(m[2]), m[3], int(m[4]), m[5]
            attended = f"up_blocks.{i}.attentions.0.norm.weight" in unet
            k = {"downsamplers": f"input_blocks.{3 * i + 3}.0.{rest.replace('conv', 'op')}",
                 "upsamplers": f"output_blocks.{3 * i + 2}.{1 + attended}.{rest}"}.get(what) or \
                f"{'input' if side == 'down' else 'output'}_blocks.{3 * i + j + (side == 'down')}." \
                f"{int(what == 'attentions')}.{rest}"
        elif m := re.match(r"mid_block\.(\w+)\.(\d+)\.(.*)", k):
            k = f"middle_block.{1 if m[1] == 'attentions' else 2 * int(m[2])}.{m[3]}"
        if re.search(r"put_blocks\.\d+\.0\.|middle_block\.[02]\.", k):
            k = renamed(k, {".norm1.": ".in_layers.0.", ".conv1.": ".in_layers.2.", ".norm2.": ".out_layers.0.",
                            ".conv2.": ".out_layers.3.", "time_emb_proj": "emb_layers.1",
                            "conv_shortcut": "skip_connection"})
        state["model.diffusion_model." + renamed(k, {
            "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
            "conv_in": "input_blocks.0.0",
            "conv_norm_out": "out.0", "conv_out": "out.2"})] = v
    for k, v in vae.items():
        k = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{depth - int(m[1])}", k.replace("down_blocks", "down"))
        k = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", k)
        k = renamed(k, {".resnets.": ".block.", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
                        "group_norm": "norm",
                        "mid_block.attentions.0": "mid.attn_1", "to_q": "q", "to_k": "k", "to_v": "v",
                        "to_out.0": "proj_out",
                        "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out"})
        state["first_stage_model." + k] = v[:, :, None, None] if "attn_1" in k and v.dim() == 2 else v
    text = {k.removeprefix("text_model."): v for k, v in text.items()}
    if not open_clip:
        return state | {"cond_stage_model.transformer.text_model." + k: v for k, v in text.items()}
    for k, v in text.items():
        if ".q_proj." in k:                                        # OpenCLIP keeps q, k and v in one tensor
            v = torch.cat([text[k.replace("q_proj", letter + "_proj")] for letter in "qkv"])
        if ".k_proj." not in k and ".v_proj." not in k:
            state["cond_stage_model.model." + renamed(k, {
                "encoder.layers": "transformer.resblocks", "self_attn.q_proj.": "attn.in_proj_", "self_attn": "attn",
                "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
                "final_layer_norm": "ln_final", "embeddings.token_embedding": "token_embedding",
                "embeddings.position_embedding.weight": "positional_embedding"})] = v
    return state


STRAYS = {"model_ema.decay": torch.ones(()), "model_ema.diffusion_modelout2bias": torch.ones(4),
          "alphas_cumprod": torch.ones(1000),
          "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
          "first_stage_model.loss.logvar": torch.zeros(())}
STRAYS_2 = {"cond_stage_model.model.text_projection": torch.ones(3, 3),
            "cond_stage_model.model.logit_scale": torch.ones(()),
            "cond_stage_model.model.attn_mask": torch.ones(77, 77),
            "cond_stage_model.model.transformer.resblocks.23.ln_1.weight": torch.ones(128),
            "global_step": torch.ones(())}


@pytest.fixture(scope="module")
def singles(published, tmp_path_factory):
    """{kind: (the weights of a single file, a folder with its tokenizer)}. diffusers agrees that they are such."""
    from diffusers.loaders import single_file_utils as converters
    found = {}
    for kind, (folder, pipe) in published.items():
        old = kind == "1.5"
        state = original(pipe.unet.state_dict(), pipe.vae.state_dict(), pipe.text_encoder.state_dict(),
                         open_clip=not old)
        for convert, part in ((converters.convert_ldm_unet_checkpoint, pipe.unet),
                              (converters.convert_ldm_vae_checkpoint, pipe.vae)):
            back = convert(dict(state), dict(part.config))
            assert back.keys() == part.state_dict().keys() and all(torch.equal(back[k], v)
                                                                   for k, v in part.state_dict().items())
        back = converters.convert_ldm_clip_checkpoint(dict(state)) if old else \
            converters.convert_open_clip_checkpoint(pipe.text_encoder, dict(state), prefix="cond_stage_model.model.")
        back = {k.removeprefix("text_model."): v for k, v in back.items()}
        assert all(torch.equal(back[k.removeprefix("text_model.")], v)
                   for k, v in pipe.text_encoder.state_dict().items())
        found[kind] = state | (STRAYS if old else STRAYS_2), os.path.join(folder, "tokenizer")
    return found


def write_single(state, path, form):
    """The forms in which such weights go about."""
    if form == "safetensors":
        from safetensors.torch import save_file
        save_file({k: v.contiguous().clone() for k, v in state.items()}, path)
    else:
        lightning = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
        names = lightning.__module__.split(".")
        modules = {".".join(names[:n]): type(sys)(".".join(names[:n])) for n in (1, 2, 3)}
        modules[lightning.__module__].ModelCheckpoint = lightning
        with pytest.MonkeyPatch.context() as patch:                # for as long as the file is written
            for name, module in modules.items():
                patch.setitem(sys.modules, name, module)
            torch.save({"flat": state, "nested": {"state_dict": state, "epoch": 3}, "lightning": {
                "state_dict": state, "global_step": 470000,
                "callbacks": {lightning: {"best_model_score": torch.ones(())}},
                "lr_schedulers": [{"base_lrs": [1e-4]}]}}[form], path)


@pytest.mark.parametrize("form", ["safetensors", "flat", "nested", "lightning"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_single_file_is_the_same_model_as_its_folder(published, singles, tmp_path, kind, form):
    (state, words), path = singles[kind], str(tmp_path / f"model.{'safetensors' if form == 'safetensors' else 'ckpt'}")
    write_single(state, path, form)
    ours, folder = load_pipeline(path, tokenizer=words), load_pipeline(published[kind][0])
    for part in sample.PARTS:
        a, b = (getattr(pipe, part) for pipe in (ours, folder))
        assert a.state_dict().keys() == b.state_dict().keys() and same_weights(a, b)
        sizes = [{k: v for k, v in module.config.items()
                  if k not in ("sample_size", "eos_token_id", "bos_token_id", "pad_token_id")}
                 for module in (a, b)]
        assert sizes[0] == sizes[1], part
    assert ours.schedule.to_config() == folder.schedule.to_config()
    half = load_pipeline(path, dtype=torch.float16, tokenizer=words)
    assert half.unet.conv_in.weight.dtype == torch.float16 and half.vae.encoder.conv_in.weight.dtype == torch.float32


def test_what_a_single_file_predicts_can_be_said(singles, tmp_path):
    path = str(tmp_path / "model.safetensors")
    write_single(singles["2.1"][0], path, "safetensors")
    pipe = load_pipeline(path, tokenizer=singles["2.1"][1])
    assert pipe.schedule.prediction_type == "v_prediction" and pipe.unet.config["sample_size"] == 96
    padding, ids = pipe.tokenizer.get_vocab()["!"], tokenize(pipe.tokenizer, ["fog!"])[0].tolist()
    assert pipe.tokenizer.pad_token == "!" and ids[-1] == padding == ids[ids.index(pipe.tokenizer.eos_token_id) - 1]
    pipe = load_pipeline(path, tokenizer=singles["2.1"][1], prediction_type="epsilon")
    assert pipe.schedule.prediction_type == "epsilon" and pipe.unet.config["sample_size"] == 64


@pytest.mark.parametrize("spoil, words", [
    (lambda s: s.pop("model.diffusion_model.out.2.bias"), "conv_out.bias is missing"),
    (lambda s: s.pop("first_stage_model.decoder.up.1.block.0.conv1.weight"),
     "decoder.up_blocks.2.resnets.0.conv1.weight is missing"),
    (lambda s: s.update({"first_stage_model.quant_conv.bias": torch.ones(5)}),
     r"quant_conv.bias is \(5,\), should be \(8,\)"),
    (lambda s: s.update({"model.diffusion_model.label_emb.0.0.weight": torch.ones(5)}),
     "label_emb.0.0.weight is .*should be absent"),
    (lambda s: s.pop("cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias"),
     "layers.1.mlp.fc1.bias is missing"),
    (lambda s: [s.pop(k) for k in list(s) if k.startswith("cond_stage")],
     "holds no text_encoder: no tensor cond_stage_model"),
    (lambda s: [s.update({"lora_" + k: s.pop(k)}) for k in list(s)], "holds no unet: no tensor model.diffusion_model")])
def test_a_single_file_that_does_not_fit_is_named(singles, tmp_path, spoil, words):
    state, path = dict(singles["1.5"][0]), str(tmp_path / "odd.safetensors")
    spoil(state)
    write_single(state, path, "safetensors")
    with pytest.raises(BadInput, match="odd.safetensors.*" + words) as error:
        load_pipeline(path, tokenizer=singles["1.5"][1])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tensor", [
    lambda: torch.zeros(1).expand(10 ** 5, 10 ** 5, 1, 1), lambda: torch.ones(3, 4, device="meta"),
    lambda: torch.eye(3).to_sparse()])
def test_tensors_that_do_not_hold_all_their_numbers_are_refused(tmp_path, tensor):
    """The first would fill 40 GB of memory from a file of a kilobyte."""
    torch.save({"model.diffusion_model.conv": tensor()}, tmp_path / "small.ckpt")
    with pytest.raises(BadInput, match="small.ckpt: .*tensors"):
        load_pipeline(str(tmp_path / "small.ckpt"))


class Hostile:
    """Unpickled by an unwary reader, it leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("write", [
    lambda bad, path: torch.save({"state_dict": {"a": torch.ones(2)}, "bad": bad}, path),
    lambda bad, path: torch.save({"a": bad}, path, _use_new_zipfile_serialization=False),
    lambda bad, path: pickle.dump({"state_dict": bad}, open(path, "wb"), protocol=2),
    lambda bad, path: pickle.dump(bad, open(path, "wb")), lambda bad, path: torch.save(
        OrderedDict(a=torch.ones(2), bad=bad), path, pickle_protocol=4)],
    ids=["zip", "legacy", "protocol 2", "newest protocol", "zip, protocol 4"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_hostile_pickle_runs_nothing_and_is_named(saved, tmp_path, write):
    trace, path = tmp_path / "was_here", str(tmp_path / "model.ckpt")
    write(Hostile(trace), path)
    with pytest.raises(BadInput, match=r"model.ckpt: refused: it asks for (posix|nt)\.system"):
        load_pipeline(path)
    shutil.copytree(saved, tmp_path / "m")
    os.remove(tmp_path / "m/vae/diffusion_pytorch_model.safetensors")
    shutil.move(path, tmp_path / "m/vae/diffusion_pytorch_model.bin")
    with pytest.raises(BadInput, match=r"diffusion_pytorch_model.bin: refused: it asks for (posix|nt)\.system"):
        load_pipeline(str(tmp_path / "m"))
    assert not trace.exists()


@pytest.mark.parametrize("variant, pickled", [(None, False), ("fp16", False), (None, True), ("non_ema", False)])
def test_folders_load_in_every_published_form(published, tmp_path, variant, pickled):
    folder, pipe = published["1.5"]
    pipe.save_pretrained(str(tmp_path), variant=variant, safe_serialization=not pickled)
    os.remove(tmp_path / "tokenizer" / "tokenizer.json")
    pipe.tokenizer.backend_tokenizer.model.save(str(tmp_path / "tokenizer"))       # vocab.json and merges.txt
    weights, = {*os.listdir(tmp_path / "vae")} - {"config.json"}
    assert weights.endswith(".bin") == pickled and weights.count(".") == 1 + bool(variant)
    assert (variant or "") in weights
    ours, expected = load_pipeline(str(tmp_path)), load_pipeline(folder)
    assert all(same_weights(getattr(ours, part), getattr(expected, part)) for part in sample.PARTS)
    assert torch.equal(tokenize(ours.tokenizer, ["fog"]), tokenize(expected.tokenizer, ["fog"]))


class Hub:
    """huggingface_hub's two functions, over local folders; knows which files were asked for."""

    def __init__(self, repositories, cache, online=True):
        self.repositories, self.cache, self.online, self.asked = repositories, cache, online, []

    def model_info(self, name):
        if not self.online:
            raise ConnectionError("no network")
        if name not in self.repositories:
            raise type("RepositoryNotFoundError", (OSError,), {})("404: no such repository")
        root = self.repositories[name]
        files = [os.path.relpath(os.path.join(folder, file), root) for folder, _, names in os.walk(root)
                 for file in names]
        return type("Info", (), {"siblings": [type("File", (), {"rfilename": file}) for file in files]})

    def snapshot_download(self, name, allow_patterns=None, local_files_only=False):
        target = os.path.join(self.cache, name.replace("/", "--"))
        if local_files_only and not os.path.isdir(target):
            raise FileNotFoundError("not in the cache")
        for file in [] if local_files_only else allow_patterns:
            self.asked.append(file)
            os.makedirs(os.path.dirname(os.path.join(target, file)), exist_ok=True)
            shutil.copy(os.path.join(self.repositories[name], file), os.path.join(target, file))
        return target


def test_the_hub_is_asked_for_what_is_needed_and_no_more(published, tmp_path, monkeypatch, capsys):
    import huggingface_hub
    folder, pipe = published["1.5"]
    repository = tmp_path / "repository"
    for variant, safe in ((None, True), ("fp16", True), (None, False)):
        pipe.save_pretrained(str(repository), variant=variant, safe_serialization=safe)
    os.remove(repository / "vae/diffusion_pytorch_model.safetensors")              # one part is there in half precision
    os.remove(repository / "vae/diffusion_pytorch_model.bin")
    os.remove(repository / "text_encoder/model.safetensors")
    for stray in ("v1-5-pruned.ckpt", "model.safetensors", "safety_checker/model.safetensors", "README.md",
                  "unet/diffusion_flax_model.msgpack"):
        (repository / stray).parent.mkdir(exist_ok=True)
        (repository / stray).write_text("gigabytes")
    hub = Hub({"stable-diffusion-v1-5/stable-diffusion-v1-5": repository}, str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "model_info", hub.model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.chdir(tmp_path)
    ours = load_pipeline("runwayml/stable-diffusion-v1-5")         # where it was once
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in capsys.readouterr().err
    assert same_weights(ours.unet, load_pipeline(folder).unet)
    heavy = {file for file in hub.asked if not file.endswith((".json", ".txt"))}
    assert heavy == {"unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
                     "text_encoder/model.fp16.safetensors"}
    assert not any(file.startswith("safety_checker") for file in hub.asked)
    hub.online, hub.asked = False, []                              # without a network, the cache serves
    assert same_weights(load_pipeline("stable-diffusion-v1-5/stable-diffusion-v1-5").vae, ours.vae) and not hub.asked
    with pytest.raises(BadInput, match="someone/else: .*cache.*cannot be reached.*no network"):
        load_pipeline("someone/else")
    hub.online = True
    with pytest.raises(BadInput, match="someone/else: .*knows no such model"):
        load_pipeline("someone/else")
    os.rename(tmp_path / "cache/stable-diffusion-v1-5--stable-diffusion-v1-5",
              tmp_path / "cache/runwayml--stable-diffusion-v1-5")
    hub.online = False                                             # cached long ago, under the old name
    assert same_weights(load_pipeline("runwayml/stable-diffusion-v1-5").vae, ours.vae)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_whole_clip_loads_and_tells_pictures_apart(tmp_path, pickled):
    words = make_pipeline().tokenizer
    text = dict(SMALL_TEXT, vocab_size=len(words), eos_token_id=2)  # 2 as published: it means the largest id
    theirs = shake(transformers.CLIPModel(transformers.CLIPConfig(text_config=text, projection_dim=12,
                                                                  vision_config=dict(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, image_size=16,
        patch_size=4))))
    theirs.save_pretrained(str(tmp_path))
    if pickled:
        os.remove(tmp_path / "model.safetensors")
        torch.save(theirs.state_dict() | {"text_model.embeddings.position_ids": torch.arange(20)[None]},
                   tmp_path / "pytorch_model.bin")
    words.save_pretrained(str(tmp_path))
    clip, tokenizer = sample.load_clip(str(tmp_path))
    x, ids = torch.rand(2, 3, 16, 16) * 2 - 1, tokenize(tokenizer, ["fog", "a blue boat", "a red house"])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP.MEAN, CLIP.STD))
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=((x + 1) / 2 - mean) / std).logits_per_image
        assert relative(clip.logit_scale.exp() * clip.encode_image(x) @ clip.encode_text(ids).T, expected) < 1e-4
        text, _ = sample.load_clip(str(tmp_path), part="text_encoder")
        assert relative(text(ids), theirs.text_model(ids).last_hidden_state) < 1e-5


@pytest.mark.parametrize("preset, words, room", [("tiny", 1, 8), ("tiny", 6, 8), ("tiny", 7, 16), ("tiny", 90, 32),
                                                 ("base", 90, 77)])
def test_a_new_text_encoder_has_room_for_the_longest_caption_and_hardly_more(preset, words, room):
    """Start and end count, too. Padding would drown a short caption's words in the mean of all tokens."""
    captions = ["ship", "ship " * words]
    tokenizer, clip = clip_encoder.build_clip(preset, 32, captions)
    assert tokenizer.model_max_length == room == clip.text_encoder(0).config["max_position_embeddings"]
    assert tokenize(tokenizer, captions).shape == (2, room)
    assert bool(clip_encoder.cut_off(tokenizer, captions[1])) == (words > room - 2)


def test_the_end_of_a_long_prompt_is_cut_off_with_a_warning(saved):
    pipe = load_pipeline(saved)
    short, long = "a red house", "a red house " * 6 + "BEYOND the Hill"
    with pytest.warns(UserWarning, match="'BEYOND the Hill'"):     # 18 words fit beside start and end
        generate(pipe, "fog", long, steps=1, progress=False)
    cut = clip_encoder.cut_off(pipe.tokenizer, long)
    assert cut.endswith("BEYOND the Hill") and clip_encoder.cut_off(pipe.tokenizer, short) == ""
    assert torch.equal(tokenize(pipe.tokenizer, [long]), tokenize(pipe.tokenizer, [long.removesuffix(cut)]))
    assert not torch.equal(tokenize(pipe.tokenizer, [long]), tokenize(pipe.tokenizer, [long.removesuffix(cut)[:-6]]))


def test_stable_diffusion_2_pads_with_an_exclamation_mark(tmp_path):
    """Its tokenizer_config.json says end of text; its special_tokens_map.json, which counts, says "!"."""
    words = make_pipeline().tokenizer
    words.backend_tokenizer.model.save(str(tmp_path))
    end, ids = words.eos_token, dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(ids, model_max_length=77, pad_token=end)))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(dict(ids, pad_token="!")))
    for prompt, before in (("fog", False), ("fog!", True)):        # and in a prompt "!" is the same token
        ids = tokenize(load_tokenizer(str(tmp_path)), [prompt])[0].tolist()
        zero = words.get_vocab()["!"]
        assert len(ids) == 77 and ids[-1] == zero
        assert ids.index(zero) == ids.index(words.eos_token_id) + (-1 if before else 1)


def test_too_many_words_for_the_text_encoder_are_refused(saved, tmp_path):
    letters = "abcdefghijklmnopqrstuvwxyz"
    train_tokenizer([a + b + c for a in letters for b in letters for c in letters],
                    vocab_size=1200).save_pretrained(str(tmp_path))
    with pytest.raises(BadInput, match="--tokenizer .* words"):
        load_pipeline(saved, tokenizer=str(tmp_path))
    text = dict(SMALL_TEXT, vocab_size=700, max_position_embeddings=9)
    clip = CLIP(text, dict(hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
                           image_size=16, patch_size=4))
    sample.save_module(clip, str(tmp_path), "clip")
    with pytest.raises(BadInput, match="words, but the text encoder knows 700"):
        sample.load_clip(str(tmp_path), part="text_encoder")
    train_tokenizer(["a"], 600).save_pretrained(str(tmp_path))     # fewer words will do; more of them at a time not
    clip, words = sample.load_clip(str(tmp_path))
    ids = tokenize(words, ["a b c d e f g h i j k l"])
    assert ids.shape == (1, 9) == clip.text_model(ids).shape[:2]


def test_bare_words_are_saved_with_room_for_as_many_as_the_text_encoder_takes(saved, tmp_path):
    """vocab.json and merges.txt do not say how many, and transformers then writes down 10^30."""
    load_pipeline(saved).tokenizer.backend_tokenizer.model.save(str(tmp_path))
    pipe = load_pipeline(saved, tokenizer=str(tmp_path))
    save_pipeline(pipe, str(tmp_path / "out"))
    words = transformers.CLIPTokenizer.from_pretrained(str(tmp_path / "out/tokenizer"))
    room = pipe.text_encoder.config["max_position_embeddings"]
    ids = words("a red house", padding="max_length", max_length=words.model_max_length, truncation=True).input_ids
    assert len(ids) == room == words.model_max_length


def test_tiles_join_into_the_whole_picture(saved):
    vae = load_pipeline(saved).vae
    z = torch.randn(1, 4, 24, 40)
    with torch.no_grad():
        whole = vae.decode(z)
        assert torch.allclose(vae.decode_tiles(z), whole, atol=1e-4)               # one tile holds it all
        asked, decode = [], vae.decode
        vae.decode = lambda z: asked.append(z.shape[2:]) or decode(z)
        tiled = vae.decode_tiles(z, side=16, overlap=8)
        assert tiled.shape == whole.shape and max(max(shape) for shape in asked) == 16 and len(asked) == 2 * 4
        # Copies of one latent: every tile must draw the same, and no seam may show where they meet.
        flat = vae.decode_tiles(torch.ones(1, 4, 24, 40), side=16, overlap=8)[0, 0]
    inner = flat[16:-16, 16:-16]
    jumps = (inner[:, 1:] - inner[:, :-1]).abs().max()
    assert jumps <= 1.5 * (decode(torch.ones(1, 4, 16, 16))[0, 0].diff().abs().max()), jumps


def test_sizes_are_as_asked_and_nothing_is_stretched(saved):
    pipe, settings = load_pipeline(saved), dict(steps=2, progress=False, strength=0.5)
    assert generate(pipe, "fog", init_image=photo(61, 45), **settings)[0].size == (61, 45)
    assert generate(pipe, "fog", init_image=photo(100, 50), height=40, **settings)[0].size == (80, 40)
    assert generate(pipe, "fog", init_image=photo(100, 50), width=50, height=40, **settings)[0].size == (50, 40)
    mask = Image.new("L", (61, 45), 0)
    mask.paste(255, (30, 0, 61, 45))
    before, after = photo(61, 45), generate(pipe, "fog", init_image=photo(61, 45), mask_image=mask, **settings)[0]
    assert (np.asarray(before)[:, :30] == np.asarray(after)[:, :30]).all()         # to the pixel, at an odd size too
    with pytest.raises(BadInput, match="--mask"):
        generate(pipe, "fog", init_image=photo(61, 45), mask_image=Image.new("L", (45, 61)), **settings)


def test_a_large_photo_keeps_its_own_pixels_where_the_mask_says_so(saved):
    """Drawn small, pasted back large: what is kept is kept at the photo's own resolution."""
    before, mask = photo(300, 200), Image.new("L", (300, 200), 0)
    mask.paste(255, (200, 0, 300, 200))
    drawn = []
    pipe = load_pipeline(saved)
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z: drawn.append(z.shape[2:]) or decode(z)
    after = generate(pipe, "fog", init_image=before, mask_image=mask, steps=2, progress=False)[0]
    assert after.size == (300, 200) and max(drawn[0]) * pipe.vae.f < 120
    assert (np.asarray(before)[:, :200] == np.asarray(after)[:, :200]).all()
    assert abs(np.asarray(before, int)[:, 230:] - np.asarray(after, int)[:, 230:]).mean() > 20


def test_every_stroke_of_a_mask_is_redrawn(saved, tmp_path, command):
    """Also one of three pixels, in any colour that is bright, on a layer transparent elsewhere; and nothing else."""
    photo().save(tmp_path / "photo.png")
    stroke = np.zeros((64, 64), bool)
    stroke[:, 30:33] = True
    masks = {"plain": Image.fromarray(np.uint8(stroke * 255)),
             "green": Image.fromarray(np.uint8(stroke[..., None] * [0, 255, 0])),
             "layer": Image.fromarray(np.uint8(stroke[..., None] * 255).repeat(4, axis=2), "RGBA")}
    for name, mask in masks.items():
        mask.save(tmp_path / f"{name}.png")
        status, _, err = command("sample.py", "fog", "--model", saved, "--init-image", "photo.png", "--mask",
                                 f"{name}.png", "--steps", 3,
                             "--strength", 1, "--output", "out.png")
        assert status == 0, err
        changed = abs(np.asarray(photo(), int) - np.asarray(Image.open(tmp_path / "out.png"), int)).max(axis=2)
        assert (changed[~stroke] == 0).all() and (changed[:, 31] > 5).mean() > 0.9, name


def test_the_seam_is_soft(saved):
    """From what is kept to what is redrawn in several steps, all of them within the white."""
    pipe, settings = load_pipeline(saved), dict(steps=3, strength=1.0, init_image=photo(), progress=False)
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    before, joined = np.asarray(photo(), int), np.asarray(generate(pipe, "fog", mask_image=mask, **settings)[0], int)
    pipe.vae.decode = lambda z: torch.ones(len(z), 3, 64, 64)      # whatever was drawn, it is white
    parts = abs(np.asarray(generate(pipe, "fog", mask_image=mask, **settings)[0],
                           int) - before) / (255 - before).clip(1)
    steps = np.median(parts, axis=(0, 2))[30:38]
    assert (joined[:, :32] == before[:, :32]).all() and steps[:2].max() == 0 and steps[-1] > 0.98
    assert (np.diff(steps) > -0.01).all() and np.diff(steps).max() < 0.5 and (steps > 0.2).sum() >= 5, steps


def test_models_whose_parts_do_not_fit_are_refused(saved, tmp_path):
    for name, part, config, words in (
            ("eight", "unet", dict(SMALL_UNET, in_channels=8), "unet has in_channels = 8"),
            ("sigma", "unet", dict(SMALL_UNET, out_channels=8), "unet has out_channels = 8"),
            ("deep", "vae", dict(SMALL_VAE, latent_channels=16), "vae has latent_channels = 16"),
            ("wide", "unet", dict(SMALL_UNET, cross_attention_dim=32), "32 wide")):
        shutil.copytree(saved, tmp_path / name)
        sample.save_module(shake(sample.CLASSES[part].from_config(config)), str(tmp_path / name / part), part)
        with pytest.raises(BadInput, match=f"{name}: .*{words}"):
            load_pipeline(str(tmp_path / name))
    for side, version, expected in ((None, "0.6.0", 64), ([24, 16], "0.6.0", 24), (32, "0.6.0", 64), (32, "0.30.0", 32),
                                    (64, "0.8.1", 64), (32, None, 32)):                 # all are in published configs
        config = dict(SMALL_UNET, sample_size=side, _diffusers_version=version)
        assert UNet.from_config(config).config["sample_size"] == expected
    assert VAE.from_config(dict(SMALL_VAE, scaling_factor=None)).scaling_factor == 0.18215


@pytest.mark.parametrize("prompt, negative", [
    ("a red house, on a hill: \"home\"", "fog"), ("two\nlines\nSteps: 3, Seed: 9", ""), ("", ""),
    ("a\nNegative prompt: not this\nb", "but this, and: that"), ("\u6e7e \U0001f389 \u05d0", "\\ \" , :")])
def test_like_repeats_a_picture(saved, tmp_path, prompt, negative, command):
    status, _, err = command("sample.py", prompt, "--negative", negative, "--model", saved, "--steps", 3, "--seed",
                             41, "--guidance",
                         2.5, "--sampler", "ddim", "--width", 48, "--output", "a.png")
    assert status == 0, err
    text = Image.open(tmp_path / "a.png").text["parameters"]
    assert text.startswith(prompt + "\nNegative prompt: " + negative + "\nSteps: 3, CFG scale: 2.5, Seed: 41, Model: ")
    assert ", Sampler: DDIM, Size: 48x" in text
    flags = sample.read_parameters(tmp_path / "a.png")
    assert flags["prompts"] == [prompt] and flags["negative"] == negative


def test_like_repeats_a_picture_made_from_a_picture(saved, tmp_path, command):
    from PIL import PngImagePlugin
    photo(70, 50).save(tmp_path / "in, a: b.png")
    mask = Image.new("L", (70, 50), 255)
    mask.paste(0, (0, 0, 30, 50))
    mask.save(tmp_path / "mask.png")
    flags_ = ["fog", "--num-images", 2, "--model", saved, "--steps", 4, "--strength", 0.7, "--init-image",
              "in, a: b.png",
               "--prediction-type", "v_prediction", "--tile", "--mask", "mask.png", "boat", "--gif"]
    status, _, err = command("sample.py", *flags_, "--output", "a.png")
    assert status == 0, err
    for more in ([], ["--seed", 9]):
        status, _, err = command("sample.py", "--like", "a-3.png", "--output", "b.png", *more)
        assert status == 0, err
        assert Image.open(tmp_path / "a.gif").n_frames == 2 and Image.open(tmp_path / "a.gif").size == (140, 100)
        same = decibel([Image.open(tmp_path / "a-3.png")], [Image.open(tmp_path / "b.png")]) > 45
        assert same == (not more)                                  # a flag overrides what the picture says
    status, _, err = command("sample.py", "--like", "mask.png")
    assert status == 2 and "--like mask.png" in err.splitlines()[-1]
    info, words = PngImagePlugin.PngInfo(), Image.open(tmp_path / "a-3.png").text["parameters"]
    info.add_itxt("parameters", words.replace("Prediction type: v_prediction", "Prediction type: sample"))
    mask.save(tmp_path / "odd.png", pnginfo=info)
    status, _, err = command("sample.py", "--like", "odd.png")
    assert status == 2 and "odd.png: unknown prediction type" in err.splitlines()[-1]


def test_other_tools_parameters_are_read(tmp_path):
    from PIL import PngImagePlugin
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters",
                  "a castle, (detailed:1.2)\nat night\nNegative prompt: blurry, low: quality\nSteps: 20, Sampler: "
                  "DPM++ 2M, CFG scale: 7, Seed: 12345, Size: 512x768, Model hash: abc, Model: v1-5-pruned, "
                  "Lora hashes: \"a: 1, b: 2\", Version: 1.6")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    flags = sample.read_parameters(tmp_path / "a.png")
    assert (flags["prompts"], flags["negative"]) == (["a castle, (detailed:1.2)\nat night"], "blurry, low: quality")
    assert [flags[k] for k in ("steps", "sampler", "guidance", "seed", "width", "height", "model")] == \
        ["20", "dpmpp", "7", "12345", "512", "768", "v1-5-pruned"]


# ---------------------------------------------------------------------------------------------------------------------
# CLIP and tokenizer.

def test_tokenizer_knows_every_word_and_reads_back(tmp_path):
    tokenizer = train_tokenizer(["a starry night", "a lake at night"] * 20, vocab_size=560, max_length=24)
    ids = tokenize(tokenizer, ["a starry night", "Zebra, \u00e9t\u00e9 \U0001f389!"])
    assert ids.shape == (2, 24) and ids[0, :5].tolist()[0] == tokenizer.bos_token_id
    assert (ids[0] == tokenizer.eos_token_id).nonzero()[0] == 4    # start, three words of one token each, end
    assert tokenizer.eos_token_id == len(tokenizer) - 1            # the largest id, where CLIP's pooling looks for it
    text = tokenizer.decode(ids[1], skip_special_tokens=True).replace(" ", "")
    assert text == "zebra,\u00e9t\u00e9\U0001f389!"
    long = tokenize(tokenizer, ["night " * 100])
    assert long.shape == (1, 24) and long[0, -1] == tokenizer.eos_token_id
    pipe = make_pipeline()
    pipe.tokenizer = tokenizer
    save_pipeline(pipe, str(tmp_path), ["text_encoder"])
    again = load_tokenizer(str(tmp_path / "tokenizer"))
    assert torch.equal(tokenize(again, ["A Starry zebra"]), tokenize(tokenizer, ["a starry zebra"]))
    os.remove(tmp_path / "tokenizer" / "tokenizer.json")           # the older form: vocab.json and merges.txt
    assert torch.equal(tokenize(load_tokenizer(str(tmp_path / "tokenizer")), ["zebra"]), tokenize(tokenizer, ["zebra"]))


class FixedCLIP:
    """A CLIP whose pictures and captions lie where the test puts them."""

    def __init__(self, images, texts):
        self.images, self.texts, self.logit_scale = images, texts, torch.tensor(math.log(10.0))

    def encode_image(self, x):
        return self.images

    def encode_text(self, ids):
        return self.texts


def test_the_temperature_stops_at_a_hundredth_and_can_rise_again():
    """Pictures whose captions are no better than any other's: the less sure, the smaller the loss."""
    eye, ids = torch.eye(4), torch.arange(4)[:, None].expand(4, 3)
    clip = FixedCLIP(eye, eye[[1, 2, 3, 0]])
    clip.logit_scale = torch.nn.Parameter(torch.tensor(5.0))
    loss, info = contrastive_loss(clip, None, ids)
    assert info["temperature"].item() == pytest.approx(0.01) and clip.logit_scale.item() == pytest.approx(math.log(100))
    loss.backward()
    assert clip.logit_scale.grad > 1


def test_contrastive_loss_knows_its_neighbours_and_forgives_twins():
    eye = torch.eye(4)
    ids = torch.arange(4)[:, None].expand(4, 3)
    loss, info = contrastive_loss(FixedCLIP(eye, eye), None, ids)
    assert loss.item() == pytest.approx(math.log(1 + 3 * math.exp(-10)), rel=1e-3) and info["accuracy"] == 1
    loss, _ = contrastive_loss(FixedCLIP(torch.ones(4, 4) / 2, eye * 0 + 0.5), None, ids)
    assert loss.item() == pytest.approx(math.log(4), rel=1e-4)     # nothing told apart: a guess among four
    twins = torch.tensor([[1, 1], [1, 1], [2, 2], [2, 2]])         # each has one twin: a guess among three
    loss, _ = contrastive_loss(FixedCLIP(torch.ones(4, 4) / 2, eye * 0 + 0.5), None, twins)
    assert loss.item() == pytest.approx(math.log(3), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Learning: each stage, on a tiny set, reaches a loss that an untrained model cannot.

def optimize(module, loss_of, steps, lr):
    opt = torch.optim.AdamW(module.parameters(), lr)
    first = None
    for step in range(steps):
        loss = loss_of(torch.Generator().manual_seed(step))
        first = first or loss.item()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        opt.step()
    return first, loss.item()


def test_vae_learns():
    torch.manual_seed(0)
    x = torch.stack([Landscapes(32)[i][0] for i in range(4)])
    vae = VAE(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4)
    with torch.no_grad():
        before = psnr(vae, x)
    optimize(vae, lambda g: vae_loss(vae, x, 1e-5, g)[0], 150, 5e-3)
    with torch.no_grad():
        after = psnr(vae, x)
    assert before < 12 and after > 21, (before, after)             # painting each picture in its mean colour: about 13


def test_clip_learns():
    torch.manual_seed(0)
    scenes = [Landscapes(32)[i] for i in (1, 2, 3, 7, 8, 9, 11, 12)]
    tokenizer = train_tokenizer([c for _, c in scenes], 600, 24)
    text = dict(SMALL_TEXT, vocab_size=len(tokenizer), max_position_embeddings=24)
    clip = CLIP(text, dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                           image_size=32,
                           patch_size=8), 16)
    x, ids = torch.stack([p for p, _ in scenes]), tokenize(tokenizer, [c for _, c in scenes])
    first, last = optimize(clip, lambda g: contrastive_loss(clip, x, ids)[0], 60, 3e-3)
    assert first > 1.5 and last < 0.2 and own_caption_wins(clip, x, ids) == 1      # a guess among eight: log 8 = 2.08


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_unet_learns_and_follows_its_prompt(prediction):
    """Two prompts, two latents: after a little training the samplers draw each prompt's own."""
    torch.manual_seed(0)
    x0 = torch.stack([torch.full((4, 8, 8), 0.8), torch.full((4, 8, 8), -0.8)])
    context = torch.eye(2)[:, None].expand(2, 3, 2).repeat(1, 1, 6)                # (2, 3, 12)
    schedule = NoiseSchedule(prediction_type=prediction, set_alpha_to_one=True)
    unet = UNet(block_out_channels=(32, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                layers_per_block=1,
                attention_head_dim=2, cross_attention_dim=12, norm_num_groups=8, addition_embed_type="text",
                addition_embed_type_num_heads=2)

    def loss_of(g):
        which = torch.randint(0, 2, (16,), generator=g)
        t = torch.randint(0, 1000, (16,), generator=g)
        noise = torch.randn(16, 4, 8, 8, generator=g)
        return diffusion_loss(schedule, lambda x, t: unet(x, t, context[which]), x0[which], t, noise).mean()
    first, last = optimize(unet, loss_of, 200, 3e-3)
    assert first > 0.6 and last < 0.15, (first, last)              # saying "no noise" costs 1, in either prediction
    with torch.no_grad():
        # From the middle of the way, where a blank picture is mostly noise, and the prompt must decide.
        times = [pair for pair in schedule.timesteps(20, "dpmpp") if pair[0] < 700]
        start = schedule.q_sample(torch.zeros(2, 4, 8, 8), times[0][0], torch.randn(1, 4, 8, 8))
        for z, _ in ddpm.dpmpp(schedule, lambda x, t: unet(x, torch.full((2,), t), context), start, times):
            pass
    assert (z[0] - z[1]).mean() > 0.3, z.mean(dim=(1, 2, 3))      # all but the prompt is the same for both


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 4, 3, 3)])
def test_muon_goes_downhill_as_far_in_every_direction(shape):
    """From a gradient whose singular values span two orders: those of the step are nearly alike, and as documented."""
    torch.manual_seed(0)
    U, _, V = torch.linalg.svd(torch.randn(shape).flatten(1), full_matrices=False)
    gradient = U @ torch.diag(torch.logspace(0, -1.5, U.size(1))) @ V
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = gradient.view(shape).clone()
    ddpm.Muon([p], lr=0.1).step()
    step = -(U.T @ p.detach().flatten(1) @ V.T) / (0.2 * 0.1 * max(gradient.shape) ** 0.5)         # on its own axes
    assert (step - step.diag().diag()).abs().max() < 1e-3 and 0.6 < step.diag().min() and step.diag().max() < 1.3


def test_the_average_follows_the_last_two_hundred_steps_and_at_first_fewer():
    for done, steps, share in ((0, 10, 1.0), (5000, 200, 1 - math.exp(-1)), (5000, 2000, 1.0)):
        model = torch.nn.Linear(2, 2)
        learner = ddpm.Learner(model, lambda model: (model.weight.sum() * 0, {}))
        before, learner.done, learner.norm = [p.clone() for p in learner.average.parameters()], done, 1.0
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)                                          # a jump; then how much of it the average has made
        for _ in range(steps):
            learner.step(0.0)
        for a, b in zip(learner.average.parameters(), before):
            assert torch.allclose(a - b, torch.full_like(a, share), atol=0.01), (done, a - b)


def test_a_learner_learns():
    """Through both optimizers, clipping and average: a small network comes to copy another, and so does its average."""
    torch.manual_seed(0)
    def network(): return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
    truth, model, x = network(), network(), torch.randn(256, 8)
    with torch.no_grad():
        target = truth(x)
    learner = ddpm.Learner(model, lambda model, x, y: ((model(x) - y).square().mean(), {}))
    first = learner.gradient([(x, target)])[0]["loss"]
    for step in range(300):
        learner.gradient([(x, target)])
        learner.step(ddpm.learning_rate(step, 300, 0.05))
    with torch.no_grad():
        for made in (model, learner.average):
            assert (made(x) - target).square().mean() < 0.02 * first


def test_losses_are_told_by_the_range_of_their_time():
    losses, t = torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([0, 249, 999, 250])
    assert ddpm.loss_by_time(losses, t, 1000) == {"t0-249": 1.5, "t250-499": 5.0, "t750-999": 3.0}
    profile = ddpm.loss_profile(NoiseSchedule(), lambda x, t: torch.zeros_like(x), torch.ones(40, 4, 8, 8),
                                torch.Generator().manual_seed(0))
    assert list(profile) == ["t0-249", "t250-499", "t500-749", "t750-999"]
    assert all(value == pytest.approx(1, abs=0.1) for value in profile.values())    # the noise, where "none" is said


def test_learning_rate_warms_up_stays_and_falls_to_nothing():
    rates = [ddpm.learning_rate(step, 1000, 0.5) for step in range(1000)]
    assert rates[0] == pytest.approx(0.005) and set(rates[99:501]) == {0.5} and 0 < rates[-1] < 0.002
    assert rates == sorted(rates[:500]) + sorted(rates[500:], reverse=True)
    assert all(0 < ddpm.learning_rate(step, steps, 1.0) <= 1 for steps in (1, 2, 40, 150) for step in range(steps))


def test_gradient_checkpoints_change_nothing():
    unet, vae = shake(UNet.from_config(SMALL_UNET)), shake(VAE.from_config(SMALL_VAE))
    z, t, context, x = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 24), torch.rand(1, 3, 16, 16)
    for module, inside, run in (
            (unet, (unet.down_blocks[0], unet.mid_block, unet.up_blocks[-1]), lambda: unet(z, t, context).sum()),
            (vae, (vae.encoder.down_blocks[0], vae.decoder.up_blocks[-1]),
             lambda: vae_loss(vae, x, 1.0, torch.Generator().manual_seed(0))[0])):
        gradients = []
        for block in inside:
            block.calls = 0
            block.resnets[0].register_forward_pre_hook(lambda *_, of=block: setattr(of, "calls", of.calls + 1))
        for on, calls in ((False, 1), (True, 3)):                  # the second time once more, for the way back
            module.set_grad_checkpoint(on)
            gradients.append(torch.autograd.grad(run(), list(module.parameters())))
            assert [block.calls for block in inside] == [calls] * len(inside)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*gradients))


# ---------------------------------------------------------------------------------------------------------------------
# Data.

def test_the_sun_lights_its_side():
    """The same scene with the sun on the left, then on the right: the land is brighter on that side."""
    for sky in ("day", "dawn", "sunset", "night"):
        for land in train.LANDS:
            left, right = (train.draw(sky, land, place, [], np.random.default_rng(3), 64).mean(axis=2)[44:]
                           for place in ("left", "right"))
            assert left[:, :32].mean() > 1.05 * right[:, :32].mean() and right[:, 32:].mean() > 1.05 * left[:,
                    32:].mean(), (sky, land)


def test_landscapes_are_deterministic_and_the_same_at_any_size():
    scenes = Landscapes(64)
    assert len(scenes) >= 20000 and len(Landscapes(64, "val")) >= 3000 and len(Landscapes(64, "novel")) >= 3000
    for i in (0, 17, 19999):
        (a, caption), (b, again) = scenes[i], Landscapes(64)[i]
        assert torch.equal(a, b) and caption == again == scenes.caption(i)
        assert a.shape == (3, 64, 64) and a.dtype == torch.float32 and -1 <= a.min() < a.max() <= 1
        large = torch.nn.functional.avg_pool2d(Landscapes(128)[i][0][None], 2)[0]
        assert (large - a).abs().mean() < 0.08                     # fine grain apart
    with pytest.raises(IndexError):
        scenes[20000]
    assert not torch.equal(scenes[0][0], Landscapes(64, "val")[0][0])


def test_novel_scenes_join_what_training_never_joins():
    pairs = {split: {Landscapes(64, split).plan(i)[0][:2] for i in range(3000)} for split in ("train", "val", "novel")}
    assert pairs["novel"] == train.NOVEL and pairs["train"] == pairs["val"] and not pairs["train"] & pairs["novel"]
    for sky, terrain in train.NOVEL:                               # each half is known from elsewhere
        assert sky in {s for s, _ in pairs["train"]} and terrain in {t for _, t in pairs["train"]}


def test_captions_say_what_is_there():
    scenes = Landscapes(64)
    captions = [scenes.caption(i) for i in range(3000)]
    assert 0.05 < captions.count("a landscape") / 3000 < 0.12 and len(set(captions)) > 2000
    for i in range(300):
        (sky, terrain, place, extras), caption, _ = scenes.plan(i)
        for side in ("left", "right"):
            assert f"the {side}" not in caption or side == place
        assert ("moon" in caption) <= (sky == "night") and ("sun " in caption) <= (sky not in ("night", "storm"))
        for words, extra in (("lake", "lake"), ("pine trees", "pines"), ("mist", "mist"), ("snow", "snow")):
            assert (words in caption) <= (extra in extras)


def test_left_is_left():
    """Scenes that say so have their brightest spot of sky there."""
    scenes, seen = Landscapes(64), {"left": [], "right": []}
    for i in range(400):
        (sky, _, place, extras), _, _ = scenes.plan(i)
        if place in seen and sky in ("night", "sunset") and "clouds" not in extras:
            light = scenes[i][0].mean(0)[:24]
            columns = torch.nn.functional.avg_pool2d(light[None, None], 5, 1)[0, 0].amax(0)
            seen[place].append(columns.argmax().item() / len(columns))
    assert min(map(len, seen.values())) > 20 and max(seen["left"]) < 0.4 and min(seen["right"]) > 0.6


def test_captions_of_a_folder_come_in_the_promised_order(tmp_path):
    for name in ("cats/a_b-c.png", "cats/deep/x.png", "cats/told.png", "cats/beside.png", "red_barn.png", "kohya.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), "red").save(tmp_path / name)
    (tmp_path / "cats/told.txt").write_text("sidecar loses")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "cats/told.png", "text": "metadata wins"}\n\n')
    (tmp_path / "cats/beside.txt").write_text("a cat beside\n")
    (tmp_path / "kohya.caption").write_text("kohya's \u00e9", encoding="utf-8")
    data = ImageFolder(str(tmp_path), image_size=8)
    assert {data.paths[i]: data.caption(i) for i in range(len(data))} == {
        "cats/a_b-c.png": "cats", "cats/deep/x.png": "deep", "cats/told.png": "metadata wins",
        "red_barn.png": "red barn",
        "cats/beside.png": "a cat beside", "kohya.png": "kohya's \u00e9"}
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text('file_name,text\ncats/told.png,"from, csv"\n')
    assert "from, csv" in [c for _, c in (ImageFolder(str(tmp_path), 8)[i] for i in range(len(data)))]
    for text, why in (("file,caption\na.png,b\n", "KeyError 'file_name'"),
                      ("file_name,text\na.png,a cat, asleep\n", "in quotes"),
                      ('file_name,text\na.png,"a cat\nred_barn.png,a barn\n', "end of data")):
        (tmp_path / "metadata.csv").write_text(text)
        with pytest.raises(BadInput, match=f"metadata.csv: .*{why}"):
            ImageFolder(str(tmp_path))


def test_every_kind_of_picture_opens(tmp_path):
    red = Image.new("RGB", (40, 20), (200, 30, 30))
    red.save(tmp_path / "rgb.jpg")
    red.convert("L").save(tmp_path / "grey.png")
    red.convert("P").save(tmp_path / "palette.gif")
    red.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(np.full((20, 40), 40000, dtype=np.uint16)).save(tmp_path / "deep.png")
    see_through = Image.new("RGBA", (40, 20), (200, 30, 30, 0))
    see_through.save(tmp_path / "transparent.png")
    turned = Image.new("RGB", (40, 20), "black")
    turned.paste("white", (0, 0, 20, 20))                          # white on the left; upright, it is at the top
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    data = ImageFolder(str(tmp_path), image_size=16)
    pictures = {path: data[i][0] for i, path in enumerate(data.paths)}
    assert len(pictures) == 7 and all(p.shape == (3, 16, 16) for p in pictures.values())
    for name in ("rgb.jpg", "palette.gif", "cmyk.jpg"):
        assert pictures[name][0].mean() > 0.3 > -0.4 > pictures[name][1].mean(), name
    assert pictures["deep.png"].mean().item() == pytest.approx(40000 / 65535 * 2 - 1, abs=0.03)
    assert pictures["transparent.png"].mean() > 0.99               # on white paper
    assert pictures["turned.png"][:, :6].mean() > 0.9 > -0.9 > pictures["turned.png"][:, 10:].mean()


def test_validation_pictures_are_not_trained_on(tmp_path):
    for i in range(45):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    parts = [ImageFolder(str(tmp_path), 8, split).paths for split in ("train", "val")]
    assert len(parts[0]) == 43 and len(parts[1]) == 2 and not set(parts[0]) & set(parts[1])


def test_kept_rows_are_computed_once(tmp_path):
    asked = []

    def compute(rows):
        asked.extend(rows)
        return torch.tensor(rows)[:, None].float() * 10
    kept = train.Kept(50, (1,), torch.float32, compute, str(tmp_path))
    assert kept[[3, 4, 3]].flatten().tolist() == [30, 40, 30] and kept[[4, 5]].flatten().tolist() == [40, 50]
    assert asked == [3, 4, 5] and os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------------
# Loading and saving.

def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_older_folders_load(saved, tmp_path):
    from safetensors.torch import load_file, save_file
    pipe = load_pipeline(saved)
    shutil.copytree(saved, tmp_path / "old")
    vae = tmp_path / "old/vae/diffusion_pytorch_model.safetensors"
    text = tmp_path / "old/text_encoder/model.safetensors"
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = {}
    for key, value in load_file(vae).items():
        for new, old in names.items():
            key = key.replace(new, old)
        state[key] = value
    assert any(".proj_attn." in key for key in state)
    os.remove(vae)
    torch.save(state, vae.with_suffix(".bin"))
    state = {key.removeprefix("text_model."): value for key, value in load_file(text).items()}
    os.remove(text)
    save_file(state | {"embeddings.position_ids": torch.arange(20)[None]},
              tmp_path / "old/text_encoder/model.fp16.safetensors")
    shutil.rmtree(tmp_path / "old/scheduler")
    old = load_pipeline(str(tmp_path / "old"))
    assert same_weights(old.vae, pipe.vae) and same_weights(old.text_encoder, pipe.text_encoder)
    assert old.schedule.config == NoiseSchedule().config


def test_saved_text_encoder_is_read_by_transformers(saved):
    theirs = transformers.CLIPTextModel.from_pretrained(os.path.join(saved, "text_encoder"))
    ids = torch.randint(0, 500, (2, 20))
    with torch.no_grad():
        assert relative(load_pipeline(saved).text_encoder(ids), theirs(ids).last_hidden_state) < 1e-5


@pytest.mark.parametrize("spoil, word", [
    (lambda d: os.remove(d / "unet/config.json"), "unet/config.json"),
    (lambda d: (d / "vae/config.json").write_text("{"), "JSON"),
    (lambda d: os.remove(d / "vae/diffusion_pytorch_model.safetensors"), "holds no weights"),
    (lambda d: (d / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"\x10" * 99), "unet.*safetensors: "),
    (lambda d: (d / "unet/config.json").write_text(json.dumps(dict(SMALL_UNET, layers_per_block=2))), "do not fit"),
    (lambda d: (d / "text_encoder/config.json").write_text('{"hidden_act": "relu"}'), "hidden_act"),
    (lambda d: (d / "scheduler/scheduler_config.json").write_text('{"beta_schedule": "x"}'), "beta_schedule"),
    (lambda d: [os.remove(p) for p in (d / "tokenizer").iterdir()], "tokenizer")])
def test_a_broken_folder_is_named(saved, tmp_path, spoil, word):
    shutil.copytree(saved, tmp_path / "m")
    spoil(tmp_path / "m")
    with pytest.raises(BadInput, match=word) as error:
        load_pipeline(str(tmp_path / "m"))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# The command lines.

def run(script, *args, cwd=None, env=None):
    """Run a script as a user would -> (exit status, stdout, stderr)."""
    done = subprocess.run([sys.executable, os.path.join(HERE, script), *map(str, args)], cwd=cwd, env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=600)
    return done.returncode, done.stdout, done.stderr


TINY_RUN = ["--steps", 4, "--max-images", 24, "--batch-size", 4, "--image-size", 32, "--save-every", 2,
            "--sample-every", 4]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which `python train.py` has run all three stages, a few steps each."""
    folder = tmp_path_factory.mktemp("trained")
    status, out, err = run("train.py", *TINY_RUN, cwd=folder)
    assert status == 0, err
    return folder


@pytest.fixture
def no_sheets(monkeypatch):
    """Training without its sheets of samples: drawing them takes seconds, and nobody looks at these."""
    monkeypatch.setattr(train, "generate", lambda *_, **__: [Image.new("RGB", (32, 32))])


def test_train_then_sample_then_diffusers(trained):
    for name in ("model_index.json", "samples/vae-000003.png", "samples/unet-000004.png", "loss-unet.png",
                 "train_state/unet.pt"):
        assert (trained / "out" / name).exists(), name
    for weights in (trained / "out").rglob("*.safetensors"):       # who may read one file may read all
        assert weights.stat().st_mode == weights.with_name("config.json").stat().st_mode, weights
    rows = [json.loads(line) for line in open(trained / "out" / "log-unet.jsonl")]
    assert rows[-1]["step"] == 4 and all(math.isfinite(row["loss"]) for row in rows)
    status, out, err = run("sample.py", "a landscape", "dunes at night", "--num-images", 2, "--steps", 3,
                           "--gif", cwd=trained)
    assert status == 0 and "out.png" in out, err
    assert Image.open(trained / "out.png").size == (64, 64) and Image.open(trained / "out.gif").n_frames == 3
    singles = [Image.open(trained / f"out-{k}.png") for k in range(4)]
    assert "dunes at night" in singles[2].text["parameters"] and "Seed: 2" in singles[2].text["parameters"]
    # What was trained is a diffusers pipeline, and draws the same there.
    latents = torch.randn(1, 4, 16, 16)
    folder = str(trained / "out")
    expected = theirs_from(folder, "dpmpp")("dunes at night", latents=latents, num_inference_steps=5,
                                            guidance_scale=3.0,
                                            height=32, width=32).images
    assert decibel(generate(load_pipeline(folder), "dunes at night", steps=5, guidance=3.0, latents=latents),
                   expected) > 45


def test_a_tuned_vae_comes_with_the_rest_of_its_model(trained, tmp_path, command, no_sheets):
    shutil.copytree(trained / "out", tmp_path / "old")
    assert command("train.py", "--stage", "vae", "--init", "old", *TINY_RUN)[0] == 0
    old, new = (load_pipeline(str(tmp_path / name)) for name in ("old", "out"))
    assert same_weights(old.unet, new.unet) and same_weights(old.text_encoder, new.text_encoder)
    assert not same_weights(old.vae, new.vae)


def test_a_tuned_vae_is_resumed_until_a_unet_relies_on_it(trained, tmp_path, command, monkeypatch, no_sheets):
    flags, real = ["--stage", "vae", "--init", "old", *TINY_RUN], train.learning_rate
    shutil.copytree(trained / "out", tmp_path / "old")
    monkeypatch.setattr(train, "learning_rate", with_ctrl_c(1, real))
    assert "--resume goes on" in command("train.py", *flags)[2]
    monkeypatch.setattr(train, "learning_rate", real)
    shutil.copytree(tmp_path / "out", tmp_path / "stopped")
    assert command("train.py", *flags, "--resume")[0] == 0
    assert command("train.py", "--stage", "unet", *TINY_RUN)[0] == 0
    shutil.copy(tmp_path / "out/train_state/unet.pt", tmp_path / "stopped/train_state")
    unet = load_pipeline(str(tmp_path / "out")).unet
    for folder in ("out", "stopped"):                              # finished or not, it would bring the old U-Net back
        status, _, err = command("train.py", *flags, "--resume", "--out", folder)
        assert status == 2 and f"{folder}/train_state/unet.pt away first" in err, err
    assert same_weights(unet, load_pipeline(str(tmp_path / "out")).unet)


@pytest.mark.parametrize("part", [".", "text_encoder", "train_state/clip"])
def test_a_run_does_not_take_away_what_it_reads(trained, tmp_path, command, part):
    shutil.copytree(trained / "out", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    status, _, err = command("train.py", *TINY_RUN, "--text-encoder", os.path.join("out", part))
    assert status == 2 and "--text-encoder" in err
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_which_model_draws_and_how_strictly(saved, trained, tmp_path, monkeypatch, command):
    """Without --model: the one in out/, before that the one in assets/; each is told, and has its own guidance."""
    shutil.copytree(saved, tmp_path / "repository/assets/model")
    monkeypatch.setattr(sample, "__file__", str(tmp_path / "repository/sample.py"))
    (tmp_path / "out").mkdir()                                     # a training run has only begun
    status, out, err = command("sample.py", "fog", "--steps", 1)
    box = os.path.join("repository", "assets", "model")
    assert status == 0 and f"drawn by the model in {box}\n" in err and out == "out.png\n", err
    assert ", CFG scale: 7.5, " in Image.open(tmp_path / "out.png").text["parameters"]
    assert sample.read_parameters(tmp_path / "out.png")["model"] == box
    shutil.copytree(trained / "out", tmp_path / "out", dirs_exist_ok=True)
    status, _, err = command("sample.py", "fog", "--steps", 1)
    assert status == 0 and "drawn by the model in out\n" in err
    assert ", CFG scale: 4.0, " in Image.open(tmp_path / "out.png").text["parameters"]
    assert command("sample.py", "fog", "--steps", 1, "--guidance", 3)[0] == 0
    assert ", CFG scale: 3.0, " in Image.open(tmp_path / "out.png").text["parameters"]
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "repository/assets")
    assert command("sample.py", "fog")[0] == 2                     # neither


def test_the_small_model_predicts_v_unless_told_otherwise(trained, tmp_path, command, no_sheets):
    assert load_pipeline(str(trained / "out")).schedule.prediction_type == "v_prediction"
    shutil.copytree(trained / "out", tmp_path / "out")
    assert command("train.py", "--stage", "unet", *TINY_RUN, "--prediction-type", "epsilon")[0] == 0
    assert load_pipeline(str(tmp_path / "out")).schedule.prediction_type == "epsilon"


def test_the_model_in_the_box_draws_what_it_is_told():
    """Small, in half precision, diffusers' own layout; and what it draws has the colours of what the prompt names."""
    box = os.path.join(HERE, "assets/model")
    files = [os.path.join(at, name) for at, _, names in os.walk(box) for name in names]
    assert sum(map(os.path.getsize, files)) <= 16e6 and not any("train_state" in path for path in files)
    weights = safetensors.torch.load_file(f"{box}/unet/diffusion_pytorch_model.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.float16}
    pipe = load_pipeline(box)
    x = torch.stack([Landscapes(128, "val")[i][0] for i in range(32)])
    with torch.no_grad():
        assert psnr(pipe.vae, x) > 30
    prompts = ["a starry night over hills", "a clear day over dunes", "a clear day over a forest, the sun on the left",
               "a clear day over a forest, the sun on the right"]
    pictures = generate(pipe, prompts, guidance=pipe.guidance, seed=5, num_images=4, progress=False)
    night, dunes, left, right = np.stack([np.asarray(picture, float) for picture in pictures]).reshape(
        4, 4, 128, 128, 3).mean(axis=1)                            # four of each, laid over each other
    assert night.mean() < 60 and dunes[:32, :, 2].mean() > dunes[:32, :, 0].mean() + 40                    # a blue sky
    assert dunes[96:, :, 0].mean() > dunes[96:, :, 2].mean() + 20                                          # yellow sand
    brightest = [picture[:60].mean(axis=(0, 2)).argmax() for picture in (left, right)]
    assert brightest[0] < 48 and brightest[1] > 80, brightest
    theirs = theirs_from(box, "dpmpp")(prompts[0], guidance_scale=3.0, num_inference_steps=10,
                                       latents=(latents := torch.randn(1, 4, 16, 16))).images
    assert decibel(generate(pipe, prompts[0], guidance=3.0, steps=10, latents=latents, progress=False), theirs) > 45


def test_the_usual_run_says_how_long_it_will_take(monkeypatch, command):
    """Of other runs it is not known, and nothing is said. (What the stages then do is not asked here.)"""
    for stage in ("vae", "clip", "unet"):
        monkeypatch.setattr(train, f"train_{stage}", lambda *_: None)

    def about(*flags):
        status, out, err = command("train.py", "--max-images", 24, "--dtype", "float32", *flags)
        assert status == 0, err
        return re.findall(r"; about (\d+) minutes; model: out/", out)
    assert about("--steps", 1) == ["0"] and about("--steps", 1, "--image-size", 32) == []
    assert about("--steps", 1, "--batch-size", 4) == [] and about("--steps", 1, "--stage", "vae") == []
    clock = type("Clock", (), {"time": itertools.count(0, 0.01).__next__})         # a convolution in 10 ms:
    monkeypatch.setattr(train, "time", clock)                                      # 0.50 s for a U-Net's step and all
    assert about("--steps", 1100) == ["9"] and about("--steps", 11000) == ["92"]   # that goes before its first


def test_fine_tuning_is_gentle_unless_told(saved, command, monkeypatch, no_sheets):
    for flags, peak in (([], 1e-5), (["--lr", 0.01], 0.01)):
        rates, real = [], ddpm.Learner.step
        monkeypatch.setattr(ddpm.Learner, "step", lambda self, lr: (rates.append(lr), real(self, lr)))
        assert command("train.py", "--init", saved, *TINY_RUN, *flags)[0] == 0
        assert rates == pytest.approx([ddpm.learning_rate(step, 4, peak) for step in range(4)])
        monkeypatch.setattr(ddpm.Learner, "step", real)


def test_what_clip_and_unet_learn_from(trained, tmp_path, command, monkeypatch):
    """Each picture's own caption, for the U-Net left out one time in ten; latents of the spread told in train_vae."""
    shutil.copytree(trained / "out", tmp_path / "out")
    pipe, given = load_pipeline(str(trained / "out")), {}
    monkeypatch.setattr(train, "fit", lambda stage, *rest: given.update({stage: rest}))
    for stage in ("unet", "clip"):
        assert command("train.py", "--stage", stage, *TINY_RUN)[0] == 0
    (_, args, data, loss_of, *_), seen = given["unet"], []
    indices = [k % data.n for k in range(480)]
    loss_of(lambda x, t, context: seen.append((x, t, context)) or torch.zeros_like(x), None, indices,
            [torch.Generator().manual_seed(k) for k in range(480)])
    (x, t, context), = seen
    with torch.no_grad():
        own, nothing = (sample.encode_prompts(pipe, texts) for texts in (data.captions, [""]))
    said, dropped = ((context - states).abs().amax(dim=(1, 2)) < 0.02 for states in (own[indices], nothing))
    assert (said | dropped).all() and 0.05 < dropped.float().mean() < 0.16
    assert t.min() < 20 and t.max() > 980 and x[t < 30].std().item() == pytest.approx(0.7, rel=0.15)
    clip, args, data, loss_of, _, keep, pixels = given["clip"]
    keep(clip)(str(tmp_path / "kept"))
    few = list(range(8))
    ids = tokenize(load_tokenizer(str(tmp_path / "kept/tokenizer")), [data.captions[i] for i in few])
    x = train.as_pictures(pixels[few], "cpu")
    losses = [contrastive_loss(clip, x, order)[0].item() for order in (ids, ids.flip(0))]
    assert loss_of(clip, pixels[few], few, None)[0].item() == pytest.approx(losses[0], abs=1e-5) != losses[1]


@pytest.mark.parametrize("size, side", [(32, 16), (48, 24), (240, 112), (16, 8)])
def test_the_vae_learns_from_windows(command, monkeypatch, size, side):
    """Half as wide and high, cut to whole latents; anywhere in the picture, by the chance of that picture alone."""
    given, seen = [], []
    monkeypatch.setattr(train, "fit", lambda *all_: given.extend(all_))
    monkeypatch.setattr(train, "vae_loss", lambda **asked: seen.append(asked["x"]))
    assert command("train.py", "--stage", "vae", *TINY_RUN, "--image-size", size)[0] == 0
    loss_of, n = given[4], 200
    rows, columns, number = torch.meshgrid(torch.arange(size), torch.arange(size), torch.arange(n), indexing="ij")
    pixels = torch.stack([rows, columns, number]).permute(3, 0, 1, 2).byte()        # each tells where it stands
    for few in (list(range(n)), [7, 3]):
        loss_of({}, pixels[few], None, [torch.Generator().manual_seed(k) for k in few])
    windows, again = (((x + 1) * 127.5).round().long() for x in seen)
    assert windows.shape == (n, 3, side, side) and torch.equal(again, windows[[7, 3]])
    corner = windows[:, :2, :1, :1]
    assert torch.equal(windows[:, :2] - corner, pixels[:1, :2, :side, :side].long().expand(n, -1, -1, -1))
    assert all((windows[k, 2] == k).all() for k in range(n))
    for at in corner.flatten(1).T:                                 # both ways as far as the picture goes
        assert at.min() <= 1 and at.max() >= size - side - 1 and at.float().std() > 0.2 * (size - side)
    assert torch.corrcoef(corner.flatten(1).T.float())[0, 1].abs() < 0.3


@pytest.mark.parametrize("dtype, least", [(torch.bfloat16, 35), (torch.float16, 45)])
def test_half_precision_draws_nearly_the_same(saved, dtype, least):
    for flags in (dict(sampler="dpmpp"), dict(sampler="ddpm", init_image=photo(), mask_image=photo().convert("L"))):
        whole, half = (generate(load_pipeline(saved, dtype=d), "fog", steps=4, progress=False, **flags)
                       for d in (torch.float32, dtype))
        assert decibel(whole, half) > least, flags


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_unet_learns_from_latents_that_cannot_overflow(trained, tmp_path, command, monkeypatch, no_sheets, dtype):
    """As load_pipeline says of float16: on some pictures a VAE would."""
    shutil.copytree(trained / "out", tmp_path / "out")
    encode, given = Encoder.forward, []

    def forward(encoder, x):
        y = encode(encoder, x)
        given.append(y.dtype)
        return y
    monkeypatch.setattr(Encoder, "forward", forward)
    assert command("train.py", "--stage", "unet", *TINY_RUN, "--dtype", dtype)[0] == 0
    assert given and set(given) == {torch.float32 if dtype == "float16" else torch.bfloat16}


def test_latents_have_the_spread_that_diffusion_wants(trained):
    """The small model's less than unit variance: see train_vae."""
    pipe = load_pipeline(str(trained / "out"))
    x = torch.stack([Landscapes(32, "val")[i][0] for i in range(32)])
    with torch.no_grad():
        assert (pipe.vae.scaling_factor * pipe.vae.encode(x).sample()).std().item() == pytest.approx(0.7, rel=0.1)


def test_class_folders_have_latents_and_guidance_of_their_own(trained, tmp_path, command, no_sheets):
    """Photographs want more noise than landscapes, and short captions more guidance: see train_vae, Pipeline."""
    for k in range(20):
        (tmp_path / f"p/{'red' if k % 2 else 'blue'}").mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(k).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((32, 32)).save(tmp_path / f"p/{'red' if k % 2 else 'blue'}/{k}.png")
    status, _, err = command("train.py", *TINY_RUN, "--data", "p")
    assert status == 0, err
    pipe, x = load_pipeline(str(tmp_path / "out")), train.ImageFolder(tmp_path / "p", 32, "val")[0][0][None]
    with torch.no_grad():
        assert (pipe.vae.scaling_factor * pipe.vae.encode(x).sample()).std().item() == pytest.approx(0.5, rel=0.1)
    assert pipe.guidance == 7.5 and load_pipeline(str(trained / "out")).guidance == 4.0
    pipe.text_encoder.config["max_position_embeddings"] = 16
    assert pipe.guidance == 4.0


@pytest.mark.parametrize("flags, steps", [
    (["--image-size", 64], "vae: 900"), (["--image-size", 32], "vae: 1227"),
    (["--image-size", 32, "--steps", 11], "vae: 9"), (["--image-size", 32, "--stage", "vae"], "vae: 1227"),
    (["--image-size", 48, "--stage", "clip"], "clip: 340"),
    (["--stage", "unet", "--image-size", 32], "unet: 1500"), (["--stage", "unet"], "unet: 1100"),
    (["--stage", "unet", "--image-size", 32, "--steps", 11], "unet: 11"),
    (["--init", "out", "--out", "tuned"], "unet: 1100"), (["--preset", "base", "--image-size", 32], "vae: 50000")])
def test_small_pictures_get_more_steps_for_the_same_time(trained, tmp_path, monkeypatch, command, flags, steps):
    """Unless --steps says how many, or a model is fine-tuned; all stages in one run and apart alike."""
    def learner(model, loss_of, dtype, settings, stage):
        raise BadInput(f"{stage}: {settings['steps']}")
    monkeypatch.setattr(train, "Learner", learner)
    shutil.copytree(trained / "out", tmp_path / "out")
    assert command("train.py", "--max-images", 24, *flags)[2].endswith(f"train.py: {steps}\n")


def test_stages_run_apart_and_eval_measures(trained, tmp_path, command):
    status, _, err = command("train.py", "--stage", "unet", *TINY_RUN)
    assert status == 2 and "--stage vae" in err and err.count("\n") == 1
    status, out, err = run("train.py", "--stage", "eval", *TINY_RUN[2:], cwd=trained)
    assert status == 0 and all(word in out for word in ("PSNR", "retrieval", "loss per range", "R-precision")), err
    before = (trained / "out/vae/diffusion_pytorch_model.safetensors").read_bytes()
    status, out, err = command("train.py", "--init", trained / "out", *TINY_RUN, "--out", tmp_path / "tuned",
                           "--prediction-type", "v_prediction")
    assert status == 0 and "vae" not in out.split(";")[1], err
    assert (tmp_path / "tuned/vae/diffusion_pytorch_model.safetensors").read_bytes() == before
    assert load_pipeline(str(tmp_path / "tuned")).schedule.prediction_type == "v_prediction"


def test_a_single_file_is_fine_tuned_into_a_folder(singles, tmp_path, command, no_sheets):
    """--init takes what --model takes; all but the U-Net stays the model's own, its padding token included."""
    write_single(singles["2.1"][0], str(tmp_path / "model.ckpt"), "lightning")
    status, _, err = command("train.py", "--init", "model.ckpt", "--tokenizer", singles["2.1"][1], "--stage",
                             "unet", *TINY_RUN)
    assert status == 0, err
    before, after = load_pipeline(str(tmp_path / "model.ckpt"),
                                  tokenizer=singles["2.1"][1]), load_pipeline(str(tmp_path / "out"))
    assert same_weights(before.vae, after.vae) and same_weights(before.text_encoder, after.text_encoder)
    assert not same_weights(before.unet, after.unet) and after.schedule.prediction_type == "v_prediction"
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(str(tmp_path / "out"))
    assert theirs.tokenizer.pad_token == after.tokenizer.pad_token == "!"


def test_a_published_text_encoder_trains_a_unet_and_judges(tmp_path, command):
    words = train_tokenizer([Landscapes(32).caption(i) for i in range(500)], 800, 40)
    text = dict(SMALL_TEXT, vocab_size=len(words), eos_token_id=2, max_position_embeddings=40)
    clip = shake(transformers.CLIPModel(transformers.CLIPConfig(text_config=text, projection_dim=12, vision_config=dict(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, image_size=16,
        patch_size=4))))
    clip.save_pretrained(str(tmp_path / "clip"))
    words.save_pretrained(str(tmp_path / "clip"))
    status, out, err = command("train.py", *TINY_RUN, "--text-encoder", "clip")
    assert status == 0 and "vae, unet on" in out, err
    ours, theirs = load_pipeline(str(tmp_path / "out")).text_encoder.state_dict(), clip.text_model.state_dict()
    assert all(torch.equal(ours["text_model." + k], v) for k, v in theirs.items())
    status, out, err = command("train.py", *TINY_RUN[2:], "--text-encoder", "clip", "--stage", "eval")
    assert status == 0 and "R-precision" in out, err
    status, out, err = command("train.py", *TINY_RUN[2:], "--stage", "eval")
    assert status == 0 and "no CLIP to judge by" in out and "R-precision" not in out, err


def test_resumed_weights_equal_uninterrupted_ones(tmp_path, monkeypatch):
    """Killed on the way and resumed: bit for bit the weights of the run that was let finish, in every stage."""
    command = [sys.executable, os.path.join(HERE, "train.py"), *map(str, TINY_RUN), "--steps", "20",
               "--sample-every", "1000", "--out"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")                     # a core for each of the two that run side by side
    uninterrupted = subprocess.Popen([*command, str(tmp_path / "whole")], stderr=subprocess.DEVNULL)
    for stage, blow in (("vae", signal.SIGKILL), ("unet", signal.SIGINT)):
        process = subprocess.Popen([*command, str(tmp_path / "broken"), "--resume"], stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not (tmp_path / f"broken/train_state/{stage}.pt").exists():
            time.sleep(0.02)
        process.send_signal(blow)
        _, err = process.communicate()
        assert process.returncode in (-9, 1) and "Traceback" not in err and (blow
                                                                             == signal.SIGINT) == ("--resume" in err)
        saved = torch.load(tmp_path / f"broken/train_state/{stage}.pt", weights_only=True)["step"]
        assert saved < (13 if stage == "vae" else 20)              # it was indeed stopped on the way
    assert subprocess.run([*command, str(tmp_path / "broken"), "--resume"], stderr=subprocess.DEVNULL).returncode == 0
    assert uninterrupted.wait() == 0
    whole, broken = (load_pipeline(str(tmp_path / name)) for name in ("whole", "broken"))
    for part in ("vae", "text_encoder", "unet"):
        assert same_weights(getattr(whole, part), getattr(broken, part)), part


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_does_not_load_torch(script):
    program = f"import sys, runpy; sys.argv = ['{script}', '--help']\n" \
              f"try: runpy.run_path('{script}', run_name='__main__')\n" \
              "except SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, text=True, stdout=subprocess.PIPE)
    assert "usage:" in done.stdout and done.stdout.strip().endswith("False")


@pytest.mark.parametrize("script, words", [("train.py", []), ("sample.py", ["a landscape"])])
@pytest.mark.parametrize("given, want", [({}, "4000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_are_told_to_sleep_before_torch_starts_them(script, words, given, want, tmp_path):
    (tmp_path / "torch.py").write_text("import os; raise SystemExit('waits ' + os.environ['GOMP_SPINCOUNT'])")
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | given
    program = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = {[script, *words]}\n" \
              f"runpy.run_path('{script}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, env=env, text=True, stderr=subprocess.PIPE)
    assert done.stderr.strip() == f"waits {want}"


@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_training_is_the_same_in_parts(trained, tmp_path, stage, command, no_sheets):
    """--grad-accum and --grad-checkpoint change memory; what VAE and U-Net learn they do not."""
    results = []
    for k, extra in enumerate(([], ["--grad-accum", 2], ["--grad-checkpoint"], ["--seed", 1])):
        shutil.copytree(trained / "out", tmp_path / str(k))
        status, _, err = command("train.py", "--stage", stage, *TINY_RUN, "--out", tmp_path / str(k), *extra)
        assert status == 0, err
        results.append(getattr(load_pipeline(str(tmp_path / str(k)), parts=[stage]), stage).state_dict())
    same = [all(torch.allclose(results[0][name], other[name], atol=1e-3) for name in other) for other in results]
    assert same == [True, True, True, False]


def test_a_run_gone_wrong_stops_before_it_is_saved(tmp_path):
    status, _, err = run("train.py", "--stage", "vae", *TINY_RUN, "--steps", 40, "--lr", 1e11, "--save-every",
                         50, cwd=tmp_path)
    assert status == 1 and "nan" in err and "--lr" in err.splitlines()[-1] and "Traceback" not in err
    assert not list(tmp_path.glob("out/train_state/*"))


# ---------------------------------------------------------------------------------------------------------------------
# Nothing lost: a run that is killed, a disk that is full, numbers gone wrong, many processes.

class PowerCut(BaseException):
    """Ends a program on the spot: no handler catches it, as none would notice a power cut."""


def cut_the_power_at(call, patch):
    """The call-th call that renames or removes something never happens, nor does anything after it."""
    count = [0]
    for name in ("rename", "replace", "rmdir", "unlink", "remove", "fsync"):
        def counted(*args, real=getattr(os, name), **kwargs):
            count[0] += 1
            if count[0] >= call:
                raise PowerCut
            return real(*args, **kwargs)
        patch.setattr(os, name, counted)
    return count


def test_a_saved_folder_is_the_old_model_or_the_new_one_wherever_the_power_is_cut(tmp_path):
    """Cut before the first rename, the second, ...: what is then read is all old or all new, never a mixture."""
    old, new = make_pipeline(), make_pipeline(prediction_type="v_prediction")
    for part in (new.unet, new.vae, new.text_encoder):
        shake(part, 77)
    new.vae.scaling_factor = 0.5
    found = []
    for call in range(1, 1000, 2):
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        save_pipeline(old, str(tmp_path / "m"))
        with pytest.MonkeyPatch.context() as patch:
            count = cut_the_power_at(call, patch)
            try:
                save_pipeline(new, str(tmp_path / "m"))
            except PowerCut:
                pass
        pipe = load_pipeline(str(tmp_path / "m"))
        is_new = pipe.schedule.prediction_type == "v_prediction"
        there = new if is_new else old
        assert all(same_weights(getattr(pipe, part), getattr(there, part)) for part in sample.PARTS), call
        assert pipe.vae.scaling_factor == there.vae.scaling_factor
        found.append(is_new)
        save_pipeline(old, str(tmp_path / "m"))                    # what was left lying about is no obstacle
        assert same_weights(load_pipeline(str(tmp_path / "m")).unet,
                            old.unet) and not list((tmp_path / "m").glob(".w*"))
        if call > count[0]:                                        # nothing was cut any more
            break
    assert found == sorted(found) and {True, False} == set(found) and len(found) > 15


@pytest.mark.parametrize("bytes_left", [1000, 60_000, 400_000])
def test_a_full_disk_is_told_and_costs_nothing(trained, tmp_path, bytes_left):
    """No file may grow beyond so many bytes, as on a full disk: one line, and what was saved before is as it was."""
    shutil.copytree(trained / "out", tmp_path / "out")
    (tmp_path / "out/train_state/unet.pt").unlink()
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.suffix in (".safetensors", ".json", ".pt")}
    program = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_left},) * 2)\n" \
              f"sys.path.insert(0, {HERE!r}); sys.argv[0] = 'train.py'; " \
              f"runpy.run_path({HERE!r} + '/train.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program, *map(str, TINY_RUN), "--resume", "--sample-every", "1000"],
                          cwd=tmp_path, text=True, stderr=subprocess.PIPE)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode in (1, 2) and "too large" in last and "Traceback" not in done.stderr, done.stderr
    assert before == {p: p.read_bytes() for p in before} and not list((tmp_path / "out").glob(".w*"))
    load_pipeline(str(tmp_path / "out"))


def test_a_picture_is_written_whole_or_not_at_all(saved, tmp_path, monkeypatch, command):
    real = Image.Image.save

    def save(picture, to, *args, **rest):
        real(picture, to, *args, **rest)
        if isinstance(to, str):                                    # and not the trial of the format in memory
            with open(to, "r+b") as file:
                file.truncate(9)
            raise KeyError("cut")
    (tmp_path / "x.png").write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", save)
    status, _, err = command("sample.py", "x", "--model", saved, "--steps", 1, "--output", "x.png")
    assert status == 2 and err.splitlines()[-1] == "sample.py: --output x.png: KeyError 'cut'", err
    assert (tmp_path / "x.png").read_bytes() == b"old" and os.listdir(tmp_path) == ["x.png"]
    monkeypatch.undo()
    (tmp_path / "x-1.png").mkdir()                                 # in the way of the second
    status, _, err = command("sample.py", "x", "y", "--model", saved, "--steps", 1, "--output", "x.png")
    assert status == 2 and err.splitlines()[-1] == "sample.py: --output x.png: x-1.png is a folder", err
    assert (tmp_path / "x.png").read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["x-1.png", "x.png"]


@pytest.mark.parametrize("flags", [["--seed", 5], ["--stage", "unet"], ["--init", "other"],
                                   ["--stage", "unet", "--text-encoder", "other/text_encoder"]])
def test_a_new_run_keeps_the_old_model_whole_and_never_stands_half_in_it(saved, trained, tmp_path, monkeypatch,
                                                                         command, flags):
    """Wherever the power is cut while the old model is set aside, one folder holds it all; OUT is never a mixture."""
    shutil.copytree(saved, tmp_path / "other")
    shutil.copytree(tmp_path / "other/tokenizer", tmp_path / "other/text_encoder/tokenizer")
    old, found = load_pipeline(str(trained / "out")), []

    def is_old(folder):
        try:
            pipe = load_pipeline(str(folder))
        except BadInput:
            return False
        return all(same_weights(getattr(old, part), getattr(pipe, part)) for part in sample.PARTS)
    for stage in ("vae", "clip", "unet"):
        monkeypatch.setattr(train, f"train_{stage}", lambda *_: None)               # the moment before training
    for call in range(1, 199, 7):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(trained / "out", tmp_path / "out")
        (tmp_path / "out/a user's own").mkdir()
        with pytest.MonkeyPatch.context() as patch:
            real = train.set_aside

            def interrupted(*arguments):
                interrupted.count = cut_the_power_at(call, patch)
                real(*arguments)
            interrupted.count = [0]
            patch.setattr(train, "set_aside", interrupted)
            try:
                command("train.py", *TINY_RUN, *flags)
            except PowerCut:
                pass
        count = interrupted.count[0]
        in_place = is_old(tmp_path / "out")
        assert in_place or is_old(tmp_path / "out/previous-1"), call
        if not in_place:                                           # then it is no model at all
            with pytest.raises(BadInput):
                load_pipeline(str(tmp_path / "out"))
        found.append(in_place)
        if call > count:
            break
    assert found[0] and not found[-1] and is_old(tmp_path / "out/previous-1") and not is_old(tmp_path / "out")
    assert (tmp_path / "out/a user's own").exists() and not (tmp_path / "out/previous-1/a user's own").exists()


def test_resume_never_takes_another_runs_model_away(saved, trained, tmp_path, command, no_sheets):
    """A forgotten --init, or a model without its train_state: refused. An empty OUT: there is nothing to lose."""
    for name in ("tuned", "bare"):
        shutil.copytree(trained / "out", tmp_path / name)
    assert command("train.py", "--init", saved, *TINY_RUN, "--steps", 1, "--out", "tuned")[0] == 0
    shutil.rmtree(tmp_path / "bare/train_state")
    for name in ("tuned", "bare"):
        before = {p: p.read_bytes() for p in (tmp_path / name).rglob("*")
                  if p.suffix in (".safetensors", ".json", ".pt")}
        status, _, err = command("train.py", *TINY_RUN, "--out", name, "--resume")
        assert status == 2 and f"--resume: {name}/" in err.splitlines()[-1] and "--init" in err, err
        assert before == {p: p.read_bytes() for p in before} and not (tmp_path / name / "previous-2").exists()
    assert command("train.py", *TINY_RUN, "--stage", "vae", "--out", "fresh", "--resume")[0] == 0


def test_a_new_run_takes_links_away_not_what_they_lead_to(trained, tmp_path, command, monkeypatch):
    shutil.copytree(trained / "out", tmp_path / "out")
    (tmp_path / "out/unet").rename(tmp_path / "elsewhere")
    (tmp_path / "out/unet").symlink_to(tmp_path / "elsewhere")
    before = sorted(os.listdir(tmp_path / "elsewhere"))
    monkeypatch.setattr(train, "train_vae", lambda *_: None)
    assert command("train.py", *TINY_RUN, "--stage", "vae")[0] == 0
    assert sorted(os.listdir(tmp_path / "elsewhere")) == before and not os.path.lexists(tmp_path / "out/unet")
    load_pipeline(str(tmp_path / "out/previous-1"))


def test_settling_follows_no_link(saved, tmp_path):
    """A foreign model cannot move files out of other folders, nor into them, by the links that it contains."""
    for name in ("theirs", "m"):
        shutil.copytree(saved, tmp_path / name)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("hello")
    (tmp_path / "theirs/.written").symlink_to(tmp_path / "mine")
    load_pipeline(str(tmp_path / "theirs"))
    (tmp_path / "m/.written/notes/deep").mkdir(parents=True)
    (tmp_path / "m/.written/notes/thesis.txt").write_text("theirs")
    (tmp_path / "m/.written/notes/deep/thesis.txt").write_text("theirs")
    (tmp_path / "m/notes").symlink_to(tmp_path / "mine")
    load_pipeline(str(tmp_path / "m"))
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"] and (tmp_path / "mine/thesis.txt").read_text() == "hello"
    assert (tmp_path / "m/notes/deep/thesis.txt").read_text() == "theirs" and not (tmp_path / "m/.written").exists()
    (tmp_path / "link").symlink_to(tmp_path / "m")                 # to the model itself, a link may lead
    save_pipeline(load_pipeline(str(tmp_path / "link")), str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "m/.written").exists()


def test_numbers_that_are_none_reach_no_config(tmp_path):
    pipe = make_pipeline()
    save_pipeline(pipe, str(tmp_path / "m"))
    before = (tmp_path / "m/vae/config.json").read_text()
    pipe.vae.scaling_factor = float("nan")
    with pytest.raises(OSError, match="nan.*unharmed"):
        save_pipeline(pipe, str(tmp_path / "m"))
    assert (tmp_path / "m/vae/config.json").read_text() == before


def test_a_finished_run_that_lost_its_unet_writes_it_again(trained, tmp_path, command):
    shutil.copytree(trained / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out/unet")
    status, _, err = command("train.py", *TINY_RUN, "--resume")
    assert status == 0 and same_weights(load_pipeline(str(tmp_path / "out")).unet,
                                        load_pipeline(str(trained / "out")).unet), err


def with_ctrl_c(at, learning_rate):
    """The learning rate as it is; but at one step somebody presses Ctrl-C."""
    return lambda step, *rest: (step == at and os.kill(os.getpid(), signal.SIGINT), learning_rate(step, *rest))[1]


@pytest.mark.parametrize("stage, more", [("vae", []), ("vae", ["--gan-weight", 0.5]), ("clip", []), ("unet", [])])
def test_a_stage_cut_off_twice_ends_where_an_uninterrupted_one_does(trained, tmp_path, monkeypatch, command,
                                                                    no_sheets, stage, more):
    """Once between two checkpoints, as by a power cut, once by Ctrl-C: then the same bits in every file of weights."""
    flags = ["--stage", stage, *TINY_RUN, "--steps", 9, "--save-every", 3, "--sample-every", 1000, *more]
    for name in ("whole", "broken"):
        shutil.copytree(trained / "out", tmp_path / name)
    assert command("train.py", *flags, "--out", "whole")[0] == 0
    real = train.learning_rate

    def cut(step, *rest):
        if step == 5:
            raise PowerCut
        return real(step, *rest)
    monkeypatch.setattr(train, "learning_rate", cut)
    with pytest.raises(PowerCut):
        command("train.py", *flags, "--out", "broken")
    assert torch.load(tmp_path / f"broken/train_state/{stage}.pt", weights_only=True)["step"] == 3
    monkeypatch.setattr(train, "learning_rate", with_ctrl_c(6, real))
    status, _, err = command("train.py", *flags, "--out", "broken", "--resume")
    assert status == 1 and "step 8" in err and "--resume" in err.splitlines()[-1]
    monkeypatch.setattr(train, "learning_rate", real)
    assert command("train.py", *flags, "--out", "broken", "--resume")[0] == 0
    files = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.safetensors")
             if "previous" not in str(p)]
    assert len(files) > 1 and all((tmp_path / "whole" / f).read_bytes() == (tmp_path / "broken" / f).read_bytes()
                                  for f in files)
    whole, broken = (torch.load(tmp_path / name / f"train_state/{stage}.pt", weights_only=True)
                     for name in ("whole", "broken"))
    assert [row["loss"] for row in whole["rows"]][-1] > 0 and whole["step"] == broken["step"] == 9
    assert ("gan" in whole["rows"][-1]) == bool(more)
    for name in ("model", "average"):
        assert all(torch.equal(whole[name][k], broken[name][k]) for k in whole[name])


@pytest.mark.parametrize("flags, given", [([], (0, False)), (["--gan-weight", 0.25], (0.25, True))])
def test_gan_weight_and_a_discriminator_reach_the_loss(command, monkeypatch, no_sheets, flags, given):
    seen, real = [], train.vae_loss
    monkeypatch.setattr(train, "vae_loss", lambda **asked: (
        seen.append((asked["gan_weight"], "discriminator" in asked)), real(**asked))[1])
    assert command("train.py", "--stage", "vae", *TINY_RUN, "--steps", 2, *flags)[0] == 0
    assert seen == [given] * 2


@pytest.mark.parametrize("flag, value", [
    ("--lr", 0.01), ("--batch-size", 8), ("--steps", 9), ("--seed", 3), ("--image-size", 16), ("--max-images", 20),
    ("--min-snr", 0), ("--grad-accum", 2), ("--prediction-type", "epsilon"), ("--dtype", "bfloat16"),
    ("--preset", "base"),
    ("--data", "pictures")])
def test_a_run_with_other_settings_is_not_resumed(trained, tmp_path, command, flag, value):
    shutil.copytree(trained / "out", tmp_path / "out")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "pictures/a.png")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.suffix in (".safetensors", ".json", ".pt")}
    status, _, err = command("train.py", "--stage", "unet", *TINY_RUN, "--dtype", "float32", flag, value, "--resume")
    assert status == 2 and re.search(f"--resume: .*{flag} was .* and is {value}", err.splitlines()[-1]), err
    assert before == {p: p.read_bytes() for p in before}


def test_a_run_whose_captions_have_changed_is_not_resumed(tmp_path, command, no_sheets):
    """Of other captions another tokenizer is learnt: its ids would mean other words to the weights."""
    (tmp_path / "p").mkdir()
    for k in range(3):
        Image.new("RGB", (16, 16), (80 * k, 0, 0)).save(tmp_path / f"p/{k}.png")
        (tmp_path / f"p/{k}.txt").write_text(f"a boat {k}")
    flags = ["--data", "p", "--stage", "clip", *TINY_RUN]
    assert command("train.py", *flags)[0] == 0
    assert command("train.py", *flags, "--resume")[0] == 0
    (tmp_path / "p/1.txt").write_text("a house")
    status, _, err = command("train.py", *flags, "--resume")
    assert status == 2 and "--resume: " in err.splitlines()[-1] and "--data was" in err, err


def test_an_unfinished_vae_is_not_resumed_under_a_unet_that_relies_on_it(trained, tmp_path, command, monkeypatch,
                                                                         no_sheets):
    flags, real = ["--stage", "vae", *TINY_RUN, "--steps", 6], train.learning_rate
    shutil.copytree(trained / "out", tmp_path / "out")
    monkeypatch.setattr(train, "learning_rate", with_ctrl_c(2, real))
    assert command("train.py", *flags)[0] == 1                     # Ctrl-C after three steps
    monkeypatch.setattr(train, "learning_rate", real)
    for stage in ("clip", "unet"):
        assert command("train.py", "--stage", stage, *TINY_RUN)[0] == 0
    before = (tmp_path / "out/vae/diffusion_pytorch_model.safetensors").read_bytes()
    status, _, err = command("train.py", *flags, "--resume")
    assert status == 2 and "--resume: " in err.splitlines()[-1] and "out/unet away" in err, err
    assert before == (tmp_path / "out/vae/diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "out/unet").rename(tmp_path / "unet")
    assert command("train.py", *flags, "--resume")[0] == 0
    assert before != (tmp_path / "out/vae/diffusion_pytorch_model.safetensors").read_bytes()


def test_a_size_that_the_vae_cannot_halve_is_refused_before_anything_is_moved(saved, tmp_path, command):
    model = tmp_path / "m"
    save_pipeline(load_pipeline(saved), str(model))
    deep = VAE(block_out_channels=(16,) * 6, layers_per_block=1, norm_num_groups=4)                # f = 32
    sample.save_module(deep, str(model / "vae"), "vae")
    status, _, err = command("train.py", "--init", "m", *TINY_RUN, "--image-size", 48)
    assert status == 2 and "--image-size 48 is no multiple of 32" in err.splitlines()[-1], err


def test_a_missing_out_is_no_hub_id(tmp_path, command):
    status, _, err = command("train.py", "--stage", "unet", *TINY_RUN, "--out", "runs/new")
    assert status == 2 and "--stage vae" in err and "hub" not in err.replace("hub id", ""), err


def test_gradients_that_are_no_numbers_stop_a_run_before_they_reach_a_weight():
    for value, gone_wrong in ((1.0, False), (0.0, True), (-1.0, True)):             # sqrt: fine; infinite slope; nan
        model = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(model.weight, value)
        learner = ddpm.Learner(model, lambda model: (model.weight.sqrt().sum(), {}))
        if gone_wrong:
            with pytest.raises(ArithmeticError, match="learning, step 0.*--lr"):
                learner.gradient([()])
        else:
            assert learner.gradient([()])[0] == {"loss": 1.0}
        assert model.weight.item() == value


def test_float16_skips_a_step_that_overflows_and_takes_the_next():
    model = torch.nn.Linear(1, 1)
    factors = [0.0, 0.0]
    learner = ddpm.Learner(model, lambda model: (
        sum(model.weight.sum() * factor for factor in factors) + model.bias.sum(), {}), torch.float16)
    before, scale = [p.item() for p in model.parameters()], learner.scaler.get_scale()
    for factors[:] in ((1e38, 0.0), (1e38, -1e38), (1.0, 0.0)):    # scaled: infinite; inf - inf; fine
        learner.gradient([()])
        learner.step(0.1)
        assert [p.item() != b for p, b in zip(model.parameters(), before)] == [factors[0]
                                                                               == 1.0] * 2   # both, or neither
    assert learner.scaler.get_scale() < scale


def test_each_picture_is_seen_once_an_epoch():
    picture_at = ddpm.endless(10, seed=3)
    epochs = [[picture_at(place) for place in range(start, start + 10)] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert epochs[1] == [ddpm.endless(10, seed=3)(place) for place in range(10, 20)] != \
        [ddpm.endless(10, seed=4)(place) for place in range(10, 20)]


WIDE_RUN = [*TINY_RUN, "--dtype", "float32", "--batch-size", "8", "--steps", "9", "--image-size", "16",
            "--sample-every", "1000"]


def torchrun(processes, *arguments, **options):
    from torch.distributed.run import __file__ as program
    return subprocess.Popen([sys.executable, program, f"--nproc_per_node={processes}", "--standalone",
                             os.path.join(HERE, "train.py"),
                             *map(str, arguments)], text=True, stderr=subprocess.PIPE,
                             start_new_session=True, **options)


def closest(a, b):
    """The largest difference between two pipelines' weights."""
    return max((x - getattr(b, part).state_dict()[name]).abs().max().item() for part in sample.PARTS
               for name, x in getattr(a, part).state_dict().items())


def test_two_processes_learn_what_one_does_and_survive_the_loss_of_one(tmp_path):
    """The same global batch: the same weights, to rounding. One of two is killed: the run ends; one alone goes on."""
    status, _, err = run("train.py", *WIDE_RUN, "--out", tmp_path / "one")
    assert status == 0, err
    process = torchrun(2, *WIDE_RUN, "--out", tmp_path / "two")
    assert "train.py: " not in process.communicate(timeout=300)[1] and process.returncode == 0
    one, two = (load_pipeline(str(tmp_path / name)) for name in ("one", "two"))
    assert closest(one, two) < 1e-3 < closest(one, load_untrained(one))
    process = torchrun(2, *WIDE_RUN, "--out", tmp_path / "half")
    while process.poll() is None and not (tmp_path / "half/train_state/unet.pt").exists():
        time.sleep(0.02)
    children = [int(pid) for pid in os.popen(f"pgrep -P {process.pid}").read().split()]
    os.kill(children[-1], signal.SIGKILL)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "SIGKILL" in err
    assert torch.load(tmp_path / "half/train_state/unet.pt", weights_only=True)["step"] < 9
    status, _, err = run("train.py", *WIDE_RUN, "--out", tmp_path / "half", "--resume")
    assert status == 0 and closest(one, load_pipeline(str(tmp_path / "half"))) < 1e-3, err


def load_untrained(pipe):
    """The same shapes, with other weights."""
    return Pipeline(*(shake(type(getattr(pipe, part)).from_config(getattr(pipe, part).to_config()))
                      for part in sample.PARTS))


def test_a_model_that_draws_no_numbers_is_told(saved):
    pipe = load_pipeline(saved)
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    with pytest.raises(BadInput, match="nan.*float32"):
        generate(pipe, "fog", steps=2, progress=False)
    pipe = load_pipeline(saved)
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.bias, float("inf"))
    with pytest.raises(BadInput, match="nan.*float32"):
        generate(pipe, "fog", steps=2, progress=False)


@pytest.mark.parametrize("error, words", [
    (KeyboardInterrupt(), "stopped"), (MemoryError(), "out of memory"),
    (type("InductorError", (RuntimeError,), {})("InvalidCxxCompiler: none works"), "--compile needs a C"),
    (RuntimeError("CUDA out of memory. Tried to ..."), "out of memory"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "--resume"),
    (OSError(28, "No space left on device"), "No space"),
    (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), "--resume"),
    (BadInput("--flag: a b"), "--flag: a b"), (ArithmeticError("unet, step 3: loss nan"), "step 3"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None)])
def test_what_goes_wrong_ends_in_one_line(monkeypatch, capsys, error, words):
    """But an error of ours is shown as it is."""
    def main(args):
        raise error
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    with pytest.raises(SystemExit if words else RuntimeError) as end:
        sample.run(main, None)
    if words:
        err = capsys.readouterr().err
        assert end.value.code == (2 if isinstance(error, (OSError, BadInput)) else 1) and err.count("\n") == 1
        assert err.startswith("train.py: ") and words in err


# ---------------------------------------------------------------------------------------------------------------------
# Nothing let in: bad pictures, bad metadata, bad commands, odd prompts, files changed at random.

@pytest.fixture
def bad_pictures(tmp_path):
    """A folder: eight pictures that can be used, and eight that cannot."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    photo.save(folder / "a_good.png")
    photo.resize((1, 1)).save(folder / "b_dot.png")
    photo.convert("CMYK").save(folder / "c_cmyk.jpg")
    photo.convert("P").save(folder / "d_palette.png")
    Image.fromarray(np.full((20, 40), 40000, dtype=np.uint16)).save(folder / "e_deep.png")
    photo.save(folder / "f_moving.gif", save_all=True, append_images=[photo.rotate(90)] * 3)
    photo.resize((1, 4000)).save(folder / "g_thin.png")
    photo.save(folder / "h_last.webp")
    data = (folder / "a_good.png").read_bytes()
    (folder / "bad_cut.png").write_bytes(data[:2000])              # its head is whole
    (folder / "bad_empty.png").write_bytes(b"")
    (folder / "bad_text.jpg").write_text("no picture at all")
    (folder / "bad_head.png").write_bytes(data[:20])
    width = (70_000).to_bytes(4, "big") * 2                        # 4,900,000,000 pixels: beyond Pillow's limit
    head = b"IHDR" + width + data[24:29]
    import zlib
    (folder / "bad_bomb.png").write_bytes(data[:12] + head + zlib.crc32(head).to_bytes(4, "big") + data[33:])
    os.symlink("bad_loop.png", folder / "bad_loop.png")
    os.symlink("nowhere.png", folder / "bad_link.png")
    (folder / "bad_phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")   # a picture, but not to Pillow alone
    (folder / ".thumbnails").mkdir()
    photo.save(folder / ".thumbnails/hidden.png")
    os.symlink("..", folder / "around")                            # a folder that contains itself
    os.mkfifo(folder / "bad_pipe.png")                             # opened, it would wait for ever
    os.mkfifo(folder / "c_cmyk.txt")
    return folder


def open_data(folder, out, split="train", size=16):
    args = type("Args", (), dict(image_size=size, data=str(folder), preset="tiny", max_images=None, out=str(out)))
    return train.open_data(args, split)


def test_what_can_be_used_is_used_and_the_rest_is_named_once(bad_pictures, tmp_path, capsys):
    data = open_data(bad_pictures, tmp_path / "out")
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "8 unreadable" in err
    assert all(err.count(f"bad_{name}") == 1 for name in ("empty.png", "text.jpg", "head.png", "bomb.png", "loop.png",
                                                          "link.png", "pipe.png", "phone.HEIC"))
    assert len(data) == 9                                          # with the one that turns out broken further in
    pixels = data.pixels[list(range(9))]
    data.pixels[list(range(9))], open_data(bad_pictures, tmp_path / "out", "val")
    err = capsys.readouterr().err
    assert err.count("bad_cut.png") == 1 and "left out" in err
    cut = data.paths.index("bad_cut.png")
    stand_in = data.shown[cut].item()
    assert data.shown.tolist() == [stand_in if i == cut else i for i in range(18)] and stand_in != cut
    assert torch.equal(pixels[cut], pixels[stand_in]) and data.paths[stand_in] == "c_cmyk.jpg"


def test_a_picture_that_vanishes_is_replaced(tmp_path, capsys):
    (tmp_path / "p").mkdir()
    for k in range(5):
        Image.new("RGB", (8, 8), (50 * k, 0, 0)).save(tmp_path / f"p/{k}.png")
    data = open_data(tmp_path / "p", tmp_path / "out")
    os.remove(tmp_path / "p/4.png")
    assert data.pixels[[3, 4]][:, 0, 0, 0].tolist() == [150, 0]
    assert data.shown.tolist() == [0, 1, 2, 3, 5, 5, 6, 7, 8, 9]   # 5 is 0 mirrored
    assert "4.png" in capsys.readouterr().err
    for k in range(4):
        os.remove(tmp_path / f"p/{k}.png")
    with pytest.raises(BadInput, match="--data"):
        data.pixels[[1]]


def test_photographs_are_also_learnt_mirrored_unless_a_caption_names_a_side(tmp_path):
    (tmp_path / "p").mkdir()
    captions = ["a boat", "a boat on the left", "Right: a tree", "a bright, uplefted thing", "boat_left", "leftmost"]
    for k, caption in enumerate(captions):
        picture = Image.new("RGB", (16, 16), (40 * k, 0, 0))
        picture.paste((255, 255, 255), (0, 0, 8, 16))              # the left half is white
        picture.save(tmp_path / f"p/{k}.png")
        (tmp_path / f"p/{k}.txt").write_text(caption)
    data = open_data(tmp_path / "p", tmp_path / "out")
    assert data.n == 12 and data.captions == captions * 2
    x = data.pixels[list(range(12))]
    for k, mirrored in enumerate((True, False, False, True, False, False)):
        assert x[k, :, :, :8].min() == 255 and torch.equal(x[k + 6], x[k].flip(2) if mirrored else x[k])
    assert open_data(tmp_path / "p", tmp_path / "out", "val").n == 6                # what measures is as it is
    args = type("Args", (), dict(image_size=64, data="landscapes", preset="tiny", max_images=9, out=str(tmp_path)))
    assert train.open_data(args, "train").n == 9                   # a drawn sun on the left stays there


def test_max_images_takes_some_of_every_folder(tmp_path):
    for name in "abcd":
        (tmp_path / "p" / name).mkdir(parents=True)
        for k in range(10):
            Image.new("RGB", (8, 8)).save(tmp_path / f"p/{name}/{k}.png")
    args = type("Args", (), dict(image_size=16, data=str(tmp_path / "p"), preset="tiny", max_images=8,
                                 out=str(tmp_path / "out")))
    captions = train.open_data(args, "train").captions
    assert len(captions) == 16 and all(2 <= captions.count(name) <= 6 for name in "abcd")


def test_pictures_that_training_draws_are_no_data(tmp_path, command):
    """In a folder of photographs, `train.py --data .`: OUT lies among them; --resume finds the same data."""
    for k in range(24):
        Image.new("RGB", (20, 20), (9 * k, 99, 200)).save(tmp_path / f"{k}.png")
    flags = ["--data", ".", *TINY_RUN, "--stage", "vae"]
    assert command("train.py", *flags)[0] == 0 and len(list((tmp_path / "out").rglob("*.png"))) > 1
    assert len(train.ImageFolder(str(tmp_path), 16, "train",
                                 str(tmp_path / "out"))) == 23 < len(train.ImageFolder(str(tmp_path), 16))
    status, _, err = command("train.py", *flags, "--resume")
    assert status == 0 and (tmp_path / "out/train_state/vae.pt").exists(), err
    assert not (tmp_path / "out/previous-1").exists()


def test_processes_that_nobody_brings_together_are_told(tmp_path):
    status, _, err = run("train.py", *TINY_RUN, cwd=tmp_path, env=dict(os.environ, WORLD_SIZE="2", RANK="0"))
    assert status == 2 and re.fullmatch("train.py: .*2 processes.*\n", err) and not os.listdir(tmp_path), err


@pytest.mark.parametrize("names", [[], ["bad_empty.png"], ["bad_cut.png"],
                                   ["bad_loop.png", "bad_bomb.png", "bad_cut.png"]])
def test_a_folder_with_nothing_usable_is_an_error_before_any_model(bad_pictures, tmp_path, monkeypatch, command, names):
    for path in bad_pictures.iterdir():
        if path.name not in names and path.name != ".thumbnails":
            path.unlink()
    monkeypatch.setattr(train, "VAE", None)                        # would not be called, but crash
    status, _, err = command("train.py", "--data", bad_pictures)
    assert status == 2 and "--data" in err.splitlines()[-1] and "Traceback" not in err


def test_odd_captions_and_metadata_serve_as_far_as_they_can(tmp_path, capsys):
    root = tmp_path / "p"
    root.mkdir()
    for name in "abcdefgh":
        Image.new("RGB", (8, 8)).save(root / f"{name}.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (root / "a.txt").write_bytes(b"\xff\xfe not utf-8 \x00\x07")
    (root / "b.txt").write_text("")
    (root / "c.txt").write_text("word " * 1_000_000)
    (root / "d.txt").mkdir()
    lines = [dict(file_name="e.png", text="first"), dict(file_name="./e.png", text="second"),
             dict(file_name="gone.png", text="x"),
             dict(file_name="../secret.png", text="x"), dict(file_name=str(tmp_path / "secret.png"), text="x"),
             dict(file_name="f.png", text=None), dict(file_name="g.png", text="lone \ud800 \u202e\x1b[31m")]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = ImageFolder(str(root), 8)
    err = capsys.readouterr().err
    assert "4 in metadata" in err and all(name in err for name in ("e.png", "gone.png", "../secret.png"))
    captions = {data.paths[i][0]: data.caption(i) for i in range(len(data))}
    assert len(data) == 8 and captions["e"] == "second" and captions["d"] == "d"
    assert captions["b"] == captions["f"] == ""
    assert len(captions["c"]) <= 10_000 and "not utf-8" in captions["a"]
    tokenizer = train_tokenizer([clip_encoder.plain(c) for c in captions.values()], vocab_size=540, max_length=20)
    assert tokenize(tokenizer, list(captions.values())).shape == (8, 20)


def test_a_bad_picture_for_validation_does_not_stop_the_others(tmp_path, command):
    (tmp_path / "p").mkdir()
    for k in range(20):
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (9, 9, 3),
                                                          dtype=np.uint8)).save(tmp_path / f"p/{k:02}.png")
    whole = (tmp_path / "p/10.png").read_bytes()
    (tmp_path / "p/10.png").write_bytes(whole[:len(whole) // 2])   # the only one for "val"
    status, _, err = command("train.py", "--stage", "vae", *TINY_RUN, "--data", "p")
    assert status == 0 and err.count("10.png") == 1, err


def test_training_on_bad_pictures_ends_well(bad_pictures, tmp_path, command):
    (bad_pictures / "a_good.txt").write_bytes(b"odd \xff")
    (bad_pictures / "metadata.jsonl").write_text(json.dumps(dict(file_name="b_dot.png", text="lone \ud800")))
    status, _, err = command("train.py", *TINY_RUN[:2], *TINY_RUN[4:], "--data", bad_pictures)
    assert status == 0 and "8 unreadable" in err and err.count("bad_cut.png") == 1 and "Traceback" not in err, err
    load_pipeline(str(tmp_path / "out"))


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """command(script, *arguments) -> (exit status, stdout, stderr): as `run`, without the slow start of a process."""
    def run_inside(script, *arguments):
        module = {"train.py": train, "sample.py": sample}[script]
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        status, words = 0, ""
        try:
            sample.run(module.main, module.parse_args())
        except SystemExit as e:
            status, words = (e.code, "") if isinstance(e.code, int) else (1, e.code)
        out, err = capsys.readouterr()
        return status, out, err + words
    yield run_inside
    signal.signal(signal.SIGINT, signal.default_int_handler)


def spoiled(saved, folder):
    """Models that are none, each in its own way."""
    def copy(name, part=None, text=None, data=None):
        shutil.copytree(saved, folder / name)
        if part and text is None and data is None:
            path = folder / name / part
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif part:
            (folder / name / part).write_bytes(data if text is None else text.encode())
    weights = {part: f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")}
    whole = open(os.path.join(saved, weights["unet"]), "rb").read()
    copy("no-unet", "unet")
    copy("no-text", "text_encoder")
    copy("no-tokenizer", "tokenizer")
    copy("no-weights", weights["vae"])
    copy("no-config", "vae/config.json")
    copy("cut", weights["unet"], data=whole[:len(whole) // 2])
    copy("cut-head", weights["unet"], data=whole[:50])
    copy("empty-weights", weights["unet"], data=b"")
    copy("wrong-size", "unet/config.json", json.dumps(dict(SMALL_UNET, block_out_channels=[32, 96, 96])))
    copy("no-json", "unet/config.json", '{"sample_size": 8,')
    copy("list", "unet/config.json", "[1, 2]")
    copy("huge", "unet/config.json", json.dumps(dict(SMALL_UNET, layers_per_block=10 ** 9)))
    copy("foreign", weights["vae"], data=whole)
    copy("schedule", "scheduler/scheduler_config.json", '{"beta_start": 2}')
    copy("drowned", "scheduler/scheduler_config.json", '{"num_train_timesteps": 1000000}')
    copy("noiseless", "scheduler/scheduler_config.json", '{"beta_start": 1e-30, "beta_end": 1e-29}')
    copy("offset", "scheduler/scheduler_config.json", '{"steps_offset": 1.5}')
    copy("vast", "unet/config.json", json.dumps(dict(SMALL_UNET, sample_size=1024)))
    text = json.loads((folder / "vast/text_encoder/config.json").read_text())
    copy("heads", "text_encoder/config.json", json.dumps(dict(text, num_attention_heads=1.0)))
    words = json.loads((folder / "vast/tokenizer/vocab.json").read_text())
    copy("far-word", "tokenizer/vocab.json", json.dumps(words | {"a": 777_777}))
    (folder / "far-word/tokenizer/tokenizer.json").unlink()
    from tokenizers import Tokenizer, models
    copy("unknown-words", "tokenizer/vocab.json")
    Tokenizer(models.WordLevel({"a": 0})).save(str(folder / "unknown-words/tokenizer/tokenizer.json"))
    (folder / "empty").mkdir()
    (folder / "random.ckpt").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "random.safetensors").write_bytes(np.random.default_rng(1).bytes(5000))
    (folder / "foreign.safetensors").write_bytes(whole)
    (folder / "text.ckpt").write_text("hello")
    torch.save([1, 2, 3], folder / "list.ckpt")
    Image.new("RGB", (16, 16)).save(folder / "red.png")
    Image.new("RGB", (64, 16)).save(folder / "wide.png")
    (folder / "words.txt").write_text("words")
    Image.new("1", (30_000, 30_000)).save(folder / "bomb.png")


BAD_FLAGS = [(script, flag, value) for script, flags in {
    "train.py": {"--steps": "0 -1 1.5 x nan 1e99", "--batch-size": "0 -4 x 99999999", "--grad-accum": "0 x 7",
                 "--lr": "0 -1 nan inf x",
                 "--min-snr": "-1 nan x", "--image-size": "0 -16 30 x 99999", "--max-images": "0 -1 x",
                 "--save-every": "0 x",
                 "--sample-every": "0 -1", "--seed": "-1 x 1e9", "--workers": "-1 9999 x", "--stage": "nope",
                 "--preset": "huge",
                 "--device": "tpu cuda mps", "--dtype": "int8", "--prediction-type": "x0",
                 "--data": "nowhere words.txt empty",
                 "--out": "words.txt", "--init": "nowhere random.ckpt cut no-text", "--text-encoder": "nowhere empty",
                 "--what": "1"},
    "sample.py": {"--steps": "0 -1 1001 x nan", "--guidance": "nan inf 1e9 x", "--strength": "0 -1 2 nan x",
                  "--seed": "-1 x 1e30",
                  "--num-images": "0 -1 x 1e9", "--height": "0 -8 1 99999999 x", "--width": "0 -8 99999 x",
                  "--sampler": "euler",
                  "--device": "tpu cuda mps", "--dtype": "int8", "--prediction-type": "x0",
                  "--init-image": "nowhere.png words.txt empty",
                  "--mask": "red.png nowhere.png", "--output": "nowhere/x.png x.what empty x.gif noending x.blp x.bufr",
                  "--tokenizer": "nowhere empty",
                  "--like": "nowhere.png red.png words.txt bomb.png", "--what": "1",
                  "--model": "nowhere no/such/hub/id empty no-unet no-text no-tokenizer no-weights no-config cut "
                             "cut-head empty-weights wrong-size no-json list huge foreign schedule drowned "
                             "noiseless offset vast heads far-word "
                             "unknown-words random.ckpt random.safetensors "
                             "foreign.safetensors text.ckpt list.ckpt red.png"}}.items()
    for flag, values in flags.items() for value in values.split()]
BAD_TOGETHER = [("sample.py", []), ("sample.py", ["x", "--mask", "red.png"]), ("train.py", ["prompt"]),
                ("sample.py", ["x", "--init-image", "red.png", "--mask", "wide.png"]),
                ("train.py", ["--stage", "unet"]),
                ("train.py", ["--stage", "eval"]), ("train.py", ["--stage", "clip", "--text-encoder", "SAVED"]),
                ("train.py", ["--batch-size", "6", "--grad-accum", "4"]), ("train.py", ["--out", ""]),
                ("train.py", ["--what\nelse"]), ("sample.py", ["x", "--what\nelse"]),
                ("sample.py", ["x", "--model", "no\nwhere"]),
                ("train.py", ["--init", ""]),
                ("train.py", ["--init", "SAVED", "--out", "SAVED"]),
                ("train.py", ["--stage", "clip", "--init", "SAVED"]),
                *(("sample.py", ["x", flag, ""])
                  for flag in ("--init-image", "--mask", "--tokenizer", "--like", "--model", "--output")),
                  ("train.py", ["--init", "SAVED", "--image-size", "40"])]


def test_bad_commands_end_in_one_line_and_write_nothing(saved, tmp_path, command):
    """Each flag of both scripts with values below, above, not numbers, contradictory; broken models and pictures."""
    assert len(BAD_FLAGS) + len(BAD_TOGETHER) > 120
    spoiled(saved, tmp_path)

    def everything():
        return {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    before = everything()
    for script, arguments in [(script, [flag, value]) for script, flag, value in BAD_FLAGS] + BAD_TOGETHER:
        arguments = [argument.replace("SAVED", saved) for argument in arguments]
        if script == "sample.py" and arguments and arguments[0] != "x":
            arguments = ["x", *([] if "--model" in arguments else ["--model", saved]), *arguments]
        if "--device" in arguments and getattr(torch, arguments[-1], torch.cuda).is_available():
            continue
        status, out, err = command(script, *arguments)
        words = err.strip().splitlines()[-1:]
        name = arguments[-2] if len(arguments) > 1 else ""
        assert status == 2 and words and words[0].startswith(f"{script}: ") and "Traceback" not in err, (script,
                                                                                                         arguments, err)
        assert name in words[0] or arguments[-1] in words[0] or "--" in words[0] or "PROMPT" in words[0], (script,
                arguments, err)
        assert len(err.strip().splitlines()) == 1 and not out, (script, arguments, out, err)
        assert everything() == before, (script, arguments, set(everything().items()) ^ set(before.items()))


@pytest.mark.parametrize("script, arguments, flag", [
    ("train.py", ["--data", "nowhere"], "--data"), ("sample.py", ["x", "--model", "out"], "python train.py"),
    ("sample.py", ["x", "--model", "MODEL", "--steps", "0"], "--steps"), ("train.py", ["--lr", "nan"], "--lr")])
def test_bad_input_ends_with_status_2_and_names_the_flag(saved, tmp_path, script, arguments, flag):
    """A few of them in a process of their own."""
    status, out, err = run(script, *[a.replace("MODEL", saved) for a in arguments], cwd=tmp_path)
    assert status == 2 and flag in err and err.count("\n") == 1 and not os.listdir(tmp_path), err


@pytest.mark.parametrize("prompt", [
    "", "   \t ", "word " * 10_000, "\U0001f303\U0001f30c over \u6c99\u4e18",
    "\u05dc\u05d9\u05dc\u05d4 \u200f\u0644\u064a\u0644", "a\x00b",
    "\"quotes\" and 'quotes', Steps: 3", "two\nlines\n\nand more",
    "Negative prompt: none\nSteps: 7, Sampler: none, Size: 8x8", "\\\"\\n",
    "tab\tand \x1b[31m control"])
def test_any_prompt_draws_and_reads_back(saved, tmp_path, command, prompt):
    status, out, err = command("sample.py", prompt, "--model", saved, "--steps", 1, "--seed", 4, "--negative",
                               prompt[:9].strip("\n"))
    assert status == 0 and out == "out.png\n", err
    again = sample.read_parameters(tmp_path / "out.png")
    assert again["prompts"] == [prompt] and again["negative"] == prompt[:9].strip("\n") and again["seed"] == "4"
    first = Image.open(tmp_path / "out.png").tobytes()
    assert command("sample.py", "--like", "out.png", "--output", "b.png")[0] == 0
    assert Image.open(tmp_path / "b.png").tobytes() == first


@pytest.mark.parametrize("model", ['"m', 'a "b" c', "two\nlines", "a, Steps: 9, b: c", "\u6c99\u4e18/\U0001f303",
                                   "C:\\models\\m"])
def test_settings_read_back_whatever_they_contain(tmp_path, monkeypatch, model):
    from PIL import PngImagePlugin
    monkeypatch.setattr(sys, "argv", ["sample.py", "a house", "--model", model, "--init-image", model, "--tokenizer",
                                      model, "--seed", "3"])
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", sample.write_parameters(sample.parse_args(), 0, (8, 8)))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    again = sample.read_parameters(tmp_path / "x.png")
    assert again["model"] == again["init_image"] == again["tokenizer"] == model
    assert (again["prompts"], again["seed"], again["steps"]) == (["a house"], "3", "25")


def test_settings_of_zero_read_back(saved, tmp_path, command):
    assert command("sample.py", "a", "--model", saved, "--steps", 1, "--guidance", 0)[0] == 0
    assert ", CFG scale: 0.0, Seed: 0, " in Image.open(tmp_path / "out.png").info["parameters"]
    assert command("sample.py", "--like", "out.png", "--output", "b.png")[0] == 0
    again = Image.open(tmp_path / "b.png")
    assert ", CFG scale: 0.0, Seed: 0, " in again.info["parameters"]
    assert again.tobytes() == Image.open(tmp_path / "out.png").tobytes()


def test_bytes_that_are_no_characters_become_question_marks(saved, tmp_path):
    done = subprocess.run([sys.executable.encode(), os.path.join(HERE, "sample.py").encode(), b"a \xff house",
                           b"--steps", b"1",
                           b"--model", saved.encode(), b"--output", b"\xff.png"], cwd=tmp_path, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert sample.read_parameters(tmp_path / os.fsdecode(b"\xff.png"))["prompts"] == ["a ? house"]


ODD_VALUES = [None, True, False, -1, 0, 1, 2, 3, 7, 10 ** 9, 10 ** 30, -0.5, 0.1, float("nan"), float("inf"), "", "x",
              "None", "\ud800", "../x",
              [], [0], [None], [1, 2, 3, 4], [64, 64, 64], ["CrossAttnDownBlock2D"], {}, {"a": {"b": []}}, [[[[]]]]]


def spoil_json(rng, text):
    """JSON with something changed in one place: a value, a key, or a byte."""
    kind = rng.integers(5)
    if kind == 0:                                                  # bytes
        raw = bytearray(text.encode())
        for _ in range(rng.integers(1, 4)):
            raw[rng.integers(len(raw))] = rng.integers(256)
        return bytes(raw)
    if kind == 1:
        return text.encode()[:rng.integers(len(text))] if rng.random() < 0.8 else b"[" * 100_000
    value = json.loads(text)
    spots = [(value, key) for key in value]
    for parent, key in list(spots):
        if isinstance(parent[key], (dict, list)):
            spots += [(parent[key], inner) for inner in (parent[key] if isinstance(parent[key], dict)
                                                         else range(len(parent[key])))]
    parent, key = spots[rng.integers(len(spots))]
    if kind == 2 and isinstance(parent, dict):
        parent["odd" * rng.integers(1, 3)] = parent.pop(key)
    else:
        parent[key] = ODD_VALUES[rng.integers(len(ODD_VALUES))]
    return json.dumps(value).encode()


@contextlib.contextmanager
def within_reason(seconds=60, gigabytes=2):
    """No hang, and no more memory than that."""
    def late(*_):
        raise PowerCut(f"not done after {seconds} s")
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
        f.write("5")                                               # forget earlier peaks
    before, handler = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < gigabytes * 2 ** 20


@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json", "text_encoder/config.json",
                                  "scheduler/scheduler_config.json",
                                  "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"])
def test_configs_changed_at_random_end_in_a_picture_or_a_clear_error(saved, tmp_path, file):
    rng, ends = np.random.default_rng(sum(file.encode())), {"picture": 0, "error": 0}
    shutil.copytree(saved, tmp_path / "m")
    part, sound = file.split("/")[0].replace("tokenizer", "text_encoder"), load_pipeline(saved)
    parts = [part] if part in sample.PARTS else []                 # of the rest we know that it loads
    text = (tmp_path / "m" / file).read_text(encoding="utf-8")
    for k in range(60):
        spoiled_text = spoil_json(rng, text)
        (tmp_path / "m" / file).write_bytes(spoiled_text)
        with within_reason():
            try:
                pipe = load_pipeline(str(tmp_path / "m"), parts=parts)
                pipe = Pipeline(*(getattr(pipe, name) or getattr(sound, name) for name in (*sample.PARTS, "tokenizer")),
                                pipe.schedule)
                pictures = generate(pipe, "a red house", steps=2, height=16, width=16, progress=False)
                ends["picture"] += pictures[0].size == (16, 16)
            except BadInput as e:
                assert "\n" not in str(e) and len(str(e)) > 15
                ends["error"] += 1
            except BaseException as e:
                raise AssertionError(f"{k}: {spoiled_text[:3000]!r}") from e
    assert sum(ends.values()) == 60 and ends["error"] > 3, ends


def test_weights_changed_at_random_end_in_a_picture_or_a_clear_error(saved, tmp_path):
    rng = np.random.default_rng(8)
    shutil.copytree(saved, tmp_path / "m")
    path = tmp_path / "m/unet/diffusion_pytorch_model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head, body = data[8: 8 + length].decode(), data[8 + length:]
    ends = {"picture": 0, "error": 0}
    for k in range(80):
        kind = rng.integers(4)
        if kind == 0:                                              # a byte of the head, or of its length
            raw = bytearray(data)
            raw[rng.integers(8 + length) if rng.random() < 0.7 else rng.integers(8)] = rng.integers(256)
        elif kind == 1:
            raw = data[:rng.integers(len(data))]
        else:                                                      # types, shapes, places
            entries = json.loads(head)
            entry = entries[list(entries)[rng.integers(len(entries))]]
            key = list(entry)[rng.integers(len(entry))]
            entry[key] = ["F64", "I8", "BOOL", "X", [0, 2 ** 62], [-1, 4], [], [2 ** 40, 2 ** 40],
                          None][rng.integers(9)]
            new = json.dumps(entries).encode()
            raw = len(new).to_bytes(8, "little") + new + body
        path.write_bytes(bytes(raw))
        with within_reason():
            try:
                assert generate(load_pipeline(str(tmp_path / "m")), "a red house", steps=1, height=16, width=16,
                                progress=False)
                ends["picture"] += 1
            except BadInput as e:
                assert "\n" not in str(e) and len(str(e)) > 15
                ends["error"] += 1
            except BaseException as e:
                raise AssertionError(f"{k}: {bytes(raw[:3000])!r}") from e
    assert ends["error"] > 20, ends


@pytest.mark.parametrize("name, text", [
    ("metadata.jsonl", "\n".join(json.dumps(dict(file_name=f"{c}.png", text=f"a {c}")) for c in "abc")),
    ("metadata.csv", "file_name,text\na.png,an a\nb.png,\"a, b\"\nc.png,c\n")])
def test_metadata_changed_at_random_is_used_or_refused(tmp_path, name, text, capsys):
    for c in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{c}.png")
    rng, ends = np.random.default_rng(len(name)), {"used": 0, "refused": 0}
    words = [b"\x00", b"\xff", b'"', b",", b"\n", b"{", b"../", b"\\u0000", b"\\ud800", b"null", b"[" * 5000,
             b"9" * 5000, b"a" * 200_000]
    for k in range(100):
        raw = text.encode()
        for _ in range(rng.integers(1, 4)):
            at, cut = rng.integers(len(raw)), rng.integers(3)
            raw = raw[:at] + words[rng.integers(len(words))] + raw[at + cut:]
        (tmp_path / name).write_bytes(raw)
        with within_reason():
            try:
                data = ImageFolder(str(tmp_path), 8)
                assert len(data) == 3 and all(isinstance(data[i][1], str) for i in range(3))
                ends["used"] += 1
            except BadInput as e:
                assert name in str(e) and "\n" not in str(e)
                ends["refused"] += 1
            except BaseException as e:
                raise AssertionError(f"{k}: {raw[:3000]!r}") from e
    assert min(ends.values()) > 5, ends


# ---------------------------------------------------------------------------------------------------------------------
# How fast? `python test_all.py --bench [--compile]` prints tables, on the GPU if there is one. Nothing here is a test.

def seconds(*works, rounds=5):
    """Time works in turns, after a first turn to warm up -> for each, its seconds, turn by turn."""
    def once(work):
        start = time.perf_counter()
        work()
        torch.cuda.is_available() and torch.cuda.synchronize()
        return time.perf_counter() - start
    turns = [[once(work) for work in works] for _ in range(rounds + 1)]
    return list(zip(*turns[1:]))


def operations(work):
    """Floating-point operations in the matrix products and convolutions of work()."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def print_table(title, columns, rows):
    rows = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    print("\n" + title, *("  ".join(map(str.rjust, row, widths)) for row in rows), sep="\n", flush=True)


def beside_diffusers(config, side, batch, tokens, device, dtype, training):
    """One step of diffusers' U-Net and of ours, with the same weights -> a row of the table."""
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**config).to(device)
    ours = UNet.from_config(dict(theirs.config)).to(device, memory_format=torch.channels_last)
    ours.load_state_dict(theirs.state_dict())
    z, noise = (torch.randn(batch, 4, side, side, device=device) for _ in range(2))
    context, t = torch.randn(batch, tokens, theirs.config.cross_attention_dim, device=device), torch.full((batch,), 500,
                                                                                                          device=device)
    optimizers = {model: torch.optim.AdamW(model.parameters(), 1e-5) for model in (theirs, ours)} if training else {}
    if not training:
        theirs, ours = theirs.to(dtype), ours.to(dtype)

    def step(model):
        if not training:
            with torch.inference_mode():
                return model(z.to(dtype), t, context.to(dtype))
        with torch.autocast(z.device.type, dtype, enabled=dtype != torch.float32):
            output = model(z, t, context)
        torch.nn.functional.mse_loss((output if model is ours else output.sample).float(), noise).backward()
        optimizers[model].step()
        optimizers[model].zero_grad()
    if "--compile" in sys.argv:
        ours.compile(), theirs.compile()
    a, b = seconds(lambda: step(theirs), lambda: step(ours))
    ratios = [one / other for one, other in zip(a, b)]
    ratios = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    memory = f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f}" if z.is_cuda else "-"
    return ["training" if training else "sampling", config["block_out_channels"][0], f"{batch} x {side}x{side}",
            str(dtype)[6:],
            batch / statistics.median(a), batch / statistics.median(b), ratios, memory]


def bench():
    device, dtype = pick_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    n, dtypes = 8192 if device.type == "cuda" else 2048, list(dict.fromkeys([torch.float32, dtype]))
    print(f"{name}, torch {torch.__version__}, diffusers {diffusers.__version__}; medians of 5 turns")
    peaks, rows = {}, []
    for kind in dtypes:
        a, x, w = (torch.randn(shape, device=device).to(kind)
                   for shape in ((n, n), (8, 256, n // 32, n // 32), (256, 256, 3, 3)))
        x, w = (y.to(memory_format=torch.channels_last) for y in (x, w))
        works = [lambda: a @ a, lambda: torch.nn.functional.conv2d(x, w, padding=1)]
        rates = [operations(work) / min(times) for work, times in zip(works, seconds(*works))]
        peaks[kind] = max(rates)
        rows.append([str(kind)[6:], *(rate / 1e12 for rate in rates)])
    print_table("The machine's peak, in 10^12 operations a second", ["", "matrix product", "convolution"], rows)

    small = dict(block_out_channels=(64, 128, 256), cross_attention_dim=64, attention_head_dim=4, sample_size=16,
                 down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3)
    published = {k: v for k, v in UNET_15.items() if k[0] != "_"}
    rows = [beside_diffusers(small, 16, 64, 32, device, kind, training=True) for kind in dtypes]
    rows += [beside_diffusers(published, side, 2, 77, device, kind, training=False)
             for kind, side in [(torch.float32, 32), (dtype, 64)]]
    if device.type == "cuda":
        rows.append(beside_diffusers(published, 64, 8, 77, device, dtype, training=True))
    print_table("U-Net steps, samples a second",
                ["", "width", "latents", "dtype", "diffusers", "nanoSD", "times as fast", "GiB"], rows)

    tokenizer, clip = clip_encoder.build_clip("tiny", 128, [Landscapes().caption(i) for i in range(2000)])
    pipe = Pipeline(UNet(**UNET_SIZES["tiny"], cross_attention_dim=128, sample_size=16), VAE(**vae_sizes("tiny", 128)),
                    clip.text_encoder(0), tokenizer, NoiseSchedule())
    for part in sample.PARTS:
        getattr(pipe, part).to(device, dtype, memory_format=torch.channels_last).eval()
    rows = []
    for batch, size, steps in [(1, 128, 25), (4, 128, 25), (16, 128, 25), (4, 256, 25), (4, 512, 25),
                               (4, 128, 10), (4, 128, 50)]:
        def draw():
            return generate(pipe, "a landscape", num_images=batch, height=size, width=size, steps=steps, progress=False)
        [times] = seconds(draw, rounds=3)
        median = statistics.median(times)
        rows.append([batch, f"{size}x{size}", steps, median / batch, f"{operations(draw) / median / peaks[dtype]:.0%}"])
    print_table("Drawing, the default model", ["pictures", "size", "steps", "seconds a picture", "of the peak"], rows)

    rows = []
    for width in (32, 64, 128, 256):
        unet = UNet(**dict(UNET_SIZES["tiny"], block_out_channels=(width, 2 * width, 2 * width)),
                    cross_attention_dim=128, sample_size=16)
        unet.to(device, memory_format=torch.channels_last)
        z, context = torch.randn(32, 4, 16, 16, device=device), torch.randn(32, 32, 128, device=device)
        learner = ddpm.Learner(unet, lambda unet,
                               z: (unet(z, torch.zeros(32, device=device), context).square().mean(), {}), dtype)

        def learn():
            learner.gradient([(z,)])
            learner.step(1e-4)
        [times] = seconds(learn)
        size, median = sum(p.numel() for p in unet.parameters()) / 1e6, statistics.median(times)
        rows.append([f"{width}, {2 * width}, {2 * width}", size, median, 32 / median,
                     f"{operations(learn) / median / peaks[dtype]:.0%}"])
    print_table("Training, 32 latents of 16x16 a step",
                ["channels", "10^6 parameters", "seconds a step", "samples a second", "of the peak"], rows)


if __name__ == "__main__":
    sys.exit(bench() if "--bench" in sys.argv else pytest.main([__file__, "-q", *sys.argv[1:]]))
