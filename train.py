"""Trains VAR: stage 1 the tokenizer (vqvae.py), stage 2 the next-scale transformer (var.py).

    python train.py                                             # both stages on drawn shapes, on any CPU
    python train.py --preset cifar10-cpu                        # CIFAR-10, downloaded to data/, on any CPU
    python train.py --data-dir photos                           # your own: photos/train/<class>/*.jpg
    torchrun --nproc-per-node 8 train.py --preset imagenet256 --depth 16 --data-dir imagenet
    python train.py --resume                                    # go on from the last save in out/shapes
    python train.py --preset imagenet256 --depth 30 --dry-run   # what that run would cost

Every field of TrainConfig, VQVAEConfig and VARConfig is a flag; a preset is a set of values for them. A run
leaves in --out (out/<preset>): vqvae.pt and var.pt, to use and to share; last.pt and previous.pt, to resume;
vqvae.csv and var.csv, the logs; reconstructions.png and samples.png. (var.pt holds, and samples.png shows,
the weights with the lowest held-out loss of all validations.)

All that is random in step s follows from (seed, s, place in the batch): the pictures, their augmentation,
dropout. So there are no random states to save: a run that is resumed goes on as if it had never stopped (to
the bit on CPUs; GPUs may add up in varying order, and --budget-minutes goes by the clock), and one that is
spread over more processes does the same up to rounding. Shapes stand in the names of tensors as in var.py.
"""
import argparse
import csv
import dataclasses
import hashlib
import http.client
import inspect
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import typing
import urllib.request
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import sample
from sample import (Parser, UserError, autocast, check, choose_device, config_errors_as_flags, flag, one_line,
                    save_picture)
from var import VAR, VARConfig
from vqvae import VQVAE, Discriminator, VQVAEConfig


@dataclass(frozen=True)
class TrainConfig:
    """What a run does, beside the shapes of its two models. An impossible value raises ValueError."""
    preset: str = 'shapes'              # the data, and a value for every flag below
    stage: str = 'both'                 # vqvae, var or both
    data_dir: str | None = None         # CIFAR-10, or pictures in train/<class>/ and perhaps val/<class>/
    tokenizer: str | None = None        # vqvae.pt or var.pt for --stage var; absent: vqvae.pt in --out
    out: str | None = None              # folder of the run; absent: out/<preset>
    resume: bool = False                # go on from the last save in --out
    overwrite: bool = False             # replace the run in --out
    seed: int = 0
    device: str = 'auto'                # auto (a GPU where there is one), cpu, cuda, ...
    dtype: str = 'auto'                 # float32 or bfloat16 (autocast); auto: bfloat16 on a GPU
    workers: int | None = None          # processes that decode pictures, for each GPU; absent: by its cores
    vqvae_steps: int | None = None      # absent: vqvae_epochs
    var_steps: int | None = None        # absent: var_epochs
    vqvae_epochs: float = 1.0           # stage 1 in rounds through the training pictures
    var_epochs: float = 1.0             # stage 2 likewise
    budget_minutes: float | None = None     # fit the whole schedule into so much training, over all resumes
    budget_vqvae: float = 0.3           # share of --budget-minutes for stage 1, where both are trained
    stop_after_minutes: float | None = None     # save and exit then, to go on by --resume
    batch_size: int = 64                # pictures a step over all GPUs, in both stages
    micro_batch_size: int | None = None     # pictures a GPU takes at once, at most; absent: all its share
    vqvae_lr: float = 4e-3              # peak learning rate of stage 1 per 256 pictures of batch
    var_lr: float = 4e-3                # peak learning rate of stage 2 per 256 pictures of batch
    last_lr: float = 0.01               # learning rate of the last step as a share of the peak
    weight_decay: float = 0.05
    last_weight_decay: float | None = None  # of stage 2, reached by a cosine; absent: weight_decay throughout
    revive_every_steps: int = 20        # how often stage 1 looks for dead codes, in its first three quarters
    perceptual_weight: float = 0.0      # of LPIPS in stage 1; above 0 needs the package lpips
    adversarial_weight: float = 0.0     # of the discriminator's verdict in stage 1; 0: no discriminator
    discriminator_start: int = 0        # the step of stage 1 at which the discriminator joins
    discriminator_channels: int = 64    # of its first layer
    flip: bool = False                  # mirror half of the training pictures
    crop: int = 0                       # shift drawn shapes and CIFAR-10 by up to so many pixels
    train_count: int | None = None      # pictures to train on; absent: all (of drawn shapes 12,000)
    val_count: int = 1000               # held-out pictures that are looked at in a validation, at most
    log_every_steps: int = 50
    save_every_steps: int = 500         # validate, draw pictures and save; also done at the end
    cfg: float = 1.5                    # sampling defaults that var.pt carries: see sample.py
    top_k: int = 900
    top_p: float = 0.96
    dry_run: bool = False               # print what the run would cost, and do nothing
    gpus: int = 8                       # assumed by --dry-run: so many GPUs
    tflops: float = 989.0               # assumed by --dry-run: peak TFLOP/s of one (H100, bfloat16, dense)
    mfu: float = 0.4                    # assumed by --dry-run: share of the peak that training reaches

    def __post_init__(self):
        rules = [
            ('crop top_k cfg weight_decay last_weight_decay perceptual_weight adversarial_weight workers '
             'discriminator_start', lambda v: 0 <= v < math.inf, '0 or more'),
            ('seed', lambda v: 0 <= v < 2 ** 31, 'in [0, 2^31)'),
            ('vqvae_steps var_steps batch_size micro_batch_size train_count val_count revive_every_steps '
             'log_every_steps save_every_steps gpus', lambda v: v >= 1, '1 or more'),
            ('vqvae_lr var_lr vqvae_epochs var_epochs budget_minutes stop_after_minutes tflops',
             lambda v: 0 < v < math.inf, 'above 0'),
            ('last_lr top_p', lambda v: 0 <= v <= 1, 'in [0, 1]'),
            ('mfu', lambda v: 0 < v <= 1, 'in (0, 1]'),
            ('budget_vqvae', lambda v: 0 < v < 1, 'in (0, 1)'),
            ('discriminator_channels', lambda v: v >= 16 and v % 16 == 0, 'a multiple of 16'),
            ('preset', lambda v: v in PRESETS, ', '.join(PRESETS)),
            ('stage', lambda v: v in ('vqvae', 'var', 'both'), 'vqvae, var or both'),
            ('dtype', lambda v: v in ('auto', 'float32', 'bfloat16'), 'auto, float32 or bfloat16')]
        for names, is_possible, wanted in rules:
            for name in names.split():
                value = getattr(self, name)
                if not (value is None or is_possible(value)):
                    raise ValueError(f'{name}={value}: must be {wanted}')


PRESETS = {                             # learning rates are per 256 pictures: 0.032 is 0.004 at a batch of 32
    'shapes': dict(depth=2, adaln_gamma_init=0.1, batch_size=32, vqvae_steps=600, vqvae_lr=0.032,
                   var_steps=1000, var_lr=0.016, cfg=2.0, top_p=0.8),
    'cifar10': dict(patch_size=2, channel_mults=(1, 2), vocab_size=4096, scales=(1, 2, 3, 4, 5, 6, 8),
                    depth=5, shared_adaln=True, adaln_gamma_init=1e-2, stochastic_depth=0.1, batch_size=256,
                    vqvae_steps=8000, vqvae_lr=4e-3, var_steps=12000, var_lr=2e-3, flip=True, val_count=2000,
                    save_every_steps=2000, cfg=4.0, top_k=0, top_p=0.9),
    'cifar10-cpu': dict(channels=96, vocab_size=1024, depth=3, adaln_gamma_init=0.1, batch_size=32,
                        vqvae_steps=16_000, vqvae_lr=0.032, var_steps=20_000, var_lr=0.016,
                        budget_vqvae=0.22, flip=True, val_count=2000, log_every_steps=100,
                        save_every_steps=2000, cfg=7.0, top_k=0, top_p=0.8),
    'imagenet256': dict(image_size=256, patch_size=1, channels=160, channel_mults=(1, 1, 2, 2, 4),
                        res_blocks=2, attention=True, z_channels=32, vocab_size=4096,
                        scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), depth=16, vqvae_epochs=40, vqvae_lr=1e-4,
                        adversarial_weight=0.5, discriminator_start=20_000, val_count=5000,
                        save_every_steps=2000, micro_batch_size=8),
}
PRESETS['imagenet512'] = PRESETS['imagenet256'] | dict(image_size=512, depth=36, micro_batch_size=2,
                                                       scales=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32))
