"""The schedule, the forward process, the prediction of the noise, the embedding and the network."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ddpm

STEPS = torch.arange(100) * 10
LABELS = torch.arange(100) % 10


class Product(nn.Module):
    """A network of (x, t) that knows no labels: it returns x times t."""

    def forward(self, x, t):
        return x * t.reshape(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def unet():
    """MyDDPM around MyUNet with all weights random, those too that are zero at first."""
    torch.manual_seed(0)
    model = ddpm.MyDDPM(ddpm.MyUNet())
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    model.mixed_precision = False
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("n_steps, low, high", [(1000, 1e-4, 0.02), (2, 0.5, 0.999)])
def test_schedule(n_steps, low, high):
    with warnings.catch_warnings(action="error"):
        model = ddpm.MyDDPM(Product(), n_steps, low, high)
    betas = np.linspace(low, high, n_steps)
    np.testing.assert_allclose(model.betas, betas, rtol=1e-6)
    np.testing.assert_allclose(model.alphas, 1 - betas, rtol=1e-6)
    np.testing.assert_allclose(model.alpha_bars, np.cumprod(1 - betas), rtol=1e-6)
    assert {"betas", "alphas", "alpha_bars"} <= model.state_dict().keys()
    assert ddpm.MyDDPM(nn.Linear(1, 1), device="meta").device.type == "meta"


@pytest.mark.parametrize(
    "n_steps, low, high",
    [(1, 0.1, 0.9), (9, 0, 0.9), (9, 0.9, 0.8), (9, 0.1, 1), (99, 0.5, 0.9), (101, 1e-3, 0.2)],
)
def test_impossible_schedules_are_refused(n_steps, low, high):
    """The last of them has more steps than the network knows."""
    with pytest.raises(ddpm.BadInput, match="schedule|n_steps"):
        ddpm.MyDDPM(ddpm.MyUNet(100), n_steps, low, high)


@pytest.mark.parametrize("n_steps, left", [(100, "60%"), (250, "28%")])
def test_a_schedule_that_leaves_some_of_the_image_warns(n_steps, left):
    with pytest.warns(UserWarning, match=left):
        ddpm.MyDDPM(ddpm.MyUNet(250), n_steps)


def test_forward_is_the_closed_form(images):
    """The noise is standard normal: at the last step next to nothing else is left."""
    model, eta = ddpm.MyDDPM(Product()), torch.randn(images.shape)
    bars = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[STEPS].view(-1, 1, 1, 1)
    expected = bars.sqrt() * images + (1 - bars).sqrt() * eta
    torch.testing.assert_close(model(images, STEPS, eta).double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(images, STEPS.tolist(), eta), model(images, STEPS, eta))
    noisy = model(images, 999)
    assert abs(noisy.mean()) < 0.02 and abs(noisy.std() - 1) < 0.02


@pytest.mark.parametrize("t", [-1, 1000, [5] * 99 + [1000]])
def test_steps_outside_of_the_schedule_are_refused(t, images):
    model = ddpm.MyDDPM(Product())
    for process in (model.forward, model.backward):
        with pytest.raises(ddpm.BadInput, match="0 to 999"):
            process(images, t)


def test_a_plain_network_predicts_the_noise(images):
    model = ddpm.MyDDPM(Product())
    expected = images * STEPS.view(-1, 1, 1, 1)
    assert torch.equal(model.backward(images, STEPS), expected)
    assert torch.equal(model.backward(images, STEPS[:, None], LABELS), expected)
    assert torch.equal(model.backward(images, 7), images * 7)


def test_v_becomes_noise(images):
    """v = sqrt(alpha_bar) eta - sqrt(1 - alpha_bar) x0: a network that knows v leads to eta."""
    network, eta = Product(), torch.randn(images.shape)
    network.predicts_v = True
    model = ddpm.MyDDPM(network)
    bars = model.alpha_bars[STEPS].view(-1, 1, 1, 1)
    network.forward = lambda x, t: bars.sqrt() * eta - (1 - bars).sqrt() * images
    found = model.backward(model(images, STEPS, eta), STEPS)
    torch.testing.assert_close(found, eta, atol=1e-4, rtol=1e-4)


def test_bf16_agrees_with_fp32(unet, images, monkeypatch):
    """It is used where the hardware has it, unless mixed_precision is switched off."""
    inputs = images[::5], STEPS[::5], LABELS[::5]
    exact = unet.backward(*inputs)
    monkeypatch.setattr(unet, "mixed_precision", True)
    monkeypatch.setattr(ddpm, "multiplies_bf16", lambda device: False)
    assert torch.equal(unet.backward(*inputs), exact)
    monkeypatch.setattr(ddpm, "multiplies_bf16", lambda device: True)
    rounded = unet.backward(*inputs)
    assert exact.dtype == rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("n, d", [(1000, 128), (50, 7), (1, 1)])
def test_sinusoidal_embedding(n, d):
    t, i = np.arange(n)[:, None], np.arange(d)[None, :]
    angle = t / 10_000 ** ((i - i % 2) / d)
    expected = np.where(i % 2 == 0, np.sin(angle), np.cos(angle))
    np.testing.assert_allclose(ddpm.sinusoidal_embedding(n, d), expected, atol=1e-6)


def test_a_block_adds_to_its_input(images):
    """At first nothing; later what doesn't depend on brightness and contrast of its input."""
    block, emb = ddpm.Block(4, 5).requires_grad_(False), torch.randn(100, 5)
    x = images.reshape(100, 4, 14, 14)
    assert torch.equal(block(x, emb), x)
    nn.init.normal_(block.conv2.weight)
    added = block(x, emb) - x
    torch.testing.assert_close(block(3 * x + 1, emb) - (3 * x + 1), added, atol=1e-3, rtol=1e-3)
    assert (block(x, -emb) - x - added).abs().mean() > 0.1


