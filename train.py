"""Trains VAR: stage 1 the tokenizer (vqvae.py), stage 2 the next-scale transformer (var.py).

    python train.py                                             # both stages on drawn shapes, on any CPU
    python train.py --preset cifar10-cpu                        # CIFAR-10, downloaded to data/, on any CPU
    python train.py --data-dir photos                           # your own images: photos/train/<class>/*.jpg
    torchrun --nproc-per-node 8 train.py --preset imagenet256 --depth 16 --data-dir imagenet
    python train.py --resume                                    # resume from out/shapes/last.pt

A run writes to --out (default: out/<preset>): vqvae.pt and var.pt, the models to use and share; last.pt, the
checkpoint to resume from; vqvae.csv and var.csv, the logs; reconstructions.png and samples.png.

All randomness in step s is determined by (seed, s), for the whole batch, of which each process takes its
share. A resumed run therefore matches an uninterrupted one (bit for bit on CPUs; --budget-minutes depends on
the clock), and more processes or smaller micro-batches change the result only by rounding. Two exceptions
depend on the micro-batch of a process: the adaptive weight of the adversarial term, and BatchNorm in the
perceptual classifier. Tensor names end in their shapes (tokens_BL), as in vqvae.py and var.py.
"""
import argparse
import colorsys
import math
import os
import re
import shutil
import signal
import socket
import tempfile
import time
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import chain
from os.path import expanduser
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import sample
from sample import (ANY_COUNT, COUNT, DTYPES, SAMPLING, SHARE, STRENGTH, UserError, autocast, check,
                    load_tokenizer, number, one_line, open_checkpoint, rank, save_checkpoint, save_file,
                    to_float, wait_for_all, world_size)
from var import VAR, VARConfig
from vqvae import VQVAE, Classifier, Discriminator, VQVAEConfig

# --------------------------------------------------------------------------------------------------- presets
PRESETS = {                             # learning rates are per 256 images: 0.064 is 0.004 at batch size 16
    'shapes': dict(depth=2, adaln_gamma_init=1.0, batch_size=16, vqvae_steps=750, vqvae_lr=0.064,
                   var_steps=700, var_lr=0.064, cfg=2.0, top_p=0.8),
    'cifar10': dict(patch_size=2, channel_mults=(1, 2), vocab_size=4096, scales=(1, 2, 3, 4, 5, 6, 8),
                    perceptual_weight=0.05, classifier_channels=64, classifier_steps=1950, depth=5,
                    shared_adaln=True, adaln_gamma_init=1e-2, stochastic_depth=0.1, batch_size=256,
                    vqvae_steps=5000, vqvae_lr=4e-3, var_steps=12_000, var_lr=5e-3, var_optimizer='muon',
                    budget_vqvae=0.35, flip=True, crop=1, val_count=2000, save_every_steps=1000, cfg=4.0,
                    top_k=0, top_p=0.9),
    'cifar10-cpu': dict(vocab_size=1024, perceptual_weight=0.05, classifier_steps=1040, depth=3,
                        adaln_gamma_init=0.1, vqvae_batch_size=32, batch_size=64, vqvae_steps=16_000,
                        vqvae_lr=0.032, var_steps=6000, var_lr=0.04, var_optimizer='muon', budget_vqvae=0.25,
                        flip=True, val_count=2000, log_every_steps=100, save_every_steps=2000, cfg=7.0,
                        top_k=0, top_p=0.8),
    'imagenet256': dict(image_size=256, patch_size=1, channels=160, channel_mults=(1, 1, 2, 2, 4),
                        res_blocks=2, attention=True, z_channels=32, vocab_size=4096,
                        scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), depth=16, vqvae_steps=66_728,  # 40 epochs
                        vqvae_lr=1e-4, vqvae_batch_size=768, vqvae_micro_batch_size=8, vqvae_last_lr=0.1,
                        batch_size=768, adversarial_weight=0.5, discriminator_start=20_000, val_count=5000,
                        log_every_steps=200, save_every_steps=2000)}
PRESETS['imagenet512'] = PRESETS['imagenet256'] | dict(
    image_size=512, scales=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32), depth=36, vqvae_micro_batch_size=2)
RECIPES = {         # of the released transformers, by minimum depth; micro_batch_size is ours, for 80 GB
    0: dict(var_steps=333_638, var_lr=1e-4, adaln_gamma_init=1e-3, var_last_lr=0.1,             # 200 epochs
            micro_batch_size=48),
    20: dict(var_steps=417_047, var_lr=1e-4, adaln_gamma_init=1e-3, var_last_lr=0.1,            # 250
             micro_batch_size=32),
    24: dict(var_steps=583_866, var_lr=8e-5, adaln_gamma_init=1e-4, micro_batch_size=16),       # 350
    30: dict(var_steps=437_899, var_lr=8e-5, adaln_gamma_init=1e-5, micro_batch_size=8,         # 350
             batch_size=1024, last_weight_decay=0.08),
    36: dict(var_steps=583_866, var_lr=8e-5, adaln_gamma_init=5e-6, micro_batch_size=2,         # 350
             shared_adaln=True, last_weight_decay=0.08)}


# ----------------------------------------------------------------------------------- stage 1, the tokenizer
REVIVAL_IMAGES = 256                    # images per batch whose features can replace dead codes


def train_tokenizer(trainer: 'Trainer', tokenizer: VQVAE):
    """Minimises `tokenizer_loss`. vqvae.pt holds the weights of the last validation. A code not used since
    the last check (every --revive-every-steps) is dead and gets replaced."""
    args, data, device = trainer.args, trainer.data, trainer.device
    classifier = perceptual = None
    if args.perceptual_weight and args.perceptual == 'lpips':
        perceptual = load_lpips(device)
    elif args.perceptual_weight:
        classifier = Classifier(len(data.class_names), tokenizer.config.image_size, args.classifier_channels)
        trainer.modules['classifier'] = classifier.to(device)
        perceptual = classifier.perceptual_distance
    if args.adversarial_weight:
        trainer.add('discriminator', Discriminator(args.discriminator_channels).to(device), (0.5, 0.9), 0.0)
    trainer.used_V = torch.zeros(tokenizer.config.vocab_size)
    torch.nn.init.zeros_(tokenizer.codebook.weight)     # all codes are dead until step 0 sets them from data
    trainer.begin()
    used_V = trainer.used_V = trainer.used_V.to(device)
    if classifier and trainer.step == 0:
        train_classifier(trainer, classifier)
    if classifier:
        classifier.eval().requires_grad_(False)
    for step in trainer.steps():
        images, _ = data.batch(step, trainer.batch_size)
        if step % args.revive_every_steps == 0 and trainer.progress <= 0.75:    # later, the codebook settles
            revive_dead_codes(trainer, tokenizer, used_V == 0, images)
            used_V.zero_()
        discriminator = trainer.networks.get('discriminator') if step >= args.discriminator_start else None
        seen_V = torch.zeros_like(used_V)
        for images, in trainer.micro_batches(images):
            with autocast(device, args.dtype):
                loss, metrics, tokens_BL = tokenizer_loss(trainer.networks['vqvae'], images, args, perceptual,
                                                          discriminator)
            trainer.backward(loss, metrics)
            seen_V[tokens_BL] = 1.0
        used_V += all_sum(seen_V)
        trainer.end_step()
        if trainer.is_time_to_save:
            trainer.log('val', validate_tokenizer(trainer, tokenizer))
            if rank() == 0:
                save_checkpoint(trainer.out / 'vqvae.pt', 'vqvae', vqvae_config=asdict(tokenizer.config),
                                vqvae={name: w.cpu() for name, w in tokenizer.state_dict().items()})
                trainer.try_to_write(save_reconstructions, trainer, tokenizer)


