"""Runs the walkthroughs top to bottom, each in its own kernel, and checks the rules below.

    python notebooks/run.py                             # as in CI; leaves the files unchanged
    python notebooks/run.py --save                      # writes the outputs into the notebooks
    python notebooks/run.py NOTEBOOK ... --save
    python notebooks/run.py --seed 7                    # every claim should hold with any SEED

The rules: at most 30 cells (except in assignments); no errors or warnings; a cell that plots shows one image
and is followed by a cell that ends in an assertion, then by a caption, '*Figure n. ...'; no line of code is
copied from the project's own files.
"""
import ast
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from sample import Parser, UserError, check, run_command, save_file                     # noqa: E402

CELLS = 30                              # maximum per notebook
SECONDS = 600                           # timeout per cell
COPIED = 32                             # characters: shorter lines, such as plain calls, can coincide


def code_lines(text: str) -> set[str]:
    lines = {line.split('  #')[0].strip() for line in text.splitlines()}
    return {line for line in lines if len(line) >= COPIED and not line.startswith(('import ', 'from ', '#'))}


def copied_lines(notebook) -> list[str]:
    """Lines of code that also occur in the project's files."""
    ours = set().union(*(code_lines(path.read_text()) for path in HERE.parent.glob('*.py')
                         if path.name != 'test_var.py'))
    theirs = set().union(*(code_lines(cell.source) for cell in notebook.cells if cell.cell_type == 'code'))
    return sorted(ours & theirs)


def problems(notebook) -> list[str]:
    """The rules that an executed notebook breaks, one line each."""
    long = len(notebook.cells) > CELLS and 'assignment' not in notebook.metadata
    found = [f'has {len(notebook.cells)} cells, at most {CELLS} are allowed'] * long
    figures, runs = 0, 0
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type != 'code':
            continue
        runs += 1
        if cell.execution_count != runs:
            found.append(f'cell {i + 1}: was not run in order')
        for output in cell.outputs:
            if output.output_type == 'error' or output.get('name') == 'stderr':
                found.append(f'cell {i + 1}: ' + str(output.get('ename') or output.text).strip()[:200])
        pictures = sum('image/png' in output.get('data', {}) for output in cell.outputs)
        figures += pictures
        check_cell, caption = [*notebook.cells[i + 1:i + 3], cell, cell][:2]
        if pictures and not caption.source.startswith(f'*Figure {figures}. '):
            found.append(f"cell {i + 1}: shows {pictures} images, not followed by '*Figure {figures}. '")
        if pictures and (check_cell.cell_type != 'code' or
                         not isinstance(ast.parse(check_cell.source).body[-1], ast.Assert)):
            found.append(f'cell {i + 1}: shows an image, but the next cell does not end in an assertion')
    return found + [f'copied: {line}' for line in copied_lines(notebook)]


def run(path: Path, seed: int | None = None) -> tuple[nbformat.NotebookNode, float]:
    """The notebook with new outputs, and its run time in seconds. seed: replaces its SEED."""
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError):
        raise UserError(f'{path}: not a notebook, or not readable') from None
    for cell in notebook.cells if seed is not None else []:
        cell.source = re.sub(r'^SEED = \d+', f'SEED = {seed}', cell.source, flags=re.M)
    start = time.monotonic()
    client = NotebookClient(notebook, timeout=SECONDS, resources=dict(metadata=dict(path=str(path.parent))),
                            record_timing=False, extra_arguments=['--log-level=ERROR'])
    try:
        client.execute()
    except CellExecutionError:
        pass                                                # in the outputs, where `problems` finds it
    return notebook, time.monotonic() - start


def main(argv: list[str]):
    parser = Parser(prog='run.py', description=__doc__)
    parser.add_argument('notebook', nargs='*', help='notebooks to run [all walkthroughs]')
    parser.add_argument('--save', action='store_true', help='write the outputs into the notebooks')
    parser.add_argument('--seed', type=int, help='run with another SEED, without saving')
    args = parser.parse_args(argv)
    check(args.seed is None or not args.save, '--seed, --save: only outputs with the original SEED are saved')
    check(args.seed is None or args.seed >= 0, f'--seed {args.seed}: must be 0 or more')
    failed, total = [], 0.0
    for path in [Path(name) for name in args.notebook] or sorted(HERE.glob('0*.ipynb')):
        notebook, seconds = run(path, args.seed)
        found = problems(notebook)
        total += seconds
        print(f'{path.name}: {seconds:.0f} s, {len(notebook.cells)} cells', *found, sep='\n    ', flush=True)
        failed += [path.name] * bool(found)
        if args.save and not found:
            save_file(path, lambda file: file.write(nbformat.writes(notebook).encode() + b'\n'))
    print(f'{total:.0f} s in total')
    check(not failed, f'{", ".join(failed)}: see the lines above')


if __name__ == '__main__':
    run_command(main)
