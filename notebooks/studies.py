"""The paper's studies at small scale: next-token against next-scale prediction, and scaling laws.

    python notebooks/studies.py orders --preset shapes --dtype bfloat16     # -> notebooks/orders-shapes.csv
    python notebooks/studies.py orders --data-dir DIR --dtype bfloat16      # -> orders-cifar10-cpu.csv
    python notebooks/studies.py scaling --data-dir DIR          # -> scaling-cifar10-cpu.csv, six sizes
    python notebooks/studies.py predict                         # -> prediction-cifar10-cpu.csv, a seventh
    python notebooks/studies.py largest --data-dir DIR          # trains the seventh
    python notebooks/studies.py sheet                           # -> images/size-by-training-cifar10-cpu.png

Finished runs are skipped. `orders` trains the models of orders.py and writes a row of its CSV after each; to
measure a row again, delete it. The runs of `scaling` are train.py commands, which are printed; interrupted
ones are resumed. All committed rows used bfloat16, on a CPU where it is fast.
"""
import argparse
import csv
import io
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from bench import flops_of                                                              # noqa: E402
from judge import (Judge, ResidualJudge, frechet_distance, load_judge,                  # noqa: E402
                   precision_and_recall, read_images)
from measure import psnr                                                                # noqa: E402
from orders import ORDERS, ROWS, SETTINGS, Model, Order, fit, steps_of, train_flops     # noqa: E402
from sample import (Parser, UserError, check, choose_device, draw, grid, load,          # noqa: E402
                    load_tokenizer, open_checkpoint, run_command, save_checkpoint, save_file, save_image,
                    to_float, to_uint8)
from train import MAY_CHANGE, POSITIVE, draw_shapes, flag, make, parse, read_save       # noqa: E402
from var import VAR, VARConfig                                                          # noqa: E402
from vqvae import VQVAE, VQVAEConfig                                                    # noqa: E402


def folder_of(args: argparse.Namespace, name: str) -> Path:
    return Path(args.out, args.preset if args.share == 1 else f'{args.preset}-{args.share:g}', name).resolve()


def result(args: argparse.Namespace, name: str) -> Path:
    """Path of a CSV or image that a study writes: next to this file or, in a trial, next to its runs."""
    return (HERE if args.share == 1 else folder_of(args, '')) / name


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
    done = subprocess.run([sys.executable, *command], cwd=HERE.parent, stderr=stderr, text=True,
                          stdout=subprocess.DEVNULL if args.quiet else None)
    said = (done.stderr or 'see above').strip().splitlines()[-1]
    check(done.returncode == 0, f'{out}: train.py ended with status {done.returncode}; to resume, repeat the '
          f'command after fixing this: {said}')


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
        try:
            return json.loads(text)
        except ValueError:
            return text
    try:
        rows = csv.DictReader(path.read_text().splitlines())
        return [{name: value(text) for name, text in row.items()} for row in rows]
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}); run the study that writes it first'
                        ) from None


# ----------------------------------------------------------------------------- next token against next scale
GUIDANCE = [(0.0, True), *itertools.product((1.0, 2.0, 4.0, 8.0), (True, False))]       # cfg, ramp
JUDGES = {'shapes': [(Judge, 'judge'), (ResidualJudge, 'judge-residual')], 'cifar10': [(Judge, 'judge')]}
TWINS = 'VAR', 'one by one'
DRAWN, CHOSEN_ON, JUDGED = 50_000, 500, 2000    # training images; samples to choose guidance, to judge a row


