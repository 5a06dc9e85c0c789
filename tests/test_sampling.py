"""From noise to images: the sampler, guidance, labels, seeds, and what is refused."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import ddpm

T, LOW, HIGH = 100, 1e-3, 0.15
BETAS = np.linspace(LOW, HIGH, T)
BARS = np.cumprod(1 - BETAS)
MEAN, STD = 0.2, 0.1  # of the pixels of images that are Gaussian: none is beyond 1


class Gaussian(nn.Module):
    """The best prediction there is of the noise in Gaussian images; keeps the steps it saw."""

    def __init__(self, bars):
        super().__init__()
        self.bars, self.steps = torch.as_tensor(bars).float(), []

    def forward(self, x, t):
        self.steps.append(t[0].item())
        bar = self.bars[t].view(-1, 1, 1, 1)
        return (1 - bar).sqrt() * (x - bar.sqrt() * MEAN) / (bar * STD**2 + 1 - bar)


class Labelled(nn.Module):
    """Predicts noise of 0.01 with a label and 0.004 without; keeps the images and labels it saw."""

    n_classes = 10

    def __init__(self):
        super().__init__()
        self.images, self.labels = [], []

    def forward(self, x, t, label=None):
        self.images.append(x)
        self.labels.append(label)
        return torch.full_like(x, 0.004 if label is None else 0.01)


class Moody(nn.Sequential):
    """A network with dropout and with the statistics of a batch norm."""

    def forward(self, x, t):
        return super().forward(x)


def gaussian_model():
    model = ddpm.MyDDPM(nn.Identity())
    model.network = Gaussian(model.alpha_bars)
    return model


def draw(model, n_samples=4, **how):
    """Draws in three steps, unless others are asked for."""
    how = {"sample_steps": 3, "gif_name": None} | how
    return ddpm.generate_new_images(model, n_samples, **how)


# Below, x is a vector of coefficients: of 1 (its mean), of the first noise, of each one added later.
# All steps are linear in x, so that these say all of its distribution.
def noise_in(x, bar):
    """-> the best prediction of the noise: the formula of Gaussian, for a vector."""
    mean = MEAN * np.eye(len(x))[0]
    return np.sqrt(1 - bar) * (x - np.sqrt(bar) * mean) / (bar * STD**2 + 1 - bar)


def algorithm_2(steps, variance):
    """Yields x after each step of Algorithm 2, as its paper has it."""
    x = np.eye(len(steps) + 2)[1]
    for i, t in enumerate(steps):
        alpha, bar = 1 - BETAS[t], BARS[t]
        x = (x - (1 - alpha) / np.sqrt(1 - bar) * noise_in(x, bar)) / np.sqrt(alpha)
        if t > 0:
            beta_tilde = (1 - BARS[t - 1]) / (1 - bar) * BETAS[t]
            x[i + 2] = np.sqrt(BETAS[t] if variance == 1 else beta_tilde)
        yield x


def solver(steps, variance):
    """Yields x after each step of SDE-DPM-Solver++(2M), as its paper has it; the last is x_0."""
    x, last_x0, last_h = np.eye(len(steps) + 2)[1], None, None
    half_log_snr = np.log(BARS / (1 - BARS)) / 2
    for i, (t, s) in enumerate(itertools.pairwise(steps)):
        x0 = (x - np.sqrt(1 - BARS[t]) * noise_in(x, BARS[t])) / np.sqrt(BARS[t])
        h = half_log_snr[s] - half_log_snr[t]
        second_order = i > 0 and s < t - 1
        middle_x0 = x0 + (x0 - last_x0) / (2 * last_h / h) if second_order else x0
        x = np.sqrt((1 - BARS[s]) / (1 - BARS[t])) * np.exp(-h) * x
        x = x + np.sqrt(BARS[s]) * (1 - np.exp(-2 * h)) * middle_x0
        beta_tilde = (1 - BARS[s]) * (1 - np.exp(-2 * h))
        x[i + 2] = np.sqrt(1 - BARS[t] / BARS[s] if variance == 1 else beta_tilde)
        last_x0, last_h = x0, h
        yield x
    yield (x - np.sqrt(1 - BARS[0]) * noise_in(x, BARS[0])) / np.sqrt(BARS[0])


@pytest.mark.parametrize("variance", [1, 2])
@pytest.mark.parametrize("n_steps", [T, 20, 10])
def test_each_step_has_the_mean_and_variance_of_the_papers(n_steps, variance):
    """With all steps those of Algorithm 2, with fewer those of the solver."""
    model = ddpm.MyDDPM(Gaussian(BARS), T, LOW, HIGH)
    noise = torch.randn(400, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    way = list(ddpm.reverse_process(model, noise, None, 1, n_steps, variance, generator))
    steps = model.network.steps
    assert torch.equal(way[0], noise) and len(steps) == len(way) - 1 == n_steps
    papers = algorithm_2 if n_steps == T else solver
    for x, expected in zip(way[1:], papers(steps, variance), strict=True):
        var = np.square(expected[1:]).sum()
        assert abs(x.mean() - expected[0]) < 5 * np.sqrt(var / noise.numel())
        assert abs(x.var() / var - 1) < 5 * np.sqrt(2 / noise.numel())


class Line(nn.Module):
    """Sees an image that grows brighter in proportion to the logarithm of the SNR."""

    def forward(self, x, t):
        bar = torch.as_tensor(SHORT_BARS)[t].float().view(-1, 1, 1, 1)
        return (x - bar.sqrt() * bar.logit() / 10) / (1 - bar).sqrt()


SHORT_BARS = np.cumprod(1 - np.linspace(1e-3, 0.6, 20))


@pytest.mark.parametrize("n_steps", [8, 12, 16])
def test_where_steps_are_left_out_the_middle_counts(n_steps):
    """Also where it is just one: predictions on a straight line show which of its points counts."""
    model = ddpm.MyDDPM(Line(), 20, 1e-3, 0.6)
    noise = torch.randn(400, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    way = list(ddpm.reverse_process(model, noise, None, 1, n_steps, 2, generator))
    steps = ddpm.falling_steps(n_steps, 19)
    log_snr = np.log(SHORT_BARS / (1 - SHORT_BARS))
    for i, (t, s) in enumerate(itertools.pairwise(steps)):
        middle = (log_snr[t] + log_snr[s]) / 2 if i > 0 and s < t - 1 else log_snr[t]
        alpha = SHORT_BARS[t] / SHORT_BARS[s]
        of_x0 = np.sqrt(SHORT_BARS[s]) * (1 - alpha) / (1 - SHORT_BARS[t])
        of_x = np.sqrt(alpha) * (1 - SHORT_BARS[s]) / (1 - SHORT_BARS[t])
        beta_tilde = (1 - SHORT_BARS[s]) / (1 - SHORT_BARS[t]) * (1 - alpha)
        rest = (way[i + 1] - of_x * way[i]).mean() - of_x0 * middle / 10
        assert abs(rest) < 5 * np.sqrt(beta_tilde / noise.numel())


@pytest.mark.parametrize("how", [{"variance": 1}, {"variance": 2}, {"sample_steps": 50}])
def test_the_drawn_images_are_distributed_as_the_data(how):
    """All steps come near to the variance of the data, and so does the second order of a few."""
    found = draw(gaussian_model(), 20, **{"sample_steps": None} | how)
    assert found.shape == (20, 1, 28, 28) and abs(found.mean() - MEAN) < 0.005
    assert abs(found.var() / STD**2 - 1) < 0.1


def test_fewer_steps_are_dense_at_the_end():
    """Squares from the first to the last, and none twice."""

    def steps(n):
        model = ddpm.MyDDPM(Gaussian(BARS), T, LOW, HIGH)
        draw(model, 1, c=1, h=1, w=1, sample_steps=n)
        return model.network.steps

    assert steps(11) == [round(0.99 * i**2) for i in range(10, -1, -1)]
    assert steps(1) == [99]
    for n in (2, 20, 50, 99, 100):
        found = steps(n)
        assert found == sorted(set(found), reverse=True)
        assert (len(found), found[0], found[-1]) == (n, 99, 0)
    assert steps(101) == steps(None) == steps(100)


@pytest.mark.parametrize("guidance", [0, 0.5, 1, 2, 4])
@pytest.mark.parametrize("t, ramp", [(0, 1), (300, 0.5), (600, 0), (900, 0)])
def test_guidance_rises_to_its_full_strength(guidance, t, ramp, images):
    """Above 1 it does, from 0.6 T on. The predicted image is clipped."""
    strength = 1 + (guidance - 1) * (ramp if guidance > 1 else 1)
    bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t]
    model, x_t = ddpm.MyDDPM(Labelled()), 1.5 * images * bar**0.5
    for label, eta_theta in ((torch.zeros(100).long(), 0.004 + strength * 0.006), (None, 0.004)):
        found = ddpm.predict_x0(model, x_t, t, label, guidance)
        expected = (1.5 * images - ((1 - bar) / bar) ** 0.5 * eta_theta).clamp(-1, 1)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("label", [None, 7, [3, 1] * 6, torch.arange(12) // 2])
def test_labels_reach_the_network(label):
    """With guidance 1 it is called once a step; else, in the end, once more without the label."""
    plain, guided = Labelled(), Labelled()
    one = draw(ddpm.MyDDPM(plain), 12, label=label, guidance=1)
    two = draw(ddpm.MyDDPM(guided), 12, label=label)
    expected = torch.arange(12) % 10 if label is None else torch.as_tensor(label).expand(12)
    assert len(plain.labels) == 3 and all(torch.equal(found, expected) for found in plain.labels)
    assert torch.equal(guided.labels[-2], expected) and guided.labels[-1] is None
    assert one.mean() > two.mean()


def test_each_image_starts_from_noise_of_its_own():
    """More images than are drawn at once: classes go on in turn, and the noise isn't repeated."""
    network = Labelled()
    found = draw(ddpm.MyDDPM(network), 1203, guidance=1, sample_steps=1, c=2, h=5, w=9)
    noise = torch.cat(network.images)
    assert found.shape == noise.shape == (1203, 2, 5, 9)
    assert max(map(len, network.images)) <= 500
    assert torch.cat(network.labels).tolist() == [i % 10 for i in range(1203)]
    assert len(noise[:, 0, 0, 0].unique()) > 1195
    assert abs(noise.mean()) < 0.015 and abs(noise.std() - 1) < 0.015


