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

To be read from top to bottom: flags, data, diffusion, network, training, sampling, pictures, and
last the plumbing that a program needs around them.

[1] Ho, Jain, Abbeel: Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239
[2] Ho, Salimans: Classifier-Free Diffusion Guidance, 2022, arXiv 2207.12598
[3] Salimans, Ho: Progressive Distillation, 2022, arXiv 2202.00512 (the prediction of v)
[4] Ronneberger, Fischer, Brox: U-Net, 2015, arXiv 1505.04597
[5] Vaswani et al.: Attention Is All You Need, 2017, arXiv 1706.03762 (the time embedding)
[6] Jordan et al.: Muon, 2024, kellerjordan.github.io/posts/muon
[7] Lu et al.: DPM-Solver++, 2022, arXiv 2211.01095 (the fast sampler)
[8] Kynkaanniemi et al.: Guidance in a Limited Interval, 2024, arXiv 2404.07724
"""

# %% Imports
import argparse
import io
import itertools
import os
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import imageio.v3 as imageio
import matplotlib.pyplot as plt
import numpy as np
import torch
from einops.layers.torch import Rearrange
from torch import distributed, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchvision.datasets import MNIST, FashionMNIST
from torchvision.utils import make_grid
from tqdm.auto import tqdm

HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()

# %% Flags: change one here, in a notebook, or on the command line: n_epochs = 5 is --n-epochs 5
SEED = 0
no_train = False
fashion = False
resume = False
display = True
label = -1
guidance = 2.0
n_samples = 100
sample_steps = 0
variance = 2
batch_size = 128
n_epochs = 14
n_images = 60_000
lr = 0.01
n_steps = 1000
min_beta = 1e-4
max_beta = 0.02
out_dir = str(HERE / "outputs")

FLAGS = {  # name: (what it is, type, smallest and largest value)
    "SEED": ("of all randomness; same seed, flags and machine: same bytes", int, 0, 4_294_967_295),
    "no_train": ("draw from the weights in out_dir, without training", bool),
    "fashion": ("Fashion-MNIST (clothes) instead of MNIST (digits)", bool),
    "resume": ("go on after the last finished epoch of a training that was stopped", bool),
    "display": ("draw ten images after each epoch, to watch it learn", bool),
    "label": ("draw only this class; -1: every class in turn", int, -1, 9),
    "guidance": ("strength of the label in the end; 1: as trained, 0: none", float, 0, 10),
    "n_samples": ("images to draw; the pictures show the first 100", int, 1, 1_000_000),
    "sample_steps": ("steps of the fast sampler; 0: the whole chain of n_steps", int, 0, 100_000),
    "variance": ("of the noise in the whole chain; 1: beta_t, 2: beta-tilde_t", int, 1, 2),
    "batch_size": ("images in each training step", int, 1, 60_000),
    "n_epochs": ("passes over the training images", int, 1, 100_000),
    "n_images": ("training images; fewer for a quick look", int, 1, 60_000),
    "lr": ("peak learning rate of Muon; Adam has a tenth of it", float, 1e-9, 1e30),
    "n_steps": ("length T of the diffusion", int, 2, 100_000),
    "min_beta": ("variance of the noise added in the first step", float, 0, 1),
    "max_beta": ("variance of the noise added in the last step", float, 0, 1),
    "out_dir": ("folder of the weights and pictures", str),
}


# %% Data: all images are one tensor, and a batch is one indexing operation
def load_data(fashion=False, train=True, data_dir=HERE / "datasets", device=None):
    """-> TensorDataset of images (n, 1, 28, 28) in [-1, 1] and labels (n,) from 0 to 9.

    n is 60,000, or 10,000 with train=False. torchvision checks and unpacks the archives in
    `data_dir`, and downloads those that are missing. Raises BadInput if that fails.
    """
    source = FashionMNIST if fashion else MNIST
    try:
        data = source(data_dir, train=train, download=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        names = " ".join(name for name, _ in source.resources)
        folder = Path(data_dir, source.__name__, "raw")
        raise BadInput(f"{error}: {folder} must hold {names} as published, no others") from None
    images = data.data.to(device).unsqueeze(1).float() / 127.5 - 1
    return TensorDataset(images, data.targets.to(device))


def batches(dataset, batch_size):
    """-> DataLoader of [x0, label] in a new random order each time; the last may be smaller."""
    sampler = BatchSampler(RandomSampler(dataset), batch_size, drop_last=False)
    return DataLoader(dataset, sampler=sampler, batch_size=None)


# %% Diffusion: an image drowns in noise, and a network says what the noise is
class MyDDPM(nn.Module):
    """The forward process with its linear schedule, and the network that undoes it [1].

    `network` maps x (n, c, h, w) and t (n,) to the noise in x. If it has `n_classes`, it also
    takes labels (n,); if it has `predicts_v`, it returns v of [3] instead of the noise. Steps t
    are counted from 0 to n_steps - 1. `betas`, `alphas` and `alpha_bars` are buffers (n_steps,):
    they move with the model and are saved with it. Raises BadInput for an impossible schedule.
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
        betas = torch.linspace(min_beta, max_beta, n_steps, dtype=torch.float64)
        alphas = 1 - betas
        alpha_bars = alphas.cumprod(0)
        if not (n_steps > 1 and 1e-7 < min_beta < max_beta < 1 and alpha_bars[-1] > 1e-37):
            raise BadInput("a schedule needs 1e-7 < min_beta < max_beta < 1, and not all noise")
        for name, values in [("betas", betas), ("alphas", alphas), ("alpha_bars", alpha_bars)]:
            self.register_buffer(name, values.float())
        self.network = network
        self.n_steps = n_steps
        self.n_classes = getattr(network, "n_classes", 0)
        self.image_chw = tuple(image_chw)
        self.to(device)

    @property
    def device(self):
        return self.betas.device

    def forward(self, x0, t, eta=None):
        """x0 (n, c, h, w) in [-1, 1], t (n,) -> x_t (n, c, h, w), in one jump: eq. 4 of [1].

        `eta` (n, c, h, w) is the standard normal noise to add; None draws it.
        """
        if eta is None:
            eta = torch.randn_like(x0)
        alpha_bar = self.alpha_bars[torch.as_tensor(t, device=self.device)].reshape(-1, 1, 1, 1)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eta

    def backward(self, x, t, label=None, guidance=1):
        """x_t (n, c, h, w), t (n,) or (n, 1) -> eta_theta (n, c, h, w), the predicted noise.

        `label` (n,) holds classes; n_classes, or None for all, stands for no label. With guidance
        [2] it is without_label + guidance * (with_label - without_label).
        """
        t = t.flatten()
        label = label if self.n_classes and guidance else None
        if label is not None and guidance != 1:
            labels = torch.cat([torch.full_like(label, self.n_classes), label])
            both = self.backward(x.repeat(2, 1, 1, 1), t.repeat(2), labels)
            without_label, with_label = both.chunk(2)
            return without_label.lerp(with_label, guidance)
        with fast_precision(x.device):
            prediction = self.network(x, t) if label is None else self.network(x, t, label)
        if not getattr(self.network, "predicts_v", False):
            return prediction.float()
        # Late steps are nearly all noise: there x itself is the prediction, and v corrects it.
        alpha_bar = self.alpha_bars[t].reshape(-1, 1, 1, 1)
        return (1 - alpha_bar).sqrt() * x + alpha_bar.sqrt() * prediction.float()


