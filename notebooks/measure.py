"""Evaluates a model on real images: reconstructions, codes in use, likelihood. Needs no other network.

    python notebooks/measure.py notebooks/cifar10.pt --data-dir DIR

Prints PSNR and, for each scale, the codes in use, their perplexity (the number of equally frequent codes with
the same entropy) and the negative log-likelihood in bits per token on equally many test and training images:
a gap between the two means that the transformer has overfitted. Bits per image are the sum over all tokens,
the cost of coding the tokens with the transformer as the probability model of an entropy coder. --npz writes
the reconstructions of the test images for judge.py, an upper bound for samples.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from judge import load_known, read_images                                 # noqa: E402
from sample import COUNT, Parser, check, run_command, save_npz, to_uint8    # noqa: E402
from train import to_float                                                  # noqa: E402


@torch.no_grad()
def measure(tokenizer, var, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 (N, 3, S, S) and labels -> reconstructions in [-1, 1], bits_L per token, code counts hits_KV."""
    V, lengths = tokenizer.config.vocab_size, tokenizer.scale_lengths
    bits_L, hits_KV, reconstructions = torch.zeros(sum(lengths)), torch.zeros(len(lengths), V), []
    for chosen in tqdm(torch.arange(len(images)).split(100), leave=False):
        batch = to_float(images[chosen])
        tokens_BL = tokenizer.encode(batch)
        reconstructions.append(tokenizer.decode(tokens_BL))
        logits_BLV = var(labels[chosen], tokenizer.teacher_inputs(tokens_BL))
        nats = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten(), reduction='none')
        bits_L += nats.view_as(tokens_BL).sum(0)
        hits_KV += torch.stack([maps.flatten().bincount(minlength=V) for maps in tokens_BL.split(lengths, 1)])
    return torch.cat(reconstructions), bits_L / len(images) / torch.tensor(2.0).log(), hits_KV


def psnr(reconstructions: Tensor, images: Tensor) -> float:
    """Peak signal-to-noise ratio (dB) of images in [-1, 1] against uint8 images, over all of them."""
    return -10 * (F.mse_loss(reconstructions, to_float(images)) / 4).log10().item()


def main(argv: list[str]):
    parser = Parser(prog='measure.py', description=__doc__)
    parser.add_argument('checkpoint', help='a var.pt')
    parser.add_argument('--data-dir', help='folder with CIFAR-10 [downloaded to data/]')
    parser.add_argument('--count', type=COUNT, default=10_000, help='images per split, at most [10000]')
    parser.add_argument('--npz', help='write the reconstructions of the test images here, for judge.py')
    args = parser.parse_args(argv)
    if args.npz:
        check(args.npz.endswith('.npz'), f'--npz {args.npz}: must end in .npz')
    name, tokenizer, var, _ = load_known(args.checkpoint)
    arrays = read_images(name, args.data_dir)
    N = min(args.count, len(arrays[2]))
    images, labels, test_images, test_labels = (array[:N] for array in arrays)
    drawn, train_bits_L, _ = measure(tokenizer, var, images, labels)
    test_drawn, bits_L, hits_KV = measure(tokenizer, var, test_images, test_labels)
    print('| scale | tokens | codes in use | perplexity | bits per token, test | training |')
    print('|---|---|---|---|---|---|')
    names = [f'{side}x{side}' for side in tokenizer.config.scales]
    parts = [bits.split(tokenizer.scale_lengths) for bits in (bits_L, train_bits_L)]
    rows = [*zip(names, hits_KV, *parts), ('all', hits_KV.sum(0), bits_L, train_bits_L)]
    for name, hits_V, bits, train_bits in rows:
        use, perplexity = (hits_V > 0).float().mean(), torch.special.entr(hits_V / hits_V.sum()).sum().exp()
        print(f'| {name} | {len(bits)} | {use:.1%} | {perplexity:.0f} | {bits.mean():.3f} | '
              f'{train_bits.mean():.3f} |')
    print(f'\n{N} test images: PSNR {psnr(test_drawn, test_images):.2f} dB, {bits_L.sum():.1f} bits per '
          f'image; as many training images: {psnr(drawn, images):.2f} dB, {train_bits_L.sum():.1f} bits')
    if args.npz:
        arrays = to_uint8(test_drawn).permute(0, 2, 3, 1).numpy()
        save_npz(Path(args.npz), arrays, tokenizer.config.image_size, test_labels.tolist(), var.class_names)


if __name__ == '__main__':
    run_command(main)
