"""Tests that start processes: kills, stops, many processes, two machines, other machines, memory.

More kills, at other times: python notebooks/many_kills.py
"""
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]
import sample
import train
from test_mistakes import complaint
from test_var import TINY, curve, losses, resume, same_run, seeded, tiny_run, trainer_of, write_images
from vqvae import VQVAE, VQVAEConfig

STOPPED = TINY + ('--vqvae-steps 24 --var-steps 90 --log-every-steps 7 --save-every-steps 6 --vocab-size 128 '
                  '--revive-every-steps 5 ')


def heed_hangup():
    """Run in a new process: SIGHUP ends it, even if the tests run under nohup, which ignores SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(flags: str, out: Path, ranks=0, script='train.py', torchrun='--standalone', before=(), **env):
    """Starts a script in a new process, under torchrun if ranks is not 0; its output goes to out.txt."""
    torchrun = f'-m torch.distributed.run {torchrun} --nproc-per-node {ranks}'.split() if ranks else []
    command = [*before, sys.executable, *torchrun, str(ROOT / script), *flags.split()]
    command += ['--out', str(out)] if script != 'sample.py' else []
    with open(out.with_suffix('.txt'), 'a') as said:
        return subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True,
                                env=os.environ | dict(OMP_NUM_THREADS='1') | env, preexec_fn=heed_hangup)


def said(out: Path) -> str:
    return out.with_suffix('.txt').read_text()


def finish(process: subprocess.Popen, out: Path, status=0) -> Path:
    assert process.wait(timeout=300) == status, said(out)
    return out


def complete(flags: str, out: Path, ranks=0) -> Path:
    """A run in new processes, from its start to its end."""
    return finish(start(flags, out, ranks), out)


def wait_until(happened, process: subprocess.Popen, out: Path):
    while not happened():
        assert process.poll() is None, said(out)
        time.sleep(0.01)


def is_in_stage_2(out: Path) -> bool:
    return (out / 'var.csv').exists() and len(curve(out, 'var')) > 1


def kill_all(process: subprocess.Popen):
    """Sends SIGKILL to a process and all its descendants at once, like a power failure."""
    table = subprocess.run(['ps', '-e', '-o', 'pid=,ppid='], capture_output=True, text=True).stdout
    children, found = [[int(word) for word in line.split()] for line in table.splitlines()], [process.pid]
    for pid in found:
        found += [child for child, parent in children if parent == pid]
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(Path(f'/proc/{pid}').exists() for pid in found):          # until they and their locks are gone
        time.sleep(0.01)


def time_of(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def run_with_kills(flags: str, out: Path, ranks: int, kills: int, seed: int) -> Path:
    """A run that gets SIGKILL to all its processes, SIGTERM to their group or SIGHUP at random moments, many
    of them while it writes a checkpoint, and is resumed each time."""
    moments, last = random.Random(seed), out / 'last.pt'
    for i in range(kills):
        before = time_of(last)
        process = start('--resume' if before else flags, out, ranks)
        wait_until(lambda: time_of(last) > before, process, out)        # it has made progress
        time.sleep(moments.uniform(0, 0.5))
        moments.choice([kill_all, lambda process: os.killpg(process.pid, signal.SIGTERM),
                        lambda process: process.send_signal(signal.SIGHUP)] if i else [kill_all])(process)
        process.wait(timeout=60)
    return complete('--resume', out, ranks)


@pytest.fixture(scope='module')
def calm(tmp_path_factory):
    """Uninterrupted runs to compare with, each made once: calm(flags, ranks) is the folder of one."""
    @cache
    def run_calmly(flags: str, ranks: int) -> Path:
        out = tmp_path_factory.mktemp('calm') / 'run'
        return complete(flags, out, ranks)
    return run_calmly


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('photos'), 80)


# --------------------------------------------------------------------------------------------------- stops
@pytest.mark.parametrize('ranks, kills', [(0, 1), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_and_resumed_ends_as_if_nothing_had_been(ranks, kills, photos, tmp_path, calm):
    seed = random.randrange(10 ** 6)
    print(f'random kill times: seed {seed}')
    flags = STOPPED + (f'--data-dir {photos} --workers 2 ' if ranks else '')
    assert same_run(run_with_kills(flags, tmp_path / 'run', ranks, kills, seed), calm(flags, ranks))


@pytest.mark.slow
def test_a_sigterm_to_all_of_a_group_saves_and_the_same_command_goes_on(tmp_path, calm):
    out = tmp_path / 'run'
    process = start(STOPPED, out, 2)
    wait_until(lambda: is_in_stage_2(out), process, out)
    os.killpg(process.pid, signal.SIGTERM)
    finish(process, out, 1)                                     # torchrun's own status
    step = int(re.search(r'stopped at step (\d+) of 90 \(var\) and saved; to continue, repeat', said(out))[1])
    assert 6 <= step < 90
    assert same_run(complete(STOPPED + '--resume', out, 2), calm(STOPPED, 2))


@pytest.mark.slow
def test_a_run_whose_terminal_closes_saves_before_it_ends(tmp_path, calm):
    out = tmp_path / 'run'
    command = [sys.executable, f'{ROOT}/train.py', *STOPPED.split(), '--out', str(out)]
    pid, terminal = pty.fork()
    if pid == 0:
        heed_hangup()
        os.execve(sys.executable, command, os.environ | dict(OMP_NUM_THREADS='1'))
    os.set_blocking(terminal, False)
    while not is_in_stage_2(out):
        try:
            assert os.read(terminal, 10_000) != b''             # it has ended
        except BlockingIOError:
            time.sleep(0.01)
    os.close(terminal)                                          # which sends SIGHUP
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert 6 <= torch.load(out / 'last.pt', weights_only=True)['step'] < 90
    assert same_run(complete('--resume', out), calm(STOPPED, 0))


def test_what_nohup_ignores_stays_ignored_and_a_second_ctrl_c_acts():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.signals_noted() as noted:
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        assert noted == [signal.SIGTERM, signal.SIGINT] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_folder_belongs_to_one_run_at_a_time(tmp_path, capsys, monkeypatch):
    out = tmp_path / 'run'
    process = start(STOPPED + '--var-steps 100000 --log-every-steps 9999 --save-every-steps 9999', out)
    wait_until((out / 'vqvae.pt').exists, process, out)
    for flags in (['--resume'], [*STOPPED.split(), '--overwrite']):
        flags = [*flags, '--stop-after-minutes', '0.05', '--out', out]      # otherwise it would run forever
        assert 'another run is using this folder' in complaint(train.main, flags, capsys, monkeypatch)
    kill_all(process)
    with pytest.raises(SystemExit):                             # the kill released the lock
        resume(out, '--stop-after-minutes 1e-9')


# ------------------------------------------------------------------------------------------ many processes
def stages_alone(run: Path) -> dict[str, str]:
    """Flags that train each stage alone, stage 2 with the tokenizer of a run: one whose weights differ in the
    last bit can find other nearest codes."""
    return dict(vqvae='--stage vqvae ', var=f'--stage var --tokenizer {run}/vqvae.pt ')


def gap(a: Path, b: Path, stage: str) -> float:
    return np.abs(losses(a, stage) - losses(b, stage)).max()


def gap_to_one_process(run: Path, flags: str, out: Path) -> float:
    for stage, alone in stages_alone(run).items():
        train.main([*(flags + alone).split(), '--out', str(out / stage)])
    return max(gap(run, out / stage, stage) for stage in ('vqvae', 'var'))


def test_two_processes_do_what_one_does(tmp_path):
    """Losses over 5 steps of each stage agree to 1e-6; one process has no held-out image."""
    flags = TINY + '--vqvae-steps 5 --var-steps 5 --label-dropout 0.5 --flip --val-count 1 '
    two = complete(flags, tmp_path / 'two', 2)
    assert gap_to_one_process(two, flags, tmp_path / 'one') <= 1.1e-6


@pytest.mark.slow
def test_a_step_is_the_same_on_any_number_of_processes_and_in_any_parts(tmp_path):
    """Losses over 20 steps agree to 1e-6, the last digit logged, with dropout and stochastic depth: on 2
    processes or 1; in 1, 2, 4 micro-batches; begun by two, ended by one. (1e-5 with the discriminator.)"""
    flags = TINY + '--vqvae-steps 20 --save-every-steps 20 --vocab-size 128 --revive-every-steps 3 '
    loud = flags + ('--var-steps 20 --batch-size 32 --depth 2 --label-dropout 0.5 --stochastic-depth 0.5 '
                    '--adaln-gamma-init 1 --flip --crop 2 ')
    two = complete(loud, tmp_path / 'two', 2)
    assert [len(losses(two, stage)) for stage in ('vqvae', 'var')] == [62, 22]
    for size in (32, 16, 8):
        parts = f'--micro-batch-size {size} '
        assert gap_to_one_process(two, loud + parts, tmp_path / f'one-{size}') <= 1.1e-6
    flags += '--var-steps 1 --adversarial-weight 0.1 --discriminator-start 10 --micro-batch-size 2 '
    adversarial = complete(flags, tmp_path / 'two-adversarial', 2)
    assert gap_to_one_process(adversarial, flags, tmp_path / 'one-adversarial') <= 1e-5
    for stage, alone in stages_alone(two).items():
        out = complete(loud + alone + '--stop-after-minutes 1e-9', tmp_path / f'{stage}-begun-by-two', 2)
        assert gap(two, resume(out, '--micro-batch-size 16'), stage) <= 1.1e-6
    finish(start('--resume', out, 3), out, 1)
    assert '--batch-size 32: cannot be split across 3 processes; 1, 2, 4 would work' in said(out)


@pytest.mark.slow
def test_a_rank_that_fails_brings_the_others_down_with_its_message(tiny_run, tmp_path):
    """Rank 1 sees other images, or fails during a run; an error on all ranks is reported by rank 0 only. Rank
    0 learns of a failure from the connection or, if it is busy at that moment, from torchrun's SIGTERM."""
    folder, other = (write_images(tmp_path / name, count) for name, count in (('a', 30), ('b', 33)))
    script = tmp_path / 'launch.py'
    script.write_text(f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import sample, train
batch, is_rank_1 = train.ArrayData.batch, os.environ['RANK'] == '1'
def fail(data, step, batch_size):
    sample.check(step < 3 or not is_rank_1, 'this rank failed')
    time.sleep(6 if step == 3 and 'BUSY' in os.environ else 0)
    return batch(data, step, batch_size)
if '--data-dir' not in sys.argv:
    train.ArrayData.batch = fail
elif is_rank_1:
    sys.argv += ['--data-dir', {str(other)!r}]
sample.run_command(train.main)
""")
    out = shutil.copytree(tiny_run, tmp_path / 'run')
    last = (out / 'last.pt').read_bytes()
    for flags, words, env in [
            ('--batch-size 9', '-size 9: cannot be split across 2 processes; 1, 3 would', {}),
            (f'--data-dir {folder}', f'--out {out}: the processes see', {}),
            ('', 'error: rank 1: this rank failed', {}),
            ('', 'error: rank 1: this rank failed', dict(BUSY='yes'))]:
        process = start(f'{TINY} --overwrite {flags}', out, 2, script, **env)
        finish(process, out, status=1)                          # torchrun's own status is 1
        assert 'terminate called' not in said(out) and '(exitcode: 2)' in said(out), said(out)
        assert said(out).count(words) == 1 and f'{ROOT}/train.py", line' not in said(out), said(out)
        assert said(out).count('error: ') == 1 or 'rank 1' in words, said(out)
        assert not env or 'error: ended by SIGTERM' in said(out), said(out)
        assert not flags or (out / 'last.pt').read_bytes() == last      # an error at the start loses nothing
        out.with_suffix('.txt').unlink()


def can_make_namespaces() -> bool:
    if not shutil.which('ip'):
        return False
    made = subprocess.run(['ip', 'netns', 'add', 'var-probe'], capture_output=True).returncode == 0
    subprocess.run(['ip', 'netns', 'del', 'var-probe'], capture_output=True)
    return made


@pytest.mark.slow
@pytest.mark.skipif(not can_make_namespaces(), reason='needs iproute2 and permission for `ip netns add`')
def test_two_machines_do_what_one_does(tmp_path, calm):
    """Two network namespaces joined by a veth pair."""
    def ip(*words):
        subprocess.run(['ip', *' '.join(words).split()], check=True)
    try:
        ip('netns add var-a')
        ip('netns add var-b')
        ip('link add veth-var-a netns var-a type veth peer name veth-var-b netns var-b')
        for name, address in (('var-a', '10.91.7.1'), ('var-b', '10.91.7.2')):
            ip('-n', name, 'addr add', f'{address}/24 dev veth-{name}')
            ip('-n', name, 'link set lo up')
            ip('-n', name, 'link set', f'veth-{name}', 'up')
        out = tmp_path / 'run'
        processes = [start(STOPPED, out, 1, torchrun=f'--nnodes 2 --node-rank {i} --master-addr 10.91.7.1',
                           before=['ip', 'netns', 'exec', name], GLOO_SOCKET_IFNAME=f'veth-{name}')
                     for i, name in enumerate(('var-a', 'var-b'))]
        for process in processes:
            finish(process, out)
    finally:
        for name in ('var-a', 'var-b'):
            subprocess.run(['ip', 'netns', 'del', name])
    for stage in ('vqvae', 'var'):
        assert np.abs(losses(out, stage) - losses(calm(STOPPED, 2), stage)).max() <= 1e-5


# ------------------------------------------------------------------------------------------ other machines
@pytest.mark.slow
def test_out_of_memory_takes_the_advice_at_the_start_and_on_resume(tmp_path):
    """A batch too large for memory, in a new run and in a rerun; then a resume with fewer images at once."""
    def try_with(*flags):
        limit = partial(resource.setrlimit, resource.RLIMIT_DATA, (2 ** 31, 2 ** 31))
        command = [sys.executable, f'{ROOT}/train.py', *flags, '--out', str(tmp_path / 'run')]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
        return done.returncode, [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    greedy = [*TINY.split(), *'--train-count 4000 --batch-size 4000 --vqvae-steps 1 --var-steps 1'.split()]
    status, lines = try_with(*greedy)
    assert status == 2 and 'out of memory; reduce --batch-size' in lines[0], lines
    assert '(also with --resume) --micro-batch-size' in lines[0]
    assert try_with(*greedy)[0] == 2                            # a run without steps does not block a rerun
    assert try_with('--resume', '--micro-batch-size', '200', '--stop-after-minutes', '1e-9') == (0, [])


WINDOWS = """
import os, signal, sys
for name in 'fork setsid setpgrp killpg sched_getaffinity statvfs mkfifo geteuid'.split():
    delattr(os, name)
for name in 'SIGHUP SIGUSR1 SIGUSR2 SIGXCPU SIGALRM SIGKILL SIGQUIT'.split():
    delattr(signal, name)
for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'):
    sys.modules[name] = None
"""


@pytest.mark.slow
def test_a_run_does_without_what_windows_lacks_with_names_in_any_alphabet(tmp_path):
    names = ('кот', '猫', 'ünï')
    folder = write_images(tmp_path / 'фото', 60, classes=names)
    (folder / 'train/猫/خطأ.txt').write_bytes(b'')
    (folder / 'train/кот/x.png').write_bytes(b'')
    script = f'{WINDOWS}\nimport runpy\nsys.path.insert(0, {str(ROOT)!r})\n'
    script += f"runpy.run_path('{ROOT}/train.py', run_name='__main__')"
    command = [sys.executable, '-c', script, *TINY.split(), '--data-dir', folder, '--out', tmp_path / 'run']
    for more in ([], ['--resume']):
        done = subprocess.run([*map(str, command), *more], capture_output=True, text=True, errors='replace',
                              env=os.environ | dict(PYTHONIOENCODING='ascii'))
        assert done.returncode == 0 and 'skipped in' in done.stdout and 'done in' in done.stdout, done.stderr
    assert sample.load(tmp_path / 'run/var.pt')[1].class_names == sorted(names)
    for labels, status in [(['x'], 2), (['Кот', 'ünï'], 0)]:
        command = [sys.executable, f'{ROOT}/sample.py', f'{tmp_path}/run/var.pt', '--labels', *labels]
        done = subprocess.run(command, capture_output=True, cwd=tmp_path,
                              env=os.environ | dict(PYTHONIOENCODING='cp1252'))
        assert done.returncode == status and b'Traceback' not in done.stderr, done.stderr


def test_muon_agrees_with_torchs_which_rounds_to_bfloat16():
    """Over 20 steps, with weight decay. Torch rounds in each of fifteen matrix products, so 6% is allowed."""
    for dtype, shape in product(('float32', 'bfloat16'), ((48, 192), (192, 48), (64, 64))):
        ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
        optimizers = (train.Muon([ours], 0.5),
                      torch.optim.Muon([theirs], weight_decay=0.5, adjust_lr_fn='match_rms_adamw'))
        for gradient in torch.randn(20, *shape):
            before = theirs.detach().clone()
            ours.data.copy_(before)
            for weight, optimizer in zip((ours, theirs), optimizers):
                weight.grad, optimizer.param_groups[0]['lr'] = gradient.clone(), 0.02
                with sample.autocast(torch.device('cpu'), dtype):
                    optimizer.step()
            assert (ours - theirs).norm() <= 0.06 * (theirs - before).norm()


def test_muon_multiplies_in_the_dtype_of_autocast():
    """Without autocast it is exact; singular values from 1 to 0.01 of the largest end near 1."""
    left, right = (torch.linalg.qr(part)[0] for part in torch.randn(2, 64, 64))
    matrix = left * torch.logspace(0, -2, 64) @ right
    exact = train.orthogonalise(matrix.double())
    values = torch.linalg.svdvals(exact)
    assert 0.68 <= values.min() and values.max() <= 1.21
    torch.testing.assert_close(train.orthogonalise(matrix).double(), exact, rtol=0, atol=1e-4)
    gradient, updates = torch.randn(256, 64), []
    for dtype in ('float32', 'bfloat16'):
        trainer = trainer_of(f'--var-optimizer muon --dtype {dtype}')
        weight = trainer.networks['var'].blocks[0].fc1.weight
        weight.data.zero_()
        weight.grad, trainer.optimizers['muon'].param_groups[0]['lr'] = gradient.clone(), 1.0
        others = [w for w in trainer.networks['var'].parameters() if w is not weight]
        for other in others:
            other.grad = torch.zeros_like(other)
        trainer.update_weights()
        updates.append(weight.detach().clone())
    assert 1e-3 < (updates[0] - updates[1]).norm() / updates[0].norm() < 0.06


# --------------------------------------------------------------------------------------------------- speed
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='needs a compiler')
def test_compiled_blocks_learn_what_others_learn(tiny_run, tmp_path):
    flags = TINY + f'--stage var --tokenizer {tiny_run}/vqvae.pt --depth 2 '
    torch._dynamo.utils.counters.clear()
    train.main([*flags.split(), '--out', str(tmp_path / 'slow')])
    assert not torch._dynamo.utils.counters['frames']
    train.main([*flags.split(), '--compile', '--out', str(tmp_path / 'fast')])
    assert torch._dynamo.utils.counters['frames']['ok'] > 1     # one is the check for a compiler
    assert np.abs(losses(tmp_path / 'fast', 'var') - losses(tmp_path / 'slow', 'var')).max() <= 1e-5


@pytest.mark.slow
def test_compiling_without_a_compiler_is_said(tmp_path):
    done = subprocess.run([sys.executable, *f'{ROOT}/train.py --compile --device cpu'.split()], cwd=tmp_path,
                          capture_output=True, text=True, env=os.environ | dict(
                              CXX=str(tmp_path / 'none'), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / 'cache')))
    assert done.returncode == 2 and done.stderr.startswith('error: --compile: no compiler')
    assert done.stderr.count('\n') == 1 and not (tmp_path / 'out').exists()


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
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert after < before / 2, done


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_on_a_gpu_a_step_does_not_wait_and_nccl_and_bfloat16_train_and_resume(tmp_path):
    trainer = trainer_of('--device cuda', device='cuda')
    tokenizer = VQVAE(VQVAEConfig(channels=32, z_channels=4, vocab_size=16, scales=(1, 2, 8))).cuda()
    images, labels = torch.rand(8, 3, 32, 32, device='cuda'), torch.arange(8, device='cuda')
    for mode in ('default', 'error', 'error'):
        torch.cuda.set_sync_debug_mode(mode)
        loss_BL, _ = train.transformer_loss(trainer.networks['var'], tokenizer, images, labels)
        for _ in trainer.micro_batches(images):
            trainer.backward(loss_BL.mean(), dict(loss=loss_BL.mean(0)))
        trainer.update_weights()
    torch.cuda.set_sync_debug_mode('default')
    flags = TINY.replace('--device cpu', '--device cuda --dtype bfloat16') + '--micro-batch-size 4 '
    whole = complete(flags, tmp_path / 'whole', 1)
    out = complete(flags + '--stop-after-minutes 1e-9', tmp_path / 'part', 1)
    complete('--resume', out, 1)
    assert np.abs(losses(out, 'var') - losses(whole, 'var')).max() < 1e-2      # GPUs add in any order