RECIPES = {                             # of the released transformers, from this depth on; for the two above
    0: dict(batch_size=768, var_epochs=200, var_lr=1e-4, adaln_gamma_init=1e-3, last_lr=0.1),
    20: dict(batch_size=768, var_epochs=250, var_lr=1e-4, adaln_gamma_init=1e-3, last_lr=0.1),
    24: dict(batch_size=768, var_epochs=350, var_lr=8e-5, adaln_gamma_init=1e-4, last_lr=0.01),
    30: dict(batch_size=1024, var_epochs=350, var_lr=8e-5, adaln_gamma_init=1e-5, last_lr=0.01,
             last_weight_decay=0.08),
    36: dict(batch_size=768, var_epochs=350, var_lr=8e-5, adaln_gamma_init=5e-6, last_lr=0.01,
             last_weight_decay=0.08, shared_adaln=True),
}


# ------------------------------------------------------------------------------------------- many processes
def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def start_processes():
    """Under torchrun, joins the other processes. Each has all weights, and its share of each batch."""
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        backend = 'cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo'
        dist.init_process_group(backend, timeout=timedelta(minutes=30))


def leave_processes(status: int = 0):
    """All leave together, when rank 0 has written everything: torchrun ends those that stay behind.

    And at once, since a thread of gloo that outlives the interpreter would now and then abort the process.
    """
    if dist.is_initialized():
        all_sum(torch.zeros(()))
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(status)


def all_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place, the same to the bit in each."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def everyones(value) -> list:
    """The value that each process has."""
    found = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(found, value)
    return found


@contextmanager
def rank_0_first():
    """For what would fail in all processes alike: rank 0 tries it first, and is the one that complains."""
    failed = torch.tensor(float(rank() == 0))
    if rank() == 0:
        try:
            yield
            failed.zero_()
        finally:
            all_sum(failed)
    else:
        if all_sum(failed):
            os._exit(2)
        yield


def parallel(module: torch.nn.Module) -> torch.nn.Module:
    """The module to train with, whose gradients are averages over all processes."""
    if not dist.is_initialized():
        return module
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


@contextmanager
def unsynchronised(modules, really: bool):
    """Leaves gradients as they are on each process, while a batch is still being accumulated."""
    with ExitStack() as stack:
        for module in modules:
            if really and isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield


def seed_of(*numbers: int) -> int:
    """One seed from several numbers: different for different ones, whatever their size."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0] >> 1)


# ------------------------------------------------------------------------------------------------------ data
FIGURES = ('disc', 'ring', 'square', 'triangle', 'star', 'heart', 'cross', 'moon', 'arrow', 'hourglass')


def outlines() -> dict[str, list]:
    """Each figure as polygons in [-1, 1], y down: the first is filled with ink, a second is a hole in it."""
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    disc = np.stack([np.cos(t), np.sin(t)], 1)
    heart_y = 5 * np.cos(2 * t) - 13 * np.cos(t) + 2 * np.cos(3 * t) + np.cos(4 * t)
    star = [(math.sin(i * math.pi / 5), -math.cos(i * math.pi / 5)) for i in range(10)]
    return {
        'disc': [disc], 'ring': [disc, .5 * disc], 'moon': [disc, .85 * disc + (.5, -.2)],
        'heart': [np.stack([np.sin(t) ** 3, heart_y / 16], 1)],
        'square': [[(-.8, -.8), (.8, -.8), (.8, .8), (-.8, .8)]],
        'triangle': [[(0, -.95), (.95, .75), (-.95, .75)]],
        'star': [np.array(star) * np.array([1.15, .48] * 5)[:, None]],
        'cross': [[(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
                   (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)]],
        'arrow': [[(0, -1), (.8, -.05), (.3, -.05), (.3, 1), (-.3, 1), (-.3, -.05), (-.8, -.05)]],
        'hourglass': [[(-.8, -.95), (.8, -.95), (.12, 0), (.8, .95), (-.8, .95), (-.12, 0)]]}


def draw_shapes(count: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Draws ten kinds of figures in turn: uint8 (count, 3, size, size) and int64 labels (count,).

    One bright figure on a dark ground, antialiased, of varied colours, sizes, places and turns (up to 15
    degrees). The same count, seed and size give the same pictures.
    """
    random = np.random.RandomState(seed)
    polygons = [[np.array(polygon) for polygon in outlines()[figure]] for figure in FIGURES]
    pictures = np.empty((count, size, size, 3), np.uint8)
    for i in range(count):
        radius, turn = random.uniform(.28, .37) * size, random.uniform(-15, 15) * math.pi / 180
        centre = size / 2 + random.uniform(-.08, .08, 2) * size
        turned = radius * np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        mask = Image.new('L', (4 * size, 4 * size))
        for ink, points in zip((255, 0), polygons[i % len(FIGURES)]):
            ImageDraw.Draw(mask).polygon([tuple(p) for p in 4 * (points @ turned + centre)], fill=ink)
        coverage = np.asarray(mask.reduce(4), np.float32)[..., None] / 255
        ink, ground = random_colour(random, (.7, 1), (.85, 1)), random_colour(random, (.3, .8), (.1, .3))
        pictures[i] = np.rint(ground + (ink - ground) * coverage)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), torch.arange(count) % len(FIGURES)


def random_colour(random: np.random.RandomState, saturation: tuple, value: tuple) -> np.ndarray:
    """Any hue, with saturation and value in these ranges: RGB in [0, 255]."""
    hue, s, v = random.uniform(0, 6), random.uniform(*saturation), random.uniform(*value)
    return 255 * v * (1 - s * np.clip(np.abs((hue - np.array([0, 2, 4]) + 3) % 6 - 3) - 1, 0, 1))


CIFAR10_URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
CIFAR10_MD5 = 'c32a1d4ab5d03f1284b67883e8d87530'
CIFAR10_FILES = [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin']
CIFAR10_CLASSES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
CIFAR10_COUNT, CIFAR10_BYTES = 10_000, 1 + 3 * 32 * 32      # pictures a file; label and planes of one


def download_cifar10(folder: Path, url: str = CIFAR10_URL, md5: str = CIFAR10_MD5):
    """Downloads and unpacks the binary files to folder/cifar-10-batches-bin, all of them or none."""
    sample.prepare_folder(folder, '--data-dir')
    advice = 'try again, or unpack CIFAR-10 (binary version) yourself and name its folder with --data-dir'
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        archive = Path(scratch, 'cifar-10-binary.tar.gz')
        try:
            with urllib.request.urlopen(url, timeout=60) as response, open(archive, 'wb') as file:
                total = int(response.headers.get('Content-Length') or 0)
                with tqdm.wrapattr(response, 'read', total=total, desc='CIFAR-10') as source:
                    shutil.copyfileobj(source, file)
            found = hashlib.md5(archive.read_bytes()).hexdigest()
            check(found == md5, f'{url}: broken off or changed, its md5 is {found}, not {md5}; {advice}')
            with tarfile.open(archive) as tar:
                tar.extractall(scratch, filter='data')
            Path(scratch, 'cifar-10-batches-bin').replace(folder / 'cifar-10-batches-bin')
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f'{url}: cannot be downloaded ({error}); {advice}') from None


