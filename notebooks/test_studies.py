"""studies.py: its fits find known laws, its runs are equal where they should be and go on after a stop, a
tiny study runs from end to end, and the committed prediction follows from the committed losses."""
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import judge                                                                            # noqa: E402
import studies                                                                          # noqa: E402
from sample import UserError, flops_of, load                                            # noqa: E402
from vqvae import VQVAEConfig                                                           # noqa: E402
from test_var import check_wrong_flag, curve, same_weights, seeded, tiny_run     # noqa: E402, F401


def test_a_power_law_is_found_again_with_its_constant():
    x = np.geomspace(1e5, 1e8, 7)
    law = studies.fit_power_law(x, (2e-6 * x) ** -0.3)
    assert law.alpha == pytest.approx(-0.3) and 10 ** law.log10_beta == pytest.approx(2e-6, rel=1e-6)
    assert law.constant == 0 and law.correlation == pytest.approx(-1)
    assert law(1e9) == pytest.approx(2000 ** -0.3)
    with_constant = (2e-6 * x) ** -0.3 + 5
    law = studies.fit_power_law(x, with_constant, with_constant=True)
    # the constant is looked for on a grid
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


@pytest.mark.parametrize('preset', studies.SETTINGS)
def test_rows_of_the_ablation_take_equal_compute_and_ar_has_vars_parameters(preset):
    args, found = SimpleNamespace(preset=preset, share=1.0), {}
    for _, stem, flags, seeds, _ in studies.ROWS:
        run = studies.at_equal_compute(args, stem, flags, seeds[0])
        configs = studies.settings_of(preset, run.flags)
        found[stem] = run.steps * studies.batch_size(args) * flops_of(*configs)['train'], configs[1]
    compute = [flops for flops, _ in found.values()]
    assert max(compute) / min(compute) < 1.01
    parameters = {stem: studies.parameters_of(config) for stem, (_, config) in found.items()}
    assert parameters['ar'] == pytest.approx(parameters['var'], rel=0.05)
    assert found['deep'][1].depth == 2 * found['norm'][1].depth
    sizes = [studies.parameters_of(studies.settings_of(preset, f'--depth {depth}')[1])
             for depth in studies.SIZES]
    assert len(sizes) >= 6 and max(sizes) / min(sizes) >= 100


def tiny_study(out: Path) -> SimpleNamespace:
    return SimpleNamespace(preset='shapes', share=0.006, out=out, data_dir=None, dtype='float32', quiet=True)


def test_of_each_run_there_is_one_and_it_goes_on_where_it_was_stopped(tmp_path):
    args = tiny_study(tmp_path)
    run = studies.of_size(args, 1)
    studies.train(args, run)
    out = studies.folder_of(args, run.name)
    stamp = (out / 'last.pt').stat().st_mtime_ns
    assert [row['step'] for row in studies.validations(out)] == [1, 2, 3, 4, 5]
    assert (out / 'var-5.pt').exists() and len(studies.log_of(run, args)) == 5
    row = studies.log_of(run, args)[-1]
    tokenizer, var, _ = load(out / 'var-5.pt')
    assert row['parameters'] == sum(parameter.numel() for parameter in var.parameters())
    assert row['train_flops'] == 5 * 16 * flops_of(tokenizer.config, var.config)['train']
    assert row['error_8x8'] == pytest.approx(1 - studies.validations(out)[-1]['accuracy_8x8'])
    studies.train(args, run)                                            # done: nothing is done again
    assert (out / 'last.pt').stat().st_mtime_ns == stamp
    done = shutil.copytree(out, tmp_path / 'done')
    shutil.copy(out / 'previous.pt', out / 'last.pt')                   # stopped at step 4
    (out / 'var-5.pt').unlink()
    studies.train(args, run)
    with pytest.raises(UserError, match='size-1: holds a run with another --depth, --seed; remove it'):
        studies.train(args, run._replace(flags='--depth 2 --seed 3'))
    args.dtype = 'bfloat16'
    with pytest.raises(UserError, match='tokenizer-scale: holds a run with another --dtype; remove it'):
        studies.train(args, run)
    assert same_weights(out / 'var-5.pt', done / 'var-5.pt', 'var')
    assert curve(out, 'var') == curve(done, 'var')


def test_a_run_that_fails_stops_the_study_with_what_to_do(tmp_path):
    args = tiny_study(tmp_path)
    with pytest.raises(UserError, match=r'bad: train.py ended with status 2; .*: error: --depth 0: must'):
        studies.train(args, studies.Run('bad', '--depth 0', 5))


