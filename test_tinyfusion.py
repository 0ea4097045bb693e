"""The claims of tinyfusion.py, tested. Every test's name is a sentence that is true of the method or the program.

python test_tinyfusion.py            all of them
python test_tinyfusion.py Heart      one class;  -v shows the sentences
python test_tinyfusion.py --bench    no tests: how fast it is, against the plain versions that the tests compare with
"""

import argparse
import ast
import contextlib
import copy
import functools
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint

import sample
import tinyfusion as tf

HERE = Path(__file__).resolve().parent
SMALL = {"input_size": 8, "in_channels": 1, "hidden_size": 16, "num_heads": 2, "num_classes": 3}
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
close = torch.testing.assert_close


def lively(model, std=0.2):
    """The model with weights that do something (the official start is the zero function)."""
    torch.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=std)
    return model.eval()


def tiny_dit(depth=4, **more):
    """A DiT that a test can afford."""
    return lively(tf.DiT(**SMALL | {"patch_size": 4, "depth": depth} | more))


def tiny_mar(**more):
    """A MAR that a test can afford: 2 + 2 blocks, 16 tokens of 4 numbers."""
    sizes = {"encoder_depth": 2, "decoder_depth": 2, "buffer_size": 3, "diffloss_w": 12, "diffloss_d": 2, "dropout": 0}
    return lively(tf.MAR(**SMALL | {"patch_size": 2} | sizes | more))


def dit_inputs(count=2):
    """Random x, t and y of `tiny_dit`; label 3 is no class."""
    return torch.randn(count, 1, 8, 8), torch.randint(0, 1000, (count,)), torch.randint(0, 4, (count,))


def dense_forward(blocks, x, mask, *args):
    """The definition, x <- m * block(x) + (1 - m) * x, word for word: what `masked_forward` is compared with."""
    for i, block in enumerate(blocks):
        m = mask[:, i].view(-1, *[1] * (x.dim() - 1))
        x = m * block(x, *args) + (1 - m) * x
    return x


def dense_blocks(model, mask, lists, streams):
    """The same for a model that is not ours, whose blocks are called with these streams, by name or the first one."""
    for block, m in zip(model.get_submodule(lists), mask.unbind(1)):
        def forward(*args, call=block.forward, m=m.view(-1, 1, 1), **kwargs):
            given = inspect.signature(call).bind(*args, **kwargs).arguments
            out = call(*args, **kwargs)
            if not streams:
                return m * out + (1 - m) * next(iter(given.values()))
            return tuple(m * part + (1 - m) * given[name] for name, part in zip(streams, out))
        block.forward = forward