# %% Network: a UNet that knows the step and the label
def sinusoidal_embedding(n, d):
    """-> (n, d): row t is sin and cos of t at wavelengths from 2 pi to 10,000 * 2 pi [5, sec. 3.5].

    embedding[t, 2i] = sin(t / 10000^(2i / d)), embedding[t, 2i + 1] = cos(t / 10000^(2i / d)).
    """
    t = torch.arange(n, dtype=torch.float64).reshape(n, 1)
    wk = 10_000 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    pairs = torch.stack([torch.sin(t * wk), torch.cos(t * wk)], dim=2)
    return pairs.flatten(1)[:, :d].float()


class Conv(nn.Linear):
    """A 3 x 3 convolution without bias of (n, h, w, c_in) to (n, h, w, c_out).

    Its weights are a matrix, as Muon needs them. Channels come last, as in all of the network.
    """

    def __init__(self, c_in, c_out):
        super().__init__(9 * c_in, c_out, bias=False)

    def forward(self, x):
        kernel = self.weight.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        x = F.conv2d(x.permute(0, 3, 1, 2), kernel, padding=1)
        return x.permute(0, 2, 3, 1)


def normalize(x):
    """-> x (n, h, w, c) with mean 0 and variance 1 in each image."""
    return F.layer_norm(x, x.shape[1:])


