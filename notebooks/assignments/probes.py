"""What each task of A1 to A4 is asked: grade.py runs this file in a process of its own, and compares.

    python probes.py NOTEBOOK A1 FOLDER SEED [STEP ...]

Runs the notebook's code cells, then calls the student's functions with inputs made from SEED. What they
return goes to FOLDER, a file a task; nothing is judged here, because the student's code, which shares this
process, could reach the judge. A step ('code cell 3', 'task encode') that is named is left out: it hung or
died before.

A task is a generator of checks, (points, what is computed, how). A check calls the function of its own task
only, so that one mistake costs one task; what it leans on is handed to it.
"""
import json
import os
import re
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

PRINTED = 2 ** 20                       # bytes that a notebook may print
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import sample                                                                           # noqa: E402
from var import draw_tokens                                                             # noqa: E402
from vqvae import VQVAE, Phi                                                            # noqa: E402


def normal(seed: int, *shape: int) -> torch.Tensor:
    """float64, so that no two ways to compute the same thing part at a tie."""
    return torch.from_numpy(np.random.default_rng([seed, *shape]).normal(size=shape))


# ------------------------------------------------------------------------------- A1: multi-scale quantizer
LANDSCAPE = [(1, 1), (1, 2), (2, 3), (4, 6)]


def pyramid(seed: int, scales: list) -> tuple:
    """A codebook, a phi for each scale, and as many tokens as two pictures have."""
    phis = [Phi(4, 4, 3, padding=1).double().requires_grad_(False) for _ in scales]
    for k, phi in enumerate(phis):
        phi.weight.copy_(normal(seed + k, 4, 4, 3, 3) / 6)
        phi.bias.copy_(normal(seed + k, 4) / 6)
    L = sum(h * w for h, w in scales)
    tokens_BL = torch.from_numpy(np.random.default_rng(seed).integers(32, size=(2, L)))
    return tokens_BL, normal(seed, 32, 4), phis, scales


def phi_index(student, seed):
    ties = {(K, P) for K in range(5, 12) for P in range(2, 6) for k in range(K) for i in range(1, P)
            if abs(1 / (3 * P) + (i - 0.5) * (1 - 2 / (3 * P)) / (P - 1) - k / (K - 1)) < 1e-6}
    choices = [(K, P) for K in range(5, 12) for P in range(2, 6) if (K, P) not in ties]
    choices = np.random.default_rng(seed).permutation(choices).tolist()
    for asked in (choices[:5], choices[5:10]):
        yield 1, f'phi_index(k, K, P), all k, for K, P = {str(asked)[1:-1]}', \
            lambda: [[student.phi_index(k, K, P) for k in range(K)] for K, P in asked]


def encode(student, seed):
    for points, scales in ((2, [(3, 5)]), (4, LANDSCAPE)):
        f_BCHW = normal(seed, 2, 4, *scales[-1])
        yield points, f'tokens of two pictures at scales {scales}', \
            lambda: student.encode(f_BCHW, *pyramid(seed, scales)[1:])


def decode(student, seed):
    for points, which, what in ((2, -1, 'the last'), (3, slice(None), 'every')):
        yield points, f'f_hat after {what} scale', \
            lambda: student.decode(*pyramid(seed, LANDSCAPE))[which]


def teacher_inputs(student, seed):
    f_hats = [normal(seed + k, 2, 4, *LANDSCAPE[-1]) for k in range(len(LANDSCAPE))]
    yield 3, f'inputs for scales {LANDSCAPE[1:]}', lambda: student.teacher_inputs(f_hats, LANDSCAPE)


def straight_through(student, seed):
    f, f_hat, weight = (normal(seed + i, 2, 4, 3, 3) for i in range(3))
    yield 1, 'its value', lambda: student.straight_through(f, f_hat)

    def gradients():
        leaves = [f.clone().requires_grad_(), f_hat.clone().requires_grad_()]
        return gradients_of((student.straight_through(*leaves) * weight).sum(), leaves)
    yield 1, 'the gradients that reach f and f_hat', gradients


def vq_loss(student, seed):
    tensors = [normal(seed + i, 2, 4, 3, 3) for i in range(4)]
    weights_K, beta = [1.0, 2.0, 5.0], 0.25
    yield 1, 'its value', lambda: student.vq_loss(tensors[0], tensors[1:], weights_K, beta)

    def gradients():
        f, *f_hats = [tensor.clone().requires_grad_() for tensor in tensors]
        return gradients_of(student.vq_loss(f, f_hats, weights_K, beta), [f, *f_hats])
    yield 1, 'the gradients that reach f and each f_hat', gradients


def gradients_of(scalar: torch.Tensor, leaves: list) -> list:
    found = torch.autograd.grad(scalar, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(leaves, found)]


