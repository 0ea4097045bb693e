"""The claims of tinyfusion.py, tested. Every test's name is a sentence that is true of the method or the program.

python test_tinyfusion.py            all of them
python test_tinyfusion.py Heart      one class;  -v shows the sentences
python test_tinyfusion.py --bench    no tests: seconds of a learning step by the formula and with the skip
"""

import argparse
import ast
import base64
import contextlib
import copy
import functools
import importlib
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
import warnings
import zlib
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

SMALL = {"input_size": 8, "in_channels": 1, "hidden_size": 16, "num_heads": 2, "num_classes": 3}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
close = torch.testing.assert_close
exactly = functools.partial(close, rtol=0, atol=0)


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


def some_mask(examples, depth):
    """A random one; the first example keeps all blocks, the second none, and nobody keeps block 2."""
    mask = torch.randint(0, 2, (examples, depth)).double()
    mask[0], mask[1], mask[:, 2] = 1, 0, 0
    return mask


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

    def final(self, h, c, name):
        shift, scale = self.linear(c, name + ".adaLN_modulation.1").chunk(2, -1)
        return self.linear(self.norm(h) * (1 + scale) + shift, name + ".linear")

    def time(self, t, name, embedder):
        """Takes the embedder's place, whose frequencies are float32, in the official code too. t (n,)."""
        angles = t[:, None] * torch.tensor([10000 ** (-k / 128) for k in range(128)], dtype=torch.float64)
        waves = torch.cat([angles.cos(), angles.sin()], 1)
        exact = self.linear(self.silu(self.linear(waves, name + ".mlp.0")), name + ".mlp.2")
        close(embedder.float()(t).double(), exact, rtol=1e-3, atol=1e-3)
        embedder.forward = lambda t: exact
        return exact


class StandIn(nn.Module):
    """Called like the Inception network of FID, in TorchScript: eight features, and three classes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features, self.classes = nn.Linear(27, 8), nn.Linear(8, 3)

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

    def check_draws(self, sampler, masks, p, limit):
        """Exactly zeros and ones, also under autocast: the candidates `masks`, with probabilities p (one false alarm in
        10,000)."""
        for tau in (4.0, 0.1):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=tau < 1):
                drawn = sampler(20_000, tau, scale=100.0)
            count, expected = (drawn[:, None] == masks).all(2).sum(0), 20_000 * p
            self.assertTrue(drawn.requires_grad and count.sum() == 20_000)
            self.assertLess(((count - expected) ** 2 / expected).sum(), limit, "chi-squared")

    def test_every_group_draws_its_masks_with_the_probabilities_of_the_softmax_whatever_tau(self):
        sampler, masks = tf.LayerSampler([(1, 1), (2, 4)]), F.pad(tf.nm_masks(2, 4), (1, 0), value=1)
        sampler.logits[1].data = torch.tensor([0.0, 0.01, 0.02, -0.01, 0.005, 0.0])
        p = torch.softmax(sampler.logits[1].detach() * 100, 0)
        self.check_draws(sampler, masks, p, 25.7)            # 5 degrees of freedom
        close([sampler.keep_probability(100.0), sampler.confidence()], [p @ masks, torch.stack([p.sum(), p[2]])])
        self.assertEqual(sampler.kept(), [0, 1, 4])          # candidate 1001

    def test_without_groups_n_blocks_are_drawn_without_replacement(self):
        """And the relaxed mask sums to N, and its gradient trades one block for others."""
        sampler, masks = tf.TopNSampler(2, 5), tf.nm_masks(2, 5)
        sampler.logits.data = torch.tensor([0.0, 0.01, 0.02, -0.01, 0.005])
        p = torch.softmax(sampler.logits.detach() * 100, 0)
        first, second = p[masks.nonzero()[:, 1].view(-1, 2)].T               # one is drawn first, or the other
        shares = first * second / (1 - first) + second * first / (1 - second)
        self.check_draws(sampler, masks, shares, 33.7)       # 9 degrees of freedom
        close(sampler.keep_probability(), shares @ masks, atol=0.06, rtol=0)
        exactly(sampler.keep_probability(), sampler.keep_probability())
        self.assertEqual((sampler.kept(), sampler.confidence().shape), ([1, 2], (2,)))
        self.assertRaisesRegex(ValueError, "from 1 to 5", tf.TopNSampler, 6, 5)
        keys = 3 * torch.randn(6, 5, dtype=torch.double).requires_grad_()
        for tau in (4.0, 0.5):
            close(sampler.relaxed(keys, tau).sum(1), torch.full((6,), 2.0).double())
            self.assertTrue(torch.autograd.gradcheck(lambda keys: sampler.relaxed(keys, tau), keys, eps=1e-4))

    def test_both_ways_of_the_masked_forward_have_the_values_and_gradients_of_the_dense_formula(self):
        def dense(x, c, mask):
            for block, m in zip(blocks, mask.T[..., None, None]):
                x = m * block(x, c) + (1 - m) * x
            return x

        def masked(skip):
            return lambda x, c, mask: tf.masked_forward(blocks, x, c, mask=mask, skip=skip)[0]
        blocks, results = lively(nn.ModuleList([tf.DiTBlock(8, 2) for _ in range(5)])).double(), []
        inputs = [torch.randn(6, 4, 8).double(), torch.randn(6, 8).double(), some_mask(6, 5)]
        for forward in (dense, masked(False), masked(True), masked(None)):
            x, c, mask = (a.clone().requires_grad_() for a in inputs)
            out = forward(x, c, mask)
            weights = [x, c, mask, *blocks.parameters()]
            results.append([out, *torch.autograd.grad(out.sin().sum(), weights, materialize_grads=True)])
            close(results[-1], results[0], rtol=1e-12, atol=1e-12)
        exactly(results[1][0], results[0][0])    # word for word
        for skip, near in itertools.product((False, True), (mask - 6e-8, mask + 1e-7, mask.bool())):
            exactly(masked(skip)(x, c, near), masked(skip)(x, c, mask))      # rounding errors of a mask do not matter

    def test_dropped_examples_run_without_a_graph_and_only_while_a_mask_is_learned(self):
        block, runs, mask = nn.Linear(3, 3), [], torch.tensor([[1.0], [0], [1], [0], [0]])
        block.register_forward_hook(lambda module, args, out: runs.append((len(out), out.requires_grad)))
        for learned, skip in ((False, None), (True, True), (False, False)):
            tf.masked_forward([block], torch.randn(5, 3), mask=mask.clone().requires_grad_(learned), skip=skip)
        self.assertEqual(runs, [(2, True), (2, True), (3, False), (5, True)])

    def test_the_gradient_of_the_logits_is_the_softmax_jacobian_of_the_masks_gradient(self):
        sampler, tau, scale = lively(tf.LayerSampler([(1, 2), (2, 3)]).double(), 0.01), 0.7, 100.0
        blocks, x = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double() for _ in range(5)], torch.randn(7, 3).double()
        torch.manual_seed(3)
        mask = sampler(7, tau, scale)
        mask.retain_grad()
        tf.masked_forward(blocks, x, mask=mask)[0].square().sum().backward()
        torch.manual_seed(3)                     # the same Gumbel noise again
        for logits, candidates, grad in zip(sampler.logits, sampler.buffers(), mask.grad.split([2, 3], 1)):
            soft = F.gumbel_softmax((logits.detach() * scale).expand(7, -1), tau=tau)
            v = grad @ candidates.T.double()     # dL/dy (B, C(M, N))
            close(logits.grad, scale / tau * (soft * (v - (soft * v).sum(1, keepdim=True))).sum(0))

    def test_the_masked_forward_works_on_any_residual_blocks_and_keeps_the_type_of_its_input(self):
        layers = [nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True).eval() for _ in range(3)]
        x, c, mask = torch.randn(2, 5, 8), torch.randn(2, 8), torch.tensor([[1.0, 0, 1], [0, 0, 0]])
        out, features = tf.masked_forward(layers, x, mask=mask, hidden=(0, 2))
        first = layers[0](x[:1])
        close([*features, out], [torch.stack([y[0], x[1]]) for y in (first, layers[2](first), layers[2](first))])
        blocks = [tf.DiTBlock(8, 2)] * 3
        shared = tf.masked_forward(blocks, x, c[:1], mask=mask)[0]           # one for all examples
        close(shared, tf.masked_forward(blocks, x, c[:1].expand(2, -1), mask=mask)[0])
        for wrong in (mask[:1], mask[:, :2]):
            self.assertRaisesRegex(ValueError, "expected", tf.masked_forward, blocks, x, c, mask=wrong)
        blocks[0].bfloat16()
        out, _ = tf.masked_forward(blocks, x.bfloat16(), c.bfloat16(), mask=mask.requires_grad_())
        self.assertEqual(out.dtype, torch.bfloat16)

    def test_groups_that_fit_are_parsed_and_others_refused_with_the_reason(self):
        for pattern, groups in (("1:2", [(1, 2)] * 3), ("2:4,1:2", [(2, 4), (1, 2)]), ("3", (3, 6))):
            self.assertEqual(tf.parse_groups(pattern, 6), groups)
        for words, reason in (("29 0 1-2 1:2:3 ,", "how many of these blocks"), ("14:28", "too many candidates"),
                              ("3:2 0:2 1:0 1:5 2:4,3:6 9000:18000 6:12,6:12", "expected N:M with 1 <= N|depth of 28")):
            for pattern in words.split():
                with self.assertRaisesRegex(ValueError, reason):
                    tf.make_sampler(tf.parse_groups(pattern, 28))
        self.assertRaisesRegex(ValueError, "list of .N, M.", tf.make_sampler, {})

    def test_lora_adds_alpha_over_r_b_a_starts_as_the_identity_and_trains_under_one_percent_of_dit_xl(self):
        """Also for modules that read a layer's weight: PyTorch's attention, and its fast path in eval mode."""
        layer, x = lively(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)).train(), torch.randn(2, 5, 8)
        before, added = layer(x), tf.add_lora(layer, rank=2, alpha=6)
        close(layer(x), before)
        self.assertEqual({id(p) for p in layer.parameters() if p.requires_grad}, {id(p) for p in added})
        lively(layer, 0.1)
        W = layer.linear1.base.weight + 3 * layer.linear1.lora_B @ layer.linear1.lora_A
        close(layer.linear1(x), F.linear(x, W, layer.linear1.bias))
        trained = layer.train()(x)
        with torch.no_grad():
            close(layer.eval()(x), trained, rtol=1e-5, atol=1e-5)
        trained.square().sum().backward()
        self.assertEqual([p.grad.any().item() for p in added], [True] * 6, "out_proj, linear1, linear2")
        for wrong, reason in ((layer, "wrapped already"), (nn.Conv2d(1, 1, 1), "no linear layer")):
            self.assertRaisesRegex(ValueError, reason, tf.add_lora, wrong)
        share = sum(p.numel() for p in tf.add_lora(tf.unallocated(tf.DiT))) / 675_129_632
        self.assertTrue(0.0085 < share < 0.0095, share)

    def test_planted_useless_blocks_are_found_in_groups_and_without_and_the_weights_left_alone(self):
        """Six blocks, of which three do the work and the others add junk. Without groups the three are side by side."""
        def loss_fn(model, sample_mask):
            x = torch.randn(32, 4)
            return F.mse_loss(tf.masked_forward(model, x, mask=sample_mask(32))[0], 8 * x)
        for update, groups, useful in (("lora", [(1, 2)] * 3, [1, 2, 4]), ("full", [(1, 2)] * 3, [1, 2, 4]),
                                       ("frozen", [(1, 2)] * 3, [1, 2, 4]), ("lora", (3, 6), [0, 1, 2])):
            torch.manual_seed(3)
            model = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(6)])
            for i, block in enumerate(model):
                block.weight.data = 2 * torch.eye(4) if i in useful else torch.eye(4) + 0.7 * torch.randn(4, 4)
            before = copy.deepcopy(model.state_dict())
            sampler, history = tf.learn_layers(model, loss_fn, groups, 80, update=update, lr=1e-3, logits_lr=5e-3)
            found = sampler.kept(), history[0][0], history[-1][0], len(history[-1][1]), sampler.confidence().min() > 0.9
            self.assertEqual(found, (useful, 0, 80, 6, True), update)
            exactly(model.state_dict(), before)
            self.assertTrue(all(p.requires_grad for p in model.parameters()))

    def test_the_pruned_model_computes_what_the_mask_computed_with_blocks_in_one_list_or_several(self):
        model, inputs = tiny_dit(), dit_inputs()
        pruned = tf.prune(model, [0, 3])
        out, features = model(*inputs, mask=torch.tensor([[1.0, 0, 0, 1]] * 2), hidden=(0, 3))
        close([pruned(*inputs), *pruned(*inputs, hidden=(0, 1))], [out, out, features])
        self.assertEqual((features[0].shape, pruned.config()["depth"], len(model.blocks)), ((2, 4, 16), 2, 4))
        lively(pruned)                           # it is a copy: the model keeps its weights
        exactly(model.state_dict(), tiny_dit().state_dict())
        for bad in ([], [0, 4], [2, 1], [1, 1], [-1, 2]):
            self.assertRaisesRegex(ValueError, "expected", tf.prune, model, bad)
        model = nn.ModuleDict({name: nn.ModuleList([nn.Linear(2, 2) for _ in range(3)]) for name in "ab"})
        pruned = tf.prune(model, [0, 2, 4], lists=("a", "b"))
        exactly([block.weight for name in "ab" for block in pruned[name]],
                [block.weight for block in (model["a"][0], model["a"][2], model["b"][1])])


class TwoStreams(nn.Module):
    """Called as a block of Flux or SD3 is: keywords, a table that all examples share, an argument of heads * B rows, a
    tuple of two streams as its output, the first None in the last block."""

    def __init__(self, last):
        super().__init__()
        self.mix, self.last, self.place = nn.Linear(6, 12), last, "read by the model"

    def forward(self, x, *, context, table, more):
        shift = more["shift"][0].unflatten(0, (-1, len(x))).sum(0)           # (heads * B, 1, 3) to (B, 1, 3)
        out = self.mix(torch.cat([x + table, context + shift], -1)).tanh()
        return None if self.last else context + out[..., 3:6], x + out[..., :3] + out[..., 6:9] * out[..., 9:]


class Foreign(nn.Module):
    """A model of such blocks, whose forward pass knows nothing of masks. It counts its blocks: each has its own table.
    `checkpoint` recomputes its blocks; with a mask (B, 4) it is the definition, x <- m * block(x) + (1 - m) * x."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stack = nn.Sequential(*[TwoStreams(last=i == 3) for i in range(4)]).double()
        self.tables, self.checkpoint = torch.randn(4, 5, 3).double(), None

    def forward(self, x, context, shift, mask=None):
        for i, (block, table) in enumerate(zip(self.stack, self.tables, strict=True)):
            assert block.place == "read by the model"

            def call(x, context, block=block, more={"table": table, "more": {"shift": (shift.repeat(2, 1, 1),)}}):
                return block(x, context=context, **more)
            if self.checkpoint is None:
                c, out = call(x, context)
            else:                                # whether reentrant
                c, out = checkpoint(call, x, context, use_reentrant=self.checkpoint)
            if mask is not None:
                m = mask[:, i].view(-1, 1, 1)
                c, out = None if c is None else m * c + (1 - m) * context, m * out + (1 - m) * x
            context, x = c, out
        return x


class Layer(nn.Linear):
    """A block of one stream or two, whose output is a tensor, or a tuple with `more` behind the streams."""

    def __init__(self, more=None):
        super().__init__(3, 3)
        self.more = more

    def forward(self, x, c=None, past_key_values=None):
        out = [F.linear(stream, self.weight, self.bias) for stream in (x, c) if stream is not None]
        return out[0] if self.more is None else (*out, *self.more)


