"""Draws images from a checkpoint, ours or the authors', edits photographs with it, and exports.

    python sample.py out/shapes/var.pt                                                 # one of each class
    python sample.py out/shapes/var.pt --labels 3 star --count 16 --cfg 1.5 --top-k 900 --top-p 0.96 --seed 0
    python sample.py out/shapes/var.pt --count 4 --show-scales --out scales.png        # coarse to fine
    python sample.py out/shapes/var.pt --image a.png --box 0.2 0.2 0.8 0.8 --count 4   # in-painting
    python sample.py out/shapes/var.pt --image a.png --keep-scales 2 --count 4         # variations
    python sample.py --official d16 --labels 207 980                                   # the authors' weights
    torchrun --nproc-per-node 8 sample.py out/shapes/var.pt --npz samples.npz --count 50000
    python sample.py out/shapes/var.pt --export small.pt           # the model in bfloat16, half the size

An image depends on the checkpoint, the flags, the seed and its own number, and not on batch size, device or
number of processes, where only rounding may differ. From Python:

    tokenizer, var, defaults = sample.load('out/shapes/var.pt')
    images = var.generate(tokenizer, torch.tensor([0, 1, 2]), **defaults)           # (3, 3, H, W) in [-1, 1]

A checkpoint, var.pt, holds both stages, their configs, the class names and the sampling defaults: nothing
else is needed to draw. Shapes stand in the names of tensors as in vqvae.py and var.py.
"""
import argparse
import ctypes
import difflib
import functools
import http.client
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
import typing
import unicodedata
import uuid
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from var import VAR, VARConfig
from vqvae import VQVAE, VQVAEConfig


# -------------------------------------------------------------------------------------- errors of the user's
class UserError(Exception):
    """Something that the user can mend: one line says what was wrong and what would do."""


class TornError(UserError):
    """A checkpoint that is not whole."""


class Stop(SystemExit):
    """The end of a command before its work is done, in all processes alike."""


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


def number(kind: type, wanted: str, fits, most: int = 2 ** 31 - 1):
    """An argparse type: an int (not above `most`) or a float that fits; what is wanted, its error says."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if kind is int and abs(value) > most:
            raise argparse.ArgumentTypeError(f'{text}: must be {most} at most')
        if not fits(value):
            raise argparse.ArgumentTypeError(f'{text}: must be {wanted}')
        return value
    parse.__name__ = kind.__name__                          # for --help
    return parse


INTEGER = number(int, 'a whole number', lambda n: n == n)
COUNT = number(int, '1 or more', lambda n: n >= 1)
ANY_COUNT = number(int, '0 or more', lambda n: n >= 0)
STRENGTH = number(float, '0 or more', lambda x: 0 <= x < math.inf)
POSITIVE = number(float, 'above 0', lambda x: 0 < x < math.inf)
SHARE = number(float, 'in [0, 1]', lambda x: 0 <= x <= 1)
SAMPLING = dict(cfg=STRENGTH, top_k=ANY_COUNT, top_p=SHARE)     # what a checkpoint has defaults for


def keep_memory():
    """Freed memory stays with the process: else glibc gives large tensors back, and a fifth of a step on CPUs
    would go into taking them again, page by page. Other systems stay as they are."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(-4, 0)                                          # M_MMAP_MAX: no mappings of their own
    mallopt(-1, -1)                                         # M_TRIM_THRESHOLD: never


class Output:
    """stdout or stderr. Work goes on where nobody listens any more (a closed terminal, a pipe whose reader is
    gone, a full disk), and what the terminal's encoding lacks is escaped."""

    def __init__(self, stream):
        self.stream = getattr(stream, 'stream', stream) or open(os.devnull, 'w')        # None: closed by >&-
        if hasattr(self.stream, 'reconfigure'):
            self.stream.reconfigure(errors='backslashreplace')

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def attempt(self, act, *given):
        try:
            return act(*given)
        except BlockingIOError:                             # it is written later
            pass
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def write(self, text: str):
        return self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)


def bound_memory():
    """Lets too large a request fail, on Linux. It would be granted, and who uses it killed without a word."""
    try:
        import resource
        texts = {name: Path(f'/proc/{name}').read_text() for name in ('meminfo', 'self/status')}
        free, swap, used = (1024 * int(re.search(rf'{name}:\s+(\d+) kB', texts[file])[1]) for file, name in (
            ('meminfo', 'MemAvailable'), ('meminfo', 'SwapFree'), ('self/status', 'VmData')))
        limit, most = resource.getrlimit(resource.RLIMIT_DATA)
        allowed = min(limit_of_container(name) for name in ('memory.max', 'memory/memory.limit_in_bytes'))
        if limit == resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_DATA, (int(min(used + free + swap, allowed)), most))
    except (ImportError, AttributeError, OSError, TypeError, ValueError):               # other systems
        pass


def limit_of_container(name: str) -> float:
    """The first number in a file of cgroups, of version 2 or 1; infinite where there is none."""
    try:
        return float(Path('/sys/fs/cgroup', name).read_text().split()[0].replace('max', 'inf'))
    except (OSError, ValueError, IndexError):
        return math.inf


def run_command(main):
    """Runs main(argv); what the user can mend becomes one line on stderr and exit status 2."""
    sys.stdout, sys.stderr, status = Output(sys.stdout), Output(sys.stderr), 0
    try:
        try:
            main(sys.argv[1:])
        except Stop as stop:
            status = stop.code
        leave(status)
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        line = str(error) if isinstance(error, UserError) else one_line(error)
        if is_out_of_memory(error):
            line = ('out of memory; take fewer images at once, by --batch-size, or in training (and beside '
                    f'--resume) by --micro-batch-size or --activation-checkpointing ({line})')
        elif isinstance(error, RuntimeError):               # a bug, unless another process is gone
            is_lost = isinstance(error, dist.DistError) or re.search('gloo|nccl', line, re.I)
            if not ('TORCHELASTIC_RUN_ID' in os.environ and is_lost):
                raise
            line = f'lost another process, which may have said why ({line})'
        rank = os.environ.get('RANK', '0')                  # set by torchrun
        print(f"error: {'' if rank == '0' else f'rank {rank}: '}{line}", file=sys.stderr, flush=True)
        if 'TORCHELASTIC_RUN_ID' in os.environ:
            sys.stdout.flush()
            os._exit(2)                                     # at once, because the others wait for this one
        sys.exit(2)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)


