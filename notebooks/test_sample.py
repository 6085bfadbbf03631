"""What sample.py does with a model: edits, variations, the authors' weights, exports, mistakes."""
import itertools
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]
import sample                                                                           # noqa: E402
import train                                                                            # noqa: E402
from test_var import (PARITY, check_wrong_flag, complaint, kill_all, recipe, run,       # noqa: E402
                      seeded, tiny_run, write_images)                                   # noqa: E402, F401
import var as var_module                                                                # noqa: E402


@pytest.fixture(scope='module')
def model(tiny_run):  # noqa: F811
    """The checkpoint of a tiny run, and what is in it: latents of 8x8, 4 pixels each; scales 1, 2, 8."""
    return tiny_run / 'var.pt', *sample.load(tiny_run / 'var.pt')


@pytest.fixture
def photo(tmp_path):
    """A drawing as a file of the model's own size, and its pixels (3, 32, 32)."""
    pixels = train.draw_shapes(4, 7)[0][3]
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / 'photo.png')
    return tmp_path / 'photo.png', pixels


def draw(path: Path, *flags) -> np.ndarray:
    """What `sample.py ... --npz path` draws: uint8 (N, H, W, 3)."""
    sample.main([str(flag) for flag in (*flags, '--npz', path)])
    return np.load(path)['arr_0']


# ---------------------------------------------------------------------------------------------- editing
def edit_of(model, photo, flags: str):
    args = sample.build_parser().parse_args(f'{model[0]} --image {photo[0]} {flags}'.split())
    sample.check_flags(args)
    return sample.Edit(args, model[1])


def tokens_of(model, edit, count=3, labels=(10,)):
    batches = sample.draw(*model[1:3], [labels[i % len(labels)] for i in range(count)], 0, 50,
                          kept_BL=edit.kept_1L, **model[3])
    return torch.cat([tokens_BL for _, tokens_BL in batches])


def test_an_edit_keeps_the_tokens_that_its_box_does_not_touch_and_draws_the_others(model, photo):
    own_1L = model[1].encode(train.to_float(photo[1][None]))
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:6, 1:7] = True                                     # the box in latents, rounded
    for flags, region in [('--box 0.25 0.1 0.7 0.9', inside), ('--box 0.25 0.1 0.7 0.9 --inpaint', inside),
                          ('--box 0.25 0.1 0.7 0.9 --outpaint', ~inside)]:
        edit = edit_of(model, photo, flags)
        kept = edit.kept_1L >= 0
        assert torch.equal(kept[0, 5:].view(8, 8), ~region) and kept[0, 0]
        tokens_BL = tokens_of(model, edit)
        assert torch.equal(tokens_BL[:, kept[0]], own_1L[:, kept[0]].expand(3, -1))     # all of them
        assert len({tuple(row) for row in tokens_BL[:, ~kept[0]].tolist()}) == 3        # each image its own


