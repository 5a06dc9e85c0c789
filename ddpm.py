# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.14",
#     "torchvision>=0.29",
#     "numpy>=2.0",
#     "matplotlib>=3.9",
#     "einops>=0.8",
#     "imageio>=2.38",
#     "tqdm>=4.67",
# ]
# ///
"""A denoising diffusion probabilistic model of MNIST or Fashion-MNIST, in one file.

    python ddpm.py              train on MNIST, then draw new digits: outputs/mnist.gif and others
    python ddpm.py --fashion    the same with Fashion-MNIST: outputs/fashion.gif and others
    python ddpm.py --no-train   draw from the weights in outputs/, without training
    python ddpm.py --help       all flags

To be read from top to bottom: flags, data, diffusion, network, training, sampling, figures, main.

[1] Ho, Jain, Abbeel: Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239
[2] Song, Meng, Ermon: Denoising Diffusion Implicit Models, 2021, arXiv 2010.02502
[3] Lu et al.: DPM-Solver++, 2022, arXiv 2211.01095
[4] Ronneberger, Fischer, Brox: U-Net, 2015, arXiv 1505.04597
[5] Vaswani et al.: Attention Is All You Need, 2017, arXiv 1706.03762
[6] Jordan et al.: Muon, 2024, kellerjordan.github.io/posts/muon
[7] Kingma, Ba: Adam, 2015, arXiv 1412.6980
[8] Salimans, Ho: Progressive Distillation, 2022, arXiv 2202.00512 (the guess of v)
[9] Karras et al.: Guiding a Diffusion Model with a Bad Version of Itself, 2024, arXiv 2406.02507
"""

# %% Imports
import argparse
import ast
import contextlib
import copy
import datetime
import functools
import gzip
import hashlib
import io
import math
import os
import pickle
import platform
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import einops
import imageio.v3 as imageio
import matplotlib.pyplot as plt
import numpy as np
import torch
from einops.layers.torch import Rearrange
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.datasets import MNIST, FashionMNIST
from tqdm.auto import tqdm

HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()

# %% Flags: edit a line here, or give it on the command line (n_epochs = 5 is --n-epochs 5)
SEED = 0  # all randomness comes from it: the same seed, flags and machine give the same bytes
no_train = False  # draw from the weights in out_dir instead of training
fashion = False  # Fashion-MNIST (clothes) instead of MNIST (digits)
resume = False  # go on after the last finished epoch of a training that was stopped
batch_size = 128  # images per step; 64 learns equally well per image but takes longer
n_epochs = 20  # passes over the training images
n_images = 60_000  # training images, all of them; fewer for a quick look
lr = 0.02  # peak learning rate of Muon (Adam: a tenth); short warm-up, then linearly to 0
n_steps = 1000  # length T of the diffusion, as in [1]
min_beta = 1e-4  # variance of the noise added in the first step, as in [1]
max_beta = 0.02  # the same in the last step: after 1000, next to nothing of the image is left
n_samples = 100  # images to draw after training
frames_per_gif = 100  # pictures in the GIF, from pure noise to the images
sample_steps = 1000  # n_steps: the whole reverse chain; fewer: the fast sampler
guidance = 2  # draw with 2 times what training changed since a fifth of it; 1: as trained
variance = 2  # of the noise in the whole chain: 1 is beta_t, 2 the posterior's beta-tilde_t
data_dir = str(HERE / "datasets")  # folder of the data archives
out_dir = str(HERE / "outputs")  # folder of the weights and pictures

FLAGS = [k for k, v in list(vars().items()) if k[0] != "_" and isinstance(v, int | float | str)]
# What defines a training: stored with the weights, and must not change when it is resumed.
FIXED = ["SEED", "fashion", "batch_size", "n_images", "lr", "n_steps", "min_beta", "max_beta"]


class BadInput(ValueError):
    """An error that the user can mend: the text says what is wrong and what to do."""


def read_flags(argv=None):
    """-> Namespace of all flags: the values above, overridden by the command line `argv`.

    Raises BadInput for an unknown flag or a value that makes no sense.
    """

    def literal(text):
        with contextlib.suppress(SyntaxError):
            return ast.literal_eval(text)
        raise ValueError

    def refuse(message):
        raise BadInput(f"{message} (--help lists the flags)")

    text = Path(__file__).read_text(encoding="utf-8") if "__file__" in globals() else ""
    reasons = dict(re.findall(r"^(\w+) = .*?  # (.+)$", text, re.MULTILINE))
    parser = argparse.ArgumentParser(
        "ddpm.py", allow_abbrev=False, description=__doc__.splitlines()[0]
    )
    parser.error = refuse
    for name in FLAGS:
        value = globals()[name]
        kind = {"type": str if isinstance(value, str) else literal, "metavar": "VALUE"}
        if isinstance(value, bool):
            kind |= {"nargs": "?", "const": True, "metavar": "True|False"}
        reason = f"{reasons.get(name, '')} (default: {value})"
        option = "--" + name.lower().replace("_", "-")
        parser.add_argument(option, dest=name, default=value, help=reason, **kind)
    flags = parser.parse_args(argv)
    check_flags(flags)
    return flags


