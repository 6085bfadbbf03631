"""What each task of A1 to A4 is asked: grade.py runs this file in a process of its own, and compares.

    python probes.py NOTEBOOK A1 FOLDER SEED [STEP ...]

Runs the notebook's code cells, then calls the student's functions with inputs made from SEED. What they return
goes to FOLDER, a file a task; nothing is judged here, because the student's code, which shares this process,
could reach the judge. A step ('cell 3', 'task encode') that is named is left out: it hung or died before.

A task is a generator of checks, (points, what is computed, how). A check calls the function of its own task
only, so that one mistake costs one task; what it leans on is handed to it.
"""
import json
import os
import re
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def normal(seed: int, *shape: int) -> torch.Tensor:
    """float64, so that no two ways to compute the same thing part at a tie."""
    return torch.from_numpy(np.random.default_rng([seed, *shape]).normal(size=shape))


# ------------------------------------------------------------------------------- A1: multi-scale quantizer
LANDSCAPE = [(1, 1), (1, 2), (2, 3), (4, 6)]


def pyramid(seed: int, scales: list) -> tuple:
    """A codebook, a phi for each scale, and as many tokens as two pictures have."""
    from vqvae import Phi
    phis = [Phi(4, 4, 3, padding=1).double().requires_grad_(False) for _ in scales]
    for k, phi in enumerate(phis):
        phi.weight.copy_(normal(seed + k, 4, 4, 3, 3) / 6)
        phi.bias.copy_(normal(seed + k, 4) / 6)
    tokens_BL = torch.from_numpy(np.random.default_rng(seed).integers(32, size=(2, sum(h * w for h, w in scales))))
    return tokens_BL, normal(seed, 32, 4), phis, scales


def phi_index(student, seed):
    for K, P in ((10, 3), (6, 4)):
        yield 1, f'phi_index(k, {K}, {P}) for k = 0 ... {K - 1}', \
            lambda: [student.phi_index(k, K, P) for k in range(K)]


def encode(student, seed):
    for points, scales in ((2, [(3, 5)]), (4, LANDSCAPE)):
        f_BCHW = normal(seed, 2, 4, *scales[-1])
        yield points, f'tokens of two pictures at scales {scales}', \
            lambda: student.encode(f_BCHW, *pyramid(seed, scales)[1:])


def decode(student, seed):
    for points, scales, what in ((2, LANDSCAPE, 'last'), (3, LANDSCAPE, 'every')):
        yield points, f'f_hat after the {what} scale' if what == 'last' else 'f_hat after every scale', \
            lambda: student.decode(*pyramid(seed, scales))[-1 if what == 'last' else slice(None)]


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
    arguments = dict(weights_K=[1.0, 2.0, 5.0], beta=0.25)
    yield 1, 'its value', lambda: student.vq_loss(tensors[0], tensors[1:], **arguments)

    def gradients():
        f, *f_hats = [tensor.clone().requires_grad_() for tensor in tensors]
        return gradients_of(student.vq_loss(f, f_hats, **arguments), [f, *f_hats])
    yield 1, 'the gradients that reach f and each f_hat', gradients


def gradients_of(scalar: torch.Tensor, leaves: list) -> list:
    found = torch.autograd.grad(scalar, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(leaves, found)]


# ------------------------------------------------------------- A2: block-causal attention, with a cache
def block_mask(student, seed):
    for points, lengths, window in ((2, [1, 4, 9], None), (2, [1, 2, 6, 24], 1), (1, [1, 4, 4], 0)):
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
    yield 2, 'scales in the cache after each step, window 2', lambda: run(2)[1]


def sees(student, seed):
    lengths, D = [1, 4, 9, 4], 6
    scale_L = torch.arange(4).repeat_interleave(torch.tensor(lengths))
    earlier_LL = scale_L[:, None] >= scale_L
    skips_LL = earlier_LL & (scale_L[:, None] != scale_L + 2)                      # blind for one scale
    leaky_LL = earlier_LL | ((scale_L[:, None] == 1) & (scale_L == 2))
    for mask_LL, name in ((earlier_LL, 'block-causal'), (skips_LL, 'blind'), (leaky_LL, 'leaky')):
        def layer(x, normalise=name == 'leaky'):
            x = F.scaled_dot_product_attention(x, x, x, attn_mask=mask_LL)
            return F.layer_norm(x, (D,)) if normalise else x
        yield 2 if name == 'leaky' else 1, f'a {name} layer' + ', LayerNorm last' * (name == 'leaky'), \
            lambda: student.sees(layer, lengths, D)


# ------------------------------------------------------------------------------- A3: guided sampling
def ramp(student, seed):
    yield 1, 'ramp(0, 1.5, 10)', lambda: student.ramp(0, 1.5, 10)
    yield 1, 'ramp(3, 1, 5)', lambda: student.ramp(3, 1, 5)


def guide(student, seed):
    yield 2, 'guide(conditional, unconditional, 1.5)', \
        lambda: student.guide(normal(seed, 2, 3, 8), normal(seed + 1, 2, 3, 8), 1.5)


