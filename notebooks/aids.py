"""What the walkthroughs share: a few real images, and a way to show images with names beside them."""
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
    """The first 32 test images of CIFAR-10, (32, 3, 32, 32) in [-1, 1], and their labels (32,).

    Cut from an image that README shows, in which they stand twice as large in rows of 16, each row over its
    reconstructions: so that the walkthroughs need no download.
    """
    sheet = np.asarray(Image.open(HERE / 'images' / 'cifar10-reconstructions.png').convert('RGB'))[::2, ::2]
    images = np.stack([sheet[y:y + 32, x:x + 32] for y in (0, 68) for x in range(0, 16 * 34, 34)])
    return to_float(torch.from_numpy(images).permute(0, 3, 1, 2)), torch.tensor(LABELS)


def show(images: Tensor, columns: int, row_names=(), column_names=(), width: float = 9.0):
    """Draws (N, 3, H, W) in [-1, 1] row by row, with names at the left and above.

    At 72 dots an inch, which is about the size of the pixels: more would only make larger notebooks.
    """
    image = sample.grid(images, columns)
    rows, pitch = -(-len(images) // columns), image.width / columns
    axes = plt.figure(figsize=(width, width * image.height / image.width), dpi=72).gca()
    axes.imshow(image)
    axes.set_xticks([pitch * (i + 0.5) for i in range(columns)][:len(column_names)], column_names)
    axes.set_yticks([image.height / rows * (i + 0.5) for i in range(rows)][:len(row_names)], row_names)
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=10 if columns > 8 else 12)
    axes.spines[:].set_visible(False)
    plt.show()