class Block(nn.Module):
    """Residual block: two convolutions; between them step and label shift each channel."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = Conv(channels, channels)
        self.conv2 = Conv(channels, channels)
        nn.init.zeros_(self.conv2.weight)  # at first a block changes nothing

    def forward(self, x, shift):
        h = self.conv1(normalize(x)) + shift
        return x + self.conv2(F.silu(h))


class MyUNet(nn.Module):
    """UNet [4] with a sinusoidal embedding of the step t [5], and a learned one of the label.

    It works at half and quarter resolution: each 2 x 2 square of pixels becomes channels at once,
    because full resolution costs most and decides least. On the way up, half resolution adds what
    the way down left there. `settings` are the arguments that build it again.
    """

    predicts_v = True

    def __init__(self, n_steps=1000, time_emb_dim=128, n_classes=10, image_channels=1):
        super().__init__()
        self.settings = [n_steps, time_emb_dim, n_classes, image_channels]
        self.n_classes = n_classes
        half, quarter, depth, e = 32, 64, 4, time_emb_dim
        self.register_buffer("embedding", sinusoidal_embedding(n_steps, e), persistent=False)
        self.time = nn.Sequential(nn.Linear(e, e), nn.SiLU(), nn.Linear(e, e))
        self.label = nn.Embedding(n_classes + 1, e)  # the last row stands for no label
        self.widths = [half] * depth + [quarter] * depth + [half] * depth
        self.shifts = nn.Linear(e, sum(self.widths))  # of all blocks at once
        fold = Rearrange("n (h i) (w j) c -> n h w (i j c)", i=2, j=2)
        unfold = Rearrange("n h w (i j c) -> n (h i) (w j) c", i=2, j=2)
        self.enter = nn.Sequential(fold, Conv(4 * image_channels, half))
        self.half_down = nn.ModuleList(Block(half) for _ in range(depth))
        self.down = nn.Sequential(fold, nn.Linear(4 * half, quarter))
        self.middle = nn.ModuleList(Block(quarter) for _ in range(depth))
        self.up = nn.Sequential(nn.Linear(quarter, 4 * half), unfold)
        self.half_up = nn.ModuleList(Block(half) for _ in range(depth))
        last = Conv(half, 4 * image_channels)
        nn.init.zeros_(last.weight)
        self.leave = nn.Sequential(last, unfold)

    def forward(self, x, t, label=None):
        """x (n, c, h, w), h and w multiples of 4, t and label (n,) or (n, 1) -> v, shaped like x."""
        if label is None:
            label = torch.full_like(t, self.n_classes)
        e = F.silu(self.time(self.embedding[t.flatten()]) + self.label(label.flatten()))
        shifts = iter(self.shifts(e)[:, None, None].split(self.widths, dim=-1))
        half = self.enter(x.permute(0, 2, 3, 1))
        for block in self.half_down:
            half = block(half, next(shifts))
        quarter = self.down(half)
        for block in self.middle:
            quarter = block(quarter, next(shifts))
        half = half + self.up(quarter)
        for block in self.half_up:
            half = block(half, next(shifts))
        return self.leave(F.silu(normalize(half))).permute(0, 3, 1, 2)


# %% Training: predict the noise
def denoising_loss(ddpm, x0, label=None):
    """Algorithm 1 of [1] up to its gradient. -> weighted loss to minimize, plain loss to report.

    x0 is (n, c, h, w) in [-1, 1], label (n,) or None. All processes draw the same steps and noise
    and take their shares of the batch: their losses, and so their gradients, add up.
    """
    n, (rank, world_size) = len(x0), rank_and_size()
    # One t from each of n parts of the range is less noisy than n free draws. Early steps are
    # drawn up to 20 times as often as late ones, and their errors divided by that: the density
    # falls in a straight line, and u is the share of it that lies before `fraction`.
    u = (torch.arange(n, device=x0.device) + torch.rand(n, device=x0.device)) / n
    fraction = (1 - (1 - 0.9975 * u).sqrt()) / 0.95
    density = (1 - 0.95 * fraction) / 0.525
    t = (fraction * ddpm.n_steps).long().clamp(max=ddpm.n_steps - 1)
    eta = torch.randn_like(x0)
    share = slice(rank, None, world_size)
    if label is not None:
        # Guidance needs a prediction without the label: a tenth of the images teach it.
        dropped = torch.rand(n, device=x0.device) < 0.1
        label = label.masked_fill(dropped, ddpm.n_classes)[share]
    x0, t, eta = x0[share], t[share], eta[share]
    eta_theta = ddpm.backward(ddpm(x0, t, eta), t, label)
    errors = (eta_theta - eta).square().mean((1, 2, 3)) / density[share] / n
    # Late steps decide the shape of an image, but their errors are small: they count for more.
    return (errors / ddpm.alpha_bars[t].sqrt()).sum(), errors.detach().sum()


def make_optimizers(network, lr):
    """-> [Muon [6] for matrices (the label embedding is one too), Adam for vectors]."""
    matrices = [p for p in network.parameters() if p.ndim == 2]
    vectors = [p for p in network.parameters() if p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr, weight_decay=0, ns_steps=3)
    return [muon, torch.optim.Adam(vectors, lr / 10)]


def running_average(averaged, current, n):
    """-> average of a weight over about the last sixteenth of the n steps so far."""
    return averaged.lerp(current, 16 / (16 + n))


def training_loop(
    ddpm, loader, n_epochs, optim, device=None, display=False, store_path="ddpm.pt", flags=None
):
    """Algorithm 1 of [1] on batches [x0, label] or [x0] of `loader`. -> mean error of each epoch.

    `optim` is one optimizer or a list of them, whose learning rates rise and fall. After each epoch
    the averaged weights and `flags` (a dict) go into `store_path`, and ten images are drawn if
    `display`; at the end `ddpm` holds these weights. With flags["resume"] it goes on where the
    loaded `ddpm` had stopped. Raises FloatingPointError if the loss is not finite.
    """
    flags = vars(current_flags(**flags or {}))
    ddpm.to(device or ddpm.device).train()
    averaged = AveragedModel(ddpm, avg_fn=running_average)
    optims = optim if isinstance(optim, list) else [optim]
    losses, parts = [], [ddpm, averaged, *optims]
    if flags["resume"]:
        losses = ddpm.info["losses"]
        for part, state in zip(parts, ddpm.info["parts"], strict=True):
            part.load_state_dict(state)
    for epoch in tqdm(range(len(losses), n_epochs), "Training", disable=NO_BAR):
        # Randomness depends on seed and epoch alone: a resumed run equals an unbroken one.
        torch.manual_seed(1_000_003 * flags["SEED"] + epoch)
        losses.append(train_epoch(ddpm, averaged, loader, optims, epoch, n_epochs))
        if rank_and_size()[0] == 0:
            parts = parts if epoch + 1 < n_epochs else []
            store(store_path, averaged.module, flags, losses, parts)
            if display:
                ten = {"n_samples": 10, "sample_steps": 20, "label": -1}
                images = generate_new_images(averaged.module, gif_name=None, **flags | ten)
                path = f"{os.path.splitext(store_path)[0]}_10.png"
                show_images(images, f"After epoch {epoch + 1}", path)
        tqdm.write(f"Loss at epoch {epoch + 1}: {losses[-1]:.4f} (stored in {store_path})")
    ddpm.load_state_dict(averaged.module.state_dict())
    return losses


def train_epoch(ddpm, averaged, loader, optims, epoch, n_epochs):
    """One pass over the data: updates `ddpm` and its running average. -> mean error of the noise."""
    parameters = list(ddpm.parameters())
    mean_error = torch.zeros((), device=ddpm.device)
    bar = tqdm(loader, f"Epoch {epoch + 1}", leave=False, disable=NO_BAR)
    for step, batch in enumerate(bar, epoch * len(loader)):
        x0 = batch[0].to(ddpm.device)
        label = batch[1].to(ddpm.device) if len(batch) > 1 else None
        loss, error = denoising_loss(ddpm, x0, label)
        ddpm.zero_grad()
        loss.backward()
        sum_over_processes(p.grad for p in parameters if p.grad is not None)
        # Nearly up to the full rate in a twentieth of the training, then straight down to 0.
        progress = (step + 0.5) / len(loader) / n_epochs
        factor = min(20 * progress, 1 - progress)
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
            optim.step()
        averaged.update_parameters(ddpm)
        mean_error += error * len(x0) / len(loader.dataset)
    sum_over_processes([mean_error])
    # A gradient that is not finite makes the weights so for good: once an epoch is soon enough.
    if not all(tensor.isfinite().all() for tensor in [mean_error, *parameters]):
        raise FloatingPointError(f"the loss is not finite in epoch {epoch + 1}: give a lower lr")
    return mean_error.item()


# %% Sampling: from noise to images
@torch.no_grad()
def reverse_process(ddpm, x, label, guidance, variance, generator):
    """Algorithm 2 of [1], x_0 clipped: yields x_T, the noise x (n, c, h, w), then x after each step.

    `variance` chooses sigma_t squared: 1 is beta_t, 2 is beta-tilde_t, that of the posterior.
    """
    betas, alphas, alpha_bars = ddpm.betas, ddpm.alphas, ddpm.alpha_bars
    yield x
    for t in reversed(range(ddpm.n_steps)):
        _, eta_theta = predict(ddpm, x, t, label, guidance)
        x = (x - (1 - alphas[t]) / (1 - alpha_bars[t]).sqrt() * eta_theta) / alphas[t].sqrt()
        if t > 0:
            z = torch.randn(x.shape, generator=generator, device=x.device)
            beta_tilde = (1 - alpha_bars[t - 1]) / (1 - alpha_bars[t]) * betas[t]
            sigma = (betas[t] if variance == 1 else beta_tilde).sqrt()
            x = x + sigma * z
        yield x


@torch.no_grad()
def fast_sampler(ddpm, x, label, guidance, n_steps, generator):
    """The same in `n_steps` larger steps, from t to an earlier s: SDE-DPM-Solver++(2M) of [7].

    A large step must know what the prediction of x_0 will be halfway: the last two predictions are
    continued in a straight line, over the logarithm of the signal-to-noise ratio.
    """
    steps = falling_steps(n_steps, ddpm.n_steps - 1)
    last_x0 = last_log_snr = None
    yield x
    for t, s in itertools.pairwise(steps):
        a_t, a_s = ddpm.alpha_bars[t], ddpm.alpha_bars[s]
        log_snr = a_t.logit()
        x0, _ = predict(ddpm, x, t, label, guidance)
        halfway = x0
        if last_x0 is not None:
            halfway = x0 + (x0 - last_x0) / 2 * (a_s.logit() - log_snr) / (log_snr - last_log_snr)
        last_x0, last_log_snr = x0, log_snr
        beta = 1 - a_t / a_s
        mean = (a_s.sqrt() * beta * halfway + (1 - beta).sqrt() * (1 - a_s) * x) / (1 - a_t)
        z = torch.randn(x.shape, generator=generator, device=x.device)
        x = mean + ((1 - a_s) / (1 - a_t) * beta).sqrt() * z
        yield x
    yield predict(ddpm, x, steps[-1], label, guidance)[0]


def predict(ddpm, x, t, label, guidance):
    """x_t (n, c, h, w), its step t -> x_0 clipped to [-1, 1], and the noise that x_t then holds."""
    if guidance > 1:
        # In full only at the end: while x is mostly noise, it would make images more alike [8].
        guidance = 1 + (guidance - 1) * max(0, 1 - t / (0.6 * ddpm.n_steps))
    alpha_bar = ddpm.alpha_bars[t]
    eta_theta = ddpm.backward(x, torch.full((len(x),), t, device=x.device), label, guidance)
    x0 = ((x - (1 - alpha_bar).sqrt() * eta_theta) / alpha_bar.sqrt()).clamp(-1, 1)
    return x0, (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()


def falling_steps(n, highest):
    """-> n falling whole numbers from `highest` to 0, the lower the denser, none of them twice."""
    steps = highest * np.linspace(1, 0, n) ** 2
    return np.maximum(steps.round(), np.arange(n)[::-1]).astype(int).tolist()


CHUNK = 500  # images drawn at once, which bounds the memory


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
    **flags,
):
    """-> n_samples new images (n, c, h, w) in [-1, 1], the same ones for the same SEED.

    `label` is a class, or one for each image; None (or -1) is every class in turn. The GIF shows
    the first 100 images from pure noise to what is returned; gif_name=None writes none. `flags`
    (guidance, sample_steps, variance, SEED) stand in for the module's. Raises BadInput for values
    out of range.
    """
    flags = current_flags(n_samples=n_samples, **flags)
    device = ddpm.to(device or ddpm.device).device
    labels = labels_of(label, n_samples, ddpm.n_classes, device)
    chw = [given or own for given, own in zip((c, h, w), ddpm.image_chw, strict=True)]
    n_steps = min(flags.sample_steps or ddpm.n_steps, ddpm.n_steps)
    shown = falling_steps(max(2, min(frames_per_gif, n_steps + 1)), n_steps)
    generator = torch.Generator(device).manual_seed(flags.SEED)
    frames, images = [], []
    for chunk in torch.arange(n_samples, device=device).split(CHUNK):
        x = torch.randn(len(chunk), *chw, generator=generator, device=device)
        if n_steps == ddpm.n_steps:
            xs = reverse_process(ddpm, x, labels[chunk], flags.guidance, flags.variance, generator)
        else:
            xs = fast_sampler(ddpm, x, labels[chunk], flags.guidance, n_steps, generator)
        for i, x in enumerate(tqdm(xs, "Sampling", n_steps + 1, disable=NO_BAR)):
            if gif_name and not images and n_steps - i in shown:
                frames.append(tile(x[:100]))
        images.append(x)
    if gif_name:
        write_gif(frames, gif_name)
    return torch.cat(images)


def labels_of(label, n, n_classes, device):
    """-> classes of n images (n,), from one for all or n of them; -1 or None: every class in turn.

    Raises BadInput for a class that doesn't exist, or another number of them than 1 and n.
    """
    labels = torch.as_tensor(-1 if label is None else label, device=device)
    wrong = labels.is_floating_point() or labels.shape not in ((), (n,))
    if wrong or labels.min() < -1 or labels.max() >= n_classes:
        raise BadInput(f"label must be one of {n_classes} classes, or {n} of them, not {label}")
    in_turn = torch.arange(n, device=device) % max(n_classes, 1)
    return torch.where(labels == -1, in_turn, labels)


# %% Pictures: one grey scale, -1 is black and 1 is white
def tile(images, gap=0):
    """Images (n, c, h, w) in [-1, 1] -> one uint8 picture (height, width), or (.., c) if c > 1.

    Ten in a row, so that classes in turn have a column each, with `gap` pixels between them.
    """
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    grid = make_grid(pixels, nrow=min(len(images), 10), padding=gap)[: images.shape[1]]
    return grid.permute(1, 2, 0).squeeze(2).cpu().numpy()


def write_gif(frames, path):
    """Writes uint8 pictures as a GIF that rests on the first and on the last of them."""
    pictures = [frame // 16 * 17 for frame in frames[:-1]] + frames[-1:]  # noise needs few greys
    durations = [500] + [60] * (len(frames) - 2) + [3000]  # in ms
    with whole_file(path) as temporary:
        imageio.imwrite(temporary, pictures, extension=".gif", duration=durations, loop=0)


def show_images(images, title="", path=None):
    """Draws images (n, c, h, w) in [-1, 1] as one grid; written to `path`, shown if possible."""
    grid = tile(torch.as_tensor(images).detach(), gap=1)
    with figure_for(path, 7 * grid.shape[0] / grid.shape[1] + 0.4) as axes:
        axes.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title)
        axes.axis("off")


def show_first_batch(loader, path=None):
    """Draws the images of the loader's first batch."""
    show_images(next(iter(loader))[0], "Images in the first batch", path)