class Elsewhere(Numeric):
    """Appendix A: the method on models that are not ours."""

    STREAMS = {"lists": "stack", "streams": ("context", "x")}

    def setUp(self):
        super().setUp()
        self.model, self.mask = Foreign(), some_mask(6, 4)
        self.inputs = [torch.randn(6, length, 3).double() for length in (5, 5, 1)]

    def gradients(self, forward):
        """Output of forward(mask, *inputs) and gradients of mask, inputs and weights."""
        inputs = [a.clone().requires_grad_() for a in (self.mask, *self.inputs)]
        out = forward(*inputs)
        return [out, *torch.autograd.grad(out.sin().sum(), [*inputs, *self.model.parameters()])]

    def masked(self, mask, *inputs):
        tf.set_mask(self.model, mask, **self.STREAMS)
        return self.model(*inputs)

    def test_a_model_that_knows_nothing_of_masks_has_the_values_and_gradients_of_the_dense_formula(self):
        """Its parameters' names stay, and so does a forward pass that somebody else has put on a block."""
        before, names = self.model(*self.inputs), list(self.model.state_dict())
        dense = self.gradients(lambda mask, *inputs: self.model(*inputs, mask))
        self.model.stack[0].forward = theirs = functools.partial(self.model.stack[0].forward)
        for self.model.checkpoint in (False, None):
            close(self.gradients(self.masked), dense, rtol=1e-12, atol=1e-13)
        self.assertEqual(list(self.model.state_dict()), names)
        exactly(self.masked(torch.ones(6, 4).bool(), *self.inputs), before)
        tf.set_mask(self.model, None, "stack")
        exactly(self.model(*self.inputs), before)
        self.assertEqual([vars(block).get("forward") for block in self.model.stack], [theirs, None, None, None])

    def test_dropped_blocks_are_what_the_mask_did_also_in_a_model_that_counts_its_blocks(self):
        for kept in ([0, 3], [1, 2], [2]):
            out = self.masked(torch.eye(4)[kept].sum(0).expand(6, -1), *self.inputs)
            self.assertRaisesRegex(ValueError, "runs under a mask", tf.drop_blocks, self.model, kept, **self.STREAMS)
            tf.set_mask(self.model, None, "stack")
            student, again = (tf.drop_blocks(model, kept, **self.STREAMS) for model in (self.model, lively(Foreign())))
            again.load_state_dict(student.state_dict())
            close([student(*self.inputs), again(*self.inputs)], [out, out], rtol=1e-12, atol=1e-12)
            self.assertEqual({int(name.split(".")[1]) for name in student.state_dict()}, {*kept})
            self.assertLess(student.state_dict().keys(), self.model.state_dict().keys())
        with self.assertRaises(ValueError):      # a table too many: this model is not for `prune`
            tf.prune(self.model, [0, 3], "stack")(*self.inputs)

    def test_outputs_beyond_the_streams_pass_a_mask_untouched_and_are_refused_by_name_by_drop_blocks(self):
        x = torch.randn(2, 3)
        for more in (("position bias",), ()):    # a tuple of two, and a tuple of one
            model = nn.Sequential(Layer(more), Layer(more))
            tf.set_mask(model, torch.tensor([[1.0, 0], [0, 1]]), "")
            out = model[0](x)
            self.assertEqual((type(out), out[1:], out[0][1].tolist()), (tuple, more, x[1].tolist()))
            tf.set_mask(model, None, "")
            self.assertRaisesRegex(ValueError, "Layer", tf.drop_blocks(model, [0], "")[0], x)

    def test_two_lists_have_one_numbering_and_a_block_blends_the_streams_that_it_is_given(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.both, self.one = (nn.ModuleList([Layer(more), Layer(more)]) for more in ((), None))

            def forward(self, x, c):
                for block in self.both:
                    x, c = block(x, c)
                return self.one[1](x=self.one[0](x + c) + c)
        model, x, c, mask = Model(), torch.randn(4, 1, 3), torch.randn(4, 2, 3), torch.tensor([[1.0, 0, 0, 1]] * 4)
        lists, streams = ("both", "one"), ("x", "c")
        tf.set_mask(model, mask, lists, streams)
        out = model(x, c)
        tf.set_mask(model, None, lists)
        first, second = model.both[0](x, c)
        close([out, tf.drop_blocks(model, [0, 3], lists, streams)(x, c)], [model.one[1](first + 2 * second)] * 2)
        tf.set_mask(model, mask, lists, ("c", "x"))
        self.assertRaisesRegex(ValueError, "order of the streams", model, x, c)

    def test_masks_streams_lists_and_caches_that_do_not_fit_are_refused(self):
        for mask in (self.mask[:, :3], self.mask[0]):
            self.assertRaisesRegex(ValueError, "4 blocks", tf.set_mask, self.model, mask, "stack")
        self.assertRaisesRegex(ValueError, "the batch of 5 first", self.masked, self.mask[:5], *self.inputs)
        tf.set_mask(self.model, self.mask, "stack", ("nonsense",))
        self.assertRaisesRegex(ValueError, "nonsense", self.model, *self.inputs)
        self.assertRaisesRegex(ValueError, "runs under a mask", tf.prune, self.model, [0], "stack")
        for wrong in (nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2), nn.ModuleDict({"blocks": nn.Linear(2, 2)})):
            for function, more in ((tf.prune, [0]), (tf.set_mask, torch.ones(2, 1))):
                self.assertRaisesRegex(ValueError, "`lists`", function, wrong, more)
        model = nn.Sequential(Layer(), Layer())
        self.assertEqual(len(tf.prune(model, [1], "")), 1, "the model itself")
        tf.set_mask(model, torch.ones(2, 2), "")
        self.assertRaisesRegex(ValueError, "use_cache=False", model[0], torch.ones(2, 3), past_key_values=[])

    def test_layers_are_learned_by_an_ordinary_loss_also_one_that_the_model_itself_returns(self):
        """As MAR's own class does. A loss without the mask is refused."""
        class Losing(Foreign):
            def forward(self, target, *inputs):
                return F.mse_loss(super().forward(*inputs), target)

        def loss_fn(model, sample_mask):
            tf.set_mask(model, sample_mask(6), **self.STREAMS)
            return model(target, *self.inputs)

        def without_gradients(model, sample_mask):
            with torch.no_grad():
                sample_mask(6)
            return next(model.parameters()).square().sum()
        target = self.model(*self.inputs, torch.tensor([[1.0, 0, 1, 1]] * 6).double()).detach()
        learn = functools.partial(tf.learn_layers, Losing(), groups=[(3, 4)], steps=60, logits_lr=3e-3)
        self.assertEqual(learn(loss_fn, update="frozen")[0].kept(), [0, 2, 3])
        for update in ("full", "frozen"):
            for wrong in (without_gradients, lambda model, sample_mask: next(model.parameters()).square().sum()):
                with self.assertRaisesRegex(ValueError, "does not depend on the mask|no_grad"):
                    learn(wrong, update=update)
        learn.args[0].requires_grad_(False)
        self.assertRaisesRegex(ValueError, "nothing to update", learn, loss_fn, update="full")

    def test_reentrant_checkpoints_change_no_gradient_and_a_frozen_one_is_refused_by_name(self):
        def learn(how, update):
            def loss_fn(model, sample_mask):
                model.checkpoint = how
                tf.set_mask(model, sample_mask(6), **self.STREAMS)
                x, *rest = self.inputs
                return model(x.clone().requires_grad_(update != "frozen"), *rest).square().mean()
            torch.manual_seed(0)
            return [*tf.learn_layers(self.model, loss_fn, [(1, 2)] * 2, 4, update=update, accumulate=2)[0].logits]
        for update in ("lora", "full"):
            plain = learn(None, update)
            close(learn(True, update), plain, rtol=1e-6, atol=1e-9)
            self.assertTrue(all(logits.any() for logits in plain))
        self.assertRaisesRegex(ValueError, "use_reentrant=False", learn, True, "frozen")

    def test_a_pruned_list_keeps_its_type_and_the_places_in_it_are_numbered_anew(self):
        for i, place in enumerate((0, 77, 2, 3)):            # 77 means something else
            self.model.stack[i].mix.layer_idx = place
        pruned = tf.prune(self.model, [1, 3], "stack")
        places = [block.mix.layer_idx for block in pruned.stack]
        self.assertEqual((type(pruned.stack), places), (nn.Sequential, [77, 1]))
        self.assertEqual({name.split(".mix.")[0] for name in pruned.state_dict()}, {"stack.0", "stack.1"})


