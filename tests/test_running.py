"""The program as people run it: flags, files, and what can go wrong around it, made to happen."""

import io
import itertools
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import types
from functools import partial

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, change_a_bit, frames_of, grid_of, program
from torch.utils.data import TensorDataset

import ddpm

DRAWN = ["mnist.gif", "mnist_10.png", "mnist_100.png", "mnist_images.npy"]
TRAINED = ["mnist.pt", "mnist_first_batch.png", "mnist_forward.png", "mnist_loss.png"]


def contents(folder):
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


def assert_drawn(path, **how):
    """The stored images are those that the weights beside them draw."""
    model = ddpm.load_model(f"{path}.pt")
    found = np.load(f"{path}_images.npy")
    expected = ddpm.generate_new_images(model, len(found), gif_name=None, **how)
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.fixture
def copied(whole_run, tmp_path):
    """A copy of the whole run's outputs to do harm to."""
    shutil.copytree(whole_run / "out", tmp_path / "out")
    return tmp_path


# %% The job
def test_a_run_writes_weights_and_pictures(whole_run):
    assert sorted(contents(whole_run)) == sorted(DRAWN + TRAINED)
    path = whole_run / "out" / "mnist"
    assert_drawn(path, SEED=3)
    images = torch.tensor(np.load(f"{path}_images.npy"))
    np.testing.assert_array_equal(frames_of(f"{path}.gif")[-1][0], ddpm.tile(images))
    for n in (10, 100):
        grid = ddpm.tile(images[:n], gap=1)
        np.testing.assert_allclose(grid_of(f"{path}_{n}.png", grid.shape), grid, atol=1)


def test_the_first_batch_is_one_of_the_images_asked_for(whole_run, digits):
    """Up to a grey level, which the picture's own colours may cost."""
    grid = grid_of(whole_run / "out" / "mnist_first_batch.png", (290, 290))
    cells = grid.reshape(10, 29, 10, 29)[:, :28, :, :28].transpose(0, 2, 1, 3).reshape(100, 784)
    known = ((digits.tensors[0][:200, 0] + 1) * 127.5).flatten(1)
    distances = torch.cdist(torch.from_numpy(cells).float(), known, p=torch.inf)
    nearest, which = distances.min(1)
    assert nearest.max() <= 1.5 and len(which.unique()) == 100


def test_a_run_says_what_it_does(whole_run):
    text = (whole_run / "stdout").read_text()
    count = sum(p.numel() for p in ddpm.MyUNet().parameters())
    assert all(word in text for word in ("cpu", f"{count:,}", "4 steps", "0.0001", "0.99"))
    assert re.findall(r"epoch (\d): 0\.\d+", text) == ["1", "2", "3"]


def test_the_same_bytes_again_and_without_training(copied, whole_run):
    program(copied, *SMALL)
    whole = contents(whole_run)
    assert contents(copied) == whole
    for name in whole.keys() - {"mnist.pt"}:
        (copied / "out" / name).unlink()
    program(copied, "--no-train", "--SEED=3", "--data-dir=/nonexistent")
    assert contents(copied) == {name: whole[name] for name in [*DRAWN, "mnist.pt"]}


def test_from_the_shell(tmp_path):
    """As from a notebook's `!` line, which passes its backend on; and without any stderr."""
    program(tmp_path, *SMALL, "--fashion", "--n-epochs=1", "--no-display", "--n-samples=1")
    command = [sys.executable, ROOT / "ddpm.py", "--fashion", "--label=7", "--no-train"]
    backend = "module://matplotlib_inline.backend_inline"
    done = subprocess.run(
        ["sh", "-c", '"$@" 2>&-', "sh", *command, "--out-dir=~/out"],
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path), "MPLBACKEND": backend},
        check=False,
    )
    assert done.returncode == 0
    assert_drawn(tmp_path / "out" / "fashion", label=7)


