"""Draws the loss of each scale from var.csv, next to ln V, what guessing costs; needs matplotlib.

    python notebooks/curves.py out/cifar10/var.csv curves.png
"""
import csv
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import Parser, check, prepare_folder, run_command               # noqa: E402


def main(argv: list[str]):
    parser = Parser(prog='curves.py', description=__doc__)
    parser.add_argument('log', help='a var.csv')
    parser.add_argument('picture', help='the .png to write')
    args = parser.parse_args(argv)
    check(Path(args.log).is_file(), f'{args.log}: no such file')
    check(args.picture.endswith('.png'), f'{args.picture}: must end in .png')
    prepare_folder(Path(args.picture).parent, 'picture')
    with open(args.log, newline='') as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith('loss_')] if rows else []
    check(names, f'{args.log}: has no losses by scale; name the var.csv of a run')
    matplotlib.use('Agg')
    figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
    for i, name in enumerate(names):
        for split, line in (('train', '-'), ('val', 'o--')):
            points = [(int(row['step']), float(row[name])) for row in rows if row['split'] == split]
            label = f"{name.removeprefix('loss_')}, {'training' if split == 'train' else 'held-out'}"
            axes.plot(*zip(*points), line, color=f'C{i}', label=label, linewidth=1, markersize=3)
    level = max(float(row['ln_V']) for row in rows if row['split'] == 'val')
    axes.axhline(level, color='grey', linestyle=':', label=f'ln V = {level:.2f}')
    axes.set(xlabel='step', ylabel='cross-entropy, nats a token', title='Loss of each scale')
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(args.picture, dpi=110)


if __name__ == '__main__':
    run_command(main)
