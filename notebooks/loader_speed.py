"""How much faster sample.read_image is than Pillow's full decode, whole resize and crop, on one core.

    python notebooks/loader_speed.py DIR [SIZE]         # all images in DIR/<class>/, SIZE 256 if not given
"""
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import sample  # noqa: E402
import train  # noqa: E402

ROUNDS = 7


def whole_resize(path: str, size: int, random: np.random.Generator) -> np.ndarray:
    """The released code's steps, one by one: decode, resize all of the image, cut."""
    image, shorter = Image.open(path).convert('RGB'), round(1.125 * size)
    w, h = image.size
    W, H = (shorter, int(shorter * h / w)) if w <= h else (int(shorter * w / h), shorter)
    x, y = int(random.integers(W - size + 1)), int(random.integers(H - size + 1))
    return np.asarray(image.resize((W, H), Image.LANCZOS).crop((x, y, x + size, y + size)))


def images_per_second(read, paths: list[str], size: int) -> float:
    began = time.perf_counter()
    for i, path in enumerate(paths):
        read(path, size, np.random.default_rng(i))
    return len(paths) / (time.perf_counter() - began)


if __name__ == '__main__':
    paths, size = [path for path, _ in train.find_images(Path(sys.argv[1]))[0]], int((sys.argv + ['256'])[2])
    speeds = [[images_per_second(read, paths, size) for read in (sample.read_image, whole_resize)]
              for _ in range(ROUNDS)]
    ours, theirs = (statistics.median(column) for column in zip(*speeds))
    ratio = statistics.median(a / b for a, b in speeds)
    print(f'{len(paths)} images at {size}: {ours:.0f} images/s a core, {theirs:.0f} with a whole resize; '
          f'median ratio of {ROUNDS} rounds {ratio:.2f}')