def test_a_status_without_anywhere_to_say_more(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as stop:
        ddpm.main(["--label=10"])
    assert stop.value.code == 2


def test_import_has_no_side_effects(tmp_path, monkeypatch, capsys):
    def state():
        arrays = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
        return arrays, os.environ.copy(), signal.getsignal(signal.SIGINT), matplotlib.get_backend()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["other", "--not-for-ddpm"])
    before = state()
    runpy.run_path(str(ROOT / "ddpm.py"), run_name="ddpm")
    assert state() == before and list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_cells_run_in_a_notebook(tmp_path, monkeypatch):
    """With the kernel's own command line; flags count that are edited in a later cell."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").symlink_to(ROOT / "datasets")
    notebook, shown = types.ModuleType("__main__"), []
    monkeypatch.setattr(sys, "argv", ["kernel", "-f", "connection.json"])
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setattr(ddpm.plt, "show", lambda: shown.append(1))
    *cells, last = (ROOT / "ddpm.py").read_text().split("\n# %%")
    mine = " Mine\nmine: int = 3\nn_images, n_epochs, n_steps, max_beta = 100, 1, 4, 0.99"
    for cell in [*cells, mine, last]:
        exec(f"#{cell}", vars(notebook))  # noqa: S102
    out = tmp_path / "outputs"
    assert sorted(path.name for path in out.iterdir()) == sorted(DRAWN + TRAINED)
    shown.clear()
    notebook.no_train, notebook.label = True, 3
    notebook.main()
    assert_drawn(out / "mnist", label=3)
    assert len(shown) == 2


@pytest.mark.parametrize("how", ["file", "run"])
def test_in_ipython(how, copied):
    pytest.importorskip("IPython")
    flags = ["--no-train", "--label=7", f"--out-dir={copied / 'out'}"]
    run = ["-c", f"%run -i {ROOT / 'ddpm.py'} {' '.join(flags)}"]
    words = run if how == "run" else [ROOT / "ddpm.py", "--", *flags]
    environment = os.environ | {"IPYTHONDIR": str(copied)}
    subprocess.run([sys.executable, "-m", "IPython", *words], env=environment, check=True)
    assert_drawn(copied / "out" / "mnist", label=7)


@pytest.mark.parametrize(
    "first, ours", [("ddpm.py", True), (ROOT / "ddpm.py", True), ("kernel", False), ("", False)]
)
def test_whose_command_line_it_is(first, ours, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(first), "--no-train"])
    assert ddpm.read_flags().no_train == ours


def test_the_file_names_its_requirements():
    """The head of the file, for tools that read it there, says what requirements.txt says."""
    head = (ROOT / "ddpm.py").read_text().split("# ///")[1]
    required = (ROOT / "requirements.txt").read_text().split()
    assert re.findall(r'"(.+?)"', head.split("dependencies")[1]) == required


def test_the_readme_runs_as_it_stands(copied, monkeypatch):
    (copied / "out").rename(copied / "outputs")
    monkeypatch.chdir(copied)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    exec("\n".join(blocks), {"__name__": "readme"})  # noqa: S102


# %% Flags
BAD_FLAGS = """
    --label=10 --label=7.5 --label=-1 --n-epochs=0 --n-epochs --n-images=0 --n-images=-1
    --n-samples=0 --n-steps=1 --n-steps=-5 --sample-steps=0 --batch-size=0 --lr=nan --lr=0
    --guidance=-1 --guidance=nan --variance=3 --display=maybe --min-beta=0.995 --max-beta=nan
    --SEED=-1 --device=nonsense --device=meta --frobnicate stray
