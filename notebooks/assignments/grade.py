"""Grades an assignment: runs a notebook in a process of its own and prints its points, task by task.

    python notebooks/assignments/grade.py my-A1.ipynb
    python notebooks/assignments/grade.py my-A1.ipynb --seed 7              # the same questions, other numbers

Which assignment it is, the notebook's metadata say, or else its file's name. The notebook runs top to bottom;
a cell that fails is named, and the rest runs on; a cell that begins with '# not for the grader' is left out.
Then the functions that it defines are asked (probes.py), and what they return is compared here with what the
reference solution returns. The student's code never shares a process with the comparison or the solution, and
works on a copy of the project: it can't award itself points. (It isn't locked in: run strangers' notebooks
in a container.) A4 has no solution to compare with; its tokenizer is measured here.
"""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]
from probes import A4_BATCH, A4_BATCHES, TASKS                                          # noqa: E402
from sample import Parser, UserError, check, run_command                                # noqa: E402
from train import draw_shapes, to_float                                                 # noqa: E402
from vqvae import VQVAE, VQVAEConfig                                                    # noqa: E402

SECONDS = {'A1': 60, 'A2': 60, 'A3': 60, 'A4': 600}     # for each cell and each task
PRINTED = 2 ** 20                       # bytes that a notebook may print
ATTEMPTS = 6                            # a notebook is run anew without what hung or died, so many times
ROUNDING = {'sample_tokens': 0.85}      # share of tokens that must agree: one flip changes all that follows
A4_BITS, A4_PARAMETERS = 680, 650_000   # limits: bits a picture is written in; size of the tokenizer
A4_BASELINE, A4_GOAL = 20.5, 23.0       # dB: where points begin, and where all are had
COPIED = ('*.py', 'notebooks/cifar10.pt', 'notebooks/assignments/probes.py')
PROTECTED = (*COPIED, 'notebooks/*.py', 'notebooks/assignments/*.py', 'notebooks/assignments/solutions/*.ipynb')


# ------------------------------------------------------------------------------- running a notebook
def watch(process: subprocess.Popen, folder: Path, printed: Path, seconds: float) -> str:
    """Waits for probes.py to end; '' if all went well, or what the step that it was at did wrong."""
    step, since = '', time.monotonic()
    while process.poll() is None:
        time.sleep(0.02)
        if current_step(folder) != step:
            step, since = current_step(folder), time.monotonic()
        if time.monotonic() - since > seconds:
            return f'ran longer than {seconds:g} seconds, and was stopped'
        if printed.stat().st_size > PRINTED:
            return f'printed more than {PRINTED >> 20} MiB, and was stopped'
    if printed.stat().st_size > PRINTED:
        return f'printed more than {PRINTED >> 20} MiB'
    return '' if process.returncode == 0 and current_step(folder) == 'done' else \
        f'ended the process (exit status {process.returncode})'


def current_step(folder: Path) -> str:
    try:
        return (folder / 'step').read_text(errors='replace')[:60]
    except OSError:
        return ''


