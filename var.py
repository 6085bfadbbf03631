"""Stage 2 of VAR: the transformer that predicts an image's token pyramid, scale by scale.

GPT predicts the next token. VAR predicts the next token *map*: all tokens of the next finer scale at
once, given all coarser scales. Equation 6 of "Visual Autoregressive Modeling" (Tian et al., 2024,
arXiv 2404.02905), where r_k is the (h_k, w_k) token map of scale k:

    p(r_1, r_2, ..., r_K) = product over k of p(r_k | r_1, ..., r_{k-1})

    tokenizer = VQVAE(VQVAEConfig())                            # stage 1: 256 codes of 16 channels
    model = VAR(VARConfig(depth=2, num_classes=10, vocab_size=256, z_channels=16, scales=(1, 2, 4, 8)))
    labels_B, tokens_BL = torch.tensor([3, 8]), tokenizer.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    logits_BLV = model(labels_B, tokenizer.teacher_inputs(tokens_BL))   # training: all scales in one pass
    images_B3HW = model.generate(tokenizer, labels_B, cfg=1.5)          # sampling: scale by scale

The sequence for scales 1, 2, 3: a start token and 13 inputs predict 14 tokens. Each position attends to the
inputs of its own and all coarser scales, which are computed without the tokens of its scale:

    input      start token   f_hat after scale 1, shrunk to 2x2   f_hat after scale 2, shrunk to 3x3
    predicts   r_1           r_2, 4 tokens at once                r_3, 9 tokens at once

Tensor names end in their shapes:

    B batch   D width of the transformer   C latent channels of the tokenizer   V vocabulary   K scales
    H, W latent size at the finest scale   h, w size at the current scale   L tokens of all scales, l of one
"""
import math
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_WIDTH = 64
RELEASED_NAMES = (                # substrings of the released weight names -> ours
    ('pos_start', 'start_position'), ('pos_1LC', 'position'), ('word_embed.', 'word_embedding.'),
    ('lvl_embed.', 'scale_embedding.'), ('class_emb.', 'class_embedding.'), ('attn.mat_qkv', 'attention.qkv'),
    ('attn.', 'attention.'), ('scale_mul_1H11', 'log_scale'), ('.ffn.fc', '.fc'), ('ada_gss', 'adaln_table'),
    ('head_nm.ada_lin.1', 'head_adaln'), ('shared_ada_lin.1', 'shared_adaln'), ('.ada_lin.1.', '.adaln.'))


@dataclass(frozen=True)
class VARConfig:
    """Hyperparameters of the transformer. An invalid value raises ValueError, 'field=value: why'."""
    depth: Annotated[int, 'number of transformer blocks and of heads; the width is 64 * depth'] = 16
    num_classes: Annotated[int, 'number of classes; label num_classes is the null class'] = 1000
    vocab_size: Annotated[int, 'V, codes in the codebook'] = 4096
    z_channels: Annotated[int, 'C, latent channels'] = 32
    scales: Annotated[tuple[int, ...], 'side of each map, coarse to fine'] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    unit_norm: Annotated[bool, 'cosine attention: queries and keys normalised to length 1'] = True
    shared_adaln: Annotated[bool, 'one AdaLN projection for all blocks (as in the released d36)'] = False
    label_dropout: Annotated[float, 'probability of replacing a label by the null class in training'] = 0.1
    stochastic_depth: Annotated[float | None, 'drop rate of the last block; None: 0.1 * depth / 24'] = None
    adaln_gamma_init: Annotated[float, 'factor on the initial weights of the gates (gamma in Block)'] = 1e-5
    adaln: Annotated[bool, 'condition every block on the class, not only the start token'] = True
    order: Annotated[Literal['scale', 'raster'], 'scale by scale, or tokens row by row (baseline)'] = 'scale'

    @property
    def width(self) -> int:
        return HEAD_WIDTH * self.depth

    @property
    def lengths(self) -> list[int]:
        """Sizes of the groups of tokens predicted at once: a whole scale or, as in GPT, one token."""
        return [side * side for side in self.scales] if self.order == 'scale' else [1] * self.scales[0] ** 2

    def __post_init__(self):
        def check(fits, name: str, why: str):
            if not fits:
                raise ValueError(f'{name}={getattr(self, name)}: {why}')
        for name in ('depth', 'num_classes', 'vocab_size', 'z_channels'):
            most = 200 if name == 'depth' else 2 ** 30
            check(1 <= getattr(self, name) <= most, name, f'must be at least 1 and at most {most}')
        for name in ('label_dropout', 'stochastic_depth'):
            check(0 <= (getattr(self, name) or 0) < 1, name, 'must be in [0, 1)')
        check(self.adaln or not self.shared_adaln, 'shared_adaln', 'requires adaln')
        sides = list(self.scales)
        fits = dict(scale=sides[:1] == [1] and len(sides) > 1 and sides == sorted({*sides}),
                    raster=len(sides) == 1 and sides[0] > 1)
        check(fits.get(self.order), 'scales', f'not for order {self.order}; order scale needs two or more '
              'maps increasing from 1, order raster exactly one map of at least 2x2')


