"""TinyFusion: a diffusion transformer learns which of its layers it can do without.  One file, top to bottom.

The problem.  A diffusion transformer draws an image by running its L residual blocks one after another, hundreds of
times. Half the blocks would be twice as fast on any hardware. But which half? DiT-XL has C(28, 14) = 40 million
choices, and the obvious test, "drop what hurts least now", picks badly: the model is fine-tuned after pruning, so what
counts is how well a choice *recovers*, and the loss right after pruning says little about that (the paper's Table 3).

The method.  With weights Phi, search for the mask m together with the fine-tuning dPhi that would follow it:

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

 1. Each group of M blocks has a categorical distribution over its (M choose N) ways to keep N. Draws are made
    differentiable by the straight-through Gumbel-Softmax, so a plain optimiser learns the odds.
 2. While the odds are learned, a small shared LoRA update trains along: a mask is judged as if fine-tuning had begun.
 3. The likeliest mask is applied to the *original* weights; the LoRA update is thrown away.
 4. The shallow student recovers by imitating the teacher's output and, where they are not outliers, its hidden states.

How to run.
    python tinyfusion.py                      the whole story on drawn digits, some minutes on a laptop, into runs/toy/
    python tinyfusion.py --data FOLDER        the same on your images, one sub-folder per class
    python tinyfusion.py --model MAR-toy      the same with a MAR; with --objective flow: with a SiT
    python tinyfusion.py --compare criteria   learning against older rules, all 64 masks recovered (--quick: some)
    torchrun --nproc_per_node=8 tinyfusion.py --ckpt DiT-XL-2-256x256.pt --data LATENTS    the paper's (see the README)
    python tinyfusion.py --help               every flag
    python sample.py --ckpt runs/toy/student.pt

Letters in the shape comments.
    B examples    T tokens    D width of a token    L blocks      K groups of blocks    N of M blocks kept in a group
    C channels of an image or latent    H, W its height and width    P side of a patch    F (in shapes) features
    in Chapter 6: F numbers in a token, n tokens that are noisy, R how often a batch is noised

Chapters.
    1 The model: DiT           4 Recoverability: LoRA       7 Measuring               10 Files and pictures
    2 Diffusion                5 Recovery: masked KD        8 Data                    11 The laboratory
    3 The layer sampler        6 Families: SiT and MAR      9 The training loop       12 The command line
The method is in Chapters 3, 4 and 5, under 220 lines of code; the rest feeds it or judges it, and Chapter 6 can be left
out on a first reading. Every function takes what it needs as arguments, so it can be copied out with those that it
calls.

Source: Fang, Li, Ma, Wang, "TinyFusion: Diffusion Transformers Learned Shallow", arXiv:2412.01199. Written from the
paper; MIT licence.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import functools
import glob
import itertools
import json
import math
import os
import pickle
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class UserError(Exception):
    """A mistake of the user's, told in one line: what was wrong, what was expected, what to do. Exit status 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 1. The model: DiT
#
# A diffusion transformer (Peebles & Xie, arXiv:2212.09748) cuts the noisy image into patches, makes each one a token,
# and sends the tokens through L equal residual blocks. The timestep and the class enter every block as a shift, a scale
# and a gate ("adaLN-Zero"). Every block maps (B, T, D) to (B, T, D) and adds to its input: that is why one can be
# dropped without touching the others. Names, constructor and initialisation are the official repository's, and its
# checkpoints load with strict=True.
# ---------------------------------------------------------------------------------------------------------------------

def modulate(x, shift, scale):
    """x * (1 + scale) + shift, with x (B, T, D), shift and scale (B, D), the same for every token."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


class TimestepEmbedder(nn.Module):
    """Timesteps (B,) to vectors (B, D): cosines and sines of 128 frequencies each, then a two-layer MLP."""

    def __init__(self, hidden_size, frequency_embedding_size=256):
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(),
                                 nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        half = self.frequency_embedding_size // 2
        frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angles = t[:, None].float() * frequencies                            # (B, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))      # (B, D), cosines first


class LabelEmbedder(nn.Module):
    """Class labels (B,) to vectors (B, D). One row more than there are classes, the last, means "no class": in training
    mode a label becomes it with probability `dropout_prob`, which is what makes classifier-free guidance possible."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(dropout_prob > 0), hidden_size)
        self.num_classes = num_classes           # also the null label (the official sampler's 1000 fits ImageNet alone)
        self.dropout_prob = dropout_prob

    def token_drop(self, labels):
        """Labels (B,) with a random share of them replaced by the null label."""
        dropped = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
        return torch.where(dropped, self.num_classes, labels)

    def forward(self, labels):
        if self.training and self.dropout_prob > 0:
            labels = self.token_drop(labels)
        return self.embedding_table(labels)      # (B, D)


class PatchEmbed(nn.Module):
    """Images (B, C, H, W) to tokens (B, T, D), T = (H / P) * (W / P), row by row."""

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, T, D). dropout: of attention weights and of the result, in training."""

    def __init__(self, dim, num_heads, dropout=0.0):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                 # three of (B, heads, T, D / heads)
        p = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return F.dropout(self.proj(x.transpose(1, 2).reshape(B, T, D)), p)


class Mlp(nn.Module):
    """The two-layer perceptron of a block, applied to every token of (B, T, D). approximate: the form of GELU, "tanh"
    or "none", the exact one; dropout: after both layers, in training."""

    def __init__(self, dim, hidden_dim, approximate="tanh", dropout=0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.approximate, self.dropout = approximate, dropout

    def forward(self, x):
        p = self.dropout if self.training else 0.0
        return F.dropout(self.fc2(F.dropout(F.gelu(self.fc1(x), approximate=self.approximate), p)), p)


class DiTBlock(nn.Module):
    """A residual block with adaLN-Zero conditioning: x (B, T, D) and c (B, D) to (B, T, D)."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = torch.addcmul(x, gate_msa.unsqueeze(1), self.attn(modulate(self.norm1(x), shift_msa, scale_msa)))
        return torch.addcmul(x, gate_mlp.unsqueeze(1), self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp)))


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
    """Fixed 2-D position table (grid_size ** 2, dim): the first half encodes the column, the second the row, each as
    sines then cosines of dim / 4 frequencies (MAE's and DiT's layout)."""
    frequencies = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies            # (grid, dim / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)                                   # (grid, dim / 2)
    columns, rows = line.repeat(grid_size, 1), line.repeat_interleave(grid_size, dim=0)     # tokens are row by row
    return torch.cat([columns, rows], dim=1).float()


class DiT(nn.Module):
    """Diffusion transformer. The defaults are DiT-XL/2 on 32x32 latents of 256x256 images: 675,129,632 parameters.

    input_size: height and width of the input; patch_size: side of a patch in its pixels; learn_sigma: the output has a
    second half of channels for the variance. Raises ValueError where sizes do not divide.
    Source: facebookresearch/DiT, models.py (names, initialisation and numerics; the text is ours).
    """
    # Where `prune` finds blocks; before which block the tokens become others; the objective if none is asked for. Other
    # families (Chapter 6) have other ones.
    block_lists, cuts, objective = ("blocks",), (), "ddpm"

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not a multiple of patch_size {patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of 4 and of num_heads {num_heads}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.hidden_size, self.num_heads, self.mlp_ratio = hidden_size, num_heads, mlp_ratio
        self.class_dropout_prob, self.num_classes, self.learn_sigma = class_dropout_prob, num_classes, learn_sigma
        self.out_channels = in_channels * 2 if learn_sigma else in_channels

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(sincos_pos_embed(hidden_size, input_size // patch_size)[None],
                                      requires_grad=False)                   # (1, T, D)
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))      # the patch embedding is a linear layer too
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight,
                       self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        # adaLN-Zero: all gates start closed, so every block starts as the identity, and the output starts at zero.
        zeros = [block.adaLN_modulation[1] for block in self.blocks]
        for linear in zeros + [self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def config(self):
        """The constructor's arguments as they are now: pruning changes the depth. DiT(**model.config()) is a twin."""
        names = ("input_size", "patch_size", "in_channels", "hidden_size", "num_heads", "mlp_ratio",
                 "class_dropout_prob", "num_classes", "learn_sigma")
        return {name: getattr(self, name) for name in names} | {"depth": len(self.blocks)}

    def unpatchify(self, x):
        """Patches (B, T, P * P * C) to images (B, C, H, W)."""
        grid, P = self.input_size // self.patch_size, self.patch_size
        x = x.reshape(x.shape[0], grid, grid, P, P, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.out_channels, self.input_size, self.input_size)

    def forward(self, x, t, y, mask=None, hidden=None, dropped_share=1.0):
        """Predict the noise (and the variance) in x, or what else the objective asks for.

        x (B, C, H, W); t (B,) timesteps, or (1,) where all share one; y (B,) labels, `num_classes` for no class;
        mask (B, L), 1 for a block that runs and 0 for one that is skipped, or None for all; mask and dropped_share as
        in `masked_forward` (Chapter 3).
        Returns (B, out_channels, H, W): noise first, then variance. With `hidden`, a collection of block numbers, it
        returns that and the list of those blocks' outputs (B, T, D), in the order of depth.
        """
        x = self.x_embedder(x) + self.pos_embed                              # (B, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)                          # (B, D)
        x, features = masked_forward(self.blocks, x, c, mask=mask, hidden=hidden or (), dropped_share=dropped_share)
        x = self.unpatchify(self.final_layer(x, c))                          # (B, out_channels, H, W)
        return x if hidden is None else (x, features)

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_channels=3):
        """Classifier-free guidance: move the noise prediction away from the one without a class.

        Official calling convention: x (2B, C, H, W), of which only the first half is read; y (2B,), labels, then null
        labels. Guidance acts on the first `cfg_channels` channels: 3 as in the official code, with which DiT's
        published numbers were made; None for all. It never reaches the variance. Both halves of the result (2B, ...)
        hold the guided noise, and each its own remaining channels.
        """
        half = x[:len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        guided = min(cfg_channels or self.in_channels, self.in_channels)
        cond, uncond = out[:, :guided].chunk(2)
        eps = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([eps, eps]), out[:, guided:]], dim=1)


def _dit(depth, hidden_size, num_heads, patch_size=2):
    return functools.partial(DiT, depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=patch_size)


DiT_models = {                                   # DiT_models["DiT-XL/2"](input_size=32, num_classes=1000)
    "DiT-XL/2": _dit(28, 1152, 16), "DiT-L/2": _dit(24, 1024, 16), "DiT-B/2": _dit(12, 768, 12),
    "DiT-S/2": _dit(12, 384, 6),
    "DiT-D19/2": _dit(19, 1152, 16), "DiT-D14/2": _dit(14, 1152, 16), "DiT-D7/2": _dit(7, 1152, 16),
    "toy": _dit(12, 64, 4, patch_size=4),
}


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 2. Diffusion
#
# Step t of 1000 adds noise of variance beta_t; abar_t, the product of 1 - beta up to t, is the share of the image's
# variance that is left. Training: mix an image x_0 with noise, x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, and
# have the model predict the noise. Sampling: start from noise and walk t down, each step removing a little of the
# predicted noise (DDPM, arXiv:2006.11239; DDIM, arXiv:2010.02502, is the same walk without fresh noise, good in fewer
# steps). The variance of a step is learned too: v, the second half of the model's output channels, interpolates in log
# space between the smallest and the largest sensible value (arXiv:2102.09672). Classifier-free guidance
# (arXiv:2207.12598) exaggerates what a class changes in the prediction: clearer images, less variety. Schedule and
# losses have the official code's values. Chapter 6 has two more objectives with the same calls.
# ---------------------------------------------------------------------------------------------------------------------

def mean_flat(x):
    """Mean over all but the first dimension: (B, ...) to (B,)."""
    return x.flatten(1).mean(1)


def normal_kl(mean1, log_variance1, mean2, log_variance2):
    """KL(N(mean1, var1) || N(mean2, var2)) in nats, elementwise."""
    return 0.5 * (log_variance2 - log_variance1 - 1 + torch.exp(log_variance1 - log_variance2)
                  + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def discretized_gaussian_log_likelihood(x, mean, log_variance):
    """log P(x), elementwise, of pixels in [-1, 1] in steps of 2/255: the Gaussian's mass in the pixel's bin, open at
    the two ends. The tanh form of the normal CDF is the official one; the exact CDF would change its numbers."""
    def cdf(z):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))
    inv_std = torch.exp(-0.5 * log_variance)
    upper = torch.where(x > 0.999, 1.0, cdf((x - mean + 1 / 255) * inv_std))
    lower = torch.where(x < -0.999, 0.0, cdf((x - mean - 1 / 255) * inv_std))
    return torch.log((upper - lower).clamp(min=1e-12))


def autocast(device, dtype=None):
    """A context in which matrix products run in `dtype`: by default bfloat16 on CUDA, and elsewhere float32."""
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    return torch.autocast(device.type, dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32)


def noise_for(x0, t):
    """Standard normal noise for images x0 (B, C, H, W) at times t: (len(t), C, H, W). That is B, but for a MAR."""
    return torch.randn(len(t), *x0.shape[1:], device=x0.device)


def guided(model, x, t, y, guidance=1.0, cfg_channels=3):
    """What `model` says of x (B, C, H, W) under guidance, (B, out_channels, H, W): guidance 1 asks it once, for the
    labels y (B,); any other one also for no class, in one batch (`DiT.forward_with_cfg`)."""
    if guidance == 1:
        return model(x, t, y)
    both = torch.cat([x, x]), t, torch.cat([y, torch.full_like(y, model.num_classes)])
    return model.forward_with_cfg(*both, guidance, cfg_channels)[:len(x)]


class GaussianDiffusion:
    """The noising process and everything computed from its schedule. betas (1000,) by default linear, 1e-4 to 2e-2.

    `timestep_map[i]` is the timestep that the model is told at step i: i itself, or, after `respaced`, the step of the
    full process it stands for. Source: openai/improved-diffusion and facebookresearch/DiT, diffusion/.
    """
    feature_weight = 1e-2      # the paper's initial weight of the features in masked KD (Chapter 5)
    options = ("eta",)         # arguments of `sample` that other objectives do not have

    def __init__(self, betas=None, timestep_map=None):
        betas = np.linspace(1e-4, 2e-2, 1000) if betas is None else np.asarray(betas, dtype=np.float64)
        self.num_timesteps = len(betas)
        self.timestep_map = np.arange(len(betas)) if timestep_map is None else np.asarray(timestep_map)
        self.abar = np.cumprod(1 - betas)                                    # alpha-bar_t, float64
        self.abar_prev = np.append(1.0, self.abar[:-1])
        self.posterior_variance = betas * (1 - self.abar_prev) / (1 - self.abar)
        # The posterior variance at t = 0 is 0; its logarithm borrows the value of t = 1.
        posterior_clipped = np.append(self.posterior_variance[1], self.posterior_variance[1:])
        table = {
            "sqrt_abar": np.sqrt(self.abar), "sqrt_one_minus_abar": np.sqrt(1 - self.abar),
            "sqrt_recip_abar": np.sqrt(1 / self.abar), "sqrt_recip_abar_minus_1": np.sqrt(1 / self.abar - 1),
            "posterior_x0": betas * np.sqrt(self.abar_prev) / (1 - self.abar),
            "posterior_xt": (1 - self.abar_prev) * np.sqrt(1 - betas) / (1 - self.abar),
            "log_small": np.log(posterior_clipped), "log_large": np.log(betas),              # a learned variance's ends
            "log_fixed": np.log(np.append(posterior_clipped[0], betas[1:])),                 # for models without one
            "snr": self.abar / (1 - self.abar),
        }
        self._table = {name: torch.tensor(values, dtype=torch.float32) for name, values in table.items()}

    def _at(self, name, t, x):
        """Schedule values at timesteps t (B,), shaped to multiply x (B, ...)."""
        if self._table[name].device != t.device:
            self._table[name] = self._table[name].to(t.device)
        return self._table[name][t].view(-1, *[1] * (x.dim() - 1))

    def sample_t(self, batch_size, device=None):
        """Training timesteps (B,), uniform."""
        return torch.randint(self.num_timesteps, (batch_size,), device=device)

    def spread_t(self, n, device=None):
        """n timesteps (n,), evenly spread."""
        return torch.linspace(0, self.num_timesteps - 1, n).long().to(device)

    def snr_weight(self, t, gamma):
        """min-SNR weights (B,) of the loss at timesteps t (B,): min(SNR, gamma) / SNR, with SNR the signal-to-noise
        ratio abar_t / (1 - abar_t); an infinite gamma: 1. Source: arXiv:2303.09556."""
        snr = self._at("snr", t, t)
        return snr.clamp(max=gamma) / snr

    def q_sample(self, x0, t, noise):
        """The noisy image x_t (B, C, H, W) = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise."""
        return self._at("sqrt_abar", t, x0) * x0 + self._at("sqrt_one_minus_abar", t, x0) * noise

    def _posterior_mean(self, x0, x_t, t):
        """Mean of q(x_{t-1} | x_t, x0)."""
        return self._at("posterior_x0", t, x0) * x0 + self._at("posterior_xt", t, x0) * x_t

    def p_mean_variance(self, model_output, x_t, t, clip_denoised=False):
        """What the model's output (B, C or 2C, H, W) at x_t (B, C, H, W) says of the step to x_{t-1}: a dict of `mean`,
        `variance`, `log_variance` and `pred_xstart`, each (B, C, H, W). clip_denoised keeps the predicted image in
        [-1, 1], right for pixels and wrong for latents."""
        C = x_t.shape[1]
        eps, v = model_output[:, :C], model_output[:, C:]
        if v.shape[1] == C:                      # v in [-1, 1]: from the posterior variance up to beta, in log space
            share = (v + 1) / 2
            log_variance = share * self._at("log_large", t, x_t) + (1 - share) * self._at("log_small", t, x_t)
        else:
            log_variance = self._at("log_fixed", t, x_t).expand_as(x_t)
        x0 = self._at("sqrt_recip_abar", t, x_t) * x_t - self._at("sqrt_recip_abar_minus_1", t, x_t) * eps
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        return {"mean": self._posterior_mean(x0, x_t, t), "log_variance": log_variance,
                "variance": log_variance.exp(), "pred_xstart": x0}

    def training_losses(self, model, x0, t, y, noise=None, snr_gamma=math.inf):
        """Per-example losses of `model(x_t, t, y)`: a dict of `mse`, `vb` and `loss` = mse + vb, each (B,).

        mse is the noise's; vb the variational bound in bits per dimension, which trains the variance alone (the noise
        prediction is detached in it). x0 (B, C, H, W), t (B,), y (B,). A finite snr_gamma multiplies `loss` by
        `snr_weight`."""
        noise = noise_for(x0, t) if noise is None else noise
        x_t = self.q_sample(x0, t, noise)
        return self.losses(model(x_t, t, y), x0, x_t, t, noise, snr_gamma)

    def losses(self, model_output, x0, x_t, t, noise, snr_gamma=math.inf):
        """`training_losses` for an output that is already there, in float32 whatever the output is in."""
        C, model_output = x0.shape[1], model_output.float()
        mse, weight = mean_flat((noise - model_output[:, :C]) ** 2), self.snr_weight(t, snr_gamma)
        if model_output.shape[1] == C:
            return {"mse": mse, "vb": torch.zeros_like(mse), "loss": weight * mse}
        step = self.p_mean_variance(torch.cat([model_output[:, :C].detach(), model_output[:, C:]], 1), x_t, t)
        kl = normal_kl(self._posterior_mean(x0, x_t, t), self._at("log_small", t, x0),
                       step["mean"], step["log_variance"])
        nll = -discretized_gaussian_log_likelihood(x0, step["mean"], step["log_variance"])   # the last step has no KL
        vb = mean_flat(torch.where(t.view(-1, *[1] * (x0.dim() - 1)) == 0, nll, kl)) / math.log(2)
        return {"mse": mse, "vb": vb, "loss": weight * (mse + vb)}

    def distillation_losses(self, student_output, teacher_output, x_t, t):
        """Per-example distance (B,) of two models' outputs at the same x_t and t: the mean squared error of the
        predicted noise, plus KL(teacher's step || student's step) in bits per dimension, again for the variance
        alone."""
        C, student_output, teacher_output = x_t.shape[1], student_output.float(), teacher_output.float()
        mse = mean_flat((student_output[:, :C] - teacher_output[:, :C]) ** 2)
        if student_output.shape[1] == C:
            return mse
        frozen = torch.cat([student_output[:, :C].detach(), student_output[:, C:]], 1)
        student, teacher = (self.p_mean_variance(out, x_t, t) for out in (frozen, teacher_output))
        kl = normal_kl(teacher["mean"], teacher["log_variance"], student["mean"], student["log_variance"])
        return mse + mean_flat(kl) / math.log(2)

    def respaced(self, steps):
        """The same process in `steps` evenly spaced timesteps, first and last included. Raises ValueError outside
        2 ... num_timesteps."""
        if not 2 <= steps <= self.num_timesteps:
            raise ValueError(f"{steps} sampling steps: expected 2 to {self.num_timesteps}")
        stride = (self.num_timesteps - 1) / (steps - 1)
        # Sums, not multiples, of the stride: so that ties round as they do in the official code.
        chosen = np.rint(np.cumsum(np.append(0.0, np.full(steps - 1, stride)))).astype(int)
        abar = self.abar[chosen]
        return GaussianDiffusion(1 - abar / np.append(1.0, abar[:-1]), self.timestep_map[chosen])

    @torch.inference_mode()
    def sample(self, model, y, draw, steps=250, guidance=1.0, eta=1.0, clip_denoised=False, cfg_channels=3, dtype=None):
        """Images (B, C, H, W) of the classes y (B,), drawn by `model` (in eval mode).

        draw() returns fresh standard normal noise (B, C, H, W) on y's device at every call (`noise_source` in Chapter
        10 gives every image its own stream). eta: 1 is DDPM with the model's variance, 0 is DDIM, deterministic after
        the first draw, and between them is DDIM's sigma (arXiv:2010.02502, equation 16). guidance 1 asks the model
        once a step, anything else twice, in one batch. dtype as in `autocast`.
        """
        return self.denoise(lambda x, t: guided(model, x, t, y, guidance, cfg_channels), draw, steps, eta,
                            clip_denoised, dtype=dtype)

    def denoise(self, predict, draw, steps, eta=1.0, clip_denoised=False, temperature=1.0, dtype=None):
        """The walk of `sample` for any predict(x, t), which gives the noise (and variance) in x (B, C, ...) at the
        timestep t (1,). temperature: a factor of the noise that the steps add."""
        process, x = self.respaced(steps), draw()
        for i in reversed(range(steps)):
            index = torch.full((1,), i, device=x.device)
            t = torch.full((1,), int(process.timestep_map[i]), device=x.device)     # one t for all: embedded once
            with autocast(x.device, dtype):
                out = predict(x, t)
            p = process.p_mean_variance(out.float(), x, index, clip_denoised)
            # One step for DDPM and DDIM: x_{t-1} = sqrt(abar') x0 + sqrt(1 - abar' - sigma^2) eps + sigma z, with
            # sigma = eta * the posterior's. At eta = 1 the first two terms are the posterior mean, and z gets the
            # learned variance.
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
# A mask says for every block whether it runs: x <- m * block(x) + (1 - m) * x with m = 1 or 0, so that the loss has a
# gradient for m too. Searching all C(28, 14) masks of DiT-XL is hopeless, so the blocks are cut into K local groups
# of M consecutive ones, and each group keeps N of its own: p(m) = p(m_1) ... p(m_K), each a categorical distribution
# over the (M choose N) candidates of its group. A draw is a discrete thing with no gradient; the straight-through
# Gumbel-Softmax (arXiv:1611.01144) draws it as the arg max of logits + Gumbel noise, and lets the gradient pass as if
# the arg max had been a softmax of temperature tau. So one backward pass tells every logit, of candidates drawn or
# not, whether the loss would have liked it more often. This chapter starts with the pass that a mask steers, and then
# draws masks.
# ---------------------------------------------------------------------------------------------------------------------

