"""The committed walkthroughs follow the rules of run.py, and notebooks/README.md leads to their sections.

CI also runs them: python notebooks/run.py (manually, with another seed: --seed 100)
"""
import base64
import copy
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import run

WALKTHROUGHS = sorted(HERE.glob('0*.ipynb'))
SOLUTIONS = sorted(HERE.glob('assignments/solutions/*.ipynb'))
CIFAR10 = HERE.parents[1] / 'shared' / 'data' / 'cifar10'


@pytest.mark.parametrize('path', WALKTHROUGHS + SOLUTIONS, ids=lambda path: path.stem)
def test_a_committed_notebook_has_run_and_keeps_the_rules(path):
    assert run.problems(nbformat.read(path, as_version=4)) == []
    assert len(WALKTHROUGHS) == len(SOLUTIONS) == 5


@pytest.mark.parametrize('path', sorted(HERE.glob('assignments/A*.ipynb')), ids=lambda path: path.stem)
def test_no_stub_has_a_line_of_the_projects_code(path):
    assert run.copied_lines(nbformat.read(path, as_version=4)) == []


@pytest.mark.parametrize('path', WALKTHROUGHS, ids=lambda path: path.stem)
def test_every_prediction_is_answered_before_the_next_is_asked_for(path):
    text = '\n'.join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    asked, *parts = text.split('**Predict.**')
    assert len(parts) >= 5 and '<details>' not in asked
    summary = '<details><summary>What came out</summary>\n\n'
    assert all(part.count(summary) == part.count('\n\n</details>') == 1 for part in parts)


def test_readmes_picture_of_the_residual_loop_is_that_of_01():
    drawn = [output.data['image/png'] for cell in nbformat.read(WALKTHROUGHS[0], as_version=4).cells
             for output in cell.get('outputs', []) if 'data' in output and 'image/png' in output.data]
    assert base64.b64decode(drawn[1]) == (HERE / 'images' / 'residual-loop.png').read_bytes()


def raises(notebook):
    output = nbformat.v4.new_output('error', ename='ZeroDivisionError', evalue='', traceback=[])
    notebook.cells[1].outputs.append(output)


def warns(notebook):
    output = nbformat.v4.new_output('stream', name='stderr', text='UserWarning: deprecated')
    notebook.cells[1].outputs.append(output)


def lacks_a_caption(notebook):
    notebook.cells[5].source = notebook.cells[5].source.replace('*Figure 1. ', '')


def draws_twice(notebook):
    notebook.cells[3].outputs *= 2


def asserts_nothing(notebook):
    notebook.cells[4].source = re.sub(r'^assert .*\n?', '', notebook.cells[4].source, flags=re.M)


def was_not_run(notebook):
    notebook.cells[3].execution_count = None


def is_too_long(notebook):
    notebook.cells += [nbformat.v4.new_markdown_cell('more')] * 12


def copies(notebook):
    notebook.cells[1].source += '\n    residual = residual - added[-1].detach()'


BROKEN = {raises: 'ZeroDivisionError', warns: 'UserWarning', lacks_a_caption: 'Figure 1',
          draws_twice: '2 images', asserts_nothing: 'does not end in an assertion',
          was_not_run: 'not run in order', is_too_long: 'cells, at most 30', copies: 'copied: residual'}


@pytest.mark.parametrize('broken', BROKEN, ids=lambda broken: broken.__name__)
def test_a_notebook_that_breaks_a_rule_is_told_so(broken):
    notebook = copy.deepcopy(nbformat.read(WALKTHROUGHS[0], as_version=4))
    broken(notebook)
    assert BROKEN[broken] in '\n'.join(run.problems(notebook))


@pytest.mark.slow
def test_the_walkthroughs_start_in_the_root_of_the_repository_as_well():
    for path in WALKTHROUGHS:
        notebook = nbformat.read(path, as_version=4)
        notebook.cells = [next(cell for cell in notebook.cells if cell.cell_type == 'code')]
        resources = dict(metadata=dict(path=str(HERE.parent)))
        NotebookClient(notebook, resources=resources).execute()                 # raises if it fails


@pytest.mark.slow
def test_a_notebook_that_fails_is_not_saved_and_fails_the_run(tmp_path, capsys):
    path = tmp_path / 'fails.ipynb'
    cell = nbformat.v4.new_code_cell('import warnings\nwarnings.warn("deprecated")\nassert 1 == 2')
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    before = path.read_bytes()
    with pytest.raises(run.UserError):
        run.main([str(path), '--save'])
    said = capsys.readouterr().out
    assert 'deprecated' in said and 'AssertionError' in said and path.read_bytes() == before
    with pytest.raises(run.UserError, match='no.ipynb: not a notebook'):
        run.main([str(tmp_path / 'no.ipynb')])


@pytest.mark.skipif(not CIFAR10.exists(), reason='needs CIFAR-10 in ../shared')
def test_the_pictures_of_the_walkthroughs_are_the_first_test_pictures():
    from aids import real_images, sample
    images, labels = real_images()
    sheet = np.asarray(Image.open(CIFAR10 / 'test_batch.webp').convert('RGB'))[:32, :32 * 32]
    found = sample.to_uint8(images).permute(0, 2, 3, 1).numpy()
    assert (found == np.stack(np.split(sheet, 32, axis=1))).all()
    assert labels.tolist() == list((CIFAR10 / 'test_batch.labels').read_bytes()[:32])


def test_the_index_of_questions_leads_to_sections_that_exist():
    page = (HERE / 'README.md').read_text()
    index = page[page.index('| question | notebook |'):page.index('### Questions for')]
    rows = re.findall(r'^\| .*\? \| \[(0\d)\]\((\S+\.ipynb)\), (.*) \|$', index, flags=re.M)
    assert len(rows) == index.count('.ipynb') >= 7
    for number, name, places in rows:
        text = '\n'.join(cell.source for cell in nbformat.read(HERE / name, as_version=4).cells)
        assert name.startswith(number) and ('introduction' in places or 'section' in places)
        assert all(f'\n## {section}. ' in text for section in re.findall(r'\d+', places))
