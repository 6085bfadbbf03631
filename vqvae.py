"""Stage 1 of VAR: the multi-scale residual VQVAE, which turns an image into a pyramid of tokens and back.

An ordinary VQVAE writes an image as one grid of tokens. This one writes it as K grids, coarse to fine: each
grid describes what the grids before it left over (the residual), and their sum, f_hat, is what is decoded.
The order "coarse to fine" is the order in which stage 2 (var.py) will predict them.

    tokenizer = VQVAE(VQVAEConfig())                        # images of 32x32 in maps of 1x1, 2x2, 4x4 and 8x8
    images_B3HW = torch.rand(2, 3, 32, 32) * 2 - 1          # in [-1, 1]
    tokens_BL = tokenizer.encode(images_B3HW)               # (2, 85)
    images_B3HW = tokenizer.decode(tokens_BL)

Shapes stand in the names of tensors:

    B batch   C latent channels of the tokenizer   V vocabulary   K number of scales
    H, W latent size at the finest scale   h, w size at the current scale   L tokens of all scales, l of one

tokens_BL is one int64 tensor: scale after scale, coarse to fine, row by row within a scale. Prose counts
scales from 1 to K, code counts k from 0.

Implements Algorithm 1 (encode), Algorithm 2 (decode) and Equation 5 (its vq part) of "Visual Autoregressive
Modeling" (Tian et al., arXiv 2404.02905). Where paper and released code differ, a comment says so.
"""
import re
from collections import OrderedDict
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PHIS = 4                # paper: one phi a scale; released code, and here: four, shared by neighbouring scales
COMMITMENT = 0.25       # weight of the pull on the encoder towards the codes, beta in the VQVAE papers
RELEASED_NAMES = (      # patterns in our names of weights -> the released code's
    (r'(down|up)_(\d+)_(block|attn)_(\d+)', r'\1.\2.\3.\4'), (r'(down|up)_(\d+)_', r'\1.\2.'),
    ('mid_', 'mid.'), ('shortcut', 'nin_shortcut'), (r'proj\.', 'proj_out.'),
    (r'codebook\.', 'quantize.embedding.'), (r'phis\.', 'quantize.quant_resi.qresi_ls.'))


@dataclass(frozen=True)
class VQVAEConfig:
    """Everything that fixes the tokenizer's shape. An impossible value raises ValueError, 'field=value: why'.

    Released: VQVAEConfig(256, 1, 160, (1, 1, 2, 2, 4), 2, True, 32, 4096, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)).
    """
    image_size: Annotated[int, 'pixels, height and width'] = 32
    patch_size: Annotated[int, 'squares of so many pixels a side become channels at first'] = 4
    channels: Annotated[int, 'channels of the first level'] = 64
    channel_mults: Annotated[tuple[int, ...], 'multiplies channels at each level; sizes halve between'] = (1,)
    res_blocks: Annotated[int, 'residual blocks per level; the decoder has one more'] = 1
    attention: Annotated[bool, 'self-attention at the coarsest level, as released'] = False
    z_channels: Annotated[int, 'C, channels of a latent'] = 16
    vocab_size: Annotated[int, 'V, codes in the codebook'] = 256
    scales: Annotated[tuple[int, ...], 'side of each token map, coarse to fine'] = (1, 2, 4, 8)

    @property
    def stride(self) -> int:
        """Pixels per latent, in height and width."""
        return self.patch_size * 2 ** (len(self.channel_mults) - 1)

    def __post_init__(self):
        for name in ('image_size', 'patch_size', 'channels', 'res_blocks', 'z_channels', 'vocab_size'):
            most = 200 if name == 'res_blocks' else 2 ** 30
            value = getattr(self, name)
            if isinstance(value, bool) or not 1 <= value <= most:
                raise ValueError(f'{name}={value}: must be at least 1 and at most {most}')
        if self.channels % 32:
            raise ValueError(f'channels={self.channels}: must be a multiple of 32, the groups of GroupNorm')
        if not self.channel_mults or min(self.channel_mults) < 1:
            raise ValueError(f'channel_mults={self.channel_mults}: needs one or more numbers of at least 1')
        sides = list(self.scales)
        if not sides or sides != sorted(set(sides)) or (sides[0] != 1 and len(sides) > 1):
            raise ValueError(f'scales={self.scales}: must start at 1 and rise, or be one map alone')
        if self.scales[-1] * self.stride != self.image_size:
            raise ValueError(f'scales={self.scales}: the last must be the latent size, image_size / stride = '
                             f'{self.image_size} / {self.stride} = {self.image_size / self.stride:g}')


