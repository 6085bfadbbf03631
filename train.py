"""Trains VAR: stage 1 the tokenizer (vqvae.py), stage 2 the next-scale transformer (var.py).

    python train.py                                             # both stages on drawn shapes, on any CPU
    python train.py --preset cifar10-cpu                        # CIFAR-10, downloaded to data/, on any CPU
    python train.py --data-dir photos                           # your own: photos/train/<class>/*.jpg
    torchrun --nproc-per-node 8 train.py --preset imagenet256 --depth 16 --data-dir imagenet
    python train.py --resume                                    # go on from the last save in out/shapes

A run leaves in --out (out/<preset>): vqvae.pt and var.pt, to use and to share; last.pt and previous.pt, to
resume; vqvae.csv and var.csv, the logs; reconstructions.png and samples.png; perhaps tokens.bin.

All that is random in step s follows from (seed, s, the image): images, augmentation, dropout. So a
resumed run goes on as if it had never stopped (to the bit on CPUs; GPUs may add up in varying order, and
--budget-minutes goes by the clock), and one on more processes, or that takes fewer images at once, does the
same up to rounding (but for two things that go by the images a process takes at once: the adaptive weight of
the adversarial term, and the BatchNorm of the perceptual term's classifier).
"""
import argparse
import colorsys
import csv
import hashlib
import http.client
import inspect
import io
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
import typing
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import reduce
from os.path import expanduser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import sample
from sample import (ANY_COUNT, COUNT, DTYPES, SAMPLING, SHARE, STRENGTH, UserError, autocast, check, number,
                    one_line, open_checkpoint, rank, save_file, start_processes, to_float,
                    wait_for_all, world_size)
from var import VAR, VARConfig
from vqvae import VQVAE, Classifier, Discriminator, VQVAEConfig

# --------------------------------------------------------------------------------------------------- presets
PRESETS = {                             # learning rates are per 256 images: 0.064 is 0.004 at a batch of 16
    'shapes': dict(depth=2, adaln_gamma_init=1.0, batch_size=16, vqvae_steps=750, vqvae_lr=0.064,
                   var_steps=700, var_lr=0.064, cfg=2.0, top_p=0.8),
    'cifar10': dict(patch_size=2, channel_mults=(1, 2), vocab_size=4096, scales=(1, 2, 3, 4, 5, 6, 8),
                    perceptual_weight=0.05, classifier_channels=64, classifier_epochs=10, depth=5,
                    shared_adaln=True, adaln_gamma_init=1e-2, stochastic_depth=0.1, batch_size=256,
                    vqvae_steps=5000, vqvae_lr=4e-3, var_steps=12_000, var_lr=5e-3, var_optimizer='muon',
                    budget_vqvae=0.35, flip=True, crop=1, val_count=2000, save_every_steps=1000, cfg=4.0,
                    top_k=0, top_p=0.9),
    'cifar10-cpu': dict(vocab_size=1024, perceptual_weight=0.05, depth=3, adaln_gamma_init=0.1,
                        vqvae_batch_size=32, batch_size=64, vqvae_steps=16_000, vqvae_lr=0.032,
                        var_steps=6000, var_lr=0.02, var_optimizer='muon', budget_vqvae=0.38, flip=True,
                        val_count=2000, log_every_steps=100, save_every_steps=2000, cfg=7.0, top_k=0,
                        top_p=0.8),
    'imagenet256': dict(image_size=256, patch_size=1, channels=160, channel_mults=(1, 1, 2, 2, 4),
                        res_blocks=2, attention=True, z_channels=32, vocab_size=4096,
                        scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), depth=16, vqvae_epochs=40.0, vqvae_lr=1e-4,
                        vqvae_batch_size=768, vqvae_micro_batch_size=8, vqvae_last_lr=0.1, batch_size=768,
                        adversarial_weight=0.5, discriminator_start=20_000, val_count=5000,
                        log_every_steps=200, save_every_steps=2000)}
PRESETS['imagenet512'] = PRESETS['imagenet256'] | dict(
    image_size=512, scales=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32), depth=36, vqvae_micro_batch_size=2)
RECIPES = {         # of the released transformers, from this depth on; micro_batch_size is ours, for 80 GB
    0: dict(var_epochs=200.0, var_lr=1e-4, adaln_gamma_init=1e-3, last_lr=0.1, micro_batch_size=48),
    20: dict(var_epochs=250.0, var_lr=1e-4, adaln_gamma_init=1e-3, last_lr=0.1, micro_batch_size=32),
    24: dict(var_epochs=350.0, var_lr=8e-5, adaln_gamma_init=1e-4, last_lr=0.01, micro_batch_size=16),
    30: dict(var_epochs=350.0, var_lr=8e-5, adaln_gamma_init=1e-5, last_lr=0.01, micro_batch_size=8,
             batch_size=1024, last_weight_decay=0.08),
    36: dict(var_epochs=350.0, var_lr=8e-5, adaln_gamma_init=5e-6, last_lr=0.01, micro_batch_size=2,
             shared_adaln=True, last_weight_decay=0.08)}


# ------------------------------------------------------------------------------------------- many processes
def share_of(batch: Tensor) -> Tensor:
    """This process's part of what was made for the whole batch."""
    return batch.chunk(world_size())[rank()]


def parallel(module: torch.nn.Module) -> torch.nn.Module:
    """The module to train with, whose gradients are averages over all processes."""
    options = dict(gradient_as_bucket_view=True)
    known = inspect.signature(DistributedDataParallel).parameters
    options['forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'] = False
    return DistributedDataParallel(module, **options) if dist.is_initialized() else module


def unwrapped(network: torch.nn.Module) -> torch.nn.Module:
    return network.module if isinstance(network, DistributedDataParallel) else network


def say(text: str):
    """Prints a line, once for all processes, above the progress bar."""
    if rank() == 0:
        tqdm.write(text)


def all_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place, the same to the bit in each."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def from_rank_0(value):
    """What rank 0 found, in all processes."""
    if dist.is_initialized():
        dist.broadcast_object_list(values := [value])
        return values[0]
    return value


@contextmanager
def rank_0_first():
    """For what would fail in all processes alike: rank 0 tries it first, and is the one that complains."""
    failed = torch.tensor(float(rank() == 0))
    if rank() > 0 and all_sum(failed):
        time.sleep(10)                                      # until rank 0 has spoken, and torchrun ends all
        os._exit(2)
    try:
        yield
        failed.zero_()
    finally:
        if rank() == 0:
            all_sum(failed)


def seed_of(*numbers: int) -> int:
    """One seed from several numbers: different for different ones, whatever their size."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0] >> 1)


# ------------------------------------------------------------------------------------------------------ data
def outlines() -> dict[str, list]:
    """Each figure as polygons in [-1, 1], y down: the first is filled with ink, a second is a hole in it."""
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    disc = np.stack([np.cos(t), np.sin(t)], 1)
    heart_y = 5 * np.cos(2 * t) - 13 * np.cos(t) + 2 * np.cos(3 * t) + np.cos(4 * t)
    star = [(math.sin(i * math.pi / 5), -math.cos(i * math.pi / 5)) for i in range(10)]
    return {
        'disc': [disc], 'ring': [disc, .5 * disc],
        'square': [[(-.8, -.8), (.8, -.8), (.8, .8), (-.8, .8)]],
        'triangle': [[(0, -.95), (.95, .75), (-.95, .75)]],
        'star': [np.array(star) * np.array([1.15, .48] * 5)[:, None]],
        'heart': [np.stack([np.sin(t) ** 3, heart_y / 16], 1)],
        'cross': [[(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
                   (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)]],
        'moon': [disc, .85 * disc + (.5, -.2)],
        'arrow': [[(0, -1), (.8, -.05), (.3, -.05), (.3, 1), (-.3, 1), (-.3, -.05), (-.8, -.05)]],
        'hourglass': [[(-.8, -.95), (.8, -.95), (.12, 0), (.8, .95), (-.8, .95), (-.12, 0)]]}


FIGURES = tuple(outlines())


def draw_shapes(count: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Draws ten kinds of figures in turn: uint8 (count, 3, size, size) and int64 labels (count,).

    One bright figure on a dark ground, antialiased, of varied colours, sizes, places and turns (up to 15
    degrees). The same count, seed and size give the same images.
    """
    def colour(saturation: tuple, value: tuple) -> np.ndarray:          # of any hue, RGB in [0, 255]
        hsv = random.uniform(), random.uniform(*saturation), random.uniform(*value)
        return 255 * np.array(colorsys.hsv_to_rgb(*hsv))

    random = np.random.RandomState(seed)
    polygons = [[np.array(polygon) for polygon in figure] for figure in outlines().values()]
    images = np.empty((count, size, size, 3), np.uint8)
    for i in range(count):
        radius, turn = random.uniform(.28, .37) * size, random.uniform(-15, 15) * math.pi / 180
        centre = size / 2 + random.uniform(-.08, .08, 2) * size
        turned = radius * np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        mask = Image.new('L', (4 * size, 4 * size))
        for ink, points in zip((255, 0), polygons[i % len(FIGURES)]):
            ImageDraw.Draw(mask).polygon([tuple(p) for p in 4 * (points @ turned + centre)], fill=ink)
        coverage = np.asarray(mask.reduce(4), np.float32)[..., None] / 255
        ink, ground = colour((.7, 1), (.85, 1)), colour((.3, .8), (.1, .3))
        images[i] = np.rint(ground + (ink - ground) * coverage)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.arange(count) % len(FIGURES)


CIFAR10_URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
CIFAR10_MD5 = 'c32a1d4ab5d03f1284b67883e8d87530'
CIFAR10_FILES = [*(f'data_batch_{i}.bin' for i in range(1, 6)), 'test_batch.bin']     # of 10,000 images each
CIFAR10_CLASSES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()


