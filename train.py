"""Trains VAR: stage 1 the tokenizer (vqvae.py), stage 2 the next-scale transformer (var.py).

    python train.py                                             # both stages on drawn shapes, on any CPU
    python train.py --preset cifar10                            # CIFAR-10, downloaded to data/
    python train.py --preset cifar10 --stage var --tokenizer out/cifar10/vqvae.pt --depth 8 --out out/deeper
    python train.py --resume                                    # go on from the last save in out/shapes

Every field of TrainConfig, VQVAEConfig and VARConfig is a flag; a preset is a set of values for them. A run
leaves in --out (out/<preset>): vqvae.pt and var.pt, to use and to share; last.pt and previous.pt, to resume;
vqvae.csv and var.csv, the logs; reconstructions.png and samples.png.

All that is random in step s follows from (seed, s): the pictures of the batch, their augmentation, dropout.
So there are no random states to save, and a run that is resumed goes on as if it had never stopped (to the
bit on a CPU; GPUs may add up in varying order). Shapes stand in the names of tensors as in var.py.
"""
import argparse
import csv
import dataclasses
import hashlib
import http.client
import inspect
import math
import re
import shutil
import tarfile
import tempfile
import time
import typing
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import sample
from sample import (Parser, UserError, autocast, check, choose_device, config_errors_as_flags, flag,
                    save_picture)
from var import VAR, VARConfig
from vqvae import VQVAE, VQVAEConfig


@dataclass(frozen=True)
class TrainConfig:
    """What a run does, beside the shapes of its two models. An impossible value raises ValueError."""
    preset: str = 'shapes'              # shapes or cifar10: the data, and a value for every flag below
    stage: str = 'both'                 # vqvae, var or both
    data_dir: str | None = None         # folder of the data set; absent: downloaded to data/
    tokenizer: str | None = None        # vqvae.pt or var.pt for --stage var; absent: vqvae.pt in --out
    out: str | None = None              # folder of the run; absent: out/<preset>
    resume: bool = False                # go on from the last save in --out
    overwrite: bool = False             # replace the run in --out
    seed: int = 0
    device: str = 'auto'                # auto (a GPU where there is one), cpu, cuda, ...
    dtype: str = 'auto'                 # float32 or bfloat16 (autocast); auto: bfloat16 on a GPU
    vqvae_steps: int = 1000
    var_steps: int = 1000
    batch_size: int = 64                # pictures a step, in both stages
    vqvae_lr: float = 4e-3              # peak learning rate of stage 1 per 256 pictures of batch
    var_lr: float = 4e-3                # peak learning rate of stage 2 per 256 pictures of batch
    last_lr: float = 0.01               # learning rate of the last step as a share of the peak
    weight_decay: float = 0.05
    revive_every_steps: int = 20        # how often stage 1 looks for dead codes, in its first three quarters
    flip: bool = False                  # mirror half of the training pictures
    crop: int = 0                       # shift training pictures by up to so many pixels
    train_count: int = 12_000           # pictures to train on: drawn so many, or the first of the data set
    val_count: int = 1000               # held-out pictures that are looked at in a validation
    log_every_steps: int = 50
    save_every_steps: int = 500         # validate, draw pictures and save; also done at the end
    cfg: float = 1.5                    # sampling defaults that var.pt carries: see sample.py
    top_k: int = 900
    top_p: float = 0.96

    def __post_init__(self):
        rules = [
            ('crop top_k cfg weight_decay', lambda v: 0 <= v < math.inf, '0 or more'),
            ('seed', lambda v: 0 <= v < 2 ** 31, 'in [0, 2^31)'),
            ('vqvae_steps var_steps batch_size train_count val_count revive_every_steps log_every_steps '
             'save_every_steps', lambda v: v >= 1, '1 or more'),
            ('vqvae_lr var_lr', lambda v: 0 < v < math.inf, 'above 0'),
            ('last_lr top_p', lambda v: 0 <= v <= 1, 'in [0, 1]'),
            ('stage', lambda v: v in ('vqvae', 'var', 'both'), 'vqvae, var or both'),
            ('dtype', lambda v: v in ('auto', 'float32', 'bfloat16'), 'auto, float32 or bfloat16')]
        for names, is_possible, wanted in rules:
            for name in names.split():
                if not is_possible(getattr(self, name)):
                    raise ValueError(f'{name}={getattr(self, name)}: must be {wanted}')


