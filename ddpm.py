# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=2.0", "matplotlib>=3.9",
#                 "einops>=0.8", "imageio>=2.38", "tqdm>=4.67"]
# ///
"""A denoising diffusion probabilistic model of MNIST or Fashion-MNIST, in one file.

    python ddpm.py              train on MNIST, then draw new digits: outputs/mnist.gif and others
    python ddpm.py --fashion    the same with Fashion-MNIST: outputs/fashion.gif and others
    python ddpm.py --no-train   draw from the weights in outputs/, without training
    python ddpm.py --help       all flags

Read it once, from top to bottom: a function calls only what stands above it.

[1] Ho, Jain, Abbeel: Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239
[2] Ho, Salimans: Classifier-Free Diffusion Guidance, 2022, arXiv 2207.12598
[3] Salimans, Ho: Progressive Distillation, 2022, arXiv 2202.00512 (the prediction of v)
[4] Ronneberger, Fischer, Brox: U-Net, 2015, arXiv 1505.04597
[5] Vaswani et al.: Attention Is All You Need, 2017, arXiv 1706.03762 (the time embedding)
[6] Jordan et al.: Muon, 2024, kellerjordan.github.io/posts/muon
[7] Lu et al.: DPM-Solver++, 2022, arXiv 2211.01095 (fewer steps)
[8] Kynkaanniemi et al.: Guidance in a Limited Interval, 2024, arXiv 2404.07724
"""

# %% Imports
import argparse
import ctypes
import gzip
import inspect
import itertools
import math
import os
import re
import sys
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated, get_args

if __name__ == "__main__" and "ipykernel" not in sys.modules:
    os.environ.pop("MPLBACKEND", None)  # of the notebook that started us: unknown here

import imageio.v3 as imageio
import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import MNIST, FashionMNIST
from torchvision.datasets.utils import download_url
from tqdm.auto import tqdm

# A notebook has no file; its folder is the working one.
FILE = Path(globals().get("__file__", "notebook")).resolve()

# %% Flags: change one here, in a notebook, or on the command line: n_epochs = 5 is --n-epochs 5
SEED: Annotated[int, "same seed, flags and machine: same bytes"] = 0
no_train: Annotated[bool, "draw from the weights in out_dir, without training"] = False
fashion: Annotated[bool, "Fashion-MNIST (clothes) instead of MNIST (digits)"] = False
resume: Annotated[bool, "go on after the last finished epoch of a stopped training"] = False
display: Annotated[bool, "draw ten images after each epoch, to watch it learn"] = True
label: Annotated[int | None, "draw only this class; None: every class in turn"] = None
guidance: Annotated[float, "how much the label counts as drawing ends; 1: as trained, 0: not"] = 2.0
n_samples: Annotated[int, "images to draw; the pictures show the first 100"] = 100
sample_steps: Annotated[int | None, "fewer steps to draw in; None: all n_steps"] = None
variance: Annotated[int, "of the noise in a step back; 1: beta_t, 2: beta-tilde_t"] = 2
batch_size: Annotated[int, "images in each training step"] = 64
n_epochs: Annotated[int, "passes over the training images"] = 5
n_images: Annotated[int, "training images; fewer for a quick look"] = 60_000
lr: Annotated[float, "peak learning rate"] = 0.01
n_steps: Annotated[int, "length T of the diffusion"] = 1000
min_beta: Annotated[float, "variance of the noise added in the first step"] = 1e-4
max_beta: Annotated[float, "variance of the noise added in the last step"] = 0.02
mixed_precision: Annotated[bool, "multiply in bf16 where the hardware does; else in fp32"] = True
device: Annotated[str | None, "cpu, cuda, cuda:1, mps; None: CUDA if available"] = None
data_dir: Annotated[str, "folder of the archives of images"] = str(FILE.parent / "datasets")
out_dir: Annotated[str, "folder of the weights and pictures"] = str(FILE.parent / "outputs")
FLAGS = inspect.get_annotations(sys.modules[__name__])  # {name: type and help} of those above


class BadInput(ValueError):
    """An error that the user can put right: the text says what is wrong and what to do."""


def require(condition, text):
    """Raises BadInput with this text unless the condition holds."""
    if not condition:
        raise BadInput(text)