def test_a_latent_is_drawn_anew_if_a_mask_touches_a_pixel_of_it(model, photo, tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    mask[15, 4:9] = 255                                         # of latents 1 and 2 of row 3
    Image.fromarray(mask).save(tmp_path / 'mask.png')
    kept = edit_of(model, photo, f'--mask {tmp_path}/mask.png').kept_1L[0, 5:].view(8, 8) >= 0
    assert (~kept).nonzero().tolist() == [[3, 1], [3, 2]]
    kept = edit_of(model, photo, f'--mask {tmp_path}/mask.png --outpaint').kept_1L[0, 5:] >= 0
    assert not kept.any()                                       # no latent lies within a row of pixels
    layer = Image.new('RGBA', (32, 32))                         # white paint on nothing
    layer.paste('white', mask=Image.fromarray(mask))
    layer.save(tmp_path / 'layer.png')
    kept = edit_of(model, photo, f'--mask {tmp_path}/layer.png').kept_1L[0, 5:].view(8, 8) >= 0
    assert (~kept).nonzero().tolist() == [[3, 1], [3, 2]]


def test_keep_scales_goes_on_from_the_first_scales(model, photo, tmp_path):
    own_1L = model[1].encode(train.to_float(photo[1][None]))
    for k, count in [(1, 1), (2, 5)]:
        edit = edit_of(model, photo, f'--keep-scales {k}')
        assert torch.equal(edit.kept_1L[0, :count], own_1L[0, :count]) and (edit.kept_1L[0, count:] < 0).all()
    both = edit_of(model, photo, '--keep-scales 2 --box 0 0 1 0.5').kept_1L
    assert torch.equal(both[0, :5], own_1L[0, :5])
    assert torch.equal(both[0, 5:].view(8, 8) < 0, torch.arange(8).expand(8, 8) < 4)


def test_paste_puts_the_photographs_pixels_back_outside_of_the_mask_and_its_feather(model, photo, tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    mask[10:21, 8:12] = 255
    Image.fromarray(mask).save(tmp_path / 'mask.png')
    flags = [model[0], '--image', photo[0], '--mask', tmp_path / 'mask.png', '--count', 4, '--labels', 3, 5]
    plain, pasted = (draw(tmp_path / 'a.npz', *flags, *more) for more in ([], ['--paste']))
    own = photo[1].permute(1, 2, 0).numpy()
    reach = np.zeros((32, 32), bool)
    reach[8:23, 6:14] = True                                    # a feather of two pixels, half a latent
    assert (pasted[:, ~reach] == own[~reach]).all() and (plain[:, ~reach] != own[~reach]).any()
    assert (pasted[:, mask > 0] == plain[:, mask > 0]).all() and (plain[0] != plain[1]).any()
    ring = reach & (mask == 0)
    low, high = (bound(plain[:, ring], own[ring]) for bound in (np.minimum, np.maximum))
    assert (low <= pasted[:, ring]).all() and (pasted[:, ring] <= high).all()


def test_compare_shows_the_photograph_what_is_kept_and_the_results(model, photo, tmp_path):
    flags = f'{model[0]} --image {photo[0]} --box 0.5 0 1 1 --count 3 --paste --compare {tmp_path}/c.png'
    sample.main(flags.split() + ['--out', f'{tmp_path}/o.png'])
    sheet, out = (np.asarray(Image.open(tmp_path / name))[::2, ::2] for name in ('c.png', 'o.png'))
    own, kept, *drawn = (sheet[:, x:x + 32] for x in range(0, 5 * 34, 34))
    assert (own == photo[1].permute(1, 2, 0).numpy()).all()
    assert (kept[:16] == own[:16]).all() and (kept[16:] == 255).all()
    assert all((image[:14] == own[:14]).all() and (image[16:] != own[16:]).any() for image in drawn)
    assert (np.concatenate([out[:, x:x + 32] for x in (0, 34, 68)]) == np.concatenate(drawn)).all()
    sample.main(f'{model[0]} --image {photo[0]} --keep-scales 2 --compare {tmp_path}/k.png'.split())
    tokens_1L = model[1].encode(train.to_float(photo[1][None]))
    coarse = sample.to_uint8(model[1].decode_f_hat(model[1].f_hats(tokens_1L)[1]))[0]
    kept = np.asarray(Image.open(tmp_path / 'k.png'))[:64:2, 68:132:2]
    assert (kept == coarse.permute(1, 2, 0).numpy()).all()


def test_without_labels_an_edit_asks_for_no_class_and_null_is_a_label(model, photo, tmp_path):
    flags = f'{model[0]} --image {photo[0]} --box 0 0 0.5 1'.split()
    a, b, c = (draw(tmp_path / f'{len(more)}.npz', *flags, *more.split())
               for more in ('', '--labels null', '--labels star'))
    assert (a == b).all() and (a != c).any() and np.load(tmp_path / '0.npz')['labels'].tolist() == [10]


@pytest.mark.slow
def test_a_thousand_edits_of_all_kinds_are_drawn(model, tmp_path):
    """Sizes, masks, boxes at the border, scales kept, labels: finite, in range, kept where they should be."""
    choice, refused = random.Random(0), 0
    for seed in range(1000):
        w, h = choice.choice([(32, 32), (choice.randint(1, 90), choice.randint(1, 90))])
        noise = np.random.RandomState(seed).randint(0, 256, (h, w, 3), dtype=np.uint8)
        mode = choice.choice(['RGB', 'L', 'RGBA', 'P', '1', 'LA', 'CMYK'])
        path = tmp_path / choice.choice(['a.png', 'a.tif'])
        Image.fromarray(noise).convert('RGB' if mode == 'CMYK' and path.suffix == '.png' else mode).save(path)
        mask = np.random.RandomState(seed).rand(h, w) < choice.random()
        mask.flat[0], mask.flat[-1] = True, False
        Image.fromarray(mask).save(tmp_path / 'mask.png')
        ends = [sorted(choice.sample(range(9), 2)) for _ in range(2)]
        box = ' '.join(str((pair[i] + choice.uniform(-0.4, 0.4) * (0 < pair[i] < 8)) / 8) for i in (0, 1)
                       for pair in ends)
        region = choice.choice([f'--box {box}', f'--mask {tmp_path}/mask.png', ''])
        if region:
            region += choice.choice(['', ' --inpaint', ' --outpaint']) + choice.choice(['', ' --paste'])
        if not region or choice.random() < 0.3:
            region += f' --keep-scales {choice.randint(1, 2)}'
        asked, how = choice.choice([('', {}), ('--labels star', {}), ('--labels 3 null', {}), (
            '--smooth', dict(smooth=True)), ('--temperature 2', dict(temperature=2.0))])
        flags = f'{model[0]} --image {path} {region} {asked} --count 2 --seed {seed} --npz {tmp_path}/a.npz'
        try:
            sample.main(flags.split())
        except sample.UserError as error:           # a mask or box that covers all once it is cut and shrunk
            assert 'marks all of' in str(error) or 'marks nothing' in str(error), (flags, error)
            refused += 1
            continue
        images, labels = (np.load(tmp_path / 'a.npz')[name] for name in ('arr_0', 'labels'))
        edit = edit_of(model, (path,), region)
        drawn, tokens_BL = next(sample.draw(*model[1:3], labels.tolist(), seed, 2, kept_BL=edit.kept_1L,
                                            **model[3], **how))
        assert drawn.isfinite().all() and -1 <= drawn.min() and drawn.max() <= 1
        assert (tokens_BL == edit.kept_1L)[:, edit.kept_1L[0] >= 0].all(), flags
        assert (edit.finish(sample.to_uint8(drawn)).permute(0, 2, 3, 1).numpy() == images).all(), flags
    print(f'{refused} of 1000 marked all or nothing')
    assert refused < 100


# --------------------------------------------------------------------------------------- the authors' weights
def released_shapes(depth: int, scales: tuple[int, ...], classes=1000, V=4096, C=32) -> dict[str, tuple]:
    """The keys of a released var_d<depth>.pth and their shapes, as the released code builds it."""
    D, L, shared = 64 * depth, sum(side * side for side in scales), depth == 36
    shapes = {'pos_start': (1, 1, D), 'pos_1LC': (1, L, D), 'lvl_1L': (1, L),
              'lvl_embed.weight': (len(scales), D), 'attn_bias_for_masking': (1, 1, L, L),
              'word_embed.weight': (D, C), 'word_embed.bias': (D,),
              'class_emb.weight': (classes + 1, D), 'head.weight': (V, D), 'head.bias': (V,),
              'head_nm.ada_lin.1.weight': (2 * D, D), 'head_nm.ada_lin.1.bias': (2 * D,)}
    block = {'attn.scale_mul_1H11': (1, depth, 1, 1), 'attn.q_bias': (D,), 'attn.v_bias': (D,),
             'attn.zero_k_bias': (D,), 'attn.mat_qkv.weight': (3 * D, D), 'attn.proj.weight': (D, D),
             'attn.proj.bias': (D,), 'ffn.fc1.weight': (4 * D, D), 'ffn.fc1.bias': (4 * D,),
             'ffn.fc2.weight': (D, 4 * D), 'ffn.fc2.bias': (D,)}
    adaln = {'ada_lin.1.weight': (6 * D, D), 'ada_lin.1.bias': (6 * D,)}
    if shared:
        shapes |= {f'shared_{key}': shape for key, shape in adaln.items()}
    block |= {'ada_gss': (1, 1, 6, D)} if shared else adaln
    return shapes | {f'blocks.{i}.{key}': shape for i in range(depth) for key, shape in block.items()}


@pytest.mark.parametrize('name', sample.RELEASED)
def test_the_keys_of_all_released_transformers_are_taken(name):
    """On meta tensors, which have shapes and no numbers."""
    depth, scales = int(name[1:]), sample.RELEASED[name]
    with torch.device('meta'):
        weights = {key: torch.empty(shape) for key, shape in released_shapes(depth, scales).items()}
        model = var_module.VAR.from_official(weights, scales)
    assert model.config.depth == depth and sum(model.config.lengths) == (2240 if depth == 36 else 680)
    is_buffer = ('lvl_1L', 'masking', 'zero_k_bias')
    buffers = sum(weights[key].numel() for key in weights if key.endswith(is_buffer))
    assert sum(p.numel() for p in model.parameters()) == sum(w.numel() for w in weights.values()) - buffers


@pytest.fixture
def released(tmp_path, monkeypatch):
    """Small stand-ins by the released names, served from a local address; the folder they are served from."""
    folder = tmp_path / 'served'
    folder.mkdir()
    case = PARITY['shared_adaln_ten_scales']
    torch.save(recipe(case['vqvae_keys']), folder / 'vae_ch160v4096z32.pth')
    for name in ('d3', 'd16'):
        torch.save(recipe(case['var_keys']), folder / f'var_{name}.pth')
    monkeypatch.setitem(sample.RELEASED, 'd3', tuple(case['config']['patch_nums']))
    monkeypatch.setitem(sample.RELEASED, 'd16', tuple(case['config']['patch_nums']))
    (name, _, *rest), *rows = sample.FLAGS['what to draw']
    monkeypatch.setitem(sample.FLAGS, 'what to draw', [(name, list(sample.RELEASED), *rest), *rows])
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    handler = type('Handler', (SimpleHTTPRequestHandler,), dict(log_message=lambda *arguments: None))
    with HTTPServer(('127.0.0.1', 0), partial(handler, directory=folder)) as server:
        monkeypatch.setattr(sample, 'RELEASED_URL', f'http://127.0.0.1:{server.server_port}')
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder
        server.shutdown()


def official(name: str, folder: Path | None) -> list[str]:
    """The flags that draw two images with these weights."""
    return ['--official', name, *(['--weights-dir', str(folder)] if folder else []), '--labels', '1', '3']


def test_the_authors_weights_are_downloaded_once_and_draw_edit_and_export(released, photo, tmp_path, capfd):
    drawn = draw(tmp_path / 'a.npz', *official('d3', None))
    assert drawn.shape == (2, 160, 160, 3) and '100%' in capfd.readouterr().err             # its bar
    assert {path.name for path in (tmp_path / 'hub/checkpoints').iterdir()} == {
        'vae_ch160v4096z32.pth', 'var_d3.pth'}
    local = draw(tmp_path / 'b.npz', *official('d3', released))
    for path in released.iterdir():
        path.unlink()
    assert (draw(tmp_path / 'c.npz', *official('d3', None)) == drawn).all() and (local == drawn).all()
    edited = draw(tmp_path / 'd.npz', *official('d3', None), '--image', photo[0], '--box', 0, 0, 0.5, 0.5)
    assert edited.shape == drawn.shape and (edited != drawn).any()
    sample.main([*official('d3', None), '--export', f'{tmp_path}/d3.pt'])
    _, var, defaults = sample.load(tmp_path / 'd3.pt')
    assert var.class_names == ['0', '1', '2', '3'] and defaults == dict(cfg=1.5, top_k=900, top_p=0.96)


def test_weights_that_will_not_do_are_named(released, tmp_path, capsys, monkeypatch):
    def complains(name, folder, *words, ignore='100%|^ *[0-9]+%'):
        arguments = [*official(name, folder), '--out', f'{tmp_path}/x.png']
        error = complaint(sample.main, arguments, capsys, monkeypatch, ignore)
        assert all(word in error for word in words), error
    complains('d16', released, 'var_d16.pth: has depth 3; say --official d3')
    complains('d20', None, '/var_d20.pth: cannot be downloaded', '--weights-dir')
    complains('d20', released, 'served/var_d20.pth: no such file')
    whole = (released / 'var_d3.pth').read_bytes()
    (released / 'var_d3.pth').write_bytes(whole[:-1000])
    complains('d3', released, 'served/var_d3.pth: torn', 'delete it and download it again')
    complains('d3', None, 'checkpoints/var_d3.pth: torn')
    (released / 'var_d3.pth').write_bytes(whole)
    (tmp_path / 'hub/checkpoints/var_d3.pth').unlink()
    sample.main([*official('d3', None), '--out', f'{tmp_path}/x.png'])
    other = {key: PARITY['shared_adaln_ten_scales']['vqvae_keys'][key] for key in
             PARITY['shared_adaln_ten_scales']['vqvae_keys']} | {'quantize.embedding.weight': [47, 8]}
    torch.save(recipe(other), released / 'vae_ch160v4096z32.pth')
    complains('d3', released, 'var_d3.pth: does not go with that tokenizer (vocab_size')
    torch.save(dict(state=1), released / 'vae_ch160v4096z32.pth')
    complains('d3', released, "vae_ch160v4096z32.pth: will not do (no released VAR tokenizer")


# ---------------------------------------------------------------------------------------------- exports
def test_an_export_is_half_as_large_and_draws_at_its_own_defaults(tiny_run, tmp_path):  # noqa: F811
    sample.main([f'{tiny_run}/var.pt', '--export', f'{tmp_path}/small.pt', '--cfg', '3', '--top-k', '7'])
    assert {path.name for path in tmp_path.iterdir()} == {'small.pt'}       # no images unless asked for
    assert (tmp_path / 'small.pt').stat().st_size < 0.6 * (tiny_run / 'var.pt').stat().st_size
    tokenizer, var, defaults = sample.load(tmp_path / 'small.pt')
    assert defaults == dict(cfg=3.0, top_k=7, top_p=0.8) and var.class_names == list(train.FIGURES)
    for small, model in zip((tokenizer, var), sample.load(tiny_run / 'var.pt')):
        for name, weight in model.state_dict().items():
            assert small.state_dict()[name].dtype == torch.float32
            assert torch.equal(small.state_dict()[name], weight.bfloat16().float())


def test_pngs_and_npz_hold_the_same_images_and_npz_the_names_of_the_classes(tiny_run, tmp_path):  # noqa: F811
    sample.main(f'{tiny_run}/var.pt --count 12 --npz {tmp_path}/a.npz --png-dir {tmp_path}/a'.split())
    arrays = np.load(tmp_path / 'a.npz')
    assert arrays['class_names'].tolist() == list(train.FIGURES)
    files = sorted((tmp_path / 'a').iterdir())
    assert [path.name for path in files] == [f'{i:06}.png' for i in range(12)]
    for path, image in zip(files, arrays['arr_0']):
        assert np.array_equal(np.asarray(Image.open(path)), image)


def start_export(model, target: Path, *flags, ranks=0) -> subprocess.Popen:
    """sample.py in a process of its own, or under torchrun, drawing 600 images to a folder or file."""
    torchrun = f'-m torch.distributed.run --standalone --nproc-per-node {ranks}'.split() if ranks else []
    flag = '--npz' if target.suffix == '.npz' else '--png-dir'
    arguments = [f'{ROOT}/sample.py', model[0], flag, target, '--count', 600, *flags]
    with open(target.with_suffix('.txt'), 'a') as said:
        return subprocess.Popen([sys.executable, *torchrun, *map(str, arguments)], stdout=said, stderr=said,
                                env=os.environ | dict(OMP_NUM_THREADS='1'))


def content(target: Path) -> dict | bytes:
    return ({path.name: path.read_bytes() for path in target.iterdir()} if target.is_dir() else
            target.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize('name, ranks', [('a', 0), ('a.npz', 0), ('a', 2), ('a.npz', 2)])
def test_an_export_that_is_killed_goes_on_to_the_bytes_of_a_calm_one(name, ranks, model, tmp_path):
    """SIGKILL to all its processes, twice; the calm one is drawn by one process."""
    calm, target = tmp_path / f'calm{Path(name).suffix}', tmp_path / name
    assert start_export(model, calm, '--batch-size', 20).wait(timeout=300) == 0
    folder = tmp_path / 'a.npz.parts' if target.suffix else target
    for _ in range(2):
        before = len(list(folder.iterdir())) if folder.exists() else 0
        process = start_export(model, target, '--batch-size', 20, ranks=ranks)
        while process.poll() is None and not (folder.exists() and len(list(folder.iterdir())) > before + 30):
            time.sleep(0.005)                                   # images are on disk as they are drawn
        assert process.poll() is None, target.with_suffix('.txt').read_text()
        kill_all(process)
    assert 30 < len(list(folder.glob('*.png'))) < 600
    assert start_export(model, target, '--batch-size', 20, ranks=ranks).wait(timeout=300) == 0
    assert content(target) == content(calm) and (target == folder or not folder.exists())


def test_an_image_is_the_same_in_batches_of_7_and_of_64(model):
    """The tokens of 99% of the images at least: a rounding may draw another one."""
    runs = [torch.cat([tokens_BL for _, tokens_BL in sample.draw(*model[1:3], [i % 10 for i in range(300)], 0,
                                                                 batch_size, **model[3])])
            for batch_size in (7, 64)]
    assert (runs[0] == runs[1]).all(1).float().mean() >= 0.99


def test_an_export_is_not_mixed_and_torn_images_are_drawn_again(model, photo, tmp_path, capsys,
                                                               monkeypatch):
    def refused(words, flags):
        arguments = [model[0], '--png-dir', tmp_path / 'a', '--batch-size', 4, *flags.split()]
        error = complaint(sample.main, arguments, capsys, monkeypatch)
        assert f'--png-dir {tmp_path}/a: ' in error and words in error

    def stop(*arguments):
        raise KeyboardInterrupt
    command = f'{model[0]} --count 12 --batch-size 4 --png-dir {tmp_path}/'
    sample.main((command + 'calm').split())
    calm = content(tmp_path / 'calm')
    assert len(calm) == 12                                      # nothing else, for an evaluator to read
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample.Folder, 'finish', stop)            # in the last moment
        sample.main((command + 'a').split())
    for words, flags in [('another count, labels, 000011.png;', '--count 11'),
                         ('another seed;', '--count 12 --seed 1'), ('another cfg;', '--count 12 --cfg 3'),
                         ('another labels;', '--count 12 --labels star'),
                         ('another batch_size;', '--count 12 --batch-size 5'),
                         ('another temperature;', '--count 12 --temperature 2'),
                         ('another dtype;', '--count 12 --dtype bfloat16')]:
        refused(words, flags)
    (tmp_path / 'a/000003.png').write_bytes(b'')                # as a power cut leaves it
    (tmp_path / 'a/000007.png').write_bytes(calm['000007.png'][:-300])
    (tmp_path / 'a/000008.png').unlink()
    sample.main((command + 'a --dtype float32').split())        # which it is, on a CPU
    assert content(tmp_path / 'a') == calm
    refused('holds a finished export, or other files', '--count 12')
    shutil.rmtree(tmp_path / 'a')
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample.Folder, 'finish', stop)
        sample.main(f'{command}a --labels 3 --image {photo[0]} --box 0 0 1 .5'.split())
    refused('another photograph, region;', '--count 12 --labels 3')             # it was an edit
    refused('another region;', f'--count 12 --labels 3 --image {photo[0]} --box 0 0 1 .25')


def test_npz_is_what_numpy_would_write_and_holds_a_class_as_often_as_another(model, tmp_path):
    images = draw(tmp_path / 'a.npz', model[0], '--count', 60, '--batch-size', 16)
    arrays = np.load(tmp_path / 'a.npz')
    assert images.shape == (60, 32, 32, 3) and np.bincount(arrays['labels']).tolist() == [6] * 10
    sample.save_npz(tmp_path / 'b.npz', images, arrays['labels'].tolist(), model[2].class_names)
    np.savez(tmp_path / 'c.npz', arr_0=images, labels=arrays['labels'], class_names=arrays['class_names'])
    assert (tmp_path / 'a.npz').read_bytes() == (tmp_path / 'b.npz').read_bytes()
    theirs = np.load(tmp_path / 'c.npz')
    for name in theirs:
        assert (arrays[name] == theirs[name]).all() and arrays[name].dtype == theirs[name].dtype
    assert {path.name for path in tmp_path.iterdir()} == {'a.npz', 'b.npz', 'c.npz'}


# ---------------------------------------------------------------------------------------------- how to draw
def test_temperature_divides_the_logits_and_null_is_no_class(model, tmp_path):
    cold = draw(tmp_path / 'a.npz', model[0], '--labels', 'null', '--count', 4, '--temperature', 1e-7)
    greedy = draw(tmp_path / 'b.npz', model[0], '--labels', 'null', '--count', 4, '--top-k', 1)
    assert (cold == greedy).all() and np.load(tmp_path / 'a.npz')['labels'].tolist() == [10] * 4
    assert (cold != draw(tmp_path / 'c.npz', model[0], '--labels', 'null', '--count', 4)).any()


def test_smooth_images_follow_from_the_seed_too(model, tmp_path):
    a, b, c, d = (draw(tmp_path / f'{i}.npz', model[0], '--smooth', '--count', 5, '--batch-size', *more)
                  for i, more in enumerate([(5,), (2,), (5, '--no-smooth'), (5, '--seed', 1)]))
    assert np.abs(a.astype(int) - b).max() <= 1 and (a != c).any() and (a != d).any()


def test_a_smooth_image_is_one_even_where_its_noise_is_exactly_zero(monkeypatch):
    """As one number in 2^24 is, of which an image of the authors' models takes three million."""
    tokenizer, var, defaults = sample.load(HERE / 'cifar10.pt')
    number = next(i for i in itertools.count() if (sample.noise_of_images(0, i, 1, 85, 1024) == 0).any())
    seen, mix_codes = [], var_module.mix_codes
    monkeypatch.setattr(var_module, 'mix_codes', lambda logits, gumbel, *rest, **more: (
        seen.append(gumbel.isfinite().all()), mix_codes(logits, gumbel, *rest, **more))[1])
    how = defaults | dict(top_k=0, top_p=0.0, smooth=True, firsts=[number])
    images, _ = next(sample.draw(tokenizer, var, [5] * (number + 1), 0, 1, **how))
    assert len(seen) == 4 and all(seen) and images.isfinite().all() and images.std() > 0.05


def test_help_is_in_groups(capsys):
    with pytest.raises(SystemExit):
        sample.build_parser().parse_args(['--help'])
    text = capsys.readouterr().out
    places = [text.index(f'\n{title}:\n') for title in sample.FLAGS]
    assert places == sorted(places) and 'bfloat16 on a GPU' in text


def test_images_of_one_class_are_learned_and_drawn(tmp_path):
    out = run(f'--data-dir {write_images(tmp_path / "one", 20, classes=["cat"])}', tmp_path / 'run')
    assert draw(tmp_path / 'a.npz', out / 'var.pt', '--labels', 'null', 'cat').shape == (2, 32, 32, 3)


def test_a_model_of_one_map_draws_and_edits_but_knows_no_scales(tmp_path, capsys, monkeypatch):
    out = run('--order raster --scales 8', tmp_path / 'run')
    assert (draw(tmp_path / 'a.npz', out / 'var.pt', '--batch-size', 2) ==
            draw(tmp_path / 'b.npz', out / 'var.pt')).all()
    edit = [str(out / 'var.pt'), '--image', str(out / 'samples.png'), '--labels', 'star', '--out',
            str(tmp_path / 'c.png')]
    capsys.readouterr()
    sample.main([*edit, '--box', '0.5', '0', '1', '1'])
    assert capsys.readouterr().out.startswith('32 of 64 tokens are kept of ')
    for flags in ('--keep-scales 1', '--box 0 0 .5 .5 --keep-scales 1', '--show-scales', '--smooth'):
        arguments = [*(edit if 'keep' in flags else [edit[0], '--out', edit[-1]]), *flags.split()]
        error = complaint(sample.main, arguments, capsys, monkeypatch)
        assert flags.split()[-2 if 'keep' in flags else 0] + ': needs a model of several scales' in error


# ---------------------------------------------------------------------------------------------- mistakes
WRONG_FLAGS = """
    sample.py RUN/var.pt --labels 10                | --labels 10; 0 to 9; heart
    sample.py RUN/var.pt --labels hart              | --labels hart; did you mean heart?
    sample.py RUN/var.pt --cfg -1                   | --cfg -1; 0 or more
    sample.py RUN/var.pt --cfg 1e39                 | logits of step 2 of 3 are not finite; --cfg
    sample.py RUN/var.pt --top-p 1.01               | --top-p 1.01; in [0, 1]
    sample.py RUN/var.pt --seed -1                  | --seed -1
    sample.py RUN/var.pt --out image.xyz            | --out image.xyz; .png
    sample.py RUN/var.pt --out RUN/var.csv/a.png    | cannot be written; --out
    sample.py RUN/var.pt --npz samples              | --npz samples; .npz
    sample.py RUN/var.pt --export small             | --export small; .pt
    sample.py RUN/var.pt --export RUN/var.pt        | --export; is the checkpoint itself
    sample.py RUN/last.pt --export small.pt         | last.pt; kind 'resume'; 'var'
    sample.py RUN/var.csv --export small.pt         | var.csv; no checkpoint at all
    sample.py RUN/var.pt --png-dir RUN              | --png-dir; other files; empty it
    sample.py RUN/var.pt --png-dir a --out a/b.png  | --out a/b.png; --png-dir; all
    sample.py RUN/var.pt --png-dir RUN/var.csv      | --png-dir; cannot be written
    sample.py --out a.png                           | name a checkpoint; --official d16
    sample.py RUN/var.pt --official d16             | name a checkpoint; --official d16
    sample.py --official d17                        | --official d17; did you mean d16?
    sample.py RUN/var.pt --weights-dir .            | --weights-dir; needs --official
    sample.py RUN/var.pt --temperature 0            | --temperature 0; above 0
    sample.py RUN/var.pt --smooth --show-scales     | --smooth, --show-scales; one or the other
    sample.py RUN/var.pt --box 0 0 1 .5             | --box; needs --image
    sample.py RUN/var.pt --image RUN/samples.png    | --image; needs --box or --mask or --keep-scales
    sample.py RUN/var.pt --image RUN/samples.png --inpaint            | --inpaint; needs --box or --mask
    sample.py RUN/var.pt --image RUN/samples.png --keep-scales 1 --paste      | --paste; needs --box or --mask
    sample.py RUN/var.pt --image RUN/samples.png --box 0 0 .5 .5 --mask a.png | --box, --mask; one or the
    sample.py RUN/var.pt --image RUN/samples.png --box 0 0 .5 .5 --inpaint --outpaint | --inpaint, --outpaint
    sample.py RUN/var.pt --image RUN/samples.png --box .5 0 .2 1      | --box 0.5 0.0 0.2 1.0; upper left
    sample.py RUN/var.pt --image RUN/samples.png --box 0 0 1 1.2      | --box 1.2; in [0, 1]
    sample.py RUN/var.pt --image RUN/samples.png --box 0 0 1          | --box; expected 4 arguments
    sample.py RUN/var.pt --image RUN/samples.png --box .5 .5 .51 .51  | --box; marks nothing; 8x8
    sample.py RUN/var.pt --image RUN/samples.png --box 0 0 1 1        | --box; marks all
    sample.py RUN/var.pt --image RUN/samples.png --keep-scales 3      | --keep-scales 3; of 3 scales, 2
    sample.py RUN/var.pt --image none.png --keep-scales 1             | --image none.png; No such file
    sample.py RUN/var.pt --image RUN/var.pt --keep-scales 1           | var.pt; cannot be read as an image
    sample.py RUN/var.pt --image RUN/samples.png --mask RUN/reconstructions.png | --mask; is 1084x268; large
    sample.py RUN/var.pt --image RUN/samples.png --keep-scales 1 --compare a.gif | --compare a.gif; .png
    sample.py RUN/var.pt --compare a.png            | --compare; needs --image
    sample.py RUN/var.pt --image RUN/samples.png --keep-scales 1 --out RUN/samples.png | --out; is the image
    sample.py RUN/var.pt --image RUN/samples.png --keep-scales 1 --out a.png --compare ./a.png | is the; its
    sample.py RUN/var.pt --out .png                 | --out .png; must end in
    sample.py RUN/var.pt --show-scales --npz a.npz  | --show-scales; needs --out
    sample.py RUN/var.pt --image RUN/samples.png --box 0 0 .5 .5 --paste --show-scales | --paste, --show-
"""


@pytest.mark.parametrize('line', [' '.join(line.split()) for line in WRONG_FLAGS.strip().splitlines()])
def test_a_wrong_flag_is_named(line, tiny_run, tmp_path, capsys, monkeypatch):         # noqa: F811
    check_wrong_flag(line, tiny_run, tmp_path, capsys, monkeypatch)


def test_a_photograph_of_any_kind_is_read_as_it_is_seen(model, tmp_path, capsys):
    def seen(name, image, **options):
        image.save(tmp_path / name, **options)
        return sample.read_photograph(name, tmp_path / name, 32)[0].permute(1, 2, 0).numpy().astype(int)
    drawing = Image.fromarray(train.draw_shapes(1, 0)[0][0].permute(1, 2, 0).numpy())
    plain = np.asarray(drawing).astype(int)
    assert (seen('same.png', drawing) == plain).all() and capsys.readouterr().out == ''     # pixel by pixel
    assert (seen('grey.png', drawing.convert('L')) == np.asarray(drawing.convert('L'))[..., None]).all()
    deep = np.linspace(0, 65535, 32).astype(np.uint16) * np.ones((32, 1), np.uint16)
    assert (seen('deep.png', Image.fromarray(deep))[0, :, 0] == np.rint(np.linspace(0, 255, 32))).all()
    clear = drawing.copy()
    clear.putalpha(Image.fromarray(np.tri(32, dtype=np.uint8) * 255))
    for mode in ('RGBA', 'LA', 'PA'):
        pixels = seen(f'{mode}.tif' if mode == 'PA' else f'{mode}.png', clear.convert(mode))
        assert (pixels[np.tri(32) == 0] == 255).all() and (pixels[np.tri(32) == 1] < 255).any()
    assert (sample.read_image(tmp_path / 'RGBA.png', 32, shorter=32)[0, 1:] == 255).all()   # in training, too
    exif = Image.Exif()
    exif[0x0112] = 6                                            # the camera was held upright
    turned = seen('turned.png', drawing.rotate(90), exif=exif)
    assert (turned == plain).all()
    frames = dict(save_all=True, append_images=[drawing.rotate(90).quantize()])
    assert np.abs(seen('moves.gif', drawing.quantize(), **frames) - plain).mean() < 20
    assert 'moves.gif: the first of its 2 frames is taken' in capsys.readouterr().out
    assert seen('wide.jpg', drawing.resize((90, 48))).shape == (32, 32, 3)
    edit_of(model, (tmp_path / 'wide.jpg',), '--keep-scales 2')
    said = capsys.readouterr().out
    assert '5 of 69 tokens are kept of' in said and 'of whose 90x48 the central square is taken' in said


def test_a_photograph_or_mask_that_will_not_do_is_named(model, photo, tmp_path, capsys, monkeypatch):
    def complains(words, flags):
        arguments = f'{model[0]} --image {photo[0]} --out {tmp_path}/x.png {flags}'.split()
        assert words in complaint(sample.main, arguments, capsys, monkeypatch)
        assert not (tmp_path / 'x.png').exists()
    (tmp_path / 'torn.png').write_bytes(photo[0].read_bytes()[:-200])
    Image.new('1', (20_000, 20_000)).save(tmp_path / 'bomb.png')
    for name, words in dict(torn='torn.png: cannot be read as an image (', bomb='bomb.png: cannot be read as '
                            'an image (Image size (400000000 pixels) exceeds').items():
        complains(words, f'--image {tmp_path}/{name}.png --keep-scales 1')
        complains(f'--mask {tmp_path}/{words}', f'--mask {tmp_path}/{name}.png')
    for name, size, colour, words in [('black', 32, 0, 'marks nothing'), ('white', 32, 255, 'marks all'),
                                      ('large', 64, 255, 'is 64x64, but the image is 32x32; make it as')]:
        Image.new('L', (size, size), colour).save(tmp_path / f'{name}.png')
        complains(f'{name}.png: {words}', f'--mask {tmp_path}/{name}.png')


def test_a_folder_in_the_place_of_a_file_is_named_at_once(model, tmp_path, capsys, monkeypatch):
    (tmp_path / 'a.npz').mkdir()
    error = complaint(sample.main, [model[0], '--npz', tmp_path / 'a.npz'], capsys, monkeypatch)
    assert 'a.npz: is a folder' in error and not (tmp_path / 'a.npz.parts').exists()
    (tmp_path / 'b.npz.parts').mkdir()
    (tmp_path / 'b.npz.parts/mine.txt').write_text('mine')
    error = complaint(sample.main, [model[0], '--npz', tmp_path / 'b.npz'], capsys, monkeypatch)
    assert f'--npz {tmp_path}/b.npz: {tmp_path}/b.npz.parts: holds a finished export, or other' in error


@pytest.mark.slow
def test_many_processes_complain_once_and_need_something_that_they_can_share(model, tmp_path):
    torchrun = [sys.executable, *'-m torch.distributed.run --standalone --nproc-per-node 2'.split()]
    for flags, words in [('', 'many processes: need --npz or --png-dir'),
                         ('--npz a.npz --out a.png', '--out a.png: goes with one process alone'),
                         ('--npz a.npz --labels hart', '--labels hart: no such class')]:
        command = [*torchrun, f'{ROOT}/sample.py', str(model[0]), *flags.split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count('error: ') == 1 and f'error: {words}' in done.stderr
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]


@pytest.mark.slow
def test_too_little_memory_for_a_checkpoint_is_not_called_its_fault(tmp_path):
    torch.save(dict(kind='var', weight=torch.zeros(80_000_000)), tmp_path / 'large.pt')
    script = f"""if True:
        import re, resource, sys
        sys.path.insert(0, {str(ROOT)!r})
        import sample
        size = 1024 * int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1])
        resource.setrlimit(resource.RLIMIT_AS, (size + 2 ** 27, size + 2 ** 27))
        sample.run_command(sample.main)"""
    command = [sys.executable, '-c', script, str(tmp_path / 'large.pt'), '--out', str(tmp_path / 'x.png')]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('error: out of memory'), done.stderr


@pytest.mark.slow
def test_too_large_a_batch_for_the_memory_is_named(model, tmp_path):
    limit = partial(resource.setrlimit, resource.RLIMIT_AS, (4 * 2 ** 30, 4 * 2 ** 30))
    command = [sys.executable, f'{ROOT}/sample.py', model[0], '--count', '200000', '--batch-size', '200000']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and not list(tmp_path.iterdir()), done.stderr
    assert done.stderr.startswith('error: out of memory; take fewer images at once, by --batch-size')