# ------------------------------------------------------------- A2: block-causal attention, with a cache
def block_mask(student, seed):
    random = np.random.default_rng(seed)
    for points, window in ((2, None), (2, 1), (1, 0)):
        lengths = [1, *random.integers(2, 9, 3).tolist()]
        yield points, f'block_mask({lengths}, {window})', lambda: student.block_mask(lengths, window)


def attention(student, seed):
    q, k, v = (normal(seed + i, 2, 3, 7, 5) for i in range(3))
    sharpness, mask = torch.tensor([1.0, 4.0, 9.0]).double(), normal(seed, 7, 7) + 3 * torch.eye(7) > 0
    yield 2, 'without a mask', lambda: student.attention(q, k, v, None, sharpness)
    yield 3, 'with a mask', lambda: student.attention(q, k, v, mask, sharpness)


def cached_step(student, seed):
    lengths = [1, 2, 6, 12]
    maps = [[normal(seed + i, 2, 3, length, 5) for i in range(3)] for length in lengths]

    def run(window):
        cache, outputs, sizes = [], [], []
        for q, k, v in maps:
            output, cache = student.cached_step(q, k, v, cache, window, F.scaled_dot_product_attention)
            outputs.append(output)
            sizes.append(len(cache))
        return outputs, sizes
    for points, window in ((2, None), (2, 1)):
        yield points, f'outputs of scales of {lengths} tokens, window {window}', lambda: run(window)[0]
    for window in (2, 0):
        yield 1, f'scales in the cache after each step, window {window}', lambda: run(window)[1]


def sees(student, seed):
    random, D = np.random.default_rng(seed), 8
    lengths = [1, *random.integers(2, 9, random.integers(2, 5)).tolist()]
    early, late = sorted(random.choice(len(lengths), 2, replace=False).tolist())
    scale_L = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    earlier_LL = scale_L[:, None] >= scale_L
    blind_LL = earlier_LL & ~((scale_L[:, None] == late) & (scale_L == early))
    leaky_LL = earlier_LL | ((scale_L[:, None] == early) & (scale_L == late))

    def attend(x, mask_LL):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask_LL)

    def centred(x):
        return x - x.mean(-1, keepdim=True)             # whose sum is 0, and so has no gradient

    def hidden(x):
        """The last number of scale `early` depends on that of scale `late`; all else stays as it is."""
        ends = np.cumsum(lengths) - 1
        leak = torch.zeros_like(x)
        leak[:, ends[early], -1] = 1
        return x + leak * x[:, ends[late]:ends[late] + 1]
    for layer, what in ((lambda x: attend(x, earlier_LL), 'a block-causal layer'),
                        (lambda x: attend(x, blind_LL), 'a layer that is blind for one scale'),
                        (lambda x: centred(attend(x, leaky_LL)), 'a leaky layer whose outputs sum to 0'),
                        (hidden, 'a layer with one number that leaks')):
        yield 1, f'{what}, scales of {lengths} tokens', lambda: student.sees(layer, lengths, D)


# ------------------------------------------------------------------------------- A3: guided sampling
def ramp(student, seed):
    first, last = np.random.default_rng(seed).integers(1, 9, 2) / 2
    for start, end, K in ((0, last, 10), (first + last, first, 5)):
        yield 1, f'ramp({start:g}, {end:g}, {K})', lambda: student.ramp(float(start), float(end), K)


def guide(student, seed):
    yield 2, 'guide(conditional, unconditional, 1.5)', \
        lambda: student.guide(normal(seed, 2, 3, 8), normal(seed + 1, 2, 3, 8), 1.5)


def top_k(student, seed):
    logits = normal(seed, 2, 3, 16)
    yield 2, 'logits of 16 codes after top_k(logits, 5)', lambda: student.top_k(logits.clone(), 5)
    yield 1, 'logits of 16 codes after top_k with k = 0, 16 and 20', \
        lambda: [student.top_k(logits.clone(), k) for k in (0, 16, 20)]


def top_p(student, seed):
    logits = normal(seed, 2, 3, 16)
    for p in ([0.5], [0.7, 0.9], [0, 1]):
        yield 1, f'logits of 16 codes after top_p with p = {str(p)[1:-1]}', \
            lambda: [student.top_p(logits.clone(), one) for one in p]


def draw(student, seed):
    logits = normal(seed, 2, 500, 8)
    noise = torch.from_numpy(np.random.default_rng(seed).random((2, 500)))
    yield 2, 'tokens of 1000 places', lambda: student.draw(logits, noise)
    # ten tenths sum to a little less than 1; codes of probability 0 stand before and after
    tenths = torch.full((14,), -torch.inf).double()
    tenths[1:11] = 0
    ends = torch.tensor([[0.0, 1 - 2.0 ** -53]]).double()
    yield 1, 'tokens of probabilities 0, ten times 0.1, 0 0 0, at noise 0 and the largest number below 1', \
        lambda: student.draw(tenths.expand(1, 2, 14), ends)


