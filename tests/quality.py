"""How good are the generated images? Run by hand: python tests/quality.py [weights.pt ...]

The judge is a small classifier, trained here once per data set on 55,000 of the training images,
in fp32 on any processor; the 5,000 others are for choosing recipes (see ablation.py). Generated
images, every class in turn, are compared with as many test images in its features, beside as many
training images. Of the real images, too, every class counts the same: MNIST has 27 % more ones
than fives, and a difference in numbers is none in quality. The figures can be compared within one
classifier and one number of images only. FID* has a star because it is not the usual FID: that
uses the features of Inception, a network of colour photographs.
"""

import argparse
import hashlib
import inspect
import itertools
import os
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ddpm

DEVICE = torch.device(ddpm.device)
NAMES = {False: "MNIST", True: "Fashion-MNIST"}


class Classifier(nn.Module):
    """(n, 1, 28, 28) in [0, 1] -> `body`: (n, 64) features -> `head`: (n, 10) class scores."""

    def __init__(self):
        super().__init__()
        layers = []
        for c_in, c_out in [(1, 32), (32, 64), (64, 128)]:
            conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
            layers += [conv, nn.MaxPool2d(2), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 3 * 3, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.body(x))


def train_classifier(images, labels, n_epochs=4, batch_size=128, lr=4e-3, seed=0):
    """(n, 28, 28) uint8 and (n,) labels -> trained Classifier; the same on every run."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Classifier().to(DEVICE, memory_format=torch.channels_last)
        optim = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.02)
        n_batches = len(images) // batch_size
        schedule = torch.optim.lr_scheduler.OneCycleLR(optim, lr, n_epochs * n_batches)
        # A view of all 5 x 5 shifts by -2..2 pixels: (n, 5, 5, 28, 28).
        shifts = F.pad(images, (2, 2, 2, 2)).unfold(1, 28, 1).unfold(2, 28, 1)
        for _ in range(n_epochs):
            order = torch.randperm(len(images))[: n_batches * batch_size]
            for i in order.view(n_batches, batch_size):
                dy, dx = torch.randint(5, (2, batch_size))
                x = shifts[i, dy, dx].to(DEVICE)[:, None].float() / 255
                loss = F.cross_entropy(net(x), labels[i].to(DEVICE), label_smoothing=0.05)
                optim.zero_grad()
                loss.backward()
                optim.step()
                schedule.step()
    return net.eval()


@torch.no_grad()
def features(net, images):
    """(n, 28, 28) uint8 -> (n, 64) float32, the classifier's penultimate layer."""
    batches = images.split(100)
    return torch.cat([net.body(x.to(DEVICE)[:, None].float() / 255) for x in batches])


def load(fashion, train):
    """-> images (n, 28, 28) uint8 and labels (n,)."""
    images, labels = ddpm.load_data(fashion, train).tensors
    return to_uint8(images), labels


