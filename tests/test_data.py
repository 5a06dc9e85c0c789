"""Archives of images and labels, and batches of data sets of other kinds."""

import gzip
import shutil

import pytest
import torch
from conftest import ROOT, change_a_bit
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets import FakeData
from torchvision.transforms import Compose, Normalize, ToTensor

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


FAKES = FakeData(7, (3, 28, 28), transform=Compose([ToTensor(), Normalize(0.5, 0.5)]))


@pytest.mark.parametrize(
    "dataset", [FAKES, Subset(FAKES, range(1, 6)), ConcatDataset([FAKES, FAKES])]
)
def test_batches_of_other_data_sets(dataset):
    """They hold each image once."""
    parts = [x0 for x0, _ in ddpm.batches(dataset, 3)]
    assert len(parts) == -(-len(dataset) // 3)
    expected = torch.stack([image.sum() for image, _ in dataset]).sort().values
    found = torch.cat(parts).sum((1, 2, 3)).sort().values
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0)


def test_images_need_a_transform():
    with pytest.raises(ddpm.BadInput, match="transform"):
        ddpm.batches(FakeData(3, (3, 28, 28)), 3)
