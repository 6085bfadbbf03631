"""Stage 1 of VAR: the multi-scale residual VQVAE, which turns an image into a pyramid of tokens and back.

An ordinary VQVAE encodes an image as one grid of tokens (a token map). This one encodes it as K token maps,
coarse to fine; each encodes the residual that the previous maps leave. Upsampled and summed, the maps give
f_hat, the input of the decoder. Stage 2 (var.py) predicts the maps in this order.

    tokenizer = VQVAE(VQVAEConfig())                        # 32x32 images, token maps 1x1, 2x2, 4x4 and 8x8
    images_B3HW = torch.rand(2, 3, 32, 32) * 2 - 1          # in [-1, 1]
    tokens_BL = tokenizer.encode(images_B3HW)               # (2, 85)
    images_B3HW = tokenizer.decode(tokens_BL)

Tensor names end in their shapes:

    B batch   C latent channels of the tokenizer   V vocabulary   K number of scales
    H, W finest latent size (images: pixels)   h, w size at current scale   L tokens of all scales, l of one

tokens_BL is one int64 tensor: all scales, coarse to fine, row by row within a scale. The text numbers
the scales from 1 to K; in the code, k starts at 0.

Implements Algorithm 1 (encode), Algorithm 2 (decode) and the VQ term of Equation 5 of "Visual Autoregressive
Modeling" (Tian et al., arXiv 2404.02905). Comments point out where the paper and the released code differ.
"""
import re
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial, reduce
from itertools import accumulate
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PHIS = 4                # paper: one phi per scale; released code and here: four, shared by adjacent scales
COMMITMENT = 0.25       # weight of the commitment loss (f towards the codes), beta in the VQVAE papers
RELEASED_NAMES = (      # regexes for the released weight names -> ours
    (r'(down|up)\.(\d+)\.(block|attn)\.(\d+)', r'\1_\2_\3_\4'), (r'(down|up)\.(\d+)\.', r'\1_\2_'),
    (r'mid\.', 'mid_'), ('nin_shortcut', 'shortcut'), ('proj_out', 'proj'),
    (r'quantize\.embedding', 'codebook'), (r'quantize\.quant_resi\.qresi_ls', 'phis'))


@dataclass(frozen=True)
class VQVAEConfig:
    """Hyperparameters of the tokenizer. An invalid value raises ValueError, 'field=value: why'.

    Released: VQVAEConfig(256, 1, 160, (1, 1, 2, 2, 4), 2, True, 32, 4096, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)).
    """
    image_size: Annotated[int, 'height and width of the images, in pixels'] = 32
    patch_size: Annotated[int, 'side of the pixel squares that are folded into channels'] = 4
    channels: Annotated[int, 'channels at the first resolution level'] = 64
    channel_mults: Annotated[tuple[int, ...], 'channel multiplier per level; sizes halve in between'] = (1,)
    res_blocks: Annotated[int, 'residual blocks per level; decoder levels have one more'] = 1
    attention: Annotated[bool, 'self-attention at the coarsest level, as released'] = False
    z_channels: Annotated[int, 'C, latent channels'] = 16
    vocab_size: Annotated[int, 'V, codes in the codebook'] = 256
    scales: Annotated[tuple[int, ...], 'side of each token map, coarse to fine'] = (1, 2, 4, 8)

    @property
    def stride(self) -> int:
        """Pixels per latent along each axis."""
        return self.patch_size * 2 ** (len(self.channel_mults) - 1)

    def __post_init__(self):
        def check(fits, name: str, why: str):
            if not fits:
                raise ValueError(f'{name}={getattr(self, name)}: {why}')
        for name in ('image_size', 'patch_size', 'channels', 'res_blocks', 'z_channels', 'vocab_size'):
            most = 200 if name == 'res_blocks' else 2 ** 30
            check(1 <= getattr(self, name) <= most, name, f'must be at least 1 and at most {most}')
        check(self.channels % 32 == 0, 'channels', 'must be a multiple of 32, the number of GroupNorm groups')
        check(min(self.channel_mults, default=0) >= 1, 'channel_mults', 'needs one or more values, all >= 1')
        sides = list(self.scales)
        check(sides and sides == sorted({*sides}) and (sides[0] == 1 or len(sides) == 1), 'scales',
              'must be increasing from 1, or a single map')
        check(sides[-1] * self.stride == self.image_size, 'scales', 'the last must be the latent size, '
              f'image_size / stride = {self.image_size} / {self.stride} = {self.image_size / self.stride:g}')


