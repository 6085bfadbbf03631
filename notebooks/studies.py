"""The paper's studies at small scale: next-token against next-scale prediction, and scaling laws.

    python notebooks/studies.py orders --preset shapes --dtype bfloat16     # -> notebooks/orders-shapes.csv
    python notebooks/studies.py orders --data-dir DIR --dtype bfloat16      # -> orders-cifar10-cpu.csv
    python notebooks/studies.py scaling --preset shapes --dtype bfloat16    # -> scaling-shapes.csv
    python notebooks/studies.py predict --preset shapes         # -> prediction-shapes.csv, of runs left out
    python notebooks/studies.py largest --preset shapes --dtype bfloat16    # trains those
    python notebooks/studies.py sheet --preset shapes           # -> images/size-by-training-shapes.png

The last four also take CIFAR-10. On two cores, replace the preset by --data-dir DIR (there, no run is left
out); on a GPU, by --preset cifar10 --data-dir DIR --device cuda. train.py trains the tokenizers, this script
everything else. A row is written after each run. Rows in a CSV are kept: to measure one again, delete it.
All committed rows used bfloat16, on a CPU.
"""
import argparse
import csv
import io
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from judge import (Judge, ResidualJudge, frechet_distance, load_judge,                  # noqa: E402
                   precision_and_recall, read_images)
from laws import grouped, guesses, range_of, resampled_laws, spread_of                   # noqa: E402
from measure import psnr                                                                # noqa: E402
from orders import ORDERS, ROWS, SETTINGS, Model, Order, fit, steps_of, train_flops     # noqa: E402
from sample import (Parser, UserError, check, choose_device, draw, grid,                # noqa: E402
                    load_tokenizer, open_checkpoint, run_command, save_checkpoint, save_file, save_image,
                    to_float, to_uint8)
from train import POSITIVE, draw_shapes                                                 # noqa: E402
from vqvae import VQVAE                                                                 # noqa: E402


def folder_of(args: argparse.Namespace, name: str) -> Path:
    return Path(args.out, args.preset if args.share == 1 else f'{args.preset}-{args.share:g}', name).resolve()


def result(args: argparse.Namespace, name: str) -> Path:
    """Path of a CSV or image that a study writes: next to this file or, in a trial, next to its runs."""
    return (HERE if args.share == 1 else folder_of(args, '')) / name


def steps_of_share(share: float, steps: int) -> int:
    return max(5, round(share * steps))


def train_tokenizer(args: argparse.Namespace, out: Path, flags: str):
    """Runs train.py, or resumes it."""
    data = ['--data-dir', args.data_dir] if args.data_dir and args.preset != 'shapes' else []
    command = ['train.py', '--preset', args.preset, '--stage', 'vqvae', *flags.split(), '--dtype', args.dtype,
               *data, '--out', str(out), *['--resume'] * (out / 'last.pt').exists()]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) if args.quiet else {}
    done = subprocess.run([sys.executable, *command], cwd=HERE.parent, text=True, **pipes)
    said = (done.stderr or 'see above').strip().splitlines()[-1]
    check(done.returncode == 0, f'{out}: train.py ended with status {done.returncode}; repeat the command '
          f'after fixing this: {said}')


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


DRAWN, JUDGED = 50_000, 2000            # training images that are drawn; test images, and samples of a model


