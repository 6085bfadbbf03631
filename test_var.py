"""The specification of this project as tests, in the order of the method. Run: pytest

The pyramid, the tokenizer, the transformer, sampling, released weights, data, training. The rest: notebooks/.
"""
import csv
import json
import math
import os
import re
import shutil
import signal
import sys
import unicodedata
import zlib
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
SCALES = (1, 2, 3, 5)                   # 2 and 3 do not divide 5: areas overlap, the hard case
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
    """A transformer with all weights random; at the usual initialisation many terms are almost zero."""
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
    """Means over areas, (side * side, C): cell i spans floor(i H / side) to ceil((i + 1) H / side)."""
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
    keep[:, 3:] = 1                                     # and no token is always kept
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
    assert tokenizer.codebook.weight.grad is None               # the codes learn only from the vq loss


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
        for place in range(logits[k].shape[1]):             # inputs exist for scales 2, 3, 4
            grad = torch.autograd.grad(logits[k][0, place].square().sum(), inputs_BLC, retain_graph=True)[0]
            seen = [part.abs().sum(-1) > 0 for part in grad.split([4, 9, 25], dim=1)]
            for scale, part in enumerate(seen, start=1):
                assert part.all() if scale <= k else not part.any(), f'scale {k}, position {place}, {scale}'


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
    model, inputs = small_var(adaln=False), torch.randn(1, 38, 4)       # every position sees the class,
    logits = [model(torch.tensor([label]), inputs) for label in (0, 2)]
    assert ((logits[0] - logits[1]).abs().amax((0, 2)) > 1e-4).all()
    model.class_embedding.weight.data[:] = 0.3
    logits = [model(torch.tensor([label]), inputs) for label in (0, 2)]     # only by its embedding
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match='^shared_adaln=True: requires adaln'):
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
        factor = (noise_B2[:, i] >= 0.4) / 0.6 if i < 2 else torch.ones(4)          # only the two gates
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
    """The conditional and unconditional logits of generate(), (B, L, V) each, and its tokens."""
    seen = []
    hook = var.head.register_forward_hook(lambda module, args, output: seen.append(output))
    _, tokens_BL = var.generate(tokenizer, labels, return_tokens=True, **options)
    hook.remove()
    conditional, *unconditional = torch.cat(seen, dim=1).split(len(labels))     # cfg 0: no null class
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
    """One token, as the docstring of draw_tokens defines it."""
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


def test_the_same_noise_gives_the_same_image_in_any_batch(tokenizer):
    var, labels = small_var(), [0, 1, 2, 0, 1]
    runs = [[torch.cat(parts) for parts in zip(*sample.draw(tokenizer, var, labels, 7, batch_size))]
            for batch_size in (5, 2, 5)]
    assert torch.equal(runs[0][1], runs[1][1])                                  # tokens
    torch.testing.assert_close(runs[0][0], runs[1][0], atol=1e-5, rtol=0)       # images, up to rounding
    assert torch.equal(runs[0][0], runs[2][0])                                  # bit for bit
    other = torch.cat([tokens for _, tokens in sample.draw(tokenizer, var.train(), labels, 8, 5)])
    assert not torch.equal(runs[0][1], other)
    again = [torch.cat(parts) for parts in zip(*sample.draw(tokenizer.train(), var, labels, 7, 5))]
    assert torch.equal(runs[0][0], again[0])                                    # in either mode


def test_under_autocast_logits_and_quantizer_stay_float32(tokenizer):
    var, labels = small_var(), torch.tensor([0, 1])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        tokens_BL = tokenizer.encode(images_of(tokenizer))
        inputs_BLC = tokenizer.teacher_inputs(tokens_BL)
        logits, images = var(labels, inputs_BLC), var.generate(tokenizer, labels)
    logits.sum().backward()
    assert inputs_BLC.dtype == logits.dtype == images.dtype == torch.float32
    assert torch.equal(inputs_BLC, tokenizer.teacher_inputs(tokens_BL))
    # bfloat16 was used (8 bits: each operation errs by 0.4%) and the result is close: logits are about 1
    assert 0 < (logits - var(labels, inputs_BLC)).abs().max() < 0.3


