"""Draws images from a checkpoint.

    python sample.py out/shapes/var.pt                                                 # one of each class
    python sample.py out/shapes/var.pt --labels 3 star --count 16 --cfg 1.5 --top-k 900 --top-p 0.96 --seed 0
    python sample.py out/shapes/var.pt --count 4 --show-scales --out scales.png        # coarse to fine
    python sample.py out/shapes/var.pt --npz samples.npz --count 50000                 # for an evaluator
    python sample.py out/shapes/var.pt --export small.pt           # the model in bfloat16, half the size

An image depends on the checkpoint, the flags, the seed and its own number, and not on batch size or device,
where only rounding may differ (so it is drawn in float32, unless --dtype says otherwise). From Python:

    tokenizer, var, defaults = sample.load('out/shapes/var.pt')
    images = var.generate(tokenizer, torch.tensor([0, 1, 2]), **defaults)           # (3, 3, H, W) in [-1, 1]

A checkpoint, var.pt, holds both stages, their configs, the class names and the sampling defaults: nothing
else is needed to draw. Shapes stand in the names of tensors as in vqvae.py and var.py.
"""
import argparse
import difflib
import math
import os
import re
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from var import VAR, VARConfig
from vqvae import VQVAE, VQVAEConfig


# -------------------------------------------------------------------------------------- errors of the user's
class UserError(Exception):
    """Something that the user can mend: one line says what was wrong and what would do."""


class TornError(UserError):
    """A checkpoint that is not whole."""


def did_you_mean(word: str, known) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f'; did you mean {close[0]}?' if close else ''


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and which takes no abbreviated flags."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        """argparse's complaint in our order: the flag, its value, what would do."""
        message, meant = re.sub(r'^argument (\S+): ', r'\1 ', message), ''
        if found := re.search(r"^(.*)invalid choice: '(.*)' \(choose from (.*)\)", message):
            message = f'{found[1]}{found[2]}: must be one of {found[3]}'
            meant = did_you_mean(found[2], re.findall(r'[\w-]+', found[3]))
        elif found := re.match(r'unrecognized arguments: (--\S+)', message):
            meant = did_you_mean(found[1], re.findall(r'--[\w-]+', self.format_usage()))
        raise UserError(f'{message}{meant} (--help lists the flags)')


def number(kind: type, wanted: str, fits):
    """An argparse type: an int or a float that fits; what is wanted, its error says."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f'{text}: must be {wanted}')
        return value
    parse.__name__ = kind.__name__                          # for --help
    return parse


COUNT = number(int, '1 or more', lambda n: n >= 1)
ANY_COUNT = number(int, '0 or more', lambda n: n >= 0)
STRENGTH = number(float, '0 or more', lambda x: 0 <= x < math.inf)
SHARE = number(float, 'in [0, 1]', lambda x: 0 <= x <= 1)
SAMPLING = dict(cfg=STRENGTH, top_k=ANY_COUNT, top_p=SHARE)     # what a checkpoint has defaults for


def run_command(main):
    """Runs main(argv); what the user can mend becomes one line on stderr and exit status 2."""
    try:
        main(sys.argv[1:])
    except (UserError, OSError, RuntimeError) as error:
        line = str(error) if isinstance(error, UserError) else one_line(error)
        if isinstance(error, torch.OutOfMemoryError):
            line = f'out of memory; take fewer images at once, by --batch-size or --micro-batch-size ({line})'
        elif isinstance(error, RuntimeError):               # a bug, unless another process is gone
            if not ('TORCHELASTIC_RUN_ID' in os.environ and re.search('gloo|nccl', line, re.I)):
                raise
            line = f'lost another process, which may have said why ({line})'
        rank = os.environ.get('RANK', '0')                  # set by torchrun, for train.py
        print(f"error: {'' if rank == '0' else f'rank {rank}: '}{line}", file=sys.stderr, flush=True)
        if 'TORCHELASTIC_RUN_ID' in os.environ:
            sys.stdout.flush()
            os._exit(2)                                     # at once, because the others wait for this one
        sys.exit(2)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)


def check(condition: bool, message: str):
    if not condition:
        raise UserError(message)


def flag(name: str) -> str:
    return '--' + name.replace('_', '-')


@contextmanager
def config_errors_as_flags():
    """A config's ValueError, 'field_name=value: why', as a UserError about the flag --field-name."""
    try:
        yield
    except ValueError as error:
        name, _, rest = str(error).partition('=')
        raise UserError(f'{flag(name)} {rest}') from None


