"""Fuzzes train.py and sample.py with random flags, truncated files, and unusual images and folders.

    python notebooks/fuzz.py --count 2000 --seed 0      # a few minutes on two cores

Each case must succeed, or exit with status 2 and a single line that begins with 'error: '. It must end within
a minute, without a traceback, a warning or a half-written file. `--only 1234` repeats case 1234 and shows its
output.
"""
import io
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample                                                                           # noqa: E402
import train                                                                            # noqa: E402

SECONDS = 60                            # timeout per case; a case usually takes 0.1 s
TINY = ('--train-count 24 --val-count 8 --batch-size 8 --channels 32 --z-channels 4 --vocab-size 16 '
        '--scales 1 2 8 --depth 1 --device cpu --vqvae-steps 2 --var-steps 2 --save-every-steps 2 '
        '--stop-after-minutes 0.02 --adaln-gamma-init 0.1').split()
NUMBERS = ['', str(2 ** 31), str(2 ** 63), str(10 ** 30)]
NUMBERS += '-1 0 1 2 3 4 8 16 32 33 2000000 0.5 1.5 1e-320 1e-45 1e30 1e39 1e308 1e999 nan -inf x ٣'.split()
WORDS = ['', ' ', 'x', '3', 'null', 'star', 'Heart', '..', '-', '~', 'ünï', 'a' * 300, '\udcff', '%s', '{}',
         'a\nb']


class Hang(BaseException):
    pass


# --------------------------------------------------------------------------------------------- random inputs
def value_of(action, chance: random.Random, files: list[str]) -> list[str]:
    """Arguments for a flag, usually of its type."""
    count = chance.choice([1, 2, 3, 4]) if action.nargs == '+' else action.nargs or 1
    if action.choices and chance.random() < 0.8:
        return [chance.choice([*action.choices])]
    kind = getattr(action.type, '__name__', 'str')
    pool = NUMBERS if kind in ('int', 'float') else files * 3 + WORDS
    return [chance.choice(pool if chance.random() < 0.9 else NUMBERS + WORDS) for _ in range(count)]


def flags_of(parser, chance: random.Random, files: list[str], count: int) -> list[str]:
    actions = [action for action in parser._actions if action.option_strings and action.dest != 'help']
    flags = []
    for action in chance.sample(actions, count):
        if action.nargs == 0:
            flags.append(chance.choice(action.option_strings))
        else:
            flags += [action.option_strings[0], *value_of(action, chance, files)]
    if chance.random() < 0.05:
        flags.insert(chance.randrange(len(flags) + 1), chance.choice(WORDS + ['--dept', '--help']))
    return flags


def tear(path: Path, chance: random.Random):
    """Truncates a file, and sometimes appends null bytes."""
    content = path.read_bytes()
    path.write_bytes(content[:chance.randrange(len(content))] + chance.choice([b'', bytes(100)]))


def odd_image(path: Path, chance: random.Random):
    """An image of random mode, format, size and EXIF orientation, sometimes damaged."""
    w, h = (chance.choice([1, 2, 7, 31, 32, 33, 100]) for _ in range(2))
    pixels = np.random.default_rng(chance.randrange(2 ** 32)).integers(0, 256, (h, w, 4), dtype=np.uint8)
    mode = chance.choice('1 L LA P PA RGB RGBA CMYK YCbCr LAB HSV I F'.split())
    kind = chance.choice('PNG JPEG TIFF GIF WEBP BMP PPM TGA ICO JPEG2000 AVIF PCX'.split())
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = chance.choice([1, 3, 6, 8, 0, 9, 65535])
    options = dict(exif=exif) if chance.random() < 0.3 else {}
    try:
        Image.fromarray(pixels).convert('RGB').convert(mode).save(file, kind, **options)
    except Exception:                                       # not every format supports every mode
        Image.fromarray(pixels).save(file, 'PNG')
    content = bytearray(file.getvalue())
    for _ in range(chance.choice([0, 0, 1, 5, 50])):
        content[chance.randrange(len(content))] = chance.randrange(256)
    path.write_bytes(content[:chance.choice([len(content)] * 4 + [chance.randrange(len(content) + 1)])])


def odd_folder(folder: Path, chance: random.Random):
    """Class folders with the irregularities of real ones."""
    names = ['cat', 'dog', 'bird', 'кот', '.hidden', 'a b', 'train', 'val', '\udcff', 'x.png']
    roots = [folder / chance.choice(['train', 'train', '.', 'Train', 'in/train'])]
    for split in roots + [folder / 'val'] * (chance.random() < 0.5):
        for name in chance.sample(names, chance.randrange(5)):
            place = split / name / chance.choice(['', '', 'deep/er'])
            place.mkdir(parents=True, exist_ok=True)
            for i in range(chance.choice([0, 1, 9, 20])):
                ending = chance.choice(['{}.png', '{}.png', '{}.JPG', '._{}.png', '{}.txt', '{}', '{}.gif'])
                path = place / ending.format(i)
                if path.exists() or path.is_symlink():
                    continue
                if chance.random() < 0.9:
                    Image.new('RGB', (40, 30), (i, 99, 7)).save(path, 'PNG')
                elif chance.random() < 0.5:
                    odd_image(path, chance)
                else:
                    path.symlink_to(chance.choice(['/nowhere', '..', path.name]))


