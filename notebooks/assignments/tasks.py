"""The tasks of A1 to A5: the checks of grade.py, which probes.py runs in the process of the student's code.

A task is a generator of checks: (points, what is computed, how). Inputs are generated from the seed. A check
calls only the function of its own task, so one mistake costs one task. All that the function needs is passed
in and must not be modified. Nothing is graded here: answers are compared in a separate process.
"""
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import sample                                                                           # noqa: E402
from train import draw_shapes, to_float                                                 # noqa: E402
from var import VAR, VARConfig, draw_tokens                                             # noqa: E402
from vqvae import VQVAE, Phi                                                            # noqa: E402


def committed() -> tuple:
    """The tokenizer and the transformer that A3 and A5 use."""
    return sample.load(ROOT / 'notebooks' / 'cifar10.pt')[:2]


def normal(seed: int, *shape: int) -> torch.Tensor:
    """float64, so that equivalent computations do not disagree at near ties."""
    return torch.from_numpy(np.random.default_rng([seed, *shape]).normal(size=shape))


def questions(**points: int):
    """A task whose function takes no arguments and returns a dict of answers."""
    def questions(student, seed):
        for name, worth in points.items():
            yield worth, f'the answer {name!r}', lambda name=name: student.questions()[name]
    return questions


# ------------------------------------------------------------------------------- A1: multi-scale quantizer
LANDSCAPE = [(1, 1), (1, 2), (2, 3), (4, 6)]


def pyramid(seed: int, scales: list) -> tuple:
    """Random tokens for two images, a codebook, a phi for each scale, and the scales."""
    phis = [Phi(4, 4, 3, padding=1).double().requires_grad_(False) for _ in scales]
    for k, phi in enumerate(phis):
        phi.weight.copy_(normal(seed + k, 4, 4, 3, 3) / 6)
        phi.bias.copy_(normal(seed + k, 4) / 6)
    L = sum(h * w for h, w in scales)
    tokens_BL = torch.from_numpy(np.random.default_rng(seed).integers(32, size=(2, L)))
    return tokens_BL, normal(seed, 32, 4), phis, list(scales)


def phi_index(student, seed):
    ties = {(K, P) for K in range(5, 12) for P in range(2, 6) for k in range(K) for i in range(1, P)
            if abs(1 / (3 * P) + (i - 0.5) * (1 - 2 / (3 * P)) / (P - 1) - k / (K - 1)) < 1e-6}
    choices = [(K, P) for K in range(5, 12) for P in range(2, 6) if (K, P) not in ties]
    asked = np.random.default_rng(seed).permutation(choices).tolist()[:10]
    yield 1, f'phi_index(k, K, P), all k, for K, P = {str(asked)[1:-1]}', \
        lambda: [[student.phi_index(k, K, P) for k in range(K)] for K, P in asked]


def encode(student, seed):
    for points, scales in ((1, [(3, 5)]), (3, LANDSCAPE)):
        f_BCHW = normal(seed, 2, 4, *scales[-1])
        yield points, f'tokens of two images at scales {scales}', \
            lambda: student.encode(f_BCHW, *pyramid(seed, scales)[1:])


def decode(student, seed):
    for points, which, what in ((1, -1, 'the last'), (2, slice(None), 'every')):
        yield points, f'f_hat after {what} scale', \
            lambda: student.decode(*pyramid(seed, LANDSCAPE))[which]


def teacher_inputs(student, seed):
    f_hats = [normal(seed + k, 2, 4, *LANDSCAPE[-1]) for k in range(len(LANDSCAPE))]
    yield 2, f'inputs for scales {LANDSCAPE[1:]}', lambda: student.teacher_inputs(f_hats, list(LANDSCAPE))