def masked_forward(blocks, x, *args, mask=None, hidden=(), dropped_share=1.0):
    """Run residual blocks one after another, each example through the blocks that its mask keeps:

        x <- m * block(x) + (1 - m) * x            so that dL/dm = <dL/dx_out, block(x) - x>

    Computed as it stands, this runs every block forward and backward for every example, and multiplies what is dropped
    by zero. The exact skip (`masked_block`) has the same values and gradients for less: where m = 0, nothing flows
    back through the block, and its output is needed once, as a number, for dL/dm.

    blocks: any sequence of modules that map (B, ...) to (B, ...), each example by itself; args: what every block gets
    too, tensors (B, ...) or no tensors; mask (B, L) of zeros and ones (above and below one half), or None to run all.
    dropped_share: below 1, only that share of the dropped examples, drawn anew for every block, is run for dL/dm, each
    with more weight: cheaper, and right on average only. Returns x and the list of outputs of the blocks whose numbers
    are in `hidden`, in depth order. A block that no example keeps gets no gradient (None) where the formula gives
    zeros: DistributedDataParallel then needs find_unused_parameters=True. Raises ValueError where mask is not (B, L), a
    tensor in args not (B, ...), or dropped_share not in (0, 1].
    Source: the paper's differentiable layer sampling; the skip is ours.
    """
    features = []
    if mask is not None:
        if mask.shape != (len(x), len(blocks)):
            raise ValueError(f"mask is {tuple(mask.shape)}, expected (examples, blocks) = {(len(x), len(blocks))}")
        if any(torch.is_tensor(a) and (not a.dim() or len(a) != len(x)) for a in args) or not 0 < dropped_share <= 1:
            raise ValueError("expected tensors of one row per example in args, and dropped_share above 0 and up to 1")
        keep = mask.detach() > 0.5
        rows = keep.byte().argsort(dim=0, descending=True, stable=True)      # (B, L): a block's kept examples first
        counts = keep.sum(0).tolist()            # the one synchronisation of a GPU per call
    for i, block in enumerate(blocks):
        if mask is None:
            x = block(x, *args)
        else:
            kept, dropped = rows[:, i].split([counts[i], len(x) - counts[i]])
            x = masked_block(block, x, args, mask[:, i], kept, dropped, dropped_share)
        if i in hidden:
            features.append(x)
    return x, features


def masked_block(block, x, args, m, kept, dropped, dropped_share=1.0):
    """One block of `masked_forward`: x (B, ...) to (B, ...), with its column m (B,) of the mask, and the numbers of the
    examples that keep it and drop it, which together are all of 0 ... B - 1."""
    def run(rows):
        return block(x.index_select(0, rows), *(a.index_select(0, rows) if torch.is_tensor(a) else a for a in args))

    out = x
    if len(kept):
        out = x.index_copy(0, kept, run(kept).to(x.dtype))                   # (B, T, D), dropped rows as they were
    if not (m.requires_grad and torch.is_grad_enabled()):
        return out
    change = (out - x).detach()                  # block(x) - x, so far of the kept rows; the dropped ones need no graph
    if len(dropped):
        weight = len(dropped) / max(1, round(dropped_share * len(dropped)))  # 1, unless a random part speaks for all
        if weight > 1:
            dropped = dropped[torch.randperm(len(dropped), device=x.device)[:round(len(dropped) / weight)]]
        with torch.no_grad():
            change.index_copy_(0, dropped, (weight * (run(dropped) - x.index_select(0, dropped))).to(x.dtype))
    m = m.view(-1, *[1] * (x.dim() - 1))                                     # (B, 1, 1)
    # Adds exactly 0 (to a finite change), and gives m its gradient <dL/dx_out, change>.
    return out + (m - m.detach()).to(x.dtype) * change


def nm_masks(n, m):
    """All ways to keep n of m blocks: a 0/1 matrix (C(m, n), m), the paper's `m_hat`. Raises ValueError
    unless 1 <= n <= m, or where the candidates are too many to learn."""
    if not 1 <= n <= m:
        raise ValueError(f"{n}:{m} is no group: expected N:M with 1 <= N <= M, to keep N of every M blocks")
    if math.comb(m, n) > 100_000:
        raise ValueError(f"{n}:{m} has {math.comb(m, n):,} candidates, more than can be learned: use smaller groups")
    kept = torch.tensor(list(itertools.combinations(range(m), n)))           # (C(m, n), n)
    return torch.zeros(len(kept), m).scatter_(1, kept, 1.0)


