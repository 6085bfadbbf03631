"""The specification of this project, as tests, top down like the method. Run: pytest [-m 'not slow']

The pyramid, the tokenizer, the transformer, sampling, released weights; then what trains them: data,
training, many processes and stops (the 20 kills: pytest -m many_kills), mistakes, README. What lives in
notebooks/ is tested there.
"""
import csv
import hashlib
import json
import math
import os
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from functools import cache
from pathlib import Path
from types import SimpleNamespace

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
from vqvae import VQVAE, Classifier, Discriminator, VQVAEConfig

HERE = Path(__file__).resolve().parent
SCALES = (1, 2, 3, 5)                   # none divides the next: areas overlap, which is the hard case
PARITY = json.loads((HERE / 'notebooks/parity.json').read_text())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_tokenizer(scales=SCALES):
    model = VQVAE(VQVAEConfig(image_size=10, patch_size=2, channels=32, z_channels=4, vocab_size=16,
                              scales=scales))
    model.codebook.weight.data.mul_(0.3)
    return model.eval()


@pytest.fixture
def tokenizer():
    return small_tokenizer()


def small_var(**changes) -> VAR:
    """A transformer whose weights are all random, not almost silent as at the start of training."""
    settings = dict(depth=2, num_classes=3, vocab_size=16, z_channels=4, scales=SCALES) | changes
    model = VAR(VARConfig(**settings))
    for parameter in model.parameters():
        std = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        parameter.data = torch.randn(parameter.shape) * std
    return model.eval()


def images_of(tokenizer, count=2):
    size = tokenizer.config.image_size
    return torch.rand(count, 3, size, size) * 2 - 1


def split_scales(x_BL, scales=SCALES):
    return x_BL.split([side * side for side in scales], dim=1)


# ----------------------------------------------------------------------------------------- the pyramid
def test_the_released_pyramid_has_680_tokens_and_679_inputs():
    assert sum(VARConfig().lengths) == 680
    tokenizer = VQVAE(VQVAEConfig(256, 1, 32, (1, 1, 2, 2, 4), 1, False, 8, 16, VARConfig().scales))
    assert tokenizer.config.stride == 16
    assert tokenizer.teacher_inputs(torch.zeros(1, 680, dtype=torch.int64)).shape == (1, 679, 8)


@pytest.mark.parametrize('table', [[0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 2, 3], [0, 0, 1, 2, 2, 3, 3],
                                   [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]])
def test_scales_share_four_phis_by_the_released_rule(table):
    assert [vqvae_module.phi_of_scale(k, len(table)) for k in range(len(table))] == table


@pytest.mark.parametrize('scales', [(1,), (2, 5), (1, 3, 3, 5), (1, 5, 3), (1, 2, 4), (4,), ()])
def test_a_pyramid_that_does_not_rise_from_1_to_the_latent_size_is_refused(scales):
    with pytest.raises(ValueError, match='^scales='):
        VQVAEConfig(image_size=10, patch_size=2, scales=scales)


@pytest.mark.parametrize('order, scales', [
    ('scale', (5,)), ('scale', (2, 5)), ('scale', (1, 5, 3)), ('scale', (1,)), ('scale', ()),
    ('raster', SCALES), ('raster', (1,)), ('raster', ()), ('snake', (5,)), ('snake', SCALES)])
def test_scales_are_predicted_in_scale_order_and_one_map_alone_in_raster_order(order, scales):
    with pytest.raises(ValueError, match=re.escape(f'scales={scales}: not for order {order};')):
        VARConfig(order=order, scales=scales)
    assert VARConfig(scales=SCALES).lengths == [1, 4, 9, 25]
    assert VARConfig(order='raster', scales=(5,)).lengths == [1] * 25


