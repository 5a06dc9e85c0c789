"""The schedule, the forward process, one reverse step, the embedding, the network's shapes."""

import math

import numpy as np
import pytest
import torch
from conftest import alpha_bars
from torch import nn

import ddpm

SCHEDULES = [(1000, 1e-4, 0.02), (2, 0.1, 0.9), (37, 1e-3, 0.3)]


def model(*schedule):
    return ddpm.MyDDPM(nn.Identity(), *schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_is_the_linear_one(schedule):
    n_steps, min_beta, max_beta = schedule
    m = model(*schedule)
    betas = np.linspace(min_beta, max_beta, n_steps)
    assert m.n_steps == n_steps and m.betas.shape == (n_steps,)
    assert m.betas[0] == np.float32(min_beta) and m.betas[-1] == np.float32(max_beta)
    # float32 keeps 24 bits: 6e-8 relative; a float32 product of 1000 factors would be off by more.
    np.testing.assert_allclose(m.betas.double(), betas, rtol=1e-7)
    np.testing.assert_allclose(m.alphas.double(), 1 - betas, rtol=1e-7)
    np.testing.assert_allclose(m.alpha_bars.double(), np.cumprod(1 - betas), rtol=1e-7)


def test_default_schedule_is_that_of_the_paper():
    m = ddpm.MyDDPM(nn.Identity())
    assert torch.equal(m.alpha_bars, alpha_bars(1000, 1e-4, 0.02).float())
    assert m.image_chw == (1, 28, 28)


@pytest.mark.parametrize(
    "bad",
    [
        (1, 1e-4, 0.02),
        (0, 1e-4, 0.02),
        (1000, 0, 0.02),
        (1000, -0.1, 0.02),
        (1000, 0.02, 0.02),
        (1000, 0.02, 1e-4),
        (1000, 1e-4, 1),
        (1000, math.nan, 0.02),
        (1000, 1e-4, math.nan),
    ],
)
def test_impossible_schedule_is_refused(bad):
    with pytest.raises(ddpm.BadInput):
        model(*bad)


def test_schedule_moves_and_is_saved_with_the_model():
    m = model(37, 1e-3, 0.3)
    names = {"betas", "alphas", "alpha_bars"}
    assert names <= set(m.state_dict())
    other = model(37, 1e-4, 0.1)
    other.load_state_dict(m.state_dict())
    assert all(torch.equal(getattr(m, name), getattr(other, name)) for name in names)
    m.to("meta")
    assert {getattr(m, name).device.type for name in names} == {"meta"}
    assert ddpm.MyDDPM(nn.Identity(), device="meta").alpha_bars.device.type == "meta"


def test_forward_with_given_noise_is_the_closed_form(images):
    torch.manual_seed(0)
    x0, eta = images[:64], torch.randn(64, 1, 28, 28)
    t = torch.randint(0, 1000, (64,))
    t[:2] = torch.tensor([0, 999])
    a = alpha_bars()[t].reshape(-1, 1, 1, 1)
    expected = a.sqrt() * x0 + (1 - a).sqrt() * eta
    noisy = model()(x0, t, eta)
    assert noisy.shape == x0.shape and noisy.dtype == torch.float32
    # At t = 0, 1 - alpha_bar = 1e-4 has lost 3 of 7 digits in float32, its root 0.01 half as many.
    torch.testing.assert_close(noisy.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(model()(x0, t.tolist(), eta), noisy)


@pytest.mark.parametrize("t", [0, 250, 999])
def test_forward_draws_standard_normal_noise(images, t):
    torch.manual_seed(0)
    a = alpha_bars()[t]
    noisy = model()(images, torch.full((len(images),), t))
    assert_standard_normal((noisy - a.sqrt() * images) / (1 - a).sqrt(), images)
    assert not torch.equal(noisy, model()(images, torch.full((len(images),), t)))


def test_single_steps_in_a_row_are_distributed_like_the_jump(images):
    torch.manual_seed(0)
    m = model(60, 1e-3, 0.1)
    x = images
    for t in range(60):  # eq. 2 of Ho et al.
        x = m.alphas[t].sqrt() * x + m.betas[t].sqrt() * torch.randn_like(x)
        if t in (0, 19, 59):
            at = torch.full((len(images),), t)
            mean = m(images, at, torch.zeros_like(images))
            deviation = m(torch.zeros_like(images), at, torch.ones_like(images))
            assert_standard_normal((x - mean) / deviation, images)


def assert_standard_normal(z, images):
    """Mean, variance, independence of neighbours and of the image, each to 5 standard errors."""
    n = z.numel()
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    for axis in (0, 2, 3):
        assert abs((z * z.roll(1, axis)).mean()) < 5 / n**0.5
    # Per unit of image contrast; float32 in the subtraction above adds at most 1e-7 / sigma.
    slope = (z * images).sum() / images.square().sum()
    assert abs(slope) < 5 / images.square().sum() ** 0.5 + 1e-4


# Images in the range, and images too bright, whose estimate has to be clipped to [-1, 1].
@pytest.mark.parametrize("contrast", [1, 2])
@pytest.mark.parametrize("variance", [1, 2])
def test_every_reverse_step_is_the_posterior(images, knows, variance, contrast):
    n_steps, min_beta, max_beta = schedule = 12, 0.02, 0.4
    x0 = images[:10] * contrast
    betas = np.linspace(min_beta, max_beta, n_steps)
    bars = np.cumprod(1 - betas)
    # No noise is drawn but that of the steps, so a generator with the same seed gives it again.
    generator, same = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    x_T = torch.randn(x0.shape, generator=torch.Generator().manual_seed(4))
    chain = ddpm.reverse_process(knows(x0, *schedule), x_T, n_steps, 1, variance, generator)
    x = next(chain)
    assert torch.equal(x, x_T)
    for t in range(n_steps - 1, 0, -1):
        b, a, a_next = betas[t], bars[t], bars[t - 1]
        from_x0 = (
            a_next**0.5 * b * x0.double().clamp(-1, 1) + (1 - b) ** 0.5 * (1 - a_next) * x
        ) / (1 - a)  # eq. 7
        eta = (x - a**0.5 * x0.double()) / (1 - a) ** 0.5
        from_eta = (x - b / (1 - a) ** 0.5 * eta) / (1 - b) ** 0.5  # eq. 11
        if contrast == 1:
            torch.testing.assert_close(from_x0, from_eta)
        sigma2 = b if variance == 1 else (1 - a_next) / (1 - a) * b
        x = next(chain)
        z = torch.randn(x0.shape, generator=same)
        torch.testing.assert_close(x.double(), from_x0 + sigma2**0.5 * z, rtol=0, atol=5e-6)
    torch.testing.assert_close(next(chain), x0.clamp(-1, 1), rtol=0, atol=5e-6)
    assert next(chain, None) is None


@pytest.mark.parametrize("d", [1, 2, 3, 7, 100, 128])
def test_embedding_is_its_definition(d):
    n = 1000
    embedding = ddpm.sinusoidal_embedding(n, d)
    assert embedding.shape == (n, d)
    for t in (0, 1, 2, 500, 999):
        for k in range(d):
            angle = t / 10_000 ** (k // 2 * 2 / d)
            expected = math.cos(angle) if k % 2 else math.sin(angle)
            assert embedding[t, k].item() == pytest.approx(expected, abs=1e-6)


def test_embedding_tells_all_steps_apart():
    embedding = ddpm.sinusoidal_embedding(1000, 128)
    distance = torch.cdist(embedding, embedding) + 10 * torch.eye(1000)
    assert distance.min() > 0.5


@pytest.mark.parametrize("n", [1, 2, 7])
def test_network_keeps_the_shape_for_both_shapes_of_t(n):
    torch.manual_seed(0)
    x, t = torch.randn(n, 1, 28, 28), torch.randint(0, 50, (n,))
    m = ddpm.MyDDPM(ddpm.MyUNet(50, 32), 50).eval()
    with torch.no_grad():
        flat, column = m.backward(x, t), m.backward(x, t.reshape(n, 1))
    assert flat.shape == column.shape == x.shape and flat.dtype == torch.float32
    assert flat.isfinite().all() and torch.equal(flat, column)


@torch.no_grad()
def test_network_hears_the_step_of_each_image(trained, images):
    m, _, _ = trained
    x = torch.cat([images[:1]] * 3 + [images[1:2]])
    t = torch.tensor([0, 0, 999, 0])
    out = m.backward(x, t)
    # Low precision rounds to 3 digits, differently for other batch sizes; outputs are about 1.
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=0.05)
    for i in range(4):
        torch.testing.assert_close(
            m.backward(x[i : i + 1], t[i : i + 1])[0], out[i], rtol=0, atol=0.05
        )
    assert (out[0] - out[2]).abs().mean() > 0.1 and (out[0] - out[3]).abs().mean() > 0.03


class Scales(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x, t):
        return self.factor * x


@pytest.mark.parametrize("guidance, factor", [(1, 5.0), (1.5, 6.0), (2, 7.0), (4, 11.0)])
def test_guidance_goes_on_from_the_early_guess_through_the_last(images, guidance, factor):
    m, x, t = ddpm.MyDDPM(Scales(5.0)), images[:3], torch.zeros(3).long()
    assert torch.equal(m.backward(x, t, guidance), 5 * x)  # no early weights are known
    m.early = Scales(3.0)
    torch.testing.assert_close(m.backward(x, t, guidance), factor * x)
    other = ddpm.MyDDPM(Scales(0.0))
    other.load_state_dict(m.state_dict())
    torch.testing.assert_close(other.backward(x, t, guidance), factor * x)


@pytest.mark.parametrize("steps", [10, 1000])
def test_guidance_leaves_the_start_alone(images, steps):
    """Above 0.6 T the early network is not asked, below it is, with the step and x of the last."""

    class Notes(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = {}

        def forward(self, x, t):
            self.seen[t[0].item()] = x
            return 0.1 * x

    m = ddpm.MyDDPM(Notes())
    m.early = Notes()
    list(ddpm.reverse_process(m, images[:2], steps, 2, 2, None))
    last, early = m.network.seen, m.early.seen
    assert len(last) == steps and set(early) == {t for t in last if t < 600}
    assert all(torch.equal(last[t], early[t]) for t in early)
    early.clear()
    list(ddpm.reverse_process(m, images[:2], steps, 1, 2, None))
    assert not early
