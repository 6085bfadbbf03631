"""Judges samples of drawn shapes: how many of them does a classifier take for the class that was asked for?

    python sample.py out/shapes/var.pt --npz shapes.npz --count 1000 --seed 1
    python notebooks/judge.py shapes.npz

The judge is a small network, trained here on drawings that no other run has seen (a minute on two cores).
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import Parser, check, run_command                              # noqa: E402
from train import FIGURES, draw_shapes, to_float                           # noqa: E402

DRAWINGS, EPOCHS, BATCH, SEED = 12_000, 6, 100, 10 ** 6


def train_judge() -> tuple[nn.Module, float]:
    """Four 3x3 convolutions trained on 12,000 drawings for 6 epochs, and its accuracy on 2,000 others."""
    torch.manual_seed(SEED)
    layers = []
    for channels, out_channels in [(3, 24), (24, 48), (48, 64), (64, 64)]:
        layers += [nn.Conv2d(channels, out_channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    judge = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 2 * 2, len(FIGURES)))
    images, labels = draw_shapes(DRAWINGS, SEED)
    optimizer = torch.optim.Adam(judge.parameters())
    steps = EPOCHS * DRAWINGS // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in tqdm(range(steps), desc='judge'):
        if step % (DRAWINGS // BATCH) == 0:
            batches = iter(torch.randperm(DRAWINGS).split(BATCH))
        chosen = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(judge(to_float(images[chosen])), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    judge.requires_grad_(False)
    return judge, recognised(judge, *draw_shapes(2000, SEED + 1)).mean().item()


def recognised(judge: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """1.0 where the judge takes a picture (N, 3, 32, 32) uint8 for its label, else 0.0: (N,)."""
    taken_for = [judge(to_float(part)).argmax(1) for part in images.split(500)]
    return (torch.cat(taken_for) == labels).float()


def main(argv: list[str]):
    parser = Parser(prog='judge.py', description=__doc__)
    parser.add_argument('npz', help='what sample.py --npz wrote')
    path = parser.parse_args(argv).npz
    check(Path(path).is_file(), f'{path}: no such file; sample.py --npz {path} writes one')
    try:
        arrays = np.load(path)
        images = torch.from_numpy(arrays['arr_0']).permute(0, 3, 1, 2)
        labels = torch.from_numpy(arrays['labels'])
    except Exception as error:                                             # np.load fails in many ways
        check(False, f'{path}: not what sample.py --npz writes ({type(error).__name__})')
    check(images.shape[1:] == (3, 32, 32) and labels.max() < len(FIGURES),
          f'{path}: the judge knows shapes of 32x32 in {len(FIGURES)} classes, not these pictures')
    judge, accuracy = train_judge()
    right = recognised(judge, images, labels)
    print(f'the judge is right on {accuracy:.1%} of held-out drawings')
    print(f'{len(right)} samples: {right.mean():.1%} are what was asked for')
    for label in labels.unique().tolist():
        print(f'  {FIGURES[label]:10} {right[labels == label].mean():.1%}')


if __name__ == '__main__':
    run_command(main)