def test_a_fresh_unet_takes_x_for_the_noise(images):
    """Its v is 0, which is right where x is nearly all noise."""
    model = ddpm.MyDDPM(ddpm.MyUNet()).requires_grad_(False)
    expected = (1 - model.alpha_bars[STEPS]).sqrt().view(-1, 1, 1, 1) * images
    torch.testing.assert_close(model.backward(images, STEPS, LABELS), expected)


def test_the_unet_is_told_step_and_label(unet, images):
    x = images[:1].expand(10, -1, -1, -1)
    for t, label in ((STEPS[:10], LABELS[3]), (STEPS[3], LABELS[:10])):
        outputs = unet.network(x, t.expand(10), label.expand(10))
        assert all((outputs[i] - outputs[0]).abs().max() > 1e-3 for i in range(1, 10))


def test_images_do_not_mix(unet, images):
    """What the UNet makes of an image is the same in a batch and alone, with and without label."""
    label = LABELS.masked_fill(STEPS >= 500, unet.n_classes)
    together = unet.network(images, STEPS[:, None], label[:, None])
    alone = [unet.network(images[i : i + 1], STEPS[i], label[i]) for i in range(48, 52)]
    torch.testing.assert_close(together[48:52], torch.cat(alone))
    torch.testing.assert_close(unet.network(images[50:], STEPS[50:]), together[50:])


def test_the_unet_takes_other_images(unet, images):
    """Of any size, as if zeros continued them to a multiple of 4; in colour, with other classes."""
    whole = unet.network(F.pad(images[:, :, :27, :26], (0, 2, 0, 1)), STEPS)
    torch.testing.assert_close(unet.network(images[:, :, :27, :26], STEPS), whole[:, :, :27, :26])
    network = ddpm.MyUNet(100, 32, n_classes=3, image_channels=3)
    colours = images[:6].reshape(2, 3, 28, 28)[..., :16]
    assert network(colours, torch.tensor([0, 99]), torch.tensor([2, 3])).shape == colours.shape
    with pytest.raises(ddpm.BadInput, match="image_channels=1"):
        network(images, STEPS)