@pytest.mark.slow
def test_a_tiny_study_runs_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(studies, 'JUDGED', 100)
    monkeypatch.setattr(studies, 'PYRAMIDS', {4: (1, 2, 4)})
    untrained = judge.Judge((16, 32, 64), False).eval()             # training it would take a minute
    monkeypatch.setattr(studies, 'load_judge', lambda *args: untrained)
    rows = [row for row in studies.ROWS if row[1] != 'var'][1:]         # fewer, and a seed each
    rows = [(*row[:3], (0,), row[4]) for row in rows]
    monkeypatch.setattr(studies, 'ROWS', rows)
    monkeypatch.setattr(studies, 'SIZES', (1, 2))
    monkeypatch.setattr(studies, 'LARGEST', 3)
    monkeypatch.setattr(studies, 'SHEET', ((1, 2), (0.2, 1.0)))
    flags = ['--preset', 'shapes', '--share', '0.01', '--out', str(tmp_path), '--quiet']
    folder = tmp_path / 'shapes-0.01'
    studies.main(['scaling', *flags])
    rows = [row | {name: row[name] / row['depth'] for name in studies.MEASURES}     # as if size had helped
            for row in studies.read_csv(folder / 'scaling-shapes.csv')]
    studies.write_csv(folder / 'scaling-shapes.csv', rows)
    for study in ('predict', 'ablation', 'largest', 'sheet', 'speed'):
        studies.main([study, *flags])
    scaling, prediction, ablation, speed = (studies.read_csv(folder / f'{name}.csv') for name in (
        'scaling-shapes', 'prediction-shapes', 'ablation-shapes', 'speed'))
    assert list(dict.fromkeys(row['run'] for row in scaling)) == [
        'size-1', 'size-2', 'size-3', 'norm-0', 'deep-0']
    assert [row['depth'] for row in studies.at_the_end(scaling, (1, 2, 3))] == [1, 2, 3]
    assert {row['parameters'] for row in prediction} == {studies.at_the_end(scaling, [3])[0]['parameters']}
    assert [row['row'] for row in ablation] == [row[0] for row in studies.ROWS for _ in row[3]]
    guided_rows = [row[0] for row in studies.ROWS if 'cfg' in row[4]]
    for row in ablation:
        raster = row['row'].startswith('AR')
        assert row['steps_an_image'] == (64 if raster else 4) and 0 <= row['recognised'] <= 1
        assert 0 < row['floor'] and 0 < row['reconstructions'] and 0 < row['frechet']
        assert (row['cfg'] in studies.GUIDANCE) == (row['row'] in guided_rows)
    plain, _, guided = (row for row in ablation if row['row'] in ('+ AdaLN', '+ top-k', '+ guidance'))
    _, var, _ = load(folder / 'adaln-0' / f"var-{plain['steps']:.0f}.pt")
    flops = flops_of(VQVAEConfig(), var.config)
    assert guided['sample_flops'] == flops['sample'] < 2 * plain['sample_flops']
    assert plain['sample_flops'] == (flops['sample'] + flops['decode']) // 2
    assert [(row['steps'], row['batch']) for row in speed] == [(16, 1), (16, 50), (3, 1), (3, 50)]
    assert Image.open(folder / 'images/size-by-training-shapes.png').size == 2 * (2 * (4 * 34 - 2),)
    with pytest.raises(UserError, match='knows depth 3 already'):
        studies.main(['predict', *flags])
    shutil.rmtree(folder / 'size-1')                        # its rows stay when others are collected
    studies.main(['largest', *flags])
    assert studies.read_csv(folder / 'scaling-shapes.csv') == scaling
    lines = (folder / 'ablation-shapes.csv').read_text().splitlines()
    (folder / 'ablation-shapes.csv').write_text('\n'.join([*lines[:5], *lines[6:]]))
    studies.main(['ablation', *flags])                      # the lost row is measured, the others stay
    found = studies.read_csv(folder / 'ablation-shapes.csv')
    for old, new in zip(ablation, found, strict=True):
        assert {**old, 'seconds_an_image': 0} == {**new, 'seconds_an_image': 0}


WRONG_FLAGS = """
    studies.py                                      | the following arguments are required: study
    studies.py scalin                               | study scalin; did you mean scaling?
    studies.py scaling --share 0                    | --share 0; above 0
    studies.py scaling --preset imagenet256         | --preset imagenet256; shapes
    studies.py largest --share 0.5                  | prediction-cifar10-cpu.csv: cannot be read; comes first
    studies.py predict --share 0.5                  | scaling-cifar10-cpu.csv: cannot be read; comes first
    studies.py predict                              | knows depth 7 already
    studies.py sheet --share 0.5                    | size-1/var-; no such file
    studies.py ablation --data-dir nowhere --quiet  | nowhere; no such folder
"""


@pytest.mark.parametrize('line', [' '.join(line.split()) for line in WRONG_FLAGS.strip().splitlines()])
def test_a_wrong_flag_is_named(line, tiny_run, tmp_path, capsys, monkeypatch):          # noqa: F811
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


@pytest.mark.parametrize('preset', studies.SETTINGS)
def test_committed_rows_are_those_of_the_script(preset):
    args, rows = SimpleNamespace(preset=preset, share=1.0), studies.read_csv(HERE / f'ablation-{preset}.csv')
    expected = [(title, seed, studies.at_equal_compute(args, stem, flags, seed).steps)
                for title, stem, flags, seeds, _ in studies.ROWS for seed in seeds]
    assert [(row['row'], row['seed'], row['steps']) for row in rows] == expected
