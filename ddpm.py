"""A denoising diffusion probabilistic model of MNIST or Fashion-MNIST, in one file.

    python ddpm.py              train on MNIST, then draw new digits: outputs/mnist.gif and others
    python ddpm.py --fashion    the same with Fashion-MNIST: outputs/fashion.gif and others
    python ddpm.py --no-train   draw from the weights in outputs/, without training
    python ddpm.py --help       all flags

Read it once, from top to bottom: a function calls only what stands above it. The epsilon of [1] is
eta here, and its steps 1 to T are numbered 0 to T - 1; x_0 is still the image before all of them.

[1] Ho, Jain, Abbeel: Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239
[2] Ho, Salimans: Classifier-Free Diffusion Guidance, 2022, arXiv 2207.12598
[3] Salimans, Ho: Progressive Distillation, 2022, arXiv 2202.00512 (the prediction of v)
[4] Ronneberger, Fischer, Brox: U-Net, 2015, arXiv 1505.04597
[5] Vaswani et al.: Attention Is All You Need, 2017, arXiv 1706.03762 (the time embedding)
[6] Jordan et al.: Muon, 2024, kellerjordan.github.io/posts/muon
[7] Song, Meng, Ermon: DDIM, 2020, arXiv 2010.02502 (steps left out)
[8] Lu et al.: DPM-Solver++, 2022, arXiv 2211.01095 (their second order)
"""

# %% Imports
import argparse
import io
import itertools
import math
import os
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import imageio.v3 as imageio
import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import MNIST, FashionMNIST
from torchvision.utils import make_grid
from tqdm.auto import tqdm

FILE = Path(globals().get("__file__", "notebook")).resolve()  # a notebook has no file


class InputError(ValueError):
    """What a user can put right; the text says how."""


def require(condition, text):
    if not condition:
        raise InputError(text)


# %% Flags: n_epochs = 5 is --n-epochs 5 on the command line, watch = False is --no-watch
fashion = False  # Fashion-MNIST (clothes) instead of MNIST (digits)
no_train = False  # draw from the weights in out_dir, without training
resume = False  # go on after the last finished epoch, up to n_epochs in all
watch = True  # draw ten images after each epoch, to see it learn
# Drawing
n_samples = 100  # how many images to sample; the pictures show the first 100
label = None  # draw only this class, 0 to 9; None is every class in turn
guidance = 1.75  # how much the label counts: 0 not at all, 1 as learned, more exaggerates it
sample_steps = 1000  # fewer are faster, and 50 look as good
variance = 2  # of the noise in a step back: 2 is beta-tilde; 1 is beta, if no step is left out
# Training
n_epochs = 10  # how often training sees each image
n_images = 60_000  # training images; fewer for a quick look
batch_size = 64  # images in each training step
lr = 0.01  # learning rate at its peak
n_steps = 1000  # length T of the diffusion; to draw faster, lower sample_steps instead
min_beta = 1e-4  # variance of the noise added in the first step
max_beta = 0.02  # variance of the noise added in the last step
SEED = 0  # same seed, flags, threads and versions: on one CPU, the same images
device = "cuda" if torch.cuda.is_available() else "cpu"  # cuda, cuda:1, mps, cpu
data_dir = str(FILE.parent / "datasets")  # folder of the archives of images
out_dir = str(FILE.parent / "outputs")  # folder of the weights and pictures


