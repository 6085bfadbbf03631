"""laws.py and the scaling laws of studies.py: fits recover known laws, a tiny study runs end to end and keeps
the rows it has, and the committed predictions follow from the committed losses. test_orders.py tests the
other study."""
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import laws
import studies
from orders import ORDERS, Model, train_flops
from sample import UserError
from test_mistakes import check_wrong_flag
from test_var import tiny_run                                                           # noqa: F401


def test_a_power_law_is_found_again_with_its_constant():
    x = np.geomspace(1e5, 1e8, 7)
    law = laws.fit_power_law(x, (2e-6 * x) ** -0.3)
    assert law.alpha == pytest.approx(-0.3) and law.factor ** (1 / law.alpha) == pytest.approx(2e-6, rel=1e-6)
    assert law.constant == 0 and law.correlation == pytest.approx(-1)
    assert law(1e9) == pytest.approx(2000 ** -0.3)
    y = (2e-6 * x) ** -0.3 + 5
    law = laws.fit_power_law(x, y, with_constant=True)
    # the constant is found by grid search
    assert law.constant == pytest.approx(5, rel=0.02) and law.alpha == pytest.approx(-0.3, rel=0.1)
    assert law.correlation < laws.fit_power_law(x, y).correlation
    assert law(1e9) == pytest.approx(5 + 2000 ** -0.3, rel=0.005)
    for y in (x ** 0.3, np.ones(7)):
        with pytest.raises(UserError, match='does not fall'):
            laws.fit_power_law(x, y)


def test_the_range_of_a_law_covers_the_truth_in_nine_of_ten_samples():
    x, seeds, covered, random = np.geomspace(1e5, 1e7, 6), (3, 3, 3, 1, 1, 1), [], np.random.default_rng(1)
    true = (1e-4 * x) ** -0.3 + 2
    assert len({*laws.resampled_laws(x, true[:, None].tolist(), True, 0.0)}) == 1
    for _ in range(60):
        values = [list(y + 0.003 * random.standard_normal(count)) for y, count in zip(true, seeds)]
        found = laws.resampled_laws(x, values, True, 0.003)
        assert found[0] == laws.fit_power_law(x, [np.mean(of_x) for of_x in values], True)
        middle, low, high = laws.range_of([law(1e8) for law in found])
        assert low < high and middle == found[0](1e8)
        covered.append(low < (1e-4 * 1e8) ** -0.3 + 2 < high)
    assert laws.range_of([7, *range(101)]) == (7, 5, 95)
    assert 0.75 < np.mean(covered) <= 0.99              # 0.9, but for the noise of 60 samples


def test_rows_are_grouped_over_seeds_and_their_spread_is_pooled():
    rows = [dict(depth=depth, blocks=1, steps=steps, seed=seed, loss=10 * depth + steps + spread * seed)
            for depth, spread in ((2, 3.0), (1, 1.0)) for steps in (5, 6) for seed in (0, 1, 2)]
    rows.append(dict(depth=3, blocks=1, steps=5, seed=0, loss=99.0))
    after_5 = {(1,): [15, 16, 17], (2,): [25, 28, 31], (3,): [99]}
    assert laws.grouped(rows, 'loss', 'depth', steps=5) == after_5
    assert list(laws.grouped(rows, 'loss', 'depth', 'steps', blocks=1))[:3] == [(1, 5), (1, 6), (2, 5)]
    assert laws.spread_of(rows, 'loss') == pytest.approx(math.sqrt((1 + 9) / 2))


def test_the_guesses_without_a_law_are_the_last_value_and_the_last_gain_per_doubling():
    assert laws.guesses([1, 2, 8], [[9.0], [6.0], [3.0, 1.0]], 32) == dict(
        as_good=2, as_much_better=pytest.approx(2 - 4))         # from 6 to 2 in two doublings, then two more


def test_the_pareto_frontier_is_what_nothing_cheaper_beats():
    costs, losses = np.random.default_rng(0).random((2, 200))
    found = laws.pareto_frontier(costs, losses)
    slow = [i for i in range(200) if not ((costs <= costs[i]) & (losses < losses[i])).any()]
    assert sorted(found) == slow and list(costs[found]) == sorted(costs[found]) and 1 < len(found) < 50


def test_a_model_with_fewer_blocks_has_their_parameters_and_flops_less():
    sizes = [Model(ORDERS['VAR'], 256, 3, blocks) for blocks in (1, 2, 0)]
    assert [len(model.blocks) for model in sizes] == [1, 2, 3] and sizes[0].config.width == 192
    for measure in (studies.parameters_of, train_flops):
        one, two, three = map(measure, sizes)
        assert three - two == two - one > one / 2
    # what remains without any block: head, word embedding and AdaLN of the head, forward and twice backward
    assert 2 * one - two == 3 * 2 * (192 * 256 * 85 + 16 * 192 * 84 + 192 * 384)


