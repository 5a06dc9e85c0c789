"""How good are the generated images? Run by hand: python tests/quality.py [weights.pt ...]

The judge is a small classifier, trained here once per data set on the training images. Generated
images are compared with the test images in its features, beside the same number of real training
images: their FID is the floor. The figures can be compared within one classifier only.
"""

import argparse
import hashlib
import inspect
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import datasets

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ddpm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
        # Without hardware for it, bf16 is far slower than fp32.
        bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False) and DEVICE.type == "cpu"
        # A view of all 5 x 5 shifts by -2..2 pixels: (n, 5, 5, 28, 28).
        shifts = F.pad(images, (2, 2, 2, 2)).unfold(1, 28, 1).unfold(2, 28, 1)
        for _ in range(n_epochs):
            order = torch.randperm(len(images))[: n_batches * batch_size]
            for i in order.view(n_batches, batch_size):
                dy, dx = torch.randint(5, (2, batch_size))
                x = shifts[i, dy, dx].to(DEVICE)[:, None].float() / 255
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
                    scores = net(x)
                loss = F.cross_entropy(scores.float(), labels[i].to(DEVICE), label_smoothing=0.05)
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


@torch.no_grad()
def classifier(fashion):
    """-> Classifier in eval mode, from the cache if it was trained before; prints its accuracy."""
    recipe = inspect.getsource(Classifier) + inspect.getsource(train_classifier)
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm-quality"
    path = cache / f"{NAMES[fashion].lower()}-{digest}.pt"
    kind = datasets.FashionMNIST if fashion else datasets.MNIST
    images, test = (ddpm.load_images(fashion, train=train) for train in (True, False))
    labels, test_labels = (
        kind(ROOT / "datasets", train=train, download=True).targets for train in (True, False)
    )
    if path.exists():
        net = Classifier().to(DEVICE, memory_format=torch.channels_last).eval()
        net.load_state_dict(torch.load(path, map_location=DEVICE, weights_only=True))
    else:
        print(f"training the {NAMES[fashion]} classifier, once: a minute or two", flush=True)
        with torch.enable_grad():
            net = train_classifier(images, labels)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache, delete=False) as file:
            torch.save(net.state_dict(), file)
        os.replace(file.name, path)
    right = net.head(features(net, test)).argmax(1).cpu() == test_labels
    print(f"{NAMES[fashion]} classifier: {right.double().mean():.2%} of the test images right")
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


