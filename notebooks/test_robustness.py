"""The files, machines and interruptions that people have: what train.py and sample.py make of them.

Odd images and folders; stops of every kind; other systems; numbers that go wrong, and notebooks/fuzz.py.
"""
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]
import fuzz
import sample
import train
from test_var import (STOPPED, TINY, calm, complaint, curve, finish, folder_data, heed_hangup,
                      kill_all, losses, resume, said, same_run, seeded, start, time_of, tiny_run,
                      write_images)

# -------------------------------------------------------------------------------------------------- images
RAMP = np.linspace(0, 1, 64)[None].repeat(64, 0)                # dark at the left, bright at the right
SQUARE = np.zeros((64, 64, 4), np.uint8)                        # red, on a transparent ground
SQUARE[16:48, 16:48] = 255, 0, 0, 255
CLEAR, HALF = Image.fromarray(SQUARE), Image.fromarray(SQUARE[..., :3])
WIDE = Image.new('RGB', (96, 64))                               # red at the left
WIDE.paste('red', (0, 0, 48, 64))


def pixels_of(path: Path) -> np.ndarray:
    return sample.read_image(path, 64, shorter=64).astype(int)


@pytest.mark.parametrize('name, top, kind', [
    ('16.png', 65535, np.uint16), ('16.tif', 65535, np.uint16), ('32.tif', 65535, np.int32),
    ('long.tif', 2 ** 31 - 200, np.int32), ('unit.tif', 1, np.float32), ('byte.tif', 255, np.float32),
    ('word.tif', 65535, np.float32), ('large.tif', 1e6, np.float32)])
def test_a_ramp_in_any_number_of_bits_is_seen_as_a_ramp(name, top, kind, tmp_path):
    Image.fromarray((RAMP * top).astype(kind)).save(tmp_path / name)
    pixels = pixels_of(tmp_path / name)
    assert np.abs(pixels[..., 1] - 255 * RAMP).max() <= 1 and pixels.mean() == pytest.approx(127.5, abs=0.6)


def test_a_dark_16_bit_image_stays_dark_and_what_is_no_number_is_black(tmp_path):
    Image.fromarray((RAMP * 255).astype(np.uint16)).save(tmp_path / 'a.png')
    (tmp_path / 'a.pgm').write_bytes(b'P5 64 64 65535\n' + (RAMP * 255).astype('>u2').tobytes())
    assert pixels_of(tmp_path / 'a.png').max() <= 1 and pixels_of(tmp_path / 'a.pgm').max() <= 1
    odd = RAMP.astype(np.float32)
    odd[:8, :8], odd[:8, -8:], odd[8:, :8] = np.nan, np.inf, -1
    Image.fromarray(odd).save(tmp_path / 'odd.tif')
    pixels = pixels_of(tmp_path / 'odd.tif')
    assert pixels[:6, :6].max() <= 4 and pixels[:6, -6:].max() <= 4 and pixels[12:, :6].max() <= 4
    assert pixels[32, 60, 0] == pytest.approx(255 * RAMP[32, 60], abs=2)


def test_what_is_white_may_be_exceeded_a_little_lie_beyond_31_bits_or_be_0(tmp_path):
    def seen(name, pixels, tag=0, value=0, instead=0):
        Image.fromarray(pixels).save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        entries = [struct.pack('<HHIH', tag, 3, 1, v) for v in (value, instead)]
        assert not tag or content.count(entries[0]) == 1
        (tmp_path / name).write_bytes(content.replace(*entries))
        return pixels_of(tmp_path / name)[..., 1]
    for top in (1.02, 3):                                       # of resampling; of a wide dynamic range
        pixels = seen('a.tif', (RAMP * top).astype(np.float32))
        assert np.abs(pixels - (255 * top * RAMP).clip(0, 255)).max() <= 4
    unsigned = (RAMP * (2 ** 32 - 1)).astype(np.uint32).view(np.int32)
    assert np.abs(seen('b.tif', unsigned, SAMPLEFORMAT, 2, 1) - 255 * RAMP).max() <= 1
    dark = (RAMP * 65535).astype(np.uint16)
    assert np.abs(seen('c.tif', dark, PHOTOMETRIC_INTERPRETATION, 1, 0) - 255 * (1 - RAMP)).max() <= 1
    content = b'Pf\n64 64\n-1.0\n' + RAMP[::-1].astype('<f4').tobytes()
    (tmp_path / 'd.pfm').write_bytes(content)
    assert np.abs(pixels_of(tmp_path / 'd.pfm')[..., 1] - 255 * RAMP).max() <= 1


