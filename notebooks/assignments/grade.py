"""Grades an assignment: runs a notebook in a process of its own and prints its points, task by task.

    python notebooks/assignments/grade.py my-A1.ipynb
    python notebooks/assignments/grade.py my-A1.ipynb --seed 7          # the same questions, other numbers

Which assignment it is, the notebook's metadata say, or else its name. The notebook runs top to bottom; a
cell that fails is named, and the rest runs on; a cell that begins with '# not for the grader' is left
out. Then the functions that it defines are asked (probes.py), and what they return is compared here with
what the reference solution returns. The student's code never shares a process with the comparison or the
solution, and works on a copy of the project: it can't award itself points. (It isn't locked in: run
strangers' notebooks in a container.) A4 has no solution to compare with; its tokenizer is measured here.
"""
import io
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent)]
from measure import psnr                                                                # noqa: E402
from probes import A4_BATCH, A4_BATCHES, PRINTED, TASKS                                 # noqa: E402
from sample import Parser, UserError, check, run_command                                # noqa: E402
from train import draw_shapes, to_float                                                 # noqa: E402
from vqvae import VQVAE, VQVAEConfig                                                    # noqa: E402

SECONDS = {'A1': 60, 'A2': 60, 'A3': 60, 'A4': 300}     # for each cell and each task; five times that in all
RETURNED = 2 ** 26                      # bytes that a task may return
ROUNDING = {'sample_tokens': 0.85}      # share of tokens that must agree: one flip changes all that follows
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
A4_BITS, A4_PARAMETERS = 680, 650_000   # limits: bits a picture is written in; size of the tokenizer
A4_START, A4_BASELINE, A4_GOAL = 18.0, 20.5, 24.0   # dB: what 4, more than 4, and all points ask for
COPIED = ('*.py', 'notebooks/cifar10.pt', 'notebooks/assignments/probes.py')
PROTECTED = (*COPIED, 'notebooks/*.py', 'notebooks/assignments/*.py',
             'notebooks/assignments/solutions/*.ipynb')


# ------------------------------------------------------------------------------- running a notebook
def read(path: Path, most: int) -> bytes:
    """A plain file of at most so many bytes, or b'': a notebook may have put anything in its place."""
    try:
        status = path.lstat()
        return path.read_bytes() if stat.S_ISREG(status.st_mode) and status.st_size <= most else b''
    except OSError:
        return b''


def current_step(folder: Path) -> str:
    text = read(folder / 'step', 99).decode(errors='replace')
    return text if re.fullmatch(r'code cell \d+|task \w+|done', text) else ''


def read_results(path: Path, *types: type) -> list[tuple]:
    """The rows of these types that probes.py wrote; fewer where the notebook has meddled with them."""
    try:
        found = torch.load(io.BytesIO(read(path, RETURNED)), weights_only=True)     # runs nobody's code
        return [row for row in found if len(row) == len(types) and all(map(isinstance, row, types))]
    except Exception:                                       # torch.load fails in many ways
        return []


def watch(process: subprocess.Popen, folder: Path, printed: int, seconds: float, deadline: float) -> str:
    """Waits for probes.py to end; '' if all went well, or what the step that it was at did wrong."""
    step, since = '', time.monotonic()
    while process.poll() is None:
        time.sleep(0.02)
        now = time.monotonic()
        if current_step(folder) != step:
            step, since = current_step(folder), now
        if now > min(since + seconds, deadline):
            return f'ran longer than {min(seconds, deadline - since):.0f} seconds, and was stopped'
        if os.fstat(printed).st_size > PRINTED:
            break
    if os.fstat(printed).st_size > PRINTED:
        return f'printed more than {PRINTED >> 20} MiB, and was stopped'
    return '' if current_step(folder) == 'done' else f'ended the process (exit status {process.returncode})'


def end(process: subprocess.Popen):
    """Kills the process and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL) if os.name == 'posix' else process.kill()
    except ProcessLookupError:
        pass
    process.wait()


def run_notebook(notebook: bytes, assignment: str, seed: int, seconds: float) -> tuple[dict, list[tuple]]:
    """Results of each task, (points, what, value, error) a check, and remarks on the notebook, (step, text).

    A step that hangs or dies is left out in a new attempt, until the rest has run or the time is over.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        copy, folder = Path(scratch, 'project'), Path(scratch, 'results')
        for path in (path for pattern in COPIED for path in ROOT.glob(pattern)):
            (copy / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy / path.relative_to(ROOT))
        place = copy / 'notebooks' / 'assignments'
        (place / 'notebook.ipynb').write_bytes(notebook)
        folder.mkdir()
        environment = dict(os.environ, MPLBACKEND='Agg', PYTHONDONTWRITEBYTECODE='1')
        command = [sys.executable, 'probes.py', 'notebook.ipynb', assignment, str(folder), str(seed)]
        skipped, remarks, deadline = [], [], time.monotonic() + 5 * seconds
        while True:
            with tempfile.TemporaryFile() as printed:
                process = subprocess.Popen(
                    [*command, *skipped], cwd=place, env=environment, start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=printed, stderr=printed)
                try:
                    wrong = watch(process, folder, printed.fileno(), seconds, deadline)
                finally:
                    end(process)
            step = current_step(folder)
            remarks += [(step or 'the notebook', wrong)] * bool(wrong)
            if not wrong or not step or step in [*skipped, 'done'] or time.monotonic() > deadline:
                break
            skipped.append(step)
        remarks += read_results(folder / 'complaints', str, str)
        names = [task.__name__ for task in TASKS[assignment]]
        return {name: read_results(folder / name, int, str, object, str) for name in names}, remarks