# %% Diffusion: an image drowns in noise, and comes back
class MyDDPM(nn.Module):
    """The forward process with its linear schedule, and the network that undoes it [1].

    `network` maps x (n, c, h, w), steps t (n,) and labels (n,) to the noise in x, or to v of [3] if
    its `predicts_v` is true. A label is a class from 0, or `network.n_classes` for none. Images are
    (c, h, w) = `image_chw`. The schedule is in buffers (n_steps,), which move with the model and
    are saved with it: betas, alphas = 1 - betas, and alpha_bars, their products up to t, which say
    how much of the image's variance is left. Raises ValueError if a schedule can't work.
    """

    def __init__(
        self, network, n_steps=1000, min_beta=1e-4, max_beta=0.02, device=None, image_chw=None
    ):
        super().__init__()
        possible = n_steps > 1 and 1e-6 < min_beta < max_beta < 1
        require(possible, "a schedule needs n_steps > 1 and 1e-6 < min_beta < max_beta < 1")
        betas = torch.linspace(min_beta, max_beta, n_steps, dtype=torch.float64)
        alphas = 1 - betas
        alpha_bars = alphas.cumprod(0)
        left = alpha_bars[-1].item()  # of an image, while sampling begins with noise alone
        text = f"the schedule leaves {left:.2g} of an image, not 1e-30 to 0.1"
        require(1e-30 < left < 0.1, f"{text}: change n_steps or max_beta")
        self.register_buffer("betas", betas.float())
        self.register_buffer("alphas", alphas.float())
        self.register_buffer("alpha_bars", alpha_bars.float())
        self.network = network
        self.n_steps = n_steps
        self.image_chw = tuple(map(int, image_chw or (1, 28, 28)))
        self.to(device)

    def forward(self, x0, t, eta=None):
        """x0 (n, c, h, w) in [-1, 1], t (n,) or one number -> x_t with noise eta, eq. 4 of [1]."""
        eta = torch.randn_like(x0) if eta is None else eta
        alpha_bar = self.alpha_bars[t].reshape(-1, 1, 1, 1)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eta

    def backward(self, x, t, label=None):
        """x_t (n, c, h, w), t (n,) or one number -> eta_theta, the noise predicted in x_t.

        Named after the reverse process, not autograd. `label` (n,) holds classes, or n_classes for
        no label; None is no label for all. Raises ValueError if the prediction has another shape.
        """
        t = t.flatten() if torch.is_tensor(t) else torch.full((len(x),), t, device=x.device)
        label = torch.full_like(t, self.network.n_classes) if label is None else label.flatten()
        prediction = self.network(x, t, label)
        require(prediction.shape == x.shape, f"the network predicts {tuple(prediction.shape)}")
        if not self.network.predicts_v:
            return prediction
        # v is sqrt(alpha_bar) eta - sqrt(1 - alpha_bar) x0, and x_t is eq. 4: this sum is eta. Late
        # in the process x_t itself is nearly eta, and the term with v a small correction.
        alpha_bar = self.alpha_bars[t].reshape(-1, 1, 1, 1)
        return (1 - alpha_bar).sqrt() * x + alpha_bar.sqrt() * prediction


def denoising_loss(ddpm, x0, label=None):
    """The loss of Algorithm 1 of [1] -> mean squared error of the predicted noise.

    x0 is (n, c, h, w) in [-1, 1], label (n,) or None. The error is large where there is little
    noise: the network learns faster if such steps are drawn more often, here in proportion to
    sqrt(alpha_bar). Each error is divided by how much more often, so on average all count alike.
    """
    density = ddpm.alpha_bars.sqrt() / ddpm.alpha_bars.sqrt().mean()
    t = torch.multinomial(density, len(x0), replacement=True)
    eta = torch.randn_like(x0)
    if label is not None:
        # Guidance needs a prediction without the label, too: a tenth of the images teach it.
        dropped = torch.rand(len(x0), device=x0.device) < 0.1
        label = label.masked_fill(dropped, ddpm.network.n_classes)
    eta_theta = ddpm.backward(ddpm(x0, t, eta), t, label)
    errors = (eta_theta - eta).square().mean((1, 2, 3))
    return (errors / density[t]).mean()


def predict_x0(ddpm, x, t, label=None, guidance=1.0):
    """x_t (n, c, h, w), one step t -> x_0 predicted with guidance, 1 + w of [2], within [-1, 1]."""
    eta_theta = ddpm.backward(x, t, label)
    if ddpm.network.n_classes and guidance != 1:
        without_label = ddpm.backward(x, t)
        eta_theta = without_label + guidance * (eta_theta - without_label)
    alpha_bar = ddpm.alpha_bars[t]  # what follows is eq. 4 of [1], solved for x_0
    return ((x - (1 - alpha_bar).sqrt() * eta_theta) / alpha_bar.sqrt()).clamp(-1, 1)