# %% Diffusion: an image drowns in noise, and a network says what the noise is
def multiplies_bf16(device):
    """-> whether the hardware multiplies in bf16, which then is faster than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)


class MyDDPM(nn.Module):
    """The forward process with its linear schedule, and the network that undoes it [1].

    `network` maps x (n, c, h, w) and t (n,) to the noise in x. If it has `n_classes`, it also
    takes labels (n,); if it has `predicts_v`, it returns v of [3] instead of the noise; its own
    `n_steps` is the most it knows. Steps t are counted from 0 to n_steps - 1. `betas`, `alphas`
    and `alpha_bars` are buffers (n_steps,): they move with the model and are saved with it. Raises
    BadInput for an impossible schedule.
    """

    def __init__(
        self, network, n_steps=1000, min_beta=1e-4, max_beta=0.02, device=None, image_chw=None
    ):
        super().__init__()
        most = getattr(network, "n_steps", n_steps)
        require(1 < n_steps <= most, f"n_steps must be from 2 to {most}, not {n_steps}")
        betas = torch.linspace(min_beta, max_beta, n_steps, dtype=torch.float64)
        alphas = 1 - betas
        alpha_bars = alphas.cumprod(0)
        possible = 1e-7 < min_beta < max_beta < 1 and alpha_bars[-1] > 1e-37
        require(possible, "a schedule needs 1e-7 < min_beta < max_beta < 1, and not all noise")
        if alpha_bars[-1] > 0.01:
            text = f"{alpha_bars[-1].sqrt():.0%} of the image is left after {n_steps} steps"
            warnings.warn(f"{text}, but drawing starts from none: raise max_beta", stacklevel=2)
        self.register_buffer("betas", betas.float())
        self.register_buffer("alphas", alphas.float())
        self.register_buffer("alpha_bars", alpha_bars.float())
        self.network = network
        self.n_steps = n_steps
        self.n_classes = getattr(network, "n_classes", 0)
        self.predicts_v = getattr(network, "predicts_v", False)
        self.image_chw = tuple(image_chw or (1, 28, 28))  # training sets it to that of its images
        self.mixed_precision = True
        self.flags = {}  # those of its training, stored with the weights
        self.info = {}  # what load_model found in the file
        self.to(device)

    @property
    def device(self):
        return self.betas.device

    def as_steps(self, t, n):
        """t (n,), (n, 1) or one number -> steps (n,). Raises BadInput outside of the schedule."""
        t = torch.as_tensor(t, device=self.device).flatten().expand(n)
        within = t.min() >= 0 and t.max() < self.n_steps
        require(within, f"steps t must be from 0 to {self.n_steps - 1}")
        return t

    def forward(self, x0, t, eta=None):
        """x0 (n, c, h, w) in [-1, 1], t as in as_steps -> x_t (n, c, h, w), by eq. 4 of [1].

        `eta` (n, c, h, w) is the standard normal noise to add; None draws it.
        """
        eta = torch.randn_like(x0) if eta is None else eta
        alpha_bar = self.alpha_bars[self.as_steps(t, len(x0))].reshape(-1, 1, 1, 1)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eta

    def backward(self, x, t, label=None):
        """x_t (n, c, h, w), t as in as_steps -> eta_theta (n, c, h, w), the noise it sees in x_t.

        `label` (n,) holds classes; the number n_classes means no label, as None does for all.
        """
        t = self.as_steps(t, len(x))
        labels = [] if label is None or not self.n_classes else [label]
        fast = self.mixed_precision and multiplies_bf16(x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=fast):
            prediction = self.network(x, t, *labels).float()
        if not self.predicts_v:
            return prediction
        # v = sqrt(alpha_bar) eta - sqrt(1 - alpha_bar) x0. Where x is nearly all noise, x itself is
        # the prediction, and v corrects it.
        alpha_bar = self.alpha_bars[t].reshape(-1, 1, 1, 1)
        return (1 - alpha_bar).sqrt() * x + alpha_bar.sqrt() * prediction


# %% Network: a UNet that knows the step and the label
def sinusoidal_embedding(n, d):
    """-> (n, d): row t is sin and cos of t at wavelengths from 2 pi to 10,000 * 2 pi [5, sec. 3.5].

    embedding[t, 2i] = sin(t / 10000^(2i / d)), embedding[t, 2i + 1] = cos(t / 10000^(2i / d)).
    """
    frequencies = 10_000 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = torch.outer(torch.arange(n), frequencies)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :d].float()


def conv3x3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, kernel_size=3, padding=1, bias=False)


class Block(nn.Module):
    """Residual block: two convolutions; between them step and label shift each channel."""

    def __init__(self, channels, emb_dim):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, affine=False)  # mean 0, variance 1 in each image
        self.conv1 = conv3x3(channels, channels)
        self.shift = nn.Linear(emb_dim, channels, bias=False)
        self.conv2 = conv3x3(channels, channels)
        nn.init.zeros_(self.conv2.weight)  # at first a block changes nothing

    def forward(self, x, emb):
        h = self.conv1(self.norm(x)) + self.shift(emb)[:, :, None, None]
        return x + self.conv2(F.silu(h))


class MyUNet(nn.Module):
    """UNet [4] with a sinusoidal embedding of the step t [5], and a learned one of the label.

    It works at half and quarter resolution: each 2 x 2 square of pixels becomes channels at once,
    because full resolution costs most and decides least. On the way up, half resolution adds what
    the way down left there.
    """

    predicts_v = True

    def __init__(self, n_steps=1000, time_emb_dim=128, n_classes=10, image_channels=1):
        super().__init__()
        self.settings = [n_steps, time_emb_dim, n_classes, image_channels]  # to build it again
        self.n_steps, self.n_classes = n_steps, n_classes
        half, quarter, d, square = 24, 48, time_emb_dim, 4 * image_channels
        self.register_buffer("embedding", sinusoidal_embedding(n_steps, d), persistent=False)
        self.time = nn.Linear(d, d, bias=False)
        self.label = nn.Embedding(n_classes + 1, d)  # the last row stands for no label
        self.enter = nn.Sequential(nn.PixelUnshuffle(2), conv3x3(square, half))
        self.half_down = nn.ModuleList(Block(half, d) for _ in range(3))
        self.down = nn.Conv2d(half, quarter, kernel_size=2, stride=2, bias=False)
        self.middle = nn.ModuleList(Block(quarter, d) for _ in range(6))
        self.up = nn.ConvTranspose2d(quarter, half, kernel_size=2, stride=2, bias=False)
        self.half_up = nn.ModuleList(Block(half, d) for _ in range(3))
        norm = nn.GroupNorm(1, half, affine=False)
        last = conv3x3(half, square)
        nn.init.zeros_(last.weight)
        self.leave = nn.Sequential(norm, nn.SiLU(), last, nn.PixelShuffle(2))
        self.to(memory_format=torch.channels_last)  # convolutions are faster so

    def forward(self, x, t, label=None):
        """x (n, c, h, w), t and label (n,) or (n, 1) -> v (n, c, h, w)."""
        c, h, w = x.shape[1:]
        require(c == self.settings[3], f"images of {c} channels need MyUNet(image_channels={c})")
        x = F.pad(x, (0, -w % 4, 0, -h % 4))  # to multiples of 4
        label = torch.full_like(t, self.n_classes) if label is None else label
        emb = F.silu(self.time(self.embedding[t.flatten()]) + self.label(label.flatten()))
        at_half = self.enter(x)
        for block in self.half_down:
            at_half = block(at_half, emb)
        at_quarter = self.down(at_half)
        for block in self.middle:
            at_quarter = block(at_quarter, emb)
        at_half = at_half + self.up(at_quarter)
        for block in self.half_up:
            at_half = block(at_half, emb)
        return self.leave(at_half)[..., :h, :w]


# %% Data: images and labels, and the one door through which a training takes them
def load_data(fashion=False, train=True, data_dir=FILE.parent / "datasets"):
    """-> TensorDataset of images (n, 1, 28, 28) in [-1, 1] and labels (n,) from 0 to 9.

    n is 60,000, or 10,000 with train=False. Archives in `data_dir` are read as they are; those
    that are missing or damaged are downloaded. Raises BadInput if that fails.
    """
    source = FashionMNIST if fashion else MNIST
    folder = Path(data_dir).expanduser() / source.__name__ / "raw"
    contents = []
    for name, md5 in source.resources[:2] if train else source.resources[2:]:
        try:
            download_url(source.mirrors[0] + name, folder, name, md5)  # unless it is there, whole
        except (OSError, RuntimeError) as error:
            raise BadInput(f"put {name} as published into {folder}: {error}") from None
        contents.append(bytearray(gzip.decompress((folder / name).read_bytes())))
    images = torch.frombuffer(contents[0], dtype=torch.uint8, offset=16).reshape(-1, 1, 28, 28)
    labels = torch.frombuffer(contents[1], dtype=torch.uint8, offset=8)
    return TensorDataset(images / 127.5 - 1, labels.long())


def images_and_labels(batch, ddpm):
    """A batch of any loader -> x0 (n, c, h, w), and labels (n,) or None, on the model's device.

    A batch is [x0, label, ...], [x0], or x0 alone; labels count if the network knows classes.
    Raises BadInput for what is no image in [-1, 1], or no class.
    """
    x0, *rest = [batch] if isinstance(batch, torch.Tensor) else batch
    floats = x0.ndim == 4 and x0.is_floating_point()
    require(floats, f"images must be floats (n, c, h, w), not {x0.dtype} {tuple(x0.shape)}")
    low, high = x0.aminmax()
    # Eight or more without a dark pixel are surely from 0 to 1.
    within = low >= -1.001 and high <= 1.001 and (low < 0 or len(x0) < 8)
    text = f"images must use the range from -1 to 1, not {low:.3g} to {high:.3g}"
    require(within, f"{text}: 2 * x - 1 if they are from 0 to 1")
    x0 = x0.to(ddpm.device, torch.float32)
    if not rest or not ddpm.n_classes:
        return x0, None
    label = torch.as_tensor(rest[0], device=ddpm.device)
    whole = label.shape == x0.shape[:1] and not label.is_floating_point()
    classes = whole and label.min() >= 0 and label.max() < ddpm.n_classes
    require(classes, f"labels must be {len(x0)} whole numbers from 0 to {ddpm.n_classes - 1}")
    return x0, label.long()


# %% Training: predict the noise
def denoising_loss(ddpm, x0, label=None):
    """Algorithm 1 of [1] without its gradient step. -> mean squared error of the noise.

    x0 is (n, c, h, w) in [-1, 1], label (n,) or None. All steps t count alike. But the error is
    large where there is little noise, and a network that predicts v learns faster from more of
    those steps: t is drawn in proportion to sqrt(alpha_bar), and errors divided by that density.
    """
    n, device = len(x0), x0.device
    density = ddpm.alpha_bars.sqrt() if ddpm.predicts_v else torch.ones_like(ddpm.alpha_bars)
    density = density / density.mean()
    # One t from each of n equally likely parts is less noisy than n free draws.
    u = (torch.randperm(n, device=device) + torch.rand(n, device=device)) / n
    t = torch.searchsorted(density.cumsum(0) / ddpm.n_steps, u).clamp(max=ddpm.n_steps - 1)
    eta = torch.randn_like(x0)
    if label is not None:
        # Guidance needs a prediction without the label: a tenth of the images teach it.
        label = label.masked_fill(torch.rand(n, device=device) < 0.1, ddpm.n_classes)
    eta_theta = ddpm.backward(ddpm(x0, t, eta), t, label)
    errors = (eta_theta - eta).square().mean((1, 2, 3))
    return (errors / density[t]).mean()


def orthogonalize(matrices):
    """Matrices (k, n, m) -> the like with all singular values pulled near 1: Newton-Schulz [6]."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT).mT
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(3):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum in orthogonal steps [6], so that strong directions don't drown weak ones.

    It takes matrices and convolutions; a convolution is a matrix, once flattened. Raises BadInput
    for other weights, or if lr is not positive.
    """

    def __init__(self, params, lr=0.01, momentum=0.95):
        require(0 < lr < math.inf, f"lr must be positive, not {lr}")
        super().__init__(params, {"lr": lr, "momentum": momentum})
        flat = any(p.ndim < 2 for group in self.param_groups for p in group["params"])
        require(not flat, "Muon takes matrices and convolutions only: give vectors to Adam")

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                step = p.grad.lerp(mean, group["momentum"])  # Nesterov's way
                by_shape.setdefault(p.shape, []).append((p, step.flatten(1)))
            for pairs in by_shape.values():
                weights, steps = zip(*pairs, strict=True)
                steps = orthogonalize(torch.stack(steps))
                size = group["lr"] * max(1, steps.shape[1] / steps.shape[2]) ** 0.5
                for p, step in zip(weights, steps, strict=True):
                    p.sub_(size * step.view_as(p))


def train_epoch(ddpm, loader, optim, epoch, n_epochs):
    """One pass over the data, in which the optimizer trains the model.

    Yields after each step the number of images in it, and the mean loss of the epoch so far.
    Raises FloatingPointError if the weights are not finite at the end.
    """
    mean_loss = torch.zeros((), device=ddpm.device)
    for step, batch in enumerate(loader):
        x0, label = images_and_labels(batch, ddpm)
        ddpm.image_chw = tuple(x0.shape[1:])
        ddpm.n_classes = 0 if label is None else ddpm.n_classes
        loss = denoising_loss(ddpm, x0, label)
        ddpm.zero_grad()
        loss.backward()
        # Up to nearly the full rate in a twentieth of the training, then straight down to 0.
        progress = (epoch - 1 + (step + 0.5) / len(loader)) / n_epochs
        factor = min(20 * progress, 1 - progress)
        for group in optim.param_groups:
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
        optim.step()
        mean_loss += (loss.detach() - mean_loss) / (step + 1)
        yield len(x0), mean_loss
    # Weights that are not finite stay so: to look once an epoch is enough.
    if not all(tensor.isfinite().all() for tensor in [mean_loss, *ddpm.parameters()]):
        raise FloatingPointError(f"the loss is not finite in epoch {epoch}: give a lower lr")


# %% Drawing: from noise to images
def predict_x0(ddpm, x, t, label=None, guidance=1.0):
    """x_t (n, c, h, w), its step t, one for all -> the predicted x_0, clipped to [-1, 1].

    `guidance` [2] is how much the label counts: 1 as trained, 0 not at all. More exaggerates it:
    as t falls from 0.6 n_steps to 0, it rises from 1 to `guidance`. At noisier steps it would only
    make images more alike [8].
    """
    if guidance > 1:
        guidance = 1 + (guidance - 1) * max(0, 1 - t / (0.6 * ddpm.n_steps))
    eta_theta = ddpm.backward(x, t, label)
    if guidance != 1 and label is not None and ddpm.n_classes:
        without_label = ddpm.backward(x, t)
        eta_theta = without_label + guidance * (eta_theta - without_label)
    alpha_bar = ddpm.alpha_bars[t]  # what follows is eq. 4 solved for x_0
    return ((x - (1 - alpha_bar).sqrt() * eta_theta) / alpha_bar.sqrt()).clamp(-1, 1)


def falling_steps(n, highest):
    """-> n falling whole numbers from `highest` to 0, the lower the denser, none of them twice.

    A single one is `highest`.
    """
    steps = highest * np.linspace(1, 0, n) ** 2
    return np.maximum(steps.round(), np.arange(n)[::-1]).astype(int).tolist()


@torch.no_grad()
def reverse_process(ddpm, x, label, guidance, n_steps, variance, generator=None):
    """Yields x_T, the noise x (n, c, h, w) itself, then x after each step back; the last is x_0.

    A step from t to an earlier s draws x_s from q(x_s given x_t and x_0), which is eq. 7 of [1]
    with alpha_bar_t / alpha_bar_s in place of alpha_t; with s = t - 1 this is Algorithm 2. Its
    variance is beta-tilde, or beta with variance=1. Where steps are left out, x_0 is what the
    straight line through the last two predictions, over the logarithm of the signal-to-noise
    ratio, says of the middle between t and s [7].
    """
    alpha_bars = [*ddpm.alpha_bars.tolist(), 1.0]  # the last is that of x_0, at "step" -1
    log_snr = ddpm.alpha_bars.cpu().double().logit().tolist()
    last_t = last_x0 = None
    was_training = ddpm.training
    ddpm.eval()
    yield x
    for t, s in itertools.pairwise([*falling_steps(n_steps, ddpm.n_steps - 1), -1]):
        x0 = middle_x0 = predict_x0(ddpm, x, t, label, guidance)
        if s < t - 1 and last_x0 is not None:
            slope = (x0 - last_x0) / (log_snr[t] - log_snr[last_t])
            middle_x0 = x0 + slope * (log_snr[s] - log_snr[t]) / 2
        last_t, last_x0 = t, x0
        a_t, a_s = alpha_bars[t], alpha_bars[s]
        alpha = a_t / a_s
        beta = 1 - alpha
        x = (a_s**0.5 * beta * middle_x0 + alpha**0.5 * (1 - a_s) * x) / (1 - a_t)
        if s >= 0:
            beta_tilde = (1 - a_s) / (1 - a_t) * beta
            z = torch.randn(x.shape, generator=generator, device=x.device)
            x = x + (beta if variance == 1 else beta_tilde) ** 0.5 * z
        yield x
    ddpm.train(was_training)


# %% Pictures: one grey scale, -1 is black and 1 is white
def tile(images, gap=0, columns=10):
    """Images (n, c, h, w) in [-1, 1] -> one uint8 picture (height, width), or (.., 3) of colours.

    Ten in a row, so that classes in turn have a column each, with `gap` pixels between them. Of
    channels that are not colours it shows the first.
    """
    require(len(images), "there is no image to show")
    images = images if images.shape[1] == 3 else images[:, :1]
    columns = min(columns, len(images))
    blanks = -len(images) % columns
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = F.pad(pixels, (0, gap, 0, gap, 0, 0, 0, blanks))
    grid = rearrange(pixels, "(row column) c h w -> (row h) (column w) c", column=columns)
    return grid.squeeze(2).cpu().numpy()


def write_gif(frames, path):
    """Writes uint8 pictures as a GIF that rests on the first and on the last of them."""
    frames = [frame // 16 * 17 for frame in frames[:-1]] + frames[-1:]  # noise needs few greys
    durations = [500] + [60] * (len(frames) - 2) + [3000]  # in ms
    imageio.imwrite(path, frames, extension=".gif", duration=durations, loop=0)


def show_figure(figure, path=None):
    """Writes the figure to `path`, if given; shows it in a notebook, or if there is no path."""
    try:
        if path:
            figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.05)
        if not path or "ipykernel" in sys.modules:
            plt.show()
    finally:
        plt.close(figure)


def show_images(images, title="", path=None, columns=10):
    """Draws images (n, c, h, w) in [-1, 1] as one grid."""
    grid = tile(torch.as_tensor(images).detach(), gap=1, columns=columns)
    figure, axes = plt.subplots(figsize=(7, 7 * grid.shape[0] / grid.shape[1] + 0.4))
    axes.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_title(title)
    axes.axis("off")
    show_figure(figure, path)


def first_batch(loader):
    """-> images (n, c, h, w) of a loader of [x0, label, ...], [x0] or x0."""
    batch = next(iter(loader))
    return batch if isinstance(batch, torch.Tensor) else batch[0]


def show_first_batch(loader, path=None):
    """Draws the images of the loader's first batch."""
    show_images(first_batch(loader), "Images in the first batch", path)