def test_same_seed_same_images():
    """Whatever else draws random numbers; and it leaves those of others alone."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = draw(gaussian_model())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(one, draw(gaussian_model()))
    assert not torch.equal(one, draw(gaussian_model(), SEED=1))


@pytest.mark.parametrize("training", [True, False])
def test_drawing_leaves_the_network_as_it_was(training):
    """Dropout is off and statistics stand still, in the midst of a training too."""
    model = ddpm.MyDDPM(Moody(nn.BatchNorm2d(1), nn.Dropout())).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert torch.equal(draw(model), draw(model))
    assert model.training == model.network[1].training == training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


SENSELESS = {"variance": [3], "guidance": [-1, np.nan], "sample_steps": [0], "n_samples": [0]}
SENSELESS["label"] = [10, -1, 7.5, "7", [1, 2], torch.zeros(4), [0, 1, 2, 10]]


@pytest.mark.parametrize("name", SENSELESS)
def test_what_makes_no_sense_is_refused(name):
    for value in SENSELESS[name]:
        with pytest.raises(ddpm.BadInput, match=name):
            draw(ddpm.MyDDPM(Labelled()), **{name: value})


def test_what_is_no_model_or_no_argument():
    with pytest.raises(ddpm.BadInput, match="MyDDPM"):
        draw(Labelled())
    with pytest.raises(ddpm.BadInput, match="label.*0 classes"):
        draw(gaussian_model(), label=7)
    with pytest.raises(TypeError, match="guidence"):
        draw(gaussian_model(), guidence=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA")
def test_cuda_does_what_the_cpu_does(images):
    torch.manual_seed(0)
    model = ddpm.MyDDPM(ddpm.MyUNet()).requires_grad_(False)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    t, label, eta = torch.arange(100) * 10, torch.arange(100) % 10, torch.randn(images.shape)
    results = []
    for device in ("cpu", "cuda"):
        model.to(device)
        x0, y, noise = images.to(device), label.to(device), eta.to(device)
        x_t = model(x0, t, noise)
        *_, drawn = ddpm.reverse_process(model, noise, y, 2, 1, 2)
        losses = ddpm.denoising_loss(model, x0.repeat(20, 1, 1, 1), y.repeat(20))
        results.append([x_t, model.backward(x_t, t, y), drawn, *losses])
    for cpu, cuda in zip(*results, strict=True):
        assert (cuda.cpu() - cpu).norm() < 0.05 * cpu.norm()
