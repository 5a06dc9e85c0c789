"""From noise to images: both samplers, labels, seeds, and what is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ddpm


class KnowsImages(nn.Module):
    """Predicts exactly the noise between x_t and the images it knows; keeps every x it saw."""

    def __init__(self, images):
        super().__init__()
        self.images, self.seen = images, []

    def forward(self, x, t):
        self.seen.append(x)
        bars = ddpm.MyDDPM(nn.Identity()).alpha_bars[t].view(-1, 1, 1, 1)
        return (x - bars.sqrt() * self.images[: len(x)]) / (1 - bars).sqrt()


class Recorder(nn.Module):
    """Knows labels, predicts no noise, and keeps the labels that it was given."""

    n_classes = 10

    def __init__(self):
        super().__init__()
        self.labels = []

    def forward(self, x, t, label=None):
        self.labels.append(label)
        return torch.zeros_like(x)


class Labelled(nn.Module):
    """Predicts noise of the size of the label; 0 without one."""

    n_classes = 10

    def forward(self, x, t, label=None):
        size = torch.zeros(len(x)) if label is None else label.remainder(10).float()
        return size.view(-1, 1, 1, 1).expand_as(x) / 10


@pytest.fixture(scope="module")
def shipped():
    """The weights of MNIST in outputs/."""
    return ddpm.load_model(f"{ddpm.out_dir}/mnist.pt")


@pytest.mark.parametrize("how", [{}, {"variance": 1}, {"sample_steps": 20}, {"sample_steps": 1}])
def test_who_knows_the_noise_finds_the_images(how, images):
    model = ddpm.MyDDPM(KnowsImages(images))
    found = ddpm.generate_new_images(model, 10, gif_name=None, **how)
    torch.testing.assert_close(found, images[:10], atol=1e-3, rtol=0)


@pytest.mark.parametrize("variance", [1, 2])
def test_one_step_is_that_of_algorithm_2(variance, images):
    """Mean and variance of x_{t-1} given x_t and x_0: eq. 7 of the paper; or beta_t."""
    model = ddpm.MyDDPM(KnowsImages(images[:1].expand(4000, -1, -1, -1)))
    t, x_t = 300, torch.randn(1, 1, 28, 28)
    steps = ddpm.reverse_process(
        model, x_t.expand(4000, -1, -1, -1), None, 1, variance, torch.Generator().manual_seed(0)
    )
    model.n_steps = t + 1  # starts there
    next(steps)
    x = next(steps)
    beta, bar, bar_before = model.betas[t], model.alpha_bars[t], model.alpha_bars[t - 1]
    mean = bar_before.sqrt() * beta / (1 - bar) * images[:1]
    mean = mean + (1 - beta).sqrt() * (1 - bar_before) / (1 - bar) * x_t
    assert (x.mean(0) - mean[0]).abs().max() < 5 * (beta / 4000).sqrt()
    expected = beta if variance == 1 else (1 - bar_before) / (1 - bar) * beta
    assert abs(x.var(0).mean() / expected - 1) < 0.01


def test_the_predicted_image_is_clipped(images):
    model = ddpm.MyDDPM(KnowsImages(images * 3))
    for steps in (0, 10):
        found = ddpm.generate_new_images(model, 10, gif_name=None, sample_steps=steps)
        torch.testing.assert_close(found, (images[:10] * 3).clamp(-1, 1), atol=1e-3, rtol=0)


def test_fewer_steps_never_repeat_one(images):
    for n in (2, 50, 999):
        network = KnowsImages(images)
        ddpm.generate_new_images(ddpm.MyDDPM(network), 1, gif_name=None, sample_steps=n)
        assert len(network.seen) == n


def test_same_seed_same_images(shipped):
    def draw(n=2, **how):
        return ddpm.generate_new_images(shipped, n, gif_name=None, sample_steps=3, **how)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = draw()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(one, draw())
    assert not torch.equal(one, draw(SEED=1))


def test_flags_of_the_module_count_when_called(shipped, monkeypatch):
    def draw(**how):
        return ddpm.generate_new_images(shipped, 2, gif_name=None, **{"sample_steps": 3} | how)

    one, unguided = draw(), draw(guidance=1)
    assert not torch.equal(one, unguided)
    monkeypatch.setattr(ddpm, "guidance", 1)
    assert torch.equal(draw(), unguided)
    monkeypatch.setattr(ddpm, "sample_steps", 2)
    assert not torch.equal(draw(sample_steps=None), unguided)


@pytest.mark.parametrize(
    "label, expected",
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]),
        (-1, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]),
        (7, [7] * 12),
        ([3, 1] * 6, [3, 1] * 6),
        (torch.arange(12) // 2, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
    ],
)
def test_labels_reach_the_network(label, expected):
    network = Recorder()
    how = {"gif_name": None, "sample_steps": 2, "guidance": 1}
    ddpm.generate_new_images(ddpm.MyDDPM(network), 12, label=label, **how)
    assert [found.tolist() for found in network.labels] == [expected] * 2


def test_guidance_0_never_looks_at_the_label():
    def images_of(label):
        model = ddpm.MyDDPM(Labelled())
        how = {"gif_name": None, "sample_steps": 5, "guidance": 0}
        return ddpm.generate_new_images(model, 2, label=label, **how)

    assert torch.equal(images_of(3), images_of(7))


def test_a_misspelt_flag_is_refused(images):
    with pytest.raises(KeyError, match="guidence"):
        ddpm.generate_new_images(ddpm.MyDDPM(KnowsImages(images)), 1, guidence=2)


@pytest.mark.parametrize("label", [10, -2, 7.5, [1, 2], torch.zeros(4), [0, 1, 2, 10]])
def test_labels_that_make_no_sense(label):
    with pytest.raises(ddpm.BadInput, match="label"):
        ddpm.generate_new_images(ddpm.MyDDPM(Recorder()), 4, gif_name=None, label=label)


def test_a_network_without_labels_draws_no_class(images):
    with pytest.raises(ddpm.BadInput, match="label"):
        ddpm.generate_new_images(ddpm.MyDDPM(KnowsImages(images)), 4, gif_name=None, label=7)


@pytest.mark.parametrize(
    "how", [{"n_samples": 0}, {"variance": 3}, {"guidance": -1}, {"sample_steps": -1}]
)
def test_values_out_of_range(how, images):
    with pytest.raises(ddpm.BadInput, match=next(iter(how))):
        ddpm.generate_new_images(ddpm.MyDDPM(KnowsImages(images)), gif_name=None, **how)


def test_many_images_are_drawn_in_chunks():
    """More than fit at once: every class in turn all the way, and no more memory."""
    network = Recorder()
    n = 2 * ddpm.CHUNK + 3
    how = {"gif_name": None, "sample_steps": 1, "guidance": 1}
    images = ddpm.generate_new_images(ddpm.MyDDPM(network), n, **how)
    assert images.shape == (n, 1, 28, 28)
    assert max(map(len, network.labels)) == ddpm.CHUNK
    assert torch.cat(network.labels).tolist() == [i % 10 for i in range(n)]


def test_the_picture_shows_the_class_that_was_asked_for(shipped):
    """A small classifier that learns from 10,000 real digits recognizes the drawn ones."""
    images, labels = ddpm.load_data()[:10_000]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 32, 5, stride=2), nn.ReLU(), nn.Conv2d(32, 64, 5, stride=2))
    net.extend([nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)])
    optim = torch.optim.AdamW(net.parameters(), 2e-3)
    for chosen in torch.randperm(20_000).remainder(10_000).split(100):
        optim.zero_grad()
        F.cross_entropy(net(images[chosen]), labels[chosen]).backward()
        optim.step()
    drawn = ddpm.generate_new_images(shipped, 100, gif_name=None, sample_steps=20)
    assert (net(drawn).argmax(1) == torch.arange(100) % 10).sum() >= 95
    sevens = ddpm.generate_new_images(shipped, 20, gif_name=None, sample_steps=20, label=7)
    assert (net(sevens).argmax(1) == 7).sum() >= 18
