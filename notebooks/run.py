"""Runs the walkthroughs top to bottom, each in a kernel of its own, and holds them to their rules.

    python notebooks/run.py                             # what CI does; the files stay as they are
    python notebooks/run.py --save                      # writes the outputs into the notebooks
    python notebooks/run.py NOTEBOOK ... --save
    python notebooks/run.py --seed 7                    # every claim should hold with any other SEED, too

The rules: at most 25 cells (assignments may have more); no error and no warning; a cell that draws draws one
picture, ends in an assertion, and is followed by its caption, '*Figure n. ...'; no line of code stands in the
project's own files already.
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

CELLS = 25                              # of one notebook, at most
SECONDS = 600                           # of one cell, at most: it hangs
COPIED = 32                             # characters: shorter lines, such as a plain call, may be alike


def code_lines(text: str) -> set[str]:
    lines = {line.split('  #')[0].strip() for line in text.splitlines()}
    return {line for line in lines if len(line) >= COPIED and not line.startswith(('import ', 'from ', '#'))}


def copied_lines(notebook) -> list[str]:
    """Lines of code that the project's files have as well."""
    ours = set().union(*(code_lines(path.read_text()) for path in HERE.parent.glob('*.py')
                         if path.name != 'test_var.py'))
    theirs = set().union(*(code_lines(cell.source) for cell in notebook.cells if cell.cell_type == 'code'))
    return sorted(ours & theirs)


def problems(notebook) -> list[str]:
    """The rules that an executed notebook breaks, a line each."""
    long = len(notebook.cells) > CELLS and 'assignment' not in notebook.metadata
    found = [f'has {len(notebook.cells)} cells, at most {CELLS} will do'] * long
    figures, runs = 0, 0
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type != 'code':
            continue
        runs += 1
        if cell.execution_count != runs:
            found.append(f'cell {i + 1}: was not run in its turn')
        for output in cell.outputs:
            if output.output_type == 'error' or output.get('name') == 'stderr':
                found.append(f'cell {i + 1}: ' + str(output.get('ename') or output.text).strip()[:200])
        pictures = sum('image/png' in output.get('data', {}) for output in cell.outputs)
        figures += pictures
        after = notebook.cells[i + 1].source if i + 1 < len(notebook.cells) else ''
        if pictures and not after.startswith(f'*Figure {figures}. '):
            found.append(f"cell {i + 1}: draws {pictures} pictures, and no '*Figure {figures}. ' follows")
        if pictures and not isinstance(ast.parse(cell.source).body[-1], ast.Assert):
            found.append(f'cell {i + 1}: draws, and asserts nothing at its end')
    return found + [f'copied: {line}' for line in copied_lines(notebook)]


def run(path: Path, seed: int | None = None) -> tuple[nbformat.NotebookNode, float]:
    """The notebook with fresh outputs, and the seconds that it took. seed: in place of its own SEED."""
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError):
        raise UserError(f'{path}: not a notebook that can be read') from None
    for cell in notebook.cells if seed is not None else []:
        cell.source = re.sub(r'^SEED = \d+', f'SEED = {seed}', cell.source, flags=re.M)
    start = time.monotonic()
    client = NotebookClient(notebook, timeout=SECONDS, resources=dict(metadata=dict(path=str(path.parent))),
                            record_timing=False, extra_arguments=['--log-level=ERROR'])
    try:
        client.execute()
    except CellExecutionError:
        pass                                                # stands in the outputs, and is a problem
    return notebook, time.monotonic() - start


def main(argv: list[str]):
    parser = Parser(prog='run.py', description=__doc__)
    parser.add_argument('notebook', nargs='*', help='absent: the walkthroughs')
    parser.add_argument('--save', action='store_true', help='write the outputs into the notebooks')
    parser.add_argument('--seed', type=int, help='run with another SEED, and save nothing')
    args = parser.parse_args(argv)
    check(args.seed is None or not args.save, '--seed and --save: outputs are saved with their own SEED')
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
    print(f'{total:.0f} s in all')
    check(not failed, f'{", ".join(failed)}: see the lines above')


if __name__ == '__main__':
    run_command(main)
