"""Draw images from a checkpoint of tinyfusion.py.

    python sample.py --ckpt runs/toy/student.pt                          ten images of every class, as sample.png
    python sample.py --ckpt runs/toy/student.pt --labels 3,1,4 --num-images 30 --seed 7 --out pi.png
    python sample.py --ckpt runs/toy/student.pt --num-images 5000 --npz a.npz         an ADM batch, for any FID program
    python sample.py --ckpt TinyDiT-D14.pt --vae stabilityai/sd-vae-ft-ema --labels 207,360,387,974,88,979,417,279

Checkpoints of facebookresearch/DiT, of SiT, LTH14/mar and the public TinyFusion code are taken too. Models of latents
draw latents, which are no images: --vae makes images of those of DiT and SiT (4 channels), and without it --npz writes
them, as `latents`; so for those of MAR (16 channels).

Image i of a seed is the same image whatever the batch size, on any device, but for the last bits of matrix products.
How the checkpoint's own samples were drawn (steps, guidance, eta) is stored in it, and is the default here.
"""

import itertools
import math
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

from tinyfusion import (OBJECTIVES, VAE, Parser, UserError, guarded, image_grid, load_checkpoint, nonempty, number,
                        objective_of, open_folder, pick_device, progress, sample_images, to_uint8, tune_blocks,
                        write_file, write_png)


def parse_args(argv=None):
    """The flags as a namespace."""
    parser = Parser(prog="sample.py", description="Draw images from a checkpoint of tinyfusion.py.")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint, e.g. runs/toy/student.pt")
    parser.add_argument("--labels", metavar="LIST", help="class numbers in turn, as in 3,1,4 (all classes)")
    parser.add_argument("--vae", type=nonempty, metavar="NAME",
                        help="autoencoder of latents, on Hugging Face or a folder (needs diffusers)")
    parser.add_argument("--num-images", type=number(int, 1, 10 ** 7), metavar="N", help="images (10 per label)")
    parser.add_argument("--guidance", type=number(float, 0), metavar="X", help="guidance scale (the checkpoint's)")
    parser.add_argument("--steps", type=number(int, 2, 1000), metavar="N", help="sampling steps (the checkpoint's)")
    parser.add_argument("--eta", type=number(float, 0, 1), metavar="X", help="1 is DDPM, 0 is DDIM (the checkpoint's)")
    parser.add_argument("--objective", choices=("ddpm", "flow"), metavar="NAME",
                        help="ddpm, or flow for official SiT checkpoints, which do not tell (the checkpoint's)")
    parser.add_argument("--solver", choices=("euler", "heun"), metavar="NAME",
                        help="of objective flow: euler or heun (the checkpoint's, or heun)")
    parser.add_argument("--head-steps", type=number(int, 2, 1000), metavar="N",
                        help="of a MAR: steps of its head's diffusion (the checkpoint's)")
    parser.add_argument("--temperature", type=number(float, 0), metavar="X",
                        help="of a MAR: a factor of the noise that the head's steps add (the checkpoint's)")
    parser.add_argument("--seed", type=number(int, 0, 2 ** 31), default=0, metavar="N", help="seed of the noise (0)")
    parser.add_argument("--batch-size", type=number(int, 1), default=100, metavar="N", help="images at once (100)")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--out", type=nonempty, default="sample.png", metavar="FILE", help="PNG grid (sample.png)")
    target.add_argument("--npz", type=nonempty, metavar="FILE", help="instead an ADM batch: arr_0, uint8, NHWC")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), metavar="NAME",
                        help="matrix products in float32 or bfloat16 (bfloat16 on CUDA, float32 elsewhere)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks: a slow start, faster images")
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


def write_npz(path, N, batches, name, **more):
    """Write arrays (b, ...) of N examples in all as one array `name` of an .npz file, of which only a batch is in
    memory, and `more` small ones."""
    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            for key, value in more.items():
                with archive.open(f"{key}.npy", "w") as entry:
                    np.save(entry, value)
            first = next(batches)
            kind = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False,
                    "shape": (N, *first.shape[1:])}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, kind)
                for batch in itertools.chain([first], batches):
                    entry.write(np.ascontiguousarray(batch).tobytes())
    write_file(path, write)


