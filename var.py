"""Stage 2 of VAR: the transformer that predicts an image's token pyramid, scale by scale.

GPT predicts the next token. VAR predicts the next token *map*: from all coarser scales it predicts every
token of the next finer scale at once. Equation 6 of "Visual Autoregressive Modeling" (Tian et al., 2024,
arXiv 2404.02905), r_k being the (h_k, w_k) tokens of scale k:

    p(r_1, r_2, ..., r_K) = product over k of p(r_k | r_1, ..., r_{k-1})

    tokenizer = VQVAE(VQVAEConfig())                            # stage 1: 256 codes of 16 channels
    model = VAR(VARConfig(depth=2, num_classes=10, vocab_size=256, z_channels=16, scales=(1, 2, 4, 8)))
    labels_B, tokens_BL = torch.tensor([3, 8]), tokenizer.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    logits_BLV = model(labels_B, tokenizer.teacher_inputs(tokens_BL))   # training: all scales in one pass
    images_B3HW = model.generate(tokenizer, labels_B, cfg=1.5)          # sampling: scale after scale

What stands where in the sequence, for scales 1, 2, 3: 14 targets, from a start token and 13 inputs. A place
sees the inputs of all scales up to its own, which hold nothing of what it predicts:

    input      start token   f_hat after scale 1, shrunk to 2x2   f_hat after scale 2, shrunk to 3x3
    predicts   r_1           r_2, 4 tokens at once                r_3, 9 tokens at once

Shapes stand in the names of tensors:

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
from torch.utils.checkpoint import checkpoint

HEAD_WIDTH = 64
MAX_SHARPNESS = 100.0             # of cosine attention, see Attention
RELEASED_BUFFERS = ('lvl_1L', 'attn_bias_for_masking', 'zero_k_bias')     # in released files, but no weights
RELEASED_NAMES = (                # parts of our names of weights -> the released code's
    ('start_position', 'pos_start'), ('position', 'pos_1LC'), ('word_embedding', 'word_embed'),
    ('scale_embedding', 'lvl_embed'), ('class_embedding', 'class_emb'), ('attention.qkv', 'attn.mat_qkv'),
    ('attention', 'attn'), ('log_scale', 'scale_mul_1H11'), ('.fc', '.ffn.fc'), ('adaln_table', 'ada_gss'),
    ('head_adaln', 'head_nm.ada_lin.1'), ('shared_adaln', 'shared_ada_lin.1'), ('.adaln.', '.ada_lin.1.'))


@dataclass(frozen=True)
class VARConfig:
    """Everything that fixes the transformer. An impossible value raises ValueError, 'field=value: why'."""
    depth: Annotated[int, 'transformer blocks, and the one dial: width is 64 * depth, heads are depth'] = 16
    num_classes: Annotated[int, 'label num_classes is the null class'] = 1000
    vocab_size: Annotated[int, 'V, codes in the codebook'] = 4096
    z_channels: Annotated[int, 'C, channels of a latent'] = 32
    scales: Annotated[tuple[int, ...], 'side of each map, coarse to fine'] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    unit_norm: Annotated[bool, 'cosine attention: queries and keys of length 1'] = True
    shared_adaln: Annotated[bool, 'one AdaLN projection for all blocks (released for depth 36)'] = False
    label_dropout: Annotated[float, 'share of labels that training replaces by the null class'] = 0.1
    stochastic_depth: Annotated[float | None, 'chance to skip the last block; None: 0.1 * depth / 24'] = None
    adaln_gamma_init: Annotated[float, 'factor on the initial weights of the gates, gamma in Block'] = 1e-5
    adaln: Annotated[bool, 'the class steers all blocks; without, the first token alone tells it'] = True
    order: Annotated[Literal['scale', 'raster'], 'by scales, or (baseline) by tokens, row by row'] = 'scale'

    @property
    def width(self) -> int:
        return HEAD_WIDTH * self.depth

    @property
    def lengths(self) -> list[int]:
        """Tokens of each group that is predicted at once: a scale or, as GPT does, a token; L in all."""
        return [side * side for side in self.scales] if self.order == 'scale' else [1] * self.scales[0] ** 2

    def __post_init__(self):
        for name in ('depth', 'num_classes', 'vocab_size', 'z_channels'):
            most = 200 if name == 'depth' else 2 ** 30
            value = getattr(self, name)
            if isinstance(value, bool) or not 1 <= value <= most:
                raise ValueError(f'{name}={value}: must be at least 1 and at most {most}')
        for name in ('label_dropout', 'stochastic_depth'):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: must lie in [0, 1)')
        if self.shared_adaln and not self.adaln:
            raise ValueError('shared_adaln=True: with adaln=False there is none to share')
        sides = list(self.scales)
        fits = dict(scale=sides[:1] == [1] and len(sides) > 1 and sides == sorted(set(sides)),
                    raster=len(sides) == 1 and sides[0] > 1)
        if not fits.get(self.order):
            raise ValueError(f'scales={self.scales}, order={self.order}: order scale needs two or more that '
                             'rise from 1, order raster one map alone, of 2x2 or more')


def attend(q: Tensor, k: Tensor, v: Tensor, mask_ll: Tensor | None, scale: float) -> Tensor:
    """Each place's mean of v, weighted by the softmax of its q . k * scale over the places that it sees."""
    if q.requires_grad and q.device.type == 'cpu' and q.dtype == torch.bfloat16:
        # torch's own takes twice as long there, backwards
        with torch.autocast('cpu', enabled=False):
            scores = scale * q.float() @ k.float().transpose(-1, -2)        # sharp ones need float32
            if mask_ll is not None:
                scores = scores + torch.zeros(mask_ll.shape).masked_fill(~mask_ll, -math.inf)
            return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_ll, scale=scale)


