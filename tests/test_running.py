"""The program as people run it: flags, files, and what can go wrong around it, made to happen."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL

import ddpm

PICTURES = ["mnist.gif", "mnist_10.png", "mnist_100.png", "mnist_first_batch.png"]
PICTURES += ["mnist_forward.png", "mnist_loss.png"]


def contents(folder):
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


def wait_for(path, process):
    while not path.exists():
        assert process.is_alive()
        time.sleep(0.005)


@pytest.fixture
def copied(whole_run, tmp_path):
    """A copy of the whole run's outputs to do harm to."""
    shutil.copytree(whole_run / "out", tmp_path / "out")
    return tmp_path


# %% The job
def test_a_run_writes_weights_and_pictures(whole_run):
    assert sorted(contents(whole_run)) == sorted([*PICTURES, "mnist.pt"])
    text = (whole_run / "stdout").read_text()
    count = sum(p.numel() for p in ddpm.MyUNet().parameters())
    assert f"{count:,}" in text and "cpu" in text
    assert re.findall(r"Loss at epoch (\d): 0\.\d+", text) == ["1", "2", "3"]


def test_the_same_bytes_again_and_without_training(copied, whole_run, start, finish):
    finish(start(copied), copied)
    assert contents(copied) == contents(whole_run)
    for name in PICTURES:
        (copied / "out" / name).unlink()
    finish(start(copied, "--no-train"), copied)
    assert contents(copied) == contents(whole_run)


def test_fewer_steps_in_all_are_the_whole_chain(tmp_path, start, finish):
    finish(start(tmp_path, "--n-steps", 30, "--sample-steps", 0, "--fashion"), tmp_path)
    assert (tmp_path / "out" / "fashion.gif").exists()
    assert ddpm.load_model(tmp_path / "out" / "fashion.pt").n_steps == 30


