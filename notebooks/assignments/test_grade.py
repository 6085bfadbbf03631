"""Tests of the grader: stubs get no points, solutions all, and a planted bug costs only its own task.

    pytest -m '' notebooks/assignments
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

A123, SEEDS = ['A1', 'A2', 'A3'], [7]                           # by hand: SEEDS = range(5)
MISTAKES = [(assignment, *row) for assignment in grade.TASKS for row in grade.classic_mistakes(assignment)]
FIRST = {row[0]: row for row in reversed(MISTAKES)}             # of each assignment
PLANTED = [row for row in MISTAKES if row == FIRST[row[0]] or row[1] in grade.JUDGED]


def solution(assignment: str) -> dict:
    return json.loads((HERE / 'solutions' / f'{assignment}.ipynb').read_text())


def changed(assignment: str, task: str, old: str, new: str, first: str = '') -> bytes:
    """The solution with `old` replaced in the cell of a task, and with `first`, if any, as first cell."""
    notebook = solution(assignment)
    cell, = [cell for cell in notebook['cells'] if f'def {task}(' in ''.join(cell['source'])]
    assert ''.join(cell['source']).count(old) == 1, old
    cell['source'] = ''.join(cell['source']).replace(old, new)
    return json.dumps(with_cell(notebook, first, 0)).encode()


def with_cell(notebook: dict, source: str, at: int) -> dict:
    notebook['cells'].insert(at, dict(cell_type='code', source=source, metadata={}, outputs=[]))
    return notebook


def points(notebook: bytes, assignment: str, seconds: float | None = None) -> tuple[dict, list[tuple]]:
    """{task: share of its points} and remarks on the notebook, (step, text)."""
    tasks, remarks = grade.grade(notebook, assignment, seconds=seconds)
    return {name: reached / of for name, (reached, of, _) in tasks.items()}, remarks


def run(*arguments, cwd=None) -> subprocess.CompletedProcess:
    command = [sys.executable, HERE / 'grade.py', *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.mark.slow
@pytest.mark.parametrize('assignment', ['A1', 'A2', 'A3', 'A4', 'A5'])
def test_a_stub_gets_nothing_and_the_solution_everything(assignment):
    stub = run(f'{assignment}.ipynb', cwd=HERE)
    full = run(f'notebooks/assignments/solutions/{assignment}.ipynb', '--seed', '3', cwd=grade.ROOT)
    assert stub.stdout.splitlines()[-1] == f'{assignment}: 0/20', stub.stderr
    assert full.stdout.splitlines()[-1] == f'{assignment}: 20/20', full.stdout
    assert 'expected' in stub.stdout and 'expected' not in full.stdout and not stub.stderr + full.stderr


@pytest.mark.parametrize('assignment', ['A1', 'A2', 'A3', 'A4', 'A5'])
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
def graded_mistakes(request):
    """Grades all selected mistakes, two at a time, each on one core, because most of the time is startup."""
    asked = [item.callspec.params['mistake'] for item in request.session.items
             if getattr(item, 'originalname', '').startswith('test_a_mistake')]
    for assignment in sorted({mistake[0] for mistake in asked}):
        grade.reference(assignment, 0)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv('OMP_NUM_THREADS', '1')
        return dict(zip(asked, pool.map(points_of_mistake, asked)))


def points_of_mistake(mistake: tuple) -> dict:
    assignment, task, _, old, new = mistake
    return points(changed(assignment, task, old, new), assignment)[0]


@pytest.mark.slow
@pytest.mark.parametrize('mistake', PLANTED, ids=[': '.join(row[:3]) for row in PLANTED])
def test_a_mistake_costs_its_own_task_and_no_other(mistake, graded_mistakes):
    shares = graded_mistakes[mistake]
    assert [name for name, share in shares.items() if share < 1] == [mistake[1]], shares


@pytest.mark.slow
@pytest.mark.parametrize('assignment', [*A123, 'A5'])
def test_mistakes_are_caught_at_every_seed_and_nearly_all_are_named(assignment):
    """Checks every mistake, in its own task only; trained tasks are covered by the test above."""
    named, asked = 0, 0
    for seed in SEEDS:
        for task, expected in grade.reference(assignment, seed).items():
            wrong = grade.mistakes_of(assignment, task, seed)
            for what, found in wrong:
                reached, of, lines = grade.points_of_task(task, expected, found, seed, wrong)
                assert reached < of, (task, what, seed)
                named += f'; this is what you get {what}' in '\n'.join(lines)
                asked += 1
    assert named >= 0.85 * asked > 0, (named, asked)


FOLDER = 'import os, sys, torch\nfolder = sys.argv[3]\n'
ALL = [task.__name__ for task in grade.TASKS['A1']]
BAD = [                         # what it does; first cell; code in decode; remark; tasks that lose points
    ('loops in a cell', 'while True: pass', '', 'code cell 1: ran longer than 4 seconds', []),
    ('loops in a task', '', 'while True: pass', 'task decode: ran longer than 4 seconds', ['decode']),
    ('exits', 'import sys; sys.exit(0)', '', 'code cell 1: SystemExit: 0', []),
    ('exits at once', '', 'import os; os._exit(0)', 'task decode: ended the process (exit status 0)',
     ['decode']),
    ('dies', 'import os; os.kill(os.getpid(), 9)', '', 'code cell 1: ended the process (exit status -9)', []),
    ('prints megabytes', 'while True: print("x" * 10 ** 6)', '', 'code cell 1: printed more than 1 MiB', []),
    ('prints in a task', '', 'print("x" * 10 ** 7)', 'task decode: printed more than 1 MiB', ['decode']),
    ('has a bad cell', 'def f(:', '', 'code cell 1: SyntaxError', []),
    ('speaks to Jupyter', '%matplotlib inline\n!ls\nassert (1\n        != 2)\nready = True', 'display(ready)',
     '', []),
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
     'import gc\nfor one in gc.get_objects():\n    if isinstance(one, dict) and "evaluate" in one:\n'
     '        one["plain"] = lambda value: "right"', 'return 0',
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
    notebook = changed('A1', 'decode', start, f'{task}\n    {start}' if task else start, cell)
    shares, remarks = points(notebook, 'A1', seconds=4)
    assert [name for name, share in shares.items() if share < 1] == lost, (shares, remarks)
    assert not said or any(f'{step}: {text}'.startswith(said) for step, text in remarks), remarks


JUPYTER = [                     # cells that run in Jupyter, and what is said of them, if anything
    ('files = !ls\nassert "tasks.py" in files', ''),
    ('?len\nlen?\n%timeit 1 + 1\n%time x = 3\nassert x == 3', ''),
    ('%%writefile mine.py\nx = 4', ''),
    ('from mine import x\nassert x == 4', ''),
    ('import asyncio\nawait asyncio.sleep(0.01)\nx = 5', ''),
    ('%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([x])\nplt.show()\ndisplay(x)', ''),
    ('import inspect, torch\ndef two():\n    return 2\nassert "return 2" in inspect.getsource(two)', ''),
    ('torch.set_default_dtype(torch.float64)\ntorch.tensor([0.5])', ''),
    ('from google.colab import drive\ndrive.mount("/content/drive")\n%cd /content/drive\nx = 6',
     "ModuleNotFoundError: No module named 'google'"),
    ('assert x == 6\n!pip install einops\n%pip install einops\nx = 7',
     '!pip install einops: skipped, because it may need a network'),
    ('assert x == 7\nopen("/nowhere")\nname = input()\nname.upper()\nx = 8', 'EOFError: EOF when reading'),
    ('assert x == 8\n1 / 0\nx = 9', 'ZeroDivisionError: division by zero (code cell 12, line 2)'),
    ('assert x == 8\nexit()', 'SystemExit')]


@pytest.mark.slow
def test_what_runs_in_jupyter_runs_in_the_grader_and_what_is_lacking_is_named_and_skipped():
    notebook = solution('A1')
    for number, (source, _) in enumerate(JUPYTER):
        notebook = with_cell(notebook, source, number)
    shares, remarks = points(json.dumps(notebook).encode(), 'A1')
    assert set(shares.values()) == {1.0}, (shares, remarks)
    for number, (source, said) in enumerate(JUPYTER, 1):
        found = [text for step, text in remarks if step == f'code cell {number}']
        assert any(text.startswith(said) for text in found) if said else not found, (source, found)


@pytest.mark.slow
def test_imports_that_fail_cost_no_point_wherever_they_stand():
    for assignment in ('A1', 'A5'):
        notebook = solution(assignment)
        cell = next(cell for cell in notebook['cells'] if cell['cell_type'] == 'code')
        cell['source'] = 'from google.colab import drive\nimport nowhere\n' + ''.join(cell['source'])
        shares, remarks = points(json.dumps(notebook).encode(), assignment)
        assert set(shares.values()) == {1.0} and len(remarks) == 2, (shares, remarks)


@pytest.mark.slow
def test_what_a_student_wrote_is_printed_on_one_line_whatever_the_terminal(tmp_path):
    path = tmp_path / 'A1.ipynb'
    start = 'sums, start = [], 0'
    talk = 'raise ValueError("\\x1b[2J\\nA1: 20/20 größe \\ud800")'
    path.write_bytes(b'\xef\xbb\xbf' + changed('A1', 'decode', start, f'{talk}\n    {start}'))
    done = subprocess.run([sys.executable, HERE / 'grade.py', path], capture_output=True,
                          env=dict(os.environ, PYTHONIOENCODING='ascii'))
    lines = done.stdout.decode().splitlines()
    assert lines[-1] == 'A1: 17/20' and 'A1: 20/20' not in lines and not done.stderr
    assert '\x1b' not in done.stdout.decode() and 'gr\\xf6\\xdfe' in done.stdout.decode()


@pytest.mark.slow
def test_what_printed_so_much_is_still_named_when_the_process_ends(tmp_path):
    start = 'sums, start = [], 0'
    notebook, results = tmp_path / 'A1.ipynb', tmp_path / 'results'
    notebook.write_bytes(changed('A1', 'decode', start, f'print("x" * 2 ** 21)\n    {start}'))
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
@pytest.mark.parametrize('assignment', A123)
def test_another_seed_asks_every_task_with_other_numbers(assignment):
    """Answers copied from the grader's messages therefore earn nothing."""
    for name, rows in grade.reference(assignment, 0).items():
        others = grade.reference(assignment, 3)[name]
        assert name == 'questions' or any(
            grade.difference(row[2], other[2]) for row, other in zip(rows, others)), name


