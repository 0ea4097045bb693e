"""Draw images from a checkpoint of tinyfusion.py, or an official one (for SiT add --model SiT-XL/2).

    python sample.py --ckpt runs/toy/student.pt                          ten images of every class, as sample.png
    python sample.py --ckpt runs/toy/student.pt --labels 3,1,4 --num-images 30 --seed 7 --out pi.png
    python sample.py --ckpt runs/toy/student.pt --num-images 5000 --npz a.npz         an ADM batch, for any FID program
"""

import inspect
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from tinyfusion import (PRESETS, VAE, Parser, UserError, compile_blocks, guarded, image_grid, load_checkpoint,
                        objective_of, pick_device, progress, sample_images, to_uint8, write_file, write_png)


def parse_args(argv=None):
    """The flags as a namespace."""
    parser = Parser(prog="sample.py", allow_abbrev=False, description="Draw images from a checkpoint of tinyfusion.py.")
    add = parser.add_argument
    add("--ckpt", required=True, metavar="FILE", help="checkpoint, e.g. runs/toy/student.pt")
    add("--model", choices=PRESETS, metavar="NAME", help="only for official SiT files, such as SiT-XL/2")
    add("--labels", metavar="LIST", help="class numbers in turn, as in 3,1,4 (all classes)")
    add("--num-images", type=int, metavar="N", help="images (10 per label)")
    add("--steps", type=int, metavar="N", help="sampling steps (the checkpoint's)")
    add("--guidance", type=float, metavar="X", help="guidance scale, 1 is without (the checkpoint's)")
    add("--eta", type=float, metavar="X", help="DiT: 1 is DDPM, 0 is DDIM (1)")
    add("--solver", choices=("euler", "heun"), metavar="NAME", help="SiT: euler, or heun, two calls a step (heun)")
    add("--head-steps", type=int, metavar="N", help="MAR: steps of its head (the checkpoint's)")
    add("--temperature", type=float, metavar="X", help="MAR: a factor of the noise of its head's steps (1)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the noise (0)")
    add("--batch-size", type=int, default=100, metavar="N", help="images at once (100)")
    write = parser.add_mutually_exclusive_group().add_argument
    write("--out", default="sample.png", metavar="FILE", help="PNG grid (sample.png)")
    write("--npz", metavar="FILE", help="instead an ADM batch: arr_0, uint8, NHWC, all in memory")
    add("--vae", metavar="NAME", help="autoencoder of latents, on Hugging Face or a folder (needs diffusers)")
    add("--dtype", choices=("float32", "bfloat16"), help="of matrix products (bfloat16 on CUDA, float32 elsewhere)")
    add("--compile", action="store_true", help="torch.compile the blocks: a slow start, faster images")
    add("--device", metavar="NAME", help="cpu, cuda ... (the first GPU if there is one)")
    return parser.parse_args(argv)


def choose_labels(words, num_classes):
    """"3,1,4" to [3, 1, 4]; None to all classes. Raises UserError for what is not a class."""
    if words is None:
        return list(range(num_classes))
    labels = [int(word) if word.strip().isdecimal() else -1 for word in words.split(",")]
    if min(labels) < 0 or max(labels) >= num_classes:
        raise UserError(f"--labels {words}: expected class numbers from 0 to {num_classes - 1}, as in 0,1")
    return labels


def choose_decoder(args, model, device):
    """The function that turns what `model` draws into what is written. Raises UserError where flags do not fit."""
    C = model.in_channels
    if args.vae and C not in (1, 3):
        return VAE(args.vae, device, C).decode
    if args.vae or (C not in (1, 3) and not args.npz):
        raise UserError(f"{args.ckpt} draws {C} channels: 1 or 3 need no --vae; others need it, or --npz FILE")
    return to_uint8 if C in (1, 3) else lambda latents: latents


def choose_sampling(args, checkpoint, diffusion):
    """The arguments of the objective's `sample`. Raises UserError for a flag that this objective does not have."""
    given = {name: getattr(args, name) for name in ("steps", "guidance", "eta", "solver", "head_steps", "temperature")}
    sampling = checkpoint["sampling"] | {name: value for name, value in given.items() if value is not None}
    unknown = sampling.keys() - inspect.signature(diffusion.sample).parameters
    if unknown:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unknown)
        raise UserError(f"{args.ckpt} is a {checkpoint['name']}, which has no {flags}: leave it out")
    return sampling | ({"dtype": getattr(torch, args.dtype)} if args.dtype else {})


def run(args):
    """Draw the images and write them."""
    device = pick_device(args.device)
    target = Path(args.npz or args.out)
    if not target.parent.is_dir() or target.is_dir() or target.suffix != (".npz" if args.npz else ".png"):
        raise UserError(f"{target}: expected, in a folder that is there, a .png file for --out, a .npz file for --npz")
    tempfile.TemporaryFile(dir=target.parent).close()        # a folder that cannot be written is named before the work
    model, checkpoint = load_checkpoint(args.ckpt, device, args.model)
    if args.compile:
        compile_blocks(model)
    decode = choose_decoder(args, model, device)
    diffusion = objective_of(checkpoint["objective"], model)
    sampling = choose_sampling(args, checkpoint, diffusion)
    chosen = choose_labels(args.labels, model.num_classes)
    N = args.num_images or 10 * len(chosen)
    labels = torch.tensor(np.resize(chosen, N))          # the labels in turn
    settings = ", ".join(f"{name} {value}" for name, value in sampling.items()) + f", seed {args.seed}"
    report = progress("images", N, unit="images")
    parts = []
    for index in torch.arange(N).split(args.batch_size):
        parts.append(sample_images(model, labels[index], index.tolist(), diffusion=diffusion, seed=args.seed,
                                   sampling=sampling, decode=decode))
        report(int(index[-1]), {})
    images = torch.cat(parts)
    if args.npz and images.dtype == torch.uint8:
        arrays = {"arr_0": images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy(), "settings": np.array(settings)}
        write_file(target, lambda file: np.savez(file, **arrays))
    elif args.npz:
        write_file(target, lambda file: np.savez(file, latents=images.numpy()))
    else:
        names = [(checkpoint["classes"][y], y) for y in labels.tolist()]
        write_png(target, image_grid(images, len(chosen) if 1 < len(chosen) <= 20 else math.ceil(N ** 0.5), names))
    print(f"{N} images, {settings}: {target}")


def main(argv=None):
    """The program; returns its exit status."""
    return guarded("sample.py", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