class Zoo(unittest.TestCase):
    """Appendix A on small random models of diffusers, transformers and timm."""

    REFUSED = {"BloomForCausalLM": "BloomBlock", "T5EncoderModel": "T5Block"}          # two or three outputs
    FIRST_STAYS = [*REFUSED, "DiTTransformer2DModel"]        # whose head reads block 0

    def models(self):
        """Sizes and inputs, for every model that knows their names; and [(model, its lists of blocks, its streams, its
        input, what else it needs), ...] (rows: to a block of Latte, each frame is an example). No dimension of a stream
        is 3 but that of the examples."""
        latents, video, tokens, text, vector, *layers = (torch.randn(3, *shape).double() for shape in [
            (4, 8, 8), (4, 2, 8, 8), (16, 4), (5, 32), (32,)] + [(5, 32)] * 6)
        ids, image_first = torch.randint(90, (3, 7)), ("hidden_states", "encoder_hidden_states")
        GIVEN = {name: value for names, value in [
            ("""joint_attention_dim text_embed_dim text_dim text_encoder_dim caption_channels cross_attention_dim
                cross_attention_dim_t5 caption_projection_dim pooled_projection_dim text_emb_dim time_embed_dim
                condition_dim hidden_size approximator_hidden_dim approximator_num_channels ffn_dim embed_dim""", 32),
            ("attention_head_dim pos_embed_max_size", 16), ("sample_size img_size sample_width sample_height", 8),
            ("max_text_seq_length max_sequence_length text_len text_len_t5 sample_frames", 5),
            ("in_channels out_channels in_chans vace_in_channels", 4),
            ("num_layers num_single_layers num_mmdit_layers num_single_dit_layers depth", 3),
            ("num_attention_heads num_heads video_length", 2), ("approximator_layers", 1),
            ("guidance_embeds use_style_cond_and_image_meta_size", 0), ("axes_dims_rope axes_dim_rope", (4, 4, 8)),
            ("max_resolution", (8, 8)), ("vace_layers", [0, 2]), ("llama_layers", [*range(6)]),
            ("img_shapes", [[(1, 4, 4)]] * 3), ("pooled_projections pooled_embeds", vector),
            ("timestep timesteps", vector[:, 0].abs()), ("original_size target_size crop_coords", vector[:, :2]),
            ("class_labels", ids[:, 0]), ("encoder_hidden_states encoder_hidden_states_t5", text),
            ("control_hidden_states", video), ("text_encoder_layers encoder_hidden_states_llama3", layers),
            ("encoder_attention_mask text_embedding_mask text_embedding_mask_t5", torch.ones(3, 5).bool()),
            ("img_ids", torch.rand(16, 3)), ("txt_ids", torch.zeros(5, 3))] for name in names.split()}
        LLM = dict.fromkeys([f"{kind}_token_id" for kind in "pad bos eos cls sep".split()], 1) | {
            "vocab_size": 90, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
            "num_attention_heads": 2}
        LOCAL = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 2, "local_attention": 2}
        BLOCKS, BOTH = "transformer_blocks", "transformer_blocks single_transformer_blocks"
        return GIVEN, [
            ("FluxTransformer2DModel", BOTH, image_first[::-1], tokens),
            ("ChromaTransformer2DModel", BOTH, image_first[::-1], tokens),
            ("BriaFiboTransformer2DModel", BOTH, image_first[::-1], tokens),
            ("AuraFlowTransformer2DModel", "joint_" + BOTH, image_first[::-1], latents),
            ("SD3Transformer2DModel", BLOCKS, image_first[::-1], latents),
            ("QwenImageTransformer2DModel", BLOCKS, image_first[::-1], tokens, {"patch_size": 1}),
            ("HiDreamImageTransformer2DModel", "double_stream_blocks single_stream_blocks", image_first, latents,
             {"patch_size": 2, "caption_channels": [32, 32]}),
            ("HunyuanVideoTransformer3DModel", BOTH, image_first, video, {"rope_axes_dim": (4, 4, 8)}),
            ("CogView4Transformer2DModel", BLOCKS, image_first, latents, {"rope_axes_dim": (8, 8)}),
            ("CogVideoXTransformer3DModel", BLOCKS, image_first, video.transpose(1, 2)),
            ("MochiTransformer3DModel", BLOCKS, image_first, video),
            ("WanVACETransformer3DModel", "blocks", (), video),
            ("LatteTransformer3DModel", BLOCKS, (), video, {"rows": 2, "patch_size": 4, "encoder_attention_mask": None,
                                                            "norm_type": "ada_norm_single", "num_embeds_ada_norm": 9}),
            ("HunyuanDiT2DModel", "blocks", (), latents, {"patch_size": 2, "num_layers": 6}),
            ("DiTTransformer2DModel", BLOCKS, (), latents),
            ("Gemma3ForCausalLM", "model.layers", (), ids, LLM | LOCAL | {"head_dim": 8, "num_key_value_heads": 1}),
            ("ModernBertModel", "layers", (), ids, LLM | LOCAL),
            ("BloomForCausalLM", "transformer.h", (), ids, LLM),
            ("T5EncoderModel", "encoder.block", (), ids, LLM),
            ("VisionTransformer", "blocks", (), latents, {"patch_size": 4})]

    def formula_by_hooks(self, model, mask, lists, streams):
        """Put the mask's formula on a model, independently of `set_mask`."""
        def hook(block, args, kwargs, out):
            given = dict(zip([*inspect.signature(type(block).forward).parameters][1:], args)) | kwargs
            inputs = [given[name] for name in streams or [*given][:1] if given.get(name) is not None]
            outs = [out] if torch.is_tensor(out) else [*out]
            for i, (x, new) in enumerate(zip(inputs, outs)):
                outs[i] = new if new is None else x + torch.einsum("b,b...->b...", columns[block], new - x)
            return outs[0] if torch.is_tensor(out) else tuple(outs)
        blocks = [block for name in lists for block in model.get_submodule(name)]
        columns = dict(zip(blocks, mask.unbind(1), strict=True))
        for block in blocks:
            block.register_forward_hook(hook, with_kwargs=True)

    def check(self, cls, given, lists, streams, x, more):
        """The errors of outputs and gradients under a mask, with a mask of ones, and without half of the blocks."""
        def asked(function, values):
            return {key: value for key, value in values.items() if key in inspect.signature(function).parameters}

        def run(model):
            out = model(x, **asked(model.forward, {"use_cache": False} if is_llm else given | more))
            return out if torch.is_tensor(out) else out[0]

        def under(put_on, mask):
            one = copy.deepcopy(model)
            put_on(one, mask.double().repeat_interleave(more.get("rows", 1), 0), lists, streams)
            return run(one)

        def error(a, b):
            return ((a - b).abs().max() / b.abs().max()).item()
        is_llm = not x.is_floating_point()
        model = cls(cls.config_class(**more)) if is_llm else cls(**asked(cls.__init__, given | more))
        model = lively(model.double()).requires_grad_(False)                 # some models start as the zero function
        i = torch.arange(sum(len(model.get_submodule(name)) for name in lists))
        mask = torch.stack([i % 2, (i + 1) % 2, i // 2 % 2]).double().requires_grad_()
        outs = [under(put_on, mask) for put_on in (tf.set_mask, self.formula_by_hooks)]
        grads = [torch.autograd.grad(out.square().sum(), mask)[0] for out in outs]
        self.assertTrue(grads[0].isfinite().all() and grads[0].all(), "every block matters")
        errors = [error(*outs), error(*grads), error(under(tf.set_mask, torch.ones(3, len(i))), run(model))]
        for first in range(1 if cls.__name__ in self.FIRST_STAYS else 2):
            student = tf.drop_blocks(model, [*range(first, len(i), 2)], lists, streams)
            if cls.__name__ in self.REFUSED:
                self.assertRaisesRegex(ValueError, self.REFUSED[cls.__name__], run, student)
            else:
                errors.append(error(run(student), under(tf.set_mask, (i % 2 == first).expand(3, -1))))
        print(f"{cls.__name__:32}", *(f"{error:.0e}" for error in errors))
        self.assertLess(max(errors), 1e-9)

    def test_masked_is_the_formula_and_dropped_is_masked(self):
        try:
            packages = [importlib.import_module(name) for name in ("diffusers", "transformers", "timm.models")]
        except ImportError:
            self.skipTest("needs pip install diffusers transformers timm")
        given, models = self.models()
        for name, lists, streams, x, *more in models:
            cls = next(getattr(package, name) for package in packages if hasattr(package, name))
            with self.subTest(model=name), warnings.catch_warnings(action="ignore"):
                self.check(cls, given, lists.split(), streams, x, more[0] if more else {})

class Readme(unittest.TestCase):
    """What the README says can be run and copied."""

    def test_its_own_models_become_working_shallower_ones(self):
        readme = Path(tf.__file__).with_name("README.md").read_text()
        section = readme.split("## Your own model")[1].split("## Limits")[0]
        blocks = [block for block in section.split("\n\n") if block.startswith("    ")]
        theirs, ours = ["\n".join(line[4:] for line in block.splitlines()) for block in blocks]
        with torch.device(DEVICE), contextlib.redirect_stdout(io.StringIO()) as said:
            torch.manual_seed(0)
            exec(ours, names := {})
        before, pruned, after = map(float, said.getvalue().split())
        depths = [len(names[name].encoder.layers) for name in ("teacher", "student")]
        self.assertTrue(before > 0.9 < after > pruned and depths == [6, 3], (said.getvalue(), depths))
        if importlib.util.find_spec("diffusers") is None:
            self.skipTest("the example of diffusers needs pip install diffusers")
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            with contextlib.redirect_stdout(io.StringIO()) as said:
                exec(theirs, names := {})
            self.assertIn("tensor(0.", said.getvalue(), "dropped is what was masked")
            tf.set_mask(names["teacher"], None, names["where"])
            again = tf.drop_blocks(names["teacher"], names["sampler"].kept(), names["where"])
            again.load_state_dict(load("student.pt"))

    def test_what_it_says_can_be_copied_works_alone(self):
        """Each group of functions, with the imports that the README names and nothing else of the file."""
        source = Path(tf.__file__).read_text()
        parts = {node.name: "\n".join(source.splitlines()[node.lineno - 1:node.end_lineno])
                 for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        readme = Path(tf.__file__).with_name("README.md").read_text().split("To copy code:")[1].split("## Limits")[0]
        modules = {}
        for group in re.split(r"\.\s+", readme.strip().strip(".")):
            names, imports = re.findall(r"`(\w+)`", group), group.split(":")[1].split(",")
            code = "import torch.nn as nn\nimport torch.nn.functional as F\n"
            code += "".join(f"import {name.strip()}\n" for name in imports) + "\n\n".join(parts[name] for name in names)
            exec(code, modules.setdefault(names[0], {}))
        blocks, x = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]), torch.randn(6, 3, 4)
        heart, elsewhere, kd = (modules[name] for name in ("LayerSampler", "set_mask", "masked_feature_loss"))
        for sampler in (heart["LayerSampler"]([(1, 2)] * 2), modules["TopNSampler"]["TopNSampler"](2, 4)):
            mask = sampler(6)
            masked = heart["masked_forward"](blocks, x, mask=mask)[0]
            close(masked, tf.masked_forward(blocks, x, mask=mask, skip=False)[0])
        model = nn.ModuleDict({"blocks": copy.deepcopy(blocks)})
        elsewhere["set_mask"](model, mask.detach())
        close(model["blocks"](x), masked)
        elsewhere["set_mask"](model, None)
        two = elsewhere["drop_blocks"](model, [0, 2])["blocks"](x)
        close(modules["prune"]["prune"](model, [0, 2])["blocks"](x), two)
        self.assertEqual(len(modules["add_lora"]["add_lora"](model)), 8)
        self.assertGreater(kd["masked_feature_loss"](x, x + 1), 0)
        self.assertEqual(kd["match_blocks"]([(1, 2)] * 2, [0, 3]), [(0, 1), (1, 3)])


class Recovery(Numeric):
    """Chapter 5: masked knowledge distillation."""

    def setUp(self):
        super().setUp()
        self.teacher, self.diffusion = tiny_dit(), tf.GaussianDiffusion()
        self.student, self.pairs = tf.prune(self.teacher, [0, 3]), [(0, 1), (1, 3)]

    def test_the_masked_loss_and_its_gradient_ignore_outliers_of_either_model_and_with_k_infinite_it_is_the_mse(self):
        h, g = 3 * torch.randn(2, 3, 40, 16) + 5
        h[0, 0, 0], g[2, 3, 4] = 1e4, -1e4       # massive activations
        left, right = (((x - x.mean((1, 2), True)).abs() <= 2 * x.std((1, 2), keepdim=True)) for x in (h, g))
        loss = tf.masked_feature_loss(h.requires_grad_(), g)
        loss.backward()
        squares = (h.detach() - g).square()
        means = [one[keep].mean() for one, keep in zip(squares, left & right)]
        close(loss, torch.stack(means).mean(), rtol=1e-6, atol=0)
        self.assertTrue(torch.equal(h.grad != 0, left & right))
        close(tf.masked_feature_loss(h, g, math.inf), F.mse_loss(h, g))
        self.assertGreater(squares.mean(), 1000 * loss, "which the massive ones swamp")
        self.assertEqual(tf.masked_feature_loss(torch.ones(1, 2, 2), torch.ones(1, 2, 2), math.inf).item(), 0)
        for other in (g[:1], g[0]):
            self.assertRaisesRegex(ValueError, "expected the same", tf.masked_feature_loss, other, g)

    def test_the_last_kept_block_of_a_group_is_matched_with_the_groups_last_but_not_across_a_cut(self):
        for groups, kept, cuts, pairs in (
                ([(2, 4), (3, 4)], [0, 2, 4, 5, 6], (), [(1, 3), (4, 7)]),
                ([(1, 2)] * 3, [0, 1, 4], (), [(1, 1), (2, 5)]),             # a group that keeps none: no pair
                ([(1, 2)] * 3, [0, 2, 5], (3,), [(0, 1), (1, 2), (2, 5)]),   # amid a group
                ([(1, 2)] * 3, [0, 3, 5], (3,), [(0, 1), (1, 3), (2, 5)]),
                ([(2, 4)], [1, 2], (2,), [(0, 1), (1, 3)]),
                ((3, 8), [0, 3, 4], (), [(0, 2), (1, 3), (2, 7)])):          # without groups
            self.assertEqual(tf.match_blocks(groups, kept, cuts), pairs)

    def test_the_loss_is_the_papers_mixture_and_a_student_that_is_its_teacher_has_none(self):
        batch = self.diffusion, torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        for kd in tf.KD_MODES:
            loss, parts = tf.recovery_loss(self.student, self.teacher, *batch, self.pairs, kd, beta=0.3)
            mixture = 0.9 * parts.get("kd", 0) + 0.1 * parts["denoising"] + 0.3 * parts.get("features", 0)
            close(loss, parts["denoising"] if kd == "none" else mixture)
            self.assertEqual(("kd" in parts, "features" in parts), (kd != "none", kd in ("masked", "feature")))
        with tf.autocast(torch.device(DEVICE)):  # as the teacher runs
            _, parts = tf.recovery_loss(self.teacher, self.teacher, *batch, [(1, 1), (3, 3)])
        self.assertEqual((parts["kd"].item(), parts["features"].item()), (0, 0))
        for pairs, kd in (([(0, 1), (1, 99)], "masked"), (self.pairs, "other")):               # it has no block 99
            self.assertRaises(ValueError, tf.recovery_loss, self.student, self.teacher, *batch, pairs, kd)

    def test_both_models_see_the_same_labels_some_dropped_and_the_weight_of_the_features_falls_to_zero(self):
        def on_step(step, metrics):
            rest = metrics["loss"] - 0.9 * metrics["kd"].item() - 0.1 * metrics["denoising"].item()
            betas.append(rest / metrics["features"].item())
        labels, betas, self.student.y_embedder.dropout_prob = {self.teacher: [], self.student: []}, [], 0.5
        for model in labels:
            model.register_forward_pre_hook(lambda module, args: labels[module].append(args[2].clone()))
        batches = itertools.repeat((torch.randn(32, 1, 8, 8), torch.randint(0, 3, (32,))))
        tf.recover(self.student, self.teacher, self.diffusion, batches, self.pairs, 5, beta=8.0, on_step=on_step)
        exactly(labels[self.student], labels[self.teacher])
        self.assertTrue(50 < (torch.stack(labels[self.student]) == 3).sum() < 110)
        np.testing.assert_allclose(betas, [8, 6, 4, 2, 0], atol=1e-3)


class Model(Numeric):
    """Chapter 1: DiT, and what it shares with MAR."""

    def test_presets_have_the_official_sizes_names_and_shapes_and_wrong_sizes_are_refused(self):
        sizes = {"DiT-XL/2": 675_129_632, "DiT-L/2": 458_102_816, "DiT-B/2": 130_512_416, "DiT-S/2": 32_963_360,
                 "DiT-D19/2": 459_983_264, "DiT-D14/2": 340_457_504, "DiT-D7/2": 173_121_440,
                 "MAR-H": 942_403_104, "MAR-L": 478_326_304, "MAR-B": 207_924_768}
        for name, size in sizes.items():
            model = tf.unallocated(tf.PRESETS[name]["network"])
            self.assertEqual(sum(p.numel() for p in model.parameters()), size, name)
        block = {"attn.qkv": (3456, 1152), "attn.proj": (1152, 1152), "mlp.fc1": (4608, 1152), "mlp.fc2": (1152, 4608),
                 "adaLN_modulation.1": (6912, 1152)}
        layers = {"x_embedder.proj": (1152, 4, 2, 2), "t_embedder.mlp.0": (1152, 256), "t_embedder.mlp.2": (1152, 1152),
                  "final_layer.linear": (32, 1152), "final_layer.adaLN_modulation.1": (2304, 1152)}
        layers |= {f"blocks.{i}.{name}": shape for i in range(28) for name, shape in block.items()}
        expected = {"pos_embed": (1, 256, 1152), "y_embedder.embedding_table.weight": (1001, 1152)}
        for name, shape in layers.items():
            expected |= {name + ".weight": shape, name + ".bias": shape[:1]}
        state = tf.unallocated(tf.DiT_models["DiT-XL/2"]).state_dict()
        self.assertEqual({name: tuple(value.shape) for name, value in state.items()}, expected)
        for build, sizes in ((tiny_dit, {"input_size": 9}), (tiny_dit, {"num_heads": 3}), (tiny_mar, {"num_heads": 3})):
            self.assertRaisesRegex(ValueError, "multiple", build, **sizes)

    def test_a_new_model_predicts_zero_and_its_blocks_are_the_identity(self):
        dit, mar = tf.DiT(**SMALL, patch_size=4, depth=2), tf.MAR_models["MAR-toy"](**SMALL | {"hidden_size": 64})
        (x, t, y), h, objective = dit_inputs(), torch.randn(2, 4, 16), tf.MaskedAutoregression(4)
        exactly(dit.blocks[0](h, torch.randn(2, 16)), h)
        times = objective.sample_t(2)
        for out in (dit(x, t, y), mar(objective.q_sample(x, times, objective.noise(x, times)), times, y)):
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
        c = f.silu(f.time(t, "t_embedder", model.t_embedder) + f.w["y_embedder.embedding_table.weight"][y])[:, None]
        for block in ("blocks.0", "blocks.1"):
            s1, k1, g1, s2, k2, g2 = f.linear(c, block + ".adaLN_modulation.1").chunk(6, -1)
            h = h + g1 * f.attention(f.norm(h) * (1 + k1) + s1, block + ".attn")
            u = f.linear(f.norm(h) * (1 + k2) + s2, block + ".mlp.fc1")
            u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
            h = h + g2 * f.linear(u, block + ".mlp.fc2")
        h = f.final(h, c, "final_layer").view(3, 2, 2, 4, 4, 4)              # (B, row, column, P, P, channels)
        rows = [torch.cat([h[:, row, 0], h[:, row, 1]], 2) for row in range(2)]                 # (B, P, 8, channels)
        close(model(x, t, y), torch.cat(rows, 1).permute(0, 3, 1, 2), rtol=1e-5, atol=1e-6)

    def test_guidance_moves_the_first_three_channels_or_all_but_never_the_variance(self):
        t, y, null = torch.tensor([500]), torch.tensor([0, 1]), torch.tensor([3, 3])
        for C, channels, guided in ((4, 3, 3), (4, None, 4), (1, 3, 1), (1, None, 1)):
            model, x = tiny_dit(in_channels=C), torch.randn(2, C, 8, 8)
            out = model.forward_with_cfg(x, t, y, 4.0, cfg_channels=channels)
            cond, uncond = model(x, t, y), model(x, t, null)
            close(out, torch.cat([(uncond + 4 * (cond - uncond))[:, :guided], cond[:, guided:]], 1))
        sizes = []                               # guidance 1 runs the model on the batch, another one on twice as many
        model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        for guidance in (1.0, 1.5):
            tf.GaussianDiffusion().sample(model, y, lambda: torch.randn(2, 1, 8, 8), 3, guidance)
        self.assertEqual(sizes, [2] * 3 + [4] * 3)

    def test_a_model_without_label_dropout_has_no_null_label_and_refuses_guidance(self):
        draw, y = tf.noise_source(range(2), (1, 8, 8), 0, DEVICE), torch.tensor([0, 2])
        for model, objective, _, _, _ in families(DEVICE, class_dropout_prob=0):
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
        self.d, self.t = tf.GaussianDiffusion(), torch.tensor([0, 1, 250, 700, 999])
        self.x0, self.noise = torch.rand(5, 2, 4, 4) * 2 - 1, torch.randn(5, 2, 4, 4)
        self.x_t = self.d.q_sample(self.x0, self.t, self.noise)
        self.beta = np.linspace(1e-4, 2e-2, 1000)
        self.abar = np.cumprod(1 - self.beta)

    def test_a_perfect_model_has_the_posterior_of_bayes_rule(self):
        """q(x_{t-1} | x_t, x0) from the product of two Gaussians; v = -1 and 1 are its variance and beta."""
        a, beta, before = (torch.tensor(values)[self.t].view(-1, 1, 1, 1) for values in (
            self.abar, self.beta, np.roll(self.abar, 1)))
        close(self.x_t, (a.sqrt() * self.x0 + (1 - a).sqrt() * self.noise).float())
        precision = (1 - beta) / beta + 1 / (1 - before)
        mean = (1 - beta).sqrt() / beta * self.x_t + before.sqrt() / (1 - before) * self.x0
        for v in (-1.0, 1.0, 0.3):
            p = self.d.p_mean_variance(torch.cat([self.noise, torch.full_like(self.noise, v)], 1), self.x_t, self.t)
            close(p["pred_xstart"][:4], self.x0[:4], rtol=1e-3, atol=1e-3)
            close(p["mean"][1:], (mean / precision)[1:].float(), rtol=1e-4, atol=2e-4)
            variance = ((1 - v) / 2 * (1 / precision).log() + (1 + v) / 2 * beta.log()).exp().expand_as(self.noise)
            close(p["log_variance"][1:].exp(), variance[1:].float(), rtol=1e-4, atol=0)

    def test_losses_are_the_mean_squared_error_and_the_kl_in_bits_which_trains_the_variance_alone(self):
        def divergence(first, second):           # KL of two steps (B,), in bits
            steps = [self.d.p_mean_variance(out, self.x_t, self.t) for out in (first, second)]
            normals = [torch.distributions.Normal(p["mean"], (0.5 * p["log_variance"]).exp()) for p in steps]
            return torch.distributions.kl_divergence(*normals).mean((1, 2, 3)) / math.log(2)
        out, other = torch.randn(2, 5, 4, 4, 4).requires_grad_()
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
            cdf = torch.distributions.Normal(mean, std).cdf(torch.cat([levels - 1 / 255, levels[-1:] + 1 / 255]))
            close(log_p.exp()[1:-1], cdf.diff()[1:-1], atol=5e-4, rtol=0)
            self.assertAlmostEqual(log_p.double().exp().sum().item(), 1, places=4)      # 256 bins share the mass

    def test_respacing_keeps_the_first_and_the_last_timestep_and_their_abar(self):
        for steps in (2, 3, 50, 250, 1000):
            r = self.d.respaced(steps)
            self.assertEqual((len({*r.timestep_map}), r.timestep_map[0], r.timestep_map[-1]), (steps, 0, 999))
            np.testing.assert_allclose(r.abar, self.abar[np.sort(r.timestep_map)], rtol=1e-12)
        for steps in (0, 1, -5, 1001):
            self.assertRaisesRegex(ValueError, "expected 2 to 1000", self.d.respaced, steps)

    def test_sampling_finds_gaussian_data_with_its_exact_denoiser(self):
        """For data N(mu, s^2) the best noise prediction is known; DDPM, DDIM and the steps between must return it. At a
        temperature, the drawn deviation scales along."""
        mu, s = 0.3, 0.5

        def exact(x, t, y=None):
            a = float(self.abar[t.item()])
            eps = math.sqrt(1 - a) * (x - math.sqrt(a) * mu) / (a * s * s + 1 - a)
            return torch.cat([eps, -torch.ones_like(x)], 1)
        for eta, temperature in ((0.0, 1), (0.5, 1), (1.0, 1), (1.0, 0.5), (1.0, 0)):
            x = self.d.denoise(exact, lambda: torch.randn(4000, 1, 1, 1), 200, eta, temperature=temperature)
            self.assertAlmostEqual(x.mean().item(), mu, delta=0.03)
            self.assertAlmostEqual(x.std().item(), temperature * s, delta=0.03 if temperature == 1 else 0.05)

    def test_ddpm_steps_are_the_posterior_mean_plus_learned_noise_and_ddim_is_deterministic(self):
        def draw(dtype=torch.float32, eta=1.0, count=7):
            return self.d.sample(model, y, functools.partial(next, iter(noises[:count])), 7, eta=eta, dtype=dtype)
        model, r, y, noises = tiny_dit(), self.d.respaced(7), torch.tensor([0, 2]), torch.randn(7, 2, 1, 8, 8)
        x, rough = noises[0], draw(torch.bfloat16)
        for i in reversed(range(7)):
            out = model(x, torch.full((2,), int(r.timestep_map[i])), y).detach()
            p = r.p_mean_variance(out, x, torch.full((2,), i))
            x = p["mean"] + ((0.5 * p["log_variance"]).exp() * noises[7 - i] if i else 0)
        close(draw(), x, rtol=1e-4, atol=1e-4)
        self.assertTrue(rough.dtype == torch.float32 and 0 < (rough - x).norm() < 0.05 * x.norm())
        exactly(draw(eta=0.0, count=1), draw(eta=0.0, count=1))


class Flow(Numeric):
    """Appendix C: SiT."""

    def test_points_and_losses_are_the_published_ones(self):
        """x_t = t data + (1 - t) noise; the velocity is data - noise; the second half of the output is not used."""
        flow, model, (x0, noise) = tf.FlowMatching(), tiny_dit(), torch.randn(2, 5, 1, 8, 8)
        t, y = torch.rand(5), torch.tensor([0, 1, 2, 3, 0])
        x_t = t.view(-1, 1, 1, 1) * x0 + (1 - t).view(-1, 1, 1, 1) * noise
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
        def exact(x, t, y):
            return 2 + (t / 4 - (1 - t)) / (t ** 2 / 4 + (1 - t) ** 2) * (x - t * 2)

        def error(solver, steps):
            z = torch.linspace(-3, 3, 200).view(-1, 1, 1, 1)
            x = tf.FlowMatching().sample(exact, torch.zeros(200), lambda: z, steps, solver=solver)
            return (x - (2 + z / 2)).abs().max().item()
        for solver, order in (("euler", 1), ("heun", 2)):
            self.assertTrue(0.8 < math.log2(error(solver, 20) / error(solver, 40)) / order < 1.2, solver)
        self.assertLess(error("heun", 40), 1e-2)
        self.assertRaisesRegex(ValueError, "euler or heun", error, "rk4", 2)

    def test_a_guided_step_follows_the_guided_velocity(self):
        model, y, z = tiny_dit(in_channels=4).requires_grad_(False), torch.tensor([0, 2]), torch.randn(2, 4, 8, 8)
        first = model.forward_with_cfg(z, torch.zeros(1), y, 1.5)[:, :4]
        second = model.forward_with_cfg(z + first, torch.ones(1), y, 1.5)[:, :4]
        ours = tf.FlowMatching().sample(model, y, lambda: z, 1, 1.5, "heun", dtype=torch.float32)
        close(ours, z + (first + second) / 2, rtol=1e-4, atol=1e-4)


class Masked(Numeric):
    """Appendix D: MAR."""

    def setUp(self):
        super().setUp()
        self.x0, self.y = torch.randn(3, 1, 8, 8), torch.tensor([0, 2, 3])
        self.objective = tf.MaskedAutoregression(16, repeats=2)
        self.t = self.objective.sample_t(3)
        self.noise = self.objective.noise(self.x0, self.t)
        self.x_t = self.objective.q_sample(self.x0, self.t, self.noise)

    def test_the_weights_have_the_official_names_and_shapes(self):
        layers = "z_proj z_proj_ln encoder_norm decoder_embed decoder_norm".split()
        for side, i in itertools.product(("encoder", "decoder"), range(16)):
            layers += [f"{side}_blocks.{i}.{name}" for name in "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2".split()]
        head = "time_embed.mlp.0 time_embed.mlp.2 cond_embed input_proj".split()
        head += [f"res_blocks.{i}.{name}" for i in range(8) for name in "in_ln mlp.0 mlp.2 adaLN_modulation.1".split()]
        layers += [f"diffloss.net.{name}" for name in (*head, "final_layer.linear", "final_layer.adaLN_modulation.1")]
        shapes = {"fake_latent": (1, 1024), "mask_token": (1, 1, 1024), "encoder_pos_embed_learned": (1, 320, 1024),
                  "decoder_pos_embed_learned": (1, 320, 1024), "diffusion_pos_embed_learned": (1, 256, 1024),
                  "class_emb.weight": (1000, 1024)}
        state = tf.unallocated(tf.MAR).state_dict()
        names = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
        self.assertEqual(state.keys(), names | {*shapes})
        self.assertEqual({name: tuple(state[name].shape) for name in shapes}, shapes)

    def test_the_forward_pass_is_the_published_one(self):
        """An independent float64 version, without modules; a batch has three examples, which know other tokens."""
        model, x0, rows = tiny_mar().double(), self.x0.double(), torch.arange(3)[:, None]
        f, head, known = Formulas(model), "diffloss.net.", torch.tensor([[1, 5, 12], [0, 2, 15], [7, 8, 9]])

        def block(h, name):                      # h (B, T, D)
            h = h + f.attention(f.norm(h, name + ".norm1"), name + ".attn")
            u = f.linear(f.norm(h, name + ".norm2"), name + ".mlp.fc1")
            return h + f.linear(u * (1 + torch.erf(u / math.sqrt(2))) / 2, name + ".mlp.fc2")
        t = torch.randint(0, 1000, (3, 16)).scatter_(1, known, -1)
        x_t, noisy = self.objective.q_sample(x0, t, self.noise[:3].double()), t >= 0
        tokens = torch.stack([x0[:, :, i:i + 2, j:j + 2].flatten(1) for i in range(0, 8, 2) for j in range(0, 8, 2)], 1)
        exactly(x_t[rows, known], tokens[rows, known])
        label = torch.cat([f.w["class_emb.weight"], f.w["fake_latent"]])[self.y, None]          # three times in front
        place = f.w["encoder_pos_embed_learned"][0]
        h = torch.cat([label + place[:3], f.linear(tokens[rows, known], "z_proj") + place[3 + known]], 1)
        h = block(block(f.norm(h, "z_proj_ln"), "encoder_blocks.0"), "encoder_blocks.1")
        h = f.linear(f.norm(h, "encoder_norm"), "decoder_embed")
        full = f.w["mask_token"].repeat(3, 16, 1)
        full[rows, known] = h[:, 3:]
        h = torch.cat([h[:, :3], full], 1) + f.w["decoder_pos_embed_learned"]
        h = block(block(h, "decoder_blocks.0"), "decoder_blocks.1")
        z = (f.norm(h, "decoder_norm")[:, 3:] + f.w["diffusion_pos_embed_learned"])[noisy]      # (n, D)
        time = f.time(t[noisy], head + "time_embed", model.diffloss["net"].time_embed)
        c, u = f.silu(time + f.linear(z, head + "cond_embed")), f.linear(x_t[noisy], head + "input_proj")
        for name in (head + "res_blocks.0.", head + "res_blocks.1."):
            shift, scale, gate = f.linear(c, name + "adaLN_modulation.1").chunk(3, -1)
            v = f.linear(f.norm(u, name + "in_ln") * (1 + scale) + shift, name + "mlp.0")
            u = u + gate * f.linear(f.silu(v), name + "mlp.2")
        close(model(x_t, t, self.y), f.final(u, c, head + "final_layer"), rtol=1e-9, atol=1e-9)

    def test_the_loss_is_that_of_each_noisy_token_by_itself_repeated_with_other_noise(self):
        model, t, x_t = tiny_mar().requires_grad_(False), self.t, self.x_t
        self.assertEqual((t.shape, tf.MaskedAutoregression().sample_t(2).shape), ((6, 16), (8, 256)))
        self.assertTrue(torch.equal(t[:3] < 0, t[3:] < 0) and not torch.equal(t[:3], t[3:]))
        cosine = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(0.999, 1 - cosine[1:] / cosine[:-1])
        plain, noisy = tf.GaussianDiffusion(betas), t >= 0
        np.testing.assert_allclose(self.objective.diffusion.abar, np.cumprod(1 - betas))
        tokens, noises = tf.patchify(self.x0.repeat(2, 1, 1, 1), 16), tf.patchify(self.noise, 16)
        exactly(tokens[0, 5], self.x0[0, 0, 2:4, 2:4].reshape(-1))
        out = model(x_t, t, self.y)
        close(out, torch.cat([model(x_t[:3], t[:3], self.y), model(x_t[3:], t[3:], self.y)]))   # copies are apart
        a = torch.tensor(plain.abar).float().to(t.device)[t[noisy], None]
        noised = a.sqrt() * tokens[noisy] + (1 - a).sqrt() * noises[noisy]
        close(x_t[noisy], noised, rtol=1e-4, atol=1e-5)
        other, losses, distances = out + 0.5 * torch.randn(out.shape), torch.zeros(6, 16), torch.zeros(6, 16)
        losses[noisy] = plain.losses(out, tokens[noisy], noised, t[noisy], noises[noisy])["loss"]
        distances[noisy] = plain.distillation_losses(other, out, noised, t[noisy])
        loss = self.objective.training_losses(model, self.x0, t, self.y, self.noise)["loss"]
        close(loss, (losses.sum(1) / noisy.sum(1)).view(2, 3).mean(0), rtol=1e-3, atol=1e-5)
        close(self.objective.distillation_losses(other, out, x_t, t), distances.sum(1) / noisy.sum(1))

    def test_the_known_tokens_are_as_many_in_every_example_and_0_to_30_percent(self):
        known = torch.stack([tf.MaskedAutoregression(100).sample_t(4)[:4] < 0 for _ in range(300)])     # (300, 4, 100)
        counts, places = known.sum(2), known.sum((0, 1)).float()
        self.assertTrue((counts == counts[:, :1]).all())
        # of a normal with mean 1 and std 0.25, cut to [0.7, 1], the mean is 1 - 0.25 (0.3989 - 0.1942) / 0.3849 = 0.867
        self.assertTrue(0 <= counts.min() <= 2 and 28 <= counts.max() <= 30 and 11.3 < counts.double().mean() < 14.3)
        self.assertGreater((known[:, 0] != known[:, 1]).any(1).sum(), 280)
        self.assertLess((places - places.mean()).abs().max(), 5 * places.mean().sqrt())

    def test_sampling_opens_tokens_by_the_cosine_and_guidance_grows_with_them(self):
        """The head says 1 where there is a class, and 0 where there is none, so tokens are the guidance they got."""
        def condition(x, known, y):
            counts.append(known.sum(1).tolist())
            self.assertTrue((x[known] >= 1).all() and not x[~known].any(), "the encoder must see what was drawn")
            return (y < 3).float().view(-1, 1, 1).expand(-1, 64, 1), []

        def denoise(predict, draw, head_steps, *, temperature, **more):
            eps, v = predict(draw(), torch.tensor([0])).chunk(2, 1)
            self.assertEqual((head_steps, temperature, v.min(), v.max()), (7, 0.9, 1, 1), "the variance of the class")
            return eps

        def images(count, steps, guidance=1.0):
            draw = tf.noise_source(range(count), (1, 8, 8), 0, DEVICE)
            return objective.sample(model, torch.arange(count), draw, steps, guidance, head_steps=7, temperature=0.9)
        model = SimpleNamespace(patch_size=1, input_size=8, in_channels=1, y_embedder=tf.LabelEmbedder(3, 1, 0.1),
                                condition=condition, diffloss={"net": lambda x, t, z: torch.cat([z, z], 1)})
        objective, counts = tf.MaskedAutoregression(64), []
        objective.diffusion.denoise = denoise
        drawn, left = images(2, 8, 3.0), [math.floor(64 * math.cos(math.pi / 2 * i / 8)) for i in range(9)]
        self.assertEqual(counts, [[64 - n] * 4 for n in left[:-1]])
        scales = [torch.full((before - n,), 1 + 2 * (64 - max(1, n)) / 64) for before, n in zip(left, left[1:])]
        close(drawn.flatten(1).sort().values, torch.cat(scales).expand(2, -1))
        self.assertFalse(torch.equal(*drawn), "every image has an order of its own")
        counts.clear()
        images(1, 64)
        self.assertEqual(counts, [[n] for n in range(64)])   # at least one is opened
        self.assertRaisesRegex(ValueError, "expected 1 to 64", images, 1, 65)

    def test_a_mask_of_encoder_and_decoder_is_the_pruned_model_and_has_its_gradient(self):
        model, pruned = tiny_mar(), tf.prune(tiny_mar(), [1, 2])
        mask = torch.tensor([0.0, 1, 1, 0]).repeat(3, 1).requires_grad_()
        out, features = model(self.x_t, self.t, self.y, mask=mask, hidden=(1, 2))
        close(pruned(self.x_t, self.t, self.y, hidden=(0, 1)), (out, features))
        self.assertEqual([f.shape[1] for f in features], [3 + (self.t[0] < 0).sum(), 3 + 16])
        out.square().sum().backward()
        self.assertTrue((mask.grad != 0).all())
        self.assertEqual([tf.prune(model, kept).config()["encoder_depth"] for kept in ([1, 2], [2, 3])], [1, 0])

    def test_training_drops_activations_and_evaluation_does_not(self):
        block = tiny_mar(dropout=0.5).decoder_blocks[1]
        for p in block.parameters():
            nn.init.ones_(p)                     # all outputs are the same, but for the dropout
        for layer in (block.attn, block.mlp):
            out, sure = layer.train()(torch.ones(100, 5, 16)), layer.eval()(torch.ones(100, 5, 16))
            self.assertTrue(0.45 < (out == 0).float().mean() < 0.55 and len(sure.unique()) == 1)     # of the outputs
            self.assertGreater(out[out != 0].std() / out.mean(), 0.04)       # and of attention or hidden activations

    def test_the_method_runs_on_all_families_unchanged(self):
        """Learning, pruning and recovery, in every mode, know no model and no objective."""
        self.enterContext(torch.device("cpu"))   # where data are read
        for teacher, objective, data, batches, _ in families(DEVICE):
            examples, groups = tf.fixed_examples(data, device=DEVICE), [(1, 2)] * 2
            sampler, _ = tf.learn_layers(teacher, tf.masked_denoising(objective, batches()), groups, 5)
            self.assertTrue(all(torch.isfinite(p).all() and p.any() for p in sampler.parameters()))
            pruned, pairs = tf.prune(teacher, sampler.kept()), tf.match_blocks(groups, sampler.kept(), [2, 4])
            before, weights = tf.calibration_loss(pruned, objective, examples), copy.deepcopy(teacher.state_dict())
            for kd in tf.KD_MODES:
                student = tf.recover(copy.deepcopy(pruned), teacher, objective, batches(), pairs, 20, kd=kd, beta=2e-4,
                                     lr=2e-3)
                self.assertLess(tf.calibration_loss(student, objective, examples), before, kd)
            exactly(dict(teacher.state_dict()), dict(weights))


def families(device, **sizes):
    """Of each family a model, its objective, data, a function that returns their batches, and how to sample faster."""
    data = tf.toy_digits(40, size=8)
    data.labels %= 3
    for build, objective, more in ((tiny_dit, tf.GaussianDiffusion(), {}), (tiny_dit, tf.FlowMatching(), {}),
                                   (tiny_mar, tf.MaskedAutoregression(16), {"head_steps": 2})):
        yield build(**sizes).to(device), objective, data, functools.partial(tf.data_batches, data, 8, 0, device), more


class Placement(unittest.TestCase):
    """Everything that is computed stays on the model's device. Here that is torch's "meta" device, whose tensors have
    shapes and no numbers, and which refuses to be mixed with the CPU as a GPU does."""

    def setUp(self):
        def replace(owner, name, instead):       # what needs numbers, is for real devices, or takes a CPU's numbers
            real = getattr(owner, name)
            self.enterContext(mock.patch.object(owner, name, lambda *args, **more: instead(real, *args, **more)))

        def checked(real, tensor, key, *value):
            parts = (*key, *value) if isinstance(key, tuple) else (key, *value)
            self.assertTrue(not tensor.is_meta or all(part.is_meta for part in parts if torch.is_tensor(part)))
            return real(tensor, key, *value)

        def nonzero(tensor):                     # 12 of 16 tokens are noisy; 3 + 4 are in the encoder
            return torch.empty(2, len(tensor) * {16: 12, 19: 7}[tensor.shape[1]], dtype=torch.long).to("meta").unbind()
        for name, value in (("item", lambda x: 0.75), ("tolist", lambda x: [*range(x.numel())]), ("nonzero", nonzero),
                            ("__bool__", lambda x: False)):  # as many blocks are kept as their number
            replace(torch.Tensor, name, lambda real, x, *args, value=value, **more: (
                value(x) if x.is_meta else real(x, *args, **more)))
        replace(torch.Tensor, "__getitem__", checked)
        replace(torch.Tensor, "__setitem__", checked)
        replace(nn.init, "trunc_normal_", lambda real, tensor, *args: tensor.fill_(0.75))
        replace(tf, "autocast", lambda real, *args: contextlib.nullcontext())
        replace(torch.optim, "AdamW", lambda real, *args, fused, **more: real(*args, **more))

    def test_learning_recovery_sampling_criteria_and_measures_never_leave_the_device_of_the_model(self):
        for teacher, objective, data, batches, more in families("meta"):
            groups, examples = [(1, 2)] * 2, tf.fixed_examples(data, device="meta")
            for update in ("lora", "full", "frozen"):
                tf.learn_layers(teacher, tf.masked_denoising(objective, batches()), groups, 1, update=update)
            for kd in tf.KD_MODES:
                tf.recover(tf.prune(teacher, [0, 3]), teacher, objective, batches(), [(0, 1), (1, 3)], 1, kd=kd)
            for name in ("shortgpt", "flux-lite", "sensitivity", "oracle", "random"):
                tf.CRITERIA[name](teacher, groups, objective, examples)
            draw, labels = tf.noise_source(range(2), (1, 8, 8), 0, "meta"), torch.tensor([0, 2], device="meta")
            for guidance in (1.0, 1.5):
                x = objective.sample(teacher, labels, draw, 2, guidance, **more)
                self.assertEqual((x.shape, x.device.type), ((2, 1, 8, 8), "meta"))
        features = {"mu": np.zeros(3), "sigma": np.eye(3), "features": np.zeros((9, 3), np.float32)}
        self.assertEqual(tf.compare_statistics(features, features, "meta")["recall"], 0.75)

STEPS = "--teacher-steps {0} --learn-steps {0} --recover-steps {0} "
TINY = STEPS.format(3) + f"--samples 10 --sample-steps 2 --batch-size 8 --device {DEVICE} --out"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent), "OMP_NUM_THREADS": "1"}
QUICK = """import contextlib, functools, itertools, sys, tinyfusion as tf
tf.toy_digits = functools.partial(tf.toy_digits, 64)
tf.train_judge = functools.partial(tf.train_judge, steps=5)
"""                                              # any digits and any judge will do
load = functools.partial(torch.load, weights_only=True)