def check_flags(flags):
    """Raises BadInput, with the flag's name and its range, for the first flag out of range."""

    def need(name, condition, wanted):
        if not condition:
            raise BadInput(f"{name} must be {wanted}, not {getattr(flags, name)}")

    least = {"batch_size": 1, "n_epochs": 1, "n_steps": 2, "n_samples": 1}
    least |= {"n_images": 1, "frames_per_gif": 2, "sample_steps": 1, "SEED": 0}
    for name, low in least.items():
        value = getattr(flags, name)
        need(name, type(value) is int and value >= low, f"a whole number, at least {low}")
    for name in ("lr", "min_beta", "max_beta", "guidance"):
        value = getattr(flags, name)
        need(name, type(value) in (int, float) and 0 < value < math.inf, "a number above 0")
    need("SEED", flags.SEED < 2**32, "below 2**32")
    need("lr", flags.lr <= 1e30, "at most 1e30")
    need("n_images", flags.n_images <= 60_000, "at most 60000")
    need("max_beta", flags.max_beta < 1, "below 1")
    need("min_beta", flags.min_beta < flags.max_beta, f"below max_beta, {flags.max_beta}")
    need("sample_steps", flags.sample_steps <= flags.n_steps, f"at most n_steps, {flags.n_steps}")
    need("guidance", 1 <= flags.guidance <= 10, "from 1 to 10")
    need("variance", flags.variance in (1, 2), "1 (beta_t) or 2 (beta-tilde_t)")
    for name in ("no_train", "fashion", "resume"):
        need(name, type(getattr(flags, name)) is bool, "True or False")
    need("no_train", not (flags.no_train and flags.resume), "left out when resume is given")


# %% Files: each is written whole or not at all
@contextlib.contextmanager
def whole_file(path):
    """Gives a temporary path beside `path`; what is written there replaces `path` at the end.

    So a kill or a full disk leaves the old file as it was. Raises OSError if it can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"can't write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def save(content, path):
    """Writes a dict of tensors, numbers and texts with torch.save, sealed with its SHA-256.

    The digest is the comment of the zip archive that torch.save makes, so torch.load reads it too.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    body = buffer.getvalue()[:-2]
    digest = hashlib.sha256(body).digest()
    with whole_file(path) as temporary:
        temporary.write_bytes(body + len(digest).to_bytes(2, "little") + digest)


def load(path, device=None):
    """-> the dict that `save` wrote. Raises BadInput if not every byte is as it was then."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        text = f"{path} does not exist: train first, without --no-train or --resume"
        raise BadInput(text) from None
    body, digest = data[:-34], data[-32:]
    if data[-34:-32] != b"\x20\0" or hashlib.sha256(body).digest() != digest:
        raise BadInput(f"{path} is damaged, or not written by ddpm.py: delete it and train again")
    try:
        return torch.load(io.BytesIO(data), map_location=device or "cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise BadInput(f"{path} holds code, which is not run: delete it and train again") from None


# %% Devices: one is enough; torchrun starts a process for each of several
def find_device():
    """-> the device to compute on: a GPU of this process (CUDA, Apple's MPS, ...), or the CPU."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def fast_precision(device):
    """-> autocast to bf16 where the hardware multiplies it faster than fp32, or a disabled one."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = features.get("amx_bf16", False) or features.get("avx512_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


@contextlib.contextmanager
def all_processes(device, batch_size):
    """Joins the processes that torchrun started, if any; only the first prints and writes.

    Raises BadInput if they can't share a batch or do not find each other, OSError if one is lost.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if not re.fullmatch("[1-9][0-9]*", world_size):
        raise BadInput(
            f"WORLD_SIZE must be a number of processes, not {world_size!r}: use torchrun"
        )
    world_size = int(world_size)
    if batch_size % world_size:
        raise BadInput(f"batch_size must be a multiple of the {world_size} processes")
    if world_size == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        distributed.init_process_group(backend, timeout=datetime.timedelta(minutes=2))
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"the other processes were not found ({reason}): use torchrun") from None
    with contextlib.ExitStack() as silence:
        if share()[0]:
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            yield
        except RuntimeError as error:
            if "gloo" not in str(error) and not isinstance(error, distributed.DistError):
                raise
            raise OSError(f"another process was lost: {str(error).splitlines()[0]}") from None
        finally:
            distributed.destroy_process_group()


def share():
    """-> (rank, number of processes): of n items, this process computes rank, rank + number, ..."""
    alone = not distributed.is_initialized()
    return (0, 1) if alone else (distributed.get_rank(), distributed.get_world_size())


def in_shares(function, *tensors):
    """-> function(*tensors), shaped like the first of them, each process computing its share."""
    rank, world_size = share()
    if world_size == 1:
        return function(*tensors)
    result = torch.zeros_like(tensors[0])
    result[rank::world_size] = function(*(x[rank::world_size] for x in tensors))
    distributed.all_reduce(result)
    return result


# %% Data: all images are one tensor, a batch is one indexing operation
def load_images(fashion=False, train=True, data_dir=data_dir, device=None):
    """-> uint8 tensor (60000 or, with train=False, 10000; 28; 28) on `device`.

    The archive is checked against its MD5 and unpacked in memory, so that nothing half unpacked
    can be left behind and the folder may be read-only. torchvision downloads it if it is missing.
    Raises BadInput if that fails, or if the archive is damaged.
    """
    source = FashionMNIST if fashion else MNIST
    start = "train-images" if train else "t10k-images"
    name, md5 = next(file for file in source.resources if file[0].startswith(start))
    archive = Path(data_dir, source.__name__, "raw", name)
    if not archive.exists():
        with contextlib.suppress(Exception):  # no network, or a mirror that sends nonsense
            source(data_dir, download=True)
    data = archive.read_bytes() if archive.exists() else b""
    if hashlib.md5(data).hexdigest() != md5:
        fault = "damaged" if archive.exists() else "missing, and can't be downloaded"
        raise BadInput(f"{archive} is {fault}: put the original there, whose MD5 is {md5}")
    pixels = np.frombuffer(gzip.decompress(data), np.uint8, offset=16)
    return torch.from_numpy(pixels.reshape(-1, 28, 28).copy()).to(device)