def parse_groups(pattern, depth):
    """"1:2" (repeated to fill the depth) or "2:4,3:4,..." (one after another) to groups [(N, M), ...].

    Raises ValueError, with the reason, where the pattern is no pattern or does not fit `depth` blocks."""
    if not re.fullmatch(r"\d+:\d+(,\d+:\d+)*", pattern):
        raise ValueError(f"groups {pattern!r}: not a list of N:M; write 1:2, or one N:M per group as in 2:4,3:4")
    groups = [tuple(int(number) for number in part.split(":")) for part in pattern.split(",")]
    total = sum(m for _, m in groups)
    if len(groups) == 1 and total and depth % total == 0:
        groups = groups * (depth // total)
    elif total != depth:
        covers = f"groups of {total} do not divide" if len(groups) == 1 else f"its groups cover {total} blocks of"
        raise ValueError(f"groups {pattern!r}: {covers} a depth of {depth}; the Ms must add up to the depth")
    for n, m in groups:
        nm_masks(n, m)                           # refuses what is no group
    return groups


class LayerSampler(nn.Module):
    """A learnable distribution over layer masks, one categorical distribution per N:M group.

    groups: [(N, M), ...] from the first block to the last, e.g. [(1, 2)] * 14. All candidates start equally likely. The
    logits are small numbers, multiplied by `scale` before the softmax: so that AdamW, whose steps have the size of the
    learning rate, can move the odds quickly. Raises ValueError for what is no group (`nm_masks`).
    Source: the paper's differentiable layer sampling.
    """

    def __init__(self, groups):
        super().__init__()
        self.groups = [tuple(group) for group in groups]
        self.candidates = [nm_masks(n, m) for n, m in self.groups]           # K matrices (C(M, N), M)
        # The published recipe starts all logits at 0.02. A softmax does not see a constant, so this is the same start.
        self.logits = nn.ParameterList([nn.Parameter(torch.zeros(len(c))) for c in self.candidates])

    def forward(self, batch_size, tau=1.0, scale=100.0):
        """One independent mask per example: (B, L), exactly 0 or 1, exactly N ones per group, with the gradient of the
        softmax at temperature `tau`. tau does not change what is drawn, only the gradient: a high one is biased but
        quiet, a low one nearly unbiased but noisy."""
        parts = []
        for logits, candidates in zip(self.logits, self.candidates):
            soft = F.gumbel_softmax((logits * scale).expand(batch_size, -1), tau=tau)       # (B, C(M, N))
            hard = F.one_hot(soft.argmax(1), len(logits)).to(soft.dtype)                    # the paper's y
            # Straight through: the value of `hard`, the gradient of `soft`. The brackets matter: soft - soft is exactly
            # 0, while (hard + soft) - soft, the order of F.gumbel_softmax(hard=True), is an ulp away from 0 and 1.
            y = hard + (soft - soft.detach())
            with torch.autocast(y.device.type, enabled=False):           # bfloat16 would round the mask's gradient
                parts.append(y @ candidates.to(y))                                          # (B, M)
        return torch.cat(parts, dim=1)

    def _probabilities(self, scale):
        return [torch.softmax(logits.detach() * scale, dim=0) for logits in self.logits]    # K of (C(M, N),)

    def keep_probability(self, scale=100.0):
        """The chance (L,) of every block to be kept."""
        return torch.cat([p @ c.to(p) for p, c in zip(self._probabilities(scale), self.candidates)])

    def confidence(self, scale=100.0):
        """The probability (K,) of each group's likeliest candidate: near 1 when the decision is made."""
        return torch.stack([p.max() for p in self._probabilities(scale)])

    def kept(self):
        """The blocks to keep, ascending: those of each group's likeliest candidate."""
        mask = torch.cat([c[logits.argmax().item()] for logits, c in zip(self.logits, self.candidates)])
        return mask.nonzero().flatten().tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 4. Recoverability: learning the mask as if fine-tuning had begun
#
# The loss of a masked, untouched model says how much dropping those blocks hurts now. We want the loss after the
# fine-tuning to come: min over m of min over dPhi. So both are trained by the same gradient steps, the logits of the
# mask and a weight update dPhi shared by all masks. dPhi is low-rank (LoRA, arXiv:2106.09685): about 0.9 % of DiT-XL's
# parameters, and cheap. After learning it is thrown away.
# ---------------------------------------------------------------------------------------------------------------------

class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update: y = W x + b + (alpha / rank) lora_B lora_A x.

    x (..., in) to (..., out); lora_A (rank, in), lora_B (out, rank). lora_B starts at zero, so the layer starts as the
    one it wraps. Source: arXiv:2106.09685."""

    def __init__(self, base, rank=8, alpha=16.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = alpha / rank
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.lora_A) * self.scaling, self.lora_B)

    @property
    def weight(self):                            # for modules that read the weight of their linear layers, as
        return self.base.weight + self.scaling * self.lora_B @ self.lora_A   # nn.MultiheadAttention does its out_proj's

    @property
    def bias(self):
        return self.base.bias


def add_lora(model, rank=8, alpha=16.0):
    """Freeze `model`, wrap every nn.Linear inside it with a LoRALinear, in place, and return the new parameters, now
    the only trainable ones. (nn.MultiheadAttention has no nn.Linear for q, k, v: they stay frozen.) Raises ValueError
    for a rank below 1. Source: arXiv:2106.09685, on every linear layer as in the paper."""
    if rank < 1:
        raise ValueError(f"LoRA rank {rank}: expected 1 or more")
    model.requires_grad_(False)
    added = []
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and not isinstance(module, LoRALinear):
                wrapped = LoRALinear(child, rank, alpha)
                setattr(module, name, wrapped)
                added += [wrapped.lora_A, wrapped.lora_B]
    return added


def learn_layers(model, loss_fn, groups, steps, *, update="lora", rank=8, alpha=16.0, lr=1e-4, logits_lr=1e-3,
                 tau=(4.0, 0.1), scale=100.0, on_step=None, **loop):
    """Learn which blocks to keep: optimise the logits of a LayerSampler together with a weight update.

    loss_fn(model, sample_mask) draws a batch, calls `mask = sample_mask(batch_size)` for its masks (B, L), and returns
    the masked model's loss, a scalar. `update` is "lora", "full" (all weights train) or "frozen" (none do): the rows of
    the paper's Table 4. tau falls linearly from tau[0] to tau[1]: from a quiet gradient to a truer one. Defaults are
    the paper's for DiT-XL, without its EMA: dPhi is thrown away, and nothing would read an average of it.

    Works on a copy: `model` and its weights are left as they were. Returns the sampler and its history, a list of
    (step, keep_probability). on_step and loop, more arguments such as `state`, as in `train`. Raises ValueError for an
    unknown update, or none possible.
    Source: the paper's joint optimisation of mask and recoverability.
    """
    if update not in ("lora", "full", "frozen"):
        raise ValueError(f"update {update!r}: expected lora, full or frozen")
    model = copy.deepcopy(model).train()
    if update == "lora":
        add_lora(model, rank, alpha)
    elif update == "frozen":
        model.requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights and update != "frozen":
        raise ValueError("no weight of the model requires a gradient: nothing to update")
    device = next(model.parameters()).device
    sampler = LayerSampler(groups).to(device)
    history, every = [(0, sampler.keep_probability(scale).tolist())], max(1, steps // 200)

    def loss(step):
        now = tau[0] + (tau[1] - tau[0]) * step / max(1, steps - 1)
        return loss_fn(model, lambda batch_size: sampler(batch_size, now, scale)), {"tau": now}

    def after(step, metrics):
        if (step + 1) % every == 0 or step + 1 == steps:
            history.append((step + 1, sampler.keep_probability(scale).tolist()))
        if on_step:
            on_step(step, metrics | {"confidence": sampler.confidence(scale).mean()})

    parameters = [{"params": list(sampler.parameters()), "lr": logits_lr}] + \
        ([{"params": weights, "lr": lr}] if weights else [])
    train(model, loss, steps, params=parameters, final_lr_ratio=1.0, find_unused=True, on_step=after, record=history,
          **loop)
    return sampler, history


def masked_denoising(diffusion, batches, dropped_share=1.0, snr_gamma=math.inf):
    """The loss_fn of `learn_layers` for a diffusion model: the denoising loss of the next of `batches`, (x0, y), every
    example under a mask of its own. dropped_share as in `masked_forward`.

    snr_gamma: a finite one weights timesteps by `snr_weight` (min-SNR): the last traces of noise, hard to predict and
    hardly seen in a drawn image, count for less."""
    def loss_fn(model, sample_mask):
        x0, y = next(batches)
        t = diffusion.sample_t(len(x0), x0.device)
        masked = functools.partial(model, mask=sample_mask(len(x0)), dropped_share=dropped_share)
        return diffusion.training_losses(masked, x0, t, y, snr_gamma=snr_gamma)["loss"].mean()
    return loss_fn


def prune(model, kept, lists=None):
    """A shallower copy of `model`: only the blocks numbered in `kept`, everything else the same, weights untouched.

    lists: the names of the ModuleLists that hold the blocks, numbered through them, such as "encoder.layers"; without
    it model.block_lists, or "blocks". Raises ValueError unless `kept` is ascending, within the depth. Source: the
    paper; dPhi is not in the result."""
    lists = lists or getattr(model, "block_lists", ("blocks",))
    kept, blocks = [int(i) for i in kept], [block for name in lists for block in model.get_submodule(name)]
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= len(blocks):
        raise ValueError(f"kept blocks {kept}: expected different numbers from 0 to {len(blocks) - 1}, ascending")
    gone = nn.Identity()                         # deepcopy takes it for the copy of a dropped block, and copies none
    pruned = copy.deepcopy(model, {id(block): gone for i, block in enumerate(blocks) if i not in kept})
    for name in lists:
        owner, _, own = name.rpartition(".")
        left = nn.ModuleList([block for block in pruned.get_submodule(name) if block is not gone])
        setattr(pruned.get_submodule(owner), own, left)
    return pruned


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 5. Recovery: masked knowledge distillation
#
# The pruned model is fine-tuned with the original as its teacher. Both see the same noisy image, timestep and label;
# the student imitates the teacher's output and its hidden states. The latter needs care: a few numbers in a diffusion
# transformer's hidden states are enormous ("massive activations", arXiv:2402.17762), they dominate a squared error,
# and training on them diverges (the paper's Table 5). So entries more than k standard deviations off, in either model,
# are left out of the loss. KD (knowledge distillation) is the squared error of the two noise predictions (or
# velocities), and a KL divergence for a learned variance; denoising is Chapter 2's training loss; features is the
# masked error:
#
#        loss = 0.9 * KD + 0.1 * denoising + beta * features,      beta falling linearly to 0
# ---------------------------------------------------------------------------------------------------------------------

def masked_feature_loss(student, teacher, k=2.0):
    """Mean squared error of two models' hidden states (B, T, D) over the entries where neither is an outlier: a scalar,
    the mean over the examples of the mean over an example's entries (so that it can be computed on parts of a batch).

    An entry is an outlier where |h - mean(h)| > k * std(h), mean and std over tokens and channels of one example.
    What is left out is in neither the sum nor the gradient. k = inf leaves nothing out: plain feature KD. Raises
    ValueError for shapes that differ or are not (B, T, D).
    Source: the paper's masked knowledge distillation."""
    if student.shape != teacher.shape or student.dim() != 3:
        raise ValueError(f"hidden states {tuple(student.shape)}, {tuple(teacher.shape)}: expected the same (B, T, D)")

    def inlier(h):
        h = h.detach().float()
        deviation = (h - h.mean((1, 2), keepdim=True)).abs()
        return ~(deviation > k * h.std((1, 2), keepdim=True))                # k = inf, std = 0: NaN must be an inlier

    both = inlier(student) & inlier(teacher)                                 # (B, T, D)
    difference = torch.where(both, student - teacher.detach(), 0)
    return (difference.float().square().sum((1, 2)) / both.sum((1, 2)).clamp(min=1)).mean()


def match_blocks(groups, kept, cuts=()):
    """Pairs (student block, teacher block) for feature KD: the last kept block of every group, as numbered in the
    student, with the group's last block. For 1:2 that is (i, 2i + 1). A group that keeps none, as the criteria of
    Chapter 11 may leave it, has no pair. cuts: first blocks of parts, such as a decoder, whose tokens are others than
    those before: a pair never crosses one, and the teacher's block is the group's last before the cut."""
    pairs, start = [], 0
    for _, m in groups:
        inside = [i for i, block in enumerate(kept) if start <= block < start + m]
        if inside:
            pairs.append((inside[-1], min([start + m, *(cut for cut in cuts if cut > kept[inside[-1]])]) - 1))
        start += m
    return pairs


KD_MODES = ("masked", "feature", "logits", "none")


def recovery_loss(student, teacher, diffusion, x0, y, pairs, kd="masked", beta=1e-2, k=2.0):
    """One batch's fine-tuning loss and its parts: (scalar, dict). x0 (B, C, H, W), y (B,), pairs from `match_blocks`.

    kd: "masked", the paper's; "feature", without the mask; "logits", the outputs alone; "none", plain fine-tuning.
    Labels are dropped here, once, so that both models are asked the same question: the teacher is in eval mode, and so
    is the student's y_embedder. Raises ValueError where that is not so, for an unknown kd, or pairs out of order.
    Source: the paper's masked knowledge distillation."""
    if kd not in KD_MODES:
        raise ValueError(f"kd {kd!r}: expected one of {', '.join(KD_MODES)}")
    if teacher.training or student.y_embedder.training:
        raise ValueError("the models would drop labels themselves: call teacher.eval() and student.y_embedder.eval()")
    t = diffusion.sample_t(len(x0), x0.device)
    noise = noise_for(x0, t)
    x_t, y = diffusion.q_sample(x0, t, noise), student.y_embedder.token_drop(y)
    use_features = kd in ("masked", "feature")
    ours, theirs = zip(*pairs) if use_features else ((), ())
    if any(list(side) != sorted(set(side)) for side in (ours, theirs)):
        raise ValueError(f"pairs {pairs}: expected ascending block numbers on both sides, as from match_blocks")
    out, features = student(x_t, t, y, hidden=ours)
    denoising = diffusion.losses(out, x0, x_t, t, noise)["loss"].mean()
    if kd == "none":
        return denoising, {"denoising": denoising}
    with torch.inference_mode(), autocast(x0.device):
        target, target_features = teacher(x_t, t, y, hidden=theirs)
    distill = diffusion.distillation_losses(out, target, x_t, t).mean()
    loss, parts = 0.9 * distill + 0.1 * denoising, {"denoising": denoising, "kd": distill}
    if use_features:
        k = k if kd == "masked" else math.inf
        distances = [masked_feature_loss(s, h, k) for s, h in zip(features, target_features)]
        parts["features"] = torch.stack(distances).mean()
        loss = loss + beta * parts["features"]
    return loss, parts


def recover(student, teacher, diffusion, batches, pairs, steps, *, kd="masked", beta=None, k=2.0, lr=2e-4,
            final_lr_ratio=0.5, warmup=0, ema_decay=0.9999, **loop):
    """Fine-tune a pruned `student`, in place, with its `teacher`; returns the EMA of its weights as a model.

    batches: an iterator of (x0, y). beta falls linearly to 0 over the steps, from diffusion.feature_weight where it is
    not told. `kd` as in `recovery_loss`; loop: more arguments of `train`, such as on_step and state.
    Defaults are the paper's for DiT-XL (lr 2e-4, cosine to 1e-4). Raises ValueError as `recovery_loss` does."""
    beta = diffusion.feature_weight if beta is None else beta
    teacher.eval()
    student.train()
    student.y_embedder.eval()                    # recovery_loss drops labels, for both models at once

    def loss(step):
        now = beta * (1 - step / max(1, steps - 1))
        return recovery_loss(student, teacher, diffusion, *next(batches), pairs, kd, now, k)

    return train(student, loss, steps, lr=lr, final_lr_ratio=final_lr_ratio, warmup=warmup, ema_decay=ema_decay, **loop)


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 6. Families: SiT and MAR
#
# The method asks little of a model: residual blocks, a forward pass that takes a mask of them, and a loss. Chapters 3
# to 5 serve two more families as they stand; what is new is here: for each an objective with the calls of
# `GaussianDiffusion` (sample_t, q_sample, losses, training_losses and distillation_losses to train, sample to draw,
# spread_t and snr_weight for Chapters 4 and 11), and for MAR a model with those of `DiT`.
#
# SiT (arXiv:2401.08740) is DiT's network with another objective, flow matching: x_t lies on the straight line from
# noise to image, and the model predicts the velocity along it. Its t runs the other way: 0 is noise, 1 the image.
#
# MAR (arXiv:2406.11838) is another network too. It draws an image a few tokens at a time, in random order. An encoder
# reads the tokens that are known; a decoder says in a vector z, for every other token, what is to be expected there;
# and a small MLP, the head, draws the token under this condition, by a diffusion of its few numbers alone:
#
#     known tokens -> encoder blocks -+                       z of each token whose turn it is
#                                     +-> decoder blocks -> z      |
#     mask tokens for the others -----+                          head: noise -> ... -> that token
#
# In this file it is a diffusion in which every token has a time of its own, and a known one the time -1: Chapter 2's
# objective with t (R * B, T) in the place of t (B,). (The blocks are dear and the head is cheap, so every batch is
# noised R times, and runs through the blocks once.) Blocks of encoder and decoder are numbered through, learned and
# pruned together; the head stays.
# ---------------------------------------------------------------------------------------------------------------------

class FlowMatching:
    """The linear interpolant of SiT, with the calls of `GaussianDiffusion`: x_t = t x0 + (1 - t) noise, with t from 0,
    noise, to 1, the image x0. The model is told t and predicts the velocity x0 - noise, in the first of its output
    channels; the second half, which official SiT checkpoints have, is not used. Source: arXiv:2401.08740."""
    feature_weight, options = 2e-4, ("solver",)              # the weight is the paper's for SiT

    def sample_t(self, batch_size, device=None):
        """Training times (B,), uniform in [0, 1]."""
        return torch.rand(batch_size, device=device)

    def spread_t(self, n, device=None):
        """n times (n,), evenly spread."""
        return ((torch.arange(n) + 0.5) / n).to(device)

    def snr_weight(self, t, gamma):
        """min-SNR weights (B,), as for `GaussianDiffusion`, with SNR = t^2 / (1 - t)^2. The noise is x_t - t velocity,
        so its loss is t^2 times the velocity's, and the weight of the latter is t^2 min(SNR, gamma) / SNR; where gamma
        is infinite, 1."""
        return torch.minimum(t ** 2, gamma * (1 - t) ** 2) if gamma < math.inf else torch.ones_like(t)

    def q_sample(self, x0, t, noise):
        """The point x_t (B, C, H, W) on the line from noise to image."""
        t = t.view(-1, *[1] * (x0.dim() - 1))
        return t * x0 + (1 - t) * noise

    training_losses = GaussianDiffusion.training_losses      # of `mse` and `loss` alone

    def losses(self, model_output, x0, x_t, t, noise, snr_gamma=math.inf):
        """`training_losses` for an output that is already there, in float32 whatever the output is in."""
        mse = mean_flat((x0 - noise - model_output[:, :x0.shape[1]].float()) ** 2)
        return {"mse": mse, "loss": self.snr_weight(t, snr_gamma) * mse}

    def distillation_losses(self, student_output, teacher_output, x_t, t):
        """Per-example mean squared error (B,) of two models' velocities at the same x_t and t."""
        C = x_t.shape[1]
        return mean_flat((student_output[:, :C].float() - teacher_output[:, :C].float()) ** 2)

    @torch.inference_mode()
    def sample(self, model, y, draw, steps=250, guidance=1.0, solver="heun", clip_denoised=False, cfg_channels=3,
               dtype=None):
        """Images (B, C, H, W) of the classes y (B,): dx/dt = velocity, from noise at t = 0 to t = 1 in even steps.
        solver: "euler", or "heun", which asks the model twice a step and corrects the step by the velocity at its end.
        clip_denoised clips the image in the end. Raises ValueError for another solver, or no steps. The rest as for
        `GaussianDiffusion.sample`."""
        if solver not in ("euler", "heun") or steps < 1:
            raise ValueError(f"solver {solver!r}, {steps} steps: expected euler or heun, and 1 step or more")

        def velocity(x, t):
            with autocast(y.device, dtype):
                out = guided(model, x, torch.full((1,), t, device=y.device), y, guidance, cfg_channels)
            return out[:, :x.shape[1]].float()

        x, h = draw(), 1 / steps
        for i in range(steps):
            v = velocity(x, i * h)
            if solver == "heun":
                v = (v + velocity(x + h * v, (i + 1) * h)) / 2
            x = x + h * v
        return x.clamp(-1, 1) if clip_denoised else x


def patchify(x, T):
    """Images (B, C, H, W) to T square patches (B, T, C * P * P), row by row; channels first within a patch, as in MAR's
    repository."""
    P = math.isqrt(x.shape[2] * x.shape[3] // T)
    return F.unfold(x, P, stride=P).transpose(1, 2)


class ClassEmbedding(nn.Embedding):
    """`LabelEmbedder` in MAR's layout: the vector of "no class", `null` (1, D), is not in the table (but in a parameter
    of its own, `fake_latent`)."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__(num_classes, hidden_size)
        self.num_classes, self.dropout_prob = num_classes, dropout_prob

    token_drop = LabelEmbedder.token_drop

    def forward(self, labels, null):
        labels = self.token_drop(labels) if self.training else labels
        return F.embedding(labels, torch.cat([self.weight, null]))           # (B, D)


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
        return torch.addcmul(x, gate.unsqueeze(1), self.mlp(modulate(self.in_ln(x), shift, scale)))


class SimpleMLPAdaLN(nn.Module):
    """MAR's head: a diffusion model of single tokens. n noisy tokens x (n, F), t (n,) or (1,), and c (n, D), the
    decoder's vectors z, to the noise and variance of the tokens (n, 2F)."""

    def __init__(self, in_channels, model_channels, z_channels, num_res_blocks):
        super().__init__()
        self.time_embed = TimestepEmbedder(model_channels)
        self.cond_embed = nn.Linear(z_channels, model_channels)
        self.input_proj = nn.Linear(in_channels, model_channels)
        self.res_blocks = nn.ModuleList([ResBlock(model_channels) for _ in range(num_res_blocks)])
        self.final_layer = FinalLayer(model_channels, 1, 2 * in_channels)

    def forward(self, x, t, c):
        c = self.time_embed(t) + self.cond_embed(c)                          # (n, model_channels)
        x = self.input_proj(x).unsqueeze(1)                                  # each token is a sequence of one
        for block in self.res_blocks:
            x = block(x, c)
        return self.final_layer(x, c).squeeze(1)


class MAR(nn.Module):
    """Masked autoregressive transformer. The defaults are MAR-L on 16x16 latents, of 16 channels, of 256x256 images:
    478,326,304 parameters.

    input_size, patch_size, in_channels: as for DiT; buffer_size: how many copies of the class's vector stand before the
    tokens; diffloss_w, diffloss_d: width and blocks of the head; dropout: in attention and MLP, in training. Raises
    ValueError where sizes do not divide. Source: LTH14/mar, models/mar.py (names, initialisation and numerics; the text
    is ours)."""
    block_lists, objective = ("encoder_blocks", "decoder_blocks"), "mar"

    def __init__(self, input_size=16, patch_size=1, in_channels=16, hidden_size=1024, encoder_depth=16,
                 decoder_depth=16, num_heads=16, mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000,
                 buffer_size=64, diffloss_w=1280, diffloss_d=8, dropout=0.1):
        super().__init__()
        if input_size % patch_size or hidden_size % num_heads:
            raise ValueError(f"input_size {input_size} must be a multiple of patch_size {patch_size}, and hidden_size "
                             f"{hidden_size} of num_heads {num_heads}")
        self.input_size, self.patch_size, self.in_channels, self.hidden_size = \
            input_size, patch_size, in_channels, hidden_size
        self.num_heads, self.mlp_ratio, self.class_dropout_prob = num_heads, mlp_ratio, class_dropout_prob
        self.num_classes, self.buffer_size, self.dropout = num_classes, buffer_size, dropout
        self.diffloss_w, self.diffloss_d = diffloss_w, diffloss_d
        self.num_tokens = T = (input_size // patch_size) ** 2
        D, token_dim = hidden_size, in_channels * patch_size ** 2

        def learned(*shape):
            return nn.Parameter(0.02 * torch.randn(*shape))

        def blocks(depth):
            return nn.ModuleList([Block(D, num_heads, mlp_ratio, dropout) for _ in range(depth)])

        self.class_emb = ClassEmbedding(num_classes, D, class_dropout_prob)
        self.fake_latent, self.mask_token = learned(1, D), learned(1, 1, D)
        self.z_proj, self.z_proj_ln = nn.Linear(token_dim, D), nn.LayerNorm(D, eps=1e-6)
        self.encoder_pos_embed_learned = learned(1, buffer_size + T, D)
        self.encoder_blocks, self.encoder_norm = blocks(encoder_depth), nn.LayerNorm(D, eps=1e-6)
        self.decoder_embed, self.decoder_pos_embed_learned = nn.Linear(D, D), learned(1, buffer_size + T, D)
        self.decoder_blocks, self.decoder_norm = blocks(decoder_depth), nn.LayerNorm(D, eps=1e-6)
        self.diffusion_pos_embed_learned = learned(1, T, D)
        self.diffloss = nn.ModuleDict({"net": SimpleMLPAdaLN(token_dim, diffloss_w, D, diffloss_d)})  # official names
        self.initialize_weights()

    def initialize_weights(self):
        head = self.diffloss["net"]
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for weight in (self.class_emb.weight, head.time_embed.mlp[0].weight, head.time_embed.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        for linear in [block.adaLN_modulation[1] for block in (*head.res_blocks, head.final_layer)] + \
                [head.final_layer.linear]:                                   # as in DiT
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    y_embedder = property(lambda self: self.class_emb)       # where Chapter 5 finds `token_drop`
    blocks = property(lambda self: [*self.encoder_blocks, *self.decoder_blocks])
    cuts = property(lambda self: (len(self.encoder_blocks),))

    def config(self):
        """As `DiT.config`: MAR(**model.config()) is a twin."""
        names = ("input_size", "patch_size", "in_channels", "hidden_size", "num_heads", "mlp_ratio",
                 "class_dropout_prob", "num_classes", "buffer_size", "diffloss_w", "diffloss_d", "dropout")
        return {name: getattr(self, name) for name in names} | {"encoder_depth": len(self.encoder_blocks),
                                                                "decoder_depth": len(self.decoder_blocks)}

    def condition(self, x, known, y, mask=None, hidden=(), dropped_share=1.0):
        """Encoder and decoder: tokens x (B, T, F), of which the `known` ones (B, T) are read, as many in every example,
        and labels y (B,), to z (B, T, D) and the outputs of the `hidden` blocks, (B, buffer + known, D) in the encoder,
        (B, buffer + T, D) in the decoder. The rest as for `DiT.forward`. Raises ValueError where examples differ in the
        number of known tokens."""
        B, E = len(x), len(self.encoder_blocks)
        if (known.sum(1) != known[0].sum()).any():
            raise ValueError("expected as many known tokens in every example of a batch")
        readable = torch.cat([known.new_ones(B, self.buffer_size), known], 1)
        masks = (None, None) if mask is None else (mask[:, :E], mask[:, E:])

        buffer = self.class_emb(y, self.fake_latent).unsqueeze(1).expand(-1, self.buffer_size, -1)
        x = self.z_proj_ln(torch.cat([buffer, self.z_proj(x)], 1) + self.encoder_pos_embed_learned)
        x = x[readable].view(B, -1, self.hidden_size)                        # (B, buffer + known, D)
        x, features = masked_forward(self.encoder_blocks, x, mask=masks[0], hidden=hidden, dropped_share=dropped_share)
        x = self.decoder_embed(self.encoder_norm(x))
        full = self.mask_token.to(x.dtype).repeat(B, readable.shape[1], 1)   # (B, buffer + T, D)
        full[readable] = x.flatten(0, 1)
        x, more = masked_forward(self.decoder_blocks, full + self.decoder_pos_embed_learned, mask=masks[1],
                                 hidden=[i - E for i in hidden], dropped_share=dropped_share)
        return self.decoder_norm(x)[:, self.buffer_size:] + self.diffusion_pos_embed_learned, features + more

    def forward(self, x, t, y, mask=None, hidden=None, dropped_share=1.0):
        """Predict the noise and the variance in the noisy ones of the tokens x (R * B, T, F).

        t (R * B, T): their timesteps, -1 for the known ones; y (B,) labels. The R copies of the batch, one after the
        other, have the same known tokens, and other timesteps and noise; the blocks run once. mask (B, L), hidden and
        dropped_share as for DiT. Returns (n, 2F), a row for every noisy token."""
        z, features = self.condition(x[:len(y)], t[:len(y)] < 0, y, mask, hidden or (), dropped_share)
        noisy = t >= 0
        out = self.diffloss["net"](x[noisy], t[noisy], z.repeat(len(x) // len(y), 1, 1)[noisy])
        return out if hidden is None else (out, features)


class MaskedAutoregression(GaussianDiffusion):
    """MAR's objective: a share of an image's tokens is known, and a diffusion with a cosine schedule draws the others,
    each by itself. The calls are those of `GaussianDiffusion`, with times t (R * B, T) of single tokens, -1 for known
    ones.

    num_tokens: T; mask_ratio_min: the least share of tokens that are not known, in training; repeats: R, how often a
    batch is noised for one pass through the blocks. Source: arXiv:2406.11838 and LTH14/mar."""
    options = ("head_steps", "temperature")

    def __init__(self, num_tokens=256, mask_ratio_min=0.7, repeats=4):
        abar = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2           # arXiv:2102.09672
        super().__init__(np.minimum(1 - abar[1:] / abar[:-1], 0.999))
        self.num_tokens, self.mask_ratio_min, self.repeats = num_tokens, mask_ratio_min, repeats

    def _times(self, order, t, noisy_share):
        """t (R * B, T), with -1 for all but the first `noisy_share` of the tokens in the `order` (B, T)."""
        n = math.ceil(self.num_tokens * noisy_share)
        known = torch.ones_like(order, dtype=torch.bool).scatter(1, order[:, :n], False)
        return t.masked_fill(known.repeat(len(t) // len(known), 1), -1)

    def sample_t(self, batch_size, device=None):
        """Training times (R * B, T) of random tokens, the others being known. Their share is drawn from a normal
        distribution of mean 1 and standard deviation 0.25, cut to [mask_ratio_min, 1]; it is the same in all examples,
        whose known tokens then make one tensor (B, known, D)."""
        share = nn.init.trunc_normal_(torch.empty(()), 1.0, 0.25, self.mask_ratio_min, 1.0).item()
        order = torch.rand(batch_size, self.num_tokens, device=device).argsort(1)
        t = torch.randint(self.num_timesteps, (self.repeats * batch_size, self.num_tokens), device=device)
        return self._times(order, t, share)

    def spread_t(self, n, device=None):
        """Times (n, T), random but always the same; the share of noisy tokens is in the middle of training's range."""
        generator = torch.Generator().manual_seed(0)
        order = torch.rand(n, self.num_tokens, generator=generator).argsort(1)
        t = torch.randint(self.num_timesteps, (n, self.num_tokens), generator=generator)
        return self._times(order, t, (1 + self.mask_ratio_min) / 2).to(device)

    def _tokens(self, x, t):
        """The tokens (R * B, T, F) of images x (B, C, H, W) or (R * B, C, H, W)."""
        return patchify(x, t.shape[1]).repeat(len(t) // len(x), 1, 1)

    def q_sample(self, x0, t, noise):
        """The tokens x_t (R * B, T, F) of x0 (B, C, H, W): noised where t is not -1, else as they are. noise (R * B, C,
        H, W)."""
        x, noisy = self._tokens(x0, t), t >= 0
        x[noisy] = super().q_sample(x[noisy], t[noisy], self._tokens(noise, t)[noisy])
        return x

    def losses(self, model_output, x0, x_t, t, noise, snr_gamma=math.inf):
        """As for `GaussianDiffusion`, each (B,): the means over the noisy tokens of an image and of its R copies."""
        noisy = t >= 0
        terms = super().losses(model_output, self._tokens(x0, t)[noisy], x_t[noisy], t[noisy],
                               self._tokens(noise, t)[noisy], snr_gamma)
        return {name: term.view(-1, len(x0), len(term) // len(t)).mean((0, 2)) for name, term in terms.items()}

    def distillation_losses(self, student_output, teacher_output, x_t, t):
        """As for `GaussianDiffusion`, but (R * B,): the means over the noisy tokens of every copy."""
        distances = super().distillation_losses(student_output, teacher_output, x_t[t >= 0], t[t >= 0])
        return distances.view(len(t), -1).mean(1)

    @torch.inference_mode()
    def sample(self, model, y, draw, steps=64, guidance=1.0, head_steps=100, temperature=1.0, clip_denoised=False,
               dtype=None):
        """Images (B, C, H, W) of the classes y (B,), in `steps` steps, each of which opens some tokens in a random
        order: after step i of n, floor(T cos(pi/2 (i + 1) / n)) are left, and one fewer than before at the least.

        draw(*shape) as for GaussianDiffusion, but of any shape (B, *shape). guidance acts on all of a token, and grows
        linearly with the share of opened tokens; head_steps: steps of the head's diffusion; temperature: a factor of
        its noise; dtype: of the blocks. Raises ValueError for more steps than tokens, or none."""
        T, P, size, left = self.num_tokens, model.patch_size, model.input_size, self.num_tokens
        if not 1 <= steps <= T:
            raise ValueError(f"{steps} sampling steps: expected 1 to {T}, since each one opens a token of {T}")
        token_dim, copies = model.in_channels * P * P, 1 if guidance == 1 else 2
        order, known = draw(T).argsort(1), torch.zeros(len(y), T, dtype=torch.bool, device=y.device)
        x = torch.zeros(len(y), T, token_dim, device=y.device)
        labels = torch.cat([y, torch.full_like(y, model.num_classes)])[:copies * len(y)]
        for i in range(steps):
            after = max(0, min(left - 1, math.floor(T * math.cos(math.pi / 2 * (i + 1) / steps))))
            scale = 1 + (guidance - 1) * (T - max(1, after)) / T             # in the last step too, as officially
            opened, left = order[:, T - left:T - after], after               # (B, n), n tokens of each image
            with autocast(y.device, dtype):
                z, _ = model.condition(x.repeat(copies, 1, 1), known.repeat(copies, 1), labels)
            z = z.gather(1, opened.repeat(copies, 1).unsqueeze(2).expand(-1, -1, z.shape[2])).flatten(0, 1)

            def predict(noisy, t):               # (B * n, F) to (B * n, 2F)
                out = model.diffloss["net"](noisy.repeat(copies, 1), t, z).float().chunk(copies)
                cond, uncond = out[0], out[-1]               # the same where guidance is 1
                eps = torch.lerp(uncond[:, :token_dim], cond[:, :token_dim], scale)
                return torch.cat([eps, cond[:, token_dim:]], 1)

            # In float32: the first steps multiply an error of the noise by hundreds. Against the blocks it is cheap.
            tokens = self.denoise(predict, lambda: draw(opened.shape[1], token_dim).flatten(0, 1), head_steps,
                                  clip_denoised=clip_denoised, temperature=temperature, dtype=torch.float32)
            x.scatter_(1, opened.unsqueeze(2).expand(-1, -1, token_dim), tokens.view(len(y), -1, token_dim))
            known.scatter_(1, opened, True)
        return F.fold(x.transpose(1, 2), (size, size), P, stride=P)          # (B, C, H, W)


def _mar(depth, hidden_size, num_heads, diffloss_w, diffloss_d, **more):
    return functools.partial(MAR, encoder_depth=depth, decoder_depth=depth, hidden_size=hidden_size,
                             num_heads=num_heads, diffloss_w=diffloss_w, diffloss_d=diffloss_d, **more)


MAR_models = {
    "MAR-L": _mar(16, 1024, 16, 1280, 8), "MAR-B": _mar(12, 768, 12, 1024, 6),
    "MAR-toy": _mar(6, 64, 4, 128, 2, patch_size=4, buffer_size=8, dropout=0.0),
}
ALL_MODELS = DiT_models | MAR_models
OBJECTIVES = {"ddpm": GaussianDiffusion, "flow": FlowMatching, "mar": MaskedAutoregression}


def objective_of(name, model):
    """The objective of this name, for `model`."""
    return MaskedAutoregression(model.num_tokens) if name == "mar" else OBJECTIVES[name]()


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 7. Measuring
#
# The Frechet distance compares two sets of images through the mean and covariance of their features under some
# network: |mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)). FID takes the features of an Inception network trained on
# ImageNet. On toy data we take those of a small classifier trained on the spot and say so: *toy-FID*. It ranks models
# of one data set; it cannot be compared with any published FID. Precision asks how many drawn images look real, recall
# how many real ones could have been drawn, the inception score whether images are clear and of all classes.
# ---------------------------------------------------------------------------------------------------------------------

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance of N(mu1, sigma1) and N(mu2, sigma2); mu (F,), sigma (F, F), symmetric. A float, at least 0.

    With S1 = R R^T, sqrt(S1 S2) has the trace of the symmetric sqrt(R^T S2 R), whose eigenvalues are real and, but for
    rounding, not negative: one symmetric eigenproblem instead of a general matrix square root, and nothing complex. R
    is Cholesky's factor or, where S1 is singular (fewer samples than features), comes from its eigenvectors. Raises
    ValueError for shapes that do not fit or values that are not finite. Source: arXiv:1706.08500, equation 6."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != mu1.shape * 2:
        raise ValueError(f"Frechet distance of means {mu1.shape}, {mu2.shape} and covariances {sigma1.shape}, "
                         f"{sigma2.shape}: expected (F,) and (F, F)")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("Frechet distance of statistics that are not finite")

    def roots(values):                           # of eigenvalues; rounding errors of a zero count as zero
        return np.sqrt(np.where(values > len(values) * np.finfo(float).eps * values.max(), values, 0))

    try:
        factor = scipy.linalg.cholesky(sigma1, lower=True)
    except scipy.linalg.LinAlgError:
        values, vectors = scipy.linalg.eigh(sigma1)
        factor = vectors * roots(values)
    trace_of_root = roots(scipy.linalg.eigvalsh(factor.T @ sigma2 @ factor)).sum()
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(float(distance), 0.0)


class FeatureStatistics:
    """What is known of a set of images that pass by in batches: the mean (F,) and covariance (F, F) of their features,
    the features, and the class probabilities; of the images themselves nothing is held."""

    def __init__(self, content=None):
        self.content = content or {"count": 0, "mean": 0.0, "scatter": 0.0, "features": [], "p": []}

    def update(self, features, p=None):
        """Add features (B, F) and class probabilities (B, classes). Means and covariances are merged by Chan's formula,
        in float64, which stays exact far from zero."""
        x, now = torch.as_tensor(features).double(), self.content
        n, mean, total = len(x), x.mean(0), now["count"] + len(x)
        centred, delta = x - mean, mean - now["mean"]
        now["scatter"] = now["scatter"] + centred.T @ centred + torch.outer(delta, delta) * (now["count"] * n / total)
        now["mean"], now["count"] = now["mean"] + delta * (n / total), total
        now["features"].append(torch.as_tensor(features).float())
        if p is not None:
            now["p"].append(torch.as_tensor(p).float())
        return self

    @property
    def mean(self):
        return np.asarray(self.content["mean"])

    @property
    def covariance(self):
        """The unbiased covariance (F, F), as np.cov gives it."""
        return np.asarray(self.content["scatter"] / max(1, self.content["count"] - 1))


def inception_score(probabilities, split=5000):
    """exp of the mean KL(p(class | image) || p(class)), from class probabilities (N, classes): 1 where all images look
    alike, at most the number of classes. The mean over splits of 5,000 images, as ADM computes it; they are shuffled
    first, because images sorted by class would fill each split with few classes. Source: arXiv:1606.03498."""
    p = torch.as_tensor(probabilities, dtype=torch.float64)
    parts = p[torch.randperm(len(p), generator=torch.Generator().manual_seed(0))].split(split)
    entropy = torch.special.entr
    return float(np.mean([math.exp(entropy(p.mean(0)).sum() - entropy(p).sum(1).mean()) for p in parts]))


def precision_recall(real, fake, k=3):
    """Improved precision and recall of features real (N, F) and fake (M, F): the share of fakes inside the manifold of
    the real ones, and the other way round; two floats. A set's manifold is the union of balls around its points, each
    reaching to the k-th nearest other one. Raises ValueError for k points or fewer. Source: arXiv:1904.06991."""
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall with k = {k} need more than {k} real and fake examples")

    def distances(a, b):                         # exact differences: the matrix-product form loses near duplicates
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")

    def share_inside(points, queries):
        radii = torch.cat([distances(part, points).kthvalue(k + 1, dim=1).values for part in points.split(1024)])
        inside = torch.cat([(distances(part, points) <= radii).any(1) for part in queries.split(1024)])
        return inside.double().mean().item()

    real, fake = torch.as_tensor(real).float(), torch.as_tensor(fake).float()
    return share_inside(real, fake), share_inside(fake, real)


class Classifier(nn.Module):
    """The judge of toy runs: images (B, C, H, W) in [-1, 1] to class logits, by way of 64 features."""

    def __init__(self, in_channels, image_size, num_classes, features=64):
        super().__init__()
        side = math.ceil(image_size / 4)
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(min(side, 8)), nn.Flatten(), nn.Linear(64 * min(side, 8) ** 2, features), nn.ReLU())
        self.head = nn.Linear(features, num_classes)

    def forward(self, x):
        return self.head(self.body(x))           # (B, classes)

    @torch.no_grad()
    def look(self, images):
        """Features (B, 64) and class probabilities (B, classes) of uint8 images (B, C, H, W), on the CPU."""
        features = self.body(to_float(images).to(next(self.parameters()).device))
        return features.cpu(), self.head(features).softmax(1).cpu()


def train_classifier(data, device, steps=400, batch_size=64, on_step=None):
    """Train the judge on nine tenths of `data` (an ImageSet); returns it and its accuracy on the rest. It sets torch's
    seed to 0, whatever the run's: models are to be measured with one measure."""
    torch.manual_seed(0)
    held_out = torch.randperm(len(data.labels)) % 10 == 0
    judge = Classifier(data.shape[0], data.shape[1], len(data.classes)).to(device)
    seen = ImageSet(data.images[~held_out], data.labels[~held_out], data.classes)
    batches = data_batches(seen, batch_size, seed=0, device=device)

    def loss(step):
        x, y = next(batches)
        return F.cross_entropy(judge(x), y), {}

    train(judge, loss, steps, lr=1e-3, on_step=on_step)
    found = [judge.look(images)[1].argmax(1) for images in data.images[held_out].split(256)]
    return judge.eval(), (torch.cat(found) == data.labels[held_out]).double().mean().item()


def load_inception(path, device):
    """The network that FID is defined by, a TorchScript file (NVIDIA's port, inception-2015-12-05.pt), as a function
    like `Classifier.look`: features (B, 2048) and class probabilities of uint8 images (B, 1 or 3, H, W) of any size.

    TorchScript is a program, though not a Python one, and not safe from strangers. Raises UserError where it cannot be
    read."""
    try:
        with warnings.catch_warnings(action="ignore"):           # TorchScript is deprecated, but FID is this file
            net = torch.jit.load(path, map_location=device).eval()
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"--inception {path}: {str(error).splitlines()[0]}; expected a TorchScript file") from None

    @torch.no_grad()
    def look(images):
        x = images.expand(-1, 3, -1, -1).to(device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):     # float32, as published FIDs
            return net(x, return_features=True).float().cpu(), net(x, no_output_bias=True).float().cpu()

    try:
        look(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    except RuntimeError as error:
        raise UserError(f"--inception {path}: not called as NVIDIA's port is: {str(error).splitlines()[0]}") from None
    return look


def image_stream(path, batch_size=50):
    """The number of images in a folder (and its sub-folders) or in the `arr_0` (N, H, W, 3) of an .npz file, and an
    iterator of batches (B, 1 or 3, H, W) of them, uint8: only a batch is in memory. Raises UserError for no images."""
    if Path(path).is_dir():
        files = [p for p in sorted(Path(path).rglob("*")) if p.suffix.lower() in Image.registered_extensions()]

        def whole(file):
            try:
                return read_image(file)
            except Exception as error:           # Pillow's decoders raise all kinds of errors on broken files
                raise UserError(f"{file}: {str(error) or type(error).__name__}; repair or remove it") from None

        def read():
            for _, group in itertools.groupby(map(whole, files), key=np.shape):              # one size at a time
                while batch := list(itertools.islice(group, batch_size)):
                    x = torch.from_numpy(np.stack(batch))
                    yield x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)
        if files:
            return len(files), read()
        raise UserError(f"{path}: no images in this folder")
    try:
        entry = zipfile.ZipFile(path).open("arr_0.npy")
        versions = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        (N, H, W, C), by_columns, dtype = versions[np.lib.format.read_magic(entry)](entry)
        if by_columns or dtype != np.uint8 or C != 3:
            raise ValueError(f"its arr_0 is {dtype} {(N, H, W, C)}, expected uint8 (N, H, W, 3)")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: {error}; expected a folder of images, or an .npz file with arr_0 or with mu and "
                        "sigma") from None

    def read():
        for start in range(0, N, batch_size):
            n = min(batch_size, N - start)
            try:
                x = np.frombuffer(entry.read(n * H * W * C), np.uint8).reshape(n, H, W, C)
            except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
                raise UserError(f"{path}: damaged after image {start}: {error}") from None
            yield torch.from_numpy(x.copy()).permute(0, 3, 1, 2)
    return N, read()


def read_npz(path, *names):
    """The arrays of these names in an .npz file, those that are there, and as `names` a list of all that are; of a path
    that does not end in .npz, and so is a folder, nothing. Raises UserError for a file that is missing or torn."""
    if Path(path).suffix != ".npz":
        return {"names": []}
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file.files} | {"names": file.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: {error}; expected an .npz file with arr_0, or with mu and sigma") from None


def statistics_of(path, look=None, label=None):
    """FeatureStatistics of the images in a folder or .npz file, seen through `look`; of an .npz file with `mu` and
    `sigma` these are taken as they are (ADM's reference batches have them, of all of ImageNet, and `arr_0`, 10,000 of
    its images, for precision and recall), and `features` and `p` where it was written by `save_statistics`. Raises
    UserError for a file that has none of these, and where images need a `look`."""
    saved, stats = read_npz(path, "mu", "sigma", "count", "features", "p"), FeatureStatistics()
    if not {"mu", "sigma"} <= saved.keys() or (look and saved["names"].count("arr_0")):
        if not look:
            raise UserError(f"{path}: to look at images, --inception FILE is needed")
        N, batches = image_stream(path)
        report, done = progress(label or Path(path).name, N, unit="images"), 0
        for batch in batches:
            stats.update(*look(batch))
            done += len(batch)
            report(done - 1, {})
    if {"mu", "sigma"} <= saved.keys():
        count = int(saved.get("count", 0))       # 0: it is not told
        stats.content |= {"count": count, "mean": torch.from_numpy(saved["mu"]).double(),
                          "scatter": torch.from_numpy(saved["sigma"]).double() * max(1, count - 1)}
        for name in ("features", "p"):
            stats.content[name] += [torch.from_numpy(saved[name])] if name in saved else []
    return stats


def statistics_of_data(data, look):
    """FeatureStatistics of all of an ImageSet."""
    stats = FeatureStatistics()
    for images in data.images.split(256):
        stats.update(*look(images))
    return stats


def spread_labels(data, n):
    """n labels, (n,), sorted, each as often as its share of the data is."""
    return data.labels.sort().values[torch.linspace(0, len(data.labels) - 1, n).long()]


def save_statistics(path, stats):
    """FeatureStatistics as an .npz file, which `statistics_of` reads; `mu` and `sigma` are for other programs too."""
    more = {name: torch.cat(stats.content[name]).numpy() for name in ("features", "p") if stats.content[name]}
    write_file(path, lambda file: np.savez(file, mu=stats.mean, sigma=stats.covariance, count=stats.content["count"],
                                           **more))


def compare_statistics(fake, real, device="cpu"):
    """How far the FeatureStatistics `fake` are from `real`: a dict of `fid` and, where features and probabilities are
    there, `is`, `precision` and `recall`. Of the real ones no more count for the latter two than there are fakes: a
    denser set has smaller balls, which would favour the other. Raises ValueError where features differ in size."""
    row = {"fid": frechet_distance(real.mean, real.covariance, fake.mean, fake.covariance)}
    if fake.content["p"]:
        row["is"] = inception_score(torch.cat(fake.content["p"]))
    if fake.content["features"] and real.content["features"]:
        ours, theirs = (torch.cat(stats.content["features"]).to(device) for stats in (fake, real))
        some = torch.linspace(0, len(theirs) - 1, min(len(theirs), len(ours))).long()
        row["precision"], row["recall"] = precision_recall(theirs[some.to(device)], ours)
    return row


def measure(models, labels, shape, look, real, diffusion, sampling, decode, *, seed=0, batch_size=50, label="measure",
            state=None):
    """Draw an image of each of `labels` (N,) with each of `models`, a dict of names and models, from the same noise,
    and compare them with the FeatureStatistics `real` by what look(images) sees in them, features and probabilities.

    shape: (C, H, W) of what is drawn; decode makes uint8 images of it. The models take turns batch by batch, so that a
    busy machine slows all of them alike; images/s is the median batch's. Several processes share every batch. `label`
    starts the progress line; None: no line. state: a TrainingState, whose steps are here batches, to go on from.
    Returns {name: dict of plain numbers} and {name: FeatureStatistics}. Raises ValueError where batches have fewer
    images than there are processes."""
    device = next(next(iter(models.values())).parameters()).device
    if min(batch_size, len(labels) % batch_size or batch_size) < world_size():
        raise ValueError(f"{len(labels)} images in batches of {batch_size} do not feed {world_size()} processes")

    def order_of(index):                         # from each process's share after the other's to the order of images
        return torch.cat([torch.arange(len(index))[r::world_size()] for r in range(world_size())]).argsort()

    draw = functools.partial(sample_images, diffusion=diffusion, shape=shape, seed=seed, decode=decode)
    some = labels[rank():batch_size:world_size()].to(device)
    for model in models.values():                # warm up before the clock runs
        draw(model, labels=some, indices=range(batch_size), sampling=sampling | {"steps": min(2, sampling["steps"])})
    turns = list(itertools.product(torch.arange(len(labels)).split(batch_size), models))
    first = state.step if state else 0
    stats = {name: FeatureStatistics(state.content["stats"][name] if first else None) for name in models}
    seconds = state.content["seconds"] if first else {name: [] for name in models}
    report = progress(label, len(turns), unit="batches", first=first) if label else lambda *_: None
    with stop_requests() if state else contextlib.nullcontext() as asked:
        for turn, (index, name) in enumerate(turns[first:], first):
            start, mine = time.perf_counter(), index[rank()::world_size()]
            images = draw(models[name], labels=labels[mine].to(device), indices=mine.tolist(), sampling=sampling)
            seconds[name].append((time.perf_counter() - start) / len(index))
            features, p = (torch.cat(parts)[order_of(index)] for parts in zip(*gather(look(images))))
            stats[name].update(features, p)
            report(turn, {})
            stop = average(torch.tensor(float(bool(asked)))).item() > 0
            if state and (stop or (turn + 1) * sampling["steps"] % state.every < sampling["steps"]):
                state.save(turn + 1, stats={name: s.content for name, s in stats.items()}, seconds=seconds)
            if stop:
                raise KeyboardInterrupt
    return {name: {"depth": len(model.blocks), "parameters": sum(w.numel() for w in model.parameters()),
                   **compare_statistics(stats[name], real, device),
                   "images_per_second": 1 / float(np.median(seconds[name]))} for name, model in models.items()}, stats


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 8. Data
#
# Small images are uint8 tensors (N, C, H, W) until a batch is made; the models see them in [-1, 1]. Large ones are
# first made smaller by an autoencoder (VAE), which turns 256x256 pixels into a latent of 32x32 numbers in 4 channels;
# the diffusion model draws latents, and the VAE makes pictures of them. All images are encoded once, into one file,
# from which batches are read while a run goes on. Both kinds of data offer the same: `labels`, `classes`, the `shape`
# of an example, `read` for a batch of them, and `describe` to know them again.
# ---------------------------------------------------------------------------------------------------------------------

class ImageSet:
    """images (N, C, H, W) uint8, labels (N,) int64, and the names of the classes, label by label."""
    latent = False

    def __init__(self, images, labels, classes):
        self.images, self.labels, self.classes, self.shape = images, labels, classes, tuple(images.shape[1:])

    def read(self, index, mirrored):
        """Examples (B, C, H, W) number index (B,). Never mirrored: a digit would be another one, or none."""
        return to_float(self.images[index])

    def describe(self):
        checksum = zlib.crc32(self.images.numpy(), zlib.crc32(self.labels.numpy()))
        return f"{len(self.labels)} images, checksum {checksum:08x}"


class LatentSet:
    """Latents that are read when they are needed. latents: a sequence of N arrays (2, C, H, W), of an image and of its
    mirror image; labels (N,) int64."""
    latent = True

    def __init__(self, latents, labels):
        self.latents, self.labels, self.shape = latents, labels, tuple(latents[0].shape[1:])
        self.classes = [str(label) for label in range(int(labels.max()) + 1)]

    def read(self, index, mirrored):
        """Latents (B, C, H, W) number index (B,), of the mirror image where mirrored (B,) is 1."""
        pairs = zip(index.tolist(), mirrored.tolist())
        return torch.from_numpy(np.stack([self.latents[i][m] for i, m in pairs])).float()

    def describe(self):
        ends = b"".join(np.ascontiguousarray(self.latents[i]).tobytes() for i in (0, len(self.labels) - 1))
        checksum = zlib.crc32(ends, zlib.crc32(self.labels.numpy()))         # all of them would take minutes
        return f"{len(self.labels)} latents, checksum of labels, first and last {checksum:08x}"


class NpyFiles:
    """The arrays of the files 0.npy, 1.npy ... of a folder, each read when it is asked for."""

    def __init__(self, folder):
        self.paths = sorted((p for p in Path(folder).glob("*.npy") if p.stem.isdecimal()), key=lambda p: int(p.stem))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return load_array(self.paths[i])


def load_array(path, mmap_mode=None):
    """np.load without pickles. Raises UserError for a file that is missing, torn or foreign."""
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: {error}; expected a whole .npy file") from None


def holds_latents(folder):
    """Whether `open_data` would find latents in a folder."""
    return (Path(folder) / "latents.npy").exists() or (Path(folder) / "imagenet256_features").is_dir()


def open_data(folder, size):
    """The data in a folder: a LatentSet of `latents.npy` (N, 2, C, H, W) and `labels.npy` (N,), or of the public
    TinyFusion layout, `imagenet256_features/{i}.npy` (2, C, H, W) and `imagenet256_labels/{i}.npy` (1,); or else an
    ImageSet of side `size`. Raises UserError where it is none of them, or only half of one."""
    folder = Path(folder)
    if (folder / "latents.npy.part").exists():
        raise UserError(f"--data {folder}: it is not encoded to the end; run --encode again, which goes on")
    if not holds_latents(folder):
        return image_folder(folder, size)
    if (folder / "latents.npy").exists():
        latents, labels = load_array(folder / "latents.npy", "r"), load_array(folder / "labels.npy")
    else:
        latents, files = NpyFiles(folder / "imagenet256_features"), NpyFiles(folder / "imagenet256_labels")
        report, labels = progress("labels", len(files), unit="files"), np.zeros((len(files), 1), np.int64)
        for i in range(len(files)):
            label = files[i]
            if label.size != 1:
                raise UserError(f"{files.paths[i]}: {label.size} numbers; expected one label")
            labels[i] = label
            report(i, {})
    one = latents[0] if len(latents) else np.zeros(())
    if len(latents) != len(labels) or one.ndim != 4 or one.shape[0] != 2 or one.shape[2] != one.shape[3]:
        raise UserError(f"--data {folder}: {len(latents)} latents {one.shape} and {len(labels)} labels; expected as "
                        "many of both, latents being (2, channels, side, side)")
    if labels.dtype.kind not in "iu" or labels.size != len(labels) or labels.min() < 0:
        raise UserError(f"--data {folder}: labels {labels.dtype} {labels.shape}; expected one whole number per latent")
    return LatentSet(latents, torch.from_numpy(labels.reshape(-1).astype(np.int64)))


def to_float(images):
    """uint8 to [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """[-1, 1] to uint8, rounded."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def toy_digits(n=5000, size=16, seed=0):
    """n grey images of the digits 0 to 9 in Pillow's own font, 80 to 95 % of the height, a little off centre. Raises
    UserError where Pillow was built without FreeType and so has no scalable font."""
    rng, S = np.random.default_rng(seed), 4 * size           # drawn four times as large, then averaged: smooth edges
    try:
        fonts = [ImageFont.load_default(em) for em in np.linspace(0.8, 0.95, 7) * S / 0.71]  # a digit is 0.71 em high
    except ImportError:
        raise UserError("this Pillow has no scalable font (no FreeType); use PyPI's: pip install pillow") from None
    images = np.zeros((n, 1, size, size), np.uint8)
    for i in range(n):
        canvas, font, digit = Image.new("L", (S, S)), fonts[rng.integers(len(fonts))], str(i % 10)
        left, top, right, bottom = font.getbbox(digit)
        x = (S - left - right) / 2 + rng.uniform(-0.06, 0.06) * S
        y = (S - top - bottom) / 2 + rng.uniform(-0.025, 0.025) * S
        ImageDraw.Draw(canvas).text((x, y), digit, fill=255, font=font)
        images[i, 0] = canvas.resize((size, size), Image.Resampling.BOX)
    return ImageSet(torch.from_numpy(images), torch.arange(n) % 10, [str(digit) for digit in range(10)])


def center_crop(image, size):
    """A square of side `size` from the middle of a PIL image, as ADM does it: halve by box filter while the short side
    is at least twice the target, then bicubic to the target, then crop. Source: openai/guided-diffusion."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def class_files(folder):
    """The names of the classes, sorted, and [(path, label), ...] of the files, of a folder with one sub-folder per
    class (the ImageFolder convention). Raises UserError where there is none."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{folder}: no such folder; expected one with a sub-folder of images per class")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{folder}: no class folders in it; expected one sub-folder of images per class")
    return classes, [(path, label) for label, name in enumerate(classes) for path in sorted((root / name).rglob("*"))
                     if path.is_file() and not path.name.startswith(".")]


def image_folder(folder, size):
    """An ImageSet of a folder as in `class_files`: grey if every image is grey, else RGB. A file that is no whole image
    is named on stderr, counted and skipped. Raises UserError where a class has no image."""
    classes, files = class_files(folder)
    found = [(image, label) for path, label in files if (image := read_or_skip(path, size)) is not None]
    if len(found) < len(files):
        print(f"skipped {len(files) - len(found)} broken files of {len(files)}", file=sys.stderr)
    images, labels = [image for image, _ in found], [label for _, label in found]
    for label in set(range(len(classes))) - set(labels):
        raise UserError(f"{folder}: no readable image in class folder {classes[label]!r}; add some or remove it")
    channels = 1 if all(image.ndim == 2 for image in images) else 3
    pixels = np.empty((len(images), channels, size, size), np.uint8)
    for i, image in enumerate(images):
        pixels[i] = image if image.ndim == 2 else image.transpose(2, 0, 1)
    return ImageSet(torch.from_numpy(pixels), torch.tensor(labels), classes)


def read_or_skip(path, size):
    """`read_image`, or None, and a line on stderr, where that fails."""
    try:
        return read_image(path, size)
    except Exception as error:                   # Pillow's decoders raise all kinds of errors on broken files
        print(f"skipped {path}: {str(error) or type(error).__name__}", file=sys.stderr)


def read_image(path, size=None):
    """One image file as a uint8 array, (H, W) if it is grey, else (H, W, 3); with a `size`, cropped to that square."""
    with Image.open(path) as image:
        if image.mode.startswith("I;16"):        # 16 bits a pixel: Pillow's own conversion would clip, not scale
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(f"pixels of mode {image.mode} have no known range; expected 8 or 16 bits")
        image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
        return np.asarray(center_crop(image, size) if size else image)


def read_ahead(items):
    """The items of an endless iterator; while one is in use, a thread gets the next."""
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, items)
        while True:
            item = coming.result()
            coming = reader.submit(next, items)
            yield item


def data_batches(data, batch_size, seed, device="cpu", start=0, parts=1, number=0, processes=1):
    """Endless batches (x, y), x (B, C, H, W) and y (B,), in a new order every epoch; of latents, those of a random half
    are of the mirror image. A step's batch depends on the seed and the number of the step, not on the steps before it:
    a run can go on from any step `start`. With `parts` or `processes`, every batch is cut into parts * processes
    smaller ones, and process `number` gets `parts` of them, one after the other."""
    def read():
        first, N = start, len(data.labels)
        per_epoch = max(1, N // batch_size)
        for epoch in itertools.count(first // per_epoch):
            random = torch.Generator().manual_seed(1_000_003 * seed + epoch)
            order, mirrored = torch.randperm(N, generator=random), torch.randint(2, (N,), generator=random)
            for i in range(first % per_epoch, per_epoch):
                batch = order[i * batch_size:(i + 1) * batch_size]
                for share in range(parts):
                    index = batch[number + processes * share::processes * parts]
                    yield data.read(index, mirrored[index]).to(device), data.labels[index].to(device)
            first = 0

    return read_ahead(read()) if data.latent else read()     # latents come from a disk


class VAE:
    """The autoencoder of latent models, by the package diffusers: images (B, 3, H, W), uint8, to latents (B, C, h, w)
    and back. name: of a model on Hugging Face, or a folder. Raises UserError where the package or the model is missing,
    and loads safetensors only."""

    def __init__(self, name, device):
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            raise UserError("--vae needs the package diffusers: pip install diffusers") from None
        try:
            self.net = AutoencoderKL.from_pretrained(name, use_safetensors=True, low_cpu_mem_usage=False)
            self.net.to(device).eval()
        except Exception as error:               # of the network, the disk, the configuration, the weights
            raise UserError(f"--vae {name}: {' '.join(str(error).split())[:300]}") from None
        self.device, self.scale = device, self.net.config.scaling_factor     # 0.18215: latents of about unit variance

    @torch.inference_mode()
    def encode(self, images, noise):
        """A draw from the VAE's posterior, with noise (B, C, h, w), as DiT was trained on."""
        posterior = self.net.encode(to_float(images).to(self.device)).latent_dist
        return ((posterior.mean + posterior.std * noise) * self.scale).cpu()

    @torch.inference_mode()
    def decode(self, latents):
        return torch.cat([to_uint8(self.net.decode(x / self.scale).sample).cpu() for x in latents.split(8)])


def encode_images(folder, size, vae, out, settings, batch_size=16, every=50):
    """Write `latents.npy` (N, 2, C, h, w), of every image and its mirror image, and `labels.npy` into `out`, from a
    folder as in `class_files`. Broken images are skipped. Every `every` batches, on Ctrl-C and on SIGTERM the state is
    saved, and the next call with the same `settings` goes on from there. Raises UserError for other ones."""
    (classes, files), part, state = class_files(folder), out / "latents.npy.part", out / "encode-state.json"
    names = "\n".join(f"{path} {label}" for path, label in files).encode()
    settings = settings | {"files": f"{len(files)}, checksum {zlib.crc32(names):08x}"}
    content = made_with(state, settings, "done") if state.exists() else {"done": 0, "skipped": []}
    first, skipped = content["done"], content["skipped"]
    shape = vae.encode(torch.zeros(1, 3, size, size, dtype=torch.uint8), 0).shape[1:]
    print(f"{len(files)} files in {len(classes)} class folders: {', '.join(classes[:3])} ...")

    def header(file, n):                         # numpy leaves room in it for n to grow
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (n, 2, *shape)})

    with open(part, "r+b" if first else "wb") as file, concurrent.futures.ThreadPoolExecutor() as readers, \
            stop_requests() as asked:
        header(file, 0)
        row = 2 * 4 * math.prod(shape)
        file.seek((first - len(skipped)) * row, os.SEEK_CUR)
        file.truncate()                          # what came after the last save
        report = progress("encode", len(files), unit="images", first=first)
        turns = list(range(first, len(files), batch_size))
        for turn, start in enumerate(turns, 1):
            numbers = range(start, min(start + batch_size, len(files)))
            images = list(readers.map(lambda i: read_or_skip(files[i][0], size), numbers))
            skipped += [i for i, image in zip(numbers, images) if image is None]
            good = [(i, image if image.ndim == 3 else np.stack([image] * 3, 2))
                    for i, image in zip(numbers, images) if image is not None]
            if good:
                x = torch.from_numpy(np.stack([image for _, image in good])).permute(0, 3, 1, 2)
                pairs = torch.stack([x, x.flip(3)], 1).flatten(0, 1)         # an image and its mirror image in turn
                noise = noise_source([2 * i + m for i, _ in good for m in (0, 1)], shape, 0, vae.device)
                file.write(vae.encode(pairs, noise()).numpy().astype("<f4").tobytes())
            report(numbers[-1], {})
            if asked or turn % every == 0 or turn == len(turns):
                file.flush()
                os.fsync(file.fileno())
                now = {"settings": settings, "done": numbers[-1] + 1, "skipped": skipped}
                write_file(state, lambda file: file.write(json.dumps(now).encode()))
            if asked:
                raise KeyboardInterrupt
        labels = np.delete(np.array([label for _, label in files], np.int64), skipped)
        header(file, len(labels))
        file.flush()
        os.fsync(file.fileno())
    write_file(out / "labels.npy", lambda file: np.save(file, labels))
    os.replace(part, out / "latents.npy")
    state.unlink()
    print(f"{len(labels)} images of {len(classes)} classes, {len(skipped)} skipped: {out / 'latents.npy'}, labels.npy")


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 9. The training loop
#
# One loop serves the teacher, the layers, the student and the judge: AdamW, gradient clipping, and an exponential
# moving average (EMA) of the weights, from which images are drawn. A long run can be stopped, even killed, at any
# moment and continued: all that the next step depends on is written to a file now and then, and a step's batch depends
# on its number alone. On a CPU such a run ends bit for bit where one that was never stopped ends.
#
# Several GPUs: torchrun starts the whole program once per GPU. Every process takes its share of the rows of every
# batch; DistributedDataParallel (DDP) averages the gradients, of weights, LoRA and logits alike, so that all processes
# take the same step; and process 0 writes the files. Parts of a batch, one after the other (`accumulate`), fit a large
# batch on a small card. The gradient is the same however a batch is cut, given the same random numbers.
# ---------------------------------------------------------------------------------------------------------------------

def rank():
    """The number of this process among those that torchrun started; 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value):
    """A list of what every process has as `value`, tensors on the CPU or plain data, in the order of their numbers."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def average(number):
    """The mean over all processes of a tensor that has one number in each."""
    if world_size() > 1:
        number = number.detach().clone()
        dist.all_reduce(number)
    return number / world_size()


@contextlib.contextmanager
def processes():
    """A context in which the processes that torchrun started know one another. One process needs nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    try:                                         # NCCL for what is on GPUs, gloo for what is not
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except ValueError as error:
        raise UserError(f"WORLD_SIZE is set, but the processes cannot meet: {error}; start with torchrun") from None
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if rank() else sys.stdout):
            yield
    except UserError as error:                   # perhaps of this process alone, such as a file that only it has read
        raise UserError(f"process {rank()}: {error}" if rank() else str(error)) from None
    except KeyboardInterrupt:                    # at the same step in all of them
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()                 # after an error torchrun ends the others, who would not take part


class Objective(nn.Module):
    """A loss_fn as a module that holds the weights it trains, wherever they are in use (the logits of a mask are in no
    model): what DDP can wrap."""

    def __init__(self, loss_fn, weights):
        super().__init__()
        self.loss_fn, self.weights = loss_fn, nn.ParameterList(weights)

    def forward(self, step):
        return self.loss_fn(step)


def tune_blocks(model, compile=False, checkpointing=False):
    """Make the blocks of a model, and of a MAR's head, run otherwise, in place, with the same results up to rounding.
    compile: by torch.compile, a slow start and faster steps. checkpointing: keep for the backward pass only what goes
    into a block, and run it again there, which takes a third more time and far less memory (arXiv:1604.06174)."""
    for block in [*getattr(model, "blocks", ()), *(part for part in model.modules() if isinstance(part, ResBlock))]:
        if checkpointing:
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
        if compile:
            block.compile()


class NonFiniteLoss(Exception):
    """Training met a loss or gradient that is not finite. `model` holds the weights from before that step (their EMA,
    if one is kept), `step` its number."""

    def __init__(self, step, loss, gradient_norm, model):
        super().__init__(f"at step {step} the loss is {loss} and the norm of its gradient {gradient_norm}")
        self.step, self.model = step, model


class TrainingState:
    """Where a training run stands, in a file that `train` writes every `every` steps, on Ctrl-C and on SIGTERM, and
    starts from if it is there. `step` is the number of steps done. The caller removes the file when the run is over.

    settings: {name: word} that the run depends on. Raises UserError where the file was made with others, or is torn."""

    def __init__(self, path, settings, every):
        self.path, self.settings, self.every = Path(path), settings, every
        self.content = made_with(self.path, settings, "step") if self.path.exists() else {"step": 0}
        self.step = self.content["step"]

    def save(self, step, **parts):
        rng = gather((torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None))
        content = {"settings": self.settings, "step": step, "rng": rng, **parts}
        write_file(self.path, lambda file: torch.save(content, file))

    def restore_rng(self):
        """Go on with the saved random numbers; where the processes are now more or fewer, with new ones."""
        states, self.content = self.content["rng"], {}       # the rest, gigabytes, has been read
        if len(states) != world_size():
            torch.manual_seed(1_000_003 * (self.step + 1) + rank())
            return
        on_cpu, on_gpu = states[rank()]
        torch.set_rng_state(on_cpu)
        if on_gpu is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(on_gpu)


@contextlib.contextmanager
def stop_requests():
    """A context in which the first Ctrl-C or SIGTERM breaks nothing off, but makes the list that it yields non-empty;
    the second one breaks off. Does nothing outside the main thread, where Python allows no signal handlers."""
    asked = []

    def ask(number, frame):
        if asked and world_size() == 1:          # torchrun passes on a signal that the processes have had already
            raise KeyboardInterrupt
        asked.append(number)

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(model, loss_fn, steps, *, params=None, lr=1e-4, final_lr_ratio=1.0, warmup=0, clip=1.0,
          ema_decay=None, accumulate=1, compile=False, checkpointing=False, find_unused=False, on_step=None, state=None,
          record=None):
    """Take `steps` steps of AdamW (no weight decay, gradients clipped to norm `clip`) on `model`, in place.

    loss_fn(step) returns the loss, a scalar, and a dict of more numbers to report; it is called `accumulate` times a
    step, for as many parts of a batch, and under `autocast`. params: parameters or groups of them with rates of their
    own, by default all that require gradients. compile and checkpointing as in `tune_blocks`; find_unused: a step may
    leave some of params without a gradient, which DDP must look for. The rate rises linearly over `warmup` steps
    and falls along a cosine to `final_lr_ratio` times itself (1: constant). on_step(step, metrics) hears of every
    step. state: a TrainingState to go on from and to save to, with `record`, a list of plain data that grows along;
    loss_fn must then start with the batch of step `state.step`. Returns the exponential moving average of the model if
    ema_decay is given, else the model, in eval mode; its decay after n steps is min(ema_decay, (1 + n) / (10 + n)).
    Raises NonFiniteLoss before a step that would spoil the weights, and KeyboardInterrupt, once the state is saved,
    where stopping was asked for."""
    params = list(params or [p for p in model.parameters() if p.requires_grad])
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0, fused=True)
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    if world_size() > 1:                         # from here on all processes have the weights of the first
        loss_fn = DistributedDataParallel(Objective(loss_fn, weights), find_unused_parameters=find_unused)

    def rate(step):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        return min(1, (step + 1) / (warmup + 1)) * (final_lr_ratio + (1 - final_lr_ratio) * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def ema_step(averaged, current, n):
        # The decay warms up, so that a short run's average is not mostly its first step: with a constant 0.99, that
        # step would keep 0.99^99 = 37 % of the average after 100 steps.
        get_ema_multi_avg_fn(min(ema_decay, (1 + n.item()) / (10 + n.item())))(averaged, current, n)

    ema = AveragedModel(model, multi_avg_fn=ema_step) if ema_decay else None
    result = ema.module if ema else model
    tune_blocks(model, compile, checkpointing)               # the average has copies of the blocks as they were
    first = state.step if state else 0
    if first:
        for weight, saved in zip(weights, state.content["weights"], strict=True):
            weight.data.copy_(saved)
        optimizer.load_state_dict(state.content["optimizer"])
        schedule.load_state_dict(state.content["schedule"])
        if ema:
            ema.load_state_dict(state.content["ema"])
        if record is not None:
            record[:] = state.content["record"]
        state.restore_rng()
    with stop_requests() if state else contextlib.nullcontext() as asked:
        for step in range(first, steps):
            optimizer.zero_grad()
            loss = 0.0
            for part in range(accumulate):
                apart = world_size() > 1 and part + 1 < accumulate           # the gradients are averaged once a step
                with loss_fn.no_sync() if apart else contextlib.nullcontext():
                    with autocast(weights[0].device):
                        part_loss, metrics = loss_fn(step)
                    (part_loss / accumulate).backward()
                loss += part_loss.detach() / accumulate
            loss, norm = average(loss), nn.utils.clip_grad_norm_(weights, clip)
            if not math.isfinite(loss.item() + norm.item()):
                raise NonFiniteLoss(step, loss.item(), norm.item(), result)
            optimizer.step()
            if on_step:
                on_step(step, {"loss": loss.item(), "grad_norm": norm, "lr": schedule.get_last_lr()[-1]} | metrics)
            schedule.step()
            if ema:
                ema.update_parameters(model)
            stop = average(loss.new_tensor(float(bool(asked)))).item() > 0   # whichever process was asked
            if state and (stop or (step + 1) % state.every == 0):
                state.save(step + 1, weights=[weight.data for weight in weights], optimizer=optimizer.state_dict(),
                           schedule=schedule.state_dict(), ema=ema.state_dict() if ema else None, record=record)
            if stop:
                raise KeyboardInterrupt
    return result.eval()


def progress(label, steps, log_file=None, unit="steps", first=0):
    """An on_step that shows "label step/steps, loss, speed, time left" and appends lines of JSON to `log_file`, 100
    times over the run. Numbers are those of the step, the loss the mean since the last report. first: the step at
    which it starts."""
    start, losses, every = time.perf_counter(), [], max(1, steps // 100)
    live, reported = sys.stderr.isatty(), first // every     # in hundredths of the run

    def on_step(step, metrics):
        nonlocal reported
        if "loss" in metrics:
            losses.append(metrics["loss"])
        done, before, reported = step + 1, reported, (step + 1) // every
        if reported == before and done != steps:
            return
        speed = (done - first) / (time.perf_counter() - start)
        loss = f"  loss {sum(losses) / len(losses):.4f}" if losses else ""
        line = f"{label:8} {done}/{steps}{loss}  {speed:.3g} {unit}/s  {(steps - done) / speed:.0f} s left"
        if rank() == 0 and (live or done == steps or reported // 10 > before // 10):
            end = "" if live and done < steps else "\n"
            print(f"\r{line:<79}" if live else line, end=end, file=sys.stderr, flush=True)
        if log_file and rank() == 0:
            numbers = {name: torch.as_tensor(value).item() for name, value in metrics.items()}
            numbers |= {"loss": sum(losses) / len(losses), "steps_per_s": speed}
            with open(log_file, "a") as file:
                file.write(json.dumps({"stage": label, "step": done, **numbers}) + "\n")
        losses.clear()
    return on_step


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 10. Files, sampling with seeds, and pictures
#
# Every result is written under another name and then renamed, so that a whole file or none is there, whenever the
# program is stopped (log.jsonl alone grows line by line). Files are loaded as data, never as code.
# ---------------------------------------------------------------------------------------------------------------------

def open_folder(path):
    """The folder `path`, made if need be. Raises UserError where nothing can be written in it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"folder {path}: cannot be written ({error.strerror}); choose another") from None
    return path


def write_file(path, write):
    """Call write(file) on a new binary file and put it at `path` only when it is complete and on the disk. Of several
    processes, all of which must call this, the first writes while the others wait."""
    failed = None
    try:
        if rank() == 0:
            write_whole(Path(path), write)
    except (OSError, UserError) as error:
        failed = error
    told = gather(failed and str(failed))[0]     # a full disk ends all of them
    if failed or told:
        raise failed or UserError(told)


def write_whole(path, write):
    """`write_file` in one process."""
    folder, prefix = open_folder(path.parent), f".{path.name}."
    for torn in folder.glob(glob.escape(prefix) + "*"):          # a process killed while it wrote could not clean up
        torn.unlink(missing_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=prefix)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)               # mkstemp's are readable by their owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_checkpoint(path, model, sampling, classes, **more):
    """A checkpoint with all that is needed to sample from it: `ema` (the weights, under official names), `config` (the
    arguments of DiT or MAR), `sampling` (those of the objective's `sample`), `classes` (names), and more plain data."""
    content = {"ema": model.state_dict(), "config": model.config(), "sampling": sampling, "classes": classes, **more}
    write_file(path, lambda file: torch.save(content, file))


def read_checkpoint(path, expected=("ema", "config", "sampling", "classes")):
    """The content of a file written by `save_checkpoint`, a dict with at least the entries `expected`. It is read as
    data; nothing in it is run.

    Raises UserError, in one line, for a file that is missing, torn, foreign, or a pickle that would run code. A file
    named .safetensors is read by that package, where it is there."""
    try:
        if Path(path).suffix == ".safetensors":
            try:
                from safetensors.torch import load_file
            except ImportError:
                raise UserError(f"checkpoint {path} needs the package safetensors: pip install safetensors") from None
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):         # the `args` of official training runs
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UserError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"checkpoint {path}: {error.strerror or error}") from None
    except Exception as error:                   # torn archives end in RuntimeError, EOFError, OSError and others
        code = isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error)     # it names a class or function
        reason = "refused, it holds objects besides weights, which could run code; nothing was run" if code else \
            "not a PyTorch file, or only a part of one"
        raise UserError(f"checkpoint {path}: {reason}") from None
    if not isinstance(checkpoint, dict) or not set(expected) <= checkpoint.keys():
        raise UserError(f"checkpoint {path}: not one of this program's; expected the entries {', '.join(expected)}")
    return checkpoint


def made_with(path, settings, entry):
    """The content of a result file, a dict with `settings` and `entry`. Raises UserError, with the difference, where it
    was made with other settings than these, and where it is damaged."""
    try:
        result = read_checkpoint(path, (entry,)) if path.suffix == ".pt" else json.loads(path.read_text())
        made, _ = result["settings"], result[entry]
        different = [f"{flag} {made.get(flag)} (now {value})" for flag, value in settings.items()
                     if made.get(flag) != value]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged or not of this program; remove it, or choose another --out") from None
    if different:
        raise UserError(f"{path} was made with {', '.join(different)}: give the same flags, remove the file, or "
                        "choose another --out")
    return result


def unallocated(build):
    """What build() makes, with weights that have shapes and no memory."""
    with torch.device("meta"):
        return build()


def config_of(weights):
    """The arguments of DiT or MAR that fit a state dict of official names, told from its shapes. The heads, which no
    shape tells, are those of the model in ALL_MODELS of the same width. Raises ValueError where there is none, or where
    the weights are of neither."""
    def depth(name):
        return len({key.split(".")[1] for key in weights if key.startswith(f"{name}.")})

    def size(name, dimension=0):
        return weights[name].shape[dimension]

    try:
        if "fake_latent" in weights:
            D, T, F_ = *weights["diffusion_pos_embed_learned"].shape[:0:-1], size("z_proj.weight", 1)
            config = {"input_size": math.isqrt(T), "patch_size": 1, "in_channels": F_,       # so in official ones
                      "encoder_depth": depth("encoder_blocks"), "decoder_depth": depth("decoder_blocks"),
                      "mlp_ratio": size(next(key for key in weights if key.endswith("mlp.fc1.bias"))) / D,
                      "num_classes": size("class_emb.weight"),
                      "buffer_size": size("encoder_pos_embed_learned", 1) - T,
                      "diffloss_w": size("diffloss.net.input_proj.bias"),
                      "diffloss_d": len({key.split(".")[3] for key in weights if "net.res_blocks" in key})}
        else:
            (D, C, P, _), T = weights["x_embedder.proj.weight"].shape, size("pos_embed", 1)
            config = {"input_size": math.isqrt(T) * P, "patch_size": P, "in_channels": C, "depth": depth("blocks"),
                      "mlp_ratio": size("blocks.0.mlp.fc1.bias") / D,
                      "num_classes": size("y_embedder.embedding_table.weight") - 1,          # the last row is no class
                      "learn_sigma": size("final_layer.linear.bias") == 2 * C * P * P}
    except (KeyError, IndexError, ValueError, AttributeError, StopIteration) as error:
        raise ValueError(f"not the weights of a DiT or MAR ({error})") from None
    heads = {build.keywords["hidden_size"]: build.keywords["num_heads"] for build in ALL_MODELS.values()}
    if D not in heads:
        raise ValueError(f"width {D} is of no known model ({', '.join(map(str, heads))}), so its heads are unknown")
    return config | {"hidden_size": D, "num_heads": heads[D]}


def load_checkpoint(path, device="cpu"):
    """The model of a checkpoint, in eval mode on `device`, and a dict with its `config`, `sampling` and `classes`.

    Takes this program's checkpoints, and those of facebookresearch/DiT, of SiT, LTH14/mar and the public TinyFusion
    code: a plain state dict, or a dict with `ema` or `model_ema` (preferred) or `model`, whose names may start with
    "module."; the size is then told from the shapes, and `sampling` is the paper's. Raises UserError as
    `read_checkpoint` does, and where weights and configuration disagree. Nothing is allocated before they have been
    compared."""
    checkpoint = read_checkpoint(path, ())
    weights = next((checkpoint[name] for name in ("ema", "model_ema", "model") if name in checkpoint), checkpoint)
    try:
        weights = {name.removeprefix("module."): weight.float() for name, weight in weights.items()}
        config = checkpoint["config"] if "config" in checkpoint else config_of(weights)
        blocks = sum(config.get(name, 0) for name in ("depth", "encoder_depth", "decoder_depth"))
        if blocks > len(weights):
            raise ValueError(f"{blocks} blocks with {len(weights)} weights")
        model = unallocated(functools.partial(MAR if "fake_latent" in weights else DiT, **config))
    except (TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"checkpoint {path}: weights and config disagree: {reason}") from None
    expected, found = ({name: tuple(w.shape) for name, w in side.items()} for side in (model.state_dict(), weights))
    wrong = [f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'nothing of that name')}"
             for name in expected | found if found.get(name) != expected.get(name)]
    if wrong:
        raise UserError(f"checkpoint {path}: {len(wrong)} weights disagree with its config: {'; '.join(wrong[:3])}")
    model.load_state_dict(weights, assign=True)
    official = {"sampling": {"steps": 250, "guidance": 1.5, "eta": 1.0, "clip_denoised": False},
                "classes": [str(i) for i in range(model.num_classes)]}
    if model.objective == "mar":                 # the repository's settings for MAR-L
        official["sampling"] = {"steps": 256, "guidance": 3.0, "head_steps": 100, "temperature": 1.0}
    told = checkpoint.get("objective", model.objective)
    if told not in tuple(OBJECTIVES) or (told == "mar") != (model.objective == "mar"):
        raise UserError(f"checkpoint {path}: objective {told!r} of a {type(model).__name__}; expected one of "
                        f"{', '.join(OBJECTIVES)}, mar for a MAR alone")
    return model.to(device).eval(), official | checkpoint | {"config": model.config()}