def split(*words):
    """Words cut at spaces, paths not."""
    return [part for word in words for part in ([str(word)] if isinstance(word, Path) else word.split())]


def call(*words, main=tf.main):
    """A command line run in this process: its exit status, stdout and stderr."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(split(*words))
    return status, out.getvalue(), err.getvalue()


def with_prefix(prefix, weights):
    return {prefix + name: weight for name, weight in weights.items()}


def save_images(folder, n, height, width):
    """Random images (n, height, width, 3), which are returned, as 00.png, 01.png ... in a folder."""
    images = np.random.default_rng(n).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return images


class InFolder(unittest.TestCase):
    """Tests with a folder of their own, of runs on 64 digits and with a judge of five steps."""

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        torch.manual_seed(0)
        self.enterContext(mock.patch.object(tf, "toy_digits", functools.partial(tf.toy_digits, 64)))
        self.enterContext(mock.patch.object(tf, "train_judge", functools.partial(tf.train_judge, steps=5)))

    def refused(self, reason, *words, main=tf.main, lines=1):
        """Exit status 2, and one line that names the reason; lines None: after lines of progress."""
        status, _, said = call(*words, main=main)
        self.assertEqual((status, lines or said.count("\n")), (2, said.count("\n")), (words, said))
        self.assertIn(reason, said.splitlines()[-1])

    def story(self, *words, main=tf.main):
        """Run a program and return what it printed."""
        status, out, said = call(*words, main=main)
        self.assertEqual(status, 0, said)
        return out

    def draw(self, *words):
        """Run sample.py; what it printed, and the arrays that it wrote."""
        said = self.story(*words, "--npz", self.folder / "drawn.npz", main=sample.main)
        return said, tf.load_arrays(self.folder / "drawn.npz")

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
        a, b = rng.normal(size=(500, 30)), rng.normal(size=(500, 30)) @ rng.normal(size=(30, 30)) * 0.2 + 0.3
        (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x.T)) for x in (a, b))
        expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
        self.assertAlmostEqual(tf.frechet_distance(m1, s1, m2, s2) / expected, 1, places=6)

    def test_inception_score_precision_and_recall_see_quality_and_variety(self):
        self.assertAlmostEqual(tf.inception_score(torch.full((50, 10), 0.1)), 1)
        self.assertAlmostEqual(tf.inception_score(torch.eye(10).repeat(5, 1)), 10)
        self.assertGreater(tf.inception_score(torch.eye(10).repeat_interleave(2000, 0)), 9.9, "sorted, in four splits")
        real = torch.cat([torch.randn(200, 4), torch.randn(200, 4) + 50]).to(DEVICE)
        self.assertEqual(tf.precision_recall(real, real), (1, 1))
        self.assertEqual(tf.precision_recall(real, real + 1000), (0, 0))
        precision, recall = tf.precision_recall(real, torch.randn_like(real) * 0.9)            # one of two modes
        self.assertTrue(precision > 0.8 and 0.3 < recall <= 0.5, (precision, recall))

    def test_images_are_looked_at_without_tf32(self):
        def net(x, **_):
            seen.append(torch.backends.cudnn.allow_tf32)
            return torch.zeros(1, 1)
        seen, (judge, _) = [], tf.train_judge(tf.toy_digits(size=8), "cpu")
        with mock.patch.object(torch.jit, "load", return_value=mock.Mock(eval=lambda: net)):
            tf.load_inception("net.pt", "cpu")[0](torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
        with mock.patch.object(tf, "to_float", lambda images: net(images) + images):
            judge(torch.zeros(1, 1, 8, 8))
        self.assertEqual((len(seen) > 1, set(seen), torch.backends.cudnn.allow_tf32), (True, {False}, True))

    def test_fid_is_the_same_from_a_folder_an_npz_file_and_saved_statistics(self):
        folder, inception = self.folder, ["--inception", self.folder / "net.pt"]
        a, b = save_images(folder / "a", 60, 12, 12), save_images(folder / "b" / "sub", 50, 12, 12)
        torch.jit.script(StandIn()).save(folder / "net.pt")
        torch.jit.script(nn.ReLU()).save(folder / "other.pt")
        features = [StandIn()(torch.from_numpy(z).permute(0, 3, 1, 2), True).detach().numpy() for z in (a, b)]
        (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x.T)) for x in features)
        for name, arrays in (("a", {"arr_0": a, "settings": "250 steps, guidance 1.5"}), ("b", {"arr_0": b}),
                             ("ours", {"mu": m1, "sigma": s1}), ("adm", {"mu": m2, "sigma": s2, "arr_0": b[:30]}),
                             ("grey", {"arr_0": a[..., 0]}), ("wide", {"mu": np.zeros(3), "sigma": np.eye(3)}),
                             ("nan", {"mu": np.full(8, np.nan), "sigma": np.eye(8)}), ("one", {"arr_0": a[:1]})):
            (np.savez_compressed if name == "b" else np.savez)(folder / f"{name}.npz", **arrays)
        (folder / "torn.npz").write_bytes((folder / "b.npz").read_bytes()[:-900])
        (folder / "empty").mkdir()
        for one, other in (("a", "b"), ("a", "b.npz"), ("a.npz", "b"), ("a.npz", "adm.npz"), ("ours.npz", "adm.npz")):
            net = inception if one != "ours.npz" else []
            words = self.story("--device cpu --fid", folder / one, "--ref", folder / other, *net)
            for part, there in ((f"| {tf.frechet_distance(m1, s1, m2, s2):.4g} |", True), ("precision", net),
                                ("60 samples", net), ("250 steps, guidance 1.5", one == "a.npz"),
                                ("warning: an FID of 60", net), ("warning: an FID of 50", other in ("b", "b.npz"))):
                self.assertEqual(part in words, bool(there), (part, words))
        start = ["--device cpu --fid", folder / "a", "--ref"]
        for other in "empty nothing one.npz nothing.npz torn.npz grey.npz nan.npz".split():
            self.refused(str(folder / other), *start, folder / other, *inception)
        self.refused("do not fit", *start, folder / "wide.npz", *inception)
        self.refused("--inception FILE is needed", *start, folder / "b")
        for net in ("a.npz", "other.pt"):
            self.refused("TorchScript", *start, folder / "b", "--inception", folder / net)

    def test_models_are_drawn_in_turn_from_the_same_noise_and_looked_at_together(self):
        def look(images):
            return images.flatten(1)[:, ::9].numpy() / 255, np.full((len(images), 3), 1 / 3)

        def watched(model, labels, index):
            drawn.append((len(model.blocks), index[0]))
            return draw(model, labels, index)
        drawn, labels, models = [], torch.arange(40) % 3, {"one": tiny_dit(), "other": tf.prune(tiny_dit(), [0, 3])}
        draw = functools.partial(tf.sample_images, diffusion=tf.GaussianDiffusion(), seed=0, sampling={"steps": 2})
        found, seconds = tf.draw_all(models, labels, watched, look, batch_size=8)
        self.assertEqual(drawn, [(depth, first) for first in range(0, 40, 8) for depth in (4, 2)], "they take turns")
        self.assertEqual([len(seconds[name]) for name in models], [5, 5])
        sigma = np.cov(look(draw(models["one"], labels, range(40)))[0].T)
        np.testing.assert_allclose(found["one"]["sigma"], sigma, rtol=1e-3, atol=1e-5)
        self.assertEqual(tf.compare_statistics(found["one"], found["one"])["precision"], 1)


class Data(InFolder):
    """Images, latents, encoding."""

    def test_images_are_grey_or_all_rgb_and_cropped_from_the_middle_and_broken_files_are_named(self):
        a, b = self.folder / "a", self.folder / "b"
        for folder, i in itertools.product((b, a), range(3)):
            folder.mkdir(exist_ok=True)
            Image.new("L", (20, 14), 50 * i).save(folder / f"{i}.png")
        data = tf.open_data(self.folder, 8)
        self.assertEqual((data.images.shape, data.labels.tolist(), data.classes),
                         ((6, 1, 8, 8), [0, 0, 0, 1, 1, 1], ["a", "b"]))
        Image.new("P", (8, 8)).save(a / "palette.gif")
        Image.new("CMYK", (8, 8)).save(a / "print.jpg")
        Image.new("RGBA", (8, 8), (255, 0, 0, 51)).save(a / "transparent.png")
        turned = Image.new("L", (8, 8))
        turned.paste(255, (0, 0, 8, 4))          # the upper half is white, the right one after turning
        entries = struct.pack("<HHL4sHHLHH", 0x100, 2, 4, b"odd", 0x112, 3, 1, 6, 0)            # words, for a number
        turned.save(a / "turned.png", exif=b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + entries + bytes(4))
        (b / ".hidden").mkdir()
        (b / ".hidden" / "file.png").write_text("is skipped")
        images = tf.open_data(self.folder, 8).images
        self.assertEqual((images.shape, images[4, :, 0, 0].tolist()), ((10, 3, 8, 8), [255] * 3))
        self.assertEqual(images[5, :, 0, 0].tolist(), [255, 204, 204], "red on white")
        self.assertEqual(images[6, 0, :, ::7].tolist(), [[0, 255]] * 8)
        for mode in ("I;16", "I", "F"):
            Image.new(mode, (8, 8)).save(b / "deep.tif")
            self.assertRaisesRegex(tf.UserError, "deep.tif.*" + mode, tf.open_data, self.folder, 8)
        (a / "torn.png").write_bytes(b"no image")
        self.assertRaisesRegex(tf.UserError, "torn.png: ", tf.open_data, self.folder, 8)
        for size in ((100, 37), (16, 300), (9, 7)):
            self.assertEqual(tf.center_crop(Image.new("RGB", size), 16).size, (16, 16))
        stripes = np.repeat([[0] * 16 + [200] * 16 + [0] * 16], 16, 0).astype(np.uint8)
        self.assertTrue((np.asarray(tf.center_crop(Image.fromarray(stripes), 16)) == 200).all())

    def test_links_are_followed_but_not_in_circles_and_numbers_sort_by_value(self):
        root = self.folder / "data"
        for name in range(12):
            save_images(root / str(name), 1, 8, 8)
        save_images(self.folder / "elsewhere", 3, 8, 8)
        for name, target in (("link", self.folder / "elsewhere"), ("circle", root)):
            (root / "2" / name).symlink_to(target)
        data = tf.open_data(root, 8)
        self.assertEqual((data.classes, (data.labels == 2).sum()), ([str(name) for name in range(12)], 1 + 3))
        self.assertEqual(len(tf.files_in(root)), 12 + 3, "once each, although class 2 links back to all")
        (root / "3" / "dead.png").symlink_to(self.folder / "nowhere")
        self.assertRaisesRegex(tf.UserError, "dead.png", tf.open_data, root, 8)

    def test_the_classes_of_data_and_checkpoint_have_the_same_names_or_one_has_numbers(self):
        images, labels = torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1])
        for classes, names, expected in ((["b", "c"], ["b", "c"], "bc"), (["0", "1"], ["a", "b"], "ab"),
                                         (["x", "y"], ["0", "1"], "xy")):
            data = tf.match_classes(tf.Dataset(images, labels, classes), names)
            self.assertEqual((data.labels.tolist(), data.classes), ([0, 1, 1], list(expected)))
        for names in (list("abc"), list("yx"), list("012"), ["x"]):
            with self.assertRaisesRegex(tf.UserError, "'x', 'y'"):
                tf.match_classes(tf.Dataset(images, labels, ["x", "y"]), names)

    def latents(self, n=20):
        """A folder of latents: 2 i + m in the middle."""
        x = np.arange(2 * n, dtype=np.float32).reshape(n, 2, 1, 1, 1) + np.zeros((4, 4, 4), np.float32)
        for name, content in (("latents.npy", x), ("labels.npy", np.arange(n) % 7)):
            np.save(self.folder / name, content)
        return self.folder

    def test_batches_of_latents_are_half_mirrored_follow_from_the_step_and_are_shared_by_processes_and_parts(self):
        data = tf.open_data(self.latents(), 8)
        self.assertEqual((type(data.images), data.shape, data.classes), (np.memmap, (4, 4, 4), list("0123456")))
        batches = [*itertools.islice(tf.data_batches(data, 4, seed=0), 50)]
        seen = torch.stack([x[:, 0, 0, 0].long() for x, _ in batches])       # (50, 4)
        exactly(seen // 2 % 7, torch.stack([y for _, y in batches]))
        self.assertEqual([len((seen[i:i + 5] // 2).unique()) for i in (0, 5)], [20, 20], "epochs")
        self.assertTrue(70 < (seen % 2).sum() < 130, "200 coins")
        for start in (3, 7):                     # from any step on
            exactly(next(tf.data_batches(data, 4, 0, start=start))[0][:, 0, 0, 0].long(), seen[start])
        found = []
        for rank in (0, 1):
            with mock.patch.multiple(tf, rank=lambda: rank, world_size=lambda: 2):
                found += [x[:, 0, 0, 0] for x, _ in itertools.islice(tf.data_batches(data, 4, 0, start=3, parts=2), 2)]
        exactly(torch.stack(found).long().sort(0).values, seen[3].sort().values[:, None])

    def test_data_that_cannot_be_used_is_refused_with_the_reason(self):
        def refused(reason, folder, num_classes=None):
            with self.assertRaisesRegex(tf.UserError, reason):
                data = tf.open_data(folder, 8, num_classes)
                data.read(torch.arange(20), torch.ones(20).int())
        images, N, good = self.folder / "images", np.arange(20), np.load(self.latents() / "latents.npy")
        spoiled = good.copy()
        spoiled[13, 1, 0, 0, 0] = np.nan
        for content, reason in ((good[:5], r"\(5, 2, 4, 4, 4\)"), (good[:, 0], r"\(20, 4, 4, 4\)"),
                                (good.astype(object), "npy"), (spoiled, r"latents.npy.*\[13\]")):
            np.save(self.folder / "latents.npy", content)
            refused(reason, self.folder)
        for labels, reason, count in ((N / 2, r"int .N,.", None), (N % 7, "expected 0 to 5", 6), (N - 2, "-2", None),
                                      (N * 10 ** 8, "0 to 99999", None), (N - 1, "same --encode command again", None)):
            np.save(self.folder / "labels.npy", labels)
            refused(reason, self.folder, count)
        save_images(images / "a", 2, 8, 8)
        (images / "empty").mkdir()
        refused("without images: .*empty", images)
        refused("empty: expected one sub-folder", images / "empty")
        refused("nowhere", images / "nowhere")
        (images / "empty").rmdir()
        (images / "notes.txt").touch()
        refused("notes.txt", images)

    def test_an_encoding_killed_at_any_point_goes_on_with_the_same_command_and_processes_share_one_file(self):
        """Around everything it does: every call of the VAE, every write, and every flush to the disk."""
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
            clock = itertools.count(0, 4)        # seconds; a flush every second batch
            with (mock.patch.object(ToyVAE, "encode", around(ToyVAE.encode)),
                  mock.patch.object(tf, "write_file", around(tf.write_file)),
                  mock.patch.object(os, "fsync", around(os.fsync)),
                  mock.patch.object(time, "monotonic", lambda: next(clock))):
                call(main=lambda _: tf.encode_images(images, 32, ToyVAE(), out, {"vae": vae}, batch_size=1))
            return {path.name: path.read_bytes() for path in out.glob("[!.]*")}

        def gather(value=None):                  # what the first process tells all
            first.extend([value] if value is not None and not first else [])
            return first or [None]
        images, done, events, stop, flushed, first = self.folder / "images", self.folder / "whole", [], None, 0, []
        save_images(images / "a", 3, 32, 50)
        image = torch.from_numpy(save_images(images / "b", 4, 32, 32)[0]).permute(2, 0, 1)
        whole = encode(done)
        self.assertEqual(whole.keys(), {"latents.npy", "labels.npy", "latents.json"})
        data = tf.open_data(done, 8)
        self.assertEqual((data.shape, data.labels.tolist(), data.latent), ((4, 4, 4), [0] * 3 + [1] * 4, True))
        x = ToyVAE().decode(data.read(torch.tensor([3, 3]), torch.tensor([0, 1])))[..., ::8, ::8].float()
        close(x, torch.stack([image, image.flip(2)])[..., ::8, ::8].float(), rtol=0, atol=8)
        for number in range(1, len(events)):     # the last event is after the end
            out, stop = self.folder / f"killed-{number}", number
            events.clear()
            self.assertRaises(KeyboardInterrupt, encode, out)
            stop = None
            if (out / "labels.npy").exists() and (np.load(out / "labels.npy") < 0).any():
                flushed += (np.load(out / "labels.npy") >= 0).any()
                self.assertRaisesRegex(tf.UserError, "same --encode command again", tf.open_data, out, 32)
                self.assertRaisesRegex(tf.UserError, "vae toy .now other.", encode, out, "other")
            self.assertEqual(encode(out), whole, number)
        self.assertGreater(flushed, 2, "some were stopped amid the images")
        self.assertEqual(encode(done), whole, "nothing is left to do")
        (done / "latents.json").unlink()
        self.assertRaisesRegex(tf.UserError, "is there already", encode, done)
        for rank, left in ((0, 3), (1, 0)):
            with mock.patch.multiple(tf, world_size=lambda: 2, gather=gather, rank=lambda: rank):
                shared = encode(self.folder / "shared")
            self.assertEqual((np.load(self.folder / "shared" / "labels.npy") < 0).sum(), left)
        self.assertEqual(shared, whole)

    def test_a_broken_image_ends_an_encoding_with_its_name_and_a_repaired_one_goes_on(self):
        image, out = self.folder / "images" / "a" / "17.png", self.folder / "new" / "out"
        save_images(image.parent, 20, 32, 32)
        words = ["--device cpu --vae toy --image-size 32 --encode", self.folder / "images", "--out", out]
        self.enterContext(mock.patch.object(tf, "VAE", ToyVAE))
        with mock.patch.object(ToyVAE, "encode", side_effect=RuntimeError("kernel size")):
            self.refused("kernel size; expected images, an --image-size that the autoencoder takes", *words)
        self.assertFalse(out.exists())
        whole = image.read_bytes()
        image.write_bytes(whole[:100])
        self.refused("17.png", *words, lines=None)
        image.write_bytes(whole)
        with mock.patch.object(os, "fsync", side_effect=OSError("No space left on device")):
            self.refused("No space left on device", *words, lines=None)
        self.story(*words)
        self.assertEqual(len(tf.open_data(out, 32).labels), 20)

    def test_a_vae_of_diffusers_encodes_and_decodes_or_says_what_to_install(self):
        with mock.patch.dict(sys.modules, {"diffusers": None}):
            self.assertRaisesRegex(tf.UserError, "pip install diffusers", tf.VAE, "any", "cpu")
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            self.skipTest("the rest needs pip install diffusers")
        net = AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4).eval().requires_grad_(False)
        net.save_pretrained(self.folder)
        vae, images, noise = tf.VAE(self.folder, "cpu"), tf.toy_digits(size=32).images[:3], torch.randn(3, 4, 4, 4)
        posterior = net.encode(tf.to_float(images.expand(-1, 3, -1, -1))).latent_dist
        latents = (posterior.mean + posterior.std * noise) * 0.18215
        close(vae.encode(images.expand(-1, 3, -1, -1), noise), latents)
        exactly(vae.decode(latents), tf.to_uint8(net.decode(latents / 0.18215).sample))
        for name, reason in ((self.folder, "4 channels, not 16"), ("/nothing", "--vae /nothing: ")):
            self.assertRaisesRegex(tf.UserError, reason, tf.VAE, name, "cpu", 16)


class Training(InFolder):
    """The loop: averages, compiling, stopping and going on."""

    def train(self, steps, decay=None, **more):
        """Train a layer whose bias the loss does not use; its weights and rates along the way, and their average."""
        model, seen = nn.Linear(1, 1), []
        average = tf.train(model, lambda step: (model.weight.sum(), {}), steps, ema_decay=decay, **more,
                           on_step=lambda step, metrics: seen.append((model.weight.item(), metrics["lr"])))
        self.assertEqual(model.bias.grad.item(), 0)
        return [*zip(*seen)], average.weight.item()

    def test_the_rate_warms_up_and_falls_along_a_cosine_and_the_average_of_the_weights_is_exponential(self):
        (_, rates), _ = self.train(100, lr=1.0, final_lr_ratio=0.5, warmup=10)
        np.testing.assert_allclose([rates[0], rates[50], rates[99]], [1 / 11, 0.75, 0.5], atol=1e-3)
        for decay, steps in ((0.9, 4), (0.2, 30)):
            (weights, _), average = self.train(steps, decay, lr=0.1)
            expected = weights[0]
            for n, weight in enumerate(weights):             # the decay warms up
                expected += (1 - min(decay, (1 + n) / (10 + n))) * (weight - expected)
            self.assertAlmostEqual(average, expected, places=5)

    def test_all_blocks_run_compiled_while_learning_and_recovering_with_few_graphs(self):
        """torch gives up on a block that was compiled in 8 variants: an error here. Only the compiler is left out."""
        def count(graph, example):
            graphs.append(graph)
            return graph

        def learn():
            tf.learn_layers(teacher, tf.masked_denoising(diffusion, batches()), [(1, 2)] * 2, 10, prepare=tf.compiled)

        def recover():
            compiled, student = (tf.compiled(model) for model in (copy.deepcopy(teacher), tf.prune(teacher, [0, 3])))
            tf.recover(student, compiled, diffusion, batches(), [(0, 1), (1, 3)], 5)
        batches = functools.partial(tf.data_batches, tf.toy_digits(size=8), 12, 0, DEVICE)
        graphs, teacher, diffusion = [], tiny_dit(num_classes=10).to(DEVICE), tf.GaussianDiffusion()
        counted = functools.partialmethod(nn.Module.compile, backend=count)
        self.enterContext(mock.patch.object(nn.Module, "compile", counted))
        self.enterContext(torch._dynamo.config.patch(fail_on_recompile_limit_hit=True))
        for stage in (learn, recover, learn):    # the last one in a process has its graphs too
            stage()
            self.assertTrue(0 < len(graphs) <= 8, len(graphs))
            graphs.clear()

    def test_only_what_is_out_of_memory_is_called_so(self):
        def guarded(error):
            return lambda _: tf.guarded("x", mock.Mock(side_effect=error))
        for error, words in ((MemoryError(), "out of memory"), (torch.OutOfMemoryError("CUDA"), "out of memory"),
                             (RuntimeError("InvalidCxxCompiler: No working C++ compiler found"), "--compile needs")):
            self.refused(words, main=guarded(error))
        self.assertRaisesRegex(RuntimeError, "memory access", guarded(RuntimeError("illegal memory access")), None)

    def test_states_are_saved_by_the_first_process_at_the_end_of_windows_and_take_a_thirtieth_of_the_time(self):
        def write(path, save):                   # takes two seconds, and a step takes one
            saved.append(clock[0])
            clock[0] += 2

        def train(steps, rank=0):
            def loss_fn(step):
                clock[0] += 1
                return model.weight.square().sum(), {}
            model, clock[0] = nn.Linear(1, 1), -1.0
            saved.clear()
            with mock.patch.object(tf, "rank", lambda: rank):
                tf.train(model, loss_fn, steps, state=tf.TrainingState(self.folder / "state.pt"))
            return [b - a for a, b in zip([-1, *saved], saved)]
        clock, saved = [0.0], []
        self.enterContext(mock.patch.object(tf, "write_file", lambda path, save: tf.rank() or write(path, save)))
        self.enterContext(mock.patch.object(time, "monotonic", lambda: clock[0]))
        self.assertEqual(train(200), [31, 62, 62], "30 s after the start, then 60 s after the end of a save of 2 s")
        self.assertEqual(train(200, rank=1), [])
        with mock.patch.object(tf, "SAVE_SECONDS", 0):
            self.assertEqual((tf.window_of(1000), len(train(1000))), (10, 100), "at every window's end")

    def test_rows_of_the_log_are_means_over_windows_and_printed_lines_show_the_last_one(self):
        """And a run of days says once which flag shortens it."""
        def log(stage, steps, seconds, taken):   # seconds between two looks at the clock, of which a step takes two
            clock = itertools.count(0, seconds)
            with (mock.patch.object(time, "perf_counter", lambda: next(clock)),
                  contextlib.redirect_stderr(io.StringIO()) as said):
                on_step = tf.logged(path, stage, steps)
                for step in range(taken):
                    on_step(step, {"loss": float(step), "denoising": 2.0 * step})
            return said.getvalue(), [json.loads(line) for line in path.read_text().splitlines()]
        path = self.folder / "log.jsonl"
        said, rows = log("recover", 250, 4, 250)
        self.assertEqual([(row["step"], row["loss"], row["denoising"]) for row in rows],
                         [(step, step - 1.5, 2 * step - 3) for step in range(2, 251, 2)])
        self.assertRegex(said, r"^recover .* loss (-|0.5000)")
        self.assertRegex(said, r"\nrecover  250/250  loss 248.5000  denoising 497.0000 .* 0 s left$")
        on_step = tf.logged(path, "recover", 250, 100)
        for step in (100, 101):
            on_step(step, {"loss": 7.0})
        again = [json.loads(line) for line in path.read_text().splitlines()]
        self.assertEqual((again[:-1], again[-1]["loss"]), (rows[:50], 7.0), "later rows are cut")
        path.write_text("{torn")
        self.assertRaisesRegex(tf.UserError, "log.jsonl", tf.logged, path, "recover", 250)
        path.write_text("")
        said, _ = log("teacher", 400_000, 100, 4)
        self.assertEqual((said.count("--teacher-steps"), "days left" in said), (1, True))
        self.assertEqual([*map(tf.duration, (40, 720, 12_600, 403 * 86_400))], ["40 s", "12 min", "3.5 h", "403 days"])

    def test_a_run_killed_again_and_again_ends_bit_for_bit_like_one_never_stopped(self):
        """Its log too. And SIGTERM, which is handled as Ctrl-C is, ends it in one line."""
        def states():
            return {path.name: path.stat().st_mtime_ns for path in killed.glob("*.pt")}
        save_images(self.folder / "images" / "noise", 20, 16, 16)
        words = [STEPS.format(15) + "--stages teacher,learn,recover --data", self.folder / "images"]
        whole, killed = self.folder / "whole", self.folder / "killed"
        often = "import sys, tinyfusion as tf; tf.SAVE_SECONDS = 0; sys.exit(tf.main())"
        self.story(TINY, whole, *words)
        for number, program in ((signal.SIGKILL, ["-c", often]), (signal.SIGTERM, [tf.__file__])):
            before = states()
            run = subprocess.Popen([sys.executable, *program, *split(TINY, killed, *words)], env=ENVIRONMENT,
                                   text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            while run.poll() is None and states() == before:
                time.sleep(0.01)                 # until it has come further
            time.sleep(0.2)
            run.send_signal(number)
            said = run.communicate(timeout=60)[1]
            self.assertFalse((killed / "student.pt").exists())
        self.assertEqual((run.returncode, "Traceback" in said), (130, False), said)
        self.assertIn("all files are whole", said.splitlines()[-1])
        self.story(TINY, killed, *words)
        for name in ("teacher.pt", "student.pt"):
            exactly(load(whole / name)["ema"], load(killed / name)["ema"])
        ends = [([json.loads(line) | {"steps_per_s": 0} for line in (folder / "log.jsonl").read_text().splitlines()],
                 (folder / "layers.json").read_text(), {path.name for path in folder.glob("[!.]*")})
                for folder in (whole, killed)]
        self.assertEqual(*ends)

class Files(InFolder):
    """Checkpoints in and out, and sample.py."""

    def setUp(self):
        super().setUp()
        self.path, self.words = self.folder / "model.pt", ["--num-images 3 --steps 2 --ckpt", self.folder / "model.pt"]
        self.save(tiny_dit())

    def save(self, model, objective=tf.GaussianDiffusion(), **sampling):
        """A checkpoint of ours."""
        classes, sampling = [*"abcdefghij"][:model.num_classes], {"steps": 3, "guidance": 1.0} | sampling
        tf.save_checkpoint(self.path, model, objective, sampling, classes)

    def test_pictures_have_names_cut_to_fit_and_steps_and_the_confidence(self):
        with mock.patch.object(tf.ImageDraw.ImageDraw, "text", autospec=True) as text:
            grid = tf.image_grid(torch.zeros(4, 1, 32, 32).byte(), 2, ["cat", "hippopotamus", "Käse", "\udce9"])
            tf.draw_decisions([(0, [0.5, 0.5]), (3, [0.6, 0.4])], [(1, 2)], [0], 0.625)
        self.assertEqual(grid.size, (2 * 66, 2 * 84), "small images are magnified, and their classes stand above them")
        words = [call.args[2] for call in text.call_args_list]
        self.assertTrue(words[0] == "cat" and 4 < len(words[1]) < 12 and "hippopotamus".startswith(words[1]))
        self.assertTrue({"step 0", "step 3", "block 0, kept", "block 1, dropped"} < {*words} and "0.62" in str(words))

    def test_a_full_disk_or_a_signal_amid_a_write_leaves_the_old_file_and_no_other(self):
        class Buffer(io.BytesIO):                # Ctrl-C amid torch.save, which must not abort
            def write(self, data):
                written = super().write(data)
                if self.tell() == written:
                    raise KeyboardInterrupt
                return written
        before, content = self.path.read_bytes(), {"weight": torch.zeros(10)}
        again = functools.partial(tf.write_file, self.path, functools.partial(torch.save, content))
        for owner, name, patch, expected in ((io, "BytesIO", Buffer, 130), (Path, "replace", OSError("disk full"), 2),
                                             (Path, "replace", KeyboardInterrupt, 130)):
            with mock.patch.object(owner, name, patch if patch is Buffer else mock.Mock(side_effect=patch)):
                ended, _, said = call(main=lambda _: tf.guarded("x", again))
            self.assertEqual((ended, "model.pt: disk full" in said), (expected, expected == 2), said)
            self.assertEqual((self.path.read_bytes(), os.listdir(self.folder)), (before, ["model.pt"]))

    def test_checkpoints_of_the_official_layouts_and_ours_load_bit_for_bit(self):
        model, content = tf.load_checkpoint(self.path)
        exactly(tiny_dit().state_dict(), model.state_dict())
        self.assertEqual((model.config(), content["sampling"]["steps"]), (tiny_dit().config(), 3))
        sizes, args = {"input_size": 16, "in_channels": 4, "num_classes": 7}, argparse.Namespace(lr=1e-4)
        small = functools.partial(tf.MAR_models["MAR-toy"], patch_size=1, dropout=0.1, encoder_depth=1, decoder_depth=2)
        for build, ema in ((functools.partial(tf.DiT_models["toy"], depth=3), "ema"), (small, "model_ema")):
            model, other = lively(build(**sizes), 0.05), build(**sizes).state_dict()
            weights = model.state_dict()
            spread = {name.replace("blocks.0", "blocks.0._orig_mod"): weight for name, weight in weights.items()}
            for layout in (weights, {"model": with_prefix("module.", weights)},
                           {"model": other, ema: weights, "opt": {}, "args": args, "train_steps": 5},
                           {"state_dict": with_prefix("_orig_mod.module.", weights)},
                           {"ema": None, "ema_model": spread, "config": {"lr": 1}, "sampling": {"num_steps": 250}},
                           with_prefix("module.", weights) | {"n_averaged": torch.tensor(3)},
                           with_prefix("module.online.", other) | with_prefix("module.ema_model.", weights)):
                torch.save(layout, self.path)
                loaded, content = tf.load_checkpoint(self.path)
                self.assertEqual((loaded.config(), len(content["classes"])), (model.config(), 7))
                exactly(weights, loaded.state_dict())
            self.assertEqual(*([p.requires_grad for p in one.parameters()] for one in (loaded, model)))
            self.refused("draws 4 channels", *self.words, main=sample.main)
            self.assertEqual(self.draw(*self.words, "--guidance 1")[1]["latents"].shape, (3, 4, 16, 16))
        self.save(loaded, tf.MaskedAutoregression(256))
        exactly(weights, load(self.path)["ema"])             # which the official find_model reads

    def test_the_size_and_name_of_official_models_are_told_from_their_shapes_or_by_a_file_of_sits_own_training(self):
        """Of files as large as a DiT-XL's too; here all their weights are one and the same zero."""
        for name, args, wrong in (
                ("DiT-XL/2", {}, None), ("DiT-D7/2", {}, None), ("MAR-B", {}, None),
                ("SiT-S/2", {"model": "SiT-S/2", "prediction": "velocity", "path_type": "Linear"}, "DiT-S/2"),
                ("DiT-S/2", {"model": "DiT-S/2"}, "SiT-S/2")):
            model = tf.unallocated(tf.PRESETS[name]["network"])
            weights = {key: torch.zeros(()).expand(w.shape) for key, w in model.state_dict().items()}
            torch.save({"ema": weights, "args": argparse.Namespace(**args)}, self.path)
            loaded, content = tf.load_checkpoint(self.path)
            self.assertEqual((content["name"], type(content["objective"]), loaded.config()),
                             (name, type(tf.PRESETS[name]["objective"](loaded)), model.config()))
            for main in (tf.main, sample.main) if wrong else ():
                self.refused(f"not a {wrong}", f"--model {wrong} --ckpt", self.path, main=main)
        for args in ({"prediction": "noise"}, {"path_type": "GVP"}):
            torch.save({"ema": weights, "args": argparse.Namespace(model="SiT-S/2", **args)}, self.path)
            self.refused(*args.values(), "--ckpt", self.path, main=sample.main)
        torch.save(weights, self.path)           # which look like a DiT's
        self.assertEqual(tf.load_checkpoint(self.path, name="SiT-S/2")[1]["objective"].name, "flow")

    def test_models_without_a_null_label_are_known_by_their_rows_and_sampled_without_guidance(self):
        sizes = SMALL | {"hidden_size": 64, "num_heads": 4, "patch_size": 2, "depth": 4, "class_dropout_prob": 0.0}
        for classes, args, found, dropout in ((1, {}, 1, 0), (3, {}, 2, 0.1), (3, {"num_classes": 3}, 3, 0),
                                              (3, {"num_classes": 2}, 2, 0.1)):
            weights = tf.DiT(**sizes | {"num_classes": classes}).state_dict()
            torch.save({"ema": weights, "args": argparse.Namespace(**args)}, self.path)
            model, _ = tf.load_checkpoint(self.path)
            self.assertEqual((model.num_classes, model.y_embedder.dropout_prob), (found, dropout))
            self.assertIn(f"guidance {1.5 if dropout else 1.0}", self.draw(*self.words)[0])
            if not dropout:
                self.refused("only guidance 1", *self.words, "--guidance 1.5", main=sample.main)

    def test_checkpoints_of_the_program_before_this_one_still_load(self):
        """A small one of each family: names, shapes and settings as it wrote them on 2026-11-29."""
        before = json.loads(zlib.decompress(base64.b85decode(BEFORE.replace("\n", ""))))
        before["flow"] = before["ddpm"] | {"objective": "flow"}
        for name, kind, depth in (("ddpm", tf.GaussianDiffusion, 1), ("flow", tf.FlowMatching, 1),
                                  ("mar", tf.MaskedAutoregression, 2)):
            weights = {key: 0.1 * torch.randn(shape) for key, shape in before[name]["ema"].items()}
            torch.save(before[name] | {"ema": weights}, self.path)
            model, found = tf.load_checkpoint(self.path)
            self.assertEqual((type(found["objective"]), found["objective"].name, found["classes"], len(model.blocks),
                              found["sampling"]["guidance"]), (kind, name, ["a", "b"], depth, 1.5))
            exactly(weights, dict(model.state_dict()))
            self.draw("--num-images 2 --ckpt", self.path)

    def test_bad_checkpoints_are_refused_in_one_line_and_nothing_is_run(self):
        class Attack:
            def __reduce__(self):
                return os.mkdir, (str(folder / "attacked"),)

        def config(**more):
            return good | {"config": good["config"] | more}
        folder, good, whole = self.folder, load(self.path), self.path.read_bytes()
        spoiled = good["ema"] | {"final_layer.linear.weight": torch.full((32, 16), math.nan)}
        shape = {"x_embedder.proj.weight": torch.zeros(64, 1, 4, 4), "pos_embed": torch.zeros(4)}
        for reason, *contents in (
                ("nothing in it was run", {"ema": Attack()}),
                ("width 16", good["ema"], good | {"config": {"layers": 5}}), # another project's is not taken for ours
                ("PyTorch file", whole[:-2000], b"noise" * 100, b"", [1]),
                ("more blocks", config(depth=10 ** 9)), ("final_layer.linear.weight", good | {"ema": spoiled}),
                ("do not fit", good | {"classes": ["a", "b"]}, good | {"sampling": {"steps": "many"}}),
                ("object", good | {"sampling": 7}, good | {"classes": 7}),
                ("weights and config", config(hidden_size=40_000_000), config(depth=5), config(depth="many"), shape),
                ("no weights of a model that this program knows", {"weight": torch.zeros(3)},
                 *(good | {"objective": objective} for objective in ("mar", "foo", [3])))):
            for content, main in itertools.product(contents, (tf.main, sample.main)):
                torch.save(content, self.path)
                if isinstance(content, bytes):
                    self.path.write_bytes(content)
                self.refused(reason, "--ckpt", self.path, main=main)
        self.assertFalse((folder / "attacked").exists())
        self.refused("no such file", "--ckpt", folder / "missing.pt")
        self.refused("safetensors", "--ckpt", self.path.rename(folder / "safe.safetensors"))

    def test_the_same_seed_draws_the_same_image_whatever_the_batch_size(self):
        for model, objective, more in ((tiny_dit(), tf.GaussianDiffusion(), {}),
                                       (tiny_mar(), tf.MaskedAutoregression(16), {"head_steps": 5})):
            self.save(model, objective, **more)
            drawn = [self.draw(*self.words, "--num-images 6 --seed 3 --guidance 2 --batch-size", size)[1]["arr_0"]
                     for size in "641"]
            self.assertLessEqual(np.ptp(np.int32(drawn), axis=0).max(), 1, "a rounding may tip a pixel by one level")
            self.assertEqual((drawn[0].shape, drawn[0].std() > 1), ((6, 8, 8, 3), True))

    def test_labels_are_names_of_classes_or_numbers_and_what_was_drawn_is_said(self):
        for labels, names in (("c,0", ["c", "a", "c"]), ("1", ["b"] * 3)):
            said, arrays = self.draw(*self.words, "--labels", labels)
            self.assertIn(f"3 images of {', '.join(dict.fromkeys(names))};", said)
            self.assertEqual(arrays["names"].tolist(), names)
        drawn = [self.draw(*self.words, "--guidance 3 --cfg-channels", word)[1]["arr_0"] for word in ("3", "all")]
        self.assertTrue(np.array_equal(*drawn), "one channel is the first three and all")
        with mock.patch.dict(os.environ, {"WORLD_SIZE": "2"}):
            self.refused("without torchrun", *self.words, main=sample.main)