@pytest.mark.parametrize('name, image, options', [
    ('a.png', CLEAR, {}), ('palette.png', CLEAR.quantize(8), {}), ('a.gif', CLEAR, {}), ('a.tif', CLEAR, {}),
    ('a.webp', CLEAR, dict(lossless=True)), ('pa.tif', CLEAR.convert('PA'), {}), ('a.tga', CLEAR, {}),
    ('a.jp2', CLEAR, {}), ('la.png', CLEAR.convert('LA'), {}),
    ('rgb.png', HALF, dict(transparency=(0, 0, 0))), ('grey.png', HALF.convert('L'), dict(transparency=0))])
def test_a_transparent_ground_is_white(name, image, options, tmp_path):
    image.save(tmp_path / name, **options)
    pixels, red = pixels_of(tmp_path / name), (76, 76, 76) if name in ('la.png', 'grey.png') else (255, 0, 0)
    assert (pixels[:12] == 255).all() and np.abs(pixels[32, 32] - red).max() <= 2


def test_a_transparent_16_bit_grey_is_white(tmp_path):
    Image.fromarray((RAMP * 65535).astype(np.uint16)).save(tmp_path / 'a.png', transparency=0)
    pixels = pixels_of(tmp_path / 'a.png')
    assert pixels[32, 0, 0] == 255 and pixels[32, 2, 0] < 16


@pytest.mark.parametrize('name', 'a.jpg a.png a.webp a.tif L.tif RGBA.tif CMYK.tif P.tif'.split())
@pytest.mark.parametrize('orientation, red', [
    (1, 'left'), (2, 'right'), (3, 'right'), (4, 'left'), (5, 'top'), (6, 'top'), (7, 'bottom'),
    (8, 'bottom')])
def test_an_image_lies_as_the_camera_was_held(name, orientation, red, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (WIDE if name[0] == 'a' else WIDE.convert(name[:-4])).save(tmp_path / name, exif=exif)
    image = sample.read_image(tmp_path / name, 64, shorter=64).astype(int)[..., 0]
    means = dict(left=image[:, :20].mean(), right=image[:, -20:].mean(), top=image[:20].mean(),
                 bottom=image[-20:].mean())
    assert max(means, key=means.get) == red and means[red] > (70 if name == 'L.tif' else 200)
    assert min(means.values()) < 10


def test_what_every_viewer_opens_is_read_without_a_warning(tmp_path):
    """Metadata that is damaged or long, 196 megapixels, palettes whose transparency is in bytes."""
    folder = tmp_path / 'photos/train/cat'
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(10):
        WIDE.save(folder / f'{i}.jpg', exif=exif)
        content = bytearray((folder / f'{i}.jpg').read_bytes())
        start = content.index(b'Exif')
        content[start + 20:start + 30] = bytes([i] * 10) if i < 5 else b'\xff' * 10     # its table
        (folder / f'{i}.jpg').write_bytes(content)
        CLEAR.quantize(8).save(folder / f'{i}.png')
    text = PngImagePlugin.PngInfo()
    text.add_text('workflow', 'x' * 3_000_000, zip=True)
    text.add_text('Raw profile type exif', '\nexif\n      10\nno hexadecimals\n')
    WIDE.save(folder / 'text.png', pnginfo=text)
    Image.new('1', (14_000, 14_000), 1).save(folder / 'large.png')
    command = [sys.executable, f'{ROOT}/train.py', *TINY.split(), '--data-dir', str(tmp_path / 'photos'),
               '--batch-size', '4', '--workers', '2', '--stage', 'vqvae', '--out', str(tmp_path / 'run')]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and 'arning' not in done.stderr and 'broken' not in done.stderr, done.stderr
    assert (pixels_of(folder / 'text.png')[:, :20] == (255, 0, 0)).all()


# ------------------------------------------------------------------------------------------------- folders
def test_what_is_left_out_of_a_folder_is_counted_and_named(tmp_path, capsys):
    train_folder = write_images(tmp_path, 60) / 'train'
    for path in [*train_folder.rglob('*.png')]:
        path.with_name(f'._{path.name}').write_bytes(b'of a Mac')
    (train_folder / 'bird/2024/may').mkdir(parents=True)
    for path in sorted((train_folder / 'bird').glob('0*'))[:10]:
        shutil.move(path, train_folder / 'bird/2024/may')
    for name in ('gifs', 'docs', 'empty', 'cat/none'):
        (train_folder / name).mkdir()
    image = Image.new('RGB', (40, 40), 'red')
    for name in ('a.gif', 'b.JFIF', 'c.avif', 'd.bmp'):
        image.save(train_folder / 'gifs' / name, 'JPEG' if name == 'b.JFIF' else None)
    for name in ('docs/a.txt', 'cat/b.HEIC', 'cat/README', 'loose.png'):
        (train_folder / name).write_bytes(b'')
    (train_folder / 'cat/lost.png').symlink_to('/nowhere/x.png')
    (train_folder / 'cat/self.png').symlink_to('self.png')
    (train_folder / 'cat/loop').symlink_to('..')
    (train_folder / 'dog/linked').symlink_to(train_folder / 'gifs')
    (train_folder / 'dog/others').symlink_to(tmp_path / 'elsewhere')
    shutil.copytree(train_folder / 'gifs', tmp_path / 'elsewhere')
    os.mkfifo(train_folder / 'cat/pipe.png')
    (tmp_path / 'test/cat').mkdir(parents=True)
    data = folder_data(tmp_path)
    assert data.class_names == ['bird', 'cat', 'dog', 'gifs'] and data.count + data.val_count == 68
    assert sum('/bird/2024/may/' in path for path, _ in data.train + data.val) == 10
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f'left out of {train_folder}: ')
    assert lines[1].startswith(f'left out of {tmp_path}: elsewhere, test; only train/ and val/ are read')
    for part in ('.heic: 1 (cat/b.HEIC)', '.txt: 1 (docs/a.txt)', 'hidden: 60 (bird/',
                 'folders without images: 3 (cat/none, docs, empty)',
                 'links to folders that are read anyway: 2 (cat/loop, dog/linked)',
                 'links to nowhere: 2 (cat/lost.png, cat/self.png)', 'not files: 1 (cat/pipe.png)',
                 'outside of class folders: 1 (loose.png)', 'without an ending: 1 (cat/README)'):
        assert part in lines[0], (part, lines[0])