class Batches:
    """Shuffles the images anew each time it is iterated: all of a batch is one indexing operation.

    `images` is uint8 (n, h, w); each batch is [x0], (batch_size, 1, h, w) in [-1, 1], on the same
    device; the last one may be smaller.
    """

    def __init__(self, images, batch_size=batch_size):
        self.dataset, self.batch_size = images, batch_size

    def __len__(self):
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self):
        order = torch.randperm(len(self.dataset), device=self.dataset.device)
        for indices in order.split(self.batch_size):
            yield [self.dataset[indices].unsqueeze(1).float() / 127.5 - 1]


# %% Diffusion: an image is drowned in noise, step by step
def linear_schedule(n_steps, min_beta, max_beta):
    """-> betas, alphas, alpha_bars in float64, each (n_steps,): [1], eq. 4 and section 4."""
    betas = torch.linspace(min_beta, max_beta, n_steps, dtype=torch.float64)
    alphas = 1 - betas
    return betas, alphas, alphas.cumprod(0)


class MyDDPM(nn.Module):
    """The forward process with its linear schedule, and the network that undoes it [1].

    `network` maps x (n, c, h, w) and t (n,) to the noise in x; steps t are counted from 0 to
    n_steps - 1. `betas`, `alphas` and `alpha_bars` are buffers (n_steps,): they move with the
    model and are saved with it. Raises BadInput for an impossible schedule.
    """

    def __init__(
        self,
        network,
        n_steps=1000,
        min_beta=1e-4,
        max_beta=0.02,
        device=None,
        image_chw=(1, 28, 28),
    ):
        super().__init__()
        if n_steps < 2 or not 0 < min_beta < max_beta < 1:
            raise BadInput("a schedule needs n_steps >= 2 and 0 < min_beta < max_beta < 1")
        self.network = network
        self.early = None  # the network as it was early in its training, if that is known
        self.n_steps = n_steps
        self.image_chw = tuple(image_chw)
        betas, alphas, alpha_bars = linear_schedule(n_steps, min_beta, max_beta)
        if not (alpha_bars[0] < 1 and alpha_bars[-1] >= torch.finfo().tiny):
            raise BadInput(
                "no float32 holds alpha_bars: raise min_beta, or lower n_steps or max_beta"
            )
        self.register_buffer("betas", betas.float())
        self.register_buffer("alphas", alphas.float())
        self.register_buffer("alpha_bars", alpha_bars.float())
        self.to(device)

    @property
    def device(self):
        return self.betas.device

    def forward(self, x0, t, eta=None):
        """x0 (n, c, h, w) in [-1, 1], t (n,) -> x_t (n, c, h, w), in one jump: eq. 4 of [1].

        `eta` is the standard normal noise (n, c, h, w) to mix in; None draws it.
        """
        if eta is None:
            eta = torch.randn_like(x0)
        alpha_bar = self.alpha_bars[torch.as_tensor(t, device=self.device)].reshape(-1, 1, 1, 1)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eta

    def backward(self, x, t, guidance=1):
        """x_t (n, c, h, w), t (n,) or (n, 1) -> eta_theta (n, c, h, w), the network's guess.

        What training has changed since its early days is mostly right, but too little: a guidance
        above 1 goes `guidance` times the way from the early guess to the last one [9, eq. 3].
        """
        eta_theta = self.network(x, t)
        if self.early is None or guidance == 1:
            return eta_theta
        return self.early(x, t).lerp(eta_theta, guidance)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Loads what `state_dict` gave: early weights are there afterwards if they were then."""
        known = any(name.startswith("early.") for name in state_dict)
        self.early = copy.deepcopy(self.network).requires_grad_(False) if known else None
        return super().load_state_dict(state_dict, *args, **kwargs)


# %% Network: a UNet that is told the step
def sinusoidal_embedding(n, d):
    """-> (n, d): row t is sin and cos of t at wavelengths from 2 pi to 10,000 * 2 pi [5, sec. 3.5].

    embedding[t, 2i] = sin(t / 10000^(2i / d)), embedding[t, 2i + 1] = cos(t / 10000^(2i / d)).
    """
    t = torch.arange(n, dtype=torch.float64).reshape(n, 1)
    wk = 10_000 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    embedding = torch.zeros(n, d)
    embedding[:, 0::2] = torch.sin(t * wk)
    embedding[:, 1::2] = torch.cos(t * wk[: d // 2])
    return embedding


class Conv(nn.Conv2d):
    """A 3 x 3 convolution of (n, h, w, c). Channels come last everywhere, so no copies are made."""

    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out, 3, padding=1)

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Residual block: two convolutions, and between them each channel is told the step."""

    def __init__(self, channels, time_emb_dim):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv1 = Conv(channels, channels)
        self.step = nn.Linear(time_emb_dim, channels)
        self.conv2 = Conv(channels, channels)
        nn.init.zeros_(self.conv2.weight)  # every block starts as the identity
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, e):
        h = self.conv1(self.norm(x)) + self.step(e)[:, None, None]
        return x + self.conv2(F.silu(h))