def fixed_gradients(accumulate=1, steps=3):
    """The gradients of LoRA and logits in some steps on fixed batches of 8, with fixed random numbers, of which every
    process and part of a batch takes its rows; and all that was trained, from every process."""
    def loss_fn(step):
        torch.manual_seed(step)
        part = tf.rank() + tf.world_size() * (next(calls) % accumulate)
        batch = [*dit_inputs(8), torch.randn(8, 1, 8, 8), sampler(8, tau=1.0)]
        x, t, y, noise, mask = (a[part::tf.world_size() * accumulate] for a in batch)
        loss = diffusion.training_losses(functools.partial(model, mask=mask), x, t, y, noise)["loss"].mean()
        (h,), (g,) = (net(x, t, y, hidden=(3,))[1] for net in (model, teacher))
        return loss + tf.masked_feature_loss(h, g), {}
    model, teacher, diffusion, calls, found = tiny_dit(), tiny_dit(), tf.GaussianDiffusion(), itertools.count(), []
    sampler = tf.LayerSampler([(1, 2), (1, 2)])
    weights = [*tf.add_lora(model, rank=2), *sampler.parameters()]
    for p in weights:                            # the first process's weights must win
        p.data += (0.1 * torch.randn(p.shape) if p.dim() > 1 else 0) + tf.rank()
    tf.train(model, loss_fn, steps, params=weights, lr=1e-3, accumulate=accumulate,
             on_step=lambda step, metrics: found.append([p.grad.clone() for p in weights]))
    return found, tf.gather([p.detach() for p in weights])


