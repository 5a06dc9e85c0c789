"""The reverse process, driven by networks whose right result is known in closed form."""

import math
import random

import numpy as np
import pytest
import torch
from conftest import alpha_bars
from torch import nn

import ddpm

DEVIATION = 0.15
SIZE = {"h": 8, "w": 8}


class KnowsGaussian(nn.Module):
    """The ideal network for images from N(mean, DEVIATION^2 I): E[eta | x_t]; keeps x_T and some x_t.

    x_t is N(sqrt(a) mean, v) with v = a DEVIATION^2 + 1 - a, hence
    E[eta | x_t] = sqrt(1 - a) (x_t - sqrt(a) mean) / v.
    """

    def __init__(self, mean, n_steps):
        super().__init__()
        self.mean, self.alpha_bars, self.seen = mean, alpha_bars(n_steps), {}

    def forward(self, x, t):
        step = t.flatten()[0].item()
        a = self.alpha_bars[step].item()
        if step in (999, 700, 400, 100, 20, 2):
            self.seen[step] = x.clone()
        v = a * DEVIATION**2 + 1 - a
        return (1 - a) ** 0.5 / v * (x - a**0.5 * self.mean)


@pytest.fixture(scope="module")
def mean(images):
    """The middle of the mean digit, darker and brighter pixels: -0.14 to 0.03.

    The nearest wall of [-1, 1] is 5.7 deviations away: the clip never bites.
    """
    return 0.3 * images.mean(0)[:, 10:18, 10:18]


def variances_of_the_chain(variance):
    """-> {t: variance of x_t}, {-1: variance of the result}, for the ideal Gaussian network.

    Everything is linear, so variances follow from eq. 6 and 7 of Ho et al. step by step. They are
    not quite those of the data: a step with beta_t adds slightly too much noise (result: 1.012 of
    the data's variance), one with the posterior's variance ignores how uncertain x_0 is (0.951).
    """
    bars = alpha_bars().tolist()
    v = {999: 1.0}
    for t in range(999, 0, -1):
        a, a_next = bars[t], bars[t - 1]
        beta = 1 - a / a_next
        estimate = a**0.5 * DEVIATION**2 / (a * DEVIATION**2 + 1 - a)
        slope = (a_next**0.5 * beta * estimate + (a / a_next) ** 0.5 * (1 - a_next)) / (1 - a)
        added = beta if variance == 1 else (1 - a_next) / (1 - a) * beta
        v[t - 1] = slope**2 * v[t] + added
    a = bars[0]
    v[-1] = (a**0.5 * DEVIATION**2 / (a * DEVIATION**2 + 1 - a)) ** 2 * v[0]
    return v


@pytest.mark.parametrize("variance", [1, 2])
def test_whole_chain_gives_the_gaussian_back(mean, variance, monkeypatch):
    n = 1500
    monkeypatch.setattr(ddpm, "CHUNK", n)
    m = ddpm.MyDDPM(KnowsGaussian(mean, 1000))
    x = ddpm.generate_new_images(m, n, gif_name=None, variance=variance, **SIZE)
    expected = variances_of_the_chain(variance)
    assert abs(expected[-1] / DEVIATION**2 - 1) < 0.05
    numbers = n * mean.numel()
    for t, seen in {**m.network.seen, -1: x}.items():
        root_a = 1 if t == -1 else alpha_bars()[t].item() ** 0.5
        error = seen - root_a * mean
        # The chain starts at mean 0, not sqrt(a_T) mean: off by 0.0064 * 0.1 at the very start.
        standard_error = (expected[t] / numbers) ** 0.5
        assert abs(error.mean()) < 5 * standard_error + 7e-4, t
        assert abs(error.var() / expected[t] - 1) < 5 * (2 / numbers) ** 0.5, t
        # Each pixel for itself: the largest of 64 normal deviations passes 5 in 1 of 27,000 runs.
        assert error.mean(0).abs().max() < 5 * (expected[t] / n) ** 0.5 + 9e-4, t


# What remains is the error of few steps: with 20 the variance is 1.23 of the data's, with 50 it is
# 1.03, with 200 and 500 1.01 and 1.00. Without extrapolation 50 steps make 0.81 of it.
@pytest.mark.parametrize("sample_steps, tolerance", [(20, 0.27), (50, 0.05), (200, 0.02)])
@pytest.mark.parametrize("variance", [1, 2])
def test_fast_sampler_gives_the_gaussian_back(mean, sample_steps, tolerance, variance, monkeypatch):
    n = 1500
    monkeypatch.setattr(ddpm, "CHUNK", n)
    m = ddpm.MyDDPM(KnowsGaussian(mean, 1000))
    how = {"sample_steps": sample_steps, "variance": variance, "gif_name": None}
    error = ddpm.generate_new_images(m, n, **how, **SIZE) - mean
    assert abs(error.mean()) < 5 * DEVIATION / error.numel() ** 0.5 + 5e-4
    assert abs(error.var() / DEVIATION**2 - 1) < tolerance


