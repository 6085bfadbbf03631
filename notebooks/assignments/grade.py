"""Grades an assignment: runs a notebook in a separate process and prints the points of each task.

    python notebooks/assignments/grade.py my-A1.ipynb
    python notebooks/assignments/grade.py my-A1.ipynb --seed 7          # the same questions, other numbers

The assignment is taken from the notebook's metadata, or else from its file name. The notebook runs from top
to bottom in IPython; a cell that fails is reported, and the rest still run. What needs a network, as !pip
does, and a cell that begins with '# not for the grader' are skipped. Then the checks in tasks.py call its
functions, and the results are compared with those of the reference solution; a result that matches a classic
mistake is reported as that mistake (solutions/mistakes.py). The student's code never shares a process with
the comparison or the solution, and works on a copy of the project, so it can't award itself points. (This is
not a sandbox: run strangers' notebooks in a container.) Trained networks can't be compared with a solution
(all of A4, two tasks of A5); the grader evaluates them itself.
"""
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent)]
from measure import psnr                                                                # noqa: E402
from probes import PRINTED                                                              # noqa: E402
from sample import Parser, UserError, check, run_command                                # noqa: E402
from tasks import A4_BATCH, A4_BATCHES, TASKS, drawings, small_var                      # noqa: E402
from train import draw_shapes, to_float                                                 # noqa: E402
from vqvae import VQVAE, VQVAEConfig                                                    # noqa: E402

SECONDS = dict(A1=60, A2=60, A3=60, A4=300, A5=300)     # per cell and per task; five times that in total
RETURNED = 2 ** 26                      # limit on the size of a task's results, in bytes
ROUNDING = {'sample_tokens': 0.85}      # share of tokens that must agree: one flip changes all later ones
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
A4_BITS, A4_PARAMETERS = 680, 650_000   # limits: bits per image; size of the tokenizer
A4_START, A4_BASELINE, A4_GOAL = 15.0, 17.5, 22.5   # dB needed for 4, for more than 4, and for all points
A5_HEART = {0.1: 6, 0.5: 4, 2.0: 2}     # limits of the loss, in nats per token: points
A5_LOSS, A5_GAP = 5.6, 0.1              # nats: limit for both losses; what f_hat must gain at 4x4
COPIED = ('*.py', 'notebooks/cifar10.pt', 'notebooks/assignments/probes.py', 'notebooks/assignments/tasks.py')


# ------------------------------------------------------------------------------- running a notebook
def read(path: Path, most: int) -> bytes:
    """A regular file of at most `most` bytes, or b'': a notebook can put anything in its place."""
    try:
        status = path.lstat()
        return path.read_bytes() if stat.S_ISREG(status.st_mode) and status.st_size <= most else b''
    except OSError:
        return b''


def current_step(folder: Path) -> str:
    text = read(folder / 'step', 99).decode(errors='replace')
    return text if re.fullmatch(r'code cell \d+|task \w+|done', text) else ''


def read_results(path: Path, *types: type) -> list[tuple]:
    """The rows of these types that probes.py wrote; fewer if the notebook has tampered with them."""
    try:
        found = torch.load(io.BytesIO(read(path, RETURNED)), weights_only=True)     # runs no code
        return [row for row in found if len(row) == len(types) and all(map(isinstance, row, types))]
    except Exception:                                       # torch.load fails in many ways
        return []


def watch(process: subprocess.Popen, folder: Path, printed: int, seconds: float, deadline: float) -> str:
    """Waits for probes.py to end; '' if all went well, or what the current step did wrong."""
    step, since = '', time.monotonic()
    while process.poll() is None and os.fstat(printed).st_size <= PRINTED:
        time.sleep(0.02)
        now = time.monotonic()
        if current_step(folder) != step:
            step, since = current_step(folder), now
        if now > min(since + seconds, deadline):
            return f'ran longer than {min(seconds, deadline - since):.0f} seconds and was stopped'
    if os.fstat(printed).st_size > PRINTED:
        return f'printed more than {PRINTED >> 20} MiB and was stopped'
    return '' if current_step(folder) == 'done' else f'ended the process (exit status {process.returncode})'