@pytest.mark.parametrize('layout, words', [
    ('training/cat/a validation/cat/a', 'has training/, validation/ but no train/; wanted are train/'),
    ('Train/cat/a', 'has Train/ but no train/'), ('val/cat/a', 'has val/ but no train/'),
    ('photos/train/cat/a photos/val/cat/a', 'has photos/train/, photos/val/ but no train/'),
    ('training_set/cat/a', 'has training_set/ but'), ('train2017/a val-2/b', 'has train2017/, val-2/ but'),
    ('train/a train/b', 'in PLACE/train/<class>/ (found are outside of class folders: 2 (a.png, b.png))'),
    ('a', 'no images in PLACE/<class>/ (found are outside of class folders: 1 (a.png))'),
    ('train/cat/a train/cat/b val/c', 'no images in PLACE/val/<class>/ (found are outside of class'),
    ('train/cat/a train/dog/b', 'no val/, and no class has a second image to hold out')])
def test_a_folder_laid_out_otherwise_is_told_what_is_wanted(layout, words, tmp_path, capsys, monkeypatch):
    for name in layout.split():
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        WIDE.save(tmp_path / 'in' / f'{name}.png')
    arguments = [*TINY.split(), '--data-dir', tmp_path / 'in', '--out', tmp_path / 'run']
    error = complaint(train.main, arguments, capsys, monkeypatch)
    assert words.replace('PLACE', str(tmp_path / 'in')) in error, error


def test_a_class_with_one_image_keeps_it_for_training(tmp_path, capsys):
    folder = write_images(tmp_path, 60)
    for i in range(20):
        (folder / f'train/rare{i}').mkdir()
        WIDE.save(folder / f'train/rare{i}/x.png')
    for seed in range(5):
        data = folder_data(folder, f'--seed {seed}')
        assert {name for _, name in data.train} == {*data.class_names} and data.val_count == 8
    folder_data(folder, '--train-count 9')
    found = capsys.readouterr().out
    assert re.search(r'note: \d+ of 23 classes have no images to train on \(.*, \.\.\.\)', found), found


# --------------------------------------------------------------------------------------------------- stops
def until_stage_2(process: subprocess.Popen, out: Path):
    while not ((out / 'var.csv').exists() and len(curve(out, 'var')) > 1):
        assert process.poll() is None, said(out)
        time.sleep(0.01)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('photos'), 80)