def read_cifar10(data_dir: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training pictures (50000, 3, 32, 32) uint8 and labels, test pictures (10000, ...) and labels."""
    folder = Path(data_dir or 'data')
    if data_dir is None and not (folder / 'cifar-10-batches-bin').is_dir():
        download_cifar10(folder)
    check(folder.is_dir(), f'--data-dir {folder}: no such folder; without the flag, CIFAR-10 comes to data/')
    if (folder / 'cifar-10-batches-bin').is_dir():
        folder = folder / 'cifar-10-batches-bin'
    images, labels = [], []
    for path in [folder / name for name in CIFAR10_FILES]:
        check(path.is_file(), f'--data-dir {folder}: has no {path.name}; needs CIFAR-10, binary version')
        size, expected = path.stat().st_size, CIFAR10_COUNT * CIFAR10_BYTES
        check(size == expected, f'{path}: has {size} bytes instead of {expected}; broken, or not CIFAR-10')
        records = torch.from_numpy(np.fromfile(path, np.uint8)).view(CIFAR10_COUNT, CIFAR10_BYTES)
        top = int(records[:, 0].max())
        check(top <= 9, f'{path}: holds the label {top}, but CIFAR-10 has 0 to 9; broken, or not CIFAR-10')
        labels.append(records[:, 0].long())
        images.append(records[:, 1:].view(-1, 3, 32, 32))
    return torch.cat(images[:5]), torch.cat(labels[:5]), images[5], labels[5]


class Data:
    """Training and held-out pictures and labels. A step's batch follows from (seed, step) alone, and each
    process gets its share of it, so that runs on any number of processes see the same batches."""

    def __init__(self, config: TrainConfig, count: int, val_count: int, device: torch.device):
        self.config, self.count, self.val_count, self.device = config, count, val_count, device
        self.epoch, self.order = -1, torch.empty(0)
        self.share = config.batch_size // world_size()

    def numbers(self, step: int) -> tuple[int, Tensor]:
        """The epoch of a step, and which training pictures are this process's; an epoch shuffles anew."""
        epoch, place = divmod(step, self.count // self.config.batch_size)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(seed_of(self.config.seed, epoch))
            self.epoch, self.order = epoch, torch.randperm(self.count, generator=generator)
        first = place * self.config.batch_size + rank() * self.share
        return epoch, self.order[first:first + self.share]

    def agree_on_broken(self):
        """Pictures in memory are whole."""

    def val_numbers(self, size: int) -> tuple[Tensor, ...]:
        """Which held-out pictures are this process's, `size` at a time."""
        return torch.arange(rank(), self.val_count, world_size()).split(size)


class ArrayData(Data):
    """Drawn shapes or CIFAR-10: uint8, whole on the training device."""

    def __init__(self, config: TrainConfig, image_size: int, device: torch.device):
        if config.preset == 'shapes':
            arrays = (*draw_shapes(config.train_count or 12_000, config.seed, image_size),
                      *draw_shapes(config.val_count, config.seed + 2 ** 31, image_size))
            self.class_names = list(FIGURES)
        else:
            check(image_size == 32, f'--image-size {image_size}: CIFAR-10 has pictures of 32')
            arrays, self.class_names = read_cifar10(config.data_dir), CIFAR10_CLASSES
        self.images, self.labels = (array[:config.train_count].to(device) for array in arrays[:2])
        self.val_images, self.val_labels = (array[:config.val_count].to(device) for array in arrays[2:])
        self.fingerprint = hashlib.md5(arrays[0][:config.train_count].numpy()).hexdigest()
        super().__init__(config, len(self.images), len(self.val_images), device)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's pictures (b, 3, S, S) in [-1, 1] and labels of training step `step`."""
        _, chosen = self.numbers(step)
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, step, 0))
        noise_B3 = torch.rand(self.config.batch_size, 3, generator=generator)
        noise_b3 = noise_B3[rank() * self.share:(rank() + 1) * self.share].to(self.device)
        images = augment(to_float(self.images[chosen]), noise_b3, self.config.flip, self.config.crop)
        return images, self.labels[chosen]

    def val_batches(self, size: int):
        """This process's held-out pictures and labels, without augmentation."""
        for chosen in self.val_numbers(size):
            yield to_float(self.val_images[chosen]), self.val_labels[chosen]

    def val_pictures(self, count: int) -> Tensor:
        return to_float(self.val_images[:count])


def to_float(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def augment(images_B3HW: Tensor, noise_B3: Tensor, flip: bool, crop: int) -> Tensor:
    """Mirrors half of the pictures, and shifts each by up to `crop` pixels, its edge continued.

    noise_B3: three uniform numbers in [0, 1) a picture decide: shifts down and right, and whether to mirror.
    """
    if not (flip or crop):
        return images_B3HW
    B, _, H, W = images_B3HW.shape
    device = images_B3HW.device
    dy, dx = ((noise_B3[:, :2] * (2 * crop + 1)).long() - crop).T[..., None]
    rows, columns = dy + torch.arange(H, device=device), dx + torch.arange(W, device=device)
    if flip:
        columns = torch.where(noise_B3[:, 2:] < 0.5, W - 1 - columns, columns)
    y, x = rows.clamp(0, H - 1)[:, :, None], columns.clamp(0, W - 1)[:, None, :]
    return images_B3HW[torch.arange(B)[:, None, None], :, y, x].permute(0, 3, 1, 2).contiguous()


PICTURE_ENDINGS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.ppm', '.tif', '.tiff')


def find_pictures(folder: Path) -> list[tuple[str, str]]:
    """(path, class) of every picture in folder/<class>/, in the order of their names."""
    found = []
    for class_name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        if (folder / class_name).is_dir() and not class_name.startswith('.'):
            names = sorted(os.listdir(folder / class_name))
            found += [(str(folder / class_name / name), class_name) for name in names
                      if name.lower().endswith(PICTURE_ENDINGS)]
    return found


class PictureReader(Dataset):
    """What worker processes do. Its key is (epoch, number): the crop follows from both; epoch -1 cuts the
    centre. Gives the picture, its label, and why others could not be read: then its neighbour stands in."""

    def __init__(self, pictures: list[tuple[str, str]], class_names: list[str], size: int, config,
                 allowed: float):
        # arrays, because forked workers would copy a list page by page as they count references to its parts
        self.paths = np.array([os.fsencode(path) for path, _ in pictures])
        self.labels = np.searchsorted(class_names, [class_name for _, class_name in pictures])
        self.size, self.flip, self.seed, self.allowed = size, config.flip, config.seed, allowed

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, int, list[str]]:
        epoch, number = key
        broken = []
        while len(broken) <= self.allowed:
            path = os.fsdecode(self.paths[number])
            random = np.random.default_rng((self.seed, epoch, number)) if epoch >= 0 else None
            try:
                picture = sample.read_picture(path, self.size, random)
                if self.flip and random is not None and random.random() < 0.5:
                    picture = picture[:, ::-1]
                return picture, self.labels[number], broken
            except Exception as error:                      # Pillow fails in many ways on a broken file
                broken.append(f'{path} ({one_line(error)})')
                number = (number + 1) % len(self.paths)
        return np.zeros((self.size, self.size, 3), np.uint8), 0, broken     # more than the run puts up with


def collate(items: list) -> tuple[Tensor, Tensor, list[str]]:
    """What PictureReader gave, as uint8 (b, 3, S, S), labels and why some could not be read."""
    pictures, labels, broken = zip(*items)
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(np.array(labels)), sum(broken, [])


