"""Generates images from a checkpoint, ours or the authors', edits photographs, and exports images and models.

    python sample.py out/shapes/var.pt                                                 # one of each class
    python sample.py out/shapes/var.pt --labels 3 star --count 16 --cfg 1.5 --top-k 900 --top-p 0.96 --seed 0
    python sample.py out/shapes/var.pt --show-scales --out scales.gif                  # coarse to fine
    python sample.py out/shapes/var.pt --image a.png --box 0.2 0.2 0.8 0.8 --count 4   # in-painting
    python sample.py --official d16 --labels 207 980                                   # the authors' weights
    torchrun --nproc-per-node 8 sample.py out/shapes/var.pt --npz samples.npz --count 50000
    >>> tokenizer, var, defaults = sample.load('out/shapes/var.pt')                    # from Python
    >>> images = var.generate(tokenizer, torch.tensor([0, 1, 2]), **defaults)          # in [-1, 1]

A var.pt contains both stages, configs, class names and sampling defaults. An image depends on it, flags, seed
and index; batch size, device and processes affect only rounding. Tensor names end in their shapes.
"""
import argparse
import ctypes
import json
import math
import os
import re
import sys
import time
import warnings
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict
from os.path import expanduser
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from var import VAR, VARConfig
from vqvae import VQVAE, VQVAEConfig


# ----------------------------------------------------------------------------------------------- checkpoints
def load(path: str | Path, device: str | torch.device = 'cpu') -> tuple[VQVAE, VAR, dict]:
    """A var.pt -> tokenizer, transformer (both frozen, on `device`), sampling defaults for `generate`. The
    class names are in var.class_names. Raises UserError or OSError if the file cannot be used."""
    with open_checkpoint(path, 'var') as checkpoint:
        tokenizer = build(VQVAE, VQVAEConfig(**checkpoint['vqvae_config']), checkpoint['vqvae'])
        var = build(VAR, VARConfig(**checkpoint['var_config']), checkpoint['var'])
        var.check_tokenizer(tokenizer)
        var.class_names, defaults = checkpoint['class_names'], checkpoint['defaults']
    return tokenizer.to(device), var.to(device), defaults


def build(model_class: type, config, weights: dict[str, Tensor]) -> torch.nn.Module:
    """A frozen model with these weights; bfloat16 weights are converted to float32."""
    with torch.device('meta'):                              # skips initialisation, which is slow
        model = model_class(config)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    return model.requires_grad_(False).eval()


def load_tokenizer(path: str | Path, scales: tuple[int, ...] | None = None) -> VQVAE:
    """The frozen tokenizer of a vqvae.pt, a var.pt or the authors' file (which doesn't store its scales)."""
    with open_checkpoint(path, 'vqvae', 'var', 'other') as checkpoint:
        if 'kind' in checkpoint:
            return build(VQVAE, VQVAEConfig(**checkpoint['vqvae_config']), checkpoint['vqvae'])
        check(scales, f"{path}: not written by train.py; if it is the authors', specify --scales")
        return VQVAE.from_official(checkpoint, scales).requires_grad_(False).eval()


RELEASED_URL = 'https://huggingface.co/FoundationVision/var/resolve/main'
RELEASED = dict.fromkeys(['d16', 'd20', 'd24', 'd30'], VARConfig().scales)      # scales: not in the files
RELEASED |= dict(d36=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32))


def load_official(name: str, folder: str | None = None, device='cpu') -> tuple[VQVAE, VAR, dict]:
    """Like `load`, for the authors' weights; class names are numbers. No folder: downloads them, once."""
    models = []
    for file, model_class in (('vae_ch160v4096z32.pth', VQVAE), (f'var_{name}.pth', VAR)):
        path, url = Path(folder or f'{torch.hub.get_dir()}/checkpoints', file), f'{RELEASED_URL}/{file}'
        if rank() == 0 and not (folder or path.exists()):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path))
            except Exception as error:                      # a download can fail in many ways
                raise UserError(f'{url}: cannot be downloaded ({one_line(error)}); try again, or download it '
                                'yourself and pass its folder as --weights-dir') from None
        wait_for_all()
        with open_checkpoint(path, 'other') as weights:
            models.append(model_class.from_official(weights, RELEASED[name]).requires_grad_(False).eval())
            if len(models) == 2:
                models[1].check_tokenizer(models[0])
    tokenizer, var = (model.to(device) for model in models)
    var.class_names = [str(label) for label in range(var.config.num_classes)]
    return tokenizer, var, dict(cfg=1.5, top_k=900, top_p=0.96)