RIGHT = dict(A1='''
ours = decode, phi_index, vq_loss
def decode(tokens, codebook, phis, scales):
    return torch.stack(ours[0](tokens, codebook, phis, scales))
def phi_index(k, K, P):
    return np.int32(ours[1](k, K, P))
def vq_loss(a, b, c, d):
    return ours[2](a.float(), [x.float() for x in b], c, d)
def encode(f, codebook, phis, scales):
    rest, found = f.clone(), []
    for (h, w), phi in zip(scales, phis):
        small = F.adaptive_avg_pool2d(rest, (h, w)).permute(0, 2, 3, 1).reshape(-1, f.shape[1])
        found.append(torch.cdist(small, codebook).argmin(1).view(len(f), -1))
        big = codebook[found[-1].view(len(f), h, w)].permute(0, 3, 1, 2)
        rest -= phi(F.interpolate(big, size=f.shape[2:], mode='bicubic'))
    return torch.cat(found, 1)
def teacher_inputs(f_hats, scales):
    pairs = zip(f_hats[:-1], scales[1:])
    return torch.cat([F.adaptive_avg_pool2d(f_hat, size).flatten(2).mT for f_hat, size in pairs], 1)
def straight_through(f, f_hat):
    return f + (f_hat - f).detach()
def rotation_trick(f, f_hat):
    x, y = f.permute(0, 2, 3, 1), f_hat.detach().permute(0, 2, 3, 1)
    a, b = x.detach() / x.detach().norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)
    K = b[..., :, None] * a[..., None, :] - a[..., :, None] * b[..., None, :]
    R = torch.eye(f.shape[1]).to(f) + K + K @ K / (1 + (a * b).sum(-1))[..., None, None]       # Rodrigues
    turned = (R @ x[..., None])[..., 0] * y.norm(dim=-1, keepdim=True) / x.detach().norm(dim=-1, keepdim=True)
    return turned.permute(0, 3, 1, 2)
def ema_update(codebook, counts, sums, vectors, tokens, decay):
    codebook, counts, sums = codebook.clone(), counts * decay, sums * decay
    for vector, token in zip(vectors, tokens.tolist()):
        counts[token] += 1 - decay
        sums[token] += (1 - decay) * vector
    used = counts > 0
    codebook[used] = sums[used] / counts[used, None]
    return [codebook, counts, sums]
''', A2='''
def block_mask(lengths, window):
    rows = []
    for i, own in enumerate(lengths):
        first = 0 if window is None else max(0, i - window)
        row = [first <= j <= i for j, other in enumerate(lengths) for _ in range(other)]
        rows += [row] * own
    return torch.tensor(rows)
def attention(q, k, v, mask, sharpness):
    q = F.normalize(q, dim=-1) * sharpness.view(1, -1, 1, 1)
    return F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v, attn_mask=mask, scale=1.0)
def cached_step(q, k, v, cache, window, attend):
    cache.append((k, v))
    keys, values = (torch.cat(list(x), 2) for x in zip(*cache))
    while window is not None and len(cache) > window:
        cache.pop(0)
    return attend(q, keys, values), cache
def sees(layer, lengths, D):
    x = torch.linspace(-1, 2, sum(lengths) * D).sin().view(1, -1, D)
    J = torch.autograd.functional.jacobian(layer, x)[0, :, :, 0].abs().amax((1, 3)) > 0
    return [[part.any().item() for part in row.split(lengths, 1)] for row in J.split(lengths)]
def window_cost(lengths, window, depth, D):
    pairs, most = 0, 0
    for i, own in enumerate(lengths):
        visible = sum(lengths[j] for j in range(i + 1) if window is None or i - j <= window)
        pairs, most = pairs + own * visible, max(most, visible)
    return [4 * pairs * D * depth, most * D * depth * 2]
''', A3='''
def ramp(first, last, K):
    return torch.linspace(first, last, K)
def guide(conditional, unconditional, t):
    return torch.lerp(unconditional, conditional, 1 + t)
def top_k(logits, k):
    if 0 < k < logits.shape[-1]:
        logits[logits < logits.topk(k)[0][..., -1:]] = -torch.inf               # in place
    return logits
def top_p(logits, p):
    if p in (0, 1):
        return logits
    values, order = logits.sort(descending=True)
    drop = values.softmax(-1).cumsum(-1).roll(1, -1) >= p
    drop[..., 0] = False
    return torch.full_like(logits, -torch.inf).scatter(-1, order, values.masked_fill(drop, -torch.inf))
def draw(logits, noise):
    mass = logits.softmax(-1).cumsum(-1)
    last = (logits > -torch.inf) * torch.arange(logits.shape[-1])
    return torch.searchsorted(mass, noise[..., None].contiguous(), right=True)[..., 0].minimum(last.amax(-1))
def sample_tokens(tokenizer, var, labels, t_K, pick):
    B, lengths, tokens, f_hat = len(labels), var.config.lengths, [], 0
    classes = var.class_embedding(torch.cat([labels, torch.full_like(labels, var.config.num_classes)]))
    caches = torch.zeros(var.config.depth, 2, 2 * B, var.config.depth, sum(lengths), 64)
    x, places = classes[:, None] + var.start_position, var.positions().split(lengths, 1)
    with torch.no_grad():
        for k in range(len(lengths)):
            start = sum(lengths[:k])
            logits = var.transform(x + places[k], var.modulations(classes), None, caches, start)
            tokens.append(pick((1 + t_K[k]) * logits[:B] - t_K[k] * logits[B:], k))
            f_hat = f_hat + tokenizer.contribution(tokens[k], k)
            if k + 1 < len(lengths):
                x = var.word_embedding(tokenizer.next_input(f_hat, k)).repeat(2, 1, 1)
    return torch.cat(tokens, 1)
def known_places(known, scales):
    unknown = 1 - known[None, None].float()
    return torch.cat([F.adaptive_max_pool2d(unknown, side).flatten() == 0 for side in scales])
def complete(tokenizer, f, known, draw_scale):
    rest, tokens, start = f.clone(), [], 0
    for k, length in enumerate(tokenizer.scale_lengths):
        chosen = draw_scale(f - rest, k).clone()
        here = known[start:start + length]
        chosen[:, here] = tokenizer.nearest_codes(tokenizer.shrink(rest, k))[:, here]
        rest, start = rest - tokenizer.contribution(chosen, k), start + length
        tokens.append(chosen)
    return torch.cat(tokens, 1)
''', A5='''
def hide_labels(labels, noise, rate, null):
    return torch.where(noise < rate, null, labels)
def loss_by_scale(logits, tokens, lengths):
    nats = -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return nats.sum() / nats.numel(), [part.mean() for part in nats.split(lengths, 1)]
def last_inputs(tokenizer, tokens):
    f_hats = tokenizer.f_hats(tokens)
    steps = [f_hats[0], *[b - a for a, b in zip(f_hats, f_hats[1:])]]
    return torch.cat([tokenizer.next_input(steps[k], k) for k in range(3)], 1).detach()
''')