def stand_apart(_):
    """Workers outlive a Ctrl-C at the terminal, so that the step can be finished, but not their parent."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)           # by which the parent ends them


class FolderData(Data):
    """Pictures in train/<class>/ and val/<class>/, read by worker processes when they are needed."""

    def __init__(self, config: TrainConfig, image_size: int, device: torch.device):
        folder = Path(config.data_dir)
        check(folder.is_dir(), f'--data-dir {folder}: no such folder')
        train = find_pictures(folder / 'train' if (folder / 'train').is_dir() else folder)
        val, random = find_pictures(folder / 'val'), np.random.default_rng(config.seed)
        check(len(train) > 0, f'--data-dir {folder}: no pictures ({", ".join(PICTURE_ENDINGS)}) in '
              f'{folder}/train/<class>/')
        self.class_names = sorted({class_name for _, class_name in train + val})
        check(len(self.class_names) > 1, f'--data-dir {folder}: has one class only, {self.class_names[0]}; '
              'needs two or more folders of pictures')
        unlearned = set(self.class_names) - {class_name for _, class_name in train}
        if unlearned:
            say(f'note: {len(unlearned)} of the classes in val/ have no pictures in train/')
        shuffled = random.permutation(len(val or train))
        if not val:
            held_out = set(shuffled[:max(1, min(config.val_count, len(train) // 10))].tolist())
            say(f'no val/ in {folder}: {len(held_out)} of {len(train)} pictures are held out, by --seed')
            val = [picture for i, picture in enumerate(train) if i in held_out]
            train = [picture for i, picture in enumerate(train) if i not in held_out]
        elif len(val) > config.val_count:
            val = [val[i] for i in sorted(shuffled[:config.val_count])]
        if config.train_count is not None:
            train = [train[i] for i in sorted(random.permutation(len(train))[:config.train_count])]
        text = '\n'.join(os.path.relpath(path, folder) for path, _ in train + val)
        self.fingerprint = hashlib.md5(os.fsencode(text)).hexdigest()
        self.allowed = 0.01 * len(train + val)                          # so many may be broken
        self.reader, self.val_reader = (
            PictureReader(pictures, self.class_names, image_size, config, self.allowed)
            for pictures in (train, val))
        cores = os.cpu_count() // int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        self.workers = min(12, max(1, cores - 1)) if config.workers is None else config.workers
        self.broken, self.named, self.next_step, self.batches = set(), set(), None, None
        super().__init__(config, len(train), len(val), device)

    def load(self, reader: PictureReader, keys):
        """Pictures (b, 3, S, S) in [-1, 1] and labels, batch by batch as the keys say."""
        loader = DataLoader(reader, batch_sampler=keys, num_workers=self.workers, collate_fn=collate,
                            worker_init_fn=stand_apart, pin_memory=self.device.type == 'cuda')
        for images, labels, broken in loader:
            self.broken.update(broken)
            if len(self.broken) > self.allowed:
                self.report_broken(self.broken)
            yield to_float(images.to(self.device, non_blocking=True)), labels.to(self.device)

    def agree_on_broken(self):
        """To be called by all processes at once."""
        self.broken = set().union(*everyones(self.broken))
        with rank_0_first():
            self.report_broken(self.broken if rank() == 0 else ())

    def report_broken(self, broken):
        """Names each broken picture once, and stops the run when they are too many."""
        for reason in sorted(set(broken) - self.named):
            tqdm.write(f'broken, left out: {reason}', file=sys.stderr)
        self.named.update(broken)
        check(len(broken) <= self.allowed, f'--data-dir {self.config.data_dir}: {len(broken)} of '
              f'{self.count + self.val_count} pictures are broken, more than 1%; mend or '
              'remove them (they are named above)')

    def keys(self, step: int):
        """What this process reads in step, step + 1, ..."""
        while True:
            epoch, chosen = self.numbers(step)
            yield [(epoch, number) for number in chosen.tolist()]
            step += 1

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's pictures (b, 3, S, S) in [-1, 1] and labels of training step `step`."""
        if step != self.next_step:
            self.batches = self.load(self.reader, self.keys(step))      # from here on, workers read ahead
        self.next_step = step + 1
        return next(self.batches)

    def val_batches(self, size: int):
        """This process's held-out pictures and labels, their centres."""
        keys = [[(-1, number) for number in part.tolist()] for part in self.val_numbers(size)]
        return self.load(self.val_reader, keys)

    def val_pictures(self, count: int) -> Tensor:
        items = [self.val_reader[-1, i] for i in range(min(count, self.val_count))]
        return to_float(collate(items)[0].to(self.device))


def load_data(config: TrainConfig, image_size: int, device: torch.device) -> Data:
    """The pictures that the preset and --data-dir stand for, the same in all processes."""
    folder = Path(config.data_dir) if config.data_dir else None
    if folder and (not config.preset.startswith('cifar10') or (folder / 'train').is_dir()):
        data = FolderData(config, image_size, device)
    else:
        check(not config.preset.startswith('imagenet'), f'--preset {config.preset}: needs --data-dir, a '
              'folder with train/<class>/*.jpg and val/<class>/*.jpg')
        data = ArrayData(config, image_size, device)
    check(config.batch_size <= data.count, f'--batch-size {config.batch_size}: there are only {data.count} '
          'pictures to train on')
    check(data.val_count >= world_size(), f'--val-count {data.val_count}: fewer than there are processes')
    return data


# --------------------------------------------------------------------------------- what the two stages train
class Task:
    """A stage: its modules, each with its optimizer, and `state`, other tensors that a resumed run needs."""

    def __init__(self, run: 'Run', name: str, model: torch.nn.Module):
        config = run.config
        self.run, self.config, self.name, self.model = run, config, name, model
        steps, epochs = getattr(config, f'{name}_steps'), getattr(config, f'{name}_epochs')
        self.steps = steps or math.ceil(epochs * run.data.count / config.batch_size)
        self.seconds = 0.0                  # trained so far, over all resumes: steps and validations
        share = dict(vqvae=config.budget_vqvae, var=1 - config.budget_vqvae)[name]
        self.budget = 60 * (config.budget_minutes or 0) * (share if config.stage == 'both' else 1)
        self.lr = getattr(config, f'{name}_lr') * config.batch_size / 256
        self.scale_names = [f'{side}x{side}' for side in model.config.scales]
        self.modules, self.optimizers, self.parallel, self.state = {}, {}, {}, {}
        self.add('model', model, betas=(0.9, 0.95), decay=config.weight_decay)

    def add(self, name: str, module: torch.nn.Module, betas: tuple[float, float], decay: float):
        groups = parameter_groups(module, decay)
        self.modules[name], self.parallel[name] = module, parallel(module)
        self.optimizers[name] = torch.optim.AdamW(groups, betas=betas, fused=True)

    def network(self) -> torch.nn.Module:
        """The model as a pass should call it: processes only meet in training."""
        return self.parallel['model'] if self.model.training else self.model

    def keep_to_budget(self, step: int):
        """As many steps in all as make the share that is done, `step`, that of the time that is gone."""
        if self.budget and self.seconds:
            self.steps = max(step, round(step * self.budget / self.seconds))

    def before_step(self, step: int, images: Tensor):
        pass

    def after_step(self):
        pass

    def keep_lowest(self, row: dict) -> bool:
        """Takes note of what a validation found; whether the model is to be written because of it."""
        return True


REVIVAL_PICTURES = 256                  # whose features may replace dead codes; bounds the memory it takes