def md5(content) -> str:
    """To tell files apart; not for security, for which some machines refuse it."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def download_cifar10(folder: Path, url: str = CIFAR10_URL, expected: str = CIFAR10_MD5):
    """Downloads and unpacks the binary files to folder/cifar-10-batches-bin, all of them or none."""
    folder.mkdir(parents=True, exist_ok=True)
    advice = 'try again, or unpack CIFAR-10 (binary version) yourself and name its folder with --data-dir'
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        archive = Path(scratch, 'cifar-10-binary.tar.gz')
        try:
            socket.setdefaulttimeout(60)                                # seconds without a byte
            torch.hub.download_url_to_file(url, str(archive))
            found = md5(archive.read_bytes())
            check(found == expected, f'{url}: broken off or changed, its md5 is {found}, not {expected}; '
                  f'{advice}')
            shutil.unpack_archive(archive, scratch, filter='data')
            Path(scratch, 'cifar-10-batches-bin').replace(folder / 'cifar-10-batches-bin')
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f'{url}: cannot be downloaded ({error}); {advice}') from None


def read_cifar10(data_dir: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (50000, 3, 32, 32) uint8 and labels, test images (10000, ...) and labels."""
    folder = Path(data_dir or 'data')
    if data_dir is None and not (folder / 'cifar-10-batches-bin').is_dir():
        download_cifar10(folder)
    check(folder.is_dir(), f'--data-dir {folder}: no such folder; without the flag, CIFAR-10 comes to data/')
    if (folder / 'cifar-10-batches-bin').is_dir():
        folder = folder / 'cifar-10-batches-bin'
    records = torch.empty(6, 10_000, 1 + 3 * 32 * 32, dtype=torch.uint8)            # labels and planes
    for records_of_file, path in zip(records, [folder / name for name in CIFAR10_FILES]):
        check(path.is_file(), f'--data-dir {folder}: has no {path.name}; needs CIFAR-10, binary version')
        size, expected = path.stat().st_size, records_of_file.numel()
        check(size == expected, f'{path}: has {size} bytes instead of {expected}; broken, or not CIFAR-10')
        records_of_file.copy_(torch.from_numpy(np.fromfile(path, np.uint8)).view_as(records_of_file))
        top = int(records_of_file[:, 0].max())
        check(top <= 9, f'{path}: holds the label {top}, but CIFAR-10 has 0 to 9; broken, or not CIFAR-10')
    images, labels = records[..., 1:].unflatten(-1, (3, 32, 32)), records[..., 0].long()
    images, labels = images.flatten(0, 1).contiguous(), labels.flatten()
    return images[:50_000], labels[:50_000], images[50_000:], labels[50_000:]