"""


@pytest.mark.parametrize("flag", BAD_FLAGS.split())
def test_bad_flags_are_refused(flag, bad_input, tmp_path):
    """Before anything is written: here nothing can be, and to try ends with another status."""
    (tmp_path / "file").touch()
    line = bad_input(*SMALL, "--out-dir", tmp_path / "file" / "out", flag)
    assert flag.split("=")[0].strip("-").replace("-", "_") in line.replace("-", "_")


@pytest.mark.parametrize(
    "name, value", [("n_epochs", 2.5), ("lr", None), ("no_train", "perhaps"), ("label", "shoe")]
)
def test_bad_values_in_the_module_are_refused(name, value, bad_input, monkeypatch, tmp_path):
    monkeypatch.setattr(ddpm, name, value)
    (tmp_path / "file").touch()
    line = bad_input("--out-dir", tmp_path / "file" / "out")
    assert name in line.replace("-", "_")


@pytest.mark.parametrize(
    "line, expected",
    [
        ("", {"fashion": True, "lr": 1, "label": None}),
        (
            "--no-train --no-fashion --n-epochs 5",
            {"no_train": True, "fashion": False, "n_epochs": 5},
        ),
        ("--no_train --n_epochs=5 --SEED 7", {"no_train": True, "n_epochs": 5, "SEED": 7}),
        ("--no-train false --display=False", {"no_train": False, "display": False}),
        ("--no_display --seed=7 --lr 2e-3", {"display": False, "SEED": 7, "lr": 0.002}),
        ("--label 7 --out-dir A_b-C", {"label": 7, "out_dir": "A_b-C"}),
    ],
)
def test_flags_come_from_the_command_line_or_else_the_module(line, expected, monkeypatch):
    monkeypatch.setattr(ddpm, "fashion", True)
    monkeypatch.setattr(ddpm, "lr", 1)
    flags = vars(ddpm.read_flags(line.split()))
    assert {name: flags[name] for name in expected} == expected


def test_help_names_every_flag_and_class(capsys):
    with pytest.raises(SystemExit) as stop:
        ddpm.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "0 T-shirt/top" in text and "9 Ankle boot" in text
    names = {name.lower().replace("_", "-") for name in ddpm.__annotations__}
    assert "n-epochs" in names and all(f"--{name} " in text for name in names)


# %% Stops
def signal_at_store(number, signum):
    """Lets the signal arrive just before the weights of that epoch get their name."""
    stores = itertools.count(1)

    def watch(event, arguments):
        if event == "os.rename" and str(arguments[1]).endswith(".pt") and next(stores) == number:
            os.kill(os.getpid(), signum)

    sys.addaudithook(watch)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder whose `out` is that of a small run killed as it stores its second epoch."""
    folder = tmp_path_factory.mktemp("killed")
    prepare = partial(signal_at_store, 2, signal.SIGKILL)
    program(folder, *SMALL, status=-signal.SIGKILL, prepare=prepare)
    return folder


def test_each_epoch_is_seen_at_once(killed):
    """In a file or a pipe too: a kill leaves no time to write what was held back."""
    assert "epoch 1: 0." in (killed / "stdout").read_text()
    assert (killed / "out" / "mnist_10.png").exists()


def test_killed_and_resumed_is_as_never_stopped(killed, tmp_path, whole_run):
    shutil.copytree(killed / "out", tmp_path / "out")
    program(tmp_path, "--resume")
    assert "epoch 1" not in (tmp_path / "stdout").read_text()
    whole = contents(whole_run)
    assert {name: data for name, data in contents(tmp_path).items() if name in whole} == whole


@pytest.mark.parametrize("epoch", [1, 2])
def test_ctrl_c_says_if_there_is_something_to_resume(epoch, tmp_path):
    prepare = partial(signal_at_store, epoch, signal.SIGINT)
    text = program(tmp_path, *SMALL, "--no-display", status=130, prepare=prepare)
    assert len(text.splitlines()) == 1 and ("--resume" in text) == (epoch > 1)
    assert not (tmp_path / "out" / "mnist_10.png").exists()


@pytest.mark.parametrize("name", ["SEED", "batch_size", "n_epochs", "n_images", "lr", "n_steps"])
def test_other_flags_are_not_resumed(name, killed, bad_input):
    before = contents(killed)
    line = bad_input("--resume", "--out-dir", killed / "out", f"--{name}=7")
    assert "mnist.pt" in line and name in line and contents(killed) == before


@pytest.mark.parametrize(
    "flags, word", [("--resume --n-epochs=9", "train"), ("--no-train --n-steps=500", "n_steps")]
)
def test_what_a_finished_training_refuses(flags, word, copied, bad_input):
    before = contents(copied)
    line = bad_input("--out-dir", copied / "out", *flags.split())
    assert "mnist.pt" in line and word in line and contents(copied) == before


