"""What the tests share: real images, a network that knows the answer, one short training."""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

matplotlib.use("Agg")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ddpm


def alpha_bars(n_steps=1000, min_beta=1e-4, max_beta=0.02):
    """The schedule in float64, written down independently of the program."""
    return torch.from_numpy(np.cumprod(1 - np.linspace(min_beta, max_beta, n_steps)))


class KnowsImages(nn.Module):
    """Answers with exactly the noise that lies between `images` and x_t; keeps every x it saw."""

    def __init__(self, images, schedule):
        super().__init__()
        self.images, self.alpha_bars, self.seen = images, alpha_bars(*schedule), []

    def forward(self, x, t):
        self.seen.append(x)
        a = self.alpha_bars[t.flatten()].reshape(-1, 1, 1, 1)
        return ((x - a.sqrt() * self.images[: len(x)]) / (1 - a).sqrt()).float()


@pytest.fixture(scope="session")
def knows():
    """knows(images, n_steps, min_beta, max_beta) -> MyDDPM whose reverse process leads to them."""

    def model(images, n_steps=1000, min_beta=1e-4, max_beta=0.02):
        schedule = n_steps, min_beta, max_beta
        return ddpm.MyDDPM(KnowsImages(images, schedule), *schedule)

    return model


@pytest.fixture(scope="session")
def digits():
    """uint8 (3000, 28, 28): the first training images of MNIST."""
    return ddpm.load_images()[:3000]


@pytest.fixture(scope="session")
def images(digits):
    """float (500, 1, 28, 28) in [-1, 1]."""
    return digits[:500].unsqueeze(1).float() / 127.5 - 1


@pytest.fixture(scope="session")
def train():
    """train(images, store_path, n_epochs, SEED=..., ...) -> MyDDPM and what training_loop returns.

    The loader, the network's size and the schedule differ from the defaults on purpose: a weights
    file that stored only half of them would be rebuilt wrongly.
    """

    def train(images, store_path, n_epochs=2, wrap=lambda loader: loader, resume=False, **flags):
        flags = {"SEED": 0, "batch_size": 32, **flags}
        torch.manual_seed(flags["SEED"])
        network = ddpm.MyUNet(1000, 64, betas=(2e-4, 0.03))
        model = ddpm.MyDDPM(network, 1000, 2e-4, 0.03)
        optim = torch.optim.AdamW(model.parameters(), 0.01)
        loader = wrap(ddpm.Batches(images, flags["batch_size"]))
        losses = ddpm.training_loop(
            model, loader, n_epochs, optim, store_path=store_path, flags=flags | {"resume": resume}
        )
        return model, losses

    return train


@pytest.fixture(scope="session")
def trained(train, digits, tmp_path_factory):
    """-> MyDDPM after two short epochs on real images, its losses, its weights file."""
    store_path = tmp_path_factory.mktemp("trained") / "weights.pt"
    model, losses = train(digits[:1600], store_path)
    return model.eval(), losses, store_path