def attend(q: Tensor, k: Tensor, v: Tensor, mask_ll: Tensor | None, scale: float) -> Tensor:
    """Per position, the mean of v weighted by softmax(scale * q . k) over the positions it attends to."""
    if q.requires_grad and q.device.type == 'cpu' and q.dtype == torch.bfloat16:
        # torch's own backward is half as fast here: a training step would take 1.3 times as long
        with torch.autocast('cpu', enabled=False):
            scores = scale * q.float() @ k.float().transpose(-1, -2)        # float32: the softmax is sharp
            if mask_ll is not None:
                scores = scores + torch.zeros(mask_ll.shape).masked_fill(~mask_ll, -math.inf)
            return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_ll, scale=scale)


class Attention(nn.Module):
    def __init__(self, config: VARConfig):
        super().__init__()
        D, self.unit_norm = config.width, config.unit_norm
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))   # none for k
        self.proj = nn.Linear(D, D)
        if config.unit_norm:
            self.log_scale = nn.Parameter(torch.full((1, config.depth, 1, 1), 4.0).log())

    def forward(self, x_BlD: Tensor, mask_ll: Tensor | None, cache: Tensor | None, start: int) -> Tensor:
        """cache: (2, B, heads, L, 64), keys and values of the tokens before `start`; those of x are added."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x_BlD, self.qkv.weight, bias).unflatten(-1, (3, -1, HEAD_WIDTH))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (B, heads, l, 64) each
        scale = 1 / math.sqrt(HEAD_WIDTH)       # released code without unit norm: a quarter of this
        if self.unit_norm:
            scale, sharpness = 1.0, self.log_scale.clamp_max(math.log(100)).exp()      # one per head
            lengths = [torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32) for x in (q, k)]
            q = q * (sharpness / lengths[0].clamp_min(1e-12)).to(q.dtype)       # q . k = sharpness * cosine
            k = k * (1 / lengths[1].clamp_min(1e-12)).to(k.dtype)
        if cache is not None:
            end = start + x_BlD.shape[1]
            cache[0, :, :, start:end], cache[1, :, :, start:end] = k, v
            k, v = cache[:, :, :, :end]
        return self.proj(attend(q, k, v, mask_ll, scale).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """GPT-2 block with AdaLN: the class controls the norms (scale, shift) and gates both branches (gamma)."""

    def __init__(self, config: VARConfig, drop_rate: float):
        super().__init__()
        D, self.drop_rate = config.width, drop_rate
        self.attention = Attention(config)
        self.fc1, self.fc2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        if config.shared_adaln:
            self.adaln_table = nn.Parameter(torch.randn(1, 1, 6, D) / D ** 0.5)   # added to the shared part
        else:
            self.adaln = (nn.Linear(D, 6 * D) if config.adaln else
                          nn.Parameter(torch.cat([torch.ones(2 * D), torch.zeros(4 * D)])))

    def modulation(self, class_BD: Tensor, shared_B16D: Tensor | None, noise_B2: Tensor | None) -> list:
        """gamma1, gamma2, scale1, scale2, shift1, shift2 for these classes, (B, 1, D) each."""
        adaln_B16D = (project(class_BD, self.adaln, 6) if shared_B16D is None else
                      self.adaln_table + shared_B16D)
        gamma1, gamma2, *others = adaln_B16D.unbind(2)
        if noise_B2 is not None:                            # stochastic depth, per image and branch
            keep_2B11 = ((noise_B2 >= self.drop_rate) / (1 - self.drop_rate)).T[:, :, None, None]
            gamma1, gamma2 = (torch.stack([gamma1, gamma2]) * keep_2B11.to(gamma1.dtype)).unbind(0)
        return [gamma1, gamma2, *others]

    def forward(self, x_BlD: Tensor, modulation: list[Tensor], mask_ll=None, cache=None, start=0) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
        h = self.attention(modulate(x_BlD, scale1, shift1), mask_ll, cache, start)
        x_BlD = torch.addcmul(x_BlD, gamma1, h)                     # x + gamma1 * h, fused
        h = self.fc2(F.gelu(self.fc1(modulate(x_BlD, scale2, shift2)), approximate='tanh'))
        return torch.addcmul(x_BlD, gamma2, h)


def project(class_BD: Tensor, adaln: nn.Linear | Tensor, count: int) -> Tensor:
    """AdaLN parameters for these classes, (B, 1, count, D); without AdaLN, one learned set for all."""
    rows = adaln(F.silu(class_BD)) if isinstance(adaln, nn.Linear) else adaln.expand(len(class_BD), -1)
    return rows.unflatten(-1, (1, count, -1))


def modulate(x_BlD: Tensor, scale_B1D: Tensor, shift_B1D: Tensor) -> Tensor:
    """AdaLN: normalise, then apply the scale and shift of the class."""
    normalised = F.layer_norm(x_BlD, x_BlD.shape[-1:], eps=1e-6).to(scale_B1D.dtype)
    return torch.addcmul(shift_B1D, normalised, 1 + scale_B1D)


class VAR(nn.Module):
    """The transformer. Methods that need the tokenizer take it as an argument; it is not a submodule."""

    def __init__(self, config: VARConfig):
        super().__init__()
        self.config, lengths = config, config.lengths
        D, L, K, depth = config.width, sum(lengths), len(config.scales), config.depth
        self.class_embedding = nn.Embedding(config.num_classes + 1, D)
        self.start_position = nn.Parameter(torch.empty(1, 1, D))        # as released, added to position 0
        self.word_embedding = nn.Linear(config.z_channels, D)
        self.position = nn.Parameter(torch.empty(1, L, D))
        self.scale_embedding = nn.Embedding(K, D)                       # indexed by scale; raster: 0
        self.shared_adaln = nn.Linear(D, 6 * D) if config.shared_adaln else None
        drop_rate = 0.1 * depth / 24 if config.stochastic_depth is None else config.stochastic_depth
        self.blocks = nn.ModuleList(Block(config, drop_rate * i / max(1, depth - 1)) for i in range(depth))
        self.head_adaln = nn.Linear(D, 2 * D) if config.adaln else nn.Parameter(torch.zeros(2 * D))
        self.head = nn.Linear(D, config.vocab_size)

        # on the CPU: on 'meta' (see from_official) it would have no values
        group_L = torch.tensor([k for k, length in enumerate(lengths) for _ in range(length)], device='cpu')
        self.register_buffer('scale_of_token_L', group_L.clamp(max=K - 1), persistent=False)
        # block-causal: True where the row's position attends to the column's: its own and earlier groups
        self.register_buffer('mask_LL', group_L[:, None] >= group_L[None, :], persistent=False)
        self.init_weights()

    def init_weights(self):
        """As released: small weights; with AdaLN, each block is almost the identity."""
        D, depth, std = self.config.width, self.config.depth, math.sqrt(1 / (3 * self.config.width))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.start_position, std=std)
        nn.init.trunc_normal_(self.position, std=std)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            for block in self.blocks:
                block.attention.proj.weight.div_(math.sqrt(2 * depth))
                block.fc2.weight.div_(math.sqrt(2 * depth))
            if not self.config.adaln:
                return
            self.head_adaln.weight.mul_(0.5)
            for block in self.blocks:
                table_6 = (block.adaln_table[0, 0] if self.config.shared_adaln
                           else block.adaln.weight.unflatten(0, (6, D)))
                table_6[:2].mul_(self.config.adaln_gamma_init)          # gamma1, gamma2
                table_6[2:].mul_(0.5)                                   # scale1, scale2, shift1, shift2

    def positions(self) -> Tensor:
        """Position embedding plus scale embedding: (1, L, D)."""
        return self.position + self.scale_embedding(self.scale_of_token_L)

    def modulations(self, class_BD: Tensor, noise_BN: Tensor | None = None) -> list[list[Tensor]]:
        """AdaLN parameters of each block and, last, the head; they are the same at all scales."""
        shared_B16D = project(class_BD, self.shared_adaln, 6) if self.shared_adaln else None
        pairs = [None] * self.config.depth if noise_BN is None else noise_BN[:, 1:].split(2, dim=1)
        return [*(block.modulation(class_BD, shared_B16D, noise_B2)
                  for block, noise_B2 in zip(self.blocks, pairs)),
                project(class_BD, self.head_adaln, 2).unbind(2)]

    def transform(self, x_BlD: Tensor, modulations: list, mask_ll=None, caches=None, start=0) -> Tensor:
        """Blocks and head: (B, l, D) -> logits (B, l, V), float32 (computed in the autocast dtype)."""
        caches = [None] * len(self.blocks) if caches is None else caches
        for block, modulation, cache in zip(self.blocks, modulations, caches):
            # block() may be compiled for training's one shape; in sampling, each shape would recompile it
            run = block if torch.is_grad_enabled() else block.forward
            x_BlD = run(x_BlD, modulation, mask_ll, cache, start)
        return self.head(modulate(x_BlD, *modulations[-1])).float()

    # --- training
    def forward(self, labels_B: Tensor, inputs_BLC: Tensor, noise_BN: Tensor | None = None) -> Tensor:
        """Labels in [0, num_classes] and inputs from tokenizer.teacher_inputs -> logits_BLV, float32.

        noise_BN, only in training: 1 + 2 * depth uniform numbers in [0, 1) per image. If the first is below
        label_dropout, the null class replaces the label (for classifier-free guidance); the others
        decide which branches of each block are skipped. Raises ValueError if the inputs have the wrong shape.
        """
        expected = len(labels_B), sum(self.config.lengths) - 1, self.config.z_channels
        if inputs_BLC.shape != expected:
            raise ValueError(f'inputs_BLC {tuple(inputs_BLC.shape)}: must be {expected} for {self.config}')
        if noise_BN is not None:
            is_hidden_B = noise_BN[:, 0] < self.config.label_dropout
            labels_B = labels_B.masked_fill(is_hidden_B, self.config.num_classes)
        class_BD = self.class_embedding(labels_B)
        start_B1D = class_BD[:, None] + self.start_position
        x_BLD = torch.cat([start_B1D, self.word_embedding(inputs_BLC).float()], dim=1)
        return self.transform(x_BLD + self.positions(), self.modulations(class_BD, noise_BN), self.mask_LL)

    # --- sampling
    def check_tokenizer(self, tokenizer):
        for name in ('scales', 'vocab_size', 'z_channels'):
            ours, its = getattr(self.config, name), getattr(tokenizer.config, name)
            if ours != its:
                raise ValueError(f'{name}: the transformer was made for {ours}, but the tokenizer has {its}')

    @torch.no_grad()
    def generate(self, tokenizer, labels_B: Tensor, cfg: float = 1.5, top_k: int = 900, top_p: float = 0.96,
                 noise_BL: Tensor | None = None, kept_BL: Tensor | None = None, return_tokens: bool = False):
        """Labels in [0, num_classes] -> images_B3HW in [-1, 1], or with return_tokens (images, tokens_BL).

        cfg: strength of classifier-free guidance at the last scale, rising linearly from 0 at the first, as
            released (raster order: constant). In the form uncond + s * (cond - uncond), s is 1 + cfg.
        top_k, top_p: see `draw_tokens`; defaults of the released code for FID (paper: top-k 600).
        noise_BL: a uniform number in [0, 1) per token, the only randomness; None: torch's default generator.
        kept_BL: int64 from `VQVAE.keep`, the token to keep or -1 to sample one; None: sample all.
        Raises ValueError if the tokenizer doesn't match, FloatingPointError if the logits aren't finite.
        """
        self.check_tokenizer(tokenizer)
        B, lengths, G = len(labels_B), self.config.lengths, len(self.config.lengths)
        noise_BL = torch.rand(B, sum(lengths), device=labels_B.device) if noise_BL is None else noise_BL
        kept_BL = labels_B.new_full((1, sum(lengths)), -1) if kept_BL is None else kept_BL
        # guidance: of N = 2B rows, the first B have the labels, the rest the null class; at cfg 0, N = B
        asked = [labels_B, torch.full_like(labels_B, self.config.num_classes)] if cfg else [labels_B]
        class_ND = self.class_embedding(torch.cat(asked))
        modulations = self.modulations(class_ND)
        # keys and values in the dtype of attention: (blocks, key or value, N, heads, L, 64)
        device, depth = class_ND.device.type, self.config.depth
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else class_ND.dtype
        caches = class_ND.new_empty((depth, 2, len(class_ND), depth, sum(lengths), HEAD_WIDTH), dtype=dtype)
        positions = self.positions().split(lengths, dim=1)
        x_NlD = class_ND[:, None] + self.start_position + positions[0]
        tokens, f_hat, checksum = [], 0.0, 0.0
        for k, (noise_Bl, kept_Bl) in enumerate(zip(noise_BL.split(lengths, 1), kept_BL.split(lengths, 1))):
            # no mask: the cache ends with group k, in which all positions attend to each other
            logits_NlV = self.transform(x_NlD, modulations, None, caches, start=sum(lengths[:k]))
            t = cfg * k / (G - 1) if self.config.order == 'scale' else cfg
            logits_BlV = logits_NlV[:B]
            if cfg:                                 # (1 + t) * conditional - t * unconditional, in place
                logits_BlV = (logits_BlV - logits_NlV[B:]).mul_(t).add_(logits_BlV)
            checksum = checksum + logits_BlV.sum()          # checked at the end: one GPU sync
            tokens_Bl = torch.where(kept_Bl < 0, draw_tokens(logits_BlV, noise_Bl, top_k, top_p), kept_Bl)
            tokens.append(tokens_Bl)
            if k == G - 1:
                break
            if self.config.order == 'raster':
                input_BlC = tokenizer.codebook(tokens_Bl)
            else:
                f_hat = f_hat + tokenizer.contribution(tokens_Bl, k)
                input_BlC = tokenizer.next_input(f_hat, k)
            x_NlD = (self.word_embedding(input_BlC).float() + positions[k + 1]).repeat(len(asked), 1, 1)
        if not checksum.isfinite():
            raise FloatingPointError(f'logits are not finite at cfg={cfg}; use a lower cfg')
        tokens_BL = torch.cat(tokens, dim=1)
        images = tokenizer.decode(tokens_BL)
        return (images, tokens_BL) if return_tokens else images

    # --- released weights
    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], scales: tuple[int, ...]) -> 'VAR':
        """A VAR with released weights (var_d16.pth to var_d36.pth); float32 tensors are shared, not copied.
        All sizes except the scales are inferred from the weights. Raises ValueError if they don't fit."""
        weights = {reduce(lambda key, pair: key.replace(*pair), RELEASED_NAMES, key): weight
                   for key, weight in state_dict.items()            # without buffers
                   if not key.endswith(('lvl_1L', 'attn_bias_for_masking', 'zero_k_bias'))}
        try:
            width, z_channels = weights['word_embedding.weight'].shape
            num_classes, vocab_size = len(weights['class_embedding.weight']) - 1, len(weights['head.weight'])
            with torch.device('meta'):              # skips the slow initialisation
                model = cls(VARConfig(width // HEAD_WIDTH, num_classes, vocab_size, z_channels, tuple(scales),
                                      shared_adaln='shared_adaln.weight' in weights))
            model.load_state_dict({key: weight.float() for key, weight in weights.items()}, assign=True)
        except (LookupError, TypeError, RuntimeError) as error:
            reason = ' '.join(str(error).split())
            raise ValueError(f"not a released VAR transformer ({reason}); from a training checkpoint take "
                             "['trainer']['var_wo_ddp'] and cut 'module.', '_orig_mod.' from keys") from None
        return model


def draw_tokens(logits_BlV: Tensor, noise_Bl: Tensor, top_k: int, top_p: float) -> Tensor:
    """Samples a token at each position: (B, l) int64. Of the top_k most likely tokens (0 or >= V: all), keeps
    the fewest whose renormalised probabilities sum to top_p or more (0 or 1: all). Inverse CDF, most likely
    first: draws the first token whose cumulative probability exceeds noise * total kept probability."""
    V = logits_BlV.shape[-1]
    logits_Blk, tokens_Blk = logits_BlV.topk(min(top_k or V, V), dim=-1)
    probs_Blk = logits_Blk.softmax(-1)
    mass_Blk = probs_Blk.cumsum(-1)
    needed = mass_Blk - probs_Blk < (top_p if 0 < top_p < 1 else math.inf)      # likelier ones don't suffice
    last_kept = needed[..., 1:].sum(-1, keepdim=True)                           # the top token is always kept
    # noise * kept mass can round up to the kept mass itself: hence the clamp
    drawn = torch.searchsorted(mass_Blk, noise_Bl[..., None] * mass_Blk.gather(-1, last_kept), right=True)
    return tokens_Blk.gather(-1, drawn.clamp(max=last_kept))[..., 0]