def end(process: subprocess.Popen):
    """Kills the process and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL) if os.name == 'posix' else process.kill()
    process.wait()


def run_notebook(notebook: bytes, assignment: str, seed: int, seconds: float, left_out=()) -> tuple:
    """Results per task, (points, what, value, error) per check, and remarks on the notebook, (step, text).

    left_out: steps to skip. A step that hangs or dies is skipped in the next attempt, until the rest has run
    or the time is up.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        copy, folder = Path(scratch, 'project'), Path(scratch, 'results')
        for path in (path for pattern in COPIED for path in ROOT.glob(pattern)):
            (copy / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy / path.relative_to(ROOT))
        place = copy / 'notebooks' / 'assignments'
        (place / 'notebook.ipynb').write_bytes(notebook)
        folder.mkdir()
        env = dict(os.environ, MPLBACKEND='Agg', PYTHONDONTWRITEBYTECODE='1', TERM='dumb', IPYTHONDIR=scratch)
        command = [sys.executable, 'probes.py', 'notebook.ipynb', assignment, str(folder), str(seed)]
        skipped, remarks, deadline = [*left_out], [], time.monotonic() + 5 * seconds
        while True:
            with tempfile.TemporaryFile() as printed:
                process = subprocess.Popen(
                    [*command, *skipped], cwd=place, env=env, start_new_session=True,
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
        names = {path.name for path in folder.iterdir()} - {'step', 'complaints'}
        return {name: read_results(folder / name, int, str, object, str) for name in names}, remarks


def classic_mistakes(assignment: str) -> list[tuple]:
    """(task, what is wrong, code of the solution, its replacement); none if mistakes.py is missing."""
    path = HERE / 'solutions' / 'mistakes.py'
    return runpy.run_path(str(path))['MISTAKES'].get(assignment, []) if path.is_file() else []


@lru_cache
def answers_of_solution(assignment: str, seed: int) -> dict:
    """The solution's results by task, and as task.0, task.1, ... its results with each mistake."""
    path = HERE / 'solutions' / f'{assignment}.ipynb'
    check(path.is_file(), f'{path}: is missing; the grader compares answers with those of the solution')
    notebook = json.loads(path.read_bytes())
    cells = [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == 'code']
    mistakes = notebook['metadata']['mistakes'] = {}
    for task, _, old, new in classic_mistakes(assignment):
        cell = next(cell for cell in cells if f'def {task}(' in cell)
        check(cell.count(old) == 1, f'mistakes.py: {old!r} occurs {cell.count(old)} times in {task}')
        mistakes.setdefault(task, []).append(cell.replace(old, new))
    names = {task.__name__ for task in TASKS[assignment]} - set(JUDGED)
    results, remarks = run_notebook(json.dumps(notebook).encode(), assignment, seed, SECONDS[assignment],
                                    [f'task {name}' for name in JUDGED])
    failed = [error for name in names for *_, error in results.get(name, []) if error]
    check(names <= set(results) and not failed,
          f'the reference solution failed on this machine ({[*remarks, *failed]})')
    return results


def reference(assignment: str, seed: int) -> dict:
    """Expected results: {task: (points, what, value, '') per check}; tasks in JUDGED have a dummy value."""
    names = [task.__name__ for task in TASKS[assignment]]
    answers = {} if set(names) <= set(JUDGED) else answers_of_solution(assignment, seed)
    return {name: [(*JUDGED[name][:2], 'a trained network', '')] if name in JUDGED else answers[name]
            for name in names}


def mistakes_of(assignment: str, task: str, seed: int) -> list[tuple[str, list]]:
    """(what is wrong, what the solution returns with it) for each classic mistake in a task."""
    named = [what for name, what, *_ in classic_mistakes(assignment) if name == task not in JUDGED]
    return [(what, answers_of_solution(assignment, seed)[f'{task}.{i}']) for i, what in enumerate(named)]


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


def difference(expected, found, share: float = 1.0, rtol: float = 1e-4) -> str:
    """'' if `found` matches `expected`, or else a line that says how they differ.

    share: fraction of entries that must agree, unless they are floats; rtol: relative tolerance of floats.
    """
    if isinstance(expected, list) and any(isinstance(item, (list, torch.Tensor)) for item in expected):
        found = list(found) if isinstance(found, torch.Tensor) and found.dim() else found
        if not isinstance(found, list) or len(found) != len(expected):
            return f'expected {show(expected)}, found {show(found)}'
        lines = [(i, difference(*pair, share, rtol)) for i, pair in enumerate(zip(expected, found))]
        return next((f'item {i}: {line}' for i, line in lines if line), '')
    if isinstance(expected, str):
        return '' if str(found).strip().lower() == expected else f'expected {expected}, found {found}'
    exact = isinstance(expected, (torch.Tensor, bool))         # else plain numbers, whose type doesn't matter
    try:
        kind = None if exact else torch.float64
        expected, found = torch.as_tensor(expected, dtype=kind), torch.as_tensor(found, dtype=kind)
    except (TypeError, ValueError, RuntimeError):
        return f'expected {show(expected)}, found {show(found)}'
    for kinds, common in ((FLOATS, torch.float64), (INTEGERS, torch.int64)):        # of any width
        if expected.dtype in kinds and found.dtype in kinds:
            expected, found = expected.to(common), found.to(common)
    if expected.shape == found.shape and expected.dtype == found.dtype:
        if expected.is_floating_point():
            same, share = torch.isclose(expected, found, rtol=rtol, atol=1e-6), 1.0
        else:
            same = expected == found
        if same.double().mean() >= share:
            return ''
        wrong = tuple((~same).nonzero()[0].tolist())
        wanted, got = (x[wrong].item() for x in (expected, found))
        return (f'expected {show(expected)}, found {show(found)}; {1 - same.double().mean():.0%} of entries '
                f'differ (first: entry {wrong}, expected {wanted:.6g}, found {got:.6g})')
    return f'expected {show(expected)}, found {show(found)}'


def judge_tokenizer(value, seed: int) -> tuple[int, str]:
    """Points for A4 and a line that explains them: PSNR on held-out images."""
    try:
        settings, weights = value
        config = VQVAEConfig(**{key: tuple(item) if isinstance(item, list) else item
                                for key, item in settings.items()})
        bits = sum(side * side for side in config.scales) * math.log2(config.vocab_size)
        parameters = sum(weight.numel() for weight in weights.values())
        if (bits > A4_BITS or parameters > A4_PARAMETERS or config.image_size != 32
                or max(config.channels, *config.channel_mults, config.res_blocks) > 512):
            return 0, (f'expected images of 32x32, at most {A4_BITS} bits and {A4_PARAMETERS:,} parameters; '
                       f'found {config.image_size}x{config.image_size}, {bits:g} bits, {parameters:,}')
        tokenizer = VQVAE(config)
        tokenizer.load_state_dict(weights)
    except Exception as error:                              # it can be anything
        return 0, f'expected a trained VQVAE; the returned value does not load as one ({error})'
    pictures, _ = draw_shapes(1000, seed=seed + 10 ** 6)
    reached = psnr(tokenizer.eval().decode(tokenizer.encode(to_float(pictures))), pictures)
    points = int(16 * min(1.0, max(0.0, (reached - A4_BASELINE) / (A4_GOAL - A4_BASELINE))))     # nan: 0
    points += 4 * (reached >= A4_START)
    scales = ' '.join(map(str, config.scales))
    return points, (f'leaderboard: | {reached:.2f} dB | {bits:g} bits | scales {scales} | '
                    f'{config.vocab_size} codes | {parameters:,} parameters |' +
                    ('' if points == 20 else f' expected at least {A4_GOAL} dB for all points'))


def loss_of(weights, seed: int, labels_B, inputs_BLC, tokens_BL) -> torch.Tensor:
    """Cross-entropy of each token, (B, L), for the given VAR with these weights, which can be anything."""
    var = small_var(seed)
    var.load_state_dict(weights)
    with torch.no_grad():
        return F.cross_entropy(var(labels_B, inputs_BLC).mT, tokens_BL, reduction='none')


def judge_by_heart(value, seed: int) -> tuple[int, str]:
    """Points for memorising eight images, and a line with the loss."""
    _, tokens_BL, inputs = drawings(8, seed)
    try:
        loss = loss_of(value, seed, torch.arange(8), inputs['f_hat'], tokens_BL).mean().item()
    except Exception as error:
        return 0, f'expected the given VAR, trained; the returned value does not load as one ({error})'
    points = max([worth for most, worth in A5_HEART.items() if loss < most], default=0)         # nan: 0
    return points, f'{loss:.3f} nats per token' + f', expected less than {min(A5_HEART)}' * (points < 6)


def judge_ablation(value, seed: int) -> tuple[int, str]:
    """Points for the two models, and a line with their losses on held-out images."""
    labels_N, tokens_NL, inputs = drawings(256, seed + 10 ** 6)
    try:
        losses = {name: loss_of(value[name], seed, labels_N, inputs[name], tokens_NL) for name in inputs}
    except Exception as error:
        return 0, f'expected two trained VARs, f_hat and last; the returned value does not load ({error})'
    whole = {name: loss.mean().item() for name, loss in losses.items()}
    config = small_var(seed).config
    finer = {name: loss.split(config.lengths, 1)[config.scales.index(4)].mean().item()
             for name, loss in losses.items()}
    trained = [loss < A5_LOSS for loss in whole.values()]
    points = 2 * sum(trained) + 2 * (all(trained) and finer['last'] - finer['f_hat'] > A5_GAP)
    return points, (f'nats per token: f_hat {whole["f_hat"]:.2f}, last {whole["last"]:.2f}; at 4x4: f_hat '
                    f'{finer["f_hat"]:.2f}, last {finer["last"]:.2f}' + f'; expected both below {A5_LOSS} '
                    f'and a gap above {A5_GAP} at 4x4' * (points < 6))


JUDGED = dict(                          # points, what, and the function that judges it
    train_tokenizer=(20, f'a tokenizer trained on {A4_BATCHES * A4_BATCH} images', judge_tokenizer),
    by_heart=(6, 'eight images memorised', judge_by_heart),
    ablation=(6, 'f_hat against the last scale alone', judge_ablation))


def same(name: str, expected, found) -> str:
    """The difference between two answers to a task, '' if there is none."""
    return difference(expected, found, ROUNDING.get(name, 1.0), 0.005 if name == 'questions' else 1e-4)


def likely_mistake(name: str, wrong: list[tuple[str, list]], found: list, i: int) -> str:
    """The classic mistake that explains answer i; of several, the one that fits most checks."""
    scores = {what: sum(not same(name, row[2], answer[2]) for row, answer in zip(rows, found))
              for what, rows in wrong if not rows[i][3] and not same(name, rows[i][2], found[i][2])}
    return f'; this is what you get {max(scores, key=scores.get)}' if scores else ''


def points_of_task(name: str, expected: list, found: list, seed: int, wrong=()) -> tuple[int, int, list[str]]:
    """Points, their maximum, and a line for each check that failed. wrong: see mistakes_of."""
    reached, lines = 0, []
    for i, (points, what, value, _) in enumerate(expected):
        *_, answer, error = found[i] if i < len(found) else (None, 'no result')
        wanted = 'an answer' if name == 'questions' else show(value)            # keeps the right one secret
        if error.startswith('NotImplementedError'):
            lines.append(f'{what}: not written yet, expected {wanted}')
        elif error:
            lines.append(f'{what}: expected {wanted}, but got {error}')
        elif name in JUDGED:
            reached, line = JUDGED[name][2](answer, seed)
            lines.append(line)
        else:
            try:
                line = same(name, value, answer)
                line = line and (
                    f'expected an answer other than {show(answer)}' if name == 'questions' else line)
                line = line and line + likely_mistake(name, wrong, found, i)
            except Exception as error:                      # it can be anything
                line = f'expected {wanted}, found a value that cannot be compared with it ({error})'
            reached += 0 if line else points
            lines += [f'{what}: {line}'] if line else []
    return reached, sum(row[0] for row in expected), lines


def grade(notebook: bytes, assignment: str, seed: int = 0, seconds: float | None = None) -> tuple:
    """{task: (points, their maximum, lines on what was expected)}, and remarks, (step, text)."""
    expected = reference(assignment, seed)
    content = json.loads(notebook)
    content['metadata'].pop('mistakes', None)               # only solutions have these
    notebook = json.dumps(content).encode()
    results, remarks = run_notebook(notebook, assignment, seed, seconds or SECONDS[assignment])
    return {name: points_of_task(name, rows, results.get(name, []), seed, mistakes_of(assignment, name, seed))
            for name, rows in expected.items()}, remarks


def read_notebook(path: Path) -> tuple[bytes, str, dict[str, str]]:
    """The notebook's bytes, its assignment, and the first line of each of its code cells, by step."""
    try:
        check(path.is_file(), f'{path}: not a file; pass a notebook, such as notebooks/assignments/A1.ipynb')
        content = path.read_bytes()
        cells, metadata = (json.loads(content)[key] for key in ('cells', 'metadata'))
        sources = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
        named = str(metadata.get('assignment'))
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror})') from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f'{path}: not a Jupyter notebook (version 4)') from None
    known = [name for name in TASKS if name == named] or [name for name in TASKS if name in path.name]
    check(len(known) == 1, f'{path}: cannot tell which assignment this is; name the file after one, as in '
          'my-A1.ipynb')
    firsts = (source.strip().partition('\n')[0][:60] for source in sources)
    return content, known[0], {f'code cell {i}': f' ({first})' for i, first in enumerate(firsts, 1)}