class Formulas:
    """The layers of a model from their formulas, without modules, its weights given by name: what the forward passes
    of DiT and MAR are compared with, in float64."""

    def __init__(self, model):
        self.w = model.state_dict()

    def linear(self, h, name):
        return torch.einsum("...i,oi->...o", h, self.w[name + ".weight"]) + self.w[name + ".bias"]

    def norm(self, h, name=None):
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return h if name is None else h * self.w[name + ".weight"] + self.w[name + ".bias"]

    def silu(self, h):
        return h / (1 + torch.exp(-h))

    def attention(self, h, name):                # h (..., T, D), two heads
        q, k, v = self.linear(h, name + ".qkv").unflatten(-1, (3, 2, -1)).unbind(-3)
        p = (torch.einsum("...thd,...shd->...hts", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.linear(torch.einsum("...hts,...shd->...thd", p, v).flatten(-2), name + ".proj")

    def time(self, t, name):                     # t (B,)
        angles = t[:, None] * torch.tensor([10000 ** (-k / 128) for k in range(128)], dtype=torch.float64)
        waves = torch.cat([angles.cos(), angles.sin()], 1)
        return self.linear(self.silu(self.linear(waves, name + ".mlp.0")), name + ".mlp.2")


class StandIn(nn.Module):
    """Called like the Inception network of FID, in TorchScript: eight features, and three classes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Linear(27, 8)
        self.classes = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        x = self.features(F.adaptive_avg_pool2d(x.to(torch.float32) / 255, (3, 3)).flatten(1))
        return x if return_features else self.classes(x).softmax(1)


class ToyVAE:
    """In the place of tf.VAE: latents (B, 4, h / 8, w / 8) from a pixel of every 8x8 patch; decoding spreads it."""

    def __init__(self, name="", device="cpu", channels=4):
        self.device = device

    def encode(self, images, noise):
        small = tf.to_float(images)[:, :, ::8, ::8]
        return torch.cat([small, small[:, :1]], 1) + 0.01 * noise

    def decode(self, latents):
        return tf.to_uint8(latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)).cpu()


class Numeric(unittest.TestCase):
    """Tests of numbers: their tensors are on a GPU where there is one."""

    def setUp(self):
        self.enterContext(torch.device(DEVICE))
        torch.manual_seed(0)                     # whatever ran before


class Heart(Numeric):
    """Chapters 3 and 4: the layer sampler, the masked forward pass, LoRA, learning, pruning."""

    def test_exact_masks_are_drawn_with_the_probabilities_of_the_softmax_whatever_tau(self):
        sampler = tf.LayerSampler([(2, 4)])
        sampler.logits[0].data = torch.tensor([0.0, 0.01, 0.02, -0.01, 0.005, 0.0])
        masks = tf.nm_masks(2, 4)
        self.assertTrue(len(masks.unique(dim=0)) == 6 and (masks.sum(1) == 2).all())
        expected = 20_000 * torch.softmax(sampler.logits[0].detach() * 100, 0)
        for tau in (4.0, 0.1):
            drawn = sampler(20_000, tau, scale=100.0)
            count = (drawn[:, None] == masks).all(2).sum(0)
            self.assertTrue(drawn.requires_grad and count.sum() == 20_000)   # exactly zeros and ones, two in each
            chi2 = ((count - expected) ** 2 / expected).sum()
            self.assertLess(chi2, 25.7)          # 5 degrees of freedom, one false alarm in 10,000
            close(drawn.mean(0), sampler.keep_probability(100.0), atol=0.02, rtol=0)

    def test_every_group_keeps_its_n_and_kept_and_confidence_follow_the_likeliest_candidate(self):
        sampler = tf.LayerSampler([(1, 2), (2, 3)])
        sampler.logits[0].data[1], sampler.logits[1].data[1] = 0.03, 0.05    # candidates 01 and 101
        self.assertEqual(sampler.kept(), [1, 2, 4])
        self.assertEqual([part.sum(1).unique().tolist() for part in sampler(500).split([2, 3], 1)], [[1], [2]])
        close(sampler.confidence(), torch.tensor([1 / (1 + math.exp(-3)), 1 / (1 + 2 * math.exp(-5))]))

    def test_the_masked_forward_has_the_values_and_gradients_of_the_dense_formula(self):
        blocks = lively(nn.ModuleList([tf.DiTBlock(8, 2) for _ in range(5)])).double()
        mask = torch.randint(0, 2, (6, 5)).double()
        mask[0], mask[1], mask[:, 2] = 1, 0, 0   # all kept; all dropped; a block nobody keeps
        x, c = torch.randn(6, 4, 8).double(), torch.randn(6, 8).double()
        results = []
        for forward in (lambda x, c, m: tf.masked_forward(blocks, x, c, mask=m)[0],
                        lambda x, c, m: dense_forward(blocks, x, m, c)):
            inputs = [a.clone().requires_grad_() for a in (x, c, mask)]
            out = forward(*inputs)
            gradients = torch.autograd.grad(out.sin().sum(), [*inputs, *blocks.parameters()], materialize_grads=True)
            results.append([out, *gradients])
        for ours, dense in zip(*results, strict=True):
            close(ours, dense, rtol=1e-12, atol=1e-12)
        for near in (mask - 6e-8, mask + 1e-7, mask.bool()):                 # rounding errors of a mask do not matter
            self.assertTrue(torch.equal(tf.masked_forward(blocks, x, c, mask=near)[0], results[0][0]))

    def test_dropped_examples_run_without_a_graph_and_only_while_a_mask_is_learned(self):
        block = nn.Linear(3, 3)
        runs = []
        block.register_forward_hook(lambda module, args, out: runs.append((len(out), out.requires_grad)))
        mask = torch.tensor([[1.0], [0], [1], [0], [0]])
        tf.masked_forward([block], torch.randn(5, 3), mask=mask)
        tf.masked_forward([block], torch.randn(5, 3), mask=mask.requires_grad_())
        self.assertEqual(runs, [(2, True), (2, True), (3, False)])

    def test_the_gradient_of_the_logits_is_the_softmax_jacobian_of_the_masks_gradient(self):
        sampler = tf.LayerSampler([(1, 2), (2, 3)]).double()
        for logits in sampler.logits:
            nn.init.normal_(logits, std=0.01)
        blocks = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double() for _ in range(5)]
        x, tau, scale = torch.randn(7, 3).double(), 0.7, 100.0
        torch.manual_seed(3)
        mask = sampler(7, tau, scale)
        mask.retain_grad()
        tf.masked_forward(blocks, x, mask=mask)[0].square().sum().backward()
        torch.manual_seed(3)                     # the same Gumbel noise again
        for logits, candidates, grad in zip(sampler.logits, sampler.candidates, mask.grad.split([2, 3], 1)):
            soft = F.gumbel_softmax((logits.detach() * scale).expand(7, -1), tau=tau)
            v = grad @ candidates.T.double()     # dL/dy (B, C(M, N))
            close(logits.grad, scale / tau * (soft * (v - (soft * v).sum(1, keepdim=True))).sum(0))

    def test_the_masked_forward_works_on_any_residual_blocks_and_keeps_the_type_of_its_input(self):
        layers = [nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True).eval() for _ in range(3)]
        x, c = torch.randn(2, 5, 8), torch.randn(2, 8)
        mask = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
        out, features = tf.masked_forward(layers, x, mask=mask, hidden=(0, 2))
        close(out, torch.stack([layers[2](layers[0](x[:1]))[0], x[1]]))
        close(features, [torch.stack([layers[0](x[:1])[0], x[1]]), out])
        block = tf.DiTBlock(8, 2).bfloat16()
        out, _ = tf.masked_forward([block] * 3, x.bfloat16(), c.bfloat16(), mask=mask.requires_grad_())
        self.assertEqual(out.dtype, torch.bfloat16)
        shared, _ = tf.masked_forward([block.float()] * 3, x, c[:1], mask=mask)              # one for all examples
        close(shared, tf.masked_forward([block] * 3, x, c[:1].expand(2, -1), mask=mask)[0])
        for wrong in (mask[:1], mask[:, :2]):
            self.assertRaisesRegex(ValueError, "expected", tf.masked_forward, [block] * 3, x, c, mask=wrong)

    def test_without_groups_n_blocks_are_drawn_without_replacement(self):
        sampler = tf.TopNSampler(2, 5)
        sampler.logits.data = torch.tensor([0.0, 0.01, 0.02, -0.01, 0.005])
        p = torch.softmax(sampler.logits.detach() * 100, 0).tolist()
        for tau in (4.0, 0.1):
            drawn = sampler(20_000, tau)
            self.assertTrue(drawn.requires_grad and drawn.unique().tolist() == [0, 1] and (drawn.sum(1) == 2).all())
            chi2, expected = 0, [0] * 5
            for a, b in itertools.combinations(range(5), 2):                 # one first, or the other
                share = p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])
                chi2 += ((drawn[:, a] * drawn[:, b]).sum().item() - 20_000 * share) ** 2 / (20_000 * share)
                expected[a] += share
                expected[b] += share
            self.assertLess(chi2, 33.7)          # 9 degrees of freedom, one false alarm in 10,000
            close(drawn.mean(0), torch.tensor(expected), atol=0.02, rtol=0)
        close(sampler.keep_probability(), torch.tensor(expected), atol=0.06, rtol=0)
        self.assertTrue(torch.equal(sampler.keep_probability(), sampler.keep_probability()))
        self.assertEqual((sampler.kept(), sampler.confidence().shape), ([1, 2], (2,)))
        self.assertTrue((tf.TopNSampler(3, 3)(9) == 1).all())
        self.assertRaisesRegex(ValueError, "from 1 to 5", tf.TopNSampler, 6, 5)

    def test_the_relaxed_mask_sums_to_n_and_its_gradient_trades_one_block_for_others(self):
        sampler, keys = tf.TopNSampler(2, 5), 3 * torch.randn(6, 5, dtype=torch.double).requires_grad_()
        for tau in (4.0, 0.5):
            soft = sampler.relaxed(keys, tau)
            close(soft.sum(1), torch.full((6,), 2.0).double())
            self.assertTrue(torch.autograd.gradcheck(lambda keys: sampler.relaxed(keys, tau), keys, eps=1e-4))
            grad, = torch.autograd.grad((soft * torch.randn(6, 5)).sum(), keys)
            close(grad.sum(1), torch.zeros(6).double())

    def test_groups_that_fit_are_parsed_and_others_refused_with_the_reason(self):
        self.assertEqual(tf.parse_groups("1:2", 6), [(1, 2)] * 3)
        self.assertEqual(tf.parse_groups("2:4,1:2", 6), [(2, 4), (1, 2)])
        self.assertEqual(tf.parse_groups("14", 28), (14, 28))
        for words, reason in (("13 0", "from 1 to 12"), ("1:5 2:4,3:4", "fill a depth of 12; one N:M"),
                              ("3:2 0:2 1:0", "expected N:M with 1 <= N"), ("1-2 1:2:3 ,", "not a list"),
                              ("14:28", "too many candidates"), ("9000:18000", "9000:18000")):
            for pattern in words.split():
                self.assertRaisesRegex(ValueError, reason, tf.parse_groups, pattern, 12)

    def test_lora_starts_as_the_identity_trains_nothing_else_and_under_one_percent_of_dit_xl(self):
        model, inputs = tiny_dit(), dit_inputs()
        before, linear = model(*inputs), [m for m in model.modules() if isinstance(m, nn.Linear)]
        added = tf.add_lora(model, rank=2, alpha=4)
        self.assertTrue(torch.equal(before, model(*inputs)))
        self.assertEqual(len(added), 2 * len(linear))
        self.assertEqual({id(p) for p in model.parameters() if p.requires_grad}, {id(p) for p in added})
        self.assertRaisesRegex(ValueError, "wrapped already", tf.add_lora, model)            # LoRA does not wrap itself
        self.assertRaisesRegex(ValueError, "no linear layer", tf.add_lora, nn.Conv2d(1, 1, 1))
        share = sum(p.numel() for p in tf.add_lora(tf.unallocated(tf.DiT))) / 675_129_632
        self.assertTrue(0.0085 < share < 0.0095, share)

    def test_a_lora_layer_is_w_plus_alpha_over_r_b_a_also_for_modules_that_read_its_weight(self):
        layer, x = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), torch.randn(2, 5, 8)
        added = tf.add_lora(lively(layer), rank=2, alpha=6)
        for p in added:
            nn.init.normal_(p, std=0.1)
        W = layer.linear1.base.weight + 3 * layer.linear1.lora_B @ layer.linear1.lora_A
        close(layer.linear1(x), F.linear(x, W, layer.linear1.bias))
        trained = layer.train()(x)
        with torch.no_grad():
            close(layer.eval()(x), trained, rtol=1e-5, atol=1e-5)            # PyTorch's fast path
        trained.square().sum().backward()
        self.assertEqual(len(added), 6)          # out_proj of the attention, linear1, linear2
        self.assertTrue(all(p.grad.any() for p in added))

    def test_planted_useless_blocks_are_found_in_groups_and_without_and_the_weights_left_alone(self):
        """Six blocks, of which three do the work and the others add junk. Without groups the three are side by side."""
        def loss_fn(model, sample_mask):
            x = torch.randn(32, 4)
            return F.mse_loss(tf.masked_forward(model, x, mask=sample_mask(32))[0], 8 * x)
        pairs = [(1, 2)] * 3
        for update, groups, useful in (("lora", pairs, [1, 2, 4]), ("full", pairs, [1, 2, 4]),
                                       ("frozen", pairs, [1, 2, 4]), ("lora", (3, 6), [0, 1, 2])):
            torch.manual_seed(3)
            model = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(6)])
            for i, block in enumerate(model):
                block.weight.data = 2 * torch.eye(4) if i in useful else torch.eye(4) + 0.7 * torch.randn(4, 4)
            before = copy.deepcopy(model.state_dict())
            sampler, history = tf.learn_layers(model, loss_fn, groups, 80, update=update, rank=1, lr=1e-3,
                                               logits_lr=5e-3)
            found = sampler.kept(), history[0][0], history[-1][0], len(history[-1][1])
            self.assertEqual(found, (useful, 0, 80, 6), update)
            self.assertGreater(sampler.confidence().min(), 0.9)
            close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
            self.assertTrue(all(p.requires_grad for p in model.parameters()))

    def test_the_random_numbers_of_a_seeded_step_depend_on_the_seed_and_the_step_alone(self):
        def drawn(seed, step):
            tf.seed_step(seed, step)             # as `train` does before every step
            return torch.rand(1).item()
        found = [drawn(seed, step) for seed in (7, 8) for step in range(5)]
        self.assertEqual((len(set(found)), drawn(7, 3)), (10, found[3]))

    def test_the_pruned_model_computes_what_the_mask_computed_with_blocks_in_one_list_or_several(self):
        model, inputs = tiny_dit(), dit_inputs()
        pruned = tf.prune(model, [0, 3])
        out, features = model(*inputs, mask=torch.tensor([[1.0, 0, 0, 1]] * 2), hidden=(0, 3))
        close(pruned(*inputs, hidden=(0, 1)), (out, features))
        self.assertTrue(torch.equal(pruned(*inputs), pruned(*inputs, hidden=())[0]))
        self.assertEqual((features[0].shape, pruned.config()["depth"], len(model.blocks)), ((2, 4, 16), 2, 4))
        for p in pruned.parameters():
            nn.init.zeros_(p)                    # it is a copy: the model keeps its weights
        self.assertTrue(all(p.any() for p in model.parameters()))
        for bad in ([], [0, 4], [2, 1], [1, 1], [-1, 2]):
            self.assertRaisesRegex(ValueError, "expected", tf.prune, model, bad)
        model = nn.ModuleDict({name: nn.ModuleList([nn.Linear(2, 2) for _ in range(3)]) for name in "ab"})
        pruned = tf.prune(model, [0, 2, 4], lists=("a", "b"))
        self.assertEqual((len(pruned["a"]), len(pruned["b"]), len(model["a"])), (2, 1, 3))
        self.assertTrue(torch.equal(pruned["b"][0].weight, model["b"][1].weight))

    def test_the_readmes_own_models_become_working_shallower_ones(self):
        section = (HERE / "README.md").read_text().split("## Your own model")[1].split("## Limits")[0]
        blocks = [block for block in section.split("\n\n") if block.startswith("    ")]
        theirs, ours = ["\n".join(line[4:] for line in block.splitlines()) for block in blocks]
        self.assertLessEqual(max(theirs.count("\n"), ours.count("\n")), 19)
        exec(ours, names := {})
        teacher, student = names["teacher"].eval(), names["student"].eval()
        x = torch.randint(10, (500, 8))
        with torch.no_grad():
            right = [(m(x).argmax(2) == x.sort().values).double().mean().item() for m in (teacher, student)]
            pruned = tf.prune(names["teacher"], names["sampler"].kept(), "encoder.layers")
            before = (pruned(x).argmax(2) == x.sort().values).double().mean().item()
        self.assertEqual((len(teacher.encoder.layers), len(student.encoder.layers)), (6, 3))
        self.assertGreater(min(right), 0.9, right)
        self.assertGreater(right[1], before)
        if importlib.util.find_spec("diffusers") is None:
            self.skipTest("the example of diffusers needs pip install diffusers")
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            exec(theirs, names := {})
        student, again = (names[name].state_dict() for name in ("student", "again"))
        self.assertEqual(len(names["again"].transformer_blocks), 2)
        self.assertTrue(all(torch.equal(student[name].cpu(), again[name].cpu()) for name in student))

    def test_what_the_readme_says_can_be_copied_works_alone(self):
        """Each group of functions, with the imports that the README names and nothing else of the file."""
        source = Path(tf.__file__).read_text()
        parts = {node.name: "\n".join(source.splitlines()[node.lineno - 1:node.end_lineno])
                 for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        readme = (HERE / "README.md").read_text().split("To copy code:")[1].split("## Limits")[0]
        common = "import torch\nimport torch.nn as nn\nimport torch.nn.functional as F\n"
        done, modules = [], {}
        for group in re.split(r"\.\s+", readme.split("`learn_layers`:")[0].strip().strip(".")):
            names, imports = re.findall(r"`(\w+)`", group), group.split(":")[1].replace("these", "math, itertools")
            names += done[0] if "these" in group else []
            done.append(names)
            code = common * ("torch" in imports or "these" in group) + "".join(
                f"import {name.strip()}\n" for name in imports.split(",") if name.strip() != "torch")
            exec(code + "\n\n".join(parts[name] for name in names), modules.setdefault(names[0], {}))
        blocks, x = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]), torch.randn(6, 3, 4)
        heart = modules["LayerSampler"]
        for sampler in (heart["LayerSampler"]([(1, 2)] * 2), heart["TopNSampler"](2, 4)):
            mask = sampler(6)
            close(heart["masked_forward"](blocks, x, mask=mask)[0], dense_forward(blocks, x, mask))
        model = nn.ModuleDict({"blocks": copy.deepcopy(blocks)})
        modules["set_mask"]["set_mask"](model, mask.detach())
        close(model["blocks"](x), dense_forward(blocks, x, mask))
        self.assertRaisesRegex(ValueError, "under a mask", modules["prune"]["prune"], model, [0, 2])
        modules["set_mask"]["set_mask"](model, None)
        self.assertEqual(len(modules["prune"]["prune"](model, [0, 2])["blocks"]), 2)
        self.assertEqual(len(modules["add_lora"]["add_lora"](model)), 8)
        kd = modules["masked_feature_loss"]
        self.assertGreater(kd["masked_feature_loss"](x, x + 1), 0)
        self.assertEqual(kd["match_blocks"]([(1, 2)] * 2, [0, 3]), [(0, 1), (1, 3)])


class TwoStreams(nn.Module):
    """Called as a block of Flux or SD3 is: keywords, a table that all examples share, per-example tensors in a dict, a
    tuple of two streams as its output, the first None in the last block."""

    def __init__(self, last):
        super().__init__()
        self.mix, self.last, self.place = nn.Linear(6, 12), last, "read by the model"

    def forward(self, x, *, context, table, more):
        out = self.mix(torch.cat([x + table, context + more["shift"][0]], -1)).tanh()
        return None if self.last else context + out[..., 3:6], x + out[..., :3] + out[..., 6:9] * out[..., 9:]


class Foreign(nn.Module):
    """A model of such blocks, whose forward pass knows nothing of masks; `checkpoint` recomputes its blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stack = nn.Sequential(*[TwoStreams(last=i == 3) for i in range(4)]).double()
        self.table, self.checkpoint = torch.randn(5, 3).double(), False

    def forward(self, x, context, shift):
        for block in self.stack:
            assert block.place == "read by the model"
            call = functools.partial(checkpoint, block, use_reentrant=False) if self.checkpoint else block
            context, x = call(x, context=context, table=self.table, more={"shift": (shift,)})
        return x

    def dense(self, mask, x, context, shift):
        """The definition, for both streams."""
        for i, block in enumerate(self.stack):
            m = mask[:, i].view(-1, 1, 1)
            c, out = block(x, context=context, table=self.table, more={"shift": (shift,)})
            context, x = None if c is None else m * c + (1 - m) * context, m * out + (1 - m) * x
        return x


class Elsewhere(Numeric):
    """Chapter 6: the method on models that are not ours."""

    STREAMS = {"lists": "stack", "streams": ("context", "x")}

    def setUp(self):
        super().setUp()
        self.model = Foreign()
        self.inputs = [torch.randn(6, 5, 3).double() for _ in range(2)] + [torch.randn(6, 1, 3).double()]
        self.mask = torch.randint(0, 2, (6, 4)).double()
        self.mask[0], self.mask[1], self.mask[:, 2] = 1, 0, 0    # all kept; all dropped; a block nobody keeps

    def gradients(self, run, model):
        mask, inputs = self.mask.clone().requires_grad_(), [x.clone().requires_grad_() for x in self.inputs]
        out, sources = run(mask, *inputs), [mask, *inputs, *model.parameters()]
        return [out, *torch.autograd.grad(out.sin().sum(), sources, materialize_grads=True)]

    def masked(self, mask, *inputs):
        tf.set_mask(self.model, mask, **self.STREAMS)
        return self.model(*inputs)

    def test_a_model_that_knows_nothing_of_masks_has_the_values_and_gradients_of_the_dense_formula(self):
        before, names = self.model(*self.inputs), list(self.model.state_dict())
        dense = self.gradients(self.model.dense, self.model)
        for self.model.checkpoint in (False, True):
            close(self.gradients(self.masked, self.model), dense, rtol=1e-12, atol=1e-13)
        self.assertEqual(list(self.model.state_dict()), names)
        out = self.masked(torch.tensor([[1.0, 0, 0, 1]] * 6), *self.inputs)  # nobody keeps 1 and 2, and nothing learns
        tf.set_mask(self.model, None, "stack")
        close(out, tf.prune(self.model, [0, 3], "stack")(*self.inputs))
        self.assertTrue(torch.equal(self.model(*self.inputs), before))
        self.assertFalse(any({"forward", "unmasked_forward"} & vars(block).keys() for block in self.model.stack))

    def test_a_mask_put_on_over_a_forward_replaced_by_somebody_else_gives_that_back(self):
        block = self.model.stack[0]
        block.forward = theirs = functools.partial(block.forward)
        self.masked(self.mask, *self.inputs)
        self.masked(self.mask, *self.inputs)
        tf.set_mask(self.model, None, "stack")
        self.assertIs(block.forward, theirs)

    def test_masks_streams_and_caches_that_do_not_fit_are_refused(self):
        for mask in (self.mask[:, :3], self.mask[0]):
            self.assertRaisesRegex(ValueError, "4 blocks", tf.set_mask, self.model, mask, "stack")
        self.assertRaisesRegex(ValueError, "of 5 examples", self.masked, self.mask[:5], *self.inputs)
        for name, reason in (("nonsense", "nonsense"), ("x", "2 outputs")):
            tf.set_mask(self.model, self.mask, "stack", (name,))
            self.assertRaisesRegex(ValueError, reason, self.model, *self.inputs)
        self.assertRaisesRegex(ValueError, "runs under a mask", tf.prune, self.model, [0], "stack")

        class Cached(nn.Linear):
            def forward(self, x, past_key_values=None):
                return super().forward(x)
        model = nn.ModuleDict({"blocks": nn.ModuleList([Cached(3, 3)])})
        tf.set_mask(model, torch.ones(2, 1))
        model["blocks"][0](torch.ones(2, 3))
        self.assertRaisesRegex(ValueError, "use_cache=False", model["blocks"][0], torch.ones(2, 3), past_key_values=[])

    def test_layers_are_learned_by_an_ordinary_loss_and_a_loss_without_the_mask_is_refused(self):
        target = self.model.dense(torch.tensor([[1.0, 0, 1, 1]] * 6).double(), *self.inputs).detach()

        def loss_fn(model, sample_mask):
            tf.set_mask(model, sample_mask(6), **self.STREAMS)
            return F.mse_loss(model(*self.inputs), target)
        sampler, _ = tf.learn_layers(self.model, loss_fn, [(3, 4)], 60, update="frozen", logits_lr=3e-3)
        self.assertEqual(sampler.kept(), [0, 2, 3])
        for update in ("full", "frozen"):
            self.assertRaisesRegex(ValueError, "does not depend on the mask", tf.learn_layers, self.model,
                                   lambda model, sample_mask: F.mse_loss(model(*self.inputs), target), [(3, 4)], 5,
                                   update=update)

    def test_a_pruned_list_keeps_its_type_and_the_places_in_it_are_numbered_anew(self):
        for i, block in enumerate(self.model.stack):
            block.mix.layer_idx = i
        self.model.stack[1].mix.layer_idx = 77   # means something else
        pruned = tf.prune(self.model, [1, 3], "stack")
        self.assertIsInstance(pruned.stack, nn.Sequential)
        self.assertEqual([block.mix.layer_idx for block in pruned.stack], [77, 1])
        self.assertEqual({name.split(".mix.")[0] for name in pruned.state_dict()}, {"stack.0", "stack.1"})

    def test_lora_wraps_the_transposed_linear_layers_of_transformers_and_says_what_it_wrapped(self):
        class Conv1D(nn.Module):                 # as in transformers
            def __init__(self, nf, nx):
                super().__init__()
                self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

            def forward(self, x):
                return x @ self.weight + self.bias
        model, x = nn.Sequential(Conv1D(5, 3), nn.Sequential(nn.Linear(5, 2))), torch.randn(4, 3)
        model[1].nf = 8                          # means something else
        before = model(x)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            added = tf.add_lora(model, rank=2, alpha=6, verbose=True)
        self.assertEqual(said.getvalue(), "LoRA: 0\nLoRA: 1.0\n")
        self.assertTrue(torch.equal(model(x), before))
        self.assertEqual([tuple(p.shape) for p in added], [(2, 3), (5, 2), (2, 5), (2, 2)])
        nn.init.normal_(added[1])
        close(model[0](x), x @ (model[0].base.weight + 3 * (added[1] @ added[0]).T) + model[0].bias)
        close(model[0].weight, model[0].base.weight + 3 * (added[1] @ added[0]).T)

    def test_models_of_diffusers_and_timm_have_the_gradients_of_the_dense_formula(self):
        try:
            import diffusers
            import timm
        except ImportError:
            self.skipTest("needs pip install diffusers timm")
        x, y = torch.randn(6, 4, 8, 8).double(), torch.randint(0, 10, (6,))
        flux = {"hidden_states": torch.randn(6, 9, 4).double(), "encoder_hidden_states": torch.randn(6, 5, 12).double(),
                "pooled_projections": torch.randn(6, 8).double(), "timestep": torch.rand(6).double(),
                "img_ids": torch.randn(9, 3), "txt_ids": torch.zeros(5, 3)}
        two = ("encoder_hidden_states", "hidden_states")
        for model, call, lists, streams in (
                (diffusers.DiTTransformer2DModel(2, 8, 4, num_layers=4, sample_size=8, num_embeds_ada_norm=10),
                 lambda model: model(x, y, y).sample, "transformer_blocks", ()),
                (diffusers.FluxTransformer2DModel(
                    in_channels=4, num_layers=4, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                    joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8)),
                 lambda model: model(**flux).sample, "transformer_blocks", two),
                (timm.create_model("vit_tiny_patch16_224", depth=4, img_size=8, patch_size=4, embed_dim=16, num_heads=2,
                                   in_chans=4), lambda model: model(x), "blocks", ())):
            model = lively(model).double()
            results = []
            for put_on in (tf.set_mask, dense_blocks):
                mask, one = self.mask.clone().requires_grad_(), copy.deepcopy(model)
                put_on(one, mask, lists, streams)
                out, weights = call(one), [p for p in one.parameters() if p.requires_grad]
                results.append([out, *torch.autograd.grad(out.sin().sum(), [mask, *weights], materialize_grads=True,
                                                          allow_unused=True)])
            close(*results, rtol=1e-10, atol=1e-12)
            tf.set_mask(model, torch.tensor([[1.0, 0, 0, 1]] * 6), lists, streams)
            out = call(model)
            tf.set_mask(model, None, lists)
            close(out, call(tf.prune(model, [0, 3], lists)))


class Recovery(Numeric):
    """Chapter 5: masked knowledge distillation."""

    def setUp(self):
        super().setUp()
        self.teacher, self.diffusion = tiny_dit(), tf.GaussianDiffusion()
        self.student, self.pairs = tf.prune(self.teacher, [0, 3]), [(0, 1), (1, 3)]

    def test_the_masked_loss_and_its_gradient_ignore_outliers_of_either_model_and_with_k_infinite_it_is_the_mse(self):
        teacher, student = torch.randn(2, 2, 6, 8).clamp(-1.5, 1.5)
        teacher[0, 1, 2], student[1, 3, 4] = 50.0, -60.0
        left = (teacher < 2) & (student > -2)
        loss = tf.masked_feature_loss(student.requires_grad_(), teacher, k=2.5)
        loss.backward()
        close(loss, (student - teacher)[left].square().mean())
        self.assertEqual((student.grad[0, 1, 2].item(), student.grad[1, 3, 4].item()), (0.0, 0.0))
        close(tf.masked_feature_loss(student, teacher, math.inf), F.mse_loss(student, teacher))
        self.assertEqual(tf.masked_feature_loss(torch.ones(1, 2, 2), torch.ones(1, 2, 2), math.inf).item(), 0)
        for other in (teacher[:1], teacher[0]):
            self.assertRaisesRegex(ValueError, "expected the same", tf.masked_feature_loss, other, teacher)

    def test_a_massive_activation_swamps_the_plain_feature_loss_and_not_the_masked_one(self):
        _, (h,) = self.teacher(*dit_inputs(4), hidden=(1,))
        massive, student = h.clone(), h + 0.1 * torch.randn_like(h)
        massive[:, 0, 0] = 50 * h.std((1, 2))
        ratio = {k: tf.masked_feature_loss(student, massive, k) / tf.masked_feature_loss(student, h, k)
                 for k in (math.inf, 2.0)}
        self.assertTrue(ratio[math.inf] > 100 and 0.5 < ratio[2.0] < 2, ratio)

    def test_the_last_kept_block_of_a_group_is_matched_with_the_groups_last_but_not_across_a_cut(self):
        self.assertEqual(tf.match_blocks([(1, 2)] * 3, [0, 3, 4]), [(0, 1), (1, 3), (2, 5)])
        self.assertEqual(tf.match_blocks([(2, 4), (3, 4)], [0, 2, 4, 5, 6]), [(1, 3), (4, 7)])
        self.assertEqual(tf.match_blocks([(1, 2)] * 3, [0, 1, 4]), [(1, 1), (2, 5)])  # a group that keeps none: no pair
        self.assertEqual(tf.match_blocks([(1, 2)] * 3, [0, 2, 5], cuts=(3,)), [(0, 1), (1, 2), (2, 5)])
        self.assertEqual(tf.match_blocks([(1, 2)] * 3, [0, 3, 5], cuts=(3,)), [(0, 1), (1, 3), (2, 5)])
        self.assertEqual(tf.match_blocks([(2, 4)], [1, 2], cuts=(2,)), [(0, 1), (1, 3)])         # amid a group
        self.assertEqual(tf.match_blocks((3, 8), [0, 3, 4]), [(0, 2), (1, 3), (2, 7)])          # without groups

    def test_the_loss_is_the_papers_mixture_and_a_student_that_is_its_teacher_has_none(self):
        x0, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        for kd in tf.KD_MODES:
            loss, parts = tf.recovery_loss(self.student, self.teacher, self.diffusion, x0, y, self.pairs, kd, beta=0.3)
            mixture = 0.9 * parts.get("kd", 0) + 0.1 * parts["denoising"] + 0.3 * parts.get("features", 0)
            close(loss, parts["denoising"] if kd == "none" else mixture)
            self.assertEqual(("kd" in parts, "features" in parts), (kd != "none", kd in ("masked", "feature")))
        with tf.autocast(x0.device):             # as the teacher runs
            _, parts = tf.recovery_loss(self.teacher, self.teacher, self.diffusion, x0, y, [(1, 1), (3, 3)])
        self.assertEqual((parts["kd"].item(), parts["features"].item()), (0, 0))
        with self.assertRaises(ValueError):      # the teacher has no block 99
            tf.recovery_loss(self.student, self.teacher, self.diffusion, x0, y, [(0, 1), (1, 99)])
        with self.assertRaisesRegex(ValueError, "expected one of"):
            tf.recovery_loss(self.student, self.teacher, self.diffusion, x0, y, self.pairs, "other")

    def test_both_models_see_the_same_labels_some_dropped_and_the_weight_of_the_features_falls_to_zero(self):
        self.student.y_embedder.dropout_prob = 0.5
        labels, betas = [], []
        for model in (self.teacher, self.student):
            model.register_forward_pre_hook(lambda module, args: labels.append(args[2].clone()))

        def on_step(step, metrics):
            rest = metrics["loss"] - 0.9 * metrics["kd"].item() - 0.1 * metrics["denoising"].item()
            betas.append(rest / metrics["features"].item())
        batches = itertools.repeat((torch.randn(32, 1, 8, 8), torch.randint(0, 3, (32,))))
        tf.recover(self.student, self.teacher, self.diffusion, batches, self.pairs, 5, beta=8.0, on_step=on_step)
        self.assertTrue(len(labels) == 10 and torch.equal(torch.cat(labels[::2]), torch.cat(labels[1::2])))
        self.assertTrue(50 < (torch.cat(labels[::2]) == 3).sum() < 110)
        np.testing.assert_allclose(betas, [8, 6, 4, 2, 0], atol=1e-3)


class Model(Numeric):
    """Chapter 1: DiT, and what it shares with MAR."""

    def test_presets_have_the_official_sizes_names_and_shapes_and_wrong_sizes_are_refused(self):
        sizes = {"DiT-XL/2": 675_129_632, "DiT-L/2": 458_102_816, "DiT-B/2": 130_512_416, "DiT-S/2": 32_963_360,
                 "DiT-D19/2": 459_983_264, "DiT-D14/2": 340_457_504, "DiT-D7/2": 173_121_440,
                 "MAR-L": 478_326_304, "MAR-B": 207_924_768}
        for name, size in sizes.items():
            model = tf.unallocated(tf.PRESETS[name]["network"])
            self.assertEqual(sum(p.numel() for p in model.parameters()), size, name)
        block = {"attn.qkv": (3456, 1152), "attn.proj": (1152, 1152), "mlp.fc1": (4608, 1152), "mlp.fc2": (1152, 4608),
                 "adaLN_modulation.1": (6912, 1152)}
        layers = {"x_embedder.proj": (1152, 4, 2, 2), "t_embedder.mlp.0": (1152, 256), "t_embedder.mlp.2": (1152, 1152),
                  "final_layer.linear": (32, 1152), "final_layer.adaLN_modulation.1": (2304, 1152)}
        for i in range(28):
            layers |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
        expected = {"pos_embed": (1, 256, 1152), "y_embedder.embedding_table.weight": (1001, 1152)}
        for name, shape in layers.items():
            expected |= {name + ".weight": shape, name + ".bias": shape[:1]}
        state = tf.unallocated(tf.DiT_models["DiT-XL/2"]).state_dict()
        self.assertEqual({name: tuple(value.shape) for name, value in state.items()}, expected)
        for build, sizes in ((tiny_dit, {"input_size": 9}), (tiny_dit, {"num_heads": 3}), (tiny_mar, {"num_heads": 3})):
            self.assertRaisesRegex(ValueError, "multiple", build, **sizes)
        model, seen = tiny_dit(), []
        model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0].is_contiguous()))
        model(*dit_inputs())
        self.assertEqual(seen, [True], "or every norm of the blocks would copy them")

    def test_models_run_with_weights_in_bfloat16(self):
        x, t, y = dit_inputs()
        exact, rough = tiny_dit()(x, t, y), tiny_dit().bfloat16()(x.bfloat16(), t, y)
        self.assertEqual(rough.dtype, torch.bfloat16)
        self.assertLess((rough - exact).norm() / exact.norm(), 0.05)

    def test_a_new_model_predicts_zero_and_its_blocks_are_the_identity(self):
        dit, mar = tf.DiT(**SMALL, patch_size=4, depth=2), tf.MAR_models["MAR-toy"](**SMALL | {"hidden_size": 64})
        x, objective = torch.randn(2, 4, 16), tf.MaskedAutoregression(4)
        self.assertTrue(torch.equal(dit.blocks[0](x, torch.randn(2, 16)), x))
        x_t, t, y = dit_inputs()
        self.assertFalse(dit(x_t, t, y).any())
        t = objective.sample_t(2)
        out = mar(objective.q_sample(x_t, t, tf.noise_for(x_t, t)), t, y)
        self.assertTrue(len(out) and not out.any())

    def test_the_forward_pass_is_the_published_one(self):
        """An independent float64 version from the paper's equations, tensor by tensor, without modules."""
        model = tiny_dit(depth=2, in_channels=2).double()
        f = Formulas(model)
        x, t, y = torch.randn(3, 2, 8, 8).double(), torch.tensor([0, 17, 999]), torch.tensor([0, 2, 3])
        patches = torch.stack([x[:, :, i:i + 4, j:j + 4] for i in (0, 4) for j in (0, 4)], 1)   # (B, T, C, P, P)
        h = torch.einsum("btcpq,dcpq->btd", patches, f.w["x_embedder.proj.weight"]) + f.w["x_embedder.proj.bias"]
        for token in range(4):
            for half, place in ((0, token % 2), (8, token // 2)):            # column first, then row
                angles = place / 10000 ** (torch.arange(4).double() / 4)
                h[:, token, half:half + 8] += torch.cat([angles.sin(), angles.cos()])
        time = f.time(t, "t_embedder")
        c = f.silu(time + f.w["y_embedder.embedding_table.weight"][y])
        for block in ("blocks.0", "blocks.1"):
            s1, k1, g1, s2, k2, g2 = f.linear(c, block + ".adaLN_modulation.1")[:, None].chunk(6, -1)
            h = h + g1 * f.attention(f.norm(h) * (1 + k1) + s1, block + ".attn")
            u = f.linear(f.norm(h) * (1 + k2) + s2, block + ".mlp.fc1")
            u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
            h = h + g2 * f.linear(u, block + ".mlp.fc2")
        shift, scale = f.linear(c, "final_layer.adaLN_modulation.1")[:, None].chunk(2, -1)
        h = f.linear(f.norm(h) * (1 + scale) + shift, "final_layer.linear").view(3, 2, 2, 4, 4, 4)
        rows = [torch.cat([h[:, row, 0], h[:, row, 1]], 2) for row in range(2)]                 # (B, P, 8, channels)
        with torch.no_grad():                    # frequencies and places are float32, in the official code too
            close(model.t_embedder.float()(t).double(), time, rtol=1e-3, atol=1e-3)
            model.t_embedder.forward = lambda t: time
            close(model(x, t, y), torch.cat(rows, 1).permute(0, 3, 1, 2), rtol=1e-5, atol=1e-6)

    def test_guidance_moves_the_first_three_channels_or_all_but_never_the_variance(self):
        t, y, null = torch.tensor([500]), torch.tensor([0, 1]), torch.tensor([3, 3])
        for C, channels, guided in ((4, 3, 3), (4, None, 4), (1, 3, 1), (1, None, 1)):
            model, x = tiny_dit(in_channels=C), torch.randn(2, C, 8, 8)
            out = model.forward_with_cfg(x, t, y, 4.0, cfg_channels=channels)
            cond, uncond = model(x, t, y), model(x, t, null)
            close(out[:, :guided], (uncond + 4 * (cond - uncond))[:, :guided])
            close(out[:, guided:], cond[:, guided:])
        sizes = []                               # guidance 1 asks the model once, another one in one batch
        model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        for guidance in (1.0, 1.5):
            tf.GaussianDiffusion().sample(model, y, lambda: torch.randn(2, 1, 8, 8), 3, guidance)
        self.assertEqual(sizes, [2] * 3 + [4] * 3)

    def test_a_model_without_label_dropout_has_no_null_label_and_refuses_guidance(self):
        dit, mar, y = tiny_dit(class_dropout_prob=0), tiny_mar(class_dropout_prob=0), torch.tensor([0, 2])
        self.assertEqual(len(dit.y_embedder.embedding_table.weight), 3)
        draw = tf.noise_source(range(2), (1, 8, 8), 0, DEVICE)
        self.assertRaisesRegex(ValueError, "only guidance 1", dit.forward_with_cfg, draw(), torch.tensor([5]), y, 1.5)
        for model, objective in ((dit, tf.GaussianDiffusion()), (dit, tf.FlowMatching()),
                                 (mar, tf.MaskedAutoregression(16))):
            self.assertEqual(objective.sample(model, y, draw, steps=2).shape, (2, 1, 8, 8))
            self.assertRaisesRegex(ValueError, "only guidance 1", objective.sample, model, y, draw, 2, guidance=1.5)

    def test_training_drops_labels_and_evaluation_does_not(self):
        labels = torch.ones(1000, dtype=torch.long)
        for embedder in (tiny_dit(class_dropout_prob=0.5).y_embedder, tiny_mar(class_dropout_prob=0.5).y_embedder):
            null, one = embedder(torch.tensor([3, 1]))
            out = embedder.train()(labels).view(1000, -1)
            dropped = (out == null).all(1)
            self.assertTrue((dropped | (out == one).all(1)).all() and 0.4 < dropped.float().mean() < 0.6)
            self.assertTrue((embedder.eval()(labels) == one).all())


class Diffusion(Numeric):
    """Chapter 2: closed forms."""

    def setUp(self):
        super().setUp()
        self.d = tf.GaussianDiffusion()
        self.x0, self.noise = torch.rand(5, 2, 4, 4) * 2 - 1, torch.randn(5, 2, 4, 4)
        self.t = torch.tensor([0, 1, 250, 700, 999])
        self.x_t = self.d.q_sample(self.x0, self.t, self.noise)
        self.beta = np.linspace(1e-4, 2e-2, 1000)
        self.abar = np.cumprod(1 - self.beta)

    def test_a_perfect_model_has_the_posterior_of_bayes_rule(self):
        """q(x_{t-1} | x_t, x0) from the product of two Gaussians; v = -1 and 1 are its variance and beta."""
        a = torch.tensor(self.abar[self.t.cpu()]).float().view(-1, 1, 1, 1)
        close(self.x_t, a.sqrt() * self.x0 + (1 - a).sqrt() * self.noise)
        for v in (-1.0, 1.0, 0.3):
            p = self.d.p_mean_variance(torch.cat([self.noise, torch.full_like(self.noise, v)], 1), self.x_t, self.t)
            close(p["pred_xstart"][:4], self.x0[:4], rtol=1e-3, atol=1e-3)
            for i in range(1, 5):
                beta, before = self.beta[self.t[i]], self.abar[self.t[i] - 1]
                precision = (1 - beta) / beta + 1 / (1 - before)
                mean = math.sqrt(1 - beta) / beta * self.x_t[i] + math.sqrt(before) / (1 - before) * self.x0[i]
                close(p["mean"][i], mean / precision, rtol=1e-4, atol=2e-4)
                variance = math.exp((1 - v) / 2 * math.log(1 / precision) + (1 + v) / 2 * math.log(beta))
                close(p["log_variance"][i].exp(), torch.full((2, 4, 4), variance), rtol=1e-4, atol=0)

    def test_losses_are_the_mean_squared_error_and_the_kl_in_bits_which_trains_the_variance_alone(self):
        def divergence(first, second):           # KL of two steps (B,), in bits
            steps = [self.d.p_mean_variance(out, self.x_t, self.t) for out in (first, second)]
            normals = [torch.distributions.Normal(p["mean"], (0.5 * p["log_variance"]).exp()) for p in steps]
            return torch.distributions.kl_divergence(*normals).mean((1, 2, 3)) / math.log(2)

        out, other = torch.randn(2, 5, 4, 4, 4)
        out.requires_grad_()
        losses = self.d.training_losses(lambda x, t, y: out, self.x0, self.t, None, self.noise)
        perfect = torch.cat([self.noise, -torch.ones_like(self.noise)], 1)
        close(losses["mse"], ((out[:, :2] - self.noise) ** 2).mean((1, 2, 3)))
        close(losses["vb"][1:], divergence(perfect, out)[1:], rtol=1e-3, atol=1e-4)
        close(losses["loss"], losses["mse"] + losses["vb"])
        distance = self.d.distillation_losses(out, other, self.x_t, self.t)
        close(distance, ((out - other)[:, :2] ** 2).mean((1, 2, 3)) + divergence(other, out), rtol=1e-4, atol=1e-5)
        grad, = torch.autograd.grad(losses["vb"].sum(), out)
        self.assertTrue(grad[:, :2].abs().max() == 0 < grad[:, 2:].abs().min())

    def test_the_last_step_is_the_likelihood_of_a_pixel(self):
        levels = torch.arange(256) / 127.5 - 1
        for mean, std in ((0.1, 0.05), (-0.99, 0.02), (0.4, 0.5)):
            log_p = tf.discretized_gaussian_log_likelihood(levels, torch.tensor(mean), torch.tensor(2 * math.log(std)))
            self.assertAlmostEqual(log_p.double().exp().sum().item(), 1, places=4)      # 256 bins share the mass
            normal = torch.distributions.Normal(mean, std)
            exact = normal.cdf(levels + 1 / 255) - normal.cdf(levels - 1 / 255)
            close(log_p.exp()[1:-1], exact[1:-1], atol=5e-4, rtol=0)

    def test_respacing_keeps_the_first_and_the_last_timestep_and_their_abar(self):
        for steps in (2, 3, 50, 250, 1000):
            r = self.d.respaced(steps)
            self.assertEqual((len(r.timestep_map), r.timestep_map[0], r.timestep_map[-1]), (steps, 0, 999))
            self.assertTrue((np.diff(r.timestep_map) > 0).all())
            np.testing.assert_allclose(r.abar, self.abar[r.timestep_map], rtol=1e-12)
        for steps in (0, 1, -5, 1001):
            self.assertRaisesRegex(ValueError, "expected 2 to 1000", self.d.respaced, steps)

    def test_sampling_finds_gaussian_data_with_its_exact_denoiser(self):
        """For data N(mu, s^2) the best noise prediction is known; DDPM, DDIM and the steps between must return it."""
        mu, s = 0.3, 0.5

        def exact(x, t, y):
            a = float(self.abar[t.item()])
            eps = math.sqrt(1 - a) * (x - math.sqrt(a) * mu) / (a * s * s + 1 - a)
            return torch.cat([eps, -torch.ones_like(x)], 1)
        for eta in (0.0, 0.5, 1.0):
            x = self.d.sample(exact, None, lambda: torch.randn(4000, 1, 1, 1), steps=200, eta=eta)
            self.assertAlmostEqual(x.mean().item(), mu, delta=0.03)
            self.assertAlmostEqual(x.std().item(), s, delta=0.03)
        for temperature in (0.0, 0.5):           # the drawn std scales along
            x = self.d.denoise(functools.partial(exact, y=None), lambda: torch.randn(4000, 1, 1, 1), 200,
                               temperature=temperature)
            self.assertAlmostEqual(x.mean().item(), mu, delta=0.03)
            self.assertAlmostEqual(x.std().item(), temperature * s, delta=0.05)

    def test_ddpm_steps_are_the_posterior_mean_plus_learned_noise_and_ddim_is_deterministic(self):
        model, r, y = tiny_dit(), self.d.respaced(7), torch.tensor([0, 2])
        noises = torch.randn(7, 2, 1, 8, 8)
        ours = self.d.sample(model, y, functools.partial(next, iter(noises)), steps=7, dtype=torch.float32)
        x = noises[0]
        with torch.no_grad():
            for i in reversed(range(7)):
                p = r.p_mean_variance(model(x, torch.full((2,), int(r.timestep_map[i])), y), x, torch.full((2,), i))
                x = p["mean"] + ((0.5 * p["log_variance"]).exp() * noises[7 - i] if i else 0)
        close(ours, x, rtol=1e-4, atol=1e-4)
        rough = self.d.sample(model, y, functools.partial(next, iter(noises)), steps=7, dtype=torch.bfloat16)
        self.assertTrue(rough.dtype == torch.float32 and 0 < (rough - x).norm() < 0.05 * x.norm())
        first, second = (self.d.sample(model, y, functools.partial(next, iter(noises[:1])), 7, eta=0.0) for _ in "12")
        self.assertTrue(torch.equal(first, second))


class Flow(Numeric):
    """Chapter 6: SiT."""

    def test_points_and_losses_are_the_published_ones(self):
        """x_t = t data + (1 - t) noise; the velocity is data - noise; the second half of the output is not used."""
        flow, model = tf.FlowMatching(), tiny_dit()
        x0, noise = torch.randn(2, 5, 1, 8, 8)
        t, y = torch.rand(5), torch.tensor([0, 1, 2, 3, 0])
        x_t = torch.stack([t[i] * x0[i] + (1 - t[i]) * noise[i] for i in range(5)])
        close(flow.q_sample(x0, t, noise), x_t)
        out = model(x_t, t, y)                   # t as it is, not times 1000
        expected = ((out[:, :1] - (x0 - noise)) ** 2).mean((1, 2, 3))
        close(flow.training_losses(model, x0, t, y, noise)["loss"], expected)
        other = torch.cat([out[:, :1] + 0.5, 7 * out[:, 1:]], 1)
        close(flow.distillation_losses(other, out, x_t, t), torch.full((5,), 0.25))
        t = flow.sample_t(1000)
        self.assertTrue(0 <= t.min() < 0.01 and 0.99 < t.max() <= 1 and 0.45 < t.mean() < 0.55)

    def test_euler_and_heun_follow_the_equation_and_converge_with_their_orders(self):
        """For Gaussian data N(2, 0.5^2) the velocity is known, and so is where every noise must end."""
        m, s, z = 2.0, 0.5, torch.linspace(-3, 3, 200).view(-1, 1, 1, 1)

        def exact(x, t, y):
            return m + (t * s ** 2 - (1 - t)) / (t ** 2 * s ** 2 + (1 - t) ** 2) * (x - t * m)

        def error(solver, steps):
            x = tf.FlowMatching().sample(exact, torch.zeros(200), lambda: z, steps, solver=solver)
            return (x - (m + s * z)).abs().max().item()
        for solver, order in (("euler", 1), ("heun", 2)):
            self.assertTrue(0.8 < math.log2(error(solver, 20) / error(solver, 40)) / order < 1.2, solver)
        self.assertLess(error("heun", 40), 1e-2)
        self.assertRaisesRegex(ValueError, "euler or heun", error, "rk4", 2)

    def test_a_guided_step_follows_the_guided_velocity(self):
        model, y, z = tiny_dit(in_channels=4), torch.tensor([0, 2]), torch.randn(2, 4, 8, 8)

        @torch.no_grad()
        def v(x, t):
            return model.forward_with_cfg(x, torch.full((1,), t), y, 1.5)[:, :4]
        ours = tf.FlowMatching().sample(model, y, lambda: z, 1, 1.5, "heun", dtype=torch.float32)
        close(ours, z + (v(z, 0.0) + v(z + v(z, 0.0), 1.0)) / 2, rtol=1e-4, atol=1e-4)


class Masked(Numeric):
    """Chapter 6: MAR."""

    def setUp(self):
        super().setUp()
        self.x0, self.y = torch.randn(3, 1, 8, 8), torch.tensor([0, 2, 3])
        self.objective = tf.MaskedAutoregression(16, repeats=2)
        self.t = self.objective.sample_t(3)
        self.noise = tf.noise_for(self.x0, self.t)
        self.x_t = self.objective.q_sample(self.x0, self.t, self.noise)

    def test_the_weights_have_the_official_names_and_shapes(self):
        layers = "z_proj z_proj_ln encoder_norm decoder_embed decoder_norm".split()
        for i in range(16):
            for side in (f"encoder_blocks.{i}.", f"decoder_blocks.{i}."):
                layers += [side + name for name in "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2".split()]
        head = ("time_embed.mlp.0 time_embed.mlp.2 cond_embed input_proj final_layer.linear "
                "final_layer.adaLN_modulation.1").split()
        for i in range(8):
            head += [f"res_blocks.{i}.{name}" for name in "in_ln mlp.0 mlp.2 adaLN_modulation.1".split()]
        layers += [f"diffloss.net.{name}" for name in head]
        names = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
        names |= {f"{part}_pos_embed_learned" for part in ("encoder", "decoder", "diffusion")}
        state = tf.unallocated(tf.MAR).state_dict()
        self.assertEqual(state.keys(), names | {"class_emb.weight", "fake_latent", "mask_token"})
        shapes = {"fake_latent": (1, 1024), "mask_token": (1, 1, 1024), "encoder_pos_embed_learned": (1, 320, 1024),
                  "diffusion_pos_embed_learned": (1, 256, 1024)}
        self.assertEqual({name: tuple(state[name].shape) for name in shapes}, shapes)

    def test_the_forward_pass_is_the_published_one(self):
        """An independent float64 version, example by example, without modules."""
        model = tiny_mar().double()
        f, head = Formulas(model), "diffloss.net."

        def block(h, name):                      # h (T, D)
            h = h + f.attention(f.norm(h, name + ".norm1"), name + ".attn")
            u = f.linear(f.norm(h, name + ".norm2"), name + ".mlp.fc1")
            return h + f.linear(u * (1 + torch.erf(u / math.sqrt(2))) / 2, name + ".mlp.fc2")
        t = torch.randint(0, 1000, (3, 16))
        known = [[1, 5, 12], [0, 2, 15], [7, 8, 9]]
        t.scatter_(1, torch.tensor(known), -1)
        x_t = self.objective.q_sample(self.x0.double(), t, self.noise[:3].double())
        expected = []
        for b, image in enumerate(self.x0.double()):
            tokens = [image[:, i:i + 2, j:j + 2].reshape(-1) for i in range(0, 8, 2) for j in range(0, 8, 2)]
            label = f.w["class_emb.weight"][self.y[b]] if self.y[b] < 3 else f.w["fake_latent"][0]
            place = f.w["encoder_pos_embed_learned"][0]
            h = [label + place[i] for i in range(3)] + [f.linear(tokens[i], "z_proj") + place[3 + i] for i in known[b]]
            h = f.norm(torch.stack(h), "z_proj_ln")
            h = block(block(h, "encoder_blocks.0"), "encoder_blocks.1")
            h = f.linear(f.norm(h, "encoder_norm"), "decoder_embed")
            full = [h[3 + known[b].index(i)] if i in known[b] else f.w["mask_token"][0, 0] for i in range(16)]
            h = torch.stack([*h[:3], *full]) + f.w["decoder_pos_embed_learned"][0]
            h = block(block(h, "decoder_blocks.0"), "decoder_blocks.1")
            z = f.norm(h, "decoder_norm")[3:] + f.w["diffusion_pos_embed_learned"][0]
            self.assertTrue(torch.equal(x_t[b, known[b]], torch.stack(tokens)[known[b]]))
            for i in sorted({*range(16)} - {*known[b]}):
                c = f.silu(f.time(t[b, i:i + 1], head + "time_embed")[0] + f.linear(z[i], head + "cond_embed"))
                u = f.linear(x_t[b, i], head + "input_proj")
                for name in (head + "res_blocks.0.", head + "res_blocks.1."):
                    shift, scale, gate = f.linear(c, name + "adaLN_modulation.1").chunk(3)
                    v = f.norm(u, name + "in_ln") * (1 + scale) + shift
                    u = u + gate * f.linear(f.silu(f.linear(v, name + "mlp.0")), name + "mlp.2")
                shift, scale = f.linear(c, head + "final_layer.adaLN_modulation.1").chunk(2)
                expected.append(f.linear(f.norm(u) * (1 + scale) + shift, head + "final_layer.linear"))
        embedder, time = model.diffloss["net"].time_embed, f.time(t[t >= 0], head + "time_embed")
        with torch.no_grad():                    # the frequencies are float32, in the official code too
            close(embedder.float()(t[t >= 0]).double(), time, rtol=1e-3, atol=1e-3)
            embedder.forward = lambda t: time
            close(model(x_t, t, self.y), torch.stack(expected), rtol=1e-9, atol=1e-9)

    def test_the_loss_is_that_of_each_noisy_token_by_itself_repeated_with_other_noise(self):
        model, t, x_t = tiny_mar(), self.t, self.x_t
        self.assertEqual((t.shape, tf.MaskedAutoregression().sample_t(2).shape), ((6, 16), (8, 256)))
        self.assertTrue(torch.equal(t[:3] < 0, t[3:] < 0) and not torch.equal(t[:3], t[3:]))
        cosine = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(0.999, 1 - cosine[1:] / cosine[:-1])
        plain = tf.GaussianDiffusion(betas)
        np.testing.assert_allclose(self.objective.diffusion.abar, np.cumprod(1 - betas))
        tokens, noises = tf.patchify(self.x0.repeat(2, 1, 1, 1), 16), tf.patchify(self.noise, 16)
        self.assertTrue(torch.equal(tokens[0, 5], self.x0[0, 0, 2:4, 2:4].reshape(-1)))
        with torch.no_grad():
            out = model(x_t, t, self.y)
            loss = self.objective.training_losses(model, self.x0, t, self.y, self.noise)["loss"]
            close(out, torch.cat([model(x_t[:3], t[:3], self.y), model(x_t[3:], t[3:], self.y)]))    # copies are apart
        other = out + 0.5 * torch.randn(out.shape)
        losses, distances = torch.zeros(2, 6, 16)
        for row, (b, i) in enumerate((t >= 0).nonzero().tolist()):
            time, share = t[b, i:i + 1], plain.abar[t[b, i]]
            one = math.sqrt(share) * tokens[b, i:i + 1] + math.sqrt(1 - share) * noises[b, i:i + 1]
            close(x_t[b, i:i + 1], one, rtol=1e-4, atol=1e-5)
            terms = plain.losses(out[row:row + 1], tokens[b, i:i + 1], one, time, noises[b, i:i + 1])
            losses[b, i] = terms["loss"].item()
            distances[b, i] = plain.distillation_losses(other[row:row + 1], out[row:row + 1], one, time).item()
        noisy = (t >= 0).sum(1)
        self.assertEqual(len(out), noisy.sum())
        close(loss, (losses.sum(1) / noisy).view(2, 3).mean(0), rtol=1e-3, atol=1e-5)
        close(self.objective.distillation_losses(other, out, x_t, t), distances.sum(1) / noisy)

    def test_the_known_tokens_are_as_many_in_every_example_and_0_to_30_percent(self):
        known = torch.stack([tf.MaskedAutoregression(100).sample_t(4)[:4] < 0 for _ in range(300)])     # (300, 4, 100)
        counts, places = known.sum(2), known.sum((0, 1)).float()
        self.assertTrue((counts == counts[:, :1]).all())
        # of a normal with mean 1 and std 0.25, cut to [0.7, 1], the mean is 1 - 0.25 (0.3989 - 0.1942) / 0.3849 = 0.867
        self.assertTrue(0 <= counts.min() <= 2 and 28 <= counts.max() <= 30 and 11.3 < counts.double().mean() < 14.3)
        self.assertGreater((known[:, 0] != known[:, 1]).any(1).sum(), 280)
        self.assertLess((places - places.mean()).abs().max(), 5 * places.mean().sqrt())
        uneven = torch.eye(16)[:2].cumsum(1).bool()
        condition = tiny_mar().condition
        self.assertRaisesRegex(ValueError, "same number", condition, torch.zeros(2, 16, 4), uneven, self.y[:2])

    def test_sampling_opens_tokens_by_the_cosine_and_guidance_grows_with_them(self):
        """The head says 1 where there is a class, and 0 where there is none, so tokens are the guidance they got."""
        known_counts = []

        def condition(x, known, y):
            known_counts.append(known.sum(1).tolist())
            self.assertTrue((x[known] >= 1).all() and not x[~known].any(), "the encoder must see what was drawn")
            return (y < 3).float().view(-1, 1, 1).expand(-1, 64, 1), []

        def denoise(predict, draw, head_steps, *, temperature, **more):
            self.assertEqual((head_steps, temperature), (7, 0.9))
            eps, v = predict(draw(), torch.tensor([0])).chunk(2, 1)
            self.assertTrue((v == 1).all())      # the variance is that of the class
            return eps

        model = SimpleNamespace(patch_size=1, input_size=8, in_channels=1, y_embedder=tf.LabelEmbedder(3, None, 0.1),
                                condition=condition, diffloss={"net": lambda x, t, z: torch.cat([z, z], 1)})
        objective, draw = tf.MaskedAutoregression(64), tf.noise_source(range(2), (1, 8, 8), 0, DEVICE)
        objective.diffusion.denoise, head = denoise, {"head_steps": 7, "temperature": 0.9}
        images = objective.sample(model, torch.tensor([0, 1]), draw, steps=8, guidance=3.0, **head)
        left = [math.floor(64 * math.cos(math.pi / 2 * i / 8)) for i in range(9)]
        self.assertEqual(known_counts, [[64 - n] * 4 for n in left[:-1]])
        scales = [torch.full((before - n,), 1 + 2 * (64 - max(1, n)) / 64) for before, n in zip(left, left[1:])]
        for image in images:
            close(image.flatten().sort().values, torch.cat(scales))
        self.assertFalse(torch.equal(images[0], images[1]))                  # every image has an order of its own
        known_counts.clear()
        objective.sample(model, torch.tensor([0]), tf.noise_source([0], (1, 8, 8), 0, DEVICE), steps=64, **head)
        self.assertEqual(known_counts, [[n] for n in range(64)])             # at least one is opened
        self.assertRaisesRegex(ValueError, "expected 1 to 64", objective.sample, model, torch.tensor([0]), draw, 65)

    def test_a_mask_of_encoder_and_decoder_is_the_pruned_model_and_has_its_gradient(self):
        model, pruned = tiny_mar(), tf.prune(tiny_mar(), [1, 2])
        mask = torch.tensor([0.0, 1, 1, 0]).repeat(3, 1).requires_grad_()
        out, features = model(self.x_t, self.t, self.y, mask=mask, hidden=(1, 2))
        close(pruned(self.x_t, self.t, self.y, hidden=(0, 1)), (out, features))
        self.assertEqual([f.shape[1] for f in features], [3 + (self.t[0] < 0).sum(), 3 + 16])
        out.square().sum().backward()
        self.assertTrue((mask.grad != 0).all())
        for shallow, depths in ((pruned, (1, 1)), (tf.prune(model, [2, 3]), (0, 2))):
            self.assertEqual((shallow.config()["encoder_depth"], shallow.config()["decoder_depth"]), depths)

    def test_training_drops_activations_and_evaluation_does_not(self):
        block = tiny_mar(dropout=0.5).decoder_blocks[1]
        for p in block.parameters():
            nn.init.ones_(p)                     # all outputs are the same, but for the dropout
        for layer in (block.attn, block.mlp):
            out = layer.train()(torch.ones(100, 5, 16))
            self.assertTrue(0.45 < (out == 0).float().mean() < 0.55)         # after the last linear layer
            left = out[out != 0]
            self.assertGreater(left.std() / left.mean(), 0.02)               # and of attention or hidden activations
            self.assertEqual(len(layer.eval()(torch.ones(100, 5, 16)).unique()), 1)

    def test_the_method_runs_on_all_families_unchanged(self):
        """Learning, pruning and recovery, in every mode, know no model and no objective."""
        self.enterContext(torch.device("cpu"))   # where data are read
        data, groups = tf.toy_digits(40, size=8), [(1, 2)] * 2
        data.labels %= 3
        for teacher, objective in ((tiny_dit(), tf.GaussianDiffusion()), (tiny_dit(), tf.FlowMatching()),
                                   (tiny_mar(), self.objective)):
            teacher.to(DEVICE)
            examples = tf.fixed_examples(objective, data, device=DEVICE)
            loss_fn = tf.masked_denoising(objective, tf.data_batches(data, 8, 0, DEVICE))
            sampler, _ = tf.learn_layers(teacher, loss_fn, groups, 5)
            self.assertTrue(all(torch.isfinite(p).all() and p.any() for p in sampler.parameters()))
            pruned, pairs = tf.prune(teacher, sampler.kept()), tf.match_blocks(groups, sampler.kept(), [2, 4])
            before, weights = tf.calibration_loss(pruned, objective, examples), copy.deepcopy(teacher.state_dict())
            for kd in tf.KD_MODES:
                student = tf.recover(copy.deepcopy(pruned), teacher, objective, tf.data_batches(data, 8, 0, DEVICE),
                                     pairs, 20, kd=kd, beta=2e-4, lr=2e-3)
                self.assertLess(tf.calibration_loss(student, objective, examples), before, kd)
            close(dict(teacher.state_dict()), dict(weights), rtol=0, atol=0)


class Placement(unittest.TestCase):
    """Everything that is computed stays on the model's device. Here that is torch's "meta" device, whose tensors have
    shapes and no numbers, and which refuses to be mixed with the CPU as a GPU does."""

    def setUp(self):
        def on_meta(name, instead):              # for what needs numbers
            real = getattr(torch.Tensor, name)
            self.enterContext(mock.patch.object(torch.Tensor, name, lambda tensor, *args, **more: (
                instead if tensor.is_meta else real)(tensor, *args, **more)))

        def nonzero(tensor, as_tuple):           # 12 of 16 tokens are noisy; 3 + 4 are in the encoder
            rows = len(tensor) * {16: 12, 19: 7}[tensor.shape[1]]
            return torch.empty(2, rows, dtype=torch.long, device="meta").unbind()

        def checked(name):                       # x[i] and x[i] = v take a CPU's numbers on "meta", and on a GPU some
            real = getattr(torch.Tensor, name)

            def call(tensor, key, *value):
                parts = (*key, *value) if isinstance(key, tuple) else (key, *value)
                if tensor.is_meta:
                    self.assertTrue(all(part.is_meta for part in parts if torch.is_tensor(part)))
                return real(tensor, key, *value)
            self.enterContext(mock.patch.object(torch.Tensor, name, call))
        checked("__getitem__")
        checked("__setitem__")
        on_meta("item", lambda tensor: 0.75)
        on_meta("tolist", lambda tensor: list(range(tensor.numel())))        # as many blocks are kept as their number
        on_meta("__bool__", lambda tensor: False)
        on_meta("nonzero", nonzero)
        self.enterContext(mock.patch.object(nn.init, "trunc_normal_", lambda tensor, *args: tensor.fill_(0.75)))
        self.enterContext(mock.patch.object(tf, "autocast", lambda *args: contextlib.nullcontext()))
        adamw = torch.optim.AdamW                # autocast and the fused one are for real devices
        self.enterContext(mock.patch.object(torch.optim, "AdamW", lambda *args, fused, **more: adamw(*args, **more)))

    def test_learning_recovery_sampling_criteria_and_measures_never_leave_the_device_of_the_model(self):
        data, groups = tf.toy_digits(40, size=8), [(1, 2)] * 2
        data.labels %= 3
        for model, objective, more in ((tiny_dit(), tf.GaussianDiffusion(), {}), (tiny_dit(), tf.FlowMatching(), {}),
                                       (tiny_mar(), tf.MaskedAutoregression(16), {"head_steps": 2})):
            teacher = model.to("meta")
            with self.subTest(objective=objective):
                for update in ("lora", "full", "frozen"):
                    loss_fn = tf.masked_denoising(objective, tf.data_batches(data, 8, 0, "meta"))
                    tf.learn_layers(teacher, loss_fn, groups, 1, update=update)
                for kd in tf.KD_MODES:
                    tf.recover(tf.prune(teacher, [0, 3]), teacher, objective, tf.data_batches(data, 8, 0, "meta"),
                               [(0, 1), (1, 3)], 1, kd=kd)
                examples = tf.fixed_examples(objective, data, device="meta")
                for name in ("shortgpt", "flux-lite", "sensitivity", "oracle", "random"):
                    tf.CRITERIA[name](teacher, groups, objective, examples)
                draw = tf.noise_source(range(2), (1, 8, 8), 0, "meta")
                for guidance in (1.0, 1.5):
                    x = objective.sample(teacher, torch.tensor([0, 2], device="meta"), draw, 2, guidance, **more)
                    self.assertEqual((x.shape, x.device.type), ((2, 1, 8, 8), "meta"))
        features = {"mu": np.zeros(3), "sigma": np.eye(3), "features": np.zeros((9, 3), np.float32)}
        self.assertEqual(tf.compare_statistics(features, features, "meta")["recall"], 0.75)


STEPS = "--teacher-steps {0} --learn-steps {0} --recover-steps {0} "
TINY = STEPS.format(3) + f"--samples 10 --sample-steps 2 --batch-size 8 --device {DEVICE} --out"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(HERE)}


def split(*words):
    """Words cut at spaces, paths not, less the flags of TINY that would be refused, because they do nothing."""
    parts = [part for word in words for part in ([str(word)] if isinstance(word, Path) else word.split())]
    stages = parts[parts.index("--stages") + 1] if "--stages" in parts else "measure"
    for applies, flags in (("--ckpt" in parts, ["--teacher-steps"]), ("--criterion" in parts, ["--learn-steps"]),
                           ("measure" not in stages, ["--samples", "--sample-steps"])):
        for flag in flags:
            if applies and TINY in words:
                del parts[parts.index(flag):parts.index(flag) + 2]
    return parts


def call(*words, main=tf.main):
    """A command line run in this process: its exit status, stdout and stderr."""
    arguments = split(*words)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(arguments)
    return status, out.getvalue(), err.getvalue()


load = functools.partial(torch.load, weights_only=True)


def save_images(folder, n, height, width):
    """Random images (n, height, width, 3), which are returned, as 00.png, 01.png ... in a folder."""
    images = np.random.default_rng(n).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return images


def fixed_gradients(accumulate=1, steps=3):
    """The gradients of LoRA and logits in some steps on fixed batches of 8, with fixed random numbers, of which every
    process and part of a batch takes its rows; and all that was trained, from every process."""
    model = tiny_dit()
    teacher, diffusion, sampler = copy.deepcopy(model), tf.GaussianDiffusion(), tf.LayerSampler([(1, 2), (1, 2)])
    weights, found, calls = [*tf.add_lora(model, rank=2), *sampler.parameters()], [], []
    for p in weights[:-2]:
        nn.init.normal_(p, std=0.1)
    for p in weights:
        p.data += tf.rank()                      # the first process's weights must win

    def loss_fn(step):
        torch.manual_seed(step)
        x, noise, y = torch.randn(8, 1, 8, 8), torch.randn(8, 1, 8, 8), torch.randint(0, 3, (8,))
        t, mask = torch.randint(0, 1000, (8,)), sampler(8, tau=1.0)
        part = tf.rank() + tf.world_size() * (len(calls) % accumulate)
        calls.append(step)
        mine = slice(part, None, tf.world_size() * accumulate)
        masked = functools.partial(model, mask=mask[mine])
        loss = diffusion.training_losses(masked, x[mine], t[mine], y[mine], noise[mine])["loss"].mean()
        (h,), (g,) = (net(x[mine], t[mine], y[mine], hidden=(3,))[1] for net in (model, teacher))
        return loss + tf.masked_feature_loss(h, g), {}

    def on_step(step, metrics):
        found.append([p.grad.clone() for p in weights])

    tf.train(model, loss_fn, steps, params=weights, lr=1e-3, accumulate=accumulate, on_step=on_step)
    return found, tf.gather([p.detach() for p in weights])


def torchrun(*command):
    """Run a script in two processes; it must end well. Returns what it printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, env=environment, timeout=300)
    if done.returncode:
        raise AssertionError(done.stderr)
    return done.stdout


class InFolder(unittest.TestCase):
    """Tests with a folder of their own."""

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        torch.manual_seed(0)

    def refused(self, reason, *words, main=tf.main, lines=1):
        """Exit status 2, and one line that names the reason; lines None: after lines of progress."""
        status, _, said = call(*words, main=main)
        self.assertEqual((status, lines or said.count("\n")), (2, said.count("\n")), (words, said))
        self.assertIn(reason, said.splitlines()[-1])

    def assert_same(self, weights, others):
        self.assertEqual(weights.keys(), others.keys())
        for name, weight in weights.items():
            self.assertTrue(torch.equal(weight, others[name]), name)

    def assert_picture(self, path):
        with Image.open(path) as picture:
            self.assertGreater(np.asarray(picture.convert("L")).std(), 5)


class Measuring(InFolder):
    """Features, distances, FID."""

    def test_the_frechet_distance_has_its_closed_forms_and_agrees_with_the_general_matrix_square_root(self):
        """Where the covariances commute: |mu1 - mu2|^2 + sum (sqrt(l1) - sqrt(l2))^2."""
        rng = np.random.default_rng(0)
        Q, _ = np.linalg.qr(rng.normal(size=(20, 20)))
        l1, l2, mu1, mu2 = rng.uniform(0.1, 3, 20), rng.uniform(0.1, 3, 20), rng.normal(size=20), rng.normal(size=20)
        expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(l1) - np.sqrt(l2)) ** 2).sum()
        self.assertAlmostEqual(tf.frechet_distance(mu1, (Q * l1) @ Q.T, mu2, (Q * l2) @ Q.T), expected, places=9)
        s = np.cov(rng.normal(size=(5, 40)).T)                               # singular: 5 samples in 40 dimensions
        self.assertAlmostEqual(tf.frechet_distance(np.zeros(40), s, np.ones(40), 4 * s), 40 + np.trace(s), places=5)
        self.assertAlmostEqual(tf.frechet_distance(np.zeros(3), np.zeros((3, 3)), np.zeros(3), np.eye(3)), 3)
        a, b = rng.normal(size=(500, 30)), rng.normal(size=(500, 30)) @ rng.normal(size=(30, 30)) * 0.2 + 0.3
        (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x.T)) for x in (a, b))
        expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
        self.assertLess(abs(tf.frechet_distance(m1, s1, m2, s2) / expected - 1), 1e-6)

    def test_inception_score_precision_and_recall_see_quality_and_variety(self):
        self.assertAlmostEqual(tf.inception_score(torch.full((50, 10), 0.1)), 1)
        self.assertAlmostEqual(tf.inception_score(torch.eye(10).repeat(5, 1)), 10)
        self.assertGreater(tf.inception_score(torch.eye(10).repeat_interleave(2000, 0)), 9.9, "sorted, in four splits")
        real = torch.cat([torch.randn(200, 4), torch.randn(200, 4) + 50]).to(DEVICE)
        self.assertEqual(tf.precision_recall(real, real), (1, 1))
        self.assertEqual(tf.precision_recall(real, real + 1000), (0, 0))
        precision, recall = tf.precision_recall(real, torch.randn_like(real) * 0.9)            # one of two modes
        self.assertTrue(precision > 0.8 and 0.3 < recall <= 0.5, (precision, recall))

    def test_images_are_looked_at_without_tf32_and_masks_are_exact_whatever_the_caller_has_set(self):
        self.addCleanup(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("high")
        seen = []

        def net(x, **_):
            seen.extend(backend.fp32_precision for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv))
            if GPU:
                a, b = torch.randn(2, 300, 300, device=DEVICE)
                torch.testing.assert_close((a @ b).double(), a.double() @ b.double(), rtol=1e-4, atol=1e-4)
            return torch.zeros(1, 1)
        with mock.patch.object(torch.jit, "load", return_value=mock.Mock(eval=lambda: net)):
            tf.load_inception("net.pt", "cpu")(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
        judge, _ = tf.train_judge(tf.toy_digits(40, size=8), "cpu", steps=2)
        with mock.patch.object(tf, "to_float", lambda images: net(images) + images):
            judge(torch.zeros(1, 1, 8, 8))
        self.assertEqual((len(seen), set(seen)), (10, {"ieee"}))
        self.assertEqual(torch.get_float32_matmul_precision(), "high")
        for sampler in (tf.LayerSampler([(2, 4)]).to(DEVICE), tf.TopNSampler(2, 4).to(DEVICE)):
            with torch.autocast(DEVICE, torch.bfloat16):
                masks = sampler(500)
            self.assertTrue(((masks == 0) | (masks == 1)).all() and (masks.sum(1) == 2).all())

    def test_fid_is_the_same_from_a_folder_an_npz_file_and_saved_statistics(self):
        folder = self.folder
        a, b = save_images(folder / "a", 60, 12, 12), save_images(folder / "b" / "sub", 50, 12, 12)
        torch.jit.script(StandIn()).save(folder / "net.pt")
        np.savez(folder / "a.npz", arr_0=a, settings="250 steps, guidance 1.5")
        np.savez_compressed(folder / "b.npz", arr_0=b)
        with torch.no_grad():
            x, y = (StandIn()(torch.from_numpy(z).permute(0, 3, 1, 2), return_features=True).numpy() for z in (a, b))
        expected = tf.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
        np.savez(folder / "ours.npz", mu=x.mean(0), sigma=np.cov(x.T))
        np.savez(folder / "adm.npz", mu=y.mean(0), sigma=np.cov(y.T), arr_0=b[:30])
        inception = ["--inception", folder / "net.pt"]
        for one, other in (("a", "b"), ("a", "b.npz"), ("a.npz", "b"), ("a.npz", "adm.npz"), ("ours.npz", "adm.npz")):
            net = inception if one != "ours.npz" else []
            status, words, said = call("--device cpu --fid", folder / one, "--ref", folder / other, *net)
            self.assertEqual(status, 0, said)
            self.assertIn(f"FID {expected:.4g}", words)
            self.assertEqual((", precision 0." in words, "60 samples" in words), (bool(net),) * 2, words)
            self.assertEqual("250 steps, guidance 1.5" in words, one == "a.npz")
            self.assertEqual("warning: an FID of 60 images" in words, bool(net))
            self.assertEqual("warning: an FID of 50 images" in words, other in ("b", "b.npz"))
        torch.jit.script(nn.ReLU()).save(folder / "other.pt")
        (folder / "torn.npz").write_bytes((folder / "b.npz").read_bytes()[:-900])
        (folder / "empty").mkdir()
        np.savez(folder / "grey.npz", arr_0=a[..., 0])
        np.savez(folder / "wide.npz", mu=np.zeros(3), sigma=np.eye(3))
        np.savez(folder / "nan.npz", mu=np.full(8, np.nan), sigma=np.eye(8))
        save_images(folder / "one", 1, 12, 12)
        start = ["--device cpu --fid", folder / "a"]
        for other in "empty nothing one nothing.npz torn.npz grey.npz nan.npz".split():
            self.refused(str(folder / other), *start, "--ref", folder / other, *inception)
        self.refused("expected (F,) and (F, F)", *start, "--ref", folder / "wide.npz", *inception)
        self.refused("--inception FILE is needed", *start, "--ref", folder / "b")
        for net in ("a.npz", "other.pt"):
            self.refused("TorchScript", *start, "--ref", folder / "b", "--inception", folder / net)

    def test_measuring_goes_on_where_it_was_stopped_and_does_not_draw_again_what_is_on_disk(self):
        model, diffusion, drawn, stop = tiny_dit(), tf.GaussianDiffusion(), [], None
        models, labels = {"one": model, "other": tf.prune(model, [0, 3])}, torch.arange(40) % 3

        def look(images):
            return images.flatten(1)[:, ::9].numpy() / 255, np.full((len(images), 3), 1 / 3)

        def draw(model, labels, index):
            drawn.append((len(model.blocks), index[0]))
            if len(drawn) == stop:
                raise KeyboardInterrupt
            return tf.sample_images(model, labels, index, diffusion=diffusion, seed=0, sampling={"steps": 2})

        def rows(folder):
            folder.mkdir(exist_ok=True)
            found, _ = tf.measure(models, labels, draw, look, real, folder, batch_size=8)
            self.assertEqual(found["one"]["speed_up"], 1)    # as fast as itself
            return {name: row | {"images_per_second": 0, "speed_up": 0} for name, row in found.items()}
        digits = tf.toy_digits(60, size=8).images
        real = tf.statistics([look(part) for part in digits.split(7)])
        np.testing.assert_allclose(real["sigma"], np.cov(look(digits)[0].T), rtol=1e-5, atol=1e-9)
        whole, every = rows(self.folder / "whole"), drawn.copy()
        self.assertEqual(every, [(depth, first) for first in range(0, 40, 8) for depth in (4, 2)], "they take turns")
        drawn.clear()
        stop = 4
        with self.assertRaises(KeyboardInterrupt):
            rows(self.folder / "stopped")
        written = {path: path.stat().st_mtime_ns for path in (self.folder / "stopped").iterdir()}
        self.assertEqual(rows(self.folder / "stopped"), whole)
        self.assertEqual({path: path.stat().st_mtime_ns for path in written}, written, "no file is written twice")
        self.assertEqual(drawn, every[:4] + every[3:])


class Data(InFolder):
    """Images, latents, encoding."""

    def test_the_digits_are_ten_classes_of_upright_grey_images_and_the_same_every_time(self):
        data = tf.toy_digits(100)
        self.assertTrue(torch.equal(data.images, tf.toy_digits(100).images))
        self.assertEqual((data.images.shape, len(data.classes)), ((100, 1, 16, 16), 10))
        ink = (data.images > 64).any(3).sum((1, 2))                          # rows with ink
        self.assertTrue((ink >= 12).all() and (ink <= 16).all() and data.images[:, :, 0].float().mean() < 60)

    def test_images_are_grey_or_all_rgb_and_cropped_from_the_middle_and_broken_files_are_named(self):
        for name in ("b", "a"):
            (self.folder / name).mkdir()
            for i in range(3):
                Image.new("L", (20, 14), 50 * i).save(self.folder / name / f"{i}.png")
        data = tf.open_data(self.folder, 8)
        self.assertEqual((data.images.shape, data.labels.tolist()), ((6, 1, 8, 8), [0, 0, 0, 1, 1, 1]))
        self.assertEqual(data.classes, ["a", "b"])
        Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(self.folder / "a" / "sixteen-bits.png")
        Image.new("P", (8, 8)).save(self.folder / "a" / "palette.gif")
        Image.new("RGBA", (8, 8), (255, 0, 0, 51)).save(self.folder / "a" / "transparent.png")
        turned = Image.new("L", (8, 8))
        turned.paste(255, (0, 0, 8, 4))          # the upper half is white, the right one after turning
        turned.getexif()[0x0112] = 6
        turned.save(self.folder / "a" / "turned.png", exif=turned.getexif())
        (self.folder / "b" / ".hidden").mkdir()
        (self.folder / "b" / ".hidden" / "file.png").write_text("is skipped")
        data = tf.open_data(self.folder, 8)
        self.assertEqual((data.images.shape, data.images[4, 0, 0, 0].item()), ((10, 3, 8, 8), 128))
        self.assertEqual(data.images[5, :, 0, 0].tolist(), [255, 204, 204], "red on white")
        self.assertEqual(data.images[6, 0, :, ::7].tolist(), [[0, 255]] * 8)
        Image.new("F", (8, 8)).save(self.folder / "b" / "float.tif")
        self.assertRaisesRegex(tf.UserError, "float.tif: .* no known range", tf.open_data, self.folder, 8)
        (self.folder / "a" / "torn.png").write_bytes(b"no image")
        self.assertRaisesRegex(tf.UserError, "torn.png: ", tf.open_data, self.folder, 8)
        for size in ((100, 37), (16, 300), (9, 7)):
            self.assertEqual(tf.center_crop(Image.new("RGB", size), 16).size, (16, 16))
        stripes = Image.fromarray(np.repeat(np.array([0] * 16 + [200] * 16 + [0] * 16, np.uint8)[None], 16, 0))
        self.assertTrue((np.asarray(tf.center_crop(stripes, 16)) == 200).all())

    def test_the_labels_of_data_for_a_checkpoint_are_matched_by_the_names_of_its_classes(self):
        images, labels = torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1])
        for classes, names, expected in ((["3", "7"], list("01234567"), [3, 7, 7]), (["b", "c"], ["b", "c"], [0, 1, 1]),
                                         (["0", "1"], list("abc"), [0, 1, 1]), (["x", "y"], ["0", "1"], [0, 1, 1])):
            data = tf.with_classes(tf.Dataset(images, labels, classes), names)
            self.assertEqual((data.labels.tolist(), data.classes), (expected, classes if "x" in classes else names))
        for names in (list("abc"), list("012")):
            self.assertRaisesRegex(tf.UserError, "x, y", tf.with_classes, tf.Dataset(images, labels, ["x", "y"]), names)

    def latents(self, n=20):
        """A folder with the pair of files, and one in the public layout, of the same latents: 2 i + m in the middle."""
        x = np.arange(2 * n, dtype=np.float32).reshape(n, 2, 1, 1, 1) + np.zeros((4, 4, 4), np.float32)
        pair, features, labels = (self.folder / name for name in
                                  ("pair", "files/imagenet256_features", "files/imagenet256_labels"))
        for folder in (pair, features, labels):
            folder.mkdir(parents=True)
        np.save(pair / "latents.npy", x)
        np.save(pair / "labels.npy", np.arange(n) % 7)
        for i in range(n):
            np.save(features / f"{i}.npy", x[i])
            np.save(labels / f"{i}.npy", np.array([i % 7]))
        return pair, features, labels

    def test_latents_in_two_files_and_in_many_give_the_same_batches_half_of_them_mirrored(self):
        pair, files = (tf.open_data(folder, 8) for folder in (self.latents()[0], self.folder / "files"))
        self.assertIsInstance(pair.images, np.memmap)
        self.assertEqual((pair.shape, len(pair.classes), pair.describe()), ((4, 4, 4), 7, files.describe()))
        both, seen = [tf.data_batches(data, 4, seed=0) for data in (pair, files)], []
        for _ in range(50):
            (x, y), (x2, y2) = map(next, both)
            seen.append(x[:, 0, 0, 0].long())
            self.assertTrue(torch.equal(x, x2) and torch.equal(y, y2) and torch.equal(seen[-1] // 2 % 7, y))
        self.assertEqual([len((torch.cat(seen[i:i + 5]) // 2).unique()) for i in (0, 5)], [20, 20], "epochs")
        self.assertTrue(70 < (torch.cat(seen) % 2).sum() < 130, "200 coins")
        for start in (3, 7):                     # from any step on
            self.assertTrue(torch.equal(next(tf.data_batches(pair, 4, 0, start=start))[0][:, 0, 0, 0], seen[start]))

    def test_processes_and_parts_share_a_batch(self):
        pair, found = tf.open_data(self.latents()[0], 8), []
        for rank in (0, 1):
            with mock.patch.multiple(tf, rank=lambda: rank, world_size=lambda: 2):
                stream = tf.data_batches(pair, 8, 0, start=3, parts=2)
                found += [next(stream)[0] for _ in range(2)]
        self.assertEqual([len(x) for x in found], [2] * 4)
        whole = next(tf.data_batches(pair, 8, 0, start=3))[0]
        self.assertTrue(torch.equal(torch.cat(found)[:, 0, 0, 0].sort().values, whole[:, 0, 0, 0].sort().values))

    def test_an_odd_exif_entry_does_no_harm(self):
        odd = struct.pack("<HHL4s", 0x100, 2, 4, b"odd")                     # words in the place of a number
        turned = struct.pack("<HHLHH", 0x112, 3, 1, 6, 0)
        exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + odd + turned + bytes(4)
        Image.new("L", (6, 4)).save(self.folder / "a.jpg", exif=exif)
        self.assertEqual(tf.read_image(self.folder / "a.jpg").shape, (1, 6, 4))

    def test_data_that_cannot_be_used_is_refused_with_the_reason(self):
        def refused(folder, reason):
            with self.assertRaisesRegex(tf.UserError, reason):
                next(tf.data_batches(tf.open_data(folder, 8), 20, seed=0))
        pair, features, labels = self.latents()
        good = np.load(pair / "latents.npy")
        for content, reason in ((good[:5], "5 latents"), (good[:, 0], "as many labels"), (good.astype(object), "npy")):
            np.save(pair / "latents.npy", content)
            refused(pair, reason)
        np.save(pair / "latents.npy", good)
        for names, reason in ((["a", "b"], "only 2 names"), (5, "a list of names")):
            tf.write_json(pair / "classes.json", {"classes": names})
            refused(pair, reason)
        np.save(pair / "labels.npy", np.arange(20) / 2)
        refused(pair, "whole number")
        for content in (good[0, :1], good[0, :, :, :3]):
            np.save(features / "11.npy", content)
            refused(self.folder / "files", "11.npy: an array")
        (features / "11.npy").write_bytes(b"torn")
        refused(self.folder / "files", "11.npy")
        np.save(labels / "99.npy", np.array([1]))
        refused(self.folder / "files", "labels/99.npy has no file")
        (labels / "1.npy").unlink()
        refused(self.folder / "files", "^[^:]*labels/1.npy: [^:]*: '[^:]*$")            # the reason once
        save_images(self.folder / "images" / "a", 2, 8, 8)
        (self.folder / "images" / "empty").mkdir()
        refused(self.folder / "images", "empty: no such folder, or no images")
        (self.folder / "images" / "notes.txt").touch()
        refused(self.folder / "images", "notes.txt is in no class folder")

    def test_an_encoding_killed_at_any_point_goes_on_with_the_same_command(self):
        """Before and after everything it does: every VAE call, every count, and the removal of the counter."""
        def around(function):
            def counted(*args, **more):
                for part in (lambda: None, lambda: function(*args, **more)):
                    result = part()
                    events.append(1)
                    if len(events) == stop:
                        raise KeyboardInterrupt
                return result
            return counted

        def encode(out, vae="toy"):
            with (mock.patch.object(ToyVAE, "encode", around(ToyVAE.encode)),
                  mock.patch.object(tf, "write_json", around(tf.write_json)),
                  mock.patch.object(Path, "unlink", around(Path.unlink))):
                call(main=lambda _: tf.encode_images(images, 32, ToyVAE(), out, {"--vae": vae}, batch_size=3))
            return {path.name: path.read_bytes() for path in out.glob("[!.]*")}
        images, events, stop = self.folder / "images", [], None
        save_images(images / "a", 3, 32, 50)
        image = torch.from_numpy(save_images(images / "b", 4, 32, 32)[0]).permute(2, 0, 1)
        whole = encode(self.folder / "whole")
        self.assertEqual(whole.keys(), {"latents.npy", "labels.npy", "classes.json"})
        data = tf.open_data(self.folder / "whole", 8)
        self.assertEqual((data.shape, data.labels.tolist(), data.latent), ((4, 4, 4), [0] * 3 + [1] * 4, True))
        self.assertEqual(data.classes, ["a", "b"])
        for mirrored, original in enumerate((image, image.flip(2))):
            x = ToyVAE().decode(data.read(torch.tensor([3]), torch.tensor([mirrored])))[0, :, ::8, ::8]
            self.assertLess((x.float() - original[:, ::8, ::8]).abs().max(), 8)
        for number in range(1, len(events)):     # the last event is after the end
            out, stop = self.folder / f"killed-{number}", number
            events.clear()
            with self.assertRaises(KeyboardInterrupt):
                encode(out)
            stop = None
            if (out / "latents.json").exists():
                with self.assertRaisesRegex(tf.UserError, "run the same --encode command again"):
                    tf.open_data(out, 32)
                if tf.read_json(out / "latents.json")["done"]:
                    with self.assertRaisesRegex(tf.UserError, "--vae toy .now other."):
                        encode(out, "other")
            self.assertEqual(encode(out), whole, number)
        with self.assertRaisesRegex(tf.UserError, "is there already"):
            encode(self.folder / "whole")

    def test_a_broken_image_ends_an_encoding_with_its_name_and_a_repaired_one_goes_on(self):
        save_images(self.folder / "images" / "a", 20, 32, 32)
        broken, out = self.folder / "images" / "a" / "17.png", self.folder / "new" / "out"
        whole = broken.read_bytes()
        broken.write_bytes(whole[:100])
        words = ["--device cpu --vae toy --image-size 32 --encode", self.folder / "images", "--out", out]
        self.enterContext(mock.patch.object(tf, "VAE", ToyVAE))
        with mock.patch.object(ToyVAE, "encode", side_effect=RuntimeError("kernel size")):
            self.refused("--image-size 32: kernel size", *words)
        self.assertFalse(out.exists())
        with mock.patch.object(os, "posix_fallocate", side_effect=OSError("disk full")):
            self.refused("latents.npy: disk full", *words)
        self.refused("17.png", *words, lines=None)
        broken.write_bytes(whole)
        (self.folder / "images").rename(self.folder / "moved")
        words[1] = self.folder / "moved"
        locked = tf.lock(out)
        self.refused("is in use", *words)
        locked.close()
        self.assertEqual(call(*words)[0], 0)
        self.assertEqual(len(tf.open_data(out, 32).labels), 20)

    def test_a_vae_of_diffusers_encodes_and_decodes_or_says_what_to_install(self):
        with mock.patch.dict(sys.modules, {"diffusers": None}):
            with self.assertRaisesRegex(tf.UserError, "pip install diffusers"):
                tf.VAE("any", "cpu")
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            self.skipTest("the rest needs pip install diffusers")
        net = AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4).eval()
        net.save_pretrained(self.folder / "vae")
        vae, images, noise = tf.VAE(self.folder / "vae", "cpu"), tf.toy_digits(3, 32).images, torch.randn(3, 4, 4, 4)
        images = images.expand(-1, 3, -1, -1)
        with torch.no_grad():
            posterior = net.encode(tf.to_float(images)).latent_dist
            latents = (posterior.mean + posterior.std * noise) * 0.18215
            torch.testing.assert_close(vae.encode(images, noise), latents)
            self.assertTrue(torch.equal(vae.decode(latents), tf.to_uint8(net.decode(latents / 0.18215).sample)))
        for name, reason in ((self.folder / "vae", "4 channels, not 16"), ("/nothing", "--vae /nothing: ")):
            self.assertRaisesRegex(tf.UserError, reason, tf.VAE, name, "cpu", 16)


class Training(InFolder):
    """The loop: averages, compiling, stopping and going on."""

    def test_the_rate_warms_up_and_falls_along_a_cosine_and_an_unused_weight_has_a_gradient_of_zeros(self):
        model, rates = nn.Linear(1, 1), []
        tf.train(model, lambda step: (model.weight.square().sum(), {}), 100, lr=1.0, final_lr_ratio=0.5, warmup=10,
                 on_step=lambda step, metrics: rates.append(metrics["lr"]))
        np.testing.assert_allclose([rates[0], rates[50], rates[99]], [1 / 11, 0.75, 0.5], atol=1e-3)
        self.assertEqual(model.bias.grad.item(), 0)

    def test_the_average_of_the_weights_is_exponential_and_warms_up(self):
        for decay, steps in ((0.9, 4), (0.2, 30)):
            model, seen = nn.Linear(1, 1, bias=False), []
            average = tf.train(model, lambda step: (model.weight.sum(), {}), steps, lr=0.1, ema_decay=decay,
                               on_step=lambda step, metrics: seen.append(model.weight.item()))
            expected = seen[0]
            for n, weight in enumerate(seen):
                d = min(decay, (1 + n) / (10 + n))
                expected = d * expected + (1 - d) * weight
            self.assertAlmostEqual(average.weight.item(), expected, places=5)

    def test_all_blocks_run_compiled_while_learning_and_recovering_with_few_graphs(self):
        """torch gives up on a block that was compiled in 8 variants: an error here. Only the compiler is left out."""
        def count(graph, example):
            graphs.append(graph)
            return graph
        graphs, compiling = [], functools.partialmethod(nn.Module.compile, backend=count)
        self.enterContext(mock.patch.object(nn.Module, "compile", compiling))
        self.enterContext(torch._dynamo.config.patch(fail_on_recompile_limit_hit=True))
        teacher, diffusion = tiny_dit(num_classes=10).to(DEVICE), tf.GaussianDiffusion()
        data = tf.toy_digits(200, size=8)

        def learn():
            loss_fn = tf.masked_denoising(diffusion, tf.data_batches(data, 12, 0, DEVICE))
            tf.learn_layers(teacher, loss_fn, [(1, 2)] * 2, 10, prepare=tf.compile_blocks)

        def recover():
            compiled, student = copy.deepcopy(teacher), tf.prune(teacher, [0, 3])
            for model in (compiled, student):
                tf.compile_blocks(model)
            tf.recover(student, compiled, diffusion, tf.data_batches(data, 12, 0, DEVICE), [(0, 1), (1, 3)], 5)
        for stage in (learn, recover, learn):    # the last one in a process has its graphs too
            stage()
            self.assertTrue(0 < len(graphs) <= 8, len(graphs))
            graphs.clear()

    def test_only_what_is_out_of_memory_is_called_so(self):
        for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
            self.refused("--accumulate", main=lambda _: tf.guarded("x", mock.Mock(side_effect=error)))
        no_compiler = RuntimeError("InvalidCxxCompiler: No working C++ compiler found")
        self.refused("--compile needs", main=lambda _: tf.guarded("x", mock.Mock(side_effect=no_compiler)))
        with self.assertRaisesRegex(RuntimeError, "illegal memory access"):
            tf.guarded("x", mock.Mock(side_effect=RuntimeError("CUDA error: an illegal memory access was encountered")))

    def test_a_run_killed_again_and_again_ends_bit_for_bit_like_one_never_stopped(self):
        """And SIGTERM, which is handled as Ctrl-C is, ends it in one line."""
        words = STEPS.format(15) + "--stages teacher,learn,recover"
        whole, killed = self.folder / "whole", self.folder / "killed"
        self.assertEqual(call(TINY, whole, words)[0], 0)
        often = "import sys, tinyfusion as tf; tf.SAVE_EVERY = 2; sys.exit(tf.main())"
        ways = ((signal.SIGKILL, ["-c", often]), (signal.SIGTERM, [tf.__file__]))

        def states():
            return {path.name: path.stat().st_mtime_ns for path in killed.glob("*.pt")}
        for (number, program), seconds in zip(ways, np.random.default_rng(0).uniform(0, 0.4, 2)):
            before = states()
            run = subprocess.Popen([sys.executable, *program, *split(TINY, killed, words)], env=ENVIRONMENT,
                                   text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            while run.poll() is None and states() == before:
                time.sleep(0.01)                 # until it has come further
            time.sleep(seconds)
            run.send_signal(number)
            said = run.communicate(timeout=20 if number != signal.SIGKILL else None)[1]
            self.assertFalse((killed / "student.pt").exists())
            if number != signal.SIGKILL:
                self.assertEqual((run.returncode, "Traceback" in said), (130, False), said)
                self.assertIn("all files are whole", said.splitlines()[-1])
        self.assertEqual(call(TINY, killed, words)[0], 0)
        for name in ("teacher.pt", "student.pt"):
            self.assert_same(load(whole / name)["ema"], load(killed / name)["ema"])
        self.assertEqual(*((folder / "layers.json").read_text() for folder in (whole, killed)))
        self.assertEqual(*({path.name for path in folder.iterdir()} for folder in (whole, killed)))


class Files(InFolder):
    """Checkpoints in and out, and sample.py."""

    def setUp(self):
        super().setUp()
        self.path = self.folder / "model.pt"
        tf.save_checkpoint(self.path, tiny_dit(), "ddpm", {"steps": 3, "guidance": 1.0, "eta": 1.0}, ["a", "b", "c"])

    def test_pictures_cut_long_class_names_number_foreign_ones_and_drop_the_losses_of_a_run_begun_again(self):
        self.assertEqual([tf.fitting(word, 60, 7) for word in ("cat", "Käse", "日本")], ["cat", "7", "7"])
        cut = tf.fitting("hippopotamus", 60, 7)
        self.assertTrue(cut.endswith("…") and "hippopotamus".startswith(cut[:-1]) and len(cut) > 4, cut)
        grid = tf.image_grid(torch.zeros(4, 1, 32, 32, dtype=torch.uint8), 2, [("a", 0)] * 4)
        self.assertEqual(grid.size, (2 * 66, 2 * 84), "small images are magnified, and their classes stand above them")
        steps = [1, 2, 3, 4, 2, 3]               # stopped after step 4, and gone on from step 1
        lines = [json.dumps({"stage": "recover", "step": step, "loss": 9.0, "denoising": step}) for step in steps]
        (self.folder / "log.jsonl").write_text("\n".join([*lines, '{"stage": "rec']))
        with mock.patch.object(tf, "axes", wraps=tf.axes) as axes:
            tf.draw_losses(self.folder / "losses.png", self.folder / "log.jsonl")
        self.assertEqual(axes.call_args.args[4], [(1, 1), (2, 2), (3, 3)])
        self.assert_picture(self.folder / "losses.png")
        path, history = self.folder / "picture.png", [(0, [0.5, 0.5]), (1, [0.6, 0.4])]
        sheet = Image.new("RGB", (9, 9))
        dots = {(0.1, 5.0): ["a"], (0.1, 5.001): ["b"], (1, 9): []}
        for draw, names in ((lambda: tf.draw_decisions(path, history, [(1, 2)], [0]), 6),
                            (lambda: tf.draw_recoverability(path, dots, "FID"), 4),
                            (lambda: tf.axes(sheet, 0, 0, 9, [(4e5, 0.04)], ("x", "y"), (False, True)), 2)):
            with mock.patch.object(tf, "text", wraps=tf.text) as text:
                draw()
            words = {call.args[2]: call.args[1] for call in text.call_args_list}
            self.assertEqual(len(words), names + (5 if "step" in words else 10), f"five ticks differ: {words}")
            self.assertGreater(abs(words["a"][1] - words["b"][1]) if "a" in words else 13, 12, "names stand apart")
        self.assertEqual(tf.spread([1.0], 1), "1.0 (1 seed)")

    def test_a_full_disk_or_a_signal_amid_a_write_leaves_the_old_file_and_no_other(self):
        def write(file):
            file.write(b"new")
            raise error

        class Buffer(io.BytesIO):                # Ctrl-C amid torch.save, which must not abort
            def write(self, data):
                if not self.tell():
                    super().write(data)
                    raise KeyboardInterrupt
                return super().write(data)
        before = self.path.read_bytes()
        with mock.patch.object(io, "BytesIO", Buffer):
            body = functools.partial(tf.write_torch, self.path, {"weight": torch.zeros(10)})
            self.assertEqual(call(main=lambda _: tf.guarded("x", body))[0], 130)
        for error, status in ((OSError("disk full"), 2), (KeyboardInterrupt(), 130)):
            ended, _, said = call(main=lambda _: tf.guarded("x", lambda: tf.write_file(self.path, write)))
            self.assertEqual((ended, "model.pt: disk full; when that is mended" in said), (status, status == 2), said)
            self.assertEqual((self.path.read_bytes(), os.listdir(self.folder)), (before, ["model.pt"]))

    def test_checkpoints_of_the_official_layouts_and_ours_load_bit_for_bit(self):
        model, content = tf.load_checkpoint(self.path)
        self.assert_same(tiny_dit().state_dict(), model.state_dict())
        self.assertEqual((model.config(), content["sampling"]["steps"]), (tiny_dit().config(), 3))
        sizes, args = {"input_size": 16, "in_channels": 4, "num_classes": 7}, argparse.Namespace(lr=1e-4)
        small = functools.partial(tf.MAR_models["MAR-toy"], patch_size=1, dropout=0.1, encoder_depth=1, decoder_depth=2)
        for build, ema in ((functools.partial(tf.DiT_models["toy"], depth=3), "ema"), (small, "model_ema")):
            model, other = lively(build(**sizes), 0.05), build(**sizes)
            weights, words = model.state_dict(), ["--num-images 2 --guidance 1 --steps 2 --ckpt", self.path]
            for layout in (weights, {"model": {f"module.{name}": weight for name, weight in weights.items()}},
                           {"model": other.state_dict(), ema: weights, "opt": {}, "args": args, "train_steps": 5}):
                torch.save(layout, self.path)
                loaded, content = tf.load_checkpoint(self.path)
                self.assertEqual((loaded.config(), len(content["classes"])), (model.config(), 7))
                self.assert_same(weights, loaded.state_dict())
            for p, q in zip(loaded.parameters(), model.parameters()):
                self.assertEqual(p.requires_grad, q.requires_grad)
            self.refused("draws 4 channels", *words, main=sample.main)
            self.assertEqual(call(*words, "--npz", self.folder / "a.npz", main=sample.main)[0], 0)
            self.assertEqual(tf.load_arrays(self.folder / "a.npz")["latents"].shape, (2, 4, 16, 16))
        tf.save_checkpoint(self.path, loaded, "mar", content["sampling"], content["classes"])
        other.load_state_dict(load(self.path)["ema"], strict=True)           # as the official find_model reads it
        self.assert_same(weights, other.state_dict())

    def test_the_size_and_name_of_official_models_are_told_from_their_shapes(self):
        """Of files as large as a DiT-XL's too; here all their weights are one and the same zero."""
        for name, row in tf.PRESETS.items():
            model = tf.unallocated(row["network"])
            self.assertEqual(tf.preset_name(model, row["objective"]), name)
            if name != "MAR-toy":                # official MARs have patch 1
                told = functools.partial(type(model), **tf.config_of(model.state_dict()))
                no_trace = {key: 0.1 for key in ("class_dropout_prob", "dropout") if key in model.config()}
                self.assertEqual(tf.unallocated(told).config(), model.config() | no_trace, name)
        for name in ("DiT-XL/2", "DiT-D14/2", "DiT-D7/2", "SiT-XL/2", "MAR-B"):
            weights = tf.unallocated(tf.PRESETS[name]["network"]).state_dict()
            torch.save({key: torch.zeros(()).expand(weight.shape) for key, weight in weights.items()}, self.path)
            _, content = tf.load_checkpoint(self.path, name=name if "SiT" in name else None)
            self.assertEqual((content["name"], content["objective"]), (name, tf.PRESETS[name]["objective"]))

    def test_bad_checkpoints_are_refused_in_one_line_and_nothing_is_run(self):
        class Attack:
            def __reduce__(self):
                return os.mkdir, (str(folder / "attacked"),)
        folder, good = self.folder, load(self.path)
        bad = {"attack": {"ema": Attack()}, "plain": good["ema"], "other": {"weight": torch.zeros(3)}, "list": [1]}
        for name, more in (("depth", {"depth": 5}), ("foreign", {"layers": 5}), ("absurd", {"hidden_size": 40_000_000}),
                           ("deep", {"depth": 10 ** 9})):
            bad[name] = good | {"config": good["config"] | more}
        bad["shape"] = {"x_embedder.proj.weight": torch.zeros(64, 1, 4, 4), "pos_embed": torch.zeros(4)}
        bad["classes"], bad["sampling"] = good | {"classes": ["a", "b"]}, good | {"sampling": {"steps": "many"}}
        for name, objective in (("mar", "mar"), ("foo", "foo"), ("three", [3])):
            bad[name] = good | {"objective": objective}
        for name, content in bad.items():
            torch.save(content, folder / f"{name}.pt")
        for name, content in (("torn", self.path.read_bytes()[:-2000]), ("noise", b"noise" * 100), ("empty", b"")):
            (folder / f"{name}.pt").write_bytes(content)
        for reason, names in (("no such file", "missing"), ("nothing in it was run", "attack"), ("width 16", "plain"),
                              ("not a PyTorch file", "torn noise empty"), ("not one of this", "list"),
                              ("more blocks", "deep"), ("do not fit its model", "classes sampling"),
                              ("disagree", "other absurd depth foreign shape"),
                              ("objective", "mar foo three")):
            for name in names.split():
                for main in (tf.main, sample.main):
                    self.refused(reason, "--ckpt", folder / f"{name}.pt", main=main)
        self.assertFalse((folder / "attacked").exists())

    def test_the_same_seed_draws_the_same_image_whatever_the_batch_size(self):
        mar, sampling = self.folder / "mar.pt", {"steps": 4, "guidance": 1.0, "head_steps": 5}
        tf.save_checkpoint(mar, tiny_mar(), "mar", sampling, ["a", "b", "c"])
        for path in (self.path, mar):
            drawn = []
            for size in (6, 4, 1):
                words = ["--num-images 6 --seed 3 --guidance 2 --ckpt", path, f"--batch-size {size}"]
                self.assertEqual(call(*words, "--npz", self.folder / "a.npz", main=sample.main)[0], 0)
                drawn.append(tf.load_arrays(self.folder / "a.npz")["arr_0"].astype(int))
                self.assertLessEqual(abs(drawn[0] - drawn[-1]).max(), 1)     # a rounding may tip a pixel by one level
            self.assertEqual((drawn[0].shape, drawn[0].std() > 1), ((6, 8, 8, 3), True))


class Quick(InFolder):
    """Tests of whole runs, on 64 digits and with a judge of five steps: any will do."""

    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.object(tf, "toy_digits", functools.partial(tf.toy_digits, 64)))
        self.enterContext(mock.patch.object(tf, "train_judge", functools.partial(tf.train_judge, steps=5)))

    def story(self, *words):
        """Run the program and return what it printed."""
        status, out, said = call(TINY, *words)
        self.assertEqual(status, 0, said)
        return out


