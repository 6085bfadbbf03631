"""The specification of this project, as tests, top down like the method. Run: pytest [-m 'not slow']

The pyramid, the tokenizer, the transformer, sampling, released weights, data, training, many processes and
stops (the 20 kills: pytest -m many_kills), costs, mistakes, README.
"""
import csv
import hashlib
import json
import math
import os
import re
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sample
import train
import var as var_module
import vqvae as vqvae_module
from var import VAR, VARConfig
from vqvae import VQVAE, Discriminator, VQVAEConfig

HERE = Path(__file__).parent
sys.path.append(str(HERE / 'notebooks'))
import curves                                                               # noqa: E402
import judge                                                                # noqa: E402
import measure                                                              # noqa: E402

SCALES = (1, 2, 3, 5)                   # none divides the next: areas overlap, which is the hard case
PARITY = json.loads((HERE / 'notebooks/parity.json').read_text())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def tokenizer():
    model = VQVAE(VQVAEConfig(image_size=10, patch_size=2, channels=32, z_channels=4, vocab_size=16,
                              scales=SCALES))
    model.codebook.weight.data.mul_(0.3)
    return model.eval()


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


@pytest.mark.parametrize('scales', [(1,), (2, 5), (1, 3, 3, 5), (1, 5, 3), (1, 2, 4), ()])
def test_a_pyramid_that_does_not_rise_from_1_to_the_latent_size_is_refused(scales):
    with pytest.raises(ValueError, match='^scales='):
        VQVAEConfig(image_size=10, patch_size=2, scales=scales)


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


def test_labels_are_dropped_in_training_only():
    model = small_var(label_dropout=0.5, stochastic_depth=0.0)
    labels, inputs = torch.zeros(64, dtype=torch.int64), torch.randn(1, 38, 4).expand(64, -1, -1)
    own, null = model(labels[:1], inputs[:1])[0], model(labels[:1] + 3, inputs[:1])[0]
    torch.testing.assert_close(model(labels, inputs), own.expand(64, -1, -1), atol=1e-5, rtol=1e-5)
    trained = model.train()(labels, inputs)
    dropped = (trained - null).abs().amax((1, 2)) < 1e-4
    assert 16 <= dropped.sum() <= 48
    kept = trained[~dropped]
    torch.testing.assert_close(kept, own.expand(len(kept), -1, -1), atol=1e-4, rtol=1e-4)


def test_stochastic_depth_rises_linearly_and_skips_in_training_only():
    assert [block.drop_rate for block in small_var(depth=3, stochastic_depth=0.4).blocks] == [0, 0.2, 0.4]
    block, gamma = small_var().blocks[-1], torch.ones(1000, 1, 4)
    assert block.drop_rate == pytest.approx(0.1 * 2 / 24)
    block.drop_rate = 0.25
    assert torch.equal(block.eval().drop(gamma), gamma)
    kept = block.train().drop(gamma)
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.75]) and kept.mean() == pytest.approx(1, abs=0.1)


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


def test_guidance_rises_from_nothing_at_the_first_scale_to_cfg_at_the_last(tokenizer):
    var, labels = small_var(), torch.tensor([0, 1])
    conditional, unconditional, tokens_BL = logits_while_generating(var, tokenizer, labels, cfg=3.0, top_k=1)
    t_L = torch.cat([torch.full((side * side,), 3.0 * k / 3) for k, side in enumerate(SCALES)])[:, None]
    assert t_L[0] == 0 and t_L[-1] == 3
    assert torch.equal(tokens_BL, (conditional + t_L * (conditional - unconditional)).argmax(-1))
    assert not torch.equal(tokens_BL, conditional.argmax(-1))


def test_cfg_0_and_the_null_class_are_not_guided(tokenizer):
    var, noise, labels = small_var(), torch.rand(2, 39), torch.tensor([0, 1])
    conditional, _, tokens_BL = logits_while_generating(var, tokenizer, labels, cfg=0.0, noise_BL=noise)
    assert torch.equal(tokens_BL, var_module.draw_tokens(conditional, noise, 900, 0.96))
    null = torch.tensor([3, 3])
    a, b = (logits_while_generating(var, tokenizer, null, cfg=cfg, noise_BL=noise)[2] for cfg in (0.0, 4.0))
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


def test_the_same_noise_gives_the_same_picture_in_any_batch(tokenizer):
    var, labels = small_var(), [0, 1, 2, 0, 1]
    runs = [[torch.cat(parts) for parts in zip(*sample.draw(tokenizer, var, labels, 7, batch_size))]
            for batch_size in (5, 2, 5)]
    assert torch.equal(runs[0][1], runs[1][1])                                  # tokens
    torch.testing.assert_close(runs[0][0], runs[1][0], atol=1e-5, rtol=0)       # pictures, up to rounding
    assert torch.equal(runs[0][0], runs[2][0])                                  # to the bit
    other = torch.cat([tokens for _, tokens in sample.draw(tokenizer, var, labels, 8, 5)])
    assert not torch.equal(runs[0][1], other)


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


@pytest.mark.parametrize('model, change, key', [
    (VAR, lambda w: w.pop('blocks.1.ffn.fc1.bias'), 'blocks.1.ffn.fc1.bias'),
    (VAR, lambda w: w.pop('head.weight'), 'head.weight'),
    (VAR, lambda w: w.update({'blocks.0.ada_gss': w['head.bias']}), 'blocks.0.ada_gss'),
    (VAR, lambda w: w.update({'pos_1LC': w['pos_1LC'][:, :-1]}), 'pos_1LC'),
    (VQVAE, lambda w: w.pop('decoder.up.4.attn.2.qkv.weight'), 'decoder.up.4.attn.2.qkv.weight'),
    (VQVAE, lambda w: w.pop('quantize.embedding.weight'), 'quantize.embedding.weight'),
    (VQVAE, lambda w: w.update({'quant_conv.extra': w['quant_conv.bias']}), 'quant_conv.extra'),
    (VQVAE, lambda w: w.update({'post_quant_conv.bias': torch.zeros(9)}), 'post_quant_conv.bias')])
def test_a_state_dict_that_does_not_fit_is_refused_by_its_first_key(model, change, key):
    weights = recipe(PARITY['adaln']['var_keys' if model is VAR else 'vqvae_keys'])
    change(weights)
    with pytest.raises(ValueError, match=re.escape(key)):
        model.from_official(weights, (1, 2, 3, 4))


# ------------------------------------------------------------------------------------------------ data
def test_drawings_follow_from_the_seed_and_differ_between_seeds():
    images, labels = train.draw_shapes(40, seed=5, size=24)
    assert images.shape == (40, 3, 24, 24) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [4] * 10
    assert torch.equal(images, train.draw_shapes(40, seed=5, size=24)[0])
    both = torch.cat([images, train.draw_shapes(40, seed=6, size=24)[0]])
    assert len({picture.numpy().tobytes() for picture in both}) == 80


def write_cifar(folder: Path, content: bytes) -> Path:
    (folder / 'cifar-10-batches-bin').mkdir(parents=True)
    for name in train.CIFAR10_FILES:
        (folder / 'cifar-10-batches-bin' / name).write_bytes(content)
    return folder


