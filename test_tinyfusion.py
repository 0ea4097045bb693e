"""The claims of tinyfusion.py, tested. Every test's name is a sentence that is true of the method or the program.

python test_tinyfusion.py            all of them
python test_tinyfusion.py Heart      one class;  -v shows the sentences
"""

import argparse
import ast
import base64
import collections
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


def without_memory(build):
    """What build() makes, with weights that have shapes and no memory."""
    with torch.device("meta"):
        return build()


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
    """The layers of a model from their formulas, without modules, its weights given by their official names: what the
    forward passes of DiT and MAR are compared with, in float64."""

    def __init__(self, model):
        self.w = model.state_dict()

    def linear(self, h, name):
        return torch.einsum("...i,oi->...o", h, self.w[name + ".weight"]) + self.w[name + ".bias"]

    def norm(self, h, name=None):
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return h if name is None else h * self.w[name + ".weight"] + self.w[name + ".bias"]

    def attention(self, h, name):                # h (..., T, D), two heads
        q, k, v = self.linear(h, name + ".qkv").unflatten(-1, (3, 2, -1)).unbind(-3)
        p = (torch.einsum("...thd,...shd->...hts", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.linear(torch.einsum("...hts,...shd->...thd", p, v).flatten(-2), name + ".proj")

    def final(self, h, c, name):
        shift, scale = self.linear(c, name + ".adaLN_modulation.1").chunk(2, -1)
        return self.linear(self.norm(h) * (1 + scale) + shift, name + ".linear")

    def time(self, t, name, embedder):
        """The embedder's own vectors, whose frequencies are float32, in the official code too. t (n,)."""
        angles = t[:, None] * torch.tensor([10000 ** (-k / 128) for k in range(128)], dtype=torch.float64)
        waves = torch.cat([angles.cos(), angles.sin()], 1)
        exact = self.linear(F.silu(self.linear(waves, name + ".mlp.0")), name + ".mlp.2")
        close(embedder(t), exact, rtol=1e-3, atol=1e-3)
        return embedder(t)


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

    def test_masks_have_the_probabilities_of_the_softmax_or_without_groups_of_draws_without_replacement(self):
        """Whatever tau: exactly zeros and ones, also under autocast (one false alarm in 10,000). Without groups the
        relaxed mask sums to N, and its gradient trades one block for others."""
        masks, grouped, free = tf.nm_masks(2, 5), tf.LayerSampler([(1, 1), (2, 5)]), tf.TopNSampler(2, 5)
        grouped.logits[1].data = 0.01 * torch.randn(10)
        free.logits.data = torch.tensor([0.0, 0.01, 0.02, -0.01, 0.005])
        softmax, p = ((logits.detach() * 100).softmax(0) for logits in (grouped.logits[1], free.logits))
        first, second = p[masks.nonzero()[:, 1].view(-1, 2)].T               # one is drawn first, or the other
        shares = first * second / (1 - first) + second * first / (1 - second)
        padded, keys = F.pad(masks, (1, 0), value=1), 3 * torch.randn(6, 5, dtype=torch.double).requires_grad_()
        for sampler, candidates, p in ((grouped, padded, softmax), (free, masks, shares)):
            for tau in (4.0, 0.1):
                with torch.autocast(DEVICE, torch.bfloat16, enabled=tau < 1):
                    drawn = sampler(20_000, tau, scale=100.0)
                count, expected = (drawn[:, None] == candidates).all(2).sum(0), 20_000 * p
                self.assertTrue(drawn.requires_grad and count.sum() == 20_000)
                self.assertLess(((count - expected) ** 2 / expected).sum(), 33.7, "chi-squared, 9 degrees of freedom")
        close([grouped.keep_probability(100.0), grouped.confidence()],
              [softmax @ padded, torch.stack([softmax.sum(), softmax.max()])])
        self.assertEqual(grouped.kept(), padded[softmax.argmax()].nonzero().flatten().tolist())
        close(free.keep_probability(), shares @ masks, atol=0.06, rtol=0)
        exactly(free.keep_probability(), free.keep_probability())
        self.assertEqual((free.kept(), free.confidence().shape), ([1, 2], (2,)))
        self.assertRaisesRegex(ValueError, "from 1 to 5", tf.TopNSampler, 6, 5)
        for tau in (4.0, 0.5):
            close(free.relaxed(keys, tau).sum(1), torch.full((6,), 2.0).double())
            self.assertTrue(torch.autograd.gradcheck(lambda keys: free.relaxed(keys, tau), keys, eps=1e-4))

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
        exactly(tf.masked_forward(blocks, x, c, mask=mask, hidden=(1, 4))[1],
                [tf.masked_forward(blocks[:2], x, c, mask=mask[:, :2])[0], out])
        for skip in (False, True):
            for near in (mask - 6e-8, mask + 1e-7, mask.bool()):             # rounding errors of a mask do not matter
                exactly(masked(skip)(x, c, near), masked(skip)(x, c, mask))
            shared = masked(skip)(x, c[:1], mask)                            # by all examples
            close(shared, masked(skip)(x, c[:1].expand(6, -1), mask))
            for wrong in (mask[:1], mask[:, :2]):
                self.assertRaisesRegex(ValueError, "expected", masked(skip), x, c, wrong)
        out = tf.masked_forward(blocks.bfloat16(), x.bfloat16(), c.bfloat16(), mask=mask)[0]
        self.assertEqual(out.dtype, torch.bfloat16)          # the type of x, not of the mask

    def test_dropped_examples_run_without_a_graph_and_only_while_a_mask_is_learned(self):
        block, runs, mask = nn.Linear(3, 3), [], torch.tensor([[1.0], [0], [1], [0], [0]])
        block.register_forward_hook(lambda module, args, out: runs.append((len(out), out.requires_grad)))
        for learned, skip in ((False, None), (True, True), (False, False)):
            tf.masked_forward([block], torch.randn(5, 3), mask=mask.clone().requires_grad_(learned), skip=skip)
        self.assertEqual(runs, [(2, True), (2, True), (3, False), (5, True)])

    def test_the_gradient_of_the_logits_is_the_softmax_jacobian_of_the_masks_gradient(self):
        sampler, tau, scale = lively(tf.LayerSampler([(1, 2), (2, 3)]).double(), 0.01), 0.7, 100.0
        mask_grad = torch.randn(7, 5).double()
        torch.manual_seed(3)
        sampler(7, tau, scale).backward(mask_grad)
        torch.manual_seed(3)                     # the same Gumbel noise again
        for logits, candidates, grad in zip(sampler.logits, sampler.buffers(), mask_grad.split([2, 3], 1)):
            soft = F.gumbel_softmax((logits.detach() * scale).expand(7, -1), tau=tau)
            v = grad @ candidates.T.double()     # dL/dy (B, C(M, N))
            close(logits.grad, scale / tau * (soft * (v - (soft * v).sum(1, keepdim=True))).sum(0))

    def test_groups_that_fit_are_parsed_and_others_refused_with_the_reason(self):
        for pattern, groups in (("1:2", [(1, 2)] * 3), ("2:4,1:2", [(2, 4), (1, 2)]), ("3", (3, 6))):
            self.assertEqual(tf.parse_groups(pattern, 6), groups)
        for words, reason in (("29 0 1-2 1:2:3 ,", "how many to keep"), ("14:28", "too many candidates"),
                              ("3:2 0:2 1:0 1:5 2:4,3:6 9000:18000 6:12,6:12", "expected N:M with 1 <= N|to fill 28")):
            for pattern in words.split():
                with self.assertRaisesRegex(ValueError, reason):
                    tf.make_sampler(tf.parse_groups(pattern, 28))

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
        self.assertEqual(tf.add_lora(layer), [], "what is wrapped is not wrapped again")
        share = sum(p.numel() for p in tf.add_lora(without_memory(tf.DiT))) / 675_129_632
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


class TwoStreams(nn.Module):
    """Called as a block of Flux or SD3 is: keywords, a table that all examples share, an argument of heads * B rows. It
    returns a tuple of two streams, the first None if it is the `last`; without a context it returns x alone."""

    def __init__(self, last=False):
        super().__init__()
        self.mix, self.last, self.place = nn.Linear(6, 12), last, "read by the model"

    def forward(self, x, *, table, more, context=None):
        shift = more["shift"][0].unflatten(0, (-1, len(x))).sum(0)           # (heads * B, 1, 3) to (B, 1, 3)
        other = shift if context is None else context + shift                # (B, 1, 3)
        out = self.mix(torch.cat([x + table, other.expand_as(x)], -1)).tanh()
        x = x + out[..., :3] + out[..., 6:9] * out[..., 9:]
        return x if context is None else (None if self.last else context + out[..., 3:6].mean(1, keepdim=True), x)


class Foreign(nn.Module):
    """A model of such blocks in two lists, whose forward pass knows nothing of masks. It counts them: each has its own
    table. `around` calls them, or a checkpoint; with a mask (B, 4) it is the definition, m * block(x) + (1 - m) * x."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.both = nn.Sequential(TwoStreams(), TwoStreams(), TwoStreams(last=True)).double()
        self.single = nn.ModuleList([TwoStreams()]).double()
        self.tables, self.around = torch.randn(4, 5, 3).double(), lambda call, *streams: call(*streams)

    def forward(self, x, context, shift, mask=None):
        for i, (block, table) in enumerate(zip([*self.both, *self.single], self.tables, strict=True)):
            assert block.place == "read by the model"

            def call(x, context, block=block, i=i, more={"table": table, "more": {"shift": (shift.repeat(2, 1, 1),)}}):
                return block(x, context=context, **more) if i < 3 else (None, block(x=x, **more))
            c, out = self.around(call, x, context)
            if mask is not None:
                m = mask[:, i].view(-1, 1, 1)
                c, out = None if c is None else m * c + (1 - m) * context, m * out + (1 - m) * x
            context, x = c, out
        return x


class Elsewhere(Numeric):
    """Appendix A: the method on models that are not ours."""

    LISTS = "both", "single"
    STREAMS = {"lists": LISTS, "streams": ("context", "x")}

    def setUp(self):
        super().setUp()
        self.model, self.mask = Foreign(), some_mask(6, 4)
        self.inputs = [torch.randn(6, length, 3).double() for length in (5, 1, 1)]

    def masked(self, mask, *inputs, model=None):
        model = model or self.model
        tf.set_mask(model, mask, **self.STREAMS)
        return model(*inputs or self.inputs)

    def test_a_model_that_knows_nothing_of_masks_has_the_values_and_gradients_of_the_dense_formula(self):
        """Its parameters' names stay, and so does a forward pass that somebody else has put on a block. Two lists have
        one numbering, and a block blends the streams that it is given."""
        def gradients(forward):
            inputs = [a.clone().requires_grad_() for a in (self.mask, *self.inputs)]
            out = forward(*inputs)
            return [out, *torch.autograd.grad(out.sin().sum(), [*inputs, *self.model.parameters()])]
        before, names = self.model(*self.inputs), list(self.model.state_dict())
        dense = gradients(lambda mask, *inputs: self.model(*inputs, mask))
        self.model.both[0].forward = theirs = functools.partial(self.model.both[0].forward)
        for self.model.around in (functools.partial(checkpoint, use_reentrant=False), self.model.around):
            close(gradients(self.masked), dense, rtol=1e-12, atol=1e-13)
        self.assertEqual(list(self.model.state_dict()), names)
        exactly(self.masked(torch.ones(6, 4).bool()), before)
        tf.set_mask(self.model, None, self.LISTS)
        exactly(self.model(*self.inputs), before)
        self.assertEqual([vars(block).get("forward") for block in self.model.both], [theirs, None, None])

    def test_dropped_blocks_are_what_the_mask_did_also_in_a_model_that_counts_its_blocks(self):
        """Their numbers stay empty there; `prune` numbers anew, and a list keeps its type."""
        def blocks_in(model):
            return {name.split(".mix.")[0] for name in model.state_dict()}
        for kept in ([0, 3], [1, 2], [2]):
            out = self.masked(torch.eye(4)[kept].sum(0).expand(6, -1))
            for function in (tf.drop_blocks, tf.prune):
                self.assertRaisesRegex(ValueError, "runs under a mask", function, self.model, kept, self.LISTS)
            tf.set_mask(self.model, None, self.LISTS)
            student, again = (tf.drop_blocks(model, kept, **self.STREAMS) for model in (self.model, lively(Foreign())))
            again.load_state_dict(student.state_dict())
            close([student(*self.inputs), again(*self.inputs)], [out, out], rtol=1e-12, atol=1e-12)
            self.assertEqual(blocks_in(student), {["both.0", "both.1", "both.2", "single.0"][i] for i in kept})
        for block, place in zip(self.model.both, (0, 77, 2)):
            block.mix.layer_idx = place          # 77 means something else
        pruned = tf.prune(self.model, [1, 2, 3], self.LISTS)
        places = [block.mix.layer_idx for block in pruned.both]
        self.assertEqual((type(pruned.both), places), (nn.Sequential, [77, 1]))
        self.assertEqual(blocks_in(pruned), {"both.0", "both.1", "single.0"})

    def test_masks_streams_outputs_lists_and_caches_that_do_not_fit_are_refused(self):
        """What a block returns beyond its streams passes a mask untouched; drop_blocks refuses such a block by name."""
        for mask in (self.mask[:, :3], self.mask[0]):
            self.assertRaisesRegex(ValueError, "4 blocks", tf.set_mask, self.model, mask, self.LISTS)
        self.assertRaisesRegex(ValueError, "the batch of 5 first", self.masked, self.mask[:5])
        for streams, reason in ((("nonsense",), "nonsense"), (("x", "context"), "order of the streams")):
            tf.set_mask(self.model, self.mask, self.LISTS, streams)
            self.assertRaisesRegex(ValueError, reason, self.model, *self.inputs)
        for wrong in (nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2), nn.ModuleDict({"blocks": nn.Linear(2, 2)})):
            self.assertRaisesRegex(ValueError, "`lists`", tf.set_mask, wrong, torch.ones(2, 1))
        model, x = nn.Sequential(nn.Identity(), nn.Identity()), torch.randn(2, 3)
        for more in (("position bias",), ()):    # a tuple of two, and a tuple of one
            model[0].forward = lambda x, past_key_values=None: (x + 1, *more)
            self.assertRaisesRegex(ValueError, "Identity", tf.drop_blocks(model, [0], ""), x)
            tf.set_mask(model, torch.tensor([[1.0, 0], [0, 1]]), "")
            out = model[0](x)
            self.assertEqual((type(out), out[1:], out[0].tolist()), (tuple, more, [(x[0] + 1).tolist(), x[1].tolist()]))
            self.assertRaisesRegex(ValueError, "use_cache=False", model[0], x, past_key_values=[])
            tf.set_mask(model, None, "")

    def test_reentrant_checkpoints_change_no_gradient_but_losses_that_miss_the_mask_or_all_weights_are_refused(self):
        def learn(around, update):
            def loss_fn(model, sample_mask):
                x, *rest = self.inputs
                model.around = around
                return self.masked(sample_mask(6), x.clone().requires_grad_(update != "frozen"), *rest,
                                   model=model).square().mean()
            torch.manual_seed(0)
            return [*tf.learn_layers(self.model, loss_fn, [(1, 2)] * 2, 4, update=update, accumulate=2)[0].logits]

        def without_mask(model, sample_mask):
            with torch.no_grad():
                sample_mask(6)
            return next(model.parameters()).square().sum()
        reentrant = functools.partial(checkpoint, use_reentrant=True)
        for update in ("lora", "full"):
            plain = learn(self.model.around, update)
            close(learn(reentrant, update), plain, rtol=1e-6, atol=1e-9)
            self.assertTrue(all(logits.any() for logits in plain))
        self.assertRaisesRegex(ValueError, "use_reentrant=False", learn, reentrant, "frozen")
        for update in ("full", "frozen"):
            with self.assertRaisesRegex(ValueError, "does not depend on the mask"):
                tf.learn_layers(self.model, without_mask, [(3, 4)], 2, update=update)
        self.model.requires_grad_(False)
        self.assertRaisesRegex(ValueError, "nothing to update", learn, None, "full")


class Zoo(unittest.TestCase):
    """Appendix A on small random models of diffusers, transformers and timm."""

    REFUSED = {"BloomForCausalLM": "BloomBlock", "T5EncoderModel": "T5Block"}          # two or three outputs
    FIRST_STAYS = [*REFUSED, "DiTTransformer2DModel"]        # whose head reads block 0

    def models(self):
        """Sizes and inputs, for every model that knows their names; and [(models, their lists of blocks, their streams,
        their input, what else they need), ...] (rows: to a block of Latte, each frame is an example). No dimension of a
        stream is 3 but that of the examples."""
        latents, video, tokens, text, vector, *layers = (torch.randn(3, *shape).double() for shape in [
            (4, 8, 8), (4, 2, 8, 8), (16, 4), (5, 32), (32,)] + [(5, 32)] * 6)
        ids, image_first = torch.randint(90, (3, 7)), ("hidden_states", "encoder_hidden_states")
        GIVEN = {name: value for names, value in [
            ("""joint_attention_dim text_embed_dim text_dim text_encoder_dim caption_channels cross_attention_dim
                cross_attention_dim_t5 caption_projection_dim pooled_projection_dim text_emb_dim time_embed_dim ffn_dim
                condition_dim hidden_size embed_dim approximator_hidden_dim approximator_num_channels""", 32),
            ("attention_head_dim pos_embed_max_size", 16), ("sample_size img_size sample_width sample_height", 8),
            ("max_text_seq_length max_sequence_length text_len text_len_t5 sample_frames", 5),
            ("in_channels out_channels in_chans vace_in_channels", 4), ("approximator_layers", 1),
            ("num_layers num_single_layers num_mmdit_layers num_single_dit_layers depth", 3), ("vace_layers", [0, 2]),
            ("num_attention_heads num_heads video_length", 2), ("axes_dims_rope", (4, 4, 8)),
            ("guidance_embeds use_style_cond_and_image_meta_size use_cache", 0), ("llama_layers", [*range(6)]),
            ("img_shapes", [[(1, 4, 4)]] * 3), ("img_ids", torch.rand(16, 3)), ("txt_ids", torch.zeros(5, 3)),
            ("class_labels", ids[:, 0]), ("pooled_projections pooled_embeds", vector), ("max_resolution", (8, 8)),
            ("timestep timesteps", vector[:, 0].abs()), ("original_size target_size crop_coords", vector[:, :2]),
            ("encoder_hidden_states encoder_hidden_states_t5", text), ("control_hidden_states", video),
            ("text_encoder_layers encoder_hidden_states_llama3", layers),
            ("encoder_attention_mask text_embedding_mask text_embedding_mask_t5", torch.ones(3, 5).bool())]
            for name in names.split()}
        LLM = dict.fromkeys("pad_token_id bos_token_id eos_token_id cls_token_id sep_token_id".split(), 1) | {
            "vocab_size": 90, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "head_dim": 8,
            "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 2, "local_attention": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2}
        ONE, BOTH, text_first = "transformer_blocks", "transformer_blocks single_transformer_blocks", image_first[::-1]
        return GIVEN, [
            ("FluxTransformer2DModel ChromaTransformer2DModel BriaFiboTransformer2DModel", BOTH, text_first, tokens),
            ("AuraFlowTransformer2DModel", "joint_" + BOTH, text_first, latents),
            ("SD3Transformer2DModel", ONE, text_first, latents),
            ("QwenImageTransformer2DModel", ONE, text_first, tokens, {"patch_size": 1}),
            ("HiDreamImageTransformer2DModel", "double_stream_blocks single_stream_blocks", image_first, latents,
             {"patch_size": 2, "caption_channels": [32, 32]}),
            ("HunyuanVideoTransformer3DModel", BOTH, image_first, video, {"rope_axes_dim": (4, 4, 8)}),
            ("CogView4Transformer2DModel", ONE, image_first, latents, {"rope_axes_dim": (8, 8)}),
            ("CogVideoXTransformer3DModel", ONE, image_first, video.transpose(1, 2)),
            ("MochiTransformer3DModel", ONE, image_first, video),
            ("WanVACETransformer3DModel", "blocks", (), video),
            ("LatteTransformer3DModel", ONE, (), video, {"rows": 2, "patch_size": 4, "encoder_attention_mask": None,
                                                         "norm_type": "ada_norm_single", "num_embeds_ada_norm": 9}),
            ("HunyuanDiT2DModel", "blocks", (), latents, {"patch_size": 2, "num_layers": 6}),
            ("DiTTransformer2DModel", ONE, (), latents),
            ("VisionTransformer", "blocks", (), latents, {"patch_size": 4}),
            ("Gemma3ForCausalLM", "model.layers", (), ids, LLM), ("ModernBertModel", "layers", (), ids, LLM),
            ("BloomForCausalLM", "transformer.h", (), ids, LLM), ("T5EncoderModel", "encoder.block", (), ids, LLM)]

    def formula(self, streams, m, block, args, kwargs, out):
        """A hook with the mask's formula, independent of `set_mask`."""
        given = dict(zip([*inspect.signature(type(block).forward).parameters][1:], args)) | kwargs
        inputs = [given[name] for name in streams or [*given][:1] if given.get(name) is not None]
        outs = [out] if torch.is_tensor(out) else [*out]
        for i, (x, new) in enumerate(zip(inputs, outs)):
            outs[i] = new if new is None else x + torch.einsum("b,b...->b...", m, new - x)
        return outs[0] if torch.is_tensor(out) else tuple(outs)

    def check(self, cls, given, lists, streams, x, more):
        """The errors of outputs and gradients under a mask, with a mask of ones, and without half of the blocks."""
        def asked(function):
            return {key: value for key, value in given.items() if key in inspect.signature(function).parameters}

        def run(model):
            out = model(x, **asked(model.forward))
            return out if torch.is_tensor(out) else out[0]

        def under(mask, formula=False):
            one, mask = copy.deepcopy(model), mask.double().repeat_interleave(more.get("rows", 1), 0)
            if not formula:
                tf.set_mask(one, mask, lists, streams)
            for block, m in zip(itertools.chain(*map(one.get_submodule, lists)), mask.unbind(1)) if formula else ():
                block.register_forward_hook(functools.partial(self.formula, streams, m), with_kwargs=True)
            return run(one)

        def error(a, b):
            return ((a - b).abs().max() / b.abs().max()).item()
        given = given | more
        model = cls(cls.config_class(**more)) if hasattr(cls, "config_class") else cls(**asked(cls.__init__))
        model = lively(model.double()).requires_grad_(False)                 # some models start as the zero function
        i = torch.arange(sum(len(model.get_submodule(name)) for name in lists))
        mask = torch.stack([i % 2, (i + 1) % 2, i // 2 % 2]).double().requires_grad_()
        outs = under(mask), under(mask, formula=True)
        grads = [torch.autograd.grad(out.square().sum(), mask)[0] for out in outs]
        self.assertTrue(grads[0].isfinite().all() and grads[0].all(), "every block matters")
        errors = [error(*outs), error(*grads), error(under(torch.ones(3, len(i))), run(model))]
        for first in range(1 if cls.__name__ in self.FIRST_STAYS else 2):
            student = tf.drop_blocks(model, [*range(first, len(i), 2)], lists, streams)
            if cls.__name__ in self.REFUSED:
                self.assertRaisesRegex(ValueError, self.REFUSED[cls.__name__], run, student)
            else:
                errors.append(error(run(student), under((i % 2 == first).expand(3, -1))))
        self.assertLess(max(errors), 1e-9, errors)

    def test_masked_is_the_formula_and_dropped_is_masked(self):
        try:
            packages = [importlib.import_module(name) for name in ("diffusers", "transformers", "timm.models")]
        except ImportError:
            self.skipTest("needs pip install diffusers transformers timm")
        given, models = self.models()
        for names, lists, streams, x, *more in models:
            for name in names.split():
                cls = next(getattr(package, name) for package in packages if hasattr(package, name))
                with self.subTest(model=name), warnings.catch_warnings(action="ignore"):
                    self.check(cls, given, lists.split(), streams, x, more[0] if more else {})

class Readme(unittest.TestCase):
    """What the README says can be run and copied."""

    def setUp(self):
        section = Path(tf.__file__).with_name("README.md").read_text().split("## Your own model")[1]
        self.examples, self.copied = section.split("## Limits")[0].split("To copy code:")

    def test_its_own_models_become_working_shallower_ones(self):
        blocks = [block for block in self.examples.split("\n\n") if block.startswith("    ")]
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

    def test_what_it_says_can_be_copied_works_alone(self):
        """Each group of functions, with the imports that the README names, uses nothing else of the file."""
        source, groups = Path(tf.__file__).read_text(), re.split(r"\.\s+", self.copied.strip().strip("."))
        parts = {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body
                 if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for group in groups:
            names, imports = re.findall(r"`(\w+)`", group), group.split(":")[1].split(",")
            code = "import torch.nn as nn\nimport torch.nn.functional as F\n"
            code += "".join(f"import {name.strip()}\n" for name in imports) + "\n\n".join(parts[name] for name in names)
            exec(code, module := {})
            nodes = [*ast.walk(ast.parse(code))]
            own = {node.arg for node in nodes if isinstance(node, ast.arg)}
            used = {node.id for node in nodes if isinstance(node, ast.Name)} - own
            self.assertLessEqual(used & vars(tf).keys(), module.keys())
        self.assertEqual(len(groups), 4)


class Recovery(Numeric):
    """Chapter 5: masked knowledge distillation."""

    def setUp(self):
        super().setUp()
        self.teacher, self.diffusion = tiny_dit(), tf.GaussianDiffusion()
        self.student, self.pairs = tf.prune(self.teacher, [0, 3]), [(0, 1), (1, 3)]

    def test_the_masked_loss_and_its_gradient_ignore_outliers_of_either_model_and_with_k_infinite_it_is_the_mse(self):
        h, g = 3 * torch.randn(2, 3, 40, 16) + 5
        h[0, 0, 0], g[2, 3, 4] = 1e4, -1e4       # massive activations
        left, right = ((x - x.mean((1, 2), True)).abs() <= 2 * x.std((1, 2), keepdim=True) for x in (h, g))
        loss = tf.masked_feature_loss(h.requires_grad_(), g)
        loss.backward()
        means = [(one - other)[keep].square().mean() for one, other, keep in zip(h.detach(), g, left & right)]
        close(loss, sum(means) / 3, rtol=1e-6, atol=0)
        self.assertTrue(torch.equal(h.grad != 0, left & right))
        close(tf.masked_feature_loss(h, g, math.inf), F.mse_loss(h, g))
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

    def test_presets_have_the_official_sizes_and_wrong_sizes_are_refused(self):
        """Names and shapes: the forward passes below read all weights by them, and old checkpoints (Files) load."""
        sizes = {"DiT-XL/2": 675_129_632, "DiT-L/2": 458_102_816, "DiT-B/2": 130_512_416, "DiT-S/2": 32_963_360,
                 "DiT-D19/2": 459_983_264, "DiT-D14/2": 340_457_504, "DiT-D7/2": 173_121_440,
                 "MAR-H": 942_403_104, "MAR-L": 478_326_304, "MAR-B": 207_924_768}
        for name, size in sizes.items():
            model = without_memory(tf.PRESETS[name]["network"])
            self.assertEqual(sum(p.numel() for p in model.parameters()), size, name)
        for build, wrong in ((tiny_dit, {"input_size": 9}), (tiny_dit, {"num_heads": 3}), (tiny_mar, {"num_heads": 3})):
            self.assertRaisesRegex(ValueError, "multiple", build, **wrong)

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
        h = F.conv2d(x, f.w["x_embedder.proj.weight"], f.w["x_embedder.proj.bias"], stride=4).flatten(2).mT  # (B, T, D)
        angles = torch.arange(2).view(2, 1) / 10000 ** (torch.arange(4).double() / 4)
        line = torch.cat([angles.sin(), angles.cos()], 1)    # (places, D / 2), of the column first, then of the row
        h = h + torch.stack([torch.cat([line[token % 2], line[token // 2]]) for token in range(4)])
        c = F.silu(f.time(t, "t_embedder", model.t_embedder) + f.w["y_embedder.embedding_table.weight"][y])[:, None]
        for block in ("blocks.0", "blocks.1"):
            s1, k1, g1, s2, k2, g2 = f.linear(c, block + ".adaLN_modulation.1").chunk(6, -1)
            h = h + g1 * f.attention(f.norm(h) * (1 + k1) + s1, block + ".attn")
            u = f.linear(f.norm(h) * (1 + k2) + s2, block + ".mlp.fc1")
            u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
            h = h + g2 * f.linear(u, block + ".mlp.fc2")
        h = torch.einsum("brcijk->bkricj", f.final(h, c, "final_layer").view(3, 2, 2, 4, 4, 4))  # r, c: row and column
        close(model(x, t, y), h.reshape(3, 4, 8, 8), rtol=1e-5, atol=1e-6)

    def test_guidance_moves_the_first_three_channels_or_all_but_never_the_variance(self):
        t, y, null = torch.tensor([500]), torch.tensor([0, 1]), torch.tensor([3, 3])
        for C, channels, guided in ((1, 3, 1), (1, None, 1), (4, None, 4), (4, 3, 3)):
            model, x = tiny_dit(in_channels=C), torch.randn(2, C, 8, 8)
            out = model.forward_with_cfg(x, t, y, 4.0, cfg_channels=channels)
            cond, uncond = model(x, t, y), model(x, t, null)
            close(out, torch.cat([(uncond + 4 * (cond - uncond))[:, :guided], cond[:, guided:]], 1))
        v = model.forward_with_cfg(x, torch.zeros(1), y, 1.5)[:, :4].detach()                   # a step of heun
        v = (v + model.forward_with_cfg(x + v, torch.ones(1), y, 1.5)[:, :4].detach()) / 2
        close(tf.FlowMatching().sample(model, y, lambda: x, 1, 1.5, dtype=torch.float32), x + v, rtol=1e-4, atol=1e-4)
        sizes = []                               # guidance 1 runs the model on the batch, another one on twice as many
        model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        for guidance in (1.0, 1.5):
            tf.GaussianDiffusion().sample(model, y, lambda: x, 3, guidance)
        self.assertEqual(sizes, [2] * 3 + [4] * 3)

    def test_training_drops_labels_and_activations_and_evaluation_does_not(self):
        labels = torch.ones(1000, dtype=torch.long)
        for embedder in (tiny_dit(class_dropout_prob=0.5).y_embedder, tiny_mar(class_dropout_prob=0.5).y_embedder):
            null, one = embedder(torch.tensor([3, 1]))
            out = embedder.train()(labels).view(1000, -1)
            dropped = (out == null).all(1)
            self.assertTrue((dropped | (out == one).all(1)).all() and 0.4 < dropped.float().mean() < 0.6)
            self.assertTrue((embedder.eval()(labels) == one).all())
        block = tiny_mar(dropout=0.5).decoder_blocks[1]
        for p in block.parameters():
            nn.init.ones_(p)                     # all outputs are the same, but for the dropout
        for layer in (block.attn, block.mlp):
            out, sure = layer.train()(torch.ones(100, 5, 16)), layer.eval()(torch.ones(100, 5, 16))
            self.assertTrue(0.45 < (out == 0).float().mean() < 0.55 and len(sure.unique()) == 1)     # of the outputs
            self.assertGreater(out[out != 0].std() / out.mean(), 0.04)       # and of attention or hidden activations


class Diffusion(Numeric):
    """Chapter 2 and Appendix C, SiT: closed forms."""

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

    def test_points_and_losses_of_a_sit_are_the_published_ones(self):
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


class Masked(Numeric):
    """Appendix D: MAR."""

    def test_the_forward_pass_is_the_published_one(self):
        """An independent float64 version, without modules; a batch has three examples, which know other tokens."""
        model, x0, noise, y = tiny_mar().double(), *torch.randn(2, 3, 1, 8, 8).double(), torch.tensor([0, 2, 3])
        f, head, known = Formulas(model), "diffloss.net.", torch.tensor([[1, 5, 12], [0, 2, 15], [7, 8, 9]])

        def block(h, name):                      # h (B, T, D)
            h = h + f.attention(f.norm(h, name + ".norm1"), name + ".attn")
            u = f.linear(f.norm(h, name + ".norm2"), name + ".mlp.fc1")
            return h + f.linear(u * (1 + torch.erf(u / math.sqrt(2))) / 2, name + ".mlp.fc2")
        t, rows = torch.randint(0, 1000, (3, 16)).scatter_(1, known, -1), torch.arange(3)[:, None]
        x_t, noisy = tf.MaskedAutoregression(16).q_sample(x0, t, noise), t >= 0
        tokens = torch.stack([x0[:, :, i:i + 2, j:j + 2].flatten(1) for i in range(0, 8, 2) for j in range(0, 8, 2)], 1)
        exactly(x_t[rows, known], tokens[rows, known])
        label = torch.cat([f.w["class_emb.weight"], f.w["fake_latent"]])[y, None]               # three times in front
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
        c, u = F.silu(time + f.linear(z, head + "cond_embed")), f.linear(x_t[noisy], head + "input_proj")
        for name in (head + "res_blocks.0.", head + "res_blocks.1."):
            shift, scale, gate = f.linear(c, name + "adaLN_modulation.1").chunk(3, -1)
            v = f.linear(f.norm(u, name + "in_ln") * (1 + scale) + shift, name + "mlp.0")
            u = u + gate * f.linear(F.silu(v), name + "mlp.2")
        close(model(x_t, t, y), f.final(u, c, head + "final_layer"), rtol=1e-9, atol=1e-9)

    def test_the_loss_is_that_of_each_noisy_token_by_itself_repeated_with_other_noise(self):
        objective, model = tf.MaskedAutoregression(16, repeats=2), tiny_mar().requires_grad_(False)
        x0, t, y = torch.randn(3, 1, 8, 8), objective.sample_t(3), torch.tensor([0, 2, 3])
        noise = objective.noise(x0, t)
        x_t, noisy = objective.q_sample(x0, t, noise), t >= 0
        self.assertEqual((t.shape, tf.MaskedAutoregression().sample_t(2).shape), ((6, 16), (8, 256)))
        self.assertTrue(torch.equal(t[:3] < 0, t[3:] < 0) and not torch.equal(t[:3], t[3:]))
        cosine = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        plain = tf.GaussianDiffusion(np.minimum(0.999, 1 - cosine[1:] / cosine[:-1]))
        np.testing.assert_allclose(objective.diffusion.abar, plain.abar)
        tokens, noises = tf.patchify(x0, 16, copies=2)[noisy], tf.patchify(noise, 16)[noisy]
        out = model(x_t, t, y)
        close(out, torch.cat([model(x_t[:3], t[:3], y), model(x_t[3:], t[3:], y)]))             # copies are apart
        noised = plain.q_sample(tokens, t[noisy], noises)
        close(x_t[noisy], noised)
        other, means = out + 0.5 * torch.randn(out.shape), torch.zeros(2, 6, 16)
        means[0, noisy] = plain.losses(out, tokens, noised, t[noisy], noises)["loss"]
        means[1, noisy] = plain.distillation_losses(other, out, noised, t[noisy])
        loss, distance = means.sum(2) / noisy.sum(1)
        close(objective.training_losses(model, x0, t, y, noise)["loss"], loss.view(2, 3).mean(0), rtol=1e-3, atol=1e-5)
        close(objective.distillation_losses(other, out, x_t, t), distance)

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

        def images(count, steps, guidance=1.0, dropout=0.1):
            draw = tf.noise_source(range(count), (1, 8, 8), 0, DEVICE)
            model = SimpleNamespace(condition=condition, y_embedder=tf.LabelEmbedder(3, 1, dropout), patch_size=1,
                                    input_size=8, in_channels=1, diffloss={"net": lambda x, t, z: torch.cat([z, z], 1)})
            counts.clear()
            return objective.sample(model, torch.arange(count), draw, steps, guidance, head_steps=7, temperature=0.9)
        objective, counts = tf.MaskedAutoregression(64), []
        objective.diffusion.denoise = denoise
        drawn, left = images(2, 8, 3.0), [math.floor(64 * math.cos(math.pi / 2 * i / 8)) for i in range(9)]
        self.assertEqual(counts, [[64 - n] * 4 for n in left[:-1]])
        scales = [torch.full((before - n,), 1 + 2 * (64 - max(1, n)) / 64) for before, n in zip(left, left[1:])]
        close(drawn.flatten(1).sort().values, torch.cat(scales).expand(2, -1))
        self.assertFalse(torch.equal(*drawn), "every image has an order of its own")
        images(1, 64, dropout=0)
        self.assertEqual(counts, [[n] for n in range(64)])   # at least one is opened
        for steps, guidance, reason in ((65, 1.0, "expected 1 to 64"), (8, 1.5, "only guidance 1")):
            self.assertRaisesRegex(ValueError, reason, images, 1, steps, guidance, dropout=0)

    def test_the_method_runs_on_all_families_unchanged_and_a_pruned_model_computes_what_its_mask_computed(self):
        """Learning, pruning and recovery, in every mode, know no model and no objective; the teacher stays as it is."""
        self.enterContext(torch.device("cpu"))   # where data are read
        for teacher, objective, data, batches, _ in families(DEVICE):
            weights, (x0, y), groups = copy.deepcopy(dict(teacher.state_dict())), next(batches()), [(1, 2)] * 2
            t, examples = objective.sample_t(8, DEVICE), tf.fixed_examples(data, device=DEVICE)
            inputs = objective.q_sample(x0, t, objective.noise(x0, t)), t, y
            sampler, _ = tf.learn_layers(teacher, tf.masked_denoising(objective, batches()), groups, 5)
            self.assertTrue(all(torch.isfinite(p).all() and p.any() for p in sampler.parameters()))
            for kept in ([2, 3], sampler.kept()):            # none of a MAR's encoder, and one of each list
                mask = torch.eye(4)[kept].sum(0).repeat(8, 1).to(DEVICE).requires_grad_()
                out, features = teacher(*inputs, mask=mask, hidden=kept)
                pruned = tf.prune(teacher, kept)
                close([pruned(*inputs), *pruned(*inputs, hidden=(0, 1))], [out, out, features])
                self.assertTrue(torch.autograd.grad(out.square().sum(), mask)[0].all())
                type(teacher)(**pruned.config()).load_state_dict(pruned.state_dict())
            before, pairs = tf.calibration_loss(pruned, objective, examples), tf.match_blocks(groups, kept, [2, 4])
            for kd in tf.KD_MODES:
                student = tf.prune(teacher, kept)
                student = tf.recover(student, teacher, objective, batches(), pairs, 20, kd=kd, beta=2e-4, lr=2e-3)
                self.assertLess(tf.calibration_loss(student, objective, examples), before, kd)
            exactly(dict(teacher.state_dict()), weights)
            for bad in ([], [0, 4], [2, 1], [1, 1], [-1, 2]):
                self.assertRaisesRegex(ValueError, "expected", tf.prune, teacher, bad)


def families(device):
    """Of each family a model, its objective, data, a function that returns their batches, and how to sample faster."""
    data = tf.toy_digits(40, size=8)
    data.labels %= 3
    for build, objective, more in ((tiny_dit, tf.GaussianDiffusion(), {}), (tiny_dit, tf.FlowMatching(), {}),
                                   (tiny_mar, tf.MaskedAutoregression(16), {"head_steps": 2})):
        yield build().to(device), objective, data, functools.partial(tf.data_batches, data, 8, 0, device), more


class Placement(unittest.TestCase):
    """Everything that is computed stays on the model's device. Here that is torch's "meta" device, whose tensors have
    shapes and no numbers, and which refuses to be mixed with the CPU as a GPU does."""

    def test_learning_recovery_sampling_criteria_and_measures_never_leave_the_device_of_the_model(self):
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
        for teacher, objective, data, batches, more in families("meta"):
            groups, examples = [(1, 2)] * 2, tf.fixed_examples(data, device="meta")
            for update in ("lora", "full", "frozen"):
                tf.learn_layers(teacher, tf.masked_denoising(objective, batches()), groups, 1, update=update)
            for kd in tf.KD_MODES:
                tf.recover(tf.prune(teacher, [0, 3]), teacher, objective, batches(), [(0, 1), (1, 3)], 1, kd=kd)
            for rule in tf.CRITERIA.values():
                rule(teacher, groups, objective, examples)
            draw, labels = tf.noise_source(range(2), (1, 8, 8), 0, "meta"), torch.tensor([0, 2], device="meta")
            for guidance in (1.0, 1.5):
                x = objective.sample(teacher, labels, draw, 2, guidance, **more)
                self.assertEqual((x.shape, x.device.type), ((2, 1, 8, 8), "meta"))
        features = {"mu": np.zeros(3), "sigma": np.eye(3), "features": np.zeros((9, 3), np.float32)}
        self.assertEqual(tf.compare_statistics(features, features, "meta")["recall"], 0.75)

STEPS = "--teacher-steps {0} --learn-steps {0} --recover-steps {0} "
TINY = STEPS.format(3) + f"--samples 10 --sample-steps 2 --batch-size 8 --device {DEVICE} --out"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent), "OMP_NUM_THREADS": "1"}
QUICK = {"toy_digits": functools.partial(tf.toy_digits, 64),             # any digits and any judge will do
         "train_judge": functools.partial(tf.train_judge, steps=5)}
load = functools.partial(torch.load, weights_only=True)


def split(*words):
    """Words cut at spaces, paths not."""
    return [part for word in words for part in ([str(word)] if isinstance(word, Path) else word.split())]


def call(*words, main=tf.main):
    """A command line run in this process: its exit status, stdout and stderr."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(split(*words))
    return status, out.getvalue(), err.getvalue()


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
        self.enterContext(mock.patch.multiple(tf, **QUICK))

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


class Data(InFolder):
    """Images, latents, encoding, and measuring: features, distances, FID."""

    def test_the_frechet_distance_agrees_with_the_general_matrix_square_root_and_takes_singular_covariances(self):
        rng = np.random.default_rng(0)
        s = np.cov(rng.normal(size=(5, 40)).T)   # 5 samples in 40 dimensions; s and 4 s commute: there is a closed form
        self.assertAlmostEqual(tf.frechet_distance(np.zeros(40), s, np.ones(40), 4 * s), 40 + np.trace(s), places=5)
        a, b = rng.normal(size=(500, 30)), rng.normal(size=(500, 30)) @ rng.normal(size=(30, 30)) * 0.2 + 0.3
        (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x.T)) for x in (a, b))
        expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
        self.assertAlmostEqual(tf.frechet_distance(m1, s1, m2, s2) / expected, 1, places=9)

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
        for one, other in (("a", "b"), ("a", "b.npz"), ("a.npz", "b"), ("a.npz", "adm.npz"), ("ours.npz", "adm.npz")):
            net = inception if one != "ours.npz" else []
            words = self.story("--device cpu --fid", folder / one, "--ref", folder / other, *net)
            for part, there in ((f"| {tf.frechet_distance(m1, s1, m2, s2):.4g} |", True), ("precision", net),
                                ("60 samples", net), ("250 steps, guidance 1.5", one == "a.npz"),
                                (f"FID with {folder / one},", net), ("(60 samples, ?) vs.", net and one != "a.npz"),
                                (f"FID with {folder / other},", other in ("b", "b.npz"))):
                self.assertEqual(part in words, bool(there), (part, words))
        start = ["--device cpu --fid", folder / "a", "--ref"]
        for other in "nothing one.npz nothing.npz torn.npz grey.npz nan.npz".split():
            self.refused(str(folder / other), *start, folder / other, *inception)
        self.refused("do not fit", *start, folder / "wide.npz", *inception)
        self.refused("--inception FILE is needed", *start, folder / "b")
        self.refused("TorchScript", *start, folder / "b", "--inception", folder / "other.pt")

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
        np.testing.assert_allclose(found["one"]["features"], look(draw(models["one"], labels, range(40)))[0], atol=5e-3)

    def test_images_are_cropped_from_the_middle_links_are_followed_but_not_in_circles_and_broken_files_are_named(self):
        """Images are grey or all RGB, and classes whose names are numbers sort by value."""
        root, a, b = (self.folder / name for name in ("data", "data/2", "data/10"))
        for folder, (i, size) in itertools.product((b, a), enumerate(((14, 20), (100, 37), (9, 7)))):
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("L", size).save(folder / f"{i}.png")
        (b / "link").symlink_to(a)
        (b / "circle").symlink_to(root)
        data = tf.open_data(root, 8)
        self.assertEqual((data.images.shape, data.labels.tolist(), data.classes),
                         ((9, 1, 8, 8), [0] * 3 + [1] * 6, ["2", "10"]))
        Image.new("P", (8, 8)).save(a / "palette.gif")
        Image.new("CMYK", (8, 8)).save(a / "print.jpg")
        Image.new("RGBA", (8, 8), (255, 0, 0, 51)).save(a / "transparent.png")
        turned = Image.new("L", (8, 8))
        turned.paste(255, (0, 0, 8, 4))          # the upper half is white, the right one after turning
        entries = struct.pack("<HHL4sHHLHH", 0x100, 2, 4, b"odd", 0x112, 3, 1, 6, 0)            # words, for a number
        turned.save(a / "turned.png", exif=b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + entries + bytes(4))
        (b / ".hidden").write_text("is skipped")
        images = tf.open_data(root, 8).images
        self.assertEqual((images.shape, images[4, :, 0, 0].tolist()), ((17, 3, 8, 8), [255] * 3))
        self.assertEqual(images[5, :, 0, 0].tolist(), [255, 204, 204], "red on white")
        self.assertEqual(images[6, 0, :, ::7].tolist(), [[0, 255]] * 8)
        for mode in ("I;16", "I", "F"):
            Image.new(mode, (8, 8)).save(b / "deep.tif")
            self.assertRaisesRegex(tf.UserError, "deep.tif.*" + mode, tf.open_data, root, 8)
        (a / "torn.png").write_bytes(b"no image")
        self.assertRaisesRegex(tf.UserError, "torn.png: ", tf.open_data, root, 8)
        (a / "dead.png").symlink_to(self.folder / "nowhere")
        self.assertRaisesRegex(tf.UserError, "dead.png", tf.open_data, root, 8)
        os.mkfifo(a / "a pipe")                  # whoever opens it waits for ever
        self.assertRaisesRegex(tf.UserError, "a pipe is no file", tf.open_data, root, 8)
        stripes = np.repeat([[0] * 16 + [200] * 16 + [0] * 16], 16, 0).astype(np.uint8)
        self.assertTrue((np.asarray(tf.center_crop(Image.fromarray(stripes), 16)) == 200).all())

    def test_the_classes_of_data_and_checkpoint_have_the_same_names_or_one_has_numbers(self):
        images, labels = torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1])
        for classes, names, expected in ((["b", "c"], ["b", "c"], "bc"), (["0", "1"], ["a", "b"], "ab"),
                                         (["x", "y"], ["0", "1"], "xy")):
            data = tf.match_classes(tf.Dataset(images, labels, classes), names)
            self.assertEqual((data.labels.tolist(), data.classes), ([0, 1, 1], list(expected)))
        for names in (list("abc"), list("yx"), list("012"), ["x"]):
            self.assertRaisesRegex(tf.UserError, "'x', 'y'", tf.match_classes, data, names)

    def test_batches_of_latents_are_half_mirrored_follow_from_the_step_and_are_shared_by_processes_and_parts(self):
        np.save(self.folder / "labels.npy", np.arange(20) % 7)               # image i is full of 2 i, mirrored 2 i + 1
        np.save(self.folder / "latents.npy", np.arange(40, dtype="f4").repeat(64).reshape(20, 2, 4, 4, 4))
        data = tf.open_data(self.folder, 8)
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
        def refused(reason, folder, *num_classes):
            with self.assertRaisesRegex(tf.UserError, reason):
                tf.open_data(folder, 8, *num_classes).read(torch.arange(20), torch.ones(20).int())
        images, N, (good, spoiled) = self.folder / "images", np.arange(20), np.zeros((2, 20, 2, 4, 4, 4))
        spoiled[13, 1, 0, 0, 0] = np.nan
        np.save(self.folder / "labels.npy", N)
        for name, content, reason, *num_classes in (
                ("latents", good[:5], r"\(5, 2, 4, 4, 4\)"), ("latents", good[:, 0], r"\(20, 4, 4, 4\)"),
                ("latents", good.astype(object), "npy"), ("latents", spoiled, r"latents.npy.*\[13\]"),
                ("labels", N / 2, r"int .N,."), ("labels", N % 7, "expected 0 to 5", 6), ("labels", N - 2, "-2"),
                ("labels", N * 10 ** 8, "0 to 99999"), ("labels", N - 1, "same --encode command again")):
            np.save(self.folder / f"{name}.npy", content)
            refused(reason, self.folder, *num_classes)
        save_images(images / "a", 2, 8, 8)
        (images / "empty").mkdir()
        refused("without images: .*empty", images)
        refused("empty: expected one sub-folder", images / "empty")
        (images / "notes.txt").touch()
        refused("notes.txt", images)

    def test_an_encoding_ended_at_any_point_goes_on_with_the_same_command_and_processes_share_one_file(self):
        """Around every call of the VAE, every write, and every flush to the disk. A broken image is named."""
        def around(function):
            def counted(*args, **more):
                for part in (lambda: None, lambda: function(*args, **more)):
                    result = part()
                    events.append(1)
                    if len(events) == stop:
                        raise error
                return result
            return counted

        def encode(out, expected=0, words="", vae="toy"):
            status, _, said = call("--device cpu --image-size 32 --encode", images, "--out", out, "--vae", vae)
            self.assertEqual((status, words in said), (expected, True), said)
            return {path.name: path.read_bytes() for path in out.glob("[!.]*")}

        def gather(value=None):                  # what the first process tells all
            first.extend([value] if value is not None and not first else [])
            return first or [None]
        images, done, events, stop, flushed, first = self.folder / "images", self.folder / "done", [], None, 0, []
        clock = itertools.count(0, 4)            # seconds; a flush every second batch
        for owner, name, instead in (
                (ToyVAE, "encode", around(ToyVAE.encode)), (tf, "write_file", around(tf.write_file)),
                (os, "fsync", around(os.fsync)), (time, "monotonic", lambda: next(clock)), (tf, "VAE", ToyVAE),
                (tf, "encode_images", functools.partial(tf.encode_images, batch_size=1))):
            self.enterContext(mock.patch.object(owner, name, instead))
        save_images(images / "a", 3, 32, 50)
        image = torch.from_numpy(save_images(images / "b", 4, 32, 32)[0]).permute(2, 0, 1)
        whole = encode(done)
        self.assertEqual(whole.keys(), {"latents.npy", "labels.npy", "latents.json"})
        data = tf.open_data(done, 8)
        self.assertEqual((data.shape, data.labels.tolist(), data.latent), ((4, 4, 4), [0] * 3 + [1] * 4, True))
        x = ToyVAE().decode(data.read(torch.tensor([3, 3]), torch.tensor([0, 1])))[..., ::8, ::8].float()
        close(x, torch.stack([image, image.flip(2)])[..., ::8, ::8].float(), rtol=0, atol=8)
        ends = (KeyboardInterrupt, 130, "files are whole"), (OSError("full"), 2, "full; expected images, an --image-")
        for (error, status, words), number in itertools.product(ends, range(1, len(events))):   # not after the end
            out, stop = self.folder / f"ended-{status}-{number}", number
            events.clear()
            encode(out, status, words)
            self.assertEqual(out.exists(), number > 2, "an --image-size that does not fit leaves nothing behind")
            stop = None
            if (out / "labels.npy").exists() and (np.load(out / "labels.npy") < 0).any():
                flushed += (np.load(out / "labels.npy") >= 0).any()
                self.assertRaisesRegex(tf.UserError, "same --encode command again", tf.open_data, out, 32)
                encode(out, 2, "vae toy (now other)", vae="other")
            self.assertEqual(encode(out), whole, number)
        self.assertGreater(flushed, 5, "some were stopped amid the images")
        self.assertEqual(encode(done), whole, "nothing is left to do")
        (done / "latents.json").unlink()
        encode(done, 2, "is there already")
        for rank, left in ((0, 3), (1, 0)):
            with mock.patch.multiple(tf, world_size=lambda: 2, gather=gather, rank=lambda: rank):
                shared = encode(self.folder / "shared")
            self.assertEqual((np.load(self.folder / "shared" / "labels.npy") < 0).sum(), left)
        self.assertEqual(shared, whole)
        content = (images / "b" / "01.png").read_bytes()
        (images / "b" / "01.png").write_bytes(content[:100])
        encode(self.folder / "broken", 2, "01.png")
        (images / "b" / "01.png").write_bytes(content)
        self.assertEqual(encode(self.folder / "broken"), whole)

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
        for name, reason in ((self.folder, "not of 16 channels"), ("/nothing", "--vae /nothing: ")):
            self.assertRaisesRegex(tf.UserError, reason, tf.VAE, name, "cpu", 16)


def fixed_gradients(accumulate=1, steps=3):
    """The losses and the gradients of LoRA and logits in some steps on fixed batches of 8, with fixed random numbers,
    of which every process and part of a batch takes its rows; and all that was trained, from every process."""
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
             on_step=lambda step, metrics: found.append([metrics["loss"], *(p.grad.clone() for p in weights)]))
    return found, tf.gather([p.detach() for p in weights])


class Training(InFolder):
    """The loop: averages, compiling, several processes, stopping and going on."""

    def test_the_rate_warms_up_and_falls_along_a_cosine_and_the_average_of_the_weights_is_exponential(self):
        """Of a layer whose bias the loss does not use."""
        for decay, steps in ((0.9, 4), (0.2, 100)):
            model, seen = nn.Linear(1, 1), []
            average = tf.train(model, lambda step: (model.weight.sum(), {}), steps, lr=0.1, final_lr_ratio=0.5,
                               warmup=steps // 10, ema_decay=decay,
                               on_step=lambda step, metrics: seen.append((model.weight.item(), metrics["lr"])))
            weights, rates = zip(*seen)
            expected = weights[0]
            for n, weight in enumerate(weights):             # the decay warms up
                expected += (1 - min(decay, (1 + n) / (10 + n))) * (weight - expected)
            self.assertAlmostEqual(average.weight.item(), expected, places=5)
            self.assertEqual(model.bias.grad.item(), 0)
        np.testing.assert_allclose([rates[0], rates[50], rates[99]], [0.1 / 11, 0.075, 0.05], atol=1e-4)

    def test_all_blocks_run_compiled_while_learning_and_recovering_with_few_graphs(self):
        """torch gives up on a block that was compiled in 8 variants: an error here. Only the compiler is left out."""
        def learn():
            tf.learn_layers(teacher, tf.masked_denoising(diffusion, batches()), [(1, 2)] * 2, 10, prepare=tf.compiled)

        def recover():
            compiled, student = (tf.compiled(model) for model in (copy.deepcopy(teacher), tf.prune(teacher, [0, 3])))
            tf.recover(student, compiled, diffusion, batches(), [(0, 1), (1, 3)], 5)
        batches = functools.partial(tf.data_batches, tf.toy_digits(size=8), 12, 0, DEVICE)
        graphs, teacher, diffusion = [], tiny_dit(num_classes=10).to(DEVICE), tf.GaussianDiffusion()
        counted = functools.partialmethod(nn.Module.compile, backend=lambda graph, _: graphs.append(graph) or graph)
        self.enterContext(mock.patch.object(nn.Module, "compile", counted))
        self.enterContext(torch._dynamo.config.patch(fail_on_recompile_limit_hit=True))
        for stage in (learn, recover, learn):    # the last one in a process has its graphs too
            stage()
            self.assertTrue(0 < len(graphs) <= 8, len(graphs))
            graphs.clear()

    def test_states_are_saved_by_the_first_process_at_the_end_of_windows_and_take_a_thirtieth_of_the_time(self):
        def save(content, file):                 # takes two seconds, and a step takes one
            saved.append(clock[0])
            clock[0] += 2

        def loss_fn(step):
            clock[0] += 1
            return model.weight.square().sum(), {}
        self.enterContext(mock.patch.object(torch, "save", save))
        self.enterContext(mock.patch.object(time, "monotonic", lambda: clock[0]))
        for rank, steps, seconds, gaps in ((0, 200, 30, [31, 62, 62]),       # 62: 60 s after the end of a save of 2 s
                                           (1, 200, 30, []), (0, 1000, 0, [1] + 99 * [10 + 2])):
            model, clock, saved = nn.Linear(1, 1), [-1.0], []
            with mock.patch.multiple(tf, rank=lambda: rank, SAVE_SECONDS=seconds):
                tf.train(model, loss_fn, steps, state=tf.TrainingState(self.folder / f"{rank}-{steps}.pt"))
            self.assertEqual([b - a for a, b in zip([-1, *saved], saved)], gaps)

    def test_rows_of_the_log_are_means_over_windows_and_printed_lines_show_the_last_one(self):
        def log(stage, steps, seconds, taken):   # seconds between two looks at the clock, of which a step takes two
            clock = itertools.count(0, seconds)
            with (mock.patch.object(time, "perf_counter", lambda: next(clock)),
                  contextlib.redirect_stderr(io.StringIO()) as said):
                on_step = tf.logged(path, stage, steps, taken[0])
                for step in taken:
                    on_step(step, {"loss": float(step), "denoising": 2.0 * step})
            return said.getvalue(), [json.loads(line) for line in path.read_text().splitlines()]
        path = self.folder / "log.jsonl"
        said, rows = log("recover", 250, 4, range(250))
        self.assertEqual([(row["step"], row["loss"], row["denoising"]) for row in rows],
                         [(step, step - 1.5, 2 * step - 3) for step in range(2, 251, 2)])
        self.assertRegex(said, r"\nrecover  250/250  loss 248.5000  denoising 497.0000 .* 0 s left$")
        _, again = log("recover", 250, 5, range(100, 102))
        self.assertEqual((again[:50], len(again), again[50] == rows[50]), (rows[:50], 51, False), "later rows are cut")
        said, _ = log("teacher", 400_000, 100, range(4))
        self.assertIn("days left", said)
        path.write_text("{torn")
        self.assertRaisesRegex(tf.UserError, "log.jsonl", tf.logged, path, "recover", 250)
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
        self.assertEqual((run.returncode, "Traceback" in said, "all files are whole" in said), (130, False, True), said)
        self.story(TINY, killed, *words)
        for name in ("teacher.pt", "student.pt"):
            exactly(load(whole / name)["ema"], load(killed / name)["ema"])
        ends = [({path.name for path in folder.glob("[!.]*")}, (folder / "layers.json").read_text(),
                 re.sub('"steps_per_s": .*', "", (folder / "log.jsonl").read_text())) for folder in (whole, killed)]
        self.assertEqual(*ends)


    def test_parts_of_a_batch_and_two_processes_have_the_gradients_of_the_whole_batch(self):
        """And two processes that are stopped and go on end bit for bit like two that never were, and draw as one. A
        step takes a handful of exchanges, not one for every tensor."""
        steps, two, stopped = STEPS.format(4) + "--device cpu", self.folder / "two", self.folder / "stopped"
        (self.folder / "script.py").write_text(f"import {Path(__file__).stem} as t" + """
import contextlib, functools, itertools, sys, torch, torch.distributed as dist, tinyfusion as tf
vars(tf).update(t.QUICK, SAVE_SECONDS=0)
exchanges, all_reduce = [], dist.all_reduce
dist.all_reduce = lambda tensor: (exchanges.append(1), all_reduce(tensor))
with tf.processes():
    tf.processes = contextlib.nullcontext        # in every run of main below
    found = [t.fixed_gradients(1), t.fixed_gradients(2)]
    assert len(exchanges) <= 8 * 6, len(exchanges)
    tf.write_file("gradients", lambda file: torch.save(found, file))
    stopped = [t.TINY, "stopped --stages teacher,learn,recover", sys.argv[1]]
    assert "cut into 2 parts" in t.call(*stopped, "--batch-size 7")[2]
    two = functools.partial(lambda *args, real: itertools.islice(real(*args), 2), real=tf.data_batches)
    with contextlib.suppress(StopIteration), t.mock.patch.object(tf, "data_batches", two):
        t.call(*stopped)
    status, said, _ = t.call(*stopped)
    assert status == 0 and said.count("from step 1") == 1, (status, said)
    assert tf.main(t.split(t.TINY, "two", sys.argv[1])) == 0
threads = [path.read_text() for path in t.Path("/proc/self/task").glob("*/comm")]
assert "gloo" not in str(threads), "threads of the group, left over, can crash the end of a process"
""")
        words = "-m torch.distributed.run --standalone --nproc_per_node=2 script.py".split()
        done = subprocess.run([sys.executable, *words, steps], capture_output=True, text=True, env=ENVIRONMENT,
                              cwd=self.folder, timeout=300)
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
            close(*([one[key] for key in ("fid", "is", "loss")] for one in (by_two[name], row)), rtol=1e-2, atol=1e-2)


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
        for part in ("steps 0 to 3", "block 0, kept", "block 1, dropped", "confidence 0.62"):
            self.assertIn(part, str(words))

    def test_a_full_disk_or_memory_or_a_signal_amid_a_write_leaves_the_old_file_and_no_other(self):
        """And only what is out of memory is called so."""
        class Buffer(io.BytesIO):                # Ctrl-C amid torch.save, which must not abort
            def write(self, data):
                written = super().write(data)
                if self.tell() == written:
                    raise KeyboardInterrupt
                return written
        before, content = self.path.read_bytes(), {"weight": torch.zeros(10)}
        again = functools.partial(tf.write_file, self.path, functools.partial(torch.save, content))
        for owner, name, patch, expected, words in (
                (io, "BytesIO", Buffer, 130, "stopped"), (Path, "replace", KeyboardInterrupt, 130, "stopped"),
                (Path, "replace", OSError("disk full"), 2, "model.pt: disk full"),
                (io, "BytesIO", RuntimeError("No working C++ compiler found"), 2, "--compile needs"),
                (Path, "replace", MemoryError(), 2, "out of memory"),
                (Path, "replace", torch.OutOfMemoryError("CUDA"), 2, "out of memory")):
            with mock.patch.object(owner, name, patch if patch is Buffer else mock.Mock(side_effect=patch)):
                ended, _, said = call(main=lambda _: tf.guarded("x", again))
            self.assertEqual((ended, said.count("\n"), words in said), (expected, 1, True), said)
            self.assertEqual((self.path.read_bytes(), os.listdir(self.folder)), (before, ["model.pt"]))
        with self.assertRaisesRegex(RuntimeError, "memory access"):
            tf.guarded("x", mock.Mock(side_effect=RuntimeError("illegal memory access")))

    def test_checkpoints_of_the_official_layouts_and_ours_load_bit_for_bit(self):
        sizes = {"input_size": 16, "in_channels": 4, "num_classes": 7, "hidden_size": 64, "num_heads": 4,
                 "mlp_ratio": 4.0, "class_dropout_prob": 0.1}
        dit = tf.DiT, sizes | {"patch_size": 2, "depth": 3, "learn_sigma": True}
        mar = tf.MAR, sizes | {"patch_size": 1, "encoder_depth": 1, "decoder_depth": 2, "buffer_size": 8,
                               "diffloss_w": 128, "diffloss_d": 2, "dropout": 0.1}
        for (network, config), name, ema in ((dit, "ddpm", "ema"), (dit, "flow", "ema"), (mar, "mar", "model_ema")):
            model, other, args = lively(network(**config), 0.05), network(**config), argparse.Namespace(lr=1e-4)
            weights, named = model.state_dict(), model.state_dict(prefix="module.")
            spread = {name.replace("blocks.0", "blocks.0._orig_mod"): weight for name, weight in weights.items()}
            for layout in (weights, {"model": named}, named | {"n_averaged": torch.tensor(3)},
                           {"model": other.state_dict(), ema: weights, "opt": {}, "args": args, "train_steps": 5},
                           {"state_dict": model.state_dict(prefix="_orig_mod.module."), "args": ["--lr", "1e-4"]},
                           {"ema": None, "ema_model": spread, "config": {"lr": 1}, "sampling": {"num_steps": 250}},
                           other.state_dict(prefix="module.online.") | model.state_dict(prefix="module.ema_model."),
                           {"ema": weights, "config": config | {"class_dropout_prob": 0.2}, "objective": name,
                            "classes": [*"abcdefg"], "kept": [0], "sampling": {"steps": 2, "guidance": 2.5}}):
                torch.save(layout, self.path)
                loaded, content = tf.load_checkpoint(self.path)
                self.assertEqual((loaded.config() | {"class_dropout_prob": 0.1}, len(content["classes"])), (config, 7))
                exactly(weights, loaded.state_dict())
            self.assertEqual(*([p.requires_grad for p in one.parameters()] for one in (loaded, model)))
            found = content["objective"].name, content["classes"], content["sampling"]["guidance"], loaded.config()
            self.assertEqual(found, (name, [*"abcdefg"], 2.5, config | {"class_dropout_prob": 0.2}))
            self.refused("draws 4 channels", *self.words, main=sample.main)
            self.assertEqual(self.draw(*self.words)[1]["latents"].shape, (3, 4, 16, 16))

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

    def test_the_size_and_name_of_official_models_are_told_from_their_shapes_or_by_a_file_of_sits_own_training(self):
        """Of files as large as a DiT-XL's too; here all their weights are one and the same zero."""
        for name, args, wrong in (
                ("DiT-XL/2", {}, None), ("DiT-D7/2", {}, None), ("MAR-B", {}, None),
                ("SiT-S/2", {"model": "SiT-S/2", "prediction": "velocity", "path_type": "Linear"}, "DiT-S/2"),
                ("DiT-S/2", {"model": "DiT-S/2"}, "SiT-S/2")):
            model = without_memory(tf.PRESETS[name]["network"])
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
        for classes, args, found, dropout in ((1, {}, 1, 0), (3, {}, 2, 0.1), (3, {"num_classes": 2}, 2, 0.1),
                                              (10, {"num_classes": 10}, 10, 0)):
            weights = tf.DiT(**sizes | {"num_classes": classes}).state_dict()
            content = {"ema": weights, "args": collections.OrderedDict(**args), "sampling": {"guidance": 1.5}}
            torch.save(content, self.path)
            model, _ = tf.load_checkpoint(self.path)
            self.assertEqual((model.num_classes, model.y_embedder.dropout_prob), (found, dropout))
            self.assertIn(f"guidance {1.5 if dropout else 1.0}", self.draw(*self.words)[0])
            if not dropout:
                self.refused("only guidance 1", *self.words, "--guidance 1.5", main=sample.main)
        self.refused("only guidance 1", TINY, self.folder / "run", "--guidance 2 --ckpt", self.path)
        self.assertIn("guidance 1.0", self.story(TINY, self.folder / "run", "--ckpt", self.path))

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
                ("too many blocks", config(depth=10 ** 9)), ("final_layer.linear.weight", good | {"ema": spoiled}),
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

    def test_the_same_seed_draws_the_same_image_whatever_the_batch_size_of_classes_by_names_or_numbers(self):
        """What was drawn is said, and mistakes are."""
        for labels, names in (("c,0", ["c", "a", "c"]), ("1", ["b"] * 3)):
            said, arrays = self.draw(*self.words, "--labels", labels)
            self.assertIn(f"3 images of {', '.join(dict.fromkeys(names))};", said)
            self.assertEqual(arrays["names"].tolist(), names)
        for wrong, reason in (("--labels a,3", "from 0 to 2"), ("--labels ²", "from 0 to 2"), ("--out .", "a .png"),
                              ("--out x.jpg", "a .png"), ("--npz x", "a .npz"), ("--npz x.npz --out y", "not allowed"),
                              ("--out /proc/x.png", "/proc/tmp"), ("--solver euler", "no --solver"), ("--x", "--x"),
                              ("--steps 1", "1 sampling steps"), ("--eta 1.5", "expected 0 (DDIM)")):
            self.refused(reason, *self.words, wrong, main=sample.main)
        with mock.patch.dict(os.environ, {"WORLD_SIZE": "2"}):
            self.refused("without torchrun", *self.words, main=sample.main)
        drawn = [self.draw(*self.words, "--guidance 3 --cfg-channels", word)[1]["arr_0"] for word in ("3", "all")]
        self.assertTrue(np.array_equal(*drawn), "one channel is the first three and all")
        for model, objective, more in ((tiny_dit(), tf.GaussianDiffusion(), {}),
                                       (tiny_mar(), tf.MaskedAutoregression(16), {"head_steps": 5})):
            self.save(model, objective, **more)
            drawn = [self.draw(*self.words, "--num-images 6 --seed 3 --guidance 2 --batch-size", size)[1]["arr_0"]
                     for size in "641"]
            self.assertLessEqual(np.ptp(np.int32(drawn), axis=0).max(), 1, "a rounding may tip a pixel by one level")
            self.assertEqual((drawn[0].shape, drawn[0].std() > 1), ((6, 8, 8, 3), True))


class CommandLine(InFolder):
    """Older rules, whole runs, and mistakes."""

    def test_shortgpt_looks_at_direction_and_flux_lite_at_size(self):
        """Four blocks on two numbers: one that only scales, one that turns a little, a larger turn, and a last one."""
        model, examples = nn.Module(), [(torch.randn(5, 2, 1, 1), None)]
        model.blocks = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(4)])
        for block, angle, scale in zip(model.blocks, (0, 0.5, 1.0, 0), (5, 1, 1, 1)):
            c, s = math.cos(angle) * scale, math.sin(angle) * scale
            block.weight.data = torch.tensor([[c, -s], [s, c]])
        model.forward = lambda x, t, y: model.blocks(x.view(5, 1, 2)).view(5, 2, 1, 1)
        model.__deepcopy__ = lambda memo: model  # the scores are of these blocks
        for rule, kept in ((tf.shortgpt, [2, 3]), (tf.flux_lite, [0, 2])):   # block 3 stays; lengths 4, 2.5, 4.8, 0
            self.assertEqual(rule(model, [(2, 4)], tf.GaussianDiffusion(), examples), kept)

    def test_sensitivity_ranks_by_the_loss_without_each_block_and_random_choices_fit_the_groups(self):
        """And the oracle is the paper's for 28 blocks."""
        def loss(kept):                          # on all examples, of the model pruned to these blocks
            torch.manual_seed(0)
            t, student = diffusion.sample_t(len(x0), x0.device), tf.prune(model, kept).requires_grad_(False)
            return diffusion.training_losses(student, x0, t, y)["loss"].mean().item()
        model, diffusion, groups = tiny_dit(num_classes=10).to(DEVICE), tf.GaussianDiffusion(), [(1, 2)] * 2
        examples, again = (tf.fixed_examples(tf.toy_digits(size=8), 48, device=DEVICE) for _ in range(2))
        exactly(examples, again)                 # the same at every call
        (x0, y), = examples
        self.assertAlmostEqual(tf.calibration_loss(model, diffusion, examples), loss(range(4)), 5)
        losses = [loss([j for j in range(4) if j != i]) for i in range(4)]
        highest = sorted(range(4), key=lambda i: -losses[i])[:2]
        self.assertEqual(tf.sensitivity(model, groups, diffusion, examples), sorted(highest))
        choices = {tuple(tf.random_choice(model, groups)) for _ in range(60)}
        self.assertEqual(choices, {(0, 2), (0, 3), (1, 2), (1, 3)})
        kept = tf.oracle(mock.Mock(blocks=range(28)), [(2, 4)] * 7)
        self.assertEqual(kept, [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27])

    def test_one_command_tells_the_whole_story_and_the_next_one_reuses_it(self):
        """What it prints survives an ASCII terminal, and is flushed line by line."""
        run, reused = self.folder / "é", "is there and is used"
        files = {"settings.json", "teacher.pt", "layers.json", "student.pt", "results.json", "log.jsonl",
                 "decisions.png", "samples.png"}
        out, student = self.story(TINY, run), load(run / "student.pt")
        self.assertEqual({path.name for path in run.iterdir()}, files)
        for part in ("teacher |", "pruned ", "student |", "toy-FID", "speed-up", "guidance 1.5", "fewer than 5 batches",
                     "held-out images of 10 classes", "confidence 0."):
            self.assertIn(part, out)
        log = [json.loads(line)["stage"] for line in (run / "log.jsonl").read_text().splitlines()]
        self.assertEqual(log, ["teacher"] * 3 + ["learn"] * 3 + ["recover"] * 3)
        kept = [tf.read_json(run / name)["kept"] for name in ("layers.json", "results.json")]
        self.assertEqual((student["config"]["depth"], kept), (6, [student["kept"]] * 2))
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="ascii")) as terminal:
            self.assertEqual((tf.main(split(TINY, run)), terminal.line_buffering), (0, True))
        said = terminal.buffer.getvalue().decode("ascii")
        self.assertEqual((said.count(reused), r"\xe9" in said), (4, True))
        self.refused("seed 0 (now 1), recover_steps 3 (now 4)", TINY, run, "--seed 1 --recover-steps 4")
        for name, torn in (("results", "{"), ("results", "[]"), ("settings", "{"), ("settings", "[]"), ("layers", "{"),
                           *(("layers", '{"kept": %s}' % kept) for kept in ("null", '[1, "a"]', "[0, 99]"))):
            path, whole = run / f"{name}.json", (run / f"{name}.json").read_text()
            path.write_text(torn)
            self.refused(path.name, TINY, run, "--samples 12")
            path.write_text(whole)
        said = self.story(TINY, run, "--samples 12")         # which measures again, no more, and says what it replaces
        self.assertTrue(said.count(reused) == 3 and "samples 12" in said and "samples.png, of {'samples': 10" in said)
        (run / "recover-state.pt").write_bytes(b"of another student")
        (run / "layers.json").unlink()
        self.assertEqual(self.story(TINY, run).count(reused), 1, "what follows a removed file is done again")
        self.assertEqual({path.name for path in run.iterdir()}, files)
        exactly(student["ema"], load(run / "student.pt")["ema"])
        self.story("--labels 3,1 --out", self.folder / "grid.png", "--ckpt", run / "student.pt", main=sample.main)
        for path in (run / "decisions.png", run / "samples.png", self.folder / "grid.png"):
            self.assert_picture(path)
        self.refused("MAR-B", "--model MAR-B --ckpt", run / "student.pt", main=sample.main)

    def test_rules_and_named_blocks_take_the_place_of_learning_and_stages_can_be_run_one_by_one(self):
        """A table compares them: the same blocks recover alike. What diverges says what to do, and leaves no result."""
        def poisoned(*args, real=tf.data_batches):
            for number, (x, y) in enumerate(real(*args)):
                yield x * (math.nan if number == 2 else 1), y
        lab, pets, apart = self.folder / "lab", self.folder / "pets", "--kd none --groups 6"
        learned = lab / "no" / "groups"
        self.refused("teacher.pt", TINY, learned, apart, "--stages learn")
        self.assertFalse(learned.exists(), "a failed command leaves nothing behind")
        for stage in ("teacher", "learn", "recover"):
            with mock.patch.object(tf, "data_batches", poisoned):
                self.refused("another --out, lower learning rates", TINY, learned, apart, lines=None)
            self.assertFalse((learned / tf.RESULTS[stage]).exists())
            self.story(TINY, learned, apart, "--stages", stage)
        self.assert_picture(learned / "decisions.png")
        self.story(TINY, learned, apart, "--samples 12 --sample-steps 3")
        for name, criterion in (("oracle", "oracle"), ("named", "0,2,4,7,9,11")):
            self.story(TINY, lab / name, "--kd none --criterion", criterion)
        lines = [line.split("|")[1:-1] for line in self.story("--table", lab).splitlines() if line.startswith("|")]
        table = {row[0].strip(): [word.strip() for word in row[1:]] for row in lines}
        self.assertEqual(table["run"][-2:], ["samples", "sample_steps"], "guidance is the same in all")
        rows = tf.read_json(lab / "oracle" / "results.json")["rows"]
        losses = rows["pruned"]["loss"], rows["student"]["loss"], rows["student"]["fid"]
        self.assertEqual(table["oracle"][:4], ["0 2 4 7 9 11", *(f"{value:.4g}" for value in losses)])
        self.assertEqual(table["named"][:4], table["oracle"][:4])
        kept, *_, samples, steps = table["no/groups"]
        self.assertEqual((table["oracle"][-2:], len(kept.split()), samples, steps), (["10", "2"], 6, "12", "3"))
        self.refused("no results.json", "--table", lab / "nothing")
        (lab / "oracle" / "results.json").write_text('{"rows": 1, "kept": 1, "conditions": 1}')
        self.refused("oracle", "--table", lab)
        save_images(pets / "cat", 24, 20, 30)
        words = [TINY, self.folder / "run", "--criterion 0,1,2,3,11 --data", pets]
        out = self.story(*words)
        self.assertTrue("24 images, checksum" in out and "too few to trust it" in out and "accuracy" not in out, out)
        Image.new("RGB", (20, 30)).save(pets / "cat" / "00.png")             # the images are others now
        self.refused("checksum", *words)

    def test_without_its_appendices_and_modules_that_only_posix_has_the_file_still_works(self):
        source = Path(tf.__file__).read_text()
        start, end = re.search(r"^# Appendix A\.", source, re.M).start(), source.index('if __name__ == "__main__":')
        (self.folder / "tinyfusion.py").write_text(source[:start] + "\n" + source[end:])
        self.enterContext(mock.patch.object(sys, "path", [str(self.folder), *sys.path]))
        with mock.patch.dict(sys.modules, dict.fromkeys("fcntl grp posix_ipc pty pwd resource syslog termios".split())):
            del sys.modules["tinyfusion"], sys.modules["sample"]             # the patch restores them
            cut, _ = importlib.import_module("tinyfusion"), importlib.import_module("sample")
            cut.toy_digits, cut.train_judge = tf.toy_digits, tf.train_judge
            self.assertIn("student |", self.story(TINY, self.folder / "run", main=cut.main))
        self.assertFalse(hasattr(cut, "MAR"))
        main = source[:start].split("\nimport argparse\n")[1].splitlines()
        self.assertLess(sum(bool(re.search(r"\b(MAR|SiT)\b", line)) for line in main), 4, "asides about appendices")

    def test_bad_input_is_one_line_and_exit_status_2(self):
        run = self.folder / "run"
        for reason, *words in (
                ("expected a number", "--teacher-steps 0"), ("expected a number", "--guidance nan"),
                ("expected a number", "--seed 4294967296"), ("--samples", "--samples x"), ("--x", "--x"),
                ("to fill 12", "--groups 1:5"), ("part of it", "--stages teacher,recover"), ("with --ref", "--fid x"),
                ("choose from", "--model DiT-Q"), ("cuda:77", "--device cuda:77"), ("into 3 parts", "--accumulate 3"),
                ("Not a directory", "--out", Path(__file__, "x")), ("UTF-8", "--out", self.folder / "\udce9"),
                ("nothing", "--data", self.folder / "nothing"), ("lies in --data", "--data", self.folder),
                ("64 examples: fewer than 20 or than --batch-size 100", "--batch-size 100"),
                ("goes with --vae", "--encode x"), ("--samples", "--samples 3"), ("shortgpt", "--criterion 0,x"),
                ("expected 1 to 16", "--model MAR-toy --sample-steps 17"), ("patch", "--image-size 18"),
                ("one block of every", "--criterion oracle --groups 1:4"), ("ascending", "--criterion 3,2"),
                ("0 to 11", "--criterion 0,12"), ("with --inception", "--ref x")):
            self.refused(reason, TINY, run, *words)
        self.assertFalse((run / "teacher.pt").exists() or (run / "settings.json").exists())

    def test_an_official_checkpoint_of_latents_becomes_a_student_and_that_a_shallower_one(self):
        folder, model = self.folder, tf.DiT_models["toy"](input_size=4, in_channels=4, num_classes=10, depth=8)
        weights = lively(model, 0.05).state_dict()
        torch.save({"ema": weights, "args": argparse.Namespace(lr=1)}, folder / "official.pt")
        np.save(folder / "latents.npy", np.random.default_rng(0).normal(size=(40, 2, 4, 4, 4)).astype("f4"))
        np.save(folder / "labels.npy", np.arange(40) % 5)
        save_images(folder / "images", 12, 32, 32)
        torch.jit.script(StandIn()).save(folder / "net.pt")
        np.savez(folder / "mu.npz", mu=np.zeros(5), sigma=np.eye(5))
        data, ckpt = ["--data", folder], ["--ckpt", folder / "official.pt"]
        flags = [*data, "--vae toy --accumulate 2 --inception", folder / "net.pt", "--ref", folder / "images"]
        self.enterContext(mock.patch.object(tf, "VAE", ToyVAE))
        out = " ".join(self.story(TINY, folder / "d4", *flags, *ckpt).split())
        for part in ("| FID |", "| IS |", "sample_steps 2, guidance 1.5", "net.pt", "student | 4 |", "pruned | 4 |"):
            self.assertIn(part, out)
        pruned = tf.read_json(folder / "d4" / "results.json")["rows"]["pruned"]
        self.assertEqual(pruned.keys(), {"depth", "parameters", "loss"}, "it is not measured")
        self.assert_picture(folder / "d4" / "samples.png")
        exactly(weights, load(folder / "d4" / "teacher.pt")["ema"])          # which the official find_model reads
        self.story(TINY, folder / "d2", *flags, "--stages teacher,learn,recover --ckpt", folder / "d4" / "student.pt")
        self.assertEqual([load(folder / run / "student.pt")["config"]["depth"] for run in ("d4", "d2")], [4, 2])
        for reason, *words in (
                ("not a DiT-S/2", *flags, *ckpt, "--model DiT-S/2"), ("nothing", *flags, "--ref", folder / "nothing"),
                ("mu.npz", *flags, "--ref", folder / "mu.npz"), ("TorchScript", *flags, "--inception", ckpt[1]),
                ("takes (4, 4, 4)", *ckpt), ("--vae, --inception and --ref", *data)):
            self.refused(reason, TINY, folder / "x", *words)
        self.assertFalse((folder / "x" / "teacher.pt").exists(), "said before the work")

    def test_a_sit_and_a_mar_run_from_the_command_line_and_a_student_becomes_a_shallower_one(self):
        sit, mar, again = (self.folder / name for name in ("SiT-toy", "MAR-toy", "again"))
        for run, name, depth, *words in (
                (sit, "flow", 6, "--model SiT-toy"), (mar, "mar", 6, "--model MAR-toy"),
                (again, "mar", 3, "--stages teacher,learn,recover --ckpt", mar / "student.pt")):
            self.story(TINY, run, *words)
            content = load(run / "student.pt")
            depths = [size for key, size in content["config"].items() if "depth" in key]
            self.assertEqual((content["objective"], sum(depths)), (name, depth))
        self.assertEqual(content["sampling"]["head_steps"], 10)
        own, official, flags = sit / "student.pt", sit / "official.pt", "--num-images 9 --steps 3 --solver euler --ckpt"
        torch.save(load(own)["ema"], official)   # the layout of official SiT checkpoints
        drawn = [self.draw(*words)[1]["arr_0"] for words in ((flags, own), ("--model SiT-toy", flags, official))]
        self.assertLessEqual(np.ptp(np.int32(drawn), axis=0).max(), 1)
        self.refused("is a SiT-toy, not a toy", "--model toy --ckpt", own)
        flags = "--num-images 3 --steps 3 --head-steps 3 --temperature 0.9 --ckpt"
        self.assertEqual(self.draw(flags, mar / "student.pt")[1]["arr_0"].shape, (3, 16, 16, 3))


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
    program = unittest.main(exit=False, warnings="ignore")
    failed, skipped = len(program.result.failures) + len(program.result.errors), len(program.result.skipped)
    print(f"{program.result.testsRun - failed - skipped} passed, {failed} failed, {skipped} skipped")
    sys.exit(failed > 0)