# ----------------------------------------------------------------------------------------------------- cases
def flags_of_train(folder: Path, chance: random.Random):
    files = ['run', 'run/var.pt', 'run/vqvae.pt', 'run/var.csv', 'nowhere', 'photo.png', 'new']
    flags = flags_of(train.build_parser(), chance, files, chance.choice([1, 1, 2, 3]))
    steps = TINY.index('--vqvae-steps')                             # --budget-minutes replaces them
    return train.main, [*TINY[:steps], *TINY[steps + 4 * ('--budget-minutes' in flags):], *flags]


def flags_of_sample(folder: Path, chance: random.Random):
    files = 'run run/var.pt run/vqvae.pt nowhere photo.png new.png new.npz new/x.jpg new.pt'.split()
    flags = flags_of(sample.build_parser(), chance, files, chance.choice([1, 2, 3, 5]))
    flags = [flag for flag in flags if flag != '--official']        # would download weights
    count = chance.choice([*NUMBERS, '2', '2', '2']).replace('2000000', '20')       # would take too long
    return sample.main, ['run/var.pt', *flags, '--count', count]


def torn_file(folder: Path, chance: random.Random):
    name = chance.choice(['last.pt', 'vqvae.pt', 'var.pt'])
    tear(folder / 'run' / name, chance)
    if chance.random() < 0.3:
        return sample.main, ['run/var.pt', '--count', '2', '--out', 'x.png']
    return train.main, chance.choice([
        ['--out', 'run', '--resume'], [*TINY, '--out', 'run', '--overwrite'], [*TINY, '--out', 'run'],
        [*TINY, '--stage', 'var', '--tokenizer', f'run/{name}']])


def image_to_edit(folder: Path, chance: random.Random):
    odd_image(folder / 'odd.img', chance)
    what = chance.choice(['--box 0 0 .5 .5', '--keep-scales 1', '--mask photo.png', '--mask odd.img'])
    image = chance.choice(['odd.img', 'photo.png'])
    return sample.main, ['run/var.pt', '--image', image, '--out', 'x.png', *what.split()]


def folder_to_train_on(folder: Path, chance: random.Random):
    odd_folder(folder / 'photos', chance)
    return train.main, [*TINY, '--batch-size', '2', '--data-dir', 'photos', '--workers', '2']


CASES = [flags_of_train, flags_of_sample, torn_file, image_to_edit, folder_to_train_on]


# --------------------------------------------------------------------------------------------------- verdict
def make_run(folder: Path):
    """A trained run and a photo, from which all cases start."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        steps = '--vqvae-steps 4 --var-steps 4 --stop-after-minutes 9'.split()
        train.main([*TINY, *steps, '--out', str(folder / 'run')])
    images, _ = train.draw_shapes(1, 0)
    sample.save_image(folder / 'photo.png', sample.grid(images, 1))


def attempt(main, argv: list[str], seconds: float) -> tuple[object, str]:
    """Runs a command. Returns its exit status or exception, and its output."""
    def hang(number, frame):
        raise Hang(f'takes more than {seconds} seconds')

    said, before = io.TextIOWrapper(io.BytesIO(), 'utf-8', write_through=True), sys.argv
    sys.argv = ['command', *argv]
    signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    end = 0
    try:
        with redirect_stdout(said), redirect_stderr(said), warnings.catch_warnings(record=True) as warned:
            sample.run_command(main)
    except SystemExit as stop:
        end = stop.code or 0
    except BaseException as error:
        end = error
        said.write(''.join(traceback.format_exception(error)))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.argv = before
    said.seek(0)
    return end, said.read() + ''.join(f'warning: {warning.message}\n' for warning in warned)


def fault_of(end, said: str, folder: Path) -> str | None:
    """Why a case failed, or None."""
    lines = [line for line in re.split('[\r\n]', said) if line.startswith('error: ')]
    if isinstance(end, BaseException):
        return f'{type(end).__name__}: {sample.one_line(end)}'
    if end not in (0, 2) or (end == 2) != (len(lines) == 1):
        return f'exit status {end}, {len(lines)} errors'
    if 'Traceback' in said or 'Warning' in said or 'warning: ' in said:
        return 'a traceback or a warning'
    if left := [path.name for path in folder.rglob('*') if path.suffix == '.tmp']:
        return f'left behind: {left}'
    return None


def try_case(number: int, seed: int, origin: Path) -> tuple[str, str | None, str]:
    """Runs a case: returns the command, its fault and its output. Leaves the run in `origin` unchanged."""
    chance, here = random.Random(f'{seed} {number}'), os.getcwd()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shutil.copytree(origin, folder, dirs_exist_ok=True)
        os.chdir(folder)
        try:
            kind = CASES[number % len(CASES)]
            main, argv = kind(folder, chance)
            end, said = attempt(main, argv, SECONDS)
            return f'{kind.__name__}: {argv}', fault_of(end, said, folder), said
        finally:
            os.chdir(here)


def main():
    parser = sample.Parser(description=__doc__)
    parser.add_argument('--count', type=int, default=2000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', type=int, help='run only the case with this number')
    args, faults = parser.parse_args(), 0
    with tempfile.TemporaryDirectory() as origin:
        make_run(Path(origin))
        for number in tqdm(range(args.count) if args.only is None else [args.only], unit='case'):
            what, fault, said = try_case(number, args.seed, Path(origin))
            faults += fault is not None
            if fault or args.only is not None:
                tqdm.write(f'{number}: {fault}\n    {what}' + f'\n{said}' * (args.only is not None))
    print(f'{faults} faults')
    sys.exit(faults > 0)


if __name__ == '__main__':
    main()