class MyUNet(nn.Module):
    """UNet [4] that is told the step t by a sinusoidal embedding [5].

    It works at full, half and quarter resolution with ever more channels. The coarse levels are
    cheap and decide the shape of a digit, so the blocks are there; at full resolution even a norm
    would cost more than a convolution. On the way up, each resolution adds the features that the
    way down left there. `settings` rebuilds the network; `betas` are min_beta and max_beta of the
    schedule, which the guess of v needs.
    """

    def __init__(
        self, n_steps=1000, time_emb_dim=128, channels=(16, 32, 64), n_middle=4, betas=(1e-4, 0.02)
    ):
        super().__init__()
        self.settings = {"n_steps": n_steps, "time_emb_dim": time_emb_dim, "channels": channels}
        self.settings |= {"n_middle": n_middle, "betas": betas}
        alpha_bars = linear_schedule(n_steps, *betas)[2]
        mix = torch.stack([(1 - alpha_bars).sqrt(), alpha_bars.sqrt()], 1).float()
        self.register_buffer("mix", mix, persistent=False)
        full, half, quarter = channels
        e = time_emb_dim
        self.register_buffer("embedding", sinusoidal_embedding(n_steps, e), persistent=False)
        self.time = nn.Sequential(nn.Linear(e, e), nn.SiLU(), nn.Linear(e, e), nn.SiLU())
        # Folding turns each 2 x 2 square of pixels into channels, which a linear layer mixes.
        fold = Rearrange("n (h i) (w j) c -> n h w (i j c)", i=2, j=2)
        unfold = Rearrange("n h w (i j c) -> n (h i) (w j) c", i=2, j=2)
        self.enter = Conv(1, full)
        self.down1 = nn.Sequential(fold, nn.Linear(4 * full, half))
        self.half_down = Block(half, e)
        self.down2 = nn.Sequential(fold, nn.Linear(4 * half, quarter))
        self.middle = nn.ModuleList(Block(quarter, e) for _ in range(n_middle))
        self.up2 = nn.Sequential(nn.Linear(quarter, 4 * half), unfold)
        self.half_up = Block(half, e)
        self.up1 = nn.Sequential(nn.Linear(half, 4 * full), unfold)
        silu = nn.SiLU()
        self.leave = nn.Sequential(silu, Conv(full, full), silu, Conv(full, 1))
        nn.init.zeros_(self.leave[-1].weight)
        self.to(memory_format=torch.channels_last)

    def forward(self, x, t):
        """x (n, 1, h, w), h and w multiples of 4, t (n,) or (n, 1) -> eta_theta, shaped like x."""
        with fast_precision(x.device):
            e = self.time(self.embedding[t.flatten()])
            full = self.enter(x.permute(0, 2, 3, 1))
            half = self.half_down(self.down1(full), e)
            quarter = self.down2(half)
            for block in self.middle:
                quarter = block(quarter, e)
            half = self.half_up(half + self.up2(quarter), e)
            v = self.leave(full + self.up1(half)).permute(0, 3, 1, 2)
        # Late steps are nearly all noise: there x itself is the guess, and v only corrects it [8].
        of_x, of_v = self.mix[t.flatten()][:, :, None, None, None].unbind(1)
        return of_x * x + of_v * v.float()


# %% Training: guess the noise
# Progress bars are for a terminal (None: only there) or a notebook.
NO_BAR = False if "ipykernel" in sys.modules else None


class Muon(torch.optim.Optimizer):
    """Muon [6] for matrices, at the learning rate lr; Adam [7] for the rest, at lr / 10.

    A matrix's momentum is replaced by roughly the nearest one with orthonormal rows or columns:
    weak directions are learned as fast as strong ones. A convolution is the matrix
    (out, in * h * w); the first and the last one, of one channel, are left to Adam.
    """

    def __init__(self, params, lr=0.02):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices = {}
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
                state["step"] += 1
                mean, square = state["mean"], state["square"]
                if p.ndim > 1 and min(p.shape[:2]) > 1:
                    mean.lerp_(p.grad, 0.05)
                    update = p.grad.lerp(mean, 0.95).flatten(1)
                    matrices.setdefault(update.shape, []).append((p, update))
                else:
                    mean.lerp_(p.grad, 0.1)
                    square.lerp_(p.grad.square(), 0.01)
                    root = (square / (1 - 0.99 ** state["step"])).sqrt() + 1e-8
                    p.addcdiv_(mean, root, value=-group["lr"] / 10 / (1 - 0.9 ** state["step"]))
            for (rows, columns), same in matrices.items():
                updates = orthogonalize(torch.stack([update for _, update in same]))
                scale = max(1, rows / columns) ** 0.5
                for (p, _), update in zip(same, updates, strict=True):
                    p.sub_(update.view_as(p), alpha=group["lr"] * scale)


