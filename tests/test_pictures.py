"""Pictures and GIFs, opened again and counted."""

import math
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import ddpm

COUNTS = range(1, 18)


def greys(n):
    """-> n constant images (n, 1, 28, 28), clearly different, and their grey levels 0 to 255."""
    levels = np.linspace(15, 240, n).round().astype(int) if n > 1 else np.array([90])
    images = torch.from_numpy(levels / 127.5 - 1).float().reshape(n, 1, 1, 1).expand(n, 1, 28, 28)
    return images.contiguous(), levels.tolist()


def pixels(path):
    return np.asarray(Image.open(path).convert("L")).astype(int)


def as_uint8(images):
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def read_gif(path):
    """-> frames (k, h, w) of a GIF, and their durations in ms, by Pillow."""
    with Image.open(path) as gif:
        frames = [
            (np.asarray(f.convert("L")), f.info["duration"]) for f in ImageSequence.Iterator(gif)
        ]
    return np.stack([f for f, _ in frames]), [d for _, d in frames]


def assert_shows(frame, images):
    """The frame is a grid of exactly these images (uint8), row by row, black where images lack."""
    n, rows, columns = len(images), frame.shape[0] // 28, frame.shape[1] // 28
    assert frame.shape == (rows * 28, columns * 28)
    assert rows * columns >= n and (rows - 1) * columns < n
    assert rows <= columns <= 2 * n**0.5 + 1
    tiles = frame.reshape(rows, 28, columns, 28).transpose(0, 2, 1, 3).reshape(-1, 28, 28)
    np.testing.assert_array_equal(tiles[:n], images[:, 0].numpy())
    assert not tiles[n:].any()


