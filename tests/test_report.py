"""What is shipped: the README's links, the script's metadata, the weights, the notebook."""

import ast
import re
from pathlib import Path

import jupytext
import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

import ddpm

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "ddpm.py").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def spans():
    """-> {name: (first line, last line)} of the functions, classes and methods of ddpm.py."""
    found = {}
    for node in ast.parse(SOURCE).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node.lineno, node.end_lineno
        for part in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(part, ast.FunctionDef):
                found[f"{node.name}.{part.name}"] = part.lineno, part.end_lineno
    return found


def test_links_lead_to_the_lines_that_they_name():
    links = re.findall(r"\[`([\w.]+)`\]\(ddpm\.py#L(\d+)-L(\d+)\)", README)
    assert {"MyDDPM.forward", "MyUNet", "training_loop"} <= {name for name, _, _ in links}
    assert {name: (int(first), int(last)) for name, first, last in links} == {
        name: spans()[name] for name, _, _ in links
    }
    assert README.count("(ddpm.py#") == len(links)


def test_files_that_the_readme_shows_are_there():
    paths = re.findall(r'(?:src="|\]\()(?!http)([\w./]+)', README)
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_metadata_of_the_script_are_the_requirements():
    block = re.search(r"^# /// script$(.*?)^# ///$", SOURCE, re.MULTILINE | re.DOTALL)[1]
    text = re.sub(r"^# ?", "", block, flags=re.MULTILINE)
    listed = ast.literal_eval(
        re.search(r"^dependencies = (\[.*?\])", text, re.MULTILINE | re.DOTALL)[1]
    )
    assert listed == (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    oldest = re.search(r'^requires-python = ">=(3\.\d+)"$', text, re.MULTILINE)[1]
    assert f"Python {oldest} or newer" in README


def note(name):
    """-> {flag: value} of the text that was written when outputs/<name>.pt was trained."""
    lines = (ROOT / "outputs" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split(" = ") for line in lines if not line.startswith("#"))
    return {flag: ast.literal_eval(value) for flag, value in pairs}


@pytest.fixture(scope="module", params=["mnist", "fashion"])
def shipped(request):
    """-> name of the data set, and its shipped model."""
    return request.param, ddpm.load_model(ROOT / "outputs" / f"{request.param}.pt")


def test_shipped_weights_are_those_of_the_defaults(shipped):
    name, model = shipped
    flags = note(name)
    losses = flags.pop("losses")
    defaults = {flag: getattr(ddpm, flag) for flag in flags}
    assert flags == defaults | {"fashion": name == "fashion"}
    assert flags.items() >= model.info["flags"].items()
    assert losses == [float(f"{loss:.4f}") for loss in model.info["losses"]]
    assert len(losses) == ddpm.n_epochs and losses[-1] == min(losses)
    assert model.early is not None


def test_shipped_images_come_from_the_shipped_weights(shipped, tmp_path):
    """The same digits, pixel by pixel but for the rounding of another processor."""
    name, model = shipped
    flags = note(name)
    how = {flag: flags[flag] for flag in ("sample_steps", "guidance", "variance")}
    images = ddpm.generate_new_images(
        model, flags["n_samples"], gif_name=None, seed=flags["SEED"], **how
    )
    with Image.open(ROOT / "outputs" / f"{name}.gif") as gif:
        gif.seek(gif.n_frames - 1)
        last = np.asarray(gif.convert("L")).astype(int)
    tiles = last.reshape(10, 28, 10, 28).transpose(0, 2, 1, 3).reshape(100, 28, 28)
    drawn = ((images[:, 0] + 1) * 127.5).round().int().numpy()
    differences = abs(tiles - drawn).mean((1, 2))
    assert np.median(differences[:10]) < 5 and np.median(differences) < 5, differences
    ddpm.show_images(images[:10], "Generated images", tmp_path / "10.png")
    mine, theirs = (
        np.asarray(Image.open(path).convert("L").resize((500, 200))).astype(int)
        for path in (tmp_path / "10.png", ROOT / "outputs" / f"{name}_10.png")
    )
    assert abs(mine - theirs).mean() < 10


def test_cells_run_in_a_fresh_kernel(tmp_path):
    """As a notebook: pictures and progress bars in it, and the last cell runs the job."""
    notebook = jupytext.reads(SOURCE, fmt="py:percent")
    tiny = {"n_epochs": 1, "n_images": 300, "n_samples": 4, "sample_steps": 3}
    tiny |= {"frames_per_gif": 3, "out_dir": str(tmp_path)}
    place = next(i for i, cell in enumerate(notebook.cells) if "\nn_epochs = " in cell.source)
    lines = "\n".join(f"{name} = {value!r}" for name, value in tiny.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(lines))
    where = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    shown = [
        output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])
    ]
    assert sum("image/png" in data for data in shown) == 5
    assert sum("application/vnd.jupyter.widget-view+json" in data for data in shown) >= 3
    assert notebook.cells[-1].outputs and (tmp_path / "mnist.gif").exists()
    assert len(ddpm.load_model(tmp_path / "mnist.pt").info["losses"]) == 1
