"""The schedule, the forward process, the prediction of the noise and the embeddings."""

import numpy as np
import pytest
import torch
from torch import nn

import ddpm


class Returns(nn.Module):
    """A network of (x, t) that knows no labels: it returns x times t."""

    def forward(self, x, t):
        return x * t.reshape(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def unet():
    """MyDDPM around MyUNet whose last layer, zero at first, is random."""
    torch.manual_seed(0)
    model = ddpm.MyDDPM(ddpm.MyUNet())
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("n_steps, low, high", [(1000, 1e-4, 0.02), (200, 1e-3, 0.1)])
def test_schedule(n_steps, low, high):
    model = ddpm.MyDDPM(Returns(), n_steps, low, high)
    betas = np.linspace(low, high, n_steps)
    np.testing.assert_allclose(model.betas, betas, rtol=1e-6)
    np.testing.assert_allclose(model.alphas, 1 - betas, rtol=1e-6)
    np.testing.assert_allclose(model.alpha_bars, np.cumprod(1 - betas), rtol=1e-6)
    assert {"betas", "alphas", "alpha_bars"} <= model.state_dict().keys()


@pytest.mark.parametrize(
    "schedule", [(1, 1e-4, 0.02), (9, 0, 0.1), (9, 0.2, 0.1), (9, 0.1, 1), (5000, 0.1, 0.2)]
)
def test_impossible_schedules_are_refused(schedule):
    with pytest.raises(ddpm.BadInput):
        ddpm.MyDDPM(Returns(), *schedule)


def test_forward_is_the_closed_form(images):
    model = ddpm.MyDDPM(Returns())
    t, eta = torch.arange(100) * 10, torch.randn(images.shape)
    bars = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[t].view(-1, 1, 1, 1)
    expected = bars.sqrt() * images + (1 - bars).sqrt() * eta
    torch.testing.assert_close(model(images, t, eta).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(images, t.tolist(), eta), model(images, t, eta))


def test_forward_draws_standard_normal_noise(images):
    """At the last step next to nothing of the image is left."""
    noisy = ddpm.MyDDPM(Returns())(images, [999] * 100)
    assert abs(noisy.mean()) < 0.02 and abs(noisy.std() - 1) < 0.02


def test_steps_of_the_forward_process_add_up(images):
    """One jump to t has the mean and variance of t + 1 single steps, q(x_t | x_{t-1}) each."""
    model = ddpm.MyDDPM(Returns(), 100, 1e-3, 0.05)
    x = images
    for beta in model.betas:
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(x.shape)
    jump = model(images, [99] * 100)
    assert abs((x * images).mean() - (jump * images).mean()) < 0.02
    assert abs(x.std() - jump.std()) < 0.02


def test_a_plain_network_predicts_the_noise(images):
    model, t = ddpm.MyDDPM(Returns()), torch.arange(100)
    expected = images * t.view(-1, 1, 1, 1)
    assert torch.equal(model.backward(images, t), expected)
    assert torch.equal(model.backward(images, t[:, None]), expected)
    labels = torch.zeros(100, dtype=torch.long)
    assert torch.equal(model.backward(images, t, labels, guidance=3), expected)


def test_v_becomes_noise(images):
    """v = sqrt(alpha_bar) eta - sqrt(1 - alpha_bar) x0: a network that knows v leads to eta."""
    t, eta = torch.arange(100) * 10, torch.randn(images.shape)
    network = Returns()
    model = ddpm.MyDDPM(network)
    bars = model.alpha_bars[t].view(-1, 1, 1, 1)
    network.forward = lambda x, t: bars.sqrt() * eta - (1 - bars).sqrt() * images
    network.predicts_v = True
    found = model.backward(model(images, t, eta), t)
    torch.testing.assert_close(found, eta, atol=1e-4, rtol=1e-4)


def test_guidance(unet, images):
    """0 is without a label, 1 with it, and the rest lies on the line through both."""
    t, label = torch.arange(100) * 10, torch.arange(100) % 10
    with torch.autocast("cpu", enabled=False):
        without, with_label = unet.backward(images, t), unet.backward(images, t, label)
        assert (without - with_label).abs().max() > 0.01
        none = torch.full_like(label, unet.n_classes)
        torch.testing.assert_close(unet.backward(images, t, none), without)
        for g in (0, 1, 1.5):
            expected = without + g * (with_label - without)
            found = unet.backward(images, t, label, guidance=g)
            torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    assert torch.equal(unet.backward(images, t, label, guidance=1), with_label)


def test_the_unet_is_told_step_and_label(unet, images):
    x = images[:1].expand(10, -1, -1, -1)
    same, each = torch.full((10,), 3), torch.arange(10)
    for t, label in ((each * 100, same), (same * 100, each)):
        outputs = unet.backward(x, t, label)
        assert all((outputs[i] - outputs[0]).abs().max() > 1e-3 for i in range(1, 10))


def test_the_unet_takes_other_images():
    network = ddpm.MyUNet(100, 32, n_classes=3, image_channels=3)
    out = network(torch.randn(2, 3, 32, 16), torch.tensor([[0], [99]]), torch.tensor([2, 3]))
    assert out.shape == (2, 3, 32, 16)


@pytest.mark.parametrize("n, d", [(1000, 128), (50, 7), (1, 1)])
def test_sinusoidal_embedding(n, d):
    t, i = np.arange(n)[:, None], np.arange(d)[None, :]
    angle = t / 10_000 ** ((i - i % 2) / d)
    expected = np.where(i % 2 == 0, np.sin(angle), np.cos(angle))
    np.testing.assert_allclose(ddpm.sinusoidal_embedding(n, d), expected, atol=1e-6)