PRESETS = {                             # learning rates are per 256 pictures: 0.032 is 0.004 at a batch of 32
    'shapes': dict(depth=2, adaln_gamma_init=0.1, batch_size=32, vqvae_steps=600, vqvae_lr=0.032,
                   var_steps=1000, var_lr=0.016, cfg=2.0, top_p=0.8),
    'cifar10': dict(patch_size=2, channel_mults=(1, 2), vocab_size=1024, scales=(1, 2, 3, 4, 6, 8), depth=6,
                    adaln_gamma_init=1e-2, batch_size=256, vqvae_steps=6000, var_steps=12000, vqvae_lr=2e-3,
                    var_lr=1e-3, flip=True, train_count=50_000, val_count=2000, save_every_steps=2000),
}


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
    """Training and held-out pictures, uint8, whole on the training device."""

    def __init__(self, config: TrainConfig, image_size: int, device: torch.device):
        self.config, self.device = config, device
        if config.preset == 'shapes':
            check(config.data_dir is None, '--data-dir: shapes are drawn, not read; see --preset')
            arrays = (*draw_shapes(config.train_count, config.seed, image_size),
                      *draw_shapes(config.val_count, config.seed + 2 ** 31, image_size))
            self.class_names = list(FIGURES)
        else:
            check(image_size == 32, f'--image-size {image_size}: CIFAR-10 has pictures of 32')
            arrays, self.class_names = read_cifar10(config.data_dir), CIFAR10_CLASSES
        self.images, self.labels = (array[:config.train_count].to(device) for array in arrays[:2])
        self.val_images, self.val_labels = (array[:config.val_count].to(device) for array in arrays[2:])
        check(config.batch_size <= len(self.images), f'--batch-size {config.batch_size}: there are only '
              f'{len(self.images)} pictures to train on')
        self.epoch, self.order = -1, torch.empty(0)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, S, S) in [-1, 1] and labels of training step `step`; an epoch shuffles anew."""
        B = self.config.batch_size
        epoch, place = divmod(step, len(self.images) // B)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.config.seed * 10_007 + epoch)
            self.order = torch.randperm(len(self.images), generator=generator).to(self.device)
            self.epoch = epoch
        chosen = self.order[place * B:(place + 1) * B]
        return augment(to_float(self.images[chosen]), self.config.flip, self.config.crop), self.labels[chosen]

    def val_batches(self):
        """The held-out pictures and labels, without augmentation."""
        B = self.config.batch_size
        for i in range(0, len(self.val_images), B):
            yield to_float(self.val_images[i:i + B]), self.val_labels[i:i + B]


def to_float(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def augment(images_B3HW: Tensor, flip: bool, crop: int) -> Tensor:
    """Mirrors half of the pictures, and shifts each by up to `crop` pixels, its edge continued."""
    if not (flip or crop):
        return images_B3HW
    B, _, H, W = images_B3HW.shape
    device = images_B3HW.device
    dy, dx = torch.randint(-crop, crop + 1, (2, B, 1), device=device)
    rows, columns = dy + torch.arange(H, device=device), dx + torch.arange(W, device=device)
    if flip:
        columns = torch.where(torch.rand(B, 1, device=device) < 0.5, W - 1 - columns, columns)
    y, x = rows.clamp(0, H - 1)[:, :, None], columns.clamp(0, W - 1)[:, None, :]
    return images_B3HW[torch.arange(B)[:, None, None], :, y, x].permute(0, 3, 1, 2).contiguous()


# --------------------------------------------------------------------------------- what the two stages train
class TokenizerTask:
    """Stage 1: Equation 5, of which small pictures need the reconstruction and the vq loss."""
    name = 'vqvae'

    def __init__(self, run: 'Run', model: VQVAE):
        self.run, self.model, self.config = run, model, run.config
        self.steps, self.lr = self.config.vqvae_steps, self.config.vqvae_lr
        self.scale_names = [f'{side}x{side}' for side in model.config.scales]
        # a code is dead that no token used since the last revival; saved to resume
        hits_V = torch.zeros(model.config.vocab_size, dtype=torch.int64, device=run.data.device)
        self.state = dict(hits_V=hits_V)
        model.codebook.weight.data.zero_()          # all codes are dead until step 0 puts them on data
        self.columns = ['reconstruction', 'vq', 'psnr', 'use', 'perplexity']
        self.columns += [f'{metric}_{name}' for metric in ('use', 'perplexity') for name in self.scale_names]

    def before_step(self, step: int, images: Tensor):
        """Replaces dead codes: all at step 0, none in the last quarter, so that the codebook can settle."""
        if step % self.config.revive_every_steps == 0 and step <= 0.75 * self.steps:
            self.model.revive_codes(self.state['hits_V'] == 0, images)
            self.state['hits_V'].zero_()

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict]:
        """The loss of a batch, and what the log shows of it."""
        reconstruction, vq_loss, tokens_BL = self.model(images)
        self.state['hits_V'] += tokens_BL.flatten().bincount(minlength=self.model.config.vocab_size)
        reconstruction_loss = F.mse_loss(reconstruction, images)
        # Eq. 5's perceptual and adversarial terms belong here
        return reconstruction_loss + vq_loss, dict(reconstruction=reconstruction_loss, vq=vq_loss)

    @torch.no_grad()
    def validate(self) -> dict:
        """PSNR (dB) of held-out pictures; codes in use (%) and their perplexity, in all and scale by scale.

        Perplexity is the number of equally frequent codes that would be as varied.
        """
        errors, tokens = [], []
        for images, _ in self.run.data.val_batches():
            tokens.append(self.model.encode(images))
            errors.append((self.model.decode(tokens[-1]) - images).square().mean((1, 2, 3)))
        tokens_NL, row = torch.cat(tokens), dict(psnr=-10 * torch.cat(errors).mean().div(4).log10().item())
        names = ['', *(f'_{name}' for name in self.scale_names)]
        for name, part in zip(names, [tokens_NL, *tokens_NL.split(self.model.scale_lengths, dim=1)]):
            share_V = part.flatten().bincount(minlength=self.model.config.vocab_size) / part.numel()
            row['use' + name] = 100 * (share_V > 0).float().mean().item()
            row['perplexity' + name] = torch.special.entr(share_V).sum().exp().item()
        return row

    def draw(self):
        """reconstructions.png: a row of held-out pictures over a row of what the tokenizer makes of them."""
        images = self.run.data.val_images
        columns = min(16, len(images))
        originals = to_float(images[:columns * min(2, len(images) // columns)])
        rows = zip(originals.split(columns), self.model.decode(self.model.encode(originals)).split(columns))
        picture = sample.grid(torch.cat([row for pair in rows for row in pair]), columns)
        save_picture(self.run.out / 'reconstructions.png', picture)

    def save(self):
        sample.save_checkpoint(self.run.out / 'vqvae.pt', 'vqvae', vqvae_config=asdict(self.model.config),
                               vqvae=self.model.state_dict())


class TransformerTask:
    """Stage 2: cross-entropy of every token, given all coarser scales of its picture."""
    name = 'var'

    def __init__(self, run: 'Run', model: VAR, tokenizer: VQVAE):
        self.run, self.model, self.tokenizer, self.config = run, model, tokenizer, run.config
        self.steps, self.lr = self.config.var_steps, self.config.var_lr
        self.scale_names = [f'{side}x{side}' for side in model.config.scales]
        self.sampling = {name: getattr(self.config, name) for name in ('cfg', 'top_k', 'top_p')}
        self.state = {}
        self.columns = ['loss', 'accuracy', 'ln_V']
        self.columns += [f'{metric}_{name}' for metric in ('loss', 'accuracy') for name in self.scale_names]

    def before_step(self, step: int, images: Tensor):
        pass

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict]:
        """The loss of a batch, and what the log shows of it. (Released code encodes outside of autocast.)"""
        tokens_BL = self.tokenizer.encode(images)
        logits_BLV = self.model(labels, self.tokenizer.teacher_inputs(tokens_BL))
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
        rows = [(self.loss(images, labels)[1], len(labels)) for images, labels in self.run.data.val_batches()]
        return average(*zip(*rows)) | dict(ln_V=math.log(self.model.config.vocab_size))

    def draw(self):
        """samples.png: a column a class, at the sampling defaults."""
        labels = list(range(self.model.config.num_classes)) * 8
        batches = sample.draw(self.tokenizer, self.model, labels, 0, self.config.batch_size, **self.sampling)
        picture = sample.grid(torch.cat([images for images, _ in batches]), self.model.config.num_classes)
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


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """No weight decay on one-dimensional tensors, nor on what stands for a position, a scale or a gate."""
    groups = [dict(params=[], weight_decay=weight_decay), dict(params=[], weight_decay=0.0)]
    for name, parameter in model.named_parameters():
        is_free = re.search('position|scale_embedding|adaln_table|log_scale', name) or parameter.ndim <= 1
        groups[bool(is_free)]['params'].append(parameter)
    return groups


def average(rows: list[dict[str, Tensor]], weights: list[int]) -> dict[str, float]:
    """The weighted mean of each entry."""
    return {name: float(sum(weight * row[name] for row, weight in zip(rows, weights))) / sum(weights)
            for name in rows[0]}


def fit(run: 'Run', task):
    """The training loop of both stages."""
    config, model = run.config, task.model
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), betas=(0.9, 0.95), fused=True)
    start = run.restore(task, optimizer)
    run.open_log(task, start)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f'{task.name}: {count / 1e6:.2f}M parameters, steps {start} to {task.steps}')
    rows, began = [], time.time()
    bar = tqdm(range(start, task.steps), desc=task.name, initial=start, total=task.steps)
    for step in bar:
        torch.manual_seed(config.seed * 1_000_003 + step)
        lr = task.lr * config.batch_size / 256 * learning_rate(step, task.steps, config.last_lr)
        for group in optimizer.param_groups:
            group['lr'] = lr

        images, labels = run.data.batch(step)
        model.train()
        task.before_step(step, images)
        with autocast(run.data.device, config.dtype):
            loss, metrics = task.loss(images, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        rows.append({name: value.detach() for name, value in metrics.items()})

        at_end = step + 1 == task.steps
        is_log = at_end or (step + 1) % config.log_every_steps == 0
        is_save = at_end or (step + 1) % config.save_every_steps == 0
        if is_log or is_save:
            if not math.isfinite(loss.item()):
                bar.close()
                raise UserError(f'{task.name}: the loss is {loss.item()} at step {step + 1}; the last save '
                                f'stands; try a lower --{task.name}-lr')
        if is_log:
            row, speed = average(rows, [1] * len(rows)), len(rows) * len(images) / (time.time() - began)
            tokens_per_s = speed * sum(side * side for side in model.config.scales)
            run.log(step + 1, 'train', lr=lr, images_per_s=speed, tokens_per_s=tokens_per_s, **row)
            bar.set_postfix_str(f'{task.columns[0]} {row[task.columns[0]]:.3f}, {speed:.0f} images/s')
            rows, began = [], time.time()
        if is_save:
            paused = time.time()
            model.eval()
            with autocast(run.data.device, config.dtype):
                row = task.validate()
            task.draw()
            run.log(step + 1, 'val', **row)
            shown = ', '.join(f'{name} {value:.3g}' for name, value in row.items())
            bar.write(f'{task.name} step {step + 1}, held-out: {shown}')
            task.save()
            run.save(task, optimizer, step + 1)
            began += time.time() - paused


@dataclass
class Run:
    """The folder of a run: its settings, data and logs, and what it needs to go on (`saved`, if it does)."""
    settings: dict
    config: TrainConfig
    out: Path
    data: Data
    saved: dict | None

    def save(self, task, optimizer: torch.optim.Optimizer, step: int):
        last = self.out / 'last.pt'
        if last.exists():
            last.replace(self.out / 'previous.pt')
        sample.save_checkpoint(last, 'resume', settings=self.settings, stage=task.name, step=step,
                               unfinished=step < task.steps, state=task.state, model=task.model.state_dict(),
                               optimizer=optimizer.state_dict())

    def restore(self, task, optimizer: torch.optim.Optimizer) -> int:
        """Puts back what save() saved, if it was in this stage; returns the step to go on with."""
        if self.saved is None or self.saved['stage'] != task.name:
            return 0
        task.model.load_state_dict(self.saved['model'])
        optimizer.load_state_dict(self.saved['optimizer'])
        for name, tensor in self.saved['state'].items():
            task.state[name].copy_(tensor)
        start, self.saved = self.saved['step'], None
        return start

    def open_log(self, task, start: int):
        """The stage's CSV: a new one, or on resuming the old one up to the step resumed from."""
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
        row = {name: f'{value:.6g}' for name, value in row.items()}
        self.writer.writerow(dict(step=step, split=split) | row)
        self.file.flush()


