"""The claims of tinyfusion.py, tested. Every test's name is a sentence that is true of the method or the program.

python test_tinyfusion.py            all of them
python test_tinyfusion.py Heart      one chapter;  -v shows the sentences
python test_tinyfusion.py --bench    no tests: how fast it is, against the plain versions that the tests compare with
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import sample
import tinyfusion as tf

HERE = Path(__file__).resolve().parent


def tiny_dit(depth=4, **more):
    """A DiT that a test can afford, with weights that do something (the official start is the zero function)."""
    torch.manual_seed(0)
    model = tf.DiT(
        **{
            "input_size": 8,
            "patch_size": 4,
            "in_channels": 1,
            "hidden_size": 16,
            "depth": depth,
            "num_heads": 2,
            "num_classes": 3,
            **more,
        }
    )
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return model.eval()


def tiny_mar(**more):
    """A MAR that a test can afford: 2 + 2 blocks, 16 tokens of 4 numbers, weights that do something."""
    torch.manual_seed(0)
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "num_heads": 2, "num_classes": 3}
    head = {"encoder_depth": 2, "decoder_depth": 2, "buffer_size": 3, "diffloss_w": 12, "diffloss_d": 2, "dropout": 0.0}
    model = tf.MAR(**sizes | head | more)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


def dense_forward(blocks, x, mask, *args):
    """The definition, x <- m * block(x) + (1 - m) * x, word for word: the oracle of `masked_forward`."""
    for i, block in enumerate(blocks):
        m = mask[:, i].view(-1, *[1] * (x.dim() - 1))
        x = m * block(x, *args) + (1 - m) * x
    return x


class StandIn(nn.Module):
    """Called like the Inception network of FID, in TorchScript: eight features, and three classes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features, self.classes = nn.Linear(27, 8), nn.Linear(8, 3)

    def forward(
        self, x: torch.Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ):
        x = self.features(F.adaptive_avg_pool2d(x.to(torch.float32) / 255, (3, 3)).flatten(1))
        return x if return_features else self.classes(x).softmax(1)


class ToyVAE:
    """In the place of tf.VAE: latents (B, 4, h / 8, w / 8) from a pixel of every 8x8 patch; decoding spreads it."""

    def __init__(self, name="", device="cpu"):
        self.device = device

    def encode(self, images, noise):
        small = tf.to_float(images)[:, :, ::8, ::8]
        return torch.cat([small, small[:, :1]], 1) + 0.01 * noise

    def decode(self, latents):
        return tf.to_uint8(latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)).cpu()


def fixed_gradients(accumulate=1, steps=3):
    """The gradients of LoRA and logits in some steps on fixed batches of 8, with fixed random numbers, of which every
    process and part of a batch takes its rows; and all that was trained, from every process."""
    model = tiny_dit()
    teacher, diffusion, sampler = copy.deepcopy(model), tf.GaussianDiffusion(), tf.LayerSampler([(1, 2), (1, 2)])
    added = tf.add_lora(model.requires_grad_(), rank=2)
    for p in added:
        nn.init.normal_(p, std=0.1)
    weights, found, calls = [*added, *sampler.parameters()], [], []

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
        found.append([p.grad.clone() for p in weights] + [torch.tensor(metrics["loss"])])

    if tf.rank() > 0:
        with torch.no_grad():
            for p in weights:
                p.add_(1.0)  # the first process's weights must win
    tf.train(model, loss_fn, steps, params=weights, lr=1e-3, accumulate=accumulate, find_unused=True, on_step=on_step)
    return found, tf.gather([p.detach() for p in weights])