def phi_of_scale(k: int, K: int) -> int:
    """Index of the phi that scale k (from 0) of K uses: the one whose tick is nearest to k / (K - 1)."""
    ticks = np.linspace(1 / 3 / PHIS, 1 - 1 / 3 / PHIS, PHIS)       # as released: rounding breaks ties
    return int(np.argmin(np.abs(ticks - k / max(1, K - 1))))


# ---------------------------------------------------------------------------------------- networks
norm = partial(nn.GroupNorm, 32, eps=1e-6)                  # norm(channels), in 32 groups


class ResBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of a feature map."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)                     # (B, hw, 3 * channels)
        h = F.scaled_dot_product_attention(*qkv.unsqueeze(1).chunk(3, dim=-1))      # (B, 1, hw, channels)
        return x + self.proj(h.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:]))


def build_encoder(config: VQVAEConfig) -> nn.Sequential:
    """(B, 3, H * stride, W * stride) in [-1, 1] -> (B, C, H, W). Layer names follow the released code."""
    width, last = config.channels, len(config.channel_mults) - 1
    attention = AttentionBlock if config.attention else nn.Identity
    layers = OrderedDict(unshuffle=nn.PixelUnshuffle(config.patch_size))
    layers['conv_in'] = nn.Conv2d(3 * config.patch_size ** 2, width, 3, padding=1)
    for i, mult in enumerate(config.channel_mults):
        for j in range(config.res_blocks):
            layers[f'down_{i}_block_{j}'] = ResBlock(width, config.channels * mult)
            width = config.channels * mult
            if i == last:
                layers[f'down_{i}_attn_{j}'] = attention(width)
        if i < last:                            # pads only on the right and bottom, as released
            pad, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2)
            layers[f'down_{i}_downsample'] = nn.Sequential(OrderedDict(pad=pad, conv=conv))
    layers |= dict(mid_block_1=ResBlock(width, width), mid_attn_1=attention(width),
                   mid_block_2=ResBlock(width, width), norm_out=norm(width), silu=nn.SiLU())
    layers['conv_out'] = nn.Conv2d(width, config.z_channels, 3, padding=1)
    return nn.Sequential(layers)


def build_decoder(config: VQVAEConfig) -> nn.Sequential:
    """(B, C, H, W) -> (B, 3, H * stride, W * stride): a mirrored encoder, one more block per level."""
    last = len(config.channel_mults) - 1
    width = config.channels * config.channel_mults[last]
    attention = AttentionBlock if config.attention else nn.Identity
    layers = OrderedDict(conv_in=nn.Conv2d(config.z_channels, width, 3, padding=1))
    layers |= dict(mid_block_1=ResBlock(width, width), mid_attn_1=attention(width),
                   mid_block_2=ResBlock(width, width))
    for i in range(last, -1, -1):
        for j in range(config.res_blocks + 1):
            layers[f'up_{i}_block_{j}'] = ResBlock(width, config.channels * config.channel_mults[i])
            width = config.channels * config.channel_mults[i]
            if i == last:
                layers[f'up_{i}_attn_{j}'] = attention(width)
        if i > 0:
            enlarge, conv = nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width, 3, padding=1)
            layers[f'up_{i}_upsample'] = nn.Sequential(OrderedDict(enlarge=enlarge, conv=conv))
    conv_out = nn.Conv2d(width, 3 * config.patch_size ** 2, 3, padding=1)
    layers |= dict(norm_out=norm(width), silu=nn.SiLU(), conv_out=conv_out)
    layers['shuffle'] = nn.PixelShuffle(config.patch_size)
    return nn.Sequential(layers)


