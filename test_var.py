"""The specification of this project, as tests, top down like the method. Run: pytest (-m 'not slow' for the quick ones)

Parts: the pyramid; the tokenizer; the transformer; sampling; the authors' weights; training; the command line; README.
"""
import hashlib
import http.server
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sample
import train
import var as var_module
import vqvae as vqvae_module
from var import VAR, VARConfig
from vqvae import VQVAE, VQVAEConfig

HERE = Path(__file__).parent
SCALES = (1, 2, 3, 5)                   # none divides the next: areas overlap, which is the hard case
PARITY = json.loads((HERE / 'notebooks/parity.json').read_text())
RELEASED_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def tokenizer():
    model = VQVAE(VQVAEConfig(image_size=10, patch_size=2, channels=32, z_channels=4, vocab_size=16, scales=SCALES))
    model.codebook.weight.data.mul_(0.3)
    return model.eval()


def small_var(**changes) -> VAR:
    """A transformer whose weights are all random, not almost silent as at the start of training."""
    model = VAR(VARConfig(**dict(depth=2, num_classes=3, vocab_size=16, z_channels=4, scales=SCALES) | changes)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture
def var():
    return small_var()


def images_of(tokenizer, count=2):
    size = tokenizer.config.image_size
    return torch.rand(count, 3, size, size) * 2 - 1


def split_scales(x_BL, scales=SCALES):
    return x_BL.split([side * side for side in scales], dim=1)


# -------------------------------------------------------------------------------------------------- the pyramid
def test_the_released_pyramid_has_680_tokens_and_679_inputs():
    config = VARConfig(depth=1, num_classes=1)
    assert config.scales == RELEASED_SCALES and config.length == 680
    tokenizer = VQVAE(VQVAEConfig(256, 1, 32, (1, 1, 2, 2, 4), 1, False, 8, 16, RELEASED_SCALES))
    assert tokenizer.config.stride == 16
    assert tokenizer.teacher_inputs(torch.zeros(1, 680, dtype=torch.int64)).shape == (1, 679, 8)


def test_each_preset_has_a_pyramid_that_fits_its_pictures():
    for name, values in train.PRESETS.items():
        config = train.make(VQVAEConfig, values)
        assert config.scales[-1] * config.stride == config.image_size, name
        assert train.make(VARConfig, values, num_classes=10).scales is not None


@pytest.mark.parametrize('K, table', [(3, [0, 2, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 2, 3]), (7, [0, 0, 1, 2, 2, 3, 3]),
                                      (10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3])])
def test_scales_share_four_phis_by_the_released_rule(K, table):
    assert [vqvae_module.phi_of_scale(k, K) for k in range(K)] == table


@pytest.mark.parametrize('scales', [(1,), (2, 5), (1, 3, 3, 5), (1, 5, 3), (1, 2, 4), ()])
def test_a_pyramid_that_does_not_rise_from_1_to_the_latent_size_is_refused(scales):
    with pytest.raises(ValueError, match='^scales='):
        VQVAEConfig(image_size=10, patch_size=2, scales=scales)


