"""The grader, held to its word: stubs get nothing, solutions all, a planted bug costs its own task only.

    pytest notebooks/assignments
"""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import grade                                                                            # noqa: E402

BUGS = [                            # task, what is wrong, what stands in the solution, what takes its place
    ('A1 phi_index', 'ticks from 0 to 1', '1 / (3 * P), 1 - 1 / (3 * P), P', '0, 1, P'),
    ('A1 phi_index', 'k counted from 1', 'ticks - k / (K - 1)', 'ticks - (k + 1) / K'),
    ('A1 encode', 'no phi', 'residual - phi(F.interpolate(vectors, size=size, mode=\'bicubic\'))',
     'residual - F.interpolate(vectors, size=size, mode=\'bicubic\')'),
    ('A1 encode', 'features instead of the residual', 'F.interpolate(residual, size=(h',
     'F.interpolate(f_BCHW, size=(h'),
    ('A1 encode', 'cosine for distance', '(places_BlC[:, :, None] - codebook_VC).pow(2).sum(-1)',
     '-F.cosine_similarity(places_BlC[:, :, None], codebook_VC, dim=-1)'),
    ('A1 decode', 'no sum over scales', 'sums[-1] + added if sums else added', 'added'),
    ('A1 decode', 'bilinear for bicubic', "size=scales[-1], mode='bicubic'",
     "size=scales[-1], mode='bilinear'"),
    ('A1 teacher_inputs', 'the scale itself', 'zip(f_hats, scales[1:])', 'zip(f_hats[1:], scales[1:])'),
    ('A1 straight_through', 'no straight-through', 'return f_hat.detach() + f - f.detach()', 'return f_hat'),
    ('A1 vq_loss', 'no stop-gradient', 'F.mse_loss(f_hat, f.detach())', 'F.mse_loss(f_hat, f)'),
    ('A1 vq_loss', 'weights ignored', 'terms = [w * (', 'terms = [('),
    ('A2 block_mask', 'leaks one scale ahead', 'return (back >= 0)', 'return (back >= -1)'),
    ('A2 block_mask', 'row by row within a scale', 'return (back >= 0)', 'return (back >= 0).tril()'),
    ('A2 block_mask', 'window off by one', '(len(lengths) if window is None else window)',
     '(len(lengths) if window is None else window + 1)'),
    ('A2 attention', 'keys not normalised', 'F.normalize(k, dim=-1).mT', 'k.mT'),
    ('A2 attention', 'mask upside down', 'masked_fill(~mask', 'masked_fill(mask'),
    ('A2 cached_step', 'cache off by a scale', 'seen[len(seen) - min(window, len(seen)):]',
     'seen[-window - 1:]'),
    ('A2 cached_step', 'keeps all at window 0', 'seen[len(seen) - min(window, len(seen)):]',
     'seen[-window:]'),
    ('A2 cached_step', 'keeps the oldest', 'seen[len(seen) - min(window, len(seen)):]', 'seen[:window]'),
    ('A2 cached_step', 'blind for its own scale', 'seen = [*cache, (k, v)]', 'seen = cache or [(k, v)]'),
    ('A2 sees', 'a plain sum', '(layer(x) * weights)', 'layer(x)'),
    ('A2 sees', 'looks at one channel', 'for part in (layer(x) * weights)',
     'for part in (layer(x) * weights)[..., :1]'),
    ('A2 sees', 'upside down', 'return torch.stack(rows)', 'return torch.stack(rows).mT'),
    ('A3 ramp', 'backwards', 'first + (last - first) * k', 'last + (first - last) * k'),
    ('A3 ramp', 'does not reach the end', 'k / (K - 1) for', 'k / K for'),
    ('A3 guide', 'the usual convention', 'conditional + t *', 'unconditional + t *'),
    ('A3 top_k', 'one too many', 'values[..., k - 1:k]', 'values[..., k:k + 1]'),
    ('A3 top_k', 'fails beyond V', 'k == 0 or k >= logits_BlV.shape[-1]', 'k == 0'),
    ('A3 top_p', 'p = 0 keeps the first', 'if not 0 < p < 1', 'if p == 1'),
    ('A3 top_p', 'off by one', 'mass_before >= p', 'sorted_probs.cumsum(-1) >= p'),
    ('A3 top_p', 'drops the likely ones', 'mass_before >= p', 'mass_before < p'),
    ('A3 draw', 'likeliest first', 'probs = logits_BlV.softmax(-1)\n    token',
     'probs = logits_BlV.sort(-1, descending=True)[0].softmax(-1)\n    token'),
    ('A3 draw', 'falls off the end', 'torch.minimum(token, last)', 'token'),
    ('A3 draw', 'less or equal', '<= noise_Bl', '< noise_Bl'),
    ('A3 sample_tokens', 'no null start token', '[var(labels, inputs_BLC)',
     '[half_null(var, labels_B, labels, inputs_BLC)'),
    ('A3 sample_tokens', 'guidance of the next scale', '+ t_K[k] *', '+ t_K[(k + 1) % K] *'),
    ('A3 sample_tokens', 'last tokens for f_hat', 'f_hat = f_hat + tokenizer', 'f_hat = tokenizer'),
    ('A3 known_places', 'any for all', '> 1 - 1e-6', '> 0'),
]
HALF_NULL = """
def half_null(var, labels_B, labels, inputs_BLC):
    start = var.class_embedding(labels_B)[:, None] + var.start_position     # of the class, always
    x = torch.cat([start, var.word_embedding(inputs_BLC)], 1) + var.positions()
    return var.transform(x, var.modulations(var.class_embedding(labels)), var.mask_LL)
"""


