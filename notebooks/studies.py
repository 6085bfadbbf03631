"""The paper's studies at small scale: next-token against next-scale prediction, ablation, scaling laws.

    python notebooks/studies.py ablation --data-dir DIR         # -> notebooks/ablation-cifar10-cpu.csv
    python notebooks/studies.py ablation --preset shapes        # the same on drawn shapes, in minutes
    python notebooks/studies.py scaling --data-dir DIR          # -> scaling-cifar10-cpu.csv, six sizes
    python notebooks/studies.py predict                         # -> prediction-cifar10-cpu.csv, a seventh
    python notebooks/studies.py largest --data-dir DIR          # trains the seventh
    python notebooks/studies.py sheet                           # -> images/size-by-training-cifar10-cpu.png
    python notebooks/studies.py speed                           # -> speed.csv: sampling with AR and VAR

Each run is a train.py command, which is printed. Finished runs are skipped, and interrupted ones are resumed.
To add a row, add it to ROWS or SIZES. The committed rows of CIFAR-10 used --dtype bfloat16, on a CPU where
it is fast; those of shapes used float32.
"""
import argparse
import csv
import io
import itertools
import math
import os
import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from bench import flops_of, seconds_of                                                  # noqa: E402
from judge import Judge, frechet_distance, load_judge, read_images                      # noqa: E402
from measure import psnr                                                                # noqa: E402
from sample import (Parser, UserError, check, choose_device, draw, grid, load,          # noqa: E402
                    run_command, save_file, save_image, to_uint8)
from train import MAY_CHANGE, POSITIVE, flag, make, parse, read_save, to_float          # noqa: E402
from var import VAR, VARConfig                                                          # noqa: E402
from vqvae import VQVAE, VQVAEConfig                                                    # noqa: E402

TOKENIZERS = {('cifar10-cpu', 'scale'): 'notebooks/cifar10.pt'}             # the others are trained
# by preset: steps of a tokenizer; training FLOPs of a row of the ablation; its top-k, 15% of the codes, as in
# the paper (600 of 4,096)
SETTINGS = {'cifar10-cpu': (10_000, 3e13, 150), 'shapes': (750, 3e12, 40)}
GUIDANCE = 1.0, 2.0, 4.0            # a guided row uses the one with samples nearest to real images
AR, VAR_PLAIN = '--order raster --scales 8 --no-adaln --no-unit-norm', '--no-adaln --no-unit-norm'
ROWS = [                            # name, name of its runs, their flags and seeds, sampling options
    ('AR', 'ar', AR, (0, 1), ()),
    ('AR, top-k and guidance', 'ar', AR, (0, 1), ('top_k', 'cfg')),
    ('AR with all of the below', 'ar-all', '--order raster --scales 8', (0,), ('top_k', 'cfg')),
    ('VAR', 'var', VAR_PLAIN, (0, 1), ()),
    ('VAR, top-k and guidance', 'var', VAR_PLAIN, (0, 1), ('top_k', 'cfg')),
    ('+ AdaLN', 'adaln', '--no-unit-norm', (0,), ()),
    ('+ top-k', 'adaln', '--no-unit-norm', (0,), ('top_k',)),
    ('+ guidance', 'adaln', '--no-unit-norm', (0,), ('top_k', 'cfg')),
    ('+ attention norm', 'norm', '', (0,), ('top_k', 'cfg')),
    ('twice the depth', 'deep', '--depth 4', (0,), ('top_k', 'cfg'))]
SIZES, LARGEST, STEPS = (1, 2, 3, 4, 5, 6), 7, 320                          # depths, and steps of each
MEASURES = ('loss', 'loss_8x8', 'error', 'error_8x8')                       # of all scales, of the last one
JUDGED = 2000                       # samples per row
SHEET = (1, 3, 6), (0.2, 0.6, 1.0)                                          # depths, fractions of training
PYRAMIDS = {8: (1, 2, 4, 8), 16: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)}        # for the speed study


class Run(NamedTuple):
    """A training run of stage 2: the folder's name, and the flags of train.py besides the preset."""
    name: str
    flags: str
    steps: int


# ------------------------------------------------------------------------------------------------------ runs
def settings_of(preset: str, flags: str) -> tuple[VQVAEConfig, VARConfig]:
    args, _ = parse(['--preset', preset, *flags.split()])
    return make(VQVAEConfig, args), make(VARConfig, args, num_classes=10)