def show_forward(ddpm, loader, device=None, path=None):
    """Draws ten images of the first batch after 0, 25, 50, 75 and 100 % of the forward process."""
    x0 = next(iter(loader))[0][:10].to(device or ddpm.device)
    steps = [max(ddpm.n_steps * percent // 100 - 1, 0) for percent in (25, 50, 75, 100)]
    rows = [x0] + [ddpm(x0, t) for t in steps]
    show_images(torch.cat(rows), "After 0, 25, 50, 75 and 100 % of the steps", path)


def show_losses(losses, path=None):
    """Draws the loss of each epoch."""
    with figure_for(path, 4) as axes:
        axes.plot(range(1, len(losses) + 1), losses, marker=".")
        axes.set(xlabel="epoch", ylabel="mean squared error of the noise", title="Training loss")
        axes.grid(alpha=0.3)


@contextmanager
def figure_for(path, height):
    """Gives axes to draw on; then writes them to `path`, if given, and shows them if possible."""
    figure, axes = plt.subplots(figsize=(7, height), num=path and str(path), clear=True)
    yield axes
    if path:
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=150, bbox_inches="tight", pad_inches=0.05)
    if plt.get_backend().lower() == "agg":
        plt.close(figure)
    else:
        plt.show(block=False)


# %% Running it: errors, flags, files, devices, processes, main
# Progress bars are for terminals (None: only there) and notebooks.
NO_BAR = False if "ipykernel" in sys.modules else None
# What drawing from weights must have in common with their training, and what resuming it must.
SCHEDULE = ["fashion", "n_steps", "min_beta", "max_beta"]
TRAINING = [*SCHEDULE, "SEED", "batch_size", "n_epochs", "n_images", "lr"]


class BadInput(ValueError):
    """An error that the user can put right: the text says what is wrong and what to do."""


def current_flags(**given):
    """-> Namespace of all flags: those `given`, unless None, and else the module's values.

    Raises BadInput with the flag's name and range for the first one out of range.
    """
    flags = {name: globals()[name] for name in FLAGS}
    flags |= {name: value for name, value in given.items() if value is not None}
    for name, value in flags.items():
        _, kind, *limits = FLAGS[name]
        low, high = limits or (value, value)
        if not isinstance(value, (kind, int)) or not low <= value <= high:
            raise BadInput(f"{name} must be {kind.__name__} {limits or ''}, not {value!r}")
    return argparse.Namespace(**flags)


def read_flags(argv=None):
    """-> Namespace of all flags: the command line `argv`, and else the values at the top.

    Raises BadInput for an unknown flag or a value that makes no sense.
    """

    def true_or_false(text):
        return bool(("False", "True").index(text))

    def refuse(message):
        raise BadInput(f"{message} (--help lists the flags)")

    classes = ", ".join(f"{i} {name}" for i, name in enumerate(FashionMNIST.classes))
    parser = argparse.ArgumentParser(epilog=f"The labels of Fashion-MNIST are {classes}.")
    parser.error = refuse
    for name, (text, kind, *_) in FLAGS.items():
        option = parser.add_argument("--" + name.lower().replace("_", "-"), dest=name, type=kind)
        option.help = f"{text} (default: {globals()[name]})".replace("%", "%%")
        if kind is bool:
            option.type, option.nargs, option.const = true_or_false, "?", True
    return current_flags(**vars(parser.parse_args(argv)))


@contextmanager
def whole_file(path):
    """Gives a temporary path beside `path`; what is written there replaces `path` at the end.

    So a kill or a full disk leaves the old file as it was. Raises OSError if it can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"can't write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def store(path, ddpm, flags, losses, parts):
    """Writes the model with all that load_model needs, and the state of the `parts` of a training."""
    betas = ddpm.betas.tolist()
    content = {
        "weights": ddpm.state_dict(),
        "network": getattr(ddpm.network, "settings", None),
        "model": [ddpm.n_steps, betas[0], betas[-1], None, ddpm.image_chw],
        "flags": {name: flags[name] for name in TRAINING},
        "losses": losses,
        "parts": [part.state_dict() for part in parts],
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_model(store_path, device=None):
    """-> MyDDPM in eval mode, rebuilt from the file alone; `.info` holds its flags and losses.

    Raises BadInput if the file is missing, damaged, holds code, or doesn't fit MyUNet.
    """
    try:
        with zipfile.ZipFile(store_path) as archive:
            if archive.testzip():  # torch.load doesn't look at the checksums
                raise zipfile.BadZipFile("a wrong checksum")
        info = torch.load(store_path, map_location=device or "cpu", weights_only=True)
        ddpm = MyDDPM(MyUNet(*info["network"]), *info["model"])
        ddpm.load_state_dict(info["weights"])
    except Exception as error:  # noqa: BLE001 - a foreign file can raise almost anything
        text = f"no weights for this program in {store_path}: train first"
        raise BadInput(f"{text} ({type(error).__name__}: {error})") from None
    ddpm.info = info
    return ddpm.to(device).eval()


def find_device():
    """-> the device to compute on: this process's GPU if CUDA is available, or else the CPU."""
    index = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")


def fast_precision(device):
    """-> autocast to bf16 where the hardware multiplies it faster than fp32, or a disabled one."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def rank_and_size():
    """-> (rank, number of processes): (0, 1) unless torchrun has started several."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def sum_over_processes(tensors):
    """Replaces each tensor by its sum over all processes."""
    if distributed.is_initialized():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def join_processes():
    """Joins the processes that torchrun started, if any; only the first one prints.

    Raises BadInput if they don't find each other.
    """
    if "WORLD_SIZE" in os.environ:
        try:
            distributed.init_process_group()
        except (ValueError, RuntimeError) as error:
            raise BadInput(f"found no other processes: use torchrun ({error})") from None
    if rank_and_size()[0] > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def make_model(flags, store_path, device):
    """-> MyDDPM, new or from the file. Raises BadInput if the file doesn't fit the flags."""
    if not flags.no_train and not flags.resume:
        network = MyUNet(flags.n_steps)
        return MyDDPM(network, flags.n_steps, flags.min_beta, flags.max_beta, device)
    ddpm = load_model(store_path, device)
    if flags.resume and not ddpm.info["parts"]:
        raise BadInput(f"{store_path} has finished its training: draw from it with --no-train")
    names = TRAINING if flags.resume else SCHEDULE
    trained = {name: ddpm.info["flags"][name] for name in names}
    if not trained.items() <= vars(flags).items():
        raise BadInput(f"{store_path} was trained with {trained}: give the same, or train anew")
    return ddpm


def run(flags):
    """The whole job, from the images to the GIF. Raises what the functions above raise."""
    device, (rank, world_size) = find_device(), rank_and_size()
    if flags.batch_size % world_size:
        raise BadInput(f"batch_size must be a multiple of the {world_size} processes")
    path = Path(flags.out_dir, "fashion" if flags.fashion else "mnist")
    store_path = path.with_suffix(".pt")
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(flags.SEED)
    ddpm = make_model(flags, store_path, device)
    dataset = load_data(flags.fashion, device=device) if rank == 0 else None
    sum_over_processes([torch.zeros(1, device=device)])  # the first one has unpacked the archives
    dataset = dataset or load_data(flags.fashion, device=device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"give another out_dir: {error}") from None
    loader = batches(TensorDataset(*dataset[: flags.n_images]), flags.batch_size)
    print(f"Using device: {device}, {world_size} process(es)")
    print(f"Parameters: {sum(p.numel() for p in ddpm.network.parameters()):,}")
    if rank == 0:
        torch.manual_seed(flags.SEED)
        show_first_batch(loader, f"{path}_first_batch.png")
        show_forward(ddpm, loader, device, f"{path}_forward.png")
    if flags.no_train:
        losses = ddpm.info["losses"]
    else:
        optims = make_optimizers(ddpm.network, flags.lr)
        losses = training_loop(
            ddpm, loader, flags.n_epochs, optims, device, flags.display, store_path, vars(flags)
        )
    if rank == 0:
        show_losses(losses, f"{path}_loss.png")
        images = generate_new_images(ddpm, device=device, gif_name=f"{path}.gif", **vars(flags))
        show_images(images[:10], "Generated images", f"{path}_10.png")
        show_images(images[:100], "Generated images", f"{path}_100.png")
        print(f"Pictures are in {flags.out_dir}")


def main(argv=None):
    """Runs the job with the command line `argv` (None: that of the program).

    Raises SystemExit after one line on stderr: status 2 for bad input, 1 if the loss is not finite
    or a file can't be written, 130 after Ctrl-C.
    """
    try:
        join_processes()
        run(read_flags(argv))
        plt.show()
        return
    except KeyboardInterrupt:
        message, status = "stopped; a training that was under way goes on with --resume", 130
    except BadInput as error:
        message, status = error, 2
    except (FloatingPointError, OSError) as error:
        message, status = error, 1
    print("\nddpm.py:", *str(message).split(), file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main([] if "get_ipython" in globals() else None)  # a notebook's command line is not ours
