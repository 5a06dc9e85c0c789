"""What is each idea worth? Run by hand on an idle machine: it takes hours.

    python tests/ablation.py                              the recipe, and with one thing changed
    python tests/ablation.py mnist --images 60000         one data set, and shorter trainings
    python tests/ablation.py --passes 1 3 10 30           what more passes over all images buy:
                                                          a table, a curve, and the same noise
                                                          drawn after each
    python tests/ablation.py --guidance 0 1 2 4           only a picture: the same noise, guided so

What is changed in drawing is tried on the weights in outputs/. Each later row is a training of its
own, from the same seed, of the same number of images; "seconds" is what it took. The learning rate
rises and falls over just these images: three passes are a finished short training, not the start of
a long one. ddpm.training_loop trains all of them; what is taken out or put in is replaced at its
name in ddpm.py.

5,000 training images are held back, but not from the weights in outputs/ and those of --passes:
"t = 20" is the mean squared error of the noise in them at this step. "FID* x2" (see quality.py) is
that of 2,000 images in 25 steps against the test images, with guidance 2, and "other" the share of
them, in %, that the classifier takes for a class not asked for. The report's loop has its batches
of 128, but our network and our way of reading images and drawing.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogFormatter, NullFormatter
from quality import DEVICE, Judge, clock, ddpm, draw, features, frechet, other_class, quietly
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

OUTPUTS = Path(ddpm.out_dir)


def denoising_loss(model, x0, label=None, density=True, parts=True, of_v=False):
    """ddpm.denoising_loss, and what can be changed in it.

    `density` and `parts` say how the steps are drawn, without a change of what is minimized. That
    is the error of the noise, or `of_v`.
    """
    n, device = len(x0), x0.device
    root = model.alpha_bars.sqrt()
    table = root / root.mean() if density else torch.ones_like(root)
    place = torch.randperm(n, device=device) if parts else 0
    u = (place + torch.rand(n, device=device)) / (n if parts else 1)
    t = torch.searchsorted(table.cumsum(0) / model.n_steps, u).clamp(max=model.n_steps - 1)
    eta = torch.randn_like(x0)
    if label is not None:
        label = label.masked_fill(torch.rand(n, device=device) < 0.1, model.network.n_classes)
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


CHANGED = {
    "labels: none": {"network": partial(ddpm.MyUNet, n_classes=0)},
    "t: uniform": {"loss": partial(denoising_loss, density=False)},
    "t: uniform; v: the noise itself": {
        "network": PlainNoise,
        "loss": partial(denoising_loss, density=False),
    },
    "t: drawn freely": {"loss": partial(denoising_loss, parts=False)},
    "weight: the error of v": {"loss": partial(denoising_loss, of_v=True)},
    "Muon: Adam, rate 0.002": {"optimizer": torch.optim.Adam, "lr": 2e-3},
    "Muon: Adam, rate 0.004": {"optimizer": torch.optim.Adam, "lr": 4e-3},
    "all: the report's loop": {
        "network": partial(PlainNoise, n_classes=0),
        "loss": partial(denoising_loss, density=False, parts=False),
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


GUIDANCES = sorted({1, 1.5, 2, ddpm.guidance})
COLUMNS = ["images", "seconds", "t = 20", "t = 100", "t = 300"]
COLUMNS += [f"{name} x{guidance:g}" for name in ("FID*", "other") for guidance in GUIDANCES]


class Table:
    """Judges models of one data set, and prints a row for each."""

    def __init__(self, name, args, first):
        self.name, self.n, self.seed = name, args.n, args.seed
        judge = Judge(name == "fashion", args.n, learn=False)
        self.net, self.balanced = judge.net, judge.test_feats
        self.natural = features(judge.net, judge.test)
        dataset = ddpm.load_data(name == "fashion")
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
        self.held_out = [part.to(DEVICE) for part in dataset[order[:5000]]]
        self.dataset = TensorDataset(*dataset[order[5000:]])
        print(f"\n{first:34}" + "".join(f"{column:>12}" for column in COLUMNS))

    def row(self, name, found):
        """Prints a cell for each of COLUMNS, or a dash if it was not found."""
        texts = [f"{found[key]:,.7g}" if key in found else "-" for key in COLUMNS]
        print(f"{name:34}" + "".join(f"{text:>12}" for text in texts), flush=True)

    def train(self, name, n_images, **recipe):
        """Trains a model and prints its row."""
        model, seconds = quietly(train, self.dataset, n_images, self.seed, **recipe)
        self.judge(name, model, images=n_images, seconds=round(seconds))

    def judge(self, name, model, steps=25, guidances=(1, ddpm.guidance), **found):
        """Prints the row of a model, with what was found before. -> the row."""
        found |= {**self.losses(model), **self.pictures(model, steps, guidances)}
        self.row(name, found)
        return found

    def finished(self, *steps):
        """Prints a row for the weights in outputs/, for each number of steps to draw in."""
        model = ddpm.load_model(OUTPUTS / f"{self.name}.pt", DEVICE)
        for n in steps:
            self.judge(f"outputs/, drawn in {n:,} steps", model, n, GUIDANCES)

    @torch.no_grad()
    def losses(self, model):
        found = {}
        for t in (20, 100, 300):
            torch.manual_seed(0)  # the same noise for all models
            errors = []
            for x0, label in zip(*(part.split(500) for part in self.held_out), strict=True):
                label = label if model.network.n_classes else None
                eta = torch.randn_like(x0)
                errors.append((model.backward(model(x0, t, eta), t, label) - eta).square())
            found[f"t = {t}"] = round(torch.cat(errors).mean().item(), 5)
        return found

    def pictures(self, model, steps, guidances):
        """-> what the judge says of the images that the model draws."""
        found, labels = {}, model.network.n_classes > 0
        # Without labels a class is drawn as often as it occurs, as in all test images.
        real = self.balanced if labels else self.natural
        for guidance in guidances if labels else [1]:
            how = {"guidance": guidance, "sample_steps": steps, "SEED": self.seed}
            feats = features(self.net, draw(model, self.n, **how))
            found[f"FID* x{guidance:g}"] = round(frechet(feats, real), 3)
            if labels:
                other = other_class(self.net, feats, torch.arange(self.n) % 10)
                found[f"other x{guidance:g}"] = round(other, 2)
        return found


def ablate(name, args):
    """Prints the table: other ways of drawing, and then of training, one thing changed in each."""
    check_loss()
    table = Table(name, args, "changed")
    table.finished(25, 50, *[] if args.no_full_chain else [ddpm.n_steps])
    table.train("nothing: the recipe", args.images)
    for change, recipe in CHANGED.items():
        try:
            table.train(change, args.images, **recipe)
        except FloatingPointError:
            table.row(f"{change}, diverged", {})


def after(n_passes, name, args):
    """-> MyDDPM after so many passes over a whole set: that in outputs/, or trained, if need be."""
    if n_passes == ddpm.n_epochs:
        return ddpm.load_model(OUTPUTS / f"{name}.pt", DEVICE)
    path = args.weights_dir / f"{name}_{n_passes}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        print(f"training {path}", flush=True)
        dataset = ddpm.load_data(name == "fashion")
        train(dataset, len(dataset), args.seed, n_passes, path)
    return ddpm.load_model(path, DEVICE)


def curves(args):
    """Prints the table of so many passes, and draws all sets into one picture."""
    _, axes = plt.subplots(figsize=(7, 5))
    for color, name in enumerate(args.sets):
        models = {n: after(n, name, args) for n in args.passes}
        table = Table(name, args, f"{name}, passes")
        rows = [table.judge(f"{n}", model) for n, model in models.items()]
        for guidance, style in ((1, ":"), (ddpm.guidance, "-")):
            fids = [row[f"FID* x{guidance:g}"] for row in rows]
            label = f"{name}, guidance {guidance:g}"
            axes.loglog(args.passes, fids, f"C{color}.{style}", label=label)
    axes.set(xlabel="passes over the images", ylabel=f"FID* of {args.n:,} images in 25 steps")
    axes.set_xticks(args.passes, args.passes)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    ddpm.show_figure(args.out_dir / "curve.png")


def picture(args):
    """Draws ten images of each set, the sets one above the other; the rows differ in one thing."""
    if args.passes:
        rows = {f"{n} pass" + "es" * (n > 1): (n, ddpm.guidance) for n in args.passes}
    else:
        rows = {f"guidance {g:g}": (ddpm.n_epochs, g) for g in args.guidance}
    figure, _ = plt.subplots(len(args.sets), figsize=(7, 0.6 * len(args.sets) * len(rows)))
    for ax, name in zip(figure.axes, args.sets, strict=True):
        images = []
        for n_passes, guidance in rows.values():
            how = {"guidance": guidance, "sample_steps": 100, "SEED": args.seed, "gif_name": None}
            model = after(n_passes, name, args)
            images.append(quietly(ddpm.generate_new_images, model, 10, **how))
        grid = ddpm.tile(torch.cat(images), gap=1)
        ax.imshow(grid, "gray", vmin=0, vmax=255, interpolation="nearest")
        ax.set_yticks([14.5 + 29 * i for i in range(len(rows))], rows)
        ax.set_xticks([])
        ax.tick_params(length=0)
    figure.tight_layout()
    ddpm.show_figure(args.out_dir / ("passes.png" if args.passes else "guidance.png"))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure what each idea is worth, each pass.")
    parser.add_argument("sets", nargs="*", default=["mnist", "fashion"], help="mnist, fashion")
    parser.add_argument("--images", type=int, default=100_000, help="in each (%(default)s)")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--passes", type=int, nargs="+", help="compare these numbers of passes")
    other.add_argument("--guidance", type=float, nargs="+", help="draw a picture of these")
    parser.add_argument("--n", type=int, default=2000, help="images for each FID* (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of training, drawing (%(default)s)")
    parser.add_argument("--no-full-chain", action="store_true", help="leave it out: it takes long")
    parser.add_argument("--out-dir", type=Path, default=OUTPUTS, help="of the pictures")
    text = "where --passes finds <set>_<passes>.pt, and keeps what it trains (%(default)s)"
    parser.add_argument("--weights-dir", type=Path, default=OUTPUTS / ".passes", help=text)
    args = parser.parse_args(argv)
    if not set(args.sets) <= {"mnist", "fashion"}:
        parser.error("the sets are mnist and fashion")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    if args.passes:
        curves(args)
    if args.passes or args.guidance:
        picture(args)
    else:
        for name in args.sets:
            ablate(name, args)


if __name__ == "__main__":
    main()
