"""Draw images from a checkpoint of tinyfusion.py.

    python sample.py --ckpt runs/toy/student.pt                          ten images of every class, as sample.png
    python sample.py --ckpt runs/toy/student.pt --labels 3,1,4 --num-images 30 --seed 7 --out pi.png
    python sample.py --ckpt runs/toy/student.pt --num-images 5000 --npz a.npz         an ADM batch, for any FID program

Checkpoints of facebookresearch/DiT and of the public TinyFusion code are taken too; models of latents (4 channels) draw
latents, which are no images: --npz writes them, as `latents`.

Image i of a seed is the same image whatever the batch size, on any device, but for the last bits of matrix products.
How the checkpoint's own samples were drawn (steps, guidance, eta) is stored in it, and is the default here.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch

from tinyfusion import (GaussianDiffusion, Parser, UserError, guarded, image_grid, load_checkpoint, noise_source,
                        nonempty, number, open_folder, pick_device, progress, to_uint8, write_file, write_png)


def parse_args(argv=None):
    """The flags as a namespace."""
    parser = Parser(prog="sample.py", description="Draw images from a checkpoint of tinyfusion.py.")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint, e.g. runs/toy/student.pt")
    parser.add_argument("--labels", metavar="LIST", help="class numbers in turn, as in 3,1,4 (all classes)")
    parser.add_argument("--num-images", type=number(int, 1, 10 ** 7), metavar="N", help="images (10 per label)")
    parser.add_argument("--guidance", type=number(float, 0), metavar="X", help="guidance scale (the checkpoint's)")
    parser.add_argument("--steps", type=number(int, 2, 1000), metavar="N", help="sampling steps (the checkpoint's)")
    parser.add_argument("--eta", type=number(float, 0, 1), metavar="X", help="1 is DDPM, 0 is DDIM (the checkpoint's)")
    parser.add_argument("--seed", type=number(int, 0, 2 ** 31), default=0, metavar="N", help="seed of the noise (0)")
    parser.add_argument("--batch-size", type=number(int, 1), default=100, metavar="N", help="images at once (100)")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--out", type=nonempty, default="sample.png", metavar="FILE", help="PNG grid (sample.png)")
    target.add_argument("--npz", type=nonempty, metavar="FILE", help="instead an ADM batch: arr_0, uint8, NHWC")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), metavar="NAME",
                        help="matrix products in float32 or bfloat16 (bfloat16 on CUDA, float32 elsewhere)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model: a slow start, faster images")
    parser.add_argument("--device", type=nonempty, metavar="NAME", help="cpu, cuda ... (the first GPU if there is one)")
    return parser.parse_args(argv)


def parse_labels(words, num_classes):
    """"3,1,4" to [3, 1, 4]; None to all classes. Raises UserError for what is not a class."""
    if words is None:
        return list(range(num_classes))
    labels = [int(word) if word.strip().isdecimal() else -1 for word in words.split(",")]
    if not all(0 <= label < num_classes for label in labels):
        raise UserError(f"--labels {words}: expected class numbers from 0 to {num_classes - 1}, as in 0,1")
    return labels


def run(args):
    """Draw the images and write them."""
    device = pick_device(args.device)
    target = Path(args.npz or args.out)
    open_folder(target.parent)                               # before the work, not after it
    if target.is_dir():
        raise UserError(f"{target}: is a folder; expected the name of a file to write")
    model, checkpoint = load_checkpoint(args.ckpt, device)
    latent = model.in_channels not in (1, 3)
    if latent and not args.npz:
        raise UserError(f"{args.ckpt} draws latents of {model.in_channels} channels, no images; use --npz FILE")
    chosen = parse_labels(args.labels, model.num_classes)
    N = args.num_images or 10 * len(chosen)
    labels = torch.tensor([chosen[i % len(chosen)] for i in range(N)], device=device)
    asked = {key: getattr(args, key) for key in ("steps", "guidance", "eta") if getattr(args, key) is not None}
    if not isinstance(checkpoint["sampling"], dict):
        raise UserError(f"checkpoint {args.ckpt}: its entry sampling is no dict of settings")
    sampling = checkpoint["sampling"] | asked | {"dtype": getattr(torch, args.dtype) if args.dtype else None}
    if args.compile:
        model.compile()
    batches = torch.arange(N).split(args.batch_size)
    report, parts, diffusion = progress("images", len(batches)), [], GaussianDiffusion()
    shape = (model.in_channels, model.input_size, model.input_size)
    try:
        for done, index in enumerate(batches):
            draw = noise_source(index.tolist(), shape, args.seed, device)
            x = diffusion.sample(model, labels[index], draw, **sampling).cpu()
            parts.append(x if latent else to_uint8(x))
            report(done, {})
    except (TypeError, ValueError) as error:
        raise UserError(f"checkpoint {args.ckpt}: its sampling settings cannot be used: {error}") from None
    images = torch.cat(parts)                                                # (N, C, H, W)
    if latent:
        write_file(args.npz, lambda file: np.savez(file, latents=images.numpy()))
    elif args.npz:
        rgb = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
        write_file(args.npz, lambda file: np.savez(file, arr_0=np.ascontiguousarray(rgb)))
    else:
        columns = len(chosen) if 1 < len(chosen) <= 20 else math.ceil(math.sqrt(N))
        write_png(args.out, image_grid(images, columns))
    settings = [f"{key} {value}" for key, value in sampling.items() if value is not None]
    print(f"{N} images, {', '.join(settings)}, seed {args.seed}: {args.npz or args.out}")


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_args(argv)
    return guarded("sample.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