def is_out_of_memory(error: Exception) -> bool:
    return (isinstance(error, (torch.OutOfMemoryError, MemoryError)) or
            bool(re.search('allocate memory|out of memory|not enough memory', str(error))))


def one_line(error: Exception) -> str:
    return re.sub(r'\s+', ' ', str(error))[:160]


def check(condition: bool, message: str):
    if not condition:
        raise UserError(message)


def plain(name: str) -> str:
    """A name of a file or an argument as it was meant: in locales other than UTF-8, too, and in one piece
    where Macs take letters apart."""
    return unicodedata.normalize('NFC', os.fsencode(name).decode('utf-8', 'surrogateescape'))


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


# ------------------------------------------------------------------------------------- processes and devices
def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def start_processes() -> str | None:
    """Under torchrun, joins the other processes. Each has all weights, and its share of each batch. Returns a
    name of this torchrun, which stays when it restarts them."""
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        return None
    stop_with_parent()
    backend = 'cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo'
    rank, count, port = (int(os.environ[name]) for name in ('RANK', 'WORLD_SIZE', 'MASTER_PORT'))
    launch, store, timeout = None, None, timedelta(minutes=30)
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        store = dist.TCPStore(os.environ['MASTER_ADDR'], port, timeout=timeout)
        launch = store.compare_set('launch', '', uuid.uuid4().hex).decode()
        store = dist.PrefixStore(name_of_start(store, rank, count), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
    return launch


def stop_with_parent():
    """On Linux, torchrun's end, by whatever signal, asks this process to stop: else it would go on alone."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)          # PR_SET_PDEATHSIG
    except (OSError, AttributeError, TypeError):
        pass


def name_of_start(store: dist.Store, rank: int, count: int) -> str:
    """A name that the processes which start now have in common, and none of those before them. For torchrun
    restarts them on a store that still says where those before could be found.

    Who starts writes a name of its own; rank 0 answers all names that it finds, until as many came to it."""
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f'rank {rank}', mine)
        name = store.get(f'answer to {mine}').decode()
        store.add(f'came to {name}', 1)
        return name
    began = time.monotonic()
    while store.add(f'came to {mine}', 0) < count - 1:
        if time.monotonic() - began > 10:
            print(f'waits for the other {count - 1} processes', file=sys.stderr, flush=True)
            began = math.inf
        for key in [f'rank {other}' for other in range(1, count)]:
            if store.check([key]):
                store.set(f'answer to {store.get(key).decode()}', mine)
        time.sleep(0.01)
    return mine


def leave(status: int):
    """Ends all together, when rank 0 has written everything: torchrun kills those that stay behind. And at
    once, since a thread of gloo that outlives the interpreter would now and then abort the process."""
    if dist.is_initialized():
        wait_for_all()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(status)
    if status:
        sys.exit(status)


@contextmanager
def rank_0_first():
    """For what would fail in all processes alike: rank 0 tries it first, and is the one that complains."""
    failed = torch.tensor(float(rank() == 0))
    if rank() > 0 and all_sum(failed):
        os._exit(2)
    try:
        yield
        failed.zero_()
    finally:
        if rank() == 0:
            all_sum(failed)


def all_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place, the same to the bit in each."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def wait_for_all():
    all_sum(torch.zeros(()))


def from_rank_0(value):
    """What rank 0 found, in all processes."""
    if dist.is_initialized():
        dist.broadcast_object_list(values := [value])
        return values[0]
    return value


def choose_device(name: str) -> torch.device:
    """'auto' is the GPU where there is one; of several, each process of torchrun takes its own."""
    if name in ('auto', 'cuda') and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}" if dist.is_initialized() else 'cuda'
    try:
        name = 'cpu' if name == 'auto' else name
        check(re.fullmatch(r'cpu|mps|cuda(:\d+)?', name), 'unknown')
        torch.empty(0, device=name)
    except Exception:                                       # a missing driver or device fails in many ways
        raise UserError(f'--device {name}: not usable on this machine; cpu always is') from None
    if name == 'cpu':
        keep_memory()
        bound_memory()
    return torch.device(name)


def choose_dtype(device: torch.device, dtype: str) -> str:
    """'auto' is bfloat16 on a GPU, float32 on a CPU (few are fast at bfloat16)."""
    if dtype == 'auto':
        return 'bfloat16' if device.type == 'cuda' else 'float32'
    return dtype


def autocast(device: torch.device, dtype: str):
    """The one autocast context."""
    is_low = choose_dtype(device, dtype) == 'bfloat16'
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_low)


# ----------------------------------------------------------------------------------------------- checkpoints
@contextmanager
def what_a_file_holds(complaint: str):
    """What fails in here, fails by the content of a file: an error of the user's, which begins like this."""
    try:
        yield
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError,
            argparse.ArgumentTypeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f'{complaint} ({one_line(error)})') from None


def save_file(path: Path, write, previous: Path | None = None, sync: bool = True):
    """write(file) into a temporary file beside path, which then takes path's place: whole or not at all.

    What stood at path is kept as `previous`, if that is named. sync: not even a power cut tears it.
    """
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            if sync:
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
        if is_out_of_memory(error):
            raise
        raise TornError(f'{path}: torn, or no checkpoint at all ({one_line(error)})') from None
    check(isinstance(checkpoint, dict), f'{path}: holds no checkpoint')
    kind = checkpoint.get('kind', 'other')
    check(kind in kinds, f"{path}: a checkpoint of kind '{kind}', but '{kinds[0]}' is needed here")
    return checkpoint