class Attention(nn.Module):
    def __init__(self, config: VARConfig):
        super().__init__()
        D = config.width
        self.unit_norm = config.unit_norm
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))   # none on keys
        self.proj = nn.Linear(D, D)
        if config.unit_norm:
            self.log_scale = nn.Parameter(torch.full((1, config.depth, 1, 1), 4.0).log())

    def forward(self, x_BlD: Tensor, mask_ll: Tensor | None, cache: Tensor | None, start: int) -> Tensor:
        """cache: keys and values (2, B, heads, L, 64) of all tokens before `start`; those of x are added."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x_BlD, self.qkv.weight, bias).unflatten(-1, (3, -1, HEAD_WIDTH))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (B, heads, l, 64) each
        scale = 1 / math.sqrt(HEAD_WIDTH)       # without unit norm the released code takes a quarter of this
        if self.unit_norm:
            scale, sharpness = 1.0, self.log_scale.clamp_max(math.log(MAX_SHARPNESS)).exp()    # one per head
            lengths = [torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32) for x in (q, k)]
            q = q * (sharpness / lengths[0].clamp_min(1e-12)).to(q.dtype)       # q . k = sharpness * cosine
            k = k * (1 / lengths[1].clamp_min(1e-12)).to(k.dtype)
        if cache is not None:
            end = start + x_BlD.shape[1]
            cache[0, :, :, start:end], cache[1, :, :, start:end] = k, v
            k, v = cache[:, :, :, :end]
        x = attend(q, k, v, mask_ll, scale)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """GPT-2's block; AdaLN: the class steers both norms (scale, shift) and both outputs (gamma)."""

    def __init__(self, config: VARConfig, drop_rate: float):
        super().__init__()
        D = config.width
        self.drop_rate = drop_rate
        self.attention = Attention(config)
        self.fc1, self.fc2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        if config.shared_adaln:
            self.adaln_table = nn.Parameter(torch.randn(1, 1, 6, D) / D ** 0.5)   # added to the shared one
        else:
            self.adaln = nn.Linear(D, 6 * D) if config.adaln else PlainNorm(D, gammas=2, others=4)

    def modulation(self, class_BD: Tensor, shared_B16D: Tensor | None, noise_B2: Tensor | None) -> list:
        """gamma1, gamma2, scale1, scale2, shift1, shift2 of these classes, (B, 1, D) each."""
        if shared_B16D is None:
            adaln_B16D = self.adaln(F.silu(class_BD)).unflatten(-1, (1, 6, -1))
        else:
            adaln_B16D = self.adaln_table + shared_B16D
        gamma1, gamma2, *others = adaln_B16D.unbind(2)
        if noise_B2 is not None:                            # stochastic depth: skips a branch of an image
            keep_2B11 = ((noise_B2 >= self.drop_rate) / (1 - self.drop_rate)).T[:, :, None, None]
            gamma1, gamma2 = (torch.stack([gamma1, gamma2]) * keep_2B11.to(gamma1.dtype)).unbind(0)
        return [gamma1, gamma2, *others]

    def forward(self, x_BlD: Tensor, modulation: list[Tensor], mask_ll=None, cache=None, start=0) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
        h = self.attention(modulate(x_BlD, scale1, shift1), mask_ll, cache, start)
        x_BlD = torch.addcmul(x_BlD, gamma1, h)                     # x + gamma1 * h, fused
        h = self.fc2(F.gelu(self.fc1(modulate(x_BlD, scale2, shift2)), approximate='tanh'))
        return torch.addcmul(x_BlD, gamma2, h)