def orthogonalize(matrices):
    """(k, m, n) -> (k, m, n): all singular values become about 1, by five Newton-Schulz steps [6].

    Each step multiplies by a polynomial of X X^T: the steps multiply these small square matrices,
    and only their product meets X.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    square = wide @ wide.mT
    one = product = torch.eye(square.shape[1], device=square.device)
    for _ in range(5):
        factor = 3.4445 * one + torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315)
        product, square = factor @ product, square @ factor @ factor
    wide = product @ wide
    return wide if matrices.shape[1] <= matrices.shape[2] else wide.mT


def training_loop(
    ddpm, loader, n_epochs, optim, device=None, display=False, store_path="ddpm.pt", *, flags=None
):
    """Algorithm 1 of [1] on batches [x0, ...] of `loader`; -> list of the epochs' mean errors.

    After each epoch the averaged weights go into `store_path`, and what is needed to go on into
    <name>_state.pt beside it; at the end `ddpm` holds the averaged weights. display=True also
    draws images each epoch. `flags` (dict): resume and SEED are used, those in FIXED stored.
    Raises FloatingPointError if the loss is not finite, BadInput if there is nothing to resume.
    """
    flags = flags or {}
    kept = {name: flags[name] for name in FIXED if name in flags}
    store_path = Path(store_path)
    state_path = store_path.with_name(f"{store_path.stem}_state.pt")
    ddpm.to(device or ddpm.device).train()
    ddpm.early = None  # that of another training
    averaged = copy.deepcopy(ddpm).requires_grad_(False).eval()
    first, losses = share()[0] == 0, []
    if flags.get("resume"):
        losses = restore(state_path, ddpm, averaged, optim, n_epochs, kept)
    elif first:
        state_path.unlink(missing_ok=True)  # or a later resume might go on with an old training
    schedule = warm_up_and_down(optim, n_epochs * len(loader), len(losses) * len(loader))
    network = ddpm.network
    if distributed.is_initialized():
        network = DistributedDataParallel(network, forward_sync_buffers=False)
    for epoch in tqdm(range(len(losses), n_epochs), "Training", disable=NO_BAR):
        # Randomness depends on seed and epoch alone: a resumed run equals an unbroken one.
        torch.manual_seed(1_000_003 * flags.get("SEED", SEED) + epoch)
        start = time.perf_counter()
        losses.append(train_epoch(ddpm, network, averaged, loader, optim, schedule, epoch))
        seconds = time.perf_counter() - start
        # Weights from an earlier or later time than a fifth of the training guide less well.
        if averaged.early is None and n_epochs / 5 <= epoch + 1 < n_epochs:
            averaged.early = copy.deepcopy(averaged.network)
        if first:
            store(store_path, state_path, ddpm, averaged, optim, flags=kept, losses=losses)
        speed = f"{seconds:.0f} s, {len(loader.dataset) / seconds:.0f} images/s"
        tqdm.write(f"Loss at epoch {epoch + 1}: {losses[-1]:.4f} ({speed}, stored in {store_path})")
        sys.stdout.flush()
        if display:
            how = {"gif_name": None, "sample_steps": min(20, ddpm.n_steps)}
            show_images(generate_new_images(averaged, **how), f"After epoch {epoch + 1}")
    ddpm.load_state_dict(averaged.state_dict())
    return losses


def warm_up_and_down(optim, total, done):
    """-> scheduler: up to the learning rate in 200 steps, straight down to 0 at step `total`."""

    def factor(step):
        return min((step + 1) / 200, 1) * max(1 - step / total, 0)

    return torch.optim.lr_scheduler.LambdaLR(optim, factor, last_epoch=done - 1)


def train_epoch(ddpm, network, averaged, loader, optim, schedule, epoch):
    """One pass over the data: updates `ddpm` and its moving average. -> mean error of the noise.

    `network` is that of `ddpm`, or wraps it to average its gradients over all processes.
    """
    losses, norms, sizes = torch.zeros(3, len(loader), device=ddpm.device)
    kind = {"desc": f"Epoch {epoch + 1}", "unit": " images", "leave": False, "disable": NO_BAR}
    bar = tqdm(total=len(loader.dataset), **kind)
    for i, batch in enumerate(loader):
        x0 = batch[0].to(ddpm.device)
        loss, losses[i] = guess_the_noise(ddpm, network, x0)
        optim.zero_grad()
        loss.backward()
        norms[i] = nn.utils.clip_grad_norm_(ddpm.parameters(), 1.0)
        optim.step()
        schedule.step()
        move_average(averaged, ddpm, epoch * len(loader) + i)
        sizes[i] = len(x0)
        bar.update(len(x0))
        # Reading a number waits for the device: a GPU is asked only once an epoch.
        last = i + 1 == len(loader)
        if ddpm.device.type == "cpu" or last:
            good = norms[: i + 1].isfinite()
            # The last step may have spoiled the weights: they are tried before they are stored.
            if last:
                t = torch.zeros(len(x0), dtype=torch.long, device=x0.device)
                good[i] &= averaged.backward(x0, t).isfinite().all()
            if not good.all():
                where = f"epoch {epoch + 1}, step {good.tolist().index(0) + 1}"
                text = f"the loss is not finite in {where}: try a lower lr"
                raise FloatingPointError(f"{text} (the last good weights are kept)")
            bar.set_postfix(loss=f"{losses[i].item():.4f}", refresh=False)
    bar.close()
    if distributed.is_initialized():
        distributed.all_reduce(losses)
        losses /= distributed.get_world_size()
    return (losses @ sizes / sizes.sum()).item()


def guess_the_noise(ddpm, network, x0):
    """Noises a batch x0 (n, c, h, w). -> the loss of the guess, to learn from, and its mean error.

    All processes draw the same steps and noise, and each guesses its share: the averages of their
    losses and errors, and so of the gradients, are those of the whole batch.
    """
    n, (rank, world_size) = len(x0), share()
    # One t from each of n equal parts of the range: a less noisy loss than n free draws.
    spread = torch.arange(n, device=x0.device) + torch.rand(n, device=x0.device)
    t = (spread / n * ddpm.n_steps).long().clamp(max=ddpm.n_steps - 1)
    eta = torch.randn_like(x0)
    x0, t, eta = (tensor[rank::world_size] for tensor in (x0, t, eta))
    errors = (network(ddpm(x0, t, eta), t) - eta).square().mean((1, 2, 3)) * world_size / n
    # Late steps decide the shape of an image, but their errors are small: they count for more.
    return (errors * ddpm.alpha_bars[t] ** -0.5).sum(), errors.detach().sum()


@torch.no_grad()
def move_average(averaged, ddpm, step, decay=0.999):
    """Exponential moving average of the parameters: its images are better than the last step's."""
    # The first steps are forgotten faster, or a short training would average its own start.
    decay = min(decay, (1 + step) / (10 + step))
    networks = (averaged.network.parameters(), ddpm.network.parameters())
    for old, new in zip(*networks, strict=True):
        old.lerp_(new, 1 - decay)