@pytest.mark.slow
@pytest.mark.parametrize('name, to_group', [('SIGTERM', True), ('SIGHUP', False), ('SIGUSR1', True),
                                            ('SIGUSR2', False), ('SIGXCPU', False)])
def test_whatever_signal_asks_for_it_a_stop_saves(name, to_group, photos, tmp_path, calm):
    """Whether it is sent to the process or to all of its group, twice, while threads read images."""
    flags = STOPPED + f'--data-dir {photos} --workers 2 '
    out, number = tmp_path / 'run', getattr(signal, name)
    process = start(flags, out)
    until_stage_2(process, out)
    for _ in range(2):
        (os.killpg if to_group else os.kill)(process.pid, number)
    finish(process, out, 128 + number)
    assert re.search(r'stopped at step \d+ of 90 of var, all saved; to go on: python train.py', said(out))
    assert same_run(finish(start('--resume', out), out), calm(flags, 0))


@pytest.mark.slow
@pytest.mark.parametrize('way', ['terminal', 'pipe'])
def test_a_run_whose_terminal_or_pipe_closes_saves_before_it_ends(way, tmp_path, calm):
    out = tmp_path / 'run'
    command = [sys.executable, f'{ROOT}/train.py', *STOPPED.split(), '--out', str(out)]
    env = os.environ | dict(OMP_NUM_THREADS='1')
    if way == 'terminal':
        pid, terminal = pty.fork()
        if pid == 0:
            heed_hangup()
            os.execve(sys.executable, command, env)
    else:
        terminal, theirs = os.pipe()
        options = dict(stdout=theirs, stderr=theirs, env=env, preexec_fn=heed_hangup)
        pid = subprocess.Popen(command, **options).pid
        os.close(theirs)
    os.set_blocking(terminal, False)
    while not ((out / 'var.csv').exists() and len(curve(out, 'var')) > 1):
        try:
            assert os.read(terminal, 10_000) != b''             # it ended
        except BlockingIOError:
            time.sleep(0.01)
    os.close(terminal)                                          # which sends SIGHUP, of a terminal
    if way == 'pipe':
        time.sleep(0.3)
        os.kill(pid, signal.SIGHUP)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert 6 <= torch.load(out / 'last.pt', weights_only=True)['step'] < 90
    assert same_run(finish(start('--resume', out), out), calm(STOPPED, 0))


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGUSR1, signal.SIGKILL])
def test_when_torchrun_itself_is_ended_its_processes_save_and_stop(number, tmp_path, calm):
    out = tmp_path / 'run'
    process = torchrun('--standalone --nproc-per-node 2', STOPPED, out)
    until_stage_2(process, out)
    ranks = ranks_of(process)
    process.send_signal(number)
    process.wait(timeout=60)
    while [pid for pid in ranks if 'stopped' not in said(out) and Path(f'/proc/{pid}').exists()]:
        time.sleep(0.05)
    time.sleep(1)                                               # until they have left, too
    assert 'stopped at step' in said(out) and not (out / 'lock').exists(), said(out)
    assert same_run(finish(start('--resume', out, 2), out), calm(STOPPED, 2))


@pytest.mark.parametrize('streams', ['>&- 2>&-', '>/dev/full 2>/dev/full', '2>&1 | head -c 20'])
def test_a_run_goes_on_where_nobody_can_be_told(streams, tmp_path):
    command = f'{sys.executable} {ROOT}/train.py {TINY} --out {tmp_path}/run {streams}'
    subprocess.run(['bash', '-c', command], capture_output=True)
    assert (tmp_path / 'run/samples.png').exists()
    last = torch.load(tmp_path / 'run/last.pt', weights_only=True)
    assert (last['stage'], last['step'], last['unfinished']) == ('var', 4, False)


def test_what_nohup_ignores_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.signals_noted() as noted:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
        assert noted == [signal.SIGUSR1] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def ranks_of(process: subprocess.Popen) -> list[int]:
    table = subprocess.run(['ps', '-e', '-o', 'pid=,ppid=,args='], capture_output=True, text=True).stdout
    rows = [line.split(maxsplit=2) for line in table.splitlines()]
    return [int(pid) for pid, parent, command in rows if int(parent) == process.pid and 'train.py' in command]