def sample_tokens(student, seed):
    tokenizer, var, _ = sample.load(ROOT / 'notebooks' / 'cifar10.pt')
    noise_BL = sample.noise_of_images(seed, 0, 8, 85)

    def pick(logits_BlV, k):
        return draw_tokens(logits_BlV, noise_BL.split(tokenizer.scale_lengths, 1)[k], 0, 0.8)
    for points, t_K in ((2, [0.0, 0.0, 0.0, 0.0]), (3, [2.0, 0.0, 1.0, 3.0])):
        yield points, f'tokens of eight pictures of CIFAR-10, strengths {t_K}', \
            lambda: student.sample_tokens(tokenizer, var, torch.arange(8), t_K, pick)


def known_places(student, seed):
    random = np.random.default_rng(seed)
    for size, scales in ((8, (1, 2, 4, 8)), (6, (1, 3, 4, 6))):
        rows, columns = random.integers(size // 2, size, 2).tolist()
        known_HW = torch.zeros(size, size, dtype=torch.bool)
        known_HW[:rows], known_HW[:, :columns] = True, True
        yield 1, f'the first {rows} rows and {columns} columns of {size} are known, scales {scales}', \
            lambda: student.known_places(known_HW, scales)


# ------------------------------------------------------------------------------- A4: open-ended
A4_BATCHES, A4_BATCH, A4_ENCODED = 200, 32, 8_000       # pictures may pass the encoder so often in all


def train_tokenizer(student, seed):
    def trained():
        from train import draw_shapes           # here, since it takes long to import and only A4 needs it
        count, features = 0, VQVAE.features

        def counted(self, images):
            nonlocal count
            count += len(images)
            if count > A4_ENCODED:
                raise RuntimeError(f'the budget of {A4_ENCODED} pictures through the encoder is spent')
            return features(self, images)
        VQVAE.features = counted
        pictures, _ = draw_shapes(A4_BATCHES * A4_BATCH, seed=seed + 1)
        tokenizer = student.train_tokenizer(iter(pictures.split(A4_BATCH)))
        return asdict(tokenizer.config), dict(tokenizer.state_dict())
    yield 20, f'a tokenizer trained on {A4_BATCHES * A4_BATCH} pictures', trained


TASKS = {'A1': [phi_index, encode, decode, teacher_inputs, straight_through, vq_loss],
         'A2': [block_mask, attention, cached_step, sees],
         'A3': [ramp, guide, top_k, top_p, draw, sample_tokens, known_places],
         'A4': [train_tokenizer]}


# ------------------------------------------------------------------------------- running it
class Student:
    """The names that the notebook defined."""

    def __init__(self):
        self.names = {'__name__': '__main__', 'display': print}

    def __getattr__(self, name: str):
        if name not in self.names:
            raise NameError(f'{name} is not defined')
        return self.names[name]


def plain(value, depth=0):
    """A copy of tensors, numbers and lists of them, to be read back without running anybody's code."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = torch.as_tensor(value)
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized:
        return value.detach().cpu().as_subclass(torch.Tensor).clone()
    if isinstance(value, (list, tuple)) and depth < 3:
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, dict) and depth < 3:
        return {str(key): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (bool, float)):
        return value
    if isinstance(value, int) and abs(value) < 2 ** 63:
        return int(value)
    raise TypeError(f'{type(value).__name__} is not what was asked for')


def describe(error: BaseException) -> str:
    """What was raised, and where in the notebook."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f'{frame.filename}, line {frame.lineno}' for frame in frames
              if frame.filename.startswith('code cell ')]
    try:
        text = f': {error}'
    except Exception:                       # a student's own exception may fail at this
        text = ''
    return type(error).__name__ + text.rstrip(': ')[:200] + (f' ({places[-1]})' if places else '')


def compiled(source: str, name: str):
    """A cell's code; lines in Jupyter's language (%magic, !command, name?) are left out if Python minds."""
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
    """Ends the process while `step` still names what printed so much."""
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
    folder, student, complaints = Path(folder), Student(), []
    cells = [''.join(cell['source']) for cell in json.loads(Path(notebook).read_bytes())['cells']
             if cell['cell_type'] == 'code']
    for number, source in enumerate(cells, 1):
        step = f'code cell {number}'
        if step in skipped or source.lstrip().startswith('# not for the grader'):
            continue
        (folder / 'step').write_text(step)
        try:
            exec(compiled(source, step), student.names)
        except BaseException as error:
            complaints.append((step, describe(error)))
        write(folder / 'complaints', complaints)
        end_if_talkative()
    for task in TASKS[assignment]:
        step = f'task {task.__name__}'
        if step in skipped or (folder / task.__name__).exists():
            continue
        (folder / 'step').write_text(step)
        found = evaluate(task, student, int(seed))
        end_if_talkative()
        write(folder / task.__name__, found)
    (folder / 'step').write_text('done')


if __name__ == '__main__':
    main(*sys.argv[1:])
    os._exit(0)                             # whatever the notebook left running or registered to run at exit
