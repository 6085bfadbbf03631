"""Kills a training run repeatedly at random, and compares its result with that of an uninterrupted run.

    python notebooks/many_kills.py                      # 20 kills in each of 4 runs; nine minutes
    python notebooks/many_kills.py --kills 100 --seed 7
"""
import argparse
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from test_processes import STOPPED, finish, run_with_kills, same_run, start, write_images   # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--kills', type=int, default=20)
parser.add_argument('--seed', type=int, default=0, help='for the times of the kills [0]')
args, failed = parser.parse_args(), False
with tempfile.TemporaryDirectory() as scratch:
    photos = write_images(Path(scratch, 'photos'), 80)
    for ranks in (0, 2):
        for kind, more in (('drawn', ''), ('folder', f'--data-dir {photos} --workers 2 ')):
            flags = STOPPED + '--vqvae-steps 160 --var-steps 160 --save-every-steps 2 ' + more
            calm, out = (Path(scratch, f'{name}-{ranks}-{kind}') for name in ('calm', 'run'))
            finish(start(flags, calm, ranks), calm)
            is_same = same_run(run_with_kills(flags, out, ranks, args.kills, args.seed), calm)
            failed |= not is_same
            end = 'bitwise identical' if is_same else 'DIFFERS'
            print(f'{ranks or 1} processes, {kind}, {args.kills} kills: {end}', flush=True)
sys.exit(failed)