class Processes(InFolder):
    """torchrun."""

    def test_parts_of_a_batch_and_two_processes_have_the_gradients_of_the_whole_batch(self):
        """And two processes that are stopped and go on end bit for bit like two that never were, and draw as one. A
        step takes a handful of exchanges, not one for every tensor."""
        steps, two, stopped = STEPS.format(4) + "--device cpu", self.folder / "two", self.folder / "stopped"
        (self.folder / "script.py").write_text(QUICK + f"import torch, {Path(__file__).stem} as t" + """
from pathlib import Path
import torch.distributed as dist
tf.SAVE_SECONDS = 0
set_up, data_batches = tf.set_up, tf.data_batches
def first(run):                                  # within the group of the run of main, below
    tf.processes, tf.set_up = contextlib.nullcontext, set_up
    exchanges, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor: (exchanges.append(1), all_reduce(tensor))
    found = [t.fixed_gradients(1), t.fixed_gradients(2)]
    dist.all_reduce = all_reduce
    assert len(exchanges) <= 8 * 6, len(exchanges)
    tf.write_file(sys.argv[1], lambda file: torch.save(found, file))
    stopped = [t.TINY, Path(sys.argv[2]), "--stages teacher,learn,recover", sys.argv[4]]
    assert "cut into 2 parts" in t.call(*stopped, "--batch-size 7")[2]
    tf.data_batches = lambda *args: itertools.islice(data_batches(*args), 2)
    with contextlib.suppress(StopIteration):
        t.call(*stopped)
    tf.data_batches = data_batches
    status, said, _ = t.call(*stopped)
    assert status == 0 and said.count("from step 1") == 1, (status, said)
    set_up(run)
tf.set_up = first
assert tf.main(t.split(t.TINY, Path(sys.argv[3]), sys.argv[4])) == 0
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert "gloo" not in str(threads), "threads of the group, left over, can crash the end of a process"
""")
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "script.py",
                 self.folder / "gradients", stopped, two, steps]
        done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, cwd=self.folder, timeout=300)
        self.assertEqual((done.returncode, done.stdout.count("kept blocks")), (0, 1), ("one speaks", done.stderr))
        whole, ((*weights,),) = fixed_gradients()
        cases = [fixed_gradients(2), *load(self.folder / "gradients")]
        for (found, trained), count in zip(cases, (1, 2, 2), strict=True):
            for step, (ours, theirs) in enumerate(zip(whole, found, strict=True)):
                close(theirs, ours, rtol=1e-4, atol=1e-5 * (1 + step))
            exactly(trained, [trained[0]] * count)           # in every process
            close(trained[0], weights, rtol=1e-3, atol=1e-3)
        for name in ("teacher.pt", "student.pt"):
            exactly(load(two / name)["ema"], load(stopped / name)["ema"])
        by_two = tf.read_json(two / "results.json")["rows"]
        (two / "results.json").unlink()
        self.story(TINY, two, steps)
        for name, row in tf.read_json(two / "results.json")["rows"].items():
            for key in ("fid", "is", "loss"):
                self.assertLess(abs(by_two[name][key] - row[key]), 1e-2 * (1 + row[key]), (name, key))


