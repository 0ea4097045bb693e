"""TinyFusion: a diffusion transformer learns which of its layers it can do without.  One file, top to bottom.

The problem.  A diffusion transformer draws an image by running its L residual blocks one after another, hundreds of
times. With half the blocks it runs up to twice as fast. But which half? DiT-XL, of 28 blocks, has about 40 million
choices, and the obvious test, "drop what hurts least now", picks badly: the model is fine-tuned after pruning, so what
counts is how well a choice *recovers*, and the loss right after pruning says little about that (Table 3 of the paper).

The method.  Phi are the model's weights; E_x is the mean over images x, and times and noise. Search for the mask m
together with a change dPhi of the weights, a stand-in for the fine-tuning to come that all masks share:

        min over m and dPhi of   E_x [ loss(x; Phi + dPhi, m) ]       m in {0,1}^L, with the wanted number of ones

    pre-trained teacher            learning (Chapters 3, 4)                pruned               student
    L blocks                       groups of M, keep N                     L/2 blocks           recovered
    +---+---+---+---+---+---+      +---+---+ +---+---+ +---+---+
    | 0 | 1 | 2 | 3 | 4 | 5 |      | .9  .1| | .2  .8| | .6  .4|           +---+---+---+        +---+---+---+
    +---+---+---+---+---+---+  ->  +---+---+ +---+---+ +---+---+     ->    | 0 | 3 | 4 |   ->   | 0'| 3'| 4'|
      |                            draw a mask, drop blocks, take the      +---+---+---+        +---+---+---+
      |                            loss; its gradient moves the odds       original                  ^
      |                            and a LoRA update of the weights        weights                   |
      +----------------------- masked knowledge distillation (Chapter 5) ----------------------------+

 1. Each group of M blocks has a categorical distribution over its (M choose N) ways to keep N ("N:M"). Draws are made
    differentiable by the straight-through Gumbel-Softmax, so a plain optimiser learns the odds.
 2. While the odds are learned, a small low-rank update of the weights (LoRA), shared by all masks, trains along. So a
    mask is judged as if fine-tuning had already begun.
 3. The likeliest mask is applied to the *original* weights. The LoRA update, made to judge masks, is thrown away.
 4. The shallow student recovers by imitating the teacher's output and its hidden states, outliers left out.

How to run (the rest: README).
    python tinyfusion.py                      the whole story on toy digits, a few minutes on a laptop, into runs/toy
    python tinyfusion.py --help               every flag

Letters in the shape comments: B examples, T tokens, D width of a token, L blocks, K groups of blocks, N of M blocks
kept in a group; C channels of an image or latent, H, W its height and width, P side of a patch. A latent is a small
image of codes, which an autoencoder makes of a large one (Chapter 7).

    Part I, the method              Part II, the program                    Appendices, one idea more each
     1 The model: DiT                6 The training loop                     A Any other model
     2 Diffusion                     7 Data                                  B Without groups
     3 The layer sampler             8 Measuring                             C SiT
     4 Recoverability: LoRA          9 Checkpoints and pictures              D MAR
     5 Recovery: masked KD          10 Rules and stages
                                    11 The command line
The method is in Chapters 3 to 5; 1 and 2 are what it works on. Part II feeds it and judges it. Nobody has to read the
appendices: the program runs without them. Source: Fang, Li, Ma, Wang, "TinyFusion: Diffusion Transformers Learned
Shallow", arXiv:2412.01199. Written from the paper. MIT licence.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps


# Chapter 1. The model: DiT                                                                      (Part I, the method)
#
# A diffusion transformer (Peebles & Xie, arXiv:2212.09748) cuts the noisy image into patches, makes each one a token,
# and sends the tokens through L residual blocks of one shape. The timestep and the class enter every block as shifts,
# scales and gates ("adaLN-Zero"). Every block maps (B, T, D) to (B, T, D) and adds to its input. That is why one can
# be dropped without touching the others. Names and initialisation are the official code's, so its checkpoints load.
# ---------------------------------------------------------------------------------------------------------------------

def modulate(x, shift, scale):
    """x * (1 + scale) + shift, for x (B, T, D), with shift and scale (B, D) the same for every token."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    """Timesteps (B,) to vectors (B, D): cosines and sines of 128 frequencies, from 1 to about 1/10,000, then an MLP."""

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        frequencies = torch.exp(-math.log(10000) / 128 * torch.arange(128, dtype=torch.float32, device=t.device))
        angles = t[:, None].float() * frequencies                            # (B, 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)               # (B, 256), in float32
        return self.mlp(waves.to(self.mlp[0].bias.dtype))                    # (B, D)


class LabelEmbedder(nn.Module):
    """Class labels (B,) to vectors (B, D). In training a label becomes the null label, `num_classes`, "no class", with
    probability `dropout_prob`, since guidance needs predictions without a class. If that is 0, it has no vector."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def token_drop(self, labels):
        """Labels (B,) with a random share of them replaced by the null label."""
        dropped = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
        return torch.where(dropped, self.num_classes, labels)

    def null_labels(self, labels):
        """One null label per label, (B,)."""
        if self.dropout_prob == 0:
            raise ValueError("class_dropout_prob is 0: the model has no null label, so only guidance 1 is possible")
        return torch.full_like(labels, self.num_classes)

    def forward(self, labels):
        if self.training and self.dropout_prob > 0:
            labels = self.token_drop(labels)
        return self.embedding_table(labels)                                  # (B, D)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, T, D), with dropout of weights and outputs in training (not in DiT)."""

    def __init__(self, dim, num_heads, dropout=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)   # (B, heads, T, D / heads)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop.p if self.training else 0.0)
        return self.drop(self.proj(x.transpose(1, 2).flatten(2)))


class Mlp(nn.Sequential):
    """The two-layer perceptron of a block, on every token of (B, T, D); its modules run in the order of __init__."""

    def __init__(self, dim, hidden_dim, approximate="tanh", dropout=0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU(approximate)
        self.drop1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop2 = nn.Dropout(dropout)


class DiTBlock(nn.Module):
    """A residual block: x (B, T, D), and c (B, D), the timestep's vector plus the class's, to (B, T, D)."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Tokens (B, T, D) to the pixels of their patches (B, T, P * P * out_channels)."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def sincos_pos_embed(dim, grid_size):
    """Fixed 2-D position table (grid_size ** 2, dim), tokens row by row: the first half encodes the column, the second
    the row, each as sines then cosines of dim / 4 frequencies (the layout of MAE and DiT)."""
    frequencies = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies            # (grid, dim / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)                                   # (grid, dim / 2)
    return torch.cat([line.repeat(grid_size, 1), line.repeat_interleave(grid_size, dim=0)], dim=1).float()


def initialize(model, normal):
    """The official start: linear layers Xavier-uniform, those in `normal` with std 0.02, modulation and output at zero.
    So the gates are zero, every block of a DiT starts as the identity, and the model as the zero function."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in normal:
        nn.init.normal_(module.weight, std=0.02)
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or "final_layer.linear" in name:
            nn.init.zeros_(parameter)


class DiT(nn.Module):
    """Diffusion transformer. The defaults are DiT-XL/2 (patches of side 2) on 32x32 latents of 256x256 images:
    675,129,632 parameters. learn_sigma: the output has a second half of channels, for the variance of a step (Chapter
    2). Source: facebookresearch/DiT, models.py (names, initialisation and numerics; the text is ours)."""

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True):
        given = locals()
        super().__init__()
        self.sizes = {name: given[name] for name in inspect.signature(DiT).parameters}       # the arguments
        vars(self).update(self.sizes)            # also attributes, such as input_size (`prune` leaves depth as it was)
        if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"input_size must be a multiple of patch_size, hidden_size of num_heads, 4: {self.sizes}")
        # A linear layer on every patch.
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)})
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(sincos_pos_embed(hidden_size, input_size // patch_size)[None], False)  # (1, T, D)
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels * 2 if learn_sigma else in_channels)
        initialize(self, [self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]])
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)

    def config(self):
        """The constructor's arguments as they are now, after pruning: DiT(**model.config()) has the same shape."""
        return {**self.sizes, "depth": len(self.blocks)}

    def forward(self, x, t, y, mask=None, hidden=None):
        """Predict the noise in x (B, C, H, W), and a step's variance: (B, 2C, H, W), noise first (C without variance).
        t (B,) timesteps, or (1,) where all share one; y (B,) labels, `num_classes` for no class; mask (B, L), 1 for a
        block that is used and 0 for one that is skipped, or None for all (Chapter 3). If `hidden`, a collection of
        block numbers, is not None, returns also a list of those blocks' outputs (B, T, D), in depth order."""
        # (B, T, D), row by row; contiguous now, or every LayerNorm below would copy it.
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2).contiguous() + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)                          # (B, D)
        x, features = masked_forward(self.blocks, x, c, mask=mask, hidden=hidden or ())
        x = self.final_layer(x, c).unflatten(2, (self.patch_size ** 2, -1))  # (B, T, P * P, 2C)
        # Patches to images (B, 2C, H, W).
        x = F.fold(x.permute(0, 3, 2, 1).flatten(1, 2), self.input_size, self.patch_size, stride=self.patch_size)
        return x if hidden is None else (x, features)

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_channels=3):
        """`forward` with classifier-free guidance (arXiv:2207.12598): what the class changes is multiplied by cfg_scale
        in the first `cfg_channels` channels: 3 in the official code, with which DiT's published numbers were made; None
        for all of the noise. It never reaches the variance."""
        times = t if len(t) == 1 else torch.cat([t, t])
        labels = torch.cat([y, self.y_embedder.null_labels(y)])
        cond, uncond = self(torch.cat([x, x]), times, labels).chunk(2)       # two of (B, 2C, H, W)
        g = min(cfg_channels or self.in_channels, self.in_channels)
        guided = uncond[:, :g] + cfg_scale * (cond[:, :g] - uncond[:, :g])
        return torch.cat([guided, cond[:, g:]], dim=1)


def _dit(depth, hidden_size, num_heads, patch_size=2):
    return functools.partial(DiT, depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=patch_size)


DiT_models = {                                   # DiT_models["DiT-XL/2"](input_size=32, num_classes=1000)
    "DiT-XL/2": _dit(28, 1152, 16), "DiT-L/2": _dit(24, 1024, 16), "DiT-B/2": _dit(12, 768, 12),
    "DiT-S/2": _dit(12, 384, 6), "DiT-D19/2": _dit(19, 1152, 16), "DiT-D14/2": _dit(14, 1152, 16),
    "DiT-D7/2": _dit(7, 1152, 16), "toy": _dit(12, 64, 4, patch_size=4), "toy-28": _dit(28, 64, 4, patch_size=4)}


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 2. Diffusion
#
# Step t of 1000 replaces a share beta_t of the variance by noise. The product of 1 - beta up to t, abar_t ("alpha
# bar"), is the share of the image's variance that is left. Training: mix an image x0 with noise, x_t = sqrt(abar_t) x0
# + sqrt(1 - abar_t) noise, and have the model predict the noise. (t counts from 0, as in the code: already x_t of t = 0
# is noisy; the clean image is x0.) Sampling: start from noise and walk t down; each step removes a little of the
# predicted noise and adds a little fresh noise (DDPM, arXiv:2006.11239; DDIM, arXiv:2010.02502, adds none and needs
# fewer steps). The variance of a step is learned too: v, the second half of the model's output channels, interpolates
# in log space between the smallest and the largest sensible value (arXiv:2102.09672). Values are the official code's.

def autocast(device, dtype=None):
    """A context for matrix products in `dtype`, by default bfloat16 on a GPU that has it, float32 elsewhere."""
    bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = dtype or (torch.bfloat16 if bfloat16 else torch.float32)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def mean_flat(x):
    """Mean over all but the first dimension: (B, ...) to (B,)."""
    return x.flatten(1).mean(1)


def normal_kl(mean1, logvar1, mean2, logvar2):
    """KL(N(mean1, var1) || N(mean2, var2)) in nats, elementwise; logvar is the logarithm of var."""
    return 0.5 * (logvar2 - logvar1 - 1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def discretized_gaussian_log_likelihood(x, mean, log_variance):
    """log P(x), elementwise, of pixels in [-1, 1] in steps of 2/255: the Gaussian's mass in the pixel's bin, open at
    the two ends. The official code uses it for latents too, and this tanh form of the normal CDF."""
    def cdf(z):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))
    inv_std = torch.exp(-0.5 * log_variance)
    upper = torch.where(x > 0.999, 1.0, cdf((x - mean + 1 / 255) * inv_std))
    lower = torch.where(x < -0.999, 0.0, cdf((x - mean - 1 / 255) * inv_std))
    return torch.log((upper - lower).clamp(min=1e-12))


class Objective:
    """What a model is trained to predict, and how images are drawn with it. DiT's is GaussianDiffusion, below. Every
    objective has a `name`, which checkpoints carry, and these methods:

        sample_t(batch_size, device)                              random training times t (B,)
        q_sample(x0, t, noise)                                    the noisy input x_t of images x0 (B, C, H, W)
        losses(model_output, x0, x_t, t, noise)                   a dict of losses, each (B,); "loss" is what is trained
        distillation_losses(student_output, teacher_output, x_t, t)    how far apart two models are, (B,)
        sample(model, y, draw, steps, guidance, ...)              images (B, C, H, W) of the classes y (B,)
        check_steps(steps)                                        raises ValueError for steps that `sample` cannot take

    Losses are float32 whatever the output is. draw() returns fresh standard normal noise (B, C, H, W) at every call."""

    def noise(self, x0, t):
        """Standard normal noise for images x0 (B, C, H, W) at times t (B,)."""
        return torch.randn(x0.shape, device=x0.device)

    def training_losses(self, model, x0, t, y, noise=None):
        """The `losses` of `model(x_t, t, y)`, which is called here. x0 (B, C, H, W), t and y (B,)."""
        noise = self.noise(x0, t) if noise is None else noise
        x_t = self.q_sample(x0, t, noise)
        return self.losses(model(x_t, t, y), x0, x_t, t, noise)