def prepare_folder(folder: Path, flag: str):
    """Makes the folder that a flag named and makes sure that it can be written, before any work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f'{folder}: cannot be written ({error.strerror}); choose another {flag}') from None


# ------------------------------------------------------------------------------------------- device and type
def choose_device(name: str) -> torch.device:
    """'auto' is the GPU where there is one."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        check(re.fullmatch(r'cpu|mps|cuda(:\d+)?', name), 'unknown')
        torch.empty(0, device=name)
    except Exception:                                       # a missing driver or device fails in many ways
        raise UserError(f'--device {name}: not usable on this machine; cpu always is') from None
    return torch.device(name)


def autocast(device: torch.device, dtype: str):
    """The one autocast context. 'auto': bfloat16 on a GPU, float32 on a CPU (few are fast at bfloat16)."""
    if dtype == 'auto':
        dtype = 'bfloat16' if device.type == 'cuda' else 'float32'
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == 'bfloat16')


# ----------------------------------------------------------------------------------------------- checkpoints
MISFITS = (KeyError, TypeError, ValueError, RuntimeError, AttributeError)   # of what a checkpoint should hold


def save_file(path: Path, write, previous: Path | None = None):
    """write(file) into a temporary file beside path, which then takes path's place: whole or not at all.

    What stood at path is kept as `previous`, if that is named.
    """
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                # torch.save says RuntimeError of a full disk
        raise UserError(f'{path}: cannot be written ({one_line(error)})') from None
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, kind: str, previous: Path | None = None, **content):
    save_file(path, lambda file: torch.save(dict(kind=kind, **content), file), previous)


def read_checkpoint(path: str | Path, kinds: tuple[str, ...], mmap: bool = False) -> dict:
    """A checkpoint of one of these kinds: 'vqvae' (tokenizer), 'var' (both stages), 'resume', 'other'.

    mmap: tensors stay in the file until they are looked at.
    """
    check(Path(path).is_file(), f'{path}: no such file')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({one_line(error)})') from None
    except Exception as error:                              # torch.load fails in many ways on a torn file
        raise TornError(f'{path}: torn, or no checkpoint at all ({one_line(error)})') from None
    check(isinstance(checkpoint, dict), f'{path}: holds no checkpoint')
    kind = checkpoint.get('kind', 'other')
    check(kind in kinds, f"{path}: a checkpoint of kind '{kind}', but '{kinds[0]}' is needed here")
    return checkpoint


def build_tokenizer(checkpoint: dict, path: str | Path) -> VQVAE:
    """The tokenizer of a checkpoint of kind 'vqvae' or 'var', frozen."""
    try:
        tokenizer = VQVAE(VQVAEConfig(**checkpoint['vqvae_config']))
        tokenizer.load_state_dict(checkpoint['vqvae'])
    except MISFITS as error:
        raise UserError(f'{path}: its tokenizer does not fit its config ({one_line(error)})') from None
    return frozen(tokenizer, path)


def frozen(module: torch.nn.Module, path: str | Path) -> torch.nn.Module:
    """The module that a checkpoint held, to be used as it is."""
    for name, weight in module.state_dict().items():
        check(bool(weight.isfinite().all()), f'{path}: its {name} is not finite; a training that failed, or '
              'a damaged file: take an earlier one')
    return module.requires_grad_(False).eval()


