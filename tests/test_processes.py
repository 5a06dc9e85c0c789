"""Two processes that share the work, joined by gloo over the loopback address.

Most are children of a fork server that has imported the program once, with the environment that
torchrun would give them; two runs are started by torchrun itself. None can reach the network.
"""

import datetime
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT)]

import ddpm

CPU = torch.device("cpu")
NAMES = {"mnist.pt", "mnist_state.pt", "mnist.gif", "mnist_first_batch.png", "mnist_forward.png"}
NAMES |= {"mnist_loss.png", "mnist_10.png", "mnist_100.png", "mnist.txt"}
TINY = {"n_images": 100, "batch_size": 32, "n_epochs": 1, "n_steps": 20, "max_beta": 0.5}
TINY |= {"sample_steps": 3, "n_samples": 5, "out_dir": "out"}
LONG = {"n_epochs": 10_000, "n_samples": 1}


# %% Processes
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def arguments(**flags):
    """-> the command line of TINY and `flags`."""
    names = TINY | flags
    return [f"--{name.replace('_', '-')}={value}" for name, value in names.items()]


def child(job, given, folder, number, environment):
    """Is a process: does the job in `folder`, which gets its output."""
    os.chdir(folder)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{name}{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ |= environment
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even if the tests ignore Ctrl-C
    torch.set_num_threads(1)
    job(given)


class Processes:
    """`size` processes with the environment that torchrun gives them, doing job(argument)."""

    def __init__(self, folder, argument, job=ddpm.main, size=2, each=None, without=()):
        folder.mkdir(exist_ok=True)
        self.folder, self.processes = folder, []
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        shared |= {"http_proxy": "http://127.0.0.1:1", "https_proxy": "http://127.0.0.1:1"}
        context = multiprocessing.get_context("forkserver")
        for rank in range(size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (each or {})
            environment = {k: v for k, v in (shared | own).items() if k not in without}
            given = argument[rank] if isinstance(argument, tuple) else argument
            how = (job, given, folder, rank, environment)
            self.processes.append(context.Process(target=child, args=how, daemon=True))
        for process in self.processes:
            process.start()

    def wait_for(self, name):
        """Waits until the first process has written out/name."""
        end = time.monotonic() + 100
        while not (self.folder / "out" / name).exists():
            alive = all(process.is_alive() for process in self.processes)
            assert alive and time.monotonic() < end, self.end() and self.text("stderr")
            time.sleep(0.01)
        return self

    def send(self, number, *ranks):
        for rank in ranks:
            os.kill(self.processes[rank].pid, number)
        return self

    def end(self):
        """Waits for the end. -> exit statuses, negative for a signal."""
        end = time.monotonic() + 60
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0.01))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in late:
            self.processes[rank].kill()
        assert late == [], f"{late} don't end: {self.text('stderr')}"
        return [process.exitcode for process in self.processes]

    def text(self, name, rank=0):
        path = self.folder / f"{name}{rank}"
        return path.read_text() if path.exists() else ""

    def lines(self, *statuses):
        """Asserts how they end, with one line each on stderr or none. -> these lines."""
        ends = self.end()
        texts = [self.text("stderr", rank).strip() for rank in range(len(ends))]
        assert ends == list(statuses), texts
        for text in texts:
            assert "\n" not in text and text[:9] in ("", "ddpm.py: "), text
        return texts

    def succeed(self):
        assert self.lines(*[0] * len(self.processes)) == [""] * len(self.processes)
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
def alone(server, tmp_path_factory):
    """A folder whose `out` holds a whole run of one process."""
    return Processes(tmp_path_factory.mktemp("alone"), arguments(), size=1).succeed().folder


@pytest.fixture(scope="module")
def together(server, tmp_path_factory):
    """The same of two processes."""
    return Processes(tmp_path_factory.mktemp("together"), arguments()).succeed().folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# %% Training
class Sees(nn.Module):
    """A network that keeps what it is trained on; its small output keeps gradients below 1."""

    def __init__(self):
        super().__init__()
        self.network, self.seen = ddpm.MyUNet(), []

    def forward(self, x, t):
        if self.training:
            self.seen.append(x.detach().clone())
        return 1e-3 * self.network(x, t)


