"""The folders, machines and interruptions that people have: what train.py makes of them."""
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
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
from test_var import (STOPPED, TINY, calm, complaint, curve, finish, folder_data, heed_hangup,
                      kill_all, losses, resume, said, same_run, seeded, start, time_of, tiny_run,
                      write_images)

WIDE = Image.new('RGB', (96, 64), 'red')


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
def test_a_run_whose_terminal_closes_saves_before_it_ends(tmp_path, calm):
    out = tmp_path / 'run'
    command = [sys.executable, f'{ROOT}/train.py', *STOPPED.split(), '--out', str(out)]
    pid, terminal = pty.fork()
    if pid == 0:
        heed_hangup()
        os.execve(sys.executable, command, os.environ | dict(OMP_NUM_THREADS='1'))
    os.set_blocking(terminal, False)
    while not ((out / 'var.csv').exists() and len(curve(out, 'var')) > 1):
        try:
            assert os.read(terminal, 10_000) != b''             # it ended
        except BlockingIOError:
            time.sleep(0.01)
    os.close(terminal)                                          # which sends SIGHUP
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert 6 <= torch.load(out / 'last.pt', weights_only=True)['step'] < 90
    assert same_run(finish(start('--resume', out), out), calm(STOPPED, 0))


def test_what_nohup_ignores_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.signals_noted() as noted:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
        assert noted == [signal.SIGUSR1] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def torchrun(options: str, flags: str, out: Path, before=(), env=()) -> subprocess.Popen:
    command = [*before, sys.executable, '-m', 'torch.distributed.run', *options.split(), f'{ROOT}/train.py']
    with open(out.with_suffix('.txt'), 'a') as file:
        return subprocess.Popen([*command, *flags.split(), '--out', str(out)], stdout=file, stderr=file,
                                env=os.environ | dict(OMP_NUM_THREADS='1') | dict(env))


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
    dict(PYTHONIOENCODING='ascii'), dict(PYTHONIOENCODING='cp1252')], ids=['ascii', 'cp1252'])
def test_names_in_any_alphabet_go_through_terminals_of_any_encoding(env, tmp_path):
    names = ('кот', '猫', 'ünï')
    folder = write_images(tmp_path / 'фото', 60, classes=names)
    (folder / 'train/猫/خطأ.txt').write_bytes(b'')
    (folder / 'train/кот/x.png').write_bytes(b'')
    done = run_as('', TINY + f'--data-dir {folder}', tmp_path, **env)
    assert done.returncode == 2 and 'broken, left out' in done.stderr, done.stderr      # 1 of 61: too many
    os.remove(folder / 'train/кот/x.png')
    done = run_as('', TINY + f'--data-dir {folder} --overwrite', tmp_path, **env)
    assert done.returncode == 0 and 'left out of' in done.stdout, done.stderr
    assert sample.load(tmp_path / 'run/var.pt')[1].class_names == sorted(names)
    for labels, status in [(['x'], 2), (['Кот', 'ünï'], 0)]:
        command = [sys.executable, f'{ROOT}/sample.py', f'{tmp_path}/run/var.pt', '--labels', *labels]
        done = subprocess.run(command, capture_output=True, env=os.environ | env, cwd=tmp_path)
        assert done.returncode == status and b'Traceback' not in done.stderr, done.stderr
    assert (tmp_path / 'samples.png').exists()


# ------------------------------------------------------------------------------------------------- numbers
def test_the_least_top_p_keeps_the_likeliest_token_alone(tiny_run, tmp_path):
    tokenizer, var, _ = sample.load(tiny_run / 'var.pt')
    noise_BL = torch.rand(4, 69)
    draw = partial(var.generate, tokenizer, torch.arange(4), noise_BL=noise_BL, return_tokens=True)
    for top_p in (1e-320, 1e-45, 1e-30):
        assert torch.equal(draw(top_k=0, top_p=top_p)[1], draw(top_k=1, top_p=0.0)[1])


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
def test_two_machines_do_what_one_does(machines, tmp_path, calm):
    def launch(i: int) -> subprocess.Popen:
        name, interface, _ = machines[i]
        options = f'--nnodes 2 --node-rank {i} --master-addr {machines[0][2]}'
        env = dict(GLOO_SOCKET_IFNAME=interface)
        return torchrun(options, STOPPED, out, ['ip', 'netns', 'exec', name], env)

    out = tmp_path / 'run'
    for process in [launch(0), launch(1)]:
        finish(process, out)
    for stage in ('vqvae', 'var'):
        assert np.abs(losses(out, stage) - losses(calm(STOPPED, 2), stage)).max() <= 1e-5
