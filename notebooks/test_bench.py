"""bench.py and costs.py: FLOPs match the counts of torch, memory matches what autograd keeps."""
import json
import math
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
import bench
import costs
import sample
import train
from train import parse
from var import VAR, VARConfig
from vqvae import VQVAE, VQVAEConfig
from test_var import TINY, seeded, tiny_run, write_images


def counted_flops(function) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize('flags, options', [
    ('', dict()), ('--shared-adaln', dict(shared_adaln=True)), ('--no-adaln', dict(adaln=False)),
    ('--order raster --scales 8', dict(order='raster', scales=(8,)))])
def test_the_flops_are_those_that_torch_counts(flags, options):
    row = costs.cost(parse(['--depth', '3', *flags.split()])[0])
    options = dict(scales=(1, 2, 4, 8)) | options
    tokenizer = VQVAE(VQVAEConfig(scales=options['scales']))
    var = VAR(VARConfig(depth=3, num_classes=10, vocab_size=256, z_channels=16, **options))
    images, labels = torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64)
    inputs = tokenizer.teacher_inputs(tokenizer.encode(images))
    encoder = counted_flops(lambda: tokenizer.features(images))
    training = counted_flops(lambda: var(labels, inputs).sum().backward()) + encoder
    sampling = counted_flops(lambda: var.generate(tokenizer, labels))
    # the formula omits code distances and phis, and counts a gradient to the inputs that is not computed
    assert row['training'] == pytest.approx(training, rel=0.02)
    assert row['sampling'] == pytest.approx(sampling, rel=0.02)
    if not var.config.adaln:                            # a small term, which that tolerance would hide
        assert row['training'] < costs.cost(parse(['--depth', '3', '--shared-adaln'])[0])['training']


def test_the_memory_is_what_autograd_keeps():
    config = VARConfig(depth=4, num_classes=10, vocab_size=64, z_channels=16, scales=(1, 2, 4, 8))
    var, B, L, kept = VAR(config), 33, 85, {}

    def pack(tensor):
        if tensor.shape[:1] in [(B,), (B * L,)]:                    # the others are weights
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast('cpu', dtype=torch.bfloat16):
            labels, noise = torch.zeros(B, dtype=torch.int64), torch.rand(B, 9)
            logits = var(labels, torch.randn(B, L - 1, 16), noise)
        F.cross_entropy(logits.flatten(0, 1), torch.zeros(B * L, dtype=torch.int64))
    each = sum(kept.values()) / (B * L * config.width * config.depth)
    assert each == pytest.approx(costs.ACTIVATION_BYTES, rel=0.05)


RELEASED = {16: (768, 200, 1e-4, 1e-3, 0.1, None), 20: (768, 250, 1e-4, 1e-3, 0.1, None),
            24: (768, 350, 8e-5, 1e-4, 0.01, None), 30: (1024, 350, 8e-5, 1e-5, 0.01, 0.08),
            36: (768, 350, 8e-5, 5e-6, 0.01, 0.08)}


@pytest.mark.parametrize('depth', RELEASED)
def test_depth_chooses_the_released_recipe_of_stage_2_alone(depth):
    preset, (batch, epochs, *_, last_lr, _) = 'imagenet512' if depth == 36 else 'imagenet256', RELEASED[depth]
    args, _ = parse(f'--preset {preset} --depth {depth}'.split())
    found = args.batch_size, args.var_lr, args.adaln_gamma_init, args.var_last_lr, args.last_weight_decay
    assert found == (batch, *RELEASED[depth][2:]) and args.shared_adaln == (depth == 36)
    assert args.var_steps == math.ceil(epochs * 1_281_167 / batch)              # images of ImageNet
    data = SimpleNamespace(count=10 ** 6, device=torch.device('cpu'))
    vqvae, var = (train.Trainer(name, VQVAE(VQVAEConfig(channels=32)), args, data, {}, [], [], 0.0)
                  for name in ('vqvae', 'var'))
    assert (vqvae.batch_size, var.batch_size, vqvae.last_lr, var.last_lr) == (768, batch, 0.1, last_lr)
    assert vqvae.micro_batch_size == (2 if depth == 36 else 8) <= var.micro_batch_size
    args.micro_batch_size = 1                                                   # the flag is for both stages
    assert train.Trainer('vqvae', VQVAE(VQVAEConfig()), args, data, {}, [], [], 0.0).micro_batch_size == 1


@pytest.mark.parametrize('depth, parameters', [(16, 310283520), (20, 600917136), (24, 1033399360),
                                               (30, 2010020356), (36, 2353893904)])
def test_the_recipes_have_as_many_parameters_as_the_authors_models(depth, parameters):
    preset = 'imagenet512' if depth == 36 else 'imagenet256'
    assert costs.cost(parse(f'--preset {preset} --depth {depth}'.split())[0])['parameters'] == parameters


def test_the_command_prints_a_row_and_allocates_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    costs.main('--preset imagenet256 --depth 30 --gpus 64 --tflops 312 --mfu 0.3'.split())
    text = capsys.readouterr().out
    assert '| imagenet256, d30 | 2,010,020,356 |' in text
    assert '64 GPUs of 312 TFLOP/s at an assumed MFU of 0.3' in text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000    # KiB; weights: 8 GB
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('flags, whats', [
    (TINY, ['train_cached', 'sample']), (TINY + '--no-cache-tokens', ['train', 'sample']),
    (TINY + '--checkpoint RUN/var.pt --cfg 3', ['sample']), pytest.param(
        TINY + '--compile', ['train_cached', 'sample'], marks=[pytest.mark.slow, pytest.mark.skipif(
            not shutil.which('g++'), reason='needs a compiler')])])
def test_bench_prints_json_and_leaves_no_file(flags, whats, tiny_run, tmp_path, capsys,
                                              monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench.main(flags.replace('RUN', str(tiny_run)).split())
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row['what'] for row in rows] == whats and not any(tmp_path.iterdir())
    for row in rows:
        rate = row.get('tokens_per_s') or row['images_per_s']
        count = row['batch'] * (69 if 'tokens_per_s' in row else 1)
        assert rate == pytest.approx(count / row['seconds'], rel=0.01) and row['peak_gib'] > 0
        assert 0 <= row['mfu'] < 1 and row['matmul_tflop_per_s'] > 0
        assert row['dtype'] == 'float32' and row['compile'] == ('--compile' in flags)
        assert row.get('cfg', 3) == (3 if '--cfg' in flags or row['what'] != 'sample' else 2)


def test_bench_of_the_loader_reads_what_a_whole_resize_reads(tmp_path, capsys):
    bench.main(f'--loader {write_images(tmp_path, 3)}/train --image-size 32'.split())
    row = json.loads(capsys.readouterr().out)
    assert (row['images'], row['size']) == (3, 32) and row['images_per_s'] > 0 and row['ratio'] > 0
    path = tmp_path / 'train/cat/0001.png'
    ours, theirs = (read(path, 32, (0.3, 0.7)).astype(int) for read in (bench.box_resize, bench.whole_resize))
    assert abs(ours - theirs).max() <= 1


def test_bench_names_a_checkpoint_that_will_not_do(tiny_run):
    with pytest.raises(sample.UserError, match="kind 'vqvae', but 'var' is required"):
        bench.main(['--checkpoint', str(tiny_run / 'vqvae.pt')])