class Comparison:
    """The study of orders on a data set: its images, judges and rows."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.settings, self.name = args, SETTINGS[args.preset], args.preset.removesuffix('-cpu')
        self.path = result(args, f'orders-{args.preset}.csv')
        self.rows = read_csv(self.path) if self.path.exists() else []
        real, labels, *test = read_images(self.name, args.data_dir)
        self.judges = [load_judge(self.name, real, labels, HERE.parent / f'out/{stem}-{self.name}.pt', kind)
                       for kind, stem in JUDGES[self.name]]
        self.images, self.labels = draw_shapes(DRAWN, 1) if self.name == 'shapes' else (
            torch.cat([real, real.flip(-1)]), labels.repeat(2))
        self.real, self.real_labels, self.test, self.test_labels = (
            tensor[:JUDGED] for tensor in (real, labels, *test))
        self.references = [[judge.features(images) for images in (self.test, self.real)]
                           for judge in self.judges]

    def tokenizer(self, order: Order, seed: int) -> tuple[VQVAE, Tensor, Tensor]:
        """A tokenizer, trained if necessary, and the tokens of the training and of the test images."""
        scales = ' '.join(map(str, order.scales))
        seed = seed if self.name == 'shapes' else 0                     # CIFAR-10: one for all seeds
        out = folder_of(self.args, f'tokenizer-{len(order.scales)}-{seed}')
        steps = max(5, round(self.args.share * self.settings.tokenizer_steps))
        call_train(self.args, out, f'--stage vqvae {self.settings.tokenizer} --vqvae-steps {steps} --seed '
                   f'{seed} --scales {scales}' + ' --order raster' * (order.scales[0] > 1))
        tokenizer = load_tokenizer(out / 'vqvae.pt')
        if not (out / 'tokens.pt').exists():
            with torch.no_grad():
                tokens = [torch.cat([tokenizer.encode(to_float(part)).short() for part in images.split(250)])
                          for images in (self.images, self.test)]
            save_checkpoint(out / 'tokens.pt', 'tokens', tokens=tokens)
        with open_checkpoint(out / 'tokens.pt', 'tokens') as saved:
            return tokenizer, *saved['tokens']

    def train(self, key: dict) -> tuple[VQVAE, Model, dict]:
        """The tokenizer of a row, its trained model, and what the CSV has about the training."""
        order, steps, seed = ORDERS[key['row']], key['steps'], key['seed']
        tokenizer, tokens_NL, test_NL = self.tokenizer(order, seed)
        torch.manual_seed(seed)
        model, began = Model(order, self.settings.vocab_size), time.perf_counter()
        fit(model, tokenizer, tokens_NL, self.labels, steps, self.settings.batch_size,
            key['rate'] * self.settings.learning_rate, seed, self.args.dtype)
        seconds, images = time.perf_counter() - began, steps * self.settings.batch_size
        with torch.no_grad():
            loss_L = torch.stack([model.loss(tokenizer, tokens_BL.long(), labels_B) for tokens_BL, labels_B in
                                  zip(test_NL.split(500), self.test_labels.split(500))]).mean(0)
        losses = {f'loss_{side}x{side}': part.mean().item()
                  for side, part in zip(order.scales, loss_L.split(tokenizer.scale_lengths))}
        return tokenizer, model, dict(
            scales=' '.join(map(str, order.scales)), dtype=self.args.dtype, train_seconds=seconds,
            images=images, train_flops=train_flops(key['row'], self.args.preset) * images,
            passes=len(model.groups), parameters=parameters_of(model.config), nats=loss_L.sum().item(),
            **losses)

    def weights_of(self, key: dict) -> Path:
        return folder_of(self.args, '{row}-{equal}-{steps}-{seed}.pt'.format(**key))

    def samples(self, tokenizer, model: Model, count: int, seed: int, cfg: float, ramp: bool) -> Tensor:
        labels = [i % 10 for i in range(count)]
        batches = draw(tokenizer, model, labels, seed, 500, self.args.dtype, cfg=cfg, ramp=ramp)
        return torch.cat([to_uint8(images) for images, _ in batches])

    def choose_guidance(self, tokenizer: VQVAE, model: Model, key: dict) -> tuple[float, bool]:
        """The guidance with samples closest to training images; for later seeds of a row, the first one's."""
        for known in self.rows:
            if known['guided'] == 1 and all(known[name] == key[name] for name in ('row', 'equal', 'steps')):
                return known['cfg'], known['ramp']
        features = [self.judges[0].features(self.samples(tokenizer, model, CHOSEN_ON, 1, *how))
                    for how in GUIDANCE]
        distances = [frechet_distance(found, self.references[0][1]) for found in features]
        return GUIDANCE[distances.index(min(distances))]

    def measures(self, images: Tensor, labels: Tensor) -> dict:
        """Of uint8 images: the Frechet distance to test images in floors, the share recognised, precision and
        recall; those of the second judge have a 2 in their names."""
        found = {}
        for judge, (test, real), number in zip(self.judges, self.references, ('', '2')):
            features = judge.features(images)
            values = (frechet_distance(features, test) / frechet_distance(real, test),
                      judge.recognised(features, labels).mean().item(), *precision_and_recall(features, test))
            found |= zip([name + number for name in ('floors', 'recognised', 'precision', 'recall')], values)
        return found

    def judge(self, tokenizer: VQVAE, model: Model, guided: int, cfg: float, ramp: bool) -> dict:
        """Measures of JUDGED samples."""
        began = time.perf_counter()
        images = self.samples(tokenizer, model, JUDGED, 0, cfg, ramp)
        seconds = (time.perf_counter() - began) / JUDGED
        return dict(guided=guided, cfg=cfg, ramp=int(ramp), sample_seconds=seconds,
                    **self.measures(images, torch.arange(JUDGED) % 10))

    @torch.no_grad()
    def ceiling(self, tokenizer: VQVAE) -> dict:
        """Measures of reconstructed training images."""
        made = torch.cat([tokenizer.decode(tokenizer.encode(to_float(x))) for x in self.real.split(250)])
        found = dict(psnr=psnr(made, self.real)) | self.measures(to_uint8(made), self.real_labels)
        return {f'ceiling_{name}': value for name, value in found.items()}

    def draw_twins(self):
        """images/orders-*.png: guided samples of the twins, after the longest training of the slower one."""
        steps, images = max(row['steps'] for row in self.rows if row['row'] == 'one by one'), []
        for row in self.rows:
            if row['row'] in TWINS and (row['steps'], row['seed'], row['guided']) == (steps, 0, 1):
                order, path = ORDERS[row['row']], self.weights_of(row)
                check(path.exists(), f'{path}: missing; to train it again, delete its row in {self.path}')
                tokenizer, model = self.tokenizer(order, 0)[0], Model(order, self.settings.vocab_size)
                with open_checkpoint(path, 'study') as saved:
                    model.load_state_dict(saved['weights'])
                images.append(self.samples(tokenizer, model, 30, 2, row['cfg'], row['ramp']))
        save_image(result(self.args, f'images/orders-{self.args.preset}.png'), grid(torch.cat(images), 10))