class Rules(InFolder):
    """Chapter 10: older rules."""

    def setUp(self):
        super().setUp()
        self.model, self.diffusion = tiny_dit(num_classes=10).to(DEVICE), tf.GaussianDiffusion()
        self.examples, again = (tf.fixed_examples(tf.toy_digits(size=8), 48, device=DEVICE) for _ in range(2))
        exactly(self.examples, again)            # the same at every call
        self.arguments = self.model, [(1, 2)] * 2, self.diffusion, self.examples

    def loss(self, kept):
        """The training loss on all examples of the model pruned to these blocks."""
        (x0, y), = self.examples
        torch.manual_seed(0)
        t = self.diffusion.sample_t(len(x0), x0.device)
        student = tf.prune(self.model, kept).requires_grad_(False)
        return self.diffusion.training_losses(student, x0, t, y)["loss"].mean().item()

    def test_shortgpt_looks_at_direction_and_flux_lite_at_size(self):
        """Four blocks on two numbers: one that only scales, one that only turns, a small turn, and a last one."""
        blocks = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(4)])
        for block, angle, scale in zip(blocks, (0, 1.0, 0.5, 0), (5, 1, 1, 1)):
            c, s = math.cos(angle) * scale, math.sin(angle) * scale
            block.weight.data = torch.tensor([[c, -s], [s, c]])
        model = nn.Module()
        model.blocks, model.forward = blocks, lambda x, t, y: model.blocks(x.view(5, 1, 2)).view(5, 2, 1, 1)
        model.__deepcopy__ = lambda memo: model  # the scores are of these blocks
        examples = [(torch.randn(5, 2, 1, 1), None)]
        self.assertEqual(tf.shortgpt(model, [(2, 4)], self.diffusion, examples), [1, 3])     # the last one always stays
        self.assertEqual(tf.flux_lite(model, [(2, 4)], self.diffusion, examples), [0, 1])    # 4, 4.8, 2.5 and 0 lengths

    def test_sensitivity_ranks_by_the_loss_without_each_block_and_random_choices_fit_the_groups(self):
        self.assertAlmostEqual(tf.calibration_loss(self.model, self.diffusion, self.examples), self.loss(range(4)), 5)
        losses = [self.loss([j for j in range(4) if j != i]) for i in range(4)]
        self.assertEqual(tf.sensitivity(*self.arguments), sorted(sorted(range(4), key=lambda i: -losses[i])[:2]))
        choices = {tuple(tf.random_choice(*self.arguments)) for _ in range(60)}
        self.assertEqual(choices, {(0, 2), (0, 3), (1, 2), (1, 3)})

    def test_the_oracle_is_the_papers_for_28_blocks_and_refuses_what_is_not_half(self):
        depth_28 = mock.Mock(blocks=range(28))
        self.assertEqual(tf.oracle(depth_28, [(2, 4)] * 7), [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27])
        with self.assertRaisesRegex(tf.UserError, "one block of every pair: expected groups that keep half of 28"):
            tf.oracle(depth_28, [(1, 4)] * 7)

    def test_the_loop_over_criteria_has_one_line_of_flags_and_its_table_one_row_for_each(self):
        model = lively(tf.DiT_models["toy"](input_size=16, in_channels=1, num_classes=10, depth=4), 0.05)
        torch.save(model.state_dict(), self.folder / "teacher.pt")
        lab = self.folder / "lab"
        words = ["--kd none --learn-steps 2 --recover-steps 2 --ckpt", self.folder / "teacher.pt"]
        for name in ("learned", "oracle", "0,3"):
            self.story(TINY, lab / name, *words, "--criterion", name)
        self.story(TINY, lab / "no" / "groups", *words, "--groups 2 --samples 12 --sample-steps 3")
        lines = [line.split("|")[1:-1] for line in self.story("--table", lab).splitlines() if line.startswith("|")]
        table = {row[0].strip(): [word.strip() for word in row[1:]] for row in lines}
        self.assertEqual(table["run"][-2:], ["samples", "sample_steps"], "guidance is the same in all")
        rows = tf.read_json(lab / "oracle" / "results.json")["rows"]
        losses = rows["pruned"]["loss"], rows["student"]["loss"], rows["student"]["fid"]
        self.assertEqual(table["oracle"][:4], ["0 3", *(f"{value:.4g}" for value in losses)])
        self.assertEqual(table["0,3"][:4], table["oracle"][:4], "the same blocks recover alike")
        self.assertEqual((table["oracle"][-2:], table["no/groups"][-2:]), (["10", "2"], ["12", "3"]))
        self.refused("no results.json", "--table", lab / "nothing")
        (lab / "oracle" / "results.json").write_text('{"rows": 1, "kept": 1, "conditions": 1}')
        self.refused("oracle", "--table", lab)