def noise_source(indices, shape, seed, device="cpu"):
    """A function that returns fresh standard normal noise (B, *shape) at every call, or (B, *other) where it is given
    another shape. Image `i` of a `seed` has a random stream of its own, so it is the same image whatever the batch it
    is drawn in, on any device."""
    streams = [np.random.Generator(np.random.Philox(key=[seed, i])) for i in indices]

    def draw(*other):
        size = other or tuple(shape)
        noise = torch.from_numpy(np.stack([s.standard_normal(size, dtype=np.float32) for s in streams]))
        if torch.device(device).type == "cuda":  # from pinned memory the copy does not wait for the GPU
            return noise.pin_memory().to(device, non_blocking=True)
        return noise.to(device)
    return draw


def sample_images(model, diffusion, labels, indices, shape, seed, sampling, decode=to_uint8):
    """Images, by default uint8 (B, C, H, W), on the CPU, of `labels` (B,), from the noise of images `indices` of
    `seed`. `sampling` is a dict of arguments of the objective's `sample`; decode makes images of what it returns."""
    draw = noise_source(indices[:len(labels)], shape, seed, labels.device)
    return decode(diffusion.sample(model, labels, draw, **sampling)).cpu()


def image_grid(images, columns, cell=48):
    """A PIL image of uint8 images (N, C, H, W), row by row, each magnified by a whole factor to about `cell` pixels."""
    N, C, H, W = images.shape
    factor, rows = max(1, cell // H), -(-N // columns)
    pixels = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3).permute(0, 2, 3, 1).numpy()
    h, w = H * factor + 2, W * factor + 2
    grid = np.full((rows * h, columns * w, C), 255, np.uint8)
    for i, image in enumerate(pixels):
        y, x = i // columns * h + 1, i % columns * w + 1
        grid[y:y + h - 2, x:x + w - 2] = image
    return Image.fromarray(grid.squeeze(-1) if C == 1 else grid).convert("RGB")