def torchrun(options: str, flags: str, out: Path, before=(), env=()) -> subprocess.Popen:
    command = [*before, sys.executable, '-m', 'torch.distributed.run', *options.split(), f'{ROOT}/train.py']
    with open(out.with_suffix('.txt'), 'a') as file:
        return subprocess.Popen([*command, *flags.split(), '--out', str(out)], stdout=file, stderr=file,
                                env=os.environ | dict(OMP_NUM_THREADS='1') | dict(env))


@pytest.mark.slow
@pytest.mark.parametrize('interval, victim, more', [('0.1', 0, '--overwrite'), ('3', 1, '')])
def test_what_torchrun_restarts_goes_on_by_itself(interval, victim, more, tiny_run, tmp_path, calm):
    """A rank is killed twice; with --overwrite, the run that it replaces isn't taken for its own."""
    out = tmp_path / 'run'
    if more:
        shutil.copytree(tiny_run, out)
    last = out / 'last.pt'
    process = torchrun(f'--standalone --max-restarts 2 --monitor-interval {interval} --nproc-per-node 2',
                       STOPPED + more, out)
    for _ in range(2):
        before, began = time_of(last), time.monotonic()
        while time_of(last) in (None, before) or len(ranks_of(process)) < 2:
            is_stuck = time.monotonic() - began > 100           # it would be for half an hour
            assert process.poll() is None and not is_stuck, said(out)
            time.sleep(0.02)
        time.sleep(0.3)
        os.kill(ranks_of(process)[victim], signal.SIGKILL)
    finish(process, out)
    assert said(out).count('restarted by torchrun: goes on from step') == 2
    assert same_run(out, calm(STOPPED, 2))


@pytest.mark.slow
def test_a_run_that_is_refused_is_not_taken_over_by_a_restart(tiny_run, tmp_path):
    out = shutil.copytree(tiny_run, tmp_path / 'run')
    before = (out / 'last.pt').read_bytes()
    finish(torchrun('--standalone --max-restarts 1 --nproc-per-node 1', TINY, out), out, 1)
    assert said(out).count('already holds a run') == 2 and (out / 'last.pt').read_bytes() == before


@pytest.mark.slow
def test_a_folder_belongs_to_one_run_at_a_time(tiny_run, tmp_path, capsys, monkeypatch):
    out = tmp_path / 'run'
    process = start(STOPPED + '--var-steps 100000 --log-every-steps 9999 --save-every-steps 9999', out)
    while not (out / 'vqvae.pt').exists():
        assert process.poll() is None, said(out)
        time.sleep(0.01)
    for flags in (['--resume'], [*STOPPED.split(), '--overwrite']):
        flags = [*flags, '--stop-after-minutes', '0.05', '--out', out]      # else it would go on for ever
        error = complaint(train.main, flags, capsys, monkeypatch)
        assert 'another run is at work there' in error
    kill_all(process)
    assert (out / 'lock').exists()                              # which keeps nobody out by itself
    with pytest.raises(SystemExit):
        resume(out, '--stop-after-minutes 1e-9')
    assert not (out / 'lock').exists()