# ------------------------------------------------------------------------------------------------ the tokenizer
def slow_area(x_CHW, side):
    """Means over areas, cell by cell: cell i of `side` spans from floor(i * H / side) to ceil((i + 1) * H / side)."""
    C, H, _ = x_CHW.shape
    cells = [(i * H // side, -(-(i + 1) * H // side)) for i in range(side)]
    return torch.stack([x_CHW[:, a:b, c:d].mean((1, 2)) for a, b in cells for c, d in cells])         # (side * side, C)


def test_encode_is_algorithm_1_done_slowly(tokenizer):
    images = images_of(tokenizer)
    codes, K = tokenizer.codebook.weight, len(SCALES)
    with torch.no_grad():
        for image, fast in zip(images, tokenizer.encode(images), strict=True):
            f, slow = tokenizer.features(image[None])[0], []
            for k, side in enumerate(SCALES):
                r_k = [min(range(16), key=lambda v, z=z: (z - codes[v]).norm().item()) for z in slow_area(f, side)]
                slow += r_k
                z_k = codes[torch.tensor(r_k)].T.reshape(1, 4, side, side)
                z_k = F.interpolate(z_k, size=(5, 5), mode='bicubic') if k < K - 1 else z_k
                phi = tokenizer.phis[vqvae_module.phi_of_scale(k, K)]
                f = f - (0.5 * z_k + 0.5 * F.conv2d(z_k, phi.weight, phi.bias, padding=1))[0]
            assert fast.tolist() == slow
    assert len(set(slow)) > 3                   # not a collapsed codebook, which would agree with anything


def test_each_scale_encodes_what_the_scales_before_it_left_over(tokenizer):
    f = torch.randn(2, 4, 5, 5)
    tokens_BL, f_hats = tokenizer.quantize(f)
    left = f
    for k, tokens_Bl in enumerate(split_scales(tokens_BL)):
        assert torch.equal(tokens_Bl, tokenizer.nearest_codes(tokenizer.shrink(left, k)))
        left = left - tokenizer.contribution(tokens_Bl, k)
    torch.testing.assert_close(f_hats[-1] + left, f, atol=1e-6, rtol=0)          # f = f_hat + residual


def test_decoding_tokens_gives_the_f_hat_that_encoding_saw(tokenizer):
    images = images_of(tokenizer)
    with torch.no_grad():
        tokens_BL, f_hats = tokenizer.quantize(tokenizer.features(images))
        assert all(torch.equal(a, b) for a, b in zip(f_hats, tokenizer.f_hats(tokens_BL), strict=True))
        reconstruction, _, tokens = tokenizer(images)
        assert torch.equal(tokens, tokens_BL) and torch.equal(tokens, tokenizer.encode(images))
        # forward decodes f + (f_hat - f): f_hat up to rounding
        torch.testing.assert_close(tokenizer.decode(tokens_BL), reconstruction.clamp(-1, 1), atol=1e-5, rtol=0)


def test_teacher_inputs_are_the_accumulated_f_hat_shrunk_to_the_next_scale(tokenizer):
    tokens_BL = torch.randint(16, (2, 39))
    inputs_BLC, f_hats = tokenizer.teacher_inputs(tokens_BL), tokenizer.f_hats(tokens_BL)
    assert inputs_BLC.shape == (2, 38, 4)
    for k, inputs in enumerate(inputs_BLC.split([4, 9, 25], dim=1)):
        expected = torch.stack([slow_area(f_hat, SCALES[k + 1]) for f_hat in f_hats[k].detach()])
        torch.testing.assert_close(inputs, expected, atol=1e-6, rtol=0)


def test_the_decoders_gradient_goes_straight_through_to_the_encoder(tokenizer):
    f = torch.randn(1, 4, 5, 5, requires_grad=True)
    tokenizer.features = lambda images: f
    reconstruction, _, _ = tokenizer(images_of(tokenizer, 1))
    weights = torch.randn_like(reconstruction)
    (reconstruction * weights).sum().backward()
    f_hat = tokenizer.quantize(f)[1][-1].detach().requires_grad_()
    (tokenizer.decode_f_hat(f_hat) * weights).sum().backward()
    torch.testing.assert_close(f.grad, f_hat.grad, atol=1e-5, rtol=1e-4)
    assert tokenizer.codebook.weight.grad is None                                # codes learn from the vq loss alone


def test_the_vq_loss_moves_codes_to_f_and_f_a_quarter_as_much_to_codes(tokenizer):
    f = torch.randn(2, 4, 5, 5, requires_grad=True)
    tokenizer.features = lambda images: f
    _, vq_loss, _ = tokenizer(images_of(tokenizer))
    f_hats = [f_hat.detach() for f_hat in tokenizer.quantize(f)[1]]
    assert vq_loss.item() == pytest.approx(1.25 * np.mean([F.mse_loss(f_hat, f).item() for f_hat in f_hats]), rel=1e-5)
    vq_loss.backward()
    expected = sum(0.25 * 2 * (f.detach() - f_hat) / f.numel() for f_hat in f_hats) / len(SCALES)
    torch.testing.assert_close(f.grad, expected, atol=1e-7, rtol=1e-4)
    used = tokenizer.codebook.weight.grad.abs().sum(1) > 0
    assert used.tolist() == [v in tokenizer.quantize(f)[0] for v in range(16)]


def test_dead_codes_are_put_on_vectors_that_the_quantizer_meets(tokenizer):
    images, before = images_of(tokenizer, 8), tokenizer.codebook.weight.detach().clone()
    dead = torch.arange(16) % 2 == 0
    with torch.no_grad():
        f = tokenizer.features(images)
        left = [f] + [f - f_hat for f_hat in tokenizer.quantize(f)[1][:-1]]
        met = torch.cat([tokenizer.shrink(r, k).permute(0, 2, 3, 1).reshape(-1, 4) for k, r in enumerate(left)])
    tokenizer.revive_codes(dead, images)
    after = tokenizer.codebook.weight.detach()
    assert torch.equal(after[~dead], before[~dead])
    assert torch.cdist(after[dead], met).amin(1).max() < 1e-5
    assert not torch.equal(after[dead], before[dead])


# ---------------------------------------------------------------------------------------------- the transformer
@pytest.mark.parametrize('unit_norm', [True, False])
def test_scale_k_cannot_see_scale_k_plus_1(unit_norm):
    model = small_var(unit_norm=unit_norm)
    inputs_BLC = torch.randn(1, 38, 4, requires_grad=True)
    logits = split_scales(model(torch.tensor([1]), inputs_BLC))
    for k in range(len(SCALES)):
        for place in range(logits[k].shape[1]):                 # what stands for the 38 inputs: scales 2, 3, 4
            grad = torch.autograd.grad(logits[k][0, place].square().sum(), inputs_BLC, retain_graph=True)[0]
            seen = [part.abs().sum(-1) > 0 for part in grad.split([4, 9, 25], dim=1)]
            for scale, part in enumerate(seen, start=1):
                assert part.all() if scale <= k else not part.any(), f'scale {k} place {place}, inputs of {scale}'


def test_the_first_map_follows_from_the_class_alone(var):
    a, b = (var(torch.tensor([2]), torch.randn(1, 38, 4))[:, 0] for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.allclose(a, var(torch.tensor([1]), torch.randn(1, 38, 4))[:, 0])


def test_labels_are_dropped_in_training_only():
    model = small_var(label_dropout=0.5, stochastic_depth=0.0)
    labels, inputs = torch.zeros(64, dtype=torch.int64), torch.randn(1, 38, 4).expand(64, -1, -1)
    own, null = model(labels[:1], inputs[:1])[0], model(labels[:1] + 3, inputs[:1])[0]
    torch.testing.assert_close(model(labels, inputs), own.expand(64, -1, -1), atol=1e-5, rtol=1e-5)
    trained = model.train()(labels, inputs)
    dropped = (trained - null).abs().amax((1, 2)) < 1e-4
    assert 16 <= dropped.sum() <= 48
    torch.testing.assert_close(trained[~dropped], own.expand(int((~dropped).sum()), -1, -1), atol=1e-4, rtol=1e-4)


def test_stochastic_depth_rises_linearly_and_skips_in_training_only():
    assert [block.drop_rate for block in small_var(depth=3, stochastic_depth=0.4).blocks] == [0, 0.2, 0.4]
    assert small_var(depth=2).blocks[-1].drop_rate == pytest.approx(0.1 * 2 / 24)
    model = small_var(depth=1, stochastic_depth=None)
    block, gamma = model.blocks[0], torch.ones(1000, 1, 4)
    block.drop_rate = 0.25
    assert torch.equal(block.eval().drop(gamma), gamma)
    kept = block.train().drop(gamma)
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert 0.65 < (kept[:, 0, 0] > 0).float().mean() < 0.85 and kept.mean() == pytest.approx(1, abs=0.1)


def test_attention_with_unit_norm_is_bounded_however_long_the_queries():
    model = small_var(depth=1)
    attention, x = model.blocks[0].attention, torch.randn(2, 39, 64)
    with torch.no_grad():
        attention.q_bias.zero_(), attention.v_bias.zero_()
        out = attention(x, None, None, 0)
        attention.qkv.weight[:128] *= 1000                      # queries and keys
        torch.testing.assert_close(attention(x, None, None, 0), out, atol=1e-5, rtol=1e-4)
        attention.log_scale.fill_(math.log(100.0))
        out = attention(x, None, None, 0)
        attention.log_scale.fill_(math.log(1e6))                # at most 100
        torch.testing.assert_close(attention(x, None, None, 0), out)


def test_initialisation_is_the_released_one():
    model = VAR(VARConfig(depth=4, num_classes=50, vocab_size=64, z_channels=8, scales=(1, 2), adaln_gamma_init=1e-3))
    D, std = 256, math.sqrt(1 / (3 * 256))
    adaln = model.blocks[1].adaln.weight.unflatten(0, (6, D))
    for weight, expected in [(model.class_embedding.weight, std), (model.blocks[0].fc1.weight, std), (model.head.weight, std * 0.02),
                             (model.blocks[0].fc2.weight, std / math.sqrt(8)), (model.head_adaln.weight, std * 0.5),
                             (model.blocks[2].attention.proj.weight, std / math.sqrt(8)), (adaln[:2], std * 1e-3),
                             (adaln[2:], std * 0.5), (model.position, std)]:
        assert weight.std().item() == pytest.approx(expected, rel=0.1)
    assert model.blocks[3].attention.log_scale.exp().flatten().tolist() == pytest.approx([4.0] * 4)


# ------------------------------------------------------------------------------------------------------ sampling
def logits_while_generating(var, tokenizer, labels, **options):
    """Conditional and unconditional logits that generate() saw, (B, L, V) each, and its tokens."""
    seen = []
    hook = var.head.register_forward_hook(lambda module, args, output: seen.append(output))
    _, tokens_BL = var.generate(tokenizer, labels, return_tokens=True, **options)
    hook.remove()
    return *torch.cat(seen, dim=1).chunk(2), tokens_BL


@pytest.mark.parametrize('shared_adaln, unit_norm', [(False, True), (True, False)])
def test_cached_generation_sees_the_logits_of_one_masked_forward_pass(tokenizer, shared_adaln, unit_norm):
    var, labels = small_var(shared_adaln=shared_adaln, unit_norm=unit_norm), torch.tensor([0, 2])
    conditional, unconditional, tokens_BL = logits_while_generating(var, tokenizer, labels, cfg=3.0)
    inputs_BLC = tokenizer.teacher_inputs(tokens_BL)
    with torch.no_grad():
        # logits are about 1; float32 sums in another order differ by about 1e-6
        torch.testing.assert_close(conditional, var(labels, inputs_BLC), atol=1e-5, rtol=0)
        torch.testing.assert_close(unconditional, var(torch.tensor([3, 3]), inputs_BLC), atol=1e-5, rtol=0)


def test_guidance_rises_from_nothing_at_the_first_scale_to_cfg_at_the_last(var, tokenizer):
    conditional, unconditional, tokens_BL = logits_while_generating(var, tokenizer, torch.tensor([0, 1]), cfg=3.0, top_k=1)
    t_L = torch.cat([torch.full((side * side,), 3.0 * k / 3) for k, side in enumerate(SCALES)])[:, None]
    assert t_L[0] == 0 and t_L[-1] == 3
    assert torch.equal(tokens_BL, (conditional + t_L * (conditional - unconditional)).argmax(-1))
    assert not torch.equal(tokens_BL, conditional.argmax(-1))


def test_cfg_0_and_the_null_class_are_not_guided(var, tokenizer):
    noise = torch.rand(2, 39)
    conditional, _, tokens_BL = logits_while_generating(var, tokenizer, torch.tensor([0, 1]), cfg=0.0, noise_BL=noise)
    assert torch.equal(tokens_BL, var_module.draw(conditional, noise, 900, 0.96))
    null = torch.tensor([3, 3])
    tokens = [logits_while_generating(var, tokenizer, null, cfg=cfg, noise_BL=noise)[2] for cfg in (0.0, 4.0)]
    assert torch.equal(*tokens)


def slow_draw(logits, noise, top_k, top_p):
    """One token, by the words of the docstring."""
    V = len(logits)
    order = sorted(range(V), key=lambda v: -logits[v])[:top_k if 0 < top_k < V else V]
    p = np.exp([logits[v] - logits[order[0]] for v in order])
    p /= p.sum()
    if 0 < top_p < 1:
        kept = next(n for n in range(1, len(p) + 1) if n == len(p) or p[:n].sum() >= top_p)
        order, p = order[:kept], p[:kept] / p[:kept].sum()
    return order[next(n for n in range(len(p)) if n == len(p) - 1 or p[:n + 1].sum() > noise)]


@pytest.mark.parametrize('top_k', [0, 1, 5, 900])
@pytest.mark.parametrize('top_p', [0.0, 0.3, 0.8, 1.0])
def test_draw_inverts_the_cdf_that_top_k_and_top_p_leave(top_k, top_p):
    logits, noise = 2 * torch.randn(1, 200, 12, dtype=torch.float64), torch.rand(1, 200, dtype=torch.float64)
    slow = [slow_draw(row.tolist(), u, top_k, top_p) for row, u in zip(logits[0], noise[0].tolist(), strict=True)]
    assert var_module.draw(logits, noise, top_k, top_p)[0].tolist() == slow


def test_draws_have_the_frequencies_of_the_softmax():
    logits, n = torch.randn(7), 10_000
    drawn = var_module.draw(logits.expand(1, n, 7), (torch.arange(n)[None] + 0.5) / n, 0, 0.0)
    # evenly spread noise meets each step of the cdf to within one of n
    torch.testing.assert_close(drawn.flatten().bincount(minlength=7) / n, logits.softmax(-1), atol=2 / n, rtol=0)


def test_noise_next_to_1_draws_a_kept_token():
    logits, nearly_1 = torch.tensor([[[0.0, 9.0, 8.0, -50.0]]]), torch.tensor([[1 - 2 ** -24]])
    for top_k, top_p, token in [(2, 0.0, 2), (0, 0.99, 2), (1, 0.5, 1), (3, 0.0, 0)]:
        assert var_module.draw(logits, nearly_1, top_k, top_p).item() == token


def test_the_same_noise_gives_the_same_picture_in_any_batch(var, tokenizer):
    labels = [0, 1, 2, 0, 1]
    runs = [[torch.cat(parts) for parts in zip(*sample.draw(tokenizer, var, labels, 7, size), strict=True)] for size in (5, 2, 5)]
    assert torch.equal(runs[0][1], runs[1][1])                                  # tokens
    torch.testing.assert_close(runs[0][0], runs[1][0], atol=1e-5, rtol=0)       # pictures, up to rounding
    assert torch.equal(runs[0][0], runs[2][0])                                  # to the bit
    other = torch.cat([tokens for _, tokens in sample.draw(tokenizer, var, labels, 8, 5)])
    assert not torch.equal(runs[0][1], other)


def test_under_autocast_logits_and_quantizer_stay_float32(var, tokenizer):
    labels = torch.tensor([0, 1])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        tokens_BL = tokenizer.encode(images_of(tokenizer))
        inputs_BLC = tokenizer.teacher_inputs(tokens_BL)
        logits = var(labels, inputs_BLC)
        images = var.generate(tokenizer, labels)
    assert inputs_BLC.dtype == logits.dtype == images.dtype == torch.float32
    exact = var(labels, tokenizer.teacher_inputs(tokens_BL))
    assert torch.equal(inputs_BLC, tokenizer.teacher_inputs(tokens_BL))
    assert 0 < (logits - exact).abs().max() < 0.3                               # bfloat16 was used, and is near
