"""What the tests share: real images, a short training, the program in a process of its own."""

import itertools
import multiprocessing
import os
import re
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PLACES = [ROOT, ROOT / "tests", *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ |= {"PYTHONPATH": os.pathsep.join(map(str, PLACES)), "MPLBACKEND": "agg"}

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ddpm

SMALL = ["--n-images=200", "--batch-size=100", "--n-epochs=3", "--n-steps=4", "--max-beta=0.99"]
SMALL += ["--SEED=3"]


class Network(nn.Module):
    """Predicts `predict(x, t, label)`, or `layers(x)`, or the same everywhere; keeps its calls."""

    def __init__(self, predict=None, layers=None, n_classes=0, predicts_v=False):
        super().__init__()
        self.noise, self.other = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(0.0))
        self.predict, self.layers, self.calls = predict, layers, []
        self.n_classes, self.predicts_v = n_classes, predicts_v

    def forward(self, x, t, label):
        self.calls.append((x, t, label, self.training))
        if self.predict:
            return self.predict(x, t, label)
        return self.layers(x) if self.layers else self.noise.expand_as(x)


def usual():
    """-> a network with dropout and with the statistics of a batch norm."""
    first, last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
    return Network(layers=nn.Sequential(first, nn.BatchNorm2d(4), nn.Dropout(), last))


@pytest.fixture(scope="session")
def digits():
    """TensorDataset of 1,000 training images (n, 1, 28, 28) of MNIST and their labels."""
    return TensorDataset(*ddpm.load_data()[:1000])


@pytest.fixture(scope="session")
def images(digits):
    """(100, 1, 28, 28) in [-1, 1]."""
    return digits.tensors[0][:100]


@pytest.fixture
def train(digits, tmp_path):
    """train(n_epochs, ...) -> MyDDPM trained on some digits, its losses and its weights' path."""

    def train(n_epochs=1, network=None, data=digits[:100], optim=None, batch_size=50, **how):
        torch.manual_seed(0)
        model = how.pop("model", None) or ddpm.MyDDPM(network or ddpm.MyUNet())
        loader = DataLoader(TensorDataset(*data), batch_size, shuffle=True)
        optim = optim or ddpm.Muon(model.network.parameters(), 0.02)
        path = tmp_path / "weights.pt"
        losses = ddpm.training_loop(model, loader, n_epochs, optim, store_path=path, **how)
        return model, losses, path

    return train


def child(folder, argv, prepare):
    """Runs the program in this new process, its output in files below `folder`."""
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have ignored it
    sys.argv = ["ddpm.py", "--out-dir", "out", *map(str, argv)]
    if prepare:
        prepare()
    runpy.run_path(str(ROOT / "ddpm.py"), run_name="__main__")


# Real processes, with signals and limits of their own, but all that they import is there already.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["conftest"])


def error_lines(stderr):
    """-> the lines (list) of a process's stderr (bytes), without progress bars."""
    text = re.sub(r"\x1b\[A|[^\n]*\r", "", stderr.decode())
    return [line for line in text.split("\n") if line.strip() and "%|" not in line]


def program(folder, *argv, status=0, prepare=None):
    """Runs the program, outputs in folder/out, until it ends with `status`. -> its error lines."""
    process = SERVER.Process(target=child, args=(folder, argv, prepare))
    process.start()
    process.join()
    lines = error_lines((folder / "stderr").read_bytes())
    assert process.exitcode == status, lines
    return lines


def change_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def frames_of(path):
    """-> the grey picture of each frame of a GIF, and how many ms it lasts."""
    with Image.open(path) as gif:
        assert gif.info["loop"] == 0
        frames = ImageSequence.Iterator(gif)
        return [(np.array(frame.convert("L")), frame.info["duration"]) for frame in frames]


def shows(path, grid, height=None):
    """-> whether a figure shows this grid, or one of so many rows that begins with it.

    Black gaps are the last row and column. Matplotlib may put a pixel one aside, a grey level off.
    """
    with Image.open(path) as picture:
        pixels = np.array(picture.convert("L")).astype(int)
    bottom = np.flatnonzero((pixels < 64).any(1))[-1]
    black = np.flatnonzero(pixels[bottom] < 64)
    top = np.flatnonzero(pixels[:bottom, black[-1]] >= 64)[-1] + 1
    down = (bottom + 1 - top) / (height or grid.shape[0])
    across = (black[-1] + 1 - black[0]) / grid.shape[1]
    rows, columns = ((np.arange(n) + 0.5) * size for n, size in zip(grid.shape, (down, across)))
    rows, columns = top + rows.astype(int), black[0] + columns.astype(int)
    near = [(rows + y, columns + x) for y, x in itertools.product((-1, 0, 1), repeat=2)]
    off = [np.abs(pixels[np.ix_(*place)] - grid) for place in near]
    return np.min(off, axis=0).max() <= 1
