"""Measures edits of held-out images: is the requested class recognised, and is the rest unchanged?

    python notebooks/edits.py out/shapes/var.pt
    python notebooks/edits.py notebooks/cifar10.pt --data-dir DIR

Each image is in-painted (the centre is regenerated with the same class), out-painted (all but the centre) and
edited (all but a rim one latent wide is regenerated with another class; for drawn shapes, also the shape
alone, by a mask), with the checkpoint's sampling defaults. The judge is that of judge.py. PSNR outside covers
the pixels that should not change, without --paste; the last column gives it for the tokenizer alone.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from judge import load_judge, load_known, read_images                       # noqa: E402
from measure import psnr                                                    # noqa: E402
from sample import COUNT, Parser, noise_of_images, run_command, to_uint8        # noqa: E402
from train import to_float                                                  # noqa: E402


def regions(images: Tensor, are_shapes: bool) -> dict[str, Tensor]:
    """The region that each edit regenerates, bool (N, S, S), by the name of the edit."""
    N, _, S, _ = images.shape
    centre, inner = (torch.zeros(N, S, S, dtype=torch.bool) for _ in range(2))
    centre[:, S // 4:-S // 4, S // 4:-S // 4] = True
    inner[:, S // 8:-S // 8, S // 8:-S // 8] = True
    found = {'in-painting of the centre': centre, 'out-painting of all but the centre': ~centre,
             'another class within the rim': inner}
    if are_shapes:                          # shapes are brighter than the background (pixel 0)
        away = (images.float() - images[:, :, :1, :1].float()).abs().amax(1, keepdim=True) > 25
        found['another class by a mask of the shape'] = F.max_pool2d(away.float(), 5, 1, 2)[:, 0] > 0
    return found


@torch.no_grad()
def edit(tokenizer, var, defaults: dict, images: Tensor, labels: Tensor, region_NHW: Tensor) -> Tensor:
    """uint8 (N, 3, S, S) -> images in [-1, 1], with the region regenerated as these labels."""
    noise_NL, drawn = noise_of_images(0, 0, len(images), sum(var.config.lengths)), []
    for i in tqdm(torch.arange(len(images)).split(100), leave=False):
        kept_BL = tokenizer.keep(tokenizer.encode(to_float(images[i])), ~region_NHW[i])
        options = dict(noise_BL=noise_NL[i], kept_BL=kept_BL, **defaults)
        drawn.append(var.generate(tokenizer, labels[i], **options))
    return torch.cat(drawn)


def psnr_outside(made: Tensor, images: Tensor, region_NHW: Tensor) -> float:
    """PSNR (dB) of images in [-1, 1] against uint8 images, over the pixels outside the region."""
    return psnr(*(x.movedim(1, -1)[~region_NHW] for x in (made, images)))


def main(argv: list[str]):
    parser = Parser(prog='edits.py', description=__doc__)
    parser.add_argument('checkpoint', help='a var.pt')
    parser.add_argument('--data-dir', help='folder with CIFAR-10 [downloaded to data/]')
    parser.add_argument('--count', type=COUNT, default=1000, help='held-out images, at most [1000]')
    parser.add_argument('--cache', help='the trained judge [out/judge-cifar10.pt or -shapes.pt]')
    args = parser.parse_args(argv)
    data, tokenizer, var, defaults = load_known(args.checkpoint)
    *training, images, labels = read_images(data, args.data_dir)
    judge = load_judge(data, *training, args.cache or f'out/judge-{data}.pt')
    images, labels = images[:args.count], labels[:args.count]
    another = (labels + 1 + torch.arange(len(labels)) % 9) % 10
    alone = torch.cat([tokenizer.decode(tokenizer.encode(to_float(part))) for part in images.split(100)])
    print('| edit | regenerated | recognised | PSNR outside | tokenizer alone |')
    print('|---|---|---|---|---|')
    for name, region_NHW in regions(images, data == 'shapes').items():
        asked = another if 'another' in name else labels
        made = edit(tokenizer, var, defaults, images, asked, region_NHW)
        right = judge.recognised(judge.features(to_uint8(made)), asked).mean()
        decibels = [f'{psnr_outside(result, images, region_NHW):.1f} dB' for result in (made, alone)]
        print(f'| {name} | {region_NHW.float().mean():.0%} | {right:.1%} | {" | ".join(decibels)} |')


if __name__ == '__main__':
    run_command(main)