def build_tokenizer(checkpoint: dict, path: str | Path) -> VQVAE:
    """The tokenizer of a checkpoint of kind 'vqvae' or 'var', frozen."""
    with what_a_file_holds(f'{path}: its tokenizer does not fit its config'):
        with torch.device('meta'):                          # no initial values
            tokenizer = VQVAE(VQVAEConfig(**checkpoint['vqvae_config']))
        tokenizer.load_state_dict(as_float(checkpoint['vqvae']), assign=True)
    return frozen(tokenizer, path)


def as_float(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.float() for name, weight in weights.items()}


def frozen(module: torch.nn.Module, path: str | Path) -> torch.nn.Module:
    """The module that a checkpoint held, to be used as it is."""
    for name, weight in module.state_dict().items():
        with what_a_file_holds(f'{path}: its {name} will not do'):
            is_finite = weight.layout == torch.strided and bool(weight.isfinite().all())
        check(is_finite, f'{path}: its {name} is not finite; a training that failed, or '
              'a damaged file: take an earlier one')
    return module.requires_grad_(False).eval()


def load_tokenizer(path: str | Path, scales: tuple[int, ...] | None) -> VQVAE:
    """The tokenizer in a vqvae.pt, a var.pt or the authors' release (which doesn't say its scales)."""
    checkpoint = read_checkpoint(path, ('vqvae', 'var', 'other'))
    if 'kind' in checkpoint:
        return build_tokenizer(checkpoint, path)
    check(scales is not None, f'{path}: not made by train.py; if it is the authors\', say its --scales')
    with what_a_file_holds(f'{path}: will not do'):
        return frozen(VQVAE.from_official(checkpoint, scales), path)


def load(path: str | Path, device: str | torch.device = 'cpu') -> tuple[VQVAE, VAR, dict]:
    """A var.pt -> tokenizer, transformer (both in eval mode on `device`), sampling defaults for `generate`.

    The class names are at var.class_names. Raises UserError where the file won't do.
    """
    checkpoint = read_checkpoint(path, ('var',))
    tokenizer, defaults = build_tokenizer(checkpoint, path), {}
    with what_a_file_holds(f'{path}: its transformer does not fit its config'):
        with torch.device('meta'):
            var = VAR(VARConfig(**checkpoint['var_config']))
        var.load_state_dict(as_float(checkpoint['var']), assign=True)
        var.check_tokenizer(tokenizer)
        var.class_names = list(checkpoint['class_names'])
    for name, kind in SAMPLING.items():
        with what_a_file_holds(f'{path}: its sampling default {name} will not do'):
            defaults[name] = kind(str({**checkpoint['defaults']}[name]))
    check(checkpoint['defaults'].keys() == SAMPLING.keys(), f'{path}: has other sampling defaults than those '
          f'of {", ".join(SAMPLING)}')
    check(len(var.class_names) == var.config.num_classes and all(isinstance(c, str) for c in var.class_names),
          f'{path}: names {len(var.class_names)} classes, but the transformer knows {var.config.num_classes}')
    return tokenizer.to(device), frozen(var.to(device), path), defaults


RELEASED_URL = 'https://huggingface.co/FoundationVision/var/resolve/main'
RELEASED = dict.fromkeys(['d16', 'd20', 'd24', 'd30'], VARConfig().scales)      # scales: files don't say them
RELEASED |= dict(d36=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32))


def load_official(name: str, folder: str | None, device: str | torch.device) -> tuple[VQVAE, VAR, dict]:
    """What `load` returns, of the authors' weights 'd16', ..., 'd36', which know classes by number.

    They are taken from the folder, or without one from torch.hub's cache, where they are downloaded once.
    """
    models = []
    for file, kind in (('vae_ch160v4096z32.pth', VQVAE), (f'var_{name}.pth', VAR)):
        path, url = Path(folder or f'{torch.hub.get_dir()}/checkpoints', file), f'{RELEASED_URL}/{file}'
        try:
            if folder is None and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path))
            weights = read_checkpoint(path, ('other',))
        except TornError as error:
            raise UserError(f'{error}; delete it and download it again') from None
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f'{url}: cannot be downloaded ({one_line(error)}); try again, or download {file} '
                            'yourself and name its folder with --weights-dir') from None
        with what_a_file_holds(f'{path}: will not do'):
            models.append(frozen(kind.from_official(weights, RELEASED[name]), path).to(device))
    tokenizer, var = models
    check(f'd{var.config.depth}' == name, f'{path}: has depth {var.config.depth}; say --official '
          f'd{var.config.depth} and give the file the name it was released by')
    with what_a_file_holds(f'{path}: does not go with that tokenizer'):
        var.check_tokenizer(tokenizer)
    var.class_names = [str(label) for label in range(var.config.num_classes)]
    return tokenizer, var, dict(cfg=1.5, top_k=900, top_p=0.96)


def save_model(path: Path, tokenizer: VQVAE, var: VAR, class_names: list[str], defaults: dict,
               dtype: torch.dtype = torch.float32):
    """What `load` reads, on any device. Weights saved as bfloat16 take half the space, and are float32 again
    once loaded."""
    weights = {name: {key: tensor.to('cpu', dtype) for key, tensor in module.state_dict().items()}
               for name, module in dict(vqvae=tokenizer, var=var).items()}
    save_checkpoint(path, 'var', vqvae_config=asdict(tokenizer.config), var_config=asdict(var.config),
                    class_names=class_names, defaults=defaults, **weights)


# --------------------------------------------------------------------------------------------------- drawing
def noise_of_images(seed: int, first: int, count: int, *shape: int) -> Tensor:
    """Uniform in [0, 1), (count, *shape), for images first, first + 1, ...: each row comes from (seed, number
    of the image) alone."""
    rows = [np.random.Generator(np.random.Philox(key=[seed, first + i])).random(shape, dtype=np.float32)
            for i in range(count)]
    return torch.from_numpy(np.stack(rows))