@pytest.mark.parametrize('mask', [None, 'block-causal'])
def test_attention_spelled_out_is_that_of_torch(mask):
    q, k, v = torch.randn(3, 2, 3, 39, 64).bfloat16().requires_grad_()
    mask_LL = small_var().mask_LL if mask else None
    for scale in (0.2, 2.0):                    # scores up to 60
        ours = var_module.attend(q, k, v, mask_LL, scale)
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask_LL, scale=scale)
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), exact, atol=0.03, rtol=0)     # 2^-8 of values up to 4


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
        if field != 'vocab_size':                               # the inputs do not show it
            with pytest.raises(ValueError, match=r'inputs_BLC .*: must be .* for VARConfig\('):
                var(torch.tensor([0]), tokenizer.teacher_inputs(torch.zeros(1, 39, dtype=torch.int64)))


def test_the_headers_examples_run_as_they_stand(capsys):
    """The example in var.py continues the one in vqvae.py: the two models fit each other."""
    names = dict(torch=torch, VQVAE=VQVAE, VQVAEConfig=VQVAEConfig, VAR=VAR, VARConfig=VARConfig)
    for module in (vqvae_module, var_module):
        example = '\n'.join(re.findall(r'^    ([\w, ]+ = .*)$', module.__doc__, re.M))
        exec(example, names)
    assert names['tokens_BL'].shape == (2, 85) and names['logits_BLV'].shape == (2, 85, 256)
    assert names['images_B3HW'].shape == (2, 3, 32, 32)


# ------------------------------------------------------------------------------------ released weights
def recipe(shapes: dict) -> dict:
    """Weights that anyone can rebuild from their names, as used for notebooks/parity.json."""
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
    """Both models of a parity case, its images and the values that the released code computes from them."""
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
    c = PARITY[case]['config']                              # all but the scales follows from the shapes
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
    """The tokens are equal, the images agree to 1e-4."""
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
    """Loss, gradients, their norm before clipping, and the weights after an AdamW step; no dropout."""
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
    for name, values in step['weights'].items():        # a step changes each by about 1e-3
        torch.testing.assert_close(some(weight_of(name)), torch.tensor(values), atol=1e-5, rtol=0)


@pytest.mark.parametrize('model, change, words', [
    (VAR, lambda w: w.pop('blocks.1.ffn.fc1.bias'), 'Missing key(s) in state_dict: "blocks.1.fc1.bias"'),
    (VAR, lambda w: w.update({'pos_1LC': w['pos_1LC'][:, :-1]}), 'size mismatch for position'),
    (VQVAE, lambda w: w.update({'quant_conv.extra': w['quant_conv.bias']}), 'quant_conv.extra'),
    (VQVAE, lambda w: w.update(trainer=w.pop('quant_conv.bias')), "take ['trainer']['vae_local']")])
def test_a_state_dict_that_does_not_fit_is_refused_in_one_line_that_says_where(model, change, words):
    weights = recipe(PARITY['adaln']['var_keys' if model is VAR else 'vqvae_keys'])
    change(weights)
    with pytest.raises(ValueError, match='^not a released VAR t.*' + re.escape(words)) as refusal:
        model.from_official(weights, (1, 2, 3, 4))
    assert '\n' not in str(refusal.value)


# ------------------------------------------------------------------------------------------------ data
def test_drawings_follow_from_the_seed_and_differ_between_seeds():
    images, labels = train.draw_shapes(40, seed=5, size=24)
    assert images.shape == (40, 3, 24, 24) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [4] * 10
    assert torch.equal(images, train.draw_shapes(40, seed=5, size=24)[0])
    both = torch.cat([images, train.draw_shapes(40, seed=6, size=24)[0]])
    assert len({image.numpy().tobytes() for image in both}) == 80


