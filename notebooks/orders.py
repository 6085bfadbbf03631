"""Transformers that predict the tokens of an image in other orders than VAR's, to compare them with it.

    model = Model(ORDERS['one by one'], vocab_size=256)
    fit(model, tokenizer, tokens_NL, labels_N, steps=775, batch_size=16, peak=0.008, seed=0, dtype='float32')
    images_B3HW, tokens_BL = model.generate(tokenizer, labels_B, cfg=2.0, ramp=True, noise_BL=noise_BL)

'VAR' and 'one by one' are twins. They have the same tokenizer, tokens and f_hat inputs, and nearly the same
weights. VAR predicts all tokens of a scale at once, so none of them can depend on another. One by one, a
position attends only to itself and to earlier ones, and its input also has the code of the token before it in
its scale. The losses of the twins, in nats per image, are of the same tokens and can be compared. studies.py
trains and measures them all; notebook 04 discusses the results. Tensor names are as in var.py.
"""
import sys
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from bench import flops_of                                                              # noqa: E402
from sample import autocast                                                             # noqa: E402
from train import learning_rate, parameter_groups                                       # noqa: E402
from var import HEAD_WIDTH, VAR, VARConfig, draw_tokens                                 # noqa: E402
from vqvae import VQVAE, VQVAEConfig                                                    # noqa: E402


PYRAMID = 1, 2, 4, 8
PLAIN = dict(adaln=False, unit_norm=False)


class Order(NamedTuple):
    """How a transformer predicts the tokens of an image. inputs: 'f_hat' (shrunk to each position, as in
    VAR), 'code' (of the token before, as in GPT) or 'both'. together: the scales whose tokens are predicted
    at once; the others are predicted one by one. rate: the best factor on the learning rate, found on drawn
    shapes. options: of VARConfig."""
    inputs: str
    together: tuple[int, ...] = ()
    scales: tuple[int, ...] = PYRAMID
    rate: float = 2.0
    options: dict = {}


def next_scale(*scales: int, **options) -> Order:
    return Order('f_hat', scales, scales, **options)


ORDERS = {
    'VAR': next_scale(*PYRAMID),                                        # these two are the twins
    'one by one': Order('both'),
    'last scale one by one': Order('both', (1, 2, 4)),
    'last scale together': Order('both', (8,)),
    'AR': Order('code', scales=(8,)),
    'AR on the pyramid': Order('code', rate=1.0),
    'plain VAR': next_scale(*PYRAMID, rate=0.5, options=PLAIN),
    'plain AR': Order('code', scales=(8,), rate=0.5, options=PLAIN),
    'VAR, 6 scales': next_scale(1, 2, 3, 4, 6, 8),
    'VAR, 7 scales': next_scale(1, 2, 3, 4, 5, 6, 8),
    'VAR, 8 scales': next_scale(1, 2, 3, 4, 5, 6, 7, 8)}
SEARCHED = 'VAR', 'one by one', 'AR', 'AR on the pyramid', 'plain VAR', 'plain AR'      # for their rates


class Row(NamedTuple):
    """A row of `orders`: a key of ORDERS, trained for a multiple of the data set's steps (equal 'steps') or
    of the FLOPs of VAR in these steps (equal 'flops'). rate: tried in the search; no samples are drawn."""
    order: str
    multiple: float = 1
    seeds: tuple[int, ...] = (0, 1, 2)
    equal: str = 'steps'
    rate: float | None = None


class Settings(NamedTuple):
    """Of a data set in `orders`; they are independent of the presets."""
    tokenizer: str                      # flags of train.py
    tokenizer_steps: int
    vocab_size: int
    steps: int
    batch_size: int
    learning_rate: float


CIFAR10 = Settings('--vocab-size 1024 --vqvae-batch-size 32 --vqvae-lr 0.032 --flip --perceptual-weight 0 '
                   '--adversarial-weight 0', 3000, 1024, 1000, 64, 0.004)
SHAPES = Settings('--vocab-size 256 --vqvae-batch-size 16 --vqvae-lr 0.064', 750, 256, 775, 16, 0.004)
SETTINGS = {'shapes': SHAPES, 'cifar10-cpu': CIFAR10, 'cifar10': CIFAR10}
ROWS = {
    'shapes': [
        *(Row(order, 1, (0,), rate=rate) for order in SEARCHED for rate in (0.5, 1.0, 2.0, 4.0)),
        Row('plain VAR', 1, (0,), rate=0.25), Row('plain AR', 1, (0,), rate=0.25),
        *map(Row, ('VAR', 'one by one', 'AR', 'AR on the pyramid')),
        Row('VAR', 4), Row('one by one', 4), Row('AR', 4), Row('VAR', 1 / 4), Row('one by one', 1 / 4),
        *map(Row, ('last scale one by one', 'last scale together', 'plain VAR', 'plain AR')),
        Row('VAR', 16, (0,)), Row('VAR, 7 scales', 16, (0,), 'flops'), Row('AR', equal='flops'),
        *(Row(f'VAR, {scales} scales', 1, (0,), 'flops') for scales in (6, 7, 8)),
        Row('VAR, 7 scales', 4, (0,), 'flops')],
    'cifar10-cpu': [Row('VAR'), Row('one by one'), Row('VAR', 4, (0,)), Row('one by one', 4, (0,)),
                    Row('AR')]}