def of_size(rows: list[dict]) -> list[tuple]:
    return [(row['depth'], row['blocks'], row['steps'], row['seed']) for row in rows]


@pytest.mark.parametrize('preset', [preset for preset, study in studies.SCALING.items() if study.left_out])
def test_the_runs_of_a_study_suffice_to_predict_the_runs_left_out(preset):
    study, rows = studies.SCALING[preset], []
    for run in study.runs:
        parameters = studies.parameters_of(Model(ORDERS['VAR'], 1024, run.depth, run.blocks))
        for steps in run.steps:
            loss = 2 + (1e-4 * parameters) ** -0.3 + (1e-3 * steps) ** -0.5
            row = dict(depth=run.depth, blocks=run.blocks, steps=steps, parameters=parameters,
                       images=study.batch_size * steps)
            rows += [row | dict.fromkeys(studies.MEASURES, loss + seed / 1e4) for seed in run.seeds]
    found, left_out = studies.predictions(preset, rows), [(run.depth, run.steps[0]) for run in study.left_out]
    assert {(row['depth'], row['steps']) for row in found} == {*left_out}
    for row in found:
        assert 0 < row['predicted_low'] <= row['predicted'] <= row['predicted_high'] < row['as_good']


@pytest.mark.slow
def test_a_tiny_study_runs_from_end_to_end_and_keeps_the_rows_it_has(tmp_path, monkeypatch):
    Runs = studies.Runs
    tiny = studies.Scaling(4, 0.01, [Runs(1, 1, (500, 1000), (0, 1)), Runs(2, 1, (500, 1000)),
                                     Runs(2, 2, (500, 1000, 2000))],
                           [Runs(3, 3, (1000,)), Runs(2, 2, (4000,))],
                           [Runs(1, 1, (500, 1000)), Runs(2, 2, (500, 1000))], 2.0)
    for name, value in dict(SCALING=dict(shapes=tiny), DRAWN=200, JUDGED=100).items():
        monkeypatch.setattr(studies, name, value)
    flags = ['--preset', 'shapes', '--share', '0.01', '--out', str(tmp_path), '--quiet']
    folder = tmp_path / 'shapes-0.01'
    studies.main(['scaling', *flags])
    path = folder / 'scaling-shapes.csv'
    rows = studies.read_csv(path)
    assert of_size(rows) == [(1, 1, 5, 0), (1, 1, 5, 1), (1, 1, 10, 0), (1, 1, 10, 1), (2, 1, 5, 0),
                             (2, 1, 10, 0), (2, 2, 5, 0), (2, 2, 10, 0), (2, 2, 20, 0)]
    for row in rows:
        model = Model(ORDERS['VAR'], 256, row['depth'], row['blocks'])
        assert row['images'] == 4 * row['steps'] and row['parameters'] == studies.parameters_of(model)
        assert row['train_flops'] == row['images'] * train_flops(model)
        assert 0 < row['loss'] < 7 and 0 < row['error_8x8'] <= 1
    path.write_text(''.join(line for i, line in enumerate(path.read_text().splitlines(True)) if i != 3))
    studies.main(['scaling', *flags])                   # trains the deleted run again
    again = studies.read_csv(path)
    assert of_size(again[:-1]) == of_size(rows[:2] + rows[3:])
    assert all(again[-1][name] == rows[2][name] for name in ('steps', 'seed', *studies.MEASURES))
    # as if size and training had helped in all of these few steps
    studies.write_csv(path, [row | {name: 9 / (row['parameters'] * row['steps']) ** 0.1
                                    for name in studies.MEASURES} for row in again])
    studies.main(['predict', *flags])
    predictions = studies.read_csv(folder / 'prediction-shapes.csv')
    assert [row['by'] for row in predictions] == ['parameters'] * 8 + ['images'] * 8
    for row in predictions:
        steps = row['steps']
        wanted = 9 / (studies.parameters_of(Model(ORDERS['VAR'], 256, row['depth'])) * steps) ** 0.1
        assert row['predicted'] == pytest.approx(wanted, rel=1e-3) and row['points'] == 3
        assert row['predicted_low'] <= row['predicted'] <= row['predicted_high']
        assert row['as_much_better'] < row['predicted'] < row['as_good']
    studies.main(['largest', *flags])
    assert of_size(studies.read_csv(path))[-2:] == [(3, 3, 10, 0), (2, 2, 40, 0)]
    with pytest.raises(UserError, match='already has depth 3 after 10 steps; this would not be a prediction'):
        studies.main(['predict', *flags])
    studies.main(['sheet', *flags])
    picture = Image.open(folder / 'images/size-by-training-shapes.png')
    assert picture.size == (4 * (10 * 34 - 2), 4 * (2 * 34 - 2))
    (folder / 'size-2-2-5-0.pt').unlink()
    with pytest.raises(UserError, match='size-2-2-5-0.pt: missing; to train it again, delete its row in'):
        studies.main(['sheet', *flags])