def phi_of_scale(k: int, K: int) -> int:
    """Which of the four phis scale k of K (from 0) uses: the one whose tick is nearest to k / (K - 1).

    The ticks are four points spread over [0, 1], literally as released: at ties their rounding decides.
    """
    ticks = np.linspace(1 / 3 / PHIS, 1 - 1 / 3 / PHIS, PHIS)
    return int(np.argmin(np.abs(ticks - k / max(1, K - 1))))


# ---------------------------------------------------------------------------------------- networks
def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


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
    """Self-attention over all positions of a feature map, one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)                     # (B, hw, 3 * channels)
        h = F.scaled_dot_product_attention(*qkv.unsqueeze(1).chunk(3, dim=-1))      # (B, 1, hw, channels)
        return x + self.proj(h.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:]))


def downsample(channels: int) -> nn.Sequential:
    pad = nn.ZeroPad2d((0, 1, 0, 1))                        # on the right and below only, as released
    return nn.Sequential(OrderedDict(pad=pad, conv=nn.Conv2d(channels, channels, 3, stride=2)))


def upsample(channels: int) -> nn.Sequential:
    enlarge = nn.Upsample(scale_factor=2.0, mode='nearest')
    return nn.Sequential(OrderedDict(enlarge=enlarge, conv=nn.Conv2d(channels, channels, 3, padding=1)))


def middle(width: int, attention: bool) -> OrderedDict:
    """The layers at the coarsest size between the levels and the latents."""
    layers = OrderedDict(mid_block_1=ResBlock(width, width))
    if attention:
        layers['mid_attn_1'] = AttentionBlock(width)
    layers['mid_block_2'] = ResBlock(width, width)
    return layers


def build_encoder(config: VQVAEConfig) -> nn.Sequential:
    """(B, 3, H * stride, W * stride) in [-1, 1] -> (B, C, H, W). Layers are named as in the released code."""
    width, last = config.channels, len(config.channel_mults) - 1
    layers = OrderedDict(unshuffle=nn.PixelUnshuffle(config.patch_size))
    layers['conv_in'] = nn.Conv2d(3 * config.patch_size ** 2, width, 3, padding=1)
    for i, mult in enumerate(config.channel_mults):
        for j in range(config.res_blocks):
            layers[f'down_{i}_block_{j}'] = ResBlock(width, config.channels * mult)
            width = config.channels * mult
            if config.attention and i == last:
                layers[f'down_{i}_attn_{j}'] = AttentionBlock(width)
        if i < last:
            layers[f'down_{i}_downsample'] = downsample(width)
    layers |= middle(width, config.attention)
    layers |= dict(norm_out=norm(width), silu=nn.SiLU())
    layers['conv_out'] = nn.Conv2d(width, config.z_channels, 3, padding=1)
    return nn.Sequential(layers)


def build_decoder(config: VQVAEConfig) -> nn.Sequential:
    """(B, C, H, W) -> (B, 3, H * stride, W * stride): the encoder backwards, one more block a level."""
    last = len(config.channel_mults) - 1
    width = config.channels * config.channel_mults[last]
    layers = OrderedDict(conv_in=nn.Conv2d(config.z_channels, width, 3, padding=1))
    layers |= middle(width, config.attention)
    for i in range(last, -1, -1):
        for j in range(config.res_blocks + 1):
            layers[f'up_{i}_block_{j}'] = ResBlock(width, config.channels * config.channel_mults[i])
            width = config.channels * config.channel_mults[i]
            if config.attention and i == last:
                layers[f'up_{i}_attn_{j}'] = AttentionBlock(width)
        if i > 0:
            layers[f'up_{i}_upsample'] = upsample(width)
    layers |= dict(norm_out=norm(width), silu=nn.SiLU())
    layers['conv_out'] = nn.Conv2d(width, 3 * config.patch_size ** 2, 3, padding=1)
    layers['shuffle'] = nn.PixelShuffle(config.patch_size)
    return nn.Sequential(layers)


class Phi(nn.Conv2d):
    """phi(x) = 0.5 x + 0.5 conv(x): mends what was lost in resizing a coarse token map up."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + 0.5 * super().forward(x)