def read_resume(out: Path) -> dict:
    """last.pt, or previous.pt where that is torn (and then out of the way of the next save)."""
    for path in (out / 'last.pt', out / 'previous.pt'):
        if path.exists():
            try:
                return sample.read_checkpoint(path, ('resume',))
            except UserError as error:
                print(f'passed over: {error}')
                path.replace(path.with_suffix('.torn'))
    raise UserError(f'--resume: {out} holds no run that can be resumed; start one without --resume')


# ---------------------------------------------------------------------------------------------- command line
CONFIGS = (VARConfig, VQVAEConfig, TrainConfig)
CHANGEABLE = 'out resume overwrite device dtype data_dir log_every_steps save_every_steps'.split()


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
    check(preset in PRESETS, f"--preset {preset}: must be {' or '.join(PRESETS)}")
    if not given.get('resume'):
        defaults = {field.name: field.default for config in CONFIGS for field in dataclasses.fields(config)}
        return defaults | dict(preset=preset) | PRESETS[preset] | given, None
    check(not given.get('overwrite'), '--resume, --overwrite: say one or the other')
    saved = read_resume(Path(given.get('out', f'out/{preset}')))
    for name, value in given.items():
        had = saved['settings'].get(name)
        check(name in CHANGEABLE or had == value, f'{flag(name)} {value}: the run to resume has {had}; leave '
              'the flag away, or start anew in another --out')
    return saved['settings'] | given, saved


