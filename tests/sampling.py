"""What the stored weights do, without any training. Run by hand on an idle machine.

python tests/sampling.py                      ways to sample, in few steps: a table
python tests/sampling.py --n 300 --all-steps  the same with 1,000 steps beside them, of fewer
                                              images: it takes long
python tests/sampling.py --errors             the error at each step: errors.png; and the bound
                                              of the likelihood
python tests/sampling.py --pictures           one chain, x_t and the predicted x_0: reverse.png;
                                              the same noise with more guidance: guidance.png
"""

import argparse
import itertools
import math
from functools import partial
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
from quality import DEVICE, Judge, clock, ddpm, draw, quietly

OUTPUTS = Path(ddpm.out_dir)
SETS = {"mnist": "digits", "fashion": "clothes"}


def ddim(model, x, label, guidance, sample_steps, variance, generator=None, eta=1.0):
    """ddpm.reverse_process without its second order (DDIM, eq. 12); eta = 0 adds no noise."""
    alpha_bars = [*model.alpha_bars.tolist(), 1.0]
    yield x
    steps = ddpm.falling_steps(sample_steps, model.n_steps - 1)
    for t, s in itertools.pairwise([*steps, -1]):
        x0 = ddpm.predict_x0(model, x, t, label, guidance)
        a_t, a_s = alpha_bars[t], alpha_bars[s]
        noise = (x - a_t**0.5 * x0) / (1 - a_t) ** 0.5
        var = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
        z = torch.randn(x.shape, generator=generator, device=x.device)
        x = a_s**0.5 * x0 + (1 - a_s - var) ** 0.5 * noise + var**0.5 * z
        yield x


def evenly(n, highest):
    return np.linspace(highest, 0, n).round().astype(int).tolist()


# What is replaced in ddpm.py, and the arguments of generate_new_images.
WAYS = {
    "25 steps, as it is": ({}, {"sample_steps": 25}),
    "25, no extrapolation": ({"reverse_process": torch.no_grad()(ddim)}, {"sample_steps": 25}),
    "25, steps evenly spaced": ({"falling_steps": evenly}, {"sample_steps": 25}),
    "25, DDIM (first order)": (
        {"reverse_process": torch.no_grad()(partial(ddim, eta=0.0))},
        {"sample_steps": 25},
    ),
    "25, variance = 1": ({}, {"sample_steps": 25, "variance": 1}),
    "50 steps": ({}, {"sample_steps": 50}),
}
ALL_STEPS = {
    "1,000 steps": ({}, {"sample_steps": 1000}),
    "1,000, variance = 1": ({}, {"sample_steps": 1000, "variance": 1}),
}


def compare(name, args):
    """Prints a row for each way, with and without guidance."""
    judge = Judge(name == "fashion", args.n)
    model = ddpm.load_model(OUTPUTS / f"{name}.pt", DEVICE)
    for way, (replaced, how) in (WAYS | (ALL_STEPS if args.all_steps else {})).items():
        for guidance in (1, ddpm.guidance):
            start = clock()
            with mock.patch.dict(vars(ddpm), replaced):
                images = draw(model, args.n, guidance=guidance, **how)
            labels = torch.arange(args.n) % 10
            judge.row(f"{way} x{guidance:g}", images, labels, seconds=clock() - start)


def some(name, train, n):
    """-> n images of a set, and their labels."""
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[:n]
    return [part.to(DEVICE) for part in ddpm.load_data(name == "fashion", train)[order]]


@torch.no_grad()
def errors_of(model, x0, label, steps):
    """-> the mean squared error of the noise in images x0 at each of the steps."""
    found = []
    for t in steps:
        eta = torch.randn(x0.shape, generator=torch.Generator(DEVICE).manual_seed(t), device=DEVICE)
        eta_theta = model.backward(model(x0, t, eta), t, label)
        found.append((eta_theta - eta).square().mean().item())
    return found