class Discriminator(nn.Sequential):
    """PatchGAN: images (B, 3, H, W) in [-1, 1] -> how real each patch looks, (B, 1, about H / 8, W / 8).

    The network of pix2pix (Isola et al., 2017), whose verdicts see 70x70 pixels each, but with GroupNorm for
    BatchNorm: what it says of an image then depends neither on the batch nor on how many GPUs share it.
    Needs images of 24 pixels or more.
    """

    def __init__(self, channels: int = 64):
        layers = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, stride in enumerate((2, 2, 1)):
            width = channels * 2 ** i
            layers += [nn.Conv2d(width, 2 * width, 4, stride, padding=1), norm(2 * width), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(8 * channels, 1, 4, padding=1))


class Classifier(nn.Module):
    """Names the class of images (B, 3, H, W) in [-1, 1]: logits (B, classes). For stage 1's perceptual term.

    What it sees on its way tells what images are recognised by: the idea of LPIPS (Zhang et al., 2018), but
    trained on the images at hand. Convolutions of 3x3 with BatchNorm; sizes halve while 4 pixels remain.
    """
    LAYERS = (1, 1), (2, 2), (3, 2), (4, 1), *[(6, 2)] * 9      # width over that of the first, and stride

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
        """The last map of each size, (B, channels, h, w), fine to coarse."""
        maps, x = {}, images_B3HW.contiguous(memory_format=torch.channels_last)
        for layer in self.layers:
            x = layer(x)
            maps[x.shape[-1]] = x
        return list(maps.values())

    def distance(self, reconstructions_B3HW: Tensor, images_B3HW: Tensor) -> Tensor:
        """How differently it sees two batches: (B,), each in [0, 2]. The gradient is of the first alone.

        At each place the directions of the features are compared, by their squared distance; it is averaged
        over places, and over sizes.
        """
        with torch.no_grad():
            expected = self.features(images_B3HW)
        pairs = zip(self.features(reconstructions_B3HW), expected)
        return torch.stack([(F.normalize(a.float()) - F.normalize(b.float())).square().sum(1).mean((1, 2))
                            for a, b in pairs]).mean(0)


