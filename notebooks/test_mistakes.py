"""User errors in train.py and sample.py: exit status 2, one line, nothing is lost. Also README's commands."""
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
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
from test_var import TINY, curve, resume, run, same_weights, seeded, stopped, tiny_run, write_images


def complaint(main, arguments, capsys, monkeypatch, ignore='it/s') -> str:
    """The error of a command that must fail: exit status 2 and one line on stderr."""
    monkeypatch.setattr(sys, 'argv', ['command', *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sample.run_command(main)
    lines = capsys.readouterr().err.splitlines()            # possibly a progress bar, then the error
    assert stop.value.code == 2 and lines[-1].startswith('error: '), lines
    assert all(re.search('it/s|batch/s|s/it|^ *$|' + ignore, line) for line in lines[:-1]), lines
    return lines[-1]


WRONG_FLAGS = """
    train.py --dept 3                               | unrecognized arguments: --dept 3
    train.py --preset cifar-10                      | --preset; cifar-10; shapes; cifar10
    train.py --depth 0                              | --depth 0; at least 1
    train.py --var-steps 0                          | --var-steps: 0: must be 1 or more
    train.py --batch-size 100000                    | --batch-size 100000: only 64 images
    train.py --vqvae-lr nan                         | --vqvae-lr: nan; above 0
    train.py --device meta                          | --device meta; cpu
    train.py --scales 1 4 2 8                       | --scales (1, 4, 2, 8); increasing
    train.py --order raster                         | --scales (1, 2, 4, 8): not for order raster; one map
    train.py --stage var --tokenizer CIFAR --vocab-size 99  | --vocab-size 99; has 1024; omit the flag
    train.py --order snake                          | order snake; raster
    train.py --data-dir .                           | --data-dir .: no images in ./<class>/; train/<class>/
    train.py --data-dir nowhere                     | --data-dir nowhere: no images; train/<class>/
    train.py --resume --overwrite                   | --resume, --overwrite: use one or the other
    train.py --budget-minutes 3 --vqvae-steps 3     | --budget-minutes, --vqvae-steps: use one or the other
    train.py --tokenizer x.pt                       | --tokenizer; --stage var
    train.py --stage var                            | no tokenizer; --tokenizer
    train.py --stage var --tokenizer RUN/last.pt    | last.pt; kind 'resume'
    train.py --out RUN/var.csv/run                  | Not a directory; var.csv/run
    train.py --resume                               | --resume; holds no run
    train.py --out RUN                              | --out RUN: holds a run; --resume; --overwrite
    train.py --out RUN --resume --depth 3           | --depth 3: the run to resume has 1; omit the flag
    train.py --preset imagenet256                   | --preset imagenet256; --data-dir
    train.py --adversarial-weight 1 --image-size 16 --scales 1 4 | --adversarial-weight; 24 pixels
    train.py --perceptual lpips                     | --perceptual: needs a weight
    train.py --preset cifar10 --data-dir nowhere    | data_batch_1.bin: 0 of; binary CIFAR-10
    train.py --seed 3000000000                      | --seed: 3000000000; below 2^31
"""


def check_wrong_flag(line: str, run: Path, folder: Path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    command, words = (part.replace('RUN', str(run)) for part in line.split('|'))
    script, *arguments = command.replace('CIFAR', str(HERE / 'cifar10.pt')).split()
    if script == 'train.py':
        arguments = ['--train-count', '64', '--out', 'run', *arguments]
    before = {path: path.read_bytes() for path in run.iterdir()}
    error = complaint(sys.modules[script.removesuffix('.py')].main, arguments, capsys, monkeypatch)
    assert all(word in error for word in words.strip().split('; ')), error
    assert not [path for path in folder.rglob('*') if path.is_file()]
    assert {path: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize('line', [' '.join(line.split()) for line in WRONG_FLAGS.strip().splitlines()])
def test_a_wrong_flag_is_named(line, tiny_run, tmp_path, capsys, monkeypatch):
    check_wrong_flag(line, tiny_run, tmp_path, capsys, monkeypatch)


class Bomb:
    """Creates a folder when unpickled without restrictions."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_that_is_no_such_checkpoint_is_named_and_runs_nothing(tiny_run, tmp_path, capsys, monkeypatch):
    good = (tiny_run / 'var.pt').read_bytes()
    (tmp_path / 'torn.pt').write_bytes(good[:len(good) // 2])
    (tmp_path / 'empty.pt').write_bytes(b'')
    torch.save([1, 2], tmp_path / 'list.pt')
    torch.save(Bomb(tmp_path / 'ran'), tmp_path / 'code.pt')
    words = dict.fromkeys(['torn', 'empty', 'list', 'code'], 'corrupt') | dict(gone='No such file')
    for name, word in words.items():
        arguments = [tmp_path / f'{name}.pt', '--out', tmp_path / 'x.png']
        error = complaint(sample.main, arguments, capsys, monkeypatch)
        assert f'{name}.pt' in error and word in error, error
    for damage in (lambda c: c['var_config'].update(depth=2), lambda c: c.pop('var'),
                   lambda c: c.pop('defaults'), lambda c: c['vqvae_config'].update(channels=64)):
        checkpoint = torch.load(tiny_run / 'var.pt', weights_only=True)
        damage(checkpoint)
        torch.save(checkpoint, tmp_path / 'damaged.pt')
        arguments = [tmp_path / 'damaged.pt', '--out', tmp_path / 'x.png']
        error = complaint(sample.main, arguments, capsys, monkeypatch)
        assert 'damaged.pt: corrupt, or not the expected file;' in error
    assert not [name for name in ('x.png', 'ran') if (tmp_path / name).exists()]


def test_a_last_pt_of_another_program_is_left_alone(tmp_path, capsys, monkeypatch):
    for content in (dict(model=torch.zeros(3), epoch=7), Bomb(tmp_path / 'ran'), None):
        torch.save(content, tmp_path / 'last.pt')
        if content is None:
            (tmp_path / 'last.pt').write_bytes(b'torn')
        before = (tmp_path / 'last.pt').read_bytes()
        for flags in ('', '--resume', '--overwrite'):
            arguments = [*TINY.split(), *flags.split(), '--out', tmp_path]
            error = complaint(train.main, arguments, capsys, monkeypatch)
            assert 'last.pt: ' in error and 'left unchanged: remove it, or choose another --out' in error
            assert [path.name for path in tmp_path.iterdir()] == ['last.pt']
            assert (tmp_path / 'last.pt').read_bytes() == before


def test_a_run_is_replaced_when_asked_and_not_before_all_is_well(tiny_run, tmp_path, capsys, monkeypatch):
    out = shutil.copytree(tiny_run, tmp_path / 'run')
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setitem(sys.modules, 'lpips', None)                 # not installed
    for flags, word in [('--batch-size 99', 'only 64'), ('--data-dir nowhere', 'no images'),
                        ('--perceptual-weight 1 --perceptual lpips', 'pip install lpips'),
                        ('--adversarial-weight 1 --image-size 16 --scales 1 4', '24 pixels')]:
        flags = f'{TINY} --overwrite --out {out} {flags}'.split()
        assert word in complaint(train.main, flags, capsys, monkeypatch)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    run('--overwrite --seed 1', out)
    assert not same_weights(out / 'var.pt', tiny_run / 'var.pt', 'var')
    out = stopped('', tmp_path / 'stopped', 'vqvae', 1)
    error = complaint(train.main, [*TINY.split(), '--out', out], capsys, monkeypatch)
    assert '--resume' in error and '--overwrite' in error


def test_other_images_than_those_of_the_run_are_refused(tmp_path, capsys, monkeypatch):
    folder = write_images(tmp_path / 'a', 30, (28, 28), mode='L')
    flags = f'--data-dir {folder} --train-count 27 --val-count 3'
    out = stopped(flags, tmp_path / 'run', 'var', 1)
    before = (out / 'last.pt').read_bytes()
    (folder / 'train/cat/new.png').write_bytes((folder / 'train/cat/0001.png').read_bytes())
    error = complaint(train.main, ['--resume', '--out', out], capsys, monkeypatch, 'held out')
    assert 'not the images that the run to resume' in error and (out / 'last.pt').read_bytes() == before
    (folder / 'train/cat/new.png').unlink()
    tokenizer, var, _ = sample.load(resume(out) / 'var.pt')
    assert var.class_names == ['bird', 'cat', 'dog'] and var.config.num_classes == 3


def test_a_log_that_cannot_be_written_is_said_once_and_a_model_ends_the_run(tiny_run, tmp_path, capsys,
                                                                            monkeypatch):
    out, log = tmp_path / 'run', tmp_path / 'run/vqvae.csv'
    log.mkdir(parents=True)                                         # as if open in a spreadsheet on Windows
    usual = train.Trainer.end_step

    def end_step(trainer):
        if trainer.name == 'var' and log.is_dir():
            log.rmdir()
        usual(trainer)
    monkeypatch.setattr(train.Trainer, 'end_step', end_step)
    (out / 'samples.png').mkdir()
    run('', out)
    said = capsys.readouterr().out
    assert said.count('vqvae.csv: cannot be written') == said.count('samples.png: cannot be written') == 1
    assert same_weights(out / 'var.pt', tiny_run / 'var.pt', 'var')
    assert curve(out, 'var') == curve(tiny_run, 'var')
    (tmp_path / 'next/var.pt').mkdir(parents=True)
    arguments = [*TINY.split(), '--out', tmp_path / 'next', '--overwrite']
    assert 'var.pt' in complaint(train.main, arguments, capsys, monkeypatch)


@pytest.mark.parametrize('flags', ['', '--log-every-steps 99 --save-every-steps 99'])
def test_a_loss_that_explodes_ends_the_run_before_a_save(flags, tiny_run, tmp_path, capsys, monkeypatch):
    out = shutil.copytree(tiny_run, tmp_path / 'run')
    arguments = f'{TINY} {flags} --stage var --var-lr 1e30 --var-steps 8 --overwrite --out {out}'.split()
    error = complaint(train.main, arguments, capsys, monkeypatch)
    assert re.search(r'var: \w+ is (nan|inf) at step \d or just before; last.pt is intact;', error)
    last = torch.load(out / 'last.pt', weights_only=True)
    assert last['step'] == 0 and all(weight.isfinite().all() for weight in last['weights']['var'].values())
    assert (resume(out, '--var-lr 1e-3') / 'var.pt').exists()                           # as the message says


def test_help_names_every_flag_with_its_defaults_in_all_presets(capsys):
    with pytest.raises(SystemExit):
        train.build_parser().parse_args(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert text.startswith('usage: train.py [flags]') and '--no-unit-norm' in text
    assert '--batch-size BATCH_SIZE images per step over all GPUs [64; shapes: 16; cifar10: 256;' in text
    assert len(train.FLAGS) <= 58 and all(train.flag(name) in text for name, *_ in train.FLAGS)


def test_a_download_is_whole_or_not_at_all(tmp_path, capfd):
    archive, data = tmp_path / 'archive.tar.gz', tmp_path / 'data'
    with tarfile.open(archive, 'w:gz') as tar:
        tar.add(ROOT / 'LICENSE', 'cifar-10-batches-bin/test_batch.bin')
    whole = archive.read_bytes()
    url, sha256 = archive.as_uri(), hashlib.sha256(whole).hexdigest()
    archive.write_bytes(whole[:-9])                                 # truncated
    for url_then, words in [(url, 'invalid hash value.*--data-dir'), (url + '.gone', '--data-dir')]:
        with pytest.raises(sample.UserError, match=words):
            train.download_cifar10(data, url_then, sha256)
        assert not list(data.iterdir())
    archive.write_bytes(whole)
    train.download_cifar10(data, url, sha256)
    assert (data / 'cifar-10-batches-bin/test_batch.bin').read_bytes() == (ROOT / 'LICENSE').read_bytes()
    assert len(list(data.iterdir())) == 1


# --------------------------------------------------------------------------------- README and the other pages
PAGES = {path: path.read_text() for path in (ROOT / 'README.md', *sorted((ROOT / 'notebooks').rglob('*.md')))}
RESULTS = PAGES[ROOT / 'notebooks/results.md']
COMMANDS = [line for text in PAGES.values() for block in re.findall(r'```bash\n(.*?)```', text, re.S)
            for line in block.splitlines()]
COMMANDS += [line for text in PAGES.values()
             for line in re.findall(r'`((?:python|pytest|torchrun) [^`]+)`', text)]


def test_the_two_pip_lines_of_readme_are_what_ci_runs():
    assert [line for line in PAGES[ROOT / 'README.md'].splitlines() if line.startswith('pip install')] == [
        'pip install -r requirements.txt && python train.py', 'pip install -r requirements-dev.txt && pytest']
    assert 'grep "^pip install" README.md' in (ROOT / '.ci/run').read_text()


def test_every_command_on_the_pages_names_a_script_its_flags_and_its_tests():
    text = '\n'.join([*COMMANDS, sample.__doc__, train.__doc__, '']).replace(' --help', '')
    for module, script in ((train, 'train.py'), (sample, 'sample.py')):
        found = re.findall(rf'(?:python|torchrun .*?) {script}(.*?)(?:&&|\n)', text)
        assert len(found) > 5
        for flags in found:
            module.build_parser().parse_args(shlex.split(flags, comments=True))
    of_train = ' '.join(f"'{train.flag(name)}'" for name, *_ in train.FLAGS)
    for script, flags in re.findall(r'python (notebooks/\S+\.py)(.*?)(?:&&|\n)', text):
        known = (ROOT / script).read_text() + of_train * script.endswith(('bench.py', 'costs.py'))
        for flag in re.findall(r' --(?:no-)?([a-z-]+)', flags):
            assert f"'--{flag}'" in known, (script, flag)
    tests = ''.join(path.read_text() for path in (ROOT / 'notebooks').rglob('test_*.py'))
    tests += (ROOT / 'test_var.py').read_text()
    tests = re.findall(r'def (test_\w+)', tests) + re.findall(r"'(\w+)'", tests)        # names; ids of cases
    for expression in re.findall(r'pytest .*?-k (?:"([^"]+)"|(\w+))', text):
        for word in ''.join(expression).split(' or '):
            assert any(word in name for name in tests), word


def test_every_relative_link_on_the_pages_leads_to_a_file_and_a_heading():
    for page, text in PAGES.items():
        prose = re.sub(r'```.*?```|`[^`]*`', '', text, flags=re.S)
        links = re.findall(r'\]\((?!http)([^)#]*)(#[^)]*)?\)', prose)
        assert links or page.parent != ROOT
        for name, anchor in links:
            target = page.parent / name if name else page
            assert target.exists(), (page.name, name)
            if anchor:
                headings = re.findall(r'^#+ (.*)', PAGES[target.resolve()], flags=re.M)
                slugs = [re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings]
                assert anchor[1:] in slugs, (page.name, name, anchor)


def test_readmes_first_line_trains_and_draws_with_its_steps_cut_to_2(tmp_path):
    def python(command, status=0):
        command = [sys.executable, *f'{ROOT}/{command}'.split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done
    python('train.py --vqvae-steps 2 --var-steps 2 --train-count 100')
    draw = 'sample.py out/shapes/var.pt'
    python(f'{draw} --labels 3 Heart --count 5 --npz a.npz --show-scales --out a.png')
    assert Image.open(tmp_path / 'a.png').size == (4 * (4 * 34 - 2), 4 * (5 * 34 - 2))
    assert np.load(tmp_path / 'a.npz')['labels'].tolist() == [3, 5, 3, 5, 3]
    said = "error: [Errno 2] No such file or directory: 'none.pt'\n"
    assert python('sample.py none.pt', status=2).stderr == said