def save_model(path: Path, tokenizer: VQVAE, var: VAR, class_names: list[str], defaults: dict,
               dtype: torch.dtype = torch.float32):
    """Writes a checkpoint for `load`. In bfloat16, weights take half the space."""
    weights = {name: {key: tensor.to('cpu', dtype) for key, tensor in module.state_dict().items()}
               for name, module in dict(vqvae=tokenizer, var=var).items()}
    save_checkpoint(path, 'var', vqvae_config=asdict(tokenizer.config), var_config=asdict(var.config),
                    class_names=class_names, defaults=defaults, **weights)


def save_checkpoint(path: Path, kind: str, **content):
    """Writes a checkpoint for `open_checkpoint`."""
    save_file(path, lambda file: torch.save(dict(kind=kind, **content), file))


# -------------------------------------------------------------------------------------------------- sampling
def noise_of_images(seed: int, first: int, count: int, *shape: int) -> Tensor:
    """Uniform noise in [0, 1), (count, *shape). Row i depends only on the seed and the index first + i."""
    rows = [np.random.Generator(np.random.Philox(key=[seed, first + i])).random(shape, dtype=np.float32)
            for i in range(count)]
    return torch.from_numpy(np.stack(rows))


def draw(tokenizer: VQVAE, var: VAR, labels: list[int], seed: int, batch_size: int, dtype='float32',
         firsts=None, **sampling):
    """Yields (images, tokens_BL) batch by batch, on the CPU: images (B, 3, H, W) in [-1, 1], one per label.
    firsts: index of the first image of each batch; None: all batches. sampling: options of `VAR.generate`."""
    device = var.position.device
    var.requires_grad_(True)        # autocast caches the casts only of weights that require grad
    for first in range(0, len(labels), batch_size) if firsts is None else firsts:
        labels_B = torch.tensor(labels[first:first + batch_size], device=device)
        noise_BL = noise_of_images(seed, first, len(labels_B), sum(var.config.lengths)).to(device)
        with autocast(device, dtype):
            images, tokens_BL = var.generate(tokenizer, labels_B, noise_BL=noise_BL, return_tokens=True,
                                             **sampling)
        yield images.cpu(), tokens_BL.cpu()


def after_each_pass(tokenizer: VQVAE, images: Tensor, tokens_BL: Tensor) -> Tensor:
    """Finished images (uint8, on the CPU) as they are after each pass: (B, passes, 3, H, W). In raster order,
    whose decoder needs all tokens, each pass instead uncovers its part of the finished image."""
    config, L = tokenizer.config, tokens_BL.shape[1]
    if len(config.scales) > 1:
        parts = [to_uint8(tokenizer.decode_f_hat(f_hat)).cpu() for f_hat in tokenizer.f_hats(tokens_BL)[:-1]]
    else:
        pass_HW = torch.arange(L).view(config.scales * 2).kron(torch.ones(config.stride, config.stride))
        parts = [images.where(pass_HW <= n, 192) for n in range(L - 1)]             # 192: grey
    return torch.stack([*parts, images], dim=1)


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0 .. 255, rounded; uint8 is returned unchanged."""
    is_done = images.dtype == torch.uint8
    return images if is_done else ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 -> [-1, 1]."""
    return images.float() / 127.5 - 1