def printable(text: str) -> str:
    """The text on one line, without control characters."""
    return ''.join(c if c.isprintable() else ' ' for c in text)


def main(argv: list[str]):
    parser = Parser(prog='grade.py', description=__doc__)
    parser.add_argument('notebook')
    parser.add_argument('--seed', type=int, default=0, help='seed of the inputs to the tasks [0]')
    parser.add_argument('--seconds', type=float, help='time limit for each cell and task [60; A4, A5: 300]')
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors='backslashreplace')
    check(0 <= args.seed < 2 ** 31, f'--seed {args.seed}: must be in [0, 2^31)')
    check(args.seconds is None or 0 < args.seconds < math.inf, f'--seconds {args.seconds}: must be above 0')
    content, assignment, first_lines = read_notebook(Path(args.notebook))
    tasks, remarks = grade(content, assignment, args.seed, args.seconds)
    for step, text in remarks:
        if not text.startswith('NotImplementedError'):
            print(printable(f'{step}{first_lines.get(step, "")}: {text}'))
    for name, (points, of, lines) in tasks.items():
        print(f'{name:16} {points:2}/{of}', *(f'    {printable(line)}' for line in lines), sep='\n')
    print(f'{assignment}: {sum(row[0] for row in tasks.values())}/{sum(row[1] for row in tasks.values())}')


if __name__ == '__main__':
    run_command(main)
