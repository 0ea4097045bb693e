"""TinyFusion: a diffusion transformer learns which of its layers it can do without.  One file, top to bottom.

The problem.  A diffusion transformer draws an image by running its L residual blocks one after another, hundreds of
times. With half the blocks it runs up to twice as fast. But which half? DiT-XL, of 28 blocks, has about 40 million
choices, and the obvious test, "drop what hurts least now", picks badly: the model is fine-tuned after pruning, so what
counts is how well a choice *recovers*, and the loss right after pruning says little about that (Table 3 of the paper).

The method.  Phi are the model's weights; E_x is the mean over images x. Search for the mask m together with a change
dPhi of the weights, a stand-in for the fine-tuning to come that all masks share:

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

How to run (full scale and the rest: README).
    python tinyfusion.py                      the whole story on toy digits, a few minutes on a laptop, into runs/toy
    python tinyfusion.py --data FOLDER        the same on your images, one sub-folder per class
    python tinyfusion.py --help               every flag
    python sample.py --ckpt runs/toy/student.pt

Letters in the shape comments: B examples, T tokens, D width of a token, L blocks, K groups of blocks, N of M blocks
kept in a group; C channels of an image or latent, H, W its height and width, P side of a patch. A latent is a small
image of codes, which an autoencoder makes of a large one (Chapter 8). SiT and MAR are two more kinds of model that
share some of DiT's parts (Chapter 6).

Chapters.
    1 The model: DiT           5 Recovery: masked KD        9 The training loop      13 The command line
    2 Diffusion                6 More models: SiT, MAR     10 Files and pictures
    3 The layer sampler        7 Measuring                 11 A run and its stages
    4 Recoverability: LoRA     8 Data                      12 The laboratory
The method is in Chapters 3 to 5; 1 and 2 are what it works on, the rest feeds it or judges it. On a first reading you
can stop after Chapter 5. Source: Fang, Li, Ma, Wang, "TinyFusion: Diffusion Transformers Learned Shallow",
arXiv:2412.01199. Written from the paper. MIT licence.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import fcntl
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
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
from PIL import Image, ImageDraw, ImageFont, ImageOps


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 1. The model: DiT
#
# A diffusion transformer (Peebles & Xie, arXiv:2212.09748) cuts the noisy image into patches, makes each one a token,
# and sends the tokens through L residual blocks of one shape. The timestep and the class enter every block as shifts,
# scales and gates ("adaLN-Zero"). Every block maps (B, T, D) to (B, T, D) and adds to its input. That is why one can
# be dropped without touching the others. Names and initialisation are those of the official code, whose checkpoints
# load with strict=True.
# ---------------------------------------------------------------------------------------------------------------------

def modulate(x, shift, scale):
    """x * (1 + scale) + shift, for x (B, T, D), with shift and scale (B, D) the same for every token."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    """Timesteps (B,) to vectors (B, D): cosines and sines of 128 frequencies, from 1 down to about 1/10,000, then a
    two-layer MLP."""

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        frequencies = torch.exp(-math.log(10000) / 128 * torch.arange(128, dtype=torch.float32, device=t.device))
        angles = t[:, None].float() * frequencies                            # (B, 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)               # (B, 256), in float32
        return self.mlp(waves.to(self.mlp[0].bias.dtype))                    # (B, D)


class LabelEmbedder(nn.Module):
    """Class labels (B,) to vectors (B, D). In training mode a label becomes the null label, which means "no class",
    with probability `dropout_prob`; `forward_with_cfg` needs a model of "no class".

    The null label is `num_classes`, the last row of the table; without dropout there is no such row. With hidden_size
    None there is no table, and the labels (B,) themselves are returned (for MAR, Chapter 6)."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        rows = num_classes + int(dropout_prob > 0)
        self.embedding_table = nn.Embedding(rows, hidden_size) if hidden_size else nn.Identity()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def token_drop(self, labels):
        """Labels (B,) with a random share of them replaced by the null label."""
        dropped = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
        return torch.where(dropped, self.num_classes, labels)

    def null_labels(self, labels):
        """One null label per label, (B,). Raises ValueError where the model never saw any."""
        if self.dropout_prob == 0:
            raise ValueError("class_dropout_prob is 0: the model has no null label, so only guidance 1 is possible")
        return torch.full_like(labels, self.num_classes)

    def forward(self, labels):
        if self.training and self.dropout_prob > 0:
            labels = self.token_drop(labels)
        return self.embedding_table(labels)      # (B, D), or (B,) without a table


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, T, D). Dropout is MAR's."""

    def __init__(self, dim, num_heads, dropout=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))              # (B, T, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                 # three of (B, heads, T, D / heads)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop.p if self.training else 0.0)
        return self.drop(self.proj(x.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    """The two-layer perceptron of a block, applied to every token of (B, T, D). approximate: the form of GELU, "tanh"
    for DiT, "none" (exact) for MAR. Dropout is MAR's."""

    def __init__(self, dim, hidden_dim, approximate="tanh", dropout=0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU(approximate)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DiTBlock(nn.Module):
    """A residual block with adaLN-Zero conditioning: x (B, T, D), and c (B, D), the timestep's vector plus the class's,
    to (B, T, D)."""

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
    """Fixed 2-D position table (grid_size ** 2, dim): the first half encodes the column, the second the row, each as
    sines then cosines of dim / 4 frequencies (the layout of MAE and DiT)."""
    frequencies = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies            # (grid, dim / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)                                   # (grid, dim / 2)
    columns = line.repeat(grid_size, 1)                                                     # tokens go row by row
    rows = line.repeat_interleave(grid_size, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def initialize(model, normal):
    """The official start: linear layers Xavier-uniform, the weights in `normal` with std 0.02, modulation and output at
    zero. So the gates are zero, every block of a DiT starts as the identity, and the model as the zero function."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for weight in normal:
        nn.init.normal_(weight, std=0.02)
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or "final_layer.linear" in name:
            nn.init.zeros_(parameter)


class DiT(nn.Module):
    """Diffusion transformer. The defaults are DiT-XL/2 (patches of side 2) on 32x32 latents of 256x256 images:
    675,129,632 parameters.

    input_size: height and width of the input; patch_size: side of a patch in its pixels; learn_sigma: the output has a
    second half of channels, for the variance of a step (Chapter 2). Raises ValueError where sizes do not divide.
    Source: facebookresearch/DiT, models.py (names, initialisation and numerics; the text is ours).
    """
    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not a multiple of patch_size {patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of 4 and of num_heads {num_heads}")
        self.sizes = {
            "input_size": input_size, "patch_size": patch_size, "in_channels": in_channels, "hidden_size": hidden_size,
            "num_heads": num_heads, "mlp_ratio": mlp_ratio, "class_dropout_prob": class_dropout_prob,
            "num_classes": num_classes, "learn_sigma": learn_sigma}
        vars(self).update(self.sizes)            # also attributes: model.input_size and so on
        self.out_channels = in_channels * 2 if learn_sigma else in_channels

        self.x_embedder = nn.ModuleDict({                                    # a linear layer on every patch
            "proj": nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)})
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(sincos_pos_embed(hidden_size, input_size // patch_size)[None],
                                      requires_grad=False)                   # (1, T, D)
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        normal = [self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight]
        initialize(self, normal)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)

    def config(self):
        """The constructor's arguments as they are now, after pruning: DiT(**model.config()) has the same shape."""
        return {**self.sizes, "depth": len(self.blocks)}

    def unpatchify(self, x):
        """Patches (B, T, P * P * out_channels) to images (B, out_channels, H, W)."""
        grid = self.input_size // self.patch_size
        P = self.patch_size
        x = x.reshape(x.shape[0], grid, grid, P, P, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.out_channels, self.input_size, self.input_size)

    def forward(self, x, t, y, mask=None, hidden=None):
        """Predict the noise (and the variance) in x, or, for a SiT (Chapter 6), the velocity.

        x (B, C, H, W); t (B,) timesteps, or (1,) where all share one; y (B,) labels, `num_classes` for no class;
        mask (B, L), 1 for a block that is used and 0 for one that is skipped, or None for all (Chapter 3).
        Returns (B, out_channels, H, W): noise first, then variance. If `hidden`, a collection of block numbers, is not
        None, returns two things: that output, and the list of those blocks' outputs (B, T, D), in depth order.
        """
        tokens = self.x_embedder.proj(x).flatten(2).transpose(1, 2)          # (B, T, D), row by row
        x = tokens.contiguous() + self.pos_embed                             # copied here once, not in every norm
        c = self.t_embedder(t) + self.y_embedder(y)                          # (B, D)
        x, features = masked_forward(self.blocks, x, c, mask=mask, hidden=hidden or ())
        x = self.unpatchify(self.final_layer(x, c))                          # (B, out_channels, H, W)
        return x if hidden is None else (x, features)

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_channels=3):
        """Classifier-free guidance (arXiv:2207.12598): exaggerate, by cfg_scale (`guidance` in Chapter 2), what
        the class changes.

        x (B, C, H, W), t (1,) or (B,), y (B,); returns (B, out_channels, H, W). Guidance acts on the first
        `cfg_channels` channels, 3 in the official code, with which DiT's published numbers were made; None: on all of
        the noise. It never reaches the variance. (The official method takes the batch twice, with labels and null
        labels; ours returns the first half of its result.) Raises ValueError for a model without a null label.
        """
        times = t if len(t) == 1 else torch.cat([t, t])
        out = self(torch.cat([x, x]), times, torch.cat([y, self.y_embedder.null_labels(y)]))
        cond, uncond = out.chunk(2)                                          # two of (B, out_channels, H, W)
        g = min(cfg_channels or self.in_channels, self.in_channels)
        guided = uncond[:, :g] + cfg_scale * (cond[:, :g] - uncond[:, :g])
        return torch.cat([guided, cond[:, g:]], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 2. Diffusion
#
# Step t of 1000 replaces a share beta_t of the variance by noise. The product of 1 - beta up to t, abar_t ("alpha
# bar"), is the share of the image's variance that is left. Training: mix an image x_0 with noise, x_t = sqrt(abar_t)
# x_0 + sqrt(1 - abar_t) noise, and have the model predict the noise. Sampling: start from noise and walk t down to 0;
# each step removes a little of the predicted noise and adds a little fresh noise (DDPM, arXiv:2006.11239; DDIM,
# arXiv:2010.02502, is the same walk without fresh noise, good in fewer steps). The variance of a step is learned too:
# v, the second half of the model's output channels, interpolates in log space between the smallest and the largest
# sensible value (arXiv:2102.09672). Schedule and losses have the values of the official code.
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
    the two ends. The official code uses it for latents too, and this tanh form of the normal CDF."""
    def cdf(z):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))
    inv_std = torch.exp(-0.5 * log_variance)
    upper = torch.where(x > 0.999, 1.0, cdf((x - mean + 1 / 255) * inv_std))
    lower = torch.where(x < -0.999, 0.0, cdf((x - mean - 1 / 255) * inv_std))
    return torch.log((upper - lower).clamp(min=1e-12))


def noise_for(x0, t):
    """Standard normal noise for images x0 (B, C, H, W) at times t: (len(t), C, H, W). len(t) is B, except in MAR."""
    return torch.randn(len(t), *x0.shape[1:], device=x0.device)


class Objective:
    """What a model is trained to predict, and how images are drawn with it. Each objective (GaussianDiffusion here, two
    more in Chapter 6) has five methods:

        sample_t(batch_size, device)                              random training times t (B,)
        q_sample(x0, t, noise)                                    the noisy input x_t of images x0 (B, C, H, W)
        losses(model_output, x0, x_t, t, noise)                   a dict of losses, each (B,); "loss" is what is trained
        distillation_losses(student_output, teacher_output, x_t, t)    how far apart two models are, (B,)
        sample(model, y, draw, steps, guidance, ...)              images (B, C, H, W) of the classes y (B,)

    Losses are float32 whatever the output is. draw() returns fresh standard normal noise (B, C, H, W) at every call.
    (In MAR x_t and t are of tokens, (R * B, T, ...), distances are (R * B,), and draw takes a shape: Chapter 6.)"""

    def training_losses(self, model, x0, t, y, noise=None):
        """The `losses` of `model(x_t, t, y)`, which is called here. x0 (B, C, H, W), t and y (B,)."""
        noise = noise_for(x0, t) if noise is None else noise
        x_t = self.q_sample(x0, t, noise)
        return self.losses(model(x_t, t, y), x0, x_t, t, noise)


class GaussianDiffusion(Objective):
    """DDPM with a learned variance. betas (steps,), by default 1000, linear from 1e-4 to 2e-2.

    `timestep_map[i]` is the timestep that the model is given at step i: i itself or, after `respaced`, the step of the
    full process that it stands for. Source: openai/improved-diffusion and facebookresearch/DiT, diffusion/.
    """

    def __init__(self, betas=None, timestep_map=None):
        betas = np.linspace(1e-4, 2e-2, 1000) if betas is None else np.asarray(betas, dtype=np.float64)
        self.num_timesteps = len(betas)
        self.timestep_map = np.arange(len(betas)) if timestep_map is None else np.asarray(timestep_map)
        self.abar = np.cumprod(1 - betas)                                    # alpha-bar_t, float64
        self.abar_prev = np.append(1.0, self.abar[:-1])
        self.posterior_variance = betas * (1 - self.abar_prev) / (1 - self.abar)
        # The posterior variance at t = 0 is 0; its logarithm borrows the value of t = 1.
        clipped = np.append(self.posterior_variance[1], self.posterior_variance[1:])
        table = {
            "sqrt_abar": np.sqrt(self.abar), "sqrt_one_minus_abar": np.sqrt(1 - self.abar),
            "sqrt_recip_abar": np.sqrt(1 / self.abar), "sqrt_recip_abar_minus_1": np.sqrt(1 / self.abar - 1),
            "posterior_x0": betas * np.sqrt(self.abar_prev) / (1 - self.abar),
            "posterior_xt": (1 - self.abar_prev) * np.sqrt(1 - betas) / (1 - self.abar),
            "log_small": np.log(clipped), "log_large": np.log(betas),        # the ends of a learned variance
            "log_fixed": np.log(np.append(clipped[0], betas[1:])),           # for models without a learned variance
        }
        self._table = {name: torch.tensor(values, dtype=torch.float32) for name, values in table.items()}

    def _at(self, name, t, x):
        """Schedule values at timesteps t (B,) or (1,), shaped to multiply x (B, ...)."""
        self._table[name] = self._table[name].to(t.device)
        return self._table[name][t].view(-1, *[1] * (x.dim() - 1))

    def sample_t(self, batch_size, device=None):
        """Training timesteps (B,), uniform."""
        return torch.randint(self.num_timesteps, (batch_size,), device=device)

    def q_sample(self, x0, t, noise):
        """The noisy image x_t (B, C, H, W) = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise."""
        return self._at("sqrt_abar", t, x0) * x0 + self._at("sqrt_one_minus_abar", t, x0) * noise

    def _posterior_mean(self, x0, x_t, t):
        """Mean of q(x_{t-1} | x_t, x0), the distribution of x_{t-1} given x_t and x0."""
        return self._at("posterior_x0", t, x0) * x0 + self._at("posterior_xt", t, x0) * x_t

    def p_mean_variance(self, model_output, x_t, t, clip_denoised=False):
        """The step to x_{t-1} that the model's output (B, C or 2C, H, W) at x_t (B, C, H, W) implies: a dict of `mean`,
        `log_variance` and `pred_xstart`, the predicted x0, each (B, C, H, W). The predicted noise is detached, so a
        loss on these trains the variance alone. clip_denoised keeps the predicted image in [-1, 1], right for pixels
        and wrong for latents."""
        C = x_t.shape[1]
        eps, v = model_output[:, :C].detach(), model_output[:, C:]
        if v.shape[1] == C:                      # v = -1 is the posterior variance, v = 1 is beta
            share = (v + 1) / 2
            log_variance = share * self._at("log_large", t, x_t) + (1 - share) * self._at("log_small", t, x_t)
        else:
            log_variance = self._at("log_fixed", t, x_t).expand_as(x_t)
        x0 = self._at("sqrt_recip_abar", t, x_t) * x_t - self._at("sqrt_recip_abar_minus_1", t, x_t) * eps
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        return {"mean": self._posterior_mean(x0, x_t, t), "log_variance": log_variance, "pred_xstart": x0}

    def losses(self, model_output, x0, x_t, t, noise):
        """A dict of `mse`, `vb` and `loss` = mse + vb, each (B,). mse is the error of the noise. vb is the term of
        the variational bound for step t, in bits per dimension, which trains the variance alone."""
        C = x0.shape[1]
        model_output = model_output.float()
        mse = mean_flat((noise - model_output[:, :C]) ** 2)
        if model_output.shape[1] == C:
            return {"mse": mse, "vb": torch.zeros_like(mse), "loss": mse}
        step = self.p_mean_variance(model_output, x_t, t)
        kl = normal_kl(self._posterior_mean(x0, x_t, t), self._at("log_small", t, x0),       # the true step
                       step["mean"], step["log_variance"])                                   # and the model's
        nll = -discretized_gaussian_log_likelihood(x0, step["mean"], step["log_variance"])   # for t = 0
        vb = torch.where(t == 0, mean_flat(nll), mean_flat(kl)) / math.log(2)
        return {"mse": mse, "vb": vb, "loss": mse + vb}

    def distillation_losses(self, student_output, teacher_output, x_t, t):
        """Mean squared error (B,) of the two noise predictions at the same x_t and t, plus KL(teacher's step ||
        student's step) in bits per dimension, which again trains the variance alone."""
        C = x_t.shape[1]
        student_output = student_output.float()
        teacher_output = teacher_output.float()
        mse = mean_flat((student_output[:, :C] - teacher_output[:, :C]) ** 2)
        if student_output.shape[1] == C:
            return mse
        student = self.p_mean_variance(student_output, x_t, t)
        teacher = self.p_mean_variance(teacher_output, x_t, t)
        kl = normal_kl(teacher["mean"], teacher["log_variance"], student["mean"], student["log_variance"])
        return mse + mean_flat(kl) / math.log(2)

    @functools.cache                             # so its table is made, and moved to a GPU, once
    def respaced(self, steps):
        """The same process in `steps` evenly spaced timesteps, first and last included. Raises ValueError outside
        2 ... num_timesteps."""
        if not 2 <= steps <= self.num_timesteps:
            raise ValueError(f"{steps} sampling steps: expected 2 to {self.num_timesteps}")
        stride = (self.num_timesteps - 1) / (steps - 1)
        # Sums, not multiples, of the stride, so that ties round as they do in the official code.
        chosen = np.rint(np.cumsum(np.append(0.0, np.full(steps - 1, stride)))).astype(int)
        abar = self.abar[chosen]
        return GaussianDiffusion(1 - abar / np.append(1.0, abar[:-1]), self.timestep_map[chosen])

    @torch.inference_mode()
    def sample(self, model, y, draw, steps=250, guidance=1.0, eta=1.0, clip_denoised=False, cfg_channels=3, dtype=None):
        """Images (B, C, H, W) of the classes y (B,), drawn by `model` (in eval mode).

        eta 1 is DDPM with the model's variance; 0 is DDIM, deterministic after the first draw; between them is DDIM's
        sigma (arXiv:2010.02502, equation 16). Guidance 1 runs the model on the batch, any other on 2 B inputs.
        dtype: that of the model's matrix products, as in `autocast` (Chapter 9). Raises ValueError for other eta.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta {eta}: expected 0 (DDIM) to 1 (DDPM)")

        def predict(x, t):
            return model(x, t, y) if guidance == 1 else model.forward_with_cfg(x, t, y, guidance, cfg_channels)
        return self.denoise(predict, draw, steps, eta, clip_denoised, dtype=dtype)

    def denoise(self, predict, draw, steps, eta=1.0, clip_denoised=False, temperature=1.0, dtype=None):
        """The walk of `sample` for any predict(x, t), which gives the noise (and variance) in x (B, C, ...) at the
        timestep t (1,). temperature: a factor of the noise that the steps add."""
        process = self.respaced(steps)
        x = draw()
        for i in reversed(range(steps)):
            index = torch.full((1,), i, device=x.device)
            t = torch.full((1,), int(process.timestep_map[i]), device=x.device)     # one t for all: embedded once
            with autocast(x.device, dtype):
                out = predict(x, t)
            p = process.p_mean_variance(out.float(), x, index, clip_denoised)
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
# ---------------------------------------------------------------------------------------------------------------------

def masked_forward(blocks, x, *args, mask=None, hidden=()):
    """Run residual blocks one after another, each example through the blocks that its mask keeps:

        x <- m * block(x) + (1 - m) * x            so that dloss/dm = sum of dloss/dx_out * (block(x) - x)

    with the sum over tokens and channels. Computed as written, this runs every block forward and backward for every
    example. The exact skip (`masked_block`) has the same values and gradients and does less: where m = 0, nothing flows
    back through the block, and its output is needed only as a number, for dloss/dm. So a dropped block runs forward
    without a graph, and not at all backward. Where the mask needs no gradient, it does not run at all.
    But each block is called twice, for the kept and for the dropped examples. It is still faster than the formula on a
    CPU, but on a GPU only with large batches (DiT-XL/2 on one H100: 1.2 times as fast with 128 images, 0.7 times
    with 32, in two thirds of the memory or less).

    blocks: any sequence of modules that map (B, ...) to (B, ...), each example by itself; args: further arguments of
    every block, as in `rows_of`; mask (B, L) of zeros and ones (more than 0.5 counts as 1), or None to run all. Returns
    x and the list of outputs of the blocks whose numbers are in `hidden`, in depth order. The weights of a block
    that no example keeps get no gradient (None) where the formula gives zeros. Raises ValueError for other shapes.
    Source: the paper's differentiable layer sampling; the skip is ours.
    """
    if mask is not None:
        if mask.shape != (len(x), len(blocks)):
            raise ValueError(f"mask is {tuple(mask.shape)}, expected (examples, blocks) = {(len(x), len(blocks))}")
        rows = kept_and_dropped(mask)
    features = []
    for i, block in enumerate(blocks):
        if mask is None:
            x = block(x, *args)
        else:
            def run(some):                       # the block for some examples; a tuple of one output
                return (block(*rows_of((x, *args), some, len(mask))),)

            (x,) = masked_block(run, (x,), mask[:, i], *rows[i])             # x <- m * block(x) + (1 - m) * x
        if i in hidden:
            features.append(x)
    return x, features


def kept_and_dropped(mask):
    """For each block of mask (B, L) the indices of the examples that keep it, and of those that drop it: L pairs."""
    keep = mask.detach() > 0.5
    rows = keep.byte().argsort(dim=0, descending=True, stable=True)          # (B, L): a block's kept examples first
    counts = keep.sum(0).tolist()                # one wait for a GPU; nonzero() would take one per block
    return [rows[:, i].split([count, len(mask) - count]) for i, count in enumerate(counts)]


def rows_of(arguments, rows, B):
    """The arguments of a block for the examples in `rows` alone. Tensors (B, ...), also inside tuples, lists and
    dicts, are per example; everything else is shared by all examples and stays whole. So no shared tensor may have B as
    its first dimension."""
    def pick(tensor):
        return tensor.index_select(0, rows) if tensor.shape[:1] == (B,) else tensor
    return torch.utils._pytree.tree_map_only(torch.Tensor, pick, arguments)


def masked_block(run, streams, m, kept, dropped):
    """One block under its mask. streams: the inputs (B, ...) that the block changes, mostly one. Returns their
    outputs (B, ...).

    run(rows) returns a tuple of the block's outputs for these examples alone, one per stream, or None for a stream that
    stays as it is. m (B,) is the block's column of the mask, kept and dropped as in `kept_and_dropped`. Raises
    ValueError where run returns more or fewer outputs than there are streams. Source: ours."""
    def with_outputs(tensors, rows):             # the tensors, in these rows replaced by what the block returns
        if not len(rows):
            return tensors
        return [x if out is None else x.index_copy(0, rows, out.to(x.dtype))             # autocast may change the type
                for x, out in zip(tensors, run(rows), strict=True)]

    outs = with_outputs(streams, kept)
    if not (m.requires_grad and torch.is_grad_enabled()):
        return outs
    with torch.no_grad():                        # the dropped rows need no graph
        everywhere = with_outputs(outs, dropped)             # block(x) in all rows
        changes = [out - x for x, out in zip(streams, everywhere)]
    # The outputs keep their values (if a change is finite), and m gets its gradient, the sum of dloss/dx_out * change.
    zero = m - m.detach()                        # 0, with the gradient of m
    return [out + zero.view(-1, *[1] * (out.dim() - 1)).to(out.dtype) * change for out, change in zip(outs, changes)]


def check_group(n, m):
    """Raise ValueError unless 1 <= N <= M and there are few enough candidates to learn."""
    if not 1 <= n <= m:
        raise ValueError(f"group {n}:{m}: expected N:M with 1 <= N <= M, to keep N of every M blocks")
    if m > 1000 or math.comb(m, n) > 100_000:
        raise ValueError(f"group {n}:{m} has too many candidates to learn: use smaller groups")


def nm_masks(n, m):
    """All ways to keep n of m blocks, the paper's candidate masks: a 0/1 matrix (candidates, m). Raises ValueError as
    `check_group` does."""
    check_group(n, m)
    kept = torch.tensor(list(itertools.combinations(range(m), n)))           # (candidates, n)
    return torch.zeros(len(kept), m).scatter_(1, kept, 1.0)


class LayerSampler(nn.Module):
    """A learnable distribution over layer masks, one categorical distribution per N:M group.

    groups: [(N, M), ...] from the first block to the last, e.g. [(1, 2)] * 14. All candidates start equally likely. The
    parameters are the logits divided by `scale`, small numbers, so that AdamW, whose steps have the size of the
    learning rate, can move the odds quickly. Raises ValueError as `check_group` does.
    Source: the paper's differentiable layer sampling.
    """

    def __init__(self, groups):
        super().__init__()
        for k, (n, m) in enumerate(groups):                  # float64, which autocast never rounds to bfloat16
            self.register_buffer(f"candidates{k}", nm_masks(n, m).double(), persistent=False)
        # The published recipe starts all logits at 0.02. A softmax does not see a constant, so this is the same start.
        self.logits = nn.ParameterList([nn.Parameter(torch.zeros(len(c))) for c in self.candidates])

    @property
    def candidates(self):
        """K matrices (candidates, M)."""
        return list(self.buffers())

    def forward(self, batch_size, tau=1.0, scale=100.0):
        """One independent mask per example: (B, L), exactly 0 or 1, exactly N ones per group, with the gradient of the
        softmax at temperature `tau`. tau does not change what is drawn, only the gradient: a high tau gives a biased
        but quiet gradient, a low tau a less biased but noisier one."""
        parts = []
        for logits, candidates in zip(self.logits, self.candidates):
            p = F.gumbel_softmax((logits * scale).expand(batch_size, -1), tau=tau)          # (B, candidates)
            hard = candidates[p.argmax(1)]                                                  # (B, M), the mask drawn
            soft = p.double() @ candidates                                                  # (B, M), its relaxation
            # Straight through: the value of `hard`, the gradient of `soft`. The brackets matter: soft - soft is exactly
            # 0, while (hard - soft) + soft, the order of F.gumbel_softmax(hard=True), can miss 0 and 1 by a rounding.
            parts.append((hard + (soft - soft.detach())).to(p.dtype))
        return torch.cat(parts, dim=1)

    def _probabilities(self, scale):
        return [torch.softmax(logits.detach() * scale, dim=0) for logits in self.logits]    # K of (candidates,)

    def keep_probability(self, scale=100.0):
        """The probability (L,) of every block to be kept."""
        return torch.cat([p.double() @ c for p, c in zip(self._probabilities(scale), self.candidates)]).float()

    def confidence(self, scale=100.0):
        """The probability (K,) of each group's likeliest candidate: near 1 when the decision is made."""
        return torch.stack([p.max() for p in self._probabilities(scale)])

    def kept(self):
        """The blocks to keep, ascending: those of each group's likeliest candidate."""
        mask = torch.cat([c[logits.argmax().item()] for logits, c in zip(self.logits, self.candidates)])    # (L,)
        return mask.nonzero().flatten().tolist()


class TopNSampler(nn.Module):
    """A learnable distribution over the masks that keep n of `depth` blocks, wherever they are: one logit per block,
    and no groups. It is called like a LayerSampler. It goes beyond the paper; on a first reading skip it.

    A draw is the n largest keys k_i = logit_i + Gumbel noise (here too the parameters are the logits divided by
    `scale`), which is sampling without replacement (arXiv:1903.06059). For the gradient the draw is relaxed to s_i =
    sigmoid((k_i - c) / tau), with a threshold c for which the s_i sum to n. Raises ValueError unless 1 <= n <= depth.
    Source: ours.

    c moves with the keys. Differentiating sum s_i = n gives sum s_i (1 - s_i) (dk_i - dc) = 0, so dc = sum w_i dk_i,
    with weights w_i in proportion to s_i (1 - s_i). The gradients that reach the keys then sum to 0: a block gains only
    what others lose. With a constant c all logits would drift together."""

    def __init__(self, n, depth):
        super().__init__()
        if not 1 <= n <= depth:
            raise ValueError(f"groups {n}: expected a number of blocks to keep from 1 to {depth}")
        self.n = n
        self.logits = nn.Parameter(torch.zeros(depth))

    def forward(self, batch_size, tau=1.0, scale=100.0, generator=None):
        """One independent mask per example: (B, L), exactly 0 or 1, exactly n ones, with the gradient of the relaxed
        mask at temperature tau."""
        noise = self.logits.new_empty(batch_size, len(self.logits)).exponential_(generator=generator)
        keys = self.logits * scale - noise.log()                             # (B, L); -noise.log() is Gumbel noise
        hard = torch.zeros_like(keys).scatter(1, keys.topk(self.n).indices, 1.0)
        if not torch.is_grad_enabled():
            return hard
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
        c = c + (w * (keys - keys.detach())).sum(1, keepdim=True)            # the same number, with its gradient
        return torch.sigmoid((keys - c) / tau)

    @torch.no_grad()
    def keep_probability(self, scale=100.0):
        """The probability (L,) of every block to be kept, from 1,000 draws, the same noise at every call."""
        generator = torch.Generator(self.logits.device).manual_seed(0)
        return self(1000, 1.0, scale, generator).mean(0)

    def confidence(self, scale=100.0):
        """The probability (n,) of each of the blocks in `kept` to be kept: near 1 when the decision is made."""
        return self.keep_probability(scale)[self._chosen()]

    def kept(self):
        """The blocks to keep, ascending: those of the n largest logits."""
        return self._chosen().tolist()

    def _chosen(self):
        return self.logits.topk(self.n).indices.sort().values


def make_sampler(groups):
    """A LayerSampler for groups, a list [(N, M), ...]; a TopNSampler for one bare (N, L), which means no groups: keep N
    of all L blocks."""
    return LayerSampler(groups) if isinstance(groups, list) else TopNSampler(*groups)


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
# (`train`, Chapter 9, loops AdamW. Its loss_fn(step) is another one than that of `learn_layers`, and returns a scalar
# and a dict of numbers to report.)
# ---------------------------------------------------------------------------------------------------------------------

def is_linear(module):
    """Whether it is nn.Linear or Hugging Face's Conv1D, a linear layer with weight (in, out) and `nf`, its out."""
    weight = getattr(module, "weight", None)
    conv1d = hasattr(module, "nf") and torch.is_tensor(weight) and weight.dim() == 2 and weight.shape[1] == module.nf
    return isinstance(module, nn.Linear) or conv1d


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update: y = W x + b + (alpha / rank) lora_B lora_A x.

    x (..., in) to (..., out); lora_A (rank, in), lora_B (out, rank). lora_B starts at zero, so the layer starts as the
    one it wraps. Source: arXiv:2106.09685."""

    def __init__(self, base, rank=8, alpha=16.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = alpha / rank
        W = self.matrix(base.weight)                                         # (out, in)
        self.lora_A = nn.Parameter(W.new_empty(rank, W.shape[1]))
        self.lora_B = nn.Parameter(W.new_zeros(W.shape[0], rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def matrix(self, weight):
        """A weight as (out, in): that of a Linear is, that of a Conv1D is (in, out)."""
        return weight if isinstance(self.base, nn.Linear) else weight.T

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.lora_A) * self.scaling, self.lora_B)

    @property
    def weight(self):
        """W + (alpha / rank) lora_B lora_A, for modules that read it, as nn.MultiheadAttention reads its out_proj's."""
        return self.base.weight + self.matrix(self.scaling * self.lora_B @ self.lora_A)

    @property
    def bias(self):
        return self.base.bias


def add_lora(model, rank=8, alpha=16.0, verbose=False):
    """Freeze `model`, wrap every linear layer inside it with a LoRALinear, in place, and return the new parameters, now
    the only trainable ones; `verbose` prints the layers' names. (nn.MultiheadAttention has no linear layer for q, k, v:
    they stay frozen.) Raises ValueError for a model without linear layers, or with all of them wrapped already.
    Source: arXiv:2106.09685, on every linear layer as in the TinyFusion paper."""
    model.requires_grad_(False)
    added = []
    for path, module in list(model.named_modules()):
        for name, child in module.named_children():
            if is_linear(child) and not isinstance(module, LoRALinear):
                wrapped = LoRALinear(child, rank, alpha)
                setattr(module, name, wrapped)
                added += [wrapped.lora_A, wrapped.lora_B]
                if verbose:
                    print("LoRA:", f"{path}.{name}".lstrip("."))
    if not added:
        raise ValueError("add_lora found no linear layer to wrap: is the model wrapped already, or of other layers?")
    return added


def learn_layers(model, loss_fn, groups, steps, *, update="lora", rank=8, alpha=16.0, lr=1e-4, logits_lr=1e-3,
                 tau=(4.0, 0.1), scale=100.0, prepare=lambda model: None, on_step=lambda step, metrics: None, **loop):
    """Learn which blocks to keep: optimise the logits of `make_sampler(groups)` together with a weight update.

    loss_fn(model, sample_mask) draws a batch, calls `mask = sample_mask(batch_size)` for its masks (B, L), and returns
    the masked model's loss, a scalar. `set_mask` (Chapter 6) masks a model whose forward pass takes none. `update` is
    "lora", "full" (all weights train) or "frozen" (none do): the rows of the paper's Table 4. rank and alpha are those
    of `LoRALinear`, lr is the update's rate, scale that of `LayerSampler`; tau falls linearly from tau[0] to tau[1]:
    from a quiet gradient to a truer one. Works on a copy; prepare(copy) is called first, for example to move it to a
    GPU. on_step and loop, more arguments, are those of `train`. The defaults are the paper's for DiT-XL, but without
    EMA (Chapter 9). Returns the sampler and its history, a list of (step, keep_probability). Raises ValueError for an
    unknown update, a model with no trainable weights, or a loss without the mask. Source: the paper's method."""
    if update not in ("lora", "full", "frozen"):
        raise ValueError(f"update {update!r}: expected lora, full or frozen")
    model = copy.deepcopy(model).train()
    if update == "lora":
        add_lora(model, rank, alpha)
    elif update == "frozen":
        model.requires_grad_(False)
    prepare(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights and update != "frozen":
        raise ValueError("no weight of the model requires a gradient: nothing to update")
    sampler = make_sampler(groups).to(next(model.parameters()).device)
    history = [(0, sampler.keep_probability(scale).tolist())]
    reached = set()                              # empty until a gradient has reached a mask
    unused = ValueError("the loss does not depend on the mask: call sample_mask in loss_fn and use what it gives")

    def loss(step):
        tau_now = tau[0] + (tau[1] - tau[0]) * step / max(1, steps - 1)

        def sample_mask(batch_size):
            mask = sampler(batch_size, tau_now, scale)
            mask.register_hook(lambda gradient: reached.add(True))
            return mask
        value = loss_fn(model, sample_mask)
        if not value.requires_grad:
            raise unused
        return value, {"tau": tau_now}

    def after(step, metrics):
        if not reached:
            raise unused
        if (step + 1) % max(1, steps // 200) == 0 or step + 1 == steps:
            history.append((step + 1, sampler.keep_probability(scale).tolist()))
        on_step(step, metrics | {"confidence": sampler.confidence(scale).mean()})

    both = [{"params": list(sampler.parameters()), "lr": logits_lr}, {"params": weights, "lr": lr}]
    train(model, loss, steps, params=both, on_step=after, record=history, **loop)
    return sampler, history                      # the copy and its update are not needed any more


def masked_denoising(diffusion, batches):
    """The loss_fn of `learn_layers` for a diffusion model: the training loss, by `diffusion`, an Objective (Chapter 2),
    of the next of `batches`, x0 (B, C, H, W) and y (B,), with a mask of its own for every example."""
    def loss_fn(model, sample_mask):
        x0, y = next(batches)
        t = diffusion.sample_t(len(x0), x0.device)
        masked = functools.partial(model, mask=sample_mask(len(x0)))
        return diffusion.training_losses(masked, x0, t, y)["loss"].mean()
    return loss_fn


def blocks_of(model, lists=None):
    """The block lists of a model, each a ModuleList or Sequential: those named, such as "encoder.layers" or ["a", "b"],
    else model.block_lists, else "blocks". Several lists have one numbering of blocks through all of them. Raises
    AttributeError for a name that the model does not have."""
    lists = lists or getattr(model, "block_lists", "blocks")
    return [model.get_submodule(name) for name in ([lists] if isinstance(lists, str) else lists)]


def check_kept(kept, depth):
    """Raise ValueError unless `kept` is an ascending list of blocks of a model of this depth."""
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= depth:
        raise ValueError(f"kept blocks {kept}: expected different numbers from 0 to {depth - 1}, ascending")


def prune(model, kept, lists=None):
    """A shallower copy of `model`: only the blocks numbered in `kept`, everything else the same, weights untouched.

    lists as in `blocks_of`. The blocks left in a list are numbered anew, and so is a block's `layer_idx` (its place in
    a cache of transformers) if it was the block's place in its list. What else depends
    on the depth is yours to adapt: a configuration (config.num_layers), attention that is scaled by layer_idx, parts
    that read a certain block, as the head of diffusers' DiT reads block 0's embedding. Raises ValueError as
    `check_kept` does, and for a model under a mask. Source: the paper, which prunes the original weights."""
    kept = [int(i) for i in kept]
    every = [block for blocks in blocks_of(model, lists) for block in blocks]
    check_kept(kept, len(every))
    if any("unmasked_forward" in vars(block) for block in every):            # put there by set_mask (Chapter 6)
        raise ValueError("the model runs under a mask: call set_mask(model, None) before prune")
    pruned = copy.deepcopy(model)
    first = 0                                    # the number of a list's first block
    for blocks in blocks_of(pruned, lists):
        places = [i - first for i in kept if 0 <= i - first < len(blocks)]   # the old places of this list's blocks
        first += len(blocks)
        for new, old in enumerate(places):
            for module in blocks[old].modules():
                if getattr(module, "layer_idx", None) == old:
                    module.layer_idx = new
        for place in reversed(range(len(blocks))):
            if place not in places:
                del blocks[place]                # the list numbers the others anew
    return pruned


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 5. Recovery: masked knowledge distillation
#
# The pruned model is fine-tuned with the original as its teacher. Both see the same noisy image, timestep and label,
# and the student imitates the teacher's output and its hidden states. The latter needs care. A few numbers in a
# diffusion transformer's hidden states are enormous ("massive activations", arXiv:2402.17762); they dominate a squared
# error, and training on them diverges (the paper's Table 5). So entries more than k = 2 standard deviations from the
# mean, in either model, are left out (masked; no mask of blocks is meant), and with them some ordinary ones:
#
#        loss = 0.9 * KD + 0.1 * denoising + beta * features,      beta falling linearly to 0
#
# (This beta is a weight, not the noise variance of Chapter 2.) KD (knowledge distillation) is the squared error between
# the two noise predictions, plus a KL divergence for a learned variance. Denoising is Chapter 2's training loss.
# Features is the error of the hidden states, a mean over pairs of blocks. The constants are the paper's.
# ---------------------------------------------------------------------------------------------------------------------

def masked_feature_loss(student, teacher, k=2.0):
    """Mean squared error of two models' hidden states (B, T, D) over the entries where neither is an outlier. A scalar:
    the mean over examples of the mean over an example's entries, so that equal parts of a batch average to the whole.

    An entry is an outlier where |h - mean(h)| > k * std(h), mean and std over tokens and channels of one example.
    What is left out is in neither the sum nor the gradient. k = inf leaves nothing out: plain feature KD. Raises
    ValueError for shapes that differ or are not (B, T, D).
    Source: the paper's masked knowledge distillation."""
    if student.shape != teacher.shape or student.dim() != 3:
        raise ValueError(f"hidden states {tuple(student.shape)}, {tuple(teacher.shape)}: expected the same (B, T, D)")

    def inlier(h):
        h = h.detach().float()
        deviation = (h - h.mean((1, 2), keepdim=True)).abs()
        return ~(deviation > k * h.std((1, 2), keepdim=True))                # not <=, because inf * 0 is NaN

    both = inlier(student) & inlier(teacher)                                 # (B, T, D)
    difference = torch.where(both, student - teacher.detach(), 0)
    return (difference.float().square().sum((1, 2)) / both.sum((1, 2)).clamp(min=1)).mean()


def match_blocks(groups, kept, cuts=()):
    """Pairs (student block, teacher block) for feature KD: each group's last kept block, as numbered in the student,
    and the group's last block, whose output it must stand in for. For 1:2 that is (i, 2i + 1). Without groups,
    for a bare (N, L), every kept block stands in for all blocks up to the next kept one.

    A group of which a criterion (Chapter 12) keeps no block has no pair. cuts: where the token sequence changes, the
    numbers of the first blocks after it, such as a MAR's first decoder block; a cut ends a group too. Source: the
    paper's pairs of 1:2, carried over to any groups."""
    if isinstance(groups, list):
        ends = itertools.accumulate(m for _, m in groups)
    else:
        ends = [*kept[1:], groups[1]]
    ends = sorted({*ends, *cuts})
    last = {}                                    # {the end of a group: its last kept block, numbered as in the student}
    for i, block in enumerate(kept):             # a later block of a group takes the place of an earlier one
        last[min(end for end in ends if end > block)] = i
    return [(i, end - 1) for end, i in last.items()]


KD_MODES = ("masked", "feature", "logits", "none")


def recovery_loss(student, teacher, diffusion, x0, y, pairs, kd="masked", beta=1e-2, k=2.0):
    """One batch's fine-tuning loss and its parts: (scalar, dict). diffusion: an Objective (Chapter 2); x0 (B, C, H, W),
    y (B,); pairs from `match_blocks`; beta: the weight of the features; k as in `masked_feature_loss`.

    kd: "masked", the paper's; "feature", outliers included; "logits", the outputs alone (not the mask's
    logits); "none", plain fine-tuning. Labels are nulled here, once, so that both models get the same ones: the teacher
    must be in eval mode, and so must the student's y_embedder. Raises ValueError where that is not so, for an unknown
    kd, or pairs out of order. Source: the paper's masked knowledge distillation."""
    if kd not in KD_MODES:
        raise ValueError(f"kd {kd!r}: expected one of {', '.join(KD_MODES)}")
    if teacher.training or student.y_embedder.training:
        raise ValueError("the models would drop labels themselves: call teacher.eval() and student.y_embedder.eval()")
    if any(list(side) != sorted(set(side)) for side in zip(*pairs)):
        raise ValueError(f"pairs {pairs}: expected ascending block numbers on both sides, as from match_blocks")
    t = diffusion.sample_t(len(x0), x0.device)
    noise = noise_for(x0, t)
    x_t = diffusion.q_sample(x0, t, noise)
    y = student.y_embedder.token_drop(y)
    if kd in ("logits", "none"):
        pairs = []
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

    batches: an iterator of x0 (B, C, H, W) and y (B,). beta falls linearly to 0; the paper starts it at 1e-2 for DiT,
    at 2e-4 for SiT. kd and k as in `recovery_loss`; loop: more arguments of `train` (Chapter 9), such as on_step.
    Defaults are the paper's for DiT-XL (lr 2e-4, cosine to 1e-4). Raises ValueError as `recovery_loss` does. Source:
    the paper's recovery."""
    teacher.eval()
    student.train()
    student.y_embedder.eval()                    # recovery_loss drops labels, for both models at once

    def loss(step):
        beta_now = beta * (1 - step / max(1, steps - 1))
        x0, y = next(batches)
        return recovery_loss(student, teacher, diffusion, x0, y, pairs, kd, beta_now, k)

    return train(student, loss, steps, lr=lr, final_lr_ratio=final_lr_ratio, ema_decay=ema_decay, **loop)


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 6. More models: any stack of residual blocks, SiT, MAR
#
# The method needs little from a model: residual blocks, a forward pass that takes a mask of them, and an objective.
# First comes `set_mask`, which runs a model that is not ours under a mask. Then come two more families of diffusion
# models, which Chapters 3 to 5 serve unchanged: their objectives, and MAR's network. Last comes one row of settings
# for every model.
#
# SiT (arXiv:2401.08740) is DiT's network with another objective, flow matching: x_t lies on the straight line from
# noise to image, and the model predicts the velocity along it. Its t runs the other way: 0 is noise, 1 is the image.
#
# MAR (arXiv:2406.11838) is another network too. It draws an image a few tokens at a time, in random order. The encoder
# reads the known tokens; the decoder outputs a condition vector z for each missing one; and a small MLP, the head,
# draws that token by a diffusion of its few numbers alone, given z:
#
#     known tokens -> encoder blocks -+                       z of each token to be drawn now
#                                     +-> decoder blocks -> z      |
#     mask tokens for the others -----+                          head: noise -> ... -> that token
#
# For Chapters 2 to 5 this is a diffusion in which every token has its own time; a known token has time -1. The
# blocks are expensive and the head is cheap, so a batch passes through the blocks once, and its missing tokens are
# noised R times. Times t (R * B, T) of B = 2 images of T = 5 tokens, R = 2:
#
#     image 0     -1  310   -1   52  700    \  first copy       image 0 knows tokens 0 and 2,
#     image 1    874   -1   -1  415    6    /                   image 1 knows tokens 1 and 2;
#     image 0     -1    9   -1  640  233    \  second copy      both copies know the same ones,
#     image 1    128   -1   -1  990  501    /                   with other times for the rest
#
# Blocks of encoder and decoder share one numbering, and are learned and pruned together. The head stays. (A mask token
# is a learned placeholder, no mask of blocks.) More letters for shapes: F numbers in a token, n noisy tokens in all.
# ---------------------------------------------------------------------------------------------------------------------

def set_mask(model, mask, lists=None, streams=()):
    """Run a model that is not ours under a mask (B, L), in place, without touching its code, until set_mask is called
    again; mask None takes it off. The model is called as ever, on B examples, and gradients reach the mask.

    lists as in `blocks_of`. A block may take positional and keyword arguments, per example or shared (`rows_of`): the
    batch size must differ from the first dimension of every shared tensor, such as a table (T, D). streams: the names
    of the arguments that run through the blocks, in the order in which a block returns them, such as
    ("encoder_hidden_states", "hidden_states") for Flux and SD3; by default the first argument. Caches of keys and
    values (use_cache=True) are not supported; activation checkpointing is, with use_reentrant=False. Raises ValueError
    for a mask that does not fit.

    Names, modules and state_dict stay as they are: only the blocks' `forward` is replaced."""
    blocks = [block for blocks in blocks_of(model, lists) for block in blocks]
    for block in blocks:
        if "unmasked_forward" in vars(block):
            del block.forward
            before = vars(block).pop("unmasked_forward")
            if block.forward != before:          # the block had a `forward` of its own: accelerate sets one
                block.forward = before
    if mask is None:
        return
    if mask.dim() != 2 or mask.shape[1] != len(blocks):
        raise ValueError(f"mask is {tuple(mask.shape)}, expected (examples, {len(blocks)} blocks)")
    for block, m, rows in zip(blocks, mask.unbind(1), kept_and_dropped(mask)):
        forward = block.forward
        vars(block)["unmasked_forward"] = forward
        block.forward = functools.partial(forward_masked, forward, streams, m, *rows)


def forward_masked(forward, streams, m, kept, dropped, *args, **kwargs):
    """What a block does under `set_mask`, in the place of its `forward`."""
    given = inspect.signature(forward).bind(*args, **kwargs).arguments
    names = streams or list(given)[:1]
    inputs = [given.get(name) for name in names]
    if not all(torch.is_tensor(x) and len(x) == len(m) for x in inputs):
        raise ValueError(f"expected tensors of {len(m)} examples, one per row of the mask, in the streams {names} of a "
                         f"block that is called with {list(given)}")
    if any((given | kwargs).get(name) is not None for name in ("cache", "past_key_value", "past_key_values")):
        raise ValueError("a masked block cannot fill a cache: call the model with use_cache=False")
    returns_tuple = None

    def run(rows):
        nonlocal returns_tuple
        some_args, some_kwargs = rows_of((args, kwargs), rows, len(m))
        out = forward(*some_args, **some_kwargs)
        returns_tuple = isinstance(out, tuple)
        outs = out if returns_tuple else (out,)
        if len(outs) != len(names):
            raise ValueError(f"a block returns {len(outs)} outputs, but the streams are {names}")
        return outs

    outs = masked_block(run, inputs, m, kept, dropped)
    if returns_tuple is None:
        run(dropped[:1])                         # nobody keeps the block: one example shows what it returns
    return tuple(outs) if returns_tuple else outs[0]


class FlowMatching(Objective):
    """The linear interpolant of SiT: x_t = t x0 + (1 - t) noise, with t from 0 (noise) to 1 (the image x0). The model
    gets t and predicts the velocity x0 - noise in the first half of its output channels; the second half, which
    official SiT checkpoints have, is not used. Source: arXiv:2401.08740."""

    def sample_t(self, batch_size, device=None):
        """Training times (B,), uniform in [0, 1]."""
        return torch.rand(batch_size, device=device)

    def q_sample(self, x0, t, noise):
        """The point x_t (B, C, H, W) on the line from noise to image."""
        t = t.view(-1, *[1] * (x0.dim() - 1))
        return t * x0 + (1 - t) * noise

    def losses(self, model_output, x0, x_t, t, noise):
        """A dict of `mse` and `loss`, both the mean squared error (B,) of the velocity."""
        mse = mean_flat((x0 - noise - model_output[:, :x0.shape[1]].float()) ** 2)
        return {"mse": mse, "loss": mse}

    def distillation_losses(self, student_output, teacher_output, x_t, t):
        """Mean squared error (B,) between two models' velocities at the same x_t and t."""
        C = x_t.shape[1]
        return mean_flat((student_output[:, :C].float() - teacher_output[:, :C].float()) ** 2)

    @torch.inference_mode()
    def sample(self, model, y, draw, steps=250, guidance=1.0, solver="heun", clip_denoised=False, cfg_channels=3,
               dtype=None):
        """Images (B, C, H, W) of the classes y (B,): dx/dt = velocity, from noise at t = 0 to t = 1 in even steps.

        solver: "euler", or "heun", which runs the model twice a step and corrects the step by the velocity at its end.
        clip_denoised clips the final image. Raises ValueError for another solver or no steps. The rest as for
        `GaussianDiffusion.sample`."""
        if solver not in ("euler", "heun") or steps < 1:
            raise ValueError(f"solver {solver!r}, {steps} steps: expected euler or heun, and 1 step or more")

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


def patchify(x, T):
    """Images (B, C, H, W) to T square patches (B, T, C * P * P), row by row; channels first within a patch, as in MAR's
    repository."""
    P = math.isqrt(x.shape[2] * x.shape[3] // T)
    return F.unfold(x, P, stride=P).transpose(1, 2)


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
    """MAR's head, a diffusion model of single tokens: n noisy tokens x (n, F), their times t (n,) or (1,) and the
    decoder's vectors c (n, D) to the noise and variance of the tokens (n, 2F)."""

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


def noisy_tokens(t):
    """Of the noisy tokens among times t (R * B, T) the row and the place, two tensors (n,). The CPU waits once for a
    GPU to find them; with t >= 0 as an index it would wait at every use."""
    return (t >= 0).nonzero(as_tuple=True)


class MAR(nn.Module):
    """Masked autoregressive transformer. The defaults are MAR-L on 16x16 latents, of 16 channels, of 256x256 images:
    478,326,304 parameters.

    input_size, patch_size, in_channels: as for DiT; buffer_size: how many copies of the class vector stand before the
    tokens; diffloss_w, diffloss_d: width and blocks of the head; dropout: in attention and MLP, in training. Raises
    ValueError where sizes do not divide. Source: LTH14/mar, models/mar.py (names, initialisation and numerics; the text
    is ours)."""
    block_lists = ("encoder_blocks", "decoder_blocks")

    def __init__(self, input_size=16, patch_size=1, in_channels=16, hidden_size=1024, encoder_depth=16,
                 decoder_depth=16, num_heads=16, mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000,
                 buffer_size=64, diffloss_w=1280, diffloss_d=8, dropout=0.1):
        super().__init__()
        if input_size % patch_size or hidden_size % num_heads:
            raise ValueError(f"input_size {input_size} must be a multiple of patch_size {patch_size}, and hidden_size "
                             f"{hidden_size} of num_heads {num_heads}")
        self.sizes = {
            "input_size": input_size, "patch_size": patch_size, "in_channels": in_channels, "hidden_size": hidden_size,
            "num_heads": num_heads, "mlp_ratio": mlp_ratio, "class_dropout_prob": class_dropout_prob,
            "num_classes": num_classes, "buffer_size": buffer_size, "diffloss_w": diffloss_w, "diffloss_d": diffloss_d,
            "dropout": dropout}
        vars(self).update(self.sizes)
        self.num_tokens = (input_size // patch_size) ** 2
        T = self.num_tokens
        D = hidden_size
        token_dim = in_channels * patch_size ** 2

        def learned(*shape):
            return nn.Parameter(0.02 * torch.randn(*shape))

        self.y_embedder = LabelEmbedder(num_classes, None, class_dropout_prob)   # drops labels; the vectors follow
        self.class_emb = nn.Embedding(num_classes, D)
        self.fake_latent = learned(1, D)                                     # the vector of "no class"
        self.mask_token = learned(1, 1, D)
        self.z_proj = nn.Linear(token_dim, D)
        self.z_proj_ln = nn.LayerNorm(D, eps=1e-6)
        self.encoder_pos_embed_learned = learned(1, buffer_size + T, D)
        self.encoder_blocks = nn.ModuleList([Block(D, num_heads, mlp_ratio, dropout) for _ in range(encoder_depth)])
        self.encoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_embed = nn.Linear(D, D)
        self.decoder_pos_embed_learned = learned(1, buffer_size + T, D)
        self.decoder_blocks = nn.ModuleList([Block(D, num_heads, mlp_ratio, dropout) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.diffusion_pos_embed_learned = learned(1, T, D)
        self.diffloss = nn.ModuleDict({"net": SimpleMLPAdaLN(token_dim, diffloss_w, D, diffloss_d)})  # official names
        head = self.diffloss["net"]
        normal = [self.class_emb.weight, head.time_embed.mlp[0].weight, head.time_embed.mlp[2].weight]
        initialize(self, normal)

    @property
    def blocks(self):
        """All blocks, the encoder's first."""
        return [*self.encoder_blocks, *self.decoder_blocks]

    def config(self):
        """As `DiT.config`: MAR(**model.config()) is a twin."""
        return {**self.sizes, "encoder_depth": len(self.encoder_blocks), "decoder_depth": len(self.decoder_blocks)}

    def condition(self, x, known, y, mask=None, hidden=()):
        """Encoder and decoder: tokens x (B, T, F), of which only the `known` ones (B, T) are read, equally many in each
        example, and labels y (B,), to z (B, T, D) and the outputs of the `hidden` blocks, (B, buffer + known, D) in the
        encoder, (B, buffer + T, D) in the decoder. Raises ValueError where examples differ in the number of known
        tokens."""
        B = len(x)
        E = len(self.encoder_blocks)
        if (known.sum(1) != known[0].sum()).any():
            raise ValueError("expected the same number of known tokens in every example of a batch")
        readable = torch.cat([known.new_ones(B, self.buffer_size), known], 1).nonzero(as_tuple=True)
        encoder_mask, decoder_mask = (None, None) if mask is None else (mask[:, :E], mask[:, E:])

        vectors = torch.cat([self.class_emb.weight, self.fake_latent])       # (classes + 1, D)
        buffer = F.embedding(self.y_embedder(y), vectors).unsqueeze(1).expand(-1, self.buffer_size, -1)
        x = self.z_proj_ln(torch.cat([buffer, self.z_proj(x)], 1) + self.encoder_pos_embed_learned)
        x = x[readable].view(B, -1, self.hidden_size)                        # (B, buffer + known, D)
        x, features = masked_forward(self.encoder_blocks, x, mask=encoder_mask, hidden=hidden)
        x = self.decoder_embed(self.encoder_norm(x))
        full = self.mask_token.to(x.dtype).repeat(B, buffer.shape[1] + known.shape[1], 1)    # (B, buffer + T, D)
        full[readable] = x.flatten(0, 1)
        x, more = masked_forward(self.decoder_blocks, full + self.decoder_pos_embed_learned, mask=decoder_mask,
                                 hidden=[i - E for i in hidden])
        return self.decoder_norm(x)[:, self.buffer_size:] + self.diffusion_pos_embed_learned, features + more

    def forward(self, x, t, y, mask=None, hidden=None):
        """Predict the noise and the variance in the noisy tokens among x (R * B, T, F).

        t (R * B, T): their times, -1 for known tokens; y (B,) labels; mask (B, L) and hidden as for DiT. Returns
        (n, 2F), a row for every noisy token. The R copies of the batch share their known tokens, so the blocks run
        once."""
        z, features = self.condition(x[:len(y)], t[:len(y)] < 0, y, mask, hidden or ())
        noisy = noisy_tokens(t)
        out = self.diffloss["net"](x[noisy], t[noisy], z.repeat(len(x) // len(y), 1, 1)[noisy])
        return out if hidden is None else (out, features)


class MaskedAutoregression(Objective):
    """MAR's objective. A share of an image's tokens is known; each of the others is noised by itself, with a cosine
    schedule. Times t are (R * B, T), those of single tokens, -1 for known ones; noise is (R * B, C, H, W).

    num_tokens: T; repeats: R. Source: arXiv:2406.11838 and LTH14/mar."""

    def __init__(self, num_tokens=256, *, repeats=4):
        abar = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2           # arXiv:2102.09672
        self.diffusion = GaussianDiffusion(np.minimum(1 - abar[1:] / abar[:-1], 0.999))      # that of one token
        self.num_tokens = num_tokens
        self.repeats = repeats

    def sample_t(self, batch_size, device=None):
        """Training times (R * B, T) of random tokens; the rest are known. The share of noised tokens is drawn from a
        normal distribution of mean 1 and standard deviation 0.25, cut to [0.7, 1]; it is the same in all examples,
        whose known tokens then make one tensor (B, known, D)."""
        share = nn.init.trunc_normal_(torch.empty(()), 1.0, 0.25, 0.7, 1.0).item()
        missing = math.ceil(self.num_tokens * share)
        order = torch.rand(batch_size, self.num_tokens, device=device).argsort(1)
        known = torch.ones_like(order, dtype=torch.bool).scatter(1, order[:, :missing], False)      # (B, T)
        t = self.diffusion.sample_t(self.repeats * batch_size * self.num_tokens, device)
        return t.view(-1, self.num_tokens).masked_fill(known.repeat(self.repeats, 1), -1)

    def _tokens(self, x, t):
        """The tokens (R * B, T, F) of images x (B, C, H, W) or (R * B, C, H, W)."""
        return patchify(x, t.shape[1]).repeat(len(t) // len(x), 1, 1)

    def q_sample(self, x0, t, noise):
        """The tokens x_t (R * B, T, F) of x0 (B, C, H, W): noised where t is not -1, else as they are."""
        x = self._tokens(x0, t)
        noisy = noisy_tokens(t)
        x[noisy] = self.diffusion.q_sample(x[noisy], t[noisy], self._tokens(noise, t)[noisy])
        return x

    def losses(self, model_output, x0, x_t, t, noise):
        """As for `GaussianDiffusion`, each (B,): means over the noisy tokens of an image and over its R copies."""
        noisy = noisy_tokens(t)
        terms = self.diffusion.losses(model_output, self._tokens(x0, t)[noisy], x_t[noisy], t[noisy],
                                      self._tokens(noise, t)[noisy])
        copies = len(t) // len(x0)
        return {name: term.view(copies, len(x0), -1).mean((0, 2)) for name, term in terms.items()}

    def distillation_losses(self, student_output, teacher_output, x_t, t):
        """As for `GaussianDiffusion`, but (R * B,): means over the noisy tokens of every copy."""
        noisy = noisy_tokens(t)
        distances = self.diffusion.distillation_losses(student_output, teacher_output, x_t[noisy], t[noisy])
        return distances.view(len(t), -1).mean(1)

    @torch.inference_mode()
    def sample(self, model, y, draw, steps=64, guidance=1.0, head_steps=100, temperature=1.0, clip_denoised=False,
               dtype=None):
        """Images (B, C, H, W) of the classes y (B,), in `steps` steps, each of which draws some tokens in a random
        order: after i steps, floor(T cos(pi/2 i / steps)) are left, and at least one fewer than before.

        draw(*shape): noise (B, *shape). Guidance acts on all of a token and grows linearly with the share of drawn
        tokens; head_steps: steps of the head's diffusion; temperature: a factor of its noise; dtype: of the blocks.
        Raises ValueError for more steps than tokens, or none."""
        T = self.num_tokens
        if not 1 <= steps <= T:
            raise ValueError(f"{steps} sampling steps: expected 1 to {T}, because each step draws at least one token")
        token_dim = model.in_channels * model.patch_size ** 2
        labels = y if guidance == 1 else torch.cat([y, model.y_embedder.null_labels(y)])
        copies = len(labels) // len(y)                                       # 2 under guidance
        order = draw(T).argsort(1)                                           # (B, T)
        known = torch.zeros(len(y), T, dtype=torch.bool, device=y.device)
        x = torch.zeros(len(y), T, token_dim, device=y.device)
        left = T
        for i in range(steps):
            after = max(0, min(left - 1, math.floor(T * math.cos(math.pi / 2 * (i + 1) / steps))))
            scale = 1 + (guidance - 1) * (T - max(1, after)) / T             # in the last step too, as officially
            now = order[:, T - left:T - after]                               # (B, n), the n tokens to draw
            left = after
            with autocast(y.device, dtype):
                z, _ = model.condition(x.repeat(copies, 1, 1), known.repeat(copies, 1), labels)
            z = z.take_along_dim(now.repeat(copies, 1).unsqueeze(2), 1).flatten(0, 1)        # (copies * B * n, D)

            def predict(noisy, t):               # (B * n, F) to (B * n, 2F)
                out = model.diffloss["net"](noisy.repeat(copies, 1), t, z).float().chunk(copies)
                cond, uncond = out[0], out[-1]                               # the same without guidance
                eps = torch.lerp(uncond[:, :token_dim], cond[:, :token_dim], scale)
                return torch.cat([eps, cond[:, token_dim:]], 1)

            # In float32: the first steps multiply an error of the noise by hundreds. The head is cheap.
            tokens = self.diffusion.denoise(predict, lambda: draw(now.shape[1], token_dim).flatten(0, 1), head_steps,
                                            clip_denoised=clip_denoised, temperature=temperature, dtype=torch.float32)
            x.scatter_(1, now.unsqueeze(2).expand(-1, -1, token_dim), tokens.view(len(y), -1, token_dim))
            known.scatter_(1, now, True)
        return F.fold(x.transpose(1, 2), model.input_size, model.patch_size, stride=model.patch_size)   # (B, C, H, W)


def _dit(depth, hidden_size, num_heads, patch_size=2):
    return functools.partial(DiT, depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=patch_size)


DiT_models = {                                   # DiT_models["DiT-XL/2"](input_size=32, num_classes=1000)
    "DiT-XL/2": _dit(28, 1152, 16), "DiT-L/2": _dit(24, 1024, 16), "DiT-B/2": _dit(12, 768, 12),
    "DiT-S/2": _dit(12, 384, 6),
    "DiT-D19/2": _dit(19, 1152, 16), "DiT-D14/2": _dit(14, 1152, 16), "DiT-D7/2": _dit(7, 1152, 16),
    "toy": _dit(12, 64, 4, patch_size=4), "toy-28": _dit(28, 64, 4, patch_size=4),
}


def _mar(depth, hidden_size, num_heads, diffloss_w, diffloss_d, **more):
    return functools.partial(MAR, encoder_depth=depth, decoder_depth=depth, hidden_size=hidden_size,
                             num_heads=num_heads, diffloss_w=diffloss_w, diffloss_d=diffloss_d, **more)


MAR_models = {
    "MAR-L": _mar(16, 1024, 16, 1280, 8), "MAR-B": _mar(12, 768, 12, 1024, 6),
    "MAR-toy": _mar(6, 64, 4, 128, 2, patch_size=4, buffer_size=8, dropout=0.0),
}

# One row of settings per model, from which most defaults of the command line come. PAPER is the paper's recipe for
# DiT-XL (while learning, batches are half as large); teacher_steps and teacher_lr are DiT's. TOY was tuned on the drawn
# digits. ema_decay: of the average of the weights; beta: first weight of the features in masked KD; label_std: of a new
# DiT's label embeddings, officially 0.02; sampling: further arguments of the objective's `sample`.
PAPER = {
    "objective": "ddpm", "batch_size": 256, "learn_batch": 0.5, "teacher_steps": 400_000, "teacher_lr": 1e-4,
    "learn_steps": 10_000, "learn_lr": 1e-4, "logits_lr": 1e-3, "recover_steps": 100_000, "recover_lr": 2e-4,
    "ema_decay": 0.9999, "beta": 1e-2, "label_std": 0.02, "samples": 50_000, "sample_steps": 250, "guidance": 1.5,
    "sampling": {}}
TOY = PAPER | {
    "batch_size": 64, "learn_batch": 1, "teacher_steps": 1200, "teacher_lr": 1e-2, "learn_steps": 300,
    "learn_lr": 1e-3, "logits_lr": 3e-3, "recover_steps": 300, "recover_lr": 2e-3, "ema_decay": 0.99,
    "label_std": 1.0, "samples": 500, "sample_steps": 50}
SIT = {"objective": "flow", "beta": 2e-4}
MAR_ = {"objective": "mar", "sample_steps": 256, "guidance": 3.0}
PRESETS = {
    **{name: PAPER | {"network": network} for name, network in DiT_models.items()},
    **{name.replace("DiT", "SiT"): PAPER | SIT | {"network": network} for name, network in DiT_models.items()},
    "toy": TOY | {"network": DiT_models["toy"]},
    "toy-28": TOY | {"network": DiT_models["toy-28"], "learn_steps": 400},
    "SiT-toy": TOY | SIT | {"network": DiT_models["toy"]},
    "MAR-L": PAPER | MAR_ | {"network": MAR_models["MAR-L"]},
    "MAR-B": PAPER | MAR_ | {"network": MAR_models["MAR-B"], "guidance": 2.9},
    "MAR-toy": TOY | MAR_ | {"network": MAR_models["MAR-toy"], "teacher_lr": 2e-3, "sample_steps": 8, "guidance": 1.5,
                             "sampling": {"head_steps": 10}},
}


def objective_of(name, model):
    """The objective "ddpm", "flow" or "mar" for `model`."""
    if name == "mar":
        return MaskedAutoregression(model.num_tokens)
    return FlowMatching() if name == "flow" else GaussianDiffusion()


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 7. Measuring
#
# The Frechet distance compares two sets of images through the mean and covariance of their features under some
# network: |mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)). FID takes the features of an Inception network trained on
# ImageNet. Without --inception we train a small classifier on the data, take its features, and call the result
# *toy-FID*. It ranks models of one data set. A classifier with other starting weights gives other numbers, almost in
# the same order. No toy-FID can be compared with a published FID. Precision is the share of drawn images that look
# real, recall the share of real ones that could have been drawn, and the inception score says whether images are clear
# and of all classes.
#
# What is known of a set of N images with F features each is a dict of arrays, its statistics: `mu` (F,), `sigma` (F, F)
# and, where known, `features` (N, F) and class probabilities `p` (N, classes). All features are in memory.
# ---------------------------------------------------------------------------------------------------------------------

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance of N(mu1, sigma1) and N(mu2, sigma2); mu (F,), sigma (F, F), symmetric. A float, at least 0.

    With S1 = R R^T, sqrt(S1 S2) has the trace of the symmetric sqrt(R^T S2 R), whose eigenvalues are real and, but for
    rounding, not negative: one symmetric eigenproblem instead of a general matrix square root. R comes from the
    eigenvectors of S1, which may be singular (fewer samples than features). Raises ValueError for shapes that do not
    fit or numbers that are not finite. Source: arXiv:1706.08500, equation 6."""
    mu1, mu2, sigma1, sigma2 = [np.asarray_chkfinite(a, dtype=np.float64) for a in (mu1, mu2, sigma1, sigma2)]
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != mu1.shape * 2:
        raise ValueError(f"Frechet distance of means {mu1.shape}, {mu2.shape} and covariances {sigma1.shape}, "
                         f"{sigma2.shape}: expected (F,) and (F, F)")

    def roots(values):                           # of eigenvalues; rounding errors of a zero count as zero
        return np.sqrt(np.where(values > len(values) * np.finfo(float).eps * values.max(), values, 0))

    values, vectors = scipy.linalg.eigh(sigma1)
    R = vectors * roots(values)                                              # (F, F)
    trace_of_root = roots(scipy.linalg.eigvalsh(R.T @ sigma2 @ R)).sum()
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(float(distance), 0.0)


def inception_score(probabilities, split=5000):
    """exp of the mean KL(p(class | image) || p(class)), from class probabilities (N, classes): 1 where all images look
    alike, at most the number of classes. The mean over splits of 5,000 images, as ADM (openai/guided-diffusion) has it;
    they are shuffled first, because images sorted by class would fill each split with few classes. Source:
    arXiv:1606.03498."""
    p = torch.as_tensor(probabilities, dtype=torch.float64)
    p = p[torch.randperm(len(p), generator=torch.Generator().manual_seed(0))]
    scores = []
    for part in p.split(split):
        entropy_of_mean = torch.special.entr(part.mean(0)).sum()
        mean_entropy = torch.special.entr(part).sum(1).mean()
        scores.append(math.exp(entropy_of_mean - mean_entropy))
    return float(np.mean(scores))


def precision_recall(real, fake, k=3):
    """Improved precision and recall of features real (N, F) and fake (M, F): the share of fakes inside the manifold of
    the real ones, and the other way round; two floats. A set's manifold is the union of balls around its points, each
    reaching to the k-th nearest other one. Raises ValueError for k points or fewer. Source: arXiv:1904.06991."""
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall with k = {k} need more than {k} real and fake examples")

    # Exact differences: the matrix-product form loses near duplicates.
    distances = functools.partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")

    def share_inside(points, queries):
        radii = torch.cat([distances(part, points).kthvalue(k + 1, dim=1).values for part in points.split(1024)])
        inside = torch.cat([(distances(part, points) <= radii).any(1) for part in queries.split(1024)])
        return inside.double().mean().item()

    real, fake = torch.as_tensor(real).float(), torch.as_tensor(fake).float()
    return share_inside(real, fake), share_inside(fake, real)


def train_judge(data, device, steps=400):
    """Train the judge of toy runs, a small classifier, on nine tenths of `data`, a Dataset of images.

    Returns look(images), from uint8 images (B, C, H, W) to features (B, 64) and class probabilities (B, classes) as
    arrays, and its accuracy on the rest. Its seed is 0 whatever the run's, so that models are measured alike."""
    torch.manual_seed(0)
    side = min(math.ceil(data.shape[1] / 4), 8)
    body = nn.Sequential(
        nn.Conv2d(data.shape[0], 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(64 * side ** 2, 64), nn.ReLU())
    head = nn.Linear(64, len(data.classes))
    judge = nn.Sequential(body, head).to(device)
    held_out = torch.randperm(len(data.labels)) % 10 == 0
    seen = Dataset(data.images[~held_out], data.labels[~held_out], data.classes)
    batches = data_batches(seen, 64, seed=0, device=device)

    def loss(step):
        x, y = next(batches)
        return F.cross_entropy(judge(x), y), {}

    @torch.no_grad()
    @without_tf32()
    def look(images):
        features = body(to_float(images).to(device))
        return features.cpu().numpy(), head(features).softmax(1).cpu().numpy()

    train(judge, loss, steps, lr=1e-3, seed=0, on_step=progress("judge", steps))
    _, p = look(data.images[held_out])
    accuracy = float((p.argmax(1) == data.labels[held_out].numpy()).mean())
    doubt = ", too few to trust it" if len(p) < 50 or len(data.classes) < 2 else ""
    print(f"judge: {accuracy:.1%} right on {len(p)} held-out images of {len(data.classes)} classes{doubt}")
    return look, accuracy


def load_inception(path, device):
    """The network that FID is defined by, a TorchScript file (NVIDIA's port, inception-2015-12-05.pt), as look(images):
    features (B, 2048) and class probabilities, as arrays, of uint8 images (B, 1 or 3, H, W) of any size.

    TorchScript is a program, though not a Python one: take it from a place you trust. Raises UserError where it cannot
    be read."""
    @torch.no_grad()
    @without_tf32()                              # as published FIDs are measured
    def look(images):
        x = images.expand(-1, 3, -1, -1).to(device)
        features = net(x, return_features=True)
        return features.float().cpu().numpy(), net(x, no_output_bias=True).float().cpu().numpy()

    with reading(path, "a TorchScript file called as NVIDIA's port is"), warnings.catch_warnings(action="ignore"):
        net = torch.jit.load(path, map_location=device).eval()               # warns that TorchScript is deprecated
        look(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    return look


def statistics(parts):
    """The statistics of images, from a list of what look(images) returned for each batch. For 50,000 images of 2048
    features np.cov needs 1.3 GB more for a moment, measured."""
    features, p = map(np.concatenate, zip(*parts))
    sigma = np.atleast_2d(np.cov(features, rowvar=False))
    return {"mu": features.mean(0, dtype=np.float64), "sigma": sigma, "features": features, "p": p}


def load_arrays(path, mmap_mode=None):
    """The array in an .npy file, or the dict of arrays in an .npz file. Raises UserError where it cannot be read."""
    with reading(path, "a whole .npy or .npz file"):
        content = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
        if isinstance(content, np.ndarray) != (Path(path).suffix == ".npy"):
            raise ValueError("it holds the other kind")
        return content if isinstance(content, np.ndarray) else dict(content)


def images_of(path, images):
    """Batches (B, 1 or 3, H, W), uint8. A folder, with its sub-folders, gives one image at a time, since sizes may
    differ. Else they are of `images` (N, H, W, 3), the `arr_0` of an .npz file: 10 GB for 50,000 images of 256x256.
    Raises UserError where there are no images."""
    if Path(path).is_dir():
        return (torch.from_numpy(read_image(file)[None].copy()) for file in files_in(path))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UserError(f"{path}: expected a folder of images, or an .npz file with uint8 arr_0 (N, H, W, 3)")
    return torch.from_numpy(images).permute(0, 3, 1, 2).split(50)


def warn_of_few(count):
    """Print a warning where an FID of so many images means little."""
    if count < 2048:
        print(f"warning: an FID of {count} images, fewer than 2,048, is far too high")


def statistics_of(path, look=None):
    """Statistics of the images in a folder or .npz file, seen through `look`. If an .npz file has `mu` and `sigma`,
    these are used (in ADM's reference batches they are of all of ImageNet); its `arr_0`, if any, gives the rest. Raises
    UserError for a file that has none of these or not enough, and where images need a `look`."""
    saved = load_arrays(path) if Path(path).suffix == ".npz" else {}
    known = {name: saved[name] for name in ("mu", "sigma", "settings") if name in saved}
    if not {"mu", "sigma"} <= known.keys() or look and "arr_0" in saved:
        if not look:
            raise UserError(f"{path}: --inception FILE is needed to look at images")
        parts = [look(images) for images in images_of(path, saved.get("arr_0", np.zeros(0)))]
        count = sum(len(p) for _, p in parts)
        if count < 4:
            raise UserError(f"{path}: expected 4 images or more")
        if "mu" not in known:
            warn_of_few(count)
        known = statistics(parts) | known
    with reading(path, "finite numbers in mu and sigma"):
        for name in ("mu", "sigma"):
            np.asarray_chkfinite(known[name], dtype=float)
    return known


def compare_statistics(fake, real, device="cpu"):
    """How far the statistics `fake` are from `real`: a dict of `fid` and, where features and probabilities are there,
    `is`, `precision` and `recall`. The latter two use no more real images than there are fakes: with more points a
    set's balls are smaller, and the two sets would not be measured alike. Raises ValueError where features differ in
    size."""
    row = {"fid": frechet_distance(real["mu"], real["sigma"], fake["mu"], fake["sigma"])}
    if "p" in fake:
        row["is"] = inception_score(fake["p"])
    if "features" in fake and "features" in real:
        ours = torch.from_numpy(fake["features"]).to(device)
        theirs = torch.from_numpy(real["features"]).to(device)
        some = torch.linspace(0, len(theirs) - 1, min(len(theirs), len(ours))).long()
        row["precision"], row["recall"] = precision_recall(theirs[some.to(device)], ours)
    return row


def measure(models, labels, draw, look, real, folder, batch_size=50):
    """Draw an image of each of `labels` (N,) with each of `models`, a dict of names and models, and compare them with
    the statistics `real` by what look(images) sees in them.

    draw(model, labels, indices) returns uint8 images (B, C, H, W), from the same noise for every model. The models take
    turns batch by batch, so that a busy machine slows all of them alike; images/s is the median batch's, and speed_up
    the median of the batches' ratios to the first model (both None for fewer than 5 batches). Every batch leaves its
    features in `folder`, so a measuring that was stopped goes on; the caller removes it. Returns {name: dict of plain
    numbers} and {name: statistics}."""
    batches = torch.arange(len(labels)).split(batch_size * world_size())
    report = progress("measure", len(batches), unit="batches")
    found = {name: [] for name in models}
    for number, index in enumerate(batches):
        mine = index.tensor_split(world_size())[rank()]      # each process draws its share
        for name, model in models.items():
            path = Path(folder) / f"{name}-{number}.npz"
            if not path.exists():
                begin = time.perf_counter()
                images = draw(model, labels[mine], mine.tolist())
                per_image = (time.perf_counter() - begin) / len(index)
                features, p = map(np.concatenate, zip(*gather(look(images))))
                write_file(path, lambda file: np.savez(file, features=features, p=p, seconds=per_image))
            found[name].append(load_arrays(path))
        report(number, {})
    seconds = {name: np.array([batch["seconds"] for batch in found[name]]) for name in models}      # per image
    first = next(iter(seconds.values()))
    rows, stats = {}, {}
    for name, model in models.items():
        stats[name] = statistics([(batch["features"], batch["p"]) for batch in found.pop(name)])
        rows[name] = {"depth": len(model.blocks), "parameters": sum(w.numel() for w in model.parameters()),
                      **compare_statistics(stats[name], real, next(model.parameters()).device),
                      "images_per_second": 1 / float(np.median(seconds[name])) if len(batches) >= 5 else None,
                      "speed_up": float(np.median(first / seconds[name])) if len(batches) >= 5 else None}
    return rows, stats


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 8. Data
#
# Small images are held in memory as uint8; the models see them in [-1, 1]. Large images are first made smaller by an
# autoencoder (VAE). DiT's turns 256x256 pixels into a latent of 32x32 numbers in 4 channels. The diffusion model draws
# latents, and the VAE makes pictures of them. All images are encoded once, into one file, from which batches are read
# during a run.
# ---------------------------------------------------------------------------------------------------------------------

class Dataset:
    """Images or latents with their labels.

    images: uint8 (N, C, H, W), or a sequence of N float arrays (2, C, H, W): the latents of an image and of its mirror
    image. labels (N,) int64; classes: a name for each label. `shape` is (C, H, W)."""

    def __init__(self, images, labels, classes):
        self.images = images
        self.labels = labels
        self.classes = classes
        self.latent = not torch.is_tensor(images)
        self.shape = tuple(images[0].shape[-3:])

    def read(self, index, mirrored=None):
        """Examples (B, C, H, W) of the numbers index (B,), as floats. Where mirrored (B,) is 1, latents are those of
        the mirror image. Images are never mirrored: a digit would turn into another one, or none."""
        if not self.latent:
            return to_float(self.images[index])
        sides = [0] * len(index) if mirrored is None else mirrored.tolist()
        return torch.from_numpy(np.stack([self.images[i][side] for i, side in zip(index.tolist(), sides)])).float()

    def describe(self):
        """The number of examples and a checksum of classes, labels and images, or of 1,000 latents, to recognise the
        data by."""
        count = min(1000, len(self.labels)) if self.latent else len(self.labels)
        checksum = zlib.crc32(self.labels.numpy(), zlib.crc32(str(self.classes).encode()))
        for i in np.linspace(0, len(self.labels) - 1, count).astype(int):
            checksum = zlib.crc32(np.ascontiguousarray(self.images[i]), checksum)
        return f"{len(self.labels)} {'latents' if self.latent else 'images'}, checksum {checksum:08x}"


def to_float(images):
    """uint8 to [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """[-1, 1] to uint8, rounded."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def toy_digits(n=5000, size=16, seed=0):
    """A Dataset of n grey images of the digits 0 to 9 in Pillow's own font, 80 to 95 % of the height, a little off
    centre."""
    rng = np.random.default_rng(seed)
    S = 4 * size                                 # drawn four times as large, then averaged: smooth edges
    fonts = [ImageFont.load_default(em) for em in np.linspace(0.8, 0.95, 7) * S / 0.71]      # a digit is 0.71 em high
    images = np.zeros((n, 1, size, size), np.uint8)
    for i in range(n):
        canvas = Image.new("L", (S, S))
        font = fonts[rng.integers(len(fonts))]
        left, top, right, bottom = font.getbbox(str(i % 10))
        x = (S - left - right) / 2 + rng.uniform(-0.06, 0.06) * S
        y = (S - top - bottom) / 2 + rng.uniform(-0.025, 0.025) * S
        ImageDraw.Draw(canvas).text((x, y), str(i % 10), fill=255, font=font)
        images[i, 0] = canvas.resize((size, size), Image.Resampling.BOX)
    return Dataset(torch.from_numpy(images), torch.arange(n) % 10, [str(digit) for digit in range(10)])


def center_crop(image, size):
    """A square of side `size` from the middle of a PIL image, as ADM does it: halve by box filter while the short side
    is at least twice the target, then bicubic to the target, then crop. Source: openai/guided-diffusion."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path, size=None):
    """An image file as a uint8 array (C, H, W), of one channel if its mode is grey, else of three; with a `size`,
    cropped to that square. It is turned as its EXIF data say, and what is transparent is white (but for a transparent
    colour in a PNG of 2, 4 or 16 bits, which Pillow does not scale). Raises UserError, with the file's name, where it
    is not a whole image of 8 or 16 bits."""
    with reading(path, "a whole image of 8 or 16 bits; repair or replace it"), Image.open(path) as image:
        image.getexif()                          # parsed now; odd raw bytes would raise later, so they go
        image.info.pop("exif", None)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):        # 16 bits a pixel: Pillow's own conversion would clip, not scale
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(f"pixels of mode {image.mode} have no known range")
        grey = image.mode in ("1", "L", "LA")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if grey else "RGB")
        pixels = np.asarray(center_crop(image, size) if size else image)
    return np.atleast_3d(pixels).transpose(2, 0, 1)


def files_in(folder):
    """The files in a folder and its sub-folders, sorted, hidden ones left out. Raises UserError where there is none."""
    def hidden(path):
        return any(part.startswith(".") for part in path.relative_to(folder).parts)

    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and not hidden(path))
    if not files:
        raise UserError(f"{folder}: no such folder, or no images in it")
    return files


def class_files(folder):
    """The names of the classes, sorted, and [(path, label), ...] of the files, of a folder with one sub-folder per
    class (the ImageFolder convention). Raises UserError where there is none, or one without a file, and for a file
    beside them."""
    folders = sorted(path for path in Path(folder).glob("[!.]*") if path.is_dir())
    if not folders:
        what = "no class folders" if Path(folder).is_dir() else "no such folder"
        raise UserError(f"{folder}: {what}; expected a folder with one sub-folder of images per class")
    loose = [path for path in Path(folder).glob("[!.]*") if path not in folders]
    if loose:
        raise UserError(f"{min(loose)} is in no class folder: move it into one, or away")
    files = [(file, label) for label, path in enumerate(folders) for file in files_in(path)]
    return [path.name for path in folders], files


def image_folder(folder, size):
    """A Dataset of a folder as in `class_files`: grey if every image is grey, else RGB. Raises UserError for a file
    that is not an image, with its name."""
    classes, files = class_files(folder)
    images = [read_image(path, size) for path, _ in files]
    channels = max(len(image) for image in images)
    images = np.stack([np.broadcast_to(image, (channels, size, size)) for image in images])
    return Dataset(torch.from_numpy(images), torch.tensor([label for _, label in files]), classes)


def with_classes(data, names):
    """`data` with the classes `names`, which a checkpoint has learned. Labels are matched by name, or left as they are
    where one of the two has only numbers. Raises UserError for a class that is not among them."""
    def numbered(classes):
        return classes == [str(i) for i in range(len(classes))]

    if set(data.classes) <= set(names):
        places = torch.tensor([names.index(name) for name in data.classes])
        return Dataset(data.images, places[data.labels], names)
    if numbered(data.classes) and len(data.classes) <= len(names):
        return Dataset(data.images, data.labels, names)
    if numbered(names) and len(data.classes) == len(names):
        return data
    raise UserError(f"--data has {len(data.classes)} classes, {', '.join(data.classes[:9])} ...; --ckpt has learned "
                    f"{len(names)}, {', '.join(names[:9])} ...; expected some of these, or numbers")


class NpyFiles(list):
    """A list of .npy files whose items are the arrays in them, read when they are needed. Raises UserError for one that
    has not the shape of the first one read."""
    shape = None

    def __getitem__(self, i):
        path = super().__getitem__(i)
        array = load_arrays(path)
        self.shape = self.shape or array.shape
        if array.shape != self.shape:
            raise UserError(f"{path}: an array {array.shape}; expected {self.shape}, as in the other files")
        return array


def open_latents(latents, labels, folder):
    """A Dataset of a sequence of latents (2, C, H, W) and an array of labels, with the names in classes.json if it is
    there. Raises UserError if they do not fit."""
    one = np.shape(latents[0]) if len(latents) else ()
    whole = labels.dtype.kind in "iu" and labels.min(initial=0) >= 0
    if len(one) != 4 or one[0] != 2 or one[2] != one[3] or labels.shape != (len(latents),) or not whole:
        raise UserError(f"{folder}: {len(latents)} latents {one}, labels {labels.shape} of {labels.dtype}; expected "
                        "latents (2, channels, side, side), and as many labels, whole numbers from 0")
    classes = [str(i) for i in range(labels.max() + 1)]
    if (folder / "classes.json").exists():
        with reading(folder / "classes.json", "a list of names, `classes`"):
            classes = [str(name) for name in json.loads((folder / "classes.json").read_text())["classes"]]
    if len(classes) <= labels.max():
        raise UserError(f"{folder}: a label {labels.max()}, but only {len(classes)} names in classes.json")
    return Dataset(latents, torch.from_numpy(labels.astype(np.int64)), classes)


def open_data(folder, size):
    """The Dataset in a folder: latents in `latents.npy` (N, 2, C, H, W) with `labels.npy` (N,), or in the layout of the
    public TinyFusion code, `imagenet256_features/{i}.npy` (2, C, H, W) with `imagenet256_labels/{i}.npy` (1,), paired
    by name; or else images, made squares of side `size`. Raises UserError where it is none of them, and for a label
    without features or features without a label."""
    folder = Path(folder)
    if (folder / "latents.json").exists():
        raise UserError(f"--data {folder}: not encoded to the end; run the same --encode command again")
    if (folder / "latents.npy").exists():
        return open_latents(load_arrays(folder / "latents.npy", "r"), load_arrays(folder / "labels.npy"), folder)
    if not (folder / "imagenet256_features").is_dir():
        return image_folder(folder, size)
    files = sorted((folder / "imagenet256_features").glob("*.npy"), key=lambda path: (len(path.name), path.name))
    labels = []
    for path in files:
        label = folder / "imagenet256_labels" / path.name
        with reading(label, "one label"):
            labels.append(load_arrays(label).item())
    unused = {path.name for path in (folder / "imagenet256_labels").glob("*.npy")} - {path.name for path in files}
    if unused:
        raise UserError(f"{folder}: imagenet256_labels/{min(unused)} has no file of the same name in the features")
    return open_latents(NpyFiles(files), np.array(labels), folder)


def data_batches(data, batch_size, seed, device="cpu", start=0, parts=1):
    """Endless batches (x, y), x (B, C, H, W) and y (B,), in a new order every epoch; of latents, a random half are of
    the mirror image. A step's batch depends on the seed and the step's number alone, so a run can go on from any step
    `start`. Every batch is cut into `parts` pieces per process (Chapter 9); each process gets its own, one by one."""
    N = len(data.labels)
    per_epoch = max(1, N // batch_size)
    for step in itertools.count(start):
        epoch, place = divmod(step, per_epoch)
        if step == start or place == 0:
            generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
            order = torch.randperm(N, generator=generator)
            mirrored = torch.randint(2, (N,), generator=generator)
        batch = order[place * batch_size:(place + 1) * batch_size]
        for part in range(parts):
            index = batch[part * world_size() + rank()::parts * world_size()]
            yield data.read(index, mirrored[index]).to(device), data.labels[index].to(device)


class VAE:
    """The autoencoder of latent models, by the package diffusers: images (B, 3, H, W), uint8, to latents (B, C, h, w)
    and back. name: of a model on Hugging Face, or a folder; channels: the C it must have. Raises UserError where it has
    another, or where the package or the model is missing, and loads safetensors only."""

    def __init__(self, name, device, channels=None):
        with reading(f"--vae {name}", "a fitting autoencoder in safetensors; this needs pip install diffusers"):
            from diffusers import AutoencoderKL
            net = AutoencoderKL.from_pretrained(name, use_safetensors=True, low_cpu_mem_usage=False)
            if channels not in (None, net.config.latent_channels):
                raise ValueError(f"its latents have {net.config.latent_channels} channels, not {channels}")
        self.net = net.to(device).eval()
        self.device = device
        self.scale = net.config.scaling_factor   # 0.18215: latents of about unit variance

    @torch.inference_mode()
    def encode(self, images, noise):
        """A draw from the VAE's posterior, with noise (B, C, h, w), as DiT was trained on."""
        posterior = self.net.encode(to_float(images).to(self.device)).latent_dist
        return ((posterior.mean + posterior.std * noise) * self.scale).cpu()

    @torch.inference_mode()
    def decode(self, latents):
        return torch.cat([to_uint8(self.net.decode(x / self.scale).sample).cpu() for x in latents.split(8)])


def encode_images(folder, size, vae, out, settings, batch_size=16):
    """Encode a folder as in `class_files` into `out`: `latents.npy` (N, 2, C, h, w), of every image and its mirror
    image, `labels.npy` and `classes.json`. latents.npy has its full size from the start. A counter, latents.json, says
    how many images are done, and is deleted at the end. A call with the same `settings` goes on from there. Raises
    UserError for other settings, and for a broken image, with its name."""
    classes, files = class_files(folder)
    with reading(f"--image-size {size}", "a size that the autoencoder takes"):
        latent = vae.encode(torch.zeros(1, 3, size, size, dtype=torch.uint8), 0)[0]
    names = "\n".join(f"{path.relative_to(folder)} {label}" for path, label in files).encode()
    settings = settings | {"encode": f"{len(files)} files, checksum {zlib.crc32(names):08x}"}
    out.mkdir(parents=True, exist_ok=True)
    with lock(out):
        counter = out / "latents.json"
        if (out / "latents.npy").exists() and not counter.exists():
            raise UserError(f"{out / 'latents.npy'} is there already; remove it or choose another --out")
        state = read_json(counter, "done", "settings") if counter.exists() else {"done": 0}
        if state["done"] == 0:                   # nothing is there that other settings could spoil
            state["settings"] = settings
        refuse_changes(counter, state["settings"], settings)
        write_json(counter, state)
        write_file(out / "labels.npy", lambda file: np.save(file, np.array([label for _, label in files])))
        latents = np.lib.format.open_memmap(out / "latents.npy", "r+" if state["done"] else "w+", np.float32,
                                            (len(files), 2, *latent.shape))
        with writing(out / "latents.npy"), open(out / "latents.npy", "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(file.name))     # if the disk is full, it says so now
        report = progress("encode", len(files), unit="images", first=state["done"])
        with concurrent.futures.ThreadPoolExecutor() as readers:
            for start in range(state["done"], len(files), batch_size):
                end = min(start + batch_size, len(files))
                images = list(readers.map(lambda i: read_image(files[i][0], size), range(start, end)))
                x = torch.from_numpy(np.stack([np.broadcast_to(image, (3, size, size)) for image in images]))
                pairs = torch.stack([x, x.flip(3)], 1).flatten(0, 1)         # an image and its mirror image in turn
                noise = noise_source(range(2 * start, 2 * end), latent.shape, 0, vae.device)()
                latents[start:end] = vae.encode(pairs, noise).unflatten(0, (-1, 2)).numpy()
                latents.flush()
                state["done"] = end
                write_json(counter, state)
                report(end - 1, {})
        write_json(out / "classes.json", {"classes": classes, **settings})
        counter.unlink()
    print(f"{len(files)} images of {len(classes)} classes: {out / 'latents.npy'}, labels.npy")


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 9. The training loop
#
# One loop serves the teacher, the layers, the student and the judge: AdamW, gradient clipping, and an exponential
# moving average (EMA) of the weights, from which images are drawn. A long run can be stopped, even killed, at any
# moment: now and then what the next step needs is written to a file, and the run goes on from there. The file holds no
# random state and no data: (seed, process, step) seeds a step's random numbers, and its number gives its batch. On a
# CPU such a run ends bit for bit where one that was never stopped ends.
#
# Several GPUs: torchrun starts the whole program once per GPU. Every process takes its share of the rows of every
# batch; the gradients, of weights, LoRA and logits alike, are averaged, so that all processes take the same step; and
# process 0 writes the files. `accumulate` cuts a batch into parts, one after the other, to fit a large batch on a small
# card. Given the same random numbers, the gradient is the same however a batch is cut.
# ---------------------------------------------------------------------------------------------------------------------

SAVE_EVERY = 500                                 # steps between two saves, at most; in short runs a tenth of the steps


def rank():
    """The number of this process among those that torchrun started; 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value):
    """A list of every process's `value`, arrays or plain data, in the order of their numbers."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def average(tensor):
    """Replace a tensor, in place, by its mean over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


@contextlib.contextmanager
def processes():
    """A context in which the processes that torchrun started can exchange data, and only the first one prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 and not dist.is_torchelastic_launched():
        yield
        return
    # If the first optimizer step imported this, it would keep the group alive, and its threads can crash the exit.
    import torch._dynamo
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    with contextlib.redirect_stdout(None if rank() else sys.stdout):         # print says nothing where it is None
        yield
    dist.destroy_process_group()                 # not after an error: torchrun ends the others


def pick_device(name):
    """A torch.device that is there: the named one, else the first GPU, else the CPU. Raises UserError."""
    with reading(f"--device {name}", f"cpu or cuda; this machine has {torch.cuda.device_count()} GPUs"):
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and world_size() > 1:       # every process has its own
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=device).item()
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    return device


def default_dtype(device):
    """The type in which matrix products run: bfloat16 on a GPU that has it, else float32."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def autocast(device, dtype=None):
    """A context in which matrix products run in `dtype`, or else in `default_dtype`."""
    dtype = dtype or default_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@contextlib.contextmanager
def without_tf32():
    """A context in which a GPU does not round the factors of float32 products to TF32, which has 10 bits of 23."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


def compile_blocks(model):
    """torch.compile the blocks of a model, in place: a slow start and faster steps. What was compiled before is
    forgotten, because torch keeps 8 variants of a block's code at most, and learning needs 6, for the numbers of rows
    and with or without a gradient."""
    torch.compiler.reset()
    for block in model.blocks:
        block.compile(dynamic=True)


class NonFiniteLoss(ValueError):
    """The loss or its gradient is not finite."""


class TrainingState:
    """Where a training run stands: a file that `train` writes now and then, and starts from if it is there. `step` is
    the number of steps done. The caller removes the file when the run is over. Raises UserError for a torn file."""

    def __init__(self, path):
        self.path = Path(path)
        self.step = read_checkpoint(path, "step", "trained")["step"] if self.path.exists() else 0

    def save(self, step, parts, record):
        content = {name: part.state_dict() for name, part in parts.items()} | {"step": step, "record": record}
        write_torch(self.path, content)

    def restore(self, parts, record):
        content = read_checkpoint(self.path)
        for name, part in parts.items():
            part.load_state_dict(content[name])
        if record is not None:
            record[:] = content["record"]


def seed_step(seed, step):
    """Seed torch's random numbers of one step of this process, from (seed, process, step)."""
    torch.manual_seed(int(np.random.SeedSequence([seed, rank(), step]).generate_state(1, np.uint64)[0]))


def schedule(step, steps, final_lr_ratio, warmup):
    """The factor of the learning rate: a linear rise over `warmup` steps, and a cosine from 1 to final_lr_ratio."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1, (step + 1) / (warmup + 1)) * (final_lr_ratio + (1 - final_lr_ratio) * cosine)


@torch.no_grad()
def update_ema(ema, model, step, ema_decay):
    """Move the average of the weights towards those after step `step`. The decay warms up: with a constant 0.99, the
    first step's weights would be 0.99^99 = 37 % of the average after 100 steps."""
    decay = min(ema_decay, (1 + step) / (10 + step)) if step else 0.0
    for averaged, weight in zip(ema.parameters(), model.parameters()):
        averaged.lerp_(weight, 1 - decay)
    for averaged, buffer in zip(ema.buffers(), model.buffers()):
        averaged.copy_(buffer)


def train(model, loss_fn, steps, *, params=None, lr=1e-4, final_lr_ratio=1.0, warmup=0, clip=1.0, ema_decay=None,
          accumulate=1, seed=None, on_step=lambda step, metrics: None, state=None, record=None):
    """Take `steps` steps of AdamW (no weight decay, gradients clipped to norm `clip`) on `model`, in place.

    loss_fn(step) returns the loss, a scalar, and a dict of more numbers to report; it is called `accumulate` times a
    step (the last call's numbers count), under `autocast`. params: parameters or groups of them with their own rates,
    by default all that require gradients. The rate follows `schedule`; seed, if given, is that of `seed_step`.
    on_step(step, metrics) is called after every step. state: a TrainingState to go on from and to save to, with
    `record`, a list of plain data that grows along; loss_fn must then start with the batch of step `state.step`.
    Returns the EMA of the model if ema_decay is given, else the model, in eval mode. Raises NonFiniteLoss before a step
    that would spoil the weights."""
    params = params or [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    if dist.is_initialized():
        for weight in weights:                   # all processes start with the weights of the first
            dist.broadcast(weight.data, 0)
    ema = copy.deepcopy(model) if ema_decay else None
    parts = {"trained": nn.ParameterList(weights), "optimizer": optimizer} | ({"ema": ema} if ema else {})
    first = state.step if state else 0
    if first:
        state.restore(parts, record)
    for step in range(first, steps):
        if seed is not None:
            seed_step(seed, step)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * schedule(step, steps, final_lr_ratio, warmup)
        optimizer.zero_grad()
        total = 0.0
        for _ in range(accumulate):
            with autocast(weights[0].device):
                loss, metrics = loss_fn(step)
            (loss / accumulate).backward()
            total += loss.detach() / accumulate
        for weight in weights:
            if weight.grad is None:              # of a block that no example kept: the formula's gradient is zero
                weight.grad = torch.zeros_like(weight)
            average(weight.grad)
        norm = nn.utils.clip_grad_norm_(weights, clip)
        total, norm = average(torch.stack([total, norm])).tolist()   # the only wait for a GPU here
        if not math.isfinite(total + norm):
            raise NonFiniteLoss(f"at step {step} the loss is {total} and the norm of its gradient {norm}")
        if state and step > first and step % min(SAVE_EVERY, max(1, steps // 10)) == 0:
            state.save(step, parts, record)      # weights whose loss is known to be finite
        optimizer.step()
        if ema:
            update_ema(ema, model, step, ema_decay)
        on_step(step, {"loss": total, "grad_norm": norm, "lr": optimizer.param_groups[-1]["lr"]} | metrics)
    return (ema or model).eval()


def progress(label, steps, log_file=None, unit="steps", first=0):
    """An on_step that prints "label step/steps, loss, speed, time left" every ten seconds and at the end, and appends
    lines of JSON to `log_file`, at least a hundred, or one a step where there are fewer. Their numbers are means over
    the latest steps; the speed is that since the start. first: the step at which the run starts."""
    start = time.perf_counter()
    printed = start
    recent = []                                  # the metrics since the last printed line
    every = max(1, min(100, steps // 100))

    def mean(name, metrics):
        return float(np.mean([float(step[name]) for step in metrics]))

    def on_step(step, metrics):
        nonlocal printed
        if rank() > 0:
            return
        recent.append({name: torch.as_tensor(value).detach() for name, value in metrics.items()})
        now = time.perf_counter()
        speed = (step + 1 - first) / (now - start)
        to_print = now >= printed + 10 or step + 1 == steps
        if log_file and (to_print or (step + 1) % every == 0):
            numbers = {name: mean(name, recent[-every:]) for name in metrics}
            with writing(log_file), open(log_file, "a") as file:
                file.write(json.dumps({"stage": label, "step": step + 1, **numbers, "steps_per_s": speed}) + "\n")
        if to_print:
            printed = now
            # The denoising loss too: it is only a tenth of a recovery's loss.
            losses = [f"  {name} {mean(name, recent):.4f}" for name in ("loss", "denoising") if name in metrics]
            left = (steps - step - 1) / speed
            print(f"{label:8} {step + 1}/{steps}{''.join(losses)}  {speed:.3g} {unit}/s  {left:.0f} s left",
                  file=sys.stderr)
            recent.clear()
    return on_step


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 10. Files and pictures
#
# Every result is written under another name and then renamed, so that there is a whole file or none, whenever the
# program is stopped (but log.jsonl and latents.npy are written piece by piece). Files are loaded as data, never code.
# ---------------------------------------------------------------------------------------------------------------------

class UserError(Exception):
    """A user's mistake in one line: what was wrong, what was expected, what to do. The exit status is then 2."""


@contextlib.contextmanager
def reading(path, expected):
    """A context in which every error becomes a UserError about `path`: damaged files raise many kinds."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):     # says it already, or is not about the file
        raise
    except Exception as error:
        raise UserError(f"{path}: {str(error)[:300] or type(error).__name__}; expected {expected}") from None


@contextlib.contextmanager
def writing(path):
    """A context in which a full disk, or another error of the system, becomes a UserError about `path`."""
    try:
        yield
    except OSError as error:
        words = f"cannot write {path}: {error}; when that is mended, give the same command again"
        raise UserError(words) from None


def write_file(path, write):
    """Call write(file) on a new binary file, and put it at `path` only when it is complete and on the disk. Of several
    processes, all of which must call this, the first writes while the others wait."""
    if rank() == 0:
        temporary = Path(path).with_name(f".{Path(path).name}.part")
        try:
            with writing(path):
                with open(temporary, "wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    gather(None)


def write_torch(path, content):
    """A dict as a PyTorch file, as by `write_file`. It is made in memory first, because a signal amid torch.save to a
    file can abort the process."""
    def write(file):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        file.write(buffer.getbuffer())
    write_file(path, write)


def lock(folder):
    """Keep other programs out of a folder as long as the file that is returned is open, at most as long as this process
    lives. Raises UserError where one is in it."""
    if rank() > 0:
        return None
    file = open(folder / ".lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{folder} is in use by process {file.read()}") from None
    except OSError:                              # a file system without locks
        return file
    file.truncate(0)
    print(os.getpid(), end="", file=file, flush=True)
    return file


def write_json(path, content):
    """Plain data as a JSON file, as by `write_file`."""
    write_file(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def read_json(path, *expected):
    """The dict in a JSON file. Raises UserError where it cannot be read, or lacks one of the entries `expected`."""
    with reading(path, f"a file of this program with {', '.join(expected)}; remove it or choose another --out"):
        content = json.loads(Path(path).read_text())
        return content | {name: content[name] for name in expected}


def refuse_changes(path, saved, now):
    """Raise UserError, naming the differences, where the settings `saved` in a file are not those of `now`."""
    different = [f"--{name.replace('_', '-')} {saved.get(name)} (now {value})"
                 for name, value in now.items() if saved.get(name) != value]
    if different:
        raise UserError(f"{path} was made with {', '.join(different)}, or by another version of this program: give the "
                        "same flags or choose another --out")


def read_checkpoint(path, *expected):
    """The dict in a PyTorch file, with at least the entries `expected`. It is read as data; nothing in it is run.
    Raises UserError, in one line, for a file that is torn, foreign, or a pickle that would run code."""
    if not Path(path).is_file():
        raise UserError(f"checkpoint {path}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):         # the `args` of official training runs
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception:                            # of many kinds
        raise UserError(f"checkpoint {path}: torn, not a PyTorch file, or one that holds more than weights and plain "
                        "data; nothing in it was run") from None
    if not isinstance(checkpoint, dict) or not set(expected) <= checkpoint.keys():
        raise UserError(f"checkpoint {path}: not one of this version; expected a dict with "
                        f"{', '.join(expected) or 'weights'}{'; remove it to begin anew' if expected else ''}")
    return checkpoint


def save_checkpoint(path, model, objective, sampling, classes, **more):
    """A checkpoint with all that is needed to sample from it: `ema` (the weights, under official names), `config` (the
    arguments of DiT or MAR), `objective` (ddpm, flow or mar), `sampling` (arguments of the objective's `sample`),
    `classes` (their names), and more plain data."""
    content = {"ema": model.state_dict(), "config": model.config(), "objective": objective, "sampling": sampling,
               "classes": classes, **more}
    write_torch(path, content)


def unallocated(build):
    """What build() makes, with weights that have shapes and no memory."""
    with torch.device("meta"):
        return build()


def config_of(weights):
    """The arguments of DiT or MAR that fit a state dict of official names, read off its shapes. No shape shows
    the number of heads: it is that of the model in PRESETS of the same width. Raises KeyError or ValueError where the
    weights are of neither."""
    shape = {key: tuple(weight.shape) for key, weight in weights.items()}

    def depth(name):                             # name.0, name.1 ... are blocks
        return len({key.removeprefix(name).split(".")[1] for key in weights if key.startswith(f"{name}.")})

    if "fake_latent" in weights:
        _, T, D = shape["diffusion_pos_embed_learned"]
        config = {"input_size": math.isqrt(T), "patch_size": 1,              # as in official checkpoints
                  "in_channels": shape["z_proj.weight"][1], "num_classes": shape["class_emb.weight"][0],
                  "encoder_depth": depth("encoder_blocks"), "decoder_depth": depth("decoder_blocks"),
                  "buffer_size": shape["encoder_pos_embed_learned"][1] - T,
                  "diffloss_w": shape["diffloss.net.input_proj.bias"][0],
                  "diffloss_d": depth("diffloss.net.res_blocks")}
    else:
        D, C, P, _ = shape["x_embedder.proj.weight"]
        config = {"input_size": math.isqrt(shape["pos_embed"][1]) * P, "patch_size": P, "in_channels": C,
                  "num_classes": shape["y_embedder.embedding_table.weight"][0] - 1,          # the last row is no class
                  "depth": depth("blocks"), "learn_sigma": shape["final_layer.linear.bias"][0] == 2 * C * P * P}
    for row in PRESETS.values():
        if row["network"].keywords["hidden_size"] == D:
            return config | {"hidden_size": D, "num_heads": row["network"].keywords["num_heads"]}
    raise ValueError(f"width {D} is of no model in PRESETS, so its number of heads is unknown")


def preset_name(model, objective):
    """The name in PRESETS that fits a model best: of its objective, then of its width, then of its depth. objective
    None: any. Raises ValueError for an objective that is not the network's."""
    def distance(name):
        sizes = PRESETS[name]["network"].keywords
        depth = sum(size for key, size in sizes.items() if "depth" in key)
        return sizes["hidden_size"] != model.hidden_size, depth != len(model.blocks)

    names = [name for name, row in PRESETS.items()
             if isinstance(model, row["network"].func) and objective in (None, row["objective"])]
    if not names:
        raise ValueError(f"objective {objective!r} is not one of a {type(model).__name__}")
    return min(names, key=distance)


def load_checkpoint(path, device="cpu", name=None):
    """The model of a checkpoint, in eval mode on `device`, and a dict with its `name` in PRESETS, `objective`,
    `sampling` and `classes`.

    Takes this program's checkpoints, and those of facebookresearch/DiT, of SiT, LTH14/mar and the public TinyFusion
    code: a plain state dict, or a dict with `ema` or `model_ema` (preferred) or `model`. Names may start with
    "module."; without `config` the sizes are read off the shapes. Official SiT checkpoints look like DiT's: pass
    name="SiT-XL/2". Raises UserError as `read_checkpoint` does, where weights and config disagree, and for a name that
    does not fit. Nothing is allocated before they have been compared."""
    checkpoint = read_checkpoint(path)
    weights = next((checkpoint[key] for key in ("ema", "model_ema", "model") if key in checkpoint), checkpoint)
    with reading(f"checkpoint {path}: weights and config disagree", "those of one model"):
        weights = {key.removeprefix("module."): weight.float() for key, weight in weights.items()}
        config = checkpoint["config"] if "config" in checkpoint else config_of(weights)
        if sum(size for key, size in config.items() if "depth" in key) > len(weights):
            raise ValueError("more blocks than weights")
        model = unallocated(functools.partial(MAR if "fake_latent" in weights else DiT, **config))
        model.load_state_dict(weights, assign=True)
        found = preset_name(model, checkpoint.get("objective", name and PRESETS[name]["objective"]))
    name = name or found
    row = PRESETS[name]
    width = row["network"].keywords["hidden_size"]
    if (row["objective"], width) != (PRESETS[found]["objective"], PRESETS[found]["network"].keywords["hidden_size"]):
        raise UserError(f"checkpoint {path} is a {found}, not a {name}: give that --model, or none")
    usual = {"steps": row["sample_steps"], "guidance": row["guidance"], **row["sampling"]}
    with reading(f"checkpoint {path}: `sampling` or `classes`", f"numbers, and {model.num_classes} names"):
        sampling = checkpoint.get("sampling", usual)
        classes = [str(word) for word in checkpoint.get("classes", range(model.num_classes))]
        numbers = [sampling[key] for key in sampling.keys() - {"solver", "cfg_channels"}]    # those two may be words
        if len(classes) != model.num_classes or not all(isinstance(number, (int, float)) for number in numbers):
            raise ValueError("they do not fit its model")
    return model.to(device).eval(), {"name": name, "objective": row["objective"], "sampling": sampling,
                                     "classes": classes}


def noise_source(indices, shape, seed, device="cpu"):
    """A function that returns fresh standard normal noise (B, *shape) at every call, or (B, *other) where it is given
    another shape. Image `i` of a `seed` has a random stream of its own, so it is the same image whatever the batch it
    is drawn in, on any device."""
    streams = [np.random.Generator(np.random.Philox(key=[seed, i])) for i in indices]

    def draw(*other):
        noise = np.stack([stream.standard_normal(other or tuple(shape), dtype=np.float32) for stream in streams])
        return torch.from_numpy(noise).to(device)
    return draw


def sample_images(model, labels, indices, *, diffusion, seed, sampling, decode=to_uint8):
    """Images, by default uint8 (B, C, H, W), on the CPU, of `labels` (B,), from the noise of images `indices` of
    `seed`. `sampling` is a dict of arguments of the objective's `sample`; decode makes images of what it returns."""
    device = next(model.parameters()).device
    draw = noise_source(indices, (model.in_channels, model.input_size, model.input_size), seed, device)
    return decode(diffusion.sample(model, labels.to(device), draw, **sampling)).cpu()


def fitting(word, width, otherwise):
    """A word cut, with an ellipsis, to `width` pixels of Pillow's own font, or `otherwise` where the font lacks one of
    its letters."""
    font = ImageFont.load_default(14)
    missing = bytes(font.getmask("\U0010ffff"))                              # what is drawn for an unknown letter
    if any(bytes(font.getmask(letter)) == missing for letter in word):
        word = str(otherwise)
    if font.getlength(word) <= width:
        return word
    while word and font.getlength(word + "…") > width:
        word = word[:-1]
    return word + "…"


def text(sheet, xy, words, anchor="la", size=14, fill=(40, 40, 40)):
    """Words on a PIL image, in Pillow's own font."""
    ImageDraw.Draw(sheet).text(xy, words, fill=fill, font=ImageFont.load_default(size), anchor=anchor)


def write_png(path, image):
    """A PIL image as a PNG file, as by `write_file`."""
    write_file(path, lambda file: image.save(file, format="PNG"))


def image_grid(images, columns, names):
    """A PIL image of uint8 images (N, C, H, W), row by row, small ones magnified to about 64 pixels. names: of the
    classes of all or of the first ones, pairs (name, number), written above them."""
    N, _, H, W = images.shape
    factor = max(1, 64 // H)
    width = factor * W + 2                       # with a white line around the image
    height = factor * H + 2 + 18                 # and a name above it
    grid = Image.new("RGB", (columns * width, math.ceil(N / columns) * height), "white")
    for i, image in enumerate(images):
        x, y = i % columns * width, i // columns * height
        one = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
        grid.paste(one.resize((factor * W, factor * H), Image.Resampling.NEAREST), (x + 1, y + 19))
        if i < len(names):
            text(grid, (x + width / 2, y + 15), fitting(names[i][0], width, names[i][1]), anchor="ms")
    return grid


def draw_decisions(path, history, groups, kept):
    """decisions.png: the probability of every block to be kept (dark: 1) over the steps of learning. history: a list of
    (step, probabilities (L,)), from `learn_layers`."""
    p = np.array([probabilities for _, probabilities in history]).T          # (L, points)
    heat = ImageOps.colorize(Image.fromarray((255 * p).astype(np.uint8)), (244, 246, 250), (18, 62, 130))
    left, top = 70, 50                           # corner of the heat map
    width, height = 600, 26 * len(p)
    sheet = Image.new("RGB", (left + width + 90, top + height + 40), "white")
    sheet.paste(heat.resize((width, height), Image.Resampling.NEAREST), (left, top))
    text(sheet, (left, 14), "Probability that a block is kept (dark: 1, light: 0) while the mask is learned", size=16)
    for block in range(len(p)):
        y = top + 26 * block + 13
        text(sheet, (left - 10, y), f"block {block}", anchor="rm")
        text(sheet, (left + width + 10, y), "kept" if block in kept else "dropped", anchor="lm")
    for edge in itertools.accumulate([m for _, m in as_list(groups)], initial=0):            # a line between groups
        ImageDraw.Draw(sheet).line((0, top + 26 * edge, left + width + 90, top + 26 * edge), fill=(120, 120, 120))
    steps = history[-1][0]
    points = p.shape[1]
    for step in np.linspace(0, steps, 5):        # in the middle of its column
        across = (step / steps * (points - 1) + 0.5) / points
        text(sheet, (left + across * width, top + height + 20), f"{step:g}", anchor="ms")
    text(sheet, (left - 10, top + height + 20), "step", anchor="rs")
    write_png(path, sheet)


def axes(sheet, left, top, side, points, names, logarithmic):
    """Draw the frame of a plot of points (N, 2) on a PIL image, a square with five ticks on each axis. names,
    logarithmic: one for each axis. Returns place(x, y), where a point lies in the image."""
    def scaled(point):
        return np.array([math.log(value) if log else value for value, log in zip(point, logarithmic)])

    low = np.min(points, axis=0)
    high = np.max(points, axis=0)
    digits = np.where(high < 1.04 * low, 5, 3)   # so that the labels of the ticks differ
    single = high < 1.002 * low                  # a single point has a range too
    low = scaled(np.where(single, 0.999 * low, low))
    high = scaled(np.where(single, 1.001 * high, high))
    margin = 0.05 * (high - low)

    def place(x, y):
        across, up = (scaled((x, y)) - low + margin) / (high - low + 2 * margin) * side
        return left + across, top + side - up

    ImageDraw.Draw(sheet).rectangle((left, top, left + side, top + side), outline=(200, 205, 215))
    for point in np.linspace(low, high, 5):
        values = [math.exp(value) if log else value for value, log in zip(point, logarithmic)]
        x, y = [float(f"{value:.{n}g}") for value, n in zip(values, digits)]     # a tick stands where its label says
        across, up = place(x, y)
        text(sheet, (across, top + side + 20), f"{x:g}", anchor="ms")
        text(sheet, (left - 8, up), f"{y:g}", anchor="rm")
    text(sheet, (left, top - 12), names[1], anchor="ls")
    text(sheet, (left + side / 2, top + side + 44), names[0], anchor="ms")
    return place


def draw_losses(path, log_file):
    """losses.png: the loss of every stage over its steps, from a log.jsonl; of a recovery the denoising loss."""
    curves = {}
    for line in Path(log_file).read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:                       # torn when a run was killed
            continue
        curve = curves.setdefault(row["stage"], [])
        while curve and curve[-1][0] >= row["step"]:         # from a run that was stopped or has begun again
            curve.pop()
        curve.append((row["step"], row.get("denoising", row["loss"])))
    sheet = Image.new("RGB", (430 * len(curves) + 20, 470), "white")
    for number, (stage, curve) in enumerate(curves.items()):
        names = ("step", f"{stage}: denoising loss (logarithmic)")
        place = axes(sheet, 430 * number + 70, 50, 350, curve, names, (False, True))
        ImageDraw.Draw(sheet).line([place(*point) for point in curve], fill=(18, 62, 130), width=2)
        x, y = place(*curve[-1])                 # a dot, to be seen where there is one point
        ImageDraw.Draw(sheet).ellipse((x - 2, y - 2, x + 2, y + 2), fill=(18, 62, 130))
    write_png(path, sheet)


def free_height(taken, left, right, y):
    """The height nearest to y at which words from left to right overlap none of `taken`, (left, right, height) each."""
    for shift in sorted(range(-195, 196, 13), key=abs):
        if all(right < a or b < left or abs(y + shift - height) >= 13 for a, b, height in taken):
            return y + shift
    return y


def draw_recoverability(path, dots, distance):
    """recoverability.png: the loss after pruning against the distance, FID or toy-FID, after recovery. dots: {(loss,
    FID): names} of every choice of blocks that was recovered."""
    sheet = Image.new("RGB", (780, 680), "white")
    names = ("loss right after pruning (logarithmic)", f"{distance} after recovery (logarithmic, lower is better)")
    place = axes(sheet, 90, 50, 560, list(dots), names, (True, True))
    taken = []                                   # (left, right, height) of every name
    for dot, methods in sorted(dots.items(), key=lambda dot: len(dot[1])):   # the named ones on top
        x, y = place(*dot)
        radius = 5 if methods else 3
        learned = {"learned", "no-groups"} & set(methods)
        colour = (205, 60, 20) if learned else (18, 62, 130) if methods else (170, 178, 190)
        ImageDraw.Draw(sheet).ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        if methods:
            words = ", ".join(methods)
            right = x + 8 + ImageFont.load_default(12).getlength(words)
            height = free_height(taken, x + 8, right, y - 4)
            taken.append((x + 8, right, height))
            ImageDraw.Draw(sheet).line((x, y, x + 8, height - 4), fill=colour)
            text(sheet, (x + 8, height), words, anchor="ls", size=12, fill=colour)
    write_png(path, sheet)


def print_table(header, rows):
    """Print rows of words as a table, which is one in Markdown too."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    print()
    for row in [header, ["-" * width for width in widths], *rows]:
        print("|", " | ".join(word.rjust(width) for word, width in zip(row, widths)), "|")


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 11. A run and its stages
#
# A run has one folder and one configuration, settings.json, which is written at the start; a later command with other
# settings is refused (but for some learning rates, see `claim`). Its stages are teacher, learn, recover and measure. A
# stage is finished when its file is there. To redo it, delete its file; that stage and the later ones run again.
# ---------------------------------------------------------------------------------------------------------------------

RESULTS = {"teacher": "teacher.pt", "learn": "layers.json", "recover": "student.pt", "measure": "results.json"}
# The flags in settings.json, besides --data, --image-size and --ckpt. All others only cost time or memory, or say how
# to measure.
RECIPE = ("model", "seed", "batch_size", "teacher_steps", "teacher_lr", "learn_steps", "learn_lr", "logits_lr",
          "groups", "criterion", "update", "recover_steps", "recover_lr", "kd")
RATES = {"teacher_lr": "teacher", "learn_lr": "learn", "logits_lr": "learn", "recover_lr": "recover"}
CONDITIONS = ("samples", "sample_steps", "guidance", "inception", "ref", "vae")      # of measured figures


def checksum(model):
    """Eight digits to recognise the weights of a model by."""
    value = 0
    for weight in model.state_dict().values():
        value = zlib.crc32(weight.cpu().contiguous().numpy(), value)
    return f"{value:08x}"


def named_blocks(criterion):
    """The blocks of a criterion such as "0,2,5"."""
    return [int(block) for block in criterion.split(",")]


class Run:
    """A folder with one configuration: what the stages share. Raises UserError where flags and data do not fit."""

    def __init__(self, args):
        self.args = args
        self.device = pick_device(args.device)
        size = args.image_size or (args.teacher.input_size if args.teacher else 16)
        self.data = open_data(args.data, size) if args.data else toy_digits(size=size)
        if args.teacher:
            self.data = with_classes(self.data, args.classes)
        with reading(f"size {self.data.shape[1]} of the data", "one that the model's patches divide"):
            model = args.teacher or unallocated(self.new_model)
        depth = len(model.blocks)
        if args.criterion[0].isdecimal():
            kept = named_blocks(args.criterion)
            check_kept(kept, depth)
            self.groups = len(kept), depth
        else:
            self.groups = parse_groups(args.groups, depth)
        self.diffusion = objective_of(args.objective, model)
        self.sampling = {"steps": args.sample_steps, "guidance": args.guidance, "clip_denoised": not self.data.latent,
                         **args.sampling}
        self.conditions = {name: getattr(args, name) for name in CONDITIONS}
        self.check(model)
        self.examples = fixed_examples(self.diffusion, self.data, device=self.device)    # what the criteria look at
        self.decode = VAE(args.vae, self.device, self.data.shape[0]).decode if args.vae else to_uint8
        if args.inception:
            self.judge                           # a mistake in its flags ends the run before the work
        self.settle(args.out)
        print(f"{self.data.describe()}, {self.data.shape}; {args.model} with {len(model.blocks)} blocks, "
              f"{world_size()} x {self.device}, {default_dtype(self.device)}")

    def settle(self, out):
        """Take the folder `out` for this run and its teacher. Raises UserError as `lock` and `claim` do."""
        self.out = out
        self.out.mkdir(parents=True, exist_ok=True)
        self.teacher_path = self.out / RESULTS["teacher"]
        self.locked = lock(self.out)
        self.claim()

    def new_model(self):
        """A new model for the data."""
        C, side, _ = self.data.shape
        return self.args.network(input_size=side, in_channels=C, num_classes=len(self.data.classes))

    def check(self, model):
        """Raise UserError where data, model and flags do not fit one another."""
        args, data = self.args, self.data
        expected = (model.in_channels, model.input_size, model.input_size)
        if data.shape != expected:
            raise UserError(f"--ckpt takes {expected}; --data has {data.shape} (latents are made by --encode)")
        if len(data.labels) < max(20, args.batch_size):
            raise UserError(f"{len(data.labels)} examples are too few: expected 20, and --batch-size {args.batch_size}")
        parts = world_size() * args.accumulate
        if args.batch_size % parts or self.batch_size("learn") % parts:
            raise UserError(f"--batch-size {args.batch_size} ({self.batch_size('learn')} while learning) cannot be cut "
                            f"into {parts} parts")
        if "measure" in args.stages and args.samples % world_size():
            raise UserError(f"--samples {args.samples} cannot be cut into {world_size()} parts")
        if args.criterion == "oracle":
            oracle(model, self.groups)                       # raises ValueError for groups that do not fit
        if args.compare == "all":
            every_choice(self.groups)                        # raises ValueError for too many
        last = max(list(RESULTS).index(stage) for stage in args.stages)
        anew = False                             # whether a stage will run, so that the later ones are outdated
        for stage in list(RESULTS)[:last + 1]:
            anew = anew or not (args.out / RESULTS[stage]).exists()
            if anew and stage not in args.stages:
                raise UserError(f"{args.out / RESULTS[stage]} is missing or outdated, and --stages leaves {stage} "
                                "out; add it")
        if args.objective == "ddpm":
            self.diffusion.respaced(args.sample_steps)       # raises ValueError for steps out of range
        if args.objective == "mar" and args.sample_steps > model.num_tokens:
            raise UserError(f"--sample-steps {args.sample_steps}: expected up to {model.num_tokens}, one per token")
        if args.samples < 4:
            raise UserError(f"--samples {args.samples}: expected 4 or more")
        if args.guidance != 1:
            model.y_embedder.null_labels(data.labels)        # raises ValueError where the model has none
        if args.vae and not data.latent:
            raise UserError("--vae is for latents: leave it out")
        if args.image_size and data.latent:
            raise UserError("--image-size is for images: leave it out")
        if data.latent and "measure" in args.stages and not (args.vae and args.inception and args.ref):
            raise UserError("latents are measured with --vae, --inception and --ref: give all three, or leave measure "
                            "out, by --stages teacher,learn,recover")

    def has(self, name):
        """Whether there is a file of this name, in the folder or in a branch of it."""
        return any(self.out.glob(name)) or any(self.out.glob(f"compare-*/*/{name}"))

    def claim(self):
        """Write settings.json, or raise UserError where the folder has other settings. Data and checkpoint are known by
        their content. A stage that has not begun may get another learning rate. One that has begun, and perhaps
        diverged, may get a lower one."""
        path = self.out / "settings.json"
        settings = {name: getattr(self.args, name) for name in RECIPE}
        settings["data"] = self.data.describe()
        if not self.data.latent:
            settings["image_size"] = self.data.shape[1]
        settings["ckpt"] = self.args.teacher and f"weights {checksum(self.args.teacher)}"
        if path.exists():
            saved = read_json(path, *RATES)
            for rate, stage in RATES.items():
                if not self.has(RESULTS[stage]):
                    begun = self.has(f"{stage}-state.pt")
                    saved[rate] = min(saved[rate], settings[rate]) if begun else settings[rate]
            refuse_changes(path, saved, settings)
        write_json(path, settings)

    def batch_size(self, stage):
        """Images per step, in all processes together."""
        return max(1, int(self.args.batch_size * (self.args.learn_batch if stage == "learn" else 1)))

    def training(self, stage):
        """A stage's batches, and the arguments of `train` that all stages share; both start at its saved step. Raises
        UserError where the processes find different ones."""
        steps = getattr(self.args, f"{stage}_steps")
        size = self.batch_size(stage)
        seed = self.args.seed + list(RESULTS).index(stage)
        state = TrainingState(self.out / f"{stage}-state.pt")
        if len(set(gather(state.step))) > 1:
            raise UserError(f"{state.path}: not all processes see the same file; put --out on a disk that they share")
        print(f"{stage}: from step {state.step} to {steps}, of {size} images each; "
              f"{steps * size / len(self.data.labels):.1f} epochs in all")
        torch.manual_seed(seed)
        batches = data_batches(self.data, size, seed, self.device, state.step, self.args.accumulate)
        return batches, {"steps": steps, "seed": seed, "state": state, "accumulate": self.args.accumulate,
                         "on_step": progress(stage, steps, self.out / "log.jsonl", first=state.step)}

    def compiled(self, model):
        """The model, its blocks compiled if --compile says so."""
        if self.args.compile:
            compile_blocks(model)
        return model

    def load(self, path):
        """The model of a checkpoint, in eval mode."""
        return load_checkpoint(path, self.device)[0]

    def save(self, path, model, **more):
        """A stage's checkpoint."""
        save_checkpoint(path, model, self.args.objective, self.sampling, self.data.classes, **more)

    def draw(self, model, labels, indices):
        """Images of `labels` (B,), uint8 (B, C, H, W), from the noise of the images `indices`."""
        return sample_images(model, labels, indices, diffusion=self.diffusion, seed=self.args.seed,
                             sampling=self.sampling, decode=self.decode)

    def draw_samples(self, path, models, real=False):
        """Draw 20 images of each of `models`, {title: model}, from the same noise, and write them as a picture, below
        `real` ones if so."""
        by_class = self.data.labels.argsort(stable=True)
        shown = by_class[torch.linspace(0, len(by_class) - 1, 20).long()]
        labels = self.data.labels[shown]
        rows = [("real images", self.decode(self.data.read(shown).to(self.device)).cpu())] if real else []
        rows += [(title, self.draw(model, labels, range(20))) for title, model in models.items()]
        names = [(self.data.classes[y], y) for y in labels.tolist()]
        grid = image_grid(torch.cat([images for _, images in rows]), len(names), names)
        sheet = Image.new("RGB", (190 + grid.width, grid.height), "white")
        sheet.paste(grid, (190, 0))
        for i, (title, _) in enumerate(rows):
            text(sheet, (180, (i + 0.5) * grid.height / len(rows) + 9), title, anchor="rm")  # 9: below the names
        write_png(path, sheet)

    def kept(self):
        """The blocks that the learning stage has chosen."""
        return read_json(self.out / RESULTS["learn"], "kept")["kept"]

    @functools.cached_property
    def judge(self):
        """What models are measured by: look(images), the statistics of real images, and the accuracy of a toy judge."""
        if self.args.inception:
            look = load_inception(self.args.inception, self.device)
            accuracy = None
        else:
            look, accuracy = train_judge(self.data, self.device)
        if self.args.ref:
            real = statistics_of(self.args.ref, look)
            features, _ = look(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
            expected = features.shape[1:]
            if real["mu"].shape != expected or real["sigma"].shape != 2 * expected:
                raise UserError(f"--ref {self.args.ref}: mu {real['mu'].shape}, sigma {real['sigma'].shape}; expected "
                                f"{expected}, {2 * expected}, as the features of --inception")
            return look, real, accuracy
        return look, statistics([look(images) for images in self.data.images.split(256)]), accuracy

    def changed(self, **flags):
        """A run with some flags changed, which shares data and judge with this one."""
        self.judge                               # trained once, for all
        other = copy.copy(self)
        other.args = argparse.Namespace(**(vars(self.args) | flags))
        return other

    def with_teacher(self, number):
        """A run with another teacher, of the seed `number` later, in a sub-folder."""
        other = self.changed(seed=self.args.seed + number)
        other.settle(self.out / f"teacher-{number}")
        return other

    def branch(self, criterion, seed):
        """A run with the same teacher and another criterion and seed, in a sub-folder. The criterion
        "no-groups" is learning without groups."""
        other = self.changed(criterion="learned" if criterion == "no-groups" else criterion, seed=seed)
        if criterion == "no-groups":
            other.groups = tuple(map(sum, zip(*as_list(self.groups))))       # as many blocks, of all
        other.out = self.out / f"compare-{checksum(self.load(self.teacher_path))}" / f"{criterion}-{seed}"
        other.out.mkdir(parents=True, exist_ok=True)
        return other


def stage_teacher(run, path):
    """Train the teacher from scratch, or take that of --ckpt. halfway.png shows what it draws when half of its training
    is over (unless that takes a VAE which is not given)."""
    args = run.args
    if args.teacher:
        run.save(path, args.teacher)
        return
    batches, loop = run.training("teacher")
    report = loop.pop("on_step")
    model = run.compiled(run.new_model().to(run.device))
    if isinstance(model, DiT):
        nn.init.normal_(model.y_embedder.embedding_table.weight, std=args.label_std)

    def loss(step):
        x0, y = next(batches)
        terms = run.diffusion.training_losses(model, x0, run.diffusion.sample_t(len(x0), run.device), y)
        return terms["loss"].mean(), {"mse": terms["mse"].mean()}

    def on_step(step, metrics):
        report(step, metrics)
        if step + 1 == args.teacher_steps // 2 and (args.vae or not run.data.latent):
            run.draw_samples(run.out / "halfway.png", {f"teacher, step {step + 1}": model.eval()})
            model.train()

    run.save(path, train(model, loss, lr=args.teacher_lr, final_lr_ratio=0.0, warmup=min(100, args.teacher_steps // 10),
                         ema_decay=args.ema_decay, on_step=on_step, **loop))


def stage_learn(run, path):
    """Choose the blocks of the teacher to keep: learn them, or take those of a criterion of Chapter 12, or those named.
    Learning writes decisions.png too."""
    args = run.args
    teacher = load_checkpoint(run.teacher_path)[0]           # on the CPU; a GPU needs only the copy that learns
    result = {}
    if args.criterion == "learned":
        batches, loop = run.training("learn")
        sampler, history = learn_layers(teacher, masked_denoising(run.diffusion, batches), run.groups, lr=args.learn_lr,
                                        update=args.update, logits_lr=args.logits_lr,
                                        prepare=lambda copy: run.compiled(copy.to(run.device)), **loop)
        kept = sampler.kept()
        draw_decisions(run.out / "decisions.png", history, run.groups, kept)
        result = {"confidence": sampler.confidence().tolist(), "history": history}
    elif args.criterion in CRITERIA:
        torch.manual_seed(args.seed + 1)
        kept = CRITERIA[args.criterion](teacher.to(run.device), run.groups, run.diffusion, run.examples)
    else:
        kept = named_blocks(args.criterion)
    write_json(path, {"kept": kept, **result})
    print(f"kept blocks {kept} of {len(teacher.blocks)}")


def stage_recover(run, path):
    """Prune the teacher and fine-tune the student with its help."""
    args = run.args
    kept = run.kept()
    teacher = run.compiled(run.load(run.teacher_path))
    student = run.compiled(prune(teacher, kept))
    batches, loop = run.training("recover")
    cuts = itertools.accumulate(map(len, blocks_of(teacher)))                # where encoder and decoder end
    pairs = match_blocks(run.groups, kept, cuts)
    student = recover(student, teacher, run.diffusion, batches, pairs, kd=args.kd, beta=args.beta, lr=args.recover_lr,
                      warmup=min(100, args.recover_steps // 10), ema_decay=args.ema_decay, **loop)
    run.save(path, student, kept=kept)


def stage_measure(run, path):
    """Compare teacher, pruned model and student: results.json and samples.png. A comparison needs the student alone."""
    data = run.data
    models = {"student": run.load(run.out / RESULTS["recover"])}
    if not run.args.compare:
        teacher = run.load(run.teacher_path)
        models = {"teacher": teacher, "pruned": prune(teacher, run.kept())} | models
    labels = data.labels.sort().values[torch.linspace(0, len(data.labels) - 1, run.args.samples).long()]
    look, real, accuracy = run.judge
    conditions = zlib.crc32(str((run.conditions | {"ref": None}, world_size())).encode())
    folder = run.out / f"measure-{conditions:08x}-{checksum(models['student'])}"
    folder.mkdir(exist_ok=True)
    rows, stats = measure(models, labels, run.draw, look, real, folder)
    for name, model in models.items():
        rows[name]["loss"] = calibration_loss(model, run.diffusion, run.examples)
        if accuracy is not None:
            rows[name]["accuracy"] = float((stats[name]["p"].argmax(1) == labels.numpy()).mean())

    run.draw_samples(run.out / "samples.png", {f"{name}, {len(model.blocks)} blocks": model
                                               for name, model in models.items()}, real=True)
    write_json(path, {"rows": rows, "judge_accuracy": accuracy, "conditions": run.conditions})
    shutil.rmtree(folder, ignore_errors=True)


STAGES = {"teacher": stage_teacher, "learn": stage_learn, "recover": stage_recover, "measure": stage_measure}


def run_stage(run, stage):
    """Run a stage unless its file is there."""
    path = run.out / RESULTS[stage]
    state = run.out / f"{stage}-state.pt"
    finished = path.exists()
    if finished and stage == "measure":
        finished = read_json(path, "conditions")["conditions"] == run.conditions
    if gather(finished)[0]:                      # every process looks before one of them writes
        print(f"{stage}: {path} is there and is used")
    else:
        for later in list(RESULTS)[list(RESULTS).index(stage) + 1:]:         # what depends on this stage is outdated
            (run.out / RESULTS[later]).unlink(missing_ok=True)
            (run.out / f"{later}-state.pt").unlink(missing_ok=True)
        try:
            STAGES[stage](run, path)
            if (run.out / "log.jsonl").exists():
                draw_losses(run.out / "losses.png", run.out / "log.jsonl")
        except NonFiniteLoss as error:
            rates = [f"--{rate.replace('_', '-')}" for rate, its_stage in RATES.items() if its_stage == stage]
            lower = f"a lower {' or '.join(rates)}"
            advice = f"the same command with {lower} goes on from step {TrainingState(state).step}"
            if run.args.teachers > 1 or run.args.compare and stage != "teacher":         # several have the same rates
                advice = f"give {lower} and another --out"
            raise NonFiniteLoss(f"{stage}: {error}; {advice}") from None
    state.unlink(missing_ok=True)


def run_stages(run):
    """Run the stages that are asked for and not finished, in order, and print the results."""
    start = time.perf_counter()
    last = max(list(RESULTS).index(stage) for stage in run.args.stages)
    for stage in list(RESULTS)[:last + 1]:
        run_stage(run, stage)
    if "measure" in run.args.stages:
        print_results(read_json(run.out / RESULTS["measure"], "rows", "judge_accuracy", "conditions"))
    print(f"\n{time.perf_counter() - start:.0f} s; results in {run.out}/")


def print_results(results):
    """Print the content of results.json as a table, with the conditions of its figures."""
    toy = results["judge_accuracy"] is not None
    names = {"fid": "toy-FID" if toy else "FID", "is": "IS", "images_per_second": "images/s", "speed_up": "speed-up"}

    def words(value):
        return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"

    rows = [[name, *map(words, row.values())] for name, row in results["rows"].items()]
    print_table(["model", *(names.get(key, key) for key in results["rows"]["student"])], rows)
    print("\n" + ", ".join(f"{name} {value}" for name, value in results["conditions"].items() if value is not None))
    if toy:
        print("Measured by a small classifier trained on this data: a toy-FID is no FID.")
    else:
        warn_of_few(results["conditions"]["samples"])


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 12. The laboratory: does learning beat the rules?
#
# Older methods drop the blocks that hurt least *now*. The paper's claim (its Table 3 and Figure 5): the loss right
# after pruning does not predict how good a model will be after fine-tuning, its recoverability. This chapter lets you
# check that. First come the criteria that learning is compared with, each a function of one shape:
#
#        kept = criterion(model, groups, diffusion, examples)
#
# Then `compare` recovers what they choose with one budget, the same data, noise and seeds. Recover without a teacher
# (--kd none), as in the paper's Table 3: a teacher would make up for a bad choice.
# ---------------------------------------------------------------------------------------------------------------------

def fixed_examples(diffusion, data, n=512, seed=0, device="cpu", batch_size=128):
    """Batches (x0, y, t, noise) of n examples in all (fewer where there are fewer images), the same at every call, on
    which models can be compared without training them. x0 (B, C, H, W), y (B,), t and noise as for `losses`."""
    chosen = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))[:n]
    batches = []
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        for index in chosen.split(batch_size):
            x0 = data.read(index).to(device)
            t = diffusion.sample_t(len(x0), device)
            batches.append((x0, data.labels[index].to(device), t, noise_for(x0, t)))
    return batches


@torch.no_grad()
def calibration_loss(model, diffusion, examples, kept=None):
    """Mean training loss of a model, in eval mode, on `fixed_examples`: a float. kept: run only these blocks."""
    losses = []
    for x0, y, t, noise in examples:
        mask = None
        if kept is not None:
            mask = torch.zeros(len(x0), len(model.blocks), device=x0.device)
            mask[:, list(kept)] = 1
        losses.append(diffusion.training_losses(functools.partial(model, mask=mask), x0, t, y, noise)["loss"])
    return torch.cat(losses).mean().item()


def block_scores(model, diffusion, examples, score):
    """Every block's mean score, (L,). score(x, out) makes of a block's input and output (B, T, D) numbers (B,)."""
    found = {block: [] for block in model.blocks}
    hooks = [block.register_forward_hook(lambda block, args, out: found[block].append(score(args[0], out)))
             for block in model.blocks]
    calibration_loss(model, diffusion, examples)
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(scores).mean() for scores in found.values()])


def as_list(groups):
    """Groups as a list; a bare (N, L), which means no groups, counts as one large group."""
    return groups if isinstance(groups, list) else [groups]


def keep_highest(scores, groups):
    """As many blocks as the groups keep in all, those of the highest scores (L,), ascending. The three
    criteria below rank all blocks together, so a group may keep more than its N, or none."""
    count = sum(n for n, _ in as_list(groups))
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


def shortgpt(model, groups, diffusion, examples):
    """Block influence: drop the blocks whose output points where their input did (highest mean cosine similarity). The
    last block always stays. Source: ShortGPT, arXiv:2403.03853."""
    scores = -block_scores(model, diffusion, examples, lambda x, out: F.cosine_similarity(x, out, dim=-1).mean(1))
    scores[-1] = math.inf
    return keep_highest(scores, groups)


def flux_lite(model, groups, diffusion, examples):
    """Drop the blocks with the smallest mean squared difference of input and output. Source: Flux.1 Lite."""
    return keep_highest(block_scores(model, diffusion, examples, lambda x, out: mean_flat((out - x) ** 2)), groups)


def sensitivity(model, groups, diffusion, examples):
    """Drop the blocks whose removal, each alone, raises the loss least."""
    blocks = range(len(model.blocks))
    losses = [calibration_loss(model, diffusion, examples, [j for j in blocks if j != i]) for i in blocks]
    return keep_highest(torch.tensor(losses), groups)


def oracle(model, groups, diffusion=None, examples=None):
    """A rule without data: of every pair of blocks keep the first in the first half of the model and the last in the
    second, so that both ends stay. Raises ValueError unless half of an even number of blocks is to be kept. Source:
    BK-SDM, arXiv:2305.15798."""
    depth = len(model.blocks)
    count = sum(n for n, _ in as_list(groups))
    if depth != 2 * count:
        raise ValueError(f"the oracle keeps one block of every pair, not {count} of {depth}")
    return [i if i < depth / 2 else i + 1 for i in range(0, depth, 2)]


def random_choice(model, groups, diffusion=None, examples=None):
    """One candidate of every group, all equally likely, by torch's random numbers."""
    return make_sampler(groups)(1)[0].nonzero().flatten().tolist()


def random_search(model, groups, diffusion, examples, place, tries=64):
    """Of the different ones among `tries` random choices, that at `place` in the order of loss: 0 lowest, 1 highest."""
    choices = {tuple(random_choice(model, groups)) for _ in range(tries)}
    ranked = sorted(choices, key=lambda kept: (calibration_loss(model, diffusion, examples, kept), kept))
    return list(ranked[round(place * (len(ranked) - 1))])


CRITERIA = {
    "shortgpt": shortgpt, "flux-lite": flux_lite, "sensitivity": sensitivity, "oracle": oracle, "random": random_choice,
    "random-lowest": functools.partial(random_search, place=0.0),
    "random-median": functools.partial(random_search, place=0.5),
    "random-highest": functools.partial(random_search, place=1.0),
}


def every_choice(groups):
    """All choices of blocks that the groups allow, as lists of block numbers. Raises ValueError for more than 1,000."""
    groups = as_list(groups)
    if math.prod(math.comb(m, n) for n, m in groups) > 1000:
        raise ValueError("these groups allow more than 1,000 choices of blocks: too many to recover")
    starts = itertools.accumulate([m for _, m in groups], initial=0)
    parts = [itertools.combinations(range(start, start + m), n) for start, (n, m) in zip(starts, groups)]
    return [list(itertools.chain(*choice)) for choice in itertools.product(*parts)]


def spread(values, digits):
    """Numbers in words: their mean and, of several, their standard deviation."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else " (1 seed)"
    return f"{np.mean(values):.{digits}f}{deviation}"


def outcome(run):
    """Run what is missing of a `Run.branch`. Returns the kept blocks, the loss right after pruning, and the loss and
    the FID or toy-FID after recovery."""
    for stage in ("learn", "recover", "measure"):
        run_stage(run, stage)
    pruned = calibration_loss(run.load(run.teacher_path), run.diffusion, run.examples, run.kept())
    row = read_json(run.out / RESULTS["measure"], "rows")["rows"]["student"]
    return run.kept(), pruned, row["loss"], row["fid"]


def compare(runs, every_mask=False, seeds=(0, 1, 2)):
    """The paper's Table 3 in miniature: what learning chooses, in groups and without, and what the criteria choose,
    recovered with every seed. runs: Runs (Chapter 11), mostly one, each with a teacher of its own; means and spreads
    are over teachers and seeds. Each recovery is a run of its own in a sub-folder, so a comparison that was stopped
    goes on. With `every_mask`, all choices that the groups allow are recovered too, and the better ones are counted.
    Writes recoverability.png and compare.json into the folder of the first run; the latter has all figures, of the
    first teacher's seeds, then of the next one's."""
    masks = [",".join(map(str, kept)) for kept in every_choice(runs[0].groups)] if every_mask else []
    choices = ["learned", "no-groups", *CRITERIA, *masks]
    report = progress("compare", len(choices), unit="choices")
    runs[0].judge                                # which says how good it is
    found = {}                                   # {name: what `outcome` returns, each for all teachers and seeds}
    for number, name in enumerate(choices):
        try:
            with contextlib.redirect_stdout(None):           # the stages are not to print
                found[name] = list(zip(*[outcome(run.branch(name, seed)) for run in runs for seed in seeds]))
        except ValueError as error:              # the oracle does not fit the groups, or a recovery diverged
            print(f"{name} is left out: {error}")
        report(number, {})

    masks = [mask for mask in masks if mask in found]
    fids = {name: np.mean(fid) for name, (_, _, _, fid) in found.items()}
    dots = {}                                    # methods that choose alike share a dot
    rows = []
    for name, (kept, pruned, recovered, fid) in found.items():
        dot = dots.setdefault((np.mean(pruned), fids[name]), [])
        if name not in masks:
            dot.append(name)
            better = sum(fids[mask] < fids[name] for mask in masks)
            lead = ["-", "-"]
            if "no-groups" in found:             # the difference, seed by seed
                _, _, free_recovered, free_fid = found["no-groups"]
                lead = [spread(np.subtract(free_recovered, recovered), 4), spread(np.subtract(free_fid, fid), 1)]
            rows.append([name, " ".join(map(str, kept[0])), spread(pruned, 3), spread(recovered, 4), spread(fid, 1),
                         *lead, f"{better} of {len(masks)}" if masks else "-"])
    columns = ("kept", "loss_after_pruning", "loss_after_recovery", "fid")
    distance = "FID" if runs[0].args.inception else "toy-FID"
    write_json(runs[0].out / "compare.json", {name: dict(zip(columns, values)) for name, values in found.items()})
    print_table(["method", "kept blocks (first seed)", "loss after pruning", "loss after recovery",
                 f"{distance} after recovery", "no-groups minus it: loss", distance, "better masks"], rows)
    if runs[0].args.inception:
        warn_of_few(runs[0].args.samples)
    if masks:
        import scipy.stats                       # here, because it takes a second
        losses = [np.mean(found[mask][1]) for mask in masks]
        correlation = scipy.stats.spearmanr(losses, [fids[mask] for mask in masks]).statistic
        print(f"\nSpearman's correlation of the loss after pruning with {distance}, over {len(masks)} masks: "
              f"{correlation:.2f}")
    if dots:
        draw_recoverability(runs[0].out / "recoverability.png", dots, distance)


# ---------------------------------------------------------------------------------------------------------------------
# Chapter 13. The command line
#
# Most defaults come from the model's row in PRESETS (Chapter 6). By default the four stages run. --compare trains the
# teacher if need be, and then goes to the laboratory instead. --encode and --fid stand alone.
# ---------------------------------------------------------------------------------------------------------------------

def parse_groups(pattern, depth):
    """The groups [(N, M), ...] that "1:2" (repeated to fill the depth) or "2:4,3:4,..." (one after another) means; for
    "14", to keep 14 of all blocks, the pair (14, depth). Raises ValueError, with the reason, where it is not such a
    pattern or does not fit `depth` blocks."""
    if pattern.isdecimal():
        TopNSampler(int(pattern), depth)         # raises ValueError
        return int(pattern), depth
    if not re.fullmatch(r"\d+:\d+(,\d+:\d+)*", pattern):
        raise ValueError(f"groups {pattern!r}: not a list of N:M; write 1:2, or one N:M per group as in 2:4,3:4")
    groups = [tuple(map(int, part.split(":"))) for part in pattern.split(",")]
    for n, m in groups:
        check_group(n, m)
    if len(groups) == 1:
        groups = groups * (depth // groups[0][1])
    if sum(m for _, m in groups) != depth:
        raise ValueError(f"groups {pattern!r} do not fill a depth of {depth}; one N:M is repeated, a list is not; or "
                         "give one number, of the blocks to keep")
    return groups


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose numbers are checked."""

    def error(self, message):
        raise UserError(message)

    def parse_args(self, argv=None):
        """The flags as a namespace. Raises UserError for numbers that are not positive (some, as --seed, may be 0)."""
        args = super().parse_args(argv)
        for name, value in vars(args).items():
            zero = name in ("seed", "guidance", "eta", "temperature")
            if type(value) in (int, float) and not (0 < value < 1e9 or value == 0 and zero):
                least = "from" if zero else "above"
                raise UserError(f"--{name.replace('_', '-')} {value}: expected a number {least} 0 up to a billion")
        return args


def make_parser(preset):
    """The flags, with the defaults of a row of PRESETS."""
    parser = Parser(
        usage="tinyfusion.py [flags]", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a diffusion transformer, learn which layers to keep, prune it, recover it and measure it.",
        epilog="""examples:
  python tinyfusion.py                                drawn digits, a few minutes on a laptop, into runs/toy
  python tinyfusion.py --data FOLDER --model SiT-toy  the same on your images, with flow matching
  python tinyfusion.py --model DiT-XL/2 --help        the defaults of another model""")
    add = parser.add_argument_group("model and data").add_argument
    add("--model", metavar="NAME", choices=PRESETS, help=f"one of {', '.join(PRESETS)}")
    add("--ckpt", metavar="FILE", help="start from this teacher, official or ours; SiT-XL/2 needs --model too")
    add("--data", metavar="DIR", help="images, one sub-folder per class, or latents (without it: drawn digits)")
    add("--image-size", type=int, metavar="N", help="side of the images (that of --ckpt, else 16)")
    add("--out", metavar="DIR", help="folder of the results, and of a stopped run to go on with (runs/NAME)")
    add("--stages", default=",".join(RESULTS), metavar="LIST", help="the stages to run (%(default)s)")
    add("--teacher-steps", type=int, metavar="N", help="training steps (batches) of a new teacher (%(default)s)")
    add("--teacher-lr", type=float, metavar="X", help="its learning rate (%(default)s)")
    add = parser.add_argument_group("learning which blocks to keep").add_argument
    add("--groups", default="1:2", metavar="N:M", help="N of every M blocks; 2:4,3:4,...; or N, of all (%(default)s)")
    add("--criterion", default="learned", help=f"learned, blocks as in 0,2,5, {', '.join(CRITERIA)} (%(default)s)")
    add("--learn-steps", type=int, metavar="N", help="steps of learning (%(default)s)")
    add("--logits-lr", type=float, metavar="X", help="learning rate of the mask's logits (%(default)s)")
    add("--update", default="lora", choices=("lora", "full", "frozen"), help="what trains with the mask (%(default)s)")
    add("--learn-lr", type=float, metavar="X", help="learning rate of that update (%(default)s)")
    add = parser.add_argument_group("recovery").add_argument
    add("--recover-steps", type=int, metavar="N", help="fine-tuning steps of the student (%(default)s)")
    add("--recover-lr", type=float, metavar="X", help="its learning rate (%(default)s)")
    add("--kd", default="masked", choices=KD_MODES, help="distillation: of hidden states without outliers (masked) or "
        "with (feature), of outputs alone (logits), none (%(default)s)")
    add = parser.add_argument_group("measuring").add_argument
    add("--samples", type=int, metavar="N", help="images drawn from each model (%(default)s)")
    add("--sample-steps", type=int, metavar="N", help="sampling steps per image (%(default)s)")
    add("--guidance", type=float, metavar="X", help="guidance scale, 1 is without (%(default)s)")
    add("--vae", metavar="NAME", help="autoencoder of latents, on Hugging Face or a folder (needs diffusers)")
    add("--inception", metavar="FILE", help="measure FID by this TorchScript network instead of toy-FID")
    add("--ref", metavar="PATH", help="what FID compares with: a folder of images, or .npz with arr_0 or mu and sigma")
    add = parser.add_argument_group("machine").add_argument
    add("--seed", type=int, default=0, metavar="N", help="seed of everything random (%(default)s)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (the first GPU if there is one)")
    add("--batch-size", type=int, metavar="N", help="images per step, all processes together (%(default)s)")
    add("--accumulate", type=int, default=1, metavar="N", help="cut batches into N parts to save memory (%(default)s)")
    add("--compile", action="store_true", help="torch.compile the blocks: a slow start, faster steps")
    add = parser.add_argument_group("instead of a run").add_argument
    add("--compare", choices=("criteria", "all"), help="compare learning with the criteria, or with all masks too")
    add("--teachers", type=int, default=1, metavar="N", help="compare with N teachers, of N seeds (%(default)s)")
    add("--encode", metavar="DIR", help="encode a folder of images (--image-size 256) with --vae into latents in --out")
    add("--fid", metavar="PATH", help="only compare these images (a folder or .npz) with --ref")
    parser.set_defaults(**preset)
    return parser


def refuse_unread(args, argv):
    """Raise UserError for a flag in argv that would do nothing beside the others."""
    every = {f"--{name.replace('_', '-')}" for name in vars(args)}
    given = every & {word.split("=")[0] for word in argv}
    for applies, what, unread in (
            (args.encode, "--encode", every - {"--encode", "--vae", "--image-size", "--out", "--device"}),
            (args.fid, "--fid", every - {"--fid", "--ref", "--inception", "--device"}),
            (args.compare, "--compare", {"--stages", "--criterion"}),
            (not args.compare, "a run without --compare", {"--teachers"}),
            (args.ckpt, "--ckpt", {"--teacher-steps", "--teacher-lr", "--teachers"}),
            (args.criterion != "learned", "--criterion", {"--learn-steps", "--learn-lr", "--logits-lr", "--update"}),
            (args.criterion[0].isdecimal(), "--criterion of blocks", {"--groups"}),
            (args.update == "frozen", "--update frozen", {"--learn-lr"}),
            (args.stages == ["measure"], "--stages measure", {"--compile", "--accumulate"}),
            ("measure" not in args.stages, "--stages without measure", {"--samples", "--inception", "--ref"}),
            (not {"teacher", "measure"} & {*args.stages}, "--stages without teacher and measure", {"--vae"}),
            (not args.inception and not args.fid, "toy-FID", {"--ref"})):
        if applies and given & unread:
            raise UserError(f"{what} does not use {', '.join(sorted(given & unread))}: leave it out")


def parse_args(argv=None):
    """Flags as a namespace, with the row of PRESETS, `teacher` (the model of --ckpt) and `classes` (their names).
    Raises UserError for flags that do not go together."""
    argv = sys.argv[1:] if argv is None else argv
    # The model comes first: it gives the other flags their defaults, which --help shows.
    words = [word for word in argv if word not in ("-h", "--help")]
    given, _ = make_parser(PRESETS["toy"]).parse_known_args(words)
    teacher = None
    content = {"name": given.model or "toy", "classes": None}
    if given.ckpt:
        teacher, content = load_checkpoint(given.ckpt, name=given.model)
    args = make_parser(PRESETS[content["name"]]).parse_args(argv)
    args.model = content["name"]
    args.stages = list(RESULTS) if args.compare else args.stages.split(",")
    if not set(args.stages) <= set(RESULTS):
        raise UserError(f"--stages {','.join(args.stages)}: expected some of {','.join(RESULTS)}")
    if args.criterion not in ("learned", *CRITERIA) and not re.fullmatch(r"\d+(,\d+)*", args.criterion):
        raise UserError(f"--criterion {args.criterion}: expected learned, {', '.join(CRITERIA)}, or blocks as in 0,2,5")
    refuse_unread(args, argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (args.compare or args.encode or args.fid):
        raise UserError("--compare, --encode and --fid run in one process, without torchrun")
    if args.encode and not (args.vae and args.out):
        raise UserError("--encode goes with --vae NAME and --out, the folder to write to: ImageNet takes 42 GB")
    if args.fid and not args.ref:
        raise UserError("--fid goes with --ref")
    args.teacher = teacher
    args.classes = content["classes"]
    name = Path(args.data).resolve().name if args.data else args.model.replace("/", "-")
    args.out = Path(args.out or f"runs/{name}")
    source = args.data or args.encode
    if source and args.out.resolve().is_relative_to(Path(source).resolve()):
        raise UserError(f"--out {args.out} lies in {source}, where images are looked for: choose another --out")
    return args


def run_fid(args):
    """Compare two sets of images."""
    device = pick_device(args.device)
    look = load_inception(args.inception, device) if args.inception else None
    fake = statistics_of(args.fid, look)
    row = compare_statistics(fake, statistics_of(args.ref, look), device)
    print(", ".join(f"{name.upper() if len(name) < 4 else name} {value:.4g}" for name, value in row.items()))
    count = f"{len(fake['p'])} samples" if "p" in fake else "statistics of samples"
    print(f"{args.fid}: {count}, drawn with {fake.get('settings', 'unknown settings')};\n"
          f"against {args.ref}; features of {args.inception or 'the two files'}")


def guarded(prog, body):
    """Run body(). A user's mistake, full disk or memory, or Ctrl-C is one line. Returns the exit status: 0, 2, 130."""
    try:
        body()
        return 0
    except (MemoryError, RuntimeError) as error:
        if "No working C++ compiler" in str(error):
            words = "--compile needs a C++ compiler: install one, such as g++, or leave the flag out"
        elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            advice = "a smaller --batch-size" if prog == "sample.py" else "in training, --accumulate 2"
            words = f"out of memory; {advice} takes less"
        else:
            raise
    except (UserError, ValueError, OSError) as error:        # a ValueError too says what is wrong with input
        words = " ".join(str(error).split())
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped; all files are whole; a run of stages goes on with the same command", file=sys.stderr)
        return 130
    print(f"{prog}: {words}", file=sys.stderr)
    return 2


def run(args):
    """Do what the flags say."""
    with processes():
        if args.encode:
            size = args.image_size or 256
            encode_images(args.encode, size, VAE(args.vae, pick_device(args.device)), args.out,
                          {"vae": args.vae, "image_size": size})
        elif args.fid:
            run_fid(args)
        elif args.compare:
            first = Run(args)
            runs = [first, *[first.with_teacher(number) for number in range(1, args.teachers)]]
            for each in runs:
                run_stage(each, "teacher")
            compare(runs, every_mask=args.compare == "all")
        else:
            run_stages(Run(args))


def main(argv=None):
    """The program; returns its exit status."""
    return guarded("tinyfusion.py", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)                # ends as Ctrl-C does
    sys.exit(main())