@pytest.mark.parametrize("sample_steps", [1, 2, 5, 49, None])
def test_known_images_come_back(images, knows, sample_steps):
    m = knows(images[:9], 50, 1e-3, 0.3)
    x = ddpm.generate_new_images(m, 9, gif_name=None, sample_steps=sample_steps)
    torch.testing.assert_close(x, images[:9], rtol=0, atol=1e-4)
    assert len(m.network.seen) == (sample_steps or 50)


@pytest.mark.parametrize("sample_steps", [1, 3, 10, None])
def test_images_stay_in_the_range_whatever_the_network_says(sample_steps):
    class Wild(nn.Module):
        def forward(self, x, t):
            return 5 * x.flip(0) + 3

    m = ddpm.MyDDPM(Wild(), 40)
    x = ddpm.generate_new_images(m, 8, gif_name=None, sample_steps=sample_steps, **SIZE)
    assert x.shape == (8, 1, 8, 8)
    assert x.min() >= -1 and x.max() <= 1


@pytest.mark.parametrize("sample_steps", [4, None])
def test_same_seed_same_images_other_seed_others(mean, sample_steps):
    m = ddpm.MyDDPM(KnowsGaussian(mean, 30), 30)

    def draw(seed):
        torch.manual_seed(random.randrange(2**32))  # the images may not depend on this
        settings = {"gif_name": None, "sample_steps": sample_steps, "seed": seed}
        return ddpm.generate_new_images(m, 6, **settings, **SIZE)

    assert torch.equal(draw(5), draw(5))
    # The mean difference of independent numbers is 1.13 deviations.
    assert (draw(5) - draw(6)).abs().mean() > 0.5 * draw(5).std()


def test_global_randomness_is_left_alone(mean, tmp_path):
    m = ddpm.MyDDPM(KnowsGaussian(mean, 30), 30)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    ddpm.generate_new_images(m, 3, gif_name=tmp_path / "a.gif", **SIZE)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


@pytest.mark.parametrize("n", [1, 3, 4, 5, 11])
def test_any_number_of_images_in_chunks(mean, n, monkeypatch):
    monkeypatch.setattr(ddpm, "CHUNK", 4)
    m = ddpm.MyDDPM(KnowsGaussian(mean, 30), 30)
    x = ddpm.generate_new_images(m, n, gif_name=None, sample_steps=5, **SIZE)
    assert x.shape == (n, 1, 8, 8) and x.isfinite().all()
    assert len(x.unique(dim=0)) == n
    # No image is like another, so no chunk repeats the noise of the one before.
    assert n == 1 or torch.pdist(x.flatten(1)).min() > DEVIATION * math.sqrt(64) / 2


def test_network_is_asked_without_gradients_and_in_chunks(mean, monkeypatch):
    monkeypatch.setattr(ddpm, "CHUNK", 4)
    calls = []

    class Counts(KnowsGaussian):
        def forward(self, x, t):
            calls.append((len(x), tuple(t.shape)[:1], torch.is_grad_enabled()))
            return super().forward(x, t)

    ddpm.generate_new_images(
        ddpm.MyDDPM(Counts(mean, 30), 30), 6, gif_name=None, sample_steps=3, **SIZE
    )
    assert calls == [(4, (4,), False)] * 3 + [(2, (2,), False)] * 3


def test_trained_network_draws_in_the_range(trained):
    m, _, _ = trained
    x = ddpm.generate_new_images(m, 4, gif_name=None, sample_steps=10)
    assert x.shape == (4, 1, 28, 28) and x.min() >= -1 and x.max() <= 1
    # Even after two short epochs: much more black than in noise, and not black only.
    assert 0.3 < (x < -0.5).float().mean() < 0.99


@pytest.mark.parametrize(
    "bad",
    [
        {"n_samples": 0},
        {"n_samples": -3},
        {"sample_steps": -1},
        {"sample_steps": 0},
        {"sample_steps": 31},
        {"guidance": 0.9},
    ],
)
def test_bad_numbers_are_refused(mean, tmp_path, bad):
    m = ddpm.MyDDPM(KnowsGaussian(mean, 30), 30)
    with pytest.raises(ddpm.BadInput):
        ddpm.generate_new_images(m, **{"n_samples": 2, **bad}, gif_name=tmp_path / "a.gif", **SIZE)
    assert list(tmp_path.iterdir()) == []
