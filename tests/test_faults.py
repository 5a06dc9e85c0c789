"""What can go wrong around the program, made to happen: kills, full disks, damaged files, no screen.

Most runs are children of a fork server that has imported the program once: real processes, with
signals and limits of their own, that start in no time. None of them can reach the network.
"""

import contextlib
import fcntl
import io
import math
import multiprocessing
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.datasets import MNIST, FashionMNIST

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import damage

import ddpm

resource = pytest.importorskip("resource")

TINY = ["--n-images=300", "--batch-size=100", "--n-epochs=3", "--sample-steps=3", "--n-samples=4"]
# In the order in which they are written.
NAMES = ["mnist_first_batch.png", "mnist_forward.png", "mnist.pt", "mnist_state.pt"]
NAMES += ["mnist_loss.png", "mnist.gif", "mnist_10.png", "mnist_100.png", "mnist.txt"]
ARCHIVE = Path("MNIST", "raw", "train-images-idx3-ubyte.gz")
MD5 = {source: dict(source.resources)[ARCHIVE.name] for source in (MNIST, FashionMNIST)}
PROXY = "http://127.0.0.1:1"  # nobody listens there


# %% Runs of the program
def child(argv, folder, limit, deadly, terminal, proxy):
    """Is a process: runs the program in `folder`, which gets its output and its peak of memory."""
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, terminal or "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_NOCTTY), number)
    os.environ |= {"http_proxy": proxy, "https_proxy": proxy, "no_proxy": ""}
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if deadly:  # a write beyond the limit kills, as kill -9 would in the middle of the write
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        ddpm.main(argv)
    finally:
        Path("peak").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


class Run:
    """The program at work in a process: Run(folder, "--flag", ...) uses folder/out for outputs."""

    def __init__(
        self, folder, *argv, limit=None, deadly=False, terminal=None, proxy=PROXY, tiny=True
    ):
        self.folder = folder
        for name in ("stdout", "stderr", "peak"):
            (folder / name).unlink(missing_ok=True)
        argv = [*(TINY if tiny else []), "--out-dir", "out", *map(str, argv)]
        context = multiprocessing.get_context("forkserver")
        arguments = (argv, folder, limit, deadly, terminal, proxy)
        self.process = context.Process(target=child, args=arguments)
        self.process.start()

    def wait_for(self, name):
        """Waits until the program has written out/name."""
        while not (self.folder / "out" / name).exists():
            assert self.process.is_alive(), self.end() and self.text("stderr")
            time.sleep(0.001)
        return self

    def limit(self, size):
        """No file may grow beyond `size` bytes from now on."""
        limits = (size, resource.RLIM_INFINITY)
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, limits)
        return self

    def send(self, number):
        os.kill(self.process.pid, number)
        return self

    def end(self):
        """Waits for the end. -> exit status, negative for a signal."""
        self.process.join(120)
        if self.process.is_alive():
            self.process.kill()
            pytest.fail("the program doesn't end")
        return self.process.exitcode

    def text(self, name):
        return (self.folder / name).read_text()

    def line(self, status):
        """Asserts that it ends with `status` and one line on stderr. -> that line."""
        code = self.end()
        lines = [line for line in self.text("stderr").splitlines() if line.strip()]
        assert (code, len(lines)) == (status, 1), self.text("stderr")
        return lines[0]

    def succeeds(self):
        assert self.end() == 0, self.text("stderr")
        return self


@pytest.fixture(scope="module", autouse=True)
def server():
    """The fork server imports the program before the first run."""
    patch = pytest.MonkeyPatch()
    patch.setenv("MPLBACKEND", "Agg")
    patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(ROOT)]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ddpm", __name__])
    yield
    patch.undo()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder whose `out`, which the program had to make, holds a whole run."""
    folder = tmp_path_factory.mktemp("trained")
    Run(folder).succeeds()
    assert contents(folder / "out").keys() == set(NAMES)
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of `trained` to do harm to."""
    shutil.copytree(trained / "out", tmp_path / "out")
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights(folder, name="mnist.pt"):
    return ddpm.load_model(folder / "out" / name).state_dict()


