"""What is each idea worth, and each minute? Run by hand on an idle machine: it takes hours.

    python tests/ablation.py                              the recipe, and with one thing changed
    python tests/ablation.py mnist --images 60000         one data set, and shorter trainings
    python tests/ablation.py --curve 5000 15000 60000     the recipe in so many images, a picture
    python tests/ablation.py --guidance 0 1 2 4           only a picture: the same noise, guided so

What is changed in drawing is tried on the weights in outputs/. Each later row is a training of its
own, from the same seed, of the same number of images; "seconds" is what it took. The learning rate
rises and falls over just these images, so a point of the curve is a finished short training, not
the start of a long one. ddpm.train_epoch trains all of them; what is taken out or put in is
replaced at its name in ddpm.py.

5,000 training images are held back, but not from the weights in outputs/: "t = 20" is the mean
squared error of the noise in them at this step. FID* (see quality.py) is that of 2,000 images in
25 steps against the test images, with guidance 1 (none) and with that of ddpm.py. "other" is the
share, in %, that the classifier takes for a class not asked for, with the latter guidance. The
report's loop has its batches of 128, but our network and our way of reading images and drawing.
"""

import argparse
from functools import partial
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogFormatter
from quality import DEVICE, ROOT, Judge, clock, ddpm, draw, features, frechet, other_class
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, RandomSampler, TensorDataset


def denoising_loss(model, x0, label=None, density=True, parts=True, power=0.0):
    """ddpm.denoising_loss, and what can be changed in it.

    `density` and `parts` say how the steps are drawn, without a change of what is minimized. That
    is the error of the noise with `power` 0, that of v with 1.
    """
    n, device = len(x0), x0.device
    root = model.alpha_bars.sqrt()
    table = root / root.mean() if density else torch.ones_like(root)
    place = torch.randperm(n, device=device) if parts else 0
    u = (place + torch.rand(n, device=device)) / (n if parts else 1)
    t = torch.searchsorted(table.cumsum(0) / model.n_steps, u).clamp(max=model.n_steps - 1)
    eta = torch.randn_like(x0)
    if label is not None:
        label = label.masked_fill(torch.rand(n, device=device) < 0.1, model.n_classes)
    eta_theta = model.backward(model(x0, t, eta), t, label)
    errors = (eta_theta - eta).square().mean((1, 2, 3))
    return (errors / table[t] / model.alpha_bars[t] ** power).mean()


@torch.no_grad()
def check_loss():
    """Stops unless denoising_loss, with nothing taken out, is that of ddpm.py."""
    model = ddpm.MyDDPM(ddpm.MyUNet(), device=DEVICE)
    found = []
    for loss in (ddpm.denoising_loss, denoising_loss):
        torch.manual_seed(0)
        found.append(loss(model, torch.zeros(64, 1, 28, 28, device=DEVICE)))
    if not torch.allclose(*found):
        raise SystemExit("ddpm.denoising_loss has changed: change tests/ablation.py with it")


class PlainNoise(ddpm.MyUNet):
    """The same network; what it returns is the noise itself."""

    predicts_v = False


class ConstantAdam(torch.optim.Adam):
    """Adam that keeps its learning rate, whatever train_epoch sets."""

    def step(self):
        for group in self.param_groups:
            group["lr"] = group["initial_lr"]
        super().step()


CHANGED = {
    "labels: none": {"network": partial(ddpm.MyUNet, n_classes=0)},
    "v: the network says the noise": {"network": PlainNoise},
    "density of t: uniform": {"loss": partial(denoising_loss, density=False)},
    "weight: alpha_bar^-1/2": {"loss": partial(denoising_loss, power=0.5)},
    "weight: the error of v": {"loss": partial(denoising_loss, power=1)},
    "all: the report's loop": {
        "network": partial(PlainNoise, n_classes=0),
        "loss": partial(denoising_loss, density=False, parts=False),
        "optimizer": ConstantAdam,
        "lr": 1e-3,
        "batch_size": 128,
    },
    "Muon: Adam, rate 0.001": {"optimizer": torch.optim.Adam, "lr": 1e-3},
    "Muon: Adam, rate 0.002": {"optimizer": torch.optim.Adam, "lr": 2e-3},
    "Muon: Adam, rate 0.004": {"optimizer": torch.optim.Adam, "lr": 4e-3},
    "Muon: Adam, rate 0.008": {"optimizer": torch.optim.Adam, "lr": 8e-3},
    "average of the weights: drawn by": {"average": True},
}