class TokenizerTask(Task):
    """Stage 1: Equation 5. Small pictures do without its perceptual and adversarial terms."""

    def __init__(self, run: 'Run', model: VQVAE):
        for i in set(range(len(model.phis))) - set(model.phi_table):
            model.phis[i].requires_grad_(False)     # no scale uses it
        super().__init__(run, 'vqvae', model)
        # a code is dead that no token used since the last revival; hits_V: in this step, on this process
        self.hits_V = torch.zeros(model.config.vocab_size, dtype=torch.int64, device=run.data.device)
        self.state['hits_V'] = self.hits_V.clone()
        model.codebook.weight.data.zero_()          # all codes are dead until step 0 puts them on data
        self.lpips = load_lpips(run.data.device) if self.config.perceptual_weight else None
        self.adversarial = False                    # from discriminator_start on
        self.columns = ['reconstruction', 'vq', 'psnr', 'use', 'perplexity', 'model_gradient']
        if self.lpips:
            self.columns.append('perceptual')
        if self.config.adversarial_weight:
            check(model.config.image_size >= 24, f'--adversarial-weight {self.config.adversarial_weight}: '
                  'the discriminator needs pictures of 24 pixels or more')
            discriminator = Discriminator(self.config.discriminator_channels).to(run.data.device)
            self.add('discriminator', discriminator, betas=(0.5, 0.9), decay=0.0)
            self.columns += ['generator', 'discriminator', 'adaptive', 'discriminator_gradient']
        self.columns += [f'{metric}_{name}' for metric in ('use', 'perplexity') for name in self.scale_names]

    def before_step(self, step: int, images: Tensor):
        """Replaces dead codes: all at step 0, none in the last quarter, so that the codebook can settle."""
        self.adversarial = 'discriminator' in self.modules and step >= self.config.discriminator_start
        if step % self.config.revive_every_steps == 0 and step <= 0.75 * self.steps:
            with torch.no_grad(), autocast(self.run.data.device, self.config.dtype):
                f = torch.cat([self.model.features(part) for part in images.split(self.run.micro_batch_size)])
            if dist.is_initialized():
                parts = [torch.empty_like(f) for _ in range(world_size())]
                dist.all_gather(parts, f)
                f = torch.cat(parts)                # of the whole batch, in its order
            self.model.revive_codes(self.state['hits_V'] == 0, f[:REVIVAL_PICTURES])
            if dist.is_initialized():               # lest different GPUs round differently
                dist.broadcast(self.model.codebook.weight.data, 0)
            self.state['hits_V'].zero_()

    def after_step(self):
        self.state['hits_V'] += all_sum(self.hits_V)
        self.hits_V.zero_()

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict]:
        """The loss of a batch, and what the log shows of it."""
        reconstruction, vq_loss, tokens_BL = self.parallel['model'](images)
        self.hits_V += tokens_BL.flatten().bincount(minlength=self.model.config.vocab_size)
        loss = F.mse_loss(reconstruction, images)
        metrics = dict(reconstruction=loss, vq=vq_loss)
        if self.lpips:
            metrics['perceptual'] = self.lpips(reconstruction, images).mean()
            loss = loss + self.config.perceptual_weight * metrics['perceptual']
        if self.adversarial:
            added, terms = self.adversarial_terms(images, reconstruction, loss)
            loss, metrics = loss + added, metrics | terms
        return loss + vq_loss, metrics

    def adversarial_terms(self, images: Tensor, reconstruction: Tensor, loss: Tensor) -> tuple[Tensor, dict]:
        """The adversarial term of Eq. 5, as in VQGAN (Esser et al., 2021), and the discriminator's own loss.

        Their sum needs one backward pass: the first is taken from a frozen discriminator, the second, a hinge
        loss, from a detached reconstruction. The adaptive weight makes the adversarial gradient as long as
        that of `loss` where both enter the decoder, at its last layer.
        """
        discriminator = self.modules['discriminator'].requires_grad_(False)
        generator_loss = -discriminator(reconstruction).float().mean()
        last_layer = self.model.decoder.conv_out.weight
        lengths = [torch.autograd.grad(term, last_layer, retain_graph=True)[0].norm()
                   for term in (loss, generator_loss)]
        adaptive = (lengths[0] / (lengths[1] + 1e-4)).clamp(max=1e4)
        discriminator.requires_grad_(True)
        verdicts = self.parallel['discriminator'](torch.cat([images, reconstruction.detach()]))
        real, made = verdicts.float().chunk(2)
        discriminator_loss = (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2
        added = self.config.adversarial_weight * adaptive * generator_loss + discriminator_loss
        return added, dict(generator=generator_loss, discriminator=discriminator_loss, adaptive=adaptive)

    @torch.no_grad()
    def validate(self) -> dict:
        """PSNR (dB) of held-out pictures; codes in use (%) and their perplexity, in all and scale by scale.

        Perplexity is the number of equally frequent codes that would be as varied.
        """
        V, device = self.model.config.vocab_size, self.run.data.device
        error = torch.zeros((), device=device)
        hits_KV = torch.zeros(len(self.scale_names), V, device=device, dtype=torch.int64)
        for images, _ in self.run.data.val_batches(self.run.micro_batch_size):
            tokens_BL = self.model.encode(images)
            error += (self.model.decode(tokens_BL) - images).square().mean((1, 2, 3)).sum()
            maps = tokens_BL.split(self.model.scale_lengths, dim=1)
            hits_KV += torch.stack([tokens_Bl.flatten().bincount(minlength=V) for tokens_Bl in maps])
        all_sum(hits_KV)
        row = dict(psnr=-10 * (all_sum(error) / self.run.data.val_count / 4).log10().item())
        names = ['', *(f'_{name}' for name in self.scale_names)]
        for name, hits_V in zip(names, [hits_KV.sum(0), *hits_KV]):
            row['use' + name] = 100 * (hits_V > 0).float().mean().item()
            row['perplexity' + name] = torch.special.entr(hits_V / hits_V.sum()).sum().exp().item()
        return row

    def draw(self):
        """reconstructions.png: a row of held-out pictures over a row of what the tokenizer makes of them."""
        columns = min(max(4, 512 // self.model.config.image_size), self.run.data.val_count)
        originals = self.run.data.val_pictures(2 * columns)
        originals = originals[:len(originals) // columns * columns]
        rows = zip(originals.split(columns), self.model.decode(self.model.encode(originals)).split(columns))
        picture = sample.grid(torch.cat([row for pair in rows for row in pair]), columns)
        save_picture(self.run.out / 'reconstructions.png', picture)

    def save(self):
        sample.save_checkpoint(self.run.out / 'vqvae.pt', 'vqvae', vqvae_config=asdict(self.model.config),
                               vqvae=self.model.state_dict())


def load_lpips(device: torch.device) -> torch.nn.Module:
    """The perceptual distance of Zhang et al. (2018), frozen: two batches in [-1, 1] -> one number a pair."""
    with rank_0_first():                            # rank 0 downloads its weights for all
        try:
            import lpips
            network = lpips.LPIPS(net='vgg', verbose=False)
        except ImportError as error:
            raise UserError(f'--perceptual-weight: needs the package lpips ({error}); `pip install lpips`, '
                            'or leave the flag away') from None
        except Exception as error:                          # a download fails in many ways
            raise UserError(f'--perceptual-weight: the weights of lpips cannot be loaded '
                            f'({one_line(error)}); try again, or leave the flag away') from None
    return network.to(device).eval().requires_grad_(False)


class TransformerTask(Task):
    """Stage 2: cross-entropy of every token, given all coarser scales of its picture."""

    def __init__(self, run: 'Run', model: VAR, tokenizer: VQVAE):
        super().__init__(run, 'var', model)
        self.tokenizer = tokenizer
        self.sampling = {name: getattr(self.config, name) for name in ('cfg', 'top_k', 'top_p')}
        self.state['lowest_loss'] = torch.tensor(math.inf)      # held-out; var.pt has the weights that had it
        self.columns = ['loss', 'accuracy', 'ln_V', 'model_gradient']
        self.columns += [f'{metric}_{name}' for metric in ('loss', 'accuracy') for name in self.scale_names]

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict]:
        """The loss of a batch, and what the log shows of it. (Released code encodes outside of autocast.)"""
        tokens_BL = self.tokenizer.encode(images)
        logits_BLV = self.network()(labels, self.tokenizer.teacher_inputs(tokens_BL))
        loss_BL = F.cross_entropy(logits_BLV.transpose(1, 2), tokens_BL, reduction='none')
        right_BL = logits_BLV.argmax(-1) == tokens_BL
        metrics = {}
        for metric, values_BL in dict(loss=loss_BL, accuracy=right_BL).items():
            values_L = values_BL.float().mean(0)
            metrics[metric] = values_L.mean()
            for name, values in zip(self.scale_names, values_L.split(self.tokenizer.scale_lengths)):
                metrics[f'{metric}_{name}'] = values.mean()
        return loss_BL.mean(), metrics

    @torch.no_grad()
    def validate(self) -> dict:
        """Loss and accuracy on held-out pictures, each with its own label, in all and scale by scale."""
        names, total = self.columns[:2] + self.columns[4:], 0.0
        for images, labels in self.run.data.val_batches(self.run.micro_batch_size):
            metrics = self.loss(images, labels)[1]
            total = total + len(labels) * torch.stack([metrics[name] for name in names])
        means = all_sum(total) / self.run.data.val_count
        return dict(zip(names, means.tolist())) | dict(ln_V=math.log(self.model.config.vocab_size))

    def keep_lowest(self, row: dict) -> bool:
        lowest = self.state['lowest_loss'].item()
        self.state['lowest_loss'].fill_(min(lowest, row['loss']))
        return row['loss'] < lowest

    def draw(self):
        """samples.png: a column a class, ten classes at most, at the sampling defaults."""
        num_classes, size = self.model.config.num_classes, self.tokenizer.config.image_size
        columns = min(10, num_classes)
        classes = [i * num_classes // columns for i in range(columns)]
        batches = sample.draw(self.tokenizer, self.model, classes * (8 if size <= 64 else 2), 0,
                              min(16, self.run.micro_batch_size), self.config.dtype, **self.sampling)
        picture = sample.grid(torch.cat([images for images, _ in batches]), columns)
        save_picture(self.run.out / 'samples.png', picture)

    def save(self):
        sample.save_model(self.run.out / 'var.pt', self.tokenizer, self.model, self.run.data.class_names,
                          self.sampling)


# --------------------------------------------------------------------------------------------- training loop
def learning_rate(step: int, steps: int, last: float) -> float:
    """Released schedule, over the peak: up from 0.005 for 1/50 of the steps, 5% flat, down to `last`."""
    warmup = steps / 50
    if step < warmup:
        return 0.005 + 0.995 * step / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return 1 - (1 - last) * max(0.0, done - 0.05) / 0.95


def weight_decay(step: int, steps: int, first: float, last: float) -> float:
    """Released schedule: from first to last along half a cosine."""
    return last + (first - last) * (0.5 + 0.5 * math.cos(math.pi * step / max(1, steps - 1)))


def parameter_groups(model: torch.nn.Module, decay: float) -> list[dict]:
    """No weight decay on one-dimensional tensors, nor on what stands for a position, a scale or a gate."""
    groups = [dict(params=[], weight_decay=decay), dict(params=[], weight_decay=0.0)]
    for name, parameter in model.named_parameters():
        is_free = re.search('position|scale_embedding|adaln_table|log_scale', name) or parameter.ndim <= 1
        groups[bool(is_free)]['params'].append(parameter)
    return groups


def set_schedule(task: Task, step: int) -> float:
    config = task.config
    lr = task.lr * learning_rate(step, task.steps, config.last_lr)
    for optimizer in task.optimizers.values():
        for group in optimizer.param_groups:
            group['lr'] = lr
    if task.name == 'var' and config.last_weight_decay is not None:
        decay = weight_decay(step, task.steps, config.weight_decay, config.last_weight_decay)
        task.optimizers['model'].param_groups[0]['weight_decay'] = decay
    return lr


def training_step(run: 'Run', task: Task, step: int) -> dict[str, Tensor]:
    """One step of the optimizers on one batch, part by part; what the log shows of it."""
    images, labels = run.data.batch(step)                       # this process's share
    task.model.train()
    torch.manual_seed(seed_of(run.config.seed, step, 1))        # the same in all processes
    task.before_step(step, images)
    for optimizer in task.optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    parts = list(zip(images.split(run.micro_batch_size), labels.split(run.micro_batch_size)))
    row = {}
    for i, (images, labels) in enumerate(parts):
        torch.manual_seed(seed_of(run.config.seed, step, 2, rank() * len(parts) + i))
        with unsynchronised(task.parallel.values(), i + 1 < len(parts)):
            with autocast(run.data.device, run.config.dtype):
                loss, metrics = task.loss(images, labels)
            (loss / len(parts)).backward()
        for name, value in metrics.items():
            row[name] = row.get(name, 0.0) + value.detach() / len(parts)
    task.after_step()
    for name, optimizer in task.optimizers.items():
        learning = [parameter for parameter in task.modules[name].parameters() if parameter.grad is not None]
        if learning:                                            # a discriminator doesn't before its start
            row[f'{name}_gradient'] = torch.nn.utils.clip_grad_norm_(learning, 2.0)
            optimizer.step()
    return row


def agreed(rows: list[dict[str, Tensor]]) -> list[dict[str, float]]:
    """The rows, averaged over all processes."""
    values = torch.stack([value.float() for row in rows for value in row.values()])
    means = iter((all_sum(values.cpu().double()) / world_size()).tolist())
    return [{name: next(means) for name in row} for row in rows]


def fit(run: 'Run', task: Task):
    """The training loop of both stages."""
    config, model, data = run.config, task.model, run.data
    start, known = run.restore(task)            # known: metrics since the last line of the log
    run.open_log(task, start)
    if start == 0:
        run.save(task, 0, [])                   # from here on, the run can be killed and resumed
    count = sum(parameter.numel() for parameter in model.parameters())
    aim = f'to {task.budget / 60:.3g} minutes of training' if task.budget else f'to {task.steps}'
    say(f'{task.name}: {count / 1e6:.2f}M parameters, steps {start} {aim}')
    rows, images_since, began, is_stop = [], 0, time.monotonic(), False
    step, at_end = start - 1, start == task.steps
    with tqdm(desc=task.name, initial=start, total=task.steps, disable=rank() > 0) as bar:
        while not at_end:
            step += 1
            lr = set_schedule(task, step)
            rows.append(training_step(run, task, step))
            images_since += config.batch_size

            if step == start:                   # is slow, waiting for workers and kernels: isn't counted
                before = time.monotonic() - task.seconds
            stop_signal, task.seconds, time_is_up = run.agreed_stop(time.monotonic() - before)
            task.keep_to_budget(step + 1)
            bar.total = task.steps
            bar.update()
            at_end = step + 1 == task.steps
            is_log = at_end or (step + 1) % config.log_every_steps == 0
            is_save = at_end or (step + 1) % config.save_every_steps == 0
            is_stop = stop_signal or time_is_up
            if is_log or is_save or is_stop:
                known, rows = known + agreed(rows), []
                run.check_finite(task, known, step)
                data.agree_on_broken()
            if is_log:
                row, speed = average(known), images_since / (time.monotonic() - began)
                tokens_per_s = speed * sum(side * side for side in model.config.scales)
                run.log(step + 1, 'train', lr=lr, images_per_s=speed, tokens_per_s=tokens_per_s, **row)
                bar.set_postfix_str(f'{task.columns[0]} {row[task.columns[0]]:.3f}, {speed:.0f} images/s')
                known, images_since, began = [], 0, time.monotonic()
            if is_save:
                paused = time.monotonic()
                validate_and_keep(run, task, step)
                began += time.monotonic() - paused
                task.seconds = time.monotonic() - before
            if is_save or is_stop:
                run.save(task, step + 1, known)
            if is_stop:
                break
    if is_stop:
        say(f'stopped at step {step + 1} of {task.steps} of {task.name}, all saved; to go on: '
            f'{run.resume_command()}')
        status = 128 + stop_signal if stop_signal else 0
        leave_processes(status)
        sys.exit(status)


def validate_and_keep(run: 'Run', task: Task, step: int):
    """Measures the model after `step`. Draws and writes it, unless an earlier one was better."""
    task.model.eval()
    with autocast(run.data.device, run.config.dtype):
        row = task.validate()
    run.check_finite(task, [row], step)
    run.log(step + 1, 'val', **row)
    shown = ', '.join(f'{name} {value:.3g}' for name, value in row.items())
    kept = task.keep_lowest(row) or not (run.out / f'{task.name}.pt').exists()
    say(f'{task.name} step {step + 1}, held-out: {shown}'
        + ('' if kept else f'; not its lowest, so {task.name}.pt stays that of an earlier step'))
    if rank() == 0 and kept:
        task.save()
        task.draw()


def average(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the rows that have it (the discriminator's begin at its start)."""
    names = {name: None for row in rows for name in row}
    columns = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(column) / len(column) for name, column in columns.items()}


def say(text: str):
    """Prints a line, once for all processes, above the progress bar."""
    if rank() == 0:
        tqdm.write(text)


@contextmanager
def signals_noted():
    """Ctrl-C and SIGTERM are put on a list, for the training loop to finish its step and save.

    A second one has its usual effect, at once.
    """
    noted = []

    def note(number, frame):
        noted.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Run:
    """The folder of a run: its settings, data and logs, and what it needs to go on (`saved`, if it does)."""
    settings: dict
    config: TrainConfig
    out: Path
    data: Data
    micro_batch_size: int
    saved: dict | None
    replaced: list[Path]                        # of an earlier run, to be removed when this one begins
    signals: list[int]                          # SIGINT, SIGTERM that came
    began: float                                # when this process began to train: time.monotonic()

    def agreed_stop(self, seconds: float) -> tuple[int, float, bool]:
        """A signal that any of the processes was sent, 0 if none; the most seconds that any of them trained;
        whether --stop-after-minutes have passed. The same in all processes."""
        minutes = (time.monotonic() - self.began) / 60
        found = torch.tensor([max(self.signals, default=0), seconds, minutes], dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        number, seconds, minutes = found.tolist()
        return int(number), seconds, minutes >= (self.config.stop_after_minutes or math.inf)

    def save(self, task: Task, step: int, rows: list[dict]):
        """last.pt: all that it takes to go on. Rows are what the log has not averaged yet."""
        if rank() == 0:
            sample.save_checkpoint(
                self.out / 'last.pt', 'resume', self.out / 'previous.pt', settings=self.settings,
                data=self.data.fingerprint, stage=task.name, step=step, seconds=task.seconds,
                unfinished=step < task.steps, rows=rows, state=task.state,
                modules={name: module.state_dict() for name, module in task.modules.items()},
                optimizers={name: optimizer.state_dict() for name, optimizer in task.optimizers.items()})

    def restore(self, task: Task) -> tuple[int, list[dict]]:
        """Puts back what save() saved, if it was in this stage; returns the step to go on with, and rows."""
        if not self.saved or self.saved['stage'] != task.name:
            return 0, []
        for name in task.modules:
            task.modules[name].load_state_dict(self.saved['modules'][name])
            task.optimizers[name].load_state_dict(self.saved['optimizers'][name])
        for name, tensor in self.saved['state'].items():
            task.state[name].copy_(tensor)
        start, rows, task.seconds = self.saved['step'], self.saved['rows'], self.saved.get('seconds', 0.0)
        task.keep_to_budget(start)
        self.saved.clear()                          # as large as model and optimizer together
        return start, rows

    def check_finite(self, task: Task, rows: list[dict], step: int):
        """Stops the run where a metric is not a number any more: nothing is saved after that."""
        bad = [(i, name) for i, row in enumerate(rows) for name in row if not math.isfinite(row[name])]
        if not bad:
            return
        i, name = min(bad, key=lambda found: (found[0], not found[1][-1].isdigit()))    # a scale, if any
        step -= len(rows) - 1 - i
        with rank_0_first():
            name_and_scale = re.sub(r'_(\d+x\d+)$', r' of scale \1', name)
            raise UserError(f'{task.name}: {name_and_scale} is {rows[i][name]} at step {step + 1}; the last '
                            f'save stands; go on from it by --resume with a --{task.name}-lr below '
                            f"{getattr(self.config, task.name + '_lr')}, or with --dtype float32")

    def resume_command(self) -> str:
        local = os.environ.get('LOCAL_WORLD_SIZE')
        launcher = f'torchrun --nproc-per-node {local}' if local else 'python'
        return f'{launcher} train.py --resume --out {shlex.quote(str(self.out))}'

    def open_log(self, task: Task, start: int):
        """The stage's CSV: a new one, or on resuming the old one up to the step resumed from."""
        if rank() > 0:
            return
        while self.replaced:
            self.replaced.pop().unlink(missing_ok=True)
        path, rows = self.out / f'{task.name}.csv', []
        if start and path.exists():
            with open(path, newline='') as file:
                rows = [row for row in csv.DictReader(file) if int(row['step']) <= start]
        temporary = path.with_name(path.name + '.tmp')
        self.file = open(temporary, 'w', newline='')
        columns = ['step', 'split', 'lr', 'images_per_s', 'tokens_per_s', *task.columns]
        self.writer = csv.DictWriter(self.file, columns)
        self.writer.writeheader()
        self.writer.writerows(rows)
        self.file.flush()
        temporary.replace(path)

    def log(self, step: int, split: str, **row):
        if rank() == 0:
            row = {name: f'{value:.7g}' for name, value in row.items()}
            self.writer.writerow(dict(step=step, split=split) | row)
            self.file.flush()


def read_resume(out: Path) -> dict | None:
    """last.pt, or previous.pt where that is torn (and then out of the way of the next save)."""
    for path in (out / 'last.pt', out / 'previous.pt'):
        if path.exists():
            try:
                return sample.read_checkpoint(path, ('resume',))
            except sample.TornError as error:       # rank 0 comes first, and leaves none to the others
                say(f'passed over: {error}')
                path.replace(path.with_suffix('.torn'))
    return None


# ---------------------------------------------------------------------------------------- what a run costs
ACTIVATION_BYTES = 70                   # kept for the backward pass for each token, block and unit of width


def var_flops(config: VARConfig, tokens: int, pairs: int, calls: int) -> int:
    """FLOPs of one picture through the transformer: a multiplication and an addition are two.

    tokens: places that pass through it; pairs: of query and key, over all places, in one block; calls: how
    often the class is projected for AdaLN, once in training and once a scale in sampling.
    """
    D, adaln = config.width, 1 if config.shared_adaln else config.depth
    blocks = config.depth * (24 * D * D * tokens + 4 * D * pairs)       # q, k, v, proj: 8 D^2; MLP: 16 D^2
    return blocks + 2 * D * config.vocab_size * tokens + calls * (adaln * 12 + 4) * D * D


def cost(settings: dict) -> dict:
    """What stage 2 costs: counts, FLOPs of a picture, bytes on a GPU, hours. Allocates no weights."""
    config = make(TrainConfig, settings)
    count, num_classes = dict(shapes=(config.train_count or 12_000, 10), cifar10=(50_000, 10)).get(
        config.preset.removesuffix('-cpu'), (1_281_167, 1000))
    with torch.device('meta'):
        tokenizer = VQVAE(make(VQVAEConfig, settings))
        var = VAR(make(VARConfig, settings, num_classes=num_classes))
        images = torch.empty(1, 3, tokenizer.config.image_size, tokenizer.config.image_size)
    with FlopCounterMode(display=False) as encoder, torch.no_grad():
        f = tokenizer.features(images)
    with FlopCounterMode(display=False) as decoder, torch.no_grad():
        tokenizer.decode_f_hat(f)
    lengths, C, D = var.config.lengths, var.config.z_channels, var.config.width
    L, K = sum(lengths), len(lengths)
    word = 2 * C * D * (L - 1)
    forward = var_flops(var.config, L, L * L, 1) + word
    seen = sum(length * sum(lengths[:k + 1]) for k, length in enumerate(lengths))
    sampling = 2 * var_flops(var.config, L, seen, K) + word + decoder.get_total_flops()
    training = 3 * forward + encoder.get_total_flops()
    parameters = sum(parameter.numel() for parameter in var.parameters())
    steps = config.var_steps or math.ceil(config.var_epochs * count / config.batch_size)
    micro = config.micro_batch_size or math.ceil(config.batch_size / config.gpus)
    weights = (4 + 4 + 8 + 2) * parameters      # value, gradient, two moments of AdamW; a copy in bfloat16
    logits = 12 * var.config.vocab_size         # themselves, their softmax, its gradient
    activations = micro * L * (var.config.depth * ACTIVATION_BYTES * D + logits)
    flops = training * steps * config.batch_size
    return dict(model=f'{config.preset}, d{var.config.depth}', parameters=parameters, training=training,
                sampling=sampling, memory=weights + activations, micro_batch_size=micro, steps=steps,
                hours=flops / (config.gpus * config.tflops * 1e12 * config.mfu) / 3600, count=count)


def describe_cost(settings: dict) -> str:
    """A table of one row."""
    row, config = cost(settings), make(TrainConfig, settings)
    giga = {name: f'{row[name] / 1e9:,.0f}' for name in ('training', 'sampling')}
    cells = {'model': row['model'], 'parameters': f"{row['parameters']:,}",
             'GFLOPs an image, training': giga['training'], 'sampling': giga['sampling'],
             'GiB a GPU': f"{row['memory'] / 2 ** 30:.0f}", 'at so many pictures': row['micro_batch_size'],
             'steps': f"{row['steps']:,}",
             f'hours on {config.gpus} GPUs of {config.tflops:g} TFLOP/s at an assumed MFU of {config.mfu:g}':
             f"{row['hours']:,.0f}"}
    lines = [cells, ['---'] * len(cells), map(str, cells.values())]
    return '\n'.join([f"Stage 2 alone, {row['count']:,} pictures an epoch."]
                     + [f"| {' | '.join(line)} |" for line in lines])


# ---------------------------------------------------------------------------------------------- command line
CONFIGS = (VARConfig, VQVAEConfig, TrainConfig)
OF_ONE_CALL = ('out', 'resume', 'overwrite', 'stop_after_minutes')      # not kept for --resume
CHANGEABLE = ('out resume overwrite device dtype workers data_dir log_every_steps save_every_steps vqvae_lr '
              'var_lr stop_after_minutes dry_run gpus tflops mfu').split()


def build_parser() -> Parser:
    """One flag a field; the field's comment is its help."""
    parser = Parser(prog='train.py', description=__doc__)
    fields = {field.name: field for config in CONFIGS for field in dataclasses.fields(config)}
    del fields['num_classes']                                       # is read off the data
    sources = '\n'.join(map(inspect.getsource, CONFIGS))
    for name, field in sorted(fields.items()):
        comment = re.search(rf'^    {name}: .*?# *(.+)$', sources, re.M)
        values = [f', {preset} {values[name]}' for preset, values in PRESETS.items() if name in values]
        help = f"{comment[1] if comment else ''} [{field.default}{''.join(values)}]"
        options = dict(help=help.replace('%', '%%'))
        if field.type is bool:
            options |= dict(action=argparse.BooleanOptionalAction)
        else:                                                       # int, float | None, tuple[int, ...]
            options |= dict(type=(typing.get_args(field.type) or [field.type])[0], metavar='')
            options |= dict(nargs='+') if typing.get_origin(field.type) is tuple else {}
        parser.add_argument(flag(name), default=argparse.SUPPRESS, **options)
    return parser


def make(config_class, settings: dict, **more):
    """A config from the settings that are fields of it."""
    names = {field.name for field in dataclasses.fields(config_class)}
    with config_errors_as_flags():
        return config_class(**{name: value for name, value in settings.items() if name in names} | more)


def resolve(given: dict) -> tuple[dict, dict | None]:
    """All settings of the run, the preset's under the given flags. On resuming, also what was saved: then its
    settings hold, and only the CHANGEABLE ones can be given anew."""
    preset = given.get('preset', 'shapes')
    check(preset in PRESETS, f"--preset {preset}: must be one of {', '.join(PRESETS)}")
    check(not (given.get('resume') and given.get('overwrite')), '--resume, --overwrite: say one or the other')
    if given.get('resume') and not given.get('dry_run'):
        out = given.get('out', f'out/{preset}')
        saved = read_resume(Path(out))
        check(saved is not None, f'--resume: {out} holds no run that can be resumed; start one without it')
        for name, value in given.items():
            had = saved['settings'].get(name)
            check(name in CHANGEABLE or had == value, f'{flag(name)} {value}: the run to resume has {had}; '
                  'leave the flag away, or start anew in another --out')
        return saved['settings'] | given, saved
    settings = {field.name: field.default for config in CONFIGS for field in dataclasses.fields(config)}
    settings |= dict(preset=preset) | PRESETS[preset]
    if preset.startswith('imagenet'):
        depth = max(0, given.get('depth', settings['depth']))
        settings |= RECIPES[max(least for least in RECIPES if least <= depth)]
    for stage in ('vqvae', 'var'):                  # two ways to say the same: what was given holds
        if f'{stage}_epochs' in given:
            check(f'{stage}_steps' not in given, f'--{stage}-epochs, --{stage}-steps: say one or the other')
            settings[f'{stage}_steps'] = None
        for name in (f'{stage}_epochs', f'{stage}_steps'):
            check(not (name in given and 'budget_minutes' in given), f'--budget-minutes, {flag(name)}: say '
                  'one or the other')
    return settings | given, None


def divide_batch(config: TrainConfig) -> int:
    """How many pictures a process takes at once. Each such part of a batch has its own random numbers, which
    is why a resumed run keeps it, and can spread over as many processes as leave it whole."""
    B, W = config.batch_size, world_size()
    check(B % W == 0, f'--batch-size {B}: {W} processes cannot share it; {max(1, B // W) * W} would do')
    share, most = B // W, min(config.micro_batch_size or B, B // W)
    if config.resume:
        kept = config.micro_batch_size
        check(share % kept == 0, f'--resume: the run takes {kept} pictures at once, which do not divide '
              f'{share}, the share of each of {W} processes; {B // kept} processes or fewer would do')
    return max(size for size in range(1, most + 1) if share % size == 0)


def claim_folder(out: Path, config: TrainConfig, stages: list[str]) -> list[Path]:
    """Makes the folder of a run. Refuses one that holds a run, or returns which files are to be removed."""
    sample.prepare_folder(out, '--out')
    held = [out / f'{stage}.pt' for stage in stages if (out / f'{stage}.pt').exists()]
    if not (config.resume or config.overwrite):
        last = read_resume(out)
        check(not (held or last and last['unfinished']), f'--out {out}: already holds a run; --resume goes '
              'on with it, --overwrite replaces it, or choose another --out')
    return [*held, out / 'last.pt', out / 'previous.pt'] if config.overwrite else []


def load_tokenizer(path: Path, given: dict, settings: dict) -> VQVAE:
    """The tokenizer for a stage 2 without a stage 1. (The authors' file doesn't say its scales.)"""
    check(path.is_file(), f'--stage var: there is no tokenizer {path}; train one with --stage vqvae, or name '
          'one with --tokenizer')
    says_scales = given.get('resume') or 'scales' in given | PRESETS[settings['preset']]
    tokenizer = sample.load_tokenizer(path, settings['scales'] if says_scales else None)
    for name, value in asdict(tokenizer.config).items():
        check(given.get(name, value) == value, f'{flag(name)} {given.get(name)}: the tokenizer in {path} has '
              f'{value}; leave the flag away')
    return tokenizer


def main(argv: list[str]):
    start_processes()
    try:
        with rank_0_first():
            given = {name: tuple(value) if isinstance(value, list) else value
                     for name, value in vars(build_parser().parse_args(argv)).items()}
            settings, saved = resolve(given)
            config = make(TrainConfig, settings)
            make(VARConfig, settings, num_classes=1)        # complains early; the real number is in the data
        if config.dry_run:
            say(describe_cost(settings))
            leave_processes()
        else:
            train(config, settings, given, saved)
    except torch.OutOfMemoryError as error:
        raise UserError(f'--micro-batch-size: out of memory, take fewer ({one_line(error)})') from None
    except OSError as error:
        raise UserError(one_line(error)) from None
    except RuntimeError as error:
        if not (dist.is_initialized() and re.search('gloo|nccl', str(error), re.I)):
            raise
        raise UserError(f'lost another process, which may have said why ({one_line(error)})') from None


def train(config: TrainConfig, settings: dict, given: dict, saved: dict | None):
    """A whole run: folder, data and models, then its stages."""
    began = time.monotonic()
    stages = dict(both=['vqvae', 'var']).get(config.stage, [config.stage])
    if saved and saved['stage'] == 'var':                           # stage 1 is done
        stages = ['var']
    out, name = Path(config.out or f'out/{config.preset}'), config.device
    if dist.is_initialized() and torch.cuda.is_available() and name in ('auto', 'cuda'):
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = choose_device(name)
    if device.index is not None:
        torch.cuda.set_device(device)
    torch.manual_seed(config.seed)
    with rank_0_first():
        check(config.tokenizer is None or config.stage == 'var', '--tokenizer: goes with --stage var')
        micro_batch_size = divide_batch(config)
        if 'vqvae' in stages:
            tokenizer = VQVAE(make(VQVAEConfig, settings))
        else:
            path = config.tokenizer or out / 'vqvae.pt'
            if saved and (out / 'var.pt').exists():
                path = out / 'var.pt'                               # holds the one that was trained on
            tokenizer = load_tokenizer(Path(path), given, settings)
        replaced = claim_folder(out, config, stages)
    tokenizer.to(device)
    shape = tokenizer.config
    with rank_0_first():                            # which also downloads for all
        data = load_data(config, shape.image_size, device)
    check_agreement(data, saved)

    kept = {name: value for name, value in settings.items() if name not in OF_ONE_CALL}
    kept['micro_batch_size'] = micro_batch_size
    say(f'{config.preset}: {data.count:,} pictures of {shape.image_size}x{shape.image_size} in '
        f'{len(data.class_names)} classes, {sum(tokenizer.scale_lengths)} tokens each, scales '
        f'{shape.scales}, on {world_size()} x {device.type}, {micro_batch_size} at once')
    with signals_noted() as signals:
        run = Run(kept, config, out, data, micro_batch_size, saved, replaced, signals, began)
        if 'vqvae' in stages:
            fit(run, TokenizerTask(run, tokenizer))
            tokenizer.requires_grad_(False)
        if 'var' in stages:
            torch.manual_seed(config.seed)                  # as if stage 2 were trained alone
            fixed = {name: getattr(shape, name) for name in ('vocab_size', 'z_channels', 'scales')}
            var = VAR(make(VARConfig, settings | fixed, num_classes=len(data.class_names))).to(device)
            fit(run, TransformerTask(run, var, tokenizer))
    pictures = [out / dict(vqvae='reconstructions.png', var='samples.png')[stage] for stage in stages]
    say(f"done in {time.monotonic() - began:.0f} s; look at {' and then at '.join(map(str, pictures))}")
    leave_processes()


def check_agreement(data: Data, saved: dict | None):
    """All processes, and the run to resume, must see the same pictures, and go on from the same step."""
    found = everyones(data.fingerprint)
    steps = everyones(saved and (saved['stage'], saved['step']))
    with rank_0_first():
        check(len(set(steps)) == 1, f'--resume: the processes read different saves, {steps}; all must see '
              'the same --out')
        others = [i for i, fingerprint in enumerate(found) if fingerprint != found[0]]
        folder = f'--data-dir {data.config.data_dir}'
        check(not others, f'{folder}: rank {others and others[0]} sees other pictures there than rank 0, '
              f'which finds {data.count + data.val_count}; make the folders equal')
        check(saved is None or saved['data'] == found[0], f'{folder}: holds other pictures than the run to '
              'resume was trained on; name the same ones, or start anew in another --out')


if __name__ == '__main__':
    sample.run_command(main)