def to_uint8(images):
    """(n, 1, 28, 28) in [-1, 1] -> (n, 28, 28) uint8, as a saved picture would be."""
    return ((images[:, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def generate(model, n, steps, guidance):
    """-> (n, 28, 28) uint8, and the seconds it took."""
    start = time.perf_counter()
    how = {"gif_name": None, "sample_steps": steps, "guidance": guidance}
    images = ddpm.generate_new_images(model, n, DEVICE, **how)
    return to_uint8(images).cpu(), time.perf_counter() - start


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


HEADER = """\
                                      FID/  class shares, %    precision recall  nearest, L2   time
images                 steps     FID floor   min   max    TV       %       %     1st %  median    s"""
LEGEND = """
FID           squared Frechet distance of the features to the test images'; lower is better. The
              floor is that of as many real training images: 1.0 x floor is as good as real.
class shares  of the predicted classes: the smallest, the largest, and the total variation distance
              from the test images' shares; lower TV is better.
precision     generated images that lie among the real ones (fidelity); higher is better.
recall        real images that lie among the generated ones (variety); higher is better.
nearest       pixel distance (values 0..1) to the nearest training image: 1st percentile and median;
              near the test images' is good, far below them is memorized, above them is noise."""


def shares(net, feats):
    """(n, d) features -> (10,) shares of the predicted classes."""
    return net.head(feats).argmax(1).bincount(minlength=10).double() / len(feats)


class Judge:
    """The measures of one data set; prints its reference rows when built."""

    @torch.no_grad()
    def __init__(self, fashion, n):
        print()
        self.net = classifier(fashion)
        self.train, self.test = (ddpm.load_images(fashion, train=train) for train in (True, False))
        self.test_feats = features(self.net, self.test)
        self.test_shares = shares(self.net, self.test_feats)
        choice = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))[:n]
        self.floor = frechet(features(self.net, self.train[choice]), self.test_feats)
        print(f"{n:,} images a row against {len(self.test):,} test images\n\n{HEADER}")
        # Each training image is its own nearest, and the test images are their own reference.
        self.row(f"{NAMES[fashion]} training", self.train[choice], with_nearest=False)
        self.row(f"{NAMES[fashion]} test", self.test, with_feats=False)

    @torch.no_grad()
    def row(self, name, images, steps="", seconds=None, with_feats=True, with_nearest=True):
        """Print one row of the table for (n, 28, 28) uint8 images. -> its FID, and the floor."""
        feats = features(self.net, images)
        found = shares(self.net, feats)
        off = (found - self.test_shares).abs().sum().item() / 2
        fid = ratio = precision = recall = low = median = float("nan")
        if with_feats:
            fid = frechet(feats, self.test_feats)
            ratio = fid / self.floor
            precision, recall = precision_recall(self.test_feats, feats)
        if with_nearest:
            distances = nearest(images, self.train)
            low, median = (distances.quantile(q).item() for q in (0.01, 0.5))
        line = (
            f"{name[-22:]:22} {steps:>5} {fid:7.3f} {ratio:5.1f} "
            f"{100 * found.min():5.1f} {100 * found.max():5.1f} {100 * off:5.1f} "
            f"{100 * precision:9.1f} {100 * recall:6.1f} {low:10.2f} {median:7.2f} "
            + (f"{seconds:7.1f}" if seconds is not None else f"{'-':>7}")
        )
        print(line.replace("nan", "  -"), flush=True)
        return fid, self.floor


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure the quality of generated images.")
    parser.add_argument("weights", nargs="*", type=Path, help="default: those in outputs/")
    parser.add_argument("--n", type=int, default=10_000, help="images a row (%(default)s)")
    parser.add_argument("--sample-steps", type=int, nargs="+", help="a row each (the flag's)")
    parser.add_argument("--guidance", type=float, default=ddpm.guidance, help="(%(default)s)")
    parser.add_argument("--note", action="store_true", help="add the FID to the weights' .txt")
    parser.add_argument("--images", type=Path, help="uint8 images to measure, .npy: (n, 28, 28)")
    parser.add_argument("--fashion", action="store_true", help="--images are of Fashion-MNIST")
    args = parser.parse_args(argv)
    if not 100 <= args.n <= 60_000:
        parser.error("--n must be within 100..60000")
    if not args.guidance >= 1:
        parser.error("--guidance must be at least 1")
    if args.images:
        images = torch.from_numpy(np.load(args.images))
        if images.dtype != torch.uint8 or images.shape[1:] != (28, 28):
            parser.error("--images needs uint8 images of shape (n, 28, 28)")
        Judge(args.fashion, len(images)).row(args.images.name, images)
    defaults = [ROOT / "outputs" / name for name in ("mnist.pt", "fashion.pt")]
    weights = args.weights or [path for path in defaults if path.exists() and not args.images]
    if not weights and not args.images:
        parser.error("no weights in outputs/ yet: train first, or name a file")
    judges = {}
    for path in weights:
        model = ddpm.load_model(path, DEVICE)
        fashion = model.info["flags"]["fashion"]
        if fashion not in judges:
            judges[fashion] = Judge(fashion, args.n)
        for steps in args.sample_steps or [ddpm.sample_steps]:
            images, seconds = generate(model, args.n, steps, args.guidance)
            figures = judges[fashion].row(path.name, images, steps, seconds)
            if args.note:
                with path.with_suffix(".txt").open("a", encoding="utf-8") as note:
                    note.write(f"# {args.n:,} images, {steps} steps, guidance {args.guidance:g}: ")
                    note.write("FID {:.3f}, floor {:.3f}\n".format(*figures))
    print(LEGEND)


if __name__ == "__main__":
    main()