class Processes(Quick):
    """torchrun."""

    def test_parts_of_a_batch_and_two_processes_have_the_gradients_of_the_whole_batch(self):
        """And two processes that are stopped and go on end bit for bit like two that never were, and draw as one."""
        steps, two, stopped = STEPS.format(4) + "--device cpu", self.folder / "two", self.folder / "stopped"
        (self.folder / "script.py").write_text(
            f"import contextlib, functools, itertools, sys, torch, tinyfusion as tf, {Path(__file__).stem} as t\n"
            "from pathlib import Path\n"
            "run_stages, data_batches = tf.run_stages, tf.data_batches\n"
            "def first(run):\n"               # within the group of the run of main, below
            "    tf.processes, tf.run_stages = contextlib.nullcontext, run_stages\n"
            "    found = [t.fixed_gradients(1), t.fixed_gradients(2)]\n"
            "    tf.write_file(sys.argv[1], lambda file: torch.save(found, file))\n"
            "    stopped = [t.TINY, Path(sys.argv[2]), '--stages teacher,learn,recover', sys.argv[4]]\n"
            "    assert 'cannot be cut into 2 parts' in t.call(*stopped, '--batch-size 7')[2]\n"
            "    tf.data_batches = lambda *args: itertools.islice(data_batches(*args), 2)\n"
            "    with contextlib.suppress(StopIteration):\n"
            "        t.call(*stopped)\n"
            "    tf.data_batches = data_batches\n"
            "    status, said, _ = t.call(*stopped)\n"
            "    assert status == 0 and said.count('from step 1') == 1, (status, said)\n"
            "    run_stages(run)\n"
            "tf.run_stages = first\n"
            "tf.toy_digits = functools.partial(tf.toy_digits, 64)\n"
            "tf.train_judge = functools.partial(tf.train_judge, steps=5)\n"
            "assert tf.main(t.split(t.TINY, Path(sys.argv[3]), sys.argv[4])) == 0\n"
            "threads = [path.read_text() for path in Path('/proc/self/task').glob('*/comm')]\n"
            "assert 'gloo' not in str(threads), 'threads of the group, left over, can crash the end of a process'\n")
        said = torchrun(self.folder / "script.py", self.folder / "gradients", stopped, two, steps)
        self.assertEqual(said.count("kept blocks"), 1, "one process speaks")
        whole, ((*weights,),) = fixed_gradients()
        cases = [fixed_gradients(2), *load(self.folder / "gradients")]
        self.assertEqual([len(trained) for _, trained in cases], [1, 2, 2])
        for found, trained in cases:
            for step, (ours, theirs) in enumerate(zip(whole, found, strict=True)):
                torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5 * (1 + step))
            for process in trained:
                torch.testing.assert_close(process, trained[0], rtol=0, atol=0)
                torch.testing.assert_close(process, weights, rtol=1e-3, atol=1e-3)
        for name in ("teacher.pt", "student.pt"):
            self.assert_same(load(two / name)["ema"], load(stopped / name)["ema"])
        by_two = tf.read_json(two / "results.json")
        (two / "results.json").unlink()
        self.story(two, steps)
        by_one = tf.read_json(two / "results.json")
        for name, row in by_one["rows"].items():
            for key in ("fid", "is", "loss"):
                self.assertLess(abs(by_two["rows"][name][key] - row[key]), 1e-2 * (1 + row[key]), (name, key))