def torchrun(processes, *command, **more):
    """Run a script in so many processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.run([*launcher, *command], capture_output=True, text=True, env=environment, timeout=300, **more)


class Heart(unittest.TestCase):
    """Chapters 3 and 4: the layer sampler, the masked forward pass, LoRA, learning, pruning."""

    def test_candidates_are_all_ways_to_keep_n_of_m(self):
        masks = tf.nm_masks(2, 4)
        self.assertEqual(masks.shape, (6, 4))
        self.assertEqual(len({tuple(row.tolist()) for row in masks}), 6)
        self.assertTrue((masks.sum(1) == 2).all())

    def test_a_drawn_mask_is_exactly_zero_or_one_with_n_ones_per_group(self):
        sampler = tf.LayerSampler([(1, 2), (2, 4), (3, 4)])
        with torch.no_grad():
            for logits in sampler.logits:
                logits.normal_(std=0.01)
        for tau in (4.0, 0.1):
            mask = sampler(500, tau=tau, scale=100)
            self.assertTrue(mask.requires_grad)
            self.assertTrue(torch.equal(mask, mask.round()) and mask.min() == 0 and mask.max() == 1)
            for part, n in zip(mask.split([2, 4, 4], dim=1), (1, 2, 3)):
                self.assertTrue((part.sum(1) == n).all())

    def test_masks_are_drawn_with_the_probabilities_of_the_softmax_whatever_tau(self):
        torch.manual_seed(0)
        sampler = tf.LayerSampler([(2, 4)])
        sampler.logits[0].data = torch.tensor([0.0, 0.01, 0.02, -0.01, 0.005, 0.0])
        p = torch.softmax(sampler.logits[0] * 100, 0)
        n = 20_000
        for tau in (4.0, 0.1):
            mask = sampler(n, tau=tau, scale=100.0)
            count = (mask[:, None] == tf.nm_masks(2, 4)).all(2).sum(0)
            chi2 = ((count - n * p) ** 2 / (n * p)).sum().item()
            self.assertLess(chi2, 25.7)  # 5 degrees of freedom, one false alarm in 10,000
            torch.testing.assert_close(mask.mean(0), sampler.keep_probability(100.0), atol=0.02, rtol=0)

    def test_kept_and_confidence_follow_the_likeliest_candidate(self):
        sampler = tf.LayerSampler([(1, 2), (2, 3)])
        sampler.logits[0].data = torch.tensor([0.0, 0.03])  # candidates 10, 01
        sampler.logits[1].data = torch.tensor([0.0, 0.05, 0.0])  # candidates 110, 101, 011
        self.assertEqual(sampler.kept(), [1, 2, 4])
        e3, e5 = math.exp(3), math.exp(5)
        torch.testing.assert_close(sampler.confidence(), torch.tensor([e3 / (1 + e3), e5 / (2 + e5)]))

    def test_the_masked_forward_has_the_values_and_gradients_of_the_dense_formula(self):
        torch.manual_seed(1)
        blocks = nn.ModuleList([tf.DiTBlock(8, 2) for _ in range(5)]).double()
        for block in blocks:
            nn.init.normal_(block.adaLN_modulation[1].weight, std=0.3)
        mask = torch.randint(0, 2, (6, 5)).double()
        mask[0], mask[1], mask[:, 2] = 1, 0, 0  # all kept; all dropped; a block nobody keeps
        x, c = torch.randn(6, 4, 8).double(), torch.randn(6, 8).double()
        results = []
        for forward in (
            lambda x, c, m: tf.masked_forward(blocks, x, c, mask=m)[0],
            lambda x, c, m: dense_forward(blocks, x, m, c),
        ):
            inputs = [a.clone().requires_grad_() for a in (x, c, mask)]
            out = forward(*inputs)
            gradients = torch.autograd.grad(
                out.sin().sum(), inputs + list(blocks.parameters()), allow_unused=True, materialize_grads=True
            )
            results.append([out, *gradients])
        for ours, dense in zip(*results):
            torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)

    def test_a_mask_an_ulp_away_from_zero_and_one_counts_as_zero_and_one(self):
        blocks = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(3)]
        x, mask = torch.randn(5, 3), torch.randint(0, 2, (5, 3)).float()
        exact, _ = tf.masked_forward(blocks, x, mask=mask)
        for near in (mask - 6e-8, mask + 1e-7, mask.bool()):
            self.assertTrue(torch.equal(tf.masked_forward(blocks, x, mask=near)[0], exact))

    def test_dropped_examples_run_without_a_graph_and_only_while_a_mask_is_learned(self):
        block, rows = nn.Linear(3, 3), []
        block.register_forward_hook(lambda module, args, out: rows.append((len(out), out.requires_grad)))
        mask = torch.tensor([[1.0], [0], [1], [0], [0]])
        tf.masked_forward([block], torch.randn(5, 3), mask=mask)
        self.assertEqual(rows, [(2, True)])
        rows.clear()
        tf.masked_forward([block], torch.randn(5, 3), mask=mask.requires_grad_())
        self.assertEqual(rows, [(2, True), (3, False)])

    def test_a_share_of_the_dropped_examples_gives_the_masks_gradient_on_average(self):
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double() for _ in range(2)]
        x, mask = torch.randn(8, 3).double(), torch.tensor([[0.0, 1]] * 5 + [[1.0, 0]] * 3).double().requires_grad_()

        def gradient(share):
            out, _ = tf.masked_forward(blocks, x, mask=mask, dropped_share=share)
            return torch.autograd.grad(out.square().sum(), mask)[0]

        exact, draws = gradient(1.0), torch.stack([gradient(0.4) for _ in range(2000)])
        self.assertTrue(((draws == 0).double().mean((0,)) > 0.5)[mask == 0].all())
        error = draws.std(0) / math.sqrt(2000)
        self.assertTrue(((draws.mean(0) - exact).abs() <= 5 * error + 1e-12).all())

    def test_the_gradient_of_the_logits_is_the_softmax_jacobian_of_the_masks_gradient(self):
        torch.manual_seed(2)
        sampler, blocks = tf.LayerSampler([(1, 2), (2, 3)]).double(), [
            nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double() for _ in range(5)
        ]
        for logits in sampler.logits:
            nn.init.normal_(logits, std=0.01)
        x, tau, scale = torch.randn(7, 3).double(), 0.7, 100.0
        state = torch.get_rng_state()
        mask = sampler(7, tau, scale)
        mask.retain_grad()
        tf.masked_forward(blocks, x, mask=mask)[0].square().sum().backward()
        torch.set_rng_state(state)
        start = 0
        for logits, candidates in zip(sampler.logits, sampler.candidates):
            soft = F.gumbel_softmax((logits.detach() * scale).expand(7, -1), tau=tau)
            v = mask.grad[:, start : start + candidates.shape[1]] @ candidates.T.double()  # dL/dy (B, C(M, N))
            expected = scale / tau * (soft * (v - (soft * v).sum(1, keepdim=True))).sum(0)
            torch.testing.assert_close(logits.grad, expected)
            start += candidates.shape[1]

    def test_the_masked_forward_works_on_any_residual_blocks(self):
        layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 3).eval().layers
        x = torch.randn(2, 5, 8)
        out, features = tf.masked_forward(layers, x, mask=torch.tensor([[1.0, 0, 1], [0, 0, 0]]), hidden=(0, 2))
        torch.testing.assert_close(out[:1], layers[2](layers[0](x[:1])))
        torch.testing.assert_close(out[1], x[1])
        self.assertEqual(len(features), 2)
        with self.assertRaisesRegex(ValueError, "expected"):
            tf.masked_forward(layers, x, mask=torch.ones(2, 4))

    def test_groups_that_fit_are_parsed_and_others_refused_with_the_reason(self):
        self.assertEqual(tf.parse_groups("1:2", 6), [(1, 2)] * 3)
        self.assertEqual(tf.parse_groups("2:4,1:2", 6), [(2, 4), (1, 2)])
        self.assertEqual(tf.parse_groups("7:14", 28), [(7, 14)] * 2)
        for pattern, reason in (
            ("2:4,3:4", "cover 8 blocks of a depth of 12"),
            ("1:5", "do not divide"),
            ("3:2", "expected"),
            ("0:2", "expected"),
            ("9000:18000", "do not divide"),
            ("1:0", "do not divide"),
            ("1-2", "not a list"),
            ("", "not a list"),
            ("1:2:3", "not a list"),
            ("14:28", "candidates"),
        ):
            with self.assertRaisesRegex(ValueError, reason):
                tf.parse_groups(pattern, 28 if pattern == "14:28" else 12)

    def test_lora_starts_as_the_identity_and_trains_nothing_else(self):
        model = tiny_dit()
        x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 3])
        before, weights = model(x, t, y), sum(isinstance(m, nn.Linear) for m in model.modules())
        added = tf.add_lora(model, rank=2, alpha=4)
        self.assertTrue(torch.equal(before, model(x, t, y)))
        self.assertEqual(len(added), 2 * weights)
        self.assertEqual(tf.add_lora(model), [], "LoRA does not wrap itself")
        for p in added:
            p.requires_grad_(True)
        self.assertEqual({id(p) for p in model.parameters() if p.requires_grad}, {id(p) for p in added})

    def test_a_lora_layer_is_w_plus_alpha_over_r_b_a(self):
        layer = tf.LoRALinear(nn.Linear(5, 3), rank=2, alpha=6)
        nn.init.normal_(layer.lora_B)
        x, W = torch.randn(4, 5), layer.base.weight + 3 * layer.lora_B @ layer.lora_A
        torch.testing.assert_close(layer(x), F.linear(x, W, layer.base.bias))

    def test_lora_reaches_modules_that_read_a_linear_layers_weight(self):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        x, added = torch.randn(2, 5, 8), tf.add_lora(layer, rank=2)
        self.assertEqual(len(added), 6)  # out_proj of the attention, linear1, linear2
        for p in added:
            nn.init.normal_(p, std=0.1)
        trained = layer(x)
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x), trained, rtol=1e-5, atol=1e-5)
        trained.square().sum().backward()
        self.assertTrue(all(p.grad.abs().sum() > 0 for p in added))

    def test_the_masked_forward_keeps_the_type_of_its_input_and_refuses_what_is_not_per_example(self):
        block = tf.DiTBlock(8, 2).bfloat16()
        x, c = torch.randn(3, 4, 8).bfloat16(), torch.randn(3, 8).bfloat16()
        mask = tf.LayerSampler([(1, 2)])(3)
        out, _ = tf.masked_forward([block, block], x, c, mask=mask)
        self.assertEqual(out.dtype, torch.bfloat16)
        for wrong in ({"args": (c[:2],)}, {"args": (c,), "dropped_share": 0}, {"args": (c,), "dropped_share": 2}):
            with self.assertRaisesRegex(ValueError, "expected tensors"):
                tf.masked_forward([block, block], x, *wrong.pop("args"), mask=mask, **wrong)

    def test_lora_of_rank_8_trains_under_one_percent_of_dit_xl(self):
        with torch.device("meta"):
            model = tf.DiT_models["DiT-XL/2"]()
            share = sum(p.numel() for p in tf.add_lora(model)) / 675_129_632
        self.assertTrue(0.0085 < share < 0.0095, share)

    def test_planted_useless_blocks_are_found_and_the_weights_left_alone(self):
        class Planted(nn.Module):
            """Six blocks: 1, 2 and 4 do the work, the others add junk; the pattern differs from group to group."""

            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(6)])
                for i, block in enumerate(self.blocks):
                    block.weight.data = (
                        2 * torch.eye(4) if i in (1, 2, 4) else torch.eye(4) + 0.7 * torch.randn(4, 4)
                    ).contiguous()

        for update in ("lora", "full", "frozen"):
            torch.manual_seed(3)
            model = Planted()
            before = copy.deepcopy(model.state_dict())

            def loss_fn(m, sample_mask):
                x = torch.randn(32, 4)
                return F.mse_loss(tf.masked_forward(m.blocks, x, mask=sample_mask(32))[0], 8 * x)

            sampler, history = tf.learn_layers(
                model, loss_fn, [(1, 2), (1, 2), (1, 2)], 60, update=update, rank=1, lr=1e-3, logits_lr=5e-3
            )
            self.assertEqual(sampler.kept(), [1, 2, 4], update)
            self.assertGreater(sampler.confidence().min(), 0.9)
            self.assertEqual([history[0][0], history[-1][0]], [0, 60])
            for name, weight in model.state_dict().items():
                self.assertTrue(torch.equal(weight, before[name]), f"{update} changed {name}")
            self.assertTrue(all(p.requires_grad for p in model.parameters()))

    def test_the_pruned_model_computes_what_the_mask_computed(self):
        model, kept = tiny_dit(), [0, 3]
        x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 3])
        pruned = tf.prune(model, kept)
        torch.testing.assert_close(pruned(x, t, y), model(x, t, y, mask=torch.tensor([[1.0, 0, 0, 1]] * 2)))
        self.assertEqual((pruned.config()["depth"], len(model.blocks)), (2, 4))
        with torch.no_grad():
            pruned.blocks[0].attn.qkv.weight.zero_()
            pruned.x_embedder.proj.weight.zero_()
        self.assertGreater(model.blocks[0].attn.qkv.weight.abs().sum() * model.x_embedder.proj.weight.abs().sum(), 0)
        for bad in ([], [0, 4], [2, 1], [1, 1], [-1, 2]):
            with self.assertRaisesRegex(ValueError, "expected"):
                tf.prune(model, bad)

    def test_the_readmes_own_model_becomes_a_working_shallower_one(self):
        lines = (HERE / "README.md").read_text().split("## Your own model")[1].split("A test runs these lines")[0]
        code = [line[4:] for line in lines.splitlines() if line.startswith("    ")]
        self.assertLessEqual(len(code), 20)
        torch.manual_seed(0)
        exec("\n".join(code), names := {})
        teacher, student = names["teacher"].eval(), names["student"].eval()
        x = torch.randint(10, (500, 8))
        with torch.no_grad():
            right = [(m(x).argmax(2) == x.sort().values).double().mean().item() for m in (teacher, student)]
            kept = names["sampler"].kept()
            pruned = tf.prune(names["teacher"], kept, lists=["encoder.layers"])
            before = (pruned(x).argmax(2) == x.sort().values).double().mean().item()
        self.assertEqual((len(teacher.encoder.layers), len(student.encoder.layers)), (6, 3))
        self.assertGreater(min(right), 0.9, right)
        self.assertGreater(right[1], before)

    def test_blocks_in_several_lists_are_pruned_together(self):
        model = nn.ModuleDict({name: nn.ModuleList([nn.Linear(2, 2) for _ in range(3)]) for name in "ab"})
        pruned = tf.prune(model, [0, 2, 4], lists=("a", "b"))
        self.assertEqual((len(pruned["a"]), len(pruned["b"]), len(model["a"])), (2, 1, 3))
        self.assertTrue(torch.equal(pruned["b"][0].weight, model["b"][1].weight))


class Recovery(unittest.TestCase):
    """Chapter 5: masked knowledge distillation."""

    def test_the_masked_loss_ignores_outliers_of_either_model_and_so_does_its_gradient(self):
        torch.manual_seed(0)
        teacher, student = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
        teacher, student = teacher.clamp(-1.5, 1.5), student.clamp(-1.5, 1.5)
        teacher[0, 1, 2], student[1, 3, 4] = 50.0, -60.0
        student.requires_grad_()
        loss = tf.masked_feature_loss(student, teacher, k=2.5)
        loss.backward()
        left = torch.ones(2, 6, 8, dtype=torch.bool)
        left[0, 1, 2] = left[1, 3, 4] = False
        torch.testing.assert_close(loss, (student - teacher)[left].square().mean())
        self.assertEqual((student.grad[0, 1, 2].item(), student.grad[1, 3, 4].item()), (0.0, 0.0))

    def test_hidden_states_of_different_shapes_are_refused(self):
        for shape in ((1, 3, 4), (2, 3)):
            with self.assertRaisesRegex(ValueError, "expected the same"):
                tf.masked_feature_loss(torch.randn(shape), torch.randn(2, 3, 4))

    def test_without_a_mask_it_is_the_mean_squared_error(self):
        student, teacher = torch.randn(2, 3, 4), 100 * torch.randn(2, 3, 4)
        torch.testing.assert_close(tf.masked_feature_loss(student, teacher, math.inf), F.mse_loss(student, teacher))
        self.assertEqual(tf.masked_feature_loss(torch.ones(1, 2, 2), torch.ones(1, 2, 2), math.inf).item(), 0)

    def test_the_last_kept_block_of_a_group_is_matched_with_the_groups_last(self):
        self.assertEqual(tf.match_blocks([(1, 2)] * 3, [0, 3, 4]), [(0, 1), (1, 3), (2, 5)])
        self.assertEqual(tf.match_blocks([(2, 4), (3, 4)], [0, 2, 4, 5, 6]), [(1, 3), (4, 7)])
        self.assertEqual(tf.match_blocks([(1, 2)] * 3, [0, 1, 4]), [(1, 1), (2, 5)])  # a group that keeps none: no pair

    def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(self):
        model, diffusion = tiny_dit(), tf.GaussianDiffusion()
        _, parts = tf.recovery_loss(
            model, model, diffusion, torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long), [(1, 1), (3, 3)]
        )
        self.assertEqual((parts["kd"].item(), parts["features"].item()), (0, 0))
        self.assertGreater(parts["denoising"].item(), 0)

    def test_the_loss_is_the_papers_mixture(self):
        teacher, diffusion = tiny_dit(), tf.GaussianDiffusion()
        student, x0, y = tf.prune(teacher, [0, 3]), torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        for kd in tf.KD_MODES:
            torch.manual_seed(5)
            loss, parts = tf.recovery_loss(student, teacher, diffusion, x0, y, [(0, 1), (1, 3)], kd, beta=0.3)
            expected = (
                parts["denoising"]
                if kd == "none"
                else 0.9 * parts["kd"] + 0.1 * parts["denoising"] + 0.3 * parts.get("features", 0)
            )
            torch.testing.assert_close(loss, expected)
            self.assertEqual("features" in parts, kd in ("masked", "feature"))

    def test_both_models_see_the_same_labels_some_of_them_dropped(self):
        teacher, seen = tiny_dit(class_dropout_prob=0.5), []
        student = tf.prune(teacher, [0, 3])
        for model in (teacher, student):
            model.register_forward_pre_hook(lambda module, args: seen.append(args[2].clone()))
        batches = iter([(torch.randn(64, 1, 8, 8), torch.ones(64, dtype=torch.long))] * 2)
        tf.recover(student, teacher, tf.GaussianDiffusion(), batches, [(0, 1), (1, 3)], 2)
        for ours, theirs in zip(seen[::2], seen[1::2]):
            self.assertTrue(torch.equal(ours, theirs))
            self.assertTrue(10 < (ours == 3).sum() < 54)

    def test_no_pair_of_blocks_lies_in_an_encoder_and_a_decoder(self):
        self.assertEqual(tf.match_blocks([(1, 2)] * 3, [0, 2, 5], cuts=(3,)), [(0, 1), (1, 2), (2, 5)])
        self.assertEqual(tf.match_blocks([(1, 2)] * 3, [0, 3, 5], cuts=(3,)), [(0, 1), (1, 3), (2, 5)])

    def test_recovery_brings_the_student_closer_to_its_teacher_in_every_mode(self):
        teacher, diffusion = tiny_dit(), tf.GaussianDiffusion()
        before = [p.clone() for p in teacher.parameters()]
        x, t, y = torch.randn(64, 1, 8, 8), torch.randint(0, 1000, (64,)), torch.randint(0, 3, (64,))

        def distance(model):
            with torch.no_grad():
                return F.mse_loss(model(x, t, y)[:, :1], teacher(x, t, y)[:, :1]).item()

        def batches():
            while True:
                yield torch.randn(32, 1, 8, 8), torch.randint(0, 3, (32,))

        for kd in ("masked", "feature", "logits"):
            torch.manual_seed(0)
            pruned = tf.prune(teacher, [0, 3])
            student = tf.recover(
                copy.deepcopy(pruned),
                teacher,
                diffusion,
                batches(),
                [(0, 1), (1, 3)],
                40,
                kd=kd,
                lr=1e-2,
                ema_decay=0.9,
            )
            self.assertLess(distance(student), 0.7 * distance(pruned), kd)
        self.assertTrue(all(torch.equal(a, b) for a, b in zip(before, teacher.parameters())))
        with self.assertRaisesRegex(ValueError, "expected one of"):
            tf.recover(pruned, teacher, diffusion, batches(), [(0, 1)], 1, kd="other")


class Model(unittest.TestCase):
    """Chapter 1: DiT."""

    def test_presets_have_the_official_sizes_names_and_shapes(self):
        sizes = {
            "DiT-XL/2": 675_129_632,
            "DiT-L/2": 458_102_816,
            "DiT-B/2": 130_512_416,
            "DiT-S/2": 32_963_360,
            "DiT-D19/2": 459_983_264,
            "DiT-D14/2": 340_457_504,
            "DiT-D7/2": 173_121_440,
        }
        for name, size in sizes.items():
            with torch.device("meta"):
                model = tf.DiT_models[name]()
            self.assertEqual(sum(p.numel() for p in model.parameters()), size, name)
            if name == "DiT-XL/2":
                shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        block = {
            "attn.qkv.weight": (3456, 1152),
            "attn.qkv.bias": (3456,),
            "attn.proj.weight": (1152, 1152),
            "attn.proj.bias": (1152,),
            "mlp.fc1.weight": (4608, 1152),
            "mlp.fc1.bias": (4608,),
            "mlp.fc2.weight": (1152, 4608),
            "mlp.fc2.bias": (1152,),
            "adaLN_modulation.1.weight": (6912, 1152),
            "adaLN_modulation.1.bias": (6912,),
        }
        expected = {f"blocks.{i}.{key}": shape for i in range(28) for key, shape in block.items()} | {
            "pos_embed": (1, 256, 1152),
            "x_embedder.proj.weight": (1152, 4, 2, 2),
            "x_embedder.proj.bias": (1152,),
            "t_embedder.mlp.0.weight": (1152, 256),
            "t_embedder.mlp.0.bias": (1152,),
            "t_embedder.mlp.2.weight": (1152, 1152),
            "t_embedder.mlp.2.bias": (1152,),
            "y_embedder.embedding_table.weight": (1001, 1152),
            "final_layer.linear.weight": (32, 1152),
            "final_layer.linear.bias": (32,),
            "final_layer.adaLN_modulation.1.weight": (2304, 1152),
            "final_layer.adaLN_modulation.1.bias": (2304,),
        }
        self.assertEqual(shapes, expected)

    def test_a_new_model_is_zero_and_its_blocks_the_identity(self):
        model = tf.DiT(8, 4, 1, 16, 2, 2, num_classes=3)
        x, c = torch.randn(2, 4, 16), torch.randn(2, 16)
        self.assertEqual(model(torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])).abs().max(), 0)
        self.assertTrue(torch.equal(model.blocks[0](x, c), x))

    def test_the_forward_pass_is_the_published_one(self):
        """An independent float64 version from the paper's equations, tensor by tensor, without modules."""
        model = tiny_dit(depth=2, in_channels=2, hidden_size=16).double()
        w, x = model.state_dict(), torch.randn(3, 2, 8, 8).double()
        t, y, D, heads, P = torch.tensor([0, 17, 999]), torch.tensor([0, 2, 3]), 16, 2, 4

        def linear(h, name):
            return torch.einsum("...i,oi->...o", h, w[name + ".weight"]) + w[name + ".bias"]

        def norm(h):
            return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

        def silu(h):
            return h / (1 + torch.exp(-h))

        patches = torch.stack([x[:, :, i : i + P, j : j + P] for i in (0, 4) for j in (0, 4)], 1)  # (B, T, C, P, P)
        h = torch.einsum("btcpq,dcpq->btd", patches, w["x_embedder.proj.weight"]) + w["x_embedder.proj.bias"]
        position = torch.zeros(4, D).double()
        for token in range(4):
            for half, place in ((0, token % 2), (8, token // 2)):  # column first, then row
                for k in range(4):
                    angle = place / 10000 ** (k / 4)
                    position[token, half + k], position[token, half + 4 + k] = math.sin(angle), math.cos(angle)
        h = h + position
        angles = t[:, None] * torch.tensor([10000 ** (-k / 128) for k in range(128)], dtype=torch.float64)
        c = linear(silu(linear(torch.cat([angles.cos(), angles.sin()], 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
        c = c + w["y_embedder.embedding_table.weight"][y]
        for i in range(2):
            s1, k1, g1, s2, k2, g2 = linear(silu(c), f"blocks.{i}.adaLN_modulation.1")[:, None].split(D, -1)
            qkv = linear(norm(h) * (1 + k1) + s1, f"blocks.{i}.attn.qkv").view(3, 4, 3, heads, D // heads)
            q, k, v = qkv.unbind(2)
            p = (torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D // heads)).softmax(-1)
            h = h + g1 * linear(torch.einsum("bhts,bshd->bthd", p, v).reshape(3, 4, D), f"blocks.{i}.attn.proj")
            u = linear(norm(h) * (1 + k2) + s2, f"blocks.{i}.mlp.fc1")
            u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
            h = h + g2 * linear(u, f"blocks.{i}.mlp.fc2")
        shift, scale = linear(silu(c), "final_layer.adaLN_modulation.1")[:, None].split(D, -1)
        h = linear(norm(h) * (1 + scale) + shift, "final_layer.linear").view(3, 2, 2, P, P, 4)
        expected = torch.zeros(3, 4, 8, 8).double()
        for row in range(2):
            for column in range(2):
                expected[:, :, row * P : row * P + P, column * P : column * P + P] = h[:, row, column].permute(
                    0, 3, 1, 2
                )
        # the timestep's frequencies are float32 in the official code and in ours
        model.t_embedder.float()
        with torch.no_grad():
            embedded = model.t_embedder(t).double()
            model.t_embedder.forward = lambda t: embedded
            torch.testing.assert_close(model(x, t, y), expected, rtol=1e-4, atol=1e-4)

    def test_hidden_states_come_out_of_the_same_forward(self):
        model = tiny_dit()
        x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3]), torch.tensor([0, 3])
        out, features = model(x, t, y, hidden=(1, 3))
        self.assertTrue(torch.equal(out, model(x, t, y)))
        self.assertEqual([f.shape for f in features], [(2, 4, 16)] * 2)
        self.assertTrue(torch.equal(features[0], model(x, t, y, hidden=(1,))[1][0]))

    def test_guidance_moves_the_first_three_channels_or_all_but_never_the_variance(self):
        x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([500]), torch.tensor([0, 1, 3, 3])
        for C, channels, guided in ((4, 3, 3), (4, None, 4), (1, 3, 1), (1, None, 1)):
            model = tiny_dit(in_channels=C)
            both = torch.cat([x[:, :C], torch.full_like(x[:, :C], 7.0)])  # the second half is not read
            out = model.forward_with_cfg(both, t, y, 4.0, cfg_channels=channels)
            cond, null = model(x[:, :C], t, y[:2]), model(x[:, :C], t, y[2:])
            torch.testing.assert_close(out[:2, :guided], (null + 4 * (cond - null))[:, :guided])
            torch.testing.assert_close(out[:2, guided:], cond[:, guided:])
            torch.testing.assert_close(out[2:, C:], null[:, C:])

    def test_training_drops_labels_and_evaluation_does_not(self):
        embedder, labels = tf.LabelEmbedder(5, 4, 0.5), torch.ones(1000, dtype=torch.long)
        null = embedder.embedding_table.weight[5]
        share = (embedder(labels) == null).all(1).float().mean()
        self.assertTrue(0.4 < share < 0.6)
        self.assertFalse((embedder.eval()(labels) == null).all(1).any())

    def test_sizes_that_do_not_divide_are_refused(self):
        for sizes in ({"input_size": 9}, {"num_heads": 3}):
            with self.assertRaisesRegex(ValueError, "multiple"):
                tiny_dit(**sizes)


class Diffusion(unittest.TestCase):
    """Chapter 2: closed forms."""

    def setUp(self):
        torch.manual_seed(0)
        self.d = tf.GaussianDiffusion()
        self.x0 = torch.rand(5, 2, 4, 4) * 2 - 1
        self.t, self.noise = torch.tensor([0, 1, 250, 700, 999]), torch.randn(5, 2, 4, 4)
        betas = np.linspace(1e-4, 2e-2, 1000)
        self.beta, self.abar = betas, np.cumprod(1 - betas)

    def test_noisy_images_have_the_schedules_mean_and_variance(self):
        x_t = self.d.q_sample(self.x0, self.t, self.noise)
        a = torch.tensor(self.abar[self.t]).float().view(-1, 1, 1, 1)
        torch.testing.assert_close(x_t, a.sqrt() * self.x0 + (1 - a).sqrt() * self.noise)

    def test_a_perfect_model_has_the_posterior_of_bayes_rule(self):
        """q(x_{t-1} | x_t, x0) from the product of two Gaussians; v = -1 and 1 are its variance and beta."""
        x_t = self.d.q_sample(self.x0, self.t, self.noise)
        for (v,) in ((-1.0,), (1.0,), (0.3,)):
            p = self.d.p_mean_variance(torch.cat([self.noise, torch.full_like(self.noise, v)], 1), x_t, self.t)
            for i, t in enumerate(self.t.tolist()):
                if t == 0:
                    continue
                precision = (1 - self.beta[t]) / self.beta[t] + 1 / (1 - self.abar[t - 1])
                mean = (
                    math.sqrt(1 - self.beta[t]) / self.beta[t] * x_t[i]
                    + math.sqrt(self.abar[t - 1]) / (1 - self.abar[t - 1]) * self.x0[i]
                ) / precision
                torch.testing.assert_close(p["mean"][i], mean, rtol=1e-4, atol=2e-4)
                variance = math.exp((1 - v) / 2 * math.log(1 / precision) + (1 + v) / 2 * math.log(self.beta[t]))
                torch.testing.assert_close(
                    p["variance"][i], torch.full_like(p["variance"][i], variance), rtol=1e-4, atol=0
                )
            torch.testing.assert_close(p["pred_xstart"][:4], self.x0[:4], rtol=1e-3, atol=1e-3)

    def test_losses_are_the_mean_squared_error_and_the_kl_in_bits(self):
        eps, v = torch.randn_like(self.noise), torch.rand_like(self.noise) * 2 - 1
        losses = self.d.training_losses(lambda x, t, y: torch.cat([eps, v], 1), self.x0, self.t, None, self.noise)
        torch.testing.assert_close(losses["mse"], ((eps - self.noise) ** 2).mean((1, 2, 3)))
        x_t = self.d.q_sample(self.x0, self.t, self.noise)
        p = self.d.p_mean_variance(torch.cat([eps, v], 1), x_t, self.t)
        true = self.d.p_mean_variance(torch.cat([self.noise, -torch.ones_like(v)], 1), x_t, self.t)
        kl = torch.distributions.kl_divergence(
            torch.distributions.Normal(true["mean"], true["variance"].sqrt()),
            torch.distributions.Normal(p["mean"], p["variance"].sqrt()),
        )
        torch.testing.assert_close(losses["vb"][1:], kl.mean((1, 2, 3))[1:] / math.log(2), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(losses["loss"], losses["mse"] + losses["vb"])

    def test_the_last_step_is_the_likelihood_of_a_pixel(self):
        levels = torch.arange(256) / 127.5 - 1
        for mean, std in ((0.1, 0.05), (-0.99, 0.02), (0.4, 0.5)):
            log_p = tf.discretized_gaussian_log_likelihood(levels, torch.tensor(mean), torch.tensor(2 * math.log(std)))
            self.assertAlmostEqual(log_p.double().exp().sum().item(), 1, places=4)  # 256 bins share the mass
            normal = torch.distributions.Normal(mean, std)
            exact = normal.cdf(levels + 1 / 255) - normal.cdf(levels - 1 / 255)
            torch.testing.assert_close(log_p.exp()[1:-1], exact[1:-1], atol=5e-4, rtol=0)

    def test_the_variational_bound_trains_the_variance_alone(self):
        out = torch.randn(5, 4, 4, 4, requires_grad=True)
        self.d.training_losses(lambda x, t, y: out, self.x0, self.t, None)["vb"].sum().backward()
        self.assertEqual(out.grad[:, :2].abs().max(), 0)
        self.assertGreater(out.grad[:, 2:].abs().min(), 0)

    def test_distillation_compares_noise_and_variance(self):
        a, x_t = torch.randn(5, 4, 4, 4), self.d.q_sample(self.x0, self.t, self.noise)
        torch.testing.assert_close(self.d.distillation_losses(a, a, x_t, self.t), torch.zeros(5))
        b = a.clone()
        b[:, :2] += 0.5
        self.assertTrue((self.d.distillation_losses(b, a, x_t, self.t) >= 0.25).all())
        b = a.clone()
        b[:, 2:] += 0.5
        self.assertTrue((self.d.distillation_losses(b, a, x_t, self.t)[1:3] > 0).all())

    def test_respacing_keeps_the_first_and_the_last_timestep_and_their_abar(self):
        for steps in (2, 3, 50, 250, 1000):
            r = self.d.respaced(steps)
            self.assertEqual((len(r.timestep_map), r.timestep_map[0], r.timestep_map[-1]), (steps, 0, 999))
            self.assertTrue((np.diff(r.timestep_map) > 0).all())
            np.testing.assert_allclose(r.abar, self.abar[r.timestep_map], rtol=1e-12)
        for steps in (0, 1, -5, 1001):
            with self.assertRaisesRegex(ValueError, "expected 2 to 1000"):
                self.d.respaced(steps)

    def test_sampling_finds_gaussian_data_with_its_exact_denoiser(self):
        """For data N(mu, s^2) the best noise prediction is known; DDPM, DDIM and the steps between must return it."""
        mu, s, d = 0.3, 0.5, self.d

        class Exact(nn.Module):
            num_classes = 1

            def forward(self, x, t, y):
                a = float(d.abar[t.item()])
                eps = math.sqrt(1 - a) * (x - math.sqrt(a) * mu) / (a * s * s + 1 - a)
                return torch.cat([eps, -torch.ones_like(x)], 1)

        y = torch.zeros(4000, dtype=torch.long)
        for eta in (0.0, 0.5, 1.0):
            x = d.sample(Exact(), y, lambda: torch.randn(4000, 1, 1, 1), steps=200, eta=eta)
            self.assertAlmostEqual(x.mean().item(), mu, delta=0.03)
            self.assertAlmostEqual(x.std().item(), s, delta=0.03)

    def test_ddpm_steps_are_the_posterior_mean_plus_learned_noise_and_ddim_is_deterministic(self):
        model, r, y = tiny_dit(), self.d.respaced(7), torch.tensor([0, 2])
        noises = [torch.randn(2, 1, 8, 8) for _ in range(7)]
        x, queue = noises[0], iter(noises)
        ours = self.d.sample(model, y, lambda: next(queue), steps=7)
        with torch.no_grad():
            for i in reversed(range(7)):
                p = r.p_mean_variance(model(x, torch.full((2,), int(r.timestep_map[i])), y), x, torch.full((2,), i))
                x = p["mean"] + (p["variance"].sqrt() * noises[7 - i] if i else 0)
        torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
        first, second = (self.d.sample(model, y, lambda: noises[0], steps=7, eta=0.0) for _ in range(2))
        self.assertTrue(torch.equal(first, second))

    def test_sampling_in_bfloat16_draws_nearly_the_same_images(self):
        noises = [torch.randn(4, 1, 8, 8) for _ in range(5)]
        images = []
        for dtype in (torch.float32, torch.bfloat16):
            queue = iter(noises)
            images.append(self.d.sample(tiny_dit(), torch.arange(4) % 3, lambda: next(queue), steps=5, dtype=dtype))
        self.assertEqual(images[1].dtype, torch.float32)
        off = (images[1] - images[0]).norm() / images[0].norm()
        self.assertTrue(0 < off < 0.05, off)

    def test_guidance_one_asks_the_model_once_and_others_in_one_batch(self):
        model, sizes = tiny_dit(), []
        model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        forward = model.forward
        model.forward = lambda x, *a, **k: (sizes.append(len(x)), forward(x, *a, **k))[1]
        for guidance, size in ((1.0, 2), (1.5, 4)):
            sizes.clear()
            self.d.sample(model, torch.tensor([0, 1]), lambda: torch.randn(2, 1, 8, 8), steps=3, guidance=guidance)
            self.assertEqual(set(sizes), {size})


class Flow(unittest.TestCase):
    """Chapter 6: SiT."""

    def test_points_and_losses_are_the_published_ones(self):
        """x_t = t data + (1 - t) noise; the velocity is data - noise; the second half of the output is not used."""
        flow, model = tf.FlowMatching(), tiny_dit()
        x0, noise, t, y = torch.randn(5, 1, 8, 8), torch.randn(5, 1, 8, 8), torch.rand(5), torch.tensor([0, 1, 2, 3, 0])
        x_t = torch.stack([t[i] * x0[i] + (1 - t[i]) * noise[i] for i in range(5)])
        torch.testing.assert_close(flow.q_sample(x0, t, noise), x_t)
        with torch.no_grad():
            out = model(x_t, t, y)  # t as it is, not times 1000
            expected = ((out[:, :1] - (x0 - noise)) ** 2).mean((1, 2, 3))
            torch.testing.assert_close(flow.training_losses(model, x0, t, y, noise)["loss"], expected)
            other = torch.cat([out[:, :1] + 0.5, 7 * out[:, 1:]], 1)
            torch.testing.assert_close(flow.distillation_losses(other, out, x_t, t), torch.full((5,), 0.25))
        self.assertTrue(0 <= flow.sample_t(1000).min() < 0.01 and 0.99 < flow.sample_t(1000).max() <= 1)

    def test_min_snr_weighs_the_velocity_as_it_weighs_the_noise(self):
        t, v, v_hat = torch.rand(50) * 0.98 + 0.01, torch.randn(50), torch.randn(50)
        x_t, snr = torch.randn(50), t**2 / (1 - t) ** 2
        eps, eps_hat = x_t - t * v, x_t - t * v_hat
        expected = snr.clamp(max=5) / snr * (eps - eps_hat) ** 2
        torch.testing.assert_close(
            tf.FlowMatching().snr_weight(t, 5.0) * (v - v_hat) ** 2, expected, rtol=1e-3, atol=1e-5
        )

    def test_euler_and_heun_follow_the_equation_and_converge_with_their_orders(self):
        """For Gaussian data N(2, 0.5^2) the velocity is known, and so is where every noise must end."""
        m, s = 2.0, 0.5

        class Exact:
            num_classes = 1

            def __call__(self, x, t, y):
                t = t.double()
                return m + (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2) * (x - t * m)

        z, errors = torch.randn(200, 1, 1, 1, generator=torch.Generator().manual_seed(0)).double(), {}
        for solver, order in (("euler", 1), ("heun", 2)):
            for steps in (20, 40):
                with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
                    x = tf.FlowMatching().sample(Exact(), torch.zeros(200), lambda: z, steps, solver=solver)
                errors[steps] = (x - (m + s * z)).abs().max().item()
            self.assertTrue(0.8 < math.log2(errors[20] / errors[40]) / order < 1.2, errors)
        self.assertLess(errors[40], 1e-2)
        with self.assertRaisesRegex(ValueError, "euler or heun"):
            tf.FlowMatching().sample(Exact(), torch.zeros(1), lambda: z, 2, solver="rk4")

    def test_samples_agree_with_a_plain_integration_under_guidance(self):
        model, y, z = tiny_dit(in_channels=4), torch.tensor([0, 2]), torch.randn(2, 4, 8, 8)

        def v(x, t):
            cond, uncond = (model(x, torch.full((2,), t), label)[:, :4] for label in (y, torch.tensor([3, 3])))
            return torch.cat([(uncond + 1.5 * (cond - uncond))[:, :3], cond[:, 3:]], 1)

        with torch.no_grad():
            euler, heun = z, z
            for i in range(5):
                euler = euler + v(euler, i / 5) / 5
                guess = heun + v(heun, i / 5) / 5
                heun = heun + (v(heun, i / 5) + v(guess, (i + 1) / 5)) / 10
        for solver, expected in (("euler", euler), ("heun", heun)):
            x = tf.FlowMatching().sample(model, y, lambda: z, 5, 1.5, solver)
            torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)

    def test_the_method_runs_on_it_unchanged(self):
        """Learning, pruning, recovery and the criteria know no objective."""
        torch.manual_seed(0)
        flow, teacher, data = tf.FlowMatching(), tiny_dit(), tf.toy_digits(40, size=8)
        data.labels %= 3
        loss_fn = tf.masked_denoising(flow, tf.data_batches(data, 8, 0), snr_gamma=5.0)
        sampler, _ = tf.learn_layers(teacher, loss_fn, [(1, 2)] * 2, 3)
        betas, kept = [], sampler.kept()
        with mock.patch.object(tf, "recovery_loss", wraps=tf.recovery_loss) as loss:
            pairs = tf.match_blocks(sampler.groups, kept)
            tf.recover(tf.prune(teacher, kept), teacher, flow, tf.data_batches(data, 8, 0), pairs, 3)
            betas = [call.args[7] for call in loss.call_args_list]
        np.testing.assert_allclose(betas, [2e-4, 1e-4, 0])
        examples = tf.fixed_examples(flow, data, n=16)
        self.assertTrue(all(0 < t.min() and t.max() < 1 for _, _, t, _ in examples))
        for name in ("shortgpt", "flux-lite", "sensitivity", "random-lowest"):
            self.assertEqual(len(tf.CRITERIA[name](teacher, [(1, 2)] * 2, flow, examples)), 2)


class Masked(unittest.TestCase):
    """Chapter 6: MAR."""

    def setUp(self):
        torch.manual_seed(0)
        self.x0, self.y = torch.randn(3, 1, 8, 8), torch.tensor([0, 2, 3])
        self.diffusion = tf.MaskedAutoregression(16, repeats=2)

    def test_presets_have_the_official_sizes_names_and_shapes(self):
        for name, size in (("MAR-L", 478_326_304), ("MAR-B", 207_924_768)):
            model = tf.unallocated(tf.MAR_models[name])
            self.assertEqual(sum(p.numel() for p in model.parameters()), size, name)
        found = {key: tuple(value.shape) for key, value in tf.unallocated(tf.MAR).state_dict().items()}
        block = [
            f"{name}.{kind}"
            for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
            for kind in ("weight", "bias")
        ]
        parts = ["z_proj", "z_proj_ln", "encoder_norm", "decoder_embed", "decoder_norm"]
        head = [
            "time_embed.mlp.0",
            "time_embed.mlp.2",
            "cond_embed",
            "input_proj",
            "final_layer.linear",
            "final_layer.adaLN_modulation.1",
        ]
        head += [
            f"res_blocks.{i}.{name}" for i in range(8) for name in ("in_ln", "mlp.0", "mlp.2", "adaLN_modulation.1")
        ]
        names = {
            f"{name}.{kind}"
            for name in parts + [f"diffloss.net.{name}" for name in head]
            for kind in ("weight", "bias")
        }
        names |= {f"{side}_blocks.{i}.{name}" for side in ("encoder", "decoder") for i in range(16) for name in block}
        names |= {
            "class_emb.weight",
            "fake_latent",
            "mask_token",
            *(f"{part}_pos_embed_learned" for part in ("encoder", "decoder", "diffusion")),
        }
        self.assertEqual(found.keys(), names)
        for name, shape in {
            "class_emb.weight": (1000, 1024),
            "fake_latent": (1, 1024),
            "mask_token": (1, 1, 1024),
            "z_proj.weight": (1024, 16),
            "encoder_pos_embed_learned": (1, 320, 1024),
            "diffusion_pos_embed_learned": (1, 256, 1024),
            "diffloss.net.input_proj.weight": (1280, 16),
            "diffloss.net.final_layer.linear.weight": (32, 1280),
            "diffloss.net.res_blocks.7.adaLN_modulation.1.weight": (3840, 1280),
        }.items():
            self.assertEqual(found[name], shape, name)

    def test_the_forward_pass_is_the_published_one(self):
        """An independent float64 version, example by example, without modules."""
        model = tiny_mar().double()
        w, D, T, known = model.state_dict(), 16, 16, [[1, 5, 12], [0, 2, 15], [7, 8, 9]]

        def linear(h, name):
            return torch.einsum("...i,oi->...o", h, w[name + ".weight"]) + w[name + ".bias"]

        def norm(h, name=None):
            h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
            return h if name is None else h * w[name + ".weight"] + w[name + ".bias"]

        def silu(h):
            return h / (1 + torch.exp(-h))

        time_embed = model.diffloss["net"].time_embed

        @torch.no_grad()
        def embedded(t):  # by float32 frequencies, in the official code too
            angles = t[:, None] * torch.tensor([10000 ** (-k / 128) for k in range(128)]).double()
            wave, name = torch.cat([angles.cos(), angles.sin()], 1), "diffloss.net.time_embed.mlp."
            exact = linear(silu(linear(wave, name + "0")), name + "2")
            found = tf.TimestepEmbedder.forward(copy.deepcopy(time_embed).float(), t)
            torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)
            return exact

        def block(h, name):  # h (T, D)
            q, k, v = linear(norm(h, f"{name}.norm1"), f"{name}.attn.qkv").view(len(h), 3, 2, D // 2).unbind(1)
            p = (torch.einsum("thd,shd->hts", q, k) / math.sqrt(D // 2)).softmax(-1)
            h = h + linear(torch.einsum("hts,shd->thd", p, v).reshape(-1, D), f"{name}.attn.proj")
            u = linear(norm(h, f"{name}.norm2"), f"{name}.mlp.fc1")
            return h + linear(u * (1 + torch.erf(u / math.sqrt(2))) / 2, f"{name}.mlp.fc2")

        t = torch.randint(0, 1000, (3, T))
        for b in range(3):
            t[b, known[b]] = -1
        noise = torch.randn(3, 1, 8, 8).double()
        x_t = self.diffusion.q_sample(self.x0.double(), t, noise)
        expected = []
        for b in range(3):
            tokens = [
                self.x0[b, :, i : i + 2, j : j + 2].reshape(-1).double() for i in range(0, 8, 2) for j in range(0, 8, 2)
            ]
            label = w["class_emb.weight"][self.y[b]] if self.y[b] < 3 else w["fake_latent"][0]
            place = w["encoder_pos_embed_learned"][0]
            h = [label + place[i] for i in range(3)] + [linear(tokens[i], "z_proj") + place[3 + i] for i in known[b]]
            h = norm(torch.stack(h), "z_proj_ln")
            for i in range(2):
                h = block(h, f"encoder_blocks.{i}")
            h = linear(norm(h, "encoder_norm"), "decoder_embed")
            full = torch.stack(
                [h[i] for i in range(3)]
                + [h[3 + known[b].index(i)] if i in known[b] else w["mask_token"][0, 0] for i in range(T)]
            )
            h = full + w["decoder_pos_embed_learned"][0]
            for i in range(2):
                h = block(h, f"decoder_blocks.{i}")
            z = norm(h, "decoder_norm")[3:] + w["diffusion_pos_embed_learned"][0]
            for i in range(T):
                if i in known[b]:
                    self.assertTrue(torch.equal(x_t[b, i], tokens[i]))
                    continue
                c = embedded(t[b, i : i + 1])[0] + linear(z[i], "diffloss.net.cond_embed")
                u = linear(x_t[b, i], "diffloss.net.input_proj")
                for k in range(2):
                    name = f"diffloss.net.res_blocks.{k}"
                    shift, scale, gate = linear(silu(c), f"{name}.adaLN_modulation.1").chunk(3)
                    v = norm(u, f"{name}.in_ln") * (1 + scale) + shift
                    u = u + gate * linear(silu(linear(v, f"{name}.mlp.0")), f"{name}.mlp.2")
                shift, scale = linear(silu(c), "diffloss.net.final_layer.adaLN_modulation.1").chunk(2)
                expected.append(linear(norm(u) * (1 + scale) + shift, "diffloss.net.final_layer.linear"))
        with mock.patch.object(time_embed, "forward", lambda t: embedded(t)), torch.no_grad():
            torch.testing.assert_close(model(x_t, t, self.y), torch.stack(expected), rtol=1e-9, atol=1e-9)

    def test_the_loss_is_that_of_each_noisy_token_by_itself_repeated_with_other_noise(self):
        model, t = tiny_mar(), self.diffusion.sample_t(3)
        self.assertEqual(t.shape, (6, 16))
        self.assertTrue(torch.equal(t[:3] < 0, t[3:] < 0) and not torch.equal(t[:3], t[3:]))
        noise = tf.noise_for(self.x0, t)
        abar = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
        alphas = np.cumprod([1 - min(0.999, 1 - abar[i + 1] / abar[i]) for i in range(1000)])
        np.testing.assert_allclose(self.diffusion.abar, alphas)
        tokens, noises = (tf.patchify(x, 16) for x in (self.x0.repeat(2, 1, 1, 1), noise))
        self.assertTrue(torch.equal(tokens[0, 5], self.x0[0, 0, 2:4, 2:4].reshape(-1)))
        x_t, plain = self.diffusion.q_sample(self.x0, t, noise), tf.GaussianDiffusion(
            1 - alphas / np.append(1, alphas[:-1])
        )
        with torch.no_grad():
            out, found, noisy, row = model(x_t, t, self.y), [[] for _ in range(3)], [], 0
            for b in range(6):
                for i in (t[b] >= 0).nonzero().flatten():
                    share = alphas[t[b, i]]
                    one = math.sqrt(share) * tokens[b, i] + math.sqrt(1 - share) * noises[b, i]
                    torch.testing.assert_close(x_t[b, i], one, rtol=1e-4, atol=1e-5)
                    noisy.append(one[None])
                    terms = plain.losses(
                        out[row : row + 1], tokens[b, i][None], one[None], t[b, i][None], noises[b, i][None]
                    )
                    found[b % 3].append(terms["loss"].item())
                    row += 1
            loss = self.diffusion.training_losses(model, self.x0, t, self.y, noise)["loss"]
            other = out + 0.5 * torch.randn(out.shape)
            distances = plain.distillation_losses(other, out, torch.cat(noisy), t[t >= 0])
            rows = torch.tensor([b for b in range(6) for _ in range(int((t[b] >= 0).sum()))])
            expected = torch.stack([distances[rows == b].mean() for b in range(6)])
            torch.testing.assert_close(self.diffusion.distillation_losses(other, out, x_t, t), expected)
            twice = torch.cat([model(x_t[part], t[part], self.y) for part in (slice(3), slice(3, 6))])
            torch.testing.assert_close(out, twice)  # the copies of a batch do not see one another
        self.assertEqual((row, tf.MaskedAutoregression().sample_t(2).shape), (len(out), (8, 256)))
        torch.testing.assert_close(loss, torch.tensor([np.mean(f) for f in found]).float(), rtol=1e-3, atol=1e-5)

    def test_the_known_tokens_are_as_many_in_every_example_and_0_to_30_percent(self):
        counts, places, different = [], torch.zeros(100), 0
        for _ in range(300):
            t = tf.MaskedAutoregression(100).sample_t(4)
            known = (t < 0).sum(1)
            self.assertEqual(len(set(known.tolist())), 1)
            counts.append(known[0].item())
            places += (t[:4] < 0).sum(0)
            different += not torch.equal(t[0] < 0, t[1] < 0)
        # of a normal with mean 1 and std 0.25, cut to [0.7, 1], the mean is 1 - 0.25 (0.3989 - 0.1942) / 0.3849 = 0.867
        self.assertTrue(0 <= min(counts) <= 2 and 28 <= max(counts) <= 30 and abs(np.mean(counts) - 12.8) < 1.5, counts)
        self.assertTrue(different > 280 and (places - places.mean()).abs().max() < 5 * places.mean().sqrt())
        spread = tf.MaskedAutoregression(100).spread_t(50)
        self.assertTrue(((spread < 0).sum(1) == 15).all() and spread.max() > 950)
        with self.assertRaisesRegex(ValueError, "as many known tokens"):
            tiny_mar().condition(torch.zeros(2, 16, 4), torch.eye(16)[:2].cumsum(1).bool(), self.y[:2])

    def test_sampling_opens_tokens_by_the_cosine_and_guidance_grows_with_them(self):
        known_counts = []

        class Model:  # its head says 1 where there is a class, and 0 where there is none
            patch_size, input_size, in_channels, num_classes = 1, 8, 1, 3

            def condition(self, x, known, y):
                known_counts.append(known.sum(1).tolist())
                if not (x[known] >= 1).all() or x[~known].any():  # what was drawn is where it is known
                    raise AssertionError("the encoder must see what was drawn")
                return (y < 3).float().view(-1, 1, 1).expand(-1, 64, 1), []

            diffloss = {"net": lambda x, t, z: torch.cat([z, z], 1)}

        def denoise(predict, draw, *args, **more):
            eps, v = predict(draw(), torch.tensor([0])).chunk(2, 1)
            self.assertTrue((v == 1).all())  # the variance is that of the class
            return eps

        diffusion = tf.MaskedAutoregression(64)
        diffusion.denoise = denoise
        draw = tf.noise_source(range(2), (1, 8, 8), 0)
        image = diffusion.sample(Model(), torch.tensor([0, 1]), draw, steps=8, guidance=3.0)
        left = [math.floor(64 * math.cos(math.pi / 2 * (i + 1) / 8)) for i in range(8)]
        self.assertEqual(left[-1], 0)
        self.assertEqual(known_counts, [[64 - n] * 4 for n in [64, *left[:-1]]])
        counts = {round(1 + 2 * (64 - max(1, n)) / 64, 4): a - n for a, n in zip([64, *left], left)}
        for picture in image:
            values, found = torch.unique((picture * 1e4).round() / 1e4, return_counts=True)
            self.assertEqual({round(v.item(), 4): n.item() for v, n in zip(values, found)}, counts)
        self.assertFalse(torch.equal(image[0], image[1]))  # every image has an order of its own
        known_counts.clear()
        diffusion.sample(Model(), torch.tensor([0]), tf.noise_source([0], (1, 8, 8), 0), steps=64)
        self.assertEqual(known_counts, [[n] for n in range(64)])  # at least one is opened
        with self.assertRaisesRegex(ValueError, "expected 1 to 64"):
            diffusion.sample(Model(), torch.tensor([0]), draw, steps=65)

    def test_the_head_samples_its_own_distribution_scaled_by_the_temperature(self):
        """With the exact denoiser of tokens of N(z, 0.5^2), the tokens drawn are of that distribution."""
        diffusion = tf.MaskedAutoregression(1)
        abar = torch.tensor(diffusion.abar, dtype=torch.float32)

        class Model:
            patch_size, input_size, in_channels, num_classes = 1, 1, 1, 3

            def condition(self, x, known, y):
                return y.float().view(-1, 1, 1), []

            def head(x, t, z):  # E[noise | x_t], and the smaller variance
                a = abar[t].view(-1, 1)
                eps = (1 - a).sqrt() * (x - a.sqrt() * z) / (a * 0.25 + 1 - a)
                return torch.cat([eps, -torch.ones_like(eps)], 1)

            diffloss = {"net": head}

        y, draw = torch.arange(2).repeat_interleave(2000), tf.noise_source(range(4000), (1, 1, 1), 0)
        found = {}
        for temperature in (0.0, 0.5, 1.0):
            x = diffusion.sample(Model(), y, draw, 1, head_steps=250, temperature=temperature).view(2, -1)
            self.assertLess((x.mean(1) - torch.tensor([0.0, 1.0])).abs().max(), 0.05)
            found[temperature] = x.std(1).mean().item()
        self.assertAlmostEqual(found[1.0], 0.5, delta=0.03)
        self.assertTrue(found[0.0] < 0.1 and abs(found[0.5] - 0.25) < 0.05, found)  # the drawn std scales along

    def test_an_image_is_the_same_whatever_the_batch_it_is_drawn_in(self):
        model, draw = tiny_mar(), functools.partial(
            tf.sample_images,
            tiny_mar(),
            self.diffusion,
            shape=(1, 8, 8),
            seed=0,
            sampling={"steps": 4, "head_steps": 5, "guidance": 2.0},
        )
        together = draw(torch.tensor([0, 1, 2]), range(3))
        for i in range(3):
            self.assertLessEqual((draw(torch.tensor([i]), [i])[0].int() - together[i].int()).abs().max(), 1)
        self.assertGreater(together.float().std(), 0)

    def test_a_mask_of_encoder_and_decoder_is_the_pruned_model_and_has_its_gradient(self):
        model, t, kept = tiny_mar(), self.diffusion.spread_t(3), [1, 2]
        x_t = self.diffusion.q_sample(self.x0, t, tf.noise_for(self.x0, t))
        mask = torch.tensor([0.0, 1, 1, 0]).repeat(3, 1).requires_grad_()
        out, features = model(x_t, t, self.y, mask=mask, hidden=(1, 2))
        pruned = tf.prune(model, kept)
        self.assertEqual(
            (pruned.config()["encoder_depth"], pruned.config()["decoder_depth"], len(pruned.blocks)), (1, 1, 2)
        )
        expected, same = pruned(x_t, t, self.y, hidden=(0, 1))
        torch.testing.assert_close(out, expected)
        for a, b in zip(features, same, strict=True):
            torch.testing.assert_close(a, b)
        self.assertEqual([f.shape[1] for f in features], [3 + 2, 3 + 16])  # 15 % of 16 tokens are known
        out.square().sum().backward()
        self.assertTrue((mask.grad != 0).all())
        self.assertEqual(tf.prune(model, [2, 3]).config()["encoder_depth"], 0)

    def test_the_method_runs_on_it_unchanged(self):
        teacher, data = tiny_mar(), tf.toy_digits(40, size=8)
        data.labels %= 3
        loss_fn = tf.masked_denoising(self.diffusion, tf.data_batches(data, 8, 0), snr_gamma=5.0)
        sampler, history = tf.learn_layers(teacher, loss_fn, [(1, 2)] * 2, 5)
        self.assertTrue(all(torch.isfinite(p).all() and p.any() for p in sampler.parameters()))
        kept = sampler.kept()
        pairs = tf.match_blocks(sampler.groups, kept)
        before = tf.calibration_loss(tf.prune(teacher, kept), self.diffusion, tf.fixed_examples(self.diffusion, data))
        for kd in tf.KD_MODES:
            student = tf.recover(
                tf.prune(teacher, kept), teacher, self.diffusion, tf.data_batches(data, 8, 0), pairs, 20, kd=kd, lr=2e-3
            )
            after = tf.calibration_loss(student, self.diffusion, tf.fixed_examples(self.diffusion, data))
            self.assertLess(after, before, kd)
        examples = tf.fixed_examples(self.diffusion, data, n=16)
        for name in ("shortgpt", "flux-lite", "sensitivity", "oracle", "random-lowest"):
            self.assertEqual(len(tf.CRITERIA[name](teacher, [(1, 2)] * 2, self.diffusion, examples)), 2)

    def test_training_drops_labels_and_activations_and_evaluation_does_not(self):
        model = tiny_mar(class_dropout_prob=0.5, dropout=0.1)
        null, labels = model.fake_latent, torch.zeros(1000, dtype=torch.long)
        dropped = (model.class_emb.train()(labels, null) == null).all(1).float().mean()
        self.assertTrue(0.4 < dropped < 0.6)
        self.assertTrue((model.class_emb.eval()(labels, null) == model.class_emb.weight[0]).all())
        self.assertTrue(torch.equal(model.class_emb(torch.tensor([3]), null), null))  # number 3 of 3 is no class
        x, block = torch.randn(2, 5, 16), model.encoder_blocks[0]
        for mode, p in (("eval", 0.0), ("train", 0.1)):  # of attention, and after it and both layers of the MLP
            getattr(block, mode)()
            attention = F.scaled_dot_product_attention
            with (
                mock.patch.object(tf.F, "dropout", side_effect=lambda h, p: h) as dropout,
                mock.patch.object(tf.F, "scaled_dot_product_attention", wraps=attention) as attend,
            ):
                block(x)
            self.assertEqual([call.args[1] for call in dropout.call_args_list], [p] * 3)
            self.assertEqual(attend.call_args.kwargs["dropout_p"], p)

    def test_a_new_model_draws_from_noise_it_predicts_as_zero(self):
        model, t = tf.MAR_models["MAR-toy"](in_channels=1, num_classes=10), self.diffusion.sample_t(3)
        x0 = torch.randn(3, 1, 16, 16)
        out = model(self.diffusion.q_sample(x0, t, tf.noise_for(x0, t)), t, self.y)
        self.assertTrue(len(out) and not out.any())
        for weight in (model.class_emb.weight, model.encoder_pos_embed_learned, model.decoder_pos_embed_learned):
            self.assertAlmostEqual(weight.std().item(), 0.02, delta=0.003)


class Measuring(unittest.TestCase):
    """Chapter 7."""

    def test_the_frechet_distance_of_gaussians_has_its_closed_form(self):
        """For covariances that commute: |mu1 - mu2|^2 + sum (sqrt(l1) - sqrt(l2))^2."""
        rng = np.random.default_rng(0)
        Q, _ = np.linalg.qr(rng.normal(size=(20, 20)))
        l1, l2, mu1, mu2 = rng.uniform(0.1, 3, 20), rng.uniform(0.1, 3, 20), rng.normal(size=20), rng.normal(size=20)
        expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(l1) - np.sqrt(l2)) ** 2).sum()
        self.assertAlmostEqual(tf.frechet_distance(mu1, (Q * l1) @ Q.T, mu2, (Q * l2) @ Q.T), expected, places=9)

    def test_the_frechet_distance_agrees_with_the_general_matrix_square_root(self):
        rng = np.random.default_rng(1)
        a, b = rng.normal(size=(500, 30)), rng.normal(size=(500, 30)) @ rng.normal(size=(30, 30)) * 0.2 + 0.3
        (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x.T)) for x in (a, b))
        expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
        self.assertLess(abs(tf.frechet_distance(m1, s1, m2, s2) / expected - 1), 1e-6)
        self.assertAlmostEqual(tf.frechet_distance(m1, s1, m1, s1), 0, places=9)

    def test_the_frechet_distance_of_singular_covariances_is_real_and_right(self):
        rng = np.random.default_rng(2)
        low = rng.normal(size=(5, 40))  # 5 samples in 40 dimensions
        s = np.cov(low.T)
        self.assertAlmostEqual(tf.frechet_distance(np.zeros(40), s, np.ones(40), 4 * s), 40 + np.trace(s), places=5)
        self.assertAlmostEqual(tf.frechet_distance(np.zeros(3), np.zeros((3, 3)), np.zeros(3), np.eye(3)), 3)
        for bad in (np.full((3, 3), np.nan), np.eye(4)):
            with self.assertRaises(ValueError):
                tf.frechet_distance(np.zeros(3), bad, np.zeros(3), np.eye(3))

    def test_running_statistics_equal_those_of_all_features_at_once(self):
        x, stats = np.random.default_rng(0).normal(1000, 1, (700, 6)), tf.FeatureStatistics()
        for part in (x[:1], x[1:300], x[300:]):
            stats.update(part)
        np.testing.assert_allclose(stats.mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(stats.covariance, np.cov(x.T), rtol=1e-9, atol=1e-10)

    def test_the_inception_score_runs_from_one_to_the_number_of_classes(self):
        self.assertAlmostEqual(tf.inception_score(torch.full((50, 10), 0.1)), 1)
        self.assertAlmostEqual(tf.inception_score(torch.eye(10).repeat(5, 1)), 10)
        self.assertGreater(tf.inception_score(torch.eye(10).repeat_interleave(2000, 0)), 9.9, "sorted, in four splits")

    def test_precision_and_recall_see_quality_and_variety(self):
        torch.manual_seed(0)
        real = torch.cat([torch.randn(200, 4), torch.randn(200, 4) + 50])
        self.assertEqual(tf.precision_recall(real, real), (1, 1))
        self.assertEqual(tf.precision_recall(real, real + 1000), (0, 0))
        precision, recall = tf.precision_recall(real, torch.randn(400, 4) * 0.9)  # one of two modes
        self.assertTrue(precision > 0.8 and 0.3 < recall <= 0.5, (precision, recall))
        with self.assertRaisesRegex(ValueError, "need more than"):
            tf.precision_recall(real[:3], real)

    def test_other_packages_find_the_same_from_the_same_features(self):
        try:
            from prdc import compute_prdc
            from pytorch_fid.fid_score import calculate_frechet_distance
        except ImportError:
            self.skipTest("needs pip install pytorch-fid prdc")
        rng = np.random.default_rng(0)
        real, fake = rng.normal(size=(700, 64)), rng.normal(size=(600, 64)) * 0.9 + 0.1
        a, b = (tf.FeatureStatistics().update(x) for x in (real, fake))
        theirs = calculate_frechet_distance(real.mean(0), np.cov(real.T), fake.mean(0), np.cov(fake.T))
        self.assertLess(abs(tf.frechet_distance(a.mean, a.covariance, b.mean, b.covariance) / theirs - 1), 1e-9)
        with contextlib.redirect_stdout(io.StringIO()):
            expected = compute_prdc(real, fake, nearest_k=3)
        found = tf.precision_recall(real, fake)
        np.testing.assert_allclose(found, (expected["precision"], expected["recall"]), atol=2e-3)

    def test_fid_is_the_same_from_a_folder_an_npz_file_and_saved_statistics(self):
        rng, folder = np.random.default_rng(0), Path(self.enterContext(tempfile.TemporaryDirectory()))
        a, b = (rng.integers(0, top, (60, 12, 12, 3), dtype=np.uint8) for top in (256, 180))
        torch.jit.script(StandIn()).save(folder / "net.pt")
        for name, images in (("a", a), ("b", b)):
            (folder / name / "sub").mkdir(parents=True)
            for i, image in enumerate(images):
                Image.fromarray(image).save(folder / name / ("sub" if i % 2 else "") / f"{i:02}.png")
        np.savez(folder / "a.npz", arr_0=a, settings="250 steps, guidance 1.5")
        np.savez_compressed(folder / "b.npz", arr_0=b)
        with torch.no_grad():
            x, y = (StandIn()(torch.from_numpy(z).permute(0, 3, 1, 2), return_features=True).numpy() for z in (a, b))
        expected = tf.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
        stats = str(folder / "s.npz")

        def fid(one, *more):
            with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
                self.assertEqual(tf.main(["--fid", str(folder / one), "--device", "cpu", *more]), 0)
            return said.getvalue()

        inception = ["--inception", str(folder / "net.pt")]
        for one in ("a", "a.npz"):
            for other in ("b", "b.npz"):
                words = fid(one, "--ref", str(folder / other), *inception, "--save-stats", stats)
                self.assertIn(f"FID {expected:.4g}, IS 1", words)
                self.assertIn("precision 0.", words)
                self.assertIn("60 samples", words)
                self.assertIn("features: net.pt", words)
                self.assertEqual("250 steps, guidance 1.5" in words, one == "a.npz")
        saved = np.load(stats, allow_pickle=False)
        self.assertIn(f"FID {expected:.4g}", fid("b.npz", "--ref", stats, *inception))
        np.savez(folder / "adm.npz", mu=y.mean(0), sigma=np.cov(y.T), arr_0=b[:30])
        self.assertIn(f"FID {expected:.4g}, IS", fid("s.npz", "--ref", str(folder / "adm.npz")))
        again = tf.statistics_of(folder / "adm.npz", tf.load_inception(folder / "net.pt", "cpu"))
        self.assertEqual(len(torch.cat(again.content["features"])), 30)
        np.testing.assert_allclose(again.covariance, np.cov(y.T))
        np.testing.assert_allclose(saved["mu"], x.mean(0), rtol=1e-5)
        (folder / "empty").mkdir()
        torch.jit.script(nn.ReLU()).save(folder / "other.pt")
        (folder / "torn.npz").write_bytes((folder / "b.npz").read_bytes()[:-900])
        np.savez(folder / "grey.npz", arr_0=a[..., 0])
        np.savez(folder / "wide.npz", mu=np.zeros(3), sigma=np.eye(3))
        for arguments, reason in (
            (["--fid", "a", "--ref", "empty", *inception], "no images"),
            (["--fid", "a", "--ref", "b"], "--inception FILE is needed"),
            (["--fid", "a", "--ref", "nothing", *inception], "expected a folder"),
            (["--fid", "a", "--ref", "torn.npz", *inception], "expected an .npz"),
            (["--fid", "a", "--ref", "grey.npz", *inception], "arr_0"),
            (["--fid", "a", "--ref", "wide.npz", *inception], "cannot be compared"),
            (["--fid", "a", "--ref", "b", "--inception", "a.npz"], "expected a TorchScript"),
            (["--fid", "a", "--ref", "b", "--inception", "other.pt"], "not called as NVIDIA's port"),
            (["--fid", "a"], "goes with --ref"),
            (["--save-stats", "x"], "goes with --fid"),
        ):
            arguments = [str(folder / word) if (folder / word).exists() else word for word in arguments]
            status, words = status_and_words(tf.main, arguments)
            lines = [line for line in words.splitlines() if line.startswith("tinyfusion.py: ")]
            self.assertEqual((status, len(lines), "Traceback" in words), (2, 1, False), words)
            self.assertIn(reason, lines[0])

    def test_measuring_goes_on_where_it_was_stopped(self):
        data, model, looks = tf.toy_digits(60, size=8), tiny_dit(num_classes=10), []
        judge, path = tf.Classifier(1, 8, 10), Path(self.enterContext(tempfile.TemporaryDirectory())) / "m.pt"

        def look(images):
            looks.append(len(images))
            if len(looks) == stop:
                os.kill(os.getpid(), signal.SIGINT)
            return judge.look(images)

        def rows():
            real, state = tf.statistics_of_data(data, judge.look), tf.TrainingState(path, {}, 4)
            labels = tf.spread_labels(data, 30)
            models, sampling = {"one": model, "other": tf.prune(model, [0, 3])}, {"steps": 2}
            found, _ = tf.measure(
                models, labels, data.shape, look, real, tf.GaussianDiffusion(), sampling, tf.to_uint8, batch_size=8,
                label=None, state=state
            )  # fmt: skip
            return {name: {k: v for k, v in row.items() if k != "images_per_second"} for name, row in found.items()}

        stop = None
        whole = rows()
        path.unlink()
        looks.clear()
        stop = 3
        with self.assertRaises(KeyboardInterrupt):
            rows()
        self.assertEqual((tf.TrainingState(path, {}, 4).step, looks), (3, [8] * 3))
        self.assertEqual(rows(), whole)
        self.assertEqual(looks, [8] * 6 + [6] * 2)


class Data(unittest.TestCase):
    """Chapter 8."""

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def make(self, mode="L", classes=("b", "a"), count=3, size=(20, 14)):
        rng = np.random.default_rng(0)
        for name in classes:
            (self.folder / name).mkdir(exist_ok=True)
            for i in range(count):
                pixels = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
                pixels.convert(mode).save(self.folder / name / f"{i}.{'png' if mode != 'RGB' else 'jpg'}")

    def test_the_digits_are_ten_classes_of_upright_grey_images_and_the_same_every_time(self):
        a, b = tf.toy_digits(100), tf.toy_digits(100)
        self.assertTrue(torch.equal(a.images, b.images))
        self.assertEqual((a.images.shape, len(a.classes)), ((100, 1, 16, 16), 10))
        ink = (a.images > 64).any(3).sum((1, 2))  # rows with ink
        self.assertTrue((ink >= 12).all() and (ink <= 16).all())
        self.assertTrue(a.images[:, :, 0].float().mean() < 60)

    def test_a_pillow_without_a_scalable_font_is_named(self):
        with mock.patch.object(tf.ImageFont, "load_default", side_effect=ImportError("no FreeType")):
            with self.assertRaisesRegex(tf.UserError, "no scalable font"):
                tf.toy_digits(10)

    def test_a_folder_of_grey_images_is_grey_and_of_colour_images_rgb(self):
        self.make("L")
        data = tf.image_folder(self.folder, 8)
        self.assertEqual(
            (data.images.shape, data.labels.tolist(), data.classes), ((6, 1, 8, 8), [0, 0, 0, 1, 1, 1], ["a", "b"])
        )
        self.make("RGB")
        self.assertEqual(tf.image_folder(self.folder, 8).images.shape, (12, 3, 8, 8))

    def test_sixteen_bit_palette_and_transparent_images_are_read(self):
        (self.folder / "a").mkdir()
        Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(self.folder / "a" / "1.png")
        Image.new("P", (8, 8)).save(self.folder / "a" / "2.gif")
        Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(self.folder / "a" / "3.png")
        Image.new("F", (8, 8)).save(self.folder / "a" / "4.tif")
        with contextlib.redirect_stderr(io.StringIO()) as said:
            data = tf.image_folder(self.folder, 8)
        self.assertIn("no known range", said.getvalue())
        self.assertEqual(data.images.shape, (3, 3, 8, 8))
        self.assertEqual(data.images[0, 0, 0, 0], 128)

    def test_the_crop_is_square_central_and_of_the_asked_size(self):
        for size in ((100, 37), (16, 300), (9, 7)):
            self.assertEqual(tf.center_crop(Image.new("RGB", size), 16).size, (16, 16))
        stripes = Image.fromarray(np.repeat(np.array([0] * 16 + [200] * 16 + [0] * 16, np.uint8)[None], 16, 0))
        self.assertTrue((np.asarray(tf.center_crop(stripes, 16)) == 200).all())

    def test_a_broken_image_is_named_counted_and_skipped(self):
        self.make("L")
        (self.folder / "a" / "torn.png").write_bytes((self.folder / "a" / "0.png").read_bytes()[:60])
        (self.folder / "a" / "notes.txt").write_text("hello")
        with contextlib.redirect_stderr(io.StringIO()) as said:
            data = tf.image_folder(self.folder, 8)
        self.assertEqual(len(data.labels), 6)
        for words in ("torn.png", "notes.txt", "skipped 2 broken files of 8"):
            self.assertIn(words, said.getvalue())

    def test_folders_that_cannot_be_used_are_refused_with_the_reason(self):
        with self.assertRaisesRegex(tf.UserError, "no class folders"):
            tf.image_folder(self.folder, 8)
        with self.assertRaisesRegex(tf.UserError, "no such folder"):
            tf.image_folder(self.folder / "x", 8)
        self.make("L")
        (self.folder / "empty").mkdir()
        with self.assertRaisesRegex(tf.UserError, "no readable image in class folder 'empty'"):
            tf.image_folder(self.folder, 8)

    def test_batches_cover_every_epoch_and_go_on_from_any_step(self):
        images, labels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.arange(10)
        stream = tf.data_batches(tf.ImageSet(images, labels, []), 3, seed=1)
        ys = [next(stream)[1] for _ in range(9)]
        self.assertEqual(len(torch.cat(ys[:3]).unique()), 9)
        self.assertFalse(torch.equal(torch.cat(ys[:3]), torch.cat(ys[3:6])))
        for start in (1, 3, 7):
            self.assertTrue(
                torch.equal(next(tf.data_batches(tf.ImageSet(images, labels, []), 3, 1, start=start))[1], ys[start])
            )

    def latents(self, n=20):
        """A folder with the pair of files, and one in the public layout, of the same latents: 2 i + m in the middle."""
        x = np.arange(2 * n, dtype=np.float32).reshape(n, 2, 1, 1, 1) + np.zeros((4, 4, 4), np.float32)
        for name in ("pair", "files/imagenet256_features", "files/imagenet256_labels"):
            (self.folder / name).mkdir(parents=True)
        np.save(self.folder / "pair" / "latents.npy", x)
        np.save(self.folder / "pair" / "labels.npy", np.arange(n) % 7)
        for i in range(n):
            np.save(self.folder / "files" / "imagenet256_features" / f"{i}.npy", x[i])
            np.save(self.folder / "files" / "imagenet256_labels" / f"{i}.npy", np.array([i % 7]))
        return self.folder / "pair", self.folder / "files"

    def test_latents_in_two_files_and_in_many_give_the_same_batches_half_of_them_mirrored(self):
        pair, files = (tf.open_data(folder, 8) for folder in self.latents())
        self.assertIsInstance(pair.latents, np.memmap)
        self.assertEqual((pair.shape, len(pair.classes), pair.describe()), ((4, 4, 4), 7, files.describe()))
        both = [tf.data_batches(data, 4, seed=0) for data in (pair, files)]
        seen = []
        for _ in range(50):
            (x, y), (x2, y2) = map(next, both)
            self.assertTrue(torch.equal(x, x2) and torch.equal(y, y2))
            number = x[:, 0, 0, 0].long()
            self.assertTrue(torch.equal(number // 2 % 7, y))
            seen.append(number)
        self.assertEqual(len((torch.cat(seen[:5]) // 2).unique()), 20, "an epoch")
        self.assertTrue(70 < (torch.cat(seen) % 2).sum() < 130, "200 coins")
        for start in (3, 7):
            x, _ = next(tf.data_batches(pair, 4, 0, start=start))
            self.assertTrue(torch.equal(x[:, 0, 0, 0].long(), seen[start]))

    def test_processes_and_parts_share_a_batch(self):
        pair = tf.open_data(self.latents()[0], 8)
        whole, _ = next(tf.data_batches(pair, 8, 0, start=3))
        cut = [list(zip(range(2), tf.data_batches(pair, 8, 0, "cpu", 3, 2, part, 2))) for part in (0, 1)]
        found = torch.cat([x for process in cut for _, (x, _) in process])
        self.assertEqual({len(x) for process in cut for _, (x, _) in process}, {2})
        self.assertTrue(torch.equal(found[:, 0, 0, 0].sort().values, whole[:, 0, 0, 0].sort().values))

    def test_latents_that_cannot_be_used_are_refused_with_the_reason(self):
        pair, files = self.latents()
        good = np.load(pair / "latents.npy")
        for content, reason in (
            (good[:5], "5 latents"),
            (good[:, 0], "expected as many of both"),
            (good.astype(object), "expected a whole .npy"),
        ):
            np.save(pair / "latents.npy", content)
            with self.assertRaisesRegex(tf.UserError, reason):
                tf.open_data(pair, 8)
        np.save(pair / "latents.npy", good)
        np.save(pair / "labels.npy", np.arange(20) / 2)
        with self.assertRaisesRegex(tf.UserError, "whole number"):
            tf.open_data(pair, 8)
        (pair / "labels.npy").unlink()
        with self.assertRaisesRegex(tf.UserError, "labels.npy"):
            tf.open_data(pair, 8)
        (files / "imagenet256_features" / "11.npy").write_bytes(b"torn")
        with self.assertRaisesRegex(tf.UserError, "11.npy"):
            list(zip(range(5), tf.data_batches(tf.open_data(files, 8), 4, seed=0)))

    def test_encoding_can_be_stopped_and_continued_and_skips_broken_images(self):
        class Stopping(ToyVAE):
            def encode(self, images, noise):
                calls.append(len(images))
                if len(calls) == stop:
                    os.kill(os.getpid(), number)
                return super().encode(images, noise)

        self.make("RGB", classes=("b", "a", "c"), count=9, size=(40, 32))
        Image.new("L", (50, 50), 77).save(self.folder / "a" / "grey.png")
        (self.folder / "b" / "broken.png").write_bytes(b"no image")
        results, arguments = [], (self.folder, 32, Stopping(), None, {"--vae": "toy"}, 4, 2)
        for name, stops in (("whole", (None,)), ("stopped", (4, 3, None))):
            out = self.folder.parent / f"{self.folder.name}-{name}"
            self.addCleanup(shutil.rmtree, out, True)
            out.mkdir()
            for stop, number in zip(stops, (signal.SIGINT, signal.SIGTERM, None)):
                calls = []
                with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()) as said:
                    with self.assertRaises(KeyboardInterrupt) if stop else contextlib.nullcontext():
                        tf.encode_images(*arguments[:3], out, *arguments[4:])
                if stop:
                    with open(out / "latents.npy.part", "ab") as file:
                        file.write(b"what a killed run leaves after its last save")
                    with self.assertRaisesRegex(tf.UserError, "run --encode again"):
                        tf.open_data(out, 32)
                    with self.assertRaisesRegex(tf.UserError, "--vae toy"):
                        tf.encode_images(*arguments[:3], out, {"--vae": "other"}, *arguments[5:])
            self.assertEqual({p.name for p in out.iterdir()}, {"latents.npy", "labels.npy"})
            self.assertIn("28 images of 3 classes, 1 skipped", said.getvalue())
            results.append((out / "latents.npy").read_bytes() + (out / "labels.npy").read_bytes())
        self.assertEqual(results[0], results[1])
        data = tf.open_data(out, 8)
        self.assertEqual((data.shape, data.labels.bincount().tolist()), ((4, 4, 4), [10, 9, 9]))
        x, flipped = (
            ToyVAE().decode(data.read(torch.arange(28), torch.full((28,), m)))[:, :, ::8, ::8] for m in (0, 1)
        )
        image = torch.tensor(tf.read_image(sorted((self.folder / "a").iterdir())[0], 32)).permute(2, 0, 1)
        self.assertLess((x[0].float() - image[:, ::8, ::8]).abs().max(), 8)
        self.assertLess((flipped[0].float() - image.flip(2)[:, ::8, ::8]).abs().max(), 8)

    def test_a_vae_of_diffusers_encodes_and_decodes_or_says_what_to_install(self):
        with mock.patch.dict(sys.modules, {"diffusers": None}):
            with self.assertRaisesRegex(tf.UserError, "pip install diffusers"):
                tf.VAE("any", "cpu")
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            self.skipTest("the rest needs pip install diffusers")
        torch.manual_seed(0)
        net = AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4).eval()  # fmt: skip
        net.save_pretrained(self.folder / "vae")
        vae, images = tf.VAE(self.folder / "vae", "cpu"), torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
        noise = torch.randn(3, 4, 4, 4)
        with torch.no_grad():
            posterior = net.encode(tf.to_float(images)).latent_dist
            latents = (posterior.mean + posterior.std * noise) * 0.18215
            torch.testing.assert_close(vae.encode(images, noise), latents)
            self.assertTrue(torch.equal(vae.decode(latents), tf.to_uint8(net.decode(latents / 0.18215).sample)))
        with self.assertRaisesRegex(tf.UserError, "--vae /nothing: "):
            tf.VAE("/nothing", "cpu")
        model = tf.DiT_models["toy"](input_size=4, in_channels=4, num_classes=2, depth=1)
        tf.save_checkpoint(self.folder / "m.pt", model, {"steps": 2}, ["a", "b"])
        for more, size in ((["--out", "a.png"], None), (["--npz", "a.npz"], (20, 32, 32, 3))):
            out = self.folder / more[1]
            arguments = ["--ckpt", str(self.folder / "m.pt"), "--vae", str(self.folder / "vae"), more[0], str(out)]
            self.assertEqual(status_and_words(sample.main, arguments)[0], 0)
            if size:
                drawn = np.load(out, allow_pickle=False)
                self.assertEqual((drawn["arr_0"].shape, "steps 2" in str(drawn["settings"])), (size, True))


class Training(unittest.TestCase):
    """Chapters 9 and 10."""

    def test_a_loss_that_is_not_finite_stops_training_with_the_good_weights(self):
        for poison in (math.nan, math.inf):
            model, seen = nn.Linear(2, 1), []

            def loss_fn(step):
                seen.append(copy.deepcopy(model.state_dict()))
                loss = model(torch.ones(1, 2)).square().sum()
                return loss * (poison if step == 3 else 1), {}

            with self.assertRaisesRegex(tf.NonFiniteLoss, "step 3") as caught:
                tf.train(model, loss_fn, 10, lr=0.1)
            for name, weight in caught.exception.model.state_dict().items():
                self.assertTrue(torch.equal(weight, seen[3][name]) and weight.isfinite().all())

    def test_the_rate_warms_up_and_falls_along_a_cosine(self):
        model, rates = nn.Linear(1, 1), []
        tf.train(
            model,
            lambda step: (model.weight.square().sum(), {}),
            100,
            lr=1.0,
            final_lr_ratio=0.5,
            warmup=10,
            on_step=lambda step, metrics: rates.append(metrics["lr"]),
        )
        self.assertAlmostEqual(rates[0], 1 / 11, places=5)
        self.assertAlmostEqual(rates[50], 0.75, places=5)
        self.assertAlmostEqual(rates[99], 0.5, places=3)

    def test_models_that_would_drop_labels_themselves_are_refused(self):
        model, x0, y = tiny_dit(), torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)
        with self.assertRaisesRegex(ValueError, "eval"):
            tf.recovery_loss(tf.prune(model, [0, 3]).train(), model, tf.GaussianDiffusion(), x0, y, [(0, 1), (1, 3)])

    def test_matched_pairs_out_of_order_are_refused(self):
        model = tiny_dit()
        with self.assertRaisesRegex(ValueError, "ascending"):
            tf.recovery_loss(
                model,
                model,
                tf.GaussianDiffusion(),
                torch.randn(2, 1, 8, 8),
                torch.zeros(2, dtype=torch.long),
                [(0, 3), (1, 1)],
            )

    def test_the_average_of_the_weights_is_exponential_and_warms_up(self):
        for decay, steps in ((0.9, 4), (0.2, 30)):
            model, seen = nn.Linear(1, 1, bias=False), []

            def loss_fn(step):
                seen.append(model.weight.item())
                return model.weight.sum(), {}

            ema = tf.train(model, loss_fn, steps, lr=0.1, ema_decay=decay)
            seen = seen[1:] + [model.weight.item()]
            expected = seen[0]
            for n, weight in enumerate(seen[1:], 1):
                d = min(decay, (1 + n) / (10 + n))
                expected = d * expected + (1 - d) * weight
            self.assertAlmostEqual(ema.weight.item(), expected, places=5)

    def test_learning_goes_on_from_its_state_bit_for_bit(self):
        """Logits, LoRA, optimiser, random numbers and history: all that a step depends on is in the file."""

        def learn(steps_before_the_stop=None):
            torch.manual_seed(0)
            state = tf.TrainingState(folder / "a.pt", {}, every=1)
            batches = tf.data_batches(data, 4, 0, start=state.step)
            loss_fn = tf.masked_denoising(tf.GaussianDiffusion(), batches)

            def on_step(step, metrics):
                if step == steps_before_the_stop:
                    os.kill(os.getpid(), signal.SIGINT)

            return tf.learn_layers(
                tiny_dit(), loss_fn, [(1, 2)] * 2, 10, lr=0.01, logits_lr=0.01, state=state, on_step=on_step
            )

        data = tf.ImageSet(torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8), torch.arange(20) % 3, [])
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            whole, history = learn()
            (folder / "a.pt").unlink()
            for stop in (3, 7):
                with self.assertRaises(KeyboardInterrupt):
                    learn(stop)
                self.assertEqual(tf.TrainingState(folder / "a.pt", {}, 1).step, stop + 1)
            again, same = learn()
        self.assertEqual(history, same)
        for a, b in zip(whole.parameters(), again.parameters()):
            self.assertTrue(torch.equal(a, b))

    def test_a_state_that_is_torn_or_of_other_settings_is_refused_and_a_full_disk_leaves_the_last_one(self):
        def fit(every, **more):
            model = nn.Linear(2, 1)
            state = tf.TrainingState(path, {"--seed": "0"}, every)
            return tf.train(model, lambda step: (model.weight.sum(), {}), 4, state=state, **more)

        def full(content, file):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a-state.pt"
            fit(3)
            whole = path.read_bytes()
            path.unlink()
            fit(1)
            self.assertEqual(tf.TrainingState(path, {"--seed": "0"}, 1).step, 4)
            path.write_bytes(whole)
            with mock.patch.object(tf.torch, "save", full), self.assertRaisesRegex(OSError, "No space"):
                fit(1)
            self.assertEqual((path.read_bytes(), os.listdir(folder)), (whole, ["a-state.pt"]))
            with self.assertRaisesRegex(tf.UserError, "--seed 0 .now 1."):
                tf.TrainingState(path, {"--seed": "1"}, 1)
            path.write_bytes(whole[:-100])
            with self.assertRaisesRegex(tf.UserError, "part of one"):
                tf.TrainingState(path, {"--seed": "0"}, 1)

    def test_parts_of_a_batch_and_two_processes_have_the_gradients_of_the_whole_batch(self):
        whole, ((*weights,),) = fixed_gradients()
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "script.py"
            script.write_text(
                "import sys, torch, tinyfusion as tf, test_tinyfusion as t\n"
                "with tf.processes():\n"
                "    found = t.fixed_gradients(int(sys.argv[1]))\n"
                "    tf.write_file(sys.argv[2], lambda file: torch.save(found, file))\n"
            )
            cases = [fixed_gradients(2)]
            for accumulate in ("1", "2"):
                done = torchrun(2, script, accumulate, Path(folder) / accumulate)
                self.assertEqual(done.returncode, 0, done.stderr)
                cases.append(torch.load(Path(folder) / accumulate, weights_only=True))
        for found, trained in cases:
            for step, (ours, theirs) in enumerate(zip(whole, found, strict=True)):
                for a, b in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * (1 + step))
            for process in trained:
                self.assertTrue(all(torch.equal(a, b) for a, b in zip(trained[0], process)))
                for a, b in zip(weights, process):
                    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        self.assertEqual([len(trained) for _, trained in cases], [1, 2, 2])

    def test_processes_meet_over_gloo_and_on_gpus_over_nccl_too(self):
        for cuda, backend in ((False, "gloo"), (True, "cpu:gloo,cuda:nccl")):
            with (
                mock.patch.dict(os.environ, {"WORLD_SIZE": "2", "RANK": "0"}),
                mock.patch.object(tf.torch.cuda, "is_available", lambda: cuda),
                mock.patch.object(tf.dist, "init_process_group") as meet,
                mock.patch.object(tf.dist, "destroy_process_group") as part,
            ):
                with tf.processes():
                    pass
                meet.assert_called_once_with(backend)
                part.assert_called_once_with()
        with mock.patch.dict(os.environ, {"WORLD_SIZE": "2"}), self.assertRaisesRegex(tf.UserError, "torchrun"):
            os.environ.pop("RANK", None)
            with tf.processes():
                pass

    def test_only_what_is_out_of_memory_is_called_so(self):
        def fail(error):
            raise error

        for error in (
            MemoryError(),
            torch.OutOfMemoryError("CUDA out of memory"),
            RuntimeError("can't allocate memory"),
        ):
            self.assertIn("--accumulate", status_and_words(lambda _: tf.guarded("x", lambda: fail(error)), [])[1])
        with self.assertRaisesRegex(RuntimeError, "illegal memory access"):
            tf.guarded("x", lambda: fail(RuntimeError("CUDA error: an illegal memory access was encountered")))

    def test_checkpointing_and_compiling_blocks_change_nothing_but_time_and_memory(self):
        teacher, diffusion = tiny_dit(), tf.GaussianDiffusion()
        data = tf.toy_digits(40, size=8)
        data.labels %= 3

        def both(**loop):
            torch.manual_seed(0)
            loss_fn = tf.masked_denoising(diffusion, tf.data_batches(data, 8, 0))
            sampler, _ = tf.learn_layers(teacher, loss_fn, [(1, 2)] * 2, 4, logits_lr=0.01, **loop)
            student = tf.recover(
                tf.prune(teacher, [0, 3]), teacher, diffusion, tf.data_batches(data, 8, 0), [(0, 1), (1, 3)], 4, **loop
            )
            return [*sampler.parameters(), *student.parameters()]

        plain = both()
        for a, b in zip(plain, both(checkpointing=True), strict=True):
            torch.testing.assert_close(a, b)
        compiled = []  # by a backend that compiles nothing: a C++ compiler may not be there
        with mock.patch.object(
            tf.DiTBlock, "compile", lambda block: (compiled.append(block), nn.Module.compile(block, backend="eager"))
        ):
            for a, b in zip(plain, both(compile=True), strict=True):
                torch.testing.assert_close(a, b)
        self.assertEqual(len(compiled), 6)

    def test_checkpointing_keeps_less_for_the_backward_pass(self):
        model = tiny_dit(depth=8)
        t, y = torch.randint(0, 1000, (8,)), torch.zeros(8, dtype=torch.long)

        def forward():
            return model(torch.randn(8, 1, 8, 8), t, y)

        plain = saved_megabytes(forward, model)
        tf.tune_blocks(model, checkpointing=True)
        self.assertLess(saved_megabytes(forward, model), 0.5 * plain)

    def test_training_in_bfloat16_keeps_weights_and_losses_in_float32(self):
        """What runs on CUDA by default, on the CPU: gradients near those in float32."""
        teacher, diffusion, data = tiny_dit(), tf.GaussianDiffusion(), tf.toy_digits(40, size=8)
        data.labels %= 3

        def gradients():
            torch.manual_seed(0)
            learner, sampler = copy.deepcopy(teacher), tf.LayerSampler([(1, 2)] * 2)
            loss_fn, seen = tf.masked_denoising(diffusion, tf.data_batches(data, 8, 0)), []

            def loss(step):
                losses = [loss_fn(learner, sampler)]
                student = tf.prune(learner, [0, 3])
                losses.append(tf.recovery_loss(student, teacher, diffusion, *next(batches), [(0, 1), (1, 3)])[0])
                seen.extend(loss.dtype for loss in losses)
                return losses[0], {}

            batches = tf.data_batches(data, 8, 0)
            params = [*(p for p in learner.parameters() if p.requires_grad), *sampler.parameters()]
            tf.train(learner, loss, 1, params=params)
            self.assertEqual(set(seen) | {p.dtype for p in params}, {torch.float32})
            return torch.cat([p.grad.flatten() for p in params if p.grad is not None])

        exact = gradients()
        with mock.patch.object(tf, "autocast", lambda *_: torch.autocast("cpu", torch.bfloat16)):
            rough = gradients()
        self.assertFalse(torch.equal(exact, rough))
        self.assertGreater(F.cosine_similarity(exact, rough, dim=0), 0.99)

    def test_a_write_that_fails_leaves_the_old_file_and_no_other(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.txt"
            tf.write_file(path, lambda file: file.write(b"old"))

            def fail(file):
                file.write(b"new")
                raise OSError("disk full")

            with self.assertRaisesRegex(OSError, "disk full"):
                tf.write_file(path, fail)
            self.assertEqual((path.read_bytes(), os.listdir(folder)), (b"old", ["a.txt"]))


class Files(unittest.TestCase):
    """Checkpoints in and out."""

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.path = self.folder / "model.pt"
        tf.save_checkpoint(self.path, tiny_dit(), {"steps": 3, "guidance": 1.0, "eta": 1.0}, ["a", "b", "c"])

    def test_a_checkpoint_comes_back_bit_for_bit_and_carries_its_configuration(self):
        model, checkpoint = tf.load_checkpoint(self.path)
        for name, weight in tiny_dit().state_dict().items():
            self.assertTrue(torch.equal(weight, model.state_dict()[name]))
        self.assertEqual((model.config(), model.training), (tiny_dit().config(), False))
        self.assertIn("ema", torch.load(self.path, weights_only=True))

    def test_checkpoints_of_the_official_layouts_load_bit_for_bit(self):
        torch.manual_seed(0)
        model, other = (tf.DiT_models["toy"](input_size=16, in_channels=c, num_classes=7, depth=3) for c in (4, 4))
        for p in (*model.parameters(), *other.parameters()):
            nn.init.normal_(p)
        weights, args = model.state_dict(), argparse.Namespace(model="DiT-XL/2", lr=1e-4)
        for layout in (
            weights,
            {"ema": weights, "model": other.state_dict(), "opt": {}, "args": args, "train_steps": 5},
            {"model": {f"module.{name}": weight for name, weight in weights.items()}, "args": args},
        ):
            torch.save(layout, self.path)
            loaded, checkpoint = tf.load_checkpoint(self.path)
            self.assertEqual((loaded.config(), len(checkpoint["classes"])), (model.config(), 7))
            for name, weight in weights.items():
                self.assertTrue(torch.equal(weight, loaded.state_dict()[name]), name)
        self.assertEqual([p.requires_grad for p in loaded.parameters()], [p.requires_grad for p in model.parameters()])
        latents = self.folder / "latents.npz"
        for more, status in ((["--out", str(latents)], 2), (["--npz", str(latents)], 0)):
            arguments = ["--ckpt", str(self.path), "--num-images", "2", "--steps", "2", *more]
            self.assertEqual(status_and_words(sample.main, arguments)[0], status)
        drawn = np.load(latents, allow_pickle=False)
        self.assertEqual((drawn.files, drawn["latents"].shape), (["latents"], (2, 4, 16, 16)))
        mar = tiny_mar(patch_size=1, in_channels=4, hidden_size=64, num_heads=4, dropout=0.1)
        torch.save(
            {"model": tiny_mar().state_dict(), "model_ema": mar.state_dict(), "epoch": 3, "args": args},
            self.folder / "mar.pt",
        )
        found, content = tf.load_checkpoint(self.folder / "mar.pt")
        self.assertEqual((found.config(), content["sampling"]["head_steps"]), (mar.config(), 100))
        self.assertTrue(all(torch.equal(weight, found.state_dict()[name]) for name, weight in mar.state_dict().items()))
        flags = ["--ckpt", str(self.folder / "mar.pt"), "--num-images", "2", "--head-steps", "2"]
        for more, status in ((["--vae", "x"], 2), (["--npz", str(latents), "--guidance", "1"], 0)):
            self.assertEqual(status_and_words(sample.main, [*flags, *more])[0], status)
        self.assertEqual(np.load(latents, allow_pickle=False)["latents"].shape, (2, 4, 8, 8))
        tf.save_checkpoint(self.path, loaded, checkpoint["sampling"], checkpoint["classes"])
        found = torch.load(self.path, weights_only=True)  # the official find_model, and a model of official names
        model.load_state_dict(found["ema"] if "ema" in found else found, strict=True)
        self.assertTrue(all(torch.equal(weight, found["ema"][name]) for name, weight in weights.items()))

    def test_the_size_of_official_models_is_told_from_their_shapes(self):
        for name, build in tf.ALL_MODELS.items():
            if name != "MAR-toy":  # official MARs have patch 1
                model = tf.unallocated(build)
                told = tf.config_of(model.state_dict())
                no_trace = {key: 0.1 for key in ("class_dropout_prob", "dropout") if key in model.config()}
                self.assertEqual(told | no_trace, model.config(), name)

    def test_bad_checkpoints_are_refused_in_one_line_and_nothing_is_run(self):
        class Attack:
            def __reduce__(self):
                return os.mkdir, (str(folder / "attacked"),)

        folder, good = self.folder, torch.load(self.path, weights_only=True)
        torch.save({"ema": Attack()}, folder / "attack.pt")
        torch.save(good["ema"], folder / "plain.pt")
        torch.save(good | {"config": good["config"] | {"depth": 5}}, folder / "depth.pt")
        torch.save(good | {"config": {"layers": 5}}, folder / "config.pt")
        torch.save({"weight": torch.zeros(3)}, folder / "other.pt")
        torch.save(good | {"config": good["config"] | {"hidden_size": 40_000_000}}, folder / "absurd.pt")
        torch.save(good | {"config": good["config"] | {"depth": 10**9}}, folder / "deep.pt")
        (folder / "torn.pt").write_bytes(self.path.read_bytes()[:-2000])
        (folder / "noise.pt").write_bytes(os.urandom(500))
        (folder / "empty.pt").write_bytes(b"")
        for name, reason in (
            ("missing.pt", "No such file"),
            ("attack.pt", "refused"),
            ("plain.pt", "width 16 is of no known model"),
            ("other.pt", "not the weights of a DiT"),
            ("absurd.pt", "pos_embed is .1, 4, 16., expected .1, 4, 40000000."),
            ("deep.pt", "1000000000 blocks with 52 weights"),
            ("depth.pt", "disagree"),
            ("config.pt", "disagree"),
            ("torn.pt", "part of one"),
            ("noise.pt", "part of one"),
            ("empty.pt", "part of one"),
            (".", "directory"),
        ):
            with self.assertRaisesRegex(tf.UserError, reason) as caught:
                tf.load_checkpoint(folder / name)
            self.assertNotIn("\n", str(caught.exception))
        self.assertFalse((folder / "attacked").exists())

    def test_the_same_seed_draws_the_same_image_whatever_the_batch_size(self):
        batches = []
        for size in ("6", "4", "1"):
            out = self.folder / f"{size}.npz"
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                self.assertEqual(
                    sample.main(
                        [
                            "--ckpt",
                            str(self.path),
                            "--num-images",
                            "6",
                            "--batch-size",
                            size,
                            "--npz",
                            str(out),
                            "--seed",
                            "3",
                            "--guidance",
                            "2",
                        ]
                    ),
                    0,
                )
            batches.append(np.load(out, allow_pickle=False)["arr_0"].astype(int))
        self.assertEqual((batches[0].shape, batches[0].min() >= 0), ((6, 8, 8, 3), True))
        self.assertGreater(batches[0].std(), 1)
        for other in batches[1:]:  # a rounding may tip a pixel by one level of 255
            self.assertLessEqual(abs(batches[0] - other).max(), 1)


def status_and_words(main, arguments):
    """The exit status of a command line called in this process, and what it said on stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
    return status, said.getvalue()


class Laboratory(unittest.TestCase):
    """Chapter 11."""

    def setUp(self):
        self.model, self.diffusion, self.groups = tiny_dit(), tf.GaussianDiffusion(), [(1, 2)] * 2
        data = tf.toy_digits(60, size=8)
        self.data = tf.ImageSet(data.images, data.labels % 3, ["a", "b", "c"])
        self.examples = tf.fixed_examples(self.diffusion, self.data, n=48)
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        quick = functools.partial(tf.train_classifier, steps=5)  # any judge will do here
        self.enterContext(mock.patch.object(tf, "train_classifier", quick))

    def laboratory(self):
        return tf.Laboratory(
            self.model,
            self.data,
            self.diffusion,
            tf.Notebook(self.folder / "notes.json", {"--seed": "0"}),
            batch_size=8,
            learning={"steps": 2},
            recovery={"steps": 2, "ema_decay": 0.9},
            samples=10,
            sampling={"steps": 2},
        )

    def test_fixed_examples_are_always_the_same_and_cover_all_timesteps(self):
        again = tf.fixed_examples(self.diffusion, self.data, n=48, batch_size=20)
        for a, b in zip(zip(*self.examples), zip(*again)):
            self.assertTrue(torch.equal(torch.cat(a), torch.cat(b)))
        t = torch.cat([t for _, _, t, _ in again])
        self.assertEqual((t.min().item(), t.max().item(), len(t.unique())), (0, 999, 48))

    def test_shortgpt_looks_at_direction_and_flux_lite_at_size(self):
        """Four blocks on two numbers: one that only scales, one that only turns, a small turn, and a last one."""

        class Block(nn.Module):
            def __init__(self, angle, scale):
                super().__init__()
                c, s = math.cos(angle) * scale, math.sin(angle) * scale
                self.matrix = torch.tensor([[c, s], [-s, c]])

            def forward(self, x):
                return x @ self.matrix

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([Block(0, 5), Block(1.0, 1), Block(0.5, 1), Block(0, 1)])

            def forward(self, x, t, y):
                x = x.view(len(x), 1, 2)
                for block in self.blocks:
                    x = block(x)
                return x.view(len(x), 2, 1, 1)

        examples = [(torch.randn(5, 2, 1, 1), None, torch.arange(5), torch.randn(5, 2, 1, 1))]
        arguments = Model(), [(2, 4)], self.diffusion, examples
        self.assertEqual(tf.shortgpt(*arguments), [1, 3])  # the largest turn, and the last block, which never goes
        self.assertEqual(tf.flux_lite(*arguments), [0, 1])  # they move by 4, 4.8, 2.5 and 0 lengths
        self.assertEqual([len(block._forward_hooks) for block in arguments[0].blocks], [0] * 4)

    def test_sensitivity_drops_the_blocks_whose_removal_costs_least(self):
        def loss(kept):
            torch.manual_seed(0)
            x0, y, t, noise = (torch.cat(part) for part in zip(*self.examples))
            model = tf.prune(self.model, kept)
            return self.diffusion.training_losses(model, x0, t, y, noise)["loss"].mean().item()

        losses = [loss([j for j in range(4) if j != i]) for i in range(4)]
        expected = sorted(sorted(range(4), key=lambda i: -losses[i])[:2])
        self.assertEqual(tf.sensitivity(self.model, self.groups, self.diffusion, self.examples), expected)
        self.assertAlmostEqual(tf.calibration_loss(self.model, self.diffusion, self.examples), loss(range(4)), places=5)

    def test_the_oracle_is_the_papers_for_28_blocks_and_refuses_what_is_not_half(self):
        depth_28 = mock.Mock(blocks=range(28))
        paper = [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27]
        self.assertEqual(tf.oracle(depth_28, [(2, 4)] * 7), paper)
        with self.assertRaisesRegex(ValueError, "one block of every pair, not 7 of 28"):
            tf.oracle(depth_28, [(1, 4)] * 7)

    def test_random_search_ranks_choices_of_the_groups_by_their_loss(self):
        found = []
        for place in (0, 0.5, 1):
            torch.manual_seed(0)
            found.append(tf.random_search(self.model, self.groups, self.diffusion, self.examples, place, tries=40))
        every = tf.every_choice(self.groups)
        self.assertEqual(every, [(0, 2), (0, 3), (1, 2), (1, 3)])
        ranked = sorted(
            every, key=lambda kept: tf.calibration_loss(tf.prune(self.model, kept), self.diffusion, self.examples)
        )
        self.assertEqual((tuple(found[0]), tuple(found[2])), (ranked[0], ranked[-1]))
        self.assertIn(tuple(found[1]), ranked[1:3])

    def test_too_many_choices_are_sampled(self):
        self.assertEqual(len(set(tf.every_choice([(1, 2)] * 6))), 64)
        sampled = tf.every_choice([(2, 4)] * 7)
        self.assertEqual({(len(kept), sum(i < 4 for i in kept)) for kept in sampled}, {(14, 2)})

    def test_a_notebook_does_a_job_once_even_after_a_stop(self):
        path, done = self.folder / "a.json", []

        def work():
            done.append(1)
            return {"kept": [1, 2]}

        for _ in range(2):
            notebook = tf.Notebook(path, {"--seed": "0"})
            self.assertEqual((notebook.once("a", work), notebook.once("a", work)), ({"kept": [1, 2]},) * 2)
        self.assertEqual(done, [1])
        with self.assertRaisesRegex(tf.UserError, "--seed 0 .now 1."):
            tf.Notebook(path, {"--seed": "1"})
        path.write_text(path.read_text()[:-5])
        with self.assertRaisesRegex(tf.UserError, "damaged"):
            tf.Notebook(path, {"--seed": "0"})

    def test_a_comparison_can_be_stopped_and_continued_and_recovers_every_mask_once(self):
        recovered, real = [], tf.Laboratory.recover_one

        def counted(lab, kept, seed, how):
            if len(recovered) == 2 and not stopped:
                stopped.append(True)
                raise KeyboardInterrupt
            recovered.append((tuple(kept), seed))
            return real(lab, kept, seed, how)

        stopped, said = [], io.StringIO()
        with mock.patch.object(tf.Laboratory, "recover_one", counted), contextlib.redirect_stdout(said):
            with contextlib.redirect_stderr(io.StringIO()):
                with self.assertRaises(KeyboardInterrupt):
                    tf.compare_criteria(self.laboratory(), self.groups, False, self.folder)
                tf.compare_criteria(self.laboratory(), self.groups, False, self.folder)
        self.assertEqual(len(recovered), len(set(recovered)))
        self.assertGreaterEqual({seed for _, seed in recovered}, {0, 1, 2})
        for words in (*tf.CRITERIA, *tf.RECIPES, "rank among 4", "Spearman", "±"):
            self.assertIn(words, said.getvalue())
        with Image.open(self.folder / "recoverability.png") as picture:
            self.assertGreater(np.asarray(picture.convert("L")).std(), 5)
        with mock.patch.object(tf.Laboratory, "recover_one", side_effect=AssertionError("again")):
            with contextlib.redirect_stdout(io.StringIO()) as again:
                tf.compare_criteria(self.laboratory(), self.groups, False, self.folder)
        self.assertEqual(said.getvalue(), again.getvalue())

    def test_groups_and_ways_to_recover_are_compared_and_share_what_is_done(self):
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
            tf.compare_groups(self.laboratory(), self.groups, False, self.folder)
            done = set(self.laboratory().notebook.jobs)
            tf.compare_recovery(self.laboratory(), self.groups, False, self.folder)
        new = set(self.laboratory().notebook.jobs) - done
        for words in ("1:2, lora", "2:4, frozen", "2:4, full", *tf.RECOVERIES, "Largest"):
            self.assertIn(words, said.getvalue())
        self.assertFalse([job for job in new if job.startswith("learned")], "groups has learned 1:2 with LoRA already")
        self.assertEqual(len(new), 3 * (len(tf.RECOVERIES) - 1), "and recovered it without a teacher")

    def test_spearmans_correlation_and_spreads_are_the_usual_ones(self):
        import scipy.stats

        a, b = np.random.default_rng(0).normal(size=(2, 30))
        self.assertAlmostEqual(tf.spearman(a, a + b), scipy.stats.spearmanr(a, a + b).statistic)
        self.assertEqual((tf.spread([1, 2, 3]), tf.spread([2.0], 1)), ("2.00 ± 1.00", "2.0"))
        self.assertEqual(tf.spread([1.0, math.inf]), "diverged (1 of 2)")

    def test_a_recovery_that_diverges_is_a_result_and_not_the_end(self):
        lab = self.laboratory()
        lab.recovery = {"steps": 5, "lr": 1e12}
        with contextlib.redirect_stderr(io.StringIO()):
            (result,) = lab.recover_all([((0, 2), 0, {})])
        self.assertEqual((result["toy_fid"], math.isfinite(result["loss_after_pruning"])), (math.inf, True))

    def test_an_injected_massive_activation_swamps_the_plain_feature_loss_and_not_the_masked_one(self):
        x, t, y = torch.randn(4, 1, 8, 8), torch.full((4,), 9), torch.zeros(4, dtype=torch.long)
        with torch.no_grad():
            out, (h,) = self.model(x, t, y, hidden=(1,))
            with_one, (g,) = tf.Injected(self.model, 50)(x, t, y, hidden=(1,))
        self.assertTrue(torch.equal(out, with_one))
        self.assertLess(tf.massive_activation(h).max(), 7)
        self.assertGreater(tf.massive_activation(g).min(), 7)
        other = h + 0.1 * torch.randn_like(h)
        self.assertGreater(tf.masked_feature_loss(other, g, math.inf), 100 * tf.masked_feature_loss(other, h, math.inf))
        near = tf.masked_feature_loss(other, g) / tf.masked_feature_loss(other, h)
        self.assertTrue(0.5 < near < 2, near)


class CommandLine(unittest.TestCase):
    """Chapter 12."""

    TINY = [
        "--teacher-steps",
        "3",
        "--learn-steps",
        "3",
        "--recover-steps",
        "3",
        "--samples",
        "10",
        "--sample-steps",
        "2",
        "--batch-size",
        "8",
        "--device",
        "cpu",
    ]

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def run_tiny(self, *more):
        return subprocess.run(
            [sys.executable, HERE / "tinyfusion.py", *self.TINY, "--out", self.folder / "run", *more],
            capture_output=True,
            text=True,
            timeout=300,
        )

    def test_one_command_tells_the_whole_story_and_the_next_one_reuses_it(self):
        first = self.run_tiny()
        self.assertEqual(first.returncode, 0, first.stderr)
        run = self.folder / "run"
        self.assertEqual(
            {p.name for p in run.iterdir()},
            {"teacher.pt", "layers.json", "student.pt", "results.json", "log.jsonl", "decisions.png", "samples.png"},
        )
        for words in ("teacher", "pruned", "student", "toy-FID", "speed-up", "guidance 1.5"):
            self.assertIn(words, first.stdout)
        self.assertEqual(
            {json.loads(line)["stage"] for line in (run / "log.jsonl").read_text().splitlines()},
            {"teacher", "learn", "recover"},
        )
        student = torch.load(run / "student.pt", weights_only=True)
        self.assertEqual((len(student["kept"]), student["config"]["depth"]), (6, 6))
        for name in ("decisions.png", "samples.png"):
            with Image.open(run / name) as picture:
                self.assertGreater(np.asarray(picture.convert("L")).std(), 5)
        for name, content in (("results.json", "{"), ("layers.json", '{"settings": {}}')):
            whole = (run / name).read_text()
            (run / name).write_text(content)
            status, words = status_and_words(tf.main, self.TINY + ["--out", str(run)])
            self.assertEqual((status, words.count("\n"), "damaged" in words), (2, 1, True), words)
            (run / name).write_text(whole)
        before = {p.name: p.stat().st_mtime_ns for p in run.iterdir()}
        second = self.run_tiny()
        self.assertEqual((second.returncode, second.stdout.count("is reused")), (0, 4))
        third = self.run_tiny("--recover-steps", "4", "--seed", "1")
        self.assertEqual(third.returncode, 2)
        self.assertIn("--seed 0 (now 1)", third.stderr)
        fourth = self.run_tiny("--recover-steps", "4")
        self.assertIn("--recover-steps 3 (now 4)", fourth.stderr)
        self.assertEqual(before, {p.name: p.stat().st_mtime_ns for p in run.iterdir()})
        drawn = subprocess.run(
            [
                sys.executable,
                HERE / "sample.py",
                "--ckpt",
                run / "student.pt",
                "--out",
                self.folder / "grid.png",
                "--labels",
                "3,1",
            ],
            capture_output=True,
            text=True,
        )
        self.assertEqual(drawn.returncode, 0, drawn.stderr)
        for wrong, reason in (
            (["--labels", "3,10"], "from 0 to 9"),
            (["--labels", "²"], "from 0 to 9"),
            (["--out", str(run)], "is a folder"),
            (["--npz", "a", "--out", "b"], "not allowed with"),
            (["--num-images", "9" * 20], "from 1 to 10000000"),
        ):
            status, words = status_and_words(sample.main, ["--ckpt", str(run / "student.pt"), *wrong])
            self.assertEqual((status, words.count("\n")), (2, 1), words)
            self.assertIn(reason, words)

    def test_other_criteria_and_named_blocks_can_take_the_place_of_learning(self):
        for flags, kept in (
            (["--criterion", "oracle"], [0, 2, 4, 7, 9, 11]),
            (["--kept", "0,1,2,3,11"], [0, 1, 2, 3, 11]),
            (["--criterion", "shortgpt", "--kd", "masked"], None),
        ):
            run = self.folder / flags[1]
            arguments = [*self.TINY, "--stages", "teacher,learn,recover", "--out", str(run), *flags]
            self.assertEqual(status_and_words(tf.main, arguments)[0], 0)
            student = torch.load(run / "student.pt", weights_only=True)
            self.assertEqual(student["kept"], kept or student["kept"])
            self.assertEqual(student["config"]["depth"], len(student["kept"]))
            self.assertFalse((run / "decisions.png").exists())
        self.assertEqual(student["kept"][-1], 11)

    def test_a_comparison_runs_from_the_command_line_and_refuses_another_teachers_notebook(self):
        arguments = [*self.TINY, "--compare", "recovery", "--quick", "--out", str(self.folder)]
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(tf.main(arguments), 0)
        self.assertIn("| masked KD, 2 sigma ", said.getvalue())
        self.assertEqual(status_and_words(tf.main, [*arguments, "--learn-steps", "4"])[0], 2)
        teacher = torch.load(self.folder / "teacher.pt", weights_only=True)
        teacher["ema"]["pos_embed"] += 1
        torch.save(teacher, self.folder / "teacher.pt")
        status, words = status_and_words(tf.main, arguments)
        self.assertEqual((status, "weights of checksum" in words), (2, True), words)

    def test_a_stage_can_be_run_alone_but_not_without_those_before_it(self):
        run = ["--out", str(self.folder / "run")]
        status, words = status_and_words(tf.main, self.TINY + run + ["--stages", "learn"])
        self.assertEqual(status, 2)
        self.assertIn("teacher.pt is not there", words)
        self.assertEqual(status_and_words(tf.main, self.TINY + run + ["--stages", "teacher"])[0], 0)
        self.assertFalse((self.folder / "run" / "layers.json").exists())
        self.assertEqual(status_and_words(tf.main, self.TINY + run + ["--stages", "learn"])[0], 0)

    def test_a_run_on_a_folder_of_images_measures_and_draws(self):
        for label in ("cat", "dog"):
            (self.folder / "pets" / label).mkdir(parents=True)
            for i in range(12):
                pixels = np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(self.folder / "pets" / label / f"{i}.png")
        done = self.run_tiny("--data", str(self.folder / "pets"), "--groups", "2:4,1:2,3:6")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("24 images", done.stdout)
        self.assertIn("(3, 16, 16), 2 classes", done.stdout)
        Image.new("RGB", (20, 30)).save(self.folder / "pets" / "cat" / "0.png")
        changed = self.run_tiny("--data", str(self.folder / "pets"), "--groups", "2:4,1:2,3:6")
        self.assertEqual((changed.returncode, "checksum" in changed.stderr), (2, True), "the pictures are others now")

    def test_bad_input_is_one_line_and_exit_status_2(self):
        (self.folder / "file").write_text("x")
        (self.folder / "empty").mkdir()
        for arguments, reason in (
            (["--teacher-steps", "0"], "expected a whole number of at least 1"),
            (["--learn-steps", "-5"], "at least 1"),
            (["--samples", "x"], "expected a whole number"),
            (["--guidance", "nan"], "expected a number"),
            (["--groups", "1:5"], "do not divide a depth of 12"),
            (["--groups", "two"], "not a list of N:M"),
            (["--model", "DiT-Q"], "choose from"),
            (["--kd", "x"], "choose from"),
            (["--stages", "x"], "expected some of"),
            (["--image-size", "18"], "no multiple"),
            (["--device", "cuda:77"], "not on this machine"),
            (["--device", "banana"], "not on this machine"),
            (["--device", "meta"], "not on this machine"),
            (["--out", ""], "got nothing"),
            (["--guidance", "1e308"], "up to a billion"),
            (["--teacher-steps", "1" + "0" * 99], "up to a billion"),
            (["--out", str(self.folder / "file" / "x")], "cannot be written"),
            (["--data", str(self.folder / "nothing")], "no such folder"),
            (["--data", str(self.folder / "empty")], "class folder"),
            (["--batch-size", "6000"], "5000 images are too few"),
            (["--nonsense"], "unrecognized"),
            (["--quick"], "--quick goes with --compare"),
            (["--kept", "0,1", "--criterion", "oracle"], "give one of them"),
            (["--kept", "3,2"], "ascending"),
            (["--kept", "0,12"], "blocks 0 to 11"),
            (["--criterion", "best"], "choose from"),
            (["--criterion", "oracle", "--groups", "1:4"], "keeps half of the blocks"),
            (["--compare", "criteria", "--kd", "none"], "leave out --kd"),
            (["--encode", "x"], "--encode goes with --vae"),
            (["--measure", "all"], "expected some of teacher,pruned,student"),
        ):
            status, words = status_and_words(tf.main, ["--out", str(self.folder / "run"), *arguments])
            self.assertEqual((status, words.count("\n")), (2, 1), (arguments, words))
            self.assertIn(reason, words)
        self.assertFalse((self.folder / "run" / "teacher.pt").exists())

    def test_an_official_checkpoint_of_latents_becomes_a_student_and_that_a_shallower_one(self):
        torch.manual_seed(0)
        model = tf.DiT_models["toy"](input_size=4, in_channels=4, num_classes=10, depth=8)
        for p in model.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.05)
        torch.save({"ema": model.state_dict(), "args": argparse.Namespace(lr=1)}, self.folder / "official.pt")
        rng, out, data = np.random.default_rng(0), self.folder / "d4", self.folder / "data"
        for path in (data, self.folder / "images"):
            path.mkdir()
        np.save(data / "latents.npy", rng.normal(size=(40, 2, 4, 4, 4)).astype(np.float32))
        np.save(data / "labels.npy", np.arange(40) % 5)
        for i in range(12):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(self.folder / "images" / f"{i}.png")
        torch.jit.script(StandIn()).save(self.folder / "net.pt")
        np.savez(self.folder / "wide.npz", mu=np.zeros(3), sigma=np.eye(3))
        flags = [*self.TINY, "--data", str(data), "--vae", "toy", "--inception", str(self.folder / "net.pt")]
        flags += ["--ref", str(self.folder / "images"), "--measure", "teacher,student", "--accumulate", "2"]
        with mock.patch.object(tf, "VAE", ToyVAE), contextlib.redirect_stdout(io.StringIO()) as said:
            with contextlib.redirect_stderr(io.StringIO()) as words:
                for ckpt, run in ((self.folder / "official.pt", out), (out / "student.pt", self.folder / "d2")):
                    status = tf.main([*flags, "--ckpt", str(ckpt), "--out", str(run)])
                    self.assertEqual(status, 0, words.getvalue())
        for name, weight in tf.load_checkpoint(out / "teacher.pt")[0].state_dict().items():
            self.assertTrue(torch.equal(weight, model.state_dict()[name]), name)
        self.assertEqual(
            [len(tf.load_checkpoint(self.folder / r / "student.pt")[0].blocks) for r in ("d4", "d2")], [4, 2]
        )
        for part in ("| FID | IS |", "sample-steps 2, guidance 1.5", "Features of net.pt", "| student | 4 |"):
            self.assertIn(part, " ".join(said.getvalue().split()))
        kept = json.loads((out / "results.json").read_text())["rows"]
        self.assertEqual((list(kept), math.isfinite(kept["student"]["fid"])), (["teacher", "student"], True))
        saved = tf.statistics_of(out / "student-statistics.npz")
        self.assertEqual((saved.content["count"], len(saved.content["features"][0])), (10, 10))
        with Image.open(out / "samples.png") as picture:
            self.assertGreater(np.asarray(picture.convert("L")).std(), 5)
        shallow = ["--data", str(data), "--ckpt", str(self.folder / "official.pt"), "--compare", "groups"]
        self.assertIn("takes no latents", status_and_words(tf.main, [*self.TINY, *shallow])[1])
        for wrong, reason in (
            (["--groups", "3:5"], "do not divide a depth of 8"),
            (["--model", "DiT-S/2"], "give one of them"),
            (["--accumulate", "3"], "cannot be cut into 3"),
            (["--data", str(self.folder / "nothing")], "no such folder"),
            (["--ref", str(self.folder / "nothing")], "expected a folder"),
            (["--ref", str(self.folder / "nothing.npz")], "No such file"),
            (["--inception", ""], "got nothing"),
            (["--compare", "groups"], "leave out --accumulate"),
            (["--ref", str(self.folder / "wide.npz")], "has 3 features"),
            (["--ckpt", str(data / "labels.npy")], "not a PyTorch file"),
        ):
            arguments = [*flags, "--ckpt", str(self.folder / "official.pt"), "--out", str(self.folder / "x"), *wrong]
            with mock.patch.object(tf, "VAE", ToyVAE):
                status, words = status_and_words(tf.main, arguments)
            self.assertEqual((status, words.count("\n"), reason in words), (2, 1, True), words)
        short = [*self.TINY, "--data", str(data), "--out", str(self.folder / "x")]
        status, words = status_and_words(tf.main, short)
        self.assertEqual((status, "--vae, --inception and --ref" in words), (2, True), words)
        digits = [*self.TINY, "--ckpt", str(self.folder / "official.pt"), "--out", str(self.folder / "x")]
        self.assertIn("give a folder of latents as --data", status_and_words(tf.main, digits)[1])
        pixels = tf.DiT_models["toy"](input_size=16, in_channels=3, num_classes=10, depth=2)
        torch.save(pixels.state_dict(), self.folder / "official.pt")
        self.assertIn("--ckpt is for 10 classes of (3, 16, 16)", status_and_words(tf.main, digits)[1])

    def test_flow_matching_runs_from_the_command_line_and_its_checkpoints_tell(self):
        run = ["--out", str(self.folder / "flow"), "--objective", "flow"]
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(tf.main([*self.TINY, *run]), 0)
        self.assertIn("solver heun", said.getvalue())
        student = str(self.folder / "flow" / "student.pt")
        content = torch.load(student, weights_only=True)
        self.assertEqual((content["objective"], content["sampling"]["solver"]), ("flow", "heun"))
        torch.save(content["ema"], self.folder / "official.pt")  # the layout of official SiT checkpoints
        drawn = []
        for more in (["--ckpt", student], ["--ckpt", str(self.folder / "official.pt"), "--objective", "flow"]):
            out, flags = self.folder / f"{len(drawn)}.npz", ["--steps", "3", "--guidance", "1.5", "--solver", "euler"]
            self.assertEqual(status_and_words(sample.main, [*more, *flags, "--npz", str(out)])[0], 0)
            drawn.append(np.load(out, allow_pickle=False)["arr_0"])
        self.assertLessEqual(np.abs(np.subtract(*drawn, dtype=int)).max(), 1)
        for main, arguments, reason in (
            (sample.main, ["--ckpt", student, "--objective", "ddpm"], "trained with objective flow"),
            (sample.main, ["--ckpt", student, "--eta", "0"], "objective of"),
            (tf.main, ["--ckpt", student, "--objective", "ddpm"], "has the objective flow"),
            (tf.main, [*run, "--eta", "0"], "--eta is of objective ddpm"),
            (tf.main, ["--solver", "euler"], "--solver is of objective flow"),
            (tf.main, ["--head-steps", "5"], "--head-steps is of objective mar"),
            (tf.main, ["--model", "MAR-toy", "--objective", "flow"], "has the objective mar"),
        ):
            status, words = status_and_words(main, arguments)
            self.assertEqual((status, words.count("\n"), reason in words), (2, 1, True), words)

    def test_a_mar_runs_from_the_command_line_and_its_student_can_be_drawn_from(self):
        run, tiny = self.folder / "mar", ["--teacher-steps", "3", "--head-steps", "3", "--model", "MAR-toy"]
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(tf.main([*self.TINY, *tiny, "--out", str(run)]), 0)
        self.assertIn("guidance 1.5, head-steps 3, temperature 1.0, seed 0", said.getvalue())
        rows = json.loads((run / "results.json").read_text())["rows"]
        self.assertEqual([row["depth"] for row in rows.values()], [12, 6, 6])
        content, out = torch.load(run / "student.pt", weights_only=True), str(self.folder / "mar.npz")
        self.assertEqual((content["objective"], content["sampling"]["head_steps"]), ("mar", 3))
        self.assertEqual(content["config"]["encoder_depth"] + content["config"]["decoder_depth"], 6)
        flags = ["--ckpt", str(run / "student.pt"), "--num-images", "3", "--npz", out]
        self.assertEqual(status_and_words(sample.main, [*flags, "--steps", "3", "--temperature", "0.9"])[0], 0)
        self.assertEqual(np.load(out, allow_pickle=False)["arr_0"].shape, (3, 16, 16, 3))
        shallower = ["--ckpt", str(run / "student.pt"), "--out", str(self.folder / "again"), "--head-steps", "3"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(tf.main([*self.TINY, *shallower]), 0)
        again = torch.load(self.folder / "again" / "student.pt", weights_only=True)
        self.assertEqual(again["config"]["encoder_depth"] + again["config"]["decoder_depth"], 3)
        for main, arguments, reason in (
            (sample.main, [*flags, "--steps", "17"], "expected 1 to 16"),
            (sample.main, [*flags, "--eta", "0"], "which has none"),
            (sample.main, [*flags, "--objective", "flow"], "trained with objective mar"),
            (tf.main, ["--model", "MAR-toy", "--sample-steps", "17", "--out", str(self.folder / "x")], "opens a token"),
        ):
            status, words = status_and_words(main, arguments)
            self.assertEqual((status, words.count("\n"), reason in words), (2, 1, True), words)

    def test_a_mar_of_few_tokens_takes_fewer_steps_and_a_foreign_objective_is_refused(self):
        flags = [
            *self.TINY[:8],
            *self.TINY[10:],
            "--model",
            "MAR-toy",
            "--head-steps",
            "2",
            "--out",
            str(self.folder / "small"),
        ]
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(tf.main([*flags, "--image-size", "4"]), 0)
        self.assertIn("sample-steps 1,", said.getvalue())
        content = torch.load(self.folder / "small" / "student.pt", weights_only=True)
        for objective in ("ddpm", "foo", [3]):
            torch.save(content | {"objective": objective}, self.folder / "foreign.pt")
            for main in (tf.main, sample.main):
                status, words = status_and_words(main, ["--ckpt", str(self.folder / "foreign.pt")])
                self.assertEqual((status, words.count("\n"), "mar for a MAR alone" in words), (2, 1, True), words)

    def test_two_processes_run_the_whole_story_and_draw_the_images_of_one(self):
        run, killed = self.folder / "two", self.folder / "killed"
        command = [HERE / "tinyfusion.py", *self.TINY, "--teacher-steps", "60", "--save-every", "1", "--out"]
        done = torchrun(2, *command, run)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout.count("kept blocks"), 1, "one process speaks")
        self.assertEqual(
            {p.name for p in run.iterdir()},
            {"teacher.pt", "layers.json", "student.pt", "results.json", "log.jsonl", "decisions.png", "samples.png"},
        )
        two = json.loads((run / "results.json").read_text())["rows"]
        (run / "results.json").unlink()
        self.assertEqual(status_and_words(tf.main, [str(word) for word in (*command[1:], run)])[0], 0)
        one = json.loads((run / "results.json").read_text())["rows"]
        for name, row in one.items():
            for key in ("fid", "accuracy", "precision"):
                self.assertLess(abs(two[name][key] - row[key]), 1e-2 * (1 + row[key]), (name, key))
        with subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command, killed],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
        ):  # fmt: skip
            while not (killed / "teacher-state.pt").exists():
                time.sleep(0.01)
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    words = (process / "cmdline").read_bytes()
                    if str(killed).encode() in words and b"torch.distributed.run" not in words:
                        os.kill(int(process.name), signal.SIGKILL)
        self.assertFalse((killed / "teacher.pt").exists())
        more = ["--stages", "teacher,learn,recover"]
        self.assertIn("goes on after step", torchrun(2, *command, killed, *more).stdout)
        whole, again = (torch.load(folder / "student.pt", weights_only=True) for folder in (run, killed))
        self.assertTrue(all(torch.equal(weight, again["ema"][name]) for name, weight in whole["ema"].items()))
        odd = torchrun(2, HERE / "tinyfusion.py", *self.TINY, "--out", run, "--batch-size", "7")
        self.assertIn("cannot be cut into 2 parts", odd.stderr)

    def test_a_diverging_run_says_where_and_keeps_the_weights_from_before(self):
        status, words = status_and_words(tf.main, self.TINY + ["--out", str(self.folder), "--teacher-lr", "1e9"])
        self.assertEqual(status, 2, words)
        self.assertIn("teacher stopped: at step", words)
        model, _ = tf.load_checkpoint(self.folder / "teacher-stopped.pt")
        self.assertTrue(all(weight.isfinite().all() for weight in model.state_dict().values()))
        self.assertFalse((self.folder / "teacher.pt").exists())

    def test_ctrl_c_ends_within_two_seconds_with_whole_files_only(self):
        run = subprocess.Popen(
            [sys.executable, HERE / "tinyfusion.py", "--out", self.folder / "run", "--device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        log, limit = self.folder / "run" / "log.jsonl", time.time() + 60
        while time.time() < limit and not (log.exists() and log.read_text()):
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        start = time.time()
        _, words = run.communicate(timeout=30)
        self.assertLess(time.time() - start, 2)
        self.assertEqual(run.returncode, 130)
        self.assertIn("stopped", words)
        self.assertNotIn("Traceback", words)
        self.assertEqual({p.name for p in (self.folder / "run").iterdir()}, {"log.jsonl", "teacher-state.pt"})

    def test_a_run_killed_again_and_again_ends_bit_for_bit_like_one_never_stopped(self):
        command = [sys.executable, HERE / "tinyfusion.py", *self.TINY, "--stages", "teacher,learn,recover"]
        command += ["--teacher-steps", "100", "--learn-steps", "40", "--recover-steps", "40", "--save-every", "7"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        subprocess.run([*command, "--out", self.folder / "whole"], check=True, **quiet)
        folder, wait = self.folder / "killed", np.random.default_rng(0).uniform(0, 0.5, 4)
        for number, seconds in zip((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT), wait):
            run = subprocess.Popen([*command, "--out", folder], **quiet)
            before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.pt")}
            while run.poll() is None and {p.name: p.stat().st_mtime_ns for p in folder.glob("*.pt")} == before:
                time.sleep(0.01)  # until it has come further
            time.sleep(seconds)
            run.send_signal(number)
            run.communicate()
            self.assertIn(run.returncode, (-signal.SIGKILL, 130))
        subprocess.run([*command, "--out", folder], check=True, **quiet)
        for name in ("teacher.pt", "student.pt"):
            whole, again = (torch.load(self.folder / run / name, weights_only=True) for run in ("whole", "killed"))
            for key, weight in whole["ema"].items():
                self.assertTrue(torch.equal(weight, again["ema"][key]), (name, key))
        self.assertEqual(
            (self.folder / "whole/layers.json").read_text(), (self.folder / "killed/layers.json").read_text()
        )
        self.assertEqual(
            {p.name for p in (self.folder / "killed").iterdir()}, {p.name for p in (self.folder / "whole").iterdir()}
        )


# The benchmark. What is timed is what is tested: the dense oracle above against the exact skip, and so on.


def race(jobs, rounds, device):
    """The seconds (rounds,) of each of `jobs`, a dict of functions. They take turns, so that a busy machine slows all
    of them alike; the first turn is not counted."""
    times = {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: np.array(seconds[1:]) for name, seconds in times.items()}


def summary(seconds, plain=None):
    """Median, spread = (max - min) / median, and the median ratio to the same turn of `plain`."""
    median = float(np.median(seconds))
    row = {"seconds": median, "spread": float(np.ptp(seconds) / median)}
    return row if plain is None else row | {"ratio": float(np.median(plain / seconds))}


def saved_megabytes(forward, model):
    """What forward() saves for its backward pass, each storage once, the weights of `model` not counted."""
    weights, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (saved.update({tensor.untyped_storage().data_ptr(): tensor}), tensor)[1], lambda tensor: tensor
    ):
        loss = forward()
    del loss
    return sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in weights) / 1e6


def block_flops(model, batch):
    """Floating-point operations of one block's forward pass: 12 D^2 weights per token, and attention."""
    T, D = model.pos_embed.shape[1:]
    return batch * (2 * T * 12 * D * D + 4 * T * T * D)


def bench_learning(model, x0, y, rounds, rate):
    """The learning step (forward, backward, AdamW) with the dense formula, with the exact skip, and with the skip that
    runs a quarter of the dropped examples. On the CPU, memory is what the forward pass saves for the backward pass."""
    diffusion, L, jobs, forwards, flops = tf.GaussianDiffusion(), len(model.blocks), {}, {}, {}

    def dense(blocks, x, *args, mask, hidden, dropped_share):
        return dense_forward(blocks, x, mask, *args), []

    def forward(learner, sampler, version, share):
        with mock.patch.object(tf, "masked_forward", version):
            masked = functools.partial(learner, mask=sampler(len(x0)), dropped_share=share)
            return diffusion.training_losses(masked, x0, diffusion.sample_t(len(x0), x0.device), y)["loss"].mean()

    def step(run, optimizer):
        optimizer.zero_grad()
        run().backward()
        optimizer.step()

    for update, n, m in (("full", 1, 2), ("lora", 1, 2), ("full", 1, 4)):
        learner, sampler = copy.deepcopy(model).train(), tf.LayerSampler([(n, m)] * (L // m)).to(x0.device)
        if update == "lora":
            tf.add_lora(learner)
        weights = [p for p in (*learner.parameters(), *sampler.parameters()) if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)
        back, case = (1 if update == "lora" else 2), f"{update} {n}:{m}"  # a backward pass, in forward passes
        passes = {
            "dense": 1 + back,
            "skip": 1 + back * n / m,
            "skip, a quarter": n / m + (1 - n / m) / 4 + back * n / m,
        }
        for name, version, share in (("dense", dense, 1), ("skip", tf.masked_forward, 1),
                                     ("skip, a quarter", tf.masked_forward, 0.25)):  # fmt: skip
            forwards[case, name] = functools.partial(forward, learner, sampler, version, share), learner
            jobs[case, name] = functools.partial(step, forwards[case, name][0], optimizer)
            flops[case, name] = L * block_flops(model, len(x0)) * passes[name]
    rows, times = {}, race(jobs, rounds, x0.device)
    for (case, name), seconds in times.items():
        row = summary(seconds, times[case, "dense"]) | {"saved_MB": saved_megabytes(*forwards[case, name])}
        row["share_of_matmul"] = flops[case, name] / row["seconds"] / rate
        row["memory_ratio"] = row["saved_MB"] / rows.setdefault(case, {}).setdefault("dense", row)["saved_MB"]
        rows[case][name] = row
        print(
            f"learn {case} {name:16} {row['seconds']:.3f} s ({row['spread']:.0%}): {row['ratio']:.2f}x; "
            f"{row['saved_MB']:.0f} MB saved: {row['memory_ratio']:.2f}; {row['share_of_matmul']:.0%} of matmul"
        )
    return rows


def bench_recovery(model, student, x0, y, pairs, rounds):
    """The fine-tuning step: forward of the teacher, forward and backward of the student, AdamW."""
    pupil, diffusion = copy.deepcopy(student), tf.GaussianDiffusion()
    optimizer = torch.optim.AdamW([p for p in pupil.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def step(kd):
        optimizer.zero_grad()
        tf.recovery_loss(pupil, model, diffusion, x0, y, pairs, kd)[0].backward()
        optimizer.step()

    times = race({kd: functools.partial(step, kd) for kd in ("masked", "none")}, rounds, x0.device)
    rows = {kd: summary(seconds) for kd, seconds in times.items()}
    print("recover", *(f" {kd} {row['seconds']:.3f} s ({row['spread']:.0%})" for kd, row in rows.items()))
    return rows


def bench_sampling(model, student, x0, y, rounds, rate, steps=2):
    """Sampling by teacher and student without guidance, in float32 and in bfloat16."""

    def draw(net, dtype):
        tf.GaussianDiffusion().sample(net, y, lambda: torch.randn_like(x0), steps=steps, dtype=dtype)

    nets, dtypes = {"teacher": model, "student": student}, (torch.float32, torch.bfloat16)
    jobs = {(name, dtype): functools.partial(draw, net, dtype) for dtype in dtypes for name, net in nets.items()}
    times, rows, ideal = race(jobs, 2 * rounds, x0.device), {}, len(model.blocks) / len(student.blocks)
    for (name, dtype), seconds in times.items():
        row = summary(seconds, times["teacher", dtype])
        row["images_per_second_at_250_steps"] = len(x0) * steps / row["seconds"] / 250
        row["over_float32"] = float(np.median(times[name, torch.float32] / seconds))
        row["share_of_float32_matmul"] = (
            len(nets[name].blocks) * block_flops(model, len(x0)) * steps / row["seconds"] / rate
        )
        rows[f"{name} {dtype}"] = row
        print(
            f"sample {name} {str(dtype)[6:]:9} {row['images_per_second_at_250_steps']:.4f} images/s at 250 steps "
            f"({row['spread']:.0%}): {row['ratio']:.2f}x the teacher's; {row['over_float32']:.2f}x float32; "
            f"{row['share_of_float32_matmul']:.0%} of float32 matmul"
        )
    print(f"                  the ideal, blocks of the teacher over blocks of the student, is {ideal:.2f}x")
    return rows


def bench_frechet():
    """The Frechet distance at 2048 features against the general matrix square root."""
    rng, found = np.random.default_rng(0), []
    (m1, s1), (m2, s2) = (
        (x.mean(0), np.cov(x.T))
        for x in (rng.normal(size=(6000, 2048)) * rng.uniform(0.5, 2, 2048), rng.normal(size=(6000, 2048)) + 0.1)
    )

    def general():
        found.append(((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real))

    def ours():
        found.append(tf.frechet_distance(m1, s1, m2, s2))

    cpu = torch.device("cpu")
    slow, fast = race({"": general}, 1, cpu)[""], race({"": ours}, 3, cpu)[""]
    row = {"sqrtm_seconds": float(slow[0]), **summary(fast, slow), "relative_difference": abs(found[-1] / found[0] - 1)}
    print(
        f"Frechet distance at 2048: sqrtm {slow[0]:.2f} s, ours {row['seconds']:.2f} s ({row['spread']:.0%}): "
        f"{row['ratio']:.1f}x; relative difference {row['relative_difference']:.0e}"
    )
    return row


def bench(arguments):
    """Time what tinyfusion.py claims to be fast, interleaved in one process; medians, and in brackets their spread."""
    parser = tf.Parser(prog="test_tinyfusion.py --bench", description=bench.__doc__)
    parser.add_argument(
        "--model", choices=tuple(tf.DiT_models), default="DiT-S/2", metavar="NAME", help="shapes (DiT-S/2)"
    )
    parser.add_argument("--batch-size", type=tf.number(int, 2), default=8, metavar="N", help="examples per step (8)")
    parser.add_argument("--rounds", type=tf.number(int, 1), default=3, metavar="N", help="timed rounds (3)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda ... (the first GPU if there is one)")
    parser.add_argument("--json", default="bench.json", metavar="FILE", help="the figures as JSON (bench.json)")
    args = parser.parse_args(arguments)
    device = tf.pick_device(args.device)
    torch.manual_seed(0)
    model = tf.DiT_models[args.model]().to(device).eval()
    for p in model.parameters():  # the official start is the zero function
        if p.requires_grad and not p.any():
            nn.init.normal_(p, std=0.02)
    shape = (args.batch_size, model.in_channels, model.input_size, model.input_size)
    x0, y, kept = (
        torch.randn(shape, device=device),
        torch.arange(args.batch_size, device=device),
        list(range(0, len(model.blocks), 2)),
    )
    student, pairs = tf.prune(model, kept), tf.match_blocks([(1, 2)] * len(kept), kept)
    rates = {}  # the machine's own: the best of several matrix products
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(2048, 2048, device=device).to(dtype)
        rates[dtype] = 8 * 2048**3 / race({"": lambda: [a @ a for _ in range(4)]}, 10, device)[""].min()
    machine = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU with {torch.get_num_threads()} threads"
    )
    print(
        f"{args.model}, batch {args.batch_size}, {machine}, torch {torch.__version__}, {args.rounds} rounds; matmul "
        f"{rates[torch.float32] / 1e9:.0f} GFLOP/s in float32, {rates[torch.bfloat16] / 1e9:.0f} in bfloat16"
    )
    rate = rates[torch.float32]
    result = {
        "model": args.model,
        "batch_size": args.batch_size,
        "machine": machine,
        "torch": torch.__version__,
        "rounds": args.rounds,
        "matmul_flops_per_second": {str(dtype): value for dtype, value in rates.items()},
        "learn": bench_learning(model, x0, y, args.rounds, rate),
        "recover": bench_recovery(model, student, x0, y, pairs, args.rounds),
        "sample": bench_sampling(model, student, x0, y, args.rounds, rate),
        "frechet": bench_frechet(),
    }
    tf.write_file(args.json, lambda file: file.write(json.dumps(result, indent=1).encode()))
    return 0


if __name__ == "__main__":
    if "--bench" in sys.argv[1:]:
        sys.exit(tf.guarded("test_tinyfusion.py", lambda: bench([word for word in sys.argv[1:] if word != "--bench"])))
    program = unittest.main(exit=False)
    failed = len(program.result.failures) + len(program.result.errors)
    print(f"{program.result.testsRun - failed} passed, {failed} failed")
    sys.exit(failed > 0)
