"""Measures edits of held-out images: is the class asked for recognised, and does the rest stay as it was?

    python notebooks/edits.py out/shapes/var.pt
    python notebooks/edits.py notebooks/cifar10.pt --data-dir DIR

Each image is in-painted (its centre is drawn anew, its own class asked for), out-painted (all but its centre)
and edited (all but a rim of a latent is drawn anew, another class asked for; of a shape also its figure
alone, by a mask), at the checkpoint's own sampling defaults. The judge is that of judge.py. PSNR outside is
that of the pixels that were not to change, without --paste; beside it stands that of the tokenizer alone.
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
    """What is drawn anew of each image, bool (N, S, S), by the name of the edit."""
    N, _, S, _ = images.shape
    centre, inner = (torch.zeros(N, S, S, dtype=torch.bool) for _ in range(2))
    centre[:, S // 4:-S // 4, S // 4:-S // 4] = True
    inner[:, S // 8:-S // 8, S // 8:-S // 8] = True
    found = {'in-painting of the centre': centre, 'out-painting of all but the centre': ~centre,
             'another class within the rim': inner}
    if are_shapes:                          # figures are brighter than the ground, of which pixel 0 is
        away = (images.float() - images[:, :, :1, :1].float()).abs().amax(1, keepdim=True) > 25
        found['another class by a mask of the figure'] = F.max_pool2d(away.float(), 5, 1, 2)[:, 0] > 0
    return found


@torch.no_grad()
def edit(tokenizer, var, defaults: dict, images: Tensor, labels: Tensor, region_NHW: Tensor) -> Tensor:
    """uint8 (N, 3, S, S) -> in [-1, 1], drawn anew in the region as these labels."""
    noise_NL, drawn = noise_of_images(0, 0, len(images), sum(var.config.lengths)), []
    for i in tqdm(torch.arange(len(images)).split(100), leave=False):
        kept_BL = tokenizer.keep(tokenizer.encode(to_float(images[i])), ~region_NHW[i])
        options = dict(noise_BL=noise_NL[i], kept_BL=kept_BL, **defaults)
        drawn.append(var.generate(tokenizer, labels[i], **options))
    return torch.cat(drawn)


def psnr_outside(made: Tensor, images: Tensor, region_NHW: Tensor) -> float:
    """dB, of images in [-1, 1] against uint8 ones, over the pixels outside of the region."""
    return psnr(*(x.movedim(1, -1)[~region_NHW] for x in (made, images)))


def main(argv: list[str]):
    parser = Parser(prog='edits.py', description=__doc__)
    parser.add_argument('checkpoint', help='a var.pt')
    parser.add_argument('--data-dir', help='folder with CIFAR-10; absent: downloaded to data/')
    parser.add_argument('--count', type=COUNT, default=1000, help='held-out images, at most [1000]')
    parser.add_argument('--cache', help='the trained judge; absent: out/judge-cifar10.pt or -shapes.pt')
    args = parser.parse_args(argv)
    data, tokenizer, var, defaults = load_known(args.checkpoint)
    *training, images, labels = read_images(data, args.data_dir)
    judge = load_judge(data, *training, args.cache or f'out/judge-{data}.pt')
    images, labels = images[:args.count], labels[:args.count]
    another = (labels + 1 + torch.arange(len(labels)) % 9) % 10
    alone = torch.cat([tokenizer.decode(tokenizer.encode(to_float(part))) for part in images.split(100)])
    print('| edit | drawn anew | recognised as asked | PSNR outside | the tokenizer alone |')
    print('|---|---|---|---|---|')
    for name, region_NHW in regions(images, data == 'shapes').items():
        asked = another if 'another' in name else labels
        made = edit(tokenizer, var, defaults, images, asked, region_NHW)
        right = judge.recognised(judge.features(to_uint8(made)), asked).mean()
        decibels = [f'{psnr_outside(result, images, region_NHW):.1f} dB' for result in (made, alone)]
        print(f'| {name} | {region_NHW.float().mean():.0%} | {right:.1%} | {" | ".join(decibels)} |')


if __name__ == '__main__':
    run_command(main)