def store(store_path, state_path, ddpm, averaged, optim, **info):
    """Writes the averaged weights, all that `load_model` needs, and what `restore` needs."""
    settings = getattr(ddpm.network, "settings", None)
    content = {"weights": averaged.state_dict(), "network": settings, "n_steps": ddpm.n_steps}
    save(content | {"image_chw": ddpm.image_chw} | info, store_path)
    state = {"current": ddpm.state_dict(), "averaged": averaged.state_dict()}
    save(state | {"optim": optim.state_dict()} | info, state_path)


def restore(state_path, ddpm, averaged, optim, n_epochs, flags):
    """Puts network, average and optimizer back to the last finished epoch. -> losses so far."""
    state = load(state_path, ddpm.device)
    try:
        compare_flags(state_path, state["flags"], flags, FIXED)
        ddpm.load_state_dict(state["current"])
        averaged.load_state_dict(state["averaged"])
        optim.load_state_dict(state["optim"])
        done = len(state["losses"])
    except (KeyError, TypeError, RuntimeError):
        raise BadInput(f"{state_path} is of another training: train without --resume") from None
    if done >= n_epochs:
        text = f"{state_path} has finished its {done} epochs"
        raise BadInput(f"{text}: raise n_epochs to train on, or draw with --no-train")
    print(f"Resuming after epoch {done}")
    return state["losses"]


def compare_flags(path, stored, given, names):
    """Raises BadInput if one of the flags `names` differs from those stored in the file."""
    for name in names:
        if stored.get(name) != given.get(name):
            raise BadInput(
                f"{path} was trained with {name} = {stored.get(name)}, not {given.get(name)}: "
                "give the same flags, or train anew (without --no-train and --resume)"
            )


def load_model(store_path, device=None):
    """-> MyDDPM in eval mode, rebuilt from the file alone; `.info` holds its flags and losses.

    Raises BadInput if the file is missing, damaged, or holds another network.
    """
    content = load(store_path, device)
    try:
        network = MyUNet(**content["network"])
        schedule = content["n_steps"], *content["weights"]["betas"][[0, -1]].tolist()
        ddpm = MyDDPM(network, *schedule, device, content["image_chw"])
        ddpm.load_state_dict(content["weights"])
        ddpm.info = {"flags": content["flags"], "losses": content["losses"]}
    except (KeyError, TypeError, RuntimeError):
        raise BadInput(f"{store_path} holds another network than MyUNet: train again") from None
    return ddpm.eval()


# %% Sampling: from noise to images
CHUNK = 500  # images drawn at once, which bounds the memory
GIF_IMAGES = 100  # images in the GIF at most


def generate_new_images(
    ddpm,
    n_samples=16,
    device=None,
    frames_per_gif=100,
    gif_name="sampling.gif",
    c=None,
    h=None,
    w=None,
    *,
    sample_steps=None,
    guidance=guidance,
    variance=variance,
    seed=SEED,
):
    """-> n_samples new images (n, c, h, w) in [-1, 1], the same ones for the same seed.

    c, h, w default to ddpm.image_chw. sample_steps=None is the whole chain; `guidance` is that of
    MyDDPM.backward. gif_name=None writes no GIF; otherwise it shows the first 100 images, from
    pure noise to what is returned, in `frames_per_gif` frames (steps + 1 if that is fewer). Raises
    BadInput for numbers out of range.
    """
    device = ddpm.to(device or ddpm.device).device
    chw = [given or own for given, own in zip((c, h, w), ddpm.image_chw, strict=True)]
    steps = ddpm.n_steps if sample_steps is None else sample_steps
    if n_samples < 1 or frames_per_gif < 2 or guidance < 1 or variance not in (1, 2):
        raise BadInput("n_samples and guidance start at 1, frames_per_gif at 2, variance is 1 or 2")
    if not 1 <= steps <= ddpm.n_steps:
        raise BadInput(f"sample_steps must be from 1 to n_steps, {ddpm.n_steps}")
    generator = torch.Generator(device).manual_seed(seed)
    shown = set(np.linspace(0, steps, min(frames_per_gif, steps + 1)).round().astype(int).tolist())
    frames, images = [], []
    bar = tqdm(total=steps * math.ceil(n_samples / CHUNK), desc="Sampling", disable=NO_BAR)
    for first in range(0, n_samples, CHUNK):
        n = min(CHUNK, n_samples - first)
        noise = torch.randn(n, *chw, generator=generator, device=device)
        for i, x in enumerate(reverse_process(ddpm, noise, steps, guidance, variance, generator)):
            if gif_name and first == 0 and i in shown:
                frames.append(tile(x[:GIF_IMAGES]))
            bar.update(i > 0)
        images.append(x)
    bar.close()
    if gif_name:
        write_gif(frames, gif_name)
    return torch.cat(images)