@lru_cache
def reference(assignment: str, seed: int) -> dict:
    """What the solution returns."""
    path = HERE / 'solutions' / f'{assignment}.ipynb'
    check(path.is_file(), f'{path}: is missing; answers are compared with what the solution returns')
    results, remarks = run_notebook(path.read_bytes(), assignment, seed, SECONDS[assignment])
    failed = [error for rows in results.values() for *_, error in rows if error]
    check(all(results.values()) and not remarks and not failed,
          f'the reference solution failed on this machine ({[*remarks, *failed]})')
    return results


# ------------------------------------------------------------------------------- comparing
def show(value) -> str:
    if isinstance(value, torch.Tensor):
        numbers = ', '.join(f'{x:.4g}' if value.is_floating_point() else str(x)
                            for x in value.flatten()[:8].tolist())
        dots = ', ...' if value.numel() > 8 else ''
        return f'{str(value.dtype)[6:]} {tuple(value.shape)} [{numbers}{dots}]'
    if isinstance(value, list) and any(isinstance(item, (list, torch.Tensor)) for item in value):
        return f'a list of {len(value)}: {show(value[0])}, ...'
    return str(value)[:80]


def difference(expected, found, share: float = 1.0) -> str:
    """'' if `found` is what was expected, or else a line that says how they differ.

    share: how many of the entries must agree, where they are whole numbers.
    """
    if isinstance(expected, list) and any(isinstance(item, (list, torch.Tensor)) for item in expected):
        found = list(found) if isinstance(found, torch.Tensor) and found.dim() else found
        if not isinstance(found, list) or len(found) != len(expected):
            return f'expected {show(expected)}, found {show(found)}'
        lines = [(i, difference(*pair, share)) for i, pair in enumerate(zip(expected, found))]
        return next((f'item {i}: {line}' for i, line in lines if line), '')
    try:
        expected, found = torch.as_tensor(expected), torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        return f'expected {show(expected)}, found {show(found)}'
    for kinds, common in ((FLOATS, torch.float64), (INTEGERS, torch.int64)):        # of any width
        if expected.dtype in kinds and found.dtype in kinds:
            expected, found = expected.to(common), found.to(common)
    if expected.shape == found.shape and expected.dtype == found.dtype:
        if expected.is_floating_point():
            same, share = torch.isclose(expected, found, rtol=1e-4, atol=1e-6), 1.0
        else:
            same = expected == found
        if same.double().mean() >= share:
            return ''
        wrong = (~same).flatten().nonzero()[0].item()
        wanted, got = (x.flatten()[wrong].item() for x in (expected, found))
        return (f'expected {show(expected)}, found {show(found)}; {1 - same.double().mean():.0%} differ, '
                f'entry {wrong} first: {wanted:.6g} was expected, {got:.6g} found')
    return f'expected {show(expected)}, found {show(found)}'


def judge_tokenizer(value, seed: int) -> tuple[int, str]:
    """Points of A4 and the line that says why: PSNR of pictures that nobody trained on."""
    try:
        settings, weights = value
        config = VQVAEConfig(**{key: tuple(item) if isinstance(item, list) else item
                                for key, item in settings.items()})
        bits = sum(side * side for side in config.scales) * math.log2(config.vocab_size)
        parameters = sum(weight.numel() for weight in weights.values())
        if (bits > A4_BITS or parameters > A4_PARAMETERS or config.image_size != 32
                or max(config.channels, *config.channel_mults, config.res_blocks) > 512):
            return 0, (f'expected pictures of 32x32, at most {A4_BITS} bits, {A4_PARAMETERS:,} parameters; '
                       f'found {config.image_size}x{config.image_size}, {bits:g}, {parameters:,}')
        tokenizer = VQVAE(config)
        tokenizer.load_state_dict(weights)
    except Exception as error:                              # it may be anything
        return 0, f'expected a VQVAE, trained; what came back does not make one ({error})'
    pictures, _ = draw_shapes(1000, seed=seed + 10 ** 6)
    reached = psnr(tokenizer.eval().decode(tokenizer.encode(to_float(pictures))), pictures)
    points = int(16 * min(1.0, max(0.0, (reached - A4_BASELINE) / (A4_GOAL - A4_BASELINE))))     # nan: 0
    points += 4 * (reached >= A4_START)
    scales = ' '.join(map(str, config.scales))
    return points, (f'leaderboard: | {reached:.2f} dB | {bits:g} bits | scales {scales} | '
                    f'{config.vocab_size} codes | {parameters:,} parameters |' +
                    ('' if points == 20 else f' expected: {A4_GOAL} dB for all points'))