def draw(tokenizer: VQVAE, var: VAR, labels: list[int], seed: int, batch_size: int, dtype='float32',
         firsts=None, smooth: bool = False, **sampling):
    """Yields (images, tokens_BL) batch by batch: (B, 3, H, W) in [-1, 1], one per label, on the CPU. The
    weights of var may learn afterwards, even if they were frozen.

    firsts: the images that the batches to draw begin with; absent: all. sampling: options of `VAR.generate`.
    """
    device = var.position.device
    var.requires_grad_(True)            # autocast keeps what it casts of such weights alone, for a whole call
    for first in range(0, len(labels), batch_size) if firsts is None else firsts:
        labels_B = torch.tensor(labels[first:first + batch_size], device=device)
        shape = seed, first, len(labels_B), sum(var.config.lengths)
        sampling['noise_BL'] = noise_of_images(*shape).to(device)
        if smooth:
            uniform = noise_of_images(*shape, var.config.vocab_size).clamp_min(2 ** -25)    # log(0) is -inf
            sampling['gumbel_BLV'] = -(-uniform.log()).log().to(device)
        try:
            with autocast(device, dtype):
                images, tokens_BL = var.generate(tokenizer, labels_B, return_tokens=True, **sampling)
        except ValueError as error:
            raise UserError(f'{error}; a lower --cfg, a higher --temperature or another checkpoint would '
                            'do') from None
        yield images.cpu(), tokens_BL.cpu()


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0 .. 255, rounded; what is uint8 already stays as it is."""
    if images.dtype == torch.uint8:
        return images
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 -> [-1, 1]."""
    return images.float() / 127.5 - 1


def grid(images: Tensor, columns: int) -> Image.Image:
    """(N, 3, H, W), uint8 or in [-1, 1] -> one image, row by row; small ones are enlarged."""
    N, _, H, W = images.shape
    rows, zoom = math.ceil(N / columns), max(1, 64 // H)
    sheet = np.full((rows * (H + 2) - 2, columns * (W + 2) - 2, 3), 255, np.uint8)
    for i, image in enumerate(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()):
        y, x = i // columns * (H + 2), i % columns * (W + 2)
        sheet[y:y + H, x:x + W] = image
    return Image.fromarray(sheet).resize((sheet.shape[1] * zoom, sheet.shape[0] * zoom), Image.NEAREST)


# Pillow refuses what every viewer opens: 200 megapixels of a telephone, a PNG with a megabyte of text. Here
# 268 megapixels and 64 megabytes will do. And warnings of metadata that nobody looks at are left out.
Image.MAX_IMAGE_PIXELS = 2 ** 27                            # refused where there are twice as many
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 26
warnings.filterwarnings('ignore', module='PIL')


def read_image(path: str | Path, size: int, random: np.random.Generator | None = None,
               shorter: int | None = None, ground: str = 'white') -> np.ndarray:
    """An image file as the released code crops it: uint8 (size, size, 3).

    Its shorter side would become `shorter` (absent: 1.125 * size), of which a square is cut: at random, or in
    the centre. One resize of the box under that square gives the same pixels as resizing all of it, and a
    JPEG much larger than needed is decoded at a half, a quarter or an eighth of its size. Errors: Pillow's.
    ground: a colour, seen where the image is transparent.
    """
    shorter = shorter or round(1.125 * size)
    with open(path, 'rb') as file, Image.open(file) as image:   # by a path, turned TIFFs would be garbled
        image.draft('RGB', (2 * shorter, 2 * shorter))    # twice: LANCZOS has the last word
        image = as_seen(image, ground)
    w, h = image.size
    W, H = (shorter, int(shorter * h / w)) if w <= h else (int(shorter * w / h), shorter)
    if random is None:
        x, y = round((W - size) / 2), round((H - size) / 2)
    else:
        x, y = int(random.integers(W - size + 1)), int(random.integers(H - size + 1))
    box = (x * w / W, y * h / H, (x + size) * w / W, (y + size) * h / H)
    return np.asarray(image.resize((size, size), Image.LANCZOS, box=box))


def as_seen(image: Image.Image, ground: str) -> Image.Image:
    """In RGB, as a viewer shows it: turned upright, in 8 bits a channel, on a ground where transparent."""
    image.load()
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:                                       # metadata may be damaged in many ways
        pass
    if image.mode[0] in 'IF':
        image = in_8_bits(image)
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, ground), image)
    return image.convert('RGB')


def in_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits a pixel or more. Files of 32 bits or of floating point don't say what is white: it is
    the least of 1, 255 and 65535 of which no pixel is four times as bright, or else the brightest pixel."""
    pixels, tags = np.asarray(image), getattr(image, 'tag_v2', {})
    if image.mode == 'I' and tags.get(SAMPLEFORMAT, (1,))[0] == 1:
        pixels = pixels.view(np.uint32)                     # unsigned, which Pillow doesn't know
    pixels = np.nan_to_num(pixels.astype(np.float32), posinf=0, neginf=0)
    is_16_bit = image.mode[:4] == 'I;16' or image.mode == 'I' and image.format in ('PNG', 'PPM')
    white = next((w for w in (1, 255, 65535) if pixels.max() <= 4 * w), pixels.max())
    white = 65535 if is_16_bit else white
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:           # 0 is white
        pixels = white - pixels
    grey = Image.fromarray(np.rint(255 * (pixels / white).clip(0, 1)).astype(np.uint8))
    if 'transparency' in image.info:                        # the grey that is
        grey.putalpha(Image.fromarray(255 * (pixels != image.info['transparency']).astype(np.uint8)))
    return grey


IMAGE_FORMATS = {'.png': 'PNG', '.jpg': 'JPEG'}


def save_image(path: Path, image: Image.Image, sync: bool = True, **options):
    save_file(path, lambda file: image.save(file, IMAGE_FORMATS[path.suffix.lower()], **options), sync=sync)


def save_npz(path: Path, images, labels: list[int], class_names: list[str]):
    """What evaluators and notebooks/judge.py read: arr_0 uint8 (N, H, W, 3), labels (N), class_names.
    images: an iterable of N arrays (H, W, 3), which need not be in memory together."""
    def write(file):
        header = dict(descr='|u1', fortran_order=False)
        with zipfile.ZipFile(file, 'w') as archive:
            with archive.open('arr_0.npy', 'w', force_zip64=True) as entry:
                for i, image in enumerate(images):
                    if i == 0:
                        header['shape'] = (len(labels), *image.shape)
                        np.lib.format.write_array_header_1_0(entry, header)
                    entry.write(image.tobytes())
            for name, values in dict(labels=labels, class_names=class_names).items():
                with archive.open(f'{name}.npy', 'w') as entry:
                    np.lib.format.write_array(entry, np.array(values))
    save_file(path, write)


# --------------------------------------------------------------------------------------------------- editing
def read_photograph(said: str, path: str, side: int, ground='white') -> tuple[Tensor, tuple[int, int]]:
    """The central square of an image of any kind, uint8 (3, side, side); the image's own (width, height)."""
    try:
        with open(path, 'rb') as file, Image.open(file) as image:
            frames, size = getattr(image, 'n_frames', 1), as_seen(image, ground).size
        pixels = read_image(path, side, shorter=side, ground=ground)
    except Exception as error:                              # Pillow fails in many ways
        raise UserError(f'{said}: cannot be read as an image ({one_line(error)})') from None
    if rank() == 0 and frames > 1:
        print(f'{path}: the first of its {frames} frames is taken')
    return torch.tensor(pixels).permute(2, 0, 1).contiguous(), size