# %% Files
def full_disk(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("flags, size", [(SMALL, 500_000), (["--no-train"], 1000)])
def test_full_disk(flags, size, copied):
    """One line; the old weights are whole, and nothing is left over."""
    before = contents(copied)
    text = program(copied, *flags, status=1, prepare=partial(full_disk, size))
    after = contents(copied)
    assert len(text.splitlines()) == 1 and after.keys() == before.keys()
    assert after["mnist.pt"] == before["mnist.pt"]


def test_outputs_that_cannot_be_a_folder(tmp_path, bad_input):
    (tmp_path / "file").touch()
    assert "file" in bad_input(*SMALL, "--out-dir", tmp_path / "file", status=1)


def test_a_missing_folder_is_noticed_before_the_work(tmp_path):
    """Here is no loader and no network to draw with: to begin would be another error."""
    model, path = ddpm.MyDDPM(torch.nn.Linear(1, 1, bias=False)), tmp_path / "missing" / "file"
    with pytest.raises(ddpm.BadInput, match="missing"):
        ddpm.training_loop(model, None, 1, ddpm.Muon(model.parameters()), store_path=path)
    with pytest.raises(ddpm.BadInput, match="missing"):
        ddpm.generate_new_images(model, gif_name=path)


def test_a_preview_that_cannot_be_written_ends_no_training(train, digits, tmp_path):
    (tmp_path / "weights_10.png").mkdir()
    assert len(train(2, dataset=TensorDataset(*digits[:50]), display=True)[1]) == 2


class Bomb:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def store_other_network(path):
    ddpm.store(path, ddpm.MyDDPM(torch.nn.Linear(1, 1)), [0.1])


def store_edited_network(path):
    network = ddpm.MyUNet()
    network.label = torch.nn.Embedding(12, 128)
    ddpm.store(path, ddpm.MyDDPM(network), [0.1])


HARM = {
    "missing": (lambda path: path.unlink(), "train"),
    "empty": (lambda path: path.write_bytes(b""), "train"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "train"),
    "one bit": (change_a_bit, "train"),
    "a list": (lambda path: torch.save([1, 2], path), "train"),
    "code": (lambda path: torch.save({"weights": Bomb()}, path), "train"),
    "weights alone": (lambda path: torch.save(ddpm.MyUNet().state_dict(), path), "train"),
    "other network": (store_other_network, "Linear"),
    "edited network": (store_edited_network, "label.weight"),
}


@pytest.mark.parametrize("harm, word", HARM.values(), ids=HARM)
def test_weights_that_are_none(harm, word, copied, bad_input, monkeypatch):
    monkeypatch.chdir(copied)
    harm(copied / "out" / "mnist.pt")
    before = contents(copied)
    for flag in ("--no-train", "--resume"):
        line = bad_input(flag, "--out-dir", copied / "out")
        assert "mnist.pt" in line and word in line
    assert contents(copied) == before and not (copied / "exploded").exists()


def test_weights_of_another_data_set(copied, bad_input):
    (copied / "out" / "mnist.pt").rename(copied / "out" / "fashion.pt")
    assert "fashion" in bad_input("--no-train", "--fashion", "--out-dir", copied / "out")


# %% Progress
class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stderr", [io.StringIO, Terminal])
def test_progress(stderr, train, digits, monkeypatch, capsys):
    """A bar on a terminal, elsewhere lines; each look at this clock takes 20 s."""
    monkeypatch.setattr(sys, "stderr", stderr())
    monkeypatch.setattr("tqdm.std.time", itertools.count(0, 20).__next__)
    train(dataset=TensorDataset(*digits[:200]))
    bar, lines = sys.stderr.getvalue(), capsys.readouterr().out
    shown, hidden = (bar, lines) if stderr is Terminal else (lines, bar)
    assert all(word in shown for word in ("1/1", "loss 0.", "%", " images/s"))
    assert " images/s" not in hidden
