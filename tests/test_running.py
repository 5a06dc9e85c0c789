"""The program as people run it: flags, files, and what can go wrong around it, made to happen."""

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

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, Network, change_a_bit, error_lines, frames_of, program, shows

import ddpm

USAGE = "ddpm.py [--flag] [--flag value] ..."
DRAWN = ["mnist.gif", "mnist_10.png", "mnist_100.png", "mnist_images.npy"]
TRAINED = ["mnist.pt", "mnist.pt.png", "mnist_first_batch.png", "mnist_forward.png"]
TRAINED += ["mnist_loss.png"]


def contents(folder):
    """-> what each file in `out` holds, without unfinished ones."""
    paths = [path for path in (folder / "out").rglob("*") if path.suffix != ".part"]
    return {path.name: path.is_file() and path.read_bytes() for path in paths}


def assert_drawn(path, n_samples=100, **how):
    """The stored images are those that the weights beside them draw."""
    model = ddpm.load_model(f"{path}.pt")
    expected = ddpm.generate_new_images(model, n_samples, gif_name=None, **how)
    np.testing.assert_allclose(np.load(f"{path}_images.npy"), expected, atol=1e-3)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """A folder whose `out` holds what a small run wrote that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert program(folder, *SMALL) == []
    return folder


@pytest.fixture
def copied(whole_run, tmp_path):
    """A copy of the whole run's outputs to do harm to."""
    shutil.copytree(whole_run / "out", tmp_path / "out")
    return tmp_path


def test_a_run_writes_weights_and_pictures(whole_run):
    assert sorted(contents(whole_run)) == sorted(DRAWN + TRAINED)
    path = whole_run / "out" / "mnist"
    assert_drawn(path, SEED=3)
    images = torch.tensor(np.load(f"{path}_images.npy"))
    np.testing.assert_array_equal(frames_of(f"{path}.gif")[-1][0], ddpm.tile(images))
    for n in (10, 100):
        assert shows(f"{path}_{n}.png", ddpm.tile(images[:n], gap=1))
    text = (whole_run / "stdout").read_text()
    assert "cpu" in text and f"{sum(p.numel() for p in ddpm.MyUNet().parameters()):,}" in text
    assert re.findall(r"epoch (\d): 0\.\d+", text) == ["1", "2", "3"]


def test_pictures_show_the_batch_that_training_begins_with(tmp_path, monkeypatch, digits):
    """It is of the images asked for, as is all that training sees."""
    seen, denoising_loss = [], ddpm.denoising_loss

    def loss_that_is_seen(model, x0, label):
        seen.append(x0)
        return denoising_loss(model, x0, label)

    monkeypatch.setattr(ddpm, "denoising_loss", loss_that_is_seen)
    ddpm.main([*SMALL, "--no-watch", "--sample-steps=1", f"--out-dir={tmp_path}"])
    assert shows(tmp_path / "mnist_first_batch.png", ddpm.tile(seen[0], gap=1))
    ten = ddpm.tile(seen[0][:10], gap=1)[:29]
    assert shows(tmp_path / "mnist_forward.png", ten, height=175)
    known = set(map(bytes, digits[:200][0].numpy()))
    assert {bytes(image) for batch in seen for image in batch.numpy()} == known