def falling_steps(n, highest):
    """-> n falling whole numbers from `highest`, none of them twice, the lower the denser [7]."""
    steps = highest * np.linspace(1, 0, n) ** 2
    return np.maximum(steps.round(), np.arange(n)[::-1]).astype(int).tolist()


@torch.no_grad()
def reverse_process(ddpm, x, label, guidance, sample_steps, variance, generator=None):
    """Yields x_T, the noise x (n, c, h, w) itself, then x after each step back; the last is x_0.

    A step from t to an earlier s samples x_s from q(x_s given x_t and the predicted x_0), eq. 7 of
    [1] with s for t - 1 and alpha_bar_t / alpha_bar_s for alpha_t: Algorithm 2 if s is t - 1, but
    with x_0 clipped. The variance is beta-tilde, or with variance=1 beta, often too much for few
    steps. Where steps between t and s are left out [7], x_0 as predicted at t no longer fits
    half-way. So the last two predictions are extrapolated in a straight line, over the logarithm of
    the signal-to-noise ratio, to the middle between t and s: SDE-DPM-Solver++(2M) of [8].
    """
    alpha_bars = [*ddpm.alpha_bars.tolist(), 1.0]  # the last is that of x_0, at "step" -1
    log_snr = [math.log(a_t / (1 - a_t)) for a_t in alpha_bars[:-1]]
    last_t = last_x0 = None
    yield x
    for t, s in itertools.pairwise([*falling_steps(sample_steps, ddpm.n_steps - 1), -1]):
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


# %% Network: a UNet that knows the step and the label
def sinusoidal_embedding(n, d):
    """-> (n, d): row t, columns 2i and 2i + 1 are sin, cos of t / 10000^(2i / d) [5, sec. 3.5]."""
    frequencies = 10_000 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = torch.outer(torch.arange(n), frequencies)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :d].float()


def conv3x3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, kernel_size=3, padding=1, bias=False)


class Block(nn.Module):
    """Residual block: two convolutions; between them step and label shift each channel."""

    def __init__(self, channels, emb_dim):
        super().__init__()
        self.conv1 = conv3x3(channels, channels)
        self.shift = nn.Linear(emb_dim, channels, bias=False)
        self.conv2 = conv3x3(channels, channels)
        nn.init.zeros_(self.conv2.weight)  # at first a block changes nothing

    def forward(self, x, emb):
        norm = F.group_norm(x, 1)  # mean 0, variance 1 in each image
        h = self.conv1(norm) + self.shift(emb)[:, :, None, None]
        return x + self.conv2(F.silu(h))


class Blocks(nn.ModuleList):
    """One block after the other, all told the same step and label."""

    def forward(self, x, emb):
        for block in self:
            x = block(x, emb)
        return x


class MyUNet(nn.Module):
    """UNet [4] with a sinusoidal embedding of the step t [5], and a learned one of the label.

    Squares of 2 x 2 pixels become channels at once. A skip connection at half resolution adds the
    way down to the way up. Sides of images must be multiples of 4.
    """

    predicts_v = True

    def __init__(self, n_steps=1000, time_emb_dim=128, n_classes=10, image_channels=1):
        super().__init__()
        half, quarter = 24, 48  # channels at half and quarter resolution
        d, square = time_emb_dim, 4 * image_channels
        self.n_classes = n_classes
        self.register_buffer("embedding", sinusoidal_embedding(n_steps, d), persistent=False)
        self.time = nn.Linear(d, d, bias=False)
        self.label = nn.Embedding(n_classes + 1, d)  # the last row stands for no label
        self.enter = nn.Sequential(nn.PixelUnshuffle(2), conv3x3(square, half))
        self.half_down = Blocks(Block(half, d) for _ in range(3))
        self.down = nn.Conv2d(half, quarter, kernel_size=2, stride=2, bias=False)
        self.middle = Blocks(Block(quarter, d) for _ in range(6))
        self.up = nn.ConvTranspose2d(quarter, half, kernel_size=2, stride=2, bias=False)
        self.half_up = Blocks(Block(half, d) for _ in range(3))
        norm = nn.GroupNorm(1, half, affine=False)
        self.leave = nn.Sequential(norm, nn.SiLU(), conv3x3(half, square), nn.PixelShuffle(2))
        nn.init.zeros_(self.leave[2].weight)  # at first it predicts v = 0
        self.to(memory_format=torch.channels_last)  # makes convolutions faster

    def forward(self, x, t, label):
        """x (n, c, h, w), t and label (n,) -> v (n, c, h, w)."""
        emb = F.silu(self.time(self.embedding[t]) + self.label(label))
        at_half = self.half_down(self.enter(x), emb)
        at_quarter = self.middle(self.down(at_half), emb)
        return self.leave(self.half_up(at_half + self.up(at_quarter), emb))