class Laboratory(Quick):
    """Older criteria, and the comparison with them."""

    def setUp(self):
        super().setUp()
        self.model, self.diffusion = tiny_dit(num_classes=10).to(DEVICE), tf.GaussianDiffusion()
        self.examples, again = (tf.fixed_examples(self.diffusion, tf.toy_digits(size=8), n=48, device=DEVICE,
                                                  batch_size=20) for _ in range(2))
        torch.testing.assert_close(self.examples, again, rtol=0, atol=0)     # the same at every call
        self.arguments = self.model, [(1, 2)] * 2, self.diffusion, self.examples

    def loss(self, kept):
        """The training loss on all examples of the model pruned to these blocks."""
        x0, y, t, noise = (torch.cat(part) for part in zip(*self.examples))
        with torch.no_grad():
            return self.diffusion.training_losses(tf.prune(self.model, kept), x0, t, y, noise)["loss"].mean().item()

    def test_shortgpt_looks_at_direction_and_flux_lite_at_size(self):
        """Four blocks on two numbers: one that only scales, one that only turns, a small turn, and a last one."""
        blocks = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(4)])
        for block, angle, scale in zip(blocks, (0, 1.0, 0.5, 0), (5, 1, 1, 1)):
            c, s = math.cos(angle) * scale, math.sin(angle) * scale
            block.weight.data = torch.tensor([[c, -s], [s, c]])
        model = mock.Mock(blocks=blocks, side_effect=lambda x, t, y, mask: blocks(x.view(5, 1, 2)).view(5, 2, 1, 1))
        examples = [(torch.randn(5, 2, 1, 1), None, torch.arange(5), torch.randn(5, 2, 1, 1))]
        self.assertEqual(tf.shortgpt(model, [(2, 4)], self.diffusion, examples), [1, 3])     # the last one always stays
        self.assertEqual(tf.flux_lite(model, [(2, 4)], self.diffusion, examples), [0, 1])    # 4, 4.8, 2.5 and 0 lengths
        self.assertEqual([len(block._forward_hooks) for block in blocks], [0] * 4)

    def test_losses_after_pruning_are_those_of_the_pruned_model_and_sensitivity_and_random_search_rank_by_them(self):
        for kept in (None, [0, 3], [2]):
            found = tf.calibration_loss(self.model, self.diffusion, self.examples, kept)
            self.assertAlmostEqual(found, self.loss(kept or range(4)), places=5)
        losses = [self.loss([j for j in range(4) if j != i]) for i in range(4)]
        self.assertEqual(tf.sensitivity(*self.arguments), sorted(sorted(range(4), key=lambda i: -losses[i])[:2]))
        every, found = tf.every_choice(self.arguments[1]), []
        self.assertEqual(every, [[0, 2], [0, 3], [1, 2], [1, 3]])
        ranked = sorted(every, key=self.loss)
        for place in (0, 0.5, 1):
            found.append(tf.random_search(*self.arguments, place, tries=60))
        self.assertEqual((found[0], found[1] in ranked[1:3], found[2]), (ranked[0], True, ranked[-1]))

    def test_the_oracle_is_the_papers_for_28_blocks_and_refuses_what_is_not_half(self):
        depth_28 = mock.Mock(blocks=range(28))
        self.assertEqual(tf.oracle(depth_28, [(2, 4)] * 7), [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27])
        with self.assertRaisesRegex(ValueError, "one block of every pair, not 7 of 28"):
            tf.oracle(depth_28, [(1, 4)] * 7)

    def test_a_comparison_can_be_stopped_and_continued_recovers_each_choice_once_and_survives_one_that_diverges(self):
        model = lively(tf.DiT_models["toy"](input_size=16, in_channels=1, num_classes=10, depth=4), 0.05)
        torch.save(model.state_dict(), self.folder / "teacher.pt")
        names, calls, recover = ("shortgpt", "oracle", "random"), [], tf.recover
        self.enterContext(mock.patch.object(tf, "CRITERIA", {name: tf.CRITERIA[name] for name in names}))
        self.enterContext(mock.patch.object(tf, "compare", functools.partial(tf.compare, seeds=(0, 1))))
        words = ["--recover-steps 2 --learn-steps 2 --kd none --ckpt", self.folder / "teacher.pt", "--compare"]

        def watched(*args, **more):
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt
            if len(calls) in diverging:
                raise tf.NonFiniteLoss(1, math.nan, math.nan, None)
            return recover(*args, **more)
        for what, diverging, masks in (("all", (), 4), ("criteria", (1, 2, 3), 0)):     # all of one, half of another
            calls.clear()
            with mock.patch.object(tf, "recover", watched):
                stop = 5
                status, said, _ = call(TINY, self.folder / what, *words, what)
                self.assertEqual((status, "and another --out" in said), (130, bool(diverging)))
                stop, diverging = None, ()
                out = self.story(self.folder / what, *words, what)
                self.assertEqual(len(calls), 1 + 2 * (5 + masks) + 3 * (what == "criteria"))
            for part in ("learned", *names, "±", *["of 4", "Spearman's correlation", "over 4 masks"][:masks]):
                self.assertIn(part, out)
            self.assert_picture(self.folder / what / "recoverability.png")
            table = tf.read_json(self.folder / what / "compare.json")
            self.assertEqual(len(table), 5 + masks)
            self.assertEqual([len(values) for values in table["no-groups"].values()], [2] * 4)
        self.refused("--learn-steps 2 (now 3)", TINY, self.folder / "all", *words, "all --learn-steps 3")
        with mock.patch.object(tf, "recover", side_effect=tf.UserError("disk full")):
            self.refused("disk full", TINY, self.folder / "full", *words, "criteria", lines=None)

    def test_several_teachers_are_compared_each_of_its_own_seed(self):
        def made_up(run):
            teacher = run.load(run.teacher_path).x_embedder.proj.weight[0, 0, 0, 0].abs().item()
            return [0, 3], teacher, 1.0, run.args.seed + 1
        words = "--compare criteria --teacher-steps 2"
        self.enterContext(mock.patch.object(tf, "CRITERIA", {}))
        torch.jit.script(StandIn()).save(self.folder / "net.pt")
        with mock.patch.object(tf, "outcome", made_up):
            out = self.story(self.folder / "several", words, "--teachers 2 --inception", self.folder / "net.pt")
        self.assertIn("| FID after recovery |", out)
        self.story(self.folder / "one", "--seed 1 --stages teacher --teacher-steps 2")
        teachers = [load(path)["ema"] for path in (self.folder / "several/teacher.pt", self.folder / "one/teacher.pt",
                                                   self.folder / "several/teacher-1/teacher.pt")]
        self.assert_same(*teachers[1:])
        first, second = (weights["x_embedder.proj.weight"][0, 0, 0, 0].abs().item() for weights in teachers[:2])
        self.assertNotEqual(first, second)
        row = tf.read_json(self.folder / "several" / "compare.json")["learned"]
        self.assertEqual((row["loss_after_pruning"], row["fid"]), ([first] * 3 + [second] * 3, [1, 2, 3] * 2))
        self.refused("does not use --teachers", TINY, self.folder / "y", "--teachers 2")
        (self.folder / "several" / "teacher.pt").unlink()
        tf.write_json(self.folder / "several/teacher-1/settings.json", {})
        self.refused("settings.json", TINY, self.folder / "several", words, "--teachers 2", lines=None)
        self.assertFalse((self.folder / "several" / "teacher.pt").exists(), "a mistake ends it before the work")
        for more, way in (("", "a lower --teacher-lr goes on"), ("--teachers 2", "a lower --teacher-lr and another")):
            hot = [self.folder / f"x{more}", "--compare all --teacher-lr 1e8", more]
            self.refused(way, TINY, *hot, lines=None)