@torch.no_grad()
def bits(model, x0, label):
    """-> (n,) bits per pixel of 256 greys by the variational bound (eq. 5 and 13), with beta-tilde.

    Where beta-tilde is 0, at the first step, that of the second counts, as in the authors' code.
    """
    a = model.alpha_bars.double()
    kl = 0.5 * (a[-1] * x0.square() + (1 - a[-1]) - (1 - a[-1]).log() - 1)
    nats, generator = kl.mean((1, 2, 3)), torch.Generator(DEVICE).manual_seed(0)
    for t in range(model.n_steps):
        eta = torch.randn(x0.shape, generator=generator, device=DEVICE)
        prediction = ddpm.predict_x0(model, model(x0, t, eta), t, label)
        if t:
            # The variances are alike: the divergence is half the squared distance of the means.
            beta = 1 - a[t] / a[t - 1]
            beta_tilde = (1 - a[t - 1]) / (1 - a[t]) * beta
            slope = a[t - 1].sqrt() * beta / (1 - a[t])
            found = (slope * (prediction - x0)).square() / (2 * beta_tilde)
        else:
            std = ((1 - a[0]) / (1 - a[1]) * (1 - a[1] / a[0])).sqrt()
            normal = torch.distributions.Normal(prediction.double(), std)
            upper = torch.where(x0 > 0.999, 1.0, normal.cdf(x0 + 1 / 255))
            lower = torch.where(x0 < -0.999, 0.0, normal.cdf(x0 - 1 / 255))
            found = -(upper - lower).clamp(min=1e-12).log()
            last = found.mean()
        nats = nats + found.mean((1, 2, 3))
    return nats / math.log(2), last / math.log(2)


def errors(args):
    """Draws the error at each step, of test and of training images, and prints some of it."""
    steps = sorted({round(999 * (i / 40) ** 2) for i in range(41)})
    _, ax = plt.subplots(figsize=(7, 5))
    for color, name in enumerate(args.sets):
        model = ddpm.load_model(OUTPUTS / f"{name}.pt", DEVICE)
        for train, style in ((False, "-"), (True, ":")):
            found = errors_of(model, *some(name, train, 1000), steps)
            kind = "training" if train else "test"
            label = f"{SETS[name]}, {kind} images"
            ax.semilogy(steps, found, f"C{color}{style}", label=label)
            shown = [f"{t}: {found[steps.index(t)]:.5f}" for t in steps[::5]]
            print(f"{label}: error at t = " + ", ".join(shown), flush=True)
        x0, label = some(name, False, 200)
        found, last = bits(model, x0, label)
        error = found.std() / len(found) ** 0.5
        print(
            f"{SETS[name]}: {found.mean():.2f} +- {error:.2f} bits a pixel, {last:.2f} of them last"
        )
    ax.set_title("Mean squared error of the predicted noise")
    ax.set(xlabel="t", ylabel="error; predicting 0 has error 1")
    ax.grid(alpha=0.3)
    ax.legend()
    plt.savefig(args.out_dir / "errors.png", dpi=150, bbox_inches="tight")


def chain(model, steps):
    """-> x_t and predicted x_0 of ten images, one of each class, at these steps of one chain."""
    found, predict_x0 = {}, ddpm.predict_x0

    def keep(model, x, t, *how):
        x0 = predict_x0(model, x, t, *how)
        if t in steps:
            found[t] = x, x0
        return x0

    with mock.patch.object(ddpm, "predict_x0", keep):
        quietly(ddpm.generate_new_images, model, 10, gif_name=None)
    return found


def pictures(args):
    """Draws the chain of both sets side by side, and below each other more and more guidance."""
    models = [ddpm.load_model(OUTPUTS / f"{name}.pt", DEVICE) for name in SETS]
    steps = (999, 600, 400, 250, 100, 0)
    chains = [chain(model, steps) for model in models]
    rows, names = [], []
    for t in steps:
        for i, name in enumerate((f"t = {t}, x_t", "x_0, predicted")):
            rows += [each[t][i] for each in chains]
            names.append(name)
    title = "One chain: x_t, and the image predicted from it"
    ddpm.show_images(torch.cat(rows), title, args.out_dir / "reverse.png", names)
    rows, names = [], []
    for model in models:
        for guidance in (0, 1, 2, 4):
            how = {"guidance": guidance, "sample_steps": 100, "gif_name": None}
            rows.append(quietly(ddpm.generate_new_images, model, 10, **how))
            names.append(f"guidance {guidance}")
    title = "The same noise with more and more guidance"
    ddpm.show_images(torch.cat(rows), title, args.out_dir / "guidance.png", names)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure and draw what the stored weights do.")
    parser.add_argument("sets", nargs="*", default=list(SETS), help="mnist, fashion")
    parser.add_argument("--n", type=int, default=2000, help="images a row (%(default)s)")
    parser.add_argument("--all-steps", action="store_true", help="with all 1,000 steps, too")
    parser.add_argument("--errors", action="store_true", help="only the error at each step")
    parser.add_argument("--pictures", action="store_true", help="only the pictures of both sets")
    parser.add_argument("--out-dir", type=Path, default=OUTPUTS, help="of the pictures")
    args = parser.parse_args(argv)
    if not set(args.sets) <= set(SETS):
        parser.error("the sets are mnist and fashion")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    if args.errors:
        errors(args)
    if args.pictures:
        pictures(args)
    if not args.errors and not args.pictures:
        for name in args.sets:
            compare(name, args)


if __name__ == "__main__":
    main()
