"""Stage 2 of VAR: the transformer that predicts an image's token pyramid, scale by scale.

GPT predicts the next token. VAR predicts the next token *map*: from all coarser scales it predicts every
token of the next finer scale at once. Equation 6 of "Visual Autoregressive Modeling" (Tian et al., 2024,
arXiv 2404.02905), r_k being the (h_k, w_k) tokens of scale k:

    p(r_1, r_2, ..., r_K) = product over k of p(r_k | r_1, ..., r_{k-1})

    model = VAR(VARConfig())
    logits_BLV = model(labels_B, tokenizer.teacher_inputs(tokens_BL))       # training: all scales in one pass
    images_B3HW = model.eval().generate(tokenizer, labels_B, cfg=1.5)       # sampling: scale after scale

What stands where in the sequence, for scales 1, 2, 3: 14 targets, from a start token and 13 inputs. A place
sees the inputs of all scales up to its own, which hold nothing of what it predicts:

    input      start token   f_hat after scale 1, shrunk to 2x2   f_hat after scale 2, shrunk to 3x3
    predicts   r_1           r_2, 4 tokens at once                r_3, 9 tokens at once

Shapes stand in the names of tensors:

    B batch   D width of the transformer   C latent channels of the tokenizer   V vocabulary   K scales
    H, W latent size at the finest scale   h, w size at the current scale   L tokens of all scales, l of one
    (of images, 3HW is the size in pixels)
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_WIDTH = 64
MAX_SHARPNESS = 100.0             # of cosine attention, see Attention
OFFICIAL_BUFFERS = ('lvl_1L', 'attn_bias_for_masking', 'zero_k_bias')     # in released files, but no weights


@dataclass(frozen=True)
class VARConfig:
    """Everything that fixes the transformer. An impossible value raises ValueError, 'field=value: why'.

    depth is the one dial: width = 64 * depth, heads = depth, as in all released models.
    """
    depth: int = 16                                                     # transformer blocks
    num_classes: int = 1000                                             # label num_classes is the null class
    vocab_size: int = 4096                                              # V
    z_channels: int = 32                                                # C
    scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)       # sides of the maps, coarse to fine
    unit_norm: bool = True                      # cosine attention: queries and keys of length 1
    shared_adaln: bool = False                  # one AdaLN projection for all blocks (released for depth 36)
    label_dropout: float = 0.1                  # share of labels that training replaces by the null class
    stochastic_depth: float | None = None       # chance to skip the last block; None: 0.1 * depth / 24
    adaln_gamma_init: float = 1e-5              # factor on the initial weights of the gates, gamma in Block

    @property
    def width(self) -> int:
        return HEAD_WIDTH * self.depth

    @property
    def lengths(self) -> list[int]:
        return [side * side for side in self.scales]                    # tokens of each scale; L is their sum

    def __post_init__(self):
        for name in ('depth', 'num_classes', 'vocab_size', 'z_channels'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least 1')
        for name in ('label_dropout', 'stochastic_depth'):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: must lie in [0, 1)')
        if len(self.scales) < 2 or self.scales[0] != 1 or list(self.scales) != sorted(set(self.scales)):
            raise ValueError(f'scales={self.scales}: must start at 1 and rise, two scales or more')


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
            q = (F.normalize(q.float(), dim=-1) * sharpness).to(v.dtype)        # q . k = sharpness * cosine
            k = F.normalize(k.float(), dim=-1).to(v.dtype)
        if cache is not None:
            end = start + x_BlD.shape[1]
            cache[0, :, :, start:end], cache[1, :, :, start:end] = k, v
            k, v = cache[:, :, :, :end]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_ll, scale=scale)
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
            self.adaln = nn.Linear(D, 6 * D)

    def forward(self, x_BlD: Tensor, condition: Tensor, mask_ll=None, cache=None, start=0) -> Tensor:
        """condition: the class embedding (B, D), or its shared projection (B, 1, 6, D)."""
        if hasattr(self, 'adaln'):
            adaln_B16D = self.adaln(F.silu(condition)).unflatten(-1, (1, 6, -1))
        else:
            adaln_B16D = self.adaln_table + condition
        gamma1, gamma2, scale1, scale2, shift1, shift2 = adaln_B16D.unbind(2)
        h = self.attention(modulate(x_BlD, scale1, shift1), mask_ll, cache, start)
        x_BlD = torch.addcmul(x_BlD, self.drop(gamma1), h)          # x + gamma1 * h, fused
        h = self.fc2(F.gelu(self.fc1(modulate(x_BlD, scale2, shift2)), approximate='tanh'))
        return torch.addcmul(x_BlD, self.drop(gamma2), h)

    def drop(self, gamma_B1D: Tensor) -> Tensor:
        """Stochastic depth: in training, shuts the gate of the branch for some of the pictures."""
        if not self.training or self.drop_rate == 0:
            return gamma_B1D
        keep_B11 = torch.rand(gamma_B1D.shape[0], 1, 1, device=gamma_B1D.device) >= self.drop_rate
        return gamma_B1D * keep_B11 / (1 - self.drop_rate)


def modulate(x_BlD: Tensor, scale_B1D: Tensor, shift_B1D: Tensor) -> Tensor:
    """AdaLN: normalise, then scale and shift as the class says."""
    return torch.addcmul(shift_B1D, F.layer_norm(x_BlD, x_BlD.shape[-1:], eps=1e-6), 1 + scale_B1D)


class VAR(nn.Module):
    """The transformer. It is handed the tokenizer where it needs it, and doesn't own it."""

    def __init__(self, config: VARConfig):
        super().__init__()
        self.config = config
        D, L, K, depth = config.width, sum(config.lengths), len(config.scales), config.depth
        self.class_embedding = nn.Embedding(config.num_classes + 1, D)
        self.start_position = nn.Parameter(torch.empty(1, 1, D))        # as released, on top of position 0
        self.word_embedding = nn.Linear(config.z_channels, D)
        self.position = nn.Parameter(torch.empty(1, L, D))
        self.scale_embedding = nn.Embedding(K, D)                       # which scale a token belongs to
        if config.shared_adaln:
            self.shared_adaln = nn.Linear(D, 6 * D)
        drop_rate = 0.1 * depth / 24 if config.stochastic_depth is None else config.stochastic_depth
        self.blocks = nn.ModuleList(Block(config, drop_rate * i / max(1, depth - 1)) for i in range(depth))
        self.head_adaln = nn.Linear(D, 2 * D)
        self.head = nn.Linear(D, config.vocab_size)

        scale_L = torch.cat([torch.full((length,), k) for k, length in enumerate(config.lengths)])
        self.register_buffer('scale_of_token_L', scale_L, persistent=False)
        # block-causal: True where the row's place sees the column's, in all scales up to its own
        self.register_buffer('mask_LL', scale_L[:, None] >= scale_L[None, :], persistent=False)
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
            self.head_adaln.weight.mul_(0.5)
            for block in self.blocks:
                block.attention.proj.weight.div_(math.sqrt(2 * depth))
                block.fc2.weight.div_(math.sqrt(2 * depth))
                table_6 = (block.adaln_table[0, 0] if self.config.shared_adaln
                           else block.adaln.weight.unflatten(0, (6, D)))
                table_6[:2].mul_(self.config.adaln_gamma_init)          # gamma1, gamma2
                table_6[2:].mul_(0.5)                                   # scale1, scale2, shift1, shift2

    # --- shared by training and sampling
    def positions(self) -> Tensor:
        """Where each place stands, in its map and among the scales: (1, L, D)."""
        return self.position + self.scale_embedding(self.scale_of_token_L)

    def transform(self, x_BlD: Tensor, class_BD: Tensor, mask_ll=None, caches=None, start=0) -> Tensor:
        """Blocks and head: (B, l, D) -> logits (B, l, V), float32 under any autocast."""
        condition = class_BD
        if self.config.shared_adaln:
            condition = self.shared_adaln(F.silu(class_BD)).unflatten(-1, (1, 6, -1))
        for i, block in enumerate(self.blocks):
            x_BlD = block(x_BlD, condition, mask_ll, None if caches is None else caches[i], start)
        with torch.autocast(x_BlD.device.type, enabled=False):
            scale_B1D, shift_B1D = self.head_adaln(F.silu(class_BD)).unflatten(-1, (2, 1, -1)).unbind(1)
            return self.head(modulate(x_BlD, scale_B1D, shift_B1D))

    # --- training
    def forward(self, labels_B: Tensor, inputs_BLC: Tensor) -> Tensor:
        """Labels in [0, num_classes], the L - 1 tokenizer.teacher_inputs(tokens) -> logits_BLV, float32.

        In training mode some labels are replaced by the null class, so that one model learns both
        distributions that guidance mixes. (The released code drops labels in validation too.)
        """
        if self.training:
            dropped_B = torch.rand(labels_B.shape, device=labels_B.device) < self.config.label_dropout
            labels_B = labels_B.masked_fill(dropped_B, self.config.num_classes)
        class_BD = self.class_embedding(labels_B)
        start_B1D = class_BD[:, None] + self.start_position
        x_BLD = torch.cat([start_B1D, self.word_embedding(inputs_BLC).float()], dim=1)
        return self.transform(x_BLD + self.positions(), class_BD, self.mask_LL)

    # --- sampling
    @torch.no_grad()
    def generate(self, tokenizer, labels_B: Tensor, cfg: float = 1.5, top_k: int = 900, top_p: float = 0.96,
                 noise_BL: Tensor | None = None, return_tokens: bool = False):
        """Labels in [0, num_classes] -> images (B, 3, image_size, image_size) in [-1, 1], tokens_BL if asked.

        cfg: strength of classifier-free guidance at the last scale; it rises from 0 at the first, as
        released. (Where guidance is written as uncond + s * (cond - uncond), s is 1 + cfg.) top_k, top_p: see
        `draw_tokens`; the defaults are the released code's for FID (paper: top-k 600). noise_BL: one uniform
        number in [0, 1) per token, which alone decides what is drawn; None: from torch's default generator.
        """
        B, K, depth, lengths = len(labels_B), len(self.config.scales), self.config.depth, self.config.lengths
        if noise_BL is None:
            noise_BL = torch.rand(B, sum(lengths), device=labels_B.device)
        # guidance: the first half of the batch asks for the class, the second half for none in particular
        null_B = torch.full_like(labels_B, self.config.num_classes)
        class_2BD = self.class_embedding(torch.cat([labels_B, null_B]))
        # allocated once for all scales: blocks, key or value, 2B, heads, L, 64; in the type of attention
        device = class_2BD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else class_2BD.dtype
        caches = class_2BD.new_empty((depth, 2, 2 * B, depth, sum(lengths), HEAD_WIDTH), dtype=dtype)
        positions = self.positions().split(lengths, dim=1)
        x_2BlD = class_2BD[:, None] + self.start_position + positions[0]
        tokens, f_hat = [], 0.0
        for k, noise_Bl in enumerate(noise_BL.split(lengths, dim=1)):
            # no mask: the cache ends with scale k, within which all places see each other
            logits_2BlV = self.transform(x_2BlD, class_2BD, None, caches, start=sum(lengths[:k]))
            conditional, unconditional = logits_2BlV.chunk(2)
            t = cfg * k / (K - 1)
            tokens.append(draw_tokens((1 + t) * conditional - t * unconditional, noise_Bl, top_k, top_p))
            f_hat = f_hat + tokenizer.contribution(tokens[-1], k)
            if k < K - 1:
                x_BlD = self.word_embedding(tokenizer.next_input(f_hat, k)).float() + positions[k + 1]
                x_2BlD = torch.cat([x_BlD, x_BlD])
        images = tokenizer.decode_f_hat(f_hat).clamp(-1, 1)
        return (images, torch.cat(tokens, dim=1)) if return_tokens else images

    # --- the authors' weights
    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], scales: tuple[int, ...]) -> 'VAR':
        """A released transformer (var_d16.pth, ..., var_d36.pth) as a VAR; all else is read off the shapes.

        Raises ValueError with the first key that is missing, superfluous or of another shape.
        """
        try:
            width, z_channels = state_dict['word_embed.weight'].shape
            num_classes, vocab_size = len(state_dict['class_emb.weight']) - 1, len(state_dict['head.weight'])
        except KeyError as error:
            raise ValueError(f'not a released VAR transformer: {error} is missing') from None
        model = cls(VARConfig(width // HEAD_WIDTH, num_classes, vocab_size, z_channels, tuple(scales),
                              shared_adaln='shared_ada_lin.1.weight' in state_dict))
        ours = model.state_dict()
        names = {official_name(name): name for name in ours}
        for key in [*names, *(key for key in state_dict if not key.endswith(OFFICIAL_BUFFERS))]:
            found = tuple(state_dict[key].shape) if key in state_dict else 'missing'
            expected = tuple(ours[names[key]].shape) if key in names else 'no such weight'
            if found != expected:
                raise ValueError(f'{key}: {found}, expected {expected}')
        model.load_state_dict({name: state_dict[key] for key, name in names.items()})
        return model