def points_of_task(name: str, expected: list, found: list, seed: int) -> tuple[int, int, list[str]]:
    """Points, how many there are, and a line for each check that failed."""
    reached, lines = 0, []
    for i, (points, what, value, _) in enumerate(expected):
        *_, answer, error = found[i] if i < len(found) else (None, 'not reached')
        if error.startswith('NotImplementedError'):
            lines.append(f'{what}: not written yet, expected {show(value)}')
        elif error:
            lines.append(f'{what}: expected {show(value)}, but {error}')
        elif name == 'train_tokenizer':
            reached, line = judge_tokenizer(answer, seed)
            lines.append(line)
        else:
            try:
                wrong = difference(value, answer, ROUNDING.get(name, 1.0))
            except Exception as error:                      # it may be anything
                wrong = f'expected {show(value)}, which what came back cannot be compared with ({error})'
            reached += 0 if wrong else points
            lines += [f'{what}: {wrong}'] if wrong else []
    return reached, sum(row[0] for row in expected), lines


def put_back(kept: dict[Path, bytes]) -> list[str]:
    """Names of the files that aren't what they were; those are renamed, and the old ones put back."""
    present = {path for pattern in PROTECTED for path in ROOT.glob(pattern)}
    changed = [path for path in sorted(present | set(kept))
               if not path.is_file() or path.read_bytes() != kept.get(path)]
    for path in changed:
        if path.exists():
            path.rename(path.with_name(path.name + '.changed'))
        if path in kept:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(kept[path])
    return [path.name for path in changed]


def grade(notebook: bytes, assignment: str, seed: int = 0, seconds: float | None = None) -> tuple:
    """{task: (points, of so many, lines that say what was expected)}, remarks (step, text) on the notebook.

    Raises UserError if the notebook has changed the project's own files.
    """
    kept = {path: path.read_bytes() for pattern in PROTECTED for path in ROOT.glob(pattern)}
    if assignment == 'A4':
        whole = (20, f'a tokenizer trained on {A4_BATCHES * A4_BATCH} pictures', 'a VQVAE', '')
        expected = {'train_tokenizer': [whole]}
    else:
        expected = reference(assignment, seed)
    results, remarks = run_notebook(notebook, assignment, seed, seconds or SECONDS[assignment])
    changed = put_back(kept)
    check(not changed, f'the notebook changed {", ".join(changed)}: put back, its own version kept beside it '
          'as .changed; no points')
    return {name: points_of_task(name, rows, results[name], seed)
            for name, rows in expected.items()}, remarks


def read_notebook(path: Path) -> tuple[bytes, str, list[str]]:
    """The notebook as it stands, which assignment it is, and the first line of each of its code cells."""
    try:
        check(path.is_file(), f'{path}: is no file; name a notebook, such as notebooks/assignments/A1.ipynb')
        content = path.read_bytes()
        cells, metadata = (json.loads(content)[key] for key in ('cells', 'metadata'))
        sources = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
        named = str(metadata.get('assignment'))
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror})') from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f'{path}: not a Jupyter notebook (version 4)') from None
    known = [name for name in TASKS if name == named] or [name for name in TASKS if name in path.name]
    check(known, f'{path}: not known which assignment this is; say so in its name, as in my-A1.ipynb')
    return content, known[0], [source.strip().partition('\n')[0][:60] for source in sources]


def printable(text: str) -> str:
    """On one line, and nothing that a terminal would obey."""
    return ''.join(c if c.isprintable() else ' ' for c in text)


def main(argv: list[str]):
    parser = Parser(prog='grade.py', description=__doc__)
    parser.add_argument('notebook')
    parser.add_argument('--seed', type=int, default=0, help='of the numbers that tasks are asked with [0]')
    parser.add_argument('--seconds', type=float, help='limit for each cell and each task [60; A4: 300]')
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors='backslashreplace')
    check(0 <= args.seed < 2 ** 31, f'--seed {args.seed}: must be in [0, 2^31)')
    check(args.seconds is None or 0 < args.seconds < math.inf, f'--seconds {args.seconds}: must be above 0')
    content, assignment, first_lines = read_notebook(Path(args.notebook))
    tasks, remarks = grade(content, assignment, args.seed, args.seconds)
    for step, text in remarks:
        number = int(step.removeprefix('code cell ')) if step.startswith('code cell ') else 0
        line = f' ({first_lines[number - 1]})' if 0 < number <= len(first_lines) else ''
        if not text.startswith('NotImplementedError'):
            print(printable(f'{step}{line}: {text}'))
    for name, (points, of, lines) in tasks.items():
        print(f'{name:16} {points:2}/{of}', *(f'    {printable(line)}' for line in lines), sep='\n')
    print(f'{assignment}: {sum(row[0] for row in tasks.values())}/{sum(row[1] for row in tasks.values())}')


if __name__ == '__main__':
    run_command(main)