# %% Optimizer: Muon
def orthogonalize(matrix):
    """U S V^T (n, m) -> about U V^T: of S, what is above 2 % of its norm comes to 0.7 to 1.2 [6]."""
    x = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(3):  # iterations of Newton-Schulz, of which [6] has five
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal [6]: every direction of a matrix moves about equally far.

    A convolution is a matrix, once flattened, and a vector is one column. Unlike [6], it moves the
    first and last layer and the embedding, too, and tall matrices no farther than others.
    """

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 0.05)  # the momentum is 0.95
                ahead = p.grad.lerp(mean, 0.95)  # Nesterov's momentum
                update = orthogonalize(ahead.reshape(len(p), -1))
                p.sub_(group["lr"] * update.view_as(p))


# %% Files
def load_data(fashion=False, train=True, data_dir=FILE.parent / "datasets"):
    """-> TensorDataset of images (n, 1, 28, 28) in [-1, 1] and labels (n,) from 0 to 9.

    What is not in `data_dir` is downloaded. Raises ValueError if that fails.
    """
    source = FashionMNIST if fashion else MNIST
    try:
        data = source(data_dir, train, download=True)
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"no images in {data_dir}/{source.__name__}/raw: {error}") from error
    return TensorDataset(data.data[:, None] / 127.5 - 1, data.targets)


def write_file(path, data):
    """Writes bytes. A kill or a full disk leaves the old file whole."""
    Path(f"{path}.part").write_bytes(data)
    os.replace(f"{path}.part", path)


# %% Pictures: one grey scale for all, -1 is black and 1 is white
def tile(images, gap=0, columns=10):
    """Images (n, c, h, w) in [-1, 1] -> one uint8 picture (height, width) or (height, width, 3)."""
    grid = make_grid(images, columns, gap, normalize=True, value_range=(-1, 1))
    grid = rearrange(grid[: images.shape[1]], "c h w -> h w c").squeeze(2)
    return (255 * grid).round().byte().cpu().numpy()


def write_gif(frames, path):
    """Writes uint8 pictures as a GIF that rests on the first and on the last of them."""
    frames = [frame // 16 * 17 for frame in frames[:-1]] + frames[-1:]  # 16 greys: a small file
    durations = [500] + [80] * (len(frames) - 2) + [3000]  # in ms
    gif = imageio.imwrite("<bytes>", frames, extension=".gif", duration=durations, loop=0)
    write_file(path, gif)


@contextmanager
def figure(path=None):
    """Gives axes to draw on; they become the file `path`, or are shown. A notebook shows all."""
    shown = not path or "ipykernel" in sys.modules  # a file needs no display, which may go away
    new = plt.figure(figsize=(7, 7)) if shown else Figure(figsize=(7, 7))
    yield new.add_subplot()
    if path:
        new.savefig(path, dpi=150, bbox_inches="tight")
    if shown:
        plt.show()
        plt.close()


def show_images(images, title="", path=None, rows=()):
    """Draws any number of images (n, c, h, w) in [-1, 1] in named rows, or ten in a row."""
    grid = tile(torch.as_tensor(images), 1, len(images) // len(rows) if rows else 10)
    with figure(path) as ax:
        ax.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        ax.set(title=title, xticks=[], frame_on=False)
        ax.set_yticks((np.arange(len(rows)) + 0.5) * (images.shape[2] + 1), rows)


def show_first_batch(loader, path=None):
    """Draws the images of the loader's first batch."""
    show_images(next(iter(loader))[0], "Images in the first batch", path)


