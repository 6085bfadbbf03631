"""studies.py: fits recover known laws, runs continue after a stop, a tiny study runs end to end, and the
committed prediction follows from the committed losses. The study of orders has tests of its own."""
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import judge
import studies
import train
from bench import flops_of
from sample import UserError, load
from vqvae import VQVAEConfig
from test_mistakes import check_wrong_flag
from test_var import curve, same_weights, seeded, tiny_run


def test_a_power_law_is_found_again_with_its_constant():
    x = np.geomspace(1e5, 1e8, 7)
    law = studies.fit_power_law(x, (2e-6 * x) ** -0.3)
    assert law.alpha == pytest.approx(-0.3) and 10 ** law.log10_beta == pytest.approx(2e-6, rel=1e-6)
    assert law.constant == 0 and law.correlation == pytest.approx(-1)
    assert law(1e9) == pytest.approx(2000 ** -0.3)
    with_constant = (2e-6 * x) ** -0.3 + 5
    law = studies.fit_power_law(x, with_constant, with_constant=True)
    # the constant is found by grid search
    assert law.constant == pytest.approx(5, rel=0.02) and law.alpha == pytest.approx(-0.3, rel=0.1)
    assert law.correlation < studies.fit_power_law(x, with_constant).correlation
    assert law(1e9) == pytest.approx(5 + 2000 ** -0.3, rel=0.005)
    for y in (x ** 0.3, np.ones(7)):
        with pytest.raises(UserError, match='does not fall'):
            studies.fit_power_law(x, y)


def test_the_pareto_frontier_is_what_nothing_cheaper_beats():
    costs, losses = np.random.default_rng(0).random((2, 200))
    found = studies.pareto_frontier(costs, losses)
    slow = [i for i in range(200) if not ((costs <= costs[i]) & (losses < losses[i])).any()]
    assert sorted(found) == slow and list(costs[found]) == sorted(costs[found]) and 1 < len(found) < 50


def tiny_study(out: Path) -> SimpleNamespace:
    return SimpleNamespace(preset='shapes', share=0.006, out=out, data_dir=None, dtype='float32', quiet=True)


@pytest.mark.slow
def test_of_each_run_there_is_one_and_it_goes_on_where_it_was_stopped(tmp_path, capsys, monkeypatch):
    args = tiny_study(tmp_path)
    run, args.quiet = studies.of_size(args, 1), False
    studies.train(args, run)
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])[2:]
    out = studies.folder_of(args, run.name)
    stamp = (out / 'last.pt').stat().st_mtime_ns
    assert [row['step'] for row in studies.validations(out)] == [1, 2, 3, 4, 5]
    assert (out / 'var-5.pt').exists() and len(studies.log_of(run, args)) == 5
    row = studies.log_of(run, args)[-1]
    tokenizer, var, _ = load(out / 'var-5.pt')
    assert row['parameters'] == sum(parameter.numel() for parameter in var.parameters())
    assert row['train_flops'] == 5 * 16 * flops_of(tokenizer.config, var.config)['train']
    assert row['error_8x8'] == pytest.approx(1 - studies.validations(out)[-1]['accuracy_8x8'])
    studies.train(args, run)                                            # finished: nothing is repeated
    assert (out / 'last.pt').stat().st_mtime_ns == stamp
    done = shutil.copytree(out, tmp_path / 'done')
    shutil.rmtree(out)
    monkeypatch.chdir(HERE.parent)
    with pytest.raises(SystemExit):                                     # stopped at step 1
        train.main([*command, '--stop-after-minutes', '1e-9'])
    studies.train(args, run)
    with pytest.raises(UserError, match='size-1: holds a run with another --depth, --seed; remove it'):
        studies.train(args, run._replace(flags='--depth 2 --seed 3'))
    args.dtype = 'bfloat16'
    with pytest.raises(UserError, match='tokenizer: holds a run with another --dtype; remove it'):
        studies.train(args, run)
    assert same_weights(out / 'var-5.pt', done / 'var-5.pt', 'var')
    assert curve(out, 'var') == curve(done, 'var')


