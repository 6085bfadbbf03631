"""orders.py and `studies.py orders`: the twins differ only in what tokens of a scale know of each other,
samples follow the order of training, and the committed rows are those of the script."""
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import judge
import studies
from orders import ORDERS, ROWS, SETTINGS, Model, Order, fit, steps_of, train_flops
from var import VAR, draw_tokens
from vqvae import VQVAE, VQVAEConfig

ONE_BY_ONE = [name for name, order in ORDERS.items() if order.together != order.scales]


def model_of(name: str) -> tuple[Model, VQVAE, torch.Tensor]:
    """A model with weights that matter, a tokenizer, and random tokens of five images."""
    torch.manual_seed(0)
    model, tokenizer = Model(ORDERS[name], 256), VQVAE(VQVAEConfig(scales=ORDERS[name].scales))
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    tokens_BL = torch.randint(256, (5, sum(model.groups)))
    return model.requires_grad_(False), tokenizer.requires_grad_(False), tokens_BL


def logits_of(model: Model, tokenizer: VQVAE, tokens_BL: torch.Tensor) -> torch.Tensor:
    return model(torch.arange(5), model.teacher_inputs(tokenizer, tokens_BL))


@pytest.mark.parametrize('name', ['VAR', 'AR', 'plain AR', 'VAR, 7 scales'])
def test_next_scale_and_next_token_are_those_of_var(name):
    model, tokenizer, tokens_BL = model_of(name)
    original = VAR(model.config)
    original.load_state_dict(model.state_dict())
    assert model.mask_LL.equal(original.mask_LL)
    assert model.teacher_inputs(tokenizer, tokens_BL).equal(tokenizer.teacher_inputs(tokens_BL))
    labels_B, noise_BL = torch.arange(5), torch.rand(tokens_BL.shape)
    for cfg in (0.0, 3.0):                              # VAR's guidance is a ramp, AR's a constant
        expected = original.generate(tokenizer, labels_B, cfg, 0, 0.0, noise_BL, return_tokens=True)
        found = model.generate(tokenizer, labels_B, cfg, model.config.order == 'scale', noise_BL)
        assert found[1].equal(expected[1]) and torch.allclose(found[0], expected[0], atol=1e-5)


def test_the_twins_differ_only_in_what_tokens_of_a_scale_know_of_each_other():
    together, tokenizer, tokens_BL = model_of('VAR')
    alone, *_ = model_of('one by one')
    scale_L = together.scale_of_token_L
    is_same_scale = scale_L[:, None] == scale_L
    assert (together.mask_LL ^ alone.mask_LL).logical_and(~is_same_scale).sum() == 0
    assert alone.mask_LL.equal(torch.ones(85, 85).tril().bool())
    inputs_BLC, twice_BLC = (model.teacher_inputs(tokenizer, tokens_BL) for model in (together, alone))
    assert twice_BLC[..., :16].equal(inputs_BLC)
    starts = torch.tensor([1, 5, 21]) - 1
    assert not twice_BLC[:, starts, 16:].any()          # the first token of a scale has none before it
    followers = [i for i in range(84) if i not in starts]
    assert twice_BLC[:, followers, 16:].equal(tokenizer.codebook(tokens_BL)[:, followers])
    pairs = zip(together.state_dict().items(), alone.state_dict().items())
    assert [key for (key, a), (_, b) in pairs if a.shape != b.shape] == ['word_embedding.weight']


@pytest.mark.parametrize('name', ONE_BY_ONE)
def test_no_position_knows_its_token_or_a_later_one_and_each_knows_the_earlier_ones(name):
    model, tokenizer, tokens_BL = model_of(name)
    logits_BLV, ends = logits_of(model, tokenizer, tokens_BL), torch.tensor(model.groups).cumsum(0)
    for i in (0, 2, 7, 30, 60):
        changed_BL = tokens_BL.clone()
        changed_BL[:, i] = (changed_BL[:, i] + 1) % 256
        is_changed_L = (logits_of(model, tokenizer, changed_BL) != logits_BLV).any(-1).any(0)
        end = ends[ends > i][0]                         # of the group of token i
        assert not is_changed_L[:end].any() and is_changed_L[end:].all()


@pytest.mark.parametrize('name', ONE_BY_ONE)
def test_cached_sampling_draws_from_the_logits_of_one_masked_pass(name):
    model, tokenizer, tokens_BL = model_of(name)
    noise_BL, kept_BL = torch.rand(tokens_BL.shape), tokens_BL.where(torch.rand(tokens_BL.shape) < 0.2, -1)
    _, found_BL = model.generate(tokenizer, torch.arange(5), 0.0, True, noise_BL, kept_BL)
    drawn_BL = draw_tokens(logits_of(model, tokenizer, found_BL), noise_BL, 0, 0.0)
    assert found_BL.equal(torch.where(kept_BL < 0, drawn_BL, kept_BL))


