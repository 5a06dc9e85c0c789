"""Grids, figures and GIFs: any number of images, one fixed grey scale, first and last frame."""

import itertools

import numpy as np
import pytest
import torch
from conftest import frames_of, grid_of
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import ddpm


@pytest.mark.parametrize("n", [*range(1, 18), 100])
def test_every_image_is_in_the_grid(n, images):
    grid = ddpm.tile(images[:n])
    assert grid.shape == (28 * -(-n // 10), 28 * min(n, 10))
    for i in range(n):
        row, column = 28 * (i // 10), 28 * (i % 10)
        expected = ((images[i, 0] + 1) * 127.5).round()
        np.testing.assert_array_equal(grid[row : row + 28, column : column + 28], expected)


def test_the_grey_scale_is_fixed():
    """-1 is black and 1 is white, and what lies beyond is clipped."""
    levels = torch.tensor([-9.0, -1, 0, 1, 9]).view(5, 1, 1, 1).expand(5, 1, 4, 4)
    assert ddpm.tile(levels)[0, ::4].tolist() == [0, 0, 128, 255, 255]


def test_colours():
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert ddpm.tile(red).shape == (4, 8, 3)
    assert ddpm.tile(red[:, :2]).shape == ddpm.tile(red.repeat(1, 2, 1, 1)).shape == (4, 8)
    assert ddpm.tile(red)[0, 0].tolist() == [255, 0, 0]


def test_no_image(images):
    with pytest.raises(ddpm.BadInput, match="no image"):
        ddpm.show_images(images[:0])


@pytest.mark.parametrize("steps, frames, expected", [(None, 30, 30), (20, 9, 9), (3, 60, 4)])
def test_gif(steps, frames, expected, tmp_path):
    model = ddpm.MyDDPM(ddpm.MyUNet(50), 50, 1e-3, 0.3)
    how = {"frames_per_gif": frames, "gif_name": tmp_path / "a.gif", "sample_steps": steps}
    images = ddpm.generate_new_images(model, 12, SEED=7, **how)
    shown, durations = zip(*frames_of(tmp_path / "a.gif"), strict=True)
    assert len(shown) == expected and {frame.shape for frame in shown} == {(56, 280)}
    np.testing.assert_array_equal(shown[-1], ddpm.tile(images))
    noise = torch.randn(12, 1, 28, 28, generator=torch.Generator().manual_seed(7))
    assert np.abs(shown[0].astype(int) - ddpm.tile(noise)).max() < 16
    assert all((a != b).any() for a, b in itertools.pairwise(shown))
    first, second, *_, last = durations
    assert last >= 2000 and first > second >= 20


@pytest.mark.parametrize("n", [1, 7, 23])
def test_a_figure_shows_the_images(n, images, tmp_path, monkeypatch):
    """Each of them; into the file without a window, and in a window if there is no file."""
    windows, images = [], images / 2
    monkeypatch.setattr(ddpm.plt, "show", lambda: windows.append(1))
    ddpm.show_images(images[:n].numpy(), "some", tmp_path / "a.png")
    assert windows == []
    expected = ddpm.tile(images[:n], gap=1)
    np.testing.assert_allclose(grid_of(tmp_path / "a.png", expected.shape), expected, atol=1)
    ddpm.show_images(images[:n])
    assert windows == [1] and ddpm.plt.get_fignums() == []


@pytest.mark.parametrize("labelled", [True, False])
def test_figures_of_a_loader(labelled, images, tmp_path):
    """The first batch; and three of its images, each in a column, as they drown."""
    x0 = images[:3]
    loader = DataLoader(TensorDataset(x0, torch.zeros(3)) if labelled else x0, 3)
    ddpm.show_first_batch(loader, tmp_path / "a.png")
    expected = ddpm.tile(x0, gap=1)
    np.testing.assert_allclose(grid_of(tmp_path / "a.png", expected.shape), expected, atol=1)
    torch.manual_seed(0)
    ddpm.show_forward(ddpm.MyDDPM(torch.nn.Identity()), loader, path=tmp_path / "b.png")
    grid = grid_of(tmp_path / "b.png", (5 * 29, 3 * 29))
    cells = grid.reshape(5, 29, 3, 29)[:, :28, :, :28].transpose(0, 2, 1, 3).reshape(15, 784)
    likeness = np.corrcoef(cells)[3:, :3].reshape(4, 3, 3)
    assert all((row.argmax(1) == range(3)).all() for row in likeness[:2])
    strength = np.abs(likeness).max((1, 2))
    assert strength[0] > 0.5 > strength[1] > 0.2 > strength[3]


def test_the_curve_falls_with_the_losses(tmp_path):
    ddpm.show_losses([0.9, 0.5, 0.1], tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        red, _, blue = np.array(picture.convert("RGB")).astype(int).transpose(2, 0, 1)
    rows, columns = np.nonzero(blue - red > 50)
    assert np.corrcoef(rows, columns)[0, 1] > 0.9


def test_no_figure_stays_open_if_its_file_cannot_be_written(images, tmp_path):
    with pytest.raises(OSError):
        ddpm.show_images(images[:1], path=tmp_path / "missing" / "a.png")
    assert ddpm.plt.get_fignums() == []