class GaussianDiffusion(Objective):
    """DDPM with a learned variance. betas (steps,), by default 1000, linear from 1e-4 to 2e-2. `timestep_map[i]` is the
    timestep that the model is given at step i: i or, after `respaced`, the step that it stands for.
    Source: openai/improved-diffusion and facebookresearch/DiT, diffusion/."""
    name = "ddpm"

    def __init__(self, betas=None, timestep_map=None):
        betas = np.linspace(1e-4, 2e-2, 1000) if betas is None else np.asarray(betas, dtype=np.float64)
        self.timestep_map = np.arange(len(betas)) if timestep_map is None else np.asarray(timestep_map)
        self.abar = np.cumprod(1 - betas)                                    # alpha-bar_t, float64
        self.abar_prev = np.append(1.0, self.abar[:-1])
        self.posterior_variance = betas * (1 - self.abar_prev) / (1 - self.abar)
        # The posterior variance at t = 0 is 0; its logarithm borrows the value of t = 1.
        log_small = np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))
        self._table = {
            "sqrt_abar": np.sqrt(self.abar), "sqrt_one_minus_abar": np.sqrt(1 - self.abar),
            "sqrt_recip_abar": np.sqrt(1 / self.abar), "sqrt_recip_abar_minus_1": np.sqrt(1 / self.abar - 1),
            "posterior_x0": betas * np.sqrt(self.abar_prev) / (1 - self.abar),
            "posterior_xt": (1 - self.abar_prev) * np.sqrt(1 - betas) / (1 - self.abar),
            "log_small": log_small, "log_large": np.log(betas)}              # the ends of a learned variance

    def _at(self, name, t, x):
        """Schedule values at timesteps t (B,) or (1,), float32, shaped to multiply x (B, ...); kept on t's device."""
        self._table[name] = torch.as_tensor(self._table[name], dtype=torch.float32, device=t.device)
        return self._table[name][t].view(-1, *[1] * (x.dim() - 1))

    def sample_t(self, batch_size, device=None):
        """Training timesteps (B,), uniform."""
        return torch.randint(len(self.abar), (batch_size,), device=device)

    def q_sample(self, x0, t, noise):
        """The noisy image x_t (B, C, H, W) = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise."""
        return self._at("sqrt_abar", t, x0) * x0 + self._at("sqrt_one_minus_abar", t, x0) * noise

    def _posterior_mean(self, x0, x_t, t):
        """Mean of q(x_{t-1} | x_t, x0), the distribution of x_{t-1} given x_t and x0."""
        return self._at("posterior_x0", t, x0) * x0 + self._at("posterior_xt", t, x0) * x_t

    def p_mean_variance(self, model_output, x_t, t, clip_denoised=False):
        """The step to x_{t-1} that the model's output (B, C or 2C, H, W) at x_t (B, C, H, W) implies: a dict of `mean`,
        `log_variance` and `pred_xstart`, the predicted x0, each (B, C, H, W). The predicted noise is detached, so a
        loss on these trains the variance alone. clip_denoised, for pixels only, keeps x0 in [-1, 1]."""
        C = x_t.shape[1]
        eps, v = model_output[:, :C].detach().float(), model_output[:, C:].float()
        # v = -1 is the posterior variance, v = 1 is beta; a model without v gets beta (as officially).
        share = (v + 1) / 2 if v.shape[1] == C else torch.ones_like(x_t)
        log_variance = share * self._at("log_large", t, x_t) + (1 - share) * self._at("log_small", t, x_t)
        x0 = self._at("sqrt_recip_abar", t, x_t) * x_t - self._at("sqrt_recip_abar_minus_1", t, x_t) * eps
        x0 = x0.clamp(-1, 1) if clip_denoised else x0
        return {"mean": self._posterior_mean(x0, x_t, t), "log_variance": log_variance, "pred_xstart": x0}

    def losses(self, model_output, x0, x_t, t, noise):
        """A dict of `mse`, the error of the noise, `vb`, the variational bound's term for step t in bits per dimension,
        which trains the variance alone, and `loss` = mse + vb, each (B,)."""
        C = x0.shape[1]
        mse = mean_flat((noise - model_output[:, :C].float()) ** 2)
        if model_output.shape[1] == C:
            return {"mse": mse, "vb": torch.zeros_like(mse), "loss": mse}
        p = self.p_mean_variance(model_output, x_t, t)
        # From the model's step to the true one; at t = 0 the likelihood of the image instead.
        kl = normal_kl(self._posterior_mean(x0, x_t, t), self._at("log_small", t, x0), p["mean"], p["log_variance"])
        nll = -discretized_gaussian_log_likelihood(x0, p["mean"], p["log_variance"])
        vb = torch.where(t == 0, mean_flat(nll), mean_flat(kl)) / math.log(2)
        return {"mse": mse, "vb": vb, "loss": mse + vb}

    def distillation_losses(self, student_output, teacher_output, x_t, t):
        """Mean squared error (B,) of two noise predictions at the same x_t and t, plus KL(teacher's step || student's)
        in bits per dimension, which again trains the variance alone."""
        C = x_t.shape[1]
        mse = mean_flat((student_output[:, :C].float() - teacher_output[:, :C].float()) ** 2)
        if student_output.shape[1] == C:
            return mse
        # The KL at every t. (The public TinyFusion code has the likelihood of the data in its place at t = 0.)
        student = self.p_mean_variance(student_output, x_t, t)
        teacher = self.p_mean_variance(teacher_output, x_t, t)
        kl = normal_kl(teacher["mean"], teacher["log_variance"], student["mean"], student["log_variance"])
        return mse + mean_flat(kl) / math.log(2)

    @functools.cache                             # so its table is made, and moved to a GPU, once
    def respaced(self, steps):
        """The same process in `steps` evenly spaced timesteps, first and last included."""
        if not 2 <= steps <= len(self.abar):
            raise ValueError(f"{steps} sampling steps: expected 2 to {len(self.abar)}")
        stride = (len(self.abar) - 1) / (steps - 1)
        # Sums, not multiples, of the stride, so that ties round as they do in the official code.
        chosen = np.rint(np.cumsum(np.append(0.0, np.full(steps - 1, stride)))).astype(int)
        abar = self.abar[chosen]
        return GaussianDiffusion(1 - abar / np.append(1.0, abar[:-1]), self.timestep_map[chosen])

    check_steps = respaced                       # it raises ValueError

    @torch.inference_mode()
    def sample(self, model, y, draw, steps=250, guidance=1.0, eta=1.0, clip_denoised=False, cfg_channels=3, dtype=None):
        """Images (B, C, H, W) of the classes y (B,), drawn by `model` (in eval mode). eta 1 is DDPM with the model's
        variance; 0 is DDIM, deterministic after the first draw; between them is DDIM's sigma (arXiv:2010.02502,
        equation 16). Guidance 1 runs the model on the batch, any other on 2 B inputs. dtype as in `autocast`."""
        if not 0 <= eta <= 1:
            raise ValueError(f"eta {eta}: expected 0 (DDIM) to 1 (DDPM)")

        def predict(x, t):
            return model(x, t, y) if guidance == 1 else model.forward_with_cfg(x, t, y, guidance, cfg_channels)
        return self.denoise(predict, draw, steps, eta, clip_denoised, dtype=dtype)

    def denoise(self, predict, draw, steps, eta=1.0, clip_denoised=False, temperature=1.0, dtype=None):
        """The sampling loop behind `sample`, for any function predict(x, t), which gives the noise (and variance) in x
        (B, C, ...) at the timestep t (1,). temperature: a factor of the noise that the steps add."""
        process = self.respaced(steps)
        x = draw()
        for i in reversed(range(steps)):
            index = torch.full((1,), i, device=x.device)     # the step in the tables of `process`
            t = torch.full((1,), int(process.timestep_map[i]), device=x.device)      # the model's; one t, embedded once
            with autocast(x.device, dtype):
                out = predict(x, t)
            p = process.p_mean_variance(out, x, index, clip_denoised)
            # One step for DDPM and DDIM, with fresh noise z and sigma = eta * the posterior's standard deviation:
            # x_{t-1} = sqrt(abar_prev) x0 + sqrt(1 - abar_prev - sigma^2) eps + sigma z. At eta = 1 the first two terms
            # are the posterior mean, and z gets the learned variance.
            abar, abar_prev = process.abar[i], process.abar_prev[i]
            sigma = eta * math.sqrt(process.posterior_variance[i])
            eps = (x - math.sqrt(abar) * p["pred_xstart"]) / math.sqrt(1 - abar)    # as x0 implies it, after clipping
            x = math.sqrt(abar_prev) * p["pred_xstart"] + math.sqrt(max(1 - abar_prev - sigma ** 2, 0)) * eps
            if eta > 0 and i > 0:
                scale = torch.exp(0.5 * p["log_variance"]) if eta == 1 else sigma
                x = x + scale * temperature * draw()
        return x


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 3. The layer sampler
#
# A mask m decides for every block whether it is used. Written as a blend, x <- m * block(x) + (1 - m) * x, the loss
# has a gradient for m, dloss/dm, though m is only ever 0 or 1. To learn a probability for each of DiT-XL's 40 million
# masks is hopeless. So the blocks are cut into K local groups of M consecutive ones, and each group keeps N of its
# own. With m_k for the mask of group k, p(m) = p(m_1) ... p(m_K), each a categorical distribution over the (M choose
# N) candidates of its group, with one learned logit (a probability's logarithm, up to a constant) per candidate. A
# draw is discrete and has no gradient. The straight-through Gumbel-Softmax (arXiv:1611.01144) draws it as the arg max
# of logits + Gumbel noise, random numbers by which each candidate wins with exactly its softmax probability, and it
# lets the gradient pass as if the arg max had been a softmax of temperature tau. So one backward pass estimates for
# every candidate, drawn or not, whether the loss would rather have it more often. For that it needs dloss/dm of
# dropped blocks too, which is why they are run at all while a mask is learned.

def masked_forward(blocks, x, *args, mask=None, hidden=(), skip=None):
    """Run residual blocks one after another, each example through the blocks that its mask keeps:

        x <- m * block(x) + (1 - m) * x            so that dloss/dm = sum of dloss/dx_out * (block(x) - x)

    blocks: any sequence of modules that map (B, ...) to (B, ...), each example by itself; args: further arguments of
    every block; mask (B, L) of zeros and ones (more than 0.5 counts as 1), or None to run all. Returns x and the list
    of outputs of the blocks whose numbers are in `hidden`, in depth order.
    skip: whether to use the exact shortcut `skip_dropped`; None to choose: yes, except on a GPU that learns a mask from
    fewer than 64 examples (DiT-XL/2 on one H100: 1.2 times as fast as the formula with 128 images, 0.7 times with 32,
    in two thirds of the memory or less). With it, the weights of a block that nobody keeps have no gradient (None), by
    the formula zeros. Source: the paper's layer sampling; the shortcut is ours. Raises ValueError for a wrong shape."""
    if mask is not None:
        if mask.shape != (len(x), len(blocks)):
            raise ValueError(f"mask is {tuple(mask.shape)}, expected (examples, blocks) = {(len(x), len(blocks))}")
        mask = exact_mask(mask, x.dtype)
        if skip is None:
            skip = len(x) >= 64 or not (x.is_cuda and mask.requires_grad and torch.is_grad_enabled())
        rows = kept_and_dropped(mask) if skip else None
    features = []
    for i, block in enumerate(blocks):
        if mask is None:
            x = block(x, *args)
        elif skip:
            x = skip_dropped(block, x, args, mask[:, i], *rows[i])
        else:                                    # the definition
            m = mask[:, i].view(-1, *[1] * (x.dim() - 1))                    # (B, 1, 1) for tokens (B, T, D)
            x = m * block(x, *args) + (1 - m) * x
        if i in hidden:
            features.append(x)
    return x, features


def exact_mask(mask, dtype):
    """A mask, bool or off by a rounding, with values of exactly 0 and 1 and the gradient of `mask`."""
    mask = mask.to(dtype)
    return (mask > 0.5).to(dtype) + (mask - mask.detach())


def nm_masks(n, m):
    """All ways to keep n of m blocks, the paper's candidate masks: a 0/1 matrix (candidates, m)."""
    if not 1 <= n <= m <= 1000 or math.comb(m, n) > 100_000:
        raise ValueError(f"group {n}:{m}: expected N:M with 1 <= N <= M and not too many candidates, as in 1:2 or 2:4")
    kept = torch.tensor(list(itertools.combinations(range(m), n)))           # (candidates, n)
    return torch.zeros(len(kept), m).scatter_(1, kept, 1.0)


class LayerSampler(nn.Module):
    """A learnable distribution over layer masks, one categorical distribution per N:M group. groups: [(N, M), ...] from
    the first block to the last, e.g. [(1, 2)] * 14. All candidates start equally likely. A candidate's logit is
    scale * self.logits, with one scale in all calls: so a step of AdamW, of the size of the learning rate, 1e-3, moves
    it by 0.1. Source: the paper's differentiable layer sampling. Raises ValueError for an impossible N:M."""

    def __init__(self, groups):
        super().__init__()
        for k, (n, m) in enumerate(groups):      # buffers go to a GPU along; float64, which autocast never rounds
            self.register_buffer(f"candidates{k}", nm_masks(n, m).double(), persistent=False)    # (candidates, M)
        self.logits = nn.ParameterList([nn.Parameter(torch.zeros(len(c))) for c in self.buffers()])

    def forward(self, batch_size, tau=1.0, scale=100.0):
        """One independent mask per example: (B, L), exactly 0 or 1, exactly N ones per group, with the gradient of the
        softmax at temperature `tau`. tau changes only the gradient: a high one is biased but quiet, a low one noisy."""
        parts = []
        for logits, candidates in zip(self.logits, self.buffers()):
            relaxed = F.gumbel_softmax((logits * scale).expand(batch_size, -1), tau=tau)    # (B, candidates), random
            hard = candidates[relaxed.argmax(1)]                                            # (B, M), the mask drawn
            soft = relaxed.double() @ candidates                                            # (B, M), its relaxation
            # Straight through: the value of `hard`, the gradient of `soft`. The brackets matter: soft - soft is exactly
            # 0, while (hard - soft) + soft, the order of F.gumbel_softmax(hard=True), can miss 0 and 1 by a rounding.
            parts.append((hard + (soft - soft.detach())).to(relaxed.dtype))
        return torch.cat(parts, dim=1)

    def _probabilities(self, scale):
        return [torch.softmax(logits.detach() * scale, dim=0) for logits in self.logits]    # K of (candidates,)

    def keep_probability(self, scale=100.0):
        """The probability (L,) of every block to be kept."""
        return torch.cat([p.double() @ c for p, c in zip(self._probabilities(scale), self.buffers())]).float()

    def confidence(self, scale=100.0):
        """The probability (K,) of each group's likeliest candidate: near 1 when the decision is made."""
        return torch.stack([p.max() for p in self._probabilities(scale)])

    def kept(self):
        """The blocks to keep, ascending: those of each group's likeliest candidate, by the logits as they are now. (The
        public code decides by an average of the logits over steps, of decay 0.999.)"""
        mask = torch.cat([c[logits.argmax().item()] for logits, c in zip(self.logits, self.buffers())])     # (L,)
        return mask.nonzero().flatten().tolist()


SAMPLERS = {list: LayerSampler}                  # by the form of the groups


def make_sampler(groups):
    """The sampler of masks for groups: a list [(N, M), ...], or a bare (N, L), N of all L blocks (Appendix B)."""
    if type(groups) not in SAMPLERS:
        raise ValueError(f"groups {groups}: expected a list of (N, M)")
    return SAMPLERS[type(groups)](groups)


def skip_dropped(block, x, args, m, kept, dropped):
    """One step of `masked_forward`, with the formula's values and gradients but without its useless work. Where m = 0,
    nothing flows back through the block, and its output is needed only as a number, for dloss/dm. So a dropped block
    runs forward without a graph, and not at all backward. Where m needs no gradient, it does not run at all. The price:
    a block is called twice, for the kept and for the dropped examples. x (B, ...); m (B,), the block's column of the
    mask; kept, dropped: the examples with m = 1 and with m = 0. Of args, a tensor whose first dimension is B has a row
    per example; everything else is shared and stays whole (tensors inside lists or dicts are not looked for)."""
    def with_outputs(values, rows):              # `values`, with the block's outputs in these rows
        given = [a.index_select(0, rows) if torch.is_tensor(a) and a.shape[:1] == x.shape[:1] else a
                 for a in (x, *args)]            # and back to the type of x, which autocast may have changed:
        return values.index_copy(0, rows, block(*given).to(x.dtype)) if len(rows) else values
    out = with_outputs(x, kept)
    if not (m.requires_grad and torch.is_grad_enabled()):
        return out
    with torch.no_grad():                        # the dropped rows need no graph
        change = with_outputs(out, dropped) - x  # block(x) - x in all rows; `out` has those of the kept ones
    # Adding 0 * change leaves the values alone and gives m its gradient. (An inf or NaN in `change` would spoil it.)
    return out + (m - m.detach()).view(-1, *[1] * (x.dim() - 1)) * change


def kept_and_dropped(mask):
    """For each block of mask (B, L) the indices of the examples that keep it, and of those that drop it: L pairs."""
    keep = mask.detach() > 0.5
    rows = keep.byte().argsort(dim=0, descending=True, stable=True)          # (B, L): a block's kept examples first
    counts = keep.sum(0).tolist()                # one wait for a GPU; nonzero() would take one per block
    return [rows[:, i].split([count, len(mask) - count]) for i, count in enumerate(counts)]


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 4. Recoverability: learning the mask as if fine-tuning had begun
#
# The training loss of a masked, untouched model says how much dropping those blocks hurts now. We want the loss after
# the fine-tuning to come. We cannot have it, so we approximate it. Gradient steps on
#
#        E_x E_{m ~ p} [ loss(x; Phi + dPhi, m) ]
#
# train the logits of the distribution p and, along with them, a weight update dPhi. All masks share it, so it is a
# rough and cheap stand-in for each one's own fine-tuning. It is low-rank (LoRA, arXiv:2106.09685), about 0.9 % of
# DiT-XL's parameters. After learning it is thrown away, and `prune` applies the likeliest mask to the original weights.

class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update: y = W x + b + (alpha / rank) lora_B lora_A x, for x (...,
    in), y (..., out), lora_A (rank, in), lora_B (out, rank). lora_B and the update start at 0. (arXiv:2106.09685)"""

    def __init__(self, base, rank=8, alpha=16.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.bias = base.bias                    # nn.MultiheadAttention reads its out_proj's bias and weight
        self.scaling = alpha / rank
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.lora_A) * self.scaling, self.lora_B)

    @property
    def weight(self):
        return self.base.weight + self.scaling * self.lora_B @ self.lora_A


def add_lora(model, rank=8, alpha=16.0):
    """Freeze `model`, wrap every nn.Linear inside it with a LoRALinear, in place, and return the new parameters, now
    the only trainable ones. What is not an nn.Linear stays as it is: q, k and v of nn.MultiheadAttention, and the
    Conv1D layers of transformers' GPT-2 (for these, `learn_layers` with update="full").
    Source: arXiv:2106.09685, on every linear layer as in the TinyFusion paper."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and not isinstance(module, LoRALinear):
                setattr(module, name, LoRALinear(child, rank, alpha))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def draw_mask(sampler, batch_size, tau, scale):
    """A mask (B, L) from a sampler, cut off from it as a leaf; a hook passes every gradient that reaches it on to the
    logits. (With activation checkpoints of use_reentrant=True several come, as each block has a backward pass.)"""
    with torch.inference_mode(False):            # with a graph, also where loss_fn calls it under no_grad
        mask = sampler(batch_size, tau, scale)
        leaf = mask.detach().requires_grad_()

    def pass_on(leaf):
        mask.backward(leaf.grad, retain_graph=True)
        leaf.grad = None
        sampler.reached = True                   # learn_layers looks at it
    leaf.register_post_accumulate_grad_hook(pass_on)
    return leaf