def parameters_of(config: VARConfig) -> int:
    with torch.device('meta'):
        return sum(parameter.numel() for parameter in VAR(config).parameters())


def at_equal_compute(args: argparse.Namespace, name: str, flags: str, seed: int = 0) -> Run:
    """A run with the ablation's training FLOPs per row."""
    flags = f'--depth 2 {flags}' if '--depth' not in flags else flags
    flops = flops_of(*settings_of(args.preset, flags))['train'] * batch_size(args)
    steps = max(5, round(args.share * SETTINGS[args.preset][1] / flops))
    return Run(f'{name}-{seed}', f'{flags} --seed {seed}', steps)


def of_size(args: argparse.Namespace, depth: int) -> Run:
    return Run(f'size-{depth}', f'--depth {depth}', max(5, round(args.share * STEPS)))


def folder_of(args: argparse.Namespace, name: str) -> Path:
    return Path(args.out, args.preset if args.share == 1 else f'{args.preset}-{args.share:g}', name).resolve()


def result(args: argparse.Namespace, name: str) -> Path:
    """Path of a CSV or image that a study writes: next to this file or, in a trial, next to its runs."""
    return (HERE if args.share == 1 else folder_of(args, '')) / name


def batch_size(args: argparse.Namespace) -> int:
    return parse(['--preset', args.preset])[0].batch_size


def call_train(args: argparse.Namespace, out: Path, flags: str):
    """Runs train.py, or resumes it, unless the run is finished."""
    asked = ['--preset', args.preset, *flags.split(), '--dtype', args.dtype]
    last = read_save(out, mmap=True)
    if last:
        wanted, had = vars(parse(asked)[0]), last['settings']
        others = [flag(name) for name in had.keys() - MAY_CHANGE | {'dtype'} if had[name] != wanted[name]]
        check(not others, f'{out}: holds a run with another {", ".join(sorted(others))}; remove it, or '
              'choose another --out')
        if not last['unfinished']:
            return
    data = ['--data-dir', args.data_dir] if args.data_dir and args.preset != 'shapes' else []
    command = ['train.py', *(['--resume'] if last else asked), *data, '--out', str(out)]
    if not args.quiet:
        print('python', shlex.join(command), flush=True)
    stderr = subprocess.PIPE if args.quiet else None
    process = subprocess.Popen([sys.executable, *command], cwd=HERE.parent, stderr=stderr, text=True,
                               stdout=subprocess.DEVNULL if args.quiet else None)
    while True:
        try:
            said = (process.communicate()[1] or '').strip().splitlines()
            break
        except KeyboardInterrupt:                               # train.py gets it too, and saves
            continue
    check(process.returncode == 0, f'{out}: train.py ended with status {process.returncode}; to '
          f'resume, repeat the command after fixing this: {said[-1] if said else "see above"}')


def train(args: argparse.Namespace, run: Run):
    """Trains a run unless it is finished; trains its tokenizer first if necessary."""
    out, order = folder_of(args, run.name), 'raster' if 'raster' in run.flags else 'scale'
    tokenizer = TOKENIZERS.get((args.preset, order))
    if tokenizer is None:
        folder = folder_of(args, f'tokenizer-{order}')
        scales = '--order raster --scales 8' if order == 'raster' else ''
        steps = max(5, round(args.share * SETTINGS[args.preset][0]))
        call_train(args, folder, f'--stage vqvae {scales} --vqvae-steps {steps}')
        tokenizer = os.path.relpath(folder / 'vqvae.pt', HERE.parent)
    cache = '' if args.share == 1 else '--no-cache-tokens'      # caching takes longer than a trial
    call_train(args, out, f'--stage var --tokenizer {tokenizer} --keep-models {run.flags} --var-steps '
               f'{run.steps} --save-every-steps {max(1, run.steps // 5)} {cache}')


def validations(out: Path) -> list[dict]:
    """Validation metrics that train.py logged; error is 1 - accuracy."""
    found = [{name: float(value) for name, value in row.items() if value and name != 'split'}
             for row in csv.DictReader((out / 'var.csv').read_text().splitlines()) if row['split'] == 'val']
    return [row | {name.replace('accuracy', 'error'): 1 - value for name, value in row.items()
                   if name.startswith('accuracy')} for row in found]