@pytest.fixture(scope='module')
def cifar(tmp_path_factory):
    """Files in CIFAR-10's format, filled with noise."""
    records = np.random.RandomState(0).randint(0, 256, (10_000, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    folder = write_cifar(tmp_path_factory.mktemp('cifar'), records.tobytes())
    yield folder
    shutil.rmtree(folder)


def test_cifar10_is_read_as_its_format_says(cifar):
    images, labels, test_images, test_labels = train.read_cifar10(str(cifar))
    assert images.shape == (50_000, 3, 32, 32) and test_images.shape == (10_000, 3, 32, 32)
    raw = (cifar / 'cifar-10-batches-bin/data_batch_1.bin').read_bytes()[3073 * 7:3073 * 8]
    assert labels[7] == raw[0] and labels[40_007] == raw[0] and test_labels[7] == raw[0]
    assert images[7, 1, 2, 3] == raw[1 + 1024 + 2 * 32 + 3]             # green, row 2, column 3
    assert torch.equal(train.read_cifar10(str(cifar / 'cifar-10-batches-bin'))[0], images)


def test_a_download_is_whole_or_not_at_all(tmp_path):
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
    for picture, source in zip(train.augment(images, noise, flip=True, crop=1), padded):
        found |= {(turned, y, x) for turned in (False, True) for y in range(3) for x in range(3)
                  if picture.equal(source[:, y:y + 8, x:x + 8].flip([-1] * turned))}
    assert len(found) > 14                                      # of 18: mirrored or not, 3x3 shifts
    assert train.augment(images, noise, flip=False, crop=0) is images


def write_pictures(folder: Path, count: int, size=(40, 30), classes=('bird', 'cat', 'dog'), mode='RGB'):
    """train/<class>/<i>.png, smooth and all different."""
    for i in range(count):
        noise = np.random.RandomState(i).randint(0, 256, (4, 5, 3), dtype=np.uint8)
        path = folder / 'train' / classes[i % len(classes)] / f'{i:04d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).resize(size, Image.BICUBIC).convert(mode).save(path)
    return folder


def folder_data(folder: Path, size=16, device='cpu', **settings) -> train.FolderData:
    config = train.TrainConfig(data_dir=str(folder), **dict(batch_size=4, workers=0) | settings)
    return train.FolderData(config, size, torch.device(device))


@pytest.mark.parametrize('w, h', [(200, 150), (150, 201), (97, 97), (20, 30)])
def test_a_crop_is_what_resizing_the_whole_picture_and_cutting_gives(w, h, tmp_path):
    noise = np.random.RandomState(0).randint(0, 256, (h // 4, w // 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((w, h), Image.BICUBIC).save(tmp_path / 'a.png')
    size, shorter = 64, 72
    W, H = (shorter, int(72 * h / w)) if w <= h else (int(72 * w / h), shorter)
    whole = np.asarray(Image.open(tmp_path / 'a.png').resize((W, H), Image.LANCZOS), np.int16)
    random = np.random.default_rng(3)
    x, y = int(random.integers(W - size + 1)), int(random.integers(H - size + 1))
    middle = (None, round((W - size) / 2), round((H - size) / 2))
    for random, x, y in [(np.random.default_rng(3), x, y), middle]:
        cut = sample.read_picture(tmp_path / 'a.png', size, random)
        gap = np.abs(cut - whole[y:y + size, x:x + size])
        assert cut.shape == (64, 64, 3) and gap.max() <= 1                  # rounded to whole levels


def test_a_large_jpeg_is_decoded_smaller_and_grey_becomes_rgb(tmp_path):
    noise = np.random.RandomState(0).randint(0, 256, (30, 40), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((640, 480), Image.BICUBIC)
    picture.save(tmp_path / 'a.jpg', quality=95)
    picture.save(tmp_path / 'a.png')
    jpeg, png = (sample.read_picture(tmp_path / name, 64).astype(int) for name in ('a.jpg', 'a.png'))
    assert np.abs(jpeg - png).mean() < 1 and (png[..., 0] == png[..., 2]).all()


def test_classes_come_from_the_folders_and_a_tenth_is_held_out(tmp_path, capsys):
    data = folder_data(write_pictures(tmp_path, 60))
    assert data.class_names == ['bird', 'cat', 'dog'] and (data.count, data.val_count) == (54, 6)
    assert '6 of 60 pictures are held out' in capsys.readouterr().out
    paths = [{os.fsdecode(path) for path in reader.paths} for reader in (data.reader, data.val_reader)]
    assert not paths[0] & paths[1] and len(paths[0] | paths[1]) == 60
    assert all(data.class_names[label] in os.fsdecode(path)
               for path, label in zip(data.reader.paths, data.reader.labels))
    same, other = folder_data(tmp_path), folder_data(tmp_path, seed=1)
    assert data.fingerprint == same.fingerprint != other.fingerprint
    shutil.copytree(tmp_path / 'train/cat', tmp_path / 'val/cat')
    shutil.copytree(tmp_path / 'train/cat', tmp_path / 'val/owl')
    data = folder_data(tmp_path, val_count=7, train_count=50)
    assert data.class_names == ['bird', 'cat', 'dog', 'owl'] and (data.count, data.val_count) == (50, 7)
    assert '1 of the classes in val/ have no pictures' in capsys.readouterr().out


def test_a_batch_of_a_folder_follows_from_its_step_alone(tmp_path):
    folder = write_pictures(tmp_path, 30)
    data, late = folder_data(folder, flip=True), folder_data(folder, workers=2)
    batches = [data.batch(step) for step in range(14)]              # 27 to train on: 6 steps an epoch
    late.reader.flip = True
    for step in (9, 10, 3):
        assert all(torch.equal(a, b) for a, b in zip(late.batch(step), batches[step]))
    assert batches[0][0].shape == (4, 3, 16, 16) and -1 <= batches[0][0].min() < batches[0][0].max() <= 1
    seen = [torch.cat([data.numbers(step)[1] for step in range(e, e + 6)]).tolist() for e in (0, 6)]
    assert len(set(seen[0])) == 24 and seen[0] != seen[1]
    crops = {data.reader[epoch, 5][0].tobytes() for epoch in range(20)}
    assert len(crops) > 10 and len({data.reader[-1, 5][0].tobytes() for _ in range(3)}) == 1
    centres = torch.cat([images for images, _ in data.val_batches(2)])
    assert torch.equal(centres, data.val_pictures(9)) and len(centres) == 3


@pytest.mark.parametrize('workers', [0, 1])
def test_broken_pictures_are_named_and_left_out_until_they_are_too_many(workers, tmp_path, capfd):
    folder = write_pictures(tmp_path, 200)
    (folder / 'train/bird/0000.png').write_bytes(b'no picture')
    good = (folder / 'train/cat/0001.png').read_bytes()
    (folder / 'train/cat/0001.png').write_bytes(good[:len(good) // 2])
    data = folder_data(folder, workers=workers, batch_size=60)
    for step in range(6):
        assert data.batch(step)[0].amax((1, 2, 3)).min() > -0.5     # a neighbour, no black square
    list(data.val_batches(10))
    for _ in range(2):
        data.agree_on_broken()                                      # names each once
    named = [line for line in capfd.readouterr().err.splitlines() if 'broken' in line]
    assert len(named) == 2 and 'bird/0000.png' in named[0] and 'cat/0001.png' in named[1]
    (folder / 'train/dog/0002.png').write_bytes(b'')
    with pytest.raises(sample.UserError, match='3 of 200 pictures are broken'):
        for step in range(6, 12):
            data.batch(step)
        list(data.val_batches(10))


# -------------------------------------------------------------------------------------------- training
TINY = ('--train-count 64 --val-count 32 --batch-size 8 --channels 32 --z-channels 4 --vocab-size 16 '
        '--scales 1 2 8 --depth 1 --device cpu --vqvae-steps 4 --var-steps 4 --log-every-steps 1 '
        '--save-every-steps 2 ')


def run(flags: str, out: Path):
    train.main((TINY + flags).split() + ['--out', str(out)])
    return out


@pytest.fixture(scope='module')
def tiny_run(tmp_path_factory):
    return run('', tmp_path_factory.mktemp('runs') / 'run')


def same_weights(a, b, stage):
    a, b = (torch.load(path, weights_only=True)[stage] for path in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_models_logs_and_pictures(tiny_run):
    assert {path.name for path in tiny_run.iterdir()} == {
        'vqvae.pt', 'var.pt', 'last.pt', 'previous.pt', 'vqvae.csv', 'var.csv', 'reconstructions.png',
        'samples.png'}
    assert Image.open(tiny_run / 'reconstructions.png').size == (2 * (16 * 34 - 2), 2 * (4 * 34 - 2))
    assert Image.open(tiny_run / 'samples.png').size == (2 * (10 * 34 - 2), 2 * (8 * 34 - 2))
    rows = list(csv.DictReader((tiny_run / 'var.csv').open()))
    assert ' '.join(row['step'] + row['split'] for row in rows) == '1train 2train 2val 3train 4train 4val'
    by_scale = [float(rows[-1][f'loss_{scale}']) for scale in ('1x1', '2x2', '8x8')]
    assert float(rows[-1]['loss']) == pytest.approx(np.average(by_scale, weights=[1, 4, 64]), rel=1e-4)
    tokenizer, var, defaults = sample.load(tiny_run / 'var.pt')
    assert var.class_names == list(train.FIGURES) and set(defaults) == {'cfg', 'top_k', 'top_p'}
    assert var.generate(tokenizer, torch.tensor([0, 10]), **defaults).shape == (2, 3, 32, 32)


def test_a_resumed_run_ends_with_the_weights_of_one_that_never_stopped(tiny_run, tmp_path):
    out = tmp_path / 'run'
    shutil.copytree(tiny_run, out)
    (out / 'last.pt').write_bytes((out / 'last.pt').read_bytes()[:1000])    # torn: previous.pt serves, step 2
    os.remove(out / 'var.pt')
    train.main(['--resume', '--out', str(out), '--seed', '0', '--stage', 'both'])       # no other than it had
    assert same_weights(out / 'var.pt', tiny_run / 'var.pt', 'var')
    logs = [list(csv.DictReader((folder / 'var.csv').open())) for folder in (out, tiny_run)]
    for rows in zip(*logs):
        assert len({tuple(row[name] for name in row if not name.endswith('_per_s')) for row in rows}) == 1


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
    train.main(f'--stage var --tokenizer {tmp_path}/vae.pth --scales 1 2 3 4 --depth 1 --var-steps 1 '
               f'--train-count 16 --val-count 4 --batch-size 4 --device cpu --out {tmp_path}/out'.split())
    tokenizer, var, _ = sample.load(tmp_path / 'out/var.pt')
    assert tokenizer.config.image_size == 64 and var.config.vocab_size == 64
    # where the preset knows the released pyramid, nobody has to say it; where it doesn't, nothing is assumed
    for given, sides in [(dict(preset='imagenet256'), 10), (dict(preset='shapes'), None)]:
        with pytest.raises(sample.UserError, match='say its --scales') if not sides else nullcontext():
            tokenizer = train.load_tokenizer(tmp_path / 'vae.pth', given, train.resolve(given)[0])
            assert len(tokenizer.config.scales) == sides and tokenizer.config.image_size == 256


def test_the_schedule_warms_up_stays_and_falls_to_its_last_value():
    rates = [train.learning_rate(step, 1000, 0.1) for step in range(1000)]
    assert rates[0] == 0.005 and rates[10] == pytest.approx(0.5025) and rates[20] == 1 and rates[60] == 1
    assert rates[999] == pytest.approx(0.1) and rates[534] == pytest.approx(0.55, abs=0.005)
    assert all(a > b for a, b in zip(rates[70:], rates[71:]))
    assert 0 < train.learning_rate(0, 1, 0.1) <= 1


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
    row = list(csv.DictReader((out / 'vqvae.csv').open()))[-1]
    assert float(row['use']) == 100 and float(row['psnr']) > 14


@pytest.mark.slow
def test_8_pictures_are_learned_by_heart():
    """A transformer that can't overfit 8 pictures is broken: the thing to try when samples are bad."""
    images = train.to_float(train.draw_shapes(8, 0)[0])
    tokenizer = VQVAE(VQVAEConfig(channels=32, z_channels=4, vocab_size=64, scales=(1, 2, 4, 8)))
    tokenizer.codebook.weight.data.zero_()
    tokenizer.revive_codes(torch.ones(64, dtype=torch.bool), tokenizer.features(images))
    var = VAR(VARConfig(depth=2, num_classes=8, vocab_size=64, z_channels=4, scales=(1, 2, 4, 8),
                        label_dropout=0.0, stochastic_depth=0.0, adaln_gamma_init=0.1))
    labels = torch.arange(8)
    tokens_BL = tokenizer.encode(images)
    inputs_BLC = tokenizer.teacher_inputs(tokens_BL)
    optimizer = torch.optim.AdamW(var.parameters(), lr=3e-3)
    for _ in range(150):
        logits_BLV = var(labels, inputs_BLC)
        optimizer.zero_grad()
        F.cross_entropy(logits_BLV.transpose(1, 2), tokens_BL).backward()
        optimizer.step()
    assert (var(labels, inputs_BLC).argmax(-1) == tokens_BL).all()
    drawn = var.eval().generate(tokenizer, labels, cfg=0.0, top_k=1)
    torch.testing.assert_close(drawn, tokenizer.decode(tokens_BL))          # and draws them, pixel by pixel


def test_the_hinge_and_the_adaptive_weight_are_those_of_the_papers(tmp_path):
    task = tokenizer_task(tmp_path, adversarial_weight=0.5, discriminator_channels=16)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    task.before_step(0, images)
    reconstruction, _, _ = task.model(images)
    loss, discriminator = F.mse_loss(reconstruction, images), task.modules['discriminator']
    added, terms = task.adversarial_terms(images, reconstruction, loss)
    real, made = discriminator(images), discriminator(reconstruction)
    hinge = ((1 - real).clamp(min=0).mean() + (1 + made).clamp(min=0).mean()) / 2
    assert terms['discriminator'].item() == pytest.approx(hinge.item(), rel=1e-4)
    assert terms['generator'].item() == pytest.approx(-made.mean().item(), rel=1e-3)
    last = task.model.decoder.conv_out.weight
    by_loss, = torch.autograd.grad(loss, last, retain_graph=True)
    by_verdict, = torch.autograd.grad(-made.mean(), last, retain_graph=True)
    weight = by_loss.norm() / (by_verdict.norm() + 1e-4)
    assert terms['adaptive'].item() == pytest.approx(weight.item(), rel=1e-3)
    from_hinge = torch.autograd.grad(hinge, discriminator[0].weight, retain_graph=True)[0]
    added.backward()
    # each learns from its own loss alone
    torch.testing.assert_close(last.grad, 0.5 * weight * by_verdict, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(discriminator[0].weight.grad, from_hinge, rtol=1e-3, atol=1e-6)


def test_under_autocast_the_discriminator_learns_though_its_weights_were_frozen_before(tmp_path):
    """Autocast keeps bfloat16 copies of weights: copies made while frozen must not serve the second pass."""
    task = tokenizer_task(tmp_path, adversarial_weight=0.5, discriminator_channels=16)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    task.before_step(0, images)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss, metrics = task.loss(images, None)
    loss.backward()
    for parameter in task.modules['discriminator'].parameters():
        assert parameter.ndim == 1 or parameter.grad.abs().sum() > 0
    assert metrics['discriminator'].dtype == torch.float32 and metrics['adaptive'] > 0


def tokenizer_task(out: Path, **settings) -> train.TokenizerTask:
    config = train.TrainConfig(train_count=16, val_count=4, batch_size=4, **settings)
    data = train.ArrayData(config, 32, torch.device('cpu'))
    model = VQVAE(VQVAEConfig(channels=32, z_channels=4, vocab_size=16, scales=(1, 2, 8)))
    return train.TokenizerTask(train.Run({}, config, out, data, 4, None, [], [], 0.0), model)


def test_a_patch_of_the_discriminator_is_70_pixels():
    network, image = Discriminator(16), torch.zeros(1, 3, 128, 128, requires_grad=True)
    for layer in network:                   # a norm sees the whole picture: without, a verdict sees a patch
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
    rows = [row for row in csv.DictReader((whole / 'vqvae.csv').open()) if row['split'] == 'train']
    assert [bool(row['adaptive']) for row in rows] == [False] * 3 + [True] * 9
    out = tmp_path / 'resumed'
    shutil.copytree(whole, out)
    os.remove(out / 'last.pt')              # previous.pt is from step 8, between two revivals of codes
    train.main(['--resume', '--out', str(out)])
    assert same_weights(out / 'vqvae.pt', whole / 'vqvae.pt', 'vqvae')
    plain = run(flags.replace('weight 0.1', 'weight 0'), tmp_path / 'plain')
    assert not same_weights(plain / 'vqvae.pt', whole / 'vqvae.pt', 'vqvae')


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
    flags = [*TINY.split(), '--stage', 'vqvae', '--perceptual-weight', '1', '--out', str(tmp_path / 'run')]
    error = complaint(train.main, flags, capsys, monkeypatch)
    assert '--perceptual-weight' in error and 'pip install lpips' in error
    monkeypatch.setitem(sys.modules, 'lpips', type(sys)('lpips'))
    sys.modules['lpips'].LPIPS = StandIn
    train.main(flags)
    row = next(csv.DictReader((tmp_path / 'run/vqvae.csv').open()))
    assert float(row['perceptual']) > 0
    task = tokenizer_task(tmp_path, perceptual_weight=2.0)
    images = torch.rand(2, 3, 32, 32)
    total, metrics = task.loss(images, None)
    parts = metrics['reconstruction'] + 2 * metrics['perceptual'] + metrics['vq']
    torch.testing.assert_close(total, parts)
    assert not any(parameter.requires_grad for parameter in task.lpips.parameters())


def test_weight_decay_follows_half_a_cosine():
    decay = [train.weight_decay(step, 101, 0.05, 0.08) for step in (0, 25, 50, 100)]
    assert decay == pytest.approx([0.05, 0.065 - 0.015 * math.cos(math.pi / 4), 0.065, 0.08])


RELEASED = [(16, 310283520, 768, 200, 1e-4, 1e-3, 0.1, None),
            (20, 600917136, 768, 250, 1e-4, 1e-3, 0.1, None),
            (24, 1033399360, 768, 350, 8e-5, 1e-4, 0.01, None),
            (30, 2010020356, 1024, 350, 8e-5, 1e-5, 0.01, 0.08),
            (36, 2353893904, 768, 350, 8e-5, 5e-6, 0.01, 0.08)]


@pytest.mark.parametrize('depth, parameters, batch, epochs, lr, gamma, last_lr, last_decay', RELEASED)
def test_depth_chooses_the_released_recipe(depth, parameters, batch, epochs, lr, gamma, last_lr, last_decay):
    preset = 'imagenet512' if depth == 36 else 'imagenet256'
    settings, _ = train.resolve(dict(preset=preset, depth=depth))
    found = [settings[name] for name in ('batch_size', 'var_epochs', 'var_lr', 'adaln_gamma_init', 'last_lr',
                                         'last_weight_decay')]
    assert found == [batch, epochs, lr, gamma, last_lr, last_decay] and settings['weight_decay'] == 0.05
    assert settings['shared_adaln'] == (depth == 36)
    assert train.cost(settings)['parameters'] == parameters     # as many as the authors' models have
    assert VQVAEConfig(**{name: settings[name] for name in VQVAEConfig.__dataclass_fields__}).stride == 16


def test_what_is_given_goes_before_recipe_and_preset_and_epochs_before_steps():
    settings, _ = train.resolve(dict(preset='imagenet256', depth=20, var_lr=3e-4))
    assert settings['var_lr'] == 3e-4 and settings['var_epochs'] == 250
    assert train.resolve(dict(var_epochs=3.0))[0]['var_steps'] is None
    with pytest.raises(sample.UserError, match='--var-epochs, --var-steps'):
        train.resolve(dict(var_epochs=3.0, var_steps=3))
    with pytest.raises(sample.UserError, match='--budget-minutes, --vqvae-steps'):
        train.resolve(dict(budget_minutes=3.0, vqvae_steps=3))


# ------------------------------------------------------------------------------- many processes and stops
def start(flags: str, out: Path, ranks=0, script=HERE / 'train.py') -> subprocess.Popen:
    """train.py in a process of its own, under torchrun if ranks are asked for; what it says is in out.txt."""
    torchrun = f'-m torch.distributed.run --standalone --nproc-per-node {ranks}'.split() if ranks else []
    with open(out.with_suffix('.txt'), 'a') as said:
        return subprocess.Popen([sys.executable, *torchrun, str(script), *flags.split(), '--out', str(out)],
                                stdout=said, stderr=said, env=os.environ | dict(OMP_NUM_THREADS='1'))


def said(out: Path) -> str:
    return out.with_suffix('.txt').read_text()


def finish(process: subprocess.Popen, out: Path, status=0) -> Path:
    assert process.wait(timeout=300) == status, said(out)
    return out


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


def curve(out: Path, stage: str) -> list[dict]:
    rows = list(csv.DictReader((out / f'{stage}.csv').open()))
    return [{name: value for name, value in row.items() if not name.endswith('_per_s')} for row in rows]


def same_run(a: Path, b: Path) -> bool:
    """Both stages ended with the same weights to the bit, and with the same curves."""
    return all(same_weights(a / f'{stage}.pt', b / f'{stage}.pt', stage)
               and curve(a, stage) == curve(b, stage) for stage in ('vqvae', 'var'))


many_kills = [pytest.mark.many_kills, pytest.mark.slow]


@pytest.mark.slow
@pytest.mark.parametrize('ranks, kills', [(0, 3), (2, 3), pytest.param(0, 20, marks=many_kills),
                                          pytest.param(2, 20, marks=many_kills)])
def test_a_run_that_is_killed_and_resumed_ends_as_if_nothing_had_been(ranks, kills, tmp_path):
    """SIGKILL to all its processes at random moments, of which many fall into the writing of a checkpoint."""
    seed = random.randrange(10 ** 6)
    print(f'moments of the kills: seed {seed}')
    moments = random.Random(seed)
    flags = TINY + f'--vqvae-steps {8 * kills} --var-steps {8 * kills} --log-every-steps 3 '
    flags += '--vocab-size 128 --revive-every-steps 5 '
    calm = finish(start(flags, tmp_path / 'calm', ranks), tmp_path / 'calm')
    out, last, done = tmp_path / 'run', tmp_path / 'run/last.pt', 0
    while done < kills:
        before = last.stat().st_mtime_ns if last.exists() else None
        process = start(flags if before is None else '--resume', out, ranks)
        while process.poll() is None and not (last.exists() and last.stat().st_mtime_ns != before):
            time.sleep(0.01)                                    # until it has come further than the last one
        assert process.poll() is None, said(out)
        time.sleep(moments.uniform(0, 0.5))
        kill_all(process)
        done += 1
    finish(start('--resume', out, ranks), out)
    assert same_run(out, calm)


@pytest.mark.slow
@pytest.mark.parametrize('number, status, ranks', [(signal.SIGINT, 130, 0), (signal.SIGTERM, 143, 0),
                                                   (signal.SIGTERM, 1, 2)])
def test_a_stop_saves_and_names_the_command_that_goes_on(number, status, ranks, tmp_path):
    out = tmp_path / 'run'
    flags = TINY + '--vqvae-steps 5 --var-steps 120 --save-every-steps 1000 --log-every-steps 7 '
    process = start(flags, out, ranks)
    while not ((out / 'var.csv').exists() and len(curve(out, 'var')) > 3):
        assert process.poll() is None, said(out)
        time.sleep(0.01)
    process.send_signal(number)
    finish(process, out, status)                                # torchrun's own status is 1
    stop = re.search(r'stopped at step (\d+) of 120 of var, all saved; to go on: (.*)', said(out))
    step, command = stop.groups()
    assert 21 < int(step) < 120
    assert command.startswith('torchrun --nproc-per-node 2 train.py' if ranks else 'python train.py')
    finish(start(command.split('train.py ')[1].split(' --out')[0], out, ranks), out)
    assert same_run(out, finish(start(flags, tmp_path / 'calm', ranks), tmp_path / 'calm'))


def stop_and_resume(flags: str, out: Path, sessions: int):
    """A run in sessions of --stop-after-minutes each, but for the last, which goes on to the end."""
    for i in range(sessions - 1):
        with pytest.raises(SystemExit) as stop:
            train.main((flags if i == 0 else '--resume ').split()
                       + ['--stop-after-minutes', '1e-9', '--out', str(out)])
        assert stop.value.code == 0
    train.main(['--resume', '--out', str(out)])


def test_stopping_after_minutes_saves_and_leaves_the_schedule_as_it_was(tiny_run, tmp_path, capsys):
    stop_and_resume(TINY, tmp_path / 'run', 9)              # after every step, in both stages
    stop = 'stopped at step 1 of 4 of var, all saved; to go on: python train.py --resume'
    assert stop in capsys.readouterr().out
    assert same_run(tmp_path / 'run', tiny_run)


def test_a_budget_fits_the_whole_schedule_into_its_minutes_over_all_sessions(tmp_path, monkeypatch):
    """By a clock that a step moves by a second; it doesn't count the first step of a session."""
    clock, real_step = SimpleNamespace(now=0.0, monotonic=lambda: clock.now), train.training_step

    def step_of_a_second(*arguments):
        clock.now += 1
        return real_step(*arguments)

    monkeypatch.setattr(train, 'time', clock)
    monkeypatch.setattr(train, 'training_step', step_of_a_second)
    flags = TINY.replace('--vqvae-steps 4 --var-steps 4', '--budget-minutes 2 --budget-vqvae 0.25')
    flags += f'--save-every-steps 100 --stop-after-minutes {50 / 60} --out {tmp_path}'
    with pytest.raises(SystemExit):
        train.main(flags.split())                           # stage 1, and 19 steps of stage 2
    train.main(['--resume', '--out', str(tmp_path)])
    rates = {stage: [float(row['lr']) for row in curve(tmp_path, stage) if row['split'] == 'train']
             for stage in ('vqvae', 'var')}
    assert len(rates['vqvae']) == 30 + 1 and len(rates['var']) == 90 + 2
    peak = 0.016 * 8 / 256
    assert rates['var'][0] == pytest.approx(0.005 * peak) and rates['var'][1] < 0.1 * peak     # a warm-up
    planned = [peak * train.learning_rate(step, 92, 0.01) for step in range(92)]
    assert rates['var'][10:] == pytest.approx(planned[10:], abs=0.02 * peak)


def losses(out: Path, stage: str) -> np.ndarray:
    """What was logged of each training step, and of the validations."""
    names = dict(train=dict(vqvae=('reconstruction', 'vq'), var=('loss',)),
                 val=dict(vqvae=('psnr', 'perplexity'), var=('loss', 'accuracy')))
    return np.concatenate([[float(row[name]) for name in names[row['split']][stage]]
                           for row in curve(out, stage)])


@pytest.mark.slow
def test_two_processes_train_as_one_and_a_batch_may_be_cut_into_parts(tmp_path):
    """Same losses over 20 steps to 1e-5. Even with dropout on, if the parts of the batch are the same."""
    flags = TINY + ('--vqvae-steps 20 --var-steps 20 --save-every-steps 20 --vocab-size 128 '
                    '--revive-every-steps 3 ')
    quiet = flags + '--label-dropout 0 --stochastic-depth 0 '
    loud = flags + '--label-dropout 0.5 --flip --crop 2 --micro-batch-size 2 '
    adversarial = flags + ('--adversarial-weight 0.1 --discriminator-start 10 --discriminator-channels 16 '
                           '--micro-batch-size 2 --var-steps 1 ')
    two = {name: finish(start(flags, tmp_path / name, 2), tmp_path / name)
           for name, flags in dict(quiet=quiet, loud=loud, adversarial=adversarial).items()}
    for name, alone in [('quiet', quiet), ('quiet', quiet + '--micro-batch-size 2 '), ('loud', loud),
                        ('adversarial', adversarial)]:
        one = tmp_path / f'one{len(list(tmp_path.iterdir()))}'
        train.main([*alone.split(), '--out', str(one)])
        for stage in ('vqvae', 'var'):
            gaps = np.abs(losses(two[name], stage) - losses(one, stage))
            print(name, stage, gaps.max())
            assert len(gaps) in (3, 22, 42) and gaps.max() <= 1e-5
    # stage 2 once more, from where two processes began it, but by one: it keeps the parts of the batch
    out, before = two['loud'], losses(two['loud'], 'var')
    shutil.copy(out / 'previous.pt', out / 'last.pt')
    train.main(['--resume', '--out', str(out)])
    assert np.abs(losses(out, 'var') - before).max() <= 1e-5


@pytest.mark.slow
def test_a_rank_that_fails_brings_the_others_down_with_its_message(tiny_run, tmp_path):
    """Rank 1 fails in the middle of a run; sees other pictures; rank 0 alone complains of what all see."""
    folder, other = (write_pictures(tmp_path / name, count) for name, count in (('a', 30), ('b', 33)))
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
        def fail(data, step):
            sample.check(step < 3, 'this rank has had enough')
            return batch(data, step)
        train.ArrayData.batch = fail
sample.run_command(train.main)
""")
    out = tmp_path / 'run'
    shutil.copytree(tiny_run, out)
    last = (out / 'last.pt').read_bytes()
    for flags, words in [
            ('--resume', 'error: --resume: the run takes 8 pictures at once, which do not divide 4'),
            (TINY + '--overwrite --batch-size 9', 'error: --batch-size 9: 2 processes cannot share it; 8'),
            (TINY + f'--overwrite --data-dir {folder}', f'error: --data-dir {folder}: rank 1 sees other'),
            (TINY + '--overwrite', 'error: rank 1: this rank has had enough')]:
        assert (out / 'last.pt').read_bytes() == last           # nothing is lost by a mistake
        began = time.time()
        finish(start(flags, out, 2, script), out, status=1)     # torchrun's own status is 1
        assert 'terminate called' not in said(out) and '(exitcode: 2)' in said(out), said(out)
        assert said(out).count(words) == 1 and f'{HERE}/train.py", line' not in said(out), said(out)
        assert said(out).count('error: ') == 1 or 'enough' in words, said(out)
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


def test_a_share_of_a_batch_is_cut_into_equal_parts_of_at_most_so_many():
    for micro, parts in [(None, 12), (12, 12), (5, 4), (1, 1), (99, 12)]:
        assert train.divide_batch(train.TrainConfig(batch_size=12, micro_batch_size=micro)) == parts


# --------------------------------------------------------------------------------------- what a run costs
def counted_flops(function) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize('shared', [False, True])
def test_the_flops_of_a_dry_run_are_those_that_torch_counts(shared, monkeypatch):
    flags = dict(depth=3, shared_adaln=shared)
    row = train.cost(train.resolve(flags)[0])
    tokenizer = VQVAE(VQVAEConfig())
    var = VAR(VARConfig(num_classes=10, vocab_size=256, z_channels=16, scales=(1, 2, 4, 8), **flags))
    images, labels = torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64)
    inputs = tokenizer.teacher_inputs(tokenizer.encode(images))
    encoder = counted_flops(lambda: tokenizer.features(images))
    training = counted_flops(lambda: var(labels, inputs).sum().backward()) + encoder
    sampling = counted_flops(lambda: var.generate(tokenizer, labels))
    # not in the formula: distances to codes and phis; and no gradient flows to the first inputs
    assert row['training'] == pytest.approx(training, rel=0.02)
    assert row['sampling'] == pytest.approx(sampling, rel=0.02)


def test_the_memory_of_a_dry_run_is_what_autograd_keeps():
    config = VARConfig(depth=4, num_classes=10, vocab_size=64, z_channels=16, scales=(1, 2, 4, 8))
    var, B, L, kept = VAR(config).train(), 33, 85, {}

    def pack(tensor):
        if tensor.shape[:1] in [(B,), (B * L,)]:                    # the others are weights
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast('cpu', dtype=torch.bfloat16):
            logits = var(torch.zeros(B, dtype=torch.int64), torch.randn(B, L - 1, 16))
        F.cross_entropy(logits.transpose(1, 2), torch.zeros(B, L, dtype=torch.int64))
    each = sum(kept.values()) / (B * L * config.width * config.depth)
    assert each == pytest.approx(train.ACTIVATION_BYTES, rel=0.05)


def test_a_dry_run_prints_its_row_and_allocates_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train.main('--preset imagenet256 --depth 30 --dry-run --gpus 64 --tflops 312 --mfu 0.3'.split())
    text = capsys.readouterr().out
    assert '| imagenet256, d30 | 2,010,020,356 |' in text
    assert '64 GPUs of 312 TFLOP/s at an assumed MFU of 0.3' in text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000    # KiB; weights: 8 GB
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------- mistakes
def complaint(main, arguments, capsys, monkeypatch, ignore='it/s') -> str:
    """What a command that can't be done says on stderr: exit status 2 and one line."""
    monkeypatch.setattr(sys, 'argv', ['command', *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sample.run_command(main)
    lines = capsys.readouterr().err.splitlines()            # perhaps a progress bar, then the one line
    assert stop.value.code == 2 and lines[-1].startswith('error: '), lines
    assert all(re.search('it/s|s/it|^ *$|' + ignore, line) for line in lines[:-1]), lines
    return lines[-1]


WRONG_FLAGS = """
    train.py --dept 3                               | --dept 3; --help
    train.py --preset mnist                         | --preset mnist; shapes, cifar10
    train.py --depth 0                              | --depth 0; at least 1
    train.py --var-steps 0                          | --var-steps 0; 1 or more
    train.py --batch-size 100000                    | --batch-size 100000; only
    train.py --vqvae-lr nan                         | --vqvae-lr nan; above 0
    train.py --top-p 1.5                            | --top-p 1.5; in [0, 1]
    train.py --label-dropout 1                      | --label-dropout 1; in [0, 1)
    train.py --dtype float8                         | --dtype float8; bfloat16
    train.py --device meta                          | --device meta; cpu
    train.py --channels 40                          | --channels 40; multiple of 32
    train.py --scales 1 4 2 8                       | --scales (1, 4, 2, 8); rise
    train.py --scales 1 2 4                         | --scales (1, 2, 4); 32 / 4 = 8
    train.py --data-dir .                           | --data-dir .; no pictures; train/<class>/
    train.py --resume --overwrite                   | --resume; --overwrite
    train.py --tokenizer x.pt                       | --tokenizer; --stage var
    train.py --stage var                            | no tokenizer; --tokenizer
    train.py --stage var --tokenizer no.pt          | no.pt; --tokenizer
    train.py --out RUN/var.csv/run                  | cannot be written; --out
    train.py --resume                               | --resume; holds no run
    train.py --preset imagenet256                   | --preset imagenet256; --data-dir
    train.py --budget-minutes 0                     | --budget-minutes 0; above 0
    train.py --budget-vqvae 1                       | --budget-vqvae 1; (0, 1)
    train.py --stop-after-minutes -1                | --stop-after-minutes -1; above 0
    train.py --budget-minutes 5 --var-steps 9       | --budget-minutes, --var-steps; one or the other
    train.py --mfu 2                                | --mfu 2; (0, 1]
    train.py --micro-batch-size 0                   | --micro-batch-size 0; 1 or more
    train.py --discriminator-channels 20            | --discriminator-channels 20; multiple of 16
    train.py --adversarial-weight 1 --image-size 16 --scales 1 4 --stage vqvae  | --adversarial-weight; 24
    train.py --preset cifar10 --data-dir nowhere    | nowhere; no such folder
    train.py --preset cifar10 --image-size 64 --scales 1 16   | --image-size 64; 32
    sample.py RUN/var.pt --labels 10                | --labels 10; 0 to 9; heart
    sample.py RUN/var.pt --labels dragon            | --labels dragon; heart
    sample.py RUN/var.pt --count 0                  | --count 0; at least 1
    sample.py RUN/var.pt --cfg -1                   | --cfg -1; 0 or more
    sample.py RUN/var.pt --top-k -5                 | --top-k -5; 0 or more
    sample.py RUN/var.pt --top-p 1.01               | --top-p 1.01; in [0, 1]
    sample.py RUN/var.pt --seed -1                  | --seed -1
    train.py --seed 3000000000                      | --seed 3000000000; in [0, 2^31)
    sample.py RUN/var.pt --out picture.xyz          | --out picture.xyz; .png
    sample.py RUN/var.pt --out RUN/var.csv/a.png    | cannot be written; --out
    sample.py RUN/var.pt --npz samples              | --npz samples; .npz
    sample.py RUN/var.pt --export small             | --export small; .pt
    sample.py RUN/var.pt --export RUN/var.pt        | --export; is the checkpoint itself
    sample.py RUN/last.pt --export small.pt         | last.pt; kind 'resume'; 'var'
    sample.py RUN/var.csv --export small.pt         | var.csv; no checkpoint at all
    sample.py RUN/var.pt --png-dir RUN              | --png-dir; not empty
    sample.py RUN/var.pt --png-dir a --out a/b.png  | --png-dir a; --out would lie there
    sample.py RUN/var.pt --png-dir RUN/var.csv      | --png-dir; cannot be written
    measure.py RUN/var.pt --count 0                 | --count 0; at least 1
    measure.py RUN/vqvae.pt                         | vqvae.pt; kind 'vqvae'
    measure.py RUN/var.pt --npz a.png               | --npz a.png; .npz
    curves.py none.csv a.png                        | none.csv; no such file
    curves.py RUN/vqvae.csv a.png                   | vqvae.csv; not the var.csv
    curves.py RUN/var.pt a.png                      | var.pt; not the var.csv
    curves.py RUN/var.csv a.gif                     | a.gif; .png
    judge.py none.npz                               | none.npz; FileNotFoundError
    judge.py RUN/var.csv                            | var.csv; not what sample.py --npz writes
"""


@pytest.mark.parametrize('line', [' '.join(line.split()) for line in WRONG_FLAGS.strip().splitlines()])
def test_a_wrong_flag_is_named(line, tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, words = line.split('|')
    script, *arguments = command.replace('RUN', str(tiny_run)).split()
    if script == 'train.py':
        arguments = ['--train-count', '50', '--out', 'run', *arguments]
    main = sys.modules[script.removesuffix('.py')].main
    error = complaint(main, arguments, capsys, monkeypatch)
    assert all(word in error for word in words.strip().split('; ')), error
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]


class Bomb:
    """Makes a folder when it is unpickled freely."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_that_is_no_such_checkpoint_is_named(tiny_run, tmp_path, capsys, monkeypatch):
    good = (tiny_run / 'var.pt').read_bytes()
    (tmp_path / 'torn.pt').write_bytes(good[:len(good) // 2])
    (tmp_path / 'empty.pt').write_bytes(b'')
    (tmp_path / 'text.pt').write_text('hello')
    torch.save([1, 2], tmp_path / 'list.pt')
    torch.save(Bomb(tmp_path / 'ran'), tmp_path / 'code.pt')
    other = torch.load(tiny_run / 'var.pt', weights_only=True)
    other['var_config']['depth'] = 2
    torch.save(other, tmp_path / 'other.pt')
    other['vqvae_config']['channels'] = 64
    torch.save(other, tmp_path / 'others.pt')
    for name, word in {'torn.pt': 'torn', 'empty.pt': 'torn', 'text.pt': 'torn', 'list.pt': 'no checkpoint',
                       'code.pt': 'no checkpoint', 'gone.pt': 'no such file',
                       'other.pt': 'transformer does not', 'others.pt': 'tokenizer does not'}.items():
        error = complaint(sample.main, [tmp_path / name, '--out', tmp_path / 'x.png'], capsys, monkeypatch)
        assert name in error and word in error, error
    error = complaint(sample.main, [tiny_run / 'vqvae.pt', '--out', tmp_path / 'x.png'], capsys, monkeypatch)
    assert "kind 'vqvae'" in error and "'var'" in error
    arguments = ['--stage', 'var', '--out', tmp_path / 'out', '--tokenizer']
    assert 'kind' in complaint(train.main, [*arguments, tiny_run / 'last.pt'], capsys, monkeypatch)
    assert 'torn' in complaint(train.main, [*arguments, tmp_path / 'torn.pt'], capsys, monkeypatch)
    arguments += [tiny_run / 'vqvae.pt', '--vocab-size', 99]
    error = complaint(train.main, arguments, capsys, monkeypatch)
    assert '--vocab-size 99' in error and '16' in error
    assert not [name for name in ('out', 'x.png', 'ran') if (tmp_path / name).exists()]


def test_a_run_is_not_written_over_unless_asked(tiny_run, tmp_path, capsys, monkeypatch):
    out = tmp_path / 'run'
    shutil.copytree(tiny_run, out)
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
    train.main(['--resume', '--out', str(out)])                     # nothing left to do, and nothing lost
    assert (out / 'var.pt').exists()


def test_a_folder_that_will_not_do_is_named(tmp_path, capsys, monkeypatch):
    write_pictures(tmp_path / 'one', 20, classes=['cat'])
    (tmp_path / 'none/train/cat').mkdir(parents=True)
    broken = write_pictures(tmp_path / 'broken', 60)
    for i in range(0, 60, 3):
        (broken / f'train/bird/{i:04d}.png').write_bytes(b'')
    for name, words in dict(one='one class only, cat', none='no pictures', gone='no such folder',
                            broken='pictures are broken, more than 1%').items():
        arguments = [*TINY.split(), '--data-dir', tmp_path / name, '--workers', 0, '--out', tmp_path / 'run']
        error = complaint(train.main, arguments, capsys, monkeypatch, ignore='broken, left out')
        assert str(tmp_path / name) in error and words in error
    assert not (tmp_path / 'run/vqvae.pt').exists()


def test_a_checkpoint_of_other_pictures_is_refused(tmp_path, capsys, monkeypatch):
    folder = write_pictures(tmp_path / 'a', 30, (28, 28), mode='L')
    out = tmp_path / 'run'
    train.main([*TINY.split(), '--data-dir', str(folder), '--out', str(out)])
    tokenizer, var, _ = sample.load(out / 'var.pt')
    assert var.class_names == ['bird', 'cat', 'dog'] and var.config.num_classes == 3
    before = (out / 'last.pt').read_bytes()
    (folder / 'train/cat/new.png').write_bytes((folder / 'train/cat/0001.png').read_bytes())
    error = complaint(train.main, ['--resume', '--out', out], capsys, monkeypatch)
    assert 'other pictures than the run to resume' in error and (out / 'last.pt').read_bytes() == before


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
            sample.save_checkpoint(path, 'var', tmp_path / 'previous.pt', weights=torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
    flags = [*TINY.split(), '--vqvae-lr', 1e30, '--out', tmp_path / 'run']
    error = complaint(train.main, flags, capsys, monkeypatch)
    assert re.search(r'(nan|inf) at step \d; the last save', error) and '--vqvae-lr below 1e+30' in error
    assert not (tmp_path / 'run/vqvae.pt').exists()
    shutil.copytree(tiny_run, tmp_path / 'next')
    before = (tmp_path / 'next/vqvae.pt').read_bytes()
    os.remove(tmp_path / 'next/var.pt')
    flags = [*TINY.split(), '--stage', 'var', '--var-lr', 1e30, '--var-steps', 8, '--out', tmp_path / 'next']
    error = complaint(train.main, [*flags, '--overwrite', '--log-every-steps', 6], capsys, monkeypatch)
    step = int(re.search(r'var: loss of scale 1x1 is (?:nan|inf) at step (\d+)', error)[1])
    assert 2 <= step <= 3 and (tmp_path / 'next/vqvae.pt').read_bytes() == before       # lr 1e28 at step 1
    last = torch.load(tmp_path / 'next/last.pt', weights_only=True)
    assert last['step'] == 0 and all(weight.isfinite().all() for weight in last['modules']['model'].values())
    train.main(['--resume', '--var-lr', '1e-3', '--out', str(tmp_path / 'next')])       # as the message says
    assert (tmp_path / 'next/var.pt').exists()


# --------------------------------------------------------------------------------- exports, measures, judge
def test_an_export_is_half_as_large_and_draws_at_its_own_defaults(tiny_run, tmp_path, capsys):
    sample.main([f'{tiny_run}/var.pt', '--export', f'{tmp_path}/small.pt', '--cfg', '3', '--top-k', '7'])
    assert {path.name for path in tmp_path.iterdir()} == {'small.pt'}       # no pictures unless asked for
    assert (tmp_path / 'small.pt').stat().st_size < 0.6 * (tiny_run / 'var.pt').stat().st_size
    tokenizer, var, defaults = sample.load(tmp_path / 'small.pt')
    assert defaults == dict(cfg=3.0, top_k=7, top_p=0.8) and var.class_names == list(train.FIGURES)
    for small, model in zip((tokenizer, var), sample.load(tiny_run / 'var.pt')):
        for name, weight in model.state_dict().items():
            assert small.state_dict()[name].dtype == torch.float32
            assert torch.equal(small.state_dict()[name], weight.bfloat16().float())


def test_pngs_and_npz_hold_the_same_pictures_and_npz_the_names_of_the_classes(tiny_run, tmp_path):
    sample.main(f'{tiny_run}/var.pt --count 12 --npz {tmp_path}/a.npz --png-dir {tmp_path}/a'.split())
    arrays = np.load(tmp_path / 'a.npz')
    assert arrays['class_names'].tolist() == list(train.FIGURES)
    files = sorted((tmp_path / 'a').iterdir())
    assert [path.name for path in files] == [f'{i:06}.png' for i in range(12)]
    for path, picture in zip(files, arrays['arr_0']):
        assert np.array_equal(np.asarray(Image.open(path)), picture)


def test_measured_bits_and_psnr_are_those_of_validation(tiny_run):
    """measure.py goes its own way to what train.py logged of the held-out drawings."""
    tokenizer, var, _ = sample.load(tiny_run / 'var.pt')
    images, labels = train.draw_shapes(32, 2 ** 31)
    reconstructions, bits_L, hits_KV = measure.measure(tokenizer, var, images, labels)
    row, stage_1 = (curve(tiny_run, stage)[-1] for stage in ('var', 'vqvae'))
    for name, bits in zip(('1x1', '2x2', '8x8'), bits_L.split([1, 4, 64])):
        assert bits.mean() * math.log(2) == pytest.approx(float(row[f'loss_{name}']), rel=1e-4)
        assert hits_KV.sum() == 32 * 69
    assert measure.psnr(reconstructions, images) == pytest.approx(float(stage_1['psnr']), abs=1e-3)
    assert 100 * (hits_KV.sum(0) > 0).float().mean() == pytest.approx(float(stage_1['use']))


def test_var_pt_keeps_the_step_with_the_lowest_held_out_loss(tmp_path):
    out = run('--train-count 8 --var-steps 60 --var-lr 0.3 --save-every-steps 10', tmp_path / 'run')
    losses = [float(row['loss']) for row in curve(out, 'var') if row['split'] == 'val']
    assert min(losses) < losses[-1] - 0.01                      # eight pictures were learned by heart
    tokenizer, var, defaults = sample.load(out / 'var.pt')
    _, bits_L, _ = measure.measure(tokenizer, var, *train.draw_shapes(32, 2 ** 31))
    assert bits_L.mean() * math.log(2) == pytest.approx(min(losses), rel=1e-4)
    drawn = [images for images, _ in sample.draw(tokenizer, var, [*range(10)] * 8, 0, 8, **defaults)]
    shown = np.asarray(Image.open(out / 'samples.png'))
    assert np.array_equal(shown, np.asarray(sample.grid(torch.cat(drawn), 10)))     # by the weights in var.pt
    before = (out / 'var.pt').read_bytes(), (out / 'samples.png').read_bytes()
    shutil.copy(out / 'previous.pt', out / 'last.pt')                       # stopped at step 50, and resumed
    train.main(['--resume', '--out', str(out)])
    assert ((out / 'var.pt').read_bytes(), (out / 'samples.png').read_bytes()) == before
    shutil.copy(out / 'previous.pt', out / 'last.pt')
    (out / 'var.pt').rename(tmp_path / 'best.pt')
    train.main(['--resume', '--out', str(out)])
    assert (out / 'var.pt').exists()                                        # rather that of step 60 than none


def test_reconstructions_are_written_for_the_judge(tiny_run, tmp_path):
    measure.main([f'{tiny_run}/var.pt', '--count', '12', '--npz', f'{tmp_path}/a.npz'])
    images, labels, class_names = judge.read_npz(f'{tmp_path}/a.npz')
    expected, expected_labels = (part[:12] for part in judge.read_pictures('shapes', None)[2:])
    tokenizer, _, _ = sample.load(tiny_run / 'var.pt')
    assert torch.equal(images, sample.to_uint8(tokenizer.decode(tokenizer.encode(train.to_float(expected)))))
    assert torch.equal(labels, expected_labels) and class_names == train.FIGURES


@pytest.mark.parametrize('folder', ['tiny_run', 'notebooks'])
def test_the_curves_of_a_run_are_drawn(folder, tiny_run, tmp_path):
    log = tiny_run / 'var.csv' if folder == 'tiny_run' else HERE / 'notebooks/cifar10-var.csv'
    curves.main([str(log), str(tmp_path / 'curves.png')])
    picture = np.asarray(Image.open(tmp_path / 'curves.png').convert('RGB')).astype(int)
    coloured = np.ptp(picture, axis=2) > 40
    assert picture.shape == (440, 770, 3) and coloured.sum() > 2000        # not its legend alone


def test_the_committed_model_is_small_and_draws_every_class():
    path = HERE / 'notebooks/cifar10.pt'
    assert path.stat().st_size <= 24 * 2 ** 20
    assert torch.load(path, weights_only=True)['var']['head.weight'].dtype == torch.bfloat16
    tokenizer, var, defaults = sample.load(path)
    assert var.class_names == train.CIFAR10_CLASSES
    images = next(sample.draw(tokenizer, var, list(range(10)), 0, 10, **defaults))[0]
    assert images.shape == (10, 3, 32, 32) and images.std((1, 2, 3)).min() > 0.05       # none is a flat grey


def test_the_frechet_distance_is_that_of_two_gaussians():
    a = torch.randn(500, 6) @ torch.randn(6, 6)
    assert judge.frechet_distance(a, a + 2) == pytest.approx(6 * 4, rel=1e-6)           # 0 but for the shift
    thrice = judge.frechet_distance(a, 3 * a - 2 * a.mean(0))   # the same mean, nine times the covariance
    assert thrice == pytest.approx((3 - 1) ** 2 * a.T.cov().trace().item(), rel=1e-4)
    b = torch.randn(400, 6) @ torch.randn(6, 6)                 # covariances that do not commute
    A, B = a.double().T.cov(), b.double().T.cov()
    between = torch.linalg.eigvals(A @ B).real.sqrt().sum()     # the trace of the root of a product
    expected = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * between
    assert judge.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-5)


def write_npz(path: Path, count=300, size=32, class_names=train.FIGURES):
    np.savez(path, arr_0=np.zeros((count, size, size, 3), np.uint8), labels=np.arange(count) % 10,
             class_names=np.array(class_names))


def test_the_judge_names_samples_that_it_cannot_judge(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_npz('size.npz', size=28)
    write_npz('classes.npz', class_names=train.CIFAR10_CLASSES[::-1])
    write_npz('few.npz', count=64)
    write_npz('old.npz')
    write_npz('labels.npz', class_names=train.FIGURES[:9])
    write_npz('lack.npz')
    np.savez('lack.npz', **dict(np.load('lack.npz')) | dict(labels=np.zeros(300, int)))
    arrays = dict(np.load('old.npz'))
    del arrays['class_names']
    np.savez('old.npz', **arrays)
    for name, words in dict(size='28x28; 32x32', classes='32x32 of truck, ship; shapes and CIFAR-10',
                            few='64 pictures of 10 classes; covariance of 64; needs 65',
                            lack='300 pictures of 1 classes; of all 10',
                            old='not what sample.py --npz writes',
                            labels='not what sample.py --npz writes').items():
        error = complaint(judge.main, [f'{name}.npz'], capsys, monkeypatch)
        assert f'{name}.npz' in error and all(word in error for word in words.split('; ')), error
    sample.save_checkpoint(Path('other.pt'), 'var')
    write_npz('good.npz')
    assert "kind 'var'" in complaint(judge.main, ['good.npz', '--cache', 'other.pt'], capsys, monkeypatch)


@pytest.fixture(scope='session')
def cifar10(tmp_path_factory) -> Path:
    """The folder that holds CIFAR-10's binary files."""
    if (HERE / 'data/cifar-10-batches-bin').is_dir():
        return HERE / 'data'
    unpack, folder = HERE.parent / 'shared/tools/unpack_cifar10.py', tmp_path_factory.mktemp('cifar10')
    if not unpack.exists():
        pytest.skip('needs CIFAR-10 in data/, where `python train.py --preset cifar10` downloads it')
    subprocess.run([sys.executable, str(unpack), str(folder)], check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_the_committed_model_measures_what_readme_says(cifar10, capsys):
    measure.main([str(HERE / 'notebooks/cifar10.pt'), '--data-dir', str(cifar10)])
    measured = capsys.readouterr().out.strip()
    assert measured.splitlines()[0] in README
    claimed = README[README.index(measured.splitlines()[0]):][:len(measured)]
    for found, said in zip(*(re.findall(r'[\d.]*\d', text) for text in (measured, claimed)), strict=True):
        assert float(found) == pytest.approx(float(said), rel=0.01), claimed     # codes at the edge may flip


@pytest.mark.slow
def test_a_judge_that_saw_a_quarter_of_cifar10_once_knows_pictures_and_samples(cifar10):
    images, labels, test_images, test_labels = judge.read_pictures('cifar10', str(cifar10))
    network = judge.Judge((48, 128, 256), mirror=True)
    judge.train_judge(network, 'judge', images[:12_800], labels[:12_800], 1)
    accuracy = network.eval().recognised(network.features(test_images[:2000]), test_labels[:2000]).mean()
    tokenizer, var, defaults = sample.load(HERE / 'notebooks/cifar10.pt')
    wanted = torch.arange(200) % 10
    batches = sample.draw(tokenizer, var, wanted.tolist(), 0, 100, **defaults)
    drawn = sample.to_uint8(torch.cat([images for images, _ in batches]))
    share = network.recognised(network.features(drawn), wanted).mean()
    print(f'judge {accuracy:.1%}, samples {share:.1%}')
    assert accuracy > 0.5 and share > 0.3


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
    for arguments in python_commands('train.py'):
        train.build_parser().parse_args(arguments)
    for arguments in python_commands('sample.py'):
        sample.build_parser().parse_args(arguments)


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
    assert python('sample.py none.pt', status=2).stderr == 'error: none.pt: no such file\n'


@pytest.mark.slow
@pytest.mark.skipif(not (HERE / 'out/shapes/var.pt').exists(), reason='needs what `python train.py` leaves')
def test_the_default_run_draws_what_was_asked_for(tmp_path):
    """1,000 samples at the checkpoint's own defaults, judged by a classifier that knows the drawings."""
    tokenizer, var, defaults = sample.load(HERE / 'out/shapes/var.pt')
    labels = torch.arange(1000) % 10
    batches = sample.draw(tokenizer, var, labels.tolist(), 1, 100, **defaults)
    *training, test_images, test_labels = judge.read_pictures('shapes', None)
    network = judge.load_judge('shapes', *training, tmp_path / 'judge.pt')
    drawn = sample.to_uint8(torch.cat([images for images, _ in batches]))
    right = network.recognised(network.features(drawn), labels)
    accuracy = network.recognised(network.features(test_images), test_labels).mean()
    by_class = [right[c::10].mean().item() for c in range(10)]
    print(f'judge {accuracy:.1%}, recognised {right.mean():.1%}, by class {by_class}')
    assert accuracy >= 0.99 and right.mean() >= 0.9 and min(by_class) >= 0.75
    row = list(csv.DictReader((HERE / 'out/shapes/vqvae.csv').open()))[-1]
    assert float(row['psnr']) >= 24 and float(row['use']) >= 95