class CommandLine(Quick):
    """Whole runs, and mistakes."""

    def test_one_command_tells_the_whole_story_and_the_next_one_reuses_it(self):
        run, reused = self.folder / "run", "is there and is used"
        out = self.story(run)
        names = {".lock", "settings.json", "teacher.pt", "layers.json", "student.pt", "results.json", "log.jsonl",
                 "decisions.png", "samples.png", "halfway.png", "losses.png"}
        self.assertEqual({path.name for path in run.iterdir()}, names)
        for part in ("teacher |", "pruned ", "student |", "toy-FID", "speed-up", "guidance 1.5"):
            self.assertIn(part, out)
        self.assertIsNone(tf.read_json(run / "results.json")["rows"]["student"]["speed_up"], "it needs five batches")
        log = [json.loads(line)["stage"] for line in (run / "log.jsonl").read_text().splitlines()]
        self.assertEqual(list(dict.fromkeys(log)), ["teacher", "learn", "recover"])
        student = load(run / "student.pt")
        self.assertEqual((tf.read_json(run / "layers.json")["kept"], student["config"]["depth"]), (student["kept"], 6))
        for name in ("decisions.png", "samples.png", "halfway.png", "losses.png"):
            self.assert_picture(run / name)
        self.assertEqual(self.story(run).count(reused), 4)
        self.refused("--seed 0 (now 1)", TINY, run, "--seed 1")
        self.refused("--recover-steps 3 (now 4)", TINY, run, "--recover-steps 4")
        for name, content in (("results.json", "{"), ("results.json", "{}"), ("settings.json", "[]")):
            whole = (run / name).read_text()
            (run / name).write_text(content)
            self.refused(name, TINY, run)
            (run / name).write_text(whole)
        measured = self.story(run, "--samples 12")
        self.assertEqual((measured.count(reused), "samples 12" in measured), (3, True), "it measures again, no more")
        before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
        (run / "recover-state.pt").write_bytes(b"of another student")
        (run / "layers.json").unlink()
        self.assertEqual(self.story(run).count(reused), 1, "what follows a removed file is done again")
        self.assertEqual({path.name for path in run.iterdir()}, names)
        for name in ("layers.json", "student.pt", "results.json"):
            self.assertGreater((run / name).stat().st_mtime_ns, before[name], name)
        self.assert_same(student["ema"], load(run / "student.pt")["ema"])
        words = ["--ckpt", run / "student.pt"]
        self.assertEqual(call(*words, "--labels 3,1 --out", self.folder / "grid.png", main=sample.main)[0], 0)
        self.assert_picture(self.folder / "grid.png")
        for wrong, reason in (("--labels 3,10", "from 0 to 9"), ("--labels ²", "from 0 to 9"), ("--out .", "a .png"),
                              ("--out x.jpg", "a .png"), ("--npz x", "a .npz"), ("--npz x.npz --out y", "not allowed"),
                              ("--out /proc/x.png", "/proc/tmp"), ("--solver euler", "no --solver"),
                              ("--steps 1", "1 sampling steps"), ("--eta 1.5", "expected 0 (DDIM)"),
                              ("--model MAR-B", "MAR-B"), ("--x", "--x")):
            self.refused(reason, *words, wrong, main=sample.main)

    def test_other_criteria_and_named_blocks_take_the_place_of_learning_and_stages_can_be_run_one_by_one(self):
        run = self.folder / "run"
        self.refused("teacher.pt", TINY, run, "--stages learn --criterion oracle")
        self.refused("layers.json", TINY, run, "--stages teacher,recover --criterion oracle")
        self.assertFalse(run.exists(), "a failed command leaves nothing behind")
        self.story(run, "--stages teacher --criterion oracle")
        self.assertFalse((run / "layers.json").exists())
        self.story(run, "--stages learn --criterion oracle")
        self.assertEqual(tf.read_json(run / "layers.json")["kept"], [0, 2, 4, 7, 9, 11])
        save_images(self.folder / "pets" / "cat", 24, 20, 30)
        named = [self.folder / "named", "--criterion 0,1,2,3,11 --data", self.folder / "pets"]
        free = self.folder / "free"
        self.story(free, "--groups 4")
        self.assertEqual(len(load(free / "student.pt")["kept"]), 4)
        self.assert_picture(free / "decisions.png")
        self.assertIn("24 images, checksum", self.story(*named, "--stages recover,learn,teacher"))
        self.assertEqual(load(self.folder / "named" / "student.pt")["config"]["depth"], 5)
        Image.new("RGB", (20, 30)).save(self.folder / "pets" / "cat" / "00.png")
        self.refused("checksum", TINY, *named)           # the images are others now
        for flags, reason in (("3,2", "ascending"), ("0,12", "0 to 11"), ("oracle --groups 1:4", "one block of every")):
            self.refused(reason, TINY, self.folder / reason, "--stages teacher,learn --criterion", flags)
            self.assertFalse((self.folder / reason).exists(), "said before the work")

    def test_a_run_that_diverges_keeps_its_last_state_and_goes_on_with_a_lower_rate(self):
        run, real = self.folder / "run", tf.data_batches
        words = [TINY, run, "--recover-steps 20"]

        def poisoned(*args):
            for number, (x, y) in enumerate(real(*args)):
                yield x * (math.nan if number == 7 else 1), y
        self.assertEqual(call(*words, "--stages teacher,learn")[0], 0)
        with mock.patch.object(tf, "data_batches", poisoned):
            self.refused("a lower --recover-lr goes on from step 6", *words, lines=None)
        self.assertEqual((tf.TrainingState(run / "recover-state.pt").step, (run / "student.pt").exists()), (6, False))
        self.refused("--teacher-lr 0.01 (now 0.001)", *words, "--teacher-lr 1e-3")
        for rate in ("1e-9", "2e-3"):            # a stage that has not begun may have any rate
            self.assertEqual(call(TINY, self.folder / "new", "--stages teacher --recover-lr", rate)[0], 0)
        self.refused("--recover-lr 0.002 (now 1.0)", *words, "--recover-lr 1")
        with mock.patch.object(tf, "recovery_loss", side_effect=KeyboardInterrupt):
            self.assertEqual(call(*words)[0], 130, "the same rate is tried once more, and stopped")
        self.assertIn("from step 6", self.story(run, "--recover-steps 20 --recover-lr 1e-3"))
        self.assertFalse(list(run.glob("*-state.pt")))
        self.refused("--recover-lr 0.001 (now 0.0001)", *words, "--recover-lr 1e-4")

    def test_two_runs_in_one_folder_are_refused_and_a_dead_one_is_no_hindrance_nor_is_a_moved_project(self):
        run, words = self.folder / "run", "--stages teacher --data"
        save_images(self.folder / "pets" / "cat", 24, 16, 16)
        self.story(run, words, self.folder / "pets")
        other = tf.lock(run)
        self.refused(f"is in use by process {os.getpid()}", TINY, run, words, self.folder / "pets")
        other.close()                            # as the end of a process does, however it ends
        (self.folder / "pets").rename(self.folder / "moved")
        self.story(run, words, self.folder / "moved")
        (self.folder / "moved" / "cat").rename(self.folder / "moved" / "dog")
        self.refused("checksum", TINY, run, words, self.folder / "moved")
        full = self.folder / "full"
        full.mkdir()
        (full / "log.jsonl").symlink_to("/dev/full")
        self.refused("log.jsonl: [Errno 28]", TINY, full, "--stages teacher")

    def test_bad_input_is_one_line_and_exit_status_2(self):
        (self.folder / "file").write_text("x")
        (self.folder / "empty").mkdir()
        run = self.folder / "run"
        for reason, *words in (
                ("expected a number", "--teacher-steps 0"), ("expected a number", "--guidance nan"),
                ("--samples", "--samples x"), ("depth of 12", "--groups 1:5"), ("choose from", "--model DiT-Q"),
                ("expected some of", "--stages x"), ("multiple", "--image-size 18"), ("cuda:77: ", "--device cuda:77"),
                ("Not a directory", "--out", self.folder / "file" / "x"), ("class", "--data", self.folder / "empty"),
                ("nothing", "--data", self.folder / "nothing"), ("64 examples are too few", "--batch-size 100"),
                ("cut into 3 parts", "--accumulate 3"), ("unrecognized", "--nonsense"),
                ("one per token", "--model MAR-toy --sample-steps 17"), ("--samples", "--samples 3"),
                ("more than 1,000", "--model toy-28 --compare all"), ("shortgpt", "--criterion best"),
                ("--vae is for latents", "--vae x"), ("does not use --vae", "--stages learn --vae x"),
                ("toy-FID does not use --ref", "--ref x"),
                ("--criterion does not use --learn-lr", "--criterion oracle --learn-lr 1"),
                ("--criterion of blocks does not use --groups", "--criterion 0,2 --groups 1:2"),
                ("lies in", "--data", self.folder, "--out", run),
                ("--stages measure does not use --compile", "--stages measure --compile"),
                ("--update frozen does not use --learn-lr", "--update frozen --learn-lr 1"),
                ("--compare does not use --stages", "--compare all --stages measure"),
                ("--stages without measure does not use --inception", "--stages teacher --inception x")):
            with self.subTest(words=words):
                self.refused(reason, TINY, run, *words)
        for reason, words in (("goes with --vae", "--encode x"), ("goes with --ref", "--fid x"),
                              ("does not use --kd, --seed", "--seed 1 --fid x --kd none --ref x")):
            self.refused(reason, words)
        with mock.patch.dict(os.environ, {"WORLD_SIZE": "2"}):
            self.refused("without torchrun", TINY, run, "--compare all")
        with mock.patch.object(tf, "gather", lambda value: [value, 7] if value == 0 else [value]):
            self.refused("on a disk that they share", TINY, self.folder / "two", "--stages teacher")
        self.assertFalse((run / "teacher.pt").exists() or (run / "settings.json").exists())

    def test_an_official_checkpoint_of_latents_becomes_a_student_and_that_a_shallower_one(self):
        folder = self.folder
        model = lively(tf.DiT_models["toy"](input_size=4, in_channels=4, num_classes=10, depth=8), 0.05)
        torch.save({"ema": model.state_dict(), "args": argparse.Namespace(lr=1)}, folder / "official.pt")
        (folder / "data").mkdir()
        np.save(folder / "data" / "latents.npy", np.random.default_rng(0).normal(size=(40, 2, 4, 4, 4)).astype("f4"))
        np.save(folder / "data" / "labels.npy", np.arange(40) % 5)
        save_images(folder / "images", 12, 32, 32)
        torch.jit.script(StandIn()).save(folder / "net.pt")
        np.savez(folder / "mu.npz", mu=np.zeros(5), sigma=np.eye(5))
        data, ckpt = ["--data", folder / "data"], ["--ckpt", folder / "official.pt"]
        flags = [*data, "--vae toy --accumulate 2 --inception", folder / "net.pt", "--ref", folder / "images"]
        self.enterContext(mock.patch.object(tf, "VAE", ToyVAE))
        out = " ".join(self.story(folder / "d4", *flags, *ckpt).split())
        for part in ("| FID |", "| IS |", "sample_steps 2, guidance 1.5", "net.pt", "student | 4 |"):
            self.assertIn(part, out)
        self.assert_picture(folder / "d4" / "samples.png")
        self.assert_same(model.state_dict(), tf.load_checkpoint(folder / "d4" / "teacher.pt")[0].state_dict())
        self.story(folder / "d2", *flags, "--ckpt", folder / "d4" / "student.pt")
        self.assertEqual([load(folder / run / "student.pt")["config"]["depth"] for run in ("d4", "d2")], [4, 2])
        for reason, *wrong in (("not a DiT-S/2", "--model DiT-S/2"), ("nothing", "--ref", folder / "nothing"),
                               ("mu (5,)", "--ref", folder / "mu.npz"), ("is for images", "--image-size 4"),
                               ("TorchScript", "--inception", folder / "official.pt")):
            self.refused(reason, TINY, folder / "x", *flags, *ckpt, *wrong)
        self.assertFalse((folder / "x" / "teacher.pt").exists(), "said before the work")
        self.refused("--vae, --inception and --ref", TINY, folder / "y", *data)
        self.refused("takes (4, 4, 4)", TINY, folder / "y", *ckpt)
        model = tiny_dit(input_size=16, num_classes=10, class_dropout_prob=0)
        tf.save_checkpoint(folder / "unguided.pt", model, "ddpm", {}, list("0123456789"))
        self.refused("only guidance 1", TINY, folder / "y", "--ckpt", folder / "unguided.pt")

    def test_a_sit_runs_from_the_command_line_and_its_checkpoints_tell(self):
        run, drawn = self.folder / "sit", []
        self.story(run, "--model SiT-toy")
        content = load(run / "student.pt")
        self.assertEqual((content["objective"], len(content["kept"])), ("flow", 6))
        torch.save(content["ema"], self.folder / "official.pt")              # the layout of official SiT checkpoints
        for words in (["--ckpt", run / "student.pt"], ["--model SiT-toy --ckpt", self.folder / "official.pt"]):
            words += ["--steps 3 --guidance 1.5 --solver euler --npz", self.folder / "a.npz"]
            self.assertEqual(call(*words, main=sample.main)[0], 0)
            drawn.append(tf.load_arrays(self.folder / "a.npz")["arr_0"].astype(int))
        self.assertLessEqual(abs(drawn[0] - drawn[1]).max(), 1)
        for main in (tf.main, sample.main):
            self.refused("is a SiT-toy, not a toy", "--model toy --ckpt", run / "student.pt", main=main)
        self.refused("no --eta", "--eta 0 --ckpt", run / "student.pt", main=sample.main)

    def test_a_mar_runs_from_the_command_line_and_its_student_becomes_a_shallower_one(self):
        run, again = self.folder / "mar", self.folder / "again"
        self.story(run, "--model MAR-toy")
        rows = tf.read_json(run / "results.json")["rows"]
        self.assertEqual([row["depth"] for row in rows.values()], [12, 6, 6])
        self.story(again, "--stages teacher,learn,recover --ckpt", run / "student.pt")
        for folder, depth in ((run, 6), (again, 3)):
            content = load(folder / "student.pt")
            self.assertEqual((content["objective"], content["sampling"]["head_steps"]), ("mar", 10))
            self.assertEqual(content["config"]["encoder_depth"] + content["config"]["decoder_depth"], depth)
        words = ["--num-images 3 --npz", self.folder / "a.npz", "--ckpt", run / "student.pt"]
        self.assertEqual(call(*words, "--steps 3 --head-steps 3 --temperature 0.9", main=sample.main)[0], 0)
        self.assertEqual(tf.load_arrays(self.folder / "a.npz")["arr_0"].shape, (3, 16, 16, 3))
        self.refused("expected 1 to 16", *words, "--steps 17", main=sample.main)