def top_k(student, seed):
    logits = normal(seed, 2, 3, 16)
    for points, k in ((2, 5), (1, 0)):
        yield points, f'logits after top_k(logits, {k})', lambda: student.top_k(logits.clone(), k)


def top_p(student, seed):
    logits = torch.tensor([0.10, 0.40, 0.05, 0.25, 0.20]).double().log()
    for p in (0.5, 0.7):
        yield 1, f'logits of probabilities 0.10 0.40 0.05 0.25 0.20 after top_p(logits, {p})', \
            lambda: student.top_p(logits.clone()[None, None], p)
    yield 1, 'logits of (2, 3, 16) normal numbers after top_p(logits, 0.8)', \
        lambda: student.top_p(normal(seed, 2, 3, 16), 0.8)


def draw(student, seed):
    logits = normal(seed, 2, 500, 8)
    noise = torch.from_numpy(np.random.default_rng(seed).random((2, 500)))
    yield 2, 'tokens of 1000 places', lambda: student.draw(logits, noise)
    logits = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).double().log().expand(1, 2, 5)
    yield 1, 'tokens of probabilities 0 0.5 0 0.5 0 at noise 0 and 0.999999', \
        lambda: student.draw(logits, torch.tensor([[0.0, 0.999999]]).double())


def sample_tokens(student, seed):
    import sample
    tokenizer, var, _ = sample.load(ROOT / 'notebooks' / 'cifar10.pt')
    noise_BL = sample.noise_of_pictures(seed, 0, 8, 85)

    def pick(logits_BlV, k):
        from var import draw_tokens
        return draw_tokens(logits_BlV, noise_BL.split(tokenizer.scale_lengths, 1)[k], 0, 0.8)
    for points, t_K, what in ((2, [0, 0, 0, 0], 'no guidance'), (3, [2.0, 0.0, 1.0, 3.0], 'guidance 2 0 1 3')):
        yield points, f'tokens of eight pictures of CIFAR-10, {what}', \
            lambda: student.sample_tokens(tokenizer, var, torch.arange(8), t_K, pick)


def known_places(student, seed):
    known_HW = torch.zeros(8, 8, dtype=torch.bool)
    known_HW[:, :5] = True
    yield 1, 'the left 5 of 8 columns are known, scales 1 2 4 8', \
        lambda: student.known_places(known_HW, (1, 2, 4, 8))
    yield 1, 'an L of a 6x6 map is known, scales 1 3 4 6', \
        lambda: student.known_places(torch.arange(36).view(6, 6) % 6 < torch.tensor([[2], [2], [2], [2], [6], [6]]),
                                     (1, 3, 4, 6))


# ------------------------------------------------------------------------------- A4: open-ended
A4_BATCHES, A4_BATCH = 200, 32


def train_tokenizer(student, seed):
    def trained():
        from dataclasses import asdict

        from train import draw_shapes
        torch.manual_seed(seed)
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
        self.names = {'__name__': '__main__'}

    def __getattr__(self, name: str):
        if name not in self.names:
            raise NameError(f'{name} is not defined')
        return self.names[name]


def plain(value):
    """Tensors, numbers, text and lists of them, which can be read back without running anybody's code."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return torch.as_tensor(value).detach().cpu().clone()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f'a {type(value).__name__} came back')


def describe(error: BaseException) -> str:
    """One line: what was raised, and where in the notebook."""
    places = [f'{frame.filename}, line {frame.lineno}' for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename.startswith('cell ')]
    text = re.sub(r'\s+', ' ', f'{type(error).__name__}: {error}'.rstrip(': '))[:200]
    return text + (f' ({places[-1]})' if places else '')


def write(path: Path, content):
    temporary = path.with_suffix('.part')
    torch.save(content, temporary)
    os.replace(temporary, path)


def main(notebook: str, assignment: str, folder: str, seed: str, *skipped: str):
    folder, student, complaints = Path(folder), Student(), []
    cells = [''.join(cell['source']) for cell in json.loads(Path(notebook).read_text('utf-8'))['cells']
             if cell['cell_type'] == 'code']
    for number, source in enumerate(cells, 1):
        step = f'cell {number}'
        if step in skipped or source.lstrip().startswith('# not for the grader'):
            continue
        (folder / 'step').write_text(step)
        try:
            source = re.sub(r'^(\s*)[%!].*', r'\1pass', source, flags=re.M)             # Jupyter's own commands
            exec(compile(source, step, 'exec'), student.names)
        except BaseException as error:                                                  # SystemExit as well
            complaints.append((step, describe(error)))
        write(folder / 'complaints', complaints)
    for task in TASKS[assignment]:
        step = f'task {task.__name__}'
        if step in skipped or (folder / task.__name__).exists():
            continue
        (folder / 'step').write_text(step)
        found = []
        for points, what, compute in task(student, int(seed)):
            try:
                found.append((points, what, plain(compute()), ''))
            except BaseException as error:
                found.append((points, what, None, describe(error)))
        write(folder / task.__name__, found)
    (folder / 'step').write_text('done')


if __name__ == '__main__':
    main(*sys.argv[1:])
    os._exit(0)                             # whatever the notebook left running or registered to run at exit