def test_import_has_no_side_effects(tmp_path):
    code = (
        "import random, signal, matplotlib, numpy, torch\n"
        "def state():\n"
        "    return (torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(),\n"
        "            random.getstate(), torch.get_default_dtype(), torch.is_grad_enabled(),\n"
        "            signal.getsignal(signal.SIGINT), matplotlib.get_backend())\n"
        "before = state()\n"
        "import ddpm\n"
        "assert state() == before and ddpm.plt.get_fignums() == []\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    command = [sys.executable, "-c", code, "--not-for-ddpm"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_cells_run_in_a_notebook(tmp_path, monkeypatch):
    """Cell by cell, without a file and with somebody else's command line; flags edited after."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kernel", "-f", "connection.json"])
    (tmp_path / "datasets").symlink_to(ROOT / "datasets")
    cells = (ROOT / "ddpm.py").read_text().split("\n# %%")
    notebook = {"__name__": "__main__", "get_ipython": lambda: None, "seed": "a user's variable"}
    *sections, last = cells
    last, job = last.split('if __name__ == "__main__":')
    for cell in [*sections, last]:
        exec(compile("# %%" + cell, "cell", "exec"), notebook)  # noqa: S102
    notebook |= {"n_images": 100, "batch_size": 50, "n_epochs": 1, "sample_steps": 2}
    exec(compile("if True:" + job, "cell", "exec"), notebook)  # noqa: S102
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == sorted(
        [*PICTURES, "mnist.pt"]
    )
    assert ddpm.load_model(tmp_path / "outputs" / "mnist.pt").info["flags"]["n_images"] == 100


def test_the_file_names_its_requirements():
    """The head of the file, for tools that read it there, says what requirements.txt says."""
    head = (ROOT / "ddpm.py").read_text().split("# ///")[1]
    required = (ROOT / "requirements.txt").read_text().split()
    assert re.findall(r'"(.+?)"', head.split("dependencies")[1]) == required


# %% Flags
@pytest.mark.parametrize(
    "argv, name",
    [
        (["--label", "10"], "label"),
        (["--label", "7.5"], "label"),
        (["--n-epochs", "0"], "n_epochs"),
        (["--lr", "nan"], "lr"),
        (["--guidance", "-1"], "guidance"),
        (["--display", "maybe"], "display"),
        (["--min-beta", "0.5"], "min_beta"),
        (["--frobnicate"], "frobnicate"),
    ],
)
def test_bad_flags_are_refused(argv, name, bad_input, tmp_path):
    assert name in bad_input(*argv, "--out-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bad_value_in_the_module_is_refused(bad_input, monkeypatch, tmp_path):
    monkeypatch.setattr(ddpm, "n_epochs", 2.5)
    assert "n_epochs" in bad_input("--out-dir", tmp_path)


def test_flags_come_from_the_command_line_or_else_the_module(monkeypatch):
    monkeypatch.setattr(ddpm, "fashion", True)
    monkeypatch.setattr(ddpm, "lr", 1)
    monkeypatch.setattr(ddpm, "mine", 3, raising=False)
    flags = ddpm.read_flags(["--n-steps", "500", "--no-train", "--display", "False"])
    assert (flags.fashion, flags.lr, flags.n_steps) == (True, 1, 500)
    assert (flags.no_train, flags.display) == (True, False)
    assert not hasattr(flags, "mine")


def test_help_names_every_flag_and_class(capsys):
    with pytest.raises(SystemExit) as stop:
        ddpm.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert all("--" + name.lower().replace("_", "-") in text for name in ddpm.FLAGS)
    assert "9 Ankle boot" in text


# %% Stops
def test_killed_and_resumed_is_as_never_stopped(tmp_path, whole_run, start, finish):
    process = start(tmp_path)
    wait_for(tmp_path / "out" / "mnist.pt", process)
    process.kill()
    process.join()
    ddpm.load_model(tmp_path / "out" / "mnist.pt")
    finish(start(tmp_path, "--resume"), tmp_path)
    assert "epoch 1" not in (tmp_path / "stdout").read_text()
    mine, whole = contents(tmp_path), contents(whole_run)
    assert all(mine[name] == whole[name] for name in [*PICTURES, "mnist.pt"])


def test_ctrl_c_says_how_to_go_on(tmp_path, start, finish):
    process = start(tmp_path, "--n-epochs", 50)
    wait_for(tmp_path / "out" / "mnist.pt", process)
    os.kill(process.pid, signal.SIGINT)
    text = finish(process, tmp_path, status=130)
    assert "--resume" in text and len(text.splitlines()) == 1


def test_a_finished_training_is_not_resumed(copied, bad_input):
    before = contents(copied)
    line = bad_input(*SMALL, "--resume", "--out-dir", copied / "out")
    assert "mnist.pt" in line and contents(copied) == before


@pytest.mark.parametrize("flag", [["--seed", 1], ["--batch-size", 50], ["--lr", 0.1]])
def test_other_flags_are_not_resumed(flag, tmp_path, start, bad_input):
    process = start(tmp_path)
    wait_for(tmp_path / "out" / "mnist.pt", process)
    process.kill()
    process.join()
    before = contents(tmp_path)
    line = bad_input(*SMALL, "--resume", "--out-dir", tmp_path / "out", *flag)
    assert "mnist.pt" in line and contents(tmp_path) == before


# %% Files
def full_disk():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))


def test_full_disk(copied, start, finish):
    """The weights don't fit: one line that names them; the old ones are whole, nothing is left."""
    before = contents(copied)
    text = finish(start(copied, prepare=full_disk), copied, status=1)
    assert "mnist.pt" in text and len(text.splitlines()) == 1
    after = contents(copied)
    assert after["mnist.pt"] == before["mnist.pt"] and after.keys() == before.keys()


class Bomb:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def first_edition(path):
    network = {"n_steps": 1000, "time_emb_dim": 128, "channels": (16, 32, 64), "n_middle": 4}
    torch.save({"weights": {}, "network": network, "n_steps": 1000, "image_chw": (1, 28, 28)}, path)


HARM = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "one bit": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "a list": lambda path: torch.save([1, 2], path),
    "code": lambda path: torch.save({"weights": Bomb()}, path),
    "first edition": first_edition,
}


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("harm", HARM)
def test_weights_that_are_none(harm, copied, bad_input, monkeypatch):
    monkeypatch.chdir(copied)
    HARM[harm](copied / "out" / "mnist.pt")
    before = contents(copied)
    for flag in ("--no-train", "--resume"):
        line = bad_input(*SMALL, flag, "--out-dir", copied / "out")
        assert "mnist.pt" in line and "train" in line
    assert contents(copied) == before
    assert not (copied / "exploded").exists()