class Data:
    """Training and held-out images and labels. A step's batch follows from (seed, step) alone, and each
    process gets its share of it, so that runs on any number of processes see the same batches.

    views: as what an image can be met, for the cache of tokens. Mirrored or not, if that is all; else as it
    was cropped in each of the first epochs, `--cache-passes` of them, after which they come again.
    """

    def __init__(self, args: argparse.Namespace, count: int, val_count: int, device, is_cropped: bool):
        self.args, self.count, self.val_count, self.device, self.epoch = args, count, val_count, device, -1
        self.is_cropped, self.views = is_cropped, args.cache_passes if is_cropped else 1 + args.flip

    def shuffled(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Numbers of all training images, in an epoch's order, and each one's noise (count, 3)."""
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(seed_of(self.args.seed, epoch))
            self.order = torch.randperm(self.count, generator=generator)
            in_order = torch.rand(self.count, 3, generator=generator)
            self.noise = in_order[self.order.argsort()]
            self.epoch = epoch
        return self.order, self.noise

    def in_step(self, step: int, batch_size: int) -> tuple[int, Tensor, Tensor]:
        """The epoch, and of this process's training images their numbers (b,) and noise_b3 for `augment`."""
        epoch, place = divmod(step, self.count // batch_size)
        order, noise = self.shuffled(epoch)
        numbers = share_of(order[place * batch_size:(place + 1) * batch_size])
        return epoch, numbers, noise[numbers]

    def views_in_step(self, step: int, batch_size: int) -> tuple[Tensor | int, Tensor]:
        """As which views this process's training images are met, and their numbers."""
        epoch, numbers, noise_b3 = self.in_step(step, batch_size)
        return epoch % self.views if self.is_cropped else self.args.flip * (noise_b3[:, 2] < 0.5), numbers

    def val_numbers(self, size: int) -> tuple[Tensor, ...]:
        """Numbers of this process's held-out images, at most `size` at once."""
        return torch.arange(rank(), self.val_count, world_size()).split(size)

    def val_batches(self, size: int):
        """This process's held-out images and labels, without augmentation."""
        return self.load((-1, numbers) for numbers in self.val_numbers(size))


class ArrayData(Data):
    """Drawn shapes or CIFAR-10: uint8, whole on the training device."""

    def __init__(self, args: argparse.Namespace, image_size: int, device: torch.device):
        if args.preset == 'shapes':
            arrays = (*draw_shapes(args.train_count or 12_000, args.seed, image_size),
                      *draw_shapes(args.val_count, args.seed + 2 ** 31, image_size))
            self.class_names = list(FIGURES)
        else:
            check(image_size == 32, f'--image-size {image_size}: CIFAR-10 has images of 32')
            arrays, self.class_names = read_cifar10(args.data_dir), CIFAR10_CLASSES
        self.images, self.labels = (array[:args.train_count].to(device) for array in arrays[:2])
        self.val_images, self.val_labels = (array[:args.val_count].to(device) for array in arrays[2:])
        self.fingerprint = md5(arrays[0][:args.train_count].numpy())
        super().__init__(args, len(self.images), len(self.val_images), device, args.crop > 0)

    def take(self, numbers: Tensor, noise_b3: Tensor) -> tuple[Tensor, Tensor]:
        """Training images (b, 3, S, S) in [-1, 1], augmented as the noise says, and labels."""
        numbers, noise_b3 = (to_device(tensor, self.device) for tensor in (numbers, noise_b3))
        images = augment(to_float(self.images[numbers]), noise_b3, self.args.flip, self.args.crop)
        return images, self.labels[numbers]

    def batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """This process's images (b, 3, S, S) in [-1, 1] and labels of training step `step`."""
        return self.take(*self.in_step(step, batch_size)[1:])

    def load(self, batches):
        """Images (b, 3, S, S) in [-1, 1] and labels; a batch is (view, numbers), view -1 of held-out ones."""
        for view, numbers in batches:
            if view < 0:
                yield to_float(self.val_images[numbers]), self.val_labels[numbers]
            elif self.is_cropped:
                yield self.take(numbers, self.shuffled(view)[1][numbers])
            else:
                noise_b3 = torch.full((len(numbers), 3), 0.0 if view else 0.5)      # 0: mirrored
                yield self.take(numbers, noise_b3)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """What was made on the CPU; a GPU is not kept waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else tensor.to(device)


def augment(images_B3HW: Tensor, noise_B3: Tensor, flip: bool, crop: int) -> Tensor:
    """Mirrors half of the images, and shifts each by up to `crop` pixels, its edge continued. Of noise_B3,
    uniform in [0, 1), two numbers decide on the shifts, down and right, and one whether to mirror."""
    if not (flip or crop):
        return images_B3HW
    B, _, H, W = images_B3HW.shape
    device = images_B3HW.device
    dy, dx = ((noise_B3[:, :2] * (2 * crop + 1)).long() - crop).T[..., None]
    rows, columns = dy + torch.arange(H, device=device), dx + torch.arange(W, device=device)
    if flip:
        columns = torch.where(noise_B3[:, 2:] < 0.5, W - 1 - columns, columns)
    y, x = rows.clamp(0, H - 1)[:, :, None], columns.clamp(0, W - 1)[:, None, :]
    images = torch.arange(B, device=device)[:, None, None]
    return images_B3HW[images, :, y, x].permute(0, 3, 1, 2).contiguous()


IMAGE_ENDINGS = ('.jpg .jpeg .jpe .jfif .png .apng .webp .avif .gif .bmp .dib .ppm .pgm .pbm .pnm .pfm .tif '
                 '.tiff .jp2 .j2k .jpx .tga .ico .psd .qoi').split()
SPLIT = '(train|trn|valid|validate|validation|val|dev|test|eval)([ _-]?(ing|set|data|images?|[0-9]+))*'


def find_images(folder: Path) -> tuple[list[tuple[str, str]], str]:
    """(path, class) of every image in folder/<class>/ or deeper, by name; what was left out, for people."""
    images, left_out, root = [], defaultdict(list), os.path.realpath(folder)
    endings = tuple(Image.registered_extensions().keys() & IMAGE_ENDINGS)   # not every Pillow reads them all
    seen = {root}                                               # folders, so that none is read twice

    def is_within(real: str) -> bool:
        return real.startswith(root + os.sep)

    def search(place: str, class_name: str | None, depth: int) -> bool:
        count = len(images)
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            path, name, reason = entry.path, entry.name, None
            if name.startswith(('.', '@eaDir', '__MACOSX')):    # what systems hide: .DS_Store, ._x.png, ...
                reason = 'hidden'
            elif entry.is_file(follow_symlinks=False) or os.path.isfile(path):
                if class_name is None:
                    reason = 'outside of class folders'
                elif name.lower().endswith(endings):
                    images.append((path, class_name))
                else:
                    reason = os.path.splitext(name)[1].lower() or 'without an ending'
            elif not os.path.isdir(path):
                reason = 'links to nowhere' if entry.is_symlink() else 'not files'
            elif (real := os.path.realpath(path)) in seen or is_within(real) and entry.is_symlink():
                reason = 'links to folders that are read anyway'
            elif depth > 50 or not os.access(path, os.R_OK | os.X_OK):
                reason = 'folders that cannot be read'
            else:
                seen.add(real)
                if not search(path, class_name or name, depth + 1):
                    reason = 'folders without images'
            if reason:
                left_out[reason].append(os.path.relpath(path, folder))
        return len(images) > count

    search(str(folder), None, 0)
    return images, '; '.join(f'{reason}: {len(names)} ({some(names)})'
                             for reason, names in sorted(left_out.items()))


def some(names: list[str]) -> str:
    return ', '.join(re.sub(r'\s', ' ', name) for name in names[:5]) + ', ...' * (len(names) > 5)


def find_splits(folder: Path) -> tuple[list, list]:
    """(path, class) of the images in train/<class>/, or in <class>/ where there are no splits; of those in
    val/<class>/, if any. Says what it leaves out."""
    def folders_in(place: Path) -> list[str]:
        names = sorted(os.listdir(place)) if os.access(place, os.R_OK | os.X_OK) else ()
        return [name for name in names if (place / name).is_dir() and name[0] != '.']

    check(folder.is_dir(), f'--data-dir {folder}: no such folder')
    names, splits = folders_in(folder), []
    wanted, is_split = 'wanted are train/<class>/*.jpg and perhaps val/<class>/*.jpg', 'train' in names
    inner = [] if is_split else [f'{name}/{deeper}' for name in names[:100] for deeper in
                                 folders_in(folder / name)]
    others = [f'{name}/' for name in names + inner if re.fullmatch(SPLIT, os.path.basename(name).lower())]
    check(is_split or not others, f'--data-dir {folder}: has {some(others)} but no train/; {wanted}')
    for name in [name for name in ('train', 'val') if name in names] if is_split else ['']:
        images, left_out = find_images(folder / name)
        check(len(images) > 0, f'--data-dir {folder}: no images in {folder / name}/<class>/ (found are '
              f"{left_out or 'nothing'}); {wanted}")
        if left_out:
            say(f'left out of {folder / name}: {left_out}')
        if len(classes := {class_name for _, class_name in images}) == 1:
            deeper = {os.path.basename(os.path.dirname(path)) for path, _ in images} - classes
            if len(deeper) > 1:
                say(f'note: all of {folder / name} is one class, {classes.pop()}, whose images lie in '
                    f'{some(sorted(deeper))}; if those are the classes, {wanted}')
        splits.append(images)
    beside = [name for name in sorted(os.listdir(folder)) if is_split and name not in ('train', 'val')]
    if beside:
        say(f'left out of {folder}: {some(beside)}; only train/ and val/ are read')
    return splits[0], splits[1] if len(splits) > 1 else []


def hold_out(images: list, count: int, random: np.random.Generator) -> tuple[list, list]:
    """Some images (path, class) for training, and so many for validation, at most: each class keeps one."""
    left, held = Counter(name for _, name in images), set()
    for i in random.permutation(len(images)):
        if len(held) < count and left[images[i][1]] > 1:
            left[images[i][1]] -= 1
            held.add(i)
    return [images[i] for i in range(len(images)) if i not in held], [images[i] for i in sorted(held)]


def limit_of_container(name: str) -> float:
    """The first number in a file of cgroups, of version 2 or 1; infinite where there is none."""
    try:
        return float(Path('/sys/fs/cgroup', name).read_text().split()[0].replace('max', 'inf'))
    except (OSError, ValueError, IndexError):
        return math.inf


def usable_cores() -> int:
    """Processors that this process may use: less than all under taskset, in a job or a container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    quotas = [limit_of_container(name) for name in ('cpu.max', 'cpu/cpu.cfs_quota_us')]
    quota = min(quota for quota in quotas if quota > 0)         # microseconds of 100,000; -1 for none
    return max(1, int(min(cores, quota / 100_000)))


def read_image(path: str | Path, size: int, random: np.random.Generator | None = None) -> np.ndarray:
    """An image file as the released code cuts it: uint8 (size, size, 3). Its shorter side becomes 1.125 *
    size, of which a square is taken at random, or in the centre. Raises UserError, which names the file."""
    shorter = round(1.125 * size)
    return sample.cut_square(sample.open_image(path, shorter), size, shorter, random)


class FolderData(Data):
    """Images in train/<class>/ and val/<class>/, read when they are needed, by threads: Pillow works outside
    of Python's lock, so that they do as much as processes would."""

    def __init__(self, args: argparse.Namespace, image_size: int, device: torch.device):
        folder = Path(args.data_dir)
        train, val = find_splits(folder)
        self.class_names, random = sorted({name for _, name in train + val}), np.random.default_rng(args.seed)
        if not val:
            train, val = hold_out(train, max(1, min(args.val_count, len(train) // 10)), random)
            check(len(val) > 0, f'--data-dir {folder}: no val/, and no class has a second image to hold out; '
                  'add images')
            say(f'no val/ in {folder}: {len(val)} of {len(train) + len(val)} images are held out, by --seed')
        self.train, self.val = ([found[i] for i in sorted(random.permutation(len(found))[:count])]
                                for found, count in ((train, args.train_count), (val, args.val_count)))
        if unlearned := sorted({*self.class_names} - {name for _, name in self.train}):
            say(f'note: {len(unlearned)} of {len(self.class_names)} classes have no images to train on '
                f'({some(unlearned)})')
        text = '\n'.join(os.path.relpath(path, folder) for path, _ in self.train + self.val)
        self.fingerprint = md5(os.fsencode(text))
        self.broken, self.size, self.next = set(), image_size, None
        cores = usable_cores() // int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        threads = min(12, cores - 1) if args.workers is None else args.workers
        self.workers = ThreadPoolExecutor(max(1, threads))
        super().__init__(args, len(self.train), len(self.val), device, is_cropped=True)

    def read(self, epoch: int, number: int) -> tuple[np.ndarray, str]:
        """An image, uint8 (S, S, 3), and its class. The crop follows from (seed, epoch, number); epoch -1 is
        held-out images, their centres. For an image that cannot be read, its neighbour stands in."""
        found, total = self.train if epoch >= 0 else self.val, self.count + self.val_count
        for number in itertools.chain(range(number, len(found)), range(number)):
            path, class_name = found[number]
            random = np.random.default_rng((self.args.seed, epoch, number)) if epoch >= 0 else None
            try:
                image = read_image(path, self.size, random)
                is_mirrored = self.args.flip and random is not None and random.random() < 0.5
                return image[:, ::-1] if is_mirrored else image, class_name
            except UserError as error:
                if path not in self.broken:
                    self.broken.add(path)
                    tqdm.write(f'broken, left out: {error}', file=sys.stderr)
            check(len(self.broken) <= 0.01 * total, f'--data-dir {self.args.data_dir}: {len(self.broken)} of '
                  f'{total} images are broken, more than 1%; mend or remove them (they are named above)')
        raise UserError(f'--data-dir {self.args.data_dir}: all {len(found)} images of one kind are broken')

    def load(self, batches):
        """Images (b, 3, S, S) in [-1, 1] and labels; a batch is (epoch, numbers). Four are read ahead."""
        ahead = deque()
        for epoch, numbers in itertools.chain(batches, [(0, torch.empty(0))] * 4):
            ahead.append([self.workers.submit(self.read, epoch, number) for number in numbers.tolist()])
            if len(ahead) > 4:
                images, names = zip(*(future.result() for future in ahead.popleft()))
                images = to_device(torch.from_numpy(np.stack(images)), self.device)
                labels = to_device(torch.from_numpy(np.searchsorted(self.class_names, names)), self.device)
                yield to_float(images.permute(0, 3, 1, 2).contiguous()), labels

    def batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """This process's images (b, 3, S, S) in [-1, 1] and labels of training step `step`."""
        if (step, batch_size) != self.next:
            steps = (self.in_step(later, batch_size) for later in itertools.count(step))
            self.batches = self.load((epoch, numbers) for epoch, numbers, _ in steps)
        self.next = step + 1, batch_size
        return next(self.batches)


def load_data(args: argparse.Namespace, image_size: int, device: torch.device) -> Data:
    """The images that the preset and --data-dir stand for, the same in all processes."""
    in_folders = args.data_dir and (args.preset[:5] != 'cifar' or Path(args.data_dir, 'train').is_dir())
    check(in_folders or args.preset[:8] != 'imagenet', f'--preset {args.preset}: needs --data-dir, a folder '
          'with train/<class>/*.jpg and val/<class>/*.jpg')
    data = (FolderData if in_folders else ArrayData)(args, image_size, device)
    for flag, size in (('--batch-size', args.batch_size), ('--vqvae-batch-size', args.vqvae_batch_size or 0)):
        check(size <= data.count, f'{flag} {size}: there are only {data.count} images to train on')
        check(size % world_size() == 0, f'{flag} {size}: {world_size()} processes cannot share it; '
              f'{max(1, size // world_size()) * world_size()} would do')
    check(data.val_count >= world_size(), f'--val-count {data.val_count}: fewer than there are processes')
    return data


def write_note(path: Path, made: dict):
    """What lies beside it depends on this: a line for each name and value."""
    save_file(path, lambda file: file.write('\n'.join(f'{name} {made[name]}' for name in made).encode()))


def differing(note: Path, made: dict) -> list[str]:
    """By which names a note says something else."""
    lines = {f'{name} {value}' for name, value in made.items()}
    return sorted({line.split()[0] for line in lines ^ {*note.read_text('utf-8').splitlines()}})


CACHED_AT_ONCE = 64             # images, at most; in other batches rounding may differ


class TokenData:
    """What the tokenizer makes of a data set, read from tokens.bin in --out, where it is written at first.

    A row for each image in each of its views (see Data), held-out ones last: its label and its tokens, plus
    1, for 0 is what isn't written yet; uint16. tokens.txt says of which tokenizer and images they are.
    """

    def __init__(self, stage: 'Stage', tokenizer: VQVAE):
        self.stage, self.data, self.path = stage, stage.run.data, stage.run.out / 'tokens.bin'
        data = self.data
        self.shape = data.views * data.count + data.val_count, 1 + sum(tokenizer.scale_lengths)
        with rank_0_first():
            if rank() == 0:
                self.claim(stage.args, tokenizer)
        kinds = [(view, data.count) for view in range(data.views)] + [(-1, data.val_count)]
        at_once = min(CACHED_AT_ONCE, stage.micro_batch_size)
        parts = [(view, part) for view, count in kinds for part in torch.arange(count).split(at_once)]
        ends = np.cumsum([len(part) for _, part in parts])
        lacking = self.find_lacking(ends, tokenizer)
        mine = lacking[rank()::world_size()]
        self.write(tokenizer, [parts[i] for i in mine], [int(ends[i]) - len(parts[i][1]) for i in mine],
                   rounds=math.ceil(len(lacking) / world_size()))
        check(not lacking or not self.find_lacking(ends, tokenizer), f'{self.path}: lacks tokens though all '
              'processes wrote theirs; is it the same file for all? choose an --out that all share')
        self.tokens = self.rows()               # opened when all is written, for folders that machines share
        views = 'random crops' if data.is_cropped else 'exact views'
        say(f'var: trains on tokens, {data.views} {views} of each image: {self.path}, '
            f'{self.path.stat().st_size / 2 ** 20:,.1f} MiB')

    def rows(self) -> np.ndarray:
        return np.memmap(self.path, '<u2', 'r', shape=self.shape)

    def claim(self, args: argparse.Namespace, tokenizer: VQVAE):
        """Makes the file, of zeros, or finds the one that a stopped run left."""
        note, size, data = self.path.with_suffix('.txt'), 2 * math.prod(self.shape), self.data
        check(fits_16_bits(self.stage, tokenizer), '--cache-tokens: more codes or classes than 16 bits can '
              'tell apart; say --no-cache-tokens')
        weights = tokenizer.state_dict().values()
        crc = reduce(lambda crc, tensor: zlib.crc32(tensor.cpu().numpy(), crc), weights, 0)
        made = dict(tokenizer=crc, images=data.fingerprint,
                    dtype=sample.choose_dtype(self.stage.run.device, args.dtype), flip=args.flip,
                    crop=args.crop, views=data.views, val_count=data.val_count,
                    seed=args.seed if data.is_cropped else None, **asdict(tokenizer.config))
        if note.exists() and self.path.exists():
            others, found = differing(note, made), self.path.stat().st_size
            check(not others, f'{self.path}: holds tokens of another {", ".join(others)}; remove it, and it '
                  'is written anew, or choose another --out')
            check(found == size, f'{self.path}: torn, has {found} bytes instead of {size}; remove it, and it '
                  'is written anew')
        else:
            self.path.unlink(missing_ok=True)
            free = shutil.disk_usage(self.path.parent).free
            check(free > size, f'--cache-tokens: {self.path} takes {size / 2 ** 30:,.1f} GiB, but only '
                  f'{free / 2 ** 30:,.1f} are free; say fewer --cache-passes or --no-cache-tokens')
            save_file(self.path, lambda file: file.truncate(size))
            write_note(note, made)       # last: with it, the file counts

    @rank_0_first()
    def check_rows(self, rows: np.ndarray, tokenizer: VQVAE):
        check(rows[0] <= len(self.data.class_names) and rows[1:].max() <= tokenizer.config.vocab_size,
              f'{self.path}: damaged, holds tokens or labels that there are none of; remove it, and it is '
              'written anew')

    def find_lacking(self, ends: np.ndarray, tokenizer: VQVAE) -> list[int]:
        """Which batches are not wholly there, as rank 0 sees it."""
        lacking, largest = [], np.zeros(self.shape[1], np.uint16)
        for i, rows in enumerate(np.split(self.rows(), ends[:-1]) if rank() == 0 else ()):
            np.maximum(largest, rows.max(0), out=largest)
            lacking += [] if rows.all() else [i]
        self.check_rows(largest, tokenizer)
        return from_rank_0(lacking)

    def write(self, tokenizer: VQVAE, parts: list, starts: list[int], rounds: int):
        """Writes this process's share of what is lacking; all stop together if one has to."""
        stage, width, batches = self.stage, 2 * self.shape[1], self.data.load(parts)
        with open(self.path, 'r+b', buffering=0) as file:               # no page of others' rows is read
            for i in tqdm(range(rounds), desc='tokens', unit='batch', disable=rank() > 0 or not rounds):
                if i < len(parts):                  # in the last round, some have none
                    images, labels = next(batches)
                    with autocast(stage.run.device, stage.args.dtype):
                        rows = torch.cat([labels[:, None], tokenizer.encode(images)], dim=1) + 1
                    file.seek(starts[i] * width)
                    file.write(rows.cpu().numpy().astype('<u2').tobytes())
                if i % 16 == 0:
                    stage.agree()
                    if stage.is_stop:
                        break
        stage.agree()
        if stage.is_stop:
            stage.stop()

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """tokens_BL and labels of these rows."""
        values = torch.from_numpy(self.tokens[rows.numpy()].astype(np.int64) - 1)
        values = to_device(values, self.data.device)
        return values[:, 1:], values[:, 0]

    def batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Of this process's images of training step `step`."""
        view, numbers = self.data.views_in_step(step, batch_size)
        return self.read(view * self.data.count + numbers)

    def val_batches(self, size: int):
        for numbers in self.data.val_numbers(size):
            yield self.read(self.data.views * self.data.count + numbers)


# ----------------------------------------------------------------------------------- stage 1, the tokenizer
REVIVAL_IMAGES = 256                    # whose features may replace dead codes; bounds the memory it takes


def train_tokenizer(run: SimpleNamespace, tokenizer: VQVAE):
    """Stage 1. Dead codes, which no token of a batch was since the last revival, are put to use again."""
    args = run.args
    for i in set(range(len(tokenizer.phis))) - set(tokenizer.phi_table):
        tokenizer.phis[i].requires_grad_(False)     # no scale uses it
    torch.nn.init.zeros_(tokenizer.codebook.weight)     # all codes are dead until step 0 puts them on data
    stage = Stage(run, 'vqvae', tokenizer)
    network, used_V = stage.networks['model'], torch.zeros(tokenizer.config.vocab_size, device=run.device)
    stage.state['used_V'] = used_V
    classifier = perceptual = None
    if args.perceptual_weight and args.perceptual == 'classifier':
        classifier = Classifier(len(run.data.class_names), tokenizer.config.image_size,
                                args.classifier_channels).to(run.device)
        stage.add('classifier', classifier, betas=(0.9, 0.95), weight_decay=args.weight_decay)
        perceptual = classifier.perceptual_distance
    elif args.perceptual_weight:
        perceptual = load_lpips(run.device)
    if args.adversarial_weight:
        discriminator = Discriminator(args.discriminator_channels).to(run.device)
        stage.add('discriminator', discriminator, betas=(0.5, 0.9), weight_decay=0.0)
    stage.enter()
    if classifier:
        if stage.step == 0:
            train_classifier(stage, classifier)
        classifier.eval().requires_grad_(False)
    for step in stage.steps():
        images, _ = run.data.batch(step, stage.batch_size)
        if step % args.revive_every_steps == 0 and stage.done <= 0.75:          # later, the codebook settles
            revive_dead_codes(stage, tokenizer, used_V == 0, images)
            used_V.zero_()
        discriminator = stage.networks.get('discriminator') if step >= args.discriminator_start else None
        seen_V = torch.zeros_like(used_V)
        for images, in stage.parts(images):
            with autocast(run.device, args.dtype):
                loss, metrics, tokens_BL = tokenizer_loss(network, images, args, perceptual, discriminator)
            stage.backward(loss, metrics)
            seen_V[tokens_BL] = 1.0
        used_V += all_sum(seen_V)
        stage.update()
        if stage.is_time_to_validate:
            stage.report(validate_tokenizer(stage, tokenizer))
            if rank() == 0:
                weights = {name: tensor.cpu() for name, tensor in tokenizer.state_dict().items()}
                save_checkpoint(run.out / 'vqvae.pt', 'vqvae', vqvae=weights,
                                vqvae_config=asdict(tokenizer.config))
                show_reconstructions(run, tokenizer)


def tokenizer_loss(network, images: Tensor, args, perceptual, discriminator) -> tuple[Tensor, dict, Tensor]:
    """Equation 5, what the log shows of it, and the tokens. Its two last terms may be left out."""
    reconstruction, vq_loss, tokens_BL = network(images)
    loss = F.mse_loss(reconstruction, images)
    metrics = dict(reconstruction=loss, vq=vq_loss)
    if perceptual is not None:
        metrics['perceptual'] = perceptual(reconstruction, images).mean()
        loss = loss + args.perceptual_weight * metrics['perceptual']
    if discriminator is not None:
        last_layer = unwrapped(network).decoder.conv_out.weight
        terms = adversarial_terms(discriminator, images, reconstruction, loss, last_layer)
        metrics |= terms
        weight = args.adversarial_weight * terms['adaptive']
        loss = loss + weight * terms['generator'] + terms['discriminator']
    return loss + vq_loss, metrics, tokens_BL


def adversarial_terms(discriminator, images, reconstruction, loss: Tensor, last_layer: Tensor) -> dict:
    """The adversarial term of Eq. 5, as in VQGAN (Esser et al., 2021), and the discriminator's hinge loss.

    One backward pass will do: the first looks through a frozen discriminator, the second at a detached
    reconstruction. The adaptive weight makes the gradients of the first and of `loss` equally long at the
    decoder's last layer, where both enter it.
    """
    frozen = unwrapped(discriminator).requires_grad_(False)
    generator = -frozen(reconstruction).float().mean()
    by_loss, by_generator = (torch.autograd.grad(term, last_layer, retain_graph=True)[0].norm()
                             for term in (loss, generator))
    frozen.requires_grad_(True)
    real, made = discriminator(torch.cat([images, reconstruction.detach()])).float().chunk(2)
    return dict(generator=generator, adaptive=(by_loss / (by_generator + 1e-4)).clamp(max=1e4),
                discriminator=(F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2)


def train_classifier(stage: 'Stage', classifier: Classifier):
    """Trains the network of the perceptual term on images and labels of the first epochs, shifted by up to an
    eighth, at least 128 at once: its BatchNorm needs many. The time it takes is part of --budget-minutes. A
    run that is stopped meanwhile begins it anew."""
    args, data, device, network = stage.args, stage.run.data, stage.run.device, stage.networks['classifier']
    B = stage.batch_size * max(1, min(128, data.count) // stage.batch_size)
    at_once = args.vqvae_micro_batch_size or args.micro_batch_size or B
    steps = args.classifier_epochs * (data.count // B)
    generator = torch.Generator().manual_seed(seed_of(args.seed, 3))
    for step in tqdm(range(steps), desc='classifier', disable=rank() > 0):
        for group in stage.optimizers['classifier'].param_groups:
            group['lr'] = stage.lr * learning_rate(step / steps, 0.0)
        images, labels = data.batch(step, B)
        noise_B3 = to_device(share_of(torch.rand(B, 3, generator=generator)), device)
        images, stage.row = augment(images, noise_B3, False, images.shape[-1] // 8), {}
        for part, named in zip(images.split(at_once), labels.split(at_once)):
            with autocast(device, args.dtype):
                loss = F.cross_entropy(network(part), named)
            (len(part) / len(images) * loss).backward()
        stage.move_weights()
        stage.agree()
        with rank_0_first():
            check(not stage.budget or stage.seconds < 0.8 * stage.budget, '--budget-minutes: most of the '
                  "tokenizer's is over before the classifier has learned; give more, or say fewer "
                  f'--classifier-epochs than {args.classifier_epochs}')
        if stage.is_stop and step + 1 < steps:
            stage.stop()
    stage.budget, stage.seconds = stage.budget and stage.budget - stage.seconds, 0.0
    for tensor in classifier.state_dict().values() if dist.is_initialized() else ():
        dist.broadcast(tensor, 0)                   # each process has seen means of its own images
    classifier.eval()
    with torch.no_grad(), autocast(device, args.dtype):
        right = sum((classifier(images).argmax(1) == labels).float().sum()
                    for images, labels in data.val_batches(stage.micro_batch_size))
    right = all_sum(right).item() / data.val_count
    say(f'classifier: {steps} steps, right on {right:.1%} of held-out images')


@rank_0_first()                                     # who downloads its weights for all
def load_lpips(device: torch.device) -> torch.nn.Module:
    """The perceptual distance of Zhang et al. (2018), frozen: two batches in [-1, 1] -> one number a pair."""
    try:
        import lpips
        return lpips.LPIPS(net='vgg', verbose=False).to(device).eval().requires_grad_(False)
    except Exception as error:                      # it isn't installed, or a download fails in some way
        raise UserError(f'--perceptual lpips: it cannot be loaded ({one_line(error)}); `pip install '
                        'lpips`, try again, or omit the flag') from None


@torch.no_grad()
def revive_dead_codes(stage: 'Stage', tokenizer: VQVAE, dead_V: Tensor, images: Tensor):
    """Puts dead codes on what the quantizer meets in the whole batch, the same ones in all processes."""
    with autocast(stage.run.device, stage.args.dtype):
        f = torch.cat([tokenizer.features(part) for part in images.split(stage.micro_batch_size)])
    whole = f.new_zeros(world_size() * len(f), *f.shape[1:])
    share_of(whole).copy_(f)
    torch.manual_seed(seed_of(stage.args.seed, stage.step, 1))
    tokenizer.revive_codes(dead_V, all_sum(whole)[:REVIVAL_IMAGES])
    if dist.is_initialized():                       # lest different GPUs round differently
        dist.broadcast(tokenizer.codebook.weight.data, 0)


@torch.no_grad()
def validate_tokenizer(stage: 'Stage', tokenizer: VQVAE) -> dict[str, float]:
    """PSNR (dB) of held-out images; codes in use (%) and their perplexity, which is the number of equally
    frequent codes that would be as varied, in all and scale by scale."""
    V, lengths, data = tokenizer.config.vocab_size, stage.lengths, stage.run.data
    error = torch.zeros((), device=stage.run.device)
    hits_KV = torch.zeros(len(lengths), V, device=stage.run.device)
    for images, _ in data.val_batches(stage.micro_batch_size):
        with autocast(stage.run.device, stage.args.dtype):
            tokens_BL = tokenizer.encode(images)
            error += (tokenizer.decode(tokens_BL) - images).square().mean((1, 2, 3)).sum()
        hits_KV += torch.stack([maps.flatten().bincount(minlength=V) for maps in tokens_BL.split(lengths, 1)])
    all_sum(hits_KV)
    row = dict(psnr=-10 * (all_sum(error) / data.val_count / 4).log10().item())
    for name, hits_V in zip(['', *stage.scales], [hits_KV.sum(0), *hits_KV]):
        row['use' + name] = 100 * (hits_V > 0).float().mean().item()
        row['perplexity' + name] = torch.special.entr(hits_V / hits_V.sum()).sum().exp().item()
    return row


def show_reconstructions(run: SimpleNamespace, tokenizer: VQVAE):
    """reconstructions.png: rows of held-out images, each over a row of what the tokenizer makes of them."""
    originals, _ = next(run.data.val_batches(2 * max(4, 512 // tokenizer.config.image_size)))
    columns = max(1, len(originals) // 2)
    originals = originals[:2 * columns]
    with autocast(run.device, run.args.dtype):
        made = tokenizer.decode(tokenizer.encode(originals))
    rows = [row for pair in zip(originals.split(columns), made.split(columns)) for row in pair]
    sample.save_image(run.out / 'reconstructions.png', sample.grid(torch.cat(rows), columns))


# --------------------------------------------------------------------------------- stage 2, the transformer
def train_transformer(run: SimpleNamespace, var: VAR, tokenizer: VQVAE):
    """Stage 2. var.pt holds the weights that had the lowest held-out loss of all validations."""
    args, path = run.args, run.out / 'var.pt'
    sampling = {name: getattr(args, name) for name in SAMPLING}
    stage = Stage(run, 'var', var)
    lowest_loss = stage.state['lowest_loss'] = torch.tensor(math.inf)
    stage.enter()
    data = TokenData(stage, tokenizer) if is_cached(stage, tokenizer) and not stage.is_over else run.data
    for step in stage.steps():
        train_on(stage, tokenizer, *data.batch(step, stage.batch_size))
        stage.update()
        if stage.is_time_to_validate:
            row = validate_transformer(stage, var, tokenizer, data)
            stage.report(row)
            is_best = row['loss'] < lowest_loss.item() or not path.exists()
            lowest_loss.fill_(min(lowest_loss.item(), row['loss']))
            model = tokenizer, var, run.data.class_names, sampling
            if rank() == 0 and args.keep_models:
                sample.save_model(run.out / f'var-{stage.step}.pt', *model)
            if rank() == 0 and is_best:
                sample.save_model(path, *model)
                show_samples(run, tokenizer, var, sampling)
            elif not is_best:
                say('not its lowest loss, so var.pt stays that of an earlier step')


def fits_16_bits(stage: 'Stage', tokenizer: VQVAE) -> bool:
    return max(tokenizer.config.vocab_size, len(stage.run.data.class_names)) < 2 ** 16


def is_cached(stage: 'Stage', tokenizer: VQVAE) -> bool:
    """As --cache-tokens says; else where tokens are those without a cache, and each is met once or more."""
    args, data = stage.args, stage.run.data
    if args.cache_tokens is None:
        is_longer = stage.budget or stage.total * stage.batch_size >= data.views * data.count
        is_same = isinstance(data, ArrayData) and not data.is_cropped
        return bool(is_same and is_longer and fits_16_bits(stage, tokenizer))
    return args.cache_tokens


def train_on(stage: 'Stage', tokenizer: VQVAE, batch: Tensor, labels: Tensor):
    """The gradients of a step, on this process's share of its images or of their tokens."""
    depth = unwrapped(stage.networks['model']).config.depth
    generator = torch.Generator().manual_seed(seed_of(stage.args.seed, stage.step, 2))
    noise_BN = torch.rand(stage.batch_size, 1 + 2 * depth, generator=generator)
    noise_BN = to_device(share_of(noise_BN), stage.run.device)
    for batch, labels, noise_BN in stage.parts(batch, labels, noise_BN):
        with autocast(stage.run.device, stage.args.dtype):
            loss_BL, right_BL = transformer_loss(stage.networks['model'], tokenizer, batch, labels, noise_BN)
        stage.backward(loss_BL.mean(), dict(loss=loss_BL.mean(0), accuracy=right_BL.float().mean(0)))


def transformer_loss(network, tokenizer: VQVAE, batch: Tensor, labels: Tensor,
                     noise_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token given all coarser scales, (B, L), and whether it was thought likeliest.
    batch: images, or their tokens."""
    # of images, in the released code outside of autocast
    tokens_BL = tokenizer.encode(batch) if batch.is_floating_point() else batch
    logits_BLV = network(labels, tokenizer.teacher_inputs(tokens_BL), noise_BN)
    loss = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten(), reduction='none')
    return loss.view_as(tokens_BL), logits_BLV.argmax(-1) == tokens_BL


@torch.no_grad()
def validate_transformer(stage: 'Stage', var: VAR, tokenizer: VQVAE, data) -> dict[str, float]:
    """Loss and accuracy on held-out images, each with its own label, in all and scale by scale."""
    loss_L, right_L = torch.zeros(2, sum(stage.lengths), device=stage.run.device)
    for batch, labels in data.val_batches(stage.micro_batch_size):
        with autocast(stage.run.device, stage.args.dtype):
            loss_BL, right_BL = transformer_loss(var, tokenizer, batch, labels)
        loss_L, right_L = loss_L + loss_BL.sum(0), right_L + right_BL.sum(0)
    N = stage.run.data.val_count
    row = stage.by_scale(dict(loss=all_sum(loss_L) / N, accuracy=all_sum(right_L) / N))
    return row | dict(ln_V=math.log(var.config.vocab_size))


def show_samples(run: SimpleNamespace, tokenizer: VQVAE, var: VAR, sampling: dict):
    """samples.png: a column a class, ten classes at most, at the sampling defaults."""
    columns, rows = min(10, var.config.num_classes), 8 if tokenizer.config.image_size <= 64 else 2
    labels = [i * var.config.num_classes // columns for i in range(columns)] * rows
    batch_size = min(16, run.args.micro_batch_size or 16)
    batches = sample.draw(tokenizer, var, labels, 0, batch_size, run.args.dtype, **sampling)
    images = torch.cat([images for images, _ in batches])
    sample.save_image(run.out / 'samples.png', sample.grid(images, columns))


# ------------------------------------------------------------------------------- what the two loops share
def learning_rate(done: float, last: float) -> float:
    """Released schedule, over the peak: up from 0.005 for 1/50, flat for 5% of the rest, down to `last`."""
    if done < 1 / 50:
        return 0.005 + 0.995 * done * 50
    return 1 - (1 - last) * max(0.0, (done - 1 / 50) / (1 - 1 / 50) - 0.05) / 0.95


def save_csv(path: Path, rows: list[dict]):
    """Whole or not at all; a column for each name that any row has."""
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row))
    writer.writeheader()
    writer.writerows(rows)
    save_file(path, lambda file: file.write(text.getvalue().encode()))


def save_checkpoint(path: Path, kind: str, previous: Path | None = None, **content):
    """What open_checkpoint reads. What stood at path is kept as `previous`, if that is named."""
    def write(file):
        torch.save(dict(kind=kind, **content), file)
        if previous and path.exists():
            file.flush()                                    # a full disk is noticed while path still stands
            os.fsync(file.fileno())
            os.replace(path, previous)
    save_file(path, write)


@contextmanager
def what_a_file_holds(complaint: str):
    """What fails in here, fails by the content of a file: an error of the user's, which begins like this."""
    try:
        yield
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError) as error:
        if sample.is_out_of_memory(error):
            raise
        raise UserError(f'{complaint} ({one_line(error)})') from None


def parameter_groups(model: torch.nn.Module, weight_decay: float, but=()) -> list[dict]:
    """Of all but some. No weight decay on one-dimensional tensors, nor on what stands for a position, a scale
    or a gate."""
    groups = [dict(params=[], weight_decay=weight_decay), dict(params=[], weight_decay=0.0)]
    others = [(name, parameter) for name, parameter in model.named_parameters()
              if not any(parameter is weight for weight in but)]
    for name, parameter in others:
        is_free = re.search('position|scale_embedding|adaln_table|log_scale', name) or parameter.ndim <= 1
        groups[bool(is_free)]['params'].append(parameter)
    return groups


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict):
    """Puts back its moments, of which each belongs to a parameter. Raises ValueError if they don't fit: torch
    would find out in the middle of a step."""
    parameters = dict(enumerate(w for group in optimizer.param_groups for w in group['params']))
    if saved.keys() != {'state', 'param_groups'}:
        raise ValueError('not the state of an optimizer')
    for i, moments in saved['state'].items():
        shapes = [() if name == 'step' else parameters[i].shape for name in moments]
        is_like = moments.keys() in ({'step', 'exp_avg', 'exp_avg_sq'}, {'momentum_buffer'})
        if not (is_like and all(moment.shape == shape and moment.is_floating_point() for moment, shape in
                                zip(moments.values(), shapes))):
            raise ValueError(f'moments of parameter {i} do not fit it')
    optimizer.load_state_dict(optimizer.state_dict() | dict(state=saved['state']))


class Stage:
    """The training of one model: its schedule, optimizers, log, saves and stops.

    run: what both stages share, see main. networks: the modules as a training pass calls them. state: other
    tensors that a resumed run needs. log: lines of the CSV. metrics: of the steps since the last of them.
    """

    def __init__(self, run: SimpleNamespace, name: str, model: VQVAE | VAR):
        self.run, self.args, self.name = run, run.args, name
        own = {key: value for key, value in vars(run.args).items() if value is not None}
        own |= {key.removeprefix(f'{name}_'): value for key, value in own.items() if key.startswith(name)}
        self.batch_size, self.last_lr = own['batch_size'], own['last_lr']
        self.micro_batch_size = own.get('micro_batch_size', self.batch_size)
        self.lr = own['lr'] * self.batch_size / 256
        self.total = own.get('steps') or math.ceil(own['epochs'] * run.data.count / self.batch_size)
        share = dict(vqvae=own['budget_vqvae'], var=1 - own['budget_vqvae'])[name]
        self.budget = 60 * own.get('budget_minutes', 0) * (share if own['stage'] == 'both' else 1)
        self.lengths = [side * side for side in model.config.scales]
        self.scales = [f'_{side}x{side}' for side in model.config.scales]
        self.step, self.seconds = 0, 0.0            # trained so far, over all resumes
        self.networks, self.optimizers, self.state = {}, {}, {}
        self.log, self.metrics, self.unread, self.started = [], [], [], None
        self.add('model', model, (0.9, 0.95), own['weight_decay'])

    def add(self, name: str, module: torch.nn.Module, betas: tuple[float, float], weight_decay: float):
        matrices = []
        if self.name == 'var' and self.args.var_optimizer == 'muon':
            matrices = [w for block in module.blocks for w in block.parameters() if w.ndim == 2]
            self.optimizers['muon'] = torch.optim.Muon(matrices, weight_decay=weight_decay,
                                                       adjust_lr_fn='match_rms_adamw')
        groups = parameter_groups(module, weight_decay, matrices)
        self.optimizers[name] = torch.optim.AdamW(groups, betas=betas, fused=True)
        self.networks[name] = parallel(module)

    @property
    def done(self) -> float:
        """The share of the schedule that lies behind: of --budget-minutes, or of the steps, 1 in the last."""
        return min(1.0, self.seconds / self.budget) if self.budget else self.step / max(1, self.total - 1)

    @property
    def is_over(self) -> bool:
        return self.seconds >= self.budget if self.budget else self.step >= self.total

    def enter(self):
        """Goes on where a save left off, or makes the first save: from here on, the run can be killed."""
        self.restore()
        if self.step == 0:
            self.save()
        count = sum(parameter.numel() for parameter in self.networks['model'].parameters())
        aim = f'{self.budget / 60:.3g} minutes of training' if self.budget else self.total
        say(f'{self.name}: {count / 1e6:.2f}M parameters, steps {self.step} to {aim}')

    def steps(self):
        """The loop around a step: before it the learning rate, after it saves and stops."""
        self.started, self.images, self.busy, self.is_stop = None, 0, 0.0, False    # of this session
        with tqdm(desc=self.name, initial=self.step, total=self.total, disable=rank() > 0) as self.bar:
            while not (self.is_over or self.is_stop):
                self.set_schedule()
                self.began = time.monotonic()
                yield self.step
                if self.is_time_to_validate or self.is_stop:
                    self.save()
        if self.is_stop:
            self.stop()

    def stop(self):
        processes = os.environ.get('LOCAL_WORLD_SIZE')
        machines = os.environ.get('GROUP_WORLD_SIZE', '1')
        many = f'--nnodes {machines} --node-rank ... ' if machines != '1' else ''
        launcher = f'torchrun {many}--nproc-per-node {processes}' if processes else 'python'
        say(f'stopped at step {self.step} of {self.total} of {self.name}, all saved; to go on: '
            f'{launcher} train.py --resume --out {shlex.quote(str(self.run.out))}')
        wait_for_all()                      # else torchrun could end rank 0 before it has saved
        raise SystemExit(128 + self.signal if self.signal else 0)

    def set_schedule(self):
        self.lr_now = self.lr * learning_rate(self.done, self.last_lr)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group['lr'] = self.lr_now
        if self.name == 'var' and self.args.last_weight_decay is not None:      # as released: half a cosine
            first, last = self.args.weight_decay, self.args.last_weight_decay
            decay = last + (first - last) * (0.5 + 0.5 * math.cos(math.pi * self.done))
            for name in self.optimizers.keys() & {'model', 'muon'}:
                self.optimizers[name].param_groups[0]['weight_decay'] = decay

    def parts(self, *batch: Tensor):
        """Cuts this process's share of a batch; after the last part, processes exchange their gradients."""
        parts, self.row = list(zip(*(tensor.split(self.micro_batch_size) for tensor in batch))), {}
        for i, part in enumerate(parts):
            for network in self.networks.values():
                network.require_backward_grad_sync = i + 1 == len(parts)
            self.weight = len(part[0]) / len(batch[0])
            yield part

    def backward(self, loss: Tensor, metrics: dict[str, Tensor]):
        """Adds a part's gradients and metrics to those of its batch."""
        (self.weight * loss).backward()
        for name, value in metrics.items():
            self.row[name] = self.row.get(name, 0.0) + self.weight * value.detach()

    def move_weights(self):
        for name, optimizer in self.optimizers.items():
            learning = [w for group in optimizer.param_groups for w in group['params'] if w.grad is not None]
            if learning:                            # a discriminator doesn't before its start
                self.row[f'{name}_gradient'] = torch.nn.utils.clip_grad_norm_(learning, 2.0)
                optimizer.step()
                optimizer.zero_grad()

    def update(self):
        """Ends a step: moves the weights, looks what is due, and logs a line if that is."""
        self.move_weights()
        self.unread.append(self.row)
        self.step, self.images = self.step + 1, self.images + self.batch_size
        self.agree()
        self.is_time_to_validate = self.is_over or self.step % self.args.save_every_steps == 0
        is_time_to_log = self.is_over or self.step % self.args.log_every_steps == 0
        if is_time_to_log or self.is_time_to_validate or self.is_stop:
            self.read_metrics()
        self.busy += time.monotonic() - self.began
        if is_time_to_log:
            speed = self.images / self.busy
            rates = dict(lr=self.lr_now, images_per_s=speed, tokens_per_s=speed * sum(self.lengths))
            row = {name: np.mean([row[name] for row in self.metrics if name in row])
                   for name in self.metrics[-1]}
            self.metrics, self.images, self.busy = [], 0, 0.0
            self.write_log('train', rates | row)
            self.bar.set_postfix_str(f'{list(row)[0]} {list(row.values())[0]:.3f}, {speed:.0f} images/s')
        if self.budget and self.seconds:
            self.bar.total = self.total = round(self.step / self.done)
        self.bar.update()

    def is_asked_to_stop(self) -> bool:
        minutes = (time.monotonic() - self.run.began) / 60
        return bool(self.run.signals) or minutes >= (self.args.stop_after_minutes or math.inf)

    def agree(self):
        """Of all processes: the latest clock, without the first step of a session, which waits for workers
        and kernels; a signal that any was sent; whether to stop, for that or by --stop-after-minutes."""
        now = time.monotonic()
        self.started = now - self.seconds if self.started is None else self.started
        found = [now - self.started, max(self.run.signals, default=0), self.is_asked_to_stop()]
        found = torch.tensor(found, dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        self.seconds, self.signal, self.is_stop = found[0].item(), int(found[1]), bool(found[2])

    def read_metrics(self):
        """Makes numbers of what the last steps left on the device, averaged over all processes."""
        tensors = [value.float().flatten() for row in self.unread for value in row.values()]
        means = all_sum(torch.cat(tensors).cpu().double()) / world_size()
        parts = iter(means.split([len(tensor) for tensor in tensors]))
        self.metrics += [self.by_scale({name: next(parts) for name in row}) for row in self.unread]
        self.unread = []
        self.check_finite(self.metrics)

    def by_scale(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """The mean of each metric; of those that have a value for each token, also scale by scale."""
        row = {name: values.mean().item() for name, values in metrics.items()}
        for name, values_L in metrics.items():
            if len(values_L) > 1:
                row |= {name + scale: values_l.mean().item()
                        for scale, values_l in zip(self.scales, values_L.split(self.lengths))}
        return row

    @rank_0_first()
    def check_finite(self, rows: list[dict]):
        """Stops the run where a metric is not a number any more: nothing is saved after that."""
        for step, row in enumerate(rows, start=self.step - len(rows) + 1):
            for name in sorted(row, key=lambda name: not name[-1].isdigit()):       # a scale, if any
                if not math.isfinite(row[name]):
                    what, lr = re.sub(r'_(?=\d)', ' of scale ', name), getattr(self.args, f'{self.name}_lr')
                    raise UserError(f'{self.name}: {what} is {row[name]} at step {step}; the last save '
                                    f'stands; go on from it by --resume with --{self.name}-lr below {lr}, or '
                                    '--dtype float32')

    def report(self, row: dict[str, float]):
        """What a validation found, for the log and the screen."""
        self.check_finite([row])
        self.write_log('val', row)
        found = ', '.join(f'{name} {value:.3g}' for name, value in row.items())
        say(f'{self.name} step {self.step}, held-out: {found}')

    def write_log(self, split: str, row: dict[str, float]):
        """One more line; and the CSV, which is written from all lines, whole or not at all."""
        self.log.append(dict(step=self.step, split=split) | {name: f'{row[name]:.7g}' for name in row})
        if rank() == 0:
            save_csv(self.run.out / f'{self.name}.csv', self.log)

    def save(self):
        """last.pt: all that it takes to go on. The first one lets go of the run that it replaces."""
        if rank() == 0:
            settings = {name: value for name, value in vars(self.args).items() if name not in NOT_SAVED}
            weights = {name: unwrapped(network).state_dict() for name, network in self.networks.items()}
            optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
            save_checkpoint(
                self.run.out / 'last.pt', 'resume', self.run.out / 'previous.pt', settings=settings,
                data=self.run.data.fingerprint, stage=self.name,
                unfinished=not self.is_over, weights=weights, optimizers=optimizers, state=self.state,
                **{name: getattr(self, name) for name in COUNTERS})
            while self.run.replaced:
                self.run.replaced.pop().unlink(missing_ok=True)

    @rank_0_first()
    def restore(self):
        """Puts back what was saved, if it was in this stage."""
        saved, self.run.saved = self.run.saved, None        # as large as model and optimizer together
        if saved and saved['stage'] == self.name:
            said = f'{self.run.out}/last.pt: not what this train.py saves; start anew in another --out'
            with what_a_file_holds(said):
                for name, network in self.networks.items():
                    unwrapped(network).load_state_dict(saved['weights'][name])
                for name, optimizer in self.optimizers.items():
                    load_optimizer(optimizer, saved['optimizers'][name])
                for name, tensor in self.state.items():
                    tensor.copy_(saved['state'][name])
                for name in COUNTERS:
                    setattr(self, name, type(getattr(self, name))(saved[name]))
                self.log = [dict(row) for row in self.log]
                self.metrics = [{name: float(row[name]) for name in row} for row in self.metrics]
                check(0 <= self.step < 2 ** 31 and 0 <= self.seconds < 1e9 and 0 <= self.budget < 1e11 and
                      all(isinstance(name, str) and name for row in self.metrics for name in row), said)


# -------------------------------------------------------------------------------------- the folder of a run
COUNTERS = 'step seconds budget log metrics'.split()            # of a stage, saved as they are
SAVED = {*COUNTERS, 'settings', 'data', 'stage', 'unfinished', 'weights', 'optimizers', 'state'}
NOT_SAVED = 'out resume overwrite stop_after_minutes given'.split()
MAY_CHANGE = ('device dtype workers compile cache_tokens cache_passes data_dir '
              'micro_batch_size vqvae_micro_batch_size log_every_steps save_every_steps '
              'vqvae_lr var_lr').split()                        # by flags beside --resume


def read_resume(out: Path, mmap: bool = False) -> dict | None:
    """last.pt, or previous.pt where that is torn (and then out of the way of the next save)."""
    for path in (out / 'last.pt', out / 'previous.pt'):
        if path.exists():
            try:
                with open_checkpoint(path, 'resume', mmap=mmap) as saved:
                    return saved
            except UserError as error:              # rank 0 comes first, and leaves none to the others
                if 'torn, or not' not in str(error):
                    raise
                say(f'passed over: {error}')
                path.replace(path.with_suffix('.torn'))
    return None


@contextmanager
def alone_in(out: Path):
    """Keeps other runs out of a folder, by a lock that ends with the process. (Windows and some file systems
    have none.)"""
    try:
        import fcntl
    except ImportError:
        fcntl = None
    if rank() > 0:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    if not fcntl:
        yield
        return
    path = out / 'lock'
    for _ in range(50):                                     # a process that was killed takes a while to end
        with open(path, 'a+') as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
                continue
            except OSError as error:
                say(f'note: {out} has no locks ({error.strerror}), so nothing keeps a second run out')
            if os.fstat(file.fileno()).st_nlink:                # or the run that ends takes it away
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
    raise UserError(f'--out {out}: another run is at work there; stop that one, or choose another --out')


def claim_folder(out: Path, args: argparse.Namespace, stages: list[str]) -> list[Path]:
    """Refuses a folder that holds a run, or returns which files are to be removed. A run before its first
    step is none: it may have found too little memory."""
    held = [out / f'{stage}.pt' for stage in stages if (out / f'{stage}.pt').exists()]
    if not (args.resume or args.overwrite):
        last = read_resume(out, mmap=True)
        is_new = bool(last) and repr(last.get('step')) == '0'
        check(not held and (is_new or not last or last.get('unfinished') is False), f'--out {out}: already '
              'holds a run; --resume goes on with it, --overwrite replaces it, or choose another --out')
        return [out / 'previous.pt'] if is_new else []
    others = [out / name for name in ('previous.pt', 'tokens.bin', 'tokens.txt')]
    kept = [path for path in out.glob('var-*.pt') if path.stem[4:].isdecimal() and 'var' in stages]
    return [*held, *others, *kept] if args.overwrite else []


def load_tokenizer(path: str | Path, scales: tuple[int, ...] | None = None) -> VQVAE:
    """The tokenizer in a vqvae.pt, a var.pt or the authors' file (which doesn't say its scales), frozen."""
    with open_checkpoint(path, 'vqvae', 'var', 'other') as checkpoint:
        if 'kind' in checkpoint:
            return sample.build(VQVAE, VQVAEConfig(**checkpoint['vqvae_config']), checkpoint['vqvae'])
        check(scales, f"{path}: not made by train.py; if it is the authors', say its --scales")
        return VQVAE.from_official(checkpoint, scales).requires_grad_(False).eval()


def tokenizer_for_stage_2(args: argparse.Namespace, out: Path, saved: dict | None) -> VQVAE:
    """The tokenizer for a stage 2 without a stage 1. (The authors' file doesn't say its scales.)"""
    path = Path(args.tokenizer or out / 'vqvae.pt')
    if saved and (out / 'var.pt').exists():
        path = out / 'var.pt'                                   # holds the one that was trained on
    check(path.is_file(), f'--stage var: there is no tokenizer {path}; train one with --stage vqvae, or name '
          'one with --tokenizer')
    says_scales = saved or 'scales' in args.given or 'scales' in PRESETS[args.preset]
    tokenizer = load_tokenizer(path, args.scales if says_scales else None)
    is_single = len(tokenizer.config.scales) == 1
    advice = ('one map goes with --order raster' if is_single else 'train one of a single map by --stage '
              'vqvae --order raster --scales 8')
    check(is_single == (args.order == 'raster'), f'--order {args.order}: the tokenizer in {path} has the '
          f'scales {tokenizer.config.scales}; {advice}')
    for name, value in asdict(tokenizer.config).items():
        check(name not in args.given or getattr(args, name) == value, f'{flag(name)} '
              f'{getattr(args, name)}: the tokenizer in {path} has {value}; omit the flag')
    return tokenizer


STOPS = 'SIGINT SIGTERM SIGHUP SIGUSR1 SIGUSR2 SIGXCPU'.split()


@contextmanager
def signals_noted():
    """Ctrl-C, SIGTERM, SIGHUP (of a terminal that closes) and what schedulers warn with are put on a list,
    for the loop to finish its step and save. A second Ctrl-C acts; what nohup ignores stays ignored. Nothing
    is printed to a terminal that has closed, since that would fail before the save."""
    def note(which, frame):
        noted.append(which)
        if which == signal.SIGINT:
            signal.signal(which, before[which])
        for stream in terminals if which == getattr(signal, 'SIGHUP', None) else ():
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    noted, before, terminals = [], {}, [stream for stream in (1, 2) if os.isatty(stream)]
    for which in [getattr(signal, name) for name in STOPS if hasattr(signal, name)]:        # Windows has two
        if which == signal.SIGINT or signal.getsignal(which) != signal.SIG_IGN:
            before[which] = signal.signal(which, note)
    try:
        yield noted
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


# ---------------------------------------------------------------------------------------------- command line
def flag(name: str) -> str:
    return '--' + name.replace('_', '-')


def path(text: str) -> str:
    """An argparse type; a shell leaves --out=~/x as it is."""
    return expanduser(text)


INTEGER = number(int, 'below 2^31', lambda n: abs(n) < 2 ** 31)
POSITIVE = number(float, 'above 0', lambda x: 0 < x < math.inf)
PART = number(float, 'in (0, 1)', lambda x: 0 < x < 1)
DURATION = number(float, 'above 0 and below 1e9', lambda x: 0 < x < 1e9)
SIXTEENS = number(int, 'a multiple of 16', lambda n: 16 <= n < 2 ** 31 and n % 16 == 0)     # groups of norms
FLAGS = {                               # name, type, default, help; or a field of VQVAEConfig or VARConfig
    'what most people need first': [
        ('preset', list(PRESETS), 'shapes', 'the data, and a value for every flag below'),
        ('data_dir', path, None, 'CIFAR-10, or images in train/<class>/ and perhaps val/<class>/'),
        ('out', path, None, 'folder of the run; absent: out/<preset>'),
        ('resume', bool, False, 'go on from the last save in --out'),
        'depth',
        ('budget_minutes', DURATION, None, 'fit the whole schedule into so much training, over all resumes'),
        ('device', str, 'auto', 'auto (a GPU where there is one), cpu, cuda, ...'),
        ('dtype', DTYPES, 'auto', 'of autocast; auto: bfloat16 on a GPU that has it')],
    'data': [
        ('train_count', COUNT, None, 'images to train on; absent: all (of drawn shapes 12,000)'),
        ('val_count', COUNT, 1000, 'held-out images that are looked at in a validation, at most'),
        ('flip', bool, False, 'mirror half of the training images'),
        ('crop', ANY_COUNT, 0, 'shift drawn shapes and CIFAR-10 by up to so many pixels'),
        ('cache_tokens', bool, None, 'stage 2 reads tokens, written once; absent: for drawn shapes and '
         'CIFAR-10 without --crop, if it meets each image at least once'),
        ('cache_passes', COUNT, 8, 'how many random crops of an image are cached'),
        ('seed', ANY_COUNT, 0, 'all that is random follows from it')],
    'schedule': [
        ('stage', ['vqvae', 'var', 'both'], 'both', 'what to train'),
        ('tokenizer', path, None, 'vqvae.pt or var.pt for --stage var; absent: vqvae.pt in --out'),
        ('vqvae_steps', COUNT, None, 'of stage 1; absent: --vqvae-epochs'),
        ('var_steps', COUNT, None, 'of stage 2; absent: --var-epochs'),
        ('vqvae_epochs', DURATION, 1.0, 'stage 1 in rounds through the training images'),
        ('var_epochs', DURATION, 1.0, 'stage 2 likewise'),
        ('budget_vqvae', PART, 0.3, 'share of --budget-minutes for stage 1, where both are trained'),
        ('stop_after_minutes', DURATION, None, 'save and exit then, to go on by --resume'),
        ('batch_size', COUNT, 64, 'images a step over all GPUs'),
        ('vqvae_batch_size', COUNT, None, 'the same of stage 1; absent: --batch-size'),
        ('vqvae_lr', POSITIVE, 4e-3, 'peak learning rate of stage 1 per 256 images of batch'),
        ('var_lr', POSITIVE, 4e-3, 'peak learning rate of stage 2 per 256 images of batch'),
        ('var_optimizer', ['adamw', 'muon'], 'adamw', "of stage 2; muon: of its blocks' matrices, AdamW of "
         'the rest'),
        ('last_lr', SHARE, 0.01, 'learning rate of the last step as a share of the peak'),
        ('vqvae_last_lr', SHARE, None, 'the same of stage 1; absent: --last-lr'),
        ('weight_decay', STRENGTH, 0.05, 'of both stages'),
        ('last_weight_decay', STRENGTH, None, 'of stage 2, reached by a cosine; absent: it stays')],
    'the tokenizer': [
        *VQVAEConfig.__dataclass_fields__,
        ('revive_every_steps', COUNT, 20, 'how often dead codes are looked for, in the first three quarters'),
        ('perceptual_weight', STRENGTH, 0.0, 'of the perceptual term'),
        ('perceptual', ['classifier', 'lpips'], 'classifier', 'what sees: a small classifier, trained at '
         'first on the images and labels; or LPIPS, which needs the package lpips'),
        ('classifier_epochs', COUNT, 4, 'how long that classifier is trained'),
        ('classifier_channels', COUNT, 32, 'of its first layer'),
        ('adversarial_weight', STRENGTH, 0.0, "of the discriminator's verdict; 0: no discriminator"),
        ('discriminator_start', ANY_COUNT, 0, 'the step at which the discriminator joins'),
        ('discriminator_channels', SIXTEENS, 64, 'of its first layer')],
    'the transformer': [
        'order', 'adaln', 'unit_norm', 'shared_adaln', 'label_dropout', 'stochastic_depth',
        'adaln_gamma_init'],
    'what is saved': [
        ('overwrite', bool, False, 'replace the run in --out'),
        ('log_every_steps', COUNT, 50, 'a line of the log'),
        ('save_every_steps', COUNT, 500, 'validate, draw images and save; also done at the end'),
        ('keep_models', bool, False, 'keep what stage 2 saves, each as var-STEP.pt beside var.pt'),
        ('cfg', STRENGTH, 1.5, 'sampling default that var.pt carries: guidance; see sample.py'),
        ('top_k', ANY_COUNT, 900, 'likewise'),
        ('top_p', SHARE, 0.96, 'likewise')],
    'the machine': [
        ('compile', bool, False, 'compile the blocks of the transformer, by torch.compile'),
        ('micro_batch_size', COUNT, None, 'images a GPU takes at once, at most; absent: all its share'),
        ('vqvae_micro_batch_size', COUNT, None, 'the same of stage 1; absent: --micro-batch-size'),
        ('workers', ANY_COUNT, None, 'threads that read images, for each GPU; absent: by its cores')]}


def add_flag(group, name: str, kind, default, help: str):
    """kind: bool, choices (a list or a Literal), or the type of an argument, of which tuple[int, ...] takes
    several, and int | None one."""
    options = dict(default=default, help=help.replace('%', '%%'))
    if kind is bool:
        options |= dict(action=argparse.BooleanOptionalAction)
    elif isinstance(kind, list) or typing.get_origin(kind) is typing.Literal:
        options |= dict(choices=list(typing.get_args(kind) or kind))
    else:
        kinds = typing.get_args(kind) or [kind]
        if typing.get_origin(kind) is tuple:
            options |= dict(nargs='+')
        options |= dict(type={int: INTEGER}.get(kinds[0], kinds[0]), metavar=kinds[0].__name__.upper())
    group.add_argument(flag(name), **options)


def build_parser() -> sample.Parser:
    parser = sample.Parser(prog='train.py', description=__doc__)
    defaults = asdict(VARConfig()) | asdict(VQVAEConfig())
    hints = {name: hint for config in (VARConfig, VQVAEConfig)
             for name, hint in typing.get_type_hints(config, include_extras=True).items()}
    for title, rows in FLAGS.items():
        group = parser.add_argument_group(title)
        for row in rows:
            if isinstance(row, str):                    # Annotated[its type, its help]
                row = row, hints[row].__origin__, defaults[row], hints[row].__metadata__[0]
            name, kind, default, help = row
            presets = [f'; {preset}: {values[name]}' for preset, values in PRESETS.items() if name in values]
            add_flag(group, name, kind, default, f'{help} [{default}{"".join(presets)}]')
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict | None]:
    """The settings: flags, over those of the preset or of the run that goes on; and what that one saved."""
    parser, saved = build_parser(), None
    args = parser.parse_args(argv)
    given = {re.sub('^--(no-)?|=.*', '', word).replace('-', '_') for word in argv if word.startswith('--')}
    check(not (args.resume and args.overwrite), '--resume, --overwrite: say one or the other')
    out = args.out or f'out/{args.preset}'
    if args.resume:
        saved = read_resume(Path(out))
    check(saved is not None or not args.resume, f'--resume: {out} holds no run that can be resumed; start '
          'one without it')
    if saved:
        had = settings_of(saved, parser, out)
        parser.set_defaults(**had)
    else:
        parser.set_defaults(**PRESETS[args.preset])
        if args.preset.startswith('imagenet'):
            depth = parser.parse_args(argv).depth
            parser.set_defaults(**RECIPES[max(least for least in RECIPES if least <= max(0, depth))])
    args = {name: tuple(value) if isinstance(value, list) else value
            for name, value in vars(parser.parse_args(argv)).items()}
    args |= dict(resume=bool(saved), overwrite=args['overwrite'] and not saved)
    for name in had if saved else ():
        check(name in MAY_CHANGE or args[name] == had[name], f'{flag(name)} {args[name]}: the run to '
              f'resume has {had[name]}; omit the flag, or start anew in another --out')
    for stage in () if saved else ('vqvae', 'var'):         # three ways to say how long: what was given holds
        ways = [name for name in ('budget_minutes', f'{stage}_epochs', f'{stage}_steps') if name in given]
        check(len(ways) < 2, f"{', '.join(map(flag, ways))}: say one or the other")
        if f'{stage}_epochs' in given:
            args[f'{stage}_steps'] = None
    return argparse.Namespace(**args, given=given), saved


def settings_of(saved: dict, parser: sample.Parser, out: str) -> dict:
    """The settings of a run that goes on, if they are such as its flags could have been."""
    unlike, words = f'{out}/last.pt: not what this train.py saves; start anew in another --out', []
    names = vars(parser.parse_args([])).keys() - {*NOT_SAVED}
    with what_a_file_holds(unlike):
        settings = dict(saved['settings'])
        parts = [saved[name] for name in ('weights', 'optimizers', 'state')]
        is_like = SAVED <= saved.keys() and saved['stage'] in ('vqvae', 'var') and settings.keys() == names
        check(is_like and all(isinstance(part, dict) for part in parts), unlike)
        for name, value in settings.items():
            if isinstance(value, bool):
                words.append(flag(name) if value else f'--no-{flag(name)[2:]}')
            elif isinstance(value, (tuple, list)):
                words += [flag(name), *map(str, value)]
            elif value is not None:
                words.append(f'{flag(name)}={value}')
        try:
            args = vars(parser.parse_args(words))
        except UserError:
            raise UserError(unlike) from None
        return {name: tuple(args[name]) if isinstance(args[name], list) else args[name] for name in names}


@contextmanager
def config_errors_as_flags():
    """A config's ValueError, 'field_name=value: why', as a UserError about the flag --field-name."""
    try:
        yield
    except ValueError as error:
        name, _, rest = str(error).partition('=')
        raise UserError(f'{flag(name)} {rest}') from None


def make(config_class, args: argparse.Namespace, **more):
    """A config from the settings that are fields of it."""
    names = config_class.__dataclass_fields__.keys() & vars(args).keys()
    with config_errors_as_flags():
        return config_class(**{name: getattr(args, name) for name in names} | more)


def make_transformer(args: argparse.Namespace, device: torch.device, **more) -> VAR:
    """A new one, as the settings say, ready to be trained."""
    var = VAR(make(VARConfig, args, **more)).to(device)
    if args.compile:
        for block in var.blocks:
            block.compile()
    return var


def check_loss_terms(args: argparse.Namespace, image_size: int, classes: int):
    said = f'--perceptual-weight {args.perceptual_weight}: a classifier needs'
    check(image_size >= 24 or not args.adversarial_weight, 'with --adversarial-weight '
          f'{args.adversarial_weight} images need 24 pixels or more')
    check(args.perceptual_weight or 'perceptual' not in args.given, f'--perceptual {args.perceptual}: goes '
          'with a --perceptual-weight above 0')
    if args.perceptual_weight and args.perceptual == 'classifier':
        check(image_size >= 8, f'{said} images of 8 pixels or more; say --perceptual-weight 0')
        check(classes > 1, f'{said} two classes or more; say --perceptual-weight 0')


def check_compiler(device: torch.device):
    """Complains early where --compile would fail late."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2, device=device))
    except Exception as error:                              # in many ways
        raise UserError('--compile: torch.compile finds no working compiler (g++, or Triton on a GPU); '
                        f'install one, or omit the flag ({one_line(error)})') from None


def open_run(args: argparse.Namespace, saved: dict | None, device: torch.device, at_the_end: ExitStack,
             is_locked: bool) -> tuple[SimpleNamespace, VQVAE, list[str]]:
    """What both stages share, the tokenizer, and the stages to train. Complains of all that can be seen
    before the first step."""
    stages = ['vqvae', 'var'] if args.stage == 'both' else [args.stage]
    if saved and saved['stage'] == 'var':                       # stage 1 is done
        stages = ['var']
    out = Path(args.out or f'out/{args.preset}')
    check(args.tokenizer is None or args.stage == 'var', '--tokenizer: goes with --stage var')
    tokenizer = (VQVAE(make(VQVAEConfig, args)) if 'vqvae' in stages else
                 tokenizer_for_stage_2(args, out, saved))
    config = tokenizer.config
    if 'var' in stages or 'order' in args.given:
        make(VARConfig, args, num_classes=1, scales=config.scales)              # complains early
    if not is_locked:
        at_the_end.enter_context(alone_in(out))
    replaced = claim_folder(out, args, stages)
    data = load_data(args, config.image_size, device)
    if isinstance(data, FolderData):
        at_the_end.callback(data.workers.shutdown, wait=False, cancel_futures=True)
    check(saved is None or saved['data'] == data.fingerprint, f'--data-dir {args.data_dir}: holds other '
          'images than the run to resume was trained on; name those, or start anew in another --out')
    if 'vqvae' in stages:
        check_loss_terms(args, config.image_size, len(data.class_names))
    return SimpleNamespace(args=args, out=out, data=data, device=device, saved=saved, replaced=replaced,
                           signals=[]), tokenizer, stages


def main(argv: list[str]):
    began = time.monotonic()
    start_processes()
    with ExitStack() as at_the_end:
        with rank_0_first():                                    # who also downloads for all
            first = build_parser().parse_args(argv)
            out = Path(first.out or f'out/{first.preset}')
            is_locked = out.is_dir()                            # before its save is read
            if is_locked:
                at_the_end.enter_context(alone_in(out))
            args, saved = parse(argv)
            device = sample.choose_device(args.device)
            torch.manual_seed(args.seed)
            if args.compile:
                check_compiler(device)
            run, tokenizer, stages = open_run(args, saved, device, at_the_end, is_locked)
        run.began, data, config = began, run.data, tokenizer.config
        seen = [data.fingerprint, saved and f"{saved['stage']} {saved['step']}"]
        of_rank_0 = from_rank_0(seen)
        check(seen == of_rank_0, f'--data-dir {args.data_dir}, --out {out}: other images or another save '
              f'than rank 0 sees ({seen}, not {of_rank_0}); make the folders equal')
        if device.index is not None:
            torch.cuda.set_device(device)
        tokenizer.to(device)
        say(f'{args.preset}: {data.count:,} images of {config.image_size}x{config.image_size} in '
            f'{len(data.class_names)} classes, {sum(tokenizer.scale_lengths)} tokens each, scales '
            f'{config.scales}, on {world_size()} x {device.type}')
        del saved                                               # as large as model and optimizer together
        run.signals = at_the_end.enter_context(signals_noted())
        if 'vqvae' in stages:
            train_tokenizer(run, tokenizer)
            tokenizer.requires_grad_(False)
        if 'var' in stages:
            torch.manual_seed(args.seed)                        # as if stage 2 were trained alone
            var = make_transformer(args, device, num_classes=len(data.class_names), scales=config.scales,
                                   vocab_size=config.vocab_size, z_channels=config.z_channels)
            train_transformer(run, var, tokenizer)
    images = [str(out / dict(vqvae='reconstructions.png', var='samples.png')[stage]) for stage in stages]
    say(f"done in {time.monotonic() - began:.0f} s; look at {' and then at '.join(images)}")


if __name__ == '__main__':
    sample.run_command(main)