def end(process: subprocess.Popen):
    """Kills the process and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL) if os.name == 'posix' else process.kill()
    except ProcessLookupError:
        pass
    process.wait()


def read_results(path: Path) -> list:
    """What probes.py wrote, or [] where the notebook has put something else in its place."""
    try:
        found = torch.load(path, weights_only=True)         # which runs nobody's code
        return found if isinstance(found, list) else []
    except Exception:                                       # torch.load fails in many ways
        return []


def run_notebook(notebook: bytes, assignment: str, seed: int, seconds: float) -> tuple[dict, list[str]]:
    """Results of each task, (points, what, value, error) a check, and what is to be said of the notebook."""
    with tempfile.TemporaryDirectory() as scratch:
        copy, folder, printed = Path(scratch, 'project'), Path(scratch, 'results'), Path(scratch, 'printed')
        for path in (path for pattern in COPIED for path in ROOT.glob(pattern)):
            (copy / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy / path.relative_to(ROOT))
        place = copy / 'notebooks' / 'assignments'
        (place / 'notebook.ipynb').write_bytes(notebook)
        folder.mkdir()
        environment = dict(os.environ, MPLBACKEND='Agg', PYTHONDONTWRITEBYTECODE='1')
        skipped, remarks = [], []
        for _ in range(ATTEMPTS):
            command = [sys.executable, 'probes.py', 'notebook.ipynb', assignment, str(folder), str(seed)]
            with open(printed, 'wb') as output:
                process = subprocess.Popen([*command, *skipped], cwd=place, stdin=subprocess.DEVNULL, stdout=output,
                                           stderr=output, env=environment, start_new_session=True)
                try:
                    wrong = watch(process, folder, printed, seconds)
                finally:
                    end(process)
            step = current_step(folder)
            if wrong:
                remarks.append(f'{step}: {wrong}')
            if not wrong or step in skipped or not step.startswith(('cell ', 'task ')):
                break
            skipped.append(step)
        remarks += [f'{cell}: {error}' for cell, error in read_results(folder / 'complaints')]
        return {task.__name__: read_results(folder / task.__name__) for task in TASKS[assignment]}, remarks


@lru_cache
def reference(assignment: str, seed: int) -> dict:
    solution = (HERE / 'solutions' / f'{assignment}.ipynb').read_bytes()
    results, remarks = run_notebook(solution, assignment, seed, SECONDS[assignment])
    assert not remarks and all(results.values()), remarks
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
        if not isinstance(found, list) or len(found) != len(expected):
            return f'expected {show(expected)}, found {show(found)}'
        lines = [(i, difference(*pair, share)) for i, pair in enumerate(zip(expected, found))]
        return next((f'item {i}: {line}' for i, line in lines if line), '')
    try:
        expected, found = torch.as_tensor(expected), torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        return f'expected {show(expected)}, found {show(found)}'
    if expected.is_floating_point():
        found = found.double() if found.is_floating_point() else found
        expected = expected.double()
    if expected.shape == found.shape and expected.dtype == found.dtype:
        same = torch.isclose(expected, found, rtol=1e-4, atol=1e-6) if expected.is_floating_point() \
            else expected == found
        if same.double().mean() >= (1.0 if expected.is_floating_point() else share):
            return ''
        wrong = (~same).flatten().nonzero()[0].item()
        return (f'expected {show(expected)}, found {show(found)}; {1 - same.double().mean():.0%} differ, the first '
                f'at entry {wrong}: {expected.flatten()[wrong].item():.6g}, found {found.flatten()[wrong].item():.6g}')
    return f'expected {show(expected)}, found {show(found)}'


def judge_tokenizer(value, seed: int) -> tuple[int, str]:
    """Points of A4 and the line that says why: PSNR of pictures that nobody trained on."""
    try:
        settings, weights = value
        config = VQVAEConfig(**{key: tuple(item) if isinstance(item, list) else item
                                for key, item in settings.items()})
        tokenizer = VQVAE(config)
        tokenizer.load_state_dict(weights)
    except Exception as error:                              # it may be anything
        return 0, f'expected a trained VQVAE, found {show(value)} ({type(error).__name__})'
    bits = sum(tokenizer.scale_lengths) * math.log2(config.vocab_size)
    parameters = sum(weight.numel() for weight in tokenizer.parameters())
    if bits > A4_BITS or parameters > A4_PARAMETERS or config.image_size != 32:
        return 0, (f'expected 32x32 pictures, at most {A4_BITS} bits each and {A4_PARAMETERS:,} parameters, found '
                   f'{config.image_size}x{config.image_size}, {bits:g} and {parameters:,}')
    pictures = to_float(draw_shapes(1000, seed=seed + 10 ** 6)[0])
    with torch.no_grad():
        error = F.mse_loss(tokenizer.eval().decode(tokenizer.encode(pictures)), pictures).item()
    psnr = -10 * math.log10(error / 4) if 0 < error < math.inf else 0.0
    points = 4 + int(16 * min(1.0, max(0.0, (psnr - A4_BASELINE) / (A4_GOAL - A4_BASELINE))))
    return points, (f'leaderboard: | {psnr:.2f} dB | {bits:g} bits | scales {" ".join(map(str, config.scales))} | '
                    f'{config.vocab_size} codes | {parameters:,} parameters |' +
                    ('' if points == 20 else f' expected: {A4_GOAL} dB for all points'))


def points_of_task(name: str, expected: list, found: list, seed: int) -> tuple[int, int, list[str]]:
    """Points, how many there are, and a line for each check that failed."""
    reached, lines = 0, []
    for i, (points, what, value, _) in enumerate(expected):
        try:
            _, _, answer, error = found[i]
        except (IndexError, TypeError, ValueError):
            answer, error = None, 'not reached'
        if error:
            wanted = '' if value is None else f'expected {show(value)}, but '
            lines.append(f'{what}: {wanted}{error}')
        elif name == 'train_tokenizer':
            reached, line = judge_tokenizer(answer, seed)
            lines.append(line)
        else:
            wrong = difference(value, answer, ROUNDING.get(name, 1.0))
            reached += 0 if wrong else points
            lines += [f'{what}: {wrong}'] if wrong else []
    return reached, sum(row[0] for row in expected), lines


def grade(notebook: bytes, assignment: str, seed: int = 0, seconds: float | None = None) -> tuple[dict, list[str]]:
    """{task: (points, of so many, lines that say what was expected)} and remarks about the notebook.

    Raises UserError if the notebook has changed the project's own files, which are put back.
    """
    kept = {path: path.read_bytes() for pattern in PROTECTED for path in ROOT.glob(pattern)}
    open_ended = [(20, f'a tokenizer trained on {A4_BATCHES * A4_BATCH} pictures', 'a VQVAE', '')]
    expected = {'train_tokenizer': open_ended} if assignment == 'A4' else reference(assignment, seed)
    results, remarks = run_notebook(notebook, assignment, seed, seconds or SECONDS[assignment])
    changed = [path for path, content in kept.items() if not path.exists() or path.read_bytes() != content]
    for path in changed:
        path.write_bytes(kept[path])
    names = ', '.join(path.name for path in changed)
    check(not changed, f'the notebook changed {names}, which has been put back; no points')
    return {name: points_of_task(name, rows, results[name], seed) for name, rows in expected.items()}, remarks


def read_notebook(path: Path) -> tuple[bytes, str]:
    """The notebook as it stands, and which assignment it is."""
    check(path.is_file(), f'{path}: no such file; name a notebook, such as notebooks/assignments/A1.ipynb')
    try:
        content = path.read_bytes()
        cells, metadata = (json.loads(content)[key] for key in ('cells', 'metadata'))
        for cell in cells:
            ''.join(cell['source']), cell['cell_type'].split()
        named = str(metadata.get('assignment'))
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror})') from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'{path}: not a Jupyter notebook (version 4)') from None
    known = [name for name in TASKS if name == named] or [name for name in TASKS if name in path.name]
    check(known, f'{path}: not known which assignment this is; say so in its name, as in my-A1.ipynb')
    return content, known[0]


def main(argv: list[str]):
    parser = Parser(prog='grade.py', description=__doc__)
    parser.add_argument('notebook')
    parser.add_argument('--seed', type=int, default=0, help='of the numbers that tasks are asked with [0]')
    parser.add_argument('--seconds', type=float, help='limit for each cell and each task [60; A4: 600]')
    args = parser.parse_args(argv)
    check(args.seed >= 0, f'--seed {args.seed}: must be 0 or more')
    check(args.seconds is None or args.seconds > 0, f'--seconds {args.seconds}: must be above 0')
    content, assignment = read_notebook(Path(args.notebook))
    tasks, remarks = grade(content, assignment, args.seed, args.seconds)
    for remark in remarks:
        print(f'  {remark}')
    for name, (points, of, lines) in tasks.items():
        print(f'{name:16} {points:2}/{of}')
        for line in lines:
            print(f'    {line}')
    print(f'{assignment}: {sum(row[0] for row in tasks.values())}/{sum(row[1] for row in tasks.values())}')


if __name__ == '__main__':
    run_command(main)