def load_tokenizer(path: str | Path, scales: tuple[int, ...] | None) -> VQVAE:
    """The tokenizer in a vqvae.pt, a var.pt or the authors' release (which doesn't say its scales)."""
    checkpoint = read_checkpoint(path, ('vqvae', 'var', 'other'))
    if 'kind' in checkpoint:
        return build_tokenizer(checkpoint, path)
    check(scales is not None, f'{path}: not made by train.py; if it is the authors\', say its --scales')
    try:
        return frozen(VQVAE.from_official(checkpoint, scales), path)
    except MISFITS as error:
        raise UserError(f'{path}: {error}') from None


def one_line(error: Exception) -> str:
    return re.sub(r'\s+', ' ', str(error))[:160]


def load(path: str | Path, device: str | torch.device = 'cpu') -> tuple[VQVAE, VAR, dict]:
    """A var.pt -> tokenizer, transformer (both in eval mode on `device`), sampling defaults for `generate`.

    The class names are at var.class_names. Raises UserError where the file won't do.
    """
    checkpoint = read_checkpoint(path, ('var',))
    tokenizer = build_tokenizer(checkpoint, path)
    try:
        var = VAR(VARConfig(**checkpoint['var_config']))
        var.load_state_dict(checkpoint['var'])
        var.check_tokenizer(tokenizer)
        var.class_names, defaults = list(checkpoint['class_names']), dict(checkpoint['defaults'])
    except MISFITS as error:
        raise UserError(f'{path}: its transformer does not fit its config ({one_line(error)})') from None
    check(len(var.class_names) == var.config.num_classes and all(isinstance(c, str) for c in var.class_names),
          f'{path}: names {len(var.class_names)} classes, but the transformer knows {var.config.num_classes}')
    check(defaults.keys() == SAMPLING.keys(), f'{path}: needs sampling defaults for {", ".join(SAMPLING)}')
    for name, value in defaults.items():
        try:
            SAMPLING[name](str(value))
        except argparse.ArgumentTypeError as error:
            raise UserError(f'{path}: its sampling default {name} {error}') from None
    return tokenizer.to(device), frozen(var.to(device), path), defaults


def save_model(path: Path, tokenizer: VQVAE, var: VAR, class_names: list[str], defaults: dict,
               dtype: torch.dtype = torch.float32):
    """What `load` reads. Weights saved as bfloat16 take half the space, and are float32 again once loaded."""
    weights = {name: {key: tensor.to(dtype) for key, tensor in module.state_dict().items()}
               for name, module in dict(vqvae=tokenizer, var=var).items()}
    save_checkpoint(path, 'var', vqvae_config=asdict(tokenizer.config), var_config=asdict(var.config),
                    class_names=class_names, defaults=defaults, **weights)


# --------------------------------------------------------------------------------------------------- drawing
def noise_of_images(seed: int, first: int, count: int, length: int) -> Tensor:
    """noise_BL of images first, first + 1, ...: each row comes from (seed, number of the image) alone."""
    rows = [np.random.Generator(np.random.Philox(key=[seed, first + i])).random(length, dtype=np.float32)
            for i in range(count)]
    return torch.from_numpy(np.stack(rows))