@pytest.mark.parametrize("n", COUNTS)
def test_every_image_is_visible_in_the_picture(n, tmp_path):
    images, levels = greys(n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a constant image must not divide by zero
        ddpm.show_images(images, "Greys", tmp_path / "greys.png")
    assert [path.name for path in tmp_path.iterdir()] == ["greys.png"]
    picture = pixels(tmp_path / "greys.png")
    areas = [(abs(picture - level) <= 1).sum() for level in levels]
    # In a grid of at most two cells an image, each covers a good part of it, and all the same.
    assert min(areas) > 0.3 * picture.size / (2 * n), areas
    assert min(areas) > 0.8 * max(areas), areas
    assert plt.get_fignums() == []


def test_picture_has_the_fixed_grey_scale(tmp_path):
    """Middle grey stays middle grey next to nothing else; what is out of range is clipped."""
    for value, level in [(0, 128), (0.5, 191), (3, 255), (-3, 0)]:
        ddpm.show_images(torch.full((1, 1, 28, 28), float(value)), "", tmp_path / "a.png")
        picture = pixels(tmp_path / "a.png")
        middle = picture[picture.shape[0] // 2 - 50 :, picture.shape[1] // 2 - 50 :][:100, :100]
        assert abs(middle - level).max() <= 1


def test_no_images_are_refused(tmp_path):
    with pytest.raises(ddpm.BadInput):
        ddpm.show_images(torch.zeros(0, 1, 28, 28), "", tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_without_a_path_no_file_is_written(tmp_path, monkeypatch, knows):
    monkeypatch.chdir(tmp_path)
    images, _ = greys(3)
    ddpm.show_images(images.requires_grad_())
    ddpm.generate_new_images(knows(images.detach()), 3, gif_name=None, sample_steps=2)
    assert list(tmp_path.iterdir()) == [] and plt.get_fignums() == []


def test_first_batch_is_shown_whole(digits, tmp_path):
    images, levels = greys(10)
    ddpm.show_first_batch([[images, torch.arange(10)], None], tmp_path / "greys.png")
    picture = pixels(tmp_path / "greys.png")
    assert all((abs(picture - level) <= 1).sum() > 1000 for level in levels)
    ddpm.show_first_batch(ddpm.Batches(digits[:200], 128), tmp_path / "digits.png")
    assert Image.open(tmp_path / "digits.png").width > 500


def panels(path):
    """-> how much neighbouring pixels differ in each of the panels, which stand side by side."""
    picture = pixels(path)
    band = picture[picture.shape[0] // 2 - 60 :][:120]
    inside = np.concatenate([[0], (band.min(0) < 200).astype(int), [0]])
    starts, ends = np.flatnonzero(np.diff(inside) == 1), np.flatnonzero(np.diff(inside) == -1)
    assert np.ptp(ends - starts) <= 4 and min(ends - starts) > 100
    return [np.abs(np.diff(band[:, a:b], axis=1)).mean() for a, b in zip(starts, ends)]


@pytest.mark.parametrize("batch_size", [128, 5])
def test_forward_process_is_shown_in_five_panels(digits, knows, batch_size, tmp_path):
    torch.manual_seed(0)
    loader = ddpm.Batches(digits[:256], batch_size)
    ddpm.show_forward(knows(None), loader, path=tmp_path / "forward.png")
    assert plt.get_fignums() == []
    # Noise makes neighbours differ, the more the later; after 75 % there is hardly anything else.
    rough = panels(tmp_path / "forward.png")
    assert len(rough) == 5
    assert rough[0] < 0.9 * rough[1] and rough[1] < 0.95 * rough[2] and rough[2] < rough[4]


def test_forward_process_of_two_steps_is_shown_in_order(digits, knows, tmp_path):
    """A quarter of two steps is none or one, not the last."""
    torch.manual_seed(0)
    loader = ddpm.Batches(digits[:16], 16)
    ddpm.show_forward(knows(None, 2, 0.01, 0.9), loader, path=tmp_path / "forward.png")
    rough = panels(tmp_path / "forward.png")
    assert len(rough) == 5
    assert max(rough[:3]) < 0.8 * rough[4]


def test_loss_curve_is_written(tmp_path):
    ddpm.show_losses([0.5, 0.2, 0.1], tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").width > 500
    assert (pixels(tmp_path / "loss.png") < 200).sum() > 1000


@pytest.mark.parametrize("n", COUNTS)
def test_gif_goes_from_the_noise_to_the_images(n, knows, tmp_path):
    images, _ = greys(n)
    model = knows(images, 30, 1e-3, 0.3)
    path = tmp_path / "a.gif"
    x = ddpm.generate_new_images(model, n, None, 5, path, sample_steps=8)
    assert list(tmp_path.iterdir()) == [path]
    torch.testing.assert_close(x, images, rtol=0, atol=1e-4)
    frames, durations = read_gif(path)
    assert len(frames) == 5
    noise = model.network.seen[0]
    assert n > 1 or abs(noise.std() - 1) < 0.2
    assert_shows(frames[0], as_uint8(noise))
    assert_shows(frames[-1], as_uint8(x))
    # In between, steps of the chain in their order.
    steps = [as_uint8(seen)[0, 0].numpy() for seen in model.network.seen]
    order = [
        next(i for i, step in enumerate(steps) if np.array_equal(step, frame[:28, :28]))
        for frame in frames[:-1]
    ]
    assert order == sorted(set(order))
    # Milliseconds: it moves fast enough, and rests on its first and longer on its last frame.
    assert len(set(durations[1:-1])) == 1 and 20 <= durations[1] <= 200
    assert durations[0] > durations[1] and durations[-1] >= max(1000, durations[0])
    with Image.open(path) as gif:
        assert gif.info["loop"] == 0  # for ever


@pytest.mark.parametrize(
    "n_steps, sample_steps, frames_per_gif, expected",
    [
        (30, 3, 100, 4),  # fewer steps than frames: every step, and the noise
        (30, 1, 100, 2),
        (30, None, 31, 31),
        (30, None, 100, 31),
        (200, None, 10, 10),  # more steps than frames
        (200, 50, 2, 2),
    ],
)
def test_number_of_frames(n_steps, sample_steps, frames_per_gif, expected, knows, images, tmp_path):
    model = knows(images[:4], n_steps, 1e-3, 0.2)
    path = tmp_path / "a.gif"
    x = ddpm.generate_new_images(
        model, 4, frames_per_gif=frames_per_gif, gif_name=path, sample_steps=sample_steps
    )
    frames, durations = read_gif(path)
    assert len(frames) == len(durations) == expected
    assert_shows(frames[0], as_uint8(model.network.seen[0]))
    assert_shows(frames[-1], as_uint8(x))
    if expected > len(model.network.seen):
        for frame, seen in zip(frames, model.network.seen):
            assert_shows(frame, as_uint8(seen))


def test_gif_shows_the_first_hundred_of_many(knows, images, tmp_path):
    path = tmp_path / "a.gif"
    x = ddpm.generate_new_images(knows(images, 30), 130, gif_name=str(path), sample_steps=2)
    frames, _ = read_gif(path)
    assert x.shape == (130, 1, 28, 28) and math.prod(frames[0].shape) == 100 * 28 * 28
    assert_shows(frames[-1], as_uint8(x[:100]))
