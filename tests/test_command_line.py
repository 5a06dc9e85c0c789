"""The program as people run it: imported, from the command line, edited, and with bad input."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import ddpm

SOURCE = Path(ddpm.__file__)
DATA_DIR = SOURCE.parent / "datasets"
SMALL = ["--n-images", "600", "--n-epochs", "1", "--sample-steps", "5"]
SMALL += ["--n-samples", "20", "--frames-per-gif", "4", "--data-dir", str(DATA_DIR)]


@pytest.fixture(scope="session")
def without_network(tmp_path_factory):
    """-> environment in which no program of Python can open a connection or look up a name."""
    folder = tmp_path_factory.mktemp("no_network")
    (folder / "sitecustomize.py").write_text(
        "import socket\n"
        "def refuse(*args, **kwargs):\n"
        "    raise OSError('there is no network in this test')\n"
        "socket.socket.connect = socket.socket.connect_ex = refuse\n"
        "socket.getaddrinfo = socket.create_connection = refuse\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder), "MPLBACKEND": "Agg"}
    probe = "import socket; socket.create_connection(('localhost', 9))"
    answer = subprocess.run(
        [sys.executable, "-c", probe], check=False, env=environment, capture_output=True, text=True
    )
    assert "there is no network in this test" in answer.stderr
    return environment


def run(script, *arguments, cwd, env):
    command = [sys.executable, str(script), *map(str, arguments)]
    how = {"capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, check=False, cwd=cwd, env=env, **how)


def files(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def test_import_has_no_side_effects(tmp_path):
    code = f"""
import os, random, signal, sys, threading
import matplotlib, numpy, torch
def state():
    return (
        torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate(),
        torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
        signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT),
        os.getcwd(), sys.argv, os.listdir(),
    )