class PlainNorm(nn.Module):
    """In AdaLN's place without it: learned numbers, the same for all classes, as in a plain LayerNorm."""

    def __init__(self, D: int, gammas: int, others: int):
        super().__init__()
        self.values = nn.Parameter(torch.cat([torch.ones(gammas * D), torch.zeros(others * D)]))

    def forward(self, class_BD: Tensor) -> Tensor:
        return self.values.repeat(len(class_BD), 1)


def modulate(x_BlD: Tensor, scale_B1D: Tensor, shift_B1D: Tensor) -> Tensor:
    """AdaLN: normalise, then scale and shift as the class says."""
    normalised = F.layer_norm(x_BlD, x_BlD.shape[-1:], eps=1e-6).to(scale_B1D.dtype)
    return torch.addcmul(shift_B1D, normalised, 1 + scale_B1D)


class VAR(nn.Module):
    """The transformer. It is handed the tokenizer where it needs it, and doesn't own it."""

    def __init__(self, config: VARConfig):
        super().__init__()
        self.config, self.is_checkpointed, lengths = config, False, config.lengths
        D, L, K, depth = config.width, sum(lengths), len(config.scales), config.depth
        self.class_embedding = nn.Embedding(config.num_classes + 1, D)
        self.start_position = nn.Parameter(torch.empty(1, 1, D))        # as released, on top of position 0
        self.word_embedding = nn.Linear(config.z_channels, D)
        self.position = nn.Parameter(torch.empty(1, L, D))
        self.scale_embedding = nn.Embedding(K, D)                       # of a token's scale; one map: 0
        if config.shared_adaln:
            self.shared_adaln = nn.Linear(D, 6 * D)
        drop_rate = 0.1 * depth / 24 if config.stochastic_depth is None else config.stochastic_depth
        self.blocks = nn.ModuleList(Block(config, drop_rate * i / max(1, depth - 1)) for i in range(depth))
        self.head_adaln = nn.Linear(D, 2 * D) if config.adaln else PlainNorm(D, gammas=0, others=2)
        self.head = nn.Linear(D, config.vocab_size)

        groups = torch.arange(len(lengths), device='cpu')   # have values even where weights are on 'meta'
        group_L = groups.repeat_interleave(torch.tensor(lengths, device='cpu'))
        self.register_buffer('scale_of_token_L', group_L.clamp(max=K - 1), persistent=False)
        # block-causal: True where the row's place sees the column's, in all groups up to its own
        self.register_buffer('mask_LL', group_L[:, None] >= group_L[None, :], persistent=False)
        self.init_weights()

    def init_weights(self):
        """As released: small everywhere, and almost the identity in every block."""
        D, depth = self.config.width, self.config.depth
        std = math.sqrt(1 / (3 * D))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.start_position, std=std)
        nn.init.trunc_normal_(self.position, std=std)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            if self.config.adaln:
                self.head_adaln.weight.mul_(0.5)
            for block in self.blocks:
                block.attention.proj.weight.div_(math.sqrt(2 * depth))
                block.fc2.weight.div_(math.sqrt(2 * depth))
                if not self.config.adaln:
                    continue
                table_6 = (block.adaln_table[0, 0] if self.config.shared_adaln
                           else block.adaln.weight.unflatten(0, (6, D)))
                table_6[:2].mul_(self.config.adaln_gamma_init)          # gamma1, gamma2
                table_6[2:].mul_(0.5)                                   # scale1, scale2, shift1, shift2

    def positions(self) -> Tensor:
        """Where each place stands, in its map and among the scales: (1, L, D)."""
        return self.position + self.scale_embedding(self.scale_of_token_L)

    def modulations(self, class_BD: Tensor, noise_BN: Tensor | None = None) -> list[list[Tensor]]:
        """What AdaLN makes of the classes, for each block and, last, the head: the same at all scales."""
        shared_B16D = (self.shared_adaln(F.silu(class_BD)).unflatten(-1, (1, 6, -1))
                       if self.config.shared_adaln else None)
        pairs = [None] * self.config.depth if noise_BN is None else noise_BN[:, 1:].split(2, dim=1)
        head_B12D = self.head_adaln(F.silu(class_BD)).unflatten(-1, (1, 2, -1))
        return [block.modulation(class_BD, shared_B16D, noise_B2)
                for block, noise_B2 in zip(self.blocks, pairs)] + [head_B12D.unbind(2)]

    def transform(self, x_BlD: Tensor, modulations: list, mask_ll=None, caches=None, start=0) -> Tensor:
        """Blocks and head: (B, l, D) -> logits (B, l, V), computed in the autocast type, given as float32."""
        for i, block in enumerate(self.blocks):
            if caches is not None or not torch.is_grad_enabled():       # as it is, even if it was compiled:
                cache = None if caches is None else caches[i]           # each size would be compiled anew
                x_BlD = block.forward(x_BlD, modulations[i], mask_ll, cache, start)
            elif self.is_checkpointed:              # keeps x alone, and computes the rest again when needed
                x_BlD = checkpoint(block, x_BlD, modulations[i], mask_ll, use_reentrant=False)
            else:
                x_BlD = block(x_BlD, modulations[i], mask_ll)
        return self.head(modulate(x_BlD, *modulations[-1])).float()

    # --- training
    def forward(self, labels_B: Tensor, inputs_BLC: Tensor, noise_BN: Tensor | None = None) -> Tensor:
        """Labels in [0, num_classes], L - 1 tokenizer.teacher_inputs(tokens) -> logits_BLV, float32.

        noise_BN, in training: N = 1 + 2 * depth uniform numbers in [0, 1) an image. Where the first is below
        label_dropout, the null class replaces the label, so that one model learns both distributions that
        guidance mixes (the released code does so in validation too); the others decide for each block which
        branches are skipped. None: nothing is dropped. Raises ValueError at inputs of other scales.
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
                 noise_BL: Tensor | None = None, kept_BL: Tensor | None = None, return_tokens: bool = False,
                 temperature: float = 1.0, gumbel_BLV: Tensor | None = None):
        """Labels in [0, num_classes] -> images (B, 3, image_size, image_size) in [-1, 1], tokens_BL if asked.

        cfg: strength of classifier-free guidance at the last scale; it rises from 0 at the first, as
        released; in raster order it is constant. (Where guidance is written as uncond + s * (cond - uncond),
        s is 1 + cfg.) top_k, top_p: see `draw_tokens`; the defaults are the released code's for FID (paper:
        top-k 600). noise_BL: one uniform number in [0, 1) per token, which alone decides what is drawn; None:
        from torch's default generator. kept_BL: int64, the token to keep, or -1 where one is to be drawn, as
        from `VQVAE.keep`; None: all are drawn. temperature: divides the logits. gumbel_BLV: Gumbel noise,
        which makes an image of mixtures of codes (see `mix_codes`; not in raster order) instead of the tokens
        that are returned; None: of those.
        Raises ValueError at a tokenizer of another kind, and where logits aren't finite.
        """
        self.check_tokenizer(tokenizer)
        B, depth, lengths, G = len(labels_B), self.config.depth, self.config.lengths, len(self.config.lengths)
        if noise_BL is None:
            noise_BL = torch.rand(B, sum(lengths), device=labels_B.device)
        kept_BL = (labels_B.new_full((1, 1), -1) if kept_BL is None else kept_BL).expand(B, sum(lengths))
        # guidance: the first half of N = 2B asks for the class, the second for none; at cfg 0, N = B
        asked = [labels_B, torch.full_like(labels_B, self.config.num_classes)] if cfg else [labels_B]
        class_ND = self.class_embedding(torch.cat(asked))
        modulations = self.modulations(class_ND)
        # allocated once for all groups: blocks, key or value, N, heads, L, 64; in the type of attention
        device = class_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else class_ND.dtype
        caches = class_ND.new_empty((depth, 2, len(class_ND), depth, sum(lengths), HEAD_WIDTH), dtype=dtype)
        positions = self.positions().split(lengths, dim=1)
        x_NlD = class_ND[:, None] + self.start_position + positions[0]
        tokens, finite, f_hat = [], [], 0.0
        for k, (noise_Bl, kept_Bl) in enumerate(zip(noise_BL.split(lengths, 1), kept_BL.split(lengths, 1))):
            start = sum(lengths[:k])
            # no mask: the cache ends with group k, within which all places see each other
            logits_NlV = self.transform(x_NlD, modulations, None, caches, start)
            t = cfg * k / (G - 1) if self.config.order == 'scale' else cfg
            logits_BlV = logits_NlV[:B]
            if cfg:                                         # (1 + t) * conditional - t * unconditional
                logits_BlV = (logits_BlV - logits_NlV[B:]).mul_(t).add_(logits_BlV)
            logits_BlV = logits_BlV if temperature == 1 else logits_BlV / temperature
            finite.append(logits_BlV.sum().isfinite())
            drawn_Bl = draw_tokens(logits_BlV, noise_Bl, top_k, top_p)
            tokens.append(torch.where(kept_Bl < 0, drawn_Bl, kept_Bl))
            codes = tokens[-1]                                  # or mixtures of them
            if gumbel_BLV is not None:
                gumbel_BlV = gumbel_BLV[:, start:start + lengths[k]]
                codes = mix_codes(logits_BlV, gumbel_BlV, kept_Bl, top_k, top_p, progress=k / (G - 1))
            if k < G - 1:
                f_hat, input_BlC = tokenizer.advance(f_hat, codes, k)
                x_BlD = self.word_embedding(input_BlC).float() + positions[k + 1]
                x_NlD = torch.cat([x_BlD] * len(asked))
        for step, is_finite in enumerate(torch.stack(finite).tolist(), start=1):        # a GPU waits once
            if not is_finite:
                raise ValueError(f'logits of step {step} of {G} are not finite, at cfg={cfg}')
        lacking = (codes, k) if self.config.order == 'scale' else (torch.cat(tokens, 1), 0)     # a whole map
        images = tokenizer.decode_f_hat(f_hat + tokenizer.contribution(*lacking)).clamp(-1, 1)
        return (images, torch.cat(tokens, dim=1)) if return_tokens else images

    # --- the authors' weights
    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], scales: tuple[int, ...]) -> 'VAR':
        """A released transformer (var_d16.pth, ..., var_d36.pth) as a VAR, whose weights the tensors become,
        not copied if float32; all else is read off the shapes. Raises ValueError with the first key that is
        missing, superfluous or of another shape."""
        try:
            width, z_channels = state_dict['word_embed.weight'].shape
            num_classes, vocab_size = len(state_dict['class_emb.weight']) - 1, len(state_dict['head.weight'])
        except KeyError as error:
            raise ValueError(f"no released VAR transformer: {error} is missing; of the trainer's files take "
                             "['trainer']['var_wo_ddp'], from keys module. and _orig_mod. away") from None
        with torch.device('meta'):                  # shapes alone: initial values take long
            model = cls(VARConfig(width // HEAD_WIDTH, num_classes, vocab_size, z_channels, tuple(scales),
                                  shared_adaln='shared_ada_lin.1.weight' in state_dict))
        names = {reduce(lambda name, pair: name.replace(*pair), RELEASED_NAMES, name): name
                 for name in model.state_dict()}                        # ours, by released names
        ours = {key: model.get_parameter(name) for key, name in names.items()}
        for key in [*ours, *(key for key in state_dict if not key.endswith(RELEASED_BUFFERS))]:
            found, expected = (tuple(at[key].shape) if key in at else 'none' for at in (state_dict, ours))
            if found != expected:
                raise ValueError(f'{key}: {found}, expected {expected}')
        model.load_state_dict({name: state_dict[key].float() for key, name in names.items()}, assign=True)
        return model


def likeliest(logits_BlV: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """The top_k likeliest tokens (0, or V and more: all), likeliest first; their cumulative mass; the index
    of the last one kept: as many are kept as it takes to reach a mass of top_p (0 or 1: all)."""
    V = logits_BlV.shape[-1]
    logits_Blk, tokens_Blk = logits_BlV.topk(min(top_k or V, V), dim=-1)
    probs_Blk = logits_Blk.softmax(-1)
    mass_Blk = probs_Blk.cumsum(-1)
    needed = mass_Blk - probs_Blk < (top_p if 0 < top_p < 1 else math.inf)      # the likelier ones fall short
    return tokens_Blk, mass_Blk, needed[..., 1:].sum(-1, keepdim=True)          # the likeliest always is kept


def draw_tokens(logits_BlV: Tensor, noise_Bl: Tensor, top_k: int, top_p: float) -> Tensor:
    """Draws a token at every position, (B, l) int64, of those that top-k and top-p leave: the first whose
    cumulative mass exceeds noise * kept mass (inverse CDF)."""
    tokens_Blk, mass_Blk, last_kept = likeliest(logits_BlV, top_k, top_p)
    # rounding may make noise * kept mass the kept mass itself: hence the clamp
    drawn = torch.searchsorted(mass_Blk, noise_Bl[..., None] * mass_Blk.gather(-1, last_kept), right=True)
    return tokens_Blk.gather(-1, drawn.clamp(max=last_kept))[..., 0]


def mix_codes(logits_BlV: Tensor, gumbel_BlV: Tensor, kept_Bl: Tensor, top_k: int, top_p: float,
              progress: float) -> Tensor:
    """Weights of all codes at every position, (B, l, V), instead of one token: smoother images, for looks.

    As the released more_smooth does: a softmax of the logits that top-k and top-p leave, with Gumbel noise
    added; the sharper, the further the scales have come (progress, from 0 to 1). Kept tokens are not mixed.
    """
    tokens_Blk, _, last_kept = likeliest(logits_BlV, top_k, top_p)
    least_kept_Bl1 = logits_BlV.gather(-1, tokens_Blk.gather(-1, last_kept))
    temperature = 0.27 * (1 - 0.95 * progress)                  # the released constants
    noisy_BlV = ((1 + progress) * logits_BlV + gumbel_BlV) / temperature
    weights_BlV = noisy_BlV.masked_fill(logits_BlV < least_kept_Bl1, -math.inf).softmax(-1)
    kept_BlV = torch.zeros_like(weights_BlV).scatter_(-1, kept_Bl.clamp(min=0)[..., None], 1.0)
    return torch.where(kept_Bl[..., None] < 0, weights_BlV, kept_BlV)