def write_png(path, image):
    """A PIL image as a PNG file, whole or not at all."""
    write_file(path, lambda file: image.save(file, format="PNG"))


def text(draw, xy, words, anchor="la", size=14, fill=(40, 40, 40)):
    """Words on a drawing, in Pillow's own font."""
    draw.text(xy, words, fill=fill, font=ImageFont.load_default(size), anchor=anchor)


def draw_samples(path, rows, labels):
    """samples.png. rows: (title, uint8 images (n, C, H, W)) pairs; labels: the names of the n columns."""
    grids = [image_grid(images, len(labels)) for _, images in rows]
    width, height = grids[0].size
    left, top = 190, 30
    sheet = Image.new("RGB", (left + width + 10, top + len(rows) * (height + 8)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(labels):
        text(draw, (left + (i + 0.5) * width / len(labels), top - 6), name[:7], anchor="ms")
    for i, ((title, _), grid) in enumerate(zip(rows, grids)):
        y = top + i * (height + 8)
        sheet.paste(grid, (left, y))
        text(draw, (left - 10, y + height / 2), title, anchor="rm")
    write_png(path, sheet)


def draw_decisions(path, history, groups, kept):
    """decisions.png: the chance of every block to be kept (dark: kept) over the steps of learning. history: a list of
    (step, chances (L,)), from `learn_layers`."""
    chances = np.array([chances for _, chances in history]).T                # (L, points)
    cell, width, left, top, light, dark = 26, 600, 70, 62, (244, 246, 250), (18, 62, 130)
    bottom, right = top + len(chances) * cell, left + width

    def heat(p, size):                           # numbers from 0 to 1 as colours from light to dark
        pixels = np.array(light) + np.array(p)[..., None] * (np.array(dark) - np.array(light))
        return Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)

    sheet = Image.new("RGB", (right + 170, bottom + 62), "white")
    sheet.paste(heat(chances, (width, bottom - top)), (left, top))
    sheet.paste(heat(np.linspace(1, 0, 100)[:, None], (16, bottom - top)), (right + 100, top))       # the scale
    draw = ImageDraw.Draw(sheet)
    text(draw, (left, 14), "Chance of every block to be kept while the mask is learned", size=18)
    text(draw, (left - 10, top - 8), "block", anchor="rs")
    for block in range(len(chances)):
        y = top + block * cell
        draw.line((left, y, right, y), fill="white")
        text(draw, (left - 10, y + cell / 2), str(block), anchor="rm")
        text(draw, (right + 10, y + cell / 2), "kept" if block in kept else "dropped", anchor="lm",
             fill=dark if block in kept else (150, 150, 150))
    for edge in itertools.accumulate([m for _, m in groups], initial=0):     # a line between groups
        draw.line((left - 34, top + edge * cell, right + 66, top + edge * cell), fill=(120, 120, 120))
    for part in (0, 0.25, 0.5, 0.75, 1):
        text(draw, (left + part * width, bottom + 20), f"{history[-1][0] * part:.0f}", anchor="ms")
        text(draw, (right + 124, bottom - part * (bottom - top)), f"{part:g}", anchor="lm")
    text(draw, (left + width / 2, bottom + 46), "step of learning", anchor="ms")
    write_png(path, sheet)


def draw_recoverability(path, title, dots, marks):
    """recoverability.png: the loss after pruning against the toy-FID after recovery, both axes logarithmic. dots:
    (loss, toy-FIDs of the recovery seeds) of every mask; marks: (name, numbers of its dots) of the criteria."""
    left, top, right, bottom = 90, 60, 690, 600
    sheet = Image.new("RGB", (right + 390, bottom + 70), "white")
    draw, grey, dark, red = ImageDraw.Draw(sheet), (170, 178, 190), (18, 62, 130), (205, 60, 20)

    def axis(values, start, end):                # a number to its place between two pixels, and round numbers to name
        low, high = math.log(min(values) / 1.15), math.log(max(values) * 1.15)
        ticks = [a * 10.0 ** e for e in range(-9, 9) for a in (1, 2, 3, 5, 7)]
        return (lambda v: start + (math.log(v) - low) / (high - low) * (end - start),
                [tick for tick in ticks if low <= math.log(tick) <= high])

    x_of, x_ticks = axis([loss for loss, _ in dots], left, right)
    y_of, y_ticks = axis([fid for _, fids in dots for fid in fids if 0 < fid < math.inf] or [1], bottom, top)
    text(draw, (left - 60, 10), title, size=18)
    for tick in x_ticks:
        draw.line((x_of(tick), top, x_of(tick), bottom), fill=(232, 235, 240))
        text(draw, (x_of(tick), bottom + 20), f"{tick:g}", anchor="ms")
    for tick in y_ticks:
        draw.line((left, y_of(tick), right, y_of(tick)), fill=(232, 235, 240))
        text(draw, (left - 10, y_of(tick)), f"{tick:g}", anchor="rm")
    text(draw, ((left + right) / 2, bottom + 48), "loss right after pruning (logarithmic)", anchor="ms")
    text(draw, (left - 60, top - 14), "toy-FID after recovery (logarithmic, lower is better)", anchor="ls")
    named = {}
    for number, (_, places) in enumerate(marks, 1):
        for dot in places:
            named.setdefault(dot, []).append(number)
    for dot, (loss, fids) in sorted(enumerate(dots), key=lambda item: item[0] in named):    # named ones on top
        if not all(0 < fid < math.inf for fid in fids):
            continue                             # it diverged: no place on this map
        x, y = x_of(loss), y_of(np.mean(fids))
        draw.line((x, y_of(min(fids)), x, y_of(max(fids))), fill=grey)       # the recovery seeds, from best to worst
        learned = any("learned" in marks[number - 1][0] for number in named.get(dot, ()))
        radius, colour = (5, red if learned else dark) if dot in named else (3, grey)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        text(draw, (x + 8, y - 4), ",".join(map(str, named.get(dot, ()))), anchor="ls", fill=colour)
    for number, (name, _) in enumerate(marks, 1):
        text(draw, (right + 30, top + 24 * number), f"{number}  {name}", fill=red if "learned" in name else dark)
    text(draw, (right + 30, bottom), "dots: means, lines: recovery seeds, *: not ranked itself", anchor="ls")
    write_png(path, sheet)


def print_table(header, rows):
    """Print rows of words as a table that is one in Markdown too."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [header, [("-" if i == 0 else "-:").rjust(width, "-") for i, width in enumerate(widths)], *rows]
    print()
    for first, *others in lines:
        words = [first.ljust(widths[0]), *(word.rjust(width) for word, width in zip(others, widths[1:]))]
        print("|", " | ".join(words), "|")


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 11. The laboratory: does learning beat the rules?
#
# Older methods drop the blocks that hurt least *now*. The paper's claim (its Table 3 and Figure 5): the loss right
# after pruning does not tell how good a model will be after fine-tuning, its recoverability. Here that can be seen.
# First come the criteria that learning is compared with, each a function of one shape:
#
#        kept = criterion(model, groups, diffusion, examples)
#
# Then the laboratory, which recovers what they choose with one budget, the same data, noise and seeds, and three
# comparisons: of criteria (Table 3; with 12 blocks and groups 1:2 there are only 64 masks, and all are recovered, so
# that every choice has a rank), of groups and weight updates (Table 4), and of ways to recover (Table 5). Recovery is
# plain fine-tuning in the first two, as in the paper's tables: a teacher would make up for a bad choice.
# ---------------------------------------------------------------------------------------------------------------------

def fixed_examples(diffusion, data, n=512, seed=0, device="cpu", batch_size=128):
    """Batches (x0, y, t, noise), x0 and noise (B, C, H, W), y and t (B,), of n examples in all (fewer where there are
    fewer images), the same at every call, on which models can be compared without training them. The timesteps are
    those of the objective's `spread_t`. data: an ImageSet or a LatentSet."""
    x0, y = next(data_batches(data, n, seed, device))
    t = diffusion.spread_t(len(y), device)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    return list(zip(*(values.split(batch_size) for values in (x0, y, t, noise))))


@torch.no_grad()
def calibration_loss(model, diffusion, examples):
    """Mean training loss of a model, in eval mode, on `fixed_examples`: a float."""
    return torch.cat([diffusion.training_losses(model, x0, t, y, noise)["loss"]
                      for x0, y, t, noise in examples]).mean().item()


def block_scores(model, diffusion, examples, score):
    """score(x, out), from a block's input and output (B, T, D) to (B,), of every block on all examples: (n, L)."""
    seen = [[] for _ in model.blocks]
    hooks = [block.register_forward_hook(lambda _, args, out, scores=scores: scores.append(score(args[0], out).cpu()))
             for block, scores in zip(model.blocks, seen)]
    calibration_loss(model, diffusion, examples)
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(scores) for scores in seen], dim=1)