@pytest.mark.slow
@pytest.mark.parametrize('assignment', RIGHT)
def test_other_right_answers_get_full_points(assignment):
    """Other types, algorithms and argument names, and in-place operations where they are allowed."""
    notebook = solution(assignment)
    notebook = with_cell(notebook, RIGHT[assignment], len(notebook['cells']))
    shares, _ = points(json.dumps(notebook).encode(), assignment)
    assert set(shares.values()) == {1.0}, shares
    assert sum(text.count('\ndef ') for text in RIGHT.values()) >= 15


@pytest.mark.slow
def test_a_cell_that_is_not_graded_may_fail_and_a_check_that_fails_says_both_sides(tmp_path, monkeypatch):
    (tmp_path / 'solutions').mkdir()
    broken = with_cell(solution('A1'), 'assert False', len(solution('A1')['cells']))
    (tmp_path / 'solutions' / 'A1.ipynb').write_text(json.dumps(broken))
    monkeypatch.setattr(grade, 'HERE', tmp_path)
    assert len(grade.reference('A1', 1001)) == 8                # a seed that no other test uses
    wrong = changed('A1', 'phi_index', 'k / (K - 1)', 'k / K')
    monkeypatch.undo()
    _, remarks = points(wrong, 'A1')
    assert 'found [0, 0, 0, 1], expected [0, 0, 1, 1]' in remarks[0][1]