def to_uint8(images):
    """(n, 1, 28, 28) in [-1, 1] -> (n, 28, 28) uint8, as a saved picture would be."""
    return ((images[:, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def clock():
    """-> seconds, read when the device has finished its work."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def quietly(function, *args, **kwargs):
    """-> what the function returns; its progress is not shown."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return function(*args, **kwargs)


def draw(model, n, SEED=0, **how):
    """-> n generated images (n, 28, 28) uint8, every class in turn, 500 at a time."""
    drawn = []
    for i, start in enumerate(range(0, n, 500)):
        how |= {"gif_name": None, "SEED": 1000 * SEED + i}
        size = min(500, n - start)
        drawn.append(quietly(ddpm.generate_new_images, model, size, DEVICE, **how))
    return to_uint8(torch.cat(drawn)).cpu()


def split():
    """-> indices of 55,000 training images, and of the 5,000 from which recipes are chosen."""
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))
    return order[5000:], order[:5000]


def in_turn(labels, n, seed=0):
    """Labels (m,) -> indices of n images at random, every class in turn."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = F.one_hot(labels[order])
    place_in_class = (classes.cumsum(0) * classes).sum(1)
    return order[(place_in_class * 10 + labels[order]).argsort()[:n]]


def judge_of(fashion, images, labels):
    """-> Classifier in eval mode, from the cache if it was trained before."""
    recipe = "".join(map(inspect.getsource, (Classifier, train_classifier, split)))
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm-quality"
    path = cache / f"{NAMES[fashion].lower()}-{digest}.pt"
    if not path.exists():
        print(f"training the {NAMES[fashion]} classifier, once: some minutes", flush=True)
        learned, _ = split()
        net = train_classifier(images[learned], labels[learned])
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache, delete=False) as file:
            torch.save(net.state_dict(), file)
        os.replace(file.name, path)
    net = Classifier().to(DEVICE, memory_format=torch.channels_last).eval()
    net.load_state_dict(torch.load(path, map_location=DEVICE, weights_only=True))
    return net


def frechet(a, b):
    """(n, d) and (m, d) features -> squared Frechet distance of their Gaussians, in float64."""
    a, b = (x.double().cpu().numpy() for x in (a, b))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # tr sqrt(A B) = tr sqrt(sqrt(A) B sqrt(A)), and the latter is symmetric.
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    shift = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def other_class(net, feats, labels):
    """Features, labels (n,) -> % of them that the classifier takes for another class."""
    return 100 * (net.head(feats).argmax(1).cpu() != labels).double().mean().item()


def precision_recall(real, fake, k=3, chunk=1000):
    """Features -> share of fakes among the real ones, and of real ones among the fakes.

    "Among" is within the distance from any of them to its own k-th neighbour (Kynkaanniemi 2019).
    """

    def share_inside(x, points):
        # The nearest of all to each point is the point itself, hence k + 1.
        to_all = (torch.cdist(p, points) for p in points.split(chunk))
        radii = torch.cat([d.topk(k + 1, largest=False).values[:, -1] for d in to_all])
        inside = [(torch.cdist(c, points) <= radii).any(1) for c in x.split(chunk)]
        return torch.cat(inside).double().mean().item()

    return share_inside(fake, real), share_inside(real, fake)


def nearest(images, train, chunk=500):
    """(n, 28, 28) and (m, 28, 28) uint8 -> (n,) L2 distances to the nearest, pixels in 0..1."""
    train = train.to(DEVICE).flatten(1).float() / 255
    squares = train.square().sum(1)
    distances = []
    for x in images.to(DEVICE).split(chunk):
        x = x.flatten(1).float() / 255
        closest = torch.addmm(squares, x, train.T, alpha=-2).argmin(1)
        # Again by differences: the product's rounding would hide an exact copy.
        distances.append((x - train[closest]).norm(dim=1))
    return torch.cat(distances)


def frechet_and_error(a, b, parts=10):
    """-> frechet(a, b) and its standard error: the jackknife that leaves out a tenth of `a`."""
    chunks = a.chunk(parts)
    rests = [torch.cat(chunks[:i] + chunks[i + 1 :]) for i in range(parts)]
    without = [frechet(rest, b) for rest in rests]
    spread = np.square(np.subtract(without, np.mean(without))).sum()
    return frechet(a, b), float((spread * (parts - 1) / parts) ** 0.5)


COLUMNS = ["FID*", "+-", "other", "precision", "recall", "nearest", "1 %", "seconds"]
LEGEND = """
FID*       squared Frechet distance of the features to those of the test images, +- standard error
other      % of images that the classifier takes for another class than the one asked for; of the
           test images it is the classifier's own error
precision  % of these images that lie among real ones (fidelity); recall: the reverse (variety)
nearest    the smallest distance (pixels 0 to 1) to a training image, and that of the nearest 1 %:
           far below those of test images they would be copies"""


class Judge:
    """The measures of one data set, by n images each; prints its reference rows when made.

    Images are compared with test images, or, to choose a recipe, with images held out.
    """

    def __init__(self, fashion, n, held_out=False):
        train, train_labels = load(fashion, train=True)
        self.train = train
        test, test_labels = load(fashion, train=False)
        self.net = judge_of(fashion, train, train_labels)
        if held_out:
            learned, others = split()
            test, test_labels = train[others], train_labels[others]
            train, train_labels = train[learned], train_labels[learned]
        chosen = in_turn(test_labels, n)
        self.real = features(self.net, test[chosen])
        what = "held-out training" if held_out else "test"
        print(f"\n{NAMES[fashion]}: {n:,} images a row, against as many {what} images\n")
        print(f"{'images':28}" + "".join(f"{name:>10}" for name in COLUMNS))
        floor = in_turn(train_labels, n)
        found = self.row("training images", train[floor], train_labels[floor], ["nearest"])
        self.floor = found["FID*"]
        if not held_out:
            self.row("test images", test[chosen], test_labels[chosen], ["FID*"])

    @torch.no_grad()
    def row(self, name, images, labels, skip=(), seconds=None):
        """Prints a row for images (n, 28, 28) uint8 of the classes `labels` (n,). -> its cells."""
        feats = features(self.net, images)
        found = {"other": other_class(self.net, feats, labels)}
        if "FID*" not in skip:
            found["FID*"], found["+-"] = frechet_and_error(feats, self.real)
            shares = precision_recall(self.real, feats)
            found["precision"], found["recall"] = (100 * share for share in shares)
        if "nearest" not in skip:
            distances = nearest(images, self.train)
            found["nearest"], found["1 %"] = distances.min(), distances.quantile(0.01)
        if seconds is not None:
            found["seconds"] = seconds
        cells = [f"{found[key]:10.3f}" if key in found else f"{'-':>10}" for key in COLUMNS]
        print(f"{name:28}" + "".join(cells), flush=True)
        return found


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure the quality of generated images.")
    parser.add_argument("weights", nargs="*", type=Path, help="'fashion' in the name: of clothes")
    parser.add_argument("--n", type=int, default=8000, help="images a row (%(default)s)")
    parser.add_argument("--sample-steps", type=int, nargs="+", default=[50], help="a row each")
    parser.add_argument("--guidance", type=float, nargs="+", default=[ddpm.guidance], help="too")
    parser.add_argument("--seed", type=int, default=0, help="of the images (%(default)s)")
    args = parser.parse_args(argv)
    if not 100 <= args.n <= 8920:  # as many balanced test images are there
        parser.error("--n must be within 100..8920")
    judges = {}
    for path in args.weights or [ROOT / "outputs" / "mnist.pt", ROOT / "outputs" / "fashion.pt"]:
        model = ddpm.load_model(path, DEVICE)
        fashion = "fashion" in path.name
        if fashion not in judges:
            judges[fashion] = Judge(fashion, args.n)
        for steps, guidance in itertools.product(args.sample_steps, args.guidance):
            start = clock()
            how = {"sample_steps": steps, "guidance": guidance, "SEED": args.seed}
            images = draw(model, args.n, **how)
            seconds = clock() - start
            name = f"{path.stem} {steps} steps x{guidance:g}"
            judges[fashion].row(name, images, torch.arange(args.n) % 10, seconds=seconds)
    print(LEGEND)


if __name__ == "__main__":
    main()
