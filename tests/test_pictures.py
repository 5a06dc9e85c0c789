"""Grids, figures and GIFs: any number of images, one fixed grey scale, first and last frame."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import ddpm


def frames_of(path):
    with Image.open(path) as gif:
        return [np.array(frame.convert("L")) for frame in ImageSequence.Iterator(gif)]


def durations_of(path):
    with Image.open(path) as gif:
        return [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 10, 11, 13, 14, 17, 100])
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
    assert ddpm.tile(red)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("steps, frames, expected", [(0, 30, 30), (20, 9, 9), (3, 60, 4)])
def test_gif(steps, frames, expected, tmp_path):
    path = tmp_path / "a.gif"
    model = ddpm.MyDDPM(ddpm.MyUNet(50), 50, 1e-3, 0.3)
    drawn = ddpm.generate_new_images(
        model, 12, frames_per_gif=frames, gif_name=path, sample_steps=steps
    )
    found = frames_of(path)
    assert len(found) == expected and {frame.shape for frame in found} == {(56, 280)}
    np.testing.assert_array_equal(found[-1], ddpm.tile(drawn))
    noise = torch.randn(12, 1, 28, 28, generator=torch.Generator().manual_seed(ddpm.SEED))
    assert np.abs(found[0].astype(int) - ddpm.tile(noise)).max() < 16
    assert all((a != b).any() for a, b in itertools.pairwise(found))
    durations = durations_of(path)
    assert durations[-1] >= 2000 and durations[0] > durations[1] >= 20
    with Image.open(path) as gif:
        assert gif.info["loop"] == 0


def test_figures_are_files(images, tmp_path):
    loader = ddpm.batches(torch.utils.data.TensorDataset(images, torch.zeros(100)), 16)
    model = ddpm.MyDDPM(torch.nn.Identity())
    ddpm.show_images(images[:7].numpy(), "seven", tmp_path / "a.png")
    ddpm.show_first_batch(loader, tmp_path / "b.png")
    ddpm.show_forward(model, loader, path=tmp_path / "c.png")
    ddpm.show_losses([0.3, 0.2], tmp_path / "d.png")
    for name in "abcd":
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert np.array(picture.convert("L")).std() > 10
    assert ddpm.plt.get_fignums() == []


def test_figures_without_a_path(images):
    ddpm.show_images(images[:3])
    assert ddpm.plt.get_fignums() == []
