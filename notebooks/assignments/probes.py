"""Runs a notebook for grade.py, in a separate process, and runs the checks of tasks.py on its functions.

    python probes.py NOTEBOOK A1 FOLDER SEED [STEP ...]

Runs the notebook's code cells in IPython, then calls the student's functions with inputs made from SEED. The
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
from IPython.core.interactiveshell import InteractiveShell
from tasks import TASKS

PRINTED = 2 ** 20                       # limit on the output of a notebook, in bytes
NETWORK = r'(\S+ -m )?(pip3?|conda|mamba|apt|apt-get|git|wget|curl)\b'        # commands that are not run
IN_PLACE = dict(top_k=0, top_p=0, cached_step=3, by_heart=0)    # index of the argument it may modify


def snapshot(value):
    """Something that changes if tensors or numbers in `value` do."""
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    if isinstance(value, torch.Tensor):
        return value.detach().numpy().tobytes()
    if isinstance(value, (dict, list, tuple)):
        return [snapshot(item) for item in (value.values() if isinstance(value, dict) else value)]
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
    places = [f'{frame.filename}, line {frame.lineno}' for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename.startswith('code cell ')]
    return f'{type(error).__name__}: {error}'.rstrip(': ')[:200] + (f' ({places[-1]})' if places else '')


class Shell(InteractiveShell):
    """IPython, which collects errors. A statement that lacks a module, a file, a terminal or a network is
    skipped, as are those of its cell that then lack a name. Any other error ends the cell."""
    complaints, enable_gui, ask_exit = [], print, sys.exit      # for %matplotlib and exit()

    def showtraceback(self, exception=None, **_):
        self.complaints.append((self.step, describe(sys.exc_info()[1] or exception[1])))

    showsyntaxerror = showtraceback

    def system(self, command: str):
        if not re.match(NETWORK, command):
            return self.system_raw(command)
        self.complaints.append((self.step, f'!{command}: skipped, because it may need a network'))

    async def run_ast_nodes(self, nodes, *options, result=None, **others):
        skipped = ImportError, OSError, EOFError
        for node in nodes:
            if await super().run_ast_nodes([node], *options, result=result, **others):
                if not isinstance(result.error_in_exec, skipped):
                    return True
                skipped = *skipped, NameError
        return False


def write(path: Path, content):
    """Saves results, or ends the process if it printed too much, while `step` still names the cause."""
    print(end='', flush=True)
    if os.fstat(1).st_size > PRINTED:
        os._exit(1)
    torch.save(content, path.with_suffix('.part'))
    os.replace(path.with_suffix('.part'), path)


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
    folder, shell = Path(folder), Shell()
    content = json.loads(Path(notebook).read_bytes())
    cells = [''.join(cell['source']) for cell in content['cells'] if cell['cell_type'] == 'code']
    for number, source in enumerate(cells, 1):
        step = f'code cell {number}'
        if step in skipped or source.lstrip().startswith('# not for the grader'):
            continue
        (folder / 'step').write_text(step)
        torch.manual_seed(number)                               # the same random numbers in every run
        shell.step, shell.compile.get_code_name = step, lambda *_, step=step: step
        shell.run_cell(source, silent=True)
        write(folder / 'complaints', shell.complaints)
    torch.use_deterministic_algorithms(True, warn_only=True)    # from here on torch.empty gives NaN
    for task in TASKS[assignment]:
        step = f'task {task.__name__}'
        if step in skipped or (folder / task.__name__).exists():
            continue
        (folder / 'step').write_text(step)
        write(folder / task.__name__, evaluate(task, Student(shell.user_ns), int(seed)))
        for i, source in enumerate(content['metadata'].get('mistakes', {}).get(task.__name__, [])):
            exec(source, wrong := dict(shell.user_ns))
            write(folder / f'{task.__name__}.{i}', evaluate(task, Student(wrong), int(seed)))
    (folder / 'step').write_text('done')


if __name__ == '__main__':
    main(*sys.argv[1:])
    os._exit(0)                             # even if the notebook left threads or exit handlers