def test_cifar10_is_read_as_its_format_says(tmp_path):
    records = np.random.RandomState(0).randint(0, 256, (10_000, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    folder = tmp_path / 'cifar-10-batches-bin'
    folder.mkdir()
    for name in train.CIFAR10_FILES:
        (folder / name).write_bytes(records.tobytes())
    images, labels, test_images, test_labels = train.read_cifar10(str(tmp_path))
    assert images.shape == (50_000, 3, 32, 32) and test_images.shape == (10_000, 3, 32, 32)
    assert labels[7] == records[7, 0] and labels[40_007] == records[7, 0] and test_labels[7] == records[7, 0]
    assert images[7, 1, 2, 3] == records[7, 1 + 1024 + 2 * 32 + 3]           # green, row 2, column 3
    args, _ = train.parse(f'--preset cifar10-cpu --data-dir {folder} --train-count 500 --no-flip'.split())
    data = train.load_data(args, 32, torch.device('cpu'))
    chosen = data.indices_and_noise(3, 9)[0]
    assert torch.equal(data.batch(3, 9)[0], train.to_float(images[chosen]))
    held_out = torch.cat([images for images, _ in data.val_batches(300)])
    assert data.count == 500 and torch.equal(held_out, train.to_float(test_images[:2000]))
    (folder / 'data_batch_3.bin').write_bytes(b'short')
    with pytest.raises(sample.UserError, match='data_batch_3.bin: 5 of 30730000 bytes; .* or train/'):
        train.read_cifar10(str(folder))


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
    """Writes train/<class>/<i>.png: smooth images, all different."""
    for i in range(count):
        noise = np.random.RandomState(i).randint(0, 256, (4, 5, 3), dtype=np.uint8)
        path = folder / 'train' / classes[i % len(classes)] / f'{i:04d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).resize(size, Image.BICUBIC).convert(mode).save(path)
    return folder


def folder_data(folder: Path, flags='') -> train.FolderData:
    args, _ = train.parse(f'--data-dir {folder} {flags}'.split())
    return train.FolderData(args, 16, torch.device('cpu'))


def test_classes_are_folders_and_a_tenth_is_held_out_of_which_each_class_keeps_one(tmp_path, capsys):
    for name in ('one', 'two'):
        write_images(tmp_path, 1, classes=(name,))
    write_images(tmp_path, 60)
    for seed in range(5):
        data = folder_data(tmp_path, f'--seed {seed}')
        assert data.class_names == ['bird', 'cat', 'dog', 'one', 'two'] and len({*data.images}) == 62
        assert '6 of 62 images are held out' in capsys.readouterr().out and data.val_count == 6
        assert {name.split('/')[0] for name, _ in data.images[:data.count]} == {*data.class_names}
    assert data.fingerprint == folder_data(tmp_path, '--seed 4').fingerprint
    assert data.fingerprint != folder_data(tmp_path, '--seed 3').fingerprint
    shutil.copytree(tmp_path / 'train/cat', tmp_path / 'val/owl')
    data = folder_data(tmp_path, '--val-count 7 --train-count 50')
    assert 'owl' in data.class_names and (data.count, data.val_count) == (50, 7)


def test_what_a_folder_holds_does_not_depend_on_the_machine_that_holds_it(tmp_path, capsys):
    """Names as macOS writes them, links, hidden files, non-images, nested folders, folders of runs."""
    a, b, elsewhere = (tmp_path / name for name in 'abc')
    write_images(a, 40, classes=('école', 'cat'))
    shutil.copytree(a, b)
    (b / 'train/école').rename(b / 'train' / unicodedata.normalize('NFD', 'école'))
    for folder in (a / 'train/cat/deep/er', elsewhere / 'er'):
        folder.mkdir(parents=True)
    (a / 'train/cat/0001.png').rename(a / 'train/cat/deep/er/1.png')
    (b / 'train/cat/0001.png').rename(elsewhere / 'er/1.png')
    (b / 'train/cat/deep').symlink_to(elsewhere)
    (b / 'train/cat/loop').symlink_to('..')
    for name in '.x.png cat/._0003.png cat/notes.txt cat/b.HEIC loose.png last.pt cat/README'.split():
        (b / 'train' / name).write_bytes(b'')
    shutil.copytree(a / 'train', b / 'train/out/shapes')
    (b / 'train/out/shapes/last.pt').write_bytes(b'')           # of a run, as --data-dir . finds it
    a, b = folder_data(a), folder_data(b)
    assert a.class_names == b.class_names == ['cat', 'école'] and a.fingerprint == b.fingerprint
    assert a.count + a.val_count == b.count + b.val_count == 40
    found = 'train: 2 outside class folders, 1 .heic, 1 other, 1 .txt'
    assert capsys.readouterr().out.splitlines()[1] == f'skipped in {tmp_path}/b/{found}'


def test_a_batch_of_a_folder_follows_from_its_step_alone(tmp_path):
    folder = write_images(tmp_path, 30)
    data, late = (folder_data(folder, f'--flip --workers {workers}') for workers in (1, 2))
    batches = [data.batch(step, 4) for step in range(14)]           # 27 training images: 6 steps an epoch
    for step in (9, 10, 3):
        assert all(torch.equal(a, b) for a, b in zip(late.batch(step, 4), batches[step]))
    assert batches[0][0].shape == (4, 3, 16, 16) and -1 <= batches[0][0].min() < batches[0][0].max() <= 1
    seen = torch.cat([data.indices_and_noise(step, 4)[0] for step in range(12)]).tolist()
    assert len({*seen[:24]}) == len({*seen[24:]}) == 24 and seen[:24] != seen[24:]
    images, labels = (torch.cat(parts) for parts in zip(*data.val_batches(2)))
    assert len(images) == 3 and torch.equal(images, next(data.val_batches(9))[0])
    found = [data.class_names[label] for label in labels]
    assert found == [name.split('/')[0] for name, _ in data.images[27:]]


def test_broken_images_are_named_counted_and_left_out_unless_all_are(tmp_path, capsys):
    folder = write_images(tmp_path, 40)
    (folder / 'train/bird/0000.png').write_bytes(b'no image')
    good = (folder / 'train/cat/0001.png').read_bytes()
    (folder / 'train/cat/0001.png').write_bytes(good[:len(good) // 2])
    data = folder_data(folder)
    for step in range(6):
        assert data.batch(step, 36)[0].amax((1, 2, 3)).min() > -0.5     # the next image instead, not black
    list(data.val_batches(10))
    named = [line for line in capsys.readouterr().out.splitlines() if line.startswith('skipped broken image')]
    assert len(named) == 2 and {Path(line.split(': ')[1]).name for line in named} == {'0000.png', '0001.png'}
    for path in folder.rglob('*.png'):
        path.write_bytes(b'')
    with pytest.raises(sample.UserError, match='all 36 images'):
        folder_data(folder).batch(0, 8)


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


def stopped(flags: str, out: Path, stage: str, step: int) -> Path:
    """A run stopped by SIGTERM during this step of a stage."""
    def update_weights(trainer):
        if (trainer.name, trainer.step) == (stage, step - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        usual(trainer)
    usual, train.Trainer.update_weights = train.Trainer.update_weights, update_weights
    try:
        with pytest.raises(SystemExit) as stop:
            run(flags, out)
    finally:
        train.Trainer.update_weights = usual
    assert stop.value.code == 128 + signal.SIGTERM
    saved = torch.load(out / 'last.pt', weights_only=True)
    assert (saved['stage'], saved['step'], saved['unfinished']) == (stage, step, True)
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


def losses(out: Path, stage: str) -> np.ndarray:
    """The values logged for each training step and each validation."""
    names = dict(train=dict(vqvae=('reconstruction', 'vq', 'perceptual'), var=('loss',)),
                 val=dict(vqvae=('psnr', 'perplexity'), var=('loss', 'accuracy')))
    return np.concatenate([[float(row.get(name) or 0) for name in names[row['split']][stage]]
                           for row in curve(out, stage)])


def same_run(a: Path, b: Path) -> bool:
    """Whether both stages ended with the same weights, bit for bit, and the same curves."""
    return all(same_weights(a / f'{stage}.pt', b / f'{stage}.pt', stage)
               and curve(a, stage) == curve(b, stage) for stage in ('vqvae', 'var'))


def test_a_run_leaves_models_logs_and_images(tiny_run):
    assert {path.name for path in tiny_run.iterdir()} == {
        'vqvae.pt', 'var.pt', 'last.pt', 'vqvae.csv', 'var.csv', 'reconstructions.png', 'samples.png', 'lock'}
    assert Image.open(tiny_run / 'reconstructions.png').size == (4 * (8 * 34 - 2), 4 * (4 * 34 - 2))
    assert Image.open(tiny_run / 'samples.png').size == (4 * (10 * 34 - 2), 4 * (8 * 34 - 2))
    rows = curve(tiny_run, 'var')
    assert ' '.join(row['step'] + row['split'] for row in rows) == '1train 2train 2val 3train 4train 4val'
    for row in rows:
        by_scale = [float(row[f'loss_{scale}']) for scale in ('1x1', '2x2', '8x8')]
        assert float(row['loss']) == pytest.approx(np.average(by_scale, weights=[1, 4, 64]), rel=1e-4)
    _, var, defaults = sample.load(tiny_run / 'var.pt')
    assert var.class_names == list(train.FIGURES) and set(defaults) == {'cfg', 'top_k', 'top_p'}


@pytest.mark.parametrize('stage, step', [('vqvae', 3), ('var', 1)])
def test_a_stopped_run_ends_as_one_that_never_stopped(stage, step, tiny_run, tmp_path, capsys):
    out = stopped('', tmp_path / 'run', stage, step)
    assert f'stopped at step {step} of 4 ({stage}) and saved; to continue' in capsys.readouterr().out
    train.main([*TINY.split(), '--resume', '--seed', '0', '--out', str(out)])           # the same command
    assert same_run(resume(out), tiny_run)                          # nothing left to do, and nothing lost


def test_one_map_in_raster_order_is_trained_kept_resumed_and_drawn(tmp_path):
    flags = '--order raster --scales 8 --no-adaln --flip --keep-models '
    whole, out = run(flags, tmp_path / 'whole'), stopped(flags, tmp_path / 'run', 'var', 3)
    assert same_run(resume(out), whole)
    assert {path.name for path in out.glob('var*.pt')} == {'var.pt', 'var-2.pt', 'var-4.pt'}
    assert same_weights(out / 'var.pt', out / 'var-4.pt', 'var')                # the later one is better
    assert not same_weights(out / 'var-2.pt', out / 'var-4.pt', 'var')
    sample.main([str(out / 'var.pt'), '--count', '3', '--out', str(tmp_path / 'a.png')])
    assert Image.open(tmp_path / 'a.png').size == (4 * (3 * 34 - 2), 4 * (1 * 34 - 2))
    (out / 'var-3-good.pt').write_bytes(b'')                                # the user's file
    run('--overwrite --stage var --order raster --scales 8', out)
    assert {path.name for path in out.glob('var*.pt')} == {'var.pt', 'var-3-good.pt'}   # no others


def test_muon_moves_the_matrices_of_blocks_and_is_resumed(tiny_run, tmp_path):
    whole = run('--var-optimizer muon', tmp_path / 'whole')
    assert same_weights(whole / 'vqvae.pt', tiny_run / 'vqvae.pt', 'vqvae')     # stage 1 does not use it
    assert not same_weights(whole / 'var.pt', tiny_run / 'var.pt', 'var')
    assert same_run(resume(stopped('--var-optimizer muon', tmp_path / 'run', 'var', 3)), whole)
    trainer = trainer_of('--var-optimizer muon --depth 2')
    names = {id(weight): name for name, weight in trainer.networks['var'].named_parameters()}
    moved = {kind: [names[id(weight)] for group in optimizer.param_groups for weight in group['params']]
             for kind, optimizer in trainer.optimizers.items()}
    assert sorted(moved['muon'] + moved['var']) == sorted(names.values())
    assert set(moved['muon']) == {name for name, weight in trainer.networks['var'].named_parameters()
                                  if name.startswith('blocks.') and weight.ndim == 2}


def trainer_of(flags: str, device='cpu') -> train.Trainer:
    """A trainer of stage 2 before its first step."""
    args, _ = train.parse((TINY + flags).split())
    data = SimpleNamespace(count=10 ** 6, device=torch.device(device))
    return train.Trainer('var', VAR(train.make(VARConfig, args)).to(device), args, data, {}, [], [], 0.0)


def test_training_on_tokens_encoded_once_changes_nothing_but_speed(tmp_path):
    """With both views of --flip: training and held-out losses agree to 1e-5 with those from images."""
    out = run('--stage vqvae', tmp_path / 'tokenizer')
    flags = f'--stage var --tokenizer {out}/vqvae.pt --flip --var-steps 20 --save-every-steps 10 '
    slow, fast = (run(flags + flag, tmp_path / flag) for flag in ('--no-cache-tokens', '--cache-tokens'))
    gaps = np.abs(losses(slow, 'var') - losses(fast, 'var'))
    assert len(gaps) == 24 and gaps.max() <= 1e-5


def test_a_budget_fits_the_whole_schedule_into_its_minutes(tmp_path, monkeypatch):
    """Over two sessions, with a clock that advances one second a step; the first step of a session is not
    counted. Four steps of the classifier take four seconds from stage 1."""
    clock, clip = SimpleNamespace(now=0.0, monotonic=lambda: clock.now), torch.nn.utils.clip_grad_norm_

    def clip_for_a_second(*arguments):
        clock.now += 1
        return clip(*arguments)
    monkeypatch.setattr(train, 'time', clock)
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', clip_for_a_second)
    flags = TINY.replace('--vqvae-steps 4 --var-steps 4', '--budget-minutes 2 --budget-vqvae 0.25') + (
        f'--perceptual-weight 1 --classifier-steps 4 --save-every-steps 100 --stop-after-minutes {20 / 60} ')
    with pytest.raises(SystemExit):
        train.main([*flags.split(), '--out', str(tmp_path)])
    resume(tmp_path)
    vqvae, var = ([float(row['lr']) for row in curve(tmp_path, stage, 'train')] for stage in ('vqvae', 'var'))
    assert (len(vqvae), len(var)) == (29, 91)
    planned = [0.0005 * train.learning_rate(step / 90, 0.01) for step in range(91)]
    assert var[10:] == pytest.approx(planned[10:], abs=1.5e-5)


def test_the_schedule_warms_up_stays_and_falls_to_its_last_value(tmp_path):
    rates = [train.learning_rate(step / 1000, 0.1) for step in range(1001)]
    assert rates[0] == 0.005 and rates[10] == pytest.approx(0.5025) and rates[20] == 1 and rates[60] == 1
    assert rates[1000] == pytest.approx(0.1) and rates[534] == pytest.approx(0.55, abs=0.005)
    assert all(a > b for a, b in zip(rates[70:], rates[71:]))
    out = run('--stage vqvae --vqvae-steps 9 --vqvae-lr 0.32', tmp_path / 'run')
    rates = [float(row['lr']) for row in curve(out, 'vqvae', 'train')]
    assert rates == pytest.approx([0.01 * train.learning_rate(step / 8, 0.01) for step in range(9)], rel=1e-6)


def test_weight_decay_follows_half_a_cosine_where_there_is_any():
    trainer = trainer_of('--var-optimizer muon')
    trainer.args.last_weight_decay, trainer.total_steps = 0.08, 101
    for step, decay in [(0, 0.05), (25, 0.065 - 0.015 * math.cos(math.pi / 4)), (50, 0.065), (100, 0.08)]:
        trainer.step = step
        trainer.set_schedule()
        groups = {name: [group['weight_decay'] for group in optimizer.param_groups]
                  for name, optimizer in trainer.optimizers.items()}
        assert groups == dict(muon=[pytest.approx(decay)], var=[pytest.approx(decay), 0])


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
    flags = '--train-count 8 --var-steps 60 --var-lr 0.3 --save-every-steps 10'
    out = run(flags, tmp_path / 'run')
    losses = [float(row['loss']) for row in curve(out, 'var', 'val')]
    assert min(losses) < losses[-1] - 0.01                      # it has overfitted the eight images
    tokenizer, var, defaults = sample.load(out / 'var.pt')
    images, labels = train.draw_shapes(32, 2 ** 31)
    loss_BL, _ = train.transformer_loss(var, tokenizer, train.to_float(images), labels)
    assert loss_BL.mean().item() == pytest.approx(min(losses), rel=1e-4)
    drawn = [images for images, _ in sample.draw(tokenizer, var, [*range(10)] * 8, 0, 8, **defaults)]
    shown = np.asarray(Image.open(out / 'samples.png'))
    assert np.array_equal(shown, np.asarray(sample.grid(torch.cat(drawn), 10)))     # with var.pt's weights
    again = resume(stopped(flags, tmp_path / 'again', 'var', 55))
    assert same_run(again, out)
    assert (again / 'samples.png').read_bytes() == (out / 'samples.png').read_bytes()


@pytest.mark.parametrize('order, scales', [('scale', (1, 2, 4, 8)), ('raster', (8,))])
def test_8_images_are_learned_by_heart(order, scales):
    """A transformer that cannot overfit 8 images is broken. Try this when samples are bad."""
    images = train.to_float(train.draw_shapes(8, 0)[0])
    tokenizer = VQVAE(VQVAEConfig(channels=32, z_channels=4, vocab_size=64, scales=scales))
    tokenizer.codebook.weight.data.zero_()
    tokenizer.revive_codes(torch.ones(64, dtype=torch.bool), tokenizer.features(images))
    var = VAR(VARConfig(depth=2, num_classes=8, vocab_size=64, z_channels=4, scales=scales, order=order,
                        adaln_gamma_init=0.1))
    labels, tokens_BL = torch.arange(8), tokenizer.encode(images)
    optimizer = torch.optim.AdamW(var.parameters(), lr=3e-3)
    for _ in range(150):
        loss_BL, right_BL = train.transformer_loss(var, tokenizer, tokens_BL, labels)
        optimizer.zero_grad()
        loss_BL.mean().backward()
        optimizer.step()
    assert right_BL.all()
    drawn = var.generate(tokenizer, labels, cfg=0.0, top_k=1)
    torch.testing.assert_close(drawn, tokenizer.decode(tokens_BL))          # samples match pixel by pixel


# the adversarial and perceptual terms of stage 1
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
    # each network learns only from its own loss
    torch.testing.assert_close(last.grad, by_loss + 0.5 * weight * by_verdict, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(discriminator[0].weight.grad, from_hinge, rtol=1e-3, atol=1e-6)


def test_the_discriminator_joins_at_its_start_and_is_resumed(tmp_path):
    flags = ('--stage vqvae --vqvae-steps 12 --adversarial-weight 0.1 --discriminator-start 3 '
             '--save-every-steps 8 --vocab-size 128 --revive-every-steps 3')
    whole = run(flags, tmp_path / 'whole')
    assert [bool(row['adaptive']) for row in curve(whole, 'vqvae', 'train')] == [False] * 3 + [True] * 9
    out = resume(stopped(flags, tmp_path / 'run', 'vqvae', 7))              # between two code revivals
    assert same_weights(out / 'vqvae.pt', whole / 'vqvae.pt', 'vqvae')
    assert curve(out, 'vqvae') == curve(whole, 'vqvae')


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


@pytest.mark.slow
def test_the_classifier_of_the_perceptual_term_learns_first_and_is_resumed(tmp_path, capsys):
    flags = '--stage vqvae --perceptual-weight 1 --classifier-steps 30 --train-count 640'
    whole = run(flags, tmp_path / 'whole')
    right = float(re.search('classifier: (.*)% accuracy on held-out', capsys.readouterr().out)[1])
    assert right > 25 and all(float(row['perceptual']) > 0 for row in curve(whole, 'vqvae', 'train'))
    out = resume(stopped(flags, tmp_path / 'run', 'vqvae', 1))
    assert capsys.readouterr().out.count('classifier: ') == 1               # it isn't trained again
    assert same_weights(out / 'vqvae.pt', whole / 'vqvae.pt', 'vqvae')
    with pytest.raises(SystemExit):
        run(flags + ' --stop-after-minutes 1e-9', tmp_path / 'early')       # during its training
    assert same_weights(resume(tmp_path / 'early') / 'vqvae.pt', whole / 'vqvae.pt', 'vqvae')


def test_lpips_is_asked_for_by_its_flag(capsys, monkeypatch):
    """The wiring, with a small random network in place of lpips."""
    class StandIn(torch.nn.Conv2d):
        def forward(self, a, b):
            return (super().forward(a) - super().forward(b)).square().mean((1, 2, 3), keepdim=True)
    monkeypatch.setitem(sys.modules, 'lpips', None)                 # as if it were not installed
    with pytest.raises(sample.UserError, match='--perceptual lpips: pip install lpips, or omit it'):
        train.load_lpips(torch.device('cpu'))
    stand_in = SimpleNamespace(LPIPS=lambda net, verbose: StandIn(3, 4, 3))
    monkeypatch.setitem(sys.modules, 'lpips', stand_in)
    tokenizer, _, args, images = adversarial_setting()
    network = train.load_lpips(torch.device('cpu'))
    total, metrics, _ = train.tokenizer_loss(tokenizer, images, args, network, None)
    torch.testing.assert_close(total, metrics['reconstruction'] + 2 * metrics['perceptual'] + metrics['vq'])
    assert metrics['perceptual'] > 0 and not any(weight.requires_grad for weight in network.parameters())