# --------------------------------------------------------------------------------------- tokenizer
class VQVAE(nn.Module):
    """The tokenizer: encoder, multi-scale residual quantizer, decoder."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        K, C = len(config.scales), config.z_channels
        self.encoder, self.decoder = build_encoder(config), build_decoder(config)
        self.quant_conv = nn.Conv2d(C, C, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(C, C, 3, padding=1)
        self.codebook = nn.Embedding(config.vocab_size, C)              # one codebook for all scales
        self.phis = nn.ModuleList(Phi(C, C, 3, padding=1) for _ in range(PHIS))
        self.phi_table = [phi_of_scale(k, K) for k in range(K)]
        self.scale_lengths = [side * side for side in config.scales]

    # --- the three steps that everything below is made of
    def nearest_codes(self, z_BChw: Tensor) -> Tensor:
        """Index of the nearest code (plain L2) for every position, row by row: (B, l) int64."""
        z_BlC = z_BChw.flatten(2).transpose(1, 2)
        codes_VC = self.codebook.weight
        with torch.autocast(z_BChw.device.type, enabled=False):
            # |z - code|^2 without |z|^2, which is the same for every code
            distances = codes_VC.square().sum(1) - 2 * z_BlC @ codes_VC.T
        return distances.argmin(-1)

    def contribution(self, tokens_Bl: Tensor, k: int) -> Tensor:
        """What the tokens of scale k (from 0) add to f_hat: (B, C, H, W) float32. (Or, instead of tokens,
        mixtures: weights of all codes, (B, l, V) float32.)"""
        side, size = self.config.scales[k], self.config.scales[-1]
        is_mixed = tokens_Bl.is_floating_point()
        with torch.autocast(tokens_Bl.device.type, enabled=False):
            z_BlC = tokens_Bl @ self.codebook.weight if is_mixed else self.codebook(tokens_Bl)
            z_BCHW = z_BlC.transpose(1, 2).unflatten(2, (side, side))               # Alg. 1, line 7
            if side != size:
                z_BCHW = F.interpolate(z_BCHW, size=(size, size), mode='bicubic')   # line 8
            return self.phis[self.phi_table[k]](z_BCHW.contiguous())                # in line 9: phi_k

    def shrink(self, f_BCHW: Tensor, k: int) -> Tensor:
        """Averages a map over the areas of scale k's grid: (B, C, h, w)."""
        side = self.config.scales[k]
        return f_BCHW if side == f_BCHW.shape[-1] else F.interpolate(f_BCHW, size=(side, side), mode='area')

    # --- images <-> tokens
    def features(self, images_B3HW: Tensor) -> Tensor:
        """The encoder: images in [-1, 1] -> f, (B, C, H, W) float32."""
        return self.quant_conv(self.encoder(images_B3HW)).float()

    def quantize(self, f_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loop of Algorithm 1: f -> tokens_BL and f_hat after every scale, K maps (B, C, H, W).

        f_hats carry gradients to the codebook and the phis, none to f.
        """
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
        """The sums of contributions up to scale 1, 2, ..., K: what `quantize` returned with these tokens."""
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
        """What the transformer sees in training: (B, L - 1, C) float32.

        The input for scale k + 1 is f_hat after scale k, shrunk to the grid of scale k + 1: the image so
        far, one vector for each token to predict. (The tokens of scale k alone stand on a smaller grid, and
        are only what that scale added.) Scale 1 has no input: it is predicted from the class.
        """
        f_hat, inputs = 0.0, []
        groups = tokens_BL.split(self.scale_lengths if len(self.scale_lengths) > 1 else 1, dim=1)
        for k, tokens_Bl in enumerate(groups[:-1]):
            f_hat, input_BlC = self.advance(f_hat, tokens_Bl, k)
            inputs.append(input_BlC)
        return torch.cat(inputs, dim=1)

    def advance(self, f_hat_BCHW: Tensor | float, tokens_Bl: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Adds group k (from 0). Returns f_hat, and the transformer's input for group k + 1: (B, l, C).
        A group is a scale, and f_hat, shrunk to the next grid, is that input; or, of a single map, a token in
        raster order, and its code is (f_hat can't grow before the map is whole)."""
        if len(self.config.scales) == 1:
            return f_hat_BCHW, self.codebook(tokens_Bl)
        f_hat_BCHW = f_hat_BCHW + self.contribution(tokens_Bl, k)
        return f_hat_BCHW, self.next_input(f_hat_BCHW, k)

    def next_input(self, f_hat_BCHW: Tensor, k: int) -> Tensor:
        """f_hat after scale k (from 0) -> the transformer's input for scale k + 1, (B, l, C)."""
        return self.shrink(f_hat_BCHW, k + 1).flatten(2).transpose(1, 2)

    def keep(self, tokens_BL: Tensor, keep_BHW: Tensor) -> Tensor:
        """Which tokens an edit leaves as they are: kept_BL for `VAR.generate`, the token or -1.

        keep_BHW: 1 (or True) where the image stays and 0 where it is drawn anew, of latents or pixels; a
        latent stays if all its pixels do. Latents are resized to each scale, and tokens stay above 0.5; the
        1x1 token stays always, and with it something of the image's tone. As in the released editing demo:
        bilinear without antialiasing, so that a coarse token asks only the four latents around its middle.
        """
        sides = self.config.scales                          # the latents' minimum over their pixels:
        keep_B1HW = 1 - F.adaptive_max_pool2d(1 - keep_BHW[:, None].float(), sides[-1])
        keeps = [F.interpolate(keep_B1HW, (side, side), mode='bilinear').flatten(1) > 0.5 for side in sides]
        keeps[0] |= sides[0] == 1
        return tokens_BL.where(torch.cat(keeps, dim=1), -1)

    # --- training
    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images in [-1, 1] -> reconstruction (not clamped), vq loss, tokens_BL.

        The vq part of Equation 5 as released: after every scale, codes and phis move towards f, and f a
        little towards them. The decoder's gradient goes straight through to f, as if nothing were quantized.
        """
        f = self.features(images_B3HW)
        tokens_BL, f_hats = self.quantize(f)
        vq_loss = sum(F.mse_loss(f_hat, f.detach()) + COMMITMENT * F.mse_loss(f, f_hat.detach())
                      for f_hat in f_hats)
        straight_through = f + (f_hats[-1] - f).detach()
        return self.decode_f_hat(straight_through), vq_loss / len(f_hats), tokens_BL

    @torch.no_grad()
    def revive_codes(self, dead_V: Tensor, f: Tensor):
        """Replaces each dead code (True in dead_V) by a vector that the quantizer meets in these features.

        That is a residual of a scale taken at random, so that the coarse scales, where collapse is worst, get
        as many codes as the fine ones. Uses torch's default generator.
        """
        f_hats_before = [torch.zeros_like(f), *self.quantize(f)[1][:-1]]
        dead = int(dead_V.sum())
        candidates = []
        for k, f_hat in enumerate(f_hats_before):
            z_NC = self.shrink(f - f_hat, k).permute(0, 2, 3, 1).flatten(0, 2)
            candidates.append(z_NC[torch.randint(len(z_NC), (dead,), device=f.device)])
        scales = torch.randint(len(candidates), (dead,), device=f.device)
        self.codebook.weight[dead_V] = torch.stack(candidates)[scales, torch.arange(dead, device=f.device)]

    # --- the authors' weights
    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], scales: tuple[int, ...]) -> 'VQVAE':
        """The released tokenizer (vae_ch160v4096z32.pth) as a VQVAE, whose weights the tensors become, not
        copied if float32; all else is read off the shapes. Raises ValueError with the first key that is
        missing, superfluous or of another shape."""
        try:
            channels = len(state_dict['encoder.conv_in.weight'])
            vocab_size, z_channels = state_dict['quantize.embedding.weight'].shape
        except KeyError as error:
            raise ValueError(f"no released VAR tokenizer: {error} is missing; of the trainer's files take "
                             "['trainer']['vae_local'], from keys module. and _orig_mod. away") from None
        mults = {(int(m[1]), int(m[2])): len(weight) // channels for key, weight in state_dict.items()
                 if (m := re.fullmatch(r'encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight', key))}
        levels, res_blocks = (1 + max(numbers) for numbers in zip(*mults, (0, 0), strict=True))
        channel_mults = tuple(mults.get((level, 0), 1) for level in range(levels))
        with torch.device('meta'):                  # shapes alone: initial values take long
            model = cls(VQVAEConfig(scales[-1] * 2 ** (levels - 1), 1, channels, channel_mults, res_blocks,
                                    True, z_channels, vocab_size, tuple(scales)))
        names = {reduce(lambda name, pair: re.sub(*pair, name), RELEASED_NAMES, name): name
                 for name in model.state_dict()}                        # ours, by released names
        ours = {key: model.get_parameter(name) for key, name in names.items()}
        for key in [*ours, *(key for key in state_dict if not key.endswith('quantize.ema_vocab_hit_SV'))]:
            found, expected = (tuple(at[key].shape) if key in at else 'none' for at in (state_dict, ours))
            if found != expected:
                raise ValueError(f'{key}: {found}, expected {expected}')
        model.load_state_dict({name: state_dict[key].float() for key, name in names.items()}, assign=True)
        return model