def assert_same(folder, trained):
    """The same weights and the same pictures as those of the run that was never stopped."""
    assert damage.equal(weights(folder), weights(trained))
    one, two = contents(folder / "out"), contents(trained / "out")
    pictures = [name for name in NAMES if name.endswith((".png", ".gif"))]
    assert [name for name in pictures if one[name] != two[name]] == []


# %% Stops
@pytest.mark.parametrize("moment", ["in an epoch", "saving weights", "saving state"])
def test_killed_and_resumed_is_as_never_stopped(moment, trained, tmp_path):
    """kill -9 leaves whole weights; --resume ends in the very same weights and pictures."""
    size = {path.name: path.stat().st_size for path in (trained / "out").iterdir()}
    run = Run(tmp_path, deadly=True).wait_for("mnist_state.pt")
    if moment == "in an epoch":
        assert run.send(signal.SIGKILL).end() == -signal.SIGKILL
    else:
        middle = size["mnist.pt"] // 2
        if moment == "saving state":
            middle = (size["mnist.pt"] + size["mnist_state.pt"]) // 2
        assert run.limit(middle).end() == -signal.SIGXFSZ
    weights(tmp_path)
    resumed = Run(tmp_path, "--resume").succeeds()
    assert len(re.findall("Loss at epoch", resumed.text("stdout"))) in (1, 2)
    assert_same(tmp_path, trained)


@pytest.mark.parametrize(
    "number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_stopped_says_how_to_resume(number, status, trained, tmp_path):
    """Ctrl-C and SIGTERM end in one line; nothing but the current epoch is lost."""
    line = Run(tmp_path).wait_for("mnist_state.pt").send(number).line(status)
    assert "--resume" in line
    assert contents(tmp_path / "out").keys() == set(NAMES[:4])
    resumed = Run(tmp_path, "--resume").succeeds()
    assert len(re.findall("Loss at epoch", resumed.text("stdout"))) in (1, 2)
    assert_same(tmp_path, trained)


def test_killed_while_drawing(copied, trained):
    """After the last epoch there is nothing to resume: the line names the two ways on."""
    (copied / "out" / "mnist.gif").unlink()
    run = Run(copied, "--no-train", "--n-samples", 500, "--sample-steps", 500)
    time.sleep(1)
    assert run.send(signal.SIGKILL).end() == -signal.SIGKILL
    line = Run(copied, "--resume").line(2)
    assert "n_epochs" in line and "--no-train" in line
    Run(copied, "--no-train").succeeds()
    assert_same(copied, trained)


def test_nothing_to_resume(tmp_path):
    line = Run(tmp_path, "--resume").line(2)
    assert "mnist_state.pt" in line
    assert not (tmp_path / "out" / "mnist.pt").exists()


def test_killed_in_the_first_epoch_after_another_training(copied):
    """A new training must not be resumed from the state of the one before it."""
    before = contents(copied / "out")
    (copied / "out" / "mnist_forward.png").unlink()
    run = Run(copied, "--n-epochs", 4, deadly=True).wait_for("mnist_forward.png")
    assert run.limit(len(before["mnist.pt"]) // 2).end() == -signal.SIGXFSZ
    assert contents(copied / "out")["mnist.pt"] == before["mnist.pt"]
    Run(copied, "--n-epochs", 4, "--resume").line(2)


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--seed", 1),
        ("--batch-size", 99),
        ("--n-images", 301),
        ("--lr", 0.011),
        ("--n-steps", 999),
        ("--min-beta", 2e-4),
        ("--max-beta", 0.03),
        ("--n-epochs", 2),
        ("--n-epochs", 3),
    ],
)
def test_resume_refuses_another_training(flag, value, copied):
    """Other flags than the run had, or no epoch left to train: said, and no file of it touched."""
    before = contents(copied / "out")
    line = Run(copied, "--resume", "--n-epochs", 4, flag, value).line(2)
    assert flag[2:].replace("-", "_").lower() in line.lower()
    after = contents(copied / "out")
    assert all(after[name] == before[name] for name in ("mnist.pt", "mnist_state.pt"))


def test_resume_with_more_epochs(copied):
    """A finished training goes on if n_epochs is raised."""
    before = weights(copied)
    run = Run(copied, "--resume", "--n-epochs", 4).succeeds()
    assert re.findall(r"Loss at epoch (\d+)", run.text("stdout")) == ["4"]
    assert not damage.equal(weights(copied), before)