def test_a_copy_is_known_to_the_next_token_alone_if_tokens_are_predicted_one_by_one():
    """All tokens of a scale are equal, and random: together, each costs ln 2; one by one, only the first."""
    torch.manual_seed(0)
    tokens_NL = torch.cat([torch.randint(2, (512, 1)).expand(-1, length) for length in (1, 4)], dim=1)
    tokenizer, nats = VQVAE(VQVAEConfig(scales=(1, 2), image_size=8)).requires_grad_(False), {}
    for inputs, together in (('f_hat', (1, 2)), ('both', ())):
        torch.manual_seed(0)
        model = Model(Order(inputs, together, (1, 2)), 256)
        fit(model, tokenizer, tokens_NL, torch.zeros(512, dtype=torch.int64), 60, 64, 0.01, 0, 'float32')
        with torch.no_grad():
            nats[inputs] = model.loss(tokenizer, tokens_NL, torch.zeros(512, dtype=torch.int64)) / 0.6931
    assert nats['f_hat'].tolist() == pytest.approx([1.0] * 5, abs=0.1)
    assert nats['both'].tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0, 0.0], abs=0.1)


def test_rows_of_equal_flops_take_equal_compute_and_the_orders_have_nearly_equal_parameters():
    def compute(row):
        return steps_of(row, 'shapes') * train_flops(Model(ORDERS[row.order], 256)) / row.multiple
    wanted = SETTINGS['shapes'].steps * train_flops(Model(ORDERS['VAR'], 256))
    rows = [row for row in ROWS['shapes'] if row.equal == 'flops']
    assert [compute(row) for row in rows] == pytest.approx([wanted] * len(rows), rel=0.003)
    sizes = {name: sum(weight.numel() for weight in Model(ORDERS[name], 256).parameters()) for name in ORDERS}
    sizes = [[size for name, size in sizes.items() if ('plain' in name) == is_plain] for is_plain in (0, 1)]
    assert all(max(group) < 1.03 * min(group) for group in sizes)


@pytest.mark.slow
def test_a_tiny_study_of_orders_runs_and_keeps_the_rows_it_has(tmp_path, monkeypatch):
    untrained = judge.Judge((16, 32, 64), False).eval()                 # training it would take a minute
    rows = [ROWS['shapes'][0], *(row for row in ROWS['shapes'] if row.rate is None and row.multiple == 1)][:4]
    rows = [row._replace(seeds=(0, 1) if row.order == 'VAR' and not row.rate else (0,)) for row in rows]
    for name, value in dict(ROWS=dict(shapes=rows), DRAWN=500, JUDGED=100, CHOSEN_ON=80,
                            load_judge=lambda *args: untrained).items():
        monkeypatch.setattr(studies, name, value)
    flags = ['--preset', 'shapes', '--share', '0.006', '--out', str(tmp_path), '--quiet']
    studies.main(['orders', *flags])
    path = tmp_path / 'shapes-0.006/orders-shapes.csv'
    found = studies.read_csv(path)
    searched, *judged = found
    assert searched['judged'] == 0 and searched['floors'] == ''
    expected = [('VAR', 4), ('VAR', 4), ('one by one', 85), ('AR', 64)]
    assert [(row['row'], row['passes']) for row in judged[::2]] == expected
    assert [row['seed'] for row in judged[::2]] == [0, 1, 0, 0]
    for plain, guided in zip(judged[::2], judged[1::2]):
        assert plain['cfg'] == 0 and (guided['cfg'], bool(guided['ramp'])) in studies.GUIDANCE
        assert min(plain[key] for key in ('floors', 'ceiling_floors', 'floors2')) > 0
        assert 0 <= plain['recall'] <= 1
        lengths = [(side, side * side) for side in ORDERS[plain['row']].scales]
        nats = sum(plain[f'loss_{side}x{side}'] * length for side, length in lengths)
        assert plain['nats'] == pytest.approx(nats, rel=1e-4)
    assert judged[1]['cfg'] == judged[3]['cfg']                         # chosen with the first seed
    assert Image.open(tmp_path / 'shapes-0.006/images/orders-shapes.png').width == 4 * (10 * 34 - 2)
    lines = path.read_text().splitlines()
    path.write_text('\n'.join([*lines[:2], *lines[4:]]))                # without the first judged model
    studies.main(['orders', *flags])
    again = studies.read_csv(path)
    assert again[:-2] == [searched, *judged[2:]]
    assert {key: again[-2][key] for key in judged[0] if 'seconds' not in key} == {
        key: value for key, value in judged[0].items() if 'seconds' not in key}


@pytest.mark.parametrize('preset', ROWS)
def test_committed_rows_are_those_of_the_script(preset):
    rows = studies.read_csv(HERE / f'orders-{preset}.csv')
    found = {(row['row'], row['equal'], float(row['rate']), row['steps'], row['seed']) for row in rows}
    asked = {(row.order, row.equal, row.rate or ORDERS[row.order].rate, steps_of(row, preset), seed)
             for row in ROWS[preset] for seed in row.seeds}
    assert found == asked