def learn_layers(model, loss_fn, groups, steps, *, update="lora", rank=8, alpha=16.0, lr=1e-4, logits_lr=1e-3,
                 tau=(4.0, 0.1), scale=100.0, prepare=lambda model: None, on_step=lambda step, metrics: None, **loop):
    """Learn which blocks to keep: optimise the logits of `make_sampler(groups)` together with a weight update.
    loss_fn(model, sample_mask) draws a batch, calls `mask = sample_mask(batch_size)` for its masks (B, L), and returns
    the masked model's loss, a scalar. `set_mask` (Appendix A) masks a model whose forward pass takes none. `update` is
    "lora", "full" (all weights train) or "frozen" (none do): the rows of the paper's Table 4. rank and alpha are those
    of `LoRALinear`, lr is the update's rate, scale that of `LayerSampler`; tau falls linearly from tau[0] to tau[1]:
    from a quiet gradient to a truer one. Works on a copy; prepare(copy) is called first, for example to move it to a
    GPU. on_step and loop, more arguments, are those of `train` (Chapter 6). The defaults are the paper's for DiT-XL,
    but without an average of the weights. Returns the sampler and its history, a list of (step, keep_probability)."""
    model = copy.deepcopy(model).train()
    if update == "lora":
        add_lora(model, rank, alpha)
    elif update == "frozen":
        model.requires_grad_(False)
    elif update != "full":
        raise ValueError(f"update {update!r}: expected lora, full or frozen")
    prepare(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights and update != "frozen":
        raise ValueError("no weight of the model requires a gradient, or it has no linear layer: nothing to update")
    sampler = make_sampler(groups).to(next(model.parameters()).device)
    sampler.reached = False                      # True once a backward pass has reached a mask
    history = [(0, sampler.keep_probability(scale).tolist())]
    no_mask = "the loss does not depend on the mask: use sample_mask (with frozen weights, use_reentrant=False)"

    # What `train` calls in each step: its loss_fn takes the step and returns (loss, metrics).
    def loss(step):
        tau_now = tau[0] + (tau[1] - tau[0]) * step / max(1, steps - 1)
        value = loss_fn(model, functools.partial(draw_mask, sampler, tau=tau_now, scale=scale))
        if not value.requires_grad:
            raise ValueError(no_mask)
        return value, {"tau": tau_now}

    def after(step, metrics):
        if not sampler.reached:
            raise ValueError(no_mask)
        if (step + 1) % max(1, steps // 200) == 0 or step + 1 == steps:      # about 200 columns of the picture
            history.append((step + 1, sampler.keep_probability(scale).tolist()))
        on_step(step, metrics | {"confidence": sampler.confidence(scale).min()})
    both = [{"params": list(sampler.parameters()), "lr": logits_lr}, {"params": weights, "lr": lr}]
    train(model, loss, steps, params=both, on_step=after, record=history, **loop)
    return sampler, history                      # the copy and its update are not needed any more


def masked_denoising(diffusion, batches):
    """The loss_fn of `learn_layers` for a diffusion model: the training loss, by `diffusion`, an Objective, of the next
    of `batches`, x0 (B, C, H, W) and y (B,), with a mask of its own for every example."""
    def loss_fn(model, sample_mask):
        x0, y = next(batches)
        t = diffusion.sample_t(len(x0), x0.device)
        masked = functools.partial(model, mask=sample_mask(len(x0)))
        return diffusion.training_losses(masked, x0, t, y)["loss"].mean()
    return loss_fn


def blocks_of(model, lists=None):
    """The block lists of a model, each a ModuleList or Sequential: those named, such as "encoder.layers" or ["a", "b"]
    ("" is the model itself), else model.block_lists, else "blocks". Several lists share one numbering of blocks."""
    lists = getattr(model, "block_lists", "blocks") if lists is None else lists
    found = [dict(model.named_modules()).get(name) for name in ([lists] if isinstance(lists, str) else lists)]
    if not all(isinstance(blocks, (nn.ModuleList, nn.Sequential)) for blocks in found):
        raise ValueError(f"{type(model).__name__} has no lists {lists}: name ModuleLists or Sequentials in `lists`")
    return found


def check_kept(kept, depth):
    """Raise ValueError unless `kept` is an ascending list of blocks of a model of this depth."""
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= depth:
        raise ValueError(f"kept blocks {kept}: expected different numbers from 0 to {depth - 1}, ascending")


def copy_to_prune(model, kept, lists):
    """A copy of the model. Raises ValueError where `kept` does not fit its blocks, or where it runs under a mask."""
    every = [block for blocks in blocks_of(model, lists) for block in blocks]
    check_kept(kept, len(every))
    if any("mask_hook" in vars(block) for block in every):   # put there by set_mask (Appendix A)
        raise ValueError("the model runs under a mask: call set_mask(model, None) first")
    return copy.deepcopy(model)


def prune(model, kept, lists=None):
    """A shallower copy of `model`: only the blocks numbered in `kept`, everything else the same, weights untouched.
    For models of others, lists is as in `blocks_of`; blocks left in a list are numbered anew, and so is a `layer_idx`
    (an index in Hugging Face's key-value cache) if it was the block's place in its list. A model that counts its blocks
    (tables or text features per layer, U-skips) silently becomes another one: use `drop_blocks` (Appendix A). A
    configuration is yours to adapt."""
    kept = [int(i) for i in kept]
    pruned = copy_to_prune(model, kept, lists)
    number = itertools.count()                   # of a block, over all lists
    for blocks in blocks_of(pruned, lists):
        stay = [place for place in range(len(blocks)) if next(number) in kept]
        for new, old in enumerate(stay):
            blocks[new] = blocks[old]
            for module in blocks[new].modules():
                if getattr(module, "layer_idx", None) == old:
                    module.layer_idx = new
        del blocks[len(stay):]
    return pruned


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 5. Recovery: masked knowledge distillation
#
# The pruned model is fine-tuned with the original as its teacher. Both see the same noisy image, timestep and label,
# and the student imitates the teacher's output and its hidden states. The latter needs care. A few numbers in a
# diffusion transformer's hidden states are enormous ("massive activations", arXiv:2402.17762); they dominate a squared
# error, and training on them diverges (the paper's Table 5). So entries more than k = 2 standard deviations from the
# mean, in either model, are left out, or "masked". This mask has nothing to do with the block mask. It also removes
# ordinary entries: 5 to 9 % of Gaussian states, almost none where massive ones widen the deviation. The loss is
#
#        loss = 0.9 * KD + 0.1 * denoising + beta * features,      beta falling linearly to 0
#
# (This beta is a weight, not the noise variance of Chapter 2.) KD (knowledge distillation) is the squared error between
# the two noise predictions, plus a KL divergence for a learned variance. Denoising is Chapter 2's training loss.
# Features is the error of the hidden states, a mean over pairs of blocks. The constants are the paper's.

def masked_feature_loss(student, teacher, k=2.0):
    """Mean squared error of two models' hidden states (B, T, D) over the entries where neither is an outlier. A scalar:
    the mean over examples of the mean over an example's entries, so that equal parts of a batch average to the whole.
    An entry is an outlier where |h - mean(h)| > k * std(h), mean and std over tokens and channels of one example.
    k = inf leaves nothing out: plain feature KD. Source: the paper's masked knowledge distillation. (The public code
    masks each model by its own mask and averages over all entries, so an outlier of one model alone costs the square of
    the other's entry. Ours leaves it out, as the paper's text does.) Raises ValueError unless both are (B, T, D)."""
    if student.shape != teacher.shape or student.dim() != 3:
        raise ValueError(f"hidden states {tuple(student.shape)}, {tuple(teacher.shape)}: expected the same (B, T, D)")

    def inlier(h):
        h = h.detach().float()
        deviation = h - h.mean((1, 2), keepdim=True)         # from it the std: torch.std takes far longer on a CPU
        std = torch.linalg.vector_norm(deviation, dim=(1, 2), keepdim=True) / math.sqrt(h[0].numel() - 1)
        return ~(deviation.abs() > k * std)                                  # not <=, because inf * 0 is NaN
    both = inlier(student) & inlier(teacher)                                 # (B, T, D)
    difference = torch.where(both, student - teacher.detach(), 0)
    return (difference.float().square().sum((1, 2)) / both.sum((1, 2)).clamp(min=1)).mean()


def match_blocks(groups, kept, cuts=()):
    """Pairs (student block, teacher block) for feature KD: each group's last kept block, as numbered in the student,
    and the group's last block, whose output it must stand in for. For 1:2 that is (i, 2i + 1). Without groups,
    for a bare (N, L), every kept block stands in for all blocks up to the next kept one. A group of which a rule
    (Chapter 10) keeps no block has no pair. cuts: first blocks after a change of the token sequence, such as the first
    block of a second list. Groups are split there. Source: the paper's pairs of 1:2, carried over to any groups."""
    ends = itertools.accumulate(m for _, m in groups) if isinstance(groups, list) else [*kept[1:], groups[1]]
    ends = sorted({*ends, *cuts})                # one past the last block of each group
    # {the end of a group: its last kept block, numbered as in the student}; a later block takes an earlier one's place
    last = {min(end for end in ends if end > block): i for i, block in enumerate(kept)}
    return [(i, end - 1) for end, i in last.items()]


KD_MODES = ("masked", "feature", "logits", "none")


def recovery_loss(student, teacher, diffusion, x0, y, pairs, kd="masked", beta=1e-2, k=2.0):
    """One batch's fine-tuning loss and its parts: (scalar, dict). diffusion: an Objective (Chapter 2); x0 (B, C, H, W),
    y (B,); pairs from `match_blocks`; beta: the weight of the features; k as in `masked_feature_loss`. kd: "masked",
    the paper's; "feature", outliers included; "logits", the outputs alone (not the mask's logits); "none", plain
    fine-tuning. Labels are nulled here, once, so that both models get the same ones."""
    if kd not in KD_MODES:
        raise ValueError(f"kd {kd!r}: expected one of {', '.join(KD_MODES)}")
    if teacher.training or student.y_embedder.training:
        raise ValueError("the models would drop labels themselves: call teacher.eval() and student.y_embedder.eval()")
    if any(list(side) != sorted(set(side)) for side in zip(*pairs)):
        raise ValueError(f"pairs {pairs}: expected ascending block numbers on both sides, as from match_blocks")
    t = diffusion.sample_t(len(x0), x0.device)
    noise = diffusion.noise(x0, t)
    x_t = diffusion.q_sample(x0, t, noise)
    y = student.y_embedder.token_drop(y)
    pairs = pairs if kd in ("masked", "feature") else []
    out, features = student(x_t, t, y, hidden=[i for i, _ in pairs])
    denoising = diffusion.losses(out, x0, x_t, t, noise)["loss"].mean()
    if kd == "none":
        return denoising, {"denoising": denoising}
    with torch.inference_mode(), autocast(x0.device):        # bfloat16 on CUDA; `train` does so for the student
        target, target_features = teacher(x_t, t, y, hidden=[j for _, j in pairs])
    distill = diffusion.distillation_losses(out, target, x_t, t).mean()
    loss = 0.9 * distill + 0.1 * denoising
    parts = {"denoising": denoising, "kd": distill}
    if pairs:
        k = k if kd == "masked" else math.inf
        distances = [masked_feature_loss(s, h, k) for s, h in zip(features, target_features, strict=True)]
        parts["features"] = torch.stack(distances).mean()
        loss = loss + beta * parts["features"]
    return loss, parts


def recover(student, teacher, diffusion, batches, pairs, steps, *, kd="masked", beta=1e-2, k=2.0, lr=2e-4,
            final_lr_ratio=0.5, ema_decay=0.9999, **loop):
    """Fine-tune a pruned `student`, in place, with its `teacher`; returns the moving average of its weights as a model.
    batches: an iterator of x0 (B, C, H, W) and y (B,). beta falls linearly to 0. kd and k as in `recovery_loss`; loop:
    more arguments of `train` (Chapter 6), such as on_step. Defaults are the paper's for DiT-XL (cosine to 1e-4)."""
    teacher.eval()
    student.train()
    student.y_embedder.eval()                    # recovery_loss drops labels, for both models at once

    def loss(step):
        x0, y = next(batches)
        return recovery_loss(student, teacher, diffusion, x0, y, pairs, kd, beta * (1 - step / max(1, steps - 1)), k)
    return train(student, loss, steps, lr=lr, final_lr_ratio=final_lr_ratio, ema_decay=ema_decay, **loop)


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 6. The training loop                                                                 (Part II, the program)
#
# One loop serves the teacher, the layers, the student and the judge: AdamW, gradient clipping and, where images are
# drawn from the weights, an exponential moving average (EMA) of them. A step's batch and random numbers follow from the
# seed, the process and the step. So a run can be killed at any moment: it goes on from its last saved state and, on a
# CPU, ends bit for bit where one that was never stopped ends.
# Several GPUs: torchrun starts the program once per GPU. The processes start with equal weights and take a share of
# every batch each; gradients are averaged, so all take the same step; process 0 writes the files. `accumulate` cuts a
# batch into parts, one after the other, for small cards. However a batch is cut, its examples are the same, but their
# times, noise and masks are not. After the loop: errors in one line, whole files, processes and devices.

SAVE_SECONDS = 30                                # at least, between two saves of a state; longer where they are slow


def window_of(steps):
    """The number of steps in a window: the log has a row for each whole one; a state is saved only between two."""
    return max(1, min(100, steps // 100))


class TrainingState:
    """A file that `train` writes now and then and goes on from after `step` steps. The caller removes it at the end."""
    def __init__(self, path):
        self.path = Path(path)
        self.content = read_checkpoint(path) if self.path.exists() else {}
        self.step = self.content.get("step", 0)
        self.due = time.monotonic() + SAVE_SECONDS

    def save_if_due(self, step, parts, record):
        start = time.monotonic()
        if start >= self.due:
            content = {name: part.state_dict() for name, part in parts.items()} | {"step": step, "record": record}
            write_file(self.path, functools.partial(torch.save, content))
            self.due = time.monotonic() + SAVE_SECONDS * max(1, time.monotonic() - start)        # 3 % of the time


def backward(loss_fn, step, weights, accumulate):
    """Leave in `weights` a step's gradient, the mean over parts and processes; returns loss and last metrics."""
    total = 0.0
    for _ in range(accumulate):
        with autocast(weights[0].device):
            loss, metrics = loss_fn(step)
        (loss / accumulate).backward()
        total += loss.detach() / accumulate
    for weight in [w for w in weights if w.grad is None]:    # of a block that no example kept: the formula's is zero
        weight.grad = torch.zeros_like(weight)
    if dist.is_initialized():                    # in one exchange, not one for every tensor
        shared = [total, *(weight.grad for weight in weights)]
        flat = nn.utils.parameters_to_vector(shared) / world_size()
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat, shared)
    return total, metrics


def train(model, loss_fn, steps, *, params=None, lr=1e-4, final_lr_ratio=1.0, warmup=0, clip=1.0, ema_decay=None,
          accumulate=1, seed=None, on_step=lambda step, metrics: None, state=None, record=()):
    """Take `steps` steps of AdamW (no weight decay, gradients clipped to norm `clip`) on `model`, in place.

    loss_fn(step) returns the loss, a scalar, and a dict of more numbers to report; it is called `accumulate` times a
    step (the last call's numbers count), under `autocast`. params: parameters or groups of them with their own rates,
    by default all. A rate rises linearly over `warmup` steps and falls by a cosine to final_lr_ratio of itself. seed: a
    step's random numbers follow from (seed, process, step). on_step(step, metrics) is called after every step. state: a
    TrainingState to go on from and to save to, with `record`, a list of plain data that grows along; loss_fn must then
    start with the batch of step `state.step`. The model trains in the mode it is in: call model.train() first to have
    dropout, of labels too. Returns the EMA of the model (not of its buffers) if ema_decay is given, else the model, in
    eval mode. Raises FloatingPointError before a step that would spoil the weights."""
    optimizer = torch.optim.AdamW(params or model.parameters(), lr=lr, weight_decay=0, fused=True)
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for weight in weights if dist.is_initialized() else ():  # all processes start with the weights of the first
        dist.broadcast(weight.data, 0)
    ema = copy.deepcopy(model) if ema_decay else nn.Module()                 # an empty one: nothing to save
    parts = {"trained": nn.ParameterList(weights), "optimizer": optimizer, "ema": ema}
    if state and state.step:
        with blame(state.path, "a state of this version; remove it"):
            for name, part in parts.items():
                part.load_state_dict(state.content[name])
            if record:                           # it has grown since its start
                record[:] = state.content["record"]
    for step in range(state.step if state else 0, steps):
        if seed is not None:
            torch.manual_seed(int(np.random.SeedSequence([seed, rank(), step]).generate_state(1, np.uint64)[0]))
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        factor = min(1, (step + 1) / (warmup + 1)) * (final_lr_ratio + (1 - final_lr_ratio) * cosine)
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        optimizer.zero_grad()
        total, metrics = backward(loss_fn, step, weights, accumulate)
        total, norm = torch.stack([total, nn.utils.clip_grad_norm_(weights, clip)]).tolist()     # waits for a GPU
        if not math.isfinite(total + norm):
            raise FloatingPointError(f"at step {step} the loss is {total}, its gradient's norm {norm}; give another "
                                     "--out, lower learning rates and, once there is one, --ckpt OUT/teacher.pt")
        if state and step % window_of(steps) == 0:
            state.save_if_due(step, parts, record)           # weights whose loss is known to be finite
        optimizer.step()
        if ema_decay:
            # ema = decay * ema + (1 - decay) * weights, with a warm-up of the decay: else after 100 steps of 0.99 the
            # first weights would be 37 % of it. (The public code has none. Ours reaches 0.9999 at step 89,990.)
            decay = min(ema_decay, (1 + step) / (10 + step)) if step else 0.0
            torch.optim.swa_utils.get_ema_multi_avg_fn(decay)([*ema.parameters()], [*model.parameters()], step)
        on_step(step, {"loss": total, "grad_norm": norm, "lr": optimizer.param_groups[-1]["lr"]} | metrics)
    return (ema if ema_decay else model).eval()


def duration(seconds):
    """A time in words: 40 s, 12 min, 3.5 h or 403 days."""
    units = (86400, "{:.0f} days"), (3600, "{:.1f} h"), (60, "{:.0f} min"), (1, "{:.0f} s")
    unit, words = next((pair for pair in units if seconds >= 2 * pair[0]), units[-1])
    return words.format(seconds / unit)


def progress(label, steps, unit="steps", first=0):
    """A function report(step, words) that prints progress every ten seconds and at the end, from step `first` on."""
    start = printed = time.perf_counter()

    def report(step, words=""):
        nonlocal printed
        now = time.perf_counter()
        if rank() == 0 and (now >= printed + 10 or step + 1 == steps):
            speed = (step + 1 - first) / (now - start)
            left = duration((steps - step - 1) / speed)
            print(f"{label:8} {step + 1}/{steps}{words}  {speed:.3g} {unit}/s  {left} left", file=sys.stderr)
            printed = now
    return report


def logged(path, stage, steps, first=0):
    """An on_step of `train` that reports progress and, after every window of steps, adds a JSON row to the log at
    `path`: the window's means and the speed since the start, step `first`. Later rows of this stage are taken out."""
    report = progress(stage, steps, first=first)
    start = time.perf_counter()
    window = []                                  # the metrics of its steps
    shown = "  loss -"                           # of the last whole window
    with blame(path, "rows of JSON; remove it"):
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        rows = [row for row in rows if row["stage"] != stage or row["step"] <= first]

    def on_step(step, metrics):
        nonlocal shown
        window.append({name: torch.as_tensor(value).detach() for name, value in metrics.items()})
        if len(window) == window_of(steps):
            means = {name: float(np.mean([float(one[name]) for one in window])) for name in metrics}
            speed = (step + 1 - first) / (time.perf_counter() - start)
            rows.append({"stage": stage, "step": step + 1, **means, "steps_per_s": speed})
            # The denoising loss too: it is only a tenth of a recovery's loss.
            shown = "".join(f"  {name} {means[name]:.4f}" for name in ("loss", "denoising") if name in means)
            write_file(path, lambda file: file.writelines(f"{json.dumps(row)}\n".encode() for row in rows))
            window.clear()
        report(step, shown)
    return on_step


class UserError(Exception):
    """A user's mistake in one line: what was wrong, what was expected, what to do. The exit status is then 2."""


def require(condition, words):
    if not condition:
        raise UserError(words)


@contextlib.contextmanager
def blame(path, expected):
    """A context in which every error becomes a UserError about `path`: damaged files raise many kinds."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):     # says it already, or is not about the file
        raise
    except Exception as error:
        raise UserError(f"{path}: {str(error)[:300] or type(error).__name__}; expected {expected}") from None


def write_file(path, save):
    """Write `path` so that it is whole whenever the program is stopped: save(file) fills a file in memory, which goes
    to the disk under another name, and that is renamed. Of several processes only the first writes."""
    if rank() == 0:
        buffer = io.BytesIO()                    # a signal amid torch.save to a real file can abort the process
        save(buffer)
        part = Path(path).with_name(f".{Path(path).name}.part")
        with blame(path, "a disk that takes it; then give the same command again"), contextlib.ExitStack() as stack:
            stack.callback(part.unlink, missing_ok=True)     # called at the end, also after an error
            part.write_bytes(buffer.getbuffer())
            part.replace(path)


def write_json(path, content):
    write_file(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def read_json(path):
    """The dict in a JSON file."""
    with blame(path, "a whole file of this program; remove it or choose another --out"):
        return {**json.loads(Path(path).read_text())}


def claim(path, settings):
    """Write `settings` to a JSON file the first time; later, refuse others and name those that differ."""
    saved = read_json(path) if path.exists() else settings
    different = [f"{name} {saved.get(name)} (now {new})" for name, new in settings.items() if saved.get(name) != new]
    require(not different, f"{path} was made with {', '.join(different)}: give the same flags or choose another --out")
    write_json(path, settings)


def read_checkpoint(path):
    """The dict in a PyTorch file, read as data: nothing in it is run, and what would run is refused."""
    require(os.path.isfile(path), f"checkpoint {path}: no such file")
    content = None
    with contextlib.suppress(Exception), torch.serialization.safe_globals([argparse.Namespace]):      # official `args`
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    require(isinstance(content, dict), f"checkpoint {path}: no whole PyTorch file of plain data; nothing in it was run")
    return content


def rank():
    """The number of this process among those that torchrun started; 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value=None):
    """A list of every process's `value`, arrays or plain data, in the order of their numbers. Each waits for all."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def processes():
    """A context in which the processes that torchrun started can exchange data, and only the first one prints."""
    if dist.is_torchelastic_launched():
        import torch._dynamo  # now: imported later, it keeps the process group alive, and the exit can crash
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    with contextlib.redirect_stdout(None if rank() else sys.stdout):         # print says nothing where it is None
        yield
    if dist.is_initialized():                    # not after an error: torchrun ends the others
        dist.destroy_process_group()


def pick_device(name):
    """A torch.device that is there: the named one, else the first GPU, else the CPU."""
    with blame(f"--device {name}", f"cpu or cuda; this machine has {torch.cuda.device_count()} GPUs"):
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":                # of several processes every one has its own
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", device.index or 0)))
        return torch.zeros(1, device=device.type).device     # tries it, and says which GPU it is


def compiled(model, wanted=True):
    """The model, its blocks compiled in place by torch.compile if wanted: a slow start and faster steps."""
    if wanted:
        torch.compiler.reset()                   # torch keeps 8 variants of a block's code; learning alone needs 6
        for block in model.blocks:
            block.compile(dynamic=True)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 7. Data
#
# Small images are held in memory as uint8; the models see them in [-1, 1]. Large ones are encoded once, into one file,
# by an autoencoder (VAE), which also makes pictures of drawn latents. DiT's turns 256x256 pixels into 4 x 32 x 32.

class Dataset:
    """Images, uint8 (N, C, H, W), or an array of latents (N, 2, C, H, W), those of an image and of its mirror image;
    labels (N,) int64; classes: a name for each label. `shape` is (C, H, W)."""
    def __init__(self, images, labels, classes):
        vars(self).update(images=images, labels=labels, classes=classes)
        self.latent = not torch.is_tensor(images)
        self.shape = tuple(images.shape[-3:])

    def read(self, index, mirrored=0):
        """Examples (B, C, H, W) of the numbers index (B,), as floats; latents of the mirror image where mirrored (B,)
        is 1. Images are never mirrored: a digit would turn into another one, or none."""
        if not self.latent:
            return to_float(self.images[index])
        x = torch.from_numpy(self.images[index.numpy(), np.asarray(mirrored)]).float()
        bad = index[~x.flatten(1).isfinite().all(1)].tolist()
        require(not bad, f"{self.images.filename}: images {bad} are not finite; label them -1 and --encode again")
        return x

    def describe(self):
        """The number of examples and a checksum of classes, labels and images (of latents, a sample)."""
        every = max(1, len(self.labels) // 1000) if self.latent else 1
        value = zlib.crc32(self.labels.numpy(), zlib.crc32(str(self.classes).encode()))
        value = zlib.crc32(np.ascontiguousarray(self.images[::every]), value)
        return f"{len(self.labels)} {'latents' if self.latent else 'images'}, checksum {value:08x}"


def to_float(images):
    """uint8 to [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """[-1, 1] to uint8, rounded."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def toy_digits(n=5000, size=16, seed=0):
    """A Dataset of n grey images of the digits 0 to 9 in Pillow's own font, a little off centre."""
    rng = np.random.default_rng(seed)
    S = 4 * size                                 # drawn four times as large, then averaged: smooth edges
    fonts = [ImageFont.load_default(em) for em in np.linspace(0.8, 0.95, 7) * S / 0.71]      # a digit is 0.71 em high
    images = np.zeros((n, 1, size, size), np.uint8)
    for i in range(n):
        canvas = Image.new("L", (S, S))
        font = fonts[rng.integers(len(fonts))]
        box = np.reshape(font.getbbox(str(i % 10)), (2, 2))  # left and top, right and bottom
        place = (S - box.sum(0)) / 2 + rng.uniform((-0.06, -0.025), (0.06, 0.025)) * S
        ImageDraw.Draw(canvas).text(tuple(place), str(i % 10), fill=255, font=font)
        images[i, 0] = canvas.resize((size, size), Image.Resampling.BOX)
    return Dataset(torch.from_numpy(images), torch.arange(n) % 10, list("0123456789"))


def center_crop(image, size):
    """A square of side `size` from the middle of a PIL image, as ADM does it: halved by box filter while that can be,
    then bicubic to the target, then cropped. Source: openai/guided-diffusion."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
    left, top = [(side - size) // 2 for side in image.size]
    return image.crop((left, top, left + size, top + size))


def read_image(path, size=None):
    """An image file as a uint8 array (C, H, W), of one channel if its mode is grey, else of three; with a `size`,
    cropped to that square. It is turned as its EXIF data say, and what is transparent is white."""
    require(os.path.isfile(path), f"{path} is no file; remove it")
    with blame(path, "a whole image of 8 bits a channel; repair, convert or remove it"), Image.open(path) as image:
        require(image.mode[0] not in "IF", f"{path} has pixels of mode {image.mode}; convert it to 8 bits a channel")
        image.getexif()
        image.info.pop("exif", None)             # drop the raw EXIF bytes; Pillow can fail on odd ones when it turns
        image = ImageOps.exif_transpose(image)
        mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert(mode)
        return np.atleast_3d(center_crop(image, size) if size else image).transpose(2, 0, 1)


def visible(folder):
    """The paths in a folder, sorted, without hidden ones."""
    with blame(folder, "a folder of images"):
        return sorted(path for path in Path(folder).iterdir() if not path.name.startswith("."))


def files_in(folder, above=()):
    """The files in a folder and its sub-folders, sorted. Links are followed, but not to one of the folders `above`."""
    place = os.path.realpath(folder)
    paths = [] if place in above else visible(folder)
    return [file for path in paths for file in (files_in(path, (*above, place)) if path.is_dir() else [path])]


def class_files(folder):
    """The classes, sorted (numbers by value), and [(path, label), ...], of a folder with one sub-folder per class."""
    parts = {path.name: files_in(path, (os.path.realpath(folder),)) for path in visible(folder)}
    names = sorted(parts, key=int if all(map(str.isdecimal, parts)) else None)
    empty = [name for name in names if not parts[name]]
    require(names and not empty, f"{folder}: expected one sub-folder of images per class; without images: {empty}")
    return names, [(path, label) for label, name in enumerate(names) for path in parts[name]]


def load_arrays(path, mmap_mode=None):
    """The array in an .npy file, or the dict of arrays in an .npz file. Raises UserError."""
    with blame(path, "a whole .npy or .npz file"):
        content = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
        if isinstance(content, np.ndarray) != (Path(path).suffix == ".npy"):
            raise ValueError("it holds the other kind")
        return content if isinstance(content, np.ndarray) else dict(content)


def open_data(folder, size, num_classes=None):
    """The Dataset in a folder: latents in `latents.npy` (N, 2, C, H, W) with `labels.npy` (N,), or else images, made
    squares of side `size`. num_classes: of the model, if it has learned some."""
    folder = Path(folder)
    if not (folder / "latents.npy").exists():
        classes, files = class_files(folder)
        images = np.stack(np.broadcast_arrays(*[read_image(path, size) for path, _ in files]))   # grey if all are
        return Dataset(torch.from_numpy(images), torch.tensor([label for _, label in files]), classes)
    latents = load_arrays(folder / "latents.npy", "r")
    labels = load_arrays(folder / "labels.npy")
    fits = latents.ndim == 5 and latents.shape[:2] == (*labels.shape, 2) and labels.dtype.kind in "iu"
    fits = fits and latents.dtype in (np.float16, np.float32, np.float64)
    require(fits, f"{folder}: {latents.shape} and {labels.dtype} {labels.shape}; expected (N, 2, C, H, W) and int (N,)")
    limit = num_classes or 100_000
    low, high = labels.min(initial=0), labels.max(initial=0)
    require(low != -1, f"{folder} is not encoded to the end: give the same --encode command again")
    require(low >= 0 and high < limit, f"{folder}: labels {low} to {high}; expected 0 to {limit - 1}")
    return Dataset(latents, torch.from_numpy(labels.astype(np.int64)), [str(i) for i in range(num_classes or high + 1)])


def match_classes(data, names):
    """`data` for a model that has learned the classes `names`: the same, or as many if one side has only numbers."""
    numbers = [str(i) for i in range(len(names))]
    fits = data.classes in (names, numbers) or (names == numbers and len(data.classes) == len(names))
    require(fits, f"--data has {len(data.classes)} classes, {data.classes[:9]}; expected {len(names)}, {names[:9]}")
    return Dataset(data.images, data.labels, names if data.classes == numbers else data.classes)


def data_batches(data, batch_size, seed, device="cpu", start=0, parts=1):
    """Endless batches (x, y), x (B, C, H, W) and y (B,), from step `start`, in a new order every epoch; of latents, a
    random half are mirrored. A batch follows from seed and step. Each process yields its share, in `parts` pieces."""
    N = len(data.labels)
    for step in itertools.count(start):
        epoch, place = divmod(step, max(1, N // batch_size))
        if step == start or place == 0:
            generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
            batches = torch.randperm(N, generator=generator).split(batch_size)
            mirrored = torch.randint(2, (N,), generator=generator)
        for part in range(parts):
            index = batches[place][part * world_size() + rank()::parts * world_size()]
            yield data.read(index, mirrored[index]).to(device), data.labels[index].to(device)


def noise_source(indices, shape, seed, device="cpu"):
    """A function that returns fresh standard normal noise (B, *shape) at every call, or (B, *other) if that is given.
    Image `i` of a `seed` has a random stream of its own, so it is the same whatever its batch and device."""
    streams = [np.random.Generator(np.random.Philox(key=[seed, i])) for i in indices]

    def draw(*other):
        noise = np.stack([stream.standard_normal(other or tuple(shape), dtype=np.float32) for stream in streams])
        return torch.from_numpy(noise).to(device)
    return draw


class VAE:
    """The autoencoder of latent models, by the package diffusers: images (B, 3, H, W), uint8, to latents (B, C, h, w)
    and back. name: of a model on Hugging Face, or a folder, in safetensors; channels: the C it must have, if given."""
    def __init__(self, name, device, channels=None):
        with blame(f"--vae {name}", "a fitting autoencoder in safetensors; this needs pip install diffusers"):
            from diffusers import AutoencoderKL
            net = AutoencoderKL.from_pretrained(name, use_safetensors=True, low_cpu_mem_usage=False)
            require(channels in (None, net.config.latent_channels), f"--vae {name}: not of {channels} channels")
        self.net = net.to(device).eval().requires_grad_(False)
        self.device = device
        self.scale = net.config.scaling_factor   # 0.18215: latents of about unit variance

    def encode(self, images, noise):
        """A draw from the VAE's posterior, with noise (B, C, h, w), as DiT was trained on."""
        posterior = self.net.encode(to_float(images).to(self.device)).latent_dist
        return ((posterior.mean + posterior.std * noise) * self.scale).cpu()

    def decode(self, latents):
        return torch.cat([to_uint8(self.net.decode(x / self.scale).sample).cpu() for x in latents.split(8)])


@blame("--encode", "images, an --image-size that the autoencoder takes, and a disk with room for the latents")
def encode_images(folder, size, vae, out, name, batch_size=16):
    """Encode the images of a folder for `open_data`, into `out`, by the VAE `name`. A label is -1 until its latents
    are on the disk, so the same call goes on where there is a -1. Every process does its share."""
    classes, files = class_files(folder)
    shape = vae.encode(torch.zeros(1, 3, size, size, dtype=torch.uint8), 0).shape[1:]
    names = zlib.crc32(str([path.relative_to(folder) for path, _ in files]).encode())
    out.mkdir(parents=True, exist_ok=True)
    latents, told = out / "latents.npy", out / "latents.json"
    require(not latents.exists() or told.exists(), f"{latents} is there already; remove it or choose another --out")
    claim(told, {"vae": name, "image_size": size, "encode": f"{len(files)} files, checksum {names:08x}"})
    if rank() == 0 and not (out / "labels.npy").exists():    # it is made last, of -1 everywhere
        np.lib.format.open_memmap(latents, "w+", np.float32, (len(files), 2, *shape))
        write_file(out / "labels.npy", lambda file: np.save(file, np.full(len(files), -1)))
    gather()                                     # the others wait for the files
    labels = load_arrays(out / "labels.npy", "r+")
    missing = gather(np.flatnonzero(labels < 0))[0]          # before one of them writes
    mine = np.array_split(missing, world_size())[rank()].tolist()
    print(f"{latents}: {len(missing)} of {len(files)} images, of {len(classes)} classes, are to be encoded")
    report = progress("encode", len(mine), unit="images")
    done, flushed = 0, time.monotonic()          # images whose labels are written
    with concurrent.futures.ThreadPoolExecutor() as readers, open(latents, "r+b") as file:
        for begin in range(0, len(mine), batch_size):
            index = mine[begin:begin + batch_size]
            images = readers.map(lambda i: read_image(files[i][0], size), index)
            x = torch.from_numpy(np.stack(np.broadcast_arrays(*images))).expand(-1, 3, -1, -1)
            pairs = torch.stack([x, x.flip(3)], 1).flatten(0, 1)             # an image and its mirror image in turn
            noise = noise_source([2 * i + side for i in index for side in (0, 1)], shape, 0, vae.device)()
            for i, pair in zip(index, vae.encode(pairs, noise).unflatten(0, (-1, 2)).numpy()):
                file.seek((i - len(files)) * pair.nbytes, os.SEEK_END)       # image i's place, counted from the end
                file.write(pair.tobytes())
            end = begin + len(index)
            if time.monotonic() > flushed + 5 or end == len(mine):
                file.flush()
                os.fsync(file.fileno())          # the labels come after it
                labels[mine[done:end]] = [files[i][1] for i in mine[done:end]]
                done, flushed = end, time.monotonic()
            report(end - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 8. Measuring
#
# The Frechet distance compares two sets of images through the mean and covariance of their features under some
# network: |mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)). FID takes the features of an Inception network trained on
# ImageNet. Without --inception we train a small classifier on the data and call its Frechet distance *toy-FID*: it
# ranks models of one data set; never compare it with an FID. Precision is the share of drawn images that look real,
# recall the share of real ones that could have been drawn; the inception score says whether images are clear and of all
# classes. The statistics of N images are a dict: `mu` (F,) and `sigma` (F, F) of their F features and, where the images
# themselves were there, the `features` (N, F) and class probabilities `p` (N, classes). All features are in memory.

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance of N(mu1, sigma1) and N(mu2, sigma2); mu (F,), sigma (F, F), symmetric. A float, at least 0.
    With S1 = R R^T, sqrt(S1 S2) has the trace of the symmetric sqrt(R^T S2 R), whose eigenvalues are real and, but for
    rounding, not negative. R comes from the eigenvectors of S1, which may be singular. Source: arXiv:1706.08500."""
    mu1, mu2, sigma1, sigma2 = [np.asarray_chkfinite(a, dtype=np.float64) for a in (mu1, mu2, sigma1, sigma2)]
    if not mu1.shape * 2 == mu2.shape * 2 == sigma1.shape == sigma2.shape:
        raise ValueError(f"means {mu1.shape}, {mu2.shape}, covariances {sigma1.shape}, {sigma2.shape} do not fit")

    def roots(values):                           # of eigenvalues; rounding errors of a zero count as zero
        return np.sqrt(np.where(values > len(values) * np.finfo(float).eps * values.max(), values, 0))
    values, vectors = scipy.linalg.eigh(sigma1)
    R = vectors * roots(values)                                              # (F, F)
    trace_of_root = roots(scipy.linalg.eigvalsh(R.T @ sigma2 @ R)).sum()
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(float(distance), 0.0)


def inception_score(probabilities, split=5000):
    """exp of the mean KL(p(class | image) || p(class)), from class probabilities (N, classes): 1 where all images look
    alike, at most the number of classes. The KL's mean is the entropy of the mean less the mean entropy. As in ADM, the
    mean over splits of 5,000 images, shuffled because they are sorted by class. Source: arXiv:1606.03498."""
    p = torch.as_tensor(probabilities, dtype=torch.float64)
    p = p[torch.randperm(len(p), generator=torch.Generator().manual_seed(0))]
    entropy = torch.special.entr                 # -p log p of every entry
    scores = [math.exp(entropy(part.mean(0)).sum() - entropy(part).sum(1).mean()) for part in p.split(split)]
    return float(np.mean(scores))


def precision_recall(real, fake, k=3):
    """Improved precision and recall of features real (N, F) and fake (M, F): the share of fakes inside the manifold of
    the real ones, and the other way round; two floats. A set's manifold is the union of balls around its points, each
    reaching to the k-th nearest other one, so there must be more than k points. Source: arXiv:1904.06991."""
    # Exact differences: the matrix-product form loses near duplicates.
    distances = functools.partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")

    def share_inside(points, queries):
        radii = torch.cat([distances(part, points).kthvalue(k + 1, dim=1).values for part in points.split(1024)])
        inside = torch.cat([(distances(part, points) <= radii).any(1) for part in queries.split(1024)])
        return inside.double().mean().item()
    real, fake = torch.as_tensor(real).float(), torch.as_tensor(fake).float()
    return share_inside(real, fake), share_inside(fake, real)


def train_judge(data, device, steps=400):
    """Train the judge of toy runs, a small classifier, on nine tenths of `data`, a Dataset of images. Returns
    look(images), from uint8 images (B, C, H, W) to features (B, 64) and class probabilities (B, classes) as arrays, and
    a line on how far to trust it. Its seed is 0 whatever the run's, so that models are measured alike."""
    torch.manual_seed(0)
    side = min(math.ceil(data.shape[1] / 4), 8)
    judge = nn.Sequential(nn.Conv2d(data.shape[0], 32, 3, 2, padding=1), nn.ReLU(),
                          nn.Conv2d(32, 64, 3, 2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(side), nn.Flatten(),
                          nn.Linear(64 * side ** 2, 64), nn.ReLU(), nn.Linear(64, len(data.classes))).to(device)
    seen = torch.randperm(len(data.labels)) % 10 > 0
    batches = data_batches(Dataset(data.images[seen], data.labels[seen], data.classes), 64, 0, device)

    def loss(step):
        x, y = next(batches)
        return F.cross_entropy(judge(x), y), {}

    def look(images):
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):        # in full float32
            features = judge[:-1](to_float(images).to(device))
            return features.cpu().numpy(), judge[-1](features).softmax(1).cpu().numpy()
    report = progress("judge", steps)
    train(judge, loss, steps, lr=1e-3, seed=0, on_step=lambda step, metrics: report(step))
    right = look(data.images[~seen])[1].argmax(1) == data.labels[~seen].numpy()
    note = ", too few to trust it" if len(right) < 50 or len(data.classes) < 2 else ""
    return look, f"judge: {right.mean():.1%} right on {len(right)} held-out images of {len(data.classes)} classes{note}"


def load_inception(path, device):
    """The network that FID is defined by, a TorchScript file (NVIDIA's port, inception-2015-12-05.pt), as look(images):
    features (B, 2048) and class probabilities, as arrays, of uint8 images (B, 1 or 3, H, W) of any size. Returns look
    and None, as `train_judge` returns look and words. TorchScript is a program: take it from a place you trust."""
    def look(images):
        x = images.expand(-1, 3, -1, -1).to(device)
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):        # as published FIDs
            return [out.float().cpu().numpy() for out in (net(x, return_features=True), net(x, no_output_bias=True))]
    with blame(path, "a TorchScript file called as NVIDIA's port is"):
        net = torch.jit.load(path, map_location=device).eval()
        look(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    return look, None


def statistics(parts):
    """The statistics of images, from a list of what look(images) returned for each batch."""
    features, p = map(np.concatenate, zip(*parts))
    sigma = np.atleast_2d(np.cov(features, rowvar=False))
    return {"mu": features.mean(0, dtype=np.float64), "sigma": sigma, "features": features, "p": p}


def statistics_of(path, look=None):
    """Statistics of the images in a folder or .npz file, seen through `look`. An .npz file's own `mu` and `sigma` count
    (in ADM's reference batches, of all of ImageNet); its `arr_0`, if any, gives the rest: 10 GB for 50,000 images."""
    saved = load_arrays(path) if Path(path).suffix == ".npz" else {}
    with blame(path, "finite numbers in mu and sigma"):
        saved |= {name: np.asarray_chkfinite(saved[name], float) for name in saved.keys() & {"mu", "sigma"}}
    if saved.keys() >= {"mu", "sigma"} and (look is None or "arr_0" not in saved):
        return saved
    require(look, f"{path}: --inception FILE is needed to look at images")
    if saved:
        images = saved.pop("arr_0", np.zeros(0))
        require(images.dtype == np.uint8 and images.shape[3:] == (3,), f"{path}: expected uint8 arr_0 (N, H, W, 3)")
        batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(50)
    else:                                        # one image at a time, since sizes may differ
        images = files_in(path)
        batches = (torch.from_numpy(read_image(file)[None].copy()) for file in images)
    require(len(images) >= 4, f"{path}: {len(images)} images; expected 4 or more")
    if "mu" not in saved and len(images) < 2048:
        print(f"warning: an FID with {path}, of fewer than 2,048 images, is far too high")
    return statistics([look(batch) for batch in batches]) | saved


def compare_statistics(fake, real, device="cpu"):
    """How far the statistics `fake` are from `real`: a dict of `fid` and, where features and probabilities are there,
    `is`, `precision` and `recall`. These two take no more real images than fakes: with more the balls are smaller."""
    row = {"fid": frechet_distance(real["mu"], real["sigma"], fake["mu"], fake["sigma"])}
    if "p" in fake:
        row["is"] = inception_score(fake["p"])
    if "features" in fake and "features" in real:
        ours, theirs = [torch.from_numpy(one["features"]).to(device) for one in (fake, real)]
        some = torch.linspace(0, len(theirs) - 1, min(len(theirs), len(ours))).long()
        row["precision"], row["recall"] = precision_recall(theirs[some.to(device)], ours)
    return row


def draw_all(models, labels, draw, look, batch_size=50):
    """Draw an image of each of `labels` (N,) with each of `models`, a dict. draw(model, labels, indices) returns uint8
    images (B, C, H, W), from the same noise for every model. The models take turns batch by batch: a busy machine slows
    all alike. Returns, by name, the statistics of what look(images) sees, and each batch's seconds per image."""
    batches = torch.arange(len(labels)).split(batch_size * world_size())
    report = progress("measure", len(batches), unit="batches")
    seen = {name: [] for name in models}
    seconds = {name: [] for name in models}
    for number, index in enumerate(batches):
        mine = index.tensor_split(world_size())[rank()]      # each process draws its share
        for name, model in models.items():
            begin = time.perf_counter()
            images = draw(model, labels[mine], mine.tolist())
            seconds[name].append((time.perf_counter() - begin) / len(index))
            seen[name] += gather(look(images))
        report(number)
    return {name: statistics(parts) for name, parts in seen.items()}, {name: np.array(s) for name, s in seconds.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 9. Checkpoints and pictures
#
# PRESETS has one row of settings per model. Our checkpoints carry all that is needed to draw from them. Official ones
# carry less, and what is missing is read off the shapes of their weights and off the preset that fits.
# PAPER is the paper's recipe for DiT-XL (while learning, batches are half as large); teacher_steps and teacher_lr are
# DiT's. TOY was tuned on the drawn digits. beta: first weight of the features in masked KD; label_std: of a new DiT's
# label embeddings, officially 0.02; sampling: further arguments of the objective's `sample`.

PAPER = {"objective": lambda model: GaussianDiffusion(), "batch_size": 256, "learn_batch": 0.5, "beta": 1e-2,
         "teacher_steps": 400_000, "teacher_lr": 1e-4, "learn_steps": 10_000, "learn_lr": 1e-4, "logits_lr": 1e-3,
         "recover_steps": 100_000, "recover_lr": 2e-4, "ema_decay": 0.9999, "label_std": 0.02, "samples": 50_000,
         "sample_steps": 250, "guidance": 1.5, "sampling": {}}
TOY = PAPER | {"batch_size": 64, "learn_batch": 1, "teacher_steps": 1200, "teacher_lr": 1e-2, "learn_steps": 300,
               "learn_lr": 1e-3, "logits_lr": 3e-3, "recover_steps": 300, "recover_lr": 2e-3, "ema_decay": 0.99,
               "label_std": 1.0, "samples": 500, "sample_steps": 50}
PRESETS = {name: (TOY if "toy" in name else PAPER) | {"network": network} for name, network in DiT_models.items()}
PRESETS["toy-28"]["learn_steps"] = 400


def fitting_preset(names, config):
    """Of `names` in PRESETS the one that fits a configuration best, by width, then by all they have in common, and the
    configuration with its number of heads, which no shape shows."""
    width = config["hidden_size"]
    sizes = {name: PRESETS[name]["network"].keywords for name in names}
    best = max(names, key=lambda name: (sizes[name]["hidden_size"] == width, len(sizes[name].items() & config.items())))
    require("num_heads" in config or sizes[best]["hidden_size"] == width, f"no model of PRESETS has the width {width}")
    return best, {"num_heads": sizes[best]["num_heads"], **config}


def own_config(network, says):
    """The `config` of a file if it is one of ours, with the arguments of the class `network`, else None."""
    config = says["config"] if isinstance(says["config"], dict) else {}
    return config if config.keys() == inspect.signature(network).parameters.keys() else None


def count_blocks(weights, name):
    """How many blocks, name.0, name.1 ..., a state dict has."""
    return len({key.removeprefix(name).split(".")[1] for key in weights if key.startswith(f"{name}.")})


def read_dit(weights, says):
    """One of READERS. weights: a state dict; says: what its file says of itself, the `args` of its training, `config`
    and the name of its `objective`. Returns the preset's name and the arguments of its network, or None for another
    family. The last label means "no class", unless it is the only one or the training had as many classes."""
    ours = str(says["args"].get("model", "DiT")).startswith("DiT") and says["objective"] in (None, "ddpm")
    if not ours or "x_embedder.proj.weight" not in weights:
        return None
    config = own_config(DiT, says)
    if not config:                               # read it off the shapes
        D, C, P, _ = weights["x_embedder.proj.weight"].shape
        rows = len(weights["y_embedder.embedding_table.weight"])
        null = rows > 1 and says["args"].get("num_classes") != rows          # whether there is a null label
        config = {"input_size": math.isqrt(weights["pos_embed"].shape[1]) * P, "patch_size": P, "in_channels": C,
                  "hidden_size": D, "depth": count_blocks(weights, "blocks"), "num_classes": rows - null,
                  "class_dropout_prob": 0.1 * null, "learn_sigma": len(weights["final_layer.linear.bias"]) > C * P * P}
    return fitting_preset(DiT_models, config)


READERS = [read_dit]                             # the first that knows a file counts


def save_checkpoint(path, model, objective, sampling, classes, **more):
    """A checkpoint: `ema` (the weights, under official names), `config` (the arguments of the model's class), the name
    of its Objective, `sampling` (arguments of its `sample`), the names of the classes, and more plain data."""
    content = {"ema": model.state_dict(), "config": model.config(), "objective": objective.name, "sampling": sampling,
               "classes": classes, **more}
    write_file(path, functools.partial(torch.save, content))


def find_weights(checkpoint):
    """The state dict in a file, of float32 tensors under plain names, without what wrappers put into them: "module."
    (several GPUs), "_orig_mod." (torch.compile), "ema_model." (an average; the other names are then left out)."""
    entries = [checkpoint.get(key) for key in ("ema", "model_ema", "ema_model", "model", "state_dict")] + [checkpoint]
    found = ({str(key): value.float() for key, value in entry.items()
              if torch.is_tensor(value) and value.is_floating_point()} for entry in entries if isinstance(entry, dict))
    tensors = next(filter(None, found), {})                  # without "n_averaged", a whole number
    averaged = {key: weight for key, weight in tensors.items() if "ema_model." in key} or tensors
    return {re.sub(r"\b(module|_orig_mod|ema_model)\.", "", key): weight for key, weight in averaged.items()}


def load_checkpoint(path, device="cpu", name=None):
    """The model of a checkpoint, in eval mode on `device`, and a dict with its `name` in PRESETS, `objective`,
    `sampling` and `classes`. Takes this program's files, those of facebookresearch/DiT, the public TinyFusion code and
    others that READERS know. name: of the preset, if the file is silent. Raises UserError for what does not fit."""
    checkpoint = read_checkpoint(path)
    weights = find_weights(checkpoint)
    says = {key: checkpoint.get(key) for key in ("args", "config", "objective")}
    says["args"] = says["args"] if isinstance(says["args"], dict) else getattr(says["args"], "__dict__", {})
    with blame(f"checkpoint {path}", "weights and config of one model"):
        silent = says["objective"] is None and "model" not in says["args"]   # `name` may then name any objective
        known = [read(weights, says) for read in READERS]
        require(any(known), f"checkpoint {path}: no weights of a model that this program knows: {[*weights][:3]}")
        found, config = next(filter(None, known))
        row = PRESETS[name or found]
        kinds = {(one["network"].func, one["network"].keywords["hidden_size"], silent or one["objective"])
                 for one in (row, PRESETS[found])}
        require(len(kinds) == 1, f"checkpoint {path} is a {found}, not a {name}: give that --model, or none")
        require(all(size <= len(weights) for key, size in config.items() if "depth" in key), f"{path}: too many blocks")
        with torch.device("meta"):               # nothing is allocated before the weights are known to fit
            model = PRESETS[found]["network"].func(**config)
        model.load_state_dict(weights, assign=True)
        bad = [key for key, weight in weights.items() if not weight.isfinite().all()]
        require(not bad, f"checkpoint {path}: {bad[:1]} is not finite; expected one saved before its training diverged")
        diffusion = row["objective"](model)
        sampling = {"steps": row["sample_steps"], "guidance": row["guidance"], **row["sampling"]}
        takes = inspect.signature(diffusion.sample).parameters
        sampling |= {key: value for key, value in dict(checkpoint.get("sampling", {})).items() if key in takes}
        classes = [str(word) for word in checkpoint.get("classes", range(model.num_classes))]
        fit = len(classes) == model.num_classes and all(isinstance(value, (int, float)) for value in sampling.values())
        require(fit, f"checkpoint {path}: its `sampling` or `classes` do not fit its model")
        sampling |= {} if model.y_embedder.dropout_prob else {"guidance": 1.0}       # no null label, no guidance
    return model.to(device).eval(), dict(name=name or found, objective=diffusion, sampling=sampling, classes=classes)


def sample_images(model, labels, indices, *, diffusion, seed, sampling, decode=to_uint8):
    """Images, by default uint8 (B, C, H, W), on the CPU, of `labels` (B,), from the noise of images `indices` of
    `seed`. sampling: arguments of the objective's `sample`; decode makes images of what it returns."""
    device = next(model.parameters()).device
    draw = noise_source(indices, (model.in_channels, model.input_size, model.input_size), seed, device)
    x = diffusion.sample(model, labels.to(device), draw, **sampling)
    require(x.isfinite().all(), "the model draws numbers that are not finite; expected one that has not diverged")
    return decode(x).cpu()


def text(sheet, xy, words, anchor="la", size=14, width=math.inf):
    """Words on a PIL image, in Pillow's own font, cut to a width in pixels."""
    font = ImageFont.load_default(size)
    while font.getlength(words) > width:
        words = words[:-1]
    ImageDraw.Draw(sheet).text(xy, words, fill=(40, 40, 40), font=font, anchor=anchor)


def image_grid(images, columns, names, titles=()):
    """A PIL image of uint8 images (N, C, H, W), row by row, small ones magnified to about 64 pixels. names: of classes,
    written above all or the first images. titles: of the rows, on the left."""
    tiles = F.interpolate(images.expand(-1, 3, -1, -1), scale_factor=max(1, 64 // images.shape[2]))
    # White: a line around every image, 18 rows above it for a name, and what the last row lacks.
    tiles = F.pad(tiles, (1, 1, 19, 1, 0, 0, 0, -len(images) % columns), value=255)
    height, width = tiles.shape[2:]
    pixels = tiles.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)    # (H, W, 3)
    left = 190 if titles else 0
    grid = ImageOps.expand(Image.fromarray(pixels.numpy()), (left, 0, 0, 0), "white")
    for i, name in enumerate(names):
        text(grid, (left + (i % columns + 0.5) * width, i // columns * height + 15), name, anchor="ms", width=width)
    for i, title in enumerate(titles):
        text(grid, (180, (i + 0.5) * height + 9), title, anchor="rm")        # 9: below the names
    return grid


def draw_decisions(history, groups, kept, confidence):
    """A PIL image: the probability of every block to be kept over the steps of learning. history: a list of (step,
    probabilities (L,)), from `learn_layers`; confidence: the smallest of the groups'."""
    p = np.array([probabilities for _, probabilities in history]).T          # (L, points)
    heat = Image.fromarray((255 * p).astype(np.uint8)).resize((600, 26 * len(p)), Image.Resampling.NEAREST)
    sheet = ImageOps.expand(ImageOps.colorize(heat, (244, 246, 250), (18, 62, 130)), (130, 50, 20, 40), "white")
    text(sheet, (130, 14), f"Probability to be kept (dark: 1, light: 0); confidence {confidence:.2f}", size=16)
    for block in range(len(p)):
        text(sheet, (120, 26 * block + 63), f"block {block}, {'kept' if block in kept else 'dropped'}", anchor="rm")
    for edge in itertools.accumulate([m for _, m in as_list(groups)], initial=0):            # a line between groups
        ImageDraw.Draw(sheet).line((0, 26 * edge + 50, sheet.width, 26 * edge + 50), fill=(120, 120, 120))
    text(sheet, (130, sheet.height - 34), f"steps {history[0][0]} to {history[-1][0]}, left to right")
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 10. Rules and stages
#
# Older methods drop the blocks that hurt least *now*. Here are five rules to compare with, functions of one shape,
# kept = rule(model, groups, diffusion, examples); the first three rank all blocks together, across groups. To compare,
# give each the same --ckpt, its own --out and --kd none (distillation would hide a bad choice); then print a --table.
#
# A run has four stages. The `run` that they share holds the flags, the model's row in PRESETS and what `set_up`
# (Chapter 11) adds: data, groups and so on. To redo a stage, delete its file of RESULTS; the later ones run again too.

def fixed_examples(data, n=512, seed=0, device="cpu", batch_size=128):
    """Batches (x0, y) of n examples in all, or of all there are, the same at every call: x0 (B, C, H, W), y (B,)."""
    chosen = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))[:n]
    return [(data.read(index).to(device), data.labels[index].to(device)) for index in chosen.split(batch_size)]


@torch.no_grad()
def calibration_loss(model, diffusion, examples):
    """A model's mean training loss on `fixed_examples`, a float, at the same times, with the same noise, every time."""
    torch.manual_seed(0)
    losses = [diffusion.training_losses(model, x, diffusion.sample_t(len(x), x.device), y)["loss"] for x, y in examples]
    loss = torch.cat(losses).mean().item()
    require(math.isfinite(loss), f"the model's loss on real images is {loss}; expected a model that has not diverged")
    return loss


def block_scores(model, diffusion, examples, score):
    """Every block's mean score, (L,). score(x, out) makes of a block's input and output (B, T, D) numbers (B,)."""
    model = copy.deepcopy(model)                 # the hooks are thrown away with it
    scores = {block: [] for block in model.blocks}
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, out: scores[block].append(score(args[0], out)))
    calibration_loss(model, diffusion, examples)
    return torch.stack([torch.cat(parts).mean() for parts in scores.values()])


def as_list(groups):
    """Groups as a list; a bare (N, L) is one large group."""
    return groups if isinstance(groups, list) else [groups]


def keep_highest(scores, groups):
    """As many blocks as the groups keep in all, those of the highest scores (L,), ascending."""
    count = sum(n for n, _ in as_list(groups))
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


def shortgpt(model, groups, diffusion, examples):
    """Drop blocks whose output points where their input did, but never the last. Source: ShortGPT, arXiv:2403.03853."""
    scores = -block_scores(model, diffusion, examples, lambda x, out: F.cosine_similarity(x, out, dim=-1).mean(1))
    scores[-1] = math.inf
    return keep_highest(scores, groups)


def flux_lite(model, groups, diffusion, examples):
    """Drop the blocks with the smallest mean squared difference of input and output. Source: Flux.1 Lite."""
    return keep_highest(block_scores(model, diffusion, examples, lambda x, out: mean_flat((out - x) ** 2)), groups)


def sensitivity(model, groups, diffusion, examples):
    """Drop the blocks whose removal, each alone, raises the loss least."""
    blocks = range(len(model.blocks))
    pruned = (prune(model, [j for j in blocks if j != i]) for i in blocks)
    return keep_highest(torch.tensor([calibration_loss(one, diffusion, examples) for one in pruned]), groups)


def oracle(model, groups, diffusion=None, examples=None):
    """Of every pair keep the first in the model's first half, else the second. Source: BK-SDM, arXiv:2305.15798."""
    depth = len(model.blocks)
    require(depth == 2 * sum(n for n, _ in as_list(groups)), "the oracle keeps one block of every pair: --groups 1:2")
    return [i if i < depth / 2 else i + 1 for i in range(0, depth, 2)]


def random_choice(model, groups, diffusion=None, examples=None):
    """One candidate of every group, all equally likely, by torch's random numbers."""
    return make_sampler(groups)(1)[0].nonzero().flatten().tolist()


CRITERIA = {"shortgpt": shortgpt, "flux-lite": flux_lite, "sensitivity": sensitivity, "oracle": oracle,
            "random": random_choice}
RESULTS = {"teacher": "teacher.pt", "learn": "layers.json", "recover": "student.pt", "measure": "results.json"}


def training(run, stage):
    """A stage's batches and its arguments of `train`; both start at its saved step."""
    steps = getattr(run, f"{stage}_steps")
    size = run.learn_size if stage == "learn" else run.batch_size
    seed = run.seed + list(RESULTS).index(stage)
    state = TrainingState(run.out / f"{stage}-state.pt")
    print(f"{stage}: from step {state.step} to {steps}, of {size} images each")
    loop = {"steps": steps, "lr": getattr(run, f"{stage}_lr"), "warmup": min(100, steps // 10),
            "ema_decay": run.ema_decay, "accumulate": run.accumulate, "seed": seed, "state": state,
            "on_step": logged(run.out / "log.jsonl", stage, steps, state.step)}
    return data_batches(run.data, size, seed, run.device, state.step, run.accumulate), loop


def stage_teacher(run, path):
    """Train the teacher from scratch, or take that of --ckpt."""
    model = run.teacher
    if not model:
        batches, loop = training(run, "teacher")
        model = run.ready(run.network())
        for table in model.y_embedder.parameters():
            nn.init.normal_(table, std=run.label_std)
        denoising = masked_denoising(run.diffusion, batches)                 # without masks
        model = train(model, lambda step: (denoising(model, lambda count: None), {}), final_lr_ratio=0.0, **loop)
    save_checkpoint(path, model, run.diffusion, run.sampling, run.data.classes)


def stage_learn(run, path):
    """Choose the blocks to keep: learn them (and draw decisions.png), or take those of a rule, or those named."""
    teacher = load_checkpoint(run.out / "teacher.pt")[0]     # on the CPU; a GPU needs only the copy that learns
    result = {"kept": run.named}
    if run.criterion in CRITERIA:
        result["kept"] = CRITERIA[run.criterion](teacher.to(run.device), run.groups, run.diffusion, run.examples)
    elif run.criterion == "learned":
        batches, loop = training(run, "learn")
        loop |= {"warmup": 0, "ema_decay": None, "update": run.update, "logits_lr": run.logits_lr, "prepare": run.ready}
        sampler, history = learn_layers(teacher, masked_denoising(run.diffusion, batches), run.groups, **loop)
        confidence = sampler.confidence().tolist()
        result = {"kept": sampler.kept(), "confidence": confidence, "history": history}
        picture = draw_decisions(history, run.groups, result["kept"], min(confidence))
        write_file(run.out / "decisions.png", lambda file: picture.save(file, "PNG"))
        print(f"confidence {min(confidence):.2f}, the smallest of {len(confidence)}")
    write_json(path, result)
    print(f"kept blocks {result['kept']} of {run.depth}")


def teacher_and_pruned(run):
    """The teacher, the blocks to keep of it, and the model that has only these."""
    teacher = run.ready(load_checkpoint(run.out / "teacher.pt")[0])
    with blame(run.out / "layers.json", "the kept blocks of this teacher; remove it, and they are chosen again"):
        kept = [int(i) for i in read_json(run.out / "layers.json")["kept"]]
        return teacher, kept, run.ready(prune(teacher, kept))


def stage_recover(run, path):
    """Fine-tune the pruned model with the teacher's help."""
    teacher, kept, student = teacher_and_pruned(run)
    batches, loop = training(run, "recover")
    pairs = match_blocks(run.groups, kept, itertools.accumulate(map(len, blocks_of(teacher))))
    student = recover(student, teacher, run.diffusion, batches, pairs, kd=run.kd, beta=run.beta, **loop)
    save_checkpoint(path, student, run.diffusion, run.sampling, run.data.classes, kept=kept)


def judge_of(run):
    """look(images), the statistics of real images, and the words of a toy judge on itself (None of Inception)."""
    look, words = (load_inception if run.inception else train_judge)(run.inception or run.data, run.device)
    if not run.inception or not run.ref:
        return look, statistics([look(images) for images in run.data.images.split(256)]), words
    real = statistics_of(run.ref, look)
    size = look(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))[0].shape[1]
    require(real["sigma"].shape == (size, size), f"--ref {run.ref}: expected {size} features, as --inception has")
    return look, real, words


def stage_measure(run, path):
    """Compare the three models. With --inception (hours of drawing) the pruned one draws only the 20 of the picture."""
    teacher, kept, pruned = teacher_and_pruned(run)
    models = {"teacher": teacher, "pruned": pruned, "student": run.ready(load_checkpoint(run.out / "student.pt")[0])}
    drawn = {name: model for name, model in models.items() if not (run.inception and name == "pruned")}
    order = run.data.labels.argsort(stable=True)             # by class
    chosen, shown = [order[torch.linspace(0, len(order) - 1, count).long()] for count in (run.samples, 20)]
    draw = functools.partial(sample_images, diffusion=run.diffusion, seed=run.seed, sampling=run.sampling,
                             decode=run.decode)
    look, real, judge = run.measures or judge_of(run)
    stats, seconds = draw_all(drawn, run.data.labels[chosen], draw, look)
    rows = {}
    pictures = {"real images": run.decode(run.data.read(shown).to(run.device)).cpu()}
    for name, model in models.items():
        row = rows[name] = {"depth": len(model.blocks), "parameters": sum(w.numel() for w in model.parameters())}
        if name in drawn:
            row |= compare_statistics(stats[name], real, run.device)
            speeds = {"images_per_second": 1 / seconds[name], "speed_up": seconds["teacher"] / seconds[name]}
            row |= {key: float(np.median(values)) if len(values) >= 5 else None for key, values in speeds.items()}
        row["loss"] = calibration_loss(model, run.diffusion, run.examples)
        if judge and len(run.data.classes) > 1:
            row["accuracy"] = float((stats[name]["p"].argmax(1) == run.data.labels[chosen].numpy()).mean())
        pictures[f"{name}, {len(model.blocks)} blocks"] = draw(model, run.data.labels[shown], range(20))
    names = [run.data.classes[y] for y in run.data.labels[shown].tolist()]
    sheet = image_grid(torch.cat(list(pictures.values())), len(names), names, pictures)
    write_file(run.out / "samples.png", lambda file: sheet.save(file, "PNG"))
    write_json(path, {"rows": rows, "kept": kept, "judge": judge, "conditions": run.conditions})


def run_stage(run, stage):
    """Run a stage, unless its file is there. (results.json, measured under other `conditions`, is made anew.)"""
    path = run.out / RESULTS[stage]
    before = read_json(path).get("conditions") if stage == "measure" and path.exists() else run.conditions
    if gather(path.exists() and before == run.conditions)[0]:                # all look before one of them writes
        print(f"{stage}: {path} is there and is used")
        return
    if before != run.conditions:
        print(f"{path} and samples.png, of {before}, are replaced")
    place = list(RESULTS).index(stage)
    for later in list(RESULTS)[place + 1:]:                  # what depends on this stage is outdated
        (run.out / RESULTS[later]).unlink(missing_ok=True)
        (run.out / f"{later}-state.pt").unlink(missing_ok=True)
    torch.manual_seed(run.seed + place)
    (stage_teacher, stage_learn, stage_recover, stage_measure)[place](run, path)
    gather()                                     # the others wait for the file
    (run.out / f"{stage}-state.pt").unlink(missing_ok=True)


def print_rows(rows, columns, toy=""):
    """Print these columns of dicts as a table (also in Markdown). toy: what stands before "FID"."""
    words = {"fid": f"{toy}FID", "is": "IS", "images_per_second": "images/s", "speed_up": "speed-up", None: "-"}
    forms = {float: "{:.4g}", int: "{:,}"}
    cells = [[forms.get(type(row.get(name)), "{}").format(words.get(row.get(name), row.get(name))) for name in columns]
             for row in [{name: name for name in columns}, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    print("\n" + "\n".join(f"| {' | '.join(map(str.rjust, row, widths))} |" for row in cells))


def print_results(results):
    """Print the content of results.json as a table, with the conditions of its figures."""
    rows = [{"model": name} | row for name, row in results["rows"].items()]
    print_rows(rows, rows[-1], "toy-" if results["judge"] else "")
    print("\n" + ", ".join(f"{name} {value}" for name, value in results["conditions"].items() if value is not None))
    if rows[-1]["speed_up"] is None:
        print("Speeds are medians over batches of 50 images; fewer than 5 batches show none.")
    if results["judge"]:
        print(f"Measured by a small classifier trained on this data: a toy-FID is no FID.\n{results['judge']}")
    elif results["conditions"]["samples"] < 2048:
        print("warning: an FID of fewer than 2,048 images is far too high")


def print_comparison(folder):
    """Print a row for every results.json below a folder, with those conditions that differ."""
    rows = []
    for path in sorted(Path(folder).rglob("results.json")):
        with blame(path, "a results.json of this program"):
            run = read_json(path)
            student = run["rows"]["student"]
            row = {"run": str(path.parent.relative_to(folder)), "kept blocks": " ".join(map(str, run["kept"])),
                   "loss after pruning": run["rows"]["pruned"]["loss"], "loss after recovery": student["loss"]}
            rows.append(row | student | run["conditions"])
    require(rows, f"--table {folder}: no results.json below it; expected a folder with the --out of finished runs")
    different = [name for name in CONDITIONS if len({row.get(name) for row in rows}) > 1]
    print_rows(rows, [*row, "fid", "speed_up", *different], "(toy-)")


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 11. The command line
#
# Most defaults come from the model's row in PRESETS (Chapter 9). settings.json keeps a run's RECIPE, data and teacher;
# another one is refused. CONDITIONS are those under which models are measured.

RECIPE = ("model", "seed", "batch_size", "teacher_steps", "teacher_lr", "learn_steps", "learn_lr", "logits_lr",
          "groups", "criterion", "update", "recover_steps", "recover_lr", "kd")
CONDITIONS = ("samples", "sample_steps", "guidance", "inception", "ref", "vae")


def parse_groups(pattern, depth):
    """The groups [(N, M), ...] that "1:2" or "2:4,3:4,..." means, repeated to fill the depth; for "14", to keep 14 of
    all blocks, the pair (14, depth). Raises ValueError where it does not fit `depth` blocks."""
    if pattern.isdecimal() and 1 <= int(pattern) <= depth:
        return int(pattern), depth
    groups = [(int(n), int(m)) for n, m in re.findall(r"(\d+):(\d+)", pattern)]
    groups *= depth // max(1, sum(m for _, m in groups))
    if not re.fullmatch(r"\d+:\d+(,\d+:\d+)*", pattern) or sum(m for _, m in groups) != depth:
        raise ValueError(f"groups {pattern!r}: expected N:M, as 2:4,3:4, to fill {depth} blocks, or how many to keep")
    return groups


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line. Numbers must be positive (some may be 0), and text UTF-8."""

    def error(self, message):
        raise UserError(message)

    def parse_known_args(self, *args):           # parse_args calls it too
        found = super().parse_known_args(*args)
        for name, value in vars(found[0]).items():
            flag = f"--{name.replace('_', '-')} {value}"
            require(flag.encode(errors="replace").decode() == flag, f"{flag}: expected a name in UTF-8; rename it")
            least = 0 if name in ("seed", "guidance", "eta", "temperature") else sys.float_info.min
            fits = type(value) not in (int, float) or least <= value < 2 ** 32
            require(fits, f"{flag}: expected a number {'above' if least else 'from'} 0, below 2^32")
        return found


def make_parser(preset):
    """The flags, with the defaults of a row of PRESETS."""
    parser = Parser(usage="tinyfusion.py [flags]", description="Without flags: the whole story.", allow_abbrev=False)
    add = parser.add_argument_group("run").add_argument
    add("--model", metavar="NAME", choices=PRESETS, help=f"one of {', '.join(PRESETS)}; --help shows its defaults")
    add("--ckpt", metavar="FILE", help="start from this teacher, official or ours")
    add("--data", metavar="DIR", help="images, one sub-folder per class, or latents (without it: drawn digits)")
    add("--image-size", type=int, metavar="N", help="side of the images (%(default)s)")
    add("--out", metavar="DIR", help="folder of the results, and of a stopped run to go on with (runs/NAME)")
    add("--stages", default=",".join(RESULTS), metavar="LIST", help="all or some in a row of %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="seed of everything random (%(default)s)")
    add("--device", type=pick_device, default="", metavar="NAME", help="cpu, cuda:1 ... (the first GPU, if any)")
    add("--batch-size", type=int, metavar="N", help="images per step, all processes together (%(default)s)")
    add("--accumulate", type=int, default=1, metavar="N", help="cut batches into N parts to save memory (%(default)s)")
    add("--compile", action="store_true", help="torch.compile the blocks: a slow start, faster steps")
    add = parser.add_argument_group("teacher, learning which blocks to keep, recovery").add_argument
    for stage in ("teacher", "learn", "recover"):
        add(f"--{stage}-steps", type=int, metavar="N", help="training steps, of a batch each (%(default)s)")
        add(f"--{stage}-lr", type=float, metavar="X", help="learning rate of the weights (%(default)s)")
    add("--logits-lr", type=float, metavar="X", help="learning rate of the mask's logits (%(default)s)")
    add("--groups", default="1:2", metavar="N:M", help="N of every M blocks; 2:4,3:4,...; or N, of all (%(default)s)")
    add("--criterion", default="learned", help=f"learned, blocks as in 0,2,5, {', '.join(CRITERIA)} (%(default)s)")
    add("--update", default="lora", choices=("lora", "full", "frozen"), help="what trains with the mask (%(default)s)")
    add("--kd", default="masked", choices=KD_MODES, help="masked: without the teacher's outliers (%(default)s)")
    add = parser.add_argument_group("measuring").add_argument
    add("--samples", type=int, metavar="N", help="images drawn from each model (%(default)s)")
    add("--sample-steps", type=int, metavar="N", help="sampling steps per image (%(default)s)")
    add("--guidance", type=float, metavar="X", help="guidance scale, 1 is without (%(default)s)")
    add("--vae", metavar="NAME", help="autoencoder of latents, on Hugging Face or a folder (needs diffusers)")
    add("--inception", metavar="FILE", help="measure FID by this TorchScript network instead of toy-FID")
    add("--ref", metavar="PATH", help="what FID compares with: a folder of images, or .npz with arr_0 or mu and sigma")
    add = parser.add_argument_group("instead of a run").add_argument
    add("--encode", metavar="DIR", help="encode a folder of images with --vae into latents in --out")
    add("--fid", metavar="PATH", help="only compare these images (a folder or .npz) with --ref")
    add("--table", metavar="DIR", help="only print a table of all finished runs below this folder")
    parser.set_defaults(**{"teacher": None, "classes": ()} | preset)         # also what has no flag, such as `network`
    return parser


def parse_args(argv):
    """The flags as a namespace, with the row of PRESETS and `teacher`, the model of --ckpt, with its `classes`."""
    # The model comes first: it gives the other flags their defaults, which --help shows.
    given, _ = make_parser(PRESETS["toy"]).parse_known_args([word for word in argv if word not in ("-h", "--help")])
    known = {"model": given.model or "toy", "image_size": 256 if given.encode else 16}
    if given.ckpt:
        teacher, content = load_checkpoint(given.ckpt, name=given.model)
        known = {"model": content["name"], "teacher": teacher, "classes": content["classes"],
                 "image_size": teacher.input_size, "guidance": content["sampling"]["guidance"]}
    args = make_parser(PRESETS[known["model"]] | known).parse_args(argv)
    require(f",{args.stages}," in f",{','.join(RESULTS)},", f"--stages: expected {','.join(RESULTS)} or a part of it")
    require(not args.encode or args.vae and args.out, "--encode goes with --vae NAME and --out, the folder to write to")
    require(not args.fid or args.ref, "--fid goes with --ref")
    require(not args.ref or args.fid or args.inception, "--ref goes with --inception, or with --fid")
    args.out = Path(args.out or Path("runs", Path(args.data or args.model.replace("/", "-")).resolve().name))
    images = args.data and not Path(args.data, "latents.npy").exists()
    inside = images and args.out.resolve().is_relative_to(Path(args.data).resolve())
    require(not inside, f"--out {args.out} lies in --data, where images are looked for: choose another --out")
    return args


def set_up(run):
    """Add to the flags, in place, what the stages share: data, network, groups, objective and so on."""
    run.data = open_data(run.data, run.image_size, len(run.classes)) if run.data else toy_digits(size=run.image_size)
    run.data = match_classes(run.data, run.classes or run.data.classes)
    C, side, _ = run.data.shape
    run.network = functools.partial(run.network, input_size=side, in_channels=C, num_classes=len(run.data.classes))
    run.ready = lambda model: compiled(model.to(run.device), run.compile)
    with torch.device("meta"):                   # weights with shapes and no memory
        model = run.teacher or run.network()
    settings = {name: getattr(run, name) for name in RECIPE} | {"data": run.data.describe(), "image_size": side}
    settings["ckpt"] = run.teacher and f"checksum {zlib.crc32(Path(run.ckpt).read_bytes()):08x}"
    run.depth = len(model.blocks)
    with blame(f"--criterion {run.criterion}", f"learned, {', '.join(CRITERIA)}, or blocks as in 0,2,5"):
        run.named = [] if run.criterion in ("learned", *CRITERIA) else [*map(int, run.criterion.split(","))]
    run.groups = (len(run.named), run.depth) if run.named else parse_groups(run.groups, run.depth)
    run.diffusion = run.objective(model)
    run.sampling = {"steps": run.sample_steps, "guidance": run.guidance, "clip_denoised": not run.data.latent,
                    **run.sampling}
    run.learn_size = max(1, int(run.batch_size * run.learn_batch))
    run.conditions = {name: getattr(run, name) for name in CONDITIONS}
    check_run(run, model)
    run.examples = fixed_examples(run.data, device=run.device)               # of the rules, and of the table's loss
    run.decode = VAE(run.vae, run.device, C).decode if run.data.latent and run.vae else to_uint8
    run.measures = judge_of(run) if run.inception and "measure" in run.stages else None  # mistakes show before the work
    run.out.mkdir(parents=True, exist_ok=True)
    claim(run.out / "settings.json", settings)
    print(f"{settings['data']}, {run.data.shape}; {run.model} with {run.depth} blocks, {world_size()} x {run.device}")


def check_run(run, model):
    """Raise UserError or ValueError for what flags, files and shapes alone show to be wrong, before the first step."""
    expected = (model.in_channels, model.input_size, model.input_size)
    require(run.data.shape == expected, f"--ckpt takes {expected}, not {run.data.shape}; --encode makes latents")
    count = len(run.data.labels)
    require(count >= max(20, run.batch_size), f"{count} examples: fewer than 20 or than --batch-size {run.batch_size}")
    parts = world_size() * run.accumulate
    fits = run.batch_size % parts == run.learn_size % parts == 0
    require(fits, f"--batch-size {run.batch_size} ({run.learn_size} to learn) cannot be cut into {parts} parts")
    choose = oracle if run.criterion == "oracle" else random_choice          # which refuses groups as learning would
    check_kept(run.named or choose(model, run.groups), run.depth)
    for stage in itertools.takewhile(lambda stage: stage not in run.stages, RESULTS):
        require((run.out / RESULTS[stage]).exists(), f"{run.out / RESULTS[stage]} is missing: add {stage} to --stages")
    run.diffusion.check_steps(run.sample_steps)
    require(run.samples >= 4 and run.samples % world_size() == 0, "--samples: expected 4 or more, in equal shares")
    require(run.guidance == 1 or model.y_embedder.dropout_prob, "the model has no null label: only guidance 1 fits")
    require(not run.data.latent or "measure" not in run.stages or run.vae and run.inception and run.ref,
            "latents are measured with --vae, --inception and --ref; without these: --stages teacher,learn,recover")


def run_program(args):
    """Do what the flags say."""
    with processes():
        if args.table:
            print_comparison(args.table)
        elif args.fid:
            look = load_inception(args.inception, args.device)[0] if args.inception else None
            fake = statistics_of(args.fid, look)
            row = compare_statistics(fake, statistics_of(args.ref, look), args.device)
            print_rows([row], row)
            print(f"{args.fid} ({len(fake.get('p', ())) or '?'} samples, {fake.get('settings', '?')}) vs. {args.ref}")
        elif args.encode:
            encode_images(args.encode, args.image_size, VAE(args.vae, args.device), args.out, args.vae)
        else:
            set_up(args)
            for stage in args.stages.split(","):
                run_stage(args, stage)
            if "measure" in args.stages:
                with blame(args.out / "results.json", "figures of this program; remove it to measure again"):
                    print_results(read_json(args.out / "results.json"))
            print(f"\nresults in {args.out}/")


def guarded(prog, body):
    """Run body(). A user's mistake, full disk or memory, or Ctrl-C is one line. Returns the status: 0, 2 or 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):             # a line at a time, also into a file; ASCII is enough
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        body()
        return 0
    except KeyboardInterrupt:
        print(f"{prog}: stopped; all files are whole; a run goes on with the same command", file=sys.stderr)
        return 130
    except (UserError, ValueError, OSError, FloatingPointError) as error:    # all say what is wrong
        words = " ".join(str(error).split())
    except (MemoryError, RuntimeError) as error:
        words = "out of memory; a smaller --batch-size, or --accumulate 2 in training, takes less"
        if "No working C++ compiler" in str(error):
            words = "--compile needs a C++ compiler: install one, such as g++, or leave the flag out"
        elif not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
    print(f"{prog}: {words}", file=sys.stderr)
    return 2


def main(argv=None):
    """The program; returns its exit status."""
    return guarded("tinyfusion.py", lambda: run_program(parse_args(sys.argv[1:] if argv is None else argv)))


# ---------------------------------------------------------------------------------------------------------------------
# Appendix A. Any other model
#
# The method needs little from a model: lists of residual blocks and a loss. `set_mask` runs a model that is not ours
# under a mask. `drop_blocks` then takes blocks out of it: what is left in their places keeps the others' numbers.

def set_mask(model, mask, lists=None, streams=()):
    """Run a model that is not ours under a mask (B, L), in place, until set_mask is called again; None takes it off.
    The model is called as ever, on B examples, and gradients reach the mask. Every block runs on the whole batch, and a
    hook blends its streams with its inputs, x <- m * out + (1 - m) * x.
    lists as in `blocks_of`. streams: the arguments that run through the blocks, in the order in which a block returns
    them, such as ("encoder_hidden_states", "hidden_states") for Flux and SD3; by default the first one. What a block
    returns beyond those that it is given passes untouched, and so does a stream for which it returns None. Two streams
    of one shape in the wrong order, or one left out, give wrong values. (To see it: a mask of ones must not change the
    output, nor `drop_blocks` the masked one.) Caches are refused; activation checkpointing works. On a CPU a step of
    learning takes 1.4 to 2 times as long as with `masked_forward`."""
    blocks = [block for blocks in blocks_of(model, lists) for block in blocks]
    for block in blocks:
        if "mask_hook" in vars(block):
            vars(block).pop("mask_hook").remove()
    if mask is None:
        return
    if mask.dim() != 2 or mask.shape[1] != len(blocks):
        raise ValueError(f"mask is {tuple(mask.shape)}, expected (examples, {len(blocks)} blocks)")
    for block, m in zip(blocks, mask.unbind(1)):
        hook = functools.partial(blend, streams, m)          # before other hooks, which see what is handed on
        block.mask_hook = block.register_forward_hook(hook, prepend=True, with_kwargs=True)


def given_streams(signature, streams, args, kwargs):
    """Of the arguments of a block's call the streams: {name: tensor}."""
    given = signature.bind(*args, **kwargs).arguments | kwargs
    caches = ("cache", "past_key_value", "past_key_values", "layer_past", "kv_cache")
    if any(given.get(name) is not None for name in caches):
        raise ValueError("a masked block cannot fill a cache: call the model with use_cache=False")
    found = {name: given[name] for name in streams or list(given)[:1] if torch.is_tensor(given.get(name))}
    if not found:
        raise ValueError(f"a block is given {list(given)}: none of the streams {streams or 'by default, the first'}")
    return found


def in_and_out(block, streams, args, kwargs, out, B=None):
    """The streams that a block was given, {name: tensor}, and the list of what it returned, checked to fit them."""
    inputs = given_streams(inspect.signature(block.forward), streams, args, kwargs)
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    shapes = [None if new is None else tuple(new.shape) for new in outs[:len(inputs)]]
    expected = {stream: tuple(x.shape) for stream, x in inputs.items()}
    fits = len(shapes) == len(inputs) and all(new in (None, x) for new, x in zip(shapes, expected.values()))
    if not fits or any(B not in (None, x[0]) for x in expected.values()):
        raise ValueError(f"{type(block).__name__} returns {shapes} for the streams {expected}: expected equal shapes, "
                         f"the batch of {B or 'any'} first; check the names and the order of the streams")
    return inputs, outs


def blend(streams, m, block, args, kwargs, out):
    """The hook of `set_mask`: what a block hands on where its column of the mask is m (B,)."""
    inputs, outs = in_and_out(block, streams, args, kwargs, out, len(m))
    for i, x in enumerate(inputs.values()):
        if outs[i] is not None:
            keep = exact_mask(m, outs[i].dtype).view(-1, *[1] * (x.dim() - 1))
            outs[i] = keep * outs[i] + (1 - keep) * x
    return type(out)(outs) if isinstance(out, (tuple, list)) else outs[0]


class Dropped(nn.Module):
    """In the place of a dropped block: it hands on its streams and has the block's plain attributes, but no weights."""

    def __init__(self, block, streams):
        super().__init__()
        plain = {key: value for key, value in vars(block).items() if isinstance(value, (str, int, float, type(None)))}
        vars(self).update(plain | vars(self))
        self.streams_of = functools.partial(given_streams, inspect.signature(block.forward), streams)

    def forward(self, *args, **kwargs):
        inputs = tuple(self.streams_of(args, kwargs).values())
        return inputs if len(inputs) > 1 else inputs[0]


def check_outputs(streams, block, args, kwargs, out):
    """A hook of the blocks that `drop_blocks` keeps: they must return what a `Dropped` returns, and nothing else."""
    inputs, outs = in_and_out(block, streams, args, kwargs, out)
    if len(outs) != len(inputs) or torch.is_tensor(out) != (len(outs) == 1):
        raise ValueError(f"{type(block).__name__} returns a {type(out).__name__} of {len(outs)} for the streams "
                         f"{list(inputs)}: drop_blocks cannot stand in for it; `prune` serves models that do not count")


def drop_blocks(model, kept, lists=None, streams=()):
    """A copy of a model that is not ours, in which the blocks not in `kept` hand on their streams: it computes what
    `set_mask` computed. Nothing is numbered anew, so that all that counts blocks (configuration, tables, U-skips) stays
    right. To load its state_dict, build the original and drop the same blocks first (from_pretrained would fill dropped
    blocks with random weights). Parts of a block that the model reads itself are gone with it: block 0 of diffusers'
    DiT must stay. Blocks that return other things than their streams are refused by name, in the first call."""
    model = copy_to_prune(model, kept, lists)
    places = [(blocks, place) for blocks in blocks_of(model, lists) for place in range(len(blocks))]
    for number, (blocks, place) in enumerate(places):
        if number in kept:
            blocks[place].register_forward_hook(functools.partial(check_outputs, streams), with_kwargs=True)
        else:
            blocks[place] = Dropped(blocks[place], streams)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Appendix B. Without groups
#
# Groups have walls: 1:2 groups reach only 1.7 % of DiT-XL's masks with half of the blocks, and a group must keep N of
# its blocks however good or bad they all are. This sampler, which goes beyond the paper, has none: `--groups 6`.

class TopNSampler(nn.Module):
    """A learnable distribution over the masks that keep n of `depth` blocks, wherever they are: one logit per block.
    Add Gumbel noise to every logit and keep the n largest: sampling without replacement (arXiv:1903.06059; here too the
    parameters are the logits divided by `scale`). For the gradient, with k_i for the sum of logit and noise, the draw
    is relaxed to s_i = sigmoid((k_i - c) / tau), with a threshold c for which the s_i sum to n. Source: ours.
    c moves with the keys. Differentiating sum s_i = n gives sum s_i (1 - s_i) (dk_i - dc) = 0, so dc = sum w_i dk_i,
    with weights w_i in proportion to s_i (1 - s_i). The gradients that reach the keys then sum to 0: a block gains only
    what others lose. With a constant c all logits would drift together."""

    def __init__(self, n, depth):
        super().__init__()
        if not 1 <= n <= depth:
            raise ValueError(f"keep {n} blocks: expected a number from 1 to {depth}")
        self.n = n
        self.logits = nn.Parameter(torch.zeros(depth))

    def forward(self, batch_size, tau=1.0, scale=100.0, generator=None):
        """One independent mask per example: (B, L), exactly n ones, with the gradient of the mask relaxed at tau."""
        noise = self.logits.new_empty(batch_size, len(self.logits)).exponential_(generator=generator)
        keys = self.logits * scale - noise.log()             # (B, L); -noise.log() is Gumbel noise
        hard = torch.zeros_like(keys).scatter(1, keys.topk(self.n).indices, 1.0)
        soft = self.relaxed(keys, tau)
        return hard + (soft - soft.detach())

    def relaxed(self, keys, tau):
        """The mask of keys (B, L) with values between 0 and 1 that sum to n, (B, L)."""
        with torch.no_grad():                    # the threshold, by bisection
            low = keys.amin(1, keepdim=True) - 30 * tau      # sigmoid(30) rounds to 1
            high = keys.amax(1, keepdim=True) + 30 * tau
            for _ in range(40):                  # halvings, down to float32's rounding
                c = (low + high) / 2
                too_many = torch.sigmoid((keys - c) / tau).sum(1, keepdim=True) > self.n
                low = torch.where(too_many, c, low)
                high = torch.where(too_many, high, c)
            s = torch.sigmoid((keys - c) / tau)
            w = s * (1 - s)
            w = w / w.sum(1, keepdim=True).clamp(min=1e-20)
        c = c + (w * (keys - keys.detach())).sum(1, keepdim=True)        # the same number, with its gradient
        return torch.sigmoid((keys - c) / tau)

    @torch.no_grad()
    def keep_probability(self, scale=100.0):
        """The probability (L,) of every block to be kept, estimated from 1,000 draws: 0.47 to 0.52 where it is 0.5."""
        generator = torch.Generator(self.logits.device).manual_seed(0)
        return self(1000, 1.0, scale, generator).mean(0)

    def confidence(self, scale=100.0):
        """The probability (n,) of each of the blocks in `kept` to be kept: near 1 when the decision is made."""
        return self.keep_probability(scale)[self.kept()]

    def kept(self):
        """The blocks to keep, ascending: those of the n largest logits."""
        return sorted(self.logits.topk(self.n).indices.tolist())


SAMPLERS[tuple] = lambda groups: TopNSampler(*groups)


# ---------------------------------------------------------------------------------------------------------------------
# Appendix C. SiT
#
# SiT (arXiv:2401.08740) is DiT's network with another objective, flow matching: x_t lies on the straight line from
# noise to image, and the model predicts the velocity along it. Its t runs the other way: 0 is noise, 1 is the image.

class FlowMatching(Objective):
    """The linear interpolant of SiT: x_t = t x0 + (1 - t) noise, with t from 0 (noise) to 1 (the image x0). The model
    gets t and predicts the velocity x0 - noise in the first half of its output channels; the second half, which
    official SiT checkpoints have, is not used. Source: arXiv:2401.08740."""
    name = "flow"

    def sample_t(self, batch_size, device=None):
        return torch.rand(batch_size, device=device)

    def q_sample(self, x0, t, noise):
        t = t.view(-1, 1, 1, 1)
        return t * x0 + (1 - t) * noise

    def check_steps(self, steps):
        """Any number is possible."""

    def losses(self, model_output, x0, x_t, t, noise):
        mse = self.distillation_losses(model_output, x0 - noise, x_t, t)             # the teacher: the true velocity
        return {"mse": mse, "loss": mse}

    def distillation_losses(self, student_output, teacher_output, x_t, t):
        """Mean squared error (B,) between two models' velocities at the same x_t and t."""
        C = x_t.shape[1]
        return mean_flat((student_output[:, :C].float() - teacher_output[:, :C].float()) ** 2)

    @torch.inference_mode()
    def sample(self, model, y, draw, steps=250, guidance=1.0, solver="heun", clip_denoised=False, cfg_channels=3,
               dtype=None):
        """Images (B, C, H, W) of the classes y (B,): dx/dt = velocity, from noise at t = 0 to t = 1 in even steps, by
        "euler", or "heun", which corrects a step by the velocity at its end, a second call of the model. clip_denoised
        clips the final image. The rest as for `GaussianDiffusion.sample`. (The paper's FID of 2.06 was sampled by an
        SDE, which this file does not have; 250 steps of heun are 500 calls.)"""
        if solver not in ("euler", "heun"):
            raise ValueError(f"solver {solver!r}: expected euler or heun")

        def velocity(x, t):
            t = torch.full((1,), t, device=y.device)
            with autocast(y.device, dtype):
                out = model(x, t, y) if guidance == 1 else model.forward_with_cfg(x, t, y, guidance, cfg_channels)
            return out[:, :x.shape[1]].float()
        x = draw()
        h = 1 / steps
        for i in range(steps):
            v = velocity(x, i * h)
            if solver == "heun":
                v = (v + velocity(x + h * v, (i + 1) * h)) / 2
            x = x + h * v
        return x.clamp(-1, 1) if clip_denoised else x


SIT = {"objective": lambda model: FlowMatching(), "beta": 2e-4}
PRESETS |= {name.replace("DiT", "SiT"): PRESETS[name] | SIT for name in DiT_models if "DiT" in name}
PRESETS["SiT-toy"] = PRESETS["toy"] | SIT


def read_sit(weights, says):
    """One of READERS, as `read_dit`: a file of ours says that its objective is "flow"; one of official training names
    its model. (A plain state dict looks like a DiT's: give --model.)"""
    args = says["args"]
    if says["objective"] != "flow" and not str(args.get("model")).startswith("SiT"):
        return None
    kind = f"prediction {args.get('prediction', 'velocity')}, path {args.get('path_type', 'Linear')}"
    require(kind == "prediction velocity, path Linear", f"a SiT of {kind}; expected prediction velocity, path Linear")
    _, config = read_dit(weights, says | {"args": args | {"model": "DiT"}, "objective": None})
    return fitting_preset([name for name in PRESETS if "SiT" in name], config)


READERS.append(read_sit)


# ---------------------------------------------------------------------------------------------------------------------
# Appendix D. MAR
#
# MAR (arXiv:2406.11838) is another network. It draws an image a few tokens at a time, in random order. The encoder
# reads the known tokens; the decoder outputs a condition vector z for each missing one; and a small MLP, the head,
# draws that token by a diffusion of its few numbers alone, given z:
#
#     known tokens -> encoder blocks -+                       z of each token to be drawn now
#                                     +-> decoder blocks -> z      |
#     mask tokens for the others -----+                          head: noise -> ... -> that token
#
# For Chapters 2 to 5 this is a diffusion in which every token has its own time; a known token has time -1. The blocks
# are expensive, the head is cheap: a batch passes through the blocks once, and its missing tokens are noised R times.
# Times t (R * B, T) of B = 2 images of T = 5 tokens, R = 2:
#
#     image 0     -1  310   -1   52  700    \  first copy       image 0 knows tokens 0 and 2,
#     image 1    874   -1   -1  415    6    /                   image 1 knows tokens 1 and 2;
#     image 0     -1    9   -1  640  233    \  second copy      both copies know the same ones,
#     image 1    128   -1   -1  990  501    /                   with other times for the rest
#
# Blocks of encoder and decoder share one numbering, and are learned and pruned together. The head stays. (A mask token
# is a learned placeholder, no mask of blocks.) More letters for shapes: F numbers in a token, n noisy tokens in all.

def patchify(x, T, copies=1):
    """`copies` of images (B, C, H, W) as T square patches (copies * B, T, C * P * P), row by row, channels first."""
    P = math.isqrt(x.shape[2] * x.shape[3] // T)
    return F.unfold(x, P, stride=P).transpose(1, 2).repeat(copies, 1, 1)


class Block(nn.Module):
    """A residual block without conditioning, as in a plain vision transformer: (B, T, D) to (B, T, D)."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, dropout)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), "none", dropout)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ResBlock(nn.Module):
    """A residual block of the head: n tokens x (n, 1, channels), each under its condition c (n, channels)."""

    def __init__(self, channels):
        super().__init__()
        self.in_ln = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 3 * channels))

    def forward(self, x, c):
        shift, scale, gate = self.adaLN_modulation(c).chunk(3, dim=1)
        return x + gate.unsqueeze(1) * self.mlp(modulate(self.in_ln(x), shift, scale))


class SimpleMLPAdaLN(nn.Module):
    """MAR's head: n noisy tokens x (n, F), their times t (n,) or (1,), vectors c (n, D) to noise, variance (n, 2F)."""

    def __init__(self, in_channels, model_channels, z_channels, num_res_blocks):
        super().__init__()
        self.time_embed = TimestepEmbedder(model_channels)
        self.cond_embed = nn.Linear(z_channels, model_channels)
        self.input_proj = nn.Linear(in_channels, model_channels)
        self.res_blocks = nn.ModuleList([ResBlock(model_channels) for _ in range(num_res_blocks)])
        self.final_layer = FinalLayer(model_channels, 1, 2 * in_channels)

    def forward(self, x, t, c):
        c = self.time_embed(t) + self.cond_embed(c)          # (n, model_channels)
        x = self.input_proj(x).unsqueeze(1)      # each token is a sequence of one
        for block in self.res_blocks:
            x = block(x, c)
        return self.final_layer(x, c).squeeze(1)


class MAR(nn.Module):
    """Masked autoregressive transformer. The defaults are MAR-L on 16x16 latents, of 16 channels, of 256x256 images:
    478,326,304 parameters. buffer_size: copies of the class vector before the tokens; diffloss_w, diffloss_d: width and
    blocks of the head. Source: LTH14/mar, models/mar.py (names, initialisation and numerics; the text is ours)."""
    block_lists = ("encoder_blocks", "decoder_blocks")

    def __init__(self, input_size=16, patch_size=1, in_channels=16, hidden_size=1024, encoder_depth=16,
                 decoder_depth=16, num_heads=16, mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000,
                 buffer_size=64, diffloss_w=1280, diffloss_d=8, dropout=0.1):
        given = locals()
        super().__init__()
        self.sizes = {name: given[name] for name in inspect.signature(MAR).parameters}       # the arguments
        vars(self).update(self.sizes)
        if input_size % patch_size or hidden_size % num_heads:
            raise ValueError(f"input_size must be a multiple of patch_size, hidden_size of num_heads: {self.sizes}")
        T = self.num_tokens = (input_size // patch_size) ** 2
        D = hidden_size
        self.y_embedder = LabelEmbedder(num_classes, 0, class_dropout_prob)
        self.y_embedder.embedding_table = nn.Identity()      # it drops labels; their vectors are MAR's own
        self.class_emb = nn.Embedding(num_classes, D)
        self.fake_latent = nn.Parameter(0.02 * torch.randn(1, D))        # the vector of "no class"
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, D))
        self.z_proj = nn.Linear(in_channels * patch_size ** 2, D)
        self.z_proj_ln = nn.LayerNorm(D, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(0.02 * torch.randn(1, buffer_size + T, D))
        self.encoder_blocks = nn.ModuleList([Block(D, num_heads, mlp_ratio, dropout) for _ in range(encoder_depth)])
        self.encoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_embed = nn.Linear(D, D)
        self.decoder_pos_embed_learned = nn.Parameter(0.02 * torch.randn(1, buffer_size + T, D))
        self.decoder_blocks = nn.ModuleList([Block(D, num_heads, mlp_ratio, dropout) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(0.02 * torch.randn(1, T, D))
        head = SimpleMLPAdaLN(self.z_proj.in_features, diffloss_w, D, diffloss_d)
        self.diffloss = nn.ModuleDict({"net": head})         # official names
        initialize(self, [self.class_emb, head.time_embed.mlp[0], head.time_embed.mlp[2]])

    @property
    def blocks(self):
        return [*self.encoder_blocks, *self.decoder_blocks]

    def config(self):
        """As `DiT.config`."""
        return {**self.sizes, "encoder_depth": len(self.encoder_blocks), "decoder_depth": len(self.decoder_blocks)}

    def condition(self, x, known, y, mask=None, hidden=()):
        """Encoder and decoder: tokens x (B, T, F), of which only the `known` ones (B, T) are read, equally many in each
        example, and labels y (B,), to z (B, T, D) and the outputs of the `hidden` blocks, (B, buffer + known, D) in the
        encoder, (B, buffer + T, D) in the decoder."""
        E = len(self.encoder_blocks)
        readable = torch.cat([known.new_ones(len(x), self.buffer_size), known], 1).nonzero(as_tuple=True)
        encoder_mask, decoder_mask = (None, None) if mask is None else (mask[:, :E], mask[:, E:])

        vectors = torch.cat([self.class_emb.weight, self.fake_latent])   # (classes + 1, D)
        buffer = F.embedding(self.y_embedder(y), vectors).unsqueeze(1).expand(-1, self.buffer_size, -1)
        x = self.z_proj_ln(torch.cat([buffer, self.z_proj(x)], 1) + self.encoder_pos_embed_learned)
        x = x[readable].view(len(y), -1, self.hidden_size)   # (B, buffer + known, D)
        x, features = masked_forward(self.encoder_blocks, x, mask=encoder_mask, hidden=hidden)
        x = self.decoder_embed(self.encoder_norm(x))
        full = self.mask_token.to(x.dtype).repeat(len(y), buffer.shape[1] + known.shape[1], 1)   # (B, buffer + T, D)
        full[readable] = x.flatten(0, 1)
        x, more = masked_forward(self.decoder_blocks, full + self.decoder_pos_embed_learned, mask=decoder_mask,
                                 hidden=[i - E for i in hidden])
        return self.decoder_norm(x)[:, self.buffer_size:] + self.diffusion_pos_embed_learned, features + more

    def forward(self, x, t, y, mask=None, hidden=None):
        """Predict the noise and the variance in the noisy tokens among x (R * B, T, F): (n, 2F), a row for each.
        t (R * B, T): their times, -1 for known tokens; y (B,) labels; mask (B, L) and hidden as for DiT. The R copies
        of the batch share their known tokens, so the blocks run once."""
        z, features = self.condition(x[:len(y)], t[:len(y)] < 0, y, mask, hidden or ())
        noisy = (t >= 0).nonzero(as_tuple=True)              # one wait for a GPU; t >= 0 as an index has one a use
        out = self.diffloss["net"](x[noisy], t[noisy], z.repeat(len(x) // len(y), 1, 1)[noisy])
        return out if hidden is None else (out, features)


class MaskedAutoregression(Objective):
    """MAR's objective. A share of an image's tokens is known; each of the others is noised by itself, with a cosine
    schedule. num_tokens: T; repeats: R. Times t (R * B, T) and x_t are of tokens, noise is (R * B, C, H, W), distances
    are (R * B,). Source: arXiv:2406.11838 and LTH14/mar."""
    name = "mar"

    def __init__(self, num_tokens=256, *, repeats=4):
        abar = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2   # arXiv:2102.09672
        self.diffusion = GaussianDiffusion(np.minimum(1 - abar[1:] / abar[:-1], 0.999))          # that of one token
        self.num_tokens = num_tokens
        self.repeats = repeats

    def sample_t(self, batch_size, device=None):
        """Training times (R * B, T) of random tokens; the rest are known. The share of noised tokens, the same in all
        examples, is drawn from a normal distribution of mean 1 and standard deviation 0.25, cut to [0.7, 1]."""
        missing = math.ceil(self.num_tokens * nn.init.trunc_normal_(torch.empty(()), 1.0, 0.25, 0.7, 1.0).item())
        order = torch.rand(batch_size, self.num_tokens, device=device).argsort(1)
        known = torch.ones_like(order, dtype=torch.bool).scatter(1, order[:, :missing], False)   # (B, T)
        t = self.diffusion.sample_t(self.repeats * batch_size * self.num_tokens, device)
        return t.view(-1, self.num_tokens).masked_fill(known.repeat(self.repeats, 1), -1)

    def noise(self, x0, t):
        """Standard normal noise (R * B, C, H, W) for images x0 (B, C, H, W)."""
        return torch.randn(len(t), *x0.shape[1:], device=x0.device)

    def check_steps(self, steps):
        if not 1 <= steps <= self.num_tokens:
            raise ValueError(f"{steps} sampling steps: expected 1 to {self.num_tokens}, at least a token each")

    def q_sample(self, x0, t, noise):
        """The tokens x_t (R * B, T, F) of x0 (B, C, H, W): noised where t is not -1, else as they are."""
        x = patchify(x0, t.shape[1], len(t) // len(x0))
        noisy = (t >= 0).nonzero(as_tuple=True)
        x[noisy] = self.diffusion.q_sample(x[noisy], t[noisy], patchify(noise, t.shape[1])[noisy])
        return x

    def losses(self, model_output, x0, x_t, t, noise):
        """As for `GaussianDiffusion`, each (B,): means over the noisy tokens of an image and over its R copies."""
        noisy = (t >= 0).nonzero(as_tuple=True)
        terms = self.diffusion.losses(model_output, patchify(x0, t.shape[1], len(t) // len(x0))[noisy], x_t[noisy],
                                      t[noisy], patchify(noise, t.shape[1])[noisy])
        return {name: term.view(len(t) // len(x0), len(x0), -1).mean((0, 2)) for name, term in terms.items()}

    def distillation_losses(self, student_output, teacher_output, x_t, t):
        """As for `GaussianDiffusion`, but (R * B,): means over the noisy tokens of every copy."""
        noisy = (t >= 0).nonzero(as_tuple=True)
        distances = self.diffusion.distillation_losses(student_output, teacher_output, x_t[noisy], t[noisy])
        return distances.view(len(t), -1).mean(1)

    @torch.inference_mode()
    def sample(self, model, y, draw, steps=64, guidance=1.0, head_steps=100, temperature=1.0, clip_denoised=False,
               dtype=None):
        """Images (B, C, H, W) of the classes y (B,), in `steps` steps, each of which draws some tokens in a random
        order: after i steps, floor(T cos(pi/2 i / steps)) are left, and at least one fewer than before.
        draw(*shape): noise (B, *shape). Guidance acts on all of a token and grows linearly with the share of drawn
        tokens; head_steps: steps of the head's diffusion; temperature: a factor of its noise; dtype: of the blocks."""
        self.check_steps(steps)
        T = self.num_tokens
        token_dim = model.in_channels * model.patch_size ** 2
        labels = y if guidance == 1 else torch.cat([y, model.y_embedder.null_labels(y)])
        copies = len(labels) // len(y)           # 2 under guidance
        order = draw(T).argsort(1)               # (B, T)
        known = torch.zeros(len(y), T, dtype=torch.bool, device=y.device)
        x = torch.zeros(len(y), T, token_dim, device=y.device)
        left = T
        for i in range(steps):
            after = max(0, min(left - 1, math.floor(T * math.cos(math.pi / 2 * (i + 1) / steps))))
            # max(1, ...): the official code never reaches full guidance, even in the last step.
            scale = 1 + (guidance - 1) * (T - max(1, after)) / T
            now = order[:, T - left:T - after]   # (B, n), the n tokens to draw
            left = after
            with autocast(y.device, dtype):
                z, _ = model.condition(x.repeat(copies, 1, 1), known.repeat(copies, 1), labels)
            z = z.take_along_dim(now.repeat(copies, 1).unsqueeze(2), 1).flatten(0, 1)            # (copies * B * n, D)

            def predict(noisy, t):               # (B * n, F) to (B * n, 2F)
                out = model.diffloss["net"](noisy.repeat(copies, 1), t, z).float().chunk(copies)  # label, no label
                eps = torch.lerp(out[-1][:, :token_dim], out[0][:, :token_dim], scale)
                return torch.cat([eps, out[0][:, token_dim:]], 1)
            # In float32: the first steps multiply an error of the noise by hundreds. The head is cheap.
            tokens = self.diffusion.denoise(predict, lambda: draw(now.shape[1], token_dim).flatten(0, 1), head_steps,
                                            clip_denoised=clip_denoised, temperature=temperature, dtype=torch.float32)
            x.scatter_(1, now.unsqueeze(2).expand(-1, -1, token_dim), tokens.view(len(y), -1, token_dim))
            known.scatter_(1, now, True)
        return F.fold(x.transpose(1, 2), model.input_size, model.patch_size, stride=model.patch_size)  # (B, C, H, W)


def _mar(depth, hidden_size, num_heads, diffloss_w, diffloss_d, **more):
    return functools.partial(MAR, encoder_depth=depth, decoder_depth=depth, hidden_size=hidden_size,
                             num_heads=num_heads, diffloss_w=diffloss_w, diffloss_d=diffloss_d, **more)


MAR_models = {
    "MAR-H": _mar(20, 1280, 16, 1536, 12), "MAR-L": _mar(16, 1024, 16, 1280, 8), "MAR-B": _mar(12, 768, 12, 1024, 6),
    "MAR-toy": _mar(6, 64, 4, 128, 2, patch_size=4, buffer_size=8, dropout=0.0)}
MAR_ROW = {"objective": lambda model: MaskedAutoregression(model.num_tokens), "sample_steps": 256}
PRESETS |= {name: PAPER | MAR_ROW | {"network": MAR_models[name], "guidance": guidance}
            for name, guidance in (("MAR-H", 3.2), ("MAR-L", 3.0), ("MAR-B", 2.9))}
PRESETS["MAR-toy"] = TOY | MAR_ROW | {"network": MAR_models["MAR-toy"], "teacher_lr": 2e-3, "sample_steps": 8,
                                      "sampling": {"head_steps": 10}}


def read_mar(weights, says):
    """One of READERS, as `read_dit`. Official MARs have patches of one latent number."""
    if "fake_latent" not in weights or says["objective"] not in (None, "mar"):
        return None
    _, T, D = weights["diffusion_pos_embed_learned"].shape
    count = functools.partial(count_blocks, weights)
    shapes = {"input_size": math.isqrt(T), "patch_size": 1, "in_channels": weights["z_proj.weight"].shape[1],
              "num_classes": len(weights["class_emb.weight"]), "diffloss_d": count("diffloss.net.res_blocks"),
              "encoder_depth": count("encoder_blocks"), "decoder_depth": count("decoder_blocks"),
              "buffer_size": weights["encoder_pos_embed_learned"].shape[1] - T,
              "hidden_size": D, "diffloss_w": len(weights["diffloss.net.input_proj.bias"])}
    return fitting_preset(MAR_models, own_config(MAR, says) or shapes)


READERS.append(read_mar)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)            # ends as Ctrl-C does
    sys.exit(main())