def find_region(args: argparse.Namespace, config: VQVAEConfig, photo_size: tuple[int, int]) -> Tensor:
    """bool (S, S): the pixels that --box or --mask, and --outpaint, ask to draw anew."""
    S, latents = config.image_size, config.scales[-1]
    if args.box:
        said, region = f'--box {" ".join(map(str, args.box))}', torch.zeros(S, S, dtype=torch.bool)
        y0, x0, y1, x1 = (round(edge * latents) * config.stride for edge in args.box)       # as released
        region[y0:y1, x0:x1] = True
        where = f'the image, rounded to its {latents}x{latents} latents'
    else:
        said, where = f'--mask {args.mask}', f'the central square, at {S}x{S}, by white (above 127 of 255)'
        mask, size = read_photograph(said, args.mask, S, ground='black')        # white paint on nothing, too
        check(size in (photo_size, (S, S)), f'{said}: is {size[0]}x{size[1]}, but the image is '
              f'{photo_size[0]}x{photo_size[1]}; make it as large, or {S}x{S} for its central square')
        region = mask.float().mean(0) > 127
    check(region.any(), f'{said}: marks nothing of {where}; mark more')
    check(not region.all(), f'{said}: marks all of {where}; leave some of it, or omit --image')
    return ~region if args.outpaint else region