def run(args):
    """Draw the images and write them."""
    device = pick_device(args.device)
    target = Path(args.npz or args.out)
    open_folder(target.parent)                               # before the work, not after it
    if target.is_dir():
        raise UserError(f"{target}: is a folder; expected the name of a file to write")
    model, checkpoint = load_checkpoint(args.ckpt, device)
    latent = model.in_channels not in (1, 3)
    if latent and model.objective == "mar" and (args.vae or not args.npz):
        raise UserError(f"{args.ckpt} draws latents of MAR's own VAE, which is not here: leave --vae out, and give "
                        "--npz FILE to write them as they are")
    if latent and not (args.npz or args.vae):
        raise UserError(f"{args.ckpt} draws latents of {model.in_channels} channels, no images; give --vae NAME to "
                        "decode them, or --npz FILE to write them as they are")
    if args.vae and not latent:
        raise UserError(f"--vae: {args.ckpt} draws images, there is nothing to decode; leave --vae out")
    decode = VAE(args.vae, device).decode if args.vae else (lambda x: x) if latent else to_uint8
    chosen = parse_labels(args.labels, model.num_classes)
    N = args.num_images or 10 * len(chosen)
    labels = torch.tensor([chosen[i % len(chosen)] for i in range(N)], device=device)
    objective = "mar" if model.objective == "mar" else checkpoint.get("objective", args.objective or "ddpm")
    if args.objective not in (None, objective):
        raise UserError(f"checkpoint {args.ckpt} was trained with objective {objective}: leave --objective out")
    options = [name for kind in OBJECTIVES.values() for name in kind.options]
    asked = {key: value for key in ("steps", "guidance", *options) if (value := getattr(args, key)) is not None}
    others = set(options) - set(OBJECTIVES[objective].options)
    if others & asked.keys():
        flag = (others & asked.keys()).pop().replace("_", "-")
        hint = " (or, of an official SiT, add --objective flow)" if flag == "solver" else ""
        raise UserError(f"--{flag}: the objective of {args.ckpt} is {objective}, which has none; leave it out{hint}")
    if not isinstance(checkpoint["sampling"], dict):
        raise UserError(f"checkpoint {args.ckpt}: its entry sampling is no dict of settings")
    sampling = checkpoint["sampling"] | asked | {"dtype": getattr(torch, args.dtype) if args.dtype else None}
    sampling = {key: value for key, value in sampling.items() if key not in others}
    if objective == "mar" and args.steps is None and isinstance(sampling.get("steps"), int):
        sampling["steps"] = min(sampling["steps"], model.num_tokens)         # a small official one
    if args.compile:
        tune_blocks(model, compile=True)
    batches = torch.arange(N).split(args.batch_size)
    report, diffusion = progress("images", N, unit="images"), objective_of(objective, model)
    shape = (model.in_channels, model.input_size, model.input_size)
    settings = ", ".join(f"{key} {value}" for key, value in sampling.items() if value is not None)

    def draw():
        for index in batches:
            try:
                yield sample_images(model, diffusion, labels[index], index.tolist(), shape, args.seed, sampling, decode)
            except (TypeError, ValueError) as error:
                raise UserError(f"checkpoint {args.ckpt} cannot be sampled with {settings}: {error}") from None
            report(int(index[-1]), {})

    if args.npz and latent and not args.vae:
        write_npz(args.npz, N, (x.numpy() for x in draw()), "latents")
    elif args.npz:
        images = (x.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy() for x in draw())
        write_npz(args.npz, N, images, "arr_0", settings=np.array(f"{settings}, seed {args.seed}"))
    else:
        columns = len(chosen) if 1 < len(chosen) <= 20 else math.ceil(math.sqrt(N))
        write_png(args.out, image_grid(torch.cat(list(draw())), columns))
    print(f"{N} images, {settings}, seed {args.seed}: {args.npz or args.out}")


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_args(argv)
    return guarded("sample.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