def tokenizer_loss(network, images: Tensor, args, perceptual, discriminator) -> tuple[Tensor, dict, Tensor]:
    """The loss of Eq. 5 of the VAR paper plus the discriminator's, its terms for the log, and the tokens. The
    perceptual and adversarial terms are optional."""
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
    One backward pass serves both: the former goes through a frozen discriminator, the latter sees a detached
    reconstruction. The adaptive weight gives the gradients of the former and of `loss` the same norm at the
    decoder's last layer, where both gradients enter the decoder."""
    frozen = unwrapped(discriminator).requires_grad_(False)
    generator = -frozen(reconstruction).float().mean()
    by_loss, by_generator = (torch.autograd.grad(term, last_layer, retain_graph=True)[0].norm()
                             for term in (loss, generator))
    frozen.requires_grad_(True)
    real, made = discriminator(torch.cat([images, reconstruction.detach()])).float().chunk(2)
    return dict(generator=generator, adaptive=(by_loss / (by_generator + 1e-4)).clamp(max=1e4),
                discriminator=(F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2)


def train_classifier(trainer: 'Trainer', classifier: Classifier):
    """Trains the classifier of the perceptual term before the first step, on batches of about 128 images or
    more (for BatchNorm), shifted by up to 1/8 of their size. The time counts towards --budget-minutes."""
    args, data, device, network = trainer.args, trainer.data, trainer.device, parallel(classifier)
    B = trainer.batch_size * max(1, min(128, data.count) // trainer.batch_size)
    optimizer = torch.optim.AdamW(parameter_groups(classifier, args.weight_decay), betas=(0.9, 0.95))
    for step in tqdm(range(args.classifier_steps), desc='classifier', disable=rank() > 0):
        for group in optimizer.param_groups:
            group['lr'] = trainer.peak_lr * learning_rate(step / args.classifier_steps, 0.0)
        images, labels = data.batch(step, B)
        images = augment(images, noise_of(B, 3, device, args.seed, step, 3), False, images.shape[-1] // 8)
        for images, labels in trainer.micro_batches(images, labels):
            with autocast(device, args.dtype):
                loss = F.cross_entropy(network(images), labels)
            (trainer.part_of_batch * loss).backward()
        torch.nn.utils.clip_grad_norm_(classifier.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad()
        trainer.sync_clock_and_signals()
        if trainer.is_asked_to_stop:
            trainer.stop()                                  # --resume restarts the classifier
    trainer.budget, trainer.seconds = trainer.budget and max(1.0, trainer.budget - trainer.seconds), 0.0
    for tensor in classifier.state_dict().values() if dist.is_initialized() else ():
        dist.broadcast(tensor, 0)                           # BatchNorm statistics differ between processes
    with torch.no_grad(), autocast(device, args.dtype):
        right = torch.zeros(1, device=device)
        for images, labels in data.val_batches(trainer.val_batch_size):
            right += (classifier.eval()(images).argmax(1) == labels).sum()
    say(f'classifier: {all_sum(right).item() / data.val_count:.1%} accuracy on held-out images')


def load_lpips(device: torch.device) -> torch.nn.Module:
    """Perceptual distance of Zhang et al. (2018), frozen: two batches in [-1, 1] -> one number per pair."""
    try:
        import lpips
        return lpips.LPIPS(net='vgg', verbose=False).to(device).eval().requires_grad_(False)
    except Exception as error:                              # not installed, or its weights are unavailable
        raise UserError(f'--perceptual lpips: pip install lpips, or omit it ({one_line(error)})') from None


@torch.no_grad()
def revive_dead_codes(trainer: 'Trainer', tokenizer: VQVAE, dead_V: Tensor, images: Tensor):
    """Replaces dead codes with vectors that the quantizer sees in this batch, the same in all processes."""
    with autocast(trainer.device, trainer.args.dtype):
        f = torch.cat([tokenizer.features(part) for part in images.split(trainer.val_batch_size)])
    whole = f.new_zeros(world_size() * len(f), *f.shape[1:])
    share_of(whole).copy_(f)
    torch.manual_seed(seed_of(trainer.args.seed, trainer.step, 1))
    tokenizer.revive_codes(dead_V, all_sum(whole)[:REVIVAL_IMAGES])
    if dist.is_initialized():                               # different GPUs can round differently
        dist.broadcast(tokenizer.codebook.weight.data, 0)


@torch.no_grad()
def validate_tokenizer(trainer: 'Trainer', tokenizer: VQVAE) -> dict[str, float]:
    """PSNR (dB) of held-out images; codes in use (%) and their perplexity (the number of equally frequent
    codes with the same entropy), overall and per scale."""
    V, lengths, data = tokenizer.config.vocab_size, trainer.lengths, trainer.data
    error, hits_KV = torch.zeros(1, device=data.device), torch.zeros(len(lengths), V, device=data.device)
    for images, _ in data.val_batches(trainer.val_batch_size):
        with autocast(data.device, trainer.args.dtype):
            tokens_BL = tokenizer.encode(images)
            error += (tokenizer.decode(tokens_BL) - images).square().mean((1, 2, 3)).sum()
        hits_KV += torch.stack([maps.flatten().bincount(minlength=V) for maps in tokens_BL.split(lengths, 1)])
    metrics = dict(psnr=-10 * (all_sum(error) / data.val_count / 4).log10())
    for name, hits_V in zip(['', *trainer.scales], [all_sum(hits_KV).sum(0), *hits_KV]):
        metrics['use' + name] = 100 * (hits_V > 0).float().mean()
        metrics['perplexity' + name] = torch.special.entr(hits_V / hits_V.sum()).sum().exp()
    return trainer.to_floats(metrics)


def save_reconstructions(trainer: 'Trainer', tokenizer: VQVAE):
    """reconstructions.png: rows of held-out images, each above a row of their reconstructions."""
    images, _ = next(trainer.data.val_batches(2 * max(4, 256 // tokenizer.config.image_size)))
    columns = max(1, len(images) // 2)
    with autocast(trainer.device, trainer.args.dtype):
        made = tokenizer.decode(tokenizer.encode(images))
    rows = [row for pair in zip(images.split(columns)[:2], made.split(columns)) for row in pair]
    sample.save_image(trainer.out / 'reconstructions.png', sample.grid(torch.cat(rows), columns))


# --------------------------------------------------------------------------------- stage 2, the transformer
def train_transformer(trainer: 'Trainer', var: VAR, tokenizer: VQVAE):
    """Minimises `transformer_loss`; var.pt holds the weights with the lowest held-out loss so far."""
    args, data, best = trainer.args, trainer.data, trainer.out / 'var.pt'
    defaults = {name: getattr(args, name) for name in SAMPLING}
    trainer.begin()
    if (args.cache_tokens and isinstance(data, ArrayData) and not (args.crop or trainer.is_over) and
            tokenizer.config.vocab_size <= 2 ** 15):
        data.encode(tokenizer)
    for step in trainer.steps():
        batch, labels = data.batch(step, trainer.batch_size)                    # images, or their tokens
        noise_BN = noise_of(trainer.batch_size, 1 + 2 * args.depth, trainer.device, args.seed, step, 2)
        for batch, labels, noise_BN in trainer.micro_batches(batch, labels, noise_BN):
            with autocast(trainer.device, args.dtype):
                loss_BL, right_BL = transformer_loss(trainer.networks['var'], tokenizer, batch, labels,
                                                     noise_BN)
            trainer.backward(loss_BL.mean(), dict(loss=loss_BL.mean(0), accuracy=right_BL.float().mean(0)))
        trainer.end_step()
        if trainer.is_time_to_save:
            row = validate_transformer(trainer, var, tokenizer)
            trainer.log('val', row)
            is_best = row['loss'] < trainer.lowest_loss or not best.exists()
            trainer.lowest_loss = min(trainer.lowest_loss, row['loss'])
            for path, is_due in ((trainer.out / f'var-{trainer.step}.pt', args.keep_models), (best, is_best)):
                if rank() == 0 and is_due:
                    sample.save_model(path, tokenizer, var, data.class_names, defaults)
            if rank() == 0 and is_best:
                trainer.try_to_write(save_samples, trainer, tokenizer, var, defaults)


def transformer_loss(network, tokenizer: VQVAE, batch: Tensor, labels: Tensor,
                     noise_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token given all coarser scales, (B, L), and whether it was the argmax. batch:
    images, or their tokens."""
    # the released code encodes images outside of autocast
    tokens_BL = tokenizer.encode(batch) if batch.is_floating_point() else batch
    logits_BLV = network(labels, tokenizer.teacher_inputs(tokens_BL), noise_BN)
    loss = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten(), reduction='none')
    return loss.view_as(tokens_BL), logits_BLV.argmax(-1) == tokens_BL


@torch.no_grad()
def validate_transformer(trainer: 'Trainer', var: VAR, tokenizer: VQVAE) -> dict[str, float]:
    """Loss and accuracy on held-out images, without label dropout, overall and per scale."""
    N, sums_2L = trainer.data.val_count, torch.zeros(2, sum(trainer.lengths), device=trainer.device)
    for batch, labels in trainer.data.val_batches(trainer.val_batch_size):
        with autocast(trainer.device, trainer.args.dtype):
            loss_BL, right_BL = transformer_loss(var, tokenizer, batch, labels)
        sums_2L += torch.stack([loss_BL.sum(0), right_BL.sum(0)])
    loss_L, accuracy_L = all_sum(sums_2L) / N
    ln_V = torch.tensor(var.config.vocab_size).log()
    return trainer.to_floats(dict(loss=loss_L, accuracy=accuracy_L, ln_V=ln_V))


def save_samples(trainer: 'Trainer', tokenizer: VQVAE, var: VAR, defaults: dict):
    """samples.png: one column per class, at most ten classes, with the default sampling settings."""
    columns, rows = min(10, var.config.num_classes), 8 if tokenizer.config.image_size <= 64 else 2
    labels = [i * var.config.num_classes // columns for i in range(columns)] * rows
    size, dtype = min(16, trainer.val_batch_size), trainer.args.dtype
    batches = sample.draw(tokenizer, var, labels, 0, size, dtype, **defaults)
    images = torch.cat([images for images, _ in batches])
    sample.save_image(trainer.out / 'samples.png', sample.grid(images, columns))


# -------------------------------------------------------------------------------------------------- trainer
class Trainer:
    """What both training loops share: networks, optimizers, schedule, micro-batches, log, checkpoints, stops.

    networks: the modules, wrapped for training by `parallel`. sums, counts: of each metric since the last log
    line; sums stay on the device, so that no step waits for the GPU. used_V: codes used since the last check
    (stage 1). lowest_loss: the lowest held-out loss so far (stage 2).
    """
    SAVED = 'step seconds budget sums counts lines used_V lowest_loss'.split()      # stored in last.pt as is

    def __init__(self, name: str, model: VQVAE | VAR, args: argparse.Namespace, data: 'Data', saved: dict,
                 replaced: list[Path], signals: list[int], began: float):
        self.name, self.args, self.data, self.saved, self.replaced = name, args, data, saved, replaced
        self.signals, self.began, self.out, self.device = signals, began, Path(args.out), data.device
        is_first = name == 'vqvae'
        self.batch_size = is_first and args.vqvae_batch_size or args.batch_size
        self.total_steps = args.vqvae_steps if is_first else args.var_steps
        self.peak_lr = (args.vqvae_lr if is_first else args.var_lr) * self.batch_size / 256
        self.last_lr = args.vqvae_last_lr if is_first else args.var_last_lr
        limits = [args.micro_batch_size, is_first and args.vqvae_micro_batch_size]
        self.micro_batch_size = min(filter(None, limits), default=None)         # None: the whole share
        self.val_batch_size = self.micro_batch_size or self.batch_size // world_size()
        share = 1 if args.stage != 'both' else args.budget_vqvae if is_first else 1 - args.budget_vqvae
        self.budget = 60 * share * (args.budget_minutes or 0)                   # seconds
        self.lengths = [side * side for side in model.config.scales]
        self.scales = [f'_{side}x{side}' for side in model.config.scales]
        self.step, self.seconds, self.started = 0, 0.0, None                    # totals over all sessions
        self.modules, self.networks, self.optimizers = {}, {}, {}
        self.sums, self.counts, self.lines, self.complaint = {}, {}, [], None
        self.used_V, self.lowest_loss = None, math.inf
        self.add(name, model, (0.9, 0.95), args.weight_decay)

    def add(self, name: str, module: torch.nn.Module, betas: tuple[float, float], weight_decay: float):
        """Adds a network, trained by AdamW; with --var-optimizer muon, the matrices of its blocks by Muon."""
        matrices = []
        if name == 'var' and self.args.var_optimizer == 'muon':
            matrices = [w for block in module.blocks for w in block.parameters() if w.ndim == 2]
            self.optimizers['muon'] = Muon(matrices, weight_decay)
        groups = parameter_groups(module, weight_decay, matrices)
        self.optimizers[name] = torch.optim.AdamW(groups, betas=betas, fused=True)
        self.modules[name], self.networks[name] = module, parallel(module)

    @property
    def progress(self) -> float:
        """Completed fraction of the schedule: of --budget-minutes, or of the steps (1 in the last step)."""
        done = self.seconds / self.budget if self.budget else self.step / max(1, self.total_steps - 1)
        return min(1.0, done)

    @property
    def is_over(self) -> bool:
        return self.seconds >= self.budget if self.budget else self.step >= self.total_steps

    def begin(self):
        """Resumes from this stage's checkpoint, or writes the first; from then on, the run can be killed."""
        if self.saved.get('stage') == self.name:
            for name, module in self.modules.items():
                module.load_state_dict(self.saved['weights'][name])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(self.saved['optimizers'][name])
            for name in self.SAVED:
                setattr(self, name, self.saved[name])
            self.sums = {name: total.to(self.device) for name, total in self.sums.items()}
            self.saved.clear()                              # as large as models and optimizers together
        else:
            self.save()
            while self.replaced:                            # files of the run that --overwrite replaces
                self.replaced.pop().unlink(missing_ok=True)
        size = sum(parameter.numel() for parameter in self.modules[self.name].parameters()) / 1e6
        count, images = self.data.count, self.total_steps * self.batch_size
        aim = (f'{self.budget / 60:.3g} minutes' if self.budget else f'{self.total_steps:,} steps of '
               f'{self.batch_size} images: {images:,} images, {images / count:.3g} epochs')
        say(f'{self.name}: {size:.2f}M parameters, {aim}, from step {self.step}')

    def steps(self):
        """Yields each step; sets the schedule before it, and saves or stops after it if due."""
        self.started, self.images, self.busy = None, 0, 0.0             # of this session
        with tqdm(desc=self.name, initial=self.step, total=self.total_steps, disable=rank() > 0) as self.bar:
            while not self.is_over:
                self.set_schedule()
                self.step_began = time.monotonic()
                yield self.step
                if self.is_time_to_save or self.is_asked_to_stop:
                    self.save()
                if self.is_asked_to_stop:
                    self.stop()

    def stop(self):
        say(f'stopped at step {self.step} of {self.total_steps} ({self.name}) and saved; to continue, repeat '
            'the command with --resume')
        wait_for_all()                      # else torchrun could kill rank 0 before it has saved
        raise SystemExit(128 + self.signal if self.signal else 0)

    def set_schedule(self):
        """Sets the learning rate and, for the largest released models, a half-cosine weight decay."""
        self.lr = self.peak_lr * learning_rate(self.progress, self.last_lr)
        first, last = self.args.weight_decay, self.args.last_weight_decay
        for group in [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]:
            group['lr'] = self.lr
            if self.name == 'var' and last is not None and group['weight_decay']:
                group['weight_decay'] = last + (first - last) * (1 + math.cos(math.pi * self.progress)) / 2

    def micro_batches(self, *batch: Tensor):
        """Splits this process's share of a batch; gradients are synchronised in the last micro-batch."""
        size = self.micro_batch_size or len(batch[0])
        parts = list(zip(*(tensor.split(size) for tensor in batch)))
        for i, part in enumerate(parts):
            for network in self.networks.values():
                network.require_backward_grad_sync = i + 1 == len(parts)
            self.part_of_batch = len(part[0]) / len(batch[0])
            yield part

    def backward(self, loss: Tensor, metrics: dict[str, Tensor]):
        """Adds a micro-batch's gradients and metrics to those of its batch."""
        (self.part_of_batch * loss).backward()
        self.add_metrics(metrics, self.part_of_batch)

    def add_metrics(self, metrics: dict[str, Tensor], weight: float):
        dtype = torch.float32 if self.device.type == 'mps' else torch.float64
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + weight * value.detach().to(dtype)
            self.counts[name] = self.counts.get(name, 0.0) + weight

    def update_weights(self):
        for name, optimizer in self.optimizers.items():
            learning = [w for group in optimizer.param_groups for w in group['params'] if w.grad is not None]
            if learning:                            # a discriminator has no gradients before its start
                norm = torch.nn.utils.clip_grad_norm_(learning, 2.0)
                self.add_metrics({f'{name}_gradient': norm}, 1.0)
                with autocast(self.device, self.args.dtype):
                    optimizer.step()
                optimizer.zero_grad()

    def end_step(self):
        """Updates the weights; decides whether to log, save or stop; writes the log line."""
        self.update_weights()
        self.step, self.images = self.step + 1, self.images + self.batch_size
        self.sync_clock_and_signals()
        self.is_time_to_save = self.is_over or self.step % self.args.save_every_steps == 0
        is_time_to_log = self.is_over or self.step % self.args.log_every_steps == 0
        if is_time_to_log or self.is_time_to_save or self.is_asked_to_stop:
            row = self.to_floats({name: all_sum(total).div_(world_size()) / self.counts[name]
                                  for name, total in self.sums.items()})    # in place: mean over processes
        self.busy += time.monotonic() - self.step_began
        if is_time_to_log:
            speed = self.images / self.busy
            rates = dict(lr=self.lr, images_per_s=speed, tokens_per_s=speed * sum(self.lengths))
            self.log('train', rates | row)
            self.bar.set_postfix_str(f'{list(row)[0]} {list(row.values())[0]:.3f}, {speed:.0f} images/s')
            self.sums, self.counts, self.images, self.busy = {}, {}, 0, 0.0
        if self.budget and self.seconds:
            self.bar.total = self.total_steps = round(self.step / self.progress)
        self.bar.update()

    def sync_clock_and_signals(self):
        """Synchronises the time trained (without a session's first step, which starts workers and kernels), a
        signal that any process received, and whether to stop because of it or of the clock."""
        now = time.monotonic()
        self.started = now - self.seconds if self.started is None else self.started
        is_late = now - self.began >= 60 * (self.args.stop_after_minutes or math.inf)
        found = torch.tensor([now - self.started, max(self.signals, default=0), is_late], dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        self.seconds, self.signal = found[0].item(), int(found[1])
        self.is_asked_to_stop = bool(found[1:].any())

    def to_floats(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """The mean of each metric and, for those with one value per token, also per scale. Raises an error
        if one is not finite, so that nothing is saved after that."""
        row = {name: values.mean().item() for name, values in metrics.items()}
        for name, values_L in metrics.items():
            parts = values_L.split(self.lengths) if values_L.numel() > 1 else ()
            row |= {name + scale: part.mean().item() for scale, part in zip(self.scales, parts)}
        for name, value in row.items():
            check(math.isfinite(value), f'{self.name}: {name} is {value} at step {self.step} or just before; '
                  f'last.pt is intact; --resume with a lower --{self.name}-lr, or with --dtype float32')
        return row

    def log(self, split: str, row: dict[str, float]):
        """Adds a line and rewrites the CSV from all lines, atomically."""
        self.lines.append(dict(step=self.step, split=split) | {name: f'{row[name]:.7g}' for name in row})
        if rank() == 0:
            self.try_to_write(save_csv, self.out / f'{self.name}.csv', self.lines)
        if split == 'val':
            found = ', '.join(f'{name} {value:.3g}' for name, value in row.items())
            say(f'{self.name} step {self.step}, held-out: {found}')

    def try_to_write(self, write, *what):
        """Writes a log or an image. If that fails, training continues, and the error is printed once."""
        try:
            write(*what)
        except UserError as error:
            if str(error) != self.complaint:
                say(f'note: {error}; training continues and will try again next time')
            self.complaint = str(error)

    def save(self):
        """Writes last.pt, which has everything needed to resume."""
        if rank() == 0:
            settings = {name: value for name, value in vars(self.args).items() if name not in NOT_SAVED}
            weights = {name: module.state_dict() for name, module in self.modules.items()}
            optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
            save_checkpoint(self.out / 'last.pt', 'resume', settings=settings, data=self.data.fingerprint,
                            stage=self.name, unfinished=not self.is_over, weights=weights,
                            optimizers=optimizers, **{name: getattr(self, name) for name in self.SAVED})


def learning_rate(done: float, last: float) -> float:
    """Released schedule (1 = peak): warm-up from 0.005 for 1/50, flat for 5% of the rest, decay to `last`."""
    if done < 1 / 50:
        return 0.005 + 0.995 * done * 50
    return 1 - (1 - last) * max(0.0, (done - 1 / 50) / (1 - 1 / 50) - 0.05) / 0.95


class Muon(torch.optim.Optimizer):
    """Muon (K. Jordan et al., 2024) for weight matrices: orthogonalised momentum, scaled to the size of
    AdamW's updates (Liu et al., 2025). torch.optim.Muon always multiplies in bfloat16, which many CPUs do far
    more slowly than float32; this one multiplies in the dtype of autocast."""

    def __init__(self, matrices: list[Tensor], weight_decay: float):
        super().__init__(matrices, dict(lr=0.0, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group['params']:
                state = self.state[weight]
                momentum = 0.95 * state.get('momentum_buffer', 0) + 0.05 * weight.grad
                state['momentum_buffer'] = momentum
                update = orthogonalise(weight.grad.lerp(momentum, 0.95))        # Nesterov's momentum
                weight.mul_(1 - group['lr'] * group['weight_decay'])
                weight.add_(update, alpha=-0.2 * math.sqrt(max(weight.shape)) * group['lr'])


def orthogonalise(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz steps, which bring singular values to between 0.68 and 1.21 (below 0.002 of the norm
    they stay smaller)."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalise(matrix.T).T
    x = matrix / matrix.norm().clamp_min(1e-7)              # no singular value above 1
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x            # Jordan's coefficients
    return x


def parameter_groups(model: torch.nn.Module, weight_decay: float, exclude=()) -> list[dict]:
    """All parameters except `exclude`. No weight decay on 1-D tensors and the names below."""
    groups, excluded = ([], []), {id(weight) for weight in exclude}
    for name, parameter in model.named_parameters():
        no_decay = re.search('position|scale_embedding|adaln_table|log_scale', name) or parameter.ndim <= 1
        if id(parameter) not in excluded:
            groups[bool(no_decay)].append(parameter)
    return [dict(params=groups[0], weight_decay=weight_decay), dict(params=groups[1], weight_decay=0.0)]


def parallel(module: torch.nn.Module) -> torch.nn.Module:
    """Wraps a module for training: gradients are averaged over all processes."""
    return DistributedDataParallel(module, gradient_as_bucket_view=True) if dist.is_initialized() else module


def unwrapped(network: torch.nn.Module) -> torch.nn.Module:
    return getattr(network, 'module', network)


def share_of(batch: Tensor) -> Tensor:
    """This process's share of a batch."""
    return batch.chunk(world_size())[rank()]


def all_sum(tensor: Tensor) -> Tensor:
    """Sums over all processes, in place; the result is bit-identical in each."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def say(text: str):
    """Prints a line, once for all processes, above the progress bar."""
    if rank() == 0:
        tqdm.write(text)


def seed_of(*numbers: int) -> int:
    """One seed from several numbers of any size; different numbers give different seeds."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0] >> 1)


def noise_of(batch_size: int, columns: int, device: torch.device, *seeds: int) -> Tensor:
    """This process's share of (batch_size, columns) uniform numbers in [0, 1), determined by the seeds."""
    generator = torch.Generator().manual_seed(seed_of(*seeds))
    return to_device(share_of(torch.rand(batch_size, columns, generator=generator)), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a CPU tensor to the device; on CUDA, the copy is asynchronous."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else tensor.to(device)


# ----------------------------------------------------------------------------------------------------- data
def outlines() -> dict[str, list]:
    """Each shape as polygons in [-1, 1], y down: the first is filled, a second one is a hole in it."""
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
    """Draws the ten shapes in turn: uint8 (count, 3, size, size) and int64 labels (count,).

    Each image has one bright shape on a dark background, antialiased, with random colours, size, position and
    rotation (up to 15 degrees). The same count, seed and size give the same images.
    """
    def colour(saturation: tuple, value: tuple) -> np.ndarray:          # random hue, RGB in [0, 255]
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
CIFAR10_SHA256 = 'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'
CIFAR10_FILES = [*(f'data_batch_{i}.bin' for i in range(1, 6)), 'test_batch.bin']     # 10,000 images each
CIFAR10_CLASSES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()


def download_cifar10(folder: Path, url: str = CIFAR10_URL, sha256: str = CIFAR10_SHA256):
    """Downloads and unpacks the binary files to folder/cifar-10-batches-bin, all of them or none."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            socket.setdefaulttimeout(60)                    # seconds without data
            torch.hub.download_url_to_file(url, f'{scratch}/archive.tar.gz', sha256)
            shutil.unpack_archive(f'{scratch}/archive.tar.gz', scratch)
            Path(scratch, 'cifar-10-batches-bin').replace(folder / 'cifar-10-batches-bin')
        except Exception as error:                          # a download can fail in many ways
            raise UserError(f'{url}: {one_line(error)}; try again, or download CIFAR-10 (binary version) '
                            'yourself and pass its folder as --data-dir') from None


def read_cifar10(data_dir: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (50000, 3, 32, 32) uint8 and labels, test images (10000, ...) and labels."""
    folder, records = Path(data_dir or 'data'), []
    if data_dir is None and rank() == 0 and not (folder / 'cifar-10-batches-bin').is_dir():
        download_cifar10(folder)
    wait_for_all()
    if (folder / 'cifar-10-batches-bin').is_dir():
        folder = folder / 'cifar-10-batches-bin'
    for path in [folder / name for name in CIFAR10_FILES]:
        size = path.stat().st_size if path.is_file() else 0
        check(size == 30_730_000, f'{path}: {size} of 30730000 bytes; needs binary CIFAR-10 or train/<class>')
        records.append(torch.from_numpy(np.fromfile(path, np.uint8)).view(10_000, 1 + 3 * 32 * 32))
    labels, images = torch.cat(records).split([1, 3 * 32 * 32], dim=1)
    images, labels = images.reshape(-1, 3, 32, 32).contiguous(), labels.flatten().long()
    return images[:50_000], labels[:50_000], images[50_000:], labels[50_000:]


class Data:
    """Images and labels: `count` for training, followed by `val_count` held-out ones. fingerprint: a number
    that identifies the data set, the same on all machines."""

    def __init__(self, args: argparse.Namespace, count: int, val_count: int, device: torch.device):
        self.args, self.count, self.val_count, self.device, self.epoch = args, count, val_count, device, -1

    def indices_and_noise(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """This process's share of a batch, determined by (seed, step): image indices (b,), and noise_b3 for
        `augment`."""
        epoch, place = divmod(step, self.count // batch_size)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(seed_of(self.args.seed, epoch))
            self.order_N = torch.randperm(self.count, generator=generator)
            self.epoch, self.noise_N3 = epoch, torch.rand(self.count, 3, generator=generator)
        of_batch = slice(place * batch_size, (place + 1) * batch_size)
        return share_of(self.order_N[of_batch]), share_of(self.noise_N3[of_batch])

    def batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """This process's images (b, 3, S, S) in [-1, 1] and labels (b,) of training step `step`."""
        return self.load(*self.indices_and_noise(step, batch_size))

    def val_batches(self, size: int):
        """This process's held-out images and labels, in batches of at most `size`."""
        mine = torch.arange(self.count, self.count + self.val_count)[rank()::world_size()]
        return (self.load(indices) for indices in mine.split(size) if len(indices))


class ArrayData(Data):
    """Drawn shapes or CIFAR-10, entirely on the training device: uint8 or, once encoded, tokens."""

    def __init__(self, args: argparse.Namespace, image_size: int, device: torch.device):
        if args.preset == 'shapes':
            arrays = (*draw_shapes(args.train_count or 12_000, args.seed, image_size),
                      *draw_shapes(args.val_count, args.seed + 2 ** 31, image_size))
            self.class_names = list(FIGURES)
        else:
            check(image_size == 32, f'--image-size {image_size}: CIFAR-10 images are 32x32')
            arrays, self.class_names = read_cifar10(args.data_dir), CIFAR10_CLASSES
        train, val = slice(args.train_count), slice(args.val_count)
        images, val_images = arrays[0][train], arrays[2][val]
        self.images = torch.cat([images, val_images]).to(device)
        self.labels = torch.cat([arrays[1][train], arrays[3][val]]).to(device)
        self.fingerprint, self.tokens = zlib.crc32(images.numpy()), None
        super().__init__(args, len(images), len(val_images), device)

    def load(self, indices: Tensor, noise_b3: Tensor | None = None) -> tuple[Tensor, Tensor]:
        noise_b3 = torch.full((len(indices), 3), 0.5) if noise_b3 is None else noise_b3     # no shift or flip
        indices, noise_b3 = to_device(indices, self.device), to_device(noise_b3, self.device)
        if self.tokens:
            is_mirrored = noise_b3[:, 2:] < 0.5                         # as in `augment`
            batch = torch.where(is_mirrored, self.tokens[-1][indices], self.tokens[0][indices]).long()
        else:
            batch = augment(to_float(self.images[indices]), noise_b3, self.args.flip, self.args.crop)
        return batch, self.labels[indices]

    @torch.no_grad()
    def encode(self, tokenizer: VQVAE):
        """Encodes each image and, with --flip, its mirror image; from then on, batches are tokens (b, L).
        Tokens are stored as int16. Requires --crop 0. The processes share the work."""
        self.tokens = []
        for images in [self.images, self.images.flip(-1)][:1 + self.args.flip]:
            tokens_NL = torch.zeros(len(images), sum(tokenizer.scale_lengths), device=self.device)
            batches = list(zip(images.split(64), tokens_NL.split(64)))[rank()::world_size()]
            for images_B3HW, tokens_BL in tqdm(batches, desc='tokens', disable=rank() > 0):
                with autocast(self.device, self.args.dtype):
                    tokens_BL.copy_(tokenizer.encode(to_float(images_B3HW)))
            self.tokens.append(all_sum(tokens_NL).to(torch.int16))


def augment(images_B3HW: Tensor, noise_B3: Tensor, flip: bool, crop: int) -> Tensor:
    """Mirrors half of the images and shifts each by up to `crop` pixels, repeating its edge pixels. noise_B3,
    uniform in [0, 1), determines the vertical shift, the horizontal shift and the mirroring."""
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


def find_images(folder: Path) -> list[tuple[str, str]]:
    """(class/.../name, path) of the images in folder/<class>/, at any depth, sorted by name. Names are the
    same on all machines. No folder is read twice; folders that hold a run are skipped."""
    found, left_out, seen = [], Counter(), set()
    endings = tuple(Image.registered_extensions().keys() & IMAGE_ENDINGS)   # Pillow builds vary in support
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen or seen and {'last.pt', 'vqvae.pt', 'var.pt'} & {*files}:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] != '.')
        for path in [os.path.join(place, name) for name in files if name[0] != '.']:
            name = path[len(os.path.join(folder, '')):].replace(os.sep, '/')
            if '/' in name and name.lower().endswith(endings):
                found.append((unicodedata.normalize('NFC', name), path))    # macOS decomposes é (NFD)
            else:
                kind = Path(name).suffix.lower() or 'other'
                left_out[kind if '/' in name else 'outside class folders'] += 1
    if left_out:
        say(f'skipped in {folder}: ' + ', '.join(f'{n} {what}' for what, n in left_out.most_common(9)))
    return sorted(found)


class FolderData(Data):
    """Images in train/<class>/ and val/<class>/, or in <class>/ only. Threads prefetch batches (Pillow
    releases the GIL)."""

    def __init__(self, args: argparse.Namespace, image_size: int, device: torch.device):
        folder, random = Path(args.data_dir), np.random.default_rng(args.seed)
        place = folder / 'train' if (folder / 'train').is_dir() else folder
        train, val = find_images(place), find_images(folder / 'val') if place != folder else []
        check(train, f'--data-dir {folder}: no images in {place}/<class>/; expected train/<class>/*.jpg '
              'and optionally val/<class>/*.jpg, or <class>/*.jpg')
        train, val = ([images[i] for i in random.permutation(len(images))] for images in (train, val))
        if not val:
            kept = {*{name.split('/')[0]: (name, path) for name, path in train}.values()}   # one per class
            count = max(1, min(args.val_count, len(train) // 10))
            val = [image for image in train if image not in kept][:count]
            check(val, f'--data-dir {folder}: no val/<class>/, and no class has a second image to hold out')
            say(f'no val/<class>/: {len(val)} of {len(train)} images are held out, chosen by --seed')
            held_out = {*val}
            train = [image for image in train if image not in held_out]
        self.class_names = sorted({name.split('/')[0] for name, _ in train + val})
        train, val = sorted(train[:args.train_count]), sorted(val[:args.val_count])
        self.fingerprint = zlib.crc32('\n'.join(name for name, _ in train + val).encode(errors='ignore'))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        threads = min(12, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)) - 1)
        self.pool = ThreadPoolExecutor(max(1, threads if args.workers is None else args.workers))
        self.images, self.size, self.ahead, self.broken = train + val, image_size, {}, set()
        super().__init__(args, len(train), len(val), device)

    def read(self, number: int, noise: list[float] | None = None) -> tuple[np.ndarray, int]:
        """An image, uint8 (S, S, 3), and its label. As released, its shorter side becomes 1.125 S;
        noise selects the crop (None: the centre). A broken image is replaced by the next one."""
        S, shorter = self.size, round(1.125 * self.size)
        first, last = (0, self.count) if number < self.count else (self.count, len(self.images))
        for name, path in (self.images[i] for i in chain(range(number, last), range(first, number))):
            try:
                image = sample.cut_square(sample.open_image(path, shorter), S, shorter, noise)
                is_mirrored = noise and self.args.flip and noise[2] < 0.5
                return image[:, ::-1] if is_mirrored else image, self.class_names.index(name.split('/')[0])
            except UserError as error:
                if path not in self.broken:
                    self.broken.add(path)
                    tqdm.write(f'skipped broken image ({len(self.broken)} so far): {error}')
        raise UserError(f'--data-dir {self.args.data_dir}: all {last - first} images of the split are broken')

    def stack(self, read) -> tuple[Tensor, Tensor]:
        images, labels = zip(*read)
        images = to_device(torch.from_numpy(np.stack(images)), self.device)
        return to_float(images.permute(0, 3, 1, 2).contiguous()), to_device(torch.tensor(labels), self.device)

    def load(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.stack(self.pool.map(self.read, indices.tolist()))

    def batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        if (step, batch_size) not in self.ahead:
            self.ahead = {}
        for later in range(step, step + 4):
            if (later, batch_size) not in self.ahead:
                indices, noise_b3 = self.indices_and_noise(later, batch_size)
                self.ahead[later, batch_size] = self.pool.map(self.read, indices.tolist(), noise_b3.tolist())
        return self.stack(self.ahead.pop((step, batch_size)))


def load_data(args: argparse.Namespace, image_size: int, device: torch.device) -> Data:
    """The data selected by --preset and --data-dir, the same in all processes."""
    in_folders = args.data_dir and (args.preset[:5] != 'cifar' or Path(args.data_dir, 'train').is_dir())
    check(in_folders or args.preset[:8] != 'imagenet', f'--preset {args.preset}: needs --data-dir')
    return (FolderData if in_folders else ArrayData)(args, image_size, device)


# -------------------------------------------------------------------------------------- the folder of a run
NOT_SAVED = {'out', 'resume', 'overwrite', 'stop_after_minutes', 'given'}       # settings not in last.pt
MAY_CHANGE = {'data_dir', 'device', 'dtype', 'workers', 'compile', 'cache_tokens', 'micro_batch_size',
              'log_every_steps', 'save_every_steps', 'vqvae_lr', 'var_lr'}      # with --resume


def save_csv(path: Path, rows: list[dict]):
    """Writes a CSV with a column for each name in any row."""
    names = dict.fromkeys(name for row in rows for name in row)
    lines = [names, *([str(row.get(name, '')) for name in names] for row in rows)]
    save_file(path, lambda file: file.write(''.join(','.join(line) + '\n' for line in lines).encode()))


def read_save(out: Path, mmap: bool = False) -> dict:
    """The content of last.pt, {} if there is none. Raises UserError if it is not a checkpoint of train.py."""
    try:
        with open_checkpoint(out / 'last.pt', 'resume', mmap=mmap) as saved:
            return saved
    except FileNotFoundError:
        return {}
    except UserError as error:
        raise UserError(f'{error}; the file is left unchanged: remove it, or choose another --out') from None


def claim_folder(args: argparse.Namespace, stages: list[str]) -> list[Path]:
    """Refuses a folder that holds a run; returns the files that --overwrite removes. A run without completed
    steps doesn't count: it may have run out of memory."""
    out, last = Path(args.out), read_save(Path(args.out), mmap=True)
    models = [out / f'{stage}.pt' for stage in stages]
    kept = [path for path in out.glob('var-*.pt') if 'var' in stages and path.stem[4:].isdecimal()]
    is_run = any(map(Path.exists, models)) or last.get('unfinished') and last['step'] > 0
    check(args.overwrite or not is_run, f'--out {out}: holds a run; continue it with --resume, replace it '
          'with --overwrite, or choose another --out')
    return models + kept if args.overwrite else []


def lock(file):
    """Locks a folder against a second run, if the system has locks. The lock ends with the process."""
    try:
        import fcntl
        if rank() == 0:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f'{file.name}: another run is using this folder; choose another --out') from None
    except (ImportError, OSError):
        pass


@contextmanager
def signals_noted():
    """Records Ctrl-C, SIGTERM and SIGHUP (terminal closed) in a list, so that the loop finishes its step and
    saves. A second Ctrl-C interrupts immediately. Signals ignored under nohup stay ignored. After SIGHUP,
    output to the terminal is discarded: printing to a closed one would fail before the save."""
    def note(number, frame):
        noted.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        elif number != signal.SIGTERM:
            for stream in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    stops = {signal.SIGINT, signal.SIGTERM, getattr(signal, 'SIGHUP', signal.SIGTERM)}  # no SIGHUP on Windows
    stops = [number for number in stops if signal.getsignal(number) != signal.SIG_IGN]
    noted, terminals = [], [stream for stream in (1, 2) if os.isatty(stream)]
    before = [signal.signal(number, note) for number in stops]
    try:
        yield noted
    except RuntimeError as error:           # this process has lost the connection to one that failed
        check(signal.SIGTERM not in noted or world_size() == 1, 'ended by SIGTERM, probably because another '
              f'process failed ({one_line(error)})')
        raise
    finally:
        [*map(signal.signal, stops, before)]


# ---------------------------------------------------------------------------------------------- command line
POSITIVE = number(float, 'above 0', lambda x: 0 < x < math.inf)
PART = number(float, 'in (0, 1)', lambda x: 0 < x < 1)
FLAGS = [                               # name, type, default, help; config fields are added below
    ('preset', list(PRESETS), 'shapes', 'data set and defaults (of ImageNet: some by --depth)'),
    ('data_dir', expanduser, None, 'CIFAR-10, or images in train/<class>/ and optionally val/<class>/'),
    ('out', expanduser, None, 'folder of the run; None: out/<preset>'),
    ('resume', bool, False, 'resume from the last checkpoint in --out'),
    ('overwrite', bool, False, 'replace the run in --out'),
    ('device', str, 'auto', 'auto (a GPU if available), cpu, cuda, ...'),
    ('dtype', DTYPES, 'auto', 'autocast dtype; auto: bfloat16 on a GPU that supports it'),
    ('seed', ANY_COUNT, 0, 'determines all randomness'),
    ('train_count', COUNT, None, 'number of training images; None: all (12,000 drawn shapes)'),
    ('val_count', COUNT, 1000, 'maximum number of held-out images used in validation'),
    ('flip', bool, False, 'mirror each training image half of the time'),
    ('crop', ANY_COUNT, 0, 'shift drawn shapes and CIFAR-10 by up to this many pixels'),
    ('cache_tokens', bool, True, 'encode drawn shapes and CIFAR-10 once for stage 2, unless --crop > 0'),
    ('workers', ANY_COUNT, None, 'image-reading threads per GPU; None: based on the number of cores'),
    ('stage', ['vqvae', 'var', 'both'], 'both', 'what to train'),
    ('tokenizer', expanduser, None, 'vqvae.pt or var.pt for --stage var; None: vqvae.pt in --out'),
    ('vqvae_steps', COUNT, 10_000, 'training steps of stage 1'),
    ('var_steps', COUNT, 10_000, 'training steps of stage 2'),
    ('budget_minutes', POSITIVE, None, 'fit the whole schedule into this training time, over all sessions'),
    ('budget_vqvae', PART, 0.3, 'share of --budget-minutes for stage 1, if both are trained'),
    ('stop_after_minutes', POSITIVE, None, 'save and exit after this time; --resume continues'),
    ('batch_size', COUNT, 64, 'images per step over all GPUs'),
    ('vqvae_batch_size', COUNT, None, 'the same for stage 1; None: --batch-size'),
    ('micro_batch_size', COUNT, None, 'maximum number of images per GPU at once; None: its whole share'),
    ('vqvae_lr', POSITIVE, 4e-3, 'peak learning rate of stage 1 per 256 images in a batch'),
    ('var_lr', POSITIVE, 4e-3, 'peak learning rate of stage 2 per 256 images in a batch'),
    ('var_optimizer', ['adamw', 'muon'], 'adamw', "optimizer of stage 2; muon: for the blocks' matrices"),
    ('weight_decay', STRENGTH, 0.05, 'weight decay of both stages'),
    ('compile', bool, False, 'compile the transformer blocks with torch.compile'),
    ('revive_every_steps', COUNT, 20, 'steps between revivals of dead codes, in the first 3/4 of stage 1'),
    ('perceptual_weight', STRENGTH, 0.0, 'weight of the perceptual term'),
    ('perceptual', ['classifier', 'lpips'], 'classifier', 'small classifier, trained first; or LPIPS'),
    ('classifier_steps', COUNT, 1560, 'training steps of that classifier'),
    ('adversarial_weight', STRENGTH, 0.0, 'weight of the adversarial term; 0: no discriminator'),
    ('discriminator_start', ANY_COUNT, 0, 'step at which the discriminator starts'),
    ('log_every_steps', COUNT, 50, 'steps between log lines'),
    ('save_every_steps', COUNT, 500, 'steps between validations, images and checkpoints; also at the end'),
    ('keep_models', bool, False, 'also keep the model of each validation of stage 2, as var-STEP.pt'),
    ('cfg', STRENGTH, 1.5, 'default guidance stored in var.pt; see sample.py'),
    ('top_k', ANY_COUNT, 900, 'default top-k stored in var.pt'),
    ('top_p', SHARE, 0.96, 'default top-p stored in var.pt')]
TYPES = {bool: bool, int: ANY_COUNT, float: float, tuple: ANY_COUNT, str: str, type(None): float}
FLAGS += [(field.name, TYPES[type(field.default)], field.default, field.type.__metadata__[0])
          for field in {field.name: field for field in fields(VARConfig) + fields(VQVAEConfig)}.values()
          if field.name != 'num_classes']
DEFAULTS = {name: default for name, _, default, _ in FLAGS} | dict(             # these have no flag
    vqvae_last_lr=0.01, var_last_lr=0.01, last_weight_decay=None, classifier_channels=32,
    discriminator_channels=64, vqvae_micro_batch_size=None)


def flag(name: str) -> str:
    return '--' + name.replace('_', '-')


def build_parser() -> sample.Parser:
    """Its namespace contains only the flags that are given."""
    parser = sample.Parser(prog='train.py', usage='train.py [flags]', description=__doc__,
                           argument_default=argparse.SUPPRESS)
    for name, kind, default, help in FLAGS:
        presets = [f'; {preset}: {values[name]}' for preset, values in PRESETS.items() if name in values]
        options = (dict(action=argparse.BooleanOptionalAction) if kind is bool else
                   dict(choices=kind) if isinstance(kind, list) else
                   dict(type=kind, nargs='+' if isinstance(default, tuple) else None))
        help = f'{help} [{default}{"".join(presets)}]'.replace('%', '%%')
        parser.add_argument(flag(name), help=help, **options)
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict]:
    """The settings (flags override the resumed run's or the preset's), and the resumed run's checkpoint."""
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(build_parser().parse_args(argv)).items()}
    for pair in (('resume', 'overwrite'), ('budget_minutes', 'vqvae_steps'), ('budget_minutes', 'var_steps')):
        check(not all(map(given.get, pair)), f"{', '.join(map(flag, pair))}: use one or the other")
    preset, saved = given.get('preset', 'shapes'), {}
    settings, out = DEFAULTS | PRESETS[preset] | dict(preset=preset), given.get('out', f'out/{preset}')
    if preset.startswith('imagenet'):
        depth = given.get('depth', settings['depth'])
        settings |= RECIPES[max(least for least in RECIPES if least <= depth or least == 0)]
    if given.get('resume'):
        saved = read_save(Path(out))
        check(saved, f'--resume: {out} holds no run to resume; omit the flag to start one')
        is_ours = saved['settings'].keys() == settings.keys() - NOT_SAVED
        check(is_ours, f'{out}/last.pt: from another version of train.py; start a new run in another --out')
        settings |= saved['settings']
        for name in given.keys() - MAY_CHANGE - NOT_SAVED:
            check(given[name] == settings[name], f'{flag(name)} {given[name]}: the run to resume has '
                  f'{settings[name]}; omit the flag, or start a new run in another --out')
    return argparse.Namespace(**settings | given | dict(out=out, given={*given})), saved


def make(config_class, args: argparse.Namespace, **more):
    """Builds a config from the settings named like its fields. A ValueError 'field_name=value: why' becomes
    a UserError about the flag --field-name."""
    names = config_class.__dataclass_fields__.keys() & vars(args).keys()
    try:
        return config_class(**{name: getattr(args, name) for name in names} | more)
    except ValueError as error:
        name, _, rest = str(error).partition('=')
        raise UserError(f'{flag(name)} {rest}') from None


def make_tokenizer(args: argparse.Namespace, stages: list[str]) -> VQVAE:
    """A new one; for stage 2 alone, the one from --tokenizer or --out, or from var.pt of the resumed run."""
    if 'vqvae' in stages:
        tokenizer = VQVAE(make(VQVAEConfig, args))
        for i in set(range(len(tokenizer.phis))) - set(tokenizer.phi_table):
            tokenizer.phis[i].requires_grad_(False)         # no scale uses it
        return tokenizer
    paths = [Path(args.out, 'var.pt')] * args.resume + [Path(args.tokenizer or Path(args.out, 'vqvae.pt'))]
    path = next(filter(Path.is_file, paths), None)
    check(path, f'--stage var: no tokenizer at {paths[-1]}; train one with --stage vqvae, or pass one '
          'with --tokenizer')
    knows_scales = args.resume or 'scales' in args.given or 'scales' in PRESETS[args.preset]
    tokenizer = load_tokenizer(path, args.scales if knows_scales else None)
    for name, value in asdict(tokenizer.config).items():
        check(name not in args.given or getattr(args, name) == value, f'{flag(name)} {getattr(args, name)}: '
              f'the tokenizer in {path} has {value}; omit the flag')
    return tokenizer


def check_settings(args: argparse.Namespace, image_size: int, data: Data, stages: list[str]):
    """Refuses settings that would fail later."""
    has_classifier = 'vqvae' in stages and args.perceptual_weight and args.perceptual == 'classifier'
    has_discriminator = 'vqvae' in stages and args.adversarial_weight
    sizes = dict(vqvae=args.vqvae_batch_size or args.batch_size, var=args.batch_size)
    sizes = [sizes[stage] for stage in stages]
    fitting = ', '.join(str(n) for n in range(1, 2 * world_size()) if math.gcd(*sizes) % n == 0)
    for is_fine, complaint in [
            (not args.tokenizer or args.stage == 'var', 'tokenizer: needs --stage var'),
            (not has_discriminator or image_size >= 24, 'adversarial-weight: needs >= 24x24 pixels'),
            (args.perceptual_weight or 'perceptual' not in args.given, 'perceptual: needs a weight'),
            (not has_classifier or image_size >= 8, 'perceptual-weight: a classifier needs >= 8x8 pixels'),
            (not has_classifier or len(data.class_names) > 1, 'perceptual-weight: only one class; use 0'),
            (max(sizes) <= data.count, f'batch-size {max(sizes)}: only {data.count} images to train on'),
            (math.gcd(*sizes) % world_size() == 0, f'batch-size {min(sizes)}: cannot be split across '
             f'{world_size()} processes; {fitting} would work')]:
        check(is_fine, f'--{complaint}')
    try:
        torch.compile(lambda x: x.sin() + 1, disable=not args.compile)(torch.zeros(2, device=data.device))
    except Exception as error:                              # can fail in many ways
        raise UserError(f'--compile: no compiler (g++, or Triton on a GPU): {one_line(error)}') from None


def main(argv: list[str]):
    began = time.monotonic()
    sample.start_processes()
    args, saved = parse(argv)
    device, out = sample.choose_device(args.device), Path(args.out)
    if device.index is not None:
        torch.cuda.set_device(device)
    torch.manual_seed(args.seed)
    stages = ['vqvae', 'var'] if args.stage == 'both' else [args.stage]
    stages = stages[-1:] if saved.get('stage') == 'var' else stages             # stage 1 is done
    tokenizer = make_tokenizer(args, stages).to(device)
    config = tokenizer.config
    make(VARConfig, args, num_classes=1, scales=config.scales)                  # fails early
    replaced = claim_folder(args, stages) if not saved and rank() == 0 else []
    data = load_data(args, config.image_size, device)
    check_settings(args, config.image_size, data, stages)
    check(not saved or saved['data'] == data.fingerprint, f'--data-dir {args.data_dir}: not the images that '
          'the run to resume was trained on; pass those, or start a new run in another --out')
    seen = [[data.fingerprint, saved.get('stage'), saved.get('step')]] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(seen, seen[0])
    check(seen.count(seen[0]) == len(seen), f'--data-dir {args.data_dir}, --out {out}: the processes see '
          'different images or checkpoints; make the folders identical')
    say(f'{args.preset}: {data.count:,} images of {config.image_size}x{config.image_size} in '
        f'{len(data.class_names)} classes, {sum(tokenizer.scale_lengths)} tokens each, scales '
        f'{config.scales}, on {world_size()} x {device.type}')
    out.mkdir(parents=True, exist_ok=True)
    with open(out / 'lock' if rank() == 0 else os.devnull, 'a') as file, signals_noted() as signals:
        lock(file)
        shared = args, data, saved, replaced, signals, began
        if 'vqvae' in stages:
            train_tokenizer(Trainer('vqvae', tokenizer, *shared), tokenizer)
            tokenizer.requires_grad_(False)
        if 'var' in stages:
            torch.manual_seed(args.seed)                    # as if stage 2 were trained alone
            var = VAR(make(VARConfig, args, num_classes=len(data.class_names), scales=config.scales,
                           vocab_size=config.vocab_size, z_channels=config.z_channels)).to(device)
            for block in var.blocks if args.compile else ():
                block.compile()
            train_transformer(Trainer('var', var, *shared), var, tokenizer)
    pictures = [str(out / dict(vqvae='reconstructions.png', var='samples.png')[stage]) for stage in stages]
    say(f"done in {time.monotonic() - began:.0f} s; see {', then '.join(pictures)}")


if __name__ == '__main__':
    sample.run_command(main)