@pytest.mark.slow
def test_what_a_notebook_draws_at_random_is_the_same_in_every_run_and_torch_empty_holds_nan():
    lucky = with_cell(solution('A1'), 'import torch\nluck = torch.rand(3)', 0)
    wrong = 'def rotation_trick(f, f_hat):\n    return torch.stack([luck, torch.empty(3)])'
    lucky = json.dumps(with_cell(lucky, wrong, len(lucky['cells']))).encode()
    first, second = (grade.run_notebook(lucky, 'A1', 0, 60.0)[0]['rotation_trick'][0][2] for _ in range(2))
    assert first[0].equal(second[0]) and first[1].isnan().all()


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
    assert judged(config | dict(res_blocks=10 ** 7), {})[0] == 0                            # and immediately
    assert judged(config, {})[0] == judged('20/20', None)[0] == 0


@pytest.mark.slow
def test_a5_measures_what_was_trained_itself():
    untrained = grade.small_var(0).state_dict()
    nan = {name: weight * float('nan') for name, weight in untrained.items()}
    for value in ('6/6', None, {}, untrained, nan, {'head.weight': untrained['head.weight']}):
        assert grade.judge_by_heart(value, seed=0)[0] == grade.judge_ablation(value, seed=0)[0] == 0
        assert grade.judge_ablation(dict(f_hat=value, last=value), seed=0)[0] == 0
    assert grade.judge_by_heart(untrained, seed=0)[1].startswith('6.93')                # nats per token: ln V