@torch.no_grad()
def reverse_process(ddpm, x, steps, guidance, variance, generator):
    """Yields x_T, the given noise (n, c, h, w), and then x after each of the steps down to x_0.

    steps = n_steps is Algorithm 2 of [1] with x_0 clipped to [-1, 1]: the mean of the next x is
    that of q(x_{t-1} | x_t, x_0), eq. 6 and 7, and `variance` tells its noise. Fewer steps are
    larger ones of the same kind, always with beta-tilde, towards an x_0 extrapolated from the last
    two guesses: jumping over t is of [2, sec. 4.2], the extrapolation of SDE-DPM-Solver++(2M) [3].
    `guidance`, that of MyDDPM.backward, begins at 0.6 n_steps.
    """
    # In float64 on the host: the loop never waits for the device.
    alpha_bars = (1 - ddpm.betas.cpu().double()).cumprod(0).tolist()
    # The last steps need more care: t falls quadratically, and no t is used twice.
    times = (ddpm.n_steps - 1) * np.linspace(1, 0, steps) ** 2
    times = np.maximum(times, np.arange(steps)[::-1]).round().astype(int).tolist()
    whole = steps == ddpm.n_steps
    last_x0 = last_log_snr = None
    yield x
    for t, t_next in zip(times, times[1:] + [None], strict=True):
        a, a_next = alpha_bars[t], 1.0 if t_next is None else alpha_bars[t_next]
        # While x is nearly all noise, guidance only makes the images more alike.
        guess = functools.partial(ddpm.backward, guidance=guidance if t < 0.6 * ddpm.n_steps else 1)
        eta_theta = in_shares(guess, x, torch.full((len(x),), t, device=x.device))
        x0 = ((x - (1 - a) ** 0.5 * eta_theta) / a**0.5).clamp(-1, 1)
        if t_next is None:
            yield x0
            return
        log_snr, next_log_snr = math.log(a / (1 - a)), math.log(a_next / (1 - a_next))
        target = x0
        if not whole and last_x0 is not None:
            target = x0 + (next_log_snr - log_snr) / (log_snr - last_log_snr) / 2 * (x0 - last_x0)
        last_x0, last_log_snr = x0, log_snr
        beta = 1 - a / a_next
        beta_tilde = (1 - a_next) / (1 - a) * beta
        x = (a_next**0.5 * beta * target + (a / a_next) ** 0.5 * (1 - a_next) * x) / (1 - a)
        z = torch.randn(x.shape, generator=generator, device=x.device)
        x += (beta if variance == 1 and whole else beta_tilde) ** 0.5 * z
        yield x


# %% Figures: one grey scale, -1 is black and 1 is white
def write_gif(frames, path):
    """Writes uint8 frames (h, w), or (h, w, 3), as a GIF that rests on the first and the last."""
    durations = [500] + [40] * (len(frames) - 2) + [3000]  # in ms
    how = {"extension": ".gif", "duration": durations, "loop": 0, "optimize": False}
    with whole_file(path) as temporary:
        imageio.imwrite(temporary, frames, **how)


def tile(images, gap=0):
    """Images (n, c, h, w) in [-1, 1] -> uint8 array (rows * h, columns * w), c behind if c > 1.

    As square as it gets; missing images are black, as are `gap` pixels after each image.
    """
    n = len(images)
    columns = math.ceil(n**0.5)
    # Two full rows of five look better than ten images in a grid of three times four.
    columns = next((k for k in range(columns, int(2 * n**0.5) + 1) if n % k == 0), columns)
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = F.pad(pixels, (0, gap, 0, gap, 0, 0, 0, -n % columns))
    grid = einops.rearrange(pixels, "(r k) c h w -> (r h) (k w) c", k=columns)
    return grid.squeeze(-1).cpu().numpy()


def show_images(images, title="", path=None):
    """Draws images (n, c, h, w) in [-1, 1] as one grid; written to `path`, shown if possible."""
    images = torch.as_tensor(images).detach()
    if len(images) == 0:
        raise BadInput("there are no images to show")
    grid = tile(images, gap=1)
    figure, axes = plt.subplots(figsize=(6, 6 * grid.shape[0] / grid.shape[1] + 0.4))
    axes.imshow(grid, cmap="gray", vmin=0, vmax=255)
    axes.set_title(title)
    axes.axis("off")
    finish(figure, path)


def show_first_batch(loader, path=None):
    """Draws the images of the loader's first batch."""
    show_images(next(iter(loader))[0], "Images in the first batch", path)