# --------------------------------------------------------------------------------------- the tokenizer
def slow_area(x_CHW, side):
    """Means over areas, (side * side, C): cell i spans from floor(i H / side) to ceil((i + 1) H / side)."""
    C, H, _ = x_CHW.shape
    cells = [(i * H // side, -(-(i + 1) * H // side)) for i in range(side)]
    return torch.stack([x_CHW[:, a:b, c:d].mean((1, 2)) for a, b in cells for c, d in cells])


def test_encode_is_algorithm_1_done_slowly(tokenizer):
    images, codes, K = images_of(tokenizer), tokenizer.codebook.weight.detach(), len(SCALES)
    with torch.no_grad():
        features = tokenizer.features(images)
        tokens_BL, f_hats = tokenizer.quantize(features)
        assert torch.equal(tokens_BL, tokenizer.encode(images)) and len(tokens_BL.unique()) > 3
        for f, fast, f_hat in zip(features, tokens_BL.tolist(), f_hats[-1]):
            slow, left = [], f
            for k, side in enumerate(SCALES):
                z_lC = slow_area(left, side)
                r_k = [min(range(16), key=lambda v: (z_C - codes[v]).norm().item()) for z_C in z_lC]
                slow += r_k
                z_k = codes[torch.tensor(r_k)].T.reshape(1, 4, side, side)
                z_k = F.interpolate(z_k, size=(5, 5), mode='bicubic') if k < K - 1 else z_k
                phi = tokenizer.phis[vqvae_module.phi_of_scale(k, K)]
                left = left - (0.5 * z_k + 0.5 * F.conv2d(z_k, phi.weight, phi.bias, padding=1))[0]
            assert fast == slow
            torch.testing.assert_close(f_hat + left, f, atol=1e-6, rtol=0)      # f = f_hat + residual


def test_decoding_tokens_gives_the_f_hat_that_encoding_saw(tokenizer):
    images = images_of(tokenizer)
    with torch.no_grad():
        tokens_BL, f_hats = tokenizer.quantize(tokenizer.features(images))
        assert all(torch.equal(a, b) for a, b in zip(f_hats, tokenizer.f_hats(tokens_BL), strict=True))
        reconstruction, _, tokens = tokenizer(images)
        assert torch.equal(tokens, tokens_BL) and torch.equal(tokens, tokenizer.encode(images))
        # forward decodes f + (f_hat - f): f_hat up to rounding
        decoded = tokenizer.decode(tokens_BL)
        torch.testing.assert_close(decoded, reconstruction.clamp(-1, 1), atol=1e-5, rtol=0)


def test_teacher_inputs_are_the_accumulated_f_hat_shrunk_to_the_next_scale(tokenizer):
    tokens_BL = torch.randint(16, (2, 39))
    inputs_BLC, f_hats = tokenizer.teacher_inputs(tokens_BL), tokenizer.f_hats(tokens_BL)
    assert inputs_BLC.shape == (2, 38, 4)
    for k, inputs in enumerate(inputs_BLC.split([4, 9, 25], dim=1)):
        expected = torch.stack([slow_area(f_hat, SCALES[k + 1]) for f_hat in f_hats[k].detach()])
        torch.testing.assert_close(inputs, expected, atol=1e-6, rtol=0)


def test_a_single_map_is_an_ordinary_vqvae_whose_inputs_are_the_codes_of_the_tokens_before():
    tokenizer = small_tokenizer((5,))
    images, codes_VC = images_of(tokenizer), tokenizer.codebook.weight.detach()
    f = tokenizer.features(images).detach()
    tokens_BL = tokenizer.encode(images)
    nearest = torch.cdist(f.flatten(2).transpose(1, 2), codes_VC[None]).argmin(-1)
    assert tokens_BL.shape == (2, 25) and torch.equal(tokens_BL, nearest)
    looked_up = codes_VC[tokens_BL].transpose(1, 2).unflatten(2, (5, 5))
    assert tokenizer.phi_table == [0]
    phi = tokenizer.phis[0]
    f_hat = 0.5 * looked_up + 0.5 * F.conv2d(looked_up, phi.weight, phi.bias, padding=1)
    torch.testing.assert_close(tokenizer.decode(tokens_BL), tokenizer.decode_f_hat(f_hat).clamp(-1, 1))
    assert torch.equal(tokenizer.teacher_inputs(tokens_BL), codes_VC[tokens_BL[:, :-1]])
    keep = torch.zeros(2, 5, 5)
    keep[:, 3:] = 1                                     # and no token is kept always
    assert torch.equal(tokenizer.keep(tokens_BL, keep) >= 0, keep.flatten(1) > 0)


def test_the_decoders_gradient_goes_straight_through_to_the_encoder(tokenizer):
    f = torch.randn(1, 4, 5, 5, requires_grad=True)
    tokenizer.features = lambda images: f
    reconstruction, _, _ = tokenizer(images_of(tokenizer, 1))
    weights = torch.randn_like(reconstruction)
    (reconstruction * weights).sum().backward()
    f_hat = tokenizer.quantize(f)[1][-1].detach().requires_grad_()
    (tokenizer.decode_f_hat(f_hat) * weights).sum().backward()
    torch.testing.assert_close(f.grad, f_hat.grad, atol=1e-5, rtol=1e-4)
    assert tokenizer.codebook.weight.grad is None               # codes learn from the vq loss alone


def test_the_vq_loss_moves_codes_to_f_and_f_a_quarter_as_much_to_codes(tokenizer):
    f = torch.randn(2, 4, 5, 5, requires_grad=True)
    tokenizer.features = lambda images: f
    _, vq_loss, _ = tokenizer(images_of(tokenizer))
    f_hats = [f_hat.detach() for f_hat in tokenizer.quantize(f)[1]]
    errors = [F.mse_loss(f_hat, f).item() for f_hat in f_hats]
    assert vq_loss.item() == pytest.approx(1.25 * np.mean(errors), rel=1e-5)
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
        met = [tokenizer.shrink(r, k).permute(0, 2, 3, 1).reshape(-1, 4) for k, r in enumerate(left)]
    tokenizer.revive_codes(dead, f)
    after = tokenizer.codebook.weight.detach()
    assert torch.equal(after[~dead], before[~dead])
    assert torch.cdist(after[dead], torch.cat(met)).amin(1).max() < 1e-5
    assert not torch.equal(after[dead], before[dead])


# ------------------------------------------------------------------------------------- the transformer
@pytest.mark.parametrize('unit_norm', [True, False])
def test_scale_k_cannot_see_scale_k_plus_1(unit_norm):
    model = small_var(unit_norm=unit_norm)
    inputs_BLC = torch.randn(1, 38, 4, requires_grad=True)
    logits = split_scales(model(torch.tensor([1]), inputs_BLC))
    for k in range(len(SCALES)):
        for place in range(logits[k].shape[1]):             # inputs stand at scales 2, 3, 4
            grad = torch.autograd.grad(logits[k][0, place].square().sum(), inputs_BLC, retain_graph=True)[0]
            seen = [part.abs().sum(-1) > 0 for part in grad.split([4, 9, 25], dim=1)]
            for scale, part in enumerate(seen, start=1):
                assert part.all() if scale <= k else not part.any(), f'scale {k} place {place}, {scale}'


@pytest.mark.parametrize('adaln', [True, False])
def test_in_raster_order_a_place_sees_all_tokens_before_it_and_no_other(adaln):
    model = small_var(order='raster', scales=(5,), adaln=adaln)
    inputs_BLC = torch.randn(1, 24, 4, requires_grad=True)
    logits = model(torch.tensor([1]), inputs_BLC)
    for place in range(25):                             # input i is the code of token i
        grad = torch.autograd.grad(logits[0, place].square().sum(), inputs_BLC, retain_graph=True)[0]
        assert ((grad[0].abs().sum(-1) > 0) == (torch.arange(24) < place)).all(), place


def test_without_adaln_the_class_is_the_first_token_alone_and_blocks_begin_as_gpt_2s():
    model = VAR(VARConfig(depth=2, num_classes=3, vocab_size=16, z_channels=4, scales=SCALES, adaln=False))
    a, b = (model.modulations(model.class_embedding(torch.tensor([label]))) for label in (0, 2))
    assert all(torch.equal(x, y) for one, other in zip(a, b) for x, y in zip(one, other))
    assert [x.unique().item() for x in [*a[0], *a[-1]]] == [1, 1, 0, 0, 0, 0] + [0, 0]
    x, block = torch.randn(1, 5, 128), model.blocks[0]
    h = x + block.attention(F.layer_norm(x, (128,), eps=1e-6), None, None, 0)
    h = h + block.fc2(F.gelu(block.fc1(F.layer_norm(h, (128,), eps=1e-6)), approximate='tanh'))
    torch.testing.assert_close(block(x, a[0]), h)
    model, inputs = small_var(adaln=False), torch.randn(1, 38, 4)       # the class is seen all the same,
    logits = [model(torch.tensor([label]), inputs) for label in (0, 2)]
    assert ((logits[0] - logits[1]).abs().amax((0, 2)) > 1e-4).all()
    model.class_embedding.weight.data[:] = 0.3
    logits = [model(torch.tensor([label]), inputs) for label in (0, 2)]     # and by nothing else
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match='^shared_adaln=True: without adaln there is none'):
        VARConfig(adaln=False, shared_adaln=True)


def test_a_label_is_hidden_where_the_first_number_of_its_noise_is_small():
    model = small_var(label_dropout=0.5, stochastic_depth=0.0)
    labels, inputs, noise = torch.zeros(64, dtype=torch.int64), torch.randn(1, 38, 4), torch.rand(64, 5)
    own, null = model(labels[:1], inputs)[0], model(labels[:1] + 3, inputs)[0]
    found, hidden = model(labels, inputs.expand(64, -1, -1), noise), noise[:, 0] < 0.5
    expected = torch.where(hidden[:, None, None], null, own)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    without = model.train()(labels, inputs.expand(64, -1, -1))          # train() makes no difference
    torch.testing.assert_close(without, own.expand(64, -1, -1), atol=1e-5, rtol=1e-5)


def test_stochastic_depth_rises_linearly_and_skips_the_branches_that_the_noise_names():
    assert [block.drop_rate for block in small_var(depth=3, stochastic_depth=0.4).blocks] == [0, 0.2, 0.4]
    assert small_var().blocks[-1].drop_rate == pytest.approx(0.1 * 2 / 24)
    model = small_var(label_dropout=0.0, stochastic_depth=0.4)
    block, class_BD = model.blocks[-1], torch.randn(4, 128)
    noise_B2 = torch.tensor([[0.3, 0.5], [0.5, 0.3], [0.3, 0.3], [0.5, 0.4]])
    for i, (plain, found) in enumerate(zip(block.modulation(class_BD, None, None),
                                           block.modulation(class_BD, None, noise_B2))):
        factor = (noise_B2[:, i] >= 0.4) / 0.6 if i < 2 else torch.ones(4)          # the two gates alone
        torch.testing.assert_close(found, plain * factor[:, None, None])
    labels, inputs, noise_BN = torch.zeros(1, dtype=torch.int64), torch.randn(1, 38, 4), torch.ones(1, 5)
    noise_BN[:, 3:] = 0.0                               # both branches of the second block are skipped
    found = model(labels, inputs, noise_BN)
    del model.blocks[1]
    torch.testing.assert_close(found, model(labels, inputs))


def test_initialisation_is_the_released_one():
    model = VAR(VARConfig(depth=4, num_classes=50, vocab_size=64, scales=(1, 2), adaln_gamma_init=1e-3))
    block, std = model.blocks[2], math.sqrt(1 / (3 * 256))
    gammas, others = block.adaln.weight.split([2 * 256, 4 * 256])
    for weight, expected in [(model.class_embedding.weight, 1), (block.fc1.weight, 1), (model.position, 1),
                             (model.head.weight, 0.02), (model.head_adaln.weight, 0.5), (gammas, 1e-3),
                             (others, 0.5), (block.fc2.weight, 8 ** -0.5),
                             (block.attention.proj.weight, 8 ** -0.5)]:
        assert weight.std().item() == pytest.approx(expected * std, rel=0.1)
    assert block.attention.log_scale.exp().flatten().tolist() == pytest.approx([4.0] * 4)


# -------------------------------------------------------------------------------------------- sampling
def logits_while_generating(var, tokenizer, labels, **options):
    """Conditional and unconditional logits that generate() saw, (B, L, V) each, and its tokens."""
    seen = []
    hook = var.head.register_forward_hook(lambda module, args, output: seen.append(output))
    _, tokens_BL = var.generate(tokenizer, labels, return_tokens=True, **options)
    hook.remove()
    conditional, *unconditional = torch.cat(seen, dim=1).split(len(labels))     # nothing for null at cfg 0
    return conditional, *unconditional, tokens_BL


@pytest.mark.parametrize('options', [
    dict(), dict(shared_adaln=True, unit_norm=False), dict(adaln=False), dict(order='raster', scales=(5,)),
    dict(order='raster', scales=(5,), adaln=False, unit_norm=False)])
def test_cached_generation_sees_the_logits_of_one_masked_forward_pass(options):
    var, labels = small_var(**options), torch.tensor([0, 2])
    tokenizer = small_tokenizer(var.config.scales)
    conditional, unconditional, tokens_BL = logits_while_generating(var, tokenizer, labels, cfg=3.0)
    inputs_BLC = tokenizer.teacher_inputs(tokens_BL)
    with torch.no_grad():
        # logits are about 1; float32 sums in another order differ by about 1e-6
        torch.testing.assert_close(conditional, var(labels, inputs_BLC), atol=1e-5, rtol=0)
        torch.testing.assert_close(unconditional, var(torch.tensor([3, 3]), inputs_BLC), atol=1e-5, rtol=0)


def test_guidance_rises_from_nothing_at_the_first_scale_to_cfg_at_the_last(tokenizer):
    var, labels = small_var(), torch.tensor([0, 1])
    conditional, unconditional, tokens_BL = logits_while_generating(var, tokenizer, labels, cfg=3.0, top_k=1)
    t_L = torch.cat([torch.full((side * side,), 3.0 * k / 3) for k, side in enumerate(SCALES)])[:, None]
    assert t_L[0] == 0 and t_L[-1] == 3
    assert torch.equal(tokens_BL, (conditional + t_L * (conditional - unconditional)).argmax(-1))
    assert not torch.equal(tokens_BL, conditional.argmax(-1))


def test_in_raster_order_guidance_is_the_same_throughout_and_kept_tokens_stay():
    var, tokenizer, noise = small_var(order='raster', scales=(5,)), small_tokenizer((5,)), torch.rand(2, 25)
    conditional, unconditional, tokens_BL = logits_while_generating(
        var, tokenizer, torch.tensor([0, 1]), cfg=3.0, top_k=5, top_p=0.9, noise_BL=noise)
    guided = conditional + 3 * (conditional - unconditional)
    assert torch.equal(tokens_BL, var_module.draw_tokens(guided, noise, 5, 0.9))
    how = dict(cfg=3.0, top_k=5, top_p=0.9, return_tokens=True)
    images, same = var.generate(tokenizer, torch.tensor([0, 1]), noise_BL=noise, **how)
    assert torch.equal(same, tokens_BL)
    torch.testing.assert_close(images, tokenizer.decode(tokens_BL))
    kept_BL = torch.where(torch.arange(25) < 10, tokens_BL, -1)
    _, others = var.generate(tokenizer, torch.tensor([0, 1]), noise_BL=1 - noise, kept_BL=kept_BL, **how)
    assert torch.equal(others[:, :10], tokens_BL[:, :10]) and not torch.equal(others, tokens_BL)


def test_cfg_0_and_the_null_class_are_not_guided(tokenizer):
    var, noise, labels = small_var(), torch.rand(2, 39), torch.tensor([0, 1])
    conditional, tokens_BL = logits_while_generating(var, tokenizer, labels, cfg=0.0, noise_BL=noise)
    assert torch.equal(tokens_BL, var_module.draw_tokens(conditional, noise, 900, 0.96))
    null = torch.tensor([3, 3])
    a, b = (logits_while_generating(var, tokenizer, null, cfg=cfg, noise_BL=noise)[-1] for cfg in (0.0, 4.0))
    assert torch.equal(a, b)


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
    slow = [slow_draw(row, u, top_k, top_p) for row, u in zip(logits[0].tolist(), noise[0].tolist())]
    assert var_module.draw_tokens(logits, noise, top_k, top_p)[0].tolist() == slow


def test_noise_at_the_steps_and_ends_of_the_cdf_draws_a_kept_token():
    quarters = torch.arange(4)[None] / 4                    # four equal tokens: a quarter draws each
    assert sorted(var_module.draw_tokens(torch.zeros(1, 4, 4), quarters, 0, 0.0)[0].tolist()) == [0, 1, 2, 3]
    logits = torch.tensor([[[0.0, 9.0, 8.0, -50.0]]])
    for top_k, top_p, last in [(2, 0.0, 2), (0, 0.99, 2), (1, 0.5, 1), (3, 0.0, 0)]:
        for noise, token in [(0.0, 1), (1.0, last)]:                    # 1: what rounding may make of 0.99...
            drawn = var_module.draw_tokens(logits, torch.tensor([[noise]]), top_k, top_p)
            assert drawn.item() == token


def test_the_same_noise_gives_the_same_image_in_any_batch(tokenizer):
    var, labels = small_var(), [0, 1, 2, 0, 1]
    runs = [[torch.cat(parts) for parts in zip(*sample.draw(tokenizer, var, labels, 7, batch_size))]
            for batch_size in (5, 2, 5)]
    assert torch.equal(runs[0][1], runs[1][1])                                  # tokens
    torch.testing.assert_close(runs[0][0], runs[1][0], atol=1e-5, rtol=0)       # images, up to rounding
    assert torch.equal(runs[0][0], runs[2][0])                                  # to the bit
    other = torch.cat([tokens for _, tokens in sample.draw(tokenizer, var.train(), labels, 8, 5)])
    assert not torch.equal(runs[0][1], other)
    again = [torch.cat(parts) for parts in zip(*sample.draw(tokenizer.train(), var, labels, 7, 5))]
    assert torch.equal(runs[0][0], again[0])                                    # in any mode


def test_under_autocast_logits_and_quantizer_stay_float32(tokenizer):
    var, labels = small_var(), torch.tensor([0, 1])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        tokens_BL = tokenizer.encode(images_of(tokenizer))
        inputs_BLC = tokenizer.teacher_inputs(tokens_BL)
        logits, images = var(labels, inputs_BLC), var.generate(tokenizer, labels)
    logits.sum().backward()
    assert inputs_BLC.dtype == logits.dtype == images.dtype == torch.float32
    assert torch.equal(inputs_BLC, tokenizer.teacher_inputs(tokens_BL))
    # bfloat16 was used (its 8 bits err by 0.4% at every step of the way) and is near: logits are about 1
    assert 0 < (logits - var(labels, inputs_BLC)).abs().max() < 0.3


def test_the_head_multiplies_in_the_autocast_type_and_is_near_its_float32_product():
    var, seen = small_var(), []
    var.head.register_forward_hook(lambda head, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        logits = var(torch.tensor([1]), torch.randn(1, 38, 4))
    x, product = seen[0]
    assert product.dtype == torch.bfloat16 and torch.equal(logits, product.float())
    # eight bits: two roundings of 0.4% each, of terms that add up to about 1
    exact = F.linear(x.float(), var.head.weight, var.head.bias)
    torch.testing.assert_close(logits, exact, atol=0.02, rtol=0.01)


def test_logits_that_are_no_numbers_are_refused_and_draw_some_token_all_the_same(tokenizer):
    var, labels = small_var(), torch.tensor([0, 1])
    with pytest.raises(FloatingPointError, match='logits are not finite at cfg=1e[+]39'):
        var.generate(tokenizer, labels, cfg=1e39)
    for broken, place in [(small_var(), 5), (small_var(order='raster', scales=(5,)), 17)]:
        broken.position.data[:, place] = math.nan
        with pytest.raises(FloatingPointError, match='logits are not finite'):
            broken.generate(small_tokenizer(broken.config.scales), labels)
    for logit, top_p in [(math.nan, 0.9), (math.inf, 0.9), (-math.inf, 0.9), (0.0, 1e-320)]:
        drawn = var_module.draw_tokens(torch.full((1, 3, 5), logit), torch.rand(1, 3), 4, top_p)
        assert drawn.shape == (1, 3) and 0 <= drawn.min() and drawn.max() < 5


def test_a_tokenizer_of_another_kind_is_refused_by_what_differs(tokenizer):
    for field, value, other in [('scales', (1, 2, 5), SCALES), ('vocab_size', 32, 16), ('z_channels', 8, 4)]:
        var = small_var(**{field: value})
        with pytest.raises(ValueError, match=re.escape(f'{field}: the transformer was made for {value}, but '
                                                       f'the tokenizer has {other}')):
            var.generate(tokenizer, torch.tensor([0]))
        if field != 'vocab_size':                               # which no input shows
            with pytest.raises(ValueError, match=r'inputs_BLC .*: must be .* for VARConfig\('):
                var(torch.tensor([0]), tokenizer.teacher_inputs(torch.zeros(1, 39, dtype=torch.int64)))


def test_the_headers_examples_run_as_they_stand(capsys):
    """That of var.py goes on from that of vqvae.py: the two models of the headers fit each other."""
    names = dict(torch=torch, VQVAE=VQVAE, VQVAEConfig=VQVAEConfig, VAR=VAR, VARConfig=VARConfig)
    for module in (vqvae_module, var_module):
        example = '\n'.join(re.findall(r'^    ([\w, ]+ = .*)$', module.__doc__, re.M))
        exec(example, names)
    assert names['tokens_BL'].shape == (2, 85) and names['logits_BLV'].shape == (2, 85, 256)
    assert names['images_B3HW'].shape == (2, 3, 32, 32)


# ------------------------------------------------------------------------------------ released weights
def recipe(shapes: dict) -> dict:
    """Weights that anyone can rebuild from their names: the recipe behind notebooks/parity.json."""
    weights = {}
    for key, shape in shapes.items():
        r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
        if key.endswith(('ema_vocab_hit_SV', 'lvl_1L', 'attn_bias_for_masking', 'zero_k_bias')):
            r = np.zeros(shape)
        elif key.endswith('scale_mul_1H11'):
            r = np.log(4) + 0.1 * r
        elif len(shape) >= 2:
            r = r / np.sqrt(np.prod(shape[1:]))
        else:
            r = 0.1 * r + ('norm' in key and key.endswith('weight'))
        weights[key] = torch.tensor(r, dtype=torch.float32)
    return weights


def released(case: str, device='cpu'):
    """Both models of a parity case, its images and the figures that the released code computes from them."""
    case = PARITY[case]
    scales = tuple(case['config']['patch_nums'])
    tokenizer = VQVAE.from_official(recipe(case['vqvae_keys']), scales).eval().to(device)
    var = VAR.from_official(recipe(case['var_keys']), scales).eval().to(device)
    r = np.random.RandomState(zlib.crc32(b'image')).standard_normal((2, 3, 2 * scales[-1], 2 * scales[-1]))
    images = torch.tensor(np.tanh(r).repeat(8, 2).repeat(8, 3), dtype=torch.float32, device=device)
    return tokenizer, var, images, dict(case['expected'])


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs a CUDA GPU'))])
@pytest.mark.parametrize('case', PARITY)
@torch.no_grad()
def test_the_authors_weights_give_the_authors_numbers(case, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    tokenizer, var, images, expected = released(case, device)
    c = PARITY[case]['config']                              # all but the scales was read off the shapes
    V, C, scales = c['vocab_size'], c['z_channels'], tuple(c['patch_nums'])
    mults = (1, 1, 2, 2, 4)
    assert tokenizer.config == VQVAEConfig(16 * scales[-1], 1, c['ch'], mults, 2, True, C, V, scales)
    assert var.config == VARConfig(c['depth'], c['num_classes'], V, C, scales, True, c['shared_aln'])
    f, tokens_BL = tokenizer.features(images), tokenizer.encode(images)
    assert tokens_BL.tolist() == expected.pop('tokens')
    f_hat, inputs_BLC = tokenizer.f_hats(tokens_BL)[-1], tokenizer.teacher_inputs(tokens_BL)
    logits = var(torch.tensor([1, var.config.num_classes], device=device), inputs_BLC)
    greedy = var.generate(tokenizer, torch.tensor([1, 2], device=device), cfg=1.5, top_k=1) / 2 + 0.5
    ours = {
        'encoder_0_0': f[0, 0].flatten()[:8], 'f_hat_last_1_0': f_hat[1, 0].flatten()[:8],
        'reconstruction_0': tokenizer.decode(tokens_BL)[0, :, 5, 7], 'var_input_0_last': inputs_BLC[0, -1],
        'logits_first': logits[0, 0, :8], 'logits_last': logits[1, -1, :8],
        'logits_mean_abs': logits.abs().mean(),
        'cross_entropy': F.cross_entropy(logits.flatten(0, 1), tokens_BL.flatten()),
        'greedy_cfg1.5_image_mean': greedy.mean((1, 2, 3)), 'greedy_cfg1.5_pixel': greedy[1, :, 9, 11]}
    assert ours.keys() == expected.keys()
    gaps = {name: (ours[name].cpu() - torch.tensor(expected[name])).abs().max().item() for name in ours}
    print(case, gaps)
    assert max(gaps.values()) <= 1e-4


@pytest.mark.parametrize('case', PARITY)
@pytest.mark.parametrize('edit', ['inpaint', 'outpaint'])
@torch.no_grad()
def test_an_edit_of_an_image_is_the_authors_demos(case, edit):
    """Tokens equal, images to 1e-4."""
    tokenizer, var, images, _ = released(case)
    expected, H = PARITY[case]['edit'][edit], var.config.scales[-1]
    y0, x0, y1, x1 = (round(edge * H) for edge in expected['box_y0_x0_y1_x1'])
    keep_BHW = torch.full((2, H, H), edit == 'inpaint')
    keep_BHW[:, y0:y1, x0:x1] ^= True
    kept_BL = tokenizer.keep(tokenizer.encode(images), keep_BHW)
    drawn, tokens_BL = var.generate(tokenizer, torch.tensor(expected['labels']), expected['cfg'], top_k=1,
                                    kept_BL=kept_BL, return_tokens=True)
    assert tokens_BL.tolist() == expected['tokens']
    drawn, middle = drawn / 2 + 0.5, drawn.shape[-1] // 2
    for ours, name in [(drawn.mean((1, 2, 3)), 'image_mean'), (drawn[0, :, 9, 11], 'pixel_0_r9_c11'),
                       (drawn[1, :, middle, middle], 'pixel_1_centre'), (drawn[0, 0, middle, ::4], 'row_0')]:
        torch.testing.assert_close(ours, torch.tensor(expected[name]), atol=1e-4, rtol=0)


@pytest.mark.parametrize('case', PARITY)
def test_a_training_step_is_the_released_trainers(case):
    """Loss, gradients, their norm before clipping, and weights after a step of AdamW; nothing dropped."""
    tokenizer, var, images, _ = released(case)
    step, labels = PARITY[case]['training_step'], torch.tensor([1, var.config.num_classes])
    optimizer = torch.optim.AdamW(train.parameter_groups(var, 0.05), lr=1e-3, betas=(0.9, 0.95))
    loss_BL, _ = train.transformer_loss(var, tokenizer, images, labels, noise_BN=None)
    loss_BL.mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(var.parameters(), 2.0)
    assert loss_BL.mean().item() == pytest.approx(step['loss'], rel=1e-5)
    assert norm.item() == pytest.approx(step['gradient_norm'], rel=1e-5)

    def weight_of(name):
        for theirs, ours in var_module.RELEASED_NAMES:
            name = name.replace(theirs, ours)
        return var.get_parameter(name)

    def some(tensor):
        return tensor.detach().flatten()[::max(1, tensor.numel() // 6)][:6]
    for name, values in step['gradients'].items():      # the largest are about 0.1
        torch.testing.assert_close(some(weight_of(name).grad), torch.tensor(values), atol=1e-6, rtol=1e-4)
    optimizer.step()
    for name, values in step['weights'].items():        # a step moves each by about 1e-3
        torch.testing.assert_close(some(weight_of(name)), torch.tensor(values), atol=1e-5, rtol=0)


@pytest.mark.parametrize('model, change, words', [
    (VAR, lambda w: w.pop('blocks.1.ffn.fc1.bias'), 'Missing key(s) in state_dict: "blocks.1.fc1.bias"'),
    (VAR, lambda w: w.pop('head.weight'), 'head.weight'),
    (VAR, lambda w: w.update({'blocks.0.ada_gss': w['head.bias']}), 'Unexpected key(s)'),
    (VAR, lambda w: w.update({'pos_1LC': w['pos_1LC'][:, :-1]}), 'size mismatch for position'),
    (VQVAE, lambda w: w.pop('decoder.up.4.attn.2.qkv.weight'), 'decoder.up_4_attn_2.qkv.weight'),
    (VQVAE, lambda w: w.pop('quantize.embedding.weight'), 'codebook.weight'),
    (VQVAE, lambda w: w.update({'quant_conv.extra': w['quant_conv.bias']}), 'quant_conv.extra'),
    (VQVAE, lambda w: w.update({'post_quant_conv.bias': torch.zeros(9)}), 'size mismatch for post_quant')])
def test_a_state_dict_that_does_not_fit_is_refused_in_one_line_that_says_where(model, change, words):
    weights = recipe(PARITY['adaln']['var_keys' if model is VAR else 'vqvae_keys'])
    change(weights)
    with pytest.raises(ValueError, match='^no released VAR t.*' + re.escape(words)) as refusal:
        model.from_official(weights, (1, 2, 3, 4))
    assert '\n' not in str(refusal.value)


@pytest.mark.parametrize('model, part', [(VAR, 'var_wo_ddp'), (VQVAE, 'vae_local')])
def test_wrapped_weights_are_refused_by_what_to_take_out(model, part):
    weights = recipe(PARITY['adaln']['var_keys' if model is VAR else 'vqvae_keys'])
    prefixed = ({prefix + key: weight for key, weight in weights.items()}
                for prefix in ('module.', '_orig_mod.'))
    for wrapped in (*prefixed, {'trainer': {part: weights}}):
        with pytest.raises(ValueError, match=rf"take \['trainer'\]\['{part}'\], with no module\. or _orig"):
            model.from_official(wrapped, (1, 2, 3, 4))


# ------------------------------------------------------------------------------------------------ data
def test_drawings_follow_from_the_seed_and_differ_between_seeds():
    images, labels = train.draw_shapes(40, seed=5, size=24)
    assert images.shape == (40, 3, 24, 24) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [4] * 10
    assert torch.equal(images, train.draw_shapes(40, seed=5, size=24)[0])
    both = torch.cat([images, train.draw_shapes(40, seed=6, size=24)[0]])
    assert len({image.numpy().tobytes() for image in both}) == 80


def write_cifar(folder: Path, content: bytes) -> Path:
    (folder / 'cifar-10-batches-bin').mkdir(parents=True)
    for name in train.CIFAR10_FILES:
        (folder / 'cifar-10-batches-bin' / name).write_bytes(content)
    return folder


def test_cifar10_is_read_as_its_format_says(tmp_path):
    records = np.random.RandomState(0).randint(0, 256, (10_000, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    folder = write_cifar(tmp_path, records.tobytes())
    images, labels, test_images, test_labels = train.read_cifar10(str(folder))
    assert images.shape == (50_000, 3, 32, 32) and test_images.shape == (10_000, 3, 32, 32)
    assert labels[7] == records[7, 0] and labels[40_007] == records[7, 0] and test_labels[7] == records[7, 0]
    assert images[7, 1, 2, 3] == records[7, 1 + 1024 + 2 * 32 + 3]           # green, row 2, column 3
    assert torch.equal(train.read_cifar10(str(folder / 'cifar-10-batches-bin'))[0], images)
    args, _ = train.parse(f'--preset cifar10-cpu --data-dir {folder} --train-count 500 --no-flip'.split())
    data = train.load_data(args, 32, torch.device('cpu'))
    _, numbers, _ = data.in_step(3, 10)
    batch, batch_labels = data.batch(3, 10)
    assert torch.equal(batch, train.to_float(images[numbers])) and torch.equal(batch_labels, labels[numbers])
    assert (data.count, data.val_count) == (500, 2000)
    shutil.rmtree(folder)


def test_a_download_is_whole_or_not_at_all(tmp_path, capfd):
    archive, data = tmp_path / 'archive.tar.gz', tmp_path / 'data'
    with tarfile.open(archive, 'w:gz') as tar:
        tar.add(HERE / 'LICENSE', 'cifar-10-batches-bin/test_batch.bin')
    whole = archive.read_bytes()
    url, md5 = archive.as_uri(), hashlib.md5(whole).hexdigest()
    archive.write_bytes(whole[:-9])                                 # broken off
    for url_then, words in [(url, 'md5'), (url + '.gone', '--data-dir'), ('nothing://there', '--data-dir')]:
        with pytest.raises(sample.UserError, match=words):
            train.download_cifar10(data, url_then, md5)
        assert not list(data.iterdir())
    archive.write_bytes(whole)
    train.download_cifar10(data, url, md5)
    assert (data / 'cifar-10-batches-bin/test_batch.bin').read_bytes() == (HERE / 'LICENSE').read_bytes()
    assert len(list(data.iterdir())) == 1


def test_augmentation_mirrors_half_and_shifts_within_the_crop():
    images, found = torch.rand(64, 3, 8, 8), set()
    padded = F.pad(images, (1, 1, 1, 1), mode='replicate')
    noise = torch.rand(64, 3)
    for image, source in zip(train.augment(images, noise, flip=True, crop=1), padded):
        found |= {(turned, y, x) for turned in (False, True) for y in range(3) for x in range(3)
                  if image.equal(source[:, y:y + 8, x:x + 8].flip([-1] * turned))}
    assert len(found) > 14                                      # of 18: mirrored or not, 3x3 shifts
    assert train.augment(images, noise, flip=False, crop=0) is images


def write_images(folder: Path, count: int, size=(40, 30), classes=('bird', 'cat', 'dog'), mode='RGB'):
    """train/<class>/<i>.png, smooth and all different."""
    for i in range(count):
        noise = np.random.RandomState(i).randint(0, 256, (4, 5, 3), dtype=np.uint8)
        path = folder / 'train' / classes[i % len(classes)] / f'{i:04d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).resize(size, Image.BICUBIC).convert(mode).save(path)
    return folder


def folder_data(folder: Path, flags='') -> train.FolderData:
    args, _ = train.parse(f'--data-dir {folder} {flags}'.split())
    return train.FolderData(args, 16, torch.device('cpu'))


@pytest.mark.parametrize('w, h', [(200, 150), (150, 201), (97, 97), (20, 30)])
def test_a_crop_is_what_resizing_the_whole_image_and_cutting_gives(w, h, tmp_path):
    noise = np.random.RandomState(0).randint(0, 256, (h // 4, w // 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((w, h), Image.BICUBIC).save(tmp_path / 'a.png')
    size, shorter = 64, 72
    W, H = (shorter, int(72 * h / w)) if w <= h else (int(72 * w / h), shorter)
    whole = np.asarray(Image.open(tmp_path / 'a.png').resize((W, H), Image.LANCZOS), np.int16)
    random = np.random.default_rng(3)
    x, y = int(random.integers(W - size + 1)), int(random.integers(H - size + 1))
    middle = (None, round((W - size) / 2), round((H - size) / 2))
    for random, x, y in [(np.random.default_rng(3), x, y), middle]:
        cut = train.read_image(tmp_path / 'a.png', size, random)
        gap = np.abs(cut - whole[y:y + size, x:x + size])
        assert cut.shape == (64, 64, 3) and gap.max() <= 1                  # rounded to whole levels


def test_a_large_jpeg_is_decoded_smaller_and_grey_becomes_rgb(tmp_path):
    noise = np.random.RandomState(0).randint(0, 256, (30, 40), dtype=np.uint8)
    image = Image.fromarray(noise).resize((640, 480), Image.BICUBIC)
    image.save(tmp_path / 'a.jpg', quality=95)
    image.save(tmp_path / 'a.png')
    jpeg, png = (train.read_image(tmp_path / name, 64).astype(int) for name in ('a.jpg', 'a.png'))
    assert np.abs(jpeg - png).mean() < 1 and (png[..., 0] == png[..., 2]).all()


def test_classes_come_from_the_folders_and_a_tenth_is_held_out(tmp_path, capsys):
    data = folder_data(write_images(tmp_path, 60))
    assert data.class_names == ['bird', 'cat', 'dog'] and (data.count, data.val_count) == (54, 6)
    assert '6 of 60 images are held out' in capsys.readouterr().out
    assert not set(data.train) & set(data.val) and len(set(data.train) | set(data.val)) == 60
    assert all(Path(path).parent.name == class_name for path, class_name in data.train + data.val)
    same, other = folder_data(tmp_path), folder_data(tmp_path, '--seed 1')
    assert data.fingerprint == same.fingerprint != other.fingerprint
    shutil.copytree(tmp_path / 'train/cat', tmp_path / 'val/cat')
    shutil.copytree(tmp_path / 'train/cat', tmp_path / 'val/owl')
    data = folder_data(tmp_path, '--val-count 7 --train-count 50')
    assert data.class_names == ['bird', 'cat', 'dog', 'owl'] and (data.count, data.val_count) == (50, 7)
    assert '1 of 4 classes have no images to train on (owl)' in capsys.readouterr().out


def test_a_batch_of_a_folder_follows_from_its_step_alone(tmp_path):
    folder = write_images(tmp_path, 30)
    data, late = (folder_data(folder, f'--flip --workers {workers}') for workers in (1, 2))
    batches = [data.batch(step, 4) for step in range(14)]           # 27 to train on: 6 steps an epoch
    for step in (9, 10, 3):
        assert all(torch.equal(a, b) for a, b in zip(late.batch(step, 4), batches[step]))
    assert late.batch(3, 2)[0].shape == (2, 3, 16, 16)              # another stage, another batch
    assert batches[0][0].shape == (4, 3, 16, 16) and -1 <= batches[0][0].min() < batches[0][0].max() <= 1
    seen = [torch.cat([data.in_step(step, 4)[1] for step in range(e, e + 6)]).tolist() for e in (0, 6)]
    assert len(set(seen[0])) == 24 and seen[0] != seen[1]
    crops = {data.read(epoch, 5)[0].tobytes() for epoch in range(20)}
    assert len(crops) > 10 and len({data.read(-1, 2)[0].tobytes() for _ in range(3)}) == 1
    images, labels = (torch.cat(parts) for parts in zip(*data.val_batches(2)))
    assert len(images) == 3 and torch.equal(images, next(data.val_batches(9))[0])
    assert [data.class_names[label] for label in labels] == [class_name for _, class_name in data.val]


def test_broken_images_are_named_and_left_out_until_they_are_too_many(tmp_path, capfd):
    folder = write_images(tmp_path, 200)
    (folder / 'train/bird/0000.png').write_bytes(b'no image')
    good = (folder / 'train/cat/0001.png').read_bytes()
    (folder / 'train/cat/0001.png').write_bytes(good[:len(good) // 2])
    data = folder_data(folder)
    for step in range(6):
        assert data.batch(step, 60)[0].amax((1, 2, 3)).min() > -0.5     # a neighbour, no black square
    list(data.val_batches(10))
    named = sorted(line for line in capfd.readouterr().err.splitlines() if 'broken' in line)
    assert len(named) == 2 and 'bird/0000.png' in named[0] and 'cat/0001.png' in named[1]
    with pytest.raises(sample.UserError, match='all 1 images'):         # too few to be more than 1%
        alone = folder_data(folder)
        alone.train = [(f'{folder}/train/bird/0000.png', 'bird')]
        alone.read(0, 0)
    (folder / 'train/dog/0002.png').write_bytes(b'')
    with pytest.raises(sample.UserError, match='3 of 200 images are broken'):
        for step in range(6, 12):
            data.batch(step, 60)
        list(data.val_batches(10))


# -------------------------------------------------------------------------------------------- training
TINY = ('--train-count 64 --val-count 32 --batch-size 8 --channels 32 --z-channels 4 --vocab-size 16 '
        '--scales 1 2 8 --depth 1 --device cpu --vqvae-steps 4 --var-steps 4 --log-every-steps 1 '
        '--save-every-steps 2 --vqvae-lr 0.032 --var-lr 0.016 --adaln-gamma-init 0.1 ')


def run(flags: str, out: Path) -> Path:
    train.main((TINY + flags).split() + ['--out', str(out)])
    return out


def resume(out: Path, flags='') -> Path:
    train.main(['--resume', *flags.split(), '--out', str(out)])
    return out


@pytest.fixture(scope='module')
def tiny_run(tmp_path_factory):
    return run('', tmp_path_factory.mktemp('runs') / 'run')


def same_weights(a: Path, b: Path, stage: str) -> bool:
    a, b = (torch.load(path, weights_only=True)[stage] for path in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def curve(out: Path, stage: str, split='train val') -> list[dict]:
    rows = csv.DictReader((out / f'{stage}.csv').open())
    return [{name: value for name, value in row.items() if not name.endswith('_per_s')} for row in rows
            if row['split'] in split.split()]


def same_run(a: Path, b: Path) -> bool:
    """Both stages ended with the same weights to the bit, and with the same curves."""
    return all(same_weights(a / f'{stage}.pt', b / f'{stage}.pt', stage)
               and curve(a, stage) == curve(b, stage) for stage in ('vqvae', 'var'))


def test_a_run_leaves_models_logs_and_images(tiny_run):
    assert {path.name for path in tiny_run.iterdir()} == {
        'vqvae.pt', 'var.pt', 'last.pt', 'previous.pt', 'vqvae.csv', 'var.csv', 'reconstructions.png',
        'samples.png'}
    assert Image.open(tiny_run / 'reconstructions.png').size == (2 * (16 * 34 - 2), 2 * (4 * 34 - 2))
    assert Image.open(tiny_run / 'samples.png').size == (2 * (10 * 34 - 2), 2 * (8 * 34 - 2))
    rows = curve(tiny_run, 'var')
    assert ' '.join(row['step'] + row['split'] for row in rows) == '1train 2train 2val 3train 4train 4val'
    for row in rows:
        by_scale = [float(row[f'loss_{scale}']) for scale in ('1x1', '2x2', '8x8')]
        assert float(row['loss']) == pytest.approx(np.average(by_scale, weights=[1, 4, 64]), rel=1e-4)
    tokenizer, var, defaults = sample.load(tiny_run / 'var.pt')
    assert var.class_names == list(train.FIGURES) and set(defaults) == {'cfg', 'top_k', 'top_p'}
    assert var.generate(tokenizer, torch.tensor([0, 10]), **defaults).shape == (2, 3, 32, 32)


def test_one_map_in_raster_order_is_trained_cached_kept_resumed_and_drawn(tmp_path):
    flags = '--order raster --scales 8 --no-adaln --flip --keep-models '
    plain, cached = (run(f'{flags} --{no}cache-tokens', tmp_path / f'{no}cached') for no in ('', 'no-'))
    assert curve(plain, 'var') == curve(cached, 'var') and len(curve(plain, 'var', 'val')) == 2
    assert {path.name for path in plain.glob('var*.pt')} == {'var.pt', 'var-2.pt', 'var-4.pt'}
    assert same_weights(plain / 'var.pt', plain / 'var-4.pt', 'var')            # the later one is the better
    assert not same_weights(plain / 'var-2.pt', plain / 'var-4.pt', 'var')
    out = shutil.copytree(plain, tmp_path / 'resumed')
    shutil.copy(out / 'previous.pt', out / 'last.pt')
    os.remove(out / 'var-4.pt')
    assert same_run(resume(out), plain) and (out / 'var-4.pt').exists()
    sample.main([str(out / 'var.pt'), '--count', '3', '--out', str(tmp_path / 'a.png')])
    assert Image.open(tmp_path / 'a.png').size == (2 * (3 * 34 - 2), 2 * (1 * 34 - 2))
    (out / 'var-small.pt').write_bytes(b'')                                 # of the user's
    run('--overwrite --stage var --order raster --scales 8', out)
    assert {path.name for path in out.glob('var*.pt')} == {'var.pt', 'var-small.pt'}    # no others
    assert not (out / 'tokens.bin').exists()
    # its scales go without saying
    own = f'--stage var --order raster --tokenizer {plain}/vqvae.pt --depth 1 --var-steps 1 --train-count 16 '
    train.main((own + f'--val-count 4 --device cpu --out {tmp_path}/own').split())
    with pytest.raises(sample.UserError, match='--order scale: .* one map goes with --order raster'):
        train.main(['--stage', 'var', '--out', str(out), '--overwrite'])


def test_a_resumed_run_ends_with_the_weights_of_one_that_never_stopped(tiny_run, tmp_path):
    out = shutil.copytree(tiny_run, tmp_path / 'run')
    (out / 'last.pt').write_bytes((out / 'last.pt').read_bytes()[:1000])    # torn: previous.pt serves, step 2
    os.remove(out / 'var.pt')
    resume(out, '--seed 0 --stage both')                                    # no other than it had
    assert same_run(out, tiny_run)


def test_muon_moves_the_matrices_of_blocks_and_is_resumed(tiny_run, tmp_path):      # noqa: F811
    whole = run('--var-optimizer muon', tmp_path / 'whole')
    assert same_weights(whole / 'vqvae.pt', tiny_run / 'vqvae.pt', 'vqvae')     # stage 1 knows nothing of it
    assert not same_weights(whole / 'var.pt', tiny_run / 'var.pt', 'var')
    out = shutil.copytree(whole, tmp_path / 'run')
    os.remove(out / 'last.pt')
    assert same_run(resume(out), whole)
    args, _ = train.parse((TINY + '--var-optimizer muon --depth 2').split())
    var = VAR(train.make(VARConfig, args))
    shell = SimpleNamespace(args=args, data=SimpleNamespace(count=64), device=torch.device('cpu'))
    stage = train.Stage(shell, 'var', var)
    names = {id(weight): name for name, weight in var.named_parameters()}
    moved = {kind: [names[id(weight)] for group in optimizer.param_groups for weight in group['params']]
             for kind, optimizer in stage.optimizers.items()}
    assert sorted(moved['muon'] + moved['model']) == sorted(names.values())
    stage.args.last_weight_decay, stage.step = 0.01, stage.total - 1
    stage.set_schedule()
    assert {kind: [group['weight_decay'] for group in optimizer.param_groups]
            for kind, optimizer in stage.optimizers.items()} == dict(muon=[0.01], model=[0.01, 0.0])
    assert set(moved['muon']) == {name for name, weight in var.named_parameters()
                                  if name.startswith('blocks.') and weight.ndim == 2}


def test_stages_trained_one_by_one_from_the_same_seed_give_the_same_weights(tiny_run, tmp_path):
    out = run('--stage vqvae', tmp_path / 'a')
    assert not (out / 'var.pt').exists() and same_weights(out / 'vqvae.pt', tiny_run / 'vqvae.pt', 'vqvae')
    run('--stage var', out)
    assert same_weights(out / 'var.pt', tiny_run / 'var.pt', 'var')
    run(f'--stage var --tokenizer {out}/var.pt --seed 1', tmp_path / 'b')
    assert same_weights(tmp_path / 'b/var.pt', out / 'vqvae.pt', 'vqvae')       # left alone by stage 2
    assert not same_weights(tmp_path / 'b/var.pt', out / 'var.pt', 'var')


def test_stage_2_takes_the_authors_tokenizer(tmp_path):
    torch.save(recipe(PARITY['adaln']['vqvae_keys']), tmp_path / 'vae.pth')
    flags = f'--stage var --tokenizer {tmp_path}/vae.pth --out {tmp_path}/out '
    train.main((flags + '--scales 1 2 3 4 --depth 1 --var-steps 1 --train-count 16 --val-count 4 '
                '--batch-size 4 --device cpu').split())
    tokenizer, var, _ = sample.load(tmp_path / 'out/var.pt')
    assert tokenizer.config.image_size == 64 and var.config.vocab_size == 64
    # where the preset knows the released pyramid, nobody has to say it; where it doesn't, nothing is assumed
    args, _ = train.parse([*flags.split(), '--preset', 'imagenet256'])
    tokenizer = train.tokenizer_for_stage_2(args, tmp_path, None)
    assert len(tokenizer.config.scales) == 10 and tokenizer.config.image_size == 256
    with pytest.raises(sample.UserError, match='say its --scales'):
        train.tokenizer_for_stage_2(train.parse(flags.split())[0], tmp_path, None)


# --- from tokens
def test_a_cache_of_tokens_changes_nothing_but_speed(tmp_path):
    """Both views of --flip are met: losses in training and held out are those from images to 1e-5."""
    out = run('--stage vqvae', tmp_path / 'tokenizer')
    flags = f'--stage var --tokenizer {out}/vqvae.pt --flip --var-steps 20 --save-every-steps 10 '
    slow, fast = (run(flags + flag, tmp_path / flag) for flag in ('--no-cache-tokens', '--cache-tokens'))
    rows = np.memmap(fast / 'tokens.bin', '<u2', 'r').reshape(2 * 64 + 32, 1 + 69) - 1
    images, labels = train.draw_shapes(64, 0)
    tokenizer = train.load_tokenizer(out / 'vqvae.pt', None)
    for view, seen in enumerate((images, images.flip(-1))):
        tokens = rows[64 * view:64 * (view + 1)]
        assert (tokens[:, 0] == labels.numpy()).all()
        assert (tokens[:, 1:] == tokenizer.encode(sample.to_float(seen)).numpy()).mean() > 0.999   # but ties
    gaps = np.abs(losses(slow, 'var') - losses(fast, 'var'))
    assert len(gaps) == 24 and gaps.max() <= 1e-5 and not (slow / 'tokens.bin').exists()
    by_itself = run(flags.replace('--var-steps 20', '--var-steps 16'), tmp_path / 'by-itself')
    assert (by_itself / 'tokens.bin').read_bytes() == (fast / 'tokens.bin').read_bytes()


@pytest.mark.parametrize('kind', ['drawn', 'folder'])
def test_random_crops_are_cached_for_some_passes_and_come_again(kind, tmp_path):
    flags = TINY + '--cache-tokens --crop 3 --flip --cache-passes 2 --train-count 20 --batch-size 5 '
    if kind == 'folder':
        flags += f'--data-dir {write_images(tmp_path, 30)} --val-count 3 '
    args, _ = train.parse(flags.split())
    data, fresh = (train.load_data(args, 32, torch.device('cpu')) for _ in range(2))
    tokenizer = VQVAE(train.make(VQVAEConfig, args))
    stage = SimpleNamespace(args=args, micro_batch_size=64, agree=lambda: None, is_stop=False,
                            run=SimpleNamespace(data=data, out=tmp_path, device=torch.device('cpu')))
    cached = train.TokenData(stage, tokenizer)
    for step in range(8):                                           # four an epoch
        images, labels = fresh.batch(step, 5)
        tokens_BL, its_labels = cached.batch(step, 5)
        assert torch.equal(its_labels, labels) and torch.equal(tokens_BL, tokenizer.encode(images))
    first, third = ({row.numpy().tobytes() for step in range(start, start + 4)
                     for row in cached.batch(step, 5)[0]} for start in (0, 8))
    assert first == third and not torch.equal(cached.batch(0, 5)[0], cached.batch(8, 5)[0])     # reordered
    for (tokens_BL, labels), (images, its_labels) in zip(cached.val_batches(2), fresh.val_batches(2)):
        assert torch.equal(labels, its_labels) and torch.equal(tokens_BL, tokenizer.encode(images))


CACHED = '--stage var --cache-tokens --train-count 300 --var-steps 2 '


@pytest.fixture(scope='module')
def cached_run(tmp_path_factory):
    return run(CACHED, run('--stage vqvae', tmp_path_factory.mktemp('cached') / 'run'))


def test_a_cache_that_was_not_finished_is(cached_run, tmp_path):
    """And what is there already is not written again."""
    out = shutil.copytree(cached_run, tmp_path / 'run')
    whole = bytearray((cached_run / 'tokens.bin').read_bytes())
    for row in (3, 70, 310):                    # in training batches 0 and 1, and a held-out one
        whole[140 * row:140 * row + 40] = bytes(40)
    (out / 'tokens.bin').write_bytes(whole)
    written, load = [], train.ArrayData.load
    shutil.copy(out / 'previous.pt', out / 'last.pt')               # as before the first step
    (out / 'var.pt').unlink()

    def noted(data, batches):
        batches = list(batches)
        written.extend(view for view, _ in batches)
        return load(data, batches)
    train.ArrayData.load = noted
    try:
        resume(out)
    finally:
        train.ArrayData.load = load
    assert (out / 'tokens.bin').read_bytes() == (cached_run / 'tokens.bin').read_bytes()
    assert written[:3] == [0, 0, -1] and same_weights(out / 'var.pt', cached_run / 'var.pt', 'var')


@pytest.mark.parametrize('damage, words', [
    ('cut', 'tokens.bin: torn, has 1000 bytes instead of 46480; remove it'),
    ('other tokenizer', 'tokens.bin: holds tokens of another tokenizer; remove it'),
    ('other settings', 'tokens.bin: holds tokens of another images, scales; remove it'),
    ('a token too high', 'tokens.bin: damaged, holds tokens or labels that there are none of'),
    ('a label too high', 'tokens.bin: damaged, holds tokens or labels that there are none of')])
def test_another_or_a_damaged_cache_is_named(damage, words, cached_run, tmp_path, capsys, monkeypatch):
    out = shutil.copytree(cached_run, tmp_path / 'run')
    content, note = bytearray((out / 'tokens.bin').read_bytes()), (out / 'tokens.txt').read_text()
    shutil.copy(out / 'previous.pt', out / 'last.pt')               # as before the first step
    edits = {'other tokenizer': (r'tokenizer \d+', 'tokenizer 1'),
             'other settings': (r'images .*((.|\n)*)scales .*', r'images 1\1scales (1, 3, 8)')}
    (out / 'tokens.txt').write_text(re.sub(*edits.get(damage, ('', '')), note))
    content[142 if 'token' in damage else 140] = 200
    if 'high' in damage or damage == 'cut':
        (out / 'tokens.bin').write_bytes(content[:1000 if damage == 'cut' else None])
    held = {path: path.read_bytes() for path in out.iterdir() if path.name[:4] in ('toke', 'var.', 'vqva')}
    assert words in complaint(train.main, ['--resume', '--out', out], capsys, monkeypatch)
    assert all(path.read_bytes() == content for path, content in held.items())
    run(CACHED + '--overwrite', out)                                # replaces it
    assert (out / 'tokens.bin').read_bytes() == (cached_run / 'tokens.bin').read_bytes()


def test_a_cache_too_large_for_the_disk_is_not_begun(cached_run, tmp_path, capsys, monkeypatch):
    out = shutil.copytree(cached_run, tmp_path / 'run')
    free = shutil.disk_usage(out).free
    flags = [*TINY.split(), *CACHED.split(), '--crop', 1, '--cache-passes', 2 * free // (300 * 140)]
    error = complaint(train.main, [*flags, '--overwrite', '--out', out], capsys, monkeypatch)
    assert re.search('--cache-tokens: .*tokens.bin takes .* GiB, but only .* are free; say fewer', error)
    assert not (out / 'tokens.txt').exists()
    flags = [*TINY.split(), *CACHED.split(), '--vocab-size', 70_000, '--stage', 'both', '--overwrite']
    error = complaint(train.main, [*flags, '--out', out], capsys, monkeypatch)
    assert 'more codes or classes than 16 bits' in error and '--no-cache-tokens' in error


@pytest.mark.slow
def test_two_processes_write_the_cache_that_one_writes_and_stop_while_they_do(cached_run, tmp_path):
    flags = TINY + CACHED + f'--tokenizer {cached_run}/vqvae.pt '
    two = finish(start(flags, tmp_path / 'two', 2), tmp_path / 'two')
    assert (two / 'tokens.bin').read_bytes() == (cached_run / 'tokens.bin').read_bytes()
    many = flags.replace('--train-count 300', '--train-count 12000')
    whole = finish(start(many, tmp_path / 'whole'), tmp_path / 'whole')
    out = finish(start(many + '--stop-after-minutes 0.0001', tmp_path / 'part', 2), tmp_path / 'part')
    assert 'stopped at step 0 of 2 of var, all saved' in said(out)
    assert 0 in np.memmap(out / 'tokens.bin', '<u2', 'r') and not (out / 'var.pt').exists()
    finish(start('--resume', out), out)
    assert (out / 'tokens.bin').read_bytes() == (whole / 'tokens.bin').read_bytes()
    assert same_weights(out / 'var.pt', whole / 'var.pt', 'var')


# --- speed
@pytest.mark.parametrize('mask', [None, 'block-causal'])
def test_attention_spelled_out_is_that_of_torch(mask):
    q, k, v = torch.randn(3, 2, 3, 39, 64).bfloat16().requires_grad_()
    mask_LL = small_var().mask_LL if mask else None
    for scale in (0.2, 2.0):                    # scores up to 60
        ours = var_module.attend(q, k, v, mask_LL, scale)
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask_LL, scale=scale)
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), exact, atol=0.03, rtol=0)     # 2^-8 of values up to 4


def test_bfloat16_logits_are_near_float32_and_choose_the_same_tokens():
    tokenizer, var, defaults = sample.load(HERE / 'notebooks/cifar10.pt')
    labels = torch.arange(400) % 10
    with torch.no_grad():
        _, tokens_BL = var.generate(tokenizer, labels, **defaults, return_tokens=True)
        inputs_BLC = tokenizer.teacher_inputs(tokens_BL)
        exact = var(labels, inputs_BLC)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            logits_BLV = var(labels, inputs_BLC)
    error, same = (logits_BLV - exact).norm() / exact.norm(), logits_BLV.argmax(-1) == exact.argmax(-1)
    print(f'bfloat16: relative error {error:.1e}, {same.float().mean():.2%} of the likeliest tokens the same')
    assert error <= 1e-2 and same.float().mean() >= 0.98


def test_a_call_casts_each_weight_once(tiny_run):
    tokenizer, var, defaults = sample.load(tiny_run / 'var.pt')
    with torch.profiler.profile(record_shapes=True) as profile:
        list(sample.draw(tokenizer, var, [0], 0, 1, 'bfloat16', **defaults))
    shapes = [event.input_shapes[0] for event in profile.events() if event.name == 'aten::_to_copy']
    assert shapes.count([16, 64]) == 1 and shapes.count([192, 64]) == 1         # head, qkv: at three scales


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='of glibc alone')
def test_memory_that_is_freed_is_not_taken_again_page_by_page():
    code = """
import resource, torch, sample
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):     # old glibcs need up to 8 before a hole fits the next aligned tensor
        torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
sample.choose_device('cpu')
print(before, faults())
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=HERE, capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert after < before / 2, done


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='needs a compiler')
def test_compiled_blocks_learn_what_others_learn(tiny_run, tmp_path):
    flags = f'--stage var --tokenizer {tiny_run}/vqvae.pt --depth 2 --compile '
    torch._dynamo.utils.counters.clear()
    slow = run(flags + '--no-compile', tmp_path / 'slow')
    assert not torch._dynamo.utils.counters['frames']
    fast = run(flags, tmp_path / 'fast')
    assert torch._dynamo.utils.counters['frames']['ok'] > 1     # one is the check for a compiler
    assert np.abs(losses(fast, 'var') - losses(slow, 'var')).max() <= 1e-5


def test_compiling_without_a_compiler_is_said(tmp_path):
    done = subprocess.run([sys.executable, *f'{HERE}/train.py --compile --device cpu'.split()], cwd=tmp_path,
                          capture_output=True, text=True, env=os.environ | dict(
                              CXX=str(tmp_path / 'none'), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / 'cache')))
    assert done.returncode == 2 and done.stderr.startswith('error: --compile: torch.compile finds no working')
    assert done.stderr.count('\n') == 1 and not (tmp_path / 'out').exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_a_step_of_training_does_not_wait_for_the_gpu():
    args, _ = train.parse(TINY.replace('--device cpu', '--device cuda').split())
    var = VAR(train.make(VARConfig, args)).cuda()
    data = SimpleNamespace(count=8)
    stage = train.Stage(SimpleNamespace(args=args, data=data, device=torch.device('cuda')), 'var', var)
    tokenizer, labels = VQVAE(train.make(VQVAEConfig, args)).cuda(), torch.arange(8, device='cuda')
    images = torch.rand(8, 3, 32, 32, device='cuda')
    for mode in ('default', 'error', 'error'):
        torch.cuda.set_sync_debug_mode(mode)
        train.train_on(stage, tokenizer, images, labels)
        stage.move_weights()
    torch.cuda.set_sync_debug_mode('default')


def test_the_schedule_warms_up_stays_and_falls_to_its_last_value(tmp_path):
    rates = [train.learning_rate(step / 1000, 0.1) for step in range(1001)]
    assert rates[0] == 0.005 and rates[10] == pytest.approx(0.5025) and rates[20] == 1 and rates[60] == 1
    assert rates[1000] == pytest.approx(0.1) and rates[534] == pytest.approx(0.55, abs=0.005)
    assert all(a > b for a, b in zip(rates[70:], rates[71:]))
    out = run('--stage vqvae --vqvae-steps 9 --last-lr 0.25 --vqvae-lr 0.32', tmp_path / 'run')
    rates = [float(row['lr']) for row in curve(out, 'vqvae', 'train')]
    assert rates == pytest.approx([0.01 * train.learning_rate(step / 8, 0.25) for step in range(9)], rel=1e-6)
    assert rates[-1] == pytest.approx(0.0025)                                   # in the last step


def test_weight_decay_follows_half_a_cosine():
    stage = SimpleNamespace(lr=1.0, last_lr=0.1, name='var', args=SimpleNamespace(
        weight_decay=0.05, last_weight_decay=0.08))
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    for done, decay in [(0, 0.05), (0.25, 0.065 - 0.015 * math.cos(math.pi / 4)), (0.5, 0.065), (1, 0.08)]:
        stage.done, stage.optimizers = done, dict(model=optimizer)
        train.Stage.set_schedule(stage)
        assert optimizer.param_groups[0]['weight_decay'] == pytest.approx(decay)


@pytest.mark.parametrize('shared', [False, True])
def test_weight_decay_spares_positions_scales_gates_and_vectors(shared):
    model = small_var(shared_adaln=shared)
    decayed, free = train.parameter_groups(model, 0.05)
    assert decayed['weight_decay'] == 0.05 and free['weight_decay'] == 0
    free = {name for name, p in model.named_parameters() if any(p is other for other in free['params'])}
    assert {'position', 'start_position', 'blocks.0.attention.log_scale', 'head.bias'} <= free
    assert ('blocks.1.adaln_table' in free) == shared
    assert [name for name in free if 'weight' in name] == ['scale_embedding.weight']


def test_the_codebook_starts_on_data_and_stays_in_use(tmp_path):
    out = run('--stage vqvae --vqvae-steps 60 --vqvae-lr 0.2 --revive-every-steps 5', tmp_path / 'run')
    row = curve(out, 'vqvae')[-1]
    assert float(row['use']) == 100 and float(row['psnr']) > 14


def test_var_pt_keeps_the_step_with_the_lowest_held_out_loss(tmp_path):
    out = run('--train-count 8 --var-steps 60 --var-lr 0.3 --save-every-steps 10', tmp_path / 'run')
    losses = [float(row['loss']) for row in curve(out, 'var', 'val')]
    assert min(losses) < losses[-1] - 0.01                      # eight images were learned by heart
    tokenizer, var, defaults = sample.load(out / 'var.pt')
    images, labels = train.draw_shapes(32, 2 ** 31)
    loss_BL, _ = train.transformer_loss(var, tokenizer, train.to_float(images), labels)
    assert loss_BL.mean().item() == pytest.approx(min(losses), rel=1e-4)
    drawn = [images for images, _ in sample.draw(tokenizer, var, [*range(10)] * 8, 0, 8, **defaults)]
    shown = np.asarray(Image.open(out / 'samples.png'))
    assert np.array_equal(shown, np.asarray(sample.grid(torch.cat(drawn), 10)))     # by the weights in var.pt
    before = (out / 'var.pt').read_bytes(), (out / 'samples.png').read_bytes()
    shutil.copy(out / 'previous.pt', out / 'last.pt')                       # stopped at step 50, and resumed
    resume(out)
    assert ((out / 'var.pt').read_bytes(), (out / 'samples.png').read_bytes()) == before
    shutil.copy(out / 'previous.pt', out / 'last.pt')
    (out / 'var.pt').rename(tmp_path / 'best.pt')
    assert (resume(out) / 'var.pt').exists()                                # rather that of step 60 than none


@pytest.mark.slow
@pytest.mark.parametrize('order, scales', [('scale', (1, 2, 4, 8)), ('raster', (8,))])
def test_8_images_are_learned_by_heart(order, scales):
    """A transformer that can't overfit 8 images is broken: the thing to try when samples are bad."""
    images = train.to_float(train.draw_shapes(8, 0)[0])
    tokenizer = VQVAE(VQVAEConfig(channels=32, z_channels=4, vocab_size=64, scales=scales))
    tokenizer.codebook.weight.data.zero_()
    tokenizer.revive_codes(torch.ones(64, dtype=torch.bool), tokenizer.features(images))
    var = VAR(VARConfig(depth=2, num_classes=8, vocab_size=64, z_channels=4, scales=scales, order=order,
                        adaln_gamma_init=0.1))
    labels, tokens_BL = torch.arange(8), tokenizer.encode(images)
    optimizer = torch.optim.AdamW(var.parameters(), lr=3e-3)
    for _ in range(150):
        loss_BL, right_BL = train.transformer_loss(var, tokenizer, images, labels)
        optimizer.zero_grad()
        loss_BL.mean().backward()
        optimizer.step()
    assert right_BL.all()
    drawn = var.generate(tokenizer, labels, cfg=0.0, top_k=1)
    torch.testing.assert_close(drawn, tokenizer.decode(tokens_BL))          # and draws them, pixel by pixel


# the adversarial and the perceptual term of stage 1
def adversarial_setting():
    torch.manual_seed(1)
    tokenizer = VQVAE(VQVAEConfig(channels=32, z_channels=4, vocab_size=16, scales=(1, 2, 8)))
    args = SimpleNamespace(adversarial_weight=0.5, perceptual_weight=2.0)
    return tokenizer, Discriminator(16), args, torch.rand(4, 3, 32, 32) * 2 - 1


def test_the_hinge_and_the_adaptive_weight_are_those_of_the_papers():
    tokenizer, discriminator, args, images = adversarial_setting()
    reconstruction, vq_loss, _ = tokenizer(images)
    loss = F.mse_loss(reconstruction, images)
    total, terms, _ = train.tokenizer_loss(tokenizer, images, args, None, discriminator)
    real, made = discriminator(images), discriminator(reconstruction)
    hinge = ((1 - real).clamp(min=0).mean() + (1 + made).clamp(min=0).mean()) / 2
    assert terms['discriminator'].item() == pytest.approx(hinge.item(), rel=1e-4)
    assert terms['generator'].item() == pytest.approx(-made.mean().item(), rel=1e-3)
    last = tokenizer.decoder.conv_out.weight
    by_loss, = torch.autograd.grad(loss, last, retain_graph=True)
    by_verdict, = torch.autograd.grad(-made.mean(), last, retain_graph=True)
    weight = by_loss.norm() / (by_verdict.norm() + 1e-4)
    assert terms['adaptive'].item() == pytest.approx(weight.item(), rel=1e-3)
    expected = loss + vq_loss + 0.5 * weight * terms['generator'] + hinge
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    from_hinge = torch.autograd.grad(hinge, discriminator[0].weight, retain_graph=True)[0]
    total.backward()
    # each learns from its own loss alone
    torch.testing.assert_close(last.grad, by_loss + 0.5 * weight * by_verdict, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(discriminator[0].weight.grad, from_hinge, rtol=1e-3, atol=1e-6)


def test_under_autocast_the_discriminator_learns_though_its_weights_were_frozen_before():
    """Autocast keeps bfloat16 copies of weights: copies made while frozen must not serve the second pass."""
    tokenizer, discriminator, args, images = adversarial_setting()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss, metrics, _ = train.tokenizer_loss(tokenizer, images, args, None, discriminator)
    loss.backward()
    assert all(weight.ndim == 1 or weight.grad.abs().sum() > 0 for weight in discriminator.parameters())
    assert metrics['discriminator'].dtype == torch.float32 and metrics['adaptive'] > 0


def test_a_patch_of_the_discriminator_is_70_pixels():
    network, image = Discriminator(16), torch.zeros(1, 3, 128, 128, requires_grad=True)
    for layer in network:                   # a norm sees the whole image: without, a verdict sees a patch
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = lambda x: x
    verdicts = network(image)
    assert verdicts.shape == (1, 1, 14, 14) and Discriminator(16)(torch.zeros(1, 3, 24, 24)).numel() == 1
    verdicts[0, 0, 7, 7].backward()
    rows = image.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == 70


def test_the_discriminator_joins_at_its_start_and_is_resumed(tmp_path):
    flags = ('--stage vqvae --vqvae-steps 12 --adversarial-weight 0.1 --discriminator-start 3 '
             '--discriminator-channels 16 --save-every-steps 8 --vocab-size 128 --revive-every-steps 3')
    whole = run(flags, tmp_path / 'whole')
    assert [bool(row['adaptive']) for row in curve(whole, 'vqvae', 'train')] == [False] * 3 + [True] * 9
    out = shutil.copytree(whole, tmp_path / 'resumed')
    os.remove(out / 'last.pt')              # previous.pt is from step 8, between two revivals of codes
    assert same_weights(resume(out) / 'vqvae.pt', whole / 'vqvae.pt', 'vqvae')
    plain = run(flags.replace('weight 0.1', 'weight 0'), tmp_path / 'plain')
    assert not same_weights(plain / 'vqvae.pt', whole / 'vqvae.pt', 'vqvae')


def test_the_perceptual_distance_compares_directions_of_features_at_each_size():
    torch.manual_seed(1)
    classifier = Classifier(10, 32).eval()
    a, b = torch.rand(2, 4, 3, 32, 32).mul(2).sub(1).requires_grad_(True)
    maps = list(zip(classifier.features(a), classifier.features(b)))
    assert [x.shape[1:] for x, _ in maps] == [(32, 32, 32), (64, 16, 16), (128, 8, 8), (192, 4, 4)]
    expected = [(2 - 2 * F.cosine_similarity(x, y, dim=1)).mean((1, 2)) for x, y in maps]
    found = classifier.perceptual_distance(a, b)
    torch.testing.assert_close(found, torch.stack(expected).mean(0), rtol=1e-4, atol=1e-6)
    assert found.shape == (4,) and found.min() > 0 and classifier.perceptual_distance(a, a).abs().max() == 0
    by_a, by_b = torch.autograd.grad(found.sum(), (a, b), allow_unused=True)
    assert by_a.abs().sum() > 0 and by_b is None
    large = Classifier(3, 256, channels=4)
    assert large.features(torch.zeros(2, 3, 256, 256))[-1].shape == (2, 24, 4, 4)


def test_the_classifier_of_the_perceptual_term_learns_first_and_is_resumed(tmp_path, capsys, monkeypatch):
    flags = '--stage vqvae --perceptual-weight 1 --classifier-epochs 20 --classifier-channels 16 '
    whole = run(flags + '--train-count 640', tmp_path / 'whole')
    right = float(re.search('classifier: 100 steps, right on (.*)% of held-out', capsys.readouterr().out)[1])
    assert right > 50 and all(float(row['perceptual']) > 0 for row in curve(whole, 'vqvae', 'train'))
    before, after = (torch.load(whole / f'{name}.pt', weights_only=True)['weights']
                     for name in ('previous', 'last'))
    assert all(torch.equal(before['classifier'][name], value) for name, value in after['classifier'].items())
    out = shutil.copytree(whole, tmp_path / 'resumed')
    os.remove(out / 'last.pt')              # previous.pt is from step 2
    assert same_weights(resume(out) / 'vqvae.pt', whole / 'vqvae.pt', 'vqvae')
    assert 'classifier: ' not in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:     # while the classifier learns: it begins anew
        run(flags + '--train-count 640 --stop-after-minutes 1e-6', tmp_path / 'stopped')
    assert stop.value.code == 0 and 'stopped at step 0 of 4 of vqvae' in capsys.readouterr().out
    assert same_weights(resume(tmp_path / 'stopped') / 'vqvae.pt', whole / 'vqvae.pt', 'vqvae')
    plain = run('--stage vqvae --train-count 640', tmp_path / 'plain')
    assert not same_weights(plain / 'vqvae.pt', whole / 'vqvae.pt', 'vqvae')
    short = (TINY.replace('--vqvae-steps 4 --var-steps 4', '--budget-minutes 1e-5') + flags).split()
    error = complaint(train.main, [*short, '--out', tmp_path / 'short'], capsys, monkeypatch)
    assert '--budget-minutes' in error and 'fewer --classifier-epochs than 20' in error


def test_a_folder_of_one_class_has_nothing_to_be_told_apart(tmp_path, capsys, monkeypatch):
    folder = write_images(tmp_path / 'photos', 12, classes=('bird',))
    flags = TINY.replace('--train-count 64 --val-count 32', f'--perceptual-weight 1 --data-dir {folder}')
    flags = [*flags.split(), '--out', tmp_path / 'run']
    error = complaint(train.main, flags, capsys, monkeypatch, 'held out')
    assert '--perceptual-weight 1.0: a classifier needs two classes' in error


def test_lpips_is_asked_for_by_its_flag(tmp_path, capsys, monkeypatch):
    """The wiring, with a small random network in lpips' place."""
    class StandIn(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == 'vgg' and not verbose
            self.conv = torch.nn.Conv2d(3, 4, 3)

        def forward(self, a, b):
            return (self.conv(a) - self.conv(b)).square().mean((1, 2, 3), keepdim=True)
    monkeypatch.setitem(sys.modules, 'lpips', None)                 # as if it were not installed
    flags = [*TINY.split(), '--stage', 'vqvae', '--perceptual-weight', '1',
             '--perceptual', 'lpips', '--out', str(tmp_path / 'run')]
    error = complaint(train.main, flags, capsys, monkeypatch)
    assert '--perceptual lpips' in error and 'pip install lpips' in error
    monkeypatch.setitem(sys.modules, 'lpips', SimpleNamespace(LPIPS=StandIn))
    train.main(flags)
    assert float(curve(tmp_path / 'run', 'vqvae')[0]['perceptual']) > 0
    tokenizer, _, args, images = adversarial_setting()
    network = train.load_lpips(torch.device('cpu'))
    total, metrics, _ = train.tokenizer_loss(tokenizer, images, args, network, None)
    torch.testing.assert_close(total, metrics['reconstruction'] + 2 * metrics['perceptual'] + metrics['vq'])
    assert not any(parameter.requires_grad for parameter in network.parameters())


# settings
RELEASED = {16: (768, 200, 1e-4, 1e-3, 0.1, None), 20: (768, 250, 1e-4, 1e-3, 0.1, None),
            24: (768, 350, 8e-5, 1e-4, 0.01, None), 30: (1024, 350, 8e-5, 1e-5, 0.01, 0.08),
            36: (768, 350, 8e-5, 5e-6, 0.01, 0.08)}


@pytest.mark.parametrize('depth', RELEASED)
def test_depth_chooses_the_released_recipe_of_stage_2_alone(depth):
    preset, (batch, epochs, *_, last_lr, _) = 'imagenet512' if depth == 36 else 'imagenet256', RELEASED[depth]
    args, _ = train.parse(f'--preset {preset} --depth {depth}'.split())
    assert (args.batch_size, args.var_epochs, args.var_lr, args.adaln_gamma_init, args.last_lr,
            args.last_weight_decay) == RELEASED[depth] and args.weight_decay == 0.05
    assert args.shared_adaln == (depth == 36) and train.make(VQVAEConfig, args).stride == 16
    run = SimpleNamespace(args=args, data=SimpleNamespace(count=10 ** 6))
    tiny = VQVAE(VQVAEConfig(channels=32))
    stages = [train.Stage(run, name, tiny) for name in ('vqvae', 'var')]
    assert [stage.batch_size for stage in stages] == [768, batch]
    assert [stage.last_lr for stage in stages] == [0.1, last_lr]
    assert [stage.total for stage in stages] == [-(-40 * 10 ** 6 // 768), -(-epochs * 10 ** 6 // batch)]
    assert stages[0].micro_batch_size == (2 if depth == 36 else 8) <= stages[1].micro_batch_size


def test_what_is_given_goes_before_recipe_and_preset_and_epochs_before_steps():
    args, _ = train.parse('--preset imagenet256 --depth 20 --var-lr 3e-4'.split())
    assert args.var_lr == 3e-4 and args.var_epochs == 250
    assert train.parse(['--preset', 'imagenet512'])[0].depth == 36
    assert train.parse(['--var-epochs', '3'])[0].var_steps is None
    for flags, words in [('--var-epochs 3 --var-steps 3', '--var-epochs, --var-steps'),
                         ('--budget-minutes=3 --vqvae-steps=3', '--budget-minutes, --vqvae-steps')]:
        with pytest.raises(sample.UserError, match=words):
            train.parse(flags.split())


def test_help_names_every_flag_in_a_group_with_its_type_and_its_defaults(capsys):
    with pytest.raises(SystemExit):
        train.build_parser().parse_args(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert '--batch-size INT images a step over all GPUs [64; shapes: 16; cifar10: 256;' in text
    assert '--channel-mults INT [INT ...] factor on channels at each level' in text
    assert '--dtype {auto,float32,bfloat16}' in text and '--no-unit-norm' in text
    places = [text.index(f'{title}: --') for title in train.FLAGS]
    assert places == sorted(places) and len(places) == 7
    fields = [*VQVAEConfig.__dataclass_fields__, *VARConfig.__dataclass_fields__]
    assert all(train.flag(name) + ' ' in text for name in fields if name != 'num_classes')


# ------------------------------------------------------------------------------- many processes and stops
def heed_hangup():
    """In a process that starts: SIGHUP ends it, though nohup has these tests ignore it."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(flags: str, out: Path, ranks=0, script=HERE / 'train.py') -> subprocess.Popen:
    """train.py in a process of its own, under torchrun if ranks are asked for; what it says is in out.txt."""
    torchrun = f'-m torch.distributed.run --standalone --nproc-per-node {ranks}'.split() if ranks else []
    with open(out.with_suffix('.txt'), 'a') as said:
        return subprocess.Popen([sys.executable, *torchrun, str(script), *flags.split(), '--out', str(out)],
                                stdout=said, stderr=said, env=os.environ | dict(OMP_NUM_THREADS='1'),
                                start_new_session=True, preexec_fn=heed_hangup)


def said(out: Path) -> str:
    return out.with_suffix('.txt').read_text()


def finish(process: subprocess.Popen, out: Path, status=0) -> Path:
    assert process.wait(timeout=300) == status, said(out)
    return out


def time_of(path: Path) -> int | None:
    """When it was written; None while it isn't there, as between two names of a save."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def kill_all(process: subprocess.Popen):
    """SIGKILL to a process and all its descendants at once: the plug is pulled."""
    table = subprocess.run(['ps', '-e', '-o', 'pid=,ppid='], capture_output=True, text=True).stdout
    children, found = [[int(word) for word in line.split()] for line in table.splitlines()], [process.pid]
    for pid in found:
        found += [child for child, parent in children if parent == pid]
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


@pytest.fixture(scope='module')
def calm(tmp_path_factory):
    """Undisturbed runs to compare with, each made once: calm(flags, ranks) is its folder."""
    @cache
    def run_calmly(flags: str, ranks: int) -> Path:
        out = tmp_path_factory.mktemp('calm') / 'run'
        return finish(start(flags, out, ranks), out)
    return run_calmly


STOPPED = TINY + ('--vqvae-steps 24 --var-steps 90 --log-every-steps 7 --save-every-steps 6 --vocab-size 128 '
                  '--revive-every-steps 5 ')
many_kills = [pytest.mark.many_kills, pytest.mark.slow]


@pytest.mark.slow
@pytest.mark.parametrize('ranks, kills, data', [
    (0, 3, 'drawn'), (2, 3, 'folder'), *(pytest.param(ranks, 20, data, marks=many_kills) for ranks in (0, 2)
                                         for data in ('drawn', 'folder'))])
def test_a_run_that_is_killed_and_resumed_ends_as_if_nothing_had_been(ranks, kills, data, tmp_path, calm):
    """SIGKILL to all its processes, SIGTERM to their group or SIGHUP, at random moments, of which many fall
    into the writing of a checkpoint."""
    seed = random.randrange(10 ** 6)
    print(f'moments of the kills: seed {seed}')
    moments = random.Random(seed)
    flags = STOPPED if kills == 3 else STOPPED + '--vqvae-steps 160 --var-steps 160 --save-every-steps 2 '
    if data == 'folder':
        flags += f'--data-dir {write_images(tmp_path / "photos", 80)} --workers 2 '
    out, last = tmp_path / 'run', tmp_path / 'run/last.pt'
    for _ in range(kills):
        before = time_of(last)
        process = start('--resume' if out.exists() else flags, out, ranks)
        while process.poll() is None and time_of(last) in (None, before):
            time.sleep(0.01)                                    # until it has come further than the last one
        assert process.poll() is None, said(out)
        time.sleep(moments.uniform(0, 0.5))
        moments.choice([kill_all, lambda process: os.killpg(process.pid, signal.SIGTERM),
                        lambda process: process.send_signal(signal.SIGHUP)])(process)
        process.wait(timeout=60)
    finish(start('--resume', out, ranks), out)
    assert same_run(out, calm(flags, ranks))


@pytest.mark.slow
@pytest.mark.parametrize('number, status, ranks', [(signal.SIGINT, 130, 0), (signal.SIGTERM, 143, 0),
                                                   (signal.SIGTERM, 1, 2)])
def test_a_stop_saves_and_names_the_command_that_goes_on(number, status, ranks, tmp_path, calm):
    out = tmp_path / 'run'
    process = start(STOPPED, out, ranks)
    while not ((out / 'var.csv').exists() and len(curve(out, 'var')) > 1):
        assert process.poll() is None, said(out)
        time.sleep(0.01)
    process.send_signal(number)
    finish(process, out, status)                                # torchrun's own status is 1
    stop = re.search(r'stopped at step (\d+) of 90 of var, all saved; to go on: (.*)', said(out))
    step, command = stop.groups()
    assert 6 <= int(step) < 90
    assert command.startswith('torchrun --nproc-per-node 2 train.py' if ranks else 'python train.py')
    finish(start(command.split('train.py ')[1].split(' --out')[0], out, ranks), out)
    assert same_run(out, calm(STOPPED, ranks))


def test_stopping_after_minutes_saves_and_leaves_the_schedule_as_it_was(tiny_run, tmp_path, capsys):
    out = tmp_path / 'run'
    for i in range(8):                                          # after every step, in both stages
        with pytest.raises(SystemExit) as stop:
            train.main([*(TINY.split() if i == 0 else ['--resume']), '--stop-after-minutes', '1e-9', '--out',
                        str(out)])
        assert stop.value.code == 0
    command = 'stopped at step 1 of 4 of var, all saved; to go on: python train.py --resume'
    assert command in capsys.readouterr().out
    assert same_run(resume(out), tiny_run)


@pytest.mark.parametrize('more, stop_after, steps', [
    ('', 50, (31, 92)),                                     # in stage 2
    ('--perceptual-weight 1 --classifier-channels 8 --classifier-epochs 4', 20, (29, 91))])
def test_a_budget_fits_the_whole_schedule_into_its_minutes(more, stop_after, steps, tmp_path, monkeypatch):
    """Over all sessions, by a clock that a step moves by a second; a session's first step doesn't count. A
    classifier of four steps takes three seconds from stage 1, for good."""
    clock, move_weights = SimpleNamespace(now=0.0, monotonic=lambda: clock.now), train.Stage.move_weights

    def move_for_a_second(*arguments):
        clock.now += 1
        move_weights(*arguments)

    monkeypatch.setattr(train, 'time', clock)
    monkeypatch.setattr(train.Stage, 'move_weights', move_for_a_second)
    flags = TINY.replace('--vqvae-steps 4 --var-steps 4', '--budget-minutes 2 --budget-vqvae 0.25') + more
    flags += f' --save-every-steps 100 --stop-after-minutes {stop_after / 60} --out {tmp_path}'
    with pytest.raises(SystemExit):
        train.main(flags.split())
    resume(tmp_path)
    rates = {stage: [float(row['lr']) for row in curve(tmp_path, stage, 'train')]
             for stage in ('vqvae', 'var')}
    assert (len(rates['vqvae']), len(rates['var'])) == steps
    peak = 0.016 * 8 / 256
    assert rates['var'][:2] == pytest.approx([0.005 * peak] * 2)           # the first second isn't counted
    planned = [peak * train.learning_rate(step / 90, 0.01) for step in range(steps[1])]
    assert rates['var'][10:] == pytest.approx(planned[10:], abs=0.03 * peak)


def losses(out: Path, stage: str) -> np.ndarray:
    """What was logged of each training step, and of the validations."""
    names = dict(train=dict(vqvae=('reconstruction', 'vq', 'perceptual'), var=('loss',)),
                 val=dict(vqvae=('psnr', 'perplexity'), var=('loss', 'accuracy')))
    return np.concatenate([[float(row.get(name) or 0) for name in names[row['split']][stage]]
                           for row in curve(out, stage)])


@pytest.mark.slow
def test_a_step_is_the_same_on_any_number_of_processes_and_in_any_parts(tmp_path):
    """Same losses over 20 steps to 1e-5, dropout and stochastic depth on: 2 processes or 1; 1, 2, 4 parts."""
    flags = TINY + '--vqvae-steps 20 --save-every-steps 20 --vocab-size 128 --revive-every-steps 3 '
    loud = flags + ('--var-steps 20 --batch-size 32 --depth 2 --label-dropout 0.5 --stochastic-depth 0.5 '
                    '--adaln-gamma-init 1 --flip --crop 2 ')
    adversarial = flags + ('--var-steps 1 --adversarial-weight 0.1 --discriminator-start 10 '
                           '--discriminator-channels 16 --micro-batch-size 2 ')
    two = {name: finish(start(flags, tmp_path / name, 2), tmp_path / name)
           for name, flags in dict(loud=loud, adversarial=adversarial).items()}
    for name, alone in [('loud', loud), ('loud', loud + '--micro-batch-size 16 '),
                        ('loud', loud + '--micro-batch-size 8 '), ('adversarial', adversarial)]:
        one = tmp_path / f'one{len(list(tmp_path.iterdir()))}'
        train.main([*alone.split(), '--out', str(one)])
        for stage in ('vqvae', 'var'):
            gaps = np.abs(losses(two[name], stage) - losses(one, stage))
            print(name, stage, gaps.max())
            assert len(gaps) in (3, 22, 62) and gaps.max() <= 1e-5
    # the perceptual term's classifier is the same on both processes: one goes on from there alone
    flags += '--stage vqvae --perceptual-weight 1 --classifier-channels 8 --save-every-steps 10'
    out = finish(start(flags, tmp_path / 'seen', 2), tmp_path / 'seen')
    before = losses(out, 'vqvae')
    shutil.copy(out / 'previous.pt', out / 'last.pt')
    assert np.abs(losses(resume(out), 'vqvae') - before).max() <= 5e-5      # PSNR is logged to 1e-5
    # stage 2 once more, from where two processes began it, but by one, and in other parts
    out, before = two['loud'], losses(two['loud'], 'var')
    shutil.copy(out / 'previous.pt', out / 'last.pt')
    assert np.abs(losses(resume(out, '--micro-batch-size 7'), 'var') - before).max() <= 1e-5


@pytest.mark.slow
def test_a_rank_that_fails_brings_the_others_down_with_its_message(tiny_run, tmp_path):
    """Rank 1 fails in the middle of a run; sees other images; rank 0 alone complains of what all see."""
    folder, other = (write_images(tmp_path / name, count) for name, count in (('a', 30), ('b', 33)))
    script = tmp_path / 'launch.py'
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import sample, train
if os.environ['RANK'] == '1':
    if '--data-dir' in sys.argv:
        sys.argv += ['--data-dir', {str(other)!r}]
    else:
        batch = train.ArrayData.batch
        def fail(data, step, batch_size):
            sample.check(step < 3, 'this rank has had enough')
            return batch(data, step, batch_size)
        train.ArrayData.batch = fail
sample.run_command(train.main)
""")
    out = shutil.copytree(tiny_run, tmp_path / 'run')
    last = (out / 'last.pt').read_bytes()
    for flags, words in [
            (TINY + '--overwrite --batch-size 9', 'error: --batch-size 9: 2 processes cannot share it; 8'),
            (TINY + f'--overwrite --data-dir {folder}', f'error: rank 1: --data-dir {other}, --out'),
            (TINY + '--overwrite', 'error: rank 1: this rank has had enough')]:
        assert (out / 'last.pt').read_bytes() == last           # nothing is lost by a mistake
        began = time.time()
        finish(start(flags, out, 2, script), out, status=1)     # torchrun's own status is 1
        assert 'terminate called' not in said(out) and '(exitcode: 2)' in said(out), said(out)
        assert said(out).count(words) == 1 and f'{HERE}/train.py", line' not in said(out), said(out)
        assert said(out).count('error: ') == 1 or 'rank 1' in words, said(out)
        assert time.time() - began < 60                         # a hang would last for ever
        out.with_suffix('.txt').unlink()


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_nccl_on_one_gpu_in_bfloat16_and_a_resume_there(tmp_path):
    flags = TINY.replace('--device cpu', '--device cuda --dtype bfloat16') + (
        '--adversarial-weight 0.1 --discriminator-start 2 --discriminator-channels 16 --micro-batch-size 4 ')
    out = finish(start(flags, tmp_path / 'run', 1), tmp_path / 'run')
    before = losses(out, 'var')
    shutil.copy(out / 'previous.pt', out / 'last.pt')
    finish(start('--resume', out, 1), out)
    assert np.abs(losses(out, 'var') - before).max() < 1e-2    # GPUs add in any order


# -------------------------------------------------------------------------------------------- mistakes
def complaint(main, arguments, capsys, monkeypatch, ignore='it/s') -> str:
    """What a command that can't be done says on stderr: exit status 2 and one line."""
    monkeypatch.setattr(sys, 'argv', ['command', *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sample.run_command(main)
    lines = capsys.readouterr().err.splitlines()            # perhaps a progress bar, then the one line
    assert stop.value.code == 2 and lines[-1].startswith('error: '), lines
    assert all(re.search('it/s|batch/s|s/it|^ *$|' + ignore, line) for line in lines[:-1]), lines
    return lines[-1]


WRONG_FLAGS = """
    train.py --dept 3                               | unrecognized arguments: --dept 3
    train.py --preset cifar-10                      | --preset; cifar-10; shapes; cifar10
    train.py --depth 0                              | --depth 0; at least 1
    train.py --var-steps 0                          | --var-steps: 0: must be 1 or more
    train.py --batch-size 100000                    | --batch-size 100000; only
    train.py --vqvae-lr nan                         | --vqvae-lr: nan; above 0
    train.py --label-dropout 1                      | --label-dropout 1; in [0, 1)
    train.py --dtype float8                         | --dtype; float8; bfloat16
    train.py --device meta                          | --device meta; cpu
    train.py --channels 40                          | --channels 40; multiple of 32
    train.py --scales 1 4 2 8                       | --scales (1, 4, 2, 8); rise
    train.py --scales 8                             | --scales (8,): not for order scale; two or more
    train.py --order raster                         | --scales (1, 2, 4, 8): not for order raster; one map
    train.py --order raster --stage vqvae           | --scales (1, 2, 4, 8): not for order raster; one map
    train.py --order raster --stage var --tokenizer CIFAR --scales 8    | --order raster; cifar10.pt has the
    train.py --order raster --stage var --tokenizer CIFAR   | --order raster; (1, 2, 4, 8); a single map
    train.py --order snake                          | --order; snake; raster
    train.py --no-adaln --shared-adaln              | --shared-adaln True; without adaln
    train.py --scales 1 2 4                         | --scales (1, 2, 4); 32 / 4 = 8
    train.py --data-dir .                           | --data-dir .; no images; train/<class>/
    train.py --resume --overwrite                   | --resume; --overwrite
    train.py --tokenizer x.pt                       | --tokenizer; --stage var
    train.py --stage var                            | no tokenizer; --tokenizer
    train.py --stage var --tokenizer no.pt          | no.pt; --tokenizer
    train.py --out RUN/var.csv/run                  | Not a directory; var.csv/run
    train.py --resume                               | --resume; holds no run
    train.py --preset imagenet256                   | --preset imagenet256; --data-dir
    train.py --budget-vqvae 1                       | --budget-vqvae: 1; (0, 1)
    train.py --discriminator-channels 20            | --discriminator-channels: 20; multiple of 16
    train.py --adversarial-weight 1 --image-size 16 --scales 1 4 --stage vqvae  | --adversarial-weight; 24
    train.py --perceptual-weight 1 --image-size 4 --scales 1 2 --patch-size 2  | --perceptual-weight; 8 pixel
    train.py --perceptual lpips                     | --perceptual lpips; above 0
    train.py --perceptual vgg                       | --perceptual; vgg; classifier
    train.py --var-optimizer sgd                    | --var-optimizer; sgd; muon
    train.py --classifier-epochs 0                  | --classifier-epochs: 0; 1 or more
    train.py --preset cifar10 --data-dir nowhere    | nowhere; no such folder
    train.py --preset cifar10 --image-size 64 --scales 1 16   | --image-size 64; 32
    train.py --seed 3000000000                      | --seed: 3000000000; below 2^31
"""


def check_wrong_flag(line: str, run: Path, folder: Path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    command, words = line.split('|')
    command = command.replace('RUN', str(run)).replace('CIFAR', str(HERE / 'notebooks/cifar10.pt'))
    script, *arguments = command.split()
    if script == 'train.py':
        arguments = ['--train-count', '50', '--out', 'run', *arguments]
    error = complaint(sys.modules[script.removesuffix('.py')].main, arguments, capsys, monkeypatch)
    assert all(word in error for word in words.strip().split('; ')), error
    assert not [path for path in folder.rglob('*') if path.is_file()]


@pytest.mark.parametrize('line', [' '.join(line.split()) for line in WRONG_FLAGS.strip().splitlines()])
def test_a_wrong_flag_is_named(line, tiny_run, tmp_path, capsys, monkeypatch):
    check_wrong_flag(line, tiny_run, tmp_path, capsys, monkeypatch)


class Bomb:
    """Makes a folder when it is unpickled freely."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('damage', [
    lambda c: c['var_config'].update(depth=2), lambda c: c.pop('var'), lambda c: c.pop('defaults'),
    lambda c: c['vqvae_config'].update(channels=64)])
def test_a_checkpoint_that_does_not_fit_its_config_is_named(damage, tiny_run, tmp_path, capsys, monkeypatch):
    checkpoint = torch.load(tiny_run / 'var.pt', weights_only=True)
    damage(checkpoint)
    torch.save(checkpoint, tmp_path / 'damaged.pt')
    arguments = [tmp_path / 'damaged.pt', '--out', tmp_path / 'x.png']
    error = complaint(sample.main, arguments, capsys, monkeypatch)
    assert 'damaged.pt: torn, or not what it should be;' in error and not (tmp_path / 'x.png').exists()


def test_a_file_that_is_no_such_checkpoint_is_named(tiny_run, tmp_path, capsys, monkeypatch):
    good = (tiny_run / 'var.pt').read_bytes()
    (tmp_path / 'torn.pt').write_bytes(good[:len(good) // 2])
    (tmp_path / 'empty.pt').write_bytes(b'')
    (tmp_path / 'text.pt').write_text('hello')
    torch.save([1, 2], tmp_path / 'list.pt')
    torch.save(Bomb(tmp_path / 'ran'), tmp_path / 'code.pt')
    for name, word in dict(torn='torn', empty='torn', text='torn', list='torn', code='torn',
                           gone='No such file').items():
        arguments = [tmp_path / f'{name}.pt', '--out', tmp_path / 'x.png']
        error = complaint(sample.main, arguments, capsys, monkeypatch)
        assert f'{name}.pt' in error and word in error, error
    error = complaint(sample.main, [tiny_run / 'vqvae.pt', '--out', tmp_path / 'x.png'], capsys, monkeypatch)
    assert "kind 'vqvae'" in error and "'var'" in error
    arguments = ['--stage', 'var', '--out', tmp_path / 'out', '--tokenizer']
    assert 'kind' in complaint(train.main, [*arguments, tiny_run / 'last.pt'], capsys, monkeypatch)
    assert 'torn' in complaint(train.main, [*arguments, tmp_path / 'torn.pt'], capsys, monkeypatch)
    arguments += [tiny_run / 'vqvae.pt', '--vocab-size', 99]
    error = complaint(train.main, arguments, capsys, monkeypatch)
    assert '--vocab-size 99' in error and '16; omit the flag' in error
    assert not [name for name in ('out', 'x.png', 'ran') if (tmp_path / name).exists()]


def test_a_run_is_not_written_over_unless_asked(tiny_run, tmp_path, capsys, monkeypatch):
    out = shutil.copytree(tiny_run, tmp_path / 'run')
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    error = complaint(train.main, [*TINY.split(), '--out', out], capsys, monkeypatch)
    assert '--resume' in error and '--overwrite' in error
    error = complaint(train.main, ['--resume', '--depth', 3, '--out', out], capsys, monkeypatch)
    assert '--depth 3' in error and 'has 1' in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    shutil.copy(out / 'previous.pt', out / 'last.pt')               # as if stopped in the middle of stage 2
    error = complaint(train.main, [*TINY.split(), '--stage', 'vqvae', '--out', out], capsys, monkeypatch)
    assert '--resume' in error
    before['last.pt'] = before['previous.pt']
    for flags, word in [('--batch-size 99', 'only 64'),
                        ('--adversarial-weight 1 --image-size 16 --scales 1 4', '24 pixels')]:
        flags = f'{TINY} --overwrite --out {out} {flags}'.split()
        assert word in complaint(train.main, flags, capsys, monkeypatch)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    run('--overwrite --seed 1', out)
    assert not same_weights(out / 'var.pt', tiny_run / 'var.pt', 'var')
    assert (resume(out) / 'var.pt').exists()                        # nothing left to do, and nothing lost


@pytest.mark.parametrize('damage', [
    lambda c: c['settings'].pop('flip'), lambda c: c.pop('optimizers'), lambda c: c.update(step='x'),
    lambda c: c['weights']['model'].popitem(), lambda c: c['optimizers']['model'].popitem(),
    lambda c: c['optimizers']['model']['state'][0].update(exp_avg=torch.zeros(3)),
    lambda c: c['optimizers']['model']['state'][1].pop('exp_avg_sq'), lambda c: c.update(budget=math.nan),
    lambda c: c.update(step=-1), lambda c: c.update(stage='x'), lambda c: c['settings'].update(depth='x'),
    lambda c: c.update(log=['x'])])
def test_a_save_of_another_kind_is_refused_and_left_alone(damage, tiny_run, tmp_path, capsys, monkeypatch):
    out = shutil.copytree(tiny_run, tmp_path / 'run')
    saved = torch.load(out / 'last.pt', weights_only=True)
    damage(saved)
    torch.save(saved, out / 'last.pt')
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    error = complaint(train.main, ['--resume', '--out', out], capsys, monkeypatch)
    assert 'last.pt: not what this train.py saves' in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_that_will_not_do_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / 'none/train/cat').mkdir(parents=True)
    broken = write_images(tmp_path / 'broken', 60)
    for i in range(0, 60, 3):
        (broken / f'train/bird/{i:04d}.png').write_bytes(b'')
    for name, words in dict(none='no images', gone='no such folder',
                            broken='images are broken, more than 1%').items():
        arguments = [*TINY.split(), '--data-dir', tmp_path / name, '--out', tmp_path / 'run']
        error = complaint(train.main, arguments, capsys, monkeypatch, ignore='broken, left out')
        assert str(tmp_path / name) in error and words in error
    assert not (tmp_path / 'run/vqvae.pt').exists()


def test_a_checkpoint_of_other_images_is_refused(tmp_path, capsys, monkeypatch):
    folder = write_images(tmp_path / 'a', 30, (28, 28), mode='L')
    out = run(f'--data-dir {folder}', tmp_path / 'run')
    tokenizer, var, _ = sample.load(out / 'var.pt')
    assert var.class_names == ['bird', 'cat', 'dog'] and var.config.num_classes == 3
    before = (out / 'last.pt').read_bytes()
    (folder / 'train/cat/new.png').write_bytes((folder / 'train/cat/0001.png').read_bytes())
    error = complaint(train.main, ['--resume', '--out', out], capsys, monkeypatch)
    assert 'other images than the run to resume' in error and (out / 'last.pt').read_bytes() == before


def test_a_folder_that_is_not_cifar10_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / 'empty').mkdir()
    write_cifar(tmp_path / 'short', b'x' * 100)
    write_cifar(tmp_path / 'labels', b'\x0a' * (10_000 * 3073))
    for name, word in dict(empty='data_batch_1.bin', short='100 bytes', labels='label 10').items():
        arguments = ['--preset', 'cifar10', '--data-dir', tmp_path / name, '--out', tmp_path / 'run']
        assert word in complaint(train.main, arguments, capsys, monkeypatch)
    assert not list((tmp_path / 'run').iterdir())


def test_a_full_disk_or_a_loss_that_explodes_leaves_the_last_save(tiny_run, tmp_path, capsys, monkeypatch):
    path = tmp_path / 'model.pt'
    path.write_text('old')
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
    try:
        with pytest.raises(sample.UserError, match='model.pt: cannot be written'):
            train.save_checkpoint(path, 'var', tmp_path / 'previous.pt', weights=torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
    flags = [*TINY.split(), '--vqvae-lr', 1e30, '--out', tmp_path / 'run']
    error = complaint(train.main, flags, capsys, monkeypatch)
    assert re.search(r'(nan|inf) at step \d; the last save', error) and '--vqvae-lr below 1e+30' in error
    assert not (tmp_path / 'run/vqvae.pt').exists()
    out = shutil.copytree(tiny_run, tmp_path / 'next')
    before = (out / 'vqvae.pt').read_bytes()
    os.remove(out / 'var.pt')
    flags = [*TINY.split(), '--stage', 'var', '--var-lr', 1e30, '--var-steps', 8, '--out', out]
    error = complaint(train.main, [*flags, '--overwrite', '--log-every-steps', 6], capsys, monkeypatch)
    step = int(re.search(r'var: loss of scale 1x1 is (?:nan|inf) at step (\d+)', error)[1])
    assert 2 <= step <= 3 and (out / 'vqvae.pt').read_bytes() == before                 # lr 1e28 at step 1
    last = torch.load(out / 'last.pt', weights_only=True)
    assert last['step'] == 0 and all(weight.isfinite().all() for weight in last['weights']['model'].values())
    assert (resume(out, '--var-lr 1e-3') / 'var.pt').exists()                           # as the message says


# ---------------------------------------------------------------------------------------------- README
README = (HERE / 'README.md').read_text()
COMMANDS = [line for block in re.findall(r'```bash\n(.*?)```', README, re.S) for line in block.splitlines()]


def python_commands(script: str) -> list[list[str]]:
    """The arguments of each `python script ...` in README and in the files' own headers."""
    text = '\n'.join([*COMMANDS, sample.__doc__, train.__doc__, ''])
    found = re.findall(rf'(?:python|torchrun --nproc-per-node 8) {script}(.*?)(?:&&|\n)', text)
    return [shlex.split(flags, comments=True) for flags in found]


def test_every_command_in_readme_parses_and_its_first_two_are_what_ci_runs():
    assert COMMANDS[:2] == ['pip install -r requirements.txt && python train.py',
                            'pip install -r requirements-dev.txt && pytest']
    assert len(python_commands('train.py')) > 5 and len(python_commands('sample.py')) > 5
    for module, script in ((train, 'train.py'), (sample, 'sample.py')):
        for arguments in python_commands(script):
            module.build_parser().parse_args(arguments)


@pytest.mark.slow
def test_readmes_first_line_trains_and_draws_with_its_steps_cut_to_2(tmp_path):
    def python(command, status=0):
        command = [sys.executable, *f'{HERE}/{command}'.split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done
    python(COMMANDS[0].split('python ')[1] + ' --vqvae-steps 2 --var-steps 2')
    draw = 'sample.py out/shapes/var.pt'
    for i in range(2):
        python(f'{draw} --labels 3 Heart --count 5 --batch-size 4 --out {i}.png --npz {i}.npz')
    assert (tmp_path / '0.png').read_bytes() == (tmp_path / '1.png').read_bytes()
    assert (tmp_path / '0.npz').read_bytes() == (tmp_path / '1.npz').read_bytes()
    arrays = np.load(tmp_path / '0.npz')
    assert arrays['arr_0'].shape == (5, 32, 32, 3) and arrays['arr_0'].dtype == np.uint8
    assert arrays['labels'].tolist() == [3, 5, 3, 5, 3]
    python(f'{draw} --labels 1 --count 3 --show-scales --out scales.png')
    assert Image.open(tmp_path / 'scales.png').size == (2 * (4 * 34 - 2), 2 * (3 * 34 - 2))
    said = "error: [Errno 2] No such file or directory: 'none.pt'\n"
    assert python('sample.py none.pt', status=2).stderr == said