# %% Writing
@pytest.mark.parametrize("name", [*NAMES[:1], *NAMES[2:4], *NAMES[5:6], *NAMES[7:8]])
def test_full_disk(name, copied):
    """A write that fails: one line that names the file; the old file whole, nothing left over."""
    out = copied / "out"
    before = contents(out)
    extra = ["--resume", "--n-epochs", 4]
    if name not in NAMES[2:4]:
        extra = ["--no-train", "--n-samples", 100, "--sample-steps", 5]
    size = 1000
    if name == "mnist_state.pt":
        size = (len(before["mnist.pt"]) + len(before[name])) // 2
    if name == NAMES[0]:
        run = Run(copied, *extra, limit=size)
    else:
        mark = NAMES[NAMES.index(name) - (2 if name == "mnist_state.pt" else 1)]
        (out / mark).unlink()
        run = Run(copied, *extra).wait_for(mark).limit(size)
    assert name in run.line(1)
    after = contents(out)
    assert after[name] == before[name]
    assert after.keys() == before.keys()


@pytest.mark.parametrize("place", ["a file", "below a file", "unwritable"])
def test_no_outputs_folder(place, tmp_path):
    """A folder that can't be written to is refused before the training."""
    (tmp_path / "file").touch()
    places = {"a file": "file", "below a file": "file/out", "unwritable": "/proc"}
    run = Run(tmp_path, "--out-dir", places[place])
    assert places[place] in run.line(2)
    assert run.text("stdout") == ""


def test_diverged(copied):
    """A loss that is no number: stops at once with epoch and step; the last weights stay."""
    before = contents(copied / "out")
    line = Run(copied, "--lr", 1e30, "--n-images", 3000).line(1)
    assert re.search(r"epoch 1\b.*step [2-5]\b", line)
    assert contents(copied / "out")["mnist.pt"] == before["mnist.pt"]


def test_diverged_in_the_last_step_of_an_epoch(tmp_path):
    """Weights that give no number are no good weights, even if no later step has met them."""
    model = ddpm.MyDDPM(ddpm.MyUNet())
    optim = torch.optim.SGD(model.parameters(), 1e-3)
    last = [p for p in model.parameters() if p.ndim > 1][-1]
    steps = []

    def spoil(*_):
        steps.append(last)
        if len(steps) == 2:
            last.data.fill_(math.inf)

    optim.register_step_post_hook(spoil)
    loader = ddpm.Batches(torch.zeros(8, 28, 28, dtype=torch.uint8), 4)
    with pytest.raises(FloatingPointError, match="epoch 1, step 2"):
        ddpm.training_loop(model, loader, 2, optim, store_path=tmp_path / "a.pt")
    assert len(steps) == 2 and list(tmp_path.iterdir()) == []


# %% Files of the program, damaged or replaced
class Bomb:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def sealed(content, path):
    """What the program's own function writes."""
    ddpm.save(content, path)
    return path.read_bytes()


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