def test_an_edited_network_is_named(copied, bad_input, monkeypatch):
    """Who changes MyUNet learns which tensor doesn't fit."""

    class Wider(ddpm.MyUNet):
        def __init__(self, *args):
            super().__init__(*args)
            self.label = torch.nn.Embedding(12, 128)

    monkeypatch.setattr(ddpm, "MyUNet", Wider)
    line = bad_input(*SMALL, "--no-train", "--out-dir", copied / "out")
    assert "label.weight" in line


def test_weights_of_another_schedule_or_data_set(copied, bad_input):
    out = ["--no-train", "--out-dir", copied / "out"]
    assert "n_steps" in bad_input(*SMALL, *out, "--n-steps", 500)
    (copied / "out" / "mnist.pt").rename(copied / "out" / "fashion.pt")
    assert "fashion" in bad_input(*SMALL, *out, "--fashion")


def test_outputs_that_cannot_be_a_folder(tmp_path, bad_input):
    (tmp_path / "file").touch()
    line = bad_input(*SMALL, "--out-dir", tmp_path / "file")
    assert "file" in line


# %% Data
@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """A copy of the archives of MNIST, out of reach of any network."""
    shutil.copytree(
        ROOT / "datasets" / "MNIST", tmp_path / "MNIST", ignore=shutil.ignore_patterns("*-ubyte")
    )
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # nobody listens there
    return tmp_path


def test_the_archives_are_enough(data_dir):
    assert len(ddpm.load_data(data_dir=data_dir)) == 60_000


@pytest.mark.parametrize("harm", ["missing", "cut off", "half unpacked"])
def test_bad_archives(harm, data_dir):
    raw = data_dir / "MNIST" / "raw"
    archive = raw / "train-images-idx3-ubyte.gz"
    if harm == "missing":
        archive.unlink()
    if harm == "cut off":
        archive.write_bytes(archive.read_bytes()[:-1])
    if harm == "half unpacked":
        for path in raw.glob("*.gz"):
            path.with_suffix("").write_bytes(b"\0\0\x08\x03\0\0\xea\x60")
    with pytest.raises(ddpm.BadInput, match=archive.name):
        ddpm.load_data(data_dir=data_dir)


# %% Several processes
def torchrun(folder, *argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [ROOT / "ddpm.py", *SMALL, "--n-epochs=2", "--out-dir", folder / "out", *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    command = list(map(str, command))
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_two_processes_learn_as_one(tmp_path, start, finish):
    done = torchrun(tmp_path, "--n-images=299")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Loss at epoch 2") == 1
    alone = tmp_path / "alone"
    alone.mkdir()
    finish(start(alone, "--n-epochs=2", "--n-images=299"), alone)
    one, two = (ddpm.load_model(path / "out" / "mnist.pt") for path in (alone, tmp_path))
    assert one.info["losses"] == pytest.approx(two.info["losses"], rel=0.01)
    a, b = (torch.nn.utils.parameters_to_vector(model.parameters()) for model in (one, two))
    assert (a - b).norm() < 0.02 * a.norm()
    assert sorted(contents(tmp_path)) == sorted([*PICTURES, "mnist.pt"])


def test_a_batch_that_cannot_be_shared(tmp_path):
    done = torchrun(tmp_path, "--batch-size=25")
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    lines = [line for line in done.stderr.splitlines() if line.startswith("ddpm.py:")]
    assert len(lines) == 1 and "batch_size" in lines[0]


def test_no_other_processes(bad_input, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert "torchrun" in bad_input(*SMALL)