def write_csv(path: Path, rows: list[dict]):
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row))
    writer.writeheader()
    writer.writerows({name: f'{value:.6g}' if isinstance(value, float) else value
                      for name, value in row.items()} for row in rows)
    save_file(path, lambda file: file.write(text.getvalue().encode()))
    print(f'{path}: {len(rows)} rows')


def read_csv(path: Path) -> list[dict]:
    """Rows of a CSV, with numbers as int or float."""
    def value(text: str):
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                pass
        return text
    try:
        rows = csv.DictReader(path.read_text().splitlines())
        return [{name: value(text) for name, text in row.items()} for row in rows]
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}); run the study that writes it first'
                        ) from None


# -------------------------------------------------------------------------------------------- the ablation
class Images(NamedTuple):
    """For the evaluation of samples: the judge, and its features of JUDGED test and training images."""
    judge: Judge
    test: Tensor
    training: Tensor


def ablation(args: argparse.Namespace):
    """Trains all rows at equal compute, and judges samples of each. Rows already in the CSV are kept: delete
    a row to measure it again."""
    runs = {(stem, seed): at_equal_compute(args, stem, flags, seed)
            for _, stem, flags, seeds, _ in ROWS for seed in seeds}
    for run in runs.values():
        train(args, run)
    name, path = args.preset.removesuffix('-cpu'), result(args, f'ablation-{args.preset}.csv')
    real_images, real_labels, test_images, _ = read_images(name, args.data_dir or str(HERE.parent / 'data'))
    judge = load_judge(name, real_images, real_labels, HERE.parent / f'out/judge-{name}.pt')
    real_images = real_images[:JUDGED]
    images = Images(judge, judge.features(test_images[:JUDGED]), judge.features(real_images))
    before, rows, ceilings = read_csv(path) if path.exists() else [], [], {}
    for title, stem, _, seeds, settings in ROWS:
        for seed in seeds:
            run = runs[stem, seed]
            tokenizer, var, _ = load(folder_of(args, run.name) / f'var-{run.steps}.pt')
            key = dict(row=title, seed=seed) | measure_run(args, run, var)
            if known := [row for row in before if same(row, key)]:
                rows.append(known[0])
                continue
            if var.config.order not in ceilings:                        # no samples can be better than these
                ceilings[var.config.order] = measure_tokenizer(tokenizer, real_images, images)
            rows.append(key | measure_samples(args, tokenizer, var, settings, images) |
                        ceilings[var.config.order])
            print(rows[-1], flush=True)
    write_csv(path, rows)


def same(row: dict, key: dict) -> bool:
    """Whether a row from a CSV matches key."""
    return all(row[name] == value if isinstance(value, str) else math.isclose(row[name], value, rel_tol=1e-5)
               for name, value in key.items())


def measure_run(args: argparse.Namespace, run: Run, var: VAR) -> dict:
    images, last = run.steps * batch_size(args), validations(folder_of(args, run.name))[-1]
    return dict(dtype=args.dtype, parameters=parameters_of(var.config), steps=run.steps, images=images,
                train_flops=flops_of(*settings_of(args.preset, run.flags))['train'] * images,
                loss=last['loss'], loss_last=last['loss_8x8'])


def measure_samples(args: argparse.Namespace, tokenizer: VQVAE, var: VAR, settings, images: Images) -> dict:
    """Metrics of JUDGED samples, at the guidance strength with the lowest frechet_training."""
    labels, found, flops = [i % 10 for i in range(JUDGED)], [], flops_of(tokenizer.config, var.config)
    top_k = SETTINGS[args.preset][2] if 'top_k' in settings else 0
    for cfg in GUIDANCE if 'cfg' in settings else (0.0,):
        how, began = dict(cfg=cfg, top_k=top_k, top_p=0.0), time.perf_counter()
        batches = draw(tokenizer, var, labels, 0, 100, args.dtype, **how)
        made = torch.cat([to_uint8(part) for part, _ in batches])
        seconds, features = (time.perf_counter() - began) / JUDGED, images.judge.features(made)
        recognised = images.judge.recognised(features, torch.tensor(labels)).mean().item()
        found.append(how | dict(
            recognised=recognised, frechet=frechet_distance(features, images.test),
            frechet_training=frechet_distance(features, images.training), seconds_an_image=seconds,
            steps_an_image=len(var.config.lengths),
            sample_flops=flops['sample' if cfg else 'unguided']))
    return min(found, key=lambda row: row['frechet_training'])


