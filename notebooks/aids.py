"""Helpers for the walkthroughs: a few real images, plots of images and of the residual loop, logits."""
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import sample                                                                           # noqa: E402
from train import to_float                                                              # noqa: E402

LABELS = (3, 8, 8, 0, 6, 6, 1, 6, 3, 1, 0, 9, 5, 7, 9, 8, 5, 7, 8, 6, 7, 0, 4, 9, 5, 2, 4, 0, 9, 6, 6, 5)


def real_images() -> tuple[Tensor, Tensor]:
    """The first 32 test images of CIFAR-10, (32, 3, 32, 32) in [-1, 1], and their labels (32,): committed, so
    that the walkthroughs need no download."""
    sheet = np.asarray(Image.open(HERE / 'images' / 'cifar10-test.png').convert('RGB'))       # 4 rows of 8
    images = sheet.reshape(4, 32, 8, 32, 3).swapaxes(1, 2).reshape(32, 32, 32, 3)
    return to_float(torch.from_numpy(images).permute(0, 3, 1, 2)), torch.tensor(LABELS)


def show(images: Tensor, columns: int, row_names=(), column_names=(), width: float = 9.0):
    """Plots images (N, 3, H, W) in [-1, 1] row by row, with names on the left and at the top."""
    image = sample.grid(images, columns)
    rows, pitch = -(-len(images) // columns), image.width / columns
    axes = plt.figure(figsize=(width, width * image.height / image.width), dpi=144).gca()
    axes.imshow(image, interpolation='nearest')
    axes.set_xticks([pitch * (i + 0.5) for i in range(columns)][:len(column_names)], column_names)
    axes.set_yticks([image.height / rows * (i + 0.5) for i in range(rows)][:len(row_names)], row_names)
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=8.5 if columns > 8 else 12)
    axes.spines[:].set_visible(False)
    plt.show()


def draw_loop(rows: list[list[Tensor]], row_names: list[str], column_names: list[str], notes: list[str]):
    """Plots the residual loop as maps (C, h, w): a row per scale, a column per step, notes on the right.

    Colours are the vectors' components along the three principal directions of the first map, which is f.
    """
    vectors_NC = rows[0][0].flatten(1).T
    strongest_C3 = torch.linalg.eigh(vectors_NC.T @ vectors_NC).eigenvectors[:, -3:].flip(1)
    spread = 2 * (vectors_NC @ strongest_C3).square().mean().sqrt()
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=(11, 1.65 * len(rows)), dpi=72)
    figure.subplots_adjust(left=0.07, right=0.9, top=0.9, bottom=0.02, wspace=0.32, hspace=0.3)
    arrow = dict(arrowstyle='-|>', color='C0', linewidth=1.6)
    for row, row_axes in zip(rows, axes):
        for axis, map_Chw in zip(row_axes, row):
            colours_hw3 = 0.5 + 0.5 * (map_Chw.permute(1, 2, 0) @ strongest_C3) / spread
            axis.imshow(colours_hw3.clamp(0, 1), extent=(0, 1, 0, 1))
            axis.set(xticks=[], yticks=[])
        for axis in row_axes[:-1]:
            axis.annotate('', (1.3, 0.5), (1.02, 0.5), xycoords='axes fraction', arrowprops=arrow)
    for axis, name in zip(axes[0], column_names):
        axis.set_title(name, fontsize=11)
    for axis, name in zip(axes[:, 0], row_names):
        axis.set_ylabel(name, rotation=0, labelpad=20, fontsize=11, va='center')
    for axis, note in zip(axes[:, -1], notes):
        axis.text(1.08, 0.5, note, va='center', fontsize=10)
    for above, below in zip(axes[:-1, -1], axes[1:, 0]):                # from the end of a row to the next
        corners = [above.get_position(), below.get_position()]
        y = (corners[0].y0 + corners[1].y1) / 2
        xs = [(corner.x0 + corner.x1) / 2 for corner in corners]
        figure.add_artist(plt.Line2D([xs[0], xs[0], xs[1]], [corners[0].y0, y, y], color='C0', lw=1.6))
        figure.patches.append(plt.matplotlib.patches.FancyArrowPatch(
            (xs[1], y), (xs[1], corners[1].y1), arrowstyle='-|>', mutation_scale=12, color='C0', lw=1.6,
            transform=figure.transFigure, shrinkA=0, shrinkB=0))
    plt.show()


def logits_after(tokenizer, var, labels_B: Tensor, f_hats: list[Tensor]) -> list[Tensor]:
    """Conditional and unconditional logits (B, l, V) of the scale after these f_hats (scales 1, 2, ...)."""
    lengths, k = var.config.lengths, len(f_hats)
    known = [tokenizer.next_input(f_hat, i) for i, f_hat in enumerate(f_hats)]
    rest = torch.zeros(len(labels_B), sum(lengths[k + 1:]), var.config.z_channels)      # masked out
    inputs_BLC = torch.cat([*known, rest], dim=1)
    nulls_B = torch.full_like(labels_B, var.config.num_classes)
    return [var(asked_B, inputs_BLC).split(lengths, 1)[k] for asked_B in (labels_B, nulls_B)]