def learn(path):
    """Is a job: trains in fp32 and writes what was seen, the gradients and the weights."""
    ddpm.fast_precision = lambda device: torch.autocast(device.type, enabled=False)
    digits = ddpm.load_images()
    results = {}
    # The last batches of the first two have 1 and 3 images: then a process has less, or nothing.
    cases = [(9, 8, 1, (1000, 1e-4, 0.02)), (11, 8, 1, (1000, 1e-4, 0.02))]
    # No noise at all: what the network sees are the images.
    cases += [(70, 32, 2, (2, 1e-12, 2e-12))]
    with ddpm.all_processes(CPU, 8):
        for n, batch_size, n_epochs, schedule in cases:
            torch.manual_seed(0)
            model = ddpm.MyDDPM(Sees(), *schedule)
            for p in model.parameters():
                if not p.any():  # it would hide the gradients of the layers before it
                    nn.init.normal_(p, std=0.02)
            before = [p.detach().clone() for p in model.parameters()]
            kind = ddpm.Muon if n == 70 else torch.optim.SGD
            optim, gradients = kind(model.parameters(), 0.01), []
            optim.register_step_pre_hook(
                lambda optim, *_, gradients=gradients: gradients.append(
                    [p.grad.clone() for p in optim.param_groups[0]["params"]]
                )
            )
            loader = ddpm.Batches(digits[:n], batch_size)
            losses = ddpm.training_loop(model, loader, n_epochs, optim, store_path=f"{n}.pt")
            after = model.state_dict()
            moved = any(not torch.equal(*pair) for pair in zip(before, model.parameters()))
            results[n] = {"gradients": gradients, "losses": losses, "weights": after}
            results[n] |= {"seen": model.network.seen, "moved": moved}
    torch.save(results, f"{path}{os.environ['RANK']}")