def massive_activation(h):
    """The largest |h - mean| / std of hidden states (B, T, D), per example: (B,). The paper masks what is above 2."""
    return ((h - h.mean((1, 2), keepdim=True)).abs() / h.std((1, 2), keepdim=True)).amax((1, 2))


def keep_highest(scores, groups):
    """As many blocks as the groups keep in all, those of the highest scores (L,), ascending. The criteria below rank
    all blocks together, so a group may keep more than its N, or none."""
    return sorted(scores.argsort(descending=True, stable=True)[:sum(n for n, _ in groups)].tolist())


def shortgpt(model, groups, diffusion, examples):
    """Block influence: drop the blocks whose output points where their input did (highest mean cosine similarity). The
    last block always stays. Source: ShortGPT, arXiv:2403.03853."""
    similarity = block_scores(model, diffusion, examples, lambda x, out: F.cosine_similarity(x, out, dim=-1).mean(1))
    scores = -similarity.mean(0)
    scores[-1] = math.inf
    return keep_highest(scores, groups)


def flux_lite(model, groups, diffusion, examples):
    """Drop the blocks with the smallest mean squared difference of input and output. Source: Flux.1 Lite."""
    change = block_scores(model, diffusion, examples, lambda x, out: mean_flat((out - x) ** 2))
    return keep_highest(change.mean(0), groups)


def sensitivity(model, groups, diffusion, examples):
    """Drop the blocks whose removal, each alone, raises the loss least."""
    blocks = range(len(model.blocks))
    return keep_highest(torch.tensor([calibration_loss(prune(model, [j for j in blocks if j != i]), diffusion, examples)
                                      for i in blocks]), groups)


def oracle(model, groups, diffusion=None, examples=None):
    """A rule without data: of every pair of blocks keep the first in the first half of the model and the last in the
    second, so that both ends stay. Raises ValueError where it is not half of an even number of blocks that is to be
    kept. Source: BK-SDM, arXiv:2305.15798."""
    depth = len(model.blocks)
    if depth != 2 * sum(n for n, _ in groups):
        raise ValueError(f"the oracle keeps one block of every pair, not {sum(n for n, _ in groups)} of {depth}")
    return [i if i < depth / 2 else i + 1 for i in range(0, depth, 2)]


def random_choice(model, groups, diffusion=None, examples=None):
    """One candidate of every group, all equally likely, by torch's random numbers."""
    return LayerSampler(groups)(1)[0].nonzero().flatten().tolist()


def random_search(model, groups, diffusion, examples, place, tries=64):
    """Of so many random choices, the one at `place` in the order of their loss: 0 lowest, 0.5 median, 1 highest."""
    choices = {tuple(random_choice(model, groups)) for _ in range(tries)}
    ranked = sorted(choices, key=lambda kept: (calibration_loss(prune(model, kept), diffusion, examples), kept))
    return list(ranked[round(place * (len(ranked) - 1))])


CRITERIA = {
    "shortgpt": shortgpt, "flux-lite": flux_lite, "sensitivity": sensitivity, "oracle": oracle, "random": random_choice,
    "random-lowest": functools.partial(random_search, place=0.0),
    "random-median": functools.partial(random_search, place=0.5),
    "random-highest": functools.partial(random_search, place=1.0),
}


class Notebook:
    """Results of finished jobs in one JSON file, written anew, whole, after every job. A job that stands there is not
    done again: a long comparison can be stopped at any point and continued, and no mask is recovered twice.

    settings: {name: word}, what all jobs depend on. Raises UserError where the file was made with others, or is torn.
    """

    def __init__(self, path, settings):
        self.path, self.settings, self.jobs = Path(path), settings, {}
        if self.path.exists():
            self.jobs = made_with(self.path, settings, "jobs")["jobs"]

    def once(self, job, work):
        """The result of `job`, a sentence that says all that it depends on. work() is called where there is none."""
        if job not in self.jobs:
            self.jobs[job] = work()
            content = json.dumps({"settings": self.settings, "jobs": self.jobs}, indent=0)
            write_file(self.path, lambda file: file.write(content.encode()))
        return self.jobs[job]


class Injected(nn.Module):
    """A teacher whose hidden states have one massive activation each: channel 0 of token 0 is `size` standard
    deviations, as they were without it. To show what it does to feature KD; the model's output is not touched."""

    def __init__(self, teacher, size):
        super().__init__()
        self.teacher, self.size = teacher, size

    def forward(self, *args, hidden=None):
        out, features = self.teacher(*args, hidden=hidden)
        for h in features:
            h[:, 0, 0] = self.size * h.std((1, 2))
        return out, features


class Laboratory:
    """One teacher and one budget for every choice of blocks: `choose` them, then see them `recovered`.

    data: an ImageSet; learning, recovery: keyword arguments of `learn_layers` and `recover`; sampling: those of
    `GaussianDiffusion.sample`; samples: images drawn to measure a model."""

    def __init__(self, teacher, data, diffusion, notebook, batch_size, learning, recovery, samples, sampling):
        self.teacher, self.data, self.diffusion, self.notebook = teacher, data, diffusion, notebook
        self.batch_size, self.learning, self.recovery = batch_size, learning, recovery
        self.samples, self.sampling = samples, sampling
        self.device = next(teacher.parameters()).device
        self.examples = fixed_examples(diffusion, data, device=self.device)

    @functools.cached_property
    def judge(self):
        """The classifier whose features toy-FID is measured in, trained when it is first needed, and what it sees in
        the data."""
        judge = train_classifier(self.data, self.device)[0]
        return judge, statistics_of_data(self.data, judge.look)

    def batches(self, seed):
        return data_batches(self.data, self.batch_size, seed, self.device)

    def choose(self, how, groups, seed=0, **learning):
        """The blocks that `how`, a name in CRITERIA or "learned", keeps: a dict of `kept` and the `seconds` it took."""
        learning = {"update": "lora"} | learning if how == "learned" else {}

        def work():
            torch.manual_seed(seed)
            start = time.perf_counter()
            if how in CRITERIA:
                kept = CRITERIA[how](self.teacher, groups, self.diffusion, self.examples)
            else:
                settings = self.learning | learning
                loss_fn = masked_denoising(self.diffusion, self.batches(seed),
                                           snr_gamma=settings.pop("snr_gamma", math.inf))
                report = progress(f"learn {learning['update']}, seed {seed} ", settings["steps"])
                kept = learn_layers(self.teacher, loss_fn, groups, on_step=report, **settings)[0].kept()
            return {"kept": kept, "seconds": time.perf_counter() - start}
        return self.notebook.once(f"{how} {learning or ''} for groups {groups}, seed {seed}", work)

    def recover_all(self, jobs):
        """Prune, recover and measure for each of `jobs`, (kept blocks, seed, dict of kd, k and groups as in `recover`
        and `match_blocks`, and injected as in `Injected`). Returns a dict for each: `loss_after_pruning` and `loss`,
        on the fixed examples, and `toy_fid`, the latter two inf where recovery diverged; `first_loss`, that of the
        first step, which is of whatever `kd` makes it."""
        named = [(f"{list(job[0])} recovered with seed {job[1]} {job[2] or ''}", job) for job in jobs]
        new = {name: job for name, job in named if name not in self.notebook.jobs}
        report = progress("recover", len(new), unit="models")
        for done, (name, job) in enumerate(new.items()):
            self.notebook.once(name, functools.partial(self.recover_one, *job))
            report(done, {})
        return [self.notebook.jobs[name] for name, _ in named]

    def recover_one(self, kept, seed, how):
        """One job of `recover_all`, done: its dict. What `how` leaves out is plain fine-tuning."""
        how, losses = {"kd": "none", "groups": (), "k": 2.0, "injected": 0} | how, []
        student = prune(self.teacher, kept)
        before = calibration_loss(student, self.diffusion, self.examples)
        teacher = Injected(self.teacher, how["injected"]) if how["injected"] else self.teacher
        torch.manual_seed(seed)
        try:
            pairs = match_blocks(how["groups"], kept, self.teacher.cuts)
            student = recover(student, teacher, self.diffusion, self.batches(seed), pairs, kd=how["kd"], k=how["k"],
                              on_step=lambda step, seen: losses.append(seen["loss"]), **self.recovery)
        except NonFiniteLoss:
            return {"loss_after_pruning": before, "loss": math.inf, "first_loss": (losses + [math.inf])[0],
                    "toy_fid": math.inf}
        judge, real = self.judge
        labels = spread_labels(self.data, self.samples)
        rows, _ = measure({"student": student}, labels, self.data.shape, judge.look, real, self.diffusion,
                          self.sampling, to_uint8, seed=seed, label=None)
        return {"loss_after_pruning": before, "loss": calibration_loss(student, self.diffusion, self.examples),
                "first_loss": losses[0], "toy_fid": rows["student"]["fid"]}