class Phi(nn.Conv2d):
    """phi(x) = 0.5 x + 0.5 conv(x): meant to restore what upsampling a coarse token map loses."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + 0.5 * super().forward(x)


# --------------------------------------------------------------------------------------- tokenizer
class VQVAE(nn.Module):
    """The tokenizer: encoder, multi-scale residual quantizer, decoder."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        K, C = len(config.scales), config.z_channels
        self.encoder, self.decoder = build_encoder(config), build_decoder(config)
        self.quant_conv, self.post_quant_conv = (nn.Conv2d(C, C, 3, padding=1) for _ in range(2))
        self.codebook = nn.Embedding(config.vocab_size, C)              # one codebook for all scales
        self.phis = nn.ModuleList(Phi(C, C, 3, padding=1) for _ in range(PHIS))
        self.phi_table = [phi_of_scale(k, K) for k in range(K)]
        self.scale_lengths = [side * side for side in config.scales]

    # --- three basic operations
    def nearest_codes(self, z_BChw: Tensor) -> Tensor:
        """Index of the nearest code (plain L2) at each position, row by row: (B, l) int64."""
        z_BlC, codes_VC = z_BChw.flatten(2).transpose(1, 2), self.codebook.weight
        with torch.autocast(z_BChw.device.type, enabled=False):
            # |z - code|^2 without |z|^2, which is the same for every code
            return (codes_VC.square().sum(1) - 2 * z_BlC @ codes_VC.T).argmin(-1)

    def contribution(self, tokens_Bl: Tensor, k: int) -> Tensor:
        """The term that the tokens of scale k (from 0) add to f_hat: (B, C, H, W) float32."""
        side, size = self.config.scales[k], self.config.scales[-1]
        with torch.autocast(tokens_Bl.device.type, enabled=False):
            z = self.codebook(tokens_Bl).transpose(1, 2).unflatten(2, (side, side))         # Alg. 1, line 7
            if side != size:
                z = F.interpolate(z, size=(size, size), mode='bicubic')                     # line 8
            return self.phis[self.phi_table[k]](z.contiguous())                             # line 9: phi_k

    def shrink(self, f_BCHW: Tensor, k: int) -> Tensor:
        """Downsamples a map to the size of scale k (from 0) by area averaging: (B, C, h, w)."""
        side = self.config.scales[k]
        return f_BCHW if side == f_BCHW.shape[-1] else F.interpolate(f_BCHW, size=(side, side), mode='area')

    # --- images <-> tokens
    def features(self, images_B3HW: Tensor) -> Tensor:
        """The encoder: images in [-1, 1] -> f, (B, C, H, W) float32."""
        return self.quant_conv(self.encoder(images_B3HW)).float()

    def quantize(self, f_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loop of Algorithm 1: f -> tokens_BL and a list of f_hat after each scale, K maps
        (B, C, H, W). Their gradients reach the codebook and the phis, but not f."""
        residual = f_BCHW.detach()
        tokens, added = [], []
        for k in range(len(self.config.scales)):
            tokens.append(self.nearest_codes(self.shrink(residual, k)))         # Alg. 1, lines 5 and 6
            added.append(self.contribution(tokens[-1], k))
            residual = residual - added[-1].detach()                            # line 9
        return torch.cat(tokens, dim=1), list(accumulate(added))

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Algorithm 1: images in [-1, 1], (B, 3, image_size, image_size) -> tokens_BL."""
        return self.quantize(self.features(images_B3HW))[0]

    def f_hats(self, tokens_BL: Tensor) -> list[Tensor]:
        """f_hat after scales 1, 2, ..., K (sums of contributions), the same list as `quantize` returns."""
        maps = tokens_BL.split(self.scale_lengths, dim=1)
        return list(accumulate(self.contribution(tokens_Bl, k) for k, tokens_Bl in enumerate(maps)))

    def decode_f_hat(self, f_hat_BCHW: Tensor) -> Tensor:
        """Algorithm 2, line 9: f_hat -> images (B, 3, image_size, image_size), not yet clamped to [-1, 1]."""
        return self.decoder(self.post_quant_conv(f_hat_BCHW)).float()

    @torch.no_grad()
    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Algorithm 2: tokens -> images in [-1, 1], (B, 3, image_size, image_size)."""
        return self.decode_f_hat(self.f_hats(tokens_BL)[-1]).clamp(-1, 1)

    @torch.no_grad()
    def teacher_inputs(self, tokens_BL: Tensor) -> Tensor:
        """The transformer's inputs in training: (B, L - 1, C) float32.

        The input for scale k + 1 is f_hat after scale k (the image so far), downsampled to the size of
        scale k + 1: one vector per token to predict. The single token of scale 1 has no input: hence L - 1.
        """
        if len(self.config.scales) == 1:            # raster order, as in GPT: the code of the previous token
            return self.codebook(tokens_BL)[:, :-1]
        f_hats = self.f_hats(tokens_BL)[:-1]
        return torch.cat([self.next_input(f_hat, k) for k, f_hat in enumerate(f_hats)], dim=1)

    def next_input(self, f_hat_BCHW: Tensor, k: int) -> Tensor:
        """f_hat after scale k (from 0) -> the transformer's input for scale k + 1, (B, l, C)."""
        return self.shrink(f_hat_BCHW, k + 1).flatten(2).transpose(1, 2)

    def keep(self, tokens_BL: Tensor, keep_BHW: Tensor) -> Tensor:
        """kept_BL for `VAR.generate`: the tokens that an edit keeps, -1 for all others.

        keep_BHW: True (or 1) where the image is kept, per latent or pixel. A latent is kept if all its pixels
        are, a token if the latent mask, resized to its scale, is above 0.5; the 1x1 token always. Resizing is
        bilinear without antialiasing, as released: a coarse token uses at most 4 latents, at its centre.
        """
        sides = self.config.scales
        keep_B1HW = 1 - F.adaptive_max_pool2d(1 - keep_BHW[:, None].float(), sides[-1])     # min pooling
        keeps = [F.interpolate(keep_B1HW, (side, side), mode='bilinear').flatten(1) > 0.5 for side in sides]
        keeps[0] |= sides[0] == 1
        return tokens_BL.where(torch.cat(keeps, dim=1), -1)

    # --- training
    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images in [-1, 1] -> reconstruction (not clamped), vq loss, tokens_BL.

        The VQ term of Equation 5, as released: after each scale, it pulls f_hat (codes and phis) towards f
        and, weakly, f towards f_hat. The decoder's gradient is copied to f, as if nothing were quantized.
        """
        f = self.features(images_B3HW)
        tokens_BL, f_hats = self.quantize(f)
        vq_loss = sum(F.mse_loss(f_hat, f.detach()) + COMMITMENT * F.mse_loss(f, f_hat.detach())
                      for f_hat in f_hats)
        straight_through = f + (f_hats[-1] - f).detach()
        return self.decode_f_hat(straight_through), vq_loss / len(f_hats), tokens_BL

    @torch.no_grad()
    def revive_codes(self, dead_V: Tensor, f: Tensor):
        """Replaces each dead code (True in dead_V) by a vector that the quantizer encodes: a residual of the
        features f at a random scale. Coarse scales, where collapse is worst, get as many codes as fine ones.
        Uses torch's default generator."""
        dead, candidates = int(dead_V.sum()), []
        for k, f_hat in enumerate([torch.zeros_like(f), *self.quantize(f)[1][:-1]]):    # before scale k
            z_NC = self.shrink(f - f_hat, k).permute(0, 2, 3, 1).flatten(0, 2)
            candidates.append(z_NC[torch.randint(len(z_NC), (dead,), device=f.device)])
        scales = torch.randint(len(candidates), (dead,), device=f.device)
        self.codebook.weight[dead_V] = torch.stack(candidates)[scales, torch.arange(dead, device=f.device)]

    # --- released weights
    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], scales: tuple[int, ...]) -> 'VQVAE':
        """A VQVAE with the released weights (vae_ch160v4096z32.pth); float32 tensors are shared, not copied.
        Channels and codebook size are inferred from the weights. Raises ValueError if they don't fit."""
        weights = {reduce(lambda key, pair: re.sub(*pair, key), RELEASED_NAMES, key): weight
                   for key, weight in state_dict.items() if key != 'quantize.ema_vocab_hit_SV'}  # a counter
        try:
            channels, codes_VC = len(weights['encoder.conv_in.weight']), weights['codebook.weight']
            with torch.device('meta'):              # skips the slow initialisation
                model = cls(VQVAEConfig(16 * scales[-1], 1, channels, (1, 1, 2, 2, 4), 2, True,
                                        codes_VC.shape[1], len(codes_VC), tuple(scales)))
            model.load_state_dict({key: weight.float() for key, weight in weights.items()}, assign=True)
        except (LookupError, TypeError, RuntimeError) as error:
            reason = ' '.join(str(error).split())
            raise ValueError(f"not a released VAR tokenizer ({reason}); from a training checkpoint take "
                             "['trainer']['vae_local'] and cut 'module.', '_orig_mod.' from keys") from None
        return model