@pytest.mark.slow
def test_a_run_that_fails_stops_the_study_with_what_to_do(tmp_path):
    args = tiny_study(tmp_path)
    with pytest.raises(UserError, match=r'bad: train.py ended with status 2; .*: error: --depth 0: must'):
        studies.train(args, studies.Run('bad', '--depth 0', 5))


@pytest.mark.slow
def test_a_tiny_study_runs_from_end_to_end(tmp_path, monkeypatch):
    for name, value in dict(SIZES=(1, 2), LARGEST=3, SHEET=((1, 2), (0.2, 1.0))).items():
        monkeypatch.setattr(studies, name, value)
    flags = ['--preset', 'shapes', '--share', '0.006', '--out', str(tmp_path), '--quiet']
    folder = tmp_path / 'shapes-0.006'
    studies.main(['scaling', *flags])
    found = [row | {name: row[name] / row['depth'] for name in studies.MEASURES}    # as if size had helped
             for row in studies.read_csv(folder / 'scaling-shapes.csv')]
    studies.write_csv(folder / 'scaling-shapes.csv', found)
    for study in ('predict', 'largest', 'sheet'):
        studies.main([study, *flags])
    scaling, prediction = (studies.read_csv(folder / f'{name}-shapes.csv')
                           for name in ('scaling', 'prediction'))
    assert [*dict.fromkeys(row['run'] for row in scaling)] == ['size-1', 'size-2', 'size-3']
    assert [row['depth'] for row in studies.at_the_end(scaling, (1, 2, 3))] == [1, 2, 3]
    assert {row['parameters'] for row in prediction} == {studies.at_the_end(scaling, [3])[0]['parameters']}
    assert Image.open(folder / 'images/size-by-training-shapes.png').size == 2 * (4 * (4 * 34 - 2),)
    with pytest.raises(UserError, match='already has depth 3;'):
        studies.main(['predict', *flags])
    shutil.rmtree(folder / 'size-1')                        # its rows are kept when others are collected
    studies.main(['largest', *flags])
    assert studies.read_csv(folder / 'scaling-shapes.csv') == scaling


WRONG_FLAGS = """
    studies.py                                      | the following arguments are required: study
    studies.py scalin                               | study; scalin; scaling
    studies.py scaling --share 0                    | --share: 0: must be above 0
    studies.py scaling --preset imagenet256         | --preset; imagenet256; shapes
    studies.py largest --share 0.5                  | prediction-cifar10-cpu.csv: cannot be read; it first
    studies.py predict --share 0.5                  | scaling-cifar10-cpu.csv: cannot be read; it first
    studies.py predict                              | already has depth 7
    studies.py sheet --share 0.5                    | size-1/var-; No such file
    studies.py orders --data-dir nowhere            | nowhere/data_batch_1.bin: 0 of
"""


@pytest.mark.parametrize('line', [' '.join(line.split()) for line in WRONG_FLAGS.strip().splitlines()])
def test_a_wrong_flag_is_named(line, tiny_run, tmp_path, capsys, monkeypatch):
    check_wrong_flag(line, tiny_run, tmp_path, capsys, monkeypatch)


def test_the_prediction_is_what_the_six_smaller_sizes_say_and_comes_true_within_3_percent():
    rows, found = (studies.read_csv(HERE / f'{name}-cifar10-cpu.csv') for name in ('scaling', 'prediction'))
    ends, (largest,) = studies.at_the_end(rows, studies.SIZES), studies.at_the_end(rows, [studies.LARGEST])
    assert len(ends) == 6 and len(found) == 8 and largest['parameters'] > 1.5 * ends[-1]['parameters']
    for row in found:
        law = studies.fit_power_law(*([end[name] for end in ends] for name in ('parameters', row['measure'])),
                                    row['with_constant'])
        assert row['predicted'] == pytest.approx(float(law(largest['parameters'])), rel=1e-4)
        assert row['predicted'] == pytest.approx(largest[row['measure']], rel=0.03)
