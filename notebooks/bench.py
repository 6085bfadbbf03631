"""Times a training step, sampling and image loading; prints one line of JSON for each.

    python notebooks/bench.py --preset cifar10-cpu --dtype bfloat16         # random weights: a step, sampling
    python notebooks/bench.py --preset imagenet256 --depth 16 --batch-size 64 --compile
    python notebooks/bench.py --checkpoint notebooks/cifar10.pt --batch-size 32     # sampling
    python notebooks/bench.py --loader DIR --image-size 256                 # reads all images in DIR/<class>/

Also takes train.py's flags. The step is one of stage 2, on tokens (--no-cache-tokens: on images). Times are
medians of 7 runs after 3 warm-up runs. FLOPs come from a formula; MFU is relative to the FLOP/s of a large
matrix multiplication in the same dtype, timed in the same run. On a CPU, memory is the process's peak so far.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train                                                                            # noqa: E402
from sample import (SAMPLING, Parser, autocast, check, choose_device, choose_dtype,     # noqa: E402
                    cut_square, draw, load, open_image, run_command)
from var import VAR, VARConfig                                                              # noqa: E402
from vqvae import VQVAE, VQVAEConfig                                                    # noqa: E402


def flops_of(tokenizer_config: VQVAEConfig, var_config: VARConfig, blocks: int = 0) -> dict[str, int]:
    """FLOPs per image, where a multiply-add counts as two: 'encode', 'decode', 'train' (forward and backward
    pass of the transformer, on tokens), 'sample' (with guidance and decoding) and 'unguided'. blocks: their
    number, if it isn't the depth."""
    D, V, C, lengths = var_config.width, var_config.vocab_size, var_config.z_channels, var_config.lengths
    L, blocks = sum(lengths), blocks or var_config.depth
    projections = 1 if var_config.shared_adaln else blocks
    adaln = (12 * projections + 4) * D * D if var_config.adaln else 0
    seen = sum(length * sum(lengths[:k + 1]) for k, length in enumerate(lengths))
    # per block: q, k, v, proj 8 D^2 and MLP 16 D^2 a position, 4 D a pair; head 2 D V; per class: AdaLN
    forward, drawn = ((24 * blocks * D * D + 2 * D * V) * L + 4 * D * blocks * pairs + adaln
                      for pairs in (L * L, seen))
    words = 2 * C * D * (L - 1)
    with torch.device('meta'), torch.no_grad():
        tokenizer, S = VQVAE(tokenizer_config), tokenizer_config.image_size
        with FlopCounterMode(display=False) as encoder:
            f = tokenizer.features(torch.empty(1, 3, S, S))
        with FlopCounterMode(display=False) as decoder:
            tokenizer.decode_f_hat(f)
    decode = decoder.get_total_flops()
    return dict(encode=encoder.get_total_flops(), decode=decode, train=3 * (forward + words),
                sample=2 * drawn + words + decode, unguided=drawn + words // 2 + decode)


def seconds_of(run, device: torch.device, runs: int = 7) -> float:
    """Median time of `runs` runs, after 3 warm-ups."""
    def clock() -> float:
        began = time.perf_counter()
        run()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        return time.perf_counter() - began
    return statistics.median([clock() for _ in range(runs + 3)][3:])


def peak_memory(device: torch.device) -> int | None:
    """In bytes; None on Windows, which doesn't report it."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == 'darwin' else 1024          # macOS reports bytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def report(what: str, run, device: torch.device, unit: str, count: int, flops: float, **said):
    """Times run(), which processes `count` units, and prints a line of JSON."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    seconds, memory = seconds_of(run, device), peak_memory(device)
    n = 8192 if device.type == 'cuda' else 2048
    a = torch.randn(n, n, device=device, dtype=getattr(torch, said['dtype']))
    peak = 2 * n ** 3 / seconds_of(lambda: a @ a, device)
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'
    row = dict(what=what, device=name, **said, seconds=round(seconds, 5))
    row |= {f'{unit}_per_s': round(count / seconds, 2)}
    row |= dict(peak_gib=memory and round(memory / 2 ** 30, 2), tflop=round(flops / 1e12, 4),
                mfu=round(flops / seconds / peak, 3), matmul_tflop_per_s=round(peak / 1e12, 3))
    print(json.dumps(row), flush=True)


def bench_step(args: argparse.Namespace, tokenizer: VQVAE, var, device: torch.device, **said):
    """Times a training step of stage 2, on random tokens or images."""
    B, config = args.batch_size, tokenizer.config
    trainer = train.Trainer('var', var, args, SimpleNamespace(count=B, device=device), {}, [], [], 0.0)
    images = torch.rand(B, 3, config.image_size, config.image_size, device=device) * 2 - 1
    tokens_BL = torch.randint(config.vocab_size, (B, sum(trainer.lengths)), device=device)
    labels_B = torch.randint(var.config.num_classes, (B,), device=device)
    is_cached, flops = args.cache_tokens, flops_of(config, var.config)

    def step():
        noise_BN = torch.rand(B, 1 + 2 * args.depth, device=device)
        for batch in trainer.micro_batches(tokens_BL if is_cached else images, labels_B, noise_BN):
            with autocast(device, args.dtype):
                loss_BL, _ = train.transformer_loss(trainer.networks['var'], tokenizer, *batch)
            trainer.backward(loss_BL.mean(), dict(loss=loss_BL.mean(0)))
        trainer.update_weights()
    report('train_cached' if is_cached else 'train', step, device, 'tokens', tokens_BL.numel(),
           B * (flops['train'] + (0 if is_cached else flops['encode'])), micro_batch=trainer.val_batch_size,
           **said)


def bench_sampling(tokenizer: VQVAE, var, count: int, device: torch.device, how: dict, **said):
    """Times the sampling of `count` images in one batch."""
    labels = [i % var.config.num_classes for i in range(count)]
    flops = count * flops_of(tokenizer.config, var.config)['sample' if how['cfg'] else 'unguided']
    report('sample', lambda: [*draw(tokenizer, var, labels, 0, count, said['dtype'], **how)], device,
           'images', count, flops, **said, **how)


def box_resize(path: str, size: int, noise: tuple[float, float]) -> np.ndarray:
    """Resizing and cropping as in train.py."""
    return cut_square(open_image(path, round(1.125 * size)), size, round(1.125 * size), noise)


def whole_resize(path: str, size: int, noise: tuple[float, float]) -> np.ndarray:
    """The steps of the released code: decode, resize the whole image, crop."""
    image, shorter = Image.open(path).convert('RGB'), round(1.125 * size)
    w, h = image.size
    W, H = (shorter, int(shorter * h / w)) if w <= h else (int(shorter * w / h), shorter)
    y, x = int(noise[0] * (H - size + 1)), int(noise[1] * (W - size + 1))
    return np.asarray(image.resize((W, H), Image.LANCZOS).crop((x, y, x + size, y + size)))


def bench_loader(folder: str, size: int):
    """Images read per second on one core, by `box_resize` and by `whole_resize`; medians of 7 rounds."""
    paths, cpu = [path for _, path in train.find_images(Path(folder))], torch.device('cpu')
    check(paths, f'--loader {folder}: no images in {folder}/<class>/')

    def read_all(read):
        for path in paths:
            read(path, size, (0.3, 0.7))
    rounds = [[seconds_of(lambda: read_all(read), cpu, runs=1) for read in (box_resize, whole_resize)]
              for _ in range(7)]
    ours, theirs = (len(paths) / statistics.median(column) for column in zip(*rounds))
    ratio = statistics.median(theirs / ours for ours, theirs in rounds)
    print(json.dumps(dict(what='loader', images=len(paths), size=size, images_per_s=round(ours, 1),
                          by_whole_resize=round(theirs, 1), ratio=round(ratio, 2))))


def main(argv: list[str]):
    parser = Parser(prog='bench.py', description=__doc__, usage='bench.py [flags, also those of train.py]')
    parser.add_argument('--checkpoint', help='time only sampling from this var.pt, with its defaults')
    parser.add_argument('--loader', help='time only reading the images in this folder')
    own, flags = parser.parse_known_args(argv)
    args, _ = train.parse(flags)
    if own.loader:
        return bench_loader(own.loader, args.image_size)
    device = choose_device(args.device)
    said = dict(dtype=choose_dtype(device, args.dtype), batch=args.batch_size, compile=args.compile)
    if own.checkpoint:
        tokenizer, var, how = load(own.checkpoint, device)
        how |= {name: getattr(args, name) for name in SAMPLING if name in args.given}
    else:
        tokenizer = VQVAE(train.make(VQVAEConfig, args)).to(device).requires_grad_(False)
        var, how = VAR(train.make(VARConfig, args)).to(device), {}
        how |= {name: getattr(args, name) for name in SAMPLING}
    if args.compile:
        for part in (tokenizer.decoder, *var.blocks):
            part.compile()
    said |= dict(depth=var.config.depth)
    if not own.checkpoint:
        bench_step(args, tokenizer, var, device, **said)
    bench_sampling(tokenizer, var, args.batch_size, device, how, **said)


if __name__ == '__main__':
    run_command(main)