before = state()
sys.path.insert(0, {str(SOURCE.parent)!r})
import ddpm
assert state() == before
import matplotlib.pyplot as plt
assert plt.get_fignums() == []
assert len(threading.enumerate()) == 1
"""
    listing = [p.name for p in SOURCE.parent.iterdir() if p.name != "__pycache__"]
    answer = subprocess.run(
        [sys.executable, "-c", code, "--not-for-ddpm"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    assert files(tmp_path) == []
    assert sorted(listing) == sorted(
        p.name for p in SOURCE.parent.iterdir() if p.name != "__pycache__"
    )


# MNIST by the program as it is, with nothing but flags. Fashion-MNIST by a copy with two lines
# edited, whose pictures the program then draws again from flags: editing and flags are the same.
@pytest.mark.parametrize("name", ["mnist", "fashion"])
def test_end_to_end_and_again_without_training(name, tmp_path, without_network):
    cwd, out_dir = tmp_path / "elsewhere", tmp_path / "new" / "outputs"
    cwd.mkdir()
    script, flags, edited_flags = SOURCE, [], []
    if name == "fashion":
        script, edited_flags = tmp_path / "edited.py", ["--fashion", "--seed", "7"]
        text = SOURCE.read_text(encoding="utf-8")
        for line, edited in [("fashion = False", "fashion = True"), ("SEED = 0", "SEED = 7")]:
            assert len(re.findall(rf"^{line}\b", text, re.MULTILINE)) == 1
            text = re.sub(rf"^{line}\b", edited, text, flags=re.MULTILINE)
        script.write_text(text, encoding="utf-8")
    flags = [*SMALL, "--out-dir", out_dir]

    answer = run(script, *flags, cwd=cwd, env=without_network)
    assert answer.returncode == 0, answer.stderr
    assert "Using device: c" in answer.stdout
    parameters = sum(
        p.numel() for p in ddpm.load_model(out_dir / f"{name}.pt").network.parameters()
    )
    assert f"{parameters:,}" in answer.stdout
    assert re.search(r"Loss at epoch 1: \d\.\d+", answer.stdout)
    assert files(cwd) == []
    pictures = {f"{name}{end}" for end in ("_first_batch.png", "_forward.png", "_loss.png", ".gif")}
    pictures |= {f"{name}_10.png", f"{name}_100.png"}
    assert pictures | {f"{name}.pt", f"{name}.txt"} <= {path.name for path in files(out_dir)}
    assert not any(path.name.startswith(".") for path in files(out_dir))
    for picture in pictures:
        with Image.open(out_dir / picture) as image:
            assert min(image.size) > 100, picture
    with Image.open(out_dir / f"{name}.gif") as gif:
        assert sum(1 for _ in ImageSequence.Iterator(gif)) == 4

    before = {path: path.read_bytes() for path in files(out_dir)}
    for picture in pictures:
        (out_dir / picture).unlink()
    again = run(SOURCE, "--no-train", *edited_flags, *flags, cwd=cwd, env=without_network)
    assert again.returncode == 0, again.stderr
    assert "Loss at epoch" not in again.stdout
    assert files(out_dir) == sorted(before)
    changed = [path.name for path in before if path.read_bytes() != before[path]]
    assert changed == []
    if name == "fashion":  # the pictures show clothes, which cover far more than digits do
        picture = np.asarray(Image.open(out_dir / "fashion_first_batch.png").convert("L"))
        assert (picture[50:-50] > 60).mean() > 0.3


def flags_in_the_source():
    """-> {name: (value, reason)} of all flag lines: constants at module level, in their cell."""
    text = SOURCE.read_text(encoding="utf-8")
    cell = re.search(r"^# %% Flags.*?\n(.*?)^FLAGS = ", text, re.MULTILINE | re.DOTALL)[1]
    found = {}
    for statement in ast.parse(cell).body:
        assert isinstance(statement, ast.Assign), ast.unparse(statement)
        comment = cell.splitlines()[statement.end_lineno - 1].partition("  # ")[2]
        found[statement.targets[0].id] = ast.unparse(statement.value), comment
    return found


def test_help_names_every_flag_with_its_reason(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        ddpm.main(["--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    flags = flags_in_the_source()
    required = {"no_train", "fashion", "batch_size", "n_epochs", "lr", "SEED"}
    assert required | {"n_steps", "sample_steps", "variance", "data_dir", "out_dir"} <= set(flags)
    entries = [" ".join(entry.split()) for entry in text.split("\n  --")]
    for name, (_, reason) in flags.items():
        option = name.lower().replace("_", "-")
        found = [entry for entry in entries if entry.split()[0] == option]
        assert len(found) == 1, option
        assert len(reason) > 10 and reason in found[0], option
        assert f"(default: {getattr(ddpm, name)})" in found[0], option


def test_flags_on_the_command_line_override_the_values_in_the_file():
    plain, given = ddpm.read_flags([]), ddpm.read_flags(["--n-epochs", "3", "--fashion"])
    assert vars(plain) == {name: getattr(ddpm, name) for name in flags_in_the_source()}
    assert vars(given) == {**vars(plain), "n_epochs": 3, "fashion": True}
    given = ddpm.read_flags(["--fashion", "False", "--lr", "1e-3", "--out-dir", "1"])
    assert (given.fashion, given.lr, given.out_dir) == (False, 0.001, "1")


BAD_INPUT = {
    "unknown flag": ["--bathc-size", "64"],
    "abbreviated flag": ["--n-epo", "3"],
    "stray word": ["fashion"],
    "missing value": ["--n-epochs"],
    "wrong type": ["--batch-size", "many"],
    "not a number": ["--lr", "0.0.1"],
    "number and more": ["--seed", "7x"],
    "empty": ["--n-epochs", ""],
    "not whole": ["--batch-size", "2.5"],
    "wrong truth": ["--fashion", "perhaps"],
    "batch_size 0": ["--batch-size", "0"],
    "n_epochs 0": ["--n-epochs", "0"],
    "n_images 0": ["--n-images", "0"],
    "n_steps 1": ["--n-steps", "1", "--sample-steps", "1"],
    "min_beta = max_beta": ["--min-beta", "0.02"],
    "min_beta > max_beta": ["--min-beta", "0.03"],
    "min_beta 0": ["--min-beta", "0"],
    "min_beta lost in rounding": ["--min-beta", "1e-20"],
    "too much noise for float32": ["--max-beta", "0.5"],
    "max_beta 1": ["--max-beta", "1"],
    "lr negative": ["--lr", "-0.001"],
    "lr nan": ["--lr", "nan"],
    "lr infinite": ["--lr", "inf"],
    "lr beyond fp32": ["--lr", "1e42"],
    "sample_steps > n_steps": ["--sample-steps", "1001"],
    "sample_steps 0": ["--sample-steps", "0"],
    "n_images 60001": ["--n-images", "60001"],
    "variance 3": ["--variance", "3"],
    "guidance 0.5": ["--guidance", "0.5"],
    "n_samples 0": ["--n-samples", "0"],
    "frames_per_gif 1": ["--frames-per-gif", "1"],
    "SEED negative": ["--seed", "-1"],
    "no_train without weights": ["--no-train"],
    "resume without a state": ["--resume"],
}


def assert_one_line(stderr):
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("ddpm.py: "), stderr
    assert len(lines[0]) > 30 and "Traceback" not in stderr


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        ddpm.main(["--out-dir", str(tmp_path / "out"), *SMALL, *BAD_INPUT[case]])
    assert stop.value.code == 2
    assert_one_line(capsys.readouterr().err)
    # Bad values are found before anything is done; a training to go on with is looked for later.
    left = [path for path in files(tmp_path) if case != "resume without a state"]
    assert left == []


class Breaks:
    """A loader that Ctrl-C hits in its second epoch of training; two pictures are drawn before."""

    def __init__(self, loader):
        self.loader, self.dataset, self.rounds = loader, loader.dataset, 0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        self.rounds += 1
        for i, batch in enumerate(self.loader):
            if self.rounds == 4 and i == 2:
                raise KeyboardInterrupt
            yield batch


def test_stopped_and_resumed_by_the_flag(capsys, tmp_path, monkeypatch):
    flags = [*SMALL, "--n-epochs", "2", "--n-images", "256", "--batch-size", "64"]
    flags += ["--n-samples", "1", "--sample-steps", "2"]
    ddpm.main([*flags, "--out-dir", str(tmp_path / "unbroken")])
    with monkeypatch.context() as patch:
        batches = ddpm.Batches
        patch.setattr(ddpm, "Batches", lambda *rest: Breaks(batches(*rest)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            ddpm.main([*flags, "--out-dir", str(tmp_path / "resumed")])
    assert stop.value.code == 130
    assert_one_line(capsys.readouterr().err)
    ddpm.main([*flags, "--out-dir", str(tmp_path / "resumed"), "--resume"])
    for name in ("mnist.gif", "mnist_loss.png"):
        unbroken, resumed = tmp_path / "unbroken" / name, tmp_path / "resumed" / name
        assert unbroken.read_bytes() == resumed.read_bytes(), name
    unbroken, resumed = (
        ddpm.load_model(tmp_path / d / "mnist.pt") for d in ("unbroken", "resumed")
    )
    assert unbroken.info["losses"] == resumed.info["losses"]
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("case", ["lr nan", "no_train without weights"])
def test_bad_input_as_seen_from_a_shell(case, tmp_path, without_network):
    flags = [*SMALL, "--out-dir", tmp_path / "out", *BAD_INPUT[case]]
    answer = run(SOURCE, *flags, cwd=tmp_path, env=without_network)
    assert answer.returncode == 2 and answer.stdout == ""
    assert_one_line(answer.stderr)
    assert files(tmp_path) == []