def spread(values, digits=2):
    """"mean ± standard deviation" of some numbers, or the number if it is one, or how many are not finite."""
    if not np.isfinite(values).all():
        return f"diverged ({np.sum(~np.isfinite(values))} of {len(values)})"
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def spearman(a, b):
    """Spearman's rank correlation of two lists of numbers."""    # scipy imports scipy.stats at its first use
    return float(scipy.stats.spearmanr(a, b).statistic)


def every_choice(groups, at_most=64):
    """All choices of blocks that the groups allow, as tuples; where they are too many, so many random ones."""
    if math.prod(math.comb(m, n) for n, m in groups) > at_most:
        torch.manual_seed(0)
        return list({tuple(random_choice(None, groups)): None for _ in range(at_most)})
    starts = itertools.accumulate((m for _, m in groups), initial=0)
    parts = [itertools.combinations(range(start, start + m), n) for start, (n, m) in zip(starts, groups)]
    return [sum(choice, ()) for choice in itertools.product(*parts)]


# The paper's method, and what did better here. Counting all timesteps alike, the loss is mostly that of the last traces
# of noise, which a drawn image hardly shows; min-SNR weights them down.
RECIPES = {"the paper's method": {}, "weighted by min-SNR": {"snr_gamma": 5.0}}

COLUMNS = ["method", "kept blocks", "loss after pruning", "loss after recovery", "toy-FID after recovery",
           "seconds to choose"]


def recover_choices(lab, chosen, seeds, pool=()):
    """Recover what was chosen, {method: [a result of lab.choose, ...]}. Returns a table's rows (COLUMNS): mean and
    standard deviation over the recovery seeds, where seed i recovers choice i of a method that has several. With a
    `pool` of masks, all masks are recovered with every seed, and the second result is {kept: [dict of each seed]}."""
    kepts = {name: [tuple(choice["kept"]) for choice in choices] for name, choices in chosen.items()}
    turns = {name: [(ks[i % len(ks)], seed) for i, seed in enumerate(seeds)] for name, ks in kepts.items()}
    masks = list(dict.fromkeys(sum(kepts.values(), []) + list(pool))) if pool else []
    jobs = [(kept, seed) for seed in seeds for kept in masks] or list(dict.fromkeys(sum(turns.values(), [])))
    found = dict(zip(jobs, lab.recover_all([(kept, seed, {}) for kept, seed in jobs])))
    rows = []
    for name, choices in chosen.items():
        often, of = max(kepts[name], key=kepts[name].count), [found[turn] for turn in turns[name]]
        times = f" ({kepts[name].count(often)} of {len(choices)})" if len(choices) > 1 else ""
        rows.append([name, " ".join(map(str, often)) + times,
                     spread([result["loss_after_pruning"] for result in (of if len(choices) > 1 else of[:1])], 3),
                     spread([result["loss"] for result in of], 4), spread([result["toy_fid"] for result in of], 1),
                     spread([choice["seconds"] for choice in choices], 1)])
    return rows, {kept: [found[kept, seed] for seed in seeds] for kept in masks}


def compare_criteria(lab, groups, quick, out):
    """Table 3 and Figure 5 in miniature: every criterion's choices, and all masks that the groups allow."""
    seeds, learn_seeds, pool = range(3), range(10), every_choice(groups)
    if quick:
        seeds = learn_seeds = range(1)
        pool = [pool[i] for i in torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))[:8]]
    chosen = {f"learned, {name}": [lab.choose("learned", groups, seed, **recipe) for seed in learn_seeds]
              for name, recipe in RECIPES.items()}
    for name in CRITERIA:                        # only what is random depends on the seed
        try:
            chosen[name] = [lab.choose(name, groups, seed) for seed in (seeds if "random" in name else [0])]
        except ValueError as error:
            print(f"{name} is left out: {error}")
    rows, results = recover_choices(lab, chosen, seeds, pool)
    fid = {kept: np.mean([result["toy_fid"] for result in results[kept]]) for kept in results}
    marks, numbers = [], {kept: i for i, kept in enumerate(results)}
    for row, (name, choices) in zip(rows, chosen.items()):
        counts = collections.Counter(tuple(choice["kept"]) for choice in choices)
        ranks = {kept: f"{1 + sum(fid[other] < fid[kept] for other in pool)}{'' if kept in pool else '*'}"
                 for kept in sorted(counts, key=fid.get)}
        row.append(", ".join(ranks[kept] + f" ({counts[kept]}x)" * (counts[kept] > 1) for kept in ranks))
        marks.append((f"{name}: rank {row[-1]}", [numbers[kept] for kept in counts]))
    print_table(COLUMNS + [f"rank among {len(pool)}"], rows)
    fids = np.array([[result["toy_fid"] for result in results[kept]] for kept in pool])      # (masks, seeds)
    before, after = ([np.mean([result[key] for result in results[kept]]) for kept in pool]
                     for key in ("loss_after_pruning", "loss"))
    print(f"\n*: not one of the {len(pool)} masks that are ranked; so many of them are better, plus one.\n"
          f"Over the {len(pool)} masks, Spearman's correlation with toy-FID after recovery is "
          f"{spearman(before, fids.mean(1)):.2f} for the loss\nafter pruning and "
          f"{spearman(after, fids.mean(1)):.2f} for the loss after recovery.")
    if len(seeds) > 1:
        moves = np.ptp(scipy.stats.rankdata(fids, axis=0), axis=1)
        alike = min(spearman(fids[:, a], fids[:, b]) for a, b in itertools.combinations(seeds, 2))
        print(f"Over the recovery seeds a mask's rank varies by {np.median(moves):.0f} in the median and by "
              f"{moves.max():.0f} at most;\nSpearman's correlation of two seeds' toy-FIDs is at least {alike:.3f}.")
    dots = [(found[0]["loss_after_pruning"], [result["toy_fid"] for result in found]) for found in results.values()]
    draw_recoverability(out / "recoverability.png", f"{len(dots)} choices of blocks recovered, {len(seeds)} seeds each",
                        dots, marks)


def compare_groups(lab, groups, quick, out):
    """Table 4 in miniature: 1:2, 2:4 and half of all, each learned with LoRA, a full update, and frozen weights."""
    depth, seeds, chosen = len(lab.teacher.blocks), range(1 if quick else 3), {}
    for pattern in ("1:2", f"{depth // 2}:{depth}") if quick else ("1:2", "2:4", f"{depth // 2}:{depth}"):
        try:
            groups = parse_groups(pattern, depth)
        except ValueError as error:
            print(f"{pattern} is left out: {error}")
            continue
        for update in ("lora", "full", "frozen"):
            chosen[f"{pattern}, {update}"] = [lab.choose("learned", groups, seed, update=update) for seed in seeds]
    print_table(COLUMNS, recover_choices(lab, chosen, seeds)[0])


RECOVERIES = {
    "fine-tuning": {}, "logits KD": {"kd": "logits"}, "feature KD": {"kd": "feature"},
    "masked KD, 0.1 sigma": {"kd": "masked", "k": 0.1}, "masked KD, 2 sigma": {"kd": "masked", "k": 2.0},
    "masked KD, 4 sigma": {"kd": "masked", "k": 4.0},
    "feature KD, one injected": {"kd": "feature", "injected": 1000},
    "masked KD, 2 sigma, one injected": {"kd": "masked", "k": 2.0, "injected": 1000},
}


def compare_recovery(lab, groups, quick, out):
    """Table 5 in miniature."""
    seeds = range(1 if quick else 3)
    kepts = [lab.choose("learned", groups, seed)["kept"] for seed in seeds]
    found = lab.recover_all([(kepts[seed], seed, {"groups": groups} | how if how else {})
                             for how in RECOVERIES.values() for seed in seeds])
    rows = []
    for i, name in enumerate(RECOVERIES):
        part = found[i * len(seeds):(i + 1) * len(seeds)]
        rows.append([name, *(spread([result[key] for result in part], digits)
                             for key, digits in (("first_loss", 3), ("loss", 4), ("toy_fid", 1)))])
    print_table(["recovery", "first loss", "loss after recovery", "toy-FID after recovery"], rows)
    largest = block_scores(lab.teacher, lab.diffusion, lab.examples, lambda x, out: massive_activation(out)).amax(0)
    print("\nLargest |h - mean| / std in the teacher's blocks:", *(f"{value:.1f}" for value in largest))


COMPARISONS = {"criteria": compare_criteria, "groups": compare_groups, "recovery": compare_recovery}


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 12. The command line
#
# Four stages, each with one result in the output folder. A result carries the settings it was made with: found again
# with the same ones it is reused; with others, the run stops before it does anything. A stage that was stopped goes on.
# --compare trains the teacher if need be, and then goes to the laboratory instead. --encode and --fid stand alone.
# ---------------------------------------------------------------------------------------------------------------------

MODELS = ("teacher", "pruned", "student")
RESULTS = {"teacher": "teacher.pt", "learn": "layers.json", "recover": "student.pt", "measure": "results.json"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, of one process."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n" if os.environ.get("RANK", "0") == "0" else None)


def number(kind, low, high=math.inf):
    """An argparse type: a number of type `kind` from low to high."""
    def parse(word):
        try:
            value = kind(word)
        except ValueError:
            value = math.nan
        if not low <= value <= min(high, 1e9):
            limits = f"of at least {low}, up to a billion" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{word!r}: expected a {'whole ' * (kind is int)}number {limits}")
        return value
    return parse


def nonempty(word):
    """An argparse type: any word but the empty one."""
    if not word:
        raise argparse.ArgumentTypeError("expected a name, got nothing")
    return word


def word_list(*words):
    """An argparse type: some of these words, in their order."""
    def parse(list_):
        asked = list_.split(",")
        if not set(asked) <= set(words):
            raise argparse.ArgumentTypeError(f"{list_!r}: expected some of {','.join(words)}")
        return [word for word in words if word in asked]
    return parse


def block_list(word):
    """An argparse type: numbers of blocks, ascending."""
    blocks = [int(part) if part.isdecimal() else -1 for part in word.split(",")]
    if blocks != sorted(set(blocks)) or blocks[0] < 0:
        raise argparse.ArgumentTypeError(f"{word!r}: expected numbers of blocks, ascending, as in 0,2,5")
    return blocks


COUNT, RATE = number(int, 1), number(float, 1e-12)
# Flag and placeholder; type, or the words allowed; default, a pair where the toy's differs from that of the other
# models; the first stage whose result depends on it; help.
FLAGS = [
    ("--model NAME", tuple(ALL_MODELS), "toy", "teacher", f"one of {', '.join(ALL_MODELS)}"),
    ("--ckpt FILE", nonempty, None, "teacher",
     "start from this teacher, official or ours, instead of training one; --model is told from it"),
    ("--objective NAME", ("ddpm", "flow"), None, "teacher",
     "ddpm, as DiT, or flow, as SiT, whose official checkpoints do not tell (ddpm, or the checkpoint's; a MAR has its "
     "own)"),
    ("--data DIR", nonempty, None, "teacher",
     "folder of images, one sub-folder per class, or of latents; without it, drawn digits"),
    ("--image-size N", number(int, 4), None, "teacher",
     "side to which images are scaled and cropped, in pixels (16; of --ckpt, its input's; 256 with --encode)"),
    ("--batch-size N", COUNT, (64, 256), "teacher", "images per step, in all processes together"),
    ("--seed N", number(int, 0, 2 ** 31), 0, "teacher", "seed of everything random"),
    ("--ema X", number(float, 0, 0.999999), (0.99, 0.9999), "teacher", "decay of the average of the weights"),
    ("--teacher-steps N", COUNT, (1200, 400_000), "teacher", "training steps (batches, not epochs) of a new teacher"),
    ("--teacher-lr X", RATE, (1e-2, 1e-4), "teacher", "the teacher's learning rate; MAR-toy 0.002"),
    ("--criterion NAME", ("learned", *CRITERIA), "learned", "learn",
     f"how the blocks to keep are chosen: learned, {', '.join(CRITERIA)}"),
    ("--kept LIST", block_list, None, "learn", "keep these blocks, as in 0,2,5, instead of choosing any"),
    ("--groups N:M", str, "1:2", "learn", "keep N of every M blocks; or one N:M per group, as in 2:4,3:4,2:4"),
    ("--learn-steps N", COUNT, (300, 10_000), "learn", "steps of learning which blocks to keep"),
    ("--learn-batch-size N", COUNT, None, "learn", "images per step of learning (--batch-size / half of it)"),
    ("--logits-lr X", RATE, (3e-3, 1e-3), "learn", "learning rate of the mask's logits"),
    ("--update HOW", ("lora", "full", "frozen"), "lora", "learn", "weights that train along: lora, full, frozen"),
    ("--rank N", COUNT, 8, "learn", "rank of the LoRA update; its alpha is twice that"),
    ("--learn-lr X", RATE, (1e-3, 1e-4), "learn", "learning rate of the weight update"),
    ("--dropped-share X", number(float, 0.001, 1), 1.0, "learn", 
     "share of the examples that skip a block which run it all the same, for the mask's gradient; 1: exact"),
    ("--snr-gamma X", number(float, 1e-3), None, "learn",
     "learn with timesteps weighted by min-SNR of this gamma, such as 5; without it, all count alike"),
    ("--recover-steps N", COUNT, (300, 100_000, 100), "recover", "fine-tuning steps of the student"),
    ("--recover-lr X", RATE, (2e-3, 2e-4), "recover", "the student's learning rate"),
    ("--kd HOW", KD_MODES, "masked", "recover", f"what the student learns from: {', '.join(KD_MODES)}"),
    ("--measure LIST", word_list(*MODELS), ",".join(MODELS), "measure", "models for stage measure"),
    ("--samples N", number(int, 10), (500, 50_000, 500), "measure", "images drawn from each model to measure it"),
    ("--sample-steps N", number(int, 2, 1000), (50, 250, 25), "measure",
     "sampling steps per image; MAR-toy 8, MAR-L and MAR-B 256, or as many as there are tokens, if that is less"),
    ("--guidance X", number(float, 0), (1.5, 1.5), "measure",
     "classifier-free guidance scale, 1 is without; MAR-L and MAR-B 3"),
    ("--eta X", number(float, 0, 1), 1.0, "measure", "objective ddpm: 1 samples by DDPM, 0 by DDIM"),
    ("--solver NAME", ("euler", "heun"), "heun", "measure", "objective flow: euler, or heun, two model calls a step"),
    ("--head-steps N", number(int, 2, 1000), (10, 100), "measure", "MAR: steps of the head's diffusion"),
    ("--temperature X", number(float, 0), 1.0, "measure", "MAR: a factor of the noise that the head's steps add"),
    ("--vae NAME", nonempty, None, "measure", "autoencoder of latents, on Hugging Face or a folder (needs diffusers)"),
    ("--inception FILE", nonempty, None, "measure", "measure FID by this TorchScript network, instead of toy-FID"),
    ("--ref PATH", nonempty, None, "measure",
     "what FID compares with: a folder of images, or .npz with arr_0, or mu and sigma (the data; latents need it)"),
    ("--accumulate N", COUNT, 1, None, "cut the batch of a process into N parts, one after the other: less memory"),
    ("--checkpointing", bool, False, None, "run blocks again in the backward pass: less memory, a third more time"),
    ("--compile", bool, False, None, "torch.compile the blocks: a slow start, faster steps"),
    ("--save-every N", COUNT, (200, 2000), None, "steps between saves of a stage's state, from which it can go on"),
    ("--stages LIST", word_list(*RESULTS), ",".join(RESULTS), None,
     "stages to run; one left out must be there in --out"),
    ("--compare WHAT", tuple(COMPARISONS), None, None,
     f"instead, choose, prune and recover many times, and compare {', '.join(COMPARISONS)}"),
    ("--quick", bool, False, None, "compare with one seed and fewer masks"),
    ("--encode DIR", nonempty, None, None,
     "instead, encode a folder of images with --vae into latents.npy and labels.npy in --out"),
    ("--fid PATH", nonempty, None, None, "instead, only measure FID of these images (a folder or .npz) against --ref"),
    ("--save-stats FILE", nonempty, None, None, "with --fid: write its statistics there, for later use as --ref"),
    ("--out DIR", nonempty, None, None,
     "folder of the results: runs/NAME of --data or else --model; runs/NAME-flow with --objective flow"),
    ("--device NAME", nonempty, None, "measure", "cpu, cuda, cuda:1 ...; without it, the first GPU if there is one"),
]
MAR_DEFAULTS = {"MAR-toy": {"teacher_lr": 2e-3, "sample_steps": 8}} | dict.fromkeys(
    ("MAR-L", "MAR-B"), {"sample_steps": 256, "guidance": 3.0})  # where they are not those of FLAGS


def make_parser():
    """FLAGS as a Parser."""
    parser = Parser(prog="tinyfusion.py", formatter_class=argparse.RawDescriptionHelpFormatter, description=(
        "Train a diffusion transformer, learn which of its layers to keep, prune it, recover it and measure it.\n"
        "With no flag: drawn digits, on a laptop, into runs/toy. Of a default a / b, a is that of toy models, and b\n"
        "that of every other model and of --ckpt (the paper's for DiT-XL, where it has one); a third, of --compare."))
    for flag, kind, default, _, words in FLAGS:
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=words)
            continue
        flag, placeholder = flag.split()
        if default is not None:
            words += f" ({' / '.join(f'{d:g}' for d in default) if isinstance(default, tuple) else default})"
        check = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        parser.add_argument(flag, metavar=placeholder, default=default, help=words, **check)
    return parser


def parse_args(argv=None):
    """Flags to a namespace, checked, with the model's defaults filled in, and `teacher`, the model of --ckpt."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.encode and not args.out:
        parser.error("--encode goes with --out, the folder to write to: ImageNet takes 42 GB")
    args.teacher, told = None, None
    if args.ckpt:
        if args.model != "toy":
            parser.error("--ckpt and --model: give one of them; the size is told from the checkpoint")
        args.teacher, content = load_checkpoint(args.ckpt)
        args.classes, told = content["classes"], content.get("objective")
        args.model = next((name for name, model in ALL_MODELS.items() if isinstance(args.teacher, model.func)
                           and model.keywords["hidden_size"] == args.teacher.hidden_size), "ckpt")
        args.image_size = args.image_size or args.teacher.input_size
        args.ckpt = f"{Path(args.ckpt).resolve()}, {checksum(args.teacher)}"
    model = args.teacher or unallocated(ALL_MODELS[args.model])
    told = "mar" if model.objective == "mar" else told
    if told and args.objective not in (None, told):
        parser.error(f"--objective {args.objective}: {args.ckpt or args.model} has the objective {told}; leave it out")
    args.objective = args.objective or told or model.objective
    args.image_size = args.image_size or (256 if args.encode else 16)
    toy, args.fewer_steps = "toy" in args.model, isinstance(args.sample_steps, tuple)    # if a MAR has fewer tokens
    for name, value in vars(args).items():
        if isinstance(value, tuple):
            value = value[2 if args.compare and len(value) > 2 else not toy]
            setattr(args, name, MAR_DEFAULTS.get(args.model, {}).get(name, value))
    args.learn_batch_size = args.learn_batch_size or max(1, args.batch_size // (1 if toy else 2))
    name = Path(args.data).resolve().name if args.data else args.model.replace("/", "-")
    args.out = args.out or f"runs/{name}{'-flow' if args.objective == 'flow' else ''}"
    check_args(parser, args, len(model.blocks), model.patch_size)
    return args


def check_args(parser, args, depth, patch):
    """End with an error of the parser where flags do not fit one another, or a model of `depth` blocks."""
    if args.image_size % patch:
        parser.error(f"argument --image-size: {args.image_size} is no multiple of the patch, {patch}")
    try:
        budget = sum(n for n, _ in parse_groups(args.groups, depth))
    except ValueError as error:
        parser.error(f"argument --groups: {error}")
    if args.kept and args.kept[-1] >= depth:
        parser.error(f"argument --kept: block {args.kept[-1]} of a model with blocks 0 to {depth - 1}")
    if args.criterion == "oracle" and 2 * budget != depth:
        parser.error(f"argument --criterion: oracle keeps half of the blocks, --groups {args.groups} keeps {budget}")
    several = int(os.environ.get("WORLD_SIZE", 1))
    if several > 1 and (args.compare or args.encode or args.fid):
        parser.error("--compare, --encode and --fid run in one process, without torchrun")
    for name, parts in (("batch_size", several * args.accumulate), ("learn_batch_size", several * args.accumulate),
                        ("samples", several)):
        if getattr(args, name) % parts:
            parser.error(f"argument --{name.replace('_', '-')}: {getattr(args, name)} cannot be cut into {parts} "
                         f"parts ({several} processes, --accumulate {args.accumulate})")
    changed = [f"--{name.replace('_', '-')}" for name in
               ("criterion", "kept", "update", "kd", "snr_gamma", "dropped_share", "accumulate", "checkpointing",
                "compile", "inception", "ref", "vae") if getattr(args, name) != parser.get_default(name)]
    if args.compare and changed:
        parser.error(f"--compare sets these itself, or has no use for them: leave out {', '.join(changed)}")
    for objective, kind in OBJECTIVES.items():
        for name in kind.options:
            if args.objective != objective and getattr(args, name) not in np.ravel(parser.get_default(name)):
                parser.error(f"--{name.replace('_', '-')} is of objective {objective}: leave it out")
    for flag, other in (("quick", "compare"), ("save_stats", "fid"), ("encode", "vae"), ("inception", "measure")):
        if getattr(args, flag) and not getattr(args, other):
            parser.error(f"--{flag.replace('_', '-')} goes with --{other}")
    if args.fid and not (args.ref or args.save_stats):
        parser.error("--fid goes with --ref, or with --save-stats")
    if args.kept and args.criterion != "learned":
        parser.error("--kept and --criterion: give one of them")


def pick_device(name):
    """A torch.device that is there: the named one, else the first GPU, else the CPU. Raises UserError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and world_size() > 1:       # every process has its own
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            name = str(device)
        torch.zeros(1, device=device).item()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)        # whose random numbers are saved and restored
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise UserError(f"--device {name}: not on this machine; there is {', '.join(there)}") from None
    return device