def race(title, jobs, steps=1, rounds=5):
    """Time `jobs`, a dict of functions, in turns, so that a busy machine slows all of them alike; the first turn, in
    which they may compile, is not counted. Prints, for one of `steps`, the median, its spread (max - min) / median, how
    many times faster than the first it is and, on a GPU, the memory that it takes besides what lies there before."""
    seconds, memory = {name: [] for name in jobs}, {}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            if GPU:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            job()
            if GPU:
                torch.cuda.synchronize()
                memory[name] = f", {(torch.cuda.max_memory_allocated() - before) / 2 ** 30:.1f} GiB"
            seconds[name].append((time.perf_counter() - start) / steps)
    times = {name: np.array(values[1:]) for name, values in seconds.items()}
    for name, values in times.items():
        median, ratio = np.median(values), np.median(next(iter(times.values())) / values)
        print(f"{title:20} {name:20} {median:8.4f} s (spread {np.ptp(values) / median:.0%}): {ratio:.2f}x"
              f"{memory.get(name, '')}", flush=True)


def bench():
    """Time what tinyfusion.py claims to be fast against the plain version that the tests compare it with: DiT-XL/2 on a
    GPU, there with --compile too, DiT-S/2 on a CPU. Steps are those of `train`, as in a run."""
    from torch._dynamo.utils import counters
    name, sizes, steps = ("DiT-XL/2", (32, 128), 10) if GPU else ("DiT-S/2", (8,), 1)
    device = tf.pick_device(None)
    with device:
        model = lively(tf.DiT_models[name](), std=0.02)
    kept = list(range(0, len(model.blocks), 2))
    diffusion, groups, student = tf.GaussianDiffusion(), [(1, 2)] * len(kept), tf.prune(model, kept)
    pairs = tf.match_blocks(groups, kept)
    where = torch.cuda.get_device_name() if GPU else f"CPU with {torch.get_num_threads()} threads"
    print(f"{name}, {tf.default_dtype(device)}, {where}, torch {torch.__version__}")
    batch = []                                   # x0 and y, of the size that is timed
    batches = itertools.repeat(batch)

    def dense(blocks, x, *args, mask, hidden=()):
        return dense_forward(blocks, x, mask, *args), []

    def compiled(net):
        net = copy.deepcopy(net)
        tf.compile_blocks(net)
        return net

    def learning(forward=tf.masked_forward, prepare=lambda net: None):
        net, sampler = copy.deepcopy(model).train(), tf.LayerSampler(groups).to(device)
        added, loss = [*tf.add_lora(net), *sampler.parameters()], tf.masked_denoising(diffusion, batches)
        prepare(net)

        def job():
            net.train()
            with mock.patch.object(tf, "masked_forward", forward):
                tf.train(net, lambda step: (loss(net, sampler), {}), steps, params=added, lr=1e-9)
        return job

    def recovery(student, teacher, kd="masked"):
        return lambda: tf.recover(student, teacher, diffusion, batches, pairs, steps, kd=kd, lr=1e-9)

    def sampling(net):
        return lambda: diffusion.sample(net, batch[1], lambda: torch.randn_like(batch[0]), steps=4, guidance=1.5)

    def race_all(title, jobs, steps):            # with every size of a batch
        jobs = {name: job for name, job in jobs.items() if GPU or "compiled" not in name}
        for size in sizes:
            batch[:] = torch.randn(size, 4, 32, 32, device=device), torch.arange(size, device=device)
            race(f"{title}, batch {size}", jobs, steps)
        if GPU:
            graphs, breaks = counters["stats"]["unique_graphs"], dict(counters["graph_break"])
            print(f"{title}: {graphs} graphs compiled, breaks: {breaks}")
        counters.clear()

    race_all("learning", {"dense": learning(dense), "skip": learning(),
                          "skip, compiled": learning(prepare=tf.compile_blocks)}, steps)
    race_all("recovery", {"masked KD": recovery(student, model), "no KD": recovery(student, model, "none"),
                          "masked KD, compiled": recovery(compiled(student), compiled(model))}, steps)
    race_all("sampling", {"teacher": sampling(model), "student": sampling(student),
                          "teacher, compiled": sampling(compiled(model)),
                          "student, compiled": sampling(compiled(student))}, 4)

    rng = np.random.default_rng(0)
    one, other = (rng.normal(size=(6000, 2048)) * rng.uniform(0.5, 2, 2048) for _ in range(2))
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x.T)) for x in (one, other))
    race("Frechet, 2048", {"sqrtm": lambda: scipy.linalg.sqrtm(s1 @ s2),
                           "ours": lambda: tf.frechet_distance(m1, s1, m2, s2)}, rounds=2)


if __name__ == "__main__":
    if "--bench" in sys.argv[1:]:
        bench()
        sys.exit()
    program = unittest.main(exit=False, warnings="ignore")
    failed = len(program.result.failures) + len(program.result.errors)
    print(f"{program.result.testsRun - failed} passed, {failed} failed")
    sys.exit(failed > 0)
