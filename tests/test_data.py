"""The archives of images and labels."""

import gzip
import shutil

import pytest
from conftest import ROOT, change_a_bit

import ddpm


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """A copy of the archives of MNIST, out of reach of any network."""
    only_archives = shutil.ignore_patterns("*-ubyte")
    shutil.copytree(ROOT / "datasets" / "MNIST", tmp_path / "MNIST", ignore=only_archives)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # nobody listens there
    return tmp_path


def test_the_archives_are_read_in_place(data_dir):
    """Nothing is unpacked: the folder may be read-only, or that of another run."""
    before = sorted(data_dir.rglob("*"))
    assert len(ddpm.load_data(data_dir=data_dir)) == 60_000
    assert sorted(data_dir.rglob("*")) == before


HARM = {
    "missing": lambda path: path.unlink(),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one bit": change_a_bit,
    "empty": lambda path: path.write_bytes(gzip.compress(b"")),
    "labels": lambda path: shutil.copy(path.with_name("train-labels-idx1-ubyte.gz"), path),
    "other images": lambda path: shutil.copy(path.with_name("t10k-images-idx3-ubyte.gz"), path),
}


@pytest.mark.parametrize("harm", HARM)
def test_bad_archives(harm, data_dir):
    archive = data_dir / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    HARM[harm](archive)
    with pytest.raises(ddpm.BadInput, match=archive.name):
        ddpm.load_data(data_dir=data_dir)