@pytest.fixture(scope="module")
def learned(server, tmp_path_factory):
    """-> results of one process, and those of each of two."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    runs = [Processes(f, "result", learn, size) for f, size in zip(folders, (1, 2), strict=True)]
    for run in runs:
        run.succeed()
    paths = [folders[0] / "result0", folders[1] / "result0", folders[1] / "result1"]
    one, *two = (torch.load(path) for path in paths)
    return one, two


@pytest.mark.parametrize("n", [9, 11])
def test_gradients_are_those_of_one_process(n, learned):
    """In both steps; the second has a batch of 1 or 3 images."""
    one, two = learned
    for other in two:
        assert len(one[n]["gradients"]) == len(other[n]["gradients"]) == 2
        for step in range(2):
            ours, theirs = one[n]["gradients"][step], other[n]["gradients"][step]
            size = sum(g.square().sum() for g in ours) ** 0.5
            assert 0 < size < 0.99  # clipping would hide a wrong factor
            for a, b in zip(ours, theirs, strict=True):
                assert a.any()
                torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * a.abs().max().item())
        assert other[n]["losses"] == pytest.approx(one[n]["losses"], rel=1e-5)


@pytest.mark.parametrize("n", [9, 11, 70])
def test_weights_are_the_same_in_both(n, learned):
    first, second = (result[n]["weights"] for result in learned[1])
    assert first.keys() == second.keys() and learned[1][0][n]["moved"]
    assert [k for k in first if not torch.equal(first[k], second[k])] == []


def test_each_image_is_learned_from_once(learned):
    """In each step the two share the images that one process would learn from."""
    one, (first, second) = (learned[0][70]["seen"], [other[70]["seen"] for other in learned[1]])
    assert [len(x) for x in one] == [32, 32, 6] * 2
    assert [len(x) for x in first] == [len(x) for x in second] == [16, 16, 3] * 2

    def as_set(*tensors):
        images = [image.numpy().tobytes() for image in torch.cat(tensors)]
        assert len(set(images)) == len(images)
        return set(images)

    for step in range(6):
        assert as_set(first[step], second[step]) == as_set(one[step])
    digits = ddpm.load_images()[:70].unsqueeze(1).float() / 127.5 - 1
    for epoch in (slice(0, 3), slice(3, 6)):
        assert as_set(*first[epoch], *second[epoch]) == as_set(digits)


def test_only_the_first_prints_and_writes(together, alone):
    out, nothing = (together / "stdout0").read_text(), (together / "stdout1").read_text()
    assert nothing == "" and len(re.findall("Loss at epoch 1: ", out)) == 1
    assert "(2 processes)" in out and "processes" not in (alone / "stdout0").read_text()
    assert contents(together / "out").keys() == NAMES
    names = {f"{name}{rank}" for name in ("stdout", "stderr") for rank in (0, 1)}
    assert {path.name for path in together.iterdir()} == names | {"out"}
    losses = [ddpm.load_model(f / "out" / "mnist.pt").info["losses"] for f in (together, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_resume_with_another_number(before, after, alone, together, tmp_path):
    shutil.copytree((alone if before == 1 else together) / "out", tmp_path / "out")
    run = Processes(tmp_path, [*arguments(n_epochs=2), "--resume"], size=after).succeed()
    assert re.findall(r"Loss at epoch (\d+)", run.text("stdout")) == ["2"]
    losses = ddpm.load_model(tmp_path / "out" / "mnist.pt").info["losses"]
    old = ddpm.load_model((alone if before == 1 else together) / "out" / "mnist.pt").info["losses"]
    assert len(losses) == 2 and losses[:1] == old and losses[1] < 1


# %% Drawing
@pytest.mark.parametrize("n_samples, steps", [(1, 3), (5, 3), (5, 20)])
def test_pictures_are_those_of_one_process(n_samples, steps, alone, tmp_path):
    """Also of one image, which leaves nothing to the second; fast sampler and whole chain."""
    flags = arguments(n_samples=n_samples, sample_steps=steps)
    runs = []
    for size in (1, 2):
        shutil.copytree(alone / "out", tmp_path / str(size) / "out")
        for name in (name for name in NAMES if name.endswith((".png", ".gif"))):
            (tmp_path / str(size) / "out" / name).unlink()
        runs.append(Processes(tmp_path / str(size), [*flags, "--no-train"], size=size))
    one, two = (contents(run.succeed().folder / "out") for run in runs)
    assert one.keys() == two.keys() == NAMES
    assert [name for name in one if one[name] != two[name]] == []


# %% Faults
BAD = {
    "not a multiple": ({"batch_size": 33}, (), "batch_size"),
    "more than images": ({"batch_size": 1}, (), "batch_size"),
    "flag": ({"lr": -1}, (), "lr"),
    "no address": ({}, ("MASTER_ADDR",), "MASTER_ADDR"),
    "no port": ({}, ("MASTER_PORT",), "MASTER_PORT"),
    "no rank": ({}, ("RANK",), "RANK"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, tmp_path):
    flags, without, word = BAD[case]
    first, second = Processes(tmp_path, arguments(**flags), without=without).lines(2, 2)
    assert word in first and second == ""
    assert not (tmp_path / "out").exists()


def main_in_a_hurry(argv):
    """Is a job: the program, which waits for other processes for a second instead of minutes."""
    join = ddpm.distributed.init_process_group
    second = datetime.timedelta(seconds=1)
    ddpm.distributed.init_process_group = lambda *args, **how: join(
        *args, **how | {"timeout": second}
    )
    ddpm.main(argv)


@pytest.mark.parametrize("rank", [0, 1])
def test_alone_of_two(rank, tmp_path):
    """The other is never started: the first waits in vain, the second finds nobody listening."""
    each = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": "0"}
    run = Processes(tmp_path, arguments(), main_in_a_hurry, size=1, each=each)
    assert run.end() == [2]
    text = run.text("stderr")
    assert "processes were not found" in text.splitlines()[-1] and "Traceback" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_process_ends_the_other(rank, tmp_path):
    """The first says that it is alone; the last finished epoch can be used."""
    run = Processes(tmp_path, arguments(**LONG)).wait_for("mnist_state.pt")
    run.send(signal.SIGKILL, rank)
    lines = run.lines(*((-9, 1) if rank == 0 else (1, -9)))
    if rank == 1:
        assert "process was lost" in lines[0]
    ddpm.load_model(tmp_path / "out" / "mnist.pt")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_signal_to_all(number, tmp_path):
    run = Processes(tmp_path, arguments(**LONG)).wait_for("mnist_state.pt")
    run.send(number, 0, 1)
    status = 128 + number
    first, second = run.lines(status, status)
    assert "--resume" in first and second == ""


def test_no_data_on_another_machine(tmp_path):
    """It says which file is missing there, and the first machine doesn't wait for it."""
    given = (arguments(), arguments(data_dir=tmp_path / "none"))
    first, second = Processes(tmp_path, given, each={"LOCAL_RANK": "0"}).lines(1, 2)
    assert str(tmp_path / "none" / "MNIST" / "raw" / "train-images-idx3-ubyte.gz") in second
    assert "process was lost" in first


def test_ctrl_c_of_torchrun(tmp_path):
    """The terminal sends SIGINT to all, and torchrun once more to its processes: all end."""
    argv = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [sys.executable, *argv, str(ROOT / "ddpm.py"), *arguments(**LONG)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    how = {"cwd": tmp_path, "env": environment, "text": True, "start_new_session": True}
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdout=pipe, stderr=pipe, **how) as launcher:
        try:
            end = time.monotonic() + 120
            while not (tmp_path / "out" / "mnist_state.pt").exists():
                assert launcher.poll() is None and time.monotonic() < end
                time.sleep(0.05)
            os.killpg(launcher.pid, signal.SIGINT)
            out, err = launcher.communicate(timeout=60)  # until nobody can write any more
        except BaseException:
            os.killpg(launcher.pid, signal.SIGKILL)
            raise
    assert launcher.returncode != 0
    assert len(re.findall("Loss at epoch 1: ", out)) == 1 and "(2 processes)" in out
    lines = [line for line in err.splitlines() if "ddpm.py" in line]
    assert len(lines) == 1 and "--resume" in lines[0], err
    ddpm.load_model(tmp_path / "out" / "mnist.pt")
    with pytest.raises(ProcessLookupError):
        os.killpg(launcher.pid, 0)