@pytest.mark.slow
def test_a_tokenizer_that_cannot_be_trained_stops_the_study_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, 'DRAWN', 200)
    wrong = studies.SETTINGS['shapes']._replace(tokenizer='--vocab-size 0')
    monkeypatch.setitem(studies.SETTINGS, 'shapes', wrong)
    with pytest.raises(UserError, match='tokenizer-4-0: train.py ended with status 2; .*--vocab-size 0:'):
        studies.main(['scaling', '--preset', 'shapes', '--out', str(tmp_path), '--quiet', '--share', '0.1'])


@pytest.mark.slow
def test_an_interrupted_tokenizer_is_resumed_to_the_same_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, 'DRAWN', 200)
    train, tokens = studies.train_tokenizer, []

    def interrupt(args, out, flags):
        train(args, out, flags + ' --stop-after-minutes 1e-9')
        assert torch.load(out / 'last.pt', weights_only=True)['unfinished']
        raise KeyboardInterrupt

    for name in ('whole', 'interrupted'):
        study = studies.Study(SimpleNamespace(preset='shapes', share=0.01, out=tmp_path / name, data_dir=None,
                                              dtype='float32', quiet=True), 'scaling')
        if name == 'interrupted':
            monkeypatch.setattr(studies, 'train_tokenizer', interrupt)
            with pytest.raises(KeyboardInterrupt):
                study.tokenizer(ORDERS['VAR'], 0)
            monkeypatch.setattr(studies, 'train_tokenizer', train)
        tokens.append(study.tokenizer(ORDERS['VAR'], 0)[1:])
    assert all(whole.equal(resumed) for whole, resumed in zip(*tokens))


WRONG_FLAGS = """
    studies.py                                      | the following arguments are required: study
    studies.py scalin                               | study; scalin; scaling
    studies.py scaling --share 0                    | --share: 0: must be above 0
    studies.py scaling --preset imagenet256         | --preset; imagenet256; shapes
    studies.py orders --preset cifar10              | --preset cifar10: not for orders; shapes
    studies.py scaling --device tpu9                | --device tpu9; --device cpu
    studies.py largest                              | prediction-cifar10-cpu.csv: cannot be read; it first
    studies.py predict                              | --preset cifar10-cpu: no run is left out
    studies.py predict --preset shapes --share 0.5  | scaling-shapes.csv: cannot be read; it first
    studies.py predict --preset shapes              | already has depth
    studies.py sheet --data-dir nowhere             | nowhere/data_batch_1.bin: 0 of
    studies.py orders --data-dir nowhere            | nowhere/data_batch_1.bin: 0 of
"""


@pytest.mark.parametrize('line', [' '.join(line.split()) for line in WRONG_FLAGS.strip().splitlines()])
def test_a_wrong_flag_is_named(line, tiny_run, tmp_path, capsys, monkeypatch):             # noqa: F811
    check_wrong_flag(line, tiny_run, tmp_path, capsys, monkeypatch)


@pytest.mark.parametrize('preset', ['shapes', 'cifar10-cpu'])
def test_the_committed_rows_are_those_of_the_script_and_the_predictions_follow_from_them(preset):
    rows, study = studies.read_csv(HERE / f'scaling-{preset}.csv'), studies.SCALING[preset]
    before, after = [[(run.depth, run.blocks, steps, seed) for run in runs for steps in run.steps
                      for seed in run.seeds] for runs in (study.runs, study.left_out)]
    assert sorted(of_size(rows)) == sorted(before + after)
    if not after:
        return
    found = studies.predictions(preset, [row for row in rows if of_size([row])[0] in before])
    committed = studies.read_csv(HERE / f'prediction-{preset}.csv')
    assert len(found) == len(committed) > 0
    for row, wanted in zip(committed, found):
        assert row == {name: value if isinstance(value, str) else pytest.approx(value, rel=1e-4)
                       for name, value in wanted.items()}