def with_gradients(function, *tensors) -> list:
    """The value, and the gradient of a random weighted sum of its entries for each tensor."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    weighted = (value * normal(99, *value.shape)).sum()
    return [value, *torch.autograd.grad(weighted, leaves, allow_unused=True, materialize_grads=True)]


def straight_through(student, seed):
    f, f_hat = normal(seed, 2, 4, 3, 3), normal(seed + 1, 2, 4, 3, 3)
    yield 1, 'its value, and the gradients that reach f and f_hat', \
        lambda: with_gradients(student.straight_through, f, f_hat)


def vq_loss(student, seed):
    tensors = [normal(seed + i, 2, 4, 3, 3) for i in range(4)]
    *weights_K, beta = np.random.default_rng(seed).uniform(0.1, 2.0, 4).tolist()
    yield 1, 'its value, and the gradients that reach f and each f_hat', \
        lambda: with_gradients(lambda f, *f_hats: student.vq_loss(f, list(f_hats), weights_K, beta), *tensors)


def rotation_trick(student, seed):
    f, f_hat = normal(seed, 2, 4, 3, 5), normal(seed + 1, 2, 4, 3, 5)
    yield 1, 'its value', lambda: student.rotation_trick(f, f_hat)
    yield 3, 'the gradients that reach f and f_hat', \
        lambda: with_gradients(student.rotation_trick, f, f_hat)[1:]


def ema_update(student, seed):
    tokens_TN = torch.from_numpy(np.random.default_rng(seed).integers(5, size=(3, 12)))       # of seven codes
    tokens_TN[0].clamp_(max=3)                                      # code 4 comes into use later
    decay = round(np.random.default_rng(seed).uniform(0.5, 0.95), 2)
    for points, steps in ((2, 1), (2, 3)):
        def after_steps(steps=steps):
            state = normal(seed, 7, 4), torch.zeros(7).double(), torch.zeros(7, 4).double()
            for step in range(steps):
                state = student.ema_update(*state, normal(seed + step, 12, 4), tokens_TN[step], decay)
            return list(state)
        yield points, f'codebook, counts and sums after {steps} update{"s" * (steps > 1)}, decay {decay}', \
            after_steps


# ------------------------------------------------------------- A2: block-causal attention, with a cache
def block_mask(student, seed):
    random = np.random.default_rng(seed)
    for windows in ([None], [2], [1, 0]):
        lengths = [1, *random.integers(2, 9, 4).tolist()]
        yield 1, f'masks of scales of {lengths} tokens with window {str(windows)[1:-1]}', \
            lambda: [student.block_mask(list(lengths), window) for window in windows]


class Operations(TorchDispatchMode):
    """Counts torch operations."""
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **kwargs or {})


def attention(student, seed):
    sharpness = torch.tensor([1.0, 4.0, 60.0]).double()

    def attend(l, L, mask):                                                             # noqa: E741
        q, k, v = normal(seed, 2, 3, l, 5), normal(seed + 1, 2, 3, L, 5), normal(seed + 2, 2, 3, L, 5)
        return student.attention(q, k, v, mask, sharpness)

    def operations(L):
        with Operations() as counted:
            attend(L, L, None)
            attend(L, L, torch.ones(L, L).tril() > 0)
        return counted.count
    yield 1, '3 queries, 7 keys, no mask', lambda: attend(3, 7, None)
    yield 1, '5 queries, 7 keys, a mask', lambda: attend(5, 7, normal(seed, 5, 7) + 3 * torch.eye(5, 7) > 0)
    yield 1, 'about as many operations for 64 tokens as for 8: no loop over tokens', \
        lambda: operations(64) < 1.5 * operations(8)


def cached_step(student, seed):
    lengths = [1, 2, 6, 12]
    maps = [[normal(seed + i, 2, 3, length, 5) for i in range(3)] for length in lengths]

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)       # scale differs from torch's default

    def run(window):
        cache, outputs, sizes = [], [], []
        for q, k, v in maps:
            output, cache = student.cached_step(q, k, v, cache, window, attend)
            outputs.append(output)
            sizes.append(len(cache))
        return outputs, sizes, cache
    for windows in ([None], [2, 1, 0]):
        yield 1, f'outputs of scales of {lengths} tokens, window {str(windows)[1:-1]}', \
            lambda: [run(window)[0] for window in windows]
    yield 1, 'scales in the cache after each step, windows 2, 1, 0', \
        lambda: [run(window)[1] for window in (2, 1, 0)]
    yield 1, 'the cache after the last step, window 2: keys and values, oldest scale first', lambda: run(2)[2]


def sees(student, seed):
    random, D = np.random.default_rng(seed), 8
    lengths = [1, *random.integers(4, 9, random.integers(2, 5)).tolist()]
    early, late = sorted((1 + random.choice(len(lengths) - 1, 2, replace=False)).tolist())
    scale_L = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    earlier_LL = scale_L[:, None] >= scale_L
    blind_LL = earlier_LL & ~((scale_L[:, None] == late) & (scale_L == early))
    leaky_LL = earlier_LL | ((scale_L[:, None] == early) & (scale_L == late))

    def attend(x, mask_LL):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask_LL)

    def centred(x):
        return x - x.mean(-1, keepdim=True)             # its sum is always 0, and so is the gradient

    def balanced(x):
        """Cosine, sine and ones: the gradient of the sum of squares is exactly 0."""
        return torch.cat([x[..., :1].cos(), x[..., :1].sin(), torch.ones_like(x[..., 2:])], -1)

    def first_sees(x):
        """Scale 0 depends on scale `late`, but not on itself."""
        start = sum(lengths[:late])
        return torch.cat([x[:, start:start + 1] * 2, x[:, 1:]], 1)

    def leaks(i):
        """One number of scale `early` depends on one of scale `late`; the rest is the identity."""
        out, into = (sum(lengths[:k]) + (random.permutation(lengths[k]) if 0 < i < 3 else
                                         [0, 0, 0, lengths[k] - 1])[i] for k in (early, late))
        there, here = random.integers(1, D - 1, 2)
        leak = torch.zeros(1, sum(lengths), D)
        leak[:, out, there] = 1
        return lambda x: x + leak.to(x) * x[:, into, here]
    hidden = [leaks(i) for i in range(4)]
    for layers, what in (([lambda x: attend(x, earlier_LL), lambda x: attend(x, blind_LL), first_sees],
                          'layers that are block-causal, blind to a scale, or see only a later one'),
                         ([lambda x: centred(attend(x, leaky_LL)), lambda x: attend(x, leaky_LL) ** 2],
                          'a leaky layer whose outputs sum to 0, and one that squares its outputs'),
                         ([lambda x: F.normalize(attend(x, leaky_LL), dim=-1),
                           lambda x: balanced(attend(x, leaky_LL))],
                          'leaky layers whose outputs have constant length'),
                         (hidden, 'layers that leak a single number, at various positions')):
        yield 1, f'{what}, scales of {lengths} tokens', \
            lambda: [student.sees(layer, list(lengths), D) for layer in layers]


def window_cost(student, seed):
    random = np.random.default_rng(seed)
    lengths, (depth, D) = [1, *random.integers(2, 60, 5).tolist()], random.integers(2, 99, 2).tolist()
    for i, what in enumerate(('FLOPs', 'numbers held')):
        yield 1, f'{what}, scales of {lengths} tokens, depth {depth}, width {D}, windows None, 2, 1, 0', \
            lambda: [student.window_cost(lengths, window, depth, D)[i] for window in (None, 2, 1, 0)]


# ------------------------------------------------------------------------------- A3: guided sampling
def ramp(student, seed):
    first, last = np.random.default_rng(seed).integers(1, 9, 2) / 2
    asked = [(0.0, float(last), 10), (float(first + last), float(first), 5)]
    yield 1, f'ramp(first, last, K) for {str(asked)[1:-1]}', lambda: [student.ramp(*three) for three in asked]


def guide(student, seed):
    t = round(np.random.default_rng(seed).uniform(1.2, 4), 1)
    yield 1, f'guide(conditional, unconditional, {t})', \
        lambda: student.guide(normal(seed, 2, 3, 8), normal(seed + 1, 2, 3, 8), t)


def top_k(student, seed):
    for asked in ([5], [0, 16, 20]):
        yield 1, f'logits of 16 codes after top_k with k = {str(asked)[1:-1]}', \
            lambda: [student.top_k(normal(seed, 2, 3, 16), k) for k in asked]


def top_p(student, seed):
    for asked in ([0.5, 0.7, 0.9], [0, 1]):
        yield 1, f'logits of 16 codes after top_p with p = {str(asked)[1:-1]}', \
            lambda: [student.top_p(normal(seed, 2, 3, 16), p) for p in asked]


def draw(student, seed):
    logits = normal(seed, 2, 500, 8)
    noise = torch.from_numpy(np.random.default_rng(seed).random((2, 500)))
    yield 2, 'tokens at 1000 positions', lambda: student.draw(logits, noise)
    # ten tenths sum to slightly less than 1; there are codes of probability 0 before and after
    tenths = torch.full((14,), -torch.inf).double()
    tenths[1:11] = 0
    ends = torch.tensor([[0.0, 1 - 2.0 ** -53]], dtype=torch.float64)
    yield 1, 'tokens for probabilities 0, ten times 0.1, 0 0 0, at noise 0 and the largest number below 1', \
        lambda: student.draw(tenths.repeat(1, 2, 1), ends)


def sample_tokens(student, seed):
    tokenizer, var = committed()
    lengths, K = var.config.lengths, len(var.config.lengths)
    noise_BL = sample.noise_of_images(seed, 0, 8, sum(lengths))

    def pick(logits_BlV, k):
        return draw_tokens(logits_BlV, noise_BL.split(lengths, 1)[k], 0, 0.8)
    for points, t_K in ((1, [0.0] * K), (3, [2.0, 0.0, 1.0, 3.0, *range(4, K)])):
        yield points, f'tokens of eight CIFAR-10 samples, strengths {t_K}', \
            lambda: student.sample_tokens(tokenizer, var, torch.arange(8), t_K, pick)


def known_places(student, seed):
    random, asked = np.random.default_rng(seed), []
    for size, scales in ((8, (1, 2, 4, 8)), (6, (1, 3, 4, 6)), (5, (1, 2, 3, 4, 5))):
        rows, columns = random.integers(size // 2, size, 2).tolist()
        known_HW = torch.zeros(size, size, dtype=torch.bool)
        known_HW[:rows], known_HW[:, :columns] = True, True
        asked += [(known_HW, scales), (torch.from_numpy(random.random((size, size)) < 0.8), scales)]
    yield 1, 'known tokens of 8x8, 6x6 and 5x5 maps, known in an L or in scattered areas', \
        lambda: [student.known_places(*pair) for pair in asked]


def complete(student, seed):
    tokenizer = committed()[0].double()
    shape = 4, tokenizer.config.z_channels, *tokenizer.config.scales[-1:] * 2
    f_BCHW, wanted_BCHW = normal(seed, *shape) / 2, normal(seed + 1, *shape) / 2

    def draw_scale(f_hat_BCHW, k):
        return tokenizer.nearest_codes(tokenizer.shrink(wanted_BCHW - f_hat_BCHW, k))
    known_L = torch.from_numpy(np.random.default_rng(seed).random(sum(tokenizer.scale_lengths)) < 0.5)
    for what, places_L in (('nothing', known_L & False), ('half', known_L)):
        yield 1 if what == 'nothing' else 3, f'tokens of four images of which {what} is known', \
            lambda: student.complete(tokenizer, f_BCHW, places_L, draw_scale)


# ------------------------------------------------------------------------------- A4: open-ended
A4_BATCHES, A4_BATCH, A4_ENCODED = 100, 32, 4_000       # A4_ENCODED: limit on the images encoded


def train_tokenizer(student, seed):
    def trained():
        count, features = 0, VQVAE.features

        def counted(self, images):
            nonlocal count
            count += len(images)
            if count > A4_ENCODED:
                raise RuntimeError(f'the budget of {A4_ENCODED} images through the encoder is used up')
            return features(self, images)
        VQVAE.features = counted
        pictures, _ = draw_shapes(A4_BATCHES * A4_BATCH, seed=seed + 1)
        tokenizer = student.train_tokenizer(iter(pictures.split(A4_BATCH)))
        return asdict(tokenizer.config), dict(tokenizer.state_dict())
    yield 20, f'a tokenizer trained on {A4_BATCHES * A4_BATCH} images', trained


# ------------------------------------------------------------------------------- A5: training stage 2
def hide_labels(student, seed):
    labels_B = torch.from_numpy(np.random.default_rng(seed).integers(10, size=50))
    noise_B = torch.from_numpy(np.random.default_rng(seed).random(50))
    noise_B[0] = 0.3                                        # equal to the rate 0.3, so not hidden
    null = 10 + seed % 7
    yield 1, f'fifty labels at rates 0.3, 0 and 1, null class {null}', \
        lambda: [student.hide_labels(labels_B, noise_B, rate, null) for rate in (0.3, 0.0, 1.0)]


def loss_by_scale(student, seed):
    logits_BLV, lengths = normal(seed, 3, 14, 8), [1, 4, 9]
    tokens_BL = torch.from_numpy(np.random.default_rng(seed).integers(8, size=(3, 14)))
    yield 1, 'loss of all tokens, and its gradient', lambda: with_gradients(
        lambda logits_BLV: student.loss_by_scale(logits_BLV, tokens_BL, list(lengths))[0], logits_BLV)
    yield 1, 'loss of each scale', lambda: student.loss_by_scale(logits_BLV, tokens_BL, list(lengths))[1]


def last_inputs(student, seed):
    tokenizer, _ = committed()
    V, L = tokenizer.config.vocab_size, sum(tokenizer.scale_lengths)
    tokens_BL = torch.from_numpy(np.random.default_rng(seed).integers(V, size=(3, L)))
    tokenizer.requires_grad_()

    def inputs():
        found = student.last_inputs(tokenizer, tokens_BL)
        return [found, found.requires_grad]
    yield 3, 'inputs of three images, without a gradient', inputs


def small_var(seed: int) -> VAR:
    config = committed()[0].config
    torch.manual_seed(seed)
    return VAR(VARConfig(1, 10, config.vocab_size, config.z_channels, config.scales, adaln_gamma_init=1e-2))


def drawings(count: int, seed: int) -> tuple:
    """Labels, tokens from the committed tokenizer and both kinds of inputs, for `count` drawn shapes."""
    tokenizer, _ = committed()
    pictures, labels_N = draw_shapes(count, seed)
    tokens_NL = tokenizer.encode(to_float(pictures))
    *parts, _ = tokens_NL.split(tokenizer.scale_lengths, 1)
    last = [tokenizer.next_input(tokenizer.contribution(part, k), k).detach() for k, part in enumerate(parts)]
    return labels_N, tokens_NL, dict(f_hat=tokenizer.teacher_inputs(tokens_NL), last=torch.cat(last, 1))


def by_heart(student, seed):
    _, tokens_BL, inputs = drawings(8, seed)
    yield 6, 'a transformer that has memorised eight drawn shapes', lambda: dict(
        student.by_heart(small_var(seed), torch.arange(8), inputs['f_hat'], tokens_BL).state_dict())


def ablation(student, seed):
    labels_N, tokens_NL, inputs = drawings(480, seed + 1)

    def trained():
        models = student.ablation(lambda: small_var(seed), labels_N, inputs, tokens_NL)
        return {name: dict(models[name].state_dict()) for name in inputs}
    yield 6, 'two transformers trained on 480 drawn shapes', trained


TASKS = {'A1': [phi_index, encode, decode, teacher_inputs, straight_through, vq_loss, rotation_trick,
                ema_update],
         'A2': [block_mask, attention, cached_step, sees, window_cost,
                questions(cache=1, window_cache=1, saved=1, mask=1)],
         'A3': [ramp, guide, top_k, top_p, draw, sample_tokens, known_places, complete,
                questions(lowered=1, guided=1)],
         'A4': [train_tokenizer],
         'A5': [hide_labels, loss_by_scale, last_inputs, by_heart, ablation, questions(same=1, null=1)]}