WRONG = {
    "empty": lambda good, path: b"",
    "truncated": lambda good, path: good[:-1],
    "half": lambda good, path: good[: len(good) // 2],
    "first byte": lambda good, path: flipped(good, 0),
    "middle byte": lambda good, path: flipped(good, len(good) // 2),
    "last byte": lambda good, path: flipped(good, len(good) - 1),
    "longer": lambda good, path: good + b"\0",
    "another program's": lambda good, path: saved({"weights": torch.ones(3)}),
    "text": lambda good, path: b"no weights at all\n" * 9,
    "bomb": lambda good, path: saved({"weights": Bomb()}),
    "sealed bomb": lambda good, path: sealed({"weights": Bomb()}, path),
    "sealed list": lambda good, path: sealed([1, 2, 3], path),
    "sealed, empty": lambda good, path: sealed({}, path),
}


@pytest.mark.parametrize(
    "name, harm",
    [("mnist.pt", harm) for harm in WRONG]
    + [("mnist_state.pt", harm) for harm in ("half", "sealed bomb", "sealed list")],
)
def test_wrong_file(name, harm, copied):
    """Weights or state that the program didn't write: one line, no code run, file untouched."""
    path = copied / "out" / name
    path.write_bytes(WRONG[harm](path.read_bytes(), path))
    before = path.read_bytes()
    how = ["--no-train"] if name == "mnist.pt" else ["--resume", "--n-epochs", 4]
    line = Run(copied, *how).line(2)
    assert name in line and "train" in line
    assert path.read_bytes() == before
    assert not (copied / "exploded").exists()


def test_missing_weights(tmp_path):
    line = Run(tmp_path, "--no-train").line(2)
    assert "mnist.pt" in line and "train" in line


def train_another(store_path, flags=None):
    """Trains a network that isn't MyUNet."""

    class Other(torch.nn.Conv2d):
        def forward(self, x, t):
            return super().forward(x)

    model = ddpm.MyDDPM(Other(1, 1, 3, padding=1))
    optim = torch.optim.Adam(model.parameters(), 1e-3)
    loader = ddpm.Batches(torch.zeros(4, 28, 28, dtype=torch.uint8), 4)
    ddpm.training_loop(model, loader, 1, optim, store_path=store_path, flags=flags)


def test_weights_of_another_network(tmp_path):
    """Weights that training_loop stored for a network that isn't MyUNet."""

    (tmp_path / "out").mkdir()
    train_another(tmp_path / "out" / "mnist.pt")
    line = Run(tmp_path, "--no-train").line(2)
    assert "mnist.pt" in line and "train" in line


@pytest.mark.parametrize("target", ["state of another network", "weights as state"])
def test_state_of_something_else(target, copied):
    """A state that the program wrote, but not for this training."""
    state = copied / "out" / "mnist_state.pt"
    if target == "weights as state":
        shutil.copy(copied / "out" / "mnist.pt", state)
    else:
        flags = ddpm.load_model(copied / "out" / "mnist.pt").info["flags"]
        train_another(copied / "out" / "mnist.pt", flags)
    line = Run(copied, "--resume", "--n-epochs", 4).line(2)
    assert state.name in line and "train" in line


@pytest.mark.parametrize(
    "flag, value", [("--n-steps", 999), ("--max-beta", 0.03), ("--min-beta", 2e-4)]
)
def test_weights_of_another_schedule(flag, value, copied):
    line = Run(copied, "--no-train", flag, value).line(2)
    assert "mnist.pt" in line and flag[2:].replace("-", "_") in line and str(value) in line


def test_weights_of_another_data_set(copied):
    (copied / "out" / "mnist.pt").rename(copied / "out" / "fashion.pt")
    line = Run(copied, "--no-train", "--fashion").line(2)
    assert "fashion.pt" in line and "trained with fashion = False" in line


# %% Data
@pytest.fixture
def archive(tmp_path):
    """A copy of the archive of the MNIST training images, below `tmp_path`."""
    path = tmp_path / ARCHIVE
    path.parent.mkdir(parents=True)
    shutil.copy(ROOT / "datasets" / ARCHIVE, path)
    return path


HARMS = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "changed": lambda path: path.write_bytes(flipped(path.read_bytes(), 5_000_000)),
    "other data set": lambda path: shutil.copy(
        ROOT / "datasets" / "FashionMNIST" / "raw" / path.name, path
    ),
    "labels": lambda path: shutil.copy(
        ROOT / "datasets" / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz", path
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_bad_archive(harm, archive, tmp_path):
    """The line says which file is wrong, where it belongs, and its MD5."""
    HARMS[harm](archive)
    line = Run(tmp_path, "--data-dir", tmp_path).line(2)
    assert str(archive) in line and MD5[MNIST] in line
    assert archive.exists() == (harm != "missing")


def test_no_archives_of_fashion(tmp_path):
    """Neither folder nor network."""
    line = Run(tmp_path, "--data-dir", tmp_path / "none", "--fashion").line(2)
    assert str(tmp_path / "none" / "FashionMNIST" / "raw" / ARCHIVE.name) in line
    assert MD5[FashionMNIST] in line


ANSWERS = {
    "not HTTP": b"go away\r\n\r\n",
    "other file": b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nlogin",
    "bad chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nabc",
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("source", [MNIST, FashionMNIST], ids=["mnist", "fashion"])
def test_mirror_that_answers_nonsense(answer, source, tmp_path):
    """A network that gives something else than the archive: as if there were none."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(ANSWERS[answer])

        threading.Thread(target=serve, daemon=True).start()
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        fashion = ["--fashion"] if source is FashionMNIST else []
        run = Run(tmp_path, "--data-dir", tmp_path, *fashion, proxy=proxy)
        code = run.end()
        server.shutdown(socket.SHUT_RDWR)
    last = run.text("stderr").splitlines()[-1]
    assert code == 2 and "Traceback" not in run.text("stderr"), run.text("stderr")
    assert ARCHIVE.name in last and MD5[source] in last


def test_half_unpacked_file_beside_the_archive(archive, tmp_path):
    """What a killed program left there doesn't matter."""
    archive.with_suffix("").write_bytes(b"\0\0\x08\x03" + b"\1" * 20_000_000)
    archive.with_name(f".{archive.name}-1.tmp").write_bytes(b"\1" * 1000)
    images = ddpm.load_images(data_dir=tmp_path)
    assert torch.equal(images, ddpm.load_images())


# %% Two at once, poor surroundings, many images
def test_three_runs_at_once(copied, trained, tmp_path_factory):
    """In one folder: each file is whole and from one run, of the other data set's to say nothing."""
    alone = tmp_path_factory.mktemp("alone")
    Run(alone, "--seed", 1).succeeds()
    shutil.rmtree(copied / "out")
    folders = [tmp_path_factory.mktemp(name) for name in ("zero", "one", "fashion")]
    flags = [["--seed", 0], ["--seed", 1], ["--fashion", "--n-epochs", 1]]
    runs = [
        Run(folder, *extra, "--out-dir", copied / "out") for folder, extra in zip(folders, flags)
    ]
    for run in runs:
        run.succeeds()
    ends = [weights(trained), weights(alone)]
    assert any(damage.equal(weights(copied), end) for end in ends)
    weights(copied, "fashion.pt")
    for name in NAMES:
        for path in (copied / "out" / name, copied / "out" / name.replace("mnist", "fashion")):
            if path.suffix in (".png", ".gif"):
                with Image.open(path) as picture:
                    picture.seek(getattr(picture, "n_frames", 1) - 1)
                    picture.load()
    assert len(contents(copied / "out")) == 2 * len(NAMES)
    line = Run(copied, "--resume").line(2)  # reads the whole state before it refuses
    assert "finished" in line or "trained with SEED = 1" in line


def test_poor_surroundings(tmp_path):
    """No screen, no compiler, one thread, no AVX-512, and a folder nothing may be written into."""
    bare = {"PATH": "", "OMP_NUM_THREADS": "1"}
    bare |= {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    install = tmp_path / "install"
    install.mkdir()
    shutil.copy(ROOT / "ddpm.py", install)
    (install / "datasets").symlink_to(ROOT / "datasets")
    install.chmod(0o555)
    out = tmp_path / "out"
    argv = [sys.executable, install / "ddpm.py", "--n-images", 100, "--n-epochs", 1]
    argv += ["--sample-steps", 2, "--n-samples", 2, "--out-dir", out]
    argv = [str(arg) for arg in argv]
    done = subprocess.run(argv, env=bare, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(out).keys() == set(NAMES)
    install.chmod(0o755)
    assert {path.name for path in install.iterdir()} == {"ddpm.py", "datasets"}


def test_many_images(copied):
    """3,000 images take little more memory than 1,500: both are drawn 500 at a time."""
    peaks = []
    for n in (1500, 3000):
        argv = ["--no-train", "--n-samples", n, "--sample-steps", 1]
        peaks.append(int(Run(copied, *argv).succeeds().text("peak")) / 1024)
    # All at once, the second run would need about 200 MB more.
    assert peaks[1] - peaks[0] < 80, peaks


def test_progress_is_shown(copied):
    """On a terminal, while drawing."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    argv = ["--no-train", "--n-samples", 600, "--sample-steps", 2]
    run = Run(copied, *argv, terminal=os.ttyname(theirs))
    run.succeeds()
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the end of what the terminal has got
        while piece := os.read(ours, 100_000):
            shown += piece
    os.close(ours)
    assert b"Sampling" in shown and b"4/4" in shown


def test_random_damage(capsys):
    """A few of the changes that damage.py tries by the hundred."""
    assert damage.main(["--n", "40"]) == 0
    assert "120 changes, 0 failures" in capsys.readouterr().out