def draw(tokenizer: VQVAE, var: VAR, labels: list[int], seed: int, batch_size: int, dtype='float32',
         **sampling):
    """Yields (images, tokens_BL) batch by batch: (B, 3, H, W) in [-1, 1], one per label, on the CPU."""
    device = var.position.device
    for first in range(0, len(labels), batch_size):
        labels_B = torch.tensor(labels[first:first + batch_size], device=device)
        noise_BL = noise_of_images(seed, first, len(labels_B), sum(var.config.lengths)).to(device)
        try:
            with autocast(device, dtype):
                images, tokens_BL = var.generate(tokenizer, labels_B, noise_BL=noise_BL, return_tokens=True,
                                                 **sampling)
        except ValueError as error:
            raise UserError(f'{error}; a lower --cfg or another checkpoint would do') from None
        yield images.cpu(), tokens_BL.cpu()


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0 .. 255, rounded; what is uint8 already stays as it is."""
    if images.dtype == torch.uint8:
        return images
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def grid(images: Tensor, columns: int) -> Image.Image:
    """(N, 3, H, W), uint8 or in [-1, 1] -> one image, row by row; small ones are enlarged."""
    N, _, H, W = images.shape
    rows, zoom = math.ceil(N / columns), max(1, 64 // H)
    sheet = np.full((rows * (H + 2) - 2, columns * (W + 2) - 2, 3), 255, np.uint8)
    for i, image in enumerate(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()):
        y, x = i // columns * (H + 2), i % columns * (W + 2)
        sheet[y:y + H, x:x + W] = image
    return Image.fromarray(sheet).resize((sheet.shape[1] * zoom, sheet.shape[0] * zoom), Image.NEAREST)


def read_image(path: str | Path, size: int, random: np.random.Generator | None = None) -> np.ndarray:
    """An image file as the released code crops it: uint8 (size, size, 3).

    Its shorter side would become 1.125 * size, of which a square is cut: at random, or in the centre. One
    resize of the box under that square gives the same pixels as resizing all of it, and a JPEG much larger
    than needed is decoded at a half, a quarter or an eighth of its size. Errors are Pillow's.
    """
    with Image.open(path) as image:
        shorter = round(1.125 * size)
        image.draft('RGB', (2 * shorter, 2 * shorter))    # twice: LANCZOS has the last word
        image = image.convert('RGB')
    w, h = image.size
    W, H = (shorter, int(shorter * h / w)) if w <= h else (int(shorter * w / h), shorter)
    if random is None:
        x, y = round((W - size) / 2), round((H - size) / 2)
    else:
        x, y = int(random.integers(W - size + 1)), int(random.integers(H - size + 1))
    box = (x * w / W, y * h / H, (x + size) * w / W, (y + size) * h / H)
    return np.asarray(image.resize((size, size), Image.LANCZOS, box=box))


IMAGE_FORMATS = {'.png': 'PNG', '.jpg': 'JPEG'}


def save_image(path: Path, image: Image.Image):
    save_file(path, lambda file: image.save(file, format=IMAGE_FORMATS[path.suffix.lower()]))


def save_npz(path: Path, images: np.ndarray, labels: list[int], class_names: list[str]):
    """What evaluators and notebooks/judge.py read: uint8 (N, H, W, 3), labels (N), names of the classes."""
    arrays = dict(arr_0=images, labels=np.array(labels), class_names=np.array(class_names))
    save_file(path, lambda file: np.savez(file, **arrays))


# ---------------------------------------------------------------------------------------------- command line
def parse_label(text: str, class_names: list[str]) -> int:
    """A class by its number or its name, in any case."""
    names = [name.lower() for name in class_names]
    if text.lower() in names:
        return names.index(text.lower())
    check(text.isdecimal() and int(text) < len(names), f'--labels {text}: no such class; there are '
          f"0 to {len(names) - 1}: {', '.join(class_names[:12])}{', ...' if len(names) > 12 else ''}"
          f'{did_you_mean(text.lower(), names)}')
    return int(text)


def build_parser() -> Parser:
    parser = Parser(prog='sample.py', description=__doc__)
    parser.add_argument('checkpoint', help='a var.pt that train.py wrote')
    parser.add_argument('--labels', nargs='+', help='classes by number or name; absent: every class')
    parser.add_argument('--count', type=COUNT, help='images in all, labels go round; absent: one per label')
    parser.add_argument('--cfg', type=STRENGTH, help="guidance at the last scale; absent: the checkpoint's")
    parser.add_argument('--top-k', type=ANY_COUNT, help="keep the k likeliest tokens, 0 all; likewise")
    parser.add_argument('--top-p', type=SHARE, help='keep the likeliest up to this mass, 0 or 1 all')
    parser.add_argument('--seed', type=number(int, 'in [0, 2^63)', lambda n: 0 <= n < 2 ** 63), default=0)
    parser.add_argument('--out', help='the image to write; absent: samples.png, if nothing else is written')
    parser.add_argument('--npz', help='write arr_0 (N, H, W, 3) uint8, labels (N), class_names to this file')
    parser.add_argument('--png-dir', help='write 000000.png, 000001.png, ... to this empty folder')
    parser.add_argument('--export', help='write the model here in bfloat16, sampling flags as defaults')
    parser.add_argument('--show-scales', action='store_true', help='one row per image, scale by scale')
    parser.add_argument('--batch-size', type=COUNT, default=50)
    parser.add_argument('--device', default='auto')
    parser.add_argument('--dtype', choices=['float32', 'bfloat16'], default='float32')
    return parser


def check_flags(args: argparse.Namespace):
    if not (args.out or args.npz or args.png_dir or args.export):
        args.out = 'samples.png'
    for name, path, endings in [('--out', args.out, tuple(IMAGE_FORMATS)), ('--npz', args.npz, ('.npz',)),
                                ('--export', args.export, ('.pt',))]:
        if path is not None:
            check(path.lower().endswith(endings), f"{name} {path}: must end in {' or '.join(endings)}")
            prepare_folder(Path(path).parent, name)
    if args.png_dir is not None:
        prepare_folder(Path(args.png_dir), '--png-dir')
        is_shared = os.listdir(Path(args.png_dir)) or args.out and Path(args.out).parent == Path(args.png_dir)
        check(not is_shared, f'--png-dir {args.png_dir}: not empty, or --out would lie there; an evaluator '
              'reads all that is there, so empty it or choose another')
    if args.export and Path(args.export).exists() and Path(args.checkpoint).exists():
        check(not os.path.samefile(args.export, args.checkpoint), f'--export {args.export}: is the '
              'checkpoint itself, which would lose its precision; choose another')


@torch.no_grad()
def main(argv: list[str]):
    args = build_parser().parse_args(argv)
    check_flags(args)
    tokenizer, var, sampling = load(args.checkpoint, choose_device(args.device))
    flags = dict(cfg=args.cfg, top_k=args.top_k, top_p=args.top_p)
    sampling |= {name: value for name, value in flags.items() if value is not None}
    if args.export:
        save_model(Path(args.export), tokenizer, var, var.class_names, sampling, torch.bfloat16)
        print(f'{args.export}: {Path(args.export).stat().st_size / 2 ** 20:.1f} MiB')
        if not (args.out or args.npz or args.png_dir):
            return
    classes = range(var.config.num_classes)
    if args.labels:
        classes = [parse_label(text, var.class_names) for text in args.labels]
    labels = [classes[i % len(classes)] for i in range(args.count or len(classes))]

    batches = draw(tokenizer, var, labels, args.seed, args.batch_size, args.dtype, **sampling)
    size, strips = tokenizer.config.image_size, []
    images = np.empty((len(labels), size, size, 3), np.uint8)
    with tqdm(total=len(labels), unit='image', disable=len(labels) <= args.batch_size) as bar:
        for images_B3HW, tokens_BL in batches:
            images[bar.n:bar.n + len(tokens_BL)] = to_uint8(images_B3HW).permute(0, 2, 3, 1)
            if args.show_scales:
                f_hats = tokenizer.f_hats(tokens_BL.to(var.position.device))
                steps = [to_uint8(tokenizer.decode_f_hat(f_hat)).cpu() for f_hat in f_hats]
                strips += torch.stack(steps, dim=1).flatten(0, 1)
            bar.update(len(tokens_BL))
    if args.npz:
        save_npz(Path(args.npz), images, labels, var.class_names)
        print(f'{args.npz}: {len(labels)} images')
    if args.png_dir:
        for i, image in enumerate(images):
            save_image(Path(args.png_dir, f'{i:06}.png'), Image.fromarray(image))
        print(f'{args.png_dir}: {len(labels)} images')
    if args.out:
        columns = len(classes) if 1 < len(classes) <= 20 else math.ceil(math.sqrt(len(labels)))
        columns = len(tokenizer.config.scales) if args.show_scales else min(columns, len(labels))
        images = torch.stack(strips) if strips else torch.from_numpy(images).permute(0, 3, 1, 2)
        save_image(Path(args.out), grid(images, columns))
        print(f'{args.out}: {len(labels)} images')


if __name__ == '__main__':
    run_command(main)