def show_forward(ddpm, loader, device=None, path=None):
    """Draws 16 images of the first batch after 0, 25, 50, 75 and 100 % of the forward process."""
    x0 = next(iter(loader))[0][:16].to(device or ddpm.device)
    figure, all_axes = plt.subplots(1, 5, figsize=(12, 2.7), layout="constrained")
    for percent, axes in zip((0, 25, 50, 75, 100), all_axes, strict=True):
        t = max(percent * ddpm.n_steps // 100 - 1, 0)
        noisy = x0 if percent == 0 else ddpm(x0, torch.full((len(x0),), t, device=x0.device))
        axes.imshow(tile(noisy, gap=1), cmap="gray", vmin=0, vmax=255)
        axes.set_title(f"{percent} %")
        axes.axis("off")
    finish(figure, path)


def show_losses(losses, path=None):
    """Draws the loss of each epoch."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, marker=".")
    axes.set(xlabel="epoch", ylabel="mean squared error of the noise", title="Training loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    finish(figure, path)


def finish(figure, path):
    """Writes the figure to `path`, if given, and shows it on a screen or in a notebook."""
    if path:
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=150, bbox_inches="tight", pad_inches=0.05)
    if plt.get_backend().lower() == "agg":
        plt.close(figure)
    else:
        plt.show(block=False)


# %% Main: train, draw, and report every fault in one clear line
def run(flags, device):
    """The whole job, from the images to the GIF. Raises what the functions above raise."""
    start = time.perf_counter()
    rank, world_size = share()
    out_dir = Path(flags.out_dir)
    path = out_dir / ("fashion" if flags.fashion else "mnist")
    store_path = path.with_suffix(".pt")
    if rank == 0:
        prepare_folder(out_dir)
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(flags.SEED)
    if flags.no_train:
        ddpm = load_model(store_path, device)
        schedule = ["fashion", "n_steps", "min_beta", "max_beta"]
        compare_flags(store_path, ddpm.info["flags"], vars(flags), schedule)
    else:
        network = MyUNet(flags.n_steps, betas=(flags.min_beta, flags.max_beta))
        ddpm = MyDDPM(network, flags.n_steps, flags.min_beta, flags.max_beta, device)
    images = load_images(flags.fashion, data_dir=flags.data_dir, device=device)
    loader = Batches(images[: flags.n_images], flags.batch_size)
    print(f"Using device: {device}" + f" ({world_size} processes)" * (world_size > 1))
    print(f"Parameters: {sum(p.numel() for p in ddpm.network.parameters()):,}")
    if rank == 0:
        torch.manual_seed(flags.SEED)
        show_first_batch(loader, f"{path}_first_batch.png")
        torch.manual_seed(flags.SEED)
        show_forward(ddpm, loader, device, f"{path}_forward.png")
    if flags.no_train:
        losses = ddpm.info["losses"]
    else:
        optim, how = Muon(ddpm.parameters(), flags.lr), {"flags": vars(flags)}
        losses = training_loop(ddpm, loader, flags.n_epochs, optim, store_path=store_path, **how)
    if rank == 0:
        show_losses(losses, f"{path}_loss.png")
    gif_name = path.with_suffix(".gif") if rank == 0 else None
    names = ["n_samples", "frames_per_gif", "sample_steps", "guidance", "variance"]
    how = {name: getattr(flags, name) for name in names} | {"seed": flags.SEED}
    generated = generate_new_images(ddpm, device=device, gif_name=gif_name, **how)
    if rank == 0:
        show_images(generated[:10], "Generated images", f"{path}_10.png")
        show_images(generated[:100], "Generated images", f"{path}_100.png")
    seconds = time.perf_counter() - start
    if rank == 0 and not flags.no_train:
        write_note(path.with_suffix(".txt"), flags, device, losses, seconds)
    print(f"Pictures are in {out_dir} ({seconds:.0f} s)")


def write_note(path, flags, device, losses, seconds):
    """Writes into the text file `path` what made the weights and pictures beside it."""
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, np))
    lines = [f"# Python {platform.python_version()}, {versions}"]
    lines += [f"# {device}, {torch.get_num_threads()} threads, {share()[1]} process(es)"]
    lines += [f"# {seconds:.0f} seconds from the images to the pictures"]
    lines += [f"{name} = {getattr(flags, name)!r}" for name in FLAGS if not name.endswith("_dir")]
    lines += ["losses = [" + ", ".join(f"{loss:.4f}" for loss in losses) + "]"]
    with whole_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def prepare_folder(out_dir):
    """Makes the folder of weights and pictures. Raises BadInput if nothing can be written there."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()
    except OSError as error:
        raise BadInput(f"can't write into {out_dir} ({error.strerror}): choose another out_dir")


def main(argv=None):
    """Runs the job with the command line `argv` (None: that of the program).

    Raises SystemExit, after one line on stderr: 2 for bad input, 1 if the loss diverges or a file
    can't be written, 130 after Ctrl-C, 143 after SIGTERM.
    """

    def terminate(signal_number, frame):
        raise KeyboardInterrupt(128 + signal_number)

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        flags, device = read_flags(argv), find_device()
        with all_processes(device, flags.batch_size):
            run(flags, device)
        plt.show()
    except KeyboardInterrupt as stop:
        message = "stopped: add --resume to go on with a training after its last finished epoch"
        status = stop.args[0] if stop.args else 130
    except BadInput as error:
        message, status = error, 2
    except (FloatingPointError, OSError) as error:
        message, status = error, 1
    else:
        return
    finally:
        signal.signal(signal.SIGTERM, previous)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes, one on each machine
        print(f"\nddpm.py: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main([] if "get_ipython" in globals() else None)  # a notebook's command line is not ours