def show_forward(ddpm, loader, device=None, path=None):
    """Draws ten images of the first batch after 0, 5, 10, 20, 40 and 100 % of the steps."""
    x0 = next(iter(loader))[0][:10].to(device or ddpm.betas.device)
    rows = {"0 %": x0}
    for percent in (5, 10, 20, 40, 100):
        rows[f"{percent} %"] = ddpm(x0, max(1, ddpm.n_steps * percent // 100) - 1)
    show_images(torch.cat([*rows.values()]), "The forward process, by share of steps", path, rows)


def show_losses(losses, path=None):
    """Draws the loss of each epoch."""
    with figure(path) as ax:
        ax.semilogy(range(1, len(losses) + 1), losses, marker=".")
        ax.set(xlabel="epoch", ylabel="training loss: mean squared error of the noise")


# %% Sampling: new images
def labels_to_draw(ddpm, n_samples, label, guidance, sample_steps, variance):
    """-> labels (n_samples,). Raises ValueError if any of the arguments makes no sense."""
    require(n_samples >= 1 and sample_steps >= 1, "n_samples and sample_steps must be at least 1")
    require(0 <= guidance <= 100, f"guidance must be from 0 to 100, not {guidance}")
    require(variance in (1, 2), f"variance must be 1 (beta) or 2 (beta-tilde), not {variance}")
    n_classes = max(ddpm.network.n_classes, 1)
    labels = torch.as_tensor(torch.arange(n_samples) % n_classes if label is None else label)
    known = 0 <= labels.min() and labels.max() < n_classes
    require(known, f"labels must be from 0 to {n_classes - 1}, not {label}")
    return labels.long().expand(n_samples)


def generate_new_images(
    ddpm,
    n_samples=16,
    device=None,
    frames_per_gif=36,
    gif_name="sampling.gif",
    *,
    label=None,
    guidance=1.75,
    sample_steps=1000,
    variance=2,
    SEED=0,
):
    """-> n_samples new images (n, c, h, w) in [-1, 1]; the GIF shows how the first 100 come about.

    `label` is a class, or one for each image; None is every class in turn. The model is moved to
    `device`, if given, and left in eval mode. Raises ValueError for what can't be drawn.
    """
    labels = labels_to_draw(ddpm, n_samples, label, guidance, sample_steps, variance)
    device = ddpm.to(device).eval().betas.device
    n_steps = min(sample_steps, ddpm.n_steps)
    # Images appear late: the fewer steps are left, the denser the frames.
    steps_left = falling_steps(max(2, min(frames_per_gif, n_steps + 1)), n_steps)
    if gif_name:
        Path(f"{gif_name}.part").touch()  # raises now, and not at the end, if it can't be written
    generator = torch.Generator(device).manual_seed(SEED)
    x = torch.randn(n_samples, *ddpm.image_chw, generator=generator, device=device)
    snapshots = reverse_process(ddpm, x, labels.to(device), guidance, n_steps, variance, generator)
    frames = []
    for i, x in enumerate(tqdm(snapshots, "Drawing", n_steps + 1, leave=False)):
        if n_steps - i in steps_left:
            frames.append(tile(x[:100]))
    if gif_name:
        write_gif(frames, gif_name)
    return x


# %% Training, and its file
def store(path, ddpm, losses, optim=None):
    """Writes the model and its losses; with `optim`, the momenta that a training goes on from."""
    state = {"ddpm": ddpm.state_dict(), "image_chw": ddpm.image_chw, "losses": losses}
    if optim:
        state[type(optim).__name__] = optim.state_dict()["state"]  # another kind begins anew
    file = io.BytesIO()
    torch.save(state, file)
    write_file(path, file.getvalue())


def load_model(store_path, device=None, network=None):
    """-> stored MyDDPM in eval mode, of `network` or a MyUNet. Raises ValueError if it can't be."""
    try:
        damaged = zipfile.ZipFile(store_path).testzip()  # torch doesn't look at checksums
        require(damaged is None, "a wrong checksum")
        state = torch.load(store_path, map_location="cpu", weights_only=True)
        weights, image_chw = state["ddpm"], state["image_chw"]
        betas = weights["betas"]
        if network is None:
            n_labels, d = weights["network.label.weight"].shape
            network = MyUNet(len(betas), d, n_labels - 1, image_chw[0])
        ddpm = MyDDPM(network, len(betas), betas[0], betas[-1], image_chw=image_chw)
        ddpm.load_state_dict(weights)
    except Exception as error:  # a foreign file can raise anything
        raise InputError(f"{store_path} holds no weights of this model: {error}") from error
    return ddpm.to(device).eval()


def load_training(store_path, ddpm, optim, n_epochs):
    """Puts the weights and momenta of the last training into `ddpm` and `optim`. -> its losses."""
    unfinished = f"{store_path}.training"
    path = unfinished if os.path.exists(unfinished) else store_path
    stored = load_model(path, ddpm.betas.device, ddpm.network)
    same = stored.image_chw == ddpm.image_chw and torch.equal(stored.betas, ddpm.betas)
    require(same, f"{path} has another schedule or size of images")
    state = torch.load(path, map_location="cpu", weights_only=True)
    done = len(state["losses"])
    most = n_epochs - (path == unfinished)  # what is unfinished lacks its last epoch
    require(done <= most, f"{done} epochs of a longer training are done, n_epochs is {n_epochs}")
    momenta = state.get(type(optim).__name__, {})
    optim.load_state_dict(optim.state_dict() | {"state": momenta})
    print(f"Going on after epoch {done}")
    return state["losses"]


def check_training(ddpm, loader, n_epochs, optim):
    """Raises ValueError for what would train, but not what was meant. It looks at one batch."""
    require(n_epochs >= 1, f"n_epochs must be at least 1, not {n_epochs}")
    trained = set(optim.param_groups[0]["params"])
    require(trained <= set(ddpm.parameters()), "this optimizer has the weights of another model")
    x0, *labels = next(iter(loader))
    fits = x0.shape[1:] == ddpm.image_chw and x0.min() < 0 and x0.abs().max() < 1.001
    require(fits, f"images must be {ddpm.image_chw}, in the range from -1 to 1")
    ddpm.eval().backward(x0[:2].to(ddpm.betas.device), 0)
    n_classes = ddpm.network.n_classes
    known = labels and 0 <= labels[0].min() and labels[0].max() < n_classes
    require(known or not n_classes, f"labels must be from 0 to {n_classes - 1}, or n_classes 0")


def training_loop(
    ddpm, loader, n_epochs, optim, device=None, display=False, store_path="ddpm.pt", resume=False
):
    """Algorithm 1 of [1] on batches [x0, label, ...] or [x0] of a loader. -> loss of each epoch.

    The rate of `optim` rises for a twentieth of the training, then falls straight to 0. Until the
    end, when `store_path` is written, `store_path`.training has what `resume` needs; `display`
    samples images into `store_path`.png. Call torch.manual_seed first. Raises ValueError.
    """
    device, seed = ddpm.to(device).betas.device, torch.initial_seed()
    check_training(ddpm, loader, n_epochs, optim)
    losses = load_training(store_path, ddpm, optim, n_epochs) if resume else []
    store(f"{store_path}.training", ddpm, losses, optim)  # raises now if it can't be written
    n, done = n_epochs * len(loader) + 1, len(losses) * len(loader) + 1
    rate = LambdaLR(optim, lambda step: min((done + step) / 0.05, (n - done - step) / 0.95) / n)
    for epoch in tqdm(range(len(losses), n_epochs), "Training"):
        torch.manual_seed((seed + 1000 * epoch) % 2**63)  # the same if resumed
        ddpm.train()
        total = 0
        for x0, *labels in tqdm(iter(loader), f"Epoch {epoch + 1}", len(loader), leave=False):
            label = labels[0].to(device).long() if ddpm.network.n_classes else None
            loss = denoising_loss(ddpm, x0.to(device), label)
            optim.zero_grad()
            loss.backward()
            optim.step()
            rate.step()
            total += loss.detach()
        losses.append(total.item() / len(loader))
        require(math.isfinite(losses[-1]), f"no finite loss in epoch {epoch + 1}: lower the lr")
        if epoch + 1 < n_epochs:
            store(f"{store_path}.training", ddpm, losses, optim)
        tqdm.write(f"Loss at epoch {epoch + 1}: {losses[-1]:.4f}")
        sys.stdout.flush()  # a log file shows it now
        if display:
            images = generate_new_images(ddpm, 10, gif_name=None, sample_steps=20)
            show_images(images, f"After epoch {epoch + 1}", f"{store_path}.png")
    torch.manual_seed((seed + 1000 * n_epochs) % 2**63)  # what comes next has other noise
    store(store_path, ddpm, losses)
    os.remove(f"{store_path}.training")
    return losses


# %% Running it
def read_flags(argv=None):
    """-> Namespace of the flags: those on the command line `argv`, and else those at the top."""
    if argv is None and Path(sys.argv[0]).name not in (FILE.name, "-", "-c"):
        argv = []  # it is the command line of a notebook, or of a program that imports this one
    usage = "ddpm.py [--flag] [--flag value] ..."
    parser = argparse.ArgumentParser(usage=usage, conflict_handler="resolve")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    if FILE.is_file():
        parser.epilog = FILE.read_text("utf-8").partition("# %% Flags:")[2].partition("# %%")[0]
    for name, value in reversed(globals().items()):  # where options clash, the flags at the top win
        kind = int if value is None else type(value)
        if kind not in (bool, int, float, str):
            continue
        option, how = name.lower().replace("_", "-"), {"dest": name, "help": argparse.SUPPRESS}
        if kind is bool:
            parser.add_argument(f"--no-{option}", action="store_false", **how)
        how |= {"action": "store_true"} if kind is bool else {"type": kind}
        parser.add_argument(*{f"--{option}", f"--{name}"}, **how)
    return parser.parse_args(argv, argparse.Namespace(**globals()))


def train_model(ddpm, flags, path):
    """Trains the model, and draws what it sees, into files that begin with `path`."""
    images = load_data(flags.fashion, data_dir=flags.data_dir)[: flags.n_images]
    loader = DataLoader(TensorDataset(*images), flags.batch_size, shuffle=True)
    optim = Muon(ddpm.network.parameters(), flags.lr)
    if not flags.resume:
        torch.manual_seed(flags.SEED)  # as the first epoch does, which begins with this batch
        first = [next(iter(loader))]
        show_first_batch(first, f"{path}_first_batch.png")
        show_forward(ddpm, first, path=f"{path}_forward.png")
    how = None, flags.watch, f"{path}.pt", flags.resume
    losses = training_loop(ddpm, loader, flags.n_epochs, optim, *how)
    show_losses(losses, f"{path}_loss.png")


def main(argv=None):
    """The whole job, with the flags of the command line `argv` (None: that of the program)."""
    flags = read_flags(argv)
    for name in ("n_epochs", "n_images", "batch_size", "lr"):
        require(vars(flags)[name] > 0, f"{name} must be more than 0, not {vars(flags)[name]}")
    require(0 <= flags.SEED < 2**63, f"SEED must be from 0 to 2^63 - 1, not {flags.SEED}")
    path = Path(flags.out_dir, "fashion" if flags.fashion else "mnist")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(flags.SEED)
    torch.backends.cudnn.deterministic = True
    print(f"Using device: {flags.device}")
    if flags.no_train:
        ddpm = load_model(f"{path}.pt", flags.device)
    else:
        network = MyUNet(flags.n_steps)
        ddpm = MyDDPM(network, flags.n_steps, flags.min_beta, flags.max_beta, flags.device)
    print(f"Parameters: {sum(p.numel() for p in ddpm.parameters()):,}")
    how = ["n_samples", "label", "guidance", "sample_steps", "variance"]
    how = {name: vars(flags)[name] for name in how}
    labels_to_draw(ddpm, **how)  # raises now, and not after the training
    if not flags.no_train:
        train_model(ddpm, flags, path)
    images = generate_new_images(ddpm, gif_name=f"{path}.gif", SEED=flags.SEED, **how)
    np.save(f"{path}_images.npy", images.cpu())
    for n in (10, 100):
        show_images(images[:n], "Generated images", f"{path}_{n}.png")
    print(f"Wrote {path.name}.gif and others")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"ddpm.py: {' '.join(str(error).split())}")  # in one line
    except KeyboardInterrupt:
        sys.exit("ddpm.py: stopped; --resume goes on after the last finished epoch of a training")