class Model(VAR):
    """The transformer of a row: a VAR that predicts tokens in another order. One by one, a position attends
    to itself and the positions before it. Inputs 'both' are twice as wide. The depth sets the width; blocks:
    their number, if it is less."""

    def __init__(self, order: Order, vocab_size: int, depth: int = 2, blocks: int = 0):
        channels = VQVAEConfig().z_channels * (2 if order.inputs == 'both' else 1)
        super().__init__(VARConfig(depth, 10, vocab_size, channels, order.scales, adaln_gamma_init=1.0,
                                   order='scale' if order.scales[0] == 1 else 'raster', **order.options))
        del self.blocks[blocks or depth:]
        self.inputs, self.groups, follows = order.inputs, [], []
        for side in order.scales:
            is_one_by_one, length = side not in order.together, side * side
            self.groups += [1] * length if is_one_by_one else [length]
            follows += [is_one_by_one and i > 0 for i in range(length)]
        self.follows_L = torch.tensor(follows)          # a token before it, in its scale, is known
        group_L = torch.arange(len(self.groups)).repeat_interleave(torch.tensor(self.groups))
        self.mask_LL = group_L[:, None] >= group_L      # as in VAR, with these groups

    def teacher_inputs(self, tokenizer: VQVAE, tokens_BL: Tensor) -> Tensor:
        """(B, L - 1, C), or 2C for 'both': then the code is zero where no token of the scale is known."""
        codes_BLC = tokenizer.codebook(tokens_BL)[:, :-1]
        if self.inputs == 'code':
            return codes_BLC
        f_hats_BLC = tokenizer.teacher_inputs(tokens_BL)
        if self.inputs == 'f_hat':
            return f_hats_BLC
        return torch.cat([f_hats_BLC, codes_BLC * self.follows_L[1:, None]], dim=-1)

    def loss(self, tokenizer: VQVAE, tokens_BL: Tensor, labels_B: Tensor, noise_BN=None) -> Tensor:
        """Cross-entropy of each token, averaged over the images: (L,)."""
        logits_BLV = self(labels_B, self.teacher_inputs(tokenizer, tokens_BL), noise_BN)
        return F.cross_entropy(logits_BLV.mT, tokens_BL, reduction='none').mean(0)

    @torch.no_grad()
    def generate(self, tokenizer: VQVAE, labels_B: Tensor, cfg: float, ramp: bool, noise_BL: Tensor,
                 kept_BL: Tensor | None = None, return_tokens=True) -> tuple[Tensor, Tensor]:
        """As VAR.generate, in this order and without top-k and top-p. ramp: guidance rises from 0 to cfg
        over the scales (or, if there is only one, over the tokens); otherwise it is constant."""
        kept_BL = torch.full_like(noise_BL, -1, dtype=torch.int64) if kept_BL is None else kept_BL
        asked = [labels_B, torch.full_like(labels_B, self.config.num_classes)] if cfg else [labels_B]
        class_ND, (B, L), depth = self.class_embedding(torch.cat(asked)), noise_BL.shape, self.config.depth
        modulations, positions = self.modulations(class_ND), self.positions()
        dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else torch.float32
        caches = torch.empty(depth, 2, len(class_ND), depth, L, HEAD_WIDTH, dtype=dtype)
        ramp_L = self.scale_of_token_L if len(self.config.scales) > 1 else torch.arange(L)
        strengths_L = cfg * (ramp_L / ramp_L[-1] if ramp else torch.ones(L))
        tokens_BL, start = torch.zeros(B, L, dtype=torch.int64), 0
        x_NlD = class_ND[:, None] + self.start_position + positions[:, :1]
        for end in accumulate(self.groups):
            if start > 0:
                inputs_BlC = self.teacher_inputs(tokenizer, tokens_BL)[:, start - 1:end - 1]
                x_NlD = self.word_embedding(inputs_BlC).float() + positions[:, start:end]
                x_NlD = x_NlD.repeat(len(asked), 1, 1)
            logits_NlV = self.transform(x_NlD, modulations, None, caches, start)
            logits_BlV = logits_NlV[:B] + strengths_L[start] * (logits_NlV[:B] - logits_NlV[-B:])
            drawn_Bl, kept_Bl = draw_tokens(logits_BlV, noise_BL[:, start:end], 0, 0.0), kept_BL[:, start:end]
            tokens_BL[:, start:end] = torch.where(kept_Bl < 0, drawn_Bl, kept_Bl)
            start = end
        return tokenizer.decode(tokens_BL), tokens_BL


def fit(model: Model, tokenizer: VQVAE, tokens_NL: Tensor, labels_N: Tensor, steps: int, batch_size: int,
        peak: float, seed: int, dtype: str):
    """Trains as train.py does, on the model's device. Runs of equal seeds see the same images in order."""
    device = model.head.weight.device
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), betas=(0.9, 0.95), fused=True)
    random = torch.Generator().manual_seed(seed)
    for step in tqdm(range(steps), desc=f'{len(model.groups)} passes', disable=None):
        for group in optimizer.param_groups:
            group['lr'] = peak * learning_rate(step / steps, 0.01)
        images_B = torch.randint(len(tokens_NL), (batch_size,), generator=random)
        noise_BN = torch.rand(batch_size, 1 + 2 * model.config.depth, generator=random)
        batch = tokens_NL[images_B].long(), labels_N[images_B], noise_BN
        with autocast(device, dtype):
            loss_L = model.loss(tokenizer, *(tensor.to(device) for tensor in batch))
        loss_L.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad()


def train_flops(model: Model) -> int:
    """Training FLOPs per image."""
    return flops_of(VQVAEConfig(scales=model.config.scales), model.config, len(model.blocks))['train']


def steps_of(row: Row, preset: str, share: float = 1.0) -> int:
    """Training steps of a row, or of a share of it in a trial."""
    steps = share * row.multiple * SETTINGS[preset].steps
    if row.equal == 'flops':
        models = (Model(ORDERS[name], SETTINGS[preset].vocab_size) for name in ('VAR', row.order))
        var, this = map(train_flops, models)
        steps *= var / this
    return max(5, round(steps))