# -------------------------------------------------------------------- networks used only in a loss
class Discriminator(nn.Sequential):
    """PatchGAN (Isola et al., 2017): images (B, 3, H, W) in [-1, 1] -> realism score of each 70x70 patch,
    (B, 1, about H / 8, W / 8). GroupNorm instead of BatchNorm, so scores depend neither on the rest of the
    batch nor on the number of GPUs. Images must be at least 24x24."""

    def __init__(self, channels: int = 64):
        layers = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, stride in enumerate((2, 2, 1)):
            width = channels * 2 ** i
            layers += [nn.Conv2d(width, 2 * width, 4, stride, padding=1), norm(2 * width), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(8 * channels, 1, 4, padding=1))


class Classifier(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> logits (B, classes). Its features give a perceptual distance, as
    in LPIPS (Zhang et al., 2018), but trained on the data set in use. Sizes halve to no less than 4."""
    LAYERS = (1, 1), (2, 2), (3, 2), (4, 1), *[(6, 2)] * 9      # width multiple, stride

    def __init__(self, classes: int, image_size: int, channels: int = 32):
        super().__init__()
        layers, width, side = [], 3, image_size
        for multiple, stride in self.LAYERS:
            if side // stride < 4:
                break
            conv = nn.Conv2d(width, multiple * channels, 3, stride, padding=1, bias=False)
            width, side = multiple * channels, side // stride
            layers.append(nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()))
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(width, classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.head(self.features(images_B3HW)[-1].mean((2, 3)))

    def features(self, images_B3HW: Tensor) -> list[Tensor]:
        """The last feature map of each size, (B, channels, h, w), fine to coarse."""
        maps, x = {}, images_B3HW.contiguous(memory_format=torch.channels_last)
        for layer in self.layers:
            x = layer(x)
            maps[x.shape[-1]] = x
        return list(maps.values())

    def perceptual_distance(self, reconstructions_B3HW: Tensor, images_B3HW: Tensor) -> Tensor:
        """Squared distance between the features of two batches, normalised to length 1 at each position,
        averaged over positions and sizes: (B,), each in [0, 2]. Only the first batch gets a gradient."""
        with torch.no_grad():
            expected = self.features(images_B3HW)
        gaps = [F.normalize(a.float()) - F.normalize(b.float())
                for a, b in zip(self.features(reconstructions_B3HW), expected)]
        return torch.stack([gap.square().sum(1).mean((1, 2)) for gap in gaps]).mean(0)