class Edit:
    """What --image and the flags beside it ask for.

    photo: uint8 (3, S, S). kept_1L: as kept_BL of `VAR.generate`. region: bool (S, S), pixels that are drawn
    anew. opacity: float (S, S), of what is drawn over the photo. preview: uint8 (3, S, S), what is kept.
    """

    def __init__(self, args: argparse.Namespace, tokenizer: VQVAE):
        K, k, S = len(tokenizer.config.scales), args.keep_scales or 0, tokenizer.config.image_size
        check(k < K, f'--keep-scales {k}: of {K} scales, {K - 1} can be kept at most')
        self.photo, size = read_photograph(f'--image {args.image}', args.image, S)
        tokens_1L = tokenizer.encode(to_float(self.photo[None].to(tokenizer.codebook.weight.device)))
        self.region, self.opacity = torch.ones(S, S, dtype=torch.bool), torch.ones(S, S)
        if args.box or args.mask:
            self.region = find_region(args, tokenizer.config, size)
            self.preview = self.photo.masked_fill(self.region, 255)
        else:
            partial = tokenizer.f_hats(tokens_1L)[k - 1]            # without a region, some scales are kept
            self.preview = to_uint8(tokenizer.decode_f_hat(partial))[0].cpu()
        self.kept_1L = tokenizer.keep(tokens_1L, ~self.region[None].to(tokens_1L.device))
        count = sum(tokenizer.scale_lengths[:k])
        self.kept_1L[:, :count] = tokens_1L[:, :count]
        if args.paste:                      # what is drawn fades out within half a latent around the region:
            feather = max(1, tokenizer.config.stride // 4)          # wider by a quarter, smoothed by another
            window = dict(kernel_size=2 * feather + 1, stride=1, padding=feather)
            wider_1HW = F.max_pool2d(self.region[None].float(), **window)
            self.opacity = F.avg_pool2d(wider_1HW, **window, count_include_pad=False)
        if rank() == 0:
            cut = f', of whose {size[0]}x{size[1]} the central square is taken' if size != (S, S) else ''
            print(f'{(self.kept_1L >= 0).sum()} of {tokens_1L.shape[1]} tokens are kept of {args.image}{cut}')

    def finish(self, images_B3HW: Tensor) -> Tensor:
        """Drawn images, uint8, with the photo's own pixels where --paste puts them back."""
        return (self.photo + (images_B3HW - self.photo.float()) * self.opacity).round().to(torch.uint8)


# --------------------------------------------------------------------------------------------------- exports
class Folder:
    """PNGs for --png-dir, or to become --npz, written by the processes that draw them, as they are drawn.

    Until all are there, made.txt says how they are made: so after a stop the same command goes on, and never
    with images of another kind. (In batches of the same size, because rounding may differ in others.)
    """

    def __init__(self, args: argparse.Namespace, count: int):
        self.npz, self.png_dir, self.batch_size = args.npz, args.png_dir, args.batch_size
        self.path = Path(args.png_dir or f'{args.npz}.parts')
        self.images, self.note = [self.path / f'{i:06}.png' for i in range(count)], self.path / 'made.txt'

    def begin(self, made: dict) -> list[int]:
        """Which batches are lacking, by their first images. made: all that the images depend on."""
        flag, said = ('--png-dir', '') if self.png_dir else ('--npz', f'{self.npz}: ')
        said = f'{flag} {said}{self.path}'
        prepare_folder(self.path, flag)
        if found := {path for path in self.path.iterdir() if path.suffix != '.tmp'}:
            check(self.note in found, f'{said}: holds a finished export, or other files; empty it or choose '
                  'another')
            others = differing(self.note, made)
            others += sorted(path.name for path in found - {self.note, *self.images})
            check(not others, f'{said}: begun with another {", ".join(others[:5])}; repeat the command '
                  'that began it, empty it or choose another')
        write_note(self.note, made)
        return [first for first in range(0, len(self.images), self.batch_size)
                if not all(map(is_whole, self.images[first:first + self.batch_size]))]

    def write(self, first: int, images: np.ndarray):
        """A batch, uint8 (B, H, W, 3). No image waits for the disk."""
        for path, image in zip(self.images[first:], images):
            save_image(path, Image.fromarray(image), sync=False, compress_level=1)

    def finish(self, labels: list[int], class_names: list[str]):
        if self.npz:
            images = (np.asarray(Image.open(path)) for path in self.images)
            save_npz(Path(self.npz), images, labels, class_names)
        self.note.unlink()
        if not self.png_dir:
            shutil.rmtree(self.path)


def write_note(path: Path, made: dict):
    """What lies beside it depends on this: a line for each name and value."""
    save_file(path, lambda file: file.write('\n'.join(f'{name} {made[name]}' for name in made).encode()))


def differing(note: Path, made: dict) -> list[str]:
    """By which names a note says something else."""
    lines = {f'{name} {value}' for name, value in made.items()}
    return sorted({line.split()[0] for line in lines ^ {*note.read_text('utf-8').splitlines()}})


def fingerprint(tensors: list[Tensor]) -> int:
    return functools.reduce(lambda crc, tensor: zlib.crc32(tensor.cpu().numpy(), crc), tensors, 0)


def is_whole(path: Path) -> bool:
    """Whether it ends as a PNG does: a power cut may tear what was written last."""
    try:
        with open(path, 'rb') as file:
            file.seek(-8, os.SEEK_END)
            return file.read(4) == b'IEND'
    except OSError:                                         # not there, or shorter
        return False


# ----------------------------------------------------------------------------------------------------- speed
def check_compiler(device: torch.device):
    """Complains early where --compile would fail late."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2, device=device))
    except Exception as error:                              # in many ways
        raise UserError('--compile: torch.compile finds no working compiler (g++, or Triton on a GPU); '
                        f'install one, or omit the flag ({one_line(error)})') from None


def flops_of(tokenizer_config: VQVAEConfig, var_config: VARConfig) -> dict[str, int]:
    """FLOPs of one image, a multiplication and an addition being two: 'encode', 'decode', 'train' (the
    transformer forwards and backwards, on tokens), 'sample' (guided, decoding included) and 'unguided'."""
    D, V, C, lengths = var_config.width, var_config.vocab_size, var_config.z_channels, var_config.lengths
    L, depth, projections = sum(lengths), var_config.depth, 1 if var_config.shared_adaln else var_config.depth
    adaln = (12 * projections + 4) * D * D if var_config.adaln else 0
    seen = sum(length * sum(lengths[:k + 1]) for k, length in enumerate(lengths))
    # a place: q, k, v, proj 8 D^2, MLP 16 D^2, head 2 D V; a pair of places, in a block: 4 D; a class: AdaLN
    forward, drawn = ((24 * depth * D * D + 2 * D * V) * L + 4 * D * depth * pairs + adaln
                      for pairs in (L * L, seen))
    words = 2 * C * D * (L - 1)
    with torch.device('meta'), torch.no_grad():
        tokenizer, S = VQVAE(tokenizer_config), tokenizer_config.image_size
        with FlopCounterMode(display=False) as encoder:
            f = tokenizer.features(torch.empty(1, 3, S, S))
        with FlopCounterMode(display=False) as decoder:
            tokenizer.decode_f_hat(f)
    decode = decoder.get_total_flops()
    return dict(encode=encoder.get_total_flops(), decode=decode, train=3 * (forward + words),
                sample=2 * drawn + words + decode, unguided=drawn + words // 2 + decode)


def seconds_of(run, device: torch.device, runs: int = 7) -> float:
    """The median of some runs, after some to warm up."""
    def clock() -> float:
        began = time.perf_counter()
        run()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        return time.perf_counter() - began
    return statistics.median([clock() for _ in range(runs + 3)][3:])


def peak_memory(device: torch.device) -> int | None:
    """Bytes; None on Windows, whose processes don't say."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == 'darwin' else 1024          # Macs count bytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def bench(what: str, run, device: torch.device, unit: str, count: int, flops: float, **said):
    """Prints a line of JSON about run(), which makes `count` units: their rate, the most memory in use (on a
    CPU by the process so far), and MFU: FLOPs as a share of the fastest matrix product in the same type."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    seconds, memory = seconds_of(run, device), peak_memory(device)
    n = 8192 if device.type == 'cuda' else 2048
    a = torch.randn(n, n, device=device, dtype=getattr(torch, said['dtype']))
    peak = 2 * n ** 3 / seconds_of(lambda: a @ a, device)
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'
    row = dict(what=what, device=name, **said, seconds=round(seconds, 5))
    row |= {f'{unit}_per_s': round(count / seconds, 2)}
    row |= dict(peak_gib=memory and round(memory / 2 ** 30, 2), tflop=round(flops / 1e12, 4),
                mfu=round(flops / seconds / peak, 3), matmul_tflop_per_s=round(peak / 1e12, 3))
    print(json.dumps(row), flush=True)


def bench_sampling(tokenizer: VQVAE, var: VAR, count: int, dtype: str, how: dict, **said):
    """Times `draw` of so many images in one batch."""
    device, labels = var.position.device, [i % var.config.num_classes for i in range(count)]
    flops = count * flops_of(tokenizer.config, var.config)['sample' if how['cfg'] else 'unguided']
    bench('sample', lambda: [*draw(tokenizer, var, labels, 0, count, dtype, **how)], device, 'images', count,
          flops, dtype=choose_dtype(device, dtype), batch=count, depth=var.config.depth, **how, **said)


# ---------------------------------------------------------------------------------------------- command line
MILLIONS = number(int, '1 or more', lambda n: n >= 1, most=10 ** 7)
LONG_SEED = number(int, 'in [0, 2^63)', lambda n: 0 <= n < 2 ** 63, most=10 ** 99)
FLAGS = {                               # name, type, default, help
    'what to draw': [
        ('official', list(RELEASED), None, "the authors' weights instead of a checkpoint, downloaded once"),
        ('weights_dir', str, None, 'folder with those weights, by the names they were released by'),
        ('labels', tuple[str, ...], None, 'classes by number or name, or null; absent: all; for edits null'),
        ('count', MILLIONS, None, 'images in all, labels go round; absent: one per label, 100 at most'),
        ('seed', LONG_SEED, 0, 'of the noise of all images [0]')],
    'how to draw it': [
        ('cfg', STRENGTH, None, "guidance at the last scale; absent: the checkpoint's"),
        ('top_k', ANY_COUNT, None, "keep the k likeliest tokens, 0 all; absent: the checkpoint's"),
        ('top_p', SHARE, None, "keep the likeliest up to this mass, 0 or 1 all; absent: the checkpoint's"),
        ('temperature', POSITIVE, 1.0, 'divides the logits [1]'),
        ('smooth', bool, False, 'mix codes, as the released more_smooth does: for looks, not for evaluators'),
        ('batch_size', COUNT, 50, 'images that a process takes at once [50]'),
        ('compile', bool, False, 'compile the decoder, by torch.compile: for many images'),
        ('bench', bool, False, 'write nothing: time a batch, and print a JSON line'),
        ('device', str, 'auto', 'auto (a GPU where there is one), cpu, cuda, ...'),
        ('dtype', ['auto', 'float32', 'bfloat16'], 'auto', 'auto: bfloat16 on a GPU, else float32')],
    'edit a photograph': [
        ('image', str, None, 'the photograph; its central square is taken'),
        ('box', tuple[SHARE, SHARE, SHARE, SHARE], None, 'a part of that square: Y0 X0 Y1 X1, in fractions, '
         'rounded to latents'),
        ('mask', str, None, 'or an image as large as the photograph, white in the part that is meant'),
        ('inpaint', bool, False, 'draw that part anew (what is done without --outpaint, too)'),
        ('outpaint', bool, False, 'draw all but that part anew'),
        ('keep_scales', COUNT, None, 'keep all of its first k scales, beside what else is kept'),
        ('paste', bool, False, "put the photograph's own pixels back outside of what is drawn anew"),
        ('compare', str, None, 'an image to write: the photograph, what is kept of it, and the results')],
    'write': [
        ('out', str, None, 'the image to write; absent: samples.png, if nothing else is written'),
        ('show_scales', bool, False, 'in it, one row per image, scale by scale'),
        ('npz', str, None, 'write arr_0 (N, H, W, 3) uint8, labels (N; null: one more), class_names here'),
        ('png_dir', str, None, 'write 000000.png, 000001.png, ... here; goes on after a stop, like --npz'),
        ('export', str, None, 'write the model here in bfloat16, sampling flags as defaults')]}
NEEDS = dict(weights_dir='official', box='image', mask='image', keep_scales='image', compare='image',
             inpaint='box mask', outpaint='box mask', paste='box mask', image='box mask keep_scales',
             show_scales='out')
NEED_SCALES = ('keep_scales', 'show_scales', 'smooth')
ENDINGS = dict(out=tuple(IMAGE_FORMATS), compare=tuple(IMAGE_FORMATS), npz=('.npz',), export=('.pt',))
EXCLUDE = [('box', 'mask'), ('inpaint', 'outpaint'), ('smooth', 'show_scales'), ('paste', 'show_scales'),
           ('compare', 'show_scales'), *((name, 'bench') for name in 'out npz png_dir export image'.split())]


def add_flag(group, name: str, kind, default, help: str):
    """kind: bool, choices (a list or a Literal), or the type of an argument, of which tuple[int, ...] takes
    several, tuple[int, int] two, and int | None one."""
    options = dict(default=default, help=help.replace('%', '%%'))
    if kind is bool:
        options |= dict(action=argparse.BooleanOptionalAction)
    elif isinstance(kind, list) or typing.get_origin(kind) is typing.Literal:
        options |= dict(choices=list(typing.get_args(kind) or kind))
    else:
        kinds = typing.get_args(kind) or [kind]
        if typing.get_origin(kind) is tuple:
            options |= dict(nargs='+' if ... in kinds else len(kinds))
        options |= dict(type={int: INTEGER}.get(kinds[0], kinds[0]), metavar=kinds[0].__name__.upper())
    group.add_argument(flag(name), **options)


def build_parser() -> Parser:
    parser = Parser(prog='sample.py', description=__doc__)
    parser.add_argument('checkpoint', nargs='?', help='a var.pt that train.py wrote')
    for title, rows in FLAGS.items():
        group = parser.add_argument_group(title)
        for row in rows:
            add_flag(group, *row)
    return parser


def parse_label(text: str, class_names: list[str]) -> int:
    """A class by its number or its name, in any case; 'null' is none."""
    names, text = [*(name.lower() for name in class_names), 'null'], plain(text)
    if text.lower() in names:
        return names.index(text.lower())
    check(text.isdecimal() and int(text) < len(class_names), f'--labels {text}: no such class; there are '
          f"0 to {len(class_names) - 1}: {', '.join(class_names[:12])}{', ...' * (len(class_names) > 12)}"
          f'{did_you_mean(text.lower(), names)}')
    return int(text)


def check_flags(args: argparse.Namespace):
    if not (args.out or args.npz or args.png_dir or args.compare or args.bench or
            args.export and not args.image):
        args.out = 'samples.png'
    given = {name: value for name, value in vars(args).items() if value is not None and value is not False}
    check(len(given.keys() & {'checkpoint', 'official'}) == 1, 'name a checkpoint (before --labels), or '
          "--official d16 for the authors' weights")
    check(world_size() == 1 or given.keys() & {'npz', 'png_dir'}, 'many processes: need --npz or --png-dir')
    for name, others in NEEDS.items():
        others = others.split()
        check(name not in given or bool(given.keys() & others),
              f'{flag(name)}: needs {" or ".join(map(flag, others))}')
    for pair in EXCLUDE:
        check(not given.keys() >= {*pair}, f'{", ".join(map(flag, pair))}: say one or the other')
    y0, x0, y1, x1 = args.box or (0, 0, 1, 1)
    check(y0 < y1 and x0 < x1, f'--box {y0} {x0} {y1} {x1}: must go from the upper left to the lower right')
    for name in given.keys() & ENDINGS:
        said, path = f'{flag(name)} {given[name]}', Path(given[name]).resolve()
        check(path.suffix.lower() in ENDINGS[name], f"{said}: must end in {' or '.join(ENDINGS[name])}")
        check(not path.is_dir(), f'{said}: is a folder; choose another')
        for other in given.keys() & {'checkpoint', 'image', 'mask', *ENDINGS} - {name}:
            check(path != Path(given[other]).resolve(), f'{said}: is the {other} itself; choose another')
        check(name == 'npz' or world_size() == 1, f'{said}: goes with one process alone')
        check('png_dir' not in given or path.parent != Path(given['png_dir']).resolve(), f'{said}: would lie '
              'in --png-dir, of which an evaluator reads all; choose another')
        prepare_folder(path.parent, flag(name))


def save_sheets(args: argparse.Namespace, images: Tensor, edit: Edit | None, classes: int, K: int):
    """The images for people to look at: --out, and --compare."""
    if args.compare:
        panels = torch.cat([edit.photo[None], edit.preview[None], images])
        save_image(Path(args.compare), grid(panels, min(len(panels), 12)))
    if args.out:
        columns = 10 if edit else classes if 1 < classes <= 20 else math.ceil(math.sqrt(len(images)))
        save_image(Path(args.out), grid(images, K if args.show_scales else min(columns, len(images))))


@torch.no_grad()
def main(argv: list[str]):
    start_processes()
    with rank_0_first():                                        # who also downloads for all
        args = build_parser().parse_args(argv)
        check_flags(args)
        device = choose_device(args.device)
        tokenizer, var, sampling = (load_official(args.official, args.weights_dir, device) if args.official
                                    else load(args.checkpoint, device))
        for name in NEED_SCALES:
            check(var.config.order == 'scale' or not getattr(args, name), f'{flag(name)}: needs a model of '
                  'several scales, but this one writes a single map in raster order; omit the flag')
        sampling |= {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
        if args.compile:
            check_compiler(device)
            tokenizer.decoder.compile()
        if args.bench:
            return bench_sampling(tokenizer, var, args.batch_size, args.dtype, sampling, compile=args.compile)
        classes = ([parse_label(text, var.class_names) for text in args.labels] if args.labels else
                   [var.config.num_classes] if args.image else [*range(var.config.num_classes)])
        labels = [classes[i % len(classes)] for i in range(args.count or min(100, len(classes)))]
        how = {name: getattr(args, name) for name in ('seed', 'batch_size', 'smooth', 'temperature')}
        how |= sampling | dict(dtype=choose_dtype(device, args.dtype))
        edit = Edit(args, tokenizer) if args.image else None
        folder = Folder(args, len(labels)) if args.npz or args.png_dir else None
        firsts = [*range(0, len(labels), args.batch_size)]      # the first images of the batches to draw
        if folder and rank() == 0:
            weights = [*tokenizer.state_dict().values(), *var.state_dict().values()]
            parts = dict(labels=[torch.tensor(labels)], weights=weights)
            parts |= dict(photograph=[edit.photo], region=[edit.region]) if edit else {}
            made = how | dict(count=len(labels), keep_scales=args.keep_scales, paste=args.paste)
            lacking = folder.begin(made | {name: fingerprint(tensors) for name, tensors in parts.items()})
            firsts = firsts if args.out or args.compare else lacking        # a sheet needs them all
    if args.export:
        defaults = {name: sampling[name] for name in SAMPLING}
        save_model(Path(args.export), tokenizer, var, var.class_names, defaults, torch.bfloat16)
        print(f'{args.export}: {Path(args.export).stat().st_size / 2 ** 20:.1f} MiB')

    firsts = from_rank_0(firsts if folder or args.out or args.compare else [])[rank()::world_size()]
    batches = draw(tokenizer, var, labels, firsts=firsts, kept_BL=edit and edit.kept_1L, **how)
    bar, shown = tqdm(firsts, unit='batch', disable=rank() > 0 or len(firsts) < 2), []
    for first, (images, tokens_BL) in zip(bar, batches):
        images = edit.finish(to_uint8(images)) if edit else to_uint8(images)
        if folder:
            folder.write(first, images.permute(0, 2, 3, 1).numpy())
        if args.show_scales:
            f_hats = tokenizer.f_hats(tokens_BL.to(device))
            steps = [to_uint8(tokenizer.decode_f_hat(f_hat)).cpu() for f_hat in f_hats]
            images = torch.stack(steps, dim=1).flatten(0, 1)
        if args.out or args.compare:
            shown.append(images)
    wait_for_all()                                              # until they have written theirs
    if rank() == 0:
        if folder:
            folder.finish(labels, var.class_names)
        if shown:
            save_sheets(args, torch.cat(shown), edit, len(classes), len(var.config.scales))
        for path in filter(None, (args.npz, args.png_dir, args.compare, args.out)):
            print(f'{path}: {len(labels)} images')


if __name__ == '__main__':
    run_command(main)
