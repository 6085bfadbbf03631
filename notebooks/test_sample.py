"""sample.py: real-world image files, edits, class names, the authors' weights, exports, user errors."""
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import zlib
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
import sample
import train
from test_processes import kill_all, start, wait_until
from test_mistakes import check_wrong_flag, complaint
from test_var import PARITY, recipe, run, seeded, tiny_run, write_images
import var as var_module


@pytest.fixture(scope='module')
def model(tiny_run):
    """The checkpoint of a tiny run and its contents: 8x8 latents, 4 pixels wide each; scales 1, 2, 8."""
    return tiny_run / 'var.pt', *sample.load(tiny_run / 'var.pt')


@pytest.fixture
def photo(tmp_path):
    """An image file of a drawn shape in the model's own size, and its pixels (3, 32, 32)."""
    pixels = train.draw_shapes(4, 7)[0][3]
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / 'photo.png')
    return tmp_path / 'photo.png', pixels


def draw(path: Path, *flags) -> np.ndarray:
    """The images that `sample.py ... --npz path` draws: uint8 (N, H, W, 3)."""
    sample.main([str(flag) for flag in (*flags, '--npz', path)])
    return np.load(path)['arr_0']


# --------------------------------------------------------------------------------------------- reading images
RAMP = np.linspace(0, 1, 64)[None].repeat(64, 0)                # dark on the left, bright on the right
SQUARE = np.zeros((64, 64, 4), np.uint8)                        # red on a transparent background
SQUARE[16:48, 16:48] = 255, 0, 0, 255
CLEAR, HALF = Image.fromarray(SQUARE), Image.fromarray(SQUARE[..., :3])
WIDE = Image.new('RGB', (96, 64))                               # red on the left
WIDE.paste('red', (0, 0, 48, 64))


def pixels_of(path: Path) -> np.ndarray:
    return sample.cut_square(sample.open_image(path), 64, 64).astype(int)


@pytest.mark.parametrize('name', ['a.png', 'a.tif', 'a.pgm'])
def test_16_bits_become_8(name, tmp_path):
    if name == 'a.pgm':
        (tmp_path / name).write_bytes(b'P5 64 64 65535\n' + (RAMP * 65535).astype('>u2').tobytes())
    else:
        Image.fromarray((RAMP * 65535).astype(np.uint16)).save(tmp_path / name)
    assert np.abs(pixels_of(tmp_path / name)[..., 1] - 255 * RAMP).max() <= 1


@pytest.mark.parametrize('name, image, options', [
    ('a.png', CLEAR, {}), ('palette.png', CLEAR.quantize(8), {}), ('a.gif', CLEAR, {}),
    ('a.webp', CLEAR, dict(lossless=True)), ('pa.tif', CLEAR.convert('PA'), {}),
    ('la.png', CLEAR.convert('LA'), {}),
    ('rgb.png', HALF, dict(transparency=(0, 0, 0))), ('grey.png', HALF.convert('L'), dict(transparency=0))])
def test_a_transparent_ground_is_white(name, image, options, tmp_path):
    image.save(tmp_path / name, **options)
    pixels, red = pixels_of(tmp_path / name), (76, 76, 76) if name in ('la.png', 'grey.png') else (255, 0, 0)
    assert (pixels[:12] == 255).all() and np.abs(pixels[32, 32] - red).max() <= 2


@pytest.mark.parametrize('name', 'a.jpg a.png L.tif RGBA.tif P.tif'.split())
@pytest.mark.parametrize('orientation, red', [
    (1, 'left'), (2, 'right'), (3, 'right'), (4, 'left'), (5, 'top'), (6, 'top'), (7, 'bottom'),
    (8, 'bottom')])
