"""What the tests share: real images, a short training, the program in a process of its own."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "MPLBACKEND": "agg"}

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch.utils.data import DataLoader, TensorDataset

import ddpm

SMALL = ["--n-images=200", "--batch-size=100", "--n-epochs=3", "--n-steps=4", "--max-beta=0.99"]
SMALL += ["--SEED=3"]


@pytest.fixture(scope="session")
def digits():
    """TensorDataset of 2,000 training images (n, 1, 28, 28) of MNIST and their labels."""
    return TensorDataset(*ddpm.load_data()[:2000])


@pytest.fixture(scope="session")
def images(digits):
    """(100, 1, 28, 28) in [-1, 1]."""
    return digits.tensors[0][:100]


@pytest.fixture
def train(digits, tmp_path):
    """train(n_epochs, ...) -> MyDDPM trained on 1,000 digits, its losses and its weights' path."""

    def train(n_epochs=1, network=None, dataset=None, optim=None, **how):
        torch.manual_seed(0)
        model = ddpm.MyDDPM(network or ddpm.MyUNet())
        dataset = dataset or TensorDataset(*digits[:1000])
        loader = DataLoader(dataset, 50, shuffle=True)
        optim = optim or ddpm.Muon(model.network.parameters(), 0.02)
        path = tmp_path / "weights.pt"
        losses = ddpm.training_loop(model, loader, n_epochs, optim, store_path=path, **how)
        return model, losses, path

    return train


def child(argv, folder, prepare):
    """Runs the program in this new process, its output in files below `folder`."""
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have ignored it
    if prepare:
        prepare()
    ddpm.main(argv)


# Processes from a server that has imported the program once: real ones, with signals and limits of
# their own, that start in no time.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["conftest"])


def program(folder, *argv, status=0, prepare=None):
    """Runs the program, outputs in folder/out, until it ends with `status`. -> its stderr."""
    argv = ["--out-dir", "out", *map(str, argv)]
    process = SERVER.Process(target=child, args=(argv, folder, prepare))
    process.start()
    process.join()
    text = (folder / "stderr").read_text()
    assert process.exitcode == status, text
    return text.strip()


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """A folder whose `out` holds what a small run wrote that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    program(folder, *SMALL)
    return folder


@pytest.fixture
def bad_input(capsys):
    """bad_input("--flag", ...) -> the one line with which the program refuses, with status 2."""

    def bad_input(*argv, status=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            ddpm.main([str(word) for word in argv])
        lines = capsys.readouterr().err.strip().splitlines()
        assert (stop.value.code, len(lines)) == (status, 1), lines
        assert len(lines[0]) < 600
        return lines[0]

    return bad_input


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


def grid_of(path, shape):
    """-> the grid (height, width) in a figure: black gaps are its last row and its last column."""
    with Image.open(path) as picture:
        pixels = np.array(picture.convert("L"))
    bottom = np.flatnonzero((pixels < 64).any(1))[-1]
    columns = np.flatnonzero(pixels[bottom] < 64)
    rows = np.flatnonzero(pixels[:, columns[-1]] < 64)
    middles = [
        found[0] + (np.arange(n) + 0.5) * (found[-1] + 1 - found[0]) / n
        for found, n in zip((rows, columns), shape, strict=True)
    ]
    return pixels[np.ix_(*(middle.astype(int) for middle in middles))]