# ------------------------------------------------------------------------------------------------- memory
@pytest.mark.slow
def test_out_of_memory_takes_the_advice_at_the_start_and_on_resume(tmp_path):
    """A batch that is too large for the memory; then fewer at once, by a rerun, and on resume."""
    def try_with(*flags):
        limit = partial(resource.setrlimit, resource.RLIMIT_DATA, (2 ** 31, 2 ** 31))
        command = [sys.executable, f'{ROOT}/train.py', *flags, '--out', str(tmp_path / 'run')]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
        return done.returncode, [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    greedy = [*TINY.split(), *'--train-count 4000 --batch-size 4000 --vqvae-steps 1 --var-steps 1'.split()]
    status, lines = try_with(*greedy)
    assert status == 2 and 'out of memory; take fewer images at once, by --batch-size' in lines[0], lines
    assert '(and beside --resume) by --micro-batch-size' in lines[0]
    assert try_with(*greedy)[0] == 2                            # a run of no steps is in nobody's way
    status, lines = try_with('--resume', '--micro-batch-size', '200', '--stop-after-minutes', '1e-9')
    assert status == 0, lines
    shutil.rmtree(tmp_path / 'run')
    assert try_with(*greedy)[0] == 2
    assert try_with(*greedy, '--micro-batch-size', '200') == (0, [])


# ------------------------------------------------------------------------------------------ other machines
def run_as(setting: str, flags: str, folder: Path, **env) -> subprocess.CompletedProcess:
    """train.py in a process whose machine is changed by some lines first."""
    script = f'{setting}\nimport runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n'
    script += f"runpy.run_path('{ROOT}/train.py', run_name='__main__')"
    command = [sys.executable, '-c', script, *flags.split(), '--out', str(folder / 'run')]
    return subprocess.run(command, capture_output=True, text=True, errors='replace', env=os.environ | env)


WINDOWS = """
import os, signal, sys
for name in 'fork setsid setpgrp killpg sched_getaffinity statvfs mkfifo geteuid'.split():
    delattr(os, name)
for name in 'SIGHUP SIGUSR1 SIGUSR2 SIGXCPU SIGALRM SIGKILL SIGQUIT'.split():
    delattr(signal, name)
for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'):
    sys.modules[name] = None
import shutil, types
shutil.disk_usage = lambda path: types.SimpleNamespace(free=2 ** 40)       # there it asks nt, not statvfs
"""
FIPS = """
import hashlib
md5 = hashlib.md5
def refuse(*content, usedforsecurity=True):
    if usedforsecurity:
        raise ValueError('[digital envelope routines] unsupported')
    return md5(*content)
hashlib.md5 = refuse
"""


@pytest.mark.slow
@pytest.mark.parametrize('setting', [WINDOWS, FIPS], ids=['as on Windows', 'where md5 is refused'])
def test_a_run_and_a_resume_do_without_what_some_machines_lack(setting, tiny_run, tmp_path):
    photos = write_images(tmp_path / 'photos', 80)
    done = run_as(setting, TINY + f'--data-dir {photos} --cache-tokens', tmp_path)
    assert done.returncode == 0 and 'done in' in done.stdout, done.stderr
    shutil.copy(tmp_path / 'run/previous.pt', tmp_path / 'run/last.pt')
    assert run_as(setting, '--resume', tmp_path).returncode == 0
    done = run_as(setting, '--bench --depth 1 --batch-size 2', tmp_path)
    assert done.returncode == 0 and '"what": "sample"' in done.stdout, done.stderr
    done = run_as(setting, TINY + '--overwrite', tmp_path)
    assert done.returncode == 0 and same_run(tmp_path / 'run', tiny_run), done.stderr


@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='of Linux alone')
def test_threads_are_counted_by_the_cores_that_are_allowed(tmp_path, monkeypatch):
    folder, allowed = write_images(tmp_path, 30), os.sched_getaffinity(0)
    monkeypatch.setattr(os, 'cpu_count', lambda: 64)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert train.usable_cores() == 1 and folder_data(folder).workers._max_workers == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert train.usable_cores() <= len(allowed)


@pytest.mark.slow
@pytest.mark.parametrize('env', [
    dict(PYTHONIOENCODING='ascii'), dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0'),
    dict(PYTHONIOENCODING='cp1252')], ids=['ascii', 'locale C', 'cp1252'])
def test_names_in_any_alphabet_go_through_terminals_of_any_encoding(env, tmp_path):
    names = ('кот', '猫', 'ünï', os.fsdecode(b'\xff\xfe'))
    folder = write_images(tmp_path / 'фото', 60, classes=names)
    (folder / 'train/猫/خطأ.txt').write_bytes(b'')
    (folder / 'train/кот/x.png').write_bytes(b'')
    done = run_as('', TINY + f'--data-dir {folder}', tmp_path, **env)
    assert done.returncode == 2 and 'broken, left out' in done.stderr, done.stderr      # 1 of 61: too many
    os.remove(folder / 'train/кот/x.png')
    done = run_as('', TINY + f'--data-dir {folder} --overwrite', tmp_path, **env)
    assert done.returncode == 0 and 'left out of' in done.stdout, done.stderr
    assert sample.load(tmp_path / 'run/var.pt')[1].class_names == sorted(names)
    known = ['Кот', unicodedata.normalize('NFD', 'ünï'), names[3]]
    for labels, status in [(['x'], 2), (known, 0)]:
        command = [sys.executable, f'{ROOT}/sample.py', f'{tmp_path}/run/var.pt', '--labels', *labels]
        done = subprocess.run(command, capture_output=True, env=os.environ | env, cwd=tmp_path)
        assert done.returncode == status and b'Traceback' not in done.stderr, done.stderr
    assert (tmp_path / 'samples.png').exists()