def train(
    dataset,
    n_images,
    seed,
    network=ddpm.MyUNet,
    loss=ddpm.denoising_loss,
    optimizer=ddpm.Muon,
    lr=ddpm.lr,
    batch_size=ddpm.batch_size,
    average=False,
):
    """-> trained MyDDPM, or one with the average of its weights, and the seconds that it took."""
    torch.manual_seed(seed)
    model = ddpm.MyDDPM(network(), device=DEVICE)
    averaged = AveragedModel(model, avg_fn=lambda mean, p, n: mean.lerp(p, 16 / (16 + n)))
    order = RandomSampler(dataset, num_samples=n_images)  # pass after pass, the last in part
    loader = DataLoader(dataset, batch_size, sampler=order)
    optim = optimizer(model.network.parameters(), lr)
    if average:
        optim.register_step_post_hook(lambda *_: averaged.update_parameters(model))
    start = clock()
    with mock.patch.object(ddpm, "denoising_loss", loss):
        for _ in ddpm.train_epoch(model, loader, optim, 1, 1):
            pass
    return averaged.module if average else model, clock() - start


GUIDED = f"FID* x{ddpm.guidance:g}"
COLUMNS = ["images", "seconds", "t = 20", "t = 100", "t = 300", "FID* x1", GUIDED, "other"]


class Table:
    """Judges models of one data set, and prints a row for each."""

    def __init__(self, fashion, args, first):
        self.n, self.seed = args.n, args.seed
        self.weights = ROOT / "outputs" / ("fashion.pt" if fashion else "mnist.pt")
        judge = Judge(fashion, args.n, learn=False)
        self.net, self.balanced = judge.net, judge.test_feats
        self.natural = features(judge.net, judge.test)
        dataset = ddpm.load_data(fashion)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
        self.held_out = [part.to(DEVICE) for part in dataset[order[:5000]]]
        self.dataset = TensorDataset(*dataset[order[5000:]])
        print(f"\n{first:34}" + "".join(f"{name:>11}" for name in COLUMNS))

    def row(self, name, found):
        """Prints a cell for each of COLUMNS, or a dash if it was not found."""
        texts = [f"{found[key]:,.7g}" if key in found else "-" for key in COLUMNS]
        print(f"{name:34}" + "".join(f"{text:>11}" for text in texts), flush=True)

    def train(self, name, n_images, **recipe):
        """Trains a model and prints its row. -> the row."""
        model, seconds = train(self.dataset, n_images, self.seed, **recipe)
        found = {"images": n_images, "seconds": round(seconds)}
        found |= {**self.losses(model), **self.pictures(model)}
        self.row(name, found)
        return found

    def finished(self):
        """Prints the row of the weights in outputs/. -> the model."""
        model = ddpm.load_model(self.weights, DEVICE)
        found = {**self.losses(model), **self.pictures(model)}
        self.row("outputs/: the default training", found)
        return model

    @torch.no_grad()
    def losses(self, model):
        found = {}
        for t in (20, 100, 300):
            torch.manual_seed(0)  # the same noise for all models
            errors = []
            for x0, label in zip(*(part.split(500) for part in self.held_out), strict=True):
                eta = torch.randn_like(x0)
                errors.append((model.backward(model(x0, t, eta), t, label) - eta).square())
            found[f"t = {t}"] = round(torch.cat(errors).mean().item(), 5)
        return found

    def pictures(self, model, steps=25):
        """-> what the judge says of images without guidance, and with it if there are labels."""
        found = {"FID* x1": self.fid(self.drawn(model, steps, 1), model)}
        if model.n_classes:
            feats = self.drawn(model, steps, ddpm.guidance)
            asked = torch.arange(self.n) % model.n_classes
            found[GUIDED] = self.fid(feats, model)
            found["other"] = round(other_class(self.net, feats, asked), 2)
        return found

    def drawn(self, model, steps, guidance):
        """-> features of the images that the model draws."""
        how = {"guidance": guidance, "sample_steps": steps, "SEED": self.seed}
        return features(self.net, draw(model, self.n, **how))

    def fid(self, feats, model):
        # Without labels a class is drawn as often as it occurs, as in all test images.
        real = self.balanced if model.n_classes else self.natural
        return round(frechet(feats, real), 3)