def grid(images: Tensor, columns: int) -> Image.Image:
    """(N, 3, H, W), uint8 or in [-1, 1] -> one image, a grid filled row by row; small images are enlarged."""
    N, _, H, W = images.shape
    rows, zoom = math.ceil(N / columns), max(1, min(128 // H, 1400 // (columns * (W + 2))))
    sheet = np.full((rows * (H + 2) - 2, columns * (W + 2) - 2, 3), 255, np.uint8)
    for i, image in enumerate(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()):
        y, x = i // columns * (H + 2), i % columns * (W + 2)
        sheet[y:y + H, x:x + W] = image
    return Image.fromarray(sheet).resize((sheet.shape[1] * zoom, sheet.shape[0] * zoom), Image.NEAREST)


# ------------------------------------------------------------------------------------------- reading an image
Image.MAX_IMAGE_PIXELS = 2 ** 27            # Pillow's limit is twice this: 200-megapixel phone photos pass
warnings.filterwarnings('ignore', module='PIL')             # about unused metadata


def open_image(path: str | Path, enough: int | None = None) -> Image.Image:
    """An image file as a viewer shows it: its first frame, upright, 8 bits per channel, RGB or RGBA. A JPEG
    whose shorter side is several times `enough` pixels is decoded at 1/2, 1/4 or 1/8 of its size."""
    try:
        with open(path, 'rb') as file, Image.open(file) as image:       # by path, it garbles rotated TIFFs
            if enough:
                image.draft('RGB', (2 * enough, 2 * enough))            # 2x: LANCZOS does the final resize
            image.load()
        with suppress(Exception):                           # metadata can be damaged in many ways
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in 'IF':                           # greyscale of 16 bits or more
            if image.mode[:4] != 'I;16' and (image.mode != 'I' or image.format not in ('PNG', 'PPM')):
                raise ValueError('has 32 bits per channel; save it with 8 or 16')
            image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
        return image.convert('RGBA' if image.has_transparency_data else 'RGB')
    except Exception as error:                              # Pillow can fail in many ways
        is_heic = (isinstance(error, UnidentifiedImageError) and
                   re.match(b'....ftyp(hei|hev|mif|msf)', Path(path).read_bytes()[:12], re.DOTALL))
        reason = 'HEIC, which Pillow does not read; save it as JPEG or PNG' if is_heic else one_line(error)
        raise UserError(f'{path}: cannot be read as an image ({reason})') from None


def cut_square(image: Image.Image, size: int, shorter: int, noise=None) -> np.ndarray:
    """Resizes the shorter side to `shorter` and crops a square in one resize: uint8 (size, size, ...). noise:
    its vertical and horizontal position, in [0, 1); None: the centre. Transparent parts become white."""
    if image.mode == 'RGBA':
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
    w, h = image.size
    W, H = (shorter, int(shorter * h / w)) if w <= h else (int(shorter * w / h), shorter)
    x, y = round((W - size) / 2), round((H - size) / 2)
    if noise is not None:
        y, x = int(noise[0] * (H - size + 1)), int(noise[1] * (W - size + 1))
    box = (x * w / W, y * h / H, (x + size) * w / W, (y + size) * h / H)
    return np.asarray(image.resize((size, size), Image.LANCZOS, box=box))


# --------------------------------------------------------------------------------------------------- editing
class Edit:
    """The edit of --image. photo: uint8 (3, S, S), its central square. preview: the same, kept parts only.
    kept_1L: kept_BL of `VAR.generate`. opacity: float (S, S), of the generated image over the photo."""

    def __init__(self, args: argparse.Namespace, tokenizer: VQVAE):
        config, k = tokenizer.config, args.keep_scales or 0
        K, S = len(config.scales), config.image_size
        check(k < K, f'--keep-scales {k}: with {K} scales, at most {K - 1} can be kept')
        image = open_image(args.image)
        self.photo = torch.tensor(cut_square(image, S, S)).permute(2, 0, 1).contiguous()
        tokens_1L = tokenizer.encode(to_float(self.photo[None].to(tokenizer.codebook.weight.device)))
        region, self.opacity = torch.ones(S, S, dtype=torch.bool), torch.ones(S, S)
        if args.box or args.mask:
            region = find_region(args, config, image.size)
            self.preview = self.photo.masked_fill(region, 255)
        else:                                               # without a region, only scales are kept
            self.preview = to_uint8(tokenizer.decode_f_hat(tokenizer.f_hats(tokens_1L)[k - 1]))[0].cpu()
        self.kept_1L = tokenizer.keep(tokens_1L, ~region[None].to(tokens_1L.device))
        count = sum(tokenizer.scale_lengths[:k])
        self.kept_1L[:, :count] = tokens_1L[:, :count]
        if args.paste:          # the generated image fades out within half a latent around the region
            feather = max(1, config.stride // 4)
            window = dict(kernel_size=2 * feather + 1, stride=1, padding=feather)
            wider_1HW = F.max_pool2d(region[None].float(), **window)
            self.opacity = F.avg_pool2d(wider_1HW, **window, count_include_pad=False)
        if rank() == 0:
            print(f'{(self.kept_1L >= 0).sum()} of {tokens_1L.shape[1]} tokens kept from {args.image}')


def find_region(args: argparse.Namespace, config: VQVAEConfig, photo_size: tuple[int, int]) -> Tensor:
    """bool (S, S): the pixels to regenerate, from --box or --mask, and --outpaint."""
    S, latents = config.image_size, config.scales[-1]
    if args.box:
        said, hint = f'--box {args.box}', f'edges Y0 X0 Y1 X1 are rounded to a {latents}x{latents} grid'
        y0, x0, y1, x1 = (round(edge * latents) * config.stride for edge in args.box)       # as released
        region = torch.zeros(S, S, dtype=torch.bool)
        region[y0:y1, x0:x1] = True
    else:
        said, hint = f'--mask {args.mask}', 'mark the region with white paint or a transparent hole'
        mask = open_image(args.mask)
        check(mask.size == photo_size, f'{said}: size {mask.size} differs from the image size {photo_size}')
        pixels = np.asarray(mask.convert('RGBA'))
        marked, is_opaque = pixels[..., :3].mean(-1) > 127, pixels[..., 3] > 127
        if pixels[..., 3].min() < 255:                      # white paint on transparency, or a photo's hole
            marked = is_opaque if (pixels[is_opaque, :3] >= 250).all() else ~is_opaque
        region = torch.tensor(cut_square(Image.fromarray(marked).convert('L'), S, S) > 127)
    check(region.any(), f'{said}: marks nothing in the central square; {hint}')
    check(not region.all(), f'{said}: marks all of the central square; {hint}')
    return ~region if args.outpaint else region


# --------------------------------------------------------------------------------------------------- exports
def begin_export(folder: Path, made: dict):
    """Claims a folder for the images determined by `made`, the settings, or checks that it was claimed for
    them: after an interruption, the same command continues. An image gets its name only once complete."""
    note, text = folder / 'made.json', json.dumps(made)
    if not note.exists():
        check(not [*folder.glob('[0-9]' * 6 + '.png')], f'{folder}: holds images; empty it or choose another')
        save_file(note, lambda file: file.write(text.encode()))
    check(note.read_bytes() == text.encode(), f'{folder}: started with other settings (see made.json; now: '
          f'{text}); repeat that command, empty the folder or choose another')


def save_image(path: Path, *frames: Image.Image):
    """One image, or an animation: each frame lasts 0.25 s, the last one 2 s longer."""
    kind, options = Image.registered_extensions()[path.suffix.lower()], dict(compress_level=1, loop=0)
    if len(frames) > 1:         # one palette; the 256th colour marks what stays, which keeps files small
        colours_N3 = np.concatenate([np.asarray(frame)[::4, ::4].reshape(-1, 3) for frame in frames])
        palette = Image.fromarray(colours_N3[None, ::len(colours_N3) // 100_000 + 1]).quantize(255, kmeans=1)
        frames = [frame.quantize(palette=palette, dither=0) for frame in frames]
        options |= dict(save_all=True, append_images=frames[1:], duration=[250] * (len(frames) - 1) + [2250])
    save_file(path, lambda file: frames[0].save(file, kind, **options))


def save_npz(path: Path, images, size: int, labels: list[int], class_names: list[str]):
    """Writes arr_0, uint8 (N, size, size, 3), labels and class_names. images: N arrays, taken one by one."""
    def write(file):
        np.savez(file, labels=labels, class_names=class_names)
        header = dict(descr='|u1', fortran_order=False, shape=(len(labels), size, size, 3))
        with zipfile.ZipFile(file, 'a') as archive, archive.open('arr_0.npy', 'w', force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            for image in images:
                entry.write(image.tobytes())
    save_file(path, write)


# ---------------------------------------------------------------------------------------------- command line
SAMPLING = 'cfg', 'top_k', 'top_p'                          # flags with defaults in the checkpoint


def build_parser() -> 'Parser':
    parser = Parser(prog='sample.py', description=__doc__)
    add = parser.add_argument
    add('checkpoint', nargs='?', type=expanduser, help='a var.pt written by train.py')
    add('--official', choices=[*RELEASED], help="the authors' weights instead of a checkpoint")
    add('--weights-dir', type=expanduser, help="their folder; default: downloaded once to torch.hub's cache")
    add('--labels', nargs='+', help='class numbers or names; null: no class; default: all (edits: null)')
    add('--count', type=COUNT, help='total images, cycling over labels; default: one per label, 100 at most')
    add('--seed', type=ANY_COUNT, default=0, help='seed of the sampling noise [0]')
    add('--cfg', type=STRENGTH, help="guidance at the last scale; default: the checkpoint's")
    add('--top-k', type=ANY_COUNT, help="keep the k likeliest tokens, 0: all; default: the checkpoint's")
    add('--top-p', type=SHARE, help="keep the top probability mass p, 0 or 1: all; default: the checkpoint's")
    add('--batch-size', type=COUNT, default=50, help='images per batch in each process [50]')
    add('--device', default='auto', help='auto (a GPU if there is one), cpu, cuda, ...')
    add('--dtype', choices=DTYPES, default='auto', help='auto: bfloat16 if the GPU supports it, else float32')
    add('--image', type=expanduser, help='photograph to edit; its central square is used')
    add('--box', nargs=4, type=SHARE, help='region to regenerate: Y0 X0 Y1 X1, fractions, rounded to latents')
    add('--mask', type=expanduser, help="image of the photo's size, with the region white or transparent")
    add('--outpaint', action='store_true', help='regenerate everything outside the region instead')
    add('--keep-scales', type=COUNT, help='keep all tokens of the first k scales, with or without a region')
    add('--paste', action='store_true', help="restore the photograph's pixels outside the regenerated region")
    add('--out', type=expanduser, help='grid of all images; default: samples.png if there is no other output')
    add('--show-scales', action='store_true', help='in --out: a row per image, scale by scale; .gif: moving')
    add('--npz', type=expanduser, help='file: arr_0 (N, H, W, 3) uint8, labels (null: last + 1), class_names')
    add('--png-dir', type=expanduser, help='folder for 000000.png, 000001.png, ...; resumable, like --npz')
    add('--export', type=expanduser, help='write the model in bfloat16, with the sampling flags as defaults')
    return parser


def check_flags(args: argparse.Namespace):
    if not (args.out or args.npz or args.png_dir or args.export):
        args.out = 'samples.png'
    check(bool(args.checkpoint) != bool(args.official), 'specify a checkpoint (before --labels) or '
          '--official d16, not both')
    check(args.official or not args.weights_dir, '--weights-dir: needs --official')
    region = args.box or args.mask
    check(bool(args.image) == bool(region or args.keep_scales), '--image: requires --box, --mask or '
          '--keep-scales, and vice versa')
    check(region or not (args.outpaint or args.paste), '--outpaint, --paste: need --box or --mask')
    check(not (args.box and args.mask), '--box, --mask: use one or the other')
    check(not (args.out or '').lower().endswith('.gif') or args.show_scales and (args.count or 1) <= 100,
          f'--out {args.out}: a .gif needs --show-scales and has room for 100 images')
    check(not args.show_scales or args.out and not args.image, '--show-scales: needs --out without --image')
    draws = args.out or args.npz or args.png_dir or args.image or args.labels or args.count
    check(not args.export or not draws, '--export: writes the model, not images; omit the image flags')
    check(world_size() == 1 or not (args.out or args.export), 'under torchrun, use only --npz or --png-dir')
    sources = [Path(source).resolve() for source in (args.checkpoint, args.image, args.mask) if source]
    for said, target, endings in (('--out', args.out, '.png or .jpg or .gif'), ('--npz', args.npz, '.npz'),
                                  ('--export', args.export, '.pt')):
        ending = Path(target or '').suffix.lower()
        check(not target or ending in endings.split(' or '), f'{said} {target}: must end in {endings}')
        check(not target or Path(target).resolve() not in sources, f'{said} {target}: is also an input')


def parse_label(text: str, class_names: list[str]) -> int:
    """A class by name (any case), or by number (unless names are numbers); 'null' means no class."""
    names, word = [*(name.lower() for name in class_names), 'null'], text.lower()
    if word in names:
        return names.index(word)
    is_number = word.isdecimal() and int(word) < len(class_names) and not any(map(str.isdecimal, names))
    check(is_number, f"--labels {text}: no such class; classes, from 0: {', '.join(class_names)}"[:300])
    return int(word)


@torch.no_grad()
def main(argv: list[str]):
    start_processes()
    args = build_parser().parse_args(argv)
    check_flags(args)
    device = choose_device(args.device)
    tokenizer, var, sampling = (load_official(args.official, args.weights_dir, device) if args.official else
                                load(args.checkpoint, device))
    sampling |= {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    if args.export:
        save_model(Path(args.export), tokenizer, var, var.class_names, sampling, torch.bfloat16)
        return print(f'{args.export}: {Path(args.export).stat().st_size / 2 ** 20:.1f} MiB')
    classes = ([parse_label(text, var.class_names) for text in args.labels] if args.labels else
               [var.config.num_classes] if args.image else [*range(var.config.num_classes)])
    labels = [classes[i % len(classes)] for i in range(args.count or min(100, len(classes)))]
    edit = Edit(args, tokenizer) if args.image else None
    how = sampling | dict(seed=args.seed, batch_size=args.batch_size, dtype=choose_dtype(device, args.dtype))
    folder = Path(args.png_dir or f'{args.npz}.parts') if args.png_dir or args.npz else None
    if folder and rank() == 0:
        tensors = [torch.tensor(labels), *tokenizer.state_dict().values(), *var.state_dict().values()]
        tensors += [edit.photo, edit.kept_1L, edit.opacity] if edit else []
        checksum = sum(zlib.crc32(tensor.cpu().numpy()) for tensor in tensors)
        begin_export(folder, how | dict(count=len(labels), model_labels_edit=checksum))
    wait_for_all()
    paths = [folder / f'{i:06}.png' for i in range(len(labels))] if folder else []
    firsts = range(0, len(labels), args.batch_size)[rank()::world_size()]       # of this process's batches
    firsts = [i for i in firsts if args.out or not all(map(Path.exists, paths[i:i + args.batch_size]))]

    shown = [edit.photo[None], edit.preview[None]] if edit else []
    batches = draw(tokenizer, var, labels, firsts=firsts, kept_BL=edit and edit.kept_1L, **how)
    for first, (images, tokens_BL) in zip(tqdm(firsts, unit='batch', disable=rank() > 0), batches):
        images = to_uint8(images)
        if edit:                                            # --paste: the photo's own pixels where kept
            images = (edit.photo + (images - edit.photo.float()) * edit.opacity).round().to(torch.uint8)
        for path, image in zip(paths[first:], images.permute(0, 2, 3, 1).numpy()):
            if not path.exists():
                save_image(path, Image.fromarray(image))
        if args.show_scales:
            images = after_each_pass(tokenizer, images, tokens_BL.to(device))
        shown += [images] if args.out else []
    wait_for_all()                                          # until other processes have written their images
    if args.npz and rank() == 0:
        images = (np.asarray(Image.open(path)) for path in paths)
        save_npz(Path(args.npz), images, tokenizer.config.image_size, labels, var.class_names)
        if not args.png_dir:
            for file in (*paths, folder / 'made.json'):
                file.unlink()
            folder.rmdir()
    if args.out:
        shown, animated = torch.cat(shown), args.out.lower().endswith('.gif')
        columns = (shown.shape[1] if args.show_scales and not animated else 12 if edit else
                   len(classes) if 1 < len(classes) <= 20 else math.ceil(math.sqrt(len(shown))))
        frames = shown.unbind(1) if animated else [shown.flatten(0, -4)]
        save_image(Path(args.out), *(grid(frame, min(columns, len(frame))) for frame in frames))
    if rank() == 0:
        print(f"{len(labels)} images: {', '.join(filter(None, (args.npz, args.png_dir, args.out)))}")


# ------------------------------------------------------------------------ shared with train.py and notebooks/
class UserError(Exception):
    """An error that the user can fix. Its message is one line: what is wrong and how to fix it."""


def check(condition, message: str):
    if not condition:
        raise UserError(message)


def one_line(error: BaseException) -> str:
    return re.sub(r'\s+', ' ', str(error))[:200]


def is_out_of_memory(error: BaseException) -> bool:
    return bool(isinstance(error, MemoryError) or re.search('(allocate|out of|enough) memory', str(error)))


def run_command(main):
    """Runs main(argv). Errors that the user can fix become one line on stderr and exit status 2. When a
    process fails, torchrun terminates the others. Rank 0 reports such an error at once; any other failure is
    reported after 3 s, giving torchrun time to end this process if another one failed first."""
    with suppress(AttributeError):                          # names can have characters a terminal lacks
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        main(sys.argv[1:])
        wait_for_all()
        status = 0
    except (SystemExit, KeyboardInterrupt) as stop:
        status = getattr(stop, 'code', 130)
    except Exception as error:
        if world_size() > 1 and not (rank() == 0 and isinstance(error, (UserError, OSError))):
            time.sleep(3)
        if not (isinstance(error, (UserError, OSError, FloatingPointError)) or is_out_of_memory(error)):
            raise
        line = str(error) if isinstance(error, UserError) else one_line(error)
        if is_out_of_memory(error):
            line = ('out of memory; reduce --batch-size, or in training (also with '
                    f'--resume) --micro-batch-size ({line})')
        print(f"error: {f'rank {rank()}: ' * (rank() > 0)}{line}", file=sys.stderr, flush=True)
        status = 2
    sys.stdout.flush()
    if dist.is_initialized():
        os._exit(status)                    # a gloo thread that outlives the interpreter sometimes aborts
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors and without abbreviated flags."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        raise UserError(f'{message} (--help lists the flags)')


def number(kind: type, wanted: str, fits):
    """An argparse type: an int or a float that satisfies `fits`; otherwise the error states `wanted`."""
    def parse(text: str):
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f'{text}: must be {wanted}')
        return value
    parse.__name__ = kind.__name__                          # for argparse's own messages
    return parse


COUNT = number(int, '1 or more, and below 2^31', lambda n: 1 <= n < 2 ** 31)
ANY_COUNT = number(int, '0 or more, and below 2^31', lambda n: 0 <= n < 2 ** 31)
STRENGTH = number(float, '0 or more', lambda x: 0 <= x < math.inf)
SHARE = number(float, 'in [0, 1]', lambda x: 0 <= x <= 1)
DTYPES = ['auto', 'float32', 'bfloat16']


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def start_processes():
    """Under torchrun, joins the other processes. Each holds all weights and does its share of the work."""
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        dist.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo')


def wait_for_all():
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def choose_device(name: str) -> torch.device:
    """'auto' is the GPU if there is one; under torchrun, each process uses its own."""
    if name in ('auto', 'cuda') and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}" if dist.is_initialized() else 'cuda'
    name = 'cpu' if name == 'auto' else name
    try:
        (torch.ones(1, device=name) + 1).item()             # runs a kernel; an old GPU may not support it
    except Exception as error:                              # a missing driver or device can fail in many ways
        raise UserError(f'--device {name}: not usable on this machine ({one_line(error)}); --device cpu '
                        'always works') from None
    if name == 'cpu':           # else glibc returns big tensors to the OS; reallocation costs 1/5 of a step
        with suppress(OSError, AttributeError, TypeError):              # other systems
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)                                              # M_MMAP_MAX: no separate mappings
            mallopt(-1, -1)                                             # M_TRIM_THRESHOLD: keep freed memory
    return torch.device(name)


def choose_dtype(device: torch.device, dtype: str) -> str:
    """'auto' is bfloat16 on a GPU with hardware support, else float32 (few CPUs are fast at bfloat16)."""
    has_units = device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0)
    return dtype if dtype != 'auto' else 'bfloat16' if has_units else 'float32'


def autocast(device: torch.device, dtype: str):
    return torch.autocast(device.type, torch.bfloat16, choose_dtype(device, dtype) == 'bfloat16')


def save_file(path: Path, write):
    """Calls write(file) on path.tmp and renames it: all or nothing, even if power fails. Makes the folder."""
    temporary = path.with_name(path.name + '.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, 'w+b') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                # full disk: RuntimeError from torch.save
        raise UserError(f'{path}: cannot be written ({one_line(error)})') from None
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def open_checkpoint(path: str | Path, *kinds: str, mmap: bool = False):
    """Opens a checkpoint whose 'kind' is one of kinds ('other' if it has none). Errors in the `with` block
    are attributed to the file's content. mmap: tensors are read when they are used."""
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
        kind = checkpoint.get('kind', 'other')
        check(kind in kinds, f"{path}: a checkpoint of kind '{kind}', but '{kinds[0]}' is required")
        yield checkpoint
    except Exception as error:                              # torch.load fails in many ways on a corrupt file
        if isinstance(error, (UserError, OSError)) or is_out_of_memory(error):
            raise
        raise UserError(f'{path}: corrupt, or not the expected file; recreate it or download it again '
                        f'({one_line(error)})') from None


if __name__ == '__main__':
    run_command(main)
