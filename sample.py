"""Draw images from a checkpoint of tinyfusion.py, or an official one (for SiT add --model SiT-XL/2).

    python sample.py --ckpt runs/toy/student.pt                          ten images of every class, as sample.png
    python sample.py --ckpt runs/toy/student.pt --labels 3,1,4 --num-images 30 --seed 7 --out pi.png
    python sample.py --ckpt runs/toy/student.pt --num-images 5000 --npz a.npz         an ADM batch, for any FID program
"""

import inspect
import math
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from tinyfusion import (PRESETS, VAE, Parser, compiled, guarded, image_grid, load_checkpoint, pick_device, progress,
                        require, sample_images, to_uint8, write_file)


def parse_args(argv):
    """The flags as a namespace."""
    parser = Parser(prog="sample.py", allow_abbrev=False, description="Draw images from a checkpoint of tinyfusion.py.")
    add = parser.add_argument
    add("--ckpt", required=True, metavar="FILE", help="checkpoint, e.g. runs/toy/student.pt")
    add("--model", choices=PRESETS, metavar="NAME", help="only for official SiT files, such as SiT-XL/2")
    add("--labels", metavar="LIST", help="names or numbers of classes in turn, as in 3,1,4 (all classes)")
    add("--num-images", type=int, metavar="N", help="images (10 per label)")
    add("--steps", type=int, metavar="N", help="sampling steps (the checkpoint's)")
    add("--guidance", type=float, metavar="X", help="guidance scale, 1 is without (the checkpoint's)")
    add("--cfg-channels", choices=("3", "all"), help="DiT, SiT: the channels that guidance acts on (3, as officially)")
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


def choose_labels(words, classes):
    """"cat,3" to numbers of classes, by name or else by number; None to all of them. Raises UserError."""
    chosen = []
    for word in classes if words is None else words.split(","):
        number = int(word) if word.strip().isdecimal() else len(classes)
        require(word in classes or number < len(classes), f"--labels {words}: {word!r} is no class; expected names or "
                f"numbers from 0 to {len(classes) - 1}: {', '.join(classes[:9])} ...")
        chosen.append(classes.index(word) if word in classes else number)
    return chosen


def choose_decoder(args, model, device):
    """The function that turns what `model` draws into what is written. Raises UserError where flags do not fit."""
    C, pixels = model.in_channels, model.in_channels in (1, 3)
    require(not (args.vae and pixels) and (args.vae or pixels or args.npz),
            f"{args.ckpt} draws {C} channels: 1 or 3 need no --vae; others need it, or --npz FILE")
    if args.vae:
        return VAE(args.vae, device, C).decode
    return to_uint8 if pixels else lambda latents: latents


def choose_sampling(args, checkpoint):
    """The arguments of the objective's `sample`. Raises UserError for a flag that this objective does not have."""
    names = ("steps", "guidance", "cfg_channels", "eta", "solver", "head_steps", "temperature")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    unknown = given.keys() - inspect.signature(checkpoint["objective"].sample).parameters
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in unknown)
    require(not unknown, f"{args.ckpt} is a {checkpoint['name']}, which has no {flags}: leave it out")
    if args.cfg_channels:
        given["cfg_channels"] = {"3": 3, "all": None}[args.cfg_channels]
    if args.dtype:
        given["dtype"] = getattr(torch, args.dtype)
    return checkpoint["sampling"] | given


def run(args):
    """Draw the images and write them."""
    require(int(os.environ.get("WORLD_SIZE", 1)) == 1, "expected one process, without torchrun, or all draw the same")
    device = pick_device(args.device)
    target = Path(args.npz or args.out)
    require(target.parent.is_dir() and not target.is_dir() and target.suffix == (".npz" if args.npz else ".png"),
            f"{target}: expected, in a folder that is there, a .png file for --out, a .npz file for --npz")
    tempfile.TemporaryFile(dir=target.parent).close()        # a folder that cannot be written is named before the work
    model, checkpoint = load_checkpoint(args.ckpt, device, args.model)
    compiled(model, args.compile)
    decode = choose_decoder(args, model, device)
    sampling = choose_sampling(args, checkpoint)
    chosen = choose_labels(args.labels, checkpoint["classes"])
    N = args.num_images or 10 * len(chosen)
    labels = torch.tensor(np.resize(chosen, N))              # the labels in turn
    names = [checkpoint["classes"][y] for y in labels.tolist()]
    settings = ", ".join(f"{name} {value}" for name, value in (sampling | {"seed": args.seed}).items())
    report, parts = progress("images", N, "images"), []
    for index in torch.arange(N).split(args.batch_size):
        parts.append(sample_images(model, labels[index], index.tolist(), diffusion=checkpoint["objective"],
                                   seed=args.seed, sampling=sampling, decode=decode))
        report(int(index[-1]))
    images = torch.cat(parts)
    if args.npz:
        pixels = images.dtype == torch.uint8
        content = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1) if pixels else images
        arrays = {"arr_0" if pixels else "latents": content.numpy(), "names": np.array(names), "settings": settings}
        write_file(target, lambda file: np.savez(file, **arrays))
    else:
        grid = image_grid(images, len(chosen) if 1 < len(chosen) <= 20 else math.ceil(N ** 0.5), names)
        write_file(target, lambda file: grid.save(file, "PNG"))
    shown = ", ".join(dict.fromkeys(names[:9])) + (" ..." if N > 9 else "")
    print(f"{N} images of {shown}; {settings}: {target}")


def main(argv=None):
    """The program; returns its exit status."""
    return guarded("sample.py", lambda: run(parse_args(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