def test_from_the_shell(tmp_path):
    """Read from a pipe, in a folder whose name the console can't show, without a display."""
    how = {"n_samples": 12, "label": 7, "guidance": 0.5, "sample_steps": 3, "variance": 1}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in how.items()]
    flags += [*SMALL, "--fashion", "--no-watch", "--out-dir=Größe"]
    command = [sys.executable, "-", *flags, f"--data-dir={ROOT / 'datasets'}"]
    env = os.environ | {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://gone"}
    source = (ROOT / "ddpm.py").read_bytes()
    subprocess.run(command, cwd=tmp_path, env=env, input=source, check=True)
    assert_drawn(tmp_path / "Größe" / "fashion", SEED=3, **how)
    assert not list((tmp_path / "Größe").glob("*.pt.*"))


def test_cells_run_in_a_notebook(tmp_path, monkeypatch, capsys):
    """With the kernel's own command line; each cell may be run twice, flags change later, and names
    of one's own are like those of options."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").symlink_to(ROOT / "datasets")
    notebook, shown = types.ModuleType("__main__"), []
    monkeypatch.setattr(sys, "argv", ["/lib/ipykernel_launcher.py", "-f", "connection.json"])
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setattr(ddpm.plt, "show", lambda: shown.append(1))
    *cells, last = re.split("\n(?=# %%)", (ROOT / "ddpm.py").read_text())
    for cell in [*cells, *cells]:
        exec(cell, vars(notebook))  # noqa: S102
    assert list(tmp_path.iterdir()) == [tmp_path / "datasets"] and capsys.readouterr() == ("", "")
    mine = "help, train, no_fashion, display, lr_ = 3, True, True, print, 0.1\n"
    mine += "n_images, n_epochs, n_steps, max_beta = 100, 1, 4, 0.99\n"
    exec(mine + last, vars(notebook))  # noqa: S102
    assert {*DRAWN, *TRAINED} == {path.name for path in (tmp_path / "outputs").iterdir()}
    shown.clear()
    notebook.no_train, notebook.label = True, 3
    notebook.main()
    assert_drawn(tmp_path / "outputs" / "mnist", label=3)
    assert len(shown) == 2


def test_the_readme_runs_as_it_stands(copied, monkeypatch):
    (copied / "out").rename(copied / "outputs")
    monkeypatch.chdir(copied)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    exec("\n".join(blocks), {"__name__": "readme"})  # noqa: S102


def test_a_flag_has_the_same_effect_wherever_it_is_set(tmp_path, monkeypatch, capsys):
    """A percent sign is no reason for --help to fail, nor are cells that begin in another way, or
    names like those of options."""
    values = {"no_train": True, "guidance": 2.5, "n_epochs": 3, "label": 7, "out_dir": "50%s-A_b"}
    source, path = (ROOT / "ddpm.py").read_text(), tmp_path / "edited.py"
    for name, value in values.items():
        source = re.sub(rf"(?m)^{name} = .+?(?=  #)", f"{name} = {value!r}", source)
    path.write_text(source)
    in_file = (read_flags := runpy.run_path(str(path))["read_flags"])([])
    argv = ["--no-train", "--guidance", "2.5", "--n-epochs=3", "--label", "7", "--out-dir=50%s-A_b"]
    on_the_line = ddpm.read_flags(argv)
    by_name = ["--no_train", "--n_epochs=3", "--SEED=5"], ["--no-train", "--n-epochs=3", "--seed=5"]
    by_name = [vars(ddpm.read_flags(each)) for each in by_name]
    assert by_name[0] == by_name[1] and (by_name[0]["n_epochs"], by_name[0]["SEED"]) == (3, 5)
    for name, value in values.items():
        monkeypatch.setattr(ddpm, name, value)
        in_a_cell = ddpm.read_flags([])
        assert vars(in_file)[name] == vars(on_the_line)[name] == vars(in_a_cell)[name] == value
    flags = read_flags(["--guidance=1.5", "--lr", "2e-3", "--no-no-train", "--no-watch"])
    assert (flags.guidance, flags.lr, flags.no_train, flags.watch) == (1.5, 0.002, False, False)
    with pytest.raises(SystemExit):
        read_flags(["--help"])
    shown, cell = capsys.readouterr().out, source.split("\n# %% Flags")[1].split("\n\n\n")[0]
    assert all(line in shown for line in re.findall(r"(?m)^\w+ = .+  # .+$", cell))
    path.write_text(
        re.sub("(?m)^# %%", "# In[1]:", source) + "train, no_train, help = True, False, 3\n"
    )
    read_flags = runpy.run_path(str(path))["read_flags"]
    assert read_flags(["--no-train"]).no_train and read_flags(["--no-train"]).train
    with pytest.raises(SystemExit):
        read_flags(["-h"])
    assert "usage" in capsys.readouterr().out


def test_the_command_line_is_ours_only_if_the_program_is(monkeypatch):
    for first in ("ddpm.py", "-", "-c", str(ROOT / "ddpm.py")):  # as `%run` has it, too
        monkeypatch.setattr(sys, "argv", [first, "--no-train"])
        assert ddpm.read_flags().no_train
    others = "ipykernel_launcher.py ipykernel/__main__.py bin/ipython pydevconsole.py pytest own.py"
    for first in others.split():
        monkeypatch.setattr(
            sys, "argv", [f"/a/{first}", "-f", "x.json", "--no-banner", "--no-train"]
        )
        assert not ddpm.read_flags().no_train


def test_bad_flags(copied):
    """They are refused before the long work, in one line (or after argparse's usage)."""
    before = contents(copied)
    bad = """
        --label=10 --label=-1 --n-samples=0 --sample-steps=0 --sample-steps=-1 --guidance=nan --lr=x
        --variance=3 --n-epochs=0 --n-steps=1 --max-beta=1 --data-dir=/dev/null/datasets stray
        --frobnicate --out-dir=out/mnist.pt --out-dir=out/mnist.pt/below --no-train--fashion
        --max-beta=0.02 --batch-size=0 --batch-size=-1 --lr=-1 --lr=0 --lr=nan --n-images=0
        --n-images=-9 --seed=-1 --seed=99999999999999999999 --n-epochs=2--resume
        --max-beta=0.98--resume
    """
    for flag in bad.split():
        flags = flag.replace("--", " --").split()
        of_argparse = flag in ("--lr=x", "stray", "--frobnicate")
        *usage, line = program(copied, *SMALL, *flags, status=2 if of_argparse else 1)
        assert line.startswith("ddpm.py:") and usage[:1] == ["usage: " + USAGE] * of_argparse
        word = re.match(r"(?:--)?(?:n-)?([a-z]+)", flags[-1])[1]
        assert word.replace("resume", "epochs" if "epochs" in flag else "schedule") in line.lower()
        assert contents(copied) == before


def test_weights_that_are_none(copied, monkeypatch):
    """Missing, empty, cut off, damaged, a list, code to run, another network's, a folder; a
    training which that folder is in the way of keeps what it has learned."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, ("exploded",)

    monkeypatch.chdir(copied)
    path, save = copied / "out" / "mnist.pt", partial(torch.save, f=copied / "out" / "mnist.pt")
    whole = path.read_bytes()
    harms = [path.unlink, partial(path.write_bytes, b""), partial(path.write_bytes, whole[:-100])]
    harms += [partial(change_a_bit, path), partial(save, [1, 2]), partial(save, {"ddpm": Bomb()})]
    harms += [partial(ddpm.store, path, ddpm.MyDDPM(Network()), [0.1])]
    for harm in [*harms, lambda: path.unlink() or path.mkdir()]:
        path.write_bytes(whole)
        harm()
        before = contents(copied)
        for flag in ("--no-train", "--resume"):
            with pytest.raises(ddpm.InputError, match=r"mnist\.pt holds"):
                ddpm.main([flag, "--out-dir=out", *SMALL])
        assert contents(copied) == before and not (copied / "exploded").exists()
    assert len(program(copied, *SMALL, status=1)) == 1 and contents(copied)["mnist.pt.training"]


def signal_at_store(number, signum, name=".pt.training"):
    """Lets the signal arrive just before what is stored gets its name, first before all epochs."""
    stores = itertools.count(1)

    def watch(event, arguments):
        stored = event == "os.rename" and str(arguments[1]).endswith(name)
        if stored and next(stores) == number:
            os.kill(os.getpid(), signum)

    sys.addaudithook(watch)


def test_stopped_and_resumed_is_as_never_stopped(tmp_path, whole_run):
    """Also after the end, and without training; until then the old weights are drawn from."""
    program(tmp_path, *SMALL, "--n-epochs=1", "--SEED=4", "--no-watch")
    finished = contents(tmp_path)["mnist.pt"]
    ctrl_c = partial(signal_at_store, 2, signal.SIGINT)
    lines = program(tmp_path, *SMALL, status=1, prepare=ctrl_c)
    assert len(lines) == 1 and lines[0].startswith("ddpm.py:") and "--resume" in lines[0]
    kill = partial(signal_at_store, 3, signal.SIGKILL)
    program(tmp_path, *SMALL, "--resume", status=-signal.SIGKILL, prepare=kill)
    text = (tmp_path / "stdout").read_text()  # in a file, too, each epoch is seen at once
    assert re.findall(r"epoch (\d)", text) == ["0", "1"]  # after 0, it goes on
    program(tmp_path, "--no-train")
    assert contents(tmp_path)["mnist.pt"] == finished
    assert_drawn(tmp_path / "out" / "mnist")
    kill = partial(signal_at_store, 1, signal.SIGKILL, "mnist.pt")  # after the last epoch
    program(tmp_path, *SMALL, "--resume", status=-signal.SIGKILL, prepare=kill)
    for flag, epochs in ("--resume", ["2", "3"]), ("--resume", ["3"]), ("--no-train", []):
        for name in DRAWN:
            (tmp_path / "out" / name).unlink()
        program(tmp_path, *SMALL, flag)
        text = (tmp_path / "stdout").read_text()
        assert re.findall(r"epoch (\d)", text) == epochs
        assert contents(tmp_path) == contents(whole_run)


def test_full_disk(copied):
    """As weights, or the GIF, are written: one line, also as the process ends; old files stay."""
    before, limit = contents(copied), partial(resource.setrlimit, resource.RLIMIT_FSIZE)
    lines = program(copied, *SMALL, status=1, prepare=partial(limit, (500_000, 500_000)))
    command = [sys.executable, ROOT / "ddpm.py", "--no-train", "--out-dir=out"]
    how = {"cwd": copied, "stderr": subprocess.PIPE, "preexec_fn": partial(limit, (1000, 1000))}
    done = subprocess.run(command, check=False, **how)
    lines += error_lines(done.stderr)
    assert done.returncode == 1 and [line[:8] for line in lines] == ["ddpm.py:"] * 2, lines
    assert all(contents(copied)[name] == before[name] for name in ("mnist.pt", "mnist.gif"))