def official_name(name: str) -> str:
    """The released code's name of one of our weights."""
    for ours, theirs in (('start_position', 'pos_start'), ('word_embedding', 'word_embed'),
                         ('scale_embedding', 'lvl_embed'), ('class_embedding', 'class_emb'),
                         ('attention.qkv', 'attn.mat_qkv'), ('attention.', 'attn.'),
                         ('log_scale', 'scale_mul_1H11'), ('.fc', '.ffn.fc'), ('adaln_table', 'ada_gss'),
                         ('head_adaln', 'head_nm.ada_lin.1'), ('shared_adaln', 'shared_ada_lin.1'),
                         ('.adaln.', '.ada_lin.1.')):
        name = name.replace(ours, theirs)
    return 'pos_1LC' if name == 'position' else name


def draw_tokens(logits_BlV: Tensor, noise_Bl: Tensor, top_k: int, top_p: float) -> Tensor:
    """Draws a token at every position: (B, l) int64.

    Of the top_k likeliest tokens (0, or V and more: all), those are kept that it takes to reach a mass of
    top_p (0 or 1: all). The first whose cumulative mass exceeds noise * kept mass is drawn (inverse CDF).
    """
    V = logits_BlV.shape[-1]
    logits_Blk, tokens_Blk = logits_BlV.topk(min(top_k or V, V), dim=-1)        # likeliest first
    probs_Blk = logits_Blk.softmax(-1)
    mass_Blk = probs_Blk.cumsum(-1)
    needed = mass_Blk - probs_Blk < (top_p if 0 < top_p < 1 else math.inf)      # the likelier ones fall short
    last_kept = needed.sum(-1, keepdim=True) - 1
    drawn = torch.searchsorted(mass_Blk, noise_Bl[..., None] * mass_Blk.gather(-1, last_kept), right=True)
    return tokens_Blk.gather(-1, drawn.clamp(max=last_kept))[..., 0]