def show_forward(ddpm, loader, device=None, path=None):
    """Draws ten images of the first batch after 0, 25, 50, 75 and 100 % of the forward process."""
    x0 = first_batch(loader)[:10].to(ddpm.to(device or ddpm.device).device)
    steps = [max(ddpm.n_steps * percent // 100 - 1, 0) for percent in (25, 50, 75, 100)]
    rows = [x0] + [ddpm(x0, t) for t in steps]
    show_images(torch.cat(rows), "After 0, 25, 50, 75 and 100 % of the steps", path, len(x0))


def show_losses(losses, path=None):
    """Draws the loss of each epoch."""
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(range(1, len(losses) + 1), losses, marker=".")
    axes.set(xlabel="epoch", ylabel="mean squared error of the noise", title="Training loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    show_figure(figure, path)


# %% Progress
def say(text):
    """Prints a line above the progress bars; it is seen at once, in a file or a pipe too."""
    tqdm.write(text)
    sys.stdout.flush()


class Lines:
    """Where there is no terminal, what a progress bar writes becomes lines."""

    def write(self, text):
        if text.strip():
            say(text.strip())


def progress_bar(task, total, unit):
    """-> tqdm bar on a terminal or in a notebook; elsewhere a line after 15 s, then each minute."""
    look = {"desc": task, "total": total, "unit": f" {unit}", "leave": False}
    if "ipykernel" in sys.modules or sys.stderr.isatty():
        return tqdm(**look)
    line = "{desc}{postfix}, {percentage:.0f} %, {rate_noinv_fmt}, {remaining} left"
    look |= {"bar_format": line, "file": Lines(), "position": 0}
    bar = tqdm(**look, mininterval=60, miniters=1, delay=1, smoothing=0)
    bar.last_print_t -= 45  # so that the first line comes after 15
    return bar


# %% New images
def check_drawing(ddpm, n_samples, label, guidance, sample_steps, variance):
    """-> labels (n_samples,) to draw. Raises BadInput for arguments that make no sense."""
    require(isinstance(ddpm, MyDDPM), f"a MyDDPM draws images, not a {type(ddpm).__name__}")
    require(n_samples >= 1, f"n_samples must be at least 1, not {n_samples}")
    require(sample_steps is None or sample_steps >= 1, "sample_steps must be at least 1, or None")
    require(0 <= guidance < math.inf, f"guidance must be 0 or more, not {guidance}")
    require(variance in (1, 2), f"variance must be 1 (beta) or 2 (beta-tilde), not {variance}")
    n_classes = ddpm.n_classes
    text = f"label must be None, one of {n_classes} classes, or {n_samples} of them, not {label!r}"
    try:
        in_turn = torch.arange(n_samples) % max(n_classes, 1)
        labels = in_turn if label is None else torch.as_tensor(label).expand(n_samples)
    except (TypeError, ValueError, RuntimeError):
        raise BadInput(text) from None
    whole = not labels.is_floating_point() and labels.min() >= 0
    require(label is None or (whole and labels.max() < n_classes), text)
    return labels


def generate_new_images(
    ddpm,
    n_samples=16,
    device=None,
    frames_per_gif=60,
    gif_name="sampling.gif",
    c=None,
    h=None,
    w=None,
    label=None,
    guidance=2.0,
    sample_steps=None,
    variance=2,
    SEED=0,
):
    """-> n_samples new images (n, c, h, w) in [-1, 1]; the GIF shows how the first 100 come about.

    `label` is a class, or one for each image; None is every class in turn. Raises BadInput.
    """
    labels = check_drawing(ddpm, n_samples, label, guidance, sample_steps, variance)
    require(not gif_name or Path(gif_name).parent.is_dir(), f"there is no folder for {gif_name}")
    device = ddpm.to(device or ddpm.device).device
    chw = [given or own for given, own in zip((c, h, w), ddpm.image_chw, strict=True)]
    n_steps = min(sample_steps or ddpm.n_steps, ddpm.n_steps)
    shown = falling_steps(max(2, min(frames_per_gif, n_steps + 1)), n_steps)
    generator = torch.Generator(device).manual_seed(SEED)
    noise = torch.randn(n_samples, *chw, generator=generator, device=device)
    bar = progress_bar("Drawing", math.ceil(n_samples / 500) * (n_steps + 1), "steps")
    images, frames = [], []
    for start, chunk in zip(noise.split(500), labels.to(device).split(500), strict=True):
        way = reverse_process(ddpm, start, chunk, guidance, n_steps, variance, generator)
        for left, x in zip(range(n_steps, -1, -1), way, strict=True):
            if gif_name and left in shown and not images:
                frames.append(tile(x[:100]))
            bar.update()
        images.append(x)
    bar.close()
    if gif_name:
        write_gif(frames, gif_name)
    return torch.cat(images)


# %% The whole training, and its file
def store(path, ddpm, losses, training=None):
    """Writes the model with all that load_model needs, and its optimizer if training goes on.

    A kill or a full disk leaves the old file as it was. Raises OSError if it can't be written.
    """
    checkpoint = {
        "weights": ddpm.state_dict(),
        "network": type(ddpm.network).__name__,
        "settings": getattr(ddpm.network, "settings", None),
        "schedule": [ddpm.n_steps, ddpm.betas[0].item(), ddpm.betas[-1].item()],
        "image_chw": ddpm.image_chw,
        "n_classes": ddpm.n_classes,
        "losses": losses,
        "flags": ddpm.flags,
        "training": training,
    }
    temporary = f"{path}.{os.getpid()}"
    try:
        torch.save(checkpoint, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise OSError(f"can't write {path}: {error}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def load_model(store_path, device=None, network=None):
    """-> MyDDPM in eval mode, rebuilt from the file alone; `.info` holds all that is in it.

    `network` takes the weights if they are not those of MyUNet. Raises BadInput if the file is
    missing, damaged, holds code, or doesn't fit the network.
    """
    holds = "nothing that ddpm.py stored"
    try:
        with zipfile.ZipFile(store_path) as archive:
            require(not archive.testzip(), "a wrong checksum")  # torch.load doesn't look at them
        info = torch.load(store_path, map_location="cpu", weights_only=True)
        holds = f"weights of {info['network']}, which don't fit"
        ddpm = MyDDPM(network or MyUNet(*info["settings"]), *info["schedule"])
        ddpm.load_state_dict(info["weights"])
    except Exception as error:  # noqa: BLE001 - a foreign file can raise almost anything
        remedy = "train first, or load_model(path, network=...) with the network that was trained"
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise BadInput(f"{store_path} holds {holds}: {remedy} ({reason})") from None
    ddpm.info = info | {"path": str(store_path)}
    ddpm.flags, ddpm.n_classes = info["flags"], info["n_classes"]
    ddpm.image_chw = tuple(info["image_chw"])
    return ddpm.to(device).eval()


def unfinished(ddpm):
    """-> what load_model found. Raises BadInput unless a training was stopped there."""
    text = f"{ddpm.info.get('path')} holds no stopped training: draw with --no-train, or train anew"
    require(ddpm.info.get("training"), text)
    return ddpm.info


def preview(ddpm, title, store_path):
    """Draws ten images in 20 steps beside the weights; a full disk does not end the training."""
    images = generate_new_images(ddpm, 10, gif_name=None, sample_steps=20)
    with suppress(OSError):
        show_images(images, title, f"{Path(store_path).with_suffix('')}_10.png")


def training_loop(
    ddpm, loader, n_epochs, optim, device=None, display=False, store_path="ddpm.pt", resume=False
):
    """Algorithm 1 of [1] on batches [x0, label] or [x0] of a DataLoader. -> loss of each epoch.

    After each epoch the weights go into `store_path`, and draw ten images if `display`. With
    `resume` a loaded `ddpm` goes on, and ends as if never stopped if torch's seed, the data and
    n_epochs are the same. Raises BadInput, and FloatingPointError if the loss is not finite.
    """
    require(isinstance(optim, torch.optim.Optimizer), f"optim must be an optimizer, not {optim}")
    require(Path(store_path).parent.is_dir(), f"there is no folder for {store_path}")
    require(len(loader), "the loader has no batch: it needs more images, or a lower batch_size")
    ddpm.to(device or ddpm.device).train()
    losses, seed = [], torch.initial_seed()
    if resume:
        losses = unfinished(ddpm)["losses"]
        optim.load_state_dict(ddpm.info["training"])
    bar = progress_bar("Training", (n_epochs - len(losses)) * len(loader.dataset), "images")
    try:
        for epoch in range(len(losses) + 1, n_epochs + 1):
            torch.manual_seed((1_000_003 * seed + epoch) % 2**63)
            for n, loss in train_epoch(ddpm, loader, optim, epoch, n_epochs):
                bar.set_postfix_str(f"epoch {epoch}/{n_epochs}, loss {loss:.3f}", refresh=False)
                bar.update(n)
            training = None if epoch == n_epochs else optim.state_dict()
            store(store_path, ddpm, [*losses, loss.item()], training)
            losses = [*losses, loss.item()]
            say(f"Loss at epoch {epoch}: {losses[-1]:.4f} (stored in {store_path})")
            if display:
                preview(ddpm, f"After epoch {epoch}", store_path)
    except KeyboardInterrupt:
        left = f"--resume goes on after epoch {len(losses)}" if losses else "nothing was stored"
        stored = left if len(losses) < n_epochs else "the training had ended"
        raise KeyboardInterrupt(f"stopped; {stored}") from None
    bar.close()
    return losses


# %% Running it: flags, device, main
SCHEDULE = ["fashion", "n_steps", "min_beta", "max_beta"]
TRAINING = [*SCHEDULE, "SEED", "batch_size", "n_epochs", "n_images", "lr", "mixed_precision"]
DRAWING = ["n_samples", "label", "guidance", "sample_steps", "variance"]


def read_flags(argv=None):
    """-> Namespace of the flags: those on the command line `argv`, and else those at the top.

    argv=None is the program's command line, if that is ours; `given` are the names on it. Raises
    BadInput for an unknown flag or a value of another type.
    """
    if argv is None:
        argv = sys.argv[1:] if Path(sys.argv[0]).resolve() == FILE else []
    argv = [re.sub("^--[^=]+", lambda m: m[0].lower().replace("_", "-"), word) for word in argv]

    def refuse(message):
        raise BadInput(f"{message} (--help lists the flags)")

    def switch(word):
        return bool(("false", "true").index(word.lower()))

    classes = ", ".join(f"{i} {name}" for i, name in enumerate(FashionMNIST.classes))
    parser = argparse.ArgumentParser(epilog=f"The labels of Fashion-MNIST are {classes}.")
    parser.error = refuse
    top = []  # the values at the top, as words: they are parsed and checked like those given
    for name, note in FLAGS.items():
        kind, value, dashed = note.__origin__, globals()[name], name.lower().replace("_", "-")
        text = f"{note.__metadata__[0]} (now {value})".replace("%", "%%")
        if kind is bool:
            parsing = {"type": switch, "nargs": "?", "const": True}
            off = {"action": "store_false", "default": None, "help": argparse.SUPPRESS}
            parser.add_argument(f"--no-{dashed}", dest=name, **off)
        else:
            parsing = {"type": (get_args(kind) or [kind])[0]}  # of int | None: int
        parser.add_argument(f"--{dashed}", dest=name, help=text, **parsing)
        top += [] if value is None and get_args(kind) else [f"--{dashed}={value}"]
    given = {name for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    return argparse.Namespace(given=given, **vars(parser.parse_args(top + argv)))


def make_model(flags, store_path, device):
    """-> MyDDPM, new or from the file, whose flags then replace those in `flags`.

    Raises BadInput if a given flag differs; `fashion` counts as given, as it names the file.
    """
    if not flags.no_train and not flags.resume:
        schedule = [flags.n_steps, flags.min_beta, flags.max_beta]
        return MyDDPM(MyUNet(flags.n_steps), *schedule, device)
    ddpm = load_model(store_path, device)
    if flags.resume:
        unfinished(ddpm)
    for name in TRAINING if flags.resume else SCHEDULE:
        value, asked = ddpm.flags.get(name, vars(flags)[name]), vars(flags)[name]
        text = f"{store_path} was trained with {name} {value}, not {asked}: leave {name} out"
        require(value == asked or name not in flags.given | {"fashion"}, text)
        setattr(flags, name, value)
    return ddpm


def find_device(name=None):
    """-> the device of that name; None is CUDA if available, or else the CPU."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"there is no device {name}: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def run(flags=None):
    """The whole job with these flags (None: those at the top). Raises what main catches."""
    flags = flags or read_flags([])
    require(0 <= flags.SEED < 2**32, f"SEED must be from 0 to 2^32 - 1, not {flags.SEED}")
    for name, least in {"n_steps": 2, "n_epochs": 1, "n_images": 1, "batch_size": 1}.items():
        require(vars(flags)[name] >= least, f"{name} must be at least {least}")
    path = Path(flags.out_dir).expanduser() / ("fashion" if flags.fashion else "mnist")
    store_path, device = path.with_suffix(".pt"), find_device(flags.device)
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(flags.SEED)
    ddpm = make_model(flags, store_path, device)
    ddpm.mixed_precision = flags.mixed_precision
    drawing = {name: vars(flags)[name] for name in DRAWING}
    check_drawing(ddpm, **drawing)
    say(f"Using device: {device}, {torch.get_num_threads()} threads")
    say(f"Parameters: {sum(p.numel() for p in ddpm.network.parameters()):,}")
    say(f"Schedule: {ddpm.n_steps} steps, beta from {ddpm.betas[0]:g} to {ddpm.betas[-1]:g}")
    if not flags.no_train:
        dataset = load_data(flags.fashion, data_dir=flags.data_dir)
        dataset = TensorDataset(*dataset[: flags.n_images])
        loader = DataLoader(dataset, flags.batch_size, shuffle=True)
        optim = Muon(ddpm.network.parameters(), flags.lr)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(flags.SEED)  # again: with resume it is that of the file
        show_first_batch(loader, f"{path}_first_batch.png")
        show_forward(ddpm, loader, device, f"{path}_forward.png")
        ddpm.flags = {name: vars(flags)[name] for name in TRAINING}
        how = {"store_path": store_path, "resume": flags.resume}
        losses = training_loop(ddpm, loader, flags.n_epochs, optim, device, flags.display, **how)
        show_losses(losses, f"{path}_loss.png")
    images = generate_new_images(ddpm, gif_name=f"{path}.gif", SEED=flags.SEED, **drawing)
    show_images(images[:10], "Generated images", f"{path}_10.png")
    show_images(images[:100], "Generated images", f"{path}_100.png")
    np.save(f"{path}_images.npy", images.cpu())
    say(f"Pictures are in {path.parent}")


def keep_freed_memory():
    """Tells glibc so: fetching it again in each step would take an eighth of the training."""
    with suppress(OSError, AttributeError):  # another system
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main(argv=None):
    """Runs the job with the command line `argv` (None: that of the program).

    Raises SystemExit after one line on stderr: status 2 for bad input, 1 if the loss is not finite
    or a file can't be written, 130 after Ctrl-C.
    """
    # Without a console they are None.
    sys.stderr = sys.stderr or sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stdout = sys.stdout or sys.stderr
    keep_freed_memory()
    try:
        run(read_flags(argv))
        return
    except KeyboardInterrupt as error:
        message, status = str(error) or "stopped", 130
    except BadInput as error:
        message, status = error, 2
    except (FloatingPointError, OSError) as error:
        message, status = error, 1
    print("\nddpm.py:", *str(message).split(), file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
