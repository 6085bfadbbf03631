"""Cost of stage 2: parameters, FLOPs, memory and hours, from tensor shapes alone. Allocates no weights.

    python notebooks/costs.py --preset imagenet256 --depth 30
    python notebooks/costs.py --preset imagenet512 --gpus 64 --tflops 312 --mfu 0.3

Also takes train.py's flags. FLOPs and parameters follow from the architecture; memory is a formula for AdamW
with bfloat16 autocast; hours assume --mfu, the fraction of the peak that training reaches.
"""
import argparse
import math
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench import flops_of                                                  # noqa: E402
from sample import COUNT, Parser, number, run_command                       # noqa: E402
from train import POSITIVE, make, parse                                     # noqa: E402
from var import VAR, VARConfig                                              # noqa: E402
from vqvae import VQVAEConfig                                               # noqa: E402

ACTIVATION_BYTES = 51                   # kept for the backward pass, per token, block and unit of width
LOGIT_BYTES = 12                        # per token and code: logits, softmax and its gradient


def cost(args: argparse.Namespace, gpus: int = 8, tflops: float = 989.0, mfu: float = 0.4) -> dict:
    """Costs of a run with these settings: counts, FLOPs per image, bytes per GPU, hours."""
    with torch.device('meta'):
        var = VAR(make(VARConfig, args, num_classes=1000 if args.preset.startswith('imagenet') else 10))
    flops, L, D = flops_of(make(VQVAEConfig, args), var.config), sum(var.config.lengths), var.config.width
    training = flops['train'] + flops['encode']
    parameters = sum(parameter.numel() for parameter in var.parameters())
    share = math.ceil(args.batch_size / gpus)
    micro = min(args.micro_batch_size or share, share)
    weights = (4 + 4 + 8 + 2) * parameters      # value, gradient, AdamW's two moments; a bfloat16 copy
    activations = micro * L * (var.config.depth * ACTIVATION_BYTES * D + LOGIT_BYTES * var.config.vocab_size)
    hours = training * args.var_steps * args.batch_size / (gpus * tflops * 1e12 * mfu) / 3600
    return dict(model=f'{args.preset}, d{var.config.depth}', parameters=parameters, training=training,
                sampling=flops['sample'], memory=weights + activations, micro=micro, steps=args.var_steps,
                hours=hours)


def main(argv: list[str]):
    parser = Parser(prog='costs.py', description=__doc__)
    parser.add_argument('--gpus', type=COUNT, default=8)
    parser.add_argument('--tflops', type=POSITIVE, default=989.0, help='peak per GPU [989: H100, bfloat16]')
    parser.add_argument('--mfu', type=number(float, 'in (0, 1]', lambda x: 0 < x <= 1), default=0.4)
    own, flags = parser.parse_known_args(argv)
    row = cost(parse(flags)[0], own.gpus, own.tflops, own.mfu)
    cells = {'model': row['model'], 'parameters': f"{row['parameters']:,}",
             'GFLOPs per image, training': f"{row['training'] / 1e9:,.0f}",
             'sampling': f"{row['sampling'] / 1e9:,.0f}", 'GiB per GPU': f"{row['memory'] / 2 ** 30:.0f}",
             'micro-batch': row['micro'], 'steps': f"{row['steps']:,}",
             f'hours on {own.gpus} GPUs of {own.tflops:g} TFLOP/s at an assumed MFU of {own.mfu:g}':
             f"{row['hours']:,.0f}"}
    for line in (cells, ['---'] * len(cells), map(str, cells.values())):
        print(f"| {' | '.join(line)} |")


if __name__ == '__main__':
    run_command(main)