def without_ramp(model):
    """-> context in which the guidance counts in full at each step of drawing with guidance 1."""
    backward = model.backward

    def guided(x, t, label=None):
        without_label = backward(x, t)
        return without_label + ddpm.guidance * (backward(x, t, label) - without_label)

    return mock.patch.object(model, "backward", guided)


def ablate(fashion, args):
    """Prints the table of the recipe with one thing changed, in drawing and then in training."""
    table = Table(fashion, args, "changed")
    model = table.finished()
    with without_ramp(model):
        feats = table.drawn(model, 25, 1)
    table.row("ramp of the guidance: none", {GUIDED: table.fid(feats, model)})
    table.row("few steps: 50 in place of 25", table.pictures(model, 50))
    if not args.no_full_chain:
        table.row("few steps: the full chain", table.pictures(model, model.n_steps))
    table.train("nothing: the recipe", args.images)
    for name, recipe in CHANGED.items():
        try:
            table.train(name, args.images, **recipe)
        except FloatingPointError:
            table.row(f"{name}, diverged", {})


def curves(args):
    """Prints the table of the recipe in so many images, and draws all sets into one picture."""
    figure, axes = plt.subplots(figsize=(7, 5))
    for color, name in enumerate(args.sets):
        table = Table(name == "fashion", args, name)
        table.finished()
        rows = [table.train("", n_images) for n_images in args.curve]
        for guidance, column, style in ((1, "FID* x1", ":"), (ddpm.guidance, GUIDED, "-")):
            seconds, fids = ([row[key] for row in rows] for key in ("seconds", column))
            label = f"{name}, guidance {guidance:g}"
            axes.loglog(seconds, fids, f"C{color}.{style}", label=label)
    axes.set(xlabel="seconds of training", ylabel=f"FID* of {args.n:,} images in 25 steps")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter())
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    ddpm.show_figure(figure, args.out_dir / "curve.png")


def guided_picture(args):
    """Draws ten images of each set, a row for each guidance, by the weights in outputs/."""
    rows = []
    models = [ddpm.load_model(ROOT / "outputs" / f"{name}.pt", DEVICE) for name in args.sets]
    for guidance in args.guidance:
        how = {"guidance": guidance, "sample_steps": 50, "gif_name": None, "SEED": args.seed}
        rows += [ddpm.generate_new_images(model, 10, **how) for model in models]
    title = (
        f"Guidance {', '.join(f'{guidance:g}' for guidance in args.guidance)}, from top to bottom"
    )
    ddpm.show_images(torch.cat(rows), title, args.out_dir / "guidance.png", 10 * len(models))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure what each idea is worth, each minute.")
    parser.add_argument("sets", nargs="*", default=["mnist", "fashion"], help="mnist, fashion")
    parser.add_argument("--images", type=int, default=100_000, help="in each (%(default)s)")
    parser.add_argument("--curve", type=int, nargs="+", help="images in each training")
    parser.add_argument("--guidance", type=float, nargs="+", help="draw a picture of these")
    parser.add_argument("--n", type=int, default=2000, help="images for each FID* (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of training, drawing (%(default)s)")
    parser.add_argument("--no-full-chain", action="store_true", help="leave it out: it takes long")
    parser.add_argument("--out-dir", type=Path, default=Path(ddpm.out_dir), help="of the pictures")
    args = parser.parse_args(argv)
    if not set(args.sets) <= {"mnist", "fashion"}:
        parser.error("the sets are mnist and fashion")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    if args.guidance:
        guided_picture(args)
        return
    check_loss()
    if args.curve:
        curves(args)
        return
    for name in args.sets:
        ablate(name == "fashion", args)


if __name__ == "__main__":
    main()
