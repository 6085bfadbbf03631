"""Plots the loss of each scale from the log of stage 2, and ln V, the loss of guessing; needs matplotlib.

    python notebooks/curves.py out/cifar10-cpu/var.csv curves.png
"""
import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sample import Parser, UserError, check, run_command                    # noqa: E402


def main(argv: list[str]):
    parser = Parser(prog='curves.py', description=__doc__)
    parser.add_argument('log', help='a var.csv')
    parser.add_argument('image', help='the .png to write')
    args = parser.parse_args(argv)
    check(Path(args.log).is_file(), f'{args.log}: no such file')
    check(args.image.endswith('.png'), f'{args.image}: must end in .png')
    Path(args.image).parent.mkdir(parents=True, exist_ok=True)
    try:
        rows = list(csv.DictReader(Path(args.log).read_text().splitlines()))
        scales = [name.removeprefix('loss_') for name in rows[0] if name.startswith('loss_')]
        points = {(scale, split): [(int(row['step']), float(row[f'loss_{scale}'])) for row in rows
                                   if row['split'] == split]
                  for scale in scales for split in ('train', 'val')}
        level = max(float(row['ln_V']) for row in rows if row['split'] == 'val')
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OSError, csv.Error):
        raise UserError(f'{args.log}: not the var.csv of a run with at least one validation') from None
    figure = Figure(figsize=(7, 4), layout='constrained')
    axes = figure.subplots()
    for (scale, split), curve in points.items():
        if not curve:                                                       # no training step logged yet
            continue
        line, label = ('-', 'training') if split == 'train' else ('o--', 'held-out')
        axes.plot(*zip(*curve), line, color=f'C{scales.index(scale)}', label=f'{scale}, {label}',
                  linewidth=1, markersize=3)
    axes.axhline(level, color='grey', linestyle=':', label=f'ln V = {level:.2f}')
    axes.set(xlabel='step', ylabel='cross-entropy (nats per token)', title='Loss of each scale')
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(args.image, dpi=110)


if __name__ == '__main__':
    run_command(main)
