"""What the tests share: real images, a short training, the program in a process of its own."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from torch.utils.data import TensorDataset

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ddpm

SMALL = ["--n-images=300", "--batch-size=100", "--n-epochs=3", "--sample-steps=3", "--n-samples=12"]


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
        loader = ddpm.batches(dataset or TensorDataset(*digits[:1000]), 50)
        optim = optim or ddpm.make_optimizers(model.network, 0.02)
        path = tmp_path / "weights.pt"
        return (
            model,
            ddpm.training_loop(model, loader, n_epochs, optim, store_path=path, **how),
            path,
        )

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


@pytest.fixture(scope="session")
def start():
    """start(folder, "--flag", ...) -> process of a small run of the program, outputs in folder/out.

    The processes come from a server that has imported the program once: real ones, with signals
    and limits of their own, that start in no time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ddpm"])

    def start(folder, *argv, prepare=None):
        argv = [*SMALL, "--out-dir", "out", *map(str, argv)]
        process = context.Process(target=child, args=(argv, folder, prepare))
        process.start()
        return process

    return start


@pytest.fixture(scope="session")
def finish():
    """finish(process, folder, status) -> what it wrote on stderr, once it has ended with it."""

    def finish(process, folder, status=0):
        process.join(120)
        text = (folder / "stderr").read_text()
        assert process.exitcode == status, text
        return text.strip()

    return finish


@pytest.fixture(scope="session")
def whole_run(start, finish, tmp_path_factory):
    """A folder whose `out` holds what a small run wrote that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder), folder)
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
        return lines[0]

    return bad_input