def test_an_image_lies_as_the_camera_was_held(name, orientation, red, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (WIDE if name[0] == 'a' else WIDE.convert(name[:-4])).save(tmp_path / name, exif=exif)
    image = pixels_of(tmp_path / name)[..., 0]
    means = dict(left=image[:, :20].mean(), right=image[:, -20:].mean(), top=image[:20].mean(),
                 bottom=image[-20:].mean())
    assert max(means, key=means.get) == red and means[red] > (70 if name == 'L.tif' else 200)
    assert min(means.values()) < 10


@pytest.mark.slow
def test_what_every_viewer_opens_is_read_without_a_warning(tmp_path):
    """Damaged metadata, an animation, 196 megapixels; an image of the right size is unchanged."""
    exif = Image.Exif()
    exif[0x0112] = 6
    WIDE.save(tmp_path / 'a.jpg', exif=exif)
    content = bytearray((tmp_path / 'a.jpg').read_bytes())
    start = content.index(b'Exif')
    content[start + 20:start + 30] = b'\xff' * 10               # the Exif table
    (tmp_path / 'a.jpg').write_bytes(content)
    WIDE.save(tmp_path / 'moves.gif', save_all=True, append_images=[WIDE.rotate(180)])
    for name in ('a.jpg', 'moves.gif'):
        assert (np.abs(pixels_of(tmp_path / name)[:, :20] - (255, 0, 0)) < 5).all()
    Image.new('1', (14_000, 14_000), 1).save(tmp_path / 'large.png')
    assert sample.open_image(tmp_path / 'large.png').size == (14_000, 14_000)
    HALF.save(tmp_path / 'same.png')
    assert (pixels_of(tmp_path / 'same.png') == SQUARE[..., :3]).all()
    script = 'import sample, sys; print([sample.open_image(path).size for path in sys.argv[1:]])'
    done = subprocess.run([sys.executable, '-c', script, *map(str, tmp_path.iterdir())], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout.count('(') == 4 and done.stderr == ''


@pytest.mark.parametrize('w, h', [(200, 150), (150, 201), (97, 97), (20, 30)])
def test_a_crop_is_what_resizing_the_whole_image_and_cutting_gives(w, h, tmp_path):
    noise = np.random.RandomState(0).randint(0, 256, (h // 4, w // 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((w, h), Image.BICUBIC).save(tmp_path / 'a.png')
    W, H = (72, int(72 * h / w)) if w <= h else (int(72 * w / h), 72)
    whole = np.asarray(Image.open(tmp_path / 'a.png').resize((W, H), Image.LANCZOS), np.int16)
    for noise, x, y in [((0.3, 0.9, 0.0), int(0.9 * (W - 63)), int(0.3 * (H - 63))),
                        (None, round((W - 64) / 2), round((H - 64) / 2))]:
        cut = sample.cut_square(sample.open_image(tmp_path / 'a.png', 72), 64, 72, noise)
        gap = np.abs(cut - whole[y:y + 64, x:x + 64])
        assert cut.shape == (64, 64, 3) and gap.max() <= 1                  # rounded to whole levels


@pytest.mark.parametrize('content, words', [
    (b'\0\0\0\x18ftypheic\0\0\0\0mif1heic', 'HEIC, which Pillow does not read; save it as JPEG or PNG'),
    (b'\0\0\0\x18ftypmif1\0\0\0\0mif1heic', 'HEIC'), (b'no image', 'cannot identify image file'),
    (b'', 'cannot identify image file'), (None, 'palette index out of range')])
def test_what_is_no_image_is_named_and_so_is_heic(content, words, model, tmp_path, capsys, monkeypatch):
    if content is None:                                         # 256 colours, 300 transparency values
        WIDE.quantize(256).save(tmp_path / 'a.jpg', 'PNG', transparency=bytes(256))
        content = (tmp_path / 'a.jpg').read_bytes()
        start = content.index(b'tRNS')
        chunk = b'tRNS' + bytes(300)
        rest = content[start + int.from_bytes(content[start - 4:start], 'big') + 8:]
        longer = struct.pack('>I', 300) + chunk + struct.pack('>I', zlib.crc32(chunk))
        content = content[:start - 4] + longer + rest
    (tmp_path / 'a.jpg').write_bytes(content)
    arguments = [model[0], '--image', tmp_path / 'a.jpg', '--keep-scales', 1, '--out', tmp_path / 'x.png']
    error = complaint(sample.main, arguments, capsys, monkeypatch)
    assert f'{tmp_path}/a.jpg: cannot be read as an image (' in error and words in error


def test_an_image_of_32_bits_says_what_would_do(tmp_path):
    for kind in (np.float32, np.int32):
        Image.fromarray(RAMP.astype(kind)).save(tmp_path / 'a.tif')
        with pytest.raises(sample.UserError, match='a.tif: .*has 32 bits per channel; save it with 8 or 16'):
            sample.open_image(tmp_path / 'a.tif')


# ---------------------------------------------------------------------------------------------------- editing
def edit_of(model, photo, flags: str):
    args = sample.build_parser().parse_args(f'{model[0]} --image {photo[0]} {flags}'.split())
    sample.check_flags(args)
    return sample.Edit(args, model[1])


def test_an_edit_keeps_the_tokens_that_its_box_does_not_touch_and_draws_the_others(model, photo):
    own_1L = model[1].encode(train.to_float(photo[1][None]))
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:6, 1:7] = True                                     # the box in latents, rounded
    for more, region in [('', inside), ('--outpaint', ~inside)]:
        edit = edit_of(model, photo, f'--box 0.25 0.1 0.7 0.9 {more}')
        kept = edit.kept_1L >= 0
        assert torch.equal(kept[0, 5:].view(8, 8), ~region) and kept[0, 0]
        batches = sample.draw(*model[1:3], [10] * 3, 0, 50, kept_BL=edit.kept_1L, **model[3])
        tokens_BL = torch.cat([tokens_BL for _, tokens_BL in batches])
        assert torch.equal(tokens_BL[:, kept[0]], own_1L[:, kept[0]].expand(3, -1))     # in all images
        assert len({tuple(row) for row in tokens_BL[:, ~kept[0]].tolist()}) == 3        # different per image


def drawn_anew(edit) -> list[list[int]]:
    """Rows and columns of the latents that aren't kept."""
    return (edit.kept_1L[0, 5:].view(8, 8) < 0).nonzero().tolist()


def test_a_mask_is_white_or_white_paint_on_nothing_or_a_photograph_with_a_hole(model, photo, tmp_path, capsys,
                                                                               monkeypatch):
    """A latent is regenerated if the mask touches any of its pixels. Masks can also have 16 bits."""
    marked = np.zeros((32, 32), np.uint8)
    marked[15, 4:9] = 255                                       # in latents 1 and 2 of row 3
    layer, hole = Image.new('RGBA', (32, 32)), Image.open(photo[0])
    layer.paste('white', mask=Image.fromarray(marked))
    hole.putalpha(Image.fromarray(255 - marked))
    bright = Image.new('RGBA', (32, 32), (254, 254, 220))       # almost white everywhere, but not quite
    bright.putalpha(Image.fromarray(255 - marked))
    soft = Image.new('RGBA', (32, 32), (255, 255, 255, 0))      # an 80% brush with a soft edge
    soft.putalpha(Image.fromarray(marked // 255 * 204 + np.roll(marked, 1, 0) // 255 * 60))
    for mask in (Image.fromarray(marked), Image.fromarray(marked).convert('1'), layer, hole, bright, soft,
                 Image.fromarray(marked.astype(np.uint16) * 257)):
        mask.save(tmp_path / 'mask.png')
        assert drawn_anew(edit_of(model, photo, f'--mask {tmp_path}/mask.png')) == [[3, 1], [3, 2]], mask
    outside = edit_of(model, photo, f'--mask {tmp_path}/mask.png --outpaint')
    assert len(drawn_anew(outside)) == 64                       # no latent fits in one row of pixels
    hole.putalpha(200)
    hole.save(tmp_path / 'mask.png')                            # neither paint nor a hole
    arguments = [model[0], '--image', photo[0], '--mask', tmp_path / 'mask.png', '--out', tmp_path / 'x.png']
    error = complaint(sample.main, arguments, capsys, monkeypatch)
    assert 'marks nothing' in error and 'white paint' in error and 'transparent hole' in error


def test_keep_scales_goes_on_from_the_first_scales(model, photo):
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


def test_the_sheet_of_an_edit_begins_with_the_photograph_and_what_is_kept(model, photo, tmp_path, capsys):
    flags = f'{model[0]} --image {photo[0]} --box 0.5 0 1 1 --count 3 --paste --out {tmp_path}/o.png'
    sample.main(flags.split())
    assert '35 of 69 tokens kept from ' in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / 'o.png'))[::4, ::4]
    own, kept, *drawn = (sheet[:, x:x + 32] for x in range(0, 5 * 34, 34))
    assert (own == photo[1].permute(1, 2, 0).numpy()).all()
    assert (kept[:16] == own[:16]).all() and (kept[16:] == 255).all()
    assert all((image[:14] == own[:14]).all() and (image[16:] != own[16:]).any() for image in drawn)
    sample.main(f'{model[0]} --image {photo[0]} --keep-scales 2 --out {tmp_path}/k.png'.split())
    tokens_1L = model[1].encode(train.to_float(photo[1][None]))
    coarse = sample.to_uint8(model[1].decode_f_hat(model[1].f_hats(tokens_1L)[1]))[0]
    kept = np.asarray(Image.open(tmp_path / 'k.png'))[:128:4, 136:264:4]
    assert (kept == coarse.permute(1, 2, 0).numpy()).all()
    assert sample.grid(torch.zeros(30, 3, 32, 32), 30).size == (30 * 34 - 2, 32)       # too wide to enlarge


def test_without_labels_an_edit_asks_for_no_class_and_null_is_a_label(model, photo, tmp_path):
    flags = f'{model[0]} --image {photo[0]} --box 0 0 0.5 1'.split()
    a, b, c = (draw(tmp_path / f'{len(more)}.npz', *flags, *more.split())
               for more in ('', '--labels null', '--labels star'))
    assert (a == b).all() and (a != c).any() and np.load(tmp_path / '0.npz')['labels'].tolist() == [10]


def test_a_model_of_one_map_draws_and_edits(tmp_path, capsys, monkeypatch):
    out = run('--order raster --scales 8', tmp_path / 'run')
    assert (draw(tmp_path / 'a.npz', out / 'var.pt', '--batch-size', 2) ==
            draw(tmp_path / 'b.npz', out / 'var.pt')).all()
    edit = f'{out}/var.pt --image {out}/samples.png --labels star --out {tmp_path}/c.png'.split()
    capsys.readouterr()
    sample.main([*edit, *'--box 0.5 0 1 1'.split()])
    assert capsys.readouterr().out.startswith('32 of 64 tokens kept from ')
    assert 'with 1 scales' in complaint(sample.main, [*edit, '--keep-scales', 1], capsys, monkeypatch)


# ------------------------------------------------------------------------------------------------- animations
def frames_of(path: Path) -> tuple[list[np.ndarray], list[int]]:
    """The frames of a GIF that loops for ever, and how long each lasts, in ms."""
    with Image.open(path) as gif:
        assert gif.format == 'GIF' and gif.info['loop'] == 0
        frames = []
        for n in range(gif.n_frames):
            gif.seek(n)
            frames.append((np.asarray(gif.convert('RGB')).astype(int), gif.info['duration']))
    return [pixels for pixels, _ in frames], [duration for _, duration in frames]


def test_an_animation_shows_each_scale_for_a_quarter_of_a_second_and_then_pauses(model, tmp_path):
    path, tokenizer, var, defaults = model
    flags = f'{path} --count 4 --seed 3 --show-scales --out {tmp_path}/a.gif'.split()
    images = draw(tmp_path / 'a.npz', *flags)
    frames, durations = frames_of(tmp_path / 'a.gif')
    assert durations == [250, 250, 2250]
    _, tokens_BL = next(sample.draw(tokenizer, var, [0, 1, 2, 3], 3, 50, **defaults))
    *parts, _ = [tokenizer.decode_f_hat(f_hat) for f_hat in tokenizer.f_hats(tokens_BL)]
    parts.append(torch.tensor(images).permute(0, 3, 1, 2))
    expected = [np.asarray(sample.grid(part, 4)).astype(int) for part in parts]
    errors = np.array([[abs(frame - other).mean() for other in expected] for frame in frames])
    assert errors.diagonal().max() < 10 and (errors.argmin(1) == [0, 1, 2]).all()       # 256 colours a frame


def test_an_animation_of_a_raster_model_uncovers_the_finished_image_token_by_token(tmp_path):
    out = run('--order raster --scales 8', tmp_path / 'run')
    flags = f'{out}/var.pt --labels 3 --count 2 --batch-size 1 --show-scales --out {tmp_path}/a.GIF'.split()
    images = torch.tensor(draw(tmp_path / 'a.npz', *flags)).permute(0, 3, 1, 2)
    frames, durations = frames_of(tmp_path / 'a.GIF')
    assert durations == [250] * 63 + [2250]
    finished = np.asarray(sample.grid(images, 2)).astype(int)
    assert abs(frames[-1] - finished).mean() < 8
    for n in (0, 9, 62):                                    # 8 rows of 8 tokens, 4 pixels wide, enlarged by 4
        covered = np.ones((8, 8))
        covered.flat[:n + 1] = 0
        covered = np.kron(covered, np.ones((16, 16))).astype(bool)
        for part in (np.s_[:, :128], np.s_[:, 136:]):       # two images, and a white line of 8 between them
            assert (abs(frames[n][part][covered] - 192) <= 8).all()
            assert (frames[n][part][~covered] == frames[-1][part][~covered]).all()
    sample.main([*flags[:-1], f'{tmp_path}/a.png'])
    with Image.open(tmp_path / 'a.png') as rows:
        assert rows.size == (64 * 34 - 2, 2 * 34 - 2)       # a row per image


@pytest.mark.parametrize('flags', ['--count 4', '--show-scales --count 101'])
def test_a_gif_is_an_animation_of_at_most_100_images(flags, model, tmp_path, capsys, monkeypatch):
    line = complaint(sample.main, f'{model[0]} {flags} --out {tmp_path}/a.gif'.split(), capsys, monkeypatch)
    assert 'a.gif: a .gif needs --show-scales' in line and not (tmp_path / 'a.gif').exists()


# ------------------------------------------------------------------------------------------------ class names
@pytest.mark.parametrize('names, text, label', [
    (['cat', 'dog'], 'Dog', 1), (['cat', 'dog'], '1', 1), (['cat', 'dog'], 'null', 2),
    (['cat', 'dog'], '2', None), (['1', '2', '3', '4'], '1', 0), (['1', '2', '3', '4'], '0', None),
    (['0', '2', 'cat'], '1', None)])
def test_where_a_class_is_named_by_a_number_numbers_are_names(names, text, label):
    if label is not None:
        assert sample.parse_label(text, names) == label
    else:
        with pytest.raises(sample.UserError, match=f'--labels {text}: .* from 0: {names[0]}, '):
            sample.parse_label(text, names)


def test_images_of_one_class_are_learned_and_drawn(tmp_path):
    out = run(f'--data-dir {write_images(tmp_path / "one", 20, classes=["cat"])}', tmp_path / 'run')
    assert draw(tmp_path / 'a.npz', out / 'var.pt', '--labels', 'null', 'cat').shape == (2, 32, 32, 3)


# --------------------------------------------------------------------------------------------------- machines
def test_an_old_gpu_is_named_where_it_lacks_kernels_and_draws_in_float32_where_it_lacks_bfloat16(
        model, tmp_path, capsys, monkeypatch):
    """Simulates what torch returns on an old Pascal card, a T4 and an A100."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    with monkeypatch.context() as patch:
        def no_kernel(*shape, device):
            raise RuntimeError('CUDA error: no kernel image is available for execution on the device\nCUDA')
        patch.setattr(torch, 'ones', no_kernel)
        error = complaint(sample.main, [model[0], '--out', tmp_path / 'x.png'], capsys, monkeypatch)
    assert '--device cuda: not usable' in error and 'no kernel image' in error
    assert '--device cpu always works' in error
    for capability, dtype in [((7, 5), 'float32'), ((8, 0), 'bfloat16')]:
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        assert sample.choose_dtype(torch.device('cuda'), 'auto') == dtype
        assert sample.choose_dtype(torch.device('cuda'), 'bfloat16') == 'bfloat16'
    assert sample.choose_dtype(torch.device('cpu'), 'auto') == 'float32'


def test_a_tilde_that_the_shell_left_is_home(model, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'photos').mkdir()
    sample.main([str(model[0]), '--count', '2', '--out=~/x.png', '--png-dir=~/pngs'])
    assert (tmp_path / 'x.png').exists() and (tmp_path / 'pngs/000001.png').exists()
    args, _ = train.parse(['--data-dir=~/photos', '--out=~/run', '--tokenizer=~/a.pt'])
    found = [args.data_dir, args.out, args.tokenizer]
    assert found == [f'{tmp_path}/{name}' for name in ('photos', 'run', 'a.pt')]
    assert not (tmp_path / '~').exists()


# --------------------------------------------------------------------------------------- the authors' weights
def test_stage_2_takes_the_authors_tokenizer(tmp_path):
    torch.save(recipe(PARITY['adaln']['vqvae_keys']), tmp_path / 'vae.pth')
    flags = f'--stage var --tokenizer {tmp_path}/vae.pth --out {tmp_path}/out '
    train.main((flags + '--scales 1 2 3 4 --depth 1 --var-steps 1 --train-count 16 --val-count 4 '
                '--batch-size 4 --device cpu').split())
    tokenizer, var, _ = sample.load(tmp_path / 'out/var.pt')
    assert tokenizer.config.image_size == 64 and var.config.vocab_size == 64
    # if the preset has the released pyramid, --scales can be omitted; otherwise no scales are assumed
    args, _ = train.parse([*flags.split(), '--preset', 'imagenet256'])
    tokenizer = train.make_tokenizer(args, ['var'])
    assert len(tokenizer.config.scales) == 10 and tokenizer.config.image_size == 256
    with pytest.raises(sample.UserError, match='specify --scales'):
        train.make_tokenizer(train.parse(flags.split())[0], ['var'])


def released_shapes(depth: int, scales: tuple, classes=1000, V=4096, C=32) -> dict[str, tuple]:
    """The keys and shapes of a released var_d<depth>.pth, as the released code builds it."""
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
    """On meta tensors, which have shapes but no data."""
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
    """The folder of small stand-ins with the released file names, served from a local address."""
    folder = tmp_path / 'served'
    folder.mkdir()
    case = PARITY['shared_adaln_ten_scales']
    torch.save(recipe(case['vqvae_keys']), folder / 'vae_ch160v4096z32.pth')
    torch.save(recipe(case['var_keys']), folder / 'var_d3.pth')
    monkeypatch.setitem(sample.RELEASED, 'd3', tuple(case['config']['patch_nums']))
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
    assert drawn.shape == (2, 160, 160, 3) and '100%' in capfd.readouterr().err             # progress
    assert {path.name for path in (tmp_path / 'hub/checkpoints').iterdir()} == {
        'vae_ch160v4096z32.pth', 'var_d3.pth'}
    local = draw(tmp_path / 'b.npz', *official('d3', released))
    for path in released.iterdir():
        path.unlink()
    assert (draw(tmp_path / 'c.npz', *official('d3', None)) == drawn).all() and (local == drawn).all()
    edited = draw(tmp_path / 'd.npz', *official('d3', None), '--image', photo[0], '--box', 0, 0, 0.5, 0.5)
    assert edited.shape == drawn.shape and (edited != drawn).any()
    sample.main(['--official', 'd3', '--export', f'{tmp_path}/d3.pt'])
    _, var, defaults = sample.load(tmp_path / 'd3.pt')
    assert var.class_names == ['0', '1', '2', '3'] and defaults == dict(cfg=1.5, top_k=900, top_p=0.96)


def test_weights_that_will_not_do_are_named(released, tmp_path, capsys, monkeypatch):
    def complains(name, folder, *words):
        arguments = [*official(name, folder), '--out', f'{tmp_path}/x.png']
        error = complaint(sample.main, arguments, capsys, monkeypatch, '100%|^ *[0-9]+%')
        assert all(word in error for word in words), error
    complains('d20', None, '/var_d20.pth: cannot be downloaded', 'pass its folder as --weights-dir')
    complains('d20', released, 'No such file or directory', 'served/var_d20.pth')
    complains('d3', tmp_path / 'gone', 'gone/vae_ch160v4096z32.pth')
    assert not (tmp_path / 'gone').exists()
    whole = (released / 'var_d3.pth').read_bytes()
    (released / 'var_d3.pth').write_bytes(whole[:-1000])
    complains('d3', released, 'served/var_d3.pth: corrupt, or not the expected file')
    (released / 'var_d3.pth').write_bytes(whole)
    keys = PARITY['shared_adaln_ten_scales']['vqvae_keys']
    torch.save(recipe(keys | {'quantize.embedding.weight': [47, 8]}), released / 'vae_ch160v4096z32.pth')
    complains('d3', released, 'var_d3.pth', 'vocab_size: the transformer was made for 48')
    torch.save(dict(state=1), released / 'vae_ch160v4096z32.pth')
    complains('d3', released, 'z32.pth: corrupt, or not the expected file', '(not a released VAR')


# ---------------------------------------------------------------------------------------------------- exports
def test_an_export_is_half_as_large_and_draws_at_its_own_defaults(tiny_run, tmp_path, capsys):
    capsys.readouterr()
    sample.main([f'{tiny_run}/var.pt', '--export', f'{tmp_path}/small.pt', '--cfg', '3', '--top-k', '7'])
    assert {path.name for path in tmp_path.iterdir()} == {'small.pt'}       # no images unless asked for
    assert re.fullmatch(r'.*small.pt: [\d.]+ MiB\n', capsys.readouterr().out)
    assert (tmp_path / 'small.pt').stat().st_size < 0.6 * (tiny_run / 'var.pt').stat().st_size
    tokenizer, var, defaults = sample.load(tmp_path / 'small.pt')
    assert defaults == dict(cfg=3.0, top_k=7, top_p=0.8) and var.class_names == list(train.FIGURES)
    for small, model in zip((tokenizer, var), sample.load(tiny_run / 'var.pt')):
        for name, weight in model.state_dict().items():
            assert small.state_dict()[name].dtype == torch.float32
            assert torch.equal(small.state_dict()[name], weight.bfloat16().float())


def content(target: Path) -> dict | bytes:
    return ({path.name: path.read_bytes() for path in target.iterdir()} if target.is_dir() else
            target.read_bytes())


@pytest.mark.slow
def test_an_export_that_is_killed_goes_on_to_the_bytes_of_a_calm_one(model, tmp_path):
    """SIGKILL to both processes, twice; the uninterrupted export uses one process."""
    def export(name: str, ranks: int) -> subprocess.Popen:
        flags = f'{model[0]} --npz {tmp_path}/{name}.npz --count 600 --batch-size 20'
        return start(flags, tmp_path / name, ranks, 'sample.py')
    assert export('calm', 0).wait(timeout=300) == 0
    folder = tmp_path / 'a.npz.parts'
    for _ in range(2):
        before = len(list(folder.glob('*')))
        process = export('a', 2)                                # images are saved as they are drawn
        wait_until(lambda: len(list(folder.glob('*'))) > before + 30, process, tmp_path / 'a')
        kill_all(process)
    assert 30 < len(list(folder.glob('*.png'))) < 600
    assert export('a', 2).wait(timeout=300) == 0
    assert content(tmp_path / 'a.npz') == content(tmp_path / 'calm.npz') and not folder.exists()


def test_an_image_is_the_same_in_batches_of_7_and_of_64(model):
    """At least 99% of the images have the same tokens: rounding can change a draw."""
    runs = [torch.cat([tokens_BL for _, tokens_BL in sample.draw(*model[1:3], [i % 10 for i in range(300)], 0,
                                                                 batch_size, **model[3])])
            for batch_size in (7, 64)]
    assert (runs[0] == runs[1]).all(1).float().mean() >= 0.99


def test_an_export_goes_on_is_not_mixed_with_another_and_shares_its_folder_with_strangers(
        model, photo, tmp_path, capsys, monkeypatch):
    def refused(folder, flags, words='started with other settings'):
        arguments = [*f'{model[0]} --png-dir {folder} --count 12 --batch-size 4'.split(), *flags.split()]
        error = complaint(sample.main, arguments, capsys, monkeypatch)
        assert f'{folder}: ' in error and words in error
    folder = tmp_path / 'a'
    folder.mkdir()
    (folder / '.DS_Store').write_bytes(b'of a Mac')
    command = f'{model[0]} --png-dir {folder} --batch-size 4 --count 12'.split()
    sample.main(command)
    calm = content(folder)
    assert set(calm) == {'.DS_Store', 'made.json', *(f'{i:06}.png' for i in range(12))}
    (folder / '000007.png').unlink()
    other = folder / '000006.png'                               # in the same batch
    os.utime(other, (0, 0))
    sample.main([*command, '--dtype', 'float32'])               # the default on a CPU
    assert content(folder) == calm and other.stat().st_mtime == 0           # not written again
    for flags in ('--count 11', '--seed 1', '--cfg 3', '--labels star', '--batch-size 5', '--dtype bfloat16',
                  f'--image {photo[0]} --box 0 0 1 .5'):
        refused(folder, flags)
    shutil.copy(model[0], tmp_path / 'copy.pt')                 # the same model
    sample.main([str(tmp_path / 'copy.pt'), *command[1:]])
    checkpoint = torch.load(model[0], weights_only=True)
    checkpoint['var']['head.bias'] += 1
    torch.save(checkpoint, model[0].with_name('other.pt'))      # another model
    error = complaint(sample.main, [model[0].with_name('other.pt'), *command[1:]], capsys, monkeypatch)
    assert 'started with other settings' in error and content(folder) == calm
    (folder / 'made.json').unlink()
    refused(folder, '', 'holds images; empty it or choose another')
    edit = f'--image {photo[0]} --box 0 0 1 .5'.split()
    sample.main([*command, *edit, '--png-dir', f'{tmp_path}/b'])
    refused(tmp_path / 'b', f'--image {photo[0]} --box 0 0 1 .25')          # another region


def test_npz_is_what_numpy_would_write_and_holds_the_pngs_and_a_class_as_often_as_another(model, tmp_path):
    flags = [model[0], '--count', 60, '--batch-size', 16, '--png-dir', tmp_path / 'pngs']
    images = draw(tmp_path / 'a.npz', *flags)
    arrays = np.load(tmp_path / 'a.npz')
    assert images.shape == (60, 32, 32, 3) and np.bincount(arrays['labels']).tolist() == [6] * 10
    for path, image in zip(sorted((tmp_path / 'pngs').glob('*.png')), images, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), image)
    np.savez(tmp_path / 'b.npz', arr_0=images, labels=arrays['labels'], class_names=arrays['class_names'])
    theirs = np.load(tmp_path / 'b.npz')
    assert arrays['class_names'].tolist() == list(train.FIGURES) and set(theirs) == set(arrays)
    for name in theirs:
        assert (arrays[name] == theirs[name]).all() and arrays[name].dtype == theirs[name].dtype
    assert {path.name for path in tmp_path.iterdir()} == {'a.npz', 'b.npz', 'pngs'}


# --------------------------------------------------------------------------------------------------- mistakes
WRONG_FLAGS = """
    sample.py RUN/var.pt --labels 10                | --labels 10: no such class; from 0: disc; heart
    sample.py RUN/var.pt --labels hart              | --labels hart; heart
    sample.py RUN/var.pt --cfg -1                   | --cfg: -1: must be 0 or more
    sample.py RUN/var.pt --cfg 1e39                 | logits are not finite at cfg=1e+39; lower
    sample.py RUN/var.pt --cfg 1e999                | --cfg: 1e999: must be 0 or more
    sample.py RUN/var.pt --top-k -1                 | --top-k: -1: must be 0 or more
    sample.py RUN/var.pt --top-p 1.01               | --top-p: 1.01: must be in [0, 1]
    sample.py RUN/var.pt --seed -1                  | --seed: -1: must be 0 or more
    sample.py RUN/var.pt --count x                  | --count: invalid int value: 'x'
    sample.py RUN/var.pt --cout 3                   | unrecognized arguments: --cout 3
    sample.py RUN/var.pt --out image.xyz            | --out image.xyz: must end in .png or .jpg
    sample.py RUN/var.pt --out RUN/var.csv/a.png    | var.csv/a.png: cannot be written
    sample.py RUN/var.pt --export RUN/var.pt        | --export; is also an input
    sample.py RUN/var.pt --export small             | --export small: must end in .pt
    sample.py RUN/var.pt --export .                 | --export .: must end in .pt
    sample.py RUN/var.pt --export a.pt --labels 3   | --export: writes the model, not images
    sample.py RUN/var.pt --npz samples              | --npz samples: must end in .npz
    sample.py RUN/last.pt --export small.pt         | last.pt; kind 'resume'; 'var'
    sample.py RUN/var.csv --export small.pt         | var.csv: corrupt, or not the expected file
    sample.py RUN/var.pt --png-dir RUN/var.csv      | var.csv/made.json: cannot be written
    sample.py --out a.png                           | specify a checkpoint; --official d16
    sample.py RUN/var.pt --official d16             | specify a checkpoint; --official d16
    sample.py --official d17                        | --official: invalid choice; d17; d16
    sample.py RUN/var.pt --weights-dir .            | --weights-dir: needs --official
    sample.py RUN/var.pt --device abacus            | --device abacus; --device cpu always works
    sample.py RUN/var.pt --device meta              | --device meta; --device cpu always works
    sample.py RUN/var.pt --box 0 0 1 .5             | --image: requires --box, --mask or --keep-scales
    sample.py RUN/var.pt --image RUN/samples.png    | --image: requires --box, --mask or --keep-scales
    sample.py RUN/var.pt --image RUN/samples.png --keep-scales 1 --outpaint   | --paste: need --box or
    sample.py RUN/var.pt --image RUN/samples.png --keep-scales 1 --paste      | --paste: need --box or
    sample.py RUN/var.pt --image RUN/samples.png --box 0 0 .5 .5 --mask a.png | --box, --mask: use one or
    sample.py RUN/var.pt --image RUN/samples.png --box .5 0 .2 1      | marks nothing; edges Y0 X0 Y1 X1
    sample.py RUN/var.pt --image RUN/samples.png --box 0 0 1 1.2      | --box: 1.2: must be in [0, 1]
    sample.py RUN/var.pt --image RUN/samples.png --box 0 0 1          | --box: expected 4 arguments
    sample.py RUN/var.pt --image RUN/samples.png --box .5 .5 .51 .51  | --box; marks nothing; 8x8
    sample.py RUN/var.pt --image RUN/samples.png --box 0 0 1 1        | --box; marks all
    sample.py RUN/var.pt --image RUN/samples.png --keep-scales 3      | --keep-scales 3: with 3 scales
    sample.py RUN/var.pt --image none.png --keep-scales 1             | none.png; No such file
    sample.py RUN/var.pt --image RUN/samples.png --mask RUN/reconstructions.png | size (1080, 536) differs
    sample.py RUN/var.pt --image RUN/samples.png --keep-scales 1 --out RUN/samples.png | --out; is also
    sample.py RUN/var.pt --out .png                 | --out .png: must end in .png or .jpg
    sample.py RUN/var.pt --show-scales --npz a.npz  | --show-scales: needs --out without --image
    sample.py RUN/var.pt --show-scales --out a.webp | --out a.webp: must end in .png or .jpg or .gif
    sample.py RUN/var.pt --export a.pt --show-scales --out a.gif              | --export: writes the model
    sample.py RUN/var.pt --image RUN/samples.png --keep-scales 1 --show-scales --out a.gif | without --image
    sample.py RUN/var.pt --image RUN/samples.png --box 0 0 .5 .5 --show-scales | --show-scales: needs --out
"""


@pytest.mark.parametrize('line', [' '.join(line.split()) for line in WRONG_FLAGS.strip().splitlines()])
def test_a_wrong_flag_is_named(line, tiny_run, tmp_path, capsys, monkeypatch):
    check_wrong_flag(line, tiny_run, tmp_path, capsys, monkeypatch)


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
        complains(words, f'--mask {tmp_path}/{name}.png')
    for name, size, colour, words in [('black', 32, 0, 'marks nothing'), ('white', 32, 255, 'marks all'),
                                      ('large', 64, 255, 'size (64, 64) differs from the image size')]:
        Image.new('L', (size, size), colour).save(tmp_path / f'{name}.png')
        complains(f'{name}.png: {words}', f'--mask {tmp_path}/{name}.png')


@pytest.mark.slow
def test_many_processes_complain_once_and_need_something_that_they_can_share(model, tmp_path):
    torchrun = [sys.executable, *'-m torch.distributed.run --standalone --nproc-per-node 2'.split()]
    alone = 'under torchrun, use only --npz or --png-dir'
    (tmp_path / 'a.npz.parts').mkdir()
    (tmp_path / 'a.npz.parts/made.json').mkdir()                # rank 0 hits this while rank 1 waits
    for script, words in [
            (f'sample.py {model[0]} --npz a.npz --out a.png', alone),
            ('sample.py none.pt --npz b.npz', '[Errno 2] No such file'),
            (f'sample.py {model[0]} --npz a.npz', '[Errno 21] Is a directory'),
            (f'train.py --out {model[0]}/run', '[Errno 20] Not a directory')]:
        script, *flags = script.split()
        command = [*torchrun, f'{ROOT}/{script}', *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count('error: ') == 1, done.stderr
        assert f'error: {words}' in done.stderr and f'{ROOT}/{script}", line' not in done.stderr, done.stderr
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]


@pytest.mark.slow
def test_too_little_memory_is_said_and_not_called_the_checkpoints_fault(model, tmp_path):
    torch.save(dict(kind='var', weight=torch.zeros(80_000_000)), tmp_path / 'large.pt')
    for checkpoint, flags, spare in [(tmp_path / 'large.pt', '', 2 ** 27),
                                     (model[0], '--count 200000 --batch-size 200000', 2 ** 30)]:
        script = f"""if True:
            import re, resource, sys
            sys.path.insert(0, {str(ROOT)!r})
            import sample
            size = 1024 * int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1])
            resource.setrlimit(resource.RLIMIT_AS, (size + {spare}, size + {spare}))
            sample.run_command(sample.main)"""
        arguments = [str(checkpoint), '--out', str(tmp_path / 'x.png'), *flags.split()]
        done = subprocess.run([sys.executable, '-c', script, *arguments], capture_output=True, text=True)
        errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
        assert done.returncode == 2 and len(errors) == 1 and 'Traceback' not in done.stderr, done.stderr
        assert errors[0].startswith('error: out of memory; reduce --batch-size')