def claim_folder(out: Path, config: TrainConfig, stages: list[str]) -> list[Path]:
    """Makes the folder of a run. Refuses one that holds a run, or returns which files are to be replaced."""
    sample.prepare_folder(out, '--out')
    held = [out / f'{stage}.pt' for stage in stages if (out / f'{stage}.pt').exists()]
    if not (config.resume or config.overwrite):
        unfinished = (out / 'last.pt').exists() and read_resume(out)['unfinished']
        check(not (held or unfinished), f'--out {out}: already holds a run; --resume goes on with it, '
              '--overwrite replaces it, or choose another --out')
    return [*held, out / 'last.pt', out / 'previous.pt'] if config.overwrite else []


def load_tokenizer(path: Path, given: dict) -> VQVAE:
    """The tokenizer for a stage 2 without a stage 1."""
    check(path.is_file(), f'--stage var: there is no tokenizer {path}; train one with --stage vqvae, or name '
          'one with --tokenizer')
    tokenizer = sample.load_tokenizer(path, given.get('scales'))
    for name, value in asdict(tokenizer.config).items():
        check(given.get(name, value) == value, f'{flag(name)} {given.get(name)}: the tokenizer in {path} has '
              f'{value}; leave the flag away')
    return tokenizer


def main(argv: list[str]):
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(build_parser().parse_args(argv)).items()}
    settings, saved = resolve(given)
    config = make(TrainConfig, settings)
    make(VARConfig, settings, num_classes=1)        # complains early; the real number is read off the data
    check(config.tokenizer is None or config.stage == 'var', '--tokenizer: goes with --stage var')
    stages = dict(both=['vqvae', 'var']).get(config.stage, [config.stage])
    if saved and saved['stage'] == 'var':                           # stage 1 is done
        stages = ['var']
    out, device = Path(config.out or f'out/{config.preset}'), choose_device(config.device)
    torch.manual_seed(config.seed)
    if 'vqvae' in stages:
        tokenizer = VQVAE(make(VQVAEConfig, settings))
    else:
        path = config.tokenizer or out / 'vqvae.pt'
        if saved and (out / 'var.pt').exists():
            path = out / 'var.pt'                                   # holds the one that was trained on
        tokenizer = load_tokenizer(Path(path), given)
    tokenizer.to(device)
    replaced = claim_folder(out, config, stages)
    shape, began = tokenizer.config, time.time()
    data = Data(config, shape.image_size, device)
    for path in replaced:
        path.unlink(missing_ok=True)

    kept = {name: value for name, value in settings.items() if name not in ('out', 'resume', 'overwrite')}
    run = Run(kept, config, out, data, saved)
    print(f'{config.preset}: {len(data.images):,} pictures of {shape.image_size}x{shape.image_size}, '
          f'{sum(tokenizer.scale_lengths)} tokens each, scales {shape.scales}, on {device}')
    if 'vqvae' in stages:
        fit(run, TokenizerTask(run, tokenizer))
        tokenizer.requires_grad_(False)
    if 'var' in stages:
        torch.manual_seed(config.seed)                  # as if stage 2 were trained alone
        fixed = {name: getattr(shape, name) for name in ('vocab_size', 'z_channels', 'scales')}
        var = VAR(make(VARConfig, settings | fixed, num_classes=len(data.class_names))).to(device)
        fit(run, TransformerTask(run, var, tokenizer))
    pictures = [out / dict(vqvae='reconstructions.png', var='samples.png')[stage] for stage in stages]
    print(f"done in {time.time() - began:.0f} s; look at {' and then at '.join(map(str, pictures))}")


if __name__ == '__main__':
    sample.run_command(main)