def solution(assignment: str) -> dict:
    return json.loads((HERE / 'solutions' / f'{assignment}.ipynb').read_text())


def code(notebook: dict) -> str:
    return '\n'.join(''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == 'code')


def changed(assignment: str, old: str, new: str, before: str = '') -> bytes:
    """The solution with one of its cells changed, and perhaps a cell put first."""
    notebook = solution(assignment)
    assert code(notebook).count(old) == 1, f'{old!r} stands {code(notebook).count(old)} times in the solution'
    for cell in notebook['cells']:
        cell['source'] = ''.join(cell['source']).replace(old, new)
    first = dict(cell_type='code', source=before, metadata={}, outputs=[], execution_count=None)
    notebook['cells'].insert(0, first)
    return json.dumps(notebook).encode()


def points(notebook: bytes, assignment: str, seconds: float | None = None) -> tuple[dict, list[tuple]]:
    """{task: share of its points} and remarks on the notebook, (step, text)."""
    tasks, remarks = grade.grade(notebook, assignment, seconds=seconds)
    return {name: reached / of for name, (reached, of, _) in tasks.items()}, remarks


def run(*arguments, cwd=None) -> subprocess.CompletedProcess:
    command = [sys.executable, HERE / 'grade.py', *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.mark.slow
@pytest.mark.parametrize('assignment', ['A1', 'A2', 'A3', 'A4'])
def test_a_stub_gets_nothing_and_the_solution_everything(assignment):
    stub = run(f'{assignment}.ipynb', cwd=HERE)
    full = run(f'notebooks/assignments/solutions/{assignment}.ipynb', '--seed', '3', cwd=grade.ROOT)
    assert stub.stdout.splitlines()[-1] == f'{assignment}: 0/20', stub.stderr
    assert full.stdout.splitlines()[-1] == f'{assignment}: 20/20', full.stdout
    assert 'expected' in stub.stdout and 'expected' not in full.stdout and not stub.stderr + full.stderr


@pytest.mark.parametrize('assignment', ['A1', 'A2', 'A3', 'A4'])
def test_stub_and_solution_differ_only_in_what_is_to_be_written(assignment):
    stub, full = json.loads((HERE / f'{assignment}.ipynb').read_text()), solution(assignment)
    gaps = 0
    for ours, theirs in zip(stub['cells'], full['cells'], strict=True):
        before, gap, _ = ''.join(ours['source']).partition("    raise NotImplementedError('to be written')")
        gaps += bool(gap)
        assert not ours.get('outputs') and ''.join(theirs['source']).startswith(before)
        assert gap or ours['source'] == theirs['source']
    assert gaps == len(grade.TASKS[assignment])


@pytest.fixture(scope='module')
def graded_bugs(request):
    """Grades all bugs that are asked for, two at a time, each on one core: most of it is starting up."""
    asked = [item.callspec.params['bug'] for item in request.session.items
             if getattr(item, 'originalname', '').startswith('test_a_planted_bug')]
    for assignment in sorted({bug[0].split()[0] for bug in asked}):
        grade.reference(assignment, 0)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv('OMP_NUM_THREADS', '1')
        return dict(zip(asked, pool.map(points_of_bug, asked)))


def points_of_bug(bug: tuple) -> dict:
    task, _, old, new = bug
    assignment = task.split()[0]
    return points(changed(assignment, old, new, HALF_NULL if 'half_null' in new else ''), assignment)[0]


@pytest.mark.slow
@pytest.mark.parametrize('bug', BUGS, ids=[f'{bug[0]}: {bug[1]}' for bug in BUGS])
def test_a_planted_bug_costs_its_own_task_and_no_other(bug, graded_bugs):
    shares = graded_bugs[bug]
    assert [name for name, share in shares.items() if share < 1] == [bug[0].split()[1]], shares


FOLDER = 'import os, sys, torch\nfolder = sys.argv[3]\n'
ALL = ['phi_index', 'encode', 'decode', 'teacher_inputs', 'straight_through', 'vq_loss']
BAD = [                         # what a notebook does, in its first cell or in a task; what is said of it
    ('loops in a cell', 'while True: pass', '', 'code cell 1: ran longer than 4 seconds', []),
    ('loops in a task', '', 'while True: pass', 'task decode: ran longer than 4 seconds', ['decode']),
    ('exits', 'import sys; sys.exit(0)', '', 'code cell 1: SystemExit: 0', []),
    ('exits at once', '', 'import os; os._exit(0)', 'task decode: ended the process (exit status 0)',
     ['decode']),
    ('dies', 'import os; os.kill(os.getpid(), 9)', '', 'code cell 1: ended the process (exit status -9)', []),
    ('prints megabytes', 'while True: print("x" * 10 ** 6)', '', 'code cell 1: printed more than 1 MiB', []),
    ('prints in a task', '', 'print("x" * 10 ** 7)', 'task decode: printed more than 1 MiB', ['decode']),
    ('has a bad cell', 'def f(:', '', 'code cell 1: SyntaxError', []),
    ('speaks to Jupyter', '%matplotlib inline\n!ls\nassert (1\n        != 2)\nready = True', 'ready', '', []),
    ('pretends to go on', FOLDER + 'import time\ni = 0\nwhile True:\n    i += 1\n    time.sleep(0.05)\n'
     '    open(folder + "/next", "w").write(f"code cell {i}")\n'
     '    os.replace(folder + "/next", folder + "/step")', '', 'code cell', ALL),
    ('puts a pipe for a result', FOLDER + 'os.mkfifo(folder + "/decode")', '', '', ['decode']),
    ('puts a pipe for its step', FOLDER + 'os.remove(folder + "/step")\nos.mkfifo(folder + "/step")',
     '', 'the notebook: ran longer than 4 seconds', ALL),
    ('writes nonsense for results', FOLDER + 'torch.save([1, 2, 3], folder + "/decode")\n'
     'torch.save([(1, "a", 1.0, torch.ones(2))] * 2, folder + "/vq_loss")', '', '', ['decode', 'vq_loss']),
    ('returns what cannot be compared', '', 'return torch.eye(3).to_sparse()', '', ['decode']),
    ('returns text for a terminal', '', 'raise ValueError("\\x1b[2J\\nA1: 20/20 \\ud800 größe")',
     '', ['decode']),
    ('asks', 'name = input()', '', 'code cell 1: EOFError', []),
    ('awards itself points', 'print("A1: 20/20")\nimport torch\n'
     'torch.allclose = torch.equal = lambda *_, **__: True\n'
     'import __main__; __main__.plain = lambda value: "right"', 'return 0',
     '', ALL),
    ('forges a result',
     'import sys\nopen(sys.argv[3] + "/decode", "wb").write(b"cposix\\nsystem\\n(S\'true\'\\n'
     'tR.")', 'return 0', '', ['decode']),
]


@pytest.mark.slow
@pytest.mark.parametrize('what, cell, task, said, lost', BAD, ids=[row[0] for row in BAD])
def test_a_notebook_that_misbehaves_gets_a_clear_line_and_no_points_for_what_it_did_not_do(
        what, cell, task, said, lost):
    start = 'sums, start = [], 0'
    notebook = changed('A1', start, f'{task}\n    {start}' if task else start, cell)
    shares, remarks = points(notebook, 'A1', seconds=4)
    assert [name for name, share in shares.items() if share < 1] == lost, (shares, remarks)
    assert not said or any(f'{step}: {text}'.startswith(said) for step, text in remarks), remarks


@pytest.mark.slow
def test_what_a_student_wrote_is_printed_on_one_line_whatever_the_terminal(tmp_path):
    path = tmp_path / 'A1.ipynb'
    start = 'sums, start = [], 0'
    talk = 'raise ValueError("\\x1b[2J\\nA1: 20/20 größe \\ud800")'
    path.write_bytes(b'\xef\xbb\xbf' + changed('A1', start, f'{talk}\n    {start}'))
    done = subprocess.run([sys.executable, HERE / 'grade.py', path], capture_output=True,
                          env=dict(os.environ, PYTHONIOENCODING='ascii'))
    lines = done.stdout.decode().splitlines()
    assert lines[-1] == 'A1: 15/20' and 'A1: 20/20' not in lines and not done.stderr
    assert '\x1b' not in done.stdout.decode() and 'gr\\xf6\\xdfe' in done.stdout.decode()


@pytest.mark.slow
def test_a_notebook_that_changes_the_project_gets_no_points_and_nothing_is_lost(tmp_path):
    probes, new = HERE / 'probes.py', HERE / 'queue.py'
    before = probes.read_bytes()
    attack = f'open({str(probes)!r}, "a").write("# mine")\nopen({str(new)!r}, "w").write("x")'
    path = tmp_path / 'A1.ipynb'
    path.write_bytes(changed('A1', 'sums, start = [], 0', 'sums, start = [], 0', attack))
    done = run(path)
    theirs = HERE / 'probes.py.changed'
    try:
        assert done.returncode == 2 and done.stdout == '' and done.stderr.count('\n') == 1
        assert done.stderr.startswith('error: the notebook changed probes.py, queue.py: put back')
        assert probes.read_bytes() == before and theirs.read_bytes() == before + b'# mine'
        assert not new.exists()
    finally:
        theirs.unlink(missing_ok=True)
        (HERE / 'queue.py.changed').unlink(missing_ok=True)


@pytest.mark.slow
def test_what_printed_so_much_is_still_named_when_the_process_ends(tmp_path):
    start = 'sums, start = [], 0'
    notebook, results = tmp_path / 'A1.ipynb', tmp_path / 'results'
    notebook.write_bytes(changed('A1', start, f'print("x" * 2 ** 21)\n    {start}'))
    results.mkdir()
    with open(tmp_path / 'printed', 'wb') as printed:
        command = [sys.executable, HERE / 'probes.py', notebook, 'A1', results, '0']
        done = subprocess.run(command, stdout=printed)
    assert done.returncode == 1 and (results / 'step').read_text() == 'code cell 8'     # the check of decode


def test_results_are_read_without_running_what_is_in_them(tmp_path):
    path, marker = tmp_path / 'decode', tmp_path / 'marker'
    path.write_bytes(f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode())
    assert grade.read_results(path, int, str, object, str) == [] and not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize('assignment', ['A1', 'A2', 'A3'])
def test_another_seed_asks_every_task_with_other_numbers(assignment):
    """So that answers which were copied from the grader's own lines are worth nothing."""
    for name, rows in grade.reference(assignment, 0).items():
        others = grade.reference(assignment, 3)[name]
        assert any(grade.difference(row[2], other[2]) for row, other in zip(rows, others)), name


@pytest.mark.slow
def test_other_right_answers_get_full_points():
    """Other types, other algorithms, and positional arguments of other names."""
    notebook = solution('A1')
    notebook['cells'].append(dict(cell_type='code', source="""
ours = decode, phi_index, vq_loss
def decode(tokens, codebook, phis, scales):
    return torch.stack(ours[0](tokens, codebook, phis, scales))
def phi_index(k, K, P):
    return np.int32(ours[1](k, K, P))
def vq_loss(a, b, c, d):
    return ours[2](a.float(), [x.float() for x in b], c, d)
"""))
    shares, _ = points(json.dumps(notebook).encode(), 'A1')
    assert set(shares.values()) == {1.0}


@pytest.mark.slow
def test_a4_measures_the_tokenizer_itself_and_refuses_one_beyond_the_limits():
    import torch

    from vqvae import VQVAE, VQVAEConfig
    config = dict(image_size=32, scales=[1, 2, 4, 8])

    def judged(settings, weights):
        return grade.judge_tokenizer([settings, weights], seed=0)
    torch.manual_seed(0)
    untrained = VQVAE(VQVAEConfig()).state_dict()
    assert judged(config, untrained)[0] == 0 and 'leaderboard: | ' in judged(config, untrained)[1]
    large = VQVAE(VQVAEConfig(vocab_size=512)).state_dict()
    assert 'at most 680 bits' in judged(config | dict(vocab_size=512), large)[1]    # 85 tokens of 9 bits
    assert '650,000 parameters' in judged(config, VQVAE(VQVAEConfig(channels=128)).state_dict())[1]
    assert judged(config, {name: weight * float('nan') for name, weight in untrained.items()})[0] == 0
    assert judged(config | dict(res_blocks=10 ** 7), {})[0] == 0                            # and at once
    assert judged(config, {})[0] == judged('20/20', None)[0] == 0


@pytest.mark.slow
def test_a4_ends_when_the_budget_of_pictures_is_spent():
    start = '    config = VQVAEConfig()'
    spend = '    for batch in list(batches) * 2:\n        VQVAE(VQVAEConfig()).encode(to_float(batch))\n'
    greedy = changed('A4', start, spend + start)
    tasks, _ = grade.grade(greedy, 'A4')
    points, _, lines = tasks['train_tokenizer']
    assert points == 0 and 'the budget of 8000 pictures' in lines[0]


def test_what_cannot_be_graded_is_refused_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(grade, 'HERE', tmp_path)                # where no solutions are
    with pytest.raises(grade.UserError, match='A2.ipynb: is missing'):
        grade.reference('A2', 99)
    bad = [('A1.ipynb', None, 'is no file'), ('A1.ipynb', '{', 'not a Jupyter notebook'),
           ('A1.ipynb', '{"cells": [3], "metadata": {}}', 'not a Jupyter notebook'),
           ('A1.ipynb', '[' * 10 ** 5, 'not a Jupyter notebook'),
           ('mine.ipynb', '{"cells": [], "metadata": {}}', 'not known which assignment')]
    for name, content, said in bad:
        if content:
            (tmp_path / name).write_text(content)
        done = run(name, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count('\n') == 1, done.stderr
