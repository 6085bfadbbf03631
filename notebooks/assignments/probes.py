"""Runs a notebook for grade.py, in a separate process, and runs the checks of tasks.py on its functions.

    python probes.py NOTEBOOK A1 FOLDER SEED [STEP ...]

Runs the notebook's code cells, then calls the student's functions with inputs made from SEED. The
results are written to FOLDER, one file per task. Nothing is judged here, because the student's code shares
this process and could tamper with the judge. Each STEP ('code cell 3', 'task encode') is skipped: it hung or
died before. For the solution, each task is run again with each classic mistake (solutions/mistakes.py).
"""
import json
import os
import re
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
from tasks import TASKS

PRINTED = 2 ** 20                       # limit on the output of a notebook, in bytes
IN_PLACE = dict(top_k=0, top_p=0, cached_step=3, by_heart=0)    # index of the argument it may modify


def snapshot(value):
    """Something that changes if tensors or numbers in `value` do."""
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, torch.Tensor):
        return value.detach().numpy().tobytes()
    if isinstance(value, (list, tuple)):
        return [snapshot(item) for item in value]
    return value if isinstance(value, (int, float)) else None


class Student:
    """The functions that the notebook defined, which must not modify their arguments."""

    def __init__(self, names: dict):
        self.names = names

    def __getattr__(self, name: str):
        if name not in self.names:
            raise NameError(f'{name} is not defined')

        def careful(*args):
            ours = [arg for i, arg in enumerate(args) if i != IN_PLACE.get(name)]
            before = snapshot(ours)
            result = self.names[name](*args)
            if snapshot(ours) != before:
                raise ValueError(f'{name} modifies its arguments, which must stay unchanged')
            return result
        return careful


def plain(value, depth=0):
    """A copy of tensors, numbers and lists of them, which can be loaded without running any code."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = torch.as_tensor(value)
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized:
        return value.detach().cpu().as_subclass(torch.Tensor).clone()
    if isinstance(value, (list, tuple)) and depth < 3:
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, dict) and depth < 3:
        return {str(key): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (bool, float)) or isinstance(value, str) and len(value) < 100:
        return value
    if isinstance(value, int) and abs(value) < 2 ** 63:
        return int(value)
    raise TypeError(f'{type(value).__name__} is not a supported return value')


def describe(error: BaseException) -> str:
    """What was raised, and where in the notebook."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f'{frame.filename}, line {frame.lineno}' for frame in frames
              if frame.filename.startswith('code cell ')]
    try:
        text = f': {error}'
    except Exception:                       # a student's own exception class can fail here
        text = ''
    return type(error).__name__ + text.rstrip(': ')[:200] + (f' ({places[-1]})' if places else '')


def compiled(source: str, name: str):
    """A cell's code; lines of Jupyter syntax (%magic, !command, name?) are skipped if Python rejects them."""
    try:
        return compile(source, name, 'exec')
    except SyntaxError:
        jupyters = r'^(\s*)(%%?[a-z].*|!(?!=).*|[\w.]+\?+ *)$'
        return compile(re.sub(jupyters, r'\1pass', source, flags=re.M), name, 'exec')


def write(path: Path, content):
    temporary = path.with_suffix('.part')
    torch.save(content, temporary)
    os.replace(temporary, path)


def end_if_talkative():
    """Ends the process if it printed too much, while `step` still names the cause."""
    print(end='', flush=True)
    if os.fstat(1).st_size > PRINTED:
        os._exit(1)


def evaluate(task, student: Student, seed: int) -> list:
    """(points, what, value, error) of each check of a task."""
    found = []
    torch.manual_seed(seed)
    with torch.enable_grad():
        for points, what, compute in task(student, seed):
            try:
                found.append((points, what, plain(compute()), ''))
            except BaseException as error:                      # SystemExit as well
                found.append((points, what, None, describe(error)))
    return found


def main(notebook: str, assignment: str, folder: str, seed: str, *skipped: str):
    folder, names, complaints = Path(folder), {'__name__': '__main__', 'display': print}, []
    content = json.loads(Path(notebook).read_bytes())
    cells = [''.join(cell['source']) for cell in content['cells'] if cell['cell_type'] == 'code']
    for number, source in enumerate(cells, 1):
        step = f'code cell {number}'
        if step in skipped or source.lstrip().startswith('# not for the grader'):
            continue
        (folder / 'step').write_text(step)
        torch.manual_seed(number)                               # the same random numbers in every run
        try:
            exec(compiled(source, step), names)
        except BaseException as error:
            complaints.append((step, describe(error)))
        write(folder / 'complaints', complaints)
        end_if_talkative()
    # from here on torch.empty gives NaN instead of arbitrary values
    torch.use_deterministic_algorithms(True, warn_only=True)
    for task in TASKS[assignment]:
        step = f'task {task.__name__}'
        if step in skipped or (folder / task.__name__).exists():
            continue
        (folder / 'step').write_text(step)
        found = evaluate(task, Student(names), int(seed))
        end_if_talkative()
        write(folder / task.__name__, found)
        for i, source in enumerate(content['metadata'].get('mistakes', {}).get(task.__name__, [])):
            wrong = dict(names)
            exec(compiled(source, 'a mistake'), wrong)
            write(folder / f'{task.__name__}.{i}', evaluate(task, Student(wrong), int(seed)))
    (folder / 'step').write_text('done')


if __name__ == '__main__':
    main(*sys.argv[1:])
    os._exit(0)                             # even if the notebook left threads or exit handlers