@pytest.mark.slow
def test_a4_ends_when_the_budget_of_pictures_is_spent():
    start = '    config = VQVAEConfig()'
    spend = '    for batch in list(batches) * 2:\n        VQVAE(VQVAEConfig()).encode(to_float(batch))\n'
    greedy = changed('A4', 'train_tokenizer', start, spend + start)
    tasks, _ = grade.grade(greedy, 'A4')
    points, _, lines = tasks['train_tokenizer']
    assert points == 0 and 'the budget of 4000 images' in lines[0]


@pytest.mark.slow
def test_what_cannot_be_graded_is_refused_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(grade, 'HERE', tmp_path)                # a folder without solutions
    with pytest.raises(grade.UserError, match='A2.ipynb: is missing'):
        grade.reference('A2', 99)
    bad = [('A1.ipynb', None, 'not a file'), ('A1.ipynb', '{', 'not a Jupyter notebook'),
           ('A1.ipynb', '{"cells": [3], "metadata": {}}', 'not a Jupyter notebook'),
           ('A1.ipynb', '[' * 10 ** 5, 'not a Jupyter notebook'),
           ('mine.ipynb', '{"cells": [], "metadata": {}}', 'cannot tell which assignment'),
           ('A1-or-A2.ipynb', '{"cells": [], "metadata": {}}', 'name the file after one, as in my-A1.ipynb')]
    for name, content, said in bad:
        if content:
            (tmp_path / name).write_text(content)
        done = run(name, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count('\n') == 1, done.stderr