class Study:
    """A data set with its tokenizers, and the rows of a CSV with the results so far."""

    def __init__(self, args: argparse.Namespace, name: str):
        self.args, self.settings, self.name = args, SETTINGS[args.preset], args.preset.removesuffix('-cpu')
        self.path = result(args, f'{name}-{args.preset}.csv')
        self.rows = read_csv(self.path) if self.path.exists() else []
        self.real, self.real_labels, *test = read_images(self.name, args.data_dir)
        self.images, self.labels = draw_shapes(DRAWN, 1) if self.name == 'shapes' else (
            torch.cat([self.real, self.real.flip(-1)]), self.real_labels.repeat(2))
        self.test, self.test_labels = (tensor[:JUDGED] for tensor in test)

    def has(self, key: dict) -> bool:
        return any(key.items() <= row.items() for row in self.rows)

    def tokenizer(self, order: Order, seed: int) -> tuple[VQVAE, Tensor, Tensor]:
        """A tokenizer, trained if necessary, and the tokens of the training and of the test images."""
        scales = ' '.join(map(str, order.scales))
        out = folder_of(self.args, f'tokenizer-{len(order.scales)}-{seed}')
        if not (out / 'tokens.pt').exists():
            steps = steps_of_share(self.args.share, self.settings.tokenizer_steps)
            train_tokenizer(self.args, out, f'{self.settings.tokenizer} --vqvae-steps {steps} --seed {seed} '
                            f'--scales {scales}' + ' --order raster' * (order.scales[0] > 1))
            tokenizer = load_tokenizer(out / 'vqvae.pt')
            with torch.no_grad():
                tokens = [torch.cat([tokenizer.encode(to_float(part)).short() for part in images.split(250)])
                          for images in (self.images, self.test)]
            save_checkpoint(out / 'tokens.pt', 'tokens', tokens=tokens)
        with open_checkpoint(out / 'tokens.pt', 'tokens') as saved:
            return load_tokenizer(out / 'vqvae.pt'), *saved['tokens']

    def train(self, model: Model, data: tuple, steps: int, batch_size: int, peak: float,
              seed: int) -> tuple[Tensor, Tensor, dict]:
        """Trains a model on what `tokenizer` returned. Returns the held-out loss and error of each token, and
        columns of the CSV."""
        (tokenizer, tokens_NL, test_NL), began, device = data, time.perf_counter(), self.args.device
        model, tokenizer = model.to(device), tokenizer.to(device)
        fit(model, tokenizer, tokens_NL, self.labels, steps, batch_size, peak, seed, self.args.dtype)
        seconds, images = time.perf_counter() - began, steps * batch_size
        values = held_out(model, tokenizer, test_NL.long().to(device), self.test_labels.to(device))
        model, tokenizer = model.cpu(), tokenizer.cpu()
        return *(value_L.cpu() for value_L in values), dict(
            dtype=self.args.dtype, train_seconds=seconds, images=images,
            train_flops=train_flops(model) * images, parameters=parameters_of(model))

    def save(self, name: str, model: Model):
        save_checkpoint(folder_of(self.args, name), 'study', weights=model.state_dict())

    def restore(self, name: str, model: Model):
        path = folder_of(self.args, name)
        check(path.exists(), f'{path}: missing; to train it again, delete its row in {self.path}')
        with open_checkpoint(path, 'study') as saved:
            model.load_state_dict(saved['weights'])

    def samples(self, tokenizer, model: Model, count: int, seed: int, cfg: float, ramp: bool) -> Tensor:
        labels = [i % 10 for i in range(count)]
        batches = draw(tokenizer, model, labels, seed, 500, self.args.dtype, cfg=cfg, ramp=ramp)
        return torch.cat([to_uint8(images) for images, _ in batches])