@torch.no_grad()
def measure_tokenizer(tokenizer: VQVAE, real_images: Tensor, images: Images) -> dict:
    """Distances of training images (the floor) and of their reconstructions to test images, and PSNR."""
    made = [tokenizer.decode(tokenizer.encode(to_float(part))) for part in real_images.split(100)]
    features = images.judge.features(to_uint8(torch.cat(made)))
    floor, distance = (frechet_distance(found, images.test) for found in (images.training, features))
    return dict(floor=floor, reconstructions=distance, psnr=psnr(torch.cat(made), real_images))


# ---------------------------------------------------------------------------------------------- scaling laws
class PowerLaw(NamedTuple):
    """y = factor * x ** alpha + constant, or (beta * x) ** alpha + constant; correlation is between log x and
    log(y - constant)."""
    alpha: float
    factor: float
    constant: float
    correlation: float

    def __call__(self, x):
        return self.factor * np.asarray(x, float) ** self.alpha + self.constant

    @property
    def log10_beta(self) -> float:
        return math.log10(self.factor) / self.alpha


def fit_power_law(x, y, with_constant: bool = False) -> PowerLaw:
    """Least-squares fit of the logs. The constant, between 0 and almost min(y), is that with the strongest
    correlation. Raises UserError if y doesn't fall as x rises."""
    x, y = np.log(np.asarray(x, float)), np.asarray(y, float)
    check(len(x) > 1 and np.polyfit(x, y, 1)[0] < -1e-12, 'no power law: the measured value does not fall')
    fits = []
    for constant in y.min() * (1 - np.geomspace(1, 1e-4, 400)) if with_constant else [0.0]:
        logs = np.log(y - constant)
        alpha, offset = np.polyfit(x, logs, 1)
        fits.append(PowerLaw(alpha, math.exp(offset), constant, np.corrcoef(x, logs)[0, 1]))
    return min(fits, key=lambda law: law.correlation)


def pareto_frontier(costs, losses) -> list[int]:
    """Indices of the points that no other point beats at equal or lower cost, by increasing cost."""
    order, found = np.lexsort((losses, costs)), []
    for i in order:
        if not found or losses[i] < losses[found[-1]]:
            found.append(int(i))
    return found


def log_of(run: Run, args: argparse.Namespace) -> list[dict]:
    """A row for each validation of a run; none if the run does not exist."""
    out, configs = folder_of(args, run.name), settings_of(args.preset, run.flags)
    if not (out / 'var.csv').exists():
        return []
    known = dict(run=run.name, depth=configs[1].depth, parameters=parameters_of(configs[1]), dtype=args.dtype)
    flops, batch, found = flops_of(*configs)['train'], batch_size(args), []
    for row in validations(out):
        step = int(row['step'])
        measures = {name: value for name, value in row.items() if name.startswith(('loss', 'error'))}
        found.append(known | dict(step=step, steps=run.steps, images=step * batch,
                                  train_flops=flops * step * batch) | measures)
    return found


def scaling_runs(args: argparse.Namespace) -> list[Run]:
    """All runs in scaling-*.csv: those of equal steps, and two of the ablation, of equal compute."""
    rows = {stem: flags for _, stem, flags, *_ in ROWS}
    return [*(of_size(args, depth) for depth in (*SIZES, LARGEST)),
            *(at_equal_compute(args, stem, rows[stem]) for stem in ('norm', 'deep'))]


def collect(args: argparse.Namespace):
    """Writes scaling-*.csv from the logs of the runs that exist; keeps the rows of the others."""
    path = result(args, f'scaling-{args.preset}.csv')
    before = read_csv(path) if path.exists() else []
    rows = [row for run in scaling_runs(args)
            for row in log_of(run, args) or (row for row in before if row['run'] == run.name)]
    write_csv(path, rows)


def scaling(args: argparse.Namespace):
    for depth in SIZES:
        train(args, of_size(args, depth))
    collect(args)


def at_the_end(rows: list[dict], depths) -> list[dict]:
    """The last validation of each depth, from the runs of equal steps."""
    return [row for depth in depths for row in rows
            if row['run'] == f'size-{depth}' and row['step'] == row['steps']]