def orders(args: argparse.Namespace):
    """Trains and measures all rows. Rows in the CSV are kept: delete one to measure it again."""
    study = Comparison(args)
    for row, seed in [(row, seed) for row in ROWS[args.preset] for seed in row.seeds]:
        key = dict(row=row.order, equal=row.equal, rate=row.rate or ORDERS[row.order].rate,
                   steps=steps_of(row, args.preset, args.share), seed=seed, judged=int(row.rate is None))
        if any(key.items() <= known.items() for known in study.rows):
            continue
        tokenizer, model, trained = study.train(key)
        key |= trained
        if row.rate is None:
            key |= study.ceiling(tokenizer)
            save_checkpoint(study.weights_of(key), 'study', weights=model.state_dict())
            study.rows += [key | study.judge(tokenizer, model, *how) for how in
                           ((0, 0.0, True), (1, *study.choose_guidance(tokenizer, model, key)))]
        else:
            study.rows.append(key | dict(guided=''))
        write_csv(study.path, study.rows)
    study.draw_twins()


# ---------------------------------------------------------------------------------------------- scaling laws
TOKENIZERS = {'cifar10-cpu': 'notebooks/cifar10.pt'}            # that of shapes is trained
SIZES, LARGEST, STEPS = (1, 2, 3, 4, 5, 6), 7, 320              # depths, and steps of each
MEASURES = ('loss', 'loss_8x8', 'error', 'error_8x8')           # of all scales, of the last one
SHEET = (1, 3, 6), (0.2, 0.6, 1.0)                              # depths, fractions of training


class Run(NamedTuple):
    """A training run of stage 2: the folder's name, and the flags of train.py besides the preset."""
    name: str
    flags: str
    steps: int


LONGER_AND_SHORTER = Run('norm-0', '--depth 2 --seed 0', 1605), Run('deep-0', '--depth 4 --seed 0', 255)


def settings_of(preset: str, flags: str) -> tuple[VQVAEConfig, VARConfig]:
    args, _ = parse(['--preset', preset, *flags.split()])
    return make(VQVAEConfig, args), make(VARConfig, args, num_classes=10)


def parameters_of(config: VARConfig) -> int:
    with torch.device('meta'):
        return sum(parameter.numel() for parameter in VAR(config).parameters())


def of_size(args: argparse.Namespace, depth: int) -> Run:
    return Run(f'size-{depth}', f'--depth {depth}', max(5, round(args.share * STEPS)))


def train(args: argparse.Namespace, run: Run):
    """Trains a run unless it is finished; trains its tokenizer first if necessary."""
    tokenizer = TOKENIZERS.get(args.preset)
    if tokenizer is None:
        folder = folder_of(args, 'tokenizer')
        call_train(args, folder, f'--stage vqvae --vqvae-steps {max(5, round(args.share * 750))}')
        tokenizer = os.path.relpath(folder / 'vqvae.pt', HERE.parent)
    cache = '' if args.share == 1 else '--no-cache-tokens'      # caching takes longer than a trial
    call_train(args, folder_of(args, run.name), f'--stage var --tokenizer {tokenizer} --keep-models '
               f'{run.flags} --var-steps {run.steps} --save-every-steps {max(1, run.steps // 5)} {cache}')


def validations(out: Path) -> list[dict]:
    """Validation metrics that train.py logged; error is 1 - accuracy."""
    found = [{name: float(value) for name, value in row.items() if value and name != 'split'}
             for row in csv.DictReader((out / 'var.csv').read_text().splitlines()) if row['split'] == 'val']
    return [row | {name.replace('accuracy', 'error'): 1 - value for name, value in row.items()
                   if name.startswith('accuracy')} for row in found]


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
    flops, found = flops_of(*configs)['train'], []
    batch = parse(['--preset', args.preset])[0].batch_size
    for row in validations(out):
        step = int(row['step'])
        measures = {name: value for name, value in row.items() if name.startswith(('loss', 'error'))}
        found.append(known | dict(step=step, steps=run.steps, images=step * batch,
                                  train_flops=flops * step * batch) | measures)
    return found


def collect(args: argparse.Namespace):
    """Writes scaling-*.csv from the logs of the runs that exist; keeps the rows of the others."""
    path = result(args, f'scaling-{args.preset}.csv')
    before = read_csv(path) if path.exists() else []
    runs = *(of_size(args, depth) for depth in (*SIZES, LARGEST)), *LONGER_AND_SHORTER
    rows = [row for run in runs
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


STUDIES = {study.__name__: study for study in (orders, scaling, predict, largest, sheet)}


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
