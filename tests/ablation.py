"""What is each idea worth, and what do more epochs buy? Run by hand on an idle machine: hours.

    python tests/ablation.py                      the recipe, and with something changed
    python tests/ablation.py mnist --images 30000 one data set, and shorter trainings
    python tests/ablation.py --epochs 1 3 10      a table, a curve, and the same noise drawn after
                                                  each

Each row is two trainings of their own, of the same number of images, with seeds 0 and 1; a cell has
both results. The learning rate rises and falls over just these images: an epoch is a finished short
training, not the start of a long one. ddpm.training_loop trains all of them; what is taken out or
put in is replaced at its name in ddpm.py.

5,000 training images are held back from these trainings and from the judge (see quality.py). "t =
20" is the mean squared error of the noise in them at this step. "FID* x1.75" is that of images
drawn in 25 steps with guidance 1.75 against as many of those held back, and "other" the share of
them, in %, that the classifier takes for a class not asked for. Recipes are chosen by these.
Trainings of --epochs have all images, as those in outputs/ have, and are compared with test images.

The report's loop: no labels, the noise predicted directly, t uniform, Adam with a constant rate of
0.001, batches of 128 and so half as many steps; but with our network, and drawn our way.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import NullFormatter
from quality import DEVICE, Judge, clock, ddpm, draw, features, frechet, other_class, quietly, split
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

OUTPUTS = Path(ddpm.out_dir)
SETS = {"mnist": "digits", "fashion": "clothes"}


def denoising_loss(model, x0, label=None, density=True, of_v=False):
    """ddpm.denoising_loss, and what can be changed in it.

    `density` says whether steps are drawn unevenly, without a change of what is minimized. That is
    the error of the noise, or `of_v`.
    """
    root = model.alpha_bars.sqrt()
    table = root / root.mean() if density else torch.ones_like(root)
    t = torch.multinomial(table, len(x0), replacement=True)
    eta = torch.randn_like(x0)
    if label is not None:
        dropped = torch.rand(len(x0), device=x0.device) < 0.1
        label = label.masked_fill(dropped, model.network.n_classes)
    eta_theta = model.backward(model(x0, t, eta), t, label)
    errors = (eta_theta - eta).square().mean((1, 2, 3))
    errors = errors / model.alpha_bars[t] if of_v else errors
    return (errors / table[t]).mean()


@torch.no_grad()
def check_loss():
    """Stops unless denoising_loss, with nothing taken out, is that of ddpm.py."""
    model = ddpm.MyDDPM(ddpm.MyUNet(), device=DEVICE)
    for p in model.parameters():
        p.normal_(std=0.1)  # a new network says 0, whatever the label
    x0, label = torch.rand(64, 1, 28, 28, device=DEVICE), torch.arange(64, device=DEVICE) % 10
    found = []
    for loss in (ddpm.denoising_loss, denoising_loss):
        torch.manual_seed(0)
        found.append(loss(model, x0, label))
    if not torch.allclose(*found):
        raise SystemExit("ddpm.denoising_loss has changed: change tests/ablation.py with it")


class PlainNoise(ddpm.MyUNet):
    """The same network; what it returns is the noise itself."""

    predicts_v = False


class ConstantAdam(torch.optim.Adam):
    """Adam that keeps its learning rate, whatever the training loop sets."""

    def step(self):
        for group in self.param_groups:
            group["lr"] = group["initial_lr"]
        super().step()


UNIFORM = partial(denoising_loss, density=False)
CHANGED = {
    "nothing: the recipe": {},
    "no labels": {"network": partial(ddpm.MyUNet, n_classes=0)},
    "t uniform": {"loss": UNIFORM},
    "t uniform, noise predicted directly": {"network": PlainNoise, "loss": UNIFORM},
    "t uniform, weight: error of v": {"loss": partial(denoising_loss, density=False, of_v=True)},
    "Muon, rate 0.005": {"lr": 5e-3},
    "Muon, rate 0.02": {"lr": 2e-2},
    "Adam, rate 0.001": {"optimizer": torch.optim.Adam, "lr": 1e-3},
    "Adam, rate 0.002": {"optimizer": torch.optim.Adam, "lr": 2e-3},
    "Adam, rate 0.004": {"optimizer": torch.optim.Adam, "lr": 4e-3},
    "Adam, rate 0.008": {"optimizer": torch.optim.Adam, "lr": 8e-3},
    "Adam, rate 0.016": {"optimizer": torch.optim.Adam, "lr": 16e-3},
    "the report's loop": {
        "network": partial(PlainNoise, n_classes=0),
        "loss": UNIFORM,
        "optimizer": ConstantAdam,
        "lr": 1e-3,
        "batch_size": 128,
    },
}


def train(
    dataset,
    n_images,
    seed,
    n_epochs=1,
    path=None,
    network=ddpm.MyUNet,
    loss=ddpm.denoising_loss,
    optimizer=ddpm.Muon,
    lr=ddpm.lr,
    batch_size=ddpm.batch_size,
):
    """-> MyDDPM, trained with n_images in each epoch, and the seconds that it took.

    With a `path`, its weights are kept there, and an interrupted training goes on.
    """
    torch.manual_seed(seed)
    model = ddpm.MyDDPM(network(), device=DEVICE)
    order = RandomSampler(dataset, num_samples=n_images)  # pass after pass, the last in part
    loader = DataLoader(dataset, batch_size, sampler=order)
    optim = optimizer(model.network.parameters(), lr)
    start = clock()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(ddpm, "denoising_loss", loss):
        path = path or f"{folder}/weights.pt"
        resume = Path(f"{path}.training").exists()
        ddpm.training_loop(model, loader, n_epochs, optim, store_path=path, resume=resume)
    return model, clock() - start


COLUMNS = ["seconds", "t = 20", "t = 100", "t = 300", "FID* x1", f"FID* x{ddpm.guidance:g}"]
COLUMNS += ["other x1", f"other x{ddpm.guidance:g}"]


class Table:
    """Judges models of one data set, and prints a row for each."""

    def __init__(self, name, n, first, held_out):
        self.n, (learned, others) = n, split()
        judge = Judge(name == "fashion", n, held_out)
        self.net, self.balanced, self.floor = judge.net, judge.real, judge.floor
        self.natural = features(judge.net, judge.train[others[:n]])
        dataset = ddpm.load_data(name == "fashion")
        self.held_out = [part.to(DEVICE) for part in dataset[others]]
        self.dataset = TensorDataset(*dataset[learned])
        print(f"\n{first:36}" + "".join(f"{column:>20}" for column in COLUMNS))

    def row(self, name, *found):
        """Prints a cell for each of COLUMNS, of all that was found, or a dash."""
        cells = [", ".join(f"{each[key]:.4g}" for each in found if key in each) for key in COLUMNS]
        print(f"{name:36}" + "".join(f"{cell or '-':>20}" for cell in cells), flush=True)

    def train(self, name, n_images, **recipe):
        """Trains a model with each of two seeds, and prints their row."""
        found = []
        for seed in (0, 1):
            try:
                model, seconds = quietly(train, self.dataset, n_images, seed, **recipe)
            except ddpm.InputError:  # the loss is not finite
                name += ", diverged"
                continue
            found.append({"seconds": seconds, **self.judge(model, seed)})
        self.row(name, *found)

    def judge(self, model, seed=0):
        """-> the errors of a model, and what the judge says of the images that it draws."""
        found, labels = self.errors(model), model.network.n_classes > 0
        # Without labels a class is drawn as often as it occurs.
        real = self.balanced if labels else self.natural
        for guidance in (1, ddpm.guidance) if labels else [1]:
            how = {"guidance": guidance, "sample_steps": 25, "SEED": seed}
            feats = features(self.net, draw(model, self.n, **how))
            found[f"FID* x{guidance:g}"] = frechet(feats, real)
            if labels:
                other = other_class(self.net, feats, torch.arange(self.n) % 10)
                found[f"other x{guidance:g}"] = other
        return found

    @torch.no_grad()
    def errors(self, model):
        """-> the mean squared error of the noise at some steps."""
        found = {}
        for t in (20, 100, 300):
            torch.manual_seed(0)  # the same noise for all models
            errors = []
            for x0, label in zip(*(part.split(500) for part in self.held_out), strict=True):
                label = label if model.network.n_classes else None
                eta = torch.randn_like(x0)
                errors.append((model.backward(model(x0, t, eta), t, label) - eta).square())
            found[f"t = {t}"] = torch.cat(errors).mean().item()
        return found


def ablate(name, args):
    """Prints the table of one data set."""
    check_loss()
    table = Table(name, args.n, f"{SETS[name]}: changed", held_out=True)
    for change, recipe in CHANGED.items():
        table.train(change, args.images, **recipe)


def after(n_epochs, name, args):
    """-> MyDDPM after so many epochs: that in outputs/, or trained, if need be."""
    if n_epochs == ddpm.n_epochs:
        return ddpm.load_model(OUTPUTS / f"{name}.pt", DEVICE)
    path = args.weights_dir / f"{name}_{n_epochs}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        print(f"training {path}", flush=True)
        dataset = ddpm.load_data(name == "fashion")
        train(dataset, len(dataset), 0, n_epochs, path)
    return ddpm.load_model(path, DEVICE)


def curves(args):
    """Prints the table of so many epochs, and draws all sets into one picture."""
    _, ax = plt.subplots(figsize=(7, 5))
    for color, name in enumerate(args.sets):
        table = Table(name, args.n, f"{SETS[name]}: epochs", held_out=False)
        rows = []
        for n in args.epochs:
            rows.append(table.judge(after(n, name, args)))
            table.row(str(n), rows[-1])
        for guidance, style in ((1, "o:"), (ddpm.guidance, "o-")):
            fids = [row[f"FID* x{guidance:g}"] for row in rows]
            label = f"{SETS[name]}, guidance {guidance:g}"
            ax.loglog(args.epochs, fids, style, color=f"C{color}", label=label)
        label = f"{SETS[name]}, training images"
        ax.axhline(table.floor, color=f"C{color}", linewidth=0.8, label=label)
    ax.set_title(f"What more epochs buy: FID* of {args.n:,} images in 25 steps")
    ax.set(xlabel="epochs, each point a training of its own", ylabel="FID*")
    ax.set_xticks(args.epochs, args.epochs)
    ticks = [0.2, 0.5, 1, 2, 5, 10, 20]
    ax.set_yticks(ticks, map(str, ticks))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    plt.savefig(args.out_dir / "curve.png", dpi=150, bbox_inches="tight")


def pictures(args):
    """Draws ten images of each set, in a row for each number of epochs."""
    rows = {}
    for name in args.sets:
        for n in args.epochs:
            how = {"sample_steps": 100, "gif_name": None}
            images = quietly(ddpm.generate_new_images, after(n, name, args), 10, **how)
            rows[f"{n} epoch" + "s" * (n > 1), name] = images
    names = [epochs for epochs, _ in rows]
    title = "The same noise, after trainings of so many epochs"
    ddpm.show_images(torch.cat([*rows.values()]), title, args.out_dir / "epochs.png", names)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure what each idea is worth, each epoch.")
    parser.add_argument("sets", nargs="*", default=list(SETS), help="mnist, fashion")
    parser.add_argument("--images", type=int, default=64_000, help="in each (%(default)s)")
    parser.add_argument("--epochs", type=int, nargs="+", help="compare these numbers of epochs")
    parser.add_argument("--n", type=int, default=1000, help="images for each FID* (%(default)s)")
    parser.add_argument("--out-dir", type=Path, default=OUTPUTS, help="of the pictures")
    text = "where --epochs finds <set>_<epochs>.pt, and keeps what it trains (%(default)s)"
    parser.add_argument("--weights-dir", type=Path, default=OUTPUTS / ".epochs", help=text)
    args = parser.parse_args(argv)
    if not set(args.sets) <= set(SETS):
        parser.error("the sets are mnist and fashion")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    if args.epochs:
        curves(args)
        pictures(args)
    else:
        for name in args.sets:
            ablate(name, args)


if __name__ == "__main__":
    main()