# ------------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize('flags, words', [
    ('--cfg 1e39', 'not finite, at cfg=1e+39; a lower --cfg'), ('--cfg 1e999', '1e999: must be 0 or more'),
    ('--temperature 1e-320', 'a higher --temperature'), ('--count 20000000', 'must be 10000000 at most'),
    ('--top-k -1', '--top-k -1: must be 0 or more'), (f'--seed {2 ** 63}', 'must be in [0, 2^63)')])
def test_numbers_that_go_wrong_are_named(flags, words, tiny_run, tmp_path, capsys, monkeypatch):
    arguments = [tiny_run / 'var.pt', '--out', tmp_path / 'x.png', *flags.split()]
    assert words in complaint(sample.main, arguments, capsys, monkeypatch)
    assert not [*tmp_path.iterdir()]


def test_the_least_top_p_keeps_the_likeliest_token_alone(tiny_run, tmp_path):
    tokenizer, var, _ = sample.load(tiny_run / 'var.pt')
    noise_BL = torch.rand(4, 69)
    draw = partial(var.generate, tokenizer, torch.arange(4), noise_BL=noise_BL, return_tokens=True)
    for top_p in (1e-320, 1e-45, 1e-30):
        assert torch.equal(draw(top_k=0, top_p=top_p)[1], draw(top_k=1, top_p=0.0)[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/meminfo').exists(), reason='of Linux alone')
@pytest.mark.parametrize('command', ['train.py --bench --batch-size 2000000',
                                     'sample.py RUN/var.pt --bench --batch-size 2000000'])
def test_a_batch_beyond_all_memory_is_named_and_not_killed(command, tiny_run, tmp_path):
    command = f'{ROOT}/{command}'.replace('RUN', str(tiny_run)).split()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith('error: out of memory; take fewer'), done.stderr


@pytest.mark.slow
def test_two_hundred_random_flags_damages_images_and_folders_end_well_or_with_a_line(tmp_path):
    fuzz.make_run(tmp_path)
    for number in range(200):
        what, fault, text = fuzz.try_case(number, 0, tmp_path)
        assert fault is None, f'{number}: {fault}\n{what}\n{text}'


# ------------------------------------------------------------------------------------------- two machines
def can_make_namespaces() -> bool:
    if not shutil.which('ip'):
        return False
    made = subprocess.run(['ip', 'netns', 'add', 'var-probe'], capture_output=True).returncode == 0
    subprocess.run(['ip', 'netns', 'del', 'var-probe'], capture_output=True)
    return made


@pytest.fixture
def machines():
    """Two network namespaces, joined by a pair of veth: of each its name, its interface, its address."""
    found = [('var-a', 'veth-var-a', '10.91.7.1'), ('var-b', 'veth-var-b', '10.91.7.2')]

    def ip(*words):
        subprocess.run(['ip', *words], check=True)
    for name, *_ in found:
        ip('netns', 'add', name)
    try:
        ip(*'link add veth-var-a netns var-a type veth peer name veth-var-b netns var-b'.split())
        for name, interface, address in found:
            ip('-n', name, 'addr', 'add', f'{address}/24', 'dev', interface)
            for device in ('lo', interface):
                ip('-n', name, 'link', 'set', device, 'up')
        yield found
    finally:
        for name, *_ in found:
            subprocess.run(['ip', 'netns', 'del', name])


@pytest.mark.slow
@pytest.mark.skipif(not can_make_namespaces(), reason='needs `ip netns add`: iproute2, and the right to')
def test_two_machines_do_what_one_does_and_go_on_when_one_was_lost(machines, tmp_path, calm):
    def launch(i: int) -> subprocess.Popen:
        name, interface, _ = machines[i]
        options = f'--nnodes 2 --node-rank {i} --master-addr {machines[0][2]} --max-restarts 3'
        env = dict(GLOO_SOCKET_IFNAME=interface)
        return torchrun(options, STOPPED, out, ['ip', 'netns', 'exec', name], env)

    out = tmp_path / 'run'
    both = [launch(0), launch(1)]
    until_stage_2(both[0], out)
    kill_all(both[1])
    both[1] = launch(1)
    for process in both:
        finish(process, out)
    assert said(out).count('restarted by torchrun: goes on from step') == 1
    for stage in ('vqvae', 'var'):
        assert np.abs(losses(out, stage) - losses(calm(STOPPED, 2), stage)).max() <= 1e-5