def predict(args: argparse.Namespace):
    """Predicts the seventh size from fits of the first six, before it is trained."""
    rows = read_csv(result(args, f'scaling-{args.preset}.csv'))
    ends, config = at_the_end(rows, SIZES), settings_of(args.preset, of_size(args, LARGEST).flags)[1]
    check(len(ends) == len(SIZES), f'scaling-{args.preset}.csv: has {len(ends)} of {len(SIZES)} sizes; '
          'run `studies.py scaling` first')
    check(not at_the_end(rows, [LARGEST]), f'scaling-{args.preset}.csv: already has depth {LARGEST}; this '
          'would not be a prediction')
    found, parameters = [], parameters_of(config)
    for name in MEASURES:
        for with_constant in (0, 1):
            law = fit_power_law(*([row[key] for row in ends] for key in ('parameters', name)), with_constant)
            found.append(dict(measure=name, with_constant=with_constant, depth=LARGEST, parameters=parameters,
                              **law._asdict(), predicted=float(law(parameters))))
    write_csv(result(args, f'prediction-{args.preset}.csv'), found)


def largest(args: argparse.Namespace):
    read_csv(result(args, f'prediction-{args.preset}.csv'))               # must exist first
    train(args, of_size(args, LARGEST))
    collect(args)


# ------------------------------------------------------------------------------------------ images and speed
def sheet(args: argparse.Namespace):
    """Sizes in columns, fractions of training in rows: four samples in each, of the same seed and labels."""
    depths, shares = SHEET
    blocks = []
    for share in shares:
        for depth in depths:
            run = of_size(args, depth)
            step = round(share * 5) * (run.steps // 5)
            tokenizer, var, _ = load(folder_of(args, run.name) / f'var-{step}.pt')
            blocks.append(next(draw(tokenizer, var, [0, 1, 7, 8], 3, 4, cfg=4.0, top_k=0, top_p=0.8))[0])
    rows = [torch.cat([block[half:half + 2] for block in blocks[i:i + len(depths)]])
            for i in range(0, len(blocks), len(depths)) for half in (0, 2)]
    path = result(args, f'images/size-by-training-{args.preset}.png')
    save_image(path, grid(torch.cat(rows), 2 * len(depths)))
    print(path)


def speed(args: argparse.Namespace):
    """Seconds of guided sampling with random weights at depth 2: one image, and a batch of fifty. Medians of
    five rounds, with the runs interleaved."""
    rows, runs = [], []
    for side, order, batch in itertools.product(PYRAMIDS, ('raster', 'scale'), (1, 50)):
        scales = PYRAMIDS[side] if order == 'scale' else (side,)
        tokenizer = VQVAE(VQVAEConfig(image_size=4 * side, vocab_size=1024, scales=scales))
        var = VAR(VARConfig(2, 10, 1024, 16, scales, order=order))
        labels, lengths = [i % 10 for i in range(batch)], var.config.lengths
        runs.append(partial(draw, tokenizer, var, labels, 0, batch, args.dtype, cfg=4.0, top_k=0, top_p=0.8))
        rows.append(dict(side=side, order=order, batch=batch, dtype=args.dtype, tokens=sum(lengths),
                         steps=len(lengths), sample_flops=flops_of(tokenizer.config, var.config)['sample']))
    rounds = [[seconds_of(lambda: [*run()], torch.device('cpu'), runs=1) for run in runs] for _ in range(5)]
    for row, seconds in zip(rows, zip(*rounds)):
        row['seconds_an_image'] = float(np.median(seconds)) / row['batch']
    write_csv(result(args, 'speed.csv'), rows)


STUDIES = {study.__name__: study for study in (ablation, scaling, predict, largest, sheet, speed)}


def main(argv: list[str]):
    parser = Parser(prog='studies.py', description=__doc__)
    parser.add_argument('study', choices=list(STUDIES))
    parser.add_argument('--preset', choices=list(SETTINGS), default='cifar10-cpu', help='[cifar10-cpu]')
    parser.add_argument('--data-dir', help='folder with CIFAR-10 [downloaded to data/]')
    parser.add_argument('--dtype', choices=['auto', 'float32', 'bfloat16'], default='auto')
    parser.add_argument('--share', type=POSITIVE, default=1.0, help='fraction of the steps, for a trial [1]')
    parser.add_argument('--out', default='out/studies', help='folder of all runs [out/studies]')
    parser.add_argument('--quiet', action='store_true', help='hide the output of train.py')
    args = parser.parse_args(argv)
    choose_device('cpu')                                        # glibc keeps memory, for timings
    args.data_dir = args.data_dir and str(Path(args.data_dir).resolve())        # train.py has another cwd
    STUDIES[args.study](args)


if __name__ == '__main__':
    run_command(main)