class CommandLine(InFolder):
    """Whole runs, and mistakes."""

    def test_one_command_tells_the_whole_story_and_the_next_one_reuses_it(self):
        def times():
            return {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
        run, reused = self.folder / "run", "is there and is used"
        out, before, student = self.story(TINY, run), times(), load(run / "student.pt")
        self.assertEqual({*before}, {"settings.json", "teacher.pt", "layers.json", "student.pt", "results.json",
                                     "log.jsonl", "decisions.png", "samples.png"})
        for part in ("teacher |", "pruned ", "student |", "toy-FID", "speed-up", "guidance 1.5", "fewer than 5 batches",
                     "held-out images of 10 classes", "confidence 0."):
            self.assertIn(part, out)
        log = [json.loads(line)["stage"] for line in (run / "log.jsonl").read_text().splitlines()]
        self.assertEqual(log, ["teacher"] * 3 + ["learn"] * 3 + ["recover"] * 3)
        kept = [tf.read_json(run / name)["kept"] for name in ("layers.json", "results.json")]
        self.assertEqual((student["config"]["depth"], kept), (6, [student["kept"]] * 2))
        for name in ("decisions.png", "samples.png"):
            self.assert_picture(run / name)
        self.assertEqual(self.story(TINY, run).count(reused), 4)
        self.refused("seed 0 (now 1)", TINY, run, "--seed 1")
        self.refused("recover_steps 3 (now 4)", TINY, run, "--recover-steps 4")
        for name, torn in itertools.product(("results.json", "settings.json"), ("{", "[]")):
            whole = (run / name).read_text()
            (run / name).write_text(torn)
            self.refused(name, TINY, run)
            (run / name).write_text(whole)
        measured = self.story(TINY, run, "--samples 12")
        self.assertEqual((measured.count(reused), "samples 12" in measured), (3, True), "it measures again, no more")
        self.assertTrue("'samples': 10" in measured and "samples.png" in measured, "and says what it replaces")
        (run / "student.pt").unlink()
        for content in ('{"kept": null}', '{"kept": [1, "a"]}', '{"kept": [0, 99]}', "{"):
            (run / "layers.json").write_text(content)
            self.refused("layers.json", TINY, run)
        (run / "recover-state.pt").write_bytes(b"of another student")
        (run / "layers.json").unlink()
        self.assertEqual(self.story(TINY, run).count(reused), 1, "what follows a removed file is done again")
        self.assertEqual(times().keys(), before.keys())
        self.assertTrue(all(times()[name] > before[name] for name in ("layers.json", "student.pt", "results.json")))
        exactly(student["ema"], load(run / "student.pt")["ema"])
        words = ["--ckpt", run / "student.pt"]
        self.story(*words, "--labels 3,1 --out", self.folder / "grid.png", main=sample.main)
        self.assert_picture(self.folder / "grid.png")
        for wrong, reason in (("--labels 3,10", "from 0 to 9"), ("--labels ²", "from 0 to 9"), ("--out .", "a .png"),
                              ("--out x.jpg", "a .png"), ("--npz x", "a .npz"), ("--npz x.npz --out y", "not allowed"),
                              ("--out /proc/x.png", "/proc/tmp"), ("--solver euler", "no --solver"), ("--x", "--x"),
                              ("--steps 1", "1 sampling steps"), ("--eta 1.5", "expected 0 (DDIM)"),
                              ("--model MAR-B", "MAR-B")):
            self.refused(reason, *words, wrong, main=sample.main)

    def test_rules_and_named_blocks_take_the_place_of_learning_and_stages_can_be_run_one_by_one(self):
        run, named, pets = self.folder / "run", self.folder / "named", self.folder / "pets"
        self.refused("teacher.pt", TINY, run, "--stages learn --criterion oracle")
        self.refused("or a part of it", TINY, run, "--stages teacher,recover --criterion oracle")
        self.assertFalse(run.exists(), "a failed command leaves nothing behind")
        self.story(TINY, run, "--stages teacher --groups 4")
        self.assertFalse((run / "layers.json").exists())
        self.story(TINY, run, "--stages learn --groups 4")
        self.assertEqual(len(tf.read_json(run / "layers.json")["kept"]), 4)
        self.assert_picture(run / "decisions.png")
        save_images(pets / "cat", 24, 20, 30)
        out = self.story(TINY, named, "--criterion 0,1,2,3,11 --data", pets)
        self.assertTrue("24 images, checksum" in out and "too few to trust it" in out and "accuracy" not in out, out)
        self.assertEqual(load(named / "student.pt")["config"]["depth"], 5)
        Image.new("RGB", (20, 30)).save(pets / "cat" / "00.png")             # the images are others now
        self.refused("checksum", TINY, named, "--criterion 0,1,2,3,11 --data", pets)
        for flags, reason in (("3,2", "ascending"), ("0,12", "0 to 11"), ("oracle --groups 1:4", "one block of every")):
            self.refused(reason, TINY, self.folder / reason, "--stages teacher,learn --criterion", flags)
            self.assertFalse((self.folder / reason).exists(), "said before the work")

    def test_a_run_that_diverges_says_what_to_do(self):
        def poisoned(*args, real=tf.data_batches):
            for number, (x, y) in enumerate(real(*args)):
                yield x * (math.nan if number == 2 else 1), y
        for before in ("", "teacher,learn", "teacher"):
            run = self.folder / f"after {before}"
            if before:
                self.story(TINY, run, "--stages", before)
            with mock.patch.object(tf, "data_batches", poisoned):
                self.refused("another --out, lower learning rates and, once there is one,", TINY, run, lines=None)
            self.assertFalse((run / "student.pt").exists())

    def test_output_is_flushed_and_survives_an_ascii_terminal_and_odd_paths_are_refused_at_the_start(self):
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="ascii")) as terminal:
            self.assertEqual(tf.main(split(TINY, self.folder / "é", "--stages teacher")), 0)
        self.assertTrue(terminal.line_buffering)
        self.assertIn(rb"\xe9", terminal.buffer.getvalue())
        self.refused("UTF-8", TINY, self.folder / "\udce9", "--stages teacher")

    def test_without_its_appendices_and_modules_that_only_posix_has_the_file_still_works(self):
        source = Path(tf.__file__).read_text()
        start, end = re.search(r"^# Appendix A\.", source, re.M).start(), source.index('if __name__ == "__main__":')
        (self.folder / "tinyfusion.py").write_text(source[:start] + "\n" + source[end:])
        missing = dict.fromkeys("fcntl grp posix_ipc pty pwd resource syslog termios".split())
        self.enterContext(mock.patch.object(sys, "path", [str(self.folder), *sys.path]))
        with mock.patch.dict(sys.modules, missing):          # which restores what is deleted here
            del sys.modules["tinyfusion"], sys.modules["sample"]
            cut, _ = importlib.import_module("tinyfusion"), importlib.import_module("sample")
            cut.toy_digits, cut.train_judge = tf.toy_digits, tf.train_judge
            self.assertIn("student |", self.story(TINY, self.folder / "run", main=cut.main))
        self.assertFalse(hasattr(cut, "MAR"))
        main = source[:start].split("\nimport argparse\n")[1].splitlines()
        self.assertLess(sum(bool(re.search(r"\b(MAR|SiT)\b", line)) for line in main), 4, "asides about appendices")

    def test_bad_input_is_one_line_and_exit_status_2(self):
        run, file = self.folder / "run", self.folder / "file"
        file.write_text("x")
        for reason, *words in (
                ("expected a number", "--teacher-steps 0"), ("expected a number", "--guidance nan"),
                ("expected a number", "--seed 4294967296"), ("--samples", "--samples x"), ("--x", "--x"),
                ("depth of 12", "--groups 1:5"), ("a part of it", "--stages x"), ("patch", "--image-size 18"),
                ("choose from", "--model DiT-Q"), ("cuda:77", "--device cuda:77"), ("into 3 parts", "--accumulate 3"),
                ("Not a directory", "--out", file / "x"), ("nothing", "--data", self.folder / "nothing"),
                ("64 examples: expected at least 100, the batch size; lower it", "--batch-size 100"),
                ("goes with --vae", "--encode x"), ("--samples", "--samples 3"), ("shortgpt", "--criterion best"),
                ("expected 1 to 16", "--model MAR-toy --sample-steps 17"), ("shortgpt", "--criterion 0,x"),
                ("oracle", "--criterion oracle --groups 5"), ("goes with --ref", "--fid x"),
                ("goes with --inception", "--ref x")):
            with self.subTest(words=words):
                self.refused(reason, TINY, run, *words)
        self.assertFalse((run / "teacher.pt").exists() or (run / "settings.json").exists())
        save_images(self.folder / "pets" / "cat", 20, 16, 16)
        self.refused("lies in --data", TINY, self.folder / "pets" / "out", "--data", self.folder / "pets")

    def test_an_official_checkpoint_of_latents_becomes_a_student_and_that_a_shallower_one(self):
        def counted(model, labels, *more, real=tf.sample_images, **others):
            drawn.append((len(model.blocks), len(labels)))
            return real(model, labels, *more, **others)
        folder, drawn, build = self.folder, [], functools.partial(tf.DiT_models["toy"], num_classes=10, depth=8)
        weights = lively(build(input_size=4, in_channels=4), 0.05).state_dict()
        torch.save({"ema": weights, "args": argparse.Namespace(lr=1)}, folder / "official.pt")
        np.save(folder / "latents.npy", np.random.default_rng(0).normal(size=(40, 2, 4, 4, 4)).astype("f4"))
        np.save(folder / "labels.npy", np.arange(40) % 5)
        save_images(folder / "images", 12, 32, 32)
        torch.jit.script(StandIn()).save(folder / "net.pt")
        np.savez(folder / "mu.npz", mu=np.zeros(5), sigma=np.eye(5))
        data, ckpt = ["--data", folder], ["--ckpt", folder / "official.pt"]
        flags = [*data, "--vae toy --accumulate 2 --inception", folder / "net.pt", "--ref", folder / "images"]
        self.enterContext(mock.patch.object(tf, "VAE", ToyVAE))
        with mock.patch.object(tf, "sample_images", counted):
            out = " ".join(self.story(TINY, folder / "d4", *flags, *ckpt).split())
        for part in ("\\| FID \\|", "\\| IS \\|", "sample_steps 2, guidance 1.5", "net.pt", r"student \| 4 \|",
                     r"pruned \| 4 \| [\d,]+ \| - \| - "):
            self.assertRegex(out, part)
        self.assertEqual(drawn, [(8, 10), (4, 10), (8, 20), (4, 20), (4, 20)], "the pruned model for the picture alone")
        pruned = tf.read_json(folder / "d4" / "results.json")["rows"]["pruned"]
        self.assertEqual({*pruned}, {"depth", "parameters", "loss"})
        self.assert_picture(folder / "d4" / "samples.png")
        exactly(weights, tf.load_checkpoint(folder / "d4" / "teacher.pt")[0].state_dict())
        self.story(TINY, folder / "d2", *flags, "--stages teacher,learn,recover --ckpt", folder / "d4" / "student.pt")
        self.assertEqual([load(folder / run / "student.pt")["config"]["depth"] for run in ("d4", "d2")], [4, 2])
        for reason, *wrong in (("not a DiT-S/2", "--model DiT-S/2"), ("nothing", "--ref", folder / "nothing"),
                               ("mu.npz", "--ref", folder / "mu.npz"), ("TorchScript", "--inception", ckpt[1])):
            self.refused(reason, TINY, folder / "x", *flags, *ckpt, *wrong)
        self.assertFalse((folder / "x" / "teacher.pt").exists(), "said before the work")
        self.refused("--vae, --inception and --ref", TINY, folder / "y", *data)
        self.refused("takes (4, 4, 4)", TINY, folder / "y", *ckpt)
        unguided = ["--ckpt", folder / "unguided.pt"]
        model = tiny_dit(input_size=16, num_classes=10, class_dropout_prob=0)
        tf.save_checkpoint(unguided[1], model, tf.GaussianDiffusion(), {}, list("0123456789"))
        self.refused("only guidance 1", TINY, folder / "z", "--guidance 2", *unguided)
        self.assertIn("guidance 1.0", self.story(TINY, folder / "z", *unguided))

    def test_a_sit_and_a_mar_run_from_the_command_line_and_a_student_becomes_a_shallower_one(self):
        sit, mar, again, official = (self.folder / name for name in ("SiT-toy", "MAR-toy", "again", "official.pt"))
        for run, more in ((sit, ["--model SiT-toy"]), (mar, ["--model MAR-toy"]),
                          (again, ["--stages teacher,learn,recover --ckpt", mar / "student.pt"])):
            self.story(TINY, run, *more)
        for run, name, depth in ((sit, "flow", 6), (mar, "mar", 6), (again, "mar", 3)):
            content = load(run / "student.pt")
            depths = [size for key, size in content["config"].items() if "depth" in key]
            self.assertEqual((content["objective"], sum(depths)), (name, depth))
        self.assertEqual(content["sampling"]["head_steps"], 10)
        torch.save(load(sit / "student.pt")["ema"], official)                # the layout of official SiT checkpoints
        drawn = [self.draw(*words, "--num-images 9 --steps 3 --guidance 1.5 --solver euler")[1]["arr_0"]
                 for words in (["--ckpt", sit / "student.pt"], ["--model SiT-toy --ckpt", official])]
        self.assertLessEqual(np.ptp(np.int32(drawn), axis=0).max(), 1)
        for main in (tf.main, sample.main):
            self.refused("is a SiT-toy, not a toy", "--model toy --ckpt", sit / "student.pt", main=main)
        self.refused("no --eta", "--eta 0 --ckpt", sit / "student.pt", main=sample.main)
        words = ["--num-images 3 --head-steps 3 --temperature 0.9 --ckpt", mar / "student.pt"]
        self.assertEqual(self.draw(*words, "--steps 3")[1]["arr_0"].shape, (3, 16, 16, 3))
        self.refused("expected 1 to 16", *words, "--steps 17", main=sample.main)


def bench():
    """Seconds of a step of learning, by the formula and the skip in turns: DiT-XL/2 on a GPU, DiT-S/2 on a CPU."""
    name, sizes, steps = ("DiT-S/2", (8,), 1) if DEVICE == "cpu" else ("DiT-XL/2", (16, 32, 64, 128), 10)
    model = lively(tf.DiT_models[name]().to(DEVICE), std=0.02).train()
    sampler = tf.LayerSampler([(1, 2)] * (len(model.blocks) // 2)).to(DEVICE)
    weights = [*tf.add_lora(model), *sampler.parameters()]
    for size in sizes:
        batch, seconds = (torch.randn(size, 4, 32, 32, device=DEVICE), torch.arange(size, device=DEVICE)), ([], [])
        loss = tf.masked_denoising(tf.GaussianDiffusion(), itertools.repeat(batch))
        for turn, skip in itertools.product(range(6), (False, True)):
            with mock.patch.object(tf, "masked_forward", functools.partial(tf.masked_forward, skip=skip)):
                start = time.perf_counter()
                tf.train(model, lambda step: (loss(model.train(), sampler), {}), steps, params=weights, lr=1e-9)
                seconds[skip].append((time.perf_counter() - start) / steps)
        formula, skip = np.array(seconds)[:, 1:]
        low, middle, high = np.quantile(formula / skip, (0, 0.5, 1))
        print(f"{name}, batch {size}: formula {np.median(formula):.3f} s, skip {np.median(skip):.3f} s a step, "
              f"{middle:.2f}x as fast ({low:.2f} to {high:.2f})")


BEFORE = """
c-qZY+is&U5d9ZFTPV2cs>(O4_6Js#Ww1%yfX!mlZd>)=cZ?x8i4F8^pAvk|oVhR_<`Z$=Ht6t)M8n)qs|^)RAvikx&hZ}apE3IDPq^r^w$m@!n~=wo1;QTZ
m|zm26p|T70LaczQ@7bJG$)TgVvMvk39X}eVEaB}{*P2gYFSZ>S><6+DQaDw4R~hOs_f7CbtdE_!5AIo<PN<p(mu`zBE6t4hpNnz))St#B`dZhYRfqL`HME1
_cgOpt1JkC+-7jk9VLn5RZ_8<*6bb1UP~odH%mR?1Y;C<x<Qx1y4Okv_VoOPQK?lWkFLq3YI{qK{1E7{$EantJdKY814_#iQ%clenqzd5&_ZgatG=Np!MI1E
s<d<N;3?aImzo(vd8b<qKHx<c=&;LjZ#IC!3~p-3+o>Mi#j{;6Fyf-MC(walb@3ufD__B-zoHl!*0fNrAp>JY3o;KF9ec@{Dur|Z=-kVeLbzHQcZZ$s*BF%Z
`x`M(DiBoe49?(S=StJCE|>uoI}0eO70UW4@a!1oOszf(H5~avp-K(6i(ZBX9g-S{$K$}^VgpB3Rd3*pC0M=zePsa+T5|wCXza#~r$M*-6I!c)dUYIdr_?T8
uXNYs*M<qsl1g&Eq?zHIiL+waFEH1#Bpb3Miz<mJmgKE#k&Rl>xLm;ToCYMYn3{EH!CRNtV8m*vR}!2hm1M7^nPIQQS+QPOV6J6JHe^W_RT90D<gIIwjat#T
?tA452`yk~)!LX$37c8jh_NveOU^QVqwalbi{z9ld<l7?#}l-alK+xMn<_y|DRsikF9<%tw^MqJyh-=&-E5(6Rwmz5Cfk&kcA#k>e8>1|Mudjzi`yDK*y57Z
^_A{BrvLGNSM*f{W5dhlb6WIm@N#+N9`%Bw*7SXv7Q%T7C00bYz(qGivSmYr8bH2uS}Io;#;<>Fjo7a
"""                                              # checkpoints of the program of 436c99b, weights left out, packed


if __name__ == "__main__":
    if "--bench" in sys.argv[1:]:
        bench()
        sys.exit()
    program = unittest.main(exit=False, warnings="ignore")
    failed, skipped = len(program.result.failures) + len(program.result.errors), len(program.result.skipped)
    print(f"{program.result.testsRun - failed - skipped} passed, {failed} failed, {skipped} skipped")
    sys.exit(failed > 0)