@torch.no_grad()
def held_out(model: Model, tokenizer: VQVAE, tokens_NL: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token, averaged over the images, (L,) each: the cross-entropy in nats, and how often the most
    likely code is the wrong one."""
    losses, errors = [], []
    for tokens_BL, labels_B in zip(tokens_NL.split(250), labels_N.split(250)):
        logits_BLV = model(labels_B, model.teacher_inputs(tokenizer, tokens_BL))
        losses.append(F.cross_entropy(logits_BLV.mT, tokens_BL, reduction='none'))
        errors.append(logits_BLV.argmax(-1) != tokens_BL)
    return torch.cat(losses).mean(0), torch.cat(errors).float().mean(0)


def parameters_of(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ----------------------------------------------------------------------------- next token against next scale
GUIDANCE = [(0.0, True), *itertools.product((1.0, 2.0, 4.0, 8.0), (True, False))]       # cfg, ramp
JUDGES = {'shapes': [(Judge, 'judge'), (ResidualJudge, 'judge-residual')], 'cifar10': [(Judge, 'judge')]}
TWINS, WEIGHTS = ('VAR', 'one by one'), '{row}-{equal}-{steps}-{seed}.pt'
CHOSEN_ON = 500                         # samples to choose the guidance of a row


class Comparison(Study):
    """The study of orders on a data set: its judges and rows."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args, 'orders')
        self.judges = [load_judge(self.name, self.real, self.real_labels,
                                  HERE.parent / f'out/{stem}-{self.name}.pt', kind)
                       for kind, stem in JUDGES[self.name]]
        self.real, self.real_labels = self.real[:JUDGED], self.real_labels[:JUDGED]
        self.references = [[judge.features(images) for images in (self.test, self.real)]
                           for judge in self.judges]

    def train_row(self, key: dict) -> tuple[VQVAE, Model, dict]:
        """The tokenizer of a row, its trained model, and what the CSV has about the training."""
        order, settings, seed = ORDERS[key['row']], self.settings, key['seed']
        data = self.tokenizer(order, seed if self.name == 'shapes' else 0)      # CIFAR-10: one for all seeds
        torch.manual_seed(seed)
        model = Model(order, settings.vocab_size)
        loss_L, _, trained = self.train(model, data, key['steps'], settings.batch_size,
                                        key['rate'] * settings.learning_rate, seed)
        losses = {f'loss_{side}x{side}': part.mean().item()
                  for side, part in zip(order.scales, loss_L.split(data[0].scale_lengths))}
        return data[0], model, trained | losses | dict(
            scales=' '.join(map(str, order.scales)), passes=len(model.groups), nats=loss_L.sum().item())

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
                order = ORDERS[row['row']]
                tokenizer, model = self.tokenizer(order, 0)[0], Model(order, self.settings.vocab_size)
                self.restore(WEIGHTS.format(**row), model)
                images.append(self.samples(tokenizer, model, 30, 2, row['cfg'], row['ramp']))
        save_image(result(self.args, f'images/orders-{self.args.preset}.png'), grid(torch.cat(images), 10))


def orders(args: argparse.Namespace):
    """Trains and measures all rows. Rows in the CSV are kept: delete one to measure it again."""
    check(args.preset in ROWS, f'--preset {args.preset}: not for orders; choose from {", ".join(ROWS)}')
    study = Comparison(args)
    for row, seed in [(row, seed) for row in ROWS[args.preset] for seed in row.seeds]:
        key = dict(row=row.order, equal=row.equal, rate=row.rate or ORDERS[row.order].rate,
                   steps=steps_of(row, args.preset, args.share), seed=seed, judged=int(row.rate is None))
        if study.has(key):
            continue
        tokenizer, model, trained = study.train_row(key)
        key |= trained
        if row.rate is None:
            key |= study.ceiling(tokenizer)
            study.save(WEIGHTS.format(**key), model)
            study.rows += [key | study.judge(tokenizer, model, *how) for how in
                           ((0, 0.0, True), (1, *study.choose_guidance(tokenizer, model, key)))]
        else:
            study.rows.append(key | dict(guided=''))
        write_csv(study.path, study.rows)
    study.draw_twins()


# ---------------------------------------------------------------------------------------------- scaling laws
SEEDS, MEASURES = (0, 1, 2), ('loss', 'loss_8x8', 'error', 'error_8x8')         # of all scales, of the last
SIZE_WEIGHTS, LABELS = 'size-{depth}-{blocks}-{steps}-{seed}.pt', [1, 4, 5, 9]  # LABELS: of the sheet


class Runs(NamedTuple):
    """Runs of a model with the width of a depth: one for each number of steps and each seed, with a schedule
    of its own."""
    depth: int
    blocks: int
    steps: tuple[int, ...]
    seeds: tuple[int, ...] = (0,)


class Scaling(NamedTuple):
    """The study of a data set. The learning rate is `rate` / depth; cfg is the guidance of the sheet."""
    batch_size: int
    rate: float
    runs: list[Runs]
    left_out: list[Runs]
    sheet: list[Runs]
    cfg: float


CHEAP = (1, 1), (2, 1), (2, 2)
SCALING = {
    'shapes': Scaling(8, 0.012, [
        *(Runs(*size, (1000, 2000, 4000), SEEDS) for size in CHEAP),
        *(Runs(*size, (8000, 16000)) for size in CHEAP),
        Runs(3, 2, (1000, 2000, 4000, 8000, 16000)), Runs(3, 3, (1000, 2000, 4000, 8000)),
        Runs(4, 4, (1000, 2000, 4000))],
        [Runs(5, 5, (2000,)), Runs(3, 3, (16000,))],
        [Runs(depth, depth, (1000, 4000, 16000)) for depth in (1, 2, 3)], 2.0),
    'cifar10-cpu': Scaling(8, 0.012, [
        Runs(1, 1, (1000, 2000, 4000), SEEDS), Runs(2, 2, (1000, 2000, 4000), SEEDS),
        Runs(3, 3, (1000, 2000, 4000))],
        [],
        [Runs(depth, depth, (1000, 2000, 4000)) for depth in (1, 2, 3)], 4.0),
    'cifar10': Scaling(64, 0.024, [
        Runs(2, 2, (1000, 2000, 4000), SEEDS),
        *(Runs(depth, depth, (1000, 2000, 4000)) for depth in range(3, 8))],
        [Runs(8, 8, (4000,))],
        [Runs(depth, depth, (1000, 2000, 4000)) for depth in (2, 4, 6)], 4.0)}


def train_runs(study: Study, runs: list[Runs]):
    """Trains and measures the runs that have no row yet."""
    batch_size, rate, *_ = SCALING[study.args.preset]
    for depth, blocks, budgets, seeds in runs:
        for steps, seed in itertools.product(budgets, seeds):
            key = dict(depth=depth, blocks=blocks, steps=steps_of_share(study.args.share, steps), seed=seed)
            if study.has(key):
                continue
            data = study.tokenizer(ORDERS['VAR'], 0)
            torch.manual_seed(seed)
            model = Model(ORDERS['VAR'], study.settings.vocab_size, depth, blocks)
            *values_L, trained = study.train(model, data, key['steps'], batch_size, rate / depth, seed)
            values = [part.mean().item() for all_L in values_L for part in (all_L, all_L[-64:])]
            study.save(SIZE_WEIGHTS.format(**key), model)
            study.rows.append(key | trained | dict(zip(MEASURES, values)))
            write_csv(study.path, study.rows)


def scaling(args: argparse.Namespace):
    train_runs(Study(args, 'scaling'), SCALING[args.preset].runs)


def predictions(preset: str, rows: list[dict], share: float = 1.0) -> list[dict]:
    """Of the runs left out: by their parameters, from all runs with as many steps; and by their images, from
    all runs of the same size. Each measure has a row for the law without a constant and one for that with a
    constant, and in both the guesses without a law. Raises UserError if a run left out is among the rows."""
    study, found = SCALING[preset], []
    for depth, blocks, (steps,), _ in study.left_out:
        steps, size = steps_of_share(share, steps), dict(depth=depth, blocks=blocks)
        check(not grouped(rows, 'loss', **size, steps=steps), f'scaling-{preset}.csv: already has depth '
              f'{depth} after {steps} steps; this would not be a prediction')
        parameters = parameters_of(Model(ORDERS['VAR'], SETTINGS[preset].vocab_size, depth, blocks))
        ways = [('parameters', parameters, dict(steps=steps)), ('images', steps * study.batch_size, size)]
        for (by, asked, fixed), measure in itertools.product(ways, MEASURES):
            groups = grouped(rows, measure, by, **fixed)
            x, values = [x for x, in groups], [*groups.values()]
            for with_constant in (0, 1) if len(x) > 2 else ():
                laws = resampled_laws(x, values, with_constant, spread_of(rows, measure))
                row = dict(**size, steps=steps, by=by, asked=asked, measure=measure, points=len(x),
                           with_constant=with_constant, correlation=laws[0].correlation)
                for name, numbers in (('alpha', [law.alpha for law in laws]),
                                      ('constant', [law.constant for law in laws]),
                                      ('predicted', [float(law(asked)) for law in laws])):
                    row |= zip((name, f'{name}_low', f'{name}_high'), range_of(numbers))
                found.append(row | guesses(x, values, asked))
    return found


def predict(args: argparse.Namespace):
    check(SCALING[args.preset].left_out, f'--preset {args.preset}: no run is left out, there is nothing to '
          'predict')
    rows = read_csv(result(args, f'scaling-{args.preset}.csv'))
    write_csv(result(args, f'prediction-{args.preset}.csv'), predictions(args.preset, rows, args.share))


def largest(args: argparse.Namespace):
    """Trains the runs left out."""
    read_csv(result(args, f'prediction-{args.preset}.csv'))               # must exist first
    train_runs(Study(args, 'scaling'), SCALING[args.preset].left_out)


def sheet(args: argparse.Namespace):
    """Sizes from left to right, steps from top to bottom: four samples of each, of equal noise and labels."""
    study, runs, models = Study(args, 'scaling'), SCALING[args.preset].sheet, []
    for steps, run in itertools.product(runs[0].steps, runs):
        key = dict(depth=run.depth, blocks=run.blocks, steps=steps_of_share(args.share, steps), seed=0)
        models.append(Model(ORDERS['VAR'], study.settings.vocab_size, run.depth, run.blocks))
        study.restore(SIZE_WEIGHTS.format(**key), models[-1])
    tokenizer, cfg = study.tokenizer(ORDERS['VAR'], 0)[0], SCALING[args.preset].cfg
    samples = [study.samples(tokenizer, model, 10, 3, cfg, True)[LABELS] for model in models]
    images = [torch.cat([of_model, torch.full_like(of_model[:1], 255)]) for of_model in samples]
    path = result(args, f'images/size-by-training-{args.preset}.png')
    save_image(path, grid(torch.cat(images), 5 * len(runs)))
    print(path)


STUDIES = {study.__name__: study for study in (orders, scaling, predict, largest, sheet)}


def main(argv: list[str]):
    parser = Parser(prog='studies.py', description=__doc__)
    parser.add_argument('study', choices=list(STUDIES))
    parser.add_argument('--preset', choices=list(SETTINGS), default='cifar10-cpu', help='[cifar10-cpu]')
    parser.add_argument('--data-dir', help='folder with CIFAR-10 [downloaded to data/]')
    parser.add_argument('--device', default='cpu', help='to train on; auto takes a GPU if there is one [cpu]')
    parser.add_argument('--dtype', choices=['auto', 'float32', 'bfloat16'], default='auto')
    parser.add_argument('--share', type=POSITIVE, default=1.0, help='fraction of the steps, for a trial [1]')
    parser.add_argument('--out', default='out/studies', help='folder of all runs [out/studies]')
    parser.add_argument('--quiet', action='store_true', help='hide the output of train.py')
    args = parser.parse_args(argv)
    args.device = choose_device(args.device)
    args.data_dir = args.data_dir and str(Path(args.data_dir).resolve())        # train.py has another cwd
    STUDIES[args.study](args)


if __name__ == '__main__':
    run_command(main)