class Run:
    """What the stages share: the flags, the data, the device, the process and the folder."""

    def __init__(self, args):
        self.args, self.device, self.out = args, pick_device(args.device), open_folder(args.out)
        if self.device.type == "cuda":           # TF32, for what autocast leaves in float32
            torch.set_float32_matmul_precision("high")
        images = not args.data or (Path(args.data).is_dir() and not holds_latents(args.data))
        if args.teacher and args.teacher.in_channels > 3 and images:
            raise UserError("--ckpt draws latents, not images: give a folder of latents as --data" + (
                " (--encode makes one)" if args.objective != "mar" else ", of MAR's own VAE"))
        self.data = data = open_data(args.data, args.image_size) if args.data else toy_digits(size=args.image_size)
        if len(data.labels) < max(20, args.batch_size, args.learn_batch_size):
            raise UserError(f"{len(data.labels)} images are too few; expected at least 20, and no fewer than "
                            f"--batch-size {args.batch_size} and --learn-batch-size {args.learn_batch_size}")
        self.shape, self.classes = data.shape, args.classes if args.teacher else data.classes
        try:
            model = args.teacher or unallocated(self.new_model)
        except ValueError as error:
            raise UserError(f"--data {args.data}, {data.shape}: {error}") from None
        expected = (model.in_channels, model.input_size, model.input_size)
        if data.shape != expected or len(data.classes) > model.num_classes:
            raise UserError(f"--ckpt is for {model.num_classes} classes of {expected}; --data has "
                            f"{len(data.classes)} of {data.shape}")
        if data.latent and args.compare:
            raise UserError("--compare measures toy-FID, of images; it takes no latents")
        if data.latent and not (args.vae and args.inception and args.ref) and "measure" in args.stages:
            raise UserError("latents are measured with --vae, --inception and --ref: give all three, or leave measure "
                            "out, by --stages teacher,learn,recover")
        args.device = str(self.device) if world_size() == 1 else f"{world_size()} processes on {self.device.type}"
        args.data = f"{Path(args.data).resolve() if args.data else 'drawn digits'}, {data.describe()}"
        self.groups, self.diffusion = parse_groups(args.groups, len(model.blocks)), objective_of(args.objective, model)
        if args.objective == "mar" and args.sample_steps > model.num_tokens:
            if not args.fewer_steps:
                raise UserError(f"--sample-steps {args.sample_steps}: each opens a token, of {model.num_tokens} in all")
            args.sample_steps = model.num_tokens
        self.sampling = {"steps": args.sample_steps, "guidance": args.guidance, "clip_denoised": not data.latent} | {
            name: getattr(args, name) for name in self.diffusion.options}

    def new_model(self):
        """A model of --model's sizes for the data, new."""
        return ALL_MODELS[self.args.model](input_size=self.shape[1], in_channels=self.shape[0],
                                           num_classes=len(self.classes))

    def path(self, stage):
        return self.out / RESULTS[stage]

    def settings(self, stage):
        """The settings a stage's result depends on: its own and those of all stages before it."""
        before = list(RESULTS)[:list(RESULTS).index(stage) + 1]
        names = [flag.split()[0][2:].replace("-", "_") for flag, _, _, first, _ in FLAGS if first in before]
        others = {name for kind in OBJECTIVES.values() for name in kind.options} - set(self.diffusion.options)
        return {f"--{name.replace('_', '-')}": str(getattr(self.args, name)) for name in names if name not in others}

    def finished(self, stage):
        """Whether the stage's result is there. Raises UserError, with the difference, where settings differ."""
        path = self.path(stage)
        entry = {"learn": "kept", "measure": "rows"}.get(stage, "ema")
        return path.exists() and bool(made_with(path, self.settings(stage), entry))

    def batches(self, stage, seed, start):
        """The batches of a stage from step `start` on, of which this process takes its share."""
        torch.manual_seed(seed + 1_000_003 * rank())         # each process draws noise and masks of its own
        size = self.args.learn_batch_size if stage == "learn" else self.args.batch_size
        return data_batches(self.data, size, seed, self.device, start, self.args.accumulate, rank(), world_size())

    def state(self, stage):
        """Where an unfinished stage stands, or the beginning."""
        return TrainingState(self.out / f"{stage}-state.pt", self.settings(stage), self.args.save_every)

    def teacher(self):
        """The teacher, in eval mode."""
        teacher = load_checkpoint(self.path("teacher"), self.device)[0]
        if self.args.compile:
            teacher.compile()
        return teacher

    def loop(self, stage, steps, state):
        """Arguments of `train` that all stages share."""
        args = self.args
        return {"on_step": self.report(stage, steps, state.step), "state": state, "accumulate": args.accumulate,
                "compile": args.compile, "checkpointing": args.checkpointing}

    def learning(self):
        """Arguments of `learn_layers` that flags set, but for `update`."""
        args = self.args
        return {"steps": args.learn_steps, "rank": args.rank, "alpha": 2 * args.rank, "lr": args.learn_lr,
                "logits_lr": args.logits_lr}

    def recovery(self):
        """Arguments of `recover` that flags set, but for `kd`."""
        args = self.args
        return {"steps": args.recover_steps, "lr": args.recover_lr, "warmup": min(100, args.recover_steps // 10),
                "ema_decay": args.ema}

    def report(self, stage, steps, first):
        """The on_step of a stage that starts with step `first`. Its lines from there on leave log.jsonl."""
        size = self.args.learn_batch_size if stage == "learn" else self.args.batch_size
        log, images = self.out / "log.jsonl", steps * size
        print(f"{stage}: {steps} steps of {size} images = {images:,} images, "
              f"{images / len(self.data.labels):.1f} epochs" + (f"; goes on after step {first}" if first else ""))
        kept = []
        for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):       # a line that was torn is left out
                entry = json.loads(line)
                if entry["stage"] != stage or entry["step"] <= first:
                    kept.append(line + "\n")
        write_file(log, lambda file: file.write("".join(kept).encode()))
        return progress(stage, steps, log, first=first)

    def save_trained(self, stage, state, fit, **more):
        """Save the model that fit() trains as the stage's result, and remove its `state`. Where the loss is not finite,
        save the weights from before that as STAGE-stopped.pt and raise UserError."""
        more |= {"settings": self.settings(stage), "objective": self.args.objective}
        try:
            save_checkpoint(self.path(stage), fit(), self.sampling, self.classes, **more)
        except NonFiniteLoss as stop:
            rescued = self.out / f"{stage}-stopped.pt"
            save_checkpoint(rescued, stop.model, self.sampling, self.classes, **more)
            state.path.unlink(missing_ok=True)
            raise UserError(f"{stage} stopped: {stop}; weights before it: {rescued}; lower --{stage}-lr") from None
        state.path.unlink(missing_ok=True)


def stage_teacher(run):
    """Train the teacher from scratch, or take that of --ckpt."""
    args, state = run.args, run.state("teacher")
    if args.teacher:
        print(f"teacher: {args.ckpt}, {len(args.teacher.blocks)} blocks")
        run.save_trained("teacher", state, lambda: args.teacher)
        args.teacher = None                      # the other stages read the file
        return
    batches = run.batches("teacher", args.seed, state.step)
    model = run.new_model().to(run.device)
    if args.model == "toy":    # labels at std 1, not the official 0.02: toy-FID 3.43 against 3.83 (seed 0)
        nn.init.normal_(model.y_embedder.embedding_table.weight, std=1.0)

    def loss(step):
        x0, y = next(batches)
        terms = run.diffusion.training_losses(model, x0, run.diffusion.sample_t(len(x0), run.device), y)
        return terms["loss"].mean(), {name: term.mean() for name, term in terms.items() if name != "loss"}

    steps = args.teacher_steps
    run.save_trained("teacher", state, lambda: train(
        model, loss, steps, lr=args.teacher_lr, final_lr_ratio=0.0, warmup=min(100, steps // 10), ema_decay=args.ema,
        **run.loop("teacher", steps, state)))


def stage_learn(run):
    """Choose which blocks of the teacher to keep: by learning, by another criterion, or those that --kept names."""
    args, teacher = run.args, load_checkpoint(run.path("teacher"), run.device)[0]
    torch.manual_seed(args.seed + 1)
    kept, confidence, history, picture = args.kept, None, None, run.out / "decisions.png"
    if kept is None and args.criterion != "learned":
        examples = fixed_examples(run.diffusion, run.data, device=run.device)
        kept = CRITERIA[args.criterion](teacher, run.groups, run.diffusion, examples)
    elif kept is None:
        state = run.state("learn")
        loss_fn = masked_denoising(run.diffusion, run.batches("learn", args.seed + 1, state.step), args.dropped_share,
                                   args.snr_gamma or math.inf)
        try:
            sampler, history = learn_layers(teacher, loss_fn, run.groups, update=args.update, **run.learning(),
                                            **run.loop("learn", args.learn_steps, state))
        except NonFiniteLoss as stop:
            state.path.unlink(missing_ok=True)
            raise UserError(f"learn stopped: {stop}; {run.path('teacher')} is as it was; lower --learn-lr") from None
        kept, confidence = sampler.kept(), sampler.confidence().tolist()
    if history:
        draw_decisions(picture, history, run.groups, kept)
    else:
        picture.unlink(missing_ok=True)          # one of earlier learning would be of other blocks
    result = {"kept": kept, "confidence": confidence, "history": history, "settings": run.settings("learn")}
    write_file(run.path("learn"), lambda file: file.write(json.dumps(result).encode()))
    (run.out / "learn-state.pt").unlink(missing_ok=True)
    how = "as told" if args.kept else f"by criterion {args.criterion}" if confidence is None else \
        "confidence of each group " + " ".join(f"{c:.2f}" for c in confidence)
    print(f"kept blocks {kept} of {len(teacher.blocks)}; {how}")


def stage_recover(run):
    """Prune the teacher and fine-tune the student with its help."""
    args, teacher, state = run.args, run.teacher(), run.state("recover")
    kept = json.loads(run.path("learn").read_text())["kept"]
    run.save_trained("recover", state, lambda: recover(
        prune(teacher, kept), teacher, run.diffusion, run.batches("recover", args.seed + 2, state.step),
        match_blocks(run.groups, kept, teacher.cuts), kd=args.kd, **run.recovery(),
        **run.loop("recover", args.recover_steps, state)), kept=kept, groups=run.groups)


def stage_measure(run):
    """Compare teacher, pruned model and student: results.json and samples.png."""
    args, data, teacher = run.args, run.data, load_checkpoint(run.path("teacher"), run.device)[0]
    student, checkpoint = load_checkpoint(run.path("recover"), run.device)
    models = {"teacher": teacher, "pruned": prune(teacher, checkpoint["kept"]), "student": student}
    models = {name: models[name] for name in args.measure}
    decode = VAE(args.vae, run.device).decode if data.latent else to_uint8
    accuracy, labels = None, spread_labels(data, args.samples)
    if args.inception:
        look = load_inception(args.inception, run.device)
        real = statistics_of(args.ref, look, "reference") if args.ref else statistics_of_data(data, look)
    else:
        judge, accuracy = train_classifier(data, run.device, on_step=progress("judge", 400))
        look, real = judge.look, statistics_of_data(data, judge.look)
    if args.compile:
        for model in models.values():
            tune_blocks(model, compile=True)
    state = run.state("measure")
    rows, seen = measure(models, labels, run.shape, look, real, run.diffusion, run.sampling, decode, seed=args.seed,
                         batch_size=50 * world_size(), state=state)
    for name, row in rows.items():
        if accuracy is not None:
            row["accuracy"] = (torch.cat(seen[name].content["p"]).argmax(1) == labels).double().mean().item()
        else:
            save_statistics(run.out / f"{name}-statistics.npz", seen[name])
    present = data.labels.unique()
    labels = present[torch.arange(20) % len(present)]                        # real examples of these classes in turn
    shown = [(data.labels == y).nonzero().flatten() for y in labels]
    index = torch.stack([where[i // len(present) % len(where)] for i, where in enumerate(shown)])
    pictures = [("real images", decode(data.read(index, torch.zeros_like(index)).to(run.device)).cpu())]
    for title, model in models.items():
        images = sample_images(model, run.diffusion, labels.to(run.device), range(20), run.shape, args.seed,
                               run.sampling, decode)
        pictures.append((f"{title}, {len(model.blocks)} blocks", images))
    draw_samples(run.out / "samples.png", pictures, [run.classes[y] for y in labels])
    result = {"rows": rows, "judge_accuracy": accuracy, "settings": run.settings("measure")}
    write_file(run.path("measure"), lambda file: file.write(json.dumps(result, indent=1).encode()))
    state.path.unlink(missing_ok=True)


def print_results(results):
    """Print the content of results.json as a table, with the conditions of its figures."""
    settings, rows = results["settings"], results["rows"]
    toy, speed = results["judge_accuracy"] is not None, next(iter(rows.values()))["images_per_second"]
    columns = {"depth": "d", "parameters": ",d", "fid": ".2f", "accuracy" if toy else "is": ".1%" if toy else ".2f",
               "precision": ".3f", "recall": ".3f", "images_per_second": ".1f"}
    names = ["toy-FID", "class acc."] if toy else ["FID", "IS"]
    print_table(["model", "depth", "parameters", *names, "precision", "recall", "images/s", "speed-up"],
                [[name, *(format(row[key], form) if key in row else "" for key, form in columns.items()),
                  f"{row['images_per_second'] / speed:.2f}x"] for name, row in rows.items()])
    print(f"\n{conditions(settings)}.\n" + (
        f"All but speed by the features of a small classifier trained on this data, {results['judge_accuracy']:.1%} "
        "right on held-out\nimages: toy-FID cannot be compared with published FIDs." if toy else
        f"Features of {Path(settings['--inception']).name}, against {settings['--ref']}"))


def conditions(settings):
    """What the figures were measured with, in words: a FID means nothing without."""
    more = [name.replace("_", "-") for name in OBJECTIVES[settings["--objective"]].options]
    return ", ".join(f"{name} {settings['--' + name]}" for name in
                     ("samples", "sample-steps", "guidance", *more, "seed", "device"))


def run_stages(args):
    """Run or reuse the stages asked for, in order."""
    start, run = time.perf_counter(), Run(args)
    if "measure" in args.stages and args.inception:          # what it needs is looked at before any work is done
        size = load_inception(args.inception, run.device)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))[0].shape[1]
        saved = read_npz(args.ref, "mu", "sigma") if args.ref else {}
        if args.ref and not {"mu", "sigma"} <= saved.keys():
            image_stream(args.ref)
        elif args.ref and saved["mu"].size != size:
            raise UserError(f"--ref {args.ref} has {saved['mu'].size} features, --inception {args.inception} {size}")
        try:
            if run.data.latent:
                VAE(args.vae, run.device).decode(torch.zeros(1, *run.shape, device=run.device))
        except RuntimeError as error:
            raise UserError(f"--vae {args.vae} does not decode {run.shape}: {str(error).splitlines()[0]}") from None
    stages = {"teacher": stage_teacher, "learn": stage_learn, "recover": stage_recover, "measure": stage_measure}
    needed = list(stages)[:list(stages).index(args.stages[-1]) + 1]
    finished = {stage: run.finished(stage) for stage in needed}              # all are looked at first, too
    gather(None)                                 # no process writes before every one has looked
    for stage in needed:
        if not finished[stage] and stage not in args.stages:
            raise UserError(f"{run.path(stage)} is not there, and --stages leaves {stage} out; add it to --stages")
    of = f" of the checkpoint's {len(run.classes)}" if len(run.classes) > len(run.data.classes) else ""
    print(f"{args.data}, {run.shape}, {len(run.data.classes)}{of} classes; {args.model} on {args.device}")
    for stage in args.stages:
        if finished[stage]:
            print(f"{stage}: {run.path(stage)} is there, made with these settings, and is reused")
        else:
            stages[stage](run)
            finished = dict.fromkeys(finished, False)            # what came of an earlier result is made again
    if "measure" in args.stages:
        print_results(json.loads(run.path("measure").read_text()))
    print(f"\n{time.perf_counter() - start:.0f} s; results in {run.out}/")


def run_comparison(args):
    """Compare criteria, groups or ways to recover, with one teacher: comparisons.json, and a table."""
    start, run = time.perf_counter(), Run(args)
    if not run.finished("teacher"):
        stage_teacher(run)
    varied = ("--criterion", "--kept", "--update", "--kd", "--groups", "--snr-gamma", "--dropped-share")
    settings = {name: value for name, value in run.settings("measure").items() if name not in varied}
    teacher = load_checkpoint(run.path("teacher"), run.device)[0]
    settings["teacher"] = checksum(teacher)      # one notebook, one teacher
    lab = Laboratory(teacher, run.data, run.diffusion, Notebook(run.out / "comparisons.json", settings),
                     args.batch_size, run.learning(), run.recovery(), args.samples, run.sampling)
    try:
        COMPARISONS[args.compare](lab, run.groups, args.quick, run.out)
    except NonFiniteLoss as stop:
        raise UserError(f"learning stopped: {stop}; lower --learn-lr, with another --out") from None
    print(f"\n{conditions(settings)}; learning {args.learn_steps} steps, recovery {args.recover_steps}, "
          f"± over its seeds\n{time.perf_counter() - start:.0f} s; results in {run.out}/")


def run_encode(args):
    """Images to latents, with a VAE."""
    out, device = open_folder(args.out), pick_device(args.device)
    if (out / "latents.npy").exists():
        raise UserError(f"{out / 'latents.npy'} is there; remove it, or choose another --out")
    settings = {"--vae": args.vae, "--image-size": str(args.image_size)}
    encode_images(args.encode, args.image_size, VAE(args.vae, device), out, settings)


def run_fid(args):
    """Compare two sets of images."""
    look = load_inception(args.inception, pick_device(args.device)) if args.inception else None
    fake = statistics_of(args.fid, look)
    if args.save_stats:
        save_statistics(args.save_stats, fake)
        print(f"statistics of {args.fid}: {args.save_stats}")
    if not args.ref:
        return
    try:
        row = compare_statistics(fake, statistics_of(args.ref, look), pick_device(args.device))
    except ValueError as error:
        raise UserError(f"{args.fid} and {args.ref} cannot be compared: {error}") from None
    print(", ".join(f"{name.upper() if len(name) < 4 else name} {value:.4g}" for name, value in row.items()))
    drawn = read_npz(args.fid, "settings").get("settings", "not told")       # sample.py writes them
    print(f"{args.fid} ({fake.content['count'] or 'unknown number of'} samples; sampling steps and guidance: {drawn})\n"
          f"against {args.ref}; features: {Path(args.inception).name if args.inception else 'those of the two files'}")


def checksum(model):
    """Words by which to know the weights of a model again."""
    value = 0
    for weight in model.state_dict().values():
        value = zlib.crc32(weight.cpu().contiguous().numpy(), value)
    return f"weights of checksum {value:08x}"


def guarded(prog, body):
    """Run body(); tell a user's mistake, a full disk or Ctrl-C in one line. Returns the exit status: 0, 2 or 130."""
    try:
        body()
        return 0
    except (UserError, OSError) as error:
        alone = not isinstance(error, UserError) or str(error).startswith("process ")
        if alone or os.environ.get("RANK", "0") == "0":      # before they have met, all processes say the same
            print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        signs = ("can't allocate memory", "not enough memory", "ALLOC_FAILED")
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(s in str(error) for s in signs):
            raise
        print(f"{prog}: out of memory; try --accumulate 2, --checkpointing or a smaller batch", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{prog}: stopped; the files that are there are whole; the same command goes on", file=sys.stderr)
        return 130


def main(argv=None):
    """The program; returns its exit status."""
    def body():
        args = parse_args(argv)
        with processes():
            run = run_encode if args.encode else run_fid if args.fid else run_comparison if args.compare else run_stages
            run(args)
    return guarded("tinyfusion.py", body)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)    # ends as Ctrl-C does
    sys.exit(main())
